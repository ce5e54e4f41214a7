//! What is known of the path to one block: a state machine without clock and sockets.
//!
//! In each round it has an errand: usually one packet of full size, whose answer says that all is well. Only a loss
//! leads to more: a small packet, to tell a path that is down from one that loses big packets, and, where it is the
//! second, a search for the size that passes. Verdicts need several losses or answers in a row, so that one lost packet
//! changes nothing.

use std::time::Duration;

use plat_crds::block::Family;

use super::search::{Progress, Search};

/// So many small packets in a row must be lost before a block counts as unreachable.
const LOST: u8 = 3;
/// So many answers in a row end that.
const BACK: u8 = 2;
/// So often must big packets be lost while small ones pass before the path is searched.
const STRIKES: u8 = 3;
/// So many full-size packets in a row must pass before a smaller path MTU is given up.
const RAISES: u8 = 2;
/// A smaller path MTU is searched again after so many rounds: it may have grown without reaching full size.
const SEARCH_EVERY: u32 = 60;
/// So many refusals in a row say that there is no responder.
const REFUSALS: u8 = 3;
/// Of the last sixteen exchanges so many are lost on a lossy path, and at most so many on one that is not any more.
const LOSSY: (u32, u32) = (4, 1);
/// Round trips of which the shortest counts: the others met a busy node.
const ROUND_TRIPS: usize = 8;

/// The verdict about a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Not known: not probed yet, the node is only just joining, or it has no responder.
    Unknown,
    /// Packets of full size pass.
    Reachable,
    /// Some packets are lost, of whatever size.
    Lossy,
    /// Small packets pass, full-size ones do not.
    BigPacketsLost,
    /// Nothing comes back.
    Unreachable,
}

impl State {
    /// All of them.
    pub const ALL: [State; 5] =
        [State::Unknown, State::Reachable, State::Lossy, State::BigPacketsLost, State::Unreachable];

    /// The value of the metric's label `state`, and the word in tables.
    pub fn label(self) -> &'static str {
        match self {
            State::Unknown => "unknown",
            State::Reachable => "reachable",
            State::Lossy => "lossy",
            State::BigPacketsLost => "big_packets_lost",
            State::Unreachable => "unreachable",
        }
    }
}

/// What came of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was answered after that time.
    Answered(Duration),
    /// Somebody told that nobody listens: the peer's agent is stopped, or older than probes; or a firewall says so.
    Refused,
    /// No answer came in time, or a router told that it cannot pass.
    Lost,
    /// This node has no route for it.
    NoRoute,
    /// It could not be sent for a reason of this node's own, which says nothing about the path.
    Unsent,
}

/// Whether another packet of the errand is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errand {
    /// Yes, at once.
    GoesOn,
    /// Not before the next round.
    Done,
}

/// What the packet under way is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// Does full size pass?
    Full,
    /// Does the smaller size that was found still pass?
    Narrow,
    /// Does anything pass, now that what was asked before was lost?
    Small { after: Asked },
    /// Does a candidate of the search pass?
    Search,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Nothing,
    Full,
    Narrow,
    Search,
}

/// A path that loses packets of full size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Narrow {
    /// What passes; `None` if not even the smallest does.
    mtu: Option<u32>,
    rounds: u32,
    raises: u8,
    strikes: u8,
}

/// The path to one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Track {
    family: Family,
    ceiling: u32,
    /// What was sent of it last: a link of this node may take less.
    full: u32,
    joining: bool,
    question: Question,
    /// The last exchanges, newest in the lowest bit; 1 is a loss.
    history: u16,
    answered_once: bool,
    lost: u8,
    back: u8,
    refused: u8,
    strikes: u8,
    lossy: bool,
    unreachable: bool,
    no_route: bool,
    narrow: Option<Narrow>,
    search: Option<Search>,
    round_trips: Vec<Duration>,
    next_round_trip: usize,
}

impl Track {
    /// A path of which nothing is known. `ceiling` is the largest packet that pods send over it.
    pub fn new(family: Family, ceiling: u32) -> Track {
        Track {
            family,
            ceiling,
            full: ceiling,
            joining: false,
            question: Question::Full,
            history: 0,
            answered_once: false,
            lost: 0,
            back: 0,
            refused: 0,
            strikes: 0,
            lossy: false,
            unreachable: false,
            no_route: false,
            narrow: None,
            search: None,
            round_trips: Vec::new(),
            next_round_trip: 0,
        }
    }

    /// Full size is another one from now on.
    pub fn set_ceiling(&mut self, ceiling: u32) {
        if self.ceiling == ceiling {
            return;
        }
        (self.ceiling, self.full) = (ceiling, ceiling);
        self.strikes = 0;
        self.search = None;
        if self.narrow.as_ref().is_some_and(|narrow| narrow.mtu.is_some_and(|mtu| mtu >= ceiling)) {
            self.narrow = None;
        }
        self.question = Question::Full;
    }

    /// A new round begins. A node that joins and has never answered is not accused of it.
    pub fn begin(&mut self, joining: bool) {
        self.joining = joining;
        self.lost = 0;
        self.search = None;
        self.question = match &mut self.narrow {
            _ if self.unreachable => Question::Small { after: Asked::Nothing },
            None => Question::Full,
            Some(narrow) => {
                narrow.rounds = narrow.rounds.wrapping_add(1);
                match narrow.mtu {
                    _ if narrow.rounds.is_multiple_of(SEARCH_EVERY) => return self.start_search(),
                    Some(_) if !narrow.rounds.is_multiple_of(2) => Question::Narrow,
                    _ => Question::Full,
                }
            }
        };
    }

    /// Size of the packet to send now, in bytes with its IP header; 0 is the smallest there is.
    pub fn size(&self) -> u32 {
        match self.question {
            Question::Full => self.ceiling,
            Question::Narrow => self.path_mtu().unwrap_or(self.ceiling),
            Question::Small { .. } => 0,
            Question::Search => match self.search.as_ref().map(Search::progress) {
                Some(Progress::Try(size)) => size,
                _ => 0,
            },
        }
    }

    /// Takes in the size that could be sent.
    pub fn sent(&mut self, size: u32) {
        if self.question == Question::Full {
            self.full = size.min(self.ceiling);
        }
    }

    /// Takes in what came of the packet that was sent last.
    pub fn tell(&mut self, outcome: Outcome) -> Errand {
        if outcome != Outcome::Refused {
            self.refused = 0;
        }
        match outcome {
            Outcome::Answered(after) => self.answered(after),
            Outcome::Lost => self.lost(),
            Outcome::Unsent => Errand::Done,
            Outcome::Refused => {
                // No answer, but no silence either: whatever was thought before is open again.
                self.refused = self.refused.saturating_add(1).min(REFUSALS);
                (self.lost, self.back, self.unreachable, self.no_route) = (0, 0, false, false);
                Errand::Done
            }
            Outcome::NoRoute => {
                self.no_route = true;
                self.lost_small()
            }
        }
    }

    /// The verdict.
    pub fn state(&self) -> State {
        match () {
            () if self.unreachable => State::Unreachable,
            () if self.refused >= REFUSALS || !self.answered_once => State::Unknown,
            () if self.narrow.is_some() => State::BigPacketsLost,
            () if self.lossy => State::Lossy,
            () => State::Reachable,
        }
    }

    /// Whether the node has no responder, or somebody says so for it.
    pub fn is_refused(&self) -> bool {
        self.refused >= REFUSALS
    }

    /// Whether this node itself has no route to the block.
    pub fn has_no_route(&self) -> bool {
        self.no_route
    }

    /// Full size on this path, in bytes.
    pub fn full_size(&self) -> u32 {
        self.full
    }

    /// The largest size that passes where full size does not, in bytes.
    pub fn path_mtu(&self) -> Option<u32> {
        self.narrow.as_ref().and_then(|narrow| narrow.mtu)
    }

    /// The shortest of the last round trips.
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trips.iter().min().copied()
    }

    /// Whether nothing of it need be remembered.
    pub fn is_well(&self) -> bool {
        self.state() == State::Reachable && self.strikes == 0
    }

    fn answered(&mut self, after: Duration) -> Errand {
        self.answered_once = true;
        self.no_route = false;
        self.lost = 0;
        self.note_round_trip(after);
        match self.question {
            Question::Full => {
                // What was lost before this one was not lost for its size.
                for _ in 0..std::mem::take(&mut self.strikes) {
                    self.note(true);
                }
                self.note(false);
                let Some(narrow) = &mut self.narrow else { return Errand::Done };
                narrow.raises += 1;
                if narrow.raises < RAISES {
                    return Errand::GoesOn;
                }
                self.narrow = None;
                Errand::Done
            }
            Question::Narrow => {
                self.note(false);
                if let Some(narrow) = &mut self.narrow {
                    narrow.strikes = 0;
                }
                Errand::Done
            }
            Question::Small { after } => {
                self.note(false);
                self.small_passed(after)
            }
            Question::Search => self.search_on(true),
        }
    }

    /// Small packets pass: what does that say about what was lost before?
    fn small_passed(&mut self, after: Asked) -> Errand {
        if self.unreachable {
            self.back += 1;
            if self.back >= BACK {
                (self.unreachable, self.back) = (false, 0);
                // The outage is over and told; what comes counts from here.
                (self.history, self.lossy) = (0, false);
                self.question = Question::Full;
            }
            return Errand::GoesOn;
        }
        match after {
            Asked::Nothing => Errand::Done,
            Asked::Full if self.narrow.is_some() => Errand::Done,
            Asked::Full => {
                self.strikes = self.strikes.saturating_add(1).min(STRIKES);
                self.again(Question::Full, self.strikes)
            }
            Asked::Narrow => {
                let narrow = self.narrow.get_or_insert_default();
                narrow.strikes = narrow.strikes.saturating_add(1).min(STRIKES);
                let strikes = narrow.strikes;
                self.again(Question::Narrow, strikes)
            }
            Asked::Search => {
                self.conclude(None);
                Errand::Done
            }
        }
    }

    /// Asks again, or searches once it was lost often enough. On a lossy path losses prove nothing about sizes.
    fn again(&mut self, question: Question, strikes: u8) -> Errand {
        if strikes < STRIKES {
            self.question = question;
            return Errand::GoesOn;
        }
        if self.lossy {
            return Errand::Done;
        }
        self.start_search();
        Errand::GoesOn
    }

    fn start_search(&mut self) {
        let search = Search::below(self.family, self.full);
        self.question = match search.progress() {
            Progress::Try(_) => Question::Search,
            Progress::Found(_) => Question::Small { after: Asked::Search },
        };
        self.search = Some(search);
    }

    fn search_on(&mut self, passed: bool) -> Errand {
        match self.search.as_mut().map(|search| search.tell(passed)) {
            Some(Progress::Try(_)) => Errand::GoesOn,
            Some(Progress::Found(Some(mtu))) => {
                self.conclude(Some(mtu));
                Errand::Done
            }
            // Nothing passes: has the path gone down meanwhile?
            Some(Progress::Found(None)) => {
                self.question = Question::Small { after: Asked::Search };
                Errand::GoesOn
            }
            None => Errand::Done,
        }
    }

    fn conclude(&mut self, mtu: Option<u32>) {
        let rounds = self.narrow.as_ref().map_or(0, |narrow| narrow.rounds);
        self.narrow = Some(Narrow { mtu, rounds, ..Narrow::default() });
        (self.search, self.strikes) = (None, 0);
    }

    fn lost(&mut self) -> Errand {
        let after = match self.question {
            Question::Full => Asked::Full,
            Question::Narrow => Asked::Narrow,
            Question::Search => return self.search_on(false),
            Question::Small { .. } => return self.lost_small(),
        };
        if let Some(narrow) = &mut self.narrow {
            narrow.raises = 0;
        }
        self.question = Question::Small { after };
        Errand::GoesOn
    }

    fn lost_small(&mut self) -> Errand {
        self.note(true);
        self.back = 0;
        self.lost = self.lost.saturating_add(1);
        let excused = self.joining && !self.answered_once;
        if self.unreachable || excused {
            return Errand::Done;
        }
        if self.lost < LOST {
            return Errand::GoesOn;
        }
        self.unreachable = true;
        (self.search, self.strikes) = (None, 0);
        Errand::Done
    }

    fn note(&mut self, lost: bool) {
        self.history = (self.history << 1) | u16::from(lost);
        let losses = self.history.count_ones();
        self.lossy = losses >= LOSSY.0 || (self.lossy && losses > LOSSY.1);
    }

    fn note_round_trip(&mut self, after: Duration) {
        match self.round_trips.get_mut(self.next_round_trip) {
            Some(slot) => *slot = after,
            None => self.round_trips.push(after),
        }
        self.next_round_trip = (self.next_round_trip + 1) % ROUND_TRIPS;
    }
}

#[cfg(test)]
mod tests {
    use super::super::search;
    use super::*;
    use proptest::prelude::*;

    fn track() -> Track {
        Track::new(Family::IPv4, 1500)
    }

    /// One errand on a path that carries packets up to a size.
    fn errand(track: &mut Track, carries: u32) -> usize {
        track.begin(false);
        for packets in 1..60 {
            let passes = track.size() <= carries;
            let outcome = if passes { Outcome::Answered(Duration::from_micros(200)) } else { Outcome::Lost };
            if track.tell(outcome) == Errand::Done {
                return packets;
            }
        }
        panic!("an errand without end: {track:?}");
    }

    #[test]
    fn a_healthy_path_costs_one_packet_a_round() {
        let mut track = track();
        assert_eq!(errand(&mut track, 1500), 1);
        assert_eq!((track.state(), track.is_well()), (State::Reachable, true));
    }

    #[test]
    fn one_lost_packet_changes_nothing() {
        let mut track = track();
        errand(&mut track, 1500);
        track.begin(false);
        assert_eq!(track.tell(Outcome::Lost), Errand::GoesOn);
        assert_eq!((track.size(), track.state()), (0, State::Reachable));
        let answered = Outcome::Answered(Duration::ZERO);
        assert_eq!(track.tell(answered), Errand::GoesOn, "was it the size?");
        assert_eq!(track.tell(answered), Errand::Done);
        assert_eq!((track.state(), track.is_well()), (State::Reachable, true));
    }

    #[test]
    fn a_path_whose_losses_have_nothing_to_do_with_size_is_lossy() {
        let mut track = track();
        for _ in 0..8 {
            track.begin(false);
            while track.tell(Outcome::Lost) == Errand::GoesOn {
                if track.tell(Outcome::Answered(Duration::ZERO)) == Errand::Done
                    || track.tell(Outcome::Answered(Duration::ZERO)) == Errand::Done
                {
                    break;
                }
            }
        }
        assert_eq!((track.state(), track.path_mtu()), (State::Lossy, None));
        for _ in 0..16 {
            errand(&mut track, 1500);
        }
        assert_eq!(track.state(), State::Reachable);
    }

    #[test]
    fn a_node_that_joins_is_not_accused_of_silence_until_it_has_answered_once() {
        let mut joining = track();
        joining.begin(true);
        while joining.tell(Outcome::Lost) == Errand::GoesOn {}
        assert_eq!(joining.state(), State::Unknown);
        joining.begin(true);
        joining.tell(Outcome::Answered(Duration::ZERO));
        joining.begin(true);
        while joining.tell(Outcome::Lost) == Errand::GoesOn {}
        assert_eq!(joining.state(), State::Unreachable);
    }

    #[test]
    fn a_peer_without_responder_is_unknown_and_nothing_else() {
        let mut track = track();
        errand(&mut track, 1500);
        for state in [State::Reachable, State::Reachable, State::Unknown, State::Unknown] {
            track.begin(false);
            assert_eq!(track.tell(Outcome::Refused), Errand::Done);
            assert_eq!(track.state(), state, "an agent that restarts is no news");
        }
        assert!(track.is_refused());
        errand(&mut track, 1500);
        assert_eq!((track.state(), track.is_refused()), (State::Reachable, false));
        let mut down = self::track();
        down.begin(false);
        while down.tell(Outcome::Lost) == Errand::GoesOn {}
        assert_eq!(down.state(), State::Unreachable);
        down.begin(false);
        down.tell(Outcome::Refused);
        assert_eq!(down.state(), State::Unknown, "somebody answers, so it is open again");
    }

    #[test]
    fn a_missing_route_is_told_apart() {
        let mut track = track();
        track.begin(false);
        while track.tell(Outcome::NoRoute) == Errand::GoesOn {}
        assert_eq!((track.state(), track.has_no_route()), (State::Unreachable, true));
        errand(&mut track, 1500);
        errand(&mut track, 1500);
        assert_eq!((track.state(), track.has_no_route()), (State::Reachable, false));
    }

    #[test]
    fn what_the_own_link_does_not_take_is_no_fault_of_the_path() {
        let mut track = Track::new(Family::IPv6, 9000);
        track.begin(false);
        assert_eq!(track.size(), 9000);
        track.sent(1450);
        track.tell(Outcome::Answered(Duration::ZERO));
        assert_eq!((track.state(), track.full_size(), track.path_mtu()), (State::Reachable, 1450, None));
    }

    #[test]
    fn a_path_that_carries_less_than_the_least_is_named_and_not_corrected() {
        let mut track = Track::new(Family::IPv6, 1500);
        errand(&mut track, 1000);
        assert_eq!((track.state(), track.path_mtu()), (State::BigPacketsLost, None));
    }

    #[test]
    fn a_path_that_dies_while_it_is_searched_is_unreachable() {
        let mut track = track();
        track.begin(false);
        while !(1..1500).contains(&track.size()) {
            let small = track.size() == 0;
            track.tell(if small { Outcome::Answered(Duration::ZERO) } else { Outcome::Lost });
        }
        while track.tell(Outcome::Lost) == Errand::GoesOn {}
        assert_eq!((track.state(), track.path_mtu()), (State::Unreachable, None));
    }

    #[test]
    fn a_policy_below_the_path_mtu_ends_the_correction() {
        let mut track = track();
        errand(&mut track, 1450);
        assert_eq!(track.path_mtu(), Some(1450));
        track.set_ceiling(1400);
        assert_eq!(track.path_mtu(), None);
        track.set_ceiling(9000);
        errand(&mut track, 1450);
        assert_eq!(track.path_mtu(), Some(1450));
    }

    fn any_outcome() -> impl Strategy<Value = Outcome> {
        prop_oneof![
            4 => Just(Outcome::Answered(Duration::from_micros(10))),
            4 => Just(Outcome::Lost),
            1 => Just(Outcome::Refused),
            1 => Just(Outcome::NoRoute),
            1 => Just(Outcome::Unsent),
        ]
    }

    proptest! {
        #[test]
        fn every_errand_ends_and_every_path_recovers(
            outcomes in prop::collection::vec(any_outcome(), 0..300), family in prop_oneof![Just(Family::IPv4), Just(Family::IPv6)]
        ) {
            let mut track = Track::new(family, 1500);
            let mut packets = 0;
            track.begin(false);
            for outcome in outcomes {
                prop_assert!(track.size() <= 1500);
                packets += 1;
                prop_assert!(packets < 60, "an errand without end");
                if track.tell(outcome) == Errand::Done {
                    track.begin(false);
                    packets = 0;
                }
                let mtu = track.path_mtu().unwrap_or(1499);
                prop_assert!((search::floor(family)..1500).contains(&mtu));
            }
            track.set_ceiling(1500);
            for _ in 0..20 {
                errand(&mut track, 1500);
            }
            prop_assert_eq!((track.state(), track.path_mtu()), (State::Reachable, None));
        }

        #[test]
        fn a_clear_black_hole_is_always_measured_rightly(carries in 576u32..1500) {
            let mut track = track();
            errand(&mut track, carries);
            let found = track.path_mtu().unwrap();
            prop_assert!(found <= carries && found >= 576);
            prop_assert_eq!(track.state(), State::BigPacketsLost);
        }
    }
}
