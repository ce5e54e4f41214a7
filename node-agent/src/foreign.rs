//! What of the host itself, or of other programs on it, shares addresses with the pods': bridges such as docker's,
//! VPNs, routes of another network. Found by their routes, and named with their device before they hurt. Pure.
//!
//! | a route of others | what it does | what is said |
//! |---|---|---|
//! | inside a block of another node | takes the block's packets: it is at least as specific as ours | the block fails on this node |
//! | elsewhere inside a range | will take those of a block that comes there, or lose its own to it | a word about the range |
//! | of a link, around a whole range | the hosts on that link cannot be reached where pods' addresses are | a word about the range |
//!
//! Nothing of it is touched. A router's route around a range is like a default route and no news; neither is one to
//! a block that `spec.routing.mode: None` leaves to others, nor one that leads where ours does.
//!
//! Worse is a block that holds an address which this node itself needs: a route to it would cut the node off
//! ([`exposed`]); such a block is not programmed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use plat_crds::block::Block;
use plat_crds::names::VETH_PREFIX;

use crate::desired::{Map, Me};
use crate::fabric::host_prefix;
use crate::facts::{BlockFact, Fault, RangeFact, Reason};
use crate::overlap;
use crate::path;

/// As many are told as a report has room for.
const MAX_TOLD: usize = 16;

/// A route that is not Plat's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignRoute {
    /// Its destination.
    pub prefix: Block,
    /// Name of the link that it leads to, if it leads to one.
    pub device: Option<String>,
    /// The router that it leads to; without one it is of the link itself, or leads nowhere.
    pub gateway: Option<IpAddr>,
}

/// The faults and notices of these routes.
pub fn overlaps(me: &Me, map: Map<'_>, routes: &[ForeignRoute]) -> Vec<Fault> {
    let of_others = routes.iter().filter(|route| route.prefix.prefix_length() > 0 && !is_of_pods(me, route));
    let mut faults: BTreeSet<Fault> = BTreeSet::new();
    for route in of_others {
        for range in map.ranges.values().filter(|range| range.range.overlaps(&route.prefix)) {
            faults.extend(overlap(me, map, route, range));
        }
    }
    faults.into_iter().take(MAX_TOLD).collect()
}

fn is_of_pods(me: &Me, route: &ForeignRoute) -> bool {
    let device = route.device.as_deref().unwrap_or_default();
    // On lo stand the gateways of pods without bridge; nothing is reached by it but this host.
    device == me.bridge || device == "lo" || device.starts_with(VETH_PREFIX)
}

fn overlap(me: &Me, map: Map<'_>, route: &ForeignRoute, range: &RangeFact) -> Option<Fault> {
    let (what, name) = (describe(route), &range.name);
    if !range.range.covers(&route.prefix) {
        if route.gateway.is_some() || route.device.is_none() {
            return None;
        }
        return Some(Fault::range(
            name,
            Reason::HostRoute,
            format!(
                "ClusterCIDR '{name}' ({}) lies in {what}: hosts on that link that have addresses of blocks cannot be reached from this node; list their addresses under spec.reserved, or use another range",
                range.range
            ),
        ));
    }
    let hit: Vec<&BlockFact> = map
        .blocks
        .values()
        .filter(|block| !block.released() && block.block.overlaps(&route.prefix))
        .collect();
    // One that goes before ours to the very same prefix is met where routes are compared (`Overridden`).
    let same = |block: &&BlockFact| route.gateway.is_some() && block.block == route.prefix;
    if hit.iter().any(|block| same(block) || is_left_to(map, block, route)) {
        return None;
    }
    // One that is less specific than ours takes nothing from us.
    let taken = |block: &&&BlockFact| block.node != me.node && block.block.covers(&route.prefix);
    match hit.iter().find(taken) {
        Some(block) => Some(Fault::block(
            &block.name,
            Reason::Overlapping,
            format!(
                "PodCIDR '{}' of node {}: this node sends packets to {} by {what}; remove that, or move it to other addresses (docker: 'bip' and 'default-address-pools')",
                block.name, block.node, route.prefix
            ),
        )),
        None => Some(Fault::range(
            name,
            Reason::HostRoute,
            format!(
                "ClusterCIDR '{name}' ({}) holds {what}: pods and others that have the same addresses cannot both be reached from this node; list {} under spec.reserved, or move it to other addresses (docker: 'bip' and 'default-address-pools')",
                range.range, route.prefix
            ),
        )),
    }
}

/// Whether the route is meant for that block: users leave it to others, or it leads where ours does.
fn is_left_to(map: Map<'_>, block: &BlockFact, route: &ForeignRoute) -> bool {
    match path::next_hops(block, map) {
        Ok(hops) => hops.is_empty() || route.gateway.is_some_and(|gateway| hops.contains(&gateway)),
        Err(_) => false,
    }
}

fn describe(route: &ForeignRoute) -> String {
    match (&route.device, route.gateway) {
        (Some(device), Some(gateway)) => format!("the route {} via {gateway} on {device}", route.prefix),
        (Some(device), None) => format!("{} of link {device}", route.prefix),
        (None, _) => format!("the route {} that leads nowhere", route.prefix),
    }
}

/// The blocks that hold addresses which this node needs, with one of them each. `needed` are addresses of the API
/// server, resolvers, routers and nodes, `guessed` blocks without an object.
pub fn exposed(
    map: Map<'_>,
    guessed: &BTreeSet<Block>,
    needed: &BTreeSet<IpAddr>,
) -> BTreeMap<Block, BTreeSet<IpAddr>> {
    let mut exposed: BTreeMap<Block, BTreeSet<IpAddr>> = BTreeMap::new();
    // Only these are programmed. They are disjoint, so the nearest below an address is the one that may hold it.
    let (accepted, _) = overlap::older_first(map.blocks, map.absent);
    let mut blocks: BTreeSet<Block> = accepted.iter().map(|fact| fact.block).collect();
    blocks.extend(guessed.iter().filter(|block| !accepted.iter().any(|fact| fact.block.overlaps(block))));
    for address in needed {
        let host = Block::containing(host_prefix(*address));
        let nearest = blocks.range(..=host).next_back().filter(|block| block.contains(address));
        if let Some(block) = nearest {
            exposed.entry(*block).or_default().insert(*address);
        }
    }
    exposed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{block, me, range};
    use plat_crds::routing::{Mode, Routing};

    fn link(prefix: &str, device: &str) -> ForeignRoute {
        ForeignRoute { prefix: prefix.parse().unwrap(), device: Some(device.into()), gateway: None }
    }

    fn via(prefix: &str, gateway: &str) -> ForeignRoute {
        ForeignRoute { gateway: Some(gateway.parse().unwrap()), ..link(prefix, "eth0") }
    }

    fn told(blocks: Vec<BlockFact>, route: ForeignRoute) -> Option<(String, Reason, String)> {
        let blocks = blocks.into_iter().map(|b| (b.name.clone(), b)).collect();
        let ranges = [("r".to_owned(), range("r"))].into();
        let absent = BTreeSet::new();
        let map = Map { blocks: &blocks, ranges: &ranges, policies: &[], absent: &absent };
        let mut faults = overlaps(&me("n1"), map, &[route]);
        assert!(faults.len() <= 1, "{faults:?}");
        faults.pop().map(|fault| (fault.name, fault.reason, fault.message))
    }

    #[test]
    fn what_shares_addresses_with_pods_is_named_and_what_only_leads_there_is_not() {
        let left_to_others = || BlockFact {
            routing: Some(Routing { mode: Some(Mode::None), ..Routing::default() }),
            ..block(2)
        };
        let all = || vec![block(1), block(2)];
        for (blocks, route, expected) in [
            (
                all(),
                link("10.244.2.0/24", "docker0"),
                Some(("10-244-2-0-24", Reason::Overlapping, "docker0")),
            ),
            (all(), link("10.244.2.128/25", "wg0"), Some(("10-244-2-0-24", Reason::Overlapping, "wg0"))),
            (
                all(),
                via("10.244.2.0/25", "192.0.2.9"),
                Some(("10-244-2-0-24", Reason::Overlapping, "192.0.2.9")),
            ),
            (all(), link("10.244.2.0/23", "br-1"), Some(("r", Reason::HostRoute, "br-1"))),
            (all(), link("10.244.77.0/24", "docker0"), Some(("r", Reason::HostRoute, "spec.reserved"))),
            (all(), link("10.244.1.0/24", "docker0"), Some(("r", Reason::HostRoute, "docker0"))),
            (
                all(),
                link("10.0.0.0/8", "tun0"),
                Some(("r", Reason::HostRoute, "lies in 10.0.0.0/8 of link tun0")),
            ),
            // The same way as ours, left to others, a router's wide route, pods, the default route, elsewhere.
            (all(), via("10.244.2.0/24", "172.30.0.12"), None),
            (vec![left_to_others()], via("10.244.2.0/24", "192.0.2.9"), None),
            (all(), via("10.0.0.0/8", "192.0.2.9"), None),
            (all(), via("10.244.2.0/24", "192.0.2.9"), None),
            (all(), link("10.244.1.0/24", "cni0"), None),
            (all(), link("10.244.1.7/32", "plat1234"), None),
            (all(), link("10.244.1.1/32", "lo"), None),
            (all(), via("0.0.0.0/0", "192.0.2.1"), None),
            (all(), link("172.17.0.0/16", "docker0"), None),
        ] {
            let words = format!("{route:?}");
            let told = told(blocks, route);
            match expected {
                None => assert_eq!(told, None, "{words}"),
                Some((name, reason, needle)) => {
                    let (of, why, message) = told.unwrap_or_else(|| panic!("{words}: nothing"));
                    assert_eq!((of.as_str(), why), (name, reason), "{words}: {message}");
                    assert!(message.contains(needle), "{message}");
                }
            }
        }
    }

    #[test]
    fn only_a_block_that_holds_a_needed_address_is_exposed() {
        let blocks = [1, 2].map(|n| (block(n).name, block(n))).into();
        let (ranges, absent) = (BTreeMap::new(), BTreeSet::new());
        let map = Map { blocks: &blocks, ranges: &ranges, policies: &[], absent: &absent };
        let needed = ["10.244.2.1", "10.244.2.9", "10.244.3.1", "172.30.0.1", "fd00::1"];
        let found =
            exposed(map, &[block(3).block].into(), &needed.iter().map(|a| a.parse().unwrap()).collect());
        let expected = ["10.244.2.1", "10.244.2.9"].map(|a| a.parse().unwrap());
        let guessed = ["10.244.3.1".parse().unwrap()];
        assert_eq!(found, [(block(2).block, expected.into()), (block(3).block, guessed.into())].into());
    }

    #[test]
    fn a_block_that_is_refused_does_not_hide_the_one_around_it() {
        let wide = BlockFact { name: "wide".into(), block: "10.244.0.0/16".parse().unwrap(), ..block(1) };
        let refused = BlockFact { created: 99, ..block(1) };
        let blocks = [wide.clone(), refused].map(|b| (b.name.clone(), b)).into();
        let (ranges, absent) = (BTreeMap::new(), BTreeSet::new());
        let map = Map { blocks: &blocks, ranges: &ranges, policies: &[], absent: &absent };
        let needed: BTreeSet<IpAddr> = ["10.244.1.9", "10.244.200.1"].map(|a| a.parse().unwrap()).into();
        assert_eq!(exposed(map, &BTreeSet::new(), &needed), [(wide.block, needed)].into());
    }
}
