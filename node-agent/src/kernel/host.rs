//! The node's own links and addresses: which next hops are on a link, and which link carries the node.
//!
//! Only links with addresses and the bridge are read, not the hundreds of pod links that hang on it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use plat_cni::link::{self, LOOPBACK, Link};
use plat_cni::netlink::{Error, Socket};
use plat_crds::names::{ROUTE_PROTOCOL, VXLAN_DEVICE_V4, VXLAN_DEVICE_V6};
use rtnetlink::packet_core::{Emitable, NlasIterator, Parseable};
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeader, AddressMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::route::{self, Way};
use super::rule;
use crate::desired::{Device, Host, Leads, Location};
use crate::fabric::{ObservedBridge, host_prefix};
use crate::path::Needs;

/// One address of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The address.
    pub address: IpAddr,
    /// The subnet that is directly reachable by it.
    pub subnet: IpNet,
    /// Interface index.
    pub device: u32,
    /// Whether it bears our protocol number.
    pub ours: bool,
}

/// Addresses and the links that carry them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// All addresses but IPv6 link-local ones.
    pub addresses: Vec<InterfaceAddress>,
    /// Links with such addresses, and the bridge.
    pub links: BTreeMap<u32, Link>,
    /// Index of the bridge, if there is one of that name.
    pub bridge: Option<u32>,
}

/// Reads the view; `bridge` is the name of the pods' bridge.
pub fn observe(socket: &mut Socket, bridge: &str) -> Result<View, Error> {
    let addresses = addresses(socket)?;
    let mut view = View { addresses, ..View::default() };
    let indexes: BTreeSet<u32> = view.addresses.iter().map(|a| a.device).collect();
    for index in indexes {
        if let Some(link) = link::link_by_index(socket, index)? {
            view.links.insert(index, link);
        }
    }
    if let Some(link) = link::link_by_name(socket, bridge)? {
        view.bridge = Some(link.index);
        view.links.insert(link.index, link);
    }
    Ok(view)
}

fn addresses(socket: &mut Socket) -> Result<Vec<InterfaceAddress>, Error> {
    let all = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    socket.dump(&route::message(&all, 0, "list addresses".into()), |received| read_address(received.payload))
}

fn read_address(payload: &[u8]) -> Option<InterfaceAddress> {
    let header = AddressHeader::parse(payload).ok()?;
    if !matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return None;
    }
    let (mut peer, mut local, mut ours) = (None, None, false);
    for raw in NlasIterator::new(payload.get(header.buffer_len()..)?).map_while(Result::ok) {
        match AddressAttribute::parse(&raw) {
            // The prefix, and on a point-to-point link the peer; "local" is this node's.
            Ok(AddressAttribute::Address(address)) => peer = Some(address),
            Ok(AddressAttribute::Local(address)) => local = Some(address),
            // Who made it, since kernel 5.18; older ones do not say.
            Ok(AddressAttribute::Protocol(protocol)) => ours = u8::from(protocol) == ROUTE_PROTOCOL,
            _ => {}
        }
    }
    let subnet = IpNet::new(peer?, header.prefix_len).ok()?.trunc();
    let own = local.or(peer)?;
    if matches!(own, IpAddr::V6(own) if own.is_unicast_link_local()) {
        return None;
    }
    Some(InterfaceAddress { address: own, subnet, device: header.index, ours })
}

/// What the node's own state says to what paths need to know, in those fields of [`Host`]; and the links that lead to
/// addresses behind routers.
pub fn meet(socket: &mut Socket, view: &View, needs: Needs) -> Result<(Host, BTreeSet<u32>), Error> {
    let (locations, uplinks) = locate(socket, view, needs.addresses)?;
    let devices = devices(socket, view, &needs.interfaces)?;
    let reachable = reachable(socket, view, &devices, &needs.routers)?;
    let tables = rule::users(socket, &needs.tables)?;
    Ok((Host { locations, devices, reachable, tables, ..Host::default() }, uplinks))
}

/// Where the addresses are, and the links that lead to those behind routers. Decided by this node's subnets where
/// exactly one link has it; the kernel is asked where none or several do.
fn locate(
    socket: &mut Socket,
    view: &View,
    addresses: BTreeSet<IpAddr>,
) -> Result<(BTreeMap<IpAddr, Location>, BTreeSet<u32>), Error> {
    let (mut located, mut uplinks) = (BTreeMap::new(), BTreeSet::new());
    for address in addresses {
        let location = match locate_by_subnet(view, address) {
            Some(location) => location,
            None => match route::way(socket, address)? {
                Way::Local => Location::Local,
                Way::Direct(device) => Location::OnLink { device },
                Way::Indirect(Some(uplink)) => {
                    uplinks.insert(uplink);
                    Location::Remote
                }
                Way::Indirect(None) => Location::Unreachable,
            },
        };
        located.insert(address, location);
    }
    Ok((located, uplinks))
}

/// `None` if the subnets do not decide.
fn locate_by_subnet(view: &View, address: IpAddr) -> Option<Location> {
    if view.addresses.iter().any(|own| own.address == address) {
        return Some(Location::Local);
    }
    let is_up = |device: &u32| view.links.get(device).is_some_and(|link| link.up);
    let devices: BTreeSet<u32> = view
        .addresses
        .iter()
        .filter(|own| own.subnet.contains(&address) && Some(own.device) != view.bridge)
        .map(|own| own.device)
        .filter(is_up)
        .collect();
    match devices.first() {
        Some(device) if devices.len() == 1 => Some(Location::OnLink { device: *device }),
        _ => None,
    }
}

/// The links with addresses, and those of these names.
fn devices(
    socket: &mut Socket,
    view: &View,
    named: &BTreeSet<String>,
) -> Result<BTreeMap<String, Device>, Error> {
    let leads = |link: &Link| match (link.loopback || Some(link.index) == view.bridge, link.one_peer) {
        (true, _) => Leads::Nowhere,
        (false, true) => Leads::ToOnePeer,
        (false, false) => Leads::ToNeighbours,
    };
    let device = |link: &Link| {
        let device = Device { index: link.index, up: link.up, mtu: link.mtu, leads: leads(link) };
        (link.name.clone(), device)
    };
    let mut devices: BTreeMap<String, Device> = view.links.values().map(device).collect();
    for name in named {
        if !devices.contains_key(name)
            && let Some(link) = link::link_by_name(socket, name)?
        {
            devices.insert(name.clone(), device(&link).1);
        }
    }
    Ok(devices)
}

/// Which of these routers are on the link that they are to be on.
fn reachable(
    socket: &mut Socket,
    view: &View,
    devices: &BTreeMap<String, Device>,
    routers: &BTreeSet<(String, IpAddr)>,
) -> Result<BTreeSet<(u32, IpAddr)>, Error> {
    let mut reachable = BTreeSet::new();
    for (name, router) in routers {
        let Some(Device { index, up: true, .. }) = devices.get(name) else { continue };
        let in_subnet = |own: &InterfaceAddress| own.device == *index && own.subnet.contains(router);
        if view.addresses.iter().any(in_subnet) || route::is_on(socket, *router, *index)? {
            reachable.insert((*index, *router));
        }
    }
    Ok(reachable)
}

/// This node's addresses on links that lead to others: not the loopback, the pods' bridge, or the VXLAN devices. Each with
/// the links whose subnets hold it: another one than its own may lead to the same neighbours.
pub fn addresses_to_others(view: &View) -> BTreeMap<IpAddr, BTreeSet<u32>> {
    let ours = [VXLAN_DEVICE_V4, VXLAN_DEVICE_V6];
    let leads = |link: &Link| {
        !link.loopback && Some(link.index) != view.bridge && !ours.contains(&link.name.as_str())
    };
    let is_on = |own: &&InterfaceAddress| view.links.get(&own.device).is_some_and(leads);
    let to_others: Vec<&InterfaceAddress> = view.addresses.iter().filter(is_on).collect();
    let links = |of: &InterfaceAddress| {
        // The subnet of a point-to-point address is its peer's.
        let near = to_others.iter().filter(|own| own.subnet.contains(&of.address) || own.device == of.device);
        (of.address, near.map(|own| own.device).collect())
    };
    to_others.iter().map(|own| links(own)).collect()
}

/// Smallest MTU among the links that lead to other nodes behind routers, and `own`, that of the node's own link.
pub fn underlay_mtu(view: &View, own: Option<u32>, uplinks: BTreeSet<u32>) -> Option<u32> {
    let mtus = uplinks.iter().filter_map(|device| view.links.get(device)).map(|link| link.mtu);
    mtus.chain(own).min()
}

/// MTU of the link that carries one of the node's addresses, else the smallest among `devices`.
pub fn path_mtu(view: &View, node: &[IpAddr], devices: impl IntoIterator<Item = u32>) -> Option<u32> {
    let mtu = |device: &u32| view.links.get(device).filter(|link| !link.loopback).map(|link| link.mtu);
    let carries = |own: &&InterfaceAddress| node.contains(&own.address) && Some(own.device) != view.bridge;
    let of_node = view.addresses.iter().filter(carries).filter_map(|own| mtu(&own.device)).min();
    of_node.or_else(|| devices.into_iter().filter_map(|device| mtu(&device)).min())
}

/// The bridge with its addresses.
pub fn bridge(view: &View) -> Option<ObservedBridge> {
    let link = view.links.get(&view.bridge?)?;
    let own = || view.addresses.iter().filter(|own| own.device == link.index);
    let prefix = |own: &InterfaceAddress| IpNet::new(own.address, own.subnet.prefix_len()).ok();
    Some(ObservedBridge {
        name: link.name.clone(),
        index: link.index,
        up: link.up,
        mtu: link.mtu,
        addresses: own().filter_map(prefix).collect(),
        ours: own().filter(|own| own.ours).filter_map(prefix).collect(),
    })
}

/// The addresses on `lo` that bear our protocol number.
pub fn gateways(view: &View) -> BTreeSet<IpNet> {
    let ours = view.addresses.iter().filter(|own| own.ours && own.device == LOOPBACK);
    ours.map(|own| host_prefix(own.address)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_cni::netlink;
    use proptest::prelude::*;

    fn view() -> View {
        let own = |address: &str, length, device| InterfaceAddress {
            address: address.parse().unwrap(),
            subnet: IpNet::new(address.parse().unwrap(), length).unwrap().trunc(),
            device,
            ours: false,
        };
        let link = |index, name: &str, up, mtu| Link {
            index,
            name: name.into(),
            up,
            loopback: name == "lo",
            mtu,
            ..Link::default()
        };
        View {
            addresses: vec![
                own("127.0.0.1", 8, 1),
                own("172.30.0.11", 24, 2),
                own("10.0.0.5", 16, 3),
                own("10.0.7.5", 16, 4),
                own("192.168.0.1", 24, 5),
                own("10.244.1.1", 32, 9),
                own("10.244.1.1", 24, 9),
            ],
            links: [
                link(1, "lo", true, 65_536),
                link(2, "eth0", true, 1450),
                link(3, "eth1", true, 9000),
                link(4, "eth2", true, 1500),
                link(5, "eth3", false, 1500),
                link(9, "cni0", true, 1400),
            ]
            .map(|link| (link.index, link))
            .into(),
            bridge: Some(9),
        }
    }

    #[test]
    fn one_subnet_decides_and_doubt_is_left_to_the_kernel() {
        for (address, location) in [
            ("172.30.0.12", Some(Location::OnLink { device: 2 })),
            ("172.30.0.11", Some(Location::Local)),
            ("10.244.1.1", Some(Location::Local)),
            ("10.0.9.9", None),    // two links have it
            ("192.168.0.7", None), // its link is down
            ("10.244.1.7", None),  // pods are no routers
            ("8.8.8.8", None),
        ] {
            assert_eq!(locate_by_subnet(&view(), address.parse().unwrap()), location, "{address}");
        }
    }

    #[test]
    fn the_mtu_is_that_of_the_link_with_the_nodes_address() {
        assert_eq!(path_mtu(&view(), &["172.30.0.11".parse().unwrap()], [3]), Some(1450));
        assert_eq!(path_mtu(&view(), &["203.0.113.9".parse().unwrap()], [3, 4]), Some(1500), "behind a NAT");
        assert_eq!(
            path_mtu(&view(), &["127.0.0.1".parse().unwrap()], [4]),
            Some(1500),
            "routed to the loopback"
        );
        assert_eq!(path_mtu(&view(), &[], []), None);
    }

    #[test]
    fn the_bridge_shows_each_address_with_its_prefix() {
        let bridge = bridge(&view()).unwrap();
        assert_eq!((bridge.index, bridge.mtu), (9, 1400));
        assert!(bridge.addresses.contains(&"10.244.1.1/32".parse().unwrap()));
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = read_address(&bytes);
            let length = 16 + u32::try_from(bytes.len()).unwrap();
            let header = [length.to_ne_bytes(), [16, 0, 0, 0], [0; 4], [0; 4]].concat();
            let link = [header, bytes].concat();
            netlink::split(&link).for_each(|received| drop(link::read_link(&received)));
        }
    }
}
