//! RoutingPolicies: the labels that they name, and how far a change goes by what nodes report.

use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use plat_crds::routing_policy::Phase;
use plat_crds::{RoutingPolicy, condition};
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::{Value, json};

use crate::arena::{Cluster, DEADLINE, arena};

const V4: &str = "--cluster-cidr=10.244.0.0/16";

async fn create(cluster: &Cluster, name: &str, spec: Value) -> RoutingPolicy {
    let object = serde_json::from_value(json!({
        "apiVersion": "plat.network/v1alpha1", "kind": "RoutingPolicy", "metadata": {"name": name}, "spec": spec,
    }));
    cluster.api::<RoutingPolicy>().create(&PostParams::default(), &object.unwrap()).await.unwrap()
}

async fn change(cluster: &Cluster, name: &str, spec: Value) -> RoutingPolicy {
    let patch = Patch::Merge(json!({"spec": spec}));
    cluster.api::<RoutingPolicy>().patch(name, &PatchParams::default(), &patch).await.unwrap()
}

/// Waits until the newest generation has that phase and its condition that reason; answers the object and the message.
async fn wait(
    cluster: &Cluster,
    name: &str,
    phase: Option<Phase>,
    type_: &str,
    reason: &str,
) -> (RoutingPolicy, String) {
    wait_until_async(&format!("{name} is {phase:?}, {type_} {reason}"), DEADLINE, async || {
        let policy = cluster.api::<RoutingPolicy>().get(name).await.map_err(|e| e.to_string())?;
        let status = policy.status.clone().unwrap_or_default();
        let said = condition::find(&status.conditions, type_).cloned();
        let fits = status.phase == phase
            && status.observed_generation == policy.metadata.generation
            && said.as_ref().is_some_and(|c| c.reason == reason);
        holds(fits, format!("{:?} {status:?}", policy.metadata.generation))
            .map(|()| (policy, said.map(|c| c.message).unwrap_or_default()))
    })
    .await
}

/// The node's agent says that of the policy's newest generation.
async fn says(cluster: &Cluster, node: &str, policy: &RoutingPolicy, state: &str, message: Option<&str>) {
    let block = cluster.block_of(node).await.unwrap().spec.cidr;
    let mut report = json!({
        "name": policy.name_any(), "uid": policy.uid(), "generation": policy.metadata.generation,
        "state": state, "blocks": 1,
    });
    if let Some(message) = message {
        report["message"] = json!(message);
    }
    cluster.report_with(node, &[(&block, 0)], json!({"policies": [report]})).await;
}

async fn label_node(cluster: &Cluster, name: &str, labels: Value) {
    let patch = Patch::Merge(json!({"metadata": {"labels": labels}}));
    let nodes = cluster.api::<k8s_openapi::api::core::v1::Node>();
    nodes.patch(name, &PatchParams::default(), &patch).await.unwrap();
}

async fn wait_label(cluster: &Cluster, node: &str, key: &str, value: Option<&str>) {
    let name = cluster.block_of(node).await.unwrap().name_any();
    let what = format!("has {key} {value:?}");
    cluster.wait_block(&name, &what, |b| b.labels().get(key).map(String::as_str) == value).await;
}

#[test]
fn the_labels_that_policies_name_are_copied_kept_and_taken_away_again() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2"]).await;
        label_node(&cluster, "n1", json!({"zone": "a", "rack": "1", "disk": "fast", "other": "x"})).await;
        let _operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["n1", "n2"], 1).await;
        let spec = json!({
            "destinations": {"matchLabels": {"zone": "a"}},
            "sources": {"matchExpressions": [{"key": "rack", "operator": "NotIn", "values": ["1"]}]},
            "rollout": {"canary": {"matchLabels": {"disk": "fast"}}},
        });
        create(&cluster, "p", spec).await;
        for (key, value) in [("zone", "a"), ("rack", "1"), ("disk", "fast")] {
            wait_label(&cluster, "n1", key, Some(value)).await;
        }
        let block = cluster.block_of("n1").await.unwrap();
        assert!(!block.labels().contains_key("other"), "{:?}", block.labels());
        let (_, message) = wait(&cluster, "p", Some(Phase::Canary), "Ready", "Valid").await;
        assert_eq!(message, "it selects 1 nodes and 1 blocks");

        label_node(&cluster, "n1", json!({"zone": "b", "disk": null})).await;
        label_node(&cluster, "n2", json!({"zone": "b"})).await;
        for (node, key, value) in [("n1", "zone", Some("b")), ("n1", "disk", None), ("n2", "zone", Some("b"))]
        {
            wait_label(&cluster, node, key, value).await;
        }
        // A new block has them from the start.
        let node = json!({"metadata": {"name": "n3", "labels": {"zone": "c"}}});
        let nodes = cluster.api::<k8s_openapi::api::core::v1::Node>();
        nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
        cluster.wait_blocks(&["n3"], 1).await;
        assert_eq!(cluster.block_of("n3").await.unwrap().labels()["zone"], "c");

        cluster.api::<RoutingPolicy>().delete("p", &DeleteParams::default()).await.unwrap();
        for (node, key) in [("n1", "zone"), ("n1", "rack"), ("n2", "zone"), ("n3", "zone")] {
            wait_label(&cluster, node, key, None).await;
        }
    });
}

#[test]
fn a_change_goes_from_the_canaries_to_all_nodes_and_back_if_one_goes_back() {
    arena(|cluster| async move {
        cluster.nodes(&["n1", "n2", "n3"]).await;
        label_node(&cluster, "n1", json!({"canary": "yes"})).await;
        let operator = cluster.operator("a", &[V4]);
        cluster.wait_blocks(&["n1", "n2", "n3"], 1).await;
        let canary = json!({"canary": {"matchLabels": {"canary": "yes"}}, "observeSeconds": 10});
        let policy = create(&cluster, "p", json!({"routing": {"mtu": 1400}, "rollout": canary})).await;
        wait(&cluster, "p", Some(Phase::Canary), "Applied", "Canary").await;
        cluster.wait_event("RoutingPolicy", "p", "Canary").await;
        says(&cluster, "n1", &policy, "Trying", None).await;
        says(&cluster, "n1", &policy, "Failed", Some("mtu is above the device's")).await;
        let (_, message) = wait(&cluster, "p", Some(Phase::Canary), "Applied", "FailedOnNode").await;
        assert!(message.contains("n1: mtu is above"), "{message}");
        says(&cluster, "n1", &policy, "Applied", None).await;
        wait(&cluster, "p", Some(Phase::Rolling), "Applied", "Rolling").await;
        says(&cluster, "n2", &policy, "Applied", None).await;

        // The leader that comes next decides the same.
        assert!(operator.terminate().await.success());
        let _next = cluster.operator("b", &[V4]);
        says(&cluster, "n3", &policy, "Applied", None).await;
        let (done, _) = wait(&cluster, "p", Some(Phase::Complete), "Applied", "Complete").await;
        let good = |policy: &RoutingPolicy| {
            let good = policy.status.as_ref().unwrap().last_good.clone().unwrap();
            (good.generation, good.spec.routing.mtu)
        };
        assert_eq!(good(&done), (1, Some(1400)));
        let nodes = done.status.as_ref().unwrap().nodes.unwrap();
        assert_eq!((nodes.selected, nodes.applied, nodes.failed), (3, 3, 0));
        cluster.wait_event("RoutingPolicy", "p", "Complete").await;

        // Without a rollout all may follow at once; one that goes back takes all back.
        let policy = change(&cluster, "p", json!({"routing": {"mtu": 1300}, "rollout": null})).await;
        wait(&cluster, "p", Some(Phase::Rolling), "Applied", "Rolling").await;
        says(&cluster, "n2", &policy, "RolledBack", Some("10.244.0.0/24 does not answer any more")).await;
        let (back, message) = wait(&cluster, "p", Some(Phase::RolledBack), "Applied", "RolledBack").await;
        assert!(message.contains("node n2 went back: 10.244.0.0/24 does not answer"), "{message}");
        assert_eq!((good(&back), back.spec.routing.mtu), ((1, Some(1400)), Some(1300)), "no spec is edited");
        let text = cluster.wait_event("RoutingPolicy", "p", "RolledBack").await;
        assert!(text.contains("generation 2 is taken back"), "{text}");
        for node in ["n1", "n2", "n3"] {
            says(&cluster, node, &policy, "Applied", None).await;
        }
        let policy = change(&cluster, "p", json!({"mode": "Plan"})).await;
        says(&cluster, "n1", &policy, "Planned", None).await;
        let (planned, _) = wait(&cluster, "p", Some(Phase::Planned), "Applied", "Planned").await;
        assert_eq!(
            good(&planned),
            (1, Some(1400)),
            "of a planned version and one that was taken back nothing is kept"
        );
    });
}

#[test]
fn a_cluster_whose_crds_are_of_before_gets_its_blocks_and_its_policies_once_the_kind_is_there() {
    arena(|cluster| async move {
        cluster.plane.kubectl(&["delete", "crd", "routingpolicies.plat.network", "--timeout=30s"]).unwrap();
        cluster.nodes(&["n1"]).await;
        let operator = cluster.operator("a", &[V4]);
        let blocks = cluster.wait_blocks(&["n1"], 1).await;
        operator.wait_ready().await;
        assert!(operator.log().contains("going on without it"), "{}", operator.log());
        cluster.plane.install_crds().unwrap();
        wait_until_async("the kind is served", DEADLINE, async || {
            let list = cluster.api::<RoutingPolicy>().list(&Default::default()).await;
            list.map(drop).map_err(|e| e.to_string())
        })
        .await;
        let bad = json!({"matchExpressions": [{"key": "zone", "operator": "In"}]});
        create(&cluster, "p", json!({"sources": bad})).await;
        wait(&cluster, "p", Some(Phase::Rolling), "Ready", "SelectsNothing").await;
        assert_eq!(cluster.wait_blocks(&["n1"], 1).await, blocks);
    });
}
