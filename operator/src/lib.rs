//! Nodes in, PodCIDRs out.
//!
//! Watches Nodes, ClusterCIDRs, PodCIDRs, RoutingPolicies and NodeNetworks. Decides which block each node holds, and
//! how far a change of a policy goes. Writes PodCIDRs (all but `spec.routing`, which is the users'), the status of
//! PodCIDRs, ClusterCIDRs and RoutingPolicies, the
//! finalizer and block size of ClusterCIDRs, NodeNetwork objects (not their status), an empty
//! `node.spec.podCIDRs`, `NetworkUnavailable=False`, Events and one Lease.
//!
//! ```text
//! observe ─▶ facts ─▶ Snapshot ─▶ plan ─▶ Steps ─▶ apply ─▶ Outcomes ─▶ memory
//!  (edge)    (pure)    (value)   (pure)  (values)  (edge)    (values)   (pure)
//! ```

pub mod apply;
pub mod args;
pub mod budget;
pub mod carriers;
pub mod claims;
#[cfg(test)]
mod cost;
pub mod dice;
pub mod facts;
#[cfg(test)]
mod fixtures;
pub mod forecast;
pub mod fragmentation;
pub mod http;
pub mod kube_server;
pub mod leader;
pub mod lease;
pub mod ledger;
pub mod memory;
pub mod node_view;
pub mod note;
pub mod observe;
pub mod plan;
pub mod planner;
pub mod pool;
pub mod publish;
pub mod ranges;
pub mod reason;
pub mod rollout;
pub mod run;
pub mod server;
#[cfg(test)]
mod sim;
pub mod sizing;
pub mod snapshot;
pub mod status;
pub mod step;
pub mod stretch;
pub mod telemetry;
pub mod topology;
pub mod unanswered;
pub mod written;
