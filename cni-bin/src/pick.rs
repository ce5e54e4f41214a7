//! Which address comes next. Pure.
//!
//! Next-fit: the search starts behind the address that was handed out last and goes round, so a freed
//! address comes back as late as it can. Connections, caches and firewalls elsewhere may still speak of
//! the pod that had it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::ranges::{Range, RangeSet};

/// The next free address of a set, and its range; `None` if all are taken. `last` is the one handed out
/// last; if it is none of the set's, the search starts at the set's beginning.
pub fn pick(
    set: &RangeSet,
    last: Option<IpAddr>,
    is_taken: impl Fn(&IpAddr) -> bool,
) -> Option<(IpAddr, &Range)> {
    let ranges = &set.0;
    let held = |address: &IpAddr| ranges.iter().position(|r| contains(r, address));
    let start = last.and_then(|last| held(&last).map(|index| (index, last)));
    let (first_index, last) = match start {
        Some((index, last)) => (index, Some(last)),
        None => (0, None),
    };
    // The range of the last address from behind it, then every other range whole, then that range again
    // up to the last address.
    let rotated = ranges.iter().cycle().skip(first_index).take(ranges.len() + 1);
    for (turn, range) in rotated.enumerate() {
        let from = match (turn, last) {
            (0, Some(last)) => match next(last).filter(|n| *n <= range.last) {
                Some(next) => next,
                None => continue,
            },
            _ => range.first,
        };
        let to = match (turn == ranges.len(), last) {
            (true, Some(last)) => last,
            (true, None) => break,
            _ => range.last,
        };
        if let Some(found) = first_free(range, from, to, &is_taken) {
            return Some((found, range));
        }
    }
    None
}

fn contains(range: &Range, address: &IpAddr) -> bool {
    address.is_ipv4() == range.first.is_ipv4() && (range.first..=range.last).contains(address)
}

fn first_free(range: &Range, from: IpAddr, to: IpAddr, is_taken: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
    let mut candidate = from;
    while candidate <= to {
        if range.leases(&candidate) && !is_taken(&candidate) {
            return Some(candidate);
        }
        candidate = next(candidate)?;
    }
    None
}

fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|n| Ipv4Addr::from(n).into()),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|n| Ipv6Addr::from(n).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn range(a: u8, first: u8, last: u8) -> Range {
        let address = |d| IpAddr::from([10, 0, a, d]);
        Range {
            subnet: format!("10.0.{a}.0/24").parse().unwrap(),
            first: address(first),
            last: address(last),
            gateway: address(1),
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_search_goes_on_behind_the_last_one_and_round() {
        let set = RangeSet(vec![range(0, 1, 4), range(1, 7, 8)]);
        let taken: BTreeSet<IpAddr> = [ip("10.0.0.3")].into();
        let after = |last: Option<&str>| {
            pick(&set, last.map(ip), |a| taken.contains(a)).map(|(a, _)| a.to_string()).unwrap()
        };
        assert_eq!(after(None), "10.0.0.2", "the gateway is skipped");
        assert_eq!(after(Some("10.0.0.2")), "10.0.0.4", "what is taken is skipped");
        assert_eq!(after(Some("10.0.0.4")), "10.0.1.7", "on into the next range");
        assert_eq!(after(Some("10.0.1.8")), "10.0.0.2", "and round");
        assert_eq!(after(Some("192.0.2.1")), "10.0.0.2", "a foreign one starts over");
    }

    #[test]
    fn the_last_one_itself_comes_back_when_nothing_else_is_free() {
        let set = RangeSet(vec![range(0, 2, 4)]);
        assert_eq!(pick(&set, Some(ip("10.0.0.3")), |a| *a != ip("10.0.0.3")).unwrap().0, ip("10.0.0.3"));
        assert_eq!(pick(&set, Some(ip("10.0.0.3")), |_| true), None);
        assert_eq!(pick(&RangeSet(vec![]), None, |_| false), None);
    }

    #[test]
    fn the_end_of_the_address_space_is_no_trap() {
        let last = IpAddr::from([255, 255, 255, 255]);
        let set = RangeSet(vec![Range {
            subnet: "255.255.255.0/24".parse().unwrap(),
            first: IpAddr::from([255, 255, 255, 254]),
            last,
            gateway: IpAddr::from([255, 255, 255, 1]),
        }]);
        assert_eq!(pick(&set, None, |a| *a != last).unwrap().0, last);
        assert_eq!(pick(&set, Some(last), |_| true), None);
    }

    proptest! {
        #[test]
        fn a_free_address_is_found_exactly_if_there_is_one(
            spans in proptest::collection::vec((1u8..20, 0u8..20), 1..4),
            taken in proptest::collection::btree_set((0u8..4, 0u8..40), 0..60),
            last in proptest::option::of((0u8..5, 0u8..45)),
        ) {
            let set = RangeSet(spans.iter().enumerate()
                .map(|(i, (first, length))| range(i as u8, *first, first + length)).collect());
            let taken: BTreeSet<IpAddr> = taken.iter().map(|(a, d)| IpAddr::from([10, 0, *a, *d])).collect();
            let last = last.map(|(a, d)| IpAddr::from([10, 0, a, d]));
            let all: Vec<IpAddr> = (0..4u8).flat_map(|a| (0..=255u8).map(move |d| IpAddr::from([10, 0, a, d]))).collect();
            let free: Vec<&IpAddr> =
                all.iter().filter(|a| set.range_of(a).is_some() && !taken.contains(a)).collect();
            let picked = pick(&set, last, |a| taken.contains(a));
            match picked {
                None => prop_assert!(free.is_empty(), "{free:?}"),
                Some((address, range)) => {
                    prop_assert!(free.contains(&&address));
                    prop_assert!(range.leases(&address));
                    // Nothing free lies between the last one and the picked one, going round.
                    if let Some(last) = last.filter(|l| set.0.iter().any(|r| contains(r, l))) {
                        let distance = |a: &IpAddr| (a <= &last, *a);
                        let nearest = free.iter().min_by_key(|a| distance(a)).unwrap();
                        prop_assert_eq!(**nearest, address);
                    }
                }
            }
        }

        #[test]
        fn taking_all_one_by_one_hands_out_each_once(first in 1u8..200, length in 0u8..50) {
            let set = RangeSet(vec![range(0, first, first.saturating_add(length))]);
            let mut taken = BTreeSet::new();
            let mut last = None;
            while let Some((address, _)) = pick(&set, last, |a| taken.contains(a)) {
                prop_assert!(taken.insert(address));
                last = Some(address);
            }
            prop_assert_eq!(taken.len() as u64, set.0[0].capacity());
        }
    }
}
