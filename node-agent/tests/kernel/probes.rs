//! Probes over a router, in three network namespaces: this node, the router, and a peer that answers.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use plat_agent::probe::plan::{Plan, Target};
use plat_agent::probe::schedule::Pace;
use plat_agent::probe::wire::{Served, respond};
use plat_agent::reporter::Report;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::watch;

use crate::harness::*;

const PORT: u16 = PROBE_PORT;
/// Fast, so that tests are; patient enough for a busy machine.
pub const PACE: Pace =
    Pace { round: Duration::from_millis(500), timeout: Duration::from_millis(250), per_second: 40, burst: 8 };

/// Runs `work` on a thread in the namespace of that name.
fn within<T: Send + 'static>(
    namespace: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
    std::thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    })
}

/// A node that reaches block 2 by a router, and the peer behind it with the gateways and a pod of that block.
fn world() -> TestNode {
    let mut node = TestNode::new();
    node.pace = Some(PACE);
    shell(
        "ip netns add router
        ip netns add peer
        ip link set wire0 netns router
        ip -n router addr add 172.30.0.1/24 dev wire0
        ip -n router addr add fd00:30::1/64 dev wire0 nodad
        ip -n router link set wire0 up
        ip -n router link add far type veth peer name eth0 netns peer
        ip -n router addr add 172.31.0.1/24 dev far
        ip -n router addr add fd00:31::1/64 dev far nodad
        ip -n router link set far up
        ip netns exec router sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
        ip -n router route add 10.244.1.0/24 via 172.30.0.11
        ip -n router route add fd00:10:244:1::/64 via fd00:30::b
        ip -n router route add 10.244.2.0/24 via 172.31.0.12
        ip -n router route add fd00:10:244:2::/64 via fd00:31::c
        ip -n peer addr add 172.31.0.12/24 dev eth0
        ip -n peer addr add fd00:31::c/64 dev eth0 nodad
        ip -n peer link set lo up
        ip -n peer link set eth0 up
        ip -n peer route add default via 172.31.0.1
        ip -n peer route add default via fd00:31::1
        ip -n peer addr add 10.244.2.1/32 dev lo
        ip -n peer addr add 10.244.2.7/32 dev lo
        ip -n peer addr add fd00:10:244:2::1/128 dev lo nodad
        ip -n peer addr add fd00:10:244:2::7/128 dev lo nodad",
    );
    let by_router = |block, router: &str| with_routing(block, &format!(r#"{{"nextHop":"{router}"}}"#));
    node.start();
    node.contact();
    node.list(
        vec![block(1), block_v6(1), by_router(block(2), "172.30.0.1"), by_router(block_v6(2), "fd00:30::1")],
        vec![range("default-v4"), range("default-v6")],
    );
    node
}

/// The peer's agent, as far as probes go; it ends with the test's process.
fn answer_in_peer() {
    within("peer", || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let peers = [block(1).block, block_v6(1).block];
        let targets = peers.map(|block| Target { block, ceiling: 1500, created: 0 }).into();
        let own = vec![block(2).block, block_v6(2).block];
        let (_keep, plan) = watch::channel(Arc::new(Plan { own, targets }));
        runtime.block_on(async {
            let answers = |block| respond(block, PORT, plan.clone(), Arc::<Served>::default());
            tokio::join!(answers(block(2).block), answers(block_v6(2).block));
        });
    });
}

/// The router drops packets that are longer than that, and tells nobody.
fn black_hole(longer_than: u32) {
    shell(&format!(
        "ip netns exec router nft 'add table inet hole
        add chain inet hole forward {{ type filter hook forward priority 0; }}
        flush chain inet hole forward
        add rule inet hole forward meta length > {longer_than} drop'"
    ));
}

fn path_mtus(report: &Report) -> Vec<(String, Option<i64>)> {
    let probes = report.status.probes.clone().unwrap_or_default();
    probes.big_packets_lost.into_iter().map(|path| (path.cidr, path.path_mtu)).collect()
}

/// A pod of this node, with a link as the CNI binary makes it.
fn pod() {
    shell(
        "ip netns add pod
        ip link add platpod type veth peer name eth0 netns pod
        ip link set platpod master cni0 up
        ip -n pod link set lo up
        ip -n pod link set eth0 up gso_max_segs 1
        ip -n pod addr add 10.244.1.7/32 dev eth0
        ip -n pod addr add fd00:10:244:1::7/128 dev eth0 nodad
        ip -n pod route add 10.244.1.1 dev eth0
        ip -n pod route add default via 10.244.1.1
        ip -n pod route add fd00:10:244:1::1 dev eth0
        ip -n pod route add default via fd00:10:244:1::1
        ip route add 10.244.1.7/32 dev cni0
        ip -6 route add fd00:10:244:1::7/128 dev cni0",
    );
}

/// Many packets, and less than a socket's buffer.
const BULK: usize = 20_000;

/// A pod of the peer that takes a lot and says so at the end.
fn take_in_peer(address: &str) {
    let address: SocketAddr = address.parse().unwrap();
    let (ready, listens) = mpsc::channel();
    within("peer", move || {
        let listener = TcpListener::bind(address).unwrap();
        ready.send(()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut taken = vec![0; BULK];
        if stream.read_exact(&mut taken).is_ok() {
            let _ = stream.write_all(b"!");
        }
    });
    listens.recv().unwrap();
}

/// Connects from the pod and sends a lot. Waits for the word that it came, for each of the times that are asked for, and
/// says whether it came within that.
fn send_from_pod(address: &str) -> (mpsc::Sender<Duration>, mpsc::Receiver<bool>) {
    let address: SocketAddr = address.parse().unwrap();
    let (ask, waits) = mpsc::channel();
    let (tell, told) = mpsc::channel();
    within("pod", move || {
        let mut stream = TcpStream::connect_timeout(&address, DEADLINE).unwrap();
        stream.write_all(&vec![7; BULK]).unwrap();
        while let Ok(wait) = waits.recv() {
            stream.set_read_timeout(Some(wait)).unwrap();
            let arrived = match stream.read(&mut [0]) {
                Ok(1) => true,
                Ok(_) => panic!("the connection to {address} ended"),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => false,
                Err(error) => panic!("{error}"),
            };
            tell.send(arrived).unwrap();
        }
    });
    (ask, told)
}

#[test]
fn a_black_hole_is_found_and_a_pods_connection_that_hung_in_it_goes_on() {
    isolated("probes::a_black_hole_is_found_and_a_pods_connection_that_hung_in_it_goes_on", || {
        let node = world();
        node.expect_condition("CNIReady", "True", "Installed");
        // Nobody answers yet, so nothing is corrected yet.
        node.expect_condition("PeersReachable", "Unknown", "NoResponder");
        pod();
        black_hole(1400);
        let addresses = ["10.244.2.7:9000", "[fd00:10:244:2::7]:9000"];
        addresses.iter().copied().for_each(take_in_peer);
        let senders = addresses.map(send_from_pod);
        let arrives_within = |wait| {
            senders.iter().for_each(|(ask, _)| ask.send(wait).unwrap());
            senders.each_ref().map(|(_, told)| told.recv_timeout(2 * DEADLINE).unwrap())
        };
        // The loss of a packet would be mended in a fifth of that.
        assert_eq!(arrives_within(Duration::from_secs(1)), [false, false], "both hang");

        answer_in_peer();
        let message = node.expect_condition("PeersReachable", "True", "PathMTUFound");
        assert!(message.contains("of node n2"), "{message}");
        let found = [("10.244.2.0/24", 1400), ("fd00:10:244:2::/64", 1400)]
            .map(|(cidr, mtu)| (cidr.to_owned(), Some(mtu)));
        eventually("both families", || {
            let got = path_mtus(&node.report());
            if got == found { Ok(()) } else { Err(format!("{got:?}")) }
        });
        let route = "10.244.2.0/24 gateway 172.30.0.1 dev eth0 metric 1120 mtu 1400".to_owned();
        assert!(our_routes().contains(&route), "{:?}", our_routes());
        assert_eq!(arrives_within(DEADLINE), [true, true], "both go on");

        // The same route without an MTU, once the hole is closed.
        run("ip netns exec router nft delete table inet hole");
        node.expect_condition("PeersReachable", "True", "AllAnswer");
        let route = "10.244.2.0/24 gateway 172.30.0.1 dev eth0 metric 1120".to_owned();
        eventually("the route", || {
            if our_routes().contains(&route) { Ok(()) } else { Err(format!("{:?}", our_routes())) }
        });
        assert_eq!(path_mtus(&node.report()), []);
    });
}

#[test]
fn a_peer_that_is_cut_off_is_named_and_one_that_comes_back_is_forgiven() {
    isolated("probes::a_peer_that_is_cut_off_is_named_and_one_that_comes_back_is_forgiven", || {
        let mut node = world();
        answer_in_peer();
        node.expect_condition("PeersReachable", "True", "AllAnswer");
        let report = eventually("a whole round", || {
            let probes = node.report().status.probes.unwrap_or_default();
            if probes.reachable == 2 { Ok(probes) } else { Err(format!("{probes:?}")) }
        });
        assert!(report.rtt_micros.is_some_and(|micros| micros > 0), "{report:?}");

        run("ip -n router link set far down");
        let message = node.expect_condition("PeersReachable", "False", "Unreachable");
        assert!(message.contains("of node n2"), "{message}");
        eventually("both families", || {
            let down = node.report().status.probes.unwrap_or_default().unreachable;
            if down.len() == 2 && down.iter().all(|peer| peer.reason == "NoAnswer") {
                Ok(())
            } else {
                Err(format!("{down:?}"))
            }
        });
        shell(
            "ip -n router link set far up
            ip -n router addr replace fd00:31::1/64 dev far nodad
            ip -n router route replace 10.244.2.0/24 via 172.31.0.12
            ip -n router route replace fd00:10:244:2::/64 via fd00:31::c",
        );
        node.expect_condition("PeersReachable", "True", "AllAnswer");

        // A policy's own mtu is what is checked then, and what stays in the route.
        let policy = r#"{"nextHop":"172.30.0.1","mtu":1450}"#;
        node.apply(with_routing(block(2), policy));
        black_hole(1430);
        eventually("both paths", || {
            let got = path_mtus(&node.report());
            if got.len() == 2 && got.iter().all(|(_, mtu)| *mtu == Some(1430)) {
                Ok(())
            } else {
                Err(format!("{got:?}"))
            }
        });
        let stays = "10.244.2.0/24 gateway 172.30.0.1 dev eth0 metric 1120 mtu 1450".to_owned();
        let lowered = "fd00:10:244:2::/64 gateway fd00:30::1 dev eth0 metric 1120 mtu 1430".to_owned();
        let routes = our_routes();
        assert!(routes.contains(&stays) && routes.contains(&lowered), "{routes:?}");
        let size = node.report().status.probes.unwrap().big_packets_lost[0].size;
        assert_eq!(size, 1450);
    });
}

#[test]
fn strangers_get_no_answer_and_a_flood_is_read_slowly() {
    isolated("probes::strangers_get_no_answer_and_a_flood_is_read_slowly", || {
        let node = world();
        answer_in_peer();
        node.expect_condition("PeersReachable", "True", "AllAnswer");
        let before = node.report().probes.unwrap().counters;
        let gateway = SocketAddr::new(ip("10.244.1.1"), PORT);
        let request = plat_agent::probe::packet::Request { nonce: 1, length: 100 }.encode();
        // From a pod of the peer: an address of a known block, but not its gateway.
        let (theirs, from_peer) = (request.clone(), "10.244.2.7:9000");
        let answer = within("peer", move || {
            let stranger = UdpSocket::bind(from_peer).unwrap();
            stranger.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            stranger.send_to(&theirs, gateway).unwrap();
            stranger.recv(&mut [0; 64]).map_err(|error| error.kind())
        });
        assert_eq!(answer.join().unwrap(), Err(ErrorKind::WouldBlock));
        // A peer's gateway is answered, but not a thousand times.
        let answers = within("peer", move || {
            let peer = UdpSocket::bind("10.244.2.1:0").unwrap();
            peer.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            for round in 0..1000 {
                let bytes = if round % 2 == 0 { request.as_slice() } else { b"PLTP nonsense" };
                peer.send_to(bytes, gateway).unwrap();
            }
            let mut answers = 0;
            while let Ok(length) = peer.recv(&mut [0; 64]) {
                assert_eq!(length, 16);
                answers += 1;
            }
            answers
        });
        let answers = answers.join().unwrap();
        assert!((1..=40).contains(&answers), "{answers} answers");
        eventually("what was ignored is counted", || {
            node.settled();
            let now = node.report().probes.unwrap().counters;
            let ignored = now.ignored - before.ignored;
            if ignored >= 100 { Ok(()) } else { Err(format!("{now:?}")) }
        });
        node.expect_condition("PeersReachable", "True", "AllAnswer");
    });
}

/// Sends that many packets from the pod to the gateways of its own node.
fn flood_from_pod(packets: usize) {
    let request = plat_agent::probe::packet::Request { nonce: 1, length: 100 }.encode();
    let sends = move || {
        for (from, to) in [("10.244.1.7:0", "10.244.1.1"), ("[fd00:10:244:1::7]:0", "fd00:10:244:1::1")] {
            let socket = UdpSocket::bind(from).unwrap();
            for _ in 0..packets {
                socket.send_to(&request, (ip(to), PORT)).unwrap();
            }
        }
    };
    within("pod", sends).join().unwrap();
}

/// What the table has dropped is seen by a chain that stands before it, and one that stands behind.
fn count_at_input() {
    shell(
        "nft 'add table inet seen
        add counter inet seen before
        add counter inet seen behind
        add chain inet seen first { type filter hook input priority -10; }
        add chain inet seen last { type filter hook input priority 10; }
        add rule inet seen first iifname { cni0, plat9 } udp dport 8474 counter name before
        add rule inet seen last iifname { cni0, plat9 } udp dport 8474 counter name behind'",
    );
}

fn counted(counter: &str) -> u64 {
    let listed = json(&format!("nft -j list counter inet seen {counter}"));
    listed["nftables"].as_array().unwrap().iter().find_map(|o| o["counter"]["packets"].as_u64()).unwrap()
}

#[test]
fn a_pods_flood_of_its_own_gateways_is_not_read_and_peers_are_answered() {
    isolated("probes::a_pods_flood_of_its_own_gateways_is_not_read_and_peers_are_answered", || {
        let node = world();
        answer_in_peer();
        pod();
        node.expect_condition("PeersReachable", "True", "AllAnswer");
        count_at_input();
        let before = node.report().probes.unwrap().counters;
        flood_from_pod(1000);
        assert_eq!((counted("before"), counted("behind")), (2000, 0));

        // A peer is answered nonetheless, at the port that was flooded.
        let request = plat_agent::probe::packet::Request { nonce: 1, length: 100 }.encode();
        let answer = within("peer", move || {
            let peer = UdpSocket::bind("10.244.2.1:0").unwrap();
            peer.set_read_timeout(Some(DEADLINE)).unwrap();
            peer.send_to(&request, (ip("10.244.1.1"), PORT)).unwrap();
            peer.recv(&mut [0; 64]).map_err(|error| error.kind())
        });
        assert_eq!(answer.join().unwrap(), Ok(16));
        let counters = eventually("the answer is counted", || {
            node.settled();
            let now = node.report().probes.unwrap().counters;
            if now.answers > before.answers { Ok(now) } else { Err(format!("{now:?}")) }
        });
        assert_eq!(counters.ignored, before.ignored, "nothing of the flood was read");

        // A pod without bridge, and other ports and addresses of the node.
        shell(
            "ip link set platpod nomaster
            ip link set platpod name plat9
            ip link set plat9 up
            ip -n pod neigh flush dev eth0
            ip route replace 10.244.1.7/32 dev plat9",
        );
        let to = |address: &'static str, port: u16| {
            let sends = move || UdpSocket::bind("10.244.1.7:0").unwrap().send_to(b"x", (ip(address), port));
            within("pod", sends).join().unwrap().unwrap();
        };
        let listener = UdpSocket::bind(("172.30.0.11", PORT)).unwrap();
        listener.set_read_timeout(Some(DEADLINE)).unwrap();
        to("10.244.1.1", PORT);
        to("172.30.0.11", PORT);
        assert_eq!(listener.recv(&mut [0; 8]).unwrap(), 1, "another program at the same port is reached");
        eventually("both came in", || {
            let seen = (counted("before"), counted("behind"));
            if seen == (2002, 1) { Ok(()) } else { Err(format!("{seen:?}")) }
        });
    });
}

#[test]
fn where_probes_are_off_nothing_is_said_of_peers() {
    isolated("probes::where_probes_are_off_nothing_is_said_of_peers", || {
        let node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "True", "Installed");
        node.settled();
        let status = node.report().status;
        assert_eq!(status.probes, None);
        assert!(plat_crds::condition::find(&status.conditions, "PeersReachable").is_none());
        UdpSocket::bind((ip("10.244.1.1"), PORT)).expect("nobody listens");
        let table = run("nft list table inet plat");
        assert!(!table.contains("chain input"), "{table}");
    });
}
