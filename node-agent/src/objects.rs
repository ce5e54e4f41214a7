//! The newest state of each watched kind, as the API server told it: the seam between the watch (or a
//! test) and the loop.
//!
//! [`KindSet::apply`] is the only way in which a set changes. It keeps apart what the loop must tell
//! apart before it withdraws anything: an object that a *watch event* deleted, and one that a *list* no
//! longer holds.

use std::collections::{BTreeMap, BTreeSet};

use crate::facts::{BlockFact, Fact, Fault, PolicyFact, RangeFact};

/// A message of the watch.
#[derive(Clone, Debug, PartialEq)]
pub enum Change<F> {
    /// A complete list: whatever is not in it is not there.
    Listed(Vec<Result<F, Fault>>),
    /// An object is new or changed.
    Applied(Result<F, Fault>),
    /// The object of that name was deleted.
    Deleted(String),
    /// The kind cannot be listed, as it is not installed or not ours to read: there is none, unless some were
    /// seen before.
    Missing,
}

/// The objects of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct KindSet<F> {
    /// Readable objects by name.
    pub facts: BTreeMap<String, F>,
    /// Objects whose newest version cannot be read, by name. The last readable version stays in `facts`.
    pub faults: BTreeMap<String, Fault>,
    /// Names that a watch event deleted since the last list.
    pub deleted: BTreeSet<String>,
    /// Complete lists received so far; 0 means that nothing may be concluded from an absence.
    pub lists: u64,
}

impl<F> Default for KindSet<F> {
    fn default() -> Self {
        KindSet { facts: BTreeMap::new(), faults: BTreeMap::new(), deleted: BTreeSet::new(), lists: 0 }
    }
}

impl<F: Fact> KindSet<F> {
    /// Takes in a message; returns whether anything that matters to the loop changed.
    pub fn apply(&mut self, change: Change<F>) -> bool {
        match change {
            Change::Listed(objects) => {
                self.list(objects);
                true
            }
            Change::Applied(Ok(fact)) => {
                let name = fact.name().to_owned();
                let healed = self.faults.remove(&name).is_some() | self.deleted.remove(&name);
                let changed = self.facts.get(&name) != Some(&fact);
                self.facts.insert(name, fact);
                changed || healed
            }
            Change::Applied(Err(fault)) => {
                self.faults.insert(fault.name.clone(), fault.clone()).as_ref() != Some(&fault)
            }
            Change::Deleted(name) => {
                let known = self.facts.remove(&name).is_some() | self.faults.remove(&name).is_some();
                if known {
                    self.deleted.insert(name);
                }
                known
            }
            Change::Missing => {
                let first = self.lists == 0;
                self.lists = self.lists.max(1);
                first
            }
        }
    }

    fn list(&mut self, objects: Vec<Result<F, Fault>>) {
        let mut before = std::mem::take(&mut self.facts);
        self.faults.clear();
        self.deleted.clear();
        self.lists += 1;
        for object in objects {
            match object {
                Ok(fact) => {
                    self.facts.insert(fact.name().to_owned(), fact);
                }
                Err(fault) => {
                    // It is there, so its last readable version goes on.
                    if let Some(fact) = before.remove(&fault.name) {
                        self.facts.insert(fault.name.clone(), fact);
                    }
                    self.faults.insert(fault.name.clone(), fault);
                }
            }
        }
    }
}

/// Everything that the watch tells the loop.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Objects {
    /// PodCIDRs.
    pub blocks: KindSet<BlockFact>,
    /// ClusterCIDRs.
    pub ranges: KindSet<RangeFact>,
    /// RoutingPolicies.
    pub policies: KindSet<PolicyFact>,
    /// When the API server last confirmed that this node's blocks are still its own.
    pub contact: Option<Contact>,
}

/// A proof that the API server was reached, and that it still gives this node its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contact {
    /// Start of the request that was answered, in milliseconds of `CLOCK_BOOTTIME`.
    pub boot_ms: u64,
    /// The same instant, in seconds since the epoch; for messages only.
    pub unix: i64,
}

/// What the loop asks of the watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// List all kinds anew, with a quorum read: objects are missing and somebody must confirm it.
    Relist,
    /// Prove at once that the API server is reachable.
    Contact,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Reason;

    #[derive(Clone, Debug, PartialEq)]
    struct Thing(&'static str, i64);

    impl Fact for Thing {
        fn name(&self) -> &str {
            self.0
        }
        fn identity(&self) -> (&str, i64) {
            (self.0, self.1)
        }
    }

    fn bad(name: &str) -> Fault {
        Fault::block(name, Reason::Unreadable, "bad")
    }

    #[test]
    fn only_what_differs_is_a_change() {
        let mut set = KindSet::default();
        assert!(set.apply(Change::Applied(Ok(Thing("a", 1)))));
        assert!(!set.apply(Change::Applied(Ok(Thing("a", 1)))));
        assert!(set.apply(Change::Applied(Ok(Thing("a", 2)))));
        assert!(!set.apply(Change::Deleted("b".into())));
        assert!(set.apply(Change::Deleted("a".into())));
        assert!(set.deleted.contains("a"));
    }

    #[test]
    fn a_bad_object_is_a_fault_and_its_last_good_version_goes_on() {
        let mut set = KindSet::default();
        set.apply(Change::Listed(vec![Ok(Thing("a", 1)), Ok(Thing("b", 1))]));
        assert!(set.apply(Change::Applied(Err(bad("a")))));
        assert!(!set.apply(Change::Applied(Err(bad("a")))), "the same fault again wakes nobody");
        set.apply(Change::Listed(vec![Err(bad("a")), Ok(Thing("b", 2))]));
        assert_eq!(set.facts["a"], Thing("a", 1));
        assert_eq!(set.facts["b"], Thing("b", 2));
        assert!(set.faults.contains_key("a"));
        assert!(set.apply(Change::Applied(Ok(Thing("a", 1)))), "healing is a change");
        assert!(set.faults.is_empty());
    }

    #[test]
    fn a_list_replaces_everything_and_counts() {
        let mut set = KindSet::default();
        set.apply(Change::Applied(Ok(Thing("a", 1))));
        assert_eq!(set.lists, 0);
        set.apply(Change::Listed(vec![Ok(Thing("b", 1))]));
        assert_eq!((set.lists, set.facts.keys().map(String::as_str).collect::<Vec<_>>()), (1, vec!["b"]));
        assert!(set.deleted.is_empty(), "an absence from a list is no deletion");
    }

    #[test]
    fn an_object_that_returns_is_no_longer_deleted() {
        let mut set = KindSet::default();
        set.apply(Change::Listed(vec![Ok(Thing("a", 1))]));
        set.apply(Change::Deleted("a".into()));
        set.apply(Change::Applied(Ok(Thing("a", 1))));
        assert!(set.deleted.is_empty());
    }
}
