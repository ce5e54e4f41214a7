//! Ethernet frames by hand: what a pod with `NET_RAW` can send, and what others on the wire see of it.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use plat_cni::mac::Mac;

use super::traffic::inside;

/// To all.
pub const BROADCAST: Mac = Mac([0xff; 6]);
/// EtherTypes.
pub const IPV4: u16 = 0x0800;
pub const ARP: u16 = 0x0806;
pub const IPV6: u16 = 0x86dd;

/// A packet socket on one interface: sends frames as they are, and sees what comes.
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    /// On an interface of the laboratory's own namespace.
    pub fn of_host(interface: &str) -> Wire {
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        )
        .unwrap();
        let address = |i: nix::ifaddrs::InterfaceAddress| -> Option<LinkAddr> {
            i.address.filter(|_| i.interface_name == interface)?.as_link_addr().copied()
        };
        let address = nix::ifaddrs::getifaddrs().unwrap().find_map(address).expect("an interface");
        bind(socket.as_raw_fd(), &address).unwrap();
        Wire { socket }
    }

    /// On `eth0` of a container.
    pub fn of_pod(id: &str) -> Wire {
        inside(id, || Wire::of_host("eth0"))
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) {
        assert_eq!(send(self.socket.as_raw_fd(), frame, MsgFlags::empty()).unwrap(), frame.len());
    }

    /// The next frame that has come, or left, if there is one.
    pub fn next(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 4096];
        match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => {
                buffer.truncate(length);
                Some(buffer)
            }
            Err(Errno::EAGAIN) => None,
            Err(other) => panic!("{other}"),
        }
    }
}

/// The next datagram that has come, if there is one.
pub fn next_datagram(socket: &UdpSocket) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 4096];
    let (length, _) = socket.recv_from(&mut buffer).ok()?;
    buffer.truncate(length);
    Some(buffer)
}

/// The hardware address of an interface in the laboratory's own namespace.
pub fn mac_of(interface: &str) -> Mac {
    let text = fs::read_to_string(Path::new("/sys/class/net").join(interface).join("address"));
    match text {
        // /sys may show another namespace's interfaces.
        Ok(text) if !text.trim().is_empty() => text.trim().parse().unwrap(),
        _ => panic!("no interface {interface}"),
    }
}

/// An Ethernet frame.
pub fn ethernet(to: Mac, from: Mac, ether_type: u16, payload: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &ether_type.to_be_bytes(), payload].concat()
}

/// A VLAN tag (without its EtherType) and what it is in front of.
pub fn tagged(vlan: u16, ether_type: u16, payload: &[u8]) -> Vec<u8> {
    [&vlan.to_be_bytes()[..], &ether_type.to_be_bytes(), payload].concat()
}

/// The sum of RFC 1071 over these parts, each of an even length but for the last.
fn checksum(parts: &[&[u8]]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = parts.iter().flat_map(|part| part.chunks(2)).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

/// An IPv4 packet.
pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap();
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 1, 0, 0, 64, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [header, payload.to_vec()].concat()
}

/// A UDP datagram in IPv4.
pub fn udp4(from: Ipv4Addr, to: Ipv4Addr, port: u16, data: &[u8]) -> Vec<u8> {
    ipv4(from, to, 17, &udp(port, port, data))
}

/// A UDP datagram without a checksum.
pub fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap();
    [&from.to_be_bytes()[..], &to.to_be_bytes(), &length.to_be_bytes(), &[0; 2], data].concat()
}

/// An IPv6 packet.
pub fn ipv6(from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([next, 255]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// Sets the checksum at `at` of an upper-layer packet in IPv6 (RFC 8200 §8.1).
fn sealed6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, mut payload: Vec<u8>, at: usize) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let sum = checksum(&[&from.octets(), &to.octets(), &length, &[0, 0, 0, protocol], &payload]);
    payload[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    payload
}

/// A UDP datagram in IPv6.
pub fn udp6(from: Ipv6Addr, to: Ipv6Addr, port: u16, data: &[u8]) -> Vec<u8> {
    ipv6(from, to, 17, &sealed6(from, to, 17, udp(port, port, data), 6))
}

/// An ICMPv6 message with its checksum.
pub fn icmp6(from: Ipv6Addr, to: Ipv6Addr, kind: u8, body: &[u8]) -> Vec<u8> {
    sealed6(from, to, 58, [&[kind, 0, 0, 0], body].concat(), 2)
}

/// The body of a neighbour solicitation or advertisement: flags, target, options.
pub fn about(target: Ipv6Addr, options: &[&[u8]]) -> Vec<u8> {
    [&[0x60, 0, 0, 0], &target.octets()[..], &options.concat()].concat()
}

/// The option that names a hardware address: 1 the source's, 2 the target's.
pub fn option(kind: u8, mac: Mac) -> Vec<u8> {
    [&[kind, 1], &mac.0[..]].concat()
}

/// An ARP packet: 1 asks, 2 answers.
pub fn arp(operation: u8, sender: (Mac, Ipv4Addr), target: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
    for (mac, address) in [sender, target] {
        packet.extend(mac.0);
        packet.extend(address.octets());
    }
    packet
}
