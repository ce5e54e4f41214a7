//! When to stop answering blow by blow: another program that keeps undoing what this agent puts back. Pure.
//!
//! Every time something is put back takes a token. There are [`BURST`] of them, and a new one every [`REFILL`]; once
//! they are used up, what the kernel or a file tells waits for the next one. So a slip or a flush is answered at once,
//! and a fight costs both sides a bounded rate of changes. News of objects, links and addresses never wait.

use std::time::Duration;

/// So often in a row something is put back at once.
pub const BURST: u32 = 40;
/// Once that is used up, something is put back once in this time.
pub const REFILL: Duration = Duration::from_millis(500);
/// A fight is over when so many tokens are there again: 10 s of peace.
const PEACE: u32 = BURST / 2;

/// The tokens, and whether a fight is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fight {
    /// When the bucket will be full again, on `CLOCK_BOOTTIME`.
    full_at: Duration,
    on: bool,
}

impl Default for Fight {
    fn default() -> Fight {
        Fight { full_at: Duration::ZERO, on: false }
    }
}

impl Fight {
    /// Tokens that are missing at `now`, in time.
    fn missing(&self, now: Duration) -> Duration {
        self.full_at.saturating_sub(now)
    }

    /// Notes at `now` that something was put back. Returns whether that begins a fight.
    pub fn repaired(&mut self, now: Duration) -> bool {
        // No deeper than empty: what is put back on the way of other news is not waited for later.
        let missing = (self.missing(now) + REFILL).min(REFILL * BURST);
        self.full_at = now + missing;
        let empty = missing + REFILL > REFILL * BURST;
        let begins = empty && !self.on;
        self.on |= empty;
        begins
    }

    /// When something may be put back next; it may be past.
    pub fn may_at(&self) -> Duration {
        (self.full_at + REFILL).saturating_sub(REFILL * BURST)
    }

    /// Whether a fight is on at `now`; ends it after enough peace.
    pub fn is_on(&mut self, now: Duration) -> bool {
        self.on &= now < self.peace_at();
        self.on
    }

    /// When the fight will be over if nothing comes any more; `None` without a fight.
    pub fn ends_at(&self) -> Option<Duration> {
        self.on.then(|| self.peace_at())
    }

    fn peace_at(&self) -> Duration {
        self.full_at.saturating_sub(REFILL * PEACE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: Duration = Duration::from_secs(1000);

    #[test]
    fn a_burst_is_answered_at_once_and_then_the_rate_is_bounded() {
        let mut fight = Fight::default();
        let mut now = START;
        for n in 1..BURST {
            assert!(fight.may_at() <= now);
            assert_eq!((fight.repaired(now), fight.is_on(now)), (false, false), "{n}");
        }
        assert!(fight.may_at() <= now);
        assert!(fight.repaired(now), "it begins");
        for _ in 0..5 {
            assert_eq!(fight.may_at(), now + REFILL);
            now = fight.may_at();
            assert!(!fight.repaired(now) && fight.is_on(now), "it begins once");
        }
    }

    #[test]
    fn it_is_over_after_ten_seconds_of_peace_and_can_begin_again() {
        let mut fight = Fight::default();
        for _ in 0..BURST {
            fight.repaired(START);
        }
        let over = fight.ends_at().unwrap();
        assert_eq!(over, START + Duration::from_secs(10));
        assert!(fight.is_on(over - Duration::from_millis(1)));
        assert!(!fight.is_on(over));
        assert_eq!(fight.ends_at(), None);
        let again = (0..BURST).filter(|_| fight.repaired(over)).count();
        assert_eq!(again, 1);
    }

    #[test]
    fn one_that_comes_as_slowly_as_the_refill_is_never_a_fight() {
        let mut fight = Fight::default();
        for n in 0..1000 {
            assert!(!fight.repaired(START + REFILL * n));
        }
    }

    proptest! {
        #[test]
        fn whoever_waits_as_told_puts_back_no_more_than_burst_and_rate(
            pauses in prop::collection::vec(0u64..700, 1..300),
        ) {
            let (mut fight, mut now, mut count) = (Fight::default(), START, 0u32);
            for pause in pauses {
                now = (now + Duration::from_millis(pause)).max(fight.may_at());
                fight.repaired(now);
                count += 1;
                let allowed = BURST + 1 + u32::try_from((now - START).as_millis() / REFILL.as_millis()).unwrap();
                prop_assert!(count <= allowed);
            }
        }
    }
}
