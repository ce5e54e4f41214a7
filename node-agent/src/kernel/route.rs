//! Routes of our protocol: read by a filtered dump, added, replaced and deleted one by one.
//!
//! Route and message are translated by pure functions ([`write`] and [`read`]; `linux/rtnetlink.h`). A
//! route that holds anything this agent never writes reads as [`Target::Other`], so it is replaced or
//! removed rather than taken for ours.
//!
//! - Adding is exclusive: the kernel's key is table, prefix and metric, not protocol, so a plain replace
//!   would overwrite an administrator's route.
//! - Replacing is one message, never delete and add: no packet meets a gap (RFC 3549 `NLM_F_REPLACE`).
//! - Deleting names the protocol, so it can hit nothing but ours; "already gone" is success.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use plat_cni::netlink::{Attributes, CREATE, EXCL, Error, Message, REPLACE, Received, Socket, deleted};
use plat_crds::block::{Block, Family};
use plat_crds::names::ROUTE_PROTOCOL;

use crate::fabric::{Route, RouteKey, Target};

const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;

/// Length of `rtmsg`.
pub(super) const HEADER: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_CACHEINFO: u16 = 12;
const RTA_TABLE: u16 = 15;
const RTA_PREF: u16 = 20;
const RTAX_MTU: u16 = 2;

const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
/// Any scope, in a delete.
const SCOPE_NOWHERE: u8 = 255;
const TYPE_UNICAST: u8 = 1;
const TYPE_LOCAL: u8 = 2;
const TYPE_UNREACHABLE: u8 = 7;
/// Routes that the kernel learnt from IPv6 router advertisements (`RTPROT_RA`).
pub(super) const PROTOCOL_RA: u8 = 9;
/// In a get: answer with the route that matched, not with a host route.
const FLAG_FIB_MATCH: u32 = 0x2000;
/// A next hop that is taken to be on the link without proof; we never set it.
const FLAG_ONLINK: u32 = 4;

/// The fixed part of a route message (`struct rtmsg`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub family: Family,
    pub destination_length: u8,
    pub tos: u8,
    pub table: u8,
    pub protocol: u8,
    pub scope: u8,
    pub kind: u8,
    pub flags: u32,
}

impl Header {
    pub(super) fn read(payload: &[u8]) -> Option<Header> {
        let &[family, destination_length, _source_length, tos, table, protocol, scope, kind, a, b, c, d] =
            payload.get(..HEADER)?
        else {
            return None;
        };
        let family = match family {
            AF_INET => Family::IPv4,
            AF_INET6 => Family::IPv6,
            _ => return None,
        };
        let flags = u32::from_ne_bytes([a, b, c, d]);
        Some(Header { family, destination_length, tos, table, protocol, scope, kind, flags })
    }

    fn bytes(self) -> [u8; HEADER] {
        let [a, b, c, d] = self.flags.to_ne_bytes();
        let family = family_number(self.family);
        let Header { destination_length, tos, table, protocol, scope, kind, .. } = self;
        [family, destination_length, 0, tos, table, protocol, scope, kind, a, b, c, d]
    }
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The family's number in messages (`AF_INET`, `AF_INET6`).
pub(super) fn family_number(family: Family) -> u8 {
    match family {
        Family::IPv4 => AF_INET,
        Family::IPv6 => AF_INET6,
    }
}

fn header(family: Family) -> Header {
    Header {
        family,
        destination_length: 0,
        tos: 0,
        table: 0,
        protocol: 0,
        scope: SCOPE_UNIVERSE,
        kind: 0,
        flags: 0,
    }
}

/// An attribute: its type and value.
type Attribute = (u16, Vec<u8>);

/// The fixed part and the attributes of a route. `bridge` is the index of the pods' bridge; `None` for a
/// target that no message can express.
fn write(route: &Route, bridge: Option<u32>) -> Option<(Header, Vec<Attribute>)> {
    let (kind, scope, device, gateway) = match &route.target {
        Target::Via { gateway, device } => (TYPE_UNICAST, SCOPE_UNIVERSE, Some(*device), Some(*gateway)),
        Target::Bridge => (TYPE_UNICAST, SCOPE_LINK, Some(bridge?), None),
        Target::Unreachable => (TYPE_UNREACHABLE, SCOPE_UNIVERSE, None, None),
        Target::Other => return None,
    };
    let (fixed, mut attributes) = write_key(&route.key);
    attributes.extend(gateway.map(|gateway| (RTA_GATEWAY, octets(gateway))));
    attributes.extend(device.map(|device| (RTA_OIF, number(device))));
    if route.target == Target::Bridge {
        attributes.push((RTA_PREFSRC, octets(route.key.prefix.gateway())));
    }
    attributes.extend(route.mtu.map(|mtu| (RTA_METRICS, encode(&[(RTAX_MTU, number(mtu))]))));
    Some((Header { kind, scope, ..fixed }, attributes))
}

fn write_key(key: &RouteKey) -> (Header, Vec<Attribute>) {
    let fixed = Header {
        destination_length: key.prefix.prefix_length(),
        protocol: ROUTE_PROTOCOL,
        ..header(key.family())
    };
    let attributes = vec![
        (RTA_DST, octets(key.prefix.network())),
        (RTA_PRIORITY, number(key.metric)),
        (RTA_TABLE, number(key.table)),
    ];
    (fixed, attributes)
}

/// Attributes whose values are whole words, one behind the other.
fn encode(attributes: &[Attribute]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (kind, value) in attributes {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(value);
    }
    bytes
}

fn number(value: u32) -> Vec<u8> {
    value.to_ne_bytes().to_vec()
}

fn message(kind: u16, flags: u16, fixed: Header, attributes: &[Attribute], what: String) -> Message {
    let mut message = Message::new(kind, flags, &fixed.bytes(), what);
    message.raw(&encode(attributes));
    message
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// An address attribute of that family.
pub(super) fn address(family: Family, value: &[u8]) -> Option<IpAddr> {
    match family {
        Family::IPv4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        Family::IPv6 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
    }
}

/// The route of a message. `None` for what has no key of ours (a type of service, a copied cache entry).
pub(super) fn read(payload: &[u8], bridge: Option<u32>) -> Option<Route> {
    let fixed = Header::read(payload)?;
    if fixed.tos != 0 {
        return None;
    }
    let attributes = Attributes::behind(payload, HEADER);
    let value = |kind| attributes.find(kind).and_then(|a| a.u32());
    let at = |kind| attributes.find(kind).and_then(|a| address(fixed.family, a.value));
    let network =
        at(RTA_DST).or_else(|| address(fixed.family, &[0; 16][..usize::from(fixed.family.bits() / 8)]));
    let prefix = Block::of(network?, fixed.destination_length)?;
    let table = value(RTA_TABLE).unwrap_or(u32::from(fixed.table));
    let key = RouteKey { table, prefix, metric: value(RTA_PRIORITY).unwrap_or(0) };

    let (mtu, plain_metrics) = read_metrics(&attributes);
    let expected = [
        RTA_DST,
        RTA_OIF,
        RTA_GATEWAY,
        RTA_PRIORITY,
        RTA_PREFSRC,
        RTA_METRICS,
        RTA_CACHEINFO,
        RTA_TABLE,
        RTA_PREF,
    ];
    let plain = plain_metrics
        && fixed.flags & FLAG_ONLINK == 0
        && attributes.clone().all(|attribute| expected.contains(&attribute.kind));
    let target = match (fixed.kind, at(RTA_GATEWAY), value(RTA_OIF), at(RTA_PREFSRC)) {
        _ if !plain => Target::Other,
        (TYPE_UNREACHABLE, None, _, None) => Target::Unreachable,
        (TYPE_UNICAST, Some(gateway), Some(device), None) => Target::Via { gateway, device },
        (TYPE_UNICAST, None, device @ Some(_), Some(source))
            if device == bridge && source == prefix.gateway() =>
        {
            Target::Bridge
        }
        _ => Target::Other,
    };
    Some(Route { key, target, mtu })
}

/// The MTU among a route's metrics, and whether nothing else is there.
fn read_metrics(attributes: &Attributes<'_>) -> (Option<u32>, bool) {
    let Some(metrics) = attributes.find(RTA_METRICS) else { return (None, true) };
    let mtu = metrics.nested().find(RTAX_MTU).and_then(|a| a.u32());
    (mtu, metrics.nested().all(|metric| metric.kind == RTAX_MTU))
}

/// All routes of our protocol, in all tables.
pub fn dump(socket: &mut Socket, bridge: Option<u32>) -> Result<BTreeMap<RouteKey, Route>, Error> {
    let mut routes = BTreeMap::new();
    for family in Family::ALL {
        for route in dump_protocol(socket, family, ROUTE_PROTOCOL, |received| read(received.payload, bridge))?
        {
            routes
                .entry(route.key)
                // Several next hops of one IPv6 prefix and metric: nothing of ours.
                .and_modify(|there: &mut Route| there.target = Target::Other)
                .or_insert(route);
        }
    }
    Ok(routes)
}

/// Reads the routes of one family and protocol; the kernel does the filtering.
pub(super) fn dump_protocol<T>(
    socket: &mut Socket,
    family: Family,
    protocol: u8,
    read: impl FnMut(Received<'_>) -> Option<T>,
) -> Result<Vec<T>, Error> {
    let fixed = Header { protocol, ..header(family) };
    let what = format!("list {family} routes of protocol {protocol}");
    socket.dump(&Message::new(GET_ROUTE, 0, &fixed.bytes(), what), read)
}

/// Interface indexes of the links with IPv6 routes from router advertisements.
pub fn router_advertised(socket: &mut Socket) -> Result<Vec<u32>, Error> {
    dump_protocol(socket, Family::IPv6, PROTOCOL_RA, |received| {
        Attributes::behind(received.payload, HEADER).find(RTA_OIF)?.u32()
    })
}

/// Why a route could not be set.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// The key belongs to a route of another protocol.
    #[error("another program has a route to {0}; remove it, or set another spec.routing.metric")]
    Foreign(RouteKey),
    /// The gateway is not on the link.
    #[error("{0}: the next hop is not on a link of this node; set spec.routing.nextHop or spec.routing.mode")]
    NotOnLink(Error),
    /// The route leads to a bridge that does not exist.
    #[error("route {0} needs the bridge, which does not exist")]
    NoBridge(RouteKey),
    /// The kernel refused it otherwise.
    #[error(transparent)]
    Refused(Error),
}

/// Adds a route whose key no route of ours has.
pub fn add(socket: &mut Socket, route: &Route, bridge: Option<u32>) -> Result<(), SetError> {
    match set(socket, route, bridge, EXCL) {
        Err(SetError::Foreign(key)) => {
            // The CNI binary adds the routes of this node's blocks too, if it meets the bridge first.
            let ours = dump(socket, bridge).map_err(SetError::Refused)?;
            match ours.get(&key) {
                Some(there) if there == route => Ok(()),
                Some(_) => replace(socket, route, bridge),
                None => Err(SetError::Foreign(key)),
            }
        }
        outcome => outcome,
    }
}

/// Replaces our route of the same key.
pub fn replace(socket: &mut Socket, route: &Route, bridge: Option<u32>) -> Result<(), SetError> {
    set(socket, route, bridge, REPLACE)
}

fn set(socket: &mut Socket, route: &Route, bridge: Option<u32>, flags: u16) -> Result<(), SetError> {
    use rustix::io::Errno;
    let (fixed, attributes) = write(route, bridge).ok_or(SetError::NoBridge(route.key))?;
    let verb = if flags & REPLACE != 0 { "replace" } else { "add" };
    let what = format!("{verb} route {route}");
    let answer = socket.request(message(NEW_ROUTE, flags | CREATE, fixed, &attributes, what));
    answer.map_err(|error| match error.errno() {
        Some(Errno::EXIST) => SetError::Foreign(route.key),
        Some(Errno::NETUNREACH | Errno::HOSTUNREACH) => SetError::NotOnLink(error),
        _ => SetError::Refused(error),
    })
}

/// Deletes our route of that key; returns whether it was there.
pub fn delete(socket: &mut Socket, key: &RouteKey) -> Result<bool, Error> {
    let (fixed, attributes) = write_key(key);
    let fixed = Header { scope: SCOPE_NOWHERE, ..fixed };
    deleted(socket.request(message(DELETE_ROUTE, 0, fixed, &attributes, format!("delete route {key}"))))
}

/// How the kernel would send a packet to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To itself.
    Local,
    /// Over that link, without a router.
    Direct(u32),
    /// Through a router, or not at all.
    Indirect,
}

/// Asks the kernel for the way to an address.
pub fn way(socket: &mut Socket, to: IpAddr) -> Result<Way, Error> {
    let mut way = Way::Indirect;
    let found = get(socket, to, 0, |received| {
        let Some(fixed) = Header::read(received.payload) else { return };
        let attributes = Attributes::behind(received.payload, HEADER);
        let device = attributes.find(RTA_OIF).and_then(|a| a.u32());
        way = match (fixed.kind, attributes.find(RTA_GATEWAY), device) {
            (TYPE_LOCAL, ..) => Way::Local,
            (TYPE_UNICAST, None, Some(device)) => Way::Direct(device),
            _ => Way::Indirect,
        };
    })?;
    Ok(if found { way } else { Way::Indirect })
}

/// The prefix and protocol of the route that the kernel takes to an address; `None` if there is none.
pub fn matching(socket: &mut Socket, to: IpAddr) -> Result<Option<(IpNet, u8)>, Error> {
    let mut matched = None;
    get(socket, to, FLAG_FIB_MATCH, |received| {
        matched = Header::read(received.payload).and_then(|fixed| {
            let network = Attributes::behind(received.payload, HEADER).find(RTA_DST);
            let network = match network {
                Some(attribute) => address(fixed.family, attribute.value)?,
                None => address(fixed.family, &[0; 16][..usize::from(fixed.family.bits() / 8)])?,
            };
            Some((IpNet::new(network, fixed.destination_length).ok()?, fixed.protocol))
        });
    })?;
    Ok(matched)
}

/// Whether a packet to that address goes by a route that is not our `unreachable` one for `range`, nor
/// would be if there were one: by a longer prefix, or by the same prefix of somebody else.
pub fn is_covered(socket: &mut Socket, to: IpAddr, range: &Block) -> Result<bool, Error> {
    Ok(match matching(socket, to)? {
        Some((prefix, _)) if prefix.prefix_len() > range.prefix_length() => true,
        Some((prefix, protocol)) => prefix == range.net() && protocol != ROUTE_PROTOCOL,
        None => false,
    })
}

/// The routers to which everything without a more specific route goes, found by asking for the way to
/// addresses that nobody has (TEST-NET-1, RFC 5737; the documentation prefix, RFC 3849).
pub fn default_gateways(socket: &mut Socket) -> Result<Vec<IpAddr>, Error> {
    let mut gateways = Vec::new();
    for nobody in [IpAddr::from([192, 0, 2, 1]), IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1])] {
        get(socket, nobody, 0, |received| {
            let gateway = Attributes::behind(received.payload, HEADER).find(RTA_GATEWAY);
            gateways.extend(gateway.and_then(|gateway| address(Family::of(&nobody), gateway.value)));
        })?;
    }
    Ok(gateways)
}

/// Returns whether the kernel has a way at all.
fn get(socket: &mut Socket, to: IpAddr, flags: u32, each: impl FnMut(Received<'_>)) -> Result<bool, Error> {
    use rustix::io::Errno;
    let family = Family::of(&to);
    let fixed = Header { destination_length: family.bits(), flags, ..header(family) };
    let what = format!("look up the way to {to}");
    match socket.ask(message(GET_ROUTE, 0, fixed, &[(RTA_DST, octets(to))], what), each) {
        Ok(()) => Ok(true),
        Err(error) => match error.errno() {
            // No route, or one that says unreachable, prohibit or blackhole.
            Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ACCESS | Errno::INVAL) => Ok(false),
            // No such family in this kernel.
            Some(Errno::AFNOSUPPORT | Errno::OPNOTSUPP) => Ok(false),
            _ => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What follows the netlink header of a message.
    fn payload((fixed, attributes): (Header, Vec<Attribute>)) -> Vec<u8> {
        let mut bytes = fixed.bytes().to_vec();
        bytes.extend(encode(&attributes));
        bytes
    }

    fn any_route() -> impl Strategy<Value = Route> {
        let v4 = (any::<u32>(), 0u8..=32, any::<u32>()).prop_map(|(n, length, g)| {
            (Block::of(IpAddr::V4(n.into()), length).unwrap(), IpAddr::V4(g.into()))
        });
        let v6 = (any::<u128>(), 0u8..=128, any::<u128>()).prop_map(|(n, length, g)| {
            (Block::of(IpAddr::V6(n.into()), length).unwrap(), IpAddr::V6(g.into()))
        });
        (prop_oneof![v4, v6], any::<u32>(), 1u32..1000, 0usize..3, prop::option::of(576u32..65_536), 2u32..9)
            .prop_map(|((prefix, gateway), metric, table, target, mtu, device)| Route {
                key: RouteKey { table, prefix, metric },
                target: [Target::Via { gateway, device }, Target::Bridge, Target::Unreachable][target]
                    .clone(),
                mtu,
            })
    }

    proptest! {
        #[test]
        fn a_route_reads_back_as_it_was_written(route in any_route()) {
            let bytes = payload(write(&route, Some(77)).unwrap());
            prop_assert_eq!(read(&bytes, Some(77)), Some(route));
        }

        #[test]
        fn no_message_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = read(&bytes, Some(3));
        }
    }

    #[test]
    fn what_we_never_write_reads_as_other() {
        let key = RouteKey::main("10.244.2.0/24".parse().unwrap(), 1120);
        let gateway = "172.30.0.2".parse().unwrap();
        let plain = Route { key, target: Target::Via { gateway, device: 2 }, mtu: None };
        let (fixed, attributes) = write(&plain, None).unwrap();
        let with = |extra: Attribute| payload((fixed, attributes.iter().cloned().chain([extra]).collect()));

        let preferred_source = with((RTA_PREFSRC, vec![10, 0, 0, 1]));
        let window = with((RTA_METRICS, encode(&[(3, number(100))])));
        let onlink = payload((Header { flags: FLAG_ONLINK, ..fixed }, attributes.clone()));
        let (to_device, _) = write_key(&key);
        let device_alone = [(RTA_DST, vec![10, 244, 2, 0]), (RTA_OIF, number(5))].to_vec();
        let other_device = payload((Header { kind: TYPE_UNICAST, ..to_device }, device_alone));
        for bytes in [preferred_source, window, onlink, other_device] {
            assert_eq!(read(&bytes, Some(9)).unwrap().target, Target::Other);
        }
        let with_tos = payload((Header { tos: 4, ..fixed }, attributes));
        assert_eq!(read(&with_tos, None), None, "the kernel keys by type of service too, and we set none");
    }
}
