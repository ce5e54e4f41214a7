//! Condition types and reasons, and the one way in which conditions change.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::Schema;

/// The summary condition of ClusterCIDR, PodCIDR and RoutingPolicy.
pub const READY: &str = "Ready";
/// ClusterCIDR: no block is free.
pub const EXHAUSTED: &str = "Exhausted";
/// ClusterCIDR and NodeNetwork: shares addresses with another range or block.
pub const OVERLAPPING: &str = "Overlapping";
/// RoutingPolicy: every live node that it selects follows it.
pub const APPLIED: &str = "Applied";
/// PodCIDR: every live node carries it.
pub const CONVERGED: &str = "Converged";
/// PodCIDR: `node.spec.podCIDRs` of its node says something else (the field is write-once).
pub const NODE_SPEC_CONFLICT: &str = "NodeSpecConflict";
/// PodCIDR: no new leases, and it goes once the last one has ended; `False` while it was asked for but its
/// node has no other block yet. ClusterCIDR: its `allocation` is `Draining`. Absent otherwise.
pub const DRAINING: &str = "Draining";
/// PodCIDR: its node is almost full and gets no further block. Absent otherwise.
pub const GROWTH_BLOCKED: &str = "GrowthBlocked";
/// ClusterCIDR: another program gives its nodes `spec.podCIDRs`, next to the operator.
pub const OTHER_ALLOCATOR: &str = "OtherAllocator";
/// NodeNetwork: every wanted route is in the kernel.
pub const ROUTES_READY: &str = "RoutesReady";
/// NodeNetwork: the nftables table is in the kernel.
pub const MASQUERADE_READY: &str = "MasqueradeReady";
/// NodeNetwork: CNI binary, blocks file and conflist are in place, and no other file shadows ours.
pub const CNI_READY: &str = "CNIReady";
/// NodeNetwork: a foreign firewall drops forwarded pod packets.
pub const FORWARDING_BLOCKED: &str = "ForwardingBlocked";
/// NodeNetwork: other nodes answer probes over the pods' path. Absent where probes are switched off.
pub const PEERS_REACHABLE: &str = "PeersReachable";
/// NodeNetwork: withdrawals wait for confirmation (fail static).
pub const WITHDRAWALS_HELD: &str = "WithdrawalsHeld";

/// A condition to be set, without the times and generations that [`set`] fills in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Condition type, one of this module's.
    pub type_: &'static str,
    /// `True`, `False`, or `Unknown` for `None`.
    pub status: Option<bool>,
    /// CamelCase word for programs.
    pub reason: &'static str,
    /// Sentence for people: what, which object, what to do.
    pub message: String,
}

impl Verdict {
    /// A verdict that holds (`Some(true)`), does not (`Some(false)`), or is unknown (`None`).
    pub fn new(
        type_: &'static str,
        status: Option<bool>,
        reason: &'static str,
        message: impl Into<String>,
    ) -> Verdict {
        Verdict { type_, status, reason, message: message.into() }
    }
}

/// Sets `verdict` in `conditions`, which stay sorted by type. `lastTransitionTime` moves only when the
/// status flips (API conventions), so that repeating a verdict changes nothing and wakes nobody.
pub fn set(conditions: &mut Vec<Condition>, verdict: &Verdict, generation: Option<i64>, now: &Time) {
    let status = match verdict.status {
        Some(true) => "True",
        Some(false) => "False",
        None => "Unknown",
    };
    let mut next = Condition {
        last_transition_time: now.clone(),
        message: verdict.message.chars().take(1024).collect(),
        observed_generation: generation,
        reason: verdict.reason.to_owned(),
        status: status.to_owned(),
        type_: verdict.type_.to_owned(),
    };
    match conditions.binary_search_by(|c| c.type_.as_str().cmp(verdict.type_)) {
        Ok(at) => {
            if conditions[at].status == next.status {
                next.last_transition_time = conditions[at].last_transition_time.clone();
            }
            conditions[at] = next;
        }
        Err(at) => conditions.insert(at, next),
    }
}

/// Sets the verdict of that type, or takes the condition away where there is none.
pub fn set_or_remove(
    conditions: &mut Vec<Condition>,
    type_: &str,
    verdict: Option<&Verdict>,
    generation: Option<i64>,
    now: &Time,
) {
    match verdict {
        Some(verdict) => set(conditions, verdict, generation, now),
        None => conditions.retain(|condition| condition.type_ != type_),
    }
}

/// The condition of that type.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == type_)
}

/// Whether the condition of that type is `True`.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    find(conditions, type_).is_some_and(|c| c.status == "True")
}

/// The same, and said of the object's spec as it is at that generation.
pub fn is_true_at(conditions: &[Condition], type_: &str, generation: i64) -> bool {
    find(conditions, type_).is_some_and(|c| c.status == "True" && c.observed_generation == Some(generation))
}

/// Bounds what `Condition` leaves open, as Kubernetes bounds it in its own types: the API server estimates
/// the cost of rules by these bounds. At most 16 conditions.
pub(crate) fn bound(schema: &mut Schema) {
    schema.insert("maxItems".to_owned(), 16.into());
    let bounds = [
        ("message", serde_json::json!({"maxLength": 32_768})),
        (
            "reason",
            serde_json::json!({"maxLength": 1024, "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"}),
        ),
        ("status", serde_json::json!({"enum": ["True", "False", "Unknown"]})),
        ("type", serde_json::json!({"maxLength": 316})),
    ];
    let Some(fields) = schema.pointer_mut("/items/properties") else { return };
    for (name, bound) in bounds {
        if let (Some(serde_json::Value::Object(field)), serde_json::Value::Object(bound)) =
            (fields.get_mut(name), bound)
        {
            field.extend(bound);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::jiff::Timestamp;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    #[test]
    fn transition_time_moves_only_when_the_status_flips() {
        let mut conditions = vec![];
        set(&mut conditions, &Verdict::new(READY, Some(true), "A", "a"), Some(1), &at(1));
        set(&mut conditions, &Verdict::new(READY, Some(true), "B", "b"), Some(2), &at(2));
        assert_eq!((conditions[0].last_transition_time.clone(), conditions[0].reason.as_str()), (at(1), "B"));
        set(&mut conditions, &Verdict::new(READY, None, "C", "c"), Some(2), &at(3));
        assert_eq!(
            (conditions[0].last_transition_time.clone(), conditions[0].status.as_str()),
            (at(3), "Unknown")
        );
    }

    #[test]
    fn conditions_stay_sorted_by_type() {
        let mut conditions = vec![];
        for type_ in [READY, CONVERGED, EXHAUSTED, CONVERGED] {
            set(&mut conditions, &Verdict::new(type_, Some(true), "R", ""), None, &at(1));
        }
        let types: Vec<_> = conditions.iter().map(|c| c.type_.as_str()).collect();
        assert_eq!(types, [CONVERGED, EXHAUSTED, READY]);
    }
}
