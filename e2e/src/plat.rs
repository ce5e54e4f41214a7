//! What Plat says of itself in a cluster, and what must hold whatever happens.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::{Cluster, condition, find_condition, items, name, node_ip};
use crate::wait::{holds, wait_until};

/// Port of the agent's metrics, on every node.
pub const AGENT_PORT: u16 = 9539;
/// First port of the operator's metrics.
pub const OPERATOR_PORT: u16 = 9540;

/// Waits until every block is Ready and carried by every node, and every node says that it is well.
///
/// # Panics
/// At the deadline, with who is behind.
#[track_caller]
pub fn wait_converged(cluster: &Cluster, nodes: usize, deadline: Duration) {
    wait_until("all blocks are Ready and Converged", deadline, || converged(cluster, nodes));
}

/// Whether it is so; else what is not.
pub fn converged(cluster: &Cluster, nodes: usize) -> Result<(), String> {
    let blocks = cluster.get(&["podcidrs"]).map_err(|e| e.to_string())?;
    let active: Vec<_> = items(&blocks).filter(|b| b["spec"]["state"] == "Active").collect();
    holds(active.len() == nodes, format!("{} active blocks instead of {nodes}", active.len()))?;
    for type_ in ["Ready", "Converged"] {
        for block in &active {
            let said = find_condition(block, type_);
            let current = said.is_some_and(|c| c["observedGeneration"] == block["metadata"]["generation"]);
            holds(
                condition(block, type_) == Some("True") && current,
                format!("{} {type_}: {said:?}", name(block)),
            )?;
        }
    }
    // The report of a node that is gone stays for a while, as what it holds may still be in use.
    let living = cluster.get(&["nodes"]).map_err(|e| e.to_string())?;
    let living: Vec<_> = items(&living).map(name).collect();
    let reports = cluster.get(&["nodenetworks"]).map_err(|e| e.to_string())?;
    let reports: Vec<_> = items(&reports).filter(|report| living.contains(&name(report))).collect();
    holds(reports.len() == nodes, format!("{} reports", reports.len()))?;
    for report in reports {
        for (type_, wanted) in [("RoutesReady", "True"), ("MasqueradeReady", "True"), ("CNIReady", "True")] {
            let said = find_condition(report, type_);
            holds(condition(report, type_) == Some(wanted), format!("{} {type_}: {said:?}", name(report)))?;
        }
    }
    Ok(())
}

/// The blocks of a node, by their text.
pub fn blocks_of(cluster: &Cluster, node: u8) -> Result<Vec<Value>> {
    let selector = format!("spec.nodeName=n{node}");
    let list = cluster.get(&["podcidrs", "--field-selector", &selector])?;
    Ok(items(&list).cloned().collect())
}

/// The one block of a node.
pub fn block_of(cluster: &Cluster, node: u8) -> Result<String> {
    let blocks = blocks_of(cluster, node)?;
    let cidr = blocks.first().and_then(|b| b["spec"]["cidr"].as_str());
    cidr.map(str::to_owned).with_context(|| format!("n{node} has no block"))
}

/// Two nodes with one block, or two living network namespaces with one address: what must never be.
pub fn doubles(cluster: &Cluster, nodes: &[u8]) -> Result<Vec<String>> {
    let mut holders: BTreeMap<String, String> = BTreeMap::new();
    let mut doubles = double_addresses(cluster, nodes)?;
    for block in items(&cluster.get(&["podcidrs"])?) {
        let (cidr, node) = (block["spec"]["cidr"].to_string(), block["spec"]["nodeName"].to_string());
        if let Some(other) = holders.insert(cidr.clone(), node.clone()) {
            doubles.push(format!("block {cidr}: {node} and {other}"));
        }
    }
    Ok(doubles)
}

/// Two living network namespaces with one address.
pub fn double_addresses(cluster: &Cluster, nodes: &[u8]) -> Result<Vec<String>> {
    let mut doubles = Vec::new();
    let mut owners: BTreeMap<IpAddr, String> = BTreeMap::new();
    for node in nodes {
        for (namespace, address) in pod_addresses(cluster, *node)? {
            let owner = format!("n{node} {namespace}");
            if let Some(other) = owners.insert(address, owner.clone()) {
                doubles.push(format!("address {address}: {owner} and {other}"));
            }
        }
    }
    Ok(doubles)
}

/// The namespaces on a node and their global addresses, as the kernel has them.
pub fn pod_addresses(cluster: &Cluster, node: u8) -> Result<Vec<(String, IpAddr)>> {
    let line = "cd /run/netns && for n in *; do [ -e $n ] || continue; \
                nsenter --net=$n ip -o addr show scope global | sed \"s|^|$n |\"; done";
    let said = cluster.on_node(node, line)?;
    Ok(said
        .lines()
        .filter_map(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            let address = words.iter().skip_while(|w| !w.starts_with("inet")).nth(1)?;
            Some((words.first()?.to_string(), address.split('/').next()?.parse().ok()?))
        })
        .collect())
}

/// The addresses that are leased on a node, as `plat leases` prints them.
pub fn leased(cluster: &Cluster, node: u8) -> Result<BTreeSet<IpAddr>> {
    let said: Value = serde_json::from_str(&cluster.on_node(node, "/opt/cni/bin/plat leases --json")?)?;
    let leases = said["leases"].as_array().map(Vec::as_slice).unwrap_or_default();
    let addresses = leases.iter().filter_map(|lease| lease["addresses"].as_array()).flatten();
    Ok(addresses.filter_map(|a| a["address"].as_str()?.parse().ok()).collect())
}

/// The addresses of a node's pods, as the API server has them, but for those that use the node's network.
pub fn pod_ips(cluster: &Cluster, node: u8) -> Result<BTreeSet<IpAddr>> {
    let pods = cluster.get(&["pods", "-A", "--field-selector", &format!("spec.nodeName=n{node}")])?;
    let own = items(&pods).filter(|pod| pod["spec"]["hostNetwork"] != true);
    let ips = own.filter_map(|pod| pod["status"]["podIPs"].as_array()).flatten();
    Ok(ips.filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect())
}

/// The routes of ours on a node, as `ip route` prints them, without whether their link has a carrier.
pub fn routes(cluster: &Cluster, node: u8) -> Result<Vec<String>> {
    let said = cluster.on_node(node, "ip route show proto 112")?;
    Ok(said.lines().map(|line| line.replace(" linkdown", "").trim_end().to_owned()).collect())
}

/// Whether a node has a route of ours to `block` via node `via`.
pub fn has_route(cluster: &Cluster, node: u8, block: &str, via: u8) -> Result<(), String> {
    let routes = routes(cluster, node).map_err(|e| e.to_string())?;
    let wanted = format!("{block} via {}", node_ip(via));
    holds(routes.iter().any(|r| r.starts_with(&wanted)), format!("n{node} has {routes:#?}"))
}

/// A metric's value summed over its labels that contain `labels`; `None` if there is no such line.
pub fn metric(cluster: &Cluster, server: SocketAddr, name: &str, labels: &str) -> Result<Option<f64>> {
    let text = http_get(cluster, server, "/metrics")?;
    let values: Vec<f64> = text
        .lines()
        .filter(|line| {
            line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']) && line.contains(labels)
        })
        .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
        .collect();
    Ok((!values.is_empty()).then(|| values.iter().sum()))
}

/// The body of a page.
pub fn http_get(cluster: &Cluster, server: SocketAddr, path: &str) -> Result<String> {
    cluster.enter(|| {
        let timeout = Duration::from_secs(3);
        let mut stream = TcpStream::connect_timeout(&server, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        anyhow::ensure!(head.starts_with("HTTP/1.1 200"), "{path} of {server}: {head}");
        Ok(body.to_owned())
    })
}

/// Events with that reason, newest last: `object: note`.
pub fn events(cluster: &Cluster, reason: &str) -> Result<Vec<String>> {
    let list =
        cluster.get(&["events.events.k8s.io", "-A", "--field-selector", &format!("reason={reason}")])?;
    let line = |e: &Value| {
        let about = &e["regarding"];
        format!(
            "{} {}: {}",
            about["kind"].as_str().unwrap_or("?"),
            about["name"].as_str().unwrap_or("?"),
            e["note"].as_str().unwrap_or("")
        )
    };
    Ok(items(&list).map(line).collect())
}
