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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
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
    /// Services, the API server, a node's own address.
    Cluster,
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
    by_block: BTreeMap<Block, Vec<Claim>>,
    /// Prefix lengths that occur: where to look for claims that are larger than a block.
    lengths: BTreeSet<(Family, u8)>,
}

impl Claims {
    /// The claims of a snapshot.
    pub fn of(snapshot: &Snapshot) -> Claims {
        let mut claims = Claims::default();
        for block in snapshot.blocks.values() {
            claims.add(block.block, Claim::Object(block.node.clone()));
        }
        for (block, pending) in &snapshot.memory.pending {
            claims.add(*block, Claim::Pending(pending.node.clone()));
        }
        for (block, vanished) in &snapshot.memory.vanished {
            claims.add(*block, Claim::Vanished(vanished.node.clone()));
        }
        let largest = largest_blocks(snapshot);
        let told = snapshot.memory.told(snapshot.clock);
        for (block, node) in told.filter(|(block, _)| is_block_sized(&largest, block)) {
            claims.add(*block, Claim::Told(node.clone()));
        }
        for report in snapshot.reports.values() {
            for held in report.held.iter().filter(|held| is_block_sized(&largest, &held.block)) {
                claims.add(held.block, Claim::Held(report.name.clone()));
            }
        }
        for node in snapshot.nodes.values() {
            for block in node.spec_blocks() {
                claims.add(block, Claim::NodeSpec(node.name.clone()));
            }
            for address in &node.addresses {
                claims.add_address(*address);
            }
        }
        for services in &snapshot.foreign.services {
            claims.add(*services, Claim::Cluster);
        }
        for address in &snapshot.foreign.api_server {
            claims.add_address(*address);
        }
        claims
    }

    /// Adds one claim.
    pub fn add(&mut self, block: Block, claim: Claim) {
        self.lengths.insert((block.family(), block.prefix_length()));
        self.by_block.entry(block).or_default().push(claim);
    }

    fn add_address(&mut self, address: IpAddr) {
        if let Some(block) = Block::of(address, Family::of(&address).bits()) {
            self.add(block, Claim::Cluster);
        }
    }

    /// Every claim that shares an address with `block`.
    pub fn overlapping(&self, block: &Block) -> impl Iterator<Item = (&Block, &Claim)> {
        let block = *block;
        let covering = self
            .lengths
            .iter()
            .filter(move |(family, length)| *family == block.family() && *length < block.prefix_length())
            .filter_map(move |(_, length)| {
                self.by_block.get_key_value(&Block::of(block.network(), *length)?)
            });
        // Blocks sort by address, then by length: those inside `block` follow it without a gap.
        let inside = self.by_block.range(block..).take_while(move |(other, _)| block.covers(other));
        covering.chain(inside).flat_map(|(block, claims)| claims.iter().map(move |claim| (block, claim)))
    }

    /// All claimed blocks.
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.by_block.keys()
    }
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
