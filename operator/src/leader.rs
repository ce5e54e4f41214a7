//! One pass: snapshot → plan → (live lists → plan) → statuses → apply → remember. The order is here, the
//! decisions are in [`crate::plan`] and [`crate::status`], the writes in [`crate::apply`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::apply::{Done, Learnt, Outcome, apply};
use crate::facts::{BlockFact, NodeFact, PolicyFact, RangeFact, ReportFact};
use crate::memory::Memory;
use crate::note::{self, Note};
use crate::plan::{Plan, plan, source};
use crate::ranges::{quarantine_of, quarantine_over};
use crate::server::Server;
use crate::snapshot::{Clock, Facts, Foreign, Settings, Snapshot, Source, Tenure};
use crate::status::{self, Chosen};
use crate::step::{Fault, Step};
use crate::unanswered::Unanswered;

/// Statuses are compared at least so often, however many blocks are created.
const STATUSES_WITHIN: Duration = Duration::from_millis(500);
/// Labels that wait for the write budget are looked at again after so long.
pub const LABELS_WAIT: Duration = Duration::from_millis(500);
/// After a pass in which the API server did not answer.
const PAUSE_WHEN_AWAY: Duration = Duration::from_secs(1);

/// What the watches show.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Nodes.
    pub nodes: Facts<NodeFact>,
    /// ClusterCIDRs.
    pub ranges: Facts<RangeFact>,
    /// PodCIDRs.
    pub blocks: Facts<BlockFact>,
    /// RoutingPolicies; none where the kind is not installed.
    pub policies: Facts<PolicyFact>,
    /// NodeNetworks.
    pub reports: Facts<ReportFact>,
    /// Service ranges and API server addresses.
    pub foreign: Arc<Foreign>,
}

/// A leader: its settings and what it remembers between passes.
#[derive(Clone, Debug)]
pub struct Leader {
    settings: Settings,
    memory: Memory,
    faults: BTreeSet<Fault>,
    unanswered: Unanswered,
    /// Steps without an answer that turned out to be done, and are not told of yet.
    late: Vec<Done>,
}

/// What a pass did.
#[derive(Clone, Debug, Default)]
pub struct Pass {
    /// The plan that was carried out, without its steps: they are in `done`.
    pub plan: Plan,
    /// What became of each step.
    pub done: Vec<Done>,
    /// Faults that the pass before did not have.
    pub new_faults: Vec<Fault>,
    /// Events to publish.
    pub notes: Vec<Note>,
    /// Statuses that wait for the write budget or their interval.
    pub status_backlog: usize,
    /// When the next pass is due if nothing changes.
    pub wake_after: Option<Duration>,
    /// Why the live LISTs failed, if they did.
    pub list_error: Option<String>,
    /// For how long the API server then asked not to list again.
    pub list_retry_after: Option<Duration>,
    /// etcd was put back to an earlier time: nothing was done, and every watch must begin anew.
    pub went_back: bool,
}

impl Leader {
    /// A new leader, given the first complete world that it sees.
    pub fn new(settings: Settings, world: &World) -> Leader {
        let nobody_reports = world.reports.values().all(|report| !report.reported);
        let memory = Memory::new(world.blocks.is_empty() && nobody_reports);
        Leader {
            settings,
            memory,
            faults: BTreeSet::new(),
            unanswered: Unanswered::default(),
            late: Vec::new(),
        }
    }

    /// See [`Tenure::is_sole_actor`].
    pub fn is_sole_actor(&self, tenure: Tenure) -> bool {
        // A create whose outcome is unknown may still land: the next leader must not count it out.
        self.memory.pending.is_empty()
            && tenure.is_sole_actor(self.settings.lease_duration, self.memory.fresh_cluster)
    }

    /// Runs one pass. `clock` is read after each wait; `on_progress` is called after each step.
    pub async fn pass<S: Server>(
        &mut self,
        world: &World,
        tenure: impl Fn() -> Tenure,
        clock: impl Fn() -> Clock,
        server: &S,
        on_progress: impl Fn(&Done),
    ) -> Pass {
        let mut pass = Pass::default();
        let (mut plan, mut chosen) = self.decide(world, Source::Cache, tenure(), clock());
        if self.wants_list(&plan, clock()) {
            match server.list().await {
                Ok(live) if live.ranges.went_back(&world.ranges) || live.blocks.went_back(&world.blocks) => {
                    // Everything that was watched or answered is of another history. What vanishes when the
                    // watches begin anew is remembered like any block that vanishes.
                    self.memory.learned_ranges.forget();
                    self.memory.learned_blocks.forget();
                    self.memory.distrust = true;
                    return Pass { went_back: true, ..Pass::default() };
                }
                Ok(live) => {
                    self.memory.learned_ranges.settle(&live.ranges, &world.ranges, clock());
                    self.memory.learned_blocks.settle(&live.blocks, &world.blocks, clock());
                    self.memory.distrust = false;
                    (plan, chosen) = self.decide(world, Source::Live, tenure(), clock());
                }
                Err(error) => {
                    pass.list_retry_after = error.wait();
                    pass.list_error = Some(error.to_string());
                }
            }
        }
        let now = clock();
        // Thousands of nodes make thousands of steps: they are there once.
        let mut steps = std::mem::take(&mut plan.steps);
        steps.retain(|step| self.memory.is_ripe(&step.retry_key(), now));
        let relabels =
            |step: &Step| matches!(step, Step::ChangeBlock { change, .. } if change.is_labels_only());
        let planned = steps.len();
        steps.retain(|step| !relabels(step) || self.memory.may_relabel(now));
        if steps.len() < planned {
            plan.wake_at_the_latest(LABELS_WAIT);
        }
        steps.extend(chosen.steps);
        pass.done = apply(steps, server, on_progress).await;
        self.move_cursors(&plan, world, &pass.done);
        for done in &pass.done {
            self.remember(done, clock());
            self.unanswered.note(done, clock());
        }
        let late = std::mem::take(&mut self.late);
        pass.notes = late.iter().chain(&pass.done).flat_map(note::of_step).collect();
        pass.new_faults = self.note_faults(&plan);
        pass.notes.extend(pass.new_faults.iter().map(note::of_fault));
        pass.status_backlog = chosen.backlog;
        pass.wake_after = self.next_wake(&plan, chosen.wake_after, &pass, clock());
        pass.plan = plan;
        pass
    }

    fn decide(&mut self, world: &World, source: Source, tenure: Tenure, clock: Clock) -> (Plan, Chosen) {
        let ranges = self.memory.learned_ranges.over(&world.ranges);
        let blocks = self.memory.learned_blocks.over(&world.blocks);
        self.memory.observe(&blocks, |block| quarantine_of(&ranges, &block.range), clock);
        self.memory.observe_groups(&ranges, &world.nodes, &blocks);
        self.memory.observe_reports(&world.nodes, &world.reports, clock);
        self.memory.observe_losses(&world.reports, &blocks, |block| quarantine_over(&ranges, block), clock);
        self.memory.ledger.update(&ranges, &blocks);
        self.late.append(&mut self.unanswered.settle(&ranges, &blocks, clock));
        let snapshot = Snapshot {
            clock,
            source,
            settings: &self.settings,
            tenure,
            nodes: world.nodes.clone(),
            ranges,
            blocks: source::follow(blocks, &world.nodes, self.settings.ipam_source),
            policies: world.policies.clone(),
            reports: world.reports.clone(),
            foreign: world.foreign.clone(),
            memory: &self.memory,
        };
        let plan = plan(&snapshot);
        let comes_again = source == Source::Cache && self.wants_list(&plan, clock);
        let wait = self.statuses_wait(&plan, clock);
        let nodes = world.nodes.len();
        let due = (!self.settings.cleanup && !comes_again && wait.is_none())
            .then(|| status::due(status::writes(&snapshot, &plan), &plan, nodes, &self.memory, clock));
        self.memory.observe_spare(&plan.spare, clock);
        let Some(due) = due else {
            self.memory.statuses_left_since.get_or_insert(clock.steady);
            return (plan, Chosen { wake_after: wait, ..Chosen::default() });
        };
        self.memory.statuses_left_since = None;
        let chosen = due.choose(&mut self.memory, clock);
        (plan, chosen)
    }

    /// How long statuses wait beside new blocks, which somebody waits for. Comparing those of thousands of nodes takes
    /// longer than planning a block; and a range's counters would be written before its new blocks count, and again after.
    fn statuses_wait(&self, plan: &Plan, clock: Clock) -> Option<Duration> {
        let is_urgent = plan.steps.iter().any(|step| matches!(step, Step::CreateBlock(_)));
        let due = self.memory.statuses_left_since.unwrap_or(clock.steady) + STATUSES_WITHIN;
        Some(due.saturating_sub(clock.steady)).filter(|wait| is_urgent && !wait.is_zero())
    }

    /// Whether ranges and blocks must be listed before anything is done.
    fn wants_list(&self, plan: &Plan, clock: Clock) -> bool {
        plan.wants_live || self.memory.distrust || self.is_overdue(clock)
    }

    fn is_overdue(&self, clock: Clock) -> bool {
        self.memory.learned_blocks.is_overdue(clock) || self.memory.learned_ranges.is_overdue(clock)
    }

    /// Carving goes on behind what was carved; where a create was refused or not sent, it stays, or a refusal that
    /// lasts would walk through the whole range.
    fn move_cursors(&mut self, plan: &Plan, world: &World, done: &[Done]) {
        let failed = |done: &&Done| !done.outcome.is_success() && !matches!(done.outcome, Outcome::Taken(_));
        let stays: BTreeSet<_> = done
            .iter()
            .filter(failed)
            .filter_map(|done| match &done.step {
                Step::CreateBlock(new) => world.ranges.get(&new.range).map(|range| range.uid.clone()),
                _ => None,
            })
            .collect();
        let cursors = plan.cursors.iter().filter(|(range, _)| !stays.contains(*range));
        self.memory.cursors.extend(cursors.map(|(range, cursor)| (range.clone(), *cursor)));
        let of_groups = plan.group_cursors.iter().filter(|((range, _), _)| !stays.contains(range));
        self.memory.group_cursors.extend(of_groups.map(|(group, cursor)| (group.clone(), *cursor)));
    }

    fn remember(&mut self, done: &Done, clock: Clock) {
        match &done.learnt {
            Some(Learnt::Block(fact)) => self.memory.learned_blocks.fact((**fact).clone(), clock),
            Some(Learnt::Range(fact)) => self.memory.learned_ranges.fact((**fact).clone(), clock),
            Some(Learnt::Released { object, node }) => {
                self.memory.block_released(&object.uid, &object.name, node, clock);
            }
            None => {}
        }
        if let (Step::ChangeBlock { object, change, .. }, Outcome::Done | Outcome::Unknown(_)) =
            (&done.step, &done.outcome)
            && let Some(Some(at)) = change.release_after
        {
            self.memory.release_written(&object.uid, &object.name, at);
        }
        let target = done.step.retry_key();
        match (&done.outcome, &done.step) {
            (Outcome::Done | Outcome::AlreadySo, _) => self.memory.succeeded(&target),
            (Outcome::Unknown(_), Step::CreateBlock(new)) => {
                self.memory.create_unknown(new, clock);
                self.memory.failed(target, false, clock);
            }
            (Outcome::Unknown(_), Step::DeleteBlock { object, .. }) => {
                self.memory.release_unknown(&object.uid);
                self.memory.failed(target, false, clock);
            }
            (Outcome::Taken(_), _) => self.memory.distrust = true,
            (Outcome::Missing, _) => self.memory.failed(target, true, clock),
            (Outcome::Stale(_) | Outcome::Refused(_) | Outcome::Unknown(_), _) => {
                self.memory.failed(target, false, clock);
            }
            (Outcome::NotLeader | Outcome::Skipped, _) => {}
        }
        if let Some(wait) = done.retry_after {
            self.memory.asked_to_wait(&done.step.retry_key(), wait, clock);
        }
    }

    /// The faults that are new. Words alone do not make one new: they may hold a changing name.
    fn note_faults(&mut self, plan: &Plan) -> Vec<Fault> {
        let known: BTreeSet<_> = self.faults.iter().map(|fault| (&fault.object, fault.reason)).collect();
        let new = plan.faults.iter().filter(|fault| !known.contains(&(&fault.object, fault.reason)));
        let new = new.cloned().collect();
        self.faults = plan.faults.iter().cloned().collect();
        new
    }

    fn next_wake(
        &self,
        plan: &Plan,
        statuses: Option<Duration>,
        pass: &Pass,
        clock: Clock,
    ) -> Option<Duration> {
        if pass.list_error.is_some() || pass.done.iter().any(|done| done.outcome == Outcome::Skipped) {
            let asked = pass.done.iter().filter_map(|done| done.retry_after).chain(pass.list_retry_after);
            return Some(asked.fold(PAUSE_WHEN_AWAY, Duration::max));
        }
        // What was learnt may allow more steps. A block's status allows none that cannot wait for its watch.
        let telling = |done: &Done| done.learnt.is_some() && !matches!(done.step, Step::BlockStatus { .. });
        let at_once = pass.done.iter().any(telling) || self.memory.distrust;
        let remembered = self.memory.wakes_at(clock).map(|at| at.saturating_sub(clock.steady));
        let times = [at_once.then_some(Duration::ZERO), plan.wake_after, statuses, remembered];
        times.into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{NOW, at, range, scene, settings};
    use crate::server::{CallError, Live, Patch, Preconditions};
    use crate::snapshot::Start;
    use crate::step::Kind;
    use serde_json::Value;
    use std::cell::{Cell, RefCell};

    /// Refuses every create of a PodCIDR, and knows which names were asked for, and how often for lists.
    #[derive(Default)]
    struct Refuses {
        creates: RefCell<Vec<String>>,
        lists: Cell<usize>,
    }

    impl Server for Refuses {
        async fn get(&self, _: Kind, _: &str) -> Result<Value, CallError> {
            Err(CallError::NotFound)
        }
        async fn list(&self) -> Result<Live, CallError> {
            self.lists.set(self.lists.get() + 1);
            Err(CallError::Unknown("no list".to_owned()))
        }
        async fn create(&self, kind: Kind, object: Value) -> Result<Value, CallError> {
            if kind == Kind::PodCIDR {
                self.creates.borrow_mut().push(object["metadata"]["name"].as_str().unwrap().to_owned());
            }
            Err(CallError::Refused("a webhook says no".to_owned()))
        }
        async fn patch(&self, _: Kind, _: &str, _: Patch) -> Result<Value, CallError> {
            Err(CallError::NotLeader)
        }
        async fn delete(&self, _: Kind, _: &str, _: Preconditions<'_>) -> Result<(), CallError> {
            Err(CallError::NotFound)
        }
    }

    #[tokio::test]
    async fn a_create_that_is_refused_is_tried_later_and_later_and_walks_through_no_range() {
        let scene = scene().range(range("r", "10.244.0.0/16")).nodes(&["n1"]).all_report();
        let mut leader = Leader::new(settings(), &scene.world);
        let server = Refuses::default();
        let tenure = || Tenure { held_for: Duration::from_secs(3600), start: Start::HandedOver };
        for pass in 0..300 {
            let clock = Clock { wall: at(NOW), steady: Duration::from_millis(3_600_000 + 200 * pass) };
            leader.pass(&scene.world, tenure, || clock, &server, |_| {}).await;
        }
        let (asked, lists) = (server.creates.into_inner(), server.lists.into_inner());
        assert_eq!(lists, 0, "nothing is in doubt");
        assert!(asked.iter().all(|name| name == "10-244-0-0-24"), "{asked:?}");
        assert!((5..=15).contains(&asked.len()), "{} creates in a minute", asked.len());
    }
}
