//! What a node that joins costs the API server, counted in its audit log. Counts, no times: `make bench` measures those.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Node;
use kube::api::PostParams;
use plat_crds::PodCIDR;
use plat_e2e::audit::{Log, Request, count, writes};
use plat_e2e::light::{Bound, ControlPlane};
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{Cluster, DEADLINE, Operator, condition_of};

const ACCOUNT: &str = "system:serviceaccount:plat-system:operator";
/// Nodes that are there, and nodes that join.
const NODES: [&str; 3] = ["n1", "n2", "n3"];
const JOINING: [&str; 2] = ["n4", "n5"];
/// What an agent writes about itself while its node joins.
const OWN_REPORTS: usize = 1;

/// A control plane of its own: the shared one keeps no audit log.
fn audited() -> &'static ControlPlane {
    static PLANE: LazyLock<ControlPlane> = LazyLock::new(|| {
        let plane = ControlPlane::audited().unwrap_or_else(|e| panic!("no control plane: {e:#}"));
        plane.install_crds().unwrap_or_else(|e| panic!("cannot install the CRDs: {e:#}"));
        plane
    });
    &PLANE
}

/// A node joins as its kubelet registers it: with its address.
async fn join(cluster: &Cluster, name: &str, address: &str) {
    let node: Node = serde_json::from_value(json!({
        "metadata": {"name": name},
        "status": {"addresses": [{"type": "InternalIP", "address": address}], "conditions": [{"type": "Ready", "status": "True"}]},
    }))
    .unwrap();
    cluster.api().create(&PostParams::default(), &node).await.unwrap();
}

/// Every agent reports that it carries everything.
async fn all_report(cluster: &Cluster, nodes: &[&str]) {
    for node in nodes {
        let block = cluster.block_of(node).await.unwrap().spec.cidr;
        cluster.report(node, &[(&block, 0)]).await;
    }
}

/// Waits until every block has converged and the operator has written nothing for three seconds; what it wrote.
async fn settled(cluster: &Cluster, log: &mut Log) -> Vec<Request> {
    let (mut sum, mut last) = (Vec::new(), Instant::now());
    wait_until_async("all has converged and is written", DEADLINE, async || {
        let new = log.since(ACCOUNT).unwrap();
        if writes(&new) > 0 {
            last = Instant::now();
        }
        sum.extend(new);
        let blocks = cluster.api::<PodCIDR>().list(&Default::default()).await.map_err(|e| e.to_string())?;
        let converged = blocks.items.iter().all(|block| condition_of(block, "Converged").0 == "True");
        holds(converged && last.elapsed() > Duration::from_secs(3), format!("{converged} {:?}", count(&sum)))
    })
    .await;
    sum
}

#[test]
fn a_node_that_joins_costs_three_writes_until_its_block_can_be_used_and_nine_in_all() {
    let plane = audited();
    plane.block_on(|client| async {
        let cluster = Cluster { plane, client };
        cluster.namespaces().await;
        for object in [
            "create serviceaccount operator -n plat-system",
            "create clusterrolebinding operator --clusterrole=cluster-admin --serviceaccount=plat-system:operator",
        ] {
            plane.kubectl(&object.split(' ').collect::<Vec<_>>()).unwrap();
        }
        let token = plane.token("plat-system", "operator", Bound::Free).unwrap();
        let kubeconfig = plane.kubeconfig("operator", &token).unwrap();
        let mut log = Log::of(plane);
        cluster.nodes(&NODES).await;
        let _operator = Operator::start(plane, &kubeconfig, "a", &["--cluster-cidr=10.244.0.0/16"]);
        cluster.wait_blocks(&NODES, 1).await;
        all_report(&cluster, &NODES).await;
        settled(&cluster, &mut log).await;

        let (mut until_usable, mut all) = (0, Vec::new());
        let mut there = NODES.to_vec();
        for (number, node) in JOINING.into_iter().enumerate() {
            join(&cluster, node, &format!("172.30.0.{}", 21 + number)).await;
            there.push(node);
            cluster.wait_blocks(&there, 1).await;
            let new = log.since(ACCOUNT).unwrap();
            let gives = |r: &Request| (r.verb.as_str(), r.resource.as_str()) == ("create", "podcidrs");
            let block = new.iter().position(gives).unwrap_or_else(|| panic!("nobody like {ACCOUNT} made it: {new:?}"));
            until_usable += writes(&new[..=block]);
            all.extend(new);
            // Its own agent's report, and then everybody's: that they carry the new block too.
            all_report(&cluster, &[node]).await;
            all_report(&cluster, &there).await;
            all.extend(settled(&cluster, &mut log).await);
        }
        let nodes = JOINING.len();
        assert!(until_usable <= 3 * nodes, "{until_usable} for {nodes} nodes: {:?}", count(&all));
        let in_all = writes(&all) + OWN_REPORTS * nodes;
        assert!(in_all <= 9 * nodes, "{in_all} for {nodes} nodes: {:?}", count(&all));
    });
}
