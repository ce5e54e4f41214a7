//! Routes of our protocol: read by a filtered dump; added and deleted many at once, replaced one by one.
//!
//! Route and message are translated by pure functions (`write` and `read`). The messages are
//! `rtnetlink`'s, so every layout and number of `linux/rtnetlink.h` is its business; they travel over
//! `plat_cni`'s blocking socket, which keeps the kernel's own words about a refusal. A route that holds
//! anything this agent never writes reads as [`Target::Other`], so it is replaced or removed rather than
//! taken for ours.
//!
//! - Adding is exclusive: the kernel's key is table, prefix and metric, not protocol, so a plain replace
//!   would overwrite an administrator's route.
//! - Replacing is one message, never delete and add: no packet meets a gap (RFC 3549 `NLM_F_REPLACE`).
//! - Deleting names the protocol, so it can hit nothing but ours; "already gone" is success.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use plat_cni::link;
use plat_cni::netlink::{APPEND, CREATE, EXCL, Error, Message, REPLACE, Socket, deleted};
use plat_crds::block::{Block, Family};
use plat_crds::names::{MAIN_TABLE, POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::{DefaultNla, Emitable, NlasIterator, Parseable, ParseableParametrized};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteLwEnCapType, RouteMessage, RouteMetric,
    RouteNextHop, RouteNextHopFlags, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use crate::fabric::{Devices, Hop, OnLink, Route, RouteKey, Target};
use crate::foreign::ForeignRoute;

/// The message of a route; `None` if it leads to a link of ours that is not there, or to what no message can express.
fn write(route: &Route, devices: Devices) -> Option<RouteMessage> {
    let mut message = write_key(&route.key);
    let mut source = route.source;
    message.header.kind = RouteType::Unicast;
    match &route.target {
        Target::Via(hops) => write_hops(&mut message, hops)?,
        Target::Bridge => {
            message.header.scope = RouteScope::Link;
            message.attributes.push(RouteAttribute::Oif(devices.bridge?));
            source = Some(route.key.prefix.gateway());
        }
        Target::Unreachable => {
            (message.header.kind, message.header.scope) = (RouteType::Unreachable, RouteScope::Universe);
        }
        Target::Tunnel { underlay, gateway } => {
            let hop = Hop { on_link: in_tunnel(*gateway), ..Hop::to(*gateway, devices.tunnel(*underlay)?) };
            write_hops(&mut message, &[hop])?;
        }
        Target::Other => return None,
    }
    message.attributes.extend(source.map(|source| RouteAttribute::PrefSource(source.into())));
    let metrics = [
        route.mtu.map(RouteMetric::Mtu),
        route.advmss.map(RouteMetric::Advmss),
        route.initcwnd.map(RouteMetric::InitCwnd),
    ];
    let metrics: Vec<RouteMetric> = metrics.into_iter().flatten().collect();
    message.attributes.extend((!metrics.is_empty()).then_some(RouteAttribute::Metrics(metrics)));
    Some(message)
}

/// Nothing on a VXLAN device tells that the peer is there; of a link-local address nothing needs to.
fn in_tunnel(gateway: IpAddr) -> OnLink {
    if gateway.is_ipv4() { OnLink::Taken } else { OnLink::Proven }
}

/// One hop is told by attributes of the route itself, as the kernel shows it; several by a list.
fn write_hops(message: &mut RouteMessage, hops: &[Hop]) -> Option<()> {
    let led = hops.iter().any(|hop| hop.gateway.is_some());
    message.header.scope = if led { RouteScope::Universe } else { RouteScope::Link };
    let gateway = |hop: &Hop| hop.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into()));
    if let [hop] = hops {
        if hop.on_link == OnLink::Taken {
            message.header.flags |= RouteFlags::Onlink;
        }
        message.attributes.extend(gateway(hop));
        message.attributes.push(RouteAttribute::Oif(hop.device));
        return Some(());
    }
    let several = hops.iter().map(|hop| {
        let mut there = RouteNextHop::default();
        if hop.on_link == OnLink::Taken {
            there.flags |= RouteNextHopFlags::Onlink;
        }
        // The kernel counts from 0.
        there.hops = u8::try_from(hop.weight.checked_sub(1)?).ok()?;
        there.interface_index = hop.device;
        there.attributes.extend(gateway(hop));
        Some(there)
    });
    message.attributes.push(RouteAttribute::MultiPath(several.collect::<Option<_>>()?));
    (!hops.is_empty()).then_some(())
}

fn read_hop(there: &RouteNextHop) -> Option<Hop> {
    let mut gateway = None;
    for attribute in &there.attributes {
        match attribute {
            RouteAttribute::Gateway(address) => gateway = ip(address),
            // An encapsulation, or a router of the other family.
            _ => return None,
        }
    }
    let on_link =
        if there.flags.contains(RouteNextHopFlags::Onlink) { OnLink::Taken } else { OnLink::Proven };
    Some(Hop { gateway, device: there.interface_index, weight: u16::from(there.hops) + 1, on_link })
}

/// A message that names the key, with any type and in any scope: as it stands, what a delete takes.
fn write_key(key: &RouteKey) -> RouteMessage {
    fn keyed<T>(builder: RouteMessageBuilder<T>, key: &RouteKey) -> RouteMessage {
        builder
            .table_id(key.table)
            .priority(key.metric)
            .protocol(RouteProtocol::from(ROUTE_PROTOCOL))
            .kind(RouteType::Unspec)
            .scope(RouteScope::NoWhere)
            .build()
    }
    let length = key.prefix.prefix_length();
    match key.prefix.network() {
        IpAddr::V4(network) => {
            keyed(RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(network, length), key)
        }
        IpAddr::V6(network) => {
            keyed(RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(network, length), key)
        }
    }
}

/// A message for our socket: `flags` as there, `what` it does.
pub(super) fn message(content: &RouteNetlinkMessage, flags: u16, what: String) -> Message {
    let mut bytes = vec![0; content.buffer_len()];
    content.emit(&mut bytes);
    Message::new(content.message_type(), flags, &bytes, what)
}

/// A route message of IPv4 or IPv6. Attributes are read one by one: one that cannot be read stays as it
/// came, as [`RouteAttribute::Other`], and does not hide the rest.
pub(super) fn parse(payload: &[u8]) -> Option<RouteMessage> {
    let header = RouteHeader::parse(payload).ok()?;
    family(&header)?;
    // No encapsulation is read: nothing of ours has one.
    let meaning = (header.address_family, header.kind, RouteLwEnCapType::None);
    let mut message = RouteMessage::default();
    for raw in NlasIterator::new(payload.get(header.buffer_len()..)?).map_while(Result::ok) {
        let attribute = RouteAttribute::parse_with_param(&raw, meaning)
            .or_else(|_| DefaultNla::parse(&raw).map(RouteAttribute::Other));
        message.attributes.push(attribute.ok()?);
    }
    message.header = header;
    Some(message)
}

fn family(header: &RouteHeader) -> Option<Family> {
    match header.address_family {
        AddressFamily::Inet => Some(Family::IPv4),
        AddressFamily::Inet6 => Some(Family::IPv6),
        _ => None,
    }
}

/// A header that says nothing but the family.
fn header(of: Family) -> RouteHeader {
    let address_family = match of {
        Family::IPv4 => AddressFamily::Inet,
        Family::IPv6 => AddressFamily::Inet6,
    };
    RouteHeader { address_family, ..RouteHeader::default() }
}

/// What the attributes of a route say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// `None` if it is everything (`0.0.0.0/0`, `::/0`).
    pub destination: Option<IpAddr>,
    gateway: Option<IpAddr>,
    /// Where there are several.
    hops: Vec<Hop>,
    /// The source address that the route prefers.
    source: Option<IpAddr>,
    device: Option<u32>,
    table: Option<u32>,
    metric: Option<u32>,
    mtu: Option<u32>,
    advmss: Option<u32>,
    initcwnd: Option<u32>,
    /// Whether there is anything else, which no route of ours has.
    foreign: bool,
}

impl Facts {
    pub(super) fn of(message: &RouteMessage) -> Facts {
        let mut facts = Facts::default();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => facts.destination = ip(address),
                RouteAttribute::Gateway(address) => facts.gateway = ip(address),
                RouteAttribute::PrefSource(address) => facts.source = ip(address),
                RouteAttribute::Oif(device) => facts.device = Some(*device),
                RouteAttribute::Table(table) => facts.table = Some(*table),
                RouteAttribute::Priority(metric) => facts.metric = Some(*metric),
                RouteAttribute::MultiPath(hops) => match hops.iter().map(read_hop).collect() {
                    Some(hops) => facts.hops = hops,
                    None => facts.foreign = true,
                },
                RouteAttribute::Metrics(metrics) => {
                    for metric in metrics {
                        match metric {
                            RouteMetric::Mtu(mtu) => facts.mtu = Some(*mtu),
                            RouteMetric::Advmss(advmss) => facts.advmss = Some(*advmss),
                            RouteMetric::InitCwnd(initcwnd) => facts.initcwnd = Some(*initcwnd),
                            _ => facts.foreign = true,
                        }
                    }
                }
                // The kernel adds these by itself.
                RouteAttribute::CacheInfo(_) | RouteAttribute::Preference(_) => {}
                _ => facts.foreign = true,
            }
        }
        facts
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// The address of a prefix of length 0.
fn everything(family: Family) -> IpAddr {
    match family {
        Family::IPv4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::IPv6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The route of a message. `None` for what has no key of ours (a type of service).
pub(super) fn read(message: &RouteMessage, devices: Devices) -> Option<Route> {
    let fixed = &message.header;
    if fixed.tos != 0 {
        return None;
    }
    let facts = Facts::of(message);
    let network = facts.destination.unwrap_or(everything(family(fixed)?));
    let prefix = Block::of(network, fixed.destination_prefix_length)?;
    let table = facts.table.unwrap_or(u32::from(fixed.table));
    let key = RouteKey { table, prefix, metric: facts.metric.unwrap_or(0) };
    let on_link = if fixed.flags.contains(RouteFlags::Onlink) { OnLink::Taken } else { OnLink::Proven };
    let is_tunnel = |family: &Family| facts.device.is_some() && devices.tunnel(*family) == facts.device;
    let tunnel = Family::ALL.into_iter().find(is_tunnel);
    let mut source = facts.source;
    let target = match (fixed.kind, facts.device, facts.gateway, facts.hops.as_slice()) {
        _ if facts.foreign => Target::Other,
        (RouteType::Unreachable, _, None, []) => Target::Unreachable,
        (RouteType::Unicast, Some(device), None, [])
            if Some(device) == devices.bridge && source == Some(prefix.gateway()) =>
        {
            source = None;
            Target::Bridge
        }
        (RouteType::Unicast, Some(device), gateway, []) => match (tunnel, gateway) {
            (Some(underlay), Some(gateway)) if on_link == in_tunnel(gateway) => {
                Target::Tunnel { underlay, gateway }
            }
            _ => Target::via([Hop { gateway, device, weight: 1, on_link }]),
        },
        (RouteType::Unicast, None, None, [_, _, ..]) => Target::via(facts.hops),
        _ => Target::Other,
    };
    Some(Route { key, target, mtu: facts.mtu, advmss: facts.advmss, initcwnd: facts.initcwnd, source })
}

/// All routes of our protocol, in all tables.
pub fn dump(socket: &mut Socket, devices: Devices) -> Result<BTreeMap<RouteKey, Route>, Error> {
    let mut routes = BTreeMap::new();
    for family in Family::ALL {
        let protocol = RouteProtocol::from(ROUTE_PROTOCOL);
        for route in dump_protocol(socket, family, protocol, |message| read(message, devices))? {
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
fn dump_protocol<T>(
    socket: &mut Socket,
    family: Family,
    protocol: RouteProtocol,
    read: impl Fn(&RouteMessage) -> Option<T>,
) -> Result<Vec<T>, Error> {
    let mut filter = RouteMessage::default();
    filter.header = RouteHeader { protocol, ..header(family) };
    let what = format!("list {family} routes of protocol {}", u8::from(protocol));
    let request = message(&RouteNetlinkMessage::GetRoute(filter), 0, what);
    socket.dump(&request, |received| {
        // A kernel without that family answers with the routes of those that it has.
        let message = parse(received.payload).filter(|message| self::family(&message.header) == Some(family));
        read(&message?)
    })
}

/// Routes of the main table that are not Plat's, but for those that every link has by itself (multicast, link-local).
pub fn foreign(socket: &mut Socket) -> Result<Vec<ForeignRoute>, Error> {
    let mut found = BTreeSet::new();
    for family in Family::ALL {
        let mut filter = RouteMessage::default();
        filter.header = RouteHeader { table: RouteHeader::RT_TABLE_MAIN, ..header(family) };
        let request =
            message(&RouteNetlinkMessage::GetRoute(filter), 0, format!("list {family} routes of others"));
        found.extend(socket.dump(&request, |received| read_foreign(&parse(received.payload)?, family))?);
    }
    // Many routes lead over few links.
    let mut names = BTreeMap::new();
    for index in found.iter().filter_map(|(_, device)| *device).collect::<BTreeSet<u32>>() {
        names.insert(index, link::link_by_index(socket, index)?.map(|link| link.name));
    }
    let named = |(route, device): (ForeignRoute, Option<u32>)| {
        let device = device.and_then(|index| names.get(&index)?.clone());
        ForeignRoute { device, ..route }
    };
    Ok(found.into_iter().map(named).collect())
}

/// A route of others, still without the name of its link, and the link's index.
fn read_foreign(message: &RouteMessage, of: Family) -> Option<(ForeignRoute, Option<u32>)> {
    let fixed = &message.header;
    let facts = Facts::of(message);
    let leads = [RouteType::Unicast, RouteType::BlackHole, RouteType::Unreachable, RouteType::Prohibit];
    let protocol = u8::from(fixed.protocol);
    let is_main = facts.table.unwrap_or(u32::from(fixed.table)) == MAIN_TABLE;
    let is_ours = protocol == ROUTE_PROTOCOL || protocol == POD_ROUTE_PROTOCOL;
    let prefix = Block::of(facts.destination?, fixed.destination_prefix_length)?;
    let by_itself = match prefix.network() {
        IpAddr::V4(_) => false,
        IpAddr::V6(network) => network.is_unicast_link_local() || network.is_multicast(),
    };
    let wanted =
        family(fixed) == Some(of) && is_main && !is_ours && !by_itself && leads.contains(&fixed.kind);
    wanted.then_some((ForeignRoute { prefix, device: None, gateway: facts.gateway }, facts.device))
}

/// Interface indexes of the links with IPv6 routes from router advertisements.
pub fn router_advertised(socket: &mut Socket) -> Result<BTreeSet<u32>, Error> {
    let device = |message: &RouteMessage| Facts::of(message).device;
    Ok(dump_protocol(socket, Family::IPv6, RouteProtocol::Ra, device)?.into_iter().collect())
}

/// Routes of other programs that go before ours: to the same prefix, in the same table, by a better metric, and not
/// to the same next hop. Ours, and what goes before it.
pub fn overriding(
    socket: &mut Socket,
    ours: &BTreeMap<RouteKey, Route>,
) -> Result<Vec<(Route, Route)>, Error> {
    let led = ours.values().filter(|route| matches!(route.target, Target::Via(_)));
    let led: BTreeMap<(u32, Block), &Route> = led.map(|r| ((r.key.table, r.key.prefix), r)).collect();
    let families: BTreeSet<Family> = led.keys().map(|(_, prefix)| prefix.family()).collect();
    let mut overriding = Vec::new();
    for family in families {
        let found = dump_protocol(socket, family, RouteProtocol::Unspec, |message| {
            let is_ours = message.header.protocol == RouteProtocol::from(ROUTE_PROTOCOL);
            let route = read(message, Devices::default()).filter(|_| !is_ours)?;
            let own = led.get(&(route.key.table, route.key.prefix))?;
            let goes_before = route.key.metric < own.key.metric && route.target != own.target;
            goes_before.then(|| (Route::clone(own), route))
        })?;
        overriding.extend(found);
    }
    Ok(overriding)
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
    /// The route leads to a link of ours that does not exist.
    #[error("route {0} needs the bridge or a VXLAN device, which does not exist")]
    NoDevice(RouteKey),
    /// The kernel refused it otherwise.
    #[error(transparent)]
    Refused(Error),
}

/// So many messages travel in one go: their answers fit into a socket's default buffer, should all be refused.
const AT_ONCE: usize = 128;

/// Adds routes whose keys no routes of ours have; returns each one's outcome, in order.
pub fn add(socket: &mut Socket, routes: &[Route], devices: Devices) -> Vec<Result<(), SetError>> {
    let mut outcomes = Vec::with_capacity(routes.len());
    for routes in routes.chunks(AT_ONCE) {
        outcomes.extend(add_at_once(socket, routes, devices));
    }
    if !outcomes.iter().any(|outcome| matches!(outcome, Err(SetError::Foreign(_)))) {
        return outcomes;
    }
    // The CNI binary adds the routes of this node's blocks too, if it meets the bridge first.
    let Ok(ours) = dump(socket, devices) else { return outcomes };
    for (route, outcome) in routes.iter().zip(&mut outcomes) {
        match (&*outcome, ours.get(&route.key)) {
            (Err(SetError::Foreign(_)), Some(there)) if there == route => *outcome = Ok(()),
            (Err(SetError::Foreign(_)), Some(_)) => *outcome = replace(socket, route, devices),
            _ => {}
        }
    }
    outcomes
}

fn add_at_once(socket: &mut Socket, routes: &[Route], devices: Devices) -> Vec<Result<(), SetError>> {
    let messages: Option<Vec<Message>> =
        routes.iter().map(|route| set_message(route, devices, EXCL).ok()).collect();
    let answers = messages.and_then(|messages| socket.request_each(messages).ok());
    match answers {
        Some(answers) => {
            answers.into_iter().zip(routes).map(|(a, route)| a.map_err(|e| refusal(route, e))).collect()
        }
        // One has no message, or the socket failed: one by one, so that each has its own words.
        None => routes.iter().map(|route| set(socket, route, devices, EXCL)).collect(),
    }
}

/// Replaces our route of the same key.
///
/// IPv4 has several routes of one key in a row, and the kernel's replace takes the first, which somebody
/// else may have put before ours since (`ip route prepend`). So the new one is put last, and then ours that
/// is there goes: deleting looks at the protocol, and takes the first that fits. IPv6 makes one multipath
/// route of them, which is not ours any more ([`dump`]).
pub fn replace(socket: &mut Socket, route: &Route, devices: Devices) -> Result<(), SetError> {
    if route.key.prefix.family() == Family::IPv6 {
        return set(socket, route, devices, REPLACE);
    }
    match set(socket, route, devices, APPEND) {
        // It is there already, and so is another: if the wrong one goes, the next pass makes it again.
        Ok(()) | Err(SetError::Foreign(_)) => {}
        Err(error) => return Err(error),
    }
    delete(socket, &route.key).map(drop).map_err(SetError::Refused)
}

fn set(socket: &mut Socket, route: &Route, devices: Devices, flags: u16) -> Result<(), SetError> {
    let message = set_message(route, devices, flags)?;
    socket.request(message).map_err(|error| refusal(route, error))
}

fn set_message(route: &Route, devices: Devices, flags: u16) -> Result<Message, SetError> {
    let content = write(route, devices).ok_or(SetError::NoDevice(route.key))?;
    let verb = if flags & EXCL != 0 { "add" } else { "replace" };
    let what = format!("{verb} route {route}");
    Ok(message(&RouteNetlinkMessage::NewRoute(content), flags | CREATE, what))
}

fn refusal(route: &Route, error: Error) -> SetError {
    match error.errno() {
        Some(Errno::EXIST) => SetError::Foreign(route.key),
        Some(Errno::NETUNREACH | Errno::HOSTUNREACH) => SetError::NotOnLink(error),
        _ => SetError::Refused(error),
    }
}

/// Deletes our route of that key; returns whether it was there.
pub fn delete(socket: &mut Socket, key: &RouteKey) -> Result<bool, Error> {
    deleted(socket.request(delete_message(key)))
}

/// Deletes our routes of those keys; returns what was refused.
pub fn delete_all(socket: &mut Socket, keys: &[RouteKey]) -> Vec<(RouteKey, Error)> {
    let mut refused = Vec::new();
    for keys in keys.chunks(AT_ONCE) {
        let answers = match socket.request_each(keys.iter().map(delete_message).collect()) {
            Ok(answers) => answers.into_iter().map(|answer| deleted(answer).map(drop)).collect(),
            Err(_) => keys.iter().map(|key| delete(socket, key).map(drop)).collect::<Vec<_>>(),
        };
        refused.extend(keys.iter().zip(answers).filter_map(|(key, answer)| Some((*key, answer.err()?))));
    }
    refused
}

fn delete_message(key: &RouteKey) -> Message {
    message(&RouteNetlinkMessage::DelRoute(write_key(key)), 0, format!("delete route {key}"))
}

/// How the kernel would send a packet to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To itself.
    Local,
    /// Over that link, without a router.
    Direct(u32),
    /// Through a router behind that link, or not at all.
    Indirect(Option<u32>),
}

/// Asks the kernel for the way to an address.
pub fn way(socket: &mut Socket, to: IpAddr) -> Result<Way, Error> {
    let mut way = Way::Indirect(None);
    let found = get(socket, to, &[], RouteFlags::empty(), |message| {
        let facts = Facts::of(message);
        way = match (message.header.kind, facts.gateway, facts.device) {
            (RouteType::Local, ..) => Way::Local,
            (RouteType::Unicast, None, Some(device)) => Way::Direct(device),
            (RouteType::Unicast, Some(_), device) => Way::Indirect(device),
            _ => Way::Indirect(None),
        };
    })?;
    Ok(if found { way } else { Way::Indirect(None) })
}

/// Whether an address is reached over that link without a router. The route that matches is asked for: for a link
/// without one the kernel would make a way up.
pub fn is_on(socket: &mut Socket, address: IpAddr, device: u32) -> Result<bool, Error> {
    let mut direct = false;
    let by = [RouteAttribute::Oif(device)];
    let found = get(socket, address, &by, RouteFlags::FibMatch, |message| {
        let facts = Facts::of(message);
        direct = message.header.kind == RouteType::Unicast
            && facts.gateway.is_none()
            && facts.device == Some(device);
    })?;
    Ok(found && direct)
}

/// Who else uses a table: a route that is not ours, as text.
pub fn foreign_in(socket: &mut Socket, table: u32) -> Result<Option<String>, Error> {
    for family in Family::ALL {
        let mut filter = RouteMessage::default();
        filter.header = header(family);
        filter.attributes.push(RouteAttribute::Table(table));
        let what = format!("list {family} routes of table {table}");
        let request = message(&RouteNetlinkMessage::GetRoute(filter), 0, what);
        let found = socket.dump(&request, |received| {
            let message = parse(received.payload)?;
            let protocol = u8::from(message.header.protocol);
            let is_of_table = Facts::of(&message).table == Some(table);
            let route =
                read(&message, Devices::default()).filter(|_| is_of_table && protocol != ROUTE_PROTOCOL)?;
            Some(format!("route {} of protocol {protocol}", route.key.prefix))
        });
        match found {
            Ok(found) => match found.into_iter().next() {
                Some(found) => return Ok(Some(found)),
                None => continue,
            },
            // There is no such table yet, or no such family.
            Err(error) if matches!(error.errno(), Some(Errno::NOENT | Errno::AFNOSUPPORT)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// The link by which packets to an address leave; `None` if they do not.
pub fn device(socket: &mut Socket, to: IpAddr) -> Result<Option<u32>, Error> {
    let mut device = None;
    get(socket, to, &[], RouteFlags::empty(), |message| {
        let is_unicast = message.header.kind == RouteType::Unicast;
        device = Facts::of(message).device.filter(|_| is_unicast);
    })?;
    Ok(device)
}

/// The prefix and protocol of the route that the kernel takes to an address; `None` if there is none.
pub fn matching(socket: &mut Socket, to: IpAddr) -> Result<Option<(IpNet, u8)>, Error> {
    let mut matched = None;
    // The route that matched, not a host route made of it.
    get(socket, to, &[], RouteFlags::FibMatch, |message| {
        let network = Facts::of(message).destination.unwrap_or(everything(Family::of(&to)));
        let prefix = IpNet::new(network, message.header.destination_prefix_length).ok();
        matched = prefix.map(|prefix| (prefix, u8::from(message.header.protocol)));
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
        get(socket, nobody, &[], RouteFlags::empty(), |message| gateways.extend(Facts::of(message).gateway))?;
    }
    Ok(gateways)
}

/// Returns whether the kernel has a way at all.
fn get(
    socket: &mut Socket,
    to: IpAddr,
    by: &[RouteAttribute],
    flags: RouteFlags,
    mut each: impl FnMut(&RouteMessage),
) -> Result<bool, Error> {
    let family = Family::of(&to);
    let mut question = RouteMessage::default();
    question.header = RouteHeader { destination_prefix_length: family.bits(), flags, ..header(family) };
    question.attributes.push(RouteAttribute::Destination(to.into()));
    question.attributes.extend_from_slice(by);
    let request = message(&RouteNetlinkMessage::GetRoute(question), 0, format!("look up the way to {to}"));
    let answer = socket.ask(request, |received| {
        if let Some(message) = parse(received.payload) {
            each(&message);
        }
    });
    match answer {
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
    fn payload(message: &RouteMessage) -> Vec<u8> {
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn read_bytes(bytes: &[u8], devices: Devices) -> Option<Route> {
        read(&parse(bytes)?, devices)
    }

    fn devices() -> Devices {
        Devices { bridge: Some(77), tunnel_v4: Some(78), tunnel_v6: Some(79) }
    }

    fn any_route() -> impl Strategy<Value = Route> {
        let v4 = (any::<u32>(), 0u8..=32, any::<u32>()).prop_map(|(n, length, g)| {
            (Block::of(IpAddr::V4(n.into()), length).unwrap(), IpAddr::V4(g.into()))
        });
        let v6 = (any::<u128>(), 0u8..=128, any::<u128>()).prop_map(|(n, length, g)| {
            (Block::of(IpAddr::V6(n.into()), length).unwrap(), IpAddr::V6(g.into()))
        });
        let hop = (2u32..9, 1u16..=256, any::<bool>(), any::<bool>());
        let hops = prop::collection::vec(hop, 1..5);
        let fields = (any::<[Option<u16>; 3]>(), any::<bool>());
        (prop_oneof![v4, v6], any::<u32>(), 1u32..1000, 0usize..7, hops, fields).prop_map(
            |((prefix, gateway), metric, table, kind, hops, ([mtu, advmss, initcwnd], has_source))| {
                let hops = hops.into_iter().map(|(device, weight, has_gateway, taken)| Hop {
                    gateway: has_gateway.then_some(gateway),
                    device,
                    weight,
                    on_link: if taken { OnLink::Taken } else { OnLink::Proven },
                });
                let target = match kind {
                    0 => Target::Bridge,
                    1 => Target::Unreachable,
                    2 => Target::Tunnel { underlay: Family::IPv4, gateway },
                    3 => Target::Tunnel { underlay: Family::IPv6, gateway },
                    4 => Target::via([Hop::to(gateway, 2)]),
                    _ => Target::via(hops),
                };
                let source = Some(gateway).filter(|_| has_source && matches!(target, Target::Via(_)));
                let [mtu, advmss, initcwnd] = [mtu, advmss, initcwnd].map(|bytes| bytes.map(u32::from));
                Route {
                    mtu,
                    advmss,
                    initcwnd,
                    source,
                    ..Route::new(RouteKey { table, prefix, metric }, target)
                }
            },
        )
    }

    proptest! {
        #[test]
        fn a_route_reads_back_as_it_was_written(route in any_route()) {
            let bytes = payload(&write(&route, devices()).unwrap());
            prop_assert_eq!(read_bytes(&bytes, devices()), Some(route));
        }

        #[test]
        fn no_message_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = read_bytes(&bytes, devices());
        }

        #[test]
        fn no_value_of_any_attribute_makes_it_panic_or_hides_the_route(
            route in any_route(),
            kind in 0u16..40,
            value in prop::collection::vec(prop_oneof![0u8..12, any::<u8>()], 0..64),
        ) {
            let mut message = write(&route, devices()).unwrap();
            message.attributes.push(RouteAttribute::Other(DefaultNla::new(kind, value)));
            prop_assert!(parse(&payload(&message)).is_some());
        }
    }

    /// Held against what `ip` sends, so that a change of the library's layouts cannot pass unseen.
    #[test]
    fn a_route_has_the_bytes_that_the_kernel_expects() {
        let key = RouteKey::main("10.244.2.0/24".parse().unwrap(), 1120);
        let gateway = "172.30.0.2".parse().unwrap();
        let route = Route { mtu: Some(1400), ..Route::new(key, Target::via([Hop::to(gateway, 2)])) };
        let number = |n: u32| n.to_ne_bytes().to_vec();
        let attribute = |kind: u16, value: Vec<u8>| {
            let length = u16::try_from(value.len() + 4).unwrap().to_ne_bytes();
            [length.to_vec(), kind.to_ne_bytes().to_vec(), value].concat()
        };
        let expected = [
            // AF_INET, /24, no source, no TOS, the main table, ours, universe, unicast, no flags.
            vec![2, 24, 0, 0, 254, ROUTE_PROTOCOL, 0, 1, 0, 0, 0, 0],
            attribute(1, vec![10, 244, 2, 0]),
            attribute(6, number(1120)),
            attribute(5, vec![172, 30, 0, 2]),
            attribute(4, number(2)),
            attribute(8, attribute(2, number(1400))),
        ];
        assert_eq!(payload(&write(&route, devices()).unwrap()), expected.concat());
        let any_type_and_scope = [2, 24, 0, 0, 254, ROUTE_PROTOCOL, 255, 0, 0, 0, 0, 0];
        assert_eq!(payload(&write_key(&key))[..12], any_type_and_scope);
    }

    #[test]
    fn what_we_never_write_reads_as_other() {
        let key = RouteKey::main("10.244.2.0/24".parse().unwrap(), 1120);
        let gateway = "172.30.0.2".parse().unwrap();
        let plain = write(&Route::new(key, Target::via([Hop::to(gateway, 2)])), devices()).unwrap();
        let with = |extra: RouteAttribute| {
            let mut message = plain.clone();
            message.attributes.push(extra);
            payload(&message)
        };

        let window = with(RouteAttribute::Metrics(vec![RouteMetric::Window(100)]));
        let unknown = with(RouteAttribute::Other(DefaultNla::new(99, vec![1])));
        let unreadable_metrics = with(RouteAttribute::Other(DefaultNla::new(8, vec![1])));
        let unreadable_encapsulation = with(RouteAttribute::Other(DefaultNla::new(22, vec![255; 3])));
        let mut encapsulated = RouteNextHop::default();
        encapsulated.attributes.push(RouteAttribute::Other(DefaultNla::new(22, vec![1])));
        let mut several = write_key(&key);
        several.header.kind = RouteType::Unicast;
        several.attributes.push(RouteAttribute::MultiPath(vec![RouteNextHop::default(), encapsulated]));
        for bytes in [window, unknown, unreadable_metrics, unreadable_encapsulation, payload(&several)] {
            let route = read_bytes(&bytes, devices()).unwrap();
            assert_eq!((route.key, route.target), (key, Target::Other));
        }
        let mut with_tos = plain.clone();
        with_tos.header.tos = 4;
        let why = "the kernel keys by type of service too, and we set none";
        assert_eq!(read_bytes(&payload(&with_tos), devices()), None, "{why}");
    }
}
