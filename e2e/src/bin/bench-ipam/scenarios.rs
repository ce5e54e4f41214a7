//! What is measured.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use plat_e2e::audit::{self, Log};
use plat_e2e::light::ControlPlane;
use plat_e2e::usage::Usage;
use plat_rig::figures::{Figure, Unit, median};
use tokio::task::LocalSet;
use tokio::time::sleep;

use crate::contender::{Limits, Who};
use crate::stage::{ACCOUNT, Stage};
use crate::{Args, goals, say};

/// PodCIDR statuses that the operator writes in a second at most.
const STATUS_WRITES_PER_SECOND: f64 = 50.0;
/// Events in a second that counters alone may cost all agents together.
const COUNTER_EVENTS_PER_SECOND: f64 = 50_000.0;
/// Reports that all agents together make in a second at most.
const REPORTS_PER_SECOND: u32 = 50;
/// Blocks are at rest once nothing was written about them for so long.
const REST: Duration = Duration::from_secs(3);
/// Nodes of the clusters in which requests are counted: so many are there, and so many join.
const COUNTED: (usize, usize) = (50, 20);

/// Measures everything.
pub fn all(args: &Args) -> Result<Vec<Figure>> {
    let (plat, peer) = (Who::Plat(vec![]), Who::NodeIpam(Limits::Lifted));
    let mut figures = Vec::new();
    let mut ours = Vec::new();
    let (last, smaller) = args.nodes.split_last().context("--nodes names no number of nodes")?;
    for nodes in smaller {
        let pair = (burst(args, &plat, *nodes)?, burst(args, &peer, *nodes)?);
        figures.extend(burst_figures(*nodes, pair.0, &peer, pair.1));
        if *nodes <= args.throttled {
            let throttled = Who::NodeIpam(Limits::Default);
            figures.push(burst_figure(*nodes, pair.0, &throttled, burst(args, &throttled, *nodes)?));
        }
        ours.push((*nodes, pair.0.all));
    }
    let (large, theirs) = (large(args, &plat, *last)?, large(args, &peer, *last)?);
    figures.extend(burst_figures(*last, large.burst, &peer, theirs.burst));
    if let Some((nodes, took)) = ours.iter().find(|(nodes, _)| *nodes == goals::BURST_NODES) {
        let times = *last as f64 / *nodes as f64;
        let name = format!("{last} nodes, until all have a block");
        let peer = format!("plat, {nodes} nodes × {times}");
        figures.push(
            Figure::new(&name, large.burst.all, &peer, took * times, Unit::Seconds).reaching(goals::LINEAR),
        );
    }
    figures.extend(large_figures(*last, &large, &peer, &theirs));
    figures.extend(requests(args, &plat, &peer)?);
    Ok(figures)
}

/// From a start beside N Node objects to N blocks.
#[derive(Clone, Copy, Debug, Default)]
struct Burst {
    /// Seconds until the first block.
    first: f64,
    /// Seconds until the last.
    all: f64,
    usage: Usage,
}

/// Runs work on a control plane of its own, with its own etcd.
fn on_stage<T: Send>(
    args: &Args,
    who: &Who,
    plane: &ControlPlane,
    work: impl AsyncFnOnce(&mut Stage) -> Result<T> + Send,
) -> Result<T> {
    plane.block_on(|client| async move {
        let here = LocalSet::new();
        here.run_until(async {
            let mut stage = Stage::new(plane, client, who.clone(), &args.operator).await?;
            let done = work(&mut stage).await;
            done.with_context(|| format!("{}; the end of its log:\n{}", who.name(), stage.log()))
        })
        .await
    })
}

fn burst(args: &Args, who: &Who, nodes: usize) -> Result<Burst> {
    say(&format!("{}: {nodes} nodes at once ...", who.name()));
    let plane = ControlPlane::up()?;
    on_stage(args, who, &plane, async |stage| {
        let uids = stage.create(nodes).await?;
        let (burst, _running) = give_blocks(stage, &uids).await?;
        Ok(burst)
    })
}

async fn give_blocks(stage: &Stage<'_>, uids: &[String]) -> Result<(Burst, crate::contender::Running)> {
    stage.watch().await?;
    let begin = Instant::now();
    let running = stage.start()?;
    let (first, last) = stage.wait_blocks(uids).await?;
    stage.check_blocks()?;
    let burst = Burst { first: seconds(begin, first), all: seconds(begin, last), usage: running.usage()? };
    say(&format!("  all have blocks after {:.2} s", burst.all));
    Ok((burst, running))
}

fn burst_figure(nodes: usize, ours: Burst, peer: &Who, theirs: Burst) -> Figure {
    let name = format!("{nodes} nodes, until all have a block");
    let figure = Figure::new(&name, ours.all, peer.name(), theirs.all, Unit::Seconds);
    let has_goal = nodes == goals::BURST_NODES && *peer == Who::NodeIpam(Limits::Lifted);
    if has_goal { figure.reaching(goals::BURST) } else { figure }
}

fn burst_figures(nodes: usize, ours: Burst, peer: &Who, theirs: Burst) -> Vec<Figure> {
    let name = format!("{nodes} nodes, from the first block to the last");
    let rest =
        Figure::new(&name, ours.all - ours.first, peer.name(), theirs.all - theirs.first, Unit::Seconds);
    vec![burst_figure(nodes, ours, peer, theirs), rest]
}

/// A large cluster's life.
#[derive(Debug, Default)]
struct Large {
    burst: Burst,
    /// Milliseconds to a block, for each node that joined alone.
    trickle: Vec<f64>,
    /// Resident memory at rest, and milliseconds of processor time in a second of it.
    rest: (f64, f64),
    /// Most that was resident in the whole life.
    peak: f64,
    /// Seconds until as many nodes as had left had come and got their blocks, and until the API server had taken
    /// the last of these.
    churn: (f64, f64),
    /// Seconds from the end of one process to the first block that the next one gives.
    restart: f64,
    /// The same without the wait for agents' reports.
    restart_at_once: f64,
    /// Events that one agent receives in a second from status alone: while conditions change, and while counters do.
    status: Option<(Events, Events)>,
}

/// What a watch receives in a second.
#[derive(Clone, Copy, Debug, Default)]
struct Events {
    number: f64,
    bytes: f64,
}

fn large(args: &Args, who: &Who, nodes: usize) -> Result<Large> {
    say(&format!("{}: {nodes} nodes at once ...", who.name()));
    let plane = ControlPlane::up()?;
    on_stage(args, who, &plane, async |stage| {
        let uids = stage.create(nodes).await?;
        let (burst, running) = give_blocks(stage, &uids).await?;
        let mut large = Large { burst, ..Large::default() };
        say("  kubelets and agents report ...");
        if matches!(who, Who::Plat(_)) {
            stage.wait_reports_wanted().await?;
            stage.make_ready().await?;
            stage.report(nodes, 1, None).await?;
            // The write budget begins with a second's worth.
            sleep(Duration::from_secs(2)).await;
            let flips = count_events(stage, args.seconds).await?;
            say("  all statuses are written ...");
            stage.wait_quiet(REST).await?;
            let counters = while_reporting(stage, args.seconds).await?;
            large.status = Some((flips, counters));
            stage.wait_quiet(REST).await?;
        } else {
            stage.make_ready().await?;
            stage.wait_quiet(REST).await?;
        }
        say("  at rest ...");
        let before = running.usage()?;
        sleep(Duration::from_secs(args.seconds)).await;
        let after = running.usage()?;
        large.rest = (after.resident, (after.cpu - before.cpu) * 1000.0 / args.seconds as f64);
        say("  one more node, again and again ...");
        for _ in 0..args.trickle {
            let begin = Instant::now();
            let one = stage.create(1).await?;
            let (at, _) = stage.wait_blocks(&one).await?;
            large.trickle.push(seconds(begin, at) * 1000.0);
            // Out of step with anything that comes in whole seconds.
            sleep(Duration::from_millis(370)).await;
        }
        say(&format!("  {} nodes leave, and as many come ...", args.churn));
        large.churn = churn(stage, args.churn).await?;
        large.peak = running.usage()?.peak;
        say("  a restart ...");
        running.end().await?;
        large.restart = restart(stage, None).await?;
        if matches!(who, Who::Plat(_)) {
            large.restart_at_once = restart(stage, Some("--report-wait-seconds=0")).await?;
        }
        stage.check_blocks()?;
        Ok(large)
    })
}

/// Counts what an agent receives.
async fn count_events(stage: &Stage<'_>, for_seconds: u64) -> Result<Events> {
    let before = stage.events();
    let begin = Instant::now();
    sleep(Duration::from_secs(for_seconds)).await;
    let (after, took) = (stage.events(), begin.elapsed().as_secs_f64());
    Ok(Events { number: (after.0 - before.0) as f64 / took, bytes: (after.1 - before.1) as f64 / took })
}

/// The same while agents report other counters, all together as often as they may.
async fn while_reporting(stage: &Stage<'_>, for_seconds: u64) -> Result<Events> {
    let reports = usize::try_from(for_seconds * u64::from(REPORTS_PER_SECOND))?;
    let (events, reported) = tokio::join!(
        count_events(stage, for_seconds),
        stage.report(reports.min(stage.count()), 7, Some(REPORTS_PER_SECOND))
    );
    reported.and(events)
}

/// Nodes leave and others come, both at once: seconds until these had blocks, and until the last was created.
async fn churn(stage: &mut Stage<'_>, count: usize) -> Result<(f64, f64)> {
    let begin = Instant::now();
    stage.delete(count).await?;
    let uids = stage.create(count).await?;
    let created = seconds(begin, Instant::now());
    let (_, last) = stage.wait_blocks(&uids).await?;
    stage.wait_quiet(REST / 3).await?;
    Ok((seconds(begin, last), created))
}

/// Starts the contender anew beside a node that has just come: seconds to its block.
async fn restart(stage: &mut Stage<'_>, flag: Option<&'static str>) -> Result<f64> {
    let begin = Instant::now();
    let one = stage.create(1).await?;
    let running = match flag {
        Some(flag) => stage.start_with(&[flag])?,
        None => stage.start()?,
    };
    let (at, _) = stage.wait_blocks(&one).await?;
    running.end().await?;
    Ok(seconds(begin, at))
}

fn large_figures(nodes: usize, ours: &Large, peer: &Who, theirs: &Large) -> Vec<Figure> {
    let figure = |name: &str, ours: f64, theirs: f64, unit: Unit| {
        Figure::new(&format!("{nodes} nodes, {name}"), ours, peer.name(), theirs, unit)
    };
    let p50 = |large: &Large| median(large.trickle.clone());
    let most = |large: &Large| large.trickle.iter().copied().fold(0.0, f64::max);
    let mut figures = vec![
        figure(
            "processor time until all have a block",
            ours.burst.usage.cpu,
            theirs.burst.usage.cpu,
            Unit::Seconds,
        ),
        figure("memory at work, the most", ours.peak, theirs.peak, Unit::Mebibytes).reaching(goals::MEMORY),
        figure("memory at rest", ours.rest.0, theirs.rest.0, Unit::Mebibytes).reaching(goals::MEMORY),
        figure("processor time in a second at rest", ours.rest.1, theirs.rest.1, Unit::Milliseconds),
        figure("one more node, until it has a block", p50(ours), p50(theirs), Unit::Milliseconds)
            .reaching(goals::TRICKLE),
        figure("one more node, the slowest", most(ours), most(theirs), Unit::Milliseconds),
        figure(
            "1,000 leave and 1,000 come, until these have blocks",
            ours.churn.0,
            theirs.churn.0,
            Unit::Seconds,
        ),
        figure(
            "the same, after the last of them was created",
            ours.churn.0 - ours.churn.1,
            theirs.churn.0 - theirs.churn.1,
            Unit::Seconds,
        ),
        figure("restart, until the first new block", ours.restart, theirs.restart, Unit::Seconds),
        figure("the same without the wait for reports", ours.restart_at_once, theirs.restart, Unit::Seconds),
    ];
    if let Some((flips, counters)) = ours.status {
        let events = |name: &str, events: Events, per_second: f64| {
            let name = format!("{nodes} nodes, status events per agent and hour, {name}");
            Figure::new(&name, events.number * 3600.0, "the write budget", per_second * 3600.0, Unit::Count)
                .reaching(goals::STATUS_EVENTS)
        };
        let counters_at_most = (COUNTER_EVENTS_PER_SECOND / nodes as f64).min(STATUS_WRITES_PER_SECOND);
        figures.push(events("while conditions change", flips, STATUS_WRITES_PER_SECOND));
        figures.push(events("while counters change", counters, counters_at_most));
        let size = |events: Events| events.bytes / events.number.max(f64::MIN_POSITIVE);
        say(&format!("  a status event has {:.0} bytes", size(flips.max(counters))));
    }
    figures
}

impl Events {
    /// Of two, the one with more events.
    fn max(self, other: Events) -> Events {
        if self.number >= other.number { self } else { other }
    }
}

/// Requests per node that joins.
#[derive(Debug)]
struct Requests {
    /// Writes by the contender until its block could be used.
    until_usable: f64,
    /// Writes by the contender in all.
    writes: f64,
    /// What it reads in all.
    reads: f64,
    /// Writes about the node by its own agent.
    reports: f64,
}

fn requests(args: &Args, plat: &Who, peer: &Who) -> Result<Vec<Figure>> {
    let (ours, theirs) = (count_requests(args, plat)?, count_requests(args, peer)?);
    let figure =
        |name: &str, ours: f64, theirs: f64| Figure::new(name, ours, peer.name(), theirs, Unit::Count);
    Ok(vec![
        figure("writes until a new node's block can be used", ours.until_usable, theirs.until_usable)
            .reaching(goals::WRITES_UNTIL_USABLE),
        figure("writes about a new node in all", ours.writes + ours.reports, theirs.writes)
            .reaching(goals::WRITES_IN_ALL),
        figure("reads about a new node", ours.reads, theirs.reads),
    ])
}

/// Nodes join a cluster one after the other; each one's own agent reports, and then everybody else's.
fn count_requests(args: &Args, who: &Who) -> Result<Requests> {
    say(&format!("{}: requests for a node that joins ...", who.name()));
    let plane = ControlPlane::audited()?;
    let mut log = Log::of(&plane);
    on_stage(args, who, &plane, async |stage| {
        let (there, joining) = COUNTED;
        let is_plat = matches!(who, Who::Plat(_));
        let uids = stage.create(there).await?;
        stage.watch().await?;
        let _running = stage.start()?;
        stage.wait_blocks(&uids).await?;
        if is_plat {
            stage.wait_reports_wanted().await?;
            stage.make_ready().await?;
            stage.report(there, 0, None).await?;
        }
        stage.wait_quiet(REST * 4).await?;
        log.since(ACCOUNT)?;
        let (mut until_usable, mut requests) = (0, Vec::new());
        let gives = if is_plat { ("create", "podcidrs") } else { ("patch", "nodes") };
        for _ in 0..joining {
            let one = stage.create(1).await?;
            stage.wait_blocks(&one).await?;
            sleep(Duration::from_millis(200)).await;
            let new = log.since(ACCOUNT)?;
            let block = new.iter().position(|r| (r.verb.as_str(), r.resource.as_str()) == gives);
            let block = block.context("the audit log does not tell of the block")?;
            until_usable += audit::writes(new.get(..=block).unwrap_or_default());
            requests.extend(new);
        }
        if is_plat {
            stage.wait_reports_wanted().await?;
            // Its block is there before its agent is, which has programmed the node by when its first report is due.
            stage.make_ready().await?;
            stage.report_of_newest(joining).await?;
            sleep(Duration::from_secs(1)).await;
            stage.report(stage.count(), 0, None).await?;
        }
        stage.wait_quiet(REST * 4).await?;
        requests.extend(log.since(ACCOUNT)?);
        for (request, number) in audit::count(&requests) {
            say(&format!("  {:.2} × {} {}", number as f64 / joining as f64, request.verb, request.resource));
        }
        let per_node = |number: usize| number as f64 / joining as f64;
        let writes = audit::writes(&requests);
        Ok(Requests {
            until_usable: per_node(until_usable),
            writes: per_node(writes),
            reads: per_node(requests.len() - writes),
            reports: if is_plat { 1.0 } else { 0.0 },
        })
    })
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}
