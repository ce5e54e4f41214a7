//! How this node reaches another node's block, from the policy that holds for it.
//!
//! [`route`] is pure, and the place where a new routing field takes effect (docs/routing-policy.md walks
//! through it). What the schema cannot check is checked here: a policy that cannot work is a [`Fault`] that
//! names object and field.

use std::collections::BTreeSet;
use std::net::IpAddr;

use plat_crds::block::Family;
use plat_crds::names::UNREACHABLE_METRIC;
use plat_crds::routing::{self, Mode};

use crate::desired::{Host, Location, Map, Me};
use crate::fabric::{Hop, Route, RouteKey, Target};
use crate::facts::{BlockFact, Fault, RangeFact, Reason};
use crate::policies;

/// Smallest MTU of an IPv6 path (RFC 8200 §5).
const MIN_MTU_V6: u32 = 1280;

/// How a foreign block is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// By a route of ours.
    Via { next_hop: IpAddr, metric: u32, mtu: Option<u32> },
    /// By something else.
    None,
}

/// The addresses that routes to foreign blocks lead to. Their locations are what `Host` must know.
pub fn next_hops(me: &Me, map: Map<'_>) -> BTreeSet<IpAddr> {
    let foreign = map.blocks.values().filter(|b| b.node != me.node && !b.released());
    foreign.filter_map(|b| next_hop(b, map).ok().flatten()).collect()
}

/// The router or node to which the policy of a block sends its packets; `None` if it leaves them to others.
pub fn next_hop(block: &BlockFact, map: Map<'_>) -> Result<Option<IpAddr>, Fault> {
    match path(block, map)? {
        Path::Via { next_hop, .. } => Ok(Some(next_hop)),
        Path::None => Ok(None),
    }
}

/// The route to a foreign block; none if something else carries it.
pub fn route(block: &BlockFact, map: Map<'_>, host: &Host) -> Result<Option<Route>, Fault> {
    let Path::Via { next_hop, metric, mtu } = path(block, map)? else { return Ok(None) };
    let whose = format!("PodCIDR '{}' of node {}", block.name, block.node);
    match host.locations.get(&next_hop).copied().unwrap_or(Location::Remote) {
        Location::OnLink { device } => {
            let target = Target::via([Hop::to(next_hop, device)]);
            Ok(Some(Route { mtu, ..Route::new(RouteKey::main(block.block, metric), target) }))
        }
        Location::Local => Err(Fault::block(
            &block.name,
            Reason::NotOnLink,
            format!(
                "{whose}: its next hop {next_hop} is an address of this node itself; correct the node's address or spec.routing.nextHop"
            ),
        )),
        Location::Remote => Err(Fault::block(
            &block.name,
            Reason::NotOnLink,
            format!(
                "{whose}: its next hop {next_hop} is not on a link of this node; set spec.routing.nextHop to a router that is, or spec.routing.mode to None if something else carries the block"
            ),
        )),
    }
}

/// The policy of a foreign block: what `crds` resolves, checked against what a kernel route can express.
fn path(block: &BlockFact, map: Map<'_>) -> Result<Path, Fault> {
    let unusable = |what: String| Fault::block(&block.name, Reason::UnusablePolicy, what);
    let layers = policies::layers(block, map.ranges.get(&block.range), map.policies);
    let policy =
        routing::resolve(&layers).map_err(|error| unusable(format!("PodCIDR '{}': {error}", block.name)))?;
    match policy.mode.value {
        Mode::None => return Ok(Path::None),
        Mode::Auto | Mode::Direct => {}
        Mode::VXLAN | Mode::Unknown => {
            return Err(unusable(format!(
                "PodCIDR '{}': the routing mode of the {} is not known to this agent; upgrade the agent or set another spec.routing.mode",
                block.name, policy.mode.from
            )));
        }
    }
    let family = block.block.family();
    let hop = policy.next_hops.value.first().map(|hop| hop.address);
    let next_hop = match hop {
        Some(router) if Family::of(&router) != family => {
            return Err(unusable(format!(
                "PodCIDR '{}': nextHop {router} of the {} is not an {family} address",
                block.name, policy.next_hops.from
            )));
        }
        Some(router) => router,
        None => block.addresses.iter().find(|a| Family::of(a) == family).copied().ok_or_else(|| {
            Fault::block(
                &block.name,
                Reason::NoNodeAddress,
                format!("PodCIDR '{}': node {} has no {family} address; give it an InternalIP, or set spec.routing.nextHop", block.name, block.node),
            )
        })?,
    };
    let metric = policy.metric.value;
    if !(1..UNREACHABLE_METRIC).contains(&metric) {
        return Err(unusable(format!(
            "PodCIDR '{}': metric {metric} of the {} is not between 1 and {}",
            block.name,
            policy.metric.from,
            UNREACHABLE_METRIC - 1
        )));
    }
    let mtu = policy.mtu.value;
    if family == Family::IPv6 && mtu.is_some_and(|mtu| mtu < MIN_MTU_V6) {
        return Err(unusable(format!(
            "PodCIDR '{}': mtu {} of the {} is below {MIN_MTU_V6}, the least that IPv6 allows",
            block.name,
            mtu.unwrap_or_default(),
            policy.mtu.from
        )));
    }
    Ok(Path::Via { next_hop, metric, mtu })
}

/// Whether no block of the range is left to something else to route: then what has no route of ours has
/// no pods, and may be closed.
pub fn all_routed(range: &RangeFact, map: Map<'_>) -> bool {
    let mut blocks = map.blocks.values().filter(|b| b.range == range.name && !b.released());
    blocks.all(|b| !matches!(path(b, map), Ok(Path::None)))
}
