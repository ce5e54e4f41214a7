//! Links and routes of the host that share addresses with the pods'.

use crate::harness::*;

fn node() -> TestNode {
    let node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
    node.expect_condition("CNIReady", "True", "Installed");
    node.expect_condition("Overlapping", "False", "Disjoint");
    node
}

/// A bridge as docker makes it.
fn docker(address: &str) {
    run("ip link add docker0 type bridge");
    run(&format!("ip addr add {address} dev docker0"));
    run("ip link set docker0 up");
}

#[test]
fn a_link_that_takes_the_packets_of_a_block_is_named_with_the_block() {
    isolated("overlaps::a_link_that_takes_the_packets_of_a_block_is_named_with_the_block", || {
        let node = node();
        docker("10.244.2.1/24");
        let message = node.expect_condition("Overlapping", "True", "Overlapping");
        assert!(
            message.contains("PodCIDR '10-244-2-0-24' of node n2") && message.contains("docker0"),
            "{message}"
        );
        let failed = node.report().status.applied.unwrap().failed;
        assert_eq!(failed[0].name, "10-244-2-0-24");
        node.expect_condition("CNIReady", "True", "Installed");
        run("ip link del docker0");
        node.expect_condition("Overlapping", "False", "Disjoint");
        assert_eq!(node.report().status.applied.unwrap().failed, []);
    });
}

#[test]
fn a_link_in_the_range_is_named_before_a_block_comes_there() {
    isolated("overlaps::a_link_in_the_range_is_named_before_a_block_comes_there", || {
        let node = node();
        docker("10.244.77.1/24");
        let message = node.expect_condition("Overlapping", "True", "HostRoute");
        assert!(message.contains("10.244.77.0/24 of link docker0"), "{message}");
        assert_eq!(node.report().status.applied.unwrap().failed, [], "it fails nothing yet");
        node.expect_condition("RoutesReady", "True", "HostRoute");
    });
}

#[test]
fn a_block_that_holds_the_default_gateway_is_not_programmed() {
    isolated("overlaps::a_block_that_holds_the_default_gateway_is_not_programmed", || {
        let mut node = TestNode::new();
        // The node's own network lies around two blocks: n2's holds the gateway, and its own holds the resolver.
        run("ip addr add 10.244.200.1/16 dev eth0");
        run("ip route replace default via 10.244.2.254");
        node.settings.needed = [ip("10.244.1.53")].into();
        node.start();
        node.contact();
        node.list(vec![block(1), block(2), block(3)], vec![range("default-v4")]);
        expect_routes(&[
            "10.244.3.0/24 gateway 172.30.0.13 dev eth0 metric 1120",
            "unreachable 10.244.0.0/16 metric 65535",
        ]);
        let message = node.expect_condition("RoutesReady", "False", "BlockHoldsNeededAddress");
        assert!(message.contains("10.244.1.53") || message.contains("10.244.2.254"), "{message}");
        node.expect_condition("CNIReady", "False", "NoBlock");
        let reaches = run("ip route get 10.244.2.254");
        assert!(reaches.contains("dev eth0") && !reaches.contains("via"), "{reaches}");
        // With a more specific route there is nothing to lose.
        run("ip route add 10.244.2.254/32 dev eth0");
        run("ip route add 10.244.1.53/32 dev eth0");
        expect_routes(&[
            "10.244.1.0/24 dev cni0 metric 1120",
            "unreachable 10.244.1.0/24 metric 65535",
            "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120",
            "10.244.3.0/24 gateway 172.30.0.13 dev eth0 metric 1120",
            "unreachable 10.244.0.0/16 metric 65535",
        ]);
        node.expect_condition("CNIReady", "True", "Installed");
    });
}
