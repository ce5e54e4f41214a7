//! Several blocks per node: pods of each reach each other, and a full one is waited for where another may come.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::process::Child;

use lab::{
    Answer, Datapath, Plat, add, address, cluster_conf, eventually, in_each_datapath, netns, ping, with,
};
use plat_crds::block::Family;
use rustix::mount::{MountFlags, mount};
use serde_json::{Value, json};

/// Two blocks of five addresses.
const FULL: &str = "10.244.3.0/29";
const NEXT: &str = "10.244.9.0/29";

/// Enters a laboratory whose host forwards, which is the agent's to see to.
fn enter() {
    lab::enter();
    lab::sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
}

/// The node has one block, and may get another.
fn one_block_that_may_grow() {
    lab::write_blocks(&[FULL], |file| file.may_grow = vec![Family::IPv4]);
}

fn fill(conf: &Value) {
    (2..7).for_each(|n| {
        let given = add(&format!("c{n}"), conf);
        assert_eq!(address(&given), format!("10.244.3.{n}"));
    });
}

fn answer(call: Child) -> Answer {
    Answer::of(call.wait_with_output().unwrap())
}

/// Starts an ADD and sees that it waits, without the lease store's lock.
fn waiting(id: &str, conf: &Value) -> Child {
    netns(id);
    let held = lab::leases().len();
    let mut call = Plat::call("ADD", id, conf).start();
    // `plat leases` takes the lock as well. What it took it for is over by the time of a few of these.
    for _ in 0..10 {
        assert_eq!(lab::leases().len(), held);
        assert!(call.try_wait().unwrap().is_none(), "it did not wait: {:?}", answer(call));
    }
    call
}

in_each_datapath! {
    an_add_that_finds_the_block_full_waits_for_the_next_one,
    pods_of_all_blocks_reach_each_other_while_one_drains,
}

fn an_add_that_finds_the_block_full_waits_for_the_next_one(datapath: Datapath) {
    enter();
    let conf = datapath.of(cluster_conf());
    one_block_that_may_grow();
    fill(&conf);
    let calls = ["late1", "late2"].map(|id| waiting(id, &conf));
    // The lease of the node moves on meanwhile, which is no news.
    lab::write_blocks(&[FULL], |file| (file.may_grow, file.lease_until) = (vec![Family::IPv4], 1 << 60));
    lab::write_blocks(&[FULL, NEXT], |_| {});
    let mut given: Vec<String> = calls.into_iter().map(|call| address(&answer(call).json())).collect();
    given.sort();
    assert_eq!(given, ["10.244.9.2", "10.244.9.3"]);
    assert!(ping("late1", "10.244.3.2") && ping("c2", &given[1]));
}

fn pods_of_all_blocks_reach_each_other_while_one_drains(datapath: Datapath) {
    enter();
    let conf = datapath.of(with(cluster_conf(), json!({"antiSpoofing": true})));
    let blocks = ["10.244.3.0/24", "fd00:10:244:3::/64", "10.9.0.0/28", "fd00:9::/112"];
    lab::write_blocks(&blocks[..2], |_| {});
    add("old", &conf);
    // Another range: nothing of the addresses is the same.
    lab::write_blocks(&blocks, |file| file.blocks[..2].iter_mut().for_each(|block| block.lease = false));
    let given = add("new", &conf);
    let ips: Vec<&str> =
        given["ips"].as_array().unwrap().iter().map(|ip| ip["address"].as_str().unwrap()).collect();
    assert!(ips[0].starts_with("10.9.0.2/") && ips[1].starts_with("fd00:9::2/"), "{ips:?}");
    for (from, to) in [
        ("old", "10.9.0.2"),
        ("old", "fd00:9::2"),
        ("new", "10.244.3.2"),
        ("new", "fd00:10:244:3::2"),
        // Every gateway, from pods of every block.
        ("old", "10.9.0.1"),
        ("new", "10.244.3.1"),
        ("new", "fd00:10:244:3::1"),
    ] {
        assert!(ping(from, to), "{from} to {to}");
    }
    ["old", "new"].iter().for_each(|id| Plat::call("DEL", id, &conf).run().silent());
    lab::assert_nothing_left();
}

#[test]
fn an_add_that_waits_takes_an_address_that_a_del_frees() {
    enter();
    let conf = cluster_conf();
    one_block_that_may_grow();
    fill(&conf);
    let call = waiting("late", &conf);
    Plat::call("DEL", "c4", &conf).run().silent();
    assert_eq!(address(&answer(call).json()), "10.244.3.4");
}

#[test]
fn a_block_that_pods_of_another_network_fill_is_waited_for_as_well() {
    enter();
    let conf = cluster_conf();
    one_block_that_may_grow();
    // Seen by this test alone.
    mount("tmpfs", "/var/lib", "tmpfs", MountFlags::empty(), None).unwrap();
    let others = "/var/lib/cni/networks/ref";
    std::fs::create_dir_all(others).unwrap();
    for n in 3..7 {
        std::fs::write(format!("{others}/10.244.3.{n}"), format!("old{n}\r\neth0")).unwrap();
    }
    assert_eq!(address(&add("c2", &conf)), "10.244.3.2");
    let call = waiting("late", &conf);
    lab::write_blocks(&[FULL, NEXT], |_| {});
    assert_eq!(address(&answer(call).json()), "10.244.9.2");
}

#[test]
fn an_add_that_fails_for_something_else_than_addresses_does_not_wait() {
    enter();
    let conf = cluster_conf();
    one_block_that_may_grow();
    fill(&conf);
    netns("again");
    let words = Plat::call("ADD", "c2", &conf).set("CNI_NETNS", "/run/netns/again").run().error(103);
    assert!(!words.contains("no other block"), "{words}");
}

#[test]
fn an_add_that_nothing_comes_for_fails_in_time_and_says_so() {
    enter();
    let conf = cluster_conf();
    one_block_that_may_grow();
    fill(&conf);
    let full_for_now = with(conf.clone(), json!({"failStatusWhenFull": true}));
    Plat::bare("STATUS").input(&full_for_now).run().silent();
    let words = answer(waiting("late", &conf)).error(101);
    assert!(words.contains("no other block came in 10 s"), "{words}");
    // Of the other family, or for an address that somebody asked for, nothing is waited for.
    lab::write_blocks(&[FULL], |file| file.may_grow = vec![Family::IPv6]);
    let words = Plat::call("ADD", "late", &conf).run().error(101);
    assert!(!words.contains("no other block"), "{words}");
    Plat::bare("STATUS").input(&full_for_now).run().error(50);
    one_block_that_may_grow();
    let asked = with(conf, json!({"runtimeConfig": {"ips": ["10.244.3.2"]}, "capabilities": {"ips": true}}));
    Plat::call("ADD", "late", &asked).run().error(102);
    eventually("nothing is left of it", || lab::leases().len() == 5);
}
