//! The kernel's edge: reads what is there, does what a step says, and has no policy.

pub mod events;
pub mod forward;
pub mod host;
pub mod kube_proxy;
pub mod nft;
pub mod route;
pub mod rule;
pub mod sysctl;
pub mod vxlan;
