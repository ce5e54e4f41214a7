//! What kubectl shows: columns, explanations, short names, field selectors.

use std::fs;

use plat_e2e::light::{ControlPlane, KINDS};
use plat_e2e::testbed::repository;
use serde_json::json;

use crate::Really::Do;
use crate::{cluster_cidr, ensure, node_network, patch, pod_cidr, routing_policy};

/// Compares with a file of `tests/golden`; with `UPDATE_GOLDEN=1` writes it instead.
fn assert_golden(name: &str, text: &str) {
    let path = repository().join("e2e/tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == golden, "{} differs; UPDATE_GOLDEN=1 accepts this:\n{text}", path.display());
}

/// A table with its columns squeezed to one space, without the last column of the first row's AGE values.
fn table(plane: &ControlPlane, args: &[&str]) -> String {
    let text = plane.kubectl(&[&["get"], args].concat()).unwrap();
    let mut lines = String::new();
    for line in text.lines() {
        let words: Vec<_> = line.split_whitespace().map(|w| if is_age(w) { "<age>" } else { w }).collect();
        lines += &(words.join(" ") + "\n");
    }
    lines
}

fn is_age(word: &str) -> bool {
    word.ends_with(['s', 'm'])
        && word.trim_end_matches(['s', 'm']).chars().all(|c| c.is_ascii_digit() || c == 'm')
}

fn condition(type_: &str, status: &str, reason: &str) -> serde_json::Value {
    json!({"type": type_, "status": status, "reason": reason, "message": "", "lastTransitionTime": "2026-11-24T05:00:00Z",
        "observedGeneration": 1})
}

/// Objects of a cluster of one node, with everything filled in.
fn fill(plane: &ControlPlane) {
    let range = cluster_cidr("shown", json!({"cidr": "10.99.0.0/16", "blockPrefixLength": 24}));
    let block = pod_cidr(
        "10-99-3-0-24",
        json!({"cidr": "10.99.3.0/24", "clusterCIDR": "shown", "nodeName": "shown"}),
    );
    let gone = pod_cidr(
        "10-99-4-0-24",
        json!({"cidr": "10.99.4.0/24", "clusterCIDR": "shown", "nodeName": "gone", "state": "Quarantined"}),
    );
    let report = node_network("shown");
    for object in [&range, &block, &gone, &report] {
        ensure(plane, object);
    }
    patch(plane, &range, json!({"status": {"observedGeneration": 1, "cursor": 5,
        "blocks": {"total": 256, "allocated": 1, "quarantined": 1, "free": 254}, "forecast": {"growth": 30, "exhaustedAt": "2027-01-01T00:00:00Z"},
        "conditions": [condition("Ready", "True", "Carving")]}}), Do).unwrap();
    patch(plane, &block, json!({"status": {"used": 7, "capacity": 253, "routing": {"mode": "Direct", "via": "172.30.0.11", "metric": 1120},
        "conditions": [condition("Converged", "False", "NodesBehind"), condition("Ready", "True", "Programmed")]}}), Do).unwrap();
    let policy = routing_policy("shown", json!({"priority": 5}));
    ensure(plane, &policy);
    patch(plane, &policy, json!({"status": {"phase": "Rolling", "blocks": 40, "nodes": {"selected": 3, "applied": 2, "failed": 1},
        "conditions": [condition("Ready", "True", "Followed")]}}), Do).unwrap();
    patch(plane, &report, json!({"status": {"agentVersion": "0.1.0", "mtu": 1500, "cni": {"active": "05-plat.conflist"},
        "routes": {"desired": 3, "installed": 2, "repaired": 1}, "conditions": [condition("CNIReady", "True", "Installed"),
        condition("ForwardingBlocked", "False", "NoDrop"), condition("PeersReachable", "True", "Reachable"), condition("RoutesReady", "False", "Incomplete")]}}), Do).unwrap();
}

#[test]
fn tables_show_the_map_at_a_glance_and_more_when_wide() {
    let plane = ControlPlane::shared();
    fill(plane);
    let selected = ["--field-selector", "spec.clusterCIDR=shown"];
    assert_eq!(
        table(plane, &[&["podcidrs"], &selected[..]].concat()),
        "NAME NODE CIDR STATE USED CAPACITY READY AGE\n\
         10-99-3-0-24 shown 10.99.3.0/24 Active 7 253 True <age>\n\
         10-99-4-0-24 gone 10.99.4.0/24 Quarantined <age>\n"
    );
    assert_eq!(
        table(plane, &["pcidr", "10-99-3-0-24", "-o", "wide"]),
        "NAME NODE CIDR STATE USED CAPACITY READY AGE VIA MODE CONVERGED CLUSTERCIDR REASON MESSAGE\n\
         10-99-3-0-24 shown 10.99.3.0/24 Active 7 253 True <age> 172.30.0.11 Direct False shown Programmed\n"
    );
    assert_eq!(
        table(plane, &["ccidr", "shown", "-o", "wide"]),
        "NAME CIDR BLOCK ALLOCATED FREE READY AGE ALLOCATION QUARANTINED TOPOLOGY RUNSOUT REASON\n\
         shown 10.99.0.0/16 24 1 254 True <age> Enabled 1 2027-01-01T00:00:00Z Carving\n"
    );
    assert_eq!(
        table(plane, &["nn", "shown", "-o", "wide"]),
        "NAME ROUTES DESIRED REPAIRED CNI BLOCKED AGENT AGE MTU CONF PEERS REASON\n\
         shown 2 3 1 True False 0.1.0 <age> 1500 05-plat.conflist True Incomplete\n"
    );
    assert_eq!(
        table(plane, &["rpol", "shown", "-o", "wide"]),
        "NAME PRIORITY MODE PHASE NODES APPLIED READY AGE BLOCKS FAILED REASON\n\
         shown 5 Apply Rolling 3 2 True <age> 40 1 Followed\n"
    );
}

#[test]
fn blocks_are_selected_by_node_state_and_range() {
    let plane = ControlPlane::shared();
    fill(plane);
    for (selector, wanted) in [
        ("spec.nodeName=shown", "podcidr.plat.network/10-99-3-0-24\n"),
        ("spec.clusterCIDR=shown,spec.state=Quarantined", "podcidr.plat.network/10-99-4-0-24\n"),
        ("spec.clusterCIDR=shown,spec.state=Draining", ""),
    ] {
        assert_eq!(
            plane.kubectl(&["get", "podcidrs", "-o", "name", "--field-selector", selector]).unwrap(),
            wanted,
            "{selector}"
        );
    }
    let all = plane.kubectl(&["get", "plat", "-o", "name"]).unwrap();
    for kind in [
        "clustercidr.plat.network/shown",
        "podcidr.plat.network/10-99-3-0-24",
        "routingpolicy.plat.network/shown",
        "nodenetwork.plat.network/shown",
    ] {
        assert!(all.contains(kind), "{kind} is not in category plat: {all}");
    }
}

#[test]
fn explanations_read_well() {
    let plane = ControlPlane::shared();
    for field in ["podcidr.spec.routing", "clustercidr.spec"] {
        assert_golden(&format!("explain-{field}.txt"), &plane.kubectl(&["explain", field]).unwrap());
    }
}

#[test]
fn the_crds_are_accepted_without_a_warning() {
    let plane = ControlPlane::shared();
    let manifest = fs::read_to_string(repository().join("charts/plat/crd/crds.yaml")).unwrap();
    let said = plane.apply(&manifest).unwrap();
    for kind in KINDS {
        assert!(said.contains(&format!("{kind}.plat.network serverside-applied")), "{said}");
    }
}
