//! Executes steps. No policy: what failed is attributed to its object, what had to be put back is counted.

use std::collections::{BTreeMap, BTreeSet};

use plat_cni::bridge::{self, Spec};
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::{netlink, routed, sysctl as cni_sysctl};
use plat_crds::block::{Block, Family};
use plat_crds::lease::Lease;

use crate::diff::Step;
use crate::fabric::{Admit, Bridge, Desired, Devices, Masquerade, Observed, Route, RouteKey, Rule};
use crate::facts::{Fault, Kind, Reason};
use crate::incidents::Repair;
use crate::kernel::forward;
use crate::kernel::nft::Nft;
use crate::kernel::route::{self, SetError};
use crate::kernel::rule;
use crate::kernel::sysctl::Sysctls;
use crate::tunnels;
use crate::vxlan::Tunnel;

/// The sockets and folders that reach the kernel.
pub struct Kernel {
    /// rtnetlink.
    pub route: Socket,
    /// nftables.
    pub nft: Nft,
    /// `/proc/sys/net`.
    pub sysctls: Sysctls,
}

impl Kernel {
    /// Opens the sockets in the current network namespace.
    pub fn open(sysctls: Sysctls) -> Result<Kernel, netlink::Error> {
        Ok(Kernel { route: Socket::open(Protocol::Route)?, nft: Nft::open()?, sysctls })
    }
}

/// What is known to have been in place after the last pass. A step that makes just that again is a repair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// The table.
    pub table: Option<Masquerade>,
    /// Routes.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Rules.
    pub rules: BTreeSet<Rule>,
    /// Sysctls.
    pub sysctls: BTreeMap<String, String>,
    /// The bridge.
    pub bridge: Option<Bridge>,
    /// The blocks whose gateways stand on `lo`.
    pub gateways: BTreeSet<Block>,
    /// Tunnels.
    pub tunnels: BTreeMap<Family, Tunnel>,
    /// Accept rules in foreign chains.
    pub admitted: BTreeSet<Admit>,
}

/// Something of the node as a whole that could not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The nftables table.
    Table,
    /// The bridge.
    Bridge,
    /// A VXLAN device or an entry of its tables.
    Tunnel,
    /// Gateways on `lo`, and the routes to pods without bridge.
    Gateways,
    /// A sysctl.
    Sysctl,
    /// An accept rule in a foreign chain.
    Admission,
}

/// What came of the steps.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Objects whose routes could not be set.
    pub faults: Vec<Fault>,
    /// Keys of routes that could not be set.
    pub failed_routes: BTreeSet<RouteKey>,
    /// Rules that could not be added.
    pub failed_rules: BTreeSet<Rule>,
    /// Other failures.
    pub troubles: BTreeMap<Part, String>,
    /// What was put back.
    pub repaired: BTreeMap<Repair, Vec<String>>,
    /// Routes were replaced: of several with one key a wrong one may have gone, which a second look shows.
    pub replaced: bool,
}

impl Outcome {
    /// Notes that something was put back.
    pub fn repaired(&mut self, repair: Repair, what: impl Into<String>) {
        self.repaired.entry(repair).or_default().push(what.into());
    }

    pub(crate) fn trouble(&mut self, part: Part, error: impl ToString) {
        self.troubles.entry(part).or_insert_with(|| error.to_string());
    }

    /// Takes in what came of further steps.
    pub fn merge(&mut self, other: Outcome) {
        self.faults.extend(other.faults);
        self.failed_routes.extend(other.failed_routes);
        self.replaced |= other.replaced;
        self.failed_rules.extend(other.failed_rules);
        self.troubles.extend(other.troubles);
        for (repair, what) in other.repaired {
            self.repaired.entry(repair).or_default().extend(what);
        }
    }

    /// What is in place now that the steps from `observed` towards `desired` were made.
    pub fn done(&self, desired: &Desired, observed: &Observed) -> Done {
        let fine = |part| !self.troubles.contains_key(&part);
        let routes = desired.routes.iter().filter(|(key, _)| !self.failed_routes.contains(key));
        let admitted = desired.admit.iter().filter(|admit| {
            observed.forward.get(&admit.block.family()).is_some_and(|chain| chain.needs_rules)
        });
        let sysctls = desired.sysctls.iter().filter(|_| fine(Part::Sysctl));
        Done {
            table: fine(Part::Table).then(|| desired.masquerade.clone()),
            routes: routes.map(|(key, route)| (*key, route.clone())).collect(),
            rules: desired.rules.difference(&self.failed_rules).copied().collect(),
            sysctls: sysctls.map(|s| (s.path.clone(), s.value.clone())).collect(),
            bridge: desired.bridge.clone().filter(|_| fine(Part::Bridge)),
            tunnels: if fine(Part::Tunnel) { desired.tunnels.clone() } else { BTreeMap::new() },
            gateways: desired.gateways.iter().copied().filter(|_| fine(Part::Gateways)).collect(),
            admitted: admitted.filter(|_| fine(Part::Admission)).copied().collect(),
        }
    }

    /// Whether a route to that prefix could not be set: then the present one is the last that worked.
    fn failed(&self, key: &RouteKey) -> bool {
        self.failed_routes.iter().any(|failed| failed.prefix == key.prefix)
    }
}

/// Executes the steps in order; none stops the others. `devices` are the links of ours that are there.
pub fn apply(
    kernel: &mut Kernel,
    steps: Vec<Step>,
    desired: &Desired,
    before: &Done,
    mut devices: Devices,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut steps = steps.into_iter().peekable();
    while let Some(step) = steps.next() {
        tracing::debug!(?step, "apply");
        match step {
            Step::ReplaceTable => replace_table(kernel, &desired.masquerade, before, &mut outcome),
            Step::AddRoute(route) => {
                let mut routes = vec![route];
                while let Some(Step::AddRoute(route)) =
                    steps.next_if(|next| matches!(next, Step::AddRoute(_)))
                {
                    routes.push(route);
                }
                let results = route::add(&mut kernel.route, &routes, devices);
                for (result, route) in results.into_iter().zip(routes) {
                    set_route(result, route, desired, before, &mut outcome);
                }
            }
            Step::ReplaceRoute(route) => {
                let result = route::replace(&mut kernel.route, &route, devices);
                set_route(result, route, desired, before, &mut outcome);
                outcome.replaced = true;
            }
            Step::DeleteRoute(key) => {
                let mut keys = vec![key];
                while let Some(Step::DeleteRoute(key)) =
                    steps.next_if(|next| matches!(next, Step::DeleteRoute(_)))
                {
                    keys.push(key);
                }
                keys.retain(|key| !outcome.failed(key));
                for (key, error) in route::delete_all(&mut kernel.route, &keys) {
                    outcome.faults.push(not_withdrawn(&key, &error.to_string()));
                }
            }
            Step::AddRule(rule) => match rule::add(&mut kernel.route, &rule) {
                Ok(()) if before.rules.contains(&rule) => outcome.repaired(Repair::Route, rule.to_string()),
                Ok(()) => tracing::info!(%rule, "added a rule that leads to routes to blocks"),
                Err(error) => without_rule(&rule, &error.to_string(), desired, &mut outcome),
            },
            Step::DeleteRule(rule) => {
                if let Err(error) = rule::delete(&mut kernel.route, &rule) {
                    tracing::warn!(%rule, %error, "a rule that should go is still there");
                }
            }
            Step::WriteSysctl(sysctl) => match kernel.sysctls.write(&sysctl) {
                Ok(()) if before.sysctls.get(&sysctl.path) == Some(&sysctl.value) => {
                    outcome
                        .repaired(Repair::Sysctl, format!("sysctl net/{} = {}", sysctl.path, sysctl.value));
                }
                Ok(()) => tracing::info!(sysctl = %sysctl.path, value = %sysctl.value, "set sysctl"),
                Err(error) => outcome.trouble(Part::Sysctl, error),
            },
            Step::EnsureBridge(wanted) => {
                if let Some(index) = ensure_bridge(kernel, &wanted, before, &mut outcome) {
                    devices.bridge = Some(index);
                }
            }
            Step::EnsureTunnel(device) => {
                let index = tunnels::ensure(kernel, &device, before, &mut outcome);
                *devices.tunnel_mut(device.underlay) = index;
            }
            Step::SetEntries { underlay, entries } => {
                tunnels::set(kernel, devices, underlay, &entries, before, &mut outcome);
            }
            Step::RemoveEntries { underlay, entries, strange } => {
                tunnels::remove(kernel, devices, underlay, entries, &strange, before, &mut outcome);
            }
            Step::RemoveTunnel(underlay) => tunnels::delete(kernel, underlay, &mut outcome),
            Step::EnsureGateways(blocks) => ensure_gateways(kernel, &blocks, before, &mut outcome),
            Step::Admit(admit) => {
                match forward::append(&mut kernel.nft, &admit, &desired.masquerade.pod_interface) {
                    Ok(()) if before.admitted.contains(&admit) => {
                        outcome
                            .repaired(Repair::Forward, format!("accept rule for {} in FORWARD", admit.block));
                    }
                    Ok(()) => {
                        tracing::info!(block = %admit.block, direction = ?admit.direction, "appended an accept rule to FORWARD, whose policy is drop")
                    }
                    Err(error) => outcome.trouble(Part::Admission, error),
                }
            }
            Step::RemoveAdmit { family, handle } => {
                if let Err(error) = forward::remove(&mut kernel.nft, family, handle) {
                    tracing::warn!(%family, handle, %error, "an accept rule that should go is still there");
                }
            }
        }
    }
    outcome
}

/// Replaces the table; a repair if it was so before.
pub fn replace_table(kernel: &mut Kernel, masquerade: &Masquerade, before: &Done, outcome: &mut Outcome) {
    match kernel.nft.replace(masquerade) {
        Ok(()) if before.table.as_ref() == Some(masquerade) => {
            outcome.repaired(Repair::Nft, "nftables table inet plat");
        }
        Ok(()) => tracing::debug!("replaced the nftables table inet plat"),
        Err(error) => outcome.trouble(Part::Table, error),
    }
}

fn set_route(
    result: Result<(), SetError>,
    route: Route,
    desired: &Desired,
    before: &Done,
    outcome: &mut Outcome,
) {
    let error = match result {
        Ok(()) if before.routes.get(&route.key) == Some(&route) => {
            return outcome.repaired(Repair::Route, format!("route {route}"));
        }
        Ok(()) => return,
        Err(error) => error,
    };
    let reason = match &error {
        SetError::Foreign(_) => Reason::ForeignRoute,
        SetError::NotOnLink(_) => Reason::NotOnLink,
        SetError::NoDevice(_) | SetError::Refused(_) => Reason::KernelRefused,
    };
    route_failed(route.key, reason, &error.to_string(), desired, outcome);
}

fn route_failed(key: RouteKey, reason: Reason, error: &str, desired: &Desired, outcome: &mut Outcome) {
    outcome.failed_routes.insert(key);
    if let Some((kind, name)) = desired.owners.get(&key) {
        let message = match kind {
            Kind::PodCIDR => format!("PodCIDR '{name}': {error}"),
            Kind::ClusterCIDR => format!("ClusterCIDR '{name}': {error}"),
            Kind::RoutingPolicy => format!("RoutingPolicy '{name}': {error}"),
        };
        outcome.faults.push(Fault { kind: *kind, name: name.clone(), reason, message });
    }
}

/// No packet finds the routes in the table, so what else leads to their blocks stays.
fn without_rule(rule: &Rule, error: &str, desired: &Desired, outcome: &mut Outcome) {
    outcome.failed_rules.insert(*rule);
    let behind = |key: &&RouteKey| (key.table, key.family()) == (rule.table, rule.family);
    for key in desired.routes.keys().filter(behind) {
        route_failed(*key, Reason::KernelRefused, error, desired, outcome);
    }
}

/// The operator frees no block that a node still routes to, so what stays is a fault of the block.
fn not_withdrawn(key: &RouteKey, error: &str) -> Fault {
    let name = key.prefix.object_name();
    let message = format!("PodCIDR '{name}': route {key} should go and is still there: {error}");
    Fault::block(name, Reason::NotWithdrawn, message)
}

fn ensure_gateways(kernel: &mut Kernel, blocks: &BTreeSet<Block>, before: &Done, outcome: &mut Outcome) {
    let wanted: Vec<Block> = blocks.iter().copied().collect();
    match routed::ensure_gateways(&mut kernel.route, &wanted) {
        Ok(done) if done.is_empty() => {}
        Ok(done) if before.gateways == *blocks => outcome.repaired(Repair::Bridge, done.join(", ")),
        Ok(done) => tracing::info!("{}", done.join(", ")),
        Err(error) => outcome.trouble(Part::Gateways, with_cure(kernel, "lo", &wanted, &error.to_string())),
    }
}

/// Why a link did not get the gateways of these blocks; with a cure if it is that IPv6 is switched off there.
fn with_cure(kernel: &Kernel, link: &str, blocks: &[Block], why: &str) -> String {
    let off = || match kernel.sysctls.read(&format!("ipv6/conf/{link}/disable_ipv6")) {
        Ok(value) => value.is_none_or(|value| value != "0"),
        Err(_) => false,
    };
    match blocks.iter().find(|block| block.family() == Family::IPv6) {
        Some(block) if off() => format!(
            "{why}; this node holds the IPv6 block {block}, and IPv6 is off: no pod starts, as none may get less than the node holds; switch it on (sysctl net.ipv6.conf.all.disable_ipv6=0), or give the node no such block (spec.nodeSelector of the ClusterCIDR)"
        ),
        _ => why.to_owned(),
    }
}

/// Puts back lost routes to pods without bridge.
pub fn restore_pod_routes(kernel: &mut Kernel, leases: &[Lease], blocks: &[Block], outcome: &mut Outcome) {
    match routed::restore(&mut kernel.route, leases, blocks) {
        Ok(done) => done.into_iter().for_each(|what| outcome.repaired(Repair::Route, what)),
        Err(error) => outcome.trouble(Part::Gateways, error),
    }
}

/// Brings the bridge in order by the CNI binary's own code; returns its index.
pub fn ensure_bridge(
    kernel: &mut Kernel,
    wanted: &Bridge,
    before: &Done,
    outcome: &mut Outcome,
) -> Option<u32> {
    let blocks: Vec<Block> = wanted.blocks.iter().copied().collect();
    let spec = Spec { name: &wanted.name, mtu: wanted.mtu, blocks: &blocks };
    let sysctls = cni_sysctl::Sysctls::at(kernel.sysctls.dir());
    match bridge::ensure(&mut kernel.route, &sysctls, &spec) {
        Ok(bridge) => {
            let what = bridge.repaired.join(", ");
            match what.is_empty() {
                true => {}
                false if before.bridge.as_ref() == Some(wanted) => {
                    outcome.repaired(Repair::Bridge, format!("bridge {} ({what})", wanted.name));
                }
                false => tracing::info!(bridge = %wanted.name, "{what}"),
            }
            Some(bridge.index)
        }
        Err(error) => {
            outcome.trouble(Part::Bridge, with_cure(kernel, &wanted.name, &blocks, &error.to_string()));
            None
        }
    }
}
