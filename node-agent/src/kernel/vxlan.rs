//! VXLAN devices and their tables: written and read by rtnetlink over `plat_cni`'s blocking socket.
//!
//! Messages are made and read by pure functions. A device is found by its name; one with our name that is no VXLAN
//! device is somebody else's and left alone. Nothing is read of a device's underlay family, as the kernel does not
//! say it: the name does.
//!
//! - The outer packets may be split on their way (`df unset`, the kernel's default): routes and devices have the
//!   right MTU, and where a path is narrower unexpectedly, a forwarded packet that may not be split would be lost
//!   without a word to its sender.
//! - UDP checksums are on, the kernel's default: the tunnel may cross routers, and network cards do the work.
//! - An IPv6 link-local address would only make noise that nobody hears.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;

use ipnet::IpNet;
use plat_cni::link::{self, LinkChange};
use plat_cni::mac::Mac;
use plat_cni::netlink::{
    Attributes, CREATE, EXCL, Error as Netlink, Message, REPLACE, Received, Socket, deleted, octets,
    to_address,
};
use plat_crds::block::Family;
use plat_crds::names::ROUTE_PROTOCOL;
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;

use super::host::View;
use crate::fabric::host_prefix;
use crate::vxlan::{Device, Entries, Network, ObservedTunnel, name};

const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const NEW_NEIGHBOUR: u16 = 28;
const DELETE_NEIGHBOUR: u16 = 29;
const GET_NEIGHBOUR: u16 = 30;

const LINK_HEADER: usize = 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;

/// `IFLA_VXLAN_*` of `linux/if_link.h`.
const VXLAN_ID: u16 = 1;
const VXLAN_GROUP: u16 = 2;
const VXLAN_LINK: u16 = 3;
const VXLAN_LOCAL: u16 = 4;
const VXLAN_LEARNING: u16 = 7;
const VXLAN_PORT: u16 = 15;
const VXLAN_GROUP6: u16 = 16;
const VXLAN_LOCAL6: u16 = 17;
const VXLAN_COLLECT_METADATA: u16 = 25;

const AF_BRIDGE: u8 = 7;
const NTF_SELF: u8 = 2;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NEIGHBOUR_HEADER: usize = 12;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_PORT: u16 = 6;
const NDA_VNI: u16 = 7;
const NDA_IFINDEX: u16 = 8;

/// The kernel answers each message, and all answers to one sending must find room in the socket.
const AT_ONCE: usize = 64;

/// Why there is no such device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something else has the name.
    #[error("link {name} exists and is {kind}, not a VXLAN device; remove or rename it")]
    NotVxlan {
        /// The name.
        name: &'static str,
        /// What it is.
        kind: String,
    },
    /// Another device has the network identifier.
    #[error(
        "another VXLAN device of this node has VNI {} and port {}; remove it if it is left over from another network, else set another vxlan.vni in the chart's values", .0.vni, .0.port
    )]
    SameNetwork(Network),
    /// The port is taken.
    #[error(
        "UDP port {} is taken by another program, or by a VXLAN device with other settings; set another vxlan.port in the chart's values", .0.port
    )]
    PortTaken(Network),
    /// The kernel has no VXLAN.
    #[error(
        "this node's kernel has no VXLAN; load the module (modprobe vxlan), or give the blocks another routing mode than VXLAN"
    )]
    NoVxlan,
    /// It was deleted while we worked on it.
    #[error("device {0} was deleted meanwhile")]
    Vanished(&'static str),
    /// The kernel refused it otherwise.
    #[error(transparent)]
    Netlink(#[from] Netlink),
}

/// The devices of our names, by the family of their underlay.
pub fn observe(socket: &mut Socket, view: &View) -> Result<BTreeMap<Family, ObservedTunnel>, Netlink> {
    let mut tunnels = BTreeMap::new();
    for underlay in Family::ALL {
        tunnels.extend(observe_one(socket, view, underlay)?.map(|found| (underlay, found)));
    }
    Ok(tunnels)
}

fn observe_one(
    socket: &mut Socket,
    view: &View,
    underlay: Family,
) -> Result<Option<ObservedTunnel>, Netlink> {
    let Some(mut found) = find(socket, underlay)? else { return Ok(None) };
    let own = view.addresses.iter().filter(|own| own.device == found.index);
    found.addresses = own.map(|own| own.address).collect();
    let mut get =
        Message::new(GET_NEIGHBOUR, 0, &header(AF_BRIDGE, found.index, 0, 0), "list forwarding entries");
    let mut forwarding: BTreeMap<Mac, Option<IpAddr>> = BTreeMap::new();
    for entry in socket.dump(&get, |received| read_entry(&received))? {
        let Some(mac) = entry.mac.filter(|_| entry.link == found.index) else { continue };
        let ours = entry.address.filter(|_| entry.is_permanent && !entry.has_more);
        // Several destinations are not ours.
        forwarding.entry(mac).and_modify(|there| *there = None).or_insert(ours);
    }
    for (mac, address) in forwarding {
        match address {
            Some(address) => drop(found.entries.forwarding.insert(mac, address)),
            None => drop(found.strange.insert(mac)),
        }
    }
    get = Message::new(GET_NEIGHBOUR, 0, &header(0, 0, 0, 0), "list neighbours");
    get.attr_u32(NDA_IFINDEX, found.index);
    for entry in socket.dump(&get, |received| read_entry(&received))? {
        if let (true, Some(address), Some(mac)) = (entry.is_permanent, entry.address, entry.mac)
            && entry.link == found.index
        {
            found.entries.neighbours.insert(address, mac);
        }
    }
    Ok(Some(found))
}

/// The device without its addresses and entries.
fn find(socket: &mut Socket, underlay: Family) -> Result<Option<ObservedTunnel>, Netlink> {
    let mut get = Message::new(GET_LINK, 0, &[0; LINK_HEADER], format!("look up link {}", name(underlay)));
    get.attr_str(IFLA_IFNAME, name(underlay));
    let mut found = None;
    match socket.ask(get, |received| found = found.take().or_else(|| read_device(&received))) {
        Err(error) if error.errno() == Some(Errno::NODEV) => Ok(None),
        Err(error) => Err(error),
        Ok(()) => Ok(found),
    }
}

/// Reads a link; `None` if it is no VXLAN device.
fn read_device(received: &Received<'_>) -> Option<ObservedTunnel> {
    const IFF_UP: u32 = 1;
    let flags = u32::from_ne_bytes(received.payload.get(8..12)?.try_into().ok()?);
    let attributes = Attributes::behind(received.payload, LINK_HEADER);
    let info = attributes.find(IFLA_LINKINFO)?.nested();
    if received.kind != NEW_LINK || info.find(INFO_KIND)?.text() != "vxlan" {
        return None;
    }
    let data = info.find(INFO_DATA)?.nested();
    let has = |kind| data.find(kind).is_some();
    let is_set = |kind| data.find(kind).and_then(|value| value.u8()).is_some_and(|value| value != 0);
    let bound = [VXLAN_GROUP, VXLAN_GROUP6, VXLAN_LOCAL, VXLAN_LOCAL6, VXLAN_LINK].into_iter().any(has);
    let ours = !bound && !is_set(VXLAN_LEARNING) && !is_set(VXLAN_COLLECT_METADATA);
    let port = || Some(u16::from_be_bytes(data.find(VXLAN_PORT)?.value.try_into().ok()?));
    let network = || Some(Network { vni: data.find(VXLAN_ID)?.u32()?, port: port()? });
    Some(ObservedTunnel {
        index: link_of(received.payload)?,
        network: network().filter(|_| ours),
        up: flags & IFF_UP != 0,
        mac: Mac(attributes.find(IFLA_ADDRESS)?.value.try_into().ok()?),
        mtu: attributes.find(IFLA_MTU)?.u32()?,
        addresses: BTreeSet::new(),
        entries: Entries::default(),
        strange: BTreeSet::new(),
    })
}

/// `ndmsg`.
fn header(family: u8, link: u32, state: u16, flags: u8) -> Vec<u8> {
    let mut header = vec![family, 0, 0, 0];
    header.extend_from_slice(&link.to_ne_bytes());
    header.extend_from_slice(&state.to_ne_bytes());
    header.extend_from_slice(&[flags, 0]);
    header
}

/// A neighbour, or an entry of a forwarding table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    link: u32,
    is_permanent: bool,
    address: Option<IpAddr>,
    mac: Option<Mac>,
    /// Whether it says more than ours do: another port, network or link.
    has_more: bool,
}

fn read_entry(received: &Received<'_>) -> Option<Entry> {
    if received.kind != NEW_NEIGHBOUR {
        return None;
    }
    let payload = received.payload;
    let state = u16::from_ne_bytes(payload.get(8..10)?.try_into().ok()?);
    let attributes = Attributes::behind(payload, NEIGHBOUR_HEADER);
    let has = |kind| attributes.find(kind).is_some();
    Some(Entry {
        link: link_of(payload)?,
        is_permanent: state & NUD_PERMANENT != 0,
        address: attributes.find(NDA_DST).and_then(|dst| to_address(dst.value)),
        mac: attributes.find(NDA_LLADDR).and_then(|mac| mac.value.try_into().ok()).map(Mac),
        has_more: [NDA_PORT, NDA_VNI, NDA_IFINDEX].into_iter().any(has),
    })
}

/// Interface indices of the devices with our names, kept by what the kernel tells of links. Pure but for
/// [`Indices::look_up`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indices(BTreeSet<u32>);

impl Indices {
    /// Those that are there now, in the namespace of this socket.
    pub fn look_up(socket: &OwnedFd) -> Indices {
        let index = |underlay| name_to_index(socket, name(underlay)).ok();
        Indices(Family::ALL.into_iter().filter_map(index).collect())
    }

    /// Takes in that a link is there, or has another name.
    pub fn learn(&mut self, link: &[u8]) {
        let Some(index) = link_of(link) else { return };
        let Some(title) = Attributes::behind(link, LINK_HEADER).find(IFLA_IFNAME) else { return };
        if Family::ALL.into_iter().any(|underlay| title.text() == name(underlay)) {
            self.0.insert(index);
        } else {
            self.0.remove(&index);
        }
    }

    /// Takes in that a link is gone. A bridge says it (`AF_BRIDGE`) of links that are no ports of it any more.
    pub fn forget(&mut self, link: &[u8]) {
        if let Some(index) = link_of(link).filter(|_| link.first() != Some(&AF_BRIDGE)) {
            self.0.remove(&index);
        }
    }

    /// Whether a neighbour or forwarding entry is of one of them.
    pub fn concerns(&self, entry: &[u8]) -> bool {
        link_of(entry).is_some_and(|index| self.0.contains(&index))
    }
}

/// The interface index, at the same place in `ifinfomsg` and `ndmsg`.
fn link_of(payload: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(payload.get(4..8)?.try_into().ok()?))
}

/// The request for a new device, down.
fn new_device(device: &Device) -> Message {
    let what = format!("create {device}");
    let mut message = Message::new(NEW_LINK, CREATE | EXCL, &[0; LINK_HEADER], what);
    message.attr_str(IFLA_IFNAME, name(device.underlay)).attr(IFLA_ADDRESS, &device.mac.0);
    message.attr_u32(IFLA_MTU, device.mtu);
    message.nest(IFLA_LINKINFO, |info| {
        info.attr(INFO_KIND, b"vxlan").nest(INFO_DATA, |data| {
            data.attr_u32(VXLAN_ID, device.network.vni);
            data.attr(VXLAN_PORT, &device.network.port.to_be_bytes());
            data.attr_u8(VXLAN_LEARNING, 0);
            // Any address: what it says is the family.
            if device.underlay == Family::IPv6 {
                data.attr(VXLAN_LOCAL6, &Ipv6Addr::UNSPECIFIED.octets());
            }
        });
    });
    message
}

/// A device that is there now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ensured {
    /// Interface index.
    pub index: u32,
    /// What had to be done, in words.
    pub done: Vec<String>,
}

/// Makes the device exactly so. One of our name that cannot become so is removed first, with all that leads to it.
pub fn ensure(socket: &mut Socket, device: &Device) -> Result<Ensured, Error> {
    let mut done = Vec::new();
    let title = name(device.underlay);
    let mut there = find(socket, device.underlay)?;
    if let Some(other) = there.take_if(|there| there.network != Some(device.network)) {
        deleted(socket.request(link::delete_link(other.index, title)))?;
        done.push(format!("removed {title}, which was another VXLAN device"));
    }
    let there = match there {
        Some(there) => there,
        None => {
            create(socket, device)?;
            done.push(format!("created {device}"));
            find(socket, device.underlay)?.ok_or(Error::Vanished(title))?
        }
    };
    let change = LinkChange {
        mac: (there.mac != device.mac).then_some(device.mac),
        mtu: (there.mtu != device.mtu).then_some(device.mtu),
        up: (!there.up).then_some(true),
        ..LinkChange::default()
    };
    if there.mac != device.mac || there.mtu != device.mtu || !there.up {
        let answer = socket.request(link::set_link(there.index, title, &change));
        answer.map_err(|error| match error.errno() {
            Some(Errno::ADDRINUSE) => Error::PortTaken(device.network),
            _ => Error::Netlink(error),
        })?;
        done.push(format!("raised {title}, or set its hardware address or MTU"));
    }
    done.extend(set_addresses(socket, there.index, device)?);
    Ok(Ensured { index: there.index, done })
}

fn create(socket: &mut Socket, device: &Device) -> Result<(), Error> {
    if let Err(error) = socket.request(new_device(device)) {
        return Err(match error.errno() {
            Some(Errno::OPNOTSUPP) => Error::NoVxlan,
            // Said of a network that is taken, and of a name.
            Some(Errno::EXIST) => match link::link_by_name(socket, name(device.underlay))? {
                Some(other) => Error::NotVxlan {
                    name: name(device.underlay),
                    kind: other.kind.unwrap_or_else(|| "hardware".to_owned()),
                },
                None => Error::SameNetwork(device.network),
            },
            _ => Error::Netlink(error),
        });
    }
    let Some(made) = find(socket, device.underlay)? else {
        return Err(Error::Vanished(name(device.underlay)));
    };
    let quiet = LinkChange { link_local: Some(false), ..LinkChange::default() };
    match socket.request(link::set_link(made.index, name(device.underlay), &quiet)) {
        // No IPv6 in this kernel, or not with such an MTU.
        Err(error) if error.errno() == Some(Errno::AFNOSUPPORT) => Ok(()),
        answer => answer.map_err(Error::Netlink),
    }
}

/// Gives the device its addresses and takes others away.
fn set_addresses(socket: &mut Socket, index: u32, device: &Device) -> Result<Vec<String>, Error> {
    let title = name(device.underlay);
    let wanted: BTreeSet<IpNet> = device.addresses.iter().map(|address| host_prefix(*address)).collect();
    let there: BTreeSet<IpNet> = link::addresses(socket, index)?.into_iter().map(|found| found.net).collect();
    let mut done = Vec::new();
    // The first of a family is what the kernel sends from, so new ones come first only where there was none.
    for net in wanted.difference(&there) {
        socket.request(link::new_address(index, *net, ROUTE_PROTOCOL))?;
        done.push(format!("put {net} on {title}"));
    }
    let is_link_local = |net: &IpNet| matches!(net, IpNet::V6(net) if net.addr().is_unicast_link_local());
    for net in there.difference(&wanted).filter(|net| !is_link_local(net)) {
        deleted(socket.request(link::delete_address(index, *net)))?;
        done.push(format!("took {net} from {title}"));
    }
    Ok(done)
}

/// Sets entries, each in one message: one that is there with another value is replaced. Those that cannot be set
/// stop none of the others; the first error is returned.
pub fn set(socket: &mut Socket, index: u32, entries: &Entries) -> Result<(), Netlink> {
    let forwarding = entries.forwarding.iter().map(|(mac, node)| new_forwarding(index, *mac, *node));
    let neighbours =
        entries.neighbours.iter().map(|(address, mac)| link::permanent_neighbour(index, *address, *mac));
    send(socket, forwarding.chain(neighbours).collect(), |answer| answer)
}

/// Removes entries; what is gone already is no error.
pub fn remove(
    socket: &mut Socket,
    index: u32,
    entries: &Entries,
    strange: &BTreeSet<Mac>,
) -> Result<(), Netlink> {
    let neighbours = entries.neighbours.keys().map(|address| delete_neighbour(index, *address));
    let macs = entries.forwarding.keys().chain(strange);
    let all = neighbours.chain(macs.map(|mac| delete_forwarding(index, *mac)));
    send(socket, all.collect(), |answer| deleted(answer).map(drop))
}

/// Removes the device over that family, if there is one.
pub fn delete(socket: &mut Socket, underlay: Family) -> Result<bool, Netlink> {
    match find(socket, underlay)? {
        Some(there) => deleted(socket.request(link::delete_link(there.index, name(underlay)))),
        None => Ok(false),
    }
}

fn send(
    socket: &mut Socket,
    messages: Vec<Message>,
    judge: impl Fn(Result<(), Netlink>) -> Result<(), Netlink>,
) -> Result<(), Netlink> {
    let mut first = Ok(());
    for some in messages.chunks(AT_ONCE) {
        for answer in socket.request_each(some.to_vec())? {
            first = first.and(judge(answer));
        }
    }
    first
}

fn new_forwarding(index: u32, mac: Mac, node: IpAddr) -> Message {
    let header = header(AF_BRIDGE, index, NUD_PERMANENT | NUD_NOARP, NTF_SELF);
    let mut message = Message::new(
        NEW_NEIGHBOUR,
        CREATE | REPLACE,
        &header,
        format!("add forwarding entry {mac} at {node}"),
    );
    message.attr(NDA_LLADDR, &mac.0).attr(NDA_DST, &octets(node));
    message
}

fn delete_forwarding(index: u32, mac: Mac) -> Message {
    let header = header(AF_BRIDGE, index, 0, NTF_SELF);
    let mut message = Message::new(DELETE_NEIGHBOUR, 0, &header, format!("delete forwarding entry {mac}"));
    message.attr(NDA_LLADDR, &mac.0);
    message
}

fn delete_neighbour(index: u32, address: IpAddr) -> Message {
    let family = if address.is_ipv4() { 2 } else { 10 };
    let what = format!("delete neighbour {address}");
    let mut message = Message::new(DELETE_NEIGHBOUR, 0, &header(family, index, 0, 0), what);
    message.attr(NDA_DST, &octets(address));
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_cni::netlink::split;
    use proptest::prelude::*;

    fn read<T>(message: Message, read: impl Fn(&Received<'_>) -> Option<T>) -> Option<T> {
        let bytes = message.encode().unwrap();
        split(&bytes).next().and_then(|received| read(&received))
    }

    fn any_mac() -> impl Strategy<Value = Mac> {
        any::<[u8; 6]>().prop_map(Mac)
    }

    fn any_family() -> impl Strategy<Value = Family> {
        prop::sample::select(Family::ALL.to_vec())
    }

    /// A link of that kind with this data.
    fn link(kind: &str, fill: impl FnOnce(&mut Message)) -> Option<ObservedTunnel> {
        let mut message = Message::new(NEW_LINK, 0, &[0; LINK_HEADER], "link");
        message.attr(IFLA_ADDRESS, &[2; 6]).attr_u32(IFLA_MTU, 1450);
        message.nest(IFLA_LINKINFO, |info| {
            info.attr_str(INFO_KIND, kind).nest(INFO_DATA, |data| {
                data.attr_u32(VXLAN_ID, 7).attr(VXLAN_PORT, &8472u16.to_be_bytes());
                fill(data);
            });
        });
        read(message, read_device)
    }

    #[test]
    fn only_a_vxlan_device_set_up_as_ours_is_taken_for_ours() {
        let network = |fill: fn(&mut Message)| link("vxlan", fill).unwrap().network;
        assert_eq!(network(|_| {}), Some(Network { vni: 7, port: 8472 }));
        assert_eq!(network(|data| _ = data.attr_u8(VXLAN_LEARNING, 1)), None, "it learns");
        assert_eq!(network(|data| _ = data.attr_u8(VXLAN_COLLECT_METADATA, 1)), None, "flow-based");
        assert_eq!(network(|data| _ = data.attr(VXLAN_GROUP, &[239, 1, 1, 1])), None, "it floods");
        assert_eq!(network(|data| _ = data.attr(VXLAN_LOCAL, &[10, 0, 0, 1])), None, "bound to an address");
        assert_eq!(network(|data| _ = data.attr_u32(VXLAN_LINK, 2)), None, "bound to a link");
        assert_eq!(link("geneve", |_| {}), None);
    }

    #[test]
    fn an_entry_that_says_more_than_ours_is_known_by_it() {
        let (mac, node) = (Mac([2, 0, 0, 0, 0, 1]), [172, 30, 0, 12].into());
        let with = |kind: u16, value: &[u8]| {
            let mut message = new_forwarding(7, mac, node);
            message.attr(kind, value);
            read(message, read_entry).unwrap().has_more
        };
        assert!(
            with(NDA_PORT, &[33, 24]) && with(NDA_VNI, &[7, 0, 0, 0]) && with(NDA_IFINDEX, &[2, 0, 0, 0])
        );
        assert!(!read(new_forwarding(7, mac, node), read_entry).unwrap().has_more);
    }

    proptest! {
        #[test]
        fn a_device_is_read_as_it_is_written(
            underlay in any_family(), vni in 1u32..1 << 24, port in 1u16.., mac in any_mac(), mtu in 68u32..65_536,
        ) {
            let network = Network { vni, port };
            let device = Device { underlay, network, mac, mtu, addresses: BTreeSet::new() };
            let mut bytes = new_device(&device).encode().unwrap();
            let there = split(&bytes).next().and_then(|received| read_device(&received)).unwrap();
            // The kernel says no local address that was given as "any".
            let told = (underlay == Family::IPv4).then_some(network);
            prop_assert_eq!((there.network, there.mac, there.mtu, there.up), (told, mac, mtu, false));
            bytes.truncate(bytes.len() / 2);
            prop_assert_eq!(split(&bytes).count(), 0, "a message that is cut off is none");
        }

        #[test]
        fn entries_are_read_as_they_are_written(
            link in any::<u32>(), mac in any_mac(), v4 in any::<[u8; 4]>(), v6 in any::<[u8; 16]>(),
        ) {
            for address in [IpAddr::from(v4), IpAddr::from(v6)] {
                let entry =
                    Entry { link, is_permanent: true, address: Some(address), mac: Some(mac), has_more: false };
                prop_assert_eq!(read(new_forwarding(link, mac, address), read_entry), Some(entry));
                let neighbour = link::permanent_neighbour(link, address, mac);
                prop_assert_eq!(read(neighbour, read_entry), Some(entry));
                prop_assert_eq!(read(delete_neighbour(link, address), read_entry), None, "no answer to a question");
            }
        }

        #[test]
        fn no_bytes_make_the_readers_panic(
            kind in prop::sample::select(vec![NEW_LINK, NEW_NEIGHBOUR]),
            payload in prop::collection::vec(any::<u8>(), 0..160),
        ) {
            let message = Message::new(kind, 0, &payload, "noise");
            read(message, read_device);
            let message = Message::new(kind, 0, &payload, "noise");
            read(message, read_entry);
            for received in split(&payload) {
                read_device(&received);
                read_entry(&received);
            }
        }
    }
}
