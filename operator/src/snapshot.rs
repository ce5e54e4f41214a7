//! Everything a plan is made from, as one value. The clock is part of it, so a plan can be repeated.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use plat_crds::Block;

use crate::facts::{BlockFact, Name, NodeFact, PolicyFact, RangeFact, ReportFact};
use crate::memory::Memory;

/// Facts of one kind by object name.
pub type Facts<F> = Arc<BTreeMap<Name, Arc<F>>>;

/// What is so, at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot<'a> {
    /// When.
    pub clock: Clock,
    /// How fresh ranges and blocks are.
    pub source: Source,
    /// What the administrator asked for.
    pub settings: &'a Settings,
    /// For how long this process has led.
    pub tenure: Tenure,
    /// Nodes.
    pub nodes: Facts<NodeFact>,
    /// ClusterCIDRs.
    pub ranges: Facts<RangeFact>,
    /// PodCIDRs.
    pub blocks: Facts<BlockFact>,
    /// RoutingPolicies.
    pub policies: Facts<PolicyFact>,
    /// NodeNetworks.
    pub reports: Facts<ReportFact>,
    /// Addresses that are not pods'.
    pub foreign: Arc<Foreign>,
    /// What this leader knows besides the objects.
    pub memory: &'a Memory,
}

/// Two clocks: the wall clock for what is written into objects, and one that never jumps for how long this
/// process has watched something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Wall clock.
    pub wall: Timestamp,
    /// Time since the process started.
    pub steady: Duration,
}

impl Clock {
    /// Wall clock `wait` from now.
    pub fn wall_after(&self, wait: Duration) -> Timestamp {
        self.wall.checked_add(wait).unwrap_or(Timestamp::MAX)
    }

    /// Time from now to `at` on the wall clock; zero if it is past.
    pub fn until(&self, at: Timestamp) -> Duration {
        at.duration_since(self.wall).try_into().unwrap_or(Duration::ZERO)
    }
}

/// How fresh ranges and blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From watches: complete, but perhaps late.
    Cache,
    /// From LISTs made for this snapshot: what a quorum of etcd said a moment ago.
    Live,
}

/// What the administrator asked for by flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Ranges to create while none of their family exists; at most one per family.
    pub default_ranges: Vec<DefaultRange>,
    /// `topologyKey` of the default ranges.
    pub topology_key: Option<Box<str>>,
    /// Quarantine of the default ranges.
    pub quarantine_seconds: i32,
    /// What `node.spec.podCIDRs` counts for.
    pub ipam_source: IpamSource,
    /// Whether blocks are mirrored into empty `node.spec.podCIDRs`.
    pub node_spec_mirror: bool,
    /// The leader Lease's duration: for that long another process may believe that it leads.
    pub lease_duration: Duration,
    /// How long a new leader waits for the reports of Ready nodes before it carves.
    pub report_wait: Duration,
    /// How long a leader must itself have seen a block in quarantine before it frees it, if it did not write the
    /// time of release itself (then: all of the quarantine); never longer than the quarantine.
    pub quarantine_watch: Duration,
    /// How long a node must have been able to spare a block before it is given back.
    pub surplus_after: Duration,
    /// How long a block whose quarantine is over waits for live nodes to report that they withdrew their
    /// route to it.
    pub withdrawal_deadline: Duration,
    /// Let go of everything instead of managing it (before the product is removed).
    pub cleanup: bool,
}

/// What `node.spec.podCIDRs` counts for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum IpamSource {
    /// A node gets the block that its spec names, if it fits; else one is carved.
    #[default]
    Wish,
    /// A node gets exactly what its spec names (kube-controller-manager's choice). Nothing is carved.
    Node,
    /// The spec is not looked at, but what it names is given to no other node.
    Ignore,
}

/// A range from `--cluster-cidr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultRange {
    /// The range.
    pub range: Block,
    /// Prefix length of its blocks; `None`: what its nodes can hold (`blockSizing: MaxPods`).
    pub block_prefix: Option<u8>,
}

/// How long and how this process came to lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenure {
    /// Since when.
    pub held_for: Duration,
    /// Whether a former leader may still have requests under way.
    pub start: Start,
}

/// How leadership was won.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// There was no Lease.
    First,
    /// The former leader gave the Lease up, after its last request had been answered.
    HandedOver,
    /// The former leader's Lease ran out.
    Expired,
}

/// Addresses in use that are neither pods' nor nodes'.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    /// The cluster's Service ranges, as far as they may be read.
    pub services: Vec<Block>,
    /// Addresses of the API server.
    pub api_server: Vec<IpAddr>,
}

impl Tenure {
    /// Whether no other process can have a request under way any more.
    ///
    /// A leader sends nothing once its Lease has run out, so after one Lease duration all requests of former
    /// leaders are answered. A Lease is handed over only by a leader for which this holds, after its own last
    /// answer. A Lease that never existed had no holder; but as one can be deleted by hand, that counts only
    /// on a cluster without blocks.
    pub fn is_sole_actor(&self, lease_duration: Duration, fresh_cluster: bool) -> bool {
        match self.start {
            Start::HandedOver => true,
            Start::First if fresh_cluster => true,
            Start::First | Start::Expired => self.held_for >= lease_duration,
        }
    }
}

impl Snapshot<'_> {
    /// See [`Tenure::is_sole_actor`].
    pub fn is_sole_actor(&self) -> bool {
        self.tenure.is_sole_actor(self.settings.lease_duration, self.memory.fresh_cluster)
    }
}
