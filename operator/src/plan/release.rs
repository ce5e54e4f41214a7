//! Quarantined blocks: when they become free. A block is freed once
//!
//! 1. its time (`spec.releaseAfter`) is over by the wall clock, and this leader has itself watched the quarantine by
//!    a clock that never jumps: for all of it if it wrote that time, so that its own wall clock alone frees
//!    nothing; for a while (`--quarantine-watch-seconds`) if somebody else did, as nobody can tell a former
//!    leader's wrong clock from a quarantine that began long ago; and
//! 2. every live node has reported that it acted on the quarantine, so that nobody routes the block to its
//!    former node any more ([`Carriers::silent`]); or the deadline has passed on both clocks.
//!
//! A new leader begins with an empty ledger, in which everything that exists has entered with the first sum.
//! Agents at rest have reported just that sum, which proves all of it at once; others prove it with their next
//! report. So nothing of the proof is written down, and a change of leaders can only make a block wait longer.

use std::time::Duration;

use super::Planner;
use crate::carriers::Carriers;
use crate::facts::{BlockFact, NodeFact};
use crate::ranges::quarantine_of;
use crate::snapshot::Snapshot;
use crate::step::{BlockChange, Step, Why, version};

impl Planner<'_> {
    /// Frees a quarantined block of a node that is gone, or of one that lives and has given it back; or says when to
    /// look again.
    pub(super) fn free_in_time(&mut self, block: &BlockFact, living: Option<&NodeFact>) {
        let Some(rest) = rest(block, self.snapshot) else {
            let change =
                BlockChange { release_after: Some(Some(self.release_time(block))), ..BlockChange::default() };
            self.change_as_held(block, change, Why::Refresh);
            return;
        };
        if !rest.time.is_zero() {
            self.wake_after(rest.time);
            return;
        }
        let unproven = self.carriers.get_or_init(|| Carriers::of(self.snapshot)).silent(block);
        if unproven.is_some() && !rest.deadline.is_zero() {
            self.plan.awaiting_withdrawal += 1;
            self.wake_after(rest.deadline);
            return;
        }
        let (object, node) = (version(block), block.node.clone());
        let living = living.map(|node| node.uid.clone());
        self.plan.steps.push(Step::DeleteBlock { object, node, living, unproven });
    }
}

/// What a quarantined block still waits for, in words.
pub fn waits_for(block: &BlockFact, carriers: &Carriers, snapshot: &Snapshot) -> String {
    let (Some(rest), Some(at)) = (rest(block, snapshot), block.release_after) else {
        return "it rests, and gets its time of release at once".to_owned();
    };
    let Some(silent) = carriers.silent(block).filter(|_| !rest.deadline.is_zero()) else {
        return format!("it rests until {at}; no live node routes to it");
    };
    // No count of nodes before it matters: each change of words is a write that every agent sees.
    if !rest.time.is_zero() {
        return format!(
            "it rests until {at}, and until every live node has reported that it withdrew its route"
        );
    }
    let deadline = at.checked_add(snapshot.settings.withdrawal_deadline).unwrap_or(at);
    format!(
        "its rest is over, but {silent} have not reported yet that they withdrew their route to it; it is freed without that at about {deadline}"
    )
}

/// The time that a quarantined block has yet to rest.
struct Rest {
    /// Before it may be freed at all.
    time: Duration,
    /// Before it may be freed unproven.
    deadline: Duration,
}

/// `None` if it has no time of release yet.
fn rest(block: &BlockFact, snapshot: &Snapshot) -> Option<Rest> {
    let clock = snapshot.clock;
    let release_after = block.release_after?;
    let quarantine = quarantine_of(&snapshot.ranges, &block.range);
    let to_watch = match snapshot.memory.wrote_release(block) {
        true => quarantine,
        false => snapshot.settings.quarantine_watch.min(quarantine),
    };
    let seen_since = snapshot.memory.quarantined.get(&block.uid).copied().unwrap_or(clock.steady);
    let watched = clock.steady.saturating_sub(seen_since);
    let after = |more: Duration| {
        let by_wall = clock.until(release_after.checked_add(more).unwrap_or(release_after));
        by_wall.max((to_watch + more).saturating_sub(watched))
    };
    Some(Rest { time: after(Duration::ZERO), deadline: after(snapshot.settings.withdrawal_deadline) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{Health, ReportFact};
    use crate::fixtures::{NOW, Scene, at, held_block, node, range, report, scene, steps};
    use crate::ledger::Ledger;
    use plat_crds::condition::{self, CONVERGED, READY};
    use plat_crds::digest::Digest;
    use plat_crds::node_network::FailedObject;
    use plat_crds::pod_cidr::BlockState;

    const NAME: &str = "10-244-9-0-24";

    fn sum(scene: &Scene) -> Digest {
        let blocks = scene.world.blocks.values().map(|b| (&*b.uid, b.generation));
        Digest::of(blocks.chain(scene.world.ranges.values().map(|r| (&*r.uid, r.generation))))
    }

    /// n1 and n2 live, `gone` has left. Answers the scene at the end of the quarantine, watched for long, and
    /// the sums before and after the change to `Quarantined`.
    fn after_quarantine() -> (Scene, Digest, Digest) {
        let block = held_block("10.244.9.0/24", "r", "gone");
        let before = scene().range(range("r", "10.244.0.0/16")).nodes(&["n1", "n2"]).block(block.clone());
        let old = sum(&before);
        let resting = BlockFact {
            state: BlockState::Quarantined,
            generation: 2,
            release_after: Some(at(NOW - 1)),
            ..block
        };
        let mut after = before.clone().block(resting);
        for world in [&before.world, &after.world] {
            after.memory.ledger.update(&world.ranges, &world.blocks);
        }
        after.memory.quarantined.insert("uid-10.244.9.0/24".into(), Duration::from_secs(60));
        let new = sum(&after);
        (after, old, new)
    }

    fn says(node: &str, sum: Digest) -> ReportFact {
        ReportFact { applied: Some(sum), seen: Some(sum), ..report(node, &[]) }
    }

    /// Whether the block is freed now, and with whom unproven.
    fn freed(scene: &Scene) -> Option<Option<String>> {
        scene.plan().steps.into_iter().find_map(|step| match step {
            Step::DeleteBlock { unproven, .. } => Some(unproven.map(|silent| silent.to_string())),
            _ => None,
        })
    }

    #[test]
    fn a_block_is_freed_once_every_live_node_has_said_that_it_saw_the_quarantine() {
        let (scene, old, new) = after_quarantine();
        let proven = scene.clone().report(says("n1", new)).report(says("n2", new));
        assert_eq!(freed(&proven), Some(None));
        let late = proven.clone().report(says("n2", old));
        assert_eq!((freed(&late), late.plan().awaiting_withdrawal), (None, 1));
        let unknown = proven.clone().report(says("n2", Digest::of([("x", 1)])));
        assert_eq!(freed(&unknown), None, "a sum that nobody knows proves nothing");
        for health in [Health::NotReady, Health::Lost] {
            let away = late.clone().node(NodeFact { health, ..node("n2") });
            assert_eq!(freed(&away), Some(None), "a node that is not live is not waited for");
        }
        let never = late.report(ReportFact { reported: false, ..report("n2", &[]) });
        assert_eq!(freed(&never), None, "it may have an agent, whose report was deleted");
        let never = never.with(|s| {
            s.memory.mute.insert("n2".into(), s.clock.steady - Duration::from_secs(600));
        });
        assert_eq!(freed(&never), Some(None), "it has none");
    }

    #[test]
    fn the_wait_for_silent_nodes_ends_at_the_deadline_on_both_clocks_and_they_are_named() {
        let (scene, old, new) = after_quarantine();
        let late = scene.report(says("n1", new)).report(says("n2", old));
        let case = |wall: i64, watched: u64| {
            let scene = late.clone().with(|s| {
                s.clock.wall = at(NOW - 1 + wall);
                let since = s.clock.steady - Duration::from_secs(watched);
                s.memory.quarantined.insert("uid-10.244.9.0/24".into(), since);
            });
            (freed(&scene), scene.plan().wake_after.map(|wait| wait.as_secs()))
        };
        assert_eq!(case(599, 3000), (None, Some(1)));
        assert_eq!(case(9999, 659), (None, Some(1)), "a leader of today watches for itself");
        assert_eq!(case(600, 660), (Some(Some("1 of 2 live nodes (n2)".to_owned())), None));
    }

    #[test]
    fn a_wall_clock_that_jumps_frees_no_block_whose_time_of_release_this_leader_wrote() {
        let (scene, _, new) = after_quarantine();
        let scene = scene.report(says("n1", new)).report(says("n2", new));
        let uid = "uid-10.244.9.0/24";
        let case = |written: i64, watched: u64| {
            let jumped = scene.clone().with(|s| {
                s.memory.release_written(&uid.into(), &NAME.into(), at(written));
                s.memory.quarantined.insert(uid.into(), s.clock.steady - Duration::from_secs(watched));
            });
            (freed(&jumped), jumped.plan().wake_after.map(|wait| wait.as_secs()))
        };
        assert_eq!(case(NOW - 1, 70), (None, Some(830)));
        assert_eq!(case(NOW - 1, 900), (Some(None), None));
        assert_eq!(case(NOW - 900, 70), (Some(None), None), "somebody has set another time since");
    }

    #[test]
    fn a_new_leader_believes_agents_at_rest_at_once_and_others_with_their_next_report() {
        let (scene, old, new) = after_quarantine();
        let newly = scene.report(says("n1", new)).report(says("n2", old)).with(|s| {
            s.memory.ledger = Ledger::default();
            s.memory.ledger.update(&s.world.ranges, &s.world.blocks);
        });
        assert_eq!(freed(&newly), None);
        assert_eq!(freed(&newly.report(says("n2", new))), Some(None));
    }

    #[test]
    fn a_node_on_which_much_fails_proves_its_withdrawals_all_the_same() {
        let (scene, old, new) = after_quarantine();
        let failing = |reason: &str, name: &str| FailedObject {
            name: name.to_owned(),
            reason: reason.to_owned(),
            message: "m".to_owned(),
        };
        let n2 = |seen, failed: FailedObject, names_not_all| ReportFact {
            seen: Some(seen),
            failed: [failed].into(),
            names_not_all,
            ..says("n2", Digest::of([("whatever", 1)]))
        };
        let scene = scene.report(says("n1", new));
        for (report, expected) in [
            (n2(new, failing("NotOnLink", "10-244-1-0-24"), true), Some(None)),
            (n2(old, failing("NotOnLink", "10-244-1-0-24"), true), None),
            (n2(new, failing("NotWithdrawn", NAME), false), None),
            (n2(new, failing("NotWithdrawn", "10-244-1-0-24"), false), Some(None)),
            (n2(new, failing("NotWithdrawn", "10-244-1-0-24"), true), None),
        ] {
            assert_eq!(freed(&scene.clone().report(report.clone())), expected, "{report:?}");
        }
        // An agent of before says what it carries, and names the rest.
        let block = held_block("10.244.1.0/24", "r", "n1");
        let mut scene = scene.block(block);
        scene.memory.ledger.update(&scene.world.ranges, &scene.world.blocks);
        let whole = sum(&scene);
        let mut part = whole;
        part.remove("uid-10.244.1.0/24", 1);
        let twice = [failing("NotOnLink", "10-244-1-0-24"), failing("KernelRefused", "10-244-1-0-24")];
        let older = ReportFact { applied: Some(part), failed: twice.into(), ..report("n2", &[]) };
        assert_eq!(freed(&scene.report(says("n1", whole)).report(older)), Some(None));
    }

    #[test]
    fn a_drained_block_waits_for_its_own_node_too() {
        let (scene, old, new) = after_quarantine();
        let first = BlockFact { created: at(NOW - 900), ..held_block("10.244.1.0/24", "r", "gone") };
        let mut scene = scene.block(first).node(node("gone"));
        scene.memory.ledger.update(&scene.world.ranges, &scene.world.blocks);
        let whole = sum(&scene);
        let _ = (old, new);
        let late = scene.report(says("n1", whole)).report(says("n2", whole)).report(says("gone", old));
        assert_eq!(freed(&late), None);
        assert_eq!(freed(&late.report(says("gone", whole))), Some(None));
    }

    #[test]
    fn what_a_quarantined_block_waits_for_can_be_read_from_it() {
        let (scene, old, new) = after_quarantine();
        let both = scene.report(says("n1", new)).report(says("n2", new));
        let read = |scene: &Scene| {
            let (snapshot, plan) = (scene.snapshot(), scene.plan());
            assert_eq!(steps(&plan).iter().filter(|step| **step == "block_status").count(), 0);
            let status = crate::status::writes(&snapshot, &plan).find_map(|write| match write.step {
                Step::BlockStatus { object, new, .. } if &*object.name == NAME => Some(new),
                _ => None,
            });
            let conditions = status.unwrap().conditions;
            let message = |type_: &str| condition::find(&conditions, type_).unwrap().message.clone();
            (message(READY), message(CONVERGED))
        };
        let early = |scene: &Scene| scene.clone().with(|s| s.clock.wall = at(NOW - 600));
        let late = both.clone().report(says("n2", old));
        let (ready, converged) = read(&early(&late));
        assert!(ready.ends_with("it rests until 2027-01-15T07:59:59Z, and until every live node has reported that it withdrew its route"), "{ready}");
        assert_eq!(
            converged,
            "1 of 2 live nodes (n2) have not reported yet that they withdrew their route to it"
        );
        let (ready, converged) = read(&early(&both));
        assert!(ready.ends_with("it rests until 2027-01-15T07:59:59Z; no live node routes to it"), "{ready}");
        assert_eq!(converged, "no live node routes to it");
        let (ready, _) = read(&late);
        assert!(
            ready.contains("1 of 2 live nodes (n2)") && ready.contains("at about 2027-01-15T08:09:59Z"),
            "{ready}"
        );
    }
}
