//! The node's report, from what a pass found and did: pure, down to the sentences.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use plat_crds::condition::{
    self, CNI_READY, FORWARDING_BLOCKED, MASQUERADE_READY, OVERLAPPING, PEERS_REACHABLE, ROUTES_READY,
    Verdict, WITHDRAWALS_HELD,
};
use plat_crds::digest::Digest;
use plat_crds::node_network::{
    Applied, CniReport, FailedObject, HeldBlockReport, Incident, LostBlock, LostBlocks, MAX_BLOCKS,
    MAX_OTHER_CONFS, MAX_REPORTED, NodeNetworkStatus, ProbesReport, RouteCounts,
};

use crate::apply::Part;
use crate::facts::{Fact, Fault, Kind, Reason};
use crate::objects::Objects;

/// The CNI side of the node, as far as it got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CniState {
    /// New pods get our network.
    Installed,
    /// They do, but host ports do not work.
    WithoutPortmap,
    /// They do, but without limits of bandwidth.
    WithoutBandwidth,
    /// The node has no block yet.
    NoBlock,
    /// Something that must come before it is not in place.
    Waiting,
    /// The API server has not confirmed this node's blocks yet.
    Unconfirmed,
    /// Not every live node routes to these PodCIDRs of this node yet.
    Unconverged(Vec<String>),
    /// The CNI binary could not be installed.
    PluginNotInstalled(String),
    /// The blocks file could not be written.
    BlocksNotWritten(String),
    /// The conflist could not be written.
    ConflistNotWritten(String),
    /// The runtime takes that file.
    Shadowed(String),
    /// The lease store cannot be used, and new pods are refused.
    StoreUnusable(String),
    /// The API server was last reached at that time, and new pods are refused.
    LeaseExpired(String),
}

impl CniState {
    /// Whether new pods get our network.
    pub fn is_ready(&self) -> bool {
        matches!(self, CniState::Installed | CniState::WithoutPortmap)
    }
}

/// What one pass found and did.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// Objects that cannot be followed, or not wholly.
    pub faults: Vec<Fault>,
    /// Who keeps undoing what is put back, in words.
    pub contested: Option<String>,
    /// Failures of the node as a whole.
    pub troubles: BTreeMap<Part, String>,
    /// What drops pod packets in foreign chains.
    pub blockers: Vec<String>,
    /// What may drop them.
    pub doubts: Vec<String>,
    /// What hides pods' addresses.
    pub hiders: Vec<String>,
    /// Legacy tables that cannot be judged.
    pub legacy: Vec<String>,
    /// Objects whose withdrawal waits.
    pub held: Vec<String>,
    /// Blocks whose PodCIDRs went without having been released.
    pub lost: Vec<LostBlock>,
    /// Pods whose addresses are another node's, in words.
    pub doubled: Vec<String>,
    /// Routes.
    pub routes: RouteCounts,
    /// Blocks of this node, with their counters.
    pub held_blocks: Vec<HeldBlockReport>,
    /// MTU of new pods.
    pub mtu: Option<u32>,
    /// The CNI side.
    pub cni: Option<CniState>,
    /// The file that the runtime takes.
    pub active_conf: Option<String>,
    /// Chained plugins of our configuration that the node has.
    pub chained: Vec<String>,
    /// Configurations of other networks behind ours.
    pub other_confs: Vec<String>,
    /// Pods that another network attached.
    pub foreign_pods: usize,
    /// What happened lately.
    pub incidents: Vec<Incident>,
    /// What the probes found, in words; `None` if they are switched off.
    pub probes: Option<(ProbesReport, Verdict)>,
}

impl Reason {
    /// Whether the object's effect is missing in the kernel, rather than being worth a word only.
    pub fn fails(self) -> bool {
        let notices = [Reason::RangeHoldsNeededAddress, Reason::Overridden, Reason::HostRoute];
        !notices.contains(&self)
    }
}

/// The status without the time of reporting. `known` are the newest objects, `conditions` the previous
/// ones; `None` for `findings` means that the node waits for its first objects.
pub fn status(
    known: &Objects,
    findings: Option<&Findings>,
    conditions: &[Condition],
    boot_id: &str,
    now: &Time,
) -> NodeNetworkStatus {
    let mut conditions = conditions.to_vec();
    let mut status = NodeNetworkStatus {
        agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        boot_id: Some(boot_id.to_owned()),
        ..NodeNetworkStatus::default()
    };
    let Some(findings) = findings else {
        condition::set(&mut conditions, &waiting(), None, now);
        return NodeNetworkStatus { conditions, ..status };
    };
    for verdict in verdicts(findings) {
        condition::set(&mut conditions, &verdict, None, now);
    }
    let probes = findings.probes.clone().unzip();
    condition::set_or_remove(&mut conditions, PEERS_REACHABLE, probes.1.as_ref(), None, now);
    status.probes = probes.0;
    status.applied = Some(applied(known, &findings.faults));
    status.held_blocks = findings.held_blocks.iter().take(MAX_BLOCKS).cloned().collect();
    status.lost = lost(&findings.lost);
    status.routes = Some(findings.routes);
    status.cni = Some(CniReport {
        active: findings.active_conf.clone(),
        chained: findings.chained.clone(),
        others: findings.other_confs.iter().take(MAX_OTHER_CONFS).cloned().collect(),
        foreign_pods: i64::try_from(findings.foreign_pods).ok().filter(|count| *count > 0),
    });
    status.mtu = findings.mtu.and_then(|mtu| i32::try_from(mtu).ok());
    status.incidents = findings.incidents.clone();
    status.conditions = conditions;
    status
}

/// Changes the last status of a node whose passes fail again and again. What is in its kernel is not looked
/// after, and whether a block without leases has some by now is not known.
pub fn failing(status: &mut NodeNetworkStatus, error: &str, now: &Time) {
    let message = format!("the node is not looked after: {error}; tried again every second");
    let verdict = Verdict::new(ROUTES_READY, None, "PassFailed", message);
    condition::set(&mut status.conditions, &verdict, None, now);
    for held in &mut status.held_blocks {
        held.used = held.used.filter(|used| *used > 0);
    }
}

fn waiting() -> Verdict {
    Verdict::new(
        ROUTES_READY,
        None,
        "WaitingForObjects",
        "no complete list of PodCIDRs and ClusterCIDRs was received yet, and there is no cache of one; nothing on this node is changed until then",
    )
}

fn applied(known: &Objects, faults: &[Fault]) -> Applied {
    let failed: BTreeSet<(Kind, &str)> = faults
        .iter()
        .filter(|fault| fault.reason.fails())
        .map(|fault| (fault.kind, fault.name.as_str()))
        .collect();
    let blocks =
        known.blocks.facts.iter().map(|(name, fact)| ((Kind::PodCIDR, name.as_str()), fact.identity()));
    let ranges =
        known.ranges.facts.iter().map(|(name, fact)| ((Kind::ClusterCIDR, name.as_str()), fact.identity()));
    let objects = blocks.chain(ranges);
    let seen = Digest::of(objects.clone().map(|(_, identity)| identity));
    let (mut digest, mut count) = (seen, 0);
    for (key, (uid, generation)) in objects {
        if failed.contains(&key) {
            digest.remove(uid, generation);
        } else {
            count += 1;
        }
    }
    let mut named: Vec<&Fault> = faults.iter().filter(|fault| fault.reason.fails()).collect();
    named.sort_by_key(|fault| (fault.reason != Reason::NotWithdrawn, *fault));
    // An object counts once, by what stands first: its other faults need not be its neighbours.
    let mut counted = BTreeSet::new();
    named.retain(|fault| counted.insert((fault.kind, &fault.name)));
    let total = named.len();
    let named = named.into_iter().take(MAX_REPORTED).map(|fault| FailedObject {
        name: fault.name.clone(),
        reason: fault.reason.as_str().to_owned(),
        message: fault.message.chars().take(512).collect(),
    });
    Applied {
        count,
        digest: digest.to_string(),
        seen_digest: Some(seen.to_string()),
        failed_count: (total > MAX_REPORTED).then(|| i64::try_from(total).unwrap_or(i64::MAX)),
        failed: named.collect(),
    }
}

fn lost(blocks: &[LostBlock]) -> Option<LostBlocks> {
    let named = || blocks.iter().take(MAX_BLOCKS).cloned().collect();
    (!blocks.is_empty())
        .then(|| LostBlocks { count: i64::try_from(blocks.len()).unwrap_or(i64::MAX), blocks: named() })
}

fn verdicts(findings: &Findings) -> Vec<Verdict> {
    let mut verdicts = vec![
        routes_ready(findings),
        masquerade_ready(findings),
        forwarding_blocked(findings),
        overlapping(findings),
        withdrawals_held(findings),
    ];
    verdicts.extend(findings.cni.as_ref().map(cni_ready));
    verdicts
}

fn routes_ready(findings: &Findings) -> Verdict {
    let not = |reason, message: String| Verdict::new(ROUTES_READY, Some(false), reason, message);
    if let Some(trouble) = findings.troubles.get(&Part::Bridge) {
        return not("BridgeNotReady", trouble.clone());
    }
    if let Some(trouble) = findings.troubles.get(&Part::Gateways) {
        return not("GatewaysNotReady", trouble.clone());
    }
    if let Some(trouble) = findings.troubles.get(&Part::Tunnel) {
        return not("TunnelNotReady", trouble.clone());
    }
    if let Some(trouble) = findings.troubles.get(&Part::Sysctl) {
        return not("SysctlRefused", trouble.clone());
    }
    let failing = || findings.faults.iter().filter(|fault| fault.reason.fails());
    if let Some(first) = failing().min() {
        let others = failing().count() - 1;
        let more = if others > 0 { format!(" (and {others} more objects)") } else { String::new() };
        return not(first.reason.as_str(), format!("{}{more}", first.message));
    }
    if let Some(words) = &findings.contested {
        return Verdict::new(ROUTES_READY, Some(true), "Contested", words.clone());
    }
    match findings.faults.first() {
        Some(notice) => {
            Verdict::new(ROUTES_READY, Some(true), notice.reason.as_str(), notice.message.clone())
        }
        None => Verdict::new(ROUTES_READY, Some(true), "AllInstalled", "every wanted route is in the kernel"),
    }
}

fn masquerade_ready(findings: &Findings) -> Verdict {
    match findings.troubles.get(&Part::Table) {
        Some(trouble) => Verdict::new(MASQUERADE_READY, Some(false), "KernelRefused", trouble.clone()),
        None => Verdict::new(
            MASQUERADE_READY,
            Some(true),
            "TableInstalled",
            "the nftables table inet plat is in the kernel",
        ),
    }
}

fn forwarding_blocked(findings: &Findings) -> Verdict {
    let verdict = |status, reason, message: String| Verdict::new(FORWARDING_BLOCKED, status, reason, message);
    if let Some(trouble) = findings.troubles.get(&Part::Admission) {
        return verdict(Some(true), "KernelRefused", trouble.clone());
    }
    if !findings.blockers.is_empty() {
        return verdict(Some(true), "ForeignFirewall", findings.blockers.join("; "));
    }
    if !findings.doubts.is_empty() {
        return verdict(None, "NotUnderstood", findings.doubts.join("; "));
    }
    if !findings.legacy.is_empty() {
        let chains = findings.legacy.join(" and ");
        return verdict(
            None,
            "LegacyTables",
            format!(
                "the legacy (not nft) table of {chains} is loaded, and its policy cannot be seen from here; check that its chain FORWARD lets pods through, or move to iptables-nft"
            ),
        );
    }
    if !findings.hiders.is_empty() {
        return verdict(Some(false), "SourceHidden", findings.hiders.join("; "));
    }
    verdict(Some(false), "NothingFound", "no foreign chain drops forwarded pod packets".to_owned())
}

fn overlapping(findings: &Findings) -> Verdict {
    if let Some(first) = findings.doubled.first() {
        let message = format!(
            "{} pods of this node have addresses that are another node's by now, and are off the network; delete them: {first}",
            findings.doubled.len()
        );
        return Verdict::new(OVERLAPPING, Some(true), "PodsCutOff", message);
    }
    let overlaps = [Reason::BlockHoldsNeededAddress, Reason::Overlapping, Reason::HostRoute];
    let found = |reason: &Reason| findings.faults.iter().find(|fault| fault.reason == *reason);
    match overlaps.iter().find_map(found) {
        Some(fault) => Verdict::new(OVERLAPPING, Some(true), fault.reason.as_str(), fault.message.clone()),
        None => Verdict::new(
            OVERLAPPING,
            Some(false),
            "Disjoint",
            "no two blocks share addresses, nor do blocks and what else this host has routes to",
        ),
    }
}

fn withdrawals_held(findings: &Findings) -> Verdict {
    if findings.held.is_empty() {
        return Verdict::new(WITHDRAWALS_HELD, Some(false), "NothingHeld", "nothing waits to be withdrawn");
    }
    let named: Vec<&str> = findings.held.iter().take(4).map(String::as_str).collect();
    let message = format!(
        "{} objects are missing from the API server without having been released ({}{}); their routes stay until a second complete list confirms it and the hold time has passed",
        findings.held.len(),
        named.join(", "),
        if findings.held.len() > named.len() { ", …" } else { "" },
    );
    Verdict::new(WITHDRAWALS_HELD, Some(true), "Unconfirmed", message)
}

fn cni_ready(state: &CniState) -> Verdict {
    let (status, reason, message) = match state {
        CniState::Installed => (true, "Installed", "the CNI binary, the blocks file and the conflist are in place".to_owned()),
        CniState::WithoutPortmap => (
            true,
            "WithoutPortmap",
            "in place, but hostPort does nothing: it is left to the portmap plugin, which the node does not have; install the reference CNI plugins or set hostPorts=plat".to_owned(),
        ),
        CniState::WithoutBandwidth => (
            true,
            "WithoutBandwidth",
            "in place, but bandwidth annotations do nothing: they are left to the bandwidth plugin, which the node does not have; install the reference CNI plugins or set bandwidth=plat".to_owned(),
        ),
        CniState::NoBlock => (
            false,
            "NoBlock",
            "this node has no PodCIDR to lease from yet; see 'kubectl get clustercidrs' for a range that selects it and has free blocks".to_owned(),
        ),
        CniState::Waiting => (
            false,
            "NotProgrammed",
            "the conflist is written once routes, masquerade and bridge are in place; see the other conditions".to_owned(),
        ),
        CniState::Unconfirmed => (
            false,
            "Unconfirmed",
            "the conflist is written once the API server confirms that this node's blocks are still its own".to_owned(),
        ),
        CniState::Unconverged(names) => (
            false,
            "Unconverged",
            format!("the conflist is written once every live node routes to PodCIDR {} (readiness=converged), or when the deadline passes", names.join(", ")),
        ),
        CniState::PluginNotInstalled(why) => (false, "PluginNotInstalled", why.clone()),
        CniState::BlocksNotWritten(why) => (false, "BlocksNotWritten", why.clone()),
        CniState::ConflistNotWritten(why) => (false, "ConflistNotWritten", why.clone()),
        CniState::Shadowed(by) => (
            false,
            "Shadowed",
            format!("the container runtime takes {by}, which sorts before ours; remove that file if new pods are to get Plat's network"),
        ),
        CniState::StoreUnusable(why) => {
            (false, "StoreUnusable", format!("new pods are refused, and running pods go on: {why}"))
        }
        CniState::LeaseExpired(since) => (
            false,
            "LeaseExpired",
            format!("the API server was last reached at {since}; new pods are refused, since this node's blocks may be another's by now; running pods go on; restore the connection"),
        ),
    };
    Verdict::new(CNI_READY, Some(status), reason, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::RangeFact;
    use crate::fixtures::{objects, range};
    use k8s_openapi::jiff::Timestamp;
    use plat_crds::node_network::NOT_WITHDRAWN;

    fn known() -> Objects {
        objects(vec![], vec![range("a"), RangeFact { generation: 2, ..range("b") }])
    }

    fn report(findings: &Findings) -> NodeNetworkStatus {
        status(&known(), Some(findings), &[], "boot", &Time(Timestamp::from_second(7).unwrap()))
    }

    fn condition(findings: &Findings, type_: &str) -> Condition {
        condition::find(&report(findings).conditions, type_).unwrap().clone()
    }

    #[test]
    fn the_digest_holds_what_is_in_the_kernel_and_nothing_else() {
        let whole = report(&Findings::default()).applied.unwrap();
        assert_eq!((whole.count, whole.digest), (2, Digest::of([("uid-a", 1), ("uid-b", 2)]).to_string()));
        let fault = Fault::range("b", Reason::ForeignRoute, "taken");
        let part = report(&Findings { faults: vec![fault], ..Findings::default() }).applied.unwrap();
        assert_eq!((part.count, part.digest), (1, Digest::of([("uid-a", 1)]).to_string()));
        assert_eq!((part.failed[0].name.as_str(), part.failed[0].reason.as_str()), ("b", "ForeignRoute"));
        let notice = Fault::range("b", Reason::RangeHoldsNeededAddress, "open");
        let findings = Findings { faults: vec![notice], ..Findings::default() };
        assert_eq!(report(&findings).applied.unwrap().count, 2, "a notice fails nothing");
        assert_eq!(condition(&findings, ROUTES_READY).status, "True");
    }

    #[test]
    fn a_route_that_stays_is_named_first_and_what_was_seen_does_not_depend_on_what_fails() {
        let mut faults: Vec<Fault> =
            (0..99).map(|n| Fault::block(format!("b{n}"), Reason::NotOnLink, "x")).collect();
        faults.extend([
            Fault::range("b", Reason::ForeignRoute, "x"),
            Fault::range("b", Reason::NotOnLink, "y"),
        ]);
        faults.push(Fault::block("z", Reason::NotWithdrawn, "stays"));
        faults.push(Fault::block("z", Reason::NotOnLink, "cannot be reached either"));
        let findings = Findings { faults, ..Findings::default() };
        let applied = report(&findings).applied.unwrap();
        assert_eq!(
            (applied.failed[0].name.as_str(), applied.failed[0].reason.as_str()),
            ("z", NOT_WITHDRAWN)
        );
        assert_eq!(applied.failed_count, Some(101), "an object counts once");
        assert_eq!(applied.seen_digest, Some(Digest::of([("uid-a", 1), ("uid-b", 2)]).to_string()));
        assert_eq!(condition(&findings, ROUTES_READY).status, "False");
    }

    #[test]
    fn an_unreadable_object_is_named_and_not_counted() {
        let fault = Fault::range("a", Reason::Unreadable, "bad");
        let findings = Findings { faults: vec![fault], ..Findings::default() };
        let applied = report(&findings).applied.unwrap();
        assert_eq!((applied.count, applied.failed[0].reason.as_str()), (1, "Unreadable"));
        assert_eq!(condition(&findings, ROUTES_READY).reason, "Unreadable");
    }

    #[test]
    fn lists_are_bounded_as_the_api_server_wants_them() {
        let faults = (0..99).map(|n| Fault::block(format!("b{n}"), Reason::NotOnLink, "x".repeat(9999)));
        let status = report(&Findings { faults: faults.collect(), ..Findings::default() });
        let applied = status.applied.unwrap();
        assert_eq!((applied.failed.len(), applied.failed[0].message.len()), (16, 512));
        assert_eq!(applied.failed_count, Some(99));
        assert!(status.conditions.iter().all(|c| c.message.chars().count() <= 1024));
        let block = |n| LostBlock { cidr: format!("10.244.{n}.0/24"), node_name: format!("n{n}") };
        let lost = report(&Findings { lost: (0..99).map(block).collect(), ..Findings::default() }).lost;
        assert_eq!(lost.map(|lost| (lost.count, lost.blocks.len())), Some((99, 64)));
        assert_eq!(report(&Findings::default()).lost, None);
        assert!(condition::find(&status.conditions, ROUTES_READY).is_some_and(|c| c.reason == "NotOnLink"));
    }

    #[test]
    fn a_node_that_waits_says_so_and_reports_nothing_else() {
        let now = Time(Timestamp::from_second(7).unwrap());
        let status = status(&Objects::default(), None, &[], "boot", &now);
        assert_eq!(status.applied, None);
        assert_eq!(
            (status.conditions[0].status.as_str(), status.conditions[0].reason.as_str()),
            ("Unknown", "WaitingForObjects")
        );
    }

    #[test]
    fn a_node_whose_passes_fail_says_so_and_lets_no_block_go() {
        let held = |cidr: &str, used| HeldBlockReport { cidr: cidr.into(), used: Some(used), capacity: 253 };
        let findings = Findings {
            held_blocks: vec![held("10.244.1.0/24", 0), held("10.244.2.0/24", 4)],
            ..Findings::default()
        };
        let mut status = report(&findings);
        failing(&mut status, "list routes: no answer", &Time(Timestamp::from_second(9).unwrap()));
        let routes = condition::find(&status.conditions, ROUTES_READY).unwrap();
        assert_eq!((routes.status.as_str(), routes.reason.as_str()), ("Unknown", "PassFailed"));
        assert!(routes.message.contains("list routes: no answer"));
        assert_eq!(status.held_blocks.iter().map(|held| held.used).collect::<Vec<_>>(), [None, Some(4)]);
        assert_eq!(condition::find(&status.conditions, MASQUERADE_READY).unwrap().status, "True");
    }

    #[test]
    fn every_state_has_its_condition() {
        for (state, status, reason) in [
            (CniState::Installed, "True", "Installed"),
            (CniState::WithoutPortmap, "True", "WithoutPortmap"),
            (CniState::WithoutBandwidth, "True", "WithoutBandwidth"),
            (CniState::NoBlock, "False", "NoBlock"),
            (CniState::Waiting, "False", "NotProgrammed"),
            (CniState::StoreUnusable("x".into()), "False", "StoreUnusable"),
            (CniState::Unconfirmed, "False", "Unconfirmed"),
            (CniState::Unconverged(vec!["b".into()]), "False", "Unconverged"),
            (CniState::PluginNotInstalled("w".into()), "False", "PluginNotInstalled"),
            (CniState::BlocksNotWritten("w".into()), "False", "BlocksNotWritten"),
            (CniState::ConflistNotWritten("w".into()), "False", "ConflistNotWritten"),
            (CniState::Shadowed("00-multus.conf".into()), "False", "Shadowed"),
            (CniState::LeaseExpired("2026".into()), "False", "LeaseExpired"),
        ] {
            let got = condition(&Findings { cni: Some(state), ..Findings::default() }, CNI_READY);
            assert_eq!((got.status.as_str(), got.reason.as_str()), (status, reason));
        }
        let legacy = Findings { legacy: vec!["ip filter".into()], ..Findings::default() };
        assert_eq!(condition(&legacy, FORWARDING_BLOCKED).status, "Unknown");
        let hidden = Findings { hiders: vec!["chain z".into()], ..Findings::default() };
        let found = condition(&hidden, FORWARDING_BLOCKED);
        assert_eq!((found.status.as_str(), found.reason.as_str()), ("False", "SourceHidden"));
        let doubtful = Findings { doubts: vec!["chain y".into()], ..legacy };
        let found = condition(&doubtful, FORWARDING_BLOCKED);
        assert_eq!((found.status.as_str(), found.reason.as_str()), ("Unknown", "NotUnderstood"));
        let blocked = Findings { blockers: vec!["chain x".into()], ..doubtful };
        assert_eq!(condition(&blocked, FORWARDING_BLOCKED).status, "True");
        let held = Findings { held: (0..9).map(|n| format!("b{n}")).collect(), ..Findings::default() };
        assert!(condition(&held, WITHDRAWALS_HELD).message.starts_with("9 objects are missing"));
        for part in [Part::Bridge, Part::Gateways, Part::Tunnel, Part::Sysctl] {
            let findings = Findings { troubles: [(part, "no".to_owned())].into(), ..Findings::default() };
            assert_eq!(condition(&findings, ROUTES_READY).status, "False");
        }
    }
}
