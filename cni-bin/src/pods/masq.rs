//! Masquerade for networks configured by hand (`ipMasq`): what a pod sends out of its own subnet leaves
//! with the node's address. The agent masquerades for the cluster's blocks; this is for everyone else.
//!
//! ```text
//! table inet plat-pods {
//!     map masq4 { type ipv4_addr : verdict; elements = { 10.22.0.5 : jump masq-10-22-0-0-16 } }
//!     map masq6 { type ipv6_addr : verdict }
//!     chain masq {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         ip saddr vmap @masq4
//!         ip6 saddr vmap @masq6
//!     }
//!     chain masq-10-22-0-0-16 {
//!         ip daddr 10.22.0.0/16 return
//!         ip daddr 224.0.0.0/4 return
//!         counter masquerade fully-random
//!     }
//! }
//! ```
//! A pod costs one element; rules are per subnet, so a packet takes one lookup with one pod and with ten
//! thousand. The elements follow from [`Lease::addresses`].

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use plat_crds::lease::{Lease, LeasedAddress};
use plat_crds::names::NFT_PODS_TABLE;
use plat_crds::{Block, Family};

use super::{Chain, Piece, Scaffold};
use crate::netlink::{Error, Socket, to_address};
use crate::nft::{
    self, Addr, BaseChain, Element, Field, Hook, KeyType, Rule, SRCNAT, Set, Table, TableFamily, Verdict,
};

const BASE_CHAIN: &str = "masq";

fn table() -> Table {
    Table::new(TableFamily::Inet, NFT_PODS_TABLE)
}

fn map(family: Family) -> Set {
    let name = match family {
        Family::IPv4 => "masq4",
        Family::IPv6 => "masq6",
    };
    Set::verdicts(&table(), name, &[KeyType::of(family)])
}

/// The subnet that an address's traffic may stay in unchanged.
fn subnet(leased: &LeasedAddress) -> Block {
    let net = IpNet::new(leased.address, leased.subnet_length).unwrap_or(IpNet::from(leased.address));
    Block::containing(net)
}

fn chain_name(subnet: Block) -> String {
    format!("masq-{}", subnet.object_name())
}

fn element(leased: &LeasedAddress) -> Element {
    Element::address(leased.address).verdict(Verdict::Jump(chain_name(subnet(leased))))
}

fn masqueraded(lease: &Lease) -> impl Iterator<Item = &LeasedAddress> {
    lease.addresses.iter().filter(|a| a.masquerade)
}

/// One element per masqueraded address.
pub(super) fn pieces(lease: &Lease) -> Vec<Piece> {
    let piece = |family| {
        let of_family = masqueraded(lease).filter(|a| Family::of(&a.address) == family);
        Piece { set: map(family), elements: of_family.map(element).collect() }
    };
    Family::ALL.map(piece).into()
}

/// Both maps, the chain that asks them, and a chain for each subnet of these leases.
pub(super) fn scaffold(leases: &[&Lease]) -> Scaffold {
    let table = table();
    let subnets: BTreeSet<Block> = leases.iter().flat_map(|lease| masqueraded(lease)).map(subnet).collect();
    let base = BaseChain::nat(Hook::Postrouting, SRCNAT);
    let rules = Family::ALL.map(|family| {
        // ip saddr vmap @masq4
        Rule::new(&table, BASE_CHAIN).vmap(&[Field::Saddr(family)], map(family).name())
    });
    let base = Chain { table, name: BASE_CHAIN.to_owned(), base: Some(base), rules: rules.into() };
    let chains = std::iter::once(base).chain(subnets.into_iter().map(subnet_chain)).collect();
    Scaffold { sets: Family::ALL.map(map).into(), chains }
}

fn subnet_chain(subnet: Block) -> Chain {
    let (table, name) = (table(), chain_name(subnet));
    let rule = || Rule::new(&table, &name);
    let rules = vec![
        // ip daddr 10.22.0.0/16 return
        rule().daddr(Addr::In(subnet)).verdict(Verdict::Return),
        // ip daddr 224.0.0.0/4 return
        rule().daddr(Addr::In(multicast(subnet.family()))).verdict(Verdict::Return),
        // counter masquerade fully-random
        rule().counter().masquerade_fully_random(),
    ];
    Chain { table, name, base: None, rules }
}

/// The addresses that are masqueraded now.
pub(super) fn members(socket: &mut Socket) -> Result<HashSet<IpAddr>, Error> {
    let mut members = HashSet::new();
    for family in Family::ALL {
        members.extend(nft::elements(socket, &map(family))?.iter().filter_map(|key| to_address(key)));
    }
    Ok(members)
}

fn multicast(family: Family) -> Block {
    let net = match family {
        Family::IPv4 => IpNet::new_assert([224, 0, 0, 0].into(), 4),
        Family::IPv6 => IpNet::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8),
    };
    Block::containing(net)
}
