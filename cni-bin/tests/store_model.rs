//! The lease store against a model: random leases, releases, damage and kills, with a kernel of our own
//! making. No namespaces, no root.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "lab/told.rs"]
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use plat_cni::boot::BootId;
use plat_cni::link::Link;
use plat_cni::netlink;
use plat_cni::store::{Error, Held, Kernel, Locked, Missing, Store};
use plat_crds::lease::{
    HostVeth, Lease, LeasedAddress, Pool, PoolId, RECORD_SIZE, Since, entry_offset, record_offset,
};
use proptest::prelude::*;
use told::Told;

fn boot(number: u8) -> BootId {
    BootId { text: format!("boot{number}"), bytes: [number; 16] }
}

fn lease(container: u8, address: u8) -> Lease {
    Lease {
        container_id: format!("c{container}"),
        ifname: "eth0".into(),
        network: Some("plat".into()),
        pool: Pool::Blocks,
        addresses: vec![LeasedAddress {
            address: IpAddr::from([10, 244, 3, address]),
            subnet_length: 24,
            masquerade: false,
        }],
        veth: HostVeth { name: format!("plat{container}"), index: u32::from(container) + 1 },
        netns: None,
        since: Since { boot_ms: u64::from(container), unix_seconds: 1 },
        ..Lease::default()
    }
}

/// The same as the kernel knows it.
fn proven(lease: &Lease) -> Lease {
    Lease {
        network: None,
        pool: Pool::Unknown,
        since: Since { boot_ms: 999, unix_seconds: 2 },
        ..lease.clone()
    }
}

fn open<'a>(path: &Path, kernel: &'a mut Told) -> Locked<'a> {
    Store::at(path).lock(&boot(1), Duration::from_secs(5), Missing::Create, kernel).unwrap().unwrap()
}

fn keys(leases: &[Held]) -> BTreeSet<String> {
    leases.iter().map(|held| held.lease.container_id.clone()).collect()
}

#[derive(Clone, Debug)]
enum Step {
    /// A container gets an address, if both are free.
    Lease(u8, u8),
    /// A container's lease ends, and its link with it.
    Release(u8),
    /// A byte somewhere in the used part of the file changes.
    Flip(u32, u8),
    /// An entry becomes zeros.
    Zero(u8),
    /// The file loses its end.
    Cut(u32),
    /// The file is gone.
    Remove,
    /// The file is something else.
    Overwrite(Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u8..12, 2u8..30).prop_map(|(c, a)| Step::Lease(c, a)),
        3 => (0u8..12).prop_map(Step::Release),
        2 => (any::<u32>(), 1u8..).prop_map(|(at, with)| Step::Flip(at, with)),
        1 => (0u8..12).prop_map(Step::Zero),
        1 => any::<u32>().prop_map(Step::Cut),
        1 => Just(Step::Remove),
        1 => proptest::collection::vec(any::<u8>(), 0..300).prop_map(Step::Overwrite),
    ]
}

/// A place in the header, in the entries or in the records of the first twelve slots.
fn place(number: u32) -> u64 {
    match number % 3 {
        0 => u64::from(number / 3) % 64,
        1 => entry_offset(0) + u64::from(number / 3) % (12 * 64),
        _ => record_offset(0) + u64::from(number / 3) % (12 * RECORD_SIZE as u64),
    }
}

fn damage(path: &Path, step: &Step) {
    let file = || File::options().read(true).write(true).open(path);
    match step {
        Step::Flip(at, with) => {
            let (Ok(file), at) = (file(), place(*at)) else { return };
            let mut byte = [0];
            if file.read_at(&mut byte, at).unwrap() == 1 {
                file.write_all_at(&[byte[0] ^ with], at).unwrap();
            }
        }
        Step::Zero(slot) => {
            if let Ok(file) = file() {
                file.write_all_at(&[0; 64], entry_offset(u32::from(*slot))).unwrap();
            }
        }
        Step::Cut(at) => {
            if let Ok(file) = file() {
                let length = file.metadata().unwrap().len().min(place(*at));
                file.set_len(length).unwrap();
            }
        }
        Step::Remove => {
            let _ = fs::remove_file(path);
        }
        Step::Overwrite(bytes) => fs::write(path, bytes).unwrap(),
        Step::Lease(..) | Step::Release(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn what_the_kernel_holds_is_never_lost_and_never_given_twice(steps in proptest::collection::vec(step(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leases");
        // Container to address; every lease has a link, so the kernel can prove it.
        let mut model: BTreeMap<u8, u8> = BTreeMap::new();
        let mut kernel = Told::default();
        for step in steps {
            damage(&path, &step);
            let mut store = open(&path, &mut kernel);
            match step {
                Step::Lease(container, address) => {
                    let new = lease(container, address);
                    let survey = store.survey(&new.container_id, "eth0").unwrap();
                    let taken = survey.is_taken(new.pool_id(), &new.addresses[0].address);
                    prop_assert_eq!(survey.has_lease(), model.contains_key(&container));
                    prop_assert_eq!(taken, model.values().any(|a| *a == address));
                    prop_assert_eq!(survey.count as usize, model.len());
                    if !survey.has_lease() && !taken {
                        store.insert(&survey, &new).unwrap();
                        model.insert(container, address);
                    }
                }
                Step::Release(container) => {
                    let found = store.find(&format!("c{container}"), "eth0").unwrap();
                    prop_assert_eq!(found.is_some(), model.remove(&container).is_some());
                    if let Some(held) = found {
                        prop_assert_eq!(store.find_at(held.slot, &held.lease.container_id, "eth0").unwrap(), Some(held.clone()));
                        store.remove(held.slot).unwrap();
                    }
                }
                _ => {}
            }
            let expected: BTreeSet<String> = model.keys().map(|c| format!("c{c}")).collect();
            prop_assert_eq!(keys(&store.leases().unwrap()), expected);
            drop(store);
            kernel.0 = model.iter().map(|(c, a)| proven(&lease(*c, *a))).collect();
        }
    }

    #[test]
    fn any_bytes_in_its_place_are_rebuilt_or_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..6000)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leases");
        fs::write(&path, &bytes).unwrap();
        let mut kernel = Told(vec![proven(&lease(1, 9))]);
        let mut store = open(&path, &mut kernel);
        prop_assert!(store.repaired().is_some());
        let survey = store.survey("x", "eth0").unwrap();
        prop_assert!(survey.is_taken(PoolId::new(&Pool::Blocks, ""), &IpAddr::from([10, 244, 3, 9])));
        prop_assert_eq!(keys(&store.leases().unwrap()), BTreeSet::from(["c1".to_owned()]));
    }
}

#[test]
fn a_damaged_record_keeps_its_address_as_long_as_a_link_or_its_own_words_hold_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    let mut kernel = Told(vec![]);
    let mut store = open(&path, &mut kernel);
    for (container, address) in [(1, 2), (2, 3)] {
        let survey = store.survey("", "").unwrap();
        store.insert(&survey, &lease(container, address)).unwrap();
    }
    drop(store);
    let spoil = |kernel: &mut Told, at: u64| {
        let slot = open(&path, kernel).find("c1", "eth0").unwrap().unwrap().slot;
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&[0xee], record_offset(slot) + at).unwrap();
    };
    // Its link is there.
    kernel.0 = vec![proven(&lease(1, 2))];
    spoil(&mut kernel, 4);
    assert_eq!(keys(&open(&path, &mut kernel).leases().unwrap()), BTreeSet::from(["c1".into(), "c2".into()]));
    // Its link is gone, but container and address can be read: a DEL or the sweep will end it.
    kernel.0 = vec![];
    spoil(&mut kernel, 500);
    assert_eq!(keys(&open(&path, &mut kernel).leases().unwrap()), BTreeSet::from(["c1".into(), "c2".into()]));
    // Nothing holds it any more. The other lease needs no proof, as it can be read.
    spoil(&mut kernel, 4);
    assert_eq!(keys(&open(&path, &mut kernel).leases().unwrap()), BTreeSet::from(["c2".into()]));
}

#[test]
fn another_boot_ends_every_lease() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    let mut kernel = Told(vec![]);
    let mut store = open(&path, &mut kernel);
    let survey = store.survey("", "").unwrap();
    store.insert(&survey, &lease(1, 2)).unwrap();
    drop(store);
    let mut store =
        Store::at(&path).lock(&boot(2), Duration::ZERO, Missing::Leave, &mut kernel).unwrap().unwrap();
    assert_eq!(store.leases().unwrap(), []);
    assert_eq!(store.repaired(), Some("it is of another boot"));
}

#[test]
fn a_kernel_that_does_not_answer_stops_everything_rather_than_losing_leases() {
    struct Deaf;
    impl Kernel for Deaf {
        fn held(&mut self) -> Result<Vec<Lease>, netlink::Error> {
            Err(netlink::Error::Interrupted { what: "list links".into() })
        }

        fn links(&mut self) -> Result<Vec<Link>, netlink::Error> {
            Ok(Vec::new())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    fs::write(&path, b"garbage").unwrap();
    let refused = Store::at(&path).lock(&boot(1), Duration::ZERO, Missing::Create, &mut Deaf).map(|_| ());
    assert!(matches!(refused, Err(Error::Rebuild { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"garbage");
}

#[test]
fn slots_are_used_again_and_cursors_survive_a_repair() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases");
    let mut kernel = Told(vec![]);
    let pool = PoolId::new(&Pool::Blocks, "");
    let mut store = open(&path, &mut kernel);
    for round in 0..50u8 {
        let survey = store.survey("", "").unwrap();
        assert_eq!(store.insert(&survey, &lease(round, round)).unwrap(), 0);
        store.remove(0).unwrap();
    }
    assert_eq!(store.cursor(pool, 0).unwrap(), None);
    store.set_cursor(pool, 0, IpAddr::from([10, 244, 3, 7])).unwrap();
    drop(store);
    assert_eq!(open(&path, &mut kernel).cursor(pool, 0).unwrap(), Some(IpAddr::from([10, 244, 3, 7])));
    // A repair keeps them.
    damage(&path, &Step::Flip(1, 1));
    let mut store = open(&path, &mut kernel);
    store.survey("", "").unwrap();
    assert_eq!(store.repaired(), Some("an entry is damaged or missing"));
    assert_eq!(store.cursor(pool, 0).unwrap(), Some(IpAddr::from([10, 244, 3, 7])));
    drop(store);
    assert!(fs::metadata(&path).unwrap().len() <= record_offset(1), "one slot was ever in use");
}
