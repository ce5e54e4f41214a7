//! The packets that a ruleset is judged for: one for each kind of traffic that pods need.
//!
//! They are whole packets: TCP between two ports that nothing is known by, its first segment (a new connection) or a
//! later one of the other side (an established one). What would be chance (identification, checksums, sequence
//! numbers) is unknown, so that no verdict hangs on it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use plat_cni::netlink::octets;
use plat_crds::block::{Block, Family};

use super::bits::{Byte, known};

/// Ports of the synthetic connection, of no known service: a rule about a service is not about pods.
pub const PORTS: [u16; 2] = [45017, 45011];
const TCP: u8 = 6;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// An address that stands for the world: a DNS root server's, so that no filter of bogus addresses meets it.
pub fn world(family: Family) -> IpAddr {
    match family {
        Family::IPv4 => Ipv4Addr::new(198, 41, 0, 4).into(),
        Family::IPv6 => Ipv6Addr::new(0x2001, 0x503, 0xba3e, 0, 0, 0, 2, 0x30).into(),
    }
}

/// A pod's address in the block, from its end: of the first ones, rules about a single pod may speak.
pub fn pod(block: &Block) -> IpAddr {
    block.host(block.last_host()).unwrap_or(block.network())
}

/// Another pod's address in the block.
pub fn other_pod(block: &Block) -> IpAddr {
    block.host(block.last_host().saturating_sub(1)).unwrap_or(block.network())
}

/// What is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// Pods of another node.
    Pods,
    /// Pods of this node.
    Neighbours,
    /// Everything else.
    World,
}

/// The kind of traffic that a packet stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Traffic {
    /// From a pod of this node.
    To(Peer),
    /// To a pod of this node.
    From(Peer),
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Traffic::To(Peer::Pods) => "from pods to pods of other nodes",
            Traffic::From(Peer::Pods) => "to pods from pods of other nodes",
            Traffic::To(Peer::Neighbours) | Traffic::From(Peer::Neighbours) => "between pods of this node",
            Traffic::To(Peer::World) => "from pods to the world",
            Traffic::From(Peer::World) => "to pods from the world",
        })
    }
}

/// Whether it begins its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Connection {
    /// It does.
    New,
    /// It answers.
    Established,
}

/// A link that a packet comes or leaves by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
}

/// A packet on its way through this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// What it stands for.
    pub traffic: Traffic,
    /// The block of this node that it is about.
    pub block: Block,
    /// New or established.
    pub connection: Connection,
    /// The link that it comes by.
    pub from_link: Link,
    /// The link that it leaves by.
    pub to_link: Link,
    /// Its IP header.
    pub network: Vec<Byte>,
    /// Its TCP header.
    pub transport: Vec<Byte>,
}

impl Packet {
    /// The packet of that traffic from `source`, which comes by one link, to `destination`, by the other.
    pub fn new(
        traffic: Traffic,
        block: Block,
        connection: Connection,
        (source, from_link): (IpAddr, &Link),
        (destination, to_link): (IpAddr, &Link),
    ) -> Packet {
        Packet {
            traffic,
            block,
            connection,
            from_link: from_link.clone(),
            to_link: to_link.clone(),
            network: network(source, destination),
            transport: transport(connection),
        }
    }

    /// Its family.
    pub fn family(&self) -> Family {
        self.block.family()
    }

    /// Its protocol's number: TCP.
    pub fn protocol(&self) -> u8 {
        TCP
    }
}

/// The header behind which TCP follows: 20 bytes of IPv4 without options, or 40 of IPv6 without extensions.
fn network(source: IpAddr, destination: IpAddr) -> Vec<Byte> {
    const HOPS: u8 = 63;
    const DONT_FRAGMENT: u8 = 0x40;
    let mut header = match source {
        IpAddr::V4(_) => {
            // Version and length, no priority, total length.
            let mut header = known(&[0x45, 0]);
            header.extend([Byte::UNKNOWN; 4]);
            header.extend(known(&[DONT_FRAGMENT, 0, HOPS, TCP]));
            header.extend([Byte::UNKNOWN; 2]);
            header
        }
        IpAddr::V6(_) => {
            // Version and no priority, the flow's label, length of what follows.
            let mut header = vec![Byte::new(0x60), Byte::partly(0, 0xf0)];
            header.extend([Byte::UNKNOWN; 4]);
            header.extend(known(&[TCP, HOPS]));
            header
        }
    };
    header.extend(known(&octets(source)));
    header.extend(known(&octets(destination)));
    header
}

fn transport(connection: Connection) -> Vec<Byte> {
    let ([from, to], flags) = match connection {
        Connection::New => (PORTS, SYN),
        Connection::Established => ([PORTS[1], PORTS[0]], ACK),
    };
    let mut header = known(&[from.to_be_bytes(), to.to_be_bytes()].concat());
    header.extend([Byte::UNKNOWN; 9]);
    header.push(Byte::new(flags));
    header.extend([Byte::UNKNOWN; 6]);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_has_its_addresses_ports_and_flags_where_they_belong() {
        let block = |text: &str| text.parse::<Block>().unwrap();
        for (own, peer, addresses, length) in
            [("10.244.1.0/24", "10.244.2.0/24", 12, 20), ("fd00:1::/64", "fd00:2::/64", 8, 40)]
        {
            let (own, peer) = (block(own), block(peer));
            let link = Link { name: "eth0".into(), index: 2 };
            let packet = Packet::new(
                Traffic::To(Peer::Pods),
                own,
                Connection::New,
                (pod(&own), &link),
                (pod(&peer), &link),
            );
            assert_eq!(packet.network.len(), length);
            assert_eq!(packet.transport.len(), 20);
            let bytes: Vec<u8> = packet.network[addresses..].iter().map(|b| b.get().unwrap()).collect();
            assert_eq!(bytes, [octets(pod(&own)), octets(pod(&peer))].concat());
            assert_eq!(packet.transport[13].get(), Some(SYN));
            assert_ne!(pod(&own), other_pod(&own));
        }
    }
}
