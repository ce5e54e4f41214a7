//! Rules in the words of `nft list`, as far as they are known here; the rest stands in brackets. Pure.

use std::fmt::Write;

use plat_cni::netlink::to_address;
use plat_cni::nft::Table;
use plat_crds::block::{Block, Family};

use super::ops::{Field, Nat, Op, Relation};
use super::ruleset::{Rule, Ruleset, Set};
use super::xt::Match;

/// Elements of an anonymous set that are shown.
const SHOWN_ELEMENTS: usize = 4;
/// Characters of a rule that are shown.
const SHOWN: usize = 160;

/// What kind of value a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Address,
    Name,
    /// In network byte order.
    Number,
    /// In the machine's.
    Native,
    Mark,
    Protocol,
    State,
    Status,
    AddressType,
    Bytes,
}

/// A field in nft's words.
pub fn field(field: &Field, family: Family) -> String {
    named(field, family).0
}

fn named(field: &Field, family: Family) -> (String, Kind) {
    let (name, kind) = match field {
        Field::Meta(key) => match key {
            0 => ("meta length", Kind::Native),
            1 => ("meta protocol", Kind::Bytes),
            2 => ("meta priority", Kind::Native),
            3 => ("meta mark", Kind::Mark),
            4 => ("iif", Kind::Native),
            5 => ("oif", Kind::Native),
            6 => ("iifname", Kind::Name),
            7 => ("oifname", Kind::Name),
            10 => ("meta skuid", Kind::Native),
            11 => ("meta skgid", Kind::Native),
            15 => ("meta nfproto", Kind::Number),
            16 => ("meta l4proto", Kind::Protocol),
            19 => ("meta pkttype", Kind::Number),
            21 => ("iifgroup", Kind::Native),
            22 => ("oifgroup", Kind::Native),
            23 => ("meta cgroup", Kind::Native),
            24 => ("meta random", Kind::Bytes),
            31 => ("meta time", Kind::Bytes),
            32 => ("meta day", Kind::Bytes),
            33 => ("meta hour", Kind::Bytes),
            other => return (format!("meta [{other}]"), Kind::Bytes),
        },
        Field::Conntrack(key) => match key {
            0 => ("ct state", Kind::State),
            1 => ("ct direction", Kind::Number),
            2 => ("ct status", Kind::Status),
            3 => ("ct mark", Kind::Mark),
            6 => ("ct helper", Kind::Bytes),
            13 => ("ct label", Kind::Bytes),
            18 => ("ct zone", Kind::Native),
            other => return (format!("ct [{other}]"), Kind::Bytes),
        },
        Field::Fib(result, flags) => return fib(*result, *flags),
        Field::Payload(base, offset, length) => return payload(*base, *offset, *length, family),
        Field::Other(name) => return (name.clone(), Kind::Bytes),
    };
    (name.to_owned(), kind)
}

fn fib(result: u32, flags: u32) -> (String, Kind) {
    let parts = [(1, "saddr"), (2, "daddr"), (4, "mark"), (8, "iif"), (16, "oif")];
    let keys: Vec<&str> = parts.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| *name).collect();
    let (result, kind) = match result {
        1 => ("oif", Kind::Native),
        2 => ("oifname", Kind::Name),
        _ => ("type", Kind::AddressType),
    };
    (format!("fib {} {result}", keys.join(" . ")), kind)
}

fn payload(base: u32, offset: usize, length: usize, family: Family) -> (String, Kind) {
    let keyword = if family == Family::IPv4 { "ip" } else { "ip6" };
    let (source, destination) = if family == Family::IPv4 { (12, 16) } else { (8, 24) };
    let (name, kind) = match (base, offset, length) {
        (1, at, _) if at == source => (format!("{keyword} saddr"), Kind::Address),
        (1, at, _) if at == destination => (format!("{keyword} daddr"), Kind::Address),
        (1, 9, 1) if family == Family::IPv4 => ("ip protocol".to_owned(), Kind::Protocol),
        (1, 6, 1) if family == Family::IPv6 => ("ip6 nexthdr".to_owned(), Kind::Protocol),
        (2, 0, 2) => ("tcp sport".to_owned(), Kind::Number),
        (2, 2, 2) => ("tcp dport".to_owned(), Kind::Number),
        (2, 13, 1) => ("tcp flags".to_owned(), Kind::Bytes),
        (base, ..) => {
            let header = ["@ll", "@nh", "@th"].get(usize::try_from(base).unwrap_or(usize::MAX));
            let header = header.copied().unwrap_or("@ih");
            (format!("{header},{},{}", offset.saturating_mul(8), length.saturating_mul(8)), Kind::Bytes)
        }
    };
    (name, kind)
}

/// A match of xtables in iptables' words.
pub fn xt_match(found: &Match) -> String {
    let not = |inverted: &bool| if *inverted { "! " } else { "" };
    match found {
        Match::Comment(text) => format!("/* {text} */"),
        Match::State { any, inverted } => {
            let names = [
                (1, "INVALID"),
                (2, "ESTABLISHED"),
                (4, "RELATED"),
                (8, "NEW"),
                (128, "DNAT"),
                (256, "UNTRACKED"),
            ];
            let names = names.iter().filter(|(bit, _)| any & bit != 0).map(|(_, name)| *name);
            format!("{}ctstate {}", not(inverted), names.collect::<Vec<_>>().join(","))
        }
        Match::Mark { mask, value, inverted } => {
            let [value, mask] = [value, mask].map(|bytes| u32::from_ne_bytes(*bytes));
            format!("{}mark {value:#x}/{mask:#x}", not(inverted))
        }
        Match::AddressType { .. } => "addrtype".to_owned(),
        Match::Tcp { .. } => "tcp".to_owned(),
        Match::OtherProtocol(name) => name.clone(),
        Match::Ports { .. } => "multiport".to_owned(),
        Match::Addresses { .. } => "iprange".to_owned(),
        Match::ReversePath { inverted } => format!("{}rpfilter", not(inverted)),
        Match::SetMark { .. } => "MARK".to_owned(),
        Match::SpoilMark => "CONNMARK restore".to_owned(),
    }
}

/// A rule of a table, for packets of that family.
pub fn rule(rule: &Rule, ruleset: &Ruleset, table: &Table, family: Family) -> String {
    let mut words = Words { loads: Vec::new(), mask: None, words: Vec::new() };
    for op in &rule.ops {
        words.add(op, ruleset, table, family);
    }
    let text = words.words.join(" ");
    if text.chars().count() <= SHOWN { text } else { text.chars().take(SHOWN - 1).chain(['…']).collect() }
}

/// The words of a rule so far.
struct Words {
    /// Loaded and not yet tested: register, name and kind.
    loads: Vec<(usize, String, Kind)>,
    mask: Option<Vec<u8>>,
    words: Vec<String>,
}

impl Words {
    fn add(&mut self, op: &Op, ruleset: &Ruleset, table: &Table, family: Family) {
        match op {
            Op::Load { to, field } => {
                let (name, kind) = named(field, family);
                self.loads.retain(|(at, ..)| at != to);
                self.loads.push((*to, name, kind));
            }
            Op::Bitwise { mask, .. } => self.mask = Some(mask.clone()),
            Op::Compare { relation, value, .. } => self.compare(*relation, value, family),
            Op::Range { inverted, low, high, .. } => {
                let (name, kind) = self.loaded();
                let range = format!("{}-{}", shown(kind, low, family), shown(kind, high, family));
                self.say(format!("{name} {}{range}", if *inverted { "!= " } else { "" }));
            }
            Op::Lookup { set, inverted, .. } => {
                let (name, kind) = self.loaded();
                let set = set_text(ruleset.set(table, set), set, kind, family);
                self.say(format!("{name} {}{set}", if *inverted { "!= " } else { "" }));
            }
            Op::Map { map, to, .. } => {
                let (name, _) = self.loaded();
                self.say(format!("{name} {} @{map}", if to.is_none() { "vmap" } else { "map" }));
            }
            Op::Match(Match::Comment(_)) | Op::Pass | Op::Constant { .. } | Op::Swap { .. } => {}
            Op::Match(found) => self.say(xt_match(found)),
            Op::SetMark { .. } => self.say("meta mark set …".to_owned()),
            Op::Untrack => self.say("notrack".to_owned()),
            Op::Reject => self.say("reject".to_owned()),
            Op::Nat(Nat::Source) => self.say("masquerade or snat".to_owned()),
            Op::Nat(Nat::Destination) => self.say("dnat".to_owned()),
            Op::Verdict(verdict) => self.say(verdict.to_string()),
            Op::Unknown(what) | Op::Opaque(what) => self.say(format!("[{what}]")),
        }
    }

    fn say(&mut self, word: String) {
        self.words.push(word);
        self.mask = None;
    }

    /// What the test at hand is about.
    fn loaded(&mut self) -> (String, Kind) {
        let loads = std::mem::take(&mut self.loads);
        let kind = loads.first().map_or(Kind::Bytes, |(_, _, kind)| *kind);
        let kind = if loads.len() > 1 { Kind::Bytes } else { kind };
        let names: Vec<String> = loads.into_iter().map(|(_, name, _)| name).collect();
        (names.join(" . "), kind)
    }

    fn compare(&mut self, relation: Relation, value: &[u8], family: Family) {
        let (name, kind) = self.loaded();
        // nft shows neither what another test makes sure of.
        if name == "meta nfproto" {
            return;
        }
        if name.starts_with("tcp ") && self.words.last().is_some_and(|word| word == "meta l4proto tcp") {
            self.words.pop();
        }
        let sign = match relation {
            Relation::Equal => "",
            Relation::Unequal => "!= ",
            Relation::Less => "< ",
            Relation::AtMost => "<= ",
            Relation::Greater => "> ",
            Relation::AtLeast => ">= ",
        };
        let word = match (&self.mask, kind) {
            // `ct state a,b`: any of the bits.
            (Some(mask), Kind::State | Kind::Status) if value.iter().all(|byte| *byte == 0) => {
                let sign = if relation == Relation::Equal { "! " } else { "" };
                format!("{name} {sign}{}", shown(kind, mask, family))
            }
            (Some(mask), Kind::Address) => format!("{name} {sign}{}", prefix(value, mask)),
            (Some(mask), _) => {
                format!(
                    "{name} & {} {}{}",
                    shown(kind, mask, family),
                    equals(sign),
                    shown(kind, value, family)
                )
            }
            (None, _) => format!("{name} {sign}{}", shown(kind, value, family)),
        };
        self.say(word);
    }
}

fn equals(sign: &str) -> &str {
    if sign.is_empty() { "== " } else { sign }
}

fn prefix(value: &[u8], mask: &[u8]) -> String {
    let length: u32 = mask.iter().map(|byte| byte.leading_ones()).sum();
    let block = to_address(value).zip(u8::try_from(length).ok()).and_then(|(a, length)| Block::of(a, length));
    block.map_or_else(|| format!("{} & {}", hex(value), hex(mask)), |block| block.to_string())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |mut text, byte| {
        // Writing to a text does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn shown(kind: Kind, value: &[u8], family: Family) -> String {
    let number = || value.iter().take(8).fold(0u64, |number, byte| (number << 8) | u64::from(*byte));
    let native =
        || <[u8; 4]>::try_from(value).map_or_else(|_| number(), |word| u32::from_ne_bytes(word).into());
    let bits = |names: &[(u64, &str)]| {
        let set: Vec<&str> =
            names.iter().filter(|(bit, _)| native() & bit != 0).map(|(_, name)| *name).collect();
        set.join(",")
    };
    match kind {
        Kind::Address => {
            let whole = usize::from(family.bits() / 8);
            let mut bytes = value.to_vec();
            bytes.resize(whole, 0);
            let length = u8::try_from(value.len().saturating_mul(8)).ok();
            match to_address(&bytes) {
                Some(address) if value.len() == whole => address.to_string(),
                Some(address) => length
                    .and_then(|length| Block::of(address, length))
                    .map_or_else(|| hex(value), |block| block.to_string()),
                None => hex(value),
            }
        }
        Kind::Name => {
            let end = value.iter().position(|byte| *byte == 0);
            let name = String::from_utf8_lossy(value.get(..end.unwrap_or(value.len())).unwrap_or_default());
            format!("\"{name}{}\"", if end.is_none() { "*" } else { "" })
        }
        Kind::Number => number().to_string(),
        Kind::Native => native().to_string(),
        Kind::Mark => format!("{:#x}", native()),
        Kind::Protocol => match value {
            [1] => "icmp".to_owned(),
            [6] => "tcp".to_owned(),
            [17] => "udp".to_owned(),
            [58] => "ipv6-icmp".to_owned(),
            [132] => "sctp".to_owned(),
            _ => number().to_string(),
        },
        Kind::State => {
            bits(&[(1, "invalid"), (2, "established"), (4, "related"), (8, "new"), (64, "untracked")])
        }
        Kind::Status => {
            bits(&[(2, "seen-reply"), (4, "assured"), (8, "confirmed"), (16, "snat"), (32, "dnat")])
        }
        Kind::AddressType => match native() {
            1 => "unicast".to_owned(),
            2 => "local".to_owned(),
            3 => "broadcast".to_owned(),
            5 => "multicast".to_owned(),
            other => other.to_string(),
        },
        Kind::Bytes => hex(value),
    }
}

/// A named set by its name, an anonymous one by its elements.
fn set_text(set: Option<&Set>, name: &str, kind: Kind, family: Family) -> String {
    let Some(set) = set.filter(|_| name.starts_with("__set")) else { return format!("@{name}") };
    let mut texts: Vec<String> = Vec::new();
    for member in set.members().iter().take(SHOWN_ELEMENTS * 2) {
        match (&member.last, member.ends_interval, texts.last_mut()) {
            (_, true, Some(open)) => *open = format!("{open}-{}", before(kind, &member.key, family)),
            (_, true, None) => {}
            (Some(last), ..) => {
                texts.push(format!("{}-{}", shown(kind, &member.key, family), shown(kind, last, family)));
            }
            (None, false, _) => texts.push(shown(kind, &member.key, family)),
        }
    }
    let more = if set.count() > SHOWN_ELEMENTS * 2 { ", …" } else { "" };
    format!("{{ {}{more} }}", texts.join(", "))
}

/// The value before this one, which is the first behind an interval.
fn before(kind: Kind, value: &[u8], family: Family) -> String {
    let mut bytes = value.to_vec();
    for byte in bytes.iter_mut().rev() {
        let (less, borrowed) = byte.overflowing_sub(1);
        *byte = less;
        if !borrowed {
            break;
        }
    }
    shown(kind, &bytes, family)
}
