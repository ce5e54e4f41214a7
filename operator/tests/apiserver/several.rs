//! Several blocks per node, and blocks that move from one range to another.

use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, PodCIDR};
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{Cluster, DEADLINE, arena, condition_of, pod_cidrs};

const OLD: &str = "10.244.0.0/24";

impl Cluster {
    /// `kubectl annotate podcidrs -l plat.network/clustercidr=RANGE plat.network/drain=`, or without.
    async fn annotate_blocks_of(&self, range: &str, drain: bool) {
        let api = self.api::<PodCIDR>();
        let blocks = ListParams::default().labels(&format!("plat.network/clustercidr={range}"));
        let value = if drain { json!("") } else { json!(null) };
        let patch = Patch::Merge(json!({"metadata": {"annotations": {"plat.network/drain": value}}}));
        for block in api.list(&blocks).await.unwrap() {
            api.patch(&block.metadata.name.unwrap(), &PatchParams::default(), &patch).await.unwrap();
        }
    }

    async fn set_allocation(&self, range: &str, allocation: &str) {
        let patch = Patch::Merge(json!({"spec": {"allocation": allocation}}));
        self.api::<ClusterCIDR>().patch(range, &PatchParams::default(), &patch).await.unwrap();
    }

    async fn wait_state(&self, name: &str, state: BlockState) -> PodCIDR {
        self.wait_block(name, &format!("is {state:?}"), |b| b.spec.state == state).await
    }

    /// Reports until something is so: a report says what its agent has seen by then.
    async fn report_until(&self, node: &str, held: &[(&str, i64)], name: &str, state: BlockState) -> PodCIDR {
        wait_until_async(&format!("{name} is {state:?}"), DEADLINE, async || {
            self.report(node, held).await;
            let block = self.api::<PodCIDR>().get(name).await.map_err(|e| e.to_string())?;
            holds(block.spec.state == state, format!("{block:?}")).map(|()| block)
        })
        .await
    }
}

#[test]
fn a_node_that_fills_up_gets_another_block_and_gives_it_back_when_it_is_empty_again() {
    arena(|cluster| async move {
        cluster.range("r", json!({"cidr": "10.244.0.0/16", "blocksPerNode": {"max": 2}})).await;
        cluster.nodes(&["n1"]).await;
        let _operator = cluster.operator("a", &["--surplus-seconds=0", "--quarantine-watch-seconds=1"]);
        cluster.wait_blocks(&["n1"], 1).await;
        cluster.report("n1", &[(OLD, 204)]).await;
        let blocks = cluster.wait_blocks(&["n1"], 2).await;
        assert_eq!(blocks["n1"], [OLD, "10.244.1.0/24"]);
        // In the pass that creates the second, or just after it.
        wait_until_async("node.spec.podCIDRs is written", DEADLINE, async || {
            let node = cluster.get_node("n1").await;
            holds(!pod_cidrs(&node).is_empty(), format!("{node:?}"))
        })
        .await;
        assert_eq!(pod_cidrs(&cluster.get_node("n1").await), [OLD], "the primary one is mirrored");

        let second = "10-244-1-0-24";
        cluster.report("n1", &[(OLD, 253), ("10.244.1.0/24", 240)]).await;
        let note = cluster.wait_event("Node", "n1", "BlocksPerNodeReached").await;
        assert!(note.contains("raise that, or run fewer pods on it"), "{note}");
        let blocked = |b: &PodCIDR| condition_of(b, "GrowthBlocked").0 == "True";
        let block = cluster.wait_block(second, "says that the node cannot grow", blocked).await;
        assert_eq!(condition_of(&block, "NodeSpecConflict"), ("False".into(), "FurtherBlock".into()));

        cluster.report("n1", &[(OLD, 9), ("10.244.1.0/24", 0)]).await;
        let block = cluster.wait_state(second, BlockState::Draining).await;
        assert_eq!(block.spec.node_name, "n1");
        cluster.wait_event("PodCIDR", second, "BlockDraining").await;
        cluster.report_until("n1", &[(OLD, 9), ("10.244.1.0/24", 0)], second, BlockState::Quarantined).await;
        cluster.report("n1", &[(OLD, 9)]).await;
        cluster.end_quarantine(second).await;
        cluster.wait_gone(second).await;
        assert_eq!(cluster.wait_blocks(&["n1"], 1).await["n1"], [OLD]);
    });
}

#[test]
fn blocks_move_to_another_range_when_asked_replacement_first_and_not_under_a_pod() {
    arena(|cluster| async move {
        cluster.range("old", json!({"cidr": "10.244.0.0/16"})).await;
        cluster.nodes(&["n1", "n2"]).await;
        let operator = cluster.operator("a", &["--quarantine-watch-seconds=1"]);
        cluster.wait_blocks(&["n1", "n2"], 1).await;
        cluster.report("n1", &[(OLD, 7)]).await;
        cluster.report("n2", &[("10.244.1.0/24", 7)]).await;
        wait_until_async("the blocks are mirrored", DEADLINE, async || {
            holds(!pod_cidrs(&cluster.get_node("n1").await).is_empty(), "not yet")
        })
        .await;

        // Nothing changes while there is no other range.
        cluster.set_allocation("old", "Draining").await;
        cluster.annotate_blocks_of("old", true).await;
        let stuck = |b: &PodCIDR| condition_of(b, "Draining") == ("False".into(), "NoReplacement".into());
        let block = cluster.wait_block("10-244-0-0-24", "says that nothing can take its place", stuck).await;
        assert_eq!(block.spec.state, BlockState::Active);
        let left = cluster.wait_range("old", "Draining", "True", "BlocksLeft").await;
        assert!(left.starts_with("nodes hold 2 of its blocks, of which 0 drain"), "{left}");

        // A range that holds neither its own reserved parts nor anything contiguous with the old one.
        let reserved = json!(["10.9.0.0/24", "10.9.2.0/23"]);
        cluster.range("new", json!({"cidr": "10.9.0.0/16", "reserved": reserved})).await;
        let blocks = cluster.wait_blocks(&["n1", "n2"], 2).await;
        let new: Vec<_> = blocks.values().flatten().filter(|b| b.starts_with("10.9.")).collect();
        assert_eq!(new, ["10.9.1.0/24", "10.9.4.0/24"], "{blocks:?}");
        let fresh = blocks["n1"].iter().find(|b| b.starts_with("10.9.")).unwrap().as_str();
        let fresh_name = fresh.replace(['.', '/'], "-");

        // The old one drains only once the agent leases from the new one; n2 has no agent and waits.
        cluster.report_until("n1", &[(OLD, 7), (fresh, 0)], "10-244-0-0-24", BlockState::Draining).await;
        let waits = |b: &PodCIDR| condition_of(b, "Draining").1 == "ReplacementComes";
        let other = cluster.wait_block("10-244-1-0-24", "waits for its agent", waits).await;
        assert_eq!(other.spec.state, BlockState::Active);
        cluster.report("n1", &[(OLD, 7), (fresh, 0)]).await;
        let asked = |b: &PodCIDR| condition_of(b, "Draining") == ("True".into(), "Asked".into());
        cluster.wait_block("10-244-0-0-24", "says that it drains", asked).await;

        // Taking the annotation off turns it back, and on again drains it again.
        cluster.annotate_blocks_of("old", false).await;
        cluster.wait_state("10-244-0-0-24", BlockState::Active).await;
        cluster.annotate_blocks_of("old", true).await;
        cluster.report_until("n1", &[(OLD, 7), (fresh, 0)], "10-244-0-0-24", BlockState::Draining).await;

        // The operator restarts, pods end one by one, and only then the block goes.
        assert!(operator.terminate().await.success());
        let _next = cluster.operator("b", &["--quarantine-watch-seconds=1"]);
        cluster.report("n1", &[(OLD, 1), (fresh, 6)]).await;
        let used = |b: &PodCIDR| b.status.as_ref().and_then(|s| s.used) == Some(1);
        let block = cluster.wait_block("10-244-0-0-24", "has one lease left", used).await;
        assert_eq!(block.spec.state, BlockState::Draining);
        cluster.report_until("n1", &[(OLD, 0), (fresh, 7)], "10-244-0-0-24", BlockState::Quarantined).await;
        let moved = |b: &PodCIDR| condition_of(b, "NodeSpecConflict") == ("False".into(), "Moved".into());
        cluster.wait_block(&fresh_name, "says that the node was moved", moved).await;
        cluster.report("n1", &[(fresh, 7)]).await;
        cluster.end_quarantine("10-244-0-0-24").await;
        cluster.wait_gone("10-244-0-0-24").await;
        cluster.wait_block(&fresh_name, "goes on saying so", moved).await;
        assert_eq!(pod_cidrs(&cluster.get_node("n1").await), [OLD], "the field is write-once");
        cluster.assert_disjoint().await;
    });
}

#[test]
fn ranges_with_selectors_and_priorities_come_and_go_online() {
    arena(|cluster| async move {
        let zone = |zone: &str| json!({"matchLabels": {"zone": zone}});
        cluster.range("a", json!({"cidr": "10.1.0.0/16", "nodeSelector": zone("a")})).await;
        cluster
            .range(
                "b",
                json!({"cidr": "172.20.0.0/22", "nodeSelector": zone("b"), "reserved": ["172.20.0.0/23"]}),
            )
            .await;
        cluster
            .range("rest", json!({"cidr": "192.168.128.0/20", "blockPrefixLength": 26, "priority": -5}))
            .await;
        cluster.nodes(&["a1", "b1", "b2", "b3", "c1"]).await;
        for name in ["a1", "b1", "b2", "b3"] {
            let label = Patch::Merge(json!({"metadata": {"labels": {"zone": name[..1]}}}));
            cluster.api::<Node>().patch(name, &PatchParams::default(), &label).await.unwrap();
        }
        let _operator = cluster.operator("a", &[]);
        let blocks = cluster.wait_blocks(&["a1", "b1", "b2", "b3", "c1"], 1).await;
        let of_c = blocks["c1"][0].as_str();
        assert_eq!(blocks["a1"], ["10.1.0.0/24"]);
        assert!(of_c.starts_with("192.168.128.") && of_c.ends_with("/26"), "{of_c}");
        // Two of three nodes of zone b fit beside what is reserved; the third gets its block from the next range.
        let of_b: Vec<_> = ["b1", "b2", "b3"].iter().map(|n| blocks[*n][0].as_str()).collect();
        assert_eq!(
            of_b.iter().filter(|b| ["172.20.2.0/24", "172.20.3.0/24"].contains(b)).count(),
            2,
            "{of_b:?}"
        );
        assert!(of_b.iter().any(|b| b.starts_with("192.168.128.") && b.ends_with("/26")), "{of_b:?}");

        // A range added online, of a higher priority: new nodes and new blocks come from it, nothing moves.
        cluster.range("more", json!({"cidr": "10.200.0.0/16", "priority": 9})).await;
        cluster.wait_range("more", "Ready", "True", "RangeReady").await;
        cluster.node("c2", json!({}), &["172.30.0.99"]).await;
        assert_eq!(cluster.wait_blocks(&["c2"], 1).await["c2"], ["10.200.0.0/24"]);
        cluster.report("c1", &[(of_c, 50)]).await;
        assert_eq!(cluster.wait_blocks(&["c1"], 2).await["c1"], ["10.200.1.0/24", of_c]);

        // Drained online and empty, a range says that it can be deleted, and goes.
        cluster.set_allocation("a", "Draining").await;
        cluster.annotate_blocks_of("a", true).await;
        let first = "10-1-0-0-24";
        let fresh = "10.200.2.0/24";
        cluster.report("a1", &[("10.1.0.0/24", 0)]).await;
        wait_until_async("a1 gets a block of the other range", DEADLINE, async || {
            let blocks = cluster.blocks().await;
            holds(blocks.iter().any(|b| b.cidr == fresh && b.node == "a1"), format!("{blocks:?}"))
        })
        .await;
        cluster.report_until("a1", &[("10.1.0.0/24", 0), (fresh, 0)], first, BlockState::Quarantined).await;
        cluster.api::<ClusterCIDR>().delete("a", &DeleteParams::default()).await.unwrap();
        cluster.assert_disjoint().await;
    });
}

#[test]
fn a_family_that_runs_out_leaves_the_other_alone() {
    arena(|cluster| async move {
        cluster.range("four", json!({"cidr": "10.244.0.0/16"})).await;
        cluster.range("six", json!({"cidr": "fd00:1::/64", "blockPrefixLength": 64})).await;
        let unavailable = json!([{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated", "message": ""}]);
        for name in ["n1", "n2"] {
            cluster.node(name, json!({}), &["172.30.0.11", "fd00:30::11"]).await;
            cluster.patch_node_status(name, json!({"conditions": unavailable})).await;
        }
        let _operator = cluster.operator("a", &[]);
        cluster.wait_event("Node", "n2", "RangeExhausted").await;
        let blocks = cluster.wait_blocks(&["n2"], 1).await;
        let four = blocks["n2"][0].clone();
        assert!(four.starts_with("10.244."), "{blocks:?}");
        cluster.report("n2", &[(&four, 0)]).await;
        wait_until_async("n2 is ready on its IPv4 block alone", DEADLINE, async || {
            let conditions = cluster.get_node("n2").await.status.unwrap().conditions.unwrap();
            let done = conditions.iter().any(|c| c.type_ == "NetworkUnavailable" && c.status == "False");
            holds(done, format!("{conditions:?}"))
        })
        .await;
        assert_eq!(
            pod_cidrs(&cluster.get_node("n2").await),
            [] as [&str; 0],
            "write-once: it waits for IPv6"
        );
        cluster.report("n2", &[(&four, 240)]).await;
        cluster.wait_blocks(&["n2"], 2).await;
        cluster.range("six-more", json!({"cidr": "fd00:2::/56"})).await;
        cluster.wait_blocks(&["n2"], 3).await;
        wait_until_async("both families are mirrored", DEADLINE, async || {
            let mirror = pod_cidrs(&cluster.get_node("n2").await);
            holds(mirror == [four.as_str(), "fd00:2::/64"], format!("{mirror:?}"))
        })
        .await;
    });
}
