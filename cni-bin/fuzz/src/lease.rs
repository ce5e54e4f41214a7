//! A lease wherever it is written: header, entries, records and cursors of the store, alias of the link.

use std::net::IpAddr;

use plat_crds::alias::{self, Alias};
use plat_crds::lease::{
    CURSOR_SIZE, ENTRY_SIZE, Entry, Guard, GuardScope, HEADER_SIZE, Header, HostVeth, Lease, LeasedAddress,
    NetnsId, Pool, RECORD_SIZE, Since, UsedEntry, checksum, decode_cursor, encode_cursor, key_hash,
};

/// Any bytes are read or refused, as they are and with the checksum that belongs to them; what was read
/// can be written and reads the same again.
pub fn check(input: &[u8]) {
    for header in [cut(input), sealed::<HEADER_SIZE>(input)] {
        if let Ok(header) = Header::decode(&header) {
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }
    for entry in [cut(input), sealed::<ENTRY_SIZE>(input)] {
        Entry::decode(&entry);
    }
    let cursor = sealed::<CURSOR_SIZE>(input);
    let hash = u64::from_le_bytes(*cursor.first_chunk().unwrap());
    if let Some(address) = decode_cursor(&cursor, hash) {
        assert_eq!(decode_cursor(&encode_cursor(hash, address), hash), Some(address));
    }
    if let Some(alias) = std::str::from_utf8(input).ok().and_then(alias::parse) {
        must_be_written_as(&alias);
    }
    let record = cut(input);
    if let Some(mut lease) = Lease::decode(&entry_of(&record), &record) {
        // They are written in this order.
        lease.host_ports.sort_by_key(|port| port.host_ip);
        must_come_back(&lease);
    }
}

/// The lease that an alias proves has an alias that says the same.
fn must_be_written_as(alias: &Alias<'_>) {
    let (Some(leased), Some(datapath), Some(guard)) = (&alias.leased, alias.datapath, alias.guard) else {
        return;
    };
    let lease = Lease {
        container_id: alias.container_id.to_owned(),
        ifname: alias.ifname.to_owned(),
        network: Some(leased.network.to_owned()),
        pool: leased.pool,
        addresses: leased.addresses.clone(),
        datapath,
        guard,
        ..Lease::default()
    };
    let again = alias::of(&lease, alias.port);
    let read = alias::parse(&again);
    // An address may be written shorter than it is shown.
    assert!(
        read.as_ref() == Some(alias) || again == alias::of(&Lease { network: None, ..lease }, alias.port),
        "{again}"
    );
}

/// Writes a lease and reads it again.
fn must_come_back(lease: &Lease) {
    let (entry, record) = lease.encode().unwrap_or_else(|e| panic!("{e}: {lease:?}"));
    let Entry::Used(entry) = Entry::decode(&entry) else { panic!("{lease:?}") };
    assert_eq!(Lease::decode(&entry, &record).as_ref(), Some(lease));
    serde_json::to_string(lease).unwrap();
}

/// The first bytes, filled up with zeros.
fn cut<const N: usize>(input: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.iter_mut().zip(input).for_each(|(to, from)| *to = *from);
    bytes
}

/// The same with the checksum at its end that belongs to it.
pub fn sealed<const N: usize>(input: &[u8]) -> [u8; N] {
    let mut bytes = cut::<N>(input);
    let (body, sum) = bytes.split_last_chunk_mut::<8>().unwrap();
    *sum = checksum(body).to_le_bytes();
    bytes
}

/// The entry that fits a record.
pub fn entry_of(record: &[u8; RECORD_SIZE]) -> UsedEntry {
    let text =
        |kind| String::from_utf8(last_field(record, kind).unwrap_or_default().to_vec()).unwrap_or_default();
    UsedEntry { key: key_hash(&text(1), &text(2)), tags: [0; 4], record: checksum(record) }
}

fn last_field(mut record: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut found = None;
    while let [kind, low, high, rest @ ..] = record
        && *kind != 0
    {
        let (value, behind) = rest.split_at_checked(u16::from_le_bytes([*low, *high]).into())?;
        found = if *kind == wanted { Some(value) } else { found };
        record = behind;
    }
    found
}

/// A lease of these addresses.
pub fn of(container_id: &str, ifname: &str, addresses: &[IpAddr]) -> Lease {
    let leased = |address: &IpAddr| LeasedAddress { address: *address, subnet_length: 24, masquerade: true };
    Lease {
        container_id: container_id.to_owned(),
        ifname: ifname.to_owned(),
        network: Some("plat".to_owned()),
        pool: Pool::Blocks,
        addresses: addresses.iter().map(leased).collect(),
        veth: HostVeth { name: "plat0badcafe".to_owned(), index: 7 },
        netns: Some(NetnsId { device: 4, inode: 4_026_532_409 }),
        since: Since { boot_ms: 1234, unix_seconds: 1_790_000_000 },
        guard: Some(Guard { mac: [0x0a, 0x70, 10, 244, 3, 7], scope: GuardScope::Addresses }),
        ..Lease::default()
    }
}
