//! What a plan consists of: steps and faults, as values. They say everything that the executor needs, so it
//! has no choice left; a log line of a plan is the plan.

use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use plat_crds::pod_cidr::BlockState;
use plat_crds::{Block, ClusterCIDRStatus, Family, PodCIDRStatus, RoutingPolicyStatus};
use serde_json::{Map, Value, json};

use crate::carriers::Silent;
use crate::facts::{Fact, Name};
use crate::sizing::BlockSize;

/// Kinds of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A Kubernetes node.
    Node,
    /// A range.
    ClusterCIDR,
    /// A block.
    PodCIDR,
    /// How some nodes reach some blocks.
    RoutingPolicy,
    /// A node's report.
    NodeNetwork,
}

impl Kind {
    /// The kind as objects spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Node => "Node",
            Kind::ClusterCIDR => "ClusterCIDR",
            Kind::PodCIDR => "PodCIDR",
            Kind::RoutingPolicy => "RoutingPolicy",
            Kind::NodeNetwork => "NodeNetwork",
        }
    }
}

/// One object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
    /// Its uid; empty if it is not known (yet).
    pub uid: Name,
}

impl ObjectKey {
    /// The object of that kind, name and uid.
    pub fn new(kind: Kind, name: &Name, uid: &Name) -> ObjectKey {
        ObjectKey { kind, name: name.clone(), uid: uid.clone() }
    }
}

/// Something wrong with one object, which never stops the others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// The object.
    pub object: ObjectKey,
    /// One of [`crate::reason`].
    pub reason: &'static str,
    /// What is wrong, with what, and what to do.
    pub message: String,
}

/// An object and the exact version of it that a decision was made on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Object name.
    pub name: Name,
    /// Object uid.
    pub uid: Name,
    /// `metadata.resourceVersion`.
    pub resource_version: Box<str>,
}

/// The version of an object that a snapshot shows.
pub fn version<F: Fact>(fact: &F) -> Version {
    Version {
        name: fact.name().clone(),
        uid: fact.uid().clone(),
        resource_version: fact.resource_version().into(),
    }
}

/// Where a new block comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Newly carved from the range.
    Carved,
    /// It was in `node.spec.podCIDRs`.
    Adopted,
    /// The node holds it, but its PodCIDR was lost.
    Recreated,
}

/// A PodCIDR to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBlock {
    /// The block.
    pub block: Block,
    /// Its ClusterCIDR.
    pub range: Name,
    /// Its node.
    pub node: Name,
    /// Uid of the Node.
    pub node_uid: Name,
    /// The node's addresses.
    pub addresses: Vec<IpAddr>,
    /// Labels.
    pub labels: Vec<(String, String)>,
    /// Where it comes from.
    pub origin: Origin,
}

impl NewBlock {
    /// See [`Step::retry_key`]. Of the kind Node: that a create is refused casts no doubt on what is known of PodCIDRs.
    pub fn retry_key(node: &str, family: Family) -> (Kind, Name) {
        (Kind::Node, format!("{family} for {node}").into())
    }
}

/// Why a PodCIDR changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The node's addresses, labels or uid changed.
    Refresh,
    /// Its node returned.
    Readopt,
    /// Its annotation asks for it to drain, and its node has another one.
    Asked,
    /// Its node does not need it: no new leases.
    Surplus,
    /// It drained, and is needed again or not asked to go any more.
    Resume,
    /// It was in quarantine, and its node reports a lease in it: routed again.
    InUse,
    /// Its node is gone (checked live before the write).
    NodeGone,
    /// It was drained, and its last lease has ended.
    Unused,
}

/// The operator's own fields of a PodCIDR; `None` leaves one as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockChange {
    /// `spec.nodeUID`.
    pub node_uid: Option<Name>,
    /// `spec.nodeAddresses`.
    pub addresses: Option<Vec<IpAddr>>,
    /// `spec.state`.
    pub state: Option<BlockState>,
    /// `spec.releaseAfter`; `Some(None)` takes it away.
    pub release_after: Option<Option<Timestamp>>,
    /// `metadata.labels`; `None` as a value takes the label away.
    pub labels: Vec<(String, Option<String>)>,
}

impl BlockChange {
    /// Whether there is nothing to change.
    pub fn is_empty(&self) -> bool {
        *self == BlockChange::default()
    }

    /// Whether labels are all that changes: nobody waits for those of thousands of blocks at once.
    pub fn is_labels_only(&self) -> bool {
        let without = BlockChange { labels: Vec::new(), ..self.clone() };
        !self.is_empty() && without.is_empty()
    }
}

/// The blocks of a [`Step::CreateRange`] with that `block_prefix`, in words.
pub fn blocks_in_words(block_prefix: Option<u8>) -> String {
    match block_prefix {
        Some(prefix) => format!("/{prefix} blocks"),
        None => "blocks of what nodes can hold".to_owned(),
    }
}

/// One write to the API server.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Create a default ClusterCIDR.
    CreateRange {
        /// Object name.
        name: Name,
        /// The range.
        range: Block,
        /// Prefix length of its blocks; `None`: what its nodes can hold (`blockSizing: MaxPods`).
        block_prefix: Option<u8>,
        /// Node label whose values' blocks lie together.
        topology_key: Option<Box<str>>,
        /// Quarantine of its blocks.
        quarantine_seconds: i32,
    },
    /// Put the finalizer on a ClusterCIDR and fill in its block size.
    PrepareRange {
        /// The object.
        object: Version,
        /// All finalizers that it then has.
        finalizers: Vec<String>,
        /// Block size, unless it is set already or cannot be told yet.
        block_size: Option<BlockSize>,
    },
    /// Take our finalizer off a ClusterCIDR.
    ReleaseRange {
        /// The object.
        object: Version,
        /// The finalizers of others.
        finalizers: Vec<String>,
    },
    /// Create a PodCIDR: the API server's name uniqueness is the lock.
    CreateBlock(NewBlock),
    /// Change our fields of a PodCIDR.
    ChangeBlock {
        /// The object.
        object: Version,
        /// Its node.
        node: Name,
        /// Uid of the Node, old or new.
        node_uid: Name,
        /// What changes.
        change: BlockChange,
        /// Why.
        why: Why,
    },
    /// Free a block: delete its PodCIDR, if its node is still gone (checked live).
    DeleteBlock {
        /// The object.
        object: Version,
        /// Its former node.
        node: Name,
        /// Uid of the Node, if it lives: it has given the block back. Else it must be gone (checked live).
        living: Option<Name>,
        /// Live nodes that have not proven in time that they withdrew their route.
        unproven: Option<Silent>,
    },
    /// Write blocks into an empty `node.spec.podCIDRs`.
    MirrorToNode {
        /// The Node.
        node: Name,
        /// Its uid.
        uid: Name,
        /// The blocks, primary family first.
        pod_cidrs: Vec<Block>,
    },
    /// Set `NetworkUnavailable=False` where somebody set it `True`.
    ClearNetworkUnavailable {
        /// The Node.
        node: Name,
        /// Its uid.
        uid: Name,
        /// The blocks that are ready.
        blocks: Vec<Block>,
        /// Time of the condition.
        at: Timestamp,
    },
    /// Create a node's NodeNetwork.
    CreateReport {
        /// The node.
        node: Name,
    },
    /// Delete the NodeNetwork of a node that is gone.
    DeleteReport {
        /// The node.
        node: Name,
        /// Uid of the NodeNetwork.
        uid: Name,
    },
    /// Write a ClusterCIDR's status.
    RangeStatus {
        /// The object.
        object: Version,
        /// The status it had.
        old: Box<ClusterCIDRStatus>,
        /// The status it gets.
        new: Box<ClusterCIDRStatus>,
    },
    /// Write a RoutingPolicy's status.
    PolicyStatus {
        /// The object.
        object: Version,
        /// The status it had.
        old: Box<RoutingPolicyStatus>,
        /// The status it gets.
        new: Box<RoutingPolicyStatus>,
    },
    /// Write a PodCIDR's status.
    BlockStatus {
        /// The object; its resourceVersion is not a condition of the write.
        object: Version,
        /// Its node.
        node: Name,
        /// The status it had.
        old: Box<PodCIDRStatus>,
        /// The status it gets.
        new: Box<PodCIDRStatus>,
    },
}

impl Step {
    /// The step's name in metrics and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Step::CreateRange { .. } => "create_range",
            Step::PrepareRange { .. } => "prepare_range",
            Step::ReleaseRange { .. } => "release_range",
            Step::CreateBlock(_) => "create_block",
            Step::ChangeBlock { .. } => "change_block",
            Step::DeleteBlock { .. } => "delete_block",
            Step::MirrorToNode { .. } => "mirror_to_node",
            Step::ClearNetworkUnavailable { .. } => "clear_network_unavailable",
            Step::CreateReport { .. } => "create_report",
            Step::DeleteReport { .. } => "delete_report",
            Step::RangeStatus { .. } => "range_status",
            Step::PolicyStatus { .. } => "policy_status",
            Step::BlockStatus { .. } => "block_status",
        }
    }

    /// What is tried again later if it fails. A create is its node's and not its block's: else a node that is
    /// refused one block would ask for the next at once. (No object's name holds a space.)
    pub fn retry_key(&self) -> (Kind, Name) {
        match self {
            Step::CreateBlock(new) => NewBlock::retry_key(&new.node, new.block.family()),
            _ => self.target(),
        }
    }

    /// Kind and name of the object that is written.
    pub fn target(&self) -> (Kind, Name) {
        match self {
            Step::CreateRange { name, .. } => (Kind::ClusterCIDR, name.clone()),
            Step::PrepareRange { object, .. }
            | Step::ReleaseRange { object, .. }
            | Step::RangeStatus { object, .. } => (Kind::ClusterCIDR, object.name.clone()),
            Step::PolicyStatus { object, .. } => (Kind::RoutingPolicy, object.name.clone()),
            Step::CreateBlock(new) => (Kind::PodCIDR, new.block.object_name().into()),
            Step::ChangeBlock { object, .. }
            | Step::DeleteBlock { object, .. }
            | Step::BlockStatus { object, .. } => (Kind::PodCIDR, object.name.clone()),
            Step::MirrorToNode { node, .. } | Step::ClearNetworkUnavailable { node, .. } => {
                (Kind::Node, node.clone())
            }
            Step::CreateReport { node } | Step::DeleteReport { node, .. } => {
                (Kind::NodeNetwork, node.clone())
            }
        }
    }
}

impl Version {
    /// The uid as a precondition: the write fails on another object of that name.
    pub fn uid_only(&self) -> Value {
        json!({"uid": &*self.uid})
    }

    /// Uid and resourceVersion as a precondition: the write fails if anything changed since.
    pub fn exact(&self) -> Value {
        json!({"uid": &*self.uid, "resourceVersion": &*self.resource_version})
    }
}

/// The JSON merge patch (RFC 7386) for a change, conditional on the object's exact version.
///
/// A merge patch and not server-side apply: a POST leaves its fields to the manager's `Update` entry, which
/// an apply by the same manager does not take over, so a label or `nodeUID` left out of a later apply would
/// stay for ever (tried on 1.37). A merge patch says what goes away, names nothing of `routing`, and answers
/// 404 where apply would make a new object.
pub fn block_patch(object: &Version, change: &BlockChange) -> Value {
    let mut metadata = object.exact();
    if !change.labels.is_empty() {
        let labels: Map<String, Value> =
            change.labels.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        metadata["labels"] = labels.into();
    }
    let mut spec = Map::new();
    if let Some(uid) = &change.node_uid {
        spec.insert("nodeUID".to_owned(), json!(&**uid));
    }
    if let Some(addresses) = &change.addresses {
        spec.insert("nodeAddresses".to_owned(), json!(addresses));
    }
    if let Some(state) = change.state {
        spec.insert("state".to_owned(), json!(state));
    }
    if let Some(at) = change.release_after {
        spec.insert("releaseAfter".to_owned(), json!(at.map(Time)));
    }
    if spec.is_empty() { json!({"metadata": metadata}) } else { json!({"metadata": metadata, "spec": spec}) }
}

/// The JSON merge patch that turns `old` into `new`; `None` if they are equal. `new` must not hold nulls.
pub fn merge_patch(old: &Value, new: &Value) -> Option<Value> {
    match (old, new) {
        _ if old == new => None,
        (Value::Object(old), Value::Object(new)) => {
            let gone = old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key.clone(), Value::Null));
            let changed = new.iter().filter_map(|(key, value)| {
                Some((key.clone(), merge_patch(old.get(key).unwrap_or(&Value::Null), value)?))
            });
            Some(Value::Object(gone.chain(changed).collect()))
        }
        _ => Some(new.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version() -> Version {
        Version { name: "b".into(), uid: "u".into(), resource_version: "7".into() }
    }

    #[test]
    fn a_change_names_only_what_changes_and_never_routing() {
        let change = BlockChange {
            state: Some(BlockState::Active),
            release_after: Some(None),
            labels: vec![("zone".into(), None), ("rack".into(), Some("2".into()))],
            ..BlockChange::default()
        };
        assert_eq!(
            block_patch(&version(), &change),
            json!({"metadata": {"uid": "u", "resourceVersion": "7", "labels": {"zone": null, "rack": "2"}},
                "spec": {"state": "Active", "releaseAfter": null}})
        );
        let addresses =
            BlockChange { addresses: Some(vec!["10.0.0.1".parse().unwrap()]), ..BlockChange::default() };
        assert_eq!(block_patch(&version(), &addresses)["spec"], json!({"nodeAddresses": ["10.0.0.1"]}));
    }

    #[test]
    fn a_merge_patch_holds_the_difference() {
        for (old, new, expected) in [
            (json!({"a": 1}), json!({"a": 1}), None),
            (json!({"a": 1, "b": 2}), json!({"a": 1}), Some(json!({"b": null}))),
            (json!({"a": {"x": 1, "y": 2}}), json!({"a": {"x": 1, "y": 3}}), Some(json!({"a": {"y": 3}}))),
            (json!({"a": [1, 2]}), json!({"a": [1]}), Some(json!({"a": [1]}))),
            (json!({}), json!({"a": {"b": 1}}), Some(json!({"a": {"b": 1}}))),
            (json!(null), json!({"a": 1}), Some(json!({"a": 1}))),
        ] {
            assert_eq!(merge_patch(&old, &new), expected, "{old} -> {new}");
        }
    }
}
