//! The blocks of one range: which are taken, and which comes next. Pure; knows no nodes.

use std::collections::BTreeMap;
use std::ops::Range;

use plat_crds::Block;

/// The blocks of one range by index, with the taken ones as merged intervals: a reserved /12 costs as much
/// as a single block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    range: Block,
    prefix_length: u8,
    total: u64,
    /// First index → last index of each run of taken blocks; runs neither touch nor overlap.
    taken: BTreeMap<u64, u64>,
}

impl Pool {
    /// All blocks of `prefix_length` bits in `range`, all free. Has no blocks if the length does not fit.
    pub fn new(range: Block, prefix_length: u8) -> Pool {
        let total = range.subblock_count(prefix_length);
        Pool { range, prefix_length, total, taken: BTreeMap::new() }
    }

    /// No blocks at all, as for a range that cannot be read.
    pub fn none() -> Pool {
        Pool { total: 0, ..Pool::new(ipnet::Ipv4Net::default().into(), 0) }
    }

    /// Number of blocks.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Number of blocks that are not taken.
    pub fn free(&self) -> u64 {
        self.total - self.taken.iter().map(|(first, last)| last - first + 1).sum::<u64>()
    }

    /// The block with that index.
    pub fn block(&self, index: u64) -> Option<Block> {
        self.range.subblock(self.prefix_length, index)
    }

    /// The index of a block that is exactly one of the pool's.
    pub fn index(&self, block: &Block) -> Option<u64> {
        let exact = block.prefix_length() == self.prefix_length && self.range.covers(block);
        if exact { self.range.subblock_index(self.prefix_length, block) } else { None }
    }

    /// Takes every block that shares an address with `other`, of whatever size that is.
    pub fn take(&mut self, other: &Block) {
        if self.total == 0 {
            return;
        }
        let Some(first) = self.range.subblock_index(self.prefix_length, other) else { return };
        // A block larger than the range begins before it: then all of the range is taken.
        let count = if other.covers(&self.range) {
            self.total
        } else {
            other.subblock_count(self.prefix_length).max(1)
        };
        let mut run = (first, first.saturating_add(count - 1).min(self.total - 1));
        // Most blocks are claimed more than once: by their object, their Node and their node's report.
        if self.taken.range(..=run.0).next_back().is_some_and(|(_, last)| *last >= run.1) {
            return;
        }
        let touching: Vec<u64> = self
            .taken
            .range(..=run.1.saturating_add(1))
            .rev()
            .take_while(|(_, last)| last.saturating_add(1) >= run.0)
            .map(|(first, _)| *first)
            .collect();
        for first in touching {
            if let Some(last) = self.taken.remove(&first) {
                run = (run.0.min(first), run.1.max(last));
            }
        }
        self.taken.insert(run.0, run.1);
    }

    /// The first free index at or after `cursor`, going round once at the end: so a freed block is handed
    /// out last.
    pub fn next_free(&self, cursor: u64) -> Option<u64> {
        self.next_free_in(&(0..self.total), cursor)
    }

    /// The same within a part of the range.
    pub fn next_free_in(&self, part: &Range<u64>, cursor: u64) -> Option<u64> {
        let (start, end) = (part.start, part.end.min(self.total));
        let cursor = if (start..end).contains(&cursor) { cursor } else { start };
        let ahead = self.after_run(cursor);
        if ahead < end {
            return Some(ahead);
        }
        let around = self.after_run(start);
        (around < cursor).then_some(around)
    }

    /// Whether all of a part lies in the range and is free.
    pub fn is_free(&self, part: &Range<u64>) -> bool {
        let before_end = self.taken.range(..part.end).next_back();
        part.is_empty() || part.end <= self.total && before_end.is_none_or(|(_, last)| *last < part.start)
    }

    /// The runs of taken blocks, in order; none touches the next.
    pub fn taken(&self) -> impl Iterator<Item = Range<u64>> {
        self.taken.iter().map(|(first, last)| *first..last.saturating_add(1))
    }

    /// `index` itself if it is free, else the index after the run that it lies in.
    fn after_run(&self, index: u64) -> u64 {
        match self.taken.range(..=index).next_back() {
            Some((_, last)) if *last >= index => last.saturating_add(1),
            _ => index,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn block(text: &str) -> Block {
        text.parse().unwrap()
    }

    #[test]
    fn the_next_free_block_is_sought_from_the_cursor_and_round_the_end() {
        let mut pool = Pool::new(block("10.244.0.0/22"), 24);
        assert_eq!((pool.total(), pool.free(), pool.next_free(0)), (4, 4, Some(0)));
        pool.take(&block("10.244.2.0/24"));
        assert_eq!(pool.next_free(2), Some(3));
        pool.take(&block("10.244.3.0/24"));
        assert_eq!(pool.next_free(2), Some(0));
        assert_eq!(pool.next_free(99), Some(0), "a cursor beyond the range starts anew");
        pool.take(&block("10.244.0.0/23"));
        assert_eq!((pool.free(), pool.next_free(0), pool.next_free(3)), (0, None, None));
    }

    #[test]
    fn claims_of_another_size_take_what_they_touch() {
        for (claim, free) in [
            ("10.244.1.128/25", 15),
            ("10.244.1.7/32", 15),
            ("10.244.4.0/22", 12),
            ("10.0.0.0/8", 0),
            ("10.244.0.0/20", 0),
            ("10.245.0.0/24", 16),
            ("fd00::/16", 16),
        ] {
            let mut pool = Pool::new(block("10.244.0.0/20"), 24);
            pool.take(&block(claim));
            assert_eq!(pool.free(), free, "{claim}");
        }
    }

    #[test]
    fn a_pool_without_blocks_has_nothing_to_take() {
        for mut pool in [Pool::none(), Pool::new(block("10.244.0.0/26"), 24)] {
            pool.take(&block("10.244.0.0/24"));
            assert_eq!((pool.free(), pool.next_free(0)), (0, None));
        }
    }

    #[test]
    fn only_blocks_of_the_pools_size_have_an_index() {
        let pool = Pool::new(block("fd00:10:244::/56"), 64);
        assert_eq!(pool.index(&block("fd00:10:244:3::/64")), Some(3));
        for other in ["fd00:10:244:3::/65", "fd00:10:244::/63", "fd00:10:245::/64", "10.244.3.0/24"] {
            assert_eq!(pool.index(&block(other)), None, "{other}");
        }
        assert_eq!(Pool::new(block("10.244.0.0/24"), 16).total(), 0);
    }

    proptest! {
        #[test]
        fn a_pool_agrees_with_a_plain_set(
            claims in prop::collection::vec((0u32..0x1000, 20u8..=32), 0..40),
            cursor in 0u64..20,
        ) {
            let range = block("10.244.0.0/20");
            let mut pool = Pool::new(range, 24);
            let mut free: BTreeSet<u64> = (0..16).collect();
            for (offset, length) in claims {
                let address = std::net::IpAddr::V4((0x0af4_0000u32 + offset).into());
                let claim = Block::of(address, length).unwrap();
                pool.take(&claim);
                free.retain(|i| !range.subblock(24, *i).unwrap().overlaps(&claim));
                prop_assert_eq!(pool.free(), free.len() as u64);
            }
            for part in [0..16, 4..9, 8..16, 5..5] {
                let within = |i: &&u64| part.contains(*i);
                let start = if part.contains(&cursor) { cursor } else { part.start };
                let ahead = free.range(start..).find(within);
                let expected = ahead.or_else(|| free.iter().find(within)).copied();
                prop_assert_eq!(pool.next_free_in(&part, cursor), expected);
                prop_assert_eq!(pool.is_free(&part), part.clone().all(|i| free.contains(&i)));
            }
            prop_assert_eq!(pool.next_free(cursor), pool.next_free_in(&(0..16), cursor));
            prop_assert!(pool.taken().flatten().all(|i| !free.contains(&i)));
            prop_assert_eq!(pool.taken().map(|run| run.end - run.start).sum::<u64>(), 16 - pool.free());
        }
    }
}
