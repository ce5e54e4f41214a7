//! The cluster-wide write budget of statuses, as a token bucket. Pure.
//!
//! Each PodCIDR status write is one watch event for every agent, so n nodes cost n² events: the budget, not
//! the speed of the API server, says how fast statuses follow. docs/scale.md has the formula.

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
    pub fn new(per_second: f64) -> Budget {
        let capacity = per_second.max(1.0);
        Budget { per_second, capacity, tokens: capacity, filled_at: Duration::ZERO }
    }

    /// Refills at another rate from `now` on.
    pub fn set_rate(&mut self, now: Duration, per_second: f64) {
        if per_second != self.per_second {
            self.fill(now);
            (self.per_second, self.capacity) = (per_second, per_second.max(1.0));
            self.tokens = self.tokens.min(self.capacity);
        }
    }

    /// Takes up to `wanted` permits at the time `now`; answers how many were there.
    pub fn take(&mut self, now: Duration, wanted: usize) -> usize {
        self.fill(now);
        let mut taken = 0;
        while taken < wanted && self.tokens >= 1.0 {
            self.tokens -= 1.0;
            taken += 1;
        }
        taken
    }

    /// Spends one large permit, if any is left: what it costs more than is there is owed, and comes off what follows.
    pub fn spend(&mut self, now: Duration, cost: f64) -> bool {
        self.fill(now);
        let may = self.tokens >= 1.0;
        if may {
            self.tokens -= cost;
        }
        may
    }

    fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.filled_at).as_secs_f64();
        self.filled_at = self.filled_at.max(now);
        self.tokens = (self.tokens + elapsed * self.per_second).min(self.capacity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_one_seconds_worth_and_the_rest_follows_at_the_rate() {
        let mut budget = Budget::new(50.0);
        let at = Duration::from_millis;
        assert_eq!(budget.take(at(0), 2000), 50);
        assert_eq!(budget.take(at(10), 2000), 0);
        assert_eq!(budget.take(at(100), 2000), 5);
        assert_eq!(budget.take(at(100), 2000), 0);
        assert_eq!(budget.take(at(99_000), 10), 10);
        assert_eq!(budget.take(at(99_000), 2000), 40);
    }

    #[test]
    fn a_new_rate_holds_from_then_on_and_may_be_below_one() {
        let mut budget = Budget::new(50.0);
        let at = Duration::from_secs;
        assert_eq!(budget.take(at(0), 50), 50);
        budget.set_rate(at(1), 0.5);
        assert_eq!(budget.take(at(1), 99), 1, "what was saved up is cut");
        assert_eq!(budget.take(at(2), 99), 0);
        assert_eq!(budget.take(at(3), 99), 1);
    }

    #[test]
    fn what_is_owed_is_paid_back_before_anything_else() {
        let mut budget = Budget::new(1.0);
        let at = Duration::from_secs;
        assert!(budget.spend(at(0), 5.0));
        assert!(!budget.spend(at(4), 5.0));
        assert_eq!(budget.take(at(4), 9), 0);
        assert_eq!(budget.take(at(5), 9), 1);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let mut budget = Budget::new(10.0);
        assert_eq!(budget.take(Duration::from_secs(5), 99), 10);
        assert_eq!(budget.take(Duration::from_secs(1), 99), 0);
        assert_eq!(budget.take(Duration::from_secs(6), 99), 10);
    }
}
