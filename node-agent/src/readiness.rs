//! When a node without a conflist gets its first one, and so becomes `Ready`: at once, or only once its peers
//! route to it. Pure.
//!
//! A node programs its own kernel before it writes the conflist, so its first pods reach every other node. But
//! whether the others route to it yet depends on their agents. With `--readiness=converged` the conflist waits
//! for `Converged=True` of the node's PodCIDRs, or for the deadline: a network that is late for some is better
//! than a node that never comes.
//!
//! Only the first conflist waits. A node that has one is Ready, has pods, and gains nothing by losing it.

use std::time::Duration;

use clap::ValueEnum;
use plat_crds::pod_cidr::BlockState;

use crate::desired::Map;

/// What the first conflist waits for, besides this node's own kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Readiness {
    /// Nothing.
    #[default]
    Node,
    /// Every live node routes to this one.
    Converged,
}

/// Whether the conflist may be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It may.
    Open,
    /// Not before the node has a block to lease from: no pod could start.
    NoBlock,
    /// It may from now on, as the deadline has passed; in words, for whom it is too early.
    Late(String),
    /// Not before the peers carry these PodCIDRs, or that time.
    Wait {
        /// When the deadline passes.
        until: Duration,
        /// PodCIDRs without `Converged=True`.
        names: Vec<String>,
    },
}

/// What is remembered of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gate {
    deadline: Option<Duration>,
    since: Option<Duration>,
}

impl Gate {
    /// A gate that is closed if `readiness` wants it so and there `has` been no conflist yet.
    pub fn new(readiness: Readiness, deadline: Duration, has: bool) -> Gate {
        let closed = readiness == Readiness::Converged && !has;
        Gate { deadline: closed.then_some(deadline), since: None }
    }

    /// Asked when nothing else is in the way, at `now` (any monotonic clock). Once open it stays so.
    pub fn admit(&mut self, node: &str, map: Map<'_>, now: Duration) -> Admission {
        let Some(deadline) = self.deadline else { return Admission::Open };
        let mut own =
            map.blocks.values().filter(|b| b.node == node && b.state == BlockState::Active).peekable();
        if own.peek().is_none() {
            return Admission::NoBlock;
        }
        let names: Vec<String> = own.filter(|b| !b.converged).map(|b| b.name.clone()).collect();
        let until = *self.since.get_or_insert(now) + deadline;
        if names.is_empty() {
            self.deadline = None;
            return Admission::Open;
        }
        if now < until {
            return Admission::Wait { until, names };
        }
        self.deadline = None;
        Admission::Late(format!(
            "the node becomes Ready though not every live node routes to PodCIDR {} yet: {} s are over; see its condition Converged",
            names.join(", "),
            deadline.as_secs()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::BlockFact;
    use crate::fixtures::{block, block_v6};
    use std::collections::{BTreeMap, BTreeSet};

    const DEADLINE: Duration = Duration::from_secs(60);

    fn ask(gate: &mut Gate, blocks: &[BlockFact], second: u64) -> Admission {
        let blocks: BTreeMap<_, _> = blocks.iter().map(|b| (b.name.clone(), b.clone())).collect();
        let map = Map { blocks: &blocks, ranges: &BTreeMap::new(), policies: &[], absent: &BTreeSet::new() };
        gate.admit("n1", map, Duration::from_secs(second))
    }

    fn converged(block: BlockFact) -> BlockFact {
        BlockFact { converged: true, ..block }
    }

    #[test]
    fn the_first_conflist_waits_for_every_block_of_the_node_and_for_no_other() {
        let mut gate = Gate::new(Readiness::Converged, DEADLINE, false);
        let wait = |names: &[&str]| Admission::Wait {
            until: Duration::from_secs(160),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(
            ask(&mut gate, &[block(1), block_v6(1), block(2)], 100),
            wait(&["10-244-1-0-24", "fd00-10-244-1---64"])
        );
        let half = [converged(block(1)), block_v6(1)];
        assert_eq!(ask(&mut gate, &half, 159), wait(&["fd00-10-244-1---64"]));
        let draining = [converged(block(1)), BlockFact { state: BlockState::Draining, ..block_v6(1) }];
        assert_eq!(ask(&mut gate.clone(), &draining, 159), Admission::Open, "no pod gets an address of it");
        assert_eq!(ask(&mut gate, &[converged(block(1)), converged(block_v6(1))], 159), Admission::Open);
        assert_eq!(ask(&mut gate, &[block(1)], 9999), Admission::Open, "once open it stays so");
    }

    #[test]
    fn a_node_that_only_drains_waits_for_a_block_that_it_may_lease_from() {
        let mut gate = Gate::new(Readiness::Converged, DEADLINE, false);
        let old = [BlockState::Draining, BlockState::Unknown].map(|state| BlockFact { state, ..block(1) });
        for block in old {
            assert_eq!(ask(&mut gate, &[block], 0), Admission::NoBlock);
        }
        let fresh = [BlockFact { state: BlockState::Draining, ..block(1) }, block_v6(1)];
        let wait =
            Admission::Wait { until: Duration::from_secs(560), names: vec!["fd00-10-244-1---64".into()] };
        assert_eq!(ask(&mut gate, &fresh, 500), wait, "the deadline counts from the first such block");
    }

    #[test]
    fn at_the_deadline_it_is_written_all_the_same_and_told_once() {
        let mut gate = Gate::new(Readiness::Converged, DEADLINE, false);
        assert!(matches!(ask(&mut gate, &[block(1)], 5), Admission::Wait { .. }));
        let Admission::Late(words) = ask(&mut gate, &[block(1)], 65) else { panic!() };
        assert!(words.contains("PodCIDR 10-244-1-0-24 yet: 60 s are over"), "{words}");
        assert_eq!(ask(&mut gate, &[block(1)], 66), Admission::Open);
    }

    #[test]
    fn nothing_waits_where_it_is_not_wanted_or_where_a_conflist_was_before() {
        for mut gate in
            [Gate::new(Readiness::Node, DEADLINE, false), Gate::new(Readiness::Converged, DEADLINE, true)]
        {
            assert_eq!(ask(&mut gate, &[block(1)], 0), Admission::Open);
        }
    }
}
