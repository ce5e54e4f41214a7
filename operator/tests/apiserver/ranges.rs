//! ClusterCIDRs: defaults, overlap, exhaustion, the finalizer.

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, PodCIDR, names};
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{DEADLINE, arena};

const V4: &str = "--cluster-cidr=10.244.0.0/16";

#[test]
fn default_ranges_are_created_only_beside_no_range_of_their_family_and_never_changed() {
    arena(|cluster| async move {
        cluster.range("mine", json!({"cidr": "10.9.0.0/16", "blockPrefixLength": 26})).await;
        cluster.nodes(&["n1"]).await;
        let operator = cluster.operator("a", &["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48"]);
        let blocks = cluster.wait_blocks(&["n1"], 2).await;
        assert!(blocks["n1"].contains(&"10.9.0.0/26".to_owned()), "{blocks:?}");
        let names = async || {
            let list = cluster.api::<ClusterCIDR>().list(&ListParams::default()).await.unwrap();
            list.items.into_iter().filter_map(|range| range.metadata.name).collect::<Vec<_>>()
        };
        assert_eq!(names().await, ["default-v6", "mine"]);
        let mine = cluster.api::<ClusterCIDR>().get("mine").await.unwrap();
        assert_eq!(mine.metadata.finalizers.unwrap(), [names::CLUSTER_CIDR_FINALIZER]);

        let drain = Patch::Merge(json!({"spec": {"allocation": "Draining", "priority": 5}}));
        cluster.api::<ClusterCIDR>().patch("default-v6", &PatchParams::default(), &drain).await.unwrap();
        assert!(operator.terminate().await.success());
        let other = cluster.operator("b", &["--cluster-cidr=10.244.0.0/16,fd00:99::/48"]);
        cluster.wait_event("ClusterCIDR", "default-v6", "ClusterCIDRFlagIgnored").await;
        let kept = cluster.api::<ClusterCIDR>().get("default-v6").await.unwrap();
        assert_eq!((kept.spec.cidr.as_str(), kept.spec.priority), ("fd00:10:244::/48", 5));
        assert_eq!(names().await, ["default-v6", "mine"]);
        cluster.wait_range("default-v6", "Ready", "True", "Draining").await;
        drop(other);
    });
}

#[test]
fn a_users_range_gets_its_default_block_size_and_the_finalizer() {
    arena(|cluster| async move {
        cluster.range("six", json!({"cidr": "fd00:1::/48"})).await;
        cluster.nodes(&["n1"]).await;
        let _operator = cluster.operator("a", &[]);
        let blocks = cluster.wait_blocks(&["n1"], 1).await;
        assert_eq!(blocks["n1"], ["fd00:1::/64"]);
        let range = cluster.api::<ClusterCIDR>().get("six").await.unwrap();
        assert_eq!(range.spec.block_prefix_length, Some(64));
    });
}

#[test]
fn a_range_sized_by_its_nodes_waits_for_the_first_and_takes_what_the_largest_can_hold() {
    arena(|cluster| async move {
        let selector = json!({"matchLabels": {"kubernetes.io/hostname": "big"}});
        cluster
            .range("big", json!({"cidr": "10.9.0.0/16", "blockSizing": "MaxPods", "nodeSelector": selector}))
            .await;
        cluster.nodes(&["n1"]).await;
        cluster.patch_node_status("n1", json!({"allocatable": {"pods": "40"}})).await;
        let _operator = cluster.operator("a", &[V4, "--block-sizing=MaxPods"]);
        // A range of the family exists, so the default one is not made; and no node is selected by that one yet.
        let message = cluster.wait_range("big", "Ready", "False", "WaitingForNode").await;
        assert!(message.contains("the first node that it selects"), "{message}");
        let waiting = cluster.api::<ClusterCIDR>().get("big").await.unwrap();
        assert_eq!((waiting.spec.block_prefix_length, waiting.status.unwrap().blocks), (None, None));

        let label = Patch::Merge(json!({"metadata": {"labels": {"kubernetes.io/hostname": "big"}}}));
        cluster.patch_node_status("n1", json!({"allocatable": {"pods": "2k"}})).await;
        cluster.api::<Node>().patch("n1", &PatchParams::default(), &label).await.unwrap();
        assert_eq!(cluster.wait_blocks(&["n1"], 1).await["n1"], ["10.9.0.0/20"]);
        cluster.wait_event("ClusterCIDR", "big", "BlockSizeChosen").await;
    });
}

#[test]
fn the_default_range_is_sized_by_the_first_node_where_that_is_asked_for() {
    arena(|cluster| async move {
        let _operator = cluster.operator("a", &[V4, "--block-sizing=MaxPods"]);
        cluster.wait_range("default-v4", "Ready", "False", "WaitingForNode").await;
        cluster.nodes(&["n1"]).await;
        cluster.patch_node_status("n1", json!({"allocatable": {"pods": "40"}})).await;
        assert_eq!(cluster.wait_blocks(&["n1"], 1).await["n1"], ["10.244.0.0/26"]);
    });
}

#[test]
fn a_range_that_fills_up_day_by_day_warns_ahead_also_after_a_restart() {
    arena(|cluster| async move {
        cluster
            .range(
                "grows",
                json!({"cidr": "10.9.0.0/20", "blockPrefixLength": 24, "reserved": ["10.9.0.0/21"]}),
            )
            .await;
        let operator = cluster.operator("a", &[]);
        cluster.wait_range("grows", "Exhausted", "False", "BlocksFree").await;
        let forecast = async || {
            cluster.api::<ClusterCIDR>().get("grows").await.unwrap().status.unwrap().forecast.unwrap()
        };
        assert_eq!((forecast().await.peaks, forecast().await.exhausted_at), (vec![8], None));
        assert!(operator.terminate().await.success());

        // Ten days, as an operator would have seen them.
        let day = 24 * 3600;
        let since = Timestamp::from_second((Timestamp::now().as_second() / day - 10) * day).unwrap();
        let seen = json!({"growth": 0, "since": since, "peaks": [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 8]});
        let status = Patch::Merge(json!({"status": {"forecast": seen}}));
        cluster.api::<ClusterCIDR>().patch_status("grows", &PatchParams::default(), &status).await.unwrap();
        let _other = cluster.operator("b", &[]);
        let message = cluster.wait_range("grows", "Exhausted", "False", "RunsOutSoon").await;
        assert!(message.contains("its 16 blocks are used up by"), "{message}");
        cluster.wait_event("ClusterCIDR", "grows", "RunsOutSoon").await;
        assert!(forecast().await.growth > 0 && forecast().await.exhausted_at.is_some());
    });
}

#[test]
fn a_range_that_overlaps_is_named_and_refused_and_nothing_is_carved_from_it() {
    arena(|cluster| async move {
        cluster.nodes(&["n1"]).await;
        let _operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["n1"], 1).await;
        // A live cluster, and what its administrator might well try as a second range.
        cluster.range("a-wide-one", json!({"cidr": "10.0.0.0/8", "priority": 100})).await;
        let message = cluster.wait_range("a-wide-one", "Ready", "False", "OverlapsClusterCIDR").await;
        assert!(
            message.contains(
                "10.0.0.0/8 shares addresses with the older ClusterCIDR default-v4 (10.244.0.0/16)"
            ),
            "{message}"
        );
        cluster.wait_range("a-wide-one", "Overlapping", "True", "OverlapsClusterCIDR").await;
        cluster.wait_event("ClusterCIDR", "a-wide-one", "RangeOverlapping").await;

        cluster.range("services", json!({"cidr": "10.96.0.0/12", "priority": 100})).await;
        cluster.range("nodes", json!({"cidr": "172.16.0.0/12", "priority": 100})).await;
        // "a-wide-one" is older, or as old and first by name: that it is refused itself does not make room.
        cluster.wait_range("services", "Ready", "False", "OverlapsClusterCIDR").await;
        let message = cluster.wait_range("nodes", "Ready", "False", "OverlapsAPIServer").await;
        assert!(message.contains("172.30.0.1"), "{message}");
        cluster.api::<ClusterCIDR>().delete("a-wide-one", &DeleteParams::default()).await.unwrap();
        let message = cluster.wait_range("services", "Ready", "False", "OverlapsServiceRange").await;
        assert!(message.contains("10.96.0.0/16"), "{message}");

        cluster.node("n2", json!({}), &["192.168.1.5"]).await;
        cluster.range("a-node", json!({"cidr": "192.168.0.0/16", "priority": 100})).await;
        let message = cluster.wait_range("a-node", "Ready", "False", "OverlapsNodeAddress").await;
        assert!(message.contains("192.168.1.5, the address of node n2"), "{message}");

        let blocks = cluster.wait_blocks(&["n1", "n2"], 1).await;
        assert!(blocks.values().flatten().all(|block| block.starts_with("10.244.")), "{blocks:?}");
        cluster.wait_range("default-v4", "Ready", "True", "RangeReady").await;
    });
}

#[test]
fn a_full_range_is_named_once_and_another_range_helps() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2", "n3"]).await;
        let operator = cluster.operator("a", &["--cluster-cidr=10.244.0.0/23"]);
        cluster.wait_range("default-v4", "Exhausted", "True", "RangeExhausted").await;
        cluster.wait_event("ClusterCIDR", "default-v4", "RangeExhausted").await;
        wait_until_async("two have a block, one has not", DEADLINE, async || {
            let without = operator.metric("plat_operator_nodes_without_block");
            let blocks = cluster.blocks().await.len();
            holds(without == Some(1.0) && blocks == 2, format!("{without:?} {blocks}"))
        })
        .await;
        cluster.wait_event("Node", "n3", "RangeExhausted").await;
        cluster.range("more", json!({"cidr": "10.250.0.0/16"})).await;
        let blocks = cluster.wait_blocks(&["n1", "n2", "n3"], 1).await;
        assert_eq!(blocks["n3"], ["10.250.0.0/24"]);
        operator.wait_metric("plat_operator_nodes_without_block", 0.0).await;
    });
}

#[test]
fn selectors_choose_nodes_and_their_labels_are_copied() {
    arena(|cluster| async move {
        cluster.range("all", json!({"cidr": "10.244.0.0/16"})).await;
        cluster.range("edge", json!({"cidr": "10.9.0.0/16", "priority": 1, "nodeSelector": {"matchLabels": {"edge": "yes"}}})).await;
        cluster.nodes(&["n1", "n2"]).await;
        let label = Patch::Merge(json!({"metadata": {"labels": {"edge": "yes"}}}));
        let nodes = cluster.api::<Node>();
        nodes.patch("n2", &PatchParams::default(), &label).await.unwrap();
        let _operator = cluster.operator("a", &[]);
        let blocks = cluster.wait_blocks(&["n1", "n2"], 1).await;
        assert_eq!((blocks["n1"][0].as_str(), blocks["n2"][0].as_str()), ("10.244.0.0/24", "10.9.0.0/24"));
        let has = |block: &PodCIDR, value: Option<&str>| {
            block.metadata.labels.as_ref().and_then(|labels| labels.get("edge")).map(String::as_str) == value
        };
        cluster.wait_block("10-9-0-0-24", "has the node's label", |b| has(b, Some("yes"))).await;
        let gone = Patch::Merge(json!({"metadata": {"labels": {"edge": null}}}));
        nodes.patch("n2", &PatchParams::default(), &gone).await.unwrap();
        let block = cluster.wait_block("10-9-0-0-24", "loses it with the node", |b| has(b, None)).await;
        assert_eq!(
            (block.spec.node_name.as_str(), block.spec.state),
            ("n2", BlockState::Active),
            "carved is kept"
        );
    });
}

#[test]
fn a_deleted_range_stays_until_its_last_block_is_gone() {
    arena(|cluster| async move {
        cluster.range("old", json!({"cidr": "10.9.0.0/16"})).await;
        cluster.nodes(&["n1"]).await;
        let _operator = cluster.operator("a", &["--quarantine-watch-seconds=1"]);
        cluster.wait_blocks(&["n1"], 1).await;
        cluster.api::<ClusterCIDR>().delete("old", &DeleteParams::default()).await.unwrap();
        cluster.wait_range("old", "Ready", "False", "Terminating").await;
        cluster.delete_node("n1").await;
        cluster.wait_block("10-9-0-0-24", "rests", |b| b.spec.state == BlockState::Quarantined).await;
        cluster.end_quarantine("10-9-0-0-24").await;
        wait_until_async("the range is gone", DEADLINE, async || {
            let range = cluster.api::<ClusterCIDR>().get_opt("old").await.unwrap();
            holds(range.is_none(), format!("{range:?}"))
        })
        .await;
    });
}

#[test]
fn cleanup_lets_go_of_every_range_and_gives_nothing_out() {
    arena(|cluster| async move {
        cluster.nodes(&["n1"]).await;
        let operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["n1"], 1).await;
        assert!(operator.terminate().await.success());
        let cleaning = cluster.operator("b", &[V4, "--cleanup"]);
        cleaning.wait_ready().await;
        let range = cluster.api::<ClusterCIDR>().get("default-v4").await.unwrap();
        assert_eq!(
            range.metadata.finalizers.unwrap_or_default(),
            [] as [&str; 0],
            "Ready means that it is done"
        );
        cluster.node("n2", json!({}), &["172.30.0.12"]).await;
        cluster.api::<ClusterCIDR>().delete("default-v4", &DeleteParams::default()).await.unwrap();
        wait_until_async("the range goes at once, though n1 has a block of it", DEADLINE, async || {
            let range = cluster.api::<ClusterCIDR>().get_opt("default-v4").await.unwrap();
            holds(range.is_none(), format!("{range:?}"))
        })
        .await;
        assert_eq!(cluster.blocks().await.len(), 1);
        assert!(cleaning.terminate().await.success());
    });
}
