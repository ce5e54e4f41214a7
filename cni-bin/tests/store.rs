//! Damage to the lease store: whatever becomes of the file, no address that a living pod has is given to
//! another one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use lab::{Plat, add, address, blocks, cluster_conf, hand_conf, netns, sh, with};
use plat_cni::boot::BootId;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::store::{Missing, Store};
use plat_cni::sweep::Sweeper;
use plat_crds::lease::{HEADER_SIZE, Header, entry_offset, record_offset};
use serde_json::{Value, json};

const FILE: &str = "/run/plat/leases";

fn flip(offset: u64) {
    let file = File::options().read(true).write(true).open(FILE).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 0x04], offset).unwrap();
}

type Damage = (&'static str, Box<dyn Fn()>);

/// What can happen to the file.
fn damages() -> Vec<Damage> {
    let write = |bytes: &'static [u8]| move || fs::write(FILE, bytes).unwrap();
    vec![
        ("removed", Box::new(|| fs::remove_file(FILE).unwrap())),
        (
            "folder removed",
            Box::new(|| {
                let text = fs::read("/run/plat/blocks.json").unwrap();
                fs::remove_dir_all("/run/plat").unwrap();
                fs::create_dir("/run/plat").unwrap();
                fs::write("/run/plat/blocks.json", text).unwrap();
            }),
        ),
        ("emptied", Box::new(write(b""))),
        ("garbage", Box::new(write(b"#!/bin/sh\necho this is no lease store\n"))),
        ("zeros", Box::new(write(&[0; 9000]))),
        ("header flipped", Box::new(|| flip(9))),
        ("boot id flipped", Box::new(|| flip(20))),
        ("entries flipped", Box::new(|| (0..5).for_each(|slot| flip(entry_offset(slot) + 10)))),
        (
            "an entry zeroed half",
            Box::new(|| {
                File::options()
                    .write(true)
                    .open(FILE)
                    .unwrap()
                    .write_all_at(&[0; 32], entry_offset(2))
                    .unwrap();
            }),
        ),
        (
            "an entry zeroed whole",
            Box::new(|| {
                File::options()
                    .write(true)
                    .open(FILE)
                    .unwrap()
                    .write_all_at(&[0; 64], entry_offset(1))
                    .unwrap();
            }),
        ),
        ("records flipped", Box::new(|| (0..5).for_each(|slot| flip(record_offset(slot) + 5)))),
        (
            "cut in the index",
            Box::new(|| {
                File::options().write(true).open(FILE).unwrap().set_len(entry_offset(3) + 7).unwrap()
            }),
        ),
        (
            "cut in the records",
            Box::new(|| {
                File::options().write(true).open(FILE).unwrap().set_len(record_offset(3) + 7).unwrap()
            }),
        ),
        (
            "another boot",
            Box::new(|| {
                let file = File::options().read(true).write(true).open(FILE).unwrap();
                let mut bytes = [0; HEADER_SIZE];
                file.read_exact_at(&mut bytes, 0).unwrap();
                let header = Header::decode(&bytes).unwrap();
                file.write_all_at(&Header { boot_id: [9; 16], ..header }.encode(), 0).unwrap();
            }),
        ),
    ]
}

#[test]
fn no_damage_makes_two_living_pods_share_an_address() {
    lab::enter();
    // A block of 29 addresses, of which 6 are held at first.
    blocks(&["10.244.3.0/27", "fd00:3::/123"]);
    let mut live: BTreeSet<String> = BTreeSet::new();
    let mut connect = |id: String| {
        let result = add(&id, &cluster_conf());
        for ip in result["ips"].as_array().unwrap() {
            assert!(live.insert(ip["address"].as_str().unwrap().to_owned()), "{id}: {result} given twice");
        }
    };
    for number in 0..6 {
        connect(format!("first{number}"));
    }
    for (name, damage) in damages() {
        damage();
        connect(name.replace(' ', "-"));
        // Every lease is back, and every pod's DEL finds it.
        assert_eq!(lab::leases().len(), lab::host_links().len(), "{name}");
    }
    assert_eq!(lab::leased().len(), live.len());
    for lease in lab::leases() {
        Plat::call("DEL", lease["containerID"].as_str().unwrap(), &cluster_conf()).run().silent();
    }
    lab::assert_nothing_left();
}

#[test]
fn a_newer_store_is_left_alone() {
    lab::enter();
    add("c", &hand_conf());
    let mut bytes = fs::read(FILE).unwrap();
    bytes[8] = 2;
    let sum = plat_crds::lease::checksum(&bytes[..HEADER_SIZE - 8]);
    bytes[HEADER_SIZE - 8..HEADER_SIZE].copy_from_slice(&sum.to_le_bytes());
    fs::write(FILE, &bytes).unwrap();
    netns("d");
    let error = Plat::call("ADD", "d", &hand_conf()).run().error(11);
    assert!(error.contains("version 2") && error.contains("install"), "{error}");
    let _ = Plat::call("DEL", "c", &hand_conf()).run().error(11);
    assert!(fs::read(FILE).unwrap() == bytes, "not a byte has changed");
}

#[test]
fn something_else_in_its_place_is_named() {
    lab::enter();
    fs::create_dir_all(FILE).unwrap();
    netns("c");
    let error = Plat::call("ADD", "c", &hand_conf()).run().error(5);
    assert!(error.contains(FILE), "{error}");
    sh("rmdir /run/plat/leases");
    lab::assert_nothing_left();
}

#[test]
fn a_rebuilt_lease_is_the_one_that_was_lost() {
    lab::enter();
    blocks(&["10.244.3.0/24", "fd00:3::/64"]);
    add("a", &with(hand_conf(), json!({"ipMasq": true})));
    add("b", &cluster_conf());
    let facts = || -> Vec<Value> {
        let fact = |l: Value| json!([l["containerID"], l["network"], l["pool"], l["addresses"], l["veth"]]);
        lab::leases().into_iter().map(fact).collect()
    };
    let before = facts();
    fs::remove_file(FILE).unwrap();
    let other = with(hand_conf(), json!({"name": "other", "bridge": "br1"}));
    assert_eq!(address(&add("c", &other)), "10.22.0.2", "of another network");
    assert_eq!(facts().iter().filter(|fact| fact[0] != "c").cloned().collect::<Vec<_>>(), before);
}

#[test]
fn a_rebuilt_lease_without_room_for_its_network_counts_in_every_network() {
    lab::enter();
    let long = "a".repeat(227);
    netns("a");
    let call = Plat::call("ADD", &long, &hand_conf()).set("CNI_NETNS", "/run/netns/a");
    assert_eq!(address(&call.result()), "10.22.0.2");
    fs::remove_file(FILE).unwrap();
    let other = with(hand_conf(), json!({"name": "other", "bridge": "br1"}));
    assert_eq!(address(&add("b", &other)), "10.22.0.3", "nobody knows any more which network .2 is of");
    let rebuilt = &lab::leases()[0];
    assert_eq!((&rebuilt["network"], &rebuilt["pool"]), (&Value::Null, &json!("unknown")));
}

#[test]
fn a_pod_that_changes_its_own_addresses_changes_no_lease() {
    lab::enter();
    blocks(&["10.244.3.0/28"]);
    add("a", &cluster_conf());
    sh("ip -n a addr flush dev eth0; for n in 3 4 5 6; do ip -n a addr add 10.244.3.$n/32 dev eth0; done");
    fs::remove_file(FILE).unwrap();
    assert_eq!(address(&add("b", &cluster_conf())), "10.244.3.3");
    assert_eq!(lab::leased(), ["10.244.3.2", "10.244.3.3"]);
}

#[test]
fn plat_leases_prints_who_holds_what() {
    lab::enter();
    blocks(&["10.244.3.0/24", "fd00:3::/64"]);
    add("c1", &cluster_conf());
    let table = lab::run(env!("CARGO_BIN_EXE_plat"), &["leases"]);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("ADDRESS"), "{table}");
    assert!(lines[1].starts_with("10.244.3.2,fd00:3::2  c1         eth0       plat"), "{table}");
    let json = &lab::leases()[0];
    assert_eq!((&json["pool"], &json["containerID"]), (&json!("blocks"), &json!("c1")));
    assert_eq!(json["veth"]["name"].as_str(), lab::host_links().first().map(String::as_str));
    let index = lab::json_of("ip -j link show type veth")[0]["ifindex"].clone();
    assert_eq!(json["veth"]["index"], index);
    let empty = lab::run(env!("CARGO_BIN_EXE_plat"), &["leases", "--json", "--run-dir", "/run/nowhere"]);
    assert_eq!(empty.trim(), r#"{"leases":[]}"#);
    assert!(!lab::exists("/run/nowhere"));
}

fn sweeper() -> Sweeper {
    let kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
    Sweeper::new(Store::at(FILE.as_ref()), BootId::read().unwrap(), Missing::Leave, Box::new(kernel))
}

#[test]
fn the_sweep_only_suspects_a_lease_whose_link_is_gone_at_first() {
    lab::enter();
    let conf = with(hand_conf(), json!({"ipMasq": true}));
    add("lives", &conf);
    add("dead", &conf);
    sh("ip netns del dead");
    lab::eventually("the link goes with its namespace", || lab::host_links().len() == 1);
    let mut sweeper = sweeper();
    let report = sweeper.sweep(Duration::from_secs(5)).unwrap();
    assert_eq!((report.leases.len(), report.ended.len(), report.suspected), (2, 0, 1));
    assert_eq!(lab::leases().len(), 2, "nothing is ended at the first sighting");
}

#[test]
fn the_sweep_ends_a_lease_whose_link_stays_gone_and_its_address_can_be_had_again() {
    lab::enter();
    let conf = with(hand_conf(), json!({"ipMasq": true, "ipam": {"subnet": "10.22.0.0/30"}}));
    add("dead", &conf);
    sh("ip netns del dead");
    lab::eventually("the link goes with its namespace", || lab::host_links().is_empty());
    netns("next");
    let _ = Plat::call("ADD", "next", &conf).run().error(101);
    let (mut sweeper, wait) = (sweeper(), Duration::from_secs(5));
    assert_eq!(sweeper.sweep_at(1_000_000, wait).unwrap().suspected, 1);
    assert_eq!(sweeper.sweep_at(1_089_999, wait).unwrap().ended, []);
    let report = sweeper.sweep_at(1_090_000, wait).unwrap();
    assert_eq!((report.ended.len(), report.leases.len(), report.suspected), (1, 0, 0));
    assert_eq!(report.ended[0].container_id, "dead");
    lab::assert_nothing_left();
    assert_eq!(address(&Plat::call("ADD", "next", &conf).result()), "10.22.0.2");
    // The DEL that comes late after all finds nothing of its own, and takes nothing of the other's.
    Plat::call("DEL", "dead", &conf).run().silent();
    assert_eq!(lab::leased(), ["10.22.0.2"]);
}

#[test]
fn the_sweep_of_a_missing_store_finds_nothing_and_makes_nothing() {
    lab::enter();
    let report = sweeper().sweep(Duration::from_secs(5)).unwrap();
    assert_eq!(report, plat_cni::sweep::Report::default());
    assert!(!lab::exists("/run/plat"));
}

#[test]
fn the_masquerade_of_all_leases_can_be_written_again_after_a_flush() {
    lab::enter();
    let conf = with(hand_conf(), json!({"ipMasq": true}));
    add("a", &conf);
    add("b", &conf);
    let before = sh("nft list ruleset");
    for damage in [
        "nft flush ruleset",
        "nft flush table inet plat-pods",
        "nft add element inet plat-pods masq4 '{ 10.9.9.9 : jump masq-10-22-0-0-24 }'",
        "true",
    ] {
        sh(damage);
        lab::restore();
        assert_eq!(sh("nft list ruleset"), before, "{damage}");
    }
}
