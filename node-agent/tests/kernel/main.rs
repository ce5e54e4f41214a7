//! Kernel tests: each runs the whole loop in a network namespace of its own, fed with objects as the watch
//! would feed it, and is asserted from outside by `ip -j`, `nft -j` and files.
//!
//! A test runs itself again under `unshare --net --mount` (see `harness::isolated`), so whatever it makes
//! ends with its process, also after a failure. Needs root, as making namespaces does.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod blocks;
mod checks;
mod cleanup;
mod converge;
mod doubled;
mod edge;
mod fights;
mod firewalls;
mod forwarding;
mod harness;
mod held;
mod ipv6off;
mod leases;
mod masquerade;
mod offline;
mod overlaps;
mod pods;
mod policy;
mod probes;
mod readiness;
mod repair;
mod rights;
mod rollout;
mod routed;
mod routes;
mod scale;
mod takeover;
mod vxlan;
