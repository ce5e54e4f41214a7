//! What users are told, as values: which step or fault becomes which Event. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use plat_crds::condition::{self, EXHAUSTED, NODE_SPEC_CONFLICT, OVERLAPPING, READY};
use plat_crds::node_network::Incident;

use crate::apply::{Done, Learnt, Outcome};
use crate::facts::Name;
use crate::reason;
use crate::step::{Fault, Kind, NewBlock, ObjectKey, Origin, Step, Why};

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
            let text =
                format!("created for the operator's --cluster-cidr: {range} in /{block_prefix} blocks");
            vec![normal(
                ObjectKey::new(Kind::ClusterCIDR, name, &fact.uid),
                reason::RANGE_CREATED,
                "Create",
                text,
            )]
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
                Why::Drain => (
                    reason::BLOCK_DRAINING,
                    format!(
                        "node {node} has an older block of this family: no new leases from {}",
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
        (Step::DeleteBlock { object, node, .. }, Outcome::Done) => {
            let text = format!("block {} of former node {node} is free", object.name);
            vec![normal(
                ObjectKey::new(Kind::PodCIDR, &object.name, &object.uid),
                reason::BLOCK_RELEASED,
                "Release",
                text,
            )]
        }
        (Step::RangeStatus { object, old, new }, Outcome::Done) => {
            let range = ObjectKey::new(Kind::ClusterCIDR, &object.name, &object.uid);
            range_flips(&range, &old.conditions, &new.conditions)
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
    notes
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
