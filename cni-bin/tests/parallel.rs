//! Many calls at once, and calls that are killed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::BTreeSet;
use std::time::Duration;

use lab::{Answer, Plat, address, blocks, cluster_conf, hand_conf, netns, sh, with};
use serde_json::{Value, json};

#[test]
fn c44_two_hundred_adds_at_once_get_two_hundred_addresses() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    let ids: Vec<String> = (0..200).map(|n| format!("c{n}")).collect();
    for id in &ids {
        netns(id);
    }
    let calls: Vec<_> = ids.iter().map(|id| Plat::call("ADD", id, &cluster_conf()).start()).collect();
    let given: BTreeSet<String> =
        calls.into_iter().map(|call| address(&Answer::of(call.wait_with_output().unwrap()).json())).collect();
    assert_eq!(given.len(), 200);
    for bad in ["10.244.3.0", "10.244.3.1", "10.244.3.255"] {
        assert!(!given.contains(bad));
    }
    assert_eq!(lab::leased().into_iter().collect::<BTreeSet<_>>(), given);
    assert_eq!(lab::host_links().len(), 200);
    let calls: Vec<_> = ids.iter().map(|id| Plat::call("DEL", id, &cluster_conf()).start()).collect();
    for call in calls {
        Answer::of(call.wait_with_output().unwrap()).silent();
    }
    lab::assert_nothing_left();
}

#[test]
fn c45_after_churn_the_store_is_what_lives() {
    lab::enter();
    blocks(&["10.244.3.0/27"]);
    let conf = with(cluster_conf(), json!({"ipMasq": true}));
    let ids: Vec<String> = (0..24).map(|n| format!("c{n}")).collect();
    for id in &ids {
        netns(id);
    }
    // Each round half the containers go and the other half come, all at the same time.
    let mut live: BTreeSet<usize> = BTreeSet::new();
    for round in 0..6 {
        let calls: Vec<(usize, _)> = (0..ids.len())
            .filter(|n| (n + round) % 2 == 0 || live.contains(n))
            .map(|n| (n, Plat::call(if live.contains(&n) { "DEL" } else { "ADD" }, &ids[n], &conf).start()))
            .collect();
        for (n, call) in calls {
            let answer = Answer::of(call.wait_with_output().unwrap());
            assert!(answer.success, "{answer:?}");
            if !live.remove(&n) {
                live.insert(n);
            }
        }
        let held: BTreeSet<String> =
            lab::leases().iter().map(|l| l["containerID"].as_str().unwrap().to_owned()).collect();
        assert_eq!(held, live.iter().map(|n| ids[*n].clone()).collect(), "round {round}");
        assert_eq!(lab::host_links().len(), live.len());
        assert_eq!(lab::masqueraded().len(), live.len());
        let addresses = lab::leased();
        assert_eq!(addresses.iter().collect::<BTreeSet<_>>().len(), addresses.len());
    }
}

#[test]
fn calls_that_are_killed_at_any_moment_leave_nothing_that_a_del_does_not_take() {
    lab::enter();
    let conf = with(hand_conf(), json!({"ipMasq": true, "ipam": {"subnet": "10.22.0.0/28"}}));
    netns("c");
    let mut killed = 0;
    for number in 0..60u64 {
        let mut call = Plat::call("ADD", "c", &conf).start();
        std::thread::sleep(Duration::from_micros(number * 137 % 6000));
        killed += u32::from(call.try_wait().unwrap().is_none());
        let _ = call.kill();
        call.wait().unwrap();
        let mut call = Plat::call("DEL", "c", &conf).start();
        std::thread::sleep(Duration::from_micros(number * 311 % 9000));
        let _ = call.kill();
        call.wait().unwrap();
        Plat::call("DEL", "c", &conf).run().silent();
        lab::assert_nothing_left();
    }
    assert!(killed > 5, "only {killed} of 60 were killed on their way");
    // All thirteen addresses can still be had, each once.
    let given: BTreeSet<String> = (0..13).map(|n| address(&lab::add(&format!("d{n}"), &conf))).collect();
    assert_eq!(given.len(), 13);
}

#[test]
fn c61_lists_that_change_while_they_are_read_are_read_again() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    sh("ip netns add churn");
    // Links come and go all the time while the store is rebuilt from a list of them.
    let script = "while :; do for i in 1 2 3 4 5 6 7 8; do ip link add x$i type veth peer name y$i; done; \
                  for i in 1 2 3 4 5 6 7 8; do ip link del x$i; done; done";
    let mut churn = std::process::Command::new("sh").args(["-c", script]).spawn().unwrap();
    let outcome = std::panic::catch_unwind(|| {
        let mut given: BTreeSet<String> = BTreeSet::new();
        for n in 0..15 {
            let id = format!("c{n}");
            netns(&id);
            let result: Value = Plat::call("ADD", &id, &cluster_conf()).result();
            assert!(given.insert(address(&result)), "{result}");
            std::fs::remove_file("/run/plat/leases").unwrap();
        }
    });
    churn.kill().unwrap();
    churn.wait().unwrap();
    outcome.unwrap();
}
