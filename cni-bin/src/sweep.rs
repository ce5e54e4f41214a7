//! The sweep: ends leases whose link is gone. Runtimes lose DELs (they are killed, or a chained plugin's DEL
//! keeps failing), and containerd never sends a GC; so the agent looks now and then.
//!
//! A lease is dead when the host's end of its link is gone at two sightings at least [`PATIENCE`] apart: an
//! ADD that is under way has a lease and no link for some milliseconds. What is decided is decided by
//! [`dead`], which is pure; [`Sweeper::sweep`] looks and acts.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use plat_crds::alias;
use plat_crds::lease::{Lease, Pool, Since};

use crate::acquire::{self, EndError};
use crate::boot::{BootId, boot_ms};
use crate::link::Link;
use crate::netlink;
use crate::pods::Remover;
use crate::store::{self, Kernel, Missing, Store};

/// How long a lease's link must have been gone.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Which lease: another one of the same container has another beginning.
type Key = (String, String, Since);

fn key(lease: &Lease) -> Key {
    (lease.container_id.clone(), lease.ifname.clone(), lease.since)
}

/// When each lease was first seen without its link, in milliseconds of `CLOCK_BOOTTIME`.
pub type Sightings = BTreeMap<Key, u64>;

/// What a sweep saw and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Leases that stand.
    pub leases: Vec<Lease>,
    /// Leases that were ended.
    pub ended: Vec<Lease>,
    /// Pods of another network whose leases were recorded just now.
    pub taken_over: Vec<Lease>,
    /// Of those, the ones with an address of another lease, and that lease: two pods have one address.
    pub contested: Vec<(Lease, Lease)>,
    /// Leases whose link is gone, and which are ended if it still is next time.
    pub suspected: usize,
    /// Why the store was rebuilt, if it was.
    pub rebuilt: Option<&'static str>,
}

/// Which of these leases are dead, and what to remember for the next sighting. `links` are the host's links
/// now. Pure.
pub fn dead(leases: &[Lease], links: &[Link], seen: &Sightings, now_ms: u64) -> (Vec<Lease>, Sightings) {
    let marked = links.iter().filter_map(|link| alias::parse(link.alias.as_deref()?));
    let marked: HashSet<(&str, &str)> = marked.map(|alias| (alias.container_id, alias.ifname)).collect();
    let known: HashSet<(&str, u32)> = links.iter().map(|l| (l.name.as_str(), l.index)).collect();
    let lives = |lease: &Lease| {
        marked.contains(&(lease.container_id.as_str(), lease.ifname.as_str()))
            || known.contains(&(lease.veth.name.as_str(), lease.veth.index))
    };
    let patience = u64::try_from(PATIENCE.as_millis()).unwrap_or(u64::MAX);
    let (mut dead, mut suspected) = (Vec::new(), Sightings::new());
    for lease in leases.iter().filter(|lease| !lives(lease)) {
        let first = seen.get(&key(lease)).copied().unwrap_or(now_ms);
        if now_ms.saturating_sub(first) >= patience {
            dead.push(lease.clone());
        } else {
            suspected.insert(key(lease), first);
        }
    }
    (dead, suspected)
}

/// The leases of others' pods that have an address of a pod of ours from the node's blocks. Pure.
fn contested(taken_over: &[Lease], leases: &[Lease]) -> Vec<(Lease, Lease)> {
    let same =
        |theirs: &Lease, ours: &&Lease| ours.pool == Pool::Blocks && acquire::share_address(theirs, ours);
    let pairs = taken_over.iter().filter_map(|theirs| {
        let ours = leases.iter().find(|ours| same(theirs, ours))?;
        Some((theirs.clone(), ours.clone()))
    });
    pairs.collect()
}

/// Sweeps a lease store again and again; keeps the sightings in between.
pub struct Sweeper {
    store: Store,
    boot: BootId,
    missing: Missing,
    kernel: Box<dyn Kernel + Send>,
    seen: Sightings,
}

impl Sweeper {
    /// A sweeper of that store, which leaves or makes it where it is missing.
    pub fn new(store: Store, boot: BootId, missing: Missing, kernel: Box<dyn Kernel + Send>) -> Sweeper {
        Sweeper { store, boot, missing, kernel, seen: Sightings::new() }
    }

    /// Looks at all leases and links, and ends the leases that are dead. `wait` bounds each wait for the
    /// store's lock.
    pub fn sweep(&mut self, wait: Duration) -> Result<Report, EndError> {
        self.sweep_at(boot_ms(), wait)
    }

    /// The same at a given time, in milliseconds of `CLOCK_BOOTTIME`.
    pub fn sweep_at(&mut self, now_ms: u64, wait: Duration) -> Result<Report, EndError> {
        let (mut leases, rebuilt) = self.read(wait)?;
        let taken_over = self.take_over(&leases, wait)?;
        let contested = contested(&taken_over, &leases);
        leases.extend(taken_over.iter().cloned());
        // Links are listed after the leases: a lease that is seen has had its link made, or will have.
        let links = self.kernel.links()?;
        let (dead, suspected) = dead(&leases, &links, &self.seen, now_ms);
        // One that cannot be ended now has been seen as often as it must, and goes with the next sweep.
        let before = std::mem::replace(&mut self.seen, suspected);
        let (mut ended, mut failed, mut rules) = (Vec::new(), None, Remover::default());
        for lease in dead {
            match self.end(&lease, &mut rules, wait) {
                Ok(Ended::Now) => ended.push(lease),
                Ok(Ended::Before) => {}
                Err(error) => {
                    self.seen.extend(before.get_key_value(&key(&lease)).map(|(key, at)| (key.clone(), *at)));
                    failed = Some(error);
                }
            }
        }
        match failed {
            // What was ended must be told; the failure will be again.
            Some(error) if ended.is_empty() => return Err(error),
            _ => {}
        }
        let standing = leases.into_iter().filter(|l| !ended.iter().any(|e| key(e) == key(l))).collect();
        Ok(Report { leases: standing, ended, taken_over, contested, suspected: self.seen.len(), rebuilt })
    }

    /// Records the pods of another network that came since the store was made.
    fn take_over(&mut self, known: &[Lease], wait: Duration) -> Result<Vec<Lease>, EndError> {
        let foreign = self.kernel.foreign(known)?;
        if foreign.is_empty() {
            return Ok(foreign);
        }
        let locked = self.store.lock(&self.boot, wait, self.missing, self.kernel.as_mut())?;
        let Some(mut locked) = locked else { return Ok(Vec::new()) };
        let mut taken_over = Vec::new();
        for lease in foreign {
            let survey = locked.survey(&lease.container_id, &lease.ifname)?;
            if !survey.has_lease() {
                locked.insert(&survey, &lease)?;
                taken_over.push(lease);
            }
        }
        Ok(taken_over)
    }

    /// The leases that the kernel proves, for a time when the store cannot be read.
    pub fn proven(&mut self) -> Result<Vec<Lease>, netlink::Error> {
        self.kernel.held()
    }

    fn read(&mut self, wait: Duration) -> Result<(Vec<Lease>, Option<&'static str>), store::Error> {
        let locked = self.store.lock(&self.boot, wait, self.missing, self.kernel.as_mut())?;
        let Some(mut locked) = locked else { return Ok((Vec::new(), None)) };
        let leases = locked.all()?;
        Ok((leases, locked.repaired()))
    }

    fn end(&mut self, lease: &Lease, rules: &mut Remover, wait: Duration) -> Result<Ended, EndError> {
        let locked = self.store.lock(&self.boot, wait, Missing::Leave, self.kernel.as_mut())?;
        let Some(mut locked) = locked else { return Ok(Ended::Before) };
        match acquire::still(&mut locked, lease)? {
            Some(held) => {
                acquire::end(&mut locked, &held, rules)?;
                Ok(Ended::Now)
            }
            None => Ok(Ended::Before),
        }
    }
}

/// When a lease came to its end.
enum Ended {
    /// By this sweep.
    Now,
    /// By a DEL meanwhile.
    Before,
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::lease::HostVeth;

    fn lease(id: &str, since: u64) -> Lease {
        Lease {
            container_id: id.into(),
            ifname: "eth0".into(),
            network: None,
            pool: Pool::Blocks,
            addresses: vec![],
            veth: HostVeth { name: format!("plat{id}"), index: 7 },
            netns: None,
            since: Since { boot_ms: since, unix_seconds: 0 },
            ..Lease::default()
        }
    }

    fn link(name: &str, index: u32, alias: Option<&str>) -> Link {
        Link { name: name.into(), index, alias: alias.map(str::to_owned), ..Link::default() }
    }

    fn ids(leases: &[Lease]) -> Vec<&str> {
        leases.iter().map(|l| l.container_id.as_str()).collect()
    }

    #[test]
    fn a_lease_dies_only_when_its_link_is_gone_twice_ninety_seconds_apart() {
        let leases = [lease("a", 1)];
        let (now, seen) = dead(&leases, &[], &Sightings::new(), 1000);
        assert_eq!((now.len(), seen.len()), (0, 1), "first sighting");
        let (now, seen) = dead(&leases, &[], &seen, 1000 + 89_999);
        assert_eq!((now.len(), seen.len()), (0, 1), "too soon");
        let (now, seen) = dead(&leases, &[], &seen, 1000 + 90_000);
        assert_eq!((ids(&now), seen.len()), (vec!["a"], 0));
    }

    #[test]
    fn a_link_that_came_back_between_starts_the_count_anew() {
        let leases = [lease("a", 1)];
        let (_, seen) = dead(&leases, &[], &Sightings::new(), 0);
        let (_, seen) = dead(&leases, &[link("platx", 9, Some("plat a eth0"))], &seen, 50_000);
        assert!(seen.is_empty());
        assert_eq!(dead(&leases, &[], &seen, 100_000).0, []);
    }

    #[test]
    fn alias_alone_or_name_and_number_together_prove_life() {
        let leases = [lease("a", 1)];
        let long_gone = Sightings::from([(key(&leases[0]), 0)]);
        for (links, alive) in [
            (vec![link("renamed", 99, Some("plat a eth0"))], true),
            (vec![link("plata", 7, None)], true),
            (vec![link("plata", 8, None)], false),
            (vec![link("plata", 8, Some("plat b eth0"))], false),
        ] {
            assert_eq!(dead(&leases, &links, &long_gone, 1 << 40).0.is_empty(), alive, "{links:?}");
        }
    }

    #[test]
    fn a_new_lease_of_the_same_container_is_not_the_old_one() {
        let (_, seen) = dead(&[lease("a", 1)], &[], &Sightings::new(), 0);
        assert_eq!(dead(&[lease("a", 2)], &[], &seen, 100_000).0, []);
    }
}
