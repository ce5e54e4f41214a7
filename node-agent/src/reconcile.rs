//! The loop: one pass at a time, woken by objects, by the kernel, by files, and by a tick.
//!
//! Level-triggered: whatever woke it, a pass looks at everything and repairs what differs, so a lost or
//! repeated hint costs time and never truth. The first hint after a quiet while acts at once; then there is
//! at most one pass per [`PACE`]. Routes of which the kernel tells all that happened are put back on its word, between
//! the passes ([`Node::mend`]). Who keeps undoing things slows that down ([`crate::fights`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use plat_cni::boot;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::kernel::events::{Events, Wake};
use crate::leases::Count;
use crate::node::{Error, Hints, Node, Settings};
use crate::objects::{Ask, Objects};
use crate::probe::prober::Probing;
use crate::reporter::Report;

/// Shortest time between the starts of two passes.
pub const PACE: Duration = Duration::from_millis(50);
/// Longest time between two full passes, for what nothing tells of.
pub const TICK: Duration = Duration::from_secs(30);
/// How soon all is looked at after routes were put back on a word of the kernel.
const LOOK_AFTER: Duration = Duration::from_secs(1);
/// How soon a failed pass is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// So many failures in a row are told.
const TELL_AFTER: u32 = 3;
/// Shortest time between two questions of one kind to the watch.
const ASK_EVERY: Duration = Duration::from_secs(5);
/// A loop that has not turned for so long hangs: three ticks and the longest pass.
const DEAD_AFTER_MS: u64 = 120_000;

/// Signs of life, for probes.
#[derive(Debug)]
pub struct Pulse {
    beat: AtomicU64,
    programmed: AtomicBool,
}

impl Default for Pulse {
    fn default() -> Pulse {
        Pulse { beat: AtomicU64::new(boot::boot_ms()), programmed: AtomicBool::new(false) }
    }
}

impl Pulse {
    /// Notes that the loop turned.
    pub fn beat(&self) {
        self.beat.store(boot::boot_ms(), Ordering::Relaxed);
    }

    /// Notes that the work is done.
    pub fn set_programmed(&self) {
        self.programmed.store(true, Ordering::Relaxed);
    }

    /// Whether the loop turns.
    pub fn is_alive(&self) -> bool {
        boot::boot_ms().saturating_sub(self.beat.load(Ordering::Relaxed)) < DEAD_AFTER_MS
    }

    /// Whether the node was programmed once, from objects or the cache.
    pub fn is_programmed(&self) -> bool {
        self.programmed.load(Ordering::Relaxed)
    }
}

/// Why the loop ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// The node could not be opened, or only a restart can help.
    #[error(transparent)]
    Node(#[from] Error),
    /// The kernel's messages or the files' could not be followed any more.
    #[error("follow netlink and inotify: {0}")]
    Events(#[from] std::io::Error),
}

/// What the loop is joined to.
pub struct Links {
    /// The newest objects.
    pub objects: watch::Receiver<Objects>,
    /// Questions to whoever sends objects.
    pub asks: mpsc::Sender<Ask>,
    /// Where reports go, with the time that their pass took.
    pub reports: watch::Sender<(Report, Duration)>,
    /// The probes; none if they are switched off.
    pub probing: Option<Probing>,
    /// Signs of life.
    pub pulse: Arc<Pulse>,
    /// When to stop. Stopping removes nothing.
    pub stop: CancellationToken,
}

/// Runs the loop until it is stopped or cannot go on.
pub async fn run(settings: Settings, mut links: Links) -> Result<(), Ended> {
    let mut node = Node::open(settings)?;
    let events = Events::open(node.watched(), node.port()?)?;
    let mut asked = Asked::default();
    let mut wake = Wake::default();
    let mut tick = Instant::now();
    let mut failures = 0u32;
    // Until there are objects to program, nothing was looked at.
    let mut programmed = false;
    // The first pass programs from the cache, if there is one, before any object came.
    loop {
        let started = Instant::now();
        let full = started >= tick || !programmed;
        if full {
            tick = started + TICK;
        }
        if links.objects.has_changed().unwrap_or(false) {
            node.learn(&links.objects.borrow_and_update());
        }
        node.learn_probes(links.probing.as_mut().map(Probing::findings));
        // On this thread: the runtime has no other work than waiting, and memory that several threads take
        // is held several times (glibc's arenas).
        let mut who = std::mem::take(&mut wake);
        let hints =
            Hints { full, rules: who.rules(), links: who.is_about_links(), routes: who.is_about_routes() };
        let result = node.pass(hints, || {
            who.merge(events.peek());
            who
        });
        events.rewatch();
        links.pulse.beat();
        let until = match result {
            Ok(report) => {
                failures = 0;
                programmed |= report.programmed;
                if let (Some(probing), Some(plan)) = (&links.probing, node.take_plan()) {
                    probing.follow(plan);
                }
                conclude(&mut links, &mut asked, report, started.elapsed()).min(tick)
            }
            Err(error) if error.needs_restart() => return Err(error.into()),
            Err(error) => {
                failures = failures.saturating_add(1);
                tracing::error!(%error, failures, "the pass failed; trying again");
                if failures >= TELL_AFTER {
                    let last = links.reports.borrow().0.clone();
                    links.reports.send_replace((node.failing(last, &error), started.elapsed()));
                }
                Instant::now() + RETRY
            }
        };
        // What comes meanwhile, and when a pass is due for it: at most one per PACE.
        let paced = started + PACE;
        let (mut due, mut fresh, mut found) = (until.max(paced), false, false);
        loop {
            let news = tokio::select! {
                () = links.stop.cancelled() => return Ok(()),
                () = changed(&mut links.objects), if !fresh => {
                    (fresh, due) = (true, due.min(paced));
                    continue;
                }
                () = probed(&mut links.probing), if !found => {
                    (found, due) = (true, due.min(paced));
                    continue;
                }
                news = events.next() => news?,
                () = sleep_until(due) => break,
            };
            if news.is_told() && !fresh && from_now(node.may_repair_at()).is_zero() {
                due = due.min(mend(&mut node, &links, &news, &mut wake).max(paced));
                continue;
            }
            let soonest = if news.is_about_leases() {
                // Pods that come and go are no reason for a pass, but for a count now and then.
                match node.count() {
                    Count::Due => paced,
                    Count::DueAt(due) => Instant::now() + from_now(due),
                    Count::Right => continue,
                }
            } else if news.may_be_fought_over() {
                Instant::now() + from_now(node.may_repair_at())
            } else {
                paced
            };
            wake.merge(news);
            due = due.min(soonest.max(paced));
        }
        wake.merge(events.now()?);
        tracing::trace!(?wake, "woken");
    }
}

/// Undoes what others did to routes. Returns when a pass should look at all; what it should know by then goes to
/// `wake`.
fn mend(node: &mut Node, links: &Links, news: &Wake, wake: &mut Wake) -> Instant {
    let started = Instant::now();
    let mended = node.mend(news, &links.reports.borrow().0);
    if let Some(report) = mended.report {
        links.reports.send_replace((report, started.elapsed()));
    }
    if mended.whole {
        return started + LOOK_AFTER;
    }
    wake.merge(news.clone());
    started
}

/// Nobody sends objects any more only while the program ends.
async fn changed(objects: &mut watch::Receiver<Objects>) {
    if objects.has_changed().unwrap_or(false) {
        return;
    }
    // The mark is taken by the next pass, so that a change in between is not lost.
    match objects.changed().await {
        Ok(()) => objects.mark_changed(),
        Err(_) => std::future::pending().await,
    }
}

/// A verdict of the probes has changed.
async fn probed(probing: &mut Option<Probing>) {
    match probing {
        Some(probing) => probing.changed().await,
        None => std::future::pending().await,
    }
}

/// When questions were last asked.
#[derive(Default)]
struct Asked {
    relist: Option<Instant>,
    contact: Option<Instant>,
}

/// How long until then, on `CLOCK_BOOTTIME`.
fn from_now(then: Duration) -> Duration {
    then.saturating_sub(Duration::from_millis(boot::boot_ms()))
}

/// Passes the report on; returns when to look again without any news.
fn conclude(links: &mut Links, asked: &mut Asked, report: Report, took: Duration) -> Instant {
    if report.programmed {
        links.pulse.set_programmed();
    }
    let now = Instant::now();
    let mut until = now + TICK;
    if let Some(next) = report.next {
        until = until.min(now + from_now(next));
    }
    for (wanted, last, ask) in [
        (report.wants_list, &mut asked.relist, Ask::Relist),
        (report.wants_contact, &mut asked.contact, Ask::Contact),
    ] {
        if wanted && last.is_none_or(|last| now >= last + ASK_EVERY) && links.asks.try_send(ask).is_ok() {
            *last = Some(now);
        }
    }
    links.reports.send_replace((report, took));
    until
}
