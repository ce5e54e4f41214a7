//! Throughput and latency between pods of two nodes, and between bare namespaces on the same path.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use plat_crds::names::CONFLIST_FILE;
use plat_e2e::bare::{BareNode, Pod, Process};
use plat_e2e::light::ControlPlane;
use plat_e2e::testbed::output;
use plat_e2e::wait::wait_until;
use plat_rig::figures::{Figure, Unit, median};
use serde_json::Value;

use crate::contender::{Who, make_range};
use crate::{Args, goals, say};

/// Turns of each.
const TURNS: usize = 5;
const SECONDS: &str = "2";
const PATIENCE: Duration = Duration::from_secs(30);

/// Measures it, where there is iperf3.
pub fn all(args: &Args) -> Result<Vec<Figure>> {
    if Command::new("iperf3").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        say("no iperf3 here (apt-get install iperf3): throughput is not measured");
        return Ok(Vec::new());
    }
    say("throughput between pods, in turns with bare namespaces ...");
    let plane = ControlPlane::up()?;
    plane.install_crds()?;
    let nodes: Vec<BareNode<'_>> =
        (1..=4).map(|number| BareNode::up(&plane, number)).collect::<Result<_>>()?;
    let [a, b, c, d] = nodes.as_slice() else { unreachable!() };
    plane.block_on(async |client| {
        make_range(&client).await?;
        Who::Plat.join_all(&client, 1..=2).await
    })?;
    // As their objects say.
    a.ip(&["addr", "add", "172.16.255.1/12", "dev", "eth0"])?;
    b.ip(&["addr", "add", "172.16.0.3/12", "dev", "eth0"])?;
    let agents: Vec<Process> =
        [a, b].iter().map(|node| Who::Plat.start(args, &plane, node, &[])).collect::<Result<_>>()?;
    for node in [a, b] {
        wait_until("the agent's conflist", PATIENCE, || {
            let log = || {
                output(Command::new("tail").arg("-n9").arg(node.folder().join("Plat.log")))
                    .unwrap_or_default()
            };
            let there = node.folder().join("conf").join(CONFLIST_FILE).exists();
            if there { Ok(()) } else { Err(log()) }
        });
    }
    let pods = [a.pod("from")?, b.pod("to")?];
    let to = pods.iter().map(|pod| {
        let added = pod.wait_add("a pod gets its address", PATIENCE);
        added["ips"][0]["address"].as_str().and_then(|cidr| cidr.split('/').next()).map(str::to_owned)
    });
    let to = to.collect::<Option<Vec<_>>>().context("no address")?.pop().context("no pods")?;
    let bare = [c.pod("from")?, d.pod("to")?];
    let bare_to = by_hand([c, d], &bare)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        ours.push(turn(&pods, &to)?);
        theirs.push(turn(&bare, &bare_to)?);
    }
    ensure!(agents.iter().all(|agent| agent.usage().is_ok()), "an agent ended");
    let of = |turns: &[Turn], what: fn(&Turn) -> f64| median(turns.iter().map(what).collect());
    let peer = "bare namespaces, same path";
    let name = "Direct, pod to pod, Gbit in a second (more is better)";
    Ok(vec![
        Figure::new(name, of(&ours, |t| t.gbits), peer, of(&theirs, |t| t.gbits), Unit::Count)
            .reaching(goals::THROUGHPUT),
        Figure::new(
            "Direct, pod to pod, round trip under that load",
            of(&ours, |t| t.rtt),
            peer,
            of(&theirs, |t| t.rtt),
            Unit::Milliseconds,
        ),
    ])
}

/// Joins two namespaces to two hosts by veths, and these by routes, without anything else.
fn by_hand(hosts: [&BareNode<'_>; 2], pods: &[Pod<'_>; 2]) -> Result<String> {
    for (at, (host, pod)) in hosts.iter().zip(pods).enumerate() {
        let other = 1 - at;
        host.ip(&[
            "link",
            "add",
            "veth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            &pod.process_id().to_string(),
        ])?;
        host.ip(&["link", "set", "veth0", "up"])?;
        host.ip(&["addr", "add", &format!("10.9.{at}.1/24"), "dev", "veth0"])?;
        host.ip(&[
            "route",
            "add",
            &format!("10.9.{other}.0/24"),
            "via",
            &hosts[other].address().to_string(),
        ])?;
        output(host.run("sysctl").args(["-qw", "net.ipv4.ip_forward=1"]))?;
        for line in [
            "link set lo up".to_owned(),
            "link set eth0 up".to_owned(),
            format!("addr add 10.9.{at}.2/24 dev eth0"),
            format!("route add default via 10.9.{at}.1"),
        ] {
            output(pod.run("ip").args(line.split(' ')))?;
        }
    }
    Ok("10.9.1.2".to_owned())
}

struct Turn {
    gbits: f64,
    /// Mean round trip of the stream at work, in milliseconds.
    rtt: f64,
}

fn turn(pods: &[Pod<'_>; 2], to: &str) -> Result<Turn> {
    let [from, at] = pods;
    let mut server = at.run("setpriv");
    server.args(["--pdeathsig=KILL", "--", "iperf3", "-s"]).stdin(Stdio::null()).stdout(Stdio::null());
    let mut server = server.spawn()?;
    let turn = wait_until("iperf3", PATIENCE, || {
        let said = output(from.run("iperf3").args(["-c", to, "-t", SECONDS, "-J"]));
        let said: Value = serde_json::from_str(&said.map_err(|error| format!("{error:#}"))?)
            .map_err(|error| error.to_string())?;
        // With -J it ends well in any case.
        let end = &said["end"];
        let gbits = end["sum_received"]["bits_per_second"].as_f64().map(|bits| bits / 1e9);
        let rtt = end["streams"][0]["sender"]["mean_rtt"].as_f64().map(|micros| micros / 1000.0);
        gbits.zip(rtt).map(|(gbits, rtt)| Turn { gbits, rtt }).ok_or_else(|| said["error"].to_string())
    });
    server.kill()?;
    server.wait()?;
    Ok(turn)
}
