//! Bandwidth limits: what stands in the kernel, and that what exceeds them really waits or is dropped.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod lab;

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::Instant;

use lab::{Plat, add, blocks, cluster_conf, hand_conf, with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};

/// The queueing discipline at the root of a link; in the container, if one is named.
fn root(container: Option<&str>, link: &str) -> Value {
    let enter = container.map(|id| format!("ip netns exec {id} ")).unwrap_or_default();
    lab::json_of(&format!("{enter}tc -s -j qdisc show dev {link} root"))[0].clone()
}

/// The same without counters and device.
fn settings(root: &Value) -> (Value, Value) {
    (root["kind"].clone(), root["options"].clone())
}

fn host_link(result: &Value) -> String {
    result["interfaces"][1]["name"].as_str().unwrap().to_owned()
}

/// What `tc` makes of these words.
fn as_tc_does(words: &str) -> (Value, Value) {
    lab::sh(&format!("ip link add ref0 type veth peer name ref1; tc qdisc add dev ref0 root {words}"));
    let made = settings(&root(None, "ref0"));
    lab::sh("ip link del ref0");
    made
}

#[test]
fn both_directions_are_limited_as_tc_would_do_it() {
    lab::enter();
    let result = add(
        "c",
        &with(
            hand_conf(),
            json!({"ingressRate": 10_000_000, "ingressBurst": 800_000, "egressRate": 80_000_000_000_u64,
                "egressBurst": 8_000_000}),
        ),
    );
    let to_pod = as_tc_does("handle 1: tbf rate 10mbit burst 100000 latency 25ms");
    assert_eq!(settings(&root(None, &host_link(&result))), to_pod);
    let from_pod = as_tc_does("handle 1: tbf rate 80gbit burst 1000000 latency 25ms");
    assert_eq!(settings(&root(Some("c"), "eth0")), from_pod);
    assert!(lab::ping("c", "10.22.0.1"));
}

#[test]
fn a_pod_without_limit_has_no_queue() {
    lab::enter();
    let result = add("c", &hand_conf());
    assert_eq!(root(None, &host_link(&result))["kind"], "noqueue");
    assert_eq!(root(Some("c"), "eth0")["kind"], "noqueue");
}

#[test]
fn annotations_reach_us_as_containerd_sends_them() {
    lab::enter();
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    let result = add(
        "c",
        &with(
            cluster_conf(),
            json!({"runtimeConfig": {"bandwidth": {"IngressRate": 10_000_000, "IngressBurst": 4_294_967_295_u64,
                "EgressRate": 0, "EgressBurst": 0}}}),
        ),
    );
    let expected = as_tc_does("handle 1: tbf rate 10mbit burst 64kb latency 25ms");
    assert_eq!(settings(&root(None, &host_link(&result))), expected);
    assert_eq!(root(Some("c"), "eth0")["kind"], "noqueue");
}

#[test]
fn a_burst_smaller_than_a_frame_still_lets_frames_pass() {
    lab::enter();
    let tiny =
        json!({"ingressRate": 1_000_000, "ingressBurst": 8, "egressRate": 1_000_000, "egressBurst": 8});
    add("c", &with(hand_conf(), tiny));
    let full = "ip netns exec c busybox ping -c 1 -W 5 -s 1472 10.22.0.1";
    lab::eventually("a full frame passes both ways", || lab::attempt("sh", &["-c", full]).status.success());
}

/// Sends so many datagrams of 1,000 bytes as fast as they go, from inside the container if one is named.
fn flood(container: Option<&str>, to: &str, datagrams: usize) {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            if let Some(id) = container {
                let netns = std::fs::File::open(format!("/run/netns/{id}")).unwrap();
                move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            }
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            // Held back, a sender would wait; it is to go on and lose.
            socket.set_nonblocking(true).unwrap();
            for _ in 0..datagrams {
                let _ = socket.send_to(&[0; 1000], (to, 9));
            }
        });
        work.join().unwrap();
    });
}

#[test]
fn what_exceeds_a_limit_waits_or_is_dropped() {
    const RATE: u64 = 10_000;
    const BURST: u64 = 20_000;
    lab::enter();
    let limit = json!({"ingressRate": 8 * RATE, "ingressBurst": 8 * BURST, "egressRate": 8 * RATE,
        "egressBurst": 8 * BURST});
    let begin = Instant::now();
    let result = add("c", &with(hand_conf(), limit));
    let address = lab::address(&result);
    // The neighbours know each other before the flood.
    assert!(lab::ping("c", "10.22.0.1"));
    for (from, to, watched) in [
        (None, address.as_str(), (None, host_link(&result))),
        (Some("c"), "10.22.0.1", (Some("c"), "eth0".to_owned())),
    ] {
        flood(from, to, 2000);
        let counts = root(watched.0, &watched.1);
        let count = |key: &str| counts[key].as_u64().unwrap();
        // However slow this machine is: no more than the bucket held and gained since, and one frame.
        let allowed = BURST + (begin.elapsed().as_secs_f64() * RATE as f64) as u64 + 1514;
        assert!(count("bytes") <= allowed, "{counts} may have passed {allowed}");
        assert!(count("bytes") >= BURST / 2, "nothing passes: {counts}");
        assert!(count("drops") > 0 && count("overlimits") > 0, "{counts}");
    }
}

#[test]
fn check_finds_a_limit_that_is_gone_or_another_one() {
    lab::enter();
    let limit = json!({"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 16_000_000,
        "egressBurst": 800_000});
    let conf = with(hand_conf(), limit);
    let result = add("c", &conf);
    let host = host_link(&result);
    let check = Plat::call("CHECK", "c", &with(conf, json!({"prevResult": result})));
    check.run().silent();
    lab::sh("ip netns exec c tc qdisc replace dev eth0 root tbf rate 1gbit burst 100000 latency 25ms");
    let error = check.run().error(105);
    assert!(error.contains("eth0 is limited to 1000000000 bit/s and not to 16000000"), "{error}");
    lab::sh("ip netns exec c tc qdisc del dev eth0 root");
    let error = check.run().error(105);
    assert!(error.contains("eth0 is not limited to 16000000 bit/s"), "{error}");
    lab::sh("ip netns exec c tc qdisc add dev eth0 root tbf rate 16mbit burst 100000 latency 25ms");
    check.run().silent();
    lab::sh(&format!("tc qdisc del dev {host} root"));
    let error = check.run().error(105);
    assert!(error.contains(&format!("link {host} on the host is not limited to 8000000 bit/s")), "{error}");
}

#[test]
fn half_a_limit_is_refused_before_anything_is_made() {
    lab::enter();
    lab::netns("c");
    let conf = with(hand_conf(), json!({"egressRate": 8000}));
    let error = Plat::call("ADD", "c", &conf).run().error(7);
    assert!(error.contains("egressBurst"), "{error}");
    lab::assert_nothing_left();
    // What ADD would refuse keeps no DEL from cleaning up.
    add("d", &hand_conf());
    Plat::call("DEL", "d", &conf).run().silent();
    lab::assert_nothing_left();
}
