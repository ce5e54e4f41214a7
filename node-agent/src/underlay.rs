//! Which way leads to another node: directly over a link that both are on, or through a VXLAN tunnel; and the tunnels
//! that this takes. Pure.
//!
//! Both ends must choose alike, without a message: what each of two nodes knows is the other's addresses and name.
//! - Direct: one of the peer's addresses is on a link of this node, and an address that the peer knows of this node is
//!   on the same link, so that the peer sees it too. (Nodes of one subnet must have it with the same prefix length.)
//! - Tunnel: over IPv4 if both nodes have an IPv4 address, else over IPv6; for the blocks of both families.
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
use crate::fabric::{Desired, Target};
use crate::facts::{BlockFact, Fault, Reason};
use crate::policies;
use crate::vxlan::{Device, Entries, Tunnel, overhead, sysctls};

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
            None if mode == Mode::Auto && !self.is_local(block) => self.tunnel(block),
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
            Location::Local | Location::Remote => None,
        });
        let seen = |device: &u32| mode == Mode::Direct || links.is_empty() || links.contains(device);
        let (next_hop, device) = near.into_iter().find(|(_, device)| seen(device))?;
        Some(Way::Direct { next_hop, device })
    }

    /// The links with addresses by which others know this node; none if it is behind a NAT.
    fn published_links(&self, family: Family) -> BTreeSet<u32> {
        let known = self.published.iter().filter(|address| Family::of(address) == family);
        known.filter_map(|address| self.host.addresses.get(address).copied()).collect()
    }

    fn is_local(&self, block: &BlockFact) -> bool {
        block.addresses.iter().any(|address| self.location(address) == Location::Local)
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
    let mut nodes: BTreeMap<Mac, &str> = BTreeMap::new();
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
pub fn pod_mtu(host: &Host, desired: &Desired) -> Option<u32> {
    let tunnels = desired.tunnels.values().map(|tunnel| tunnel.device.mtu);
    host.mtu.into_iter().chain(tunnels).min()
}
