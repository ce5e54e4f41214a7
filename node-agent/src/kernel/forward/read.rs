//! Reading the ruleset, as far as packets come.

use std::collections::BTreeSet;

use plat_cni::netlink::{Attribute, Attributes, Error, Message};
use plat_cni::nft::{self, ChainInfo, RuleInfo, Table, Verdict};
use rustix::io::Errno;

use super::judge::{Outcome, judge};
use super::packet::Packet;
use super::ruleset::{Member, Rule, Ruleset, Set, Value, Want};
use crate::kernel::nft::Nft;

/// `NFT_MSG_GETSET`, `NFT_MSG_GETSETELEM`
const GET_SET: u16 = (10 << 8) | 10;
const GET_ELEMENTS: u16 = (10 << 8) | 13;
/// Length of `nfgenmsg`.
const HEADER: usize = 4;
/// Rules and elements that are read at most: beyond it, a chain or set counts as not read, and verdicts that come to
/// it as unknown.
pub const MAX_READ: usize = 50_000;

/// Judges the packets for the kernel's ruleset, of which `chains` are the chains and `known` rules that were read.
pub fn judged(
    nft: &mut Nft,
    chains: &[ChainInfo],
    known: Vec<(Table, String, Vec<RuleInfo>)>,
    packets: &[Packet],
) -> Result<(Ruleset, Vec<Outcome>), Error> {
    let mut ruleset = Ruleset::of(chains);
    let mut read = 0;
    for (table, chain, rules) in known {
        read += rules.len();
        ruleset.add_rules(&table, &chain, rules.iter().map(Rule::of).collect());
    }
    let mut outcomes: Vec<Outcome> = packets.iter().map(|packet| judge(&ruleset, packet)).collect();
    loop {
        let wants: BTreeSet<Want> = outcomes.iter().flat_map(|outcome| &outcome.wants).cloned().collect();
        if wants.is_empty() || read > MAX_READ {
            return Ok((ruleset, outcomes));
        }
        for want in &wants {
            read += add(nft, &mut ruleset, want)?;
        }
        for (packet, outcome) in packets.iter().zip(&mut outcomes) {
            if !outcome.wants.is_empty() {
                *outcome = judge(&ruleset, packet);
            }
        }
    }
}

/// Reads what is wanted. What is gone meanwhile is empty: the next generation is judged anew.
fn add(nft: &mut Nft, ruleset: &mut Ruleset, want: &Want) -> Result<usize, Error> {
    match want {
        Want::Chain(table, chain) => {
            let rules = nft::rules(&mut nft.socket, table, chain)?;
            let count = rules.len();
            ruleset.add_rules(table, chain, rules.iter().map(Rule::of).collect());
            Ok(count)
        }
        Want::Set(table, name) => {
            let set = set(nft, table, name)?;
            let count = set.count();
            ruleset.add_set(table, name, set);
            Ok(count)
        }
    }
}

fn set(nft: &mut Nft, table: &Table, name: &str) -> Result<Set, Error> {
    let message = |kind: u16, what: &str| {
        let header = [table.family.number(), 0, 0, 0];
        let mut message = Message::new(kind, 0, &header, format!("{what} set {table} {name}"));
        message.attr_str(1, &table.name).attr_str(2, name);
        message
    };
    let mut kind = SetKind::default();
    let asked = nft.socket.ask(message(GET_SET, "look up"), |received| kind = set_kind(received.payload));
    or_gone(asked)?;
    let mut list = Elements::default();
    let dumped = nft
        .socket
        .dump(&message(GET_ELEMENTS, "list elements of"), |received| Some(elements(received.payload)));
    for part in or_gone(dumped)?.unwrap_or_default() {
        list.members.extend(part.members);
        list.other = list.other.or(part.other);
        list.doubtful |= part.doubtful;
    }
    Ok(Set::new(kind.intervals, kind.parts, list.members, list.other).doubtful(list.doubtful))
}

fn or_gone<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(None),
        other => other.map(Some),
    }
}

/// What a set's declaration says of its keys.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SetKind {
    intervals: bool,
    parts: Vec<usize>,
}

/// Reads an `NFT_MSG_NEWSET`. Pure.
pub fn set_kind(payload: &[u8]) -> SetKind {
    const INTERVAL: u32 = 4;
    let attributes = Attributes::behind(payload, HEADER);
    let flags = attributes.find(3).and_then(|flags| flags.be32()).unwrap_or(0);
    // NFTA_SET_DESC, NFTA_SET_DESC_CONCAT: the length of each part.
    let concatenation = attributes.find(9).and_then(|desc| desc.nested().find(2));
    let length = |part: Attribute<'_>| part.nested().find(1)?.be32().and_then(|n| usize::try_from(n).ok());
    let parts = concatenation.map(|list| list.nested().filter_map(length).collect::<Vec<_>>());
    let parts = parts.unwrap_or_default().into_iter().map(|length| length.saturating_add(3) / 4 * 4);
    SetKind { intervals: flags & INTERVAL != 0, parts: parts.collect() }
}

/// What an `NFT_MSG_NEWSETELEM` says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Elements {
    members: Vec<Member>,
    other: Option<Value>,
    /// Whether an element has a condition, or cannot be read.
    doubtful: bool,
}

/// Reads an `NFT_MSG_NEWSETELEM`. Pure.
pub fn elements(payload: &[u8]) -> Elements {
    const INTERVAL_END: u32 = 1;
    const CATCH_ALL: u32 = 2;
    let mut found = Elements::default();
    let list = Attributes::behind(payload, HEADER).find(3);
    for element in list.into_iter().flat_map(|list| list.nested()) {
        let element = element.nested();
        let flags = element.find(3).and_then(|flags| flags.be32()).unwrap_or(0);
        let data = |kind| Some(element.find(kind)?.nested().find(1)?.value.to_vec());
        let value = match element.find(2) {
            None => Some(Value::Nothing),
            Some(_) if data(2).is_some() => data(2).map(Value::Data),
            Some(verdict) => Verdict::decode(verdict).map(Value::Verdict),
        };
        // Expressions of an element run when it is found; those that count change nothing.
        let limits = [7, 11].iter().any(|kind| element.find(*kind).is_some_and(|e| !only_counts(&e)));
        let Some(value) = value.filter(|_| !limits) else {
            found.doubtful = true;
            continue;
        };
        match data(1) {
            _ if flags & CATCH_ALL != 0 => found.other = Some(value),
            Some(key) => {
                let ends_interval = flags & INTERVAL_END != 0;
                found.members.push(Member { key, last: data(10), ends_interval, value });
            }
            None => found.doubtful = true,
        }
    }
    found
}

/// Whether the expression (or the list of them) is a counter.
fn only_counts(expression: &Attribute<'_>) -> bool {
    let is_counter = |name: &str| matches!(name, "counter" | "last");
    let nested = expression.nested();
    match nested.find(1) {
        Some(name) if is_counter(&name.text()) => true,
        // A list of expressions, each of which begins with its name.
        Some(_) => nested.clone().all(|e| e.nested().find(1).is_some_and(|name| is_counter(&name.text()))),
        None => false,
    }
}
