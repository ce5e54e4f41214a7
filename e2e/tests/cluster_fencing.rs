//! A node that is cut off from the API server for longer than its block's quarantine, while its Node object is
//! deleted and its block goes to another node: real operator, agents and CNI binary on bare nodes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use plat_e2e::bare::{BareNode, Pod, operator};
use plat_e2e::bare_pods::first_address;
use plat_e2e::cluster::{find_condition, items};
use plat_e2e::light::{ControlPlane, delete_node};
use plat_e2e::wait::holds;
use plat_e2e::wait_until;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(120);
/// Far below what the CRD allows: the schema of this cluster is changed for it.
const QUARANTINE: u32 = 20;

fn range(plane: &ControlPlane, name: &str, cidr: &str) -> anyhow::Result<()> {
    let spec = json!({"cidr": cidr, "quarantineSeconds": QUARANTINE});
    let object = json!({"apiVersion": "plat.network/v1alpha1", "kind": "ClusterCIDR", "metadata": {"name": name}, "spec": spec});
    plane.apply(&object.to_string()).map(drop)
}

/// Block → its node, unless it rests.
fn map(plane: &ControlPlane) -> BTreeMap<String, String> {
    let blocks = plane.get(&["podcidrs"]).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let active = items(&blocks).filter(|block| block["spec"]["state"] == "Active");
    active.map(|block| (text(&block["spec"]["cidr"]), text(&block["spec"]["nodeName"]))).collect()
}

fn wait_map(plane: &ControlPlane, what: &str, expected: &[(&str, &str)]) {
    let expected: BTreeMap<_, _> =
        expected.iter().map(|(block, node)| ((*block).to_owned(), (*node).to_owned())).collect();
    wait_until(what, DEADLINE, || {
        let map = map(plane);
        holds(map == expected, format!("{map:?}"))
    });
}

/// Tries until there is an address.
fn wait_add(what: &str, pod: &Pod) -> String {
    let done = pod.wait_add(what, DEADLINE);
    first_address(&done.to_string()).unwrap().to_string()
}

fn condition(plane: &ControlPlane, node: &str, type_: &str) -> (String, String) {
    let report = plane.get(&["nodenetwork", node]).unwrap_or_default();
    let found = find_condition(&report, type_);
    let text = |key: &str| found.and_then(|c| c[key].as_str()).unwrap_or_default().to_owned();
    (text("reason"), text("message"))
}

fn pings(pod: &Pod, to: &str) -> bool {
    pod.run("busybox").args(["ping", "-c1", "-W1", to]).output().is_ok_and(|out| out.status.success())
}

#[test]
fn a_node_that_is_cut_off_stops_leasing_before_its_block_is_anothers_and_yields_when_it_returns() {
    let plane = ControlPlane::up().unwrap();
    plane.install_crds().unwrap();
    let minimum =
        "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/quarantineSeconds/minimum";
    let patch = json!([{"op": "replace", "path": minimum, "value": 1}]).to_string();
    plane.kubectl(&["patch", "crd", "clustercidrs.plat.network", "--type=json", "-p", &patch]).unwrap();
    // Two blocks.
    wait_until("the schema allows it", DEADLINE, || {
        range(&plane, "two", "10.244.0.0/23").map_err(|error| format!("{error:#}"))
    });
    let flags = ["--report-wait-seconds=1", "--quarantine-watch-seconds=5", "--node-spec-mirror=false"];
    let _operator = operator(&plane, "operator", &flags).unwrap();
    let nodes: Vec<BareNode> = (1..=3).map(|number| BareNode::up(&plane, number).unwrap()).collect();
    let [n1, n2, n3] = &nodes[..] else { panic!() };
    n1.register().unwrap();
    wait_map(&plane, "n1 has a block", &[("10.244.0.0/24", "n1")]);
    n2.register().unwrap();
    let both = [("10.244.0.0/24", "n1"), ("10.244.1.0/24", "n2")];
    wait_map(&plane, "n2 has a block", &both);
    let _agents: Vec<_> = nodes.iter().map(|node| node.agent().unwrap()).collect();
    let old = n1.pod("old").unwrap();
    let address = wait_add("a pod of n1 has an address", &old);
    assert!(pings(&old, "10.244.0.1") && address.starts_with("10.244.0."), "{address}");
    // A third node waits for a block.
    n3.register().unwrap();

    n1.cut_off().unwrap();
    plane.block_on(async |client| delete_node(&client, "n1").await.unwrap());
    let gone = Instant::now();
    wait_map(&plane, "n1's block rests", &[("10.244.1.0/24", "n2")]);
    let resting = plane.get(&["podcidr", "10-244-0-0-24"]).unwrap();
    let release: Timestamp = resting["spec"]["releaseAfter"].as_str().unwrap().parse().unwrap();
    // It cannot know; until its lease ends it goes on.
    let probe = n1.pod("probe").unwrap();
    let refusal = wait_until("n1 leases no more", DEADLINE, || match probe.cni("ADD").unwrap() {
        Err(refusal) => Ok(refusal),
        Ok(_) => {
            assert!(Timestamp::now() < release, "it leases from a block that may be another's");
            probe.cni("DEL").unwrap().unwrap();
            Err("it still leases".to_owned())
        }
    });
    println!("figure: no new lease {:?} after the Node was deleted, of {QUARANTINE} s", gone.elapsed());
    assert_eq!(refusal["code"], 11, "{refusal}");
    let words = format!("{} {}", refusal["msg"], refusal["details"]);
    assert!(words.contains("no new addresses while the API server is away"), "{words}");
    assert!(words.contains("node n1 has not reached the API server since 20"), "{words}");
    assert!(words.contains("wait until plat-agent reaches the API server again"), "{words}");
    assert!(pings(&old, "10.244.0.1"), "running pods go on");

    wait_map(&plane, "n3 has n1's block", &[("10.244.0.0/24", "n3"), ("10.244.1.0/24", "n2")]);
    println!("figure: another node has the block {:?} after the Node was deleted", gone.elapsed());
    assert!(gone.elapsed() >= Duration::from_secs(u64::from(QUARANTINE) - 1), "{:?}", gone.elapsed());
    let new = n3.pod("new").unwrap();
    assert_eq!(wait_add("a pod of n3 has an address", &new), address, "the same one: n1 must not use it");
    wait_until("n2 routes it to n3", DEADLINE, || {
        let gateways = n2.gateways().map_err(|error| format!("{error:#}"))?;
        let via = gateways.get("10.244.0.0/24").cloned().unwrap_or_default();
        holds(via == n3.address().to_string(), via)
    });
    assert_eq!(probe.cni("ADD").unwrap().unwrap_err()["code"], 11);
    assert!(pings(&old, "10.244.0.1"), "n1 cannot know, and its pods go on");

    println!("figure: cut off for {:?}", gone.elapsed());
    n1.reconnect().unwrap();
    n1.register().unwrap();
    wait_until("n1 takes its pod off the network", DEADLINE, || {
        let (reason, message) = condition(&plane, "n1", "Overlapping");
        let named = message.contains(&address) && message.contains("node n3 holds");
        holds(reason == "PodsCutOff" && named, format!("{reason} {message}"))
    });
    println!("figure: back and yielding after {:?}", gone.elapsed());
    assert!(!pings(&old, "10.244.0.1"));
    wait_until("n1 reaches the other pod of that address", DEADLINE, || {
        let out = n1.run("busybox").args(["ping", "-c1", "-W1", &address]).output().unwrap();
        let route = n1.ip(&["route", "get", &address]).unwrap_or_default();
        holds(out.status.success() && route.contains("via 172.30.0.13"), route)
    });
    assert!(pings(&new, "10.244.0.1"));
    assert_eq!(probe.cni("ADD").unwrap().unwrap_err()["code"], 11, "it has no block");
    for (kind, reason) in [("the agent's", "PodsCutOff"), ("the operator's", "HeldBlockTaken")] {
        wait_until(&format!("{kind} Event"), DEADLINE, || {
            let events = plane.get(&["events.events.k8s.io", "-n", "default"]).unwrap_or_default();
            let found = items(&events).any(|e| e["reason"] == reason && e["regarding"]["name"] == "n1");
            holds(found, events)
        });
    }

    // The pod is deleted, as Kubernetes does with pods of a Node that was deleted; there is room again.
    old.cni("DEL").unwrap().unwrap();
    range(&plane, "more", "10.245.0.0/23").unwrap();
    let three = [("10.244.0.0/24", "n3"), ("10.244.1.0/24", "n2"), ("10.245.0.0/24", "n1")];
    wait_map(&plane, "n1 has another block", &three);
    let last = wait_add("a new pod of n1 has an address", &probe);
    assert!(last.starts_with("10.245.0."), "{last}");
    wait_until("all is well on n1", DEADLINE, || {
        let (reason, message) = condition(&plane, "n1", "Overlapping");
        holds(reason == "Disjoint", format!("{reason} {message}"))
    });
}
