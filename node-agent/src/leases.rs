//! The leases of this node: how many addresses of each block are in use, and the sweep of dead ones.
//!
//! The store belongs to the CNI binary; the agent reads it under the same lock, rarely.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use plat_cni::boot::BootId;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{self, Protocol, Socket};
use plat_cni::pods::{self, Orphans, Restored, hostports};
use plat_cni::store::{Missing, Store};
use plat_cni::sweep::{self, Sweeper};
use plat_crds::block::Block;
use plat_crds::lease::{Lease, Pool};
use plat_crds::names::LEASES_FILE;

/// How long to wait for the store's lock. Counting can wait for the next tick, pods cannot wait for it.
const LOCK_WAIT: Duration = Duration::from_millis(200);
/// Shortest time between two counts because of changes: many pods may start at once.
const COUNT_EVERY: Duration = Duration::from_secs(2);

/// Leased addresses, as last read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    leased: Vec<(IpAddr, Option<Block>)>,
}

impl Usage {
    /// Of the leases of the node's own blocks. One that was rebuilt from the kernel does not know where it
    /// is from, and counts wherever its address lies.
    pub fn of<'a>(leases: impl IntoIterator<Item = &'a Lease>) -> Usage {
        let mut leased = Vec::new();
        for lease in leases {
            for address in &lease.addresses {
                match lease.pool {
                    Pool::Blocks => {
                        leased.push((address.address, Block::of(address.address, address.subnet_length)))
                    }
                    Pool::Unknown => leased.push((address.address, None)),
                    Pool::Ranges | Pool::Delegated => {}
                }
            }
        }
        Usage { leased }
    }

    /// Number of leased addresses in a block.
    pub fn used(&self, block: &Block) -> i64 {
        let count = self.leased.iter().filter(|(address, _)| block.contains(address)).count();
        i64::try_from(count).unwrap_or(i64::MAX)
    }

    /// Blocks that are known to have leases.
    pub fn blocks(&self) -> BTreeSet<Block> {
        self.leased.iter().filter_map(|(_, block)| *block).collect()
    }
}

/// The pods' tables, once they are as the leases say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodRules {
    /// What was put back, and what was swept.
    pub restored: Restored,
    /// Sysctls that must be 1 for host ports to lead from 127.0.0.1 to pods.
    pub loopback: BTreeSet<String>,
}

/// The agent's end of the lease store.
pub struct Leases {
    store: Store,
    boot: BootId,
    kernel: HostKernel,
    sweeper: Sweeper,
    counted: Option<Counted>,
}

/// The last count: when it was, and of which state of the store.
#[derive(Clone, Copy)]
struct Counted {
    at: Duration,
    written: Option<SystemTime>,
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
    /// The store in that run folder.
    pub fn open(run: &Path, boot: BootId) -> Result<Leases, netlink::Error> {
        let kernel = || Socket::open(Protocol::Route).map(HostKernel::new);
        let store = Store::at(&run.join(LEASES_FILE));
        let sweeper = Sweeper::new(store.clone(), boot.clone(), kernel()?);
        Ok(Leases { store, boot, kernel: kernel()?, sweeper, counted: None })
    }

    /// Whether to [`Leases::sweep`] again at `now`, because pods came or went.
    pub fn count(&self, now: Duration) -> Count {
        match self.counted {
            Some(counted) if counted.written == self.written() => Count::Right,
            Some(counted) if now < counted.at + COUNT_EVERY => Count::DueAt(counted.at + COUNT_EVERY),
            _ => Count::Due,
        }
    }

    fn written(&self) -> Option<SystemTime> {
        std::fs::metadata(self.store.path()).and_then(|file| file.modified()).ok()
    }

    /// Brings the pods' nftables tables to what the leases say, with the store locked, so that no pod comes or
    /// goes in between.
    pub fn restore_rules(&mut self) -> Result<PodRules, sweep::Error> {
        let locked = self.store.lock(&self.boot, LOCK_WAIT, Missing::Create, &mut self.kernel)?;
        let Some(mut locked) = locked else { return Ok(PodRules::default()) };
        let leases: Vec<Lease> = locked.leases()?.into_iter().map(|held| held.lease).collect();
        let restored = pods::restore(&leases, Orphans::Sweep(&mut || locked.proven()))?;
        drop(locked);
        if !restored.put_back.is_empty() {
            hostports::forget_strays(&leases);
        }
        let loopback = hostports::loopback_switches(self.kernel.route(), &leases)?;
        Ok(PodRules { restored, loopback })
    }

    /// Ends dead leases and counts the others. A store that is missing is made from what the kernel holds:
    /// somebody removed it, or no pod ever was.
    pub fn sweep(&mut self, now: Duration) -> Result<Usage, sweep::Error> {
        if !self.store.path().exists() {
            self.store.lock(&self.boot, LOCK_WAIT, Missing::Create, &mut self.kernel)?;
        }
        // Taken before the count, so that a write during it is not missed; and also if the count fails, so
        // that the next try waits.
        self.counted = Some(Counted { at: now, written: self.written() });
        let report = self.sweeper.sweep(LOCK_WAIT)?;
        if let Some(why) = report.rebuilt {
            tracing::warn!(why, leases = report.leases.len(), "the lease store was rebuilt from the kernel");
        }
        for lease in &report.ended {
            let addresses: Vec<String> = lease.addresses.iter().map(|a| a.address.to_string()).collect();
            let (container, interface) = (&lease.container_id, &lease.ifname);
            tracing::info!(
                container,
                interface,
                addresses = addresses.join(","),
                "ended a lease whose link is gone"
            );
        }
        Ok(Usage::of(&report.leases))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let leases = [
            lease(Pool::Blocks, "10.244.1.7", 24),
            lease(Pool::Blocks, "10.244.9.8", 24),
            lease(Pool::Unknown, "10.244.1.9", 32),
            lease(Pool::Ranges, "10.244.1.10", 24),
        ];
        let usage = Usage::of(&leases);
        assert_eq!(usage.used(&"10.244.1.0/24".parse().unwrap()), 2);
        let blocks = ["10.244.1.0/24", "10.244.9.0/24"].map(|b| b.parse().unwrap());
        assert_eq!(usage.blocks(), blocks.into());
    }

    #[test]
    fn leases_are_counted_again_when_the_store_was_written_but_not_all_the_time() {
        let run = tempfile::tempdir().unwrap();
        let mut leases = Leases::open(run.path(), BootId::read().unwrap()).unwrap();
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
