//! Which packet to send when: pure, driven by the time that its callers give it.
//!
//! Rounds are counted by the wall clock, so that all nodes sample in step ([`super::sample`]). In each round every
//! sampled block has its errand, spread over the round; blocks with something wrong are visited besides, the one first
//! that waited longest. Whatever happens, a node sends no more than its budget: if much is wrong at once, it takes
//! longer to see all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use plat_crds::block::{Block, Family};

use super::findings::{Counters, Findings, Path, Summary};
use super::plan::Plan;
use super::sample;
use super::track::{Errand, Outcome, State, Track};

/// How long a block may be silent after it was made: its node is joining.
const JOINING_SECONDS: i64 = 120;

/// How often, and how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Length of a round.
    pub round: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Packets that are sent in a second, at most and on average.
    pub per_second: u32,
    /// Packets that may be sent at once.
    pub burst: u32,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { round: Duration::from_secs(10), timeout: Duration::from_secs(1), per_second: 4, burst: 8 }
    }
}

/// What time it is: `boot` orders what happens, `wall` is the same for all nodes; since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// The boot clock.
    pub boot: Duration,
    /// The wall clock.
    pub wall: Duration,
}

impl Now {
    fn seconds(&self) -> i64 {
        i64::try_from(self.wall.as_secs()).unwrap_or(i64::MAX)
    }
}

/// A packet to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shot {
    /// Block whose gateway it goes to.
    pub block: Block,
    /// Block of this node whose gateway it comes from.
    pub from: Block,
    /// Size in bytes, with the IP header.
    pub size: u32,
}

/// Follow-ups go before what begins: a verdict that is half done helps nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    FollowUp,
    Begin,
}

#[derive(Debug)]
struct Entry {
    track: Track,
    phase: Phase,
    /// Round of the last visit.
    visited: u64,
    /// The verdict and path MTU that are told, and since when.
    told: (State, Option<u32>),
    since: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Queued(Rank, Duration),
    Flying,
}

/// The schedule of one node.
#[derive(Debug)]
pub struct Schedule {
    pace: Pace,
    plan: Arc<Plan>,
    entries: BTreeMap<Block, Entry>,
    queue: BTreeSet<(Rank, Duration, Block)>,
    round: Option<u64>,
    /// When the bucket of the budget is full again.
    full_at: Duration,
    summary: Summary,
}

impl Schedule {
    /// An empty schedule.
    pub fn new(pace: Pace) -> Schedule {
        Schedule {
            pace,
            plan: Arc::default(),
            entries: BTreeMap::new(),
            queue: BTreeSet::new(),
            round: None,
            full_at: Duration::ZERO,
            summary: Summary::default(),
        }
    }

    /// Takes in what there is to probe.
    pub fn replace(&mut self, plan: Arc<Plan>) {
        self.plan = plan;
        let gone: Vec<Block> =
            self.entries.keys().filter(|block| self.plan.target(block).is_none()).copied().collect();
        for block in gone {
            self.forget(&block);
        }
        for (block, entry) in &mut self.entries {
            if let Some(target) = self.plan.target(block) {
                entry.track.set_ceiling(target.ceiling);
            }
        }
    }

    /// When to ask [`Schedule::take`] again, at the latest.
    pub fn next(&self, now: Now) -> Duration {
        let round = self.until_next_round(now);
        let due = [Rank::FollowUp, Rank::Begin].into_iter().filter_map(|rank| self.first(rank)).min();
        let due = due.map(|due| due.max(self.affordable_at()));
        due.map_or(now.boot + round, |due| due.min(now.boot + round))
    }

    /// The next packet that is due and can be afforded.
    pub fn take(&mut self, now: Now) -> Option<Shot> {
        self.turn(now);
        loop {
            if now.boot < self.affordable_at() {
                return None;
            }
            let rank = [Rank::FollowUp, Rank::Begin]
                .into_iter()
                .find(|rank| self.first(*rank).is_some_and(|due| due <= now.boot))?;
            let &(_, due, block) = self.queue.range((rank, Duration::ZERO, first_block())..).next()?;
            self.queue.remove(&(rank, due, block));
            let round = self.round.unwrap_or_default();
            let from = self.plan.source(block.family());
            let cost = self.cost();
            let Some(entry) = self.entries.get_mut(&block) else { continue };
            entry.phase = Phase::Idle;
            // Without a block of its own of that family the node cannot ask.
            let Some(from) = from else { continue };
            if rank == Rank::Begin {
                let created = self.plan.target(&block).map_or(i64::MIN, |target| target.created);
                entry.track.begin(now.seconds().saturating_sub(created) < JOINING_SECONDS);
                entry.visited = round;
            }
            entry.phase = Phase::Flying;
            self.full_at = self.full_at.max(now.boot) + cost;
            return Some(Shot { block, from, size: entry.track.size() });
        }
    }

    /// Takes in the size of a packet that could be sent, and what came of it. Returns whether a verdict changed that
    /// somebody should know of.
    pub fn tell(&mut self, block: &Block, size: u32, outcome: Outcome, now: Now) -> bool {
        let Some(entry) = self.entries.get_mut(block) else { return false };
        entry.phase = Phase::Idle;
        entry.track.sent(size);
        if entry.track.tell(outcome) == Errand::GoesOn {
            entry.phase = Phase::Queued(Rank::FollowUp, now.boot);
            self.queue.insert((Rank::FollowUp, now.boot, *block));
        }
        let verdict = (entry.track.state(), entry.track.path_mtu());
        if entry.told == verdict {
            return false;
        }
        let news = matters(entry.told) || matters(verdict);
        (entry.told, entry.since) = (verdict, now.seconds());
        news
    }

    /// What is known.
    pub fn findings(&self) -> Findings {
        let path = |(block, entry): (&Block, &Entry)| Path {
            block: *block,
            state: entry.told.0,
            refused: entry.track.is_refused(),
            no_route: entry.track.has_no_route(),
            full_size: entry.track.full_size(),
            path_mtu: entry.told.1,
            round_trip: entry.track.round_trip(),
            since: entry.since,
        };
        let paths = self.entries.iter().map(path).collect();
        Findings { summary: self.summary, paths, counters: Counters::default() }
    }

    /// Begins a new round if it is time.
    fn turn(&mut self, now: Now) {
        let round = self.round_at(now);
        if self.round == Some(round) {
            return;
        }
        if let Some(last) = self.round {
            self.sum_up(last, now);
        }
        self.round = Some(round);
        let chosen = self.choose(round);
        // What was not begun in time is another round's.
        let stale = |entry: &Entry| matches!(entry.phase, Phase::Queued(Rank::Begin, _));
        let stale: Vec<Block> =
            self.entries.iter().filter(|(_, entry)| stale(entry)).map(|(block, _)| *block).collect();
        for block in stale {
            self.unqueue(&block);
        }
        let kept: BTreeSet<Block> = chosen.iter().copied().collect();
        let done = |(block, entry): &(&Block, &Entry)| {
            entry.phase == Phase::Idle && !kept.contains(block) && !matters(entry.told)
        };
        let done: Vec<Block> = self.entries.iter().filter(done).map(|(block, _)| *block).collect();
        for block in done {
            self.forget(&block);
        }
        self.enqueue(&chosen, now);
    }

    /// The sample of the round; behind it what else has something wrong, as far as the budget reaches.
    fn choose(&self, round: u64) -> Vec<Block> {
        let mut chosen = Vec::new();
        for family in Family::ALL {
            let Some(own) = self.plan.source(family) else { continue };
            let targets = self.plan.of_family(family);
            let me = targets.partition_point(|target| target.block < own);
            // This node's own place on the ring is before the first that is larger.
            for place in sample::selection(targets.len() + 1, me, round) {
                let at = if place > me { place - 1 } else { place };
                chosen.extend(targets.get(at).map(|target| target.block));
            }
        }
        let budget = self.pace.round.as_millis() * u128::from(self.pace.per_second) / 1000;
        let spare = usize::try_from(budget).unwrap_or(usize::MAX).saturating_sub(chosen.len());
        let sampled: BTreeSet<Block> = chosen.iter().copied().collect();
        let mut waiting: Vec<(u64, Block)> = self
            .entries
            .iter()
            .filter(|(block, entry)| matters(entry.told) && !sampled.contains(block))
            .map(|(block, entry)| (entry.visited, *block))
            .collect();
        waiting.sort_unstable();
        chosen.extend(waiting.into_iter().take(spare).map(|(_, block)| block));
        chosen
    }

    /// Spreads the chosen over what is left of the round, from a moment that differs from node to node.
    fn enqueue(&mut self, chosen: &[Block], now: Now) {
        let left = self.until_next_round(now);
        let slot = left / u32::try_from(chosen.len()).unwrap_or(u32::MAX).max(1);
        let mut due = now.boot + slot.mul_f64(self.plan.jitter());
        for block in chosen {
            let Some(target) = self.plan.target(block) else { continue };
            let entry = self.entries.entry(*block).or_insert_with(|| Entry {
                track: Track::new(block.family(), target.ceiling),
                phase: Phase::Idle,
                visited: 0,
                told: (State::Unknown, None),
                since: now.seconds(),
            });
            if entry.phase == Phase::Idle {
                entry.phase = Phase::Queued(Rank::Begin, due);
                self.queue.insert((Rank::Begin, due, *block));
            }
            due += slot;
        }
    }

    fn sum_up(&mut self, last: u64, now: Now) {
        let seen = || self.entries.values().filter(|entry| entry.visited == last || matters(entry.told));
        let mut round_trips: Vec<Duration> = seen().filter_map(|entry| entry.track.round_trip()).collect();
        round_trips.sort_unstable();
        self.summary = Summary {
            rounds: self.summary.rounds.saturating_add(1),
            ended: now.seconds(),
            peers: seen().count(),
            reachable: seen().filter(|entry| entry.told.0.answers()).count(),
            round_trip: round_trips.get(round_trips.len() / 2).copied(),
        };
    }

    fn forget(&mut self, block: &Block) {
        self.unqueue(block);
        self.entries.remove(block);
    }

    fn unqueue(&mut self, block: &Block) {
        let Some(entry) = self.entries.get_mut(block) else { return };
        if let Phase::Queued(rank, due) = entry.phase {
            self.queue.remove(&(rank, due, *block));
            entry.phase = Phase::Idle;
        }
    }

    fn first(&self, rank: Rank) -> Option<Duration> {
        let first = self.queue.range((rank, Duration::ZERO, first_block())..).next();
        first.filter(|(of, _, _)| *of == rank).map(|(_, due, _)| *due)
    }

    fn cost(&self) -> Duration {
        Duration::from_secs(1) / self.pace.per_second.max(1)
    }

    /// A leaky bucket: what is sent now is paid by `full_at`, which may be ahead by a burst.
    fn affordable_at(&self) -> Duration {
        self.full_at.saturating_sub(self.cost() * self.pace.burst.saturating_sub(1))
    }

    fn round_millis(&self) -> u64 {
        u64::try_from(self.pace.round.as_millis()).unwrap_or(u64::MAX).max(1)
    }

    fn round_at(&self, now: Now) -> u64 {
        u64::try_from(now.wall.as_millis()).unwrap_or(u64::MAX) / self.round_millis()
    }

    fn until_next_round(&self, now: Now) -> Duration {
        let millis = u64::try_from(now.wall.as_millis()).unwrap_or(u64::MAX);
        Duration::from_millis(self.round_millis() - millis % self.round_millis())
    }
}

/// Whether a verdict is worth remembering when its block is not sampled any more, and worth telling at once.
fn matters(told: (State, Option<u32>)) -> bool {
    told.1.is_some() || !matches!(told.0, State::Unknown | State::Reachable)
}

/// The first key of any rank and time.
fn first_block() -> Block {
    Block::containing(ipnet::IpNet::V4(ipnet::Ipv4Net::default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::plan::Target;

    /// A node's schedule in a made-up world, by which packets are answered or not.
    struct World<F> {
        schedule: Schedule,
        now: Now,
        answer: F,
        sent: Vec<(Duration, Shot)>,
        flying: Vec<(Duration, Shot, Outcome)>,
        news: usize,
    }

    fn block(n: u32, family: Family) -> Block {
        let text = match family {
            Family::IPv4 => format!("10.{}.{}.0/24", 64 + n / 256, n % 256),
            Family::IPv6 => format!("fd00:10:{:x}::/64", 0x1000 + n),
        };
        text.parse().unwrap()
    }

    /// Nodes 0 to `nodes` - 1, seen from `me`.
    fn plan(nodes: u32, me: u32, families: &[Family]) -> Arc<Plan> {
        let of = |family| (0..nodes).map(move |n| (n, block(n, family)));
        let all = families.iter().flat_map(|family| of(*family));
        let mut plan = Plan::default();
        for (n, block) in all {
            match n == me {
                true => plan.own.push(block),
                false => plan.targets.push(Target { block, ceiling: 1500, created: 0 }),
            }
        }
        plan.targets.sort_unstable_by_key(|target| target.block);
        Arc::new(plan)
    }

    impl<F: FnMut(&Shot, Duration) -> bool> World<F> {
        fn new(plan: Arc<Plan>, answer: F) -> World<F> {
            let mut schedule = Schedule::new(Pace::default());
            schedule.replace(plan);
            let wall = Duration::from_secs(1_764_000_003);
            let now = Now { boot: Duration::from_secs(100), wall };
            World { schedule, now, answer, sent: Vec::new(), flying: Vec::new(), news: 0 }
        }

        fn run(&mut self, seconds: u64) {
            let end = self.now.boot + Duration::from_secs(seconds);
            while self.now.boot < end {
                while let Some(shot) = self.schedule.take(self.now) {
                    self.sent.push((self.now.boot, shot));
                    let (after, outcome) = match (self.answer)(&shot, self.now.boot) {
                        true => (Duration::from_micros(300), Outcome::Answered(Duration::from_micros(300))),
                        false => (Pace::default().timeout, Outcome::Lost),
                    };
                    self.flying.push((self.now.boot + after, shot, outcome));
                }
                let landing = self.flying.iter().map(|(at, ..)| *at).min().unwrap_or(end);
                let at = landing.min(self.schedule.next(self.now)).min(end).max(self.now.boot);
                let at = at.max(self.now.boot + Duration::from_micros(100));
                self.now = Now { boot: at, wall: self.now.wall + (at - self.now.boot) };
                let now = self.now;
                let (landed, flying) = self.flying.drain(..).partition(|(at, ..)| *at <= now.boot);
                self.flying = flying;
                for (_, shot, outcome) in landed {
                    self.news += usize::from(self.schedule.tell(&shot.block, shot.size, outcome, now));
                }
            }
        }

        /// The most packets in any second, and all of them by the second.
        fn load(&self, seconds: u64) -> (usize, f64) {
            let in_second = |from: Duration| {
                let until = from + Duration::from_secs(1);
                self.sent.iter().filter(|(at, _)| (from..until).contains(at)).count()
            };
            let most = self.sent.iter().map(|(at, _)| in_second(*at)).max().unwrap_or(0);
            (most, self.sent.len() as f64 / seconds as f64)
        }

        fn path(&self, n: u32) -> Option<Path> {
            let block = block(n, Family::IPv4);
            self.schedule.findings().paths.into_iter().find(|path| path.block == block)
        }
    }

    const BOTH: &[Family] = &Family::ALL;

    #[test]
    fn at_five_thousand_nodes_a_healthy_one_sends_three_packets_a_second() {
        let mut world = World::new(plan(5000, 77, BOTH), |_, _| true);
        world.run(600);
        let (most, mean) = world.load(600);
        assert!((3.0..=3.3).contains(&mean) && most <= 12, "{mean} in the mean, {most} at most");
        assert_eq!(world.news, 0);
        let findings = world.schedule.findings();
        assert_eq!((findings.summary.peers, findings.summary.reachable), (32, 32));
        assert_eq!(findings.summary.round_trip, Some(Duration::from_micros(300)));
        assert!(findings.paths.len() <= 64, "what is well is forgotten: {}", findings.paths.len());
    }

    #[test]
    fn every_pair_of_five_thousand_nodes_is_met_in_seventy_minutes() {
        let mut world = World::new(plan(5000, 77, &[Family::IPv4]), |_, _| true);
        world.run(70 * 60);
        let met: BTreeSet<Block> = world.sent.iter().map(|(_, shot)| shot.block).collect();
        assert_eq!(met.len(), 4999);
    }

    #[test]
    fn the_budget_holds_when_all_is_lost_and_verdicts_come_all_the_same() {
        let mut world = World::new(plan(5000, 77, BOTH), |_, _| false);
        world.run(600);
        let (most, mean) = world.load(600);
        assert!(mean <= 4.1 && most <= 12, "{mean} in the mean, {most} at most");
        let unreachable = world.schedule.findings().in_state(State::Unreachable).count();
        assert!(unreachable > 100, "{unreachable}");
        assert_eq!(world.path(78).unwrap().state, State::Unreachable, "a neighbour");
    }

    #[test]
    fn a_small_cluster_sees_a_node_go_within_two_rounds_and_come_back() {
        let (down, up) = (Duration::from_secs(160), Duration::from_secs(220));
        let mut world = World::new(plan(5, 0, BOTH), |shot, at| {
            shot.block != block(3, Family::IPv4) || at < down || at > up
        });
        world.run(60);
        assert_eq!(world.path(3).unwrap().state, State::Reachable);
        world.run(25);
        assert_eq!(world.path(3).unwrap().state, State::Unreachable);
        assert_eq!(world.path(2).unwrap().state, State::Reachable);
        assert_eq!(world.schedule.findings().health().failing, [block(3, Family::IPv4)].into());
        world.run(60);
        assert_eq!(world.path(3).unwrap().state, State::Reachable);
        assert_eq!(world.news, 2, "down and up again are told once each");
    }

    #[test]
    fn a_black_hole_is_measured_and_given_up_when_it_is_gone() {
        let gone = Duration::from_secs(200);
        let mut world = World::new(plan(3, 0, BOTH), |shot, at| {
            shot.block != block(1, Family::IPv4) || shot.size <= 1420 || at > gone
        });
        world.run(40);
        let path = world.path(1).unwrap();
        assert_eq!((path.state, path.path_mtu), (State::BigPacketsLost, Some(1420)));
        assert!(!path.is_failing(), "its route can be corrected");
        assert_eq!(world.path(2).unwrap().path_mtu, None);
        world.run(50);
        assert_eq!(world.path(1).unwrap().path_mtu, Some(1420), "it stays while it is so");
        world.run(40);
        assert_eq!((world.path(1).unwrap().state, world.path(1).unwrap().path_mtu), (State::Reachable, None));
        assert_eq!(world.news, 2);
    }

    #[test]
    fn a_path_that_shrinks_further_or_grows_a_little_is_measured_again() {
        let (shrinks, grows) = (Duration::from_secs(200), Duration::from_secs(400));
        let mut world = World::new(plan(3, 0, BOTH), |shot, at| {
            let carries = match at {
                at if at < shrinks => 1450,
                at if at < grows => 1300,
                _ => 1400,
            };
            shot.block != block(1, Family::IPv4) || shot.size <= carries
        });
        world.run(90);
        assert_eq!(world.path(1).unwrap().path_mtu, Some(1450));
        world.run(60);
        assert_eq!(world.path(1).unwrap().path_mtu, Some(1300));
        world.run(900);
        assert_eq!(world.path(1).unwrap().path_mtu, Some(1400));
    }

    #[test]
    fn what_was_found_beyond_the_sample_stays_known_and_is_visited_again() {
        let far = block(2500, Family::IPv4);
        let mut world = World::new(plan(5000, 77, &[Family::IPv4]), move |shot, _| {
            shot.block != far || shot.size <= 1400
        });
        world.run(70 * 60);
        assert_eq!(world.path(2500).unwrap().path_mtu, Some(1400));
        let visits = world.sent.iter().filter(|(_, shot)| shot.block == far).count();
        assert!(visits > 10, "{visits}");
        assert_eq!(world.news, 1);
    }

    #[test]
    fn one_packet_in_twenty_lost_is_no_news() {
        let mut state = 12_345u64;
        let mut world = World::new(plan(9, 0, BOTH), move |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            !(state >> 33).is_multiple_of(20)
        });
        world.run(1800);
        let wrong = |path: &Path| matches!(path.state, State::Unreachable | State::BigPacketsLost);
        assert_eq!(world.schedule.findings().paths.iter().filter(|path| wrong(path)).count(), 0);
    }

    #[test]
    fn targets_that_go_are_forgotten_and_a_node_without_a_block_asks_nobody() {
        let mut world = World::new(plan(9, 0, BOTH), |_, _| false);
        world.run(60);
        assert_eq!(world.schedule.findings().paths.len(), 16);
        world.schedule.replace(plan(3, 0, BOTH));
        assert_eq!(world.schedule.findings().paths.len(), 4);
        let none = Plan { own: vec![], ..(*plan(9, 0, BOTH)).clone() };
        world.schedule.replace(Arc::new(none));
        world.sent.clear();
        world.run(60);
        assert_eq!(world.sent, []);
    }
}
