//! The `routed` datapath: no bridge. Each pod has a link of its own to the host, and the host's IP layer is
//! all that is between them.
//!
//! ```text
//! host                                                pod
//! lo          10.244.3.1/32, fd00:3::1/128
//! plat0bad…                       ◀───── veth ─────▶  eth0  10.244.3.7/32, fd00:3::7/128
//!
//! 10.244.3.7 dev plat0bad… proto 113 src 10.244.3.1   10.244.3.1 dev eth0 scope link
//! fd00:3::7 dev plat0bad… proto 113 src fd00:3::1     default via 10.244.3.1 dev eth0
//!                                                     (and so for IPv6)
//! fd00:3::7 dev plat0bad… lladdr … PERMANENT          10.244.3.1 dev eth0 lladdr … PERMANENT
//!                                                     fd00:3::1 dev eth0 lladdr … PERMANENT
//! ```
//! One address per family, on `lo`, is the gateway of all pods. The reference ptp plugin puts it onto each
//! host's end instead; then the kernel keeps all links with one address in one list, so that an ADD takes
//! longer with each pod, and a DEL waits twice as long for the address to end.
//!
//! Without an address on the link the two ends cannot always ask for each other, so they are told
//! ([`link::permanent_neighbour`]):
//! - The pod knows the gateway's hardware address. The kernel does not answer a neighbour solicitation for
//!   an address of another link, and with `arp_ignore` (kube-proxy's `strictARP`) no ARP request either.
//! - The host knows the pod's for IPv6: it could not solicit without a link-local address. For IPv4 it asks.
//!
//! Nobody can forge what nobody asks for, and the first packet does not wait. No proxy ARP is needed.
//!
//! A host route bears a protocol number of its own ([`POD_ROUTE_PROTOCOL`]) and goes with its link. It
//! follows from the lease: [`restore`] puts back what was lost.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use plat_crds::lease::{Datapath, Lease};
use plat_crds::names::{POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL};
use plat_crds::{Block, Family};

use crate::bridge::host_net;
use crate::link::{self, LOOPBACK, Link, Route, Way};
use crate::mac::Mac;
use crate::netlink::{self, Message, Socket, created, deleted};
use crate::wire::PodNet;

/// The route to one address of a pod over the host's end of its link. `source` is what the host's own
/// packets come from; it must be an address of the host.
pub fn host_route(address: IpAddr, link: u32, source: Option<IpAddr>) -> Route {
    Route { source, protocol: POD_ROUTE_PROTOCOL, ..Route::new(host_net(address), None, link) }
}

/// What a pod knows about its gateways: that they are at the host's end of its link.
pub fn gateway_neighbours(net: &PodNet, pod_link: u32, host_mac: Mac) -> Vec<Message> {
    let gateways: BTreeSet<IpAddr> = net.ips.iter().filter_map(|ip| ip.gateway).collect();
    gateways.into_iter().map(|g| link::permanent_neighbour(pod_link, g, host_mac)).collect()
}

/// Makes the host the router of a pod whose link it has, up: gateways, routes, neighbours, in one exchange.
/// `blocks` are those of the node, whose gateways belong onto `lo`; none for a network configured by hand.
pub fn join(
    socket: &mut Socket,
    net: &PodNet,
    blocks: &[Block],
    host: &Link,
    pod_mac: Mac,
) -> Result<(), netlink::Error> {
    // What is configured by hand is not the agent's to remove.
    let by_hand = net.ips.iter().filter_map(|ip| ip.gateway).map(|gateway| (gateway, 0));
    let mut gateways: BTreeSet<(IpAddr, u8)> = by_hand.filter(|_| blocks.is_empty()).collect();
    gateways.extend(blocks.iter().map(|block| (block.gateway(), ROUTE_PROTOCOL)));
    let addresses =
        gateways.into_iter().map(|(g, protocol)| link::new_address(LOOPBACK, host_net(g), protocol));
    let mut messages: Vec<Message> = addresses.collect();
    let shared = messages.len();
    for ip in &net.ips {
        let address = ip.address.addr();
        messages.push(link::new_route(&host_route(address, host.index, ip.gateway)));
        messages.extend(pod_neighbour(address, host.index, pod_mac));
    }
    for (number, outcome) in socket.request_each(messages)?.into_iter().enumerate() {
        // Another pod has brought the gateway; but a route to this pod's address can only be a stranger's.
        match number < shared {
            true => created(outcome).map(|_| ())?,
            false => outcome?,
        }
    }
    Ok(())
}

fn pod_neighbour(address: IpAddr, link: u32, mac: Mac) -> Option<Message> {
    (Family::of(&address) == Family::IPv6).then(|| link::permanent_neighbour(link, address, mac))
}

/// What is missing on the host for these addresses to be reached over that link, in words; `None` if nothing
/// is. `pod_mac` is the hardware address that the pod has now.
pub fn missing(
    socket: &mut Socket,
    addresses: impl IntoIterator<Item = IpAddr>,
    host: &Link,
    pod_mac: Option<Mac>,
) -> Result<Option<String>, netlink::Error> {
    let addresses: Vec<IpAddr> = addresses.into_iter().collect();
    for address in &addresses {
        if link::way(socket, *address)? != Some(Way::Over(host.index)) {
            return Ok(Some(format!("the host has no route to {address} over {}", host.name)));
        }
    }
    let neighbours = link::neighbours(socket, host.index)?;
    let wrong = addresses.iter().filter(|a| Family::of(a) == Family::IPv6).find(|address| {
        let known = neighbours.iter().find(|n| n.address == **address);
        known.is_none_or(|n| n.mac != pod_mac)
    });
    Ok(wrong
        .map(|address| format!("the host does not know the hardware address of {address} on {}", host.name)))
}

/// The same in the pod: which of its gateways it takes for somebody else than the host's end. IPv4 asks for
/// what it does not know, IPv6 would ask in vain.
pub fn missing_in_pod(
    socket: &mut Socket,
    gateways: impl IntoIterator<Item = IpAddr>,
    pod_link: u32,
    host_mac: Option<Mac>,
) -> Result<Option<String>, netlink::Error> {
    let neighbours = link::neighbours(socket, pod_link)?;
    let wrong = gateways.into_iter().find(|gateway| {
        let known = neighbours.iter().find(|n| n.address == *gateway && n.mac.is_some());
        known.map_or(Family::of(gateway) == Family::IPv6, |n| n.mac != host_mac)
    });
    Ok(wrong.map(|gateway| format!("the pod does not know the hardware address of its gateway {gateway}")))
}

/// Makes `lo` carry these blocks' gateways and no other ones of Plat's; says what was done.
pub fn ensure_gateways(socket: &mut Socket, blocks: &[Block]) -> Result<Vec<String>, netlink::Error> {
    let mut done = Vec::new();
    let wanted: Vec<IpNet> = blocks.iter().map(|block| host_net(block.gateway())).collect();
    for found in link::addresses(socket, LOOPBACK)? {
        if found.protocol == ROUTE_PROTOCOL && !wanted.contains(&found.net) {
            deleted(socket.request(link::delete_address(LOOPBACK, found.net)))?;
            done.push(format!("took gateway {} from lo", found.net));
        }
    }
    let messages = wanted.iter().map(|net| link::new_address(LOOPBACK, *net, ROUTE_PROTOCOL)).collect();
    for (net, outcome) in wanted.iter().zip(socket.request_each(messages)?) {
        if created(outcome)? {
            done.push(format!("put gateway {net} on lo"));
        }
    }
    Ok(done)
}

/// Puts back the host routes and neighbours of these leases' pods that were lost; says which. Pods of other
/// datapaths and links that are gone are left out, and nothing is ever taken away: an ADD that the caller
/// does not know of yet may have made it. `blocks` are the node's, by which the routes' source is known.
pub fn restore<'a>(
    socket: &mut Socket,
    leases: impl IntoIterator<Item = &'a Lease>,
    blocks: &[Block],
) -> Result<Vec<String>, netlink::Error> {
    let leases: Vec<&Lease> =
        leases.into_iter().filter(|l| l.datapath == Datapath::Routed && l.veth.index != 0).collect();
    if leases.is_empty() {
        return Ok(Vec::new());
    }
    let mut present = BTreeSet::new();
    for family in Family::ALL {
        let routes = link::routes_of(socket, family, POD_ROUTE_PROTOCOL)?;
        present.extend(routes.iter().map(|route| (route.destination.addr(), route.link)));
    }
    let known = link::neighbours_of(socket, Family::IPv6)?;
    let known: BTreeSet<(IpAddr, u32)> = known.iter().map(|n| (n.address, n.link)).collect();
    let mut done = Vec::new();
    for lease in leases {
        let addresses = || lease.addresses.iter().map(|leased| leased.address);
        let at = lease.veth.index;
        let lacks_route = |address: &IpAddr| !present.contains(&(*address, at));
        let lacks_neighbour =
            |address: &IpAddr| Family::of(address) == Family::IPv6 && !known.contains(&(*address, at));
        if addresses().any(|address| lacks_route(&address) || lacks_neighbour(&address)) {
            done.extend(restore_one(socket, lease, blocks)?);
        }
    }
    Ok(done)
}

fn restore_one(
    socket: &mut Socket,
    lease: &Lease,
    blocks: &[Block],
) -> Result<Option<String>, netlink::Error> {
    // The lease may be of a pod that went a moment ago: its link's number is not another's before the
    // numbers have gone round.
    let Some(host) =
        link::link_by_index(socket, lease.veth.index)?.filter(|l| l.up && l.name == lease.veth.name)
    else {
        return Ok(None);
    };
    let pod_mac = match host.peer.zip(host.peer_netns) {
        // A namespace that is being removed cannot be asked any more.
        Some((peer, netns)) => link::link_in(socket, netns, peer).ok().flatten().and_then(|pod| pod.mac),
        None => None,
    };
    let mut messages = Vec::new();
    for address in lease.addresses.iter().map(|leased| leased.address) {
        let source = blocks.iter().find(|block| block.contains(&address)).map(|block| block.gateway());
        messages.push(link::replace_route(&host_route(address, host.index, source)));
        messages.extend(pod_mac.and_then(|mac| pod_neighbour(address, host.index, mac)));
    }
    for outcome in socket.request_each(messages)? {
        outcome?;
    }
    let addresses: Vec<String> = lease.addresses.iter().map(|a| a.address.to_string()).collect();
    Ok(Some(format!("routed {} over {} again", addresses.join(", "), host.name)))
}
