//! What an agent has put into the kernel, in one number that the operator can compare.
//!
//! The digest is a sum modulo 2^64 over the (uid, generation) of every object whose effect is in the
//! kernel, so order does not matter and one object's change costs one subtraction and one addition.
//! resourceVersions would not do: they move with every status write, are ordered within one kind only, go
//! back when etcd is restored, and say what was seen rather than what was applied.

use std::fmt;
use std::str::FromStr;

/// A sum over objects; 0 for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Digest(u64);

impl Digest {
    /// Adds one object.
    pub fn add(&mut self, uid: &str, generation: i64) {
        self.0 = self.0.wrapping_add(hash(uid, generation));
    }

    /// Takes one object out.
    pub fn remove(&mut self, uid: &str, generation: i64) {
        self.0 = self.0.wrapping_sub(hash(uid, generation));
    }

    /// The digest of a set of (uid, generation).
    pub fn of<'a>(objects: impl IntoIterator<Item = (&'a str, i64)>) -> Digest {
        let mut digest = Digest::default();
        for (uid, generation) in objects {
            digest.add(uid, generation);
        }
        digest
    }
}

/// FNV-1a over the text, then the finalizer of SplitMix64, as sums need bits that are spread evenly.
fn hash(uid: &str, generation: i64) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    for byte in uid.bytes().chain(generation.to_be_bytes()) {
        h = (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    h = (h ^ (h >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h = (h ^ (h >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    h ^ (h >> 31)
}

impl fmt::Display for Digest {
    /// 16 hex digits: a number of more than 53 bits does not survive JSON.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Digest {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Digest, Self::Err> {
        u64::from_str_radix(text, 16).map(Digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn order_does_not_matter_and_removal_undoes(mut objects in prop::collection::vec(("[a-f0-9-]{1,36}", 0i64..99), 0..20)) {
            let whole = Digest::of(objects.iter().map(|(u, g)| (u.as_str(), *g)));
            objects.reverse();
            prop_assert_eq!(Digest::of(objects.iter().map(|(u, g)| (u.as_str(), *g))), whole);
            let mut rest = whole;
            for (uid, generation) in &objects {
                rest.remove(uid, *generation);
            }
            prop_assert_eq!(rest, Digest::default());
            prop_assert_eq!(whole.to_string().parse::<Digest>().unwrap(), whole);
        }
    }

    #[test]
    fn the_text_is_stable_across_versions() {
        assert_eq!(Digest::of([("7c9e6679-7425-40de-944b-e07fc1f90ae7", 3)]).to_string(), "8b88bd8729bce445");
    }
}
