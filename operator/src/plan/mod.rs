//! The plan: what should be written, given what is so. Pure and whole: it looks at everything each time and
//! remembers nothing, so it does not matter what happened in between.
//!
//! | file | decides |
//! |---|---|
//! | `ranges` | default ClusterCIDRs, finalizers, block sizes |
//! | `hold` | existing blocks: keep, update, quarantine, re-adopt, free |
//! | `release` | quarantined blocks: what they wait for, and when they are freed |
//! | `place` | nodes that need a block: re-create, adopt, carve |
//! | `holding`, `grow` | how many blocks a node has, and when it gets another or gives one back |
//! | `drain` | blocks that go while their node stays |
//! | `source` | what `node.spec.podCIDRs` counts for: faults of entries, another allocator beside us |
//! | `conflicts` | nothing: names forged PodCIDRs and addresses of two nodes |
//! | `nodes` | mirror into the Node, `NetworkUnavailable`, NodeNetworks, faults of nodes |
//!
//! Every map is ordered and nothing reads a clock, so equal snapshots give equal plans.

mod conflicts;
mod drain;
mod grow;
mod hold;
pub mod holding;
mod nodes;
mod place;
pub(crate) mod ranges;
pub mod release;
pub(crate) mod source;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod topology_tests;
#[cfg(test)]
mod wild_tests;

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use plat_crds::cluster_cidr::Allocation;
use plat_crds::condition::Verdict;
use plat_crds::{Block, Family, names};

use crate::carriers::Carriers;
use crate::claims::{Claim, Claims};
use crate::facts::{BlockFact, Name, NodeFact, RangeFact};
use crate::forecast::Fill;
use crate::pool::Pool;
use crate::ranges::{Judgement, Standing, judge, stands};
use crate::snapshot::{Clock, Snapshot, Source};
use crate::step::{Fault, Kind, ObjectKey, Step};
use crate::topology::{GroupBlocks, GroupCursors, Topology};

/// A node that its cloud has not looked at yet waits so long at most for the label that says where it is. Nothing
/// runs on it meanwhile, as it is tainted.
const LABEL_WAIT: Duration = Duration::from_secs(60);

/// What should be written, and what is wrong.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Writes, independent of each other.
    pub steps: Vec<Step>,
    /// What is wrong with single objects, sorted.
    pub faults: Vec<Fault>,
    /// What holds for each range.
    pub ranges: BTreeMap<Name, RangeOutlook>,
    /// Steps were left out that need live LISTs of ranges and blocks: list, and plan again.
    pub wants_live: bool,
    /// When to plan again although nothing has changed: time from now.
    pub wake_after: Option<Duration>,
    /// Nodes that lack a block of some family.
    pub nodes_without_block: usize,
    /// Quarantined blocks whose time is over and that wait for nodes to withdraw their route.
    pub awaiting_withdrawal: usize,
    /// ClusterCIDR uid → index after the last block carved by this plan.
    pub cursors: BTreeMap<Name, u64>,
    /// Uids of PodCIDRs that their nodes could give back now: [`crate::memory`] knows for how long.
    pub spare: BTreeSet<Name>,
    /// PodCIDR name → the conditions that it has only for a time.
    pub verdicts: BTreeMap<Name, Vec<Verdict>>,
    /// The same for each group of a ClusterCIDR with a `topologyKey`.
    pub group_cursors: GroupCursors,
    /// Label key → how many blocks do not have their node's value of it yet.
    pub uncopied: BTreeMap<String, usize>,
}

/// A range as the plan leaves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeOutlook {
    /// Conditions.
    pub judgement: Judgement,
    /// Blocks that fit into it.
    pub total: u64,
    /// Blocks that can still be carved.
    pub free: u64,
    /// Where carving goes on.
    pub cursor: u64,
    /// What each group of nodes holds, if the range has a `topologyKey`.
    pub holdings: Vec<GroupBlocks>,
    /// That another program gives its nodes `spec.podCIDRs`, in words.
    pub other_allocator: Option<String>,
}

impl RangeOutlook {
    /// How full it is.
    pub fn fill(&self) -> Fill {
        Fill { total: self.total, free: self.free }
    }
}

impl Plan {
    /// Plans again after that time, if it was not to be sooner anyway.
    pub fn wake_at_the_latest(&mut self, wait: Duration) {
        self.wake_after = Some(self.wake_after.map_or(wait, |known| known.min(wait)));
    }
}

/// Plans.
pub fn plan(snapshot: &Snapshot) -> Plan {
    let mut planner = Planner::new(snapshot);
    planner.name_unreadable_objects();
    planner.manage_ranges();
    if !snapshot.settings.cleanup {
        planner.hold_blocks();
        planner.place_nodes();
        planner.serve_nodes();
        planner.name_conflicts();
        planner.tell_of_blocks();
        planner.name_other_allocator();
    }
    planner.finish()
}

struct Planner<'a> {
    snapshot: &'a Snapshot<'a>,
    claims: Claims,
    ranges: BTreeMap<Name, Candidate<'a>>,
    blocks_of: holding::BlocksOf<'a>,
    /// Node name → its blocks that vanished.
    vanished_of: BTreeMap<&'a str, Vec<Block>>,
    /// Node name → its blocks that agents tell were lost.
    told_of: BTreeMap<&'a str, Vec<Block>>,
    /// Label keys that selectors of ClusterCIDRs and RoutingPolicies and `topologyKey`s name, but for our own.
    selected_keys: BTreeSet<&'a str>,
    /// Whether these are all: no ClusterCIDR and no RoutingPolicy is unreadable.
    knows_all_keys: bool,
    /// Why a node gets no block of a family, or no further one.
    refused: BTreeMap<(Name, Family), (&'static str, String)>,
    /// Blocks whose labels alone this plan changes.
    relabelled: usize,
    /// As many blocks are carved as one pass may: the next carves on.
    carving_goes_on: bool,
    /// Made when the first block asks.
    carriers: OnceCell<Carriers<'a>>,
    plan: Plan,
}

/// A range with its blocks.
struct Candidate<'a> {
    fact: &'a RangeFact,
    judgement: Judgement,
    pool: Pool,
    cursor: u64,
    /// Which groups of nodes hold its blocks, if it has a `topologyKey`.
    topology: Option<Topology>,
    other_allocator: Option<String>,
}

impl Candidate<'_> {
    fn family(&self) -> Option<Family> {
        self.fact.range.map(|range| range.family())
    }

    /// Whether its nodes are served by it, now or once it is ready.
    fn selects(&self, node: &NodeFact, family: Family) -> bool {
        self.family() == Some(family) && !self.fact.deleting && self.fact.selector.matches(&node.labels)
    }

    fn allocates(&self) -> bool {
        self.judgement.is_good() && self.fact.is_prepared() && self.fact.allocation == Allocation::Enabled
    }

    /// Notes that a block, perhaps of another range, goes to a node.
    fn take(&mut self, block: &Block, node: &NodeFact) {
        self.pool.take(block);
        if let (Some(topology), Some(key)) = (&mut self.topology, self.fact.topology_key.as_deref())
            && let Some(index) = self.pool.index(block)
        {
            topology.hold(node.labels.get(key), index, Timestamp::MAX);
        }
    }

    /// Whether a node may have a block of it now: once its `Ready` stands, and once the cloud has said in which
    /// group the node is, if that is to be expected.
    fn standing_for(&self, node: &NodeFact, snapshot: &Snapshot) -> Standing {
        match (stands(self.fact, snapshot), self.fact.topology_key.as_deref()) {
            (Standing::Stands, Some(key)) if node.labels.get(key).is_none() => {
                label_wait(node, snapshot.clock).map_or(Standing::Stands, Standing::Wait)
            }
            (standing, _) => standing,
        }
    }

    /// The block for a node: in the stretch of its group if the range has a `topologyKey`, else the next.
    fn next_for(&mut self, node: &NodeFact) -> Option<u64> {
        match (&mut self.topology, self.fact.topology_key.as_deref()) {
            (Some(topology), Some(key)) => topology.choose(&self.pool, node.labels.get(key)),
            _ => self.pool.next_free(self.cursor),
        }
    }

    fn is_reserved(&self, block: &Block) -> bool {
        self.fact.reserved.iter().any(|reserved| reserved.overlaps(block))
    }
}

impl<'a> Planner<'a> {
    fn new(snapshot: &'a Snapshot<'a>) -> Planner<'a> {
        let claims = Claims::of(snapshot);
        let candidate = |fact: &'a RangeFact| {
            let pool = pool(fact, &claims);
            let topology = topology(fact, &pool, &claims, snapshot);
            let (judgement, cursor) = (judge(fact, snapshot), cursor(fact, snapshot));
            Candidate { fact, judgement, pool, cursor, topology, other_allocator: None }
        };
        let ranges = snapshot.ranges.iter().map(|(name, fact)| (name.clone(), candidate(fact))).collect();
        let mut vanished_of: BTreeMap<&str, Vec<Block>> = BTreeMap::new();
        for (block, vanished) in &snapshot.memory.vanished {
            vanished_of.entry(&vanished.node).or_default().push(*block);
        }
        let mut told_of: BTreeMap<&str, Vec<Block>> = BTreeMap::new();
        for (block, node) in snapshot.memory.told(snapshot.clock) {
            told_of.entry(node).or_default().push(*block);
        }
        let ours = [names::LABEL_CLUSTER_CIDR, names::LABEL_NODE];
        let keys_of = |range: &'a RangeFact| range.selector.keys().chain(range.topology_key.as_deref());
        let keys = snapshot.ranges.values().flat_map(|range| keys_of(range));
        let keys = keys.chain(snapshot.policies.values().flat_map(|policy| policy.keys()));
        let selected_keys = keys.filter(|key| !ours.contains(key)).collect();
        let knows_all_keys = snapshot.ranges.values().all(|range| range.problem.is_none())
            && snapshot.policies.values().all(|policy| policy.problem.is_none());
        Planner {
            snapshot,
            claims,
            ranges,
            blocks_of: holding::by_node(snapshot),
            vanished_of,
            told_of,
            selected_keys,
            knows_all_keys,
            refused: BTreeMap::new(),
            carving_goes_on: false,
            relabelled: 0,
            carriers: OnceCell::new(),
            plan: Plan::default(),
        }
    }

    fn name_unreadable_objects(&mut self) {
        let snapshot = self.snapshot;
        let mut name = |kind: Kind, object: &Name, uid: &Name, problem: &Option<Box<str>>| {
            if let Some(problem) = problem {
                let message = format!(
                    "{} {object} cannot be used: {problem}; correct it, or upgrade the operator",
                    kind.as_str()
                );
                self.plan.faults.push(Fault {
                    object: ObjectKey::new(kind, object, uid),
                    reason: crate::reason::UNREADABLE,
                    message,
                });
            }
        };
        snapshot.nodes.values().for_each(|f| name(Kind::Node, &f.name, &f.uid, &f.problem));
        snapshot.ranges.values().for_each(|f| name(Kind::ClusterCIDR, &f.name, &f.uid, &f.problem));
        snapshot.blocks.values().for_each(|f| name(Kind::PodCIDR, &f.name, &f.uid, &f.problem));
        snapshot.policies.values().for_each(|f| name(Kind::RoutingPolicy, &f.name, &f.uid, &f.problem));
        snapshot.reports.values().for_each(|f| name(Kind::NodeNetwork, &f.name, &f.uid, &f.problem));
    }

    fn fault(&mut self, node: &NodeFact, reason: &'static str, message: String) {
        self.plan.faults.push(Fault {
            object: ObjectKey::new(Kind::Node, &node.name, &node.uid),
            reason,
            message,
        });
    }

    fn wake_after(&mut self, wait: Duration) {
        self.plan.wake_at_the_latest(wait);
    }

    /// Whether ranges and blocks were listed for this plan; if not, asks for it.
    fn is_live(&mut self) -> bool {
        let live = self.snapshot.source == Source::Live;
        self.plan.wants_live |= !live;
        live
    }

    /// The families that a node should have a block of: those of the ranges that select it, and those that it
    /// has a block of, whatever the selectors say by now.
    fn families_of(&self, node: &NodeFact) -> Vec<Family> {
        let selected = |family| self.ranges.values().any(|range| range.selects(node, family));
        let held = |family| self.held_block(node, family).is_some();
        Family::ALL.into_iter().filter(|family| held(*family) || selected(*family)).collect()
    }

    /// The block of a family that is a node's own, also while it is in quarantine; it may have more.
    fn held_block(&self, node: &NodeFact, family: Family) -> Option<&'a BlockFact> {
        self.holding(node, family).main()
    }

    /// All blocks of a node, of both families.
    fn own_blocks(&self, node: &NodeFact) -> &[&'a BlockFact] {
        self.blocks_of.get(&*node.name).map(Vec::as_slice).unwrap_or_default()
    }

    fn finish(mut self) -> Plan {
        let outlook = |range: &Candidate| RangeOutlook {
            judgement: range.judgement.clone(),
            total: range.pool.total(),
            free: range.pool.free(),
            cursor: range.cursor,
            holdings: range.topology.as_ref().map(|t| t.holdings(&range.pool)).unwrap_or_default(),
            other_allocator: range.other_allocator.clone(),
        };
        self.plan.ranges = self.ranges.iter().map(|(name, range)| (name.clone(), outlook(range))).collect();
        self.plan.faults.sort();
        self.plan.faults.dedup();
        self.plan
    }
}

/// The blocks of a range, less everything that is claimed or reserved; none while their size is not known.
fn pool(fact: &RangeFact, claims: &Claims) -> Pool {
    let (Some(range), Some(prefix)) = (fact.range, fact.block_prefix) else { return Pool::none() };
    let mut pool = Pool::new(range, prefix);
    for (block, _) in claims.overlapping(&range) {
        pool.take(block);
    }
    for reserved in &fact.reserved {
        pool.take(reserved);
    }
    pool
}

/// Which groups of nodes hold the blocks of a range. A node's label goes before its block's, which is a copy of
/// it; a block whose node is gone stays its group's until it is freed.
fn topology(fact: &RangeFact, pool: &Pool, claims: &Claims, snapshot: &Snapshot) -> Option<Topology> {
    let key = fact.topology_key.as_deref()?;
    let label = |node: &Name| snapshot.nodes.get(node).map(|node| node.labels.get(key));
    let mut topology = Topology::default();
    for ((range, value), cursor) in snapshot.memory.group_cursors.range((fact.uid.clone(), None)..) {
        if *range != fact.uid {
            break;
        }
        topology.resume(value.as_deref(), *cursor);
    }
    for block in snapshot.blocks.values() {
        if let Some(index) = pool.index(&block.block) {
            let value = label(&block.node).unwrap_or_else(|| block.labels.get(key));
            topology.hold(value, index, block.created);
        }
    }
    for (block, claim) in claims.overlapping(&fact.range?) {
        let node = claim.node().filter(|_| !matches!(claim, Claim::Object(_) | Claim::NodeSpec(_)));
        if let (Some(value), Some(index)) = (node.and_then(label), pool.index(block)) {
            topology.hold(value, index, Timestamp::MIN);
        }
    }
    Some(topology)
}

/// How much longer a node without the topology label is worth waiting for. By a clock that says that it was
/// created in the future it is not.
fn label_wait(node: &NodeFact, clock: Clock) -> Option<Duration> {
    let until = node.created.checked_add(LABEL_WAIT).ok()?;
    let wait = Some(clock.until(until)).filter(|wait| node.uninitialized && *wait <= LABEL_WAIT);
    wait.filter(|wait| !wait.is_zero())
}

fn cursor(fact: &RangeFact, snapshot: &Snapshot) -> u64 {
    let written = fact.status.cursor.and_then(|cursor| u64::try_from(cursor).ok()).unwrap_or(0);
    snapshot.memory.cursors.get(&fact.uid).copied().unwrap_or(written)
}
