//! How many nodes fit, counted as the operator carves.

use plat_crds::growth::wants_block;

/// What one node holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Pods.
    pub pods: u32,
    /// Blocks of one family that it takes at most.
    pub max_blocks: u32,
}

/// Blocks of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Supply {
    /// Pods that one of them holds.
    pub capacity: u32,
    /// How many there are.
    pub blocks: u64,
}

/// Blocks of that capacity that a node takes until it is full of pods; `None` if they do not fit into as many
/// as it may take.
pub fn blocks_per_node(capacity: u32, load: Load) -> Option<u32> {
    (1..=load.max_blocks.max(1)).find(|blocks| is_served((0..*blocks).map(|_| capacity), load))
}

/// Whether a node with blocks of these capacities, full of pods, asks for no further block: because enough is
/// free, or because it may have no more and its pods fit.
pub fn is_served(blocks: impl Iterator<Item = u32> + Clone, load: Load) -> bool {
    let room: u64 = blocks.clone().map(u64::from).sum();
    let is_last = blocks.clone().count() >= usize::try_from(load.max_blocks.max(1)).unwrap_or(usize::MAX);
    let mut pods = load.pods;
    let filled = blocks.map(|capacity| {
        let used = pods.min(capacity);
        pods -= used;
        (used, capacity)
    });
    room >= u64::from(load.pods) && (is_last || !wants_block(filled))
}

/// Nodes that fit one after the other, each with all blocks that it asks for. The first supply is used up
/// first; a node may have blocks of several.
pub fn nodes_that_fit(supplies: &[Supply], load: Load) -> u64 {
    let most = usize::try_from(load.max_blocks.max(1)).unwrap_or(usize::MAX);
    let mut nodes = 0;
    // Blocks of the node whose turn it is.
    let mut begun: Vec<u32> = Vec::new();
    for Supply { capacity, blocks } in supplies.iter().copied() {
        let mut left = blocks;
        while left > 0 && !begun.is_empty() {
            left -= 1;
            begun.push(capacity);
            let served = is_served(begun.iter().copied(), load);
            nodes += u64::from(served);
            if served || begun.len() >= most {
                begun.clear();
            }
        }
        let each = blocks_per_node(capacity, load);
        let taken = u64::from(each.unwrap_or(load.max_blocks.max(1)));
        if each.is_some() {
            nodes += left / taken;
        }
        begun.extend((0..left % taken).map(|_| capacity));
    }
    nodes
}
