//! Probes of the pod path: does this node reach the pods of others, how fast, and with packets of which size?
//!
//! Each node asks from the gateway address of its own block to those of others' blocks, over UDP: that is the way of
//! pods' packets, with the same routes, tunnels and underlay. What it does not prove: the FORWARD chains of both nodes
//! and the pods' own links, as a gateway is the node itself (`ForwardingBlocked` tells of the first).
//!
//! | pure | edge |
//! |---|---|
//! | [`plan`] what there is to probe · [`sample`] whom in this round · [`schedule`] which packet when · [`track`] the verdict about one path · [`search`] for its MTU · [`packet`] · [`findings`], [`health`], [`report`], [`metrics`] | [`wire`] the sockets · [`prober`] the task |

pub mod findings;
pub mod health;
pub mod metrics;
pub mod packet;
pub mod plan;
pub mod prober;
pub mod report;
pub mod sample;
pub mod schedule;
pub mod search;
pub mod track;
pub mod wire;
