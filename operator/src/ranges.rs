//! Which ClusterCIDRs blocks may be carved from. Pure.
//!
//! Equal blocks cannot be handed out twice, as their names are equal. Blocks of *unequal* size could overlap
//! only if they came from two ranges, and that is guarded three times:
//! 1. the finalizer: a range never comes back in another size over living blocks;
//! 2. here: of two overlapping ranges only the older is ever `Ready` (then one that is so already, then the
//!    first by name), which is judged on live LISTs of both kinds; and it must have been so for one Lease duration, unless no other
//!    process can have a request under way (see [`stands`]);
//! 3. the agents: of two overlapping blocks they program the older and report `Overlapping`.
//!
//! A range that no node has a block of yet is refused whatever it overlaps with. One that is in use stays in
//! use when a Service range or a node turns up inside it: its other nodes need blocks, and no block that
//! holds a foreign address is ever carved ([`crate::claims`]). Only another range takes its `Ready` away.

use std::time::Duration;

use plat_crds::cluster_cidr::{Allocation, DEFAULT_QUARANTINE_SECONDS};
use plat_crds::condition::{self, OVERLAPPING, READY, Verdict};
use plat_crds::{Block, names};

use crate::facts::RangeFact;
use crate::reason;
use crate::sizing::{Sizing, sizing};
use crate::snapshot::{Facts, Snapshot};

/// Times in objects are cut to whole seconds: a condition may be that much younger than it says.
const WHOLE_SECOND: Duration = Duration::from_secs(1);

/// What holds for a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// The condition `Ready`.
    pub ready: Verdict,
    /// The condition `Overlapping`.
    pub overlapping: Verdict,
}

impl Judgement {
    /// Whether the range may serve nodes at all.
    pub fn is_good(&self) -> bool {
        self.ready.status == Some(true)
    }
}

/// Whether a good range's `Ready=True` has stood long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Blocks may be carved.
    Stands,
    /// Not before that much time from now.
    Wait(Duration),
    /// `Ready=True` has not been written yet.
    NotWritten,
}

/// Quarantine of the blocks of the range of that name; the default if it is gone.
pub fn quarantine_of(ranges: &Facts<RangeFact>, name: &str) -> Duration {
    quarantine(ranges.get(name).map(|range| &**range))
}

/// Quarantine of the range that a block lies in.
pub fn quarantine_over(ranges: &Facts<RangeFact>, block: &Block) -> Duration {
    let covers = |range: &&RangeFact| range.range.is_some_and(|range| range.covers(block));
    quarantine(ranges.values().map(|range| &**range).find(covers))
}

fn quarantine(range: Option<&RangeFact>) -> Duration {
    let longest =
        |range: &RangeFact| range.quarantine_seconds.max(range.status.quarantine_seconds.unwrap_or(0));
    let seconds = range.map_or(DEFAULT_QUARANTINE_SECONDS, longest);
    Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// The quarantine that holds, in seconds, for [`plat_crds::ClusterCIDRStatus::quarantine_seconds`].
pub fn quarantine_that_holds(range: &RangeFact, snapshot: &Snapshot) -> i32 {
    let (wanted, held) = (range.quarantine_seconds, range.status.quarantine_seconds.unwrap_or(0));
    if held <= wanted {
        return wanted;
    }
    // A block in quarantine has its time of release already.
    let mut in_use = snapshot.blocks.values().filter(|b| b.range == range.name && !b.is_quarantined());
    let ledger = &snapshot.memory.ledger;
    let knows = |node: &str| {
        let applied = snapshot.reports.get(node).and_then(|report| report.applied);
        ledger.carries(applied.and_then(|digest| ledger.number_of(digest)), &range.uid)
    };
    if in_use.all(|block| knows(&block.node)) { wanted } else { held }
}

/// Judges a range against everything else in the snapshot.
pub fn judge(range: &RangeFact, snapshot: &Snapshot) -> Judgement {
    let overlap = range.range.and_then(|block| overlap(range, &block, snapshot));
    let overlapping = match &overlap {
        Some(found) => Verdict::new(OVERLAPPING, Some(true), found.reason, found.message.clone()),
        None => Verdict::new(OVERLAPPING, Some(false), reason::NO_OVERLAP, ""),
    };
    let refuse = |reason, message: String| Verdict::new(READY, Some(false), reason, message);
    let ready = if let Some(problem) = &range.problem {
        refuse(reason::INVALID_SPEC, format!("{problem}; no blocks are carved from this ClusterCIDR"))
    } else if range.deleting {
        refuse(reason::TERMINATING, terminating(range, snapshot))
    } else if let Some(found) = overlap.filter(|found| found.by_range || !is_in_use(range, snapshot)) {
        refuse(found.reason, format!("{}; no blocks are carved from it", found.message))
    } else if let Some(other) = unreadable_other(range, snapshot) {
        let message =
            format!("ClusterCIDR {} cannot be read, so overlap is unknown: correct or delete it", other.name);
        refuse(reason::OTHER_UNREADABLE, message)
    } else {
        match sizing(range, snapshot) {
            Sizing::Wait { why, .. } => refuse(reason::WAITING_FOR_NODE, why),
            Sizing::Impossible(why) => refuse(reason::RANGE_TOO_SMALL, why),
            Sizing::Set | Sizing::Choose(_) => accept(range),
        }
    };
    Judgement { ready, overlapping }
}

/// What keeps a deleted range, and how to move it on.
fn terminating(range: &RangeFact, snapshot: &Snapshot) -> String {
    let stays = "it is deleted, gives no new blocks, and stays until its last PodCIDR is gone";
    let mut blocks = snapshot.blocks.values().filter(|block| block.range == range.name);
    let Some(first) = blocks.next() else { return stays.to_owned() };
    format!(
        "{stays}: {} left, such as {} of node {}. To move these nodes, see that another ClusterCIDR selects them, then: {}",
        1 + blocks.count(),
        first.name,
        first.node,
        drain_command(&range.name)
    )
}

/// The command that asks for the pods of every block of that range to move.
pub fn drain_command(range: &str) -> String {
    format!("kubectl annotate podcidrs -l {}={range} {}=", names::LABEL_CLUSTER_CIDR, names::ANNOTATION_DRAIN)
}

fn accept(range: &RangeFact) -> Verdict {
    let (reason, message) = match range.allocation {
        Allocation::Enabled => (reason::RANGE_READY, "blocks are carved from it"),
        Allocation::Draining => (
            reason::RANGE_DRAINING,
            "its blocks stay; no new ones are carved, as spec.allocation is Draining",
        ),
        Allocation::Unknown => (
            reason::RANGE_DRAINING,
            "no new blocks are carved: spec.allocation has a value of a newer version",
        ),
    };
    Verdict::new(READY, Some(true), reason, message)
}

struct Overlap {
    reason: &'static str,
    message: String,
    by_range: bool,
}

/// The first thing that the range shares addresses with.
fn overlap(range: &RangeFact, block: &Block, snapshot: &Snapshot) -> Option<Overlap> {
    // Times of creation are whole seconds. Of two ranges of one second, one that serves nodes already goes on.
    let rank = |r: &RangeFact| (r.created, !condition::is_true(&r.status.conditions, READY), r.name.clone());
    let older = snapshot
        .ranges
        .values()
        .filter(|other| rank(other) < rank(range) && other.range.is_some_and(|r| r.overlaps(block)))
        .min_by_key(|other| rank(other));
    if let Some(other) = older {
        let its_range = other.range.map(|r| r.to_string()).unwrap_or_default();
        return Some(Overlap {
            reason: reason::OVERLAPS_CLUSTER_CIDR,
            message: format!(
                "{block} shares addresses with the older ClusterCIDR {} ({its_range}); delete one of the two",
                other.name
            ),
            by_range: true,
        });
    }
    let (reason, message) = foreign_overlap(block, snapshot)?;
    Some(Overlap {
        reason,
        message: format!("{message}; use a range that nothing else uses"),
        by_range: false,
    })
}

fn foreign_overlap(block: &Block, snapshot: &Snapshot) -> Option<(&'static str, String)> {
    if let Some(services) = snapshot.foreign.services.iter().find(|services| services.overlaps(block)) {
        return Some((
            reason::OVERLAPS_SERVICES,
            format!("{block} shares addresses with the Service range {services}"),
        ));
    }
    if let Some(address) = snapshot.foreign.api_server.iter().find(|address| block.contains(address)) {
        return Some((
            reason::OVERLAPS_API_SERVER,
            format!("{block} holds {address}, an address of the API server"),
        ));
    }
    snapshot.nodes.values().find_map(|node| {
        let address = node.addresses.iter().find(|address| block.contains(address))?;
        Some((reason::OVERLAPS_NODE, format!("{block} holds {address}, the address of node {}", node.name)))
    })
}

fn is_in_use(range: &RangeFact, snapshot: &Snapshot) -> bool {
    snapshot.blocks.values().any(|block| block.range == range.name)
}

/// Another range whose addresses are unknown. It stands only in the way of ranges that are not `Ready` yet.
fn unreadable_other<'a>(range: &RangeFact, snapshot: &'a Snapshot) -> Option<&'a RangeFact> {
    if condition::is_true(&range.status.conditions, READY) {
        return None;
    }
    let mut others = snapshot.ranges.values().filter(|other| other.name != range.name);
    others.find(|other| other.range.is_none()).map(|other| &**other)
}

/// Whether `Ready=True`, as it is written, has stood long enough to carve.
///
/// The wait covers one case: a former leader decided on a create while a range existed that has been deleted
/// since, and its request is still under way. Live LISTs cannot show that. Such a leader sends nothing once
/// its own Lease has run out, so after one Lease duration every request has been sent and answered. The wait
/// is therefore pointless where no such leader can exist, and a new cluster need not wait for it
/// ([`Snapshot::is_sole_actor`]). Our own creates whose outcome is unknown are claims, also on other ranges.
pub fn stands(range: &RangeFact, snapshot: &Snapshot) -> Standing {
    let Some(written) = condition::find(&range.status.conditions, READY).filter(|c| c.status == "True")
    else {
        return Standing::NotWritten;
    };
    if snapshot.is_sole_actor() {
        return Standing::Stands;
    }
    let lease = snapshot.settings.lease_duration;
    let stood = Duration::try_from(snapshot.clock.wall.duration_since(written.last_transition_time.0));
    // A time in the future is another machine's wrong clock; then only our own watching counts.
    match (lease + WHOLE_SECOND).saturating_sub(stood.unwrap_or_default()) {
        Duration::ZERO => Standing::Stands,
        wait => Standing::Wait(wait.min(lease.saturating_sub(snapshot.tenure.held_for))),
    }
}
