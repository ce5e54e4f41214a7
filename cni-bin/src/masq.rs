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
//! thousand. The elements follow from the lease alone ([`Lease::addresses`]), so whoever holds the lease
//! store's lock can write them again after a flush ([`restore`]).

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use plat_crds::lease::{Lease, LeasedAddress};
use plat_crds::names::NFT_PODS_TABLE;
use plat_crds::{Block, Family};
use rustix::io::Errno;

use crate::netlink::{Error, Protocol, Socket};
use crate::nft::{
    self, Addr, BaseChain, Batch, Element, Field, Hook, KeyType, Rule, SRCNAT, Set, Table, TableFamily,
    Verdict,
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

fn masqueraded(addresses: &[LeasedAddress]) -> Vec<LeasedAddress> {
    addresses.iter().filter(|a| a.masquerade).copied().collect()
}

/// Masquerades for a lease's addresses that are marked so. Usually one small transaction; table and chains
/// are written where they do not stand as they should.
pub fn add(addresses: &[LeasedAddress]) -> Result<(), Error> {
    let addresses = masqueraded(addresses);
    if addresses.is_empty() {
        return Ok(());
    }
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let mut batch = Batch::new();
    add_elements(&mut batch, &addresses);
    match batch.send(&mut socket) {
        Ok(()) if missing_rule(&mut socket, &addresses)?.is_none() => return Ok(()),
        Ok(()) => {}
        Err(error) => match error.errno() {
            // No table yet, or no chain of this subnet.
            Some(Errno::NOENT) => {}
            // The address is there with another subnet's chain: left behind by someone who was killed.
            Some(Errno::EXIST | Errno::BUSY) => delete(&mut socket, &addresses)?,
            _ => return Err(error),
        },
    }
    let mut batch = Batch::new();
    add_scaffold(&mut batch, &subnets(&addresses));
    add_elements(&mut batch, &addresses);
    batch.send(&mut socket)
}

/// Ends the masquerading for a lease's addresses. What is not there is fine.
pub fn remove(addresses: &[LeasedAddress]) -> Result<(), Error> {
    let addresses = masqueraded(addresses);
    if addresses.is_empty() {
        return Ok(());
    }
    delete(&mut Socket::open(Protocol::Netfilter)?, &addresses)
}

fn delete(socket: &mut Socket, addresses: &[LeasedAddress]) -> Result<(), Error> {
    // One by one, as one that is missing would undo the others' deletion.
    for leased in addresses {
        let mut batch = Batch::new();
        batch.delete_elements(&map(Family::of(&leased.address)), &[Element::address(leased.address)]);
        crate::netlink::deleted(batch.send(socket))?;
    }
    Ok(())
}

/// Writes the masquerading of all these leases and takes away that of any other address. To be called
/// with the lease store locked, so that no ADD or DEL comes between reading leases and writing elements.
pub fn restore<'a>(leases: impl Iterator<Item = &'a Lease>) -> Result<(), Error> {
    let addresses: Vec<LeasedAddress> = leases.flat_map(|l| masqueraded(&l.addresses)).collect();
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let existing = nft::tables(&mut socket)?.iter().any(|t| t.table == table());
    if addresses.is_empty() && !existing {
        return Ok(());
    }
    let mut batch = Batch::new();
    add_scaffold(&mut batch, &subnets(&addresses));
    for family in Family::ALL {
        batch.flush_set(&map(family));
    }
    add_elements(&mut batch, &addresses);
    batch.send(&mut socket)
}

/// The addresses that are masqueraded now.
pub fn members() -> Result<HashSet<IpAddr>, Error> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let mut members = HashSet::new();
    for family in Family::ALL {
        members.extend(nft::elements(&mut socket, &map(family))?.iter().filter_map(|key| to_address(key)));
    }
    Ok(members)
}

fn to_address(key: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(key).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(key).ok().map(IpAddr::from))
}

/// What is missing for these addresses to be masqueraded, in words; `None` if nothing is.
pub fn missing(addresses: &[LeasedAddress]) -> Result<Option<String>, Error> {
    let addresses = masqueraded(addresses);
    if addresses.is_empty() {
        return Ok(None);
    }
    let mut socket = Socket::open(Protocol::Netfilter)?;
    for leased in &addresses {
        let family = Family::of(&leased.address);
        let elements = nft::elements(&mut socket, &map(family))?;
        if !elements.iter().any(|key| to_address(key) == Some(leased.address)) {
            return Ok(Some(format!("no masquerade for {} in map {}", leased.address, map(family).name())));
        }
    }
    let rule = missing_rule(&mut socket, &addresses)?;
    Ok(rule.map(|rule| format!("no masquerade rule '{}' in chain {}", rule.text(), rule.chain())))
}

/// The first rule that does not stand.
fn missing_rule(socket: &mut Socket, addresses: &[LeasedAddress]) -> Result<Option<Rule>, Error> {
    for rule in scaffold_rules(&subnets(addresses)) {
        let found = nft::rules(socket, &table(), rule.chain())?;
        if !found.iter().any(|r| r.expressions == rule.expressions()) {
            return Ok(Some(rule));
        }
    }
    Ok(None)
}

fn subnets(addresses: &[LeasedAddress]) -> BTreeSet<Block> {
    addresses.iter().map(subnet).collect()
}

/// Table, maps and chains, written so that doing it twice, also at the same time, is like doing it once.
fn add_scaffold(batch: &mut Batch, subnets: &BTreeSet<Block>) {
    let table = table();
    batch.add_table(&table);
    for family in Family::ALL {
        batch.add_set(&map(family));
    }
    batch.add_base_chain(&table, BASE_CHAIN, &BaseChain::nat(Hook::Postrouting, SRCNAT));
    batch.flush_chain(&table, BASE_CHAIN);
    for subnet in subnets {
        batch.add_chain(&table, &chain_name(*subnet));
        batch.flush_chain(&table, &chain_name(*subnet));
    }
    for rule in scaffold_rules(subnets) {
        batch.add_rule(&rule);
    }
}

fn scaffold_rules(subnets: &BTreeSet<Block>) -> Vec<Rule> {
    let table = table();
    let mut rules = vec![
        // ip saddr vmap @masq4
        Rule::new(&table, BASE_CHAIN).vmap(&[Field::Saddr(Family::IPv4)], map(Family::IPv4).name()),
        // ip6 saddr vmap @masq6
        Rule::new(&table, BASE_CHAIN).vmap(&[Field::Saddr(Family::IPv6)], map(Family::IPv6).name()),
    ];
    for subnet in subnets {
        let rule = || Rule::new(&table, &chain_name(*subnet));
        // ip daddr 10.22.0.0/16 return
        rules.push(rule().daddr(Addr::In(*subnet)).verdict(Verdict::Return));
        // ip daddr 224.0.0.0/4 return
        rules.push(rule().daddr(Addr::In(multicast(subnet.family()))).verdict(Verdict::Return));
        // counter masquerade fully-random
        rules.push(rule().counter().masquerade_fully_random());
    }
    rules
}

fn multicast(family: Family) -> Block {
    let net = match family {
        Family::IPv4 => IpNet::new_assert([224, 0, 0, 0].into(), 4),
        Family::IPv6 => IpNet::new_assert([0xff00, 0, 0, 0, 0, 0, 0, 0].into(), 8),
    };
    Block::containing(net)
}

fn add_elements(batch: &mut Batch, addresses: &[LeasedAddress]) {
    for family in Family::ALL {
        let elements: Vec<Element> =
            addresses.iter().filter(|a| Family::of(&a.address) == family).map(element).collect();
        batch.add_elements(&map(family), &elements);
    }
}
