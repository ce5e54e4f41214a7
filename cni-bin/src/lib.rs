//! Plat's CNI plugin.

pub mod bridge;
pub mod link;
pub mod mac;
pub mod netlink;
pub mod nft;
pub mod sysctl;
