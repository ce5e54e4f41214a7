//! What users of other block allocators suffer from, against a real API server: a pool that is full and cannot
//! be changed, a crash on a podCIDR of elsewhere, one block handed out twice, a pool that was cut too coarse.

use std::collections::BTreeSet;

use kube::api::{Patch, PatchParams};
use plat_crds::ClusterCIDR;
use plat_crds::pod_cidr::BlockState;
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{Cluster, DEADLINE, Operator, arena};

async fn wait_without(operator: &Operator, expected: usize) {
    operator.wait_metric("plat_operator_nodes_without_block", expected as f64).await;
}

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|index| format!("{prefix}{index:02}")).collect()
}

async fn join(cluster: &Cluster, names: &[String]) {
    for (index, name) in names.iter().enumerate() {
        cluster.node(name, json!({}), &[&format!("172.29.0.{}", index + 1)]).await;
    }
}

#[test]
fn a_pod_cidr_of_elsewhere_in_a_full_range_crashes_nobody_and_waits_for_room() {
    arena(|cluster| async move {
        join(&cluster, &names("n", 2)).await;
        for (name, cidr) in
            [("outside", "192.168.7.0/24"), ("too-wide", "10.0.0.0/8"), ("six", "fd00:77::/64")]
        {
            cluster.node(name, json!({"podCIDR": cidr, "podCIDRs": [cidr]}), &["172.29.0.90"]).await;
        }
        // Twice: it would also crash or stall a successor, for ever.
        for life in ["one", "two"] {
            let operator = cluster.operator(life, &["--cluster-cidr=10.244.0.0/23"]);
            // The wide one claims every address of the range: nobody is given what may be in use.
            wait_without(&operator, 5).await;
            cluster.wait_event("Node", "outside", "RangeExhausted").await;
            operator.wait_ready().await;
            assert!(operator.terminate().await.success());
        }
        let operator = cluster.operator("three", &["--cluster-cidr=10.244.0.0/23"]);
        cluster.range("more", json!({"cidr": "172.20.0.0/16"})).await;
        wait_without(&operator, 0).await;
        for name in ["outside", "too-wide", "six"] {
            cluster.wait_event("Node", name, "ForeignPodCIDR").await;
        }
        cluster.assert_no_double().await;
    });
}

#[test]
fn an_exhausted_range_hands_nothing_out_twice_while_nodes_come_and_go() {
    arena(|cluster| async move {
        let (first, second) = (names("a", 20), names("b", 20));
        join(&cluster, &first).await;
        let operator = cluster.operator("a", &["--cluster-cidr=10.244.0.0/20", "--quarantine-seconds=60"]);
        wait_without(&operator, 4).await;
        for name in &first[..8] {
            cluster.delete_node(name).await;
        }
        join(&cluster, &second).await;
        wait_without(&operator, 24).await;
        wait_until_async("eight rest and are nobody's", DEADLINE, async || {
            let blocks = cluster.blocks().await;
            let resting = blocks.iter().filter(|block| block.state == BlockState::Quarantined).count();
            holds((blocks.len(), resting) == (16, 8), format!("{blocks:?}"))
        })
        .await;
        cluster.assert_no_double().await;

        cluster.node(&first[0], json!({}), &["172.29.0.1"]).await;
        wait_without(&operator, 24).await;
        let back = cluster.wait_blocks(&[&first[0]], 1).await;
        assert_eq!(back[&first[0]], ["10.244.0.0/24"], "its own rested for it");

        cluster.range("more", json!({"cidr": "10.250.0.0/16"})).await;
        wait_without(&operator, 0).await;
        cluster.assert_no_double().await;
    });
}

#[test]
fn a_cluster_whose_blocks_are_too_large_grows_online_by_a_range_of_smaller_ones() {
    arena(|cluster| async move {
        let (old, new) = (names("old", 4), names("new", 12));
        join(&cluster, &old).await;
        let operator = cluster.operator("a", &["--cluster-cidr=10.244.0.0/22"]);
        wait_without(&operator, 0).await;
        let before = cluster.wait_blocks(&["old00", "old01", "old02", "old03"], 1).await;
        let started = operator.metric("process_start_time_seconds");

        join(&cluster, &new).await;
        wait_without(&operator, 12).await;
        cluster.range("small", json!({"cidr": "10.250.0.0/24", "blockPrefixLength": 28})).await;
        wait_without(&operator, 0).await;
        let blocks = cluster.blocks().await;
        let small = blocks.iter().filter(|block| block.cidr.ends_with("/28")).count();
        assert_eq!((blocks.len(), small), (16, 12));
        for block in &blocks {
            assert!(
                before.get(&block.node).is_none_or(|own| *own == [block.cidr.as_str()]),
                "{block:?} has moved"
            );
        }

        // The old one is taken out of use while its nodes run on it, and back into it.
        for (allocation, node, range) in [("Draining", "next00", "10.250."), ("Enabled", "next01", "10.250.")]
        {
            let patch = Patch::Merge(json!({"spec": {"allocation": allocation}}));
            cluster.api::<ClusterCIDR>().patch("default-v4", &PatchParams::default(), &patch).await.unwrap();
            cluster.node(node, json!({}), &["172.29.0.99"]).await;
            let blocks = cluster.wait_blocks(&[node], 1).await;
            assert!(blocks[node][0].starts_with(range), "{blocks:?}");
        }
        let nodes: BTreeSet<_> = cluster.blocks().await.into_iter().map(|block| block.node).collect();
        assert_eq!((nodes.len(), operator.metric("process_start_time_seconds")), (18, started));
        cluster.assert_no_double().await;
    });
}
