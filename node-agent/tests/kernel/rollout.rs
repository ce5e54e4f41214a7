//! A change of a RoutingPolicy in the kernel: planned, tried, kept, and taken back by the node itself.

use plat_agent::facts::PolicyFact;
use plat_agent::objects::Change;
use plat_crds::node_network::PolicyState;
use plat_crds::routing_policy::{LastGood, Phase};

use crate::harness::{TestNode, block, eventually, expect_routes, isolated, our_routes, range};

const OWN: [&str; 3] = [
    "10.244.1.0/24 dev cni0 metric 1120",
    "unreachable 10.244.0.0/16 metric 65535",
    "unreachable 10.244.1.0/24 metric 65535",
];
const DIRECT: &str = "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120";
const ROUTED: &str = "10.244.2.0/24 gateway 172.30.0.99 dev eth0 metric 1120";

/// A policy that all nodes may follow, which watch it for two seconds.
fn policy(generation: i64, phase: Phase, spec: &str) -> PolicyFact {
    PolicyFact {
        name: "p".to_owned(),
        uid: "uid-p".to_owned(),
        generation,
        spec: serde_json::from_str(spec).unwrap(),
        observed: Some(generation),
        phase: Some(phase),
        last_good: Some(LastGood { generation: 1, spec: serde_json::from_str("{}").unwrap() }),
    }
}

const TO_ROUTER: &str = r#"{"routing":{"nextHop":"172.30.0.99"},"rollout":{"canary":{},"observeSeconds":2}}"#;

fn apply(node: &mut TestNode, policy: PolicyFact) {
    node.objects.policies.apply(Change::Applied(Ok(policy)));
    node.push();
}

fn expect(to_n2: &str) {
    let [own, range, closed] = OWN;
    expect_routes(&[own, range, closed, to_n2]);
}

fn wait_state(node: &TestNode, generation: i64, state: PolicyState) -> Option<String> {
    eventually("the report", || {
        let policies = node.report().status.policies;
        match policies.first() {
            Some(said) if (said.generation, said.state) == (generation, state) => Ok(said.message.clone()),
            _ => Err(format!("{policies:?}")),
        }
    })
}

#[test]
fn a_planned_policy_is_shown_and_changes_nothing() {
    isolated("rollout::a_planned_policy_is_shown_and_changes_nothing", || {
        let mut node = TestNode::with(vec![block(1), block(2), block(3)], vec![range("default-v4")]);
        expect_routes(
            &[&OWN[..], &[DIRECT, "10.244.3.0/24 gateway 172.30.0.13 dev eth0 metric 1120"]].concat(),
        );
        let before = our_routes();
        let plan = r#"{"mode":"Plan","routing":{"nextHop":"172.30.0.99"}}"#;
        apply(&mut node, policy(2, Phase::Planned, plan));
        wait_state(&node, 2, PolicyState::Planned);
        assert_eq!(
            node.report().status.plan,
            [
                "~ 10.244.2.0/24 via 172.30.0.12 metric 1120 -> 10.244.2.0/24 via 172.30.0.99 metric 1120",
                "~ 10.244.3.0/24 via 172.30.0.13 metric 1120 -> 10.244.3.0/24 via 172.30.0.99 metric 1120",
            ]
        );
        assert_eq!(our_routes(), before);
        apply(&mut node, policy(3, Phase::Planned, r#"{"mode":"Plan","routing":{"nextHop":"192.0.2.1"}}"#));
        wait_state(&node, 3, PolicyState::Planned);
        let lines = node.report().status.plan;
        assert!(
            lines.len() == 2 && lines.iter().all(|l| l.starts_with("! ") && l.contains("192.0.2.1")),
            "{lines:?}"
        );
        node.objects.policies.apply(Change::Deleted("p".to_owned()));
        node.push();
        eventually("no plan is left", || {
            let status = node.report().status;
            if status.plan.is_empty() && status.policies.is_empty() {
                Ok(())
            } else {
                Err(format!("{status:?}"))
            }
        });
        assert_eq!(our_routes(), before);
    });
}

#[test]
fn a_node_that_a_change_cuts_off_goes_back_by_itself_also_if_its_agent_restarts() {
    isolated("rollout::a_node_that_a_change_cuts_off_goes_back_by_itself_also_if_its_agent_restarts", || {
        let mut node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
        expect(DIRECT);
        // It reaches the API server after the change: it is kept.
        apply(&mut node, policy(2, Phase::Canary, TO_ROUTER));
        wait_state(&node, 2, PolicyState::Trying);
        expect(ROUTED);
        node.contact();
        wait_state(&node, 2, PolicyState::Applied);
        expect(ROUTED);
        apply(&mut node, policy(3, Phase::RolledBack, TO_ROUTER));
        wait_state(&node, 1, PolicyState::Applied);
        expect(DIRECT);

        // It does not, and nobody can tell it: it is taken back, also by another life of the agent.
        apply(&mut node, policy(4, Phase::Rolling, TO_ROUTER));
        wait_state(&node, 4, PolicyState::Trying);
        expect(ROUTED);
        node.stop();
        node.objects.contact = None;
        node.start();
        node.push();
        let why = wait_state(&node, 4, PolicyState::RolledBack);
        assert_eq!(why.as_deref(), Some("the API server was not reached since then"));
        expect(DIRECT);
        node.stop();
        node.start();
        node.push();
        node.contact();
        wait_state(&node, 4, PolicyState::RolledBack);
        expect(DIRECT);
        apply(&mut node, policy(5, Phase::Rolling, TO_ROUTER));
        wait_state(&node, 5, PolicyState::Trying);
        expect(ROUTED);
    });
}
