//! The life of leases against a model, thousands of times: ADDs and DELs whose steps interleave in any
//! order, kills between any two steps, a store that is lost or damaged at any moment, reboots, sweeps and
//! GCs. All that decides is the program's own code; only the kernel is made up. No namespaces, no root.
//!
//! `PLAT_SEED` replays a run, `PLAT_RUNS` says how many to make (default: 2,000).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use plat_cni::acquire::{confirm, lease_from};
use plat_cni::boot::BootId;
use plat_cni::config::ranges::{Range, RangeSet};
use plat_cni::link::Link;
use plat_cni::netlink;
use plat_cni::pool::Source;
use plat_cni::store::{Held, Kernel, Locked, Missing, Store};
use plat_cni::sweep::Sweeper;
use plat_crds::alias;
use plat_crds::lease::{HostVeth, Lease, Pool, Since, record_offset};

const WAIT: Duration = Duration::from_secs(5);
const PODS: u8 = 6;
/// Addresses of the block: .2 to .6.
const ADDRESSES: usize = 5;

/// The links that the made-up kernel has: alias by name.
#[derive(Clone, Default)]
struct Links(Arc<Mutex<BTreeMap<String, String>>>);

impl Links {
    fn all(&self) -> BTreeMap<String, String> {
        self.0.lock().unwrap().clone()
    }

    fn add(&self, name: &str, alias: String) {
        self.0.lock().unwrap().insert(name.to_owned(), alias);
    }

    fn delete(&self, name: &str) {
        self.0.lock().unwrap().remove(name);
    }
}

impl Kernel for Links {
    fn held(&mut self) -> Result<Vec<Lease>, netlink::Error> {
        let prove = |(name, text): (String, String)| {
            let alias = alias::parse(&text)?;
            let leased = alias.leased?;
            Some(Lease {
                container_id: alias.container_id.to_owned(),
                ifname: alias.ifname.to_owned(),
                network: Some(leased.network.to_owned()),
                pool: leased.pool,
                addresses: leased.addresses,
                veth: HostVeth { name, index: 1 },
                since: Since { boot_ms: u64::MAX, unix_seconds: 0 },
                ..Lease::default()
            })
        };
        Ok(self.all().into_iter().filter_map(prove).collect())
    }

    fn links(&mut self) -> Result<Vec<Link>, netlink::Error> {
        let link = |(name, alias)| Link { name, index: 1, alias: Some(alias), ..Link::default() };
        Ok(self.all().into_iter().map(link).collect())
    }
}

/// How far an ADD has come.
enum Add {
    Start,
    Leased(Box<Held>),
    Linked(Box<Held>),
}

/// What the runtime knows of a container.
enum Pod {
    Out,
    Adding(Add),
    In(IpAddr),
    /// Killed, or failed half way: a DEL is due.
    Unclear,
}

struct World {
    random: u64,
    store: Store,
    boot: u8,
    links: Links,
    pods: Vec<Pod>,
    sweeper: Sweeper,
    clock: u64,
    births: u64,
}

fn boot_id(number: u8) -> BootId {
    BootId { text: format!("boot{number}"), bytes: [number; 16] }
}

fn source() -> Source {
    let address = |n: u8| IpAddr::from([10, 0, 0, n]);
    let subnet = "10.0.0.0/29".parse().unwrap();
    let range = Range { subnet, first: address(2), last: address(6), gateway: address(1) };
    Source { pool: Pool::Blocks, sets: vec![RangeSet(vec![range])] }
}

impl World {
    fn new(seed: u64, path: PathBuf) -> World {
        let (store, links) = (Store::at(&path), Links::default());
        let sweeper = Sweeper::new(store.clone(), boot_id(1), Missing::Create, Box::new(links.clone()));
        let pods = (0..PODS).map(|_| Pod::Out).collect();
        World { random: seed, store, boot: 1, links, pods, sweeper, clock: 0, births: 0 }
    }

    /// Numbers that follow from the seed (splitmix64).
    fn below(&mut self, bound: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).unwrap()
    }

    fn locked<T>(&mut self, missing: Missing, work: impl FnOnce(&mut Locked<'_>) -> T) -> Option<T> {
        let mut kernel = self.links.clone();
        let locked = self.store.lock(&boot_id(self.boot), WAIT, missing, &mut kernel).unwrap();
        locked.map(|mut locked| work(&mut locked))
    }

    /// The next step of a pod's ADD, or the whole of its DEL.
    fn advance(&mut self, pod: usize) {
        let state = std::mem::replace(&mut self.pods[pod], Pod::Unclear);
        self.pods[pod] = match state {
            Pod::Out => Pod::Adding(Add::Start),
            Pod::Adding(Add::Start) => self.lease(pod),
            Pod::Adding(Add::Leased(mut held)) => {
                held.lease.veth.index = 1;
                self.links.add(&held.lease.veth.name, alias::of(&held.lease, None));
                Pod::Adding(Add::Linked(held))
            }
            Pod::Adding(Add::Linked(held)) => self.confirm(*held),
            Pod::In(_) | Pod::Unclear => {
                self.delete(pod);
                Pod::Out
            }
        };
    }

    fn lease(&mut self, pod: usize) -> Pod {
        self.births += 1;
        let lease = Lease {
            container_id: format!("c{pod}"),
            ifname: "eth0".into(),
            network: Some("plat".into()),
            pool: Pool::Blocks,
            veth: HostVeth { name: format!("plat{pod}"), index: 0 },
            since: Since { boot_ms: self.births, unix_seconds: 0 },
            ..Lease::default()
        };
        let result =
            self.locked(Missing::Create, |store| lease_from(store, lease, &source(), &[], |_| Ok(())));
        match result.unwrap() {
            Ok((held, _)) => Pod::Adding(Add::Leased(Box::new(held))),
            Err(error) => {
                assert!(error.code == 101 || error.code == 103, "{error}");
                Pod::Unclear
            }
        }
    }

    fn confirm(&mut self, held: Held) -> Pod {
        let result = self.locked(Missing::Create, |store| confirm(store, &held));
        match result.unwrap() {
            Ok(()) => Pod::In(held.lease.addresses[0].address),
            Err(error) => {
                assert_eq!(error.code, 11, "{error}");
                // It is taken back: the link, then the lease if it stands.
                self.links.delete(&held.lease.veth.name);
                self.end(&held.lease.container_id);
                Pod::Out
            }
        }
    }

    fn delete(&mut self, pod: usize) {
        self.links.delete(&format!("plat{pod}"));
        self.end(&format!("c{pod}"));
    }

    fn end(&mut self, container_id: &str) {
        self.locked(Missing::Leave, |store| {
            if let Some(held) = store.find(container_id, "eth0").unwrap() {
                store.remove(held.slot).unwrap();
            }
        });
    }

    fn kill(&mut self, pod: usize) {
        if matches!(self.pods[pod], Pod::Adding(_)) {
            self.pods[pod] = Pod::Unclear;
        }
    }

    /// The namespace goes without a DEL; two sweeps later the lease is gone too.
    fn vanish(&mut self, pod: usize) {
        if matches!(self.pods[pod], Pod::Adding(_)) {
            return;
        }
        self.links.delete(&format!("plat{pod}"));
        self.sweep();
        self.sweep();
        self.pods[pod] = Pod::Out;
    }

    fn sweep(&mut self) {
        self.clock += 90_000;
        // An ADD that takes longer than the patience of the sweep, as here, is ended, and finds out.
        self.sweeper.sweep_at(self.clock, WAIT).unwrap();
    }

    /// What the runtime does not list goes.
    fn collect(&mut self) {
        for pod in 0..usize::from(PODS) {
            if matches!(self.pods[pod], Pod::Unclear | Pod::Out) {
                self.delete(pod);
                self.pods[pod] = Pod::Out;
            }
        }
    }

    fn spoil(&mut self) {
        use std::os::unix::fs::FileExt;
        let path = self.store.path().to_owned();
        match self.below(4) {
            0 | 1 => drop(fs::remove_file(&path)),
            2 => fs::write(&path, "garbage").unwrap(),
            _ => {
                let slot = u32::try_from(self.below(4)).unwrap();
                let Ok(file) = fs::File::options().write(true).open(&path) else { return };
                file.write_all_at(&[0x5a], record_offset(slot) + 5).unwrap();
            }
        }
    }

    /// All links go, and every process; the file stays where it is not in memory.
    fn reboot(&mut self) {
        self.boot = self.boot.wrapping_add(1);
        if self.below(2) == 0 {
            let _ = fs::remove_file(self.store.path());
        }
        self.links.0.lock().unwrap().clear();
        self.pods.iter_mut().for_each(|pod| *pod = Pod::Out);
        let kernel = Box::new(self.links.clone());
        self.sweeper = Sweeper::new(self.store.clone(), boot_id(self.boot), Missing::Create, kernel);
    }

    fn step(&mut self) {
        let pod = self.below(usize::from(PODS));
        match self.below(40) {
            0..=27 => self.advance(pod),
            28..=31 => self.kill(pod),
            32 => self.vanish(pod),
            33..=34 => self.sweep(),
            35 => self.collect(),
            36..=38 => self.spoil(),
            _ => self.reboot(),
        }
        self.check();
    }

    /// No two pods that are in share an address, and each one's is held.
    fn check(&mut self) {
        let held = self.locked(Missing::Create, |store| store.leases().unwrap()).unwrap();
        let held: BTreeMap<String, Lease> =
            held.into_iter().map(|held| (held.lease.container_id.clone(), held.lease)).collect();
        let mut seen = BTreeSet::new();
        for (number, pod) in self.pods.iter().enumerate() {
            if let Pod::In(address) = pod {
                assert!(seen.insert(*address), "{address} twice");
                let lease =
                    held.get(&format!("c{number}")).unwrap_or_else(|| panic!("c{number} lost its lease"));
                assert_eq!(lease.addresses[0].address, *address, "c{number}");
            }
        }
    }

    /// At the end every ADD ends, every DEL comes, and every address can be had, once.
    fn come_to_rest(&mut self) {
        for pod in 0..usize::from(PODS) {
            self.kill(pod);
            self.delete(pod);
            self.pods[pod] = Pod::Out;
        }
        assert_eq!(self.locked(Missing::Create, |store| store.leases().unwrap()).unwrap(), []);
        for pod in 0..ADDRESSES {
            for _ in 0..4 {
                self.advance(pod);
            }
            assert!(matches!(self.pods[pod], Pod::In(_)), "c{pod} got no address");
        }
        self.check();
    }
}

#[test]
fn no_life_of_leases_gives_an_address_twice_or_loses_one() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    let replayed = number("PLAT_SEED");
    let runs = if replayed.is_some() { 1 } else { number("PLAT_RUNS").unwrap_or(2000) };
    let first = replayed.unwrap_or(u64::try_from(now & 0xffff_ffff_ffff).unwrap());
    // In memory, as the store is on a node.
    let memory = PathBuf::from("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    for run in 0..runs {
        let seed = first.wrapping_add(run);
        println!("replay with PLAT_SEED={seed}");
        let mut world = World::new(seed, dir.path().join("leases"));
        for _ in 0..60 {
            world.step();
        }
        world.come_to_rest();
        let _ = fs::remove_file(dir.path().join("leases"));
    }
}
