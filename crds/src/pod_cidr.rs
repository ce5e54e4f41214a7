//! PodCIDR: one block, held by one node. Its name is its CIDR, so the API server's name uniqueness is the
//! allocation lock.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::block::{Block, ParseBlockError};
use crate::condition;
use crate::routing::{Mode, Routing};

/// What a node may do with its block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum BlockState {
    /// The node leases from it and every other node routes to it.
    #[default]
    Active,
    /// Its leases stay and it is routed; new pods get addresses from another block.
    Draining,
    /// Its node is gone or has given it back: nobody routes to it, nobody leases from it, and it rests before reuse.
    Quarantined,
    /// A state of a newer version: routed, not leased from.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// One block of pod addresses, held by one node. The operator creates, changes and deletes PodCIDRs;
/// only `spec.routing` is yours.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "plat.network",
    version = "v1alpha1",
    kind = "PodCIDR",
    plural = "podcidrs",
    singular = "podcidr",
    shortname = "pcidr",
    category = "plat",
    status = "PodCIDRStatus",
    derive = "PartialEq",
    doc = "One block of pod addresses, held by one node. Its name is its CIDR. The operator creates, changes and deletes PodCIDRs; only spec.routing is yours.",
    selectable = ".spec.nodeName",
    selectable = ".spec.state",
    selectable = ".spec.clusterCIDR",
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName", description = "Node that holds the block"),
    printcolumn(name = "CIDR", type_ = "string", json_path = ".spec.cidr", description = "The block"),
    printcolumn(name = "State", type_ = "string", json_path = ".spec.state", description = "Active, Draining or Quarantined"),
    printcolumn(name = "Used", type_ = "integer", json_path = ".status.used", description = "Leased addresses"),
    printcolumn(name = "Capacity", type_ = "integer", json_path = ".status.capacity", description = "Addresses that pods can have"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#, description = "Whether its node has programmed itself"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Via", type_ = "string", json_path = ".status.routing.via", priority = 1, description = "Address that other nodes route to"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".status.routing.mode", priority = 1, description = "Effective routing mode"),
    printcolumn(name = "Converged", type_ = "string", json_path = r#".status.conditions[?(@.type=="Converged")].status"#, priority = 1, description = "Whether every live node carries it"),
    printcolumn(name = "ClusterCIDR", type_ = "string", json_path = ".spec.clusterCIDR", priority = 1, description = "Range that it was carved from"),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#, priority = 1, description = "Why it is ready or not"),
    printcolumn(name = "Message", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].message"#, priority = 1, description = "The same in words; what a quarantined block still waits for"),
    validation = Rule::new("self.metadata.name == self.spec.cidr.replace('.', '-').replace(':', '-').replace('/', '-')")
        .message("the name must be the CIDR with '.', ':' and '/' replaced by '-': it is the lock on the block")
)]
#[serde(rename_all = "camelCase")]
pub struct PodCIDRSpec {
    /// The block, such as `10.244.3.0/24`, in canonical form. Never changes.
    #[schemars(length(max = 43))]
    #[x_kube(
        validation = Rule::new("isCIDR(self) && cidr(self) == cidr(self).masked() && string(cidr(self)) == self")
            .message("must be a CIDR without host bits, in canonical (RFC 5952) form"),
        validation = Rule::new("self == oldSelf").message("a block's CIDR cannot be changed"),
    )]
    pub cidr: String,

    /// Name of the ClusterCIDR that the block was carved from. Never changes.
    #[serde(rename = "clusterCIDR")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("a block stays in its ClusterCIDR"))]
    pub cluster_cidr: String,

    /// Name of the node that holds the block. Never changes; a returning node of that name gets it back.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("a block does not move between nodes: the operator deletes it and carves another"))]
    pub node_name: String,

    /// UID of the Node object for which the block is held. Written by the operator.
    #[serde(default, rename = "nodeUID", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub node_uid: Option<String>,

    /// Addresses of the node (its InternalIPs), to which other nodes route. Written by the operator.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(max = 45)))]
    #[x_kube(validation = Rule::new("self.all(a, isIP(a))").message("each must be an IP address"))]
    pub node_addresses: Vec<String>,

    /// `Active`: leased from and routed. `Draining`: routed, not leased from. `Quarantined`: its node is
    /// gone or has given it back, and it rests before reuse. Written by the operator.
    #[serde(default)]
    pub state: BlockState,

    /// Until when a quarantined block rests, RFC 3339. It becomes free then, once every live node has reported
    /// that it withdrew its route to it. Written by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_after: Option<Time>,

    /// Routing policy of this block: yours to set. It goes before the ClusterCIDR's, field by field, and
    /// goes away with the block: lasting policy belongs to the ClusterCIDR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<Routing>,
}

/// What the operator observed of a block.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodCIDRStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Addresses that pods can have: all but network, gateway and broadcast; at most 65,533 for IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<i64>,
    /// Leased addresses, as the node last reported them (within minutes: counters are written rarely).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<i64>,
    /// Routing policy that holds for the block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub routing: Option<EffectiveRouting>,
    /// `Ready`: its node has programmed itself and leases from it. `Converged`: every live node carries
    /// it. `NodeSpecConflict`: the Node's podCIDRs say something else. `Draining`: it goes once its last lease
    /// has ended, or why not yet. `GrowthBlocked`: its node is almost full and gets no further block.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(transform = condition::bound)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Routing policy of a block after all layers are applied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct EffectiveRouting {
    /// How other nodes reach the block.
    #[serde(default)]
    pub mode: Mode,
    /// Address that other nodes route to; absent for mode `None` or a node without an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    pub via: Option<String>,
    /// Metric of the routes.
    #[serde(default)]
    pub metric: i32,
    /// MTU of the routes in bytes; absent means the device's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<i32>,
}

impl PodCIDRSpec {
    /// The block; an error if an object that the API server should have refused came through a cache.
    pub fn block(&self) -> Result<Block, ParseBlockError> {
        self.cidr.parse()
    }
}
