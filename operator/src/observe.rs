//! Watches, and what they have shown so far. Objects become facts as they arrive; nothing else is kept.
//!
//! A watch that fails begins anew; what it has shown stays until its new LIST is complete. An object that cannot
//! be read becomes a fact with a problem and stops nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::jiff::Timestamp;
use kube::core::DeserializeGuard;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use plat_crds::node_network::Incident;
use plat_crds::{ClusterCIDR, Family, NodeNetwork, PodCIDR, RoutingPolicy, growth};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use tracing::{info, warn};

use crate::facts::{BlockFact, Fact, Held, Name, NodeFact, PolicyFact, RangeFact, ReportFact, new_incidents};
use crate::kube_server::{LONGEST_WAIT, chain};
use crate::leader::World;
use crate::node_view::NodeView;
use crate::snapshot::{Facts, Foreign};

/// A watch that failed is tried again after this long, then twice as long, up to [`MAX_WAIT`].
const MIN_WAIT: Duration = Duration::from_millis(200);
/// Longest wait between tries: how long the operator may sleep on after the API server has come back.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// Longest wait between tries while the kind's CRD is missing: at first install it is there in a moment.
const MAX_WAIT_FOR_CRD: Duration = Duration::from_secs(1);
/// Objects per page of a LIST. A Node with its images has some 15 KiB, and a page is in memory more than once.
const PAGE: u32 = 100;
/// A kind of a newer chart than the one before: the operator works without it.
const OPTIONAL: &str = "RoutingPolicy";
/// Failures in a row after which a watch is named in the log again.
const SAY_AGAIN: u32 = 12;

/// What the watches have shown.
#[derive(Debug, Default)]
pub struct Observed {
    state: Mutex<State>,
    changed: Notify,
    restart: Notify,
}

#[derive(Debug, Default)]
struct State {
    nodes: Mirror<NodeFact>,
    ranges: Mirror<RangeFact>,
    blocks: Mirror<BlockFact>,
    policies: Mirror<PolicyFact>,
    reports: Mirror<ReportFact>,
    foreign: Arc<Foreign>,
    /// The most urgent change since the last look.
    pending: Option<Urgency>,
}

/// How soon a change must be acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// A report or a status: counters, mostly. Many come at once.
    Soon,
    /// Anything that may need a block, or an address to be copied.
    Now,
}

/// Facts of one kind.
#[derive(Debug)]
struct Mirror<F> {
    facts: Facts<F>,
    /// A LIST that is under way.
    listing: Option<BTreeMap<Name, Arc<F>>>,
    complete: bool,
}

impl<F> Default for Mirror<F> {
    fn default() -> Self {
        Mirror { facts: Arc::default(), listing: None, complete: false }
    }
}

impl<F: Fact> Mirror<F> {
    /// Takes one event in; answers how urgent the change is, if there is one.
    fn apply<K>(
        &mut self,
        event: Event<K>,
        read: impl Fn(&K) -> Option<F>,
        urgency: fn(Option<&F>, Option<&F>) -> Urgency,
    ) -> Option<Urgency> {
        match event {
            Event::Init => {
                self.listing = Some(BTreeMap::new());
                None
            }
            Event::InitApply(object) => {
                if let (Some(fact), Some(listing)) = (read(&object), &mut self.listing) {
                    listing.insert(fact.name().clone(), Arc::new(fact));
                }
                None
            }
            Event::InitDone => {
                let listed = self.listing.take()?;
                let first = !std::mem::replace(&mut self.complete, true);
                let changed = first || listed != *self.facts;
                self.facts = Arc::new(listed);
                changed.then_some(Urgency::Now)
            }
            Event::Apply(object) => {
                let fact = read(&object)?;
                let old = self.facts.get(fact.name());
                if old.is_some_and(|old| **old == fact) {
                    return None;
                }
                let urgency = urgency(old.map(|old| &**old), Some(&fact));
                Arc::make_mut(&mut self.facts).insert(fact.name().clone(), Arc::new(fact));
                Some(urgency)
            }
            Event::Delete(object) => {
                let fact = read(&object)?;
                let old = Arc::make_mut(&mut self.facts).remove(fact.name())?;
                Some(urgency(Some(&*old), None))
            }
        }
    }
}

impl Observed {
    /// What the watches show, once every one of them has been complete; `None` before. Whatever happened up
    /// to now is in it.
    pub fn world(&self) -> Option<World> {
        let mut state = self.lock();
        let complete = state.nodes.complete
            && state.ranges.complete
            && state.blocks.complete
            && state.policies.complete
            && state.reports.complete;
        state.pending = None;
        complete.then(|| World {
            nodes: state.nodes.facts.clone(),
            ranges: state.ranges.facts.clone(),
            blocks: state.blocks.facts.clone(),
            policies: state.policies.facts.clone(),
            reports: state.reports.facts.clone(),
            foreign: state.foreign.clone(),
        })
    }

    /// Waits until a change since [`Observed::world`] was called is at least this urgent.
    pub async fn changed_at_least(&self, urgency: Urgency) {
        loop {
            let notified = self.changed.notified();
            if self.lock().pending >= Some(urgency) {
                return;
            }
            notified.await;
        }
    }

    /// Begins every watch anew with a LIST. Until all are complete there is no [`Observed::world`].
    pub fn restart(&self) {
        let mut state = self.lock();
        state.nodes.complete = false;
        state.ranges.complete = false;
        state.blocks.complete = false;
        state.policies.complete = false;
        state.reports.complete = false;
        drop(state);
        self.restart.notify_waiters();
    }

    /// Sets what is known of the cluster's own addresses.
    pub fn set_foreign(&self, foreign: Foreign) {
        let mut state = self.lock();
        if *state.foreign != foreign {
            state.foreign = Arc::new(foreign);
            state.pending = state.pending.max(Some(Urgency::Now));
            drop(state);
            self.changed.notify_waiters();
        }
    }

    /// The uid of a node, if it is known.
    pub fn node_uid(&self, name: &str) -> Option<Name> {
        self.lock().nodes.facts.get(name).map(|node| node.uid.clone())
    }

    /// What is known of the cluster's own addresses.
    pub fn foreign(&self) -> Arc<Foreign> {
        self.lock().foreign.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock; and whole facts are put in at once.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, change: impl FnOnce(&mut State) -> Option<Urgency>) {
        let mut state = self.lock();
        let urgency = change(&mut state);
        state.pending = state.pending.max(urgency);
        drop(state);
        if urgency.is_some() {
            self.changed.notify_waiters();
        }
    }
}

/// An incident of a node's report that was not there before.
pub type NodeIncident = (Name, Incident);

/// Watches everything until dropped, each watch renewed after `seconds`. `on_error` is called with the kind at
/// each failure.
pub async fn watch_all(
    client: Client,
    seconds: u32,
    observed: &Observed,
    incidents: Sender<NodeIncident>,
    since: Timestamp,
    on_error: impl Fn(&'static str),
) {
    let on_error = &on_error;
    let nodes = watch::<NodeView>(&client, seconds, observed, on_error, |event| {
        observed.note(|state| {
            state.nodes.apply(event, |object| Some(NodeFact::read(object)), |_, _| Urgency::Now)
        });
    });
    let ranges = watch::<ClusterCIDR>(&client, seconds, observed, on_error, |event| {
        observed
            .note(|state| state.ranges.apply(event, |object| Some(RangeFact::read(object)), range_urgency));
    });
    let blocks = watch::<PodCIDR>(&client, seconds, observed, on_error, |event| {
        observed.note(|state| state.blocks.apply(event, BlockFact::read, block_urgency));
    });
    let policies = watch::<RoutingPolicy>(&client, seconds, observed, on_error, |event| {
        observed.note(|state| {
            state.policies.apply(event, |object| Some(PolicyFact::read(object)), policy_urgency)
        });
    });
    let mut seen = Seen { since, by_node: BTreeMap::new() };
    let reports = watch::<NodeNetwork>(&client, seconds, observed, on_error, move |event| {
        seen.pass_on(&event, &incidents);
        observed.note(|state| {
            state.reports.apply(event, |object| Some(ReportFact::read(object)), report_urgency)
        });
    });
    tokio::join!(nodes, ranges, blocks, policies, reports);
}

/// Which incidents have been passed on.
struct Seen {
    since: Timestamp,
    by_node: BTreeMap<String, Timestamp>,
}

impl Seen {
    fn pass_on(&mut self, event: &Event<DeserializeGuard<NodeNetwork>>, incidents: &Sender<NodeIncident>) {
        if let Event::Delete(gone) = event {
            self.by_node.remove(gone.meta().name.as_deref().unwrap_or_default());
        }
        let (Event::Apply(DeserializeGuard(Ok(report))) | Event::InitApply(DeserializeGuard(Ok(report)))) =
            event
        else {
            return;
        };
        let name = report.metadata.name.clone().unwrap_or_default();
        let seen = self.by_node.get(&name).copied().unwrap_or(self.since);
        for incident in new_incidents(report, seen) {
            self.by_node.insert(name.clone(), incident.time.0);
            // A full queue drops it: it stays in the report, where its owner can read it.
            let _ = incidents.try_send((name.as_str().into(), incident));
        }
    }
}

/// Watches one kind. After a failure it lists anew rather than going on from where it was: etcd may have been
/// put back to a backup meanwhile, and then a watch from a later version than etcd's own would silently miss
/// what is gone. One leader can afford the LIST.
async fn watch<K>(
    client: &Client,
    seconds: u32,
    observed: &Observed,
    on_error: &impl Fn(&'static str),
    mut take: impl FnMut(Event<DeserializeGuard<K>>),
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let kind = kind_of::<K>();
    let api: Api<DeserializeGuard<K>> = Api::all(client.clone());
    let config = watcher::Config::default().timeout(seconds).page_size(PAGE);
    let (mut failures, mut listed) = (0u32, false);
    loop {
        let mut events = std::pin::pin!(watcher(api.clone(), config.clone()));
        let error = loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = observed.restart.notified() => break None,
            };
            match event {
                Some(Ok(event)) => {
                    listed |= matches!(event, Event::InitDone);
                    if failures > 0 && matches!(event, Event::InitDone) {
                        info!(kind, "watching again");
                        failures = 0;
                    }
                    take(event);
                }
                Some(Err(error)) => break Some(error),
                None => break None,
            }
        };
        let absent = |error: &&watcher::Error| has_status(error, 404) || (has_status(error, 403) && !listed);
        if let Some(error) = error.as_ref().filter(|error| kind == OPTIONAL && absent(error)) {
            if failures == 0 {
                warn!(
                    kind,
                    error = chain(error),
                    "the kind is not installed or may not be read; going on without it"
                );
            }
            take(Event::Init);
            take(Event::InitDone);
            failures = failures.saturating_add(1);
            tokio::time::sleep(MAX_WAIT).await;
        } else if let Some(error) = error {
            on_error(kind);
            tokio::time::sleep(complain(kind, &error, failures)).await;
            failures = failures.saturating_add(1);
        }
    }
}

/// Says what is wrong, but not each time; answers how long to wait.
fn complain(kind: &str, error: &watcher::Error, failures: u32) -> Duration {
    let missing = has_status(error, 404);
    if failures.is_multiple_of(SAY_AGAIN) && missing {
        warn!(kind, "the API server does not know this kind (yet): waiting for its CRD");
    } else if failures.is_multiple_of(SAY_AGAIN) {
        warn!(kind, error = chain(error), "cannot watch; going on with what is known and trying again");
    }
    let longest = if missing { MAX_WAIT_FOR_CRD } else { MAX_WAIT };
    let ours = (MIN_WAIT * 2u32.saturating_pow(failures)).min(longest);
    ours.max(asked_to_wait(error).unwrap_or_default())
}

/// How long the API server asks to wait. The client hides the answer's headers here, but what API servers say
/// themselves has it in its text as well.
fn asked_to_wait(error: &watcher::Error) -> Option<Duration> {
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => status,
        _ => return None,
    };
    let seconds = status.details.as_ref()?.retry_after_seconds;
    Some(Duration::from_secs(seconds.into()).min(LONGEST_WAIT))
}

fn has_status(error: &watcher::Error, code: u16) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == code,
        _ => false,
    }
}

fn kind_of<K: Resource<DynamicType = ()>>() -> &'static str {
    match &*K::kind(&()) {
        "Node" => "Node",
        "ClusterCIDR" => "ClusterCIDR",
        "PodCIDR" => "PodCIDR",
        "RoutingPolicy" => OPTIONAL,
        _ => "NodeNetwork",
    }
}

/// A status alone is ours, or a counter.
fn range_urgency(old: Option<&RangeFact>, new: Option<&RangeFact>) -> Urgency {
    let bare = |fact: &RangeFact| RangeFact {
        status: Default::default(),
        resource_version: "".into(),
        ..fact.clone()
    };
    if old.map(bare) == new.map(bare) { Urgency::Soon } else { Urgency::Now }
}

fn block_urgency(old: Option<&BlockFact>, new: Option<&BlockFact>) -> Urgency {
    let bare = |fact: &BlockFact| BlockFact { status: None, resource_version: "".into(), ..fact.clone() };
    if old.map(bare) == new.map(bare) { Urgency::Soon } else { Urgency::Now }
}

fn policy_urgency(old: Option<&PolicyFact>, new: Option<&PolicyFact>) -> Urgency {
    let bare = |fact: &PolicyFact| PolicyFact {
        status: Default::default(),
        resource_version: "".into(),
        ..fact.clone()
    };
    if old.map(bare) == new.map(bare) { Urgency::Soon } else { Urgency::Now }
}

/// What is held or lost matters at once, as do a node that fills up and a report that goes away; sums and other
/// counters can wait.
fn report_urgency(old: Option<&ReportFact>, new: Option<&ReportFact>) -> Urgency {
    let held = |fact: &ReportFact| {
        let held: Vec<_> = fact.held.iter().map(|held| held.block).collect();
        (fact.reported, held, fact.lost.clone(), Family::ALL.map(|family| fills_up(fact, family)))
    };
    if old.map(held) == new.map(held) { Urgency::Soon } else { Urgency::Now }
}

/// Whether a node is past the watermark by its own report, draining blocks counted like the others: only the plan
/// knows which those are, and this is about when it is made.
fn fills_up(report: &ReportFact, family: Family) -> bool {
    let held = report.held.iter().filter(|held| held.block.family() == family);
    growth::wants_block(held.filter_map(Held::usage))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{held_block, report};

    fn apply(mirror: &mut Mirror<BlockFact>, event: Event<BlockFact>) -> Option<Urgency> {
        mirror.apply(event, |fact| Some(fact.clone()), block_urgency)
    }

    #[test]
    fn a_list_replaces_what_was_known_only_when_it_is_complete() {
        let mut mirror = Mirror::default();
        let (a, b) = (held_block("10.244.1.0/24", "r", "n1"), held_block("10.244.2.0/24", "r", "n2"));
        assert_eq!(apply(&mut mirror, Event::Init), None);
        assert_eq!(apply(&mut mirror, Event::InitApply(a.clone())), None);
        assert!(mirror.facts.is_empty() && !mirror.complete);
        assert_eq!(apply(&mut mirror, Event::InitDone), Some(Urgency::Now));
        assert!(mirror.complete);
        for event in [Event::Init, Event::InitApply(b.clone())] {
            assert_eq!(apply(&mut mirror, event), None);
            assert_eq!(mirror.facts.len(), 1, "the old list holds until the new one is whole");
        }
        assert_eq!(apply(&mut mirror, Event::InitDone), Some(Urgency::Now));
        assert_eq!(mirror.facts.keys().map(|k| &**k).collect::<Vec<_>>(), ["10-244-2-0-24"]);
    }

    #[test]
    fn what_does_not_change_a_fact_wakes_nobody() {
        let mut mirror = Mirror::default();
        let fact = held_block("10.244.1.0/24", "r", "n1");
        assert_eq!(apply(&mut mirror, Event::Apply(fact.clone())), Some(Urgency::Now));
        assert_eq!(apply(&mut mirror, Event::Apply(fact.clone())), None);
        let status = BlockFact { status: Some(Box::default()), resource_version: "2".into(), ..fact.clone() };
        assert_eq!(apply(&mut mirror, Event::Apply(status)), Some(Urgency::Soon));
        let moved = BlockFact { node_uid: None, ..fact.clone() };
        assert_eq!(apply(&mut mirror, Event::Apply(moved)), Some(Urgency::Now));
        assert_eq!(apply(&mut mirror, Event::Delete(fact.clone())), Some(Urgency::Now));
        assert_eq!(apply(&mut mirror, Event::Delete(fact)), None);
    }

    #[test]
    fn counters_of_a_report_can_wait_but_not_what_it_holds() {
        let (one, used, other) = (
            report("n", &[("10.244.1.0/24", 1)]),
            report("n", &[("10.244.1.0/24", 2)]),
            report("n", &[("10.244.2.0/24", 1)]),
        );
        assert_eq!(report_urgency(Some(&one), Some(&used)), Urgency::Soon);
        assert_eq!(report_urgency(Some(&one), Some(&other)), Urgency::Now);
        assert_eq!(report_urgency(None, Some(&one)), Urgency::Now);
    }
}
