//! NodeNetwork: what a node says of itself. The operator creates and deletes it; the node's agent writes
//! its status and nothing else.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::condition;

/// At most this many entries in [`Applied::failed`] and [`NodeNetworkStatus::incidents`].
pub const MAX_REPORTED: usize = 16;

/// At most this many entries in [`NodeNetworkStatus::held_blocks`] and [`LostBlocks::blocks`].
pub const MAX_BLOCKS: usize = 64;
/// At most this many entries in [`NodeNetworkStatus::policies`].
pub const MAX_POLICIES: usize = 64;
/// At most this many entries in [`NodeNetworkStatus::plan`].
pub const MAX_PLAN_LINES: usize = 32;
/// Configurations of other networks that are named.
pub const MAX_OTHER_CONFS: usize = 8;

/// A node's own report about its network: what is applied, what it holds, what went wrong. Named after
/// the node; status only.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "plat.network",
    version = "v1alpha1",
    kind = "NodeNetwork",
    plural = "nodenetworks",
    singular = "nodenetwork",
    shortname = "nn",
    category = "plat",
    status = "NodeNetworkStatus",
    derive = "PartialEq",
    doc = "A node's own report about its network: what is applied, what it holds, what went wrong. Named after the node; written by its agent.",
    no_spec,
    printcolumn(
        name = "Routes",
        type_ = "integer",
        json_path = ".status.routes.installed",
        description = "Our routes in the kernel"
    ),
    printcolumn(
        name = "Desired",
        type_ = "integer",
        json_path = ".status.routes.desired",
        description = "Routes that should be there"
    ),
    printcolumn(
        name = "Repaired",
        type_ = "integer",
        json_path = ".status.routes.repaired",
        description = "Routes put back since the agent started"
    ),
    printcolumn(
        name = "CNI",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="CNIReady")].status"#,
        description = "Whether new pods get our network"
    ),
    printcolumn(
        name = "Blocked",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="ForwardingBlocked")].status"#,
        description = "Whether a foreign firewall drops pod packets"
    ),
    printcolumn(
        name = "Agent",
        type_ = "string",
        json_path = ".status.agentVersion",
        description = "Version of the agent"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "MTU",
        type_ = "integer",
        json_path = ".status.mtu",
        priority = 1,
        description = "MTU of new pods"
    ),
    printcolumn(
        name = "Conf",
        type_ = "string",
        json_path = ".status.cni.active",
        priority = 1,
        description = "CNI configuration that the runtime takes"
    ),
    printcolumn(
        name = "Peers",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="PeersReachable")].status"#,
        priority = 1,
        description = "Whether other nodes answer probes over the pods' path"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = r#".status.conditions[?(@.type=="RoutesReady")].reason"#,
        priority = 1,
        description = "Why its routes are ready or not"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct NodeNetworkSpec {}

/// The report of a node's agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeNetworkStatus {
    /// When the agent last wrote this report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reported_at: Option<Time>,
    /// Version of the agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub agent_version: Option<String>,
    /// Boot of the node that the report is from.
    #[serde(default, rename = "bootID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub boot_id: Option<String>,
    /// Objects whose effect is in this node's kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied: Option<Applied>,
    /// Blocks that this node leases from or still has leases in. The operator hands none of them to
    /// another node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub held_blocks: Vec<HeldBlockReport>,
    /// PodCIDRs that went without having been released (etcd was put back to a backup, or somebody deleted
    /// them). Absent if there are none. The operator hands none of these blocks to another node before a
    /// quarantine has passed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<LostBlocks>,
    /// Routes of ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routes: Option<RouteCounts>,
    /// The CNI configuration on this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni: Option<CniReport>,
    /// MTU of new pods, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<i32>,
    /// RoutingPolicies that select this node, by name; at most 64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub policies: Vec<PolicyReport>,
    /// What the RoutingPolicies of `mode: Plan` would change in this node's routes, a line for each route as
    /// text, with `+` (would come), `-` (go) or `~` (change) before it, and `!` before why a block could not be
    /// followed; at most 32 lines, of which the last says how many more there are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 512)))]
    pub plan: Vec<String>,
    /// What probes over the pods' path found. Absent if they are switched off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probes: Option<ProbesReport>,
    /// What happened lately, oldest first; at most 16. The operator turns new ones into Events.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub incidents: Vec<Incident>,
    /// `RoutesReady`, `MasqueradeReady`, `CNIReady`, `ForwardingBlocked`, `Overlapping`,
    /// `WithdrawalsHeld`, `PeersReachable`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(transform = condition::bound)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Objects whose effect is in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Applied {
    /// Number of PodCIDRs and ClusterCIDRs in the digest.
    pub count: i64,
    /// Sum modulo 2^64 over hash(uid, generation) of those objects, as 16 hex digits. The operator
    /// compares it with its own sum: equal means that this node carries everything.
    #[schemars(length(max = 16))]
    pub digest: String,
    /// The same sum over all objects that this node has acted on, also those that it could not apply. It
    /// proves what the node has withdrawn, however many other objects fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub seen_digest: Option<String>,
    /// Number of objects that could not be applied, if `failed` does not name them all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_count: Option<i64>,
    /// Names of objects that could not be applied, routes that could not be withdrawn first; at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub failed: Vec<FailedObject>,
}

/// [`FailedObject::reason`] of a route that should have been withdrawn and is still in the kernel.
pub const NOT_WITHDRAWN: &str = "NotWithdrawn";

/// An object that could not be applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailedObject {
    /// Name of the PodCIDR or ClusterCIDR.
    #[schemars(length(max = 253))]
    pub name: String,
    /// CamelCase word for programs.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// What is wrong, and what to do.
    #[schemars(length(max = 512))]
    pub message: String,
}

/// A block that a node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeldBlockReport {
    /// The block.
    #[schemars(length(max = 43))]
    pub cidr: String,
    /// Leased addresses. Absent if the agent cannot tell for now whether there are any: the block is then
    /// not let go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<i64>,
    /// Addresses that pods can have.
    pub capacity: i64,
}

/// What a node does with a RoutingPolicy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum PolicyState {
    /// It follows that generation, and watches whether its probes get worse.
    Trying,
    /// It follows that generation.
    Applied,
    /// It cannot follow that generation for at least one block.
    Failed,
    /// It has only planned that generation.
    Planned,
    /// It followed that generation, went back to the one before, and stays there until there is another.
    RolledBack,
    /// A state of a newer version.
    #[default]
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// A RoutingPolicy as a node follows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyReport {
    /// Name of the RoutingPolicy.
    #[schemars(length(max = 253))]
    pub name: String,
    /// UID of the RoutingPolicy: another one of that name begins anew.
    #[schemars(length(max = 64))]
    pub uid: String,
    /// Generation that the node speaks of.
    pub generation: i64,
    /// What the node does with it.
    pub state: PolicyState,
    /// Blocks that the policy is about.
    pub blocks: i64,
    /// Why, if it failed or was rolled back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub message: Option<String>,
}

/// PodCIDRs that a node knew and that went without having been released.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LostBlocks {
    /// How many there are. If they are more than `blocks` names, the operator carves no block at all until
    /// they are back or a quarantine has passed.
    pub count: i64,
    /// The first 64 of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub blocks: Vec<LostBlock>,
}

/// A block whose PodCIDR was lost.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LostBlock {
    /// The block.
    #[schemars(length(max = 43))]
    pub cidr: String,
    /// Node that held it.
    #[schemars(length(max = 253))]
    pub node_name: String,
}

/// Our routes, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RouteCounts {
    /// Routes that should be in the kernel.
    pub desired: i64,
    /// Of those, routes that are.
    pub installed: i64,
    /// Routes put back after somebody removed or changed them, since the agent started.
    pub repaired: i64,
}

/// The CNI configuration on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CniReport {
    /// File that the container runtime takes: the first by name. Ours is `05-plat.conflist`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255))]
    pub active: Option<String>,
    /// Chained plugins of our configuration that the node has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(max = 64)))]
    pub chained: Vec<String>,
    /// Configurations of other networks behind ours, the first 8 by name: without ours the runtime would take the
    /// first of them. Remove them once you do not want to go back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(max = 255)))]
    pub others: Vec<String>,
    /// Pods on the node that another network attached, before Plat took over, and that still run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub foreign_pods: Option<i64>,
}

/// Something that happened on a node and that its users should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Incident {
    /// When it was last seen.
    pub time: Time,
    /// CamelCase word for programs, such as `RouteRestored`; the Event's reason.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// What happened, to what, and who likely did it.
    #[schemars(length(max = 512))]
    pub message: String,
    /// How often, since the agent started.
    pub count: i64,
}

/// What a node's probes over the pods' path found: from the gateway of its own block to those of other nodes' blocks, of
/// all in small clusters, of a sample that moves on in large ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProbesReport {
    /// Blocks of other nodes that the last whole round looked at, those with something wrong included.
    pub peers: i64,
    /// Of those, blocks that answered.
    pub reachable: i64,
    /// Number of blocks in `unreachable`, if it does not name them all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unreachable_count: Option<i64>,
    /// Blocks that do not answer, and behind them those that lose many packets; at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub unreachable: Vec<UnreachablePeer>,
    /// Number of blocks in `bigPacketsLost`, if it does not name them all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub big_packets_lost_count: Option<i64>,
    /// Blocks that small packets reach and full-size ones do not; at most 16.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub big_packets_lost: Vec<NarrowPath>,
    /// Median of the round trips in microseconds, rounded. It moves only when it has changed by more than a quarter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_micros: Option<i64>,
    /// When the last whole round ended, as of when this report was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_round: Option<Time>,
}

/// A block that does not answer probes, or not all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct UnreachablePeer {
    /// Node that holds the block.
    #[schemars(length(max = 253))]
    pub node_name: String,
    /// The block.
    #[schemars(length(max = 43))]
    pub cidr: String,
    /// `NoAnswer`, `NoRoute` (this node has none to it) or `Lossy`.
    #[schemars(length(max = 64))]
    pub reason: String,
    /// Since when.
    pub since: Time,
}

/// A path that loses packets of full size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NarrowPath {
    /// Node that holds the block.
    #[schemars(length(max = 253))]
    pub node_name: String,
    /// The block.
    #[schemars(length(max = 43))]
    pub cidr: String,
    /// Full size, in bytes: what the links take, or the `mtu` of the routing policy.
    pub size: i64,
    /// The largest common size that passes, in bytes. The node's route to the block has it as its MTU, unless a policy
    /// sets one. Absent if not even the smallest passes.
    #[serde(default, rename = "pathMTU", skip_serializing_if = "Option::is_none")]
    pub path_mtu: Option<i64>,
    /// Since when.
    pub since: Time,
}
