//! Real clusters for tests, in namespaces of this machine.
//!
//! | module | gives |
//! |---|---|
//! | [`audit`] | who asked the API server for what, counted |
//! | [`testbed`] | what both kinds of cluster share: its life, its scripts, its network, its API |
//! | [`bare`] | nodes that are a network namespace with an agent, beside a light cluster |
//! | [`light`] | etcd and API server alone, ready in 3 s: objects, rights, thousands of nodes |
//! | [`cluster`] | nodes with kubelet, containerd and kube-proxy, ready in 5 s |
//! | [`matrix`] | who must reach whom, and as whom |
//! | [`plat`] | what Plat says of itself, and what must always hold |
//! | [`traffic`] | datagrams that are counted while something is broken |
//! | [`usage`] | what a process has used |
//! | [`wait`] | waiting for a condition with a deadline; never a bare sleep |
//!
//! The clusters themselves are made by the scripts in `e2e/testbed`, which also work by hand. They need
//! root, and the programs that `make setup` builds.

pub mod audit;
pub mod bare;
pub mod bare_pods;
pub mod cluster;
pub mod light;
pub mod matrix;
pub mod plat;
pub mod testbed;
pub mod traffic;
pub mod usage;
pub mod wait;

pub use wait::wait_until;
