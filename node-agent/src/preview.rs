//! What the planned routing policies would change on this node, in lines for people: pure.

use plat_crds::node_network::MAX_PLAN_LINES;

use crate::desired::{Host, Map, Me, desired};
use crate::fabric::Desired;
use crate::facts::Fault;

/// A line's bound in the CRD.
const MAX_LINE: usize = 512;

/// The difference between the routes that are wanted `now`, with their faults, and those with the policies of
/// `planned`: `+` a route would come, `-` go, `~` change, `!` not be possible.
pub fn lines(me: &Me, now: (&Desired, &[Fault]), planned: Map<'_>, host: &Host) -> Vec<String> {
    let (now, faults) = now;
    let (then, troubles) = desired(me, planned, host);
    let keys = now.routes.keys().chain(then.routes.keys().filter(|key| !now.routes.contains_key(key)));
    let routes = keys.filter_map(|key| match (now.routes.get(key), then.routes.get(key)) {
        (Some(old), Some(new)) if old != new => Some(format!("~ {old} -> {new}")),
        // The last working route of a block that cannot be followed stays.
        (Some(_), None) if then.keep.contains(&key.prefix) => None,
        (Some(old), None) => Some(format!("- {old}")),
        (None, Some(new)) => Some(format!("+ {new}")),
        _ => None,
    });
    let new_troubles = troubles.iter().filter(|trouble| !faults.contains(trouble));
    let all: Vec<String> =
        routes.chain(new_troubles.map(|trouble| format!("! {}", trouble.message))).collect();
    bounded(all)
}

fn bounded(all: Vec<String>) -> Vec<String> {
    let (total, shown) = (all.len(), if all.len() > MAX_PLAN_LINES { MAX_PLAN_LINES - 1 } else { all.len() });
    let more = (total > shown).then(|| format!("and {} more", total - shown));
    all.into_iter().take(shown).map(|line| line.chars().take(MAX_LINE).collect()).chain(more).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_too_many_lines_the_last_says_how_many_more_there_are() {
        let lines = |count: usize| bounded((0..count).map(|n| n.to_string()).collect());
        assert_eq!(lines(32).last().map(String::as_str), Some("31"));
        let many = lines(5000);
        assert_eq!((many.len(), many[30].as_str(), many[31].as_str()), (32, "30", "and 4969 more"));
        assert_eq!(bounded(vec!["ä".repeat(600)])[0].chars().count(), 512);
    }
}
