//! The node's programming in our own words: what should be in the kernel, and what is.
//!
//! Plain values with a total order, without netlink types: `desired` makes them from objects, the kernel
//! edge translates them, `diff` compares them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use plat_crds::block::{Block, Family};
use plat_crds::cluster_cidr::MasqueradeMode;
use plat_crds::lease::Datapath;
use plat_crds::names::{MAIN_TABLE, RULE_PRIORITY};

use crate::facts::Kind;
use crate::vxlan::{ObservedTunnel, Tunnel};

/// What the kernel keys a route by when it replaces one; the protocol is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteKey {
    /// Routing table.
    pub table: u32,
    /// Destination; it carries the family.
    pub prefix: Block,
    /// Priority: the lower wins among routes to one prefix.
    pub metric: u32,
}

impl RouteKey {
    /// A key in the main table.
    pub fn main(prefix: Block, metric: u32) -> RouteKey {
        RouteKey { table: MAIN_TABLE, prefix, metric }
    }

    /// The family of the route.
    pub fn family(&self) -> Family {
        self.prefix.family()
    }
}

impl fmt::Display for RouteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} metric {}", self.prefix, self.metric)?;
        if self.table != MAIN_TABLE {
            write!(f, " table {}", self.table)?;
        }
        Ok(())
    }
}

/// Whether a router is taken to be on the link though no subnet of this node says so (`RTNH_F_ONLINK`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OnLink {
    /// Only if this node has a subnet with it on that link.
    #[default]
    Proven,
    /// On the policy's word.
    Taken,
}

/// One way over which a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hop {
    /// Address of the router; `None` leaves the packet to whatever is at the other end of the link.
    pub gateway: Option<IpAddr>,
    /// Interface index of the link.
    pub device: u32,
    /// Its share of the connections, in proportion to those of the route's other hops; 1 to 256.
    pub weight: u16,
    /// Whether the router is taken to be on the link.
    pub on_link: OnLink,
}

impl Hop {
    /// To a router on a link.
    pub fn to(gateway: IpAddr, device: u32) -> Hop {
        Hop { gateway: Some(gateway), device, weight: 1, on_link: OnLink::Proven }
    }
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.gateway {
            Some(gateway) => write!(f, "via {gateway}")?,
            None => write!(f, "by link {}", self.device)?,
        }
        if self.weight != 1 {
            write!(f, " weight {}", self.weight)?;
        }
        if self.on_link == OnLink::Taken {
            f.write_str(" onlink")?;
        }
        Ok(())
    }
}

/// Where a route leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// Over one of these hops; sorted, at least one. A connection keeps to one of them (RFC 2992).
    Via(Vec<Hop>),
    /// Through the tunnel over that family of the underlay, to the node behind that neighbour.
    Tunnel {
        /// Family of the packets that carry the tunnelled ones.
        underlay: Family,
        /// Its neighbour on the device.
        gateway: IpAddr,
    },
    /// To the pods of this node, over their bridge, from the block's gateway address.
    Bridge,
    /// Nowhere: the sender gets an ICMP error at once.
    Unreachable,
    /// Something this agent never makes; observed only, and replaced or removed.
    Other,
}

impl Target {
    /// Whether it can be told only by who knows the links of ours.
    pub fn needs_device(&self) -> bool {
        matches!(self, Target::Tunnel { .. } | Target::Bridge | Target::Other)
    }

    /// Over these hops, which share the connections by their weights. One that is named twice has both shares (IPv6 knows
    /// each once), and the weight of a single one says nothing.
    pub fn via(hops: impl IntoIterator<Item = Hop>) -> Target {
        let mut hops: Vec<Hop> = hops.into_iter().collect();
        hops.sort_unstable();
        hops.dedup_by(|again, hop| {
            let same = (again.gateway, again.device) == (hop.gateway, hop.device);
            if same {
                hop.weight = hop.weight.saturating_add(again.weight).min(256);
            }
            same
        });
        if let [only] = hops.as_mut_slice() {
            only.weight = 1;
        }
        Target::Via(hops)
    }
}

/// Interface indexes of the links of ours that routes lead to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// The pods' bridge.
    pub bridge: Option<u32>,
    /// The VXLAN device over IPv4.
    pub tunnel_v4: Option<u32>,
    /// The VXLAN device over IPv6.
    pub tunnel_v6: Option<u32>,
}

impl Devices {
    /// The VXLAN device over that family.
    pub fn tunnel(&self, underlay: Family) -> Option<u32> {
        match underlay {
            Family::IPv4 => self.tunnel_v4,
            Family::IPv6 => self.tunnel_v6,
        }
    }

    /// Where the VXLAN device over that family is.
    pub fn tunnel_mut(&mut self, underlay: Family) -> &mut Option<u32> {
        match underlay {
            Family::IPv4 => &mut self.tunnel_v4,
            Family::IPv6 => &mut self.tunnel_v6,
        }
    }
}

/// One route.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    /// What it is keyed by.
    pub key: RouteKey,
    /// Where it leads.
    pub target: Target,
    /// MTU of the path in bytes; `None` is the device's.
    pub mtu: Option<u32>,
    /// Largest TCP segment to advertise, in bytes; `None` is what the MTU allows.
    pub advmss: Option<u32>,
    /// Segments that TCP sends before the first answer; `None` is the kernel's choice.
    pub initcwnd: Option<u32>,
    /// This node's address on packets of its own; `None` leaves the choice to the kernel.
    pub source: Option<IpAddr>,
}

impl Route {
    /// A route with nothing but its key and target.
    pub fn new(key: RouteKey, target: Target) -> Route {
        Route { key, target, mtu: None, advmss: None, initcwnd: None, source: None }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Via(hops) => {
                write!(f, "{}", self.key.prefix)?;
                hops.iter().try_for_each(|hop| write!(f, " {hop}"))?;
            }
            Target::Tunnel { underlay, .. } => write!(f, "{} by VXLAN over {underlay}", self.key.prefix)?,
            Target::Bridge => write!(f, "{} to the pods", self.key.prefix)?,
            Target::Unreachable => write!(f, "unreachable {}", self.key.prefix)?,
            Target::Other => write!(f, "{}", self.key.prefix)?,
        }
        write!(f, " metric {}", self.key.metric)?;
        if self.key.table != MAIN_TABLE {
            write!(f, " table {}", self.key.table)?;
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        let metrics = [("mtu", self.mtu), ("advmss", self.advmss), ("initcwnd", self.initcwnd)];
        for (name, value) in metrics {
            if let Some(value) = value {
                write!(f, " {name} {value}")?;
            }
        }
        Ok(())
    }
}

/// Which packets a rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Packets {
    /// All of them.
    All,
    /// Something this agent never asks for; observed only, and removed.
    Other,
}

/// A policy rule (`ip rule`) that leads to a routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rule {
    /// Family of the packets.
    pub family: Family,
    /// Place among the rules: the lower goes first.
    pub priority: u32,
    /// The table to look in.
    pub table: u32,
    /// For which packets.
    pub packets: Packets,
}

impl Rule {
    /// The one that leads to a table of ours.
    pub fn to(family: Family, table: u32) -> Rule {
        Rule { family, priority: RULE_PRIORITY, table, packets: Packets::All }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rule {} to table {}", self.family, self.priority, self.table)
    }
}

/// What somebody else was told to have done to a route of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// It is gone.
    Gone,
    /// It is this now. What leads to a link of ours reads as [`Target::Other`].
    Set(Route),
}

/// One sysctl: a path below `/proc/sys/net` and its value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sysctl {
    /// Such as `ipv4/ip_forward`.
    pub path: String,
    /// Such as `1`.
    pub value: String,
}

impl Sysctl {
    /// A sysctl.
    pub fn new(path: impl Into<String>, value: impl Into<String>) -> Sysctl {
        Sysctl { path: path.into(), value: value.into() }
    }
}

/// What is masqueraded, and where pods may not send: the content of the nftables table `inet plat`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Masquerade {
    /// The pods' bridge: what leaves by it stays as it is.
    pub pod_interface: String,
    /// Destinations that see pods' own addresses: pods, nodes, multicast, link-local. Merged and sorted.
    pub keep: Vec<IpNet>,
    /// Blocks of this node whose other traffic gets another address.
    pub sources: BTreeMap<Block, Leaving>,
    /// Where this node answers probes of others: pods do not reach that. Empty if probes are switched off.
    pub probed: BTreeSet<SocketAddr>,
}

/// What becomes of the traffic of a block that leaves the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaving {
    /// Destinations that see another address whatever else is said.
    pub include: Vec<IpNet>,
    /// Further destinations that see the pods' own.
    pub exclude: Vec<IpNet>,
    /// Whether all other destinations see another address.
    pub masquerade: MasqueradeMode,
    /// That address; `None` is the one of the link that the traffic leaves by.
    pub address: Option<IpAddr>,
}

/// The pods' bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: String,
    /// Its MTU in bytes; `None` leaves it alone.
    pub mtu: Option<u32>,
    /// The blocks of this node: the bridge carries the gateway of each as /32 or /128, and no other ones
    /// of ours.
    pub blocks: BTreeSet<Block>,
}

/// The direction of forwarded pod packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// From a pod of this node.
    FromPods,
    /// To a pod of this node.
    ToPods,
}

/// Forwarding that a foreign chain must let through: one plain accept rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Admit {
    /// Block of this node.
    pub block: Block,
    /// How its pods are joined to the host: over the bridge, or over links of their own.
    pub datapath: Datapath,
    /// Direction.
    pub direction: Direction,
}

/// Everything that should be in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Routes by key.
    pub routes: BTreeMap<RouteKey, Route>,
    /// The object that each route is for.
    pub owners: BTreeMap<RouteKey, (Kind, String)>,
    /// Rules that lead to the tables of these routes.
    pub rules: BTreeSet<Rule>,
    /// Prefixes whose present routes stay as they are, since their objects cannot be followed now.
    pub keep: BTreeSet<Block>,
    /// The nftables table.
    pub masquerade: Masquerade,
    /// Sysctls in the order in which to write them.
    pub sysctls: Vec<Sysctl>,
    /// The bridge, once this node has a block and pods are joined by it.
    pub bridge: Option<Bridge>,
    /// The blocks whose gateways stand on `lo`: all of this node if pods are routed without a bridge.
    pub gateways: BTreeSet<Block>,
    /// Tunnels by the family of their underlay.
    pub tunnels: BTreeMap<Family, Tunnel>,
    /// Forwarding that pods need, whoever lets it through.
    pub forwarded: BTreeSet<Admit>,
    /// Forwarding to be let through by FORWARD chains with policy drop.
    pub admit: BTreeSet<Admit>,
}

impl Desired {
    /// Blocks of other nodes, one for each way that leads to some.
    pub fn sample_of_peers(&self) -> Vec<Block> {
        let mut ways = BTreeMap::new();
        for (key, route) in &self.routes {
            let way = match &route.target {
                Target::Bridge | Target::Unreachable | Target::Other => continue,
                Target::Via(hops) => (None, hops.iter().map(|hop| hop.device).collect()),
                Target::Tunnel { underlay, .. } => (Some(*underlay), Vec::new()),
            };
            ways.entry((key.family(), way)).or_insert(key.prefix);
        }
        ways.into_values().collect()
    }

    /// The ranges that pods' addresses come from, as far as they have routes.
    pub fn ranges(&self) -> Vec<Block> {
        let of_range = |(key, (kind, _)): (&RouteKey, &(Kind, String))| {
            (*kind == Kind::ClusterCIDR).then_some(key.prefix)
        };
        self.owners.iter().filter_map(of_range).collect()
    }
}

/// The state of the table `inet plat`, compared with [`Desired::masquerade`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableState {
    /// There is none.
    #[default]
    Absent,
    /// It is as it should be.
    Intact,
    /// It differs.
    Differs,
}

/// The bridge as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObservedBridge {
    /// Its name.
    pub name: String,
    /// Interface index.
    pub index: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: BTreeSet<IpNet>,
    /// Those of them that bear our protocol number.
    pub ours: BTreeSet<IpNet>,
}

/// An accept rule of ours in a foreign FORWARD chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Admitted {
    /// What it admits.
    pub admit: Admit,
    /// The rule's handle in its chain.
    pub handle: u64,
    /// Whether it carries our comment: an equal rule of somebody else serves as well, but is not ours to
    /// remove.
    pub ours: bool,
}

/// The chain `filter FORWARD` of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForwardChain {
    /// Whether packets that no rule decides are dropped, and rules may be added.
    pub needs_rules: bool,
    /// Accept rules of the shape that we write.
    pub rules: Vec<Admitted>,
}

/// Everything of ours that is in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The nftables table.
    pub table: TableState,
    /// Routes of our protocol.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Rules of our protocol.
    pub rules: BTreeSet<Rule>,
    /// Values of the sysctls that are desired.
    pub sysctls: BTreeMap<String, String>,
    /// The bridge, if there is one of that name.
    pub bridge: Option<ObservedBridge>,
    /// Addresses on `lo` that bear our protocol number.
    pub gateways: BTreeSet<IpNet>,
    /// VXLAN devices of our names, by the family of their underlay.
    pub tunnels: BTreeMap<Family, ObservedTunnel>,
    /// The foreign FORWARD chains.
    pub forward: BTreeMap<Family, ForwardChain>,
}

impl Observed {
    /// The links of ours that routes lead to.
    pub fn devices(&self) -> Devices {
        let tunnel = |underlay| self.tunnels.get(&underlay).map(|tunnel| tunnel.index);
        Devices {
            bridge: self.bridge.as_ref().map(|bridge| bridge.index),
            tunnel_v4: tunnel(Family::IPv4),
            tunnel_v6: tunnel(Family::IPv6),
        }
    }
}

/// The prefix that holds one address alone.
pub fn host_prefix(address: IpAddr) -> IpNet {
    IpNet::from(address)
}
