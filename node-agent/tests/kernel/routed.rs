//! The agent where pods are routed without a bridge, and on the way from one datapath to the other.

use plat_crds::alias::{self, Port};
use plat_crds::lease::{Datapath, HostVeth, Lease, LeasedAddress, Pool};

use crate::harness::*;

pub fn node(datapath: Datapath) -> TestNode {
    let mut node = TestNode::new();
    node.settings.me.datapath = datapath;
    feed(&mut node);
    node
}

fn feed(node: &mut TestNode) {
    node.start();
    node.contact();
    node.list(vec![block(1), block_v6(1)], vec![range("default-v4"), range("default-v6")]);
    node.expect_condition("CNIReady", "True", "Installed");
    node.settled();
}

const CNI0: Port<'_> = Port { bridge: "cni0", hairpin: true, isolated: true };

/// What a CNI ADD leaves of pod `n`, but for its host routes: the agent has the lease from the link's alias.
pub fn pod(n: u8, datapath: Datapath) {
    let address = |address: String, subnet_length| LeasedAddress {
        address: address.parse().unwrap(),
        subnet_length,
        masquerade: false,
    };
    let lease = Lease {
        container_id: format!("c{n}"),
        ifname: "eth0".into(),
        network: Some("plat".into()),
        pool: Pool::Blocks,
        addresses: vec![address(format!("10.244.1.{n}"), 24), address(format!("fd00:10:244:1::{n}"), 64)],
        veth: HostVeth::default(),
        datapath,
        ..Lease::default()
    };
    let mac = format!("0a:71:00:00:00:0{n}");
    shell(&format!(
        "ip netns add p{n}
        ip link add plat{n} address {mac} type veth peer name eth0 netns p{n}
        ip link set plat{n} alias '{}' up",
        alias::of(&lease, (datapath == Datapath::Bridge).then_some(CNI0))
    ));
    let gateway = match datapath {
        Datapath::Bridge => {
            run(&format!("ip link set plat{n} master cni0"));
            String::new()
        }
        Datapath::Routed => {
            format!(
                "ip -n p{n} neigh replace 10.244.1.1 lladdr {mac} dev eth0 nud permanent
                ip -n p{n} neigh replace fd00:10:244:1::1 lladdr {mac} dev eth0 nud permanent"
            )
        }
    };
    shell(&format!(
        "ip netns exec p{n} sysctl -qw net.ipv6.conf.eth0.accept_dad=0
        ip -n p{n} link set eth0 up
        ip -n p{n} addr add 10.244.1.{n}/32 dev eth0
        ip -n p{n} addr add fd00:10:244:1::{n}/128 dev eth0 nodad
        {gateway}
        ip -n p{n} route add 10.244.1.1 dev eth0
        ip -n p{n} route add default via 10.244.1.1
        ip -n p{n} route add fd00:10:244:1::1 dev eth0
        ip -n p{n} route add default via fd00:10:244:1::1"
    ));
}

/// The runtime's DEL: link and lease are gone. The next one to look makes the store from what is there.
fn del(node: &TestNode, n: u8) {
    shell(&format!("ip link del plat{n}; rm -f {}", node.settings.run_dir.join("leases").display()));
}

fn gateways(link: &str) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for addresses in json(&format!("ip -j addr show {link}")).as_array().unwrap() {
        for address in addresses["addr_info"].as_array().unwrap() {
            let local = address["local"].as_str().unwrap().to_owned();
            if local.starts_with("10.244.") || local.starts_with("fd00:10:244:") {
                all.push(local);
            }
        }
    }
    all.sort();
    all
}

fn expect_gateways(link: &str, expected: &[&str]) {
    eventually(&format!("gateways of {link}"), || {
        let got = gateways(link);
        if got == expected { Ok(()) } else { Err(format!("{got:?}")) }
    });
}

/// Whether pod `n` has an answer from there to one packet.
pub fn reaches(n: u8, to: &str) -> bool {
    try_run(&format!("ip netns exec p{n} busybox ping -c1 -W1 {to}")).status.success()
}

/// Waits until pod `n` reaches all these.
pub fn expect_reach(n: u8, to: &[&str]) {
    for to in to {
        eventually(&format!("p{n} to {to}"), || {
            if reaches(n, to) { Ok(()) } else { Err(shell("ip route; ip -6 route")) }
        });
    }
}

const BOTH: [&str; 2] = ["10.244.1.1", "fd00:10:244:1::1"];
const CLOSED: [&str; 2] =
    ["unreachable 10.244.1.0/24 metric 65535", "unreachable fd00:10:244:1::/64 metric 65535"];

fn own_routes() -> Vec<String> {
    our_routes()
        .into_iter()
        .filter(|r| r.contains("10.244.1.0/24") || r.contains("fd00:10:244:1::/64"))
        .collect()
}

#[test]
fn gateways_stand_on_lo_and_no_bridge_is_made() {
    isolated("routed::gateways_stand_on_lo_and_no_bridge_is_made", || {
        let node = node(Datapath::Routed);
        expect_gateways("lo", &BOTH);
        assert_eq!(json("ip -j link show type bridge").as_array().unwrap().len(), 0);
        assert_eq!(own_routes(), CLOSED);
        assert!(std::fs::read_to_string(node.file("net.d/05-plat.conflist")).unwrap().contains("\"routed\""));
        run("ip addr del 10.244.1.1/32 dev lo");
        node.expect_incident("BridgeRestored", 1);
        expect_gateways("lo", &BOTH);
    });
}

#[test]
fn a_pods_lost_routes_are_put_back() {
    isolated("routed::a_pods_lost_routes_are_put_back", || {
        let node = node(Datapath::Routed);
        pod(7, Datapath::Routed);
        pod(8, Datapath::Routed);
        let file = node.settings.run_dir.join("leases");
        run(&format!("rm -f {}", file.display()));
        node.settled();
        expect_reach(7, &["10.244.1.1", "10.244.1.8", "fd00:10:244:1::1", "fd00:10:244:1::8"]);
        let shown = || shell("ip route show proto 113; ip -6 route show proto 113");
        let whole = shown();
        for damage in [
            "ip route flush proto 113; ip -6 route flush proto 113",
            "ip link set plat7 down; ip link set plat7 up",
        ] {
            shell(damage);
            node.settled();
            eventually(damage, || if shown() == whole { Ok(()) } else { Err(shown()) });
            expect_reach(7, &["10.244.1.8", "fd00:10:244:1::8"]);
        }
    });
}

#[test]
fn forwarding_is_admitted_for_pods_links_by_their_names() {
    isolated("routed::forwarding_is_admitted_for_pods_links_by_their_names", || {
        run("iptables -P FORWARD DROP");
        run("ip6tables -P FORWARD DROP");
        let node = node(Datapath::Routed);
        pod(7, Datapath::Routed);
        pod(8, Datapath::Routed);
        run(&format!("rm -f {}", node.settings.run_dir.join("leases").display()));
        node.settled();
        let rules = run("iptables -S FORWARD");
        for rule in [
            "-A FORWARD -s 10.244.1.0/24 -i plat+ -m comment --comment plat -j ACCEPT",
            "-A FORWARD -d 10.244.1.0/24 -o plat+ -m comment --comment plat -j ACCEPT",
        ] {
            assert_eq!(rules.matches(rule).count(), 1, "{rules}");
        }
        assert!(!rules.contains("cni0"), "{rules}");
        expect_reach(7, &["10.244.1.8", "fd00:10:244:1::8"]);
        // They are known for ours, also after a save and restore.
        shell("iptables-save | iptables-restore; ip6tables-save | ip6tables-restore");
        node.settled();
        assert_eq!(run("iptables -S FORWARD"), rules);
    });
}

#[test]
fn a_node_goes_from_bridge_to_routed_and_back_under_running_pods() {
    isolated("routed::a_node_goes_from_bridge_to_routed_and_back_under_running_pods", || {
        let mut node = node(Datapath::Bridge);
        pod(7, Datapath::Bridge);
        expect_reach(7, &BOTH);

        node.stop();
        node.settings.me.datapath = Datapath::Routed;
        run(&format!("rm -f {}", node.settings.run_dir.join("leases").display()));
        feed(&mut node);
        expect_gateways("lo", &BOTH);
        expect_gateways("cni0", &BOTH);
        pod(8, Datapath::Routed);
        run(&format!("rm -f {}", node.settings.run_dir.join("leases").display()));
        node.settled();
        expect_reach(7, &["10.244.1.8", "fd00:10:244:1::8"]);
        expect_reach(8, &["10.244.1.7", "fd00:10:244:1::7"]);
        // The last pod of the bridge ends.
        del(&node, 7);
        node.settled();
        expect_gateways("cni0", &[]);
        eventually("no route to the bridge", || match own_routes() {
            routes if routes == CLOSED => Ok(()),
            routes => Err(format!("{routes:?}")),
        });
        expect_reach(8, &BOTH);

        node.stop();
        node.settings.me.datapath = Datapath::Bridge;
        feed(&mut node);
        expect_gateways("cni0", &BOTH);
        expect_gateways("lo", &BOTH);
        pod(9, Datapath::Bridge);
        expect_reach(8, &["10.244.1.9", "fd00:10:244:1::9"]);
        del(&node, 8);
        node.settled();
        expect_gateways("lo", &[]);
        expect_reach(9, &BOTH);
    });
}

#[test]
fn running_pods_hang_on_a_bridge_that_was_deleted_again() {
    isolated("routed::running_pods_hang_on_a_bridge_that_was_deleted_again", || {
        let mut node = node(Datapath::Bridge);
        pod(7, Datapath::Bridge);
        pod(8, Datapath::Routed);
        // Of a bridge that is not the agent's.
        let other = "plat c9 eth0 bridge:br9 open hand ranges 10.22.0.9/24";
        shell(&format!("ip link add plat9 type veth peer name p9; ip link set plat9 alias '{other}' up"));
        run(&format!("rm -f {}", node.settings.run_dir.join("leases").display()));
        node.settled();
        expect_reach(7, &BOTH);
        let expect_back = || {
            expect_reach(7, &["10.244.1.1", "fd00:10:244:1::1", "10.244.1.8"]);
            let port = &json("ip -j -d link show plat7")[0];
            let data = &port["linkinfo"]["info_slave_data"];
            assert_eq!(port["master"], "cni0");
            assert_eq!((&data["hairpin"], &data["isolated"]), (&true.into(), &true.into()), "{data}");
            for stranger in ["plat8", "plat9"] {
                assert_eq!(
                    json(&format!("ip -j link show {stranger}"))[0]["master"],
                    serde_json::Value::Null
                );
            }
        };
        run("ip link del cni0");
        let told = node.expect_incident("BridgeRestored", 1);
        assert!(told.contains("joined plat7 to bridge cni0 again"), "{told}");
        expect_back();
        // The same where nobody was there to see it, and the store is lost too.
        node.stop();
        run("ip link del cni0");
        assert_eq!(json("ip -j link show plat7")[0]["master"], serde_json::Value::Null);
        run(&format!("rm -f {}", node.settings.run_dir.join("leases").display()));
        feed(&mut node);
        expect_back();
    });
}
