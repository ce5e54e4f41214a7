//! The pods' own nftables tables: the CNI binary writes them, the agent keeps them as the leases say.

use plat_cni::pods::{self, Added};
use plat_crds::host_port::{HostIp, HostPort, Transport};
use plat_crds::lease::{Guard, GuardScope, HostVeth, Lease, LeasedAddress, Pool};

use crate::harness::*;

fn node() -> TestNode {
    let node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
    node.expect_condition("MasqueradeReady", "True", "TableInstalled");
    eventually("the conflist", || {
        if node.file("net.d/05-plat.conflist").exists() { Ok(()) } else { Err("none".into()) }
    });
    node.settled();
    node
}

/// A pod with two host ports, as an ADD leaves it.
fn pod(node: &TestNode) {
    pod_with(node, None);
}

fn pod_with(node: &TestNode, guard: Option<Guard>) {
    run("ip netns add pod");
    run("ip link add platpod type veth peer name eth0 netns pod");
    run("ip link set platpod master cni0 up");
    let lease = Lease {
        container_id: "pod".into(),
        ifname: "eth0".into(),
        network: Some("plat".into()),
        pool: Pool::Blocks,
        addresses: vec![LeasedAddress { address: ip("10.244.1.7"), subnet_length: 24, masquerade: false }],
        veth: HostVeth { name: "platpod".into(), index: 9 },
        host_ports: [Transport::Tcp, Transport::Udp]
            .map(|protocol| HostPort { host_ip: HostIp::Any, protocol, host_port: 8080, container_port: 80 })
            .into(),
        guard,
        ..Lease::default()
    };
    shell(&format!("ip link set platpod alias '{}'", plat_crds::alias::of(&lease, None)));
    set_sysctl("ipv4/conf/cni0/route_localnet", "1");
    lease_out(node, &lease);
}

fn lease_out(node: &TestNode, lease: &Lease) {
    with_store(&node.file("plat/leases"), |store| {
        let survey = store.survey(&lease.container_id, &lease.ifname).unwrap();
        store.insert(&survey, lease).unwrap();
        if pods::add(lease).unwrap() == Added::Unsettled {
            pods::settle(lease, std::slice::from_ref(lease), &mut || Ok(Vec::new())).unwrap();
        }
    });
}

fn table() -> String {
    String::from_utf8(try_run("nft list table inet plat-pods").stdout).unwrap()
}

fn expect_table(before: &str) {
    eventually("the table", || if table() == before { Ok(()) } else { Err(table()) });
}

#[test]
fn whatever_is_lost_of_a_pods_rules_is_back_and_told() {
    isolated("pods::whatever_is_lost_of_a_pods_rules_is_back_and_told", || {
        let node = node();
        pod(&node);
        node.settled();
        let before = table();
        assert!(before.contains("tcp . 8080 : 10.244.1.7 . 80"), "{before}");
        let mut count = 0;
        for (damage, losses) in [
            ("delete table inet plat-pods", 3),
            ("flush map inet plat-pods hostports4", 1),
            ("delete element inet plat-pods hostports4 { udp . 8080 }", 1),
            ("flush chain inet plat-pods loopback-guard", 1),
            ("flush table inet plat-pods", 1),
            // With the agent's own table.
            ("flush ruleset", 4),
        ] {
            run(&format!("nft {damage}"));
            expect_table(&before);
            count += losses;
            let message = node.expect_incident("NftRestored", count);
            assert!(message.contains("put back; likely changed by nft (pid"), "{damage}: {message}");
        }
        node.settled();
        assert_eq!(node.report().status.incidents.len(), 1, "{:?}", node.report().status.incidents);
    });
}

#[test]
fn what_belongs_to_no_lease_is_swept_and_loopback_leads_to_pods_again() {
    isolated("pods::what_belongs_to_no_lease_is_swept_and_loopback_leads_to_pods_again", || {
        let node = node();
        pod(&node);
        let before = table();
        set_sysctl("ipv4/conf/cni0/route_localnet", "0");
        run("nft add element inet plat-pods hostports4 { tcp . 9 : 10.244.1.99 . 9 }");
        expect_table(&before);
        node.expect_incident("SysctlRestored", 1);
        assert_eq!(sysctl("ipv4/conf/cni0/route_localnet"), "1");
    });
}

#[test]
fn an_agent_that_starts_finds_what_was_lost_while_it_was_away() {
    isolated("pods::an_agent_that_starts_finds_what_was_lost_while_it_was_away", || {
        let mut node = node();
        pod(&node);
        let before = table();
        node.stop();
        run("nft flush ruleset");
        node.start();
        expect_table(&before);
    });
}

#[test]
fn a_pod_that_is_held_to_its_addresses_is_so_again_after_a_flush() {
    isolated("pods::a_pod_that_is_held_to_its_addresses_is_so_again_after_a_flush", || {
        let node = node();
        pod_with(&node, Some(Guard { mac: [2, 0, 0, 0, 0, 7], scope: GuardScope::Addresses }));
        node.settled();
        let tables = || run("nft list table inet plat-pods") + &run("nft list table bridge plat-pods");
        let before = tables();
        assert!(before.contains(r#""platpod" . 02:00:00:00:00:07 . 10.244.1.7"#), "{before}");
        for damage in [
            "delete table bridge plat-pods",
            "flush set bridge plat-pods own4",
            "flush map bridge plat-pods ports",
            "flush chain bridge plat-pods addresses",
            "insert rule bridge plat-pods advertisement accept",
            "flush set inet plat-pods links",
            "flush ruleset",
        ] {
            run(&format!("nft {damage}"));
            eventually(damage, || {
                let now = String::from_utf8(try_run("nft list ruleset").stdout).unwrap();
                let whole = now.contains("table bridge plat-pods") && now.contains("table inet plat-pods");
                if whole && tables() == before { Ok(()) } else { Err(now) }
            });
        }
    });
}
