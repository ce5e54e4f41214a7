//! What users are told, as values: which step or fault becomes which Event. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use plat_crds::RoutingPolicyStatus;
use plat_crds::condition::{self, APPLIED, EXHAUSTED, NODE_SPEC_CONFLICT, OVERLAPPING, READY};
use plat_crds::node_network::Incident;
use plat_crds::routing_policy::Phase;

use crate::apply::{Done, Learnt, Outcome};
use crate::carriers::Silent;
use crate::facts::Name;
use crate::reason;
use crate::rollout;
use crate::sizing::Basis;
use crate::step::{Fault, Kind, NewBlock, ObjectKey, Origin, Step, Why, blocks_in_words};

/// An Event to be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// What it is about.
    pub object: ObjectKey,
    /// Whether it is a `Warning`.
    pub warning: bool,
    /// CamelCase word, one of [`crate::reason`] or an agent's.
    pub reason: String,
    /// What the operator was doing, in one CamelCase word.
    pub action: &'static str,
    /// The sentence.
    pub text: String,
}

/// The Events of a finished step.
pub fn of_step(done: &Done) -> Vec<Note> {
    match (&done.step, &done.outcome) {
        (Step::CreateRange { name, range, block_prefix, .. }, Outcome::Done) => {
            let Some(Learnt::Range(fact)) = &done.learnt else { return Vec::new() };
            let blocks = blocks_in_words(*block_prefix);
            let text = format!("created for the operator's --cluster-cidr: {range} in {blocks}");
            vec![normal(
                ObjectKey::new(Kind::ClusterCIDR, name, &fact.uid),
                reason::RANGE_CREATED,
                "Create",
                text,
            )]
        }
        (Step::PrepareRange { object, block_size: Some(size), .. }, Outcome::Done)
            if size.basis != Basis::Default =>
        {
            let text = format!("its blocks are /{}: {}", size.prefix, size.basis);
            let range = ObjectKey::new(Kind::ClusterCIDR, &object.name, &object.uid);
            vec![normal(range, reason::BLOCK_SIZE_CHOSEN, "Prepare", text)]
        }
        // A repeated create that turns out to be done was not announced the first time.
        (Step::CreateBlock(new), Outcome::Done | Outcome::AlreadySo) => created(new, done.learnt.as_ref()),
        (Step::ChangeBlock { object, node, node_uid, change, why }, Outcome::Done) => {
            let block = ObjectKey::new(Kind::PodCIDR, &object.name, &object.uid);
            let until = change.release_after.flatten().map(|at| at.to_string()).unwrap_or_default();
            let (reason, text) = match why {
                Why::Refresh => return Vec::new(),
                Why::Readopt => {
                    (reason::BLOCK_READOPTED, format!("node {node} is back and keeps block {}", object.name))
                }
                Why::Asked => (
                    reason::BLOCK_DRAINING,
                    format!(
                        "block {} is asked to drain: node {node} leases new addresses from another",
                        object.name
                    ),
                ),
                Why::Surplus => (
                    reason::BLOCK_DRAINING,
                    format!(
                        "node {node} does not need block {} any more: no new leases from it",
                        object.name
                    ),
                ),
                Why::Resume => (
                    reason::BLOCK_RESUMED,
                    format!("node {node} leases from block {} again: it drains no longer", object.name),
                ),
                Why::InUse => (
                    reason::BLOCK_DRAINING,
                    format!(
                        "node {node} reports leases in block {}, which was in quarantine: it is routed again and drains",
                        object.name
                    ),
                ),
                Why::NodeGone => (
                    reason::BLOCK_QUARANTINED,
                    format!("node {node} is gone: block {} rests until {until}", object.name),
                ),
                Why::Unused => (
                    reason::BLOCK_QUARANTINED,
                    format!(
                        "the last lease of drained block {} has ended: it rests until {until}",
                        object.name
                    ),
                ),
            };
            both(block, node, node_uid, reason, "Hold", text)
        }
        (Step::DeleteBlock { object, node, living, unproven }, Outcome::Done) => {
            let block = ObjectKey::new(Kind::PodCIDR, &object.name, &object.uid);
            let living = living.as_ref().map(|uid| ObjectKey::new(Kind::Node, node, uid));
            let whose = match living {
                Some(_) => format!("block {}, which node {node} has given back,", object.name),
                None => format!("block {} of former node {node}", object.name),
            };
            let told = living.into_iter().chain([block]);
            told.map(|object| released(object, &whose, unproven.as_ref())).collect()
        }
        (Step::RangeStatus { object, old, new }, Outcome::Done) => {
            let range = ObjectKey::new(Kind::ClusterCIDR, &object.name, &object.uid);
            range_flips(&range, &old.conditions, &new.conditions)
        }
        (Step::PolicyStatus { object, old, new }, Outcome::Done) => {
            let policy = ObjectKey::new(Kind::RoutingPolicy, &object.name, &object.uid);
            policy_flips(&policy, old, new)
        }
        (Step::BlockStatus { object, old, new, .. }, Outcome::Done) => {
            let block = ObjectKey::new(Kind::PodCIDR, &object.name, &object.uid);
            let flipped = became_true(&old.conditions, &new.conditions, NODE_SPEC_CONFLICT);
            flipped
                .map(|c| warning(block, reason::NODE_SPEC_CONFLICT, "Observe", c.message.clone()))
                .into_iter()
                .collect()
        }
        _ => Vec::new(),
    }
}

/// The Event of a fault that was not there before.
pub fn of_fault(fault: &Fault) -> Note {
    warning(fault.object.clone(), fault.reason, "Plan", fault.message.clone())
}

/// The Event of something that an agent reports.
pub fn of_incident(node: &Name, node_uid: &Name, incident: &Incident) -> Note {
    let text = match incident.count {
        0 | 1 => incident.message.clone(),
        count => format!("{} ({count} times since the agent started)", incident.message),
    };
    warning(ObjectKey::new(Kind::Node, node, node_uid), &incident.reason, "Report", text)
}

fn created(new: &NewBlock, learnt: Option<&Learnt>) -> Vec<Note> {
    let name: Name = new.block.object_name().into();
    let uid = match learnt {
        Some(Learnt::Block(fact)) => fact.uid.clone(),
        _ => "".into(),
    };
    let (block, node) = (new.block, &new.node);
    let (reason, text) = match new.origin {
        Origin::Carved => {
            (reason::BLOCK_ALLOCATED, format!("node {node} gets block {block} of ClusterCIDR {}", new.range))
        }
        Origin::Adopted => {
            (reason::BLOCK_ADOPTED, format!("node {node} keeps block {block}, which its spec.podCIDRs names"))
        }
        Origin::Recreated => (
            reason::BLOCK_RECREATED,
            format!("node {node} holds block {block}, whose PodCIDR was lost: created again"),
        ),
    };
    both(ObjectKey::new(Kind::PodCIDR, &name, &uid), node, &new.node_uid, reason, "Allocate", text)
}

fn released(object: ObjectKey, whose: &str, unproven: Option<&Silent>) -> Note {
    let text = format!("{whose} is free");
    match unproven {
        None => normal(object, reason::BLOCK_RELEASED, "Release", text),
        Some(silent) => {
            let text = format!(
                "{text}, though {silent} have not reported in time that they withdrew their route to it: see the log of plat-agent there"
            );
            warning(object, reason::BLOCK_RELEASED_UNPROVEN, "Release", text)
        }
    }
}

fn range_flips(range: &ObjectKey, old: &[Condition], new: &[Condition]) -> Vec<Note> {
    let became = |type_| became_true(old, new, type_);
    let mut notes = Vec::new();
    if let Some(c) = became(READY) {
        notes.push(normal(range.clone(), reason::RANGE_READY, "Judge", c.message.clone()));
    }
    if let Some(c) = became(OVERLAPPING) {
        notes.push(warning(range.clone(), reason::RANGE_OVERLAPPING, "Judge", c.message.clone()));
    }
    if let Some(c) = became(EXHAUSTED) {
        notes.push(warning(range.clone(), reason::RANGE_EXHAUSTED, "Judge", c.message.clone()));
    }
    if let Some(c) = condition::find(new, EXHAUSTED).filter(|c| warns_ahead(c)) {
        let is_old = condition::find(old, EXHAUSTED).is_some_and(|c| c.status == "True" || warns_ahead(c));
        if !is_old {
            notes.push(warning(range.clone(), &c.reason, "Judge", c.message.clone()));
        }
    }
    notes
}

/// A phase is told when it begins, and that a spec cannot be followed.
fn policy_flips(policy: &ObjectKey, old: &RoutingPolicyStatus, new: &RoutingPolicyStatus) -> Vec<Note> {
    let mut notes = Vec::new();
    let is_new = |type_, c: &Condition| {
        let was = condition::find(&old.conditions, type_);
        old.observed_generation != new.observed_generation || was.is_none_or(|was| was.reason != c.reason)
    };
    if let Some(c) = condition::find(&new.conditions, READY)
        && c.reason == rollout::INVALID_SPEC
        && is_new(READY, c)
    {
        notes.push(warning(policy.clone(), rollout::INVALID_SPEC, "Judge", c.message.clone()));
    }
    let begins = (old.observed_generation, old.phase) != (new.observed_generation, new.phase);
    if let Some(phase) = new.phase.filter(|_| begins) {
        let said = condition::find(&new.conditions, APPLIED).map(|c| c.message.clone()).unwrap_or_default();
        let generation = new.observed_generation.unwrap_or_default();
        let (reason, text) = match phase {
            Phase::Planned => (rollout::PLANNED, format!("nodes plan generation {generation}: {said}")),
            Phase::Canary => (rollout::CANARY, format!("generation {generation}: {said}")),
            Phase::Rolling => {
                (rollout::ROLLING, format!("all nodes may follow generation {generation}: {said}"))
            }
            Phase::Complete => (
                rollout::COMPLETE,
                format!("every live node that it selects follows generation {generation}"),
            ),
            Phase::RolledBack => {
                let text = format!("generation {generation} is taken back: {said}");
                notes.push(warning(policy.clone(), rollout::ROLLED_BACK, "Roll", text));
                return notes;
            }
            Phase::Unknown => return notes,
        };
        notes.push(normal(policy.clone(), reason, "Roll", text));
    }
    notes
}

fn warns_ahead(exhausted: &Condition) -> bool {
    [reason::RUNS_OUT_SOON, reason::FEW_BLOCKS_LEFT].contains(&exhausted.reason.as_str())
}

fn became_true<'a>(old: &[Condition], new: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    condition::find(new, type_).filter(|c| c.status == "True" && !condition::is_true(old, type_))
}

fn both(
    block: ObjectKey,
    node: &Name,
    node_uid: &Name,
    reason: &str,
    action: &'static str,
    text: String,
) -> Vec<Note> {
    let node = ObjectKey::new(Kind::Node, node, node_uid);
    vec![normal(node, reason, action, text.clone()), normal(block, reason, action, text)]
}

fn normal(object: ObjectKey, reason: &str, action: &'static str, text: String) -> Note {
    Note { object, warning: false, reason: reason.to_owned(), action, text }
}

fn warning(object: ObjectKey, reason: &str, action: &'static str, text: String) -> Note {
    Note { object, warning: true, reason: reason.to_owned(), action, text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{NOW, at, block, held_block};
    use crate::sizing::BlockSize;
    use crate::step::{BlockChange, Version};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use plat_crds::condition::Verdict;
    use plat_crds::pod_cidr::BlockState;
    use plat_crds::{ClusterCIDRStatus, PodCIDRStatus};

    fn version(name: &str) -> Version {
        Version { name: name.into(), uid: "uid".into(), resource_version: "1".into() }
    }

    fn texts(step: Step, outcome: Outcome, learnt: Option<Learnt>) -> Vec<String> {
        let notes = of_step(&Done { step, outcome, learnt, retry_after: None });
        notes
            .iter()
            .map(|n| format!("{} {} {}: {}", n.object.kind.as_str(), n.object.name, n.reason, n.text))
            .collect()
    }

    fn create(origin: Origin) -> Step {
        Step::CreateBlock(NewBlock {
            block: block("10.244.1.0/24"),
            range: "default-v4".into(),
            node: "n1".into(),
            node_uid: "u".into(),
            addresses: vec![],
            labels: vec![],
            origin,
        })
    }

    #[test]
    fn each_change_of_hands_is_told_of_the_node_and_of_the_block() {
        let learnt = || Some(Learnt::Block(Box::new(held_block("10.244.1.0/24", "default-v4", "n1"))));
        assert_eq!(
            texts(create(Origin::Carved), Outcome::Done, learnt()),
            [
                "Node n1 BlockAllocated: node n1 gets block 10.244.1.0/24 of ClusterCIDR default-v4",
                "PodCIDR 10-244-1-0-24 BlockAllocated: node n1 gets block 10.244.1.0/24 of ClusterCIDR default-v4",
            ]
        );
        for (origin, reason) in [(Origin::Adopted, "BlockAdopted"), (Origin::Recreated, "BlockRecreated")] {
            assert!(
                texts(create(origin), Outcome::AlreadySo, learnt()).iter().all(|text| text.contains(reason))
            );
        }
        let change = BlockChange {
            state: Some(BlockState::Quarantined),
            release_after: Some(Some(at(NOW))),
            ..BlockChange::default()
        };
        for (why, reason) in [
            (Why::NodeGone, "BlockQuarantined: node n1 is gone: block b rests until 2027-01-15T08:00:00Z"),
            (Why::Readopt, "BlockReadopted: node n1 is back and keeps block b"),
            (
                Why::Asked,
                "BlockDraining: block b is asked to drain: node n1 leases new addresses from another",
            ),
            (Why::Surplus, "BlockDraining: node n1 does not need block b any more: no new leases from it"),
            (Why::Resume, "BlockResumed: node n1 leases from block b again: it drains no longer"),
        ] {
            let (node, node_uid, change) = ("n1".into(), "u".into(), change.clone());
            let told = texts(
                Step::ChangeBlock { object: version("b"), node, node_uid, change, why },
                Outcome::Done,
                None,
            );
            assert_eq!(told, [format!("Node n1 {reason}"), format!("PodCIDR b {reason}")]);
        }
    }

    #[test]
    fn a_block_size_is_told_with_what_it_was_chosen_for() {
        let prepared = |basis| Step::PrepareRange {
            object: version("r"),
            finalizers: vec![],
            block_size: Some(BlockSize { prefix: 23, basis }),
        };
        let basis = Basis::Nodes { count: 3, pods: 250 };
        assert_eq!(
            texts(prepared(basis.clone()), Outcome::Done, None),
            [
                "ClusterCIDR r BlockSizeChosen: its blocks are /23: the largest of the 3 nodes that it selects holds up to 250 pods"
            ]
        );
        assert_eq!(texts(prepared(basis), Outcome::Stale("?".into()), None), [] as [&str; 0]);
        assert_eq!(texts(prepared(Basis::Default), Outcome::Done, None), [] as [&str; 0]);
    }

    #[test]
    fn what_did_not_happen_is_not_told() {
        for outcome in [Outcome::Taken("n2".into()), Outcome::Unknown("?".into()), Outcome::Stale("?".into())]
        {
            assert_eq!(texts(create(Origin::Carved), outcome, None), [] as [&str; 0]);
        }
        let released =
            Step::DeleteBlock { object: version("b"), node: "n1".into(), living: None, unproven: None };
        assert_eq!(texts(released.clone(), Outcome::AlreadySo, None), [] as [&str; 0]);
        assert_eq!(
            texts(released, Outcome::Done, None),
            ["PodCIDR b BlockReleased: block b of former node n1 is free"]
        );
        let given_back = Step::DeleteBlock {
            object: version("b"),
            node: "n1".into(),
            living: Some("u1".into()),
            unproven: None,
        };
        let text = "BlockReleased: block b, which node n1 has given back, is free";
        assert_eq!(
            texts(given_back, Outcome::Done, None),
            [format!("Node n1 {text}"), format!("PodCIDR b {text}")]
        );
        let unproven = Some(Silent { count: 4, live: 9, named: vec!["n7".into()] });
        let released = Step::DeleteBlock { object: version("b"), node: "n1".into(), living: None, unproven };
        let [told] = &texts(released, Outcome::Done, None)[..] else { panic!() };
        assert!(
            told.starts_with("PodCIDR b BlockReleasedUnproven:")
                && told.contains("4 of 9 live nodes (n7, …)"),
            "{told}"
        );
    }

    #[test]
    fn a_condition_is_told_when_it_becomes_true_and_not_again() {
        let status = |type_: &'static str, holds| {
            let mut status = ClusterCIDRStatus::default();
            let verdict = Verdict::new(type_, Some(holds), "Reason", "words");
            condition::set(&mut status.conditions, &verdict, None, &Time(at(NOW)));
            Box::new(status)
        };
        let told =
            |old, new| texts(Step::RangeStatus { object: version("r"), old, new }, Outcome::Done, None);
        for (type_, reason) in
            [(READY, "RangeReady"), (OVERLAPPING, "RangeOverlapping"), (EXHAUSTED, "RangeExhausted")]
        {
            let expected = [format!("ClusterCIDR r {reason}: words")];
            assert_eq!(told(Box::default(), status(type_, true)), expected);
            assert_eq!(told(status(type_, false), status(type_, true)), expected);
            assert_eq!(told(status(type_, true), status(type_, true)), [] as [&str; 0]);
            assert_eq!(told(status(type_, true), status(type_, false)), [] as [&str; 0]);
        }
        let mut conflict = PodCIDRStatus::default();
        let verdict = Verdict::new(NODE_SPEC_CONFLICT, Some(true), "Differs", "words");
        condition::set(&mut conflict.conditions, &verdict, None, &Time(at(NOW)));
        let step = Step::BlockStatus {
            object: version("b"),
            node: "n1".into(),
            old: Box::default(),
            new: Box::new(conflict),
        };
        assert_eq!(texts(step, Outcome::Done, None), ["PodCIDR b NodeSpecConflict: words"]);
    }

    #[test]
    fn a_range_that_runs_out_is_told_ahead_once() {
        let status = |holds, reason| {
            let mut status = ClusterCIDRStatus::default();
            let verdict = Verdict::new(EXHAUSTED, Some(holds), reason, "words");
            condition::set(&mut status.conditions, &verdict, None, &Time(at(NOW)));
            Box::new(status)
        };
        let (calm, soon, low, others) = (
            || status(false, reason::BLOCKS_FREE),
            || status(false, reason::RUNS_OUT_SOON),
            || status(false, reason::FEW_BLOCKS_LEFT),
            || status(false, reason::OTHERS_TAKE_OVER),
        );
        let full = || status(true, reason::RANGE_EXHAUSTED);
        for (old, new, told) in [
            (Box::default(), soon(), &["ClusterCIDR r RunsOutSoon: words"][..]),
            (calm(), soon(), &["ClusterCIDR r RunsOutSoon: words"]),
            (calm(), low(), &["ClusterCIDR r FewBlocksLeft: words"]),
            (others(), soon(), &["ClusterCIDR r RunsOutSoon: words"]),
            (soon(), low(), &[]),
            (low(), soon(), &[]),
            (full(), low(), &[]),
            (low(), full(), &["ClusterCIDR r RangeExhausted: words"]),
            (soon(), calm(), &[]),
            (soon(), others(), &[]),
        ] {
            let step = Step::RangeStatus { object: version("r"), old, new };
            assert_eq!(texts(step, Outcome::Done, None), told);
        }
    }

    #[test]
    fn an_incident_is_told_with_its_count() {
        let incident = |count| Incident {
            time: Time(at(NOW)),
            reason: "RouteRestored".into(),
            message: "m".into(),
            count,
        };
        let note = of_incident(&"n1".into(), &"u".into(), &incident(3));
        assert_eq!(
            (note.warning, note.reason.as_str(), note.text.as_str()),
            (true, "RouteRestored", "m (3 times since the agent started)")
        );
        assert_eq!(of_incident(&"n1".into(), &"u".into(), &incident(1)).text, "m");
    }
}
