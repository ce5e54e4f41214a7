//! The leases of this node: how many addresses of each block are in use, and the sweep of dead ones.
//!
//! The store belongs to the CNI binary; the agent reads it under the same lock, rarely.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use plat_cni::boot::BootId;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{self, Protocol, Socket};
use plat_cni::store::{Missing, Store};
use plat_cni::sweep::{self, Sweeper};
use plat_crds::block::Block;
use plat_crds::lease::{Lease, Pool};
use plat_crds::names::LEASES_FILE;

/// How long to wait for the store's lock. Counting can wait for the next tick, pods cannot wait for it.
const LOCK_WAIT: Duration = Duration::from_millis(200);

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

/// The agent's end of the lease store.
pub struct Leases {
    store: Store,
    boot: BootId,
    kernel: HostKernel,
    sweeper: Sweeper,
}

impl Leases {
    /// The store in that run folder.
    pub fn open(run: &Path, boot: BootId) -> Result<Leases, netlink::Error> {
        let kernel = || Socket::open(Protocol::Route).map(HostKernel::new);
        let store = Store::at(&run.join(LEASES_FILE));
        let sweeper = Sweeper::new(store.clone(), boot.clone(), kernel()?);
        Ok(Leases { store, boot, kernel: kernel()?, sweeper })
    }

    /// Ends dead leases and counts the others. A store that is missing is made from what the kernel holds:
    /// somebody removed it, or no pod ever was.
    pub fn sweep(&mut self) -> Result<Usage, sweep::Error> {
        if !self.store.path().exists() {
            self.store.lock(&self.boot, LOCK_WAIT, Missing::Create, &mut self.kernel)?;
        }
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
            other: vec![],
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
}
