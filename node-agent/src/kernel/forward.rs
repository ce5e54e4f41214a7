//! Foreign firewalls in the way of forwarded pod packets.
//!
//! An accept in one chain is not final in nftables: every chain at the hook must let a packet through. So
//! a `FORWARD` chain with policy drop (Docker, ufw, many hardening guides) cuts pods off whatever our own
//! table says. Two answers, and no third:
//!
//! - Where the chain `filter FORWARD` of `ip` or `ip6`, which iptables-nft keeps, has **policy** drop, one
//!   plain accept rule per own block and direction is appended. Appended, so that the administrator's own
//!   rules stay in force before it; plain (prefix, interface, counter, accept, comment), as these read back
//!   in `iptables -S` and survive save and restore, while a set would come back as accept-all.
//! - Anything else that drops them (an explicit drop or reject, another table's policy, a table with
//!   `flags owner`, a legacy table) is named in a condition, with its cure, and not touched.
//!
//! Our rules are recognised by content: `iptables-restore` renumbers them and turns their comment into a
//! match of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use plat_cni::netlink::{Attributes, Error};
use plat_cni::nft::{
    self, Addr, Batch, ChainInfo, Cmp, Expr, Hook, Name, Policy, Rule, RuleInfo, Table, TableFamily, Verdict,
};
use plat_crds::block::{Block, Family};
use plat_crds::lease::Datapath;
use plat_crds::names::{FORWARD_COMMENT, VETH_PREFIX};

use super::nft::Nft;
use crate::fabric::{Admit, Admitted, Direction, ForwardChain};

const CHAIN: &str = "FORWARD";
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const BASE_NETWORK: u32 = 1;
/// Chains deep that jumps are followed; nf_tables itself allows 16.
const MAX_DEPTH: usize = 16;

/// Something that drops pod packets and that we do not touch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Blocker {
    /// Table and chain, as nft names them.
    pub chain: String,
    /// What it does.
    pub what: String,
    /// What to do about it.
    pub cure: String,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {} {}: {}", self.chain, self.what, self.cure)
    }
}

/// What was found at the forward hook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// The chains `filter FORWARD`.
    pub chains: BTreeMap<Family, ForwardChain>,
    /// What drops pod packets.
    pub blockers: Vec<Blocker>,
}

fn filter(family: Family) -> Table {
    Table::new(table_family(family), "filter")
}

pub(super) fn table_family(family: Family) -> TableFamily {
    match family {
        Family::IPv4 => TableFamily::Ip,
        Family::IPv6 => TableFamily::Ip6,
    }
}

/// Chains and rules as the kernel has them, read once; judged by pure functions.
#[derive(Default)]
struct Ruleset {
    chains: Vec<ChainInfo>,
    owned: BTreeSet<Table>,
    rules: BTreeMap<(Table, String), Vec<RuleInfo>>,
}

impl Ruleset {
    /// Reads all chains, and the rules of those that forwarded packets can meet.
    fn read(nft: &mut Nft) -> Result<Ruleset, Error> {
        let tables = nft::tables(&mut nft.socket)?;
        let owned = tables.into_iter().filter(|t| t.has_owner).map(|t| t.table).collect();
        let mut ruleset = Ruleset { chains: nft::chains(&mut nft.socket)?, owned, ..Ruleset::default() };
        let mut open: Vec<(Table, String)> =
            ruleset.forward_chains().map(|chain| (chain.table.clone(), chain.name.clone())).collect();
        while let Some(at) = open.pop() {
            if ruleset.rules.contains_key(&at) {
                continue;
            }
            let rules = nft::rules(&mut nft.socket, &at.0, &at.1)?;
            let next =
                rules.iter().flat_map(|rule| &rule.expressions).filter_map(|expression| match expression {
                    Expr::Verdict(Verdict::Jump(chain) | Verdict::Goto(chain)) => {
                        Some((at.0.clone(), chain.clone()))
                    }
                    _ => None,
                });
            open.extend(next);
            ruleset.rules.insert(at, rules);
        }
        Ok(ruleset)
    }

    fn forward_chains(&self) -> impl Iterator<Item = &ChainInfo> {
        let routed = [TableFamily::Inet, TableFamily::Ip, TableFamily::Ip6];
        let at_forward = |c: &&ChainInfo| c.hook.as_ref().is_some_and(|h| h.number == Hook::Forward.number());
        self.chains.iter().filter(move |c| routed.contains(&c.table.family)).filter(at_forward)
    }

    fn rules(&self, table: &Table, chain: &str) -> &[RuleInfo] {
        self.rules.get(&(table.clone(), chain.to_owned())).map(Vec::as_slice).unwrap_or_default()
    }
}

/// Reads the forward hook and judges it for `wanted`; `admitting` says whether accept rules are appended.
pub fn observe(
    nft: &mut Nft,
    bridge: &str,
    wanted: &BTreeSet<Admit>,
    admitting: bool,
) -> Result<Forwarding, Error> {
    Ok(judge(&Ruleset::read(nft)?, bridge, wanted, admitting))
}

fn judge(ruleset: &Ruleset, bridge: &str, wanted: &BTreeSet<Admit>, admitting: bool) -> Forwarding {
    let mut found = Forwarding::default();
    for family in Family::ALL {
        if let Some(chain) = filter_chain(ruleset, family, bridge) {
            found.chains.insert(family, chain);
        }
    }
    let mut blockers = BTreeSet::new();
    for chain in ruleset.forward_chains() {
        for admit in wanted.iter().filter(|admit| sees(chain.table.family, admit.block.family())) {
            if let Some(blocker) = blocker(ruleset, chain, &Packet { admit: *admit, bridge }, admitting) {
                blockers.insert(blocker);
            }
        }
    }
    found.blockers = blockers.into_iter().collect();
    found
}

fn filter_chain(ruleset: &Ruleset, family: Family, bridge: &str) -> Option<ForwardChain> {
    let table = filter(family);
    let chain = ruleset.forward_chains().find(|c| c.table == table && c.name == CHAIN)?;
    let drops = chain.hook.as_ref().is_some_and(|hook| hook.policy == Policy::Drop);
    let rules = ruleset.rules(&table, CHAIN).iter().filter_map(|rule| read_admit(rule, family, bridge));
    Some(ForwardChain { needs_rules: drops && !ruleset.owned.contains(&table), rules: rules.collect() })
}

fn sees(table: TableFamily, family: Family) -> bool {
    match table {
        TableFamily::Inet => true,
        TableFamily::Ip => family == Family::IPv4,
        TableFamily::Ip6 => family == Family::IPv6,
        _ => false,
    }
}

/// The rule that admits: `ip saddr 10.244.1.0/24 iifname "cni0" counter accept comment "plat"`; for pods without
/// bridge `iifname "plat*"`.
fn admit_rule(admit: &Admit, bridge: &str) -> Rule {
    let rule = Rule::new(&filter(admit.block.family()), CHAIN);
    let link = match admit.datapath {
        Datapath::Bridge => Name::Is(bridge),
        Datapath::Routed => Name::Begins(VETH_PREFIX),
    };
    let rule = match admit.direction {
        Direction::FromPods => rule.saddr(Addr::In(admit.block)).iifname(link),
        Direction::ToPods => rule.daddr(Addr::In(admit.block)).oifname(link),
    };
    rule.counter().accept().comment(FORWARD_COMMENT)
}

/// Appends the rule to the family's FORWARD chain.
pub fn append(nft: &mut Nft, admit: &Admit, bridge: &str) -> Result<(), Error> {
    let mut batch = Batch::new();
    batch.add_rule(&admit_rule(admit, bridge));
    batch.send(&mut nft.socket)
}

/// Removes the rule of that handle; "already gone" is success.
pub fn remove(nft: &mut Nft, family: Family, handle: u64) -> Result<bool, Error> {
    let mut batch = Batch::new();
    batch.delete_rule(&filter(family), CHAIN, handle);
    plat_cni::netlink::deleted(batch.send(&mut nft.socket))
}

/// Rules of ours in both FORWARD chains, whatever they admit; for cleanup.
pub fn ours(nft: &mut Nft, bridge: &str) -> Result<Vec<(Family, u64)>, Error> {
    let ruleset = Ruleset::read(nft)?;
    let of = |family| {
        let chain = filter_chain(&ruleset, family, bridge).unwrap_or_default();
        chain.rules.into_iter().filter(|rule| rule.ours).map(move |rule| (family, rule.handle))
    };
    Ok(Family::ALL.into_iter().flat_map(of).collect())
}

/// What a rule does to packets, taken apart.
pub(super) struct Reading<'a> {
    pub(super) tests: Vec<Test<'a>>,
    pub(super) outcome: Outcome<'a>,
    comment: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Test<'a> {
    Source(Block, Cmp),
    Destination(Block, Cmp),
    In(InterfaceName<'a>, Cmp),
    Out(InterfaceName<'a>, Cmp),
    Family(u8, Cmp),
    /// Something we cannot decide.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InterfaceName<'a> {
    Whole(&'a [u8]),
    Start(&'a [u8]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome<'a> {
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

    fn fits(&self, name: &str) -> bool {
        match self {
            InterfaceName::Whole(whole) => *whole == name.as_bytes(),
            InterfaceName::Start(start) => name.as_bytes().starts_with(start),
        }
    }
}

pub(super) fn read_rule(rule: &RuleInfo, family: Family) -> Reading<'_> {
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

/// The rule as one of the shape that we write; `None` for any other.
fn read_admit(rule: &RuleInfo, family: Family, bridge: &str) -> Option<Admitted> {
    let reading = read_rule(rule, family);
    if reading.outcome != Outcome::Accept || reading.tests.len() != 2 {
        return None;
    }
    let datapath = |name: &InterfaceName<'_>| {
        if *name == InterfaceName::Whole(bridge.as_bytes()) {
            Some(Datapath::Bridge)
        } else {
            (*name == InterfaceName::Start(VETH_PREFIX.as_bytes())).then_some(Datapath::Routed)
        }
    };
    let (block, direction) = reading.tests.iter().find_map(|test| match test {
        Test::Source(block, Cmp::Eq) => Some((*block, Direction::FromPods)),
        Test::Destination(block, Cmp::Eq) => Some((*block, Direction::ToPods)),
        _ => None,
    })?;
    let datapath = reading.tests.iter().find_map(|test| match (test, direction) {
        (Test::In(name, Cmp::Eq), Direction::FromPods) => datapath(name),
        (Test::Out(name, Cmp::Eq), Direction::ToPods) => datapath(name),
        _ => None,
    })?;
    let ours = reading.comment.as_deref() == Some(FORWARD_COMMENT);
    Some(Admitted { admit: Admit { block, datapath, direction }, handle: rule.handle, ours })
}

/// Any packet that an admission stands for.
struct Packet<'a> {
    admit: Admit,
    bridge: &'a str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Yes,
    No,
    /// It depends on the packet.
    Depends,
}

impl Packet<'_> {
    fn answer(&self, test: &Test<'_>) -> Answer {
        let from_pods = self.admit.direction == Direction::FromPods;
        let (answer, op) = match test {
            Test::Source(block, op) if from_pods => (self.inside(block), op),
            Test::Destination(block, op) if !from_pods => (self.inside(block), op),
            Test::In(name, op) if from_pods => (self.over(name), op),
            Test::Out(name, op) if !from_pods => (self.over(name), op),
            Test::Family(number, op) => {
                let own = if self.admit.block.family() == Family::IPv4 { 2 } else { 10 };
                (yes_or_no(*number == own), op)
            }
            _ => return Answer::Depends,
        };
        match (answer, op) {
            (Answer::Yes, Cmp::Ne) => Answer::No,
            (Answer::No, Cmp::Ne) => Answer::Yes,
            _ => answer,
        }
    }

    /// Whether the packet passes the link of that name.
    fn over(&self, name: &InterfaceName<'_>) -> Answer {
        match (self.admit.datapath, name) {
            (Datapath::Bridge, name) => yes_or_no(name.fits(self.bridge)),
            (Datapath::Routed, InterfaceName::Start(start)) if VETH_PREFIX.as_bytes().starts_with(start) => {
                Answer::Yes
            }
            // One pod's link, or some of them.
            (Datapath::Routed, InterfaceName::Start(name) | InterfaceName::Whole(name)) => {
                if name.starts_with(VETH_PREFIX.as_bytes()) { Answer::Depends } else { Answer::No }
            }
        }
    }

    fn inside(&self, block: &Block) -> Answer {
        if block.covers(&self.admit.block) {
            Answer::Yes
        } else if block.overlaps(&self.admit.block) {
            Answer::Depends
        } else {
            Answer::No
        }
    }

    /// Whether a rule surely applies. What depends is taken not to: a rule that may accept some packets
    /// does not save the others, and one that may drop some is the administrator's choice.
    fn meets(&self, tests: &[Test<'_>]) -> bool {
        tests.iter().all(|test| self.answer(test) == Answer::Yes)
    }
}

fn yes_or_no(yes: bool) -> Answer {
    if yes { Answer::Yes } else { Answer::No }
}

/// What becomes of a packet in a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    Accepted,
    /// By a rule of that chain.
    Dropped(String),
    /// No rule decided.
    Undecided,
}

fn walk(ruleset: &Ruleset, table: &Table, chain: &str, packet: &Packet<'_>, depth: usize) -> Fate {
    if depth > MAX_DEPTH {
        return Fate::Undecided;
    }
    for rule in ruleset.rules(table, chain) {
        let reading = read_rule(rule, packet.admit.block.family());
        if !packet.meets(&reading.tests) {
            continue;
        }
        match reading.outcome {
            Outcome::None => {}
            Outcome::Accept => return Fate::Accepted,
            Outcome::Drop => return Fate::Dropped(chain.to_owned()),
            Outcome::Return => return Fate::Undecided,
            Outcome::Goto(next) => return walk(ruleset, table, next, packet, depth + 1),
            Outcome::Jump(next) => match walk(ruleset, table, next, packet, depth + 1) {
                Fate::Undecided => {}
                fate => return fate,
            },
        }
    }
    Fate::Undecided
}

fn blocker(ruleset: &Ruleset, chain: &ChainInfo, packet: &Packet<'_>, admitting: bool) -> Option<Blocker> {
    let direction = match packet.admit.direction {
        Direction::FromPods => "from",
        Direction::ToPods => "to",
    };
    let block = packet.admit.block;
    let owned = ruleset.owned.contains(&chain.table);
    let ours_to_admit = chain.table == filter(block.family()) && chain.name == CHAIN && !owned;
    let (name, what) = match walk(ruleset, &chain.table, &chain.name, packet, 0) {
        Fate::Accepted => return None,
        Fate::Dropped(by) => (by, format!("has a rule that drops packets {direction} pods ({block})")),
        Fate::Undecided => match chain.hook.as_ref().map(|hook| hook.policy) {
            Some(Policy::Drop) if !(ours_to_admit && admitting) => {
                (chain.name.clone(), format!("drops packets {direction} pods ({block}) by its policy"))
            }
            _ => return None,
        },
    };
    Some(Blocker {
        chain: format!("{} {name}", chain.table),
        what,
        cure: cure(&chain.table, ours_to_admit, packet.bridge),
    })
}

fn cure(table: &Table, ours_to_admit: bool, bridge: &str) -> String {
    if table.name.starts_with("firewalld") {
        format!("firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload")
    } else if ours_to_admit {
        format!(
            "accept -i {bridge} and -o {bridge} before that rule, or let the agent append accept rules to a policy drop"
        )
    } else {
        format!("add rules before it that accept iifname \"{bridge}\" and oifname \"{bridge}\"")
    }
}

/// Families whose legacy (not nft) `filter` table is loaded. Its policy cannot be read with this agent's
/// rights without side effects, so it is reported as a doubt.
pub fn legacy_tables(proc_net: &Path) -> Vec<Family> {
    let has_filter = |file: &str| {
        let names = std::fs::read_to_string(proc_net.join(file)).unwrap_or_default();
        names.lines().any(|name| name == "filter")
    };
    let files = [(Family::IPv4, "ip_tables_names"), (Family::IPv6, "ip6_tables_names")];
    files.into_iter().filter(|(_, file)| has_filter(file)).map(|(family, _)| family).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_cni::nft::HookInfo;

    fn admit(direction: Direction) -> Admit {
        Admit { block: "10.244.1.0/24".parse().unwrap(), datapath: Datapath::Bridge, direction }
    }

    fn info(rule: &Rule, handle: u64, comment: Option<&str>) -> RuleInfo {
        RuleInfo {
            chain: CHAIN.into(),
            handle,
            expressions: rule.expressions().to_vec(),
            comment: comment.map(str::to_owned),
        }
    }

    fn rule() -> Rule {
        Rule::new(&filter(Family::IPv4), CHAIN)
    }

    /// A ruleset with one base chain at the forward hook.
    fn ruleset(table: &Table, name: &str, policy: Policy, rules: Vec<Rule>) -> Ruleset {
        let hook = HookInfo { kind: "filter".into(), number: 2, priority: 0, policy };
        let rules = rules.iter().enumerate().map(|(i, r)| info(r, i as u64, None)).collect();
        Ruleset {
            chains: vec![ChainInfo { table: table.clone(), name: name.into(), hook: Some(hook) }],
            owned: BTreeSet::new(),
            rules: [((table.clone(), name.to_owned()), rules)].into(),
        }
    }

    fn both() -> BTreeSet<Admit> {
        [admit(Direction::FromPods), admit(Direction::ToPods)].into()
    }

    #[test]
    fn our_rule_is_recognised_also_as_iptables_restores_it() {
        for direction in [Direction::FromPods, Direction::ToPods] {
            let ours = admit_rule(&admit(direction), "cni0");
            let as_written = info(&ours, 7, Some("plat"));
            let expected = Some(Admitted { admit: admit(direction), handle: 7, ours: true });
            assert_eq!(read_admit(&as_written, Family::IPv4, "cni0"), expected);

            // iptables-nft: interface first, a short name, and the comment as a match.
            let mut comment = vec![12, 0, 1, 0];
            comment.extend_from_slice(b"comment\0");
            comment.extend_from_slice(&[12, 0, 3, 0]);
            comment.extend_from_slice(b"plat\0\0\0\0");
            let mut expressions = as_written.expressions.clone();
            expressions.rotate_left(2);
            let at = expressions.iter().position(|e| matches!(e, Expr::Meta { .. })).unwrap();
            expressions[at + 1] = Expr::Compare { op: Cmp::Eq, value: b"cni0\0".to_vec() };
            let counter = expressions.iter().position(|e| *e == Expr::Counter).unwrap();
            let verdict = expressions.remove(counter + 1);
            expressions.push(Expr::Other { name: "match".into(), data: comment });
            expressions.push(verdict);
            let restored = RuleInfo { expressions, comment: None, ..as_written };
            assert_eq!(read_admit(&restored, Family::IPv4, "cni0"), expected);
        }
    }

    #[test]
    fn other_accept_rules_are_not_taken_for_ours() {
        let block = admit(Direction::FromPods).block;
        let from = || rule().saddr(Addr::In(block));
        for (foreign, what) in [
            (from().accept(), "no interface"),
            (from().iifname(Name::Is("eth0")).accept(), "another interface"),
            (from().oifname(Name::Is("cni0")).accept(), "the other direction"),
            (from().iifname(Name::IsNot("cni0")).accept(), "not the interface"),
            (from().iifname(Name::Is("cni0")).drop(), "a drop"),
            (from().iifname(Name::Is("cni0")).ct_state(2).accept(), "a further match"),
        ] {
            assert_eq!(read_admit(&info(&foreign, 1, Some("plat")), Family::IPv4, "cni0"), None, "{what}");
        }
        let equal = from().iifname(Name::Is("cni0")).accept();
        assert!(!read_admit(&info(&equal, 1, None), Family::IPv4, "cni0").unwrap().ours);
    }

    #[test]
    fn a_drop_policy_of_the_filter_table_is_answered_with_rules_and_not_reported() {
        let drops = ruleset(&filter(Family::IPv4), CHAIN, Policy::Drop, vec![]);
        let found = judge(&drops, "cni0", &both(), true);
        assert!(found.chains[&Family::IPv4].needs_rules);
        assert_eq!(found.blockers, []);
        let switched_off = judge(&drops, "cni0", &BTreeSet::new(), false);
        assert_eq!(switched_off.blockers, [], "nothing is wanted");
        assert_eq!(judge(&drops, "cni0", &both(), false).blockers.len(), 2);
    }

    #[test]
    fn an_explicit_drop_before_the_end_is_named_and_an_accept_before_it_counts() {
        let block = admit(Direction::FromPods).block;
        let range: Block = "10.244.0.0/16".parse().unwrap();
        let accept =
            || vec![rule().saddr(Addr::In(range)).accept(), rule().oifname(Name::Is("cni0")).accept()];
        let table = filter(Family::IPv4);
        let judged = |rules: Vec<Rule>| {
            judge(&ruleset(&table, CHAIN, Policy::Accept, rules), "cni0", &both(), true).blockers
        };
        assert_eq!(judged(vec![rule().counter().drop()]).len(), 2);
        assert_eq!(judged(vec![rule().saddr(Addr::In(block)).drop()]).len(), 1);
        assert_eq!(judged(vec![rule().iifname(Name::Is("eth0")).drop()]), []);
        assert_eq!(judged(vec![rule().ct_state(1).drop()]), [], "it depends on the packet");
        assert_eq!(judged([accept(), vec![rule().drop()]].concat()), []);
        let reject = rule().with([Expr::Other { name: "reject".into(), data: vec![] }], "reject");
        let blockers = judged(vec![reject]);
        assert_eq!(blockers[0].chain, "ip filter FORWARD");
        assert!(blockers[0].to_string().contains("10.244.1.0/24"), "{}", blockers[0]);
    }

    #[test]
    fn jumps_are_followed() {
        let table = Table::new(TableFamily::Inet, "firewalld");
        let base = |chain: &str| Rule::new(&table, chain);
        let mut rules = ruleset(
            &table,
            "filter_FORWARD",
            Policy::Accept,
            vec![
                base("filter_FORWARD").verdict(Verdict::Jump("zones".into())),
                base("filter_FORWARD").drop(),
            ],
        );
        let zones = |rule: &Rule| RuleInfo { chain: "zones".into(), ..info(rule, 9, None) };
        rules.rules.insert((table.clone(), "zones".into()), vec![]);
        let blockers = judge(&rules, "cni0", &both(), true).blockers;
        assert_eq!(blockers[0].chain, "inet firewalld filter_FORWARD");
        assert!(blockers[0].cure.starts_with("firewall-cmd"));
        rules.rules.insert(
            (table.clone(), "zones".into()),
            vec![
                zones(&base("zones").iifname(Name::Is("cni0")).accept()),
                zones(&base("zones").oifname(Name::Is("cni0")).accept()),
            ],
        );
        assert_eq!(judge(&rules, "cni0", &both(), true).blockers, []);
    }

    #[test]
    fn a_table_with_an_owner_is_reported_and_never_written_to() {
        let mut owned = ruleset(&filter(Family::IPv4), CHAIN, Policy::Drop, vec![]);
        owned.owned.insert(filter(Family::IPv4));
        let found = judge(&owned, "cni0", &both(), true);
        assert!(!found.chains[&Family::IPv4].needs_rules);
        assert_eq!(found.blockers.len(), 2);
    }

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
