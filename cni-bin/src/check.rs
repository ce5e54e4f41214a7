//! CHECK: is everything still as ADD left it, with what chained plugins changed since (`prevResult`)?
//!
//! What others added is theirs and no fault; what is listed in `prevResult`, or was made by us, must be
//! there.

use plat_crds::lease::{Datapath, Lease};

use crate::add::delegate_of;
use crate::bandwidth;
use crate::call::Call;
use crate::config::{Attachment, RouteConf};
use crate::error::{Code, Error};
use crate::link::{self, Link, Route, TABLE_MAIN};
use crate::mac::Mac;
use crate::netlink::{Protocol, Socket};
use crate::netns::Netns;
use crate::reply::{Interface, Ip, Reply};
use crate::spec::SpecVersion;
use crate::{delegate, pods, routed, wire};
use plat_crds::Family;

/// Checks a container.
pub fn check(call: &mut Call) -> Result<(), Error> {
    call.network.require("CHECK", SpecVersion::V0_4_0)?;
    let previous = call.network.json.get("prevResult").object("prevResult")?;
    if previous.is_null() {
        let why = "CHECK compares with what ADD returned";
        return Err(Error::because(Code::Config, "prevResult is missing", why));
    }
    let previous = Reply::parse(previous, call.network.version)?;
    if was_passed_through(&previous) {
        return Ok(());
    }
    let conf = Attachment::parse(&call.network, &call.container.args)?;
    let lease = find_lease(call)?;
    let netns = Netns::open(&call.container.netns)?;
    let host = check_host_end(call, &conf, &lease)?;
    if let Some(problem) = bandwidth::problem(call.host(), conf.bandwidth.ingress, host.index, &host.name)? {
        return Err(failed(&format!("link {} on the host {problem}", host.name)));
    }
    let mut pod = check_pod(call, &conf, &netns, &host, &previous)?;
    if lease.datapath == Datapath::Routed {
        check_joint(call, &lease, &host, &mut pod, &previous)?;
    }
    if let Some(problem) = pods::missing(&lease)? {
        return Err(failed(&problem));
    }
    if let Some(problem) = guard_problem(&lease, pod.link.mac) {
        return Err(failed(&format!("interface {} {problem}", lease.ifname)));
    }
    match delegate_of(call) {
        Some(plugin) => delegate::run(&plugin, &call.plugin_path, "CHECK", &call.input).map(|_| ()),
        None => Ok(()),
    }
}

fn failed(problem: &str) -> Error {
    Error::because(Code::CheckFailed, "the container is not as ADD left it", problem)
}

/// Whether the result names no link that we made: then ADD passed another plugin's result on.
fn was_passed_through(previous: &Reply) -> bool {
    let made_by_us = |i: &Interface| i.sandbox.is_empty() && wire::is_host_name(&i.name);
    // The two oldest versions have no interfaces, and no CHECK either.
    !previous.interfaces.is_empty() && !previous.interfaces.iter().any(made_by_us)
}

fn find_lease(call: &mut Call) -> Result<Lease, Error> {
    let container = call.container.clone();
    let found = match call.lock_existing_store()? {
        Some(mut store) => store.find(&container.id, &container.ifname)?,
        None => None,
    };
    let none = || failed(&format!("no lease is recorded for {} of {}", container.ifname, container.id));
    found.map(|held| held.lease).ok_or_else(none)
}

fn check_host_end(call: &mut Call, conf: &Attachment, lease: &Lease) -> Result<Link, Error> {
    let name = &lease.veth.name;
    let link = link::link_by_name(call.host(), name)?;
    let link = link.ok_or_else(|| failed(&format!("link {name} on the host is gone")))?;
    let problem = if link.kind.as_deref() != Some("veth") {
        "is not a veth"
    } else if !link.up {
        "is down"
    } else {
        return match lease.datapath {
            Datapath::Bridge => check_port(call, conf, link),
            Datapath::Routed => check_master(link),
        };
    };
    Err(failed(&format!("link {name} on the host {problem}")))
}

/// A link of the `routed` datapath that became a port would be the bridge's alone.
fn check_master(link: Link) -> Result<Link, Error> {
    match link.master {
        None => Ok(link),
        Some(master) => {
            Err(failed(&format!("link {} on the host was made a port of link {master}", link.name)))
        }
    }
}

fn check_port(call: &mut Call, conf: &Attachment, link: Link) -> Result<Link, Error> {
    let bridge = link::link_by_name(call.host(), &conf.bridge.name)?;
    let bridge = bridge.ok_or_else(|| failed(&format!("bridge {} is gone", conf.bridge.name)))?;
    let problem = if link.master != Some(bridge.index) {
        "is not a port of the bridge"
    } else if conf.bridge.hairpin && !link.hairpin {
        "is not in hairpin mode"
    } else if conf.bridge.isolated && !link.isolated {
        "is not an isolated port"
    } else if !bridge.up {
        return Err(failed(&format!("bridge {} is down", bridge.name)));
    } else {
        return Ok(link);
    };
    Err(failed(&format!("link {} on the host {problem}", link.name)))
}

/// That the host is the router of a pod of the `routed` datapath, and each end knows the other.
fn check_joint(
    call: &mut Call,
    lease: &Lease,
    host: &Link,
    pod: &mut Pod,
    previous: &Reply,
) -> Result<(), Error> {
    let addresses = lease.addresses.iter().map(|leased| leased.address);
    let of_host = routed::missing(call.host(), addresses, host, pod.link.mac)?;
    let gateways = previous.ips.iter().filter_map(|ip| ip.gateway);
    let problem = match of_host {
        Some(problem) => Some(problem),
        None => routed::missing_in_pod(&mut pod.socket, gateways, pod.link.index, host.mac)?,
    };
    problem.map_or(Ok(()), |problem| Err(failed(&problem)))
}

/// A pod's end, and a socket in its namespace.
struct Pod {
    socket: Socket,
    link: Link,
}

fn check_pod(
    call: &Call,
    conf: &Attachment,
    netns: &Netns,
    host: &Link,
    previous: &Reply,
) -> Result<Pod, Error> {
    let ifname = &call.container.ifname;
    let mut pod = netns.inside(|| Ok(Socket::open(Protocol::Route)?))?;
    let link = link::link_by_name(&mut pod, ifname)?;
    let link = link.ok_or_else(|| failed(&format!("interface {ifname} is gone")))?;
    if host.peer != Some(link.index) {
        return Err(failed(&format!("interface {ifname} is not the other end of {}", host.name)));
    }
    let listed = previous.interfaces.iter().position(|i| i.name == *ifname && !i.sandbox.is_empty());
    let interface = listed.and_then(|index| previous.interfaces.get(index));
    if let Some(problem) = interface.and_then(|listed| interface_problem(&link, listed)) {
        return Err(failed(&format!("interface {ifname} {problem}")));
    }
    if !link.up && !conf.bridge.pod_down {
        return Err(failed(&format!("interface {ifname} is down")));
    }
    if let Some(problem) = bandwidth::problem(&mut pod, conf.bandwidth.egress, link.index, ifname)? {
        return Err(failed(&format!("interface {ifname} {problem}")));
    }
    let addresses = link::addresses(&mut pod, link.index)?;
    let of_pod = |ip: &&Ip| ip.interface.is_none() || ip.interface == listed;
    for ip in previous.ips.iter().filter(of_pod) {
        if !addresses.iter().any(|a| a.net == ip.address && !a.tentative) {
            return Err(failed(&format!("interface {ifname} lacks address {}", ip.address)));
        }
    }
    for family in Family::ALL {
        let of_family = |r: &&RouteConf| Family::of(&r.dst.addr()) == family;
        let wanted: Vec<&RouteConf> = previous.routes.iter().filter(of_family).collect();
        if wanted.is_empty() {
            continue;
        }
        let routes = link::routes(&mut pod, family)?;
        if let Some(lost) = wanted.into_iter().find(|wanted| !has_route(&routes, wanted)) {
            return Err(failed(&format!("the route to {} is gone", lost.dst)));
        }
    }
    Ok(Pod { socket: pod, link })
}

/// Whether a pod that is held to its hardware address has another now, and so is cut off. Pure.
fn guard_problem(lease: &Lease, mac: Option<Mac>) -> Option<String> {
    let own = lease
        .guard
        .map(|guard| Mac(guard.mac))
        .filter(|own| lease.datapath == Datapath::Bridge && mac != Some(*own))?;
    let mac = mac.map(|mac| mac.to_string()).unwrap_or_default();
    Some(format!(
        "has hardware address {mac} but may send from {own} alone: ask for it by runtimeConfig.mac, or turn \
        antiSpoofing (macspoofchk) off"
    ))
}

/// How the pod's interface differs from what the result says of it. Pure.
fn interface_problem(link: &Link, listed: &Interface) -> Option<String> {
    let mac = link.mac.map(|mac| mac.to_string()).unwrap_or_default();
    if !listed.mac.is_empty() && !listed.mac.eq_ignore_ascii_case(&mac) {
        return Some(format!("has hardware address {mac} and not {}", listed.mac));
    }
    let mtu = listed.mtu.filter(|mtu| *mtu != link.mtu)?;
    Some(format!("has MTU {} and not {mtu}", link.mtu))
}

/// Whether the kernel has a listed route. Of default routes the gateway does not matter, as the reference
/// plugins see it. Pure.
fn has_route(routes: &[Route], wanted: &RouteConf) -> bool {
    let is_default = wanted.dst.prefix_len() == 0;
    routes.iter().any(|route| {
        route.destination == wanted.dst
            && route.table == wanted.table.unwrap_or(TABLE_MAIN)
            && (is_default || wanted.gw.is_none() || route.gateway == wanted.gw)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_without_a_link_of_ours_was_passed_on() {
        let result = |names: &[(&str, &str)]| Reply {
            interfaces: names
                .iter()
                .map(|(name, sandbox)| Interface {
                    name: (*name).into(),
                    sandbox: (*sandbox).into(),
                    ..Interface::default()
                })
                .collect(),
            ..Reply::default()
        };
        assert!(was_passed_through(&result(&[("cali12345678", ""), ("eth0", "/n")])));
        assert!(!was_passed_through(&result(&[("cni0", ""), ("plat0badcafe", ""), ("eth0", "/n")])));
        assert!(!was_passed_through(&result(&[])));
    }

    #[test]
    fn a_route_is_there_if_destination_and_gateway_are() {
        let route =
            |dst: &str, gw: Option<&str>| Route::new(dst.parse().unwrap(), gw.map(|g| g.parse().unwrap()), 2);
        let wanted = |dst: &str, gw: Option<&str>| {
            RouteConf::new(dst.parse().unwrap(), gw.map(|g| g.parse().unwrap()))
        };
        let routes = [route("0.0.0.0/0", Some("10.1.0.1")), route("10.9.0.0/16", Some("10.1.0.1"))];
        assert!(has_route(&routes, &wanted("10.9.0.0/16", Some("10.1.0.1"))));
        assert!(has_route(&routes, &wanted("10.9.0.0/16", None)));
        assert!(!has_route(&routes, &wanted("10.9.0.0/16", Some("10.1.0.2"))));
        assert!(
            has_route(&routes, &wanted("0.0.0.0/0", Some("10.1.0.2"))),
            "the default's gateway may change"
        );
        assert!(!has_route(&routes, &wanted("10.9.0.0/24", None)));
    }
}
