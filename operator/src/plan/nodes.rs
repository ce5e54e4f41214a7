//! What is done for each node besides its blocks, and what is said of it.

use std::time::Duration;

use plat_crds::condition::READY;
use plat_crds::{Block, Family};

use super::Planner;
use crate::claims::Claim;
use crate::facts::{BlockFact, NodeFact, PodCidrText, ReportFact};
use crate::ranges::quarantine_over;
use crate::reason;
use crate::snapshot::IpamSource;
use crate::status::was_moved;
use crate::step::Step;

/// NodeNetworks created in one pass. Each of them shows up in the watch and so brings about the next pass.
const REPORTS_PER_PASS: usize = 200;
/// The same beside ranges and blocks to create: where thousands of nodes join at once, those go first.
const REPORTS_BESIDE_BLOCKS: usize = 10;
/// Blocks mirrored into Nodes in one pass; the next follows at once. A node that joins meanwhile waits for the end of
/// the pass.
const MIRRORS_PER_PASS: usize = 500;

impl<'a> Planner<'a> {
    pub(super) fn serve_nodes(&mut self) {
        let snapshot = self.snapshot;
        let missing = snapshot.nodes.keys().filter(|name| !snapshot.reports.contains_key(*name));
        let is_urgent = |step: &Step| matches!(step, Step::CreateBlock(_) | Step::CreateRange { .. });
        let urgent = self.plan.wants_live || self.plan.steps.iter().any(is_urgent);
        let most = if urgent { REPORTS_BESIDE_BLOCKS } else { REPORTS_PER_PASS };
        let creates = missing.take(most).map(|node| Step::CreateReport { node: node.clone() });
        self.plan.steps.extend(creates);
        // Nodes wait for their blocks, and nobody so urgently for the mirror.
        let mut mirrors = if self.carving_goes_on { 0 } else { MIRRORS_PER_PASS };
        for node in snapshot.nodes.values().filter(|node| node.problem.is_none()) {
            self.name_node_faults(node);
            let (blocks, lacking) = self.primary_blocks(node);
            if blocks.is_empty() {
                continue;
            }
            match lacking.is_empty().then(|| self.mirror(node, &blocks)).flatten() {
                Some(step) if mirrors > 0 => {
                    mirrors -= 1;
                    self.plan.steps.push(step);
                }
                Some(_) => self.wake_after(Duration::ZERO),
                None => {}
            }
            // A family that has run out does not hold back the other.
            if lacking.iter().all(|family| self.refused.contains_key(&(node.name.clone(), *family))) {
                self.clear_network_unavailable(node, &blocks);
            }
        }
        self.delete_stale_reports();
    }

    /// The node's blocks, one of each family, the primary family first; and the families that it has none of.
    fn primary_blocks(&self, node: &NodeFact) -> (Vec<&'a BlockFact>, Vec<Family>) {
        let mut families = self.families_of(node);
        let primary = node.addresses.first().map(Family::of);
        families.sort_by_key(|family| Some(*family) != primary);
        let (mut blocks, mut lacking) = (Vec::new(), Vec::new());
        for family in families {
            let block = self.held_block(node, family);
            match block.filter(|block| block.problem.is_none() && !block.is_quarantined()) {
                Some(block) => blocks.push(block),
                None => lacking.push(family),
            }
        }
        (blocks, lacking)
    }

    /// `node.spec.podCIDRs` can be written once only: all families together, and in the right order.
    fn mirror(&self, node: &NodeFact, blocks: &[&BlockFact]) -> Option<Step> {
        let order_known = blocks.len() == 1 || !node.addresses.is_empty();
        let settings = self.snapshot.settings;
        // Where the field is the source, writing it is its source's.
        let mirrors = settings.node_spec_mirror && settings.ipam_source != IpamSource::Node;
        if !mirrors || !node.pod_cidrs.is_empty() || !order_known {
            return None;
        }
        let pod_cidrs = blocks.iter().map(|block| block.block).collect();
        let step = Step::MirrorToNode { node: node.name.clone(), uid: node.uid.clone(), pod_cidrs };
        // What would not be sent now must not take the place of another.
        self.snapshot.memory.is_ripe(&step.retry_key(), self.snapshot.clock).then_some(step)
    }

    fn clear_network_unavailable(&mut self, node: &NodeFact, blocks: &[&BlockFact]) {
        let is_ready = |block: &&BlockFact| block.condition(READY).is_some_and(|c| c.is_true());
        if node.network_unavailable && blocks.iter().all(is_ready) {
            self.plan.steps.push(Step::ClearNetworkUnavailable {
                node: node.name.clone(),
                uid: node.uid.clone(),
                blocks: blocks.iter().map(|block| block.block).collect(),
                at: self.snapshot.clock.wall,
            });
        }
    }

    /// A report stays as long as its node or a block of its node does; and if it says that blocks are held,
    /// for a quarantine after the node went, in case their PodCIDRs were lost.
    fn delete_stale_reports(&mut self) {
        let snapshot = self.snapshot;
        for report in snapshot.reports.values() {
            let name = &report.name;
            let needed = snapshot.nodes.contains_key(name)
                || self.blocks_of.contains_key(&**name)
                || self.vanished_of.contains_key(&**name)
                || snapshot.memory.pending.values().any(|pending| pending.node == *name);
            if needed {
                continue;
            }
            let rest = self.rest_of_claims(report);
            if rest.is_zero() {
                self.plan.steps.push(Step::DeleteReport { node: name.clone(), uid: report.uid.clone() });
            } else {
                self.wake_after(rest);
            }
        }
    }

    /// For how long the claims of a gone node's report still count.
    fn rest_of_claims(&self, report: &ReportFact) -> Duration {
        let clock = self.snapshot.clock;
        let since = self.snapshot.memory.orphaned.get(&report.name).copied().unwrap_or(clock.steady);
        let quarantines = report.held.iter().map(|held| quarantine_over(&self.snapshot.ranges, &held.block));
        (since + quarantines.max().unwrap_or_default()).saturating_sub(clock.steady)
    }

    fn name_node_faults(&mut self, node: &NodeFact) {
        if node.addresses.is_empty() {
            let message = format!(
                "node {} has no InternalIP, so no other node can route to its pods: set the kubelet's --node-ip, or wait for the cloud controller",
                node.name
            );
            self.fault(node, reason::NO_ADDRESS, message);
        }
        if self.snapshot.settings.ipam_source == IpamSource::Node {
            self.name_source_faults(node);
        }
        for text in &node.pod_cidrs {
            match text {
                _ if self.snapshot.settings.ipam_source == IpamSource::Ignore => {}
                PodCidrText::Invalid(text) => {
                    let message = format!(
                        "node {} has '{text}' in spec.podCIDRs, which is not a CIDR; {CURE}",
                        node.name
                    );
                    self.fault(node, reason::FOREIGN_POD_CIDR, message);
                }
                PodCidrText::Block(_) if self.snapshot.settings.ipam_source == IpamSource::Node => {}
                PodCidrText::Block(block) => self.name_pod_cidr_fault(node, block),
            }
        }
        self.name_held_faults(node);
    }

    /// Names a `spec.podCIDRs` entry that is not one of the node's blocks. Before the node has a block of
    /// that family it may still be adopted.
    fn name_pod_cidr_fault(&mut self, node: &NodeFact, block: &Block) {
        let own = self.held_block(node, block.family());
        if self.own_blocks(node).iter().any(|own| own.block == *block) || own.is_some_and(was_moved) {
            return;
        }
        if let Some((taken, other)) = self.other_owner(node, block) {
            let message = format!(
                "node {} has {block} in spec.podCIDRs, but node {other} holds {taken}; {CURE}",
                node.name
            );
            self.fault(node, reason::POD_CIDR_TAKEN, message);
        } else if let Some(own) = own {
            let own = own.block;
            let message = format!(
                "node {} has {block} in spec.podCIDRs, which no ClusterCIDR could give it; it holds {own}, and {block} is used by nobody; {CURE}",
                node.name
            );
            self.fault(node, reason::FOREIGN_POD_CIDR, message);
        } else if !self.families_of(node).contains(&block.family()) {
            let message = format!(
                "node {} has {block} in spec.podCIDRs, but no {} ClusterCIDR selects it; {CURE}",
                node.name,
                block.family()
            );
            self.fault(node, reason::FOREIGN_POD_CIDR, message);
        }
    }

    fn name_held_faults(&mut self, node: &NodeFact) {
        let Some(report) = self.snapshot.reports.get(&node.name) else { return };
        for held in &report.held {
            if let Some((taken, other)) = self.other_owner(node, &held.block) {
                let message = format!(
                    "node {} has leases in {}, but node {other} holds {taken}: drain node {} so that its pods get other addresses",
                    node.name, held.block, node.name
                );
                self.fault(node, reason::HELD_BLOCK_TAKEN, message);
            }
        }
    }

    /// Another node's PodCIDR that overlaps `block`.
    fn other_owner(&self, node: &NodeFact, block: &Block) -> Option<(Block, String)> {
        self.claims.overlapping(block).find_map(|(taken, claim)| match claim {
            Claim::Object(other) if *other != node.name => Some((*taken, other.to_string())),
            _ => None,
        })
    }
}

/// `spec.podCIDRs` is write-once.
pub(super) const CURE: &str = "the field cannot be changed: if it matters (cloud routes, kube-proxy's NodeCIDR mode), delete the Node object and let its kubelet register again";
