//! rtnetlink: links, addresses and routes as values, the requests that change them, and their dumps.
//!
//! Functions that return a [`Message`] only build it; sending is the caller's, as several go together.
//! Numbers are those of `linux/rtnetlink.h`, `linux/if_link.h` and `linux/if_addr.h`.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use plat_crds::Family;
use rustix::io::Errno;

use crate::mac::Mac;
use crate::netlink::{Attributes, CREATE, ECHO, EXCL, Error, Message, REPLACE, Received, Socket, octets};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_TARGET_NETNSID: u16 = 46;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
/// `br_boolopt_multi`: values, and which of them are meant.
const BRIDGE_OPTIONS: u16 = 46;
/// `BR_BOOLOPT_NO_LL_LEARN`
const NO_RESERVED_LEARNING: u32 = 1;
const INFO_SLAVE_KIND: u16 = 4;
const INFO_SLAVE_DATA: u16 = 5;
const VETH_PEER: u16 = 1;
const PORT_STATE: u16 = 1;
const PORT_HAIRPIN: u16 = 4;
const PORT_ISOLATED: u16 = 33;
const PORT_FORWARDING: u8 = 3;
const INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_EUI64: u8 = 0;
const ADDR_GEN_NONE: u8 = 1;
/// `IF_OPER_UP`.
const OPERATIONAL: u8 = 6;
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
const IFF_POINTOPOINT: u32 = 16;
const IFF_PROMISC: u32 = 0x100;
/// Leave the counters out of a link's description: they are most of it.
const SKIP_STATISTICS: u32 = 8;
const LINK_HEADER: usize = 16;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_TARGET_NETNSID: u16 = 10;
const IFA_PROTO: u16 = 11;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_DADFAILED: u32 = 0x08;
const IFA_F_TENTATIVE: u32 = 0x40;
const ADDRESS_HEADER: usize = 8;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const METRIC_MTU: u16 = 2;
const METRIC_ADVMSS: u16 = 8;
const ROUTE_HEADER: usize = 12;
/// Where the flags are in it.
const ROUTE_FLAGS: usize = 8;
/// `RTM_F_FIB_MATCH`: answer with the entry that matches, instead of what follows from it.
const FIB_MATCH: u32 = 0x2000;
/// Where the kind of a route is in its header.
const ROUTE_TYPE: usize = 7;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NDA_IFINDEX: u16 = 8;
const NUD_PERMANENT: u16 = 0x80;
const NEIGHBOUR_HEADER: usize = 12;

/// The number of the loopback link, the first of every namespace (`LOOPBACK_IFINDEX`).
pub const LOOPBACK: u32 = 1;
/// `RT_SCOPE_UNIVERSE`: a route through a gateway.
pub const SCOPE_GLOBAL: u8 = 0;
/// `RT_SCOPE_LINK`: a route to what is on the link itself.
pub const SCOPE_LINK: u8 = 253;
/// `RT_TABLE_MAIN`.
pub const TABLE_MAIN: u32 = 254;
/// `RTPROT_BOOT`, what `ip route add` writes.
pub const PROTOCOL_BOOT: u8 = 3;

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `veth`, `bridge`, …; `None` for hardware and loopback.
    pub kind: Option<String>,
    /// Its hardware address.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is up (administratively).
    pub up: bool,
    /// Whether it carries packets: the kernel has seen the other end come up.
    pub operational: bool,
    /// Whether it takes all frames (`promisc on`).
    pub promiscuous: bool,
    /// Whether it is the loopback, or one like it: it carries addresses, but leads nowhere.
    pub loopback: bool,
    /// Whether there is one other end only.
    pub one_peer: bool,
    /// The bridge it is a port of.
    pub master: Option<u32>,
    /// The number of its other end, in that one's namespace.
    pub peer: Option<u32>,
    /// The kernel's number for the namespace of the other end; `None` if that is this namespace.
    pub peer_netns: Option<u32>,
    /// Its alias.
    pub alias: Option<String>,
    /// Whether the bridge sends frames back out of this port.
    pub hairpin: bool,
    /// As a bridge: whether a frame to an address that IEEE 802.1D reserves (`01:80:c2:00:00:0x`) tells it
    /// on which port the frame's source is. Such frames go past nftables, so anyone could take another's
    /// frames by them. `false` for what is no bridge.
    pub learns_from_reserved: bool,
    /// Whether this port exchanges nothing with other isolated ports.
    pub isolated: bool,
    /// Whether the bridge takes frames from this port and sends others out of it.
    pub forwarding: bool,
}

fn family_number(family: Family) -> u8 {
    match family {
        Family::IPv4 => 2,
        Family::IPv6 => 10,
    }
}

/// `ifinfomsg`.
fn link_header(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut header = vec![0; 4];
    for word in [index, flags, change] {
        header.extend_from_slice(&word.to_ne_bytes());
    }
    header
}

/// Makes a bridge, up, with this hardware address. A bridge whose address was set takes no port's. It learns
/// nothing from frames to reserved addresses: see [`Link::learns_from_reserved`].
pub fn new_bridge(name: &str, mac: Mac, mtu: Option<u32>) -> Message {
    let what = format!("create bridge {name}");
    let mut m = Message::new(RTM_NEWLINK, CREATE | EXCL, &link_header(0, IFF_UP, IFF_UP), what);
    m.attr_str(IFLA_IFNAME, name).attr(IFLA_ADDRESS, &mac.0);
    if let Some(mtu) = mtu {
        m.attr_u32(IFLA_MTU, mtu);
    }
    m.nest(IFLA_LINKINFO, |m| {
        m.attr(INFO_KIND, b"bridge");
        ignore_reserved(m);
    });
    m
}

fn ignore_reserved(info: &mut Message) {
    info.nest(INFO_DATA, |m| {
        m.attr(BRIDGE_OPTIONS, &[NO_RESERVED_LEARNING.to_ne_bytes(); 2].concat());
    });
}

/// A pod's link: both ends with all that can be said at once.
#[derive(Clone, Debug)]
pub struct NewVeth<'a> {
    /// Name of the host's end.
    pub host_name: &'a str,
    /// Hardware address of the host's end.
    pub host_mac: Mac,
    /// Name of the pod's end.
    pub pod_name: &'a str,
    /// Hardware address of the pod's end.
    pub pod_mac: Mac,
    /// MTU of both ends in bytes; `None` leaves it to the kernel.
    pub mtu: Option<u32>,
    /// Number of the bridge that the host's end becomes a port of.
    pub bridge: Option<u32>,
    /// The pod's network namespace.
    pub pod_netns: BorrowedFd<'a>,
}

/// Makes a pod's link: the host's end a port of its bridge, the pod's end in its namespace, both still down.
/// The answer carries the new link
/// ([`crate::netlink::ECHO`]) where the kernel is new enough.
///
/// Each end has one queue: the kernel would make one for each processor, with a folder in sysfs for each,
/// though a veth sends without queueing, from whichever processor.
pub fn new_veth(veth: &NewVeth<'_>) -> Message {
    let what = format!("create link {} to {} of the pod", veth.host_name, veth.pod_name);
    let mut m = Message::new(RTM_NEWLINK, CREATE | EXCL | ECHO, &link_header(0, 0, 0), what);
    m.attr_str(IFLA_IFNAME, veth.host_name).attr(IFLA_ADDRESS, &veth.host_mac.0);
    m.attr_u32(IFLA_NUM_TX_QUEUES, 1).attr_u32(IFLA_NUM_RX_QUEUES, 1);
    if let Some(mtu) = veth.mtu {
        m.attr_u32(IFLA_MTU, mtu);
    }
    if let Some(bridge) = veth.bridge {
        m.attr_u32(IFLA_MASTER, bridge);
    }
    m.nest(IFLA_LINKINFO, |m| {
        m.attr(INFO_KIND, b"veth").nest(INFO_DATA, |m| {
            m.nest(VETH_PEER, |m| {
                m.raw(&link_header(0, 0, 0)).attr_str(IFLA_IFNAME, veth.pod_name);
                m.attr(IFLA_ADDRESS, &veth.pod_mac.0);
                m.attr_u32(IFLA_NUM_TX_QUEUES, 1).attr_u32(IFLA_NUM_RX_QUEUES, 1);
                m.attr(IFLA_NET_NS_FD, &veth.pod_netns.as_raw_fd().to_ne_bytes());
                if let Some(mtu) = veth.mtu {
                    m.attr_u32(IFLA_MTU, mtu);
                }
            });
        });
    });
    m
}

/// What to change about a link; what is `None` stays.
#[derive(Clone, Debug, Default)]
pub struct LinkChange<'a> {
    /// Raise it (`true`) or take it down.
    pub up: Option<bool>,
    /// Take all frames.
    pub promiscuous: Option<bool>,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// MTU in bytes.
    pub mtu: Option<u32>,
    /// Alias; at most 255 bytes.
    pub alias: Option<&'a str>,
    /// Make it a port of that bridge.
    pub bridge: Option<u32>,
    /// As a bridge: learn nothing from frames to reserved addresses ([`Link::learns_from_reserved`]).
    pub ignore_reserved: bool,
    /// As a bridge port: send frames back out of this port.
    pub hairpin: Option<bool>,
    /// As a bridge port: exchange nothing with other isolated ports.
    pub isolated: Option<bool>,
    /// Whether the kernel gives it an IPv6 link-local address when it comes up. An error `EAFNOSUPPORT` if the
    /// link, or the kernel, has no IPv6.
    pub link_local: Option<bool>,
}

/// Changes a link.
pub fn set_link(index: u32, name: &str, change: &LinkChange<'_>) -> Message {
    let (mut flags, mut mask) = (0, 0);
    for (wanted, bit) in [(change.up, IFF_UP), (change.promiscuous, IFF_PROMISC)] {
        if let Some(on) = wanted {
            mask |= bit;
            flags |= if on { bit } else { 0 };
        }
    }
    let mut m =
        Message::new(RTM_NEWLINK, 0, &link_header(index, flags, mask), format!("configure link {name}"));
    if let Some(mac) = change.mac {
        m.attr(IFLA_ADDRESS, &mac.0);
    }
    if let Some(mtu) = change.mtu {
        m.attr_u32(IFLA_MTU, mtu);
    }
    if let Some(alias) = change.alias {
        m.attr(IFLA_IFALIAS, alias.as_bytes());
    }
    if let Some(bridge) = change.bridge {
        m.attr_u32(IFLA_MASTER, bridge);
    }
    if let Some(link_local) = change.link_local {
        m.nest(IFLA_AF_SPEC, |m| {
            m.nest(u16::from(family_number(Family::IPv6)), |m| {
                m.attr_u8(INET6_ADDR_GEN_MODE, if link_local { ADDR_GEN_EUI64 } else { ADDR_GEN_NONE });
            });
        });
    }
    if change.ignore_reserved {
        m.nest(IFLA_LINKINFO, |m| {
            m.attr(INFO_KIND, b"bridge");
            ignore_reserved(m);
        });
    }
    let port = [(PORT_HAIRPIN, change.hairpin), (PORT_ISOLATED, change.isolated)];
    if port.iter().any(|(_, on)| on.is_some()) {
        m.nest(IFLA_LINKINFO, |m| {
            m.attr(INFO_SLAVE_KIND, b"bridge").nest(INFO_SLAVE_DATA, |m| {
                for (kind, on) in port {
                    if let Some(on) = on {
                        m.attr_u8(kind, u8::from(on));
                    }
                }
            });
        });
    }
    m
}

/// Deletes a link, and with one end of a veth the other.
pub fn delete_link(index: u32, name: &str) -> Message {
    Message::new(RTM_DELLINK, 0, &link_header(index, 0, 0), format!("delete link {name}"))
}

/// The link of that name; `None` if there is none.
pub fn link_by_name(socket: &mut Socket, name: &str) -> Result<Option<Link>, Error> {
    let mut get = Message::new(RTM_GETLINK, 0, &link_header(0, 0, 0), format!("look up link {name}"));
    get.attr_str(IFLA_IFNAME, name).attr_u32(IFLA_EXT_MASK, SKIP_STATISTICS);
    get_link(socket, get)
}

/// The link of that number; `None` if there is none.
pub fn link_by_index(socket: &mut Socket, index: u32) -> Result<Option<Link>, Error> {
    let mut get = Message::new(RTM_GETLINK, 0, &link_header(index, 0, 0), format!("look up link {index}"));
    get.attr_u32(IFLA_EXT_MASK, SKIP_STATISTICS);
    get_link(socket, get)
}

/// The link of that number in another namespace, named as in [`addresses_in`]; `None` if there is none.
pub fn link_in(socket: &mut Socket, netns: u32, index: u32) -> Result<Option<Link>, Error> {
    let what = "look up the other end of a link";
    let mut get = Message::new(RTM_GETLINK, 0, &link_header(index, 0, 0), what);
    get.attr_u32(IFLA_EXT_MASK, SKIP_STATISTICS).attr_u32(IFLA_TARGET_NETNSID, netns);
    get_link(socket, get)
}

fn get_link(socket: &mut Socket, get: Message) -> Result<Option<Link>, Error> {
    let mut link = None;
    match socket.ask(get, |received| link = link.take().or_else(|| read_link(&received))) {
        Err(error) if error.errno() == Some(Errno::NODEV) => Ok(None),
        Err(error) => Err(error),
        Ok(()) => Ok(link),
    }
}

/// All links of a kind (`veth`, `bridge`), or of every kind.
pub fn links(socket: &mut Socket, kind: Option<&str>) -> Result<Vec<Link>, Error> {
    let mut get = Message::new(RTM_GETLINK, 0, &link_header(0, 0, 0), "list links");
    get.attr_u32(IFLA_EXT_MASK, SKIP_STATISTICS);
    if let Some(kind) = kind {
        get.nest(IFLA_LINKINFO, |m| {
            m.attr(INFO_KIND, kind.as_bytes());
        });
    }
    let links = socket.dump(&get, |received| read_link(&received))?;
    // Kernels before 4.20 ignore the filter.
    Ok(links.into_iter().filter(|l| kind.is_none() || l.kind.as_deref() == kind).collect())
}

/// Reads an `RTM_NEWLINK`. Pure.
pub fn read_link(received: &Received<'_>) -> Option<Link> {
    if received.kind != RTM_NEWLINK {
        return None;
    }
    let word = |at| received.payload.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let (index, flags) = (word(4)?, word(8)?);
    let attributes = Attributes::behind(received.payload, LINK_HEADER);
    let mut link = Link {
        index,
        up: flags & IFF_UP != 0,
        promiscuous: flags & IFF_PROMISC != 0,
        loopback: flags & IFF_LOOPBACK != 0,
        one_peer: flags & IFF_POINTOPOINT != 0,
        ..Link::default()
    };
    for attribute in attributes {
        match attribute.kind {
            IFLA_IFNAME => link.name = attribute.text().into_owned(),
            IFLA_ADDRESS => link.mac = attribute.value.try_into().ok().map(Mac),
            IFLA_MTU => link.mtu = attribute.u32().unwrap_or(0),
            IFLA_LINK => link.peer = attribute.u32(),
            IFLA_MASTER => link.master = attribute.u32(),
            IFLA_OPERSTATE => link.operational = attribute.u8() == Some(OPERATIONAL),
            IFLA_IFALIAS => link.alias = Some(attribute.text().into_owned()),
            IFLA_LINK_NETNSID => link.peer_netns = attribute.u32(),
            IFLA_LINKINFO => {
                let info = attribute.nested();
                link.kind = info.find(INFO_KIND).map(|k| k.text().into_owned());
                if link.kind.as_deref() == Some("bridge") {
                    let options = info.find(INFO_DATA).and_then(|d| d.nested().find(BRIDGE_OPTIONS));
                    // Kernels before 4.20 have no such option: nothing to be done there.
                    let values = options.and_then(|o| o.value.first_chunk().copied()).map(u32::from_ne_bytes);
                    link.learns_from_reserved = values.is_some_and(|v| v & NO_RESERVED_LEARNING == 0);
                }
                if info.find(INFO_SLAVE_KIND).is_some_and(|k| k.text() == "bridge") {
                    let port = info.find(INFO_SLAVE_DATA).map(|d| d.nested());
                    let byte = |kind| port.as_ref().and_then(|p| p.find(kind)?.u8());
                    link.hairpin = byte(PORT_HAIRPIN) == Some(1);
                    link.isolated = byte(PORT_ISOLATED) == Some(1);
                    link.forwarding = byte(PORT_STATE) == Some(PORT_FORWARDING);
                }
            }
            _ => {}
        }
    }
    Some(link)
}

/// An address of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The link's number.
    pub link: u32,
    /// The address with the length of its prefix.
    pub net: IpNet,
    /// It cannot be used yet, or at all: duplicate address detection is running or has failed.
    pub tentative: bool,
    /// Duplicate address detection has failed: somebody else on the link has it.
    pub duplicate: bool,
    /// Who put it there (`IFA_PROTO`, kernel 5.18); 0 if unknown.
    pub protocol: u8,
}

/// `ifaddrmsg`.
fn address_header(family: u8, prefix_length: u8, flags: u8, scope: u8, link: u32) -> Vec<u8> {
    let mut header = vec![family, prefix_length, flags, scope];
    header.extend_from_slice(&link.to_ne_bytes());
    header
}

/// Adds an address. An IPv6 one can be used at once, without duplicate address detection: the lease has
/// made sure that it is the only one. An error `EEXIST` if the link has it.
pub fn new_address(link: u32, net: IpNet, protocol: u8) -> Message {
    let mut m = plain_address(link, net);
    if net.addr().is_ipv6() {
        m.attr_u32(IFA_FLAGS, IFA_F_NODAD);
    }
    if protocol != 0 {
        m.attr_u8(IFA_PROTO, protocol);
    }
    m
}

/// Adds an address as an administrator would: an IPv6 one can be used when duplicate address detection is
/// through with it, if that is on for the link.
pub fn plain_address(link: u32, net: IpNet) -> Message {
    let family = Family::of(&net.addr());
    let header = address_header(family_number(family), net.prefix_len(), 0, SCOPE_GLOBAL, link);
    let mut m = Message::new(RTM_NEWADDR, CREATE | EXCL, &header, format!("add address {net}"));
    m.attr(IFA_LOCAL, &octets(net.addr())).attr(IFA_ADDRESS, &octets(net.addr()));
    match net {
        IpNet::V4(v4) if v4.prefix_len() < 31 => {
            m.attr(IFA_BROADCAST, &v4.broadcast().octets());
        }
        IpNet::V4(_) | IpNet::V6(_) => {}
    }
    m
}

/// Removes an address.
pub fn delete_address(link: u32, net: IpNet) -> Message {
    let family = Family::of(&net.addr());
    let header = address_header(family_number(family), net.prefix_len(), 0, 0, link);
    let mut m = Message::new(RTM_DELADDR, 0, &header, format!("delete address {net}"));
    m.attr(IFA_LOCAL, &octets(net.addr())).attr(IFA_ADDRESS, &octets(net.addr()));
    m
}

/// The addresses of a link.
pub fn addresses(socket: &mut Socket, link: u32) -> Result<Vec<Address>, Error> {
    let get = Message::new(RTM_GETADDR, 0, &address_header(0, 0, 0, 0, link), "list addresses");
    let all = socket.dump(&get, |received| read_address(&received, None))?;
    Ok(all.into_iter().filter(|a| a.link == link).collect())
}

/// All addresses of this host.
pub fn own_addresses(socket: &mut Socket) -> Result<HashSet<IpAddr>, Error> {
    let get = Message::new(RTM_GETADDR, 0, &address_header(0, 0, 0, 0, 0), "list addresses");
    let all = socket.dump(&get, |received| read_address(&received, None))?;
    Ok(all.into_iter().map(|address| address.net.addr()).collect())
}

/// The addresses of a link in another namespace, named by the number under which this socket's namespace
/// knows it ([`Link::peer_netns`]). Nobody enters that namespace. An answer from a kernel that does not
/// know how (before 4.20), and so would tell about this namespace instead, is left out.
pub fn addresses_in(socket: &mut Socket, netns: u32, link: u32) -> Result<Vec<Address>, Error> {
    let what = "list addresses behind a link";
    let mut get = Message::new(RTM_GETADDR, 0, &address_header(0, 0, 0, 0, link), what);
    get.attr_u32(IFA_TARGET_NETNSID, netns);
    let all = socket.dump(&get, |received| read_address(&received, Some(netns)))?;
    Ok(all.into_iter().filter(|a| a.link == link).collect())
}

/// Reads an `RTM_NEWADDR`; with `netns`, only one that says that it is about that namespace. Pure.
pub fn read_address(received: &Received<'_>, netns: Option<u32>) -> Option<Address> {
    if received.kind != RTM_NEWADDR {
        return None;
    }
    let [family, prefix_length, flags, _, index @ ..] = received.payload.get(..ADDRESS_HEADER)? else {
        return None;
    };
    let attributes = Attributes::behind(received.payload, ADDRESS_HEADER);
    if netns.is_some() && attributes.find(IFA_TARGET_NETNSID).and_then(|a| a.u32()) != netns {
        return None;
    }
    // On a link with a peer address IFA_ADDRESS is the other side; IFA_LOCAL, where given, is ours.
    let own = attributes.find(IFA_LOCAL).or_else(|| attributes.find(IFA_ADDRESS))?;
    let flags = attributes.find(IFA_FLAGS).and_then(|f| f.u32()).unwrap_or(u32::from(*flags));
    Some(Address {
        link: u32::from_ne_bytes(index.try_into().ok()?),
        net: IpNet::new(read_ip(*family, own.value)?, *prefix_length).ok()?,
        tentative: flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED) != 0,
        duplicate: flags & IFA_F_DADFAILED != 0,
        protocol: attributes.find(IFA_PROTO).and_then(|p| p.u8()).unwrap_or(0),
    })
}

fn read_ip(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        2 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        10 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to; its length 0 is the default route.
    pub destination: IpNet,
    /// Through which gateway; `None` if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// The number of the link.
    pub link: u32,
    /// The address that this host's own packets get.
    pub source: Option<IpAddr>,
    /// Table; [`TABLE_MAIN`] is the usual one.
    pub table: u32,
    /// Metric, the lower the better; 0 is the kernel's default of the family.
    pub metric: u32,
    /// Who made it.
    pub protocol: u8,
    /// How far away the destination is.
    pub scope: u8,
    /// MTU of the path in bytes.
    pub mtu: Option<u32>,
    /// Largest TCP segment that is announced, in bytes.
    pub advmss: Option<u32>,
}

impl Route {
    /// A route in the main table, as an administrator would add it: through the gateway, or to what is on
    /// the link.
    pub fn new(destination: IpNet, gateway: Option<IpAddr>, link: u32) -> Route {
        Route {
            destination: destination.trunc(),
            gateway,
            link,
            source: None,
            table: TABLE_MAIN,
            metric: 0,
            protocol: PROTOCOL_BOOT,
            scope: if gateway.is_some() { SCOPE_GLOBAL } else { SCOPE_LINK },
            mtu: None,
            advmss: None,
        }
    }
}

/// Adds a route; an error `EEXIST` if there is one of that destination, table and metric.
pub fn new_route(route: &Route) -> Message {
    route_message(route, RTM_NEWROUTE, CREATE | EXCL, "add")
}

/// Adds a route or replaces the one of that destination, table and metric.
pub fn replace_route(route: &Route) -> Message {
    route_message(route, RTM_NEWROUTE, CREATE | REPLACE, "replace")
}

/// Removes a route.
pub fn delete_route(route: &Route) -> Message {
    route_message(route, RTM_DELROUTE, 0, "delete")
}

fn route_message(route: &Route, kind: u16, flags: u16, verb: &str) -> Message {
    let family = Family::of(&route.destination.addr());
    // Numbers beyond a byte go into an attribute; the header's field is then "unspecified".
    let table = u8::try_from(route.table).unwrap_or(0);
    // IPv6 knows no scopes; the kernel wants 0 there.
    let scope = if family == Family::IPv4 { route.scope } else { SCOPE_GLOBAL };
    let mut header = vec![family_number(family), route.destination.prefix_len(), 0, 0];
    header.extend_from_slice(&[table, route.protocol, scope, RTN_UNICAST]);
    header.extend_from_slice(&0u32.to_ne_bytes());
    let via = route.gateway.map(|g| format!(" via {g}")).unwrap_or_default();
    let mut m = Message::new(kind, flags, &header, format!("{verb} route {}{via}", route.destination));
    if route.destination.prefix_len() > 0 {
        m.attr(RTA_DST, &octets(route.destination.addr()));
    }
    if let Some(gateway) = route.gateway {
        m.attr(RTA_GATEWAY, &octets(gateway));
    }
    if let Some(source) = route.source {
        m.attr(RTA_PREFSRC, &octets(source));
    }
    m.attr_u32(RTA_OIF, route.link).attr_u32(RTA_TABLE, route.table);
    if route.metric != 0 {
        m.attr_u32(RTA_PRIORITY, route.metric);
    }
    if route.mtu.is_some() || route.advmss.is_some() {
        m.nest(RTA_METRICS, |m| {
            for (kind, value) in [(METRIC_MTU, route.mtu), (METRIC_ADVMSS, route.advmss)] {
                if let Some(value) = value {
                    m.attr_u32(kind, value);
                }
            }
        });
    }
    m
}

/// The unicast routes of a family through single links, of every table.
pub fn routes(socket: &mut Socket, family: Family) -> Result<Vec<Route>, Error> {
    routes_of(socket, family, 0)
}

/// The same of one protocol; the kernel does the filtering.
pub fn routes_of(socket: &mut Socket, family: Family, protocol: u8) -> Result<Vec<Route>, Error> {
    let mut header = vec![family_number(family), 0, 0, 0, 0, protocol];
    header.resize(ROUTE_HEADER, 0);
    let get = Message::new(RTM_GETROUTE, 0, &header, "list routes");
    let routes = socket.dump(&get, |received| read_route(&received))?;
    // Kernels before 4.20 ignore the filter.
    Ok(routes.into_iter().filter(|route| protocol == 0 || route.protocol == protocol).collect())
}

/// Where packets to an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To this namespace itself.
    Local,
    /// Over the link of that number.
    Over(u32),
}

/// Where packets to an address go; `None` if nowhere.
pub fn way(socket: &mut Socket, address: IpAddr) -> Result<Option<Way>, Error> {
    let family = Family::of(&address);
    let mut header = vec![0; ROUTE_HEADER];
    header.splice(..2, [family_number(family), IpNet::from(address).prefix_len()]);
    let mut get = Message::new(RTM_GETROUTE, 0, &header, format!("look up the route to {address}"));
    get.attr(RTA_DST, &octets(address));
    let mut way = None;
    let answer = socket.ask(get, |received| {
        way = match received.payload.get(ROUTE_TYPE) {
            Some(&RTN_LOCAL) => Some(Way::Local),
            _ => read_route(&received).map(|route| Way::Over(route.link)),
        };
    });
    match answer {
        Err(error) if matches!(error.errno(), Some(Errno::NETUNREACH | Errno::HOSTUNREACH)) => Ok(None),
        Err(error) => Err(error),
        Ok(()) => Ok(way),
    }
}

/// Whether a route to that address alone leads straight over that link.
pub fn is_routed_over(socket: &mut Socket, address: IpAddr, link: u32) -> Result<bool, Error> {
    let (family, length) = (Family::of(&address), IpNet::from(address).prefix_len());
    let mut header = vec![0; ROUTE_HEADER];
    header.splice(..2, [family_number(family), length]);
    header.splice(ROUTE_FLAGS.., FIB_MATCH.to_ne_bytes());
    let mut get = Message::new(RTM_GETROUTE, 0, &header, format!("look up the route to {address}"));
    get.attr(RTA_DST, &octets(address));
    let mut is_routed = false;
    let answer = socket.ask(get, |received| {
        is_routed = read_route(&received).is_some_and(|route| {
            route.link == link && route.gateway.is_none() && route.destination.prefix_len() == length
        });
    });
    match answer {
        Ok(()) => Ok(is_routed),
        // No route, one that says so, or no such family in this kernel.
        Err(error) => match error.errno() {
            Some(
                Errno::NETUNREACH
                | Errno::HOSTUNREACH
                | Errno::ACCESS
                | Errno::INVAL
                | Errno::AFNOSUPPORT
                | Errno::OPNOTSUPP,
            ) => Ok(false),
            _ => Err(error),
        },
    }
}

/// Reads an `RTM_NEWROUTE` of a unicast route through a single link. Pure.
pub fn read_route(received: &Received<'_>) -> Option<Route> {
    if received.kind != RTM_NEWROUTE {
        return None;
    }
    let [family, length, _, _, table, protocol, scope, kind, ..] = received.payload.get(..ROUTE_HEADER)?
    else {
        return None;
    };
    if *kind != RTN_UNICAST {
        return None;
    }
    let attributes = Attributes::behind(received.payload, ROUTE_HEADER);
    let ip = |kind| attributes.find(kind).and_then(|a| read_ip(*family, a.value));
    let any: IpAddr = if *family == 2 { [0; 4].into() } else { [0; 16].into() };
    let metrics = attributes.find(RTA_METRICS);
    let metric = |kind| metrics.and_then(|m| m.nested().find(kind)?.u32());
    Some(Route {
        destination: IpNet::new(ip(RTA_DST).unwrap_or(any), *length).ok()?,
        gateway: ip(RTA_GATEWAY),
        link: attributes.find(RTA_OIF)?.u32()?,
        source: ip(RTA_PREFSRC),
        table: attributes.find(RTA_TABLE).and_then(|t| t.u32()).unwrap_or(u32::from(*table)),
        metric: attributes.find(RTA_PRIORITY).and_then(|p| p.u32()).unwrap_or(0),
        protocol: *protocol,
        scope: *scope,
        mtu: metric(METRIC_MTU),
        advmss: metric(METRIC_ADVMSS),
    })
}

/// A neighbour: who has which hardware address on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The link's number.
    pub link: u32,
    /// The IP address.
    pub address: IpAddr,
    /// The hardware address; `None` while the kernel is still asking.
    pub mac: Option<Mac>,
}

/// `ndmsg`.
fn neighbour_header(family: u8, link: u32, state: u16) -> Vec<u8> {
    let mut header = vec![family, 0, 0, 0];
    header.extend_from_slice(&link.to_ne_bytes());
    header.extend_from_slice(&state.to_ne_bytes());
    header.extend_from_slice(&[0; 2]);
    header
}

/// Writes down a neighbour for good (`nud permanent`): the kernel never asks for it.
pub fn permanent_neighbour(link: u32, address: IpAddr, mac: Mac) -> Message {
    let header = neighbour_header(family_number(Family::of(&address)), link, NUD_PERMANENT);
    let what = format!("add neighbour {address}");
    let mut m = Message::new(RTM_NEWNEIGH, CREATE | REPLACE, &header, what);
    m.attr(NDA_DST, &octets(address)).attr(NDA_LLADDR, &mac.0);
    m
}

/// The neighbours on a link.
pub fn neighbours(socket: &mut Socket, link: u32) -> Result<Vec<Neighbour>, Error> {
    let mut get = Message::new(RTM_GETNEIGH, 0, &neighbour_header(0, 0, 0), "list neighbours");
    get.attr_u32(NDA_IFINDEX, link);
    let all = socket.dump(&get, |received| read_neighbour(&received))?;
    Ok(all.into_iter().filter(|n| n.link == link).collect())
}

/// The neighbours of a family on all links.
pub fn neighbours_of(socket: &mut Socket, family: Family) -> Result<Vec<Neighbour>, Error> {
    let header = neighbour_header(family_number(family), 0, 0);
    let get = Message::new(RTM_GETNEIGH, 0, &header, "list neighbours");
    socket.dump(&get, |received| read_neighbour(&received))
}

fn read_neighbour(received: &Received<'_>) -> Option<Neighbour> {
    if received.kind != RTM_NEWNEIGH {
        return None;
    }
    let [family, _, _, _, index @ ..] = received.payload.get(..8)? else { return None };
    let attributes = Attributes::behind(received.payload, NEIGHBOUR_HEADER);
    Some(Neighbour {
        link: u32::from_ne_bytes(index.try_into().ok()?),
        address: read_ip(*family, attributes.find(NDA_DST)?.value)?,
        mac: attributes.find(NDA_LLADDR).and_then(|a| a.value.try_into().ok()).map(Mac),
    })
}
