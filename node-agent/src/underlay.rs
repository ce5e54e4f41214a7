//! Which way leads to another node: directly over a link that both are on, or through a VXLAN tunnel; and the tunnels
//! that this takes. Pure.
//!
//! Both ends must choose alike, without a message: what each of two nodes knows is the other's addresses and name.
//! - Direct: one of the peer's addresses is on a link of this node, and an address that the peer knows of this node is
//!   on the same link, so that the peer sees it too. (Nodes of one subnet must have it with the same prefix length.)
//! - Tunnel: over IPv4 if both nodes have an IPv4 address, else over IPv6; for the blocks of both families.
//! - Neither, if no route leads to the peer: a link that is down for a while is nothing to build tunnels for.
//! - If this node's own blocks are to be reached through tunnels (`mode: VXLAN`), `Auto` answers through tunnels.
//!
//! A device stands while this node tunnels to somebody, or policy lets somebody tunnel to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use plat_cni::mac::Mac;
use plat_crds::block::{Block, Family};
use plat_crds::blocks_file::HeldBlock;
use plat_crds::routing::Mode;

use crate::desired::{Host, Location, Map, Me};
use crate::fabric::{Desired, Observed, Target};
use crate::facts::{BlockFact, Fault, Reason};
use crate::policies;
use crate::vxlan::{self, Device, Entries, Tunnel, overhead, sysctls};

/// MTU of an Ethernet link, where that of none is known.
const ETHERNET_MTU: u32 = 1500;

/// The way to another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Over a link that it is on.
    Direct {
        /// Its address there.
        next_hop: IpAddr,
        /// Interface index.
        device: u32,
    },
    /// Through a tunnel.
    Tunnel {
        /// Family of the packets that carry the tunnelled ones.
        underlay: Family,
        /// Its address.
        peer: IpAddr,
    },
}

/// What of this node decides the way to others.
#[derive(Debug)]
pub struct Underlay<'a> {
    host: &'a Host,
    /// The addresses by which others know this node.
    published: BTreeSet<IpAddr>,
    /// Families in which blocks of this node are to be reached through tunnels.
    tunnelled: BTreeSet<Family>,
}

impl<'a> Underlay<'a> {
    /// Of this node.
    pub fn new(me: &Me, map: Map<'_>, host: &'a Host) -> Underlay<'a> {
        let own: Vec<&BlockFact> =
            map.blocks.values().filter(|block| block.node == me.node && !block.released()).collect();
        let by_tunnel = |block: &&&BlockFact| {
            let layers = policies::layers(block, map.ranges.get(&block.range), map.policies);
            layers.iter().find_map(|(_, routing)| routing.mode) == Some(Mode::VXLAN)
        };
        Underlay {
            host,
            published: own.iter().flat_map(|block| block.addresses.iter().copied()).collect(),
            tunnelled: own.iter().filter(by_tunnel).map(|block| block.block.family()).collect(),
        }
    }

    /// The way to the node of a foreign block, by one of these modes: `Auto`, `Direct` or `VXLAN`.
    pub fn way(&self, block: &BlockFact, mode: Mode) -> Result<Way, Fault> {
        let answers = mode == Mode::Auto && self.tunnelled.contains(&block.block.family());
        if mode == Mode::VXLAN || answers {
            return self.tunnel(block);
        }
        match self.direct(block, mode) {
            Some(way) => Ok(way),
            None if mode == Mode::Auto && !self.is_cut_off(block) => self.tunnel(block),
            None => Err(self.not_direct(block)),
        }
    }

    fn location(&self, address: &IpAddr) -> Location {
        self.host.locations.get(address).copied().unwrap_or(Location::Remote)
    }

    fn direct(&self, block: &BlockFact, mode: Mode) -> Option<Way> {
        let family = block.block.family();
        let links = self.published_links(family);
        let near = addresses(block, family).filter_map(|next_hop| match self.location(&next_hop) {
            Location::OnLink { device } => Some((next_hop, device)),
            Location::Local | Location::Remote | Location::Unreachable => None,
        });
        let seen = |device: &u32| mode == Mode::Direct || links.is_empty() || links.contains(device);
        let (next_hop, device) = near.into_iter().find(|(_, device)| seen(device))?;
        Some(Way::Direct { next_hop, device })
    }

    /// The links with addresses by which others know this node; none if it is behind a NAT.
    fn published_links(&self, family: Family) -> BTreeSet<u32> {
        let known = self.published.iter().filter(|address| Family::of(address) == family);
        known.filter_map(|address| self.host.addresses.get(address)).flatten().copied().collect()
    }

    fn is_local(&self, block: &BlockFact) -> bool {
        block.addresses.iter().any(|address| self.location(address) == Location::Local)
    }

    /// Whether a tunnel would lead nowhere.
    fn is_cut_off(&self, block: &BlockFact) -> bool {
        let unreachable = |(_, peer)| self.location(&peer) == Location::Unreachable;
        self.is_local(block) || self.peer(block).is_some_and(unreachable)
    }

    fn not_direct(&self, block: &BlockFact) -> Fault {
        let family = block.block.family();
        let whose = format!("PodCIDR '{}' of node {}", block.name, block.node);
        let (reason, why) = match addresses(block, family).next() {
            None => (
                Reason::NoNodeAddress,
                format!(
                    "the node has no {family} address; give it an InternalIP, or set spec.routing.nextHop or mode VXLAN"
                ),
            ),
            Some(address) if self.is_local(block) => (
                Reason::NotOnLink,
                format!(
                    "its next hop {address} is an address of this node itself; correct the node's address or spec.routing.nextHop"
                ),
            ),
            Some(address) if self.location(&address) == Location::Unreachable => (
                Reason::NotOnLink,
                format!(
                    "its next hop {address} is not on a link of this node, and no route leads there; bring the link to it up, or add a route"
                ),
            ),
            Some(address) => (
                Reason::NotOnLink,
                format!(
                    "its next hop {address} is not on a link of this node; set spec.routing.nextHop to a router that is, spec.routing.mode to Auto or VXLAN, or to None if something else carries the block"
                ),
            ),
        };
        Fault::block(&block.name, reason, format!("{whose}: {why}"))
    }

    fn tunnel(&self, block: &BlockFact) -> Result<Way, Fault> {
        if self.is_local(block) {
            return Err(self.not_direct(block));
        }
        match self.peer(block) {
            Some((underlay, peer)) => Ok(Way::Tunnel { underlay, peer }),
            None => {
                let own = self.families();
                let has: Vec<String> =
                    Family::ALL.iter().filter(|f| own.contains(f)).map(|f| f.to_string()).collect();
                let why = format!(
                    "PodCIDR '{}': node {} has no address of a family that this node has ({}), so no tunnel leads there; give it an InternalIP",
                    block.name,
                    block.node,
                    if has.is_empty() { "none".to_owned() } else { has.join(", ") }
                );
                Err(Fault::block(&block.name, Reason::NoNodeAddress, why))
            }
        }
    }

    /// The families by which others can reach this node; of a node without blocks, those that it has.
    fn families(&self) -> BTreeSet<Family> {
        match self.published.is_empty() {
            true => self.host.addresses.keys().map(Family::of).collect(),
            false => self.published.iter().map(Family::of).collect(),
        }
    }

    /// The other end of a tunnel to the node of a block: of several addresses one that is on a link, else the first.
    fn peer(&self, block: &BlockFact) -> Option<(Family, IpAddr)> {
        let own = self.families();
        let has = |family: &Family| own.contains(family) && addresses(block, *family).next().is_some();
        let underlay = Family::ALL.into_iter().find(has)?;
        let near = |address: &IpAddr| matches!(self.location(address), Location::OnLink { .. });
        let peer = addresses(block, underlay).find(near).or_else(|| addresses(block, underlay).next())?;
        Some((underlay, peer))
    }
}

/// The next hop in a tunnel to a foreign block. IPv4: the block's first address, which stands on the peer's device.
/// IPv6: the link-local address that follows from the peer's hardware address, as the kernel takes no other one to be on
/// the link while the block's present route leads elsewhere (`ip6_route_check_nh_onlink`).
pub fn gateway(block: &BlockFact) -> IpAddr {
    match block.block.family() {
        Family::IPv4 => block.block.network(),
        Family::IPv6 => Mac::for_node(&block.node).link_local().into(),
    }
}

fn addresses(block: &BlockFact, family: Family) -> impl Iterator<Item = IpAddr> + '_ {
    block.addresses.iter().copied().filter(move |address| Family::of(address) == family)
}

/// Gives `desired` the tunnels that its routes lead through, and the devices by which others may come. `others` are the
/// blocks of other nodes.
pub fn add_tunnels<'a>(
    desired: &mut Desired,
    me: &Me,
    own: &BTreeMap<Block, HeldBlock>,
    underlay: &Underlay<'_>,
    others: impl Iterator<Item = &'a BlockFact>,
) -> Vec<Fault> {
    let led = led(desired);
    let comes = !own.is_empty() && (underlay.host.others_tunnel || !underlay.tunnelled.is_empty());
    let mut entries: BTreeMap<Family, Entries> = BTreeMap::new();
    // A frame that bears a device's own hardware address as its source is dropped there.
    let mut nodes: BTreeMap<Mac, &str> = [(Mac::for_node(&me.node), me.node.as_str())].into();
    let mut faults = Vec::new();
    for block in others {
        let Some((family, peer)) = underlay.peer(block) else { continue };
        if comes {
            entries.entry(family).or_default();
        }
        let Some(gateway) = led.get(&block.block) else { continue };
        let mac = Mac::for_node(&block.node);
        if *nodes.entry(mac).or_insert(&block.node) != block.node {
            desired.routes.retain(|key, _| key.prefix != block.block);
            desired.keep.insert(block.block);
            faults.push(same_address(block, nodes.get(&mac).copied().unwrap_or_default(), mac));
            continue;
        }
        let entries = entries.entry(family).or_default();
        entries.forwarding.insert(mac, peer);
        entries.neighbours.insert(*gateway, mac);
    }
    let addresses: BTreeSet<IpAddr> = own.keys().map(Block::network).collect();
    for (family, entries) in entries {
        let mtu = underlay.host.underlay_mtu.unwrap_or(ETHERNET_MTU).saturating_sub(overhead(family));
        let (network, mac) = (me.vxlan, Mac::for_node(&me.node));
        let device = Device { underlay: family, network, mac, mtu, addresses: addresses.clone() };
        desired.sysctls.extend(sysctls(family));
        desired.tunnels.insert(family, Tunnel { device, entries });
    }
    faults
}

/// The blocks that are reached through tunnels, with the next hop in the tunnel.
fn led(desired: &Desired) -> BTreeMap<Block, IpAddr> {
    let through = desired.routes.values().filter_map(|route| match &route.target {
        Target::Tunnel { gateway, .. } => Some((route.key.prefix, *gateway)),
        _ => None,
    });
    through.collect()
}

fn same_address(block: &BlockFact, other: &str, mac: Mac) -> Fault {
    let why = format!(
        "PodCIDR '{}': the names of the nodes {} and {other} make the same hardware address {mac}, so both cannot be reached through tunnels; rename one of them, or set spec.routing.nextHop",
        block.name, block.node
    );
    Fault::block(&block.name, Reason::UnusablePolicy, why)
}

/// MTU of new pods: no larger than that of any tunnel. A packet that is too large for one is answered by an ICMP error,
/// but the kernel sends few of them, and a pod that speaks to many others would wait.
/// Tunnels that stay for the routes that stay count, too.
pub fn pod_mtu(host: &Host, desired: &Desired, observed: &Observed) -> Option<u32> {
    let tunnels = desired.tunnels.values().map(|tunnel| tunnel.device.mtu);
    let stays = |family: &Family| !vxlan::kept(*family, &desired.keep, observed).is_empty();
    let kept = observed.tunnels.iter().filter(|(family, _)| stays(family)).map(|(_, tunnel)| tunnel.mtu);
    host.mtu.into_iter().chain(tunnels).chain(kept).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::desired;
    use crate::fixtures::{block, block_v6, me, range};
    use plat_crds::routing::Routing;
    use proptest::prelude::*;

    /// Two names that make the same hardware address: found by trying, as 40 bits are not many.
    const ALIKE: [&str; 2] = ["node-965278", "node-1565682"];

    fn by(mode: Mode, block: BlockFact) -> BlockFact {
        BlockFact { routing: Some(Routing { mode: Some(mode), ..Routing::default() }), ..block }
    }

    fn at(addresses: &[&str], block: BlockFact) -> BlockFact {
        BlockFact { addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(), ..block }
    }

    /// A node with these addresses, each the only one of a link, on which those of the same /24 or /64 are.
    fn host(own: &[IpAddr], others: &[IpAddr]) -> Host {
        let links: BTreeMap<IpAddr, u32> = own.iter().copied().zip(2..).collect();
        let place = |address: &IpAddr| match own.iter().find(|own| subnet(own) == subnet(address)) {
            Some(own) if own == address => Location::Local,
            Some(own) => Location::OnLink { device: links[own] },
            None => Location::Remote,
        };
        let locations = own.iter().chain(others).map(|address| (*address, place(address))).collect();
        let addresses = links.into_iter().map(|(own, link)| (own, [link].into())).collect();
        Host { locations, addresses, ..Host::default() }
    }

    fn subnet(address: &IpAddr) -> Vec<u8> {
        match address {
            IpAddr::V4(v4) => v4.octets()[..3].to_vec(),
            IpAddr::V6(v6) => v6.octets()[..8].to_vec(),
        }
    }

    /// What node `n1` makes of these blocks.
    fn run_as(node: &str, blocks: &[BlockFact]) -> (Desired, Vec<Fault>) {
        let facts: BTreeMap<String, BlockFact> = blocks.iter().map(|b| (b.name.clone(), b.clone())).collect();
        let ranges = [("default-v4".to_owned(), range("default-v4"))].into();
        let map = Map { blocks: &facts, ranges: &ranges, policies: &[], absent: &BTreeSet::new() };
        let of = |own: bool| -> Vec<IpAddr> {
            let those = blocks.iter().filter(|block| (block.node == node) == own);
            let all: BTreeSet<IpAddr> = those.flat_map(|block| block.addresses.iter().copied()).collect();
            all.into_iter().collect()
        };
        desired(&me(node), map, &host(&of(true), &of(false)))
    }

    fn run(blocks: &[BlockFact]) -> (Desired, Vec<Fault>) {
        run_as("n1", blocks)
    }

    fn target(desired: &Desired, block: &BlockFact) -> Option<Target> {
        desired
            .routes
            .values()
            .find(|route| route.key.prefix == block.block)
            .map(|route| route.target.clone())
    }

    fn tunnel(underlay: Family, gateway: IpAddr) -> Option<Target> {
        Some(Target::Tunnel { underlay, gateway })
    }

    #[test]
    fn the_way_follows_from_the_mode_and_the_place_of_both_ends() {
        let near = block(2);
        let far = at(&["172.31.0.13"], block(3));
        let (direct, tunnelled) = (false, true);
        for (own, mode, foreign, expected) in [
            (Mode::Auto, Mode::Auto, &near, Some(direct)),
            (Mode::Auto, Mode::Auto, &far, Some(tunnelled)),
            (Mode::Auto, Mode::VXLAN, &near, Some(tunnelled)),
            (Mode::Auto, Mode::Direct, &near, Some(direct)),
            (Mode::Auto, Mode::Direct, &far, None),
            // Whoever reaches us through tunnels is answered so, unless told otherwise.
            (Mode::VXLAN, Mode::Auto, &near, Some(tunnelled)),
            (Mode::VXLAN, Mode::Direct, &near, Some(direct)),
        ] {
            let foreign = by(mode, foreign.clone());
            let (desired, faults) = run(&[by(own, block(1)), foreign.clone()]);
            let got = target(&desired, &foreign).map(|target| matches!(target, Target::Tunnel { .. }));
            assert_eq!(got, expected, "{own:?} {mode:?} {faults:?}");
            assert_eq!(faults.len(), usize::from(expected.is_none()));
            assert_eq!(desired.keep.contains(&foreign.block), expected.is_none(), "what is there stays");
        }
    }

    #[test]
    fn a_tunnel_has_a_device_an_entry_for_the_node_and_a_neighbour_for_each_next_hop() {
        let far = ["172.31.0.12"];
        let blocks = [block(1), at(&far, block(2)), at(&far, block_v6(2))];
        let (desired, faults) = run(&blocks);
        assert_eq!(faults, []);
        let mac = Mac::for_node("n2");
        let gateways: [IpAddr; 2] = ["10.244.2.0".parse().unwrap(), mac.link_local().into()];
        assert_eq!(target(&desired, &blocks[1]), tunnel(Family::IPv4, gateways[0]));
        assert_eq!(target(&desired, &blocks[2]), tunnel(Family::IPv4, gateways[1]));
        let Tunnel { device, entries } = &desired.tunnels[&Family::IPv4];
        assert_eq!((device.mac, device.mtu), (Mac::for_node("n1"), 1450));
        assert_eq!(device.addresses, ["10.244.1.0".parse().unwrap()].into());
        assert_eq!(entries.forwarding, [(mac, far[0].parse().unwrap())].into());
        assert_eq!(entries.neighbours, gateways.map(|gateway| (gateway, mac)).into());
        assert!(!desired.tunnels.contains_key(&Family::IPv6), "nothing needs one");
    }

    #[test]
    fn the_underlay_is_of_a_family_that_both_ends_have() {
        let (v4, v6, both) = (["172.30.0.11"], ["fd00:30::b"], ["fd00:30::b", "172.30.0.11"]);
        let (far_v4, far_v6) = (["172.31.0.12"], ["fd00:31::c"]);
        let far_both = ["fd00:31::c", "172.31.0.12"];
        for (own, other, expected) in [
            (&both[..], &far_both[..], Some(Family::IPv4)),
            (&both[..], &far_v6[..], Some(Family::IPv6)),
            (&v6[..], &far_both[..], Some(Family::IPv6)),
            (&v4[..], &far_v4[..], Some(Family::IPv4)),
            (&v4[..], &far_v6[..], None),
        ] {
            let (desired, faults) = run(&[at(own, block(1)), at(other, block(2))]);
            let families: Vec<Family> = desired.tunnels.keys().copied().collect();
            assert_eq!(families, Vec::from_iter(expected), "{own:?} {other:?}");
            if expected.is_none() {
                assert_eq!(faults[0].reason, Reason::NoNodeAddress);
                let why = "no address of a family that this node has (IPv4)";
                assert!(faults[0].message.contains(why), "{}", faults[0].message);
            }
        }
    }

    #[test]
    fn no_tunnel_leads_to_an_address_of_this_node_itself() {
        let own = ["172.30.0.11"];
        for mode in [Mode::Auto, Mode::VXLAN, Mode::Direct] {
            let (desired, faults) = run(&[at(&own, block(1)), by(mode, at(&own, block(2)))]);
            assert_eq!(desired.tunnels, BTreeMap::new());
            assert!(faults[0].message.contains("is an address of this node itself"), "{}", faults[0].message);
        }
    }

    #[test]
    fn names_that_make_the_same_hardware_address_are_told_and_cost_one_node_its_tunnel() {
        let [one, other] = ALIKE;
        assert_eq!(Mac::for_node(one), Mac::for_node(other));
        let far =
            |n: u8, node: &str| BlockFact { node: node.into(), ..at(&[&format!("172.31.0.{n}")], block(n)) };
        let blocks = [block(1), far(2, one), far(3, other), far(4, "n4")];
        let (desired, faults) = run(&blocks);
        let reached: Vec<bool> = blocks[1..].iter().map(|b| target(&desired, b).is_some()).collect();
        assert_eq!(reached, [true, false, true]);
        let entries = &desired.tunnels[&Family::IPv4].entries;
        assert_eq!(entries.forwarding[&Mac::for_node(one)], blocks[1].addresses[0]);
        assert!(!entries.neighbours.contains_key(&blocks[2].block.network()));
        assert_eq!(faults.len(), 1);
        let told = &faults[0];
        assert_eq!((told.name.as_str(), told.reason), (blocks[2].name.as_str(), Reason::UnusablePolicy));
        assert!(told.message.contains(one) && told.message.contains(other), "{}", told.message);

        let (desired, faults) = run_as(one, &[BlockFact { node: one.into(), ..block(1) }, far(3, other)]);
        assert_eq!(target(&desired, &blocks[2]), None, "it would take the frames for its own");
        assert!(faults[0].message.contains(one) && faults[0].message.contains(other));
    }

    #[test]
    fn a_device_stands_while_others_may_come_through_it() {
        let (own, near) = (block(1), block(2));
        let has_device = |blocks: &[BlockFact]| run(blocks).0.tunnels.contains_key(&Family::IPv4);
        assert!(!has_device(&[own.clone(), near.clone()]));
        assert!(has_device(&[by(Mode::VXLAN, own), by(Mode::Direct, near)]));
    }

    #[test]
    fn new_pods_send_nothing_that_a_tunnel_cannot_carry() {
        let host = Host { mtu: Some(1500), ..Host::default() };
        let far =
            |address: &str| run(&[at(&["172.30.0.11", "fd00:30::b"], block(1)), at(&[address], block(2))]).0;
        let nothing = Observed::default();
        assert_eq!(pod_mtu(&host, &far("172.30.0.12"), &nothing), Some(1500), "directly");
        assert_eq!(pod_mtu(&host, &far("172.31.0.12"), &nothing), Some(1450));
        assert_eq!(pod_mtu(&host, &far("fd00:31::c"), &nothing), Some(1430));
        assert_eq!(pod_mtu(&Host { mtu: Some(1400), ..host }, &far("172.31.0.12"), &nothing), Some(1400));
    }

    /// Node `n<n>` with an IPv4 address in each of these subnets, and an IPv6 one.
    fn placed(n: u8, v4: &BTreeSet<u8>, v6: &BTreeSet<u8>) -> [BlockFact; 2] {
        let v4 = v4.iter().map(|subnet| IpAddr::from([172, 30, *subnet, 10 + n]));
        let address = |subnet: &u8| format!("fd00:30:{subnet}::{n}").parse::<IpAddr>().unwrap();
        let addresses: Vec<IpAddr> = v4.chain(v6.iter().map(address)).collect();
        [block(n), block_v6(n)].map(|block| BlockFact { addresses: addresses.clone(), ..block })
    }

    fn subnets() -> impl Strategy<Value = BTreeSet<u8>> {
        prop::collection::btree_set(0u8..4, 0..3)
    }

    proptest! {
        #[test]
        fn two_nodes_choose_alike(a in (subnets(), subnets()), b in (subnets(), subnets()), tunnels in any::<[bool; 2]>()) {
            let [mut first, mut second] = [placed(1, &a.0, &a.1), placed(2, &b.0, &b.1)];
            for (blocks, tunnels) in [&mut first, &mut second].into_iter().zip(tunnels) {
                let mode = if tunnels { Mode::VXLAN } else { Mode::Auto };
                *blocks = blocks.clone().map(|block| by(mode, block));
            }
            let all = [first.clone(), second.clone()].concat();
            let (there, back) = (run_as("n1", &all).0, run_as("n2", &all).0);
            for (to, from) in second.iter().zip(&first) {
                let way = |target: Option<Target>| match target {
                    Some(Target::Tunnel { underlay, .. }) => Some(Some(underlay)),
                    Some(_) => Some(None),
                    None => None,
                };
                prop_assert_eq!(way(target(&there, to)), way(target(&back, from)));
            }
        }

        #[test]
        fn each_route_through_a_tunnel_has_what_it_needs_there_and_nothing_else_is(
            nodes in prop::collection::vec((subnets(), subnets(), any::<bool>()), 1..8),
        ) {
            let mut blocks = Vec::new();
            for (n, (v4, v6, tunnels)) in (1..).zip(&nodes) {
                let mode = if *tunnels { Mode::VXLAN } else { Mode::Auto };
                blocks.extend(placed(n, v4, v6).map(|block| by(mode, block)));
            }
            let (desired, _) = run(&blocks);
            let mut needed: BTreeMap<Family, Entries> = BTreeMap::new();
            for block in &blocks {
                if let Some(Target::Tunnel { underlay, gateway }) = target(&desired, block) {
                    let mac = Mac::for_node(&block.node);
                    let entries = &desired.tunnels[&underlay].entries;
                    prop_assert_eq!(entries.neighbours.get(&gateway), Some(&mac));
                    prop_assert!(block.addresses.contains(&entries.forwarding[&mac]));
                    let needed = needed.entry(underlay).or_default();
                    needed.neighbours.insert(gateway, mac);
                    needed.forwarding.insert(mac, entries.forwarding[&mac]);
                }
            }
            for (underlay, tunnel) in &desired.tunnels {
                prop_assert_eq!(&tunnel.entries, &needed.remove(underlay).unwrap_or_default());
            }
        }
    }
}
