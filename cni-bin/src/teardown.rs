//! Takes a pod's link away, found by container and interface alone: the runtime may know neither
//! namespace nor result any more. Used by DEL, GC and the agent's sweep.
//!
//! The pod's namespace is never entered and nothing in it touched: a path that was recycled could lead to
//! the host's own. With the host's end of a veth the pod's end goes too.

use plat_crds::alias;
use plat_crds::lease::Lease;

use crate::link::{self, Link, LinkChange};
use crate::netlink::{self, Socket};
use crate::pods::{self, Remover};
use crate::{foreign, kernel, wire};

/// Deletes the link, and what the pod has in nftables. What is not there is fine. The lease is the caller's,
/// and may end only after this: its address lives as long as the link. If there is none, what the kernel proved in its place is returned, by
/// which the pod's rules can be taken away.
pub fn teardown(
    host: &mut Socket,
    container_id: &str,
    ifname: &str,
    lease: Option<&Lease>,
    rules: &mut Remover,
) -> Result<Option<Lease>, netlink::Error> {
    let links = host_ends(host, container_id, ifname, lease)?;
    // A lease that was lost is asked from the kernel, as long as the link is there to prove it.
    let proven = match (lease, links.first()) {
        (None, Some(link)) => kernel::prove(host, link)?,
        _ => None,
    };
    // Rules go before the link, as the kernel's grace period for them then passes while the link is deleted,
    // which takes longer. Taken down first, the link carries nothing that they would have held back.
    if let Some(known) = lease.or(proven.as_ref()).filter(|known| !links.is_empty() && pods::has_any(known)) {
        let down = LinkChange { up: Some(false), ..LinkChange::default() };
        for link in &links {
            netlink::deleted(host.request(link::set_link(link.index, &link.name, &down)))?;
        }
        // They are taken away once more, where they are still there, when the lease ends: then a failure counts.
        let _ = rules.remove(known);
    }
    for link in links {
        netlink::deleted(host.request(link::delete_link(link.index, &link.name)))?;
    }
    Ok(proven)
}

/// The host's end of a container's link: by the name in the lease, else by the name that it would have,
/// else by its alias among all.
fn host_ends(
    host: &mut Socket,
    container_id: &str,
    ifname: &str,
    lease: Option<&Lease>,
) -> Result<Vec<Link>, netlink::Error> {
    let own_name = wire::host_name(container_id, ifname, 0);
    let recorded = lease.map(|l| l.veth.name.as_str()).filter(|name| *name != own_name);
    for name in recorded.into_iter().chain([own_name.as_str()]) {
        let is_end = |link: &Link| match lease.filter(|lease| foreign::is_foreign(lease)) {
            // Another network names its links by chance, and may give a name again.
            Some(lease) if link.name == lease.veth.name => link.index == lease.veth.index,
            _ => is_end_of(link, container_id, ifname),
        };
        if let Some(link) = link::link_by_name(host, name)?.filter(is_end) {
            return Ok(vec![link]);
        }
    }
    let marked =
        |link: &Link| link.alias.as_deref().is_some_and(|alias| alias::is_of(alias, container_id, ifname));
    Ok(link::links(host, Some("veth"))?.into_iter().filter(marked).collect())
}

/// Whether a link that has our name for a container is that container's. One without alias was left by an
/// ADD that was killed between making and marking it.
pub fn is_end_of(link: &Link, container_id: &str, ifname: &str) -> bool {
    let marked = link.alias.as_deref();
    link.kind.as_deref() == Some("veth")
        && marked.is_none_or(|alias| alias::is_of(alias, container_id, ifname))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_is_marked_as_anothers_is_not_taken() {
        let link = |kind: &str, alias: Option<&str>| Link {
            kind: Some(kind.into()),
            alias: alias.map(str::to_owned),
            ..Link::default()
        };
        assert!(is_end_of(&link("veth", Some("plat a eth0 bridge open n blocks 10.0.0.2/24")), "a", "eth0"));
        assert!(is_end_of(&link("veth", None), "a", "eth0"));
        assert!(!is_end_of(&link("veth", Some("plat b eth0")), "a", "eth0"));
        assert!(!is_end_of(&link("bridge", None), "a", "eth0"));
    }
}
