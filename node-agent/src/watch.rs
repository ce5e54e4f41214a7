//! The API server's edge: watches PodCIDRs, ClusterCIDRs and RoutingPolicies, and proves now and then that this node's
//! blocks are still its own.
//!
//! Writes nothing but the shared [`Objects`]. A watch says nothing while nothing changes, also when it
//! hangs; so the lease that the node's blocks are for does not rest on it but on plain GETs of the node's
//! own PodCIDRs.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, ObjectMeta};
use kube::core::DeserializeGuard;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource, ResourceExt};
use plat_cni::boot;
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, PodCIDR, RoutingPolicy};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::facts::{BlockFact, Fact, Fault, Kind, PolicyFact, RangeFact, Reason};
use crate::objects::{Ask, Change, Contact, Objects};
use crate::reporter::Report;

/// How long one proof of contact may take.
const CONTACT_TIMEOUT: Duration = Duration::from_secs(4);
/// How soon a failed watch is tried again, at first and at most: a returning API server shall be noticed
/// soon, and not be run over by thousands of agents.
const WATCH_RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// How soon a failed proof is tried again.
const CONTACT_RETRY: Duration = Duration::from_secs(3);
/// How soon after a failed watch it is asked whether etcd went back.
const DOUBT_AFTER: Duration = Duration::from_secs(1);

/// Follows the API server until the task is dropped.
pub async fn run(
    client: Client,
    node: String,
    objects: watch::Sender<Objects>,
    mut asks: mpsc::Receiver<Ask>,
    reports: watch::Receiver<(Report, Duration)>,
) {
    let objects = Arc::new(objects);
    let (relist_blocks, relist_ranges, relist_policies) = (Notify::new(), Notify::new(), Notify::new());
    let contact = Notify::new();
    let reached = Notify::new();
    let blocks = follow(
        Api::<DeserializeGuard<PodCIDR>>::all(client.clone()),
        Kind::PodCIDR,
        |object: &PodCIDR| BlockFact::read_on(&node, object),
        (&relist_blocks, &reached),
        |change| objects.send_if_modified(|objects| objects.blocks.apply(change)),
    );
    let ranges = follow(
        Api::<DeserializeGuard<ClusterCIDR>>::all(client.clone()),
        Kind::ClusterCIDR,
        RangeFact::read,
        (&relist_ranges, &reached),
        |change| objects.send_if_modified(|objects| objects.ranges.apply(change)),
    );
    let policies = follow(
        Api::<DeserializeGuard<RoutingPolicy>>::all(client.clone()),
        Kind::RoutingPolicy,
        PolicyFact::read,
        (&relist_policies, &reached),
        |change| objects.send_if_modified(|objects| objects.policies.apply(change)),
    );
    let answers = async {
        while let Some(ask) = asks.recv().await {
            match ask {
                Ask::Relist => {
                    relist_blocks.notify_one();
                    relist_ranges.notify_one();
                    relist_policies.notify_one();
                }
                Ask::Contact => contact.notify_one(),
            }
        }
    };
    let contacts = keep_contact(Api::all(client), &objects, reports, &contact, (&relist_blocks, &reached));
    futures::future::join5(blocks, ranges, policies, answers, contacts).await;
}

/// Watches one kind for ever; lists anew when asked to. A failed watch is tried again after a while, or
/// once somebody `reached` the API server.
///
/// A watch that fails goes on from the version that it had reached, or every agent would list everything
/// each time that an API server restarts. If etcd was put back to a backup meanwhile, that version lies in
/// its future, and the API server accepts the watch but says nothing until it is reached. So after a failure
/// it is asked, until there is an answer, whether the [`Newest`] change still stands; if not, all is listed.
async fn follow<K, F>(
    api: Api<DeserializeGuard<K>>,
    kind: Kind,
    read: impl Fn(&K) -> Result<F, Fault>,
    (relist, reached): (&Notify, &Notify),
    apply: impl Fn(Change<F>) -> bool,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    F: Fact,
{
    // Streamed lists come object by object, so the agent never holds a whole list's text; they are
    // consistent, also from the API server's cache.
    let mut config = watcher::Config::default().any_semantic().streaming_lists();
    let mut delay = WATCH_RETRY.0;
    loop {
        let stream = watcher::watcher(api.clone(), config.clone());
        futures::pin_mut!(stream);
        let mut listing = Vec::new();
        let mut newest = Newest::default();
        let mut doubt = None;
        loop {
            let event = tokio::select! {
                event = stream.next() => event,
                () = relist.notified() => break,
                () = sleep_until(doubt.unwrap_or_else(Instant::now)), if doubt.is_some() => {
                    match now(&api, &newest.name).await {
                        Some(now) if newest.is_contradicted_by(&now) => {
                            tracing::warn!(?kind, ?now, ?newest, "etcd may have gone back in time; listing anew");
                            break;
                        }
                        Some(_) => doubt = None,
                        None => doubt = Some(Instant::now() + CONTACT_RETRY),
                    }
                    continue;
                }
            };
            match &event {
                Some(Ok(Event::InitApply(object) | Event::Apply(object))) => {
                    newest.note(object.meta(), false)
                }
                Some(Ok(Event::Delete(object))) => newest.note(object.meta(), true),
                _ => {}
            }
            if matches!(event, Some(Ok(Event::InitDone | Event::Apply(_) | Event::Delete(_)))) {
                delay = WATCH_RETRY.0;
            }
            match event {
                None => break,
                Some(Ok(Event::Init)) => listing.clear(),
                Some(Ok(Event::InitApply(object))) => listing.push(parse(object, kind, &read)),
                Some(Ok(Event::InitDone)) => {
                    let listed = std::mem::take(&mut listing);
                    tracing::info!(?kind, objects = listed.len(), "listed");
                    apply(Change::Listed(listed));
                }
                Some(Ok(Event::Apply(object))) => {
                    apply(Change::Applied(parse(object, kind, &read)));
                }
                Some(Ok(Event::Delete(object))) => {
                    tracing::info!(?kind, name = %object.name_any(), "deleted");
                    apply(Change::Deleted(object.name_any()));
                }
                Some(Err(error)) => {
                    tracing::warn!(?kind, error = %words(&error), "watch; going on with what is known");
                    if kind == Kind::RoutingPolicy && is_not_there(&error) {
                        apply(Change::Missing);
                    }
                    if refuses_streams(&error) {
                        config = watcher::Config::default();
                        break;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = reached.notified() => {}
                    }
                    delay = (delay * 2).min(WATCH_RETRY.1);
                    doubt = doubt.or(Some(Instant::now() + DOUBT_AFTER));
                }
            }
        }
    }
}

/// The newest change that a watch has told of: what can show that etcd went back to a backup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Newest {
    name: String,
    uid: String,
    version: u64,
    deleted: bool,
}

impl Newest {
    fn note(&mut self, object: &ObjectMeta, deleted: bool) {
        let version = version(object.resource_version.as_deref()).unwrap_or(0);
        if version >= self.version {
            let (name, uid) = (object.name.clone(), object.uid.clone());
            *self = Newest { name: name.unwrap_or_default(), uid: uid.unwrap_or_default(), version, deleted };
        }
    }

    /// Whether what the API server says now cannot follow from this change. An object that was deleted since
    /// looks the same as one that a backup lacks; a list too many does no harm.
    fn is_contradicted_by(&self, now: &Now) -> bool {
        let object = match (&now.object, self.deleted) {
            (Some((uid, version)), false) => *uid != self.uid || *version < self.version,
            (Some((uid, _)), true) => *uid == self.uid,
            (None, deleted) => !deleted,
        };
        now.version < self.version || (object && self.version != 0)
    }
}

/// What the API server says now.
#[derive(Debug)]
struct Now {
    /// The version that the kind is at.
    version: u64,
    /// UID and version of the object of the newest change, if it exists.
    object: Option<(String, u64)>,
}

/// Asks for it; `None` if the API server does not say.
async fn now<K>(api: &Api<DeserializeGuard<K>>, name: &str) -> Option<Now>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    let one = ListParams::default().limit(1);
    let list = timeout(CONTACT_TIMEOUT, api.list(&one)).await.ok()?.ok()?;
    let object = match name {
        "" => None,
        name => timeout(CONTACT_TIMEOUT, api.get_opt(name)).await.ok()?.ok()?,
    };
    let object = object.map(|object| {
        let meta = object.meta();
        (meta.uid.clone().unwrap_or_default(), version(meta.resource_version.as_deref()).unwrap_or(0))
    });
    Some(Now { version: version(list.metadata.resource_version.as_deref())?, object })
}

/// A resourceVersion as a number, which within one kind grows with every change (since Kubernetes 1.35 by
/// contract, before in fact). One that is no number tells nothing.
fn version(text: Option<&str>) -> Option<u64> {
    text?.parse().ok()
}

/// An error with its sources, as far as they add anything to its text.
pub fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

/// Whether the API server is one that does not stream lists (some of Kubernetes 1.33).
fn refuses_streams(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if matches!(status.code, 400 | 422))
}

/// Whether the kind is not installed (CRDs of an older chart), or not ours to read (roles of one).
fn is_not_there(error: &watcher::Error) -> bool {
    let (watcher::Error::WatchStartFailed(error) | watcher::Error::InitialListFailed(error)) = error else {
        return false;
    };
    matches!(error, kube::Error::Api(status) if matches!(status.code, 403 | 404))
}

/// One bad object is a fault, never a stalled watch.
fn parse<K: Resource<DynamicType = ()>, F>(
    object: DeserializeGuard<K>,
    kind: Kind,
    read: impl Fn(&K) -> Result<F, Fault>,
) -> Result<F, Fault> {
    match object.0 {
        Ok(object) => read(&object),
        Err(invalid) => Err(Fault {
            kind,
            name: invalid.metadata.name.unwrap_or_default(),
            reason: Reason::Unreadable,
            message: format!(
                "the object cannot be read by this agent ({}); upgrade the agent or correct the object",
                invalid.error
            ),
        }),
    }
}

/// Confirms again and again that this node's blocks are its own, and notes when that was. An answer that says
/// otherwise shows that the watch is late, as after a cut it may be for a minute: then all blocks are listed anew.
async fn keep_contact(
    api: Api<DeserializeGuard<PodCIDR>>,
    objects: &watch::Sender<Objects>,
    mut reports: watch::Receiver<(Report, Duration)>,
    asked: &Notify,
    (relist, reached): (&Notify, &Notify),
) {
    let mut confirmed = BTreeSet::new();
    let mut due = Instant::now();
    loop {
        let (own, every) = {
            let report = &reports.borrow_and_update().0;
            (report.own.iter().cloned().collect::<BTreeSet<_>>(), report.contact_every)
        };
        // New blocks are confirmed at once, known ones when it is time or somebody asks.
        if own.is_empty() || own == confirmed {
            tokio::select! {
                () = asked.notified() => {}
                () = sleep_until(due) => {}
                changed = reports.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            }
        }
        let at = Contact { boot_ms: boot::boot_ms(), unix: Timestamp::now().as_second() };
        let answer = confirm(&api, &own).await;
        due = Instant::now() + if answer.is_ok() { every.max(CONTACT_RETRY) } else { CONTACT_RETRY };
        if answer.is_ok() && !own.is_empty() {
            reached.notify_waiters();
        }
        match answer {
            Ok(()) if own.is_empty() => {}
            Ok(()) => objects.send_modify(|objects| objects.contact = Some(at)),
            Err(Unconfirmed::NoAnswer(why)) => {
                tracing::warn!(why, "the API server does not confirm this node's blocks");
            }
            Err(Unconfirmed::Denied(why)) => {
                tracing::warn!(why, "this node's blocks are not what the watch has shown; listing anew");
                reached.notify_waiters();
                relist.notify_one();
            }
        }
        confirmed = own;
    }
}

/// Why a node's blocks are not confirmed.
enum Unconfirmed {
    /// Nobody says.
    NoAnswer(String),
    /// One of them is not the node's any more.
    Denied(String),
}

/// Whether every block still is this node's, by its UID and state.
async fn confirm(
    api: &Api<DeserializeGuard<PodCIDR>>,
    own: &BTreeSet<(String, String)>,
) -> Result<(), Unconfirmed> {
    let denied = |name: &str, what: &str| Err(Unconfirmed::Denied(format!("PodCIDR '{name}' {what}")));
    for (name, uid) in own {
        let answer = timeout(CONTACT_TIMEOUT, api.get(name)).await;
        let late = |_| Unconfirmed::NoAnswer(format!("no answer in {} s", CONTACT_TIMEOUT.as_secs()));
        let object = match answer.map_err(late)? {
            Ok(object) => object,
            Err(kube::Error::Api(status)) if status.code == 404 => return denied(name, "is gone"),
            Err(error) => {
                return Err(Unconfirmed::NoAnswer(format!("PodCIDR '{name}': {}", words(&error))));
            }
        };
        if object.meta().uid.as_deref() != Some(uid) {
            return denied(name, "is another object now");
        }
        if object.0.is_ok_and(|block| block.spec.state == BlockState::Quarantined) {
            return denied(name, "is quarantined");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guarded(json: serde_json::Value) -> DeserializeGuard<PodCIDR> {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_restored_backup_is_noticed_also_once_it_has_run_past_what_was_seen() {
        let mut newest = Newest::default();
        let at_start = Now { version: 5, object: None };
        assert!(!newest.is_contradicted_by(&at_start), "nothing was seen yet");
        let meta = |uid: &str, version: &str| ObjectMeta {
            name: Some("10-244-3-0-24".into()),
            uid: Some(uid.into()),
            resource_version: Some(version.into()),
            ..ObjectMeta::default()
        };
        newest.note(&meta("a", "70"), false);
        newest.note(&meta("b", "60"), false);
        let now = |version, object: Option<(&str, u64)>| Now {
            version,
            object: object.map(|(uid, version)| (uid.to_owned(), version)),
        };
        for (now, contradicted) in [
            (now(70, Some(("a", 70))), false),
            (now(90, Some(("a", 90))), false),
            (now(60, Some(("a", 55))), true),
            (now(90, None), true),
            (now(90, Some(("c", 80))), true),
            (now(90, Some(("a", 55))), true),
        ] {
            assert_eq!(newest.is_contradicted_by(&now), contradicted, "{now:?}");
        }
        newest.note(&meta("a", "95"), true);
        assert!(!newest.is_contradicted_by(&now(95, None)), "it was deleted");
        assert!(!newest.is_contradicted_by(&now(99, Some(("d", 97)))), "and made anew");
        assert!(newest.is_contradicted_by(&now(99, Some(("a", 90)))), "it is back");
    }

    #[test]
    fn an_object_of_a_newer_version_is_a_fault_that_names_it() {
        let object = guarded(serde_json::json!({
            "apiVersion": "plat.network/v1alpha1", "kind": "PodCIDR", "metadata": {"name": "10-244-1-0-24"},
            "spec": {"cidr": ["10.244.1.0/24"]},
        }));
        let fault = parse(object, Kind::PodCIDR, BlockFact::read).unwrap_err();
        assert_eq!((fault.name.as_str(), fault.reason), ("10-244-1-0-24", Reason::Unreadable));
    }

    #[test]
    fn an_object_with_fields_of_a_newer_version_is_read() {
        let object = guarded(serde_json::json!({
            "apiVersion": "plat.network/v1alpha1", "kind": "PodCIDR", "metadata": {"name": "10-244-1-0-24"},
            "spec": {"cidr": "10.244.1.0/24", "clusterCIDR": "r", "nodeName": "n1", "state": "Later",
                "routing": {"mode": "Later", "later": {"a": 1}}},
        }));
        assert!(parse(object, Kind::PodCIDR, BlockFact::read).is_ok());
    }
}
