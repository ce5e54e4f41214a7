//! How many blocks a node has: one more before it is full, one less when it has long been empty.
//!
//! A node gets the minimum from the start, and one block more each time that its free addresses fall below
//! the watermark ([`plat_crds::growth`]), up to the maximum. One at a time: the next is decided on a report
//! that counts the last. A block that has been empty for a while, and that the node does well without, is
//! given back ([`super::drain`]); never its primary one.

use plat_crds::node_network::MAX_BLOCKS;
use plat_crds::{Family, growth};

use super::holding::{Holding, usage};
use super::{Candidate, Planner};
use crate::facts::{BlockFact, NodeFact};

/// Blocks of one family that a node's report has room for.
pub(super) const MAX_PER_FAMILY: usize = MAX_BLOCKS / 2;

impl<'a> Planner<'a> {
    pub(super) fn holding(&self, node: &NodeFact, family: Family) -> Holding<'a> {
        Holding::of(self.own_blocks(node), family, &node.uid)
    }

    /// The families of which a node needs one block more than it has, with how many it keeps.
    pub(super) fn growing(&self, node: &NodeFact) -> Vec<(Family, usize)> {
        let grows = |family: &Family| {
            let holding = self.holding(node, *family);
            let decided = holding.main().is_some() && holding.unknown.is_empty();
            // A block that is on its way back to the node, or will be as it is needed, goes before a new one.
            let resumes = holding.kept.len() < self.max_blocks(&holding.kept);
            let comes_back =
                !holding.returning.is_empty() || (resumes && holding.leaving.iter().any(|b| !b.drain));
            let wants =
                holding.kept.len() < self.min_blocks(node, *family) || self.is_full(node, &holding.kept);
            let room = holding.in_use() < MAX_PER_FAMILY;
            (decided && !comes_back && wants && room).then_some((*family, holding.kept.len()))
        };
        Family::ALL.iter().filter_map(grows).collect()
    }

    /// Whether the node says that these blocks are past the watermark.
    pub(super) fn is_full(&self, node: &NodeFact, kept: &[&BlockFact]) -> bool {
        self.usage_of(node, kept).is_some_and(growth::wants_block)
    }

    /// Whether the node says that it leases from these blocks and has room in them.
    pub(super) fn has_room(&self, node: &NodeFact, kept: &[&BlockFact]) -> bool {
        !kept.is_empty() && self.usage_of(node, kept).is_some_and(|usage| !growth::wants_block(usage))
    }

    fn usage_of(&self, node: &NodeFact, blocks: &[&BlockFact]) -> Option<Vec<(u32, u32)>> {
        usage(blocks, self.snapshot.reports.get(&node.name)?)
    }

    /// The ranges that select a node, in the order in which they are tried.
    pub(super) fn choices(&self, node: &NodeFact, family: Family) -> Vec<&Candidate<'a>> {
        let mut ranges: Vec<_> = self.ranges.values().filter(|range| range.selects(node, family)).collect();
        ranges.sort_by_key(|range| (std::cmp::Reverse(range.fact.priority), range.fact.name.clone()));
        ranges
    }

    /// How many blocks a node has from the start: as the range says that is tried first.
    pub(super) fn min_blocks(&self, node: &NodeFact, family: Family) -> usize {
        let ranges = self.ranges.values().filter(|range| range.selects(node, family) && range.allocates());
        let first = ranges.min_by_key(|range| (std::cmp::Reverse(range.fact.priority), &range.fact.name));
        first.map_or(1, |range| range.fact.min_blocks())
    }

    /// How many blocks a node that has these may have.
    pub(super) fn max_blocks(&self, kept: &[&BlockFact]) -> usize {
        let max = |block: &&BlockFact| self.snapshot.ranges.get(&block.range).map(|range| range.max_blocks());
        kept.iter().filter_map(max).max().unwrap_or(usize::MAX)
    }

    /// The block that a node gives back next: the newest that has long been empty, or simply the newest while
    /// it has more than the maximum.
    pub(super) fn surplus(&mut self, node: &NodeFact, holding: &Holding<'a>) -> Option<&'a BlockFact> {
        let kept = &holding.kept;
        if kept.len() > self.max_blocks(kept) && kept.len() > 1 {
            return kept.last().copied();
        }
        if kept.len() <= self.min_blocks(node, holding.kept.first()?.block.family()) {
            return None;
        }
        let usage = self.usage_of(node, kept)?;
        let (memory, now) = (self.snapshot.memory, self.snapshot.clock.steady);
        let mut due = None;
        for (index, block) in kept.iter().enumerate().skip(1) {
            let others = usage.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, used)| *used);
            let is_empty = usage.get(index).is_some_and(|(used, _)| *used == 0);
            if !is_empty || !growth::spares_others(others) {
                continue;
            }
            self.plan.spare.insert(block.uid.clone());
            let since = memory.spare_since.get(&block.uid).copied().unwrap_or(now);
            match (since + self.snapshot.settings.surplus_after).saturating_sub(now) {
                wait if wait.is_zero() => due = Some(*block),
                wait => self.plan.wake_at_the_latest(wait),
            }
        }
        // One at a time, so that each is decided on what the node has left.
        due.filter(|_| holding.leaving.iter().all(|block| block.drain))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use plat_crds::cluster_cidr::{Allocation, BlocksPerNode};
    use plat_crds::condition::GROWTH_BLOCKED;
    use plat_crds::pod_cidr::BlockState;

    use crate::facts::{BlockFact, RangeFact, ReportFact};
    use crate::fixtures::{
        NOW, Scene, at, block, created, faults, held_block, node, range, report, scene, steps,
    };
    use crate::memory::{Pending, Vanished};
    use crate::reason;

    const FIRST: &str = "10.244.0.0/24";
    const SECOND: &str = "10.244.1.0/24";

    fn limits(min: i32, max: i32) -> RangeFact {
        let mut range = range("r", "10.244.0.0/16");
        range.status.cursor = Some(1);
        RangeFact { blocks_per_node: BlocksPerNode { min, max }, ..range }
    }

    /// One node with these blocks, the oldest first, and what it says of them.
    fn holds(range: RangeFact, blocks: &[&str], used: &[(&str, i64)]) -> Scene {
        let mut scene = scene().node(node("n1")).range(range).report(report("n1", used));
        for (age, cidr) in blocks.iter().enumerate() {
            let created = at(NOW - 500 + i64::try_from(age).unwrap());
            scene = scene.block(BlockFact { created, ..held_block(cidr, "r", "n1") });
        }
        scene
    }

    #[test]
    fn a_node_gets_another_block_before_it_is_full() {
        for (blocks, used, expected) in [
            (&[FIRST][..], &[(FIRST, 203)][..], None),
            (&[FIRST], &[(FIRST, 204)], Some(SECOND)),
            (&[FIRST], &[(FIRST, 253)], Some(SECOND)),
            (&[FIRST, SECOND], &[(FIRST, 253), (SECOND, 203)], None),
            (&[FIRST, SECOND], &[(FIRST, 253), (SECOND, 204)], Some("10.244.2.0/24")),
            // A report of before the newest block decides nothing, nor does one that cannot tell.
            (&[FIRST, SECOND], &[(FIRST, 253)], None),
            (&[FIRST], &[], None),
        ] {
            let scene = holds(limits(1, 8), blocks, used);
            let expected: Vec<_> = expected.into_iter().map(|b| format!("n1 {b} r carved")).collect();
            assert_eq!(created(&scene.plan()), expected, "{used:?}");
        }
    }

    #[test]
    fn a_node_has_the_minimum_from_the_start_and_gets_one_at_a_time() {
        let mut scene = scene().node(node("n1")).range(limits(3, 8)).all_report();
        for blocks in 1..=4 {
            scene = scene.clone().after(&scene.plan());
            assert_eq!(scene.world.blocks.len(), blocks.min(3));
        }
    }

    #[test]
    fn a_node_at_the_maximum_is_named_with_the_cure_and_the_others_go_on() {
        let scene = holds(limits(1, 2), &[FIRST, SECOND], &[(FIRST, 253), (SECOND, 253)]);
        let scene = scene.node(node("n2")).all_report();
        let plan = scene.plan();
        assert_eq!(created(&plan), ["n2 10.244.2.0/24 r carved"]);
        assert_eq!(faults(&plan), [format!("n1 {}", reason::BLOCKS_PER_NODE_REACHED)]);
        assert_eq!(
            plan.faults[0].message,
            "node n1 gets no IPv4 block beside its 2: it is almost full, and blocksPerNode.max of ClusterCIDR r allows no more; raise that, or run fewer pods on it"
        );
        let verdict = &plan.verdicts["10-244-1-0-24"][0];
        assert_eq!((verdict.type_, verdict.status), (GROWTH_BLOCKED, Some(true)));
    }

    #[test]
    fn when_the_first_choice_is_full_or_at_its_maximum_the_next_range_gives_the_block() {
        for first in [
            RangeFact { range: Some(block(FIRST)), ..limits(1, 8) },
            limits(1, 1),
            RangeFact { allocation: Allocation::Draining, ..limits(1, 8) },
        ] {
            let scene = holds(RangeFact { priority: 5, ..first }, &[FIRST], &[(FIRST, 253)]);
            let none = scene.plan();
            assert_eq!((created(&none).len(), none.faults.len()), (0, 1), "{:?}", none.faults);
            let scene = scene.range(range("z-second", "10.9.0.0/16"));
            assert_eq!(created(&scene.plan()), ["n1 10.9.0.0/24 z-second carved"]);
        }
    }

    #[test]
    fn nodes_without_a_block_go_before_nodes_that_fill_up() {
        let short = RangeFact { range: Some(block("10.244.0.0/23")), ..limits(1, 8) };
        let scene = holds(short, &[FIRST], &[(FIRST, 253)]).node(node("n2")).all_report();
        let plan = scene.plan();
        assert_eq!(created(&plan), ["n2 10.244.1.0/24 r carved"]);
        assert_eq!(faults(&plan), [format!("n1 {}", reason::RANGE_EXHAUSTED)]);
    }

    #[test]
    fn a_create_of_unknown_outcome_is_repeated_and_not_followed_by_another() {
        let pending = Pending { node: "n1".into(), range: "r".into(), until: Duration::from_secs(99_999) };
        let scene = holds(limits(1, 8), &[FIRST], &[(FIRST, 253)]);
        let scene = scene.with(|s| drop(s.memory.pending.insert(block("10.244.7.0/24"), pending)));
        assert_eq!(created(&scene.plan()), ["n1 10.244.7.0/24 r carved"]);
    }

    #[test]
    fn a_lost_further_block_is_made_again_if_the_node_has_leases_in_it() {
        let lost = |used| {
            let vanished =
                Vanished { node: "n1".into(), range: "r".into(), until: Duration::from_secs(99_999) };
            let scene = holds(limits(1, 8), &[FIRST], &[(FIRST, 3), ("10.244.7.0/24", used)]);
            created(&scene.with(|s| drop(s.memory.vanished.insert(block("10.244.7.0/24"), vanished))).plan())
        };
        assert_eq!(lost(1), ["n1 10.244.7.0/24 r recreated"]);
        assert_eq!(lost(0), [] as [&str; 0]);
    }

    fn drained(scene: &Scene) -> Vec<String> {
        let after = scene.clone().after(&scene.plan());
        let blocks = after.world.blocks.values();
        blocks.filter(|b| b.state == BlockState::Draining).map(|b| b.block.to_string()).collect()
    }

    /// After another ten minutes in which the leader has seen the same.
    fn later(scene: Scene) -> Scene {
        let spare = scene.plan().spare;
        scene.with(|s| {
            s.memory.observe_spare(&spare, s.clock);
            s.clock.steady += Duration::from_secs(600);
        })
    }

    #[test]
    fn a_surplus_block_is_given_back_after_a_while_and_never_the_primary() {
        let third = "10.244.2.0/24";
        for (used, expected) in [
            (&[(FIRST, 9), (SECOND, 0)][..], Some(SECOND)),
            (&[(FIRST, 0), (SECOND, 0)], Some(SECOND)),
            (&[(FIRST, 0), (SECOND, 1)], None),
            (&[(FIRST, 178), (SECOND, 0)], Some(SECOND)),
            (&[(FIRST, 179), (SECOND, 0)], None),
            (&[(FIRST, 9)], None),
            (&[(FIRST, 0), (SECOND, 0), (third, 0)], Some(third)),
            (&[(FIRST, 200), (SECOND, 0), (third, 7)], Some(SECOND)),
        ] {
            let blocks: Vec<_> = [FIRST, SECOND, third].into_iter().take(used.len().max(2)).collect();
            let scene = holds(limits(1, 8), &blocks, used);
            assert_eq!(drained(&scene), [] as [&str; 0], "not at once");
            let expected: Vec<_> = expected.into_iter().map(str::to_owned).collect();
            if !expected.is_empty() {
                assert_eq!(scene.plan().wake_after, Some(Duration::from_secs(600)));
            }
            assert_eq!(drained(&later(scene.clone())), expected, "{used:?}");
            let min = scene.range(limits(i32::try_from(blocks.len()).unwrap(), 8));
            assert_eq!(drained(&later(min)), [] as [&str; 0], "the minimum stays");
        }
    }

    #[test]
    fn a_block_must_have_been_spare_all_the_time() {
        let spare = holds(limits(1, 8), &[FIRST, SECOND], &[(FIRST, 9), (SECOND, 0)]);
        let used = spare.clone().report(report("n1", &[(FIRST, 9), (SECOND, 1)]));
        let again = later(later(used)).report(report("n1", &[(FIRST, 9), (SECOND, 0)]));
        assert_eq!(drained(&again), [] as [&str; 0]);
        assert_eq!(drained(&later(again)), [SECOND]);
    }

    #[test]
    fn blocks_are_given_back_one_at_a_time() {
        let third = "10.244.2.0/24";
        let scene =
            later(holds(limits(1, 8), &[FIRST, SECOND, third], &[(FIRST, 0), (SECOND, 0), (third, 0)]));
        let scene = scene.clone().after(&scene.plan());
        assert_eq!(drained(&later(scene)), [third]);
    }

    #[test]
    fn more_than_the_maximum_is_drained_at_once_also_if_it_is_used() {
        let scene = holds(limits(1, 1), &[FIRST, SECOND], &[(FIRST, 9), (SECOND, 9)]);
        assert_eq!(drained(&scene), [SECOND]);
        let scene = scene.clone().after(&scene.plan());
        assert_eq!(steps(&scene.plan()), [] as [&str; 0], "and stays so");
    }

    #[test]
    fn what_drains_beyond_the_maximum_of_one_range_does_not_keep_another_from_giving_a_block() {
        let scene = holds(limits(1, 1), &[FIRST, SECOND], &[(FIRST, 253), (SECOND, 9)]);
        let scene = scene.clone().after(&scene.plan()).range(range("z-second", "10.9.0.0/16"));
        assert_eq!(created(&scene.plan()), ["n1 10.9.0.0/24 z-second carved"]);
        // By the other range's maximum it may keep both, and it comes to rest.
        let scene = scene.clone().after(&scene.plan());
        let scene = scene.clone().after(&scene.plan());
        assert_eq!((drained(&scene).len(), steps(&scene.plan())), (0, vec![]));
    }

    #[test]
    fn where_nodes_name_their_blocks_a_full_one_is_named_and_gets_no_other() {
        let scene = holds(limits(1, 8), &[FIRST], &[(FIRST, 253)])
            .with(|s| s.settings.ipam_source = crate::snapshot::IpamSource::Node);
        let plan = scene.plan();
        assert_eq!(
            (created(&plan), faults(&plan)),
            (vec![], vec![format!("n1 {}", reason::BLOCKS_PER_NODE_REACHED)])
        );
        assert!(plan.faults[0].message.contains("ipam.source: node"), "{:?}", plan.faults);
    }

    #[test]
    fn a_node_whose_agent_fails_gets_and_gives_back_nothing() {
        let mut failing = report("n1", &[(FIRST, 253), (SECOND, 0)]);
        failing.held[1].used = None;
        let scene = holds(limits(1, 8), &[FIRST, SECOND], &[]).report(ReportFact { ..failing });
        assert_eq!((drained(&later(scene.clone())).len(), created(&scene.plan()).len()), (0, 0));
    }
}
