//! Fail static: which absences are believed, and when.
//!
//! A node leaves a cluster in one proven way: the operator sets its block to `Quarantined`, every agent
//! withdraws the route, and the object is deleted long after. So an object that is simply *not there* says
//! little: the CRD may have been deleted, etcd restored, the list filtered, the watch broken. Withdrawing
//! on such evidence is how a control plane takes a working network down.
//!
//! | an object is absent because | its effect goes |
//! |---|---|
//! | it was released (`Quarantined`) before | at once |
//! | a watch event deleted it, and few others went with it | after [`SETTLE`] |
//! | a list no longer holds it, or a block of this node or more than a third of all went | after a second complete list confirmed it *and* the hold time passed |
//!
//! Additions and changes are always believed at once. This module decides; it reads no clock and asks nobody.

use std::collections::BTreeMap;
use std::time::Duration;

use plat_crds::node_network::LostBlock;

use crate::facts::Fact;
use crate::objects::KindSet;

/// How long a single deletion waits, to see whether it is the first of many.
pub const SETTLE: Duration = Duration::from_secs(10);

/// The objects that the node is programmed for: the newest ones, and absent ones that are not yet given up.
#[derive(Clone, Debug, PartialEq)]
pub struct Belief<F> {
    /// Objects by name.
    pub facts: BTreeMap<String, F>,
    missing: BTreeMap<String, Missing>,
}

/// Since when an object is missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Missing {
    since: Duration,
    lists: u64,
}

/// Withdrawals that wait.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Objects whose withdrawal waits for confirmation and the hold time.
    pub names: Vec<String>,
    /// Whether a further complete list would help.
    pub wants_list: bool,
    /// When, at the earliest, the answer may differ without any news.
    pub next: Option<Duration>,
    /// Blocks whose PodCIDRs went without having been released, with the nodes that held them: those whose
    /// withdrawal waits, and those withdrawn less than a quarantine after they went.
    pub lost: Vec<LostBlock>,
}

impl<F> Default for Belief<F> {
    fn default() -> Self {
        Belief { facts: BTreeMap::new(), missing: BTreeMap::new() }
    }
}

impl<F: Fact> Belief<F> {
    /// A belief without doubts, as the cache has it.
    pub fn of(facts: BTreeMap<String, F>) -> Belief<F> {
        Belief { facts, missing: BTreeMap::new() }
    }

    /// Names of the objects that are believed in though they are absent.
    pub fn absent(&self) -> impl Iterator<Item = &String> {
        self.missing.keys()
    }

    /// Whether an absence waits, so that time alone may change what is believed.
    pub fn is_in_doubt(&self) -> bool {
        !self.missing.is_empty()
    }

    /// Takes in the newest set at `now` (any monotonic clock). `essential` says whether this node itself
    /// lives by an object, `released` whether an absent object's effect was withdrawn properly before.
    pub fn update(
        &mut self,
        newest: &KindSet<F>,
        now: Duration,
        hold: Duration,
        essential: impl Fn(&F) -> bool,
        released: impl Fn(&F) -> bool,
    ) -> Held {
        if newest.lists == 0 {
            // Until the first complete list an absence means nothing, but what is there is there.
            self.facts.extend(newest.facts.iter().map(|(name, fact)| (name.clone(), fact.clone())));
            return Held::default();
        }
        let before = std::mem::replace(&mut self.facts, newest.facts.clone());
        let total = before.len();
        let absent: BTreeMap<String, F> = before
            .into_iter()
            .filter(|(name, fact)| !self.facts.contains_key(name) && !released(fact))
            .collect();
        let mass = absent.len() * 3 > total || absent.values().any(essential);

        let mut held = Held::default();
        let mut missing = BTreeMap::new();
        for (name, fact) in absent {
            let noticed = Missing { since: now, lists: newest.lists };
            let seen = self.missing.get(&name).copied().unwrap_or(noticed);
            let brief = newest.deleted.contains(&name) && !mass;
            let confirmed = brief || newest.lists > seen.lists;
            let due = seen.since + if brief { SETTLE } else { hold };
            if confirmed && now >= due {
                continue;
            }
            if !brief {
                held.names.push(name.clone());
                held.wants_list |= !confirmed;
            }
            if now < due {
                held.next = Some(held.next.map_or(due, |next| next.min(due)));
            }
            missing.insert(name.clone(), seen);
            self.facts.insert(name, fact);
        }
        self.missing = missing;
        held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::Change;
    use proptest::prelude::*;

    const HOLD: Duration = Duration::from_secs(300);

    #[derive(Clone, Debug, PartialEq)]
    struct Node {
        name: String,
        quarantined: bool,
    }

    impl Fact for Node {
        fn name(&self) -> &str {
            &self.name
        }
        fn identity(&self) -> (&str, i64) {
            (&self.name, 1)
        }
    }

    fn node(n: usize) -> Node {
        Node { name: format!("n{n}"), quarantined: false }
    }

    /// A cluster of `n` nodes, of which `n0` is this one, as the loop and the watch see it.
    struct Cluster {
        set: KindSet<Node>,
        belief: Belief<Node>,
        now: Duration,
    }

    impl Cluster {
        fn of(nodes: usize) -> Cluster {
            let mut cluster = Cluster {
                set: KindSet::default(),
                belief: Belief::default(),
                now: Duration::from_secs(1000),
            };
            cluster.list(0..nodes);
            cluster
        }

        fn list(&mut self, nodes: impl IntoIterator<Item = usize>) -> Held {
            self.set.apply(Change::Listed(nodes.into_iter().map(|n| Ok(node(n))).collect()));
            self.pass(0)
        }

        fn delete(&mut self, n: usize) -> Held {
            self.set.apply(Change::Deleted(format!("n{n}")));
            self.pass(0)
        }

        fn quarantine(&mut self, n: usize) -> Held {
            self.set.apply(Change::Applied(Ok(Node { quarantined: true, ..node(n) })));
            self.pass(0)
        }

        fn pass(&mut self, later: u64) -> Held {
            self.now += Duration::from_secs(later);
            self.belief.update(&self.set, self.now, HOLD, |n| n.name == "n0", |n| n.quarantined)
        }

        /// Nodes that are routed to.
        fn routed(&self) -> Vec<&str> {
            self.belief.facts.values().filter(|n| !n.quarantined).map(|n| n.name.as_str()).collect()
        }
    }

    #[test]
    fn a_quarantined_block_is_withdrawn_at_once_however_many_there_are() {
        let mut cluster = Cluster::of(3);
        assert_eq!(cluster.quarantine(1), Held::default());
        assert_eq!(cluster.quarantine(2), Held::default());
        assert_eq!(cluster.routed(), ["n0"]);
        assert_eq!(cluster.delete(1), Held::default());
        assert!(!cluster.belief.facts.contains_key("n1"), "its later deletion withdraws nothing");
    }

    #[test]
    fn a_single_deletion_goes_after_it_settled() {
        let mut cluster = Cluster::of(3);
        let held = cluster.delete(2);
        assert_eq!(held.names, Vec::<String>::new());
        assert_eq!(held.next, Some(cluster.now + SETTLE));
        assert_eq!(cluster.routed(), ["n0", "n1", "n2"]);
        cluster.pass(10);
        assert_eq!(cluster.routed(), ["n0", "n1"]);
    }

    #[test]
    fn a_deleted_crd_deletes_one_object_after_another_and_withdraws_nothing() {
        for nodes in [2, 3, 10, 100] {
            let mut cluster = Cluster::of(nodes);
            for n in (0..nodes).rev() {
                cluster.delete(n);
            }
            // The kind is gone, so no list ever confirms.
            let held = cluster.pass(100_000);
            assert_eq!(cluster.routed().len(), nodes);
            assert_eq!(held.names.len(), nodes);
            assert!(held.wants_list);
        }
    }

    #[test]
    fn an_empty_or_partial_list_withdraws_only_after_a_second_one_and_the_hold_time() {
        for partial in [vec![], vec![0], vec![1, 2]] {
            let mut cluster = Cluster::of(4);
            assert!(cluster.list(partial.clone()).wants_list);
            let held = cluster.pass(301);
            assert!(held.wants_list, "time alone confirms nothing");
            assert_eq!(held.next, None, "only news can change that");
            assert_eq!(cluster.routed().len(), 4);

            let mut cluster = Cluster::of(4);
            cluster.list(partial.clone());
            let held = cluster.list(partial.clone());
            assert_eq!((held.wants_list, held.names.len()), (false, 4 - partial.len()));
            assert_eq!(cluster.routed().len(), 4, "a second list alone is not enough");
            assert_eq!(cluster.pass(301), Held::default());
            assert_eq!(cluster.routed().len(), partial.len());
        }
    }

    #[test]
    fn a_list_without_one_node_is_held_too_as_nodes_leave_by_quarantine() {
        let mut cluster = Cluster::of(10);
        let held = cluster.list(0..9);
        assert_eq!(held.names, ["n9"]);
        assert_eq!(cluster.routed().len(), 10);
    }

    #[test]
    fn what_returns_is_doubted_no_more() {
        let mut cluster = Cluster::of(3);
        cluster.list([]);
        cluster.pass(200);
        assert_eq!(cluster.list(0..3), Held::default());
        cluster.list([]);
        cluster.list([]);
        cluster.pass(200);
        assert_eq!(cluster.routed().len(), 3, "the hold time starts anew");
    }

    #[test]
    fn additions_go_on_while_withdrawals_wait() {
        let mut cluster = Cluster::of(3);
        assert_eq!(cluster.list([7, 8]).names, ["n0", "n1", "n2"]);
        assert_eq!(cluster.routed(), ["n0", "n1", "n2", "n7", "n8"]);
    }

    #[test]
    fn before_the_first_list_the_cache_is_believed_whole() {
        let mut belief = Belief::of([("n1".to_owned(), node(1))].into());
        let mut set = KindSet::default();
        set.apply(Change::Applied(Ok(node(2))));
        let held = belief.update(&set, Duration::ZERO, HOLD, |_| true, |_| false);
        assert_eq!(held, Held::default());
        assert_eq!(belief.facts.len(), 2);
    }

    proptest! {
        #[test]
        fn present_objects_are_always_believed_and_absent_ones_never_before_they_settled(
            steps in prop::collection::vec((0usize..6, 0usize..6, 0u64..400), 1..40),
        ) {
            let mut cluster = Cluster::of(6);
            let mut present = BTreeMap::new();
            for (what, n, wait) in steps {
                let before = cluster.belief.facts.clone();
                for name in cluster.set.facts.keys() {
                    present.insert(name.clone(), cluster.now);
                }
                match what {
                    0 => cluster.delete(n),
                    1 => cluster.list(0..n),
                    2 => {
                        cluster.set.apply(Change::Applied(Ok(node(n))));
                        cluster.pass(0)
                    }
                    3 => cluster.quarantine(n),
                    _ => cluster.pass(wait),
                };
                for (name, fact) in &cluster.set.facts {
                    prop_assert_eq!(cluster.belief.facts.get(name), Some(fact));
                }
                for (name, fact) in before {
                    if !fact.quarantined && !cluster.belief.facts.contains_key(&name) {
                        prop_assert!(cluster.now >= present[&name] + SETTLE, "{} vanished", name);
                    }
                }
            }
        }
    }
}
