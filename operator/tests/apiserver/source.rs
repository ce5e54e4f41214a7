//! `ipam.source` beside a real kube-controller-manager that allocates.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use plat_crds::ClusterCIDR;
use plat_crds::pod_cidr::BlockState;
use plat_e2e::light::{ControlPlane, create_node};
use plat_e2e::testbed::tools;
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{Cluster, DEADLINE, arena, pod_cidrs};

const V4: &str = "--cluster-cidr=10.244.0.0/16";

/// kube-controller-manager with nothing but its node IPAM; killed when dropped.
struct NodeIpam {
    child: Child,
    log: PathBuf,
}

impl NodeIpam {
    fn start(plane: &ControlPlane) -> NodeIpam {
        let log = plane.run_folder().join("node-ipam.log");
        let program = tools().join("kube-controller-manager");
        let mut command: Command = plane.command(program.to_str().unwrap());
        command
            .arg("--kubeconfig")
            .arg(plane.admin_kubeconfig())
            .args(["--controllers=node-ipam-controller", "--allocate-node-cidrs=true", V4])
            .args(["--leader-elect=false", "--secure-port=0", "--kube-api-qps=200", "--kube-api-burst=400"])
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap());
        NodeIpam { child: command.spawn().unwrap(), log }
    }
}

impl Drop for NodeIpam {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        if std::thread::panicking() {
            eprintln!(
                "---- {}\n{}",
                self.log.display(),
                std::fs::read_to_string(&self.log).unwrap_or_default()
            );
        }
    }
}

async fn spec_of(cluster: &Cluster, node: &str) -> Vec<String> {
    pod_cidrs(&cluster.get_node(node).await)
}

#[test]
fn with_the_controller_as_source_nodes_wait_for_it_and_get_exactly_what_it_gave_them() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2"]).await;
        let operator = cluster.operator("a", &[V4, "--ipam-source=node"]);
        let text = cluster.wait_event("Node", "n1", "NoPodCIDR").await;
        assert!(text.contains("--allocate-node-cidrs=true"), "{text}");
        assert_eq!(cluster.blocks().await, [], "nothing is carved");
        assert_eq!(spec_of(&cluster, "n1").await, [] as [&str; 0], "nor written");

        let _controller = NodeIpam::start(cluster.plane);
        let blocks = cluster.wait_blocks(&["n1", "n2"], 1).await;
        for node in ["n1", "n2"] {
            assert_eq!(blocks[node], spec_of(&cluster, node).await);
        }
        cluster.wait_event("Node", "n2", "BlockAdopted").await;
        wait_until_async("nobody lacks a block any more", DEADLINE, async || {
            let faults = operator.metric(r#"plat_operator_faults{reason="NoPodCIDR"}"#);
            let without = operator.metric("plat_operator_nodes_without_block");
            holds(faults.is_none() && without == Some(0.0), format!("{faults:?} {without:?}"))
        })
        .await;

        // Registered again, n1 is given something else. Its pods go on in the old block.
        cluster.report("n1", &[(blocks["n1"][0].as_str(), 3)]).await;
        cluster.delete_node("n1").await;
        cluster.node("n1", json!({}), &["172.30.0.11"]).await;
        let spec = wait_until_async("n1 has its new entry", DEADLINE, async || {
            let spec = spec_of(&cluster, "n1").await;
            holds(!spec.is_empty(), "none").map(|()| spec)
        })
        .await;
        cluster.wait_block(&spec[0].replace(['.', '/'], "-"), "is there", |_| true).await;
        cluster.report("n1", &[(blocks["n1"][0].as_str(), 3), (spec[0].as_str(), 0)]).await;
        let moved = wait_until_async("n1 follows its spec and drains what it had", DEADLINE, async || {
            let spec = spec_of(&cluster, "n1").await;
            let of_n1: Vec<_> = cluster.blocks().await.into_iter().filter(|b| b.node == "n1").collect();
            let in_state = |state| {
                let blocks = of_n1.iter().filter(move |block| block.state == state);
                blocks.map(|block| block.cidr.clone()).collect::<Vec<_>>()
            };
            let same = spec == blocks["n1"];
            let done = in_state(BlockState::Active) == spec
                && !spec.is_empty()
                && (same || in_state(BlockState::Draining) == blocks["n1"]);
            holds(done, format!("{spec:?} {of_n1:?}")).map(|()| spec)
        })
        .await;
        assert_ne!(moved, blocks["n1"], "the controller gives a freed block last");
        cluster.assert_disjoint().await;
    });
}

#[test]
fn a_controller_that_allocates_beside_us_is_named_and_not_fought() {
    arena(|cluster| async move {
        let operator = cluster.operator("a", &[V4, "--node-spec-mirror=false"]);
        cluster.wait_range("default-v4", "Ready", "True", "RangeReady").await;
        // Only what is written in a later second than the range is proof.
        let made = cluster.api::<ClusterCIDR>().get("default-v4").await.unwrap();
        let made = made.metadata.creation_timestamp.unwrap().0;
        wait_until_async("a second has passed", DEADLINE, async || {
            holds(k8s_openapi::jiff::Timestamp::now().duration_since(made).as_secs() >= 2, "not yet")
        })
        .await;
        let controller = NodeIpam::start(cluster.plane);
        // With a label, as kubelets make them: of an object that began without any field nobody keeps who wrote it.
        for (node, address) in [("n1", "172.30.0.11"), ("n2", "172.30.0.12"), ("n3", "172.30.0.13")] {
            create_node(&cluster.client, node, &[address]).await.unwrap();
        }
        cluster.wait_blocks(&["n1", "n2", "n3"], 1).await;
        let text = cluster.wait_range("default-v4", "OtherAllocator", "True", "PodCIDRsWrittenByOther").await;
        assert!(text.starts_with("kube-controller-manager wrote spec.podCIDRs of node n"), "{text}");
        let told = cluster.wait_event("ClusterCIDR", "default-v4", "PodCIDRsWrittenByOther").await;
        assert_eq!(told, text);
        assert_eq!(operator.metric(r#"plat_operator_faults{reason="PodCIDRsWrittenByOther"}"#), Some(1.0));
        cluster.assert_no_double().await;
        let specs = async || {
            let mut specs = BTreeSet::new();
            for node in ["n1", "n2", "n3"] {
                specs.extend(spec_of(&cluster, node).await);
            }
            specs
        };
        let written = wait_until_async("the controller has served all", DEADLINE, async || {
            let specs = specs().await;
            holds(specs.len() == 3, format!("{specs:?}")).map(|()| specs)
        })
        .await;

        // It stops; the next node is mirrored by us, which shows that it has.
        drop(controller);
        assert!(operator.terminate().await.success());
        let _next = cluster.operator("b", &[V4]);
        create_node(&cluster.client, "n4", &["172.30.0.14"]).await.unwrap();
        cluster.wait_blocks(&["n4"], 1).await;
        cluster.wait_range("default-v4", "OtherAllocator", "False", "SoleAllocator").await;
        assert_eq!(specs().await, written, "what it wrote stays");
    });
}
