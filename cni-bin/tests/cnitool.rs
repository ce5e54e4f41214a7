//! The real libcni (cnitool) as the caller, with configurations as a runtime loads them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use lab::network::{cnitool, configure, conflist, failed, install, ok, result};
use lab::{blocks, netns, sh, with};
use serde_json::{Value, json};

#[test]
fn c27_libcni_reads_our_results_of_every_version_and_all_its_verbs_succeed() {
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        std::thread::spawn(move || {
            lab::enter();
            blocks(&["10.244.3.0/24", "fd00:3::/64"]);
            install("05-plat.conflist", &conflist(version, vec![]));
            for id in ["c", "forgotten"] {
                netns(id);
                let result = result(cnitool("add", "plat", id).output().unwrap());
                assert_eq!(result["cniVersion"], version);
                assert!(lab::ping(id, "10.244.3.1") && lab::ping(id, "fd00:3::1"));
            }
            // libcni says itself, without asking us, that these came with later versions.
            for (verb, since) in [("check", "0.4.0"), ("status", "1.1.0")] {
                let output = cnitool(verb, "plat", "c").output().unwrap();
                assert!(output.status.success() || version < since, "{version} {verb}: {output:?}");
            }
            ok(cnitool("del", "plat", "c").output().unwrap());
            // It says DEL for all that it knows of, and then GC with the rest, which is nothing.
            ok(cnitool("gc", "plat", "c").output().unwrap());
            ok(cnitool("del", "plat", "forgotten").output().unwrap());
            lab::assert_nothing_left();
        })
        .join()
        .unwrap_or_else(|_| panic!("version {version}"));
    }
}

#[test]
fn c27_a_lone_plugin_object_as_old_runtimes_have_it_is_a_network_too() {
    lab::enter();
    for (number, version) in [json!(null), json!("0.2.0"), json!("0.3.1")].into_iter().enumerate() {
        let conf = with(lab::hand_conf(), json!({"cniVersion": version}));
        let id = format!("c{number}");
        netns(&id);
        match number {
            0 => install("10-hand.conf", &conf),
            _ => configure("10-hand.conf", &conf),
        }
        ok(cnitool("add", "hand", &id).output().unwrap());
        assert!(lab::ping(&id, "10.22.0.1"), "{version}");
        ok(cnitool("del", "hand", &id).output().unwrap());
        lab::assert_nothing_left();
    }
}

#[test]
fn the_conflist_that_offers_two_versions_gets_the_higher_one_with_portmap_behind_us() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    sh("sysctl -qw net.ipv4.ip_forward=1");
    let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    let list = with(conflist("1.0.0", vec![portmap]), json!({"cniVersions": ["1.0.0", "1.1.0"]}));
    install("05-plat.conflist", &list);
    netns("c");
    let capabilities = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}], "ips": ["10.244.3.77"],
        "mac": "0a:00:00:00:00:77", "dns": {"servers": ["10.96.0.10"]}});
    let call =
        |verb: &str| cnitool(verb, "plat", "c").env("CAP_ARGS", capabilities.to_string()).output().unwrap();
    let result = result(call("add"));
    assert_eq!(result["cniVersion"], "1.1.0", "the highest of the list");
    assert_eq!(result["ips"][0]["address"], "10.244.3.77/32");
    assert_eq!(result["interfaces"][2]["mac"], "0a:00:00:00:00:77");
    assert_eq!(result["dns"]["nameservers"], json!(["10.96.0.10"]));
    assert!(sh("nft list ruleset").contains("10.244.3.77"));
    ok(call("check"));
    ok(call("del"));
    assert!(!sh("nft list ruleset").contains("10.244.3.77"));
    lab::assert_nothing_left();
}

#[test]
fn what_is_asked_for_comes_from_the_runtime_before_the_configuration_before_the_environment() {
    lab::enter();
    let mut list = json!({"cniVersion": "1.0.0", "name": "plat", "plugins": [{"type": "plat", "isDefaultGateway": true,
        "ipam": {"subnet": "10.22.0.0/24"}, "capabilities": {"ips": true, "mac": true, "ipRanges": true}}]});
    install("10-plat.conflist", &list);
    let mut number = 0;
    // What the pod got: address and hardware address.
    let mut got = |list: &Value, capabilities: Value, args: &str| -> (String, String) {
        configure("10-plat.conflist", list);
        number += 1;
        let id = format!("c{number}");
        netns(&id);
        let mut command = cnitool("add", "plat", &id);
        let output =
            command.env("CNI_ARGS", args).env("CAP_ARGS", capabilities.to_string()).output().unwrap();
        let result = result(output);
        let mac = result["interfaces"][2]["mac"].as_str().unwrap().to_owned();
        assert_eq!(lab::json_of(&format!("ip -n {id} -j link show eth0"))[0]["address"], mac);
        (result["ips"][0]["address"].as_str().unwrap().to_owned(), mac)
    };
    let expect = |address: &str, mac: &str| (address.to_owned(), mac.to_owned());
    let args = "IgnoreUnknown=1;IP=10.22.0.41;MAC=0a:00:00:00:00:41;K8S_POD_NAME=x";
    assert_eq!(got(&list, json!({}), args), expect("10.22.0.41/24", "0a:00:00:00:00:41"));
    list["plugins"][0]["args"] = json!({"cni": {"ips": ["10.22.0.42"], "mac": "0a:00:00:00:00:42"}});
    assert_eq!(got(&list, json!({}), args), expect("10.22.0.42/24", "0a:00:00:00:00:42"));
    let asked = json!({"ips": ["10.22.0.43/24"], "mac": "0a:00:00:00:00:43"});
    assert_eq!(got(&list, asked, args), expect("10.22.0.43/24", "0a:00:00:00:00:43"));
    // Ranges of the runtime come first; alone they are all there is.
    let mut plain = list.clone();
    plain["plugins"][0]["args"] = json!(null);
    plain["plugins"][0]["isDefaultGateway"] = json!(false);
    let ranges = json!({"ipRanges": [[{"subnet": "10.33.0.0/24", "rangeStart": "10.33.0.9"}]]});
    assert_eq!(got(&plain, ranges.clone(), "").0, "10.33.0.9/24");
    plain["plugins"][0]["ipam"] = json!({});
    assert_eq!(got(&plain, ranges, "").0, "10.33.0.10/24");
    for id in (1..=5).map(|n| format!("c{n}")) {
        ok(cnitool("del", "plat", &id).output().unwrap());
    }
    lab::assert_nothing_left();
}

#[test]
fn status_through_libcni_says_why_the_network_is_not_ready() {
    lab::enter();
    install("05-plat.conflist", &conflist("1.1.0", vec![]));
    netns("c");
    let said = failed(cnitool("status", "plat", "c").output().unwrap());
    assert!(said.contains("this node has no block of addresses yet"), "{said}");
}
