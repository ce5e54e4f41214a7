//! Who claims which addresses: the answer to "is this block free?". Pure.
//!
//! A block is free only if nothing here overlaps it: no PodCIDR, no create whose outcome is unknown, no
//! block that vanished without being released, none that an agent tells was lost, no node's `heldBlocks`, no `node.spec.podCIDRs`, and no
//! address of the cluster itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use plat_crds::{Block, Family};

use crate::facts::Name;
use crate::snapshot::Snapshot;

/// Why addresses are not free.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// Services, the API server, a node's own address. The first in order: searches begin with it.
    Cluster,
    /// A PodCIDR of that node.
    Object(Name),
    /// A create for that node whose outcome is unknown.
    Pending(Name),
    /// A PodCIDR of that node that vanished without being released.
    Vanished(Name),
    /// Another node tells that a PodCIDR of that node was lost.
    Told(Name),
    /// The node reports that it holds it.
    Held(Name),
    /// The node's `spec.podCIDRs`.
    NodeSpec(Name),
}

impl Claim {
    /// The node that claims, if it is a node.
    pub fn node(&self) -> Option<&Name> {
        match self {
            Claim::Object(node)
            | Claim::Pending(node)
            | Claim::Vanished(node)
            | Claim::Told(node)
            | Claim::Held(node)
            | Claim::NodeSpec(node) => Some(node),
            Claim::Cluster => None,
        }
    }
}

/// All claims, searchable by overlap.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    claims: BTreeSet<(Block, Claim)>,
    /// Prefix lengths that occur: where to look for claims that are larger than a block.
    lengths: BTreeSet<(Family, u8)>,
}

impl Claims {
    /// The claims of a snapshot.
    pub fn of(snapshot: &Snapshot) -> Claims {
        let memory = snapshot.memory;
        let objects = snapshot.blocks.values().map(|b| (b.block, Claim::Object(b.node.clone())));
        let pending = memory.pending.iter().map(|(block, p)| (*block, Claim::Pending(p.node.clone())));
        let vanished = memory.vanished.iter().map(|(block, v)| (*block, Claim::Vanished(v.node.clone())));
        let largest = largest_blocks(snapshot);
        let told = memory.told(snapshot.clock).filter(|(block, _)| is_block_sized(&largest, block));
        let told = told.map(|(block, node)| (*block, Claim::Told(node.clone())));
        let held = snapshot.reports.values().flat_map(|report| {
            let blocks = report.held.iter().map(|held| held.block).filter(|b| is_block_sized(&largest, b));
            blocks.map(|block| (block, Claim::Held(report.name.clone())))
        });
        let nodes = snapshot.nodes.values();
        let in_spec = nodes
            .clone()
            .flat_map(|node| node.spec_blocks().map(|block| (block, Claim::NodeSpec(node.name.clone()))));
        let services = snapshot.foreign.services.iter().copied();
        let addresses = nodes.flat_map(|node| &node.addresses).chain(&snapshot.foreign.api_server);
        let cluster = services.chain(addresses.filter_map(of_address)).map(|block| (block, Claim::Cluster));
        // Made as a whole: thousands of single insertions take three times as long.
        let all =
            objects.chain(pending).chain(vanished).chain(told).chain(held).chain(in_spec).chain(cluster);
        let claims: BTreeSet<_> = all.collect();
        let lengths = claims.iter().map(|(block, _)| (block.family(), block.prefix_length())).collect();
        Claims { claims, lengths }
    }

    /// Adds one claim.
    pub fn add(&mut self, block: Block, claim: Claim) {
        self.lengths.insert((block.family(), block.prefix_length()));
        self.claims.insert((block, claim));
    }

    /// Every claim that shares an address with `block`.
    pub fn overlapping(&self, block: &Block) -> impl Iterator<Item = (&Block, &Claim)> {
        let block = *block;
        let covering = self
            .lengths
            .iter()
            .filter(move |(family, length)| *family == block.family() && *length < block.prefix_length())
            .filter_map(move |(_, length)| Block::of(block.network(), *length))
            .flat_map(|larger| self.from(larger).take_while(move |(other, _)| *other == larger));
        // Blocks sort by address, then by length: those inside `block` follow it without a gap.
        let inside = self.from(block).take_while(move |(other, _)| block.covers(other));
        covering.chain(inside).map(|(block, claim)| (block, claim))
    }

    fn from(&self, block: Block) -> impl Iterator<Item = &(Block, Claim)> {
        self.claims.range((block, Claim::Cluster)..)
    }

    /// All claimed blocks.
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.claims.iter().map(|(block, _)| block)
    }
}

fn of_address(address: &IpAddr) -> Option<Block> {
    Block::of(*address, Family::of(address).bits())
}

/// The shortest block prefix of each family: a report cannot claim more than one block at a stroke, or a
/// single node that lies could use up every range.
fn largest_blocks(snapshot: &Snapshot) -> BTreeMap<Family, u8> {
    let mut largest = BTreeMap::new();
    for range in snapshot.ranges.values() {
        if let (Some(block), Some(prefix)) = (range.range, range.block_prefix) {
            let shortest = largest.entry(block.family()).or_insert(prefix);
            *shortest = prefix.min(*shortest);
        }
    }
    largest
}

fn is_block_sized(largest: &BTreeMap<Family, u8>, block: &Block) -> bool {
    largest.get(&block.family()).is_none_or(|shortest| block.prefix_length() >= *shortest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_block() -> impl Strategy<Value = Block> {
        prop_oneof![
            (0u32..0x1_0000, 12u8..=32).prop_map(|(a, p)| Block::of(
                IpAddr::V4((0x0a00_0000 + a * 0x40).into()),
                p
            )
            .unwrap()),
            (0u128..0x100, 100u8..=128)
                .prop_map(|(a, p)| Block::of(IpAddr::V6((a << 10).into()), p).unwrap()),
        ]
    }

    proptest! {
        #[test]
        fn overlapping_claims_are_found_whatever_their_size(
            claimed in prop::collection::vec(any_block(), 0..30),
            asked in any_block(),
        ) {
            let mut claims = Claims::default();
            for (i, block) in claimed.iter().enumerate() {
                claims.add(*block, Claim::Held(format!("n{i}").as_str().into()));
            }
            let mut found: Vec<String> = claims.overlapping(&asked).filter_map(|(_, c)| c.node()).map(ToString::to_string).collect();
            let mut expected: Vec<String> = claimed.iter().enumerate()
                .filter(|(_, block)| block.overlaps(&asked)).map(|(i, _)| format!("n{i}")).collect();
            found.sort();
            expected.sort();
            prop_assert_eq!(found, expected);
        }
    }
}
