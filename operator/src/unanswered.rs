//! Writes whose answer was lost: once the watch shows that they were done, they are told like any other. Pure.
//!
//! Without it a block could change hands without an Event, just because a connection broke at that moment.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::apply::{Done, Learnt, Outcome};
use crate::facts::{BlockFact, Name, RangeFact};
use crate::snapshot::{Clock, Facts};
use crate::step::{Kind, Step};

/// How long an unanswered write is looked for. API servers end requests after a minute.
const LOOK_FOR: Duration = Duration::from_secs(120);

/// Unanswered writes by the object that they write. One that is sent again is told by its own answer, if that says
/// that it was done just now. One that is found done already, or on another version, may well have been done by the
/// first: that is looked for further.
#[derive(Clone, Debug, Default)]
pub struct Unanswered(BTreeMap<(Kind, Name), (Step, Duration)>);

impl Unanswered {
    /// Notes how a step went.
    pub fn note(&mut self, done: &Done, clock: Clock) {
        let target = done.step.target();
        match (&done.outcome, &done.step) {
            (Outcome::Unknown(_), _) => {
                drop(self.0.insert(target, (done.step.clone(), clock.steady + LOOK_FOR)))
            }
            (Outcome::Done, _) | (Outcome::AlreadySo, Step::CreateBlock(_)) => drop(self.0.remove(&target)),
            _ => {}
        }
    }

    /// Those that have turned out to be done.
    pub fn settle(
        &mut self,
        ranges: &Facts<RangeFact>,
        blocks: &Facts<BlockFact>,
        clock: Clock,
    ) -> Vec<Done> {
        let mut done = Vec::new();
        self.0.retain(|_, (step, until)| {
            let learnt = has_happened(step, ranges, blocks);
            let is_over = learnt.is_some() || *until <= clock.steady;
            done.extend(learnt.map(|learnt| Done {
                step: step.clone(),
                outcome: Outcome::Done,
                learnt,
                retry_after: None,
            }));
            !is_over
        });
        done
    }
}

/// What the step's answer would have taught, if the facts show that it was done.
fn has_happened(step: &Step, ranges: &Facts<RangeFact>, blocks: &Facts<BlockFact>) -> Option<Option<Learnt>> {
    let block = |name: &str| blocks.get(name).map(Arc::as_ref);
    match step {
        Step::CreateBlock(new) => {
            let made = block(&new.block.object_name()).filter(|block| block.node == new.node)?;
            Some(Some(Learnt::Block(Box::new(made.clone()))))
        }
        Step::ChangeBlock { object, change, .. } => {
            let state = change.state?;
            let changed =
                block(&object.name).filter(|block| block.uid == object.uid && block.state == state)?;
            (changed.resource_version != object.resource_version).then_some(None)
        }
        Step::DeleteBlock { object, .. } => {
            block(&object.name).is_none_or(|block| block.uid != object.uid).then_some(None)
        }
        Step::CreateRange { name, .. } => {
            ranges.get(name).map(|range| Some(Learnt::Range(Box::new((**range).clone()))))
        }
        Step::RangeStatus { object, new, .. } => {
            ranges.get(&object.name).filter(|range| range.uid == object.uid && range.status == **new)?;
            Some(None)
        }
        Step::BlockStatus { object, new, .. } => {
            let block = block(&object.name).filter(|block| block.uid == object.uid)?;
            (block.status.is_some() && block.unpacked_status() == **new).then_some(None)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{NOW, at, held_block};
    use crate::step::{BlockChange, Version, Why};
    use plat_crds::pod_cidr::BlockState;

    fn clock(second: u64) -> Clock {
        Clock { wall: at(NOW), steady: Duration::from_secs(second) }
    }

    fn quarantine(outcome: Outcome) -> Done {
        let object = Version { name: "10-244-1-0-24".into(), uid: held().uid, resource_version: "1".into() };
        let change = BlockChange { state: Some(BlockState::Quarantined), ..BlockChange::default() };
        let (node, node_uid) = ("n1".into(), "u1".into());
        let step = Step::ChangeBlock { object, node, node_uid, change, why: Why::NodeGone };
        Done { step, outcome, learnt: None, retry_after: None }
    }

    fn held() -> BlockFact {
        BlockFact { resource_version: "1".into(), ..held_block("10.244.1.0/24", "r", "n1") }
    }

    fn facts(block: BlockFact) -> Facts<BlockFact> {
        Arc::new([(block.name.clone(), Arc::new(block))].into())
    }

    #[test]
    fn a_write_without_an_answer_is_told_once_the_watch_shows_it_and_only_once() {
        let resting = BlockFact { state: BlockState::Quarantined, resource_version: "2".into(), ..held() };
        let mut unanswered = Unanswered::default();
        unanswered.note(&quarantine(Outcome::Unknown("no answer".into())), clock(0));
        let mut settle = |block: &BlockFact, second| {
            unanswered.settle(&Facts::default(), &facts(block.clone()), clock(second)).len()
        };
        assert_eq!(settle(&held(), 1), 0, "not done, or not seen yet");
        assert_eq!((settle(&resting, 2), settle(&resting, 3)), (1, 0));
    }

    #[test]
    fn a_write_that_is_sent_again_and_found_done_is_told_once_too() {
        let resting = BlockFact { state: BlockState::Quarantined, resource_version: "2".into(), ..held() };
        let again = [Outcome::Stale("409".into()), Outcome::Missing, Outcome::Refused("429".into())];
        for outcome in again {
            let mut unanswered = Unanswered::default();
            unanswered.note(&quarantine(Outcome::Unknown("no answer".into())), clock(0));
            unanswered.note(&quarantine(outcome), clock(1));
            let mut settle =
                |second| unanswered.settle(&Facts::default(), &facts(resting.clone()), clock(second)).len();
            assert_eq!((settle(2), settle(3)), (1, 0));
        }
        let delete = |outcome| {
            let object = Version { name: held().name, uid: held().uid, resource_version: "2".into() };
            let step = Step::DeleteBlock { object, node: "n1".into(), living: None, unproven: None };
            Done { step, outcome, learnt: None, retry_after: None }
        };
        let mut unanswered = Unanswered::default();
        unanswered.note(&delete(Outcome::Unknown("no answer".into())), clock(0));
        unanswered.note(&delete(Outcome::AlreadySo), clock(1));
        assert_eq!(unanswered.settle(&Facts::default(), &Facts::default(), clock(2)).len(), 1);
    }

    #[test]
    fn a_write_that_is_sent_again_is_told_by_its_own_answer_and_one_that_never_comes_is_forgotten() {
        let resting = BlockFact { state: BlockState::Quarantined, resource_version: "2".into(), ..held() };
        for (then, second) in [(Some(Outcome::Done), 1), (None, 121)] {
            let mut unanswered = Unanswered::default();
            unanswered.note(&quarantine(Outcome::Unknown("no answer".into())), clock(0));
            then.into_iter().for_each(|outcome| unanswered.note(&quarantine(outcome), clock(1)));
            assert_eq!(unanswered.settle(&Facts::default(), &facts(held()), clock(second)).len(), 0);
            assert_eq!(unanswered.settle(&Facts::default(), &facts(resting.clone()), clock(second)).len(), 0);
        }
    }
}
