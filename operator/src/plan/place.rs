//! Nodes without a block of some family: give back what they hold, else what `node.spec.podCIDRs` says,
//! else carve. All of the first two go before any carving, and nodes without a block before those that need
//! one more ([`super::grow`]).

use std::cmp::Reverse;

use plat_crds::{Block, Family};

use super::grow::MAX_PER_FAMILY;
use super::{Candidate, Planner};
use crate::carriers::knows_every_range;
use crate::claims::Claim;
use crate::facts::{Health, Name, NodeFact};
use crate::ranges::{Standing, stands};
use crate::reason;
use crate::snapshot::IpamSource;
use crate::step::{NewBlock, Origin, Step};

/// Blocks that are carved in one pass; the next follows at once. So thousands of nodes that come together do
/// not take thousands of times the memory of one.
const CARVED_PER_PASS: usize = 1000;

/// How strong a claim is. A node gets a block by a claim of its own if no other node has a stronger one on
/// any address of it, nor an equal one and is older.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Strength {
    /// `node.spec.podCIDRs`.
    NodeSpec,
    /// Other nodes tell that its PodCIDR was lost.
    Told,
    /// The node reports that it holds it.
    Held,
    /// This leader has seen its PodCIDR vanish.
    Vanished,
    /// It is there, may be there, or belongs to the cluster.
    Fixed,
}

fn strength(claim: &Claim) -> Strength {
    match claim {
        Claim::NodeSpec(_) => Strength::NodeSpec,
        Claim::Told(_) => Strength::Told,
        Claim::Held(_) => Strength::Held,
        Claim::Vanished(_) => Strength::Vanished,
        Claim::Object(_) | Claim::Pending(_) | Claim::Cluster => Strength::Fixed,
    }
}

impl<'a> Planner<'a> {
    pub(super) fn place_nodes(&mut self) {
        let mut nodes: Vec<&NodeFact> =
            self.snapshot.nodes.values().map(|node| &**node).filter(|node| node.problem.is_none()).collect();
        nodes.sort_by_cached_key(|node| age(node));
        let lacking: Vec<(&NodeFact, Family)> = nodes.iter().flat_map(|node| self.lacking(node)).collect();
        let lacking: Vec<_> =
            lacking.into_iter().filter(|(node, family)| !self.give_back(node, *family)).collect();
        let lacking: Vec<_> =
            lacking.into_iter().filter(|(node, family)| !self.adopt(node, *family)).collect();
        nodes.iter().for_each(|node| self.give_back_further(node));
        let mut growing: Vec<_> = Vec::new();
        for node in &nodes {
            let needs = self.growing(node).into_iter().map(|(family, kept)| (*node, family, kept));
            growing.extend(needs.filter(|(node, family, _)| !self.repeat_pending(node, *family)));
        }
        // What is lacking then is named in `source`.
        if self.snapshot.settings.ipam_source == IpamSource::Node {
            growing
                .into_iter()
                .for_each(|(node, family, kept)| self.refuse(node, family, by_source(node, family, kept)));
            return;
        }
        let lacking = lacking.into_iter().map(|(node, family)| (node, family, 0));
        let needs: Vec<_> = lacking.chain(growing).collect();
        if needs.is_empty() || self.must_hear_nodes_first() || self.must_wait_for_the_lost(&needs) {
            return;
        }
        // Who gets none does not count, or the oldest nodes could keep all others from their blocks for ever.
        let mut carved = 0;
        for (node, family, kept) in needs {
            carved += usize::from(self.carve(node, family, kept));
            if carved == CARVED_PER_PASS {
                self.carving_goes_on = true;
                break;
            }
        }
    }

    /// The families that a node lacks a block of.
    fn lacking<'n>(&mut self, node: &'n NodeFact) -> Vec<(&'n NodeFact, Family)> {
        let families = self.families_of(node);
        let lacking: Vec<_> = families
            .iter()
            .filter(|family| self.lacks(node, **family))
            .map(|family| (node, *family))
            .collect();
        // A default range that is about to be created may well select it.
        let range_comes =
            self.plan.wants_live || matches!(self.plan.steps.first(), Some(Step::CreateRange { .. }));
        if families.is_empty() && !range_comes {
            let message =
                format!("no ClusterCIDR selects node {}: label it, or add a ClusterCIDR for it", node.name);
            self.fault(node, reason::NO_RANGE, message);
        }
        if families.is_empty() || !lacking.is_empty() {
            self.plan.nodes_without_block += 1;
        }
        lacking
    }

    /// Repeats a create whose outcome is unknown (the same block: the name is a lock on it; if somebody has
    /// claimed it since, the node waits until the create is read back or can have no effect any more).
    fn repeat_pending(&mut self, node: &NodeFact, family: Family) -> bool {
        let pending = self.snapshot.memory.pending.iter();
        let mut pending =
            pending.filter(|(block, pending)| block.family() == family && pending.node == node.name);
        if let Some((block, pending)) = pending.next() {
            let range_lives = self.snapshot.ranges.get(&pending.range).is_some_and(|range| !range.deleting);
            let undisputed =
                self.claims.overlapping(block).all(|(_, claim)| claim.node() == Some(&node.name));
            if range_lives && undisputed {
                self.create(node, *block, pending.range.clone(), Origin::Carved);
            }
            return true;
        }
        false
    }

    /// Repeats a create, or re-creates the lost PodCIDR of a block that the node holds.
    fn give_back(&mut self, node: &NodeFact, family: Family) -> bool {
        self.repeat_pending(node, family)
            || self.held(node, family).into_iter().any(|(block, claim)| self.recreate(node, block, claim))
    }

    /// Re-creates the lost PodCIDRs of a node that has another block: of those that it has leases in.
    fn give_back_further(&mut self, node: &NodeFact) {
        let snapshot = self.snapshot;
        let Some(report) = snapshot.reports.get(&node.name) else { return };
        for held in &report.held {
            // A node that cannot tell may go on naming a block that it had given back.
            let leased = held.used.map_or_else(|| self.saw_it_lost(node, &held.block), |used| used > 0);
            let known = || self.own_blocks(node).iter().any(|own| own.block == held.block);
            if leased && !known() && self.holding(node, held.block.family()).in_use() < MAX_PER_FAMILY {
                self.recreate(node, held.block, Strength::Held);
            }
        }
    }

    fn recreate(&mut self, node: &NodeFact, block: Block, claim: Strength) -> bool {
        // A node that alone tells of a block may take others' addresses for pods'; users reserve what is others'.
        let is_doubtful = claim == Strength::Held && !self.saw_it_lost(node, &block);
        let range = self.ranges.values().find(|range| {
            range.judgement.is_good()
                && range.fact.is_prepared()
                && range.pool.index(&block).is_some()
                && !(is_doubtful && range.is_reserved(&block))
        });
        let Some(range) = range.map(|range| range.fact.name.clone()) else { return false };
        let best = self.has_best_claim(node, &block, claim);
        if best {
            self.create(node, block, range, Origin::Recreated);
        }
        best
    }

    /// Whether this leader has seen the node's PodCIDR of that block vanish.
    fn saw_it_lost(&self, node: &NodeFact, block: &Block) -> bool {
        self.snapshot.memory.vanished.get(block).is_some_and(|lost| lost.node == node.name)
    }

    /// Blocks that the node holds without a PodCIDR, the likeliest first: one whose loss this leader saw, one
    /// that it reports itself, one that others tell of; of several, one that its Node names, then the one with
    /// most leases.
    fn held(&self, node: &NodeFact, family: Family) -> Vec<(Block, Strength)> {
        let vanished = self.vanished_of.get(&*node.name).into_iter().flatten();
        let mut held: Vec<_> = vanished.map(|block| (*block, Strength::Vanished, 0)).collect();
        if let Some(report) = self.snapshot.reports.get(&node.name) {
            held.extend(report.held.iter().map(|held| (held.block, Strength::Held, held.used.unwrap_or(1))));
        }
        let told = self.told_of.get(&*node.name).into_iter().flatten();
        held.extend(told.map(|block| (*block, Strength::Told, 0)));
        held.retain(|(block, ..)| block.family() == family);
        held.sort_by_key(|(block, claim, used)| {
            let named = node.spec_blocks().any(|spec| spec == *block);
            (Reverse(*claim), !named, Reverse(*used), *block)
        });
        held.into_iter().map(|(block, claim, _)| (block, claim)).collect()
    }

    /// Whether the node has no block of a family, or not the one that its spec must be followed in.
    fn lacks(&self, node: &NodeFact, family: Family) -> bool {
        self.held_block(node, family).is_none_or(|own| {
            let mut named = node.spec_blocks().filter(|block| block.family() == family).peekable();
            self.snapshot.settings.ipam_source == IpamSource::Node
                && named.peek().is_some()
                && !named.any(|block| block == own.block)
        })
    }

    fn adopt(&mut self, node: &NodeFact, family: Family) -> bool {
        if self.snapshot.settings.ipam_source == IpamSource::Ignore {
            return false;
        }
        for block in node.spec_blocks().filter(|block| block.family() == family) {
            let fits = |range: &&Candidate| {
                range.selects(node, family)
                    && range.allocates()
                    && range.pool.index(&block).is_some()
                    && !range.is_reserved(&block)
            };
            let Some(range) = self.ranges.values().find(fits).map(|range| range.fact) else { continue };
            if !self.has_best_claim(node, &block, Strength::NodeSpec) {
                continue;
            }
            match stands(range, self.snapshot) {
                Standing::Stands => self.create(node, block, range.name.clone(), Origin::Adopted),
                Standing::Wait(wait) => self.wake_after(wait),
                Standing::NotWritten => {}
            }
            // It will be adopted, now or soon: nothing else is carved for the node meanwhile.
            return true;
        }
        false
    }

    fn has_best_claim(&self, node: &NodeFact, block: &Block, own: Strength) -> bool {
        self.claims.overlapping(block).all(|(_, claim)| match claim.node() {
            Some(other) if *other == node.name => strength(claim) < Strength::Fixed,
            Some(other) => strength(claim) < own || (strength(claim) == own && !self.is_older(other, node)),
            None => false,
        })
    }

    /// Whether the node of that name exists and is older than `node`.
    fn is_older(&self, other: &Name, node: &NodeFact) -> bool {
        self.snapshot.nodes.get(other).is_none_or(|other| age(other) < age(node))
    }

    /// Carves a block for a node that keeps so many already, if there is one for it.
    fn carve(&mut self, node: &NodeFact, family: Family, kept: usize) -> bool {
        // What would not be sent now is not carved: it would only move the cursor.
        if !self.snapshot.memory.is_ripe(&NewBlock::retry_key(&node.name, family), self.snapshot.clock) {
            return false;
        }
        let ranges = self.choices(node, family);
        let mut waits = false;
        let (mut chosen, mut wait_for) = (None, None);
        for range in ranges.iter().filter(|range| range.allocates() && kept < range.fact.max_blocks()) {
            match range.standing_for(node, self.snapshot) {
                Standing::Stands => {
                    chosen = range.pool.next_free(range.cursor).map(|_| range.fact.name.clone());
                }
                Standing::Wait(wait) => {
                    wait_for = Some(wait);
                    waits = true;
                }
                Standing::NotWritten => waits = true,
            }
            if chosen.is_some() || waits {
                // A range of higher priority that is about to be ready is worth the wait.
                break;
            }
        }
        let Some(range) = chosen else {
            if let Some(wait) = wait_for {
                self.wake_after(wait);
            } else if !waits {
                let why = why_not(node, family, kept, &ranges);
                self.refuse(node, family, why);
            }
            return false;
        };
        self.carve_from(node, range);
        true
    }

    fn refuse(&mut self, node: &NodeFact, family: Family, (reason, message): (&'static str, String)) {
        self.refused.insert((node.name.clone(), family), (reason, message.clone()));
        self.fault(node, reason, message);
    }

    fn carve_from(&mut self, node: &NodeFact, range: Name) {
        let Some(candidate) = self.ranges.get_mut(&range) else { return };
        let Some(index) = candidate.next_for(node) else { return };
        let Some(block) = candidate.pool.block(index) else { return };
        candidate.cursor = (index + 1) % candidate.pool.total();
        self.plan.cursors.insert(candidate.fact.uid.clone(), candidate.cursor);
        if let Some(key) = candidate.fact.topology_key.as_deref() {
            let group = (candidate.fact.uid.clone(), node.labels.get(key).map(Into::into));
            self.plan.group_cursors.insert(group, index + 1);
        }
        self.create(node, block, range, Origin::Carved);
    }

    fn create(&mut self, node: &NodeFact, block: Block, range: Name, origin: Origin) {
        for candidate in self.ranges.values_mut() {
            candidate.take(&block, node);
        }
        self.claims.add(block, Claim::Pending(node.name.clone()));
        let labels = self.labels(&range, node);
        let addresses = node.addresses.to_vec();
        let (node, node_uid) = (node.name.clone(), node.uid.clone());
        self.plan.steps.push(Step::CreateBlock(NewBlock {
            block,
            range,
            node,
            node_uid,
            addresses,
            labels,
            origin,
        }));
    }

    /// A new leader on a cluster with a history gives agents the time to say what they hold and what was lost
    /// before it carves anything. Their reports of before do not count: if etcd was put back to a backup, so
    /// were they. On a fresh cluster every report is new, so the last Ready node's that was made with the ranges in
    /// view ends the wait.
    fn must_hear_nodes_first(&mut self) -> bool {
        let (tenure, wait) = (self.snapshot.tenure, self.snapshot.settings.report_wait);
        let told = |node: &NodeFact| {
            let report = self.snapshot.reports.get(&node.name).filter(|report| report.reported);
            report.is_some_and(|report| knows_every_range(report, self.snapshot))
        };
        let silent = |node: &NodeFact| node.health == Health::Ready && !told(node);
        let heard =
            || self.snapshot.memory.fresh_cluster && !self.snapshot.nodes.values().any(|node| silent(node));
        if tenure.held_for >= wait || heard() {
            return false;
        }
        self.wake_after(wait - tenure.held_for);
        true
    }

    /// While an agent misses more blocks than it can name, any block may be one of them.
    fn must_wait_for_the_lost(&mut self, needs: &[(&NodeFact, Family, usize)]) -> bool {
        let now = self.snapshot.clock.steady;
        let Some(until) = self.snapshot.memory.untold.filter(|until| *until > now) else { return false };
        let seconds = (until - now).as_secs();
        for (node, family, _) in needs {
            let message = format!(
                "node {} gets no {family} block yet: more PodCIDRs were lost than agents can name (etcd put back to a backup?), and any block may be one of them; carving goes on once they are back, at the latest in {seconds} s",
                node.name
            );
            self.fault(node, reason::BLOCKS_LOST, message);
        }
        true
    }
}

/// Nodes are served oldest first.
fn age(node: &NodeFact) -> (k8s_openapi::jiff::Timestamp, Name) {
    (node.created, node.name.clone())
}

/// What a node that keeps so many blocks does not get.
fn gets_none(node: &NodeFact, family: Family, kept: usize) -> String {
    match kept {
        0 => format!("node {} gets no {family} block", node.name),
        1 => format!("node {} gets no second {family} block", node.name),
        _ => format!("node {} gets no {family} block beside its {kept}", node.name),
    }
}

/// Why a node whose blocks are what its Node names gets no other.
fn by_source(node: &NodeFact, family: Family, kept: usize) -> (&'static str, String) {
    let message = format!(
        "{}: with ipam.source: node its blocks are those that its spec.podCIDRs names, one of each family; use ipam.source: wish, or larger node CIDRs in kube-controller-manager",
        gets_none(node, family, kept)
    );
    (reason::BLOCKS_PER_NODE_REACHED, message)
}

/// Why no range has a block for a node that keeps so many already.
fn why_not(node: &NodeFact, family: Family, kept: usize, ranges: &[&Candidate]) -> (&'static str, String) {
    let names = |ranges: &[&&Candidate]| {
        ranges.iter().map(|r| r.fact.name.to_string()).collect::<Vec<_>>().join(", ")
    };
    let gets = gets_none(node, family, kept);
    let allocating = ranges.iter().filter(|range| range.allocates());
    let (full, reached): (Vec<_>, Vec<_>) = allocating.partition(|range| kept < range.fact.max_blocks());
    if !full.is_empty() {
        let message = format!(
            "{gets}: every block of ClusterCIDR {} is held, quarantined or reserved; add a ClusterCIDR",
            names(&full)
        );
        return (reason::RANGE_EXHAUSTED, message);
    }
    if !reached.is_empty() {
        let message = format!(
            "{gets}: it is almost full, and blocksPerNode.max of ClusterCIDR {} allows no more; raise that, or run fewer pods on it",
            names(&reached)
        );
        return (reason::BLOCKS_PER_NODE_REACHED, message);
    }
    let refused = ranges.iter().map(|range| {
        format!("{} ({}: {})", range.fact.name, range.judgement.ready.reason, range.judgement.ready.message)
    });
    let refused = match ranges.is_empty() {
        true => "no ClusterCIDR of that family selects it; add one".to_owned(),
        false => {
            format!("no new ones are carved from ClusterCIDR {}", refused.collect::<Vec<_>>().join(", "))
        }
    };
    (reason::RANGE_NOT_READY, format!("{gets}: {refused}"))
}
