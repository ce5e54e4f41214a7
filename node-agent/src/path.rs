//! How this node reaches another node's block, from the policy that holds for it.
//!
//! [`route`] is pure, and the place where a new routing field takes effect (docs/routing-policy.md walks
//! through it). What the schema cannot check is checked here: a policy that cannot work is a [`Fault`] that
//! names object and field.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::IpAddr;

use plat_crds::block::Family;
use plat_crds::names::{MAIN_TABLE, UNREACHABLE_METRIC};
use plat_crds::routing::{self, Decided, Invalid, Mode, Resolved};

use crate::desired::{Device, Host, Leads, Location, Map, Me};
use crate::fabric::{Hop, OnLink, Route, RouteKey, Target};
use crate::facts::{BlockFact, Fault, RangeFact, Reason};
use crate::policies::{self, Resolver};
use crate::underlay::{self, Underlay, Way};

/// Smallest MTU of an IPv6 path (RFC 8200 §5).
const MIN_MTU_V6: u32 = 1280;
/// Largest MTU and largest segment that the kernel keeps with a route; it cuts what is above (`ip_metrics_convert`).
const MAX_MTU: u32 = 65_520;
const MAX_ADVMSS: u32 = 65_495;
/// `RT_TABLE_DEFAULT` and `RT_TABLE_LOCAL`, which the kernel fills or looks in by itself.
const KERNELS_TABLES: [u32; 2] = [253, 255];

/// How a foreign block is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Path {
    /// By a route of ours, over these hops.
    Via(Vec<routing::Hop>),
    /// By a route of ours to its node, directly or through a tunnel.
    Node(Mode),
    /// By something else.
    None,
}

/// What [`Host`] must know for the routes to foreign blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Addresses: where they are.
    pub addresses: BTreeSet<IpAddr>,
    /// Links that routes are to leave by.
    pub interfaces: BTreeSet<String>,
    /// Routers, with the links that they are to be on.
    pub routers: BTreeSet<(String, IpAddr)>,
    /// Tables other than main: who else uses them.
    pub tables: BTreeSet<u32>,
}

/// What must be known of the node itself.
pub fn needs(me: &Me, map: Map<'_>) -> Needs {
    let mut needs = Needs::default();
    let mut resolver = Resolver::of(map);
    for block in map.blocks.values().filter(|b| b.node != me.node && !b.released()) {
        let resolved = resolver.resolve(block);
        let Ok(policy) = resolved.as_ref() else { continue };
        let hops = match path(block, policy) {
            Ok(Path::Via(hops)) => hops,
            Ok(Path::Node(_)) => {
                needs.addresses.extend(&block.addresses);
                Vec::new()
            }
            Ok(Path::None) | Err(_) => continue,
        };
        needs.addresses.extend(policy.source_address.value);
        needs.tables.extend(Some(policy.table.value).filter(|table| *table != MAIN_TABLE));
        for hop in hops {
            needs.addresses.insert(hop.address);
            if let Some(interface) = &policy.interface.value {
                needs.interfaces.insert(interface.clone());
                needs.routers.insert((interface.clone(), hop.address));
            }
        }
    }
    needs
}

/// The routers, or the addresses of the node, to which the policy of a block may send its packets; none if it leaves them to others.
pub fn next_hops(block: &BlockFact, map: Map<'_>) -> Result<Vec<IpAddr>, Fault> {
    let layers = policies::layers(block, map.ranges.get(&block.range), map.policies);
    let policy = routing::resolve(&layers).map_err(|error| invalid(block, &error))?;
    match path(block, &policy)? {
        Path::Via(hops) => Ok(hops.into_iter().map(|hop| hop.address).collect()),
        Path::Node(_) => Ok(block.addresses.clone()),
        Path::None => Ok(Vec::new()),
    }
}

/// The route to a foreign block; none if something else carries it.
pub fn route(
    block: &BlockFact,
    policy: &Result<Resolved, Invalid>,
    host: &Host,
    ways: &Underlay<'_>,
) -> Result<Option<Route>, Fault> {
    let policy = policy.as_ref().map_err(|error| invalid(block, error))?;
    let target = match path(block, policy)? {
        Path::None => return Ok(None),
        Path::Node(mode) => match ways.way(block, mode)? {
            Way::Direct { next_hop, device } => Target::via([Hop::to(next_hop, device)]),
            Way::Tunnel { underlay, .. } => Target::Tunnel { underlay, gateway: underlay::gateway(block) },
        },
        Path::Via(hops) => {
            let device = interface(block, policy, host)?;
            let hops = hops.iter().map(|hop| {
                let on = hop_on(block, policy, hop.address, device, host)?;
                Ok(Hop { weight: hop.weight, ..on })
            });
            Target::via(hops.collect::<Result<Vec<_>, Fault>>()?)
        }
    };
    let key =
        RouteKey { table: table(block, policy, host)?, metric: metric(block, policy)?, prefix: block.block };
    Ok(Some(Route {
        mtu: mtu(block, policy, &target, host)?,
        advmss: policy.advmss.value.map(|advmss| advmss.min(MAX_ADVMSS)),
        initcwnd: policy.initcwnd.value,
        source: source(block, policy, host)?,
        ..Route::new(key, target)
    }))
}

fn invalid(block: &BlockFact, error: &Invalid) -> Fault {
    unusable(block, error.to_string())
}

fn unusable(block: &BlockFact, what: impl Display) -> Fault {
    fault(block, Reason::UnusablePolicy, what)
}

fn fault(block: &BlockFact, reason: Reason, what: impl Display) -> Fault {
    Fault::block(&block.name, reason, format!("PodCIDR '{}': {what}", block.name))
}

/// Which way the policy of a foreign block chooses, whatever this node has.
fn path(block: &BlockFact, policy: &Resolved) -> Result<Path, Fault> {
    match policy.mode.value {
        Mode::None => return Ok(Path::None),
        Mode::Auto | Mode::Direct | Mode::VXLAN => {}
        Mode::Unknown => {
            return Err(unusable(
                block,
                format!(
                    "the routing mode of the {} is not known to this agent; upgrade the agent or set another spec.routing.mode",
                    policy.mode.from
                ),
            ));
        }
    }
    let family = block.block.family();
    let Decided { value: routers, from } = &policy.next_hops;
    if let Some(other) = routers.iter().find(|hop| Family::of(&hop.address) != family) {
        let what = format!("nextHop {} of the {from} is not an {family} address", other.address);
        return Err(unusable(block, what));
    }
    let shaped = !routers.is_empty() || policy.interface.value.is_some();
    if policy.mode.value == Mode::VXLAN && shaped {
        let by = if routers.is_empty() { &policy.interface.from } else { from };
        let what = format!(
            "mode VXLAN of the {} tunnels to the node, and the {by} names a nextHop or interface; take one of them back",
            policy.mode.from
        );
        return Err(unusable(block, what));
    }
    if !shaped {
        return Ok(Path::Node(policy.mode.value));
    }
    if !routers.is_empty() {
        return Ok(Path::Via(routers.clone()));
    }
    match block.addresses.iter().find(|a| Family::of(a) == family) {
        Some(node) => Ok(Path::Via(vec![routing::Hop { address: *node, weight: 1 }])),
        None => Err(fault(
            block,
            Reason::NoNodeAddress,
            format!(
                "node {} has no {family} address; give it an InternalIP, or set spec.routing.nextHop",
                block.node
            ),
        )),
    }
}

/// The link that the route must leave by, if the policy names one.
fn interface<'h>(block: &BlockFact, policy: &Resolved, host: &'h Host) -> Result<Option<&'h Device>, Fault> {
    let Decided { value: Some(name), from } = &policy.interface else { return Ok(None) };
    let refused = |why: &str| {
        let what = format!(
            "interface {name} of the {from} {why}; correct spec.routing.interface, or bring the link up on this node"
        );
        Err(fault(block, Reason::NoInterface, what))
    };
    match host.devices.get(name) {
        None => refused("is not on this node"),
        Some(device) if !device.up => refused("is down"),
        Some(device) if device.leads == Leads::Nowhere => refused("leads to no other node"),
        Some(device) => Ok(Some(device)),
    }
}

fn hop_on(
    block: &BlockFact,
    policy: &Resolved,
    address: IpAddr,
    device: Option<&Device>,
    host: &Host,
) -> Result<Hop, Fault> {
    let whose = format!("PodCIDR '{}' of node {}", block.name, block.node);
    let refused =
        |what: String| Err(Fault::block(&block.name, Reason::NotOnLink, format!("{whose}: {what}")));
    let location = host.locations.get(&address).copied().unwrap_or(Location::Remote);
    if location == Location::Local {
        return refused(format!(
            "its next hop {address} is an address of this node itself; correct the node's address or spec.routing.nextHop"
        ));
    }
    let on_link = if policy.on_link.value { OnLink::Taken } else { OnLink::Proven };
    let Some(device) = device else {
        return match location {
            Location::OnLink { device } => Ok(Hop { on_link: OnLink::Proven, ..Hop::to(address, device) }),
            Location::Local | Location::Remote | Location::Unreachable => refused(format!(
                "its next hop {address} is not on a link of this node; set spec.routing.nextHop to a router that is, or spec.routing.mode to None if something else carries the block"
            )),
        };
    };
    let hop = Hop { on_link, ..Hop::to(address, device.index) };
    let is_near = host.reachable.contains(&(device.index, address));
    match (is_near, on_link, device.leads) {
        (true, ..) => Ok(Hop { on_link: OnLink::Proven, ..hop }),
        (false, OnLink::Taken, _) => Ok(hop),
        // A tunnel needs no router: whatever goes in comes out at the other end.
        (false, OnLink::Proven, Leads::ToOnePeer) if policy.next_hops.value.is_empty() => {
            Ok(Hop { gateway: None, ..hop })
        }
        (false, OnLink::Proven, _) => refused(format!(
            "its next hop {address} is not on the link {} that the {} names; correct spec.routing.interface or nextHop, or set onLink if the link reaches it all the same",
            policy.interface.value.as_deref().unwrap_or_default(),
            policy.interface.from
        )),
    }
}

fn table(block: &BlockFact, policy: &Resolved, host: &Host) -> Result<u32, Fault> {
    let Decided { value: table, from } = &policy.table;
    if KERNELS_TABLES.contains(table) || *table == 0 {
        return Err(unusable(block, format!("table {table} of the {from} is the kernel's; set another")));
    }
    match host.tables.get(table) {
        None => Ok(*table),
        Some(who) => Err(fault(
            block,
            Reason::TableInUse,
            format!(
                "table {table} of the {from} is used by another program ({who}); set a spec.routing.table of your own"
            ),
        )),
    }
}

fn metric(block: &BlockFact, policy: &Resolved) -> Result<u32, Fault> {
    let Decided { value: metric, from } = &policy.metric;
    if (1..UNREACHABLE_METRIC).contains(metric) {
        return Ok(*metric);
    }
    let most = UNREACHABLE_METRIC - 1;
    Err(unusable(block, format!("metric {metric} of the {from} is not between 1 and {most}")))
}

fn mtu(block: &BlockFact, policy: &Resolved, target: &Target, host: &Host) -> Result<Option<u32>, Fault> {
    let Decided { value: Some(mtu), from } = &policy.mtu else {
        // What a policy says goes before what probes found.
        return Ok(host.path_mtus.get(&block.block).copied());
    };
    if block.block.family() == Family::IPv6 && *mtu < MIN_MTU_V6 {
        let what = format!("mtu {mtu} of the {from} is below {MIN_MTU_V6}, the least that IPv6 allows");
        return Err(unusable(block, what));
    }
    let hops = match target {
        Target::Via(hops) => hops.as_slice(),
        _ => &[],
    };
    let used = host.devices.iter().filter(|(_, device)| hops.iter().any(|hop| hop.device == device.index));
    if let Some((name, device)) = used.min_by_key(|(_, device)| device.mtu).filter(|(_, d)| d.mtu < *mtu) {
        let what = format!(
            "mtu {mtu} of the {from} is above the {} of link {name}, which the route leaves by; lower spec.routing.mtu, or raise the link's",
            device.mtu
        );
        return Err(unusable(block, what));
    }
    Ok(Some((*mtu).min(MAX_MTU)))
}

fn source(block: &BlockFact, policy: &Resolved, host: &Host) -> Result<Option<IpAddr>, Fault> {
    let Decided { value: Some(source), from } = &policy.source_address else { return Ok(None) };
    let family = block.block.family();
    if Family::of(source) != family {
        return Err(unusable(
            block,
            format!("sourceAddress {source} of the {from} is not an {family} address"),
        ));
    }
    if host.locations.get(source) == Some(&Location::Local) {
        return Ok(Some(*source));
    }
    Err(fault(
        block,
        Reason::NotLocal,
        format!(
            "sourceAddress {source} of the {from} is not an address of this node; correct spec.routing.sourceAddress, or give the node that address"
        ),
    ))
}

/// Whether no block of the range is left to something else to route: then what has no route of ours has
/// no pods, and may be closed.
pub fn all_routed(range: &RangeFact, map: Map<'_>) -> bool {
    let leaves = |routing: &routing::Routing| routing.mode == Some(Mode::None);
    let mut blocks = map.blocks.values().filter(|b| b.range == range.name && !b.released());
    let says_none = map.policies.iter().any(|policy| leaves(&policy.routing))
        || map.ranges.values().any(|range| range.routing.as_ref().is_some_and(leaves))
        || blocks.clone().any(|block| block.routing.as_ref().is_some_and(leaves));
    let mut resolver = Resolver::of(map);
    !says_none
        || blocks
            .all(|b| !matches!(resolver.resolve(b).as_ref(), Ok(policy) if policy.mode.value == Mode::None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{block, block_v6, me, range};
    use std::collections::BTreeMap;

    fn host() -> Host {
        let device = |index, leads| Device { index, up: true, mtu: 1500, leads };
        let on_link = |n: u8| (IpAddr::from([172, 30, 0, n]), Location::OnLink { device: 2 });
        let mut locations: BTreeMap<IpAddr, Location> = (1..100).map(on_link).collect();
        locations.insert("fd00:30::2".parse().unwrap(), Location::OnLink { device: 2 });
        locations.insert([172, 30, 0, 11].into(), Location::Local);
        Host {
            locations,
            devices: [
                ("eth0".to_owned(), device(2, Leads::ToNeighbours)),
                ("eth1".to_owned(), device(3, Leads::ToNeighbours)),
                ("wg0".to_owned(), Device { mtu: 1420, ..device(4, Leads::ToOnePeer) }),
                ("down0".to_owned(), Device { up: false, ..device(5, Leads::ToNeighbours) }),
                ("lo".to_owned(), device(1, Leads::Nowhere)),
            ]
            .into(),
            reachable: [(3, [172, 30, 0, 1].into()), (3, [172, 30, 0, 12].into())].into(),
            tables: [(9, "rule 100 of protocol 4".to_owned())].into(),
            ..Host::default()
        }
    }

    fn reached(block: BlockFact, routing: &str) -> Result<Route, Fault> {
        let block = BlockFact { routing: Some(serde_json::from_str(routing).unwrap()), ..block };
        let (blocks, ranges) = (
            BTreeMap::from([(block.name.clone(), block.clone())]),
            BTreeMap::from([("default-v4".to_owned(), range("default-v4"))]),
        );
        let map = Map { blocks: &blocks, ranges: &ranges, policies: &[], absent: &Default::default() };
        let host = host();
        let ways = Underlay::new(&me("n1"), map, &host);
        route(&block, &Resolver::of(map).resolve(&block), &host, &ways).map(Option::unwrap)
    }

    #[test]
    fn each_field_shapes_the_route() {
        for (routing, want) in [
            ("{}", "10.244.2.0/24 via 172.30.0.12 metric 1120"),
            (r#"{"nextHop":"172.30.0.1"}"#, "10.244.2.0/24 via 172.30.0.1 metric 1120"),
            (
                r#"{"nextHops":[{"address":"172.30.0.1","weight":3},{"address":"172.30.0.2"}]}"#,
                "10.244.2.0/24 via 172.30.0.1 weight 3 via 172.30.0.2 metric 1120",
            ),
            (
                r#"{"nextHops":[{"address":"172.30.0.1"},{"address":"172.30.0.2"},{"address":"172.30.0.1"}]}"#,
                "10.244.2.0/24 via 172.30.0.1 weight 2 via 172.30.0.2 metric 1120",
            ),
            (r#"{"metric":7}"#, "10.244.2.0/24 via 172.30.0.12 metric 7"),
            (r#"{"table":1000}"#, "10.244.2.0/24 via 172.30.0.12 metric 1120 table 1000"),
            (
                r#"{"mtu":1400,"advmss":1300}"#,
                "10.244.2.0/24 via 172.30.0.12 metric 1120 mtu 1400 advmss 1300",
            ),
            (
                r#"{"sourceAddress":"172.30.0.11"}"#,
                "10.244.2.0/24 via 172.30.0.12 metric 1120 src 172.30.0.11",
            ),
            (r#"{"initcwnd":20}"#, "10.244.2.0/24 via 172.30.0.12 metric 1120 initcwnd 20"),
            (r#"{"interface":"wg0"}"#, "10.244.2.0/24 by link 4 metric 1120"),
            (
                r#"{"interface":"eth0","nextHop":"192.168.7.1","onLink":true}"#,
                "10.244.2.0/24 via 192.168.7.1 onlink metric 1120",
            ),
        ] {
            assert_eq!(reached(block(2), routing).unwrap().to_string(), want);
        }
        let by_eth1 = reached(block(2), r#"{"interface":"eth1"}"#).unwrap();
        assert_eq!(by_eth1.target, Target::via([Hop::to([172, 30, 0, 12].into(), 3)]));
        let needless = reached(block(2), r#"{"interface":"eth1","nextHop":"172.30.0.1","onLink":true}"#);
        assert_eq!(needless.unwrap().target, Target::via([Hop::to([172, 30, 0, 1].into(), 3)]));
    }

    #[test]
    fn a_policy_that_cannot_work_names_object_field_and_layer() {
        use Reason::*;
        for (block, routing, reason, words) in [
            (block(2), r#"{"nextHop":"10.9.9.9"}"#, NotOnLink, "next hop 10.9.9.9 is not on a link"),
            (block(2), r#"{"nextHop":"172.30.0.11"}"#, NotOnLink, "an address of this node itself"),
            (
                block(2),
                r#"{"nextHop":"fd00::1"}"#,
                UnusablePolicy,
                "nextHop fd00::1 of the PodCIDR is not an IPv4",
            ),
            (
                block(2),
                r#"{"nextHops":[{"address":"172.30.0.1"},{"address":"10.9.9.9"}]}"#,
                NotOnLink,
                "next hop 10.9.9.9",
            ),
            (
                block(2),
                r#"{"interface":"eth9"}"#,
                NoInterface,
                "interface eth9 of the PodCIDR is not on this node",
            ),
            (block(2), r#"{"interface":"down0"}"#, NoInterface, "interface down0 of the PodCIDR is down"),
            (block(2), r#"{"interface":"lo"}"#, NoInterface, "leads to no other node"),
            (
                block(2),
                r#"{"interface":"eth1","nextHop":"172.30.0.9"}"#,
                NotOnLink,
                "172.30.0.9 is not on the link eth1",
            ),
            (block(2), r#"{"interface":"wg0","nextHop":"172.30.0.9"}"#, NotOnLink, "not on the link wg0"),
            (block(2), r#"{"table":9}"#, TableInUse, "another program (rule 100 of protocol 4)"),
            (block(2), r#"{"table":255}"#, UnusablePolicy, "table 255 of the PodCIDR is the kernel's"),
            (block(2), r#"{"metric":65535}"#, UnusablePolicy, "metric 65535"),
            (
                block(2),
                r#"{"mtu":1501}"#,
                UnusablePolicy,
                "mtu 1501 of the PodCIDR is above the 1500 of link eth0",
            ),
            (block(2), r#"{"interface":"wg0","mtu":1450}"#, UnusablePolicy, "above the 1420 of link wg0"),
            (block_v6(2), r#"{"mtu":1279}"#, UnusablePolicy, "below 1280"),
            (block(2), r#"{"sourceAddress":"172.30.0.12"}"#, NotLocal, "is not an address of this node"),
            (block(2), r#"{"sourceAddress":"fd00::1"}"#, UnusablePolicy, "sourceAddress fd00::1"),
            (block(2), r#"{"mode":"Later"}"#, UnusablePolicy, "upgrade the agent"),
        ] {
            let name = block.name.clone();
            let fault = reached(block, routing).unwrap_err();
            assert_eq!((fault.reason, &fault.name), (reason, &name), "{routing}: {}", fault.message);
            assert!(fault.message.contains(words), "{routing}: {}", fault.message);
            assert!(fault.message.starts_with(&format!("PodCIDR '{name}'")), "{}", fault.message);
        }
    }

    #[test]
    fn what_must_be_known_of_the_node_is_what_policies_name() {
        let routing =
            r#"{"interface":"eth1","nextHop":"172.30.0.1","sourceAddress":"172.30.0.11","table":1000}"#;
        let far = BlockFact { routing: Some(serde_json::from_str(routing).unwrap()), ..block(2) };
        let blocks = BTreeMap::from([(far.name.clone(), far), (block(1).name, block(1))]);
        let map =
            Map { blocks: &blocks, ranges: &BTreeMap::new(), policies: &[], absent: &Default::default() };
        let me = me("n1");
        let router: IpAddr = [172, 30, 0, 1].into();
        assert_eq!(
            needs(&me, map),
            Needs {
                addresses: [router, [172, 30, 0, 11].into()].into(),
                interfaces: ["eth1".to_owned()].into(),
                routers: [("eth1".to_owned(), router)].into(),
                tables: [1000].into(),
            }
        );
    }
}
