//! What is to be reached, in one place.

use plat_rig::figures::Goal;

/// From that many Node objects to as many blocks: in no more time than the node IPAM controller takes with its
/// limits lifted.
pub const BURST: Goal = Goal::RatioAtMost(1.0);
/// The number of nodes that [`BURST`] is for.
pub const BURST_NODES: usize = 2000;
/// The largest cluster takes as long as its nodes by those of [`BURST_NODES`] say; a quarter more is noise.
pub const LINEAR: Goal = Goal::RatioAtMost(1.25);
/// Resident memory of the operator in the largest cluster.
pub const MEMORY: Goal = Goal::AtMost(30.0);
/// Writes of the operator until a new node's block can be used.
pub const WRITES_UNTIL_USABLE: Goal = Goal::AtMost(3.0);
/// Writes about a new node in all, with Events and its own agent's reports.
pub const WRITES_IN_ALL: Goal = Goal::AtMost(9.0);
/// Milliseconds from the request that makes one more Node object to its block.
pub const TRICKLE: Goal = Goal::AtMost(50.0);
/// Status events that each agent receives in an hour: no more than the operator's write budget allows. A pass more or
/// less in the time that is counted makes two in a hundred.
pub const STATUS_EVENTS: Goal = Goal::RatioAtMost(1.02);
