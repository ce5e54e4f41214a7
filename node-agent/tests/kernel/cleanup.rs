//! `plat-agent cleanup` leaves a node as it was.

use std::path::Path;
use std::process::Command;

use crate::harness::*;

/// Everything that an agent could have touched.
fn snapshot(node: &TestNode) -> String {
    let files = shell(&format!("cd {} && find . -type f | sort", node.root.path().display()));
    let sysctls = ["ipv4/ip_forward", "ipv6/conf/all/forwarding", "ipv6/conf/eth0/accept_ra"].map(sysctl);
    [
        run("ip -o link"),
        shell("ip -o addr | sed 's/valid_lft.*//'"),
        run("ip -4 route show table all"),
        shell("ip -6 route show table all | grep -v 'ff00::/8\\|fe80' || true"),
        run("ip -4 rule show"),
        run("ip -6 rule show"),
        run("nft list ruleset"),
        files,
        sysctls.join(" "),
    ]
    .join("\n---\n")
}

fn cleanup(node: &TestNode) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_plat-agent"))
        .arg("cleanup")
        .args(["--cni-conf-dir", path(&node.settings.conf_dir)])
        .args(["--cni-bin-dir", path(&node.settings.bin_dir)])
        .args(["--run-dir", path(&node.settings.run_dir)])
        .output()
        .unwrap()
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn expect_clean(node: &TestNode) {
    let output = cleanup(node);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A node with something of everything, of ours and of others.
fn busy_node() -> (TestNode, String) {
    let mut node = TestNode::new();
    run("ip -6 route add 2001:db8:1::/64 via fe80::1 dev eth0 proto ra");
    run("nft add table inet mine");
    run("iptables-nft -P FORWARD DROP");
    run("ip route add 10.99.0.0/16 via 172.30.0.1");
    std::fs::create_dir_all(&node.settings.conf_dir).unwrap();
    std::fs::write(node.file("net.d/10-other.conflist"), "{}").unwrap();
    std::fs::create_dir_all(&node.settings.bin_dir).unwrap();
    std::fs::write(node.file("bin/loopback"), "x").unwrap();
    let before = snapshot(&node);
    let in_table = |block| with_routing(block, r#"{"table":1000}"#);
    node.start();
    node.contact();
    node.list(
        vec![
            block(1),
            in_table(block(2)),
            with_routing(block(3), r#"{"mode":"VXLAN"}"#),
            block_v6(1),
            in_table(block_v6(2)),
        ],
        vec![range("default-v4"), range("default-v6")],
    );
    node.expect_condition("CNIReady", "True", "Installed");
    node.settled();
    assert!(run("ip rule show").contains("lookup 1000") && run("ip -6 rule show").contains("lookup 1000"));
    assert!(run("ip -o link").contains("plat-vxlan"));
    node.stop();
    // What the CNI binary makes.
    run("nft add table inet plat-pods");
    run("nft add table bridge plat-pods");
    (node, before)
}

#[test]
fn a_node_is_as_it_was_before() {
    isolated("cleanup::a_node_is_as_it_was_before", || {
        let (node, before) = busy_node();
        assert_ne!(snapshot(&node), before);
        assert_eq!(sysctl("ipv4/ip_forward"), "1");
        expect_clean(&node);
        assert_eq!(snapshot(&node), before);
        assert!(!node.settings.run_dir.exists());
        expect_clean(&node);
        assert_eq!(snapshot(&node), before, "a second time changes nothing");
    });
}

#[test]
fn a_node_that_never_had_plat_is_cleaned_without_a_trace() {
    isolated("cleanup::a_node_that_never_had_plat_is_cleaned_without_a_trace", || {
        let node = TestNode::new();
        let before = snapshot(&node);
        expect_clean(&node);
        assert_eq!(snapshot(&node), before);
    });
}

#[test]
fn a_bridge_with_pods_stays_and_is_named_while_the_rest_goes() {
    isolated("cleanup::a_bridge_with_pods_stays_and_is_named_while_the_rest_goes", || {
        let (node, _) = busy_node();
        run("ip link add veth1 type veth peer name pod1");
        run("ip link set veth1 master cni0");
        set_sysctl("ipv4/conf/cni0/route_localnet", "1");
        let output = cleanup(&node);
        assert_eq!(sysctl("ipv4/conf/cni0/route_localnet"), "0", "its guard went with the table");
        assert!(output.status.success());
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(log.contains("bridge cni0 stays: 1 links hang on it"), "{log}");
        assert_eq!(our_routes(), Vec::<String>::new());
        assert!(!node.file("net.d/05-plat.conflist").exists());
        assert!(!run("nft list tables").contains("plat"));
        run("ip link del veth1");
        expect_clean(&node);
        assert!(!run("ip -o link").contains("cni0"));
    });
}

#[test]
fn gateways_on_lo_stay_for_routed_pods_and_for_no_pod_whose_bridge_is_gone() {
    isolated("cleanup::gateways_on_lo_stay_for_routed_pods_and_for_no_pod_whose_bridge_is_gone", || {
        let (node, _) = busy_node();
        for (name, datapath) in [("plat1", "bridge:br1"), ("plat2", "routed")] {
            run(&format!("ip link add {name} type veth peer name {name}p"));
            shell(&format!("ip link set {name} alias 'plat {name} eth0 {datapath} open'"));
        }
        let output = cleanup(&node);
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(log.contains("the gateways on lo stay: 1 pods have links of their own"), "{log}");
        run("ip link del plat2");
        let output = cleanup(&node);
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !log.contains("the gateways on lo stay"), "{log}");
    });
}

#[test]
fn sysctls_that_were_on_before_stay_on() {
    isolated("cleanup::sysctls_that_were_on_before_stay_on", || {
        set_sysctl("ipv4/ip_forward", "1");
        let (node, before) = busy_node();
        expect_clean(&node);
        assert_eq!(snapshot(&node), before);
        assert_eq!(sysctl("ipv4/ip_forward"), "1");
    });
}
