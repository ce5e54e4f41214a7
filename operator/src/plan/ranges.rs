//! Default ClusterCIDRs, finalizers and block sizes.

use plat_crds::cluster_cidr::BlockSizing;
use plat_crds::condition::{self, READY};
use plat_crds::{Family, names};

use super::Planner;
use crate::facts::RangeFact;
use crate::reason;
use crate::sizing::{Sizing, sizing};
use crate::snapshot::DefaultRange;
use crate::step::{Fault, Kind, ObjectKey, Step, blocks_in_words, version};

impl Planner<'_> {
    pub(super) fn manage_ranges(&mut self) {
        let snapshot = self.snapshot;
        if snapshot.settings.cleanup {
            self.release_every_range();
            return;
        }
        for default in &snapshot.settings.default_ranges {
            self.create_default(default);
        }
        for range in snapshot.ranges.values() {
            if range.deleting {
                self.release_if_empty(range);
            } else if range.problem.is_none() && !range.is_prepared() {
                self.prepare(range);
            } else if self.becomes_ready(range) {
                // `Ready=True` is written only on live LISTs of ranges and blocks: see `crate::status`.
                self.is_live();
            }
        }
    }

    fn becomes_ready(&self, range: &RangeFact) -> bool {
        let good = self.ranges.get(&range.name).is_some_and(|candidate| candidate.judgement.is_good());
        good && self.may_try(&range.name) && !condition::is_true(&range.status.conditions, READY)
    }

    /// Only while no range of that family exists. A range that cannot be read may be of any family.
    fn create_default(&mut self, default: &DefaultRange) {
        let family = default.range.family();
        let name = default_name(family);
        if let Some(existing) = self.snapshot.ranges.get(name) {
            self.name_ignored_flag(existing, default);
            return;
        }
        let mut ranges = self.snapshot.ranges.values();
        let exists = ranges.any(|range| range.range.is_none_or(|range| range.family() == family));
        if !exists && self.may_try(name) && self.is_live() {
            self.plan.steps.push(Step::CreateRange {
                name: name.into(),
                range: default.range,
                block_prefix: default.block_prefix,
                topology_key: self.snapshot.settings.topology_key.clone(),
                quarantine_seconds: self.snapshot.settings.quarantine_seconds,
            });
        }
    }

    fn name_ignored_flag(&mut self, existing: &RangeFact, default: &DefaultRange) {
        let same = existing.range == Some(default.range)
            && match (existing.block_prefix, default.block_prefix) {
                (Some(prefix), Some(wanted)) => prefix == wanted,
                (Some(_), None) => existing.block_sizing == BlockSizing::MaxPods,
                (None, _) => true,
            };
        if !same && existing.problem.is_none() {
            let blocks = blocks_in_words(default.block_prefix);
            let message = format!(
                "the operator is told to use {} with {blocks}, but ClusterCIDR {} exists and is never changed: \
                 add another ClusterCIDR, or delete this one once no node holds a block of it",
                default.range, existing.name
            );
            let object = ObjectKey::new(Kind::ClusterCIDR, &existing.name, &existing.uid);
            self.plan.faults.push(Fault { object, reason: reason::FLAG_IGNORED, message });
        }
    }

    /// Whether a write to that ClusterCIDR would be made now: a live LIST for one that has just failed would be
    /// wasted.
    fn may_try(&self, name: &str) -> bool {
        self.snapshot.memory.is_ripe(&(Kind::ClusterCIDR, name.into()), self.snapshot.clock)
    }

    fn prepare(&mut self, range: &RangeFact) {
        let block_size = match sizing(range, self.snapshot) {
            Sizing::Choose(size) => Some(size),
            Sizing::Wait { at_most, .. } => {
                at_most.into_iter().for_each(|wait| self.wake_after(wait));
                None
            }
            Sizing::Set | Sizing::Impossible(_) => None,
        };
        if range.has_our_finalizer() && block_size.is_none() {
            return;
        }
        let mut finalizers = range.finalizers.to_vec();
        if !range.has_our_finalizer() {
            finalizers.push(names::CLUSTER_CIDR_FINALIZER.to_owned());
        }
        self.plan.steps.push(Step::PrepareRange { object: version(range), finalizers, block_size });
    }

    /// The last block may have been created a moment ago: that is seen only by a live LIST, and a create
    /// whose outcome is unknown by neither.
    fn release_if_empty(&mut self, range: &RangeFact) {
        let used = self.snapshot.blocks.values().any(|block| block.range == range.name)
            || self.snapshot.memory.pending.values().any(|pending| pending.range == range.name);
        if range.has_our_finalizer() && !used && self.may_try(&range.name) && self.is_live() {
            self.release(range);
        }
    }

    fn release_every_range(&mut self) {
        for range in self.snapshot.ranges.values().filter(|range| range.has_our_finalizer()) {
            self.release(range);
        }
    }

    fn release(&mut self, range: &RangeFact) {
        let others = range.finalizers.iter().filter(|f| *f != names::CLUSTER_CIDR_FINALIZER);
        let finalizers = others.cloned().collect();
        self.plan.steps.push(Step::ReleaseRange { object: version(range), finalizers });
    }
}

/// The name of the default ClusterCIDR of a family.
pub(crate) fn default_name(family: Family) -> &'static str {
    match family {
        Family::IPv4 => names::DEFAULT_CLUSTER_CIDR_V4,
        Family::IPv6 => names::DEFAULT_CLUSTER_CIDR_V6,
    }
}
