//! Plat's node agent: PodCIDRs in, kernel and CNI configuration out.
//!
//! **Watches** PodCIDRs and ClusterCIDRs, the kernel's messages about links, routes, forwarding and nftables,
//! and the node's CNI folders. **Decides** by pure functions what should be on the node. **Writes** routes of
//! its own protocol, the nftables table `inet plat`, a few sysctls, the pods' bridge, accept rules in FORWARD
//! chains with policy drop, the CNI binary, `blocks.json` and the conflist; and the status of its own
//! NodeNetwork, and no other object. Stopping removes nothing; [`cleanup`] removes all of it.
//!
//! One loop ([`reconcile`]) makes passes ([`node::Node::pass`]):
//!
//! ```text
//!  watch ─▶ objects ─▶ beliefs (failstatic, cache) ─▶ desired (overlap, closing) ─▶ diff ─▶ apply ─▶ outlet
//!                                      kernel ─────────▶ observed ──────────────────┘         │
//!                                      publish, telemetry ◀── reporter (report, incidents) ◀──┘
//! ```
//!
//! | pure | edge |
//! |---|---|
//! | [`facts`], [`objects`], [`failstatic`], [`overlap`], [`policies`], [`rollout`], [`preview`], [`path`], [`egress`], [`closing`], [`desired`], [`fabric`], [`diff`], [`conf`], [`report`], [`incidents`], [`fights`] | [`watch`], [`kernel`], [`apply`], [`files`], [`folder`], [`leases`], [`cache`], [`publish`], [`telemetry`] |
//!
//! Rights: uid 0 with `CAP_NET_ADMIN` alone, read-only root file system; it never enters a pod's namespace.

pub mod apply;
pub mod args;
pub mod beliefs;
pub mod cache;
pub mod check;
pub mod cleanup;
pub mod clock;
pub mod closing;
pub mod conf;
pub mod desired;
pub mod diff;
pub mod doubled;
pub mod egress;
pub mod explain;
pub mod fabric;
pub mod facts;
pub mod failstatic;
pub mod fights;
pub mod files;
#[cfg(test)]
mod fixtures;
pub mod folder;
pub mod foreign;
pub mod growth;
pub mod incidents;
pub mod kernel;
pub mod leases;
pub mod node;
pub mod objects;
pub mod outlet;
pub mod overlap;
pub mod path;
pub mod policies;
pub mod preview;
pub mod probe;
pub mod program;
pub mod publish;
pub mod readiness;
pub mod reconcile;
pub mod report;
pub mod reporter;
pub mod rollout;
pub mod selftest;
pub mod telemetry;
pub mod tunnels;
pub mod underlay;
pub mod vxlan;
pub mod watch;
