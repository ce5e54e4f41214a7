//! From which addresses an ADD may lease, and which it gets.
//!
//! Pure but for [`read_blocks`]: the node's blocks or the configuration's ranges become sets of ranges,
//! and one reading of the lease store decides.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use plat_crds::blocks_file::BlocksFile;
use plat_crds::lease::{Pool, PoolId};
use plat_crds::names::BLOCKS_FILE;
use plat_crds::{Block, Family};

use crate::boot::BootId;
use crate::config::ranges::{Range, RangeSet};
use crate::error::{Code, Error};
use crate::pick::pick;

/// Addresses that may be leased.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Which pool they belong to.
    pub pool: Pool,
    /// A pod gets one of each set.
    pub sets: Vec<RangeSet>,
}

/// Reads the blocks that the agent lets us lease from.
pub fn read_blocks(run_dir: &Path) -> Result<BlocksFile, Error> {
    let path = run_dir.join(BLOCKS_FILE);
    let not_yet =
        |why: String| Error::because(Code::TryAgain, "this node has no block of addresses yet", why);
    let text = fs::read(&path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => not_yet(format!(
            "{} does not exist; plat-agent writes it once the node has a block: is it running on this node? \
             (without agent, give ipam.subnet)",
            path.display()
        )),
        kind => not_yet(format!("{}: {kind}", path.display())),
    })?;
    BlocksFile::parse(&text).map_err(|error| not_yet(format!("{}: {error}", path.display())))
}

/// What may be leased from the blocks, now. Past `leaseUntil` nothing may: the API server may have given
/// the blocks to another node by then.
pub fn from_blocks(file: &BlocksFile, boot: &BootId, now_ms: u64) -> Result<Source, Error> {
    let refuse = |msg: &str, why: String| Err(Error::because(Code::TryAgain, msg.to_owned(), why));
    if file.boot_id != boot.text {
        let why =
            format!("the blocks of node {} are from before the last boot; plat-agent renews them", file.node);
        return refuse("this node has no block of addresses yet", why);
    }
    if now_ms >= file.lease_until {
        let late = (now_ms - file.lease_until) / 1000;
        let why = format!(
            "node {} has not reached the API server since {}, and its blocks may be another node's since {late} s; \
             running pods go on, new ones wait until plat-agent reaches the API server again",
            file.node, file.last_contact
        );
        return refuse("no new addresses while the API server is away", why);
    }
    let leasing = |family| {
        let of_family = file.blocks.iter().filter(move |b| b.lease && b.cidr.family() == family);
        RangeSet(of_family.filter_map(|b| Range::of_block(b.cidr)).collect())
    };
    let sets: Vec<RangeSet> = Family::ALL.into_iter().map(leasing).filter(|set| !set.0.is_empty()).collect();
    if sets.is_empty() {
        let why = match file.blocks.is_empty() {
            true => format!("node {} holds none; see kubectl get podcidrs and clustercidrs", file.node),
            false => format!("all blocks of node {} are being drained", file.node),
        };
        return refuse("this node has no block to lease from", why);
    }
    // A node that holds blocks of two families gives each pod one of each, also while one family drains.
    let held = |family| file.blocks.iter().any(|b| b.cidr.family() == family);
    let missing = Family::ALL.into_iter().find(|f| held(*f) && !sets.iter().any(|s| s.family() == Some(*f)));
    if let Some(family) = missing {
        let why = format!("all {family} blocks of node {} are being drained", file.node);
        return refuse("this node has no block to lease from", why);
    }
    Ok(Source { pool: Pool::Blocks, sets })
}

/// All blocks of the file: their gateways belong onto the bridge, also while they drain.
pub fn all_blocks(file: &BlocksFile) -> Vec<Block> {
    file.blocks.iter().map(|b| b.cidr).collect()
}

/// An address and the range it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// The address.
    pub address: IpAddr,
    /// Its range.
    pub range: Range,
    /// Whether it was asked for; such a one does not move the cursor.
    pub requested: bool,
}

/// What the lease store knows, as far as choosing needs it.
pub trait Taken {
    /// Whether an address is held.
    fn is_taken(&self, address: &IpAddr) -> bool;
    /// The address of a set that was handed out last.
    fn last(&self, set: u32) -> Option<IpAddr>;
}

/// Chooses one address of each set: the requested one, or the next free one.
pub fn choose(source: &Source, requested: &[IpAddr], taken: &impl Taken) -> Result<Vec<Chosen>, Error> {
    let of_set = |set: &RangeSet| {
        let mut fitting = requested.iter().filter(|a| set.range_of(a).is_some());
        (fitting.next(), fitting.next())
    };
    if let Some(stray) = requested.iter().find(|a| !source.sets.iter().any(|s| s.range_of(a).is_some())) {
        let ranges = source.sets.iter().map(RangeSet::describe).collect::<Vec<_>>().join(", ");
        let why = format!("it is not an address for pods in {ranges}");
        return Err(Error::because(
            Code::AddressUnavailable,
            format!("cannot lease requested address {stray}"),
            why,
        ));
    }
    let mut chosen = Vec::new();
    for (number, set) in (0u32..).zip(&source.sets) {
        let (wanted, second) = of_set(set);
        if let (Some(first), Some(second)) = (wanted, second) {
            let why = format!("both are in {}, and a pod gets one address of each set", set.describe());
            let msg = format!("cannot lease requested addresses {first} and {second}");
            return Err(Error::because(Code::AddressUnavailable, msg, why));
        }
        chosen.push(match wanted {
            Some(address) => request(set, *address, taken)?,
            None => next(set, number, taken)?,
        });
    }
    Ok(chosen)
}

fn request(set: &RangeSet, address: IpAddr, taken: &impl Taken) -> Result<Chosen, Error> {
    let unavailable = |why: &str| {
        Error::because(Code::AddressUnavailable, format!("cannot lease requested address {address}"), why)
    };
    if taken.is_taken(&address) {
        return Err(unavailable("another pod holds it; `plat leases` shows which"));
    }
    let range = set.range_of(&address).ok_or_else(|| unavailable("it is in no range"))?;
    Ok(Chosen { address, range: range.clone(), requested: true })
}

fn next(set: &RangeSet, number: u32, taken: &impl Taken) -> Result<Chosen, Error> {
    match pick(set, taken.last(number), |a| taken.is_taken(a)) {
        Some((address, range)) => Ok(Chosen { address, range: range.clone(), requested: false }),
        None => {
            let capacity = set.0.iter().fold(0u64, |sum, r| sum.saturating_add(r.capacity()));
            let msg = format!("no free address in {}", set.describe());
            let why = format!("all {capacity} are leased; `plat leases` shows by whom");
            Err(Error::because(Code::Exhausted, msg, why))
        }
    }
}

/// The first family of which no address is free. Pure.
pub fn full(source: &Source, taken: &impl Taken) -> Option<Family> {
    let is_full = |set: &&RangeSet| pick(set, None, |a| taken.is_taken(a)).is_none();
    source.sets.iter().find(is_full).and_then(RangeSet::family)
}

/// What the store's lock holder reads, as [`choose`] needs it.
pub struct StoreView<'a> {
    /// One reading of the store.
    pub survey: &'a crate::store::Survey,
    /// The pool in question.
    pub pool: PoolId,
    /// The cursor of each set.
    pub cursors: Vec<Option<IpAddr>>,
    /// Addresses that turned out to be those of another network's pods.
    pub foreign: HashSet<IpAddr>,
}

impl Taken for StoreView<'_> {
    fn is_taken(&self, address: &IpAddr) -> bool {
        self.foreign.contains(address) || self.survey.is_taken(self.pool, address)
    }

    fn last(&self, set: u32) -> Option<IpAddr> {
        self.cursors.get(usize::try_from(set).ok()?).copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::blocks_file::HeldBlock;
    use std::collections::BTreeSet;

    fn boot() -> BootId {
        BootId { text: "b".into(), bytes: [0; 16] }
    }

    fn file(blocks: &[(&str, bool)]) -> BlocksFile {
        BlocksFile {
            version: 1,
            node: "n1".into(),
            boot_id: "b".into(),
            lease_until: 5000,
            last_contact: "2026-11-24T05:00:00Z".into(),
            may_grow: Vec::new(),
            mtu: None,
            blocks: blocks
                .iter()
                .map(|(c, lease)| HeldBlock { cidr: c.parse().unwrap(), lease: *lease })
                .collect(),
        }
    }

    #[derive(Default)]
    struct Fake(BTreeSet<IpAddr>, Option<IpAddr>);

    impl Taken for Fake {
        fn is_taken(&self, address: &IpAddr) -> bool {
            self.0.contains(address)
        }
        fn last(&self, _: u32) -> Option<IpAddr> {
            self.1
        }
    }

    fn addresses(source: &Source, requested: &[&str], fake: &Fake) -> Result<Vec<String>, Error> {
        let requested: Vec<IpAddr> = requested.iter().map(|a| a.parse().unwrap()).collect();
        Ok(choose(source, &requested, fake)?.iter().map(|c| c.address.to_string()).collect())
    }

    #[test]
    fn a_pod_gets_one_address_of_each_family_that_the_node_holds() {
        let file = file(&[("10.244.1.0/24", true), ("fd00:1::/64", true), ("10.244.9.0/24", true)]);
        let source = from_blocks(&file, &boot(), 0).unwrap();
        assert_eq!(addresses(&source, &[], &Fake::default()).unwrap(), ["10.244.1.2", "fd00:1::2"]);
        assert_eq!(all_blocks(&file).len(), 3);
    }

    #[test]
    fn nothing_is_leased_past_the_fence_or_from_another_boot() {
        let file = file(&[("10.244.1.0/24", true)]);
        let late = from_blocks(&file, &boot(), 9000).unwrap_err();
        assert_eq!(late.code, 11);
        assert!(
            late.details.contains("since 2026-11-24T05:00:00Z") && late.details.contains("4 s"),
            "{late}"
        );
        let rebooted = BootId { text: "c".into(), bytes: [0; 16] };
        assert_eq!(from_blocks(&file, &rebooted, 0).unwrap_err().code, 11);
    }

    #[test]
    fn draining_blocks_lease_nothing_and_do_not_turn_dual_stack_pods_into_single_stack_ones() {
        let draining = file(&[("10.244.1.0/24", false), ("10.244.2.0/24", true)]);
        let source = from_blocks(&draining, &boot(), 0).unwrap();
        assert_eq!(addresses(&source, &[], &Fake::default()).unwrap(), ["10.244.2.2"]);
        for blocks in
            [vec![("10.244.1.0/24", false)], vec![("10.244.1.0/24", true), ("fd00:1::/64", false)], vec![]]
        {
            assert_eq!(from_blocks(&file(&blocks), &boot(), 0).unwrap_err().code, 11, "{blocks:?}");
        }
    }

    #[test]
    fn a_full_block_is_named() {
        let source = from_blocks(&file(&[("10.244.1.0/30", true)]), &boot(), 0).unwrap();
        let fake = Fake(["10.244.1.2".parse().unwrap()].into(), None);
        let error = addresses(&source, &[], &fake).unwrap_err();
        assert_eq!((error.code, error.msg.as_str()), (101, "no free address in 10.244.1.0/30"));
    }

    #[test]
    fn the_family_that_is_full_is_told_apart() {
        let blocks = file(&[("10.244.1.0/30", true), ("fd00:1::/126", true)]);
        let source = from_blocks(&blocks, &boot(), 0).unwrap();
        let taken = |held: &[&str]| Fake(held.iter().map(|a| a.parse().unwrap()).collect(), None);
        assert_eq!(full(&source, &taken(&[])), None);
        assert_eq!(full(&source, &taken(&["10.244.1.2"])), Some(Family::IPv4));
        assert_eq!(full(&source, &taken(&["fd00:1::2", "fd00:1::3"])), Some(Family::IPv6));
    }

    #[test]
    fn a_requested_address_is_given_or_the_reason_why_not() {
        let source =
            from_blocks(&file(&[("10.244.1.0/24", true), ("fd00:1::/64", true)]), &boot(), 0).unwrap();
        let fake = Fake(["10.244.1.9".parse().unwrap()].into(), None);
        assert_eq!(addresses(&source, &["10.244.1.7"], &fake).unwrap(), ["10.244.1.7", "fd00:1::2"]);
        for (bad, words) in [
            (vec!["10.244.1.9"], "another pod holds it"),
            (vec!["10.244.1.1"], "not an address for pods"),
            (vec!["10.244.1.255"], "not an address for pods"),
            (vec!["10.9.0.1"], "not an address for pods"),
            (vec!["10.244.1.7", "10.244.1.8"], "one address of each set"),
        ] {
            let error = addresses(&source, &bad, &fake).unwrap_err();
            assert!(error.code == 102 && error.details.contains(words), "{bad:?}: {error}");
        }
    }
}
