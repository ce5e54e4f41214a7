//! The cluster-wide write budget of statuses, as a token bucket. Pure.
//!
//! Each PodCIDR status write is one watch event for every agent, so n nodes cost n² events: the budget, not
//! the speed of the API server, says how fast statuses follow.

use std::time::Duration;

/// A bucket of write permits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    per_second: f64,
    capacity: f64,
    tokens: f64,
    filled_at: Duration,
}

impl Budget {
    /// A full bucket that refills at `per_second` and holds one second's worth.
    pub fn new(per_second: u32) -> Budget {
        let rate = f64::from(per_second);
        Budget { per_second: rate, capacity: rate, tokens: rate, filled_at: Duration::ZERO }
    }

    /// Takes up to `wanted` permits at the time `now`; answers how many were there.
    pub fn take(&mut self, now: Duration, wanted: usize) -> usize {
        let elapsed = now.saturating_sub(self.filled_at).as_secs_f64();
        self.filled_at = self.filled_at.max(now);
        self.tokens = (self.tokens + elapsed * self.per_second).min(self.capacity);
        let mut taken = 0;
        while taken < wanted && self.tokens >= 1.0 {
            self.tokens -= 1.0;
            taken += 1;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_one_seconds_worth_and_the_rest_follows_at_the_rate() {
        let mut budget = Budget::new(50);
        let at = Duration::from_millis;
        assert_eq!(budget.take(at(0), 2000), 50);
        assert_eq!(budget.take(at(10), 2000), 0);
        assert_eq!(budget.take(at(100), 2000), 5);
        assert_eq!(budget.take(at(100), 2000), 0);
        assert_eq!(budget.take(at(99_000), 10), 10);
        assert_eq!(budget.take(at(99_000), 2000), 40);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let mut budget = Budget::new(10);
        assert_eq!(budget.take(Duration::from_secs(5), 99), 10);
        assert_eq!(budget.take(Duration::from_secs(1), 99), 0);
        assert_eq!(budget.take(Duration::from_secs(6), 99), 10);
    }
}
