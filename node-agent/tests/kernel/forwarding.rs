//! Foreign firewalls at the forward hook.

use crate::harness::*;

fn node(admit: bool) -> TestNode {
    let mut node = TestNode::new();
    node.settings.me.admit_forward = admit;
    node.start();
    node.contact();
    node.list(vec![block(1), block_v6(1)], vec![range("default-v4"), range("default-v6")]);
    node.expect_condition("CNIReady", "True", "Installed");
    node
}

fn pod() {
    run("ip netns add pod");
    run("ip link add veth1 type veth peer name eth0 netns pod");
    run("ip link set veth1 master cni0");
    run("ip link set veth1 up");
    run("ip netns add other");
    run("ip link set wire0 netns other");
    for line in [
        "-n pod addr add 10.244.1.7/32 dev eth0",
        "-n pod addr add fd00:10:244:1::7/128 dev eth0 nodad",
        "-n pod link set eth0 up",
        "-n pod route add 10.244.1.1 dev eth0",
        "-n pod route add default via 10.244.1.1",
        "-n pod route add fd00:10:244:1::1 dev eth0",
        "-n pod route add default via fd00:10:244:1::1",
        "-n other link set wire0 up",
        "-n other addr add 172.30.0.12/24 dev wire0",
        "-n other addr add fd00:30::c/64 dev wire0 nodad",
        "-n other route add 10.244.1.0/24 via 172.30.0.11",
        "-n other route add fd00:10:244:1::/64 via fd00:30::b",
    ] {
        run(&format!("ip {line}"));
    }
}

fn reaches(from: &str, to: &str) -> bool {
    try_run(&format!("ip netns exec {from} busybox ping -c1 -W1 {to}")).status.success()
}

fn expect_reach() {
    for (from, to) in [
        ("pod", "172.30.0.12"),
        ("other", "10.244.1.7"),
        ("pod", "fd00:30::c"),
        ("other", "fd00:10:244:1::7"),
    ] {
        eventually(
            &format!("{from} to {to}"),
            || if reaches(from, to) { Ok(()) } else { Err("lost".into()) },
        );
    }
}

const OUT_V4: &str = "-A FORWARD -s 10.244.1.0/24 -i cni0 -m comment --comment plat -j ACCEPT";
const IN_V4: &str = "-A FORWARD -d 10.244.1.0/24 -o cni0 -m comment --comment plat -j ACCEPT";
const OUT_V6: &str = "-A FORWARD -s fd00:10:244:1::/64 -i cni0 -m comment --comment plat -j ACCEPT";
const IN_V6: &str = "-A FORWARD -d fd00:10:244:1::/64 -o cni0 -m comment --comment plat -j ACCEPT";

fn rules(program: &str) -> Vec<String> {
    run(&format!("{program} -S FORWARD")).lines().map(str::to_owned).collect()
}

fn expect_rules(program: &str, expected: &[&str]) {
    eventually(program, || {
        let (mut got, mut expected) = (rules(program), expected.to_vec());
        got.sort();
        expected.sort_unstable();
        if got == expected { Ok(()) } else { Err(format!("{got:#?}")) }
    });
}

#[test]
fn a_drop_policy_lets_pods_through_by_plain_rules_that_iptables_reads() {
    isolated("forwarding::a_drop_policy_lets_pods_through_by_plain_rules_that_iptables_reads", || {
        let node = node(true);
        pod();
        expect_reach();
        run("iptables-nft -A FORWARD -s 192.0.2.0/24 -j DROP");
        run("iptables-nft -P FORWARD DROP");
        run("ip6tables-nft -P FORWARD DROP");
        expect_rules(
            "iptables-nft",
            &["-P FORWARD DROP", "-A FORWARD -s 192.0.2.0/24 -j DROP", OUT_V4, IN_V4],
        );
        assert_eq!(
            rules("iptables-nft")[1],
            "-A FORWARD -s 192.0.2.0/24 -j DROP",
            "the administrator's stays first"
        );
        expect_rules("ip6tables-nft", &["-P FORWARD DROP", OUT_V6, IN_V6]);
        expect_reach();
        node.expect_condition("ForwardingBlocked", "False", "NothingFound");
        assert!(node.report().status.incidents.is_empty(), "{:?}", node.report().status.incidents);

        for program in ["iptables", "ip6tables"] {
            let saved = run(&format!("{program}-nft-save"));
            assert!(saved.contains("--comment plat"), "{saved}");
            std::fs::write("/run/saved", &saved).unwrap();
            run(&format!("{program}-nft-restore --test /run/saved"));
            run(&format!("{program}-nft-restore /run/saved"));
        }
        node.settled();
        expect_rules(
            "iptables-nft",
            &["-P FORWARD DROP", "-A FORWARD -s 192.0.2.0/24 -j DROP", OUT_V4, IN_V4],
        );
        expect_rules("ip6tables-nft", &["-P FORWARD DROP", OUT_V6, IN_V6]);
        expect_reach();
    });
}

#[test]
fn flushed_accept_rules_are_back_and_vanish_with_the_policy() {
    isolated("forwarding::flushed_accept_rules_are_back_and_vanish_with_the_policy", || {
        let node = node(true);
        run("iptables-nft -P FORWARD DROP");
        expect_rules("iptables-nft", &["-P FORWARD DROP", OUT_V4, IN_V4]);
        run("iptables-nft -F FORWARD");
        let message = node.expect_incident("ForwardRestored", 2);
        assert!(message.contains("iptables"), "{message}");
        expect_rules("iptables-nft", &["-P FORWARD DROP", OUT_V4, IN_V4]);
        run("iptables-nft -P FORWARD ACCEPT");
        expect_rules("iptables-nft", &["-P FORWARD ACCEPT"]);
    });
}

#[test]
fn rules_follow_the_blocks() {
    isolated("forwarding::rules_follow_the_blocks", || {
        run("iptables-nft -P FORWARD DROP");
        let mut node = node(true);
        expect_rules("iptables-nft", &["-P FORWARD DROP", OUT_V4, IN_V4]);
        let mut second = block(7);
        second.node = "n1".into();
        node.apply(second);
        let more = [OUT_V4.replace(".1.0/24", ".7.0/24"), IN_V4.replace(".1.0/24", ".7.0/24")];
        expect_rules("iptables-nft", &["-P FORWARD DROP", OUT_V4, IN_V4, &more[0], &more[1]]);
    });
}

#[test]
fn without_leave_to_add_rules_the_policy_is_reported() {
    isolated("forwarding::without_leave_to_add_rules_the_policy_is_reported", || {
        let node = node(false);
        run("iptables-nft -P FORWARD DROP");
        let message = node.expect_condition("ForwardingBlocked", "True", "ForeignFirewall");
        assert!(message.contains("chain ip filter FORWARD"), "{message}");
        expect_rules("iptables-nft", &["-P FORWARD DROP"]);
    });
}

#[test]
fn an_explicit_drop_is_named_and_not_touched() {
    isolated("forwarding::an_explicit_drop_is_named_and_not_touched", || {
        let node = node(true);
        let listing = |family: &str| run(&format!("nft list table {family}"));
        run("iptables-nft -A FORWARD -j REJECT");
        let message = node.expect_condition("ForwardingBlocked", "True", "ForeignFirewall");
        assert!(message.contains("chain ip filter FORWARD rejects"), "{message}");
        assert!(message.contains("'reject' (handle"), "{message}");
        assert_eq!(rules("iptables-nft").len(), 2);
        run("iptables-nft -F FORWARD");
        node.expect_condition("ForwardingBlocked", "False", "NothingFound");

        run("nft add table inet fw");
        run("nft add chain inet fw guard { type filter hook forward priority 10 ; policy drop ; }");
        run("nft add rule inet fw guard ct state established,related accept");
        let before = listing("inet fw");
        let message = node.expect_condition("ForwardingBlocked", "True", "ForeignFirewall");
        assert!(message.contains("chain inet fw guard") && message.contains("iifname \"cni0\""), "{message}");
        assert_eq!(listing("inet fw"), before);
        // The cure that the message names.
        run("nft add rule inet fw guard iifname cni0 accept");
        run("nft add rule inet fw guard oifname cni0 accept");
        node.expect_condition("ForwardingBlocked", "False", "NothingFound");
    });
}

#[test]
fn a_legacy_table_is_a_doubt() {
    isolated("forwarding::a_legacy_table_is_a_doubt", || {
        let node = node(true);
        if !try_run("iptables-legacy -P FORWARD DROP").status.success() {
            eprintln!("skipped: this kernel has no legacy iptables");
            return;
        }
        // No message tells of it: met by the tick, or by whatever wakes the loop before.
        node.settled();
        let message = node.expect_condition("ForwardingBlocked", "Unknown", "LegacyTables");
        assert!(message.contains("IPv4 filter"), "{message}");
    });
}
