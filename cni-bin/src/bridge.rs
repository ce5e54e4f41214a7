//! The bridge that pods hang on: made once, with a hardware address that stays, and carrying the gateway
//! address of each block.
//!
//! Two callers: the agent keeps it exactly so ([`ensure`]), the CNI binary takes what is there and makes
//! what is missing ([`open`]).
//!
//! A block's gateway is a /32 (/128) address, so the block itself needs a route onto the bridge; both bear
//! Plat's number ([`ROUTE_PROTOCOL`]), by which they are found again when the block is gone. The route has
//! Plat's own metric, so the agent finds it among its own: it must keep [`block_routes`] in what it wants.

use std::net::IpAddr;

use ipnet::IpNet;
use plat_crds::names::{ROUTE_METRIC, ROUTE_PROTOCOL};
use plat_crds::{Block, Family, alias};

use crate::link::{self, Address, Link, LinkChange, Route};
use crate::mac::{End, Mac};
use crate::netlink::{self, Message, Socket, created, deleted};
use crate::sysctl::{self, Sysctls};

/// What a bridge should be.
#[derive(Clone, Debug)]
pub struct Spec<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its MTU in bytes; `None` leaves it to the kernel.
    pub mtu: Option<u32>,
    /// The blocks whose gateways it carries, in the order of the blocks file.
    pub blocks: &'a [Block],
}

/// A bridge that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// What had to be done to it, in words; empty if all was as it should be.
    pub repaired: Vec<String>,
}

/// Why there is no such bridge.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something else has the name.
    #[error("link {name} exists and is {}, not a bridge; remove it or choose another bridge name", kind.as_deref().unwrap_or("hardware"))]
    NotABridge {
        /// The name.
        name: String,
        /// What it is.
        kind: Option<String>,
    },
    /// It was deleted while we worked on it.
    #[error("bridge {0} was deleted meanwhile")]
    Vanished(String),
    /// It has another address that contradicts the gateway's.
    #[error(
        "bridge {name} has address {found}, which conflicts with the gateway {wanted}; remove it, or set forceAddress"
    )]
    Conflict {
        /// The bridge.
        name: String,
        /// The address it has.
        found: IpNet,
        /// The address it should have.
        wanted: IpNet,
    },
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// A sysctl of it could not be set.
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
}

/// Makes the bridge exactly what `spec` says: there, up, with that MTU, with these gateways and routes and
/// no other ones of Plat's, and with the links of all its pods as ports. Addresses of others stay.
pub fn ensure(socket: &mut Socket, sysctls: &Sysctls, spec: &Spec<'_>) -> Result<Bridge, Error> {
    let mut bridge = open(socket, sysctls, spec)?;
    let found =
        link::link_by_name(socket, spec.name)?.ok_or_else(|| Error::Vanished(spec.name.to_owned()))?;
    let mtu = spec.mtu.filter(|mtu| *mtu != found.mtu);
    if !found.up || mtu.is_some() {
        let change = LinkChange { up: Some(true), mtu, ..LinkChange::default() };
        socket.request(link::set_link(found.index, spec.name, &change))?;
        bridge.mtu = mtu.unwrap_or(found.mtu);
        bridge.repaired.push(format!("raised bridge {} or set its MTU", spec.name));
    }
    if set_sysctls(sysctls, spec.name)? {
        bridge.repaired.push(format!("set sysctls of bridge {}", spec.name));
    }
    for stale in stale_gateways(&link::addresses(socket, bridge.index)?, spec.blocks) {
        deleted(socket.request(link::delete_address(bridge.index, stale)))?;
        bridge.repaired.push(format!("took gateway {stale} from bridge {}", spec.name));
    }
    for family in Family::ALL {
        for stale in stale_routes(&link::routes(socket, family)?, bridge.index, spec.blocks) {
            deleted(socket.request(link::delete_route(&stale)))?;
            bridge.repaired.push(format!("took route {} from bridge {}", stale.destination, spec.name));
        }
    }
    bridge.repaired.extend(add_gateways(socket, &bridge, spec.blocks)?);
    bridge.repaired.extend(restore_ports(socket, &bridge)?);
    Ok(bridge)
}

/// Fixes the hardware address that the bridge has. One that somebody made without saying any takes that of one of its
/// ports, and another when that port goes; as a gateway it must keep the one that pods know it by.
fn fix_mac(socket: &mut Socket, bridge: &Bridge) -> Result<(), netlink::Error> {
    let keep = LinkChange { mac: bridge.mac, ..LinkChange::default() };
    deleted(socket.request(link::set_link(bridge.index, &bridge.name, &keep))).map(|_| ())
}

/// Finds the bridge, or makes it with its gateways. One that is there is left as it is, as it may carry
/// other pods, but for two things: it is raised if it is down, and learns nothing from frames that go past
/// anti-spoofing ([`Link::learns_from_reserved`]).
pub fn open(socket: &mut Socket, sysctls: &Sysctls, spec: &Spec<'_>) -> Result<Bridge, Error> {
    if let Some(found) = link::link_by_name(socket, spec.name)? {
        return adopt(socket, found);
    }
    let mac = match spec.blocks.first() {
        Some(block) => Mac::for_address(block.gateway(), End::Bridge),
        // Without a gateway nobody needs to know the bridge; its name makes an address of its own.
        None => Mac::for_address(name_address(spec.name), End::Bridge),
    };
    let made = created(socket.request(link::new_bridge(spec.name, mac, spec.mtu)))?;
    let found =
        link::link_by_name(socket, spec.name)?.ok_or_else(|| Error::Vanished(spec.name.to_owned()))?;
    let mut bridge = adopt(socket, found)?;
    if made {
        bridge.repaired.push(format!("created bridge {}", spec.name));
        set_sysctls(sysctls, spec.name)?;
        bridge.repaired.extend(add_gateways(socket, &bridge, spec.blocks)?);
        // Pods that hung on one that somebody deleted.
        bridge.repaired.extend(restore_ports(socket, &bridge)?);
    }
    Ok(bridge)
}

/// Puts back as ports the links of pods that are ports of this bridge by their alias, and of none in truth, and says
/// which: with a bridge that is deleted all its ports stand alone, and their pods are cut off.
fn restore_ports(socket: &mut Socket, bridge: &Bridge) -> Result<Vec<String>, netlink::Error> {
    let links = link::links(socket, Some("veth"))?;
    let (mut messages, mut names) = (Vec::new(), Vec::new());
    for link in links.iter().filter(|link| link.master.is_none()) {
        let alias = link.alias.as_deref().and_then(alias::parse);
        let Some(port) = alias.and_then(|alias| alias.port).filter(|port| port.bridge == bridge.name) else {
            continue;
        };
        // In this order, as the flags are those of a port; and two messages for each, as an ADD sends them.
        let join = LinkChange { bridge: Some(bridge.index), ..LinkChange::default() };
        let flags = LinkChange {
            hairpin: Some(port.hairpin),
            isolated: port.isolated.then_some(true),
            ..LinkChange::default()
        };
        messages.extend([&join, &flags].map(|change| link::set_link(link.index, &link.name, change)));
        names.push(&link.name);
    }
    let mut outcomes = socket.request_each(messages)?.into_iter();
    let mut joined = Vec::new();
    for name in names {
        // One whose pod has just ended is none to put back.
        let both = [outcomes.next(), outcomes.next()].into_iter().flatten().map(deleted);
        if both.collect::<Result<Vec<bool>, _>>()?.into_iter().all(|done| done) {
            joined.push(format!("joined {name} to bridge {} again", bridge.name));
        }
    }
    Ok(joined)
}

fn adopt(socket: &mut Socket, found: Link) -> Result<Bridge, Error> {
    if found.kind.as_deref() != Some("bridge") {
        return Err(Error::NotABridge { name: found.name, kind: found.kind });
    }
    let mut repaired = Vec::new();
    if !found.up || found.learns_from_reserved {
        let change = LinkChange {
            up: Some(true),
            ignore_reserved: found.learns_from_reserved,
            ..LinkChange::default()
        };
        socket.request(link::set_link(found.index, &found.name, &change))?;
    }
    if !found.up {
        repaired.push(format!("raised bridge {}", found.name));
    }
    if found.learns_from_reserved {
        repaired.push(format!("kept bridge {} from learning by reserved addresses", found.name));
    }
    Ok(Bridge { index: found.index, name: found.name, mac: found.mac, mtu: found.mtu, repaired })
}

/// A stand-in address for the hardware address of a bridge without gateway: FNV-1a of its name.
fn name_address(name: &str) -> IpAddr {
    let hash = name.bytes().fold(0x811c_9dc5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    IpAddr::from(hash.to_be_bytes())
}

/// Says whether one had another value.
fn set_sysctls(sysctls: &Sysctls, name: &str) -> Result<bool, Error> {
    let wanted = [
        // A pod must not be able to give the host a default route by a router advertisement.
        ("accept_ra", "0"),
        // The bridge's link-local address is the source of the host's neighbour solicitations for what it
        // forwards. While duplicate address detection runs on it, about a second from the first pod on,
        // pods of one node would not reach each other by IPv6.
        ("accept_dad", "0"),
        // Without it a bridge that goes down loses its IPv6 addresses, and with them every pod its gateway.
        ("keep_addr_on_down", "1"),
    ];
    let mut changed = false;
    for (key, value) in wanted {
        changed |= sysctls.ensure(&format!("ipv6/conf/{name}/{key}"), value)?;
    }
    Ok(changed)
}

/// Gives the bridge the gateway addresses and routes of these blocks that it lacks, and says which. Costs
/// one exchange with the kernel, whether it lacks any or not.
pub fn add_gateways(socket: &mut Socket, bridge: &Bridge, blocks: &[Block]) -> Result<Vec<String>, Error> {
    let gateway = |block: &Block| link::new_address(bridge.index, host_net(block.gateway()), ROUTE_PROTOCOL);
    let routes = block_routes(bridge.index, blocks);
    // Addresses first: the routes name them as source.
    let messages: Vec<Message> =
        blocks.iter().map(gateway).chain(routes.iter().map(link::new_route)).collect();
    let whats: Vec<String> =
        messages.iter().map(|m| format!("{} of bridge {}", m.what(), bridge.name)).collect();
    let mut added = Vec::new();
    for (what, outcome) in whats.into_iter().zip(socket.request_each(messages)?) {
        if created(outcome)? {
            added.push(what);
        }
    }
    if !added.is_empty() {
        fix_mac(socket, bridge)?;
    }
    Ok(added)
}

/// The routes that lead to a node's own blocks: `10.244.3.0/24 dev cni0 proto 112 metric 1120 src
/// 10.244.3.1 scope link`.
pub fn block_routes(bridge: u32, blocks: &[Block]) -> Vec<Route> {
    let route = |block: &Block| Route {
        source: Some(block.gateway()),
        metric: ROUTE_METRIC,
        protocol: ROUTE_PROTOCOL,
        ..Route::new(block.net(), None, bridge)
    };
    blocks.iter().map(route).collect()
}

/// An address as the prefix that holds it alone.
pub fn host_net(address: IpAddr) -> IpNet {
    IpNet::from(address)
}

fn stale_gateways(found: &[Address], blocks: &[Block]) -> Vec<IpNet> {
    let wanted = |net: &IpNet| blocks.iter().any(|b| host_net(b.gateway()) == *net);
    found.iter().filter(|a| a.protocol == ROUTE_PROTOCOL && !wanted(&a.net)).map(|a| a.net).collect()
}

fn stale_routes(found: &[Route], bridge: u32, blocks: &[Block]) -> Vec<Route> {
    let ours = |r: &&Route| r.link == bridge && r.protocol == ROUTE_PROTOCOL && r.metric == ROUTE_METRIC;
    let wanted = |r: &&Route| !blocks.iter().any(|b| b.net() == r.destination);
    found.iter().filter(ours).filter(wanted).cloned().collect()
}

/// Gives a bridge a gateway address with its subnet's prefix, as the reference bridge plugin does for
/// `isGateway`. Any other IPv4 address, and any other IPv6 address whose subnet overlaps, contradicts it:
/// an error, or with `force` removed.
pub fn add_subnet_gateway(
    socket: &mut Socket,
    bridge: &Bridge,
    gateway: IpNet,
    force: bool,
) -> Result<(), Error> {
    let found = link::addresses(socket, bridge.index)?;
    if found.iter().any(|a| a.net == gateway) {
        return Ok(());
    }
    for conflict in conflicts(&found, gateway) {
        if !force {
            return Err(Error::Conflict { name: bridge.name.clone(), found: conflict, wanted: gateway });
        }
        deleted(socket.request(link::delete_address(bridge.index, conflict)))?;
    }
    created(socket.request(link::new_address(bridge.index, gateway, 0)))?;
    Ok(fix_mac(socket, bridge)?)
}

fn conflicts(found: &[Address], wanted: IpNet) -> Vec<IpNet> {
    let contradicts = |net: &IpNet| match (net, wanted) {
        (IpNet::V4(_), IpNet::V4(_)) => true,
        (IpNet::V6(a), IpNet::V6(b)) => a.contains(&b.trunc()) || b.contains(&a.trunc()),
        _ => false,
    };
    found.iter().map(|a| a.net).filter(contradicts).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str, protocol: u8) -> Address {
        Address { link: 3, net: text.parse().unwrap(), tentative: false, duplicate: false, protocol }
    }

    #[test]
    fn only_gateways_of_ours_that_no_block_wants_are_stale() {
        let found = [
            address("10.244.3.1/32", ROUTE_PROTOCOL),
            address("10.244.4.1/32", ROUTE_PROTOCOL),
            address("10.99.0.1/32", 0),
            address("fe80::1/64", 0),
        ];
        let blocks = ["10.244.3.0/24".parse().unwrap()];
        assert_eq!(stale_gateways(&found, &blocks), ["10.244.4.1/32".parse::<IpNet>().unwrap()]);
    }

    #[test]
    fn any_other_ipv4_address_conflicts_but_only_an_overlapping_ipv6_one() {
        let found = [address("10.9.0.1/24", 0), address("fd00:1::1/64", 0), address("fe80::1/64", 0)];
        let conflict = |wanted: &str| conflicts(&found, wanted.parse().unwrap());
        assert_eq!(conflict("10.1.0.1/24"), [found[0].net]);
        assert_eq!(conflict("fd00:2::1/64"), []);
        assert_eq!(conflict("fd00:1::2/60"), [found[1].net]);
    }
}
