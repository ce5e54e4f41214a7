//! Plans for worlds that make no sense: ranges of both families over and in each other, in use, reserved,
//! drained, deleted, not ready; nodes that name, hold, tell of and lost blocks of any size; addresses of the
//! cluster in the midst. Whatever is there: nothing is given twice, and nothing free is refused.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use plat_crds::cluster_cidr::Allocation;
use plat_crds::pod_cidr::BlockState;
use plat_crds::{Block, Family};
use proptest::prelude::*;

use super::Plan;
use crate::facts::{Lost, NodeFact, PodCidrText, RangeFact, ReportFact};
use crate::fixtures::{NOW, Scene, at, held_block, labels, node, range, report, scene, selector};
use crate::memory::{Memory, Pending, Vanished};
use crate::reason;
use crate::snapshot::Foreign;
use crate::step::{NewBlock, Origin, Step};

const NODES: u8 = 12;

/// A block somewhere in or around what ranges are made of, of any size.
fn any_block(lengths: std::ops::RangeInclusive<u8>) -> impl Strategy<Value = Block> {
    (any::<bool>(), 0u32..0x2000, lengths).prop_map(|(v4, at, length)| {
        if v4 {
            Block::of(IpAddr::V4((0x0af4_0000 + at).into()), length).unwrap()
        } else {
            let base = u128::from("fd00::".parse::<std::net::Ipv6Addr>().unwrap());
            // The same tree of lengths, 32 bits further down.
            Block::of(IpAddr::V6((base + (u128::from(at) << 64)).into()), length + 32).unwrap()
        }
    })
}

fn any_node_name() -> impl Strategy<Value = String> {
    (0..NODES).prop_map(|index| format!("n{index}"))
}

prop_compose! {
    fn any_range()(
        index in 0u8..5,
        cidr in any_block(18..=26),
        longer in 0u8..5,
        reserved in prop::collection::vec(any_block(22..=30), 0..3),
        (priority, age) in (0i32..3, 0i64..3),
        (allocation, deleting, ready, selective) in (0u8..6, prop::bool::weighted(0.1), prop::bool::weighted(0.9), prop::bool::weighted(0.3)),
        (cursor, topology) in (-1i64..80, any::<bool>()),
    ) -> RangeFact {
        let name = format!("r{index}");
        let mut fact = range(&name, &cidr.to_string());
        // Blocks larger than the range, which an API server would refuse, too.
        fact.block_prefix = Some(cidr.prefix_length() + longer - 1);
        fact.reserved = reserved.into_iter().collect();
        (fact.priority, fact.created, fact.deleting) = (priority, at(NOW - 1000 + age), deleting);
        fact.allocation = [Allocation::Draining, Allocation::Unknown, Allocation::Enabled][usize::from(allocation.min(2))];
        if selective {
            fact.selector = selector("edge", "1");
        }
        if !ready {
            fact.status = Default::default();
        }
        fact.status.cursor = Some(cursor);
        fact.topology_key = topology.then(|| "zone".into());
        fact
    }
}

prop_compose! {
    fn any_node()(
        name in any_node_name(),
        age in 0i64..4,
        (edge, zone) in (any::<bool>(), 0u8..4),
        spec in prop::collection::vec(any_block(20..=28), 0..3),
        addresses in prop::collection::vec(any_block(32..=32), 0..2),
        broken in prop::bool::weighted(0.05),
    ) -> NodeFact {
        let zones = ["", "a", "b", "c"];
        let mut pairs = vec![("zone", zones[usize::from(zone)])];
        pairs.retain(|(_, value)| !value.is_empty());
        if edge {
            pairs.push(("edge", "1"));
        }
        NodeFact {
            created: at(NOW - 1000 + age),
            labels: labels(&pairs),
            pod_cidrs: spec.into_iter().map(PodCidrText::Block).collect(),
            // Mostly elsewhere; now and then in the midst of a range.
            addresses: addresses.iter().map(|block| block.network()).collect(),
            problem: broken.then(|| "?".into()),
            ..node(&name)
        }
    }
}

prop_compose! {
    fn any_report()(
        name in any_node_name(),
        held in prop::collection::vec((any_block(16..=28), 0i64..3), 0..3),
        lost in prop::collection::vec((any_block(20..=28), any_node_name()), 0..3),
    ) -> ReportFact {
        let blocks = lost.into_iter().map(|(block, node)| (block, node.as_str().into())).collect();
        let mut fact = report(&name, &[]);
        fact.held = held.iter().map(|(block, used)| crate::facts::Held { block: *block, used: Some(*used) }).collect();
        ReportFact { lost: Lost { blocks, is_cut: false }, ..fact }
    }
}

/// Blocks of one range each, of its size, none over another: as the API server and finalizers leave them.
fn any_held() -> impl Strategy<Value = Vec<(u8, u64, String, u8)>> {
    prop::collection::vec((0u8..5, 0u64..16, any_node_name(), 0u8..5), 0..12)
}

prop_compose! {
    fn wild()(
        ranges in prop::collection::vec(any_range(), 1..5),
        nodes in prop::collection::vec(any_node(), 0..16),
        held in any_held(),
        reports in prop::collection::vec(any_report(), 0..6),
        pending in prop::collection::vec((0u8..5, 0u64..16, any_node_name()), 0..3),
        vanished in prop::collection::vec((any_block(20..=28), any_node_name()), 0..3),
        services in prop::option::weighted(0.3, any_block(24..=30)),
        full in prop_oneof![Just(0), any::<u16>(), Just(u16::MAX)],
    ) -> Scene {
        let mut scene = scene().with(|s| s.settings.default_ranges.clear());
        scene = ranges.into_iter().fold(scene, Scene::range);
        scene = nodes.into_iter().fold(scene, Scene::node);
        scene = reports.into_iter().fold(scene, Scene::report);
        scene.world.foreign = Foreign { services: services.into_iter().collect(), api_server: vec![] }.into();
        let sub = |scene: &Scene, range: u8, index: u64| {
            let fact = scene.world.ranges.get(format!("r{range}").as_str())?;
            let (whole, prefix) = (fact.range?, fact.block_prefix?);
            whole.subblock(prefix, index % whole.subblock_count(prefix).max(1))
        };
        for (range, index, node, state) in held {
            let Some(block) = sub(&scene, range, index) else { continue };
            if scene.world.blocks.values().any(|other| other.block.overlaps(&block)) {
                continue;
            }
            let mut fact = held_block(&block.to_string(), &format!("r{range}"), &node);
            fact.state = match state {
                0..=2 => BlockState::Active,
                3 => BlockState::Draining,
                _ => BlockState::Quarantined,
            };
            fact.problem = (index == 15).then(|| "?".into());
            scene = scene.block(fact);
        }
        for (range, index, node) in pending {
            let Some(block) = sub(&scene, range, index) else { continue };
            let exists = scene.world.blocks.contains_key(block.object_name().as_str());
            if !exists {
                let (node, range) = (node.as_str().into(), format!("r{range}").as_str().into());
                scene.memory.pending.insert(block, Pending { node, range, until: Duration::from_secs(99_999) });
            }
        }
        for (block, node) in vanished {
            if !scene.world.blocks.contains_key(block.object_name().as_str()) {
                let (node, range) = (node.as_str().into(), "r0".into());
                scene.memory.vanished.insert(block, Vanished { node, range, until: Duration::from_secs(99_999) });
            }
        }
        // Some nodes have used their blocks up and need one more.
        let blocks = scene.world.blocks.clone();
        for (index, fact) in blocks.values().enumerate().filter(|(index, _)| full >> (index % 16) & 1 == 1) {
            let used = Some(i64::from(fact.block.capacity()));
            let known = scene.world.reports.get(&fact.node).map(|report| (**report).clone());
            let mut told = known.unwrap_or_else(|| report(&fact.node, &[]));
            told.held = told.held.iter().copied().chain([crate::facts::Held { block: fact.block, used }]).collect();
            scene = scene.report(told);
            assert!(index < 16, "no more blocks than bits");
        }
        let (reports, blocks, clock) = (scene.world.reports.clone(), scene.world.blocks.clone(), scene.clock);
        scene.memory.observe_losses(&reports, &blocks, |_| Duration::from_secs(900), clock);
        scene.all_report()
    }
}

fn new_blocks(plan: &Plan) -> Vec<&NewBlock> {
    let new = plan.steps.iter().filter_map(|step| match step {
        Step::CreateBlock(new) => Some(new),
        _ => None,
    });
    new.collect()
}

/// Everything that somebody claims, block by block, with who: a second, slower opinion than [`crate::claims`].
fn claimed(scene: &Scene) -> Vec<(Block, Option<String>, &'static str)> {
    let world = &scene.world;
    let mut claimed = Vec::new();
    let of = |node: &str| Some(node.to_owned());
    claimed.extend(world.blocks.values().map(|b| (b.block, of(&b.node), "exists")));
    claimed.extend(scene.memory.pending.iter().map(|(block, p)| (*block, of(&p.node), "pending")));
    claimed.extend(scene.memory.vanished.iter().map(|(block, v)| (*block, of(&v.node), "vanished")));
    let prefixes = |family: Family| {
        let of_family = world.ranges.values().filter(move |r| r.range.is_some_and(|r| r.family() == family));
        of_family.filter_map(|r| r.block_prefix).min()
    };
    let not_too_large = |block: &Block| prefixes(block.family()).is_none_or(|p| block.prefix_length() >= p);
    for report in world.reports.values() {
        let held = report.held.iter().map(|held| (held.block, of(&report.name), "held"));
        claimed.extend(held.filter(|(block, ..)| not_too_large(block)));
    }
    let told = scene.memory.told(scene.clock).map(|(block, node)| (*block, of(node), "told"));
    claimed.extend(told.filter(|(block, ..)| not_too_large(block)));
    for node in world.nodes.values() {
        claimed.extend(node.spec_blocks().map(|block| (block, of(&node.name), "spec")));
        let single = |address: &IpAddr| Block::of(*address, Family::of(address).bits()).unwrap();
        claimed.extend(node.addresses.iter().map(|address| (single(address), None, "address")));
    }
    claimed.extend(world.foreign.services.iter().map(|services| (*services, None, "services")));
    claimed
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_given_that_anybody_else_claims(scene in wild()) {
        let plan = scene.plan();
        let claimed = claimed(&scene);
        let new = new_blocks(&plan);
        for (i, new_block) in new.iter().enumerate() {
            let (block, node) = (new_block.block, &*new_block.node);
            for other in &new[i + 1..] {
                prop_assert!(!other.block.overlaps(&block), "{block} of {node} and {} of {}", other.block, other.node);
            }
            let range = &scene.world.ranges[&new_block.range];
            let outlook = &plan.ranges[&new_block.range];
            prop_assert!(range.range.unwrap().covers(&block));
            prop_assert_eq!(range.block_prefix, Some(block.prefix_length()));
            let repeated = scene.memory.pending.get(&block).is_some_and(|pending| *pending.node == *node);
            prop_assert!(outlook.judgement.is_good() || repeated);
            if new_block.origin != Origin::Recreated && !repeated {
                prop_assert!(range.allocation == Allocation::Enabled && !range.deleting);
                prop_assert!(range.reserved.iter().all(|reserved| !reserved.overlaps(&block)), "{block} is reserved");
                prop_assert!(range.selector.matches(&scene.world.nodes[node].labels));
            }
            for (claim, by, what) in claimed.iter().filter(|(claim, ..)| claim.overlaps(&block)) {
                let own = by.as_deref() == Some(node);
                let fits = match new_block.origin {
                    // A repeated create is of its own node alone.
                    Origin::Carved if repeated => own,
                    Origin::Carved => false,
                    Origin::Adopted => if own { !["exists", "pending"].contains(what) } else { *what == "spec" },
                    Origin::Recreated => if own { !["exists", "pending"].contains(what) } else { ["spec", "told", "held", "vanished"].contains(what) },
                };
                prop_assert!(fits, "{block} for {node} ({:?}), but {claim} {what} by {by:?}", new_block.origin);
            }
        }
    }

    #[test]
    fn no_free_block_is_refused(scene in wild()) {
        let plan = scene.plan();
        let mut taken: Vec<Block> = claimed(&scene).into_iter().map(|(block, ..)| block).collect();
        taken.extend(new_blocks(&plan).iter().map(|new| new.block));
        let without: BTreeSet<_> = plan.faults.iter().filter(|f| f.reason == reason::RANGE_EXHAUSTED).map(|f| &*f.object.name).collect();
        for range in scene.world.ranges.values() {
            let (Some(whole), Some(prefix)) = (range.range, range.block_prefix) else { continue };
            let blocks = (0..whole.subblock_count(prefix)).filter_map(|index| whole.subblock(prefix, index));
            let free = blocks.filter(|block| !taken.iter().chain(&range.reserved).any(|other| other.overlaps(block)));
            let free = free.count() as u64;
            let outlook = &plan.ranges[&range.name];
            prop_assert_eq!(outlook.free, free, "{}", range.name);
            let serves = outlook.judgement.is_good() && range.allocation == Allocation::Enabled && !range.deleting;
            let serves = serves && plat_crds::condition::is_true(&range.status.conditions, plat_crds::condition::READY);
            for node in scene.world.nodes.values().filter(|node| serves && free > 0 && without.contains(&*node.name)) {
                let family_lacks = plan.faults.iter().any(|fault| {
                    fault.object.name == node.name && fault.reason == reason::RANGE_EXHAUSTED && fault.message.contains(&format!("no {} block", whole.family()))
                });
                prop_assert!(!(family_lacks && range.selector.matches(&node.labels)), "{} has {free} free blocks, but {} goes without", range.name, node.name);
            }
        }
    }

    #[test]
    fn a_wild_world_comes_to_rest_and_stays_there_with_another_leader(scene in wild()) {
        let mut scene = scene;
        for _ in 0..5 {
            let plan = scene.plan();
            scene = scene.after(&plan);
        }
        let creates = |scene: &Scene| new_blocks(&scene.plan()).len();
        prop_assert_eq!(creates(&scene), 0, "{:?}", scene.plan().steps);
        // Blocks that only the former leader knew to be taken are another matter.
        let memory = std::mem::replace(&mut scene.memory, Memory::new(false));
        if memory.pending.is_empty() && memory.vanished.is_empty() && memory.told.is_empty() {
            prop_assert_eq!(creates(&scene), 0, "{:?}", scene.plan().steps);
        }
    }
}

#[test]
fn a_wild_world_is_not_an_empty_one() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut origins = BTreeSet::new();
    let mut families = BTreeSet::new();
    let mut grown = 0;
    for _ in 0..1000 {
        let scene = wild().new_tree(&mut runner).unwrap().current();
        for new in new_blocks(&scene.plan()) {
            grown += usize::from(scene.world.blocks.values().any(|block| block.node == new.node));
            origins.insert(format!("{:?}", new.origin));
            families.insert(new.block.family());
        }
    }
    assert_eq!((origins.len(), families.len()), (3, 2), "{origins:?} {families:?}");
    assert!(grown > 10, "{grown} further blocks");
}
