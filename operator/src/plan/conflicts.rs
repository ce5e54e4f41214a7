//! What contradicts itself: ranges that are deleted in use, PodCIDRs that the operator cannot have made, and
//! addresses that two nodes have. It is
//! named, and otherwise left alone: whoever made it knows what it is for, and pods may run on it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::Planner;
use crate::facts::{BlockFact, Name, NodeFact};
use crate::reason;
use crate::step::{Fault, Kind, ObjectKey};

impl Planner<'_> {
    pub(super) fn name_conflicts(&mut self) {
        self.name_kept_ranges();
        self.name_foreign_blocks();
        self.name_shared_addresses();
    }

    /// Deleted ranges that PodCIDRs keep.
    fn name_kept_ranges(&mut self) {
        let is_used = |name: &Name| self.snapshot.blocks.values().any(|block| block.range == *name);
        let kept = self.ranges.values().filter(|range| range.fact.deleting && is_used(&range.fact.name));
        let kept = kept.map(|range| Fault {
            object: ObjectKey::new(Kind::ClusterCIDR, &range.fact.name, &range.fact.uid),
            reason: reason::TERMINATING,
            message: format!("ClusterCIDR {}: {}", range.fact.name, range.judgement.ready.message),
        });
        self.plan.faults.extend(kept.collect::<Vec<_>>());
    }

    fn name_foreign_blocks(&mut self) {
        let mut faults = Vec::new();
        for block in self.snapshot.blocks.values().filter(|block| block.problem.is_none()) {
            let mut name = |reason, message| {
                let object = ObjectKey::new(Kind::PodCIDR, &block.name, &block.uid);
                faults.push(Fault { object, reason, message });
            };
            if let Some(why) = self.why_foreign(block) {
                let message = format!(
                    "PodCIDR {} of node {} was not made by the operator: {why}; delete it, and the node gets another block: \
                     first drain the node if pods have addresses of it",
                    block.name, block.node
                );
                name(reason::FOREIGN_BLOCK, message);
            }
            if let Some(other) = self.older_overlap(block) {
                let message = format!(
                    "PodCIDR {} of node {} shares addresses with the older PodCIDR {} of node {}: delete the one that no pods use, \
                     or drain node {} and delete {}",
                    block.name, block.node, other.name, other.node, block.node, block.name
                );
                name(reason::BLOCKS_OVERLAP, message);
            }
        }
        self.plan.faults.append(&mut faults);
    }

    /// Why the operator cannot have carved that block.
    fn why_foreign(&self, block: &BlockFact) -> Option<String> {
        let Some(range) = self.ranges.get(&block.range) else {
            return Some(format!("there is no ClusterCIDR {}", block.range));
        };
        let (Some(cidr), Some(prefix)) = (range.fact.range, range.fact.block_prefix) else { return None };
        if !cidr.covers(&block.block) {
            return Some(format!("it does not lie in ClusterCIDR {} ({cidr})", block.range));
        }
        let wrong_size = block.block.prefix_length() != prefix;
        wrong_size.then(|| format!("blocks of ClusterCIDR {} are /{prefix}", block.range))
    }

    /// An older PodCIDR that shares addresses with `block`: agents programme the older of the two.
    fn older_overlap(&self, block: &BlockFact) -> Option<&BlockFact> {
        let age = |block: &BlockFact| (block.created, block.block);
        let others = self.claims.overlapping(&block.block).filter(|(other, _)| **other != block.block);
        let others = others.filter_map(|(other, _)| self.snapshot.blocks.get(other.object_name().as_str()));
        others.map(|other| &**other).find(|other| age(other) < age(block))
    }

    fn name_shared_addresses(&mut self) {
        let snapshot = self.snapshot;
        let mut nodes_of: BTreeMap<IpAddr, Vec<&NodeFact>> = BTreeMap::new();
        for node in snapshot.nodes.values() {
            for address in &node.addresses {
                nodes_of.entry(*address).or_default().push(node);
            }
        }
        for (address, nodes) in nodes_of.iter().filter(|(_, nodes)| nodes.len() > 1) {
            for node in nodes {
                let others = nodes.iter().filter(|other| other.name != node.name);
                let others: Vec<&str> = others.map(|other| &*other.name).take(3).collect();
                if others.is_empty() {
                    continue;
                }
                let message = format!(
                    "node {} has the InternalIP {address}, and so has node {}: pods of only one of them can be reached; \
                     correct the kubelet's --node-ip, or delete the Node that is no more",
                    node.name,
                    others.join(", ")
                );
                self.fault(node, reason::ADDRESS_SHARED, message);
            }
        }
    }
}
