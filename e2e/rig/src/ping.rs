//! Counting lost datagrams: the ledger of `probe ping`, without a socket or a clock.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What `probe ping` prints at its end, as one line of JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams that came back.
    pub received: u64,
    /// Datagrams that did not, or that could not be sent (an unreachable route answers at once).
    pub lost: u64,
    /// The longest run of lost datagrams in a row.
    pub longest_gap: u64,
    /// The slowest round trip, in microseconds.
    pub slowest_us: u64,
    /// When (in ms after the start) the first few lost ones were sent; at most 20.
    pub lost_at_ms: Vec<u64>,
}

/// Which datagrams are out and which came back.
#[derive(Debug, Default)]
pub struct Ledger {
    next: u64,
    /// Number → time sent, in microseconds after the start.
    out: BTreeMap<u64, u64>,
    received: u64,
    slowest_us: u64,
}

impl Ledger {
    /// The next datagram goes out at `now_us`; returns its number.
    pub fn sent(&mut self, now_us: u64) -> u64 {
        let number = self.next;
        self.next += 1;
        self.out.insert(number, now_us);
        number
    }

    /// Datagram `number` came back at `now_us`. Doubles and numbers never sent are ignored.
    pub fn came_back(&mut self, number: u64, now_us: u64) {
        if let Some(sent) = self.out.remove(&number) {
            self.received += 1;
            self.slowest_us = self.slowest_us.max(now_us.saturating_sub(sent));
        }
    }

    /// Whether nothing is out.
    pub fn is_settled(&self) -> bool {
        self.out.is_empty()
    }

    /// The report, in which everything that is still out is lost.
    pub fn report(&self) -> Report {
        let mut longest = 0;
        let mut run = 0;
        let mut last = None;
        for number in self.out.keys() {
            run = if last.is_some_and(|l| l + 1 == *number) { run + 1 } else { 1 };
            last = Some(*number);
            longest = longest.max(run);
        }
        Report {
            sent: self.next,
            received: self.received,
            lost: self.out.len() as u64,
            longest_gap: longest,
            slowest_us: self.slowest_us,
            lost_at_ms: self.out.values().take(20).map(|us| us / 1000).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_comes_back_is_lost_and_runs_are_counted() {
        let mut ledger = Ledger::default();
        for i in 0..10 {
            assert_eq!(ledger.sent(i * 1000), i);
        }
        for back in [0, 3, 4, 8, 8, 99] {
            ledger.came_back(back, back * 1000 + 70);
        }
        let report = ledger.report();
        assert_eq!((report.sent, report.received, report.lost, report.longest_gap), (10, 4, 6, 3));
        assert_eq!(report.slowest_us, 70);
        assert_eq!(report.lost_at_ms, [1, 2, 5, 6, 7, 9]);
        assert!(!ledger.is_settled());
    }

    #[test]
    fn late_is_not_lost() {
        let mut ledger = Ledger::default();
        ledger.sent(0);
        ledger.sent(1000);
        ledger.came_back(1, 2000);
        ledger.came_back(0, 3_000_000);
        assert!(ledger.is_settled());
        assert_eq!(ledger.report().lost, 0);
    }
}
