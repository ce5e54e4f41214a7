//! Fail static, with routes to lose.

use std::time::Duration;

use plat_agent::facts::BlockFact;
use plat_agent::objects::Ask;
use plat_crds::pod_cidr::BlockState;

use crate::harness::*;

fn three_nodes(hold: Duration) -> (TestNode, Vec<String>) {
    let mut node = TestNode::new();
    node.settings.hold = hold;
    node.start();
    node.contact();
    node.list(vec![block(1), block(2), block(3)], vec![range("default-v4")]);
    node.expect_condition("CNIReady", "True", "Installed");
    (node, our_routes())
}

#[test]
fn an_empty_list_removes_nothing_and_asks_for_another() {
    isolated("held::an_empty_list_removes_nothing_and_asks_for_another", || {
        let (mut node, before) = three_nodes(Duration::from_secs(300));
        assert_eq!(before.len(), 5);
        node.list(vec![], vec![]);
        let message = node.expect_condition("WithdrawalsHeld", "True", "Unconfirmed");
        assert!(message.starts_with("4 objects"), "{message}");
        assert_eq!(node.report().held, 4);
        assert_eq!(our_routes(), before);
        eventually("the question", || {
            if node.asked().contains(&Ask::Relist) { Ok(()) } else { Err("not asked".into()) }
        });
        node.list(vec![], vec![]);
        node.settled();
        assert_eq!(our_routes(), before, "a second list alone is not enough");
        node.list(vec![block(1), block(2), block(3)], vec![range("default-v4")]);
        node.expect_condition("WithdrawalsHeld", "False", "NothingHeld");
        assert_eq!(our_routes(), before);
    });
}

#[test]
fn a_confirmed_absence_goes_after_the_hold_time() {
    isolated("held::a_confirmed_absence_goes_after_the_hold_time", || {
        let (mut node, before) = three_nodes(Duration::from_secs(2));
        node.list(vec![block(1)], vec![range("default-v4")]);
        node.expect_condition("WithdrawalsHeld", "True", "Unconfirmed");
        assert_eq!(our_routes(), before);
        node.list(vec![block(1)], vec![range("default-v4")]);
        expect_routes(&[
            "unreachable 10.244.0.0/16 metric 65535",
            "10.244.1.0/24 dev cni0 metric 1120",
            "unreachable 10.244.1.0/24 metric 65535",
        ]);
        node.expect_condition("WithdrawalsHeld", "False", "NothingHeld");
    });
}

#[test]
fn of_nodes_that_left_while_the_agent_was_away_nothing_is_left_after_its_start() {
    isolated("held::of_nodes_that_left_while_the_agent_was_away_nothing_is_left_after_its_start", || {
        let mut node = TestNode::new();
        node.settings.hold = Duration::from_secs(1);
        node.start();
        node.contact();
        let ranges = || vec![range("default-v4"), range("default-v6")];
        let in_table = with_routing(block(2), r#"{"table":1000}"#);
        node.list(vec![block(1), in_table.clone(), block(3), block_v6(1), block_v6(3)], ranges());
        node.expect_condition("CNIReady", "True", "Installed");
        let rules = || run("ip rule show").contains("lookup 1000");
        eventually("the rule", || if rules() { Ok(()) } else { Err("missing".into()) });
        let kept =
            |route: &String| !["10.244.2.", "10.244.3.", "fd00:10:244:3:"].iter().any(|b| route.contains(b));
        let before = our_routes();
        assert_eq!(before.iter().filter(|route| !kept(route)).count(), 3, "{before:#?}");
        node.stop();

        node.start();
        node.contact();
        // Of one that left the block is still there, released; of the others nothing is.
        let left = BlockFact { state: BlockState::Quarantined, ..in_table };
        for _ in 0..2 {
            node.list(vec![block(1), left.clone(), block_v6(1)], ranges());
            node.settled();
        }
        let after: Vec<&str> = before.iter().filter(|route| kept(route)).map(String::as_str).collect();
        expect_routes(&after);
        eventually("no rule", || if rules() { Err("still there".into()) } else { Ok(()) });
        let incidents = node.report().status.incidents;
        assert!(incidents.iter().all(|incident| incident.reason != "RouteRestored"), "{incidents:?}");
    });
}

#[test]
fn deletions_one_by_one_as_of_a_deleted_crd_remove_nothing() {
    isolated("held::deletions_one_by_one_as_of_a_deleted_crd_remove_nothing", || {
        let (mut node, before) = three_nodes(Duration::from_secs(300));
        for n in [3, 2, 1] {
            node.delete(&block(n));
        }
        node.expect_condition("WithdrawalsHeld", "True", "Unconfirmed");
        assert_eq!(our_routes(), before);
    });
}

#[test]
fn additions_go_on_while_withdrawals_are_held() {
    isolated("held::additions_go_on_while_withdrawals_are_held", || {
        let (mut node, before) = three_nodes(Duration::from_secs(300));
        node.list(vec![block(7)], vec![]);
        let all: Vec<&str> = before.iter().map(String::as_str).collect();
        expect_routes(
            &[all.as_slice(), &["10.244.7.0/24 gateway 172.30.0.17 dev eth0 metric 1120"]].concat(),
        );
    });
}

#[test]
fn an_agent_that_starts_to_an_empty_list_believes_its_cache() {
    isolated("held::an_agent_that_starts_to_an_empty_list_believes_its_cache", || {
        let (mut node, before) = three_nodes(Duration::from_secs(300));
        node.stop();
        run("ip route flush proto 112");
        node.start();
        node.contact();
        node.list(vec![], vec![]);
        node.expect_condition("WithdrawalsHeld", "True", "Unconfirmed");
        expect_routes(&before.iter().map(String::as_str).collect::<Vec<_>>());
    });
}
