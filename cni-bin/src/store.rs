//! The lease store: one file per node, locked while it is read and changed.
//!
//! This is the file's edge; its format and the reasons for it are [`plat_crds::lease`]. The file is a fast
//! copy, the kernel is the proof: whatever is missing, damaged, foreign or of another boot is rebuilt from
//! the kernel ([`Kernel`]) under the lock, before anything is decided by it. A file of a newer version is
//! left alone.
//!
//! Crash safety without fsync: the file lives in memory (tmpfs) and every change becomes true by one write
//! of one entry. A process that is killed holds no lock any more and leaves either the old or the new
//! state, or a record that does not fit its entry, which the next one repairs from the kernel.

use std::cell::{Cell, OnceCell};
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use plat_crds::lease::{
    CURSOR_SIZE, CURSORS, ENTRY_SIZE, EncodeError, Entry, HEADER_SIZE, Header, HeaderError, Lease, MAX_SLOTS,
    PoolId, RECORD_SIZE, UsedEntry, cursor_offset, decode_cursor, encode_cursor, entry_offset, key_hash,
    record_offset,
};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::boot::BootId;
use crate::fail;
use crate::link::Link;
use crate::netlink;

/// How many entries are read at once.
const CHUNK: u32 = 1024;
/// The store's file may be replaced while we wait for its lock; so often it is opened again.
const OPEN_TRIES: u32 = 10;
/// Who waits this long queues for the lock. Who waits shorter looks again and again: a queue is left by
/// leaving a thread behind, and the agent, which lives long and waits shortly, would gather them.
const QUEUED: Duration = Duration::from_secs(1);
/// How often to look.
const PAUSE: Duration = Duration::from_millis(2);

/// The kernel, as far as leases need it.
pub trait Kernel {
    /// The leases that the kernel proves: one for each host veth with our alias, and one for each pod of another
    /// network ([`crate::foreign`]).
    fn held(&mut self) -> Result<Vec<Lease>, netlink::Error>;
    /// All host veths.
    fn links(&mut self) -> Result<Vec<Link>, netlink::Error>;
    /// The pods of other networks, but for those whose link a known lease has.
    fn foreign(&mut self, _known: &[Lease]) -> Result<Vec<Lease>, netlink::Error> {
        Ok(Vec::new())
    }
    /// Whether a pod of another network has an address, or may be about to have it; of that network alone, if one
    /// is named.
    fn is_foreign(&mut self, _address: &IpAddr, _network: Option<&str>) -> Result<bool, netlink::Error> {
        Ok(false)
    }
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process holds the lock for too long.
    #[error("lease store {} is locked by another process for more than {} s", path.display(), waited.as_secs())]
    Busy {
        /// The file.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// A newer program wrote the file.
    #[error("lease store {} cannot be used: {source}; install the CNI binary of the running version", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// What the header says.
        source: HeaderError,
    },
    /// The file system refused.
    #[error("{what} {}: {}", path.display(), describe(source))]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The store had to be rebuilt, and the kernel would not say what is held.
    #[error("lease store {} must be rebuilt from the kernel: {source}", path.display())]
    Rebuild {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: netlink::Error,
    },
    /// No slot is left.
    #[error("lease store {} is full: it holds {MAX_SLOTS} leases", .0.display())]
    Full(PathBuf),
    /// A lease cannot be written.
    #[error(transparent)]
    Encode(#[from] EncodeError),
}

/// Short words for what an administrator can do something about.
fn describe(error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC) => "the file system is full".to_owned(),
        Some(Errno::DQUOT) => "the quota is exhausted".to_owned(),
        Some(Errno::ROFS) => "the file system is read-only".to_owned(),
        // Runtimes take "no such file or directory" in the error of a DEL for success.
        Some(Errno::NOENT) => "it does not exist".to_owned(),
        _ => error.kind().to_string(),
    }
}

/// A lease store's place.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
}

/// Whether a missing store is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// Make it, from what the kernel holds.
    Create,
    /// Leave it missing.
    Leave,
}

impl Store {
    /// The store in that file.
    pub fn at(path: &Path) -> Store {
        Store { path: path.to_owned() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens and locks the store, and repairs it if need be; `None` if it is missing and is to stay so.
    pub fn lock<'a>(
        &self,
        boot: &BootId,
        wait: Duration,
        missing: Missing,
        kernel: &'a mut dyn Kernel,
    ) -> Result<Option<Locked<'a>>, Error> {
        let Some(file) = self.open_locked(wait, missing)? else { return Ok(None) };
        let header = Header { boot_id: boot.bytes, slots: 0, leases: 0 };
        let mut locked = Locked { file, path: self.path.clone(), header, kernel, repaired: None };
        locked.read_header()?;
        Ok(Some(locked))
    }

    /// Reads the entries without the lock, for an answer that may be off by the changes of this moment;
    /// `None` if there is nothing to read or it does not fit.
    pub fn glance(&self, boot: &BootId) -> Option<Survey> {
        let (file, header) = self.peek()?;
        let header = header.ok().filter(|header| header.boot_id == boot.bytes)?;
        let entries = Entries { file: &file, header };
        entries.survey(0).ok().flatten()
    }

    /// The number of leases, of all pools, as the header has it; without the lock, so it may be off by the changes
    /// of this moment. Reads a few bytes, however many leases there are.
    pub fn count(&self, boot: &BootId) -> Option<u32> {
        let header = self.peek()?.1.ok().filter(|header| header.boot_id == boot.bytes)?;
        Some(header.leases)
    }

    /// That a newer program wrote the file, if one did; without the lock.
    pub fn newer(&self) -> Option<Error> {
        match self.peek()?.1 {
            Err(source @ HeaderError::Newer(_)) => Some(Error::Newer { path: self.path.clone(), source }),
            _ => None,
        }
    }

    fn peek(&self) -> Option<(File, Result<Header, HeaderError>)> {
        let file = File::open(&self.path).ok()?;
        let mut bytes = [0; HEADER_SIZE];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let header = Header::decode(&bytes);
        Some((file, header))
    }

    fn open_locked(&self, wait: Duration, missing: Missing) -> Result<Option<File>, Error> {
        let deadline = Instant::now() + wait;
        for _ in 0..OPEN_TRIES {
            let Some(file) = self.open(missing)? else { return Ok(None) };
            let left = deadline.saturating_duration_since(Instant::now());
            let file = lock_file(file, left).map_err(|e| self.io("lock", e))?;
            let Some(file) = file else { return Err(Error::Busy { path: self.path.clone(), waited: wait }) };
            // While we waited, someone may have removed or replaced the file that we opened.
            let opened = file.metadata().map_err(|e| self.io("look at", e))?;
            match fs::metadata(&self.path) {
                Ok(now) if (now.dev(), now.ino()) == (opened.dev(), opened.ino()) => return Ok(Some(file)),
                _ => {}
            }
        }
        Err(self.io("lock", io::Error::other("it is replaced all the time")))
    }

    fn open(&self, missing: Missing) -> Result<Option<File>, Error> {
        let open = || {
            let create = missing == Missing::Create;
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(create)
                .truncate(false)
                .mode(0o600)
                .open(&self.path)
        };
        match open() {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && missing == Missing::Leave => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(dir) = self.path.parent() {
                    fs::create_dir_all(dir).map_err(|e| self.io("create the folder of", e))?;
                }
                open().map(Some).map_err(|e| self.io("create", e))
            }
            Err(error) => Err(self.io("open", error)),
        }
    }

    fn io(&self, what: &'static str, source: io::Error) -> Error {
        Error::Io { what, path: self.path.clone(), source }
    }
}

/// Takes the lock; `None` if it cannot be had in time.
fn lock_file(file: File, wait: Duration) -> io::Result<Option<File>> {
    let deadline = Instant::now() + wait;
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        if wait >= QUEUED {
            return queue_for(file, wait);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Waits in the kernel's own queue, which is fair, in a thread of its own, as a blocking `flock` knows no
/// deadline. A thread that is left waiting gives the lock back as soon as it gets it.
fn queue_for(file: File, wait: Duration) -> io::Result<Option<File>> {
    let (sender, receiver) = mpsc::sync_channel(0);
    std::thread::Builder::new().name("lease-lock".to_owned()).spawn(move || {
        let locked = loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        // Whoever waited may have given up: then the file is closed here, and the lock with it.
        let _ = sender.send(locked.map(|()| file));
    })?;
    match receiver.recv_timeout(wait) {
        Ok(locked) => Ok(Some(locked?)),
        Err(_) => Ok(None),
    }
}

/// The store, while we hold its lock.
pub struct Locked<'a> {
    file: File,
    path: PathBuf,
    header: Header,
    kernel: &'a mut dyn Kernel,
    repaired: Option<&'static str>,
}

/// A lease with its place in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its slot.
    pub slot: u32,
    /// The lease.
    pub lease: Lease,
}

/// What one reading of all entries tells.
#[derive(Debug, Default)]
pub struct Survey {
    taken: Tags,
    /// Slot of the lease of the key that was looked for.
    found: Option<u32>,
    /// The first free slot.
    free: Option<u32>,
    /// Number of leases.
    pub count: u32,
}

impl Survey {
    /// Whether the key that was looked for has a lease.
    pub fn has_lease(&self) -> bool {
        self.found.is_some()
    }

    /// Whether a slot that was in use before is free.
    pub fn has_free_slot(&self) -> bool {
        self.free.is_some()
    }

    /// Whether a lease of that pool, or one of unknown origin, holds the address.
    pub fn is_taken(&self, pool: PoolId, address: &IpAddr) -> bool {
        self.taken.contains(pool.tag(*address)) || self.taken.contains(PoolId::UNKNOWN.tag(*address))
    }
}

/// The tags of all addresses that are held. Next-fit usually asks for the first one or two, for which
/// building a table of all would cost more than it saves; so that is done only for one who asks more.
#[derive(Debug, Default)]
struct Tags {
    list: Vec<u64>,
    asked: Cell<u32>,
    table: OnceCell<HashSet<u64>>,
}

impl Tags {
    fn contains(&self, tag: u64) -> bool {
        const FEW: u32 = 8;
        self.asked.set(self.asked.get().saturating_add(1));
        if self.asked.get() <= FEW {
            return self.list.contains(&tag);
        }
        self.table.get_or_init(|| self.list.iter().copied().collect()).contains(&tag)
    }
}

/// The index of a store's file.
struct Entries<'a> {
    file: &'a File,
    header: Header,
}

impl Entries<'_> {
    /// One reading of all entries; `None` if one is damaged or missing.
    fn survey(&self, key: u64) -> io::Result<Option<Survey>> {
        let mut survey = Survey::default();
        let mut whole = true;
        self.scan(|slot, entry| match entry {
            Entry::Free => {
                survey.free.get_or_insert(slot);
            }
            Entry::Used(used) => {
                survey.count += 1;
                survey.taken.list.extend(used.tags.iter().filter(|tag| **tag != 0));
                if used.key == key {
                    survey.found.get_or_insert(slot);
                }
            }
            Entry::Damaged => whole = false,
        })?;
        // An entry that was overwritten with zeros looks like a free one.
        Ok(Some(survey).filter(|survey| whole && survey.count == self.header.leases))
    }

    fn scan(&self, mut each: impl FnMut(u32, Entry)) -> io::Result<()> {
        let slots = self.header.slots;
        let mut buffer = vec![0; CHUNK.min(slots) as usize * ENTRY_SIZE];
        let mut first = 0;
        while first < slots {
            let count = CHUNK.min(slots - first);
            let bytes = buffer.get_mut(..count as usize * ENTRY_SIZE).unwrap_or_default();
            let read = read_at(self.file, bytes, entry_offset(first))?;
            // What is cut off reads as damaged.
            bytes.get_mut(read..).unwrap_or_default().fill(0xff);
            for (slot, entry) in (first..).zip(bytes.chunks_exact(ENTRY_SIZE)) {
                each(slot, Entry::decode(entry));
            }
            first += count;
        }
        Ok(())
    }
}

/// Reads what there is, and says how much that was.
fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = bytes.get_mut(done..).unwrap_or_default();
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

impl Locked<'_> {
    /// Why the store had to be rebuilt, if it had to.
    pub fn repaired(&self) -> Option<&'static str> {
        self.repaired
    }

    /// The kernel that the store was opened with.
    pub fn kernel(&mut self) -> &mut dyn Kernel {
        self.kernel
    }

    /// Reads the header; rebuilds the store if it does not fit.
    fn read_header(&mut self) -> Result<(), Error> {
        let mut bytes = [0; HEADER_SIZE];
        let length = self.file.metadata().map_err(|e| self.io("look at", e))?.len();
        // A short file leaves zeros behind, which are no header.
        self.read(&mut bytes, 0)?;
        match Header::decode(&bytes) {
            Err(source @ HeaderError::Newer(_)) => Err(Error::Newer { path: self.path.clone(), source }),
            Err(HeaderError::Unreadable) if length == 0 => {
                self.rebuild("it is new", Vec::new(), Vec::new(), &[])
            }
            Err(HeaderError::Unreadable) => {
                self.rebuild("its header cannot be read", Vec::new(), Vec::new(), &[])
            }
            Ok(header) if header.boot_id != self.header.boot_id => {
                self.rebuild("it is of another boot", Vec::new(), Vec::new(), &[])
            }
            Ok(header) => {
                self.header = header;
                if length < record_offset(header.slots) && header.slots > 0 {
                    return self.repair("it is cut off");
                }
                Ok(())
            }
        }
    }

    /// Reads all entries. Damage is repaired first.
    pub fn survey(&mut self, container_id: &str, ifname: &str) -> Result<Survey, Error> {
        let key = key_hash(container_id, ifname);
        if let Some(survey) = self.try_survey(key)? {
            return Ok(survey);
        }
        self.repair("an entry is damaged or missing")?;
        self.try_survey(key)?.ok_or_else(|| self.hopeless())
    }

    /// What was just written does not read as it was written: better no answer than a wrong one.
    fn hopeless(&self) -> Error {
        self.io("read", io::Error::other("it is damaged again right after its repair"))
    }

    fn try_survey(&self, key: u64) -> Result<Option<Survey>, Error> {
        self.entries().survey(key).map_err(|e| self.io("read", e))
    }

    fn entries(&self) -> Entries<'_> {
        Entries { file: &self.file, header: self.header }
    }

    /// The lease of a key, looked for first where it was written. Saves reading all entries.
    pub fn find_at(&mut self, slot: u32, container_id: &str, ifname: &str) -> Result<Option<Held>, Error> {
        if slot < self.header.slots
            && let Some(lease) = self.read_lease(slot)?
            && lease.container_id == container_id
            && lease.ifname == ifname
        {
            return Ok(Some(Held { slot, lease }));
        }
        self.find(container_id, ifname)
    }

    /// The lease of a key.
    pub fn find(&mut self, container_id: &str, ifname: &str) -> Result<Option<Held>, Error> {
        let survey = self.survey(container_id, ifname)?;
        let Some(slot) = survey.found else { return Ok(None) };
        if let Some(lease) = self.read_lease(slot)? {
            return Ok(Some(Held { slot, lease }));
        }
        // Reads all, and so repairs what cannot be read.
        let all = self.leases()?;
        Ok(all.into_iter().find(|h| h.lease.container_id == container_id && h.lease.ifname == ifname))
    }

    /// All leases. Damage is repaired first.
    pub fn leases(&mut self) -> Result<Vec<Held>, Error> {
        let (leases, whole) = self.read_all()?;
        if whole {
            return Ok(leases);
        }
        self.repair("an entry or record is damaged or missing")?;
        match self.read_all()? {
            (leases, true) => Ok(leases),
            (_, false) => Err(self.hopeless()),
        }
    }

    /// [`Locked::leases`], without their places.
    pub fn all(&mut self) -> Result<Vec<Lease>, Error> {
        Ok(self.leases()?.into_iter().map(|held| held.lease).collect())
    }

    /// All leases that can be read, and whether all can.
    fn read_all(&self) -> Result<(Vec<Held>, bool), Error> {
        let (mut leases, mut whole) = (Vec::new(), true);
        let mut used = Vec::new();
        let scanned = self.entries().scan(|slot, entry| match entry {
            Entry::Free => {}
            Entry::Used(entry) => used.push((slot, entry)),
            Entry::Damaged => whole = false,
        });
        scanned.map_err(|e| self.io("read", e))?;
        whole &= used.len() == self.header.leases as usize;
        for (slot, entry) in used {
            match self.read_record(slot, &entry)? {
                Some(lease) => leases.push(Held { slot, lease }),
                None => whole = false,
            }
        }
        Ok((leases, whole))
    }

    fn read_lease(&self, slot: u32) -> Result<Option<Lease>, Error> {
        let mut bytes = [0; ENTRY_SIZE];
        self.read(&mut bytes, entry_offset(slot))?;
        match Entry::decode(&bytes) {
            Entry::Used(entry) => self.read_record(slot, &entry),
            Entry::Free | Entry::Damaged => Ok(None),
        }
    }

    fn read_record(&self, slot: u32, entry: &UsedEntry) -> Result<Option<Lease>, Error> {
        let mut record = [0; RECORD_SIZE];
        self.read(&mut record, record_offset(slot))?;
        Ok(Lease::decode(entry, &record))
    }

    /// Writes a new lease into the free slot that the survey found.
    pub fn insert(&mut self, survey: &Survey, lease: &Lease) -> Result<u32, Error> {
        let slot = survey.free.unwrap_or(self.header.slots);
        if slot >= MAX_SLOTS {
            return Err(Error::Full(self.path.clone()));
        }
        self.put(slot, lease)?;
        let slots = self.header.slots.max(slot + 1);
        let header = Header { slots, leases: self.header.leases.saturating_add(1), ..self.header };
        match self.write_header(header) {
            Ok(()) => Ok(slot),
            Err(error) => {
                // An entry without its count would be found, and kept, by the next repair.
                let _ = self.write(&[0; ENTRY_SIZE], entry_offset(slot));
                Err(error)
            }
        }
    }

    fn write_header(&mut self, header: Header) -> Result<(), Error> {
        self.write(&header.encode(), 0)?;
        self.header = header;
        Ok(())
    }

    /// Writes a changed lease into its slot.
    pub fn replace(&mut self, held: &Held) -> Result<(), Error> {
        self.put(held.slot, &held.lease)
    }

    fn put(&mut self, slot: u32, lease: &Lease) -> Result<(), Error> {
        let (entry, record) = lease.encode()?;
        self.write(&record, record_offset(slot))?;
        self.write(&entry, entry_offset(slot))
    }

    /// Ends a lease.
    pub fn remove(&mut self, slot: u32) -> Result<(), Error> {
        self.write(&[0; ENTRY_SIZE], entry_offset(slot))?;
        self.write_header(Header { leases: self.header.leases.saturating_sub(1), ..self.header })
    }

    /// The address that was handed out last from a range set.
    pub fn cursor(&self, pool: PoolId, set: u32) -> Result<Option<IpAddr>, Error> {
        let hash = pool.cursor(set);
        let mut bytes = [0; CURSOR_SIZE];
        self.read(&mut bytes, cursor_offset(hash))?;
        Ok(decode_cursor(&bytes, hash))
    }

    /// Remembers the address that was handed out last from a range set.
    pub fn set_cursor(&mut self, pool: PoolId, set: u32, last: IpAddr) -> Result<(), Error> {
        let hash = pool.cursor(set);
        self.write(&encode_cursor(hash, last), cursor_offset(hash))
    }

    /// Rebuilds with what can still be read of the store. Its header is good.
    fn repair(&mut self, reason: &'static str) -> Result<(), Error> {
        let readable = self.read_all()?.0.into_iter().map(|held| held.lease).collect();
        let salvaged = self.salvage()?;
        let mut cursors = vec![0; CURSORS as usize * CURSOR_SIZE];
        self.read(&mut cursors, HEADER_SIZE as u64)?;
        self.rebuild(reason, readable, salvaged, &cursors)
    }

    /// What can be read of records that do not fit their entries.
    fn salvage(&self) -> Result<Vec<Lease>, Error> {
        let mut used = Vec::new();
        let scanned = self.entries().scan(|slot, entry| match entry {
            Entry::Used(entry) => used.push((slot, entry)),
            Entry::Free | Entry::Damaged => {}
        });
        scanned.map_err(|e| self.io("read", e))?;
        let mut salvaged = Vec::new();
        for (slot, entry) in used {
            let mut record = [0; RECORD_SIZE];
            self.read(&mut record, record_offset(slot))?;
            salvaged.extend(Lease::salvage(&entry, &record));
        }
        Ok(salvaged)
    }

    /// Writes the store anew: what was still readable, every lease that the kernel proves besides, and what
    /// can be salvaged of the others. A lease of which only the address is sure keeps that until its DEL or
    /// the sweep; one of which nothing can be read, exactly as long as a link holds it.
    fn rebuild(
        &mut self,
        reason: &'static str,
        readable: Vec<Lease>,
        salvaged: Vec<Lease>,
        cursors: &[u8],
    ) -> Result<(), Error> {
        let proven = self.kernel.held();
        let proven = proven.map_err(|source| Error::Rebuild { path: self.path.clone(), source })?;
        let leases = merge(readable, proven, salvaged);
        let count = u32::try_from(leases.len()).unwrap_or(u32::MAX);
        if count > MAX_SLOTS {
            return Err(Error::Full(self.path.clone()));
        }
        // Without a header the file is rebuilt again, should this be the last thing that we do.
        fail::step("store-empty").and_then(|()| self.file.set_len(0)).map_err(|e| self.io("empty", e))?;
        self.write(cursors, HEADER_SIZE as u64)?;
        for (slot, lease) in (0..count).zip(&leases) {
            self.put(slot, lease)?;
        }
        self.write_header(Header { slots: count, leases: count, ..self.header })?;
        self.repaired = Some(reason);
        Ok(())
    }

    /// Bytes behind the end of the file are left as they are.
    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), Error> {
        read_at(&self.file, bytes, offset).map(|_| ()).map_err(|e| self.io("read", e))
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), Error> {
        let write = || fail::step("store-write").and_then(|()| self.file.write_all_at(bytes, offset));
        write().map_err(|e| self.io("write", e))
    }

    fn io(&self, what: &'static str, source: io::Error) -> Error {
        Error::Io { what, path: self.path.clone(), source }
    }
}

/// What was readable, what the kernel proves besides, and what was salvaged besides. Pure.
fn merge(readable: Vec<Lease>, proven: Vec<Lease>, salvaged: Vec<Lease>) -> Vec<Lease> {
    let mut keys = HashSet::new();
    let mut fresh = |lease: &Lease| keys.insert((lease.container_id.clone(), lease.ifname.clone()));
    readable.into_iter().chain(proven).chain(salvaged).filter(|lease| fresh(lease)).collect()
}
