//! Options of the reference bridge plugin under their own names, against that plugin.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use lab::{Plat, add, hand_conf, json_of, netns, sh, with};
use serde_json::{Value, json};

/// A link without address.
fn bare_conf() -> Value {
    json!({"cniVersion": "1.0.0", "name": "bare", "type": "plat", "bridge": "cni0"})
}

fn dual_stack() -> Value {
    with(
        hand_conf(),
        json!({"ipam": {"ranges": [[{"subnet": "10.22.0.0/24"}], [{"subnet": "fd00:22::/64"}]]}}),
    )
}

/// What became of the option: of bridge, port, pod's link and its sysctls.
fn observe(conf: &Value, of_reference: bool) -> Value {
    let conf = conf.clone();
    let observed = std::thread::spawn(move || {
        lab::enter();
        netns("c");
        let call = if of_reference {
            Plat::reference("bridge", "ADD", "c", &conf)
        } else {
            Plat::call("ADD", "c", &conf)
        };
        let answer = call.run();
        if !answer.success {
            return json!({"fails": true});
        }
        let result = answer.json();
        let host = result["interfaces"][1]["name"].as_str().unwrap();
        let port = &json_of(&format!("ip -d -j link show {host}"))[0]["linkinfo"]["info_slave_data"];
        let pod = &json_of("ip -n c -j addr show eth0")[0];
        let tentative = pod["addr_info"].as_array().unwrap().iter().any(|a| a["tentative"] == true);
        let sysctl = |name: &str| {
            let path = format!("/proc/sys/net/ipv6/conf/eth0/{name}");
            sh(&format!("ip netns exec c cat {path}")).trim().to_owned()
        };
        json!({
            "hairpin": port["hairpin"],
            "isolated": port["isolated"],
            "promiscuous": json_of("ip -d -j link show cni0")[0]["promiscuity"].as_u64() > Some(1),
            "pod is up": pod["flags"].as_array().unwrap().contains(&json!("UP")),
            "tentative": tentative,
            "accept_dad": sysctl("accept_dad"),
            "enhanced_dad": sysctl("enhanced_dad"),
        })
    });
    observed.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[test]
fn each_option_does_what_it_does_in_the_reference_bridge_plugin() {
    let cases = [
        ("no option", dual_stack()),
        ("portIsolation", with(dual_stack(), json!({"portIsolation": true}))),
        ("hairpinMode", with(dual_stack(), json!({"hairpinMode": true}))),
        ("promiscMode", with(dual_stack(), json!({"promiscMode": true}))),
        ("enabledad", with(dual_stack(), json!({"enabledad": true}))),
        ("disableContainerInterface", with(bare_conf(), json!({"disableContainerInterface": true}))),
        ("the same with ipam", with(dual_stack(), json!({"disableContainerInterface": true}))),
        (
            "hairpinMode and promiscMode",
            with(dual_stack(), json!({"hairpinMode": true, "promiscMode": true})),
        ),
    ];
    for (name, conf) in cases {
        assert_eq!(observe(&conf, false), observe(&conf, true), "{name}");
    }
}

#[test]
fn isolated_ports_reach_the_gateway_and_no_isolated_port() {
    lab::enter();
    let isolated = with(hand_conf(), json!({"portIsolation": true}));
    let result = add("a", &isolated);
    add("b", &isolated);
    add("open", &hand_conf());
    assert!(lab::ping("a", "10.22.0.1") && lab::ping("a", "10.22.0.4"));
    let reached = lab::attempt("ip", &["netns", "exec", "a", "busybox", "ping", "-c1", "-W1", "10.22.0.3"]);
    assert!(!reached.status.success());
    let check = || Plat::call("CHECK", "a", &with(isolated.clone(), json!({"prevResult": result}))).run();
    check().silent();
    let host = result["interfaces"][1]["name"].as_str().unwrap();
    sh(&format!("ip link set {host} type bridge_slave isolated off"));
    assert!(check().error(105).contains("isolated"));
}

#[test]
fn whoever_makes_a_bridge_anew_puts_the_pods_of_the_deleted_one_back_on_it() {
    lab::enter();
    let isolated = with(hand_conf(), json!({"portIsolation": true, "hairpinMode": true}));
    let result = add("a", &isolated);
    add(
        "apart",
        &with(hand_conf(), json!({"name": "other", "bridge": "br1", "ipam": {"subnet": "10.23.0.0/24"}})),
    );
    sh("ip link del cni0; ip link del br1");
    add("b", &hand_conf());
    assert!(lab::ping("a", "10.22.0.1") && lab::ping("a", "10.22.0.3"));
    Plat::call("CHECK", "a", &with(isolated, json!({"prevResult": result}))).run().silent();
    assert_eq!(json_of("ip -j link show master cni0").as_array().unwrap().len(), 2, "br1 has its own");
}

#[test]
fn an_interface_that_is_to_stay_down_does_and_passes_its_check() {
    lab::enter();
    let conf = with(bare_conf(), json!({"disableContainerInterface": true}));
    let result = add("c", &conf);
    assert_eq!(json_of("ip -n c -j link show eth0")[0]["operstate"], "DOWN");
    Plat::call("CHECK", "c", &with(conf.clone(), json!({"prevResult": result}))).run().silent();
    Plat::call("DEL", "c", &conf).run().silent();
    lab::assert_nothing_left();
    netns("d");
    let with_ipam = with(hand_conf(), json!({"disableContainerInterface": true}));
    let error = Plat::call("ADD", "d", &with_ipam).run().error(7);
    assert!(error.contains("disableContainerInterface") && error.contains("ipam"), "{error}");
}

#[test]
fn with_enabledad_an_address_that_somebody_has_is_not_given() {
    let meets_another = |guard: Value| {
        lab::enter();
        let conf = with(with(dual_stack(), json!({"enabledad": true})), guard);
        // A store that is there does not ask who else has addresses.
        add("before", &conf);
        Plat::call("DEL", "before", &conf).run().silent();
        sh("ip link del cni0");
        netns("other");
        sh("ip link add name cni0 type bridge; ip link set cni0 up; \
            ip link add o type veth peer name eth0 netns other; ip link set o master cni0 up; \
            ip -n other link set eth0 up; ip -n other addr add fd00:22::3/64 dev eth0 nodad");
        netns("c");
        let error = Plat::call("ADD", "c", &conf).run().error(102);
        assert!(error.contains("fd00:22::3") && error.contains("enabledad"), "{error}");
        assert_eq!(lab::leases(), Vec::<Value>::new());
    };
    for guard in [json!({}), json!({"antiSpoofing": true})] {
        std::thread::spawn(move || meets_another(guard)).join().unwrap();
    }
}

#[test]
fn anti_spoofing_without_addresses_is_refused() {
    lab::enter();
    netns("c");
    let error = Plat::call("ADD", "c", &with(bare_conf(), json!({"antiSpoofing": true}))).run().error(7);
    assert!(error.contains("antiSpoofing") && error.contains("macspoofchk"), "{error}");
}
