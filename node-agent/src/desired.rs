//! What should be in this node's kernel, from the objects and the policy, wholly: [`desired`] is pure. How the
//! policy shapes the route to one block is [`path`]'s.
//!
//! An object that cannot be followed becomes a [`Fault`], and the routes that its block has now stay: the
//! last working state is better than none.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use ipnet::IpNet;
use plat_crds::block::{Block, Family};
use plat_crds::blocks_file::HeldBlock;
use plat_crds::cluster_cidr::DEFAULT_QUARANTINE_SECONDS;
use plat_crds::lease::Datapath;
use plat_crds::names::{MAIN_TABLE, ROUTE_METRIC, UNREACHABLE_METRIC};
use plat_crds::pod_cidr::BlockState;

use crate::egress;
use crate::fabric::{
    Admit, Bridge, Desired, Direction, Leaving, Masquerade, Route, RouteKey, Rule, Sysctl, Target,
    host_prefix,
};
use crate::facts::{BlockFact, Fault, Kind, RangeFact, Reason};
use crate::overlap;
use crate::path;
use crate::policies::{InForce, Resolver};
use crate::underlay::{self, Underlay};
use crate::vxlan::Network;

/// Destinations that always see pods' own addresses: multicast and link-local never leave a link through
/// a router (RFC 5771, RFC 3927, RFC 4291).
const NEVER_MASQUERADED: [&str; 4] = ["224.0.0.0/4", "169.254.0.0/16", "ff00::/8", "fe80::/10"];

/// Who this node is, and how it is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Me {
    /// Name of the node.
    pub node: String,
    /// How new pods are joined to the host.
    pub datapath: Datapath,
    /// Name of the pods' bridge.
    pub bridge: String,
    /// Whether accept rules may be appended to FORWARD chains with policy drop.
    pub admit_forward: bool,
    /// UDP port on which probes of others are answered; `None` if probes are switched off.
    pub probe_port: Option<NonZeroU16>,
    /// What the VXLAN devices of all nodes have in common.
    pub vxlan: Network,
}

impl Me {
    /// For commands that look at a node beside its agent: what they do not know of it has no part in what they say.
    pub fn onlooker(node: String, bridge: String) -> Me {
        Me {
            node,
            datapath: Datapath::Bridge,
            bridge,
            admit_forward: false,
            probe_port: None,
            vxlan: Network::default(),
        }
    }
}

/// Where an address is, seen from this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// Reachable without a router over the link of that index.
    OnLink {
        /// Interface index.
        device: u32,
    },
    /// An address of this node.
    Local,
    /// Behind a router.
    Remote,
    /// No route leads there.
    Unreachable,
}

/// Where packets that leave by a link arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Leads {
    /// At one of several neighbours, told apart by their addresses.
    #[default]
    ToNeighbours,
    /// At the only other end (`IFF_POINTOPOINT`: WireGuard, tun).
    ToOnePeer,
    /// Back at this node or its pods.
    Nowhere,
}

/// A link that routes may leave by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// Administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Where its packets arrive.
    pub leads: Leads,
}

/// What this node's own state adds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Where the addresses of [`path::Needs`] are.
    pub locations: BTreeMap<IpAddr, Location>,
    /// Links with addresses, and those that policies name, by name.
    pub devices: BTreeMap<String, Device>,
    /// Routers that are on a link that a policy names, without another router between.
    pub reachable: BTreeSet<(u32, IpAddr)>,
    /// Tables of [`path::Needs`] that other programs use, and how.
    pub tables: BTreeMap<u32, String>,
    /// Links whose IPv6 routes come from router advertisements and would be purged by forwarding.
    pub ra_links: BTreeSet<String>,
    /// MTU of the link that carries the node's address.
    pub mtu: Option<u32>,
    /// This node's addresses on links that lead to others, each with the interface indexes of its subnet's links.
    pub addresses: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// Smallest MTU of the links by which other nodes that are not on a link are reached, and of those that carry the node's
    /// addresses.
    pub underlay_mtu: Option<u32>,
    /// Whether some RoutingPolicy lets nodes tunnel, perhaps to this one.
    pub others_tunnel: bool,
    /// Blocks with living leases, whatever the objects say.
    pub leased: BTreeSet<Block>,
    /// Those of them for which nothing speaks but an address that may be another network's.
    pub guessed: BTreeSet<Block>,
    /// How living pods are joined to the host, which may be otherwise than new ones.
    pub in_use: BTreeSet<Datapath>,
    /// ClusterCIDRs for which an `unreachable` route is safe.
    pub closed_ranges: BTreeSet<String>,
    /// Blocks that hold an address which this node needs and has no more specific route to, with that address.
    pub exposed: BTreeMap<Block, IpAddr>,
    /// Largest packets that the paths to these blocks carry, where probes found that to be less than the links do.
    pub path_mtus: BTreeMap<Block, u32>,
}

/// The objects that the node is programmed for, by name.
#[derive(Clone, Copy)]
pub struct Map<'a> {
    /// PodCIDRs.
    pub blocks: &'a BTreeMap<String, BlockFact>,
    /// ClusterCIDRs.
    pub ranges: &'a BTreeMap<String, RangeFact>,
    /// RoutingPolicies that this node follows, in the order in which they decide.
    pub policies: &'a [InForce],
    /// Names of PodCIDRs that are believed in though no object says so any more.
    pub absent: &'a BTreeSet<String>,
}

impl<'a> Map<'a> {
    /// The range of a block: its object's, or the one that it lies in where there is no object.
    pub fn range_of(&self, block: &Block) -> Option<&'a RangeFact> {
        match self.blocks.get(&block.object_name()) {
            Some(fact) => self.ranges.get(&fact.range),
            None => self.ranges.values().find(|range| range.range.covers(block)),
        }
    }
}

/// The blocks of this node: those that objects give it, and those that still have leases and are nobody
/// else's. Overlapping ones are left out; released ones, and those that would cut the node off, are this node's only
/// while they have leases. Those that are guessed from an address never cut the node off, and are believed only where
/// the operator gives out blocks.
pub fn own_blocks(me: &Me, map: Map<'_>, host: &Host) -> BTreeMap<Block, HeldBlock> {
    let (accepted, _) = overlap::older_first(map.blocks, map.absent);
    let stands = |b: &BlockFact| {
        host.leased.contains(&b.block) || !(b.released() || host.exposed.contains_key(&b.block))
    };
    let leases = |b: &BlockFact| b.state == BlockState::Active && !host.exposed.contains_key(&b.block);
    let mut own: BTreeMap<Block, HeldBlock> = accepted
        .iter()
        .filter(|b| b.node == me.node && stands(b))
        .map(|b| (b.block, HeldBlock { cidr: b.block, lease: leases(b) }))
        .collect();
    let doubtful = |block: &Block| {
        let mut ready = map.ranges.values().filter(|range| range.ready);
        host.guessed.contains(block)
            && (host.exposed.contains_key(block) || !ready.any(|range| range.range.covers(block)))
    };
    for block in host.leased.iter().filter(|block| !doubtful(block)) {
        if !accepted.iter().any(|b| b.block.overlaps(block)) {
            own.insert(*block, HeldBlock { cidr: *block, lease: false });
        }
    }
    own
}

/// How long the node may go on leasing after its last contact with the API server, in seconds: the
/// shortest quarantine among its blocks, less a minute of margin (half of it where it is shorter than two).
pub fn lease_seconds(node: &str, map: Map<'_>) -> u32 {
    let own = map.blocks.values().filter(|b| b.node == node);
    let quarantines = own.map(|b| {
        let default = DEFAULT_QUARANTINE_SECONDS.unsigned_abs();
        map.ranges.get(&b.range).map_or(default, |range| range.quarantine_seconds)
    });
    let quarantine = quarantines.min().unwrap_or(DEFAULT_QUARANTINE_SECONDS.unsigned_abs());
    quarantine - (quarantine / 2).min(60)
}

/// Everything that should be in the kernel, and the objects that cannot be followed.
pub fn desired(me: &Me, map: Map<'_>, host: &Host) -> (Desired, Vec<Fault>) {
    let (accepted, mut faults) = overlap::older_first(map.blocks, map.absent);
    let own = own_blocks(me, map, host);
    let uses = |datapath| me.datapath == datapath || host.in_use.contains(&datapath);
    let forwarded = forwarded(&own, uses);
    let (leaving, unfollowed) = egress::leaving(map, &own, host);
    faults.extend(unfollowed);
    let mut desired = Desired {
        masquerade: masquerade(me, map, &own, leaving),
        sysctls: sysctls(&own, host),
        bridge: bridge(me, &own, host).filter(|_| uses(Datapath::Bridge)),
        gateways: own.keys().copied().filter(|_| uses(Datapath::Routed)).collect(),
        admit: if me.admit_forward { forwarded.clone() } else { BTreeSet::new() },
        forwarded,
        ..Desired::default()
    };
    for block in own.keys() {
        own_routes(*block, &mut desired);
    }
    let mut resolver = Resolver::of(map);
    let underlay = Underlay::new(me, map, host);
    for block in accepted.iter().filter(|b| !b.released()) {
        if let Some(address) = host.exposed.get(&block.block) {
            faults.push(holds_needed(block, *address, own.contains_key(&block.block)));
            continue;
        }
        if block.node == me.node {
            continue;
        }
        match path::route(block, &resolver.resolve(block), host, &underlay) {
            Ok(Some(route)) => insert(&mut desired, Kind::PodCIDR, &block.name, route),
            Ok(None) => {}
            Err(fault) => {
                desired.keep.insert(block.block);
                faults.push(fault);
            }
        }
    }
    let others = accepted.iter().copied().filter(|b| !b.released() && b.node != me.node);
    faults.extend(underlay::add_tunnels(&mut desired, me, &own, &underlay, others));
    for range in map.ranges.values().filter(|range| host.closed_ranges.contains(&range.name)) {
        insert(&mut desired, Kind::ClusterCIDR, &range.name, unreachable(range.range));
    }
    (desired, faults)
}

fn insert(desired: &mut Desired, kind: Kind, name: &str, route: Route) {
    if route.key.table != MAIN_TABLE {
        desired.rules.insert(Rule::to(route.key.family(), route.key.table));
    }
    desired.owners.insert(route.key, (kind, name.to_owned()));
    desired.routes.insert(route.key, route);
}

fn unreachable(prefix: Block) -> Route {
    Route::new(RouteKey::main(prefix, UNREACHABLE_METRIC), Target::Unreachable)
}

/// To the pods by the bridge; and nowhere while the bridge is away, so that nothing leaks to the default
/// gateway or comes back from it. Pods without bridge have routes of their own.
fn own_routes(block: Block, desired: &mut Desired) {
    let name = block.object_name();
    if desired.bridge.is_some() {
        let bridged = Route::new(RouteKey::main(block, ROUTE_METRIC), Target::Bridge);
        insert(desired, Kind::PodCIDR, &name, bridged);
    }
    insert(desired, Kind::PodCIDR, &name, unreachable(block));
}

fn holds_needed(block: &BlockFact, address: IpAddr, stands: bool) -> Fault {
    let done = if stands { "stays only for its running pods" } else { "is not programmed" };
    Fault::block(
        &block.name,
        Reason::BlockHoldsNeededAddress,
        format!(
            "PodCIDR '{}' of node {} holds {address}, which this node needs and has no more specific route to: it {done}, as a route to it would cut this node off; add a route to {address}, or list its addresses under spec.reserved of the ClusterCIDR and let the block go",
            block.name, block.node
        ),
    )
}

fn masquerade(
    me: &Me,
    map: Map<'_>,
    own: &BTreeMap<Block, HeldBlock>,
    sources: BTreeMap<Block, Leaving>,
) -> Masquerade {
    let mut keep: Vec<IpNet> = NEVER_MASQUERADED.iter().filter_map(|net| net.parse().ok()).collect();
    keep.extend(map.ranges.values().map(|range| range.range.net()));
    keep.extend(own.keys().map(Block::net));
    for block in map.blocks.values() {
        keep.push(block.block.net());
        keep.extend(block.addresses.iter().map(|address| host_prefix(*address)));
    }
    let gateways = own.keys().map(Block::gateway);
    let probed = me
        .probe_port
        .into_iter()
        .flat_map(|port| gateways.clone().map(move |gateway| SocketAddr::new(gateway, port.get())));
    Masquerade {
        pod_interface: me.bridge.clone(),
        sources,
        keep: IpNet::aggregate(&keep),
        probed: probed.collect(),
    }
}

fn sysctls(own: &BTreeMap<Block, HeldBlock>, host: &Host) -> Vec<Sysctl> {
    let has = |family| own.keys().any(|block| block.family() == family);
    let mut sysctls = Vec::new();
    if has(Family::IPv4) {
        sysctls.push(Sysctl::new("ipv4/ip_forward", "1"));
    }
    if has(Family::IPv6) {
        // Forwarding purges what router advertisements set, unless accept_ra says 2 before.
        let accept = |link: &String| Sysctl::new(format!("ipv6/conf/{link}/accept_ra"), "2");
        sysctls.extend(host.ra_links.iter().map(accept));
        sysctls.push(Sysctl::new("ipv6/conf/all/forwarding", "1"));
    }
    sysctls
}

fn bridge(me: &Me, own: &BTreeMap<Block, HeldBlock>, host: &Host) -> Option<Bridge> {
    let blocks: BTreeSet<Block> = own.keys().copied().collect();
    (!blocks.is_empty()).then(|| Bridge { name: me.bridge.clone(), mtu: host.mtu, blocks })
}

/// The forwarding that pods of these blocks need.
pub fn forwarded(own: &BTreeMap<Block, HeldBlock>, uses: impl Fn(Datapath) -> bool) -> BTreeSet<Admit> {
    let mut forwarded = BTreeSet::new();
    for datapath in [Datapath::Bridge, Datapath::Routed].into_iter().filter(|datapath| uses(*datapath)) {
        for direction in [Direction::FromPods, Direction::ToPods] {
            forwarded.extend(own.keys().map(|block| Admit { block: *block, datapath, direction }));
        }
    }
    forwarded
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{block, block_v6, me, range};
    use crate::path::all_routed;
    use plat_crds::cluster_cidr::MasqueradeMode;
    use plat_crds::routing::{Mode, Routing};
    use proptest::prelude::*;

    struct Case {
        absent: BTreeSet<String>,
        blocks: BTreeMap<String, BlockFact>,
        ranges: BTreeMap<String, RangeFact>,
        host: Host,
    }

    fn case(blocks: Vec<BlockFact>) -> Case {
        let mut locations = BTreeMap::new();
        for n in 0..100 {
            locations.insert([172, 30, 0, n].into(), Location::OnLink { device: 2 });
            locations.insert(format!("fd00:30::{n}").parse().unwrap(), Location::OnLink { device: 2 });
        }
        Case {
            absent: BTreeSet::new(),
            blocks: blocks.into_iter().map(|b| (b.name.clone(), b)).collect(),
            ranges: [("default-v4".to_owned(), range("default-v4"))].into(),
            host: Host { locations, mtu: Some(1500), ..Host::default() },
        }
    }

    impl Case {
        fn run(&self) -> (Desired, Vec<Fault>) {
            desired(&me("n1"), self.map(), &self.host)
        }

        fn map(&self) -> Map<'_> {
            Map { blocks: &self.blocks, ranges: &self.ranges, policies: &[], absent: &self.absent }
        }

        fn routes(&self) -> Vec<String> {
            self.run().0.routes.values().map(|r| r.to_string()).collect()
        }

        fn fault(&self) -> Fault {
            let (_, faults) = self.run();
            assert_eq!(faults.len(), 1, "{faults:?}");
            faults.into_iter().next().unwrap()
        }
    }

    #[test]
    fn a_node_routes_to_every_other_block_and_keeps_its_own_from_leaking() {
        let mut case = case(vec![block(1), block(2), block(3)]);
        case.host.closed_ranges = ["default-v4".to_owned()].into();
        assert_eq!(
            case.routes(),
            [
                "unreachable 10.244.0.0/16 metric 65535",
                "10.244.1.0/24 to the pods metric 1120",
                "unreachable 10.244.1.0/24 metric 65535",
                "10.244.2.0/24 via 172.30.0.12 metric 1120",
                "10.244.3.0/24 via 172.30.0.13 metric 1120",
            ]
        );
        let (desired, faults) = case.run();
        assert_eq!(faults, []);
        assert_eq!(desired.bridge.unwrap().blocks, [block(1).block].into());
        assert_eq!(desired.sysctls, [Sysctl::new("ipv4/ip_forward", "1")]);
        assert_eq!(desired.admit.len(), 2);
    }

    #[test]
    fn each_routing_field_shapes_the_route() {
        let policy = |routing: Routing| {
            let mut case = case(vec![BlockFact { routing: Some(routing), ..block(2) }]);
            case.host.locations.insert("172.30.0.1".parse().unwrap(), Location::OnLink { device: 7 });
            case.routes()
        };
        let none = Routing::default;
        assert_eq!(policy(none()), ["10.244.2.0/24 via 172.30.0.12 metric 1120"]);
        assert_eq!(
            policy(Routing { mode: Some(Mode::Direct), ..none() }),
            ["10.244.2.0/24 via 172.30.0.12 metric 1120"]
        );
        assert_eq!(policy(Routing { mode: Some(Mode::None), ..none() }), Vec::<String>::new());
        assert_eq!(
            policy(Routing { metric: Some(50), ..none() }),
            ["10.244.2.0/24 via 172.30.0.12 metric 50"]
        );
        assert_eq!(
            policy(Routing { mtu: Some(1400), ..none() }),
            ["10.244.2.0/24 via 172.30.0.12 metric 1120 mtu 1400"]
        );
        assert_eq!(
            policy(Routing { next_hop: Some("172.30.0.1".into()), ..none() }),
            ["10.244.2.0/24 via 172.30.0.1 metric 1120"]
        );
    }

    #[test]
    fn the_ranges_policy_holds_for_blocks_that_set_none() {
        let own_word =
            BlockFact { routing: Some(Routing { metric: Some(9), ..Routing::default() }), ..block(3) };
        let mut case = case(vec![block(2), own_word]);
        let policy = Routing { metric: Some(7), mtu: Some(1400), ..Routing::default() };
        case.ranges.get_mut("default-v4").unwrap().routing = Some(policy);
        assert_eq!(
            case.routes(),
            [
                "10.244.2.0/24 via 172.30.0.12 metric 7 mtu 1400",
                "10.244.3.0/24 via 172.30.0.13 metric 9 mtu 1400"
            ]
        );
    }

    #[test]
    fn what_cannot_be_followed_is_a_fault_and_its_routes_stay() {
        let routing = |text: &str| Some(serde_json::from_str::<Routing>(text).unwrap());
        let b = || block(2);
        for (fact, reason, needle) in [
            (
                BlockFact { routing: routing(r#"{"mode":"Later"}"#), ..b() },
                Reason::UnusablePolicy,
                "not known to this agent",
            ),
            (
                BlockFact { routing: routing(r#"{"nextHop":"router"}"#), ..b() },
                Reason::UnusablePolicy,
                "'router' is not an IP address",
            ),
            (
                BlockFact { routing: routing(r#"{"nextHop":"fd00::1"}"#), ..b() },
                Reason::UnusablePolicy,
                "not an IPv4 address",
            ),
            (
                BlockFact { routing: routing(r#"{"metric":65535}"#), ..b() },
                Reason::UnusablePolicy,
                "between 1 and 65534",
            ),
            (
                BlockFact { routing: routing(r#"{"metric":0}"#), ..b() },
                Reason::UnusablePolicy,
                "between 1 and 65534",
            ),
            (
                BlockFact { routing: routing(r#"{"mtu":1200}"#), ..block_v6(2) },
                Reason::UnusablePolicy,
                "below 1280",
            ),
            (BlockFact { addresses: vec![], ..b() }, Reason::NoNodeAddress, "no address of a family"),
            (
                BlockFact { addresses: vec![], routing: routing(r#"{"mode":"Direct"}"#), ..b() },
                Reason::NoNodeAddress,
                "has no IPv4 address",
            ),
            (
                BlockFact {
                    addresses: vec!["10.9.9.9".parse().unwrap()],
                    routing: routing(r#"{"mode":"Direct"}"#),
                    ..b()
                },
                Reason::NotOnLink,
                "10.9.9.9 is not on a link",
            ),
        ] {
            let kept = fact.block;
            let case = case(vec![fact]);
            let fault = case.fault();
            assert_eq!(fault.reason, reason, "{fault:?}");
            assert!(fault.message.contains(needle), "{}", fault.message);
            let (desired, _) = case.run();
            assert_eq!((desired.routes.len(), desired.keep), (0, [kept].into()));
        }
    }

    #[test]
    fn a_next_hop_that_is_this_node_itself_is_refused() {
        let mut case = case(vec![block(2)]);
        case.host.locations.insert("172.30.0.12".parse().unwrap(), Location::Local);
        assert!(case.fault().message.contains("this node itself"));
    }

    #[test]
    fn a_quarantined_block_has_no_route_but_its_own_pods_keep_theirs() {
        let quarantined = |n| BlockFact { state: BlockState::Quarantined, ..block(n) };
        let mut case = case(vec![quarantined(1), quarantined(2)]);
        assert_eq!(case.routes(), Vec::<String>::new());
        assert_eq!(case.run().0.masquerade.sources, [].into());
        case.host.leased = [block(1).block].into();
        assert_eq!(
            case.routes(),
            ["10.244.1.0/24 to the pods metric 1120", "unreachable 10.244.1.0/24 metric 65535"]
        );
        let own = own_blocks(&me("n1"), case.map(), &case.host);
        assert!(own.len() == 1 && own.values().all(|held| !held.lease));
    }

    #[test]
    fn draining_blocks_and_those_of_unknown_state_are_routed_and_not_leased_from() {
        for state in [BlockState::Draining, BlockState::Unknown] {
            let case = case(vec![BlockFact { state, ..block(1) }, BlockFact { state, ..block(2) }]);
            assert!(case.routes().contains(&"10.244.2.0/24 via 172.30.0.12 metric 1120".to_owned()));
            assert!(!own_blocks(&me("n1"), case.map(), &case.host)[&block(1).block].lease);
        }
    }

    #[test]
    fn a_lost_block_with_leases_stays_until_it_is_somebody_elses() {
        let mut case = case(vec![]);
        case.host.leased = [block(5).block].into();
        assert_eq!(case.routes()[0], "10.244.5.0/24 to the pods metric 1120");
        let (desired, _) = case.run();
        assert!(desired.masquerade.sources.contains_key(&block(5).block), "its range still covers it");
        case.blocks.insert(block(5).name, block(5));
        assert_eq!(case.routes(), ["10.244.5.0/24 via 172.30.0.15 metric 1120"]);
    }

    #[test]
    fn a_block_that_is_guessed_from_an_address_must_lie_in_a_ready_range_and_cut_nobody_off() {
        let mut case = case(vec![]);
        case.host.leased = [block(5).block].into();
        case.host.guessed = case.host.leased.clone();
        assert_eq!(case.routes()[0], "10.244.5.0/24 to the pods metric 1120");
        case.host.exposed = [(block(5).block, [10, 244, 5, 1].into())].into();
        assert_eq!(case.routes(), [] as [&str; 0]);
        case.host.exposed.clear();
        case.ranges.get_mut("default-v4").unwrap().ready = false;
        assert_eq!(case.routes(), [] as [&str; 0]);
        case.host.guessed.clear();
        assert_eq!(case.routes()[0], "10.244.5.0/24 to the pods metric 1120", "pods of ours are there");
    }

    #[test]
    fn a_block_that_would_cut_the_node_off_is_not_programmed_and_the_others_are() {
        let mut case = case(vec![block(1), block(2), block(3)]);
        case.host.exposed = [1, 2].map(|n| (block(n).block, [10, 244, n, 9].into())).into();
        assert_eq!(case.routes(), ["10.244.3.0/24 via 172.30.0.13 metric 1120"]);
        let (desired, faults) = case.run();
        assert_eq!((desired.bridge, desired.keep.len()), (None, 0));
        let reasons: Vec<Reason> = faults.iter().map(|fault| fault.reason).collect();
        assert_eq!(reasons, [Reason::BlockHoldsNeededAddress; 2]);
        assert!(faults[0].message.contains("10.244.1.9") && faults[0].message.contains("is not programmed"));
        // Never under a pod.
        case.host.leased = [block(1).block].into();
        assert_eq!(case.routes()[0], "10.244.1.0/24 to the pods metric 1120");
        assert!(!own_blocks(&me("n1"), case.map(), &case.host)[&block(1).block].lease);
    }

    #[test]
    fn of_overlapping_blocks_the_older_is_programmed() {
        let wide: Block = "10.244.2.0/23".parse().unwrap();
        let newer =
            BlockFact { name: wide.object_name(), block: wide, created: 99, node: "n9".into(), ..block(9) };
        let case = case(vec![block(2), newer]);
        assert_eq!(case.routes(), ["10.244.2.0/24 via 172.30.0.12 metric 1120"]);
        assert_eq!(case.fault().reason, Reason::Overlapping);
    }

    #[test]
    fn pods_and_nodes_see_pod_addresses_and_the_rest_sees_the_nodes() {
        let mut case = case(vec![block(1), block(2)]);
        case.ranges.get_mut("default-v4").unwrap().exclude = vec![
            "192.168.0.0/24".parse().unwrap(),
            "192.168.1.0/24".parse().unwrap(),
            "fd00::/8".parse().unwrap(),
        ];
        let (desired, _) = case.run();
        let keep: Vec<String> = desired.masquerade.keep.iter().map(|net| net.to_string()).collect();
        assert_eq!(
            keep,
            [
                "10.244.0.0/16",
                "169.254.0.0/16",
                "172.30.0.11/32",
                "172.30.0.12/32",
                "224.0.0.0/4",
                "fe80::/10",
                "ff00::/8"
            ]
        );
        let merged: IpNet = "192.168.0.0/23".parse().unwrap();
        assert_eq!(
            desired.masquerade.sources,
            [(block(1).block, Leaving { exclude: vec![merged], ..Leaving::default() })].into()
        );
    }

    #[test]
    fn a_range_without_masquerade_leaves_its_pods_addresses_as_they_are() {
        let mut case = case(vec![block(1)]);
        case.ranges.get_mut("default-v4").unwrap().masquerade = MasqueradeMode::Disabled;
        assert!(case.run().0.masquerade.sources.is_empty());
        case.ranges.get_mut("default-v4").unwrap().masquerade = MasqueradeMode::Unknown;
        assert_eq!(case.run().0.masquerade.sources.len(), 1);
    }

    #[test]
    fn ipv6_forwarding_is_set_only_with_a_block_and_after_accept_ra() {
        let mut case = case(vec![block(1), block_v6(2)]);
        case.host.ra_links = ["eth0".to_owned()].into();
        assert_eq!(case.run().0.sysctls, [Sysctl::new("ipv4/ip_forward", "1")]);
        case.blocks.insert(block_v6(1).name, block_v6(1));
        assert_eq!(
            case.run().0.sysctls,
            [
                Sysctl::new("ipv4/ip_forward", "1"),
                Sysctl::new("ipv6/conf/eth0/accept_ra", "2"),
                Sysctl::new("ipv6/conf/all/forwarding", "1"),
            ]
        );
    }

    #[test]
    fn a_node_without_a_block_gets_routes_but_no_bridge_and_no_sysctls() {
        let (desired, _) = case(vec![block(2)]).run();
        assert_eq!((desired.routes.len(), desired.bridge, desired.sysctls), (1, None, vec![]));
    }

    #[test]
    fn a_range_with_a_block_that_others_carry_is_not_closed() {
        let mut case = case(vec![block(2)]);
        assert!(all_routed(&range("default-v4"), case.map()));
        case.blocks.get_mut("10-244-2-0-24").unwrap().routing =
            Some(Routing { mode: Some(Mode::None), ..Routing::default() });
        assert!(!all_routed(&range("default-v4"), case.map()));
    }

    #[test]
    fn leases_end_a_minute_before_the_shortest_quarantine() {
        let mut case = case(vec![block(1), block_v6(1)]);
        assert_eq!(lease_seconds("n1", case.map()), 840);
        case.ranges.get_mut("default-v4").unwrap().quarantine_seconds = 600;
        assert_eq!(lease_seconds("n1", case.map()), 540);
        case.ranges.get_mut("default-v4").unwrap().quarantine_seconds = 60;
        assert_eq!(lease_seconds("n1", case.map()), 30);
    }

    proptest! {
        #[test]
        fn a_block_is_routed_or_left_out_by_policy_or_a_fault(
            blocks in prop::collection::vec((1u8..30, 0usize..4, prop::option::of(0usize..3), any::<bool>()), 0..20),
        ) {
            let facts = blocks.into_iter().map(|(n, state, mode, has_address)| BlockFact {
                state: [BlockState::Active, BlockState::Draining, BlockState::Quarantined, BlockState::Unknown][state],
                routing: mode.map(|mode| Routing {
                    mode: Some([Mode::Direct, Mode::None, Mode::Unknown][mode]),
                    ..Routing::default()
                }),
                addresses: if has_address { block(n).addresses } else { vec![] },
                ..block(n)
            });
            let case = case(facts.collect());
            let (desired, faults) = case.run();
            for fact in case.blocks.values() {
                let routed = desired.routes.keys().any(|key| key.prefix == fact.block);
                let faulty = faults.iter().any(|fault| fault.name == fact.name);
                let by_policy = fact.routing.as_ref().is_some_and(|r| r.mode == Some(Mode::None));
                let left_out = fact.released() || (fact.node != "n1" && by_policy);
                prop_assert_eq!(1, usize::from(routed) + usize::from(faulty) + usize::from(left_out), "{:?}", fact);
                prop_assert_eq!(faulty, desired.keep.contains(&fact.block));
            }
            for key in desired.routes.keys() {
                prop_assert!(desired.owners.contains_key(key));
            }
        }
    }
}
