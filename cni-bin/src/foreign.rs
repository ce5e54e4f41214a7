//! Pods that another network attached before Plat took the node over: found by the addresses behind host veths that
//! have no alias of ours. The kernel is the proof; the files of `host-local` are the second witness, and say whose the
//! pod is.
//!
//! Others have veths too: docker, LXD, a container's own way out. One leads to a pod if it is a port of the pods'
//! bridge, if the host has a route to the address alone over it, or if such a file names the address.
//!
//! They become leases of unknown origin, so that their addresses are taken in every pool for as long as the
//! link lives. Nothing of the pod is touched before its DEL.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use plat_crds::alias;
use plat_crds::lease::{HostVeth, Lease, MAX_ADDRESSES, Pool};
use rustix::io::Errno;

use crate::boot::since_now;
use crate::host_local::{HostLocal, Owner};
use crate::kernel::{is_link_local, leased};
use crate::link::{self, Address, Link};
use crate::netlink::{self, Socket};
use crate::wire;

/// An address with a file younger than this may belong to an ADD that is still under way.
pub const YOUNG: Duration = Duration::from_secs(90);

/// Whether a lease is that of a pod which another network attached.
pub fn is_foreign(lease: &Lease) -> bool {
    lease.pool == Pool::Unknown && lease.network.is_none() && !wire::is_host_name(&lease.veth.name)
}

/// In how many rounds links are asked for what is behind them: a namespace that is being removed cannot be, but its
/// link stays for some milliseconds.
pub const ROUNDS: u32 = 20;
/// The same for who must know all: two seconds.
pub const MANY_ROUNDS: u32 = 200;
/// The pause in between.
const PAUSE: Duration = Duration::from_millis(10);

/// What the host's links tell of foreign pods.
#[derive(Debug, Default)]
pub struct Found {
    /// Their leases.
    pub leases: Vec<Lease>,
    /// Why some link has not told what is behind it, if one has not.
    pub unheard: Option<netlink::Error>,
}

impl Found {
    /// The leases, if they are all.
    pub fn whole(self) -> Result<Vec<Lease>, netlink::Error> {
        self.unheard.map_or(Ok(self.leases), Err)
    }
}

/// The foreign pods, but for those whose link is in `known`. One that goes away while it is looked at is none.
/// `bridges` are the names of those that pods hang on; links that do not tell are asked in so many rounds.
pub fn look(
    socket: &mut Socket,
    files: &HostLocal,
    bridges: &[String],
    known: &[Lease],
    rounds: u32,
) -> Result<Found, netlink::Error> {
    let mut indices = HashSet::new();
    for bridge in bridges {
        indices.extend(link::link_by_name(socket, bridge)?.map(|bridge| bridge.index));
    }
    let known: HashSet<&str> = known.iter().map(|lease| lease.veth.name.as_str()).collect();
    let links = link::links(socket, Some("veth"))?;
    let candidates = links.iter().filter(|link| is_candidate(link) && !known.contains(link.name.as_str()));
    let (heard, unheard) = hear(candidates, rounds, |link| behind(socket, link));
    let mut found = Found { unheard, ..Found::default() };
    for (link, behind) in heard {
        let addresses =
            behind.iter().map(|a| a.net).filter(|net| !is_link_local(&net.addr())).collect::<Vec<_>>();
        let owner = addresses.iter().find_map(|net| files.owner(&net.addr(), None));
        let is_port = link.master.is_some_and(|master| indices.contains(&master));
        if addresses.is_empty() || !(is_port || owner.is_some() || is_routed(socket, link, &addresses)?) {
            continue;
        }
        let ifname = || {
            let pod = link::link_in(socket, link.peer_netns?, link.peer?);
            pod.ok().flatten().map(|pod| pod.name)
        };
        let (container_id, ifname) = key(link, owner, ifname);
        found.leases.push(Lease {
            container_id,
            ifname,
            network: None,
            pool: Pool::Unknown,
            addresses: addresses.into_iter().take(MAX_ADDRESSES).map(leased).collect(),
            veth: HostVeth { name: link.name.clone(), index: link.index },
            since: since_now(),
            ..Lease::default()
        });
    }
    Ok(found)
}

/// Whether the link is one as the reference `ptp` makes them: no port, and a route to an address alone leads over it.
fn is_routed(socket: &mut Socket, link: &Link, addresses: &[IpNet]) -> Result<bool, netlink::Error> {
    for net in addresses.iter().filter(|_| link.master.is_none()) {
        if link::is_routed_over(socket, net.addr(), link.index)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What is behind links, asking those that do not tell again; and why the others have not told in so many rounds.
fn hear<'a>(
    links: impl Iterator<Item = &'a Link>,
    rounds: u32,
    mut ask: impl FnMut(&Link) -> Result<Vec<Address>, netlink::Error>,
) -> (Vec<(&'a Link, Vec<Address>)>, Option<netlink::Error>) {
    let (mut heard, mut waiting, mut unheard) = (Vec::new(), links.collect::<Vec<_>>(), None);
    for round in 0..rounds {
        if round > 0 {
            std::thread::sleep(PAUSE);
        }
        unheard = None;
        waiting.retain(|link| match ask(link) {
            Ok(behind) => {
                heard.push((*link, behind));
                false
            }
            Err(error) => {
                unheard = Some(error);
                true
            }
        });
        if waiting.is_empty() {
            break;
        }
    }
    (heard, unheard)
}

/// The addresses behind a link; none if it is gone, or leads out of what this host may look into.
fn behind(socket: &mut Socket, link: &Link) -> Result<Vec<Address>, netlink::Error> {
    let (Some(peer), Some(netns)) = (link.peer, link.peer_netns) else { return Ok(Vec::new()) };
    match link::addresses_in(socket, netns, peer) {
        Err(error) if matches!(error.errno(), Some(Errno::PERM | Errno::ACCESS)) => Ok(Vec::new()),
        Err(_) if link::link_by_index(socket, link.index)?.is_none() => Ok(Vec::new()),
        told => told,
    }
}

/// A veth that leads elsewhere and that we did not make: an ADD of ours marks its link only after it has made it.
fn is_candidate(link: &Link) -> bool {
    let marked = link.alias.as_deref().is_some_and(|alias| alias::parse(alias).is_some());
    !marked && !wire::is_host_name(&link.name) && link.peer_netns.is_some()
}

/// Under which key a foreign pod's lease stands. Where nobody tells the container, it is one that no runtime can have.
fn key(link: &Link, owner: Option<Owner>, pod_end: impl FnOnce() -> Option<String>) -> (String, String) {
    match owner {
        Some(Owner { container_id, ifname, .. }) if !ifname.is_empty() => (container_id, ifname),
        Some(Owner { container_id, .. }) => (container_id, pod_end().unwrap_or_else(|| "eth0".to_owned())),
        None => (format!("unknown:{}", link.name), pod_end().unwrap_or_else(|| "eth0".to_owned())),
    }
}

/// The addresses of foreign pods that the kernel proves.
#[derive(Debug)]
pub struct Proven {
    addresses: HashSet<IpAddr>,
    /// Whether every link was heard.
    is_whole: bool,
}

/// Whether a pod of another network has an address, or may be about to: a file says so, and either a link proves it
/// or the file is young. Old files without a pod hold nothing, unless some link will not tell whether it has one.
pub fn holds(
    socket: &mut Socket,
    files: &HostLocal,
    bridges: &[String],
    address: &IpAddr,
    network: Option<&str>,
    proven: &mut Option<Proven>,
) -> Result<bool, netlink::Error> {
    let Some(owner) = files.owner(address, network) else { return Ok(false) };
    if owner.age < YOUNG {
        return Ok(true);
    }
    if proven.is_none() {
        let Found { leases, unheard } = look(socket, files, bridges, &[], ROUNDS)?;
        let addresses =
            leases.iter().flat_map(|lease| &lease.addresses).map(|leased| leased.address).collect();
        *proven = Some(Proven { addresses, is_whole: unheard.is_none() });
    }
    Ok(proven.as_ref().is_none_or(|proven| !proven.is_whole || proven.addresses.contains(address)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_links_that_lead_elsewhere_and_are_not_ours_are_candidates() {
        let link = |name: &str, alias: Option<&str>, peer_netns| Link {
            name: name.into(),
            alias: alias.map(str::to_owned),
            peer_netns,
            ..Link::default()
        };
        assert!(is_candidate(&link("veth1a2b3c4d", None, Some(3))));
        assert!(is_candidate(&link("veth1a2b3c4d", Some("uplink of customer 7"), Some(3))));
        assert!(!is_candidate(&link("veth1a2b3c4d", None, None)), "both ends are here");
        assert!(!is_candidate(&link("veth1a2b3c4d", Some("plat c1 eth0 bridge:cni0 open"), Some(3))));
        assert!(!is_candidate(&link("plat0badcafe", None, Some(3))), "an ADD of ours is under way");
    }

    #[test]
    fn links_that_do_not_tell_are_asked_again_and_without_them_nothing_is_whole() {
        let links = [1, 2].map(|index| Link { index, ..Link::default() });
        let ask = |rounds| {
            let mut asked = [0, 0];
            hear(links.iter(), rounds, |link| {
                let times = &mut asked[link.index as usize - 1];
                *times += 1;
                match (link.index, *times) {
                    (2, ..=30) => Err(netlink::Error::Interrupted { what: "asked too early".into() }),
                    _ => Ok(Vec::new()),
                }
            })
        };
        for (rounds, expected) in [(ROUNDS, 1), (MANY_ROUNDS, 2)] {
            let (heard, unheard) = ask(rounds);
            assert_eq!(heard.len(), expected);
            assert_eq!(unheard.is_none(), expected == 2);
            assert_eq!(Found { unheard, ..Found::default() }.whole().is_ok(), expected == 2);
        }
    }

    #[test]
    fn a_lease_of_ours_that_was_rebuilt_without_its_network_is_not_foreign() {
        let lease = |veth: &str| Lease { veth: HostVeth { name: veth.into(), index: 7 }, ..Lease::default() };
        assert!(is_foreign(&lease("veth1a2b3c4d")));
        assert!(!is_foreign(&lease("plat0badcafe")));
        assert!(!is_foreign(&Lease { network: Some("plat".into()), ..lease("veth1a2b3c4d") }));
    }
}
