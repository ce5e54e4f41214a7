//! What the kernel's nftables hold for single pods: the tables that the CNI binary writes and the agent
//! restores.
//!
//! Every module below turns a lease, and nothing else, into *elements* of sets and maps (`Piece`); what
//! they hang in (tables, sets, chains, rules: the `Scaffold`) is the same for all pods. So a packet costs
//! the same with one pod and with ten thousand, an ADD writes its few elements in one transaction, a DEL
//! knows what to take away by the lease alone, and whoever reads the leases can write everything again.
//!
//! | module | what for |
//! |---|---|
//! | [`masq`] | masquerade of networks configured by hand |
//! | [`hostports`] | ports of the node that lead to a pod |
//! | [`spoof`] | a pod sends from its own addresses only |
//!
//! The lease store's lock orders it all: elements are added after their lease is recorded, and whatever is
//! there is taken away under the lock in which the lease ends ([`crate::acquire::end`]). So [`restore`], which
//! holds the lock too, leaves none whose lease is about to go. (A DEL takes them away once before, to save
//! time: [`crate::teardown`].) Whatever an [`add`] cannot do by adding alone is
//! settled under the lock ([`settle`]).

pub mod hostports;
pub mod masq;
pub mod spoof;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use plat_crds::host_port::HostPort;
use plat_crds::lease::{Guard, Lease, Since};
use rustix::io::Errno;

use crate::kernel::HostKernel;
use crate::netlink::{self, Protocol, Socket};
use crate::nft::{self, BaseChain, Batch, Element, Rule, Set, Table};
use crate::store::Kernel;

/// Why a pod's rules cannot be as they should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// Another pod has it.
    #[error("{what} is taken by {ifname} of container {container_id}")]
    Taken {
        /// What.
        what: String,
        /// Who has it.
        container_id: String,
        /// With which interface.
        ifname: String,
    },
}

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
    /// What an element stands for, before its key.
    noun: &'static str,
    /// What a lease has of it.
    pieces: fn(&Lease) -> Vec<Piece>,
    /// What the pieces of these leases hang in: all its sets, and the chains that are needed.
    scaffold: fn(&[&Lease]) -> Scaffold,
}

const PARTS: [Part; 3] = [
    Part { noun: "masquerade of", pieces: masq::pieces, scaffold: masq::scaffold },
    Part { noun: "host port", pieces: hostports::pieces, scaffold: hostports::scaffold },
    Part { noun: "guard of", pieces: spoof::pieces, scaffold: spoof::scaffold },
];

impl Part {
    fn of(&self, lease: &Lease) -> Vec<Piece> {
        (self.pieces)(lease).into_iter().filter(|piece| !piece.elements.is_empty()).collect()
    }
}

fn pieces(lease: &Lease) -> Vec<Piece> {
    PARTS.iter().flat_map(|part| part.of(lease)).collect()
}

/// What all the parts need that these leases have something of.
fn scaffold(leases: &[&Lease]) -> Scaffold {
    let mut scaffold = Scaffold::default();
    for part in &PARTS {
        let users: Vec<&Lease> = leases.iter().filter(|lease| !part.of(lease).is_empty()).copied().collect();
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

    /// The first thing that does not stand, or that somebody added to, in words.
    fn lost(&self, socket: &mut Socket) -> Result<Option<String>, netlink::Error> {
        let tables: BTreeSet<Table> = nft::tables(socket)?.into_iter().map(|t| t.table).collect();
        if let Some(table) = self.tables().into_iter().find(|table| !tables.contains(table)) {
            return Ok(Some(format!("table {table}")));
        }
        for table in self.tables() {
            let found = nft::table_rules(socket, table)?;
            let stands = |chain: &&Chain| {
                let there = found.iter().filter(|rule| rule.chain == chain.name);
                there.map(|rule| rule.expressions.as_slice()).eq(chain.rules.iter().map(Rule::expressions))
            };
            let mut of_table = self.chains.iter().filter(|chain| chain.table == *table);
            if let Some(chain) = of_table.find(|chain| !stands(chain)) {
                return Ok(Some(format!("the rules of chain {} {}", chain.table, chain.name)));
            }
        }
        Ok(None)
    }

    /// The first rule that does not stand.
    fn missing_rule(&self, socket: &mut Socket) -> Result<Option<&Rule>, netlink::Error> {
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

/// What came of an [`add`].
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Added {
    /// All is written, if there was anything to write.
    Done,
    /// Nothing is written: tables or chains are missing, or a key is there with another value. [`settle`] it.
    Unsettled,
}

/// Writes what a pod has, in one transaction that adds elements and nothing else. A pod that has nothing
/// costs nothing.
pub fn add(lease: &Lease) -> Result<Added, Error> {
    let pieces = pieces(lease);
    if pieces.is_empty() {
        return Ok(Added::Done);
    }
    let mut batch = Batch::new();
    add_pieces(&mut batch, &pieces);
    match batch.send(&mut Socket::open(Protocol::Netfilter)?) {
        Ok(()) => Ok(Added::Done),
        Err(error) => match error.errno() {
            Some(Errno::NOENT | Errno::EXIST | Errno::BUSY) => Ok(Added::Unsettled),
            _ => Err(error.into()),
        },
    }
}

fn add_pieces(batch: &mut Batch, pieces: &[Piece]) {
    for piece in pieces {
        batch.add_elements(&piece.set, &piece.elements);
    }
}

/// Asks the kernel for the leases that it proves ([`crate::store::Kernel::held`]).
pub type Proof<'a> = dyn FnMut() -> Result<Vec<Lease>, netlink::Error> + 'a;

/// Writes what an [`add`] could not: first of all it is made sure that no other pod has it; then the tables
/// are brought to what all leases say. To be called with the lease store locked, and with all of its leases.
pub fn settle(lease: &Lease, leases: &[Lease], proof: &mut Proof<'_>) -> Result<(), Error> {
    let others: Vec<&Lease> = leases.iter().filter(|other| !is_same(other, lease)).collect();
    refuse_taken(lease, &others, &mut || Ok(elsewhere(proof()?, leases)))?;
    restore(others.into_iter().chain([lease]), Orphans::Leave)?;
    Ok(())
}

/// Of the leases that the kernel proves, those of other stores.
fn elsewhere(proven: Vec<Lease>, leases: &[impl std::borrow::Borrow<Lease>]) -> Vec<Lease> {
    let here: HashSet<_> = leases.iter().map(|lease| key(lease.borrow())).collect();
    proven.into_iter().filter(|lease| !here.contains(&key(lease))).collect()
}

fn key(lease: &Lease) -> (&str, &str) {
    (&lease.container_id, &lease.ifname)
}

fn is_same(a: &Lease, b: &Lease) -> bool {
    key(a) == key(b)
}

fn refuse_taken(lease: &Lease, others: &[&Lease], proof: &mut Proof<'_>) -> Result<(), Error> {
    let mut socket = Socket::open(Protocol::Netfilter)?;
    for part in &PARTS {
        for Piece { set, elements } in part.of(lease) {
            let there = nft::find(&mut socket, &set, &elements)?;
            for element in &elements {
                let found = there.iter().find(|found| found.key_bytes() == element.key_bytes());
                let holder = match found {
                    Some(found) if found == element => None,
                    Some(found) => holder(part, &set, found, others, proof)?,
                    None => elder(part, &set, element, lease, others),
                };
                if let Some(Lease { container_id, ifname, .. }) = holder {
                    let key = set.key_text(element).replace(" . ", " ");
                    return Err(Error::Taken { what: format!("{} {key}", part.noun), container_id, ifname });
                }
            }
        }
    }
    Ok(())
}

/// Whose element that is: of the lease that it is made of, also of one in another store, of which the kernel
/// tells. One that is of no lease was left behind by someone who was killed.
fn holder(
    part: &Part,
    set: &Set,
    found: &Element,
    others: &[&Lease],
    proof: &mut Proof<'_>,
) -> Result<Option<Lease>, Error> {
    if let Some(holder) = others.iter().find(|other| has(part, other, set, found)) {
        return Ok(Some((*holder).clone()));
    }
    Ok(proof()?.into_iter().find(|other| has(part, other, set, found)))
}

/// Where nothing is there (after a flush), the lease that goes first, if another one wants the same.
fn elder(part: &Part, set: &Set, element: &Element, lease: &Lease, others: &[&Lease]) -> Option<Lease> {
    let before = |other: &&&Lease| rank(other) < rank(lease) && wants(part, other, set, element);
    others.iter().find(before).map(|elder| (*elder).clone())
}

fn has(part: &Part, lease: &Lease, set: &Set, element: &Element) -> bool {
    part.of(lease).iter().any(|piece| piece.set == *set && piece.elements.contains(element))
}

fn wants(part: &Part, lease: &Lease, set: &Set, element: &Element) -> bool {
    let same_key = |other: &Element| other.key_bytes() == element.key_bytes();
    part.of(lease).iter().any(|piece| piece.set == *set && piece.elements.iter().any(same_key))
}

/// Of two leases that want the same, the one with the lower rank gets it: a pod that is connected before one
/// that is only about to be, then the elder.
fn rank(lease: &Lease) -> (bool, Since) {
    (lease.veth.index == 0, lease.since)
}

/// Takes away what pods have, by one socket.
///
/// The kernel frees deleted elements after a grace period, and whoever closes a socket waits for it and keeps all
/// other transactions waiting (`nft_rcv_nl_event`). So this should live until its owner has nothing else to
/// do, and be dropped without a lock held.
#[derive(Default)]
pub struct Remover {
    socket: Option<Socket>,
    removed: Vec<Lease>,
}

/// Only now, as it takes its time: UDP clients of pods that are gone are to find the next one.
impl Drop for Remover {
    fn drop(&mut self) {
        self.removed.iter().for_each(hostports::forget_flows_of);
    }
}

impl Remover {
    /// Takes away what a pod has. What is not there, or is another pod's, is fine: then nothing is changed.
    pub fn remove(&mut self, lease: &Lease) -> Result<(), netlink::Error> {
        let mut pieces = pieces(lease);
        if pieces.is_empty() {
            return Ok(());
        }
        let socket = match &mut self.socket {
            Some(socket) => socket,
            none => none.insert(Socket::open(Protocol::Netfilter)?),
        };
        for piece in &mut pieces {
            let there = nft::find(socket, &piece.set, &piece.elements)?;
            // Another pod may have got there first, and our ADD failed of it.
            let whole = piece.set.maps_to_data();
            let is_same =
                |a: &Element, b: &Element| if whole { a == b } else { a.key_only() == b.key_only() };
            piece.elements.retain(|element| there.iter().any(|found| is_same(found, element)));
        }
        pieces.retain(|piece| !piece.elements.is_empty());
        if pieces.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::new();
        for piece in &pieces {
            batch.delete_elements(&piece.set, &piece.elements);
        }
        match batch.send(socket) {
            Err(error) if error.errno() == Some(Errno::NOENT) => remove_each(socket, &pieces)?,
            result => result?,
        }
        self.removed.push(lease.clone());
        Ok(())
    }
}

/// Whether a pod has anything in nftables.
pub fn has_any(lease: &Lease) -> bool {
    !pieces(lease).is_empty()
}

/// One by one, as one that is missing undoes the others' deletion.
fn remove_each(socket: &mut Socket, pieces: &[Piece]) -> Result<(), netlink::Error> {
    for piece in pieces {
        for element in &piece.elements {
            let mut batch = Batch::new();
            batch.delete_elements(&piece.set, std::slice::from_ref(element));
            netlink::deleted(batch.send(socket))?;
        }
    }
    Ok(())
}

/// What is missing of what a pod has, in words; `None` if nothing is.
pub fn missing(lease: &Lease) -> Result<Option<String>, netlink::Error> {
    let pieces = pieces(lease);
    if pieces.is_empty() {
        return Ok(None);
    }
    let mut socket = Socket::open(Protocol::Netfilter)?;
    for piece in &pieces {
        let found = nft::find(&mut socket, &piece.set, &piece.elements)?;
        if let Some(missing) = piece.elements.iter().find(|element| !found.contains(element)) {
            let (key, set) = (piece.set.key_text(missing), &piece.set);
            return Ok(Some(format!("no element {key} in {set}")));
        }
    }
    let scaffold = scaffold(&[lease]);
    let rule = scaffold.missing_rule(&mut socket)?;
    Ok(rule.map(|rule| format!("no rule '{}' in chain {} {}", rule.text(), rule.table(), rule.chain())))
}

/// What to do with elements that belong to no lease.
pub enum Orphans<'a> {
    /// They stay.
    Leave,
    /// They go, unless they belong to a pod whose lease is in another store: the kernel tells of it.
    Sweep(&'a mut Proof<'a>),
}

/// What [`restore`] changed, in words; empty if all was as it should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// What was put back.
    pub put_back: Vec<String>,
    /// Number of elements that belonged to no lease.
    pub orphans: usize,
}

/// What leases want to be in one set: for each key the elements with it, those of the first rank first.
type Wanted = BTreeMap<Vec<u8>, Vec<Element>>;

/// What is to change in one set.
#[derive(Debug, Default, PartialEq, Eq)]
struct Difference {
    /// Has a value that no lease wants.
    wrong: Vec<Element>,
    /// Is wanted and not there.
    missing: Vec<Element>,
    /// Has a key that no lease wants.
    orphans: Vec<Element>,
}

/// Compares a set with what leases want in it. Of two that want the same key the one that has it keeps it. Pure.
fn compare(there: Vec<Element>, wanted: &Wanted) -> Difference {
    let (mut kept, mut difference) = (HashSet::new(), Difference::default());
    for element in there {
        match wanted.get(element.key_bytes()) {
            Some(wanted) if wanted.contains(&element) => _ = kept.insert(element.key_bytes().to_vec()),
            Some(_) => difference.wrong.push(element),
            None => difference.orphans.push(element),
        }
    }
    let missing = wanted.iter().filter(|(key, _)| !kept.contains(*key));
    difference.missing = missing.filter_map(|(_, elements)| elements.first().cloned()).collect();
    difference
}

/// Brings the pods' tables to what the leases say: what is missing is written, what is right is left alone.
/// To be called with the lease store locked, and with all of its leases.
pub fn restore<'a>(
    leases: impl IntoIterator<Item = &'a Lease>,
    mut orphans: Orphans<'_>,
) -> Result<Restored, netlink::Error> {
    let mut leases: Vec<&Lease> = leases.into_iter().collect();
    leases.sort_by_key(|lease| rank(lease));
    let mut socket = Socket::open(Protocol::Netfilter)?;
    let mut sight = Sight::First;
    loop {
        let (batch, restored) = repair(&mut socket, &leases, &mut orphans, sight)?;
        let Err(error) = batch.send(&mut socket) else { return Ok(restored) };
        match error.errno() {
            // Somebody took something away after it was read.
            Some(Errno::NOENT) if sight == Sight::First => sight = Sight::Second,
            // Something of another shape stands under one of our names: all is written anew.
            Some(Errno::EXIST | Errno::BUSY | Errno::INVAL | Errno::OPNOTSUPP) => {
                rewrite(&mut socket, &leases)?;
                return Ok(restored);
            }
            _ => return Err(error),
        }
    }
}

/// How often the tables were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sight {
    First,
    Second,
}

/// What brings the tables to what the leases say. At second sight also what seems to stand is written.
fn repair(
    socket: &mut Socket,
    leases: &[&Lease],
    orphans: &mut Orphans<'_>,
    sight: Sight,
) -> Result<(Batch, Restored), netlink::Error> {
    let scaffold = scaffold(leases);
    let (mut restored, mut batch) = (Restored::default(), Batch::new());
    let lost = scaffold.lost(socket)?;
    if lost.is_some() || sight == Sight::Second {
        scaffold.write(&mut batch);
    }
    restored.put_back.extend(lost);
    let (wanted, nothing) = (wanted(leases), Wanted::new());
    // Also the sets in which no lease has anything: what is there belongs to nobody.
    for set in PARTS.iter().flat_map(|part| (part.scaffold)(&[]).sets) {
        let wanted = wanted.get(&set.to_string()).unwrap_or(&nothing);
        let Difference { wrong, missing, orphans: strays } = compare(nft::contents(socket, &set)?, wanted);
        let swept = orphans.without_owner(strays, &set, leases)?;
        batch.delete_elements(&set, &wrong);
        batch.delete_elements(&set, &swept);
        batch.add_elements(&set, &missing);
        restored.orphans += swept.len();
        if !missing.is_empty() {
            restored.put_back.push(format!("{} of {set}", elements(missing.len())));
        }
    }
    Ok((batch, restored))
}

impl Orphans<'_> {
    /// Which of these are to go.
    fn without_owner(
        &mut self,
        strays: Vec<Element>,
        set: &Set,
        leases: &[&Lease],
    ) -> Result<Vec<Element>, netlink::Error> {
        let Orphans::Sweep(proof) = self else { return Ok(Vec::new()) };
        if strays.is_empty() {
            return Ok(strays);
        }
        let elsewhere = elsewhere(proof()?, leases);
        let living =
            wanted(&elsewhere.iter().collect::<Vec<_>>()).remove(&set.to_string()).unwrap_or_default();
        Ok(strays.into_iter().filter(|element| !living.contains_key(element.key_bytes())).collect())
    }
}

fn elements(count: usize) -> String {
    if count == 1 { "1 element".to_owned() } else { format!("{count} elements") }
}

/// By the name of the set.
fn wanted(leases: &[&Lease]) -> HashMap<String, Wanted> {
    let mut wanted: HashMap<String, Wanted> = HashMap::new();
    for piece in leases.iter().flat_map(|lease| pieces(lease)) {
        let set = wanted.entry(piece.set.to_string()).or_default();
        for element in piece.elements {
            set.entry(element.key_bytes().to_vec()).or_default().push(element);
        }
    }
    wanted
}

/// Replaces the tables by what the leases say, and by what pods have whose leases are in other stores: as far as
/// their links prove it, and the tables that go.
fn rewrite(socket: &mut Socket, leases: &[&Lease]) -> Result<(), netlink::Error> {
    let proven = HostKernel::new(Socket::open(Protocol::Route)?).held()?;
    let others = elsewhere(proven, leases);
    let all: Vec<&Lease> = leases.iter().copied().chain(&others).collect();
    let (scaffold, wanted) = (scaffold(&all), wanted(&all));
    let mut batch = Batch::new();
    for table in scaffold.tables() {
        batch.replace_table(table);
    }
    scaffold.write(&mut batch);
    for set in &scaffold.sets {
        let elements = wanted.get(&set.to_string()).into_iter().flat_map(BTreeMap::values);
        batch.add_elements(set, &elements.filter_map(|c| c.first().cloned()).collect::<Vec<_>>());
    }
    batch.send(socket)
}

/// What the tables say about pods, for leases that must be rebuilt from the kernel.
#[derive(Clone, Debug, Default)]
pub struct Known {
    pub(crate) masqueraded: HashSet<IpAddr>,
    pub(crate) host_ports: HashMap<IpAddr, Vec<HostPort>>,
    pub(crate) guarded: HashMap<String, Guard>,
}

impl Known {
    /// Reads the tables. Only a kernel without nftables has nothing in them: any other error says nothing about
    /// what there is, and a lease rebuilt by it would lose its rules.
    pub fn read() -> Result<Known, netlink::Error> {
        let mut socket = match Socket::open(Protocol::Netfilter) {
            Err(netlink::Error::Socket { errno: Errno::PROTONOSUPPORT, .. }) => return Ok(Known::default()),
            other => other?,
        };
        match nft::tables(&mut socket) {
            // So the kernel answers for a subsystem that it does not have (`nfnetlink_rcv_msg`).
            Err(error) if error.errno() == Some(Errno::INVAL) => return Ok(Known::default()),
            other => other?,
        };
        Ok(Known {
            masqueraded: masq::members(&mut socket)?,
            host_ports: hostports::members(&mut socket)?,
            guarded: spoof::members(&mut socket)?,
        })
    }

    /// Writes into a lease what the tables say about its addresses and its link.
    pub fn tell(&self, lease: &mut Lease) {
        lease.guard = self.guarded.get(&lease.veth.name).copied();
        for leased in &mut lease.addresses {
            leased.masquerade = self.masqueraded.contains(&leased.address);
        }
        lease.host_ports = hostports::of_pod(&lease.addresses, &self.host_ports);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(key: u8, value: u8) -> Element {
        Element::key(&[&[key]]).value(&[&[value]])
    }

    #[test]
    fn what_is_right_stays_and_all_else_is_told_apart() {
        let wanted = |pairs: &[(u8, &[u8])]| -> Wanted {
            pairs
                .iter()
                .map(|(key, values)| (vec![*key], values.iter().map(|v| element(*key, *v)).collect()))
                .collect()
        };
        let there = vec![element(1, 1), element(2, 9), element(4, 1), element(5, 2)];
        let difference = compare(there, &wanted(&[(1, &[1]), (2, &[1]), (3, &[1]), (5, &[1, 2])]));
        assert_eq!(
            difference,
            Difference {
                wrong: vec![element(2, 9)],
                missing: vec![element(2, 1), element(3, 1)],
                orphans: vec![element(4, 1)],
            }
        );
        assert_eq!(compare(vec![], &wanted(&[(5, &[1, 2])])).missing, [element(5, 1)], "the first in rank");
    }

    #[test]
    fn a_connected_pod_goes_before_one_that_is_not_and_then_the_elder() {
        let lease = |index: u32, boot_ms: u64| {
            let mut lease = Lease { since: Since { boot_ms, unix_seconds: 0 }, ..Lease::default() };
            lease.veth.index = index;
            lease
        };
        assert!(rank(&lease(7, 200)) < rank(&lease(0, 100)));
        assert!(rank(&lease(7, 100)) < rank(&lease(8, 200)));
    }
}
