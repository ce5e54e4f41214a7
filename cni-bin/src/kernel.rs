//! What the kernel knows about leases: each host veth carries its container and interface as alias, and
//! behind it are the addresses. This proves who holds what when the lease store cannot.
//!
//! Nobody enters a pod's namespace: the addresses are asked for by the number under which this namespace
//! knows the pod's (`IFA_TARGET_NETNSID`).

use std::net::IpAddr;
use std::time::Duration;

use plat_crds::lease::{HostVeth, Lease, LeasedAddress, MAX_ADDRESSES, MAX_CONTAINER_ID, Pool};
use plat_crds::names::parse_veth_alias;

use crate::boot::since_now;
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
}

impl HostKernel {
    /// Asks through that socket, which was opened in the host's network namespace.
    pub fn new(route: Socket) -> HostKernel {
        HostKernel { route }
    }

    /// The socket.
    pub fn route(&mut self) -> &mut Socket {
        &mut self.route
    }
}

impl Kernel for HostKernel {
    fn held(&mut self) -> Result<Vec<Lease>, netlink::Error> {
        let known = Known::read();
        let mut tries = 0;
        loop {
            tries += 1;
            match held_now(&mut self.route, &known) {
                Err(_) if tries < TRIES => std::thread::sleep(PAUSE),
                result => return result,
            }
        }
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
    let is_ours = link.alias.as_deref().and_then(parse_veth_alias).is_some();
    let Some(peer) = link.peer.filter(|_| is_ours) else { return Ok(None) };
    let addresses = match link.peer_netns {
        Some(netns) => link::addresses_in(socket, netns, peer)?,
        None => link::addresses(socket, peer)?,
    };
    Ok(lease_of(link, &addresses, known))
}

/// The lease that one host veth proves; `None` if it is not ours, or going away.
pub fn prove(socket: &mut Socket, link: &Link) -> Option<Lease> {
    proven_by(socket, link, &Known::read()).ok().flatten()
}

/// The lease that a host veth and the addresses behind it prove. Pure but for the time.
fn lease_of(link: &Link, addresses: &[Address], known: &Known) -> Option<Lease> {
    let (container_id, ifname) = link.alias.as_deref().and_then(parse_veth_alias)?;
    if container_id.len() > MAX_CONTAINER_ID {
        return None;
    }
    let leased = addresses.iter().map(|a| a.net).filter(|net| !is_link_local(&net.addr()));
    let mut lease = Lease {
        container_id: container_id.to_owned(),
        ifname: ifname.to_owned(),
        network: None,
        pool: Pool::Unknown,
        addresses: leased
            .take(MAX_ADDRESSES)
            .map(|net| LeasedAddress {
                address: net.addr(),
                subnet_length: net.prefix_len(),
                masquerade: false,
            })
            .collect(),
        veth: HostVeth { name: link.name.clone(), index: link.index },
        netns: None,
        since: since_now(),
        ..Lease::default()
    };
    known.tell(&mut lease);
    Some(lease)
}

fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        Address { link: 2, net: text.parse().unwrap(), tentative: false, protocol: 0 }
    }

    #[test]
    fn a_veth_with_our_alias_proves_the_addresses_behind_it() {
        let link =
            Link { name: "platab".into(), index: 9, alias: Some("plat c1 eth0".into()), ..Link::default() };
        let addresses = [address("10.244.3.7/32"), address("fe80::1/64"), address("fd00::7/128")];
        let known = Known { masqueraded: ["10.244.3.7".parse().unwrap()].into() };
        let lease = lease_of(&link, &addresses, &known).unwrap();
        assert_eq!((lease.container_id.as_str(), lease.ifname.as_str()), ("c1", "eth0"));
        let held: Vec<String> =
            lease.addresses.iter().map(|a| format!("{} {}", a.address, a.masquerade)).collect();
        assert_eq!(held, ["10.244.3.7 true", "fd00::7 false"]);
        assert_eq!((lease.pool, lease.veth.index), (Pool::Unknown, 9));
    }

    #[test]
    fn a_veth_of_others_proves_nothing() {
        for alias in [None, Some("calico"), Some("plat x")] {
            let link = Link { alias: alias.map(str::to_owned), ..Link::default() };
            assert_eq!(lease_of(&link, &[], &Known::default()), None);
        }
    }
}
