//! The shape of simple rules: which addresses, links and families they are for, and what they do.
//!
//! To recognise rules by content, whoever wrote them: ours in foreign chains, kube-proxy's. What becomes of a packet is
//! not decided by this, but in [`super::judge`].

use std::net::IpAddr;

use plat_cni::netlink::Attributes;
use plat_cni::nft::{Cmp, Expr, RuleInfo, Verdict};
use plat_crds::block::{Block, Family};

const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const BASE_NETWORK: u32 = 1;

/// What a rule does to packets, taken apart.
pub(in crate::kernel) struct Reading<'a> {
    pub(in crate::kernel) tests: Vec<Test<'a>>,
    pub(in crate::kernel) outcome: Outcome<'a>,
    pub(in crate::kernel) comment: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kernel) enum Test<'a> {
    Source(Block, Cmp),
    Destination(Block, Cmp),
    In(InterfaceName<'a>, Cmp),
    Out(InterfaceName<'a>, Cmp),
    Family(u8, Cmp),
    /// Something we cannot decide.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernel) enum InterfaceName<'a> {
    Whole(&'a [u8]),
    Start(&'a [u8]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernel) enum Outcome<'a> {
    Accept,
    Drop,
    Return,
    Jump(&'a str),
    Goto(&'a str),
    /// Goes on with the next rule.
    None,
}

impl InterfaceName<'_> {
    /// nft compares 16 bytes, iptables-nft the name with its zero byte, and both fewer for a wildcard.
    fn read(value: &[u8]) -> InterfaceName<'_> {
        match value.iter().position(|byte| *byte == 0) {
            Some(end) => InterfaceName::Whole(value.get(..end).unwrap_or_default()),
            None => InterfaceName::Start(value),
        }
    }
}

pub(in crate::kernel) fn read_rule(rule: &RuleInfo, family: Family) -> Reading<'_> {
    let mut reading = Reading { tests: Vec::new(), outcome: Outcome::None, comment: rule.comment.clone() };
    let mut rest = rule.expressions.as_slice();
    while let Some((first, behind)) = rest.split_first() {
        rest = behind;
        match (first, behind) {
            (Expr::Counter, _) => {}
            (Expr::Verdict(verdict), _) => reading.outcome = outcome(verdict),
            (Expr::Meta { key }, [Expr::Compare { op, value }, after @ ..]) => {
                reading.tests.push(meta_test(*key, value, *op));
                rest = after;
            }
            (
                Expr::Payload { base: BASE_NETWORK, offset, .. },
                [Expr::Bitwise { mask, xor }, Expr::Compare { op, value }, after @ ..],
            ) if xor.iter().all(|byte| *byte == 0) => {
                reading.tests.push(address_test(*offset, value, mask_length(mask), *op, family));
                rest = after;
            }
            (
                Expr::Payload { base: BASE_NETWORK, offset, length },
                [Expr::Compare { op, value }, after @ ..],
            ) => {
                reading.tests.push(address_test(*offset, value, u8::try_from(length * 8).ok(), *op, family));
                rest = after;
            }
            (Expr::Other { name, data }, _) => read_foreign(name, data, &mut reading),
            _ => reading.tests.push(Test::Unknown),
        }
    }
    reading
}

fn outcome(verdict: &Verdict) -> Outcome<'_> {
    match verdict {
        Verdict::Accept => Outcome::Accept,
        Verdict::Drop => Outcome::Drop,
        Verdict::Return => Outcome::Return,
        Verdict::Continue => Outcome::None,
        Verdict::Jump(chain) => Outcome::Jump(chain),
        Verdict::Goto(chain) => Outcome::Goto(chain),
    }
}

fn meta_test(key: u32, value: &[u8], op: Cmp) -> Test<'_> {
    match (key, value) {
        (META_IIFNAME, name) => Test::In(InterfaceName::read(name), op),
        (META_OIFNAME, name) => Test::Out(InterfaceName::read(name), op),
        (META_NFPROTO, [family]) => Test::Family(*family, op),
        _ => Test::Unknown,
    }
}

fn address_test(offset: u32, value: &[u8], length: Option<u8>, op: Cmp, family: Family) -> Test<'static> {
    let mut bytes = value.to_vec();
    bytes.resize(usize::from(family.bits() / 8), 0);
    let address = match family {
        Family::IPv4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        Family::IPv6 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    let block = address.zip(length).and_then(|(address, length)| Block::of(address, length));
    match (block, family, offset) {
        (Some(block), Family::IPv4, 12) | (Some(block), Family::IPv6, 8) => Test::Source(block, op),
        (Some(block), Family::IPv4, 16) | (Some(block), Family::IPv6, 24) => Test::Destination(block, op),
        _ => Test::Unknown,
    }
}

/// Length of a mask of leading ones; `None` for any other.
fn mask_length(mask: &[u8]) -> Option<u8> {
    let ones: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
    let leading = mask
        .iter()
        .position(|byte| *byte != 0xff)
        .map_or(mask.len() * 8, |at| at * 8 + mask.get(at).map_or(0, |byte| byte.leading_ones() as usize));
    u8::try_from(ones).ok().filter(|length| usize::from(*length) == leading)
}

fn read_foreign(name: &str, data: &[u8], reading: &mut Reading<'_>) {
    let attributes = Attributes::behind(data, 0);
    let inner = attributes.find(1).map(|a| a.text().into_owned()).unwrap_or_default();
    match (name, inner.as_str()) {
        // struct xt_comment_info: the text alone.
        ("match", "comment") => {
            reading.comment = attributes.find(3).map(|info| info.text().into_owned());
        }
        ("log", _) | ("target", "LOG" | "NFLOG") => {}
        ("reject", _) | ("target", "REJECT") => reading.outcome = Outcome::Drop,
        _ => reading.tests.push(Test::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_of_leading_ones_have_a_length() {
        for (mask, length) in [
            (vec![255, 255, 240, 0], Some(20)),
            (vec![255; 4], Some(32)),
            (vec![0; 4], Some(0)),
            (vec![255, 0, 255, 0], None),
        ] {
            assert_eq!(mask_length(&mask), length);
        }
    }
}
