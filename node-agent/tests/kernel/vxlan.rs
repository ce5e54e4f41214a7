//! Nodes in several subnets with a router between: an agent in each node's namespace, pods behind them, and what a
//! stream of small packets and a large transfer see of what the agents do.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::Duration;

use plat_agent::facts::BlockFact;
use plat_cni::mac::Mac;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::harness::*;

/// Nodes `n1`, `n2`, … each with an agent, and the router `r` with a bridge for each subnet: `172.30.<n>.0/24` and
/// `fd00:30:<n>::/64`.
struct Lab {
    nodes: Vec<TestNode>,
    blocks: Vec<BlockFact>,
}

/// Which families the underlay has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Families {
    Both,
    OnlyV6,
}

fn on(namespace: &str, line: &str) {
    run(&format!("ip -n {namespace} {line}"));
}

fn set(namespace: &str, path: &str, value: &str) {
    let (path, value) = (path.to_owned(), value.to_owned());
    within(namespace, move || set_sysctl(&path, &value)).join().unwrap();
}

/// Runs in a namespace, on a thread of its own.
fn within<T: Send + 'static>(namespace: &str, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let path = format!("/run/netns/{namespace}");
    std::thread::spawn(move || {
        let namespace = std::fs::File::open(path).unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    })
}

fn namespace(name: &str) {
    run(&format!("ip netns add {name}"));
    on(name, "link set lo up");
    set(name, "ipv6/conf/default/accept_dad", "0");
    // As distributions have it that check sources strictly.
    set(name, "ipv4/conf/all/rp_filter", "1");
    set(name, "ipv4/conf/default/rp_filter", "1");
}

impl Lab {
    /// One node in the subnet of each number.
    fn new(subnets: &[u8], families: Families) -> Lab {
        namespace("r");
        for path in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            set("r", path, "1");
        }
        for n in 1..=3 {
            on("r", &format!("link add br{n} type bridge"));
            on("r", &format!("addr add fd00:30:{n}::1/64 dev br{n} nodad"));
            on("r", &format!("addr add 172.30.{n}.1/24 dev br{n}"));
            on("r", &format!("link set br{n} up"));
        }
        let mut lab = Lab { nodes: Vec::new(), blocks: Vec::new() };
        for (at, subnet) in subnets.iter().enumerate() {
            let n = u8::try_from(at + 1).unwrap();
            namespace(&format!("n{n}"));
            run(&format!("ip link add eth0 netns n{n} type veth peer name to{n} netns r"));
            lab.plug(n, *subnet, families);
            for fact in [block(n), block_v6(n)] {
                lab.blocks.push(BlockFact { addresses: addresses(n, *subnet, families), ..fact });
            }
            lab.nodes.push(TestNode::inside(&format!("n{n}"), &format!("n{n}")));
        }
        for node in &mut lab.nodes {
            node.start();
            node.contact();
        }
        lab.list();
        for node in &lab.nodes {
            node.expect_condition("CNIReady", "True", "Installed");
        }
        lab
    }

    /// Puts a node into a subnet: its link, addresses and default routes.
    fn plug(&self, n: u8, subnet: u8, families: Families) {
        on("r", &format!("link set to{n} master br{subnet} up"));
        on(&format!("n{n}"), "link set eth0 up");
        if families == Families::Both {
            on(&format!("n{n}"), &format!("addr add 172.30.{subnet}.{}/24 dev eth0", 10 + n));
            on(&format!("n{n}"), &format!("route replace default via 172.30.{subnet}.1"));
        }
        on(&format!("n{n}"), &format!("addr add fd00:30:{subnet}::{:x}/64 dev eth0 nodad", 10 + n));
        on(&format!("n{n}"), &format!("route replace default via fd00:30:{subnet}::1"));
    }

    /// All agents learn the blocks as they are.
    fn list(&mut self) {
        for node in &mut self.nodes {
            node.list(self.blocks.clone(), vec![range("default-v4"), range("default-v6")]);
        }
    }
}

fn addresses(n: u8, subnet: u8, families: Families) -> Vec<std::net::IpAddr> {
    let mut all = vec![ip(&format!("fd00:30:{subnet}::{:x}", 10 + n))];
    if families == Families::Both {
        all.insert(0, [172, 30, subnet, 10 + n].into());
    }
    all
}

/// A pod of node `n`, on its bridge, with the host numbers 7; its namespace is `p<n>`.
fn pod(n: u8) {
    namespace(&format!("p{n}"));
    run(&format!("ip link add eth0 netns p{n} type veth peer name pod{n} netns n{n}"));
    on(&format!("n{n}"), &format!("link set pod{n} master cni0 up"));
    for line in [
        "link set eth0 up".to_owned(),
        format!("addr add 10.244.{n}.7/24 dev eth0"),
        format!("addr add fd00:10:244:{n}::7/64 dev eth0 nodad"),
        format!("route add default via 10.244.{n}.1"),
        format!("route add default via fd00:10:244:{n}::1"),
    ] {
        on(&format!("p{n}"), &line);
    }
}

const FAMILIES: [&str; 2] = ["10.244.N.7", "fd00:10:244:N::7"];

fn pod_address(n: u8, of: &str) -> String {
    of.replace('N', &n.to_string())
}

fn expect_ping(from: &str, to: &str) {
    eventually(&format!("ping {from} to {to}"), || {
        let output = try_run(&format!("ip netns exec {from} busybox ping -c1 -W1 {to}"));
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stdout).into_owned())
        }
    });
}

/// Pods of all nodes, and the nodes themselves, reach each other's pods in both families.
fn expect_mesh(nodes: u8) {
    for from in 1..=nodes {
        for to in (1..=nodes).filter(|to| *to != from) {
            for of in FAMILIES {
                expect_ping(&format!("p{from}"), &pod_address(to, of));
                expect_ping(&format!("n{from}"), &pod_address(to, of));
            }
        }
    }
}

/// The kind of route that a node has to the blocks of another: the links that they lead to.
fn links_to(node: u8, other: u8) -> Vec<String> {
    ["-4", "-6"]
        .iter()
        .flat_map(|family| {
            let routes = json(&format!("ip -n n{node} -j {family} route show proto 112 metric 1120"));
            let of = [format!("10.244.{other}.0/24"), format!("fd00:10:244:{other}::/64")];
            let to = |route: &&serde_json::Value| of.iter().any(|of| route["dst"] == **of);
            let links: Vec<String> = routes
                .as_array()
                .unwrap()
                .iter()
                .filter(to)
                .map(|route| route["dev"].as_str().unwrap().to_owned())
                .collect();
            links
        })
        .collect()
}

fn expect_links(node: u8, other: u8, expected: [&str; 2]) {
    eventually(&format!("routes of n{node} to n{other}"), || {
        let got = links_to(node, other);
        if got == expected { Ok(()) } else { Err(format!("{got:?}, expected {expected:?}")) }
    });
}

/// Sends that many bytes from one pod to the other; returns how many arrived.
fn transfer(from: &str, to: &str, address: &str, bytes: usize) -> usize {
    let at: SocketAddr = (ip(address), 7777).into();
    let (told, bound) = std::sync::mpsc::channel();
    let server = within(to, move || {
        let listener = TcpListener::bind(at).unwrap();
        told.send(()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let (mut buffer, mut total) = (vec![0; 1 << 16], 0);
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return total,
                n => total += n,
            }
        }
    });
    bound.recv().unwrap();
    within(from, move || {
        let mut stream = TcpStream::connect_timeout(&at, DEADLINE).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(&vec![7; bytes]).unwrap();
    })
    .join()
    .unwrap();
    server.join().unwrap()
}

#[test]
fn auto_goes_directly_on_a_link_and_through_a_tunnel_to_other_subnets() {
    isolated("vxlan::auto_goes_directly_on_a_link_and_through_a_tunnel_to_other_subnets", || {
        let lab = Lab::new(&[1, 1, 2], Families::Both);
        (1..=3).for_each(pod);
        expect_links(1, 2, ["eth0"; 2]);
        expect_links(1, 3, ["plat-vxlan"; 2]);
        expect_links(3, 1, ["plat-vxlan"; 2]);
        expect_mesh(3);
        for of in FAMILIES {
            assert_eq!(transfer("p1", "p3", &pod_address(3, of), 20_000_000), 20_000_000);
            assert_eq!(transfer("n3", "p2", &pod_address(2, of), 2_000_000), 2_000_000);
        }
        // What is too large for the tunnel is answered from the kernel at once, and new pods know.
        assert_eq!(lab.nodes[0].report().status.mtu, Some(1450));
        for node in &lab.nodes {
            node.expect_condition("RoutesReady", "True", "AllInstalled");
        }
    });
}

#[test]
fn ipv4_blocks_are_reached_over_an_underlay_of_ipv6_alone() {
    isolated("vxlan::ipv4_blocks_are_reached_over_an_underlay_of_ipv6_alone", || {
        let _lab = Lab::new(&[1, 2], Families::OnlyV6);
        (1..=2).for_each(pod);
        expect_links(1, 2, ["plat-vxlan6"; 2]);
        expect_mesh(2);
        for of in FAMILIES {
            assert_eq!(transfer("p1", "p2", &pod_address(2, of), 2_000_000), 2_000_000);
        }
        let link = &json("ip -n n1 -j link show plat-vxlan6")[0];
        assert_eq!(link["mtu"], 1430);
        assert!(!try_run("ip -n n1 link show plat-vxlan").status.success(), "nothing needs one over IPv4");
    });
}

/// All that a tunnel is on the node: device, addresses, tables, routes.
fn tunnel_state() -> String {
    let device = &json("ip -j -d addr show dev plat-vxlan")[0];
    let mut addresses: Vec<String> =
        device["addr_info"].as_array().unwrap().iter().map(|found| found["local"].to_string()).collect();
    addresses.sort();
    let is_up = device["flags"].as_array().unwrap().contains(&"UP".into());
    let tables =
        shell("bridge fdb show dev plat-vxlan | sort; ip neigh show dev plat-vxlan nud permanent | sort");
    let routes = our_routes().join("\n");
    format!("up {is_up}, {} mtu {}, {addresses:?}\n{tables}{routes}", device["address"], device["mtu"])
}

fn expect_tunnel_state(what: &str, expected: &str) {
    eventually(what, || {
        if !try_run("ip link show dev plat-vxlan").status.success() {
            return Err("no device".to_owned());
        }
        let got = tunnel_state();
        if got == expected { Ok(()) } else { Err(format!("{got}\nexpected\n{expected}")) }
    });
}

/// `n1`, with tunnels to `n2` and `n3`.
fn tunnelling() -> (TestNode, Vec<BlockFact>, String) {
    let by_tunnel = |block| with_routing(block, r#"{"mode":"VXLAN"}"#);
    let mut blocks = vec![block(1), block_v6(1)];
    blocks.extend([block(2), block_v6(2), block(3), block_v6(3)].map(by_tunnel));
    let mut node = TestNode::with(blocks.clone(), ranges());
    node.expect_condition("RoutesReady", "True", "AllInstalled");
    // The routes of the ranges have stood their trial.
    node.contact();
    node.settled();
    let state = tunnel_state();
    for part in
        ["up true", "1450", "dst 172.30.0.12", "10.244.2.0 lladdr", "dst 172.30.0.13", "10.244.3.0 lladdr"]
    {
        assert!(state.contains(part), "{part}: {state}");
    }
    (node, blocks, state)
}

fn ranges() -> Vec<plat_agent::facts::RangeFact> {
    vec![range("default-v4"), range("default-v6")]
}

#[test]
fn what_somebody_takes_from_a_tunnel_is_back_long_before_the_next_tick() {
    isolated("vxlan::what_somebody_takes_from_a_tunnel_is_back_long_before_the_next_tick", || {
        let (node, _, before) = tunnelling();
        let mac = Mac::for_node("n2");
        let link_local = mac.link_local();
        let damages = [
            format!("bridge fdb del {mac} dev plat-vxlan dst 172.30.0.12 self"),
            format!("bridge fdb replace {mac} dev plat-vxlan dst 172.30.0.99 self permanent"),
            format!("bridge fdb replace {mac} dev plat-vxlan dst 172.30.0.12 port 4790 self permanent"),
            "ip neigh del 10.244.2.0 dev plat-vxlan".to_owned(),
            "ip neigh replace 10.244.2.0 lladdr 02:00:00:00:00:09 dev plat-vxlan".to_owned(),
            format!("ip neigh del {link_local} dev plat-vxlan"),
            "ip link set plat-vxlan down".to_owned(),
            "ip addr flush dev plat-vxlan".to_owned(),
            "ip link del plat-vxlan".to_owned(),
            // The new device has another index.
            format!("bridge fdb del {mac} dev plat-vxlan dst 172.30.0.12 self"),
        ];
        for (damage, count) in damages.into_iter().zip(1..) {
            run(&damage);
            node.expect_incident("TunnelRestored", count);
            expect_tunnel_state(&damage, &before);
        }
    });
}

#[test]
fn what_a_tunnel_holds_of_a_node_that_left_while_the_agent_was_away_is_gone_after_its_start() {
    isolated(
        "vxlan::what_a_tunnel_holds_of_a_node_that_left_while_the_agent_was_away_is_gone_after_its_start",
        || {
            let (mut node, mut blocks, before) = tunnelling();
            node.stop();
            run("bridge fdb add 02:00:00:00:00:09 dev plat-vxlan dst 172.30.0.99 self permanent");
            run("ip neigh add 10.244.9.0 lladdr 02:00:00:00:00:09 dev plat-vxlan");
            blocks.retain(|block| block.node != "n3");
            // What is missing from a list is believed in until a second one confirms it.
            node.settings.hold = Duration::ZERO;
            node.start();
            node.contact();
            for _ in 0..2 {
                node.list(blocks.clone(), ranges());
                node.settled();
            }
            let traces = ["172.30.0.13", "10.244.3.0", "fd00:10:244:3::", "02:00:00:00:00:09"];
            let gone = [Mac::for_node("n3").to_string(), Mac::for_node("n3").link_local().to_string()];
            let of_n3 = |line: &&str| {
                traces.iter().any(|trace| line.contains(trace))
                    || gone.iter().any(|trace| line.contains(trace))
            };
            let expected: Vec<&str> = before.lines().filter(|line| !of_n3(line)).collect();
            assert!(expected.len() < before.lines().count());
            expect_tunnel_state("n3 is gone", &expected.join("\n"));
        },
    );
}

/// A node of a cluster with one subnet and no policy, and the route to another's block.
fn plain_node() -> TestNode {
    let node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
    node.expect_condition("CNIReady", "True", "Installed");
    expect_way("172.30.0.12 dev eth0");
    node
}

fn expect_way(way: &str) {
    let expected = format!("10.244.2.0/24 gateway {way} metric 1120");
    eventually(&expected, || {
        let routes = our_routes();
        if routes.contains(&expected) { Ok(()) } else { Err(format!("{routes:?}")) }
    });
}

fn expect_no_tunnel() {
    let links = run("ip -o link show");
    assert!(!links.contains("plat-vxlan"), "{links}");
}

#[test]
fn a_node_without_any_way_to_the_others_waits_for_one_and_makes_no_tunnel() {
    isolated("vxlan::a_node_without_any_way_to_the_others_waits_for_one_and_makes_no_tunnel", || {
        let node = plain_node();
        run("ip addr flush dev eth0");
        let message = node.expect_condition("RoutesReady", "False", "NotOnLink");
        assert!(message.contains("172.30.0.12"), "{message}");
        expect_no_tunnel();
        run("ip addr add 172.30.0.11/24 dev eth0");
        expect_way("172.30.0.12 dev eth0");
        expect_no_tunnel();
    });
}

#[test]
fn a_node_with_two_links_in_one_subnet_goes_directly_over_the_one_that_it_prefers() {
    isolated("vxlan::a_node_with_two_links_in_one_subnet_goes_directly_over_the_one_that_it_prefers", || {
        let _node = plain_node();
        run("ip link add eth1 type veth peer name wire1");
        run("ip link set wire1 up");
        run("ip link set eth1 up");
        run("ip addr add 172.30.0.111/24 dev eth1");
        run("ip route del 172.30.0.0/24 dev eth0");
        run("ip route add 172.30.0.0/24 dev eth0 metric 100");
        expect_way("172.30.0.12 dev eth1");
        expect_no_tunnel();
    });
}
