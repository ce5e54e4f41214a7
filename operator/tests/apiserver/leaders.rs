//! Several operators, and operators that end in every way.

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::ListParams;
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{DEADLINE, arena};

const V4: &str = "--cluster-cidr=10.244.0.0/16";
/// Times that tests can wait for. No agent reports here, so waiting for reports is cut short as well.
const SHORT: [&str; 4] = [
    "--lease-duration-seconds=4",
    "--lease-renew-deadline-seconds=3",
    "--lease-retry-milliseconds=200",
    "--report-wait-seconds=1",
];

fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("node-{i:03}")).collect()
}

#[test]
fn one_of_two_leads_and_hands_over_when_it_is_told_to_stop() {
    arena(|cluster| async move {
        let first = cluster.operator("first", &[V4]);
        first.wait_log("leading").await;
        first.wait_ready().await;
        assert_eq!(first.ask("/readyz").unwrap(), "ok: leading");
        let second = cluster.operator("second", &[V4]);
        second.wait_ready().await;
        assert_eq!(second.ask("/readyz").unwrap(), "ok: standing by");
        // Both are on one host's network: the second listens on the next port.
        second.wait_log("the port is taken, trying the next").await;

        assert!(first.terminate().await.success());
        second.wait_log("start=HandedOver").await;
        cluster.nodes(&["n1"]).await;
        cluster.wait_blocks(&["n1"], 1).await;
        let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), "plat-system");
        let spec = leases.get("plat-operator").await.unwrap().spec.unwrap();
        assert!(spec.holder_identity.unwrap().starts_with("second_"));
        assert_eq!(spec.lease_transitions, Some(1));
        assert!(second.terminate().await.success());
        let spec = leases.get("plat-operator").await.unwrap().spec.unwrap();
        assert_eq!(spec.holder_identity.as_deref(), Some(""));
    });
}

#[test]
fn what_the_last_pass_did_is_told_before_the_lease_is_handed_over() {
    arena(|cluster| async move {
        let operator = cluster.operator("a", &[V4]);
        operator.wait_log("leading").await;
        let names = names(60);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        cluster.nodes(&names).await;
        cluster.wait_blocks(&names, 1).await;
        // Two Events for each block, one after the other: most of them still wait.
        assert!(operator.terminate().await.success());
        let events: Api<Event> = Api::namespaced(cluster.client.clone(), "default");
        let events = events.list(&ListParams::default()).await.unwrap().items;
        let told = events.iter().filter(|event| event.reason.as_deref() == Some("BlockAllocated")).count();
        assert_eq!(told, 120);
    });
}

#[test]
fn two_leaders_at_once_give_nothing_out_twice() {
    arena(|cluster| async move {
        let names = names(120);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        cluster.nodes(&names[..60]).await;
        // Leases in two namespaces: each believes that it leads alone.
        let one = cluster.operator("one", &[V4]);
        let two = cluster.operator("two", &[V4, "--namespace=elsewhere"]);
        cluster.nodes(&names[60..]).await;
        // Each may give a node a block of its own; the younger of the two is then taken out of use.
        cluster.wait_blocks(&names, 1).await;
        cluster.assert_disjoint().await;
        one.wait_ready().await;
        two.wait_ready().await;
        assert!(one.log().contains("leading") && two.log().contains("leading"));
    });
}

#[test]
fn killed_in_the_middle_and_started_again_it_goes_on() {
    arena(|cluster| async move {
        let names = names(150);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        cluster.nodes(&names).await;
        let flags = [&[V4][..], &SHORT].concat();
        let mut seen = 0;
        for round in 0..4 {
            let operator = cluster.operator(&format!("life-{round}"), &flags);
            wait_until_async("some more blocks", DEADLINE, async || {
                let blocks = cluster.blocks().await.len();
                holds(blocks > seen || blocks == names.len(), format!("{blocks} blocks")).map(|()| blocks)
            })
            .await;
            operator.kill();
            seen = cluster.blocks().await.len();
        }
        let _last = cluster.operator("last", &flags);
        cluster.wait_blocks(&names, 1).await;
        cluster.assert_no_double().await;
    });
}

#[test]
fn an_api_server_that_is_away_ends_the_leader_and_its_successor_goes_on() {
    arena(|cluster| async move {
        cluster.nodes(&["n1"]).await;
        let flags = [&[V4][..], &SHORT].concat();
        let mut operator = cluster.operator("a", &flags);
        cluster.wait_blocks(&["n1"], 1).await;
        operator.wait_ready().await;
        cluster.plane.kill("apiserver").unwrap();
        let status = operator.wait_end().await;
        assert!(!status.success(), "so that the kubelet starts it again");
        assert!(operator.log().contains("could not renew the leader Lease"), "{}", operator.log());

        // The kubelet starts it again while the API server is still away: it waits, alive and not ready.
        let again = cluster.operator("b", &flags);
        again.wait_log("cannot read the leader Lease").await;
        assert!(again.ask("/livez").is_ok() && again.ask("/readyz").is_err());
        cluster.plane.start("apiserver").unwrap();
        cluster.node("n2", json!({}), &["172.30.0.12"]).await;
        let blocks = cluster.wait_blocks(&["n1", "n2"], 1).await;
        assert_eq!(blocks["n1"], ["10.244.0.0/24"]);
        cluster.assert_no_double().await;
    });
}

#[test]
fn a_short_absence_of_the_api_server_is_bridged() {
    arena(|cluster| async move {
        cluster.nodes(&["n1"]).await;
        let operator =
            cluster.operator("a", &[V4, "--lease-duration-seconds=60", "--lease-renew-deadline-seconds=50"]);
        cluster.wait_blocks(&["n1"], 1).await;
        cluster.plane.kill("apiserver").unwrap();
        operator.wait_log("cannot watch; going on with what is known").await;
        cluster.plane.start("apiserver").unwrap();
        cluster.node("n2", json!({}), &["172.30.0.12"]).await;
        cluster.wait_blocks(&["n1", "n2"], 1).await;
        operator.wait_log("watching again").await;
        assert_eq!(operator.log().matches(" leading ").count(), 1, "the same life");
    });
}

#[test]
fn a_lease_that_somebody_else_took_ends_the_process() {
    arena(|cluster| async move {
        let mut operator = cluster.operator("a", &SHORT);
        operator.wait_ready().await;
        let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), "plat-system");
        let take = kube::api::Patch::Merge(json!({"spec": {"holderIdentity": "somebody"}}));
        leases.patch("plat-operator", &kube::api::PatchParams::default(), &take).await.unwrap();
        assert!(!operator.wait_end().await.success());
        assert!(operator.log().contains("lost the leader Lease to somebody"));
    });
}
