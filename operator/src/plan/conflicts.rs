//! What contradicts itself: ranges that are deleted in use, PodCIDRs that the operator cannot have made, and
//! addresses that two nodes have. It is
//! named, and otherwise left alone: whoever made it knows what it is for, and pods may run on it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::Planner;
use crate::facts::{BlockFact, Name, NodeFact};
use crate::reason;
use crate::step::{Fault, Kind, ObjectKey};

impl Planner<'_> {
    pub(super) fn name_conflicts(&mut self) {
        self.name_kept_ranges();
        self.name_foreign_blocks();
        self.name_shared_addresses();
    }

    /// Deleted ranges that PodCIDRs keep.
    fn name_kept_ranges(&mut self) {
        let is_used = |name: &Name| self.snapshot.blocks.values().any(|block| block.range == *name);
        let kept = self.ranges.values().filter(|range| range.fact.deleting && is_used(&range.fact.name));
        let kept = kept.map(|range| Fault {
            object: ObjectKey::new(Kind::ClusterCIDR, &range.fact.name, &range.fact.uid),
            reason: reason::TERMINATING,
            message: format!("ClusterCIDR {}: {}", range.fact.name, range.judgement.ready.message),
        });
        self.plan.faults.extend(kept.collect::<Vec<_>>());
    }

    fn name_foreign_blocks(&mut self) {
        let mut faults = Vec::new();
        let readable = || self.snapshot.blocks.values().filter(|block| block.problem.is_none());
        // Blocks of one size of ranges that are disjoint cannot overlap: thousands need not be compared.
        let clash = |reason| reason == reason::OVERLAPS_CLUSTER_CIDR;
        let mut foreign: BTreeMap<&str, String> =
            readable().filter_map(|block| Some((&*block.name, self.why_foreign(block)?))).collect();
        let may_overlap = self.ranges.values().any(|range| clash(range.judgement.overlapping.reason))
            || !foreign.is_empty();
        for block in readable() {
            let mut name = |reason, message| {
                let object = ObjectKey::new(Kind::PodCIDR, &block.name, &block.uid);
                faults.push(Fault { object, reason, message });
            };
            if let Some(why) = foreign.remove(&*block.name) {
                let message = format!(
                    "PodCIDR {} of node {} was not made by the operator: {why}; delete it, and the node gets another block: \
                     first drain the node if pods have addresses of it",
                    block.name, block.node
                );
                name(reason::FOREIGN_BLOCK, message);
            }
            if let Some(other) = may_overlap.then(|| self.older_overlap(block)).flatten() {
                let message = format!(
                    "PodCIDR {} of node {} shares addresses with the older PodCIDR {} of node {}: delete the one that no pods use, \
                     or drain node {} and delete {}",
                    block.name, block.node, other.name, other.node, block.node, block.name
                );
                name(reason::BLOCKS_OVERLAP, message);
            }
        }
        self.plan.faults.append(&mut faults);
    }

    /// Why the operator cannot have carved that block.
    fn why_foreign(&self, block: &BlockFact) -> Option<String> {
        let Some(range) = self.ranges.get(&block.range) else {
            return Some(format!("there is no ClusterCIDR {}", block.range));
        };
        let (Some(cidr), Some(prefix)) = (range.fact.range, range.fact.block_prefix) else { return None };
        if !cidr.covers(&block.block) {
            return Some(format!("it does not lie in ClusterCIDR {} ({cidr})", block.range));
        }
        let wrong_size = block.block.prefix_length() != prefix;
        wrong_size.then(|| format!("blocks of ClusterCIDR {} are /{prefix}", block.range))
    }

    /// An older PodCIDR that shares addresses with `block`: agents programme the older of the two.
    fn older_overlap(&self, block: &BlockFact) -> Option<&BlockFact> {
        let age = |block: &BlockFact| (block.created, block.block);
        let others = self.claims.overlapping(&block.block).filter(|(other, _)| **other != block.block);
        let others = others.filter_map(|(other, _)| self.snapshot.blocks.get(other.object_name().as_str()));
        others.map(|other| &**other).find(|other| age(other) < age(block))
    }

    fn name_shared_addresses(&mut self) {
        let snapshot = self.snapshot;
        let mut nodes_of: BTreeMap<IpAddr, Vec<&NodeFact>> = BTreeMap::new();
        for node in snapshot.nodes.values() {
            for address in &node.addresses {
                nodes_of.entry(*address).or_default().push(node);
            }
        }
        for (address, nodes) in nodes_of.iter().filter(|(_, nodes)| nodes.len() > 1) {
            for node in nodes {
                let others = nodes.iter().filter(|other| other.name != node.name);
                let others: Vec<&str> = others.map(|other| &*other.name).take(3).collect();
                if others.is_empty() {
                    continue;
                }
                let message = format!(
                    "node {} has the InternalIP {address}, and so has node {}: pods of only one of them can be reached; \
                     correct the kubelet's --node-ip, or delete the Node that is no more",
                    node.name,
                    others.join(", ")
                );
                self.fault(node, reason::ADDRESS_SHARED, message);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::facts::{BlockFact, NodeFact, RangeFact};
    use crate::fixtures::{Scene, address_of, at, block, held_block, node, range, scene};
    use crate::reason;

    /// `REASON OBJECT` of what this file names.
    fn named(scene: &Scene) -> Vec<String> {
        let ours =
            [reason::FOREIGN_BLOCK, reason::BLOCKS_OVERLAP, reason::ADDRESS_SHARED, reason::TERMINATING];
        let faults = scene.plan().faults.into_iter().filter(|fault| ours.contains(&fault.reason));
        faults.map(|fault| format!("{} {}", fault.reason, fault.object.name)).collect()
    }

    fn message(scene: &Scene, reason: &str) -> String {
        scene.plan().faults.into_iter().find(|fault| fault.reason == reason).unwrap().message
    }

    fn map() -> Scene {
        scene()
            .range(range("r", "10.244.0.0/16"))
            .nodes(&["n1", "n2"])
            .block(held_block("10.244.1.0/24", "r", "n1"))
            .block(held_block("10.244.2.0/24", "r", "n2"))
    }

    #[test]
    fn blocks_that_the_operator_cannot_have_made_are_named_and_its_own_are_not() {
        assert_eq!(named(&map()), [] as [&str; 0]);
        for (cidr, range, why) in [
            ("192.168.1.0/24", "r", "it does not lie in ClusterCIDR r (10.244.0.0/16)"),
            ("10.244.9.0/24", "nowhere", "there is no ClusterCIDR nowhere"),
            ("10.244.9.0/25", "r", "blocks of ClusterCIDR r are /24"),
        ] {
            let scene = map().block(held_block(cidr, range, "n3"));
            assert_eq!(named(&scene), [format!("ForeignPodCIDRObject {}", block(cidr).object_name())]);
            let message = message(&scene, reason::FOREIGN_BLOCK);
            assert!(message.contains(why) && message.contains("delete it"), "{message}");
        }
    }

    #[test]
    fn of_two_blocks_that_overlap_the_younger_is_named() {
        let own = held_block("10.244.1.0/24", "r", "n1");
        for (created, younger) in [(-1, "10-244-1-0-24"), (0, "10-244-1-0-24"), (1, "10-244-0-0-23")] {
            let created = at(own.created.as_second() + created);
            let scene = map().block(BlockFact { created, ..held_block("10.244.0.0/23", "r", "n3") });
            let named = named(&scene);
            assert!(named.contains(&format!("PodCIDRsOverlap {younger}")), "{named:?}");
        }
    }

    #[test]
    fn nodes_that_have_one_address_are_all_named() {
        let twin = NodeFact { addresses: [address_of("n1")].into(), ..node("n3") };
        let scene = map().node(twin);
        assert_eq!(named(&scene), ["NodeAddressShared n1", "NodeAddressShared n3"]);
        assert!(message(&scene, reason::ADDRESS_SHARED).contains("so has node n3"));
        let twice = NodeFact { addresses: [address_of("n4"), address_of("n4")].into(), ..node("n4") };
        assert_eq!(named(&map().node(twice)), [] as [&str; 0], "one node may say it twice");
    }

    #[test]
    fn a_deleted_range_is_named_for_as_long_as_blocks_keep_it() {
        let deleted = |name| RangeFact { deleting: true, ..range(name, "10.244.0.0/16") };
        let scene = map().range(deleted("r"));
        assert_eq!(named(&scene), ["Terminating r"]);
        let message = message(&scene, reason::TERMINATING);
        assert!(message.contains("2 left, such as 10-244-1-0-24 of node n1"), "{message}");
        assert!(message.contains("-l plat.network/clustercidr=r plat.network/drain="), "{message}");
    }
}
