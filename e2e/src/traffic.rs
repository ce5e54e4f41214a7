//! Traffic that runs while something is broken: a datagram each millisecond, both ways, every one counted.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use plat_rig::ping::Report;

use crate::cluster::{Cluster, Pod};
use crate::testbed::images;

/// Datagrams from one pod to another and back, until they are asked about.
#[derive(Debug)]
pub struct Traffic {
    way: String,
    probe: Child,
    said: BufReader<std::process::ChildStdout>,
}

impl Traffic {
    /// Starts sending, and waits until it has begun.
    pub fn start(cluster: &Cluster, from: &Pod, to: &Pod) -> Result<Traffic> {
        let probe = images().join("bin/probe");
        let mut command = cluster.pod_network_command(from, &probe.to_string_lossy())?;
        command.args(["ping", &format!("{}:{}", to.ip(), to.port)]);
        let mut probe = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut said = BufReader::new(probe.stdout.take().context("no standard output")?);
        let mut first = String::new();
        said.read_line(&mut first)?;
        ensure!(first.starts_with("pinging"), "probe ping said '{first}' and ended: {:?}", probe.wait()?);
        Ok(Traffic { way: format!("{} -> {}", from.name, to.name), probe, said })
    }

    /// Starts sending from each to the other.
    pub fn both_ways(cluster: &Cluster, a: &Pod, b: &Pod) -> Result<[Traffic; 2]> {
        Ok([Traffic::start(cluster, a, b)?, Traffic::start(cluster, b, a)?])
    }

    /// Stops sending and says what was lost.
    pub fn stop(mut self) -> Result<(String, Report)> {
        drop(self.probe.stdin.take());
        let mut said = String::new();
        self.said.read_to_string(&mut said)?;
        let report = serde_json::from_str(&said).with_context(|| format!("probe ping said '{said}'"))?;
        Ok((std::mem::take(&mut self.way), report))
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        // The end of its input ends the probe; the scripts around it end with it.
        drop(self.probe.stdin.take());
        let _ = self.probe.wait();
    }
}

/// Stops all, and panics unless every datagram of all came back.
///
/// # Panics
/// If one was lost, or none was sent.
#[track_caller]
pub fn assert_none_lost(what: &str, traffic: impl IntoIterator<Item = Traffic>) -> u64 {
    let mut sent = 0;
    for one in traffic {
        let (way, report) = one.stop().expect("the traffic has a report");
        assert!(report.sent > 0 && report.lost == 0, "{what}: {way}: {report:?}");
        sent += report.sent;
    }
    sent
}
