//! The reference's portmap, bandwidth, tuning and firewall behind ours, in real chains run by libcni: what each
//! does is seen from outside, and after DEL nothing is left. Check 90 of the conformance checklist in
//! `docs/cni.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use lab::network::{cnitool, conflist, failed, install, install_script, ok, result};
use lab::traffic::{Server, ask_tcp, ask_udp, world};
use lab::{blocks, json_of, netns, sh};
use plat_cni::boot::BootId;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::store::Store;
use plat_cni::sweep::Sweeper;
use serde_json::{Value, json};

/// A node: two blocks, forwarding, and a world outside at 192.0.2.2 that knows where the pods are.
fn node(chained: Vec<Value>) {
    lab::enter();
    sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    world();
    sh("ip addr add 192.0.2.3/24 dev w0; ip -n world route add 10.244.0.0/16 via 192.0.2.1");
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    install("05-plat.conflist", &conflist("1.0.0", chained));
}

/// Runs a verb about a container; the capabilities go to whoever in the chain has them.
fn call(verb: &str, id: &str, capabilities: &Value) -> std::process::Output {
    cnitool(verb, "plat", id).env("CAP_ARGS", capabilities.to_string()).output().unwrap()
}

fn add(id: &str, capabilities: &Value) -> Value {
    netns(id);
    result(call("add", id, capabilities))
}

/// Fails the test if anything still speaks of a pod.
#[track_caller]
fn assert_clean() {
    assert_eq!(lab::leases(), Vec::<Value>::new());
    let rules = sh("nft list ruleset");
    for address in ["10.244.3.", "fd00:10:244:3:", "10.66.0."] {
        assert!(!rules.contains(address), "{rules}");
    }
    let links = sh("ip -br link");
    assert!(!links.contains("plat") && !links.contains("bwp"), "{links}");
}

#[test]
fn c90_portmap_opens_ports_over_tcp_udp_and_one_host_address() {
    node(vec![json!({"type": "portmap", "capabilities": {"portMappings": true}})]);
    let ports = json!({"portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 8053, "containerPort": 53, "protocol": "udp"},
        {"hostPort": 8081, "containerPort": 80, "protocol": "tcp", "hostIP": "192.0.2.3"}]});
    add("c", &ports);
    let _servers = (Server::tcp("c", 80), Server::udp("c", 53));
    let client = Some("192.0.2.2".to_owned());
    assert_eq!(ask_tcp("world", "192.0.2.1:8080"), client);
    assert_eq!(ask_udp("world", "192.0.2.1:8053"), client);
    assert_eq!(ask_tcp("world", "192.0.2.3:8081"), client);
    assert_eq!(ask_tcp("world", "192.0.2.1:8081"), None, "only on the address that was named");
    ok(call("check", "c", &ports));
    ok(call("del", "c", &ports));
    assert_eq!(ask_tcp("world", "192.0.2.1:8080"), None);
    assert_clean();
}

/// The queueing disciplines of a link.
fn queues(link: &str) -> Vec<Value> {
    json_of(&format!("tc -s -j qdisc show dev {link}")).as_array().unwrap().clone()
}

#[test]
fn c90_bandwidth_limits_both_directions_and_goes_with_the_pod() {
    node(vec![json!({"type": "bandwidth", "capabilities": {"bandwidth": true}})]);
    // A burst of one large packet, and a rate at which the second one has to wait, also on a slow machine.
    let limits = json!({"bandwidth": {"ingressRate": 80_000, "ingressBurst": 16_000, "egressRate": 40_000, "egressBurst": 16_000}});
    let result = add("c", &limits);
    let host = result["interfaces"][1]["name"].as_str().unwrap();
    let mirror = result["interfaces"][3]["name"].as_str().unwrap();
    for (link, bytes_per_second) in [(host, 10_000), (mirror, 5_000)] {
        let tbf = queues(link).into_iter().find(|q| q["kind"] == "tbf").expect("a token bucket");
        assert_eq!(tbf["options"]["rate"], bytes_per_second, "{tbf}");
    }
    for (from, to) in [("c", "192.0.2.2"), ("world", "10.244.3.2")] {
        assert!(lab::ping(from, to));
        let flood =
            ["netns", "exec", from, "busybox", "ping", "-c", "5", "-i", "0.01", "-W", "1", "-s", "1400", to];
        lab::attempt("ip", &flood);
    }
    for link in [host, mirror] {
        let tbf = queues(link).into_iter().find(|q| q["kind"] == "tbf").unwrap();
        assert!(tbf["packets"].as_u64() >= Some(1) && tbf["overlimits"].as_u64() >= Some(1), "{tbf}");
    }
    ok(call("check", "c", &limits));
    ok(call("del", "c", &limits));
    assert_clean();
}

#[test]
fn c90_tuning_changes_the_pods_link_and_check_takes_its_word() {
    let tuning = json!({"type": "tuning", "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"},
        "mac": "0a:00:00:00:00:99", "mtu": 1300});
    node(vec![tuning.clone()]);
    // A pod may not change its hardware address unless it is told that it may.
    let mut list = conflist("1.0.0", vec![tuning]);
    list["plugins"][0]["antiSpoofing"] = json!(false);
    lab::network::configure("05-plat.conflist", &list);
    let result = add("c", &json!({}));
    assert_eq!(result["interfaces"][2]["mac"], "0a:00:00:00:00:99");
    let link = json_of("ip -n c -j link show eth0")[0].clone();
    assert_eq!((&link["address"], &link["mtu"]), (&json!("0a:00:00:00:00:99"), &json!(1300)));
    assert_eq!(sh("ip netns exec c cat /proc/sys/net/ipv4/conf/eth0/arp_filter").trim(), "1");
    assert!(lab::ping("c", "192.0.2.2"));
    ok(call("check", "c", &json!({})));
    ok(call("del", "c", &json!({})));
    assert_clean();
    assert_eq!(sh("ls /run/cni/tuning 2>/dev/null || true"), "", "its notes are gone too");
}

#[test]
fn c90_firewall_lets_a_pod_through_a_host_that_forwards_nothing() {
    node(vec![json!({"type": "firewall", "backend": "iptables"})]);
    sh("iptables -P FORWARD DROP; ip6tables -P FORWARD DROP");
    add("c", &json!({}));
    assert!(lab::ping("c", "192.0.2.2"));
    ok(call("check", "c", &json!({})));
    ok(call("del", "c", &json!({})));
    assert_clean();
}

#[test]
fn c90_firewall_finds_the_bridge_in_our_result_and_keeps_other_bridges_out() {
    // It isolates the bridges from one another that have the policy.
    let firewall = json!({"type": "firewall", "backend": "iptables", "ingressPolicy": "same-bridge"});
    node(vec![firewall.clone()]);
    add("a", &json!({}));
    add("b", &json!({}));
    let bridge = json!({"type": "plat", "bridge": "br1", "isDefaultGateway": true, "ipam": {"subnet": "10.66.0.0/24"}});
    let other = json!({"cniVersion": "1.0.0", "name": "other", "plugins": [bridge, firewall]});
    lab::network::configure("20-other.conflist", &other);
    netns("stranger");
    ok(cnitool("add", "other", "stranger").output().unwrap());
    let _server = Server::tcp("b", 80);
    assert!(ask_tcp("a", "10.244.3.3:80").is_some(), "of the same bridge");
    assert!(lab::ping("stranger", "10.66.0.1"));
    assert_eq!(ask_tcp("stranger", "10.244.3.3:80"), None, "of another");
    for (network, id) in [("plat", "a"), ("plat", "b"), ("other", "stranger")] {
        ok(cnitool("del", network, id).output().unwrap());
    }
    assert_clean();
}

#[test]
fn c90_all_of_them_at_once_for_two_pods_and_both_go_without_a_trace() {
    node(vec![
        json!({"type": "portmap", "capabilities": {"portMappings": true}}),
        json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
        json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}}),
        json!({"type": "firewall", "backend": "iptables"}),
    ]);
    let wishes = |port: u16| {
        json!({"portMappings": [{"hostPort": port, "containerPort": 80, "protocol": "tcp"}],
            "bandwidth": {"ingressRate": 80_000_000, "ingressBurst": 800_000, "egressRate": 80_000_000, "egressBurst": 800_000}})
    };
    for (id, port) in [("a", 8080), ("b", 8081)] {
        add(id, &wishes(port));
        let _server = Server::tcp(id, 80);
        assert_eq!(ask_tcp("world", &format!("192.0.2.1:{port}")), Some("192.0.2.2".to_owned()));
        ok(call("check", id, &wishes(port)));
    }
    ok(call("del", "a", &wishes(8080)));
    let _server = Server::tcp("b", 80);
    assert_eq!(ask_tcp("world", "192.0.2.1:8081"), Some("192.0.2.2".to_owned()), "the other one stays");
    sh("ip netns del b");
    ok(call("del", "b", &wishes(8081)));
    assert_clean();
}

#[test]
fn c94_a_chained_plugin_that_never_lets_a_del_through_does_not_keep_our_lease() {
    node(vec![json!({"type": "stubborn"})]);
    install_script(
        "stubborn",
        "conf=$(cat); case $CNI_COMMAND in DEL) echo '{\"cniVersion\":\"1.0.0\",\"code\":999,\"msg\":\"never\"}'; exit 1;; \
        ADD) printf %s \"$conf\" | jq -c .prevResult;; \
        VERSION) echo '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}';; esac",
    );
    add("stays", &json!({}));
    add("goes", &json!({}));
    // libcni goes from the last plugin to the first, and stops at the first error: we are never asked.
    for _ in 0..2 {
        assert!(failed(call("del", "goes", &json!({}))).contains("never"));
    }
    sh("ip netns del goes");
    lab::eventually("its link is gone", || {
        lab::host_links().iter().filter(|l| l.starts_with("plat")).count() == 1
    });
    // The agent's sweep, as the agent calls it; the second sighting is ninety seconds later.
    let kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
    let store = Store::at("/run/plat/leases".as_ref());
    let mut sweeper =
        Sweeper::new(store, BootId::read().unwrap(), plat_cni::store::Missing::Leave, Box::new(kernel));
    let now = plat_cni::boot::boot_ms();
    let wait = std::time::Duration::from_secs(5);
    assert_eq!(sweeper.sweep_at(now, wait).unwrap().suspected, 1);
    assert_eq!(sweeper.sweep_at(now + 90_000, wait).unwrap().ended.len(), 1);
    assert_eq!(lab::leased(), ["10.244.3.2", "fd00:10:244:3::2"], "of the one that stays");
    let rules = sh("nft list ruleset");
    assert!(!rules.contains("10.244.3.3"), "{rules}");
}

#[test]
fn a_chained_plugin_that_fails_its_add_costs_the_pod_and_nothing_else() {
    node(vec![json!({"type": "refuses"})]);
    install_script(
        "refuses",
        "cat >/dev/null; case $CNI_COMMAND in ADD) echo '{\"cniVersion\":\"1.0.0\",\"code\":999,\"msg\":\"no\"}'; exit 1;; \
        VERSION) echo '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}';; esac",
    );
    netns("c");
    assert!(failed(call("add", "c", &json!({}))).contains("refuses"));
    assert_eq!(lab::leases().len(), 1, "our ADD was good; libcni takes it back by a DEL of the whole chain");
    ok(call("del", "c", &json!({})));
    assert_clean();
}
