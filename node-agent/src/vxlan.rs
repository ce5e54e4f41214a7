//! Tunnels in our own words: what a VXLAN device (RFC 7348) and its tables should be, what is there, and what differs.
//!
//! One device for each family of the underlay that is needed, as the kernel sends by one alone. It learns nothing
//! and floods nothing: for each peer node stands an entry of the forwarding table (its hardware address, which
//! follows from its name, behind the node's address), and a permanent neighbour at that hardware address for each of
//! its IPv4 blocks (the block's first address, which the peer's device carries) and for its IPv6 blocks together (the
//! link-local address of the hardware address). A route leads to the neighbour.
//!
//! So packets survive a change at any time: entries come before the routes that use them and go after.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use plat_cni::mac::Mac;
use plat_crds::block::{Block, Family};
use plat_crds::names::{VXLAN_DEVICE_V4, VXLAN_DEVICE_V6, VXLAN_PORT, VXLAN_VNI};

use crate::diff::Step;
use crate::fabric::{Desired, Observed, Route, Sysctl, Target};

/// What the VXLAN devices of all nodes have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Network {
    /// VXLAN network identifier, 1 to 16777215.
    pub vni: u32,
    /// UDP port on which every node takes in tunnelled packets.
    pub port: u16,
}

impl Default for Network {
    fn default() -> Network {
        Network { vni: VXLAN_VNI, port: VXLAN_PORT }
    }
}

/// One VXLAN device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Family of the packets that carry the tunnelled ones.
    pub underlay: Family,
    /// What it has in common with the other nodes'.
    pub network: Network,
    /// Its hardware address.
    pub mac: Mac,
    /// MTU in bytes of what is tunnelled.
    pub mtu: u32,
    /// The first address of each block of this node: what the node itself sends to other nodes' pods comes from
    /// there, so that the answers come back through a tunnel.
    pub addresses: BTreeSet<IpAddr>,
}

/// The name of the device for that family of the underlay.
pub fn name(underlay: Family) -> &'static str {
    match underlay {
        Family::IPv4 => VXLAN_DEVICE_V4,
        Family::IPv6 => VXLAN_DEVICE_V6,
    }
}

/// Bytes that a tunnel adds to each packet: the outer IP header, UDP, VXLAN and the inner Ethernet header.
pub fn overhead(underlay: Family) -> u32 {
    match underlay {
        Family::IPv4 => 50,
        Family::IPv6 => 70,
    }
}

/// Sysctls of the device. Packets may come through a tunnel whose answers go directly, so the source is only checked loosely (RFC 3704 §2.4);
/// and routers are nothing that a tunnel may tell of.
pub fn sysctls(underlay: Family) -> [Sysctl; 2] {
    let title = name(underlay);
    [
        Sysctl::new(format!("ipv4/conf/{title}/rp_filter"), "2"),
        Sysctl::new(format!("ipv6/conf/{title}/accept_ra"), "0"),
    ]
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {} (VNI {}, port {})", name(self.underlay), self.network.vni, self.network.port)
    }
}

/// The entries of a device's tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// Which node has a hardware address.
    pub forwarding: BTreeMap<Mac, IpAddr>,
    /// The hardware address behind a next hop.
    pub neighbours: BTreeMap<IpAddr, Mac>,
}

impl Entries {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.forwarding.is_empty() && self.neighbours.is_empty()
    }

    /// The entries that `other` has not.
    fn without(&self, other: &Entries) -> Entries {
        Entries {
            forwarding: difference(&self.forwarding, |mac, address| {
                other.forwarding.get(mac) == Some(address)
            }),
            neighbours: difference(&self.neighbours, |address, mac| {
                other.neighbours.get(address) == Some(mac)
            }),
        }
    }
}

fn difference<K: Ord + Copy, V: Copy>(map: &BTreeMap<K, V>, has: impl Fn(&K, &V) -> bool) -> BTreeMap<K, V> {
    map.iter().filter(|(key, value)| !has(key, value)).map(|(key, value)| (*key, *value)).collect()
}

/// A device, and the entries of its tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The device.
    pub device: Device,
    /// Its tables.
    pub entries: Entries,
}

/// A VXLAN device of that name as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObservedTunnel {
    /// Interface index.
    pub index: u32,
    /// What cannot be changed once it stands; `None` if it is another kind of VXLAN device than ours.
    pub network: Option<Network>,
    /// Administratively up.
    pub up: bool,
    /// Its hardware address.
    pub mac: Mac,
    /// MTU in bytes.
    pub mtu: u32,
    /// Its addresses, without IPv6 link-local ones.
    pub addresses: BTreeSet<IpAddr>,
    /// Entries as ours are. One that differs in any way is none of them.
    pub entries: Entries,
    /// Hardware addresses with entries that are not as ours are.
    pub strange: BTreeSet<Mac>,
}

impl ObservedTunnel {
    /// Whether only another device can be as `wanted`.
    fn must_be_remade(&self, wanted: &Device) -> bool {
        self.network != Some(wanted.network)
    }

    fn fits(&self, wanted: &Device) -> bool {
        !self.must_be_remade(wanted)
            && self.up
            && self.mac == wanted.mac
            && self.mtu == wanted.mtu
            && self.addresses == wanted.addresses
    }
}

/// Devices that must be there, and their entries, before routes lead to them.
pub fn prepare(desired: &Desired, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    for (underlay, wanted) in &desired.tunnels {
        let there = observed.tunnels.get(underlay);
        if !there.is_some_and(|there| there.fits(&wanted.device)) {
            steps.push(Step::EnsureTunnel(wanted.device.clone()));
        }
        let kept = there.filter(|there| !there.must_be_remade(&wanted.device));
        let missing = match kept {
            Some(there) => wanted.entries.without(&there.entries),
            None => wanted.entries.clone(),
        };
        if !missing.is_empty() {
            steps.push(Step::SetEntries { underlay: *underlay, entries: missing });
        }
    }
    steps
}

/// Whether a route stays where it is while its device is made anew, which takes it along.
pub fn survives(route: &Route, desired: &Desired, observed: &Observed) -> bool {
    let Target::Tunnel { underlay, .. } = route.target else { return true };
    match (desired.tunnels.get(&underlay), observed.tunnels.get(&underlay)) {
        (Some(wanted), Some(there)) => !there.must_be_remade(&wanted.device),
        _ => true,
    }
}

/// What no route leads to any more, at the end. A route that stays because its object cannot be followed keeps what
/// it needs.
pub fn clear(desired: &Desired, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    for (underlay, there) in &observed.tunnels {
        let wanted = desired.tunnels.get(underlay);
        if wanted.is_some_and(|wanted| there.must_be_remade(&wanted.device)) {
            continue;
        }
        let kept = kept(*underlay, &desired.keep, observed);
        let Some(wanted) = wanted else {
            if kept.is_empty() {
                steps.push(Step::RemoveTunnel(*underlay));
            }
            continue;
        };
        let unwanted = Entries {
            forwarding: difference(&there.entries.forwarding, |mac, _| {
                wanted.entries.forwarding.contains_key(mac) || kept.forwarding.contains_key(mac)
            }),
            neighbours: difference(&there.entries.neighbours, |address, _| {
                wanted.entries.neighbours.contains_key(address) || kept.neighbours.contains_key(address)
            }),
        };
        let strange: BTreeSet<Mac> = there
            .strange
            .iter()
            .filter(|mac| !wanted.entries.forwarding.contains_key(mac))
            .copied()
            .collect();
        if !unwanted.is_empty() || !strange.is_empty() {
            steps.push(Step::RemoveEntries { underlay: *underlay, entries: unwanted, strange });
        }
    }
    steps
}

/// The entries that present routes to these blocks use.
pub fn kept(underlay: Family, blocks: &BTreeSet<Block>, observed: &Observed) -> Entries {
    let mut kept = Entries::default();
    let Some(there) = observed.tunnels.get(&underlay) else { return kept };
    for route in observed.routes.values().filter(|route| blocks.contains(&route.key.prefix)) {
        let Target::Tunnel { underlay: over, gateway } = route.target else { continue };
        let Some(mac) = there.entries.neighbours.get(&gateway).filter(|_| over == underlay) else { continue };
        kept.neighbours.insert(gateway, *mac);
        kept.forwarding.extend(there.entries.forwarding.get(mac).map(|address| (*mac, *address)));
    }
    kept
}
