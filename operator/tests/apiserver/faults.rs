//! What happens to the cluster around the operator: no CRDs yet, CRDs deleted, etcd put back.

use std::sync::LazyLock;

use kube::api::ListParams;
use plat_crds::{NodeNetwork, PodCIDR};
use plat_e2e::light::ControlPlane;
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{Cluster, DEADLINE};

/// A control plane of the test's own, which it may break.
fn own(test: impl AsyncFnOnce(Cluster) + Send) {
    static FIRST: LazyLock<ControlPlane> = LazyLock::new(|| ControlPlane::up().unwrap());
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    FIRST.block_on(|client| test(Cluster { plane: &FIRST, client }));
}

#[test]
fn it_waits_for_its_kinds_survives_their_deletion_and_gives_no_block_twice_after_a_restore() {
    own(async |cluster| {
        cluster.namespaces().await;
        let flags = ["--cluster-cidr=10.244.0.0/16", "--node-spec-mirror=false", "--report-wait-seconds=5"];
        let operator = cluster.operator("a", &flags);
        cluster.nodes(&["n1", "n2"]).await;
        operator.wait_log("waiting for its CRD").await;
        cluster.plane.install_crds().unwrap();
        let before = cluster.wait_blocks(&["n1", "n2"], 1).await;
        cluster.report("n1", &[("10.244.0.0/24", 1)]).await;
        cluster.report("n2", &[("10.244.1.0/24", 1)]).await;

        // etcd is put back to a time before n3.
        cluster.plane.snapshot("before-n3").unwrap();
        cluster.node("n3", json!({}), &["172.30.0.13"]).await;
        let three = cluster.wait_blocks(&["n3"], 1).await;
        assert_eq!(three["n3"], ["10.244.2.0/24"]);
        cluster.report("n3", &[("10.244.2.0/24", 1)]).await;
        cluster.plane.restore("before-n3").unwrap();
        cluster.node("n4", json!({}), &["172.30.0.14"]).await;
        let restored = cluster.wait_blocks(&["n1", "n2", "n4"], 1).await;
        assert_eq!((&restored["n1"], &restored["n2"]), (&before["n1"], &before["n2"]));
        assert_ne!(restored["n4"], ["10.244.2.0/24"], "n3 may still use it");
        // n3's kubelet registers again.
        cluster.node("n3", json!({}), &["172.30.0.13"]).await;
        assert_eq!(cluster.wait_blocks(&["n3"], 1).await["n3"], ["10.244.2.0/24"]);

        // Once more, with n5, and the leader that has seen n5's block go is lost as well.
        cluster.plane.snapshot("before-n5").unwrap();
        cluster.node("n5", json!({}), &["172.30.0.15"]).await;
        let five = cluster.wait_blocks(&["n5"], 1).await;
        operator.kill();
        cluster.plane.restore("before-n5").unwrap();
        let operator = cluster.operator("b", &flags);
        cluster.node("n6", json!({}), &["172.30.0.16"]).await;
        // n1's agent still routes to n5, and misses the block's PodCIDR.
        let lost = json!({"lost": {"count": 1, "blocks": [{"cidr": five["n5"][0], "nodeName": "n5"}]}});
        cluster.report_with("n1", &[("10.244.0.0/24", 1)], lost).await;
        let restored = cluster.wait_blocks(&["n1", "n2", "n3", "n4", "n6"], 1).await;
        assert_ne!(restored["n6"], five["n5"], "n5 may still use it");
        cluster.node("n5", json!({}), &["172.30.0.15"]).await;
        assert_eq!(cluster.wait_blocks(&["n5"], 1).await["n5"], five["n5"]);
        cluster.report("n1", &[("10.244.0.0/24", 1)]).await;

        // Somebody deletes a kind, with every block.
        cluster.report("n3", &[("10.244.2.0/24", 1)]).await;
        let crd = ["delete", "crd", "podcidrs.plat.network", "--timeout=30s"];
        cluster.plane.kubectl(&crd).unwrap();
        operator.wait_log("does not know this kind").await;
        cluster.plane.install_crds().unwrap();
        let healed = cluster.wait_blocks(&["n1", "n2", "n3", "n4", "n5", "n6"], 1).await;
        assert_eq!(
            (&healed["n1"], &healed["n2"], &healed["n3"]),
            (&before["n1"], &before["n2"], &three["n3"])
        );
        assert_eq!((&healed["n4"], &healed["n6"]), (&restored["n4"], &restored["n6"]));
        cluster.assert_no_double().await;
        let list = cluster.api::<PodCIDR>().list(&ListParams::default()).await.unwrap();
        assert_eq!(list.items.len(), 6);
        wait_until_async("every node has its NodeNetwork", DEADLINE, async || {
            let reports =
                cluster.api::<NodeNetwork>().list(&ListParams::default()).await.unwrap().items.len();
            holds(reports == 6, reports)
        })
        .await;
    });
}
