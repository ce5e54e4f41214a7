//! RoutingPolicies: how far the newest generation of each has come, by what the nodes report. Pure.
//!
//! ```text
//! (none) ──labels are on the PodCIDRs──▶ Canary ──all canaries keep it──▶ Rolling ──all nodes keep it──▶ Complete
//!    └───────────without a rollout────────────────────────────────────────▲ │
//!                                   Canary, Rolling ──a node went back──▶ RolledBack
//! ```
//! `Plan` ends in `Planned`. A new generation begins anew; `Complete` and `RolledBack` last as long as theirs. Nodes
//! watch their probes for `observeSeconds` and report `Applied` only then, so no clock is needed here: a leader that
//! comes after this one decides the same from the same reports.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use plat_crds::condition::{self, APPLIED, READY, Verdict};
use plat_crds::digest::Digest;
use plat_crds::node_network::PolicyState;
use plat_crds::routing_policy::{LastGood, Phase, PolicyMode, PolicyNodes, RoutingPolicyStatus};
use plat_crds::selector::Labels;

use crate::facts::{BlockFact, Health, Name, PolicyFact};
use crate::plan::Plan;
use crate::plan::holding::BlocksOf;
use crate::snapshot::Snapshot;
use crate::status::signed;

/// `Ready=False`, and a warning Event: a field of the spec cannot be used; nodes stay on the last good version.
pub const INVALID_SPEC: &str = "InvalidSpec";
/// `Ready=False`: the labels that it names are not on all PodCIDRs yet.
pub const COPYING_LABELS: &str = "CopyingLabels";
/// `Ready=True`: it can be followed.
pub const VALID: &str = "Valid";
/// `Ready=True`, but no node or no block has such labels.
pub const SELECTS_NOTHING: &str = "SelectsNothing";
/// `Applied=False`: it waits for `Ready`.
pub const WAITING: &str = "Waiting";
/// `Applied=False`, and an Event: nodes say what it would change.
pub const PLANNED: &str = "Planned";
/// `Applied=False`, and an Event: the canary nodes try it.
pub const CANARY: &str = "Canary";
/// `Applied=False`: no live node has the canary's labels.
pub const NO_CANARY: &str = "NoCanaryNode";
/// `Applied=False`, and an Event: all nodes may follow it, and not all have reported that they keep it.
pub const ROLLING: &str = "Rolling";
/// `Applied=True`, and an Event: every live node that it selects follows it.
pub const COMPLETE: &str = "Complete";
/// `Applied=False`: a node cannot follow it.
pub const FAILED_ON_NODE: &str = "FailedOnNode";
/// `Applied=False`, and a warning Event: a node's probes got worse, and all are back on the last good version.
pub const ROLLED_BACK: &str = "RolledBack";
/// `Applied=False`: all others had followed it when a node reported that it went back; that one stays back.
pub const BACK_ON_NODE: &str = "RolledBackOnNode";

/// Nodes that must all keep a generation before it goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// How many there are.
    pub nodes: usize,
    /// Of those, how many keep it.
    pub applied: usize,
    /// One that does not, yet.
    pub missing: Option<Name>,
}

impl Group {
    fn count(&mut self, node: &Name, keeps: bool) {
        self.nodes += 1;
        self.applied += usize::from(keeps);
        if !keeps && self.missing.is_none() {
            self.missing = Some(node.clone());
        }
    }

    /// Whether there is somebody to ask, and nobody says no: a policy that nobody tried is not proven.
    fn is_done(&self) -> bool {
        self.nodes > 0 && self.applied == self.nodes
    }

    fn in_words(&self) -> String {
        let missing = self.missing.as_ref().map(|node| format!(", {node} not yet")).unwrap_or_default();
        format!("{} of {} nodes keep it{missing}", self.applied, self.nodes)
    }
}

/// What the nodes say of the newest generation of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Nodes that `sources` selects, dead or alive.
    pub selected: usize,
    /// Of those, how many keep it.
    pub applied: usize,
    /// How many cannot follow it.
    pub failed: usize,
    /// How many have planned it.
    pub planned: usize,
    /// How many went back.
    pub rolled_back: usize,
    /// Those of them that count: the live ones, and those that were lost while they tried it.
    pub all: Group,
    /// Of those, the canary nodes.
    pub canaries: Group,
    /// One that cannot follow it, and why.
    pub failing: Option<(Name, String)>,
    /// One that went back, and why.
    pub back: Option<(Name, String)>,
    /// Blocks that it is about.
    pub blocks: usize,
}

/// Counts what the nodes say.
pub fn tally(policy: &PolicyFact, blocks_of: &BlocksOf, snapshot: &Snapshot) -> Tally {
    let mut tally = Tally::default();
    let generation = Digest::of([(&*policy.uid, policy.generation)]);
    for (node, blocks) in blocks_of {
        let stands = || blocks.iter().filter(|block| !block.is_quarantined());
        tally.blocks += stands().filter(|block| policy.destinations.matches(&block.labels)).count();
        let Some(labels) = labels_of(stands()).filter(|labels| policy.sources.matches(*labels)) else {
            continue;
        };
        let Some((name, fact)) = snapshot.nodes.get_key_value(*node) else { continue };
        let reports = snapshot.reports.get(name).map(|report| &report.policies[..]).unwrap_or_default();
        let said = reports.iter().find(|said| said.generation == generation);
        tally.count(
            name,
            said.map(|said| (said.state, said.message.as_deref())),
            policy,
            labels,
            fact.health,
        );
    }
    tally
}

impl Tally {
    fn count(
        &mut self,
        node: &Name,
        said: Option<(PolicyState, Option<&str>)>,
        policy: &PolicyFact,
        labels: &Labels,
        health: Health,
    ) {
        let state = said.map(|(state, _)| state);
        let why = || {
            (node.clone(), said.and_then(|(_, message)| message).unwrap_or("it does not say why").to_owned())
        };
        self.selected += 1;
        match state {
            Some(PolicyState::Applied) => self.applied += 1,
            Some(PolicyState::Planned) => self.planned += 1,
            Some(PolicyState::Failed) => {
                self.failed += 1;
                self.failing.get_or_insert_with(why);
            }
            Some(PolicyState::RolledBack) => {
                self.rolled_back += 1;
                self.back.get_or_insert_with(why);
            }
            Some(PolicyState::Trying | PolicyState::Unknown) | None => {}
        }
        // One that is lost while it tries may be lost because it does.
        if health == Health::Ready || state == Some(PolicyState::Trying) {
            let keeps = state == Some(PolicyState::Applied);
            self.all.count(node, keeps);
            if policy.canary.as_ref().is_some_and(|canary| canary.matches(labels)) {
                self.canaries.count(node, keeps);
            }
        }
    }
}

/// A node has the labels of its first block: the same as its agent takes.
fn labels_of<'a>(blocks: impl Iterator<Item = &'a &'a BlockFact>) -> Option<&'a Labels> {
    blocks.min_by_key(|block| &block.name).map(|block| &block.labels)
}

/// The phase of the newest generation; `None` while nodes may not follow it yet.
pub fn phase(policy: &PolicyFact, tally: &Tally, unlabelled: usize) -> Option<Phase> {
    if policy.spec.mode != PolicyMode::Apply {
        return Some(Phase::Planned);
    }
    match policy.phase() {
        Some(Phase::Complete) => Some(Phase::Complete),
        Some(Phase::RolledBack) => Some(Phase::RolledBack),
        _ if tally.rolled_back > 0 => Some(Phase::RolledBack),
        Some(Phase::Canary) if tally.canaries.is_done() => Some(Phase::Rolling),
        Some(Phase::Canary) => Some(Phase::Canary),
        Some(Phase::Rolling) if tally.all.is_done() => Some(Phase::Complete),
        Some(Phase::Rolling) => Some(Phase::Rolling),
        Some(Phase::Planned | Phase::Unknown) | None if policy.invalid.is_some() || unlabelled > 0 => None,
        Some(Phase::Planned | Phase::Unknown) | None => {
            Some(if policy.canary.is_some() { Phase::Canary } else { Phase::Rolling })
        }
    }
}

/// How many PodCIDRs lack a label that the policy names.
fn unlabelled(policy: &PolicyFact, plan: &Plan) -> usize {
    policy.keys().filter_map(|key| plan.uncopied.get(key).copied()).max().unwrap_or(0)
}

/// The status of a policy.
pub fn status(
    policy: &PolicyFact,
    blocks_of: &BlocksOf,
    plan: &Plan,
    snapshot: &Snapshot,
) -> RoutingPolicyStatus {
    let (tally, unlabelled) = (tally(policy, blocks_of, snapshot), unlabelled(policy, plan));
    let (generation, now) = (policy.generation, Time(snapshot.clock.wall));
    let phase = phase(policy, &tally, unlabelled);
    let mut status = RoutingPolicyStatus {
        observed_generation: Some(generation),
        phase,
        nodes: Some(PolicyNodes {
            selected: signed(tally.selected),
            applied: signed(tally.applied),
            failed: signed(tally.failed),
            planned: signed(tally.planned),
            rolled_back: signed(tally.rolled_back),
        }),
        blocks: Some(signed(tally.blocks)),
        ..policy.status.clone()
    };
    if phase == Some(Phase::Complete) && policy.phase() != phase {
        status.last_good = Some(LastGood { generation, spec: (*policy.spec).clone() });
    }
    for verdict in
        [Some(ready(policy, &tally, unlabelled)), applied(phase, policy, &tally)].into_iter().flatten()
    {
        condition::set(&mut status.conditions, &verdict, Some(generation), &now);
    }
    status
}

fn ready(policy: &PolicyFact, tally: &Tally, unlabelled: usize) -> Verdict {
    if let Some(why) = &policy.invalid {
        let message = format!("{why}; nodes go on with {}", last_good(policy));
        return Verdict::new(READY, Some(false), INVALID_SPEC, message);
    }
    if unlabelled > 0 {
        let message = format!(
            "labels that it names are being copied from the Nodes to {unlabelled} PodCIDRs; nodes go on with {} until then",
            last_good(policy)
        );
        return Verdict::new(READY, Some(false), COPYING_LABELS, message);
    }
    let message = format!("it selects {} nodes and {} blocks", tally.selected, tally.blocks);
    let nothing = tally.selected == 0 || tally.blocks == 0;
    Verdict::new(READY, Some(true), if nothing { SELECTS_NOTHING } else { VALID }, message)
}

/// `None` keeps what was said: the words of a node that went back outlive its report.
fn applied(phase: Option<Phase>, policy: &PolicyFact, tally: &Tally) -> Option<Verdict> {
    let verdict = |holds, reason, message: String| Some(Verdict::new(APPLIED, Some(holds), reason, message));
    let failing = tally.failing.as_ref();
    let cannot = |(node, why): &(Name, String)| {
        verdict(false, FAILED_ON_NODE, format!("{} nodes cannot follow it; {node}: {why}", tally.failed))
    };
    let Some(phase) = phase else { return verdict(false, WAITING, String::new()) };
    match (phase, failing) {
        (Phase::Planned, _) => verdict(
            false,
            PLANNED,
            format!(
                "planned on {} of {} nodes, where status.plan of their NodeNetworks says what it would change; set spec.mode to Apply to follow it",
                tally.planned, tally.selected
            ),
        ),
        (Phase::RolledBack, _) => tally.back.as_ref().and_then(|(node, why)| {
            let good = last_good(policy);
            verdict(
                false,
                ROLLED_BACK,
                format!("node {node} went back: {why}; all nodes are on {good} until the spec changes"),
            )
        }),
        (Phase::Canary | Phase::Rolling, Some(failing)) => cannot(failing),
        (Phase::Canary, None) if tally.canaries.nodes == 0 => verdict(
            false,
            NO_CANARY,
            "no live node that sources selects has the labels of rollout.canary; change one of them"
                .to_owned(),
        ),
        (Phase::Canary, None) => {
            verdict(false, CANARY, format!("canary nodes try it: {}", tally.canaries.in_words()))
        }
        (Phase::Rolling, None) => verdict(false, ROLLING, tally.all.in_words()),
        (Phase::Complete, failing) => match (&tally.back, failing) {
            (Some((node, why)), _) => {
                verdict(false, BACK_ON_NODE, format!("node {node} stays on what it had: {why}"))
            }
            (None, Some(failing)) => cannot(failing),
            (None, None) => verdict(true, COMPLETE, String::new()),
        },
        (Phase::Unknown, _) => None,
    }
}

/// What nodes stay on, in words.
fn last_good(policy: &PolicyFact) -> String {
    match &policy.status.last_good {
        Some(good) => format!("generation {}", good.generation),
        None => "what they have without it".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{NodeFact, ReportFact, Said};
    use crate::fixtures::{Scene, held_block, labels, node, policy, range, report, scene};
    use crate::plan::holding;
    use proptest::prelude::*;

    /// Nodes n0, n1, … of which the first is in zone a and the others in zone b, with a block each.
    fn cluster(nodes: usize) -> Scene {
        (0..nodes).fold(scene().range(range("r", "10.244.0.0/16")), |scene, n| {
            let (name, zone) = (format!("n{n}"), if n == 0 { "a" } else { "b" });
            let mut block = held_block(&format!("10.244.{n}.0/24"), "r", &name);
            let ours = block.labels.iter().chain([("zone", zone)]).collect::<Vec<_>>();
            block.labels = labels(&ours);
            scene.node(NodeFact { labels: labels(&[("zone", zone)]), ..node(&name) }).block(block)
        })
    }

    fn says(scene: Scene, n: usize, policy: &PolicyFact, state: PolicyState, message: Option<&str>) -> Scene {
        let generation = Digest::of([(&*policy.uid, policy.generation)]);
        let said = Said { generation, state, message: message.map(Into::into) };
        let name = format!("n{n}");
        scene.report(ReportFact { policies: [said].into(), ..report(&name, &[]) })
    }

    fn judge(scene: &Scene, policy: &PolicyFact) -> RoutingPolicyStatus {
        let snapshot = scene.snapshot();
        status(policy, &holding::by_node(&snapshot), &scene.plan(), &snapshot)
    }

    fn said(status: &RoutingPolicyStatus, type_: &str) -> (String, String) {
        condition::find(&status.conditions, type_).map(|c| (c.reason.clone(), c.message.clone())).unwrap()
    }

    const CANARY_IN_A: &str =
        r#"{"routing": {"metric": 7}, "rollout": {"canary": {"matchLabels": {"zone": "a"}}}}"#;

    /// The policy at the next generation, with the status that was written.
    fn next(policy: &PolicyFact, status: RoutingPolicyStatus, by: i64) -> PolicyFact {
        PolicyFact { generation: policy.generation + by, status, ..policy.clone() }
    }

    #[test]
    fn a_change_goes_from_canaries_to_all_as_they_say_that_they_keep_it() {
        let mut fact = policy("p", CANARY_IN_A);
        let scene = cluster(3).with(|s| s.put_policy(&fact));
        let mut go = |scene: &Scene| {
            let status = judge(scene, &fact);
            fact = next(&fact, status.clone(), 0);
            (status.phase, said(&status, APPLIED))
        };
        let (phase, (reason, message)) = go(&scene);
        assert_eq!((phase, reason.as_str()), (Some(Phase::Canary), CANARY));
        assert_eq!(message, "canary nodes try it: 0 of 1 nodes keep it, n0 not yet");
        let p = policy("p", CANARY_IN_A);
        let scene = says(scene, 0, &p, PolicyState::Trying, None);
        assert_eq!(go(&scene).0, Some(Phase::Canary), "it is still watched");
        let scene = says(scene, 0, &p, PolicyState::Failed, Some("metric is another's"));
        let (phase, (reason, message)) = go(&scene);
        assert_eq!((phase, reason.as_str()), (Some(Phase::Canary), FAILED_ON_NODE));
        assert!(message.contains("n0: metric is another's"), "{message}");
        let scene = says(scene, 0, &p, PolicyState::Applied, None);
        assert_eq!(go(&scene).0, Some(Phase::Rolling));
        let scene = says(scene, 1, &p, PolicyState::Applied, None);
        let (phase, (_, message)) = go(&scene);
        assert_eq!((phase, message.as_str()), (Some(Phase::Rolling), "2 of 3 nodes keep it, n2 not yet"));
        let scene = says(scene, 2, &p, PolicyState::Applied, None);
        assert_eq!(go(&scene).0, Some(Phase::Complete));
        let status = judge(&scene, &fact);
        assert_eq!(status.last_good.as_ref().map(|good| good.generation), Some(1));
        assert_eq!(status.nodes.unwrap().applied, 3);
        assert_eq!(judge(&scene, &next(&fact, status, 0)), fact.status, "nothing more to write");
    }

    #[test]
    fn one_node_that_goes_back_takes_all_back_and_its_words_stay() {
        let good = LastGood { generation: 1, spec: Default::default() };
        for before in [Phase::Canary, Phase::Rolling] {
            let status = RoutingPolicyStatus {
                observed_generation: Some(2),
                phase: Some(before),
                last_good: Some(good.clone()),
                ..RoutingPolicyStatus::default()
            };
            let fact = PolicyFact { generation: 2, status, ..policy("p", CANARY_IN_A) };
            let calm = cluster(3).with(|s| s.put_policy(&fact));
            let back = says(calm.clone(), 1, &fact, PolicyState::RolledBack, Some("2 blocks are lost"));
            let back = back.with(|s| s.lose_node("n1"));
            let status = judge(&back, &fact);
            assert_eq!((status.phase, status.last_good.as_ref()), (Some(Phase::RolledBack), Some(&good)));
            let words = said(&status, APPLIED);
            assert_eq!(
                words.1,
                "node n1 went back: 2 blocks are lost; all nodes are on generation 1 until the spec changes"
            );
            let fact = next(&fact, status, 0);
            let later = judge(&calm, &fact);
            assert_eq!((later.phase, said(&later, APPLIED)), (Some(Phase::RolledBack), words));
            assert_eq!(judge(&calm, &next(&fact, later, 1)).phase, Some(Phase::Canary), "another spec");
        }
    }

    #[test]
    fn nothing_begins_before_the_labels_are_there_or_with_a_selector_that_cannot_be_read() {
        let fact = policy(
            "p",
            r#"{"sources": {"matchExpressions": [{"key": "rack", "operator": "NotIn", "values": ["1"]}]}}"#,
        );
        let racked = NodeFact { labels: labels(&[("zone", "b"), ("rack", "1")]), ..node("n1") };
        let scene = cluster(3).with(|s| s.put_policy(&fact)).node(racked);
        let status = judge(&scene, &fact);
        assert_eq!((status.phase, said(&status, READY).0.as_str()), (None, COPYING_LABELS));
        assert_eq!(said(&status, APPLIED).0, WAITING);
        let plan = scene.plan();
        let status = judge(&scene.after(&plan), &fact);
        assert_eq!((status.phase, said(&status, READY).0.as_str()), (Some(Phase::Rolling), VALID));
        assert_eq!(said(&status, READY).1, "it selects 2 nodes and 3 blocks");

        let bad =
            policy("p", r#"{"destinations": {"matchExpressions": [{"key": "a", "operator": "Like"}]}}"#);
        let status = judge(&cluster(1).with(|s| s.put_policy(&bad)), &bad);
        assert_eq!((status.phase, said(&status, READY).0.as_str()), (None, INVALID_SPEC));
        assert!(
            said(&status, READY).1.starts_with("spec.destinations: the selector has the operator 'Like'")
        );
        let bad = policy("p", r#"{"routing": {"nextHop": "router"}}"#);
        let status = judge(&cluster(1).with(|s| s.put_policy(&bad)), &bad);
        assert!(said(&status, READY).1.contains("spec.routing.nextHop"), "{status:?}");
    }

    #[test]
    fn nobody_is_no_proof_and_neither_is_a_node_that_was_lost_while_it_tried() {
        let fact = policy("p", r#"{"sources": {"matchLabels": {"zone": "c"}}}"#);
        let rolling = |fact: &PolicyFact| {
            let status = RoutingPolicyStatus {
                observed_generation: Some(1),
                phase: Some(Phase::Rolling),
                ..RoutingPolicyStatus::default()
            };
            next(fact, status, 0)
        };
        let status = judge(&cluster(2).with(|s| s.put_policy(&fact)), &rolling(&fact));
        assert_eq!((status.phase, said(&status, READY).0.as_str()), (Some(Phase::Rolling), SELECTS_NOTHING));

        let fact = policy("p", "{}");
        let scene = says(cluster(2), 0, &fact, PolicyState::Applied, None).with(|s| s.lose_node("n1"));
        assert_eq!(
            judge(&scene, &rolling(&fact)).phase,
            Some(Phase::Complete),
            "a dead node holds nobody up"
        );
        let scene = says(scene, 1, &fact, PolicyState::Trying, None);
        assert_eq!(judge(&scene, &rolling(&fact)).phase, Some(Phase::Rolling));
        let no_canary = policy("p", r#"{"rollout": {"canary": {"matchLabels": {"zone": "c"}}}}"#);
        let scene = cluster(2).with(|s| s.put_policy(&no_canary));
        let status = judge(&scene, &next(&no_canary, judge(&scene, &no_canary), 0));
        assert_eq!((status.phase, said(&status, APPLIED).0.as_str()), (Some(Phase::Canary), NO_CANARY));
    }

    #[test]
    fn reports_of_another_generation_or_another_policy_of_that_name_do_not_count() {
        let fact = policy("p", "{}");
        for other in [
            PolicyFact { generation: 2, ..fact.clone() },
            PolicyFact { uid: "another".into(), ..fact.clone() },
        ] {
            let scene = says(cluster(1), 0, &fact, PolicyState::RolledBack, Some("then"));
            assert_eq!(judge(&scene, &other).phase, Some(Phase::Rolling));
        }
    }

    #[test]
    fn a_plan_is_planned_and_keeps_what_was_good() {
        let good = Some(LastGood { generation: 1, spec: Default::default() });
        let status = RoutingPolicyStatus { last_good: good.clone(), ..RoutingPolicyStatus::default() };
        let fact = PolicyFact { status, ..policy("p", r#"{"mode": "Plan"}"#) };
        let status = judge(&says(cluster(2), 0, &fact, PolicyState::Planned, None), &fact);
        assert_eq!((status.phase, &status.last_good), (Some(Phase::Planned), &good));
        assert!(said(&status, APPLIED).1.starts_with("planned on 1 of 2 nodes"));
    }

    /// Users look up what they see: docs/routing-policy.md.
    #[test]
    fn every_reason_is_explained_to_users() {
        let page = include_str!("../../docs/routing-policy.md");
        let lines = include_str!("rollout.rs").lines().filter(|line| line.starts_with("pub const "));
        let reasons: Vec<&str> = lines.filter_map(|line| line.split('"').nth(1)).collect();
        let missing: Vec<_> =
            reasons.iter().filter(|reason| !page.contains(&format!("`{reason}`"))).collect();
        assert!(reasons.len() > 10 && missing.is_empty(), "{missing:?}");
    }

    fn any_state() -> impl Strategy<Value = PolicyState> {
        use PolicyState::{Applied, Failed, Planned, RolledBack, Trying, Unknown};
        proptest::sample::select(vec![
            Trying, Applied, Applied, Applied, Failed, Planned, RolledBack, Unknown,
        ])
    }

    #[derive(Clone, Copy, Debug)]
    enum Move {
        Says(usize, PolicyState),
        Lose(usize),
        Edit,
    }

    fn any_move() -> impl Strategy<Value = Move> {
        prop_oneof![
            8 => (0..3usize, any_state()).prop_map(|(n, state)| Move::Says(n, state)),
            1 => (0..3usize).prop_map(Move::Lose),
            1 => Just(Move::Edit),
        ]
    }

    proptest! {
        #[test]
        fn whatever_nodes_say_no_step_is_left_out_and_none_is_taken_back(
            moves in proptest::collection::vec(any_move(), 1..40), careful: bool,
        ) {
            let mut fact = policy("p", if careful { CANARY_IN_A } else { "{}" });
            let mut scene = cluster(3).with(|s| s.put_policy(&fact));
            for step in moves {
                match step {
                    Move::Says(n, state) => scene = says(scene, n, &fact, state, None),
                    Move::Lose(n) => scene = scene.with(|s| s.lose_node(&format!("n{n}"))),
                    Move::Edit => fact.generation += 1,
                }
                let (before, good) = (fact.phase(), fact.status.last_good.clone());
                let status = judge(&scene, &fact);
                let may = match before {
                    None if careful => [Phase::Canary, Phase::RolledBack],
                    None => [Phase::Rolling, Phase::RolledBack],
                    Some(Phase::Canary) => [Phase::Rolling, Phase::RolledBack],
                    Some(Phase::Rolling) => [Phase::Complete, Phase::RolledBack],
                    Some(other) => [other, other],
                };
                let now = status.phase.unwrap();
                prop_assert!(Some(now) == before || may.contains(&now), "{before:?} -> {now:?}");
                let completes = now == Phase::Complete && before != Some(Phase::Complete);
                let generation = fact.generation;
                prop_assert_eq!(
                    &status.last_good,
                    &if completes { Some(LastGood { generation, spec: (*fact.spec).clone() }) } else { good }
                );
                fact.status = status;
            }
        }
    }
}
