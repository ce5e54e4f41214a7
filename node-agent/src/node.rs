//! One node: what is believed, what is in place, and one pass from the first to the second.
//!
//! [`Node::pass`] is the loop's body, read like a table of contents: observe → desired → diff → apply →
//! files → report. It is synchronous, and takes milliseconds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use plat_cni::boot::{self, BootId};
use plat_cni::link;
use plat_cni::netlink;
use plat_crds::block::{Block, Family};
use plat_crds::lease::Datapath;
use plat_crds::names::{SYSCTLS_FILE, UNREACHABLE_METRIC};

use crate::apply::{self, Done, Kernel, Outcome};
use crate::beliefs::Beliefs;
use crate::closing::{self, Closing, Evidence, Trials};
use crate::conf::Provider;
use crate::desired::{self, Host, Location, Map, Me};
use crate::diff::{diff, is_undone_by, undo};
use crate::doubled::{self, Cuts, Doubled};
use crate::egress;
use crate::fabric::{self, Desired, Devices, Observed, RouteKey, Sysctl, TableState};
use crate::facts::{Fault, Reason};
use crate::folder;
use crate::foreign;
use crate::growth::{self, Growth};
use crate::incidents::Repair;
use crate::kernel::events::{Wake, WatchedFolder};
use crate::kernel::forward::{self, Forwarding, Scene};
use crate::kernel::{host, route, rule, sysctl, vxlan};
use crate::leases::{Count, LeasedBlocks, Leases, PodRules, Swept, Usage};
use crate::objects::Objects;
use crate::outlet::{Grant, Outlet};
use crate::path;
use crate::preview;
use crate::probe::findings::Findings;
use crate::probe::plan::Plan;
use crate::readiness::Readiness;
use crate::report::CniState;
use crate::reporter::{Pass, Report, Reporter};
use crate::rollout::{Probes, Rollouts, Signs};
use crate::underlay;

/// How a node is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who it is.
    pub me: Me,
    /// Whether pods send only from their own addresses.
    pub anti_spoofing: bool,
    /// Folder of CNI configurations, as this process sees it.
    pub conf_dir: PathBuf,
    /// Folder of CNI binaries, as this process sees it.
    pub bin_dir: PathBuf,
    /// Folder of the node's state; at the same path for the node.
    pub run_dir: PathBuf,
    /// The CNI binary in this image.
    pub plugin: PathBuf,
    /// `/proc/sys/net` of the node.
    pub sysctl_dir: PathBuf,
    /// `/proc/net` of the node.
    pub proc_net: PathBuf,
    /// Who opens the host ports of pods.
    pub host_ports: Provider,
    /// Who limits the bandwidth of pods.
    pub bandwidth: Provider,
    /// How long unconfirmed withdrawals wait.
    pub hold: Duration,
    /// What the first conflist waits for.
    pub readiness: Readiness,
    /// How long it waits at most.
    pub readiness_deadline: Duration,
    /// Addresses by which the API server is reached, and of resolvers.
    pub needed: BTreeSet<IpAddr>,
}

/// Why a pass could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel would not say what is there.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// A sysctl could not be read.
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
    /// A folder was removed under a mount: only a new process sees the new one.
    #[error(transparent)]
    Folder(folder::Error),
    /// The boot could not be told.
    #[error("read the boot id: {0}")]
    Boot(std::io::Error),
}

impl Error {
    /// Whether only a restart, with fresh mounts, can help.
    pub fn needs_restart(&self) -> bool {
        matches!(self, Error::Folder(error) if error.needs_restart())
    }
}

/// Whether the pods' nftables tables may have been changed by someone else than the CNI binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// Nothing tells so.
    Trusted,
    /// Somebody made a transaction, or it is not known whether.
    Doubtful,
}

/// What led to a pass.
#[derive(Clone, Copy, Debug)]
pub struct Hints {
    /// It is time to look at what nothing tells of.
    pub full: bool,
    /// Whether the pods' tables are in doubt.
    pub rules: Rules,
    /// Links or addresses changed.
    pub links: bool,
    /// Routes of others changed.
    pub routes: bool,
}

/// What came of [`Node::mend`].
pub struct Mended {
    /// The last report with what was put back; `None` if nothing was.
    pub report: Option<Report>,
    /// Whether that was all there was to do. Otherwise a pass has to look.
    pub whole: bool,
}

/// How soon the pods' tables are looked at again if the lease store could not be had.
const RULES_AGAIN: Duration = Duration::from_millis(500);

/// Shortest time between two looks at the routes of others: pods' links come in crowds, and so do routes.
const OTHERS_EVERY: Duration = Duration::from_secs(2);
/// How soon leases are counted again that could not be.
const COUNT_AGAIN: Duration = Duration::from_secs(1);
/// How soon replaced routes are looked at again.
const REPLACED_AGAIN: Duration = Duration::from_millis(50);

/// One node.
pub struct Node {
    beliefs: Beliefs,
    machine: Machine,
    outlet: Outlet,
    reporter: Reporter,
    rollouts: Rollouts,
    boot: String,
    /// What the probes found; `None` if they are switched off.
    probes: Option<Findings>,
    /// What there is to probe, and whether that is news.
    to_probe: Arc<Plan>,
    is_to_probe_new: bool,
}

impl Node {
    /// Opens the node in the current network namespace and loads its cache.
    pub fn open(settings: Settings) -> Result<Node, Error> {
        let boot = BootId::read().map_err(Error::Boot)?;
        let outlet = Outlet::open(&settings, &boot.text);
        let run = outlet.run();
        Ok(Node {
            rollouts: Rollouts::load(run, &boot.text),
            boot: boot.text.clone(),
            beliefs: Beliefs::load(&settings.me.node, settings.hold, run),
            reporter: Reporter::new(&settings, &boot.text),
            machine: Machine::open(&settings, boot, run)?,
            outlet,
            probes: None,
            to_probe: Arc::default(),
            is_to_probe_new: false,
        })
    }

    /// What to watch in the node's folders.
    pub fn watched(&self) -> Vec<WatchedFolder> {
        self.outlet.watched()
    }

    /// Takes in the newest objects.
    pub fn learn(&mut self, objects: &Objects) {
        self.beliefs.learn(objects);
    }

    /// Takes in what the probes found.
    pub fn learn_probes(&mut self, found: Option<Findings>) {
        self.probes = found;
    }

    /// What there is to probe, if the last pass found it changed.
    pub fn take_plan(&mut self) -> Option<Arc<Plan>> {
        std::mem::take(&mut self.is_to_probe_new).then(|| self.to_probe.clone())
    }

    /// Brings the node to where it should be, and says where it is. `hints` say where to look besides.
    /// `culprits` is asked at the end, when who did what has surely been told.
    pub fn pass(&mut self, hints: Hints, culprits: impl FnOnce() -> Wake) -> Result<Report, Error> {
        let full = hints.full;
        let Node { beliefs, machine, outlet, reporter, rollouts, boot, probes, to_probe, is_to_probe_new } =
            self;
        let mut outcome = Outcome::default();

        machine.restore_table(&mut outcome)?;
        let rules_at = machine.restore_rules(full || hints.rules == Rules::Doubtful, &mut outcome);
        let now = Duration::from_millis(boot::boot_ms());
        let held = beliefs.update(now);
        if !beliefs.are_complete() {
            return Ok(reporter.waiting(beliefs.known()));
        }
        if full {
            machine.sweep_leases(now);
        }
        let health = probes.as_ref().map(Findings::health);
        let signs = Signs {
            now,
            contact: beliefs.contact(),
            probes: health.as_ref().map(|h| Probes { rounds: h.rounds, failing: &h.failing }),
        };
        for (policy, why) in beliefs.follow_policies(rollouts, &signs) {
            tracing::warn!(policy, why, "went back from the newest generation of a RoutingPolicy");
        }
        rollouts.save(outlet.run(), boot);
        let labels = beliefs.own_labels();
        let planned = rollouts.planned(beliefs.policies(), &labels);
        let (map, known) = (beliefs.map(), beliefs.known());
        let planned = planned.as_deref().map(|policies| Map { policies, ..map });
        let (mut host, own, closing) = machine.look(map, planned, known)?;
        host.others_tunnel = beliefs.lets_tunnel();
        host.path_mtus = probes.as_ref().map(|found| found.path_mtus()).unwrap_or_default();
        let (desired, mut faults) = desired::desired(&machine.me, map, &host);
        let plan = planned.map(|planned| preview::lines(&machine.me, (&desired, &faults), planned, &host));
        if full {
            machine.look_after_bridge(&desired, &mut outcome);
        }
        let observed = machine.observe(&desired)?;
        machine.apply(&desired, &observed, &mut outcome);
        let others_at = machine.look_at_others(map, hints, now)?;
        faults.extend(machine.overlaps.iter().cloned());
        faults.extend(machine.overridden.iter().cloned());
        let lease = outlet.lease(known.contact, desired::lease_seconds(&machine.me.node, map));
        let may_grow = machine.growth.may_grow(&own, map, now);
        let mtu = underlay::pod_mtu(&host, &desired, &observed);
        let grant = Grant { own: &own, lease: &lease, mtu, may_grow: &may_grow };
        let cni = outlet.write(&grant, map, &machine.done, &mut outcome)?;
        machine.keep_record()?;
        let count_at = machine.recount_leases(outlet.granted(), now);
        let grow_at = machine.watch_growth(&own, now);
        let doubled = machine.cut_doubled(map, &own);
        machine.restore_pod_routes(&desired, &mut outcome);
        let again_at = outcome.replaced.then_some(now + REPLACED_AGAIN);
        let cni = match &machine.unusable {
            Some(why) if cni.is_ready() => CniState::StoreUnusable(why.clone()),
            _ => cni,
        };

        let pass = Pass {
            desired: &desired,
            done: &machine.done,
            own: &own,
            host: &host,
            mtu,
            usage: &machine.usage,
            wants: machine.growth.wants(),
            swept: std::mem::take(&mut machine.swept),
            forwarding: machine.forwarding(),
            faults,
            outcome,
            held,
            doubled,
            early: outlet.take_early(),
            closing,
            cni,
            lease: &lease,
            confs: outlet.confs(),
            chained: outlet.chained(),
            probes: probes.as_ref(),
        };
        let said = |faults: &[Fault]| rollouts.reports(beliefs.policies(), &labels, map.blocks, faults);
        let mut report = reporter.report(known, map, pass, said, culprits);
        report.status.plan = plan.unwrap_or_default();
        report.wants_contact |= rollouts.wants_contact(signs.contact);
        let times = [
            report.next,
            outlet.opens_at(),
            count_at,
            grow_at,
            others_at,
            rules_at,
            again_at,
            rollouts.next(),
        ];
        report.next = times.into_iter().flatten().min();
        if probes.is_some() {
            let next = Plan::new(&machine.me, map, &host, &own, &desired);
            if **to_probe != next {
                (*to_probe, *is_to_probe_new) = (Arc::new(next), true);
            }
        }
        machine.desired = Some(desired);
        beliefs.save(outlet.run(), full);
        Ok(report)
    }
}

impl Node {
    /// Whether the leases should be counted, which is done by a pass.
    pub fn count(&self) -> Count {
        self.machine.leases.count(Duration::from_millis(boot::boot_ms()))
    }

    /// The netlink port by which the kernel tells of this node's own changes to routes.
    pub fn port(&mut self) -> Result<u32, Error> {
        Ok(self.machine.kernel.route.port()?)
    }

    /// When something that somebody keeps undoing may be put back next; it may be past.
    pub fn may_repair_at(&self) -> Duration {
        self.reporter.fight().may_at()
    }

    /// Undoes at once what others are told to have done to routes, without a look at all the rest. `last` is the last
    /// report.
    pub fn mend(&mut self, wake: &Wake, last: &Report) -> Mended {
        let Machine { kernel, desired, done, .. } = &mut self.machine;
        let Some(desired) = desired else { return Mended { report: None, whole: false } };
        let steps = undo(&done.routes, &wake.told);
        let outcome = apply::apply(kernel, steps, desired, done, Devices::default());
        Mended {
            whole: is_undone_by(&done.routes, &wake.told) && outcome.failed_routes.is_empty(),
            report: (!outcome.repaired.is_empty()).then(|| self.reporter.mended(last, &outcome, wake)),
        }
    }

    /// What there is to report when passes fail again and again; `last` is the last report.
    pub fn failing(&mut self, last: Report, error: &Error) -> Report {
        self.reporter.failing(last, &error.to_string())
    }
}

/// The kernel of the node, and what is remembered of it.
struct Machine {
    me: Me,
    kernel: Kernel,
    leases: Leases,
    usage: Usage,
    /// The blocks of this node that the last count knew to be leased from; `None` before there was one.
    leased_from: Option<BTreeSet<Block>>,
    growth: Growth,
    /// What others' routes share with the pods' addresses, as last looked for.
    overlaps: Vec<Fault>,
    others_at: Duration,
    others_due: Option<Duration>,
    /// What sweeps did that is not reported yet.
    swept: Swept,
    /// Why the lease store cannot be used.
    unusable: Option<String>,
    needed: BTreeSet<IpAddr>,
    trials: Trials,
    desired: Option<Desired>,
    done: Done,
    /// Foreign firewalls, with the generation of the ruleset and the scene that it was judged for.
    forward: Option<(u32, Scene, Forwarding)>,
    /// Links of pods whose addresses are another node's.
    cuts: Cuts,
    /// Whether the pods' tables were as the leases say when they were last looked at.
    rules: Rules,
    /// Routes of others that went before ours when that was last looked at.
    overridden: Vec<Fault>,
}

impl Machine {
    fn open(settings: &Settings, boot: BootId, run: &folder::Folder) -> Result<Machine, Error> {
        Ok(Machine {
            me: settings.me.clone(),
            kernel: Kernel::open(sysctl::Sysctls::new(&settings.sysctl_dir, run, SYSCTLS_FILE))?,
            leases: Leases::open(run.path(), boot, &settings.me.bridge)?,
            usage: Usage::default(),
            leased_from: None,
            growth: Growth::default(),
            overlaps: Vec::new(),
            others_at: Duration::ZERO,
            others_due: None,
            swept: Swept::default(),
            unusable: None,
            needed: settings.needed.clone(),
            trials: Trials::default(),
            desired: None,
            done: Done::default(),
            forward: None,
            cuts: Cuts::default(),
            rules: Rules::Doubtful,
            overridden: Vec::new(),
        })
    }

    /// Each millisecond without the table resets live masqueraded connections, so it goes before all else.
    fn restore_table(&mut self, outcome: &mut Outcome) -> Result<(), Error> {
        let Some(desired) = &self.desired else { return Ok(()) };
        if self.kernel.nft.observe(&desired.masquerade)? != TableState::Intact {
            apply::replace_table(&mut self.kernel, &desired.masquerade, &self.done, outcome);
        }
        Ok(())
    }

    /// Brings the pods' tables to what the leases say, if someone else than the CNI binary may have changed
    /// them, or never since this program started. Returns when to try again, if it could not be done.
    fn restore_rules(&mut self, doubtful: bool, outcome: &mut Outcome) -> Option<Duration> {
        if self.rules == Rules::Trusted && !doubtful {
            return None;
        }
        let PodRules { restored, loopback } = match self.leases.restore_rules() {
            Ok(rules) => rules,
            Err(error) => {
                tracing::warn!(%error, "the pods' nftables tables were not looked at; trying again");
                self.rules = Rules::Doubtful;
                return Some(Duration::from_millis(boot::boot_ms()) + RULES_AGAIN);
            }
        };
        if restored.orphans > 0 {
            tracing::info!(elements = restored.orphans, "removed nftables elements that no lease has");
        }
        for what in restored.put_back {
            outcome.repaired(Repair::Nft, what);
        }
        for path in loopback {
            self.switch_on(path, outcome);
        }
        self.rules = Rules::Trusted;
        None
    }

    fn switch_on(&mut self, path: String, outcome: &mut Outcome) {
        match self.kernel.sysctls.read(&path) {
            Ok(Some(value)) if value != "1" => {}
            _ => return,
        }
        let what = format!("sysctl net/{path} = 1");
        match self.kernel.sysctls.write(&Sysctl { path, value: "1".to_owned() }) {
            Ok(()) => outcome.repaired(Repair::Sysctl, what),
            Err(error) => tracing::warn!(%error, "127.0.0.1 does not lead to pods"),
        }
    }

    /// Counts the leases again if pods came or went; last in a pass, as everything else is more urgent.
    /// Returns when to look again, if it was too early.
    ///
    /// Once a block is leased from no more, an ADD that read the blocks file before may still hold the store's
    /// lock. So they are counted under that lock, now that the file says otherwise (`granted`), and until that is
    /// done nothing counts as free.
    fn recount_leases(&mut self, granted: Option<BTreeSet<Block>>, now: Duration) -> Option<Duration> {
        let stopped = match (&self.leased_from, &granted) {
            (Some(before), Some(now)) => !before.is_subset(now),
            (_, None) | (None, _) => true,
        };
        if stopped {
            self.sweep_leases(now);
            if granted.is_none() || self.usage.is_outdated() {
                self.usage = std::mem::take(&mut self.usage).outdated();
                return Some(now + COUNT_AGAIN);
            }
            self.leased_from = granted;
            // What stood for that block alone can go now.
            return Some(now);
        }
        self.leased_from = granted;
        match self.leases.count(now) {
            Count::Right => None,
            Count::DueAt(due) => Some(due),
            Count::Due => {
                let before = self.usage.datapaths().cloned();
                self.sweep_leases(now);
                // What the last pod of a datapath stood on can go now.
                (before.as_ref() != self.usage.datapaths()).then_some(now)
            }
        }
    }

    /// Notes which families need another block, and how many more pods make one do so. Returns when to look again.
    fn watch_growth(&mut self, own: &OwnBlocks, now: Duration) -> Option<Duration> {
        self.growth.update(own, &self.usage, now);
        self.leases.watch_for(growth::room(own, &self.usage));
        self.growth.next(now)
    }

    /// Blocks with living leases, and those of this node that may have some: nothing is taken from under a pod.
    fn leased(&self, map: Map<'_>) -> LeasedBlocks {
        let mut leased = self.usage.blocks(map);
        let counted = |block: &Block| match &self.leased_from {
            Some(leased_from) => !leased_from.contains(block) && !self.usage.is_outdated(),
            None => false,
        };
        let own = map.blocks.values().filter(|block| block.node == self.me.node && block.released());
        leased.all.extend(own.map(|block| block.block).filter(|block| !counted(block)));
        leased
    }

    /// Behind the count: a store that was rebuilt knows pods that nobody knew before.
    fn restore_pod_routes(&mut self, desired: &Desired, outcome: &mut Outcome) {
        let blocks: Vec<Block> = desired.gateways.iter().copied().collect();
        apply::restore_pod_routes(&mut self.kernel, &self.usage.pods, &blocks, outcome);
    }

    /// Takes the pods off the network whose addresses are another node's by now.
    fn cut_doubled(&mut self, map: Map<'_>, own: &OwnBlocks) -> Doubled {
        let taken = doubled::taken(map, own, &self.usage.blocks(map).all);
        let given = doubled::given(&self.me.node, map, own);
        self.cuts.apply(&mut self.kernel.route, &self.usage.pods, &taken, &given)
    }

    fn sweep_leases(&mut self, now: Duration) {
        match self.leases.sweep(now) {
            Ok(mut swept) => {
                self.usage = std::mem::take(&mut swept.usage);
                self.unusable = None;
                self.swept.ended.append(&mut swept.ended);
                self.swept.taken_over.append(&mut swept.taken_over);
                self.swept.contested.append(&mut swept.contested);
                self.swept.rebuilt.extend(swept.rebuilt);
            }
            // The next tick tries again.
            Err(error) => {
                tracing::warn!(%error, "leases were not swept");
                // Another process that has the lock gives it back.
                self.unusable = (!error.is_busy()).then(|| error.to_string());
                let last = std::mem::take(&mut self.usage);
                self.usage = self.leases.proven().unwrap_or(last).outdated();
            }
        }
    }

    /// What the node's own state adds to the objects.
    fn look(
        &mut self,
        map: Map<'_>,
        planned: Option<Map<'_>>,
        known: &Objects,
    ) -> Result<(Host, OwnBlocks, Closing), Error> {
        let view = host::observe(&mut self.kernel.route, &self.me.bridge)?;
        let mut needs = path::needs(&self.me, map);
        let held = map.blocks.values().filter(|block| block.node == self.me.node);
        needs.addresses.extend(egress::addresses(map, held.map(|block| &block.block)));
        let (found, uplinks) = host::meet(&mut self.kernel.route, &view, needs)?;
        let devices = found.locations.values().filter_map(|location| match location {
            Location::OnLink { device } => Some(*device),
            Location::Local | Location::Remote | Location::Unreachable => None,
        });
        let own = map.blocks.values().filter(|block| block.node == self.me.node);
        let node: Vec<IpAddr> = own.flat_map(|block| block.addresses.iter().copied()).collect();
        let mtu = host::path_mtu(&view, &node, devices);
        let underlay_mtu = host::underlay_mtu(&view, mtu, uplinks);
        let needed = self.needed(map)?;
        let leased = self.leased(map);
        let mut host = Host {
            exposed: self.exposed(map, &leased.guessed, &needed)?,
            mtu,
            addresses: host::addresses_to_others(&view),
            underlay_mtu,
            leased: leased.all,
            guessed: leased.guessed,
            ..found
        };
        let own = desired::own_blocks(&self.me, map, &host);
        if own.keys().any(|block| block.family() == Family::IPv6) {
            host.ra_links = self.router_advertised()?;
        }
        let closing = self.close(map, known, &needed)?;
        // After the MTU was found: what is only planned has no part in it.
        if let Some(planned) = planned {
            let needs = path::needs(&self.me, planned);
            let (more, _) = host::meet(&mut self.kernel.route, &view, needs)?;
            host.reachable.extend(more.reachable);
            host.locations.extend(more.locations);
            host.tables.extend(more.tables);
            host.devices.extend(more.devices);
        }
        host.closed_ranges = closing.closed.clone();
        host.in_use = self.datapaths(&view);
        Ok((host, own, closing))
    }

    /// How living pods are joined to the host. Before what one datapath stands on is taken away, the leases are read
    /// again: an ADD under way has its lease by now. Where nobody could read them, what stands is in use.
    fn datapaths(&mut self, view: &host::View) -> BTreeSet<Datapath> {
        let has_gateways = host::bridge(view).is_some_and(|bridge| !bridge.ours.is_empty());
        let standing =
            [(Datapath::Bridge, has_gateways), (Datapath::Routed, !host::gateways(view).is_empty())];
        let standing: BTreeSet<Datapath> =
            standing.into_iter().filter(|(_, stands)| *stands).map(|(datapath, _)| datapath).collect();
        let known = |usage: &Usage| usage.datapaths().cloned();
        let of_others = standing.iter().any(|datapath| {
            *datapath != self.me.datapath && !known(&self.usage).is_some_and(|used| used.contains(datapath))
        });
        if of_others {
            self.sweep_leases(Duration::from_millis(boot::boot_ms()));
        }
        known(&self.usage).unwrap_or(standing)
    }

    /// Links with routes from router advertisements that the kernel itself processes (`accept_ra` is not 0).
    fn router_advertised(&mut self) -> Result<BTreeSet<String>, Error> {
        let mut names = BTreeSet::new();
        for index in route::router_advertised(&mut self.kernel.route)? {
            let Some(link) = link::link_by_index(&mut self.kernel.route, index)? else { continue };
            let accepts = self.kernel.sysctls.read(&format!("ipv6/conf/{}/accept_ra", link.name))?;
            if accepts.is_some_and(|value| value != "0") {
                names.insert(link.name);
            }
        }
        Ok(names)
    }

    /// Addresses without which this node is cut off.
    fn needed(&mut self, map: Map<'_>) -> Result<BTreeSet<IpAddr>, Error> {
        let mut needed = self.needed.clone();
        needed.extend(map.blocks.values().flat_map(|block| block.addresses.iter().copied()));
        needed.extend(route::default_gateways(&mut self.kernel.route)?);
        Ok(needed)
    }

    /// The blocks to which a route would cut this node off.
    fn exposed(
        &mut self,
        map: Map<'_>,
        guessed: &BTreeSet<Block>,
        needed: &BTreeSet<IpAddr>,
    ) -> Result<BTreeMap<Block, IpAddr>, Error> {
        let mut exposed = BTreeMap::new();
        for (block, addresses) in foreign::exposed(map, guessed, needed) {
            for address in addresses {
                if !route::is_covered(&mut self.kernel.route, address, &block)? {
                    exposed.insert(block, address);
                    break;
                }
            }
        }
        Ok(exposed)
    }

    /// What of the host or of other programs shares addresses with the pods', or goes before our routes, by dumps of
    /// all routes: soon for a new link or route, else now and then. Returns when to look, if it was too early.
    fn look_at_others(
        &mut self,
        map: Map<'_>,
        hints: Hints,
        now: Duration,
    ) -> Result<Option<Duration>, Error> {
        let due = match self.others_due {
            _ if hints.full => now,
            Some(due) => due,
            None if hints.links || hints.routes => self.others_at + OTHERS_EVERY,
            None => return Ok(None),
        };
        self.others_due = Some(due).filter(|due| now < *due);
        if self.others_due.is_none() {
            let routes = route::foreign(&mut self.kernel.route)?;
            self.overlaps = foreign::overlaps(&self.me, map, &routes);
            self.look_for_overriding()?;
            self.others_at = now;
        }
        Ok(self.others_due)
    }

    fn close(&mut self, map: Map<'_>, known: &Objects, needed: &BTreeSet<IpAddr>) -> Result<Closing, Error> {
        let socket = &mut self.kernel.route;
        let left;
        let there = match &self.desired {
            Some(_) => &self.done.routes,
            // The first pass of this life: what an earlier one left counts.
            None => {
                left = route::dump(socket, Devices::default())?;
                &left
            }
        };
        let (mut exposed, mut installed) = (BTreeMap::new(), BTreeSet::new());
        for range in map.ranges.values() {
            if there.contains_key(&RouteKey::main(range.range, UNREACHABLE_METRIC)) {
                installed.insert(range.name.clone());
            }
            let mut caught = BTreeSet::new();
            for address in needed.iter().filter(|address| range.range.contains(address)) {
                if !route::is_covered(socket, *address, &range.range)? {
                    caught.insert(*address);
                }
            }
            exposed.insert(range.name.clone(), caught);
        }
        let contact = known.contact.map(|contact| Duration::from_millis(contact.boot_ms));
        let now = Duration::from_millis(boot::boot_ms());
        let evidence = Evidence { exposed: &exposed, installed: &installed, contact, now };
        Ok(closing::close(map, &evidence, &mut self.trials))
    }

    /// What of the bridge no message tells: its sysctls, and routes on it that are nobody's any more.
    fn look_after_bridge(&mut self, desired: &Desired, outcome: &mut Outcome) {
        if let Some(bridge) = &desired.bridge {
            apply::ensure_bridge(&mut self.kernel, bridge, &self.done, outcome);
        }
    }

    /// Routes of another network, or of an administrator, that lead to blocks before ours do. They may be meant; they
    /// may also be left over, and lead where the block was once.
    fn look_for_overriding(&mut self) -> Result<(), Error> {
        let found = route::overriding(&mut self.kernel.route, &self.done.routes)?;
        let fault = |(ours, theirs): (fabric::Route, fabric::Route)| {
            let message = format!(
                "another program's route goes before Plat's: {theirs} before {ours}; if it is left over from another network, remove it"
            );
            Fault::block(ours.key.prefix.object_name(), Reason::Overridden, message)
        };
        self.overridden = found.into_iter().map(fault).collect();
        Ok(())
    }

    fn observe(&mut self, desired: &Desired) -> Result<Observed, Error> {
        let view = host::observe(&mut self.kernel.route, &self.me.bridge)?;
        let mut sysctls = BTreeMap::new();
        for sysctl in &desired.sysctls {
            let value = self.kernel.sysctls.read(&sysctl.path)?;
            // One that does not exist (no IPv6, a link that went) is nothing to write.
            sysctls.insert(sysctl.path.clone(), value.unwrap_or_else(|| sysctl.value.clone()));
        }
        self.judge_forwarding(desired)?;
        let mut observed = Observed {
            table: self.kernel.nft.observe(&desired.masquerade)?,
            rules: rule::dump(&mut self.kernel.route)?.into_iter().filter_map(|found| found.ours()).collect(),
            sysctls,
            bridge: host::bridge(&view),
            gateways: host::gateways(&view),
            tunnels: vxlan::observe(&mut self.kernel.route, &view)?,
            forward: self.forwarding().map(|found| found.chains.clone()).unwrap_or_default(),
            ..Observed::default()
        };
        observed.routes = route::dump(&mut self.kernel.route, observed.devices())?;
        Ok(observed)
    }

    /// Judges the ruleset anew if some transaction moved its generation, or pods' packets go other ways.
    fn judge_forwarding(&mut self, desired: &Desired) -> Result<(), Error> {
        let generation = self.kernel.nft.generation()?;
        let (peers, ranges) = (desired.sample_of_peers(), desired.ranges());
        let wanted = &desired.forwarded;
        let scene = Scene::observe(&mut self.kernel.route, &self.me.bridge, wanted, &peers, ranges)?;
        if !matches!(&self.forward, Some((at, of, _)) if *at == generation && *of == scene) {
            let found = forward::observe(&mut self.kernel.nft, &scene, self.me.admit_forward)?;
            self.forward = Some((generation, scene, found));
        }
        Ok(())
    }

    fn forwarding(&self) -> Option<&Forwarding> {
        self.forward.as_ref().map(|(_, _, found)| found)
    }

    fn apply(&mut self, desired: &Desired, observed: &Observed, outcome: &mut Outcome) {
        let steps = diff(desired, observed);
        outcome.merge(apply::apply(&mut self.kernel, steps, desired, &self.done, observed.devices()));
        self.done = outcome.done(desired, observed);
    }

    fn keep_record(&self) -> Result<(), Error> {
        match self.kernel.sysctls.keep_record() {
            Err(error) if error.needs_restart() => Err(Error::Folder(error)),
            Err(error) => {
                tracing::warn!(%error, "former sysctl values were not kept");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// Blocks and their states, as the CNI binary will see them.
pub type OwnBlocks = BTreeMap<Block, plat_crds::blocks_file::HeldBlock>;
