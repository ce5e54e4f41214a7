//! Blocks of single nodes: given, kept, adopted, mirrored, quarantined, given back, freed.

use kube::api::{DeleteParams, Patch, PatchParams};
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR, names};
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{DEADLINE, address, arena, condition_of, pod_cidrs};

const V4: &str = "--cluster-cidr=10.244.0.0/16";

#[test]
fn nodes_of_a_fresh_cluster_get_blocks_and_a_late_one_does_too() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2", "n3"]).await;
        let operator = cluster.operator("a", &[V4]);
        let blocks = cluster.wait_blocks(&["n1", "n2", "n3"], 1).await;
        assert_eq!(blocks["n1"], ["10.244.0.0/24"]);
        cluster.assert_no_double().await;

        let range = cluster.api::<ClusterCIDR>().get(names::DEFAULT_CLUSTER_CIDR_V4).await.unwrap();
        assert_eq!((range.spec.cidr.as_str(), range.spec.block_prefix_length), ("10.244.0.0/16", Some(24)));
        assert_eq!(range.metadata.finalizers.unwrap(), [names::CLUSTER_CIDR_FINALIZER]);
        cluster.wait_range("default-v4", "Ready", "True", "RangeReady").await;

        cluster.node("n4", json!({}), &["172.30.0.14"]).await;
        cluster.wait_blocks(&["n4"], 1).await;
        operator.wait_ready().await;
        assert_eq!(operator.ask("/livez").unwrap(), "ok: the loop turns");
        let text = cluster.wait_event("Node", "n4", "BlockAllocated").await;
        assert_eq!(text, "node n4 gets block 10.244.3.0/24 of ClusterCIDR default-v4");
        cluster.wait_event("PodCIDR", "10-244-3-0-24", "BlockAllocated").await;
        wait_until_async("the mirrors and reports are there", DEADLINE, async || {
            let mirror = pod_cidrs(&cluster.get_node("n4").await);
            let report = cluster.api::<NodeNetwork>().get_opt("n4").await.unwrap();
            holds(mirror == ["10.244.3.0/24"] && report.is_some(), format!("{mirror:?} {report:?}"))
        })
        .await;
        let block = cluster.block_of("n4").await.unwrap();
        let labels = block.metadata.labels.unwrap();
        assert_eq!(
            (labels[names::LABEL_NODE].as_str(), labels[names::LABEL_CLUSTER_CIDR].as_str()),
            ("n4", "default-v4")
        );
        assert_eq!(block.spec.node_addresses, ["172.30.0.14"]);
    });
}

#[test]
fn a_block_becomes_ready_and_converges_by_reports_and_network_unavailable_is_cleared() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2"]).await;
        let unavailable = json!([{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated", "message": ""}]);
        cluster.patch_node_status("n1", json!({"conditions": unavailable})).await;
        let _operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["n1", "n2"], 1).await;
        let no_report = |block: &PodCIDR| condition_of(block, "Ready").1 == "NoReport";
        cluster.wait_block("10-244-0-0-24", "waits for its agent", no_report).await;

        // A status moves generations of nothing, so the sum stays right while statuses are written.
        cluster.report("n1", &[("10.244.0.0/24", 7)]).await;
        cluster.report("n2", &[("10.244.1.0/24", 0)]).await;
        let done = |block: &PodCIDR| {
            let used = block.status.as_ref().and_then(|status| status.used);
            condition_of(block, "Ready").0 == "True"
                && condition_of(block, "Converged").0 == "True"
                && used == Some(7)
        };
        let block = cluster.wait_block("10-244-0-0-24", "ready, converged, used", done).await;
        let status = block.status.clone().unwrap();
        assert_eq!(
            (status.capacity, status.routing.unwrap().via.as_deref()),
            (Some(253), Some("172.30.0.11"))
        );
        assert_eq!(condition_of(&block, "NodeSpecConflict"), ("False".to_owned(), "Listed".to_owned()));
        wait_until_async("NetworkUnavailable is cleared", DEADLINE, async || {
            let conditions = cluster.get_node("n1").await.status.unwrap().conditions.unwrap();
            let of = |type_: &str| conditions.iter().find(|c| c.type_ == type_).map(|c| c.status.clone());
            let fine = of("NetworkUnavailable").as_deref() == Some("False")
                && of("Ready").as_deref() == Some("True");
            holds(fine, format!("{conditions:?}"))
        })
        .await;
        let untouched = cluster.get_node("n2").await.status.unwrap().conditions.unwrap();
        assert!(untouched.iter().all(|c| c.type_ != "NetworkUnavailable"));
    });
}

#[test]
fn a_deleted_nodes_block_rests_then_goes_back_to_it_or_is_freed_and_handed_out_last() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2"]).await;
        let operator = cluster.operator(
            "a",
            &["--cluster-cidr=10.244.0.0/22", "--quarantine-seconds=60", "--quarantine-watch-seconds=1"],
        );
        cluster.wait_blocks(&["n1", "n2"], 1).await;

        cluster.delete_node("n1").await;
        let resting =
            cluster.wait_block("10-244-0-0-24", "rests", |b| b.spec.state == BlockState::Quarantined).await;
        assert!(resting.spec.release_after.is_some());
        cluster.wait_event("PodCIDR", "10-244-0-0-24", "BlockQuarantined").await;

        let back = cluster.node("n1", json!({}), &["172.30.0.77"]).await;
        let kept = cluster
            .wait_block("10-244-0-0-24", "is n1's again", |b| b.spec.state == BlockState::Active)
            .await;
        assert_eq!((kept.spec.node_uid, kept.spec.release_after), (back.metadata.uid, None));
        let moved = |b: &PodCIDR| b.spec.node_addresses == ["172.30.0.77"];
        cluster.wait_block("10-244-0-0-24", "has n1's new address", moved).await;
        cluster.wait_event("Node", "n1", "BlockReadopted").await;

        cluster.delete_node("n1").await;
        cluster.wait_block("10-244-0-0-24", "rests", |b| b.spec.state == BlockState::Quarantined).await;
        cluster.end_quarantine("10-244-0-0-24").await;
        cluster.wait_gone("10-244-0-0-24").await;
        cluster.wait_event("PodCIDR", "10-244-0-0-24", "BlockReleased").await;
        wait_until_async("its NodeNetwork goes too", DEADLINE, async || {
            let report = cluster.api::<NodeNetwork>().get_opt("n1").await.unwrap();
            holds(report.is_none(), format!("{report:?}"))
        })
        .await;

        for (node, expected) in [("n5", "10.244.2.0/24"), ("n6", "10.244.3.0/24"), ("n7", "10.244.0.0/24")] {
            cluster.node(node, json!({}), &["172.30.0.90"]).await;
            assert_eq!(cluster.wait_blocks(&[node], 1).await[node], [expected]);
        }
        operator.wait_metric("plat_operator_nodes_without_block", 0.0).await;
    });
}

#[test]
fn a_users_routing_survives_everything_that_the_operator_writes() {
    arena(|cluster| async move {
        cluster.nodes(&["n1"]).await;
        let operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["n1"], 1).await;
        let routing = json!({"mode": "Direct", "metric": 77, "mtu": 1400});
        let patch = Patch::Merge(json!({"spec": {"routing": routing}}));
        cluster.api::<PodCIDR>().patch("10-244-0-0-24", &PatchParams::default(), &patch).await.unwrap();
        let effective = |b: &PodCIDR| {
            b.status
                .as_ref()
                .and_then(|s| s.routing.clone())
                .is_some_and(|r| (r.metric, r.mtu) == (77, Some(1400)))
        };
        cluster.wait_block("10-244-0-0-24", "its status follows", effective).await;

        cluster
            .patch_node_status("n1", json!({"addresses": [{"type": "InternalIP", "address": "172.30.0.55"}]}))
            .await;
        cluster
            .wait_block("10-244-0-0-24", "moves", |b| {
                b.spec.node_addresses.contains(&address("172.30.0.55").to_string())
            })
            .await;
        cluster.delete_node("n1").await;
        cluster.wait_block("10-244-0-0-24", "rests", |b| b.spec.state == BlockState::Quarantined).await;
        cluster.node("n1", json!({}), &["172.30.0.55"]).await;
        let block =
            cluster.wait_block("10-244-0-0-24", "is back", |b| b.spec.state == BlockState::Active).await;
        assert_eq!(json!(block.spec.routing), routing);
        assert!(operator.terminate().await.success());
        let _again = cluster.operator("b", &[V4]);
        let addresses = json!([{"$patch": "replace"}, {"type": "InternalIP", "address": "172.30.0.11"}]);
        cluster.patch_node_status("n1", json!({"addresses": addresses})).await;
        let moved = |b: &PodCIDR| b.spec.node_addresses == ["172.30.0.11"];
        let block = cluster.wait_block("10-244-0-0-24", "moves again", moved).await;
        assert_eq!(json!(block.spec.routing), routing);
    });
}

#[test]
fn pod_cidrs_of_another_network_are_adopted_where_they_fit_and_named_where_not() {
    arena(|cluster| async move {
        cluster
            .node(
                "fits",
                json!({"podCIDR": "10.244.77.0/24", "podCIDRs": ["10.244.77.0/24"]}),
                &["172.30.0.11"],
            )
            .await;
        cluster
            .node(
                "foreign",
                json!({"podCIDR": "192.168.7.0/24", "podCIDRs": ["192.168.7.0/24"]}),
                &["172.30.0.12"],
            )
            .await;
        cluster
            .node(
                "same",
                json!({"podCIDR": "10.244.77.0/24", "podCIDRs": ["10.244.77.0/24"]}),
                &["172.30.0.13"],
            )
            .await;
        let operator = cluster.operator("a", &[V4]);
        let blocks = cluster.wait_blocks(&["fits", "foreign", "same"], 1).await;
        // Created in one second, "fits" and "same" are of one age: then the name decides.
        let created = |node: k8s_openapi::api::core::v1::Node| node.metadata.creation_timestamp.unwrap().0;
        let (first, second) =
            (created(cluster.get_node("fits").await), created(cluster.get_node("same").await));
        assert!(first <= second);
        assert_eq!(blocks["fits"], ["10.244.77.0/24"]);
        cluster.wait_event("Node", "fits", "BlockAdopted").await;
        let text = cluster.wait_event("Node", "same", "PodCIDRTaken").await;
        assert!(text.contains("node fits holds 10.244.77.0/24"), "{text}");
        cluster.wait_event("Node", "foreign", "ForeignPodCIDR").await;
        for node in ["foreign", "same"] {
            let name = cluster.block_of(node).await.unwrap().metadata.name.unwrap();
            let conflict = |b: &PodCIDR| {
                condition_of(b, "NodeSpecConflict") == ("True".to_owned(), "Differs".to_owned())
            };
            cluster.wait_block(&name, "conflicts with its node's spec", conflict).await;
            cluster.wait_event("PodCIDR", &name, "NodeSpecConflict").await;
        }
        assert_eq!(pod_cidrs(&cluster.get_node("foreign").await), ["192.168.7.0/24"], "never fought over");
        assert_eq!(operator.metric(r#"plat_operator_faults{reason="PodCIDRTaken"}"#), Some(1.0));
    });
}

#[test]
fn blocks_of_both_families_are_mirrored_in_the_nodes_order_or_not_at_all_if_told_so() {
    arena(|cluster| async move {
        cluster.node("four-six", json!({}), &["172.30.0.11", "fd00:30::11"]).await;
        cluster.node("six-four", json!({}), &["fd00:30::12", "172.30.0.12"]).await;
        let operator = cluster.operator("a", &["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48"]);
        let blocks = cluster.wait_blocks(&["four-six", "six-four"], 2).await;
        let names: Vec<_> = cluster.blocks().await.into_iter().map(|b| b.cidr).collect();
        assert!(names.contains(&"fd00:10:244::/64".to_owned()), "{names:?}");
        for (node, first) in [("four-six", "10.244."), ("six-four", "fd00:")] {
            let mirror = wait_until_async("the mirror", DEADLINE, async || {
                let mirror = pod_cidrs(&cluster.get_node(node).await);
                holds(mirror.len() == 2, format!("{mirror:?}")).map(|()| mirror)
            })
            .await;
            assert!(mirror[0].starts_with(first), "{node} {mirror:?} {:?}", blocks[node]);
        }
        assert!(operator.terminate().await.success());
        let _silent = cluster
            .operator("b", &["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48", "--node-spec-mirror=false"]);
        cluster.node("later", json!({}), &["172.30.0.13", "fd00:30::13"]).await;
        cluster.wait_blocks(&["later"], 2).await;
        // The mirror is written in the pass after the block; the NodeNetwork as well, later by order.
        cluster.report("later", &[]).await;
        let name = cluster.block_of("later").await.unwrap().metadata.name.unwrap();
        cluster
            .wait_block(&name, "has its status", |b| condition_of(b, "NodeSpecConflict").1 == "NotSet")
            .await;
        assert_eq!(pod_cidrs(&cluster.get_node("later").await), [] as [&str; 0]);
    });
}

#[test]
fn a_pod_cidr_that_is_deleted_by_hand_comes_back_for_its_node() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2"]).await;
        let flags = [V4, "--node-spec-mirror=false"];
        let operator = cluster.operator("a", &flags);
        cluster.wait_blocks(&["n1", "n2"], 1).await;
        let old = cluster.api::<PodCIDR>().get("10-244-1-0-24").await.unwrap();
        cluster.api::<PodCIDR>().delete("10-244-1-0-24", &DeleteParams::default()).await.unwrap();
        let again =
            cluster.wait_block("10-244-1-0-24", "is back", |b| b.metadata.uid != old.metadata.uid).await;
        assert_eq!(again.spec.node_name, "n2");
        cluster.wait_event("Node", "n2", "BlockRecreated").await;

        // A new leader has not seen it go: then the node's report tells.
        cluster.report("n1", &[]).await;
        cluster.report("n2", &[("10.244.1.0/24", 3)]).await;
        assert!(operator.terminate().await.success());
        cluster.api::<PodCIDR>().delete("10-244-1-0-24", &DeleteParams::default()).await.unwrap();
        cluster.node("n0", json!({}), &["172.30.0.19"]).await;
        let _next = cluster.operator("b", &[V4, "--node-spec-mirror=false", "--report-wait-seconds=2"]);
        let blocks = cluster.wait_blocks(&["n0", "n1", "n2"], 1).await;
        assert_eq!(blocks["n2"], ["10.244.1.0/24"]);
        cluster.assert_no_double().await;
    });
}

#[test]
fn a_node_without_an_address_gets_its_block_and_is_named() {
    arena(|cluster| async move {
        cluster.node("bare", json!({}), &[]).await;
        let _operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["bare"], 1).await;
        cluster.wait_event("Node", "bare", "NodeHasNoAddress").await;
        cluster
            .patch_node_status(
                "bare",
                json!({"addresses": [{"type": "InternalIP", "address": "172.30.0.11"}]}),
            )
            .await;
        cluster
            .wait_block("10-244-0-0-24", "gets the address", |b| b.spec.node_addresses == ["172.30.0.11"])
            .await;
    });
}

#[test]
fn incidents_that_agents_report_become_events() {
    arena(|cluster| async move {
        cluster.nodes(&["n1"]).await;
        let _operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["n1"], 1).await;
        let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let incident = json!({"time": now, "reason": "RouteRestored", "message": "10.244.9.0/24 was removed by ip (pid 7)", "count": 2});
        let old = json!({"time": "2026-01-01T00:00:00Z", "reason": "TableRestored", "message": "long ago", "count": 1});
        cluster.report_with("n1", &[("10.244.0.0/24", 0)], json!({"incidents": [old, incident]})).await;
        let text = cluster.wait_event("Node", "n1", "RouteRestored").await;
        assert_eq!(text, "10.244.9.0/24 was removed by ip (pid 7) (2 times since the agent started)");
    });
}
