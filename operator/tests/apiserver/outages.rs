//! The operator behind a proxy that does what networks and API servers do on bad days, to every kind of request.
//! After each fault the map is right again by itself, and at no time was a block given out twice.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, ListParams};
use plat_crds::condition::{self, READY};
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR};
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;

use crate::arena::{Cluster, DEADLINE, Operator, arena, pod_cidrs};
use crate::observer::Observer;
use crate::proxy::{Fault, Proxy, Rule, on};

/// A Lease that outlives the faults of a round, and times that tests can wait for.
const FLAGS: [&str; 8] = [
    "--cluster-cidr=10.244.0.0/16",
    "--quarantine-seconds=60",
    "--quarantine-watch-seconds=1",
    "--report-wait-seconds=1",
    "--watch-seconds=3",
    "--lease-duration-seconds=12",
    "--lease-renew-deadline-seconds=10",
    "--lease-retry-milliseconds=200",
];

/// One operator behind a proxy, nodes for a number of rounds, and an observer.
struct Stage {
    cluster: Cluster,
    proxy: Proxy,
    operator: Operator,
    observer: Observer,
}

/// The objects of one round. Each of them makes the operator take other steps.
struct Round {
    /// A node that joins: a block, a mirror, a NodeNetwork.
    new: String,
    /// A node whose address changes, and that somebody marks as without network.
    changed: String,
    /// A node that leaves: its block is quarantined.
    leaving: String,
    /// A node that has left, whose block is free now.
    left: String,
    /// A range that comes, and goes in the next round.
    range: String,
    range_before: Option<String>,
}

impl Round {
    fn of(index: usize) -> Round {
        let range = |index: usize| format!("range-{index:02}");
        Round {
            new: format!("new-{index:02}"),
            changed: format!("changed-{index:02}"),
            leaving: format!("leaving-{index:02}"),
            left: format!("left-{index:02}"),
            range: range(index),
            range_before: index.checked_sub(1).map(range),
        }
    }

    fn address(&self, third: u8) -> String {
        let index: u8 = self.new.trim_start_matches("new-").parse().unwrap();
        format!("172.30.{third}.{}", index + 1)
    }
}

impl Stage {
    async fn set(cluster: Cluster, rounds: usize) -> Stage {
        for index in 0..rounds {
            let round = Round::of(index);
            cluster.node(&round.changed, json!({}), &[&round.address(1)]).await;
            cluster.node(&round.leaving, json!({}), &[&round.address(2)]).await;
            cluster.node(&round.left, json!({}), &[&round.address(3)]).await;
        }
        let proxy = Proxy::start(cluster.plane, cluster.client.clone()).await;
        let operator = proxy.operator(cluster.plane, "behind-a-proxy", &FLAGS);
        let observer = Observer::start(&cluster.client, Duration::from_secs(60)).await;
        for index in 0..rounds {
            let round = Round::of(index);
            cluster.wait_blocks(&[&round.changed, &round.leaving, &round.left], 1).await;
            let block = cluster.block_of(&round.changed).await.unwrap();
            cluster.report(&round.changed, &[(&block.spec.cidr, 3)]).await;
            cluster.delete_node(&round.left).await;
        }
        let stage = Stage { cluster, proxy, operator, observer };
        for index in 0..rounds {
            stage.wait_state(&Round::of(index).left, BlockState::Quarantined).await;
        }
        stage
    }

    async fn wait_state(&self, node: &str, state: BlockState) {
        wait_until_async(&format!("the block of {node} is {state:?}"), DEADLINE, async || {
            let block = self.cluster.block_of(node).await;
            holds(block.as_ref().is_some_and(|block| block.spec.state == state), format!("{block:?}"))
        })
        .await;
    }

    async fn block_name(&self, node: &str) -> String {
        self.cluster.block_of(node).await.unwrap().metadata.name.unwrap()
    }

    /// Disturbs every kind of step with this fault, once or twice.
    async fn disturb_steps(&self, round: &Round, fault: Fault) -> Vec<Rule> {
        let (changed, leaving, left) = (
            self.block_name(&round.changed).await,
            self.block_name(&round.leaving).await,
            self.block_name(&round.left).await,
        );
        let range_before = round.range_before.iter().map(|name| on("patch", "clustercidrs").named(name));
        [
            on("create", "podcidrs"),
            on("create", "nodenetworks").named(&round.new),
            on("patch", "nodes").named(&round.new),
            on("patch", "podcidrs").named(&changed),
            on("patch", "podcidrs/status").named(&changed),
            on("patch", "nodes/status").named(&round.changed),
            on("get", "nodes").named(&round.leaving),
            on("patch", "podcidrs").named(&leaving),
            on("get", "nodes").named(&round.left),
            on("delete", "podcidrs").named(&left),
            on("delete", "nodenetworks").named(&round.left),
            on("patch", "clustercidrs").named(&round.range),
            on("patch", "clustercidrs/status").named(&round.range),
            on("list", "clustercidrs"),
            on("list", "podcidrs"),
            on("get", "leases"),
            on("update", "leases"),
            on("create", "events"),
        ]
        .into_iter()
        .chain(range_before)
        .map(|which| self.proxy.inject(1, which, fault))
        .collect()
    }

    /// Gives the operator all kinds of work.
    async fn give_work(&self, round: &Round) {
        let cluster = &self.cluster;
        let left = self.block_name(&round.left).await;
        cluster.node(&round.new, json!({}), &[&round.address(0)]).await;
        let status = json!({
            "addresses": [{"$patch": "replace"}, {"type": "InternalIP", "address": round.address(9)}],
            "conditions": [{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated", "message": ""}],
        });
        cluster.patch_node_status(&round.changed, status).await;
        cluster.delete_node(&round.leaving).await;
        cluster.end_quarantine(&left).await;
        let cidr = format!(
            "10.{}.0.0/16",
            100 + round.address(0).rsplit('.').next().unwrap().parse::<u8>().unwrap()
        );
        cluster.range(&round.range, json!({"cidr": cidr, "allocation": "Draining"})).await;
        if let Some(before) = &round.range_before {
            cluster.api::<ClusterCIDR>().delete(before, &DeleteParams::default()).await.unwrap();
        }
    }

    /// Waits until everything is as the round's work asks for.
    async fn wait_right(&self, round: &Round, what: &str) {
        // Its block's first status waits for its agent, and all rounds together must not outlast the quarantine.
        self.cluster.wait_blocks(&[&round.new], 1).await;
        let block = self.cluster.block_of(&round.new).await.unwrap();
        self.cluster.report(&round.new, &[(&block.spec.cidr, 0)]).await;
        wait_until_async(&format!("the map is right after {what}"), DEADLINE, async || {
            self.observer.check();
            self.look(round).await
        })
        .await;
    }

    async fn look(&self, round: &Round) -> Result<(), String> {
        let cluster = &self.cluster;
        let of = |list: &[PodCIDR], node: &str| -> Vec<PodCIDR> {
            list.iter().filter(|block| block.spec.node_name == node).cloned().collect()
        };
        let blocks = cluster.api::<PodCIDR>().list(&ListParams::default()).await.unwrap().items;
        for node in cluster.api::<Node>().list(&ListParams::default()).await.unwrap() {
            let name = node.metadata.name.as_deref().unwrap_or_default();
            let [own] = &of(&blocks, name)[..] else {
                return Err(format!("{name}: {:?}", of(&blocks, name)));
            };
            holds(own.spec.state == BlockState::Active, format!("{own:?}"))?;
            holds(pod_cidrs(&node) == [own.spec.cidr.as_str()], format!("mirror of {name}: {node:?}"))?;
            let report = cluster.api::<NodeNetwork>().get_opt(name).await.unwrap();
            holds(report.is_some(), format!("{name} has no NodeNetwork"))?;
            let seen = own.status.as_ref().and_then(|status| status.observed_generation);
            holds(seen == own.metadata.generation, format!("status of {name}: {own:?}"))?;
        }
        let changed = of(&blocks, &round.changed);
        holds(changed[0].spec.node_addresses == [round.address(9)], format!("{changed:?}"))?;
        let node = cluster.get_node(&round.changed).await;
        let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
        let unavailable = conditions.iter().find(|c| c.type_ == "NetworkUnavailable");
        holds(unavailable.is_some_and(|c| c.status == "False"), format!("{conditions:?}"))?;
        let leaving = of(&blocks, &round.leaving);
        let rests = matches!(&leaving[..], [block] if block.spec.state == BlockState::Quarantined);
        holds(rests, format!("{leaving:?}"))?;
        holds(of(&blocks, &round.left).is_empty(), "the free block is there")?;
        let report = cluster.api::<NodeNetwork>().get_opt(&round.left).await.unwrap();
        holds(report.is_none(), "the NodeNetwork of a gone node is there")?;
        let ranges = cluster.api::<ClusterCIDR>();
        let range = ranges.get(&round.range).await.unwrap();
        let ready = range.status.is_some_and(|status| condition::is_true(&status.conditions, READY));
        holds(ready && range.metadata.finalizers.is_some(), format!("{:?}", range.metadata))?;
        if let Some(before) = &round.range_before {
            holds(ranges.get_opt(before).await.unwrap().is_none(), format!("{before} is there"))?;
        }
        Ok(())
    }

    async fn finish(self, rounds: usize) {
        assert!(self.observer.allocations() >= 4 * rounds, "four nodes a round");
        assert!(self.operator.log().matches(" leading ").count() == 1, "one life through all of it");
        self.observer.finish().await;
    }
}

#[test]
fn after_any_fault_of_any_request_the_map_is_right_again() {
    let faults = [
        Fault::Refuse,
        Fault::Slow(Duration::from_millis(500)),
        Fault::Answer(409),
        Fault::Answer(429),
        Fault::Answer(500),
        Fault::Answer(503),
        Fault::LoseAnswer,
        Fault::Truncate,
        Fault::Garbage,
        // Longer than the operator waits for an answer: the write is done when nobody listens any more.
        Fault::Delay(Duration::from_millis(4500)),
    ];
    arena(|cluster| async move {
        let stage = Stage::set(cluster, faults.len()).await;
        for (index, fault) in faults.into_iter().enumerate() {
            let round = Round::of(index);
            let rules = stage.disturb_steps(&round, fault).await;
            stage.give_work(&round).await;
            for rule in &rules {
                rule.wait_struck().await;
            }
            stage.proxy.heal();
            stage.wait_right(&round, &format!("{fault:?}")).await;
        }
        stage.finish(faults.len()).await;
    });
}

#[test]
fn after_any_fault_of_any_watch_the_map_is_right_again() {
    let faults =
        [Fault::Refuse, Fault::Answer(410), Fault::Answer(500), Fault::Garbage, Fault::Cut, Fault::Gone];
    arena(|cluster| async move {
        let stage = Stage::set(cluster, faults.len() + 2).await;
        let watches = || ["nodes", "clustercidrs", "podcidrs", "nodenetworks"].map(|kind| on("watch", kind));
        for (index, fault) in faults.into_iter().enumerate() {
            let round = Round::of(index);
            let rules = watches().map(|which| stage.proxy.inject(2, which, fault));
            stage.proxy.break_watches();
            stage.give_work(&round).await;
            for rule in &rules {
                rule.wait_struck().await;
            }
            stage.proxy.heal();
            stage.wait_right(&round, &format!("{fault:?} of watches")).await;
        }
        // Connected, but silent: what it has written itself it knows, what others did it learns when they speak.
        let round = Round::of(faults.len());
        let rules = watches().map(|which| stage.proxy.inject(1, which, Fault::Freeze));
        stage.proxy.break_watches();
        for rule in &rules {
            rule.wait_struck().await;
        }
        stage.give_work(&round).await;
        let dead = stage.block_name(&round.changed).await;
        stage.cluster.api::<PodCIDR>().delete(&dead, &DeleteParams::default()).await.unwrap();
        stage.proxy.heal();
        stage.wait_right(&round, "silent watches").await;
        // Dead, and nobody says so: a connection that went with a router on the way.
        let round = Round::of(faults.len() + 1);
        let deaths = [Fault::Silence, Fault::Freeze, Fault::Silence, Fault::Freeze];
        let rules: Vec<_> = watches()
            .into_iter()
            .zip(deaths)
            .map(|(which, death)| stage.proxy.inject(1, which, death))
            .collect();
        stage.proxy.break_watches();
        for rule in &rules {
            rule.wait_struck().await;
        }
        stage.give_work(&round).await;
        stage.wait_right(&round, "dead watches").await;
        stage.finish(faults.len() + 2).await;
    });
}

#[test]
fn what_the_api_server_asks_to_send_later_is_not_sent_sooner() {
    const SECONDS: u8 = 3;
    arena(|cluster| async move {
        let proxy = Proxy::start(cluster.plane, cluster.client.clone()).await;
        let _operator = proxy.operator(cluster.plane, "asked-to-wait", &FLAGS);
        cluster.node("n1", json!({}), &["172.30.0.1"]).await;
        cluster.wait_blocks(&["n1"], 1).await;
        let waited = |asked: &Rule, again: &Rule| {
            let waited = again.first_strike().duration_since(asked.first_strike());
            assert!(waited >= Duration::from_secs(SECONDS.into()), "{asked:?}: {waited:?}");
        };
        for (node, address, code) in [("n2", "172.30.0.2", 429), ("n3", "172.30.0.3", 503)] {
            let asked = proxy.inject(1, on("create", "podcidrs"), Fault::AskToWait(code, SECONDS));
            let again = proxy.inject(usize::MAX, on("create", "podcidrs"), Fault::Slow(Duration::ZERO));
            cluster.node(node, json!({}), &[address]).await;
            cluster.wait_blocks(&[node], 1).await;
            waited(&asked, &again);
            proxy.heal();
        }
        let asked = proxy.inject(1, on("watch", "nodes"), Fault::AskToWait(429, SECONDS));
        let again = proxy.inject(usize::MAX, on("list", "nodes"), Fault::Slow(Duration::ZERO));
        proxy.break_watches();
        asked.wait_struck().await;
        again.wait_struck().await;
        waited(&asked, &again);
        cluster.assert_no_double().await;
    });
}
