//! Pods of this node whose addresses are another node's by now.
//!
//! A node that is cut off for longer than the quarantine, while its Node object is deleted, comes back to find
//! that another node holds its block. It has leased nothing new since `leaseUntil`, but its pods ran on: what
//! they send would bear another pod's address, and what is meant for that pod would end here. So once a PodCIDR
//! says whose the block is, their links go down. Kubernetes deletes these pods anyway, as their Node was deleted.
//!
//! Only an object proves that: while none can be read, or the block is nobody's, running pods go on. A link goes
//! up again if an object gives the block to this node again before the pod is gone. So do links that an earlier life
//! of the agent took down: those of living leases that are down when this one first looks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use plat_cni::foreign;
use plat_cni::link::{self, Link, LinkChange};
use plat_cni::netlink::Socket;
use plat_crds::alias;
use plat_crds::block::Block;
use plat_crds::lease::Lease;

use crate::desired::Map;
use crate::facts::BlockFact;
use crate::leases::words;
use crate::node::OwnBlocks;
use crate::overlap;

/// The blocks of other nodes, with their names, that hold addresses of blocks with leases here.
pub fn taken(map: Map<'_>, own: &OwnBlocks, leased: &BTreeSet<Block>) -> BTreeMap<Block, String> {
    let doubtful: Vec<&Block> = leased.iter().filter(|block| !own.contains_key(block)).collect();
    if doubtful.is_empty() {
        return BTreeMap::new();
    }
    let (accepted, _) = overlap::older_first(map.blocks, map.absent);
    let is_anothers = |fact: &&&BlockFact| {
        !fact.released() && !map.absent.contains(&fact.name) && !own.contains_key(&fact.block)
    };
    let others = accepted.iter().filter(is_anothers);
    let shared = others.filter(|fact| doubtful.iter().any(|block| block.overlaps(&fact.block)));
    shared.map(|fact| (fact.block, fact.node.clone())).collect()
}

/// Links that are down because of this.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cuts {
    links: BTreeSet<u32>,
    /// Whether those of an earlier life are among them.
    remembered: bool,
}

/// What was found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Doubled {
    /// Pods with such addresses, in words.
    pub pods: Vec<String>,
    /// Those of them whose links were taken down just now.
    pub newly: Vec<String>,
}

impl Cuts {
    /// Takes down the links of pods whose addresses are `taken`, and raises those whose addresses are
    /// [`given`] to the node again.
    pub fn apply(
        &mut self,
        socket: &mut Socket,
        pods: &[Lease],
        taken: &BTreeMap<Block, String>,
        given: &BTreeSet<Block>,
    ) -> Doubled {
        self.links.retain(|index| pods.iter().any(|lease| lease.veth.index == *index));
        let doubled = self.switch_all(socket, pods, taken, given);
        // Only now, so that a link that a DEL has just taken down is gone before it would be raised.
        if !self.remembered && !pods.is_empty() {
            self.remember(socket, pods);
        }
        doubled
    }

    fn switch_all(
        &mut self,
        socket: &mut Socket,
        pods: &[Lease],
        taken: &BTreeMap<Block, String>,
        given: &BTreeSet<Block>,
    ) -> Doubled {
        let mut doubled = Doubled::default();
        if taken.is_empty() && self.links.is_empty() {
            return doubled;
        }
        // What another network attached is not ours to switch.
        for lease in pods.iter().filter(|lease| !foreign::is_foreign(lease)) {
            let addresses = || lease.addresses.iter().map(|leased| &leased.address);
            if let Some(holder) = addresses().find_map(|address| holder(address, taken)) {
                let what = format!("{}, which node {holder} holds by now", words(lease));
                if self.switch(socket, lease, false) {
                    doubled.newly.push(what.clone());
                }
                doubled.pods.push(what);
            } else if self.links.contains(&lease.veth.index)
                && addresses().all(|address| given.iter().any(|block| block.contains(address)))
                && self.switch(socket, lease, true)
            {
                tracing::info!(pod = words(lease), "its address is this node's again: its link is up");
            }
        }
        doubled
    }

    /// Takes the links of these pods that are down for cut by an earlier life.
    fn remember(&mut self, socket: &mut Socket, pods: &[Lease]) {
        let is_of = |link: &Link, lease: &Lease| {
            let marked = link.alias.as_deref();
            let marked = marked.is_some_and(|text| alias::is_of(text, &lease.container_id, &lease.ifname));
            marked && (link.index, &link.name) == (lease.veth.index, &lease.veth.name)
        };
        match link::links(socket, Some("veth")) {
            Ok(links) => {
                let down = links.iter().filter(|link| !link.up);
                let cut = down.filter(|link| pods.iter().any(|lease| is_of(link, lease)));
                self.links.extend(cut.map(|link| link.index));
                self.remembered = true;
            }
            // The next pass tries again.
            Err(error) => tracing::warn!(%error, "the links of pods cannot be listed"),
        }
    }

    /// Whether the link was changed. It may be another's by now, or gone: then there is nothing to do.
    fn switch(&mut self, socket: &mut Socket, lease: &Lease, up: bool) -> bool {
        let changed = link::link_by_index(socket, lease.veth.index).and_then(|found| match found {
            Some(host) if host.name == lease.veth.name && host.up != up => {
                let change = LinkChange { up: Some(up), ..LinkChange::default() };
                socket.request(link::set_link(host.index, &host.name, &change)).map(|()| true)
            }
            _ => Ok(false),
        });
        match changed {
            Ok(changed) => {
                if up {
                    self.links.remove(&lease.veth.index);
                } else {
                    self.links.insert(lease.veth.index);
                }
                changed
            }
            // The next pass tries again.
            Err(error) => {
                tracing::warn!(%error, up, pod = words(lease), "the link of a pod was not switched");
                false
            }
        }
    }
}

fn holder<'a>(address: &IpAddr, taken: &'a BTreeMap<Block, String>) -> Option<&'a String> {
    taken.iter().find(|(block, _)| block.contains(address)).map(|(_, holder)| holder)
}

/// Those of the node's `own` blocks that an object gives to it.
pub fn given(node: &str, map: Map<'_>, own: &OwnBlocks) -> BTreeSet<Block> {
    let of_node = map.blocks.values().filter(|fact| fact.node == node && !fact.released());
    let there = of_node.filter(|fact| !map.absent.contains(&fact.name));
    there.map(|fact| fact.block).filter(|block| own.contains_key(block)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::{Host, own_blocks};
    use crate::fixtures::{block, block as block_of, me};
    use plat_crds::blocks_file::HeldBlock;
    use plat_crds::pod_cidr::BlockState;

    #[test]
    fn only_what_an_object_gives_to_another_node_is_taken() {
        let of_n9 = |state| BlockFact { node: "n9".into(), state, ..block(1) };
        for (fact, is_absent, expected) in [
            (Some(block(1)), false, None),
            (Some(BlockFact { state: BlockState::Quarantined, ..block(1) }), false, None),
            (None, false, None),
            (Some(of_n9(BlockState::Active)), false, Some("n9")),
            (Some(of_n9(BlockState::Draining)), false, Some("n9")),
            (Some(of_n9(BlockState::Unknown)), false, Some("n9")),
            (Some(of_n9(BlockState::Quarantined)), false, None),
            (Some(of_n9(BlockState::Active)), true, None),
        ] {
            let blocks: BTreeMap<_, _> = fact.into_iter().map(|fact| (fact.name.clone(), fact)).collect();
            let absent = blocks.keys().filter(|_| is_absent).cloned().collect();
            let map = Map { blocks: &blocks, ranges: &BTreeMap::new(), policies: &[], absent: &absent };
            let me = me("n1");
            let host = Host { leased: ["10.244.1.0/24".parse().unwrap()].into(), ..Host::default() };
            let taken = taken(map, &own_blocks(&me, map, &host), &host.leased);
            assert_eq!(taken.values().map(String::as_str).next(), expected, "{blocks:?}");
        }
    }

    #[test]
    fn of_a_block_that_several_nodes_share_only_what_is_anothers_is_taken() {
        let of = |cidr: &str, node: &str| {
            let block: Block = cidr.parse().unwrap();
            let fact = BlockFact { name: block.object_name(), block, node: node.into(), ..block_of(7) };
            (fact.name.clone(), fact)
        };
        let blocks = [of("10.244.7.0/26", "n1"), of("10.244.7.64/26", "n2")].into();
        let map = Map { blocks: &blocks, ranges: &BTreeMap::new(), policies: &[], absent: &BTreeSet::new() };
        let cidr = |text: &str| text.parse::<Block>().unwrap();
        let own = [(cidr("10.244.7.64/26"), HeldBlock { cidr: cidr("10.244.7.64/26"), lease: true })].into();
        let taken = taken(map, &own, &[cidr("10.244.7.0/24")].into());
        assert_eq!(taken, [(cidr("10.244.7.0/26"), "n1".to_owned())].into());
    }
}
