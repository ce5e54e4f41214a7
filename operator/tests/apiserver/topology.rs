//! `topologyKey`: the blocks of a zone lie together, carry its label, and the ClusterCIDR says where.

use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams};
use plat_crds::cluster_cidr::TopologyGroup;
use plat_crds::{ClusterCIDR, PodCIDR};
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::{Value, json};

use crate::arena::{Cluster, DEADLINE, arena};

const ZONE: &str = "topology.kubernetes.io/zone";

async fn label_node(cluster: &Cluster, name: &str, zone: Value) {
    let patch = Patch::Merge(json!({"metadata": {"labels": {ZONE: zone}}}));
    cluster
        .api::<k8s_openapi::api::core::v1::Node>()
        .patch(name, &PatchParams::default(), &patch)
        .await
        .unwrap();
}

async fn wait_groups(cluster: &Cluster, range: &str, expected: &[(&str, i64, i64, &[&str])]) {
    let expected: Vec<TopologyGroup> = expected
        .iter()
        .map(|(value, blocks, outside, prefixes)| TopologyGroup {
            value: Some((*value).to_owned()),
            blocks: *blocks,
            outside: *outside,
            prefix_count: prefixes.len() as i64,
            prefixes: prefixes.iter().map(|prefix| (*prefix).to_owned()).collect(),
        })
        .collect();
    wait_until_async("the status shows the groups", DEADLINE, async || {
        let range = cluster.api::<ClusterCIDR>().get(range).await.map_err(|e| e.to_string())?;
        let groups = range.status.unwrap_or_default().groups;
        holds(groups == expected, format!("{groups:?}"))
    })
    .await;
}

#[test]
fn the_default_ranges_take_their_topology_key_from_the_flag() {
    arena(|cluster| async move {
        for (index, zone) in ["a", "b", "a"].iter().enumerate() {
            let name = format!("n{index}");
            cluster.nodes(&[&name]).await;
            label_node(&cluster, &name, json!(zone)).await;
        }
        let _operator = cluster.operator("a", &["--cluster-cidr=10.244.0.0/16", "--topology-key", ZONE]);
        let blocks = cluster.wait_blocks(&["n0", "n1", "n2"], 1).await;
        let range = cluster.api::<ClusterCIDR>().get("default-v4").await.unwrap();
        assert_eq!(range.spec.topology_key.as_deref(), Some(ZONE));
        assert_eq!(
            [&blocks["n0"][0], &blocks["n1"][0], &blocks["n2"][0]],
            ["10.244.0.0/24", "10.244.128.0/24", "10.244.1.0/24"]
        );
    });
}

#[test]
fn the_blocks_of_a_zone_lie_together_and_carry_its_label_through_restart_and_change() {
    arena(|cluster| async move {
        let spec = json!({"cidr": "10.244.0.0/16", "topologyKey": ZONE});
        cluster.range("zoned", spec).await;
        let zones = [("n1", "a"), ("n2", "b"), ("n3", "a"), ("n4", "b"), ("n5", "a"), ("n6", "b")];
        for (node, zone) in &zones[..4] {
            cluster.nodes(&[node]).await;
            label_node(&cluster, node, json!(zone)).await;
        }
        let operator = cluster.operator("a", &[]);
        let blocks = cluster.wait_blocks(&["n1", "n2", "n3", "n4"], 1).await;
        let of = |node: &str| blocks[node][0].clone();
        assert_eq!([of("n1"), of("n3")], ["10.244.0.0/24", "10.244.1.0/24"]);
        assert_eq!([of("n2"), of("n4")], ["10.244.128.0/24", "10.244.129.0/24"]);
        let in_zone = async |zone: &str| {
            let params = ListParams::default().labels(&format!("{ZONE}={zone}"));
            let list = cluster.api::<PodCIDR>().list(&params).await.unwrap().items;
            list.into_iter().map(|block| block.spec.node_name).collect::<Vec<_>>()
        };
        assert_eq!(in_zone("a").await, ["n1", "n3"]);
        wait_groups(&cluster, "zoned", &[("a", 2, 0, &["10.244.0.0/23"]), ("b", 2, 0, &["10.244.128.0/23"])])
            .await;

        // Another leader knows no more than the objects say.
        assert!(operator.terminate().await.success());
        let _next = cluster.operator("b", &[]);
        for (node, zone) in &zones[4..] {
            let node = json!({"metadata": {"name": node, "labels": {ZONE: zone}}});
            let node = serde_json::from_value(node).unwrap();
            cluster
                .api::<k8s_openapi::api::core::v1::Node>()
                .create(&Default::default(), &node)
                .await
                .unwrap();
        }
        let blocks = cluster.wait_blocks(&["n5", "n6"], 1).await;
        assert_eq!([&blocks["n5"][0], &blocks["n6"][0]], ["10.244.2.0/24", "10.244.130.0/24"]);

        label_node(&cluster, "n5", json!("b")).await;
        let b = &["10.244.128.0/22", "10.244.2.0/24"][..];
        wait_groups(&cluster, "zoned", &[("a", 2, 0, &["10.244.0.0/23"]), ("b", 4, 1, b)]).await;
        assert_eq!(in_zone("b").await, ["n2", "n4", "n6", "n5"], "the block stays, its label follows");

        let mine = Patch::Merge(json!({"metadata": {"labels": {"mine": "1"}}}));
        cluster.api::<PodCIDR>().patch("10-244-0-0-24", &PatchParams::default(), &mine).await.unwrap();
        let off = Patch::Merge(json!({"spec": {"topologyKey": null}}));
        cluster.api::<ClusterCIDR>().patch("zoned", &PatchParams::default(), &off).await.unwrap();
        wait_groups(&cluster, "zoned", &[]).await;
        for name in ["10-244-0-0-24", "10-244-129-0-24", "10-244-130-0-24"] {
            cluster
                .wait_block(name, "has no label that nothing names", |b| !b.labels().contains_key(ZONE))
                .await;
        }
        let block = cluster.api::<PodCIDR>().get("10-244-0-0-24").await.unwrap();
        assert_eq!(block.labels()["mine"], "1", "a user's label stays");
        cluster.assert_no_double().await;
    });
}
