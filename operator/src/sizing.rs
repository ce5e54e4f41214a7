//! How large the blocks of a range are that does not say. Pure.
//!
//! The size is written into `spec.blockPrefixLength` once and never changes, so `blockSizing: MaxPods` waits
//! for a node that says how many pods it can hold. That is an upper bound: pods on the host's network take no
//! address. Room is left above it, as an address stays taken for a moment after its pod has ended: so much
//! that a node full of pods does not ask for another block ([`holds`]).

use std::fmt;
use std::time::Duration;

use plat_crds::cluster_cidr::BlockSizing;
use plat_crds::growth::wants_block;
use plat_crds::{Block, Family};

use crate::facts::{NodeFact, RangeFact};
use crate::snapshot::Snapshot;

/// How long a new node may take to say how many pods it can hold; a kubelet says it as it registers.
const SILENCE: Duration = Duration::from_secs(60);
/// What a kubelet allows unless its `maxPods` says otherwise.
pub const KUBELET_MAX_PODS: u32 = 110;
/// A range is never cut into more than 2 to this power blocks: no cluster has more nodes, and longer
/// prefixes would only make blocks small. It is also what gives an IPv6 /48 its customary /64 blocks.
const MAX_BLOCK_BITS: u8 = 16;

/// A block size, and what it was chosen for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSize {
    /// Prefix length.
    pub prefix: u8,
    /// Why.
    pub basis: Basis,
}

/// What a block size was chosen for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Basis {
    /// The family's default.
    Default,
    /// What nodes say that they can hold.
    Nodes {
        /// How many nodes the range selects.
        count: usize,
        /// Pods of the largest of them.
        pods: u32,
    },
    /// Nodes have blocks of that size in the range already (`node.spec.podCIDRs`) and keep them.
    PodCidrs,
    /// Nodes do not say, so what kubelets allow by default.
    Silence,
}

impl fmt::Display for Basis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Basis::Default => f.write_str("the default of the family"),
            Basis::Nodes { count: 1, pods } => write!(f, "the node that it selects holds up to {pods} pods"),
            Basis::Nodes { count, pods } => {
                write!(f, "the largest of the {count} nodes that it selects holds up to {pods} pods")
            }
            Basis::PodCidrs => f.write_str("nodes have spec.podCIDRs of that size in it"),
            Basis::Silence => write!(
                f,
                "no node that it selects says how many pods it can hold (status.allocatable.pods), so for {KUBELET_MAX_PODS}"
            ),
        }
    }
}

/// How it stands with the block size of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sizing {
    /// It is written.
    Set,
    /// This one is to be written.
    Choose(BlockSize),
    /// No node tells it yet.
    Wait {
        /// Whom it waits for.
        why: String,
        /// When to look again although nothing has changed: time from now.
        at_most: Option<Duration>,
    },
    /// No block of the range holds that many pods.
    Impossible(String),
}

/// How it stands with the block size of `range`.
pub fn sizing(range: &RangeFact, snapshot: &Snapshot) -> Sizing {
    let (None, Some(block)) = (range.block_prefix, range.range) else { return Sizing::Set };
    if range.block_sizing != BlockSizing::MaxPods {
        return Sizing::Choose(BlockSize {
            prefix: block.family().default_block_prefix(),
            basis: Basis::Default,
        });
    }
    let nodes: Vec<&NodeFact> = snapshot
        .nodes
        .values()
        .map(|node| &**node)
        .filter(|node| node.problem.is_none() && range.selector.matches(&node.labels))
        .collect();
    if let Some(prefix) = pod_cidr_size(&block, &nodes) {
        return Sizing::Choose(BlockSize { prefix, basis: Basis::PodCidrs });
    }
    if let Some(pods) = nodes.iter().filter_map(|node| node.max_pods).filter(|pods| *pods > 0).max() {
        return of_pods(&block, pods, Basis::Nodes { count: nodes.len(), pods });
    }
    match nodes.iter().map(|node| patience(node, snapshot)).min() {
        Some(Duration::ZERO) => of_pods(&block, KUBELET_MAX_PODS, Basis::Silence),
        Some(wait) => Sizing::Wait {
            why: "spec.blockSizing is MaxPods, and no node that it selects says yet how many pods it can hold (status.allocatable.pods)"
                .to_owned(),
            at_most: Some(wait),
        },
        None => Sizing::Wait {
            why: "spec.blockSizing is MaxPods: the size of its blocks is chosen when the first node that it selects is there"
                .to_owned(),
            at_most: None,
        },
    }
}

fn of_pods(range: &Block, pods: u32, basis: Basis) -> Sizing {
    match prefix_for(range, pods) {
        Some(prefix) => Sizing::Choose(BlockSize { prefix, basis }),
        None => Sizing::Impossible(format!(
            "spec.blockSizing is MaxPods, and no block in {range} has room for {pods} pods ({basis}): set spec.blockPrefixLength, or use a larger range"
        )),
    }
}

/// The longest prefix whose block holds that many pods with room to spare; `None` if even the largest block
/// that the range may be cut into does not.
pub fn prefix_for(range: &Block, pods: u32) -> Option<u8> {
    let bounds = block_prefixes(range);
    let (shortest, longest) = (*bounds.start(), *bounds.end());
    let longest = longest.min(range.prefix_length().saturating_add(MAX_BLOCK_BITS).max(shortest));
    (shortest..=longest).rev().find(|prefix| holds(capacity(range, *prefix), pods))
}

/// Pods that a block of that size holds.
pub fn capacity(range: &Block, prefix: u8) -> u32 {
    Block::of(range.network(), prefix).map_or(0, |block| block.capacity())
}

/// Whether a node with a block of that capacity still has, when it is full of pods, as many free addresses
/// as keep it from asking for another block.
pub fn holds(capacity: u32, pods: u32) -> bool {
    !wants_block([(pods, capacity)])
}

/// The largest block that a node has in the range by its `spec.podCIDRs`.
fn pod_cidr_size(range: &Block, nodes: &[&NodeFact]) -> Option<u8> {
    let blocks = nodes.iter().flat_map(|node| node.spec_blocks()).filter(|block| range.covers(block));
    blocks.map(|block| block.prefix_length()).filter(|prefix| block_prefixes(range).contains(prefix)).min()
}

/// The block sizes that the ClusterCIDR's rules allow for a range, largest block first; empty if there is none.
pub fn block_prefixes(range: &Block) -> std::ops::RangeInclusive<u8> {
    let (shortest, longest) = match range.family() {
        Family::IPv4 => (16, 30),
        Family::IPv6 => (48, 124),
    };
    let length = range.prefix_length();
    length.max(shortest)..=longest.min(length.saturating_add(24))
}

/// For how long a node may still be silent. A node from far in the future was made by a wrong clock.
fn patience(node: &NodeFact, snapshot: &Snapshot) -> Duration {
    let end = node.created.checked_add(SILENCE).unwrap_or(node.created);
    let wait = snapshot.clock.until(end);
    if wait > SILENCE * 2 { Duration::ZERO } else { wait }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{NOW, Scene, at, block, labels, node, range, scene, selector, spec};
    use proptest::prelude::*;

    fn unsized_range(cidr: &str) -> RangeFact {
        RangeFact { block_prefix: None, block_sizing: BlockSizing::MaxPods, ..range("r", cidr) }
    }

    fn with_pods(name: &str, pods: Option<u32>) -> NodeFact {
        NodeFact { max_pods: pods, ..node(name) }
    }

    fn sizing_of(range: &RangeFact, scene: Scene) -> Sizing {
        sizing(range, &scene.snapshot())
    }

    #[test]
    fn the_smallest_block_is_chosen_that_a_full_node_does_not_outgrow() {
        for (range, pods, expected) in [
            ("10.244.0.0/16", 1, Some(29)),
            ("10.244.0.0/16", 6, Some(28)),
            ("10.244.0.0/16", 16, Some(26)),
            ("10.244.0.0/16", 45, Some(26)),
            ("10.244.0.0/16", 46, Some(25)),
            ("10.244.0.0/16", 100, Some(25)),
            ("10.244.0.0/16", 110, Some(24)),
            ("10.244.0.0/16", 203, Some(24)),
            ("10.244.0.0/16", 204, Some(23)),
            ("10.244.0.0/16", 250, Some(23)),
            ("10.244.0.0/16", 1000, Some(21)),
            ("10.244.0.0/24", 110, Some(24)),
            ("10.244.0.0/25", 110, None),
            ("10.0.0.0/8", 30, Some(24)),
            ("10.244.0.0/16", 52_000, Some(16)),
            ("10.244.0.0/16", 60_000, None),
            ("fd00:10:244::/48", 110, Some(64)),
            ("fd00:10:244::/56", 110, Some(72)),
            ("fd00:10:244::/112", 110, Some(120)),
            ("fd00:10:244::/120", 110, Some(120)),
            ("fd00:10:244::/121", 110, None),
            ("fd00::/24", 110, Some(48)),
            ("fd00:10:244::/48", 60_000, None),
        ] {
            assert_eq!(prefix_for(&block(range), pods), expected, "{range} for {pods} pods");
        }
    }

    #[test]
    fn the_largest_node_that_the_range_selects_counts() {
        let chosen =
            |pods, count, prefix| Sizing::Choose(BlockSize { prefix, basis: Basis::Nodes { count, pods } });
        let large = NodeFact { labels: labels(&[("pool", "large")]), ..with_pods("n3", Some(250)) };
        let nodes = scene().node(with_pods("n1", Some(32))).node(with_pods("n2", None)).node(large);
        assert_eq!(sizing_of(&unsized_range("10.244.0.0/16"), nodes.clone()), chosen(250, 3, 23));
        let small = RangeFact { selector: selector("pool", "small"), ..unsized_range("10.244.0.0/16") };
        assert!(matches!(sizing_of(&small, nodes.clone()), Sizing::Wait { at_most: None, .. }));
        let large = RangeFact { selector: selector("pool", "large"), ..unsized_range("10.244.0.0/16") };
        assert_eq!(sizing_of(&large, nodes), chosen(250, 1, 23));
    }

    #[test]
    fn a_size_that_is_written_or_not_asked_for_depends_on_no_node() {
        let nodes = || scene().node(with_pods("n1", Some(500)));
        assert_eq!(sizing_of(&range("r", "10.244.0.0/16"), nodes()), Sizing::Set);
        for sizing in [BlockSizing::Default, BlockSizing::Unknown] {
            let plain = RangeFact { block_sizing: sizing, ..unsized_range("10.244.0.0/16") };
            let expected = Sizing::Choose(BlockSize { prefix: 24, basis: Basis::Default });
            assert_eq!(sizing_of(&plain, nodes()), expected);
        }
    }

    #[test]
    fn blocks_that_nodes_have_by_their_spec_keep_their_size() {
        let adopted = NodeFact { pod_cidrs: spec(&["10.244.3.0/25"]), ..with_pods("n1", Some(32)) };
        let outside = NodeFact { pod_cidrs: spec(&["10.9.0.0/20"]), ..with_pods("n2", Some(32)) };
        let sizing = sizing_of(&unsized_range("10.244.0.0/16"), scene().node(adopted).node(outside));
        assert_eq!(sizing, Sizing::Choose(BlockSize { prefix: 25, basis: Basis::PodCidrs }));
    }

    #[test]
    fn nodes_that_do_not_say_are_waited_for_a_minute() {
        let silent = |created| {
            let node = NodeFact { created: at(created), ..with_pods("n1", None) };
            sizing_of(&unsized_range("10.244.0.0/16"), scene().node(node))
        };
        for (created, expected) in [(NOW, 60), (NOW - 59, 1), (NOW + 30, 90)] {
            let Sizing::Wait { at_most, .. } = silent(created) else { panic!("{created}") };
            assert_eq!(at_most, Some(Duration::from_secs(expected)), "{created}");
        }
        let assumed = Sizing::Choose(BlockSize { prefix: 24, basis: Basis::Silence });
        assert_eq!((silent(NOW - 60), silent(NOW + 9999)), (assumed.clone(), assumed));
    }

    #[test]
    fn a_range_without_room_for_a_full_node_says_what_to_do() {
        let Sizing::Impossible(why) =
            sizing_of(&unsized_range("10.244.0.0/25"), scene().node(with_pods("n1", Some(110))))
        else {
            panic!()
        };
        assert_eq!(
            why,
            "spec.blockSizing is MaxPods, and no block in 10.244.0.0/25 has room for 110 pods \
             (the node that it selects holds up to 110 pods): set spec.blockPrefixLength, or use a larger range"
        );
    }

    proptest! {
        #[test]
        fn the_chosen_block_holds_the_pods_and_the_next_smaller_does_not(
            v6 in any::<bool>(), length in 8u8..=30, pods in 1u32..70_000,
        ) {
            let range = if v6 {
                Block::of("fd00:10:244::".parse().unwrap(), length + 94).unwrap()
            } else {
                Block::of("10.244.0.0".parse().unwrap(), length).unwrap()
            };
            let capacity = |prefix| Block::of(range.network(), prefix).unwrap().capacity();
            match prefix_for(&range, pods) {
                Some(prefix) => {
                    prop_assert!(range.subblock_count(prefix) >= 1 && block_prefixes(&range).contains(&prefix));
                    prop_assert!(holds(capacity(prefix), pods));
                    let smaller = prefix + 1;
                    let allowed = block_prefixes(&range).contains(&smaller) && range.subblock_count(smaller) <= 1 << 16;
                    prop_assert!(!allowed || !holds(capacity(smaller), pods));
                }
                None => prop_assert!(block_prefixes(&range).all(|prefix| !holds(capacity(prefix), pods))),
            }
        }
    }
}
