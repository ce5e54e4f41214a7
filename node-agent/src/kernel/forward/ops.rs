//! A rule's instructions in the words that it is judged by, from the kernel's encoding (`linux/netfilter/nf_tables.h`).
//! Pure.
//!
//! What is not known here, or is known with an option that is not, becomes [`Op::Unknown`] or [`Op::Opaque`], never
//! something that might be taken for an answer.

use plat_cni::netlink::{Attribute, Attributes};
use plat_cni::nft::{Cmp, Expr, Verdict};

use super::xt::{self, Match, Target};

/// Bytes of all registers.
pub const REGISTERS: usize = 64;

/// What a register is loaded with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    /// A property of the packet (`NFT_META_*`).
    Meta(u32),
    /// Bytes of a header: its number (0 link, 1 network, 2 transport), offset, length.
    Payload(u32, usize, usize),
    /// A property of the connection (`NFT_CT_*`).
    Conntrack(u32),
    /// What the routing table says: result and flags (`NFT_FIB_RESULT_*`, `NFTA_FIB_F_*`).
    Fib(u32, u32),
    /// Something that cannot be known here, in words.
    Other(String),
}

/// How a comparison compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// `==`
    Equal,
    /// `!=`
    Unequal,
    /// `<`
    Less,
    /// `<=`
    AtMost,
    /// `>`
    Greater,
    /// `>=`
    AtLeast,
}

/// What network address translation changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nat {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

/// One instruction. Registers are offsets in bytes from register 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Loads a field.
    Load {
        /// Where it goes.
        to: usize,
        /// What is loaded.
        field: Field,
    },
    /// Loads a constant.
    Constant {
        /// Where it goes.
        to: usize,
        /// What is loaded.
        value: Vec<u8>,
    },
    /// Goes on only if the register compares so.
    Compare {
        /// The register.
        from: usize,
        /// How.
        relation: Relation,
        /// With what.
        value: Vec<u8>,
    },
    /// Goes on only if the register is (or, inverted, is not) between the two.
    Range {
        /// The register.
        from: usize,
        /// Whether it must lie outside.
        inverted: bool,
        /// The first value inside.
        low: Vec<u8>,
        /// The last.
        high: Vec<u8>,
    },
    /// `to = from & mask ^ xor`
    Bitwise {
        /// Source register.
        from: usize,
        /// Target register.
        to: usize,
        /// Bits that are kept.
        mask: Vec<u8>,
        /// Bits that are turned.
        xor: Vec<u8>,
    },
    /// Turns the byte order of each word.
    Swap {
        /// Source register.
        from: usize,
        /// Target register.
        to: usize,
        /// Bytes in all.
        length: usize,
        /// Bytes of a word.
        word: usize,
    },
    /// Goes on only if the register's value is in the set (or, inverted, is not).
    Lookup {
        /// The set.
        set: String,
        /// The register.
        from: usize,
        /// Whether absence matches.
        inverted: bool,
    },
    /// Looks the register up in a map, whose value goes into a register.
    Map {
        /// The map.
        map: String,
        /// The register.
        from: usize,
        /// Where the value goes; `None`: it is a verdict.
        to: Option<usize>,
    },
    /// Sets the packet's mark from a register.
    SetMark {
        /// The register.
        from: usize,
    },
    /// Takes the packet out of connection tracking.
    Untrack,
    /// A match of xtables that is understood.
    Match(Match),
    /// Decides, or leads elsewhere.
    Verdict(Verdict),
    /// Drops the packet and tells its sender.
    Reject,
    /// Translates an address, which ends the way through this kind of chains.
    Nat(Nat),
    /// Changes nothing about where the packet goes: counters, logs, offload and the like.
    Pass,
    /// A test whose answer is not known.
    Unknown(String),
    /// An action of which it is not known where it sends the packet.
    Opaque(String),
}

/// One instruction of the kernel's in our words.
pub fn op(expr: &Expr) -> Op {
    match expr {
        Expr::Meta { .. } | Expr::Payload { .. } | Expr::Conntrack { .. } | Expr::Fib { .. } => {
            load(Some(1), expr)
        }
        Expr::Into { register, load: what } => load(Some(*register), what),
        Expr::Compare { op, value } => {
            let relation = if *op == Cmp::Eq { Relation::Equal } else { Relation::Unequal };
            Op::Compare { from: 0, relation, value: value.clone() }
        }
        Expr::Bitwise { mask, xor } => Op::Bitwise { from: 0, to: 0, mask: mask.clone(), xor: xor.clone() },
        Expr::Lookup { set, inverted } => Op::Lookup { set: set.clone(), from: 0, inverted: *inverted },
        Expr::MapLookup { map, to: 0 } => Op::Map { map: map.clone(), from: 0, to: None },
        Expr::MapLookup { map, to } => match register(Some(*to)) {
            Some(to) => Op::Map { map: map.clone(), from: 0, to: Some(to) },
            None => unknown("lookup"),
        },
        Expr::Counter => Op::Pass,
        Expr::Verdict(verdict) => Op::Verdict(verdict.clone()),
        Expr::Load { to, value } => match register(Some(*to)) {
            Some(to) => Op::Constant { to, value: value.clone() },
            None => unknown("immediate"),
        },
        Expr::Masquerade { .. } => Op::Nat(Nat::Source),
        Expr::Nat { kind, .. } => Op::Nat(if *kind == 0 { Nat::Source } else { Nat::Destination }),
        Expr::Other { name, data } => other(name, &Attributes::behind(data, 0)),
    }
}

fn unknown(name: &str) -> Op {
    Op::Unknown(name.to_owned())
}

fn load(to: Option<u32>, what: &Expr) -> Op {
    let field = match what {
        Expr::Meta { key } => Field::Meta(*key),
        Expr::Payload { base, offset, length } => {
            match (usize::try_from(*offset), usize::try_from(*length)) {
                (Ok(offset), Ok(length)) if length <= REGISTERS => Field::Payload(*base, offset, length),
                _ => Field::Other("payload".to_owned()),
            }
        }
        Expr::Conntrack { key } => Field::Conntrack(*key),
        Expr::Fib { result, flags } => Field::Fib(*result, *flags),
        _ => Field::Other("load".to_owned()),
    };
    register(to).map_or_else(|| unknown("load"), |to| Op::Load { to, field })
}

/// Registers 1 to 4 hold 16 bytes, those from 8 on are the four-byte words of the same place.
fn register(number: Option<u32>) -> Option<usize> {
    let offset = match number? {
        number @ 1..=4 => (number - 1) * 16,
        number @ 8..=23 => (number - 8) * 4,
        _ => return None,
    };
    usize::try_from(offset).ok()
}

fn number(data: &Attributes<'_>, kind: u16) -> Option<u32> {
    data.find(kind).and_then(|attribute: Attribute<'_>| attribute.be32())
}

fn value(data: &Attributes<'_>, kind: u16) -> Option<Vec<u8>> {
    Some(data.find(kind)?.nested().find(1)?.value.to_vec())
}

/// What the CNI plugin's own rules never have.
fn other(name: &str, data: &Attributes<'_>) -> Op {
    let read = match name {
        "cmp" => compare(data),
        "range" => range(data),
        "bitwise" => bitwise(data),
        "byteorder" => swap(data),
        "lookup" => lookup(data),
        "meta" => set_meta(data),
        "ct" => load_conntrack(data),
        "fib" => fib(data),
        "match" => Some(match xt::read_match(data) {
            Some(found) => Op::Match(found),
            None => Op::Unknown(format!("xt match \"{}\"", xt::name(data))),
        }),
        "target" => Some(match xt::read_target(data) {
            Some(Target::Pass) => Op::Pass,
            Some(Target::Reject) => Op::Reject,
            Some(Target::Untrack) => Op::Untrack,
            Some(Target::Nat(nat)) => Op::Nat(nat),
            Some(Target::Mark { mask, xor }) => Op::Match(Match::SetMark { mask, xor }),
            Some(Target::UnknownMark) => Op::Match(Match::SpoilMark),
            None => Op::Opaque(format!("xt target \"{}\"", xt::name(data))),
        }),
        "reject" => Some(Op::Reject),
        "notrack" => Some(Op::Untrack),
        "masq" => Some(Op::Nat(Nat::Source)),
        "redir" => Some(Op::Nat(Nat::Destination)),
        "log" | "counter" | "flow_offload" | "last" | "dup" => Some(Op::Pass),
        // What another program does with the packet is not to be known; the others take it away.
        "queue" | "tproxy" | "synproxy" | "fwd" | "immediate" => Some(Op::Opaque(name.to_owned())),
        // A write into the packet has a source register.
        "payload" if number(data, 5).is_some() => Some(written(data)),
        "exthdr" if number(data, 7).is_some() => Some(Op::Pass),
        "exthdr" | "rt" | "osf" | "numgen" | "xfrm" => unknowable(name, number(data, 1)),
        "socket" | "hash" | "tunnel" => unknowable(name, number(data, 2)),
        // `add @set { … }` passes, but for a limit inside.
        "dynset" => [7, 9, 10].iter().all(|kind| data.find(*kind).is_none()).then_some(Op::Pass),
        // Counter, helper, timeout, secmark and expectation pass; quota and limits may not.
        "objref" => matches!(number(data, 1), Some(1 | 3 | 7..=9)).then_some(Op::Pass),
        _ => None,
    };
    read.unwrap_or_else(|| unknown(name))
}

fn unknowable(name: &str, to: Option<u32>) -> Option<Op> {
    register(to).map(|to| Op::Load { to, field: Field::Other(name.to_owned()) })
}

/// Addresses written by hand make another packet of it, and nothing is known of that one.
fn written(data: &Attributes<'_>) -> Op {
    match number(data, 2) {
        Some(0) => Op::Pass,
        _ => Op::Opaque("payload set".to_owned()),
    }
}

fn compare(data: &Attributes<'_>) -> Option<Op> {
    let relation = match number(data, 2)? {
        0 => Relation::Equal,
        1 => Relation::Unequal,
        2 => Relation::Less,
        3 => Relation::AtMost,
        4 => Relation::Greater,
        5 => Relation::AtLeast,
        _ => return None,
    };
    Some(Op::Compare { from: register(number(data, 1))?, relation, value: value(data, 3)? })
}

fn range(data: &Attributes<'_>) -> Option<Op> {
    let inverted = match number(data, 2)? {
        0 => false,
        1 => true,
        _ => return None,
    };
    let (low, high) = (value(data, 3)?, value(data, 4)?);
    Some(Op::Range { from: register(number(data, 1))?, inverted, low, high })
}

fn bitwise(data: &Attributes<'_>) -> Option<Op> {
    if number(data, 6).unwrap_or(0) != 0 {
        return None;
    }
    let (from, to) = (register(number(data, 1))?, register(number(data, 2))?);
    Some(Op::Bitwise { from, to, mask: value(data, 4)?, xor: value(data, 5)? })
}

fn swap(data: &Attributes<'_>) -> Option<Op> {
    let (from, to) = (register(number(data, 1))?, register(number(data, 2))?);
    let size = |kind| number(data, kind).and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= REGISTERS);
    let (length, word) = (size(4)?, size(5)?);
    if cfg!(target_endian = "big") {
        return None;
    }
    matches!(word, 2 | 4 | 8).then_some(Op::Swap { from, to, length, word })
}

fn lookup(data: &Attributes<'_>) -> Option<Op> {
    let name = data.find(1)?.text().into_owned();
    let from = register(number(data, 2))?;
    Some(match number(data, 3) {
        Some(0) => Op::Map { map: name, from, to: None },
        Some(to) => Op::Map { map: name, from, to: Some(register(Some(to))?) },
        None => Op::Lookup { set: name, from, inverted: number(data, 5).unwrap_or(0) & 1 != 0 },
    })
}

/// `NFTA_META_SREG`: a write. Only the mark is ever asked for again.
fn set_meta(data: &Attributes<'_>) -> Option<Op> {
    const MARK: u32 = 3;
    let from = register(number(data, 3))?;
    Some(if number(data, 2)? == MARK { Op::SetMark { from } } else { Op::Pass })
}

fn load_conntrack(data: &Attributes<'_>) -> Option<Op> {
    if number(data, 4).is_some() {
        // A write. What is kept with the connection is never taken for known.
        return Some(Op::Pass);
    }
    let key = number(data, 2)?;
    let field = if data.find(3).is_some() { Field::Other("ct".to_owned()) } else { Field::Conntrack(key) };
    Some(Op::Load { to: register(number(data, 1))?, field })
}

fn fib(data: &Attributes<'_>) -> Option<Op> {
    let field = Field::Fib(number(data, 2)?, number(data, 3)?);
    Some(Op::Load { to: register(number(data, 1))?, field })
}
