//! Executes the steps that are about VXLAN devices. What a route needs that could not be replaced stays.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use plat_cni::mac::Mac;
use plat_cni::sysctl as cni_sysctl;
use plat_crds::block::{Block, Family};

use crate::apply::{Done, Kernel, Outcome, Part};
use crate::fabric::{Devices, Target};
use crate::incidents::Repair;
use crate::kernel::vxlan;
use crate::vxlan::{Device, Entries, name, sysctls as sysctls_of};

/// Brings a device in order; returns its index.
pub fn ensure(kernel: &mut Kernel, device: &Device, before: &Done, outcome: &mut Outcome) -> Option<u32> {
    match vxlan::ensure(&mut kernel.route, device) {
        Ok(ensured) => {
            let what = ensured.done.join(", ");
            let was_so = before.tunnels.get(&device.underlay).is_some_and(|tunnel| tunnel.device == *device);
            match what.is_empty() {
                true => {}
                false if was_so => outcome.repaired(Repair::Tunnel, what),
                false => tracing::info!(device = name(device.underlay), "{what}"),
            }
            let sysctls = cni_sysctl::Sysctls::at(kernel.sysctls.dir());
            for sysctl in sysctls_of(device.underlay) {
                if let Err(error) = sysctls.ensure(&sysctl.path, &sysctl.value) {
                    outcome.trouble(Part::Tunnel, error);
                }
            }
            Some(ensured.index)
        }
        Err(error) => {
            outcome.trouble(Part::Tunnel, error);
            None
        }
    }
}

/// Sets entries; those that stood before are repairs.
pub fn set(
    kernel: &mut Kernel,
    devices: Devices,
    underlay: Family,
    entries: &Entries,
    before: &Done,
    outcome: &mut Outcome,
) {
    // What is missing was told when it could not be made.
    let Some(index) = devices.tunnel(underlay) else { return };
    if let Err(error) = vxlan::set(&mut kernel.route, index, entries) {
        return outcome.trouble(Part::Tunnel, error);
    }
    let Some(stood) = before.tunnels.get(&underlay).map(|tunnel| &tunnel.entries) else { return };
    let title = name(underlay);
    for (mac, node) in entries.forwarding.iter().filter(|(mac, node)| stood.forwarding.get(mac) == Some(node))
    {
        outcome.repaired(Repair::Tunnel, format!("forwarding entry of node {node} ({mac}) on {title}"));
    }
    for (address, mac) in
        entries.neighbours.iter().filter(|(address, mac)| stood.neighbours.get(address) == Some(mac))
    {
        outcome.repaired(Repair::Tunnel, format!("neighbour {address} ({mac}) on {title}"));
    }
}

/// Removes entries, but for those of routes that stayed as they could not be replaced.
pub fn remove(
    kernel: &mut Kernel,
    devices: Devices,
    underlay: Family,
    entries: Entries,
    strange: &BTreeSet<Mac>,
    before: &Done,
    outcome: &mut Outcome,
) {
    let Some(index) = devices.tunnel(underlay) else { return };
    let prefixes: BTreeSet<Block> = outcome.failed_routes.iter().map(|key| key.prefix).collect();
    let stayed = before.routes.values().filter(|route| prefixes.contains(&route.key.prefix));
    let failed: BTreeSet<IpAddr> = stayed
        .filter_map(|route| match &route.target {
            Target::Tunnel { gateway, .. } => Some(*gateway),
            _ => None,
        })
        .collect();
    let (needed, neighbours): (BTreeMap<IpAddr, Mac>, _) =
        entries.neighbours.into_iter().partition(|(address, _)| failed.contains(address));
    let used: BTreeSet<Mac> = needed.into_values().collect();
    let forwarding = entries.forwarding.into_iter().filter(|(mac, _)| !used.contains(mac)).collect();
    let entries = Entries { forwarding, neighbours };
    if let Err(error) = vxlan::remove(&mut kernel.route, index, &entries, strange) {
        tracing::warn!(%error, "entries of a VXLAN device that should go are still there");
    }
}

/// Removes a device, unless a route may lead to it that could not be replaced.
pub fn delete(kernel: &mut Kernel, underlay: Family, outcome: &mut Outcome) {
    if !outcome.failed_routes.is_empty() {
        return;
    }
    match vxlan::delete(&mut kernel.route, underlay) {
        Ok(true) => {
            tracing::info!(device = name(underlay), "removed the device: nothing is tunnelled any more")
        }
        Ok(false) => {}
        Err(error) => outcome.trouble(Part::Tunnel, error),
    }
}
