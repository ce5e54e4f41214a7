//! The subcommands: joins the loop, the API server's edge and the servers, and ends them on a signal.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kube::{Client, Config};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::args::{Cleanup, Probe, Run};
use crate::desired::Me;
use crate::node::Settings;
use crate::objects::Objects;
use crate::probe::prober;
use crate::probe::schedule::Pace;
use crate::reconcile::{self, Links, Pulse};
use crate::reporter::Report;
use crate::telemetry::{self, Metrics, Peers, Served};
use crate::vxlan::Network;
use crate::{cleanup as clean, publish, watch as watching};

/// How long a connection to the API server may take: a lost packet or two.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// `plat-agent run`.
pub async fn run(run: Run) -> anyhow::Result<()> {
    telemetry::init_logging(&run.log)?;
    anyhow::ensure!(
        !run.node_name.is_empty(),
        "which node is this? give --node-name, or NODE_NAME by the downward API"
    );
    let config = Config::infer().await;
    let mut config = config.context("find the API server: neither a service account nor a kubeconfig")?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    let settings = settings(&run, &config);
    let client = Client::try_from(config).context("make a client of the API server")?;

    let (objects_in, objects) = watch::channel(Objects::default());
    let (asks, asked) = mpsc::channel(8);
    let (reports, reported) = watch::channel((Report::default(), Duration::ZERO));
    let served = Served { pulse: Arc::new(Pulse::default()), metrics: Arc::new(Metrics::default()) };
    let stop = stop_on_signal()?;
    let (probing, prober) = prober::probing(run.probe_port, Pace::default());
    let on = run.probe_port != 0;
    let peers = on.then(|| probing.subscribe());
    let probing = on.then_some(probing);
    let links = Links { objects, asks, reports, probing, pulse: served.pulse.clone(), stop: stop.clone() };

    tokio::spawn(watching::run(client.clone(), run.node_name.clone(), objects_in, asked, reported.clone()));
    tokio::spawn(publish::run(client, run.node_name.clone(), reported.clone()));
    tokio::spawn(measure(served.metrics.clone(), reported));
    tokio::spawn(telemetry::serve_port(served.clone(), run.listen));
    tokio::spawn(serve_socket(served, peers, run.socket));
    if on {
        tokio::spawn(prober.run());
    }
    reconcile::run(settings, links).await?;
    tracing::info!("stopped; the node goes on as it is");
    Ok(())
}

fn settings(run: &Run, config: &Config) -> Settings {
    let mut needed: BTreeSet<IpAddr> = run.needed_address.iter().copied().collect();
    needed.extend(config.cluster_url.host().and_then(address));
    needed.extend(resolvers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default()));
    Settings {
        me: Me {
            node: run.node_name.clone(),
            datapath: run.datapath.into(),
            bridge: run.place.bridge.clone(),
            admit_forward: run.admit_forward,
            probe_port: NonZeroU16::new(run.probe_port),
            vxlan: Network { vni: run.vxlan_vni, port: run.vxlan_port },
        },
        anti_spoofing: run.anti_spoofing,
        conf_dir: run.place.cni_conf_dir.clone(),
        bin_dir: run.place.cni_bin_dir.clone(),
        run_dir: run.place.run_dir.clone(),
        plugin: run.plugin.clone(),
        sysctl_dir: run.place.sysctl_dir.clone(),
        proc_net: Path::new("/proc/net").to_owned(),
        host_ports: run.host_ports,
        bandwidth: run.bandwidth,
        hold: Duration::from_secs(run.hold_seconds),
        readiness: run.readiness,
        readiness_deadline: Duration::from_secs(run.readiness_deadline_seconds),
        needed,
    }
}

/// A host of a URL that is an address, also in brackets.
fn address(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// The name servers of a resolv.conf (resolv.conf(5)).
fn resolvers(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|rest| rest.trim().parse().ok()).collect()
}

async fn measure(metrics: Arc<Metrics>, mut reports: watch::Receiver<(Report, Duration)>) {
    while reports.changed().await.is_ok() {
        let (report, took) = &*reports.borrow_and_update();
        metrics.update(report, *took);
    }
}

/// Without the socket probes fail, and kubelet restarts the agent: that is the way to make it known.
async fn serve_socket(served: Served, peers: Option<Peers>, socket: PathBuf) {
    if let Err(error) = telemetry::serve_socket(served, peers, &socket).await {
        tracing::error!(socket = %socket.display(), %error, "probes cannot be answered; give another path with --socket");
    }
}

fn stop_on_signal() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        token.cancel();
    });
    Ok(stop)
}

/// `plat-agent cleanup`.
pub async fn cleanup(cleanup: Cleanup) -> anyhow::Result<()> {
    telemetry::init_logging(&cleanup.log)?;
    let served = Served { pulse: Arc::new(Pulse::default()), metrics: Arc::new(Metrics::default()) };
    let stop = stop_on_signal()?;
    let outcome = clean::run(&cleanup.place)?;
    if cleanup.stay {
        tokio::spawn(serve_socket(served.clone(), None, cleanup.socket.clone()));
    }
    for done in &outcome.done {
        tracing::info!("removed {done}");
    }
    for left in &outcome.left {
        tracing::warn!("{left}");
    }
    for error in &outcome.errors {
        tracing::error!("{error}");
    }
    if !cleanup.stay {
        anyhow::ensure!(outcome.errors.is_empty(), "cleanup is incomplete: {}", outcome.errors.join("; "));
        return Ok(());
    }
    if outcome.errors.is_empty() {
        served.pulse.set_programmed();
    }
    tracing::info!(
        errors = outcome.errors.len(),
        left = outcome.left.len(),
        "cleanup is done; staying until ended"
    );
    // A staying process beats by itself: it has no loop that could hang.
    let mut beat = tokio::time::interval(Duration::from_secs(10));
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = beat.tick() => served.pulse.beat(),
        }
    }
}

/// `plat-agent probe`.
pub async fn probe(probe: Probe) -> anyhow::Result<()> {
    telemetry::probe(probe.what, &probe.socket).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_and_hosts_are_read_leniently() {
        let text = "# x\nnameserver 10.0.0.53\n nameserver fd00::53 \nsearch a b\nnameserver nonsense\n";
        assert_eq!(resolvers(text), ["10.0.0.53".parse::<IpAddr>().unwrap(), "fd00::53".parse().unwrap()]);
        assert_eq!(address("[fd00:30::1]"), Some("fd00:30::1".parse().unwrap()));
        assert_eq!(address("kubernetes.default.svc"), None);
    }
}
