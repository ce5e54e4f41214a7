//! The model of docs/scale.md: what a cluster of n nodes costs. Prints the document's table
//! (`cargo test -p plat-operator --test scale_model -- --nocapture`), and holds that the document says the same, that
//! a simulation agrees with the formulas, and that measured figures are near them. `UPDATE_GOLDEN=1` writes the
//! table into the document.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use plat_operator::budget::Budget;
use plat_operator::memory::STATUS_WRITES_PER_SECOND;
use plat_operator::status::{counters_per_second, range_counters_every, weight};

/// Blocks per second that one API server with its etcd creates on two processors; 290 to 560 were
/// measured on a busy one.
const BLOCKS_PER_SECOND: f64 = 500.0;
/// Reports of all agents per second at most (`node-agent/src/publish.rs`).
const REPORTS_PER_SECOND: f64 = 50.0;
/// Status writes for a node that joins: ready, then converged.
const STATUSES_PER_JOIN: f64 = 2.0;
/// Writes about a node that joins: PodCIDR, NodeNetwork, mirror, two Events, two statuses, the ClusterCIDR's counters,
/// one report.
const WRITES_PER_JOIN: f64 = 9.0;
/// Bytes of a PodCIDR in a watch or a list: measured.
const BLOCK_BYTES: f64 = 2_223.0;
/// Ranges of a cluster, and the groups that the status of each tells of: both families, and as many zones as there may be.
const RANGES: [usize; 2] = [64, 64];
/// Bytes in etcd for a node: PodCIDR and NodeNetwork, which last, and two Events, which last an hour.
const STORED_BYTES: f64 = 2_200.0 + 1_500.0 + 2.0 * 800.0;
/// Memory of the operator: program and runtime, and what is kept of a node.
const OPERATOR_MIB: (f64, f64) = (10.0, 0.0038);

/// What is measured may be so many times more or less than the model: memory and counts; times, which depend on the
/// machine.
const NEAR: f64 = 2.0;
const NEAR_IN_TIME: f64 = 4.0;

struct Model(f64);

impl Model {
    /// Seconds until n nodes that come at once have blocks.
    fn until_blocks(&self) -> f64 {
        self.0 / BLOCKS_PER_SECOND
    }

    /// Seconds until all their statuses are written.
    fn until_statuses(&self) -> f64 {
        self.0 * STATUSES_PER_JOIN / STATUS_WRITES_PER_SECOND
    }

    /// Seconds until every agent has reported a change: its pace, and a quarter of it as spread.
    fn until_acknowledged(&self) -> f64 {
        (self.0 / REPORTS_PER_SECOND).max(1.0) * 1.25
    }

    /// Status events per agent and hour while conditions change without end.
    fn flips(&self) -> f64 {
        STATUS_WRITES_PER_SECOND * 3600.0
    }

    /// Status events per agent and hour while every node's counters change without end. A block's are written every 10 s
    /// at most, and not more often than its agent reports.
    fn counters(&self) -> f64 {
        let nodes = self.0 as usize;
        counters_per_second(nodes).min(REPORTS_PER_SECOND).min(self.0 / 10.0) * 3600.0
    }

    /// Of these, events of ClusterCIDRs while blocks come and go without end: their numbers change with each.
    fn range_counters(&self) -> f64 {
        let every = range_counters_every(self.0 as usize, RANGES.into_iter());
        RANGES.len() as f64 * 3600.0 / every.as_secs_f64()
    }

    /// MiB per second that the API server sends for those to all agents together.
    fn range_bytes(&self) -> f64 {
        let bytes =
            RANGES.map(|groups| weight(groups) * BLOCK_BYTES).iter().sum::<f64>() / RANGES.len() as f64;
        self.range_counters() / 3600.0 * bytes * self.0 / MIB
    }

    /// Events per second that the API server sends for that to all agents together, and MiB.
    fn fan_out(&self) -> (f64, f64) {
        let events = self.counters() / 3600.0 * self.0;
        (events, events * BLOCK_BYTES / MIB)
    }

    /// MiB that one agent lists when it starts, and GiB that all list when all start.
    fn lists(&self) -> (f64, f64) {
        let one = self.0 * BLOCK_BYTES / MIB;
        (one, one * self.0 / 1024.0)
    }

    fn operator_mib(&self) -> f64 {
        OPERATOR_MIB.0 + OPERATOR_MIB.1 * self.0
    }

    fn etcd_mib(&self) -> f64 {
        self.0 * STORED_BYTES / MIB
    }
}

const MIB: f64 = 1024.0 * 1024.0;

fn table() -> String {
    let sizes = [5_000.0, 15_000.0, 65_000.0].map(Model);
    let row = |name: &str, value: &dyn Fn(&Model) -> f64, digits: usize| {
        let cells = sizes.iter().map(|model| format!(" {} |", grouped(value(model), digits)));
        format!("| {name} |{}\n", cells.collect::<String>())
    };
    [
        "| | 5,000 nodes | 15,000 | 65,000 |\n| --- | ---: | ---: | ---: |\n".to_owned(),
        row("all at once: until all have blocks, s", &Model::until_blocks, 0),
        row("all at once: until all statuses are written, s", &Model::until_statuses, 0),
        row("all at once: writes in all", &|m| m.0 * WRITES_PER_JOIN, 0),
        row("until every agent has reported a change, s", &Model::until_acknowledged, 0),
        row("status events per agent and hour, conditions changing without end", &Model::flips, 0),
        row("status events per agent and hour, counters changing without end", &Model::counters, 0),
        row("for counters: events/s to all agents", &|m| m.fan_out().0, 0),
        row("for counters: MiB/s to all agents", &|m| m.fan_out().1, 0),
        row(
            "of these, of 2 ClusterCIDRs with 64 groups each: events per agent and hour",
            &Model::range_counters,
            0,
        ),
        row("of these, of 2 ClusterCIDRs with 64 groups each: MiB/s to all agents", &Model::range_bytes, 0),
        row("one agent starts: its list, MiB", &|m| m.lists().0, 0),
        row("all agents start: their lists, GiB", &|m| m.lists().1, 0),
        row("routes of a node, per family", &|m| m.0 - 1.0, 0),
        row("operator, MiB", &Model::operator_mib, 0),
        row("etcd, Plat's objects, MiB", &Model::etcd_mib, 0),
    ]
    .concat()
}

/// Whatever the size of the cluster, the counters of ranges cost no more than half of what all counters may.
#[test]
fn ranges_leave_half_of_the_counters_to_blocks() {
    for nodes in [1.0, 100.0, 1000.0, 5000.0, 15_000.0, 65_000.0, 100_000.0] {
        let model = Model(nodes);
        let bound = counters_per_second(nodes as usize) * nodes * BLOCK_BYTES / MIB;
        assert!(
            model.range_bytes() <= bound / 2.0 * 1.001,
            "{nodes} nodes: {} of {bound}",
            model.range_bytes()
        );
    }
}

/// A number with commas.
fn grouped(value: f64, digits: usize) -> String {
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (at, digit) in whole.chars().enumerate() {
        if at > 0 && (whole.len() - at) % 3 == 0 {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

fn document(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)
}

#[test]
fn the_document_says_what_the_model_says() {
    const MARKS: (&str, &str) = ("<!-- model begin -->\n", "<!-- model end -->");
    let table = table();
    println!("{table}");
    let path = document("scale.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS.0).unwrap();
    let (said, after) = rest.split_once(MARKS.1).unwrap();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, [before, MARKS.0, &table, MARKS.1, after].concat()).unwrap();
    } else {
        assert_eq!(said, table, "UPDATE_GOLDEN=1 writes the model's table into docs/scale.md");
    }
}

/// What a second of a simulated cluster writes: agents whose counters always change report at their pace, and the
/// operator looks twice a second.
fn simulated_counters(nodes: usize, seconds: u64) -> f64 {
    let pace = (nodes as f64 / REPORTS_PER_SECOND).max(1.0);
    let mut next: Vec<f64> = (0..nodes).map(|n| pace * (n * 7919 % nodes) as f64 / nodes as f64).collect();
    let spread = |node: usize| pace / 4.0 * (node * 104_729 % 1000) as f64 / 1000.0;
    let (mut flips, mut counters) =
        (Budget::new(STATUS_WRITES_PER_SECOND), Budget::new(counters_per_second(nodes)));
    let (mut changed, mut written) = (BTreeSet::new(), vec![f64::MIN; nodes]);
    let mut writes = 0;
    for half in 0..seconds * 2 {
        let now = half as f64 / 2.0;
        for (node, due) in next.iter_mut().enumerate().filter(|(_, due)| **due <= now) {
            changed.insert(node);
            *due = now + pace + spread(node);
        }
        let steady = Duration::from_secs_f64(now);
        let mut ripe: Vec<usize> =
            changed.iter().copied().filter(|node| now - written[*node] >= 10.0).collect();
        ripe.sort_by(|a, b| written[*a].total_cmp(&written[*b]));
        let permits = counters.take(steady, ripe.len());
        for node in ripe.into_iter().take(flips.take(steady, permits)) {
            changed.remove(&node);
            written[node] = now;
            writes += 1;
        }
    }
    writes as f64 / seconds as f64
}

#[test]
fn a_simulation_agrees_with_the_formula_for_counters() {
    for (nodes, seconds) in [(20, 600), (200, 600), (1000, 600), (5000, 1200), (15_000, 1200)] {
        let (simulated, formula) =
            (simulated_counters(nodes, seconds), Model(nodes as f64).counters() / 3600.0);
        // Agents wait for a quarter of their pace more, and the budgets begin with a second's worth.
        assert!(simulated <= formula * 1.05 + 0.2, "{nodes} nodes: {simulated} against {formula} a second");
        assert!(simulated >= formula * 0.75, "{nodes} nodes: {simulated} against {formula} a second");
    }
}

#[test]
fn a_simulated_fleet_has_its_statuses_when_the_formula_says() {
    let nodes = 5000;
    let mut budget = Budget::new(STATUS_WRITES_PER_SECOND);
    let (mut left, mut half) = (nodes as f64 * STATUSES_PER_JOIN, 0u64);
    while left > 0.0 {
        left -= budget.take(Duration::from_millis(half * 500), 50) as f64;
        half += 1;
    }
    let (simulated, formula) = (half as f64 / 2.0, Model(nodes as f64).until_statuses());
    assert!((simulated / formula - 1.0).abs() < 0.05, "{simulated} s against {formula} s");
}

#[test]
fn what_was_measured_is_near_the_model() {
    let text = std::fs::read_to_string(document("benchmarks.md")).unwrap();
    let ours = |name: &str| -> Vec<f64> {
        let rows = text.lines().filter_map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            (cells.next()? == name).then_some(())?;
            cells.next()?.split(' ').next()?.parse().ok()
        });
        rows.collect()
    };
    let model = Model(5000.0);
    let mut found = 0;
    for (name, modelled, near) in [
        ("5000 nodes, until all have a block", model.until_blocks(), NEAR_IN_TIME),
        ("5000 nodes, memory at rest", model.operator_mib(), NEAR),
        ("5000 nodes, status events per agent and hour, while conditions change", model.flips(), NEAR),
        ("5000 nodes, status events per agent and hour, while counters change", model.counters(), NEAR),
        ("writes about a new node in all", WRITES_PER_JOIN, NEAR),
    ] {
        for measured in ours(name) {
            found += 1;
            let times = measured / modelled;
            assert!(times < near && times > 1.0 / near, "{name}: measured {measured}, modelled {modelled}");
        }
    }
    assert!(found > 0, "docs/benchmarks.md has no figures of a cluster of 5,000 nodes");
}
