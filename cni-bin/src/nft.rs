//! nftables by netlink: typed tables, chains, rules, sets and maps, sent as one atomic transaction, and
//! what is needed to read them back. No `nft` binary, no text on the way to the kernel.
//!
//! A [`Rule`] is built match by match and carries its own nft text ([`Rule::text`]), which errors show and
//! tests compare with what `nft list` prints. A [`Batch`] collects additions and deletions; [`Batch::send`]
//! makes all of them happen or none.
//!
//! ```no_run
//! # use plat_cni::nft::*; use plat_cni::netlink::{Protocol, Socket}; use plat_crds::Family;
//! # fn main() -> Result<(), Error> {
//! let table = Table::new(TableFamily::Inet, "plat");
//! let pods = Set::prefixes(&table, "pods4", Family::IPv4);
//! let mut batch = Batch::new();
//! batch.replace_table(&table);
//! batch.add_set(&pods);
//! batch.add_prefixes(&pods, &["10.244.0.0/16".parse().unwrap()]);
//! batch.add_base_chain(&table, "postrouting", &BaseChain::nat(Hook::Postrouting, SRCNAT));
//! // ip saddr @pods4 oifname != "cni0" counter masquerade fully-random
//! batch.add_rule(
//!     &Rule::new(&table, "postrouting")
//!         .saddr(Addr::InSet(Family::IPv4, "pods4"))
//!         .oifname(Name::IsNot("cni0"))
//!         .counter()
//!         .masquerade_fully_random(),
//! );
//! batch.send(&mut Socket::open(Protocol::Netfilter)?)?;
//! # Ok(()) }
//! ```
//!
//! The kernel's side of the encoding is `linux/netfilter/nf_tables.h`; expressions are written the way
//! nft 1.0 (and, for plain matches in `ip filter`, iptables-nft) writes them, so that those tools show
//! them as what they are.

mod batch;
mod dump;
mod expr;
mod rule;
mod set;

use std::fmt;

pub use crate::netlink::Error;
pub use batch::Batch;
pub use dump::{
    ChainInfo, HookInfo, RuleInfo, TableInfo, chains, contents, elements, find, read_chain, read_elements,
    read_rule, read_table, rules, table_rules, tables,
};
pub use expr::{Cmp, Expr, Verdict};
pub use rule::{Addr, Field, Name, Rule};
pub use set::{Element, KeyType, Set};

/// Priority `dstnat` of a base chain.
pub const DSTNAT: i32 = -100;
/// Priority `dstnat` of a base chain of a bridge table: first of all.
pub const BRIDGE_DSTNAT: i32 = -300;
/// Priority `filter` of a base chain.
pub const FILTER: i32 = 0;
/// Priority `srcnat` of a base chain.
pub const SRCNAT: i32 = 100;
/// Priority `raw` of a base chain: before connection tracking.
pub const RAW: i32 = -300;

/// The family of a table: which packets it sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TableFamily {
    /// IPv4 and IPv6.
    Inet,
    /// IPv4; where iptables-nft keeps its tables.
    Ip,
    /// IPv6; where ip6tables-nft keeps its tables.
    Ip6,
    /// Frames on a bridge.
    Bridge,
    /// ARP.
    Arp,
    /// Ingress and egress of one device.
    Netdev,
}

impl TableFamily {
    /// The kernel's number (`NFPROTO_*`).
    pub fn number(self) -> u8 {
        match self {
            TableFamily::Inet => 1,
            TableFamily::Ip => 2,
            TableFamily::Arp => 3,
            TableFamily::Netdev => 5,
            TableFamily::Bridge => 7,
            TableFamily::Ip6 => 10,
        }
    }

    fn from_number(number: u8) -> Option<TableFamily> {
        use TableFamily::*;
        [Inet, Ip, Ip6, Bridge, Arp, Netdev].into_iter().find(|f| f.number() == number)
    }
}

impl fmt::Display for TableFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TableFamily::Inet => "inet",
            TableFamily::Ip => "ip",
            TableFamily::Ip6 => "ip6",
            TableFamily::Bridge => "bridge",
            TableFamily::Arp => "arp",
            TableFamily::Netdev => "netdev",
        })
    }
}

/// A table's family and name; shown as nft does (`inet plat`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Table {
    /// Its family.
    pub family: TableFamily,
    /// Its name.
    pub name: String,
}

impl Table {
    /// The table of that family and name.
    pub fn new(family: TableFamily, name: &str) -> Table {
        Table { family, name: name.to_owned() }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// Where in a packet's way a base chain hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// To this host.
    Input,
    /// Through this host.
    Forward,
    /// From this host.
    Output,
    /// After routing.
    Postrouting,
}

impl Hook {
    /// The kernel's number, the same for inet, ip, ip6 and bridge.
    pub fn number(self) -> u32 {
        match self {
            Hook::Prerouting => 0,
            Hook::Input => 1,
            Hook::Forward => 2,
            Hook::Output => 3,
            Hook::Postrouting => 4,
        }
    }
}

/// What happens to a packet at the end of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It goes on.
    Accept,
    /// It is dropped.
    Drop,
}

/// What makes a chain a base chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseChain {
    /// `filter`, `nat` or `route`.
    pub kind: &'static str,
    /// Where it hangs.
    pub hook: Hook,
    /// Its place among the chains of that hook; lower goes first.
    pub priority: i32,
    /// What happens at its end.
    pub policy: Policy,
}

impl BaseChain {
    /// `type filter hook … priority …; policy accept;`
    pub fn filter(hook: Hook, priority: i32) -> BaseChain {
        BaseChain { kind: "filter", hook, priority, policy: Policy::Accept }
    }

    /// `type nat hook … priority …; policy accept;`
    pub fn nat(hook: Hook, priority: i32) -> BaseChain {
        BaseChain { kind: "nat", hook, priority, policy: Policy::Accept }
    }
}

/// `NFNL_SUBSYS_NFTABLES`, the high byte of every message type.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const GET_TABLE: u16 = NEW_TABLE + 1;
const DELETE_TABLE: u16 = NEW_TABLE + 2;
const NEW_CHAIN: u16 = NEW_TABLE + 3;
const GET_CHAIN: u16 = NEW_TABLE + 4;
const DELETE_CHAIN: u16 = NEW_TABLE + 5;
const NEW_RULE: u16 = NEW_TABLE + 6;
const GET_RULE: u16 = NEW_TABLE + 7;
const DELETE_RULE: u16 = NEW_TABLE + 8;
const NEW_SET: u16 = NEW_TABLE + 9;
const DELETE_SET: u16 = NEW_TABLE + 11;
const NEW_ELEMENTS: u16 = NEW_TABLE + 12;
const GET_ELEMENTS: u16 = NEW_TABLE + 13;
const DELETE_ELEMENTS: u16 = NEW_TABLE + 14;

/// `nfgenmsg`: family, version 0, resource 0.
const GENERIC_HEADER: usize = 4;

fn header(family: u8) -> [u8; GENERIC_HEADER] {
    [family, 0, 0, 0]
}
