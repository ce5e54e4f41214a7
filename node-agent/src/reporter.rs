//! Keeps what a report needs from pass to pass (conditions, incidents), and makes the report.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use plat_cni::boot;
use plat_crds::block::{Block, Family};
use plat_crds::node_network::{HeldBlockReport, NodeNetworkStatus, PolicyReport, RouteCounts};

use crate::apply::{Done, Outcome, Part};
use crate::closing::Closing;
use crate::conf::{self, Lease};
use crate::desired::{self, Host, Map};
use crate::doubled::Doubled;
use crate::fabric::Desired;
use crate::facts::{Fault, Reason};
use crate::failstatic::Held;
use crate::fights::{self, Fight};
use crate::incidents::{CONTESTED, Incidents, LEASES_ENDED, LEASES_REBUILT, Repair};
use crate::kernel::events::Wake;
use crate::kernel::forward::{self, Forwarding};
use crate::leases::{Swept, Usage};
use crate::node::{OwnBlocks, Settings};
use crate::objects::Objects;
use crate::probe;
use crate::report::{self, CniState, Findings};

/// What a pass tells the rest of the program.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The NodeNetwork's status, without the time of reporting.
    pub status: NodeNetworkStatus,
    /// Number of nodes that hold blocks.
    pub nodes: usize,
    /// Whether the node was programmed, from objects or the cache.
    pub programmed: bool,
    /// Objects that cannot be followed, by reason.
    pub faults: BTreeMap<Reason, usize>,
    /// What was put back, since the agent started.
    pub repairs: BTreeMap<Repair, i64>,
    /// Whether another program keeps undoing what is put back.
    pub contested: bool,
    /// How often that began, since the agent started.
    pub contests: i64,
    /// Leases that were ended because their links are gone, since the agent started.
    pub leases_ended: i64,
    /// How often the lease store was rebuilt, since the agent started.
    pub leases_rebuilt: i64,
    /// What this node needs at once, as [`crate::growth::Growth::wants`]: a report of it goes out of turn, once.
    pub wants: Option<String>,
    /// What the probes found; `None` if they are switched off.
    pub probes: Option<probe::findings::Findings>,
    /// Withdrawals that wait.
    pub held: usize,
    /// Until when new addresses may be leased, in seconds since the epoch; `None` without a lease.
    pub lease_until: Option<i64>,
    /// Name and UID of this node's PodCIDRs: what the API server must confirm now and then.
    pub own: Vec<(String, String)>,
    /// Longest time between two such confirmations.
    pub contact_every: Duration,
    /// A second complete list is wanted, to confirm withdrawals.
    pub wants_list: bool,
    /// A sign of the API server is wanted at once.
    pub wants_contact: bool,
    /// When, at the latest, to look again without any news; on `CLOCK_BOOTTIME`.
    pub next: Option<Duration>,
}

/// The stages of one pass.
pub struct Pass<'a> {
    /// What should be in the kernel.
    pub desired: &'a Desired,
    /// What is.
    pub done: &'a Done,
    /// This node's blocks.
    pub own: &'a OwnBlocks,
    /// What the node's own state added.
    pub host: &'a Host,
    /// MTU of new pods.
    pub mtu: Option<u32>,
    /// Leased addresses.
    pub usage: &'a Usage,
    /// Which families need another block.
    pub wants: Option<String>,
    /// What sweeps did.
    pub swept: Swept,
    /// The forward hook.
    pub forwarding: Option<&'a Forwarding>,
    /// Objects that cannot be followed.
    pub faults: Vec<Fault>,
    /// What came of the steps.
    pub outcome: Outcome,
    /// Withdrawals that wait.
    pub held: Held,
    /// Pods whose addresses are another node's.
    pub doubled: Doubled,
    /// For whom the first conflist came too early, in words.
    pub early: Option<String>,
    /// Which ranges are closed.
    pub closing: Closing,
    /// The CNI side.
    pub cni: CniState,
    /// Until when may be leased.
    pub lease: &'a Lease,
    /// Files among which the runtime chooses.
    pub confs: Vec<String>,
    /// Plugins behind ours.
    pub chained: Vec<String>,
    /// What the probes found; `None` if they are switched off.
    pub probes: Option<&'a probe::findings::Findings>,
}

/// Memory of the reports.
pub struct Reporter {
    node: String,
    boot_id: String,
    proc_net: PathBuf,
    conditions: Vec<Condition>,
    incidents: Incidents,
    fight: Fight,
    /// What was put back last, and who is likely to have undone it: of a fight.
    contested: String,
    /// The round trip of probes that was reported last, in microseconds.
    rtt_micros: Option<i64>,
}

impl Reporter {
    /// The reporter of a node.
    pub fn new(settings: &Settings, boot_id: &str) -> Reporter {
        Reporter {
            node: settings.me.node.clone(),
            boot_id: boot_id.to_owned(),
            proc_net: settings.proc_net.clone(),
            conditions: Vec::new(),
            incidents: Incidents::default(),
            fight: Fight::default(),
            contested: String::new(),
            rtt_micros: None,
        }
    }

    /// How fast things are put back.
    pub fn fight(&self) -> &Fight {
        &self.fight
    }

    /// The `last` report with what was put back since, by a look at nothing else.
    pub fn mended(&mut self, last: &Report, outcome: &Outcome, wake: &Wake) -> Report {
        self.record(outcome, wake);
        let mut report = Report { repairs: self.repairs(), ..last.clone() };
        report.contests = self.incidents.count_of(CONTESTED);
        report.status.incidents = self.incidents.list();
        if let Some(routes) = &mut report.status.routes {
            routes.repaired = self.incidents.count(Repair::Route);
        }
        report
    }

    fn repairs(&self) -> BTreeMap<Repair, i64> {
        Repair::ALL.map(|repair| (repair, self.incidents.count(repair))).into()
    }

    /// The report of a node that has no objects yet.
    pub fn waiting(&mut self, known: &Objects) -> Report {
        let status = self.status(known, None);
        Report { status, contact_every: Duration::from_secs(60), ..Report::default() }
    }

    /// The report of a node whose passes fail again and again: the `last` one, whose words about the routes do
    /// not hold any more.
    pub fn failing(&mut self, last: Report, error: &str) -> Report {
        let mut report = last;
        let status = &mut report.status;
        status.agent_version = Some(env!("CARGO_PKG_VERSION").to_owned());
        status.boot_id = Some(self.boot_id.clone());
        report::failing(status, error, &Time(Timestamp::now()));
        tell_flips(&self.conditions, &status.conditions);
        self.conditions.clone_from(&status.conditions);
        // Nothing is to be asked for by a pass that was not made.
        Report { wants_list: false, wants_contact: false, next: None, ..report }
    }

    fn status(&mut self, known: &Objects, findings: Option<&Findings>) -> NodeNetworkStatus {
        let now = Time(Timestamp::now());
        let status = report::status(known, findings, &self.conditions, &self.boot_id, &now);
        tell_flips(&self.conditions, &status.conditions);
        self.conditions.clone_from(&status.conditions);
        status
    }

    /// The report of a pass.
    pub fn report(
        &mut self,
        known: &Objects,
        map: Map<'_>,
        mut pass: Pass<'_>,
        policies: impl FnOnce(&[Fault]) -> Vec<PolicyReport>,
        culprits: impl FnOnce() -> Wake,
    ) -> Report {
        if !pass.outcome.repaired.is_empty() {
            self.record(&pass.outcome, &culprits());
        }
        self.record_swept(&pass.swept);
        if let Some(words) = &pass.early {
            tracing::warn!("{words}");
            self.incidents.ready_early(words, Timestamp::now());
        }
        self.incidents.pods_cut_off(&pass.doubled.newly, Timestamp::now());
        let mut faults = std::mem::take(&mut pass.faults);
        faults.append(&mut pass.outcome.faults);
        faults.append(&mut pass.closing.faults);
        faults.extend(self.own_troubles(map, &pass.outcome));

        faults.extend(known.blocks.faults.values().chain(known.ranges.faults.values()).cloned());

        let mut by_reason: BTreeMap<Reason, usize> = BTreeMap::new();
        for fault in &faults {
            *by_reason.entry(fault.reason).or_default() += 1;
        }
        let findings = self.findings(map, &pass, faults);
        let mut status = self.status(known, Some(&findings));
        status.policies = policies(&findings.faults);
        let own = known.blocks.facts.values().filter(|block| block.node == self.node && !block.released());
        let lease_seconds = desired::lease_seconds(&self.node, map);
        Report {
            status,
            nodes: map.blocks.values().map(|block| block.node.as_str()).collect::<BTreeSet<_>>().len(),
            programmed: true,
            faults: by_reason,
            repairs: self.repairs(),
            contested: findings.contested.is_some(),
            contests: self.incidents.count_of(CONTESTED),
            leases_ended: self.incidents.count_of(LEASES_ENDED),
            leases_rebuilt: self.incidents.count_of(LEASES_REBUILT),
            wants: pass.wants,
            probes: pass.probes.cloned(),
            held: pass.held.names.len(),
            lease_until: lease_until(pass.lease),
            own: own.map(|block| (block.name.clone(), block.uid.clone())).collect(),
            contact_every: Duration::from_secs(u64::from((lease_seconds / 4).clamp(5, 60))),
            wants_list: pass.held.wants_list,
            wants_contact: pass.closing.wants_contact,
            next: pass.held.next.into_iter().chain(pass.closing.next).chain(self.fight.ends_at()).min(),
        }
    }

    fn record(&mut self, outcome: &Outcome, wake: &Wake) {
        let nft: Vec<&str> = wake.nft_culprits.iter().map(String::as_str).collect();
        let ports: Vec<&str> = wake.route_culprits.iter().map(String::as_str).collect();
        let (nft, ports) = (nft.join(", "), ports.join(", "));
        let mut undone = Vec::new();
        for (repair, what) in &outcome.repaired {
            let culprit = match repair {
                Repair::Nft | Repair::Forward => nft.as_str(),
                Repair::Route => ports.as_str(),
                _ => "",
            };
            let culprit = (!culprit.is_empty()).then_some(culprit);
            let first = what.first().map(String::as_str).unwrap_or_default();
            tracing::warn!(reason = repair.reason(), count = what.len(), first, culprit, "put back");
            self.incidents.record(*repair, what, culprit, Timestamp::now());
            undone.push(match culprit {
                Some(culprit) => format!("{first}, likely by {culprit}"),
                None => first.to_owned(),
            });
        }
        self.contested = format!(
            "another program keeps undoing what this agent puts back ({}): it is put back {} times a second from now on; find that program and take it off pods' routes, tables and files",
            undone.join("; "),
            Duration::from_secs(1).as_millis() / fights::REFILL.as_millis(),
        );
        if self.fight.repaired(Duration::from_millis(boot::boot_ms())) {
            tracing::error!("{}", self.contested);
            self.incidents.contested(&self.contested, Timestamp::now());
        }
    }

    fn record_swept(&mut self, swept: &Swept) {
        for lease in &swept.ended {
            tracing::info!(lease, "ended a lease whose link is gone");
        }
        for why in &swept.rebuilt {
            tracing::warn!(why, "the lease store was rebuilt from the kernel");
        }
        for lease in &swept.taken_over {
            tracing::info!(lease, "took over a lease from another network");
        }
        for pods in &swept.contested {
            tracing::error!(pods, "two pods have one address");
        }
        self.incidents.address_conflict(&swept.contested, Timestamp::now());
        self.incidents.leases_taken_over(&swept.taken_over, Timestamp::now());
        self.incidents.leases_ended(&swept.ended, Timestamp::now());
        self.incidents.leases_rebuilt(&swept.rebuilt, Timestamp::now());
    }

    /// What fails of the node as a whole fails its own blocks.
    fn own_troubles(&self, map: Map<'_>, outcome: &Outcome) -> Vec<Fault> {
        let fatal = [Part::Table, Part::Bridge, Part::Gateways, Part::Sysctl];
        let Some(trouble) = fatal.iter().find_map(|part| outcome.troubles.get(part)) else {
            return Vec::new();
        };
        let own = map.blocks.values().filter(|block| block.node == self.node);
        own.map(|block| Fault::block(&block.name, Reason::KernelRefused, trouble.clone())).collect()
    }

    fn findings(&mut self, map: Map<'_>, pass: &Pass<'_>, faults: Vec<Fault>) -> Findings {
        let told = |of: fn(&Forwarding) -> &[forward::Finding]| {
            pass.forwarding.map(of).unwrap_or_default().iter().map(ToString::to_string).collect()
        };
        let families: BTreeSet<Family> = pass.own.keys().map(Block::family).collect();
        let legacy =
            forward::legacy_tables(&self.proc_net).into_iter().filter(|family| families.contains(family));
        let probes = pass.probes.map(|found| probe::report::report(found, map, self.rtt_micros));
        self.rtt_micros = probes.as_ref().and_then(|(report, _)| report.rtt_micros);
        let contested = self.fight.is_on(Duration::from_millis(boot::boot_ms()));
        Findings {
            faults,
            contested: contested.then(|| self.contested.clone()),
            troubles: pass.outcome.troubles.clone(),
            blockers: told(|found| &found.blockers),
            doubts: told(|found| &found.doubts),
            hiders: told(|found| &found.hiders),
            legacy: legacy.map(|family| format!("{family} filter")).collect(),
            held: pass.held.names.clone(),
            lost: pass.held.lost.clone(),
            doubled: pass.doubled.pods.clone(),
            routes: RouteCounts {
                desired: count(pass.desired.routes.len()),
                installed: count(pass.done.routes.len()),
                repaired: self.incidents.count(Repair::Route),
            },
            held_blocks: held_blocks(pass.own, &pass.host.leased, pass.usage),
            mtu: pass.mtu,
            cni: Some(pass.cni.clone()),
            active_conf: conf::active(&pass.confs).cloned(),
            chained: pass.chained.clone(),
            other_confs: conf::others(&pass.confs).cloned().collect(),
            foreign_pods: pass.usage.foreign_pods(map.ranges.values().map(|range| range.range)),
            incidents: self.incidents.list(),
            probes,
        }
    }
}

/// Logs each condition whose status or reason changed, for those who look at the node and not at the API.
fn tell_flips(before: &[Condition], now: &[Condition]) {
    for condition in now {
        let was = before.iter().find(|c| c.type_ == condition.type_);
        if was.is_none_or(|was| (&was.status, &was.reason) != (&condition.status, &condition.reason)) {
            let Condition { type_, status, reason, message, .. } = condition;
            tracing::info!(condition = %type_, %status, %reason, "{message}");
        }
    }
}

fn count(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The node's blocks, and whatever else still has leases: the operator hands none of them to another node.
fn held_blocks(own: &OwnBlocks, leased: &BTreeSet<Block>, usage: &Usage) -> Vec<HeldBlockReport> {
    let held: BTreeSet<Block> = own.keys().chain(leased).copied().collect();
    let report = |block: Block| HeldBlockReport {
        cidr: block.to_string(),
        used: usage.used(&block),
        capacity: i64::from(block.capacity()),
    };
    held.into_iter().map(report).collect()
}

/// From the boot clock to the wall clock.
fn lease_until(lease: &Lease) -> Option<i64> {
    if lease.until_boot_ms == 0 {
        return None;
    }
    let until = i64::try_from(lease.until_boot_ms / 1000).ok()?;
    let now = i64::try_from(boot::boot_ms() / 1000).ok()?;
    Some(Timestamp::now().as_second() + until - now)
}
