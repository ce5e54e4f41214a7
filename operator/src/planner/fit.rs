//! How many nodes fit, counted as the operator carves.

use plat_crds::growth::wants_block;

/// Blocks of one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Supply {
    /// Pods that one of them holds.
    pub capacity: u32,
    /// How many there are.
    pub blocks: u64,
    /// Blocks that a node has from the start, if this is the first range that it can get one of; `None` if no more
    /// are carved from it.
    pub min: Option<u32>,
    /// A node that has so many blocks gets none of these.
    pub max: u32,
}

/// Blocks of that range alone that a node takes until it is full of pods; `None` if they do not fit into as many
/// as it may take.
pub fn blocks_per_node(supply: Supply, pods: u32) -> Option<u32> {
    let taken = take(&[supply], &[u64::from(supply.max)], pods);
    taken.served.then(|| u32::try_from(taken.of_each.iter().sum::<u64>()).unwrap_or(u32::MAX))
}

/// Whether a node with blocks of these capacities, full of pods, asks for no further block: because enough is
/// free, or because it may have no more and its pods fit.
pub fn is_served(blocks: &[u32], min: u32, is_last: bool, pods: u32) -> bool {
    let room: u64 = blocks.iter().copied().map(u64::from).sum();
    let mut rest = pods;
    let filled = blocks.iter().map(|capacity| {
        let used = rest.min(*capacity);
        rest -= used;
        (used, *capacity)
    });
    let enough = blocks.len() >= usize::try_from(min).unwrap_or(usize::MAX);
    room >= u64::from(pods) && (is_last || (enough && !wants_block(filled)))
}

/// Nodes that fit one after the other, each with all blocks that it asks for. The first supply is used up
/// first; a node may have blocks of several.
pub fn nodes_that_fit(supplies: &[Supply], pods: u32) -> u64 {
    let mut left: Vec<u64> = supplies.iter().map(|supply| supply.blocks).collect();
    let mut nodes: u64 = 0;
    loop {
        let Taken { of_each, served } = take(supplies, &left, pods);
        let takes = || left.iter().zip(&of_each).filter(|(_, taken)| **taken > 0);
        // Each node takes the same until one of the supplies that it takes from ends.
        let Some(alike) = takes().map(|(left, taken)| left / taken).min() else { return nodes };
        left.iter_mut().zip(&of_each).for_each(|(left, taken)| *left -= alike * taken);
        nodes = nodes.saturating_add(if served { alike } else { 0 });
    }
}

/// What one node takes.
struct Taken {
    /// Blocks of each supply.
    of_each: Vec<u64>,
    /// Whether it asks for no more.
    served: bool,
}

fn take(supplies: &[Supply], left: &[u64], pods: u32) -> Taken {
    let min = supplies.iter().find_map(|supply| supply.min).unwrap_or(1);
    let mut of_each = vec![0; supplies.len()];
    let mut held: Vec<u32> = Vec::new();
    loop {
        let allows = |supply: &Supply| held.len() < usize::try_from(supply.max).unwrap_or(usize::MAX);
        let is_last = !supplies.iter().any(allows);
        if !held.is_empty() && is_served(&held, min, is_last, pods) {
            return Taken { of_each, served: true };
        }
        let mut each = supplies.iter().zip(left).zip(&mut of_each);
        let Some(((supply, _), taken)) =
            each.find(|((supply, left), taken)| allows(supply) && **taken < **left)
        else {
            return Taken { of_each, served: false };
        };
        *taken += 1;
        held.push(supply.capacity);
    }
}
