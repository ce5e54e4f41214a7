//! What there is to probe: this node's own blocks, from whose gateways it asks and answers, and the blocks of others.

use std::collections::BTreeMap;
use std::net::IpAddr;

use plat_crds::block::{Block, Family};
use plat_crds::blocks_file::HeldBlock;

use crate::desired::{Host, Map, Me};
use crate::fabric::Desired;

/// What pods send at most where nothing is known of the links: the MTU of Ethernet.
const ETHERNET: u32 = 1500;

/// A block of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The block.
    pub block: Block,
    /// The largest packet that pods send to it, in bytes.
    pub ceiling: u32,
    /// When its object was made, in seconds since the epoch.
    pub created: i64,
}

/// What there is to probe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Blocks of this node, in order.
    pub own: Vec<Block>,
    /// Those of others, in order: IPv4 first.
    pub targets: Vec<Target>,
}

impl Plan {
    /// What a node should probe. The routes that are desired tell how large packets may be by policy; path MTUs that
    /// were found are no policy.
    pub fn new(
        me: &Me,
        map: Map<'_>,
        host: &Host,
        own: &BTreeMap<Block, HeldBlock>,
        desired: &Desired,
    ) -> Plan {
        let limited: BTreeMap<&Block, u32> =
            desired.routes.values().filter_map(|route| Some((&route.key.prefix, route.mtu?))).collect();
        let foreign = map.blocks.values().filter(|fact| fact.node != me.node && !fact.released());
        let mut targets: Vec<Target> = foreign
            .map(|fact| {
                let of_route = limited.get(&fact.block).copied();
                let by_policy = of_route.filter(|mtu| host.path_mtus.get(&fact.block) != Some(mtu));
                let ceiling = [host.mtu, by_policy].into_iter().flatten().min().unwrap_or(ETHERNET);
                Target { block: fact.block, ceiling, created: fact.created }
            })
            .collect();
        targets.sort_unstable_by_key(|target| target.block);
        targets.dedup_by_key(|target| target.block);
        Plan { own: own.keys().copied().collect(), targets }
    }

    /// The block of this node that packets of that family come from.
    pub fn source(&self, family: Family) -> Option<Block> {
        self.own.iter().find(|block| block.family() == family).copied()
    }

    /// The target of that block.
    pub fn target(&self, block: &Block) -> Option<&Target> {
        let at = self.targets.binary_search_by(|target| target.block.cmp(block)).ok()?;
        self.targets.get(at)
    }

    /// The targets of that family, in order.
    pub fn of_family(&self, family: Family) -> &[Target] {
        let v6 = self.targets.partition_point(|target| target.block.family() == Family::IPv4);
        let range = match family {
            Family::IPv4 => ..v6,
            Family::IPv6 => return self.targets.get(v6..).unwrap_or_default(),
        };
        self.targets.get(range).unwrap_or_default()
    }

    /// Whether a packet from that address may be a peer's: it is the gateway of a block that is known.
    pub fn is_peer(&self, address: IpAddr) -> bool {
        let targets = self.of_family(Family::of(&address));
        let at = targets.partition_point(|target| target.block.network() <= address);
        let before = at.checked_sub(1).and_then(|at| targets.get(at));
        before.is_some_and(|target| target.block.gateway() == address)
    }

    /// A share from 0 to 1 that differs from node to node.
    pub fn jitter(&self) -> f64 {
        let text = self.own.first().map(Block::to_string).unwrap_or_default();
        let hash = text.bytes().fold(0x811c_9dc5u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
        f64::from(hash % 1000) / 1000.0
    }
}
