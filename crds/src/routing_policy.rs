//! RoutingPolicy: how the nodes that one selector chooses reach the blocks that another one chooses, and
//! which version of it is in force on a node.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector};
use kube::{CustomResource, KubeSchema};
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::condition;
use crate::routing::Routing;
use crate::selector::{LabelSet, Selector};

/// Seconds for which the canary nodes' probes are watched unless the rollout says otherwise.
pub const DEFAULT_OBSERVE_SECONDS: i32 = 60;

/// Whether a policy takes effect.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum PolicyMode {
    /// Nodes follow it.
    #[default]
    Apply,
    /// Nodes say what it would change, and go on with what they have.
    Plan,
    /// A value of a newer version: as `Plan`, since nothing is known of it.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// How a change of a policy reaches the nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rollout {
    /// Nodes that follow a change first, by the labels of their PodCIDRs; of those that `sources` selects.
    #[schemars(schema_with = "crate::selector::schema")]
    pub canary: LabelSelector,
    /// How long the canary nodes' probes are watched before the others follow, in seconds, 10 to 86400 (a
    /// day). Default 60.
    #[serde(default = "default_observe_seconds")]
    #[schemars(range(min = 10, max = 86400))]
    pub observe_seconds: i32,
}

fn default_observe_seconds() -> i32 {
    DEFAULT_OBSERVE_SECONDS
}

/// How the nodes that `sources` selects reach the blocks that `destinations` selects.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "plat.network",
    version = "v1alpha1",
    kind = "RoutingPolicy",
    plural = "routingpolicies",
    singular = "routingpolicy",
    shortname = "rpol",
    category = "plat",
    status = "RoutingPolicyStatus",
    derive = "PartialEq",
    doc = "How the nodes that one selector chooses reach the blocks that another one chooses. Yours; the operator writes only its status.",
    printcolumn(
        name = "Priority",
        type_ = "integer",
        json_path = ".spec.priority",
        description = "Higher goes first"
    ),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode", description = "Apply or Plan"),
    printcolumn(
        name = "Phase",
        type_ = "string",
        json_path = ".status.phase",
        description = "How far the newest change has come"
    ),
    printcolumn(
        name = "Nodes",
        type_ = "integer",
        json_path = ".status.nodes.selected",
        description = "Nodes that it is for"
    ),
    printcolumn(
        name = "Applied",
        type_ = "integer",
        json_path = ".status.nodes.applied",
        description = "Of those, nodes that follow it"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].status"#,
        description = "Whether it can be followed"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "Blocks",
        type_ = "integer",
        json_path = ".status.blocks",
        priority = 1,
        description = "Blocks that it is about"
    ),
    printcolumn(
        name = "Failed",
        type_ = "integer",
        json_path = ".status.nodes.failed",
        priority = 1,
        description = "Nodes that cannot follow it"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="Ready")].reason"#,
        priority = 1,
        description = "Why it is ready or not"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct RoutingPolicySpec {
    /// Of several policies that set a field for the same block on the same node, the highest priority wins,
    /// then the name. Default 0.
    #[serde(default)]
    #[schemars(range(min = -1_000_000, max = 1_000_000))]
    pub priority: i32,

    /// `Apply` (the default): the nodes follow the policy. `Plan`: they say in their NodeNetworks what it would
    /// change, and go on with what was in force before.
    #[serde(default)]
    pub mode: PolicyMode,

    /// Blocks that the policy is about, by the labels of their PodCIDRs, which the operator copies from the
    /// Nodes that hold them; all blocks if not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::selector::schema")]
    pub destinations: Option<LabelSelector>,

    /// Nodes that follow the policy, by the labels of their own PodCIDRs; all nodes if not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "crate::selector::schema")]
    pub sources: Option<LabelSelector>,

    /// What the policy says. A field that is not set is left to other policies and layers.
    #[serde(default)]
    pub routing: Routing,

    /// How a change of the policy reaches the nodes; all at once if not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
}

/// How far the newest change of a policy has come. Absent before the operator has seen that its labels are on the
/// PodCIDRs: nodes do not follow it yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Phase {
    /// The canary nodes follow it, and are watched.
    Canary,
    /// All nodes follow it; not all have reported so.
    Rolling,
    /// All nodes have reported that they follow it.
    Complete,
    /// Probes got worse: all nodes are back on `lastGood`.
    RolledBack,
    /// It is only planned.
    Planned,
    /// A phase of a newer version.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// A version of a policy that all nodes followed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastGood {
    /// Its generation.
    pub generation: i64,
    /// Its spec, whole.
    #[schemars(schema_with = "any_object")]
    pub spec: RoutingPolicySpec,
}

/// A copy of a spec: checked when it was written, and kept with fields that this version does not know.
fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// Nodes that a policy is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyNodes {
    /// Nodes that `sources` selects.
    #[serde(default)]
    pub selected: i64,
    /// Of those, nodes that follow its newest generation, and whose probes are not worse for it.
    #[serde(default)]
    pub applied: i64,
    /// Of those, nodes that cannot follow it for at least one block.
    #[serde(default)]
    pub failed: i64,
    /// Of those, nodes that have planned it.
    #[serde(default)]
    pub planned: i64,
    /// Of those, nodes that went back to `lastGood`.
    #[serde(default)]
    pub rolled_back: i64,
}

/// What the operator observed of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RoutingPolicyStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// How far that generation has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// The newest version that all nodes followed: what nodes stay on while another one is planned, tried
    /// out or taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_good: Option<LastGood>,
    /// Nodes that it is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<PolicyNodes>,
    /// Number of blocks that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<i64>,
    /// `Ready`: it can be followed, or what is wrong with it. `Applied`: every live node that it selects follows it,
    /// or what that waits for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(transform = condition::bound)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// What of a policy's status decides which version of it is in force.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress<'p> {
    /// Generation that the phase speaks of.
    pub observed: Option<i64>,
    /// How far that generation has come.
    pub phase: Option<Phase>,
    /// The newest version that all nodes followed.
    pub last_good: Option<&'p RoutingPolicySpec>,
}

impl<'p> Progress<'p> {
    /// That of a status.
    pub fn of(status: Option<&'p RoutingPolicyStatus>) -> Progress<'p> {
        let Some(status) = status else { return Progress::default() };
        Progress {
            observed: status.observed_generation,
            phase: status.phase,
            last_good: status.last_good.as_ref().map(|good| &good.spec),
        }
    }
}

/// The version of a policy that a node with these labels follows; `None` if it follows none.
///
/// A generation holds once the operator has let it: on canary nodes from phase `Canary`, on all from `Rolling`. It
/// does so when the PodCIDRs carry every label that the policy names; a selector that excludes a label would
/// else choose nodes and blocks that merely do not have it yet. Until then, and while the spec is only planned or was
/// taken back, `lastGood` goes on.
pub fn in_force<'p, L: LabelSet + ?Sized>(
    spec: &'p RoutingPolicySpec,
    generation: i64,
    progress: Progress<'p>,
    own: &L,
) -> Option<&'p RoutingPolicySpec> {
    let phase = progress.phase.filter(|_| progress.observed == Some(generation));
    let is_let = match phase.filter(|_| spec.mode == PolicyMode::Apply) {
        Some(Phase::Rolling | Phase::Complete) => true,
        Some(Phase::Canary) => {
            let canary = spec.rollout.as_ref().map(|rollout| Selector::read(Some(&rollout.canary)));
            canary.is_some_and(|canary| canary.is_ok_and(|canary| canary.matches(own)))
        }
        Some(Phase::RolledBack | Phase::Planned | Phase::Unknown) | None => false,
    };
    if is_let { Some(spec) } else { progress.last_good }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selector::Labels;

    fn spec(json: serde_json::Value) -> RoutingPolicySpec {
        serde_json::from_value(json).unwrap()
    }

    fn labels(zone: &str) -> Labels {
        Labels::pack(Some(&[("zone".to_owned(), zone.to_owned())].into()))
    }

    #[test]
    fn a_node_follows_what_the_phase_lets_it() {
        let old = spec(serde_json::json!({"routing": {"metric": 1}}));
        let at_once = spec(serde_json::json!({"routing": {"metric": 2}}));
        let planned = spec(serde_json::json!({"mode": "Plan", "routing": {"metric": 2}}));
        let careful = spec(serde_json::json!({
            "routing": {"metric": 2}, "rollout": {"canary": {"matchLabels": {"zone": "a"}}},
        }));
        let good = Some(LastGood { generation: 1, spec: old.clone() });
        for (new, phase, seen, canary, other) in [
            (&at_once, None, 1, 1, 1),
            (&at_once, Some(Phase::Complete), 1, 1, 1),
            (&at_once, Some(Phase::Rolling), 2, 2, 2),
            (&at_once, Some(Phase::Canary), 2, 1, 1),
            (&at_once, Some(Phase::RolledBack), 2, 1, 1),
            (&at_once, Some(Phase::RolledBack), 1, 1, 1),
            (&planned, Some(Phase::Planned), 2, 1, 1),
            (&planned, Some(Phase::Rolling), 2, 1, 1),
            (&careful, Some(Phase::Complete), 1, 1, 1),
            (&careful, Some(Phase::Canary), 2, 2, 1),
            (&careful, Some(Phase::Rolling), 2, 2, 2),
            (&careful, Some(Phase::Complete), 2, 2, 2),
            (&careful, Some(Phase::RolledBack), 2, 1, 1),
            (&careful, Some(Phase::Unknown), 2, 1, 1),
        ] {
            let status = RoutingPolicyStatus {
                observed_generation: Some(seen),
                phase,
                last_good: good.clone(),
                ..RoutingPolicyStatus::default()
            };
            for (zone, metric) in [("a", canary), ("b", other)] {
                let got = in_force(new, 2, Progress::of(Some(&status)), &labels(zone)).unwrap();
                assert_eq!(got.routing.metric, Some(metric), "{phase:?} at {seen} in zone {zone}");
            }
        }
    }

    #[test]
    fn a_new_policy_without_a_good_version_holds_nowhere_until_it_may() {
        let own = labels("a");
        let careful = spec(serde_json::json!({"rollout": {"canary": {}}}));
        assert_eq!(in_force(&careful, 1, Progress::default(), &own), None);
        assert_eq!(in_force(&spec(serde_json::json!({"mode": "Later"})), 1, Progress::of(None), &own), None);
        let at_once = spec(serde_json::json!({}));
        assert_eq!(in_force(&at_once, 1, Progress::default(), &own), None);
        let let_ = Progress { observed: Some(1), phase: Some(Phase::Rolling), last_good: None };
        assert_eq!(in_force(&at_once, 1, let_, &own), Some(&at_once));
        assert_eq!(in_force(&at_once, 2, let_, &own), None);
    }
}
