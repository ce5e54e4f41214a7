//! Routing policy: what users write, and the one function that says what holds.
//!
//! A new field is added here, then in the agent's `desired`, then in its kernel translation, with a test
//! each: docs/routing-policy.md walks through it.

use std::net::IpAddr;

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::names::ROUTE_METRIC;

/// How other nodes reach the block. `Auto` (the default) takes a direct route where the node is on-link and
/// reports a condition where it is not; `Direct` insists on a plain route; `None` makes no route, because
/// something else carries the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum Mode {
    /// The best way that works: today `Direct` if the node is on-link, else a condition that says so.
    #[default]
    Auto,
    /// A plain route via the node's address (or `nextHop`), which must be on-link.
    Direct,
    /// No route: something else (a router, a cloud route table) carries the block.
    None,
    /// A mode of a newer version. The last working route stays.
    #[serde(other)]
    #[schemars(skip)]
    Unknown,
}

/// Routing policy of a block (in a PodCIDR) or of all blocks of a range (in a ClusterCIDR). A field that
/// is not set is decided by the next layer: PodCIDR, then ClusterCIDR, then the built-in default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.mode) || self.mode != 'None' || (!has(self.nextHop) && !has(self.metric) && !has(self.mtu))")
    .message("mode None makes no route: leave out nextHop, metric and mtu"))]
pub struct Routing {
    /// How other nodes reach the block. `Auto` (the default) takes a direct route where the node is
    /// on-link and reports a condition where it is not; `Direct` insists on a plain route; `None` makes no
    /// route, because something else carries the block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,

    /// Address of the router that leads to the block, instead of the node's own address. Of the block's
    /// family, and on-link for the nodes that use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 45))]
    #[x_kube(validation = Rule::new("isIP(self) && ip.isCanonical(self)")
        .message("must be an IP address in canonical form, such as 172.30.0.1 or fd00::1"))]
    pub next_hop: Option<String>,

    /// Metric of the routes to the block, 1 to 65534; lower wins among routes to the same prefix.
    /// Default 1120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65534))]
    pub metric: Option<i32>,

    /// MTU in bytes of the routes to the block, 576 (RFC 791) to 65535; at least 1280 for IPv6 (RFC 8200).
    /// Default: the outgoing device's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 576, max = 65535))]
    pub mtu: Option<i32>,
}

/// The layer that decided a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Layer {
    /// `spec.routing` of the PodCIDR.
    PodCIDR,
    /// `spec.routing` of the ClusterCIDR.
    ClusterCIDR,
    /// Built in.
    Default,
}

/// A value and the layer that decided it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decided<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub from: Layer,
}

/// The policy that holds for one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// How the block is reached.
    pub mode: Decided<Mode>,
    /// The router to use; `None` is the node's own address. A text that is no address is
    /// [`InvalidNextHop`].
    pub next_hop: Decided<Option<IpAddr>>,
    /// Route metric.
    pub metric: Decided<u32>,
    /// Route MTU in bytes; `None` is the device's.
    pub mtu: Decided<Option<u32>>,
}

/// A `nextHop` that is no address. The API server refuses it; a cached or older object may still hold it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nextHop '{text}' is not an IP address; correct spec.routing.nextHop of the {from:?}")]
pub struct InvalidNextHop {
    /// The text.
    pub text: String,
    /// The layer that holds it.
    pub from: Layer,
}

/// What holds for a block, field by field: PodCIDR, then ClusterCIDR, then the built-in default.
pub fn resolve(
    pod_cidr: Option<&Routing>,
    cluster_cidr: Option<&Routing>,
) -> Result<Resolved, InvalidNextHop> {
    let layers = [(Layer::PodCIDR, pod_cidr), (Layer::ClusterCIDR, cluster_cidr)];
    let next_hop = first(&layers, |r| r.next_hop.clone());
    Ok(Resolved {
        mode: first(&layers, |r| r.mode).or(Mode::Auto),
        next_hop: match next_hop.0 {
            None => Decided { value: None, from: Layer::Default },
            Some((text, from)) => match text.parse() {
                Ok(address) => Decided { value: Some(address), from },
                Err(_) => return Err(InvalidNextHop { text, from }),
            },
        },
        metric: first(&layers, |r| r.metric.and_then(|m| u32::try_from(m).ok())).or(ROUTE_METRIC),
        mtu: first(&layers, |r| r.mtu.and_then(|m| u32::try_from(m).ok()).map(Some)).or(None),
    })
}

struct Found<T>(Option<(T, Layer)>);

impl<T> Found<T> {
    fn or(self, default: T) -> Decided<T> {
        let (value, from) = self.0.unwrap_or((default, Layer::Default));
        Decided { value, from }
    }
}

fn first<T>(layers: &[(Layer, Option<&Routing>)], field: impl Fn(&Routing) -> Option<T>) -> Found<T> {
    Found(layers.iter().find_map(|(layer, r)| Some((field((*r)?)?, *layer))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_comes_from_the_nearest_layer_that_sets_it() {
        let pod = Routing { metric: Some(5), ..Routing::default() };
        let cluster = Routing {
            metric: Some(7),
            mtu: Some(1400),
            next_hop: Some("10.0.0.1".into()),
            ..Routing::default()
        };
        let got = resolve(Some(&pod), Some(&cluster)).unwrap();
        assert_eq!(got.metric, Decided { value: 5, from: Layer::PodCIDR });
        assert_eq!(got.mtu, Decided { value: Some(1400), from: Layer::ClusterCIDR });
        assert_eq!(got.next_hop, Decided { value: Some([10, 0, 0, 1].into()), from: Layer::ClusterCIDR });
        assert_eq!(got.mode, Decided { value: Mode::Auto, from: Layer::Default });
    }

    #[test]
    fn nothing_set_is_the_default() {
        let got = resolve(None, Some(&Routing::default())).unwrap();
        assert_eq!(
            (got.mode.value, got.next_hop.value, got.metric.value, got.mtu.value),
            (Mode::Auto, None, ROUTE_METRIC, None)
        );
    }

    #[test]
    fn a_next_hop_that_is_no_address_names_its_layer() {
        let pod = Routing { next_hop: Some("router".into()), ..Routing::default() };
        let error = resolve(Some(&pod), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "nextHop 'router' is not an IP address; correct spec.routing.nextHop of the PodCIDR"
        );
    }

    #[test]
    fn a_mode_from_a_newer_version_is_kept_as_unknown() {
        let r: Routing = serde_json::from_str(r#"{"mode":"VXLAN","later":1}"#).unwrap();
        assert_eq!(r.mode, Some(Mode::Unknown));
    }
}
