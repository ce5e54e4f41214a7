//! DEL. Numbers are those of the conformance checklist in `docs/cni.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::fs::File;

use lab::{Datapath, Plat, add, blocks, cluster_conf, hand_conf, netns, sh, with};
use serde_json::{Value, json};

lab::in_each_datapath! {
    c64_an_empty_namespace_path_is_enough,
    c64_and_so_is_none_at_all,
    c65_the_namespaces_path_may_be_gone,
    c66_the_namespaces_path_may_be_a_plain_file,
    c67_the_pods_interface_may_be_gone,
    c67_and_so_may_the_hosts_end,
    c70_a_configuration_that_changed_since_does_not_keep_the_lease,
    c72_the_link_goes_first_then_the_lease,
    a_kill_at_any_step_is_made_good_by_the_next_del,
    without_a_store_the_kernel_says_what_to_take_away,
}

fn masq_conf() -> Value {
    with(hand_conf(), json!({"ipMasq": true}))
}

#[test]
fn c62_a_del_may_come_twice() {
    lab::enter();
    add("c", &masq_conf());
    for _ in 0..2 {
        Plat::call("DEL", "c", &masq_conf()).run().silent();
        lab::assert_nothing_left();
    }
}

#[test]
fn c63_a_del_may_come_without_an_add() {
    lab::enter();
    Plat::call("DEL", "never", &masq_conf()).run().silent();
    assert!(!lab::exists("/run/plat"), "it makes nothing, either");
    netns("namespace");
    Plat::call("DEL", "namespace", &masq_conf()).run().silent();
}

/// ADD, damage, DEL as the damage needs it; nothing may be left.
fn del_after(at: Datapath, damage: &str, call: impl FnOnce(Plat) -> Plat) {
    lab::enter();
    let conf = at.of(masq_conf());
    let result = add("c", &conf);
    sh(&damage.replace("HOST", lab::host_end(&result)["name"].as_str().unwrap()));
    call(Plat::call("DEL", "c", &conf)).run().silent();
    lab::assert_nothing_left();
}

fn c64_an_empty_namespace_path_is_enough(at: Datapath) {
    del_after(at, "true", |call| call.set("CNI_NETNS", ""));
}

fn c64_and_so_is_none_at_all(at: Datapath) {
    del_after(at, "true", |call| call.unset("CNI_NETNS"));
}

fn c65_the_namespaces_path_may_be_gone(at: Datapath) {
    del_after(at, "ip netns del c", |call| call);
}

fn c66_the_namespaces_path_may_be_a_plain_file(at: Datapath) {
    del_after(at, "umount /run/netns/c; test -f /run/netns/c", |call| call);
}

fn c67_the_pods_interface_may_be_gone(at: Datapath) {
    del_after(at, "ip -n c link del eth0", |call| call);
}

fn c67_and_so_may_the_hosts_end(at: Datapath) {
    del_after(at, "ip link del HOST", |call| call);
}

#[test]
fn c68_a_namespace_path_that_leads_to_the_host_costs_the_host_nothing() {
    lab::enter();
    // The host has an interface of the very name, also one that looks like a pod's.
    sh(
        "ip link add eth0 type veth peer name uplink; ip addr add 192.0.2.1/24 dev eth0; ip netns attach me $$",
    );
    let conf = masq_conf();
    add("c", &conf);
    for path in ["/run/netns/me", "/proc/self/ns/net", "/proc/1/ns/net"] {
        Plat::call("DEL", "c", &conf).set("CNI_NETNS", path).run().silent();
        assert!(sh("ip -o addr show eth0").contains("192.0.2.1"));
        sh("ip link show uplink");
    }
    assert_eq!(lab::leases(), Vec::<Value>::new());
    assert_eq!(lab::masqueraded(), Vec::<String>::new());
}

#[test]
fn c69_no_prev_result_is_needed_and_none_is_too_strange() {
    lab::enter();
    let strange = [
        json!(null),
        json!(7),
        json!([]),
        json!({"ips": 1}),
        json!({"cniVersion": "9.9.9"}),
        json!({"cniVersion": "0.2.0", "ip4": {"ip": "x"}}),
        json!({"cniVersion": "1.0.0", "interfaces": [{"name": "a"}], "ips": [{"address": "10.0.0.1/8", "interface": -1}]}),
    ];
    for (number, previous) in strange.into_iter().enumerate() {
        let id = format!("c{number}");
        add(&id, &hand_conf());
        Plat::call("DEL", &id, &with(hand_conf(), json!({"prevResult": previous}))).run().silent();
        lab::assert_nothing_left();
    }
}

fn c70_a_configuration_that_changed_since_does_not_keep_the_lease(at: Datapath) {
    lab::enter();
    let conf = at.of(cluster_conf());
    blocks(&["10.244.3.0/24"]);
    let changed = [
        json!({"name": "other"}),
        json!({"bridge": "br9"}),
        json!({"ipam": {"subnet": "10.99.0.0/24"}}),
        json!({"ipam": {"subnet": "not a subnet"}}),
        json!({"ipam": null}),
        json!({"vlan": 7, "mtu": "x"}),
        json!({"cniVersion": "0.3.1"}),
    ];
    for (number, change) in changed.into_iter().enumerate() {
        let id = format!("c{number}");
        add(&id, &conf);
        sh("rm -f /run/plat/blocks.json");
        Plat::call("DEL", &id, &with(conf.clone(), change)).run().silent();
        lab::assert_nothing_left();
        blocks(&["10.244.3.0/24"]);
    }
}

#[test]
fn c71_an_unsupported_version_is_never_silent() {
    lab::enter();
    add("c", &hand_conf());
    let _ = Plat::call("DEL", "c", &with(hand_conf(), json!({"cniVersion": "7.0.0"}))).run().error(1);
    assert_eq!(lab::leases().len(), 1);
}

fn c72_the_link_goes_first_then_the_lease(at: Datapath) {
    lab::enter();
    let conf = at.of(masq_conf());
    add("c", &conf);
    let _ = Plat::call("DEL", "c", &conf).set("PLAT_FAIL", "del-link:error").run().error(100);
    assert_eq!(lab::host_links(), Vec::<String>::new());
    assert_eq!(lab::leased(), ["10.22.0.2"], "nobody can have the address while the link may have it");
    Plat::call("DEL", "c", &conf).run().silent();
    lab::assert_nothing_left();
}

fn a_kill_at_any_step_is_made_good_by_the_next_del(at: Datapath) {
    lab::enter();
    let conf = at.of(masq_conf());
    for point in ["del-start", "del-link", "del-lease"] {
        add(point, &conf);
        assert!(!Plat::call("DEL", point, &conf).set("PLAT_FAIL", &format!("{point}:kill")).run().success);
        Plat::call("DEL", point, &conf).run().silent();
        lab::assert_nothing_left();
    }
}

#[test]
fn c73_a_damaged_store_costs_no_other_container_anything() {
    lab::enter();
    let conf = masq_conf();
    for id in ["a", "b", "c"] {
        add(id, &conf);
    }
    // Another container's record, its entry, then the header.
    for (damage, deleted, left) in [
        (plat_crds::lease::record_offset(1) + 100, "a", vec!["10.22.0.3", "10.22.0.4"]),
        (plat_crds::lease::entry_offset(0) + 3, "b", vec!["10.22.0.4"]),
        (3, "c", vec![]),
    ] {
        flip(damage);
        Plat::call("DEL", deleted, &conf).run().silent();
        assert_eq!(lab::leased(), left);
    }
    lab::assert_nothing_left();
}

fn flip(offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = File::options().read(true).write(true).open("/run/plat/leases").unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
}

#[test]
fn c74_an_error_that_is_to_be_tried_again_does_not_read_like_success() {
    lab::enter();
    add("c", &hand_conf());
    File::options().read(true).write(true).open("/run/plat/leases").unwrap().lock().unwrap();
    let file = File::options().read(true).write(true).open("/run/plat/leases").unwrap();
    file.lock().unwrap();
    let impatient = with(hand_conf(), json!({"lockTimeoutSeconds": 0}));
    let error = Plat::call("DEL", "c", &impatient).run().error(11);
    assert!(!error.contains("not found") && !error.contains("no such file"), "{error}");
    assert_eq!(lab::host_links(), Vec::<String>::new(), "the link went all the same");
    file.unlock().unwrap();
    Plat::call("DEL", "c", &hand_conf()).run().silent();
    lab::assert_nothing_left();
}

#[test]
fn c75_after_a_reboot_no_lease_is_left() {
    lab::enter();
    use plat_crds::lease::{HEADER_SIZE, Header};
    use std::os::unix::fs::FileExt;
    add("c", &hand_conf());
    // What a reboot ends: links and namespaces. What a /run on disk would keep: the store.
    sh("ip link del cni0; ip netns del c");
    lab::eventually("the link goes with its namespace", || lab::host_links().is_empty());
    let file = File::options().read(true).write(true).open("/run/plat/leases").unwrap();
    let mut bytes = [0; HEADER_SIZE];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let header = Header::decode(&bytes).unwrap();
    file.write_all_at(&Header { boot_id: [1; 16], ..header }.encode(), 0).unwrap();
    assert_eq!(lab::leases(), Vec::<Value>::new());
    Plat::call("DEL", "c", &hand_conf()).run().silent();
    assert_eq!(lab::address(&add("d", &hand_conf())), "10.22.0.2");
}

fn without_a_store_the_kernel_says_what_to_take_away(at: Datapath) {
    lab::enter();
    let conf = at.of(masq_conf());
    add("c", &conf);
    add("other", &conf);
    sh("rm -rf /run/plat");
    Plat::call("DEL", "c", &conf).set("CNI_NETNS", "").run().silent();
    assert!(!lab::exists("/run/plat"), "a DEL makes no store");
    assert_eq!(lab::masqueraded(), ["10.22.0.3 : jump masq-10-22-0-0-24"]);
    assert_eq!(lab::host_links().len(), 1);
    Plat::call("DEL", "other", &conf).run().silent();
    lab::assert_nothing_left();
}

#[test]
fn a_read_only_store_keeps_the_lease_and_says_so() {
    lab::enter();
    add("c", &hand_conf());
    sh("mount --bind /run/plat /run/plat; mount -o remount,bind,ro /run/plat");
    let error = Plat::call("DEL", "c", &hand_conf()).run().error(5);
    assert!(error.contains("read-only"), "{error}");
    sh("umount /run/plat");
    assert_eq!(lab::leased(), ["10.22.0.2"]);
    Plat::call("DEL", "c", &hand_conf()).run().silent();
    lab::assert_nothing_left();
}

#[test]
fn rules_that_an_administrator_flushed_are_no_error() {
    lab::enter();
    let conf = masq_conf();
    add("c", &conf);
    sh("nft flush ruleset");
    Plat::call("DEL", "c", &conf).run().silent();
    lab::assert_nothing_left();
    netns("d");
    Plat::call("ADD", "d", &conf).result();
    assert_eq!(lab::masqueraded(), ["10.22.0.3 : jump masq-10-22-0-0-24"]);
}
