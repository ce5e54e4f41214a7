//! Many nodes, as objects. With 2,000 it is a measurement, not a test: `cargo test -p plat-operator --release
//! --test apiserver -- --ignored --nocapture two_thousand`.

use std::time::{Duration, Instant};

use futures::StreamExt;
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{Operator, arena};

#[test]
fn five_hundred_nodes_get_their_blocks() {
    blocks_for(500, async |_| {});
}

#[test]
#[ignore = "a measurement of a minute; run it by name with --ignored --nocapture"]
fn two_thousand_nodes_get_their_blocks() {
    blocks_for(2000, async |operator| {
        let begin = Instant::now();
        wait_until_async("all statuses are written", MANY, async || {
            let written = operator.metric(r#"plat_operator_steps_total{step="block_status",outcome="done"}"#);
            let backlog = operator.metric("plat_operator_status_backlog");
            holds(written >= Some(2000.0) && backlog == Some(0.0), format!("{written:?} {backlog:?}"))
        })
        .await;
        println!("all statuses {:?} later", begin.elapsed());
    });
}

const MANY: Duration = Duration::from_secs(120);

fn blocks_for(nodes: usize, then: impl AsyncFnOnce(&Operator) + Send) {
    arena(|cluster| async move {
        let create = |i: usize| {
            let cluster = cluster.clone();
            async move {
                cluster
                    .node(
                        &format!("node-{i:04}"),
                        json!({}),
                        &[&format!("172.29.{}.{}", i / 250, i % 250 + 1)],
                    )
                    .await
            }
        };
        let begin = Instant::now();
        futures::stream::iter((0..nodes).map(create)).buffer_unordered(32).for_each(async |_| {}).await;
        println!("{nodes} nodes created in {:?}", begin.elapsed());

        let begin = Instant::now();
        let operator = cluster
            .operator("a", &["--cluster-cidr=10.224.0.0/11", "--log-level=info,plat_operator::run=debug"]);
        wait_until_async("all have blocks", MANY, async || {
            let without = operator.metric("plat_operator_nodes_without_block");
            holds(
                without == Some(0.0) && operator.metric("plat_operator_nodes") == Some(nodes as f64),
                format!("{without:?}"),
            )
        })
        .await;
        println!("all have blocks after {:?}", begin.elapsed());
        let resident = |what: &str| {
            println!(
                "{what}: resident {:.1} MiB, cpu {:?} s",
                operator.metric("process_resident_memory_bytes").unwrap_or(0.0) / 1048576.0,
                operator.metric("process_cpu_seconds")
            )
        };
        resident("with blocks");
        wait_until_async("all are mirrored", MANY, async || {
            let mirrored =
                operator.metric(r#"plat_operator_steps_total{step="mirror_to_node",outcome="done"}"#);
            holds(mirrored >= Some(nodes as f64), format!("{mirrored:?}"))
        })
        .await;
        println!("all mirrored after {:?}", begin.elapsed());
        then(&operator).await;
        resident("in the end");
        operator
            .log()
            .lines()
            .filter(|line| line.contains(" pass "))
            .take(12)
            .for_each(|line| println!("{line}"));
        cluster.assert_no_double().await;
    });
}
