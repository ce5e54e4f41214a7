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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::RouteKey;
    use proptest::prelude::*;

    const UNDERLAY: Family = Family::IPv4;

    fn mac(n: u8) -> Mac {
        Mac::for_node(&format!("n{n}"))
    }

    fn gateway(n: u8) -> IpAddr {
        [10, 244, n, 0].into()
    }

    fn node(n: u8) -> IpAddr {
        [172, 31, 0, n].into()
    }

    fn entries(nodes: impl IntoIterator<Item = u8>) -> Entries {
        let nodes: Vec<u8> = nodes.into_iter().collect();
        Entries {
            forwarding: nodes.iter().map(|n| (mac(*n), node(*n))).collect(),
            neighbours: nodes.iter().map(|n| (gateway(*n), mac(*n))).collect(),
        }
    }

    fn route(n: u8) -> Route {
        let key = RouteKey::main(format!("10.244.{n}.0/24").parse().unwrap(), 1120);
        Route::new(key, Target::Tunnel { underlay: UNDERLAY, gateway: gateway(n) })
    }

    fn device() -> Device {
        let addresses = [gateway(1)].into();
        Device { underlay: UNDERLAY, network: Network::default(), mac: mac(1), mtu: 1450, addresses }
    }

    fn wanted(nodes: impl IntoIterator<Item = u8> + Clone) -> Desired {
        let tunnel = Tunnel { device: device(), entries: entries(nodes.clone()) };
        let routes = nodes.into_iter().map(|n| (route(n).key, route(n))).collect();
        Desired { tunnels: [(UNDERLAY, tunnel)].into(), routes, ..Desired::default() }
    }

    fn standing(device: &Device, entries: Entries) -> ObservedTunnel {
        ObservedTunnel {
            index: 7,
            network: Some(device.network),
            up: true,
            mac: device.mac,
            mtu: device.mtu,
            addresses: device.addresses.clone(),
            entries,
            strange: BTreeSet::new(),
        }
    }

    fn seen(nodes: impl IntoIterator<Item = u8> + Clone) -> Observed {
        let routes = wanted(nodes.clone()).routes;
        Observed {
            tunnels: [(UNDERLAY, standing(&device(), entries(nodes)))].into(),
            routes,
            ..Observed::default()
        }
    }

    /// What the kernel has once these steps are done.
    fn execute(steps: Vec<Step>, observed: &mut Observed) {
        for step in steps {
            match step {
                Step::EnsureTunnel(device) => {
                    let kept = observed.tunnels.remove(&device.underlay);
                    let kept = kept.filter(|there| !there.must_be_remade(&device));
                    let mut made = standing(&device, Entries::default());
                    if let Some(there) = kept {
                        (made.entries, made.strange) = (there.entries, there.strange);
                    }
                    observed.tunnels.insert(device.underlay, made);
                }
                Step::SetEntries { underlay, entries } => {
                    let there = observed.tunnels.get_mut(&underlay).expect("the device comes first");
                    there.strange.retain(|mac| !entries.forwarding.contains_key(mac));
                    there.entries.forwarding.extend(entries.forwarding);
                    there.entries.neighbours.extend(entries.neighbours);
                }
                Step::RemoveEntries { underlay, entries, strange } => {
                    let there = observed.tunnels.get_mut(&underlay).unwrap();
                    there.entries.forwarding.retain(|mac, _| !entries.forwarding.contains_key(mac));
                    there.entries.neighbours.retain(|address, _| !entries.neighbours.contains_key(address));
                    there.strange.retain(|mac| !strange.contains(mac));
                }
                Step::RemoveTunnel(underlay) => drop(observed.tunnels.remove(&underlay)),
                other => panic!("{other:?} is not about tunnels"),
            }
        }
    }

    #[test]
    fn what_is_as_it_should_be_needs_no_step() {
        let (desired, observed) = (wanted([2, 3]), seen([2, 3]));
        assert_eq!((prepare(&desired, &observed), clear(&desired, &observed)), (vec![], vec![]));
    }

    #[test]
    fn what_is_missing_or_wrong_is_set_and_nothing_else() {
        let desired = wanted([2, 3]);
        let mut lost = seen([2, 3]);
        let there = lost.tunnels.get_mut(&UNDERLAY).unwrap();
        there.entries.forwarding.insert(mac(2), node(99));
        there.entries.neighbours.remove(&gateway(3));
        let missing =
            Entries { forwarding: [(mac(2), node(2))].into(), neighbours: [(gateway(3), mac(3))].into() };
        let step = Step::SetEntries { underlay: UNDERLAY, entries: missing };
        assert_eq!((prepare(&desired, &lost), clear(&desired, &lost)), (vec![step], vec![]));
    }

    #[test]
    fn a_device_that_differs_is_put_right_and_one_of_another_network_made_anew_with_all_entries() {
        let desired = wanted([2]);
        let all = Step::SetEntries { underlay: UNDERLAY, entries: entries([2]) };
        for (change, is_remade) in [
            ((|there| there.up = false) as fn(&mut ObservedTunnel), false),
            (|there| there.mac = mac(9), false),
            (|there| there.mtu = 1400, false),
            (|there| there.addresses.clear(), false),
            (|there| there.network = Some(Network { vni: 9, ..Network::default() }), true),
            (|there| there.network = None, true),
        ] {
            let mut observed = seen([2]);
            change(observed.tunnels.get_mut(&UNDERLAY).unwrap());
            let mut expected = vec![Step::EnsureTunnel(device())];
            expected.extend(is_remade.then(|| all.clone()));
            assert_eq!(prepare(&desired, &observed), expected);
            assert_eq!(survives(&route(2), &desired, &observed), !is_remade);
        }
    }

    #[test]
    fn a_route_that_stays_keeps_the_device_and_its_entries() {
        let mut none = Desired { keep: [route(2).key.prefix].into(), ..Desired::default() };
        assert_eq!(clear(&none, &seen([2, 3])), []);
        let kept_at = |steps: Vec<Step>| {
            let mut observed = seen([2, 3]);
            execute(steps, &mut observed);
            observed.tunnels.remove(&UNDERLAY).map(|there| there.entries)
        };
        let partly = Desired { keep: none.keep.clone(), ..wanted([4]) };
        assert_eq!(kept_at(clear(&partly, &seen([2, 3]))), Some(entries([2])));
        none.keep.clear();
        assert_eq!(kept_at(clear(&none, &seen([2, 3]))), None);
    }

    fn some_nodes() -> impl Strategy<Value = BTreeSet<u8>> {
        prop::collection::btree_set(2u8..8, 0..6)
    }

    proptest! {
        #[test]
        fn the_steps_lead_there_at_once_and_no_route_is_without_its_entries_midway(
            before in some_nodes(), after in some_nodes(), strange in some_nodes(), kept in some_nodes(),
        ) {
            let mut observed = seen(before.clone());
            observed.tunnels.get_mut(&UNDERLAY).unwrap().strange =
                strange.difference(&before).map(|n| mac(*n)).collect();
            let keep = kept.iter().map(|n| route(*n).key.prefix).collect();
            let desired = Desired { keep, ..wanted(after.clone()) };
            let (first, last) = (prepare(&desired, &observed), clear(&desired, &observed));
            execute(first, &mut observed);
            let there = &observed.tunnels[&UNDERLAY].entries;
            let has = |n: &u8| there.neighbours.get(&gateway(*n)) == Some(&mac(*n)) && there.forwarding.get(&mac(*n)) == Some(&node(*n));
            prop_assert!(before.union(&after).all(has), "old and new routes work while they are replaced");
            execute(last, &mut observed);
            let stay: BTreeSet<u8> = after.iter().chain(before.intersection(&kept)).copied().collect();
            prop_assert_eq!(&observed.tunnels[&UNDERLAY].entries, &entries(stay));
            prop_assert!(observed.tunnels[&UNDERLAY].strange.is_empty());
            prop_assert_eq!((prepare(&desired, &observed), clear(&desired, &observed)), (vec![], vec![]));
        }
    }
}
