//! Existing blocks: keep them with their nodes, and let go of them only slowly.
//!
//! ```text
//! Active ──node gone──▶ Quarantined ──time over, watched, withdrawn, node still gone──▶ deleted
//!    ▲                      │
//!    └──node of that name───┘
//! ```
//! What goes while its node stays is decided in [`super::drain`].

use k8s_openapi::jiff::Timestamp;
use plat_crds::names;
use plat_crds::pod_cidr::BlockState;

use super::Planner;
use super::drain::Next;
use crate::facts::{BlockFact, NodeFact};
use crate::leader::LABELS_WAIT;
use crate::memory::LABEL_WRITES_PER_SECOND;
use crate::ranges::quarantine_of;
use crate::step::{BlockChange, Kind, Step, Why, version};

/// A label value has at most so many bytes.
const MAX_LABEL_VALUE: usize = 63;
/// A plan changes the labels of at most so many blocks.
const MAX_RELABELLED: usize = LABEL_WRITES_PER_SECOND as usize;

impl Planner<'_> {
    pub(super) fn hold_blocks(&mut self) {
        let snapshot = self.snapshot;
        for block in snapshot.blocks.values().filter(|b| b.problem.is_none() && !b.deleting) {
            match snapshot.nodes.get(&block.node) {
                Some(node) if node.problem.is_some() => {}
                Some(node) => self.settle(block, node),
                None => self.let_go(block),
            }
        }
    }

    fn settle(&mut self, block: &BlockFact, node: &NodeFact) {
        match self.next(block, node) {
            Next::Stay => self.keep(block, node, block.state, Why::Refresh),
            Next::Be(state, why) => self.keep(block, node, state, why),
            // Its quarantine begins under the node's present uid, or it would look like that of a node that left.
            Next::Quarantine if block.node_uid.as_ref() != Some(&node.uid) => {
                self.keep(block, node, block.state, Why::Refresh);
            }
            Next::Quarantine => self.change(block, node, self.quarantine(block), Why::Unused),
            Next::Rest if self.is_empty(block) => self.free_in_time(block, Some(node)),
            Next::Rest => {}
        }
    }

    fn keep(&mut self, block: &BlockFact, node: &NodeFact, state: BlockState, why: Why) {
        let mut change = BlockChange::default();
        let why = if block.node_uid.as_ref() == Some(&node.uid) { why } else { Why::Readopt };
        if block.node_uid.as_ref() != Some(&node.uid) {
            change.node_uid = Some(node.uid.clone());
        }
        // A node without an address (its cloud controller has not seen it yet) keeps the last known ones:
        // withdrawing every route to it would help nobody.
        if !node.addresses.is_empty() && block.addresses != node.addresses {
            change.addresses = Some(node.addresses.to_vec());
        }
        if block.state != state {
            change.state = Some(state);
        }
        if block.release_after.is_some() {
            change.release_after = Some(None);
        }
        change.labels = self.label_changes(block, node);
        for (key, _) in &change.labels {
            *self.plan.uncopied.entry(key.clone()).or_default() += 1;
        }
        if change.is_labels_only() && !self.may_relabel(block) {
            self.wake_after(LABELS_WAIT);
        } else if !change.is_empty() {
            self.change(block, node, change, why);
        }
    }

    /// Each label that changes is an event for every agent, so a plan has only as many such steps as can be carried
    /// out soon: with thousands of blocks, the others would be made again and again in vain.
    fn may_relabel(&mut self, block: &BlockFact) -> bool {
        let ripe = self.snapshot.memory.is_ripe(&(Kind::PodCIDR, block.name.clone()), self.snapshot.clock);
        let may = ripe && self.relabelled < MAX_RELABELLED;
        self.relabelled += usize::from(may);
        may
    }

    fn let_go(&mut self, block: &BlockFact) {
        if block.is_quarantined() {
            self.free_in_time(block, None);
            return;
        }
        self.change_as_held(block, self.quarantine(block), Why::NodeGone);
    }

    fn quarantine(&self, block: &BlockFact) -> BlockChange {
        BlockChange {
            state: Some(BlockState::Quarantined),
            release_after: Some(Some(self.release_time(block))),
            ..BlockChange::default()
        }
    }

    pub(super) fn release_time(&self, block: &BlockFact) -> Timestamp {
        self.snapshot.clock.wall_after(quarantine_of(&self.snapshot.ranges, &block.range))
    }

    fn change(&mut self, block: &BlockFact, node: &NodeFact, change: BlockChange, why: Why) {
        let (object, name, node_uid) = (version(block), node.name.clone(), node.uid.clone());
        self.plan.steps.push(Step::ChangeBlock { object, node: name, node_uid, change, why });
    }

    /// The same for a block whose node may be gone: under the uid that the block itself is held for.
    pub(super) fn change_as_held(&mut self, block: &BlockFact, change: BlockChange, why: Why) {
        let (object, node) = (version(block), block.node.clone());
        let node_uid = block.node_uid.clone().unwrap_or_default();
        self.plan.steps.push(Step::ChangeBlock { object, node, node_uid, change, why });
    }

    /// Labels of ours that are missing or differ, that the node has lost, or that nothing names any more. Users'
    /// labels stay, but for those that something names: they are the node's, or selectors would see what is not so.
    /// What an object that cannot be read names is not known, and agents may well be able to read it.
    fn label_changes(&self, block: &BlockFact, node: &NodeFact) -> Vec<(String, Option<String>)> {
        let wanted = self.labels(&block.range, node);
        let is_wanted = |key: &str| wanted.iter().any(|(wanted, _)| wanted == key);
        let is_named = |key: &str| self.selected_keys.contains(key);
        let stays =
            |key: &str| !is_named(key) && (!self.knows_all_keys || block.others_labels.get(key).is_some());
        let gone = block.labels.iter().filter(|(key, _)| !is_wanted(key) && !stays(key));
        let gone: Vec<_> = gone.map(|(key, _)| (key.to_owned(), None)).collect();
        let set = wanted.into_iter().filter(|(key, value)| block.labels.get(key) != Some(value));
        set.map(|(key, value)| (key, Some(value))).chain(gone).collect()
    }

    /// The labels of a block: whose and from where it is, and the node's labels that selectors and
    /// `topologyKey`s name, so that agents can match them without a right on Nodes.
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
    let cut =
        name.char_indices().nth(MAX_LABEL_VALUE).map_or(name, |(end, _)| name.get(..end).unwrap_or(name));
    cut.trim_end_matches(|c: char| !c.is_ascii_alphanumeric()).to_owned()
}
