//! The links that pods' packets pass on this node, by the kernel's routes, and the packets that are judged.

use std::collections::BTreeSet;

use plat_cni::link;
use plat_cni::netlink::{Error, Socket};
use plat_crds::block::{Block, Family};
use plat_crds::lease::Datapath;
use plat_crds::names::VETH_PREFIX;

use super::packet::{Connection, Link, Packet, Peer, Traffic, other_pod, pod, world};
use crate::fabric::Admit;
use crate::kernel::route;

/// The link of a pod that does not exist, or of the bridge before it does: no rule knows its index.
const NO_INDEX: u32 = i32::MAX as u32;

/// What is judged, and what its words are about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scene {
    /// Name of the pods' bridge.
    pub bridge: String,
    /// Whether pods are joined by it, and not by links of their own.
    pub is_bridged: bool,
    /// Ranges of pods' addresses, for commands that admit them.
    pub ranges: Vec<Block>,
    /// The packets.
    pub packets: Vec<Packet>,
}

/// Links to what pods talk to.
#[derive(Debug, Default)]
struct Links {
    bridge: Option<Link>,
    peers: Vec<(Block, Link)>,
    world: Vec<(Family, Link)>,
}

impl Scene {
    /// Asks the kernel for the links: of the bridge, to each of `peers` (blocks of other nodes), to the world.
    pub fn observe(
        socket: &mut Socket,
        bridge: &str,
        wanted: &BTreeSet<Admit>,
        peers: &[Block],
        ranges: Vec<Block>,
    ) -> Result<Scene, Error> {
        let found = link::link_by_name(socket, bridge)?;
        let bridge_link = found.map(|link| Link { name: bridge.to_owned(), index: link.index });
        let mut links = Links { bridge: bridge_link, ..Links::default() };
        for peer in peers {
            links.peers.extend(out_link(socket, pod(peer))?.map(|link| (*peer, link)));
        }
        for family in Family::ALL {
            links.world.extend(out_link(socket, world(family))?.map(|link| (family, link)));
        }
        Ok(Scene {
            bridge: bridge.to_owned(),
            is_bridged: wanted.iter().any(|admit| admit.datapath == Datapath::Bridge),
            ranges,
            packets: packets(bridge, wanted, &links),
        })
    }
}

fn out_link(socket: &mut Socket, to: std::net::IpAddr) -> Result<Option<Link>, Error> {
    let Some(index) = route::device(socket, to)? else { return Ok(None) };
    Ok(link::link_by_index(socket, index)?.map(|link| Link { name: link.name, index }))
}

/// For each own block: to and from pods of other nodes, between pods of this node, to the world; each as the first
/// packet of its connection, and the answer to it.
fn packets(bridge: &str, wanted: &BTreeSet<Admit>, links: &Links) -> Vec<Packet> {
    let own: BTreeSet<(Block, Datapath)> = wanted.iter().map(|admit| (admit.block, admit.datapath)).collect();
    let mut packets = Vec::new();
    for (block, datapath) in own {
        let name = match datapath {
            Datapath::Bridge => bridge.to_owned(),
            Datapath::Routed => format!("{VETH_PREFIX}0"),
        };
        let near = match (datapath, &links.bridge) {
            (Datapath::Bridge, Some(bridge)) => bridge.clone(),
            _ => Link { name, index: NO_INDEX },
        };
        let here = (pod(&block), &near);
        let mut add = |to, from, there| {
            packets.push(Packet::new(Traffic::To(to), block, Connection::New, here, there));
            packets.push(Packet::new(Traffic::From(to), block, Connection::Established, there, here));
            if from {
                packets.push(Packet::new(Traffic::From(to), block, Connection::New, there, here));
                packets.push(Packet::new(Traffic::To(to), block, Connection::Established, here, there));
            }
        };
        add(Peer::Neighbours, false, (other_pod(&block), &near));
        for (peer, link) in links.peers.iter().filter(|(peer, _)| peer.family() == block.family()) {
            add(Peer::Pods, true, (pod(peer), link));
        }
        for (family, link) in links.world.iter().filter(|(family, _)| *family == block.family()) {
            add(Peer::World, false, (world(*family), link));
        }
    }
    packets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::Direction;

    #[test]
    fn each_kind_of_traffic_is_judged_in_its_directions_over_its_links() {
        let block = "10.244.1.0/24".parse().unwrap();
        let link = |name: &str, index| Link { name: name.into(), index };
        let links = Links {
            bridge: Some(link("cni0", 7)),
            peers: vec![
                ("10.244.2.0/24".parse().unwrap(), link("eth1", 3)),
                ("fd00:2::/64".parse().unwrap(), link("eth1", 3)),
            ],
            world: vec![(Family::IPv4, link("eth0", 2)), (Family::IPv6, link("eth0", 2))],
        };
        let shown = |datapath| {
            let wanted = [Admit { block, datapath, direction: Direction::FromPods }].into();
            let show = |p: &Packet| {
                format!("{}>{} {:?} {}", p.from_link.name, p.to_link.name, p.connection, p.traffic)
            };
            packets("cni0", &wanted, &links).iter().map(show).collect::<Vec<_>>()
        };
        assert_eq!(
            shown(Datapath::Bridge),
            [
                "cni0>cni0 New between pods of this node",
                "cni0>cni0 Established between pods of this node",
                "cni0>eth1 New from pods to pods of other nodes",
                "eth1>cni0 Established to pods from pods of other nodes",
                "eth1>cni0 New to pods from pods of other nodes",
                "cni0>eth1 Established from pods to pods of other nodes",
                "cni0>eth0 New from pods to the world",
                "eth0>cni0 Established to pods from the world",
            ]
        );
        assert!(shown(Datapath::Routed).iter().all(|line| line.contains("plat0")));
    }
}
