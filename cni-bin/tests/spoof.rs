//! Anti-spoofing, by raw frames: what a pod with `NET_RAW` forges reaches nobody, what is its own goes
//! through; and without protection each forgery arrives, so that it is one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};

use lab::frames::*;
use lab::{Plat, add, cluster_conf, hand_conf, netns, sh, with};
use plat_cni::kernel::HostKernel;
use plat_cni::mac::Mac;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::store::Kernel;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use serde_json::{Value, json};

/// The UDP port on which the host listens.
const PORT: u16 = 5555;
/// An address that nobody has.
const STRANGER: Mac = Mac([2, 0, 0, 0, 0, 0x99]);
const STRANGER4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 9);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Addresses that IEEE 802.1D reserves: of LLDP, and of nothing in particular.
const LLDP: Mac = Mac([1, 0x80, 0xc2, 0, 0, 0x0e]);
const RESERVED: Mac = Mac([1, 0x80, 0xc2, 0, 0, 0x03]);

/// One of those who take part.
#[derive(Clone, Copy)]
struct Party {
    mac: Mac,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    local: Ipv6Addr,
}

fn party(result: &Value) -> Party {
    let address = |n: usize| result["ips"][n]["address"].as_str().unwrap().split('/').next().unwrap();
    let interfaces = result["interfaces"].as_array().unwrap();
    let mac: Mac = interfaces.last().unwrap()["mac"].as_str().unwrap().parse().unwrap();
    Party { mac, v4: address(0).parse().unwrap(), v6: address(1).parse().unwrap(), local: mac.link_local() }
}

/// A node with two pods, and another node beyond it.
struct Node {
    /// The pod that forges.
    a: Party,
    /// A pod whose addresses are forged.
    b: Party,
    /// The node, as pods see it: the bridge with the gateway addresses.
    host: Party,
    attacker: Wire,
    victims: Vec<(&'static str, Wire)>,
    sockets: [(&'static str, UdpSocket); 2],
}

const BEYOND4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

impl Node {
    /// Enters a laboratory and makes it, with a bridge.
    fn new(protected: bool) -> Node {
        Node::with_datapath(protected, "bridge")
    }

    fn with_datapath(protected: bool, datapath: &str) -> Node {
        lab::enter();
        lab::blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
        let conf = with(cluster_conf(), json!({"antiSpoofing": protected, "datapath": datapath}));
        netns("beyond");
        // With br_netfilter the kernel cuts off what is behind a packet's end, and with it our marks.
        sh("for f in /proc/sys/net/bridge/bridge-nf-call-*; do echo 0 >$f; done; \
            sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1; \
            ip link add up0 type veth peer name eth0 netns beyond; ip addr add 192.0.2.1/24 dev up0; \
            ip link set up0 up; ip -n beyond addr add 192.0.2.2/24 dev eth0; ip -n beyond link set eth0 up");
        let (result, b) = (add("a", &conf), party(&add("b", &conf)));
        let a = party(&result);
        // A forged packet is answered to somebody: the neighbour must be known.
        sh("ip -n beyond route add default via 192.0.2.1; ip netns exec beyond busybox ping -c1 192.0.2.1");
        // What pods know as their gateway is the bridge, or the other end of their own link: the first listed.
        let mac: Mac = result["interfaces"][0]["mac"].as_str().unwrap().parse().unwrap();
        let host = Party {
            mac,
            v4: [10, 244, 3, 1].into(),
            v6: "fd00:10:244:3::1".parse().unwrap(),
            local: mac.link_local(),
        };
        let listen = |address: &str| {
            let socket = UdpSocket::bind((address, PORT)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let mut victims = vec![("a pod", Wire::of_pod("b")), ("another node", Wire::of_pod("beyond"))];
        if datapath == "bridge" {
            victims.push(("the host", Wire::of_host("cni0")));
        }
        Node {
            a,
            b,
            host,
            attacker: Wire::of_pod("a"),
            victims,
            sockets: [
                ("the host's IPv4", listen("0.0.0.0")),
                ("the host's IPv6", listen("fd00:10:244:3::1")),
            ],
        }
    }

    /// Sends these frames from pod `a`, each marked, and says whom each one reached.
    fn send(&self, frames: &[Frame]) -> Vec<BTreeSet<&'static str>> {
        let mut reached = vec![BTreeSet::new(); frames.len()];
        for (number, frame) in frames.iter().enumerate() {
            self.attacker.send(&(frame.build)(self, &tag(number)));
        }
        // Frames on one way do not overtake each other: when these are there, nothing else is to come.
        let last = tag(usize::MAX >> 16);
        let everywhere = udp4(self.a.v4, Ipv4Addr::BROADCAST, PORT, &last);
        self.attacker.send(&ethernet(BROADCAST, self.a.mac, IPV4, &everywhere));
        for to in [self.host.v4, self.b.v4, BEYOND4] {
            let packet = udp4(self.a.v4, to, PORT, &last);
            self.attacker.send(&ethernet(self.host.mac, self.a.mac, IPV4, &packet));
        }
        let mut waiting: BTreeSet<&str> = self.victims.iter().map(|(who, _)| *who).collect();
        waiting.insert(self.sockets[0].0);
        let mut note = |who: &'static str, bytes: &[u8]| {
            if bytes.ends_with(&last) {
                waiting.remove(who);
            }
            let number = (0..frames.len()).find(|n| bytes.ends_with(&tag(*n)));
            if let Some(number) = number {
                reached[number].insert(who);
            }
            waiting.is_empty()
        };
        lab::eventually("the last frames arrive", || {
            let mut done = false;
            for (who, wire) in &self.victims {
                while let Some(frame) = wire.next() {
                    done = note(who, &frame);
                }
            }
            for (who, socket) in &self.sockets {
                while let Some(data) = next_datagram(socket) {
                    done = note(who, &data);
                }
            }
            done
        });
        reached
    }
}

/// What marks a frame at its very end.
fn tag(number: usize) -> [u8; 8] {
    (0x7a67_0000_0000_0000 | number as u64).to_be_bytes()
}

/// A frame that pod `a` sends.
struct Frame {
    name: &'static str,
    build: Box<Build>,
}

/// Makes a frame, with that mark.
type Build = dyn Fn(&Node, &[u8]) -> Vec<u8>;

/// A frame around a packet, marked behind its end if the packet itself is not.
fn frame(name: &'static str, build: impl Fn(&Node, &[u8]) -> Vec<u8> + 'static) -> Frame {
    let marked = move |node: &Node, tag: &[u8]| {
        let mut frame = build(node, tag);
        if !frame.ends_with(tag) {
            frame.extend(tag);
        }
        frame
    };
    Frame { name, build: Box::new(marked) }
}

/// IPv4 from that address to the host, in a frame from that hardware address.
fn packet4(n: &Node, mac: Mac, from: Ipv4Addr, tag: &[u8]) -> Vec<u8> {
    ethernet(n.host.mac, mac, IPV4, &udp4(from, n.host.v4, PORT, tag))
}

fn packet6(n: &Node, mac: Mac, from: Ipv6Addr, tag: &[u8]) -> Vec<u8> {
    ethernet(n.host.mac, mac, IPV6, &udp6(from, n.host.v6, PORT, tag))
}

/// An ICMPv6 message to all on the link.
fn message6(mac: Mac, from: Ipv6Addr, kind: u8, body: &[u8]) -> Vec<u8> {
    ethernet(BROADCAST, mac, IPV6, &ipv6(from, ALL_NODES, 58, &icmp6(from, ALL_NODES, kind, body)))
}

/// The same behind an extension header (8 bytes, whose first is the next header).
fn message6_behind(header: u8, rest: [u8; 7], from: Party, kind: u8, body: &[u8]) -> Vec<u8> {
    let message = icmp6(from.local, ALL_NODES, kind, body);
    let payload = [&[58], &rest[..], &message].concat();
    ethernet(BROADCAST, from.mac, IPV6, &ipv6(from.local, ALL_NODES, header, &payload))
}

const SOLICIT: u8 = 135;
const ADVERTISE: u8 = 136;

fn legitimate() -> Vec<Frame> {
    let nowhere = Ipv6Addr::UNSPECIFIED;
    vec![
        frame("IPv4 to the host", |n, t| packet4(n, n.a.mac, n.a.v4, t)),
        frame("IPv4 to another node", |n, t| {
            ethernet(n.host.mac, n.a.mac, IPV4, &udp4(n.a.v4, BEYOND4, PORT, t))
        }),
        frame("IPv4 to a pod", |n, t| ethernet(n.b.mac, n.a.mac, IPV4, &udp4(n.a.v4, n.b.v4, PORT, t))),
        frame("IPv6 to the host", |n, t| packet6(n, n.a.mac, n.a.v6, t)),
        frame("IPv6 from the link-local address", |n, t| packet6(n, n.a.mac, n.a.local, t)),
        frame("a later fragment of a large ping", |n, t| {
            let fragment = [&[58, 0, 0x05, 0xa8, 0, 0, 0, 1][..], &[0; 24], t].concat();
            ethernet(n.host.mac, n.a.mac, IPV6, &ipv6(n.a.v6, n.host.v6, 44, &fragment))
        }),
        frame("an ARP request", |n, _| {
            ethernet(BROADCAST, n.a.mac, ARP, &arp(1, (n.a.mac, n.a.v4), (Mac([0; 6]), n.host.v4)))
        }),
        frame("an ARP answer", |n, _| {
            ethernet(n.b.mac, n.a.mac, ARP, &arp(2, (n.a.mac, n.a.v4), (n.b.mac, n.b.v4)))
        }),
        frame("an ARP announcement", |n, _| {
            ethernet(BROADCAST, n.a.mac, ARP, &arp(1, (n.a.mac, n.a.v4), (Mac([0; 6]), n.a.v4)))
        }),
        frame("an ARP probe for the pod's own address", |n, _| {
            let sender = (n.a.mac, Ipv4Addr::UNSPECIFIED);
            ethernet(BROADCAST, n.a.mac, ARP, &arp(1, sender, (Mac([0; 6]), n.a.v4)))
        }),
        frame("a solicitation", |n, _| {
            message6(n.a.mac, n.a.v6, SOLICIT, &about(n.b.v6, &[&option(1, n.a.mac)]))
        }),
        frame("a solicitation without option", |n, _| {
            message6(n.a.mac, n.a.local, SOLICIT, &about(n.b.v6, &[]))
        }),
        frame("a test for duplicates of the leased address", move |n, _| {
            message6(n.a.mac, nowhere, SOLICIT, &about(n.a.v6, &[]))
        }),
        frame("a test for duplicates of the link-local address, with nonce", move |n, _| {
            message6(n.a.mac, nowhere, SOLICIT, &about(n.a.local, &[&[14, 1, 1, 2, 3, 4, 5, 6]]))
        }),
        frame("an advertisement", |n, _| {
            message6(n.a.mac, n.a.v6, ADVERTISE, &about(n.a.v6, &[&option(2, n.a.mac)]))
        }),
        frame("an advertisement of the leased from the link-local address", |n, _| {
            message6(n.a.mac, n.a.local, ADVERTISE, &about(n.a.v6, &[&option(2, n.a.mac)]))
        }),
        frame("an advertisement without option", |n, _| {
            message6(n.a.mac, n.a.v6, ADVERTISE, &about(n.a.local, &[]))
        }),
        frame("a multicast report from nowhere", move |n, _| message6(n.a.mac, nowhere, 143, &[0; 4])),
        frame("a multicast report", |n, _| message6(n.a.mac, n.a.local, 143, &[0; 4])),
        frame("a ping", |n, _| message6(n.a.mac, n.a.v6, 128, &[0; 4])),
    ]
}

/// Forgeries that have to pass the bridge.
fn forged() -> Vec<Frame> {
    let nowhere = Ipv6Addr::UNSPECIFIED;
    let mut frames = vec![
        // IPv4.
        frame("IPv4 from another pod's address", |n, t| packet4(n, n.a.mac, n.b.v4, t)),
        frame("IPv4 from the gateway's address", |n, t| packet4(n, n.a.mac, n.host.v4, t)),
        frame("IPv4 from a stranger's address", |n, t| packet4(n, n.a.mac, STRANGER4, t)),
        frame("IPv4 from a stranger's address to another node", |n, t| {
            ethernet(n.host.mac, n.a.mac, IPV4, &udp4(STRANGER4, BEYOND4, PORT, t))
        }),
        frame("IPv4 from a stranger's address to a pod", |n, t| {
            ethernet(n.b.mac, n.a.mac, IPV4, &udp4(STRANGER4, n.b.v4, PORT, t))
        }),
        frame("DHCP", |n, t| {
            let discover = ipv4(Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, 17, &udp(68, 67, t));
            ethernet(BROADCAST, n.a.mac, IPV4, &discover)
        }),
        frame("IPv4 from a link-local address", |n, t| packet4(n, n.a.mac, [169, 254, 1, 1].into(), t)),
        frame("IPv4 cut off before its source", |n, t| {
            ethernet(BROADCAST, n.a.mac, IPV4, &[&[0x45, 0, 0, 20], t].concat())
        }),
        // The Ethernet source.
        frame("another pod's hardware address", |n, t| packet4(n, n.b.mac, n.a.v4, t)),
        frame("the host's hardware address", |n, t| {
            ethernet(BROADCAST, n.host.mac, IPV4, &udp4(n.a.v4, n.host.v4, PORT, t))
        }),
        frame("a stranger's hardware address", |n, t| packet4(n, STRANGER, n.a.v4, t)),
        frame("hardware and IP address of another pod", |n, t| packet4(n, n.b.mac, n.b.v4, t)),
        // ARP.
        frame("an ARP request as another pod", |n, _| {
            ethernet(BROADCAST, n.a.mac, ARP, &arp(1, (n.a.mac, n.b.v4), (Mac([0; 6]), n.host.v4)))
        }),
        frame("an ARP answer as the gateway", |n, _| {
            ethernet(BROADCAST, n.a.mac, ARP, &arp(2, (n.a.mac, n.host.v4), (n.b.mac, n.b.v4)))
        }),
        frame("an ARP announcement of the gateway", |n, _| {
            ethernet(BROADCAST, n.a.mac, ARP, &arp(1, (n.a.mac, n.host.v4), (Mac([0; 6]), n.host.v4)))
        }),
        frame("an ARP answer with another's hardware address", |n, _| {
            ethernet(n.host.mac, n.a.mac, ARP, &arp(2, (n.b.mac, n.a.v4), (n.host.mac, n.host.v4)))
        }),
        frame("an ARP answer from another's hardware address", |n, _| {
            ethernet(n.host.mac, n.b.mac, ARP, &arp(2, (n.a.mac, n.a.v4), (n.host.mac, n.host.v4)))
        }),
        frame("an ARP probe for another pod's address", |n, _| {
            let sender = (n.a.mac, Ipv4Addr::UNSPECIFIED);
            ethernet(BROADCAST, n.a.mac, ARP, &arp(1, sender, (Mac([0; 6]), n.b.v4)))
        }),
        frame("ARP of another length of addresses", |n, _| {
            let mut packet = arp(2, (n.a.mac, n.a.v4), (n.b.mac, n.b.v4));
            packet[4] = 8;
            ethernet(BROADCAST, n.a.mac, ARP, &packet)
        }),
        // IPv6.
        frame("IPv6 from another pod's address", |n, t| packet6(n, n.a.mac, n.b.v6, t)),
        frame("IPv6 from another pod's link-local address", |n, t| packet6(n, n.a.mac, n.b.local, t)),
        frame("IPv6 from the host's link-local address", |n, t| packet6(n, n.a.mac, n.host.local, t)),
        frame("IPv6 from another pod's hardware address", |n, t| packet6(n, n.b.mac, n.a.v6, t)),
        frame("IPv6 from nowhere", move |n, t| packet6(n, n.a.mac, nowhere, t)),
        frame("a ping from another pod's address", |n, _| message6(n.a.mac, n.b.v6, 128, &[0; 4])),
        frame("a ping from nowhere", move |n, _| message6(n.a.mac, nowhere, 128, &[0; 4])),
        frame("a multicast report of another pod", |n, _| message6(n.a.mac, n.b.local, 143, &[0; 4])),
        frame("a multicast report from another's hardware address", move |n, _| {
            message6(n.b.mac, nowhere, 143, &[0; 4])
        }),
        // Neighbour discovery.
        frame("an advertisement of another pod's address", |n, _| {
            message6(n.a.mac, n.a.v6, ADVERTISE, &about(n.b.v6, &[&option(2, n.a.mac)]))
        }),
        frame("an advertisement of the gateway without option", |n, _| {
            message6(n.a.mac, n.a.local, ADVERTISE, &about(n.host.v6, &[]))
        }),
        frame("an advertisement as the gateway", |n, _| {
            message6(n.a.mac, n.host.v6, ADVERTISE, &about(n.host.v6, &[&option(2, n.a.mac)]))
        }),
        frame("an advertisement with another's hardware address", |n, _| {
            message6(n.a.mac, n.a.v6, ADVERTISE, &about(n.a.v6, &[&option(2, n.host.mac)]))
        }),
        frame("an advertisement with another's hardware address as second option", |n, _| {
            let options = [option(2, n.a.mac), option(2, n.host.mac)];
            message6(n.a.mac, n.a.v6, ADVERTISE, &about(n.a.v6, &[&options[0], &options[1]]))
        }),
        frame("an advertisement behind destination options", |n, _| {
            let body = about(n.b.v6, &[&option(2, n.a.mac)]);
            message6_behind(60, [0, 1, 4, 0, 0, 0, 0], n.a, ADVERTISE, &body)
        }),
        frame("an advertisement in a fragment of its own", |n, _| {
            let body = about(n.b.v6, &[&option(2, n.a.mac)]);
            message6_behind(44, [0, 0, 0, 0, 0, 0, 1], n.a, ADVERTISE, &body)
        }),
        frame("an advertisement in the first fragment", |n, _| {
            let body = about(n.b.v6, &[]);
            message6_behind(44, [0, 0, 1, 0, 0, 0, 1], n.a, ADVERTISE, &body)
        }),
        frame("a solicitation as another pod", |n, _| {
            message6(n.a.mac, n.b.v6, SOLICIT, &about(n.host.v6, &[&option(1, n.a.mac)]))
        }),
        frame("a solicitation with another's hardware address", |n, _| {
            message6(n.a.mac, n.a.v6, SOLICIT, &about(n.host.v6, &[&option(1, n.b.mac)]))
        }),
        frame("a test for duplicates of another pod's address", move |n, _| {
            message6(n.a.mac, nowhere, SOLICIT, &about(n.b.v6, &[]))
        }),
        frame("a test for duplicates from another's hardware address", move |n, _| {
            message6(n.b.mac, nowhere, SOLICIT, &about(n.a.v6, &[]))
        }),
        frame("a router's advertisement", |n, _| message6(n.a.mac, n.a.local, 134, &[0; 12])),
        frame("a redirect", |n, _| message6(n.a.mac, n.a.local, 137, &[0; 36])),
    ];
    // The pod's own packet, and a forged one, in anything but plain Ethernet.
    for (name, ether_type, inner) in [
        ("priority-tagged", 0x8100, None),
        ("VLAN", 0x8100, Some(5)),
        ("provider-tagged", 0x88a8, None),
        ("PPPoE", 0x8864, None),
        ("MPLS", 0x8847, None),
        ("RARP", 0x8035, None),
        ("LLC", 0x0030, None),
        ("experimental", 0x88b5, None),
    ] {
        frames.push(frame(name, move |n, t| {
            let packet = udp4(n.b.v4, n.host.v4, PORT, t);
            ethernet(BROADCAST, n.a.mac, ether_type, &tagged(inner.unwrap_or(0), IPV4, &packet))
        }));
    }
    frames.push(frame("priority-tagged twice", |n, t| {
        let packet = tagged(0, IPV4, &udp4(n.b.v4, n.host.v4, PORT, t));
        ethernet(BROADCAST, n.a.mac, 0x8100, &tagged(0, 0x8100, &packet))
    }));
    frames.push(frame("the pod's own packet, priority-tagged as ARP", |n, t| {
        let packet = udp4(n.a.v4, n.host.v4, PORT, t);
        ethernet(BROADCAST, n.a.mac, 0x8100, &tagged(0, IPV4, &packet))
    }));
    frames.push(frame("an ARP answer, priority-tagged", |n, _| {
        let answer = arp(2, (n.a.mac, n.host.v4), (n.b.mac, n.b.v4));
        ethernet(BROADCAST, n.a.mac, 0x8100, &tagged(0, ARP, &answer))
    }));
    frames
}

/// Forgeries that do not come to the bridge's hooks.
fn past_the_bridge() -> Vec<Frame> {
    let mut frames = Vec::new();
    for (name4, name6, to) in [
        ("IPv4 to LLDP's address", "IPv6 to LLDP's address", LLDP),
        ("IPv4 to a reserved address", "IPv6 to a reserved address", RESERVED),
    ] {
        frames.push(frame(name4, move |n, t| ethernet(to, n.a.mac, IPV4, &udp4(n.b.v4, n.host.v4, PORT, t))));
        frames.push(frame(name6, move |n, t| ethernet(to, n.a.mac, IPV6, &udp6(n.b.v6, n.host.v6, PORT, t))));
    }
    frames
}

fn told(frames: &[Frame], reached: &[BTreeSet<&'static str>], arrived: bool) -> Vec<String> {
    let all = frames.iter().zip(reached).filter(|(_, who)| who.is_empty() != arrived);
    all.map(|(frame, who)| format!("{}: {who:?}", frame.name)).collect()
}

#[test]
fn what_a_pod_forges_reaches_nobody_and_what_is_its_own_goes_through() {
    let node = Node::new(true);
    let (own, forged) =
        (legitimate(), [forged(), past_the_bridge()].into_iter().flatten().collect::<Vec<_>>());
    let reached = node.send(&own);
    assert_eq!(told(&own, &reached, false), Vec::<String>::new(), "its own, and lost");
    let before = refused();
    let reached = node.send(&forged);
    assert_eq!(told(&forged, &reached, true), Vec::<String>::new(), "forged, and arrived");
    assert!(refused() - before >= forged.len() as u64, "each is counted");
}

#[test]
fn without_protection_each_forgery_arrives() {
    let node = Node::new(false);
    let forged: Vec<Frame> = [forged(), past_the_bridge()].into_iter().flatten().collect();
    let reached = node.send(&forged);
    assert_eq!(told(&forged, &reached, false), Vec::<String>::new(), "forged, and lost");
    assert!(lab::pod_elements().is_empty());
}

/// Forgeries of IP, from the pod's link to the host's IP layer: all that matters where there is no bridge.
fn forged_to_the_host() -> Vec<Frame> {
    let nowhere = Ipv6Addr::UNSPECIFIED;
    vec![
        frame("IPv4 from another pod's address", |n, t| packet4(n, n.a.mac, n.b.v4, t)),
        frame("IPv4 from a stranger's address", |n, t| packet4(n, n.a.mac, STRANGER4, t)),
        frame("IPv4 from a stranger's hardware and IP address", |n, t| packet4(n, STRANGER, STRANGER4, t)),
        frame("IPv4 from a stranger's address to another node", |n, t| {
            ethernet(n.host.mac, n.a.mac, IPV4, &udp4(STRANGER4, BEYOND4, PORT, t))
        }),
        frame("IPv4 from a stranger's address to a pod", |n, t| {
            ethernet(n.host.mac, n.a.mac, IPV4, &udp4(STRANGER4, n.b.v4, PORT, t))
        }),
        frame("IPv4 from a stranger's address, broadcast", |n, t| {
            ethernet(BROADCAST, n.a.mac, IPV4, &udp4(STRANGER4, n.host.v4, PORT, t))
        }),
        frame("IPv4 from a stranger's address, priority-tagged", |n, t| {
            let packet = udp4(STRANGER4, n.host.v4, PORT, t);
            ethernet(n.host.mac, n.a.mac, 0x8100, &tagged(0, IPV4, &packet))
        }),
        frame("IPv6 from another pod's address", |n, t| packet6(n, n.a.mac, n.b.v6, t)),
        frame("IPv6 from another pod's link-local address", |n, t| packet6(n, n.a.mac, n.b.local, t)),
        frame("IPv6 from nowhere", move |n, t| packet6(n, n.a.mac, nowhere, t)),
        frame("IPv6 from a stranger's address to a pod", |n, t| {
            let stranger = "2001:db8::9".parse().unwrap();
            ethernet(n.host.mac, n.a.mac, IPV6, &udp6(stranger, n.b.v6, PORT, t))
        }),
    ]
}

#[test]
fn without_a_bridge_the_host_takes_only_a_pods_own_packets_from_its_link() {
    for protected in [true, false] {
        std::thread::spawn(move || {
            let node = Node::with_datapath(protected, "routed");
            let own = vec![
                frame("IPv4 to the host", |n, t| packet4(n, n.a.mac, n.a.v4, t)),
                frame("IPv4 to a pod", |n, t| {
                    ethernet(n.host.mac, n.a.mac, IPV4, &udp4(n.a.v4, n.b.v4, PORT, t))
                }),
                frame("IPv4 to another node", |n, t| {
                    ethernet(n.host.mac, n.a.mac, IPV4, &udp4(n.a.v4, BEYOND4, PORT, t))
                }),
                frame("IPv6 to the host", |n, t| packet6(n, n.a.mac, n.a.v6, t)),
                frame("IPv6 from the link-local address", |n, t| packet6(n, n.a.mac, n.a.local, t)),
            ];
            let reached = node.send(&own);
            assert_eq!(told(&own, &reached, false), Vec::<String>::new(), "its own, and lost");
            let forged = forged_to_the_host();
            let reached = node.send(&forged);
            assert_eq!(told(&forged, &reached, protected), Vec::<String>::new(), "protected: {protected}");
            for id in ["a", "b"] {
                assert!(lab::ping(id, "10.244.3.1") && lab::ping(id, "fd00:10:244:3::1"));
                Plat::call("DEL", id, &cluster_conf()).run().silent();
            }
            lab::assert_nothing_left();
        })
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }
}

#[test]
fn a_forged_hardware_address_does_not_draw_anothers_frames() {
    let node = Node::new(true);
    let ports = || sh("bridge fdb show br cni0 | grep -v permanent | cut -d' ' -f1,3 | sort");
    let before = ports();
    let mine = format!("{} ", node.b.mac);
    assert!(before.contains(&mine), "{before}");
    for to in [LLDP, RESERVED, BROADCAST, node.host.mac] {
        node.attacker.send(&ethernet(to, node.b.mac, 0x88cc, &[0; 46]));
    }
    // Nothing that the other pod would answer: its answer would teach the bridge the truth again.
    let last = udp4(node.a.v4, Ipv4Addr::BROADCAST, PORT, &tag(1));
    node.attacker.send(&ethernet(BROADCAST, node.a.mac, IPV4, &last));
    let (_, host) = node.victims.iter().find(|(who, _)| *who == "the host").unwrap();
    lab::eventually("the last frame arrives", || host.next().is_some_and(|frame| frame.ends_with(&tag(1))));
    assert_eq!(ports(), before, "the bridge has learnt nothing");
}

#[test]
fn a_bridge_that_was_there_before_learns_nothing_from_reserved_addresses_either() {
    lab::enter();
    sh("ip link add name cni0 type bridge");
    lab::blocks(&["10.244.3.0/24"]);
    add("a", &cluster_conf());
    let link = lab::json_of("ip -d -j link show cni0");
    assert_eq!(link[0]["linkinfo"]["info_data"]["no_linklocal_learn"], 1, "{link}");
}

#[test]
fn neighbours_of_the_host_stay_as_they_are() {
    let node = Node::new(true);
    let neighbours = || sh("ip neigh show dev cni0 | cut -d' ' -f1-3 | sort");
    let know = |id: &str| assert!(lab::ping(id, "10.244.3.1") && lab::ping(id, "fd00:10:244:3::1"));
    know("a");
    know("b");
    let before = neighbours();
    let forged = forged();
    let _ = node.send(&forged);
    let after: BTreeSet<String> = neighbours().lines().map(str::to_owned).collect();
    let before: BTreeSet<String> = before.lines().map(str::to_owned).collect();
    // A link-local neighbour may come to be known; none that was known may be another now.
    assert!(after.is_superset(&before), "{before:?} became {after:?}");
    let macs: BTreeSet<String> = [node.a.mac, node.b.mac].map(|mac| mac.to_string()).into();
    assert!(after.iter().all(|line| macs.iter().any(|mac| line.ends_with(mac.as_str()))), "{after:?}");
}

#[test]
fn by_hand_macspoofchk_holds_a_pod_to_its_hardware_address_alone() {
    for checked in [true, false] {
        std::thread::spawn(move || {
            lab::enter();
            let ranges = json!([[{"subnet": "10.22.0.0/24"}], [{"subnet": "fd00:22::/64"}]]);
            let conf = with(hand_conf(), json!({"macspoofchk": checked, "ipam": {"ranges": ranges}}));
            let a = party(&add("a", &conf));
            let b = party(&add("b", &conf));
            let (attacker, victim) = (Wire::of_pod("a"), Wire::of_pod("b"));
            attacker.send(&ethernet(BROADCAST, STRANGER, IPV4, &udp4(a.v4, b.v4, PORT, &tag(1))));
            attacker.send(&ethernet(BROADCAST, a.mac, IPV4, &udp4(STRANGER4, b.v4, PORT, &tag(2))));
            let mut seen = BTreeSet::new();
            lab::eventually("the second frame arrives", || {
                while let Some(frame) = victim.next() {
                    seen.extend((1..3).filter(|n| frame.ends_with(&tag(*n))));
                }
                seen.contains(&2)
            });
            assert_eq!(seen.contains(&1), !checked);
            assert_eq!(lab::pod_elements().is_empty(), !checked);
            for id in ["a", "b"] {
                Plat::call("DEL", id, &conf).run().silent();
            }
            lab::assert_nothing_left();
        })
        .join()
        .unwrap();
    }
}

#[test]
fn a_requested_hardware_address_is_the_pods_own() {
    lab::enter();
    lab::blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    netns("a");
    let result = Plat::call("ADD", "a", &cluster_conf()).set("CNI_ARGS", "MAC=02:11:22:33:44:55").result();
    assert_eq!(party(&result).mac.to_string(), "02:11:22:33:44:55");
    assert!(lab::ping("a", "10.244.3.1") && lab::ping("a", "fd00:10:244:3::1"));
}

#[test]
fn a_pod_cannot_send_before_it_is_looked_at() {
    lab::enter();
    lab::blocks(&["10.244.3.0/24"]);
    for (point, stands) in [("attached", false), ("rules", true)] {
        netns(point);
        let call = Plat::call("ADD", point, &cluster_conf());
        assert!(!call.set("PLAT_FAIL", &format!("{point}:kill")).run().success);
        let link = lab::json_of(&format!("ip -n {point} -j addr show eth0"));
        assert_eq!(link[0]["operstate"], "DOWN", "{point}");
        assert_eq!(!lab::pod_elements().is_empty(), stands, "{point}");
        Plat::call("DEL", point, &cluster_conf()).run().silent();
        lab::assert_nothing_left();
    }
}

#[test]
fn a_hundred_pods_have_the_rules_of_one() {
    lab::enter();
    lab::blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    let rules = || {
        let ruleset = lab::json_of("nft -j list ruleset");
        ruleset["nftables"].as_array().unwrap().iter().filter(|o| o.get("rule").is_some()).count()
    };
    add("c0", &cluster_conf());
    let (with_one, elements) = (rules(), lab::pod_elements());
    (1..100).for_each(|n| drop(add(&format!("c{n}"), &cluster_conf())));
    assert_eq!(rules(), with_one);
    for n in 1..100 {
        Plat::call("DEL", &format!("c{n}"), &cluster_conf()).run().silent();
    }
    assert_eq!(lab::pod_elements(), elements, "nothing is left of the others");
}

#[test]
fn a_check_finds_what_is_missing() {
    lab::enter();
    lab::blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    let result = add("a", &cluster_conf());
    let check = || Plat::call("CHECK", "a", &with(cluster_conf(), json!({"prevResult": result}))).run();
    check().silent();
    // An administrator who saves the rules can load them again.
    sh("(echo flush ruleset; nft list ruleset) >/run/ruleset; nft -c -f /run/ruleset");
    // Without counters: the pod may send something while its elements are away.
    let before = sh("nft -s list ruleset");
    for (damage, named) in [
        ("nft flush set bridge plat-pods own4", "own4"),
        ("nft flush set bridge plat-pods own6", "own6"),
        ("nft flush map bridge plat-pods ports", "ports"),
        ("nft flush set inet plat-pods links", "links"),
        ("nft flush chain bridge plat-pods advertisement", "advertisement"),
        ("nft delete table bridge plat-pods", "bridge plat-pods"),
    ] {
        sh(damage);
        let error = check().error(105);
        assert!(error.contains(named), "{damage}: {error}");
        lab::restore();
        assert_eq!(sh("nft -s list ruleset"), before, "{damage}");
        check().silent();
    }
}

#[test]
fn a_check_says_that_a_changed_hardware_address_cuts_the_pod_off() {
    lab::enter();
    lab::blocks(&["10.244.3.0/24"]);
    let mut result = add("a", &cluster_conf());
    // As a chained tuning does it, and tells it.
    sh("ip -n a link set eth0 address 02:00:00:00:00:77");
    result["interfaces"][2]["mac"] = json!("02:00:00:00:00:77");
    let error =
        Plat::call("CHECK", "a", &with(cluster_conf(), json!({"prevResult": result}))).run().error(105);
    assert!(error.contains("02:00:00:00:00:77") && error.contains("antiSpoofing"), "{error}");
}

#[test]
fn who_is_looked_at_is_known_again_after_the_lease_store_is_lost() {
    lab::enter();
    lab::blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    add("a", &cluster_conf());
    let by_hand = with(hand_conf(), json!({"bridge": "hand0"}));
    add("m", &with(by_hand.clone(), json!({"macspoofchk": true})));
    add("n", &by_hand);
    let guards = || {
        let mut all: Vec<String> =
            lab::leases().iter().map(|l| format!("{} {}", l["containerID"], l["guard"])).collect();
        all.sort();
        all
    };
    let before = guards();
    assert!(before[0].contains("addresses") && before[1].contains("hardware"), "{before:?}");
    std::fs::remove_file("/run/plat/leases").unwrap();
    add("next", &with(cluster_conf(), json!({"antiSpoofing": false})));
    let after = guards();
    assert_eq!(after[..3], before[..]);
    let elements = lab::pod_elements();
    for id in ["a", "m", "n", "next"] {
        Plat::call("DEL", id, &cluster_conf()).run().silent();
    }
    assert!(!elements.is_empty());
    lab::assert_nothing_left();
}

/// Frames that were dropped.
fn refused() -> u64 {
    let ruleset = lab::json_of("nft -j list ruleset");
    let rules = ruleset["nftables"].as_array().unwrap().iter().filter_map(|o| o.get("rule"));
    let counters = rules.flat_map(|r| r["expr"].as_array().unwrap().clone());
    counters.filter_map(|e| e["counter"]["packets"].as_u64()).sum()
}

#[test]
fn a_guard_outlives_bridge_store_and_tables_together() {
    lab::enter();
    for datapath in ["bridge", "routed"] {
        let conf = with(cluster_conf(), json!({"datapath": datapath, "antiSpoofing": true}));
        lab::blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
        add(datapath, &conf);
    }
    let sorted = || {
        let mut elements = lab::pod_elements();
        elements.sort();
        (lab::leases().iter().map(|lease| lease["guard"].clone()).collect::<Vec<_>>(), elements)
    };
    let before = sorted();
    assert!(before.0.len() == 2 && before.0.iter().all(Value::is_object), "{before:?}");
    // The store goes as one whose header cannot be read: who only looks makes none anew.
    sh("ip link del cni0; nft flush ruleset; echo garbage > /run/plat/leases");
    lab::restore();
    assert_eq!(sorted(), before);
}

#[test]
fn a_store_is_not_rebuilt_while_nftables_cannot_be_asked() {
    lab::enter();
    lab::blocks(&["10.244.3.0/24"]);
    add("a", &cluster_conf());
    let mut kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
    let before = kernel.held().unwrap();
    assert_eq!(before.len(), 1);
    // Netfilter wants this right also of who only reads, links do not.
    let whole = capabilities(None).unwrap();
    let effective = whole.effective - CapabilitySet::NET_ADMIN;
    set_capabilities(None, CapabilitySets { effective, ..whole }).unwrap();
    let refused = kernel.held();
    set_capabilities(None, whole).unwrap();
    let error = refused.unwrap_err();
    assert_eq!(error.errno(), Some(Errno::PERM));
    assert!(error.to_string().contains("list nftables tables"), "{error}");
    assert_eq!(kernel.held().unwrap().len(), 1);
}
