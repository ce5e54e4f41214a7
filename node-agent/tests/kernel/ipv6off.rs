//! A node whose kernel has IPv6 switched off, and that was given a block of it all the same.

use plat_crds::lease::Datapath;

use crate::harness::*;

fn says_what_to_do(datapath: Datapath, reason: &str) {
    let mut node = TestNode::new();
    node.settings.me.datapath = datapath;
    run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1");
    node.start();
    node.contact();
    node.list(vec![block(1), block_v6(1)], vec![range("default-v4"), range("default-v6")]);
    let message = node.expect_condition("RoutesReady", "False", reason);
    for words in ["fd00:10:244:1::1", "holds the IPv6 block fd00:10:244:1::/64", "disable_ipv6=0"] {
        assert!(message.contains(words), "{message}");
    }
    assert!(!node.file("net.d/05-plat.conflist").exists());
    run("sysctl -qw net.ipv6.conf.all.disable_ipv6=0");
    node.settled();
    node.expect_condition("CNIReady", "True", "Installed");
}

#[test]
fn a_node_without_ipv6_that_holds_a_block_of_it_says_what_to_do() {
    isolated("ipv6off::a_node_without_ipv6_that_holds_a_block_of_it_says_what_to_do", || {
        says_what_to_do(Datapath::Bridge, "BridgeNotReady");
    });
}

#[test]
fn a_routed_node_without_ipv6_that_holds_a_block_of_it_says_what_to_do() {
    isolated("ipv6off::a_routed_node_without_ipv6_that_holds_a_block_of_it_says_what_to_do", || {
        says_what_to_do(Datapath::Routed, "GatewaysNotReady");
    });
}
