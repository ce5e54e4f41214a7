//! The operator as a process against a real etcd and kube-apiserver. Nodes are objects, agents are status
//! writes by the test. Needs root and the programs of `make setup`.
//!
//! One control plane serves all tests but those that break it, one after the other: the operator owns the
//! whole cluster.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod arena;
mod observer;
mod proxy;

mod blocks;
mod faults;
mod hand;
mod leaders;
mod outages;
mod pains;
mod policies;
mod ranges;
mod release;
mod rivals;
mod scale;
mod several;
mod source;
mod topology;
mod writes;
