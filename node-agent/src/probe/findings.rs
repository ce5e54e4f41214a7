//! What the probes found, in our own words: what reports, metrics and routes are made of.

use std::collections::BTreeMap;
use std::time::Duration;

use plat_crds::block::Block;

use super::health::Health;
use super::track::State;

/// What is known of the path to one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// The block.
    pub block: Block,
    /// The verdict.
    pub state: State,
    /// Its node refuses probes: its agent is stopped, or older than they are, or a firewall says so for it.
    pub refused: bool,
    /// This node has no route to it.
    pub no_route: bool,
    /// Full size, in bytes.
    pub full_size: u32,
    /// What passes where full size does not, in bytes.
    pub path_mtu: Option<u32>,
    /// The shortest of the last round trips.
    pub round_trip: Option<Duration>,
    /// Since when the verdict holds, in seconds since the epoch.
    pub since: i64,
}

/// The last whole round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Whole rounds since the agent started.
    pub rounds: u64,
    /// When it ended, in seconds since the epoch.
    pub ended: i64,
    /// Blocks that were looked at.
    pub peers: usize,
    /// Of those, blocks that answered.
    pub reachable: usize,
    /// Median of their round trips.
    pub round_trip: Option<Duration>,
}

/// Packets since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Questions that were sent.
    pub sent: u64,
    /// Of those: answered.
    pub answered: u64,
    /// Of those: lost, or without a route.
    pub lost: u64,
    /// Of those: refused.
    pub refused: u64,
    /// Answers to others.
    pub answers: u64,
    /// Packets of others that were read and not answered.
    pub ignored: u64,
}

/// What the probes found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// The last whole round.
    pub summary: Summary,
    /// Blocks of this round's sample, and all others with something wrong, in order.
    pub paths: Vec<Path>,
    /// Packets.
    pub counters: Counters,
}

impl State {
    /// Whether packets come back.
    pub fn answers(self) -> bool {
        matches!(self, State::Reachable | State::Lossy | State::BigPacketsLost)
    }
}

impl Path {
    /// Whether pods notice: a path that loses big packets serves them once its route says how large they may be.
    pub fn is_failing(&self) -> bool {
        match self.state {
            State::Unreachable | State::Lossy => true,
            State::BigPacketsLost => self.path_mtu.is_none(),
            State::Unknown | State::Reachable => false,
        }
    }
}

impl Findings {
    /// The path MTUs that routes should have.
    pub fn path_mtus(&self) -> BTreeMap<Block, u32> {
        self.paths.iter().filter_map(|path| Some((path.block, path.path_mtu?))).collect()
    }

    /// Those with something wrong.
    pub fn in_state(&self, state: State) -> impl Iterator<Item = &Path> {
        self.paths.iter().filter(move |path| path.state == state)
    }

    /// How the node's paths are, in two numbers.
    pub fn health(&self) -> Health {
        let checked = self.paths.iter().filter(|path| path.state != State::Unknown);
        Health {
            rounds: self.summary.rounds,
            checked: checked.count(),
            failing: self.paths.iter().filter(|path| path.is_failing()).map(|path| path.block).collect(),
        }
    }
}
