//! Objects that somebody edits, forges or deletes by hand: what the user is told, and that nothing is given out
//! twice meanwhile. There is no admission policy here: whoever does this has every right.

use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR};
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;
use std::time::Duration;

use crate::arena::{Cluster, DEADLINE, arena};
use crate::observer::Observer;
use crate::proxy::{Fault, Proxy, on};

const V4: &str = "--cluster-cidr=10.244.0.0/16";

async fn forge(cluster: &Cluster, cidr: &str, range: &str, node: &str) {
    let name = cidr.parse::<plat_crds::Block>().unwrap().object_name();
    let object = serde_json::from_value(json!({
        "apiVersion": "plat.network/v1alpha1", "kind": "PodCIDR", "metadata": {"name": name},
        "spec": {"cidr": cidr, "clusterCIDR": range, "nodeName": node},
    }));
    cluster.api::<PodCIDR>().create(&PostParams::default(), &object.unwrap()).await.unwrap();
}

#[test]
fn forged_pod_cidrs_are_named_with_their_cure_and_cost_no_node_its_block() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2"]).await;
        let _operator = cluster.operator("a", &[V4, "--quarantine-seconds=60"]);
        cluster.wait_blocks(&["n1", "n2"], 1).await;
        cluster
            .range("other", json!({"cidr": "10.9.0.0/16", "blockPrefixLength": 24, "allocation": "Draining"}))
            .await;
        cluster.wait_range("other", "Ready", "True", "Draining").await;

        for (cidr, range, node, why) in [
            ("192.168.7.0/24", "nowhere", "n3", "there is no ClusterCIDR nowhere"),
            (
                "192.168.8.0/24",
                "default-v4",
                "n4",
                "it does not lie in ClusterCIDR default-v4 (10.244.0.0/16)",
            ),
            ("10.9.4.0/22", "other", "n5", "blocks of ClusterCIDR other are /24"),
        ] {
            forge(&cluster, cidr, range, node).await;
            let name = cidr.parse::<plat_crds::Block>().unwrap().object_name();
            let text = cluster.wait_event("PodCIDR", &name, "ForeignPodCIDRObject").await;
            assert!(text.contains(why) && text.contains("delete it"), "{text}");
        }
        // Over blocks that are in use. Times of creation are whole seconds, and the older one is in the right.
        let created = cluster.block_of("n1").await.unwrap().metadata.creation_timestamp.unwrap().0;
        wait_until_async("it is later", DEADLINE, async || {
            let now = k8s_openapi::jiff::Timestamp::now().as_second();
            holds(now > created.as_second(), now)
        })
        .await;
        forge(&cluster, "10.244.0.0/23", "default-v4", "n6").await;
        let text = cluster.wait_event("PodCIDR", "10-244-0-0-23", "PodCIDRsOverlap").await;
        assert!(text.contains("older PodCIDR 10-244-0-0-24 of node n1"), "{text}");

        // What is forged is taken, whoever holds it: nobody gets a part of it, and nobody loses what it has.
        cluster.node("n7", json!({}), &["172.30.0.17"]).await;
        let blocks = cluster.wait_blocks(&["n1", "n2", "n7"], 1).await;
        assert_eq!((blocks["n1"][0].as_str(), blocks["n2"][0].as_str()), ("10.244.0.0/24", "10.244.1.0/24"));
        assert!(blocks["n7"][0].starts_with("10.244."), "{blocks:?}");
    });
}

#[test]
fn a_range_that_is_deleted_in_use_says_what_keeps_it_and_gives_nothing_more() {
    arena(|cluster| async move {
        cluster.range("old", json!({"cidr": "10.9.0.0/16"})).await;
        cluster.nodes(&["n1", "n2"]).await;
        let _operator = cluster.operator("a", &[]);
        cluster.wait_blocks(&["n1", "n2"], 1).await;
        cluster.api::<ClusterCIDR>().delete("old", &DeleteParams::default()).await.unwrap();
        let message = cluster.wait_range("old", "Ready", "False", "Terminating").await;
        assert!(message.contains("2 left") && message.contains("10-9-0-0-24 of node n1"), "{message}");
        let text = cluster.wait_event("ClusterCIDR", "old", "Terminating").await;
        assert!(text.contains("plat.network/clustercidr=old"), "{text}");
        cluster.node("n3", json!({}), &["172.30.0.13"]).await;
        let text = cluster.wait_event("Node", "n3", "NoClusterCIDR").await;
        assert!(text.contains("add a ClusterCIDR"), "{text}");
        assert_eq!(cluster.wait_blocks(&["n1", "n2"], 1).await["n1"], ["10.9.0.0/24"], "what is held stays");
    });
}

#[test]
fn nodes_with_one_address_are_both_named_and_one_with_two_is_reached_by_its_first() {
    arena(|cluster| async move {
        cluster.node("two", json!({}), &["172.30.0.11", "172.30.1.11", "fd00:30::11"]).await;
        let operator = cluster.operator("a", &["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48"]);
        cluster.wait_blocks(&["two"], 2).await;
        for (name, via) in [("10-244-0-0-24", "172.30.0.11"), ("fd00-10-244---64", "fd00:30::11")] {
            let first = |b: &PodCIDR| {
                let routing = b.status.as_ref().and_then(|status| status.routing.as_ref());
                routing.and_then(|routing| routing.via.as_deref()) == Some(via)
            };
            let block =
                cluster.wait_block(name, "is reached by the first address of its family", first).await;
            assert_eq!(block.spec.node_addresses, ["172.30.0.11", "172.30.1.11", "fd00:30::11"]);
        }

        // Renamed: its kubelet registers under another name while the old Node is still there.
        cluster.node("renamed", json!({}), &["172.30.0.11"]).await;
        cluster.wait_blocks(&["two", "renamed"], 2).await;
        for (node, other) in [("two", "renamed"), ("renamed", "two")] {
            let text = cluster.wait_event("Node", node, "NodeAddressShared").await;
            assert!(text.contains("172.30.0.11") && text.contains(&format!("node {other}:")), "{text}");
            assert!(text.contains("--node-ip"), "{text}");
        }
        let shared = r#"plat_operator_faults{reason="NodeAddressShared"}"#;
        assert_eq!(operator.metric(shared), Some(2.0));
        cluster.delete_node("two").await;
        cluster.wait_block("10-244-0-0-24", "rests", |b| b.spec.state == BlockState::Quarantined).await;
        wait_until_async("nobody shares any more", DEADLINE, async || {
            let faults = operator.metric(shared);
            holds(faults.is_none_or(|count| count == 0.0), format!("{faults:?}"))
        })
        .await;
        assert_eq!(cluster.wait_blocks(&["renamed"], 2).await["renamed"].len(), 2);
    });
}

#[test]
fn a_report_that_is_forged_or_deleted_takes_nothing_from_anybody() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2"]).await;
        let _operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["n1", "n2"], 1).await;
        let observer = Observer::start(&cluster.client, Duration::from_secs(60)).await;
        // n2 says that it leases from n1's block, and from everything.
        cluster.report("n2", &[("10.244.1.0/24", 1), ("10.244.0.0/24", 5), ("10.244.0.0/16", 9)]).await;
        let text = cluster.wait_event("Node", "n2", "HeldBlockTaken").await;
        assert!(text.contains("drain node n2"), "{text}");
        cluster.node("n3", json!({}), &["172.30.0.13"]).await;
        assert_eq!(cluster.wait_blocks(&["n3"], 1).await["n3"], ["10.244.2.0/24"]);

        let object = serde_json::from_value(json!({
            "apiVersion": "plat.network/v1alpha1", "kind": "NodeNetwork", "metadata": {"name": "nobody"}
        }));
        let reports = cluster.api::<NodeNetwork>();
        reports.create(&PostParams::default(), &object.unwrap()).await.unwrap();
        let before = reports.get("n1").await.unwrap().metadata.uid;
        reports.delete("n1", &DeleteParams::default()).await.unwrap();
        wait_until_async("n1 can report again, and nobody cannot", DEADLINE, async || {
            let again = reports.get_opt("n1").await.unwrap();
            let nobody = reports.get_opt("nobody").await.unwrap();
            let fine = again.is_some_and(|report| report.metadata.uid != before) && nobody.is_none();
            holds(fine, "not yet")
        })
        .await;
        observer.finish().await;
    });
}

#[test]
fn without_its_lease_or_the_right_to_it_the_operator_ends_says_why_and_comes_back() {
    arena(|cluster| async move {
        cluster.nodes(&["n1"]).await;
        let proxy = Proxy::start(cluster.plane, cluster.client.clone()).await;
        let flags = [V4, "--lease-retry-milliseconds=200"];
        let mut operator = proxy.operator(cluster.plane, "a", &flags);
        cluster.wait_blocks(&["n1"], 1).await;
        let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), "plat-system");
        leases.delete("plat-operator", &DeleteParams::default()).await.unwrap();
        assert!(!operator.wait_end().await.success());
        assert!(
            operator.log().contains("lost the leader Lease to nobody: it was deleted"),
            "{}",
            operator.log()
        );

        // The Role is gone.
        let forbidden = proxy.inject(usize::MAX, on("*", "leases"), Fault::Answer(403));
        let operator = proxy.operator(cluster.plane, "b", &flags);
        operator.wait_log("cannot read the leader Lease").await;
        operator.wait_log("Role").await;
        forbidden.wait_struck().await;
        assert!(operator.ask("/livez").is_ok());
        cluster.node("n2", json!({}), &["172.30.0.12"]).await;
        proxy.heal();
        let blocks = cluster.wait_blocks(&["n1", "n2"], 1).await;
        assert_eq!(blocks["n1"], ["10.244.0.0/24"]);

        // Somebody writes nonsense into it.
        let nonsense =
            Patch::Merge(json!({"spec": {"holderIdentity": "", "leaseDurationSeconds": 2_000_000}}));
        leases.patch("plat-operator", &PatchParams::default(), &nonsense).await.unwrap();
        let mut operator = operator;
        assert!(!operator.wait_end().await.success(), "one that does not hold it does not lead");
        let _next = proxy.operator(cluster.plane, "c", &flags);
        cluster.node("n3", json!({}), &["172.30.0.13"]).await;
        cluster.wait_blocks(&["n1", "n2", "n3"], 1).await;
        cluster.assert_no_double().await;
    });
}
