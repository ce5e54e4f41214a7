//! What `topologyKey` makes of a plan. Where a group's next block lies is tested in [`crate::topology`].

use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDRStatus, cluster_cidr::TopologyGroup, names};

use crate::facts::{BlockFact, NodeFact, RangeFact};
use crate::fixtures::{
    NOW, Scene, at, block, created, held_block, labels, node, range, report, scene, spec, steps,
};
use crate::status::writes;
use crate::step::Step;

const ZONE: &str = "topology.kubernetes.io/zone";

fn zoned(cidr: &str) -> RangeFact {
    RangeFact { topology_key: Some(ZONE.into()), ..range("zoned", cidr) }
}

fn in_zone(name: &str, zone: &str) -> NodeFact {
    NodeFact { labels: labels(&[(ZONE, zone), ("other", "x")]), ..node(name) }
}

fn block_in(cidr: &str, node: &str, zone: &str) -> BlockFact {
    let ours = [(names::LABEL_CLUSTER_CIDR, "zoned"), (names::LABEL_NODE, node)];
    let ours: Vec<_> = ours.into_iter().chain((!zone.is_empty()).then_some((ZONE, zone))).collect();
    BlockFact { labels: labels(&ours), ..held_block(cidr, "zoned", node) }
}

fn status(scene: &Scene) -> ClusterCIDRStatus {
    let status = writes(&scene.snapshot(), &scene.plan()).find_map(|write| match write.step {
        Step::RangeStatus { object, new, .. } if &*object.name == "zoned" => Some(*new),
        _ => None,
    });
    status.unwrap_or_else(|| scene.world.ranges["zoned"].status.clone())
}

fn group(
    value: Option<&str>,
    blocks: i64,
    outside: i64,
    prefix_count: i64,
    prefixes: &[&str],
) -> TopologyGroup {
    let prefixes = prefixes.iter().map(|prefix| (*prefix).to_owned()).collect();
    TopologyGroup { value: value.map(Into::into), blocks, outside, prefix_count, prefixes }
}

#[test]
fn the_nodes_of_a_zone_get_blocks_that_one_prefix_names_in_each_family() {
    let scene = scene()
        .range(zoned("10.244.0.0/16"))
        .range(RangeFact { name: "zoned-v6".into(), uid: "u6".into(), ..zoned("fd00:10:244::/48") })
        .node(in_zone("n1", "a"))
        .node(in_zone("n2", "b"))
        .node(in_zone("n3", "a"))
        .node(node("n4"))
        .all_report();
    let plan = scene.plan();
    let blocks: Vec<_> =
        created(&plan).iter().map(|text| text[..text.find(" zoned").unwrap()].to_owned()).collect();
    assert_eq!(
        blocks,
        [
            "n1 10.244.0.0/24",
            "n1 fd00:10:244::/64",
            "n2 10.244.128.0/24",
            "n2 fd00:10:244:8000::/64",
            "n3 10.244.1.0/24",
            "n3 fd00:10:244:1::/64",
            "n4 10.244.192.0/24",
            "n4 fd00:10:244:c000::/64",
        ]
    );
    let after = scene.after(&plan);
    let zone_of = |name: &str| after.world.blocks[name].labels.get(ZONE).map(ToOwned::to_owned);
    assert_eq!((zone_of("10-244-0-0-24").as_deref(), zone_of("10-244-192-0-24")), (Some("a"), None));
    assert!(after.world.blocks.values().all(|block| block.labels.get("other").is_none()));
    assert_eq!(
        status(&after).groups,
        [
            group(None, 1, 0, 1, &["10.244.192.0/24"]),
            group(Some("a"), 2, 0, 1, &["10.244.0.0/23"]),
            group(Some("b"), 1, 0, 1, &["10.244.128.0/24"]),
        ]
    );
    assert_eq!(steps(&after.plan()), [] as [&str; 0]);
}

#[test]
fn a_node_that_its_cloud_has_not_looked_at_waits_a_minute_for_its_zone() {
    let fresh = |age: i64, node: NodeFact| NodeFact { created: at(NOW - age), uninitialized: true, ..node };
    let plan_for = |node: NodeFact| scene().range(zoned("10.244.0.0/16")).node(node).all_report().plan();
    let waits = plan_for(fresh(10, node("n1")));
    assert_eq!((created(&waits).len(), waits.wake_after), (0, Some(std::time::Duration::from_secs(50))));
    assert_eq!(
        (crate::fixtures::faults(&waits), waits.nodes_without_block),
        (vec![], 1),
        "waiting is no fault"
    );
    for carved in [
        fresh(10, in_zone("n1", "a")),
        fresh(60, node("n1")),
        fresh(-3600, node("n1")),
        NodeFact { uninitialized: false, ..fresh(10, node("n1")) },
    ] {
        assert_eq!(created(&plan_for(carved.clone())).len(), 1, "{carved:?}");
    }
    let unkeyed = scene().range(range("plain", "10.244.0.0/16")).node(fresh(10, node("n1"))).all_report();
    assert_eq!(created(&unkeyed.plan()).len(), 1, "no label is looked for");
}

#[test]
fn a_resting_block_keeps_its_place_in_the_zone_of_its_gone_node() {
    let gone = BlockFact {
        state: BlockState::Quarantined,
        release_after: Some(at(NOW + 500)),
        ..block_in("10.244.130.0/24", "gone", "b")
    };
    let scene =
        scene().range(zoned("10.244.0.0/16")).block(gone).node(in_zone("n1", "a")).node(in_zone("n2", "b"));
    assert_eq!(
        created(&scene.all_report().plan()),
        ["n1 10.244.0.0/24 zoned carved", "n2 10.244.131.0/24 zoned carved"]
    );
}

#[test]
fn a_freed_block_of_the_youngest_node_comes_back_last_too() {
    let nodes = ["n1", "n2", "n3"].map(|name| in_zone(name, "a"));
    let scene = nodes.into_iter().fold(scene().range(zoned("10.244.0.0/16")), Scene::node).all_report();
    let plan = scene.plan();
    let mut scene = scene.after(&plan);
    std::sync::Arc::make_mut(&mut scene.world.nodes).remove("n3");
    std::sync::Arc::make_mut(&mut scene.world.blocks).remove("10-244-2-0-24");
    let joins = scene.node(in_zone("n4", "a")).all_report();
    assert_eq!(created(&joins.plan()), ["n4 10.244.3.0/24 zoned carved"]);
    let new_leader = joins.with(|s| s.memory = crate::memory::Memory::new(false));
    assert_eq!(created(&new_leader.plan()), ["n4 10.244.2.0/24 zoned carved"], "after the youngest block");
}

#[test]
fn a_second_block_of_a_node_lies_in_its_zone_too() {
    let scene = scene()
        .range(zoned("10.244.0.0/16"))
        .node(in_zone("n1", "a"))
        .block(block_in("10.244.0.0/24", "n1", "a"))
        .node(in_zone("n2", "b"))
        .block(block_in("10.244.128.0/24", "n2", "b"))
        .report(report("n1", &[("10.244.0.0/24", 250)]))
        .report(report("n2", &[("10.244.128.0/24", 250)]));
    assert_eq!(created(&scene.plan()), ["n1 10.244.1.0/24 zoned carved", "n2 10.244.129.0/24 zoned carved"]);
}

#[test]
fn blocks_stay_where_they_are_when_the_key_comes_later_or_a_nodes_zone_changes() {
    let before = scene()
        .range(range("zoned", "10.244.0.0/16"))
        .node(in_zone("n1", "a"))
        .node(in_zone("n2", "b"))
        .node(in_zone("n3", "a"))
        .block(block_in("10.244.0.0/24", "n1", ""))
        .block(block_in("10.244.1.0/24", "n2", ""))
        .block(block_in("10.244.2.0/24", "n3", ""))
        .all_report();
    assert_eq!((steps(&before.plan()), status(&before).groups), (vec![], vec![]));
    let keyed = before.range(zoned("10.244.0.0/16"));
    assert_eq!(
        status(&keyed).groups,
        [
            group(Some("a"), 2, 1, 2, &["10.244.0.0/24", "10.244.2.0/24"]),
            group(Some("b"), 1, 0, 1, &["10.244.1.0/24"])
        ],
        "known from the nodes before the blocks carry the label"
    );
    let plan = keyed.plan();
    assert_eq!(steps(&plan), ["change_block"; 3], "the labels, and nothing else");
    let labelled = keyed.after(&plan);
    assert_eq!(labelled.world.blocks["10-244-1-0-24"].labels.get(ZONE), Some("b"));

    let moved = labelled.node(in_zone("n3", "b"));
    let plan = moved.plan();
    assert_eq!(steps(&plan), ["change_block"]);
    let moved = moved.after(&plan);
    assert_eq!((&*moved.world.blocks["10-244-2-0-24"].node, steps(&moved.plan())), ("n3", vec![]));
    assert_eq!(
        status(&moved).groups,
        [
            group(Some("a"), 1, 0, 1, &["10.244.0.0/24"]),
            group(Some("b"), 2, 1, 2, &["10.244.1.0/24", "10.244.2.0/24"])
        ]
    );
}

#[test]
fn blocks_that_are_adopted_given_back_or_only_claimed_belong_to_their_nodes_zone() {
    let scene = scene()
        .range(zoned("10.244.0.0/16"))
        .node(NodeFact { pod_cidrs: spec(&["10.244.40.0/24"]), ..in_zone("n1", "a") })
        .node(in_zone("n2", "b"))
        .report(report("n2", &[("10.244.200.0/24", 4)]))
        .node(in_zone("n3", "a"))
        .node(in_zone("n4", "b"))
        .node(in_zone("n5", "c"))
        .all_report();
    assert_eq!(
        created(&scene.plan()),
        [
            "n1 10.244.40.0/24 zoned adopted",
            "n2 10.244.200.0/24 zoned recreated",
            "n3 10.244.41.0/24 zoned carved",
            "n4 10.244.201.0/24 zoned carved",
            "n5 10.244.64.0/24 zoned carved",
        ]
    );
}

#[test]
fn a_zone_takes_a_free_block_anywhere_before_a_node_goes_without() {
    let mut scene =
        scene().range(RangeFact { reserved: [block("10.244.1.0/24")].into(), ..zoned("10.244.0.0/22") });
    for (name, zone) in [("n1", "a"), ("n2", "b"), ("n3", "a"), ("n4", "b")] {
        scene = scene.node(in_zone(name, zone));
    }
    let plan = scene.all_report().plan();
    assert_eq!((created(&plan).len(), plan.ranges["zoned"].free), (3, 0));
}

#[test]
fn the_status_lists_so_many_groups_and_prefixes_and_counts_the_rest() {
    let mut scene = scene().range(zoned("10.244.0.0/16"));
    for index in 0..140 {
        // Racks of one block each, and one rack that is strewn over all of them.
        let rack = if index % 2 == 0 { format!("r{index:03}") } else { "strewn".to_owned() };
        let name = format!("n{index}");
        scene =
            scene.node(in_zone(&name, &rack)).block(block_in(&format!("10.244.{index}.0/24"), &name, &rack));
    }
    let groups = status(&scene).groups;
    assert_eq!(groups.len(), 64);
    assert!(groups.is_sorted_by_key(|group| group.value.clone()));
    let strewn = groups.iter().find(|group| group.value.as_deref() == Some("strewn")).unwrap();
    assert_eq!((strewn.blocks, strewn.outside, strewn.prefix_count, strewn.prefixes.len()), (70, 69, 70, 4));
}

#[test]
fn a_joining_fleet_writes_no_more_range_statuses_for_its_topology() {
    use crate::status::{Class, due};
    // Counters of a range go out together, at most every two seconds, however the groups change.
    let mut scene = scene().range(zoned("10.244.0.0/16")).all_report();
    let (mut written, mut second) = (0, 0);
    for index in 0..100 {
        scene = scene.node(in_zone(&format!("n{index}"), ["a", "b", "c"][index % 3])).all_report();
        let plan = scene.plan();
        let of_range = |write: &crate::status::Write| matches!(write.step, Step::RangeStatus { .. });
        let writes: Vec<_> = writes(&scene.snapshot(), &plan).filter(of_range).collect();
        let first = scene.world.ranges["zoned"].status.blocks.is_none();
        assert!(writes.iter().all(|write| write.class == Class::Counters || first));
        let mut memory = std::mem::replace(&mut scene.memory, crate::memory::Memory::new(false));
        let due = due(writes, &plan, index + 1, &memory, scene.clock);
        for step in due.choose(&mut memory, scene.clock).steps {
            if let Step::RangeStatus { new, .. } = step {
                written += 1;
                scene = scene.range(RangeFact { status: *new, ..zoned("10.244.0.0/16") });
            }
        }
        scene.memory = memory;
        scene = scene.after(&plan);
        if index % 10 == 9 {
            second += 1;
            scene.clock.steady += std::time::Duration::from_secs(1);
        }
    }
    assert!(written <= 1 + second / 2, "{written} in {second} s");
    assert!(written >= 3);
}
