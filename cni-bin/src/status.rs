//! STATUS: could an ADD be served now? Read-only, without the lease store's lock, in milliseconds: runtimes
//! ask every few seconds and wait for the answer.
//!
//! A failure makes the node NotReady and in time evicts its pods. So only two things are failures, both code
//! 50: no block to lease from, and a lease store that cannot be written (read-only, full, of a newer
//! version). A full block or an agent that is away is success (Events and metrics tell);
//! `failStatusWhenFull` makes the former a failure too. Code 51 ("and running pods may be impaired") is
//! never said: what pods run on is in the kernel, and a node whose agent is dead forwards as before.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use plat_crds::lease::PoolId;
use rustix::fs::{Access, access, statvfs};

use crate::add::delegate_of;
use crate::call::Call;
use crate::config::IpamKind;
use crate::config::ranges::{self, RangeSet};
use crate::error::{Code, Error};
use crate::json::Json;
use crate::pool::{self, Taken};
use crate::spec::SpecVersion;
use crate::store::{Store, Survey};
use crate::{delegate, pick};

/// Says whether an ADD could be served.
pub fn status(call: &Call) -> Result<(), Error> {
    call.network.require("STATUS", SpecVersion::V1_1_0)?;
    check_store(call)?;
    let mut may_grow = Vec::new();
    let sets = match call.network.ipam {
        IpamKind::Blocks => {
            let file = pool::read_blocks(&call.network.run_dir).map_err(not_available)?;
            let has_block = file.boot_id == call.boot.text && !file.blocks.is_empty();
            // At time 0 nothing has run out: an agent that is away is no reason to evict pods, nor is a
            // block that drains.
            match pool::from_blocks(&file, &call.boot, 0) {
                Ok(source) => {
                    may_grow = file.may_grow;
                    Some((source.sets, PoolId::new(&source.pool, "")))
                }
                Err(error) if !has_block => return Err(not_available(error)),
                Err(_) => None,
            }
        }
        IpamKind::Ranges => {
            let ipam = call.network.json.get("ipam");
            let sets = ranges::parse(ipam, &Json::Null, call.network.version)?;
            Some((sets, PoolId::new(&plat_crds::lease::Pool::Ranges, &call.network.name)))
        }
        IpamKind::None | IpamKind::Delegated(_) => None,
    };
    if let (true, Some((mut sets, pool))) = (call.network.full_is_failure, sets) {
        // A pool that another block may come for is not full yet.
        sets.retain(|set| set.family().is_none_or(|family| !may_grow.contains(&family)));
        check_free(call, &sets, pool)?;
    }
    match delegate_of(call) {
        Some(plugin) => delegate::run(&plugin, &call.plugin_path, "STATUS", &call.input).map(|_| ()),
        None => Ok(()),
    }
}

fn not_available(error: Error) -> Error {
    Error { code: Code::NotAvailable as u32, ..error }
}

/// Whether the store can be written, or made if it is missing.
fn check_store(call: &Call) -> Result<(), Error> {
    let path = &call.network.leases;
    let cannot =
        |why: String| Err(Error::because(Code::NotAvailable, "the lease store cannot be written", why));
    let mut place = path.as_path();
    while fs::symlink_metadata(place).is_err() {
        match place.parent() {
            Some(parent) if parent != Path::new("") => place = parent,
            _ => break,
        }
    }
    if let Err(errno) = access(place, Access::WRITE_OK) {
        return cannot(format!("{}: {}", place.display(), std::io::Error::from(errno).kind()));
    }
    let store = Store::at(path);
    if let Some(newer) = store.newer() {
        return cannot(newer.to_string());
    }
    if is_full(place) && !store.glance(&call.boot).is_some_and(|survey| survey.has_free_slot()) {
        return cannot(format!("{}: the file system is full", place.display()));
    }
    Ok(())
}

/// Whether the file system has no room for one more lease. A slot that was in use before has its room already.
/// One without limits (a tmpfs may have none) counts no blocks and is never full.
fn is_full(place: &Path) -> bool {
    // A page each for header, entry and record.
    const ROOM: u64 = 3 * 4096;
    statvfs(place).is_ok_and(|fs| fs.f_blocks > 0 && fs.f_bfree.saturating_mul(fs.f_frsize) < ROOM)
}

struct Unlocked<'a> {
    survey: &'a Survey,
    pool: PoolId,
}

impl Taken for Unlocked<'_> {
    fn is_taken(&self, address: &IpAddr) -> bool {
        self.survey.is_taken(self.pool, address)
    }

    fn last(&self, _: u32) -> Option<IpAddr> {
        None
    }
}

/// Without the lock a reading may be off by the changes of this moment, which is as good as the answer can
/// be. A store that cannot be read at all is repaired by the next ADD.
fn check_free(call: &Call, sets: &[RangeSet], pool: PoolId) -> Result<(), Error> {
    let Some(survey) = Store::at(&call.network.leases).glance(&call.boot) else { return Ok(()) };
    let view = Unlocked { survey: &survey, pool };
    match sets.iter().find(|set| pick::pick(set, None, |a| view.is_taken(a)).is_none()) {
        Some(full) => {
            let msg = format!("no free address in {}", full.describe());
            Err(Error::because(Code::NotAvailable, msg, "failStatusWhenFull is set"))
        }
        None => Ok(()),
    }
}
