//! What a pod's network looks like, as values. Pure; [`crate::add`] makes it so, [`crate::check`] looks
//! whether it still is.

use std::net::IpAddr;

use ipnet::IpNet;
use plat_crds::lease::key_hash;
use plat_crds::{Block, Family};

use crate::config::{BridgeConf, RouteConf};
use crate::link::{Route, SCOPE_GLOBAL, SCOPE_LINK, TABLE_MAIN};
use crate::mac::{End, Mac};
use crate::pool::Chosen;
use crate::reply::Ip;

/// How a pod's addresses sit on its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Each address alone (/32, /128), the gateway on the link, everything through the gateway. All
    /// traffic passes the host's IP layer, also that between pods of one node: so Services work between
    /// them whether `bridge-nf-call-iptables` is set or not.
    Host,
    /// Each address with its subnet's prefix, as the reference bridge plugin does.
    Subnet,
    /// Each address alone, on a link to the host itself ([`crate::routed`]).
    Routed,
}

/// An address for which nobody named a gateway, and whose subnet has no room for one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} has no gateway: let the IPAM plugin name one, or give it the address of a subnet")]
pub struct NoGateway(pub IpNet);

/// A pod's addresses and routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodNet {
    /// The addresses, with their gateways.
    pub ips: Vec<Ip>,
    /// The routes, in an order in which the kernel takes them.
    pub routes: Vec<RouteConf>,
}

impl PodNet {
    /// The network of a pod that leased these addresses.
    pub fn leased(chosen: &[Chosen], style: Style, conf: &BridgeConf, routes: &[RouteConf]) -> PodNet {
        let mut net = PodNet { ips: ips(chosen, style), ..PodNet::default() };
        if style == Style::Host {
            net.add_host_routes();
        }
        net.routes.extend_from_slice(routes);
        if style == Style::Subnet && conf.is_default_gateway {
            net.add_default_routes();
        }
        net
    }

    /// The network of a pod whose addresses another IPAM plugin handed out.
    pub fn delegated(ips: Vec<Ip>, routes: Vec<RouteConf>, conf: &BridgeConf) -> PodNet {
        let mut net = PodNet { ips, routes };
        if conf.is_gateway {
            for ip in &mut net.ips {
                ip.gateway = ip.gateway.or_else(|| first_host(ip.address));
            }
        }
        if conf.is_default_gateway {
            net.add_default_routes();
        }
        net
    }

    /// The network of a pod in the `routed` datapath, whoever chose its addresses: each stands alone, its
    /// subnet and everything else is behind the gateway.
    pub fn routed(ips: Vec<Ip>, routes: &[RouteConf]) -> Result<PodNet, NoGateway> {
        let mut net = PodNet::default();
        for ip in ips {
            let named = ip.gateway.filter(|gateway| !is_link_local(gateway));
            let gateway = named.or_else(|| first_host(ip.address)).ok_or(NoGateway(ip.address))?;
            net.ips.push(Ip { address: ip.address.addr().into(), gateway: Some(gateway), ..ip });
            net.add_on_link(gateway);
            if ip.address.prefix_len() < ip.address.max_prefix_len() {
                net.add_route(RouteConf::new(ip.address.trunc(), Some(gateway)));
            }
        }
        for route in routes {
            let route = route.clone();
            let on_link = route.scope == Some(u32::from(SCOPE_LINK));
            let gw = route.gw.or_else(|| net.gateway_for(&route).filter(|_| !on_link));
            net.add_route(RouteConf { gw, ..route });
        }
        net.add_default_routes();
        Ok(net)
    }

    fn add_route(&mut self, route: RouteConf) {
        if !self.routes.contains(&route) {
            self.routes.push(route);
        }
    }

    fn add_on_link(&mut self, gateway: IpAddr) {
        let scope = Some(u32::from(SCOPE_LINK));
        self.add_route(RouteConf { scope, ..RouteConf::new(IpNet::from(gateway), None) });
    }

    /// The gateway is on the link, all else behind it.
    fn add_host_routes(&mut self) {
        let gateways: Vec<IpAddr> = self.ips.iter().filter_map(|ip| ip.gateway).collect();
        for gateway in gateways {
            self.add_on_link(gateway);
            self.routes.push(RouteConf::new(everything(gateway), Some(gateway)));
        }
    }

    /// A default route of each family, unless there is one with a gateway already.
    fn add_default_routes(&mut self) {
        let gateways: Vec<IpAddr> = self.ips.iter().filter_map(|ip| ip.gateway).collect();
        for gateway in gateways {
            let dst = everything(gateway);
            if !self.routes.iter().any(|r| r.dst == dst && r.gw.is_some()) {
                self.routes.push(RouteConf::new(dst, Some(gateway)));
            }
        }
    }

    /// The gateway for a route that names none: that of the first address of its family.
    pub fn gateway_for(&self, route: &RouteConf) -> Option<IpAddr> {
        let same = |gateway: &IpAddr| gateway.is_ipv4() == route.dst.addr().is_ipv4();
        self.ips.iter().filter_map(|ip| ip.gateway).find(same)
    }

    /// The kernel's routes, for the pod's link of that number.
    pub fn kernel_routes(&self, link: u32) -> Vec<Route> {
        self.routes.iter().map(|route| self.kernel_route(route, link)).collect()
    }

    fn kernel_route(&self, route: &RouteConf, link: u32) -> Route {
        let on_link = route.scope == Some(u32::from(SCOPE_LINK));
        let gateway = route.gw.or_else(|| self.gateway_for(route).filter(|_| !on_link));
        let default_scope = if gateway.is_some() { SCOPE_GLOBAL } else { SCOPE_LINK };
        Route {
            scope: route.scope.and_then(|s| u8::try_from(s).ok()).unwrap_or(default_scope),
            table: route.table.unwrap_or(TABLE_MAIN),
            metric: route.priority.unwrap_or(0),
            mtu: route.mtu,
            advmss: route.advmss,
            ..Route::new(route.dst, gateway, link)
        }
    }

    /// Whether it has an address of that family.
    pub fn has(&self, family: Family) -> bool {
        self.ips.iter().any(|ip| Family::of(&ip.address.addr()) == family)
    }
}

/// The addresses, alone or with the prefix of their subnet, and the gateways of their ranges.
pub fn ips(chosen: &[Chosen], style: Style) -> Vec<Ip> {
    let address = |c: &Chosen| match style {
        Style::Host | Style::Routed => IpNet::from(c.address),
        Style::Subnet => IpNet::new(c.address, c.range.subnet.prefix_len()).unwrap_or(c.address.into()),
    };
    let ip = |c: &Chosen| Ip { address: address(c), gateway: Some(c.range.gateway), interface: None };
    chosen.iter().map(ip).collect()
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

fn everything(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => IpNet::new_assert([0; 4].into(), 0),
        IpAddr::V6(_) => IpNet::new_assert([0; 16].into(), 0),
    }
}

/// The first address of a subnet, which is its gateway where nobody says otherwise.
fn first_host(address: IpNet) -> Option<IpAddr> {
    Block::containing(address).host(plat_crds::block::GATEWAY_HOST)
}

/// The sysctls of a pod's link, as files below `/proc/sys/net` in the pod's namespace.
pub fn pod_sysctls(
    ifname: &str,
    net: &PodNet,
    style: Style,
    conf: &BridgeConf,
) -> Vec<(String, &'static str)> {
    let mut sysctls = Vec::new();
    let mut set = |key: String, value| sysctls.push((key, value));
    // Another pod on the bridge must not be able to give this one a default route.
    set(format!("ipv6/conf/{ifname}/accept_ra"), "0");
    if net.has(Family::IPv6) {
        // Runtimes switch IPv6 off by default in namespaces they make.
        set("ipv6/conf/lo/disable_ipv6".to_owned(), "0");
        set(format!("ipv6/conf/{ifname}/disable_ipv6"), "0");
        if conf.tests_duplicates {
            set(format!("ipv6/conf/{ifname}/accept_dad"), "1");
            set(format!("ipv6/conf/{ifname}/enhanced_dad"), "1");
        } else {
            // The lease has made sure that the address is the only one: it can be used at once.
            set(format!("ipv6/conf/{ifname}/accept_dad"), "0");
        }
    }
    if style == Style::Host {
        // The host sees that a packet for another pod leaves by the bridge it came from, and tells the
        // sender to go there directly (ICMP redirect). A pod that obeys goes past the host's IP layer from
        // then on, and past the translation of Services with it. IPv4 obeys if either of the two says so.
        set("ipv4/conf/all/accept_redirects".to_owned(), "0");
        set(format!("ipv4/conf/{ifname}/accept_redirects"), "0");
        if net.has(Family::IPv6) {
            set(format!("ipv6/conf/{ifname}/accept_redirects"), "0");
        }
    }
    sysctls
}

/// What the names of pods' links on the host begin with.
pub const HOST_PREFIX: &str = "plat";

/// The name of a pod's link on the host. It follows from container and interface, so that a DEL finds the
/// link without a lease; `attempt` gives another one when something has the name.
pub fn host_name(container_id: &str, ifname: &str, attempt: u32) -> String {
    let hash = key_hash(container_id, ifname).wrapping_add(u64::from(attempt).wrapping_mul(0x9e37_79b9));
    format!("{HOST_PREFIX}{:08x}", hash & u64::from(u32::MAX))
}

/// Whether a link's name is one of ours for a host's end.
pub fn is_host_name(name: &str) -> bool {
    name.len() == HOST_PREFIX.len() + 8 && name.starts_with(HOST_PREFIX)
}

/// The hardware addresses of a pod's link: the host's end and the pod's. Both follow from the first
/// address, or, without one, from container and interface.
pub fn macs(container_id: &str, ifname: &str, first: Option<IpAddr>, requested: Option<Mac>) -> (Mac, Mac) {
    let address = first.unwrap_or_else(|| {
        let [_, _, _, _, a, b, c, d] = key_hash(container_id, ifname).to_be_bytes();
        IpAddr::from([a, b, c, d])
    });
    (Mac::for_address(address, End::Host), requested.unwrap_or_else(|| Mac::for_address(address, End::Pod)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ranges::Range;

    fn conf(is_default_gateway: bool) -> BridgeConf {
        BridgeConf {
            name: "cni0".into(),
            is_gateway: is_default_gateway,
            is_default_gateway,
            force_address: false,
            ip_masq: false,
            mtu: None,
            hairpin: false,
            promiscuous: false,
            tests_duplicates: false,
            isolated: false,
            pod_down: false,
        }
    }

    #[test]
    fn duplicates_are_tested_for_only_if_that_is_asked_for() {
        let net = PodNet::leased(&pods(), Style::Subnet, &conf(false), &[]);
        let dad = |tests_duplicates| {
            let conf = BridgeConf { tests_duplicates, ..conf(false) };
            let of_dad = |(key, value): (String, &'static str)| key.ends_with("_dad").then_some(value);
            pod_sysctls("eth0", &net, Style::Subnet, &conf).into_iter().filter_map(of_dad).collect::<Vec<_>>()
        };
        assert_eq!(dad(false), ["0"]);
        assert_eq!(dad(true), ["1", "1"]);
    }

    fn chosen(address: &str, block: &str) -> Chosen {
        let range = Range::of_block(block.parse().unwrap()).unwrap();
        Chosen { address: address.parse().unwrap(), range, requested: false }
    }

    fn pods() -> [Chosen; 2] {
        [chosen("10.244.3.7", "10.244.3.0/24"), chosen("fd00:3::7", "fd00:3::/64")]
    }

    fn shown(net: &PodNet) -> Vec<String> {
        let route = |r: Route| {
            let via = r.gateway.map(|g| format!(" via {g}")).unwrap_or_default();
            format!("{}{via} scope {}", r.destination, r.scope)
        };
        net.ips
            .iter()
            .map(|ip| ip.address.to_string())
            .chain(net.kernel_routes(2).into_iter().map(route))
            .collect()
    }

    #[test]
    fn from_blocks_a_pod_gets_lone_addresses_and_all_goes_through_the_gateway() {
        let net = PodNet::leased(&pods(), Style::Host, &conf(false), &[]);
        assert_eq!(
            shown(&net),
            [
                "10.244.3.7/32",
                "fd00:3::7/128",
                "10.244.3.1/32 scope 253",
                "0.0.0.0/0 via 10.244.3.1 scope 0",
                "fd00:3::1/128 scope 253",
                "::/0 via fd00:3::1 scope 0",
            ]
        );
    }

    #[test]
    fn by_hand_a_pod_gets_its_subnet_and_the_routes_that_are_asked_for() {
        let default = RouteConf::new("0.0.0.0/0".parse().unwrap(), None);
        let net = PodNet::leased(&pods(), Style::Subnet, &conf(false), std::slice::from_ref(&default));
        assert_eq!(shown(&net), ["10.244.3.7/24", "fd00:3::7/64", "0.0.0.0/0 via 10.244.3.1 scope 0"]);
        // isDefaultGateway adds what no route with a gateway covers.
        let own = RouteConf::new("0.0.0.0/0".parse().unwrap(), Some("10.244.3.9".parse().unwrap()));
        let net = PodNet::leased(&pods(), Style::Subnet, &conf(true), &[own]);
        assert_eq!(shown(&net)[2..], ["0.0.0.0/0 via 10.244.3.9 scope 0", "::/0 via fd00:3::1 scope 0"]);
    }

    #[test]
    fn a_delegated_address_without_gateway_gets_the_first_of_its_subnet_if_we_are_the_gateway() {
        let ip = || Ip { address: "10.5.0.7/24".parse().unwrap(), gateway: None, interface: None };
        let net = PodNet::delegated(vec![ip()], vec![], &conf(true));
        assert_eq!(shown(&net), ["10.5.0.7/24", "0.0.0.0/0 via 10.5.0.1 scope 0"]);
        assert_eq!(PodNet::delegated(vec![ip()], vec![], &conf(false)).ips[0].gateway, None);
    }

    #[test]
    fn routed_all_is_behind_the_gateway_and_a_route_of_the_configuration_comes_before_our_default() {
        let plain = PodNet::routed(ips(&pods(), Style::Host), &[]).unwrap();
        let mut bridged = shown(&PodNet::leased(&pods(), Style::Host, &conf(false), &[]));
        let mut routed = shown(&plain);
        bridged.sort();
        routed.sort();
        assert_eq!(routed, bridged, "from blocks a pod looks the same in both datapaths");
        let own = RouteConf { mtu: Some(1400), ..RouteConf::new("0.0.0.0/0".parse().unwrap(), None) };
        let net = PodNet::routed(ips(&pods()[..1], Style::Subnet), &[own.clone(), own]).unwrap();
        assert_eq!(
            shown(&net),
            [
                "10.244.3.7/32",
                "10.244.3.1/32 scope 253",
                "10.244.3.0/24 via 10.244.3.1 scope 0",
                "0.0.0.0/0 via 10.244.3.1 scope 0",
            ]
        );
        assert_eq!(net.routes.last().unwrap().mtu, Some(1400));
    }

    #[test]
    fn routed_needs_a_gateway_that_can_stand_on_the_host() {
        let ip = |address: &str, gateway: Option<&str>| Ip {
            address: address.parse().unwrap(),
            gateway: gateway.map(|g| g.parse().unwrap()),
            interface: None,
        };
        let gateway = |ip| PodNet::routed(vec![ip], &[]).map(|net| net.ips[0].gateway.unwrap().to_string());
        assert_eq!(gateway(ip("10.5.0.7/24", Some("10.5.0.254"))).unwrap(), "10.5.0.254");
        assert_eq!(gateway(ip("10.5.0.7/24", None)).unwrap(), "10.5.0.1");
        assert_eq!(gateway(ip("fd00:5::7/64", Some("fe80::1"))).unwrap(), "fd00:5::1");
        assert_eq!(gateway(ip("10.5.0.7/32", None)), Err(NoGateway("10.5.0.7/32".parse().unwrap())));
    }

    #[test]
    fn redirects_are_refused_where_all_must_pass_the_host() {
        let net = PodNet::leased(&pods(), Style::Host, &conf(false), &[]);
        let keys: Vec<String> =
            pod_sysctls("eth0", &net, Style::Host, &conf(false)).into_iter().map(|(k, _)| k).collect();
        assert!(keys.contains(&"ipv4/conf/all/accept_redirects".to_owned()), "{keys:?}");
        assert!(keys.contains(&"ipv6/conf/eth0/accept_redirects".to_owned()), "{keys:?}");
        let by_hand = pod_sysctls("eth0", &net, Style::Subnet, &conf(false));
        assert!(!by_hand.iter().any(|(k, _)| k.contains("redirects")), "{by_hand:?}");
    }

    #[test]
    fn host_names_fit_the_kernel_and_differ_by_attempt() {
        let names: Vec<String> = (0..4).map(|n| host_name("c1", "eth0", n)).collect();
        assert!(names.iter().all(|n| n.len() == 12));
        assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
        assert_eq!(host_name("c1", "eth0", 0), names[0], "the same again");
    }
}
