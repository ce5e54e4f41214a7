//! The real libcni (cnitool) as the caller, with conflists as a runtime loads them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::fs;
use std::process::{Command, Output};

use lab::{blocks, netns, sh};
use serde_json::{Value, json};

/// Installs our binary and the reference plugins in one folder, and a conflist.
fn install(list: &Value) {
    rustix::mount::mount("tmpfs", "/var/lib", "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    fs::create_dir_all("/run/bin").unwrap();
    fs::create_dir_all("/run/net.d").unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_plat"), "/run/bin/plat").unwrap();
    for plugin in ["portmap", "host-local"] {
        std::os::unix::fs::symlink(lab::tools().join("cni").join(plugin), format!("/run/bin/{plugin}"))
            .unwrap();
    }
    fs::write("/run/net.d/05-plat.conflist", list.to_string()).unwrap();
}

fn cnitool(verb: &str, id: &str, capabilities: &Value) -> Output {
    Command::new(lab::tools().join("cnitool"))
        .args([verb, "plat", &format!("/run/netns/{id}")])
        .env("CNI_PATH", "/run/bin")
        .env("NETCONFPATH", "/run/net.d")
        .env("CAP_ARGS", capabilities.to_string())
        .output()
        .unwrap()
}

#[track_caller]
fn ok(output: Output) -> String {
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn conflist(version: &str, versions: Value, chained: Vec<Value>) -> Value {
    let mut plugins = vec![
        json!({"type": "plat", "ipam": {"type": "plat"}, "capabilities": {"ips": true, "mac": true, "dns": true}}),
    ];
    plugins.extend(chained);
    let mut list =
        json!({"cniVersion": version, "name": "plat", "loadOnlyInlinedPlugins": true, "plugins": plugins});
    if !versions.is_null() {
        list["cniVersions"] = versions;
    }
    list
}

#[test]
fn c27_libcni_reads_our_results_of_every_version_and_all_its_verbs_succeed() {
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        std::thread::spawn(move || {
            lab::enter();
            blocks(&["10.244.3.0/24", "fd00:3::/64"]);
            install(&conflist(version, json!(null), vec![]));
            netns("c");
            let result: Value = serde_json::from_str(&ok(cnitool("add", "c", &json!({})))).unwrap();
            assert_eq!(result["cniVersion"], version);
            assert!(lab::ping("c", "10.244.3.1"));
            if ["0.4.0", "1.0.0", "1.1.0"].contains(&version) {
                ok(cnitool("check", "c", &json!({})));
            }
            if version == "1.1.0" {
                ok(cnitool("status", "c", &json!({})));
                ok(cnitool("gc", "c", &json!({})));
            }
            ok(cnitool("del", "c", &json!({})));
            lab::assert_nothing_left();
        })
        .join()
        .unwrap_or_else(|_| panic!("version {version}"));
    }
}

#[test]
fn the_conflist_that_the_agent_installs_works_with_portmap_behind_us() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    sh("sysctl -qw net.ipv4.ip_forward=1");
    let portmap = json!({"type": "portmap", "capabilities": {"portMappings": true}});
    install(&conflist("1.0.0", json!(["1.0.0", "1.1.0"]), vec![portmap]));
    netns("c");
    let capabilities = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}], "ips": ["10.244.3.77"],
        "mac": "0a:00:00:00:00:77", "dns": {"servers": ["10.96.0.10"]}});
    let result: Value = serde_json::from_str(&ok(cnitool("add", "c", &capabilities))).unwrap();
    assert_eq!(result["cniVersion"], "1.1.0", "the highest of the list");
    assert_eq!(result["ips"][0]["address"], "10.244.3.77/32");
    assert_eq!(result["interfaces"][2]["mac"], "0a:00:00:00:00:77");
    assert_eq!(result["dns"]["nameservers"], json!(["10.96.0.10"]));
    assert!(sh("nft list ruleset").contains("10.244.3.77"));
    ok(cnitool("check", "c", &capabilities));
    ok(cnitool("del", "c", &capabilities));
    assert!(!sh("nft list ruleset").contains("10.244.3.77"));
    lab::assert_nothing_left();
}

#[test]
fn status_through_libcni_says_why_the_network_is_not_ready() {
    lab::enter();
    install(&conflist("1.1.0", json!(null), vec![]));
    netns("c");
    let output = cnitool("status", "c", &json!({}));
    assert!(!output.status.success());
    let text = [output.stdout, output.stderr].concat();
    assert!(String::from_utf8_lossy(&text).contains("this node has no block of addresses yet"));
}
