//! Which ClusterCIDRs are closed by an `unreachable` route: what has no route in them has no pods, so the
//! sender gets an error at once instead of packets that leak to the default gateway.
//!
//! A route for a whole range can cut a node off, so it is made only if the range is `Ready`, none of its
//! blocks is left to something else to route, and no address that the node needs lies in it without a more
//! specific route; and it is on trial at first: if the API server is not reached again soon after, it is
//! taken back.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use crate::desired::Map;
use crate::facts::{Fault, RangeFact, Reason};
use crate::path::all_routed;

/// How long a new route waits for a sign that the API server is still reached. Well below the 30 s in
/// which it must be gone if it did harm.
pub const TRIAL: Duration = Duration::from_secs(20);
/// How long a route that was taken back stays away.
pub const RETRY: Duration = Duration::from_secs(600);
/// A contact older than this says nothing about now.
pub const RECENT: Duration = Duration::from_secs(180);

/// What is remembered of each range, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trials(BTreeMap<String, Trial>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    /// Made at that time, and not yet proven harmless.
    Since(Duration),
    /// Harmless.
    Passed,
    /// Taken back at that time.
    Failed(Duration),
}

/// What the decision rests on.
pub struct Evidence<'a> {
    /// Addresses that the node needs and that would be caught, by range.
    pub exposed: &'a BTreeMap<String, BTreeSet<IpAddr>>,
    /// Ranges whose route is in the kernel.
    pub installed: &'a BTreeSet<String>,
    /// When the API server was last reached, on the clock of `now`.
    pub contact: Option<Duration>,
    /// Any clock that counts suspend.
    pub now: Duration,
}

/// The decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Closing {
    /// Names of ranges to be closed.
    pub closed: BTreeSet<String>,
    /// Ranges that are not closed though they should be.
    pub faults: Vec<Fault>,
    /// Whether a sign of the API server is wanted.
    pub wants_contact: bool,
    /// When, at the earliest, the answer may differ without any news.
    pub next: Option<Duration>,
}

/// Decides for all ranges.
pub fn close(map: Map<'_>, evidence: &Evidence<'_>, trials: &mut Trials) -> Closing {
    let mut closing = Closing::default();
    trials.0.retain(|name, _| map.ranges.contains_key(name));
    for range in map.ranges.values() {
        if !range.ready || !all_routed(range, map) {
            trials.0.remove(&range.name);
            continue;
        }
        match trial(range, evidence, trials.0.get(&range.name).copied()) {
            Ok(next) => {
                closing.closed.insert(range.name.clone());
                if let Trial::Since(since) = next {
                    closing.wants_contact = true;
                    closing.next = Some(closing.next.unwrap_or(Duration::MAX).min(since + TRIAL));
                }
                trials.0.insert(range.name.clone(), next);
            }
            Err(refusal) => {
                match refusal.trial {
                    Some(trial) => trials.0.insert(range.name.clone(), trial),
                    None => trials.0.remove(&range.name),
                };
                closing.faults.extend(refusal.fault);
            }
        }
    }
    closing
}

/// Why a range is not closed now.
struct Refusal {
    trial: Option<Trial>,
    fault: Option<Fault>,
}

fn trial(range: &RangeFact, evidence: &Evidence<'_>, known: Option<Trial>) -> Result<Trial, Refusal> {
    if let Some(address) = evidence.exposed.get(&range.name).and_then(BTreeSet::first) {
        return Err(Refusal { trial: None, fault: Some(needed(range, *address)) });
    }
    let now = evidence.now;
    let recent = evidence.contact.is_some_and(|contact| now <= contact + RECENT);
    match known {
        Some(Trial::Passed) => Ok(Trial::Passed),
        Some(Trial::Since(since)) if evidence.contact.is_some_and(|contact| contact > since) => {
            Ok(Trial::Passed)
        }
        Some(Trial::Since(since)) if now < since + TRIAL => Ok(Trial::Since(since)),
        Some(Trial::Since(_)) => Err(Refusal { trial: Some(Trial::Failed(now)), fault: Some(lost(range)) }),
        Some(Trial::Failed(at)) if now < at + RETRY || !recent => {
            Err(Refusal { trial: Some(Trial::Failed(at)), fault: Some(lost(range)) })
        }
        // What an earlier life made has stood its trial.
        None if evidence.installed.contains(&range.name) => Ok(Trial::Passed),
        // Without the API server there is no telling whether the route does harm.
        None if !recent => Err(Refusal { trial: None, fault: None }),
        Some(Trial::Failed(_)) | None => Ok(Trial::Since(now)),
    }
}

fn needed(range: &RangeFact, address: IpAddr) -> Fault {
    Fault::range(
        &range.name,
        Reason::RangeHoldsNeededAddress,
        format!(
            "ClusterCIDR '{}' ({}) holds {address}, which this node needs and has no more specific route to; unused addresses of the range are not made unreachable, so packets to them leave for the default gateway; add a route to {address}, or use another range",
            range.name, range.range
        ),
    )
}

fn lost(range: &RangeFact) -> Fault {
    Fault::range(
        &range.name,
        Reason::RangeHoldsNeededAddress,
        format!(
            "the API server was not reached after ClusterCIDR '{}' ({}) was made unreachable where it has no pods, so that was taken back; see whether the API server's addresses lie in the range",
            range.name, range.range
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::BlockFact;
    use crate::fixtures::range;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    struct Case {
        range: RangeFact,
        blocks: BTreeMap<String, BlockFact>,
        exposed: BTreeMap<String, BTreeSet<IpAddr>>,
        installed: BTreeSet<String>,
        contact: Option<Duration>,
        trials: Trials,
    }

    impl Case {
        fn new() -> Case {
            Case {
                range: range("r"),
                blocks: BTreeMap::new(),
                exposed: BTreeMap::new(),
                installed: BTreeSet::new(),
                contact: Some(seconds(1000)),
                trials: Trials::default(),
            }
        }

        fn at(&mut self, now: u64) -> Closing {
            let ranges = [("r".to_owned(), self.range.clone())].into();
            let map = Map { blocks: &self.blocks, ranges: &ranges, policies: &[], absent: &BTreeSet::new() };
            let Case { exposed, installed, contact, .. } = self;
            let evidence = Evidence { exposed, installed, contact: *contact, now: seconds(now) };
            close(map, &evidence, &mut self.trials)
        }

        fn closed(&mut self, now: u64) -> bool {
            !self.at(now).closed.is_empty()
        }
    }

    #[test]
    fn a_range_is_closed_on_trial_and_stays_so_once_the_api_server_was_reached() {
        let mut case = Case::new();
        let first = case.at(1001);
        assert!(first.wants_contact && first.closed.contains("r"));
        assert_eq!(first.next, Some(seconds(1021)));
        case.contact = Some(seconds(1002));
        assert!(!case.at(1003).wants_contact);
        case.contact = None;
        assert!(case.closed(9999), "a later loss is not its fault");
    }

    #[test]
    fn a_range_after_which_the_api_server_is_lost_is_opened_again_in_time() {
        let mut case = Case::new();
        assert!(case.closed(1001));
        assert!(case.closed(1020));
        let back = case.at(1021);
        assert!(back.closed.is_empty());
        assert_eq!(back.faults[0].reason, Reason::RangeHoldsNeededAddress);
        case.contact = Some(seconds(1100));
        assert!(!case.closed(1101), "not again at once");
        case.contact = Some(seconds(1620));
        assert!(case.closed(1622), "but later");
    }

    #[test]
    fn a_range_with_a_needed_address_is_left_open_and_the_address_is_named() {
        let mut case = Case::new();
        case.exposed = [("r".to_owned(), ["10.244.0.9".parse().unwrap()].into())].into();
        case.installed = ["r".to_owned()].into();
        let closing = case.at(1001);
        assert!(closing.closed.is_empty());
        assert!(closing.faults[0].message.contains("10.244.0.9"), "{:?}", closing.faults);
    }

    #[test]
    fn without_the_api_server_nothing_new_is_closed_and_what_was_stays() {
        let mut case = Case::new();
        for contact in [None, Some(seconds(1))] {
            case.contact = contact;
            assert_eq!(case.at(1001), Closing::default());
        }
        case.installed = ["r".to_owned()].into();
        assert!(case.closed(1001));
    }

    #[test]
    fn a_range_that_is_not_ready_is_open() {
        let mut case = Case::new();
        case.range.ready = false;
        case.installed = ["r".to_owned()].into();
        assert!(!case.closed(1001));
    }
}
