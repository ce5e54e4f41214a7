//! A block of pod addresses: the unit that the operator hands to nodes and the CNI binary leases from.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// The host number of the gateway in every block (`10.244.3.0/24` → `10.244.3.1`).
pub const GATEWAY_HOST: u32 = 1;
/// IPv6 blocks lease only their first host numbers, up to this one: no node runs more pods, and a lease
/// store stays small.
pub const MAX_HOST_V6: u32 = 65_534;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const ALL: [Family; 2] = [Family::IPv4, Family::IPv6];

    /// The family of an address.
    pub fn of(address: &IpAddr) -> Family {
        if address.is_ipv4() { Family::IPv4 } else { Family::IPv6 }
    }

    /// Length of an address in bits: 32 or 128.
    pub fn bits(self) -> u8 {
        match self {
            Family::IPv4 => 32,
            Family::IPv6 => 128,
        }
    }

    /// Prefix length of the blocks of a ClusterCIDR that does not say: 24 or 64.
    pub fn default_block_prefix(self) -> u8 {
        match self {
            Family::IPv4 => 24,
            Family::IPv6 => 64,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::IPv4 => "IPv4",
            Family::IPv6 => "IPv6",
        })
    }
}

/// A prefix without host bits, whose text is canonical (RFC 5952 for IPv6).
///
/// One block has exactly one text and one object name, which is what makes the API server's name
/// uniqueness an allocation lock.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Block(IpNet);

/// Why a text is not a block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseBlockError {
    /// Not `address/length` at all.
    #[error("'{0}' is not a CIDR such as 10.244.3.0/24 or fd00:10:244:3::/64")]
    NotCidr(String),
    /// Bits are set behind the prefix.
    #[error("'{0}' has host bits set; the block is {1}")]
    HostBits(String, IpNet),
    /// The same block has another, canonical text.
    #[error("'{0}' is not in canonical form; write {1}")]
    NotCanonical(String, IpNet),
}

impl Block {
    /// The block of that prefix; host bits are cleared.
    pub fn containing(net: IpNet) -> Block {
        Block(net.trunc())
    }

    /// The block of `prefix_length` bits that holds `address`; `None` if the length exceeds the family's.
    pub fn of(address: IpAddr, prefix_length: u8) -> Option<Block> {
        IpNet::new(address, prefix_length).ok().map(Block::containing)
    }

    /// The prefix.
    pub fn net(&self) -> IpNet {
        self.0
    }

    /// The family.
    pub fn family(&self) -> Family {
        Family::of(&self.0.addr())
    }

    /// The first address (host number 0).
    pub fn network(&self) -> IpAddr {
        self.0.addr()
    }

    /// Number of prefix bits.
    pub fn prefix_length(&self) -> u8 {
        self.0.prefix_len()
    }

    /// Whether an address lies in the block.
    pub fn contains(&self, address: &IpAddr) -> bool {
        self.0.contains(address)
    }

    /// Whether `other` lies wholly in this block (equal blocks do).
    pub fn covers(&self, other: &Block) -> bool {
        self.0.contains(&other.0)
    }

    /// Whether the two share an address.
    pub fn overlaps(&self, other: &Block) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// The name of its PodCIDR object: `10.244.3.0/24` → `10-244-3-0-24`, `fd00:10:244:3::/64` →
    /// `fd00-10-244-3---64`.
    pub fn object_name(&self) -> String {
        self.to_string().replace(['.', ':', '/'], "-")
    }

    /// The gateway: host number 1. A block of one address (/32, /128) is its own gateway.
    pub fn gateway(&self) -> IpAddr {
        self.host(GATEWAY_HOST).unwrap_or_else(|| self.network())
    }

    /// The address with that host number; `None` beyond the block.
    pub fn host(&self, number: u32) -> Option<IpAddr> {
        let size = self.address_count();
        (u128::from(number) < size).then(|| offset(self.network(), u128::from(number)))
    }

    /// The host number of an address; `None` outside the block or beyond `u32`.
    pub fn host_number(&self, address: &IpAddr) -> Option<u32> {
        if !self.contains(address) {
            return None;
        }
        u32::try_from(to_int(*address) - to_int(self.network())).ok()
    }

    /// The last host number that may be leased: not the IPv4 broadcast address, at most
    /// [`MAX_HOST_V6`] for IPv6. 0 if there is none.
    pub fn last_host(&self) -> u32 {
        let last = self.address_count().saturating_sub(1);
        let last = match self.family() {
            Family::IPv4 => last.saturating_sub(1),
            Family::IPv6 => last.min(u128::from(MAX_HOST_V6)),
        };
        u32::try_from(last).unwrap_or(u32::MAX)
    }

    /// Number of pods the block can hold: host numbers 2 to [`Block::last_host`], as 0 is the network (or
    /// the subnet-router anycast address, RFC 4291 §2.6.1) and 1 the gateway.
    pub fn capacity(&self) -> u32 {
        self.last_host().saturating_sub(GATEWAY_HOST)
    }

    /// Number of blocks of `prefix_length` bits in this block; 0 if they would be larger than it, or if
    /// the length exceeds the family's bits. Saturates at `u64::MAX`.
    pub fn subblock_count(&self, prefix_length: u8) -> u64 {
        if prefix_length > self.family().bits() {
            return 0;
        }
        match prefix_length.checked_sub(self.prefix_length()) {
            Some(bits) => 1u64.checked_shl(u32::from(bits)).unwrap_or(u64::MAX),
            None => 0,
        }
    }

    /// The `index`-th block of `prefix_length` bits in this block; `None` beyond the last.
    pub fn subblock(&self, prefix_length: u8, index: u64) -> Option<Block> {
        if index >= self.subblock_count(prefix_length) {
            return None;
        }
        let shift = u32::from(self.family().bits() - prefix_length);
        let start = u128::from(index).checked_shl(shift).unwrap_or(0);
        Block::of(offset(self.network(), start), prefix_length)
    }

    /// The index of the first block of `prefix_length` bits that shares an address with `other`, as
    /// [`Block::subblock`] counts them; `None` if `other` and this block are disjoint or the length is
    /// not one of this block's parts.
    pub fn subblock_index(&self, prefix_length: u8, other: &Block) -> Option<u64> {
        if self.subblock_count(prefix_length) == 0 || !self.overlaps(other) {
            return None;
        }
        let start = to_int(other.network()).max(to_int(self.network())) - to_int(self.network());
        let shift = u32::from(self.family().bits() - prefix_length);
        u64::try_from(start.checked_shr(shift).unwrap_or(0)).ok()
    }

    fn address_count(&self) -> u128 {
        1u128.checked_shl(u32::from(self.family().bits() - self.prefix_length())).unwrap_or(u128::MAX)
    }
}

fn to_int(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

/// `network + number`; callers stay inside the block, so the sum never leaves the family.
fn offset(network: IpAddr, number: u128) -> IpAddr {
    match network {
        IpAddr::V4(a) => {
            let number = u32::try_from(number).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from(u32::from(a).wrapping_add(number)))
        }
        IpAddr::V6(a) => IpAddr::V6(Ipv6Addr::from(u128::from(a).wrapping_add(number))),
    }
}

impl FromStr for Block {
    type Err = ParseBlockError;

    fn from_str(text: &str) -> Result<Block, ParseBlockError> {
        let net = IpNet::from_str(text).map_err(|_| ParseBlockError::NotCidr(text.to_owned()))?;
        if net.trunc() != net {
            return Err(ParseBlockError::HostBits(text.to_owned(), net.trunc()));
        }
        if net.to_string() != text {
            return Err(ParseBlockError::NotCanonical(text.to_owned(), net));
        }
        Ok(Block(net))
    }
}

impl TryFrom<String> for Block {
    type Error = ParseBlockError;

    fn try_from(text: String) -> Result<Block, ParseBlockError> {
        text.parse()
    }
}

impl From<Block> for String {
    fn from(block: Block) -> String {
        block.to_string()
    }
}

impl From<Ipv4Net> for Block {
    fn from(net: Ipv4Net) -> Block {
        Block::containing(net.into())
    }
}

impl From<Ipv6Net> for Block {
    fn from(net: Ipv6Net) -> Block {
        Block::containing(net.into())
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(text: &str) -> Block {
        text.parse().unwrap()
    }

    #[test]
    fn only_canonical_text_without_host_bits_is_a_block() {
        assert_eq!(block("10.244.3.0/24").to_string(), "10.244.3.0/24");
        assert_eq!(
            "10.244.3.7/24".parse::<Block>().unwrap_err().to_string(),
            "'10.244.3.7/24' has host bits set; the block is 10.244.3.0/24"
        );
        assert_eq!(
            "fd00:10:244:03::/64".parse::<Block>().unwrap_err().to_string(),
            "'fd00:10:244:03::/64' is not in canonical form; write fd00:10:244:3::/64"
        );
        for bad in ["", "10.244.3.0", "10.244.3.0/33", "a/24", "10.244.3.0/24 ", "fd00::/129"] {
            assert!(matches!(bad.parse::<Block>(), Err(ParseBlockError::NotCidr(_))), "{bad:?}");
        }
    }

    #[test]
    fn names_are_those_the_api_server_checks() {
        assert_eq!(block("10.244.3.0/24").object_name(), "10-244-3-0-24");
        assert_eq!(block("fd00:10:244:3::/64").object_name(), "fd00-10-244-3---64");
    }

    #[test]
    fn capacity_leaves_out_network_gateway_and_broadcast() {
        for (text, gateway, last, capacity) in [
            ("10.244.3.0/24", "10.244.3.1", 254, 253),
            ("10.244.0.0/16", "10.244.0.1", 65_534, 65_533),
            ("10.244.3.0/30", "10.244.3.1", 2, 1),
            ("10.244.3.0/31", "10.244.3.1", 0, 0),
            ("10.244.3.0/32", "10.244.3.0", 0, 0),
            ("fd00:10:244:3::/64", "fd00:10:244:3::1", 65_534, 65_533),
            ("fd00::/124", "fd00::1", 15, 14),
            ("fd00::/127", "fd00::1", 1, 0),
            ("fd00::/128", "fd00::", 0, 0),
        ] {
            let b = block(text);
            assert_eq!(b.gateway(), gateway.parse::<IpAddr>().unwrap(), "{text}");
            assert_eq!((b.last_host(), b.capacity()), (last, capacity), "{text}");
        }
    }

    #[test]
    fn subblocks_count_up_to_the_end_and_no_further() {
        let range = block("10.244.0.0/16");
        assert_eq!(range.subblock_count(24), 256);
        assert_eq!(range.subblock(24, 255), Some(block("10.244.255.0/24")));
        assert_eq!(range.subblock(24, 256), None);
        assert_eq!(range.subblock_count(15), 0);
        assert_eq!(range.subblock_count(33), 0);
        assert_eq!(range.subblock_index(24, &block("10.244.7.128/25")), Some(7));
        assert_eq!(range.subblock_index(24, &block("10.245.0.0/24")), None);
        assert_eq!(block("::/0").subblock_count(128), u64::MAX);
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        prop_oneof![
            (any::<u32>(), 0u8..=32).prop_map(|(a, p)| IpNet::new(IpAddr::V4(a.into()), p).unwrap()),
            (any::<u128>(), 0u8..=128).prop_map(|(a, p)| IpNet::new(IpAddr::V6(a.into()), p).unwrap()),
        ]
    }

    proptest! {
        #[test]
        fn text_and_block_are_one_to_one(net in any_net()) {
            let b = Block::containing(net);
            prop_assert_eq!(b.to_string().parse::<Block>(), Ok(b));
        }

        #[test]
        fn host_numbers_come_back(net in any_net(), n in any::<u32>()) {
            let b = Block::containing(net);
            if let Some(a) = b.host(n) {
                prop_assert!(b.contains(&a));
                prop_assert_eq!(b.host_number(&a), Some(n));
            }
        }

        #[test]
        fn subblocks_lie_in_the_block_and_know_their_index(net in any_net(), extra in 0u8..16, i in any::<u64>()) {
            let b = Block::containing(net);
            let length = b.prefix_length().saturating_add(extra).min(b.family().bits());
            let i = i % b.subblock_count(length).max(1);
            let s = b.subblock(length, i).unwrap();
            prop_assert!(b.covers(&s));
            prop_assert_eq!(b.subblock_index(length, &s), Some(i));
        }

        #[test]
        fn overlap_is_symmetric_and_means_a_shared_address(a in any_net(), b in any_net()) {
            let (a, b) = (Block::containing(a), Block::containing(b));
            prop_assert_eq!(a.overlaps(&b), b.overlaps(&a));
            prop_assert_eq!(a.overlaps(&b), a.contains(&b.network()) || b.contains(&a.network()));
        }
    }
}
