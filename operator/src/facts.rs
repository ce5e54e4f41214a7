//! Objects in, facts out: what the operator keeps of each object, and no more. Pure.
//!
//! An object that cannot be read still becomes a fact with a `problem`: it exists, its name (for a PodCIDR
//! that is its block) is taken, and it is named to its owner. It never stops the others.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::core::DeserializeGuard;
use plat_crds::cluster_cidr::{Allocation, BlockSizing, BlocksPerNode};
use plat_crds::digest::Digest;
use plat_crds::node_network::{FailedObject, Incident, LostBlocks, PolicyReport, PolicyState};
use plat_crds::pod_cidr::BlockState;
use plat_crds::routing::{self, Layer, Routing};
use plat_crds::routing_policy::{LastGood, Phase, RoutingPolicy, RoutingPolicySpec, RoutingPolicyStatus};
use plat_crds::{
    Block, ClusterCIDR, ClusterCIDRSpec, ClusterCIDRStatus, NodeNetwork, PodCIDR, PodCIDRStatus, condition,
    names,
};

use crate::node_view::NodeView;
use crate::stretch::Stretch;
use crate::written::{Written, WrittenCondition};
use plat_crds::selector::{Labels, Selector};

/// An object's name or uid, shared between facts and steps.
pub type Name = Arc<str>;

/// Taint of a node that its cloud controller has not looked at yet.
const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";
/// PodCIDRs carry at most so many node addresses (the CRD's bound).
const MAX_ADDRESSES: usize = 8;

/// What every kind of fact has.
pub trait Fact: Clone + PartialEq {
    /// Object name.
    fn name(&self) -> &Name;
    /// Object uid.
    fn uid(&self) -> &Name;
    /// `metadata.resourceVersion`; empty for kinds whose writes need none.
    fn resource_version(&self) -> &str;
}

/// Kubernetes' view of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// `Ready=True`: it is live.
    Ready,
    /// `Ready=False`, or not reported yet.
    NotReady,
    /// `Ready=Unknown`: contact was lost.
    Lost,
}

/// A Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFact {
    /// Node name.
    pub name: Name,
    /// Node uid.
    pub uid: Name,
    /// When the object was created.
    pub created: Timestamp,
    /// All its labels: selectors may name any of them, today or tomorrow.
    pub labels: Labels,
    /// Its `Ready` condition.
    pub health: Health,
    /// Its InternalIPs, in its own order (primary family first).
    pub addresses: Box<[IpAddr]>,
    /// `spec.podCIDRs`, in its own order.
    pub pod_cidrs: Box<[PodCidrText]>,
    /// Who wrote `spec.podCIDRs`, if the object says so (`metadata.managedFields`).
    pub pod_cidrs_by: Option<Writer>,
    /// Whether somebody set `NetworkUnavailable=True`.
    pub network_unavailable: bool,
    /// Whether its cloud has yet to say more of it, such as its zone: it has the taint
    /// `node.cloudprovider.kubernetes.io/uninitialized`, which goes when that is written.
    pub uninitialized: bool,
    /// How many pods may run on it (`status.allocatable.pods`); `None` if it does not say. A kubelet writes
    /// it at each start, so it changes no fact while the node runs.
    pub max_pods: Option<u32>,
    /// Why the object could not be read. Then it only stands for the node's existence.
    pub problem: Option<Box<str>>,
}

/// Who wrote a field, and when.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Writer {
    /// When, by the API server's clock, in whole seconds.
    pub at: Timestamp,
    /// The field manager: the name by which a program writes.
    pub manager: Box<str>,
}

/// One of `node.spec.podCIDRs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodCidrText {
    /// A block; host bits, which the API server lets pass, are cleared.
    Block(Block),
    /// Not a CIDR.
    Invalid(Box<str>),
}

/// A ClusterCIDR.
#[derive(Clone, Debug, PartialEq)]
pub struct RangeFact {
    /// Object name.
    pub name: Name,
    /// Object uid.
    pub uid: Name,
    /// Object version.
    pub resource_version: Box<str>,
    /// Generation of the spec.
    pub generation: i64,
    /// When the object was created: of two overlapping ranges the older wins.
    pub created: Timestamp,
    /// Whether its deletion was requested.
    pub deleting: bool,
    /// All its finalizers.
    pub finalizers: Box<[String]>,
    /// The range; `None` if its text is no block (see `problem`).
    pub range: Option<Block>,
    /// Prefix length of its blocks; `None` until the operator has filled it in.
    pub block_prefix: Option<u8>,
    /// How the operator fills it in.
    pub block_sizing: BlockSizing,
    /// Which nodes it is for.
    pub selector: Selector,
    /// Node label whose value says which nodes' blocks lie together.
    pub topology_key: Option<Name>,
    /// Highest first.
    pub priority: i32,
    /// Parts that are never handed out.
    pub reserved: Box<[Block]>,
    /// How many blocks of its family a node has.
    pub blocks_per_node: BlocksPerNode,
    /// How long a released block rests.
    pub quarantine_seconds: i32,
    /// Whether new blocks are carved.
    pub allocation: Allocation,
    /// Routing defaults of its blocks.
    pub routing: Option<Box<Routing>>,
    /// What the operator last wrote.
    pub status: ClusterCIDRStatus,
    /// Why the object cannot be used.
    pub problem: Option<Box<str>>,
}

/// A PodCIDR.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockFact {
    /// Object name.
    pub name: Name,
    /// Object uid.
    pub uid: Name,
    /// Object version.
    pub resource_version: Box<str>,
    /// Generation of the spec.
    pub generation: i64,
    /// When the object was created: of two blocks of a node the older is the node's own.
    pub created: Timestamp,
    /// Whether its deletion was requested (and somebody's finalizer holds it).
    pub deleting: bool,
    /// The block.
    pub block: Block,
    /// Name of its ClusterCIDR; empty in an unreadable object.
    pub range: Name,
    /// Name of its node.
    pub node: Name,
    /// Node object it is held for.
    pub node_uid: Option<Name>,
    /// Where other nodes route to.
    pub addresses: Box<[IpAddr]>,
    /// What the node may do with it.
    pub state: BlockState,
    /// When a quarantined block becomes free.
    pub release_after: Option<Timestamp>,
    /// Whether its annotation asks for its pods to move off it.
    pub drain: bool,
    /// The users' policy.
    pub routing: Option<Box<Routing>>,
    /// All its labels.
    pub labels: Labels,
    /// Those of them that are not the operator's (`metadata.managedFields`): it removes none of these.
    pub others_labels: Labels,
    /// What the operator last wrote.
    pub status: Option<Box<Written>>,
    /// Why the object could not be read. Then it is taken, and nothing is changed in it.
    pub problem: Option<Box<str>>,
}

/// A RoutingPolicy.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyFact {
    /// Object name.
    pub name: Name,
    /// Object uid.
    pub uid: Name,
    /// Object version.
    pub resource_version: Box<str>,
    /// Generation of the spec.
    pub generation: i64,
    /// The newest spec.
    pub spec: Box<RoutingPolicySpec>,
    /// Blocks that it is about.
    pub destinations: Selector,
    /// Nodes that follow it.
    pub sources: Selector,
    /// Nodes that follow a change first, if there is a rollout.
    pub canary: Option<Selector>,
    /// Label keys that the last good version names: it chooses nodes and blocks while a new one is tried.
    pub good_keys: Box<[Box<str>]>,
    /// Why the spec cannot be followed, with the field's name.
    pub invalid: Option<Box<str>>,
    /// What the operator last wrote.
    pub status: RoutingPolicyStatus,
    /// Why the object could not be read.
    pub problem: Option<Box<str>>,
}

/// A NodeNetwork: a node's own report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportFact {
    /// Node name.
    pub name: Name,
    /// Uid of the NodeNetwork.
    pub uid: Name,
    /// Whether the agent has reported at all.
    pub reported: bool,
    /// What is in the node's kernel.
    pub applied: Option<Digest>,
    /// What the node has acted on, also where it failed; `None` from agents of before.
    pub seen: Option<Digest>,
    /// Objects that could not be applied.
    pub failed: Box<[FailedObject]>,
    /// Whether more failed than it could name.
    pub names_not_all: bool,
    /// Blocks that the node leases from or has leases in.
    pub held: Box<[Held]>,
    /// PodCIDRs that the node knew and that went without having been released.
    pub lost: Lost,
    /// What the node does with RoutingPolicies.
    pub policies: Box<[Said]>,
    /// The first condition that keeps the node from being programmed, as `type: message`; `None` if
    /// `RoutesReady`, `MasqueradeReady` and `CNIReady` are all `True`.
    pub unready: Option<Box<str>>,
    /// Why the object could not be read.
    pub problem: Option<Box<str>>,
}

/// What a node says of a generation of a RoutingPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Uid and generation of the policy. A digest, as there is one for each policy and node.
    pub generation: Digest,
    /// What the node does with it.
    pub state: PolicyState,
    /// Why, if it failed or was rolled back.
    pub message: Option<Box<str>>,
}

/// A block that a node says it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The block.
    pub block: Block,
    /// Leased addresses; `None` if the node cannot tell.
    pub used: Option<i64>,
}

impl Held {
    /// Leased addresses and capacity; `None` if the node cannot tell.
    pub fn usage(&self) -> Option<(u32, u32)> {
        let used = u32::try_from(self.used?.max(0)).unwrap_or(u32::MAX);
        Some((used, self.block.capacity()))
    }
}

/// Lost PodCIDRs that a node tells of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// The blocks, with the nodes that held them.
    pub blocks: Box<[(Block, Name)]>,
    /// Whether there are more than it could name.
    pub is_cut: bool,
}

impl Lost {
    fn read(lost: &LostBlocks) -> Lost {
        let blocks = lost.blocks.iter();
        Lost {
            blocks: blocks
                .filter_map(|lost| Some((lost.cidr.parse().ok()?, lost.node_name.as_str().into())))
                .collect(),
            is_cut: usize::try_from(lost.count).is_ok_and(|count| count > lost.blocks.len()),
        }
    }
}

macro_rules! impl_fact {
    ($fact:ty, $version:expr) => {
        impl Fact for $fact {
            fn name(&self) -> &Name {
                &self.name
            }
            fn uid(&self) -> &Name {
                &self.uid
            }
            fn resource_version(&self) -> &str {
                let version: fn(&$fact) -> &str = $version;
                version(self)
            }
        }
    };
}
impl_fact!(NodeFact, |_| "");
impl_fact!(RangeFact, |f| &f.resource_version);
impl_fact!(BlockFact, |f| &f.resource_version);
impl_fact!(PolicyFact, |f| &f.resource_version);
impl_fact!(ReportFact, |_| "");

impl NodeFact {
    /// Reads a Node.
    pub fn read(guarded: &DeserializeGuard<NodeView>) -> NodeFact {
        let empty = NodeView::default();
        let (meta, node, problem) = match &guarded.0 {
            Ok(node) => (&node.metadata, node, None),
            Err(invalid) => (&invalid.metadata, &empty, Some(invalid.error.as_str().into())),
        };
        let condition = |type_: &str| {
            let conditions = node.status.conditions.as_deref().unwrap_or_default();
            conditions.iter().find(|c| c.type_ == type_).map(|c| c.status.as_str())
        };
        NodeFact {
            name: name_of(meta),
            uid: uid_of(meta),
            created: created(meta),
            labels: Labels::pack(meta.labels.as_ref()),
            health: match condition("Ready") {
                Some("True") => Health::Ready,
                Some("Unknown") => Health::Lost,
                _ => Health::NotReady,
            },
            addresses: internal_addresses(node),
            pod_cidrs: pod_cidrs(node),
            pod_cidrs_by: pod_cidrs_writer(meta),
            network_unavailable: condition("NetworkUnavailable") == Some("True"),
            uninitialized: node.spec.taints.iter().flatten().any(|taint| taint.key == UNINITIALIZED),
            max_pods: node.status.allocatable.as_ref().and_then(|a| whole_number(a.pods.as_deref()?)),
            problem,
        }
    }

    /// The blocks among its `spec.podCIDRs`.
    pub fn spec_blocks(&self) -> impl Iterator<Item = Block> + '_ {
        self.pod_cidrs.iter().filter_map(|text| match text {
            PodCidrText::Block(block) => Some(*block),
            PodCidrText::Invalid(_) => None,
        })
    }
}

impl RangeFact {
    /// Reads a ClusterCIDR.
    pub fn read(guarded: &DeserializeGuard<ClusterCIDR>) -> RangeFact {
        let empty = ClusterCIDR::new("", ClusterCIDRSpec::default());
        let (meta, object, mut problem) = match &guarded.0 {
            Ok(object) => (&object.metadata, object, None),
            Err(invalid) => (&invalid.metadata, &empty, Some(invalid.error.clone())),
        };
        let spec = &object.spec;
        let mut keep = |error: String| {
            problem.get_or_insert(error);
        };
        let range = spec.range().map_err(|error| keep(error.to_string())).ok();
        let selector = Selector::read(spec.node_selector.as_ref()).unwrap_or_else(|error| {
            keep(error.to_string());
            Selector::default()
        });
        let reserved = spec.reserved.iter().filter_map(|text| match text.parse::<IpNet>() {
            Ok(net) => Some(Block::containing(net)),
            Err(_) => {
                keep(format!("reserved '{text}' is not a CIDR"));
                None
            }
        });
        let reserved = reserved.collect();
        RangeFact {
            name: name_of(meta),
            uid: uid_of(meta),
            resource_version: meta.resource_version.clone().unwrap_or_default().into(),
            generation: meta.generation.unwrap_or_default(),
            created: created(meta),
            deleting: meta.deletion_timestamp.is_some(),
            finalizers: meta.finalizers.clone().unwrap_or_default().into(),
            block_prefix: spec.block_prefix_length.and_then(|length| u8::try_from(length).ok()),
            block_sizing: spec.block_sizing,
            range,
            selector,
            topology_key: spec.topology_key.as_deref().map(Into::into),
            priority: spec.priority,
            reserved,
            blocks_per_node: spec.blocks_per_node,
            quarantine_seconds: spec.quarantine_seconds,
            allocation: spec.allocation,
            routing: spec.routing.clone().map(Box::new),
            status: object.status.clone().unwrap_or_default(),
            problem: problem.map(Into::into),
        }
    }

    /// The prefix that covers a stretch of its blocks.
    pub fn prefix(&self, stretch: &Stretch) -> Option<Block> {
        let length = self.block_prefix?.checked_sub(u8::try_from(stretch.level()).ok()?)?;
        self.range?.subblock(length, stretch.first() >> stretch.level())
    }

    /// Whether our finalizer holds it.
    pub fn has_our_finalizer(&self) -> bool {
        self.finalizers.iter().any(|f| f == names::CLUSTER_CIDR_FINALIZER)
    }

    /// Blocks that a node has from the start.
    pub fn min_blocks(&self) -> usize {
        usize::try_from(self.blocks_per_node.min).unwrap_or(0).max(1)
    }

    /// Blocks that a node has at most.
    pub fn max_blocks(&self) -> usize {
        usize::try_from(self.blocks_per_node.max).unwrap_or(0).max(self.min_blocks())
    }

    /// Whether blocks of one fixed size may come from it: the finalizer keeps the range until its last
    /// block is gone, and the size is written down.
    pub fn is_prepared(&self) -> bool {
        self.has_our_finalizer() && self.block_prefix.is_some()
    }
}

impl BlockFact {
    /// Reads a PodCIDR; `None` if not even its name tells a block, which no PodCIDR can be by its CEL rules.
    pub fn read(guarded: &DeserializeGuard<PodCIDR>) -> Option<BlockFact> {
        match &guarded.0 {
            Ok(object) => match object.spec.block() {
                Ok(block) => Some(BlockFact::readable(object, block)),
                Err(error) => BlockFact::unreadable(&object.metadata, error.to_string()),
            },
            Err(invalid) => BlockFact::unreadable(&invalid.metadata, invalid.error.clone()),
        }
    }

    fn readable(object: &PodCIDR, block: Block) -> BlockFact {
        let (meta, spec) = (&object.metadata, &object.spec);
        BlockFact {
            range: spec.cluster_cidr.as_str().into(),
            node: spec.node_name.as_str().into(),
            node_uid: spec.node_uid.as_deref().map(Into::into),
            addresses: spec.node_addresses.iter().filter_map(|a| a.parse().ok()).collect(),
            state: spec.state,
            release_after: spec.release_after.as_ref().map(|Time(at)| *at),
            routing: spec.routing.clone().map(Box::new),
            status: object.status.clone().map(|status| Box::new(status.into())),
            ..BlockFact::bare(meta, block)
        }
    }

    /// A PodCIDR of a newer version whose spec this one cannot read: its name is its block, and its label
    /// says (but for very long names) whose it is.
    fn unreadable(meta: &ObjectMeta, problem: String) -> Option<BlockFact> {
        let block = block_of_name(meta.name.as_deref()?)?;
        Some(BlockFact { problem: Some(problem.into()), ..BlockFact::bare(meta, block) })
    }

    fn bare(meta: &ObjectMeta, block: Block) -> BlockFact {
        let labels = Labels::pack(meta.labels.as_ref());
        BlockFact {
            name: name_of(meta),
            uid: uid_of(meta),
            resource_version: meta.resource_version.clone().unwrap_or_default().into(),
            generation: meta.generation.unwrap_or_default(),
            created: created(meta),
            deleting: meta.deletion_timestamp.is_some(),
            block,
            range: "".into(),
            node: labels.get(names::LABEL_NODE).unwrap_or_default().into(),
            node_uid: None,
            addresses: Box::default(),
            state: BlockState::Unknown,
            release_after: None,
            drain: meta.annotations.iter().flatten().any(|(key, _)| key == names::ANNOTATION_DRAIN),
            routing: None,
            labels,
            others_labels: others_labels(meta),
            status: None,
            problem: None,
        }
    }

    /// Its condition of that type; none before its status is written.
    pub fn condition(&self, type_: &str) -> Option<WrittenCondition<'_>> {
        self.status.as_ref()?.condition(type_)
    }

    /// Its status as objects have it; empty before it is written.
    pub fn unpacked_status(&self) -> PodCIDRStatus {
        self.status.as_ref().map(|status| status.unpack()).unwrap_or_default()
    }

    /// Whether it waits for reuse.
    pub fn is_quarantined(&self) -> bool {
        self.state == BlockState::Quarantined
    }
}

impl PolicyFact {
    /// Reads a RoutingPolicy.
    pub fn read(guarded: &DeserializeGuard<RoutingPolicy>) -> PolicyFact {
        let empty = RoutingPolicy::new("", RoutingPolicySpec::default());
        let (meta, object, problem) = match &guarded.0 {
            Ok(object) => (&object.metadata, object, None),
            Err(invalid) => (&invalid.metadata, &empty, Some(invalid.error.as_str().into())),
        };
        let spec = &object.spec;
        let mut invalid = None;
        let mut select = |field: &str, selector| {
            Selector::read(selector).unwrap_or_else(|error| {
                invalid.get_or_insert(format!("spec.{field}: {error}"));
                Selector::default()
            })
        };
        let destinations = select("destinations", spec.destinations.as_ref());
        let sources = select("sources", spec.sources.as_ref());
        let canary = spec.rollout.as_ref().map(|rollout| select("rollout.canary", Some(&rollout.canary)));
        let name = name_of(meta);
        let layers = [(Layer::RoutingPolicy(name.clone()), &spec.routing)];
        let unusable = routing::resolve(&layers).err().or_else(|| routing::resolve_egress(&layers).err());
        PolicyFact {
            uid: uid_of(meta),
            resource_version: meta.resource_version.clone().unwrap_or_default().into(),
            generation: meta.generation.unwrap_or_default(),
            spec: Box::new(spec.clone()),
            destinations,
            sources,
            canary,
            good_keys: object
                .status
                .as_ref()
                .and_then(|s| s.last_good.as_ref())
                .map(good_keys)
                .unwrap_or_default(),
            invalid: invalid.or_else(|| unusable.map(|error| error.to_string())).map(Into::into),
            status: object.status.clone().unwrap_or_default(),
            problem,
            name,
        }
    }

    /// How far its newest generation has come.
    pub fn phase(&self) -> Option<Phase> {
        self.status.phase.filter(|_| self.status.observed_generation == Some(self.generation))
    }

    /// The label keys that it names, in its newest and its last good version.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        let selectors = [Some(&self.destinations), Some(&self.sources), self.canary.as_ref()];
        selectors
            .into_iter()
            .flatten()
            .flat_map(Selector::keys)
            .chain(self.good_keys.iter().map(|key| &**key))
    }
}

impl ReportFact {
    /// Reads a NodeNetwork.
    pub fn read(guarded: &DeserializeGuard<NodeNetwork>) -> ReportFact {
        let (meta, status, problem) = match &guarded.0 {
            Ok(object) => (&object.metadata, object.status.as_ref(), None),
            Err(invalid) => (&invalid.metadata, None, Some(invalid.error.as_str().into())),
        };
        let applied = status.and_then(|s| s.applied.as_ref());
        let held = status.map(|s| s.held_blocks.as_slice()).unwrap_or_default();
        ReportFact {
            name: name_of(meta),
            uid: uid_of(meta),
            reported: status.is_some_and(|s| s.reported_at.is_some()),
            applied: applied.and_then(|a| a.digest.parse().ok()),
            seen: applied.and_then(|a| a.seen_digest.as_ref()?.parse().ok()),
            failed: applied.map(|a| a.failed.clone()).unwrap_or_default().into(),
            names_not_all: applied.is_some_and(|a| a.failed_count.is_some()),
            held: held
                .iter()
                .filter_map(|h| Some(Held { block: h.cidr.parse().ok()?, used: h.used }))
                .collect(),
            lost: status.and_then(|s| s.lost.as_ref()).map(Lost::read).unwrap_or_default(),
            policies: status
                .map(|s| s.policies.as_slice())
                .unwrap_or_default()
                .iter()
                .map(Said::read)
                .collect(),
            unready: status.and_then(first_unready),
            problem,
        }
    }
}

fn good_keys(good: &LastGood) -> Box<[Box<str>]> {
    let selectors = [good.spec.destinations.as_ref(), good.spec.sources.as_ref()];
    let selectors = selectors.into_iter().filter_map(|selector| Selector::read(selector).ok());
    selectors.flat_map(|selector| selector.keys().map(Into::into).collect::<Vec<_>>()).collect()
}

impl Said {
    fn read(report: &PolicyReport) -> Said {
        Said {
            generation: Digest::of([(report.uid.as_str(), report.generation)]),
            state: report.state,
            message: report.message.as_deref().map(Into::into),
        }
    }
}

/// Incidents of a report that are newer than `seen`, oldest first.
pub fn new_incidents(report: &NodeNetwork, seen: Timestamp) -> Vec<Incident> {
    let incidents = report.status.as_ref().map(|s| s.incidents.as_slice()).unwrap_or_default();
    let mut new: Vec<_> = incidents.iter().filter(|incident| incident.time.0 > seen).cloned().collect();
    new.sort_by_key(|incident| incident.time.0);
    new
}

fn first_unready(status: &plat_crds::NodeNetworkStatus) -> Option<Box<str>> {
    [condition::ROUTES_READY, condition::MASQUERADE_READY, condition::CNI_READY].into_iter().find_map(
        |type_| match condition::find(&status.conditions, type_) {
            Some(c) if c.status == "True" => None,
            Some(c) => Some(format!("{type_}: {}", c.message).into()),
            None => Some(format!("{type_} is not reported yet").into()),
        },
    )
}

/// The block that an object name stands for: the inverse of [`Block::object_name`].
fn block_of_name(name: &str) -> Option<Block> {
    let (address, length) = name.rsplit_once('-')?;
    let block = [".", ":"]
        .iter()
        .find_map(|dot| format!("{}/{length}", address.replace('-', dot)).parse::<Block>().ok())?;
    (block.object_name() == name).then_some(block)
}

fn internal_addresses(node: &NodeView) -> Box<[IpAddr]> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in node.status.addresses.iter().flatten().filter(|a| a.type_ == "InternalIP") {
        if let Ok(ip) = address.address.parse()
            && !addresses.contains(&ip)
            && addresses.len() < MAX_ADDRESSES
        {
            addresses.push(ip);
        }
    }
    addresses.into()
}

/// The last one who wrote `spec.podCIDR` or `spec.podCIDRs` (API concepts, "Field management").
fn pod_cidrs_writer(meta: &ObjectMeta) -> Option<Writer> {
    let entries = meta.managed_fields.iter().flatten();
    let writes = entries.filter(|entry| {
        let spec = entry.fields_v1.as_ref().and_then(|fields| fields.0.get("f:spec"));
        spec.is_some_and(|spec| ["f:podCIDRs", "f:podCIDR"].iter().any(|field| spec.get(field).is_some()))
    });
    let writer = writes.filter_map(|entry| {
        Some(Writer { at: entry.time.as_ref()?.0, manager: entry.manager.as_deref()?.into() })
    });
    writer.max()
}

/// The labels of a PodCIDR that the operator does not own: mostly none.
fn others_labels(meta: &ObjectMeta) -> Labels {
    let entries = meta.managed_fields.iter().flatten();
    let ours = entries.filter(|entry| entry.manager.as_deref() == Some(names::OPERATOR_MANAGER));
    let labels = ours.filter_map(|entry| entry.fields_v1.as_ref()?.0.pointer("/f:metadata/f:labels"));
    let owned: Vec<_> = labels.collect();
    let others = meta.labels.iter().flatten().filter(|(key, _)| {
        let field = format!("f:{key}");
        !owned.iter().any(|labels| labels.get(&field).is_some())
    });
    Labels::pack(Some(&others.map(|(key, value)| (key.clone(), value.clone())).collect()))
}

fn pod_cidrs(node: &NodeView) -> Box<[PodCidrText]> {
    let list = node.spec.pod_cidrs.iter().flatten();
    let single = node.spec.pod_cidr.iter().filter(|_| node.spec.pod_cidrs.as_ref().is_none_or(Vec::is_empty));
    let texts = list.chain(single).filter(|text| !text.is_empty());
    let parse = |text: &String| match text.parse::<IpNet>() {
        Ok(net) => PodCidrText::Block(Block::containing(net)),
        Err(_) => PodCidrText::Invalid(text.as_str().into()),
    };
    texts.map(parse).collect()
}

/// A count written as a Kubernetes quantity, whose canonical form of 2000 is `2k`.
fn whole_number(quantity: &str) -> Option<u32> {
    match quantity.strip_suffix('k') {
        Some(thousands) => thousands.parse::<u32>().ok()?.checked_mul(1000),
        None => quantity.parse().ok(),
    }
}

fn name_of(meta: &ObjectMeta) -> Name {
    meta.name.as_deref().unwrap_or_default().into()
}

fn uid_of(meta: &ObjectMeta) -> Name {
    meta.uid.as_deref().unwrap_or_default().into()
}

fn created(meta: &ObjectMeta) -> Timestamp {
    meta.creation_timestamp.as_ref().map(|Time(at)| *at).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn guarded<K: serde::de::DeserializeOwned + kube::Resource>(value: Value) -> DeserializeGuard<K> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_node_becomes_a_small_fact() {
        let node = NodeFact::read(&guarded(json!({
            "metadata": {"name": "n1", "uid": "u1", "labels": {"zone": "a"}, "creationTimestamp": "2026-01-02T03:04:05Z"},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"], "taints": [{"key": "x", "effect": "NoSchedule"}, {"key": "node.cloudprovider.kubernetes.io/uninitialized", "value": "true"}]},
            "status": {
                "images": [{"names": ["x"]}],
                "allocatable": {"pods": "110", "cpu": "3920m", "memory": "7Gi"},
                "addresses": [
                    {"type": "Hostname", "address": "n1"}, {"type": "InternalIP", "address": "172.30.0.11"},
                    {"type": "InternalIP", "address": "172.30.0.11"}, {"type": "InternalIP", "address": "fd00::11"},
                    {"type": "ExternalIP", "address": "8.8.8.8"}, {"type": "InternalIP", "address": "nonsense"}],
                "conditions": [{"type": "Ready", "status": "Unknown"}, {"type": "NetworkUnavailable", "status": "True"}]}
        })));
        assert_eq!(
            (&*node.name, &*node.uid, node.health, node.network_unavailable),
            ("n1", "u1", Health::Lost, true)
        );
        assert_eq!(
            node.addresses.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["172.30.0.11", "fd00::11"]
        );
        assert_eq!(
            node.spec_blocks().map(|b| b.to_string()).collect::<Vec<_>>(),
            ["10.244.1.0/24", "fd00:10:244:1::/64"]
        );
        assert_eq!((node.labels.get("zone"), node.max_pods, node.problem), (Some("a"), Some(110), None));
        assert!(node.uninitialized);
    }

    #[test]
    fn a_number_of_pods_is_read_as_the_api_server_writes_it() {
        for (text, expected) in [
            ("110", Some(110)),
            ("2k", Some(2000)),
            ("0", Some(0)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("9999999k", None),
        ] {
            assert_eq!(whole_number(text), expected, "{text}");
        }
    }

    #[test]
    fn a_node_with_odd_pod_cidrs_keeps_them_apart() {
        for (spec, expected) in [
            (json!({}), vec![]),
            (json!({"podCIDR": ""}), vec![]),
            (json!({"podCIDR": "10.1.0.0/24"}), vec!["10.1.0.0/24"]),
            (json!({"podCIDRs": ["10.1.0.7/24", "what"]}), vec!["10.1.0.0/24", "!what"]),
        ] {
            let node = NodeFact::read(&guarded(json!({"metadata": {"name": "n"}, "spec": spec})));
            let texts = node.pod_cidrs.iter().map(|t| match t {
                PodCidrText::Block(b) => b.to_string(),
                PodCidrText::Invalid(t) => format!("!{t}"),
            });
            assert_eq!(texts.collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn an_unreadable_node_still_exists() {
        let node = NodeFact::read(&guarded(
            json!({"metadata": {"name": "n", "uid": "u"}, "status": {"addresses": 7}}),
        ));
        assert_eq!((&*node.name, &*node.uid), ("n", "u"));
        assert!(node.problem.unwrap().contains("type"));
    }

    #[test]
    fn an_unreadable_pod_cidr_keeps_its_block_and_its_node() {
        let fact = BlockFact::read(&guarded(json!({
            "metadata": {"name": "fd00-10-244-3---64", "uid": "u", "labels": {"plat.network/node": "n3"}}, "spec": {"cidr": 7}
        }))).unwrap();
        assert_eq!((fact.block.to_string().as_str(), &*fact.node), ("fd00:10:244:3::/64", "n3"));
        assert!(fact.problem.is_some());
        assert!(BlockFact::read(&guarded(json!({"metadata": {"name": "nonsense"}, "spec": {}}))).is_none());
    }

    #[test]
    fn an_unusable_cluster_cidr_says_why() {
        for (spec, expected) in [
            (json!({"cidr": "10.244.0.1/16"}), "host bits"),
            (json!({"cidr": "10.244.0.0/16", "reserved": ["x"]}), "reserved 'x' is not a CIDR"),
            (
                json!({"cidr": "10.244.0.0/16", "nodeSelector": {"matchExpressions": [{"key": "a", "operator": "Gt"}]}}),
                "operator 'Gt'",
            ),
            (json!({"cidr": "10.244.0.0/16", "priority": "high"}), "type"),
        ] {
            let fact = RangeFact::read(&guarded(json!({"metadata": {"name": "r"}, "spec": spec})));
            assert!(fact.problem.as_deref().unwrap().contains(expected), "{:?}", fact.problem);
        }
        let fine =
            RangeFact::read(&guarded(json!({"metadata": {"name": "r"}, "spec": {"cidr": "10.244.0.0/16"}})));
        assert_eq!((fine.problem, fine.quarantine_seconds, fine.block_prefix), (None, 900, None));
    }

    #[test]
    fn object_names_turn_back_into_blocks() {
        for text in
            ["10.244.3.0/24", "fd00:10:244:3::/64", "fd00::/64", "2001:db8:1:2:3:4:5:0/112", "10.0.0.0/8"]
        {
            let block: Block = text.parse().unwrap();
            assert_eq!(block_of_name(&block.object_name()), Some(block));
        }
        for other in ["", "a", "10-244-3-0", "10-244-3-1-24", "fd00--1-64"] {
            assert_eq!(block_of_name(other), None, "{other}");
        }
    }

    #[test]
    fn a_report_says_what_keeps_its_node_from_being_programmed() {
        let report = |conditions: Value| {
            ReportFact::read(&guarded(json!({
                "metadata": {"name": "n1"},
                "status": {"reportedAt": "2026-01-01T00:00:00Z", "conditions": conditions,
                    "applied": {"count": 1, "digest": "00000000000000ff"},
                    "heldBlocks": [{"cidr": "10.244.1.0/24", "used": 3, "capacity": 253}, {"cidr": "x", "used": 0, "capacity": 0}]}
            })))
        };
        let time = "2026-01-01T00:00:00Z";
        let condition = |type_: &str, status: &str| json!({"type": type_, "status": status, "reason": "R", "message": "m", "lastTransitionTime": time});
        let fine = report(json!([
            condition("RoutesReady", "True"),
            condition("MasqueradeReady", "True"),
            condition("CNIReady", "True")
        ]));
        assert_eq!((fine.unready, fine.reported, fine.held.len()), (None, true, 1));
        let bad = report(json!([condition("RoutesReady", "True"), condition("MasqueradeReady", "False")]));
        assert_eq!(bad.unready.as_deref(), Some("MasqueradeReady: m"));
        assert_eq!(report(json!([])).unready.as_deref(), Some("RoutesReady is not reported yet"));
    }

    #[test]
    fn only_incidents_after_the_last_seen_one_are_new() {
        let incident = |second: u32| json!({"time": format!("2026-01-01T00:00:0{second}Z"), "reason": "R", "message": "m", "count": 1});
        let report: NodeNetwork = serde_json::from_value(json!({
            "apiVersion": "plat.network/v1alpha1", "kind": "NodeNetwork", "metadata": {"name": "n"},
            "status": {"incidents": [incident(3), incident(1), incident(2)]}
        }))
        .unwrap();
        let seen = "2026-01-01T00:00:01Z".parse().unwrap();
        let seconds: Vec<_> =
            new_incidents(&report, seen).iter().map(|i| i.time.0.as_second() % 60).collect();
        assert_eq!(seconds, [2, 3]);
    }
}
