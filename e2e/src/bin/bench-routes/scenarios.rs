//! What is measured of a contender.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use plat_e2e::bare::{BareNode, Process};
use plat_e2e::light::ControlPlane;
use plat_e2e::testbed::output;
use plat_e2e::usage::Usage;
use plat_rig::figures::{Figure, Unit, median, p99};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

use crate::contender::{Who, block, make_range};
use crate::kernel::{self, Kernel};
use crate::{Args, goals, say};

/// Time between two repairs: what is answered at once however long it goes on.
const BETWEEN_REPAIRS: Duration = Duration::from_millis(520);
/// flannel looks every ten seconds; so many routes are deleted at once.
const REPAIRS_OF_FLANNEL: usize = 10;
/// Routes in a cold start whose system calls are counted.
const COUNTED: usize = 2000;

/// What was measured at one size.
struct Size {
    nodes: usize,
    cold: f64,
    present: Vec<f64>,
}

/// What was measured of a contender.
struct Measured {
    sizes: Vec<Size>,
    calls_per_route: f64,
    rest: Usage,
    /// Processor time in a second at rest, in milliseconds.
    idle: f64,
    repair: Vec<f64>,
    churn: f64,
    churn_usage: Usage,
}

/// Measures everything but traffic.
pub fn all(args: &Args) -> Result<Vec<Figure>> {
    let plat = on_stage(args, Who::Plat)?;
    let flannel = on_stage(args, Who::Flannel)?;
    let mut figures = figures(&plat, &flannel);
    figures.extend(convergence(args)?);
    Ok(figures)
}

/// A control plane and a node on one link with all others.
fn node(plane: &ControlPlane, number: u8) -> Result<BareNode<'_>> {
    let node = BareNode::up(plane, number)?;
    node.ip(&["addr", "add", &format!("172.31.255.{number}/12"), "dev", "eth0"])?;
    Ok(node)
}

fn on_stage(args: &Args, who: Who) -> Result<Measured> {
    let plane = ControlPlane::up()?;
    plane.install_crds()?;
    let node = node(&plane, 1)?;
    // flannel asks whether the kernel lets iptables see bridged packets; it does not matter here.
    let mut kernel = Kernel::of(&node.namespace())?;
    plane.block_on(async |client| {
        let stage = Stage { args, who, plane: &plane, node: &node, client };
        let measured = stage.measure(&mut kernel).await;
        let log = node.folder().join(format!("{who:?}.log"));
        measured.with_context(|| {
            let end = output(Command::new("tail").arg("-n20").arg(log)).unwrap_or_default();
            format!("{}; the end of its log:\n{end}", who.name())
        })
    })
}

struct Stage<'a> {
    args: &'a Args,
    who: Who,
    plane: &'a ControlPlane,
    node: &'a BareNode<'a>,
    client: kube::Client,
}

impl Stage<'_> {
    fn start(&self, under: &[String]) -> Result<Process> {
        self.who.start(self.args, self.plane, self.node, under)
    }

    async fn measure(&self, kernel: &mut Kernel) -> Result<Measured> {
        let Stage { args, who, client, .. } = self;
        make_range(client).await?;
        let (mut there, mut sizes, mut calls_per_route) = (0, Vec::new(), 0.0);
        let mut running = None;
        for nodes in &args.nodes {
            say(&format!("{}: {nodes} nodes ...", who.name()));
            if let Some(running) = Option::take(&mut running) {
                Process::end(running).await?;
            }
            who.join_all(client, there + 1..=*nodes).await?;
            if *nodes == COUNTED {
                calls_per_route = self.count_calls(kernel, *nodes).await?;
            }
            let mut cold = Vec::new();
            for _ in 0..args.starts {
                if let Some(running) = Option::take(&mut running) {
                    Process::end(running).await?;
                }
                kernel.clean()?;
                let begin = Instant::now();
                running = Some(self.start(&[])?);
                cold.push(seconds(begin, kernel.wait_for(*nodes - 1)?));
            }
            let cold = median(cold);
            say(&format!("  all routes after {cold:.2} s"));
            sleep(Duration::from_secs(2)).await;
            let present = self.joins(kernel, *nodes).await?;
            say(&format!("  one more: {:.1} ms", median(present.clone())));
            there = nodes + args.joins;
            sizes.push(Size { nodes: *nodes, cold, present });
        }
        let running = running.context("no number of nodes")?;
        sleep(Duration::from_secs(3)).await;
        let rest = running.usage()?;
        sleep(Duration::from_secs(args.seconds)).await;
        let idle = (running.usage()?.cpu - rest.cpu) / args.seconds as f64 * 1000.0;
        say(&format!("  at rest: {:.1} MiB, {idle:.1} ms in a second", rest.resident));
        let repair = self.repairs(kernel, there)?;
        say(&format!("  repair: {:.2} ms, p99 {:.2} ms", median(repair.clone()), p99(repair.clone())));
        let before = running.usage()?;
        let begin = Instant::now();
        who.leave_all(client, 2..2 + args.churn).await?;
        who.join_all(client, there + 1..=there + args.churn).await?;
        kernel.wait_for_count(there - 1)?;
        let churn = begin.elapsed().as_secs_f64();
        let after = running.usage()?;
        let churn_usage = Usage { cpu: after.cpu - before.cpu, ..after };
        running.end().await?;
        Ok(Measured { sizes, calls_per_route, rest, idle, repair, churn, churn_usage })
    }

    /// Nodes that join one after the other, in milliseconds each.
    async fn joins(&self, kernel: &Kernel, there: usize) -> Result<Vec<f64>> {
        let mut took = Vec::new();
        for number in there + 1..=there + self.args.joins {
            // Not in step with anybody's pace.
            sleep(Duration::from_millis(60 + number as u64 * 37 % 90)).await;
            let begin = Instant::now();
            self.who.join(&self.client, number).await?;
            took.push(seconds(begin, kernel.wait_come(&block(number), begin)?) * 1000.0);
        }
        Ok(took)
    }

    /// Routes that are deleted, and how long each is away, in milliseconds.
    fn repairs(&self, kernel: &mut Kernel, there: usize) -> Result<Vec<f64>> {
        let away = |kernel: &Kernel, block: &str, since: Instant| -> Result<f64> {
            let come = kernel.wait_come(block, since)?;
            let gone = kernel.seen(block).gone.context("it did not go")?;
            Ok(seconds(gone, come) * 1000.0)
        };
        let blocks: Vec<String> =
            (0..self.args.repairs).map(|at| block(2 + at * 7919 % (there - 2))).collect();
        let mut took = Vec::new();
        let at_once = if self.who == Who::Flannel { REPAIRS_OF_FLANNEL } else { 1 };
        let rounds = if self.who == Who::Flannel { 4 } else { blocks.len() };
        for (round, blocks) in blocks.chunks(at_once).take(rounds).enumerate() {
            if self.who == Who::Flannel {
                // Somewhere between two of its looks.
                std::thread::sleep(Duration::from_millis(round as u64 * 3300 % 10_000));
            }
            let begin = Instant::now();
            for block in blocks {
                kernel.delete(block)?;
            }
            for block in blocks {
                took.push(away(kernel, block, begin)?);
            }
            std::thread::sleep(BETWEEN_REPAIRS);
        }
        Ok(took)
    }

    async fn count_calls(&self, kernel: &Kernel, nodes: usize) -> Result<f64> {
        kernel.clean()?;
        let summary = self.node.folder().join("strace");
        let under = ["/usr/bin/strace", "-f", "-c", "-o", &summary.display().to_string()].map(str::to_owned);
        if !std::path::Path::new(&under[0]).exists() {
            say("  no strace here: system calls are not counted");
            return Ok(0.0);
        }
        let running = self.start(&under)?;
        kernel.wait_for(nodes - 1)?;
        // The program that is traced; strace ends with it.
        let id = running.id();
        let traced = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        let traced = traced.trim().parse().ok().and_then(Pid::from_raw).context("strace traces nothing")?;
        kill_process(traced, Signal::TERM)?;
        let begin = Instant::now();
        while running.usage().is_ok() {
            ensure!(begin.elapsed() < kernel::DEADLINE, "strace goes on");
            sleep(Duration::from_millis(20)).await;
        }
        Ok(kernel::calls(&summary)? / nodes as f64)
    }
}

fn figures(plat: &Measured, flannel: &Measured) -> Vec<Figure> {
    let peer = Who::Flannel.name();
    let mut figures = Vec::new();
    for (ours, theirs) in plat.sizes.iter().zip(&flannel.sizes) {
        let nodes = ours.nodes;
        let cold =
            Figure::new(&format!("{nodes} routes from nothing"), ours.cold, peer, theirs.cold, Unit::Seconds);
        let goal = goals::COLD.iter().find(|(of, _)| *of == nodes);
        figures.push(match goal {
            Some((_, goal)) => cold.reaching(*goal),
            None => cold,
        });
        let name = format!("{nodes} nodes, one more, until its route is there");
        let (a, b) = (&ours.present, &theirs.present);
        let present = Figure::new(&name, median(a.clone()), peer, median(b.clone()), Unit::Milliseconds);
        figures.push(present.reaching(goals::PRESENT));
        let name = format!("{name}, 99th percentile");
        figures.push(Figure::new(&name, p99(a.clone()), peer, p99(b.clone()), Unit::Milliseconds));
    }
    let nodes = plat.sizes.last().map_or(0, |size| size.nodes);
    let mut add = |name: &str, ours, theirs, unit, goal: Option<_>| {
        let figure = Figure::new(&format!("{nodes} routes, {name}"), ours, peer, theirs, unit);
        figures.push(match goal {
            Some(goal) => figure.reaching(goal),
            None => figure,
        });
    };
    let (a, b) = (|| plat.repair.clone(), || flannel.repair.clone());
    add("a deleted one is back", median(a()), median(b()), Unit::Milliseconds, Some(goals::REPAIR));
    add("the same, 99th percentile", p99(a()), p99(b()), Unit::Milliseconds, Some(goals::REPAIR_P99));
    add("memory at rest", plat.rest.resident, flannel.rest.resident, Unit::Mebibytes, Some(goals::MEMORY));
    add("processor time in a second at rest", plat.idle, flannel.idle, Unit::Milliseconds, None);
    add("as many leave as come, until it is so", plat.churn, flannel.churn, Unit::Seconds, None);
    add("the same, processor time", plat.churn_usage.cpu, flannel.churn_usage.cpu, Unit::Seconds, None);
    add(
        "memory, the most until then",
        plat.churn_usage.peak,
        flannel.churn_usage.peak,
        Unit::Mebibytes,
        None,
    );
    figures.push(Figure::new(
        &format!("system calls per route from nothing, {COUNTED} routes"),
        plat.calls_per_route,
        peer,
        flannel.calls_per_route,
        Unit::Count,
    ));
    figures
}

/// A node joins, and every one of many agents gets its route.
fn convergence(args: &Args) -> Result<Vec<Figure>> {
    let (who, nodes) = (Who::Plat, args.nodes.first().copied().unwrap_or(500));
    say(&format!("{} agents of {nodes} nodes ...", args.agents));
    let plane = ControlPlane::up()?;
    plane.install_crds()?;
    let members: Vec<BareNode<'_>> =
        (1..=args.agents).map(|number| node(&plane, number)).collect::<Result<_>>()?;
    let kernels: Vec<Kernel> =
        members.iter().map(|node| Kernel::of(&node.namespace())).collect::<Result<_>>()?;
    let took = plane.block_on(async |client| {
        make_range(&client).await?;
        who.join_all(&client, 1..=nodes).await?;
        let agents: Vec<Process> =
            members.iter().map(|node| who.start(args, &plane, node, &[])).collect::<Result<_>>()?;
        for kernel in &kernels {
            kernel.wait_for(nodes - 1)?;
        }
        sleep(Duration::from_secs(3)).await;
        let mut took = Vec::new();
        for number in nodes + 1..=nodes + args.joins.min(20) {
            sleep(Duration::from_millis(200)).await;
            let begin = Instant::now();
            who.join(&client, number).await?;
            let mut last = begin;
            for kernel in &kernels {
                last = last.max(kernel.wait_come(&block(number), begin)?);
            }
            took.push(seconds(begin, last) * 1000.0);
        }
        ensure!(agents.iter().all(|agent| agent.usage().is_ok()), "an agent ended");
        anyhow::Ok(took)
    })?;
    let name = format!("{} agents, {nodes} nodes, one more, until all have its route", args.agents);
    Ok(vec![Figure::new(
        &name,
        median(took.clone()),
        "the slowest of these joins",
        p99(took),
        Unit::Milliseconds,
    )])
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}
