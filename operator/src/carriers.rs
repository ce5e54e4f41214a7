//! What live nodes carry, prepared for one question per block: has every one of them applied this object? Pure.
//!
//! A node is live if Kubernetes calls it `Ready`: one that is cut off would hold up everything. One whose agent
//! has never said a word has none (a virtual node): it carries nothing. It counts as silent for a while all the
//! same, as its report may only have been deleted, and its agent may not have written it again yet.
//!
//! One answer costs a binary search over the sums that nodes reported ([`crate::ledger`]), so a pass over n
//! blocks and n nodes costs n log n and writes nothing by itself.

use std::collections::{BTreeMap, BTreeSet};

use plat_crds::condition::{CONVERGED, Verdict};
use plat_crds::digest::Digest;
use plat_crds::node_network::{FailedObject, NOT_WITHDRAWN};
use plat_crds::pod_cidr::BlockState;

use crate::facts::{BlockFact, Health, Name, NodeFact, ReportFact};
use crate::reason;
use crate::snapshot::Snapshot;

/// At most so many nodes are named.
const NAMED: usize = 3;

/// What the live nodes carry.
pub struct Carriers<'a> {
    snapshot: &'a Snapshot<'a>,
    /// The sum up to which each live node carries what it can, the furthest behind first; 0 for an unknown one.
    carried: Vec<(u64, &'a str)>,
    /// The sum up to which each has acted, also where objects failed: up to there it has withdrawn what it
    /// does not name.
    seen: Vec<(u64, &'a str)>,
    /// Object name → the live nodes that could not apply it, and why.
    failed: BTreeMap<&'a str, Vec<(&'a str, &'a str)>>,
}

/// Live nodes that a released block waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silent {
    /// How many.
    pub count: usize,
    /// Of how many live nodes.
    pub live: usize,
    /// The first of them.
    pub named: Vec<Name>,
}

impl std::fmt::Display for Silent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let more = if self.count > self.named.len() { ", …" } else { "" };
        write!(f, "{} of {} live nodes ({}{more})", self.count, self.live, self.named.join(", "))
    }
}

impl<'a> Carriers<'a> {
    /// The carriers of a snapshot.
    pub fn of(snapshot: &'a Snapshot<'a>) -> Carriers<'a> {
        let (mut carried, mut seen) = (Vec::new(), Vec::new());
        let mut failed: BTreeMap<&str, Vec<(&str, &str)>> = BTreeMap::new();
        for node in snapshot.nodes.values().filter(|node| node.health == Health::Ready) {
            let Some(report) = snapshot.reports.get(&node.name).filter(|report| report.reported) else {
                seen.extend(may_have_agent(node, snapshot).then_some((0, &*node.name)));
                continue;
            };
            carried.push((carried_by(report, snapshot).unwrap_or(0), &*node.name));
            seen.push((seen_by(report, snapshot).unwrap_or(0), &*node.name));
            for object in report.failed.iter() {
                failed.entry(&object.name).or_default().push((&node.name, &object.message));
            }
        }
        carried.sort_unstable();
        seen.sort_unstable();
        Carriers { snapshot, carried, seen, failed }
    }

    /// Every live node carries the block, and its own has taken it up, live or not yet. Once that was so it
    /// stays so until the block changes or a node says that it failed: a node that joins programs everything
    /// before it is Ready, and must not unsettle every block for a moment.
    pub fn converged(&self, block: &BlockFact) -> Verdict {
        let verdict = |status, reason, message| Verdict::new(CONVERGED, Some(status), reason, message);
        if let Some((node, why)) = self.failed.get(&*block.name).and_then(|failed| failed.first()) {
            return verdict(false, reason::FAILED_ON_NODE, format!("node {node} could not apply it: {why}"));
        }
        if block.is_quarantined() && !was_converged(block) {
            return match self.silent(block) {
                None => verdict(true, reason::CARRIED, "no live node routes to it".to_owned()),
                Some(silent) => {
                    let message =
                        format!("{silent} have not reported yet that they withdrew their route to it");
                    verdict(false, reason::SPREADING, message)
                }
            };
        }
        let carried = || verdict(true, reason::CARRIED, String::new());
        if was_converged(block) {
            return carried();
        }
        let behind = self.behind(&self.carried, block);
        if behind == 0 && self.own_carries(block) {
            return carried();
        }
        let message = match self.carried.first().filter(|_| behind > 0) {
            Some((_, first)) => {
                format!("{behind} of {} live nodes do not carry it yet, such as {first}", self.carried.len())
            }
            None => format!("its own node {} does not carry it yet", block.node),
        };
        verdict(false, reason::SPREADING, message)
    }

    /// The live nodes that have not proven that they withdrew their route to a quarantined block: those that
    /// have not acted on its quarantine, and those that name it as one that they could not withdraw.
    ///
    /// Only the *update* to `Quarantined` proves something: an agent that fails static keeps the route of an
    /// object that is merely gone.
    pub fn silent(&self, block: &BlockFact) -> Option<Silent> {
        let behind = self.behind(&self.seen, block);
        let late = || self.seen.iter().take(behind).map(|(_, node)| *node);
        let stuck = self.failed.get(&*block.name).into_iter().flatten().map(|(node, _)| *node);
        let stuck: Vec<&str> = stuck.filter(|node| late().all(|other| other != *node)).collect();
        let count = behind + stuck.len();
        let named = stuck.into_iter().chain(late()).take(NAMED).map(Name::from).collect();
        (count > 0).then_some(Silent { count, live: self.seen.len(), named })
    }

    /// How many of the sorted sums do not hold the block's present generation.
    fn behind(&self, sums: &[(u64, &str)], block: &BlockFact) -> usize {
        let entered = self.snapshot.memory.ledger.entered(&block.uid);
        sums.partition_point(|(number, _)| entered.is_none_or(|since| *number < since))
    }

    /// A node that leases from an active block has taken it up, whatever else it has yet to do: that need not
    /// wait for a sum that the ledger knows, which there may be none of while many nodes join at once.
    fn own_carries(&self, block: &BlockFact) -> bool {
        let Some(report) = self.snapshot.reports.get(&block.node) else { return false };
        let holds = || report.held.iter().any(|held| held.block == block.block);
        (block.state == BlockState::Active && holds())
            || self.snapshot.memory.ledger.carries(carried_by(report, self.snapshot), &block.uid)
    }
}

/// Whether a node without a report may have an agent: this leader has not known it so for long.
fn may_have_agent(node: &NodeFact, snapshot: &Snapshot) -> bool {
    let now = snapshot.clock.steady;
    let since = snapshot.memory.mute.get(&node.name).copied().unwrap_or(now);
    now.saturating_sub(since) < snapshot.settings.withdrawal_deadline
}

/// Whether the block's status says that it is converged, as its spec is now.
pub fn was_converged(block: &BlockFact) -> bool {
    block
        .condition(CONVERGED)
        .is_some_and(|c| c.is_true() && c.observed_generation() == Some(block.generation))
}

/// The number of the sum that a node carries, counting what it names as failed as carried: one object that
/// fails, and is named for it, must not make all others look as if they had not arrived.
pub fn carried_by(report: &ReportFact, snapshot: &Snapshot) -> Option<u64> {
    let mut sum = report.applied?;
    let named: BTreeSet<&str> = report.failed.iter().map(|failed| failed.name.as_str()).collect();
    for name in named {
        let block = snapshot.blocks.get(name).map(|b| (&b.uid, b.generation));
        let range = || snapshot.ranges.get(name).map(|r| (&r.uid, r.generation));
        if let Some((uid, generation)) = block.or_else(range) {
            sum.add(uid, generation);
        }
    }
    snapshot.memory.ledger.number_of(sum)
}

/// Whether a report was made with every range in view: only then does it name all blocks that the node has pods of
/// without an object, as it does when another network was there before.
pub fn knows_every_range(report: &ReportFact, snapshot: &Snapshot) -> bool {
    let seen = seen_by(report, snapshot);
    snapshot.ranges.values().all(|range| snapshot.memory.ledger.carries(seen, &range.uid))
}

/// The number of the sum that a node has acted on. Agents of before say only what they carry.
fn seen_by(report: &ReportFact, snapshot: &Snapshot) -> Option<u64> {
    let is_stuck = |failed: &FailedObject| failed.reason == NOT_WITHDRAWN;
    if report.names_not_all && report.failed.iter().all(is_stuck) {
        // There may be more that it could not withdraw.
        return None;
    }
    let number = |sum: Digest| snapshot.memory.ledger.number_of(sum);
    report.seen.and_then(number).max(carried_by(report, snapshot))
}
