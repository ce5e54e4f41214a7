//! Plat's CNI plugin, as a library: the binary `plat` is this and a `main`.
//!
//! It watches nothing and runs no daemon: the runtime calls it once per verb, with the environment and a
//! configuration on standard input.
//! ```text
//! request ─▶ config ─▶ acquire ─▶ attach ─▶ confirm ─▶ raise ─▶ reply
//! (env)      (stdin)   (lease)    (kernel)  (lease)    (stdout)
//! ```
//! | | modules |
//! |---|---|
//! | verbs | [`add`] ([`acquire`], [`attach`]), [`del`] and [`gc`] ([`teardown`]), [`check`], [`status`], [`version`] |
//! | decided by pure functions | [`request`], [`config`], [`spec`], [`pick`], [`pool`], [`wire`], [`reply`], [`sweep::dead`], [`mac`], [`json`], [`error`] |
//! | leases | [`store`] (file), [`kernel`] (proof), [`leases`] (`plat leases`), format in [`plat_crds::lease`] |
//! | kernel | [`netlink`], [`link`], [`nft`], [`conntrack`], [`bridge`], [`routed`], [`tc`], [`bandwidth`], [`pods`], [`netns`], [`sysctl`], [`boot`] |
//! | other plugins | [`delegate`]; of a network that was here before: [`foreign`], [`host_local`], [`predecessor`] |
//!
//! The agent uses [`bridge`], [`nft`], [`pods`], [`store`] and [`sweep`]: what both programs make in the
//! kernel, one piece of code makes. Everything here is synchronous; an async caller uses a blocking thread.
//! No Kubernetes client, async runtime or TLS is linked.

pub mod acquire;
pub mod add;
pub mod attach;
pub mod await_block;
pub mod bandwidth;
pub mod boot;
pub mod bridge;
pub mod call;
pub mod check;
pub mod config;
pub mod conntrack;
pub mod del;
pub mod delegate;
pub mod error;
pub mod fail;
pub mod foreign;
pub mod gc;
pub mod host_local;
pub mod json;
pub mod kernel;
pub mod leases;
pub mod link;
pub mod mac;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod pick;
pub mod pods;
pub mod pool;
pub mod predecessor;
pub mod reply;
pub mod request;
pub mod routed;
pub mod spec;
pub mod status;
pub mod store;
pub mod sweep;
pub mod sysctl;
pub mod tc;
pub mod teardown;
pub mod version;
pub mod wire;
