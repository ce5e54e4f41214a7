//! The lease store's format: `/run/plat/leases`, written by the CNI binary, read and swept by the agent.
//!
//! Pure: bytes to values and back. Opening, locking and repairing the file is the CNI crate's `store`.
//! The file is a fast copy of what the kernel knows (each host veth's alias, [`crate::alias`]);
//! whatever in it cannot be read is rebuilt from there and never taken for "no lease".
//!
//! # Layout (all numbers little-endian)
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 64 | header |
//! | 64 | 4,032 | 126 cursors of 32 bytes |
//! | 4,096 | 8 MiB | [`MAX_SLOTS`] index entries of 64 bytes |
//! | 8,392,704 | | as many records of 1,024 bytes |
//!
//! The file is sparse: only pages of slots that were in use at some time exist. Slot `n` is entry `n` and
//! record `n`.
//!
//! **Header**: 0 magic `PLATLEAS` · 8 `u32` version · 12 `u16` entry size · 14 `u16` record size · 16 boot
//! id (16 bytes) · 32 `u32` number of slots that were ever in use · 36 `u32` number of leases, which shows
//! an entry that was overwritten with zeros · 40 zero · 56 `u64` checksum of the bytes before. Magic, version and checksum stay in place in every later version, so that an older
//! program can tell a newer file from a damaged one.
//!
//! **Entry**: 0 `u64` hash of the key (container ID and interface) · 8 four `u64` address tags, 0 for none
//! · 40 `u32` kind (1: lease) · 44 zero · 48 `u64` checksum of the record · 56 `u64` checksum of the bytes
//! before. All zero is a free slot. The entry is the truth about a slot: written after its record when a
//! lease begins, cleared when it ends. An ADD reads entries only, so it costs the same with one lease and
//! with ten thousand.
//!
//! **Record**: fields of `u8` type, `u16` length, value; type 0 ends them. Unknown types are kept.
//!
//! | type | value |
//! |---|---|
//! | 1 | container ID |
//! | 2 | interface in the pod |
//! | 3 | network name; absent if unknown (rebuilt from a link without room for it) |
//! | 4 | pool `u8`: 0 unknown, 1 the node's blocks, 2 inline ranges of the network, 3 another IPAM plugin's |
//! | 5 | address, repeated: `u8` flags (1: masqueraded), `u8` prefix length of its subnet, 4 or 16 bytes |
//! | 6 | host veth: `u32` interface index (0: not made yet), name |
//! | 7 | pod's network namespace: `u64` device, `u64` inode; for people, no proof of life (inodes are reused) |
//! | 8 | since: `u64` ms of `CLOCK_BOOTTIME`, `u64` seconds since 1970 |
//! | 9 | host ports, one field per `hostIP`: see [`host_port::encode`] |
//! | 10 | guard: `u8` what is checked of each packet's source (1: hardware address, 2: that and the IP addresses), hardware address (6 bytes); absent if nothing is |
//! | 12 | datapath `u8`: 1 bridge (as when absent), 2 routed; the host's routes to the addresses follow from it |
//!
//! **Cursor**: 0 `u64` hash of pool and range set · 8 the address handed out last (IPv4 as `::ffff:a.b.c.d`)
//! · 24 `u64` checksum. Its place is its hash modulo 126. A lost cursor costs only the order in which
//! freed addresses come back.
//!
//! **Checksum and hash**: [`checksum`].

use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::host_port::{self, HostPort};

/// The format's version.
pub const VERSION: u32 = 1;
/// Size of the header in bytes.
pub const HEADER_SIZE: usize = 64;
/// Size of a cursor in bytes.
pub const CURSOR_SIZE: usize = 32;
/// Number of cursors.
pub const CURSORS: u64 = 126;
/// Size of an index entry in bytes.
pub const ENTRY_SIZE: usize = 64;
/// Size of a record in bytes.
pub const RECORD_SIZE: usize = 1024;
/// Most leases that a store can hold: twice what a block can.
pub const MAX_SLOTS: u32 = 131_072;
/// Most addresses of one lease.
pub const MAX_ADDRESSES: usize = 4;
/// Longest container ID in bytes: it must fit into the host veth's alias (255 bytes) with interface and
/// datapath.
pub const MAX_CONTAINER_ID: usize = 227;
/// Longest network name in bytes.
pub const MAX_NETWORK_NAME: usize = 255;

const MAGIC: &[u8; 8] = b"PLATLEAS";
const INDEX_OFFSET: u64 = 4096;
const KIND_LEASE: u32 = 1;
const FLAG_MASQUERADE: u8 = 1;

/// Offset of index entry `slot` in the file.
pub fn entry_offset(slot: u32) -> u64 {
    INDEX_OFFSET + u64::from(slot) * ENTRY_SIZE as u64
}

/// Offset of record `slot` in the file.
pub fn record_offset(slot: u32) -> u64 {
    entry_offset(MAX_SLOTS) + u64::from(slot) * RECORD_SIZE as u64
}

/// A 64-bit hash over little-endian 8-byte words, the last one filled up with zeros.
///
/// Each word, told apart by its place, goes through a bijection, and the sum through another: so a change
/// within one word always shows, and the processor can work on several words at a time.
pub fn checksum(bytes: &[u8]) -> u64 {
    const PLACE: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut sum = (bytes.len() as u64).wrapping_mul(PLACE);
    let mut place = 0u64;
    let mut add = |word: u64| {
        place = place.wrapping_add(PLACE);
        let mixed = (word ^ place).wrapping_mul(0xff51_afd7_ed55_8ccd);
        sum = sum.wrapping_add(mixed ^ (mixed >> 32));
    };
    let (words, rest) = bytes.as_chunks::<8>();
    words.iter().for_each(|word| add(u64::from_le_bytes(*word)));
    if !rest.is_empty() {
        let mut word = [0; 8];
        word.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        add(u64::from_le_bytes(word));
    }
    // Every bit of the sum reaches every bit of the hash: tables use the lowest ones.
    sum = (sum ^ (sum >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    sum = (sum ^ (sum >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    sum ^ (sum >> 33)
}

/// A hash of several texts; never 0, which means "none" in an entry.
fn hash(parts: &[&[u8]]) -> u64 {
    let mut bytes = Vec::with_capacity(96);
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
        bytes.extend_from_slice(part);
    }
    checksum(&bytes).max(1)
}

/// The hash of a lease's key.
pub fn key_hash(container_id: &str, ifname: &str) -> u64 {
    hash(&[container_id.as_bytes(), ifname.as_bytes()])
}

/// Where an address comes from. Two pools may hold the same address (networks on different bridges).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Pool {
    /// Not known, as the lease was rebuilt from a link without room for it: its addresses are taken in
    /// every pool.
    #[default]
    Unknown,
    /// The blocks that the node holds.
    Blocks,
    /// Ranges written into the configuration of the lease's network.
    Ranges,
    /// Handed out by another IPAM plugin, which also looks after them.
    Delegated,
}

/// The pool of addresses in which one lease's tag is looked for: what [`Pool`] and network name make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolId(u64);

impl PoolId {
    /// The pool of leases whose origin is unknown; its addresses count in every pool.
    pub const UNKNOWN: PoolId = PoolId(0);

    /// The pool of a lease.
    pub fn new(pool: &Pool, network: &str) -> PoolId {
        match pool {
            Pool::Unknown => PoolId::UNKNOWN,
            Pool::Blocks => PoolId(hash(&[b"blocks"])),
            Pool::Ranges => PoolId(hash(&[b"ranges", network.as_bytes()])),
            Pool::Delegated => PoolId(hash(&[b"delegated", network.as_bytes()])),
        }
    }

    /// The tag under which an address of this pool stands in an entry.
    pub fn tag(self, address: IpAddr) -> u64 {
        hash(&[&self.0.to_le_bytes(), &v6(address).octets()])
    }

    /// The hash under which the cursor of a range set of this pool is kept.
    pub fn cursor(self, set: u32) -> u64 {
        hash(&[b"cursor", &self.0.to_le_bytes(), &set.to_le_bytes()])
    }
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped(),
        IpAddr::V6(a) => a,
    }
}

/// An address that a lease holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LeasedAddress {
    /// The address.
    pub address: IpAddr,
    /// Prefix length of the subnet or block that it was taken from.
    pub subnet_length: u8,
    /// Whether what it sends out of its subnet is masqueraded by rules of this lease.
    pub masquerade: bool,
}

/// The host's end of the pod's link.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostVeth {
    /// Its name.
    pub name: String,
    /// Its interface index; 0 until the link is made.
    pub index: u32,
}

/// Which network namespace the pod's end is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NetnsId {
    /// Device of the namespace's file.
    pub device: u64,
    /// Inode of the namespace's file.
    pub inode: u64,
}

/// How a pod's link is joined to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Datapath {
    /// The host's end is a port of a bridge.
    #[default]
    Bridge,
    /// The host's end stands alone, with a host route (/32, /128) to each of the pod's addresses.
    Routed,
}

/// What a pod's packets may come from; everything else that it sends is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Guard {
    /// The pod's hardware address.
    #[serde(serialize_with = "mac_text")]
    pub mac: [u8; 6],
    /// What must be the pod's own.
    pub scope: GuardScope,
}

/// What of a packet's source must be the pod's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum GuardScope {
    /// The hardware address.
    Hardware,
    /// The hardware address and the IP address: one of the lease's, or the link-local one.
    Addresses,
}

fn mac_text<S: serde::Serializer>(mac: &[u8; 6], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&mac.map(|byte| format!("{byte:02x}")).join(":"))
}

/// When a lease began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Since {
    /// Milliseconds of `CLOCK_BOOTTIME`.
    pub boot_ms: u64,
    /// Seconds since 1970, for people.
    pub unix_seconds: u64,
}

/// Who holds what, since when.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// The runtime's ID of the pod's sandbox. With [`Lease::ifname`] the key.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The interface in the pod.
    pub ifname: String,
    /// The network's name; `None` if unknown (rebuilt from a link without room for it).
    pub network: Option<String>,
    /// Where the addresses come from.
    pub pool: Pool,
    /// The addresses, at most [`MAX_ADDRESSES`].
    pub addresses: Vec<LeasedAddress>,
    /// The host's end of the link.
    pub veth: HostVeth,
    /// The pod's namespace, if known.
    pub netns: Option<NetnsId>,
    /// When it began.
    pub since: Since,
    /// Ports of the node that lead to the pod by rules of this lease, without repetitions. Of an address
    /// family that the pod has, the first address is meant.
    pub host_ports: Vec<HostPort>,
    /// How the link is joined to the host.
    pub datapath: Datapath,
    /// What the pod's packets may come from; `None` if nobody looks.
    pub guard: Option<Guard>,
    /// Fields of later versions, kept as they are: type and value.
    #[serde(skip)]
    pub other: Vec<(u8, Vec<u8>)>,
}

/// Why a lease cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// Too many addresses.
    #[error("a lease holds at most {MAX_ADDRESSES} addresses, not {0}")]
    TooManyAddresses(usize),
    /// Too long texts, or too many host ports (some 150 fit beside the usual names).
    #[error(
        "the lease of container {container_id} with {host_ports} host ports does not fit into a record of {RECORD_SIZE} bytes"
    )]
    TooLong {
        /// Whose lease.
        container_id: String,
        /// How many host ports it has.
        host_ports: usize,
    },
}

/// The header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The boot that the leases belong to.
    pub boot_id: [u8; 16],
    /// Number of slots that were ever in use.
    pub slots: u32,
    /// Number of leases. Written after the entry that changes it, so it may be one behind where a process
    /// was killed; the store is then rebuilt, as after any damage.
    pub leases: u32,
}

/// Why a header cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not a lease store, or damaged.
    #[error("the header of the lease store cannot be read")]
    Unreadable,
    /// Written by a newer program.
    #[error("the lease store has version {0}, this program reads up to {VERSION}")]
    Newer(u32),
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = Vec::with_capacity(HEADER_SIZE);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(ENTRY_SIZE as u16).to_le_bytes());
        bytes.extend_from_slice(&(RECORD_SIZE as u16).to_le_bytes());
        bytes.extend_from_slice(&self.boot_id);
        bytes.extend_from_slice(&self.slots.to_le_bytes());
        bytes.extend_from_slice(&self.leases.to_le_bytes());
        sealed(bytes)
    }

    /// Reads a header.
    pub fn decode(bytes: &[u8]) -> Result<Header, HeaderError> {
        let bytes = bytes.get(..HEADER_SIZE).filter(|b| b.starts_with(MAGIC) && is_sealed(b));
        let bytes = bytes.ok_or(HeaderError::Unreadable)?;
        let number = |at| field(bytes, at).map(u32::from_le_bytes).ok_or(HeaderError::Unreadable);
        let version = number(8)?;
        if version > VERSION {
            return Err(HeaderError::Newer(version));
        }
        let sizes = [ENTRY_SIZE as u16, RECORD_SIZE as u16].map(u16::to_le_bytes).concat();
        let slots = number(32)?;
        if version != VERSION || bytes.get(12..16) != Some(&sizes) || slots > MAX_SLOTS {
            return Err(HeaderError::Unreadable);
        }
        let boot_id = field(bytes, 16).ok_or(HeaderError::Unreadable)?;
        Ok(Header { boot_id, slots, leases: number(36)? })
    }
}

/// Fills up to a fixed size, the last 8 bytes being the checksum of all before.
fn sealed<const N: usize>(mut bytes: Vec<u8>) -> [u8; N] {
    bytes.resize(N - 8, 0);
    let sum = checksum(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    let mut out = [0; N];
    out.copy_from_slice(&bytes);
    out
}

fn is_sealed(bytes: &[u8]) -> bool {
    match bytes.split_last_chunk::<8>() {
        Some((body, sum)) => checksum(body) == u64::from_le_bytes(*sum),
        None => false,
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// What an index entry says about its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing is here.
    Free,
    /// A lease.
    Used(UsedEntry),
    /// Neither: a bit flipped, or something foreign was written over it.
    Damaged,
}

/// The index entry of a slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedEntry {
    /// Hash of the key.
    pub key: u64,
    /// Tags of the addresses; 0 for none.
    pub tags: [u64; MAX_ADDRESSES],
    /// Checksum of the record.
    pub record: u64,
}

impl Entry {
    /// Reads an entry.
    pub fn decode(bytes: &[u8]) -> Entry {
        Entry::try_decode(bytes).unwrap_or(Entry::Damaged)
    }

    fn try_decode(bytes: &[u8]) -> Option<Entry> {
        let bytes = bytes.get(..ENTRY_SIZE)?;
        if bytes.iter().all(|b| *b == 0) {
            return Some(Entry::Free);
        }
        if !is_sealed(bytes) || field(bytes, 40).map(u32::from_le_bytes) != Some(KIND_LEASE) {
            return None;
        }
        let word = |at| field(bytes, at).map(u64::from_le_bytes);
        Some(Entry::Used(UsedEntry {
            key: word(0)?,
            tags: [word(8)?, word(16)?, word(24)?, word(32)?],
            record: word(48)?,
        }))
    }
}

impl UsedEntry {
    fn encode(&self) -> [u8; ENTRY_SIZE] {
        let mut bytes = self.key.to_le_bytes().to_vec();
        for tag in self.tags {
            bytes.extend_from_slice(&tag.to_le_bytes());
        }
        bytes.extend_from_slice(&u64::from(KIND_LEASE).to_le_bytes());
        bytes.extend_from_slice(&self.record.to_le_bytes());
        sealed(bytes)
    }
}

/// The bytes of a cursor.
pub fn encode_cursor(hash: u64, last: IpAddr) -> [u8; CURSOR_SIZE] {
    let mut bytes = hash.to_le_bytes().to_vec();
    bytes.extend_from_slice(&v6(last).octets());
    sealed(bytes)
}

/// The address in a cursor, if it is whole and the cursor of that hash.
pub fn decode_cursor(bytes: &[u8], hash: u64) -> Option<IpAddr> {
    let bytes = bytes.get(..CURSOR_SIZE).filter(|b| is_sealed(b))?;
    if field(bytes, 0).map(u64::from_le_bytes)? != hash {
        return None;
    }
    Some(Ipv6Addr::from(field::<16>(bytes, 8)?).to_canonical())
}

/// Offset of the cursor of that hash in the file.
pub fn cursor_offset(hash: u64) -> u64 {
    HEADER_SIZE as u64 + (hash % CURSORS) * CURSOR_SIZE as u64
}

impl Lease {
    /// The pool in which this lease's addresses are taken.
    pub fn pool_id(&self) -> PoolId {
        PoolId::new(&self.pool, self.network.as_deref().unwrap_or_default())
    }

    /// The bytes of the lease's entry and record.
    pub fn encode(&self) -> Result<([u8; ENTRY_SIZE], [u8; RECORD_SIZE]), EncodeError> {
        if self.addresses.len() > MAX_ADDRESSES {
            return Err(EncodeError::TooManyAddresses(self.addresses.len()));
        }
        let too_long = || EncodeError::TooLong {
            container_id: self.container_id.clone(),
            host_ports: self.host_ports.len(),
        };
        let mut bytes = Vec::with_capacity(RECORD_SIZE);
        for (kind, value) in self.fields() {
            let length = u16::try_from(value.len()).map_err(|_| too_long())?;
            bytes.push(kind);
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&value);
        }
        if bytes.len() > RECORD_SIZE {
            return Err(too_long());
        }
        bytes.resize(RECORD_SIZE, 0);
        let mut record = [0; RECORD_SIZE];
        record.copy_from_slice(&bytes);
        let tags = self.tags();
        let key = key_hash(&self.container_id, &self.ifname);
        let entry = UsedEntry { key, tags, record: checksum(&record) };
        Ok((entry.encode(), record))
    }

    fn tags(&self) -> [u64; MAX_ADDRESSES] {
        let mut tags = [0; MAX_ADDRESSES];
        for (tag, leased) in tags.iter_mut().zip(&self.addresses) {
            *tag = self.pool_id().tag(leased.address);
        }
        tags
    }

    fn fields(&self) -> Vec<(u8, Vec<u8>)> {
        let pool = match self.pool {
            Pool::Unknown => 0,
            Pool::Blocks => 1,
            Pool::Ranges => 2,
            Pool::Delegated => 3,
        };
        let mut fields =
            vec![(1, self.container_id.as_bytes().to_vec()), (2, self.ifname.as_bytes().to_vec())];
        fields.extend(self.network.as_ref().map(|n| (3, n.as_bytes().to_vec())));
        fields.push((4, vec![pool]));
        for leased in &self.addresses {
            let mut value = vec![if leased.masquerade { FLAG_MASQUERADE } else { 0 }, leased.subnet_length];
            match leased.address {
                IpAddr::V4(a) => value.extend_from_slice(&a.octets()),
                IpAddr::V6(a) => value.extend_from_slice(&a.octets()),
            }
            fields.push((5, value));
        }
        let mut veth = self.veth.index.to_le_bytes().to_vec();
        veth.extend_from_slice(self.veth.name.as_bytes());
        fields.push((6, veth));
        fields.extend(self.netns.map(|n| (7, [n.device, n.inode].map(u64::to_le_bytes).concat())));
        let since = [self.since.boot_ms, self.since.unix_seconds].map(u64::to_le_bytes).concat();
        fields.push((8, since));
        fields.extend(host_port::encode(&self.host_ports).into_iter().map(|value| (9, value)));
        fields.extend(self.guard.map(|guard| (10, guard_field(&guard))));
        fields.extend((self.datapath == Datapath::Routed).then(|| (12, vec![2])));
        fields.extend(self.other.iter().cloned());
        fields
    }

    /// Reads the record of a slot whose entry is `entry`; `None` if the two do not fit, or if the record
    /// cannot be read or could not be written again: a repair writes all that was read.
    pub fn decode(entry: &UsedEntry, record: &[u8]) -> Option<Lease> {
        let record = record.get(..RECORD_SIZE)?;
        if checksum(record) != entry.record {
            return None;
        }
        Lease::salvage(entry, record)
    }

    /// Reads a record that does not fit its entry's checksum: a process was killed between writing the one
    /// and the other, or a bit flipped. Key and addresses are those of the entry, or it is `None`; all else
    /// is worth only what nobody knows better.
    pub fn salvage(entry: &UsedEntry, record: &[u8]) -> Option<Lease> {
        let record = record.get(..RECORD_SIZE)?;
        let mut lease = Lease::default();
        let mut rest = record;
        while let [kind, low, high, behind @ ..] = rest {
            if *kind == 0 {
                break;
            }
            let length = usize::from(u16::from_le_bytes([*low, *high]));
            lease.read_field(*kind, behind.get(..length)?)?;
            rest = behind.get(length..)?;
        }
        let fits = key_hash(&lease.container_id, &lease.ifname) == entry.key;
        let damaged = checksum(record) != entry.record && lease.tags() != entry.tags;
        (fits && !damaged && lease.encode().is_ok()).then_some(lease)
    }

    fn read_field(&mut self, kind: u8, value: &[u8]) -> Option<()> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        let pair = || {
            let word = |at| field(value, at).map(u64::from_le_bytes);
            Some((word(0)?, word(8)?))
        };
        match kind {
            1 => self.container_id = text(value)?,
            2 => self.ifname = text(value)?,
            3 => self.network = Some(text(value)?),
            4 => {
                self.pool = match value {
                    [1] => Pool::Blocks,
                    [2] => Pool::Ranges,
                    [3] => Pool::Delegated,
                    _ => Pool::Unknown,
                }
            }
            5 => {
                let (head, address) = value.split_at_checked(2)?;
                let [flags, subnet_length] = head else { return None };
                let address = match address.len() {
                    4 => IpAddr::from(field::<4>(address, 0)?),
                    _ => IpAddr::from(field::<16>(address, 0)?),
                };
                let masquerade = flags & FLAG_MASQUERADE != 0;
                self.addresses.push(LeasedAddress { address, subnet_length: *subnet_length, masquerade });
            }
            6 => {
                let (index, name) = value.split_first_chunk::<4>()?;
                self.veth = HostVeth { name: text(name)?, index: u32::from_le_bytes(*index) };
            }
            7 => self.netns = pair().map(|(device, inode)| NetnsId { device, inode }),
            8 => {
                let (boot_ms, unix_seconds) = pair()?;
                self.since = Since { boot_ms, unix_seconds };
            }
            9 => self.host_ports.extend(host_port::decode(value)?),
            10 => self.guard = Some(read_guard(value)?),
            12 => {
                self.datapath = match value {
                    [1] => Datapath::Bridge,
                    [2] => Datapath::Routed,
                    _ => return None,
                }
            }
            _ => self.other.push((kind, value.to_vec())),
        }
        Some(())
    }
}

fn guard_field(guard: &Guard) -> Vec<u8> {
    let scope = match guard.scope {
        GuardScope::Hardware => 1,
        GuardScope::Addresses => 2,
    };
    [&[scope], guard.mac.as_slice()].concat()
}

fn read_guard(value: &[u8]) -> Option<Guard> {
    let (scope, mac) = value.split_first()?;
    let scope = match scope {
        1 => GuardScope::Hardware,
        2 => GuardScope::Addresses,
        _ => return None,
    };
    Some(Guard { mac: mac.try_into().ok()?, scope })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host_port::{HostIp, Transport};
    use proptest::prelude::*;

    fn lease() -> Lease {
        Lease {
            container_id: "9e107d9d372bb6826bd81d3542a419d6".into(),
            ifname: "eth0".into(),
            network: Some("plat".into()),
            pool: Pool::Blocks,
            addresses: vec![
                LeasedAddress { address: [10, 244, 3, 7].into(), subnet_length: 24, masquerade: false },
                LeasedAddress {
                    address: "fd00:10:244:3::7".parse().unwrap(),
                    subnet_length: 64,
                    masquerade: true,
                },
            ],
            veth: HostVeth { name: "plat0badcafe".into(), index: 17 },
            netns: Some(NetnsId { device: 4, inode: 4_026_532_409 }),
            since: Since { boot_ms: 1234, unix_seconds: 1_790_000_000 },
            host_ports: host_ports(2),
            guard: Some(Guard { mac: [0x0a, 0x70, 10, 244, 3, 7], scope: GuardScope::Addresses }),
            datapath: Datapath::Routed,
            other: vec![(200, vec![1, 2, 3])],
        }
    }

    fn host_ports(count: u16) -> Vec<HostPort> {
        let protocol = Transport::Tcp;
        let port = |n| HostPort { host_ip: HostIp::Any, protocol, host_port: n, container_port: n };
        (8000..8000 + count).map(port).collect()
    }

    fn used(bytes: &[u8]) -> UsedEntry {
        match Entry::decode(bytes) {
            Entry::Used(entry) => entry,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_lease_comes_back_as_it_was_with_fields_of_later_versions() {
        let (entry, record) = lease().encode().unwrap();
        assert_eq!(Lease::decode(&used(&entry), &record), Some(lease()));
    }

    #[test]
    fn a_hardware_address_is_shown_as_people_write_it() {
        let shown = serde_json::to_value(lease()).unwrap();
        assert_eq!(shown["guard"], serde_json::json!({"mac": "0a:70:0a:f4:03:07", "scope": "addresses"}));
    }

    #[test]
    fn no_single_flipped_bit_goes_unseen() {
        let (entry, record) = lease().encode().unwrap();
        for bit in 0..ENTRY_SIZE * 8 {
            let mut bad = entry;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Entry::decode(&bad), Entry::Damaged, "entry bit {bit}");
        }
        for bit in 0..RECORD_SIZE * 8 {
            let mut bad = record;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Lease::decode(&used(&entry), &bad), None, "record bit {bit}");
        }
        let header = Header { boot_id: [7; 16], slots: 3, leases: 2 }.encode();
        for bit in 0..HEADER_SIZE * 8 {
            let mut bad = header;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&bad), Err(HeaderError::Unreadable), "header bit {bit}");
        }
    }

    #[test]
    fn a_newer_store_is_told_from_a_damaged_one() {
        let header = Header { boot_id: [7; 16], slots: 3, leases: 2 };
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        let mut newer = header.encode()[..56].to_vec();
        newer[8] = 9;
        assert_eq!(Header::decode(&sealed::<HEADER_SIZE>(newer)), Err(HeaderError::Newer(9)));
        assert_eq!(Header::decode(&[]), Err(HeaderError::Unreadable));
    }

    #[test]
    fn a_free_slot_is_all_zero() {
        assert_eq!(Entry::decode(&[0; ENTRY_SIZE]), Entry::Free);
        assert_eq!(Entry::decode(&[0; 10]), Entry::Damaged);
    }

    #[test]
    fn the_longest_names_fit() {
        let long = Lease {
            container_id: "c".repeat(MAX_CONTAINER_ID),
            ifname: "i".repeat(15),
            network: Some("n".repeat(MAX_NETWORK_NAME)),
            addresses: vec![lease().addresses[1]; MAX_ADDRESSES],
            ..lease()
        };
        assert!(long.encode().is_ok());
        let more = Lease { addresses: vec![long.addresses[0]; 5], ..long.clone() };
        assert_eq!(more.encode(), Err(EncodeError::TooManyAddresses(5)));
        let longer = Lease { other: vec![(99, vec![0; 600])], ..long };
        assert!(matches!(longer.encode(), Err(EncodeError::TooLong { .. })));
    }

    #[test]
    fn a_hundred_host_ports_fit_and_what_does_not_is_refused_with_its_number() {
        let with = |count| Lease { container_id: "c".repeat(64), host_ports: host_ports(count), ..lease() };
        assert!(with(100).encode().is_ok());
        assert_eq!(
            with(200).encode().unwrap_err().to_string(),
            format!(
                "the lease of container {} with 200 host ports does not fit into a record of 1024 bytes",
                "c".repeat(64)
            )
        );
    }

    #[test]
    fn a_record_that_could_not_be_written_again_is_not_read() {
        let address = [5, 6, 0, 0, 24, 10, 244, 3, 7];
        for (fields, fits) in [
            (vec![address.to_vec(); MAX_ADDRESSES], true),
            (vec![address.to_vec(); MAX_ADDRESSES + 1], false),
            // With what is absent here, and would be written, it is too long.
            (vec![[vec![200, 0xf0, 3], vec![0; 0x3f0]].concat()], false),
        ] {
            let mut record = fields.concat();
            record.resize(RECORD_SIZE, 0);
            let entry = UsedEntry { key: key_hash("", ""), tags: [0; 4], record: checksum(&record) };
            assert_eq!(Lease::decode(&entry, &record).is_some(), fits, "{fields:?}");
        }
    }

    #[test]
    fn tags_of_neighbouring_addresses_spread_over_the_lowest_bits() {
        let pool = PoolId::new(&Pool::Blocks, "");
        let buckets: std::collections::HashSet<u64> = (0..4096u32)
            .map(|n| pool.tag(std::net::Ipv4Addr::from(0x0af4_0000 + n).into()) & 0xfff)
            .collect();
        // Thrown at random, 4,096 balls hit 63 % of as many buckets.
        assert!(buckets.len() > 2400, "{}", buckets.len());
    }

    #[test]
    fn one_address_has_another_tag_in_another_pool() {
        let address = [10, 1, 0, 2].into();
        let ids = [
            PoolId::UNKNOWN,
            PoolId::new(&Pool::Blocks, "a"),
            PoolId::new(&Pool::Ranges, "a"),
            PoolId::new(&Pool::Ranges, "b"),
            PoolId::new(&Pool::Delegated, "a"),
        ];
        for (i, a) in ids.iter().enumerate() {
            for b in &ids[i + 1..] {
                assert_ne!(a.tag(address), b.tag(address));
                assert_ne!(a.cursor(0), b.cursor(0));
            }
        }
        assert_eq!(PoolId::new(&Pool::Blocks, "a"), PoolId::new(&Pool::Blocks, "b"), "one pool per node");
    }

    #[test]
    fn cursors_come_back_unless_another_took_their_place() {
        for address in ["10.244.3.7", "fd00::7"] {
            let address: IpAddr = address.parse().unwrap();
            let bytes = encode_cursor(42, address);
            assert_eq!(decode_cursor(&bytes, 42), Some(address));
            assert_eq!(decode_cursor(&bytes, 43), None);
            assert_eq!(decode_cursor(&[0; CURSOR_SIZE], 0), None);
        }
        assert!(cursor_offset(u64::MAX) + CURSOR_SIZE as u64 <= entry_offset(0));
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1100)) {
            let _ = Header::decode(&bytes);
            let _ = Entry::decode(&bytes);
            let _ = decode_cursor(&bytes, 1);
            // With a fitting checksum, so that the fields are really read.
            let mut record = bytes;
            record.resize(RECORD_SIZE, 0);
            let entry = UsedEntry { key: 1, tags: [0; 4], record: checksum(&record) };
            let _ = Lease::decode(&entry, &record);
        }

        #[test]
        fn texts_that_differ_have_different_hashes(a in "[a-z]{0,40}", b in "[a-z]{0,40}") {
            prop_assert_eq!(key_hash(&a, "eth0") == key_hash(&b, "eth0"), a == b);
            prop_assert_eq!(key_hash(&a, &b) == key_hash(&b, &a), a == b);
        }
    }
}
