//! CHECK, STATUS and GC. Numbers are those of the conformance checklist in `docs/cni.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::fs::File;

use lab::{Answer, Datapath, Plat, add, blocks, cluster_conf, hand_conf, sh, with};
use serde_json::{Value, json};

lab::in_each_datapath! {
    c76_directly_after_add_all_is_well_in_every_version_and_style,
    c79_what_a_chained_plugin_changed_and_reported_is_fine,
    c80_what_others_added_is_fine,
}

fn check(id: &str, conf: &Value, result: &Value) -> Answer {
    Plat::call("CHECK", id, &with(conf.clone(), json!({"prevResult": result}))).run()
}

fn c76_directly_after_add_all_is_well_in_every_version_and_style(at: Datapath) {
    lab::enter();
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    for (number, version) in ["0.4.0", "1.0.0", "1.1.0"].iter().enumerate() {
        let change = json!({"cniVersion": version, "ipMasq": true});
        for (style, conf) in
            [("hand", with(hand_conf(), change.clone())), ("cluster", with(cluster_conf(), change.clone()))]
        {
            let conf = at.of(conf);
            let id = format!("{style}{number}");
            let result = add(&id, &conf);
            check(&id, &conf, &result).silent();
        }
    }
}

#[test]
fn c77_without_prev_result_there_is_nothing_to_compare_with() {
    lab::enter();
    add("c", &hand_conf());
    assert!(Plat::call("CHECK", "c", &hand_conf()).run().error(7).contains("prevResult"));
}

#[test]
fn c78_each_loss_is_named() {
    lab::enter();
    let conf = with(hand_conf(), json!({"ipMasq": true, "hairpinMode": true}));
    for (number, (damage, words)) in [
        ("ip -n ID addr del 10.22.0.ADDR/24 dev eth0", "lacks address"),
        ("ip -n ID route del default", "route to 0.0.0.0/0"),
        ("ip -n ID link set eth0 down", "eth0 is down"),
        ("ip -n ID link set eth0 address 0a:00:00:00:00:99", "hardware address"),
        ("ip -n ID link set eth0 mtu 1300", "MTU 1300"),
        ("ip link set HOST nomaster", "not a port of the bridge"),
        ("ip link set HOST down", "is down"),
        ("ip link set HOST type bridge_slave hairpin off", "hairpin"),
        ("ip link del HOST", "is gone"),
        ("nft flush map inet plat-pods masq4", "in inet plat-pods masq4"),
        ("nft flush ruleset", "no element 10.22.0."),
        ("ip netns del ID; ip netns add ID", "is gone"),
        ("rm /run/plat/leases; ip link set HOST alias x", "no lease is recorded"),
        // Last, as an ADD only writes its elements as long as they find their places.
        (
            "nft flush chain inet plat-pods masq",
            "no rule 'ip saddr vmap @masq4' in chain inet plat-pods masq",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("c{number}");
        let result = add(&id, &conf);
        check(&id, &conf, &result).silent();
        let last = lab::address(&result).rsplit('.').next().unwrap().to_owned();
        let host = result["interfaces"][1]["name"].as_str().unwrap();
        sh(&damage.replace("ID", &id).replace("ADDR", &last).replace("HOST", host));
        let error = check(&id, &conf, &result).error(105);
        assert!(error.contains(words), "{damage}: {error}");
        Plat::call("DEL", &id, &conf).run();
    }
}

#[test]
fn c78_a_namespace_that_is_gone_is_named() {
    lab::enter();
    let result = add("c", &hand_conf());
    sh("ip netns del c");
    let answer = check("c", &hand_conf(), &result);
    // The link went with its namespace; either loss may be met first.
    assert!(
        !answer.success && (answer.stdout.contains("is gone") || answer.stdout.contains("CNI_NETNS")),
        "{answer:?}"
    );
}

fn c79_what_a_chained_plugin_changed_and_reported_is_fine(at: Datapath) {
    lab::enter();
    let conf = at.of(hand_conf());
    let mut result = add("c", &conf);
    sh("ip -n c link set eth0 address 0a:00:00:00:00:99 mtu 1300");
    let pod = result["interfaces"].as_array_mut().unwrap().last_mut().unwrap();
    pod["mac"] = json!("0A:00:00:00:00:99");
    pod["mtu"] = json!(1300);
    check("c", &conf, &result).silent();
    assert!(lab::ping("c", "10.22.0.1"), "the kernel asks for what it does not know");
}

fn c80_what_others_added_is_fine(at: Datapath) {
    lab::enter();
    let conf = at.of(hand_conf());
    let result = add("c", &conf);
    sh("ip -n c addr add 10.99.0.1/24 dev eth0; ip -n c route add 198.51.100.0/24 via 10.22.0.1");
    check("c", &conf, &result).silent();
}

#[test]
fn c81_status_does_not_wait_for_the_lock() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    add("c", &cluster_conf());
    let file = File::options().read(true).write(true).open("/run/plat/leases").unwrap();
    file.lock().unwrap();
    for change in [json!({}), json!({"failStatusWhenFull": true})] {
        Plat::bare("STATUS").input(&with(cluster_conf(), change)).run().silent();
    }
}

#[test]
fn c82_status_fails_without_a_block_or_with_a_store_that_cannot_be_written() {
    lab::enter();
    let status = |conf: &Value| Plat::bare("STATUS").input(conf).run();
    let _ = status(&cluster_conf()).error(50);
    blocks(&[]);
    let _ = status(&cluster_conf()).error(50);
    lab::write_blocks(&["10.244.3.0/24"], |file| file.boot_id = "other".into());
    let _ = status(&cluster_conf()).error(50);
    // An agent that is away, or a block that drains, is no reason to evict pods.
    lab::write_blocks(&["10.244.3.0/24"], |file| file.lease_until = 1);
    status(&cluster_conf()).silent();
    lab::write_blocks(&["10.244.3.0/24"], |file| file.blocks[0].lease = false);
    status(&cluster_conf()).silent();
    blocks(&["10.244.3.0/24"]);
    status(&cluster_conf()).silent();
    sh(
        "mkdir /run/ro; cp /run/plat/blocks.json /run/ro/; mount --bind /run/ro /run/ro; mount -o remount,bind,ro /run/ro",
    );
    let error = status(&with(cluster_conf(), json!({"runDir": "/run/ro"}))).error(50);
    assert!(error.contains("/run/ro"), "{error}");
    assert!(!lab::exists("/run/plat/leases"), "it changes nothing");
}

#[test]
fn c82_after_a_status_that_failed_an_add_is_tried_all_the_same() {
    lab::enter();
    let _ = Plat::bare("STATUS").input(&cluster_conf()).run().error(50);
    blocks(&["10.244.3.0/24"]);
    add("c", &cluster_conf());
}

#[test]
fn c82_a_full_file_system_fails_status_exactly_when_it_fails_add() {
    lab::enter();
    sh("mkdir /run/small; mount -t tmpfs -o size=64k tmpfs /run/small");
    let conf = with(hand_conf(), json!({"runDir": "/run/small"}));
    let status = || Plat::bare("STATUS").input(&conf).run();
    let fill = "dd if=/dev/zero of=/run/small/junk bs=4k 2>/dev/null || true";
    status().silent();
    for id in ["a", "b"] {
        add(id, &conf);
    }
    sh(fill);
    assert!(status().error(50).contains("/run/small/leases: the file system is full"));
    // The slot of a lease that ended has its room already.
    Plat::call("DEL", "a", &conf).run().silent();
    status().silent();
    add("c", &conf);
    assert!(status().error(50).contains("full"));
    sh(&format!("rm /run/small/junk /run/small/leases; {fill}"));
    assert!(status().error(50).contains("/run/small: the file system is full"), "no store yet");
    lab::netns("d");
    assert!(Plat::call("ADD", "d", &conf).run().error(5).contains("full"));
}

#[test]
fn c82_a_store_of_a_newer_version_fails_status_as_it_fails_add() {
    lab::enter();
    add("a", &hand_conf());
    let mut bytes = std::fs::read("/run/plat/leases").unwrap();
    bytes[8] = 99;
    let sum = plat_crds::lease::checksum(&bytes[..56]).to_le_bytes();
    bytes[56..64].copy_from_slice(&sum);
    std::fs::write("/run/plat/leases", &bytes).unwrap();
    assert!(Plat::bare("STATUS").input(&hand_conf()).run().error(50).contains("install the CNI binary"));
    lab::netns("b");
    let _ = Plat::call("ADD", "b", &hand_conf()).run().error(11);
}

#[test]
fn c82_a_full_block_fails_status_only_if_the_configuration_says_so() {
    lab::enter();
    blocks(&["10.244.3.0/30"]);
    add("c", &cluster_conf());
    Plat::bare("STATUS").input(&cluster_conf()).run().silent();
    let strict = with(cluster_conf(), json!({"failStatusWhenFull": true}));
    assert!(Plat::bare("STATUS").input(&strict).run().error(50).contains("10.244.3.0/30"));
    Plat::call("DEL", "c", &cluster_conf()).run().silent();
    Plat::bare("STATUS").input(&strict).run().silent();
}

fn gc(conf: &Value, attachments: Value) -> Answer {
    Plat::bare("GC").input(&with(conf.clone(), attachments)).run()
}

fn impatient(conf: Value) -> Value {
    with(conf, json!({"gcGraceSeconds": 0, "ipMasq": true}))
}

#[test]
fn c83_only_what_is_not_listed_goes() {
    lab::enter();
    let conf = impatient(hand_conf());
    for id in ["stays", "goes"] {
        add(id, &conf);
    }
    gc(&conf, json!({"cni.dev/valid-attachments": [{"containerID": "stays", "ifname": "eth0"}]})).silent();
    assert_eq!(lab::leased(), ["10.22.0.2"]);
    assert_eq!((lab::host_links().len(), lab::masqueraded().len()), (1, 1));
    assert!(lab::ping("stays", "10.22.0.1"));
    // The same container with another interface is another attachment.
    gc(&conf, json!({"cni.dev/valid-attachments": [{"containerID": "stays", "ifname": "net1"}]})).silent();
    lab::assert_nothing_left();
}

#[test]
fn c87_other_networks_are_left_alone() {
    lab::enter();
    let mine = impatient(hand_conf());
    let other = impatient(with(
        hand_conf(),
        json!({"name": "other", "bridge": "br1", "ipam": {"subnet": "10.33.0.0/24"}}),
    ));
    for id in ["stays", "goes"] {
        add(id, &mine);
    }
    add("other", &other);
    gc(&mine, json!({"cni.dev/valid-attachments": [{"containerID": "stays", "ifname": "eth0"}]})).silent();
    assert_eq!(lab::leased(), ["10.22.0.2", "10.33.0.2"]);
    assert_eq!(lab::host_links().len(), 2);
    assert_eq!(lab::masqueraded().len(), 2);
    assert!(lab::ping("stays", "10.22.0.1") && lab::ping("other", "10.33.0.1"));
    gc(&mine, json!({"cni.dev/valid-attachments": []})).silent();
    assert_eq!(lab::leased(), ["10.33.0.2"]);
}

#[test]
fn c84_an_empty_list_or_null_means_all_and_no_list_means_nothing() {
    lab::enter();
    let conf = impatient(hand_conf());
    for (number, list) in
        [json!({"cni.dev/valid-attachments": null}), json!({"cni.dev/valid-attachments": []})]
            .into_iter()
            .enumerate()
    {
        add(&format!("c{number}"), &conf);
        gc(&conf, json!({})).silent();
        assert_eq!(lab::leases().len(), 1);
        gc(&conf, list).silent();
        lab::assert_nothing_left();
    }
}

#[test]
fn c85_both_names_of_the_list_in_any_case_count() {
    lab::enter();
    let conf = impatient(hand_conf());
    add("stays", &conf);
    for list in [
        json!({"cni.dev/attachments": [{"containerID": "stays", "ifname": "eth0"}]}),
        json!({"CNI.DEV/Valid-Attachments": [{"ContainerID": "stays", "IfName": "eth0"}]}),
        json!({"cni.dev/attachments": null, "cni.dev/valid-attachments": [{"containerID": "stays", "ifname": "eth0"}]}),
    ] {
        gc(&conf, list).silent();
        assert_eq!(lab::leases().len(), 1);
    }
    let _ = gc(&conf, json!({"cni.dev/valid-attachments": 7})).error(6);
}

#[test]
fn a_young_lease_is_not_collected() {
    lab::enter();
    add("c", &hand_conf());
    gc(&hand_conf(), json!({"cni.dev/valid-attachments": []})).silent();
    assert_eq!(lab::leases().len(), 1, "its ADD may be younger than the list");
}

#[test]
fn c86_what_cannot_be_removed_does_not_keep_the_rest() {
    lab::enter();
    let conf = impatient(hand_conf());
    for id in ["a", "b", "c"] {
        add(id, &conf);
    }
    let all = with(conf, json!({"cni.dev/valid-attachments": []}));
    let answer = Plat::bare("GC").input(&all).set("PLAT_FAIL", "gc-b:error").run();
    let error = answer.error(107);
    assert!(error.contains("1 of 3") && error.contains("eth0 of b"), "{error}");
    assert_eq!(lab::leased(), ["10.22.0.3"]);
    Plat::bare("GC").input(&all).run().silent();
    lab::assert_nothing_left();
}
