//! GC: removes what containers of this network left behind that the runtime does not know any more.
//!
//! The runtime's list decides (`cni.dev/valid-attachments`). No list is no order: libcni has already sent a
//! DEL for what it knows then, and nothing is removed. Leases younger than `gcGraceSeconds` stay, as the
//! list may be older than they are, and so do those whose network is unknown (rebuilt from the kernel):
//! the agent's sweep ends them with their links.
//!
//! Where another IPAM plugin gave the addresses, its DEL is run for each lease that ends: most such plugins know no
//! GC. Until it has succeeded the lease stays, without its addresses, so that the next GC tries again.

use std::collections::HashSet;

use plat_crds::lease::{Lease, Pool};

use crate::add::delegate_of;
use crate::boot::boot_ms;
use crate::call::Call;
use crate::error::{Code, Error};
use crate::json::Json;
use crate::pods::Remover;
use crate::spec::SpecVersion;
use crate::store::Held;
use crate::{acquire, delegate, fail, teardown};

/// Container ID and interface.
pub type Key = (String, String);

/// Collects.
pub fn gc(call: &mut Call) -> Result<(), Error> {
    call.network.require("GC", SpecVersion::V1_1_0)?;
    let Some(valid) = valid_attachments(&call.network.json)? else {
        eprintln!("plat: GC without cni.dev/valid-attachments: nothing is removed");
        return Ok(());
    };
    let leases = match call.lock_existing_store()? {
        Some(mut store) => store.all()?,
        None => Vec::new(),
    };
    let grace = u64::try_from(call.network.gc_grace.as_millis()).unwrap_or(u64::MAX);
    let stale = stale(leases, &call.network.name, &valid, boot_ms(), grace);
    let (mut problems, mut rules) = (Vec::new(), Remover::default());
    for lease in &stale {
        if let Err(error) = collect(call, lease, &mut rules) {
            problems.push(format!("{} of {}: {error}", lease.ifname, lease.container_id));
        }
    }
    if let Some(plugin) = delegate_of(call) {
        match delegate::run(&plugin, &call.plugin_path, "GC", &call.input) {
            // host-local and the others of its time have no GC; that is no fault of this network.
            Err(error) if error.code == Code::Environment as u32 => {}
            Err(error) => problems.push(error.to_string()),
            Ok(_) => {}
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    let msg = format!("{} of {} stale attachments remain", problems.len(), stale.len());
    Err(Error::because(Code::Incomplete, msg, problems.join("; ")))
}

fn collect(call: &mut Call, lease: &Lease, rules: &mut Remover) -> Result<(), Error> {
    fail::point(&format!("gc-{}", lease.container_id))?;
    teardown::teardown(call.host(), &lease.container_id, &lease.ifname, Some(lease), rules)?;
    if let Some(plugin) = delegate_of(call).filter(|_| lease.pool == Pool::Delegated) {
        let Some(mut store) = call.lock_existing_store()? else { return Ok(()) };
        let Some(held) = acquire::still(&mut store, lease)? else { return Ok(()) };
        // Before the plugin can give the addresses to another pod, whose rules must not be taken for these.
        rules.remove(&held.lease)?;
        store.replace(&Held { slot: held.slot, lease: without_addresses(held.lease) })?;
        drop(store);
        delegate::del_for(&plugin, &call.plugin_path, &lease.container_id, &lease.ifname, &call.input)?;
    }
    let Some(mut store) = call.lock_existing_store()? else { return Ok(()) };
    match acquire::still(&mut store, lease)? {
        Some(held) => Ok(acquire::end(&mut store, &held, rules)?),
        None => Ok(()),
    }
}

/// What is left of a lease whose addresses are given up: its key. Pure.
fn without_addresses(lease: Lease) -> Lease {
    Lease { addresses: Vec::new(), host_ports: Vec::new(), guard: None, ..lease }
}

/// The attachments that are to stay; `None` if the runtime says nothing about them. `null` is an empty list:
/// a runtime without pods sends it. Pure.
pub fn valid_attachments(json: &Json) -> Result<Option<HashSet<Key>>, Error> {
    // The second is the name of a draft, which libcni sends beside the first.
    let key = ["cni.dev/valid-attachments", "cni.dev/attachments"].into_iter().find(|key| json.has(key));
    let Some(key) = key else { return Ok(None) };
    let mut valid = HashSet::new();
    for attachment in json.get(key).list(key)? {
        let text = |name: &str| attachment.get(name).text(&format!("{key}.{name}")).map(str::to_owned);
        valid.insert((text("containerID")?, text("ifname")?));
    }
    Ok(Some(valid))
}

/// The leases to end. Pure.
fn stale(leases: Vec<Lease>, network: &str, valid: &HashSet<Key>, now: u64, grace: u64) -> Vec<Lease> {
    let is_stale = |lease: &Lease| {
        lease.network.as_deref() == Some(network)
            && !valid.contains(&(lease.container_id.clone(), lease.ifname.clone()))
            && now.saturating_sub(lease.since.boot_ms) >= grace
    };
    leases.into_iter().filter(is_stale).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::lease::{HostVeth, Since};

    fn lease(id: &str, network: Option<&str>, boot_ms: u64) -> Lease {
        Lease {
            container_id: id.into(),
            ifname: "eth0".into(),
            network: network.map(str::to_owned),
            pool: Pool::Blocks,
            addresses: vec![],
            veth: HostVeth::default(),
            netns: None,
            since: Since { boot_ms, unix_seconds: 0 },
            ..Lease::default()
        }
    }

    #[test]
    fn only_old_leases_of_this_network_that_are_not_listed_are_stale() {
        let leases = vec![
            lease("listed", Some("n"), 0),
            lease("stale", Some("n"), 0),
            lease("young", Some("n"), 950),
            lease("other", Some("m"), 0),
            lease("unknown", None, 0),
        ];
        let valid = HashSet::from([("listed".to_owned(), "eth0".to_owned())]);
        let ids: Vec<String> =
            stale(leases, "n", &valid, 1000, 100).into_iter().map(|l| l.container_id).collect();
        assert_eq!(ids, ["stale"]);
    }

    #[test]
    fn both_spellings_and_any_case_are_a_list_and_absence_is_none() {
        let read = |text: &str| valid_attachments(&Json::parse(text.as_bytes()).unwrap()).unwrap();
        let one = Some(HashSet::from([("a".to_owned(), "eth0".to_owned())]));
        assert_eq!(read(r#"{"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}"#), one);
        assert_eq!(read(r#"{"cni.dev/attachments":[{"ContainerID":"a","IfName":"eth0"}]}"#), one);
        assert_eq!(read(r#"{"cni.dev/valid-attachments":null}"#), Some(HashSet::new()));
        assert_eq!(read(r#"{"cni.dev/valid-attachments":[]}"#), Some(HashSet::new()));
        assert_eq!(read("{}"), None);
    }
}
