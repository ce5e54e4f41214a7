//! Operator and agents as real processes beside a real API server, on nodes that are bare network namespaces:
//! more of them than full nodes would fit on one machine.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use plat_e2e::bare::{BareNode, Pod, Process, operator};
use plat_e2e::bare_pods::first_address;
use plat_e2e::cluster::{condition, items};
use plat_e2e::light::{ControlPlane, delete_node};
use plat_e2e::wait::holds;
use plat_e2e::wait_until;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(60);
const RANGE: &str = "--cluster-cidr=10.244.0.0/16";

/// How many nodes: `PLAT_LIGHT_NODES` (at most 200), or 20.
fn size() -> u8 {
    std::env::var("PLAT_LIGHT_NODES").map_or(20, |text| text.parse().unwrap())
}

fn plane() -> ControlPlane {
    let plane = ControlPlane::up().unwrap();
    plane.install_crds().unwrap();
    plane
}

/// The node's namespace, its Node object and its agent.
fn join(plane: &ControlPlane, number: u8) -> (BareNode<'_>, Process) {
    let node = BareNode::up(plane, number).unwrap();
    node.register().unwrap();
    let agent = node.agent().unwrap();
    (node, agent)
}

/// The blocks that are in use: node → block.
fn map(plane: &ControlPlane) -> Result<BTreeMap<String, String>, String> {
    let blocks = plane.get(&["podcidrs"]).map_err(|e| format!("{e:#}"))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let active = items(&blocks).filter(|block| block["spec"]["state"] == "Active");
    Ok(active.map(|block| (text(&block["spec"]["nodeName"]), text(&block["spec"]["cidr"]))).collect())
}

/// Waits until each of these nodes has one block of its own, and each routes to all others and nowhere else.
#[track_caller]
fn wait_routes_equal_the_map(
    plane: &ControlPlane,
    what: &str,
    nodes: &[&BareNode],
) -> BTreeMap<String, String> {
    let map = wait_until(&format!("{what}: every node has its block"), DEADLINE, || {
        let map = map(plane)?;
        let complete = map.len() == nodes.len() && nodes.iter().all(|node| map.contains_key(&node.name()));
        holds(complete, format!("{map:?}")).map(|()| map)
    });
    let blocks: BTreeSet<_> = map.values().collect();
    assert_eq!(blocks.len(), map.len(), "a block is there twice: {map:?}");
    for node in nodes {
        let others = nodes.iter().filter(|other| other.name() != node.name());
        let wanted: BTreeMap<_, _> =
            others.map(|other| (map[&other.name()].clone(), other.address().to_string())).collect();
        wait_until(&format!("{what}: {} routes to every block", node.name()), DEADLINE, || {
            let gateways = node.gateways().map_err(|e| format!("{e:#}"))?;
            holds(gateways == wanted, format!("{gateways:?} instead of {wanted:?}"))
        });
    }
    map
}

#[test]
fn dozens_of_agents_carry_the_map_whoever_joins_dies_or_leaves() {
    let plane = plane();
    let _operator = operator(&plane, "operator", &[RANGE]).unwrap();
    let begin = Instant::now();
    let (nodes, mut agents): (Vec<_>, Vec<_>) = (1..=size()).map(|number| join(&plane, number)).unzip();
    let nodes: Vec<&BareNode> = nodes.iter().collect();
    let map = wait_routes_equal_the_map(&plane, "all joined", &nodes);
    println!("figure: {} nodes joined and routed to each other in {:?}", nodes.len(), begin.elapsed());

    // One agent dies; what is broken meanwhile its next life mends.
    agents.remove(0).kill();
    nodes[0].ip(&["route", "del", &map["n2"], "proto", "112"]).unwrap();
    let metric = plat_crds::names::ROUTE_METRIC.to_string();
    let stale = ["route", "add", "10.244.250.0/24", "via", "172.30.0.1", "proto", "112", "metric", &metric];
    nodes[0].ip(&stale).unwrap();
    agents.push(nodes[0].agent().unwrap());
    wait_routes_equal_the_map(&plane, "one agent died", &nodes);

    // One node leaves, with its agent running.
    let (left, others) = nodes.split_last().unwrap();
    plane.block_on(async |client| delete_node(&client, &left.name()).await.unwrap());
    let rest = wait_routes_equal_the_map(&plane, "one node left", others);
    assert!(rest.iter().all(|(node, block)| map[node] == *block), "no other block moves: {rest:?}");
    left.register().unwrap();
    assert_eq!(wait_routes_equal_the_map(&plane, "it is back", &nodes), map, "it gets its block back");
}

/// Tries until the pod has an address; the first of them.
#[track_caller]
fn wait_add(pod: &Pod) -> IpAddr {
    let result = pod.wait_add("a pod gets its address", DEADLINE);
    assert_eq!(result["ips"].as_array().unwrap().len(), 1, "one family: {result}");
    first_address(&result.to_string()).unwrap()
}

#[test]
fn nodes_and_pods_with_ipv6_addresses_alone_reach_each_other() {
    let plane = plane();
    let _operator = operator(&plane, "operator", &["--cluster-cidr=fd00:10:244::/48"]).unwrap();
    let nodes: Vec<BareNode> = (1..=2).map(|number| BareNode::up(&plane, number).unwrap()).collect();
    let agents = nodes.iter().map(|node| {
        // IPv4 leads to the API server of this testbed, and nowhere else.
        node.ip(&["route", "del", "default"]).unwrap();
        node.register_at(&node.address6().to_string()).unwrap();
        node.agent().unwrap()
    });
    let _agents: Vec<Process> = agents.collect();
    let pods: Vec<Pod> = nodes.iter().map(|node| node.pod("pod").unwrap()).collect();
    let addresses: Vec<IpAddr> = pods.iter().map(wait_add).collect();
    let map = map(&plane).unwrap();
    assert!(map.len() == 2 && map.values().all(|block| block.ends_with("::/64")), "{map:?}");
    for (pod, address) in pods.iter().zip(addresses.iter().rev()) {
        wait_until(&format!("a pod reaches {address} on the other node"), DEADLINE, || {
            let out = pod.run("busybox").args(["ping", "-c1", "-W1", &address.to_string()]).output();
            let out = out.map_err(|error| error.to_string())?;
            holds(out.status.success(), String::from_utf8_lossy(&out.stdout).into_owned())
        });
    }
    wait_until("both nodes say that all is well", DEADLINE, || {
        let reports = plane.get(&["nodenetworks"]).map_err(|error| format!("{error:#}"))?;
        let is_well = |report, type_| condition(report, type_) == Some("True");
        let all_well =
            |report| ["RoutesReady", "CNIReady", "MasqueradeReady"].iter().all(|t| is_well(report, t));
        holds(items(&reports).filter(|report| all_well(report)).count() == 2, reports.to_string())
    });
    for node in nodes {
        let gateways = node.ip(&["-4", "route", "show", "proto", "112"]).unwrap();
        assert_eq!(gateways, "", "{} has IPv4 routes of Plat", node.name());
    }
}
