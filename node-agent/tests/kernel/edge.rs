//! Routes and rules as the kernel takes and shows them, without an agent.

use plat_agent::fabric::{Devices, Hop, OnLink, Packets, Route, RouteKey, Rule, Target};
use plat_agent::kernel::{route, rule};
use plat_cni::netlink::{Protocol, Socket};
use plat_crds::block::Family;

use crate::harness::*;

/// Two links, each with a subnet of both families, and one that needs no router.
fn links() {
    std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
    for n in 0..2 {
        run(&format!("ip link add eth{n} type veth peer name wire{n}"));
        run(&format!("ip addr add 172.30.{n}.11/24 dev eth{n}"));
        run(&format!("ip addr add fd00:30:{n}::b/64 dev eth{n} nodad"));
        run(&format!("ip link set wire{n} up"));
        run(&format!("ip link set eth{n} up"));
    }
    eventually("carrier", || {
        let links = run("ip -o link show up");
        if links.matches("state UP").count() == 4 { Ok(()) } else { Err(links) }
    });
}

fn index(link: &str) -> u32 {
    u32::try_from(json(&format!("ip -j link show {link}"))[0]["ifindex"].as_u64().unwrap()).unwrap()
}

fn add(socket: &mut Socket, route: &Route) {
    let outcomes = route::add(socket, std::slice::from_ref(route), Devices::default());
    outcomes.into_iter().for_each(|outcome| outcome.unwrap());
}

/// Routes of one key, each different in one thing.
fn routes(key: RouteKey) -> Vec<Route> {
    let (eth0, eth1) = (index("eth0"), index("eth1"));
    let at = |net: u8, host: u8| match key.family() {
        Family::IPv4 => ip(&format!("172.30.{net}.{host}")),
        Family::IPv6 => ip(&format!("fd00:30:{net}::{host}")),
    };
    let own = match key.family() {
        Family::IPv4 => ip("172.30.1.11"),
        Family::IPv6 => ip("fd00:30:1::b"),
    };
    let weighed = |hop: Hop, weight| Hop { weight, ..hop };
    let (one, two) = (Hop::to(at(0, 12), eth0), Hop::to(at(1, 13), eth1));
    let elsewhere = match key.family() {
        Family::IPv4 => ip("192.168.77.1"),
        Family::IPv6 => ip("fd77::1"),
    };
    let taken = Hop { on_link: OnLink::Taken, ..Hop::to(elsewhere, eth0) };
    let plain = |hops: &[Hop]| Route::new(key, Target::via(hops.iter().copied()));
    vec![
        plain(&[one]),
        plain(&[two]),
        plain(&[one, two]),
        plain(&[weighed(one, 2), weighed(two, 256)]),
        plain(&[one, two, Hop::to(at(0, 14), eth0)]),
        plain(&[taken]),
        plain(&[taken, two]),
        plain(&[Hop { gateway: None, ..one }]),
        Route { mtu: Some(1400), advmss: Some(1340), source: Some(own), ..plain(&[one, two]) },
        Route { mtu: Some(1300), ..plain(&[one]) },
        Route { advmss: Some(1200), ..plain(&[one]) },
        Route { source: Some(own), ..plain(&[one]) },
    ]
}

#[test]
fn any_route_replaces_any_other_of_its_key_and_reads_back() {
    isolated("edge::any_route_replaces_any_other_of_its_key_and_reads_back", || {
        links();
        let mut socket = Socket::open(Protocol::Route).unwrap();
        for prefix in ["10.244.2.0/24", "fd00:10:244:2::/64"] {
            for table in [254, 1000] {
                let key = RouteKey { table, prefix: prefix.parse().unwrap(), metric: 1120 };
                for before in routes(key) {
                    // An equal one is never replaced.
                    for after in routes(key).into_iter().filter(|after| *after != before) {
                        add(&mut socket, &before);
                        let there = route::dump(&mut socket, Devices::default()).unwrap();
                        assert_eq!(there.values().collect::<Vec<_>>(), [&before]);
                        route::replace(&mut socket, &after, Devices::default()).unwrap();
                        let there = route::dump(&mut socket, Devices::default()).unwrap();
                        assert_eq!(there.into_values().collect::<Vec<_>>(), [after], "in place of {before}");
                        assert!(route::delete(&mut socket, &key).unwrap());
                        assert_eq!(
                            route::dump(&mut socket, Devices::default()).unwrap().len(),
                            0,
                            "{before}"
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn several_next_hops_are_one_route_that_ip_shows_with_every_field() {
    isolated("edge::several_next_hops_are_one_route_that_ip_shows_with_every_field", || {
        links();
        let mut socket = Socket::open(Protocol::Route).unwrap();
        for (prefix, family) in [("10.244.2.0/24", "-4"), ("fd00:10:244:2::/64", "-6")] {
            let key = RouteKey { table: 1000, prefix: prefix.parse().unwrap(), metric: 77 };
            let all = routes(key);
            let weighed =
                Route { mtu: Some(1400), advmss: Some(1340), source: all[8].source, ..all[3].clone() };
            add(&mut socket, &weighed);
            let shown = json(&format!("ip -j {family} route show table 1000 proto 112"));
            assert_eq!(shown.as_array().unwrap().len(), 1, "{shown}");
            let shown = &shown[0];
            assert_eq!(shown["metric"], 77, "{shown}");
            assert_eq!(shown["prefsrc"], all[8].source.unwrap().to_string(), "{shown}");
            assert_eq!(shown["metrics"][0]["mtu"], 1400, "{shown}");
            assert_eq!(shown["metrics"][0]["advmss"], 1340, "{shown}");
            let mut hops: Vec<String> = shown["nexthops"]
                .as_array()
                .unwrap()
                .iter()
                .map(|hop| format!("{} {} {}", hop["gateway"], hop["dev"], hop["weight"]))
                .collect();
            hops.sort();
            let want = match key.family() {
                Family::IPv4 => [r#""172.30.0.12" "eth0" 2"#, r#""172.30.1.13" "eth1" 256"#],
                Family::IPv6 => [r#""fd00:30:1::13" "eth1" 256"#, r#""fd00:30::12" "eth0" 2"#],
            };
            assert_eq!(hops, want, "{shown}");
        }
    });
}

#[test]
fn a_rule_is_added_once_told_from_others_and_deleted() {
    isolated("edge::a_rule_is_added_once_told_from_others_and_deleted", || {
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let ours = |socket: &mut Socket| {
            rule::dump(socket).unwrap().into_iter().filter_map(|found| found.ours()).collect::<Vec<_>>()
        };
        run("ip rule add from all lookup 1000 priority 1120 protocol static");
        run("ip rule add from 10.0.0.0/8 lookup 1000 priority 1120 protocol 112");
        let narrowed = Rule { packets: Packets::Other, ..Rule::to(Family::IPv4, 1000) };
        assert_eq!(ours(&mut socket), [narrowed]);
        assert!(rule::delete(&mut socket, &narrowed).unwrap());
        for family in Family::ALL {
            for _ in 0..2 {
                rule::add(&mut socket, &Rule::to(family, 1000)).unwrap();
            }
        }
        assert_eq!(ours(&mut socket), Family::ALL.map(|family| Rule::to(family, 1000)));
        let shown = json("ip -j -6 rule show");
        let shown = shown.as_array().unwrap().iter().find(|rule| rule["priority"] == 1120).unwrap();
        assert_eq!((&shown["src"], &shown["table"]), (&"all".into(), &"1000".into()), "{shown}");
        for rule in ours(&mut socket) {
            assert!(rule::delete(&mut socket, &rule).unwrap());
        }
        assert_eq!(ours(&mut socket), []);
        assert!(!rule::delete(&mut socket, &Rule::to(Family::IPv4, 1000)).unwrap());
        assert!(run("ip rule show").contains("1120:\tfrom all lookup 1000 proto static"));
    });
}
