//! Metrics and health: what the process says of itself, and the probes' answers.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use plat_crds::ClusterCIDRStatus;
use plat_crds::condition::{self, EXHAUSTED, READY};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::apply::{Done, Outcome};
use crate::leader::{Pass, World};
use crate::reason;
use crate::status::signed;
use crate::step::Step;

/// `/livez` fails if the loop has not turned for so long: far longer than any call may take.
const STALL: Duration = Duration::from_secs(60);
/// A standby is ready if the API server has answered it within this time.
const CONTACT: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StepLabels {
    step: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BlockLabels {
    clustercidr: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RangeLabels {
    clustercidr: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

/// The metrics of `/metrics`.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    is_leader: Gauge,
    nodes: Gauge,
    nodes_without_block: Gauge,
    blocks_awaiting_withdrawal: Gauge,
    blocks_released_unproven: Counter,
    blocks: Family<BlockLabels, Gauge>,
    range_ready: Family<RangeLabels, Gauge>,
    range_exhausted_at: Family<RangeLabels, Gauge>,
    faults: Family<ReasonLabels, Gauge>,
    passes: Histogram,
    steps: Family<StepLabels, Counter>,
    status_backlog: Gauge,
    watch_errors: Family<KindLabels, Counter>,
    events_dropped: Counter,
    resident_memory: Gauge,
    cpu_seconds: Gauge<f64, AtomicU64>,
    start_time: Gauge<f64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::default(),
            is_leader: Gauge::default(),
            nodes: Gauge::default(),
            nodes_without_block: Gauge::default(),
            blocks_awaiting_withdrawal: Gauge::default(),
            blocks_released_unproven: Counter::default(),
            blocks: Family::default(),
            range_ready: Family::default(),
            range_exhausted_at: Family::default(),
            faults: Family::default(),
            passes: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            steps: Family::default(),
            status_backlog: Gauge::default(),
            watch_errors: Family::default(),
            events_dropped: Counter::default(),
            resident_memory: Gauge::default(),
            cpu_seconds: Gauge::default(),
            start_time: Gauge::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION")), ("component", "operator")]);
        let registry = &mut self.registry;
        registry.register("plat_build", "Version of this program", version);
        registry.register("plat_operator_is_leader", "1 while this process leads", self.is_leader.clone());
        registry.register("plat_operator_nodes", "Nodes that exist", self.nodes.clone());
        registry.register(
            "plat_operator_nodes_without_block",
            "Nodes that lack a block of some family",
            self.nodes_without_block.clone(),
        );
        registry.register(
            "plat_operator_blocks_awaiting_withdrawal",
            "Quarantined blocks whose time is over and that wait for nodes to withdraw their route",
            self.blocks_awaiting_withdrawal.clone(),
        );
        registry.register(
            "plat_operator_blocks_released_unproven",
            "Blocks freed at the deadline, though live nodes had not reported that they withdrew their route",
            self.blocks_released_unproven.clone(),
        );
        registry.register(
            "plat_operator_blocks",
            "Blocks of a ClusterCIDR by state: allocated, quarantined, free",
            self.blocks.clone(),
        );
        registry.register(
            "plat_operator_clustercidr_ready",
            "1 if a ClusterCIDR is Ready",
            self.range_ready.clone(),
        );
        registry.register_with_unit(
            "plat_operator_clustercidr_exhausted_at",
            "When a ClusterCIDR runs out of blocks at the pace of the last weeks, since the epoch; absent while that is not in sight or another ClusterCIDR takes over",
            Unit::Seconds,
            self.range_exhausted_at.clone(),
        );
        registry.register(
            "plat_operator_faults",
            "Objects with something wrong, by reason",
            self.faults.clone(),
        );
        registry.register_with_unit(
            "plat_operator_pass_duration",
            "Time of a pass: plan and writes",
            Unit::Seconds,
            self.passes.clone(),
        );
        registry.register("plat_operator_steps", "Writes by step and outcome", self.steps.clone());
        registry.register(
            "plat_operator_status_backlog",
            "Statuses that wait for the write budget or their interval",
            self.status_backlog.clone(),
        );
        registry.register("plat_operator_watch_errors", "Failures of watches", self.watch_errors.clone());
        registry.register(
            "plat_operator_events_dropped",
            "Events dropped because the queue was full",
            self.events_dropped.clone(),
        );
        registry.register_with_unit(
            "process_resident_memory",
            "Resident memory",
            Unit::Bytes,
            self.resident_memory.clone(),
        );
        registry.register_with_unit(
            "process_cpu",
            "CPU time, user and system",
            Unit::Seconds,
            self.cpu_seconds.clone(),
        );
        registry.register_with_unit(
            "process_start_time",
            "Start of the process since the epoch",
            Unit::Seconds,
            self.start_time.clone(),
        );
    }

    /// Notes a finished step.
    pub fn step(&self, done: &Done) {
        self.steps.get_or_create(&StepLabels { step: done.step.name(), outcome: done.outcome.name() }).inc();
        if let (Step::DeleteBlock { unproven: Some(_), .. }, Outcome::Done) = (&done.step, &done.outcome) {
            self.blocks_released_unproven.inc();
        }
    }

    /// Notes a failure of a watch.
    pub fn watch_error(&self, kind: &'static str) {
        self.watch_errors.get_or_create(&KindLabels { kind }).inc();
    }

    /// Notes an Event that nobody will read.
    pub fn event_dropped(&self) {
        self.events_dropped.inc();
    }

    /// Notes a pass.
    pub fn pass(&self, pass: &Pass, world: &World, took: Duration) {
        self.is_leader.set(1);
        self.passes.observe(took.as_secs_f64());
        self.nodes.set(signed(world.nodes.len()));
        self.nodes_without_block.set(signed(pass.plan.nodes_without_block));
        self.blocks_awaiting_withdrawal.set(signed(pass.plan.awaiting_withdrawal));
        self.status_backlog.set(signed(pass.status_backlog));
        self.faults.clear();
        for fault in &pass.plan.faults {
            self.faults.get_or_create(&ReasonLabels { reason: fault.reason }).inc();
        }
        self.blocks.clear();
        self.range_ready.clear();
        self.range_exhausted_at.clear();
        for (name, outlook) in &pass.plan.ranges {
            let of_range = |quarantined| {
                let blocks = world.blocks.values().filter(|block| block.range == *name);
                blocks.filter(|block| block.is_quarantined() == quarantined).count()
            };
            let free = usize::try_from(outlook.free).unwrap_or(usize::MAX);
            for (state, count) in
                [("allocated", of_range(false)), ("quarantined", of_range(true)), ("free", free)]
            {
                self.blocks
                    .get_or_create(&BlockLabels { clustercidr: name.to_string(), state })
                    .set(signed(count));
            }
            let status = world.ranges.get(name).map(|range| &range.status);
            let labels = RangeLabels { clustercidr: name.to_string() };
            let ready = status.is_some_and(|status| condition::is_true(&status.conditions, READY));
            self.range_ready.get_or_create(&labels).set(i64::from(ready));
            if let Some(at) = status.and_then(foretold_end) {
                self.range_exhausted_at.get_or_create(&labels).set(at.as_second());
            }
        }
    }

    /// The text of `/metrics`, OpenMetrics.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        if let Some(process) = Process::read() {
            self.resident_memory.set(process.resident_bytes);
            self.cpu_seconds.set(process.cpu_seconds);
            self.start_time.set(process.started);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// When a range runs out, unless another takes over.
fn foretold_end(status: &ClusterCIDRStatus) -> Option<Timestamp> {
    let exhausted = condition::find(&status.conditions, EXHAUSTED);
    let Time(at) = status.forecast.as_ref()?.exhausted_at.as_ref()?;
    exhausted.is_none_or(|c| c.reason != reason::OTHERS_TAKE_OVER).then_some(*at)
}

/// Figures of this process from `/proc`.
struct Process {
    resident_bytes: i64,
    cpu_seconds: f64,
    started: f64,
}

impl Process {
    fn read() -> Option<Process> {
        let ticks_per_second = 100.0; // USER_HZ, which the kernel promises to user space on every architecture we build for
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The command name, in brackets, may hold anything: fields are counted from behind it (proc(5)).
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
        let boot: f64 = std::fs::read_to_string("/proc/stat")
            .ok()?
            .lines()
            .find_map(|line| line.strip_prefix("btime ")?.parse().ok())?;
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let resident =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB"))?;
        Some(Process {
            resident_bytes: resident.trim().parse::<i64>().ok()? * 1024,
            cpu_seconds: (ticks(14)? + ticks(15)?) / ticks_per_second,
            started: boot + ticks(22)? / ticks_per_second,
        })
    }
}

/// What the probes ask.
#[derive(Debug)]
pub struct Health {
    began: Instant,
    turned: AtomicU64,
    contact: Mutex<Option<Instant>>,
    leads: AtomicBool,
    passed: AtomicBool,
    must_lead: AtomicBool,
}

impl Default for Health {
    fn default() -> Self {
        Health {
            began: Instant::now(),
            turned: AtomicU64::new(0),
            contact: Mutex::new(None),
            leads: AtomicBool::new(false),
            passed: AtomicBool::new(false),
            must_lead: AtomicBool::new(false),
        }
    }
}

impl Health {
    /// The loop has turned: it is alive, whether or not the API server is.
    pub fn turn(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.turned.store(now, Ordering::Relaxed);
    }

    /// The API server has answered.
    pub fn contact(&self) {
        if let Ok(mut contact) = self.contact.lock() {
            *contact = Some(Instant::now());
        }
    }

    /// This process leads from now on.
    pub fn leads(&self) {
        self.leads.store(true, Ordering::Relaxed);
    }

    /// A pass over a complete world is done.
    pub fn passed(&self) {
        self.passed.store(true, Ordering::Relaxed);
        self.contact();
    }

    /// Whether the loop turns.
    pub fn live(&self) -> Result<&'static str, String> {
        let turned = Duration::from_millis(self.turned.load(Ordering::Relaxed));
        let still = self.began.elapsed().saturating_sub(turned);
        if still < STALL {
            Ok("the loop turns")
        } else {
            Err(format!("the loop has not turned for {still:?}"))
        }
    }

    /// As a standby it is not ready: in cleanup nobody else does its work.
    pub fn must_lead(&self) {
        self.must_lead.store(true, Ordering::Relaxed);
    }

    /// Whether it does its work: as leader, it has passed over everything; as standby, it can reach the API
    /// server and would take over.
    pub fn ready(&self, holds_lease: bool) -> Result<&'static str, String> {
        if self.leads.load(Ordering::Relaxed) {
            return match (holds_lease, self.passed.load(Ordering::Relaxed)) {
                (true, true) => Ok("leading"),
                (true, false) => Err("leading, but has not seen every object yet".to_owned()),
                (false, _) => Err("the leader Lease cannot be renewed: is the API server there?".to_owned()),
            };
        }
        if self.must_lead.load(Ordering::Relaxed) {
            return Err("standing by: nothing is cleaned up before it leads".to_owned());
        }
        let contact = self.contact.lock().map(|contact| *contact).unwrap_or_default();
        match contact.map(|at| at.elapsed()) {
            Some(ago) if ago < CONTACT => Ok("standing by"),
            Some(ago) => Err(format!("standing by, but the API server has not answered for {ago:?}")),
            None => Err("the API server has not answered yet".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::Outcome;
    use crate::fixtures::{NOW, at, held_block, node, range, scene};
    use crate::step::Step;
    use plat_crds::cluster_cidr::RangeForecast;
    use plat_crds::condition::Verdict;

    #[test]
    fn metrics_say_what_a_pass_left() {
        let metrics = Metrics::default();
        let scene = scene()
            .range(range("default-v4", "10.244.0.0/22"))
            .node(node("n1"))
            .node(node("n2"))
            .block(held_block("10.244.0.0/24", "default-v4", "n1"))
            .all_report();
        let pass = Pass { plan: scene.plan(), status_backlog: 7, ..Pass::default() };
        metrics.pass(&pass, &scene.world, Duration::from_millis(3));
        metrics.step(&Done {
            step: Step::CreateReport { node: "n".into() },
            outcome: Outcome::Done,
            learnt: None,
            retry_after: None,
        });
        let text = metrics.text().unwrap();
        for line in [
            r#"plat_build_info{version="0.1.0",component="operator"} 1"#,
            r#"plat_operator_blocks{clustercidr="default-v4",state="allocated"} 1"#,
            r#"plat_operator_blocks{clustercidr="default-v4",state="free"} 2"#,
            "plat_operator_nodes_without_block 1",
            "plat_operator_is_leader 1",
            "plat_operator_status_backlog 7",
            r#"plat_operator_steps_total{step="create_report",outcome="done"} 1"#,
            "plat_operator_pass_duration_seconds_count 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        let memory =
            text.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes ")).unwrap();
        assert!(memory.parse::<i64>().unwrap() > 100_000, "{memory}");
    }

    #[test]
    fn a_range_that_is_gone_leaves_the_metrics() {
        let metrics = Metrics::default();
        let one = scene().range(range("old", "10.244.0.0/22"));
        metrics.pass(&Pass { plan: one.plan(), ..Pass::default() }, &one.world, Duration::ZERO);
        let other = scene().range(range("new", "10.245.0.0/22"));
        metrics.pass(&Pass { plan: other.plan(), ..Pass::default() }, &other.world, Duration::ZERO);
        let text = metrics.text().unwrap();
        assert!(text.contains(r#"clustercidr="new""#) && !text.contains(r#"clustercidr="old""#));
    }

    #[test]
    fn the_time_a_range_runs_out_is_told_while_it_is_in_sight_and_nobody_takes_over() {
        let (metrics, end) = (Metrics::default(), Time(at(NOW + 99)));
        let told = |exhausted_at, reason| {
            let mut range = range("r", "10.244.0.0/22");
            range.status.forecast = Some(RangeForecast { exhausted_at, ..RangeForecast::default() });
            let verdict = Verdict::new(EXHAUSTED, Some(false), reason, "");
            condition::set(&mut range.status.conditions, &verdict, None, &Time(at(NOW)));
            let one = scene().range(range);
            metrics.pass(&Pass { plan: one.plan(), ..Pass::default() }, &one.world, Duration::ZERO);
            let line =
                format!(r#"plat_operator_clustercidr_exhausted_at_seconds{{clustercidr="r"}} {}"#, NOW + 99);
            metrics.text().unwrap().contains(&line)
        };
        assert!(told(Some(end.clone()), reason::RUNS_OUT_SOON));
        assert!(!told(None, reason::BLOCKS_FREE));
        assert!(!told(Some(end), reason::OTHERS_TAKE_OVER));
    }

    #[test]
    fn readiness_is_standing_by_in_contact_or_leading_after_a_pass() {
        let health = Health::default();
        assert!(health.live().is_ok());
        assert!(health.ready(false).unwrap_err().contains("has not answered yet"));
        health.contact();
        assert_eq!(health.ready(false), Ok("standing by"));
        health.must_lead();
        assert!(health.ready(false).unwrap_err().contains("nothing is cleaned up before it leads"));
        health.leads();
        assert!(health.ready(true).unwrap_err().contains("not seen every object"));
        health.passed();
        assert_eq!(health.ready(true), Ok("leading"));
        assert!(health.ready(false).unwrap_err().contains("cannot be renewed"));
    }
}
