//! The pod's link: bridge, veth pair, addresses, routes, in few exchanges with the kernel.

use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use plat_crds::Family;
use plat_crds::alias::{self, Port};
use plat_crds::lease::{Datapath, GuardScope, HostVeth, Lease};
use rustix::io::Errno;

use crate::acquire::{self, Given};
use crate::add::{Done, HostEnd};
use crate::bandwidth;
use crate::bridge::{self, Bridge};
use crate::call::Call;
use crate::config::Attachment;
use crate::error::{Code, Error};
use crate::fail;
use crate::link::{self, Link, LinkChange, NewVeth, Route, Way};
use crate::mac::Mac;
use crate::netlink::{self, Protocol, Socket, created};
use crate::netns::Netns;
use crate::routed;
use crate::store::Held;
use crate::sysctl::Sysctls;
use crate::wire::{self, Style};

/// How many names a pod's link on the host may try.
const NAME_TRIES: u32 = 10;

/// What the pod hangs on.
#[derive(Debug)]
pub struct Attached {
    /// The bridge, if it hangs on one.
    pub bridge: Option<Bridge>,
    /// The host's end of the link.
    pub host: Link,
    /// The hardware address of the host's end.
    pub host_mac: Mac,
    /// The hardware address of the pod's end.
    pub pod_mac: Mac,
}

impl Attached {
    /// The link over which the host's IP layer sends to the pod.
    pub fn towards_pod(&self) -> &str {
        self.bridge.as_ref().map_or(&self.host.name, |bridge| &bridge.name)
    }
}

/// How long to wait for the host's end to carry packets, and how often to look.
const PORT_PATIENCE: Duration = Duration::from_secs(2);
const PORT_PAUSE: Duration = Duration::from_micros(500);
/// The same for duplicate address detection, which takes a second or two.
const DUPLICATES_PATIENCE: Duration = Duration::from_secs(5);
const DUPLICATES_PAUSE: Duration = Duration::from_millis(10);

/// Connects the pod's namespace with the bridge, or with the host alone. The pod's end of the link is still down.
pub fn attach(
    call: &mut Call,
    conf: &Attachment,
    given: &mut Given,
    netns: &Netns,
    done: &mut Done,
) -> Result<Attached, Error> {
    let bridge = match conf.datapath {
        Datapath::Bridge => Some(open_bridge(call, conf, given)?),
        Datapath::Routed => None,
    };
    fail::point("bridge")?;
    let attached = make_link(call, conf, given, netns, bridge, done)?;
    fail::point("link")?;
    record_link(call, &mut given.held, &attached.host, done)?;
    mark_link(call, conf, &given.held.lease, &attached.host)?;
    fail::point("alias")?;
    if conf.datapath == Datapath::Routed {
        join_host(call, given, &attached)?;
    }
    fail::point("joined")?;
    Ok(attached)
}

/// Writes the link into the lease; into the store only if its name is not the one that stands there, by which the
/// agent would restore the pod's rules, and a DEL look for a link that is not marked yet.
fn record_link(call: &mut Call, held: &mut Held, host: &Link, done: &mut Done) -> Result<(), Error> {
    let recorded = HostVeth { name: host.name.clone(), index: host.index };
    let before = std::mem::replace(&mut held.lease.veth, recorded);
    done.leased = Some(held.clone());
    if before.name != host.name {
        acquire::confirm(&mut call.lock()?, held)?;
    }
    Ok(())
}

/// Finds or makes the bridge, with the gateways that belong on it.
fn open_bridge(call: &mut Call, conf: &Attachment, given: &Given) -> Result<Bridge, Error> {
    let mtu = conf.bridge.mtu.or(given.mtu);
    let spec = bridge::Spec { name: &conf.bridge.name, mtu, blocks: &given.blocks };
    let bridge = bridge::open(call.host(), &Sysctls::default(), &spec)?;
    bridge::add_gateways(call.host(), &bridge, &given.blocks)?;
    if given.style == Style::Subnet && conf.bridge.is_gateway {
        add_subnet_gateways(call, conf, given, &bridge)?;
    }
    if conf.bridge.promiscuous {
        let change = LinkChange { promiscuous: Some(true), ..LinkChange::default() };
        call.host().request(link::set_link(bridge.index, &bridge.name, &change))?;
    }
    Ok(bridge)
}

/// Makes this host the pod's router. For the node's blocks the agent has switched forwarding on.
fn join_host(call: &mut Call, given: &Given, attached: &Attached) -> Result<(), Error> {
    let joined = routed::join(call.host(), &given.net, &given.blocks, &attached.host, attached.pod_mac);
    if let Err(error) = joined {
        if error.errno() != Some(Errno::EXIST) {
            return Err(error.into());
        }
        // Whoever was given our address after the store was removed has such a route too.
        acquire::confirm(&mut call.lock()?, &given.held)?;
        let msg = "another program or network has a route to an address of this pod";
        return Err(Error::because(Code::AddressUnavailable, msg, error));
    }
    if given.blocks.is_empty() {
        for family in Family::ALL.into_iter().filter(|family| given.net.has(*family)) {
            forward(family)?;
        }
    }
    Ok(())
}

fn forward(family: Family) -> Result<(), Error> {
    let switch = match family {
        Family::IPv4 => "ipv4/ip_forward",
        Family::IPv6 => "ipv6/conf/all/forwarding",
    };
    Sysctls::default().ensure(switch, "1")?;
    Ok(())
}

/// By hand, `isGateway` makes this host a router for the pod's subnets.
fn add_subnet_gateways(
    call: &mut Call,
    conf: &Attachment,
    given: &Given,
    bridge: &Bridge,
) -> Result<(), Error> {
    for ip in &given.net.ips {
        let Some(gateway) = ip.gateway else { continue };
        let net = IpNet::new(gateway, ip.address.prefix_len()).unwrap_or(gateway.into());
        bridge::add_subnet_gateway(call.host(), bridge, net, conf.bridge.force_address)?;
        forward(Family::of(&gateway))?;
    }
    Ok(())
}

/// Makes the veth pair, one end in the pod's namespace, the other a port of the bridge if there is one.
fn make_link(
    call: &mut Call,
    conf: &Attachment,
    given: &Given,
    netns: &Netns,
    bridge: Option<Bridge>,
    done: &mut Done,
) -> Result<Attached, Error> {
    let container = call.container.clone();
    let first = given.held.lease.addresses.first().map(|leased| leased.address);
    let (host_mac, pod_mac) = wire::macs(&container.id, &container.ifname, first, conf.requested_mac);
    for attempt in 0..NAME_TRIES {
        let name = wire::host_name(&container.id, &container.ifname, attempt);
        let veth = NewVeth {
            host_name: &name,
            host_mac,
            pod_name: &container.ifname,
            pod_mac,
            mtu: conf.bridge.mtu.or(given.mtu),
            bridge: bridge.as_ref().map(|bridge| bridge.index),
            pod_netns: netns.as_fd(),
        };
        let mut echo = None;
        // From now on it may exist, whatever becomes of the answer.
        done.link = Some(HostEnd::Asked(name.clone()));
        let answer = call.host().ask(link::new_veth(&veth), |received| echo = link::read_link(&received));
        fail::point("answer")?;
        match answer {
            Ok(()) => {}
            // Either end's name may be taken. On the host's side another name will do.
            Err(error) if error.errno() == Some(Errno::EXIST) => {
                done.link = None;
                if link::link_by_name(call.host(), &name)?.is_some() {
                    continue;
                }
                let msg = format!("interface {} exists already in {}", container.ifname, container.netns);
                return Err(Error::because(Code::Exists, msg, "it is left as it is"));
            }
            Err(error) => return Err(error.into()),
        }
        // Kernels before 6.2 do not echo.
        let host = match echo.filter(|link| link.peer.is_some()) {
            Some(host) => host,
            None => link::link_by_name(call.host(), &name)?.ok_or_else(|| vanished(&name))?,
        };
        done.link = Some(HostEnd::Made(host.index, name));
        return Ok(Attached { bridge, host, host_mac, pod_mac });
    }
    let msg = format!("no free name for the link of container {} on the host", container.id);
    Err(Error::because(Code::Exists, msg, format!("{NAME_TRIES} were tried")))
}

fn vanished(name: &str) -> Error {
    let why = "the pod's network namespace was removed meanwhile";
    Error::because(Code::Kernel, format!("link {name} vanished"), why)
}

/// Writes the lease onto its link and raises it. The alias is the kernel's own copy of the lease: it must
/// stand before the pod has an address, as it proves who has it. At the link's creation the kernel would
/// ignore it.
fn mark_link(call: &mut Call, conf: &Attachment, lease: &Lease, host: &Link) -> Result<(), Error> {
    let (hairpin, isolated) = (conf.bridge.hairpin, conf.bridge.isolated);
    let port = Port { bridge: &conf.bridge.name, hairpin, isolated };
    let alias = alias::of(lease, Some(port).filter(|_| conf.datapath == Datapath::Bridge));
    let mark = LinkChange {
        alias: Some(&alias),
        hairpin: (conf.datapath == Datapath::Bridge && hairpin).then_some(true),
        isolated: isolated.then_some(true),
        ..LinkChange::default()
    };
    // The host's end has no use for an address of its own, and a DEL would wait for the end of it: for
    // several grace periods of the kernel, most of what it takes.
    let quiet = LinkChange { link_local: Some(false), ..mark.clone() };
    let up = LinkChange { up: Some(true), ..LinkChange::default() };
    let set = |change| link::set_link(host.index, &host.name, change);
    let mut messages = vec![set(&quiet), set(&up)];
    messages.extend(bandwidth::hold_back(conf.bandwidth.ingress, host.index, &host.name, host.mtu));
    let outcomes = call.host().request_each(messages)?;
    for outcome in outcomes {
        match outcome {
            Err(error) if error.errno() == Some(Errno::AFNOSUPPORT) => call.host().request(set(&mark))?,
            other => other?,
        }
    }
    // The host must not take a default route from a pod.
    Ok(Sysctls::default().set(&format!("ipv6/conf/{}/accept_ra", host.name), "0")?)
}

/// Gives the pod's end of the link what was acquired. Sysctls, then link up, limit, addresses and routes: one
/// visit to the pod's namespace, one exchange with its side of the kernel, for which the socket is returned.
pub fn raise(
    call: &Call,
    conf: &Attachment,
    given: &Given,
    netns: &Netns,
    attached: &Attached,
) -> Result<Socket, Error> {
    let host = &attached.host;
    let peer = host.peer.ok_or_else(|| vanished(&host.name))?;
    let ifname = &call.container.ifname;
    let sysctls = wire::pod_sysctls(ifname, &given.net, given.style, &conf.bridge);
    let mut pod = netns.inside(|| {
        for (key, value) in &sysctls {
            Sysctls::default().set(key, value)?;
        }
        Ok(Socket::open(Protocol::Route)?)
    })?;
    if conf.bridge.pod_down {
        return Ok(pod);
    }
    let up = LinkChange { up: Some(true), ..LinkChange::default() };
    let mut messages = Vec::new();
    if conf.guard == Some(GuardScope::Addresses) && given.net.has(Family::IPv6) {
        // The link-local address that anti-spoofing lets pass is the one that follows from the hardware
        // address. A namespace may come with another mode (net.core.devconf_inherit_init_net).
        let plain = LinkChange { link_local: Some(true), ..LinkChange::default() };
        messages.push(link::set_link(peer, ifname, &plain));
    }
    messages.push(link::set_link(peer, ifname, &up));
    messages.extend(bandwidth::hold_back(conf.bandwidth.egress, peer, ifname, host.mtu));
    messages.extend(given.net.ips.iter().map(|ip| match conf.bridge.tests_duplicates {
        false => link::new_address(peer, ip.address, 0),
        true => link::plain_address(peer, ip.address),
    }));
    if attached.bridge.is_none() {
        messages.extend(routed::gateway_neighbours(&given.net, peer, attached.host_mac));
    }
    let routes = given.net.kernel_routes(peer);
    let routes_start = messages.len();
    messages.extend(routes.iter().map(link::new_route));
    let mut outcomes = pod.request_each(messages)?;
    let of_routes = outcomes.split_off(routes_start.min(outcomes.len()));
    outcomes.into_iter().collect::<Result<(), _>>()?;
    accept_routes(&routes, of_routes)?;
    Ok(pod)
}

/// A pod with several interfaces may have a route already: the first one wins. And so it does for what leads
/// through a gateway that is on the link of the first one, as with two attachments of one network.
fn accept_routes(routes: &[Route], outcomes: Vec<Result<(), netlink::Error>>) -> Result<(), netlink::Error> {
    let mut on_other_link: Vec<IpNet> = Vec::new();
    for (route, outcome) in routes.iter().zip(outcomes) {
        let unreachable = |error: &netlink::Error| {
            matches!(error.errno(), Some(Errno::NETUNREACH | Errno::HOSTUNREACH))
                && route.gateway.is_some_and(|gateway| on_other_link.iter().any(|net| net.contains(&gateway)))
        };
        let leads_elsewhere = outcome.as_ref().is_err_and(unreachable);
        if !leads_elsewhere && !created(outcome)? {
            on_other_link.push(route.destination);
        }
    }
    Ok(())
}

/// Waits until the pod can use its link, so that its first packet is not lost.
pub fn await_use(
    call: &mut Call,
    conf: &Attachment,
    given: &Given,
    attached: &Attached,
    pod: &mut Socket,
) -> Result<(), Error> {
    if conf.bridge.pod_down {
        return Ok(());
    }
    await_port(call, &attached.host)?;
    if conf.bridge.tests_duplicates {
        return await_addresses(call, pod, &attached.host);
    }
    await_own(given, pod)
}

/// Waits until the pod takes packets to its IPv6 addresses: the kernel makes the routes by which it does, and joins
/// the groups by which neighbours ask, in its own time, though no duplicates are looked for.
fn await_own(given: &Given, pod: &mut Socket) -> Result<(), Error> {
    let deadline = Instant::now() + PORT_PATIENCE;
    for address in given.net.ips.iter().map(|ip| ip.address.addr()).filter(IpAddr::is_ipv6) {
        while link::way(pod, address)? != Some(Way::Local) && Instant::now() < deadline {
            std::thread::sleep(PORT_PAUSE);
        }
    }
    Ok(())
}

/// Waits until duplicate address detection is through with the pod's IPv6 addresses.
fn await_addresses(call: &Call, pod: &mut Socket, host: &Link) -> Result<(), Error> {
    let peer = host.peer.ok_or_else(|| vanished(&host.name))?;
    let ifname = &call.container.ifname;
    let deadline = Instant::now() + DUPLICATES_PATIENCE;
    loop {
        let addresses = link::addresses(pod, peer)?;
        if let Some(taken) = addresses.iter().find(|a| a.duplicate) {
            let msg = format!("address {} of {ifname} is in use by another on the link", taken.net.addr());
            return Err(Error::because(
                Code::AddressUnavailable,
                msg,
                "duplicate address detection (enabledad)",
            ));
        }
        let Some(waiting) = addresses.iter().find(|a| a.tentative) else { return Ok(()) };
        if Instant::now() >= deadline {
            let msg =
                format!("address {} of {ifname} is still being tested for duplicates", waiting.net.addr());
            let why = format!("waited {} s (enabledad)", DUPLICATES_PATIENCE.as_secs());
            return Err(Error::because(Code::Kernel, msg, why));
        }
        std::thread::sleep(DUPLICATES_PAUSE);
    }
}

/// Waits until the host's end carries packets and the bridge, if there is one, serves the pod's port, so that the
/// pod's first packet is not lost. The kernel looks at a new link's carrier in its own time, usually before we
/// are here; on a machine that is busy with
/// links it can take longer. A bridge that does not get there (spanning tree) is not waited for forever.
fn await_port(call: &mut Call, host: &Link) -> Result<(), Error> {
    let deadline = Instant::now() + PORT_PATIENCE;
    loop {
        let port = link::link_by_index(call.host(), host.index)?.ok_or_else(|| vanished(&host.name))?;
        let serves = if port.master.is_some() { port.forwarding } else { port.operational };
        if serves || Instant::now() >= deadline {
            return Ok(());
        }
        std::thread::sleep(PORT_PAUSE);
    }
}
