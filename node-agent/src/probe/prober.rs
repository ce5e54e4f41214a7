//! The task that sends probes and answers those of others, beside the loop: it takes the plan of each pass, and wakes the
//! loop when a verdict changes, not for every round trip.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use plat_cni::boot;
use plat_crds::block::Block;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::findings::{Counters, Findings};
use super::plan::Plan;
use super::schedule::{Now, Pace, Schedule};
use super::track::Outcome;
use super::wire::{self, Served};

/// What the loop holds of the probes.
pub struct Probing {
    plan: watch::Sender<Arc<Plan>>,
    findings: watch::Receiver<Findings>,
}

/// The task.
pub struct Prober {
    plan: watch::Receiver<Arc<Plan>>,
    findings: watch::Sender<Findings>,
    port: u16,
    pace: Pace,
}

/// Both ends.
pub fn probing(port: u16, pace: Pace) -> (Probing, Prober) {
    let (plan_in, plan) = watch::channel(Arc::default());
    let (findings_in, findings) = watch::channel(Findings::default());
    (Probing { plan: plan_in, findings }, Prober { plan, findings: findings_in, port, pace })
}

impl Probing {
    /// Passes on what there is to probe.
    pub fn follow(&self, plan: Arc<Plan>) {
        self.plan.send_replace(plan);
    }

    /// What is known now.
    pub fn findings(&mut self) -> Findings {
        self.findings.borrow_and_update().clone()
    }

    /// Another receiver of what is known.
    pub fn subscribe(&self) -> watch::Receiver<Findings> {
        self.findings.clone()
    }

    /// Waits until a verdict has changed since they were asked for. Loses nothing when dropped midway.
    pub async fn changed(&mut self) {
        match self.findings.changed().await {
            Ok(()) => self.findings.mark_changed(),
            // The task has ended, as the program does.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Prober {
    /// Runs until the loop has ended.
    pub async fn run(mut self) {
        let secret = RandomState::new();
        let mut schedule = Schedule::new(self.pace);
        let mut responders = Responders::default();
        let mut flights = FuturesUnordered::new();
        let mut counters = Counters::default();
        loop {
            let now = now();
            while let Some(shot) = schedule.take(now) {
                counters.sent += 1;
                let nonce = secret.hash_one(counters.sent);
                let answer = wire::ask(shot, self.port, nonce, self.pace.timeout);
                flights.push(async move { (shot.block, answer.await) });
            }
            let wait = schedule.next(now).saturating_sub(now.boot).max(Duration::from_millis(1));
            let news = tokio::select! {
                changed = self.plan.changed() => match changed {
                    Ok(()) => {
                        let plan = self.plan.borrow_and_update().clone();
                        responders.follow(&plan, self.port, &self.plan);
                        schedule.replace(plan);
                        false
                    }
                    Err(_) => return,
                },
                Some((block, (size, outcome))) = flights.next(), if !flights.is_empty() => {
                    counters.count(outcome);
                    schedule.tell(&block, size, outcome, self::now())
                }
                () = sleep(wait) => false,
            };
            counters.answers = responders.served.answers();
            counters.ignored = responders.served.ignored();
            self.publish(Findings { counters, ..schedule.findings() }, news);
        }
    }

    /// Wakes the loop for news, and for the end of the first round: before that nothing is known.
    fn publish(&self, findings: Findings, news: bool) {
        self.findings.send_if_modified(|last| {
            let first = last.summary.rounds == 0 && findings.summary.rounds > 0;
            *last = findings;
            news || first
        });
    }
}

impl Counters {
    fn count(&mut self, outcome: Outcome) {
        let counter = match outcome {
            Outcome::Answered(_) => &mut self.answered,
            Outcome::Refused => &mut self.refused,
            Outcome::Lost | Outcome::NoRoute => &mut self.lost,
            Outcome::Unsent => return,
        };
        *counter += 1;
    }
}

/// A task for each block of this node.
#[derive(Default)]
struct Responders {
    tasks: JoinSet<()>,
    of: BTreeMap<Block, AbortHandle>,
    served: Arc<Served>,
}

impl Responders {
    fn follow(&mut self, plan: &Plan, port: u16, plans: &watch::Receiver<Arc<Plan>>) {
        self.of.retain(|block, task| {
            let stays = plan.own.contains(block);
            if !stays {
                task.abort();
            }
            stays
        });
        for block in &plan.own {
            self.of.entry(*block).or_insert_with(|| {
                self.tasks.spawn(wire::respond(*block, port, plans.clone(), self.served.clone()))
            });
        }
        // What was ended is not kept.
        while self.tasks.try_join_next().is_some() {}
    }
}

fn now() -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { boot: Duration::from_millis(boot::boot_ms()), wall }
}
