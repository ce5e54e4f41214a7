//! Existing blocks: keep them with their nodes, and let go of them only slowly.
//!
//! ```text
//! Active ──node gone──▶ Quarantined ──time over, watched, node still gone──▶ deleted
//!    ▲                      │
//!    └──node of that name───┘
//! ```
//! A second block of one family (two leaders once raced) goes Active → Draining → (last lease ended)
//! Quarantined → deleted.

use k8s_openapi::jiff::Timestamp;
use plat_crds::names;
use plat_crds::pod_cidr::BlockState;

use super::Planner;
use crate::facts::{BlockFact, NodeFact};
use crate::ranges::quarantine_of;
use crate::step::{BlockChange, Step, Version, Why};

/// A label value has at most so many bytes.
const MAX_LABEL_VALUE: usize = 63;

impl Planner<'_> {
    pub(super) fn hold_blocks(&mut self) {
        let snapshot = self.snapshot;
        for block in snapshot.blocks.values().filter(|b| b.problem.is_none() && !b.deleting) {
            match snapshot.nodes.get(&block.node) {
                Some(node) if node.problem.is_some() => {}
                Some(node) if self.is_own(block, node) => self.keep(block, node),
                Some(node) => self.retire(block, node),
                None => self.let_go(block),
            }
        }
    }

    fn is_own(&self, block: &BlockFact, node: &NodeFact) -> bool {
        self.held_block(&node.name, block.block.family()).is_some_and(|own| own.uid == block.uid)
    }

    fn keep(&mut self, block: &BlockFact, node: &NodeFact) {
        let returned = block.is_quarantined() || block.node_uid.as_ref() != Some(&node.uid);
        let mut change = BlockChange::default();
        if block.node_uid.as_ref() != Some(&node.uid) {
            change.node_uid = Some(node.uid.clone());
        }
        // A node without an address (its cloud controller has not seen it yet) keeps the last known ones:
        // withdrawing every route to it would help nobody.
        if !node.addresses.is_empty() && block.addresses != node.addresses {
            change.addresses = Some(node.addresses.to_vec());
        }
        if matches!(block.state, BlockState::Quarantined | BlockState::Draining) {
            change.state = Some(BlockState::Active);
        }
        if block.release_after.is_some() {
            change.release_after = Some(None);
        }
        change.labels = self.label_changes(block, node);
        if !change.is_empty() {
            self.change(block, node, change, if returned { Why::Readopt } else { Why::Refresh });
        }
    }

    fn retire(&mut self, block: &BlockFact, node: &NodeFact) {
        match block.state {
            BlockState::Active => {
                let change = BlockChange { state: Some(BlockState::Draining), ..BlockChange::default() };
                self.change(block, node, change, Why::Drain);
            }
            BlockState::Draining if self.is_unused(block) => {
                self.change(block, node, self.quarantine(block), Why::Unused);
            }
            BlockState::Quarantined => self.free_in_time(block, false),
            BlockState::Draining | BlockState::Unknown => {}
        }
    }

    /// Whether the node has seen that the block drains, and has surely no lease in it any more.
    fn is_unused(&self, block: &BlockFact) -> bool {
        let Some(report) = self.snapshot.reports.get(&block.node) else { return false };
        let ledger = &self.snapshot.memory.ledger;
        let seen = report.applied.and_then(|digest| ledger.number_of(digest));
        ledger.carries(seen, &block.uid)
            && report.held.iter().all(|held| !held.block.overlaps(&block.block) || held.used == Some(0))
    }

    fn let_go(&mut self, block: &BlockFact) {
        if block.is_quarantined() {
            self.free_in_time(block, true);
            return;
        }
        let change = self.quarantine(block);
        let node_uid = block.node_uid.clone().unwrap_or_default();
        self.plan.steps.push(Step::ChangeBlock {
            object: version(block),
            node: block.node.clone(),
            node_uid,
            change,
            why: Why::NodeGone,
        });
    }

    fn quarantine(&self, block: &BlockFact) -> BlockChange {
        BlockChange {
            state: Some(BlockState::Quarantined),
            release_after: Some(Some(self.release_time(block))),
            ..BlockChange::default()
        }
    }

    fn release_time(&self, block: &BlockFact) -> Timestamp {
        self.snapshot.clock.wall_after(quarantine_of(&self.snapshot.ranges, &block.range))
    }

    /// Frees a block whose quarantine is over by the wall clock and has been watched by this leader for a
    /// while: a wrong clock alone, ours or a former leader's, frees nothing at once.
    fn free_in_time(&mut self, block: &BlockFact, confirm_gone: bool) {
        let clock = self.snapshot.clock;
        let Some(release_after) = block.release_after else {
            let change =
                BlockChange { release_after: Some(Some(self.release_time(block))), ..BlockChange::default() };
            let node_uid = block.node_uid.clone().unwrap_or_default();
            let (object, node) = (version(block), block.node.clone());
            self.plan.steps.push(Step::ChangeBlock { object, node, node_uid, change, why: Why::Refresh });
            return;
        };
        let quarantine = quarantine_of(&self.snapshot.ranges, &block.range);
        let to_watch = self.snapshot.settings.quarantine_watch.min(quarantine);
        let seen_since = self.snapshot.memory.quarantined.get(&block.uid).copied().unwrap_or(clock.steady);
        let watched = clock.steady.saturating_sub(seen_since);
        let wait = clock.until(release_after).max(to_watch.saturating_sub(watched));
        if wait.is_zero() {
            let (object, node) = (version(block), block.node.clone());
            self.plan.steps.push(Step::DeleteBlock { object, node, confirm_gone });
        } else {
            self.wake_after(wait);
        }
    }

    fn change(&mut self, block: &BlockFact, node: &NodeFact, change: BlockChange, why: Why) {
        let (object, name, node_uid) = (version(block), node.name.clone(), node.uid.clone());
        self.plan.steps.push(Step::ChangeBlock { object, node: name, node_uid, change, why });
    }

    /// Labels of ours that are missing, differ, or that the node has lost. Keys that no selector names any
    /// more stay as they are: nobody reads them, and they may be a user's.
    fn label_changes(&self, block: &BlockFact, node: &NodeFact) -> Vec<(String, Option<String>)> {
        let wanted = self.labels(&block.range, node);
        let keys = self.selected_keys.iter().copied();
        let lost =
            keys.into_iter().filter(|key| node.labels.get(key).is_none() && block.labels.get(key).is_some());
        let lost = lost.map(|key| (key.to_owned(), None));
        let set = wanted.into_iter().filter(|(key, value)| block.labels.get(key) != Some(value));
        set.map(|(key, value)| (key, Some(value))).chain(lost).collect()
    }

    /// The labels of a block: whose and from where it is, and the node's labels that selectors name, so
    /// that agents can match selectors without a right on Nodes.
    pub(super) fn labels(&self, range: &str, node: &NodeFact) -> Vec<(String, String)> {
        let mut labels = vec![
            (names::LABEL_CLUSTER_CIDR.to_owned(), label_value(range)),
            (names::LABEL_NODE.to_owned(), label_value(&node.name)),
        ];
        for key in &self.selected_keys {
            if let Some(value) = node.labels.get(key) {
                labels.push(((*key).to_owned(), value.to_owned()));
            }
        }
        labels
    }
}

/// A name cut to a valid label value: at most 63 bytes, ending with a letter or a digit.
fn label_value(name: &str) -> String {
    let cut: String = name.chars().take(MAX_LABEL_VALUE).collect();
    cut.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}

fn version(block: &BlockFact) -> Version {
    Version {
        name: block.name.clone(),
        uid: block.uid.clone(),
        resource_version: block.resource_version.clone(),
    }
}
