//! ADD. Numbers are those of the conformance checklist in `docs/cni.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::BTreeSet;
use std::fs::File;
use std::process::Stdio;

use lab::{Answer, Datapath, Plat, add, address, blocks, cluster_conf, hand_conf, netns, ping, sh, with};
use serde_json::{Value, json};

lab::in_each_datapath! {
    c37_from_blocks_a_pod_has_lone_addresses_and_all_passes_the_hosts_ip_layer,
    pods_reach_and_are_reached_by_pods_the_host_and_other_nodes_at_once,
    c35_an_interface_that_exists_is_left_alone,
    c38_a_failure_at_any_step_leaves_nothing,
    c39_after_a_kill_at_any_step_a_del_cleans_and_every_address_is_handed_out_once,
    c41_a_second_add_is_refused_and_the_first_lease_kept,
    c42_another_interface_of_the_same_container_gets_another_address,
    c51_a_requested_address_is_given_or_refused_without_a_leak,
    c55_an_ipv6_address_can_be_used_at_once_also_where_ipv6_is_off_by_default,
    c59_a_name_that_is_taken_on_the_host_is_never_taken_over,
    a_link_of_second_choice_keeps_its_rules_when_the_agent_restores_during_the_add,
    c60_a_namespace_of_a_user_namespace_works,
    by_hand_masquerade_is_for_what_leaves_the_subnet_only,
    the_mtu_of_the_blocks_file_is_used_where_the_configuration_says_none,
    a_store_that_was_removed_meanwhile_cannot_make_two_pods_share_an_address,
}

fn c35_an_interface_that_exists_is_left_alone(at: Datapath) {
    lab::enter();
    let conf = at.of(hand_conf());
    netns("c");
    sh("ip -n c link add eth0 address 02:00:00:00:00:09 type veth peer name other");
    let before = sh("ip -n c -j link show");
    assert!(Plat::call("ADD", "c", &conf).run().error(103).contains("eth0"));
    assert_eq!(sh("ip -n c -j link show"), before);
    lab::assert_nothing_left();
}

#[test]
fn c36_a_namespace_that_cannot_be_used_is_code_8() {
    lab::enter();
    sh("touch /run/netns/plain; ip netns attach me $$");
    for path in
        ["/run/netns/missing", "/run/netns/plain", "/proc/self/ns/uts", "/run/netns/me", "/proc/self/ns/net"]
    {
        let _ = Plat::call("ADD", "c", &hand_conf()).set("CNI_NETNS", path).run().error(8);
        lab::assert_nothing_left();
    }
    let meant =
        Plat::call("ADD", "c", &hand_conf()).set("CNI_NETNS", "/run/netns/me").set("CNI_IFNAME", "pod0");
    meant.set("CNI_NETNS_OVERRIDE", "1").result();
    sh("ip link show pod0");
    Plat::call("DEL", "c", &hand_conf()).set("CNI_IFNAME", "pod0").run().silent();
    lab::assert_nothing_left();
}

/// What the kernel says about a container's interface.
fn pod_link(id: &str) -> Value {
    lab::json_of(&format!("ip -n {id} -j -d link show eth0"))[0].clone()
}

#[test]
fn c37_by_hand_the_kernel_has_what_the_result_says_and_pods_reach_each_other() {
    lab::enter();
    let conf = with(hand_conf(), json!({"mtu": 1400}));
    let (a, b) = (add("a", &conf), add("b", &conf));
    assert_eq!((address(&a).as_str(), address(&b).as_str()), ("10.22.0.2", "10.22.0.3"));
    let link = pod_link("a");
    assert_eq!(link["address"], a["interfaces"][2]["mac"]);
    assert_eq!((&link["mtu"], &link["operstate"]), (&json!(1400), &json!("UP")));
    let addresses = lab::json_of("ip -n a -j addr show eth0");
    assert_eq!(addresses[0]["addr_info"][0]["local"], "10.22.0.2");
    assert_eq!(addresses[0]["addr_info"][0]["prefixlen"], 24);
    assert_eq!(addresses[0]["addr_info"][0]["broadcast"], "10.22.0.255");
    assert_eq!(lab::json_of("ip -n a -j route show default")[0]["gateway"], "10.22.0.1");
    let host = a["interfaces"][1]["name"].as_str().unwrap();
    let host_link = lab::json_of(&format!("ip -j -d link show {host}"))[0].clone();
    assert_eq!(host_link["address"], a["interfaces"][1]["mac"]);
    assert_eq!(
        (&host_link["master"], &host_link["ifalias"]),
        (&json!("cni0"), &json!("plat a eth0 bridge:cni0 open hand ranges 10.22.0.2/24"))
    );
    assert!(ping("a", "10.22.0.1") && ping("a", "10.22.0.3") && ping("b", "10.22.0.2"));
    assert_eq!(sh("cat /proc/sys/net/ipv4/ip_forward").trim(), "1", "isGateway makes a router");
}

fn c37_from_blocks_a_pod_has_lone_addresses_and_all_passes_the_hosts_ip_layer(at: Datapath) {
    lab::enter();
    let conf = at.of(cluster_conf());
    sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    let result = add("a", &conf);
    add("b", &conf);
    assert_eq!(result["ips"][0]["address"], "10.244.3.2/32");
    assert_eq!(result["ips"][1]["address"], "fd00:10:244:3::2/128");
    assert_eq!(result["ips"][0]["gateway"], "10.244.3.1");
    let routes: BTreeSet<String> =
        result["routes"].as_array().unwrap().iter().map(Value::to_string).collect();
    let expected = [
        json!({"dst": "10.244.3.1/32", "scope": 253}),
        json!({"dst": "0.0.0.0/0", "gw": "10.244.3.1"}),
        json!({"dst": "fd00:10:244:3::1/128", "scope": 253}),
        json!({"dst": "::/0", "gw": "fd00:10:244:3::1"}),
    ];
    assert_eq!(routes, expected.iter().map(Value::to_string).collect());
    for to in ["10.244.3.1", "10.244.3.3", "fd00:10:244:3::1", "fd00:10:244:3::3"] {
        assert!(ping("a", to), "{to}");
    }
    // Through the host: one hop less to live, also after the host has told the pod a shorter way.
    for (to, expected) in [("10.244.3.3", "ttl=63"), ("fd00:10:244:3::3", "ttl=63")] {
        let text = sh(&format!("ip netns exec a busybox ping -c 4 -i 0.2 -W 1 {to}"));
        assert_eq!(text.matches(expected).count(), 4, "{text}");
    }
    assert!(sh("ip -n a route get 10.244.3.3").contains("via 10.244.3.1"));
    let link = match at {
        Datapath::Bridge => "cni0",
        Datapath::Routed => "lo",
    };
    let holder = lab::json_of(&format!("ip -j addr show {link}"));
    let held: BTreeSet<&str> =
        holder[0]["addr_info"].as_array().unwrap().iter().filter_map(|a| a["local"].as_str()).collect();
    assert!(held.is_superset(&["10.244.3.1", "fd00:10:244:3::1"].into()), "{held:?}");
}

fn pods_reach_and_are_reached_by_pods_the_host_and_other_nodes_at_once(at: Datapath) {
    lab::enter();
    sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=1");
    // Another node, which knows this one's blocks.
    sh("ip netns add node2; ip link add n0 type veth peer name n0 netns node2
        sysctl -qw net.ipv6.conf.n0.accept_dad=0; ip netns exec node2 sysctl -qw net.ipv6.conf.n0.accept_dad=0
        ip link set n0 up; ip -n node2 link set n0 up
        ip addr add 172.30.0.11/24 dev n0; ip -6 addr add fd00:30::11/64 dev n0 nodad
        ip -n node2 addr add 172.30.0.12/24 dev n0; ip -n node2 -6 addr add fd00:30::12/64 dev n0 nodad
        ip -n node2 route add 10.244.3.0/24 via 172.30.0.11; ip -n node2 route add fd00:10:244:3::/64 via fd00:30::11");
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    let conf = at.of(cluster_conf());
    add("a", &conf);
    // One packet each: nothing must be lost to preparations, in whichever direction the first one goes.
    let once = |from: &str, to: &str| {
        let wait = format!("busybox ping -c 1 -W 2 {to}");
        let text = if from.is_empty() { sh(&wait) } else { sh(&format!("ip netns exec {from} {wait}")) };
        assert!(text.contains("1 packets received"), "{from} to {to}: {text}");
    };
    for (number, family) in
        [["10.244.3", "172.30.0.11", "172.30.0.12"], ["fd00:10:244:3:", "fd00:30::11", "fd00:30::12"]]
            .into_iter()
            .enumerate()
    {
        let [block, host, node2] = family;
        let of_block = |n: usize| format!("{block}{}{n}", if number == 0 { "." } else { ":" });
        for to in [of_block(1), host.to_owned(), node2.to_owned()] {
            once("a", &to);
        }
        let id = format!("b{number}");
        add(&id, &conf);
        let last = 3 + 2 * number;
        once("", &of_block(last));
        once("node2", &of_block(last));
        once("a", &of_block(last));
        let id = format!("c{number}");
        add(&id, &conf);
        once("node2", &of_block(last + 1));
        once(&id, &of_block(last));
    }
}

/// The steps of an ADD that can be made to fail, in their order.
const STEPS: [&str; 12] = [
    "start", "lease", "bridge", "answer", "link", "alias", "joined", "attached", "confirm", "rules",
    "raised", "reply",
];

fn c38_a_failure_at_any_step_leaves_nothing(at: Datapath) {
    lab::enter();
    netns("c");
    let conf = at.of(with(hand_conf(), json!({"ipMasq": true})));
    for point in STEPS {
        let answer = Plat::call("ADD", "c", &conf).set("PLAT_FAIL", &format!("{point}:error")).run();
        assert!(answer.error(100).contains(point));
        lab::assert_nothing_left();
        assert_eq!(lab::json_of("ip -n c -j link show").as_array().unwrap().len(), 1, "{point}: only lo");
    }
    Plat::call("ADD", "c", &conf).result();
}

fn c39_after_a_kill_at_any_step_a_del_cleans_and_every_address_is_handed_out_once(at: Datapath) {
    lab::enter();
    // A block of five addresses for pods.
    let conf = at.of(with(hand_conf(), json!({"ipMasq": true, "ipam": {"subnet": "10.22.0.0/29"}})));
    for point in STEPS {
        let id = format!("k-{point}");
        netns(&id);
        let answer = Plat::call("ADD", &id, &conf).set("PLAT_FAIL", &format!("{point}:kill")).run();
        assert!(!answer.success && answer.stdout.is_empty(), "{point}: {answer:?}");
        Plat::call("DEL", &id, &conf).run().silent();
        lab::assert_nothing_left();
    }
    let given: BTreeSet<String> = (0..5).map(|n| address(&add(&format!("c{n}"), &conf))).collect();
    assert_eq!(given.len(), 5, "{given:?}");
    netns("more");
    let _ = Plat::call("ADD", "more", &conf).run().error(101);
}

#[test]
fn c40_a_result_that_cannot_be_written_is_taken_back() {
    lab::enter();
    netns("c");
    let call = Plat::call("ADD", "c", &hand_conf());
    for broken in ["full device", "closed pipe"] {
        let mut command = call.command();
        command.stdin(Stdio::piped()).stderr(Stdio::piped());
        let stdout = match broken {
            "full device" => Stdio::from(File::options().write(true).open("/dev/full").unwrap()),
            _ => {
                let (reader, writer) = std::io::pipe().unwrap();
                drop(reader);
                Stdio::from(writer)
            }
        };
        let mut child = command.stdout(stdout).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), hand_conf().to_string().as_bytes())
            .unwrap();
        assert!(!child.wait().unwrap().success(), "{broken}");
        lab::assert_nothing_left();
    }
}

fn c41_a_second_add_is_refused_and_the_first_lease_kept(at: Datapath) {
    lab::enter();
    let conf = at.of(hand_conf());
    let first = add("c", &conf);
    netns("c2");
    let again = Plat::call("ADD", "c", &conf).set("CNI_NETNS", "/run/netns/c2").run();
    let _ = again.error(103);
    assert_eq!(lab::leased(), [address(&first)]);
    assert!(ping("c", "10.22.0.1"), "the first one still works");
}

fn c42_another_interface_of_the_same_container_gets_another_address(at: Datapath) {
    lab::enter();
    let conf = at.of(hand_conf());
    let first = add("c", &conf);
    let second = Plat::call("ADD", "c", &conf).set("CNI_IFNAME", "net1").result();
    assert_ne!(address(&first), address(&second));
    Plat::call("DEL", "c", &conf).set("CNI_IFNAME", "net1").run().silent();
    assert_eq!(lab::leased(), [address(&first)]);
}

#[test]
fn c43_networks_of_two_names_lease_independently() {
    lab::enter();
    let one = with(hand_conf(), json!({"name": "one", "bridge": "br1"}));
    let two = with(hand_conf(), json!({"name": "two", "bridge": "br2"}));
    assert_eq!(address(&add("a", &one)), "10.22.0.2");
    assert_eq!(address(&add("b", &two)), "10.22.0.2");
    Plat::call("DEL", "a", &one).run().silent();
    assert_eq!(lab::leased(), ["10.22.0.2"]);
    assert_eq!(lab::leases()[0]["network"], "two");
}

#[test]
fn c46_a_full_block_is_named_and_nothing_left_half_done() {
    lab::enter();
    blocks(&["10.244.3.0/30", "10.244.4.0/30"]);
    assert_eq!(address(&add("a", &cluster_conf())), "10.244.3.2");
    assert_eq!(address(&add("b", &cluster_conf())), "10.244.4.2", "on into the second block");
    netns("c");
    let error = Plat::call("ADD", "c", &cluster_conf()).run().error(101);
    assert!(error.contains("10.244.3.0/30, 10.244.4.0/30"), "{error}");
    assert_eq!(lab::leased(), ["10.244.3.2", "10.244.4.2"]);
    assert_eq!(lab::json_of("ip -n c -j link show").as_array().unwrap().len(), 1);
}

#[test]
fn c47_a_freed_address_comes_back_last() {
    lab::enter();
    let conf = with(hand_conf(), json!({"ipam": {"subnet": "10.22.0.0/29"}}));
    let freed = address(&add("first", &conf));
    Plat::call("DEL", "first", &conf).run().silent();
    let order: Vec<String> = (0..5).map(|n| address(&add(&format!("c{n}"), &conf))).collect();
    assert_eq!(order.last(), Some(&freed), "{order:?}");
}

#[test]
fn c48_without_a_block_the_answer_is_code_11_and_says_what_to_do() {
    lab::enter();
    netns("c");
    let error = |words: &str| {
        let text = Plat::call("ADD", "c", &cluster_conf()).run().error(11);
        assert!(text.contains(words), "{text}");
        assert_eq!(lab::host_links(), Vec::<String>::new());
    };
    error("is it running on this node?");
    blocks(&[]);
    error("holds none");
    lab::write_blocks(&["10.244.3.0/24"], |file| file.boot_id = "another".into());
    error("before the last boot");
    lab::write_blocks(&["10.244.3.0/24"], |file| file.lease_until = 1);
    error("has not reached the API server since 2026-11-24T05:00:00Z");
    lab::write_blocks(&["10.244.3.0/24"], |file| file.version = 99);
    error("install the CNI binary");
    lab::write_blocks(&["10.244.3.0/24"], |file| file.blocks[0].lease = false);
    error("being drained");
    std::fs::write("/run/plat/blocks.json", "{").unwrap();
    error("damaged");
}

fn waits_for_a_lock(pid: u32) -> bool {
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    locks.lines().any(|line| line.contains("->") && line.contains(&pid.to_string()))
}

#[test]
fn c49_a_lock_that_is_held_for_too_long_is_code_11() {
    lab::enter();
    add("a", &hand_conf());
    netns("c");
    let file = File::options().read(true).write(true).open("/run/plat/leases").unwrap();
    file.lock().unwrap();
    let impatient = with(hand_conf(), json!({"lockTimeoutSeconds": 1}));
    assert!(Plat::call("ADD", "c", &impatient).run().error(11).contains("locked by another process"));
    // And one that is let go in time is waited for.
    let waiting = Plat::call("ADD", "c", &hand_conf()).start();
    lab::eventually("the ADD waits for the lock", || waits_for_a_lock(waiting.id()));
    file.unlock().unwrap();
    Answer::of(waiting.wait_with_output().unwrap()).json();
}

#[test]
fn c49_blocks_that_change_during_the_wait_for_the_lock_are_judged_as_they_are_then() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    add("a", &cluster_conf());
    let file = File::options().read(true).write(true).open("/run/plat/leases").unwrap();
    let after_a_wait = |id: &str, change: &dyn Fn()| {
        netns(id);
        file.lock().unwrap();
        let waiting = Plat::call("ADD", id, &cluster_conf()).start();
        lab::eventually("the ADD waits for the lock", || waits_for_a_lock(waiting.id()));
        change();
        file.unlock().unwrap();
        Answer::of(waiting.wait_with_output().unwrap())
    };
    let expired = after_a_wait("b", &|| lab::write_blocks(&["10.244.3.0/24"], |file| file.lease_until = 1));
    assert!(expired.error(11).contains("while the API server is away"));
    let drained = after_a_wait("c", &|| blocks(&["10.244.9.0/24"]));
    assert_eq!(address(&drained.json()), "10.244.9.2");
    assert_eq!(lab::leased(), ["10.244.3.2", "10.244.9.2"]);
}

#[test]
fn c50_leases_of_a_block_stay_when_the_blocks_change() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    add("a", &cluster_conf());
    lab::write_blocks(&["10.244.3.0/24", "10.244.9.0/24"], |file| file.blocks[0].lease = false);
    assert_eq!(address(&add("b", &cluster_conf())), "10.244.9.2");
    assert_eq!(lab::leased(), ["10.244.3.2", "10.244.9.2"]);
    assert!(ping("a", "10.244.3.1") && ping("b", "10.244.9.1"));
    Plat::call("DEL", "a", &cluster_conf()).run().silent();
    assert_eq!(lab::leased(), ["10.244.9.2"]);
}

fn c51_a_requested_address_is_given_or_refused_without_a_leak(at: Datapath) {
    lab::enter();
    let conf = at.of(hand_conf());
    let ask = |id: &str, ip: &str| {
        netns(id);
        Plat::call("ADD", id, &with(conf.clone(), json!({"runtimeConfig": {"ips": [ip]}}))).run()
    };
    assert_eq!(address(&ask("a", "10.22.0.50/24").json()), "10.22.0.50");
    for (id, ip) in [("b", "10.22.0.50"), ("c", "10.22.0.1"), ("d", "10.99.0.1"), ("e", "10.22.0.255")] {
        assert!(ask(id, ip).error(102).contains(ip));
    }
    assert_eq!(lab::leased(), ["10.22.0.50"]);
    assert_eq!(address(&add("f", &conf)), "10.22.0.2", "a request does not move the next one on");
}

#[test]
fn c52_addresses_in_args_come_before_those_in_cni_args() {
    lab::enter();
    netns("c");
    let conf =
        with(hand_conf(), json!({"args": {"cni": {"ips": ["10.22.0.60"], "mac": "0a:00:00:00:00:60"}}}));
    let result =
        Plat::call("ADD", "c", &conf).set("CNI_ARGS", "IP=10.22.0.61;MAC=0a:00:00:00:00:61").result();
    assert_eq!(address(&result), "10.22.0.60");
    assert_eq!(result["interfaces"][2]["mac"], "0a:00:00:00:00:60");
    assert_eq!(pod_link("c")["address"], "0a:00:00:00:00:60");
}

#[test]
fn c53_behind_another_interface_plugin_the_result_is_passed_on() {
    lab::enter();
    netns("c");
    let previous = json!({"cniVersion": "1.1.0", "interfaces": [{"name": "cali1", "pciID": "x"}, {"name": "eth0",
        "sandbox": "/run/netns/c"}], "ips": [{"address": "10.1.0.2/24", "interface": 1}]});
    let conf = with(hand_conf(), json!({"prevResult": previous}));
    assert_eq!(Plat::call("ADD", "c", &conf).result(), previous);
    Plat::call("CHECK", "c", &conf).run().silent();
    Plat::call("DEL", "c", &conf).run().silent();
    lab::assert_nothing_left();
    assert_eq!(lab::json_of("ip -n c -j link show").as_array().unwrap().len(), 1);
}

#[test]
fn c54_dns_of_the_configuration_replaces_that_of_the_ipam_part() {
    lab::enter();
    std::fs::write("/run/resolv.conf", "nameserver 10.0.0.1\nsearch a b\noptions ndots:2\n").unwrap();
    let conf =
        with(hand_conf(), json!({"ipam": {"subnet": "10.22.0.0/24", "resolvConf": "/run/resolv.conf"}}));
    let result = add("a", &conf);
    assert_eq!(
        result["dns"],
        json!({"nameservers": ["10.0.0.1"], "search": ["a", "b"], "options": ["ndots:2"]})
    );
    let result = add("b", &with(conf, json!({"dns": {"nameservers": ["10.0.0.9"]}})));
    assert_eq!(result["dns"], json!({"nameservers": ["10.0.0.9"]}));
}

#[test]
fn a_resolv_conf_that_never_ends_fails_the_add_and_does_not_keep_it() {
    lab::enter();
    sh("mkfifo /run/fifo");
    sh("head -c 70000 /dev/zero >/run/large");
    netns("c");
    for (file, words) in [
        ("/dev/zero", "it is not a file"),
        ("/run/fifo", "it is not a file"),
        ("/run/large", "larger than 65536 bytes"),
        ("/run/none", "cannot read ipam.resolvConf /run/none"),
    ] {
        let conf = with(hand_conf(), json!({"ipam": {"subnet": "10.22.0.0/24", "resolvConf": file}}));
        let error = Plat::call("ADD", "c", &conf).run().error(5);
        assert!(error.contains(words), "{file}: {error}");
    }
    lab::assert_nothing_left();
}

fn c55_an_ipv6_address_can_be_used_at_once_also_where_ipv6_is_off_by_default(at: Datapath) {
    lab::enter();
    let conf = at.of(cluster_conf());
    blocks(&["fd00:10:244:3::/64"]);
    netns("c");
    sh("ip netns exec c sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1");
    let result = Plat::call("ADD", "c", &conf).result();
    assert_eq!(result["ips"][0]["address"], "fd00:10:244:3::2/128");
    // What the kernel does late: before that, the pod takes nothing that is sent to it.
    let local = sh("ip -n c -6 route show table local fd00:10:244:3::2");
    let addresses = lab::json_of("ip -n c -j addr show eth0");
    assert!(!addresses.to_string().contains("tentative"), "{addresses}");
    assert!(local.contains("local fd00:10:244:3::2 dev eth0"), "{local}");
    assert!(ping("c", "fd00:10:244:3::1"));
    let host = lab::host_end(&result)["name"].as_str().unwrap();
    assert_eq!(sh(&format!("cat /proc/sys/net/ipv6/conf/{host}/accept_ra")).trim(), "0");
    assert_eq!(sh("ip netns exec c cat /proc/sys/net/ipv6/conf/eth0/accept_ra").trim(), "0");
}

#[test]
fn a_link_too_narrow_for_ipv6_is_made_all_the_same() {
    lab::enter();
    let result = add("c", &with(hand_conf(), json!({"mtu": 1000})));
    let links = lab::json_of("ip -j link show type veth");
    assert_eq!(links[0]["mtu"], 1000);
    assert!(links[0]["ifalias"].as_str().unwrap().starts_with("plat c eth0"), "{links}");
    assert_eq!(links[0]["operstate"], "UP");
    assert_eq!(result["interfaces"][2]["mtu"], 1000);
    assert!(ping("c", "10.22.0.1"));
}

#[test]
fn the_hosts_end_of_a_link_has_no_address_that_a_del_would_wait_for() {
    lab::enter();
    let result = add("c", &hand_conf());
    let host = result["interfaces"][1]["name"].as_str().unwrap();
    lab::eventually("the bridge has its own link-local address", || {
        lab::json_of("ip -j -6 addr show dev cni0")[0]["addr_info"][0]["scope"] == "link"
    });
    assert_eq!(sh(&format!("ip -6 addr show dev {host}")), "");
}

#[test]
fn c56_hardware_addresses_are_set_by_us_so_that_udev_leaves_them_alone() {
    lab::enter();
    add("c", &hand_conf());
    // addr_assign_type 3 (NET_ADDR_SET) is what tells udev's MACAddressPolicy=persistent to keep off.
    sh("mount -t sysfs sysfs /sys");
    for link in ["cni0", lab::host_links()[0].as_str()] {
        assert_eq!(sh(&format!("cat /sys/class/net/{link}/addr_assign_type")).trim(), "3", "{link}");
    }
}

#[test]
fn c57_the_bridge_keeps_its_hardware_address() {
    lab::enter();
    let mac = |result: &Value| result["interfaces"][0]["mac"].clone();
    let first = mac(&add("a", &hand_conf()));
    let second = mac(&add("b", &hand_conf()));
    Plat::call("DEL", "a", &hand_conf()).run().silent();
    Plat::call("DEL", "b", &hand_conf()).run().silent();
    assert_eq!(mac(&add("c", &hand_conf())), first);
    assert_eq!(first, second);
}

#[test]
fn c57_so_does_one_that_was_there_before_us() {
    lab::enter();
    sh("ip link add cni0 type bridge; ip link set cni0 up");
    let mac = || lab::json_of("ip -j link show cni0")[0]["address"].clone();
    let first = mac();
    for id in ["a", "b"] {
        add(id, &hand_conf());
        assert_eq!(mac(), first);
    }
    for id in ["a", "b"] {
        Plat::call("DEL", id, &hand_conf()).run().silent();
        assert_eq!(mac(), first);
    }
}

#[test]
fn c58_an_address_on_the_bridge_that_contradicts_is_an_error_or_replaced() {
    lab::enter();
    sh("ip link add cni0 type bridge; ip addr add 10.99.0.1/24 dev cni0");
    netns("c");
    let error = Plat::call("ADD", "c", &hand_conf()).run().error(7);
    assert!(error.contains("10.99.0.1/24") && error.contains("forceAddress"), "{error}");
    lab::assert_nothing_left();
    Plat::call("ADD", "c", &with(hand_conf(), json!({"forceAddress": true}))).result();
    let text = sh("ip -o -4 addr show cni0");
    assert!(text.contains("10.22.0.1/24") && !text.contains("10.99.0.1"), "{text}");
    sh("ip link add notbr type veth peer name x");
    netns("d");
    assert!(
        Plat::call("ADD", "d", &with(hand_conf(), json!({"bridge": "notbr"})))
            .run()
            .error(7)
            .contains("notbr")
    );
}

fn c59_a_name_that_is_taken_on_the_host_is_never_taken_over(at: Datapath) {
    lab::enter();
    let conf = at.of(hand_conf());
    let name = lab::host_end(&add("c", &conf))["name"].as_str().unwrap().to_owned();
    Plat::call("DEL", "c", &conf).run().silent();
    sh(&format!("ip link add {name} type veth peer name foreign; ip link set {name} alias mine"));
    let result = Plat::call("ADD", "c", &conf).result();
    assert_ne!(lab::host_end(&result)["name"], name.as_str());
    assert!(ping("c", "10.22.0.1"));
    Plat::call("DEL", "c", &conf).run().silent();
    sh(&format!("ip link show {name}; ip link show foreign"));
    assert_eq!(lab::leases(), Vec::<Value>::new());
}

fn a_link_of_second_choice_keeps_its_rules_when_the_agent_restores_during_the_add(at: Datapath) {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    let conf = at.of(with(cluster_conf(), json!({"antiSpoofing": true})));
    let name = lab::host_end(&add("c", &conf))["name"].as_str().unwrap().to_owned();
    Plat::call("DEL", "c", &conf).run().silent();
    sh(&format!("ip link add {name} type veth peer name foreign; ip link set {name} alias mine"));
    let slow = Plat::call("ADD", "c", &conf).waiting_at("rules");
    let slow = slow.start();
    lab::eventually("the rules are written", || !lab::pod_elements().is_empty());
    let before = lab::pod_elements();
    lab::restore();
    assert_eq!(lab::pod_elements(), before);
    lab::go_on();
    let result = Answer::of(slow.wait_with_output().unwrap()).json();
    assert_ne!(lab::host_end(&result)["name"], name.as_str());
    assert_eq!(lab::pod_elements(), before);
}

fn c60_a_namespace_of_a_user_namespace_works(at: Datapath) {
    lab::enter();
    let conf = at.of(cluster_conf());
    sh("touch /run/netns/c; unshare -U -r -n sh -c 'echo $$ >/run/pid; exec sleep 60' >/dev/null 2>&1 & \
        while [ ! -s /run/pid ]; do sleep 0.01; done; mount --bind /proc/$(cat /run/pid)/ns/net /run/netns/c; kill $(cat /run/pid)");
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    Plat::call("ADD", "c", &conf).result();
    assert!(ping("c", "10.244.3.1"));
    // The proof of the lease works across user namespaces too.
    std::fs::remove_file("/run/plat/leases").unwrap();
    let other = add("d", &conf);
    assert_eq!(address(&other), "10.244.3.3");
    Plat::call("DEL", "c", &conf).run().silent();
    Plat::call("DEL", "d", &conf).run().silent();
    lab::assert_nothing_left();
}

fn by_hand_masquerade_is_for_what_leaves_the_subnet_only(at: Datapath) {
    lab::enter();
    lab::traffic::world();
    let conf = at.of(with(hand_conf(), json!({"ipMasq": true})));
    add("a", &conf);
    add("b", &conf);
    assert!(ping("a", "192.0.2.2"), "leaves with the node's address");
    assert!(ping("a", "10.22.0.3"));
    assert_eq!(
        lab::masqueraded(),
        ["10.22.0.2 : jump masq-10-22-0-0-24", "10.22.0.3 : jump masq-10-22-0-0-24"]
    );
    Plat::call("DEL", "a", &conf).run().silent();
    assert_eq!(lab::masqueraded(), ["10.22.0.3 : jump masq-10-22-0-0-24"]);
}

#[test]
fn by_hand_without_gateway_a_pod_gets_a_link_in_its_subnet_and_nothing_else() {
    lab::enter();
    let conf = with(hand_conf(), json!({"isDefaultGateway": false, "hairpinMode": true}));
    let result = add("c", &conf);
    assert!(result.get("routes").is_none(), "{result}");
    assert_eq!(lab::json_of("ip -n c -j route show default"), json!([]));
    assert_eq!(sh("ip -o -4 addr show cni0"), "");
    assert_eq!(sh("cat /proc/sys/net/ipv4/ip_forward").trim(), "0");
    let host = result["interfaces"][1]["name"].as_str().unwrap();
    assert!(sh(&format!("ip -d link show {host}")).contains("hairpin on"));
}

#[test]
fn routes_of_the_ipam_part_are_set_with_all_their_attributes() {
    lab::enter();
    let conf = with(
        hand_conf(),
        json!({"isDefaultGateway": false, "isGateway": true, "promiscMode": true, "ipam": {"subnet": "10.22.0.0/24", "routes": [
            {"dst": "0.0.0.0/0"},
            {"dst": "198.51.100.0/24", "gw": "10.22.0.9", "mtu": 1300, "advmss": 1200, "priority": 77},
            {"dst": "203.0.113.0/24", "table": 100}]}}),
    );
    let result = add("c", &conf);
    assert_eq!(result["routes"].as_array().unwrap().len(), 3);
    let text = sh("ip -n c route show 198.51.100.0/24");
    for part in ["via 10.22.0.9", "metric 77", "mtu 1300", "advmss 1200"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(sh("ip -n c route show table 100").contains("203.0.113.0/24 via 10.22.0.1"));
    assert!(sh("ip -n c route show default").contains("via 10.22.0.1"));
    assert!(sh("ip -d link show cni0").contains("PROMISC"));
}

#[test]
fn without_ipam_a_pod_gets_a_link_alone() {
    lab::enter();
    let conf = json!({"cniVersion": "1.0.0", "name": "l2", "type": "plat"});
    let result = add("c", &conf);
    assert!(result.get("ips").is_none(), "{result}");
    assert_eq!(pod_link("c")["operstate"], "UP");
    Plat::call("CHECK", "c", &with(conf.clone(), json!({"prevResult": result}))).run().silent();
    Plat::call("DEL", "c", &conf).run().silent();
    lab::assert_nothing_left();
}

fn the_mtu_of_the_blocks_file_is_used_where_the_configuration_says_none(at: Datapath) {
    lab::enter();
    let conf = at.of(cluster_conf());
    lab::write_blocks(&["10.244.3.0/24"], |file| file.mtu = Some(1430));
    let result = add("c", &conf);
    assert_eq!(lab::pod_end(&result)["mtu"], 1430);
    assert_eq!(pod_link("c")["mtu"], 1430);
    add("d", &with(conf.clone(), json!({"mtu": 1380})));
    assert_eq!(pod_link("d")["mtu"], 1380);
}

#[test]
fn a_read_only_or_full_run_folder_is_named_and_nothing_is_left() {
    lab::enter();
    netns("c");
    sh(
        "mkdir /run/ro /run/tiny; mount -t tmpfs -o ro tmpfs /run/ro; mount -t tmpfs -o size=4k tmpfs /run/tiny",
    );
    for (dir, words) in [("/run/ro", "read-only"), ("/run/tiny", "full")] {
        let conf = with(hand_conf(), json!({"runDir": dir, "ipMasq": true}));
        let error = Plat::call("ADD", "c", &conf).run().error(5);
        assert!(error.contains(words) && error.contains(dir), "{error}");
        lab::assert_nothing_left();
        assert_eq!(lab::json_of("ip -n c -j link show").as_array().unwrap().len(), 1);
    }
}

fn a_store_that_was_removed_meanwhile_cannot_make_two_pods_share_an_address(at: Datapath) {
    lab::enter();
    netns("slow");
    let conf = at.of(with(hand_conf(), json!({"ipam": {"subnet": "10.22.0.0/29"}})));
    // The ADD waits with a lease and no link, so that nothing in the kernel proves the lease yet.
    let slow =
        Plat::call("ADD", "slow", &conf).waiting_at("lease").set("PLAT_FAIL_TRACE", "/run/trace").start();
    lab::eventually("the lease is recorded", || {
        lab::exists("/run/plat/leases") && lab::leased() == ["10.22.0.2"]
    });
    std::fs::remove_file("/run/plat/leases").unwrap();
    let quick = add("quick", &conf);
    assert_eq!(address(&quick), "10.22.0.2");
    lab::go_on();
    let answer = Answer::of(slow.wait_with_output().unwrap());
    assert!(answer.error(11).contains("quick"));
    let trace = std::fs::read_to_string("/run/trace").unwrap();
    let steps: Vec<&str> = trace.lines().collect();
    assert!(steps.contains(&"alias") && !steps.contains(&"raised"), "two pods had the address: {steps:?}");
    assert_eq!(lab::leased(), ["10.22.0.2"]);
    assert_eq!(lab::host_links().len(), 1);
    assert!(ping("quick", "10.22.0.1"));
}

#[test]
fn a_store_that_is_removed_before_the_pod_has_its_addresses_is_rebuilt_from_its_link() {
    lab::enter();
    netns("slow");
    let slow = Plat::call("ADD", "slow", &hand_conf())
        .waiting_at("confirm")
        .set("PLAT_FAIL_TRACE", "/run/trace")
        .start();
    lab::eventually("the lease is confirmed", || {
        std::fs::read_to_string("/run/trace").is_ok_and(|trace| trace.lines().any(|step| step == "confirm"))
    });
    std::fs::remove_dir_all("/run/plat").unwrap();
    let quick = address(&add("quick", &hand_conf()));
    lab::go_on();
    let slow = address(&Answer::of(slow.wait_with_output().unwrap()).json());
    assert_ne!(slow, quick);
    assert_eq!(lab::leased().into_iter().collect::<BTreeSet<_>>(), BTreeSet::from([slow, quick]));
}

#[test]
fn a_store_that_was_removed_meanwhile_gets_the_lease_again_if_nobody_has_the_address() {
    lab::enter();
    netns("slow");
    let slow = Plat::call("ADD", "slow", &hand_conf()).waiting_at("lease").start();
    lab::eventually("the lease is recorded", || lab::exists("/run/plat/leases") && !lab::leases().is_empty());
    std::fs::remove_dir_all("/run/plat").unwrap();
    lab::go_on();
    let result = Answer::of(slow.wait_with_output().unwrap()).json();
    assert_eq!(lab::leased(), [address(&result)]);
    assert_eq!(lab::leases()[0]["network"], "hand", "complete, not rebuilt");
}

#[test]
fn leases_of_inline_ranges_can_have_a_folder_of_their_own() {
    lab::enter();
    let conf = with(hand_conf(), json!({"ipam": {"subnet": "10.22.0.0/24", "dataDir": "/run/mine"}}));
    add("c", &conf);
    assert!(lab::exists("/run/mine/leases") && !lab::exists("/run/plat"));
    Plat::call("DEL", "c", &conf).run().silent();
    assert_eq!(lab::host_links(), Vec::<String>::new());
}
