//! Whatever the order of objects and damage, the node ends where the objects say.

use std::collections::BTreeMap;

use plat_agent::desired::{Host, Location, Map, desired};
use plat_agent::fabric::Target;
use plat_agent::facts::BlockFact;
use plat_crds::pod_cidr::BlockState;
use plat_crds::routing::Mode;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::harness::*;

#[derive(Clone, Debug)]
enum Act {
    Apply(u8, Change),
    Damage(usize),
}

#[derive(Clone, Debug)]
enum Change {
    Active,
    Quarantined,
    Draining,
    Moved(u8),
    Metric(u32),
    Mtu(u32),
    NextHop(u8),
    None,
}

const DAMAGE: [&str; 12] = [
    "ip route flush proto 112",
    "ip -6 route flush proto 112",
    "ip route del 10.244.3.0/24",
    "ip route replace 10.244.2.0/24 via 172.30.0.66 proto 112 metric 1120",
    "ip route add 10.244.200.0/24 via 172.30.0.66 proto 112 metric 9",
    "ip route add unreachable 10.77.0.0/16 proto 112",
    "ip -6 route append fd00:10:244:2::/64 via fd00:30::66 proto 112 metric 1120",
    "ip link del cni0",
    "ip link set cni0 down",
    "ip addr flush dev cni0",
    "nft flush ruleset",
    "sysctl -qw net.ipv4.ip_forward=0",
];

fn act() -> impl Strategy<Value = Act> {
    let change = prop_oneof![
        Just(Change::Active),
        Just(Change::Quarantined),
        Just(Change::Draining),
        (50u8..90).prop_map(Change::Moved),
        (1u32..2000).prop_map(Change::Metric),
        (1300u32..1500).prop_map(Change::Mtu),
        (50u8..90).prop_map(Change::NextHop),
        Just(Change::None),
    ];
    prop_oneof![(2u8..6, change).prop_map(|(n, c)| Act::Apply(n, c)), (0..DAMAGE.len()).prop_map(Act::Damage)]
}

fn changed(n: u8, change: &Change) -> BlockFact {
    let block = block(n);
    match change {
        Change::Active => block,
        Change::Quarantined => BlockFact { state: BlockState::Quarantined, ..block },
        Change::Draining => BlockFact { state: BlockState::Draining, ..block },
        Change::Moved(to) => BlockFact { addresses: vec![[172, 30, 0, *to].into()], ..block },
        Change::Metric(metric) => with_routing(block, &format!(r#"{{"metric":{metric}}}"#)),
        Change::Mtu(mtu) => with_routing(block, &format!(r#"{{"mtu":{mtu}}}"#)),
        Change::NextHop(to) => with_routing(block, &format!(r#"{{"nextHop":"172.30.0.{to}"}}"#)),
        Change::None => with_routing(block, r#"{"mode":"None"}"#),
    }
}

/// What the objects say, in the words of [`our_routes`].
fn said(node: &TestNode) -> Vec<String> {
    let (blocks, ranges) = (&node.objects.blocks.facts, &node.objects.ranges.facts);
    let mut locations = BTreeMap::new();
    for n in 0..=255u8 {
        locations.insert([172, 30, 0, n].into(), Location::OnLink { device: 0 });
        locations.insert(format!("fd00:30::{n:x}").parse().unwrap(), Location::OnLink { device: 0 });
    }
    let open = blocks
        .values()
        .any(|b| !b.released() && b.routing.as_ref().is_some_and(|r| r.mode == Some(Mode::None)));
    let closed = ranges.keys().filter(|name| name.as_str() == "default-v6" || !open);
    let host = Host { locations, closed_ranges: closed.cloned().collect(), ..Host::default() };
    let map = Map { blocks, ranges, policies: &[], absent: &Default::default() };
    let (desired, faults) = desired(&node.settings.me, map, &host);
    assert!(faults.is_empty(), "{faults:?}");
    let mut said: Vec<String> = desired
        .routes
        .values()
        .map(|route| {
            let (prefix, metric) = (route.key.prefix, route.key.metric);
            let mtu = route.mtu.map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
            match &route.target {
                Target::Via(hops) => {
                    let gateway = hops[0].gateway.unwrap();
                    format!("{prefix} gateway {gateway} dev eth0 metric {metric}{mtu}")
                }
                Target::Bridge => format!("{prefix} dev cni0 metric {metric}"),
                Target::Tunnel { gateway, .. } => {
                    format!("{prefix} gateway {gateway} dev plat-vxlan metric {metric}{mtu}")
                }
                Target::Unreachable | Target::Other => format!("unreachable {prefix} metric {metric}"),
            }
        })
        .collect();
    said.sort();
    said
}

#[test]
fn any_sequence_of_objects_and_damage_ends_where_the_objects_say() {
    isolated("converge::any_sequence_of_objects_and_damage_ends_where_the_objects_say", || {
        let blocks = vec![block(1), block(2), block(3), block_v6(1), block_v6(2)];
        let mut node = TestNode::with(blocks, vec![range("default-v4"), range("default-v6")]);
        node.expect_condition("CNIReady", "True", "Installed");
        node.contact();
        node.settled();
        let table = run("nft list table inet plat");
        assert!(table.contains("masquerade"));

        let config =
            Config { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..Config::default() };
        let sequence = prop::collection::vec(act(), 1..10);
        let node = std::cell::RefCell::new(&mut node);
        TestRunner::new(config)
            .run(&sequence, |acts| {
                let mut node = node.borrow_mut();
                for act in &acts {
                    match act {
                        Act::Apply(n, change) => node.apply(changed(*n, change)),
                        // Some of it fails, as there is nothing to damage: that is fine.
                        Act::Damage(which) => drop(try_run(DAMAGE[*which])),
                    }
                }
                expect_routes(&said(&node).iter().map(String::as_str).collect::<Vec<_>>());
                eventually("the rest", || {
                    let shown = |line| String::from_utf8(try_run(line).stdout).unwrap();
                    let bridge = shown("ip -o addr show dev cni0");
                    let whole = sysctl("ipv4/ip_forward") == "1"
                        && bridge.contains("10.244.1.1/32")
                        && bridge.contains("fd00:10:244:1::1/128")
                        && shown("nft list table inet plat").contains("masquerade");
                    if whole { Ok(()) } else { Err(bridge) }
                });
                Ok(())
            })
            .unwrap();
    });
}
