//! What the kernel knows about leases: each host veth carries its lease as alias ([`plat_crds::alias`]). This
//! proves who holds what when the lease store cannot.
//!
//! Where the alias had no room for the addresses, they are those of the pod's end. Nobody enters a pod's
//! namespace for that: they are asked for by the number under which this namespace knows the pod's
//! (`IFA_TARGET_NETNSID`). So are the pods of a network that was here before ([`crate::foreign`]).

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use plat_crds::alias::{self, Alias, Leased};
use plat_crds::lease::{HostVeth, Lease, LeasedAddress, MAX_ADDRESSES, MAX_CONTAINER_ID, Pool};
use plat_crds::names;

use crate::boot::since_now;
use crate::foreign;
use crate::host_local::{self, HostLocal};
use crate::link::{self, Address, Link};
use crate::netlink::{self, Socket};
use crate::pods::Known;
use crate::store::Kernel;

/// A namespace that is being removed cannot be asked any more, but its link stays for some milliseconds.
/// Then all is asked again after a pause, until the link is gone.
const PAUSE: Duration = Duration::from_millis(10);
/// So often at most: two seconds.
const TRIES: u32 = 200;

/// The kernel, seen from the host's network namespace.
pub struct HostKernel {
    route: Socket,
    /// The files of a network that was here before.
    files: HostLocal,
    /// The bridges that its pods may hang on.
    bridges: Vec<String>,
    /// The addresses of foreign pods, once they were asked for.
    foreign: Option<foreign::Proven>,
}

impl HostKernel {
    /// Asks through that socket, which was opened in the host's network namespace.
    pub fn new(route: Socket) -> HostKernel {
        let files = HostLocal::at(Path::new(host_local::STATE_DIR));
        HostKernel { route, files, bridges: vec![names::BRIDGE.to_owned()], foreign: None }
    }

    /// The same with the state of other networks in that folder.
    pub fn with_state_of_others(self, dir: &Path) -> HostKernel {
        HostKernel { files: HostLocal::at(dir), ..self }
    }

    /// The same for a node whose pods hang on these bridges.
    pub fn with_bridges(self, bridges: Vec<String>) -> HostKernel {
        HostKernel { bridges, ..self }
    }

    /// The socket.
    pub fn route(&mut self) -> &mut Socket {
        &mut self.route
    }
}

impl Kernel for HostKernel {
    fn held(&mut self) -> Result<Vec<Lease>, netlink::Error> {
        let known = Known::read()?;
        let mut tries = 0;
        let mut leases = loop {
            tries += 1;
            match held_now(&mut self.route, &known) {
                Err(_) if tries < TRIES => std::thread::sleep(PAUSE),
                result => break result?,
            }
        };
        let rounds = foreign::MANY_ROUNDS;
        // One that is missing here would be missing in the store that is made from this, and its address be free.
        leases.extend(foreign::look(&mut self.route, &self.files, &self.bridges, &[], rounds)?.whole()?);
        Ok(leases)
    }

    fn foreign(&mut self, known: &[Lease]) -> Result<Vec<Lease>, netlink::Error> {
        foreign::look(&mut self.route, &self.files, &self.bridges, known, foreign::ROUNDS)
            .map(|found| found.leases)
    }

    fn is_foreign(&mut self, address: &IpAddr, network: Option<&str>) -> Result<bool, netlink::Error> {
        foreign::holds(&mut self.route, &self.files, &self.bridges, address, network, &mut self.foreign)
    }

    fn links(&mut self) -> Result<Vec<Link>, netlink::Error> {
        link::links(&mut self.route, Some("veth"))
    }
}

fn held_now(socket: &mut Socket, known: &Known) -> Result<Vec<Lease>, netlink::Error> {
    let mut leases = Vec::new();
    for link in link::links(socket, Some("veth"))? {
        leases.extend(proven_by(socket, &link, known)?);
    }
    Ok(leases)
}

fn proven_by(socket: &mut Socket, link: &Link, known: &Known) -> Result<Option<Lease>, netlink::Error> {
    let Some(alias) = link.alias.as_deref().and_then(alias::parse) else { return Ok(None) };
    let behind = match (&alias.leased, link.peer, link.peer_netns) {
        (Some(_), _, _) | (None, None, _) => Vec::new(),
        (None, Some(peer), Some(netns)) => link::addresses_in(socket, netns, peer)?,
        (None, Some(peer), None) => link::addresses(socket, peer)?,
    };
    Ok(lease_of(link, &alias, &behind, known))
}

/// The lease that one host veth proves; `None` if it is not ours, or going away. An error if nftables cannot be
/// asked.
pub fn prove(socket: &mut Socket, link: &Link) -> Result<Option<Lease>, netlink::Error> {
    let known = Known::read()?;
    Ok(proven_by(socket, link, &known).ok().flatten())
}

/// The lease that a host veth proves; `behind` are the addresses of the pod's end, if they were asked. Pure
/// but for the time.
fn lease_of(link: &Link, alias: &Alias<'_>, behind: &[Address], known: &Known) -> Option<Lease> {
    if alias.container_id.len() > MAX_CONTAINER_ID {
        return None;
    }
    let behind = behind.iter().map(|a| a.net).filter(|net| !is_link_local(&net.addr()));
    let (network, pool, mut addresses) = match &alias.leased {
        Some(Leased { network, pool, addresses }) => (Some((*network).to_owned()), *pool, addresses.clone()),
        None => (None, Pool::Unknown, behind.map(leased).collect()),
    };
    addresses.truncate(MAX_ADDRESSES);
    let mut lease = Lease {
        container_id: alias.container_id.to_owned(),
        ifname: alias.ifname.to_owned(),
        network,
        pool,
        addresses,
        veth: HostVeth { name: link.name.clone(), index: link.index },
        netns: None,
        // That it has no master now does not tell: its bridge may have been deleted.
        datapath: alias.datapath.unwrap_or_default(),
        since: since_now(),
        ..Lease::default()
    };
    known.tell(&mut lease);
    // Whoever flushed nftables has not taken the guard off.
    lease.guard = alias.guard.unwrap_or(lease.guard);
    Some(lease)
}

/// An address as a lease has it.
pub fn leased(net: IpNet) -> LeasedAddress {
    LeasedAddress { address: net.addr(), subnet_length: net.prefix_len(), masquerade: false }
}

/// Whether every link has addresses like this one.
pub fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::lease::{Datapath, Guard, GuardScope};

    fn address(text: &str) -> Address {
        Address { link: 2, net: text.parse().unwrap(), tentative: false, duplicate: false, protocol: 0 }
    }

    fn prove(alias: &str, behind: &[Address], known: &Known) -> Option<Lease> {
        let link = Link { name: "platab".into(), index: 9, ..Link::default() };
        lease_of(&link, &alias::parse(alias)?, behind, known)
    }

    fn texts(lease: &Lease) -> Vec<String> {
        let text = |a: &LeasedAddress| format!("{}/{} {}", a.address, a.subnet_length, a.masquerade);
        lease.addresses.iter().map(text).collect()
    }

    #[test]
    fn the_alias_proves_the_lease_whatever_a_pod_does_at_its_end() {
        let alias = "plat c1 eth0 bridge addresses:020000000007 net blocks 10.244.3.7/24 fd00::7/64";
        let guard = Guard { mac: [2, 0, 0, 0, 0, 7], scope: GuardScope::Addresses };
        let known = Known {
            masqueraded: ["10.244.3.7".parse().unwrap()].into(),
            guarded: [("platab".to_owned(), guard)].into(),
            ..Known::default()
        };
        let lease = prove(alias, &[], &known).unwrap();
        assert_eq!((lease.container_id.as_str(), lease.ifname.as_str()), ("c1", "eth0"));
        assert_eq!(texts(&lease), ["10.244.3.7/24 true", "fd00::7/64 false"]);
        assert_eq!(lease.guard, Some(guard));
        assert_eq!(prove(alias, &[], &Known::default()).unwrap().guard, Some(guard), "after a flush");
        assert_eq!((lease.network.as_deref(), lease.pool, lease.veth.index), (Some("net"), Pool::Blocks, 9));
        assert_eq!(prove(alias, &[address("10.244.3.9/32")], &known).unwrap().addresses, lease.addresses);
    }

    #[test]
    fn without_room_in_the_alias_the_addresses_behind_it_are_the_proof() {
        let behind = [address("10.244.3.7/32"), address("fe80::1/64"), address("fd00::7/128")];
        let lease = prove("plat c1 eth0", &behind, &Known::default()).unwrap();
        assert_eq!(texts(&lease), ["10.244.3.7/32 false", "fd00::7/128 false"]);
        assert_eq!((lease.network, lease.pool), (None, Pool::Unknown));
    }

    #[test]
    fn only_the_alias_makes_a_pod_routed_and_nftables_tell_a_guard_that_had_no_room_in_it() {
        let guard = Guard { mac: [2, 0, 0, 0, 0, 7], scope: GuardScope::Hardware };
        let known = Known { guarded: [("platab".to_owned(), guard)].into(), ..Known::default() };
        let told = |alias| prove(alias, &[], &known).map(|lease| (lease.datapath, lease.guard));
        assert_eq!(told("plat c1 eth0 routed"), Some((Datapath::Routed, Some(guard))));
        assert_eq!(told("plat c1 eth0 bridge"), Some((Datapath::Bridge, Some(guard))));
        assert_eq!(told("plat c1 eth0"), Some((Datapath::Bridge, Some(guard))));
        assert_eq!(told("plat c1 eth0 bridge:cni0 open"), Some((Datapath::Bridge, None)));
    }

    #[test]
    fn a_veth_of_others_proves_nothing() {
        for alias in ["", "calico", "plat x"] {
            assert_eq!(prove(alias, &[], &Known::default()), None);
        }
    }
}
