//! Blocks that go while their node stays.
//!
//! ```text
//!            asked to, and replaced; or surplus            the agent says that it has stopped
//!   Active ────────────────────────────────────▶ Draining ───leasing and has no lease left──▶ Quarantined ─▶ deleted
//!     ▲                                           │    ▲                                          │
//!     └──not asked any more, or needed, or leased─┘    └────────a lease in it is reported─────────┘
//! ```
//! The order is what makes it safe: a node that has applied `Draining` leases nothing more from the block, so the
//! count that it reports together with that (one report: [`crate::ledger`]) can only fall. Every change is made on
//! the version that it was decided on, so a block that is taken back meanwhile is not quarantined.

use plat_crds::condition::{DRAINING, GROWTH_BLOCKED, Verdict};
use plat_crds::pod_cidr::BlockState;

use super::Planner;
use super::holding::Holding;
use crate::carriers::carried_by;
use crate::facts::{BlockFact, Held, NodeFact};
use crate::reason;
use crate::step::Why;

/// What becomes of a block whose node is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It stays as it is.
    Stay,
    /// It is given another state.
    Be(BlockState, Why),
    /// Its last lease has ended: it goes into quarantine.
    Quarantine,
    /// It is in quarantine and stays there.
    Rest,
}

impl<'a> Planner<'a> {
    pub(super) fn next(&mut self, block: &BlockFact, node: &NodeFact) -> Next {
        let family = block.block.family();
        let is_only = || self.own_blocks(node).iter().filter(|b| b.block.family() == family).count() == 1;
        if block.state == BlockState::Active && is_only() {
            // The case of almost every block: nothing else to lease from, so nothing to decide.
            return Next::Stay;
        }
        let holding = self.holding(node, family);
        match block.state {
            BlockState::Unknown => Next::Stay,
            BlockState::Quarantined if holding.returning.iter().any(|other| other.uid == block.uid) => {
                Next::Be(BlockState::Active, Why::Readopt)
            }
            BlockState::Quarantined if self.has_leases(block) => Next::Be(BlockState::Draining, Why::InUse),
            BlockState::Quarantined => Next::Rest,
            BlockState::Active if block.drain && self.has_room(node, &holding.kept) => {
                Next::Be(BlockState::Draining, Why::Asked)
            }
            BlockState::Active if block.drain => Next::Stay,
            BlockState::Active => match self.surplus(node, &holding) {
                Some(surplus) if surplus.uid == block.uid => Next::Be(BlockState::Draining, Why::Surplus),
                _ => Next::Stay,
            },
            BlockState::Draining if self.is_needed(block, node, &holding) => {
                Next::Be(BlockState::Active, Why::Resume)
            }
            BlockState::Draining if self.is_unused(block) => Next::Quarantine,
            BlockState::Draining => Next::Stay,
        }
    }

    /// Whether a draining block must be leased from again: one that was asked to go, only while the node has
    /// nothing else; one that is given back, as soon as it is not surplus any more.
    fn is_needed(&self, block: &BlockFact, node: &NodeFact, holding: &Holding<'a>) -> bool {
        let kept = &holding.kept;
        if kept.is_empty() || block.drain {
            return kept.is_empty();
        }
        kept.len() < self.max_blocks(kept)
            && (kept.len() < self.min_blocks(node, block.block.family())
                || self.is_full(node, kept)
                || self.has_leases(block))
    }

    /// What the block's node reports of its addresses.
    fn reported(&self, block: &BlockFact) -> impl Iterator<Item = &Held> {
        let held = self.snapshot.reports.get(&block.node).into_iter().flat_map(|report| &report.held);
        held.filter(|held| held.block.overlaps(&block.block))
    }

    fn has_leases(&self, block: &BlockFact) -> bool {
        self.reported(block).any(|held| held.used.is_some_and(|used| used > 0))
    }

    /// Whether the node surely has no lease in the block.
    pub(super) fn is_empty(&self, block: &BlockFact) -> bool {
        self.reported(block).all(|held| held.used == Some(0))
    }

    /// Whether the node has seen that the block drains, and has surely no lease in it any more.
    fn is_unused(&self, block: &BlockFact) -> bool {
        let Some(report) = self.snapshot.reports.get(&block.node) else { return false };
        // What else the node could not apply does not matter.
        let carried = carried_by(report, self.snapshot);
        self.snapshot.memory.ledger.carries(carried, &block.uid)
            && report.failed.iter().all(|failed| *failed.name != *block.name)
            && self.is_empty(block)
    }

    /// Conditions of the blocks that drain or should, and of nodes that cannot grow.
    pub(super) fn tell_of_blocks(&mut self) {
        let snapshot = self.snapshot;
        let goes = |block: &BlockFact| match block.state {
            BlockState::Draining => true,
            BlockState::Active => block.drain,
            BlockState::Quarantined | BlockState::Unknown => false,
        };
        for block in snapshot.blocks.values().filter(|block| goes(block)) {
            if snapshot.nodes.contains_key(&block.node) {
                let verdict = self.draining(block);
                self.plan.verdicts.entry(block.name.clone()).or_default().push(verdict);
            }
        }
        for ((node, family), (reason, message)) in &self.refused {
            let Some(node) = snapshot.nodes.get(node) else { continue };
            if let Some(newest) = self.holding(node, *family).kept.last() {
                let verdict = Verdict::new(GROWTH_BLOCKED, Some(true), reason, message.clone());
                self.plan.verdicts.entry(newest.name.clone()).or_default().push(verdict);
            }
        }
    }

    fn draining(&self, block: &BlockFact) -> Verdict {
        let node = &block.node;
        let verdict = |status, reason, message| Verdict::new(DRAINING, Some(status), reason, message);
        if block.state == BlockState::Draining {
            let (reason, why) = match block.drain {
                true => (
                    reason::ASKED,
                    "its annotation asks for it, or its node's spec.podCIDRs (ipam.source node)",
                ),
                false => (reason::SURPLUS, "its node does not need it"),
            };
            let message = format!(
                "{why}: pods keep their addresses in it, and it goes once the last of them has ended"
            );
            return verdict(true, reason, message);
        }
        match self.refused.get(&(node.clone(), block.block.family())) {
            Some((_, why)) => verdict(
                false,
                reason::NO_REPLACEMENT,
                format!("nothing changes, as no block can take its place: {why}"),
            ),
            None => verdict(
                false,
                reason::REPLACEMENT_COMES,
                format!(
                    "node {node} gets another block, and says that it leases from that, before this one drains"
                ),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use plat_crds::Block;
    use plat_crds::cluster_cidr::{Allocation, BlocksPerNode};
    use plat_crds::condition::DRAINING;
    use plat_crds::node_network::FailedObject;
    use plat_crds::pod_cidr::BlockState;
    use std::time::Duration;

    use crate::facts::{BlockFact, RangeFact, ReportFact};
    use crate::fixtures::{
        NOW, Scene, at, block, created, digest_of, held_block, node, range, report, scene, steps,
    };
    use crate::reason;
    use crate::step::{Step, Why};

    const OLD: &str = "10.244.0.0/24";
    const NEW: &str = "10.9.0.0/24";

    /// A node with a block of a range that is drained, and the annotation.
    fn asked(state: BlockState) -> Scene {
        let old = RangeFact { allocation: Allocation::Draining, ..range("old", "10.244.0.0/16") };
        scene().node(node("n1")).range(old).block(BlockFact {
            drain: true,
            state,
            ..held_block(OLD, "old", "n1")
        })
    }

    /// It has got another one.
    fn replaced(state: BlockState) -> Scene {
        let new = BlockFact { created: at(NOW - 1), ..held_block(NEW, "new", "n1") };
        asked(state).range(range("new", "10.9.0.0/16")).block(new)
    }

    /// The node's agent has applied everything and says so.
    fn says(scene: Scene, held: &[(&str, i64)]) -> Scene {
        let applied = Some(digest_of(&scene.world));
        scene
            .report(ReportFact { applied, ..report("n1", held) })
            .with(|s| s.memory.ledger.update(&s.world.ranges, &s.world.blocks))
    }

    /// What happens to the old block.
    fn fate(scene: &Scene) -> Option<(Why, Option<BlockState>)> {
        let name = block(OLD).object_name();
        scene.plan().steps.into_iter().find_map(|step| match step {
            Step::ChangeBlock { object, change, why, .. } if *object.name == *name => {
                Some((why, change.state))
            }
            _ => None,
        })
    }

    fn verdict(scene: &Scene) -> (Option<bool>, &'static str, String) {
        let plan = scene.plan();
        let verdict = plan.verdicts[block(OLD).object_name().as_str()].iter().find(|v| v.type_ == DRAINING);
        verdict.map(|v| (v.status, v.reason, v.message.clone())).unwrap()
    }

    #[test]
    fn a_block_that_is_asked_to_drain_is_replaced_first() {
        let alone = says(asked(BlockState::Active), &[(OLD, 7)]);
        let (status, reason, message) = verdict(&alone);
        assert_eq!((fate(&alone), status, reason), (None, Some(false), reason::NO_REPLACEMENT));
        assert!(message.contains("node n1 gets no IPv4 block"), "{message}");

        let room = says(alone.range(range("new", "10.9.0.0/16")), &[(OLD, 7)]);
        assert_eq!((created(&room.plan()), fate(&room)), (vec![format!("n1 {NEW} new carved")], None));
        assert_eq!(verdict(&room).1, reason::REPLACEMENT_COMES);

        let unheard = says(replaced(BlockState::Active), &[(OLD, 7)]);
        assert_eq!((fate(&unheard), created(&unheard.plan())), (None, vec![]), "not taken up yet");
        let full = says(replaced(BlockState::Active), &[(OLD, 7), (NEW, 253)]);
        assert_eq!((fate(&full), created(&full.plan()).len()), (None, 1), "no room in it");
        let ready = says(replaced(BlockState::Active), &[(OLD, 7), (NEW, 0)]);
        assert_eq!(fate(&ready), Some((Why::Asked, Some(BlockState::Draining))));
    }

    #[test]
    fn a_draining_block_goes_only_once_the_node_says_that_it_has_stopped_and_has_no_lease_left() {
        let scene = |held: &[(&str, i64)]| says(replaced(BlockState::Draining), held);
        assert_eq!(fate(&scene(&[(OLD, 1), (NEW, 0)])), None, "a pod has a lease");
        assert_eq!(verdict(&scene(&[(OLD, 1), (NEW, 0)])).1, reason::ASKED);
        let empty = scene(&[(OLD, 0), (NEW, 9)]);
        assert_eq!(fate(&empty), Some((Why::Unused, Some(BlockState::Quarantined))));
        let unseen = empty.clone().report(report("n1", &[(OLD, 0), (NEW, 9)]));
        assert_eq!(fate(&unseen), None, "the node has not seen that it drains");
        let mut uncounted = (*empty.world.reports["n1"]).clone();
        uncounted.held[0].used = None;
        assert_eq!(fate(&empty.clone().report(uncounted)), None, "the node cannot tell");
        let returned = empty.block(BlockFact {
            drain: true,
            state: BlockState::Draining,
            node_uid: Some("before".into()),
            ..held_block(OLD, "old", "n1")
        });
        let returned = says(returned, &[(OLD, 0), (NEW, 9)]);
        assert_eq!(fate(&returned), Some((Why::Readopt, None)), "the node is another object: first that");
    }

    #[test]
    fn a_node_that_could_not_apply_something_else_still_drains_and_one_that_could_not_apply_this_does_not() {
        let scene = says(replaced(BlockState::Draining), &[(OLD, 0), (NEW, 9)]);
        for (name, expected) in [(NEW, Some((Why::Unused, Some(BlockState::Quarantined)))), (OLD, None)] {
            let mut report = (*scene.world.reports["n1"]).clone();
            report.applied.as_mut().unwrap().remove(&format!("uid-{name}"), 1);
            let name = block(name).object_name();
            report.failed = [FailedObject { name, reason: "R".into(), message: "m".into() }].into();
            assert_eq!(fate(&scene.clone().report(report)), expected);
        }
    }

    #[test]
    fn taking_the_annotation_off_a_block_with_leases_turns_it_back() {
        let kept = BlockFact { state: BlockState::Draining, ..held_block(OLD, "old", "n1") };
        for (held, expected) in [
            (&[(OLD, 3), (NEW, 0)][..], Some((Why::Resume, Some(BlockState::Active)))),
            (&[(OLD, 0), (NEW, 0)], Some((Why::Unused, Some(BlockState::Quarantined)))),
            (&[(OLD, 0), (NEW, 253)], Some((Why::Resume, Some(BlockState::Active)))),
        ] {
            let scene = says(replaced(BlockState::Draining).block(kept.clone()), held);
            assert_eq!(fate(&scene), expected, "{held:?}");
        }
    }

    #[test]
    fn a_block_that_drains_is_leased_from_again_when_the_node_has_nothing_else() {
        let lost = says(asked(BlockState::Draining), &[(OLD, 3)]);
        assert_eq!(fate(&lost), Some((Why::Resume, Some(BlockState::Active))));
    }

    #[test]
    fn a_block_in_quarantine_comes_back_at_once_if_a_lease_turns_up_and_is_not_freed_while_one_may_be_there()
    {
        let resting = |held: &[(&str, i64)]| {
            let scene = replaced(BlockState::Quarantined).block(BlockFact {
                state: BlockState::Quarantined,
                drain: true,
                release_after: Some(at(NOW - 1)),
                ..held_block(OLD, "old", "n1")
            });
            says(scene, held).with(|s| {
                s.memory.quarantined.insert(format!("uid-{OLD}").as_str().into(), Duration::ZERO);
                s.settings.withdrawal_deadline = Duration::ZERO;
            })
        };
        assert_eq!(fate(&resting(&[(OLD, 1), (NEW, 0)])), Some((Why::InUse, Some(BlockState::Draining))));
        let mut uncounted = (*resting(&[(OLD, 0)]).world.reports["n1"]).clone();
        uncounted.held[0].used = None;
        assert_eq!(steps(&resting(&[]).report(uncounted).plan()), [] as [&str; 0]);
    }

    #[test]
    fn a_node_of_which_every_block_is_asked_to_drain_moves_block_by_block_and_ends_with_what_it_needs() {
        let old = |cidr: &str| BlockFact { drain: true, ..held_block(cidr, "old", "n1") };
        let blocks = ["10.244.0.0/24", "10.244.1.0/24", "10.244.2.0/24"];
        let mut scene = asked(BlockState::Active).range(range("new", "10.9.0.0/16"));
        for cidr in blocks {
            scene = scene.block(old(cidr));
        }
        for _ in 0..4 {
            let held: Vec<String> = scene.world.blocks.values().map(|b| b.block.to_string()).collect();
            let held: Vec<_> = held
                .iter()
                .map(|cidr| (cidr.as_str(), i64::from(cidr.starts_with("10.244")) * 200))
                .collect();
            scene = says(scene, &held);
            scene = scene.clone().after(&scene.plan());
        }
        let states: Vec<(Block, BlockState)> =
            scene.world.blocks.values().map(|b| (b.block, b.state)).collect();
        let draining = blocks.map(|cidr| (block(cidr), BlockState::Draining));
        assert_eq!(states.len(), 4);
        assert!(draining.iter().all(|expected| states.contains(expected)), "{states:?}");
        assert!(states.contains(&(block(NEW), BlockState::Active)));
    }

    #[test]
    fn each_family_drains_by_itself() {
        let six = BlockFact { drain: true, ..held_block("fd00:1::/64", "six", "n1") };
        let scene = replaced(BlockState::Active).range(range("six", "fd00:1::/64")).block(six);
        let scene = says(scene, &[(OLD, 3), (NEW, 0), ("fd00:1::/64", 3)]);
        let plan = scene.plan();
        assert_eq!(fate(&scene), Some((Why::Asked, Some(BlockState::Draining))));
        assert_eq!(plan.verdicts["fd00-1---64"][0].reason, reason::NO_REPLACEMENT);
    }

    #[test]
    fn a_maximum_that_leaves_no_room_for_a_replacement_says_so() {
        let full =
            RangeFact { blocks_per_node: BlocksPerNode { min: 1, max: 1 }, ..range("new", "10.9.0.0/16") };
        let scene = says(replaced(BlockState::Active).range(full), &[(OLD, 3), (NEW, 253)]);
        let (_, reason, message) = verdict(&scene);
        assert_eq!((fate(&scene), reason), (None, reason::NO_REPLACEMENT));
        assert!(message.contains("blocksPerNode.max of ClusterCIDR new"), "{message}");
    }
}
