//! Blocks that share addresses. The operator never makes them; an agent that sees some programs the older.

use std::collections::{BTreeMap, BTreeSet};

use plat_crds::block::Block;

use crate::facts::{BlockFact, Fault, Reason};

/// The blocks in order of age that share no address with an older one, and a fault for each other one.
/// Of two of one age the name decides, so that all nodes decide alike. Those in `absent`, which are
/// believed in though no object says so any more, come last and silently.
pub fn older_first<'a>(
    blocks: &'a BTreeMap<String, BlockFact>,
    absent: &BTreeSet<String>,
) -> (Vec<&'a BlockFact>, Vec<Fault>) {
    let mut by_age: Vec<(bool, &BlockFact)> =
        blocks.values().map(|fact| (absent.contains(&fact.name), fact)).collect();
    by_age.sort_by(|(a_absent, a), (b_absent, b)| {
        (a_absent, a.created, &a.name).cmp(&(b_absent, b.created, &b.name))
    });

    // Accepted blocks are disjoint, so only a block's neighbours by network address can overlap it.
    let mut accepted: BTreeMap<Block, &BlockFact> = BTreeMap::new();
    let mut kept = Vec::with_capacity(by_age.len());
    let mut faults = Vec::new();
    for (is_absent, fact) in by_age {
        let before = accepted.range(..=fact.block).next_back();
        let after = accepted.range(fact.block..).next();
        match before.into_iter().chain(after).find(|(block, _)| block.overlaps(&fact.block)) {
            None => {
                accepted.insert(fact.block, fact);
                kept.push(fact);
            }
            Some(_) if is_absent => {}
            Some((_, older)) => faults.push(Fault::block(
                &fact.name,
                Reason::Overlapping,
                format!(
                    "PodCIDR '{}' of node {} shares addresses with the older '{}' of node {} and is not programmed; delete one of them",
                    fact.name, fact.node, older.name, older.node
                ),
            )),
        }
    }
    (kept, faults)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;
    use proptest::prelude::*;

    fn fact(block: Block, created: i64) -> BlockFact {
        BlockFact { name: block.object_name(), created, block, ..fixtures::block(1) }
    }

    #[test]
    fn a_block_that_is_only_remembered_yields_to_any_that_is_there() {
        let (old, new) =
            (fact("10.244.0.0/23".parse().unwrap(), 1), fact("10.244.1.0/24".parse().unwrap(), 2));
        let facts: BTreeMap<_, _> = [old.clone(), new.clone()].map(|f| (f.name.clone(), f)).into();
        let (kept, faults) = older_first(&facts, &[old.name].into());
        assert_eq!((kept, faults), (vec![&new], vec![]));
    }

    proptest! {
        #[test]
        fn what_is_kept_is_disjoint_and_what_is_not_overlaps_something_older(
            blocks in prop::collection::vec((0u32..4096, 20u8..=32, 0i64..5), 0..40),
        ) {
            let facts: BTreeMap<String, BlockFact> = blocks
                .into_iter()
                .map(|(n, length, age)| {
                    let f = fact(Block::of(std::net::Ipv4Addr::from(0x0af4_0000 + n).into(), length).unwrap(), age);
                    (f.name.clone(), f)
                })
                .collect();
            let (kept, faults) = older_first(&facts, &BTreeSet::new());
            prop_assert_eq!(kept.len() + faults.len(), facts.len());
            for (i, a) in kept.iter().enumerate() {
                prop_assert!(kept[i + 1..].iter().all(|b| !a.block.overlaps(&b.block)));
            }
            for fault in faults {
                let lost = &facts[&fault.name];
                prop_assert!(kept.iter().any(|k| k.block.overlaps(&lost.block)
                    && (k.created, &k.name) < (lost.created, &lost.name)));
            }
        }
    }
}
