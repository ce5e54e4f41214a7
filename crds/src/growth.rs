//! When a node needs one more block: the watermark that agents report at and the operator carves at.
//!
//! A node asks early enough for the next pods of a burst: a block takes well under a second from the report
//! to the first lease, so a fifth of a block is room for many. Small blocks ask at half, so that one that has
//! just been carved never asks for the next.

/// Free addresses below which a node asks, unless a fifth of a block is more.
const MIN_FREE: u64 = 16;

/// The free addresses, over all its `Active` blocks of one family, below which a node gets another block.
/// `capacity` is that of its largest.
fn watermark(capacity: u32) -> u64 {
    let capacity = u64::from(capacity);
    MIN_FREE.max(capacity / 5).min(capacity.div_ceil(2))
}

/// Whether a node needs one more block of a family, given the used addresses and the capacity of each of its
/// `Active` blocks of that family. Without any block it needs its first, which is not this question: `false`.
pub fn wants_block(blocks: impl IntoIterator<Item = (u32, u32)>) -> bool {
    let (free, watermark) = room(blocks);
    free < watermark
}

/// Whether a node with these blocks alone does well enough to give back others that are empty: half as much
/// again is free as the watermark asks for, so that a few pods more do not ask for a block at once.
pub fn spares_others(blocks: impl IntoIterator<Item = (u32, u32)>) -> bool {
    let (free, watermark) = room(blocks);
    free > 0 && free.saturating_mul(2) >= watermark.saturating_mul(3)
}

/// Free addresses of these blocks, and the watermark below which a node with them gets another one.
pub fn room(blocks: impl IntoIterator<Item = (u32, u32)>) -> (u64, u64) {
    let (mut free, mut largest) = (0u64, 0);
    for (used, capacity) in blocks {
        free += u64::from(capacity.saturating_sub(used));
        largest = capacity.max(largest);
    }
    (free, watermark(largest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_asks_for_a_block_before_it_is_full() {
        for (blocks, wants) in [
            (&[][..], false),
            (&[(0, 253)], false),
            (&[(203, 253)], false),
            (&[(204, 253)], true),
            (&[(253, 253), (0, 253)], false),
            (&[(253, 253), (204, 253)], true),
            (&[(300, 253)], true),
            (&[(45, 61)], false),
            (&[(46, 61)], true),
            (&[(61, 61), (203, 253)], false),
            (&[(61, 61), (204, 253)], true),
            (&[(53_000, 65_533)], true),
            (&[(0, 13)], false),
            (&[(7, 13)], true),
            (&[(0, 1)], false),
            (&[(1, 1)], true),
            (&[(u32::MAX, u32::MAX), (0, u32::MAX)], false),
        ] {
            assert_eq!(wants_block(blocks.iter().copied()), wants, "{blocks:?}");
        }
    }

    #[test]
    fn a_node_gives_back_only_what_it_will_not_ask_for_at_once() {
        for (rest, spares) in [
            (&[][..], false),
            (&[(178, 253)], true),
            (&[(179, 253)], false),
            (&[(3, 13)], false),
            (&[(2, 13)], true),
            (&[(0, 1)], false),
            (&[(0, 1), (0, 1)], true),
        ] {
            assert_eq!(spares_others(rest.iter().copied()), spares, "{rest:?}");
            assert!(!spares || !wants_block(rest.iter().copied()), "{rest:?}");
        }
    }

    #[test]
    fn a_new_block_of_any_size_does_not_ask_for_the_next() {
        for capacity in 1..=65_533 {
            assert!(!wants_block([(capacity, capacity), (0, capacity)]), "{capacity}");
            assert!(wants_block([(capacity, capacity)]), "{capacity}");
        }
    }
}
