//! Host ports: ports of the node that lead to a port of a pod, from everywhere the node can be reached.
//!
//! ```text
//! table inet plat-pods {
//!     map hostports4    { type inet_proto . inet_service : ipv4_addr . inet_service
//!                         elements = { tcp . 8080 : 10.244.3.7 . 80 } }
//!     map hostports4-ip { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service
//!                         elements = { 127.0.0.1 . udp . 53 : 10.244.3.8 . 5353 } }
//!     set hairpin4      { type ipv4_addr . ipv4_addr; elements = { 10.244.3.7 . 10.244.3.7, … } }
//!     map neighbours4   { type ipv4_addr : verdict }
//!     (all four again for IPv6)
//!     chain loopback-guard {
//!         type filter hook prerouting priority raw; policy accept;
//!         iifname != "lo" ip daddr 127.0.0.0/8 counter drop
//!         iifname != "lo" ip saddr 127.0.0.0/8 counter drop
//!     }
//!     chain hostports-in  { type nat hook prerouting priority dstnat; fib daddr type local jump hostports }
//!     chain hostports-out { type nat hook output priority dstnat; fib daddr type local jump hostports }
//!     chain hostports {
//!         ip6 daddr ::1 return
//!         dnat ip to ip daddr . meta l4proto . th dport map @hostports4-ip
//!         dnat ip to meta l4proto . th dport map @hostports4
//!         (both again for IPv6)
//!     }
//!     chain hostports-back {
//!         type nat hook postrouting priority srcnat; policy accept;
//!         ct status dnat oifname != "lo" ip saddr 127.0.0.0/8 masquerade
//!         ct status dnat ip saddr . ip daddr @hairpin4 masquerade
//!         ct status dnat ip daddr vmap @neighbours4
//!         (both again for IPv6)
//!     }
//! }
//! ```
//! The source of a connection stays what it was, but where answers would not come back through this host:
//! from the node's loopback (its address means the pod itself to the pod), from the pod to itself, and from
//! a pod of the same subnet on the same bridge (`neighbours`, for pods that know their subnet to be on the
//! link; a pod with an address alone on its link sends everything through the host).
//!
//! To lead 127.0.0.1 to a pod, the pod's link on the host needs `route_localnet` ([`loopback_switch`]),
//! and `loopback-guard` keeps what the node's programs say to themselves closed to the outside
//! (CVE-2020-8558). The kernel has no such thing for ::1, which stays the node's own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use plat_crds::host_port::{HostIp, HostPort, Transport};
use plat_crds::lease::{Datapath, Lease, LeasedAddress, Pool};
use plat_crds::names::NFT_PODS_TABLE;
use plat_crds::{Block, Family};

use super::{Chain, Piece, Scaffold};
use crate::conntrack::{self, Flow};
use crate::link;
use crate::netlink::{Error, Protocol, Socket, octets, to_address};
use crate::nft::{
    self, Addr, BaseChain, DSTNAT, Element, Field, Hook, KeyType, Name, RAW, Rule, SRCNAT, Set, Table,
    TableFamily, Verdict,
};

const GUARD_CHAIN: &str = "loopback-guard";
const IN_CHAIN: &str = "hostports-in";
const OUT_CHAIN: &str = "hostports-out";
const CHAIN: &str = "hostports";
const BACK_CHAIN: &str = "hostports-back";

fn table() -> Table {
    Table::new(TableFamily::Inet, NFT_PODS_TABLE)
}

fn digit(family: Family) -> char {
    match family {
        Family::IPv4 => '4',
        Family::IPv6 => '6',
    }
}

/// Ports that are open on any of the node's addresses.
fn any_map(family: Family) -> Set {
    let value = [KeyType::of(family), KeyType::Port];
    Set::map(&table(), &format!("hostports{}", digit(family)), &[KeyType::Protocol, KeyType::Port], &value)
}

/// Ports that are open on one of the node's addresses.
fn ip_map(family: Family) -> Set {
    let key = [KeyType::of(family), KeyType::Protocol, KeyType::Port];
    Set::map(&table(), &format!("hostports{}-ip", digit(family)), &key, &[KeyType::of(family), KeyType::Port])
}

/// Each pod with itself.
fn hairpin_set(family: Family) -> Set {
    Set::of(&table(), &format!("hairpin{}", digit(family)), &[KeyType::of(family), KeyType::of(family)])
}

/// Pods whose neighbours on the bridge answer them without this host.
fn neighbour_map(family: Family) -> Set {
    Set::verdicts(&table(), &format!("neighbours{}", digit(family)), &[KeyType::of(family)])
}

/// Where host ports of that family lead to: the pod's first address of it.
fn target(lease: &Lease, family: Family) -> Option<&LeasedAddress> {
    lease.addresses.iter().find(|leased| Family::of(&leased.address) == family)
}

/// The subnet that the pod knows to be on its link; `None` if it knows of nobody there but its gateway.
fn neighbourhood(lease: &Lease, leased: &LeasedAddress) -> Option<Block> {
    let alone = lease.pool == Pool::Blocks
        || lease.datapath == Datapath::Routed
        || leased.subnet_length >= Family::of(&leased.address).bits();
    if alone {
        return None;
    }
    IpNet::new(leased.address, leased.subnet_length).ok().map(Block::containing)
}

fn neighbour_chain(subnet: Block) -> String {
    format!("neighbours-{}", subnet.object_name())
}

/// The ports' elements, and those by which answers find their way back.
pub(super) fn pieces(lease: &Lease) -> Vec<Piece> {
    if lease.host_ports.is_empty() {
        return Vec::new();
    }
    Family::ALL.iter().flat_map(|family| family_pieces(lease, *family)).collect()
}

fn family_pieces(lease: &Lease, family: Family) -> Vec<Piece> {
    let ports: Vec<&HostPort> = lease.host_ports.iter().filter(|port| port.host_ip.serves(family)).collect();
    let Some(leased) = target(lease, family).filter(|_| !ports.is_empty()) else { return Vec::new() };
    let address = octets(leased.address);
    let (mut any, mut only) = (Vec::new(), Vec::new());
    for port in ports {
        let (protocol, number) = ([port.protocol.number()], port.host_port.to_be_bytes());
        let key = |host: Option<IpAddr>| match host {
            None => Element::key(&[&protocol, &number]),
            Some(host) => Element::key(&[&octets(host), &protocol, &number]),
        };
        let value = |key: Element| key.value(&[&address, &port.container_port.to_be_bytes()]);
        match port.host_ip {
            HostIp::Only(host) => only.push(value(key(Some(host)))),
            HostIp::Any | HostIp::AnyOf(_) => any.push(value(key(None))),
        }
    }
    let neighbours = neighbourhood(lease, leased)
        .map(|subnet| Element::address(leased.address).verdict(Verdict::Jump(neighbour_chain(subnet))));
    vec![
        Piece { set: any_map(family), elements: any },
        Piece { set: ip_map(family), elements: only },
        Piece { set: hairpin_set(family), elements: vec![Element::key(&[&address, &address])] },
        Piece { set: neighbour_map(family), elements: neighbours.into_iter().collect() },
    ]
}

/// All maps and chains, and a chain for each subnet of these leases.
pub(super) fn scaffold(leases: &[&Lease]) -> Scaffold {
    let sets = Family::ALL
        .iter()
        .flat_map(|family| [any_map(*family), ip_map(*family), hairpin_set(*family), neighbour_map(*family)]);
    let mut chains = vec![guard_chain(), entry_chain(CHAIN, None), back_chain()];
    chains.push(entry_chain(IN_CHAIN, Some(Hook::Prerouting)));
    chains.push(entry_chain(OUT_CHAIN, Some(Hook::Output)));
    let of_lease = |lease: &&Lease| -> Vec<Block> {
        let targets = Family::ALL.into_iter().filter_map(|family| target(lease, family));
        targets.filter_map(|leased| neighbourhood(lease, leased)).collect()
    };
    let subnets: BTreeSet<Block> = leases.iter().flat_map(of_lease).collect();
    chains.extend(subnets.into_iter().map(subnet_chain));
    Scaffold { sets: sets.collect(), chains }
}

fn loopback() -> Block {
    Block::containing(IpNet::new_assert([127, 0, 0, 0].into(), 8))
}

fn guard_chain() -> Chain {
    let table = table();
    let outside = || Rule::new(&table, GUARD_CHAIN).iifname(Name::IsNot("lo"));
    let rules = vec![
        // iifname != "lo" ip daddr 127.0.0.0/8 counter drop
        outside().daddr(Addr::In(loopback())).counter().drop(),
        // iifname != "lo" ip saddr 127.0.0.0/8 counter drop
        outside().saddr(Addr::In(loopback())).counter().drop(),
    ];
    let base = Some(BaseChain::filter(Hook::Prerouting, RAW));
    Chain { table, name: GUARD_CHAIN.to_owned(), base, rules }
}

/// The chain that translates, or one that sends there what is for this host.
fn entry_chain(name: &str, hook: Option<Hook>) -> Chain {
    let table = table();
    let rule = || Rule::new(&table, name);
    let rules = match hook {
        // fib daddr type local jump hostports
        Some(_) => vec![rule().to_this_host().verdict(Verdict::Jump(CHAIN.to_owned()))],
        None => {
            let own_loopback = Block::containing(IpNet::from(IpAddr::from(std::net::Ipv6Addr::LOCALHOST)));
            // ip6 daddr ::1 return
            let mut rules = vec![rule().daddr(Addr::In(own_loopback)).verdict(Verdict::Return)];
            for family in Family::ALL {
                let (any, ip) = (any_map(family), ip_map(family));
                // dnat ip to ip daddr . meta l4proto . th dport map @hostports4-ip
                let key = [Field::Daddr(family), Field::L4proto, Field::Dport];
                rules.push(rule().dnat_map(family, &key, ip.name()));
                // dnat ip to meta l4proto . th dport map @hostports4
                let key = [Field::L4proto, Field::Dport];
                rules.push(rule().dnat_map(family, &key, any.name()));
            }
            rules
        }
    };
    let base = hook.map(|hook| BaseChain::nat(hook, DSTNAT));
    Chain { table, name: name.to_owned(), base, rules }
}

fn back_chain() -> Chain {
    let table = table();
    let rule = || Rule::new(&table, BACK_CHAIN).ct_status_dnat();
    // ct status dnat oifname != "lo" ip saddr 127.0.0.0/8 masquerade
    let from_loopback = rule().oifname(Name::IsNot("lo")).saddr(Addr::In(loopback())).masquerade();
    let mut rules = vec![from_loopback];
    for family in Family::ALL {
        let pair = [Field::Saddr(family), Field::Daddr(family)];
        // ct status dnat ip saddr . ip daddr @hairpin4 masquerade
        rules.push(rule().in_set(&pair, hairpin_set(family).name()).masquerade());
        // ct status dnat ip daddr vmap @neighbours4
        rules.push(rule().vmap(&[Field::Daddr(family)], neighbour_map(family).name()));
    }
    let base = Some(BaseChain::nat(Hook::Postrouting, SRCNAT));
    Chain { table, name: BACK_CHAIN.to_owned(), base, rules }
}

fn subnet_chain(subnet: Block) -> Chain {
    let (table, name) = (table(), neighbour_chain(subnet));
    // ip saddr 10.22.0.0/16 masquerade
    let rules = vec![Rule::new(&table, &name).saddr(Addr::In(subnet)).masquerade()];
    Chain { table, name, base: None, rules }
}

/// The sysctl that lets 127.0.0.1 lead to a pod behind that device; `None` if no port of the lease needs it.
pub fn loopback_switch(lease: &Lease, device: &str) -> Option<String> {
    let from_loopback = |port: &HostPort| match port.host_ip {
        HostIp::Any | HostIp::AnyOf(Family::IPv4) => true,
        HostIp::Only(address) => address.is_ipv4() && address.is_loopback(),
        HostIp::AnyOf(Family::IPv6) => false,
    };
    let needed = target(lease, Family::IPv4).is_some() && lease.host_ports.iter().any(from_loopback);
    needed.then(|| format!("ipv4/conf/{device}/route_localnet"))
}

/// Those sysctls for all leases: of the bridge that a pod hangs on, else of the host's end of its link.
pub fn loopback_switches(route: &mut Socket, leases: &[Lease]) -> Result<BTreeSet<String>, Error> {
    let mut switches = BTreeSet::new();
    for lease in leases.iter().filter(|lease| loopback_switch(lease, "").is_some()) {
        let Some(link) = link::link_by_name(route, &lease.veth.name)? else { continue };
        let device = match link.master {
            Some(bridge) => link::link_by_index(route, bridge)?.map(|bridge| bridge.name),
            None => Some(link.name),
        };
        switches.extend(device.and_then(|device| loopback_switch(lease, &device)));
    }
    Ok(switches)
}

/// Makes the kernel forget UDP flows to host ports of these leases that do not lead to their pods: the
/// client sent before the port was open, or to a pod that is gone. Without this it would go on so until it
/// pauses for half a minute or more. Costs nothing without a UDP port, and milliseconds with one: the kernel
/// walks through its whole table of flows. So it is not for the time that the lease store is locked.
pub fn forget_strays<'a>(leases: impl IntoIterator<Item = &'a Lease>) {
    forget(leases, |flows, ports| {
        let astray: Vec<Flow> = flows.into_iter().filter(|flow| is_astray(flow, ports)).collect();
        if astray.is_empty() {
            return Ok(astray);
        }
        // A flow that only passes through this host has nothing to do with its ports.
        let own = link::own_addresses(&mut Socket::open(Protocol::Route)?)?;
        let is_own = |address: &IpAddr| own.contains(address) || address.is_loopback();
        Ok(astray.into_iter().filter(|flow| is_own(&flow.destination.0)).collect())
    });
}

/// Makes the kernel forget the UDP flows that lead to a pod by its host ports.
/// Costs as much as [`forget_strays`].
pub fn forget_flows_of(lease: &Lease) {
    forget([lease], |flows, ports| {
        Ok(flows.into_iter().filter(|flow| leads(flow, ports) == Some(flow.answers)).collect())
    });
}

/// The pods' ends of UDP host ports.
type UdpPorts = HashMap<(HostIp, u16), (IpAddr, u16)>;

fn forget<'a>(
    leases: impl IntoIterator<Item = &'a Lease>,
    mut choose: impl FnMut(Vec<Flow>, &UdpPorts) -> Result<Vec<Flow>, Error>,
) {
    let leases: Vec<&Lease> = leases.into_iter().filter(|lease| !lease.host_ports.is_empty()).collect();
    for family in Family::ALL {
        let ports = udp_ports(&leases, family);
        let numbers: BTreeSet<u16> = ports.keys().map(|(_, number)| *number).collect();
        let filter = match numbers.first() {
            Some(only) if numbers.len() == 1 => Some(*only),
            Some(_) => None,
            None => continue,
        };
        let mut work = || {
            let mut socket = Socket::open(Protocol::Netfilter)?;
            let chosen = choose(conntrack::udp_flows(&mut socket, family, filter)?, &ports)?;
            conntrack::forget(&mut socket, &chosen)
        };
        // No reason to fail: they are forgotten when their clients pause. A kernel without ctnetlink has
        // no other way.
        if let Err(error) = work() {
            eprintln!("plat: UDP flows to host ports were not forgotten: {error}");
        }
    }
}

fn udp_ports(leases: &[&Lease], family: Family) -> UdpPorts {
    let mut ports = UdpPorts::new();
    for lease in leases {
        let Some(leased) = target(lease, family) else { continue };
        let udp = lease.host_ports.iter().filter(|port| port.protocol == Transport::Udp);
        for port in udp.filter(|port| port.host_ip.serves(family)) {
            let host_ip = match port.host_ip {
                HostIp::Any => HostIp::AnyOf(family),
                other => other,
            };
            ports.insert((host_ip, port.host_port), (leased.address, port.container_port));
        }
    }
    ports
}

/// Where the maps lead a flow. Pure.
fn leads(flow: &Flow, ports: &UdpPorts) -> Option<(IpAddr, u16)> {
    let (address, number) = flow.destination;
    let any = HostIp::AnyOf(Family::of(&address));
    let found = ports.get(&(HostIp::Only(address), number)).or_else(|| ports.get(&(any, number)));
    found.copied()
}

/// Whether the maps would lead a flow elsewhere than it goes. Pure.
fn is_astray(flow: &Flow, ports: &UdpPorts) -> bool {
    leads(flow, ports).is_some_and(|pod| pod != flow.answers)
}

/// The host ports of each pod address, as the maps have them.
pub(super) fn members(socket: &mut Socket) -> Result<HashMap<IpAddr, Vec<HostPort>>, Error> {
    let mut members: HashMap<IpAddr, Vec<HostPort>> = HashMap::new();
    for family in Family::ALL {
        for set in [any_map(family), ip_map(family)] {
            for (address, port) in nft::contents(socket, &set)?.iter().filter_map(|e| read(family, e)) {
                members.entry(address).or_default().push(port);
            }
        }
    }
    Ok(members)
}

/// The pod address and the host port that an element stands for.
fn read(family: Family, element: &Element) -> Option<(IpAddr, HostPort)> {
    let octets = usize::from(family.bits() / 8);
    let port = |bytes: &[u8]| bytes.first_chunk::<2>().map(|b| u16::from_be_bytes(*b));
    let (address, container_port) = element.value_bytes()?.split_at_checked(octets)?;
    let key = element.key_bytes();
    // Each part takes a multiple of four bytes: perhaps an address, then protocol and port.
    let (host, rest) = key.split_at_checked(key.len().checked_sub(8)?)?;
    let (protocol, host_port) = rest.split_at_checked(4)?;
    let host_ip = match host {
        [] => HostIp::AnyOf(family),
        host => HostIp::Only(to_address(host)?),
    };
    let port = HostPort {
        host_ip,
        protocol: Transport::from_number(*protocol.first()?)?,
        host_port: port(host_port)?,
        container_port: port(container_port)?,
    };
    Some((to_address(address)?, port))
}

/// The host ports of a pod with these addresses. A port that is open in both families is one port. Pure.
pub(super) fn of_pod(addresses: &[LeasedAddress], members: &HashMap<IpAddr, Vec<HostPort>>) -> Vec<HostPort> {
    let all = addresses.iter().filter_map(|leased| members.get(&leased.address)).flatten();
    let mut families: BTreeMap<(Transport, u16, u16), BTreeSet<HostIp>> = BTreeMap::new();
    for port in all {
        let key = (port.protocol, port.host_port, port.container_port);
        families.entry(key).or_default().insert(port.host_ip);
    }
    let both = Family::ALL.map(HostIp::AnyOf);
    let mut ports = Vec::new();
    for ((protocol, host_port, container_port), mut host_ips) in families {
        if both.iter().all(|one| host_ips.contains(one)) {
            both.iter().for_each(|one| _ = host_ips.remove(one));
            host_ips.insert(HostIp::Any);
        }
        ports.extend(host_ips.into_iter().map(|host_ip| HostPort {
            host_ip,
            protocol,
            host_port,
            container_port,
        }));
    }
    ports.sort_unstable();
    ports
}
