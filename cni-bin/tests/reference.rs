//! The same configurations and calls given to ours and to the reference plugins, one after the other, each in a
//! laboratory of its own. What is compared: answers, links, addresses, routes, permanent neighbours, bridge
//! ports, sysctls, what pods reach and as whom, and all of that again after DEL.
//!
//! Each line of [`observe`] that only one of the two has must be one of the named differences ([`COMMON`],
//! [`BRIDGE`], [`ROUTED`]); each of these must occur in some case, and stand by its name in `docs/cni.md`,
//! "Different from the reference".

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use lab::traffic::{Server, ask_tcp, inside, world};
use lab::{Answer, Plat, json_of, netns, sh, with};
use plat_cni::mac::{End, Mac};
use serde_json::{Value, json};

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Reference,
    Ours,
}

use Who::{Ours, Reference};

/// A difference that is meant.
struct Difference {
    /// Its row in `docs/cni.md`.
    name: &'static str,
    lines: &'static [Only],
}

/// Lines that one of the two has alone.
struct Only {
    who: Who,
    /// In these cases; if empty, in all.
    cases: &'static [&'static str],
    /// Words that such a line contains, all of them.
    words: &'static [&'static str],
}

const fn reference(words: &'static [&'static str]) -> Only {
    Only { who: Reference, cases: &[], words }
}

const fn ours(words: &'static [&'static str]) -> Only {
    Only { who: Ours, cases: &[], words }
}

const fn only_in(cases: &'static [&'static str], only: Only) -> Only {
    Only { cases, ..only }
}

/// Cases in which nobody gives the bridge an address.
const NO_GATEWAY: &[&str] = &["a link and an address", "several ranges of a set", "ranges of the runtime"];

/// Cases without addresses.
const NO_IPAM: &[&str] = &["no address", "disableContainerInterface"];

/// Cases in which an ADD fails after the reference has made something.
const FAILING: &[&str] = &[
    "another address on the bridge",
    "a full range",
    "a requested address and hardware address",
    "an address requested by args",
    "a route of link scope",
    "an invalid subnet",
];

/// Against both of the reference's plugins.
const COMMON: &[Difference] = &[
    Difference {
        name: "hardware addresses",
        lines: &[
            reference(&["mac=any"]),
            ours(&["mac=from an address"]),
            reference(&["link", " address=any"]),
            ours(&["link", " address=from an address"]),
        ],
    },
    Difference {
        name: "transmit queues of the pod's link",
        lines: &[
            reference(&["num_rx_queues="]),
            ours(&["num_rx_queues=1"]),
            reference(&["num_tx_queues="]),
            ours(&["num_tx_queues=1"]),
            ours(&["txqlen=1000"]),
        ],
    },
    Difference {
        name: "alias of the pod's link on the host",
        lines: &[ours(&["link HOST", "ifalias=plat "])],
    },
    Difference {
        name: "IPv6 link-local address of the pod's link on the host",
        lines: &[
            reference(&["sysctl ipv6/conf HOST", "addr_gen_mode=0"]),
            ours(&["sysctl ipv6/conf HOST", "addr_gen_mode=1"]),
        ],
    },
    Difference {
        name: "`keep_addr_on_down` in the pod",
        lines: &[
            reference(&["sysctl ipv6/conf eth0 keep_addr_on_down=1"]),
            ours(&["sysctl ipv6/conf eth0 keep_addr_on_down=0"]),
        ],
    },
    Difference {
        name: "IPv6 duplicate address detection",
        lines: &[
            reference(&["sysctl ipv6/conf eth0 accept_dad="]),
            ours(&["sysctl ipv6/conf eth0 accept_dad="]),
            ours(&["addr", "nodad=true"]),
        ],
    },
    Difference {
        name: "router advertisements (`accept_ra`) in the pod",
        lines: &[
            reference(&["sysctl ipv6/conf eth0 accept_ra=1"]),
            ours(&["sysctl ipv6/conf eth0 accept_ra=0"]),
        ],
    },
    Difference { name: "error codes", lines: &[reference(&["error code 999"]), ours(&["error code "])] },
    Difference {
        name: "DEL without namespace",
        lines: &[
            only_in(&["DEL without namespace"], reference(&["after DEL", " HOST1 "])),
            only_in(&["DEL without namespace"], reference(&["after DEL", "dev HOST1"])),
            only_in(&["DEL without namespace"], reference(&["after DEL", "rules name 10.22.0.2"])),
        ],
    },
    Difference {
        name: "DEL with a broken configuration",
        lines: &[
            only_in(&["an invalid subnet"], reference(&["DEL", "error"])),
            only_in(&["an invalid subnet"], ours(&["DEL", "ok"])),
        ],
    },
    Difference {
        name: "`mtu` of interfaces in results of 1.1.0",
        lines: &[ours(&["result interfaces", "].mtu="])],
    },
    Difference {
        name: "`ipMasq`",
        lines: &[
            reference(&["table ip nat"]),
            reference(&["table ip6 nat"]),
            ours(&["table inet plat-pods"]),
        ],
    },
];

/// Against bridge and host-local.
const BRIDGE: &[Difference] = &[
    Difference {
        // It takes one of its ports' addresses, and the reference's CHECK does not find the one that was reported.
        name: "hardware address of a bridge without gateway",
        lines: &[
            reference(&["link cni0 address=00:00:00:00:00:00"]),
            ours(&["link cni0 address=any"]),
            only_in(NO_GATEWAY, reference(&["CHECK", "error"])),
            only_in(NO_GATEWAY, ours(&["CHECK", "ok"])),
        ],
    },
    Difference {
        name: "learning from reserved addresses (`no_linklocal_learn`)",
        lines: &[
            reference(&["host link cni0", "no_linklocal_learn=0"]),
            ours(&["host link cni0", "no_linklocal_learn=1"]),
        ],
    },
    Difference {
        name: "`keep_addr_on_down` of the bridge",
        lines: &[
            reference(&["host sysctl ipv6/conf cni0 keep_addr_on_down=0"]),
            ours(&["host sysctl ipv6/conf cni0 keep_addr_on_down=1"]),
        ],
    },
    Difference {
        name: "gratuitous ARP (`arp_notify`)",
        lines: &[
            reference(&["sysctl ipv4/conf eth0 arp_notify=1"]),
            ours(&["sysctl ipv4/conf eth0 arp_notify=0"]),
        ],
    },
    Difference {
        name: "router advertisements on a bridge that was there",
        lines: &[
            reference(&["host sysctl ipv6/conf cni0 accept_ra=0"]),
            ours(&["host sysctl ipv6/conf cni0 accept_ra=1"]),
        ],
    },
    Difference {
        name: "a failed ADD",
        lines: &[
            only_in(FAILING, reference(&[" | host link "])),
            only_in(FAILING, reference(&[" | host sysctl "])),
            only_in(FAILING, reference(&[" | pod ", "eth0"])),
        ],
    },
    Difference {
        name: "CHECK without `ipam`",
        lines: &[only_in(NO_IPAM, reference(&["CHECK", "error"])), only_in(NO_IPAM, ours(&["CHECK", "ok"]))],
    },
    Difference {
        name: "CHECK of routes in other tables",
        lines: &[
            only_in(&["routes with attributes"], reference(&["CHECK", "error"])),
            only_in(&["routes with attributes"], ours(&["CHECK", "ok"])),
        ],
    },
    Difference {
        name: "route `mtu`, `advmss`",
        lines: &[ours(&["route main 198.51.100.0/24", "metrics[0]."])],
    },
    Difference {
        name: "route of link scope",
        lines: &[
            only_in(&["a route of link scope"], reference(&["ADD", "error"])),
            only_in(&["a route of link scope"], ours(&[])),
        ],
    },
    Difference {
        name: "`macspoofchk`",
        lines: &[reference(&["table bridge nat"]), ours(&["table bridge plat-pods"])],
    },
];

/// The routed datapath against ptp and host-local.
const ROUTED: &[Difference] = &[
    Difference {
        name: "ptp: the pod's address",
        lines: &[
            reference(&["ADD", "result ip"]),
            ours(&["ADD", "result ip"]),
            reference(&["addr eth0 "]),
            ours(&["addr eth0 "]),
            // What the kernel derives from the prefix, and what replaces it.
            reference(&["route local", "dev eth0"]),
            reference(&["route main 10.22.0.0/", "dev eth0"]),
            reference(&["route main 10.23.0.0/", "dev eth0"]),
            reference(&["route main fd22::/64", "dev eth0"]),
            ours(&["route main fd22::2 dev eth0"]),
            ours(&["route main fd22::3 dev eth0"]),
        ],
    },
    Difference {
        name: "ptp: the pod's route to its gateway",
        lines: &[
            reference(&["route main 10.22.0.1 dev eth0"]),
            reference(&["route main 10.23.0.1 dev eth0"]),
            reference(&["route main fd22::1 dev eth0"]),
        ],
    },
    Difference {
        name: "ptp: routes in the result",
        lines: &[reference(&["ADD", "result routes["]), ours(&["ADD", "result routes["])],
    },
    Difference {
        name: "ptp: a pod without default route",
        lines: &[only_in(&["an address alone"], ours(&["route main default dev eth0"]))],
    },
    Difference {
        name: "ptp: the gateway's address",
        lines: &[
            reference(&["host addr HOST"]),
            reference(&["host route local", "dev HOST"]),
            reference(&["host route main fd22::1 dev HOST"]),
            ours(&["host addr lo "]),
            ours(&["host route local", "dev lo"]),
            ours(&["host route main fd22::1 dev lo"]),
        ],
    },
    Difference {
        name: "ptp: the host's routes",
        lines: &[
            reference(&["host route main 10.2", "dev HOST"]),
            reference(&["host route main fd22::", "dev HOST"]),
            ours(&["host route main 10.2", "dev HOST"]),
            ours(&["host route main fd22::", "dev HOST"]),
        ],
    },
    Difference { name: "ptp: permanent neighbours", lines: &[ours(&["neigh "])] },
];

/// Two plugins that do the same.
struct Pair {
    /// The reference's; its IPAM is host-local.
    reference: &'static str,
    /// What ours is told besides.
    ours: Value,
    /// Besides those that are common.
    differences: &'static [Difference],
    cases: Vec<Case>,
}

/// What is given to both.
struct Case {
    name: &'static str,
    /// The configuration without types.
    conf: Value,
    /// A line of shell before the first ADD.
    before: &'static str,
    /// A line of shell before the first DEL.
    damage: &'static str,
}

/// A case on a network with a gateway.
fn case(name: &'static str, conf: Value) -> Case {
    let base = json!({"cniVersion": "1.0.0", "name": "net", "bridge": "cni0", "isGateway": true,
        "ipam": {"subnet": "10.22.0.0/24"}});
    Case { name, conf: with(base, conf), before: "true", damage: "true" }
}

fn bridge_cases() -> Vec<Case> {
    let (v4, v6) = (json!({"subnet": "10.22.0.0/24"}), json!({"subnet": "fd22::/64"}));
    let routes =
        |routes: Value| json!({"cniVersion": "1.1.0", "ipam": {"subnet": "10.22.0.0/24", "routes": routes}});
    let old_bridge = "ip link add cni0 type bridge; ip addr add 10.99.0.1/24 dev cni0; ip link set cni0 up";
    vec![
        case("a link and an address", json!({"isGateway": false})),
        case("isGateway", json!({})),
        case("isDefaultGateway", json!({"isGateway": false, "isDefaultGateway": true})),
        case("ipMasq", json!({"isDefaultGateway": true, "ipMasq": true})),
        Case {
            // The namespace lives on somewhere else, so that the link does not go with it.
            damage: "touch /run/elsewhere; mount --bind /run/netns/a /run/elsewhere; umount /run/netns/a; rm /run/netns/a",
            ..case("DEL without namespace", json!({"isDefaultGateway": true, "ipMasq": true}))
        },
        case("mtu", json!({"mtu": 1400})),
        case("hairpinMode", json!({"hairpinMode": true})),
        case("promiscMode", json!({"promiscMode": true})),
        case("portIsolation", json!({"portIsolation": true})),
        case("macspoofchk", json!({"macspoofchk": true})),
        case("enabledad", json!({"enabledad": true})),
        case(
            "disableContainerInterface",
            json!({"isGateway": false, "disableContainerInterface": true, "ipam": {}}),
        ),
        case("hairpinMode and promiscMode", json!({"hairpinMode": true, "promiscMode": true})),
        Case { before: old_bridge, ..case("another address on the bridge", json!({})) },
        Case { before: old_bridge, ..case("forceAddress", json!({"forceAddress": true})) },
        Case { before: "ip link add cni0 type veth peer name x0", ..case("no bridge", json!({})) },
        case("IPv6", json!({"isDefaultGateway": true, "ipam": v6})),
        case(
            "both families",
            json!({"isDefaultGateway": true, "ipMasq": true, "ipam": {"ranges": [[v4], [v6]]}}),
        ),
        case(
            "several ranges of a set",
            json!({"isGateway": false, "ipam": {"ranges": [[
            {"subnet": "10.22.0.0/24", "rangeStart": "10.22.0.9", "rangeEnd": "10.22.0.9"}, {"subnet": "10.23.0.0/24"}]]}}),
        ),
        case(
            "start, end and gateway",
            json!({"isDefaultGateway": true, "ipam": {"subnet": "10.22.0.0/24",
            "rangeStart": "10.22.0.100", "rangeEnd": "10.22.0.110", "gateway": "10.22.0.254"}}),
        ),
        case("a full range", json!({"ipam": {"subnet": "10.22.0.0/30"}})),
        case("a default route", routes(json!([{"dst": "0.0.0.0/0"}]))),
        case(
            "a default route through another gateway",
            with(routes(json!([{"dst": "0.0.0.0/0", "gw": "10.22.0.7"}])), json!({"isDefaultGateway": true})),
        ),
        case(
            "routes with attributes",
            routes(json!([
            {"dst": "198.51.100.0/24", "gw": "10.22.0.9", "mtu": 1300, "advmss": 1200, "priority": 77},
            {"dst": "203.0.113.0/24", "table": 100}])),
        ),
        case("a route of link scope", routes(json!([{"dst": "192.0.2.128/25", "scope": 253}]))),
        case(
            "a requested address and hardware address",
            json!({"runtimeConfig": {"ips": ["10.22.0.50/24"], "mac": ASKED_MAC}}),
        ),
        case("an address requested by args", json!({"args": {"cni": {"ips": ["10.22.0.51"]}}})),
        case(
            "ranges of the runtime",
            json!({"isGateway": false, "runtimeConfig": {"ipRanges": [[{"subnet": "10.33.0.0/24"}]]}}),
        ),
        case(
            "dns",
            json!({"dns": {"nameservers": ["10.0.0.9"], "domain": "d", "search": ["s"], "options": ["o"]}}),
        ),
        case("resolvConf", json!({"ipam": {"subnet": "10.22.0.0/24", "resolvConf": "/run/resolv.conf"}})),
        case("no address", json!({"isGateway": false, "ipam": {}})),
        case("version 0.2.0", json!({"cniVersion": "0.2.0", "isDefaultGateway": true})),
        case("version 0.4.0", json!({"cniVersion": "0.4.0", "isDefaultGateway": true})),
        case("version 1.1.0", json!({"cniVersion": "1.1.0", "isDefaultGateway": true, "mtu": 1400})),
        case("a version that does not exist", json!({"cniVersion": "1.0"})),
        case("an invalid subnet", json!({"ipam": {"subnet": "10.22.0.5/24"}})),
    ]
}

/// The hardware address that a case asks for.
const ASKED_MAC: &str = "0a:00:00:00:00:50";

fn routed_cases() -> Vec<Case> {
    let case = |name, conf: Value| {
        let base = json!({"cniVersion": "1.0.0", "name": "net", "ipam": {"subnet": "10.22.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}});
        Case { name, conf: with(base, conf), before: "true", damage: "true" }
    };
    let v6 = json!({"subnet": "fd22::/64"});
    let defaults = json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]);
    vec![
        case("a default route", json!({})),
        case("an address alone", json!({"ipam": {"subnet": "10.22.0.0/24"}})),
        case("ipMasq", json!({"ipMasq": true})),
        Case {
            damage: "touch /run/elsewhere; mount --bind /run/netns/a /run/elsewhere; umount /run/netns/a; rm /run/netns/a",
            ..case("DEL without namespace", json!({"ipMasq": true}))
        },
        case("mtu", json!({"mtu": 1400})),
        case("IPv6", json!({"ipam": {"subnet": "fd22::/64", "routes": [{"dst": "::/0"}]}})),
        case(
            "both families",
            json!({"ipam": {"ranges": [[{"subnet": "10.22.0.0/24"}], [v6]], "routes": defaults}}),
        ),
        case(
            "several ranges of a set",
            json!({"ipam": {"ranges": [[
            {"subnet": "10.22.0.0/24", "rangeStart": "10.22.0.9", "rangeEnd": "10.22.0.9"}, {"subnet": "10.23.0.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}}),
        ),
        case("a full range", json!({"ipam": {"subnet": "10.22.0.0/30", "routes": [{"dst": "0.0.0.0/0"}]}})),
        case(
            "dns",
            json!({"dns": {"nameservers": ["10.0.0.9"], "domain": "d", "search": ["s"], "options": ["o"]}}),
        ),
        case("version 0.2.0", json!({"cniVersion": "0.2.0"})),
        case("version 1.1.0", json!({"cniVersion": "1.1.0", "mtu": 1400})),
        case("an invalid subnet", json!({"ipam": {"subnet": "10.22.0.5/24"}})),
    ]
}

/// Runs the case's calls and returns what was seen, line by line.
fn run(pair: &Pair, who: Who, case: &Case) -> BTreeSet<String> {
    lab::enter();
    // Without duplicate address detection on the host all is settled at once, for both.
    sh("sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0");
    sh("printf 'nameserver 10.0.0.1\nsearch a b\noptions ndots:2\n' >/run/resolv.conf");
    world();
    sh(case.before);
    let mut lines = BTreeSet::new();
    let mut results = BTreeMap::new();
    for id in ["a", "b"] {
        netns(id);
        let answer = call(pair, who, "ADD", id, &case.conf);
        note(&mut lines, &format!("ADD {id}"), &answer);
        if answer.success {
            results.insert(id, answer.json());
        }
    }
    let host_ends = host_ends();
    observe(&mut lines, "with pods");
    reach(&mut lines, &results);
    for (id, result) in &results {
        let answer = call(pair, who, "CHECK", id, &with(case.conf.clone(), json!({"prevResult": result})));
        note(&mut lines, &format!("CHECK {id}"), &answer);
    }
    note(&mut lines, "second ADD a", &call(pair, who, "ADD", "a", &case.conf));
    sh(case.damage);
    for (id, moment) in [("a", "after DEL a"), ("b", "after DEL b")] {
        for time in ["first", "second"] {
            let answer = call(pair, who, "DEL", id, &case.conf);
            note(&mut lines, &format!("{time} DEL {id}"), &answer);
        }
        observe(&mut lines, moment);
    }
    normalise(lines, &host_ends)
}

/// One call of either.
fn call(pair: &Pair, who: Who, verb: &str, id: &str, conf: &Value) -> Answer {
    let call = match who {
        Ours => {
            let conf = with(with(conf.clone(), pair.ours.clone()), json!({"type": "plat"}));
            Plat::call(verb, id, &conf).with_plugins()
        }
        Reference => Plat::reference(pair.reference, verb, id, conf),
    };
    // As libcni does: a namespace that is gone has no path.
    let call = if lab::exists(&format!("/run/netns/{id}")) { call } else { call.set("CNI_NETNS", "") };
    call.run()
}

/// Notes an answer: a result field by field, of an error its code.
fn note(lines: &mut BTreeSet<String>, what: &str, answer: &Answer) {
    if !answer.success {
        let error: Value = serde_json::from_str(&answer.stdout).unwrap_or_else(|e| panic!("{e}: {answer:?}"));
        lines.insert(format!("{what} | error"));
        lines.insert(format!("{what} | error code {}", error["code"]));
        return;
    }
    lines.insert(format!("{what} | ok"));
    if let Ok(result) = serde_json::from_str::<Value>(&answer.stdout) {
        flatten(lines, &format!("{what} | result"), "", &result);
    }
}

/// Keys and flags whose values nobody chose: numbers, timers, what follows from hardware addresses, and what
/// the kernel tells of a bridge without ports in its own time.
const CHANCE: &[&str] = &[
    "operstate",
    "linkdown",
    "NO-CARRIER",
    "LOWER_UP",
    "tso_max_size",
    "ifindex",
    "link_index",
    "link_netnsid",
    "valid_life_time",
    "preferred_life_time",
    "bridge_id",
    "root_id",
    "designated_root",
    "designated_bridge",
    "fdb_n_learned",
    "hello_timer",
    "tcn_timer",
    "topology_change_timer",
    "gc_timer",
    "hold_timer",
    "message_age_timer",
    "forward_delay_timer",
    "topology_change",
    "topology_change_detected",
    "root_port",
    "permaddr",
    "link_pointtopoint",
];

/// One line for each value of a tree.
fn flatten(lines: &mut BTreeSet<String>, prefix: &str, path: &str, value: &Value) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields.iter().filter(|(key, _)| !CHANCE.contains(&key.as_str())) {
                let dot = if path.is_empty() { "" } else { "." };
                flatten(lines, prefix, &format!("{path}{dot}{key}"), value);
            }
        }
        Value::Array(list) if path == "flags" => {
            let steady = list.iter().filter_map(Value::as_str).filter(|flag| !CHANCE.contains(flag));
            lines.extend(steady.map(|flag| format!("{prefix} flag {flag}")));
        }
        Value::Array(list) => {
            for (number, value) in list.iter().enumerate() {
                flatten(lines, prefix, &format!("{path}[{number}]"), value);
            }
        }
        Value::String(text) => drop(lines.insert(format!("{prefix} {path}={text}"))),
        other => drop(lines.insert(format!("{prefix} {path}={other}"))),
    }
}

/// What the kernel holds, on the host and in both pods.
fn observe(lines: &mut BTreeSet<String>, moment: &str) {
    lab::eventually("the kernel has told all ports of their carriers", carriers_are_told);
    observe_namespace(lines, &format!("{moment} | host"));
    let rules = sh("nft list ruleset");
    lines.extend(
        rules
            .lines()
            .filter(|l| l.starts_with("table "))
            .map(|l| format!("{moment} | {}", l.trim_end_matches(" {"))),
    );
    for address in ["10.22.0.2", "10.22.0.3", "fd22::2", "fd22::3"].into_iter().filter(|a| rules.contains(a))
    {
        lines.insert(format!("{moment} | rules name {address}"));
    }
    for id in ["a", "b"] {
        if lab::exists(&format!("/run/netns/{id}")) {
            let mut of_pod = BTreeSet::new();
            inside(id, || observe_namespace(&mut of_pod, &format!("{moment} | pod {id}")));
            lines.extend(of_pod);
        }
    }
}

/// Whether every veth link's operational state, from which a bridge port's follows, agrees with its carrier: the
/// kernel brings it up to date some time after the carrier changed (`net/core/link_watch.c`).
fn carriers_are_told() -> bool {
    let links = json_of("ip -j link show type veth");
    links.as_array().into_iter().flatten().all(|link| {
        let has_carrier = link["flags"].as_array().unwrap().iter().any(|flag| flag == "LOWER_UP");
        (link["operstate"] == "UP") == has_carrier && link["operstate"] != "UNKNOWN"
    })
}

fn observe_namespace(lines: &mut BTreeSet<String>, prefix: &str) {
    let ours_to_make = |text: &str| !text.starts_with("fe80:") && !text.starts_with("ff00:");
    for mut link in json_of("ip -d -j addr show").as_array().unwrap().clone() {
        let name = link["ifname"].as_str().unwrap().to_owned();
        if name == "w0" {
            continue;
        }
        let addresses = link["addr_info"].take();
        flatten(lines, &format!("{prefix} link {name}"), "", &link);
        for address in addresses.as_array().unwrap() {
            // The kernel gives itself addresses of link scope in its own time.
            let local = address["local"].as_str().unwrap();
            if ours_to_make(local) {
                let id = format!("{prefix} addr {name} {local}/{}", address["prefixlen"]);
                flatten(lines, &id, "", address);
            }
        }
        for family in ["ipv4", "ipv6"] {
            for kind in ["conf", "neigh"] {
                observe_sysctls(
                    lines,
                    &format!("{prefix} sysctl {family}/{kind}"),
                    &format!("{family}/{kind}/{name}"),
                );
            }
        }
    }
    for route in json_of("ip -d -j route show table all; ")
        .as_array()
        .unwrap()
        .iter()
        .chain(json_of("ip -d -6 -j route show table all").as_array().unwrap())
    {
        let text = |key: &str| route[key].as_str().unwrap_or("main").to_owned();
        let (dst, dev) = (text("dst"), text("dev"));
        if ours_to_make(&dst) && dev != "w0" {
            flatten(lines, &format!("{prefix} route {} {dst} dev {dev}", text("table")), "", route);
        }
    }
    for neighbour in json_of("ip -j neigh show nud permanent").as_array().unwrap() {
        flatten(lines, &format!("{prefix} neigh {}", neighbour["dst"]), "", neighbour);
    }
    for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/default/forwarding"] {
        lines.insert(format!(
            "{prefix} sysctl {key}={}",
            fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap().trim()
        ));
    }
}

fn observe_sysctls(lines: &mut BTreeSet<String>, prefix: &str, folder: &str) {
    let Ok(files) = fs::read_dir(format!("/proc/sys/net/{folder}")) else { return };
    for file in files {
        let file = file.unwrap();
        // Some can only be written, one is a secret that differs each time.
        let Ok(value) = fs::read_to_string(file.path()) else { continue };
        let interface = folder.rsplit('/').next().unwrap();
        let key = file.file_name().into_string().unwrap();
        lines.insert(format!("{prefix} {interface} {key}={}", value.trim()));
    }
}

/// Whom the first pod reaches, and as whom it is seen.
fn reach(lines: &mut BTreeSet<String>, results: &BTreeMap<&str, Value>) {
    let Some(second) = results.get("b") else { return };
    let _servers = (Server::tcp("b", 80), Server::tcp("world", 80));
    let address = second["ips"][0]["address"].as_str().or(second["ip4"]["ip"].as_str());
    let Some(address) = address.and_then(|a| a.split('/').next()) else { return };
    let to_pod = if address.contains(':') { format!("[{address}]:80") } else { format!("{address}:80") };
    lines.insert(format!("with pods | reach b: seen as {:?}", ask_tcp("a", &to_pod)));
    lines.insert(format!("with pods | reach world: seen as {:?}", ask_tcp("a", "192.0.2.2:80")));
}

/// The pods' links on the host, in the order in which they were made. Their names follow from chance or the
/// container; here they are called HOST1, HOST2.
fn host_ends() -> Vec<(String, String)> {
    let links = json_of("ip -d -j link show type veth");
    let mut ends: Vec<(u64, String)> = links
        .as_array()
        .unwrap()
        .iter()
        .map(|link| (link["ifindex"].as_u64().unwrap(), link["ifname"].as_str().unwrap().to_owned()))
        .filter(|(_, name)| name.starts_with("veth") || name.starts_with("plat"))
        .collect();
    ends.sort();
    (1..).zip(ends).map(|(number, (_, name))| (name, format!("HOST{number}"))).collect()
}

/// Puts the same words where names and hardware addresses stand.
fn normalise(lines: BTreeSet<String>, host_ends: &[(String, String)]) -> BTreeSet<String> {
    let ranges = ["10.22.0.", "10.23.0.", "10.33.0.", "fd22::"];
    let derived: BTreeSet<String> = (1..=254)
        .flat_map(|n| ranges.map(|r| if r.contains(':') { format!("{r}{n:x}") } else { format!("{r}{n}") }))
        .flat_map(|a| [End::Pod, End::Host, End::Bridge].map(|end| Mac::for_address(a.parse().unwrap(), end)))
        .map(|mac| mac.to_string())
        .collect();
    let mac = |value: &str| match value.parse::<Mac>() {
        Ok(_) if value == "ff:ff:ff:ff:ff:ff" || value == "00:00:00:00:00:00" || value == ASKED_MAC => {
            value.to_owned()
        }
        Ok(_) if derived.contains(value) => "from an address".to_owned(),
        Ok(_) => "any".to_owned(),
        Err(_) => value.to_owned(),
    };
    let line = |line: String| {
        let line = host_ends.iter().fold(line, |line, (name, word)| line.replace(name, word));
        match line.rsplit_once('=') {
            Some((key, value)) => format!("{key}={}", mac(value)),
            None => line,
        }
    };
    lines.into_iter().map(line).collect()
}

/// Pairs take turns: the reference plugins give the kernel five seconds to make sure of an IPv6 address, and it does
/// that for all namespaces one after the other.
static TURN: Mutex<()> = Mutex::new(());

/// Runs all cases, several at a time, and returns what was not meant.
fn compare(pair: &Pair) -> Vec<String> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let cases = &pair.cases;
    let differences: Vec<&Difference> = COMMON.iter().chain(pair.differences).collect();
    let (next, seen) =
        (AtomicUsize::new(0), Mutex::new((BTreeSet::new(), BTreeMap::<String, Vec<&str>>::new())));
    let worker = || {
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            // A thread each, as a thread has one laboratory.
            let of = |who| std::thread::scope(|scope| scope.spawn(|| run(pair, who, case)).join());
            let (Ok(reference), Ok(ours)) = (of(Reference), of(Ours)) else { panic!("case {}", case.name) };
            let alone = reference.difference(&ours).map(|line| (Reference, line));
            for (who, line) in alone.chain(ours.difference(&reference).map(|line| (Ours, line))) {
                let (used, unmeant) = &mut *seen.lock().unwrap();
                match differences.iter().find(|d| d.lines.iter().any(|only| only.covers(case, who, line))) {
                    Some(difference) => drop(used.insert(difference.name)),
                    None => unmeant.entry(format!("{who:?} alone: {line}")).or_default().push(case.name),
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(worker);
        }
    });
    let (used, unmeant) = seen.into_inner().unwrap();
    let unused = differences.iter().filter(|d| !used.contains(d.name));
    let unused = unused.map(|d| format!("the difference {:?} does not occur any more", d.name));
    let unmeant = unmeant.into_iter().map(|(line, cases)| format!("{line} ({})", cases.join(", ")));
    unmeant.chain(unused).collect()
}

impl Only {
    fn covers(&self, case: &Case, who: Who, line: &str) -> bool {
        self.who == who
            && (self.cases.is_empty() || self.cases.contains(&case.name))
            && self.words.iter().all(|words| line.contains(words))
    }
}

#[test]
fn ours_does_what_bridge_and_host_local_do_but_for_what_is_listed() {
    let cases = bridge_cases();
    let unmeant = compare(&Pair { reference: "bridge", ours: json!({}), differences: BRIDGE, cases });
    assert!(unmeant.is_empty(), "{} lines:\n{}", unmeant.len(), unmeant.join("\n"));
}

#[test]
fn ours_routed_does_what_ptp_and_host_local_do_but_for_what_is_listed() {
    let (ours, cases) = (json!({"datapath": "routed"}), routed_cases());
    let unmeant = compare(&Pair { reference: "ptp", ours, differences: ROUTED, cases });
    assert!(unmeant.is_empty(), "{} lines:\n{}", unmeant.len(), unmeant.join("\n"));
}

#[test]
fn each_difference_is_explained_in_the_documentation() {
    let document = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cni.md")).unwrap();
    let section = document.split("## Different from the reference").nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    for difference in COMMON.iter().chain(BRIDGE).chain(ROUTED) {
        assert!(section.contains(&format!("| {} |", difference.name)), "no row for {:?}", difference.name);
    }
}
