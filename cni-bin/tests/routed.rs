//! The `routed` datapath: what it has that the bridge has not. What both must do alike is tested in both,
//! where it belongs (`add`, `del`, `check`, …).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use lab::{Answer, Datapath, Plat, add, address, blocks, cluster_conf, hand_conf, netns, ping, sh, with};
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::store::{Missing, Store};
use plat_cni::{boot::BootId, kernel::HostKernel, routed};
use plat_crds::lease::Lease;
use serde_json::{Value, json};

fn routed_conf(conf: Value) -> Value {
    Datapath::Routed.of(conf)
}

const DUAL: [&str; 2] = ["10.244.3.0/24", "fd00:10:244:3::/64"];

fn dual_stack_node() {
    sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    blocks(&DUAL);
}

fn check(id: &str, conf: &Value, result: &Value) -> Answer {
    Plat::call("CHECK", id, &with(conf.clone(), json!({"prevResult": result}))).run()
}

#[test]
fn a_pod_has_a_link_and_host_routes_of_its_own_and_no_bridge_is_made() {
    lab::enter();
    dual_stack_node();
    let result = add("a", &routed_conf(cluster_conf()));
    let names: Vec<&str> =
        result["interfaces"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
    assert_eq!((names.len(), names[1]), (2, "eth0"), "as ptp lists them");
    let host = names[0];
    assert_eq!(lab::json_of("ip -j link show type bridge"), json!([]));
    assert_eq!(lab::json_of(&format!("ip -j link show {host}"))[0]["master"], Value::Null);
    assert_eq!(lab::leases()[0]["datapath"], "routed");
    for (family, to, source) in
        [("-4", "10.244.3.2", "10.244.3.1"), ("-6", "fd00:10:244:3::2", "fd00:10:244:3::1")]
    {
        let route = lab::json_of(&format!("ip {family} -j route show {to}"))[0].clone();
        assert_eq!(
            (&route["dev"], &route["protocol"], &route["prefsrc"]),
            (&json!(host), &json!("113"), &json!(source))
        );
    }
    Plat::call("DEL", "a", &routed_conf(cluster_conf())).run().silent();
    lab::assert_nothing_left();
    assert_eq!(sh("ip route show proto 113; ip -6 route show proto 113"), "");
}

#[test]
fn hosts_that_do_not_answer_arp_for_addresses_of_other_links_are_fine() {
    lab::enter();
    // As kube-proxy with strictARP sets them.
    sh("sysctl -qw net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2");
    dual_stack_node();
    let conf = routed_conf(cluster_conf());
    add("a", &conf);
    add("b", &conf);
    for to in ["10.244.3.1", "10.244.3.3", "fd00:10:244:3::1", "fd00:10:244:3::3"] {
        assert!(ping("a", to), "{to}");
    }
}

#[test]
fn by_hand_the_subnet_and_everything_else_is_behind_the_gateway() {
    lab::enter();
    let ipam = json!({"ranges": [[{"subnet": "10.22.0.0/24"}], [{"subnet": "fd00:22::/64"}]],
        "routes": [{"dst": "198.51.100.0/24"}, {"dst": "0.0.0.0/0"}]});
    let conf = routed_conf(json!({"cniVersion": "1.1.0", "name": "hand", "type": "plat", "ipam": ipam}));
    let result = add("a", &conf);
    add("b", &conf);
    assert_eq!(result["ips"][0]["address"], "10.22.0.2/32");
    assert_eq!(
        result["routes"],
        json!([
            {"dst": "10.22.0.1/32", "scope": 253}, {"dst": "10.22.0.0/24", "gw": "10.22.0.1"},
            {"dst": "fd00:22::1/128", "scope": 253}, {"dst": "fd00:22::/64", "gw": "fd00:22::1"},
            {"dst": "198.51.100.0/24", "gw": "10.22.0.1"}, {"dst": "0.0.0.0/0", "gw": "10.22.0.1"},
            {"dst": "::/0", "gw": "fd00:22::1"}
        ])
    );
    for to in ["10.22.0.1", "10.22.0.3", "fd00:22::1", "fd00:22::3"] {
        assert!(ping("a", to), "{to}");
    }
    check("a", &conf, &result).silent();
    assert_eq!(lab::leases()[0]["addresses"][0]["subnetLength"], 24);
}

#[test]
fn addresses_of_another_ipam_plugin_are_routed_too() {
    lab::enter();
    let conf = routed_conf(json!({"cniVersion": "1.1.0", "name": "theirs", "type": "plat", "ipMasq": true,
        "ipam": {"type": "host-local", "dataDir": "/run/host-local",
            "ranges": [[{"subnet": "10.33.0.0/24"}], [{"subnet": "fd00:33::/64"}]]}}));
    let path = lab::tools().join("cni").display().to_string();
    for id in ["a", "b"] {
        netns(id);
    }
    let result = Plat::call("ADD", "a", &conf).set("CNI_PATH", &path).result();
    Plat::call("ADD", "b", &conf).set("CNI_PATH", &path).result();
    assert_eq!(result["ips"][0]["address"], "10.33.0.2/32");
    for to in ["10.33.0.1", "10.33.0.3", "fd00:33::1", "fd00:33::3"] {
        assert!(ping("a", to), "{to}");
    }
    let checked = with(conf.clone(), json!({"prevResult": result}));
    Plat::call("CHECK", "a", &checked).set("CNI_PATH", &path).run().silent();
    for id in ["a", "b"] {
        Plat::call("DEL", id, &conf).set("CNI_PATH", &path).run().silent();
    }
    lab::assert_nothing_left();
}

#[test]
fn a_delegated_address_without_gateway_and_subnet_is_refused_and_given_back() {
    lab::enter();
    let conf = routed_conf(json!({"cniVersion": "1.1.0", "name": "theirs", "type": "plat",
        "ipam": {"type": "static", "addresses": [{"address": "10.33.0.7/32"}]}}));
    netns("c");
    let path = lab::tools().join("cni").display().to_string();
    let error = Plat::call("ADD", "c", &conf).set("CNI_PATH", &path).run().error(7);
    assert!(error.contains("10.33.0.7/32 has no gateway"), "{error}");
    lab::assert_nothing_left();
}

#[test]
fn what_only_a_bridge_can_do_is_refused_by_name() {
    lab::enter();
    netns("c");
    for change in [json!({"bridge": "br1"}), json!({"promiscMode": true}), json!({"forceAddress": true})] {
        let key = change.as_object().unwrap().keys().next().unwrap().clone();
        let error = Plat::call("ADD", "c", &with(routed_conf(hand_conf()), change)).run().error(2);
        assert!(error.contains(&key), "{error}");
    }
    let without = with(routed_conf(hand_conf()), json!({"ipam": null}));
    assert!(Plat::call("ADD", "c", &without).run().error(7).contains("set ipam"));
    let unknown = with(hand_conf(), json!({"datapath": "ebpf"}));
    assert!(Plat::call("ADD", "c", &unknown).run().error(2).contains("bridge or routed"));
    lab::assert_nothing_left();
}

#[test]
fn a_strangers_route_to_the_address_is_an_error_and_stays() {
    lab::enter();
    sh("ip link add w0 type veth peer name w1; ip link set w0 up; ip route add 10.22.0.2/32 dev w0");
    netns("c");
    let error = Plat::call("ADD", "c", &routed_conf(hand_conf())).run().error(102);
    assert!(error.contains("10.22.0.2"), "{error}");
    assert_eq!(lab::leases(), Vec::<Value>::new());
    assert!(sh("ip route show 10.22.0.2").contains("w0"));
}

#[test]
fn c78_each_loss_is_named() {
    lab::enter();
    dual_stack_node();
    let conf = routed_conf(cluster_conf());
    sh("ip link add br9 type bridge");
    for (number, (damage, words)) in [
        ("ip route del V4 dev HOST", "no route to 10.244.3."),
        ("ip -6 route del V6 dev HOST", "no route to fd00:10:244:3::"),
        ("ip route replace V4 dev lo", "no route to 10.244.3."),
        ("ip -6 neigh del V6 dev HOST", "hardware address of fd00:10:244:3::"),
        ("ip -n ID -6 neigh del fd00:10:244:3::1 dev eth0", "its gateway fd00:10:244:3::1"),
        ("ip -n ID neigh replace 10.244.3.1 lladdr 0a:00:00:00:00:99 dev eth0", "its gateway 10.244.3.1"),
        ("ip link set HOST master br9", "made a port"),
        ("ip link set HOST down", "is down"),
        ("ip link del HOST", "is gone"),
        ("ip -n ID addr del V4/32 dev eth0", "lacks address"),
        ("ip -n ID route del default", "route to 0.0.0.0/0"),
        ("ip -n ID -6 route del default", "route to ::/0"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("c{number}");
        let result = add(&id, &conf);
        check(&id, &conf, &result).silent();
        let own =
            |n: usize| result["ips"][n]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
        let host = lab::host_end(&result)["name"].as_str().unwrap();
        let damage = damage.replace("ID", &id).replace("HOST", host);
        sh(&damage.replace("V4", &own(0)).replace("V6", &own(1)));
        let error = check(&id, &conf, &result).error(105);
        assert!(error.contains(words), "{damage}: {error}");
        Plat::call("DEL", &id, &conf).run().silent();
    }
}

/// The leases, as the agent reads them.
fn recorded() -> Vec<Lease> {
    let mut kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
    let store = Store::at(std::path::Path::new("/run/plat/leases"));
    let boot = BootId::read().unwrap();
    let wait = std::time::Duration::from_secs(5);
    let mut locked = store.lock(&boot, wait, Missing::Create, &mut kernel).unwrap().unwrap();
    locked.all().unwrap()
}

#[test]
fn a_store_that_was_lost_is_made_again_from_the_links() {
    lab::enter();
    dual_stack_node();
    let conf = routed_conf(cluster_conf());
    add("a", &conf);
    add("bridged", &with(hand_conf(), json!({"bridge": "br1"})));
    let before = recorded();
    // Not from the links' masters: of the bridged pod there is none left.
    sh("ip link del br1; rm -rf /run/plat/leases");
    let datapaths = |leases: &[Lease]| {
        let mut all: Vec<_> =
            leases.iter().map(|l| (l.container_id.clone(), l.datapath, l.addresses.clone())).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    assert_eq!(datapaths(&recorded()), datapaths(&before));
    assert_eq!(address(&add("b", &conf)), "10.244.3.3", "the first one's address is known");
}

#[test]
fn host_routes_that_were_lost_are_put_back_and_nothing_is_taken_away() {
    lab::enter();
    dual_stack_node();
    let conf = routed_conf(cluster_conf());
    let result = add("a", &conf);
    let host = lab::host_end(&result)["name"].as_str().unwrap();
    let mut socket = Socket::open(Protocol::Route).unwrap();
    let own: Vec<_> = DUAL.iter().map(|block| block.parse().unwrap()).collect();
    let mut restore = |leases: &[Lease]| routed::restore(&mut socket, leases, &own).unwrap();
    let leases = recorded();
    let shown = || sh("ip route show proto 113; ip -6 route show proto 113; ip -6 neigh show nud permanent");
    let whole = shown();
    assert_eq!(restore(&leases), Vec::<String>::new());
    for damage in [
        "ip route flush proto 113".to_owned(),
        "ip -6 route flush proto 113".to_owned(),
        "ip -6 neigh flush nud permanent".to_owned(),
        // Takes all of them.
        format!("ip link set {host} down; ip link set {host} up"),
        "ip addr del 10.244.3.1/32 dev lo; ip addr add 10.244.3.1/32 dev lo".to_owned(),
    ] {
        sh(&damage);
        assert_ne!(shown(), whole, "{damage}");
        assert_eq!(restore(&leases).len(), 1, "{damage}");
        assert_eq!(shown(), whole, "{damage}");
        assert!(ping("a", "10.244.3.1") && ping("a", "fd00:10:244:3::1"), "{damage}");
    }
    // A pod that the caller does not know of keeps its routes, one that is gone gets none.
    add("b", &conf);
    let with_b = shown();
    assert_eq!(restore(&leases), Vec::<String>::new());
    assert_eq!(shown(), with_b);
    Plat::call("DEL", "a", &conf).run().silent();
    assert_eq!(restore(&leases), Vec::<String>::new());
}

#[test]
fn gateways_on_lo_are_kept_as_the_blocks_say_and_others_addresses_stay() {
    lab::enter();
    sh("ip addr add 192.0.2.1/32 dev lo");
    let mut socket = Socket::open(Protocol::Route).unwrap();
    let mut ensure = |blocks: &[&str]| {
        let blocks: Vec<_> = blocks.iter().map(|block| block.parse().unwrap()).collect();
        routed::ensure_gateways(&mut socket, &blocks).unwrap().len()
    };
    assert_eq!(ensure(&DUAL), 2);
    assert_eq!(ensure(&DUAL), 0);
    assert_eq!(ensure(&["10.244.9.0/24"]), 3);
    let text = sh("ip -o addr show lo");
    assert!(
        text.contains("10.244.9.1/32") && text.contains("192.0.2.1/32") && !text.contains("10.244.3.1"),
        "{text}"
    );
    assert_eq!(ensure(&[]), 1);
    // What a network configured by hand brings there is its own.
    add("c", &routed_conf(hand_conf()));
    assert_eq!(ensure(&[]), 0);
    assert!(ping("c", "10.22.0.1"));
}

#[test]
fn pods_of_both_datapaths_reach_each_other() {
    lab::enter();
    dual_stack_node();
    add("old", &cluster_conf());
    add("new", &routed_conf(cluster_conf()));
    for (from, to) in [
        ("old", "10.244.3.3"),
        ("new", "10.244.3.2"),
        ("old", "fd00:10:244:3::3"),
        ("new", "fd00:10:244:3::2"),
    ] {
        assert!(ping(from, to), "{from} to {to}");
    }
    // Back again, while the routed one lives.
    add("newer", &cluster_conf());
    assert!(ping("newer", "10.244.3.3") && ping("new", "10.244.3.4"));
    for id in ["old", "new", "newer"] {
        Plat::call("DEL", id, &cluster_conf()).run().silent();
    }
    lab::assert_nothing_left();
}
