//! containerd as the caller: the go-cni that it is built with, given the options that it gives
//! (`e2e/tools/containerd/gocni`). go-cni panics over a result that it does not expect, inside containerd.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::BTreeSet;

use lab::network::{conflist, failed, gocni, gocni_1_7, install, install_script, ok, result};
use lab::traffic::{Server, ask_tcp, world};
use lab::{blocks, netns, sh, with};
use serde_json::{Value, json};

/// A sandbox as kubelet asks for it.
fn pod() -> Value {
    json!({"Labels": {"K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": "web-0", "K8S_POD_UID": "6a1b"},
        "Annotations": {"kubernetes.io/ingress-bandwidth": "10M"},
        "PortMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}],
        "Bandwidth": {"IngressRate": 10_000_000, "IngressBurst": 4_294_967_295u32, "EgressRate": 0, "EgressBurst": 0},
        "DNS": {"Servers": ["10.96.0.10"], "Searches": null, "Options": null},
        "CgroupParent": "/kubepods/burstable/pod6a1b"})
}

fn path(id: &str) -> String {
    format!("/run/netns/{id}")
}

fn network(version: &str, versions: Value, chained: Vec<Value>) -> Value {
    with(conflist(version, chained), json!({"cniVersions": versions}))
}

#[test]
fn c89_containerd_takes_the_pods_addresses_from_our_result_and_its_remove_leaves_nothing() {
    lab::enter();
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    sh("sysctl -qw net.ipv4.ip_forward=1");
    let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    install("05-plat.conflist", &network("1.0.0", json!(["1.0.0", "1.1.0"]), vec![portmap]));
    ok(gocni(&["status"], &json!({})));
    netns("c");
    let taken = result(gocni(&["setup", "c", &path("c")], &pod()));
    let eth0 = &taken["Interfaces"]["eth0"];
    let ips: Vec<&str> =
        eth0["IPConfigs"].as_array().unwrap().iter().filter_map(|c| c["IP"].as_str()).collect();
    assert_eq!(ips, ["10.244.3.2", "fd00:10:244:3::2"], "{taken}");
    assert_eq!(eth0["Sandbox"], path("c"));
    assert_eq!(eth0["Mac"], lab::json_of("ip -n c -j link show eth0")[0]["address"]);
    assert_eq!(taken["DNS"][0]["nameservers"], json!(["10.96.0.10"]));
    assert!(lab::ping("c", "10.244.3.1"));
    ok(gocni(&["remove", "c", &path("c")], &pod()));
    lab::assert_nothing_left();
    // kubelet asks again and again until it is told that all is well.
    ok(gocni(&["remove", "c", &path("c")], &pod()));
}

#[test]
fn c25_host_ports_and_bandwidth_in_containerds_spelling_are_opened_and_limited_by_ours_alone() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    sh("sysctl -qw net.ipv4.ip_forward=1");
    world();
    let mut list = network("1.0.0", json!(["1.0.0", "1.1.0"]), vec![]);
    list["plugins"][0]["capabilities"] = json!({"portMappings": true, "bandwidth": true});
    install("05-plat.conflist", &list);
    netns("c");
    result(gocni(&["setup", "c", &path("c")], &pod()));
    let _server = Server::tcp("c", 80);
    assert_eq!(ask_tcp("world", "192.0.2.1:8080"), Some("192.0.2.2".to_owned()));
    let queues = lab::json_of("tc -j qdisc show");
    let limited = |q: &Value| q["kind"] == "tbf" && q["options"]["rate"] == 1_250_000;
    assert!(queues.as_array().unwrap().iter().any(limited), "10 Mbit/s: {queues}");
    ok(gocni(&["remove", "c", ""], &pod()));
    assert_eq!(ask_tcp("world", "192.0.2.1:8080"), None);
    assert_eq!(lab::leases(), Vec::<Value>::new());
}

/// The version in which libcni asked us: it caches the result as it came.
fn spoken(id: &str) -> String {
    let cached = sh(&format!("cat /var/lib/cni/results/plat-{id}-eth0"));
    let cached: Value = serde_json::from_str(&cached).unwrap();
    cached["result"]["cniVersion"].as_str().unwrap().to_owned()
}

#[test]
fn c89_containerd_1_7_takes_1_0_0_from_the_conflist_in_which_containerd_2_takes_1_1_0() {
    lab::enter();
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    install("05-plat.conflist", &network("1.0.0", json!(["1.0.0", "1.1.0"]), vec![]));
    for (id, call, version) in
        [("old", gocni_1_7 as fn(&[&str], &Value) -> _, "1.0.0"), ("new", gocni, "1.1.0")]
    {
        ok(call(&["status"], &json!({})));
        netns(id);
        let taken = result(call(&["setup", id, &path(id)], &pod()));
        assert_eq!(taken["Interfaces"]["eth0"]["IPConfigs"].as_array().unwrap().len(), 2, "{taken}");
        assert_eq!(spoken(id), version);
        assert!(lab::ping(id, "10.244.3.1"));
        ok(call(&["remove", id, &path(id)], &pod()));
        lab::assert_nothing_left();
    }
    // Why the conflist does not simply say 1.1.0: the old libcni runs the ADD, and then cannot read its result.
    lab::network::configure("05-plat.conflist", &conflist("1.1.0", vec![]));
    netns("c");
    let said = failed(gocni_1_7(&["setup", "c", &path("c")], &pod()));
    assert!(said.contains("1.1.0"), "{said}");
    ok(gocni_1_7(&["remove", "c", &path("c")], &pod()));
    lab::assert_nothing_left();
}

#[test]
fn c64_to_c66_as_containerd_sends_them_a_sandbox_without_its_namespace_is_removed() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    install("05-plat.conflist", &network("1.0.0", json!(["1.0.0", "1.1.0"]), vec![]));
    for (id, damage) in [
        ("empty", "true"),
        ("vanished", "ip netns del vanished"),
        ("plain", "umount /run/netns/plain"),
        ("unmarked", "ip netns del unmarked; rm -rf /var/lib/cni"),
    ] {
        netns(id);
        ok(gocni(&["setup", id, &path(id)], &pod()));
        sh(damage);
        // containerd gives an empty path once it has seen that the namespace is gone.
        let namespace = if id == "empty" { String::new() } else { path(id) };
        ok(gocni(&["remove", id, &namespace], &pod()));
        lab::assert_nothing_left();
    }
}

#[test]
fn containerd_is_told_why_when_there_is_no_block() {
    lab::enter();
    install("05-plat.conflist", &conflist("1.1.0", vec![]));
    let said = failed(gocni(&["status"], &json!({})));
    assert!(said.contains("this node has no block of addresses yet"), "{said}");
    netns("c");
    let said = failed(gocni(&["setup", "c", &path("c")], &pod()));
    assert!(said.contains("is it running on this node?"), "{said}");
    // It sends a DEL after the ADD that failed.
    ok(gocni(&["remove", "c", &path("c")], &pod()));
    lab::assert_nothing_left();
}

#[test]
fn c30_an_index_of_another_plugin_does_not_make_containerd_panic() {
    lab::enter();
    // A main plugin whose index is wrong, and ours behind it.
    let bad = json!({"cniVersion": "1.1.0", "interfaces": [{"name": "eth0", "sandbox": "/run/netns/c"}],
        "ips": [{"address": "10.9.0.2/24", "interface": -1}]});
    let list = |plugins: Value| json!({"cniVersion": "1.1.0", "name": "plat", "plugins": plugins});
    let (other, ours) = (json!({"type": "other"}), json!({"type": "plat"}));
    install("05-plat.conflist", &list(json!([other])));
    let script = format!(
        "cat >/dev/null; case $CNI_COMMAND in ADD) echo '{bad}';; VERSION) echo '{{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"1.1.0\"]}}';; esac"
    );
    install_script("other", &script);
    netns("c");
    let output = gocni(&["setup", "c", &path("c")], &pod());
    assert!(String::from_utf8_lossy(&output.stderr).contains("goroutine"), "alone it does: {output:?}");
    lab::network::configure("05-plat.conflist", &list(json!([other, ours])));
    let taken = result(gocni(&["setup", "d", &path("c")], &pod()));
    assert_eq!(taken["Interfaces"]["eth0"]["IPConfigs"][0]["IP"], "10.9.0.2");
}

#[test]
fn many_sandboxes_at_once_get_an_address_each() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    install("05-plat.conflist", &network("1.0.0", json!(["1.0.0", "1.1.0"]), vec![]));
    let ids: Vec<String> = (0..16).map(|n| format!("c{n}")).collect();
    ids.iter().for_each(|id| drop(netns(id)));
    let taken: BTreeSet<String> = std::thread::scope(|scope| {
        let calls: Vec<_> =
            ids.iter().map(|id| scope.spawn(move || gocni(&["setup", id, &path(id)], &pod()))).collect();
        let address = |taken: Value| taken["Interfaces"]["eth0"]["IPConfigs"][0]["IP"].to_string();
        calls.into_iter().map(|call| address(result(call.join().unwrap()))).collect()
    });
    assert_eq!(taken.len(), ids.len(), "{taken:?}");
    assert_eq!(lab::leased().len(), ids.len());
    for id in &ids {
        ok(gocni(&["remove", id, &path(id)], &pod()));
    }
    lab::assert_nothing_left();
}
