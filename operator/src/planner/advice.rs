//! Which ClusterCIDR to add, and where there is room for it.

use plat_crds::cluster_cidr::{BlocksPerNode, DEFAULT_BLOCKS_PER_NODE};
use plat_crds::{Block, Family};
use serde::Serialize;

use super::fit::{Supply, nodes_that_fit};
use super::growth::{RunsOut, days, on};
use super::{Question, Range, choose_prefix};
use crate::pool::Pool;

/// Where new ranges are sought, after the neighbourhood of the last one: the private addresses of RFC 1918, the
/// shared ones of RFC 6598 and the unique local ones of RFC 4193.
const PRIVATE: [&str; 5] = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fd00::/8"];
/// Docker gives its bridge this range unless told otherwise.
const DOCKER_BRIDGE: &str = "172.17.0.0/16";
/// The customary size of an IPv6 site (RFC 6177): no smaller range is worth the saving.
const IPV6_SITE: u8 = 48;

/// A ClusterCIDR to add.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Advice {
    /// Its name.
    pub name: String,
    /// Its range; `None` if no private range has room for it.
    pub cidr: Option<Block>,
    /// Prefix length that the range needs.
    pub prefix_length: u8,
    /// Prefix length of its blocks.
    pub block_prefix_length: u8,
    /// Blocks of a node, as of the range before it.
    pub blocks_per_node: BlocksPerNode,
    /// For so many nodes.
    pub nodes: u64,
    /// With so many pods each.
    pub pods_per_node: u32,
}

/// The range with which everything fits to the end of the time looked at; `None` if it does without, or if no
/// range helps.
pub fn advise(
    question: &Question,
    ranges: &[&Range],
    supplies: &[Supply],
    cases: &[RunsOut],
) -> Option<Advice> {
    if !cases.iter().any(|case| case.limit.is_some()) {
        return None;
    }
    let (nodes, pods) = on(question.growth, question, days(question.months));
    let family = ranges.first()?.range.family();
    let space = match family {
        Family::IPv4 => private(family).next()?,
        Family::IPv6 => Block::of(private(family).next()?.network(), IPV6_SITE)?,
    };
    let blocks = choose_prefix(&space, pods)?;
    let per_node = ranges.last()?.per_node;
    let enough = |length: &u8| {
        let number = 1u64.checked_shl(u32::from(blocks - length)).unwrap_or(u64::MAX);
        let range = Range { per_node, ..Range::new(String::new(), space, blocks, Vec::new()) };
        let new = range.supply_of(blocks, number);
        let all: Vec<Supply> = supplies.iter().copied().chain([new]).collect();
        nodes_that_fit(&all, pods) >= nodes.saturating_add(question.resting)
    };
    let (largest, smallest) = match family {
        Family::IPv4 => (8, blocks),
        Family::IPv6 => (24.max(blocks.saturating_sub(24)), blocks.min(IPV6_SITE)),
    };
    let prefix_length = (largest..=smallest).rev().find(enough)?;
    Some(Advice {
        name: free_name(family, question),
        cidr: place(prefix_length, family, ranges, question),
        prefix_length,
        block_prefix_length: blocks,
        blocks_per_node: per_node,
        nodes,
        pods_per_node: pods,
    })
}

impl Advice {
    /// The object, to be applied.
    pub fn yaml(&self) -> Option<String> {
        let cidr = self.cidr?;
        let BlocksPerNode { min, max } = self.blocks_per_node;
        let per_node = match self.blocks_per_node == DEFAULT_BLOCKS_PER_NODE {
            true => String::new(),
            false => format!("  blocksPerNode: {{min: {min}, max: {max}}}\n"),
        };
        Some(format!(
            "apiVersion: plat.network/v1alpha1\nkind: ClusterCIDR\nmetadata:\n  name: {}\nspec:\n  cidr: {cidr}\n  blockPrefixLength: {}\n{per_node}",
            self.name, self.block_prefix_length
        ))
    }
}

fn private(family: Family) -> impl Iterator<Item = Block> {
    PRIVATE.iter().filter_map(|text| text.parse().ok()).filter(move |block: &Block| block.family() == family)
}

fn free_name(family: Family, question: &Question) -> String {
    let stem = match family {
        Family::IPv4 => "pods-v4",
        Family::IPv6 => "pods-v6",
    };
    let is_free = |name: &String| question.ranges.iter().all(|range| range.name != *name);
    (2..).map(|number| format!("{stem}-{number}")).find(is_free).unwrap_or_else(|| stem.to_owned())
}

/// The next free prefix of that length behind the last range, or else anywhere in private addresses: found by
/// the pool that blocks are carved with.
fn place(length: u8, family: Family, ranges: &[&Range], question: &Question) -> Option<Block> {
    let last = ranges.last()?.range;
    let docker = DOCKER_BRIDGE.parse().ok();
    let taken: Vec<Block> = question
        .ranges
        .iter()
        .map(|range| range.range)
        .chain(question.avoid.iter().copied())
        .chain(docker)
        .collect();
    let (mut near, far): (Vec<Block>, Vec<Block>) = private(family).partition(|space| space.covers(&last));
    near.extend(far);
    near.into_iter().find_map(|space| {
        let mut pool = Pool::new(space, length);
        taken.iter().filter(|taken| taken.family() == family).for_each(|taken| pool.take(taken));
        let cursor = space.subblock_index(length, &last).unwrap_or(0);
        pool.block(pool.next_free(cursor)?)
    })
}
