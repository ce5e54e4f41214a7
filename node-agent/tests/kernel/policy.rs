//! Every routing field, patched on and off, as `ip -j` shows it; and what becomes of policies that cannot work.

use plat_agent::facts::{BlockFact, PolicyFact};
use plat_agent::objects::Change;
use plat_crds::routing_policy::Phase;
use plat_crds::selector::Labels;
use serde_json::{Value, json};

use crate::harness::*;

const V4: &str = "10.244.2.0/24";
const V6: &str = "fd00:10:244:2::/64";

/// A node with a second link, and blocks of another node in both families.
fn node() -> TestNode {
    let mut node = TestNode::new();
    run("ip link add eth1 type veth peer name wire1");
    run("ip addr add 172.31.0.11/24 dev eth1");
    run("ip addr add fd00:31::b/64 dev eth1 nodad");
    run("ip link set wire1 up");
    run("ip link set eth1 up mtu 1450");
    eventually("carrier", || {
        let links = run("ip -o link show up");
        if links.matches("state UP").count() == 4 { Ok(()) } else { Err(links) }
    });
    node.start();
    node.contact();
    node.list(vec![block(1), block(2), block_v6(2)], vec![range("default-v4"), range("default-v6")]);
    node.expect_condition("RoutesReady", "True", "AllInstalled");
    node
}

/// The one route to a block, without what all routes have.
fn shown(prefix: &str) -> Value {
    let family = if prefix == V4 { "-4" } else { "-6" };
    let mut routes = json(&format!("ip -j {family} route show table all proto 112 {prefix}"));
    let routes = routes.as_array_mut().unwrap();
    if routes.len() != 1 {
        return json!(routes);
    }
    let route = routes[0].as_object_mut().unwrap();
    for name in ["dst", "protocol", "pref", "scope"] {
        route.remove(name);
    }
    route.retain(|name, value| name != "flags" || *value != json!([]));
    if let Some(hops) = route.get_mut("nexthops") {
        let hops = hops.as_array_mut().unwrap();
        hops.iter_mut().for_each(|hop| drop(hop.as_object_mut().unwrap().remove("flags")));
        hops.sort_by_key(ToString::to_string);
    }
    json!(route)
}

fn expect(prefix: &str, want: &Value) {
    eventually(prefix, || {
        let got = shown(prefix);
        if got == *want { Ok(()) } else { Err(format!("got {got}, want {want}")) }
    });
}

fn plain(prefix: &str) -> Value {
    let gateway = if prefix == V4 { "172.30.0.12" } else { "fd00:30::c" };
    json!({"gateway": gateway, "dev": "eth0", "metric": 1120})
}

fn of(prefix: &str) -> BlockFact {
    if prefix == V4 { block(2) } else { block_v6(2) }
}

fn rules(family: &str) -> Vec<Value> {
    let rules = json(&format!("ip -j {family} rule show"));
    let ours = rules.as_array().unwrap().iter().filter(|rule| rule["protocol"] == "112");
    ours.map(|rule| json!([rule["priority"], rule["src"], rule["table"]])).collect()
}

fn expect_rules(family: &str, want: &[Value]) {
    eventually("rules", || {
        let got = rules(family);
        if got == want { Ok(()) } else { Err(format!("{got:?}")) }
    });
}

#[test]
fn each_field_is_in_the_kernel_while_a_policy_sets_it() {
    isolated("policy::each_field_is_in_the_kernel_while_a_policy_sets_it", || {
        let mut node = node();
        for (prefix, routing, want) in [
            (
                V4,
                json!({"nextHops": [{"address": "172.30.0.1", "weight": 3}, {"address": "172.31.0.1"}]}),
                json!({"metric": 1120, "nexthops": [
                    {"dev": "eth0", "gateway": "172.30.0.1", "weight": 3},
                    {"dev": "eth1", "gateway": "172.31.0.1", "weight": 1},
                ]}),
            ),
            (
                V6,
                json!({"nextHops": [{"address": "fd00:30::1", "weight": 256}, {"address": "fd00:31::1"}]}),
                json!({"metric": 1120, "nexthops": [
                    {"dev": "eth0", "gateway": "fd00:30::1", "weight": 256},
                    {"dev": "eth1", "gateway": "fd00:31::1", "weight": 1},
                ]}),
            ),
            (V4, json!({"interface": "eth0"}), plain(V4)),
            (
                V4,
                json!({"interface": "eth1", "nextHop": "172.31.0.7"}),
                json!({"gateway": "172.31.0.7", "dev": "eth1", "metric": 1120}),
            ),
            (
                V6,
                json!({"interface": "eth1", "nextHop": "fd00:31::7", "metric": 50}),
                json!({"gateway": "fd00:31::7", "dev": "eth1", "metric": 50}),
            ),
            (
                V4,
                json!({"interface": "eth1", "onLink": true}),
                json!({"gateway": "172.30.0.12", "dev": "eth1", "metric": 1120, "flags": ["onlink"]}),
            ),
            (
                V6,
                json!({"interface": "eth1", "nextHop": "fd77::1", "onLink": true}),
                json!({"gateway": "fd77::1", "dev": "eth1", "metric": 1120, "flags": ["onlink"]}),
            ),
            (
                V4,
                json!({"mtu": 1400, "advmss": 1300, "initcwnd": 20, "sourceAddress": "172.31.0.11"}),
                json!({"gateway": "172.30.0.12", "dev": "eth0", "metric": 1120, "prefsrc": "172.31.0.11",
                    "metrics": [{"mtu": 1400, "advmss": 1300, "initcwnd": 20}]}),
            ),
            (
                V6,
                json!({"mtu": 1400, "advmss": 1300, "sourceAddress": "fd00:31::b"}),
                json!({"gateway": "fd00:30::c", "dev": "eth0", "metric": 1120, "prefsrc": "fd00:31::b",
                    "metrics": [{"mtu": 1400, "advmss": 1300}]}),
            ),
        ] {
            node.apply(with_routing(of(prefix), &routing.to_string()));
            expect(prefix, &want);
            node.settled();
            let report = node.report();
            node.apply(of(prefix));
            expect(prefix, &plain(prefix));
            node.expect_condition("RoutesReady", "True", "AllInstalled");
            let repaired = report.status.routes.unwrap().repaired;
            assert_eq!(repaired, 0, "{routing}: what was set reads back as it was meant");
        }
    });
}

#[test]
fn a_table_has_its_rule_which_is_put_back_and_goes_with_the_last_route() {
    isolated("policy::a_table_has_its_rule_which_is_put_back_and_goes_with_the_last_route", || {
        let mut node = node();
        for (family, prefix) in [("-4", V4), ("-6", V6)] {
            node.apply(with_routing(of(prefix), r#"{"table":1000,"metric":9}"#));
            let mut want = plain(prefix);
            want["metric"] = json!(9);
            want["table"] = json!("1000");
            expect(prefix, &want);
            let rule = json!([1120, "all", "1000"]);
            expect_rules(family, std::slice::from_ref(&rule));
            run(&format!("ip {family} rule del priority 1120"));
            expect_rules(family, std::slice::from_ref(&rule));
            // A stranger of our number, as a newer version might leave.
            run(&format!("ip {family} rule add iif eth1 lookup 1000 priority 1120 protocol 112"));
            expect_rules(family, std::slice::from_ref(&rule));
            node.expect_incident("RouteRestored", 1);
            node.stop();
            run(&format!("ip {family} rule add lookup 77 priority 1120 protocol 112"));
            node.start();
            node.contact();
            let known = vec![block(1), with_routing(of(prefix), r#"{"table":1000,"metric":9}"#)];
            node.list(known, vec![range("default-v4"), range("default-v6")]);
            expect_rules(family, std::slice::from_ref(&rule));
            node.list(vec![block(1), block(2), block_v6(2)], vec![range("default-v4"), range("default-v6")]);
            expect(prefix, &plain(prefix));
            expect_rules(family, &[]);
        }
    });
}

#[test]
fn packets_take_the_table_and_leave_by_the_link_that_the_policy_names() {
    isolated("policy::packets_take_the_table_and_leave_by_the_link_that_the_policy_names", || {
        let mut node = node();
        node.apply(with_routing(
            block(2),
            r#"{"table":1000,"interface":"eth1","nextHop":"172.31.0.7","sourceAddress":"172.30.0.11"}"#,
        ));
        eventually("the way", || {
            let way = json("ip -j route get 10.244.2.9");
            let taken = (&way[0]["gateway"], &way[0]["dev"], &way[0]["prefsrc"]);
            if taken == (&json!("172.31.0.7"), &json!("eth1"), &json!("172.30.0.11")) {
                Ok(())
            } else {
                Err(way.to_string())
            }
        });
        // What is no block of others looks on.
        assert_eq!(json("ip -j route get 10.9.9.9")[0]["gateway"], "172.30.0.1");
    });
}

#[test]
fn what_cannot_work_is_refused_for_the_block_and_the_last_working_route_stays() {
    isolated("policy::what_cannot_work_is_refused_for_the_block_and_the_last_working_route_stays", || {
        let mut node = node();
        run("ip route add 10.77.0.0/16 via 172.30.0.1 table 900");
        run("ip rule add from 10.78.0.0/16 lookup 901");
        run("ip link add eth9 type veth peer name wire9");
        for (routing, reason, words) in [
            (
                json!({"nextHops": [{"address": "172.30.0.1"}, {"address": "10.9.9.9"}]}),
                "NotOnLink",
                "10.9.9.9",
            ),
            (json!({"interface": "eth1"}), "NotOnLink", "not on the link eth1"),
            (json!({"interface": "nowhere"}), "NoInterface", "interface nowhere"),
            (json!({"interface": "eth9"}), "NoInterface", "is down"),
            (json!({"table": 900}), "TableInUse", "route 10.77.0.0/16"),
            (json!({"table": 901}), "TableInUse", "rule"),
            (json!({"mtu": 1501}), "UnusablePolicy", "above the 1500 of link eth0"),
            (json!({"sourceAddress": "172.30.0.99"}), "NotLocal", "sourceAddress 172.30.0.99"),
            (json!({"egressGatewayFrom2030": 1, "mode": "Teleport"}), "UnusablePolicy", "upgrade the agent"),
        ] {
            node.apply(with_routing(block(2), &routing.to_string()));
            let message = node.expect_condition("RoutesReady", "False", reason);
            assert!(message.contains(words) && message.contains("10-244-2-0-24"), "{message}");
            assert_eq!(shown(V4), plain(V4), "{routing}");
            assert_eq!(shown(V6), plain(V6), "{routing}");
            node.apply(block(2));
            node.expect_condition("RoutesReady", "True", "AllInstalled");
        }
        // What is not known is no reason to stop.
        node.apply(with_routing(block(2), r#"{"fieldOf2030":7,"metric":9}"#));
        expect(V4, &json!({"gateway": "172.30.0.12", "dev": "eth0", "metric": 9}));
    });
}

#[test]
fn a_route_in_a_table_stays_with_its_rule_when_its_policy_cannot_be_followed_any_more() {
    isolated(
        "policy::a_route_in_a_table_stays_with_its_rule_when_its_policy_cannot_be_followed_any_more",
        || {
            let mut node = node();
            node.apply(with_routing(block(2), r#"{"table":1000}"#));
            let mut want = plain(V4);
            want["table"] = json!("1000");
            expect(V4, &want);
            node.apply(with_routing(block(2), r#"{"table":1000,"interface":"nowhere"}"#));
            node.expect_condition("RoutesReady", "False", "NoInterface");
            expect(V4, &want);
            expect_rules("-4", &[json!([1120, "all", "1000"])]);
        },
    );
}

#[test]
fn a_link_without_neighbours_needs_no_next_hop_and_one_that_comes_late_is_taken_at_once() {
    isolated(
        "policy::a_link_without_neighbours_needs_no_next_hop_and_one_that_comes_late_is_taken_at_once",
        || {
            let mut node = node();
            node.apply(with_routing(block(2), r#"{"interface":"tun7"}"#));
            node.expect_condition("RoutesReady", "False", "NoInterface");
            run("ip tuntap add dev tun7 mode tun");
            run("ip link set tun7 up");
            eventually("the route", || {
                let shown = shown(V4);
                if shown["dev"] == "tun7" && shown["gateway"].is_null() {
                    Ok(())
                } else {
                    Err(shown.to_string())
                }
            });
            node.expect_condition("RoutesReady", "True", "AllInstalled");
        },
    );
}

/// What `plat-agent explain` prints on the node, and its exit code.
fn explain(node: &TestNode, subject: &str) -> (String, Option<i32>) {
    let (agent, run_dir) = (env!("CARGO_BIN_EXE_plat-agent"), node.settings.run_dir.display());
    let output = try_run(&format!("{agent} explain {subject} --run-dir {run_dir}"));
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (text, output.status.code())
}

#[test]
fn a_policy_for_labels_holds_where_it_selects_and_explain_says_so() {
    isolated("policy::a_policy_for_labels_holds_where_it_selects_and_explain_says_so", || {
        let mut node = node();
        let labelled = |block: BlockFact, zone: &str| {
            let labels = Labels::pack(Some(&[("zone".to_owned(), zone.to_owned())].into()));
            BlockFact { labels, ..block }
        };
        let policy = |zone: &str, routing: Value| PolicyFact {
            name: "storage".into(),
            uid: "uid-storage".into(),
            generation: 1,
            spec: serde_json::from_value(json!({
                "priority": 5,
                "sources": {"matchLabels": {"zone": zone}},
                "destinations": {"matchLabels": {"zone": "b"}},
                "routing": routing,
            }))
            .unwrap(),
            observed: Some(1),
            phase: Some(Phase::Complete),
            last_good: None,
        };
        let blocks = vec![labelled(block(1), "a"), labelled(block(2), "b"), labelled(block(3), "c")];
        node.list(blocks, vec![range("default-v4")]);
        node.objects.policies.apply(Change::Applied(Ok(policy(
            "a",
            json!({"interface": "eth1", "nextHop": "172.31.0.7", "table": 1000}),
        ))));
        node.push();
        expect(V4, &json!({"gateway": "172.31.0.7", "dev": "eth1", "metric": 1120, "table": "1000"}));
        let other = json("ip -j route show 10.244.3.0/24");
        assert_eq!(other[0]["gateway"], "172.30.0.13", "{other}");
        node.settled();
        let (text, code) = explain(&node, "10.244.2.9");
        assert_eq!(code, Some(0), "{text}");
        for line in [
            "policies storage (priority 5)",
            "interface      eth1                     RoutingPolicy 'storage'",
            "kernel   10.244.2.0/24 via 172.31.0.7 metric 1120 table 1000 on eth1",
            "packets  take the route to 10.244.2.0/24 of protocol 112",
        ] {
            assert!(text.contains(line), "{text}");
        }
        let (text, code) = explain(&node, "10.244.1.0/24");
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains("this node itself"), "{text}");
        let (text, code) = explain(&node, "10.99.0.1");
        assert_eq!((code, text.contains("none of Plat's")), (Some(1), true), "{text}");
        node.objects.policies.apply(Change::Applied(Ok(policy("a", json!({"mtu": 9000})))));
        node.push();
        node.expect_condition("RoutesReady", "False", "UnusablePolicy");
        node.settled();
        let (text, code) = explain(&node, "10.244.2.9");
        assert_eq!(code, Some(1), "{text}");
        assert!(
            text.contains("mtu 9000 of the RoutingPolicy 'storage' is above the 1500 of link eth0"),
            "{text}"
        );
        assert!(text.contains("kernel   10.244.2.0/24 via 172.31.0.7"), "the last working one stays: {text}");
        node.objects.policies.apply(Change::Deleted("storage".into()));
        node.push();
        expect(V4, &plain(V4));
        expect_rules("-4", &[]);
        node.objects.policies.apply(Change::Applied(Ok(policy("z", json!({"metric": 5})))));
        node.push();
        node.settled();
        assert_eq!(shown(V4), plain(V4), "it selects other nodes");
    });
}
