//! What a pass costs in a large cluster: a measurement, not a test. `cargo test -p plat-operator --release --lib cost
//! -- --ignored --nocapture`.

use plat_crds::digest::Digest;

use crate::facts::{BlockFact, NodeFact, ReportFact};
use crate::fixtures::{Scene, held_block, labels, node, range, report, scene, spec};
use crate::plan::plan;
use crate::snapshot::Source;
use crate::status;
use crate::step::Step;

const NODES: usize = 5000;

fn cidr(number: usize) -> String {
    format!("10.{}.{}.0/24", 224 + number / 256, number % 256)
}

/// A cluster at rest: every node has its block, its mirror and its agent's report.
fn large() -> Scene {
    let mut large = scene().range(range("default-v4", "10.224.0.0/11"));
    for number in 0..NODES {
        let name = format!("node-{number:05}");
        let block = cidr(number);
        let text = [
            ("kubernetes.io/hostname", name.as_str()),
            ("kubernetes.io/arch", "amd64"),
            ("kubernetes.io/os", "linux"),
            ("topology.kubernetes.io/zone", "eu-1a"),
            ("node.kubernetes.io/instance-type", "m5.xlarge"),
        ];
        let address = format!("172.{}.{}.{}", 16 + number / 62_500, number / 250 % 250, number % 250 + 1);
        let addresses: Box<[std::net::IpAddr]> = [address.parse().unwrap()].into();
        large = large
            .node(NodeFact {
                labels: labels(&text),
                pod_cidrs: spec(&[&block]),
                addresses: addresses.clone(),
                ..node(&name)
            })
            .block(BlockFact { addresses, ..held_block(&block, "default-v4", &name) })
            .report(report(&name, &[(&block, 3)]));
    }
    large.memory.ledger.update(&large.world.ranges, &large.world.blocks);
    let blocks = large.world.blocks.values().map(|b| (&*b.uid, b.generation));
    let ranges = large.world.ranges.values().map(|r| (&*r.uid, r.generation));
    let sum = Digest::of(blocks.chain(ranges));
    let reports: Vec<ReportFact> = large.world.reports.values().map(|r| (**r).clone()).collect();
    for report in reports {
        large = large.report(ReportFact { applied: Some(sum), ..report });
    }
    written(large)
}

/// The scene after all its statuses were written.
fn written(mut scene: Scene) -> Scene {
    let writes = {
        let snapshot = scene.snapshot();
        status::writes(&snapshot, &plan(&snapshot)).collect::<Vec<_>>()
    };
    for write in writes {
        if let Step::BlockStatus { object, new, .. } = write.step {
            let block = (*scene.world.blocks[&object.name]).clone();
            scene = scene.block(BlockFact { status: Some(Box::new((*new).into())), ..block });
        }
    }
    scene
}

/// Processor time of this thread, which does not depend on what else runs.
fn processor_time() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

fn timed<T>(what: &str, work: impl Fn() -> T) -> T {
    let begin = processor_time();
    let mut done = work();
    for _ in 1..10 {
        done = work();
    }
    println!("{what:>24}: {:6.2} ms", (processor_time() - begin) * 100.0);
    done
}

#[test]
#[ignore = "a measurement; run it by name with --release --ignored --nocapture"]
fn a_pass_over_five_thousand_nodes_costs() {
    let mut large = large();
    large.source = Source::Cache;
    let snapshot = large.snapshot();
    timed("claims", || crate::claims::Claims::of(&snapshot));
    let at_rest = timed("plan", || plan(&snapshot));
    assert_eq!(at_rest.steps, []);
    let writes = timed("statuses", || status::writes(&snapshot, &at_rest).collect::<Vec<_>>());
    assert!(writes.len() <= 1, "all but the range's counters are written: {:?}", writes.last());
    timed("memory", || {
        let mut memory = large.memory.clone();
        memory.observe(&large.world.blocks, |_| std::time::Duration::ZERO, large.clock);
        memory.observe_reports(&large.world.nodes, &large.world.reports, large.clock);
        memory.ledger.update(&large.world.ranges, &large.world.blocks);
    });
    timed("copy of a map", || (*large.world.blocks).clone());
    let joined = large.clone().node(node("one-more")).report(report("one-more", &[]));
    let more = timed("plan for one more", || joined.plan());
    assert!(matches!(more.steps[..], [Step::CreateBlock(_)]), "{:?}", more.steps);
    let changed = joined.after(&more);
    timed("ledger after a change", || {
        let mut memory = changed.memory.clone();
        memory.ledger.update(&changed.world.ranges, &changed.world.blocks);
    });
}
