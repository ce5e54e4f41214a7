//! What becomes of a packet in a ruleset: pure.
//!
//! The packet goes through the base chains of each hook in the order of their priorities, with what they change of it
//! (its mark, its tracking). A test whose answer is not known sends it both ways. So a verdict is one of all possible
//! ways: accepted if no way ends in a drop, dropped if all do, else unknown, with the first test that was not known on a
//! way that ends in a drop.
//!
//! The hooks are prerouting, forward and postrouting, of the families ip, ip6 and inet; nat chains see the first packet
//! of a connection alone. What bridges and single devices filter (`bridge`, `netdev`, ingress) is not judged.

use std::collections::BTreeSet;
use std::fmt;
use std::rc::Rc;

use plat_cni::nft::{Hook, Policy, Table, TableFamily, Verdict as Go};
use plat_crds::block::Family;
use plat_crds::names::NFT_TABLE;

use super::bits::{self, Answer, Byte};
use super::ops::{Field, Nat, Op, REGISTERS, Relation};
use super::packet::{Connection, Packet};
use super::ruleset::{Base, Found, Rule, Ruleset, Value, Want};
use super::xt::{self, Match, Tracking};

/// Chains deep that jumps are followed, as in the kernel (`NFT_JUMP_STACK_SIZE`).
const MAX_DEPTH: usize = 16;
/// Rules that one packet is led through at most. Beyond it the verdict is unknown, and says so.
pub const MAX_STEPS: usize = 200_000;
/// Where connection tracking begins (`NF_IP_PRI_CONNTRACK`).
const TRACKING: i32 = -200;
/// Where nat chains stand, whatever priority they have among each other (`NF_IP_PRI_NAT_DST`, `…_SRC`).
const NAT_PRIORITIES: [(Hook, i32); 2] = [(Hook::Prerouting, -100), (Hook::Postrouting, 100)];

/// A place in the ruleset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Table.
    pub table: Table,
    /// Chain.
    pub chain: String,
    /// Handle of the rule; `None`: the chain's policy.
    pub rule: Option<u64>,
    /// The base chain that led there.
    pub base: String,
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It gets through.
    Accepted,
    /// It is dropped.
    Dropped(Place),
    /// It is dropped, and its sender is told.
    Rejected(Place),
    /// It may get through or not.
    Unknown {
        /// Where it does not, if it does not.
        at: Place,
        /// What is not known, in words.
        why: String,
        /// Where that is asked.
        asked: Place,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {} {}", self.table, self.chain)?;
        match self.rule {
            Some(handle) => write!(f, " rule {handle}"),
            None => f.write_str(" policy"),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Accepted => f.write_str("accepted"),
            Verdict::Dropped(place) => write!(f, "dropped by {place}"),
            Verdict::Rejected(place) => write!(f, "rejected by {place}"),
            Verdict::Unknown { at, why, .. } => {
                write!(f, "unknown, perhaps dropped by {at}, depending on '{why}'")
            }
        }
    }
}

/// What was found for one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What becomes of it.
    pub verdict: Verdict,
    /// Where its source address is changed first, if it surely is.
    pub translated: Option<Place>,
    /// What has to be read before this counts.
    pub wants: BTreeSet<Want>,
}

/// What is not known, and where it is asked.
type Doubt = Option<Rc<(Place, String)>>;

/// What chains change of a packet, or know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct State {
    mark: [Byte; 4],
    tracking: Tracking,
    /// Whether its source is another by now.
    translated: bool,
    /// The first thing not known on the way here.
    doubt: Doubt,
}

impl State {
    fn doubting(mut self, place: &Place, why: &str) -> State {
        self.doubt.get_or_insert_with(|| Rc::new((place.clone(), why.to_owned())));
        self
    }
}

/// What is the same on two ways that meet.
fn join(one: Option<State>, other: Option<State>) -> Option<State> {
    let (mut one, other) = match (one, other) {
        (Some(one), Some(other)) => (one, other),
        (one, other) => return one.or(other),
    };
    one.mark.iter_mut().zip(other.mark).for_each(|(byte, other)| *byte = byte.common(other));
    if one.tracking != other.tracking {
        one.tracking = Tracking::Unknown;
    }
    one.translated |= other.translated;
    one.doubt = one.doubt.or(other.doubt);
    Some(one)
}

/// How a way ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Drop,
    Reject,
    /// It is not known where it goes on.
    Lost,
}

/// The ways that a packet may go through a chain.
#[derive(Default)]
struct Ends {
    /// Out of its end, or back.
    through: Option<State>,
    /// Accepted.
    accepted: Option<State>,
    /// Accepted with another source address.
    translated: Option<(State, Place)>,
    /// Not further.
    stopped: Stopped,
}

type Stopped = Option<(Stop, Place, Doubt)>;

/// The first of two; but one of which it is not known where it leads makes all of it unknown.
fn first(one: Stopped, other: Stopped) -> Stopped {
    match (&one, &other) {
        (Some((Stop::Lost, ..)), _) | (_, None) => one,
        (_, Some((Stop::Lost, ..))) => other,
        _ => one.or(other),
    }
}

impl Ends {
    /// Adds another way's ends but those that lead through.
    fn add(&mut self, other: Ends) -> Option<State> {
        self.accepted = join(self.accepted.take(), other.accepted);
        self.translated = self.translated.take().or(other.translated);
        self.stopped = first(self.stopped.take(), other.stopped);
        other.through
    }

    fn stop(&mut self, stop: Stop, place: &Place, state: State) {
        self.stopped = first(self.stopped.take(), Some((stop, place.clone(), state.doubt)));
    }

    /// Whether all ways lead through.
    fn only_through(&self) -> bool {
        self.accepted.is_none() && self.translated.is_none() && self.stopped.is_none()
    }
}

/// What a rule that applies does.
enum Effect {
    Next,
    Go(Go),
    Reject,
    Nat(Nat),
    Lost(String),
}

struct Walk<'a> {
    ruleset: &'a Ruleset,
    packet: &'a Packet,
    hook: Hook,
    base: &'a str,
    wants: BTreeSet<Want>,
    steps: usize,
}

/// Leads the packet through the ruleset.
pub fn judge(ruleset: &Ruleset, packet: &Packet) -> Outcome {
    let mut walk =
        Walk { ruleset, packet, hook: Hook::Prerouting, base: "", wants: BTreeSet::new(), steps: 0 };
    let start = State { mark: [Byte::new(0); 4], tracking: Tracking::Not, translated: false, doubt: None };
    let (mut state, mut stopped, mut translated) = (Some(start), None, None);
    for hook in [Hook::Prerouting, Hook::Forward, Hook::Postrouting] {
        let Some(at) = state.take() else { break };
        let ends = walk.hook(hook, at);
        stopped = first(stopped, ends.stopped);
        translated = ends.translated;
        state = ends.accepted;
    }
    Outcome {
        verdict: verdict(state.is_some(), stopped),
        translated: translated.map(|(_, place)| place),
        wants: walk.wants,
    }
}

fn verdict(accepted: bool, stopped: Option<(Stop, Place, Doubt)>) -> Verdict {
    match (accepted, stopped) {
        (_, None) => Verdict::Accepted,
        (false, Some((Stop::Drop, place, _))) => Verdict::Dropped(place),
        (false, Some((Stop::Reject, place, _))) => Verdict::Rejected(place),
        (_, Some((_, at, doubt))) => {
            let (asked, why) = doubt.map_or_else(|| (at.clone(), String::new()), |doubt| (*doubt).clone());
            Verdict::Unknown { at, why, asked }
        }
    }
}

impl<'a> Walk<'a> {
    /// Through all chains at one hook. `accepted` of the ends is what goes on.
    fn hook(&mut self, hook: Hook, mut state: State) -> Ends {
        self.hook = hook;
        let mut ends = Ends::default();
        for base in order(self.ruleset, hook, self.packet.family()) {
            let is_nat = base.hook.kind == "nat";
            // Only a connection's first packet meets nat chains, and none after one has translated it.
            if is_nat && (self.packet.connection != Connection::New || ends.translated.is_some()) {
                continue;
            }
            if hook == Hook::Prerouting && priority(base) >= TRACKING && state.tracking == Tracking::Not {
                state.tracking = Tracking::Tracked;
            }
            self.base = &base.name;
            let mut of_chain = self.chain(&base.table, &base.name, state, 0);
            if let (Some(state), Policy::Drop) = (&of_chain.through, base.hook.policy) {
                let place = self.place(&base.table, &base.name, None);
                let state = state.clone();
                of_chain.through = None;
                of_chain.stop(Stop::Drop, &place, state);
            }
            // Translation is sure only if it happens on all ways.
            let sure = of_chain.through.is_none() && of_chain.accepted.is_none();
            let changed = of_chain.translated.take();
            let accepted = of_chain.accepted.take();
            let mut on = join(ends.add(of_chain), accepted);
            if let Some((at, place)) = changed {
                on = join(on, Some(State { translated: true, ..at.clone() }));
                ends.translated = ends.translated.or_else(|| sure.then_some((at, place)));
            }
            match on {
                Some(on) => state = on,
                None => return ends,
            }
        }
        if state.tracking == Tracking::Not {
            state.tracking = Tracking::Tracked;
        }
        ends.accepted = Some(state);
        ends
    }

    fn place(&self, table: &Table, chain: &str, rule: Option<u64>) -> Place {
        Place { table: table.clone(), chain: chain.to_owned(), rule, base: self.base.to_owned() }
    }

    fn chain(&mut self, table: &'a Table, chain: &str, state: State, depth: usize) -> Ends {
        let mut ends = Ends::default();
        let place = self.place(table, chain, None);
        let Some(rules) = self.ruleset.rules(table, chain) else {
            self.wants.insert(Want::Chain(table.clone(), chain.to_owned()));
            ends.stop(Stop::Lost, &place, state.doubting(&place, "a chain that was not read"));
            return ends;
        };
        if depth > MAX_DEPTH {
            ends.stop(Stop::Lost, &place, state.doubting(&place, "a chain that is jumped to too deeply"));
            return ends;
        }
        let mut state = state;
        for rule in rules {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                let why = format!("what follows {MAX_STEPS} rules");
                ends.stop(Stop::Lost, &place, state.doubting(&place, &why));
                return ends;
            }
            let Some((effect, taken, doubt)) = self.apply(table, rule, &state) else { continue };
            let place = Place { rule: Some(rule.handle), ..place.clone() };
            let before = state.doubt.clone();
            let (skipped, taken) = match doubt {
                None => (None, taken),
                Some(why) => (Some(state.doubting(&place, &why)), taken.doubting(&place, &why)),
            };
            let (through, together) = self.follow(effect, taken, (table, &place, depth), &mut ends);
            match join(skipped, through) {
                // All ways go on from here: what was not known made no difference.
                Some(on) if together => state = State { doubt: before, ..on },
                Some(on) => state = on,
                None => return ends,
            }
        }
        ends.through = join(ends.through.take(), Some(state));
        ends
    }

    /// Where a rule's effect leads; what it gives back goes on behind the rule, and says whether that is all.
    fn follow(
        &mut self,
        effect: Effect,
        state: State,
        (table, place, depth): (&'a Table, &Place, usize),
        ends: &mut Ends,
    ) -> (Option<State>, bool) {
        match effect {
            Effect::Next | Effect::Go(Go::Continue) => return (Some(state), true),
            Effect::Go(Go::Accept) => ends.accepted = join(ends.accepted.take(), Some(state)),
            Effect::Go(Go::Return) => ends.through = join(ends.through.take(), Some(state)),
            Effect::Go(Go::Drop) => ends.stop(Stop::Drop, place, state),
            Effect::Reject => ends.stop(Stop::Reject, place, state),
            Effect::Go(Go::Jump(chain)) => {
                let of_chain = self.chain(table, &chain, state, depth + 1);
                let together = of_chain.only_through();
                return (ends.add(of_chain), together);
            }
            Effect::Go(Go::Goto(chain)) => {
                let of_chain = self.chain(table, &chain, state, depth + 1);
                let through = ends.add(of_chain);
                ends.through = join(ends.through.take(), through);
            }
            Effect::Nat(Nat::Source) => {
                ends.translated.get_or_insert_with(|| (state, place.clone()));
            }
            Effect::Nat(Nat::Destination) => {
                let why = "where it sends the packet";
                ends.stop(Stop::Lost, place, state.doubting(place, why));
            }
            Effect::Lost(why) => ends.stop(Stop::Lost, place, state.doubting(place, &why)),
        }
        (None, false)
    }

    /// Runs a rule. `None`: it does not apply. Else what it does, the packet then, and the first test in it whose
    /// answer is not known.
    fn apply(
        &mut self,
        table: &Table,
        rule: &Rule,
        state: &State,
    ) -> Option<(Effect, State, Option<String>)> {
        let mut registers = [Byte::UNKNOWN; REGISTERS];
        let mut loaded = String::new();
        let mut state = state.clone();
        let mut doubt = None;
        for op in &rule.ops {
            let answer = match op {
                Op::Load { to, field } => {
                    let loaded_now = self.load(field, &state, |bytes| write(&mut registers, *to, bytes));
                    if loaded_now == Answer::Unknown {
                        loaded = super::text::field(field, self.packet.family());
                        write(&mut registers, *to, &[Byte::UNKNOWN; 16]);
                    }
                    // What could not be loaded is met by the test of it.
                    if loaded_now == Answer::No { Answer::No } else { Answer::Yes }
                }
                Op::Constant { to, value } => {
                    write_known(&mut registers, *to, value);
                    Answer::Yes
                }
                Op::Compare { from, relation, value } => compare(&registers, *from, *relation, value),
                Op::Range { from, inverted, low, high } => {
                    let range = *from..from.saturating_add(low.len());
                    registers
                        .get(range)
                        .map_or(Answer::Unknown, |r| bits::within(r, low, high).turned(*inverted))
                }
                Op::Bitwise { from, to, mask, xor } => {
                    let masked: Vec<Byte> = registers
                        .get(*from..)
                        .into_iter()
                        .flatten()
                        .zip(mask.iter().zip(xor))
                        .map(|(byte, (mask, xor))| byte.masked(*mask, *xor))
                        .collect();
                    write(&mut registers, *to, &masked);
                    Answer::Yes
                }
                Op::Swap { from, to, length, word } => {
                    let bytes = registers.get(*from..from.saturating_add(*length)).unwrap_or_default();
                    let turned: Vec<Byte> =
                        bytes.chunks(*word).flat_map(|word| word.iter().rev()).copied().collect();
                    write(&mut registers, *to, &turned);
                    Answer::Yes
                }
                Op::Lookup { set, from, inverted } => match self.find(table, set, &registers, *from) {
                    Found::Value(_) => Answer::Yes.turned(*inverted),
                    Found::Nothing => Answer::No.turned(*inverted),
                    Found::Unknown => {
                        loaded = format!("{loaded} @{set}");
                        Answer::Unknown
                    }
                },
                Op::Map { map, from, to } => match (self.find(table, map, &registers, *from), to) {
                    (Found::Value(Value::Data(data)), Some(to)) => {
                        write_known(&mut registers, *to, data);
                        Answer::Yes
                    }
                    (Found::Value(Value::Verdict(verdict)), None) => {
                        return Some((Effect::Go(verdict.clone()), state, doubt));
                    }
                    (Found::Nothing, _) => Answer::No,
                    (_, None) => {
                        return Some((Effect::Lost(format!("{loaded} vmap @{map}")), state, doubt));
                    }
                    (_, Some(to)) => {
                        write(&mut registers, *to, &[Byte::UNKNOWN; 16]);
                        loaded = format!("{loaded} map @{map}");
                        Answer::Unknown
                    }
                },
                Op::SetMark { from } => {
                    let mark = registers.get(*from..from.saturating_add(4)).and_then(|m| m.try_into().ok());
                    state.mark = mark.unwrap_or([Byte::UNKNOWN; 4]);
                    Answer::Yes
                }
                Op::Match(Match::SetMark { mask, xor }) => {
                    for (byte, (mask, xor)) in state.mark.iter_mut().zip(mask.iter().zip(xor)) {
                        *byte = byte.masked(*mask, *xor);
                    }
                    Answer::Yes
                }
                Op::Match(Match::SpoilMark) => {
                    state.mark = [Byte::UNKNOWN; 4];
                    Answer::Yes
                }
                Op::Match(found) => {
                    let answer = xt::holds(found, self.packet, state.mark, state.tracking);
                    if answer == Answer::Unknown {
                        loaded = super::text::xt_match(found);
                    }
                    answer
                }
                Op::Untrack => {
                    state.tracking = match state.tracking {
                        Tracking::Not => Tracking::Untracked,
                        other => other,
                    };
                    Answer::Yes
                }
                Op::Pass => Answer::Yes,
                Op::Unknown(what) => {
                    loaded.clone_from(what);
                    Answer::Unknown
                }
                Op::Verdict(verdict) => return Some((Effect::Go(verdict.clone()), state, doubt)),
                Op::Reject => return Some((Effect::Reject, state, doubt)),
                Op::Nat(nat) => return Some((Effect::Nat(*nat), state, doubt)),
                Op::Opaque(what) => return Some((Effect::Lost(what.clone()), state, doubt)),
            };
            match answer {
                Answer::Yes => {}
                Answer::No => return None,
                Answer::Unknown => {
                    doubt.get_or_insert_with(|| loaded.trim().to_owned());
                }
            }
        }
        Some((Effect::Next, state, doubt))
    }

    fn find(&mut self, table: &Table, set: &str, registers: &[Byte], from: usize) -> Found<'a> {
        match self.ruleset.set(table, set) {
            Some(found) => found.find(registers.get(from..).unwrap_or_default()),
            None => {
                self.wants.insert(Want::Set(table.clone(), set.to_owned()));
                Found::Unknown
            }
        }
    }

    /// Loads a field. No: the packet has no such thing, and the rule does not apply.
    fn load(&self, field: &Field, state: &State, into: impl FnOnce(&[Byte])) -> Answer {
        match field {
            Field::Meta(key) => self.meta(*key, state, into),
            Field::Payload(base, offset, length) => self.payload(*base, *offset, *length, state, into),
            Field::Conntrack(key) => self.conntrack(*key, state, into),
            Field::Fib(result, flags) => self.fib(*result, *flags, into),
            Field::Other(_) => Answer::Unknown,
        }
    }

    fn payload(
        &self,
        base: u32,
        offset: usize,
        length: usize,
        state: &State,
        into: impl FnOnce(&[Byte]),
    ) -> Answer {
        const NETWORK: u32 = 1;
        const TRANSPORT: u32 = 2;
        let (network, transport) = (&self.packet.network, &self.packet.transport);
        // Some rules look at ports from the start of an IP header without options.
        let (header, offset) = match (base, offset.checked_sub(network.len())) {
            (NETWORK, None) => (network, offset),
            (NETWORK, Some(behind)) => (transport, behind),
            (TRANSPORT, _) => (transport, offset),
            _ => return Answer::Unknown,
        };
        let source = match (base, self.packet.family()) {
            (TRANSPORT, _) => 0..2,
            (_, Family::IPv4) => 12..16,
            (_, Family::IPv6) => 8..24,
        };
        let range = offset..offset.saturating_add(length);
        if state.translated && range.start < source.end && source.start < range.end {
            return Answer::Unknown;
        }
        header.get(range).map_or(Answer::Unknown, |bytes| loaded(bytes, into))
    }

    fn meta(&self, key: u32, state: &State, into: impl FnOnce(&[Byte])) -> Answer {
        let packet = self.packet;
        let (ether_type, protocol): (u16, u8) = match packet.family() {
            Family::IPv4 => (0x0800, TableFamily::Ip.number()),
            Family::IPv6 => (0x86dd, TableFamily::Ip6.number()),
        };
        // Before routing it leaves by no link, which reads as 0 and as an empty name.
        let routed = self.hook != Hook::Prerouting;
        match key {
            1 => loaded(&ether_type.to_be_bytes().map(Byte::new), into),
            3 => loaded(&state.mark, into),
            4 => loaded(&packet.from_link.index.to_ne_bytes().map(Byte::new), into),
            5 => {
                let index = if routed { packet.to_link.index } else { 0 };
                loaded(&index.to_ne_bytes().map(Byte::new), into)
            }
            6 => loaded(&padded(&packet.from_link.name), into),
            7 => loaded(&padded(if routed { &packet.to_link.name } else { "" }), into),
            // User and group of a socket, which a forwarded packet has not.
            10 | 11 => Answer::No,
            15 => loaded(&[Byte::new(protocol)], into),
            16 => loaded(&[Byte::new(packet.protocol())], into),
            // `pkttype host`
            19 => loaded(&[Byte::new(0)], into),
            _ => Answer::Unknown,
        }
    }

    fn conntrack(&self, key: u32, state: &State, into: impl FnOnce(&[Byte])) -> Answer {
        const SEEN_REPLY: u8 = 2;
        const CONFIRMED: u8 = 8;
        const DESTINATION_TRANSLATED: u8 = 32;
        let word = |low: Byte, into: &mut dyn FnMut(&[Byte])| {
            let mut bytes = [low, Byte::new(0), Byte::new(0), Byte::new(0)];
            if cfg!(target_endian = "big") {
                bytes.reverse();
            }
            into(&bytes);
            Answer::Yes
        };
        let mut into = Some(into);
        let mut into = |bytes: &[Byte]| {
            if let Some(into) = into.take() {
                into(bytes);
            }
        };
        let is_new = self.packet.connection == Connection::New;
        match (key, state.tracking) {
            (0, tracking) => match xt::connection_state(self.packet, tracking, xt::state::UNTRACKED) {
                Some(at) => u8::try_from(at).map_or(Answer::Unknown, |at| word(Byte::new(at), &mut into)),
                None => Answer::Unknown,
            },
            // Without a connection there is nothing to load.
            (_, Tracking::Not | Tracking::Untracked) => Answer::No,
            (1, Tracking::Tracked) => loaded(&[Byte::new(u8::from(!is_new))], into),
            // Of an answer it is not known whether its connection is assured, or its source translated.
            (2, Tracking::Tracked) if is_new => word(Byte::new(0), &mut into),
            (2, Tracking::Tracked) => {
                let known = SEEN_REPLY | CONFIRMED | DESTINATION_TRANSLATED;
                word(Byte::partly(SEEN_REPLY | CONFIRMED, known), &mut into)
            }
            _ => Answer::Unknown,
        }
    }

    /// What the routing table says of the synthetic packet, whose links are those of the kernel's routes.
    fn fib(&self, result: u32, flags: u32, into: impl FnOnce(&[Byte])) -> Answer {
        const SOURCE: u32 = 1;
        const MARK: u32 = 4;
        const IN: u32 = 8;
        const PRESENT: u32 = 32;
        const UNICAST: u32 = 1;
        const BACK: u32 = SOURCE | IN;
        let from = &self.packet.from_link;
        match (result, flags & !MARK) {
            // Back by the link that it came by.
            (1 | 2, flags) if flags == BACK | PRESENT => loaded(&[Byte::new(1)], into),
            (1, BACK) => loaded(&from.index.to_ne_bytes().map(Byte::new), into),
            (2, BACK) => loaded(&padded(&from.name), into),
            (3, 1 | 2) => loaded(&UNICAST.to_ne_bytes().map(Byte::new), into),
            _ => Answer::Unknown,
        }
    }
}

fn loaded(bytes: &[Byte], into: impl FnOnce(&[Byte])) -> Answer {
    into(bytes);
    Answer::Yes
}

/// An interface's name, as the kernel pads it.
fn padded(name: &str) -> [Byte; 16] {
    let mut bytes = [Byte::new(0); 16];
    bytes.iter_mut().zip(name.bytes()).for_each(|(to, byte)| *to = Byte::new(byte));
    bytes
}

/// Writes into a register; the rest of its last word becomes zero, as in the kernel.
fn write(registers: &mut [Byte; REGISTERS], to: usize, bytes: &[Byte]) {
    let place = registers.get_mut(to..).unwrap_or_default();
    let whole = bytes.len().next_multiple_of(4);
    let bytes = bytes.iter().copied().chain(std::iter::repeat(Byte::new(0))).take(whole);
    place.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
}

fn write_known(registers: &mut [Byte; REGISTERS], to: usize, bytes: &[u8]) {
    let bytes: Vec<Byte> = bytes.iter().copied().map(Byte::new).collect();
    write(registers, to, &bytes);
}

fn compare(registers: &[Byte; REGISTERS], from: usize, relation: Relation, value: &[u8]) -> Answer {
    let Some(bytes) = registers.get(from..from.saturating_add(value.len())) else { return Answer::Unknown };
    let ordered = |holds: fn(std::cmp::Ordering) -> bool| {
        bits::order(bytes, value).map_or(Answer::Unknown, |order| Answer::of(holds(order)))
    };
    match relation {
        Relation::Equal => bits::equal(bytes, value),
        Relation::Unequal => bits::equal(bytes, value).turned(true),
        Relation::Less => ordered(|order| order.is_lt()),
        Relation::AtMost => ordered(|order| order.is_le()),
        Relation::Greater => ordered(|order| order.is_gt()),
        Relation::AtLeast => ordered(|order| order.is_ge()),
    }
}

fn priority(base: &Base) -> i32 {
    let fixed =
        NAT_PRIORITIES.iter().find(|(hook, _)| base.hook.kind == "nat" && hook.number() == base.hook.number);
    fixed.map_or(base.hook.priority, |(_, priority)| *priority)
}

/// Base chains in the order in which a packet meets them.
fn order(ruleset: &Ruleset, hook: Hook, family: Family) -> Vec<&Base> {
    let mut bases = ruleset.bases(hook.number(), family);
    // Of equal ones the kernel asks the newest first, which a dump does not tell; ours counts as that.
    bases.sort_by_key(|base| (priority(base), base.hook.priority, base.table.name != NFT_TABLE));
    bases
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::forward::ops::op;
    use crate::kernel::forward::packet::{Link, Peer, Traffic, pod};
    use crate::kernel::forward::ruleset::{Member, Set};
    use plat_cni::nft::{Addr, ChainInfo, Cmp, Expr, HookInfo, Name, Rule as Written};
    use plat_crds::block::Block;
    use proptest::prelude::*;

    fn table() -> Table {
        Table::new(TableFamily::Inet, "site")
    }

    fn base(name: &str, hook: Hook, kind: &str, priority: i32, policy: Policy) -> ChainInfo {
        let hook = HookInfo { kind: kind.into(), number: hook.number(), priority, policy };
        ChainInfo { table: table(), name: name.into(), hook: Some(hook) }
    }

    fn packet(connection: Connection) -> Packet {
        let block = |text: &str| text.parse::<Block>().unwrap();
        let link = |name: &str, index| Link { name: name.into(), index };
        let (own, peer) = (block("10.244.1.0/24"), block("10.244.2.0/24"));
        let (from, to) = ((pod(&own), &link("cni0", 7)), (pod(&peer), &link("eth0", 2)));
        Packet::new(Traffic::To(Peer::Pods), own, connection, from, to)
    }

    fn rules(written: &[Written]) -> Vec<Rule> {
        let rule = |(handle, rule): (u64, &Written)| Rule {
            handle,
            ops: rule.expressions().iter().map(op).collect(),
        };
        (1..).zip(written).map(rule).collect()
    }

    fn rule() -> Written {
        Written::new(&table(), "forward")
    }

    /// What becomes of a new connection in a chain `forward` with these rules, and others to jump to.
    fn judged(policy: Policy, written: &[Written], others: &[(&str, &[Written])]) -> Verdict {
        let mut ruleset = Ruleset::of(&[base("forward", Hook::Forward, "filter", 0, policy)]);
        ruleset.add_rules(&table(), "forward", rules(written));
        for (chain, written) in others {
            ruleset.add_rules(&table(), chain, rules(written));
        }
        judge(&ruleset, &packet(Connection::New)).verdict
    }

    fn limit(rule: Written) -> Written {
        rule.with([Expr::Other { name: "limit".into(), data: vec![] }], "limit rate 1/second")
    }

    fn at(chain: &str, rule: Option<u64>) -> Place {
        Place { table: table(), chain: chain.into(), rule, base: "forward".into() }
    }

    fn jump(chain: &str) -> Written {
        rule().verdict(Go::Jump(chain.into()))
    }

    #[test]
    fn the_first_rule_that_applies_decides_and_the_policy_where_none_does() {
        let inside = || rule().saddr(Addr::In("10.244.0.0/16".parse().unwrap()));
        for (policy, written, expected) in [
            (Policy::Accept, vec![], Verdict::Accepted),
            (Policy::Drop, vec![], Verdict::Dropped(at("forward", None))),
            (Policy::Drop, vec![rule().iifname(Name::Is("cni0")).accept()], Verdict::Accepted),
            (Policy::Drop, vec![rule().iifname(Name::Begins("cni")).accept()], Verdict::Accepted),
            (
                Policy::Drop,
                vec![rule().iifname(Name::IsNot("cni0")).accept()],
                Verdict::Dropped(at("forward", None)),
            ),
            (Policy::Accept, vec![inside().drop()], Verdict::Dropped(at("forward", Some(1)))),
            (Policy::Accept, vec![inside().accept(), rule().drop()], Verdict::Accepted),
            (Policy::Accept, vec![rule().ct_state(1).drop(), rule().counter()], Verdict::Accepted),
            (Policy::Accept, vec![rule().ct_state(8).drop()], Verdict::Dropped(at("forward", Some(1)))),
        ] {
            assert_eq!(judged(policy, &written, &[]), expected, "{written:?}");
        }
    }

    #[test]
    fn jumps_come_back_and_gotos_do_not() {
        let goto = rule().verdict(Go::Goto("a".into()));
        let back = || rule().verdict(Go::Return);
        let dropped = |chain: &str, rule| Verdict::Dropped(at(chain, rule));
        assert_eq!(
            judged(Policy::Drop, &[jump("a"), rule().accept()], &[("a", &[back()])]),
            Verdict::Accepted
        );
        assert_eq!(
            judged(Policy::Drop, &[goto, rule().accept()], &[("a", &[back()])]),
            dropped("forward", None)
        );
        assert_eq!(judged(Policy::Accept, &[jump("a")], &[("a", &[rule().drop()])]), dropped("a", Some(1)));
        // A chain that leads into itself, which the kernel would not have.
        assert!(matches!(
            judged(Policy::Accept, &[jump("a")], &[("a", &[jump("a")])]),
            Verdict::Unknown { .. }
        ));
    }

    #[test]
    fn what_is_not_known_counts_only_where_it_makes_a_difference() {
        let unknown = |verdict: Verdict| match verdict {
            Verdict::Unknown { at, why, .. } => (at.chain, at.rule, why),
            other => panic!("{other:?}"),
        };
        let limited = || limit(rule());
        assert_eq!(
            judged(Policy::Accept, &[limited().accept(), limited().counter()], &[]),
            Verdict::Accepted
        );
        assert_eq!(
            judged(Policy::Drop, &[limited().drop()], &[]),
            Verdict::Dropped(at("forward", Some(1))),
            "dropped either way"
        );
        assert_eq!(
            unknown(judged(Policy::Accept, &[limited().drop()], &[])),
            ("forward".into(), Some(1), "limit".into())
        );
        assert_eq!(
            unknown(judged(Policy::Drop, &[limited().counter(), limited().accept()], &[])),
            ("forward".into(), None, "limit".into())
        );
        // A test that surely fails saves from one that is not known.
        let never = limited().iifname(Name::Is("eth9")).drop();
        assert_eq!(judged(Policy::Accept, &[never], &[]), Verdict::Accepted);
        let queue = rule().with([Expr::Other { name: "queue".into(), data: vec![] }], "queue");
        assert_eq!(unknown(judged(Policy::Accept, std::slice::from_ref(&queue), &[])).2, "queue");
        let (_, place, _) = unknown(judged(Policy::Accept, &[limited().drop(), queue], &[]));
        assert_eq!(place, Some(2), "another program may still let it through");
    }

    #[test]
    fn every_chain_at_a_hook_has_a_say_in_the_order_of_priorities() {
        let chains = [
            base("late", Hook::Forward, "filter", 10, Policy::Drop),
            base("early", Hook::Forward, "filter", -1, Policy::Drop),
        ];
        let mut ruleset = Ruleset::of(&chains);
        ruleset.add_rules(&table(), "late", vec![]);
        ruleset.add_rules(&table(), "early", vec![]);
        let place = |chain: &str| Place { base: chain.into(), ..at(chain, None) };
        let verdict = |ruleset: &Ruleset| judge(ruleset, &packet(Connection::New)).verdict;
        assert_eq!(verdict(&ruleset), Verdict::Dropped(place("early")));
        ruleset.add_rules(&table(), "early", rules(&[rule().accept()]));
        assert_eq!(verdict(&ruleset), Verdict::Dropped(place("late")));
        ruleset.add_rules(&table(), "late", rules(&[rule().accept()]));
        assert_eq!(verdict(&ruleset), Verdict::Accepted);
    }

    #[test]
    fn the_first_packet_alone_meets_nat_and_its_translation_is_told() {
        let chains = [base("nat", Hook::Postrouting, "nat", 90, Policy::Accept)];
        let mut ruleset = Ruleset::of(&chains);
        ruleset.add_rules(&table(), "nat", rules(&[rule().masquerade_fully_random()]));
        let translated = |connection| judge(&ruleset, &packet(connection)).translated;
        assert_eq!(translated(Connection::New).map(|place| place.chain), Some("nat".to_owned()));
        assert_eq!(translated(Connection::Established), None);
    }

    #[test]
    fn chains_and_sets_that_were_not_read_are_wanted_and_decide_nothing() {
        let mut ruleset = Ruleset::of(&[base("forward", Hook::Forward, "filter", 0, Policy::Accept)]);
        let outcome = judge(&ruleset, &packet(Connection::New));
        assert_eq!(outcome.wants, [Want::Chain(table(), "forward".into())].into());
        let in_set = rule().saddr(Addr::InSet(Family::IPv4, "pods")).drop();
        ruleset.add_rules(&table(), "forward", rules(&[in_set]));
        let outcome = judge(&ruleset, &packet(Connection::New));
        assert_eq!(outcome.wants, [Want::Set(table(), "pods".into())].into());
        assert!(matches!(outcome.verdict, Verdict::Unknown { .. }));
        let pods = |key: [u8; 4]| Member {
            key: key.to_vec(),
            last: None,
            ends_interval: false,
            value: Value::Nothing,
        };
        for (key, stops) in [([10, 0, 0, 0], true), ([10, 250, 0, 0], false)] {
            ruleset.add_set(&table(), "pods", Set::new(true, vec![], vec![pods(key)], None));
            let verdict = judge(&ruleset, &packet(Connection::New)).verdict;
            assert_eq!(verdict != Verdict::Accepted, stops, "{key:?}");
        }
    }

    #[test]
    fn a_ruleset_that_leads_in_ever_more_circles_has_an_end() {
        let names: Vec<String> = (0..15).map(|n| format!("c{n}")).collect();
        let mut ruleset = Ruleset::of(&[base("forward", Hook::Forward, "filter", 0, Policy::Accept)]);
        ruleset.add_rules(&table(), "forward", rules(&vec![jump("c0"); 4]));
        for pair in names.windows(2) {
            ruleset.add_rules(&table(), &pair[0], rules(&vec![jump(&pair[1]); 4]));
        }
        ruleset.add_rules(&table(), "c14", vec![]);
        let Verdict::Unknown { why, .. } = judge(&ruleset, &packet(Connection::New)).verdict else {
            panic!("it cannot be known")
        };
        assert!(why.contains("200000 rules"), "{why}");
    }

    fn any_expr() -> impl Strategy<Value = Expr> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
        let names = proptest::sample::select(vec![
            "cmp",
            "range",
            "bitwise",
            "byteorder",
            "lookup",
            "meta",
            "ct",
            "fib",
            "match",
            "target",
            "payload",
            "exthdr",
            "dynset",
            "objref",
            "hash",
            "immediate",
            "reject",
            "redir",
            "nat",
            "limit",
        ]);
        prop_oneof![
            (0..40u32).prop_map(|key| Expr::Meta { key }),
            (0..4u32, any::<u32>(), any::<u32>()).prop_map(|(base, offset, length)| Expr::Payload {
                base,
                offset,
                length
            }),
            (any::<u32>(), 0..20u32)
                .prop_map(|(register, key)| Expr::Into { register, load: Box::new(Expr::Meta { key }) }),
            bytes().prop_map(|value| Expr::Compare { op: Cmp::Eq, value }),
            (bytes(), bytes()).prop_map(|(mask, xor)| Expr::Bitwise { mask, xor }),
            Just(Expr::Lookup { set: "s".into(), inverted: true }),
            any::<u32>().prop_map(|to| Expr::MapLookup { map: "s".into(), to }),
            (any::<u32>(), bytes()).prop_map(|(to, value)| Expr::Load { to, value }),
            (0..25u32).prop_map(|key| Expr::Conntrack { key }),
            (0..5u32, 0..64u32).prop_map(|(result, flags)| Expr::Fib { result, flags }),
            (names, bytes()).prop_map(|(name, data)| Expr::Other { name: name.into(), data }),
            Just(Expr::Verdict(Go::Jump("forward".into()))),
            Just(Expr::Verdict(Go::Drop)),
        ]
    }

    proptest! {
        #[test]
        fn no_ruleset_panics(
            written in proptest::collection::vec(proptest::collection::vec(any_expr(), 0..6), 0..6),
            members in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..20), any::<bool>()), 0..6),
            parts in proptest::collection::vec(any::<usize>(), 0..4),
            payload in proptest::collection::vec(any::<u8>(), 0..80),
        ) {
            let member = |(key, ends_interval): (Vec<u8>, bool)| Member {
                last: (!ends_interval).then(|| key.iter().rev().copied().collect()),
                key,
                ends_interval,
                value: Value::Data(vec![1, 2]),
            };
            let set = Set::new(true, parts, members.into_iter().map(member).collect(), None);
            let mut ruleset = Ruleset::of(&[base("forward", Hook::Forward, "filter", 0, Policy::Accept)]);
            let rules: Vec<Rule> = written
                .iter()
                .map(|expressions| Rule { handle: 1, ops: expressions.iter().map(op).collect() })
                .collect();
            for rule in &rules {
                super::super::text::rule(rule, &ruleset, &table(), Family::IPv6);
            }
            ruleset.add_rules(&table(), "forward", rules);
            ruleset.add_set(&table(), "s", set);
            judge(&ruleset, &packet(Connection::New));
            super::super::read::elements(&payload);
            super::super::read::set_kind(&payload);
        }
    }
}
