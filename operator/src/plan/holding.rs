//! What a node has of one family. Pure.
//!
//! The first block that it keeps is its *primary*: the one in `node.spec.podCIDRs`, and the last to be given
//! back.

use std::collections::BTreeMap;

use plat_crds::Family;
use plat_crds::pod_cidr::BlockState;

use crate::facts::{BlockFact, Name, ReportFact};
use crate::snapshot::Snapshot;

/// A node's blocks of one family, by what becomes of them, the oldest first.
#[derive(Clone, Debug, Default)]
pub struct Holding<'a> {
    /// Leased from, and nobody asked for them to go.
    pub kept: Vec<&'a BlockFact>,
    /// Draining, or asked to.
    pub leaving: Vec<&'a BlockFact>,
    /// In quarantine because the node was gone, or the last ones it has: it gets them back.
    pub returning: Vec<&'a BlockFact>,
    /// In quarantine because the node gave them back.
    pub resting: Vec<&'a BlockFact>,
    /// Unreadable, or in a state of a newer version: nothing is decided beside these.
    pub unknown: Vec<&'a BlockFact>,
}

impl<'a> Holding<'a> {
    /// Sorts the `blocks` of a node, whose Node object has `node_uid`.
    pub fn of(blocks: &[&'a BlockFact], family: Family, node_uid: &Name) -> Holding<'a> {
        let mut holding = Holding::default();
        for block in blocks.iter().copied().filter(|block| block.block.family() == family) {
            let heap = match block.state {
                BlockState::Active if !block.drain => &mut holding.kept,
                BlockState::Active | BlockState::Draining => &mut holding.leaving,
                BlockState::Quarantined if block.node_uid.as_ref() != Some(node_uid) => {
                    &mut holding.returning
                }
                BlockState::Quarantined => &mut holding.resting,
                BlockState::Unknown => &mut holding.unknown,
            };
            heap.push(block);
        }
        if holding.main().is_none()
            && let Some(at) = holding.resting.iter().position(|block| !block.drain)
        {
            holding.returning.push(holding.resting.remove(at));
        }
        holding
    }

    /// The node's block of the family, to which others are added; `None` if it has none.
    pub fn main(&self) -> Option<&'a BlockFact> {
        let active = self.leaving.iter().find(|block| block.state == BlockState::Active);
        let rest = [&self.leaving, &self.unknown, &self.returning];
        let rest = active.into_iter().chain(rest.into_iter().flatten());
        self.kept.iter().chain(rest).next().copied()
    }

    /// Blocks that the node's agent looks after.
    pub fn in_use(&self) -> usize {
        self.kept.len() + self.leaving.len() + self.unknown.len()
    }
}

/// Node name → its blocks: those in use before those in quarantine, then the oldest first.
pub type BlocksOf<'a> = BTreeMap<&'a str, Vec<&'a BlockFact>>;

/// The blocks of all nodes.
pub fn by_node<'a>(snapshot: &'a Snapshot) -> BlocksOf<'a> {
    let mut blocks_of = BlocksOf::new();
    for block in snapshot.blocks.values() {
        blocks_of.entry(&block.node).or_default().push(block);
    }
    for blocks in blocks_of.values_mut() {
        blocks.sort_by_key(|block| (block.is_quarantined(), block.created, block.block));
    }
    blocks_of
}

/// Used addresses and capacity of each of these blocks; `None` unless the node's report counts all of them. So
/// nothing is decided on a report from before the newest block.
pub fn usage(blocks: &[&BlockFact], report: &ReportFact) -> Option<Vec<(u32, u32)>> {
    let count = |block: &&BlockFact| report.held.iter().find(|held| held.block == block.block)?.usage();
    blocks.iter().map(count).collect()
}
