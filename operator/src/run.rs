//! The process: connect, stand by, lead, hand over.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::{Api, Client, Config};
use plat_crds::names;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::apply::Outcome;
use crate::args::RunArgs;
use crate::http::{Admin, serve};
use crate::kube_server::{ForeignLookup, KubeServer};
use crate::leader::{Leader, Pass};
use crate::lease::{Elector, Timing};
use crate::note::{Note, of_incident};
use crate::observe::{Observed, Urgency, watch_all};
use crate::publish::{QUEUE, publish};
use crate::snapshot::{Clock, Settings, Tenure};
use crate::step::Kind;

/// Passes are at least so far apart: the first change acts at once, then they are taken together.
const COALESCE: Duration = Duration::from_millis(50);
/// Reports and statuses alone are taken together for longer.
const COALESCE_REPORTS: Duration = Duration::from_millis(500);
/// A pass is due after so long even if nothing seems to happen.
const IDLE: Duration = Duration::from_secs(30);
/// The loop shows that it is alive at least so often.
const TURN: Duration = Duration::from_secs(5);
/// How often Service ranges and API server addresses are looked up.
const FOREIGN_EVERY: Duration = Duration::from_secs(60);
/// How long a pass may take to end after the process was told to stop.
const STOP_WITHIN: Duration = Duration::from_secs(11);
/// How long Events that still wait may take to be published at the end.
const FLUSH_WITHIN: Duration = Duration::from_secs(3);
/// A connection that takes longer to come about has failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection on which nothing came for so much longer than a watch lasts is dead.
const DEAD_AFTER: Duration = Duration::from_secs(5);

/// Runs until `stop`; an error ends the process, and its successor starts afresh.
pub async fn run(args: RunArgs, stop: CancellationToken) -> anyhow::Result<()> {
    let settings = args.settings()?;
    let timing = args.timing()?;
    info!(version = env!("CARGO_PKG_VERSION"), ?args, "starting");
    let admin = Admin::default();
    let serving = tokio::spawn({
        let (admin, listen, socket) = (admin.clone(), args.listen, args.socket.clone());
        async move { serve(admin, listen, &socket).await }
    });
    tokio::select! {
        served = serving => served.context("the probe server ended")?,
        done = work(&args, settings, timing, &admin, stop) => done,
    }
}

async fn work(
    args: &RunArgs,
    settings: Settings,
    timing: Timing,
    admin: &Admin,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut config = client_config().await?;
    let api_host = config.cluster_url.host().and_then(|host| host.trim_matches(['[', ']']).parse().ok());
    // The API server ends each watch in time. Where it does not, the connection is dead, and a request that was
    // sent over it is answered by nobody.
    config.read_timeout = Some(Duration::from_secs(args.watch_seconds.into()) + DEAD_AFTER);
    // The Lease has a client of its own: no other traffic must hold up its renewal.
    let lease_client = Client::try_from(config.clone()).context("cannot make a Kubernetes client")?;
    let client = Client::try_from(config).context("cannot make a Kubernetes client")?;
    let identity = format!("{}_{}", pod_name(args), random_id());
    let elector = Elector::new(
        Api::<Lease>::namespaced(lease_client, &args.namespace),
        names::LEADER_LEASE,
        identity,
        timing,
    );

    if settings.cleanup {
        admin.health.must_lead();
    }
    let standing_by = elector.acquire(&admin.leadership, |answered| {
        admin.health.turn();
        if answered {
            admin.health.contact();
        }
    });
    let mut held = tokio::select! {
        held = standing_by => held,
        () = stop.cancelled() => {
            info!("told to stop while standing by");
            return Ok(());
        }
    };
    admin.health.leads();
    let (since, start) = (Instant::now(), held.start);
    let tenure = move || Tenure { held_for: since.elapsed(), start };
    let leading = lead(client, args, api_host, settings, admin, tenure, stop.clone());
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(STOP_WITHIN).await;
    };
    let is_sole_actor = tokio::select! {
        lost = elector.keep(&mut held, &admin.leadership) => return Err(lost.into()),
        is_sole_actor = leading => is_sole_actor,
        () = overdue => bail!("the last pass did not end within {STOP_WITHIN:?}: requests may still be under way, so the Lease is left to run out"),
    };
    if is_sole_actor {
        elector.release(&admin.leadership).await;
    } else {
        info!("a former leader may still have requests under way, so the Lease is left to run out");
    }
    Ok(())
}

/// Leads until `stop`; every write has been answered when it returns. Answers whether no other process can have
/// one under way either.
async fn lead(
    client: Client,
    args: &RunArgs,
    api_host: Option<IpAddr>,
    settings: Settings,
    admin: &Admin,
    tenure: impl Fn() -> Tenure,
    stop: CancellationToken,
) -> bool {
    let observed = Arc::new(Observed::default());
    let mut lookup = ForeignLookup::new(client.clone(), api_host);
    observed.set_foreign(lookup.run(&observed.foreign()).await);
    let (notes, note_queue) = mpsc::channel(QUEUE);
    let (incidents, mut incident_queue) = mpsc::channel(QUEUE);
    let mut published = std::pin::pin!(publish(client.clone(), pod_name(args), note_queue));
    // What happened just before this process led may not have been published by the one before.
    let since = Timestamp::now() - settings.lease_duration;
    let watched = watch_all(client.clone(), args.watch_seconds, &observed, incidents, since, |kind| {
        admin.metrics.watch_error(kind)
    });
    let looked_up = async {
        loop {
            tokio::time::sleep(FOREIGN_EVERY).await;
            observed.set_foreign(lookup.run(&observed.foreign()).await);
        }
    };
    let passed_on = async {
        while let Some((node, incident)) = incident_queue.recv().await {
            let uid = observed.node_uid(&node).unwrap_or_default();
            send(&notes, of_incident(&node, &uid, &incident), admin);
        }
    };
    let server = KubeServer::new(client.clone(), admin.leadership.clone());
    let looped = passes(&observed, &server, settings, admin, &notes, tenure, &stop);
    let is_sole_actor = tokio::select! {
        is_sole_actor = looped => is_sole_actor,
        () = async { tokio::join!(published.as_mut(), watched, looked_up, passed_on); } => false,
    };
    // What the last pass did is told before the Lease goes to another process.
    drop(notes);
    if tokio::time::timeout(FLUSH_WITHIN, published).await.is_err() {
        warn!("not every Event could be published within {FLUSH_WITHIN:?}");
    }
    is_sole_actor
}

async fn passes(
    observed: &Observed,
    server: &KubeServer,
    settings: Settings,
    admin: &Admin,
    notes: &mpsc::Sender<Note>,
    tenure: impl Fn() -> Tenure,
    stop: &CancellationToken,
) -> bool {
    let is_cleanup = settings.cleanup;
    let began = Instant::now();
    let clock = || Clock { wall: whole_seconds(Timestamp::now()), steady: began.elapsed() };
    let mut leader: Option<Leader> = None;
    while !stop.is_cancelled() {
        admin.health.turn();
        let started = Instant::now();
        let Some(world) = observed.world() else {
            wait(observed, started, TURN, admin, stop).await;
            continue;
        };
        let leader = leader.get_or_insert_with(|| Leader::new(settings.clone(), &world));
        let on_progress = |done: &crate::apply::Done| {
            admin.health.turn();
            admin.metrics.step(done);
        };
        let pass = leader.pass(&world, &tenure, clock, server, on_progress).await;
        admin.metrics.pass(&pass, &world, started.elapsed());
        // While this one is held, the next change copies the whole map.
        drop(world);
        log(&pass, started.elapsed());
        if pass.went_back {
            warn!("etcd was put back to an earlier time; watching everything anew");
            observed.restart();
            continue;
        }
        // Whoever waits for a cleanup waits until the finalizers are off.
        let cleaned = || pass.done.iter().all(|done| done.outcome.is_success());
        if pass.list_error.is_none() && (!is_cleanup || cleaned()) {
            admin.health.passed();
        }
        for note in pass.notes {
            send(notes, note, admin);
        }
        wait(observed, started, pass.wake_after.unwrap_or(IDLE).min(IDLE), admin, stop).await;
    }
    info!("told to stop; the last pass is done");
    leader.is_some_and(|leader| leader.is_sole_actor(tenure()))
}

/// Times in Kubernetes objects are whole seconds.
fn whole_seconds(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// Waits until the next pass is due.
async fn wait(
    observed: &Observed,
    started: Instant,
    at_most: Duration,
    admin: &Admin,
    stop: &CancellationToken,
) {
    let earliest = |distance: Duration| tokio::time::sleep_until((started + distance).into());
    let change = async |urgency, coalesce| {
        observed.changed_at_least(urgency).await;
        earliest(coalesce).await;
    };
    let timer = async {
        tokio::time::sleep(at_most).await;
        earliest(COALESCE).await;
    };
    let alive = async {
        loop {
            tokio::time::sleep(TURN).await;
            admin.health.turn();
        }
    };
    tokio::select! {
        () = change(Urgency::Now, COALESCE) => {}
        () = change(Urgency::Soon, COALESCE_REPORTS) => {}
        () = timer => {}
        () = alive => {}
        () = stop.cancelled() => {}
    }
}

fn send(notes: &mpsc::Sender<Note>, note: Note, admin: &Admin) {
    if notes.try_send(note).is_err() {
        admin.metrics.event_dropped();
    }
}

fn log(pass: &Pass, took: Duration) {
    if let Some(error) = &pass.list_error {
        warn!(error, "cannot list ClusterCIDRs and PodCIDRs; what needs it waits");
    }
    for fault in &pass.new_faults {
        warn!(
            kind = fault.object.kind.as_str(),
            name = &*fault.object.name,
            reason = fault.reason,
            "{}",
            fault.message
        );
    }
    // What concerns a block is told of its node as well; one line is enough. Faults were warned of above.
    for note in pass.notes.iter().filter(|note| !note.warning && note.object.kind != Kind::Node) {
        info!(
            kind = note.object.kind.as_str(),
            name = &*note.object.name,
            reason = note.reason,
            "{}",
            note.text
        );
    }
    for done in &pass.done {
        let (step, name) = (done.step.name(), done.step.target().1);
        match &done.outcome {
            Outcome::Done | Outcome::AlreadySo => {
                debug!(step, object = &*name, outcome = done.outcome.name(), "step")
            }
            Outcome::Stale(why) => debug!(step, object = &*name, why, "decided on old facts; planning again"),
            Outcome::Missing => {
                debug!(step, object = &*name, "the object is gone; reading back");
            }
            Outcome::Taken(holder) => info!(
                step,
                object = &*name,
                holder = &**holder,
                "the block is another node's; taking the next"
            ),
            Outcome::Refused(why) => warn!(step, object = &*name, why, "the API server refused"),
            Outcome::Unknown(why) => warn!(step, object = &*name, why, "outcome unknown; reading back"),
            Outcome::NotLeader | Outcome::Skipped => {
                debug!(step, object = &*name, outcome = done.outcome.name(), "not sent")
            }
        }
    }
    debug!(steps = pass.done.len(), backlog = pass.status_backlog, ?took, "pass");
}

async fn client_config() -> anyhow::Result<Config> {
    // Its text names both places that were looked at, with their causes.
    let mut config = Config::infer().await.map_err(|error| {
        anyhow::anyhow!("cannot find the API server: run it in a pod, or set KUBECONFIG ({error})")
    })?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    // Retries are ours: a create that is repeated unseen would hide whose block it is.
    config.default_retry = false;
    Ok(config)
}

fn pod_name(args: &RunArgs) -> String {
    args.pod_name.clone().filter(|name| !name.is_empty()).unwrap_or_else(host_name)
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|text| text.trim().to_owned())
        .unwrap_or_else(|_| "operator".to_owned())
}

/// Tells two lives of one pod apart.
fn random_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .map(|text| text.trim().to_owned())
        .unwrap_or_else(|_| std::process::id().to_string())
}
