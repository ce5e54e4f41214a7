//! One leader by a Lease, with client-go's rules and compare-and-swap.
//!
//! Every write is a PUT with the resourceVersion that was read, so of two candidates one gets a 409. A
//! candidate never compares another machine's clock with its own: it takes a Lease only after it has itself
//! seen the record unchanged for the record's whole duration. The holder counts from *before* it sent its
//! last successful renewal and stops writing at the renew deadline (10 s), well before anybody else may
//! begin (15 s after the last change they saw). It counts by `CLOCK_BOOTTIME`, which goes on while its machine is
//! suspended; `Instant` stands still then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::PostParams;
use tracing::{debug, info, warn};

use crate::kube_server::chain;
use crate::snapshot::Start;

/// Durations of the election; client-go's defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long a Lease holds without being renewed.
    pub duration: Duration,
    /// How long a holder goes on without a successful renewal. Shorter than `duration`.
    pub renew_deadline: Duration,
    /// Time between tries.
    pub retry: Duration,
}

/// A record is believed up to so many times one's own duration.
const LONGEST: u32 = 10;

/// A Lease as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Who holds it; empty if nobody does.
    pub holder: String,
    /// For how long, since its last change.
    pub duration: Duration,
    /// When the holder says that it renewed: only compared for equality.
    pub renewed: Option<Timestamp>,
    /// How often the holder has changed.
    pub transitions: i32,
    /// For compare-and-swap.
    pub resource_version: String,
}

/// What a candidate does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// There is no Lease: create it.
    Create,
    /// Take it over, if it has not changed since it was read.
    Take(Start),
    /// Somebody else leads.
    Wait,
}

/// Decides, given the Lease and for how long this candidate has seen it unchanged. A holder that has not renewed
/// for `longest` is gone, however long its record says that it holds: somebody may have edited it. Pure.
pub fn decide(record: Option<&Record>, unchanged_for: Duration, longest: Duration) -> Decision {
    match record {
        None => Decision::Create,
        Some(record) if record.holder.is_empty() => Decision::Take(Start::HandedOver),
        Some(record) if unchanged_for > record.duration.min(longest) => Decision::Take(Start::Expired),
        Some(_) => Decision::Wait,
    }
}

/// Until when this process may write. Shared with everything that writes.
#[derive(Debug, Default)]
pub struct Leadership {
    /// Milliseconds of `CLOCK_BOOTTIME`; 0 while it does not lead.
    until: AtomicU64,
}

/// A time of `CLOCK_BOOTTIME`: since the machine started, suspend included. Nobody can set it.
#[derive(Clone, Copy, Debug)]
struct BootTime(Duration);

impl BootTime {
    fn now() -> BootTime {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        // The kernel's are never negative, nor is a part of a second longer than one.
        BootTime(Duration::try_from(now).unwrap_or(Duration::MAX))
    }

    fn elapsed(self) -> Duration {
        BootTime::now().0.saturating_sub(self.0)
    }

    fn after(self, wait: Duration) -> BootTime {
        BootTime(self.0.saturating_add(wait))
    }

    fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }
}

impl Leadership {
    /// Whether this process may write now.
    pub fn holds(&self) -> bool {
        BootTime::now().as_millis() < self.until.load(Ordering::Acquire)
    }

    fn extend(&self, until: BootTime) {
        self.until.store(until.as_millis(), Ordering::Release);
    }

    fn end(&self) {
        self.until.store(0, Ordering::Release);
    }
}

/// Why a leader must stop.
#[derive(Debug, thiserror::Error)]
pub enum LostLease {
    /// Somebody else holds it.
    #[error("lost the leader Lease to {0}; this process ends and its successor starts afresh")]
    Taken(String),
    /// It could not be renewed in time.
    #[error(
        "could not renew the leader Lease for {0:?} (last try: {1}); this process ends and its successor starts afresh"
    )]
    Deadline(Duration, String),
}

/// A candidate for one Lease.
pub struct Elector {
    api: Api<Lease>,
    name: String,
    identity: String,
    timing: Timing,
}

/// A Lease that this process holds.
pub struct Held {
    acquired: Timestamp,
    /// When the last successful write was sent.
    renewed: BootTime,
    /// How leadership was won.
    pub start: Start,
}

impl Elector {
    /// A candidate named `identity`, which no other process may have.
    pub fn new(api: Api<Lease>, name: &str, identity: String, timing: Timing) -> Elector {
        Elector { api, name: name.to_owned(), identity, timing }
    }

    /// Waits until this process leads. `on_try` is called after each try, with whether the API server answered.
    pub async fn acquire(&self, leadership: &Leadership, on_try: impl Fn(bool)) -> Held {
        let mut seen: Option<Record> = None;
        let mut since = Instant::now();
        info!(lease = self.name, identity = self.identity, "standing by for the leader Lease");
        loop {
            let answer = self.read().await;
            on_try(answer.is_ok());
            match answer {
                Ok(record) => {
                    if record != seen {
                        since = Instant::now();
                        seen = record;
                    }
                    let start = match decide(seen.as_ref(), since.elapsed(), self.timing.duration * LONGEST) {
                        Decision::Wait => None,
                        Decision::Create => Some(Start::First),
                        Decision::Take(start) => Some(start),
                    };
                    if let Some(start) = start {
                        match self.write(seen.as_ref(), Timestamp::now(), start).await {
                            Ok(held) => return self.won(held, leadership),
                            Err(error) => debug!(error, "did not get the leader Lease"),
                        }
                    }
                }
                Err(error) => warn!(error, "cannot read the leader Lease; trying again"),
            }
            tokio::time::sleep(jittered(self.timing.retry)).await;
        }
    }

    /// Renews until the Lease is lost.
    pub async fn keep(&self, held: &mut Held, leadership: &Leadership) -> LostLease {
        loop {
            tokio::time::sleep(self.timing.retry).await;
            let error = match self.read().await {
                Ok(Some(record)) if record.holder == self.identity => {
                    match self.write(Some(&record), held.acquired, held.start).await {
                        Ok(renewed) => {
                            leadership.extend(renewed.renewed.after(self.timing.renew_deadline));
                            *held = renewed;
                            continue;
                        }
                        Err(error) => error,
                    }
                }
                Ok(Some(record)) => return self.lost(leadership, LostLease::Taken(describe(&record.holder))),
                Ok(None) => {
                    return self.lost(leadership, LostLease::Taken("nobody: it was deleted".to_owned()));
                }
                Err(error) => error,
            };
            if held.renewed.elapsed() + self.timing.retry >= self.timing.renew_deadline {
                return self.lost(leadership, LostLease::Deadline(held.renewed.elapsed(), error));
            }
            warn!(error, "cannot renew the leader Lease; trying again");
        }
    }

    /// Gives the Lease up, so that a successor need not wait. Only after the last write was answered.
    pub async fn release(&self, leadership: &Leadership) {
        leadership.end();
        // A renewal that was under way may come between reading and writing: then once more.
        let mut outcome = Ok(());
        for _ in 0..2 {
            let record = match self.read().await {
                Ok(Some(record)) if record.holder == self.identity => record,
                Ok(_) => return,
                Err(error) => {
                    outcome = Err(error);
                    continue;
                }
            };
            let spec = LeaseSpec {
                holder_identity: Some(String::new()),
                lease_duration_seconds: Some(1),
                ..self.spec(&record, Timestamp::now())
            };
            match self.put(Some(&record.resource_version), spec).await {
                Ok(_) => return info!("released the leader Lease"),
                Err(error) => outcome = Err(error),
            }
        }
        if let Err(error) = outcome {
            warn!(error, "could not release the leader Lease; a successor waits until it runs out");
        }
    }

    fn won(&self, held: Held, leadership: &Leadership) -> Held {
        leadership.extend(held.renewed.after(self.timing.renew_deadline));
        info!(lease = self.name, identity = self.identity, start = ?held.start, "leading");
        held
    }

    fn lost(&self, leadership: &Leadership, why: LostLease) -> LostLease {
        leadership.end();
        why
    }

    async fn read(&self) -> Result<Option<Record>, String> {
        match self.timed(self.api.get_opt(&self.name)).await? {
            Some(lease) => Ok(Some(record(&lease))),
            None => Ok(None),
        }
    }

    /// Writes ourselves as the holder.
    async fn write(&self, old: Option<&Record>, acquired: Timestamp, start: Start) -> Result<Held, String> {
        let sent = BootTime::now();
        let spec = self.spec(old.unwrap_or(&Record::none()), acquired);
        self.put(old.map(|old| old.resource_version.as_str()), spec).await?;
        Ok(Held { acquired, renewed: sent, start })
    }

    fn spec(&self, old: &Record, acquired: Timestamp) -> LeaseSpec {
        let changes_hands = old.holder != self.identity && !old.resource_version.is_empty();
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.timing.duration.as_secs()).ok(),
            acquire_time: Some(MicroTime(acquired)),
            renew_time: Some(MicroTime(Timestamp::now())),
            lease_transitions: Some(old.transitions.saturating_add(i32::from(changes_hands))),
            ..LeaseSpec::default()
        }
    }

    async fn put(&self, version: Option<&str>, spec: LeaseSpec) -> Result<Lease, String> {
        let metadata = ObjectMeta {
            name: Some(self.name.clone()),
            resource_version: version.map(str::to_owned),
            ..ObjectMeta::default()
        };
        let lease = Lease { metadata, spec: Some(spec) };
        let how = PostParams::default();
        match version {
            None => self.timed(self.api.create(&how, &lease)).await,
            Some(_) => self.timed(self.api.replace(&self.name, &how, &lease)).await,
        }
    }

    async fn timed<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
        let limit = self.timing.renew_deadline / 2;
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => answer.map_err(|error| why(&error)),
            Err(_) => Err(format!("no answer within {limit:?}")),
        }
    }
}

impl Record {
    fn none() -> Record {
        Record {
            holder: String::new(),
            duration: Duration::ZERO,
            renewed: None,
            transitions: 0,
            resource_version: String::new(),
        }
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(0);
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        duration: Duration::from_secs(seconds),
        renewed: spec.renew_time.map(|MicroTime(at)| at),
        transitions: spec.lease_transitions.unwrap_or(0),
        resource_version: lease.metadata.resource_version.clone().unwrap_or_default(),
    }
}

fn why(error: &kube::Error) -> String {
    let text = chain(error);
    match error {
        kube::Error::Api(status) if status.code == 403 => {
            format!(
                "{text}; the Role or RoleBinding for Leases is gone or was changed: helm upgrade puts it back"
            )
        }
        _ => text,
    }
}

fn describe(holder: &str) -> String {
    if holder.is_empty() { "nobody: it was given up".to_owned() } else { holder.to_owned() }
}

/// Up to a fifth longer, so that candidates do not try in step.
fn jittered(base: Duration) -> Duration {
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos());
    base + base * (nanos % 200) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(holder: &str) -> Record {
        Record {
            holder: holder.to_owned(),
            duration: Duration::from_secs(15),
            renewed: Some(Timestamp::UNIX_EPOCH),
            transitions: 3,
            resource_version: "7".to_owned(),
        }
    }

    #[test]
    fn a_lease_is_taken_only_if_nobody_holds_it_or_it_was_seen_unchanged_for_its_duration() {
        let seconds = Duration::from_secs;
        let edited = Record { duration: seconds(2_000_000), ..record("a") };
        for (lease, unchanged_for, decision) in [
            (None, seconds(0), Decision::Create),
            (Some(record("")), seconds(0), Decision::Take(Start::HandedOver)),
            (Some(record("a")), seconds(0), Decision::Wait),
            (Some(record("a")), seconds(15), Decision::Wait),
            (Some(record("a")), seconds(15) + Duration::from_millis(1), Decision::Take(Start::Expired)),
            (Some(edited.clone()), seconds(150), Decision::Wait),
            (Some(edited), seconds(151), Decision::Take(Start::Expired)),
        ] {
            assert_eq!(
                decide(lease.as_ref(), unchanged_for, seconds(150)),
                decision,
                "{lease:?} {unchanged_for:?}"
            );
        }
    }

    #[test]
    fn a_wrong_clock_on_another_machine_does_not_matter() {
        let mut ancient = record("a");
        ancient.renewed = Some(Timestamp::MIN);
        assert_eq!(decide(Some(&ancient), Duration::from_secs(3), Duration::from_secs(150)), Decision::Wait);
    }

    /// A suspend cannot be made here, but a clock that counts it can be told: by the seconds since the machine
    /// started, as the kernel shows them.
    #[test]
    fn leadership_is_counted_by_the_clock_that_goes_on_in_suspend() {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime = uptime.split(' ').next().unwrap().parse().map(Duration::from_secs_f64).unwrap();
        let leadership = Leadership::default();
        leadership.extend(BootTime(uptime));
        assert!(!leadership.holds());
        leadership.extend(BootTime(uptime).after(Duration::from_secs(600)));
        assert!(leadership.holds());
        assert!(BootTime(uptime).elapsed() < Duration::from_secs(300), "{uptime:?}");
    }

    #[test]
    fn leadership_ends_by_itself_at_its_deadline() {
        let leadership = Leadership::default();
        assert!(!leadership.holds());
        leadership.extend(BootTime::now().after(Duration::from_secs(60)));
        assert!(leadership.holds());
        leadership.extend(BootTime::now());
        assert!(!leadership.holds());
        leadership.extend(BootTime::now().after(Duration::from_secs(60)));
        leadership.end();
        assert!(!leadership.holds());
    }
}
