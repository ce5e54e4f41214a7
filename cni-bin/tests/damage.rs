//! The lease store when all goes wrong: every single flipped bit, full and read-only file systems, a store as
//! large as it gets, and stores lost under many running pods.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;
#[path = "lab/told.rs"]
mod told;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use lab::{Answer, Plat, add, address, blocks, cluster_conf, hand_conf, netns, sh, with};
use plat_cni::acquire::lease_from;
use plat_cni::boot::BootId;
use plat_cni::config::ranges::{Range, RangeSet};
use plat_cni::pool::Source;
use plat_cni::store::{Locked, Missing, Store};
use plat_crds::lease::{
    ENTRY_SIZE, HEADER_SIZE, HostVeth, Lease, LeasedAddress, Pool, PoolId, RECORD_SIZE, checksum,
    entry_offset, record_offset,
};
use serde_json::json;
use told::Told;

const FILE: &str = "/run/plat/leases";

fn lease(container: &str, addresses: &[IpAddr]) -> Lease {
    let leased = |address: &IpAddr| LeasedAddress { address: *address, subnet_length: 15, masquerade: false };
    Lease {
        container_id: container.into(),
        ifname: "eth0".into(),
        network: Some("plat".into()),
        pool: Pool::Blocks,
        addresses: addresses.iter().map(leased).collect(),
        veth: HostVeth { name: "plat0badcafe".into(), index: 7 },
        ..Lease::default()
    }
}

fn open<'a>(path: &Path, kernel: &'a mut Told) -> Locked<'a> {
    let boot = BootId { text: "boot".into(), bytes: [1; 16] };
    Store::at(path).lock(&boot, Duration::from_secs(5), Missing::Create, kernel).unwrap().unwrap()
}

#[test]
fn no_single_flipped_bit_of_a_store_frees_an_address_or_loses_a_lease() {
    lab::enter();
    let path = Path::new("/run/leases");
    let held: Vec<IpAddr> = vec![[10, 244, 3, 2].into(), "fd00::2".parse().unwrap(), [10, 244, 3, 3].into()];
    let leases = [lease("a", &held[..2]), lease("b", &held[2..])];
    let mut kernel = Told(leases.to_vec());
    let mut store = open(path, &mut kernel);
    for lease in &leases {
        let survey = store.survey("", "").unwrap();
        store.insert(&survey, lease).unwrap();
    }
    drop(store);
    let whole = fs::read(path).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let spans = [(0, HEADER_SIZE as u64), (entry_offset(0), 2 * ENTRY_SIZE as u64)];
    let records = [(record_offset(0), 2 * RECORD_SIZE as u64)];
    for bit in spans.iter().chain(&records).flat_map(|(start, length)| start * 8..(start + length) * 8) {
        let at = bit / 8;
        let good = whole[usize::try_from(at).unwrap()];
        file.write_all_at(&[good ^ (1 << (bit % 8))], at).unwrap();
        let mut store = open(path, &mut kernel);
        let survey = store.survey("a", "eth0").unwrap();
        assert!(survey.has_lease(), "bit {bit}");
        for address in &held {
            assert!(survey.is_taken(PoolId::new(&Pool::Blocks, ""), address), "bit {bit} frees {address}");
        }
        let mut ids: Vec<String> =
            store.leases().unwrap().into_iter().map(|held| held.lease.container_id).collect();
        ids.sort();
        assert_eq!(ids, ["a", "b"], "bit {bit}");
        drop(store);
        // Back to the same bytes, wherever a repair put things.
        file.set_len(0).unwrap();
        file.write_all_at(&whole[..8192], 0).unwrap();
        file.write_all_at(&whole[usize::try_from(record_offset(0)).unwrap()..], record_offset(0)).unwrap();
    }
}

#[test]
fn a_store_with_65536_leases_gives_the_next_address_and_says_when_there_is_none() {
    lab::enter();
    let path = Path::new("/run/leases");
    let mut kernel = Told(vec![]);
    let mut store = open(path, &mut kernel);
    let source = Source { pool: Pool::Blocks, sets: vec![RangeSet(vec![whole_range()])] };
    // All addresses of 10.0.0.0/16 and of the beginning of another one, but for ten.
    let survey = store.survey("", "").unwrap();
    let first = u32::from(Ipv4Addr::new(10, 0, 0, 2));
    for number in 0..65_536u32 {
        let address = IpAddr::V4(Ipv4Addr::from(first + number));
        store.insert(&survey, &lease(&format!("c{number}"), &[address])).unwrap();
    }
    let mut given = BTreeSet::new();
    for number in 0..10 {
        let blank = Lease { addresses: vec![], ..lease(&format!("more{number}"), &[]) };
        let (held, _) = lease_from(&mut store, blank, &source, &[], |_| Ok(())).unwrap();
        assert!(given.insert(held.lease.addresses[0].address));
    }
    let wanted: BTreeSet<IpAddr> = (0..10).map(|n| IpAddr::V4(Ipv4Addr::from(first + 65_536 + n))).collect();
    assert_eq!(given, wanted);
    let full = lease_from(&mut store, lease("one-more", &[]), &source, &[], |_| Ok(()));
    assert_eq!(full.unwrap_err().code, 101);
    let found = store.find("c65535", "eth0").unwrap().unwrap();
    store.remove(found.slot).unwrap();
    let (held, _) = lease_from(&mut store, lease("again", &[]), &source, &[], |_| Ok(())).unwrap();
    assert_eq!(held.lease.addresses, found.lease.addresses);
    assert_eq!(store.survey("", "").unwrap().count, 65_536 + 10);
}

/// The addresses of that test: 65,546 of them.
fn whole_range() -> Range {
    let address = |number: u32| IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + number));
    Range {
        subnet: "10.0.0.0/15".parse().unwrap(),
        first: address(2),
        last: address(65_547),
        gateway: address(1),
    }
}

#[test]
fn an_ipv6_block_is_leased_in_order_and_its_addresses_come_back_last() {
    lab::enter();
    blocks(&["fd00:10:244:3::/125"]);
    let first: Vec<String> = (0..3).map(|n| address(&add(&format!("a{n}"), &cluster_conf()))).collect();
    assert_eq!(first, ["fd00:10:244:3::2", "fd00:10:244:3::3", "fd00:10:244:3::4"]);
    Plat::call("DEL", "a0", &cluster_conf()).run().silent();
    fs::remove_file(FILE).unwrap();
    // The cursor is lost with the store, the leases are not.
    let next: BTreeSet<String> = (0..4).map(|n| address(&add(&format!("b{n}"), &cluster_conf()))).collect();
    assert_eq!(next.len(), 4);
    assert!(next.is_disjoint(&first[1..].iter().cloned().collect()), "{next:?}");
    netns("more");
    let _ = Plat::call("ADD", "more", &cluster_conf()).run().error(101);
}

#[test]
fn a_full_or_read_only_file_system_is_named_and_frees_no_address() {
    lab::enter();
    sh("mkdir /run/plat; mount -t tmpfs -o size=64k tmpfs /run/plat");
    // Leases until the file system is full: each takes a quarter of a page.
    let conf = hand_conf();
    let mut live = BTreeSet::new();
    let full = loop {
        let id = format!("c{}", live.len());
        netns(&id);
        let answer = Plat::call("ADD", &id, &conf).run();
        if !answer.success {
            break answer.error(5);
        }
        assert!(live.insert(address(&answer.json())));
    };
    assert!(full.contains("the file system is full"), "{full}");
    assert!(live.len() > 10, "{live:?}");
    assert_eq!(lab::leased().into_iter().collect::<BTreeSet<_>>(), live);
    assert_eq!(lab::host_links().len(), live.len());
    // DEL needs no room, and makes some.
    Plat::call("DEL", "c0", &conf).run().silent();
    add("again", &conf);
    assert_eq!(lab::leased().len(), live.len());
    sh("mount -o remount,ro /run/plat");
    let id = format!("c{}", live.len());
    let error = Plat::call("ADD", &id, &conf).run().error(5);
    assert!(error.contains("read-only"), "{error}");
    let error = Plat::call("DEL", "c1", &conf).run().error(5);
    assert!(error.contains("read-only"), "{error}");
    sh("mount -o remount,rw /run/plat");
    Plat::call("DEL", "c1", &conf).run().silent();
    assert_eq!(lab::leased().len(), live.len() - 1);
}

/// Starts a call for each container, all at once; what came of each.
fn all_at_once(verb: &str, ids: &[String], conf: &serde_json::Value) -> Vec<Answer> {
    let calls: Vec<_> = ids.iter().map(|id| Plat::call(verb, id, conf).start()).collect();
    calls.into_iter().map(|call| Answer::of(call.wait_with_output().unwrap())).collect()
}

#[test]
fn a_store_lost_under_fifty_pods_makes_the_next_two_hundred_share_no_address() {
    lab::enter();
    blocks(&["10.244.3.0/24"]);
    let conf = with(cluster_conf(), json!({"lockTimeoutSeconds": 120}));
    let pods: Vec<String> = (0..50).map(|n| format!("pod{n}")).collect();
    let live: BTreeSet<String> = pods.iter().map(|id| address(&add(id, &conf))).collect();
    let ids: Vec<String> = (0..200).map(|n| format!("c{n}")).collect();
    ids.iter().for_each(|id| drop(netns(id)));
    let file = fs::read("/run/plat/blocks.json").unwrap();
    let losses: [(&str, &dyn Fn()); 2] = [
        ("rm -rf", &|| {
            fs::remove_dir_all("/run/plat").unwrap();
            fs::create_dir("/run/plat").unwrap();
            fs::write("/run/plat/blocks.json", &file).unwrap();
        }),
        ("a header that cannot be read", &|| {
            let store = File::options().write(true).open(FILE).unwrap();
            store.write_all_at(&[0xa5; HEADER_SIZE], 0).unwrap();
        }),
    ];
    for (name, lose) in losses {
        lose();
        let answers = all_at_once("ADD", &ids, &conf);
        let given: BTreeSet<String> = answers.iter().map(|answer| address(&answer.json())).collect();
        assert_eq!(given.len(), 200, "{name}");
        assert!(given.is_disjoint(&live), "{name}: {:?}", given.intersection(&live).collect::<Vec<_>>());
        let all: BTreeSet<String> = given.union(&live).cloned().collect();
        assert_eq!(lab::leased().into_iter().collect::<BTreeSet<_>>(), all, "{name}");
        all_at_once("DEL", &ids, &conf).iter().for_each(Answer::silent);
        assert_eq!(lab::leased().into_iter().collect::<BTreeSet<_>>(), live, "{name}");
    }
    // A store of a later version: not a byte changes, and nothing is handed out.
    let mut bytes = fs::read(FILE).unwrap();
    bytes[8] += 1;
    let sum = checksum(&bytes[..HEADER_SIZE - 8]);
    bytes[HEADER_SIZE - 8..HEADER_SIZE].copy_from_slice(&sum.to_le_bytes());
    fs::write(FILE, &bytes).unwrap();
    for answer in all_at_once("ADD", &ids, &conf) {
        let _ = answer.error(11);
    }
    assert!(fs::read(FILE).unwrap() == bytes, "not a byte has changed");
    assert_eq!(lab::host_links().len(), 50);
}
