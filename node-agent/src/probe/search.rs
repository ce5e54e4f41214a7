//! The search for the largest packet that a path carries, by halving a list of common sizes: pure.

use plat_crds::block::Family;

/// What links and tunnels usually carry, in bytes: Ethernet and jumbo frames, and both less what PPPoE, GRE, IPIP,
/// VXLAN, WireGuard and IPsec take.
const COMMON: [u32; 24] = [
    576, 1000, 1280, 1300, 1350, 1380, 1400, 1410, 1420, 1430, 1440, 1450, 1454, 1460, 1472, 1476, 1480,
    1492, 1500, 2000, 4000, 8900, 8950, 9000,
];
/// So many losses of one size in a row count as an answer.
const TRIES: u8 = 2;

/// The smallest packet that a path must carry: less is no path MTU (RFC 8200 §5; for IPv4 what each host must be able to
/// receive, RFC 791).
pub fn floor(family: Family) -> u32 {
    match family {
        Family::IPv4 => 576,
        Family::IPv6 => 1280,
    }
}

/// The next common size below `size`, not below the family's floor.
pub fn below(family: Family, size: u32) -> Option<u32> {
    let fits = |candidate: &&u32| **candidate < size && **candidate >= floor(family);
    COMMON.iter().rev().find(fits).copied()
}

/// A search under way: all candidates at `low` and before pass, all from `high` on do not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Search {
    candidates: Vec<u32>,
    low: Option<usize>,
    high: usize,
    tries: u8,
}

/// How far a search is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A packet of this size tells more.
    Try(u32),
    /// The largest common size that passes; `None` if not even the smallest does.
    Found(Option<u32>),
}

impl Search {
    /// A search below `ceiling`, which does not pass.
    pub fn below(family: Family, ceiling: u32) -> Search {
        let fits = |size: &u32| *size >= floor(family) && *size < ceiling;
        let candidates: Vec<u32> = COMMON.into_iter().filter(fits).collect();
        Search { high: candidates.len(), candidates, low: None, tries: 0 }
    }

    /// Where it stands.
    pub fn progress(&self) -> Progress {
        match self.candidates.get(self.middle()) {
            Some(size) if self.middle() < self.high => Progress::Try(*size),
            _ => Progress::Found(self.low.and_then(|low| self.candidates.get(low)).copied()),
        }
    }

    /// Takes in whether the size under trial passed.
    pub fn tell(&mut self, passed: bool) -> Progress {
        let middle = self.middle();
        self.tries = if passed { 0 } else { self.tries + 1 };
        if passed {
            self.low = Some(middle);
        } else if self.tries >= TRIES {
            self.high = middle;
            self.tries = 0;
        }
        self.progress()
    }

    fn middle(&self) -> usize {
        let first = self.low.map_or(0, |low| low + 1);
        first + self.high.saturating_sub(first) / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn search(family: Family, ceiling: u32, carries: u32) -> (Option<u32>, usize) {
        let mut search = Search::below(family, ceiling);
        let mut packets = 0;
        loop {
            match search.progress() {
                Progress::Found(size) => return (size, packets),
                Progress::Try(size) => search.tell(size <= carries),
            };
            packets += 1;
            assert!(packets < 100, "it ends");
        }
    }

    #[test]
    fn it_finds_the_largest_common_size_that_passes() {
        for (family, ceiling, carries, found) in [
            (Family::IPv4, 1500, 1400, Some(1400)),
            (Family::IPv4, 1500, 1449, Some(1440)),
            (Family::IPv4, 9000, 1500, Some(1500)),
            (Family::IPv4, 1500, 600, Some(576)),
            (Family::IPv4, 1500, 500, None),
            (Family::IPv6, 1500, 1280, Some(1280)),
            (Family::IPv6, 1500, 1279, None),
            (Family::IPv6, 1280, 1000, None),
            (Family::IPv4, 0, 1500, None),
        ] {
            assert_eq!(search(family, ceiling, carries).0, found, "{family} {ceiling} {carries}");
        }
    }

    proptest! {
        #[test]
        fn it_takes_ten_packets_at_most(ceiling in 0u32..10_000, carries in 0u32..10_000) {
            let (found, packets) = search(Family::IPv4, ceiling, carries);
            prop_assert!(packets <= 10, "{}", packets);
            let best = COMMON.into_iter().filter(|size| *size < ceiling && *size <= carries).max();
            prop_assert_eq!(found, best);
        }
    }
}
