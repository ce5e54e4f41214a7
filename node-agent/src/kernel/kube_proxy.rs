//! Whom kube-proxy takes for a pod of this node, as its rules in the kernel say.
//!
//! kube-proxy masquerades packets to a Service that do not come from a pod (of the node, or of the cluster): how it
//! tells is `detectLocalMode` in its configuration, which is not ours to read. But each Service's chain shows it:
//!
//! ```text
//! iptables:  -A KUBE-SVC-… ! -s 10.244.0.0/16 -d 10.96.0.10/32 … -j KUBE-MARK-MASQ
//! nftables:  ip daddr @cluster-ips ip saddr != 10.244.0.0/16 meta mark set mark or 0x4000     (chain services)
//! before 1.37:  ip daddr 10.96.0.10 … ip saddr != 10.244.0.0/16 jump mark-for-masquerade     (a chain per Service)
//! ```
//!
//! with an interface in place of the source in the modes `BridgeInterface` and `InterfaceNamePrefix`. All Services
//! have it alike, so the first ones are enough.

use std::collections::BTreeSet;

use plat_cni::netlink::Error;
use plat_cni::nft::{self, Cmp, Expr, Table};
use plat_crds::block::{Block, Family};

use super::forward::shape::{InterfaceName, Outcome, Test, read_rule};
use super::forward::table_family;
use super::nft::Nft;

/// Chains that rules are looked for in, in each table: of this many Services.
const LOOKED_AT: usize = 64;
/// Tables and the beginnings of their chains of Services.
const CHAINS: [(&str, &str); 3] = [("kube-proxy", "service"), ("nat", "KUBE-SVC-"), ("nat", "KUBE-SERVICES")];
/// `NFT_META_MARK`
const META_MARK: u32 = 3;
const MARKS: [&str; 2] = ["mark-for-masquerade", "KUBE-MARK-MASQ"];

/// Whose packets to a Service keep their source.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Local {
    /// What comes from these addresses.
    From(Block),
    /// What comes in by that link.
    Over(String),
    /// What comes in by a link whose name begins so.
    OverAny(String),
}

/// What the rules of each family say; nothing where there are no Services, or kube-proxy is not told.
pub fn observe(nft: &mut Nft) -> Result<BTreeSet<(Family, Local)>, Error> {
    let mut found = BTreeSet::new();
    let chains = nft::chains(&mut nft.socket)?;
    for family in Family::ALL {
        for (table, start) in CHAINS {
            let table = Table::new(table_family(family), table);
            let of_services = chains.iter().filter(|c| c.table == table && c.name.starts_with(start));
            for chain in of_services.take(LOOKED_AT) {
                for rule in nft::rules(&mut nft.socket, &table, &chain.name)? {
                    found.extend(local(&rule, family).map(|local| (family, local)));
                }
            }
        }
    }
    Ok(found)
}

/// The test by which a rule spares pods' packets from masquerade. Pure.
fn local(rule: &nft::RuleInfo, family: Family) -> Option<Local> {
    let reading = read_rule(rule, family);
    let marks = rule.expressions.iter().any(|e| matches!(e, Expr::Meta { key: META_MARK }));
    let jumps =
        matches!(reading.outcome, Outcome::Jump(chain) | Outcome::Goto(chain) if MARKS.contains(&chain));
    if !marks && !jumps {
        return None;
    }
    let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    reading.tests.iter().find_map(|test| match test {
        Test::Source(block, Cmp::Ne) => Some(Local::From(*block)),
        Test::In(InterfaceName::Whole(name), Cmp::Ne) => Some(Local::Over(text(name))),
        Test::In(InterfaceName::Start(start), Cmp::Ne) => Some(Local::OverAny(text(start))),
        _ => None,
    })
}
