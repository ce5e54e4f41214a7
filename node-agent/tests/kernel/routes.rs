//! Routes: each field of the policy, and the rules of whose route is whose.

use plat_crds::pod_cidr::BlockState;

use crate::harness::*;

const RANGE: &str = "unreachable 10.244.0.0/16 metric 65535";
const OWN: [&str; 2] = ["10.244.1.0/24 dev cni0 metric 1120", "unreachable 10.244.1.0/24 metric 65535"];

fn expect_own_and(others: &[&str]) {
    expect_routes(&[&[RANGE], OWN.as_slice(), others].concat());
}

fn node() -> TestNode {
    TestNode::with(vec![block(1), block(2)], vec![range("default-v4")])
}

#[test]
fn every_block_gets_its_route_in_both_families() {
    isolated("routes::every_block_gets_its_route_in_both_families", || {
        let blocks = vec![block(1), block(2), block_v6(1), block_v6(2)];
        let node = TestNode::with(blocks, vec![range("default-v4"), range("default-v6")]);
        expect_routes(&[
            RANGE,
            OWN[0],
            OWN[1],
            "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120",
            "unreachable fd00:10:244::/48 metric 65535",
            "fd00:10:244:1::/64 dev cni0 metric 1120",
            "unreachable fd00:10:244:1::/64 metric 65535",
            "fd00:10:244:2::/64 gateway fd00:30::c dev eth0 metric 1120",
        ]);
        node.expect_condition("RoutesReady", "True", "AllInstalled");
        let own = json("ip -j route show 10.244.1.0/24 proto 112");
        assert_eq!(own[0]["prefsrc"], "10.244.1.1", "{own}");
    });
}

#[test]
fn a_changed_next_hop_replaces_the_route_and_a_released_block_loses_it() {
    isolated("routes::a_changed_next_hop_replaces_the_route_and_a_released_block_loses_it", || {
        let mut node = node();
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
        let mut moved = block(2);
        moved.addresses = vec![ip("172.30.0.77")];
        node.apply(moved.clone());
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.77 dev eth0 metric 1120"]);
        moved.state = BlockState::Quarantined;
        node.apply(moved.clone());
        expect_own_and(&[]);
        moved.state = BlockState::Draining;
        node.apply(moved);
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.77 dev eth0 metric 1120"]);
    });
}

#[test]
fn routing_mode_none_makes_no_route_and_leaves_the_range_open() {
    isolated("routes::routing_mode_none_makes_no_route_and_leaves_the_range_open", || {
        let mut node = node();
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
        node.apply(with_routing(block(2), r#"{"mode":"None"}"#));
        expect_routes(&OWN);
        node.apply(with_routing(block(2), r#"{"mode":"Direct"}"#));
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
    });
}

#[test]
fn routing_next_hop_leads_the_route() {
    isolated("routes::routing_next_hop_leads_the_route", || {
        let mut node = node();
        node.apply(with_routing(block(2), r#"{"nextHop":"172.30.0.1"}"#));
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.1 dev eth0 metric 1120"]);
    });
}

#[test]
fn routing_metric_moves_the_route_without_a_gap() {
    isolated("routes::routing_metric_moves_the_route_without_a_gap", || {
        let mut node = node();
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
        let mut monitor = std::process::Command::new("ip")
            .args(["-o", "monitor", "route"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The monitor has no sign that it listens: a route of another's, until it shows.
        let log = std::io::BufReader::new(monitor.stdout.take().unwrap());
        let (lines_in, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(log).map_while(Result::ok) {
                let _ = lines_in.send(line);
            }
        });
        eventually("the monitor", || {
            run("ip route replace 192.168.9.0/24 via 172.30.0.1 metric 9");
            run("ip route del 192.168.9.0/24");
            lines.try_recv().map_err(|_| "silent".to_owned())
        });
        node.apply(with_routing(block(2), r#"{"metric":50}"#));
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 50"]);
        let mut order = Vec::new();
        eventually("the order", || {
            order.extend(lines.try_iter().filter(|line| line.contains("10.244.2.0/24")));
            if order.len() >= 2 { Ok(()) } else { Err(format!("{order:?}")) }
        });
        monitor.kill().unwrap();
        monitor.wait().unwrap();
        assert!(!order[0].starts_with("Deleted") && order[1].starts_with("Deleted"), "{order:#?}");
    });
}

#[test]
fn routing_mtu_is_the_routes_mtu() {
    isolated("routes::routing_mtu_is_the_routes_mtu", || {
        let blocks = vec![
            block(1),
            with_routing(block(2), r#"{"mtu":1400}"#),
            with_routing(block_v6(2), r#"{"mtu":1300}"#),
        ];
        let mut node = TestNode::with(blocks, vec![range("default-v4")]);
        expect_own_and(&[
            "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120 mtu 1400",
            "fd00:10:244:2::/64 gateway fd00:30::c dev eth0 metric 1120 mtu 1300",
        ]);
        node.apply(block(2));
        node.apply(block_v6(2));
        expect_own_and(&[
            "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120",
            "fd00:10:244:2::/64 gateway fd00:30::c dev eth0 metric 1120",
        ]);
    });
}

#[test]
fn a_policy_of_the_range_holds_for_its_blocks() {
    isolated("routes::a_policy_of_the_range_holds_for_its_blocks", || {
        let mut node = node();
        let mut policy = range("default-v4");
        policy.routing = serde_json::from_str(r#"{"metric":70,"mtu":1350}"#).unwrap();
        node.apply_range(policy);
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 70 mtu 1350"]);
    });
}

#[test]
fn what_cannot_be_followed_keeps_the_last_working_route_and_says_what_to_do() {
    isolated("routes::what_cannot_be_followed_keeps_the_last_working_route_and_says_what_to_do", || {
        let mut node = node();
        let working = ["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"];
        expect_own_and(&working);
        let mut away = with_routing(block(2), r#"{"mode":"Direct"}"#);
        away.addresses = vec![ip("10.9.9.9")];
        for (bad, reason, words) in [
            (away, "NotOnLink", "10.9.9.9 is not on a link"),
            (with_routing(block(2), r#"{"mode":"Later"}"#), "UnusablePolicy", "upgrade the agent"),
            (with_routing(block(2), r#"{"nextHop":"fd00::1"}"#), "UnusablePolicy", "not an IPv4 address"),
            (with_routing(block(2), r#"{"nextHop":"172.30.0.11"}"#), "NotOnLink", "this node itself"),
        ] {
            node.apply(bad);
            let message = node.expect_condition("RoutesReady", "False", reason);
            assert!(message.contains(words) && message.contains("10-244-2-0-24"), "{message}");
            let failed = node.report().status.applied.unwrap().failed;
            assert_eq!(failed[0].name, "10-244-2-0-24");
            expect_own_and(&working);
            node.apply(block(2));
            node.expect_condition("RoutesReady", "True", "AllInstalled");
        }
    });
}

#[test]
fn an_agent_that_starts_anew_keeps_the_last_working_route_too() {
    isolated("routes::an_agent_that_starts_anew_keeps_the_last_working_route_too", || {
        let mut node = node();
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
        node.stop();
        node.start();
        node.contact();
        let unknown = with_routing(block(2), r#"{"mode":"Later"}"#);
        node.list(vec![block(1), unknown], vec![range("default-v4")]);
        node.expect_condition("RoutesReady", "False", "UnusablePolicy");
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
    });
}

#[test]
fn a_foreign_route_of_the_same_key_is_never_overwritten() {
    isolated("routes::a_foreign_route_of_the_same_key_is_never_overwritten", || {
        let foreign = "10.244.2.0/24 via 172.30.0.99 dev eth0 proto static metric 1120";
        let node = TestNode::new();
        run(&format!("ip route add {foreign}"));
        run("ip -6 route add fd00:10:244:2::/64 via fd00:30::99 proto static metric 1120");
        let mut node = node;
        node.start();
        node.contact();
        node.list(vec![block(1), block(2), block_v6(2)], vec![range("default-v4")]);
        let message = node.expect_condition("RoutesReady", "False", "ForeignRoute");
        assert!(message.contains("another program has a route to 10.244.2.0/24"), "{message}");
        expect_own_and(&[]);
        assert!(run("ip route show 10.244.2.0/24").contains("172.30.0.99"));
        assert!(run("ip -6 route show fd00:10:244:2::/64").contains("fd00:30::99"));
        // Once it is gone, ours takes its place.
        run(&format!("ip route del {foreign}"));
        run("ip -6 route del fd00:10:244:2::/64 proto static");
        expect_own_and(&[
            "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120",
            "fd00:10:244:2::/64 gateway fd00:30::c dev eth0 metric 1120",
        ]);
        node.expect_condition("RoutesReady", "True", "AllInstalled");
    });
}

#[test]
fn a_foreign_route_that_was_put_before_ours_survives_its_change() {
    isolated("routes::a_foreign_route_that_was_put_before_ours_survives_its_change", || {
        let mut node = node();
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
        // The kernel's replace would take the first of the key, whosever it is.
        run("ip route prepend 10.244.2.0/24 via 172.30.0.99 proto static metric 1120");
        let mut moved = block(2);
        moved.addresses = vec![ip("172.30.0.77")];
        node.apply(moved.clone());
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.77 dev eth0 metric 1120"]);
        moved.routing = with_routing(block(2), r#"{"mtu":1400}"#).routing;
        node.apply(moved.clone());
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.77 dev eth0 metric 1120 mtu 1400"]);
        assert!(run("ip route show 10.244.2.0/24 proto static").contains("172.30.0.99"));
        moved.state = BlockState::Quarantined;
        node.apply(moved);
        expect_own_and(&[]);
        assert!(run("ip route show 10.244.2.0/24 proto static").contains("172.30.0.99"));
    });
}

#[test]
fn routes_of_others_and_other_metrics_stay_through_it_all() {
    isolated("routes::routes_of_others_and_other_metrics_stay_through_it_all", || {
        let mut node = TestNode::new();
        run("ip route add 10.244.2.0/24 via 172.30.0.99 metric 5");
        run("ip route add 192.168.0.0/16 via 172.30.0.99 proto 113");
        node.start();
        node.contact();
        node.list(vec![block(1), block(2)], vec![range("default-v4")]);
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
        node.apply(plat_agent::facts::BlockFact { state: BlockState::Quarantined, ..block(2) });
        expect_own_and(&[]);
        assert!(run("ip route show 10.244.2.0/24").contains("metric 5"));
        assert!(!run("ip route show 192.168.0.0/16").is_empty());
    });
}

#[test]
fn whatever_an_earlier_life_left_is_removed() {
    isolated("routes::whatever_an_earlier_life_left_is_removed", || {
        let mut node = TestNode::new();
        run("ip route add 10.244.9.0/24 via 172.30.0.19 proto 112 metric 1120");
        run("ip route add 10.244.2.0/24 via 172.30.0.19 proto 112 metric 1120");
        run("ip route add 10.244.8.0/24 via 172.30.0.19 proto 112 metric 7 table 99");
        run(
            "ip -6 route add fd00:10:244:9::/64 proto 112 metric 1120 nexthop via fd00:30::1 nexthop via fd00:30::2",
        );
        run("ip route add unreachable 10.99.0.0/16 proto 112 metric 65535");
        node.start();
        node.contact();
        node.list(vec![block(1), block(2)], vec![range("default-v4")]);
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
    });
}

#[test]
fn a_next_hop_on_two_links_goes_where_the_kernel_sends_it() {
    isolated("routes::a_next_hop_on_two_links_goes_where_the_kernel_sends_it", || {
        let mut node = TestNode::new();
        run("ip link add eth1 type veth peer name wire1");
        run("ip addr add 172.30.0.111/24 dev eth1 noprefixroute");
        run("ip link set eth1 up");
        run("ip route add 172.30.0.13/32 dev eth1");
        node.start();
        node.contact();
        node.list(vec![block(2), block(3)], vec![]);
        expect_routes(&[
            "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120",
            "10.244.3.0/24 gateway 172.30.0.13 dev eth1 metric 1120",
        ]);
    });
}

#[test]
fn a_range_with_an_address_that_the_node_needs_stays_open() {
    isolated("routes::a_range_with_an_address_that_the_node_needs_stays_open", || {
        let mut node = TestNode::new();
        node.settings.needed = [ip("10.244.77.7")].into();
        node.start();
        node.contact();
        node.list(vec![block(1)], vec![range("default-v4")]);
        let message = node.expect_condition("RoutesReady", "True", "RangeHoldsNeededAddress");
        assert!(message.contains("10.244.77.7"), "{message}");
        expect_routes(&OWN);
        // A more specific route covers it.
        run("ip route add 10.244.77.0/24 via 172.30.0.1");
        expect_own_and(&[]);
        run("ip route del 10.244.77.0/24");
        expect_routes(&OWN);
    });
}

#[test]
fn a_range_is_opened_again_if_the_api_server_is_lost_by_closing_it() {
    isolated("routes::a_range_is_opened_again_if_the_api_server_is_lost_by_closing_it", || {
        let mut node = TestNode::new();
        node.start();
        node.contact();
        node.list(vec![block(1)], vec![range("default-v4")]);
        expect_own_and(&[]);
        eventually("the question", || {
            if node.asked().contains(&plat_agent::objects::Ask::Contact) {
                Ok(())
            } else {
                Err("not asked".into())
            }
        });
        // Nobody answers. The trial is 20 s, the bound 30 s.
        let before = std::time::Instant::now();
        while our_routes().contains(&RANGE.to_owned()) {
            assert!(before.elapsed() < std::time::Duration::from_secs(30));
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        node.expect_condition("RoutesReady", "True", "RangeHoldsNeededAddress");
    });
}

#[test]
fn a_range_that_passed_its_trial_stays_closed() {
    isolated("routes::a_range_that_passed_its_trial_stays_closed", || {
        let mut node = node();
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
        node.contact();
        node.settled();
        // A look for overlaps, as links have just come, is soon over.
        eventually("nothing is on trial any more", || {
            node.report().next.map_or(Ok(()), |next| Err(format!("until {next:?}")))
        });
    });
}

#[test]
fn links_with_advertised_routes_go_on_accepting_them_while_forwarding() {
    isolated("routes::links_with_advertised_routes_go_on_accepting_them_while_forwarding", || {
        let mut node = TestNode::new();
        run("ip -6 route add 2001:db8:1::/64 via fe80::1 dev eth0 proto ra");
        assert_eq!(sysctl("ipv6/conf/eth0/accept_ra"), "1");
        node.start();
        node.contact();
        node.list(vec![block(1)], vec![]);
        node.expect_condition("RoutesReady", "True", "AllInstalled");
        assert_eq!(sysctl("ipv6/conf/eth0/accept_ra"), "1", "nothing of IPv6 without a block of it");
        node.apply(block_v6(1));
        eventually("forwarding", || {
            if sysctl("ipv6/conf/all/forwarding") == "1" { Ok(()) } else { Err("off".into()) }
        });
        assert_eq!(sysctl("ipv6/conf/eth0/accept_ra"), "2");
    });
}

#[test]
fn an_unreadable_object_is_a_fault_and_the_others_go_on() {
    isolated("routes::an_unreadable_object_is_a_fault_and_the_others_go_on", || {
        use plat_agent::facts::{Fault, Reason};
        use plat_agent::objects::Change;
        let mut node = node();
        expect_own_and(&["10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120"]);
        let bad = |name: &str| {
            Change::Applied(Err(Fault::block(name, Reason::Unreadable, "it is of a newer version")))
        };
        node.objects.blocks.apply(bad("10-244-2-0-24"));
        node.objects.blocks.apply(bad("10-244-9-0-24"));
        node.apply(block(3));
        node.expect_condition("RoutesReady", "False", "Unreadable");
        expect_own_and(&[
            "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120",
            "10.244.3.0/24 gateway 172.30.0.13 dev eth0 metric 1120",
        ]);
        let failed: Vec<String> =
            node.report().status.applied.unwrap().failed.into_iter().map(|f| f.name).collect();
        assert_eq!(failed, ["10-244-2-0-24", "10-244-9-0-24"]);
    });
}
