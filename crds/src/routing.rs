//! Routing policy: what users write, and the one function that says what holds.
//!
//! A new field is added here, then in the agent's `path`, then in its kernel translation, with a test
//! each: docs/routing-policy.md walks through it.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::names::{MAIN_TABLE, ROUTE_METRIC};

/// How other nodes reach the block. `Auto` (the default) takes a direct route where the node is on-link and
/// a VXLAN tunnel where it is not; `Direct` insists on a plain route; `VXLAN` insists on the tunnel; `None`
/// makes no route, because something else carries the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Mode {
    /// The best way that works: `Direct` if the node is on-link, else `VXLAN`.
    #[default]
    Auto,
    /// A plain route via the node's address (or `nextHop`), which must be on-link.
    Direct,
    /// A tunnel to the node's address (RFC 7348), whatever lies between.
    VXLAN,
    /// No route: something else (a router, a cloud route table) carries the block.
    None,
    /// A mode of a newer version. The last working route stays.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// One of several routers that lead to a block.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NextHop {
    /// Address of the router, of the block's family, and on-link for the nodes that use it.
    #[schemars(length(max = 45))]
    #[x_kube(validation = Rule::new("isIP(self) && ip.isCanonical(self)")
        .message("must be an IP address in canonical form, such as 172.30.0.1 or fd00::1"))]
    pub address: String,
    /// Share of the flows that it gets, relative to the others', 1 to 256. Default 1.
    #[serde(default = "default_weight")]
    #[schemars(range(min = 1, max = 256))]
    pub weight: i32,
}

fn default_weight() -> i32 {
    1
}

/// Exceptions from the masquerade of a node's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct MasqueradeRouting {
    /// Destinations that see the node's address (or `egressAddress`) although they are pods, nodes or in
    /// `exclude`, and also where the ClusterCIDR's masquerade mode is `Disabled`. At most 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(length(max = 43)))]
    #[x_kube(validation = Rule::new("self.all(c, isCIDR(c) && cidr(c) == cidr(c).masked())")
        .message("each must be a CIDR without host bits, such as 192.168.0.0/16"))]
    pub include: Option<Vec<String>>,
    /// Destinations that see the pods' own addresses, besides pods, nodes and those that the ClusterCIDR's
    /// `masquerade` excludes. At most 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64), inner(length(max = 43)))]
    #[x_kube(validation = Rule::new("self.all(c, isCIDR(c) && cidr(c) == cidr(c).masked())")
        .message("each must be a CIDR without host bits, such as 192.168.0.0/16"))]
    pub exclude: Option<Vec<String>>,
}

/// Routing policy of a block (in a PodCIDR), of blocks and nodes that labels select (in a RoutingPolicy),
/// or of all blocks of a range (in a ClusterCIDR). A field that is not set is decided by the next layer:
/// PodCIDR, then RoutingPolicies by priority, then ClusterCIDR, then the built-in default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.mode) || self.mode != 'None' || (!has(self.nextHop) && !has(self.nextHops) && !has(self.interface) && !has(self.metric) && !has(self.table) && !has(self.mtu) && !has(self.advmss) && !has(self.initcwnd) && !has(self.sourceAddress) && !has(self.onLink))")
        .message("mode None makes no route: leave out all fields that shape one"),
    validation = Rule::new("!has(self.mode) || self.mode != 'VXLAN' || (!has(self.nextHop) && !has(self.nextHops) && !has(self.interface) && !has(self.onLink))")
        .message("mode VXLAN tunnels to the node: leave out nextHop, nextHops, interface and onLink"),
    validation = Rule::new("!has(self.nextHop) || !has(self.nextHops)")
        .message("set nextHop for one router, or nextHops for several, not both"),
)]
pub struct Routing {
    /// How other nodes reach the block. `Auto` (the default) takes a direct route where the node is
    /// on-link and a VXLAN tunnel where it is not; `Direct` insists on a plain route; `VXLAN` insists on the
    /// tunnel; `None` makes no route, because something else carries the block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,

    /// Address of the router that leads to the block, instead of the node's own address. Of the block's
    /// family, and on-link for the nodes that use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    #[x_kube(validation = Rule::new("isIP(self) && ip.isCanonical(self)")
        .message("must be an IP address in canonical form, such as 172.30.0.1 or fd00::1"))]
    pub next_hop: Option<String>,

    /// Several routers that lead to the block, each with a share of the flows (ECMP). 2 to 8, in place of
    /// `nextHop`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 8))]
    pub next_hops: Option<Vec<NextHop>>,

    /// Name of the link that the routes to the block leave by. Default: the link that the next hop is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 15))]
    #[x_kube(validation = Rule::new("self.matches('^[^/ :]+$') && self != '.' && self != '..'")
        .message("must be the name of a link, such as eth1"))]
    pub interface: Option<String>,

    /// Metric of the routes to the block, 1 to 65534; lower wins among routes to the same prefix.
    /// Default 1120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65534))]
    pub metric: Option<i32>,

    /// Routing table of the routes to the block, 1 to 2147483647 but not 253 and 255, which are the kernel's.
    /// For another one than main (254, the default), an `ip rule` of ours leads all packets through it before
    /// main.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    #[x_kube(validation = Rule::new("self != 253 && self != 255").message("tables 253 and 255 are the kernel's"))]
    pub table: Option<i32>,

    /// MTU in bytes of the routes to the block, 576 (RFC 791) to 65535; at least 1280 for IPv6 (RFC 8200).
    /// Default: the outgoing device's, or what the probes found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 576, max = 65535))]
    pub mtu: Option<i32>,

    /// Largest TCP segment to advertise on connections of the node itself over the routes to the block, in
    /// bytes, 536 to 65495. Default: by the MTU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 536, max = 65495))]
    pub advmss: Option<i32>,

    /// Segments that TCP connections of the node itself send over the routes to the block before the first answer, 1
    /// to 1000 (RFC 6928 has 10). Default: the kernel's, 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub initcwnd: Option<i32>,

    /// Address that the node itself sends from over the routes to the block; one of its own, of the block's
    /// family. Default: the kernel's choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    #[x_kube(validation = Rule::new("isIP(self) && ip.isCanonical(self)")
        .message("must be an IP address in canonical form, such as 172.30.0.1 or fd00::1"))]
    pub source_address: Option<String>,

    /// Whether the next hop counts as on-link though no subnet of the link says so (`ip route … onlink`).
    /// Needs `interface`. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_link: Option<bool>,

    /// Exceptions from the masquerade of the pods of the block; in a RoutingPolicy, of the pods of the
    /// nodes that `sources` selects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<MasqueradeRouting>,

    /// Address that masqueraded traffic of these pods leaves with; one of the node's own, of the pods'
    /// family. Default: that of the link that it leaves by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    #[x_kube(validation = Rule::new("isIP(self) && ip.isCanonical(self)")
        .message("must be an IP address in canonical form, such as 172.30.0.1 or fd00::1"))]
    pub egress_address: Option<String>,
}

/// The layer that decided a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layer {
    /// `spec.routing` of the PodCIDR.
    PodCIDR,
    /// `spec.routing` of the RoutingPolicy of that name.
    RoutingPolicy(Arc<str>),
    /// `spec.routing` of the ClusterCIDR.
    ClusterCIDR,
    /// Built in.
    Default,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layer::PodCIDR => f.write_str("PodCIDR"),
            Layer::RoutingPolicy(name) => write!(f, "RoutingPolicy '{name}'"),
            Layer::ClusterCIDR => f.write_str("ClusterCIDR"),
            Layer::Default => f.write_str("built-in default"),
        }
    }
}

/// A value and the layer that decided it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub from: Layer,
}

/// A router and its share of the flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hop {
    /// Address of the router.
    pub address: IpAddr,
    /// Share, relative to the others', 1 to 256.
    pub weight: u16,
}

/// The policy that holds for the routes to one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// How the block is reached.
    pub mode: Decided<Mode>,
    /// The routers to use; none is the node's own address.
    pub next_hops: Decided<Vec<Hop>>,
    /// The link to leave by; `None` is the one that the next hop is on.
    pub interface: Decided<Option<String>>,
    /// Route metric.
    pub metric: Decided<u32>,
    /// Routing table.
    pub table: Decided<u32>,
    /// Route MTU in bytes; `None` is the device's.
    pub mtu: Decided<Option<u32>>,
    /// Largest TCP segment to advertise, in bytes; `None` is by the MTU.
    pub advmss: Decided<Option<u32>>,
    /// Segments to send before the first answer; `None` is the kernel's choice.
    pub initcwnd: Decided<Option<u32>>,
    /// Preferred source address; `None` is the kernel's choice.
    pub source_address: Decided<Option<IpAddr>>,
    /// Whether the next hop counts as on-link.
    pub on_link: Decided<bool>,
}

/// The policy that holds for what leaves the cluster from the pods of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Egress {
    /// Destinations that are masqueraded though something excludes them.
    pub include: Decided<Vec<IpNet>>,
    /// Further destinations that are not masqueraded.
    pub exclude: Decided<Vec<IpNet>>,
    /// Address that masqueraded traffic leaves with; `None` is that of the link.
    pub address: Decided<Option<IpAddr>>,
}

/// A text in a policy that does not say what it should. The API server refuses it; a cached or older object may
/// still hold it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} '{text}' is not {expected}; correct spec.routing.{field} of the {from}")]
pub struct Invalid {
    /// Name of the field.
    pub field: &'static str,
    /// The text.
    pub text: String,
    /// What it should be.
    pub expected: &'static str,
    /// The layer that holds it.
    pub from: Layer,
}

/// What holds for the routes to a block, field by field: the first of `layers` that sets a field decides it,
/// else the built-in default. The order is PodCIDR, RoutingPolicies by priority then name, ClusterCIDR.
pub fn resolve(layers: &[(Layer, &Routing)]) -> Result<Resolved, Invalid> {
    Ok(Resolved {
        mode: first(layers, |r| r.mode).or(Mode::Auto),
        next_hops: next_hops(layers)?,
        interface: first(layers, |r| r.interface.clone().map(Some)).or(None),
        metric: first(layers, |r| number(r.metric)).or(ROUTE_METRIC),
        table: first(layers, |r| number(r.table)).or(MAIN_TABLE),
        mtu: first(layers, |r| number(r.mtu).map(Some)).or(None),
        advmss: first(layers, |r| number(r.advmss).map(Some)).or(None),
        initcwnd: first(layers, |r| number(r.initcwnd).map(Some)).or(None),
        source_address: address(layers, "sourceAddress", |r| r.source_address.as_deref())?,
        on_link: first(layers, |r| r.on_link).or(false),
    })
}

/// What holds for what leaves the cluster from the pods of a block, as [`resolve`] has it.
pub fn resolve_egress(layers: &[(Layer, &Routing)]) -> Result<Egress, Invalid> {
    fn masquerade(r: &Routing) -> Option<&MasqueradeRouting> {
        r.masquerade.as_ref()
    }
    Ok(Egress {
        include: networks(layers, "masquerade.include", |r| masquerade(r)?.include.as_deref())?,
        exclude: networks(layers, "masquerade.exclude", |r| masquerade(r)?.exclude.as_deref())?,
        address: address(layers, "egressAddress", |r| r.egress_address.as_deref())?,
    })
}

fn number(value: Option<i32>) -> Option<u32> {
    value.and_then(|value| u32::try_from(value).ok())
}

/// `nextHop` and `nextHops` are one field in two forms: the first layer with either decides.
fn next_hops(layers: &[(Layer, &Routing)]) -> Result<Decided<Vec<Hop>>, Invalid> {
    let one = |text: &String| vec![NextHop { address: text.clone(), weight: default_weight() }];
    let found = first(layers, |r| r.next_hops.clone().or_else(|| r.next_hop.as_ref().map(one))).or(vec![]);
    let from = found.from;
    let hops = found.value.into_iter().map(|hop| {
        let weight = u16::try_from(hop.weight.clamp(1, 256)).unwrap_or(1);
        Ok(Hop { address: parse(&hop.address, "nextHop", "an IP address", &from)?, weight })
    });
    Ok(Decided { value: hops.collect::<Result<_, _>>()?, from })
}

fn address<'r>(
    layers: &[(Layer, &'r Routing)],
    field: &'static str,
    get: impl Fn(&'r Routing) -> Option<&'r str>,
) -> Result<Decided<Option<IpAddr>>, Invalid> {
    let Decided { value, from } = first(layers, |r| get(r).map(Some)).or(None);
    let value = value.map(|text| parse(text, field, "an IP address", &from)).transpose()?;
    Ok(Decided { value, from })
}

fn networks<'r>(
    layers: &[(Layer, &'r Routing)],
    field: &'static str,
    get: impl Fn(&'r Routing) -> Option<&'r [String]>,
) -> Result<Decided<Vec<IpNet>>, Invalid> {
    let Decided { value, from } = first(layers, get).or(&[]);
    let nets = value.iter().map(|text| parse::<IpNet>(text, field, "a CIDR", &from).map(|net| net.trunc()));
    Ok(Decided { value: nets.collect::<Result<_, _>>()?, from })
}

fn parse<T: std::str::FromStr>(
    text: &str,
    field: &'static str,
    expected: &'static str,
    from: &Layer,
) -> Result<T, Invalid> {
    text.parse().map_err(|_| Invalid { field, text: text.to_owned(), expected, from: from.clone() })
}

struct Found<T>(Option<(T, Layer)>);

impl<T> Found<T> {
    fn or(self, default: T) -> Decided<T> {
        let (value, from) = self.0.unwrap_or((default, Layer::Default));
        Decided { value, from }
    }
}

fn first<'r, T>(layers: &[(Layer, &'r Routing)], field: impl Fn(&'r Routing) -> Option<T>) -> Found<T> {
    Found(layers.iter().find_map(|(layer, routing)| Some((field(routing)?, layer.clone()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing(json: serde_json::Value) -> Routing {
        serde_json::from_value(json).unwrap()
    }

    fn policy(name: &str) -> Layer {
        Layer::RoutingPolicy(name.into())
    }

    #[test]
    fn each_field_comes_from_the_nearest_layer_that_sets_it() {
        let pod = routing(serde_json::json!({"metric": 5}));
        let near = routing(serde_json::json!({"metric": 6, "mtu": 1400, "table": 100}));
        let far = routing(serde_json::json!({"mtu": 1300, "advmss": 1200, "initcwnd": 20, "onLink": true}));
        let cluster = routing(serde_json::json!({"metric": 7, "nextHop": "10.0.0.1", "interface": "eth1"}));
        let layers = [
            (Layer::PodCIDR, &pod),
            (policy("a"), &near),
            (policy("b"), &far),
            (Layer::ClusterCIDR, &cluster),
        ];
        let got = resolve(&layers).unwrap();
        assert_eq!(got.metric, Decided { value: 5, from: Layer::PodCIDR });
        assert_eq!(got.mtu, Decided { value: Some(1400), from: policy("a") });
        assert_eq!(got.table, Decided { value: 100, from: policy("a") });
        assert_eq!(got.advmss, Decided { value: Some(1200), from: policy("b") });
        assert_eq!(got.initcwnd, Decided { value: Some(20), from: policy("b") });
        assert_eq!(got.on_link, Decided { value: true, from: policy("b") });
        assert_eq!(got.interface, Decided { value: Some("eth1".into()), from: Layer::ClusterCIDR });
        let hop = Hop { address: [10, 0, 0, 1].into(), weight: 1 };
        assert_eq!(got.next_hops, Decided { value: vec![hop], from: Layer::ClusterCIDR });
        assert_eq!(got.mode, Decided { value: Mode::Auto, from: Layer::Default });
    }

    #[test]
    fn nothing_set_is_the_default() {
        for got in [resolve(&[]).unwrap(), resolve(&[(Layer::ClusterCIDR, &Routing::default())]).unwrap()] {
            assert_eq!(
                (got.mode.value, got.next_hops.value, got.metric.value, got.mtu.value, got.table.value),
                (Mode::Auto, vec![], ROUTE_METRIC, None, MAIN_TABLE)
            );
        }
    }

    #[test]
    fn next_hop_and_next_hops_are_one_field() {
        let pod = routing(serde_json::json!({"nextHop": "10.0.0.1"}));
        let several =
            serde_json::json!({"nextHops": [{"address": "10.0.0.2", "weight": 3}, {"address": "10.0.0.3"}]});
        let several = routing(several);
        let got = resolve(&[(Layer::PodCIDR, &pod), (Layer::ClusterCIDR, &several)]).unwrap();
        assert_eq!((got.next_hops.value.len(), got.next_hops.from), (1, Layer::PodCIDR));
        let got = resolve(&[(Layer::PodCIDR, &several), (Layer::ClusterCIDR, &pod)]).unwrap();
        let weights: Vec<u16> = got.next_hops.value.iter().map(|hop| hop.weight).collect();
        assert_eq!(weights, [3, 1]);
    }

    #[test]
    fn what_leaves_the_cluster_is_resolved_field_by_field_too() {
        let pod = routing(serde_json::json!({"masquerade": {"include": ["10.9.0.0/16"]}}));
        let cluster = routing(serde_json::json!({
            "masquerade": {"include": [], "exclude": ["192.168.0.0/16"]}, "egressAddress": "172.30.0.9",
        }));
        let got = resolve_egress(&[(Layer::PodCIDR, &pod), (Layer::ClusterCIDR, &cluster)]).unwrap();
        assert_eq!(
            got.include,
            Decided { value: vec!["10.9.0.0/16".parse().unwrap()], from: Layer::PodCIDR }
        );
        assert_eq!(got.exclude.from, Layer::ClusterCIDR);
        assert_eq!(got.address.value, Some([172, 30, 0, 9].into()));
    }

    #[test]
    fn a_text_that_cannot_be_read_names_its_field_and_layer() {
        for (json, message) in [
            (
                serde_json::json!({"nextHop": "router"}),
                "nextHop 'router' is not an IP address; correct spec.routing.nextHop of the PodCIDR",
            ),
            (
                serde_json::json!({"sourceAddress": "me"}),
                "sourceAddress 'me' is not an IP address; correct spec.routing.sourceAddress of the PodCIDR",
            ),
        ] {
            let error = resolve(&[(Layer::PodCIDR, &routing(json))]).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
        let bad = routing(serde_json::json!({"masquerade": {"exclude": ["x"]}}));
        let error = resolve_egress(&[(policy("p"), &bad)]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "masquerade.exclude 'x' is not a CIDR; correct spec.routing.masquerade.exclude of the RoutingPolicy 'p'"
        );
    }

    #[test]
    fn a_mode_from_a_newer_version_is_kept_as_unknown() {
        let r: Routing = serde_json::from_str(r#"{"mode":"Later","later":1}"#).unwrap();
        assert_eq!(r.mode, Some(Mode::Unknown));
    }
}
