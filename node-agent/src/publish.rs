//! Writes the node's report to the status of its own NodeNetwork, by server-side apply.
//!
//! Rarely: each write wakes the operator, and all agents together shall not exceed `WRITES_PER_SECOND`. A
//! report goes out when its content changed, or as a sign of life. Only a node whose blocks fill up does not wait for
//! its turn: once for each block that it lacks, so that the bound holds but for as many writes as blocks are given.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use plat_crds::NodeNetwork;
use plat_crds::names::{AGENT_MANAGER, GROUP, VERSION};
use plat_crds::node_network::NodeNetworkStatus;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::reporter::Report;
use crate::watch::words;

/// What all agents together may write.
const WRITES_PER_SECOND: u32 = 50;
/// A report without news goes out as rarely as this, in small clusters.
const HEARTBEAT: Duration = Duration::from_secs(60);
/// The first report goes out within this time.
const FIRST_WITHIN: Duration = Duration::from_secs(1);
/// How long one write may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How soon a failed write is tried again, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Shortest time between two reports in a cluster of that many nodes.
pub fn pace(nodes: usize) -> Duration {
    let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
    Duration::from_secs(u64::from(nodes.div_ceil(WRITES_PER_SECOND).max(1)))
}

/// Longest time without a report in a cluster of that many nodes.
pub fn heartbeat(nodes: usize) -> Duration {
    HEARTBEAT.max(pace(nodes) * 2)
}

/// A share of the pace that differs from node to node, so that a change that all nodes see does not make
/// all of them write in one moment.
fn spread(node: &str, pace: Duration) -> Duration {
    let hash = node.bytes().fold(0x811c_9dc5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    pace.mul_f64(f64::from(hash % 1000) / 1000.0)
}

/// Publishes reports until the task is dropped.
pub async fn run(client: Client, node: String, mut reports: watch::Receiver<(Report, Duration)>) {
    let api: Api<NodeNetwork> = Api::all(client);
    let mut sent: Option<(NodeNetworkStatus, Instant)> = None;
    let mut asked: Option<String> = None;
    let mut delay = RETRY.0;
    let first = Instant::now() + spread(&node, FIRST_WITHIN);
    loop {
        let (status, nodes, wants) = {
            let report = &reports.borrow_and_update().0;
            (report.status.clone(), report.nodes, report.wants.clone())
        };
        let due = match &sent {
            // Before the first pass there is nothing to say.
            None if status.conditions.is_empty() => None,
            None => Some(first),
            Some(_) if wants.is_some() && wants != asked => Some(Instant::now()),
            Some((last, at)) if is_news(last, &status) => {
                Some(*at + pace(nodes) + spread(&node, pace(nodes) / 4))
            }
            Some((_, at)) => Some(*at + heartbeat(nodes)),
        };
        let is_due = tokio::select! {
            biased;
            () = sleep_until(due.unwrap_or(first)), if due.is_some() => true,
            changed = reports.changed() => match changed {
                Ok(()) => false,
                Err(_) => return,
            },
        };
        if !is_due {
            continue;
        }
        match write(&api, &node, &status).await {
            Ok(()) => {
                asked = wants.or(asked);
                sent = Some((status, Instant::now()));
                delay = RETRY.0;
            }
            Err(Refusal::Missing) => {
                tracing::debug!(node, "NodeNetwork does not exist yet; the operator makes it");
                sleep(delay).await;
                delay = (delay * 2).min(RETRY.1);
            }
            Err(Refusal::Failed(error)) => {
                tracing::warn!(error, "the report was not written; trying again");
                sleep(delay).await;
                delay = (delay * 2).min(RETRY.1);
            }
        }
    }
}

/// Whether a report says something that the last one did not. When the last round of probes ended is as of the writing.
fn is_news(last: &NodeNetworkStatus, next: &NodeNetworkStatus) -> bool {
    let mut last = last.clone();
    if let (Some(last), Some(next)) = (&mut last.probes, &next.probes) {
        last.last_round.clone_from(&next.last_round);
    }
    last != *next
}

enum Refusal {
    /// There is no such NodeNetwork (yet).
    Missing,
    /// Anything else.
    Failed(String),
}

async fn write(api: &Api<NodeNetwork>, node: &str, status: &NodeNetworkStatus) -> Result<(), Refusal> {
    let status = NodeNetworkStatus { reported_at: Some(Time(Timestamp::now())), ..status.clone() };
    let patch = serde_json::json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "NodeNetwork",
        "metadata": {"name": node},
        "status": status,
    });
    let params = PatchParams::apply(AGENT_MANAGER).force();
    match timeout(TIMEOUT, api.patch_status(node, &params, &Patch::Apply(&patch))).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(kube::Error::Api(answer))) if answer.code == 404 => Err(Refusal::Missing),
        Ok(Err(error)) => Err(Refusal::Failed(words(&error))),
        Err(_) => Err(Refusal::Failed(format!("no answer in {} s", TIMEOUT.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::node_network::ProbesReport;

    #[test]
    fn all_agents_together_stay_below_the_bound() {
        for (nodes, seconds) in [(0, 1), (1, 1), (50, 1), (51, 2), (1000, 20), (5000, 100)] {
            assert_eq!(pace(nodes), Duration::from_secs(seconds), "{nodes} nodes");
            assert!(heartbeat(nodes) >= pace(nodes) * 2);
        }
        assert_eq!(heartbeat(3), HEARTBEAT);
    }

    #[test]
    fn another_round_of_probes_is_no_news_and_a_peer_that_is_gone_is() {
        let at = |second| Some(Time(Timestamp::from_second(second).unwrap()));
        let report = |second, reachable| NodeNetworkStatus {
            probes: Some(ProbesReport { reachable, last_round: at(second), ..ProbesReport::default() }),
            ..NodeNetworkStatus::default()
        };
        assert!(!is_news(&report(1, 3), &report(11, 3)));
        assert!(is_news(&report(1, 3), &report(1, 2)));
    }

    #[test]
    fn nodes_spread_over_the_pace() {
        let pace = Duration::from_secs(100);
        let all: Vec<Duration> = (0..1000).map(|n| spread(&format!("node-{n}"), pace)).collect();
        assert!(all.iter().all(|d| *d < pace));
        let early = all.iter().filter(|d| **d < pace / 2).count();
        assert!((300..700).contains(&early), "{early}");
    }
}
