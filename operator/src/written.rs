//! The status that the operator last wrote into a PodCIDR, in a quarter of the memory: as the object's own type, with a
//! string for each word of each condition, the statuses of thousands of blocks would be a third of what the operator
//! keeps. Pure.

use std::fmt::Write as _;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use plat_crds::PodCIDRStatus;
use plat_crds::pod_cidr::EffectiveRouting;

/// Ends each word of a packed condition. No object has it in one: the API server takes it, but we never write it, and
/// a condition of somebody else that has it is left out.
const END: char = '\0';

/// A PodCIDR's status, packed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Written {
    observed_generation: Option<i64>,
    capacity: Option<i64>,
    used: Option<i64>,
    routing: Option<EffectiveRouting>,
    /// Type, status, reason, message, time of the transition (nanoseconds since 1970) and generation (or nothing) of each.
    conditions: Box<str>,
}

/// A condition of a packed status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenCondition<'a> {
    /// Its type.
    pub type_: &'a str,
    /// `True`, `False` or `Unknown`.
    pub status: &'a str,
    /// CamelCase word for programs.
    pub reason: &'a str,
    message: &'a str,
    transition: &'a str,
    generation: &'a str,
}

impl WrittenCondition<'_> {
    /// Whether it is `True`.
    pub fn is_true(&self) -> bool {
        self.status == "True"
    }

    /// Generation of the spec that it speaks of.
    pub fn observed_generation(&self) -> Option<i64> {
        self.generation.parse().ok()
    }

    fn unpack(&self) -> Condition {
        let at = self.transition.parse().ok().and_then(|at| Timestamp::from_nanosecond(at).ok());
        Condition {
            type_: self.type_.to_owned(),
            status: self.status.to_owned(),
            reason: self.reason.to_owned(),
            message: self.message.to_owned(),
            last_transition_time: Time(at.unwrap_or_default()),
            observed_generation: self.observed_generation(),
        }
    }
}

impl Written {
    /// The status as objects have it.
    pub fn unpack(&self) -> PodCIDRStatus {
        let Written { observed_generation, capacity, used, routing, conditions: _ } = self;
        PodCIDRStatus {
            observed_generation: *observed_generation,
            capacity: *capacity,
            used: *used,
            routing: routing.clone(),
            conditions: self.conditions().map(|condition| condition.unpack()).collect(),
        }
    }

    /// Its condition of that type.
    pub fn condition(&self, type_: &str) -> Option<WrittenCondition<'_>> {
        self.conditions().find(|condition| condition.type_ == type_)
    }

    fn conditions(&self) -> impl Iterator<Item = WrittenCondition<'_>> {
        let mut words = self.conditions.split_terminator(END);
        std::iter::from_fn(move || {
            Some(WrittenCondition {
                type_: words.next()?,
                status: words.next()?,
                reason: words.next()?,
                message: words.next()?,
                transition: words.next()?,
                generation: words.next()?,
            })
        })
    }
}

impl From<PodCIDRStatus> for Written {
    fn from(status: PodCIDRStatus) -> Written {
        let PodCIDRStatus { observed_generation, capacity, used, routing, conditions } = status;
        Written { observed_generation, capacity, used, routing, conditions: pack(&conditions) }
    }
}

fn pack(conditions: &[Condition]) -> Box<str> {
    let mut text = String::new();
    for condition in conditions {
        let Condition { type_, status, reason, message, last_transition_time, observed_generation } =
            condition;
        let words = [type_, status, reason, message];
        if words.iter().any(|word| word.contains(END)) {
            continue;
        }
        let (at, generation) =
            (last_transition_time.0.as_nanosecond(), observed_generation.map(|g| g.to_string()));
        let generation = generation.unwrap_or_default();
        words.into_iter().for_each(|word| text.extend([word, "\0"]));
        // Writing to a string cannot fail.
        let _ = write!(text, "{at}{END}{generation}{END}");
    }
    text.into_boxed_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn condition() -> impl Strategy<Value = Condition> {
        let word = "[^\0]{0,12}";
        (word, word, word, word, any::<i32>(), proptest::option::of(any::<i64>())).prop_map(
            |(type_, status, reason, message, second, observed_generation)| Condition {
                type_,
                status,
                reason,
                message,
                last_transition_time: Time(Timestamp::new(second.into(), second.signum()).unwrap()),
                observed_generation,
            },
        )
    }

    proptest! {
        #[test]
        fn a_packed_status_unpacks_to_what_it_was(
            conditions in proptest::collection::vec(condition(), 0..5),
            numbers in proptest::collection::vec(proptest::option::of(any::<i64>()), 3),
        ) {
            let status = PodCIDRStatus {
                observed_generation: numbers[0],
                capacity: numbers[1],
                used: numbers[2],
                routing: numbers[0].map(|_| EffectiveRouting { via: Some("10.0.0.1".to_owned()), ..EffectiveRouting::default() }),
                conditions,
            };
            let packed = Written::from(status.clone());
            for condition in &status.conditions {
                let first = status.conditions.iter().find(|c| c.type_ == condition.type_).unwrap();
                let found = packed.condition(&condition.type_).unwrap();
                prop_assert_eq!((found.status, found.reason), (&*first.status, &*first.reason));
                prop_assert_eq!(found.observed_generation(), first.observed_generation);
            }
            prop_assert_eq!(packed.unpack(), status);
        }
    }

    #[test]
    fn a_condition_with_a_nul_is_left_out_and_spoils_no_other() {
        let said = |type_: &str, message: &str| Condition {
            type_: type_.to_owned(),
            status: "True".to_owned(),
            reason: "R".to_owned(),
            message: message.to_owned(),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
            observed_generation: None,
        };
        let conditions = vec![said("A", "a"), said("B", "b\0True"), said("C", "")];
        let packed = Written::from(PodCIDRStatus { conditions, ..PodCIDRStatus::default() });
        let types: Vec<_> = packed.unpack().conditions.into_iter().map(|c| c.type_).collect();
        assert_eq!(types, ["A", "C"]);
    }
}
