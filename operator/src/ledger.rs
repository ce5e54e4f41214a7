//! Which nodes carry which objects: the operator's side of [`plat_crds::digest`]. Pure.
//!
//! An agent reports one sum over the objects whose effect is in its kernel. The ledger keeps the same sum
//! over all PodCIDRs and ClusterCIDRs and a ring of the recent ones, each with a number. A report that
//! equals sum number 7 proves that its node carries every object which entered by then and still exists; an
//! unknown sum proves nothing. So a block converges while the cluster goes on changing, and a node that is
//! one change behind does not unsettle every block.

use std::collections::{HashMap, VecDeque};

use plat_crds::digest::Digest;

use crate::facts::{BlockFact, Name, RangeFact};
use crate::snapshot::Facts;

/// Recent sums that are remembered. With more changes than this between two reports of a node, that node
/// catches up at its first report after the changes end.
const RING: usize = 256;

/// Sums and when each object entered them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    sum: Digest,
    number: u64,
    ring: VecDeque<(Digest, u64)>,
    /// Object uid → generation and the number of the first sum with that generation in it.
    entered: HashMap<Name, (i64, u64)>,
}

impl Ledger {
    /// Brings the ledger up to date with the objects that exist.
    pub fn update(&mut self, ranges: &Facts<RangeFact>, blocks: &Facts<BlockFact>) {
        let blocks = blocks.values().map(|b| (&b.uid, b.generation));
        let ranges = ranges.values().map(|r| (&r.uid, r.generation));
        self.record(blocks.chain(ranges));
    }

    fn record<'a>(&mut self, objects: impl Iterator<Item = (&'a Name, i64)> + Clone) {
        let sum = Digest::of(objects.clone().map(|(uid, generation)| (&**uid, generation)));
        if sum == self.sum && !self.ring.is_empty() {
            return;
        }
        let next = self.number + 1;
        let mut entered = HashMap::with_capacity(self.entered.len() + 1);
        for (uid, generation) in objects {
            let since = match self.entered.get(uid) {
                Some((known, since)) if *known == generation => *since,
                _ => next,
            };
            entered.insert(uid.clone(), (generation, since));
        }
        (self.sum, self.number, self.entered) = (sum, next, entered);
        self.ring.push_back((sum, next));
        if self.ring.len() > RING {
            self.ring.pop_front();
        }
    }

    /// The number of the newest sum that equals a report's; `None` if it is unknown.
    pub fn number_of(&self, reported: Digest) -> Option<u64> {
        self.ring.iter().rev().find(|(sum, _)| *sum == reported).map(|(_, number)| *number)
    }

    /// The number of the first sum that has the object in its present generation.
    pub fn entered(&self, uid: &str) -> Option<u64> {
        self.entered.get(uid).map(|(_, since)| *since)
    }

    /// Whether a node that reported sum number `reported` carries the object in its present generation.
    pub fn carries(&self, reported: Option<u64>, uid: &str) -> bool {
        matches!((reported, self.entered(uid)), (Some(reported), Some(since)) if reported >= since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(ledger: &mut Ledger, objects: &[(&str, i64)]) -> Digest {
        let named: Vec<(Name, i64)> = objects.iter().map(|(uid, g)| ((*uid).into(), *g)).collect();
        ledger.record(named.iter().map(|(uid, g)| (uid, *g)));
        Digest::of(objects.iter().copied())
    }

    #[test]
    fn an_older_report_proves_what_was_there_then() {
        let mut ledger = Ledger::default();
        let first = record(&mut ledger, &[("a", 1), ("b", 1)]);
        let second = record(&mut ledger, &[("a", 1), ("b", 2), ("c", 1)]);
        let (then, now) = (ledger.number_of(first), ledger.number_of(second));
        assert!(ledger.carries(then, "a"), "unchanged since");
        assert!(!ledger.carries(then, "b"), "changed since");
        assert!(!ledger.carries(then, "c"), "new since");
        assert!(["a", "b", "c"].iter().all(|uid| ledger.carries(now, uid)));
        assert!(!ledger.carries(now, "gone"));
    }

    #[test]
    fn an_unknown_sum_proves_nothing() {
        let mut ledger = Ledger::default();
        record(&mut ledger, &[("a", 1)]);
        assert_eq!(ledger.number_of(Digest::of([("a", 2)])), None);
        assert!(!ledger.carries(None, "a"));
    }

    #[test]
    fn no_objects_at_all_is_a_sum_too_and_old_sums_are_forgotten() {
        let mut ledger = Ledger::default();
        let empty = record(&mut ledger, &[]);
        assert!(ledger.number_of(empty).is_some());
        for generation in 0..300 {
            record(&mut ledger, &[("a", generation)]);
        }
        assert_eq!(ledger.number_of(empty), None);
        assert_eq!(ledger.ring.len(), RING);
    }
}
