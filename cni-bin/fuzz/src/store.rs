//! The lease store as a file: a good one that is damaged in any way, or anything in its place. Behind it is
//! a kernel that knows some of the pods.
//!
//! Input: a byte whose bits say which of the pods live, then damage after damage: kind, two bytes of place,
//! length, bytes.

use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use plat_cni::boot::BootId;
use plat_cni::store::{Error, Held, Locked, Missing, Store};
use plat_crds::lease::{
    ENTRY_SIZE, Entry, HEADER_SIZE, Header, HeaderError, Lease, Pool, PoolId, RECORD_SIZE, entry_offset,
    record_offset,
};

use super::lease;

#[path = "../../tests/lab/told.rs"]
mod told;

use told::Told;

const PODS: u8 = 5;
const SLOTS: u32 = PODS as u32;

fn pod(number: u8) -> Lease {
    lease::of(
        &format!("c{number}"),
        "eth0",
        &[[10, 244, 3, number].into(), [0xfd00, 0, 0, 3, 0, 0, 0, number.into()].into()],
    )
}

fn pool() -> PoolId {
    PoolId::new(&Pool::Blocks, "")
}

fn boot() -> BootId {
    BootId { text: "b".to_owned(), bytes: [7; 16] }
}

fn open<'a>(path: &Path, kernel: &'a mut Told) -> Result<Locked<'a>, Error> {
    Store::at(path).lock(&boot(), Duration::ZERO, Missing::Create, kernel).map(|store| store.unwrap())
}

/// Whatever became of the file: it opens, no address that a living pod has is free, nothing is held that
/// neither file nor kernel knew, and it is whole from then on. Unless a header says that it is of a newer
/// version: then not a byte of it changes.
pub fn check(input: &[u8]) {
    let Some((live, damages)) = input.split_first() else { return };
    // In memory, as /run is.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = dir.path().join("leases");
    let live: Vec<Lease> = (0..PODS).filter(|n| live >> n & 1 != 0).map(pod).collect();
    write_whole(&path);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let before = index(&file);
    damage(&file, damages);
    let forged = is_forged(&before, &index(&file));

    let mut kernel = Told(live.iter().map(proven).collect());
    let length = file.metadata().unwrap().len();
    let start = index(&file).0;
    let mut store = match open(&path, &mut kernel) {
        Ok(store) => store,
        Err(Error::Newer { .. }) => {
            assert!(forged && matches!(Header::decode(&start), Err(HeaderError::Newer(_))));
            assert_eq!((file.metadata().unwrap().len(), index(&file).0), (length, start));
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let survey = store.survey("new", "eth0").unwrap();
    let all = store.leases().unwrap();
    if !forged {
        must_know(&all, &live);
        let is_free = |address: &IpAddr| !survey.is_taken(pool(), address);
        let free = live.iter().flat_map(|lease| &lease.addresses).find(|leased| is_free(&leased.address));
        assert!(free.is_none(), "{free:?} is free, and a pod has it");
    }
    must_work(&mut store, &all);
    drop(store);
    let mut store = open(&path, &mut kernel).unwrap();
    assert_eq!((store.leases().unwrap(), store.repaired()), (all, None), "it is whole from then on");
}

/// Every pod that lives has its lease, and there is none of a pod that never was.
fn must_know(all: &[Held], live: &[Lease]) {
    let key = |lease: &Lease| (lease.container_id.clone(), lease.ifname.clone());
    let keys: Vec<_> = all.iter().map(|held| key(&held.lease)).collect();
    let lost = live.iter().find(|lease| !keys.contains(&key(lease)));
    assert!(lost.is_none(), "{lost:?} is lost");
    let strange = keys.iter().find(|k| !(0..PODS).any(|n| key(&pod(n)) == **k));
    assert!(strange.is_none(), "{strange:?} was never there");
}

/// What is listed is found (of two of one key, which nobody but a forger writes, either), and a lease can come and go without a change to the others.
fn must_work(store: &mut Locked<'_>, all: &[Held]) {
    for held in all {
        let (id, ifname) = (&held.lease.container_id, &held.lease.ifname);
        assert_eq!(store.find_at(held.slot, id, ifname).unwrap().as_ref(), Some(held));
        let found = store.find(id, ifname).unwrap().unwrap();
        assert!(all.contains(&found) && (&found.lease.container_id, &found.lease.ifname) == (id, ifname));
    }
    let new = lease::of("new", "net1", &[[10, 244, 9, 9].into()]);
    let survey = store.survey("new", "net1").unwrap();
    assert_eq!(survey.count as usize, all.len());
    if survey.has_lease() {
        return;
    }
    let slot = store.insert(&survey, &new).unwrap();
    assert!(all.iter().all(|held| held.slot != slot), "slot {slot} was in use");
    assert!(store.survey("", "").unwrap().is_taken(pool(), &new.addresses[0].address));
    assert_eq!(store.find("new", "net1").unwrap(), Some(Held { slot, lease: new }));
    store.remove(slot).unwrap();
    assert_eq!(store.leases().unwrap(), all);
}

/// The same lease as the kernel knows it.
fn proven(lease: &Lease) -> Lease {
    Lease { network: None, pool: Pool::Unknown, netns: None, ..lease.clone() }
}

/// A store that all pods have a lease in.
fn write_whole(path: &Path) {
    let mut kernel = Told(vec![]);
    let mut store = open(path, &mut kernel).unwrap();
    for number in 0..PODS {
        let survey = store.survey("", "").unwrap();
        store.insert(&survey, &pod(number)).unwrap();
    }
    store.set_cursor(pool(), 0, [10, 244, 3, 4].into()).unwrap();
}

type Index = ([u8; HEADER_SIZE], Vec<Entry>);

/// Header and entries as they stand in the file.
fn index(file: &File) -> Index {
    let mut header = [0; HEADER_SIZE];
    let _ = file.read_at(&mut header, 0).unwrap();
    let entry = |slot| {
        let mut bytes = [0; ENTRY_SIZE];
        let length = file.read_at(&mut bytes, entry_offset(slot)).unwrap();
        Entry::decode(&bytes[..length])
    };
    (header, (0..SLOTS).map(entry).collect())
}

/// Whether checksums say that it is good, and it is not what was written. That is no damage, it is somebody
/// who writes leases of his own.
fn is_forged(before: &Index, after: &Index) -> bool {
    let header = Header::decode(&after.0);
    let another_header = header != Err(HeaderError::Unreadable) && header != Header::decode(&before.0);
    let another_entry = |(was, is): (&Entry, &Entry)| matches!(is, Entry::Used(_)) && was != is;
    another_header || before.1.iter().zip(&after.1).any(another_entry)
}

fn damage(file: &File, mut steps: &[u8]) {
    while let [kind, low, high, length, rest @ ..] = steps {
        let (bytes, behind) = rest.split_at(rest.len().min(usize::from(*length)));
        let place = u16::from_le_bytes([*low, *high]);
        let slot = u32::from(place) % SLOTS;
        let write = |bytes: &[u8], at: u64| file.write_all_at(bytes, at).unwrap();
        let within = |size: usize| u64::from(place) % (SLOTS as usize * size) as u64;
        match kind % 8 {
            0 => write(bytes, u64::from(place) % HEADER_SIZE as u64),
            1 => write(bytes, HEADER_SIZE as u64 + u64::from(place) % 4032),
            2 => write(bytes, entry_offset(0) + within(ENTRY_SIZE)),
            3 => write(bytes, record_offset(0) + within(RECORD_SIZE)),
            4 => shorten(
                file,
                [0, entry_offset(0), record_offset(0)][usize::from(place % 3)] + within(RECORD_SIZE),
            ),
            5 => write(&[0; ENTRY_SIZE], entry_offset(slot)),
            6 => forge_header(file, bytes),
            _ => forge_lease(file, slot, bytes),
        }
        steps = behind;
    }
}

fn shorten(file: &File, length: u64) {
    file.set_len(file.metadata().unwrap().len().min(length)).unwrap();
}

/// A header with other contents that is whole.
fn forge_header(file: &File, bytes: &[u8]) {
    let [slots, leases, version, ..] = bytes else { return };
    let good = Header { boot_id: boot().bytes, slots: u32::from(slots % 16), leases: u32::from(leases % 16) };
    let mut header = good.encode();
    header[8] = *version;
    file.write_all_at(&lease::sealed::<HEADER_SIZE>(&header), 0).unwrap();
}

/// A lease with other contents that is whole.
fn forge_lease(file: &File, slot: u32, bytes: &[u8]) {
    let mut record = [0; RECORD_SIZE];
    record.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    let entry = lease::entry_of(&record);
    let words = [entry.key, 1, 0, 0, 0, 1, entry.record].map(u64::to_le_bytes).concat();
    file.write_all_at(&lease::sealed::<ENTRY_SIZE>(&words), entry_offset(slot)).unwrap();
    file.write_all_at(&record, record_offset(slot)).unwrap();
}
