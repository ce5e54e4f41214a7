//! Who may do what, as the chart sets it up: exact lists of rights, and the two admission policies.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use plat_e2e::light::{Bound, ControlPlane, create_node};
use plat_e2e::testbed::{feed, output, repository};
use plat_e2e::wait_until;
use serde_json::{Value, json};

use crate::Really::{self, Do, DryRun};
use crate::{node_network, patch_as, pod_cidr};

const OPERATOR: &str = "system:serviceaccount:plat-system:plat-operator";
const AGENT: &str = "system:serviceaccount:plat-system:plat-agent";

/// Held by tests that list the agent's rights, and by the one that adds to them.
static AGENT_RIGHTS: Mutex<()> = Mutex::new(());

/// A control plane on which the chart is installed. It has no nodes, so nothing of Plat runs.
fn plane() -> &'static ControlPlane {
    static PLANE: LazyLock<ControlPlane> = LazyLock::new(|| {
        let plane = ControlPlane::up().unwrap();
        let chart = repository().join("charts/plat");
        let mut helm = plane.tool("helm");
        helm.arg("--kubeconfig").arg(plane.admin_kubeconfig());
        helm.args(["install", "plat"]).arg(chart).args(["-n", "plat-system", "--create-namespace"]);
        output(&mut helm).unwrap();
        wait_until("the policy for PodCIDRs is in force", Duration::from_secs(30), || {
            match create_as("admin", &block("10.244.99.0/24"), &plane, true) {
                Err(error) if error.to_string().contains("created by Plat's operator alone") => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        for node in ["n1", "n2"] {
            plane.block_on(async |client| create_node(&client, node, &["172.30.0.11"]).await).unwrap();
            create_as(OPERATOR, &node_network(node), &plane, false).unwrap();
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": format!("agent-{node}"), "namespace": "plat-system"},
                "spec": {"serviceAccountName": "plat-agent", "automountServiceAccountToken": false, "nodeName": node,
                    "containers": [{"name": "agent", "image": "x"}]}});
            plane.apply(&pod.to_string()).unwrap();
        }
        plane
    });
    &PLANE
}

fn block(cidr: &str) -> Value {
    let name = cidr.replace(['.', '/'], "-");
    pod_cidr(&name, json!({"cidr": cidr, "clusterCIDR": "default-v4", "nodeName": "n1", "nodeUID": "u"}))
}

fn create_as(user: &str, object: &Value, plane: &ControlPlane, dry_run: bool) -> Result<String> {
    let mut command = plane.kubectl_command();
    command.args(["create", "--as", user, "-f", "-"]);
    if user == "admin" {
        command.args(["--as-group", "system:masters"]);
    }
    if dry_run {
        command.arg("--dry-run=server");
    }
    feed(&mut command, &object.to_string())
}

fn kubectl_as(user: &str, args: &[&str]) -> Result<String> {
    let mut command = plane().kubectl_command();
    command.args(["--as", user]).args(args);
    if user == "admin" {
        command.args(["--as-group", "system:masters"]);
    }
    output(&mut command)
}

/// The rights of a service account in a namespace, without those that everybody has.
fn rights(user: &str, namespace: &str) -> BTreeSet<String> {
    let review = json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace}});
    let rules = |user: &str| {
        let mut command = plane().kubectl_command();
        command.args(["create", "--as", user, "-o", "json", "--validate=false", "-f", "-"]);
        for group in ["system:serviceaccounts", "system:authenticated"] {
            command.args(["--as-group", group]);
        }
        let review: Value = serde_json::from_str(&feed(&mut command, &review.to_string()).unwrap()).unwrap();
        assert_eq!(review["status"]["incomplete"], false);
        let mut lines = BTreeSet::new();
        for rule in review["status"]["resourceRules"].as_array().unwrap() {
            let list = |key: &str| -> Vec<String> {
                let items = rule[key].as_array().into_iter().flatten();
                items.map(|item| item.as_str().unwrap().to_owned()).collect()
            };
            for group in list("apiGroups") {
                for resource in list("resources") {
                    let names = list("resourceNames").iter().map(|n| format!(" {n}")).collect::<String>();
                    let dot = if group.is_empty() { "" } else { "." };
                    lines.insert(format!("{resource}{dot}{group}{names}: {}", list("verbs").join(" ")));
                }
            }
        }
        lines
    };
    let everybody = rules("system:serviceaccount:default:nobody");
    rules(user).difference(&everybody).cloned().collect()
}

#[test]
fn the_agent_reads_blocks_ranges_and_policies_and_patches_reports_and_may_nothing_else() {
    let _alone = AGENT_RIGHTS.lock().unwrap_or_else(PoisonError::into_inner);
    for namespace in ["plat-system", "default", "kube-system"] {
        assert_eq!(
            rights(AGENT, namespace).iter().map(String::as_str).collect::<Vec<_>>(),
            [
                "clustercidrs.plat.network: get list watch",
                "nodenetworks/status.plat.network: patch",
                "podcidrs.plat.network: get list watch",
                "routingpolicies.plat.network: get list watch",
            ],
            "in {namespace}"
        );
    }
}

#[test]
fn the_operator_has_the_rights_of_its_work_and_no_others() {
    let everywhere = [
        "clustercidrs.plat.network: get list watch create patch",
        "clustercidrs/status.plat.network: patch",
        "nodenetworks.plat.network: get list watch create delete",
        "nodes/status: patch",
        "nodes: get list watch patch",
        "podcidrs.plat.network: get list watch create patch delete",
        "podcidrs/status.plat.network: patch",
        "routingpolicies.plat.network: get list watch",
        "routingpolicies/status.plat.network: patch",
        "servicecidrs.networking.k8s.io: list",
    ];
    let lease =
        ["leases.coordination.k8s.io plat-operator: get update", "leases.coordination.k8s.io: create"];
    let cluster = ["endpointslices.discovery.k8s.io kubernetes: get", "events.events.k8s.io: create patch"];
    for (namespace, here) in [("plat-system", &lease[..]), ("default", &cluster), ("kube-system", &[])] {
        let wanted: BTreeSet<String> = everywhere.iter().chain(here).map(ToString::to_string).collect();
        assert_eq!(rights(OPERATOR, namespace), wanted, "in {namespace}");
    }
}

/// Kubeconfig of an agent whose token is bound as said.
fn agent(name: &str, bound: Bound<'_>) -> PathBuf {
    let token = plane().token("plat-system", "plat-agent", bound).unwrap();
    plane().kubeconfig(name, &token).unwrap()
}

fn report(agent: &Path, node: &str, patch: Value, really: Really) -> Result<(), String> {
    patch_as(plane(), agent, &node_network(node), patch, really).map(drop)
}

#[test]
fn an_agent_reports_for_its_own_node_and_no_other() {
    let full = json!({"status": {"agentVersion": "0.1.0"}});
    let pod = agent("pod", Bound::Pod("agent-n1"));
    report(&pod, "n1", full.clone(), Do).unwrap();
    report(&agent("node", Bound::Node("n2")), "n2", full.clone(), Do).unwrap();
    for (patch, really) in [(&full, Do), (&json!({"status": {}}), Do), (&full, DryRun)] {
        let error = report(&pod, "n2", patch.clone(), really).unwrap_err();
        assert!(
            error.contains("the agent of node n1 may not write the report of node n2"),
            "{patch}: {error}"
        );
    }
    let error = report(&agent("free", Bound::Free), "n1", full, Do).unwrap_err();
    assert!(
        error.contains("the agent's token names no node; use the token that its pod is given"),
        "{error}"
    );
}

#[test]
fn an_agent_that_was_given_too_many_rights_is_still_confined_to_its_own_report() {
    let _alone = AGENT_RIGHTS.lock().unwrap_or_else(PoisonError::into_inner);
    let plane = plane();
    plane
        .apply(
            "{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: too-much}, rules: \
             [{apiGroups: [plat.network], resources: [nodenetworks, nodenetworks/status], verbs: ['*']}]}\n---\n\
             {apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: too-much}, \
             roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: too-much}, \
             subjects: [{kind: ServiceAccount, name: plat-agent, namespace: plat-system}]}",
        )
        .unwrap();
    let pod = agent("greedy", Bound::Pod("agent-n1"));
    let run = |args: &[&str]| output(plane.tool("kubectl").arg("--kubeconfig").arg(&pod).args(args));
    for args in [&["delete", "nodenetwork", "n2"][..], &["label", "nodenetwork", "n2", "a=b"]] {
        let error = run(args).unwrap_err().to_string();
        assert!(
            error.contains("the agent of node n1 may not write the report of node n2"),
            "{args:?}: {error}"
        );
    }
    run(&["label", "nodenetwork", "n1", "a=b"]).unwrap();
    plane.kubectl(&["delete", "clusterrolebinding/too-much", "clusterrole/too-much"]).unwrap();
}

#[test]
fn only_the_operator_makes_changes_and_deletes_blocks_and_users_set_routing() {
    let plane = plane();
    let block = block("10.244.1.0/24");
    create_as(OPERATOR, &block, plane, false).unwrap();
    let merge = |user: &str, patch: Value, extra: &[&str]| {
        let patch = patch.to_string();
        kubectl_as(
            user,
            &[&["patch", "podcidr", "10-244-1-0-24", "--type=merge", "-p", &patch], extra].concat(),
        )
    };
    let status = json!({"status": {"used": 3}});
    for (words, outcome) in [
        ("created by Plat's operator alone", create_as("admin", &block, plane, true)),
        ("deleted by Plat's operator alone", kubectl_as("admin", &["delete", "podcidr", "10-244-1-0-24"])),
        ("deleted by Plat's operator alone", kubectl_as("admin", &["delete", "podcidrs", "--all"])),
        (
            "the status of a PodCIDR is written by Plat's operator alone",
            merge("admin", status.clone(), &["--subresource=status"]),
        ),
        ("only spec.routing can be changed", merge("admin", json!({"spec": {"state": "Draining"}}), &[])),
        (
            "only spec.routing can be changed",
            merge("admin", json!({"spec": {"nodeAddresses": ["172.30.0.99"]}}), &[]),
        ),
        ("only spec.routing can be changed", merge("admin", json!({"spec": {"nodeUID": null}}), &[])),
        (
            "only spec.routing can be changed",
            merge("admin", json!({"spec": {"routing": {"mtu": 1400}, "nodeUID": "x"}}), &[]),
        ),
        (
            "would keep its block from being released",
            merge("admin", json!({"metadata": {"finalizers": ["example.com/stay"]}}), &[]),
        ),
        (
            "would take the block away with itself",
            merge(
                "admin",
                json!({"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "u"}]}}),
                &[],
            ),
        ),
    ] {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    }
    merge("admin", json!({"spec": {"routing": {"mode": "Direct", "mtu": 1400}}}), &[]).unwrap();
    merge("admin", json!({"spec": {"routing": {"mtu": 1300}}}), &[]).unwrap();
    merge("admin", json!({"metadata": {"labels": {"mine": "yes"}}}), &[]).unwrap();
    for drain in ["plat.network/drain=", "plat.network/drain-"] {
        kubectl_as("admin", &["annotate", "podcidr", "10-244-1-0-24", drain]).unwrap();
    }
    merge("admin", json!({"spec": {"routing": null}}), &[]).unwrap();
    merge(OPERATOR, json!({"spec": {"state": "Quarantined", "nodeUID": "v"}}), &[]).unwrap();
    let operator = plane
        .kubeconfig("operator", &plane.token("plat-system", "plat-operator", Bound::Free).unwrap())
        .unwrap();
    patch_as(plane, &operator, &block, status, Do).unwrap();
    kubectl_as(OPERATOR, &["delete", "podcidr", "10-244-1-0-24"]).unwrap();
}
