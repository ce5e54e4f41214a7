//! Delegated IPAM: the reference's host-local and static, and plugins that misbehave. Check 88 of the
//! conformance checklist in `docs/cni.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use lab::{Answer, Plat, hand_conf, netns, sh, with};
use serde_json::{Value, json};

fn plugins() -> String {
    lab::tools().join("cni").to_str().unwrap().to_owned()
}

fn host_local() -> Value {
    with(
        hand_conf(),
        json!({"ipMasq": true, "ipam": {"type": "host-local", "dataDir": "/run/hl", "routes": [{"dst": "198.51.100.0/24"}],
            "ranges": [[{"subnet": "10.44.0.0/24"}], [{"subnet": "fd44::/64"}]]}}),
    )
}

fn call(verb: &str, id: &str, conf: &Value) -> Plat {
    Plat::call(verb, id, conf).set("CNI_PATH", &format!("/nowhere:{}", plugins()))
}

fn files() -> Vec<String> {
    let dir = fs::read_dir("/run/hl/hand")
        .map(|d| d.map(|e| e.unwrap().file_name().into_string().unwrap()).collect());
    let mut names: Vec<String> = dir.unwrap_or_default();
    names.retain(|n| n.starts_with("10.") || n.starts_with("fd"));
    names.sort();
    names
}

#[test]
fn c88_host_local_hands_out_what_the_pod_gets_in_every_version() {
    lab::enter();
    for (number, version) in ["0.2.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"].iter().enumerate() {
        let conf = with(host_local(), json!({"cniVersion": version}));
        let id = format!("c{number}");
        netns(&id);
        let result = call("ADD", &id, &conf).result();
        assert_eq!(result["cniVersion"], *version);
        let text = sh(&format!("ip -n {id} -o addr show eth0"));
        assert!(text.contains("10.44.0.") && text.contains("fd44::"), "{text}");
        assert!(sh(&format!("ip -n {id} route")).contains("198.51.100.0/24 via 10.44.0.1"));
        assert!(lab::ping(&id, "10.44.0.1") && lab::ping(&id, "fd44::1"));
        assert_eq!((files().len(), lab::leased().len(), lab::masqueraded().len()), (2, 2, 2));
        if number >= 2 {
            call("CHECK", &id, &with(conf.clone(), json!({"prevResult": result}))).run().silent();
        }
        call("DEL", &id, &conf).run().silent();
        assert_eq!(files(), Vec::<String>::new());
        lab::assert_nothing_left();
    }
}

#[test]
fn c88_check_status_and_gc_reach_the_delegate() {
    lab::enter();
    netns("c");
    let conf = host_local();
    let result = call("ADD", "c", &conf).result();
    sh(
        "rm /run/hl/hand/10.44.0.2 /run/hl/hand/fd44::2 2>/dev/null || rm /run/hl/hand/10.44.0.2 /run/hl/hand/fd44*",
    );
    let error = call("CHECK", "c", &with(conf.clone(), json!({"prevResult": result}))).run();
    assert!(!error.success && error.stdout.contains("host-local"), "{error:?}");
    call("STATUS", "", &conf).run().silent();
    let sweep = json!({"cni.dev/valid-attachments": [], "gcGraceSeconds": 0});
    call("GC", "", &with(conf, sweep)).run().silent();
    lab::assert_nothing_left();
}

#[test]
fn c88_a_failed_add_gives_the_delegates_address_back() {
    lab::enter();
    netns("c");
    for point in ["lease", "link", "attached", "confirm", "reply"] {
        let _ = call("ADD", "c", &host_local()).set("PLAT_FAIL", &format!("{point}:error")).run().error(100);
        assert_eq!(files(), Vec::<String>::new(), "{point}");
        lab::assert_nothing_left();
    }
}

#[test]
fn c41_a_second_add_leaves_the_delegates_address_to_the_first() {
    lab::enter();
    netns("c");
    netns("c2");
    call("ADD", "c", &host_local()).result();
    let (taken, leased) = (files(), lab::leased());
    assert_eq!((taken.len(), leased.len()), (2, 2));
    let _ = call("ADD", "c", &host_local()).set("CNI_NETNS", "/run/netns/c2").run().error(103);
    assert_eq!((files(), lab::leased()), (taken, leased));
    assert!(lab::ping("c", "10.44.0.1"));
    call("DEL", "c", &host_local()).run().silent();
    assert_eq!(files(), Vec::<String>::new());
}

#[test]
fn an_add_that_a_del_overtook_leaves_lease_and_address_to_the_next_add_of_its_container() {
    lab::enter();
    netns("c");
    netns("c2");
    let slow = call("ADD", "c", &host_local()).waiting_at("lease");
    let slow = slow.start();
    lab::eventually("the lease is recorded", || lab::exists("/run/plat/leases") && lab::leased().len() == 2);
    call("DEL", "c", &host_local()).run().silent();
    call("ADD", "c", &host_local()).set("CNI_NETNS", "/run/netns/c2").result();
    let (taken, leased, links) = (files(), lab::leases(), lab::host_links());
    assert_eq!((taken.len(), leased.len(), links.len()), (2, 1, 1));
    lab::go_on();
    let _ = Answer::of(slow.wait_with_output().unwrap()).error(103);
    assert_eq!((files(), lab::leases(), lab::host_links()), (taken, leased, links));
    assert_eq!(lab::masqueraded().len(), 2);
    assert!(sh("ip netns exec c2 busybox ping -c 3 -W 1 10.44.0.1").contains(" 0% packet loss"));
}

#[test]
fn c88_gc_gives_the_delegates_addresses_of_what_it_ends_back_and_tries_again_where_it_could_not() {
    lab::enter();
    netns("stays");
    netns("goes");
    let conf = host_local();
    call("ADD", "stays", &conf).result();
    let (taken, leases, rules) = (files(), lab::leases(), lab::pod_elements());
    call("ADD", "goes", &conf).result();
    assert_eq!(files().len(), 4);
    let valid = json!([{"containerID": "stays", "ifname": "eth0"}]);
    let list = with(conf, json!({"gcGraceSeconds": 0, "cni.dev/valid-attachments": valid}));
    let gc = Plat::bare("GC").input(&list).set("CNI_PATH", "/nowhere");
    assert!(gc.run().error(107).contains("eth0 of goes: IPAM plugin host-local is missing"));
    assert_eq!((files().len(), lab::leases().len(), lab::pod_elements()), (4, 2, rules.clone()));
    gc.set("CNI_PATH", &plugins()).run().silent();
    assert_eq!((files(), lab::leases(), lab::pod_elements()), (taken, leases, rules));
    assert!(lab::ping("stays", "10.44.0.1"));
}

#[test]
fn static_addresses_work_too() {
    lab::enter();
    netns("c");
    let conf = with(
        hand_conf(),
        json!({"ipam": {"type": "static", "addresses": [{"address": "10.55.0.7/24"}], "dns": {"nameservers": ["10.0.0.10"]}}}),
    );
    let result = call("ADD", "c", &conf).result();
    assert_eq!(result["ips"][0]["address"], "10.55.0.7/24");
    assert_eq!(result["ips"][0]["gateway"], "10.55.0.1", "isGateway: the first of the subnet");
    assert_eq!(result["dns"]["nameservers"], json!(["10.0.0.10"]));
    assert!(lab::ping("c", "10.55.0.1"));
    call("DEL", "c", &conf).run().silent();
    lab::assert_nothing_left();
}

#[test]
fn the_delegates_own_error_is_passed_on_with_its_name() {
    lab::enter();
    netns("c");
    let broken = with(
        hand_conf(),
        json!({"ipam": {"type": "host-local", "subnet": "nonsense", "dataDir": "/run/hl"}}),
    );
    let answer = call("ADD", "c", &broken).run();
    assert!(!answer.success && answer.stdout.contains("host-local ADD"), "{answer:?}");
    let missing = with(hand_conf(), json!({"ipam": {"type": "ghost"}}));
    assert!(call("ADD", "c", &missing).run().error(7).contains("ghost"));
    lab::assert_nothing_left();
}

/// Writes a plugin of its own.
fn plugin(script: &str) -> Value {
    fs::create_dir_all("/run/bin").unwrap();
    fs::write("/run/bin/odd", format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions("/run/bin/odd", fs::Permissions::from_mode(0o755)).unwrap();
    with(hand_conf(), json!({"ipam": {"type": "odd"}}))
}

fn odd(verb: &str, conf: &Value) -> Answer {
    Plat::call(verb, "c", conf).set("CNI_PATH", "/run/bin").set("PATH", "/bin:/usr/bin").run()
}

#[test]
fn a_delegate_that_answers_nonsense_is_an_error_and_costs_nothing() {
    lab::enter();
    netns("c");
    for (script, words) in [
        ("echo nonsense", "its result is no use"),
        ("true", "its result is no use"),
        ("echo '{\"cniVersion\":\"1.0.0\"}'", "no address"),
        ("echo '{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"x\"}]}'", "not a CIDR"),
        ("echo oh no >&2; exit 3", "oh no"),
        ("kill -9 $$", "failed"),
    ] {
        let answer = odd("ADD", &plugin(script));
        assert!(answer.error(106).contains(words), "{script}: {answer:?}");
        lab::assert_nothing_left();
    }
    // One that does not read its input, and one that says a lot, are fine.
    let chatty = "cat >/dev/null; head -c 300000 /dev/zero | tr '\\0' x >&2; echo '{\"cniVersion\":\"0.3.1\",\"ips\":[{\"version\":\"4\",\"address\":\"10.66.0.2/24\",\"interface\":9}]}'";
    assert_eq!(odd("ADD", &plugin(chatty)).json()["ips"][0]["interface"], 2);
    let _ = odd("DEL", &plugin("exit 0"));
    lab::assert_nothing_left();
}

#[test]
fn the_delegate_gets_our_environment_and_input_and_its_verb() {
    lab::enter();
    netns("c");
    let conf = plugin(
        "env >/run/env; cat >/run/stdin; echo '{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"10.66.0.2/24\"}]}'",
    );
    Plat::call("ADD", "c", &conf)
        .set("CNI_PATH", "/run/bin")
        .set("CNI_ARGS", "A=b")
        .set("PATH", "/bin:/usr/bin")
        .result();
    let environment = fs::read_to_string("/run/env").unwrap();
    for line in ["CNI_COMMAND=ADD", "CNI_CONTAINERID=c", "CNI_ARGS=A=b", "CNI_NETNS=/run/netns/c"] {
        assert!(environment.contains(line), "{environment}");
    }
    assert_eq!(fs::read_to_string("/run/stdin").unwrap(), conf.to_string());
    odd("DEL", &conf);
    assert!(fs::read_to_string("/run/env").unwrap().contains("CNI_COMMAND=DEL"));
}

#[test]
fn a_delegate_dies_with_us() {
    lab::enter();
    netns("c");
    let conf = plugin("echo $$ >/run/pid; exec sleep 30");
    let mut call =
        Plat::call("ADD", "c", &conf).set("CNI_PATH", "/run/bin").set("PATH", "/bin:/usr/bin").start();
    lab::eventually("the delegate runs", || fs::read_to_string("/run/pid").is_ok_and(|p| p.ends_with('\n')));
    let pid = fs::read_to_string("/run/pid").unwrap().trim().to_owned();
    call.kill().unwrap();
    call.wait().unwrap();
    let gone = || {
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        state.is_empty() || state.contains(") Z ")
    };
    lab::eventually("the delegate is gone", gone);
}

#[test]
fn c88_every_verb_reaches_the_delegate_with_our_input_unchanged() {
    lab::enter();
    netns("c");
    let script = "echo $CNI_COMMAND >>/run/verbs; cat >/run/stdin-$CNI_COMMAND; [ $CNI_COMMAND != ADD ] || \
        echo '{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"10.66.0.2/24\"}]}'";
    let conf = plugin(script);
    let result = odd("ADD", &conf).json();
    let checked = with(conf.clone(), json!({"prevResult": result}));
    let collected =
        with(conf.clone(), json!({"cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}]}));
    for (verb, conf) in [("CHECK", &checked), ("STATUS", &conf), ("GC", &collected), ("DEL", &checked)] {
        odd(verb, conf).silent();
        assert_eq!(fs::read_to_string(format!("/run/stdin-{verb}")).unwrap(), conf.to_string());
    }
    assert_eq!(fs::read_to_string("/run/verbs").unwrap(), "ADD\nCHECK\nSTATUS\nGC\nDEL\n");
    lab::assert_nothing_left();
}

#[test]
fn c88_a_delegate_whose_add_fails_gets_its_del() {
    lab::enter();
    netns("c");
    let script = "cat >/dev/null; echo $CNI_COMMAND >>/run/verbs; [ $CNI_COMMAND != ADD ] || \
        { echo '{\"cniVersion\":\"1.0.0\",\"code\":999,\"msg\":\"half done\"}'; exit 1; }";
    assert!(odd("ADD", &plugin(script)).error(999).contains("half done"));
    assert_eq!(fs::read_to_string("/run/verbs").unwrap(), "ADD\nDEL\n");
    lab::assert_nothing_left();
}
