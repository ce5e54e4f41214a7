//! Foreign firewalls in the way of pods' packets.
//!
//! An accept in one chain is not final in nftables: every chain at the hook must let a packet through. So a `FORWARD`
//! chain with policy drop (Docker, ufw, many hardening guides) cuts pods off whatever our own table says. Two answers, and
//! no third: the chains that iptables-nft keeps get accept rules appended ([`admit`]), and everything else that drops pods'
//! packets is named, with its cure, and not touched.
//!
//! Whether something does is judged, by leading packets through the ruleset:
//!
//! ```text
//! links (edge)  which links pods' packets pass, by the kernel's routes   ─┐
//! packet        synthetic packets: pod ↔ pod, pod → world and back        ├─▶ judge (pure) ─▶ finding (pure, words)
//! read (edge)   chains, rules and sets, as far as those packets come      ─┘
//! ```
//!
//! `ops` and `xt` translate rules, `ruleset` holds them, `bits` what is known of a register, `text` shows a rule as nft
//! does. `shape` recognises simple rules by content, for `admit` and for [`super::kube_proxy`].

mod admit;
mod bits;
mod finding;
mod judge;
mod links;
mod ops;
mod packet;
mod read;
mod ruleset;
pub(super) mod shape;
mod text;
mod xt;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use plat_cni::netlink::Error;
use plat_cni::nft;
use plat_crds::block::Family;

use super::nft::Nft;
use crate::fabric::ForwardChain;

pub(super) use admit::table_family;
pub use admit::{append, ours, remove};
pub use finding::Finding;
pub use judge::{Place, Verdict};
pub use links::Scene;
pub use packet::{Connection, Packet, Peer, Traffic, other_pod, pod, world};

/// What becomes of one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judged {
    /// The packet.
    pub packet: Packet,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Whether its source is changed, by whomever.
    pub is_translated: bool,
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Packet { traffic, block, connection, from_link, to_link, .. } = &self.packet;
        let connection = match connection {
            Connection::New => "new",
            Connection::Established => "established",
        };
        let (from, to) = (&from_link.name, &to_link.name);
        write!(f, "{block}: {connection} {traffic}, {from} to {to}: {}", self.verdict)?;
        if self.is_translated { f.write_str(", with another source address") } else { Ok(()) }
    }
}

/// What was found at the hooks that forwarded packets pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forwarding {
    /// The chains `filter FORWARD`.
    pub chains: BTreeMap<Family, ForwardChain>,
    /// What drops pods' packets.
    pub blockers: Vec<Finding>,
    /// What may drop them.
    pub doubts: Vec<Finding>,
    /// What hides pods' addresses.
    pub hiders: Vec<Finding>,
    /// What becomes of each packet.
    pub verdicts: Vec<Judged>,
}

/// Reads the ruleset and judges it; `admitting` says whether accept rules are appended.
pub fn observe(nft: &mut Nft, scene: &Scene, admitting: bool) -> Result<Forwarding, Error> {
    let tables = nft::tables(&mut nft.socket)?;
    let owned: BTreeSet<_> = tables.into_iter().filter(|t| t.has_owner).map(|t| t.table).collect();
    let all = nft::chains(&mut nft.socket)?;
    let mut chains = BTreeMap::new();
    let mut known = Vec::new();
    for family in Family::ALL {
        if let Some(chain) = admit::find(&all, family) {
            let rules = nft::rules(&mut nft.socket, &chain.table, &chain.name)?;
            chains.insert(family, admit::read(chain, &rules, &owned, family, &scene.bridge));
            known.push((chain.table.clone(), chain.name.clone(), rules));
        }
    }
    let (ruleset, outcomes) = read::judged(nft, &all, known, &scene.packets)?;
    let judged: Vec<_> = scene.packets.iter().zip(&outcomes).collect();
    let words = finding::Words { ruleset: &ruleset, owned: &owned, scene, admitting };
    let findings = words.findings(&judged);
    let verdict = |(packet, outcome): (&Packet, judge::Outcome)| Judged {
        packet: packet.clone(),
        verdict: outcome.verdict,
        is_translated: outcome.translated.is_some(),
    };
    let verdicts = scene.packets.iter().zip(outcomes).map(verdict).collect();
    Ok(Forwarding { chains, verdicts, ..findings })
}

/// Families whose legacy (not nft) `filter` table is loaded. Its policy cannot be read with this agent's
/// rights without side effects, so it is reported as a doubt.
pub fn legacy_tables(proc_net: &Path) -> Vec<Family> {
    let has_filter = |file: &str| {
        let names = std::fs::read_to_string(proc_net.join(file)).unwrap_or_default();
        names.lines().any(|name| name == "filter")
    };
    let files = [(Family::IPv4, "ip_tables_names"), (Family::IPv6, "ip6_tables_names")];
    files.into_iter().filter(|(_, file)| has_filter(file)).map(|(family, _)| family).collect()
}
