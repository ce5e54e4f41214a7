//! What a leader knows besides the objects that its watches show. Pure: times come in as values.
//!
//! | field | knows | because |
//! |---|---|---|
//! | `learned` | answers to own writes that the watch has not shown yet | or the next pass would do them again |
//! | `pending` | creates whose outcome is unknown | the block may exist by now: it is taken until read back |
//! | `vanished` | PodCIDRs that went without being released | deleted by hand, or etcd was restored: their node may still use them |
//! | `told` | PodCIDRs that agents tell were lost | etcd was put back to a time before their nodes joined: only the other nodes remember them |
//! | `quarantined` | since when this leader has seen each quarantine | a block is not freed on somebody else's clock alone |
//! | `own_releases` | times of release that this leader wrote | its wall clock alone must not end them |
//! | `spare_since` | since when a node has been able to spare each block | it is given back after a while only |
//! | `orphaned` | since when this leader has seen a NodeNetwork without its node | what it reports may still be in use for a quarantine |
//! | `mute` | since when this leader has known a node without a report | it may have an agent that has yet to write it |
//! | `cursors`, `group_cursors` | where carving goes on in each range, and for each group of nodes | the status that carries the first is written rarely, and the second only follows from the youngest block |
//! | `ledger` | which sums of objects were when | see [`crate::ledger`] |
//!
//! Losing it (a new leader) is safe: nodes report what they hold and what was lost, and `node.spec.podCIDRs`
//! mirrors it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use plat_crds::Block;

use crate::budget::Budget;
use crate::facts::{BlockFact, Fact, Name, NodeFact, RangeFact, ReportFact};
use crate::ledger::Ledger;
use crate::snapshot::{Clock, Facts};
use crate::step::{Kind, NewBlock};
use crate::topology::GroupCursors;

/// How long an unknown create blocks its addresses at most. API servers end requests after a minute.
const PENDING_FOR: Duration = Duration::from_secs(120);
/// How long an answer may be ahead of the watch before the truth is listed.
const LEARNED_FOR: Duration = Duration::from_secs(10);
/// After so many failures in a row of writes to one object, what is known of it is read back.
const DOUBTFUL_AFTER: u32 = 3;
/// How long a failed write, and a written status, are remembered.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);
/// PodCIDR statuses per second, over the whole cluster.
pub const STATUS_WRITES_PER_SECOND: f64 = 50.0;
/// Of those writes, so many may change the labels of PodCIDRs instead.
pub const LABEL_WRITES_PER_SECOND: f64 = 25.0;

/// What a leader knows besides the objects. See the module's table.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Answers about PodCIDRs.
    pub learned_blocks: Learned<BlockFact>,
    /// Answers about ClusterCIDRs.
    pub learned_ranges: Learned<RangeFact>,
    /// Creates whose outcome is unknown.
    pub pending: BTreeMap<Block, Pending>,
    /// Blocks that vanished without being released.
    pub vanished: BTreeMap<Block, Vanished>,
    /// Lost blocks that agents tell of, with the nodes that held them → until when they are taken. One that is
    /// over is kept for as long as somebody tells of it: the report of a dead agent must not count for ever.
    pub told: BTreeMap<(Block, Name), Duration>,
    /// Until when nothing may be carved, because some agent misses more blocks than it can name.
    pub untold: Option<Duration>,
    /// PodCIDR uid → when this leader first saw its quarantine.
    pub quarantined: BTreeMap<Name, Duration>,
    /// PodCIDR uid → its name, and the time of release that this leader wrote into it (seconds, as objects hold).
    pub own_releases: BTreeMap<Name, (Name, i64)>,
    /// PodCIDR uid → since when its node could spare it.
    pub spare_since: BTreeMap<Name, Duration>,
    /// Name of a gone node with a NodeNetwork → when this leader first saw that it is gone.
    pub orphaned: BTreeMap<Name, Duration>,
    /// Name of a node without a report → when this leader first saw it so.
    pub mute: BTreeMap<Name, Duration>,
    /// ClusterCIDR uid → index after the last carved block.
    pub cursors: BTreeMap<Name, u64>,
    /// The same for each group of a ClusterCIDR with a `topologyKey`.
    pub group_cursors: GroupCursors,
    /// Which sums of objects were when.
    pub ledger: Ledger,
    /// PodCIDR status writes that may be made now.
    pub budget: Budget,
    /// Of those, writes of counters alone.
    pub counters_budget: Budget,
    /// Of those, writes of labels alone.
    pub labels_budget: Budget,
    /// Since when statuses have been left for later.
    pub statuses_left_since: Option<Duration>,
    /// Object uid → when its status was last written.
    pub status_written: BTreeMap<Name, Duration>,
    /// Failed writes: how often in a row, and when to try again.
    pub retries: BTreeMap<(Kind, Name), Retry>,
    /// Whether there was neither a block nor a report when this leader began: then nobody can hold one.
    pub fresh_cluster: bool,
    /// Whether the watches are known to be behind: the next pass lists.
    pub distrust: bool,
    last_seen: Option<Facts<BlockFact>>,
    released: BTreeSet<Name>,
}

/// A create whose outcome is unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The node it was for.
    pub node: Name,
    /// The range.
    pub range: Name,
    /// When it can have no effect any more.
    pub until: Duration,
}

/// A block whose PodCIDR vanished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vanished {
    /// The node that held it.
    pub node: Name,
    /// Its range.
    pub range: Name,
    /// When it counts as free, if nobody claims it.
    pub until: Duration,
}

/// A write that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// How often in a row.
    pub failures: u32,
    /// Not before then.
    pub not_before: Duration,
}

impl Memory {
    /// An empty memory of a leader that begins on a cluster with or without a history.
    pub fn new(fresh_cluster: bool) -> Memory {
        Memory {
            learned_blocks: Learned::default(),
            learned_ranges: Learned::default(),
            pending: BTreeMap::new(),
            vanished: BTreeMap::new(),
            told: BTreeMap::new(),
            untold: None,
            quarantined: BTreeMap::new(),
            own_releases: BTreeMap::new(),
            spare_since: BTreeMap::new(),
            orphaned: BTreeMap::new(),
            mute: BTreeMap::new(),
            cursors: BTreeMap::new(),
            group_cursors: BTreeMap::new(),
            ledger: Ledger::default(),
            budget: Budget::new(STATUS_WRITES_PER_SECOND),
            counters_budget: Budget::new(STATUS_WRITES_PER_SECOND),
            labels_budget: Budget::new(LABEL_WRITES_PER_SECOND),
            statuses_left_since: None,
            status_written: BTreeMap::new(),
            retries: BTreeMap::new(),
            fresh_cluster,
            distrust: false,
            last_seen: None,
            released: BTreeSet::new(),
        }
    }

    /// A create for `new` may or may not have happened.
    pub fn create_unknown(&mut self, new: &NewBlock, clock: Clock) {
        let pending =
            Pending { node: new.node.clone(), range: new.range.clone(), until: clock.steady + PENDING_FOR };
        self.pending.insert(new.block, pending);
        self.distrust = true;
    }

    /// A block was freed by us: its disappearance is no loss, and its node has been gone for long enough.
    pub fn block_released(&mut self, uid: &Name, name: &Name, node: &Name, clock: Clock) {
        self.released.insert(uid.clone());
        self.learned_blocks.gone(name, uid, clock);
        self.rested(node);
    }

    /// That node has been gone for a quarantine.
    fn rested(&mut self, node: &Name) {
        if let Some(since) = self.orphaned.get_mut(node) {
            *since = Duration::ZERO;
        }
    }

    /// A block was freed by us, or will be, or not: the answer was lost. If its PodCIDR goes while it rests, that
    /// is no loss either.
    pub fn release_unknown(&mut self, uid: &Name) {
        self.released.insert(uid.clone());
    }

    /// This leader has written a block's time of release, or may have.
    pub fn release_written(&mut self, uid: &Name, name: &Name, at: Timestamp) {
        self.own_releases.insert(uid.clone(), (name.clone(), at.as_second()));
    }

    /// Whether a block's time of release is one that this leader wrote.
    pub fn wrote_release(&self, block: &BlockFact) -> bool {
        let own = self.own_releases.get(&block.uid);
        own.is_some_and(|(_, own)| block.release_after.is_some_and(|at| at.as_second() == *own))
    }

    /// Notes which blocks their nodes could spare by the latest plan.
    pub fn observe_spare(&mut self, spare: &BTreeSet<Name>, clock: Clock) {
        self.spare_since.retain(|uid, _| spare.contains(uid));
        for uid in spare {
            self.spare_since.entry(uid.clone()).or_insert(clock.steady);
        }
    }

    /// Forgets where carving goes on in ranges that are gone, and for groups that have neither a node nor a block: with
    /// a `topologyKey` of one value per node there would be an entry for each node that ever lived.
    pub fn observe_groups(
        &mut self,
        ranges: &Facts<RangeFact>,
        nodes: &Facts<NodeFact>,
        blocks: &Facts<BlockFact>,
    ) {
        let mut living: BTreeMap<&Name, BTreeSet<Option<&str>>> = BTreeMap::new();
        for range in ranges.values() {
            let values = living.entry(&range.uid).or_default();
            if let Some(key) = range.topology_key.as_deref().filter(|_| !self.group_cursors.is_empty()) {
                values.extend(nodes.values().map(|node| node.labels.get(key)));
                values.extend(blocks.values().map(|block| block.labels.get(key)));
            }
        }
        self.cursors.retain(|uid, _| living.contains_key(uid));
        self.group_cursors.retain(|(uid, value), _| {
            living.get(uid).is_some_and(|values| values.contains(&value.as_deref()))
        });
    }

    /// Notes which reports are of nodes that are gone, and which nodes have none.
    pub fn observe_reports(&mut self, nodes: &Facts<NodeFact>, reports: &Facts<ReportFact>, clock: Clock) {
        let gone = reports.keys().filter(|name| !nodes.contains_key(*name));
        let since = |name: &Name| *self.orphaned.get(name).unwrap_or(&clock.steady);
        self.orphaned = gone.map(|name| (name.clone(), since(name))).collect();
        let reported = |name: &Name| reports.get(name).is_some_and(|report| report.reported);
        let mute = nodes.keys().filter(|name| !reported(name));
        let since = |name: &Name| *self.mute.get(name).unwrap_or(&clock.steady);
        self.mute = mute.map(|name| (name.clone(), since(name))).collect();
    }

    /// Notes which lost blocks agents tell of. Each is taken for its quarantine from when this leader first
    /// heard of it.
    pub fn observe_losses(
        &mut self,
        reports: &Facts<ReportFact>,
        blocks: &Facts<BlockFact>,
        quarantine_over: impl Fn(&Block) -> Duration,
        clock: Clock,
    ) {
        let now = clock.steady;
        let exists = |block: &Block| blocks.contains_key(block.object_name().as_str());
        let lost = || reports.values().map(|report| &report.lost);
        let mut told = std::mem::take(&mut self.told);
        for (block, node) in lost().flat_map(|lost| lost.blocks.iter()).filter(|(block, _)| !exists(block)) {
            let until = told.remove(&(*block, node.clone())).unwrap_or_else(|| now + quarantine_over(block));
            self.told.entry((*block, node.clone())).or_insert(until);
        }
        told.retain(|(block, _), until| *until > now && !exists(block));
        self.told.append(&mut told);
        let longest = || lost().flat_map(|lost| lost.blocks.iter()).map(|(block, _)| quarantine_over(block));
        self.untold = lost()
            .any(|lost| lost.is_cut)
            .then(|| self.untold.unwrap_or_else(|| now + longest().max().unwrap_or_default()));
    }

    /// The lost blocks that agents tell of and that are taken now.
    pub fn told(&self, clock: Clock) -> impl Iterator<Item = &(Block, Name)> {
        self.told.iter().filter(move |(_, until)| **until > clock.steady).map(|(told, _)| told)
    }

    /// Notes what the blocks of a new snapshot say: which vanished, which are in quarantine, which creates
    /// are settled. `quarantine_of` answers the quarantine of a block.
    pub fn observe(
        &mut self,
        blocks: &Facts<BlockFact>,
        quarantine_of: impl Fn(&BlockFact) -> Duration,
        clock: Clock,
    ) {
        let before = self.last_seen.replace(blocks.clone()).filter(|seen| !Arc::ptr_eq(seen, blocks));
        for lost in before.iter().flat_map(|seen| seen.values()) {
            if blocks.contains_key(&lost.name) {
                continue;
            }
            if self.released.remove(&lost.uid) {
                self.rested(&lost.node);
            } else {
                let until = clock.steady + quarantine_of(lost);
                let vanished = Vanished { node: lost.node.clone(), range: lost.range.clone(), until };
                self.vanished.insert(lost.block, vanished);
            }
        }
        let exists = |block: &Block| blocks.contains_key(block.object_name().as_str());
        self.vanished.retain(|block, vanished| vanished.until > clock.steady && !exists(block));
        self.pending.retain(|block, pending| pending.until > clock.steady && !exists(block));
        let resting = blocks.values().filter(|b| b.is_quarantined());
        let since = |b: &Arc<BlockFact>| *self.quarantined.get(&b.uid).unwrap_or(&clock.steady);
        self.quarantined = resting.map(|b| (b.uid.clone(), since(b))).collect();
        self.own_releases.retain(|uid, (name, _)| blocks.get(name).is_some_and(|block| block.uid == *uid));
        // Back in use, it may be lost like any other.
        self.released.retain(|uid| self.quarantined.contains_key(uid));
        self.retries.retain(|_, retry| retry.not_before + FORGOTTEN_AFTER > clock.steady);
        self.status_written.retain(|_, at| *at + FORGOTTEN_AFTER > clock.steady);
    }

    /// Whether a write to that object may be tried (again) now.
    pub fn is_ripe(&self, target: &(Kind, Name), clock: Clock) -> bool {
        self.retries.get(target).is_none_or(|retry| retry.not_before <= clock.steady)
    }

    /// Whether one more PodCIDR may get other labels now.
    pub fn may_relabel(&mut self, clock: Clock) -> bool {
        self.labels_budget.take(clock.steady, 1) == 1 && self.budget.take(clock.steady, 1) == 1
    }

    /// The API server asked not to try a write that failed again for so long.
    pub fn asked_to_wait(&mut self, target: &(Kind, Name), wait: Duration, clock: Clock) {
        if let Some(retry) = self.retries.get_mut(target) {
            retry.not_before = retry.not_before.max(clock.steady + wait);
        }
    }

    /// A write failed: the next try waits, longer each time. An object that is missing, or that does not
    /// become as the watch shows it, makes the watch doubtful.
    pub fn failed(&mut self, target: (Kind, Name), missing: bool, clock: Clock) {
        let failures = self.retries.get(&target).map_or(0, |retry| retry.failures).saturating_add(1);
        let wait = Duration::from_millis(100 << failures.min(7)).min(Duration::from_secs(10));
        let listed = matches!(target.0, Kind::PodCIDR | Kind::ClusterCIDR);
        self.distrust |= listed && (missing || failures >= DOUBTFUL_AFTER);
        self.retries.insert(target, Retry { failures, not_before: clock.steady + wait });
    }

    /// A write went through.
    pub fn succeeded(&mut self, target: &(Kind, Name)) {
        self.retries.remove(target);
    }

    /// When something remembered changes by itself: the next time to look.
    pub fn wakes_at(&self, clock: Clock) -> Option<Duration> {
        let retries = self.retries.values().map(|retry| retry.not_before);
        let pending = self.pending.values().map(|pending| pending.until);
        let vanished = self.vanished.values().map(|vanished| vanished.until);
        let told = self.told.values().copied().chain(self.untold);
        retries.chain(pending).chain(vanished).chain(told).filter(|at| *at > clock.steady).min()
    }
}

impl<F: Fact> Listed<F> {
    /// Whether the LIST is of an earlier time than something that a watch had shown before it was asked for.
    /// As a LIST is a quorum read, that can only be because etcd was put back to a backup.
    pub fn went_back(&self, watched: &Facts<F>) -> bool {
        watched.values().any(|fact| is_newer(fact.resource_version(), &self.resource_version))
    }
}

/// A complete LIST of one kind.
#[derive(Clone, Debug)]
pub struct Listed<F> {
    /// The objects.
    pub facts: BTreeMap<Name, Arc<F>>,
    /// The version of the list as a whole.
    pub resource_version: String,
}

/// Answers to own writes, laid over what the watch shows until it shows them too.
#[derive(Clone, Debug)]
pub struct Learned<F> {
    entries: BTreeMap<Name, Answer<F>>,
}

#[derive(Clone, Debug)]
struct Answer<F> {
    /// The object, or the uid of one that is gone.
    fact: Result<Arc<F>, Name>,
    at: Duration,
}

impl<F> Default for Learned<F> {
    fn default() -> Self {
        Learned { entries: BTreeMap::new() }
    }
}

impl<F: Fact> Learned<F> {
    /// The API server answered with this object.
    pub fn fact(&mut self, fact: F, clock: Clock) {
        self.entries.insert(fact.name().clone(), Answer { fact: Ok(Arc::new(fact)), at: clock.steady });
    }

    /// The object of that name and uid is gone.
    pub fn gone(&mut self, name: &Name, uid: &Name, clock: Clock) {
        self.entries.insert(name.clone(), Answer { fact: Err(uid.clone()), at: clock.steady });
    }

    /// The watch's facts with the answers over them; drops answers that the watch has caught up with.
    pub fn over(&mut self, watched: &Facts<F>) -> Facts<F> {
        self.entries.retain(|name, answer| match (&answer.fact, watched.get(name)) {
            (Ok(fact), Some(seen)) => is_newer(fact.resource_version(), seen.resource_version()),
            (Ok(_), None) => true,
            (Err(uid), seen) => seen.is_some_and(|seen| seen.uid() == uid),
        });
        if self.entries.is_empty() {
            return watched.clone();
        }
        let mut merged = (**watched).clone();
        for (name, answer) in &self.entries {
            match &answer.fact {
                Ok(fact) => merged.insert(name.clone(), fact.clone()),
                Err(_) => merged.remove(name),
            };
        }
        Arc::new(merged)
    }

    /// A LIST made just now is the truth: what differs from the watch is learned, all else forgotten. What
    /// the watch shows already, but was created after the LIST, stays.
    pub fn settle(&mut self, listed: &Listed<F>, watched: &Facts<F>, clock: Clock) {
        self.entries.clear();
        for fact in listed.facts.values() {
            if watched.get(fact.name()).is_none_or(|seen| seen != fact) {
                let answer = Answer { fact: Ok(fact.clone()), at: clock.steady };
                self.entries.insert(fact.name().clone(), answer);
            }
        }
        for seen in watched.values().filter(|seen| !listed.facts.contains_key(seen.name())) {
            if !is_newer(seen.resource_version(), &listed.resource_version) {
                self.gone(seen.name(), seen.uid(), clock);
            }
        }
    }

    /// Forgets all answers: they are of a history that etcd has left.
    pub fn forget(&mut self) {
        self.entries.clear();
    }

    /// Whether the watch has not shown an answer for so long that a LIST must settle it.
    pub fn is_overdue(&self, clock: Clock) -> bool {
        self.entries.values().any(|answer| answer.at + LEARNED_FOR <= clock.steady)
    }
}

/// Whether one resourceVersion is newer than another of the same kind. They are numbers (KEP-5504); if one
/// is not, the watch is believed.
fn is_newer(ours: &str, seen: &str) -> bool {
    matches!((ours.parse::<u64>(), seen.parse::<u64>()), (Ok(ours), Ok(seen)) if ours > seen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Lost;
    use crate::fixtures::{NOW, at, block, held_block, labels, report};
    use plat_crds::pod_cidr::BlockState;

    fn clock(second: u64) -> Clock {
        Clock { wall: at(NOW), steady: Duration::from_secs(second) }
    }

    fn versioned(cidr: &str, version: &str) -> BlockFact {
        BlockFact { resource_version: version.into(), ..held_block(cidr, "r", "n1") }
    }

    fn facts(blocks: &[BlockFact]) -> Facts<BlockFact> {
        Arc::new(blocks.iter().map(|b| (b.name.clone(), Arc::new(b.clone()))).collect())
    }

    fn versions(facts: &Facts<BlockFact>) -> Vec<(&str, &str)> {
        facts.values().map(|b| (&*b.name, &*b.resource_version)).collect()
    }

    const QUARANTINE: Duration = Duration::from_secs(900);

    #[test]
    fn cursors_are_remembered_for_ranges_that_exist_and_groups_that_have_a_node_or_a_block() {
        let host = "kubernetes.io/hostname";
        let of = |name: &str, key: Option<&str>| RangeFact {
            topology_key: key.map(Into::into),
            ..crate::fixtures::range(name, "10.244.0.0/16")
        };
        let scene = crate::fixtures::scene()
            .range(of("spread", Some(host)))
            .range(of("plain", None))
            .node(NodeFact { labels: labels(&[(host, "lives")]), ..crate::fixtures::node("lives") })
            .node(crate::fixtures::node("unlabelled"))
            .block(BlockFact {
                labels: labels(&[(host, "rests")]),
                ..held_block("10.244.1.0/24", "spread", "gone")
            });
        let uid = |name: &str| scene.world.ranges[name].uid.clone();
        let (spread, plain, gone): (Name, Name, Name) = (uid("spread"), uid("plain"), "uid-of-before".into());
        let mut memory = Memory::new(false);
        for uid in [&spread, &plain, &gone] {
            memory.cursors.insert(uid.clone(), 7);
        }
        for (uid, value) in [
            (&spread, Some("lives")),
            (&spread, Some("rests")),
            (&spread, Some("dead")),
            (&spread, None),
            (&plain, Some("lives")),
            (&gone, Some("lives")),
        ] {
            memory.group_cursors.insert((uid.clone(), value.map(Into::into)), 7);
        }
        memory.observe_groups(&scene.world.ranges, &scene.world.nodes, &scene.world.blocks);
        let kept: BTreeSet<&Name> = memory.cursors.keys().collect();
        assert_eq!(kept, BTreeSet::from([&spread, &plain]));
        let kept: Vec<_> = memory.group_cursors.keys().map(|(uid, value)| (uid, value.as_deref())).collect();
        assert_eq!(kept, [(&spread, None), (&spread, Some("lives")), (&spread, Some("rests"))]);
    }

    #[test]
    fn an_answer_holds_until_the_watch_has_caught_up() {
        let mut learned = Learned::default();
        learned.fact(versioned("10.244.1.0/24", "7"), clock(0));
        let name = "10-244-1-0-24";
        assert_eq!(versions(&learned.over(&facts(&[]))), [(name, "7")], "not watched yet");
        assert_eq!(versions(&learned.over(&facts(&[versioned("10.244.1.0/24", "5")]))), [(name, "7")]);
        assert_eq!(versions(&learned.over(&facts(&[versioned("10.244.1.0/24", "9")]))), [(name, "9")]);
        assert_eq!(versions(&learned.over(&facts(&[]))), [], "once caught up, the watch alone counts");
    }

    #[test]
    fn a_deletion_holds_until_the_watch_has_caught_up() {
        let mut learned = Learned::default();
        let old = versioned("10.244.1.0/24", "5");
        learned.gone(&old.name, &old.uid, clock(0));
        assert_eq!(versions(&learned.over(&facts(std::slice::from_ref(&old)))), []);
        let again = BlockFact { uid: "another".into(), ..versioned("10.244.1.0/24", "9") };
        assert_eq!(versions(&learned.over(&facts(&[again]))).len(), 1, "another object of that name");
    }

    #[test]
    fn a_version_that_is_no_number_is_never_newer_than_the_watch() {
        assert!(is_newer("10", "9") && !is_newer("9", "10") && !is_newer("9", "9"));
        assert!(!is_newer("b", "a") && !is_newer("", "1"));
    }

    #[test]
    fn a_live_list_is_the_truth_but_for_what_came_after_it() {
        let mut learned = Learned::default();
        learned.fact(versioned("10.244.9.0/24", "4"), clock(0));
        let watched = facts(&[
            versioned("10.244.1.0/24", "3"),
            versioned("10.244.2.0/24", "20"),
            versioned("10.244.3.0/24", "5"),
        ]);
        let listed = Listed {
            facts: [versioned("10.244.3.0/24", "8")].map(|b| (b.name.clone(), Arc::new(b))).into(),
            resource_version: "10".to_owned(),
        };
        learned.settle(&listed, &watched, clock(0));
        assert_eq!(versions(&learned.over(&watched)), [("10-244-2-0-24", "20"), ("10-244-3-0-24", "8")]);
        assert!(!learned.is_overdue(clock(9)) && learned.is_overdue(clock(10)));
    }

    #[test]
    fn a_block_that_goes_without_being_released_is_remembered_for_a_quarantine() {
        let mut memory = Memory::new(false);
        let (lost, freed) = (versioned("10.244.1.0/24", "1"), versioned("10.244.2.0/24", "1"));
        memory.observe(&facts(&[lost.clone(), freed.clone()]), |_| QUARANTINE, clock(0));
        memory.block_released(&freed.uid, &freed.name, &freed.node, clock(1));
        memory.observe(&facts(&[]), |_| QUARANTINE, clock(2));
        assert_eq!(memory.vanished.keys().copied().collect::<Vec<_>>(), [block("10.244.1.0/24")]);
        memory.observe(&facts(&[]), |_| QUARANTINE, clock(901));
        assert_eq!(memory.vanished.len(), 1);
        memory.observe(&facts(&[]), |_| QUARANTINE, clock(903));
        assert_eq!(memory.vanished.len(), 0);
    }

    #[test]
    fn a_resting_block_whose_deletion_was_not_answered_is_no_loss_but_one_in_use_again_is() {
        let resting = BlockFact { state: BlockState::Quarantined, ..versioned("10.244.1.0/24", "1") };
        let vanished = |then: &[&BlockFact]| {
            let mut memory = Memory::new(false);
            memory.observe(&facts(std::slice::from_ref(&resting)), |_| QUARANTINE, clock(0));
            memory.release_unknown(&resting.uid);
            for block in then {
                memory.observe(&facts(std::slice::from_ref(*block)), |_| QUARANTINE, clock(1));
            }
            memory.observe(&facts(&[]), |_| QUARANTINE, clock(2));
            memory.vanished.len()
        };
        assert_eq!(vanished(&[]), 0);
        assert_eq!(vanished(&[&resting]), 0);
        assert_eq!(vanished(&[&versioned("10.244.1.0/24", "2")]), 1, "its node had come back");
    }

    #[test]
    fn a_block_that_comes_back_is_not_lost_any_more() {
        let mut memory = Memory::new(false);
        memory.observe(&facts(&[versioned("10.244.1.0/24", "1")]), |_| QUARANTINE, clock(0));
        memory.observe(&facts(&[]), |_| QUARANTINE, clock(1));
        assert_eq!(memory.vanished.len(), 1);
        memory.observe(&facts(&[versioned("10.244.1.0/24", "2")]), |_| QUARANTINE, clock(2));
        assert_eq!(memory.vanished.len(), 0);
    }

    #[test]
    fn a_quarantine_is_watched_from_when_it_is_first_seen_and_anew_after_a_return() {
        let mut memory = Memory::new(false);
        let resting = BlockFact { state: BlockState::Quarantined, ..versioned("10.244.1.0/24", "1") };
        let active = versioned("10.244.1.0/24", "2");
        for (second, fact, since) in
            [(5, &resting, Some(5)), (9, &resting, Some(5)), (10, &active, None), (20, &resting, Some(20))]
        {
            memory.observe(&facts(std::slice::from_ref(fact)), |_| QUARANTINE, clock(second));
            assert_eq!(memory.quarantined.get(&resting.uid).map(Duration::as_secs), since, "{second}");
        }
    }

    #[test]
    fn an_unknown_create_blocks_its_addresses_until_it_is_seen_or_can_have_no_effect() {
        let new = NewBlock {
            block: block("10.244.1.0/24"),
            range: "r".into(),
            node: "n1".into(),
            node_uid: "u".into(),
            addresses: vec![],
            labels: vec![],
            origin: crate::step::Origin::Carved,
        };
        let mut memory = Memory::new(false);
        memory.create_unknown(&new, clock(0));
        assert!(memory.distrust);
        memory.observe(&facts(&[]), |_| QUARANTINE, clock(119));
        assert_eq!(memory.pending.len(), 1);
        let mut seen = memory.clone();
        seen.observe(&facts(&[versioned("10.244.1.0/24", "1")]), |_| QUARANTINE, clock(119));
        assert_eq!(seen.pending.len(), 0);
        memory.observe(&facts(&[]), |_| QUARANTINE, clock(120));
        assert_eq!(memory.pending.len(), 0);
    }

    #[test]
    fn a_list_from_before_what_was_watched_means_that_etcd_was_put_back() {
        let listed = |version: &str| Listed { facts: BTreeMap::new(), resource_version: version.to_owned() };
        let watched = facts(&[versioned("10.244.1.0/24", "7"), versioned("10.244.2.0/24", "9")]);
        assert!(listed("8").went_back(&watched));
        assert!(!listed("9").went_back(&watched) && !listed("12").went_back(&watched));
    }

    #[test]
    fn an_object_that_is_missing_or_fails_again_and_again_is_read_back() {
        let fail = |kind, missing, times| {
            let mut memory = Memory::new(false);
            (0..times).for_each(|_| memory.failed((kind, "x".into()), missing, clock(0)));
            memory.distrust
        };
        assert!(fail(Kind::PodCIDR, true, 1) && fail(Kind::ClusterCIDR, false, 3));
        assert!(!fail(Kind::PodCIDR, false, 2) && !fail(Kind::Node, true, 9));
    }

    #[test]
    fn a_failing_write_is_tried_again_later_and_later() {
        let (mut memory, target) = (Memory::new(false), (Kind::Node, Name::from("n1")));
        assert!(memory.is_ripe(&target, clock(0)));
        let mut waits = Vec::new();
        for _ in 0..9 {
            memory.failed(target.clone(), false, clock(0));
            waits.push(memory.retries[&target].not_before.as_millis());
        }
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000]);
        assert!(!memory.is_ripe(&target, clock(9)) && memory.is_ripe(&target, clock(10)));
        assert_eq!(memory.wakes_at(clock(9)), Some(Duration::from_secs(10)));
        assert_eq!(memory.wakes_at(clock(10)), None, "what is past wakes nobody");
        memory.asked_to_wait(&target, Duration::from_secs(3), clock(0));
        assert!(!memory.is_ripe(&target, clock(9)), "its own wait is longer than what is asked for");
        memory.asked_to_wait(&target, Duration::from_secs(30), clock(0));
        assert!(!memory.is_ripe(&target, clock(29)) && memory.is_ripe(&target, clock(30)));
        memory.succeeded(&target);
        assert!(memory.is_ripe(&target, clock(0)));
    }

    fn tells(node: &str, lost: &[(&str, &str)], is_cut: bool) -> Facts<ReportFact> {
        let blocks = lost.iter().map(|(cidr, node)| (block(cidr), Name::from(*node))).collect();
        let report = ReportFact { lost: Lost { blocks, is_cut }, ..report(node, &[]) };
        Arc::new([(report.name.clone(), Arc::new(report))].into())
    }

    fn told(memory: &Memory, second: u64) -> Vec<String> {
        memory.told(clock(second)).map(|(block, node)| format!("{block} {node}")).collect()
    }

    #[test]
    fn a_lost_block_that_agents_tell_of_is_taken_for_a_quarantine_also_after_they_fell_silent() {
        let mut memory = Memory::new(false);
        let lost = [("10.244.1.0/24", "x"), ("10.244.2.0/24", "y")];
        let hear = |memory: &mut Memory, second, lost: &[(&str, &str)], there: &[BlockFact]| {
            memory.observe_losses(&tells("n1", lost, false), &facts(there), |_| QUARANTINE, clock(second));
        };
        hear(&mut memory, 10, &lost, &[versioned("10.244.2.0/24", "1")]);
        assert_eq!(told(&memory, 10), ["10.244.1.0/24 x"], "one that is there is not lost");
        assert_eq!(memory.wakes_at(clock(10)), Some(Duration::from_secs(910)));
        hear(&mut memory, 20, &[], &[]);
        assert_eq!(told(&memory, 909), ["10.244.1.0/24 x"]);
        hear(&mut memory, 30, &lost[..1], &[]);
        hear(&mut memory, 910, &lost[..1], &[]);
        assert_eq!(told(&memory, 910), [] as [&str; 0], "the report of a dead agent does not count for ever");
        hear(&mut memory, 911, &[], &[versioned("10.244.1.0/24", "1")]);
        hear(&mut memory, 912, &lost[..1], &[]);
        assert_eq!(told(&memory, 1811), ["10.244.1.0/24 x"], "lost once more");
    }

    #[test]
    fn more_losses_than_an_agent_can_name_stop_carving_for_a_quarantine() {
        let mut memory = Memory::new(false);
        let hear = |memory: &mut Memory, second, is_cut| {
            let reports = tells("n1", &[("10.244.1.0/24", "x")], is_cut);
            memory.observe_losses(&reports, &facts(&[]), |_| QUARANTINE, clock(second));
        };
        for (second, is_cut, until) in
            [(0, false, None), (5, true, Some(905)), (99, true, Some(905)), (100, false, None)]
        {
            hear(&mut memory, second, is_cut);
            assert_eq!(memory.untold, until.map(Duration::from_secs), "{second}");
        }
    }
}
