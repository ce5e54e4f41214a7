//! When this node needs another block, whether one may come, and how soon to look again. Pure.
//!
//! The operator decides by the same watermark ([`plat_crds::growth`]) from the counts that the agent reports;
//! the agent knows when it is passed, so that it reports at once and not when its turn comes, and tells the
//! CNI binary that a full pool may grow (`mayGrow` in the blocks file).

use std::collections::BTreeMap;
use std::time::Duration;

use plat_crds::block::{Block, Family};
use plat_crds::growth;

use crate::desired::Map;
use crate::leases::Usage;
use crate::node::OwnBlocks;

/// For how long ADDs are told to wait for a block that does not come: the operator may be away, or no range with
/// room may select this node, which only the operator knows. An ADD that waits in vain fails all the same, later.
const PATIENCE: Duration = Duration::from_secs(60);

/// The families that passed the watermark, since when, and with which blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Growth(BTreeMap<Family, Want>);

/// A family that needs another block.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Want {
    blocks: Vec<Block>,
    since: Duration,
}

impl Growth {
    /// Takes in the newest count at `now`.
    pub fn update(&mut self, own: &OwnBlocks, usage: &Usage, now: Duration) {
        for family in Family::ALL {
            let blocks = leased_from(own, family);
            if !growth::wants_block(counts(&blocks, usage)) {
                self.0.remove(&family);
            } else if self.0.get(&family).is_none_or(|want| want.blocks != blocks) {
                self.0.insert(family, Want { blocks, since: now });
            }
        }
    }

    /// The families of which another block may come: one that holds fewer than its blocks' ranges allow, of which
    /// some range gives out blocks, and that has not waited for one in vain.
    pub fn may_grow(&self, own: &OwnBlocks, map: Map<'_>, now: Duration) -> Vec<Family> {
        let may = |family: &Family| {
            let held = leased_from(own, *family);
            let max = held.iter().filter_map(|block| map.range_of(block)).map(|range| range.max_blocks).max();
            let below = max.and_then(|max| usize::try_from(max).ok()).is_some_and(|max| held.len() < max);
            let mut ranges = map.ranges.values().filter(|range| range.range.family() == *family);
            let patient = self.0.get(family).is_none_or(|want| now < want.since + PATIENCE);
            below && patient && ranges.any(|range| range.ready && range.gives_blocks)
        };
        Family::ALL.into_iter().filter(may).collect()
    }

    /// What is wanted, in words that differ from want to want: each is worth one report out of turn.
    pub fn wants(&self) -> Option<String> {
        let words = |(family, want): (&Family, &Want)| {
            let blocks: Vec<String> = want.blocks.iter().map(Block::to_string).collect();
            format!("{family} beside {}", blocks.join(" and "))
        };
        let wants: Vec<String> = self.0.iter().map(words).collect();
        (!wants.is_empty()).then(|| wants.join("; "))
    }

    /// When ADDs are told otherwise without any news.
    pub fn next(&self, now: Duration) -> Option<Duration> {
        self.0.values().map(|want| want.since + PATIENCE).filter(|until| now < *until).min()
    }
}

/// How many more leases there can be before a family passes the watermark; `None` if no family can.
pub fn room(own: &OwnBlocks, usage: &Usage) -> Option<u32> {
    let families = Family::ALL.into_iter().filter_map(|family| {
        let blocks = leased_from(own, family);
        if blocks.is_empty() {
            return None;
        }
        let (free, watermark) = growth::room(counts(&blocks, usage));
        // Passed already: nothing is to be noticed.
        u32::try_from(free.checked_sub(watermark)?.saturating_add(1)).ok()
    });
    families.min()
}

fn leased_from(own: &OwnBlocks, family: Family) -> Vec<Block> {
    let leased = own.values().filter(|held| held.lease && held.cidr.family() == family);
    leased.map(|held| held.cidr).collect()
}

/// Used addresses and capacity of each. What cannot be counted counts as used nowhere: no block is asked for on
/// a guess.
fn counts<'a>(blocks: &'a [Block], usage: &'a Usage) -> impl Iterator<Item = (u32, u32)> + 'a {
    blocks.iter().map(|block| {
        let used = usage.used(block).unwrap_or_default();
        (u32::try_from(used).unwrap_or(u32::MAX), block.capacity())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::RangeFact;
    use crate::fixtures::range;
    use plat_crds::blocks_file::HeldBlock;
    use plat_crds::lease::{Lease, LeasedAddress, Pool};
    use std::collections::BTreeSet;

    fn own(blocks: &[(&str, bool)]) -> OwnBlocks {
        let held = |(cidr, lease): &(&str, bool)| {
            let cidr: Block = cidr.parse().unwrap();
            (cidr, HeldBlock { cidr, lease: *lease })
        };
        blocks.iter().map(held).collect()
    }

    /// The first `n` addresses of a block are leased.
    fn usage(counts: &[(&str, u32)]) -> Usage {
        let lease = |(block, n): &(&str, u32)| {
            let block: Block = block.parse().unwrap();
            let address = |host| LeasedAddress {
                address: block.host(host).unwrap(),
                subnet_length: block.prefix_length(),
                masquerade: false,
            };
            Lease { pool: Pool::Blocks, addresses: (2..n + 2).map(address).collect(), ..Lease::default() }
        };
        Usage::of(counts.iter().map(lease).collect())
    }

    const A: &str = "10.244.1.0/24";
    const B: &str = "10.244.9.0/24";
    const SIX: &str = "fd00:1::/64";

    fn may_grow(growth: &Growth, own: &OwnBlocks, range: RangeFact, now: u64) -> Vec<Family> {
        let (blocks, absent) = (BTreeMap::new(), BTreeSet::new());
        let ranges = [(range.name.clone(), range)].into();
        let map = Map { blocks: &blocks, ranges: &ranges, policies: &[], absent: &absent };
        growth.may_grow(own, map, Duration::from_secs(now))
    }

    #[test]
    fn a_block_is_wanted_at_the_watermark_and_told_once_for_each_set_of_blocks() {
        let mut growth = Growth::default();
        let mut wants = |own: &OwnBlocks, used: &[(&str, u32)]| {
            growth.update(own, &usage(used), Duration::from_secs(1));
            growth.wants()
        };
        let (one, two) = (own(&[(A, true)]), own(&[(A, true), (B, true)]));
        assert_eq!(wants(&one, &[(A, 203)]), None);
        let first = wants(&one, &[(A, 204)]);
        assert_eq!(first.as_deref(), Some("IPv4 beside 10.244.1.0/24"));
        assert_eq!(wants(&one, &[(A, 253)]), first, "still the same want");
        assert_eq!(wants(&two, &[(A, 253)]), None);
        assert_eq!(
            wants(&two, &[(A, 253), (B, 210)]).as_deref(),
            Some("IPv4 beside 10.244.1.0/24 and 10.244.9.0/24")
        );
        let draining = own(&[(A, true), (B, false)]);
        assert_eq!(wants(&draining, &[(A, 210)]), first, "what drains has no room");
        assert_eq!(wants(&own(&[(A, false)]), &[(A, 253)]), None, "its first block comes without asking");
    }

    #[test]
    fn the_next_look_at_the_leases_is_before_the_first_family_passes_the_watermark() {
        let dual = own(&[(A, true), (SIX, true)]);
        assert_eq!(room(&dual, &usage(&[(A, 100), (SIX, 100)])), Some(104));
        assert_eq!(room(&dual, &usage(&[(A, 203)])), Some(1));
        assert_eq!(room(&own(&[(A, true)]), &usage(&[(A, 204)])), None, "passed");
        assert_eq!(room(&own(&[]), &usage(&[])), None);
    }

    #[test]
    fn adds_wait_only_where_a_block_may_come_and_not_for_ever() {
        let mut growth = Growth::default();
        let one = own(&[(A, true)]);
        assert_eq!(
            may_grow(&growth, &one, range("r"), 1),
            [Family::IPv4],
            "a burst may fill it before it is counted"
        );
        for stingy in [
            RangeFact { max_blocks: 1, ..range("r") },
            RangeFact { gives_blocks: false, ..range("r") },
            RangeFact { ready: false, ..range("r") },
            RangeFact { range: "fd00::/48".parse().unwrap(), ..range("r") },
        ] {
            assert_eq!(may_grow(&growth, &one, stingy.clone(), 1), [], "{stingy:?}");
        }
        assert_eq!(may_grow(&growth, &own(&[(A, false)]), range("r"), 1), []);
        growth.update(&one, &usage(&[(A, 250)]), Duration::from_secs(100));
        growth.update(&one, &usage(&[(A, 253)]), Duration::from_secs(130));
        assert_eq!(growth.next(Duration::from_secs(130)), Some(Duration::from_secs(160)));
        assert_eq!(may_grow(&growth, &one, range("r"), 159), [Family::IPv4]);
        assert_eq!(may_grow(&growth, &one, range("r"), 160), [], "none came");
        let two = own(&[(A, true), (B, true)]);
        growth.update(&two, &usage(&[(A, 253)]), Duration::from_secs(161));
        assert_eq!(may_grow(&growth, &two, range("r"), 161), [Family::IPv4]);
    }
}
