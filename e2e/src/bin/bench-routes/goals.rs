//! What is to be reached, in one place.

use plat_rig::figures::Goal;

/// Seconds from the start of an agent to that many routes.
pub const COLD: [(usize, Goal); 2] = [(2000, Goal::AtMost(0.5)), (5000, Goal::AtMost(1.2))];
/// Resident memory, in MiB, with 5,000 routes.
pub const MEMORY: Goal = Goal::AtMost(20.0);
/// Milliseconds from the request that makes a PodCIDR to the route.
pub const PRESENT: Goal = Goal::AtMost(20.0);
/// Milliseconds from a route's loss to its return.
pub const REPAIR: Goal = Goal::AtMost(10.0);
/// The slowest of a hundred.
pub const REPAIR_P99: Goal = Goal::AtMost(50.0);
/// Pods' throughput by that of bare namespaces on the same path.
pub const THROUGHPUT: Goal = Goal::RatioAtLeast(0.98);
