//! Host ports, seen by real sockets: from outside, from another node's pod, from the node, from pods of the
//! same node and from the pod itself.
//!
//! The laboratory is the node. `out` is a machine next to it (192.0.2.2, 2001:db8::2), `far` a pod of
//! another node (10.244.9.5), whose address the fabric would bring here unchanged.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use lab::{Plat, add, cluster_conf, hand_conf, netns, restore, sh, with};
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::netns::Netns;
use plat_cni::pods::{self, Orphans, Restored};
use plat_cni::store::Kernel;
use plat_crds::lease::Lease;
use serde_json::{Value, json};

/// The node's own name among the namespaces.
const NODE: &str = "";

/// Makes the node's surroundings.
fn surroundings() {
    lab::enter();
    for (name, v4, v6) in
        [("out", "192.0.2.2/24", "2001:db8::2/64"), ("far", "198.51.100.5/32", "fd00:9::5/128")]
    {
        netns(name);
        sh(&format!(
            "ip link add to-{name} type veth peer name eth0 netns {name}
             ip link set to-{name} up
             ip -n {name} link set lo up
             ip -n {name} addr add {v4} dev eth0
             ip -n {name} addr add {v6} dev eth0 nodad
             ip -n {name} link set eth0 up"
        ));
    }
    sh("ip addr add 192.0.2.1/24 dev to-out
        ip addr add 192.0.2.9/24 dev to-out
        ip addr add 2001:db8::1/64 dev to-out nodad
        ip -n far addr add 10.244.9.5/32 dev eth0
        ip -n far addr del 198.51.100.5/32 dev eth0
        ip -n far route add 192.0.2.0/24 dev eth0
        ip route add 10.244.9.0/24 dev to-far
        ip -n far route add 2001:db8::/64 dev eth0
        ip -6 route add fd00:9::/64 dev to-far
        sysctl -eqw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0
        sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.to-far.proxy_arp=1 net.ipv6.conf.to-far.proxy_ndp=1
        ip -6 neigh add proxy 2001:db8::1 dev to-far");
}

/// The agent's configuration of a dual-stack node.
fn cluster(ports: Value) -> Value {
    lab::blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    with(cluster_conf(), json!({"hairpinMode": true, "runtimeConfig": {"portMappings": ports}}))
}

fn port(protocol: &str, host: u16, container: u16) -> Value {
    json!({"hostPort": host, "containerPort": container, "protocol": protocol})
}

fn on(host_ip: &str, protocol: &str, host: u16, container: u16) -> Value {
    with(port(protocol, host, container), json!({"hostIP": host_ip}))
}

/// Runs something in a namespace; sockets that it opens stay there.
fn within<T>(name: &str, work: impl FnOnce() -> T) -> T {
    match name {
        NODE => work(),
        name => Netns::open(&format!("/run/netns/{name}")).unwrap().inside(|| Ok(work())).unwrap(),
    }
}

/// A server of both protocols on one port of a namespace; tells everyone its name and who they are to it.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(place: &str, address: SocketAddr) -> Server {
        let (tcp, udp) =
            within(place, || (TcpListener::bind(address).unwrap(), UdpSocket::bind(address).unwrap()));
        tcp.set_nonblocking(true).unwrap();
        udp.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (Arc::clone(&stop), place.to_owned());
        let serve = move || {
            let mut buffer = [0; 64];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((mut stream, peer)) = tcp.accept() {
                    let _ = stream.write_all(seen(&name, peer).as_bytes());
                }
                if let Ok((_, peer)) = udp.recv_from(&mut buffer) {
                    let _ = udp.send_to(seen(&name, peer).as_bytes(), peer);
                }
            }
        };
        Server { stop, thread: Some(std::thread::spawn(serve)) }
    }

    /// In a pod, on all of its addresses.
    fn in_pod(place: &str, port: u16) -> Server {
        Server::start(place, (IpAddr::from(std::net::Ipv6Addr::UNSPECIFIED), port).into())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

fn seen(server: &str, peer: SocketAddr) -> String {
    format!("{server} sees {}", peer.ip().to_canonical())
}

/// What a server says to a client in that namespace; `None` if nobody answers.
fn ask(protocol: &str, place: &str, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    match protocol {
        "tcp" => ask_tcp(place, to, Duration::from_secs(5)),
        _ => ask_udp(&udp_client(place, to)),
    }
}

fn ask_tcp(place: &str, to: SocketAddr, patience: Duration) -> Option<String> {
    let mut stream = within(place, || TcpStream::connect_timeout(&to, patience)).ok()?;
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

fn udp_client(place: &str, to: SocketAddr) -> UdpSocket {
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }.parse().unwrap();
    within(place, || {
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(to).unwrap();
        socket
    })
}

/// Sends until there is an answer, as datagrams may be lost.
fn ask_udp(socket: &UdpSocket) -> Option<String> {
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut buffer = [0; 64];
    for _ in 0..15 {
        // An earlier one may have been refused.
        let _ = socket.send(b"?");
        match socket.recv(&mut buffer) {
            Ok(length) => return Some(String::from_utf8_lossy(&buffer[..length]).into_owned()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => return None,
            Err(_) => {}
        }
    }
    None
}

/// Whether nobody answers: a refusal, or silence for a while.
fn is_closed(protocol: &str, place: &str, to: &str) -> bool {
    let to: SocketAddr = to.parse().unwrap();
    match protocol {
        "tcp" => ask_tcp(place, to, Duration::from_millis(300)).is_none(),
        _ => {
            let socket = udp_client(place, to);
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            socket.send(b"?").unwrap();
            socket.recv(&mut [0; 64]).is_err()
        }
    }
}

/// The elements of the maps and sets for host ports, each with the set's name.
fn elements() -> BTreeSet<String> {
    let ruleset = lab::json_of("nft -j list ruleset");
    let mut found = BTreeSet::new();
    for object in ruleset["nftables"].as_array().unwrap() {
        let Some(set) = object.get("set").or_else(|| object.get("map")) else { continue };
        let name = set["name"].as_str().unwrap();
        if ["hostports", "hairpin", "neighbours"].iter().any(|ours| name.starts_with(ours)) {
            let elements = set["elem"].as_array().into_iter().flatten();
            found.extend(elements.map(|element| format!("{name} {element}")));
        }
    }
    found
}

/// The UDP flows that the kernel remembers, those with these words.
fn flows(words: &str) -> Vec<String> {
    let text = sh("cat /proc/net/nf_conntrack");
    let name = |line: &str| line.split(" udp ").nth(1).map(|flow| flow.trim().to_owned());
    text.lines().filter(|line| line.contains(words)).filter_map(name).collect()
}

#[test]
fn from_everywhere_a_port_of_the_node_leads_to_the_pod_and_the_source_stays_where_it_can() {
    surroundings();
    let pod = add("pod", &cluster(json!([port("tcp", 8080, 80), port("udp", 8080, 80)])));
    let neighbour = add("neighbour", &cluster(Value::Null));
    let address = |result: &Value, index: usize| {
        result["ips"][index]["address"].as_str().unwrap().split('/').next().unwrap().to_owned()
    };
    let (pod4, pod6) = (address(&pod, 0), address(&pod, 1));
    assert_eq!((pod4.as_str(), pod6.as_str()), ("10.244.3.2", "fd00:10:244:3::2"));
    let _server = Server::in_pod("pod", 80);
    for protocol in ["tcp", "udp"] {
        for (from, to, source) in [
            ("out", "192.0.2.1:8080", "192.0.2.2"),
            ("out", "192.0.2.9:8080", "192.0.2.2"),
            ("out", "[2001:db8::1]:8080", "2001:db8::2"),
            ("far", "192.0.2.1:8080", "10.244.9.5"),
            ("far", "[2001:db8::1]:8080", "fd00:9::5"),
            (NODE, "192.0.2.1:8080", "192.0.2.1"),
            (NODE, "[2001:db8::1]:8080", "2001:db8::1"),
            (NODE, "10.244.3.1:8080", "10.244.3.1"),
            ("neighbour", "192.0.2.1:8080", &address(&neighbour, 0)),
            ("neighbour", "[2001:db8::1]:8080", &address(&neighbour, 1)),
            // Answers to these would not come back through the node.
            (NODE, "127.0.0.1:8080", "10.244.3.1"),
            (NODE, "127.1.2.3:8080", "10.244.3.1"),
            ("pod", "192.0.2.1:8080", "10.244.3.1"),
            ("pod", "[2001:db8::1]:8080", "fd00:10:244:3::1"),
        ] {
            assert_eq!(
                ask(protocol, from, to),
                Some(format!("pod sees {source}")),
                "{protocol} from {from:?} to {to}"
            );
        }
        assert!(is_closed(protocol, "out", "192.0.2.1:80"), "the pod's port is not the node's");
        assert!(is_closed(protocol, NODE, "[::1]:8080"), "::1 stays the node's own");
    }
    Plat::call("DEL", "pod", &cluster(Value::Null)).run().silent();
    assert_eq!(elements(), BTreeSet::new());
    assert!(is_closed("tcp", "out", "192.0.2.1:8080"));
}

#[test]
fn without_a_bridge_a_port_leads_to_the_pod_all_the_same() {
    surroundings();
    let routed = |ports: Value| with(cluster(ports), json!({"datapath": "routed", "hairpinMode": false}));
    add("pod", &routed(json!([port("tcp", 8080, 80), port("udp", 8080, 80)])));
    add("neighbour", &routed(Value::Null));
    let _server = Server::in_pod("pod", 80);
    for protocol in ["tcp", "udp"] {
        for (from, to, source) in [
            ("out", "192.0.2.1:8080", "192.0.2.2"),
            ("out", "[2001:db8::1]:8080", "2001:db8::2"),
            (NODE, "192.0.2.1:8080", "192.0.2.1"),
            ("neighbour", "192.0.2.1:8080", "10.244.3.3"),
            ("neighbour", "[2001:db8::1]:8080", "fd00:10:244:3::3"),
        ] {
            let answer = ask(protocol, from, to);
            assert_eq!(answer, Some(format!("pod sees {source}")), "{protocol} from {from:?} to {to}");
        }
        // With one of the node's addresses, whichever it has.
        for (from, to) in [(NODE, "127.0.0.1:8080"), ("pod", "192.0.2.1:8080"), ("pod", "[2001:db8::1]:8080")]
        {
            let answer = ask(protocol, from, to).unwrap_or_default();
            assert!(answer.starts_with("pod sees "), "{protocol} from {from:?} to {to}: {answer}");
            assert!(!answer.ends_with(" 10.244.3.2") && !answer.contains("127."), "{answer}");
        }
    }
    assert_eq!(sh("sysctl -n net.ipv4.conf.all.route_localnet").trim(), "0", "on the pod's link alone");
    assert_eq!(sh("ip -o link show type bridge"), "");
}

#[test]
fn by_hand_pods_of_the_same_subnet_are_answered_and_others_seen_as_they_are() {
    surroundings();
    let conf = with(
        hand_conf(),
        json!({"ipMasq": true, "ipam": {"ranges": [
        [{"subnet": "10.22.0.0/24"}], [{"subnet": "fd00:22::/64"}]]}}),
    );
    let ports = json!([port("tcp", 8080, 80), port("udp", 8080, 80)]);
    add("pod", &with(conf.clone(), json!({"runtimeConfig": {"portMappings": ports}})));
    add("neighbour", &conf);
    let _server = Server::in_pod("pod", 80);
    for protocol in ["tcp", "udp"] {
        for (from, to, source) in [
            ("neighbour", "192.0.2.1:8080", "10.22.0.1"),
            ("neighbour", "[2001:db8::1]:8080", "fd00:22::1"),
            ("pod", "192.0.2.1:8080", "10.22.0.1"),
            ("pod", "[2001:db8::1]:8080", "fd00:22::1"),
            ("out", "192.0.2.1:8080", "192.0.2.2"),
            (NODE, "127.0.0.1:8080", "10.22.0.1"),
            (NODE, "192.0.2.1:8080", "192.0.2.1"),
        ] {
            let answer = ask(protocol, from, to);
            assert_eq!(answer, Some(format!("pod sees {source}")), "{protocol} from {from:?} to {to}");
        }
    }
}

#[test]
fn a_bridge_that_shows_its_frames_to_iptables_changes_nothing() {
    surroundings();
    sh("ip link add cni0 type bridge");
    if !lab::exists("/proc/sys/net/bridge/bridge-nf-call-iptables") {
        println!("no br_netfilter in this kernel: nothing to see");
        return;
    }
    sh("sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1");
    add("pod", &cluster(json!([port("tcp", 8080, 80), port("udp", 8080, 80)])));
    add("neighbour", &cluster(Value::Null));
    let _server = Server::in_pod("pod", 80);
    for (from, source) in [("pod", "10.244.3.1"), ("neighbour", "10.244.3.3"), ("out", "192.0.2.2")] {
        for protocol in ["tcp", "udp"] {
            let answer = ask(protocol, from, "192.0.2.1:8080");
            assert_eq!(answer, Some(format!("pod sees {source}")), "{protocol} from {from}");
        }
    }
}

#[test]
fn a_host_ip_opens_the_port_on_that_address_alone() {
    surroundings();
    for (id, ports) in [
        ("all", json!([port("tcp", 8000, 80), on("0.0.0.0", "tcp", 8004, 80), on("::", "tcp", 8006, 80)])),
        ("one", json!([on("192.0.2.9", "tcp", 8000, 80), on("2001:db8::1", "tcp", 8000, 80)])),
        ("local", json!([on("127.0.0.1", "tcp", 8000, 80), on("127.0.0.1", "udp", 8000, 80)])),
        ("mapped", json!([on("::ffff:192.0.2.9", "tcp", 8009, 80)])),
    ] {
        add(id, &cluster(ports));
    }
    let _servers = ["all", "one", "local", "mapped"].map(|id| Server::in_pod(id, 80));
    for (from, to, pod) in [
        ("out", "192.0.2.1:8000", "all"),
        ("out", "192.0.2.9:8000", "one"),
        ("out", "[2001:db8::1]:8000", "one"),
        (NODE, "127.0.0.1:8000", "local"),
        (NODE, "127.0.0.2:8000", "all"),
        ("out", "192.0.2.9:8009", "mapped"),
        ("out", "192.0.2.1:8004", "all"),
        ("out", "[2001:db8::1]:8006", "all"),
    ] {
        let answer = ask("tcp", from, to).unwrap_or_default();
        assert!(answer.starts_with(&format!("{pod} sees ")), "{to}: {answer}");
    }
    assert!(ask("udp", NODE, "127.0.0.1:8000").unwrap().starts_with("local sees "));
    for (protocol, from, to) in [
        ("tcp", "out", "[2001:db8::1]:8004"),
        ("tcp", "out", "192.0.2.1:8006"),
        ("tcp", "out", "192.0.2.1:8009"),
        ("udp", "out", "192.0.2.1:8000"),
        ("udp", NODE, "192.0.2.1:8000"),
    ] {
        assert!(is_closed(protocol, from, to), "{protocol} from {from} to {to}");
    }
}

#[test]
fn what_the_node_offers_on_loopback_stays_closed_to_pods_and_to_its_neighbours() {
    surroundings();
    add("pod", &cluster(json!([port("tcp", 8080, 80)])));
    assert_eq!(sh("cat /proc/sys/net/ipv4/conf/cni0/route_localnet").trim(), "1");
    let _secret = Server::start(NODE, "127.0.0.1:9999".parse().unwrap());
    // The pod takes 127.0.0.1 for a machine behind the node, which takes root in the pod.
    sh("ip -n pod addr del 127.0.0.1/8 dev lo || true
        ip netns exec pod sysctl -qw net.ipv4.conf.eth0.route_localnet=1 net.ipv4.conf.all.route_localnet=1
        ip -n pod route del local 127.0.0.0/8 dev lo table local || true
        ip -n pod route del local 127.0.0.1 dev lo table local || true
        ip -n pod route add 127.0.0.1/32 via 10.244.3.1 dev eth0 src 10.244.3.2");
    assert!(is_closed("tcp", "pod", "127.0.0.1:9999"));
    // It is the guard that keeps it closed.
    sh("nft flush chain inet plat-pods loopback-guard");
    assert_eq!(ask("tcp", "pod", "127.0.0.1:9999").as_deref(), Some(" sees 10.244.3.2"));
}

#[test]
fn a_port_that_another_pod_has_is_refused_by_name_and_all_is_taken_back() {
    surroundings();
    add("first", &cluster(json!([port("tcp", 8080, 80), on("192.0.2.9", "udp", 53, 53)])));
    let before = (elements(), lab::leases(), lab::host_links());
    assert_eq!(before.0.len(), 5, "two maps, one more for 192.0.2.9, two hairpin sets: {before:?}");
    netns("second");
    for (wish, words) in [
        (port("tcp", 8080, 80), "host port tcp 8080 is taken: eth0 of container first has it"),
        (port("tcp", 8080, 81), "host port tcp 8080 is taken"),
        (on("0.0.0.0", "tcp", 8080, 80), "host port tcp 8080 is taken"),
        (on("::", "tcp", 8080, 80), "host port tcp 8080 is taken"),
        (
            on("192.0.2.9", "udp", 53, 53),
            "host port 192.0.2.9 udp 53 is taken: eth0 of container first has it",
        ),
    ] {
        let wishes = json!([port("tcp", 7000, 70), wish]);
        let error = Plat::call("ADD", "second", &cluster(wishes)).run().error(108);
        assert!(error.contains(words), "{error}");
        assert_eq!((elements(), lab::leases(), lab::host_links()), before);
    }
    // A DEL for what never was leaves the first pod's alone, and so does one after a kill.
    let conf = cluster(json!([port("tcp", 8080, 80)]));
    Plat::call("DEL", "second", &conf).run().silent();
    let _ = Plat::call("ADD", "second", &conf).set("PLAT_FAIL", "attached:kill").run();
    Plat::call("DEL", "second", &conf).run().silent();
    assert_eq!((elements(), lab::leases(), lab::host_links()), before);
    // Other protocols, ports and addresses are free; and the same ones once the first pod is gone.
    let others = json!([port("udp", 8080, 80), on("192.0.2.9", "tcp", 8080, 80), port("sctp", 8080, 80)]);
    Plat::call("ADD", "second", &cluster(others)).result();
    Plat::call("DEL", "first", &conf).run().silent();
    netns("third");
    Plat::call("ADD", "third", &conf).result();
}

#[test]
fn a_port_that_somebody_left_behind_is_taken_over() {
    surroundings();
    add("gone", &cluster(json!([port("tcp", 8080, 80)])));
    // Link and lease go without a DEL.
    sh("ip netns del gone; rm /run/plat/leases");
    lab::eventually("the link goes with its namespace", || lab::host_links().is_empty());
    assert!(!elements().is_empty());
    add("pod", &cluster(json!([port("tcp", 8080, 81)])));
    let _server = Server::in_pod("pod", 81);
    assert_eq!(ask("tcp", "out", "192.0.2.1:8080").as_deref(), Some("pod sees 192.0.2.2"));
    Plat::call("DEL", "pod", &cluster(Value::Null)).run().silent();
    let left = elements();
    restore();
    assert!(elements().is_empty(), "{left:?} belonged to nobody");
}

#[test]
fn a_port_of_a_pod_whose_lease_is_in_another_store_is_taken_too() {
    surroundings();
    let elsewhere = json!({"name": "other", "bridge": "other0", "runDir": "/run/other",
        "runtimeConfig": {"portMappings": [port("tcp", 8080, 80)]}});
    add("a", &with(hand_conf(), elsewhere));
    netns("b");
    let error = Plat::call("ADD", "b", &cluster(json!([port("tcp", 8080, 80)]))).run().error(108);
    assert!(error.contains("container a"), "{error}");
    let before = elements();
    Plat::call("ADD", "b", &cluster(json!([port("tcp", 8081, 80)]))).result();
    let both = elements();
    assert!(both.is_superset(&before));
    assert_eq!(restore(), Restored::default(), "the other store's pod lives");
    assert_eq!(elements(), both);
}

/// A pod by hand whose lease is in another store, with a host port and masquerade, and one of the node's blocks.
fn pods_of_two_stores() {
    surroundings();
    let elsewhere = json!({"name": "other", "bridge": "other0", "runDir": "/run/other", "ipMasq": true,
        "antiSpoofing": true, "runtimeConfig": {"portMappings": [port("tcp", 8080, 80)]}});
    // In this order, as a store that is new begins with all that the links prove.
    add("b", &cluster(json!([port("tcp", 8081, 80)])));
    add("a", &with(hand_conf(), elsewhere));
    assert_eq!(lab::leases().len(), 1);
}

fn all_elements() -> BTreeSet<String> {
    let lists = lab::json_of("nft -j list ruleset")["nftables"].as_array().unwrap().clone();
    let of = |object: &Value| {
        let set = object.get("set").or_else(|| object.get("map"))?;
        let elements = set["elem"].as_array()?.iter();
        Some(elements.map(|e| format!("{} {}: {e}", set["family"], set["name"])).collect::<Vec<_>>())
    };
    lists.iter().filter_map(of).flatten().collect()
}

#[test]
fn a_table_that_must_be_written_anew_keeps_what_pods_of_other_stores_have() {
    pods_of_two_stores();
    let before = all_elements();
    assert!(before.iter().any(|e| e.contains("10.22.0.2") && e.contains("jump")), "{before:?}");
    for chain in ["loopback-guard", "hostports-in"] {
        // One that hangs nowhere, under the name of a base chain.
        sh(&format!("nft delete chain inet plat-pods {chain}; nft add chain inet plat-pods {chain}"));
        assert_ne!(restore(), Restored::default());
        assert_eq!(all_elements(), before, "{chain}");
        assert_eq!(restore(), Restored::default());
    }
    let _server = Server::in_pod("a", 80);
    assert_eq!(ask("tcp", "out", "192.0.2.1:8080").as_deref(), Some("a sees 192.0.2.2"));
}

#[test]
fn what_goes_away_while_tables_are_compared_makes_none_anew() {
    pods_of_two_stores();
    let before = all_elements();
    let chains = || -> Vec<String> {
        let chains = lab::json_of("nft -j list chains")["nftables"].as_array().unwrap().clone();
        chains.iter().map(|o| o["chain"]["handle"].to_string()).collect()
    };
    let handles = chains();
    let own: Vec<Lease> = proven().into_iter().filter(|lease| lease.container_id == "b").collect();
    // Who owns a stray is asked as soon as its set was read: the last time all of them were.
    let mut asked = 0;
    let mut restore_and = |at: usize, act: &dyn Fn()| {
        asked = 0;
        let mut proof = || {
            asked += 1;
            if asked == at {
                act();
            }
            Ok(proven())
        };
        pods::restore(&own, Orphans::Sweep(&mut proof)).unwrap();
        asked
    };
    let last = restore_and(0, &|| {});
    sh("nft add element inet plat-pods hostports4 { tcp . 9 : 10.244.3.99 . 9 }");
    let asked = restore_and(last, &|| _ = sh("nft delete element inet plat-pods hostports4 { tcp . 9 }"));
    assert_eq!(asked, 2 * last, "all was read once more");
    assert_eq!((all_elements(), chains()), (before, handles));
}

fn proven() -> Vec<Lease> {
    HostKernel::new(Socket::open(Protocol::Route).unwrap()).held().unwrap()
}

#[test]
fn a_failure_at_any_step_leaves_no_port_open_and_after_a_kill_a_del_closes_them() {
    surroundings();
    let conf = cluster(json!([port("tcp", 8080, 80), port("udp", 53, 53)]));
    netns("pod");
    for point in ["lease", "attached", "rules", "confirm", "reply"] {
        let _ = Plat::call("ADD", "pod", &conf).set("PLAT_FAIL", &format!("{point}:error")).run().error(100);
        assert_eq!(elements(), BTreeSet::new(), "{point}");
        let _ = Plat::call("ADD", "pod", &conf).set("PLAT_FAIL", &format!("{point}:kill")).run();
        Plat::call("DEL", "pod", &conf).run().silent();
        lab::assert_nothing_left();
        assert_eq!(elements(), BTreeSet::new(), "{point}");
    }
}

#[test]
fn check_names_a_port_that_is_not_open_any_more() {
    surroundings();
    let conf = cluster(json!([port("tcp", 8080, 80), on("192.0.2.9", "udp", 53, 53)]));
    let result = add("pod", &conf);
    let check = || {
        let previous = with(conf.clone(), json!({"prevResult": result}));
        Plat::call("CHECK", "pod", &previous).run()
    };
    check().silent();
    for (damage, words) in [
        (
            "delete element inet plat-pods hostports4 '{ tcp . 8080 }'",
            "no element tcp . 8080 in inet plat-pods hostports4",
        ),
        (
            "flush map inet plat-pods hostports4-ip",
            "no element 192.0.2.9 . udp . 53 in inet plat-pods hostports4-ip",
        ),
        ("flush set inet plat-pods hairpin6", "in inet plat-pods hairpin6"),
        ("flush chain inet plat-pods loopback-guard", "in chain inet plat-pods loopback-guard"),
        ("flush chain inet plat-pods hostports", "in chain inet plat-pods hostports"),
        ("delete table inet plat-pods", "in inet plat-pods hostports4"),
    ] {
        sh(&format!("nft {damage}"));
        let error = check().error(105);
        assert!(error.contains(words), "{damage}: {error}");
        assert!(!restore().put_back.is_empty(), "{damage}");
        check().silent();
    }
    sh("nft 'add element inet plat-pods hostports4 { tcp . 1 : 10.244.3.99 . 1 }'");
    assert_eq!(restore(), Restored { put_back: vec![], orphans: 1 });
    assert_eq!(restore(), Restored::default(), "nothing to do");
}

#[test]
fn after_a_flush_by_hand_the_next_add_opens_the_ports_of_all_pods_again() {
    surroundings();
    for n in 0..3 {
        add(&format!("pod{n}"), &cluster(json!([port("tcp", 8000 + n, 80)])));
    }
    let before = elements();
    sh("nft flush ruleset");
    add("pod3", &cluster(json!([port("tcp", 8003, 80)])));
    assert!(elements().is_superset(&before));
    // Who was there first keeps its port, also when there is nothing left to see of it.
    sh("nft flush ruleset");
    netns("late");
    let error = Plat::call("ADD", "late", &cluster(json!([port("tcp", 8000, 80)]))).run().error(108);
    assert!(error.contains("container pod0"), "{error}");
}

#[test]
fn a_hundred_ports_fit_and_too_many_are_refused() {
    surroundings();
    let ports = |count: u16| Value::from((0..count).map(|n| port("tcp", 8000 + n, 80)).collect::<Vec<_>>());
    let id = "c".repeat(64);
    add(&id, &cluster(ports(100)));
    let recorded = lab::leases()[0]["hostPorts"].as_array().unwrap().clone();
    assert_eq!(recorded.len(), 100);
    assert_eq!(recorded[0], json!({"hostIP": "", "protocol": "tcp", "hostPort": 8000, "containerPort": 80}));
    let _server = Server::in_pod(&id, 80);
    for to in ["192.0.2.1:8000", "[2001:db8::1]:8099"] {
        assert!(ask("tcp", "out", to).is_some(), "{to}");
    }
    Plat::call("DEL", &id, &cluster(Value::Null)).run().silent();
    assert_eq!(elements(), BTreeSet::new());
    let error = Plat::call("ADD", &id, &cluster(ports(200))).run().error(7);
    assert!(error.contains("200 host ports"), "{error}");
    lab::assert_nothing_left();
}

#[test]
fn a_lease_that_was_lost_is_rebuilt_with_its_ports() {
    surroundings();
    let wishes = json!([port("tcp", 8080, 80), on("192.0.2.9", "udp", 53, 5353), on("::", "sctp", 7, 7)]);
    add("pod", &cluster(wishes));
    let ports = || lab::leases()[0]["hostPorts"].clone();
    let before = ports();
    assert_eq!(before.as_array().unwrap().len(), 3);
    sh("rm -r /run/plat");
    lab::blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    add("other", &cluster(Value::Null));
    let sorted = |ports: Value| -> BTreeSet<String> {
        ports.as_array().unwrap().iter().map(Value::to_string).collect()
    };
    assert_eq!(sorted(ports()), sorted(before));
    // And without any store a DEL still closes them.
    sh("rm -r /run/plat");
    Plat::call("DEL", "pod", &cluster(Value::Null)).run().silent();
    assert_eq!(elements(), BTreeSet::new());
}

#[test]
fn a_udp_client_that_never_pauses_reaches_the_pod_that_has_the_port_now() {
    surroundings();
    let ports = json!([port("udp", 8080, 80)]);
    let clients = ["192.0.2.1:8080", "[2001:db8::1]:8080"].map(|to| udp_client("out", to.parse().unwrap()));
    let hear = |name: &str, clients: &[UdpSocket]| {
        for client in clients {
            let expected = format!("{name} sees {}", client.local_addr().unwrap().ip());
            assert_eq!(ask_udp(client), Some(expected));
        }
    };
    // Connections are tracked from the first rule on that asks for it.
    add("older", &cluster(json!([port("tcp", 8080, 80)])));
    // The kernel remembers that nobody was there.
    for client in &clients {
        let _ = (client.send(b"?"), client.send(b"?"));
    }
    lab::eventually("two flows to nobody", || flows("dport=8080").len() == 2);
    // A flow to the same port elsewhere, through the node, is not about the node's port.
    sh("ip -n out route add 10.244.9.5 via 192.0.2.1");
    let _elsewhere = Server::start("out", "192.0.2.2:8080".parse().unwrap());
    let passing = udp_client("far", "192.0.2.2:8080".parse().unwrap());
    assert_eq!(ask_udp(&passing).as_deref(), Some("out sees 10.244.9.5"));
    let through = || flows("src=10.244.9.5");
    assert_eq!(through().len(), 1);
    add("first", &cluster(ports.clone()));
    let first = Server::in_pod("first", 80);
    hear("first", &clients);
    assert_eq!(through().len(), 1, "left alone");
    drop(first);
    Plat::call("DEL", "first", &cluster(ports.clone())).run().silent();
    assert_eq!(flows("dport=8080"), through(), "those to the pod are forgotten");
    add("second", &cluster(ports.clone()));
    let _second = Server::in_pod("second", 80);
    hear("second", &clients);
    // What was sent while the rules were flushed is remembered too.
    sh("nft delete map inet plat-pods hostports4 2>/dev/null || nft flush chain inet plat-pods hostports");
    sh("nft flush map inet plat-pods hostports4; nft flush map inet plat-pods hostports6");
    let fresh = ["192.0.2.1:8080", "[2001:db8::1]:8080"].map(|to| udp_client("out", to.parse().unwrap()));
    for client in &fresh {
        let _ = (client.send(b"?"), client.send(b"?"));
    }
    assert!(!restore().put_back.is_empty());
    hear("second", &fresh);
}
