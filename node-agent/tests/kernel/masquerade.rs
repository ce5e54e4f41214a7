//! The table `inet plat`, as nft shows it and as packets meet it.

use plat_crds::cluster_cidr::MasqueradeMode;

use crate::harness::*;

fn table() -> String {
    let output = try_run("nft list table inet plat");
    String::from_utf8(output.stdout).unwrap()
}

/// Compares with the golden file; `UPDATE_GOLDEN=1` writes it instead.
fn expect_golden(name: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    eventually("the table", || if table().contains("masquerade") { Ok(()) } else { Err(table()) });
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, table()).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert!(table() == golden, "{} differs; got\n{}\nexpected\n{golden}", path.display(), table());
}

#[test]
fn the_table_is_the_golden_one() {
    isolated("masquerade::the_table_is_the_golden_one", || {
        let blocks = vec![block(1), block(2), block_v6(1), block_v6(2)];
        let mut excluding = range("default-v4");
        excluding.exclude = vec!["192.168.0.0/16".parse().unwrap()];
        let mut node = TestNode::new();
        node.pace = Some(crate::probes::PACE);
        node.start();
        node.contact();
        node.list(blocks, vec![excluding, range("default-v6")]);
        expect_golden("masquerade.nft");
        node.expect_condition("MasqueradeReady", "True", "TableInstalled");
    });
}

#[test]
fn a_range_without_masquerade_has_no_rule_and_may_change_its_mind() {
    isolated("masquerade::a_range_without_masquerade_has_no_rule_and_may_change_its_mind", || {
        let mut node = TestNode::with(vec![block(1)], vec![range("default-v4")]);
        let masquerades = |wanted: bool| {
            eventually(
                "rule",
                || if table().contains("masquerade") == wanted { Ok(()) } else { Err(table()) },
            );
        };
        masquerades(true);
        let mut without = range("default-v4");
        without.masquerade = MasqueradeMode::Disabled;
        node.apply_range(without);
        masquerades(false);
        node.apply_range(range("default-v4"));
        masquerades(true);
    });
}

#[test]
fn thousands_of_nodes_fit_into_one_transaction() {
    isolated("masquerade::thousands_of_nodes_fit_into_one_transaction", || {
        let mut blocks = vec![block(1)];
        for n in 0..5000u32 {
            let mut far = block(2);
            far.block = format!("10.{}.{}.0/24", 64 + n / 256, n % 256).parse().unwrap();
            far.name = far.block.object_name();
            far.node = format!("far-{n}");
            // Every other address, so that nothing merges.
            far.addresses = vec![std::net::Ipv4Addr::from(0xac1f_0000 + 2 * n).into()];
            blocks.push(far);
        }
        let node = TestNode::with(blocks, vec![range("default-v4")]);
        node.expect_condition("MasqueradeReady", "True", "TableInstalled");
        let listing = json("nft -j list set inet plat keep4");
        let set = listing["nftables"].as_array().unwrap().iter().find_map(|o| o.get("set")).unwrap();
        assert!(set["elem"].as_array().unwrap().len() >= 5000);
        node.settled();
        let incidents = node.report().status.incidents;
        assert!(incidents.is_empty(), "it reads back as it was written: {incidents:?}");
    });
}

/// A pod behind the bridge, and a router behind the uplink that sees who sends.
fn pod_and_router() {
    run("ip netns add pod");
    run("ip link add veth1 type veth peer name eth0 netns pod");
    run("ip link set veth1 master cni0");
    run("ip link set veth1 up");
    for line in [
        "addr add 10.244.1.7/32 dev eth0",
        "addr add fd00:10:244:1::7/128 dev eth0 nodad",
        "link set eth0 up",
        "route add 10.244.1.1 dev eth0",
        "route add default via 10.244.1.1",
        "route add fd00:10:244:1::1 dev eth0",
        "route add default via fd00:10:244:1::1",
    ] {
        run(&format!("ip -n pod {line}"));
    }
    run("ip netns add router");
    run("ip link set wire0 netns router");
    for line in [
        "link set lo up",
        "link set wire0 up",
        "addr add 172.30.0.1/24 dev wire0",
        "addr add 172.30.0.12/24 dev wire0",
        "addr add fd00:30::1/64 dev wire0 nodad",
        "addr add 203.0.113.9/32 dev lo",
        "addr add 10.244.2.9/32 dev lo",
        "addr add 2001:db8:9::9/128 dev lo",
        "route add 10.244.1.0/24 via 172.30.0.11",
        "route add fd00:10:244:1::/64 via fd00:30::b",
    ] {
        run(&format!("ip -n router {line}"));
    }
    run("ip netns exec router nft add table inet seen");
    run("ip netns exec router nft add chain inet seen in { type filter hook input priority 0 ; }");
    for source in [
        "ip saddr 10.244.1.7",
        "ip saddr 172.30.0.11",
        "ip saddr 172.30.0.99",
        "ip6 saddr fd00:10:244:1::7",
        "ip6 saddr fd00:30::b",
        "ip6 saddr fd00:30::99",
    ] {
        run(&format!(
            "ip netns exec router nft add rule inet seen in {source} icmp type echo-request counter"
        ));
        run(&format!(
            "ip netns exec router nft add rule inet seen in {source} icmpv6 type echo-request counter"
        ));
    }
}

/// Pings from the pod; returns the sources that the router saw.
fn seen_by(destination: &str) -> Vec<String> {
    let before = counters();
    run(&format!("ip netns exec pod busybox ping -c1 -W5 {destination}"));
    let after = counters();
    after.iter().zip(before).filter(|(a, b)| a.1 > b.1).map(|(a, _)| a.0.clone()).collect()
}

fn counters() -> Vec<(String, u64)> {
    let text = run("ip netns exec router nft list chain inet seen in");
    let rules = text.lines().filter(|line| line.contains("counter packets"));
    rules
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = words.iter().position(|w| *w == "packets").unwrap();
            (words[2].to_owned(), words[at + 1].parse().unwrap())
        })
        .collect()
}

#[test]
fn pods_are_seen_as_themselves_inside_and_as_the_node_outside() {
    isolated("masquerade::pods_are_seen_as_themselves_inside_and_as_the_node_outside", || {
        let blocks = vec![block(1), block(2), block_v6(1)];
        let node = TestNode::with(blocks, vec![range("default-v4"), range("default-v6")]);
        node.expect_condition("CNIReady", "True", "Installed");
        pod_and_router();
        assert_eq!(seen_by("203.0.113.9"), ["172.30.0.11"], "outside");
        assert_eq!(seen_by("172.30.0.12"), ["10.244.1.7"], "a node");
        assert_eq!(seen_by("10.244.2.9"), ["10.244.1.7"], "a pod of another node");
        assert_eq!(seen_by("2001:db8:9::9"), ["fd00:30::b"], "outside, IPv6");
        run("ip netns exec pod busybox ping -c1 -W5 10.244.1.1");
        run("busybox ping -c1 -W5 10.244.1.7");
    });
}

#[test]
fn a_policy_says_with_whose_address_pods_leave_and_where_they_are_seen_as_themselves() {
    isolated(
        "masquerade::a_policy_says_with_whose_address_pods_leave_and_where_they_are_seen_as_themselves",
        || {
            let mut node = TestNode::with(
                vec![block(1), block(2), block_v6(1)],
                vec![range("default-v4"), range("default-v6")],
            );
            node.expect_condition("CNIReady", "True", "Installed");
            pod_and_router();
            let policy = |address: &str| {
                serde_json::json!({
                    "egressAddress": address,
                    "masquerade": {"include": ["172.30.0.12/32"], "exclude": ["203.0.113.0/24"]},
                })
            };
            node.apply(with_routing(block(1), &policy("172.30.0.99").to_string()));
            let message = node.expect_condition("RoutesReady", "False", "NotLocal");
            assert!(message.contains("egressAddress 172.30.0.99 of the PodCIDR"), "{message}");
            run("ip addr add 172.30.0.99/24 dev eth0");
            run("ip addr add fd00:30::99/64 dev eth0 nodad");
            node.apply(with_routing(block_v6(1), r#"{"egressAddress":"fd00:30::99"}"#));
            node.expect_condition("RoutesReady", "True", "AllInstalled");
            eventually("the table", || {
                let table = table();
                if table.matches("snat ip").count() == 3 { Ok(()) } else { Err(table) }
            });
            assert_eq!(seen_by("203.0.113.9"), ["10.244.1.7"], "excluded");
            assert_eq!(seen_by("172.30.0.12"), ["172.30.0.99"], "a node, but included");
            assert_eq!(seen_by("10.244.2.9"), ["10.244.1.7"], "a pod of another node");
            assert_eq!(seen_by("2001:db8:9::9"), ["fd00:30::99"], "outside, IPv6");
            node.settled();
            assert_eq!(node.report().status.incidents, [], "it reads back as it was written");
            node.apply(block(1));
            eventually("the table", || {
                let table = table();
                if table.matches("snat ip").count() == 1 { Ok(()) } else { Err(table) }
            });
            assert_eq!(seen_by("203.0.113.9"), ["172.30.0.11"], "outside");
        },
    );
}
