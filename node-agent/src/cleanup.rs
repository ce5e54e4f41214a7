//! Takes everything of Plat's off a node: `plat-agent cleanup`. Needs no API server and may be repeated.
//!
//! The order is the reverse of the way up: the conflist first, so that no new pod gets a network that is
//! going away. Teardown goes on after an error and collects them. What belongs to pods that still run
//! (their links, and the bridge they hang on) stays and is named.

use plat_cni::netlink::{self, deleted};
use plat_cni::nft::{self, Batch, Table, TableFamily};
use plat_cni::{link, routed, sysctl as cni_sysctl};
use plat_crds::alias;
use plat_crds::block::Family;
use plat_crds::lease::Datapath;
use plat_crds::names::{
    BLOCKS_FILE, CNI_TYPE, CONFLIST_FILE, LEASES_FILE, MAP_FILE, NFT_PODS_TABLE, NFT_TABLE, ROLLOUT_FILE,
    SYSCTLS_FILE,
};

use crate::apply::Kernel;
use crate::args::Place;
use crate::fabric::Devices;
use crate::folder::Folder;
use crate::kernel::sysctl::Sysctls;
use crate::kernel::{self, forward, route, rule};
use crate::vxlan;

/// The probes' socket, at its default place.
const SOCKET_FILE: &str = "agent.sock";

/// What was found and done.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What was removed or put back.
    pub done: Vec<String>,
    /// What must stay, and why.
    pub left: Vec<String>,
    /// What could not be removed.
    pub errors: Vec<String>,
}

impl Outcome {
    fn note<E: std::fmt::Display>(&mut self, what: impl Into<String>, result: Result<bool, E>) {
        match result {
            Ok(true) => self.done.push(what.into()),
            Ok(false) => {}
            Err(error) => self.errors.push(error.to_string()),
        }
    }

    fn each<E: std::fmt::Display>(&mut self, result: Result<Vec<String>, E>) {
        match result {
            Ok(done) => self.done.extend(done),
            Err(error) => self.errors.push(error.to_string()),
        }
    }
}

/// Cleans the node, in the current network namespace.
pub fn run(place: &Place) -> Result<Outcome, netlink::Error> {
    let run = Folder::new(&place.run_dir);
    let mut kernel = Kernel::open(Sysctls::new(&place.sysctl_dir, &run, SYSCTLS_FILE))?;
    let mut outcome = Outcome::default();

    outcome.note(CONFLIST_FILE, Folder::new(&place.cni_conf_dir).remove(CONFLIST_FILE));
    outcome.each(close_loopback(&mut kernel, &place.bridge));
    outcome.each(remove_tables(&mut kernel));
    outcome.each(remove_admissions(&mut kernel, &place.bridge));
    outcome.each(remove_rules(&mut kernel));
    outcome.each(remove_routes(&mut kernel));
    for underlay in Family::ALL {
        outcome.note(vxlan::name(underlay), kernel::vxlan::delete(&mut kernel.route, underlay));
    }
    let (restored, errors) = kernel.sysctls.restore();
    outcome.done.extend(restored.into_iter().map(|path| format!("sysctl net/{path}")));
    outcome.errors.extend(errors.iter().map(ToString::to_string));
    let has_bridged = remove_bridge(&mut kernel, &place.bridge, &mut outcome);
    let has_routed = remove_gateways(&mut kernel, &mut outcome);
    let has_pods = has_bridged || has_routed;
    outcome.note(CNI_TYPE, Folder::new(&place.cni_bin_dir).remove(CNI_TYPE));
    // The record of former sysctls is of use until all of them are back.
    let keep_record = !errors.is_empty();
    for file in [BLOCKS_FILE, MAP_FILE, ROLLOUT_FILE, SYSCTLS_FILE, LEASES_FILE] {
        let needed = file == SYSCTLS_FILE && keep_record || file == LEASES_FILE && has_pods;
        if !needed {
            outcome.note(file, run.remove(file));
        }
    }
    outcome.note(SOCKET_FILE, run.remove(SOCKET_FILE));
    // Only an empty folder goes; a mount point stays, as it must.
    let _ = std::fs::remove_dir(&place.run_dir);
    Ok(outcome)
}

/// Host ports let 127.0.0.1 lead to pods; the rule that keeps pods out of the node's loopback goes with the
/// tables, so this goes first.
fn close_loopback(kernel: &mut Kernel, bridge: &str) -> Result<Vec<String>, String> {
    let sysctls = cni_sysctl::Sysctls::at(kernel.sysctls.dir());
    let links = link::links(&mut kernel.route, None).map_err(|error| error.to_string())?;
    let ours = |link: &link::Link| {
        link.name == bridge || link.alias.as_deref().is_some_and(|text| alias::parse(text).is_some())
    };
    let mut done = Vec::new();
    for link in links.into_iter().filter(ours) {
        let path = format!("ipv4/conf/{}/route_localnet", link.name);
        if sysctls.ensure(&path, "0").map_err(|error| error.to_string())? {
            done.push(format!("sysctl net/{path}"));
        }
    }
    Ok(done)
}

fn remove_tables(kernel: &mut Kernel) -> Result<Vec<String>, netlink::Error> {
    let ours = [
        Table::new(TableFamily::Inet, NFT_TABLE),
        Table::new(TableFamily::Inet, NFT_PODS_TABLE),
        Table::new(TableFamily::Bridge, NFT_PODS_TABLE),
    ];
    let there: Vec<Table> = nft::tables(kernel.nft.socket())?
        .into_iter()
        .map(|found| found.table)
        .filter(|table| ours.contains(table))
        .collect();
    let mut batch = Batch::new();
    for table in &there {
        batch.delete_table(table);
    }
    batch.send(kernel.nft.socket())?;
    Ok(there.iter().map(|table| format!("table {table}")).collect())
}

fn remove_admissions(kernel: &mut Kernel, bridge: &str) -> Result<Vec<String>, netlink::Error> {
    let mut done = Vec::new();
    for (family, handle) in forward::ours(&mut kernel.nft, bridge)? {
        if forward::remove(&mut kernel.nft, family, handle)? {
            done.push(format!("{family} accept rule in FORWARD"));
        }
    }
    Ok(done)
}

/// Before the routes, which leaves no moment in which a rule leads to half a table.
fn remove_rules(kernel: &mut Kernel) -> Result<Vec<String>, netlink::Error> {
    let mut done = Vec::new();
    for rule in rule::dump(&mut kernel.route)?.into_iter().filter_map(|found| found.ours()) {
        if rule::delete(&mut kernel.route, &rule)? {
            done.push(rule.to_string());
        }
    }
    Ok(done)
}

fn remove_routes(kernel: &mut Kernel) -> Result<Vec<String>, netlink::Error> {
    let mut done = Vec::new();
    for route in route::dump(&mut kernel.route, Devices::default())?.into_values() {
        if route::delete(&mut kernel.route, &route.key)? {
            done.push(format!("route {route}"));
        }
    }
    Ok(done)
}

/// Removes the bridge if no pod hangs on it; returns whether one does.
fn remove_bridge(kernel: &mut Kernel, name: &str, outcome: &mut Outcome) -> bool {
    match try_remove_bridge(kernel, name) {
        Ok(Bridge::Absent) => false,
        Ok(Bridge::Removed) => {
            outcome.done.push(format!("bridge {name}"));
            false
        }
        Ok(Bridge::NotOurs(kind)) => {
            outcome.left.push(format!("link {name} stays: it is {kind}, not a bridge"));
            false
        }
        Ok(Bridge::HasPorts(ports)) => {
            outcome.left.push(format!(
                "bridge {name} stays: {ports} links hang on it; end the pods of this node and clean up again"
            ));
            true
        }
        Err(error) => {
            outcome.errors.push(error.to_string());
            true
        }
    }
}

/// Removes the gateways from `lo` if no pod without bridge is left; returns whether one is.
fn remove_gateways(kernel: &mut Kernel, outcome: &mut Outcome) -> bool {
    let pods = link::links(&mut kernel.route, Some("veth"));
    // Not each without master: the bridge of some may have been deleted.
    let routed = |l: &link::Link| {
        let alias = l.alias.as_deref().and_then(alias::parse);
        l.master.is_none() && alias.is_some_and(|alias| alias.datapath != Some(Datapath::Bridge))
    };
    match pods.map(|pods| pods.iter().filter(|pod| routed(pod)).count()) {
        Ok(0) => outcome.each(routed::ensure_gateways(&mut kernel.route, &[])),
        Ok(pods) => {
            outcome.left.push(format!(
                "the gateways on lo stay: {pods} pods have links of their own; end the pods of this node and clean up again"
            ));
            return true;
        }
        Err(error) => {
            outcome.errors.push(error.to_string());
            return true;
        }
    }
    false
}

enum Bridge {
    Absent,
    Removed,
    NotOurs(String),
    HasPorts(usize),
}

fn try_remove_bridge(kernel: &mut Kernel, name: &str) -> Result<Bridge, netlink::Error> {
    let Some(found) = link::link_by_name(&mut kernel.route, name)? else { return Ok(Bridge::Absent) };
    if found.kind.as_deref() != Some("bridge") {
        return Ok(Bridge::NotOurs(found.kind.unwrap_or_else(|| "hardware".to_owned())));
    }
    let ports = link::links(&mut kernel.route, None)?;
    let ports = ports.iter().filter(|port| port.master == Some(found.index)).count();
    if ports > 0 {
        return Ok(Bridge::HasPorts(ports));
    }
    deleted(kernel.route.request(link::delete_link(found.index, name)))?;
    Ok(Bridge::Removed)
}
