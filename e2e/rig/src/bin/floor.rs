//! The floor under every CNI plugin: the kernel objects of a pod made by the fewest netlink messages, in one
//! program start. No configuration, no lease, no check. What a plugin takes beyond this is its own work.
//!
//! `floor add NETNS HOST_LINK BRIDGE ADDRESS`: veth between BRIDGE and NETNS's `eth0`, up, with ADDRESS/24 and
//! a default route via the block's first address. `floor del HOST_LINK` removes it.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

fn main() -> io::Result<()> {
    let args: Vec<_> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["add", netns, host_link, bridge, address] => {
            add(netns, host_link, bridge, address.parse().map_err(io::Error::other)?)
        }
        ["del", host_link] => Message::new(RTM_DELLINK, 0, &link_header(0, 0))
            .attribute(IFLA_IFNAME, &text(host_link))
            .talk(&route_socket()?),
        _ => Err(io::Error::other("usage: floor add NETNS HOST_LINK BRIDGE ADDRESS | floor del HOST_LINK")),
    }
}

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/veth.h
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL_CREATE: u16 = 0x200 | 0x400;
const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFF_UP: u32 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const AF_INET: u8 = 2;

fn add(netns: &str, host_link: &str, bridge: &str, address: Ipv4Addr) -> io::Result<()> {
    let host = route_socket()?;
    let pod = File::open(netns)?;
    let bridge = rustix::net::netdevice::name_to_index(&host, bridge)?;
    let peer = [
        link_header(0, 0),
        attribute(IFLA_IFNAME, &text("eth0")),
        attribute(IFLA_NET_NS_FD, &pod.as_raw_fd().to_ne_bytes()),
    ];
    let info = [
        attribute(IFLA_INFO_KIND, b"veth"),
        attribute(IFLA_INFO_DATA, &attribute(VETH_INFO_PEER, &peer.concat())),
    ];
    Message::new(RTM_NEWLINK, NLM_F_EXCL_CREATE, &link_header(0, IFF_UP))
        .attribute(IFLA_IFNAME, &text(host_link))
        .attribute(IFLA_MASTER, &bridge.to_ne_bytes())
        .attribute(IFLA_LINKINFO, &info.concat())
        .talk(&host)?;

    move_into_link_name_space(pod.as_fd(), Some(LinkNameSpaceType::Network))?;
    let socket = route_socket()?;
    let eth0 = rustix::net::netdevice::name_to_index(&socket, "eth0")?;
    Message::new(RTM_NEWLINK, 0, &link_header(eth0, IFF_UP)).talk(&socket)?;
    // struct ifaddrmsg
    let header = [&[AF_INET, 24, 0, 0][..], &eth0.to_ne_bytes()].concat();
    Message::new(RTM_NEWADDR, NLM_F_EXCL_CREATE, &header)
        .attribute(IFA_LOCAL, &address.octets())
        .attribute(IFA_ADDRESS, &address.octets())
        .talk(&socket)?;
    let [a, b, c, _] = address.octets();
    // struct rtmsg: to 0/0, table main, protocol boot, scope universe, type unicast
    Message::new(RTM_NEWROUTE, NLM_F_EXCL_CREATE, &[AF_INET, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0])
        .attribute(RTA_GATEWAY, &[a, b, c, 1])
        .attribute(RTA_OIF, &eth0.to_ne_bytes())
        .talk(&socket)
}

fn route_socket() -> io::Result<OwnedFd> {
    // Protocol 0 is NETLINK_ROUTE.
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?)
}

/// struct ifinfomsg
fn link_header(index: u32, up: u32) -> Vec<u8> {
    [&[0; 4][..], &index.to_ne_bytes(), &up.to_ne_bytes(), &up.to_ne_bytes()].concat()
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

/// One attribute: length and type, value, padding to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (value.len() + 4) as u16;
    let padding = value.len().next_multiple_of(4) - value.len();
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value, &[0; 3][..padding]].concat()
}

/// One request.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, header: &[u8]) -> Message {
        let flags = flags | NLM_F_REQUEST | NLM_F_ACK;
        let head = [&[0; 4][..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8], header];
        Message(head.concat())
    }

    fn attribute(mut self, kind: u16, value: &[u8]) -> Message {
        self.0.extend(attribute(kind, value));
        self
    }

    /// Sends it and reads the kernel's answer.
    fn talk(mut self, socket: &OwnedFd) -> io::Result<()> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        send(socket, &self.0, SendFlags::empty())?;
        let mut answer = [0_u8; 4096];
        let (_, length) = recv(socket, &mut answer, RecvFlags::empty())?;
        match (length, answer) {
            // nlmsghdr is 16 bytes; in an error message the (negative) code follows.
            (20.., [_, _, _, _, k0, k1, _, _, _, _, _, _, _, _, _, _, e0, e1, e2, e3, ..])
                if u16::from_ne_bytes([k0, k1]) == NLMSG_ERROR =>
            {
                match i32::from_ne_bytes([e0, e1, e2, e3]) {
                    0 => Ok(()),
                    error => Err(io::Error::from_raw_os_error(-error)),
                }
            }
            _ => Err(io::Error::other("the kernel gave no answer to the request")),
        }
    }
}
