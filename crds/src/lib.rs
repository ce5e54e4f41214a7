//! The contract: whatever two of Plat's programs must agree on lives here, and nothing else does.
//!
//! | module | agreed between |
//! |---|---|
//! | [`block`] | everyone: what a block of pod addresses is, its gateway, its host numbers |
//! | [`names`] | everyone: API group, field managers, route protocol and metrics, tables, file paths |
//! | [`blocks_file`] | agent (writes `/run/plat/blocks.json`) and CNI binary (reads it) |
//! | [`growth`] | agents (report at the watermark) and operator (carves at it) |
//! | [`lease`] | CNI binary (writes `/run/plat/leases`) and agent (sweeps it) |
//! | [`alias`] | CNI binary (writes it onto each pod's link) and agent (rebuilds leases from it) |
//! | [`host_port`] | as [`lease`], of which it is a part |
//! | [`cni_conf`] | agent (writes the conflist) and CNI binary (reads one plugin of it) |
//! | [`cluster_cidr`], [`pod_cidr`], [`routing_policy`], [`node_network`] | operator, agents and users, through the API server |
//! | [`routing`] | users (write it), operator and agents (resolve it) |
//! | [`selector`] | operator and agents: which labels a selector matches |
//! | [`digest`] | agents (report it) and operator (compares it) |
//!
//! Nothing here does I/O, reads a clock or holds a client. Without the feature `k8s` (the CNI binary's
//! build) only the first eight modules exist and no Kubernetes crate is linked.

#![cfg_attr(
    feature = "k8s",
    expect(clippy::duplicated_attributes, reason = "columns of `#[kube(printcolumn(...))]` repeat keys")
)]

pub mod alias;
pub mod block;
pub mod blocks_file;
pub mod cni_conf;
pub mod growth;
pub mod host_port;
pub mod lease;
pub mod names;

#[cfg(feature = "k8s")]
pub mod cluster_cidr;
#[cfg(feature = "k8s")]
pub mod condition;
#[cfg(feature = "k8s")]
pub mod digest;
#[cfg(feature = "k8s")]
pub mod node_network;
#[cfg(feature = "k8s")]
pub mod pod_cidr;
#[cfg(feature = "k8s")]
pub mod routing;
#[cfg(feature = "k8s")]
pub mod routing_policy;
#[cfg(feature = "k8s")]
pub mod selector;

pub use block::{Block, Family};
#[cfg(feature = "k8s")]
pub use cluster_cidr::{ClusterCIDR, ClusterCIDRSpec, ClusterCIDRStatus};
#[cfg(feature = "k8s")]
pub use node_network::{NodeNetwork, NodeNetworkStatus};
#[cfg(feature = "k8s")]
pub use pod_cidr::{PodCIDR, PodCIDRSpec, PodCIDRStatus};
#[cfg(feature = "k8s")]
pub use routing_policy::{RoutingPolicy, RoutingPolicySpec, RoutingPolicyStatus};
