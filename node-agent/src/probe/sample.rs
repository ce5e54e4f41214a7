//! Which blocks to check in a round: all in small clusters, a sparse sample in large ones.
//!
//! All blocks of a family stand on a ring, in order. A node checks its neighbours on either side in every round, and
//! further ones in turn: the next [`FAR`] steps around the ring in each round. All nodes take the same steps in the
//! same round, so each is checked by as many as it checks itself, and each pair is met within a bounded time.

/// Up to so many are all checked in every round.
pub const ALL_UP_TO: usize = 16;
/// Neighbours on either side that are checked in every round.
const NEAR: usize = 2;
/// Others that are checked in turn.
const FAR: usize = ALL_UP_TO - 2 * NEAR;

/// The places on a ring of `count` that the one at `me` checks in that round. Never `me`, none twice, at most
/// [`ALL_UP_TO`].
pub fn selection(count: usize, me: usize, round: u64) -> Vec<usize> {
    let place = |step: usize| (me % count + step) % count;
    if count <= ALL_UP_TO + 1 {
        return (1..count).map(place).collect();
    }
    let near = (1..=NEAR).flat_map(|step| [step, count - step]);
    let others = count - 1 - 2 * NEAR;
    // The round is cut to where it repeats, so that nothing overflows.
    let turn = usize::try_from(round % others as u64).unwrap_or(0);
    let far = (0..FAR).map(|n| 1 + NEAR + (turn * FAR + n) % others);
    near.chain(far).map(place).collect()
}

/// After so many rounds every node has checked every other.
pub fn rounds_to_meet_all(count: usize) -> usize {
    if count <= ALL_UP_TO + 1 { 1 } else { (count - 1 - 2 * NEAR).div_ceil(FAR) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_small_cluster_is_checked_whole_and_a_lone_node_checks_nobody() {
        assert_eq!(selection(1, 0, 9), Vec::<usize>::new());
        assert_eq!(selection(3, 1, 9), [2, 0]);
        assert_eq!(selection(17, 0, 9).len(), 16);
        assert_eq!(selection(18, 0, 9).len(), 16);
        assert_eq!(selection(0, 0, 0), Vec::<usize>::new());
    }

    #[test]
    fn of_five_thousand_nodes_each_is_checked_by_sixteen_in_a_round() {
        let mut checked_by = vec![0; 5000];
        for me in 0..5000 {
            for peer in selection(5000, me, 123_456_789) {
                checked_by[peer] += 1;
            }
        }
        assert!(checked_by.iter().all(|n| *n == ALL_UP_TO));
        assert_eq!(rounds_to_meet_all(5000), 417);
    }

    proptest! {
        #[test]
        fn it_is_sparse_and_meets_everyone_in_bounded_time(
            count in 1usize..400, me in 0usize..400, first in any::<u64>().prop_map(|r| r >> 1)
        ) {
            let me = me % count;
            let mut met = BTreeSet::new();
            for round in 0..rounds_to_meet_all(count) {
                let sample = selection(count, me, first + round as u64);
                let distinct: BTreeSet<usize> = sample.iter().copied().collect();
                prop_assert_eq!(distinct.len(), sample.len());
                prop_assert!(sample.len() <= ALL_UP_TO && !distinct.contains(&me));
                prop_assert_eq!(&selection(count, me, first + round as u64), &sample);
                met.extend(distinct);
            }
            // Where the counted rounds wrap around, the ring is begun anew: twice the time at most.
            for round in rounds_to_meet_all(count)..2 * rounds_to_meet_all(count) {
                met.extend(selection(count, me, first + round as u64));
            }
            prop_assert_eq!(met.len(), count - 1);
        }
    }
}
