//! What happened on this node that its users should know: a bounded, counted list. The operator turns new
//! entries into Events.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use plat_cni::sweep;
use plat_crds::node_network::{Incident, MAX_REPORTED};

/// What was put back after somebody removed or changed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Repair {
    /// A route.
    Route,
    /// The nftables table.
    Nft,
    /// A sysctl.
    Sysctl,
    /// The bridge or a gateway on it.
    Bridge,
    /// A VXLAN device or an entry of its tables.
    Tunnel,
    /// An accept rule in a foreign chain.
    Forward,
    /// The CNI binary.
    Plugin,
    /// The blocks file.
    Blocks,
    /// The conflist.
    Conflist,
}

impl Repair {
    /// All of them.
    pub const ALL: [Repair; 9] = [
        Repair::Route,
        Repair::Nft,
        Repair::Sysctl,
        Repair::Bridge,
        Repair::Tunnel,
        Repair::Forward,
        Repair::Plugin,
        Repair::Blocks,
        Repair::Conflist,
    ];

    /// The incident's reason, which is also the Event's.
    pub fn reason(self) -> &'static str {
        match self {
            Repair::Route => "RouteRestored",
            Repair::Nft => "NftRestored",
            Repair::Sysctl => "SysctlRestored",
            Repair::Bridge => "BridgeRestored",
            Repair::Tunnel => "TunnelRestored",
            Repair::Forward => "ForwardRestored",
            Repair::Plugin => "PluginRestored",
            Repair::Blocks => "BlocksRestored",
            Repair::Conflist => "ConflistRestored",
        }
    }

    /// The value of the metric's label `kind`.
    pub fn label(self) -> &'static str {
        match self {
            Repair::Route => "route",
            Repair::Nft => "nft",
            Repair::Sysctl => "sysctl",
            Repair::Bridge => "bridge",
            Repair::Tunnel => "tunnel",
            Repair::Forward => "forward",
            Repair::Plugin => "plugin",
            Repair::Blocks => "blocks",
            Repair::Conflist => "conflist",
        }
    }
}

/// Reason of the incident that leases were ended whose links are gone.
pub const LEASES_ENDED: &str = "LeasesEnded";
/// Reason of the incident that leases of another network's pods were recorded.
pub const LEASES_TAKEN_OVER: &str = "LeasesTakenOver";
/// Reason of the incident that a pod of another network has the address of a pod of ours.
pub const ADDRESS_CONFLICT: &str = "AddressConflict";
/// Reason of the incident that the node became Ready before every live node routed to it.
pub const READY_EARLY: &str = "ReadyBeforeConverged";
/// Reason of the incident that pods were taken off the network, as their addresses are another node's.
pub const PODS_CUT_OFF: &str = "PodsCutOff";
/// Reason of the incident that another program keeps undoing what is put back.
pub const CONTESTED: &str = "RepairsContested";
/// Reason of the incident that the lease store was rebuilt from the kernel.
pub const LEASES_REBUILT: &str = "LeasesRebuilt";

/// Incidents since the agent started, one entry per reason: a flush of two thousand routes is one incident,
/// not two thousand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Incidents(BTreeMap<&'static str, Incident>);

/// Longest message that the API server takes.
const MAX_MESSAGE: usize = 512;

impl Incidents {
    /// Adds that `what` was put back at `now`; `culprit` names who likely removed it.
    pub fn record(&mut self, repair: Repair, what: &[String], culprit: Option<&str>, now: Timestamp) {
        let Some(first) = what.first() else { return };
        let (more, were) = and_more(what.len());
        let mut message = format!("{first}{more} {were} put back");
        if let Some(culprit) = culprit {
            message.push_str(&format!("; likely changed by {culprit}"));
        }
        self.note(repair.reason(), &message, what.len(), now);
    }

    /// Adds that a fight began, in words.
    pub fn contested(&mut self, words: &str, now: Timestamp) {
        self.note(CONTESTED, words, 1, now);
    }

    /// Adds that leases, in words, were ended.
    pub fn leases_ended(&mut self, leases: &[String], now: Timestamp) {
        let Some(first) = leases.first() else { return };
        let (more, were) = and_more(leases.len());
        let message = format!(
            "the lease of {first}{more} {were} ended: the link has been gone for {} s and the runtime's DEL never came",
            sweep::PATIENCE.as_secs()
        );
        self.note(LEASES_ENDED, &message, leases.len(), now);
    }

    /// Adds that leases, in words, of another network's pods were recorded.
    pub fn leases_taken_over(&mut self, leases: &[String], now: Timestamp) {
        let Some(first) = leases.first() else { return };
        let (more, were) = and_more(leases.len());
        let message =
            format!("the lease of {first}{more} {were} taken over from another network of this node");
        self.note(LEASES_TAKEN_OVER, &message, leases.len(), now);
    }

    /// Adds that two pods have one address, in words.
    pub fn address_conflict(&mut self, conflicts: &[String], now: Timestamp) {
        let Some(first) = conflicts.first() else { return };
        let message = format!("two pods have one address: {first}; delete one of the two");
        self.note(ADDRESS_CONFLICT, &message, conflicts.len(), now);
    }

    /// Adds that the node became Ready before every live node routed to it.
    pub fn ready_early(&mut self, words: &str, now: Timestamp) {
        self.note(READY_EARLY, words, 1, now);
    }

    /// Adds that pods, in words, were taken off the network.
    pub fn pods_cut_off(&mut self, pods: &[String], now: Timestamp) {
        let Some(first) = pods.first() else { return };
        let (more, were) = and_more(pods.len());
        let message = format!(
            "the link of {first}{more} {were} taken down: this node was away for so long that its block was given to another; delete these pods"
        );
        self.note(PODS_CUT_OFF, &message, pods.len(), now);
    }

    /// Adds that the lease store was rebuilt, and why each time.
    pub fn leases_rebuilt(&mut self, reasons: &[String], now: Timestamp) {
        let Some(last) = reasons.last() else { return };
        let message = format!("the lease store was rebuilt from the kernel: {last}");
        self.note(LEASES_REBUILT, &message, reasons.len(), now);
    }

    fn note(&mut self, reason: &'static str, message: &str, count: usize, now: Timestamp) {
        let entry = self.0.entry(reason).or_insert_with(|| Incident {
            time: Time(now),
            reason: reason.to_owned(),
            message: String::new(),
            count: 0,
        });
        entry.time = Time(now);
        entry.message = message.chars().take(MAX_MESSAGE).collect();
        entry.count += i64::try_from(count).unwrap_or(i64::MAX);
    }

    /// How often something of that kind was put back.
    pub fn count(&self, repair: Repair) -> i64 {
        self.count_of(repair.reason())
    }

    /// How often something happened for that reason.
    pub fn count_of(&self, reason: &str) -> i64 {
        self.0.get(reason).map_or(0, |incident| incident.count)
    }

    /// The list for the report, oldest first.
    pub fn list(&self) -> Vec<Incident> {
        let mut list: Vec<Incident> = self.0.values().cloned().collect();
        list.sort_by_key(|incident| incident.time.0);
        list.truncate(MAX_REPORTED);
        list
    }
}

/// How many more than the first there are, and the verb that fits.
fn and_more(count: usize) -> (String, &'static str) {
    match count.saturating_sub(1) {
        0 => (String::new(), "was"),
        more => (format!(" and {more} more"), "were"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn repeats_are_counted_and_the_latest_is_told() {
        let mut incidents = Incidents::default();
        let routes: Vec<String> = (0..2000).map(|n| format!("route {n}")).collect();
        incidents.record(Repair::Route, &routes, None, at(1));
        incidents.record(Repair::Nft, &["table inet plat".into()], Some("nft (pid 7)"), at(2));
        incidents.record(Repair::Route, &["10.244.2.0/24 via 172.30.0.12".into()], None, at(3));
        incidents.record(Repair::Sysctl, &[], None, at(4));
        let list = incidents.list();
        assert_eq!(list.len(), 2);
        assert_eq!(list[0].message, "table inet plat was put back; likely changed by nft (pid 7)");
        assert_eq!(
            (list[1].message.as_str(), list[1].count),
            ("10.244.2.0/24 via 172.30.0.12 was put back", 2001)
        );
    }

    #[test]
    fn ended_leases_are_named_and_counted() {
        let mut incidents = Incidents::default();
        let leases =
            ["10.244.3.7 of container a (eth0)", "10.244.3.8 of container b (eth0)"].map(str::to_owned);
        incidents.leases_ended(&leases, at(1));
        incidents.leases_ended(&[], at(2));
        incidents.leases_rebuilt(&["its header cannot be read; it has 3 leases".to_owned()], at(3));
        let list = incidents.list();
        assert_eq!((list[0].reason.as_str(), list[0].count, list[0].time.0), (LEASES_ENDED, 2, at(1)));
        assert!(
            list[0]
                .message
                .starts_with("the lease of 10.244.3.7 of container a (eth0) and 1 more were ended")
        );
        assert_eq!(
            list[1].message,
            "the lease store was rebuilt from the kernel: its header cannot be read; it has 3 leases"
        );
    }

    #[test]
    fn reasons_and_labels_are_distinct_and_fit_the_report() {
        let reasons: std::collections::BTreeSet<_> = Repair::ALL.map(Repair::reason).into();
        let labels: std::collections::BTreeSet<_> = Repair::ALL.map(Repair::label).into();
        assert_eq!((reasons.len(), labels.len()), (Repair::ALL.len(), Repair::ALL.len()));
        assert!(Repair::ALL.len() + 2 <= MAX_REPORTED, "with those of leases");
    }
}
