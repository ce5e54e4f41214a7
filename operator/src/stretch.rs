//! Aligned stretches of blocks: what one prefix can name. Pure arithmetic on indexes.

use std::ops::Range;

/// 2^`level` blocks by index, the first one a multiple of that: exactly what one prefix covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stretch {
    first: u64,
    level: u32,
}

/// No range has more blocks than a `u64` counts.
const HIGHEST_LEVEL: u32 = 62;

impl Stretch {
    /// The stretch of one block.
    pub fn single(index: u64) -> Stretch {
        Stretch { first: index, level: 0 }
    }

    /// The smallest stretch that holds both blocks.
    pub fn over(one: u64, other: u64) -> Stretch {
        let level = (u64::BITS - (one ^ other).leading_zeros()).min(HIGHEST_LEVEL);
        Stretch { first: one >> level << level, level }
    }

    /// The largest stretch around a block that leaves `room` nowhere; `room` holds the block.
    pub fn largest_around(index: u64, room: &Range<u64>) -> Stretch {
        let mut stretch = Stretch::single(index);
        while stretch.level < HIGHEST_LEVEL && stretch.parent().lies_in(room) {
            stretch = stretch.parent();
        }
        stretch
    }

    /// Index of its first block.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Power of two of the number of its blocks.
    pub fn level(&self) -> u32 {
        self.level
    }

    /// Its blocks.
    pub fn span(&self) -> Range<u64> {
        self.first..self.first.saturating_add(1 << self.level)
    }

    /// The other half of the stretch of twice the size.
    pub fn buddy(&self) -> Stretch {
        Stretch { first: self.first ^ (1 << self.level), level: self.level }
    }

    /// The stretch of twice the size that it is a half of.
    pub fn parent(&self) -> Stretch {
        let level = self.level + 1;
        Stretch { first: self.first >> level << level, level }
    }

    fn lies_in(&self, room: &Range<u64>) -> bool {
        let span = self.span();
        room.start <= span.start && span.end <= room.end
    }
}

/// The fewest stretches that make up `room`, in order: at most two of each size.
pub fn parts(room: Range<u64>) -> impl Iterator<Item = Stretch> {
    let mut next = room.start;
    std::iter::from_fn(move || {
        let length = room.end.checked_sub(next).filter(|length| *length > 0)?;
        let level = next.trailing_zeros().min(length.ilog2()).min(HIGHEST_LEVEL);
        let part = Stretch { first: next, level };
        next = part.span().end;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn halves_make_a_whole() {
        let one = Stretch::over(4, 5);
        assert_eq!((one.first(), one.level(), one.span()), (4, 1, 4..6));
        assert_eq!((one.buddy().span(), one.parent().span()), (6..8, 4..8));
        assert_eq!((one.buddy().buddy(), one.buddy().parent()), (one, one.parent()));
        assert_eq!(Stretch::over(7, 8).span(), 0..16);
        assert_eq!(Stretch::over(9, 9), Stretch::single(9));
        assert_eq!(Stretch::largest_around(5, &(4..12)).span(), 4..8);
        assert_eq!(Stretch::largest_around(5, &(5..12)).span(), 5..6);
    }

    #[test]
    fn the_ends_of_numbers_are_no_trouble() {
        let all = Stretch::over(0, u64::MAX);
        assert_eq!(all.level(), HIGHEST_LEVEL);
        assert_eq!(Stretch::largest_around(9, &(0..u64::MAX)).level(), HIGHEST_LEVEL);
        assert_eq!(Stretch::single(u64::MAX).span().end, u64::MAX);
        assert!(parts(0..u64::MAX).count() < 130);
    }

    proptest! {
        #[test]
        fn parts_are_aligned_adjacent_and_few(start in 0u64..5000, length in 0u64..5000) {
            let room = start..start + length;
            let mut at = room.start;
            for part in parts(room.clone()) {
                prop_assert_eq!(part.span().start, at);
                prop_assert_eq!(at % (1 << part.level()), 0);
                prop_assert_eq!(Stretch::largest_around(at, &room), part);
                at = part.span().end;
            }
            prop_assert_eq!(at, room.end);
            prop_assert!(parts(room).count() <= 2 * 13);
        }

        #[test]
        fn the_stretch_over_two_blocks_is_the_smallest_that_holds_both(one in 0u64..5000, other in 0u64..5000) {
            let over = Stretch::over(one, other);
            prop_assert!(over.span().contains(&one) && over.span().contains(&other));
            if over.level() > 0 {
                let (low, high) = (one.min(other), one.max(other));
                prop_assert!(low < over.first() + (1 << (over.level() - 1)));
                prop_assert!(high >= over.first() + (1 << (over.level() - 1)));
            }
        }
    }
}
