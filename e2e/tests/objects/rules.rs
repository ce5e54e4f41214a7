//! Every CEL rule: accepted, and refused with its own message; immutable fields; defaults.

use std::collections::BTreeSet;

use plat_e2e::light::ControlPlane;
use serde_json::{Value, json};

use crate::Really::DryRun;
use crate::{cluster_cidr, crds, create, ensure, node_network, patch, pod_cidr, routing_policy};

/// A spec of a PodCIDR with the name that belongs to it.
fn block(cidr: &str, extra: Value) -> Value {
    let mut spec = json!({"cidr": cidr, "clusterCIDR": "default-v4", "nodeName": "n1"});
    spec.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    pod_cidr(&cidr.replace(['.', ':', '/'], "-"), spec)
}

fn range(spec: Value) -> Value {
    cluster_cidr("range", spec)
}

/// What the API server accepts.
fn accepted() -> Vec<Value> {
    vec![
        range(json!({"cidr": "10.244.0.0/16"})),
        range(json!({"cidr": "10.0.0.0/8"})),
        range(json!({"cidr": "10.244.0.0/24"})),
        range(json!({"cidr": "10.244.0.0/30", "blockPrefixLength": 30})),
        range(json!({"cidr": "fd00:10:244::/48"})),
        range(json!({"cidr": "fd00:10:244::/124", "blockPrefixLength": 124})),
        range(json!({"cidr": "fd00::/24", "blockPrefixLength": 48})),
        range(json!({"cidr": "fd00:10:200::/40", "blockPrefixLength": 64})),
        range(json!({"cidr": "10.244.0.0/16", "blockPrefixLength": 16})),
        range(json!({"cidr": "10.244.0.0/26", "blockSizing": "MaxPods"})),
        range(json!({"cidr": "10.244.0.0/16", "blockSizing": "MaxPods", "blockPrefixLength": 24})),
        range(json!({"cidr": "10.244.0.0/16", "reserved": ["10.244.0.0/24", "10.244.255.0/28"]})),
        range(json!({"cidr": "10.244.0.0/16", "topologyKey": "topology.kubernetes.io/zone"})),
        range(json!({"cidr": "10.244.0.0/16", "topologyKey": "rack"})),
        range(json!({"cidr": "10.244.0.0/16", "topologyKey": "example.com/Rack_1.x"})),
        range(json!({"cidr": "10.244.0.0/16", "blocksPerNode": {"min": 2}})),
        range(json!({"cidr": "10.244.0.0/16", "blocksPerNode": {"max": 1}})),
        range(json!({"cidr": "10.244.0.0/16", "blocksPerNode": {"min": 16, "max": 16}})),
        range(
            json!({"cidr": "10.244.0.0/16", "masquerade": {"mode": "Disabled", "exclude": ["192.168.0.0/16", "fd00::/8"]}}),
        ),
        range(
            json!({"cidr": "10.244.0.0/16", "allocation": "Draining", "priority": -1_000_000, "quarantineSeconds": 60}),
        ),
        range(json!({"cidr": "10.244.0.0/16", "nodeSelector": {"matchLabels": {"zone": "a"},
            "matchExpressions": [{"key": "x", "operator": "NotIn", "values": ["y"]}]}})),
        range(
            json!({"cidr": "10.244.0.0/16", "routing": {"mode": "Direct", "nextHop": "172.30.0.1", "metric": 65534, "mtu": 576}}),
        ),
        cluster_cidr(&"n".repeat(63), json!({"cidr": "10.244.0.0/16"})),
        block("10.244.3.0/24", json!({})),
        block("fd00:10:244:3::/64", json!({"clusterCIDR": "default-v6"})),
        block(
            "10.244.3.0/24",
            json!({"nodeAddresses": ["172.30.0.11", "fd00:30::11"], "nodeUID": "u", "state": "Quarantined",
            "releaseAfter": "2026-11-24T05:00:00Z"}),
        ),
        block("10.244.3.0/24", json!({"routing": {"mode": "None"}})),
        block(
            "10.244.3.0/24",
            json!({"routing": {"mode": "Auto", "nextHop": "fd00::1", "metric": 1, "mtu": 65535}}),
        ),
        routing_policy("everything", json!({})),
        routing_policy(
            "storage-to-b",
            json!({
                "priority": 10, "mode": "Plan",
                "sources": {"matchLabels": {"role": "storage"}},
                "destinations": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b"]}]},
                "rollout": {"canary": {"matchLabels": {"canary": ""}}},
                "routing": {
                    "mode": "Direct", "interface": "eth1", "metric": 50, "table": 100, "mtu": 9000, "advmss": 8960,
                    "nextHops": [{"address": "172.30.0.1", "weight": 3}, {"address": "172.30.0.2"}],
                    "sourceAddress": "172.30.0.11", "onLink": true, "egressAddress": "fd00:30::9",
                    "masquerade": {"include": ["192.168.7.0/24"], "exclude": ["192.168.0.0/16", "fd00::/8"]},
                },
            }),
        ),
        node_network("n1"),
    ]
}

/// What it refuses, and with which words.
fn refused() -> Vec<(Value, &'static str)> {
    let canonical = "must be a CIDR without host bits, in canonical (RFC 5952) form";
    let name = "the name must be the CIDR with '.', ':' and '/' replaced by '-': it is the lock on the block";
    let sizes = "the range must be /8 to /30 (IPv4) or /24 to /124 (IPv6)";
    let default_block = "the range is smaller than the default block (/24, /64): set blockPrefixLength";
    let count = "blocks must not be larger than the range, nor may it hold more than 2^24 of them";
    let block_sizes = "blocks must be /16 to /30 (IPv4) or /48 to /124 (IPv6)";
    let reserved = "each reserved range must be a CIDR inside the range";
    let exclude = "each must be a CIDR without host bits, such as 192.168.0.0/16";
    let blocks = "max must not be less than min; when it is not set, it is 8";
    let label_key = "must be a label key such as topology.kubernetes.io/zone";
    let next_hop = "must be an IP address in canonical form, such as 172.30.0.1 or fd00::1";
    let none = "mode None makes no route: leave out all fields that shape one";
    let tunnel = "mode VXLAN tunnels to the node: leave out nextHop, nextHops, interface and onLink";
    let one_or_several = "set nextHop for one router, or nextHops for several, not both";
    let hops = json!([{"address": "172.30.0.1"}, {"address": "172.30.0.2"}]);
    let tables = "tables 253 and 255 are the kernel's";
    let link = "must be the name of a link, such as eth1";
    let policy = |routing: Value| routing_policy("policy", json!({"routing": routing}));
    vec![
        (range(json!({})), "spec.cidr: Required value"),
        (range(json!({"cidr": "10.244.0.1/16"})), canonical),
        (range(json!({"cidr": "10.244.0.0"})), canonical),
        (range(json!({"cidr": ""})), canonical),
        (range(json!({"cidr": "10.244.0.0/33"})), canonical),
        (range(json!({"cidr": "pods"})), canonical),
        (range(json!({"cidr": "FD00:10:244::/48"})), canonical),
        (range(json!({"cidr": "fd00:10:0244::/48"})), canonical),
        (range(json!({"cidr": "::ffff:10.244.0.0/112"})), canonical),
        (range(json!({"cidr": "::/16"})), "a range that starts with '::' cannot be named; use another"),
        (range(json!({"cidr": "8.0.0.0/7"})), sizes),
        (range(json!({"cidr": "10.244.0.0/31", "blockPrefixLength": 30})), sizes),
        (range(json!({"cidr": "fc00::/23", "blockPrefixLength": 48})), sizes),
        (range(json!({"cidr": "fd00::/125", "blockPrefixLength": 124})), sizes),
        (range(json!({"cidr": "10.244.0.0/25"})), default_block),
        (range(json!({"cidr": "fd00:10:244::/65"})), default_block),
        (range(json!({"cidr": "10.244.0.0/25", "blockSizing": "Default"})), default_block),
        (
            range(json!({"cidr": "10.244.0.0/16", "blockSizing": "Large"})),
            "spec.blockSizing: Unsupported value",
        ),
        (range(json!({"cidr": "10.244.0.0/24", "blockPrefixLength": 23})), count),
        (range(json!({"cidr": "fd00::/24", "blockPrefixLength": 64})), count),
        (range(json!({"cidr": "10.0.0.0/8", "blockPrefixLength": 15})), block_sizes),
        (range(json!({"cidr": "10.244.0.0/16", "blockPrefixLength": 31})), block_sizes),
        (range(json!({"cidr": "fd00::/40", "blockPrefixLength": 47})), block_sizes),
        (range(json!({"cidr": "fd00::/120", "blockPrefixLength": 125})), block_sizes),
        (range(json!({"cidr": "10.244.0.0/16", "blocksPerNode": {"min": 2, "max": 1}})), blocks),
        (range(json!({"cidr": "10.244.0.0/16", "blocksPerNode": {"min": 9}})), blocks),
        (
            range(json!({"cidr": "10.244.0.0/16", "blocksPerNode": {"min": 0}})),
            "should be greater than or equal to 1",
        ),
        (
            range(json!({"cidr": "10.244.0.0/16", "blocksPerNode": {"max": 17}})),
            "should be less than or equal to 16",
        ),
        (range(json!({"cidr": "10.244.0.0/16", "reserved": ["10.245.0.0/24"]})), reserved),
        (range(json!({"cidr": "10.244.0.0/16", "reserved": ["10.0.0.0/8"]})), reserved),
        (range(json!({"cidr": "10.244.0.0/16", "reserved": ["10.244.1.1"]})), reserved),
        (range(json!({"cidr": "10.244.0.0/16", "topologyKey": "zone/"})), label_key),
        (range(json!({"cidr": "10.244.0.0/16", "topologyKey": "/zone"})), label_key),
        (range(json!({"cidr": "10.244.0.0/16", "topologyKey": "a/b/c"})), label_key),
        (range(json!({"cidr": "10.244.0.0/16", "topologyKey": "UPPER.example/zone"})), label_key),
        (range(json!({"cidr": "10.244.0.0/16", "topologyKey": "zone-"})), label_key),
        (range(json!({"cidr": "10.244.0.0/16", "topologyKey": "two words"})), label_key),
        (range(json!({"cidr": "10.244.0.0/16", "topologyKey": "zone\n"})), label_key),
        (range(json!({"cidr": "10.244.0.0/16", "topologyKey": "x".repeat(64)})), label_key),
        (range(json!({"cidr": "10.244.0.0/16", "masquerade": {"exclude": ["192.168.1.1/16"]}})), exclude),
        (range(json!({"cidr": "10.244.0.0/16", "masquerade": {"exclude": ["example.com"]}})), exclude),
        (range(json!({"cidr": "10.244.0.0/16", "routing": {"nextHop": "router"}})), next_hop),
        (range(json!({"cidr": "10.244.0.0/16", "routing": {"nextHop": "fd00:0::1"}})), next_hop),
        (range(json!({"cidr": "10.244.0.0/16", "routing": {"mode": "None", "mtu": 1400}})), none),
        (
            cluster_cidr(&"n".repeat(64), json!({"cidr": "10.244.0.0/16"})),
            "the name must not be longer than 63 characters: it becomes a label value",
        ),
        (pod_cidr("10-244-3-0-24", json!({})), "spec.cidr: Required value"),
        (
            pod_cidr("10-244-3-0-24", json!({"cidr": "10.244.3.0/24", "clusterCIDR": "c"})),
            "spec.nodeName: Required value",
        ),
        (
            pod_cidr("10-244-3-0-24", json!({"cidr": "10.244.3.0/24", "nodeName": "n1"})),
            "spec.clusterCIDR: Required value",
        ),
        (pod_cidr("n1", block("10.244.3.0/24", json!({}))["spec"].clone()), name),
        (pod_cidr("10-244-3-0-25", block("10.244.3.0/24", json!({}))["spec"].clone()), name),
        (pod_cidr("10-244-3-7-24", block("10.244.3.7/24", json!({}))["spec"].clone()), canonical),
        // Other texts for one block would be other names, and so other locks.
        (pod_cidr("fd00-10-244-03---64", block("fd00:10:244:03::/64", json!({}))["spec"].clone()), canonical),
        (
            pod_cidr(
                "fd00-10-244-3-0-0-0-0-64",
                block("fd00:10:244:3:0:0:0:0/64", json!({}))["spec"].clone(),
            ),
            canonical,
        ),
        (block("10.244.3.0/24", json!({"nodeAddresses": ["n1.example.com"]})), "each must be an IP address"),
        (block("10.244.3.0/24", json!({"routing": {"nextHop": "172.30.0.1/24"}})), next_hop),
        (block("10.244.3.0/24", json!({"routing": {"mode": "None", "metric": 5}})), none),
        (policy(json!({"mode": "None", "nextHops": hops})), none),
        (policy(json!({"mode": "None", "onLink": true})), none),
        (policy(json!({"mode": "VXLAN", "interface": "eth1"})), tunnel),
        (policy(json!({"mode": "VXLAN", "nextHops": hops})), tunnel),
        (policy(json!({"nextHop": "172.30.0.1", "nextHops": hops})), one_or_several),
        (policy(json!({"nextHops": [{"address": "172.30.0.1"}]})), "should have at least 2 items"),
        (policy(json!({"nextHops": [{"address": "172.30.0.1"}, {"address": "router"}]})), next_hop),
        (policy(json!({"table": 255})), tables),
        (policy(json!({"interface": "eth0:1"})), link),
        (policy(json!({"interface": ".."})), link),
        (policy(json!({"sourceAddress": "FD00::1"})), next_hop),
        (policy(json!({"egressAddress": "10.0.0.1/32"})), next_hop),
        (policy(json!({"masquerade": {"include": ["10.0.0.1/8"]}})), exclude),
        (policy(json!({"masquerade": {"exclude": ["world"]}})), exclude),
        (
            routing_policy("policy", json!({"rollout": {"canary": {}, "observeSeconds": 9}})),
            "should be greater than or equal to 10",
        ),
        (routing_policy("policy", json!({"rollout": {}})), "spec.rollout.canary: Required value"),
        (block("10.244.3.0/24", json!({"routing": {"mode": "None", "nextHop": "172.30.0.1"}})), none),
        // No RFC 1123 name begins with '-'.
        (pod_cidr("---64", block("::/64", json!({}))["spec"].clone()), "a lowercase RFC 1123 subdomain"),
    ]
}

/// Objects, changes to them, and the words of the refusal; `None` for a change that is accepted.
fn changes() -> Vec<(Value, Value, Option<&'static str>)> {
    let range = cluster_cidr("changed", json!({"cidr": "10.244.0.0/16"}));
    let sized = cluster_cidr("changed-sized", json!({"cidr": "10.244.0.0/16", "blockPrefixLength": 24}));
    let block = block("10.244.9.0/24", json!({"nodeUID": "u1"}));
    let spec = |value: Value| json!({ "spec": value });
    let set_once = "blockPrefixLength is set once: add another ClusterCIDR for blocks of another size";
    vec![
        (
            range.clone(),
            spec(json!({"cidr": "10.245.0.0/16"})),
            Some("the range cannot be changed: add another ClusterCIDR"),
        ),
        (range.clone(), spec(json!({"blockSizing": "MaxPods"})), None),
        (range.clone(), spec(json!({"blockPrefixLength": 26})), None),
        (
            range,
            spec(
                json!({"priority": 7, "allocation": "Draining", "quarantineSeconds": 60, "routing": {"mtu": 1400},
            "reserved": ["10.244.0.0/24"], "masquerade": {"mode": "Disabled"}, "nodeSelector": {"matchLabels": {"a": "b"}}}),
            ),
            None,
        ),
        (sized.clone(), spec(json!({"blockPrefixLength": 25})), Some(set_once)),
        (sized.clone(), spec(json!({"blockPrefixLength": null})), Some(set_once)),
        (
            sized,
            spec(json!({"blockSizing": "MaxPods"})),
            Some(
                "blockSizing says how an unset blockPrefixLength is filled in, and that is set: add another ClusterCIDR",
            ),
        ),
        (block.clone(), spec(json!({"cidr": "10.244.10.0/24"})), Some("a block's CIDR cannot be changed")),
        (block.clone(), spec(json!({"clusterCIDR": "other"})), Some("a block stays in its ClusterCIDR")),
        (
            block.clone(),
            spec(json!({"nodeName": "n2"})),
            Some("a block does not move between nodes: the operator deletes it and carves another"),
        ),
        (
            block,
            spec(
                json!({"nodeUID": "u2", "state": "Draining", "nodeAddresses": ["172.30.0.12"], "routing": {"metric": 9}}),
            ),
            None,
        ),
    ]
}

#[test]
fn what_should_be_accepted_is() {
    let plane = ControlPlane::shared();
    for object in accepted() {
        create(plane, &object, DryRun).unwrap_or_else(|e| panic!("{object} was refused: {e}"));
    }
}

#[test]
fn what_should_be_refused_is_with_the_words_of_its_rule() {
    let plane = ControlPlane::shared();
    for (object, words) in refused() {
        let error = create(plane, &object, DryRun).expect_err(&object.to_string());
        assert!(error.contains(words), "{object}: {error}");
    }
}

#[test]
fn fields_that_never_change_refuse_to_and_the_others_do() {
    let plane = ControlPlane::shared();
    for (object, change, words) in changes() {
        ensure(plane, &object);
        match (patch(plane, &object, change.clone(), DryRun), words) {
            (Ok(_), None) => {}
            (Err(error), Some(words)) => assert!(error.contains(words), "{change}: {error}"),
            (Ok(_), Some(words)) => panic!("{change} was accepted; wanted: {words}"),
            (Err(error), None) => panic!("{change} was refused: {error}"),
        }
    }
}

/// A rule that nobody tries is a rule that nobody knows to work.
#[test]
fn every_rule_of_the_schemas_is_tried() {
    let mut tried: Vec<_> = refused().into_iter().map(|(_, words)| words).collect();
    tried.extend(changes().into_iter().filter_map(|(_, _, words)| words));
    let mut untried = BTreeSet::new();
    let mut rules = 0;
    for crd in crds() {
        for_each_rule(&crd, &mut |message| {
            rules += 1;
            if !tried.contains(&message) {
                untried.insert(message.to_owned());
            }
        });
    }
    assert!(rules >= 18, "only {rules} rules were found: does the walk still work?");
    assert!(untried.is_empty(), "add what these refuse to the tables above: {untried:#?}");
}

fn for_each_rule(value: &Value, seen: &mut dyn FnMut(&str)) {
    match value {
        Value::Object(map) => {
            for rule in map.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten() {
                seen(rule["message"].as_str().expect("a rule has a message of its own"));
            }
            map.values().for_each(|v| for_each_rule(v, seen));
        }
        Value::Array(list) => list.iter().for_each(|v| for_each_rule(v, seen)),
        _ => {}
    }
}

#[test]
fn defaults_are_filled_in() {
    let plane = ControlPlane::shared();
    let range = create(plane, &range(json!({"cidr": "10.244.0.0/16", "masquerade": {}})), DryRun).unwrap();
    assert_eq!(
        range.data["spec"],
        json!({"cidr": "10.244.0.0/16", "allocation": "Enabled", "blockSizing": "Default", "blocksPerNode": {"min": 1, "max": 8}, "priority": 0, "quarantineSeconds": 900,
            "masquerade": {"mode": "Enabled"}})
    );
    let block = create(plane, &block("10.244.3.0/24", json!({"routing": {}})), DryRun).unwrap();
    assert_eq!(
        block.data["spec"],
        json!({"cidr": "10.244.3.0/24", "clusterCIDR": "default-v4", "nodeName": "n1", "state": "Active", "routing": {}})
    );
}

#[test]
fn a_misspelt_field_is_refused_by_kubectl() {
    let plane = ControlPlane::shared();
    let error =
        plane.apply(&block("10.244.3.0/24", json!({"routng": {}})).to_string()).unwrap_err().to_string();
    assert!(error.contains("routng"), "{error}");
}
