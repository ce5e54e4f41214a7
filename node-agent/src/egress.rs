//! How what the pods of this node's own blocks send out of the cluster leaves it: with whose address, and to which
//! destinations with the pods' own. Pure.
//!
//! A RoutingPolicy counts for all blocks of the nodes that its `sources` select: where it leads other nodes' packets
//! (`destinations`) does not matter here. A policy for a node with blocks of both families may name an address and
//! networks of one: each family takes its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use plat_crds::block::{Block, Family};
use plat_crds::blocks_file::HeldBlock;
use plat_crds::cluster_cidr::MasqueradeMode;
use plat_crds::routing::{self, Decided, Egress, Invalid, Layer, Routing};

use crate::desired::{Host, Location, Map};
use crate::fabric::Leaving;
use crate::facts::{Fault, Reason};

/// The blocks whose traffic is given another address as it leaves the cluster, and the policies that cannot be followed:
/// then the traffic leaves as if there were none.
pub fn leaving(
    map: Map<'_>,
    own: &BTreeMap<Block, HeldBlock>,
    host: &Host,
) -> (BTreeMap<Block, Leaving>, Vec<Fault>) {
    let (mut leaving, mut faults) = (BTreeMap::new(), Vec::new());
    for block in own.keys() {
        let policy = resolve(map, block).unwrap_or_else(|error| {
            faults.push(fault(block, Reason::UnusablePolicy, &error.to_string()));
            none()
        });
        let range = map.range_of(block);
        let mut exclude = range.map(|range| range.exclude.clone()).unwrap_or_default();
        exclude.extend(policy.exclude.value);
        let of_block = Leaving {
            include: of_family(policy.include.value, block.family()),
            exclude: of_family(exclude, block.family()),
            masquerade: range.map_or(MasqueradeMode::Enabled, |range| range.masquerade),
            address: address(block, &policy.address, host).unwrap_or_else(|fault| {
                faults.push(fault);
                None
            }),
        };
        if of_block.masquerade != MasqueradeMode::Disabled || !of_block.include.is_empty() {
            leaving.insert(*block, of_block);
        }
    }
    (leaving, faults)
}

/// The addresses that policies of these blocks name: where they are must be known.
pub fn addresses<'a>(map: Map<'_>, own: impl IntoIterator<Item = &'a Block>) -> BTreeSet<IpAddr> {
    own.into_iter().filter_map(|block| resolve(map, block).ok()?.address.value).collect()
}

fn resolve(map: Map<'_>, block: &Block) -> Result<Egress, Invalid> {
    let fact = map.blocks.get(&block.object_name());
    let own = fact.and_then(|fact| fact.routing.as_ref()).map(|routing| (Layer::PodCIDR, routing));
    let policies =
        map.policies.iter().map(|policy| (Layer::RoutingPolicy(policy.name.clone()), &policy.routing));
    let range = map.range_of(block).and_then(|range| range.routing.as_ref());
    let range = range.map(|routing| (Layer::ClusterCIDR, routing));
    let layers: Vec<(Layer, &Routing)> = own.into_iter().chain(policies).chain(range).collect();
    routing::resolve_egress(&layers)
}

fn none() -> Egress {
    Egress {
        include: Decided { value: Vec::new(), from: Layer::Default },
        exclude: Decided { value: Vec::new(), from: Layer::Default },
        address: Decided { value: None, from: Layer::Default },
    }
}

fn of_family(nets: Vec<IpNet>, family: Family) -> Vec<IpNet> {
    IpNet::aggregate(&nets.into_iter().filter(|net| Family::of(&net.addr()) == family).collect())
}

fn address(block: &Block, policy: &Decided<Option<IpAddr>>, host: &Host) -> Result<Option<IpAddr>, Fault> {
    let of_block = policy.value.filter(|address| Family::of(address) == block.family());
    let Some(address) = of_block else { return Ok(None) };
    if host.locations.get(&address) == Some(&Location::Local) {
        return Ok(Some(address));
    }
    let what = format!(
        "egressAddress {address} of the {} is not an address of this node, so its pods' traffic leaves with that of the link; correct spec.routing.egressAddress, or give the node that address",
        policy.from
    );
    Err(fault(block, Reason::NotLocal, &what))
}

fn fault(block: &Block, reason: Reason, what: &str) -> Fault {
    let name = block.object_name();
    let message = format!("PodCIDR '{name}': {what}");
    Fault::block(name, reason, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::BlockFact;
    use crate::fixtures::{block, block_v6, range};
    use crate::policies::InForce;

    fn policy(json: serde_json::Value) -> InForce {
        InForce {
            name: "p".into(),
            generation: 1,
            priority: 0,
            // About no block of this node, and none the less for what leaves it.
            destinations: plat_crds::selector::Selector::read(Some(
                &serde_json::from_value(serde_json::json!({"matchLabels": {"zone": "b"}})).unwrap(),
            ))
            .unwrap(),
            routing: serde_json::from_value(json).unwrap(),
        }
    }

    fn of(masquerade: MasqueradeMode, policies: &[InForce]) -> (Vec<String>, Vec<Fault>) {
        let blocks: BTreeMap<String, BlockFact> =
            [block(1), block_v6(1)].into_iter().map(|b| (b.name.clone(), b)).collect();
        let exclude = vec!["192.168.0.0/16".parse().unwrap()];
        let ranges = [(
            "default-v4".to_owned(),
            crate::facts::RangeFact { masquerade, exclude, ..range("default-v4") },
        )]
        .into();
        let map = Map { blocks: &blocks, ranges: &ranges, policies, absent: &Default::default() };
        let held = |b: BlockFact| (b.block, HeldBlock { cidr: b.block, lease: true });
        let own = [held(block(1)), held(block_v6(1))].into();
        let local = [([172, 30, 0, 9].into(), Location::Local)].into();
        let host = Host { locations: local, ..Host::default() };
        let (leaving, faults) = leaving(map, &own, &host);
        let said = leaving.iter().map(|(block, l)| {
            format!(
                "{block} {:?} include {:?} exclude {:?} as {:?}",
                l.masquerade, l.include, l.exclude, l.address
            )
        });
        (said.collect(), faults)
    }

    #[test]
    fn a_policy_of_the_node_adds_exceptions_and_an_address_to_what_the_range_says() {
        let (said, faults) = of(MasqueradeMode::Enabled, &[]);
        assert_eq!(faults, []);
        assert_eq!(said[0], "10.244.1.0/24 Enabled include [] exclude [192.168.0.0/16] as None");
        let policy = policy(serde_json::json!({
            "egressAddress": "172.30.0.9",
            "masquerade": {"include": ["10.9.0.0/16", "fd09::/16"], "exclude": ["192.169.0.0/16"]},
        }));
        let (said, faults) = of(MasqueradeMode::Enabled, std::slice::from_ref(&policy));
        assert_eq!(faults, []);
        assert_eq!(
            said,
            [
                "10.244.1.0/24 Enabled include [10.9.0.0/16] exclude [192.168.0.0/15] as Some(172.30.0.9)",
                "fd00:10:244:1::/64 Enabled include [fd09::/16] exclude [] as None",
            ]
        );
        let (said, _) = of(MasqueradeMode::Disabled, &[policy]);
        assert!(said[0].starts_with("10.244.1.0/24 Disabled include [10.9.0.0/16]"), "{said:?}");
        assert!(
            !of(MasqueradeMode::Disabled, &[]).0[0].starts_with("10.244.1.0/24"),
            "nothing is left to do"
        );
    }

    #[test]
    fn an_address_that_is_not_the_nodes_is_a_fault_of_the_block_and_its_traffic_goes_on() {
        let (said, faults) =
            of(MasqueradeMode::Enabled, &[policy(serde_json::json!({"egressAddress": "172.30.0.99"}))]);
        assert!(said[0].ends_with("as None"), "{said:?}");
        assert_eq!(faults.len(), 1);
        assert_eq!((faults[0].name.as_str(), faults[0].reason), ("10-244-1-0-24", Reason::NotLocal));
        let words =
            "PodCIDR '10-244-1-0-24': egressAddress 172.30.0.99 of the RoutingPolicy 'p' is not an address";
        assert!(faults[0].message.starts_with(words), "{}", faults[0].message);
    }
}
