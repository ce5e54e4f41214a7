//! What the agent knows of the cluster's objects, parsed once at the border.
//!
//! A [`BlockFact`] is a PodCIDR, a [`RangeFact`] a ClusterCIDR and a [`PolicyFact`] a RoutingPolicy, reduced to what the node's programming
//! depends on, with every text parsed. An object that cannot be parsed is a [`Fault`] that names it; the
//! rest of the set goes on. Facts are what `map.json` keeps, so the agent starts without the API server.

use std::net::IpAddr;

use ipnet::IpNet;
use kube::ResourceExt;
use plat_crds::block::Block;
use plat_crds::cluster_cidr::{Allocation, MasqueradeMode};
use plat_crds::condition::{self, CONVERGED};
use plat_crds::node_network::NOT_WITHDRAWN;
use plat_crds::pod_cidr::BlockState;
use plat_crds::routing::Routing;
use plat_crds::routing_policy::{self, LastGood, Phase, Progress};
use plat_crds::selector::{LabelSet, Labels, Selector};
use plat_crds::{ClusterCIDR, PodCIDR, RoutingPolicy, RoutingPolicySpec};
use serde::{Deserialize, Serialize};

/// The kinds that agents watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// A block.
    PodCIDR,
    /// A range of blocks.
    ClusterCIDR,
    /// How some nodes reach some blocks.
    RoutingPolicy,
}

/// Something that cannot be done for one object. The rest goes on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// Kind of the object.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// CamelCase word for programs.
    pub reason: Reason,
    /// What is wrong, and what to do.
    pub message: String,
}

/// Why an object's effect is not, or not wholly, in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// The object cannot be read.
    Unreadable,
    /// It shares addresses with an older block, or a route of another program takes its packets on this node.
    Overlapping,
    /// Its routing policy has a value that this agent does not know or cannot use.
    UnusablePolicy,
    /// Its node has no address of the block's family.
    NoNodeAddress,
    /// The next hop is not on a link of this node.
    NotOnLink,
    /// The link that its policy names is missing, down, or leads to no other node.
    NoInterface,
    /// The routing table that its policy names is another program's.
    TableInUse,
    /// The address that its policy names is not this node's.
    NotLocal,
    /// Another program has a route with the same prefix and metric.
    ForeignRoute,
    /// Another program's route to the same prefix has a better metric and leads elsewhere.
    Overridden,
    /// The kernel refused a route.
    KernelRefused,
    /// The kernel keeps a route that should go.
    NotWithdrawn,
    /// A route to it would cut off an address that this node needs.
    BlockHoldsNeededAddress,
    /// A route of this host or of another program shares addresses with the range.
    HostRoute,
    /// An `unreachable` route for the range would cut off an address that this node needs.
    RangeHoldsNeededAddress,
}

impl Reason {
    /// All of them.
    pub const ALL: [Reason; 15] = [
        Reason::Unreadable,
        Reason::Overlapping,
        Reason::UnusablePolicy,
        Reason::NoNodeAddress,
        Reason::NotOnLink,
        Reason::NoInterface,
        Reason::TableInUse,
        Reason::NotLocal,
        Reason::ForeignRoute,
        Reason::Overridden,
        Reason::KernelRefused,
        Reason::NotWithdrawn,
        Reason::BlockHoldsNeededAddress,
        Reason::HostRoute,
        Reason::RangeHoldsNeededAddress,
    ];

    /// The word that conditions, `failed[]` and metrics carry.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Unreadable => "Unreadable",
            Reason::Overlapping => "Overlapping",
            Reason::UnusablePolicy => "UnusablePolicy",
            Reason::NoNodeAddress => "NoNodeAddress",
            Reason::NotOnLink => "NotOnLink",
            Reason::NoInterface => "NoInterface",
            Reason::TableInUse => "TableInUse",
            Reason::NotLocal => "NotLocal",
            Reason::ForeignRoute => "ForeignRoute",
            Reason::Overridden => "Overridden",
            Reason::KernelRefused => "KernelRefused",
            Reason::NotWithdrawn => NOT_WITHDRAWN,
            Reason::BlockHoldsNeededAddress => "BlockHoldsNeededAddress",
            Reason::HostRoute => "HostRoute",
            Reason::RangeHoldsNeededAddress => "RangeHoldsNeededAddress",
        }
    }
}

impl Fault {
    /// A fault of a PodCIDR.
    pub fn block(name: impl Into<String>, reason: Reason, message: impl Into<String>) -> Fault {
        Fault { kind: Kind::PodCIDR, name: name.into(), reason, message: message.into() }
    }

    /// A fault of a ClusterCIDR.
    pub fn range(name: impl Into<String>, reason: Reason, message: impl Into<String>) -> Fault {
        Fault { kind: Kind::ClusterCIDR, name: name.into(), reason, message: message.into() }
    }

    /// A fault of a RoutingPolicy.
    pub fn policy(name: impl Into<String>, reason: Reason, message: impl Into<String>) -> Fault {
        Fault { kind: Kind::RoutingPolicy, name: name.into(), reason, message: message.into() }
    }
}

/// What all kinds have.
pub trait Fact: Clone + PartialEq {
    /// Name of the object.
    fn name(&self) -> &str;
    /// UID and generation, for the digest.
    fn identity(&self) -> (&str, i64);
}

/// A PodCIDR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockFact {
    /// Object name.
    pub name: String,
    /// Object UID.
    pub uid: String,
    /// Generation of the spec.
    pub generation: i64,
    /// Seconds since the epoch at creation: of two overlapping blocks the older is programmed.
    pub created: i64,
    /// The block.
    pub block: Block,
    /// Name of its ClusterCIDR.
    pub range: String,
    /// Node that holds it.
    pub node: String,
    /// Addresses of that node.
    pub addresses: Vec<IpAddr>,
    /// What the node may do with it.
    pub state: BlockState,
    /// The users' policy.
    pub routing: Option<Routing>,
    /// Condition `Converged` of this generation; only of this node's own blocks, or each agent would be woken by
    /// the status of every block.
    #[serde(default)]
    pub converged: bool,
    /// Its labels: those of its node that policies name, among others.
    #[serde(default)]
    pub labels: Labels,
}

/// A RoutingPolicy: its spec, and what of its status decides which version a node follows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyFact {
    /// Object name.
    pub name: String,
    /// Object UID.
    pub uid: String,
    /// Generation of the spec.
    pub generation: i64,
    /// The newest spec.
    pub spec: RoutingPolicySpec,
    /// Generation that the phase speaks of.
    #[serde(default)]
    pub observed: Option<i64>,
    /// How far that generation has come.
    #[serde(default)]
    pub phase: Option<Phase>,
    /// The newest version that all nodes followed.
    #[serde(default)]
    pub last_good: Option<LastGood>,
}

/// A ClusterCIDR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RangeFact {
    /// Object name.
    pub name: String,
    /// Object UID.
    pub uid: String,
    /// Generation of the spec.
    pub generation: i64,
    /// The range.
    pub range: Block,
    /// Condition `Ready`: the operator carves blocks from it.
    pub ready: bool,
    /// How long a released block rests, in seconds.
    pub quarantine_seconds: u32,
    /// Routing defaults of its blocks.
    pub routing: Option<Routing>,
    /// Whether its pods' traffic out of the cluster is masqueraded.
    pub masquerade: MasqueradeMode,
    /// Destinations that see the pods' own addresses.
    pub exclude: Vec<IpNet>,
    /// How many blocks of its family a node may hold that has one of it.
    #[serde(default)]
    pub max_blocks: u32,
    /// Whether it gives out blocks now.
    #[serde(default)]
    pub gives_blocks: bool,
    /// Prefix length of its blocks; 0 if that is not known.
    #[serde(default)]
    pub block_prefix: u8,
}

impl Fact for BlockFact {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> (&str, i64) {
        (&self.uid, self.generation)
    }
}

impl Fact for RangeFact {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> (&str, i64) {
        (&self.uid, self.generation)
    }
}

impl Fact for PolicyFact {
    fn name(&self) -> &str {
        &self.name
    }

    fn identity(&self) -> (&str, i64) {
        (&self.uid, self.generation)
    }
}

impl PolicyFact {
    /// Reads a RoutingPolicy.
    pub fn read(object: &RoutingPolicy) -> Result<PolicyFact, Fault> {
        let name = object.name_any();
        let spec = &object.spec;
        let canary = spec.rollout.as_ref().map(|rollout| &rollout.canary);
        for selector in [spec.destinations.as_ref(), spec.sources.as_ref(), canary] {
            Selector::read(selector).map_err(|error| {
                Fault::policy(&name, Reason::Unreadable, format!("RoutingPolicy '{name}': {error}"))
            })?;
        }
        let status = object.status.as_ref();
        Ok(PolicyFact {
            uid: object.uid().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            spec: spec.clone(),
            observed: status.and_then(|status| status.observed_generation),
            phase: status.and_then(|status| status.phase),
            last_good: status.and_then(|status| status.last_good.clone()),
            name,
        })
    }

    /// The version that the operator lets a node with these labels follow, with its generation.
    pub fn followed<L: LabelSet + ?Sized>(&self, own: &L) -> Option<(i64, &RoutingPolicySpec)> {
        let last_good = self.last_good.as_ref();
        let progress = Progress {
            observed: self.observed,
            phase: self.phase,
            last_good: last_good.map(|good| &good.spec),
        };
        let spec = routing_policy::in_force(&self.spec, self.generation, progress, own)?;
        let good = last_good.filter(|good| std::ptr::eq(&good.spec, spec));
        Some((good.map_or(self.generation, |good| good.generation), spec))
    }
}

impl BlockFact {
    /// Reads a PodCIDR.
    pub fn read(object: &PodCIDR) -> Result<BlockFact, Fault> {
        let name = object.name_any();
        let unreadable = |message: String| Fault::block(&name, Reason::Unreadable, message);
        let block = object.spec.block().map_err(|e| unreadable(e.to_string()))?;
        // One text per block is what makes the name a lock: an object under another name holds nothing.
        if name != block.object_name() {
            return Err(unreadable(format!(
                "PodCIDR '{name}' must be named '{}', after its block; delete it",
                block.object_name()
            )));
        }
        let addresses = object.spec.node_addresses.iter().map(|text| {
            text.parse().map_err(|_| {
                unreadable(format!("'{text}' in spec.nodeAddresses of PodCIDR '{name}' is not an IP address"))
            })
        });
        Ok(BlockFact {
            addresses: addresses.collect::<Result<_, _>>()?,
            uid: object.uid().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            created: created(&object.metadata),
            block,
            range: object.spec.cluster_cidr.clone(),
            node: object.spec.node_name.clone(),
            state: object.spec.state,
            routing: object.spec.routing.clone(),
            converged: false,
            labels: Labels::pack(object.metadata.labels.as_ref()),
            name,
        })
    }

    /// The same on that node, which also looks at the status of its own.
    pub fn read_on(node: &str, object: &PodCIDR) -> Result<BlockFact, Fault> {
        let fact = BlockFact::read(object)?;
        let conditions =
            object.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
        let holds = condition::is_true_at(conditions, CONVERGED, fact.generation);
        Ok(BlockFact { converged: holds && fact.node == node, ..fact })
    }

    /// Whether its node is gone: nobody routes to it, nobody leases from it.
    pub fn released(&self) -> bool {
        self.state == BlockState::Quarantined
    }
}

impl RangeFact {
    /// Reads a ClusterCIDR.
    pub fn read(object: &ClusterCIDR) -> Result<RangeFact, Fault> {
        let name = object.name_any();
        let unreadable = |message: String| Fault::range(&name, Reason::Unreadable, message);
        let range = object.spec.range().map_err(|e| unreadable(e.to_string()))?;
        let masquerade = object.spec.masquerade.clone().unwrap_or_default();
        let exclude = masquerade.exclude.iter().map(|text| {
            text.parse::<IpNet>().map(|net| net.trunc()).map_err(|_| {
                unreadable(format!(
                    "'{text}' in spec.masquerade.exclude of ClusterCIDR '{name}' is not a CIDR"
                ))
            })
        });
        let conditions = object.status.as_ref().map(|s| s.conditions.as_slice()).unwrap_or_default();
        Ok(RangeFact {
            exclude: exclude.collect::<Result<_, _>>()?,
            uid: object.uid().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            range,
            ready: condition::is_true(conditions, condition::READY),
            quarantine_seconds: u32::try_from(object.spec.quarantine_seconds).unwrap_or_default(),
            routing: object.spec.routing.clone(),
            masquerade: masquerade.mode,
            max_blocks: u32::try_from(object.spec.blocks_per_node.max).unwrap_or_default(),
            gives_blocks: gives_blocks(object),
            block_prefix: object.spec.block_prefix(&range),
            name,
        })
    }
}

fn gives_blocks(object: &ClusterCIDR) -> bool {
    let blocks = object.status.as_ref().and_then(|status| status.blocks.as_ref());
    object.spec.allocation == Allocation::Enabled && blocks.is_none_or(|blocks| blocks.free > 0)
}

fn created(metadata: &kube::api::ObjectMeta) -> i64 {
    metadata.creation_timestamp.as_ref().map_or(i64::MAX, |t| t.0.as_second())
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::PodCIDRSpec;

    fn pod_cidr(cidr: &str) -> PodCIDR {
        let name = cidr.replace(['.', ':', '/'], "-");
        PodCIDR::new(
            &name,
            PodCIDRSpec { cidr: cidr.into(), node_name: "n1".into(), ..PodCIDRSpec::default() },
        )
    }

    #[test]
    fn a_pod_cidr_is_read_with_every_text_parsed() {
        let mut object = pod_cidr("10.244.1.0/24");
        object.spec.node_addresses = vec!["172.30.0.11".into(), "fd00:30::11".into()];
        let fact = BlockFact::read(&object).unwrap();
        assert_eq!(fact.block, "10.244.1.0/24".parse().unwrap());
        assert_eq!(fact.addresses.len(), 2);
        assert_eq!(fact.state, BlockState::Active);
    }

    #[test]
    fn what_cannot_be_read_is_a_fault_that_names_the_object() {
        let mut address = pod_cidr("10.244.1.0/24");
        address.spec.node_addresses = vec!["n1.example".into()];
        let mut misnamed = pod_cidr("10.244.1.0/24");
        misnamed.metadata.name = Some("10-244-9-0-24".into());
        for (object, needle) in [
            (pod_cidr("10.244.1.7/24"), "host bits"),
            (address, "'n1.example' in spec.nodeAddresses of PodCIDR '10-244-1-0-24'"),
            (misnamed, "must be named '10-244-1-0-24'"),
        ] {
            let fault = BlockFact::read(&object).unwrap_err();
            assert_eq!((fault.kind, fault.reason), (Kind::PodCIDR, Reason::Unreadable));
            assert!(fault.message.contains(needle), "{}", fault.message);
        }
    }

    #[test]
    fn a_fact_survives_the_cache_also_with_values_of_a_newer_version() {
        let mut object = pod_cidr("10.244.1.0/24");
        object.spec.state = BlockState::Unknown;
        object.spec.routing = serde_json::from_str(r#"{"mode":"Later","metric":7}"#).unwrap();
        let fact = BlockFact::read(&object).unwrap();
        let text = serde_json::to_string(&fact).unwrap();
        assert_eq!(serde_json::from_str::<BlockFact>(&text).unwrap(), fact);
    }

    #[test]
    fn a_range_knows_its_readiness_and_exclusions() {
        let object: ClusterCIDR = serde_json::from_value(serde_json::json!({
            "apiVersion": "plat.network/v1alpha1", "kind": "ClusterCIDR", "metadata": {"name": "default-v4"},
            "spec": {"cidr": "10.244.0.0/16", "masquerade": {"mode": "Disabled", "exclude": ["192.168.0.0/16"]}},
            "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "Carving", "message": "",
                "lastTransitionTime": "2026-11-24T05:00:00Z"}]},
        }))
        .unwrap();
        let fact = RangeFact::read(&object).unwrap();
        assert!(fact.ready);
        assert_eq!(fact.quarantine_seconds, 900);
        assert_eq!(fact.masquerade, MasqueradeMode::Disabled);
        assert_eq!(fact.exclude, ["192.168.0.0/16".parse::<IpNet>().unwrap()]);
    }
}
