//! Errors and kills at every step of ADD, DEL, GC, a rebuild of the lease store and a sweep. What a step is,
//! the program itself tells (module `fail`): every message to the kernel and every write to the store is
//! one, so that what is new is covered here without being listed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use lab::{Plat, add, address, blocks, cluster_conf, hand_conf, leases, netns, sh, with};
use plat_cni::boot::BootId;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::store::{Missing, Store};
use plat_cni::sweep::Sweeper;
use serde_json::{Value, json};

const TRACE: &str = "/run/trace";

/// Configurations that differ in what a pod has. The block has five addresses for pods.
fn confs() -> Vec<(&'static str, Value)> {
    let ports = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 8053, "containerPort": 53, "protocol": "udp"}]});
    vec![
        (
            "blocks",
            with(cluster_conf(), json!({"capabilities": {"portMappings": true}, "runtimeConfig": ports})),
        ),
        (
            "by-hand",
            with(hand_conf(), json!({"ipMasq": true, "bridge": "br1", "ipam": {"subnet": "10.22.0.0/29"}})),
        ),
    ]
}

fn prepare() {
    lab::enter();
    blocks(&["10.244.3.0/29", "fd00:3::/125"]);
    // Bridge, tables and store are there, as on any node but for its first pod.
    for (name, conf) in confs() {
        add(&format!("first-{name}"), &conf);
        Plat::call("DEL", &format!("first-{name}"), &conf).run().silent();
    }
    lab::assert_nothing_left();
}

/// Runs a call that succeeds, and returns the names of its steps.
fn steps(call: &Plat) -> Vec<String> {
    let _ = fs::remove_file(TRACE);
    let answer = call.clone().set("PLAT_FAIL_TRACE", TRACE).run();
    assert!(answer.success, "{answer:?}");
    fs::read_to_string(TRACE).unwrap().lines().map(str::to_owned).collect()
}

fn fail(call: &Plat, step: usize, how: &str) -> lab::Answer {
    call.clone().set("PLAT_FAIL", &format!("#{}:{how}", step + 1)).run()
}

/// Every address of the block can be had, once, and no more.
#[track_caller]
fn assert_block_can_be_filled(name: &str, conf: &Value) {
    let ids: Vec<String> = (0..5).map(|n| format!("fill-{name}-{n}")).collect();
    let given: BTreeSet<String> = ids.iter().map(|id| address(&add(id, conf))).collect();
    assert_eq!(given.len(), 5, "{given:?}");
    netns("more");
    let _ = Plat::call("ADD", "more", conf).run().error(101);
    sh("ip netns del more");
    for id in &ids {
        Plat::call("DEL", id, conf).run().silent();
        sh(&format!("ip netns del {id}"));
    }
}

/// Host ports are the same for all pods here, so only one at a time can have them.
fn portless(conf: &Value) -> Value {
    with(conf.clone(), json!({"runtimeConfig": {}}))
}

#[test]
fn an_error_at_any_step_of_an_add_leaves_nothing() {
    prepare();
    for (name, conf) in confs() {
        netns("c");
        let call = Plat::call("ADD", "c", &conf);
        let steps = steps(&call);
        assert!(steps.len() > 15, "{steps:?}");
        Plat::call("DEL", "c", &conf).run().silent();
        for (number, step) in steps.iter().enumerate() {
            let answer = fail(&call, number, "error");
            if answer.success {
                // What failed there was worth no failure.
                Plat::call("DEL", "c", &conf).run().silent();
            }
            assert!(answer.success || answer.stdout.contains("\"code\""), "{name} {step}: {answer:?}");
            let left = (lab::host_links(), leases(), lab::pod_elements());
            assert_eq!(left, (vec![], vec![], vec![]), "{name}, step {number}: {step}: {answer:?}");
            let inside = lab::json_of("ip -n c -j link show");
            assert_eq!(inside.as_array().unwrap().len(), 1, "{name} {step}: only lo");
        }
        sh("ip netns del c");
        assert_block_can_be_filled(name, &portless(&conf));
    }
}

#[test]
fn a_kill_at_any_step_of_an_add_is_made_good_by_a_del_or_by_the_sweep() {
    prepare();
    for (name, conf) in confs() {
        netns("c");
        let call = Plat::call("ADD", "c", &conf);
        let steps = steps(&call);
        let raised = steps.iter().position(|step| step == "raised").unwrap();
        Plat::call("DEL", "c", &conf).run().silent();
        for (number, step) in steps.iter().enumerate() {
            let answer = fail(&call, number, "kill");
            let killed = !answer.success && answer.stdout.is_empty();
            // Once the pod's link is up it is looked at until it can be used, as often as that takes.
            assert!(killed || answer.success && number > raised, "{name} {step}: {answer:?}");
            Plat::call("DEL", "c", &conf).run().silent();
            let left = (lab::host_links(), leases(), lab::pod_elements());
            assert_eq!(left, (vec![], vec![], vec![]), "{name}, step {number}: {step}");
        }
        sh("ip netns del c");
        // No DEL comes at all: the namespace goes, and the agent sweeps.
        for (number, step) in steps.iter().enumerate() {
            netns("d");
            let _ = fail(&Plat::call("ADD", "d", &conf), number, "kill");
            sh("ip netns del d");
            lab::eventually("links go with their namespace", || lab::host_links().is_empty());
            let mut sweeper = sweeper();
            for at in [1_000_000, 1_090_000] {
                sweeper.sweep_at(at, Duration::from_secs(5)).unwrap();
            }
            assert_eq!((leases(), lab::pod_elements()), (vec![], vec![]), "{name}, step {number}: {step}");
        }
        assert_block_can_be_filled(name, &portless(&conf));
    }
}

#[test]
fn a_fault_at_any_step_of_a_del_is_made_good_by_the_next() {
    prepare();
    for (name, conf) in confs() {
        netns("c");
        let (add, del) = (Plat::call("ADD", "c", &conf), Plat::call("DEL", "c", &conf));
        add.result();
        let steps = steps(&del);
        assert!(steps.len() > 5, "{steps:?}");
        for how in ["error", "kill"] {
            for (number, step) in steps.iter().enumerate() {
                add.result();
                let answer = fail(&del, number, how);
                assert!(!answer.stdout.contains("no such file"), "{answer:?}");
                assert!(!answer.stdout.contains("not found"), "{answer:?}");
                if lab::host_links().is_empty() && !answer.success {
                    // The address waits for the DEL that ends it, or is free already.
                    assert!(leases().len() <= 1);
                }
                del.run().silent();
                let left = (lab::host_links(), leases(), lab::pod_elements());
                assert_eq!(left, (vec![], vec![], vec![]), "{name}, step {number}: {step} {how}");
            }
        }
        sh("ip netns del c");
        assert_block_can_be_filled(name, &portless(&conf));
    }
}

#[test]
fn a_fault_at_any_step_of_a_gc_is_made_good_by_the_next() {
    prepare();
    let (_, conf) = confs().remove(1);
    let conf = with(conf, json!({"gcGraceSeconds": 0}));
    let gc = Plat::bare("GC").set("CNI_PATH", "/nowhere");
    let gc = gc.input(&with(
        conf.clone(),
        json!({"cni.dev/valid-attachments": [{"containerID": "stays", "ifname": "eth0"}]}),
    ));
    let stays = address(&add("stays", &conf));
    netns("goes");
    let goes = Plat::call("ADD", "goes", &conf);
    goes.result();
    let steps = steps(&gc);
    for how in ["error", "kill"] {
        for (number, step) in steps.iter().enumerate() {
            goes.result();
            let _ = fail(&gc, number, how);
            gc.run().silent();
            assert_eq!((leases().len(), lab::host_links().len()), (1, 1), "step {number}: {step} {how}");
            assert_eq!(lab::leased(), [stays.as_str()], "{step} {how}");
        }
    }
}

#[test]
fn a_fault_at_any_step_of_a_rebuild_loses_no_lease() {
    prepare();
    let (_, conf) = confs().remove(1);
    let (a, b) = (address(&add("a", &conf)), address(&add("b", &conf)));
    let held: BTreeSet<String> = [a, b].into();
    netns("c");
    let call = Plat::call("ADD", "c", &conf);
    let spoil = || fs::write("/run/plat/leases", "garbage").unwrap();
    spoil();
    let steps = steps(&call);
    Plat::call("DEL", "c", &conf).run().silent();
    for how in ["error", "kill"] {
        for (number, step) in steps.iter().enumerate() {
            spoil();
            let answer = fail(&call, number, how);
            if answer.success {
                assert!(!held.contains(&address(&answer.json())), "{step}: {answer:?}");
            }
            Plat::call("DEL", "c", &conf).run().silent();
            let given = address(&call.result());
            assert!(!held.contains(&given), "step {number}: {step} {how} hands out {given}");
            Plat::call("DEL", "c", &conf).run().silent();
            assert_eq!(lab::leased().into_iter().collect::<BTreeSet<_>>(), held, "{step} {how}");
        }
    }
}

fn sweeper() -> Sweeper {
    let kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
    let store = Store::at("/run/plat/leases".as_ref());
    Sweeper::new(store, BootId::read().unwrap(), Missing::Leave, Box::new(kernel))
}

/// What the agent does, as a process of its own that can be killed.
#[test]
#[ignore = "a part of a_fault_at_any_step_of_a_sweep_is_made_good_by_the_next"]
fn sweep_as_a_process() {
    let mut sweeper = sweeper();
    for at in [1_000_000, 1_090_000] {
        let _ = sweeper.sweep_at(at, Duration::from_secs(5));
    }
}

#[test]
fn a_fault_at_any_step_of_a_sweep_is_made_good_by_the_next() {
    prepare();
    let (_, conf) = confs().remove(1);
    let lives = address(&add("lives", &conf));
    let elements = lab::pod_elements();
    let sweep = |variables: &[(&str, &str)]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "sweep_as_a_process", "--ignored", "--test-threads=1"]);
        command.envs(variables.iter().copied()).output().unwrap()
    };
    let dies = || {
        add("dies", &conf);
        sh("ip netns del dies");
        lab::eventually("its link is gone", || lab::host_links().len() == 1);
        assert_eq!(leases().len(), 2);
    };
    dies();
    let _ = fs::remove_file(TRACE);
    assert!(sweep(&[("PLAT_FAIL_TRACE", TRACE)]).status.success());
    assert_eq!(leases().len(), 1);
    let steps: Vec<String> = fs::read_to_string(TRACE).unwrap().lines().map(str::to_owned).collect();
    assert!(steps.len() > 3, "{steps:?}");
    for how in ["error", "kill"] {
        for (number, step) in steps.iter().enumerate() {
            dies();
            sweep(&[("PLAT_FAIL", &format!("#{}:{how}", number + 1))]);
            assert!(sweep(&[]).status.success());
            assert_eq!(lab::leased(), [lives.as_str()], "step {number}: {step} {how}");
            assert_eq!(lab::pod_elements(), elements, "step {number}: {step} {how}");
        }
    }
}
