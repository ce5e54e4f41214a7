//! What the probes found, for the NodeNetwork: pure, down to the sentences.
//!
//! A report is written when it changes, so what changes all the time is rounded, and moves only when it moves far.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use plat_crds::condition::{PEERS_REACHABLE, Verdict};
use plat_crds::node_network::{MAX_REPORTED, NarrowPath, ProbesReport, UnreachablePeer};

use super::findings::{Findings, Path};
use super::track::State;
use crate::desired::Map;

/// The round trip that is reported moves when the measured one has moved by a quarter of it.
const STEADY: u32 = 4;

/// The report, and the verdict of condition `PeersReachable`. `last` is the round trip that was reported before.
pub fn report(findings: &Findings, map: Map<'_>, last: Option<i64>) -> (ProbesReport, Verdict) {
    let node = |path: &Path| {
        let fact = map.blocks.get(&path.block.object_name());
        fact.map(|fact| fact.node.clone()).unwrap_or_default()
    };
    let failing = [State::Unreachable, State::Lossy].into_iter().flat_map(|state| findings.in_state(state));
    let unreachable: Vec<UnreachablePeer> = failing
        .map(|path| UnreachablePeer {
            node_name: node(path),
            cidr: path.block.to_string(),
            reason: reason(path).to_owned(),
            since: time(path.since),
        })
        .collect();
    let narrow: Vec<NarrowPath> = findings
        .paths
        .iter()
        .filter(|path| path.state == State::BigPacketsLost || path.path_mtu.is_some())
        .map(|path| NarrowPath {
            node_name: node(path),
            cidr: path.block.to_string(),
            size: i64::from(path.full_size),
            path_mtu: path.path_mtu.map(i64::from),
            since: time(path.since),
        })
        .collect();
    let verdict = verdict(findings, &unreachable, &narrow);
    let summary = &findings.summary;
    let report = ProbesReport {
        peers: count(summary.peers),
        reachable: count(summary.reachable),
        unreachable_count: beyond(unreachable.len()),
        unreachable: unreachable.into_iter().take(MAX_REPORTED).collect(),
        big_packets_lost_count: beyond(narrow.len()),
        big_packets_lost: narrow.into_iter().take(MAX_REPORTED).collect(),
        rtt_micros: summary.round_trip.map(|now| steady(now, last)),
        last_round: (summary.rounds > 0).then(|| time(summary.ended)),
    };
    (report, verdict)
}

fn reason(path: &Path) -> &'static str {
    match path.state {
        State::Lossy => "Lossy",
        _ if path.no_route => "NoRoute",
        _ => "NoAnswer",
    }
}

fn verdict(findings: &Findings, unreachable: &[UnreachablePeer], narrow: &[NarrowPath]) -> Verdict {
    let verdict = |status, reason, message: String| Verdict::new(PEERS_REACHABLE, status, reason, message);
    let silent = unreachable.iter().filter(|peer| peer.reason != "Lossy");
    if let Some(first) = silent.clone().next() {
        let of = silent.count();
        let cure = match first.reason.as_str() {
            "NoRoute" => "this node has no route to it, see RoutesReady",
            _ => {
                "look at ForwardingBlocked and RoutesReady of both nodes, at what is between them, and whether both let in the probes' UDP port (--probe-port) from pod addresses"
            }
        };
        let message = format!(
            "{of} blocks of other nodes do not answer probes, first {} of node {}: {cure}",
            first.cidr, first.node_name
        );
        return verdict(Some(false), "Unreachable", message);
    }
    if let Some(first) = narrow.iter().find(|path| path.path_mtu.is_none()) {
        let message = format!(
            "packets of {} bytes to {} of node {} are lost, and so are those of every size that a route can be limited to, while small ones pass: set the MTU of the links between the nodes right",
            first.size, first.cidr, first.node_name
        );
        return verdict(Some(false), "BigPacketsLost", message);
    }
    if let Some(first) = unreachable.first() {
        let message = format!(
            "{} blocks of other nodes answer some probes and not others, first {} of node {}: look at the links between the nodes",
            unreachable.len(),
            first.cidr,
            first.node_name
        );
        return verdict(Some(false), "Lossy", message);
    }
    if let Some(first) = narrow.first() {
        let mtu = first.path_mtu.unwrap_or_default();
        let message = format!(
            "the paths to {} blocks carry less than the links do, first {mtu} bytes and not {} to {} of node {}; the routes to them say so, where no policy sets an mtu, and pods are told",
            narrow.len(),
            first.size,
            first.cidr,
            first.node_name
        );
        return verdict(Some(true), "PathMTUFound", message);
    }
    let summary = &findings.summary;
    match summary.peers {
        _ if summary.rounds == 0 => {
            verdict(None, "NotProbed", "the first round of probes is under way".to_owned())
        }
        0 => verdict(Some(true), "NoPeers", "there is no other node to probe".to_owned()),
        peers if summary.reachable == 0 => verdict(
            None,
            "NoResponder",
            format!(
                "none of {peers} blocks of other nodes answers probes, and none is silent: their agents have no responder (an older version, or probes are switched off), or a firewall refuses the probes' UDP port (--probe-port)"
            ),
        ),
        _ => verdict(
            Some(true),
            "AllAnswer",
            "packets of full size reach every block that was probed".to_owned(),
        ),
    }
}

/// The number of all, where not all are named.
fn beyond(all: usize) -> Option<i64> {
    (all > MAX_REPORTED).then(|| count(all))
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn time(seconds: i64) -> Time {
    Time(Timestamp::from_second(seconds).unwrap_or_default())
}

/// Two digits, and the last one as long as the measured one is near it.
fn steady(now: Duration, last: Option<i64>) -> i64 {
    let micros = i64::try_from(now.as_micros()).unwrap_or(i64::MAX);
    if let Some(last) = last.filter(|last| (micros - last).abs() <= last / i64::from(STEADY) + 50) {
        return last;
    }
    let mut unit = 1;
    while micros / unit >= 100 {
        unit *= 10;
    }
    micros / unit * unit
}

/// What is known of each path, for people: of this round's sample, and of all others with something wrong.
pub fn table(findings: &Findings) -> String {
    let mut text = format!(
        "{:<43} {:<17} {:>6} {:>8} {:>10}  {}\n",
        "BLOCK", "STATE", "SIZE", "PATH-MTU", "RTT-MICROS", "SINCE"
    );
    for path in &findings.paths {
        let number = |number: Option<u128>| number.map_or("-".to_owned(), |number| number.to_string());
        let state = match path.state {
            State::Unknown if path.refused => "no_responder",
            State::Unreachable if path.no_route => "no_route",
            state => state.label(),
        };
        text.push_str(&format!(
            "{:<43} {:<17} {:>6} {:>8} {:>10}  {}\n",
            path.block.to_string(),
            state,
            path.full_size,
            number(path.path_mtu.map(u128::from)),
            number(path.round_trip.map(|time| time.as_micros())),
            Timestamp::from_second(path.since).unwrap_or_default(),
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::block;
    use crate::probe::findings::Summary;
    use std::collections::{BTreeMap, BTreeSet};

    fn path(n: u8, state: State) -> Path {
        Path {
            block: block(n).block,
            state,
            refused: false,
            no_route: false,
            full_size: 1500,
            path_mtu: None,
            round_trip: Some(Duration::from_micros(317)),
            since: 1_764_000_000,
        }
    }

    fn found(paths: Vec<Path>) -> Findings {
        let reachable = paths.iter().filter(|path| path.state.answers()).count();
        let summary = Summary {
            rounds: 3,
            ended: 1_764_000_100,
            peers: paths.len(),
            reachable,
            round_trip: Some(Duration::from_micros(317)),
        };
        Findings { summary, paths, ..Findings::default() }
    }

    fn told(findings: &Findings, last: Option<i64>) -> (ProbesReport, Verdict) {
        let blocks: BTreeMap<_, _> = (1..=99).map(block).map(|b| (b.name.clone(), b)).collect();
        let (ranges, absent) = (BTreeMap::new(), BTreeSet::new());
        report(findings, Map { blocks: &blocks, ranges: &ranges, policies: &[], absent: &absent }, last)
    }

    #[test]
    fn the_worst_that_was_found_is_the_verdict_and_names_block_and_node() {
        let narrow = Path { path_mtu: Some(1400), ..path(3, State::BigPacketsLost) };
        let hole = path(4, State::BigPacketsLost);
        let no_route = Path { no_route: true, ..path(5, State::Unreachable) };
        for (paths, status, reason, needle) in [
            (vec![], Some(true), "NoPeers", "no other node"),
            (vec![path(2, State::Reachable)], Some(true), "AllAnswer", "full size"),
            (vec![path(2, State::Unknown)], None, "NoResponder", "--probe-port"),
            (
                vec![narrow.clone()],
                Some(true),
                "PathMTUFound",
                "1400 bytes and not 1500 to 10.244.3.0/24 of node n3",
            ),
            (vec![narrow.clone(), path(2, State::Lossy)], Some(false), "Lossy", "10.244.2.0/24 of node n2"),
            (
                vec![hole.clone(), path(2, State::Lossy)],
                Some(false),
                "BigPacketsLost",
                "10.244.4.0/24 of node n4",
            ),
            (vec![hole, path(6, State::Unreachable)], Some(false), "Unreachable", "ForwardingBlocked"),
            (vec![no_route], Some(false), "Unreachable", "no route to it"),
        ] {
            let (_, verdict) = told(&found(paths), None);
            assert_eq!((verdict.status, verdict.reason), (status, reason), "{}", verdict.message);
            assert!(verdict.message.contains(needle), "{}", verdict.message);
        }
        assert_eq!(told(&Findings::default(), None).1.reason, "NotProbed");
    }

    #[test]
    fn lists_are_bounded_and_their_lengths_told() {
        let down = (1..=40).map(|n| path(n, State::Unreachable));
        let narrow = (41..=80).map(|n| Path { path_mtu: Some(1400), ..path(n, State::BigPacketsLost) });
        let (report, verdict) = told(&found(down.chain(narrow).collect()), None);
        assert_eq!((report.unreachable.len(), report.unreachable_count), (16, Some(40)));
        assert_eq!((report.big_packets_lost.len(), report.big_packets_lost_count), (16, Some(40)));
        assert_eq!(report.unreachable[0].node_name, "n1");
        assert!(verdict.message.starts_with("40 blocks"), "{}", verdict.message);
    }

    #[test]
    fn the_round_trip_moves_only_when_it_has_moved_far() {
        for (micros, last, told) in [
            (317, None, 310),
            (317, Some(300), 300),
            (420, Some(300), 300),
            (430, Some(300), 430),
            (90, Some(300), 90),
            (12_345, Some(300), 12_000),
            (12_345, Some(11_000), 11_000),
        ] {
            assert_eq!(steady(Duration::from_micros(micros), last), told, "{micros} after {last:?}");
        }
    }

    #[test]
    fn the_table_has_a_line_for_each_path() {
        let narrow = Path { path_mtu: Some(1400), ..path(3, State::BigPacketsLost) };
        let text = table(&found(vec![path(2, State::Reachable), narrow]));
        assert_eq!(text.lines().count(), 3);
        let line: Vec<&str> = text.lines().nth(2).unwrap().split_whitespace().collect();
        assert_eq!(
            line,
            ["10.244.3.0/24", "big_packets_lost", "1500", "1400", "317", "2025-11-24T16:00:00Z"]
        );
    }
}
