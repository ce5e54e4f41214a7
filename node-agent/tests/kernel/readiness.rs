//! When a node that joins becomes Ready.

use std::time::Duration;

use plat_agent::facts::BlockFact;
use plat_agent::readiness::Readiness;

use crate::harness::*;

fn converged(block: BlockFact) -> BlockFact {
    BlockFact { converged: true, ..block }
}

/// A node that waits for its peers before its first conflist.
fn waiting(deadline: u64) -> TestNode {
    let mut node = TestNode::new();
    node.settings.readiness = Readiness::Converged;
    node.settings.readiness_deadline = Duration::from_secs(deadline);
    node.start();
    node.contact();
    node.list(vec![block(1), block(2)], vec![range("default-v4")]);
    node
}

#[test]
fn the_first_conflist_waits_until_every_live_node_routes_to_this_one_and_a_later_one_does_not() {
    isolated(
        "readiness::the_first_conflist_waits_until_every_live_node_routes_to_this_one_and_a_later_one_does_not",
        || {
            let mut node = waiting(3600);
            let message = node.expect_condition("CNIReady", "False", "Unconverged");
            assert!(message.contains("PodCIDR 10-244-1-0-24"), "{message}");
            node.settled();
            let conflist = node.file("net.d/05-plat.conflist");
            assert!(!conflist.exists() && node.file("plat/blocks.json").exists());
            node.expect_condition("RoutesReady", "True", "AllInstalled");
            node.apply(converged(block(2)));
            node.settled();
            assert!(!conflist.exists(), "another's block is not its own");
            node.apply(converged(block(1)));
            node.expect_condition("CNIReady", "True", "Installed");
            assert!(conflist.exists());
            // Another life, while its block spreads anew.
            node.stop();
            node.start();
            node.contact();
            node.list(vec![block(1), block(2)], vec![range("default-v4")]);
            node.expect_condition("CNIReady", "True", "Installed");
            assert!(conflist.exists());
        },
    );
}

#[test]
fn a_node_whose_peers_stay_silent_becomes_ready_at_the_deadline_and_says_so() {
    isolated("readiness::a_node_whose_peers_stay_silent_becomes_ready_at_the_deadline_and_says_so", || {
        let node = waiting(1);
        node.expect_condition("CNIReady", "True", "Installed");
        let message = node.expect_incident("ReadyBeforeConverged", 1);
        assert!(message.contains("PodCIDR 10-244-1-0-24 yet: 1 s are over"), "{message}");
        assert!(node.file("net.d/05-plat.conflist").exists());
    });
}
