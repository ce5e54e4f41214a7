//! The lease store as the agent reads it, and passes that fail.

use plat_agent::reporter::Report;
use plat_crds::lease::{HEADER_SIZE, Header, checksum};

use crate::harness::*;

/// A link as the CNI binary leaves it for a pod.
fn pod(alias: &str) {
    run("ip netns add pod");
    run("ip link add plat0 type veth peer name eth0 netns pod");
    shell(&format!("ip link set plat0 alias '{alias}'"));
}

fn used(report: &Report) -> Vec<(String, Option<i64>)> {
    report.status.held_blocks.iter().map(|held| (held.cidr.clone(), held.used)).collect()
}

fn expect_used(node: &TestNode, expected: &[(&str, Option<i64>)]) {
    let expected: Vec<(String, Option<i64>)> =
        expected.iter().map(|(cidr, used)| ((*cidr).to_owned(), *used)).collect();
    eventually("the counts", || {
        let used = used(&node.report());
        if used == expected { Ok(()) } else { Err(format!("{used:?}")) }
    });
}

/// The header of a store that a later version wrote.
fn newer_store() -> Vec<u8> {
    let mut bytes = Header { boot_id: [1; 16], slots: 0, leases: 0 }.encode();
    bytes[8] = 2;
    let sum = checksum(&bytes[..HEADER_SIZE - 8]);
    bytes[HEADER_SIZE - 8..].copy_from_slice(&sum.to_le_bytes());
    bytes.to_vec()
}

#[test]
fn a_store_that_cannot_be_used_is_named_and_lets_no_block_go() {
    isolated("leases::a_store_that_cannot_be_used_is_named_and_lets_no_block_go", || {
        pod("plat c1 eth0 bridge:cni0 open plat blocks 10.244.7.9/24");
        let mut node = TestNode::new();
        let store = node.file("plat/leases");
        std::fs::create_dir_all(node.file("plat")).unwrap();
        std::fs::write(&store, newer_store()).unwrap();
        node.start();
        node.contact();
        node.list(vec![block(1)], vec![range("default-v4")]);
        let message = node.expect_condition("CNIReady", "False", "StoreUnusable");
        assert!(message.contains("version 2") && message.contains("plat/leases"), "{message}");
        // The block without leases may have some in that store; the other is proven by its pod's link.
        expect_used(&node, &[("10.244.1.0/24", None), ("10.244.7.0/24", Some(1))]);
        assert_eq!(std::fs::read(&store).unwrap(), newer_store(), "not a byte has changed");
        std::fs::remove_file(&store).unwrap();
        node.expect_condition("CNIReady", "True", "Installed");
        expect_used(&node, &[("10.244.1.0/24", Some(0)), ("10.244.7.0/24", Some(1))]);
        let message = node.expect_incident("LeasesRebuilt", 1);
        assert!(message.contains("it is new; it has 1 leases"), "{message}");
    });
}

#[test]
fn a_damaged_store_is_rebuilt_and_told() {
    isolated("leases::a_damaged_store_is_rebuilt_and_told", || {
        pod("plat c1 eth0 bridge:cni0 open plat blocks 10.244.1.9/24");
        let mut node = TestNode::new();
        std::fs::create_dir_all(node.file("plat")).unwrap();
        std::fs::write(node.file("plat/leases"), "garbage").unwrap();
        node.start();
        node.contact();
        node.list(vec![block(1)], vec![range("default-v4")]);
        let message = node.expect_incident("LeasesRebuilt", 1);
        assert!(message.contains("its header cannot be read; it has 1 leases"), "{message}");
        expect_used(&node, &[("10.244.1.0/24", Some(1))]);
    });
}

#[test]
fn passes_that_fail_again_and_again_are_reported() {
    isolated("leases::passes_that_fail_again_and_again_are_reported", || {
        let node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
        node.expect_condition("RoutesReady", "True", "AllInstalled");
        expect_used(&node, &[("10.244.1.0/24", Some(0))]);
        // A file whose reading fails (EIO).
        run("mount --bind /proc/self/mem /proc/sys/net/ipv4/ip_forward");
        let message = node.expect_condition("RoutesReady", "Unknown", "PassFailed");
        assert!(message.contains("ip_forward"), "{message}");
        expect_used(&node, &[("10.244.1.0/24", None)]);
        run("umount /proc/sys/net/ipv4/ip_forward");
        node.expect_condition("RoutesReady", "True", "AllInstalled");
        expect_used(&node, &[("10.244.1.0/24", Some(0))]);
    });
}
