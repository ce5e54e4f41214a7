//! The leases of this node: how many addresses of each block are in use, and the sweep of dead ones.
//!
//! The store belongs to the CNI binary; the agent reads it under the same lock, rarely.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use plat_cni::acquire::EndError;
use plat_cni::boot::BootId;
use plat_cni::foreign;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{self, Protocol, Socket};
use plat_cni::pods::{self, Orphans, Restored, hostports};
use plat_cni::store::{Missing, Store};
use plat_cni::sweep::Sweeper;
use plat_crds::block::{Block, Family};
use plat_crds::lease::{Datapath, Lease, Pool};
use plat_crds::names::LEASES_FILE;

use crate::desired::Map;
use crate::overlap;

/// How long to wait for the store's lock. Counting can wait for the next tick, pods cannot wait for it.
const LOCK_WAIT: Duration = Duration::from_millis(200);
/// Shortest time between two counts because of changes: many pods may start at once.
const COUNT_EVERY: Duration = Duration::from_secs(2);

/// Leased addresses, as last read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    leased: Vec<(IpAddr, Origin)>,
    certainty: Certainty,
    /// How pods are joined to the host.
    datapaths: BTreeSet<Datapath>,
    /// All leases that were read.
    pub pods: Vec<Lease>,
    /// The first addresses of the pods that another network attached.
    foreign: Vec<IpAddr>,
}

/// Which block an address is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// That one.
    Block(Block),
    /// Not known: the lease was rebuilt from a link without room for it.
    Unknown,
}

/// Whether more leases may stand than were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Certainty {
    /// The store was not read yet, or could not be read since.
    #[default]
    Outdated,
    /// The store was read.
    Counted,
}

impl Usage {
    /// Of the leases of the node's own blocks, as the store has them.
    pub fn of(pods: Vec<Lease>) -> Usage {
        let (mut leased, mut datapaths, mut foreign) = (Vec::new(), BTreeSet::new(), Vec::new());
        for lease in &pods {
            if foreign::is_foreign(lease) {
                foreign.extend(lease.addresses.first().map(|leased| leased.address));
            }
            datapaths.insert(lease.datapath);
            for address in &lease.addresses {
                let origin = match lease.pool {
                    Pool::Blocks => Block::of(address.address, address.subnet_length).map(Origin::Block),
                    Pool::Unknown => Some(Origin::Unknown),
                    Pool::Ranges | Pool::Delegated => None,
                };
                leased.extend(origin.map(|origin| (address.address, origin)));
            }
        }
        Usage { leased, certainty: Certainty::Counted, datapaths, pods, foreign }
    }

    /// Number of pods with an address in one of these ranges that another network attached.
    pub fn foreign_pods(&self, ranges: impl Iterator<Item = Block> + Clone) -> usize {
        self.foreign.iter().filter(|address| ranges.clone().any(|range| range.contains(address))).count()
    }

    /// How living pods are joined to the host; `None` if there may be more than were read.
    pub fn datapaths(&self) -> Option<&BTreeSet<Datapath>> {
        (self.certainty == Certainty::Counted).then_some(&self.datapaths)
    }

    /// Whether there may be more than were read.
    pub fn is_outdated(&self) -> bool {
        self.certainty == Certainty::Outdated
    }

    /// The same, no longer trusted to be all.
    pub fn outdated(self) -> Usage {
        Usage { certainty: Certainty::Outdated, ..self }
    }

    /// Number of leased addresses in a block. `None` if there is none that is known of, and there may be
    /// all the same: blocks are let go by this number.
    pub fn used(&self, block: &Block) -> Option<i64> {
        let count = self.leased.iter().filter(|(address, _)| block.contains(address)).count();
        match self.certainty {
            Certainty::Outdated if count == 0 => None,
            _ => Some(i64::try_from(count).unwrap_or(i64::MAX)),
        }
    }

    /// Blocks that have leases. An address of unknown origin is from the block of the PodCIDR that holds it, or of
    /// another lease; where there is none, it is taken to be from a block of its range's size.
    pub fn blocks(&self, map: Map<'_>) -> LeasedBlocks {
        let known = |(_, origin): &(IpAddr, Origin)| match origin {
            Origin::Block(block) => Some(*block),
            Origin::Unknown => None,
        };
        let mut leased =
            LeasedBlocks { all: self.leased.iter().filter_map(known).collect(), guessed: BTreeSet::new() };
        let unknown: Vec<&IpAddr> = self
            .leased
            .iter()
            .filter(|(address, origin)| {
                *origin == Origin::Unknown && !leased.all.iter().any(|block| block.contains(address))
            })
            .map(|(address, _)| address)
            .collect();
        if unknown.is_empty() {
            return leased;
        }
        let (accepted, _) = overlap::older_first(map.blocks, map.absent);
        for address in unknown {
            if let Some(fact) = accepted.iter().find(|fact| fact.block.contains(address)) {
                leased.all.insert(fact.block);
            } else if let Some(block) = guess(map, address) {
                leased.guessed.insert(block);
            }
        }
        leased.all.extend(&leased.guessed);
        leased
    }
}

/// The block that an address would be from.
fn guess(map: Map<'_>, address: &IpAddr) -> Option<Block> {
    let ranges = map.ranges.values().filter(|range| range.range.contains(address));
    let range = ranges.max_by_key(|range| range.ready)?;
    // Those that an older agent has kept do not say.
    let usual = Family::of(address).default_block_prefix();
    Block::of(*address, Some(range.block_prefix).filter(|prefix| *prefix > 0).unwrap_or(usual))
}

/// Blocks that have leases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeasedBlocks {
    /// All of them.
    pub all: BTreeSet<Block>,
    /// Those for which nothing speaks but an address of unknown origin.
    pub guessed: BTreeSet<Block>,
}

/// The pods' tables, once they are as the leases say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodRules {
    /// What was put back, and what was swept.
    pub restored: Restored,
    /// Sysctls that must be 1 for host ports to lead from 127.0.0.1 to pods.
    pub loopback: BTreeSet<String>,
}

/// What a sweep found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Leased addresses.
    pub usage: Usage,
    /// Leases that were ended, in words.
    pub ended: Vec<String>,
    /// Leases of another network's pods that were recorded, in words.
    pub taken_over: Vec<String>,
    /// Addresses that two pods have, in words.
    pub contested: Vec<String>,
    /// Why the store was rebuilt, each time that it was and there was something to rebuild, in words.
    pub rebuilt: Vec<String>,
}

/// The agent's end of the lease store.
pub struct Leases {
    store: Store,
    boot: BootId,
    kernel: HostKernel,
    sweeper: Sweeper,
    counted: Option<Counted>,
    /// Why the store was rebuilt since the last count.
    rebuilt: Option<&'static str>,
}

/// The last count: when it was, and of which state of the store.
#[derive(Clone, Copy)]
struct Counted {
    at: Duration,
    /// When the store had been written; `None` if it was not there, or could not be read.
    of: Option<SystemTime>,
    /// Number of leases.
    leases: u32,
    /// So many more of them are worth a count out of turn.
    room: Option<u32>,
}

/// Whether the leases should be counted again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// Nothing was written since the last count.
    Right,
    /// Something was, and it is time.
    Due,
    /// Something was, but the last count was a moment ago: at this time.
    DueAt(Duration),
}

impl Leases {
    /// The store in that run folder, on a node whose pods hang on that bridge.
    pub fn open(run: &Path, boot: BootId, bridge: &str) -> Result<Leases, netlink::Error> {
        let of_node = |socket| HostKernel::new(socket).with_bridges(vec![bridge.to_owned()]);
        let kernel = || Socket::open(Protocol::Route).map(of_node);
        let store = Store::at(&run.join(LEASES_FILE));
        // One that is missing is made from what the kernel holds: somebody removed it, or no pod ever was.
        let sweeper = Sweeper::new(store.clone(), boot.clone(), Missing::Create, Box::new(kernel()?));
        Ok(Leases { store, boot, kernel: kernel()?, sweeper, counted: None, rebuilt: None })
    }

    /// Whether to [`Leases::sweep`] again at `now`, because pods came or went.
    pub fn count(&self, now: Duration) -> Count {
        match self.counted {
            Some(counted) if counted.of.is_some() && counted.of == self.written() => Count::Right,
            Some(counted) if now < counted.at + COUNT_EVERY && !self.is_past_room(counted) => {
                Count::DueAt(counted.at + COUNT_EVERY)
            }
            _ => Count::Due,
        }
    }

    /// Asks for a count out of turn once there are so many leases more.
    pub fn watch_for(&mut self, room: Option<u32>) {
        if let Some(counted) = &mut self.counted {
            counted.room = room;
        }
    }

    /// By the header of the store alone.
    fn is_past_room(&self, counted: Counted) -> bool {
        let Some(room) = counted.room else { return false };
        self.store.count(&self.boot).is_some_and(|now| now >= counted.leases.saturating_add(room))
    }

    fn written(&self) -> Option<SystemTime> {
        std::fs::metadata(self.store.path()).and_then(|file| file.modified()).ok()
    }

    /// Brings the pods' nftables tables to what the leases say, with the store locked, so that no pod comes or
    /// goes in between.
    pub fn restore_rules(&mut self) -> Result<PodRules, EndError> {
        let locked = self.store.lock(&self.boot, LOCK_WAIT, Missing::Create, &mut self.kernel)?;
        let Some(mut locked) = locked else { return Ok(PodRules::default()) };
        let leases: Vec<Lease> = locked.all()?;
        let restored = pods::restore(&leases, Orphans::Sweep(&mut || locked.kernel().held()))?;
        self.rebuilt = locked.repaired().or(self.rebuilt);
        drop(locked);
        if !restored.put_back.is_empty() {
            hostports::forget_strays(&leases);
        }
        let loopback = hostports::loopback_switches(self.kernel.route(), &leases)?;
        Ok(PodRules { restored, loopback })
    }

    /// Ends dead leases and counts the others.
    pub fn sweep(&mut self, now: Duration) -> Result<Swept, EndError> {
        // Until it is done, it is to be done again.
        self.counted = Some(Counted { at: now, of: None, leases: 0, room: None });
        // Taken before the count, so that a write during it is not missed.
        let mut written = self.written();
        let report = self.sweeper.sweep(LOCK_WAIT)?;
        if report.rebuilt.is_some() {
            written = self.written();
        }
        let count = report.leases.len();
        let leases = u32::try_from(count).unwrap_or(u32::MAX);
        self.counted = Some(Counted { at: now, of: written, leases, room: None });
        let rebuilt = report.rebuilt.or(self.rebuilt.take()).filter(|_| count > 0);
        Ok(Swept {
            usage: Usage::of(report.leases),
            ended: report.ended.iter().map(words).collect(),
            taken_over: report.taken_over.iter().map(words).collect(),
            contested: report
                .contested
                .iter()
                .map(|(theirs, ours)| format!("{} of another network and {}", words(theirs), words(ours)))
                .collect(),
            rebuilt: rebuilt.map(|why| format!("{why}; it has {count} leases")).into_iter().collect(),
        })
    }

    /// The leases that the kernel proves, for a time when the store cannot be read: nearly all. An ADD that
    /// is under way has no link yet.
    pub fn proven(&mut self) -> Result<Usage, netlink::Error> {
        Ok(Usage::of(self.sweeper.proven()?).outdated())
    }
}

/// A lease in few words.
pub fn words(lease: &Lease) -> String {
    let addresses: Vec<String> = lease.addresses.iter().map(|a| a.address.to_string()).collect();
    format!("{} of container {} ({})", addresses.join(" and "), lease.container_id, lease.ifname)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{BlockFact, RangeFact};
    use crate::fixtures::{self, range};
    use plat_crds::lease::{HostVeth, LeasedAddress, Since};

    fn lease(pool: Pool, address: &str, subnet_length: u8) -> Lease {
        Lease {
            container_id: address.into(),
            ifname: "eth0".into(),
            network: None,
            pool,
            addresses: vec![LeasedAddress {
                address: address.parse().unwrap(),
                subnet_length,
                masquerade: false,
            }],
            veth: HostVeth::default(),
            netns: None,
            since: Since::default(),
            ..Lease::default()
        }
    }

    #[test]
    fn only_addresses_of_the_nodes_blocks_count_and_unknown_ones_where_they_lie() {
        let leases = vec![
            lease(Pool::Blocks, "10.244.1.7", 24),
            lease(Pool::Blocks, "10.244.9.8", 24),
            lease(Pool::Unknown, "10.244.1.9", 32),
            lease(Pool::Ranges, "10.244.1.10", 24),
        ];
        let usage = Usage::of(leases);
        assert_eq!(usage.used(&block("10.244.1.0/24")), Some(2));
        assert_eq!(usage.used(&block("10.244.2.0/24")), Some(0));
        let blocks = with_map(&[], &[], |map| usage.blocks(map));
        assert_eq!(blocks.all, ["10.244.1.0/24", "10.244.9.0/24"].map(block).into());
        assert_eq!(blocks.guessed, [].into());
    }

    #[test]
    fn a_block_is_held_also_by_leases_that_do_not_know_it() {
        let usage =
            Usage::of(vec![lease(Pool::Unknown, "10.244.7.9", 32), lease(Pool::Unknown, "10.22.0.9", 32)]);
        let blocks = with_map(&[], &[range("r")], |map| usage.blocks(map));
        assert_eq!(blocks.all, ["10.244.7.0/24"].map(block).into());
        assert_eq!(blocks.guessed, blocks.all);
    }

    #[test]
    fn an_address_of_unknown_origin_is_from_the_block_that_holds_it_whatever_its_size() {
        let of = |cidr: &str, node: &str| {
            let block = block(cidr);
            BlockFact { name: block.object_name(), block, node: node.into(), ..fixtures::block(7) }
        };
        let facts = [of("10.244.7.0/26", "n1"), of("10.244.7.64/26", "n2")];
        let ranges = [RangeFact { block_prefix: 26, ..range("r") }];
        for (addresses, all, guessed) in [
            (&["10.244.7.70"][..], &["10.244.7.64/26"][..], &[][..]),
            (&["10.244.7.5"], &["10.244.7.0/26"], &[]),
            (&["10.244.7.200"], &["10.244.7.192/26"], &["10.244.7.192/26"]),
            (&["10.244.7.70", "10.244.9.1"], &["10.244.7.64/26", "10.244.9.0/26"], &["10.244.9.0/26"]),
        ] {
            let leases: Vec<_> = addresses.iter().map(|address| lease(Pool::Unknown, address, 32)).collect();
            let blocks = with_map(&facts, &ranges, |map| Usage::of(leases).blocks(map));
            assert_eq!(blocks.all, all.iter().map(|text| block(text)).collect(), "{addresses:?}");
            assert_eq!(blocks.guessed, guessed.iter().map(|text| block(text)).collect(), "{addresses:?}");
        }
        let leases = vec![lease(Pool::Blocks, "10.244.8.70", 26), lease(Pool::Unknown, "10.244.8.71", 32)];
        let blocks = with_map(&[], &[range("r")], |map| Usage::of(leases).blocks(map));
        assert_eq!((blocks.all, blocks.guessed), ([block("10.244.8.64/26")].into(), [].into()));
    }

    fn with_map<T>(facts: &[BlockFact], ranges: &[RangeFact], then: impl FnOnce(Map<'_>) -> T) -> T {
        let blocks = facts.iter().map(|fact| (fact.name.clone(), fact.clone())).collect();
        let ranges = ranges.iter().map(|range| (range.name.clone(), range.clone())).collect();
        then(Map { blocks: &blocks, ranges: &ranges, policies: &[], absent: &BTreeSet::new() })
    }

    #[test]
    fn a_count_that_cannot_be_renewed_never_says_that_a_block_is_free() {
        assert_eq!(Usage::default().used(&block("10.244.1.0/24")), None, "nothing was counted yet");
        let usage = Usage::of(vec![lease(Pool::Blocks, "10.244.1.7", 24)]).outdated();
        assert_eq!(usage.used(&block("10.244.1.0/24")), Some(1));
        assert_eq!(usage.used(&block("10.244.2.0/24")), None);
    }

    fn block(text: &str) -> Block {
        text.parse().unwrap()
    }

    #[test]
    fn leases_are_counted_again_when_the_store_was_written_but_not_all_the_time() {
        let run = tempfile::tempdir().unwrap();
        let mut leases = Leases::open(run.path(), BootId::read().unwrap(), "cni0").unwrap();
        let at = Duration::from_secs;
        assert_eq!(leases.count(at(100)), Count::Due, "never counted");
        leases.sweep(at(100)).unwrap();
        assert_eq!(leases.count(at(101)), Count::Right);
        let later = SystemTime::now() + at(1);
        std::fs::File::open(leases.store.path()).unwrap().set_modified(later).unwrap();
        assert_eq!(leases.count(at(101)), Count::DueAt(at(102)));
        assert_eq!(leases.count(at(102)), Count::Due);
        std::fs::remove_file(leases.store.path()).unwrap();
        assert_eq!(leases.count(at(102)), Count::Due, "somebody removed it");
        leases.sweep(at(102)).unwrap();
        assert!(leases.store.path().exists());
    }
}
