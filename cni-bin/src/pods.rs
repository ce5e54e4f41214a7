//! What the kernel's nftables hold for single pods: the tables that the CNI binary writes and the agent
//! restores.
//!
//! Every module below turns a lease, and nothing else, into *elements* of sets and maps ([`Piece`]); what
//! they hang in (tables, sets, chains, rules: the [`Scaffold`]) is the same for all pods. So a packet costs
//! the same with one pod and with ten thousand, an ADD writes its few elements in one transaction, a DEL
//! knows what to take away by the lease alone, and whoever reads the leases can write everything again.
//!
//! | module | what for |
//! |---|---|
//! | [`masq`] | masquerade of networks configured by hand |
//! | [`spoof`] | a pod sends from its own addresses only |
//!
//! The lease store's lock orders it all: elements are added after their lease is recorded, and taken away
//! under the lock in which the lease ends ([`crate::acquire::release`]). So [`restore`], which holds the
//! lock too, never writes an element whose lease is about to go.

pub mod masq;
pub mod spoof;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use plat_crds::lease::{Guard, Lease};
use rustix::io::Errno;

use crate::netlink::{Error, Protocol, Socket};
use crate::nft::{self, BaseChain, Batch, Element, Rule, Set, Table};

/// Elements of one set or map.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) set: Set,
    pub(crate) elements: Vec<Element>,
}

/// What elements hang in. Written so that doing it twice, also at the same time, is like doing it once.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scaffold {
    pub(crate) sets: Vec<Set>,
    pub(crate) chains: Vec<Chain>,
}

/// A chain with all its rules.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    pub(crate) table: Table,
    pub(crate) name: String,
    /// Where it hangs, unless it is there to be jumped to.
    pub(crate) base: Option<BaseChain>,
    pub(crate) rules: Vec<Rule>,
}

/// One module's part.
struct Part {
    /// What a lease has of it; empty if nothing.
    pieces: fn(&Lease) -> Vec<Piece>,
    /// What the pieces of these leases hang in: all its sets, and the chains that are needed.
    scaffold: fn(&[&Lease]) -> Scaffold,
}

const PARTS: [Part; 2] = [
    Part { pieces: masq::pieces, scaffold: masq::scaffold },
    Part { pieces: spoof::pieces, scaffold: spoof::scaffold },
];

fn pieces(lease: &Lease) -> Vec<Piece> {
    PARTS.iter().flat_map(|part| (part.pieces)(lease)).filter(|piece| !piece.elements.is_empty()).collect()
}

/// What all the parts need that these leases have something of.
fn scaffold(leases: &[&Lease]) -> Scaffold {
    let mut scaffold = Scaffold::default();
    for part in &PARTS {
        let users: Vec<&Lease> =
            leases.iter().filter(|lease| !(part.pieces)(lease).is_empty()).copied().collect();
        if !users.is_empty() {
            let Scaffold { sets, chains } = (part.scaffold)(&users);
            scaffold.sets.extend(sets);
            scaffold.chains.extend(chains);
        }
    }
    scaffold
}

impl Scaffold {
    fn tables(&self) -> BTreeSet<&Table> {
        self.sets.iter().map(Set::table).chain(self.chains.iter().map(|chain| &chain.table)).collect()
    }

    fn write(&self, batch: &mut Batch) {
        for table in self.tables() {
            batch.add_table(table);
        }
        for set in &self.sets {
            batch.add_set(set);
        }
        for chain in &self.chains {
            match &chain.base {
                Some(base) => batch.add_base_chain(&chain.table, &chain.name, base),
                None => batch.add_chain(&chain.table, &chain.name),
            }
            batch.flush_chain(&chain.table, &chain.name);
        }
        for rule in self.chains.iter().flat_map(|chain| &chain.rules) {
            batch.add_rule(rule);
        }
    }

    /// The first rule that does not stand.
    fn missing_rule(&self, socket: &mut Socket) -> Result<Option<&Rule>, Error> {
        for table in self.tables() {
            let found = nft::table_rules(socket, table)?;
            let stands = |rule: &&Rule| {
                found.iter().any(|r| r.chain == rule.chain() && r.expressions == rule.expressions())
            };
            let of_table = self.chains.iter().filter(|chain| chain.table == *table);
            if let Some(missing) = of_table.flat_map(|chain| &chain.rules).find(|rule| !stands(rule)) {
                return Ok(Some(missing));
            }
        }
        Ok(None)
    }
}

fn add_pieces(batch: &mut Batch, pieces: &[Piece]) {
    for piece in pieces {
        batch.add_elements(&piece.set, &piece.elements);
    }
}

/// Writes what a pod has, in one transaction; tables and chains are made where they are missing. A pod that
/// has nothing costs nothing.
pub fn add(lease: &Lease) -> Result<(), Error> {
    let pieces = pieces(lease);
    if pieces.is_empty() {
        return Ok(());
    }
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let mut batch = Batch::new();
    add_pieces(&mut batch, &pieces);
    match batch.send(&mut socket) {
        // No table yet, or no chain of this subnet.
        Err(error) if error.errno() == Some(Errno::NOENT) => {}
        // A key is there with another value: left behind by someone who was killed.
        Err(error) if matches!(error.errno(), Some(Errno::EXIST | Errno::BUSY)) => {}
        result => return result,
    }
    let mut batch = Batch::new();
    scaffold(&[lease]).write(&mut batch);
    for piece in &pieces {
        batch.delete_elements(&piece.set, &nft::find(&mut socket, &piece.set, &piece.elements)?);
    }
    add_pieces(&mut batch, &pieces);
    batch.send(&mut socket)
}

/// Takes away what a pod has. What is not there is fine. To be called with the lease store locked, or
/// without one.
pub fn remove(lease: &Lease) -> Result<(), Error> {
    let pieces = pieces(lease);
    if pieces.is_empty() {
        return Ok(());
    }
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let mut batch = Batch::new();
    for piece in &pieces {
        batch.delete_elements(&piece.set, &piece.elements);
    }
    match batch.send(&mut socket) {
        Err(error) if error.errno() == Some(Errno::NOENT) => {}
        result => return result,
    }
    // One by one, as one that is missing undoes the others' deletion.
    for piece in &pieces {
        for element in &piece.elements {
            let mut batch = Batch::new();
            batch.delete_elements(&piece.set, std::slice::from_ref(element));
            crate::netlink::deleted(batch.send(&mut socket))?;
        }
    }
    Ok(())
}

/// What is missing of what a pod has, in words; `None` if nothing is.
pub fn missing(lease: &Lease) -> Result<Option<String>, Error> {
    let pieces = pieces(lease);
    if pieces.is_empty() {
        return Ok(None);
    }
    let mut socket = Socket::open(Protocol::Netfilter)?;
    for piece in &pieces {
        let found = nft::find(&mut socket, &piece.set, &piece.elements)?;
        if let Some(missing) = piece.elements.iter().find(|element| !found.contains(element)) {
            let (key, set) = (piece.set.key_text(missing), &piece.set);
            return Ok(Some(format!("no element {key} in map {} {}", set.table(), set.name())));
        }
    }
    let scaffold = scaffold(&[lease]);
    let rule = scaffold.missing_rule(&mut socket)?;
    Ok(rule.map(|rule| format!("no rule '{}' in chain {} {}", rule.text(), rule.table(), rule.chain())))
}

/// What [`restore`] changed, in words; empty if all was as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// What was put back.
    pub put_back: Vec<String>,
    /// Number of elements that belonged to no lease.
    pub orphans: usize,
}

/// Brings the pods' tables to what the leases say: what is missing is written, elements of no lease are
/// taken away, what is right is left alone. To be called with the lease store locked, and with all of its
/// leases.
pub fn restore<'a>(leases: impl IntoIterator<Item = &'a Lease>) -> Result<Restored, Error> {
    let leases: Vec<&Lease> = leases.into_iter().collect();
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let tables: BTreeSet<Table> = nft::tables(&mut socket)?.into_iter().map(|t| t.table).collect();
    let scaffold = scaffold(&leases);
    let (mut restored, mut batch) = (Restored::default(), Batch::new());
    if let Some(table) = scaffold.tables().into_iter().find(|table| !tables.contains(table)) {
        restored.put_back.push(format!("table {table}"));
    } else if let Some(rule) = scaffold.missing_rule(&mut socket)? {
        restored.put_back.push(format!("rules of chain {} {}", rule.table(), rule.chain()));
    }
    if !restored.put_back.is_empty() {
        scaffold.write(&mut batch);
    }
    let pieces: Vec<Piece> = leases.iter().flat_map(|lease| pieces(lease)).collect();
    // Also the sets in which no lease has anything: what is there belongs to nobody.
    for set in PARTS.iter().flat_map(|part| (part.scaffold)(&[]).sets) {
        let wanted = by_key(pieces.iter().filter(|piece| piece.set == set).flat_map(|p| &p.elements));
        let there = nft::contents(&mut socket, &set)?;
        let there = by_key(&there);
        let differ = |a: &BTreeMap<&[u8], &Element>, b: &BTreeMap<&[u8], &Element>| -> Vec<Element> {
            a.iter().filter(|(key, e)| b.get(*key) != Some(e)).map(|(_, e)| (*e).clone()).collect()
        };
        let (wrong, missing) = (differ(&there, &wanted), differ(&wanted, &there));
        batch.delete_elements(&set, &wrong);
        batch.add_elements(&set, &missing);
        restored.orphans += wrong.len();
        if !missing.is_empty() {
            restored.put_back.push(format!("{} elements of {} {}", missing.len(), set.table(), set.name()));
        }
    }
    match batch.send(&mut socket) {
        Ok(()) => Ok(restored),
        // Something of another shape stands under one of our names: all is written anew.
        Err(_) => rewrite(&mut socket, &scaffold, &pieces).map(|()| restored),
    }
}

fn by_key<'a>(elements: impl IntoIterator<Item = &'a Element>) -> BTreeMap<&'a [u8], &'a Element> {
    elements.into_iter().map(|element| (element.key_bytes(), element)).collect()
}

fn rewrite(socket: &mut Socket, scaffold: &Scaffold, pieces: &[Piece]) -> Result<(), Error> {
    let mut batch = Batch::new();
    for table in scaffold.tables() {
        batch.replace_table(table);
    }
    scaffold.write(&mut batch);
    add_pieces(&mut batch, pieces);
    batch.send(socket)
}

/// What the tables say about pods, for leases that must be rebuilt from the kernel.
#[derive(Clone, Debug, Default)]
pub struct Known {
    pub(crate) masqueraded: HashSet<IpAddr>,
    pub(crate) guarded: HashMap<String, Guard>,
}

impl Known {
    /// Reads the tables. Where nftables cannot be asked, nothing is in them either.
    pub fn read() -> Known {
        let read = || -> Result<Known, Error> {
            let mut socket = Socket::open(Protocol::Netfilter)?;
            Ok(Known { masqueraded: masq::members(&mut socket)?, guarded: spoof::members(&mut socket)? })
        };
        read().unwrap_or_default()
    }

    /// Writes into a lease what the tables say about its addresses and its link.
    pub fn tell(&self, lease: &mut Lease) {
        lease.guard = self.guarded.get(&lease.veth.name).copied();
        for leased in &mut lease.addresses {
            leased.masquerade = self.masqueraded.contains(&leased.address);
        }
    }
}
