//! Bytes of which some bits may be unknown: what a register holds while a ruleset is judged.

use std::cmp::Ordering;

/// One byte, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Byte {
    value: u8,
    known: u8,
}

impl Byte {
    /// Nothing is known of it.
    pub const UNKNOWN: Byte = Byte { value: 0, known: 0 };

    /// Wholly known.
    pub const fn new(value: u8) -> Byte {
        Byte { value, known: 0xff }
    }

    /// Known where `known` has ones.
    pub const fn partly(value: u8, known: u8) -> Byte {
        Byte { value: value & known, known }
    }

    /// The value, if all of it is known.
    pub fn get(self) -> Option<u8> {
        (self.known == 0xff).then_some(self.value)
    }

    /// `self & mask ^ xor`
    pub fn masked(self, mask: u8, xor: u8) -> Byte {
        Byte { value: (self.value & mask) ^ xor, known: self.known | !mask }
    }

    /// What is the same in both.
    pub fn common(self, other: Byte) -> Byte {
        Byte::partly(self.value, self.known & other.known & !(self.value ^ other.value))
    }

    fn can_be(self, value: u8) -> bool {
        (self.value ^ value) & self.known == 0
    }
}

/// Known bytes.
pub fn known(bytes: &[u8]) -> Vec<Byte> {
    bytes.iter().copied().map(Byte::new).collect()
}

/// The answer to a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It holds.
    Yes,
    /// It does not.
    No,
    /// What is known does not tell.
    Unknown,
}

impl Answer {
    /// Yes for `true`.
    pub fn of(holds: bool) -> Answer {
        if holds { Answer::Yes } else { Answer::No }
    }

    /// The opposite, if `turn`.
    pub fn turned(self, turn: bool) -> Answer {
        match (self, turn) {
            (Answer::Yes, true) => Answer::No,
            (Answer::No, true) => Answer::Yes,
            (answer, _) => answer,
        }
    }

    /// Whether both hold.
    pub fn and(self, other: Answer) -> Answer {
        match (self, other) {
            (Answer::No, _) | (_, Answer::No) => Answer::No,
            (Answer::Yes, Answer::Yes) => Answer::Yes,
            _ => Answer::Unknown,
        }
    }
}

/// Whether the bytes are these.
pub fn equal(bytes: &[Byte], value: &[u8]) -> Answer {
    if bytes.len() != value.len() {
        return Answer::Unknown;
    }
    let pairs = || bytes.iter().zip(value);
    if pairs().any(|(byte, value)| !byte.can_be(*value)) {
        Answer::No
    } else if pairs().all(|(byte, _)| byte.known == 0xff) {
        Answer::Yes
    } else {
        Answer::Unknown
    }
}

/// How the bytes compare with these, as numbers in network byte order; `None` if what is known does not tell.
pub fn order(bytes: &[Byte], value: &[u8]) -> Option<Ordering> {
    if bytes.len() != value.len() {
        return None;
    }
    for (byte, value) in bytes.iter().zip(value) {
        match byte.get()?.cmp(value) {
            Ordering::Equal => {}
            differs => return Some(differs),
        }
    }
    Some(Ordering::Equal)
}

/// Whether the bytes lie between these, both included.
pub fn within(bytes: &[Byte], low: &[u8], high: &[u8]) -> Answer {
    match (order(bytes, low), order(bytes, high)) {
        (Some(low), Some(high)) => Answer::of(low != Ordering::Less && high != Ordering::Greater),
        _ => Answer::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_decides_nothing_and_one_bit_that_differs_decides() {
        let half = [Byte::new(1), Byte::partly(0x20, 0xf0)];
        assert_eq!(equal(&half, &[1, 0x2f]), Answer::Unknown);
        assert_eq!(equal(&half, &[1, 0x3f]), Answer::No);
        assert_eq!(equal(&half, &[2, 0x2f]), Answer::No);
        assert_eq!(equal(&half.map(|byte| byte.masked(0xf0, 0)), &[0, 0x20]), Answer::Yes);
        assert_eq!(order(&half, &[2, 0]), Some(Ordering::Less));
        assert_eq!(order(&half, &[1, 0x20]), None);
        assert_eq!(within(&known(&[5]), &[5], &[7]), Answer::Yes);
        assert_eq!(within(&known(&[8]), &[5], &[7]), Answer::No);
        assert_eq!(Byte::new(0b1100).common(Byte::new(0b1010)), Byte::partly(0b1000, 0b1111_1001));
    }
}
