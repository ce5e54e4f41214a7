//! Chains, rules and sets as the kernel has them, in the words that they are judged by.
//!
//! A node may have tens of thousands of rules, most of which no pod's packet ever meets: chains and sets are read when
//! the judgement comes to them, so a ruleset is a part of the kernel's, and [`Want`] names what it lacks.

use std::collections::HashMap;

use plat_cni::nft::{ChainInfo, HookInfo, RuleInfo, Table, TableFamily, Verdict};
use plat_crds::block::Family;

use super::bits::{self, Answer, Byte};
use super::ops::{self, Op};

/// A chain or set that a packet comes to and that has not been read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Want {
    /// The rules of a chain.
    Chain(Table, String),
    /// The elements of a set or map.
    Set(Table, String),
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its handle.
    pub handle: u64,
    /// Its instructions.
    pub ops: Vec<Op>,
}

impl Rule {
    /// The rule as it was read.
    pub fn of(info: &RuleInfo) -> Rule {
        Rule { handle: info.handle, ops: info.expressions.iter().map(ops::op).collect() }
    }
}

/// A base chain at one hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub name: String,
    /// Kind, hook, priority and policy.
    pub hook: HookInfo,
}

/// An element of a set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The key, or the first of an interval.
    pub key: Vec<u8>,
    /// The last of an interval, where the element says it itself.
    pub last: Option<Vec<u8>>,
    /// One behind the last of an interval that began before.
    pub ends_interval: bool,
    /// What a map has for it.
    pub value: Value,
}

/// What a map has for a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// It is no map.
    Nothing,
    /// A verdict.
    Verdict(Verdict),
    /// Data.
    Data(Vec<u8>),
}

/// A set or map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// Whether its elements are intervals.
    intervals: bool,
    /// Lengths of the parts of a concatenated key, as they lie in a register: multiples of four.
    parts: Vec<usize>,
    /// Elements, sorted.
    members: Vec<Member>,
    /// What is found for every other key.
    other: Option<Value>,
    /// Whether it cannot be known what a lookup finds.
    doubtful: bool,
}

/// What a lookup finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// The key, with this value.
    Value(&'a Value),
    /// Nothing.
    Nothing,
    /// What is known does not tell.
    Unknown,
}

impl Set {
    /// A set of these elements; `other` is what it has for every other key.
    pub fn new(intervals: bool, parts: Vec<usize>, mut members: Vec<Member>, other: Option<Value>) -> Set {
        // Where one interval ends as another begins, the beginning counts.
        members.sort_by(|a, b| (&a.key, !a.ends_interval).cmp(&(&b.key, !b.ends_interval)));
        Set { intervals, parts, members, other, doubtful: false }
    }

    /// How many elements it has.
    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// The set, of which it cannot be known what a lookup finds if `doubtful`.
    pub fn doubtful(mut self, doubtful: bool) -> Set {
        self.doubtful = doubtful;
        self
    }

    /// Its elements.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Length of a key in bytes; `None` if no element tells.
    fn key_length(&self) -> Option<usize> {
        self.members.first().map(|member| member.key.len())
    }

    /// Looks up what is in the register.
    pub fn find(&self, register: &[Byte]) -> Found<'_> {
        if self.doubtful {
            return Found::Unknown;
        }
        let found = match self.key_length() {
            None => Found::Nothing,
            Some(length) => match register.get(..length) {
                None => Found::Unknown,
                Some(key) if self.members.iter().any(|m| m.last.is_some()) => self.scan(key),
                Some(key) => match key.iter().map(|byte| byte.get()).collect::<Option<Vec<u8>>>() {
                    Some(key) => self.search(&key),
                    None if self.intervals => Found::Unknown,
                    None => self.scan(key),
                },
            },
        };
        match (found, &self.other) {
            (Found::Nothing, Some(value)) => Found::Value(value),
            (found, _) => found,
        }
    }

    /// The element of a key that is known.
    fn search(&self, key: &[u8]) -> Found<'_> {
        let behind = self.members.partition_point(|member| member.key.as_slice() <= key);
        let below = behind.checked_sub(1).and_then(|at| self.members.get(at));
        match below {
            Some(member) if self.intervals && !member.ends_interval => Found::Value(&member.value),
            Some(member) if !self.intervals && member.key == key => Found::Value(&member.value),
            _ => Found::Nothing,
        }
    }

    /// The element of a key that is not wholly known, or of parts that are intervals each.
    fn scan(&self, key: &[Byte]) -> Found<'_> {
        let mut unknown = false;
        for member in &self.members {
            match self.is(key, member) {
                Answer::Yes => return Found::Value(&member.value),
                Answer::No => {}
                Answer::Unknown => unknown = true,
            }
        }
        if unknown { Found::Unknown } else { Found::Nothing }
    }

    fn is(&self, key: &[Byte], member: &Member) -> Answer {
        let Some(last) = &member.last else { return bits::equal(key, &member.key) };
        let whole = [member.key.len()];
        let parts = if self.parts.is_empty() { &whole } else { self.parts.as_slice() };
        let (mut at, mut answer) = (0usize, Answer::Yes);
        for length in parts {
            let range = at..at.saturating_add(*length);
            let part = match (key.get(range.clone()), member.key.get(range.clone()), last.get(range.clone()))
            {
                (Some(key), Some(low), Some(high)) => bits::within(key, low, high),
                _ => Answer::Unknown,
            };
            (at, answer) = (range.end, answer.and(part));
        }
        answer
    }
}

/// Chains, rules and sets, as far as they have been read.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    bases: Vec<Base>,
    chains: HashMap<Table, HashMap<String, Vec<Rule>>>,
    sets: HashMap<Table, HashMap<String, Set>>,
}

impl Ruleset {
    /// The base chains among these, in the order in which their tables were made.
    pub fn of(chains: &[ChainInfo]) -> Ruleset {
        let base = |chain: &ChainInfo| {
            let (table, name) = (chain.table.clone(), chain.name.clone());
            Some(Base { table, name, hook: chain.hook.clone()? })
        };
        Ruleset { bases: chains.iter().filter_map(base).collect(), ..Ruleset::default() }
    }

    /// Base chains that a packet of that family meets at the hook, in the order of their priorities.
    pub fn bases(&self, hook: u32, family: Family) -> Vec<&Base> {
        let at_hook = |base: &&Base| base.hook.number == hook && sees(base.table.family, family);
        let mut bases: Vec<&Base> = self.bases.iter().filter(at_hook).collect();
        bases.sort_by_key(|base| base.hook.priority);
        bases
    }

    /// Adds what was read of a chain.
    pub fn add_rules(&mut self, table: &Table, chain: &str, rules: Vec<Rule>) {
        self.chains.entry(table.clone()).or_default().insert(chain.to_owned(), rules);
    }

    /// Adds what was read of a set.
    pub fn add_set(&mut self, table: &Table, name: &str, set: Set) {
        self.sets.entry(table.clone()).or_default().insert(name.to_owned(), set);
    }

    /// The rules of a chain; `None` if they have not been read.
    pub fn rules(&self, table: &Table, chain: &str) -> Option<&[Rule]> {
        self.chains.get(table)?.get(chain).map(Vec::as_slice)
    }

    /// A set; `None` if it has not been read.
    pub fn set(&self, table: &Table, name: &str) -> Option<&Set> {
        self.sets.get(table)?.get(name)
    }
}

fn sees(table: TableFamily, family: Family) -> bool {
    match table {
        TableFamily::Inet => true,
        TableFamily::Ip => family == Family::IPv4,
        TableFamily::Ip6 => family == Family::IPv6,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::forward::bits::known;

    fn member(key: &[u8], ends_interval: bool) -> Member {
        Member { key: key.to_vec(), last: None, ends_interval, value: Value::Nothing }
    }

    fn holds(set: &Set, key: &[u8]) -> bool {
        matches!(set.find(&known(key)), Found::Value(_))
    }

    #[test]
    fn intervals_that_touch_and_gaps_between_them_are_told_apart() {
        // 10–19, 20–29 and 40 to the end, as the kernel tells of them: from the end.
        let members = vec![
            member(&[40], false),
            member(&[30], true),
            member(&[20], true),
            member(&[20], false),
            member(&[10], false),
        ];
        let set = Set::new(true, vec![], members, None);
        let inside: Vec<u8> = (0..=255).filter(|key| holds(&set, &[*key])).collect();
        assert_eq!(inside, (10..30).chain(40..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn parts_of_a_concatenation_are_compared_each_by_itself() {
        let both = Member {
            last: Some(vec![10, 0, 0, 9, 0, 80, 0, 0]),
            ..member(&[10, 0, 0, 1, 0, 80, 0, 0], false)
        };
        let set = Set::new(true, vec![4, 4], vec![both], None);
        assert!(holds(&set, &[10, 0, 0, 5, 0, 80, 0, 0]));
        assert!(!holds(&set, &[10, 0, 0, 5, 0, 81, 0, 0]));
        assert!(!holds(&set, &[10, 0, 1, 5, 0, 80, 0, 0]));
    }

    #[test]
    fn a_key_that_is_not_known_finds_nothing_where_no_element_can_be_it() {
        let set = Set::new(false, vec![], vec![member(&[1, 1], false), member(&[1, 2], false)], None);
        let unknown = |first| [Byte::new(first), Byte::UNKNOWN];
        assert_eq!(set.find(&unknown(1)), Found::Unknown);
        assert_eq!(set.find(&unknown(2)), Found::Nothing);
        let rest = Set { other: Some(Value::Nothing), ..set };
        assert_eq!(rest.find(&known(&[9, 9])), Found::Value(&Value::Nothing));
    }
}
