//! What the plan does, case by case, and what holds for every plan.

use std::collections::BTreeSet;
use std::time::Duration;

use plat_crds::Block;
use plat_crds::cluster_cidr::{Allocation, BlockSizing};
use plat_crds::pod_cidr::BlockState;
use proptest::prelude::*;

use crate::facts::{BlockFact, Health, NodeFact, PodCidrText, PolicyFact, RangeFact, ReportFact};
use crate::fixtures::{
    NOW, Scene, at, block, created, digest_of, faults, held_block, labels, node, policy, range, report,
    scene, selector, spec, steps,
};
use crate::memory::{Memory, Pending, Vanished};
use crate::plan::Plan;
use crate::reason;
use crate::snapshot::{DefaultRange, Source, Start, Tenure};
use crate::step::{BlockChange, Kind, Step, Why};

const V4: &str = "10.244.0.0/16";
const V6: &str = "fd00:10:244::/48";

fn with_v4() -> Scene {
    scene().range(range("default-v4", V4))
}

// ---- ranges ----

#[test]
fn the_default_range_is_created_only_where_no_range_of_its_family_exists() {
    let none = scene().plan();
    assert!(
        matches!(&none.steps[..], [Step::CreateRange { name, range, block_prefix: Some(24), .. }] if &**name == "default-v4" && *range == block(V4))
    );
    let other_family = scene().range(range("mine", V6)).plan();
    assert_eq!(steps(&other_family), ["create_range"]);
    for existing in [
        range("mine", "10.9.0.0/16"),
        RangeFact { range: None, problem: Some("?".into()), ..range("odd", V4) },
        RangeFact { deleting: true, ..range("old", "10.9.0.0/16") },
    ] {
        let plan = scene().range(existing).plan();
        assert!(!steps(&plan).contains(&"create_range"), "{:?}", plan.steps);
    }
}

#[test]
fn the_default_range_is_created_on_live_lists_only() {
    let plan = scene().with(|s| s.source = Source::Cache).plan();
    assert_eq!((plan.steps.len(), plan.wants_live), (0, true));
}

#[test]
fn a_flag_that_differs_from_the_default_range_is_named_and_ignored() {
    let plan = scene().range(range("default-v4", "10.9.0.0/16")).plan();
    assert_eq!((steps(&plan), faults(&plan)), (vec![], vec![format!("default-v4 {}", reason::FLAG_IGNORED)]));
}

#[test]
fn a_users_range_gets_the_finalizer_and_its_block_size_before_blocks() {
    let bare =
        RangeFact { finalizers: ["other/x".to_owned()].into(), block_prefix: None, ..range("mine", V4) };
    let plan = scene().range(bare).nodes(&["n1"]).all_report().plan();
    let [Step::PrepareRange { finalizers, block_size: Some(size), .. }] = &plan.steps[..] else {
        panic!("{:?}", plan.steps)
    };
    assert_eq!((finalizers.len(), size.prefix), (2, 24));
}

#[test]
fn a_range_sized_by_its_nodes_waits_for_the_first_and_is_held_meanwhile() {
    let bare = || RangeFact {
        block_prefix: None,
        block_sizing: BlockSizing::MaxPods,
        finalizers: [].into(),
        status: Default::default(),
        ..range("mine", V4)
    };
    let sizes = |plan: &Plan| -> Vec<Option<u8>> {
        let prepared = plan.steps.iter().filter_map(|step| match step {
            Step::PrepareRange { block_size, .. } => Some(block_size.as_ref().map(|size| size.prefix)),
            _ => None,
        });
        prepared.collect()
    };
    let alone = scene().range(bare()).plan();
    assert_eq!(sizes(&alone), [None], "the finalizer comes first");
    let judged = &alone.ranges["mine"];
    assert_eq!(
        (judged.judgement.ready.status, judged.judgement.ready.reason),
        (Some(false), reason::WAITING_FOR_NODE)
    );
    assert_eq!(judged.total, 0, "it has no blocks yet");

    let held = || RangeFact { finalizers: range("r", V4).finalizers, ..bare() };
    assert_eq!(sizes(&scene().range(held()).plan()), [], "there is nothing to write");
    let silent = NodeFact { max_pods: None, created: at(NOW - 20), ..node("n1") };
    let waiting = scene().range(held()).node(silent).all_report().plan();
    assert_eq!((sizes(&waiting), waiting.wake_after), (vec![], Some(Duration::from_secs(40))));
    let told = scene().range(held()).node(NodeFact { max_pods: Some(32), ..node("n1") }).all_report().plan();
    assert_eq!(sizes(&told), [Some(26)]);
    assert!(told.ranges["mine"].judgement.is_good());

    let beside = RangeFact { selector: selector("pool", "none"), ..held() };
    let plan = scene().range(beside).range(range("other", "10.9.0.0/16")).nodes(&["n1"]).all_report().plan();
    assert_eq!(created(&plan), ["n1 10.9.0.0/24 other carved"], "it is in nobody's way");
}

#[test]
fn a_default_range_may_be_sized_by_its_nodes_too() {
    let by_nodes = || {
        scene().with(|s| {
            s.settings.default_ranges = vec![DefaultRange { range: block(V4), block_prefix: None }];
        })
    };
    assert!(matches!(by_nodes().plan().steps[..], [Step::CreateRange { block_prefix: None, .. }]));
    let sized =
        RangeFact { block_sizing: BlockSizing::MaxPods, block_prefix: Some(26), ..range("default-v4", V4) };
    assert_eq!(faults(&by_nodes().range(sized).plan()), [] as [&str; 0]);
    let fixed = by_nodes().range(range("default-v4", V4)).plan();
    assert_eq!(faults(&fixed), [format!("default-v4 {}", reason::FLAG_IGNORED)]);
}

#[test]
fn a_deleted_range_is_let_go_after_its_last_block() {
    let deleted = || {
        scene().range(range("other", "10.9.0.0/16")).range(RangeFact { deleting: true, ..range("old", V4) })
    };
    assert_eq!(steps(&deleted().plan()), ["release_range"]);
    assert!(deleted().with(|s| s.source = Source::Cache).plan().wants_live);
    let used = deleted().node(node("n1")).block(held_block("10.244.1.0/24", "old", "n1")).all_report().plan();
    assert!(!steps(&used).contains(&"release_range"));
    let pending = Pending { node: "n1".into(), range: "old".into(), until: Duration::from_secs(9999) };
    let unknown = deleted().with(|s| {
        s.memory.pending.insert(block("10.244.1.0/24"), pending);
    });
    assert_eq!(steps(&unknown.plan()), [] as [&str; 0]);
}

#[test]
fn cleanup_takes_our_finalizer_off_and_does_nothing_else() {
    let scene = with_v4().nodes(&["n1", "n2"]).with(|s| s.settings.cleanup = true);
    let plan = scene.plan();
    assert_eq!(steps(&plan), ["release_range"]);
    assert_eq!(plan.steps.len(), 1);
}

#[test]
fn the_older_range_wins_then_the_name_and_nothing_is_carved_from_the_other() {
    let younger = RangeFact { created: at(NOW - 10), ..range("a-second", "10.0.0.0/8") };
    let plan = with_v4().range(younger).nodes(&["n1"]).all_report().plan();
    assert_eq!(created(&plan), ["n1 10.244.0.0/24 default-v4 carved"]);
    let refused = &plan.ranges["a-second"].judgement;
    assert_eq!((refused.ready.status, refused.ready.reason), (Some(false), reason::OVERLAPS_CLUSTER_CIDR));
    assert_eq!(refused.overlapping.status, Some(true));
    assert!(refused.ready.message.contains("default-v4 (10.244.0.0/16)"), "{}", refused.ready.message);
    assert!(plan.ranges["default-v4"].judgement.is_good());

    let new = |name: &str, cidr: &str| RangeFact { status: Default::default(), ..range(name, cidr) };
    let twins = scene().range(new("b", "10.244.0.0/16")).range(new("a", "10.244.0.0/20")).plan();
    assert!(twins.ranges["a"].judgement.is_good() && !twins.ranges["b"].judgement.is_good());
    let in_use = scene().range(range("b", "10.244.0.0/16")).range(new("a", "10.244.0.0/20")).plan();
    assert!(in_use.ranges["b"].judgement.is_good() && !in_use.ranges["a"].judgement.is_good());
}

#[test]
fn a_new_range_over_services_nodes_or_the_api_server_is_refused_by_name() {
    let base = || {
        scene()
            .foreign(&["10.96.0.0/16"], &["10.77.0.1"])
            .node(NodeFact { addresses: ["10.50.0.7".parse().unwrap()].into(), ..node("n1") })
    };
    for (cidr, expected, words) in [
        ("10.96.0.0/12", reason::OVERLAPS_SERVICES, "10.96.0.0/16"),
        ("10.77.0.0/16", reason::OVERLAPS_API_SERVER, "10.77.0.1"),
        ("10.48.0.0/12", reason::OVERLAPS_NODE, "10.50.0.7, the address of node n1"),
        ("10.0.0.0/8", reason::OVERLAPS_SERVICES, "10.96.0.0/16"),
    ] {
        let plan = base().range(range("bad", cidr)).all_report().plan();
        let judgement = &plan.ranges["bad"].judgement;
        assert_eq!((judgement.ready.status, judgement.ready.reason), (Some(false), expected), "{cidr}");
        assert!(judgement.ready.message.contains(words), "{}", judgement.ready.message);
        assert_eq!(created(&plan), [] as [&str; 0]);
        assert_eq!(faults(&plan), [format!("n1 {}", reason::RANGE_NOT_READY)]);
    }
    assert!(base().range(range("good", "10.128.0.0/16")).plan().ranges["good"].judgement.is_good());
}

#[test]
fn a_range_in_use_stays_in_use_but_never_gives_out_a_foreign_address() {
    let intruder = NodeFact { addresses: ["10.244.1.7".parse().unwrap()].into(), ..node("n2") };
    let scene =
        with_v4().node(node("n1")).block(held_block("10.244.0.0/24", "default-v4", "n1")).node(intruder);
    let plan = scene.all_report().plan();
    let judgement = &plan.ranges["default-v4"].judgement;
    assert!(judgement.is_good());
    assert_eq!(judgement.overlapping.reason, reason::OVERLAPS_NODE);
    assert_eq!(created(&plan), ["n2 10.244.2.0/24 default-v4 carved"]);
}

#[test]
fn an_unreadable_range_keeps_new_ranges_from_becoming_ready_but_not_old_ones() {
    let odd = RangeFact { range: None, problem: Some("new field".into()), ..range("odd", V4) };
    let fresh = RangeFact { status: Default::default(), ..range("fresh", "10.9.0.0/16") };
    let plan = with_v4().range(odd).range(fresh).plan();
    assert!(plan.ranges["default-v4"].judgement.is_good());
    assert_eq!(plan.ranges["fresh"].judgement.ready.reason, reason::OTHER_UNREADABLE);
    assert_eq!(plan.ranges["odd"].judgement.ready.reason, reason::INVALID_SPEC);
    assert!(faults(&plan).contains(&format!("odd {}", reason::UNREADABLE)));
}

#[test]
fn a_range_is_carved_only_once_ready_true_has_stood() {
    let mut young = range("default-v4", V4);
    young.status.conditions[0].last_transition_time.0 = at(NOW - 5);
    let scene = scene().range(young.clone()).nodes(&["n1"]).all_report();
    let scene = scene.with(|s| s.settings.report_wait = Duration::ZERO);
    let tenure = |held: u64, start| Tenure { held_for: Duration::from_secs(held), start };
    for (fresh, tenure, carves, wakes) in [
        (false, tenure(3600, Start::Expired), true, None),
        (false, tenure(15, Start::Expired), true, None),
        (false, tenure(0, Start::HandedOver), true, None),
        (true, tenure(0, Start::First), true, None),
        (false, tenure(0, Start::First), false, Some(11)),
        (true, tenure(0, Start::Expired), false, Some(11)),
        (false, tenure(9, Start::Expired), false, Some(6)),
    ] {
        let plan = scene.clone().with(|s| (s.memory, s.tenure) = (Memory::new(fresh), tenure)).plan();
        assert_eq!(created(&plan).len(), usize::from(carves), "{fresh} {tenure:?}");
        if let Some(seconds) = wakes {
            assert_eq!(plan.wake_after, Some(Duration::from_secs(seconds)), "{tenure:?}");
        }
        assert_eq!(faults(&plan), [] as [&str; 0], "waiting is no fault");
    }
    young.status = Default::default();
    let unwritten = scene.range(young).plan();
    assert_eq!(created(&unwritten), [] as [&str; 0]);
}

// ---- carving ----

#[test]
fn every_node_gets_one_block_per_family_of_the_ranges_that_select_it() {
    let edge = RangeFact { selector: selector("edge", "1"), ..range("edge-v6", V6) };
    let plan = with_v4()
        .range(edge)
        .nodes(&["n1", "n2"])
        .node(NodeFact { labels: labels(&[("edge", "1"), ("x", "y")]), ..node("n3") })
        .all_report()
        .plan();
    assert_eq!(
        created(&plan),
        [
            "n1 10.244.0.0/24 default-v4 carved",
            "n2 10.244.1.0/24 default-v4 carved",
            "n3 10.244.2.0/24 default-v4 carved",
            "n3 fd00:10:244::/64 edge-v6 carved",
        ]
    );
    let Some(Step::CreateBlock(new)) =
        plan.steps.iter().find(|s| matches!(s, Step::CreateBlock(new) if &*new.node == "n3"))
    else {
        panic!()
    };
    assert!(new.labels.contains(&("edge".to_owned(), "1".to_owned())), "selectors name this label");
    assert!(!new.labels.iter().any(|(key, _)| key == "x"));
}

#[test]
fn the_highest_priority_with_a_free_block_wins_then_the_name() {
    let full =
        RangeFact { priority: 9, reserved: [block("10.1.0.0/24")].into(), ..range("full", "10.1.0.0/24") };
    let scene = scene()
        .range(full)
        .range(RangeFact { priority: 5, ..range("b", "10.2.0.0/16") })
        .range(RangeFact { priority: 5, ..range("a", "10.3.0.0/16") })
        .range(range("z", "10.4.0.0/16"));
    assert_eq!(created(&scene.nodes(&["n1"]).all_report().plan()), ["n1 10.3.0.0/24 a carved"]);
}

#[test]
fn a_freed_block_comes_back_last() {
    let mut full = range("default-v4", "10.244.0.0/22");
    full.status.cursor = Some(3);
    let scene = scene()
        .range(full)
        .nodes(&["n1", "n2"])
        .block(held_block("10.244.1.0/24", "default-v4", "n1"))
        .all_report();
    let plan = scene.plan();
    assert_eq!(created(&plan), ["n2 10.244.3.0/24 default-v4 carved"]);
    assert_eq!(plan.ranges["default-v4"].cursor, 0, "the cursor goes round");
}

#[test]
fn a_full_range_is_a_fault_of_the_nodes_that_get_nothing_and_of_nobody_else() {
    let scene = scene()
        .range(range("tiny", "10.244.0.0/23"))
        .nodes(&["n1", "n2", "n3"])
        .range(range("v6", V6))
        .all_report();
    let plan = scene.plan();
    assert_eq!(created(&plan).len(), 5, "two of IPv4, three of IPv6");
    assert_eq!(faults(&plan), [format!("n3 {}", reason::RANGE_EXHAUSTED)]);
    assert_eq!((plan.ranges["tiny"].free, plan.nodes_without_block), (0, 3));
}

#[test]
fn reserved_parts_and_draining_ranges_are_not_carved() {
    let reserved = RangeFact {
        reserved: [block("10.244.0.0/23"), block("10.244.2.7/32")].into(),
        ..range("default-v4", V4)
    };
    assert_eq!(
        created(&scene().range(reserved).nodes(&["n1"]).all_report().plan()),
        ["n1 10.244.3.0/24 default-v4 carved"]
    );
    for allocation in [Allocation::Draining, Allocation::Unknown] {
        let plan = scene()
            .range(RangeFact { allocation, ..range("default-v4", V4) })
            .nodes(&["n1"])
            .all_report()
            .plan();
        assert_eq!(
            (created(&plan).len(), faults(&plan)),
            (0, vec![format!("n1 {}", reason::RANGE_NOT_READY)])
        );
        assert!(plan.ranges["default-v4"].judgement.is_good(), "draining is no error");
    }
}

#[test]
fn nothing_that_anybody_claims_is_carved() {
    let scene = scene()
        .range(range("default-v4", "10.244.0.0/21"))
        .nodes(&["n1"])
        .node(NodeFact { pod_cidrs: spec(&["10.244.1.0/24"]), ..node("n2") })
        .block(held_block("10.244.1.0/24", "default-v4", "n2"))
        .node(NodeFact { pod_cidrs: spec(&["10.244.0.128/25"]), ..node("n3") })
        .block(held_block("10.244.7.0/24", "default-v4", "n3"))
        .report(report("n2", &[("10.244.2.0/24", 1)]))
        .report(report("gone", &[("10.244.3.0/24", 1)]))
        .with(|s| {
            let (node, range, until) = ("x".into(), "default-v4".into(), Duration::from_secs(9999));
            s.memory.pending.insert(block("10.244.4.0/24"), Pending { node, range, until });
            let (node, range) = ("y".into(), "default-v4".into());
            s.memory.vanished.insert(block("10.244.5.0/24"), Vanished { node, range, until });
        })
        .all_report();
    let own_lost_block = "n2 10.244.2.0/24 default-v4 recreated".to_owned();
    assert_eq!(created(&scene.plan()), ["n1 10.244.6.0/24 default-v4 carved".to_owned(), own_lost_block]);
}

#[test]
fn a_report_cannot_claim_more_than_a_block_at_a_stroke() {
    let scene = with_v4()
        .nodes(&["n1", "liar"])
        .block(held_block("10.244.0.0/24", "default-v4", "liar"))
        .report(report("liar", &[("10.0.0.0/8", 1)]))
        .all_report();
    assert_eq!(created(&scene.plan()), ["n1 10.244.1.0/24 default-v4 carved"]);
}

#[test]
fn a_new_leader_on_an_old_cluster_waits_for_new_reports_before_it_carves() {
    // Also if all have reported: that may be what a restored etcd remembers.
    let old =
        with_v4().nodes(&["n1", "n2"]).all_report().with(|s| s.tenure.held_for = Duration::from_secs(20));
    assert_eq!((created(&old.plan()).len(), old.plan().wake_after), (0, Some(Duration::from_secs(10))));
    let adopts = old
        .clone()
        .node(NodeFact { pod_cidrs: spec(&["10.244.9.0/24"]), ..node("n3") })
        .report(report("n3", &[("10.244.9.0/24", 0)]));
    assert_eq!(
        created(&adopts.plan()),
        ["n3 10.244.9.0/24 default-v4 recreated"],
        "what is claimed need not wait"
    );
    let waited = old.with(|s| s.tenure.held_for = Duration::from_secs(30));
    assert_eq!(created(&waited.plan()).len(), 2);
}

#[test]
fn on_a_fresh_cluster_only_ready_nodes_are_waited_for_as_their_pods_may_run() {
    let scene = with_v4().nodes(&["n1", "n2"]).with(|s| {
        s.memory = Memory::new(true);
        s.memory.ledger.update(&s.world.ranges, &s.world.blocks);
        s.tenure = Tenure { held_for: Duration::from_secs(20), start: Start::First };
    });
    let seen = Some(digest_of(&scene.world));
    let says = |node: &str| ReportFact { seen, ..report(node, &[]) };
    let silent = scene.report(says("n1"));
    assert_eq!((created(&silent.plan()).len(), silent.plan().wake_after), (0, Some(Duration::from_secs(10))));
    let blind = silent.clone().all_report();
    assert_eq!(
        created(&blind.plan()),
        [] as [&str; 0],
        "a report from before the range may lack a block of its pods"
    );
    let all_report = silent.clone().report(says("n2"));
    assert_eq!(created(&all_report.plan()).len(), 2, "nothing was written before, so every report is new");
    for health in [Health::Lost, Health::NotReady] {
        let not_ready = silent.clone().node(NodeFact { health, ..node("n2") });
        assert_eq!(created(&not_ready.plan()).len(), 2, "{health:?}");
    }
    let waited = silent.with(|s| s.tenure.held_for = Duration::from_secs(30));
    assert_eq!(created(&waited.plan()).len(), 2);
}

/// etcd was put back to a time before `x` joined, so there is no Node, NodeNetwork or PodCIDR of it.
#[test]
fn a_block_that_others_tell_was_lost_is_given_to_nobody_but_its_node() {
    let lost = |blocks: &[(&str, &str)]| {
        let told =
            blocks.iter().map(|(cidr, node)| ((block(cidr), (*node).into()), Duration::from_secs(4000)));
        let told = told.collect();
        move |s: &mut Scene| s.memory.told = told
    };
    let joins = with_v4().nodes(&["y"]).all_report().with(lost(&[("10.244.0.0/24", "x")]));
    assert_eq!(created(&joins.plan()), ["y 10.244.1.0/24 default-v4 carved"]);
    let returns = joins.clone().nodes(&["x"]);
    assert_eq!(
        created(&returns.plan()),
        ["x 10.244.0.0/24 default-v4 recreated", "y 10.244.1.0/24 default-v4 carved"],
        "before it has reported anything itself"
    );
    let over = joins.with(|s| s.clock.steady = Duration::from_secs(4000));
    assert_eq!(created(&over.plan()), ["y 10.244.0.0/24 default-v4 carved"]);
    let held = with_v4().nodes(&["x", "y"]).report(report("y", &[("10.244.0.0/24", 3)])).all_report();
    let held = held.with(lost(&[("10.244.0.0/24", "x")]));
    assert_eq!(
        created(&held.plan()),
        ["x 10.244.1.0/24 default-v4 carved", "y 10.244.0.0/24 default-v4 recreated"],
        "what a node says of itself is stronger"
    );
    let disputed = with_v4().nodes(&["x"]).all_report();
    let disputed = disputed.with(lost(&[("10.244.0.0/24", "x"), ("10.244.0.0/24", "z")]));
    assert_eq!(created(&disputed.plan()), ["x 10.244.1.0/24 default-v4 carved"]);
    let liar = with_v4().nodes(&["y"]).all_report().with(lost(&[("10.0.0.0/8", "x")]));
    assert_eq!(
        created(&liar.plan()),
        ["y 10.244.0.0/24 default-v4 carved"],
        "no more than a block at a stroke"
    );
}

#[test]
fn what_is_reserved_is_given_to_no_node_because_it_says_so() {
    let reserved = RangeFact { reserved: [block("10.244.77.0/24")].into(), ..range("default-v4", V4) };
    let with = |range: RangeFact| {
        scene().range(range).nodes(&["n1"]).report(report("n1", &[("10.244.77.0/24", 1)])).all_report()
    };
    let other = ["n1 10.244.0.0/24 default-v4 carved"];
    assert_eq!(created(&with(reserved.clone()).plan()), other);
    let further = with(reserved.clone()).block(held_block("10.244.5.0/24", "default-v4", "n1"));
    assert_eq!(created(&further.plan()), [] as [&str; 0]);
    let known = range("default-v4", V4);
    assert_eq!(created(&with(known).plan()), ["n1 10.244.77.0/24 default-v4 recreated"]);
}

#[test]
fn nothing_is_carved_while_more_is_lost_than_agents_can_name() {
    let scene = with_v4().nodes(&["n1", "n2"]).report(report("n2", &[("10.244.7.0/24", 1)])).all_report();
    let scene = scene.with(|s| s.memory.untold = Some(s.clock.steady + Duration::from_secs(60)));
    let plan = scene.plan();
    assert_eq!(created(&plan), ["n2 10.244.7.0/24 default-v4 recreated"]);
    assert_eq!(faults(&plan), [format!("n1 {}", reason::BLOCKS_LOST)]);
    assert!(plan.faults[0].message.ends_with("at the latest in 60 s"), "{}", plan.faults[0].message);
    let over = scene.with(|s| s.clock.steady += Duration::from_secs(60));
    assert_eq!(created(&over.plan()).len(), 2);
}

#[test]
fn a_node_that_no_range_selects_is_named_unless_a_range_is_about_to_come() {
    let none = scene().nodes(&["n1"]).all_report().with(|s| s.settings.default_ranges.clear());
    assert_eq!(
        (faults(&none.plan()), none.plan().nodes_without_block),
        (vec![format!("n1 {}", reason::NO_RANGE)], 1)
    );
    let first_pass = scene().nodes(&["n1"]).with(|s| s.source = Source::Cache);
    let second_pass = scene().nodes(&["n1"]);
    assert_eq!((faults(&first_pass.plan()), faults(&second_pass.plan())), (vec![], vec![]));
}

#[test]
fn a_carved_block_stays_when_the_selector_changes() {
    let elsewhere = RangeFact { selector: selector("edge", "1"), ..range("default-v4", V4) };
    let scene =
        scene().range(elsewhere).node(node("n1")).block(held_block("10.244.1.0/24", "default-v4", "n1"));
    let plan = scene.all_report().plan();
    assert_eq!((steps(&plan), faults(&plan), plan.nodes_without_block), (vec![], vec![], 0));
}

#[test]
fn a_range_whose_last_write_failed_asks_for_no_live_list_meanwhile() {
    let fresh = RangeFact { status: Default::default(), ..range("default-v4", V4) };
    let cached = scene().range(fresh).with(|s| s.source = Source::Cache);
    assert!(cached.plan().wants_live);
    let failed = cached.with(|s| s.memory.failed((Kind::ClusterCIDR, "default-v4".into()), false, s.clock));
    assert!(!failed.plan().wants_live);
}

// ---- adopting and giving back ----

#[test]
fn a_fitting_pod_cidr_is_adopted_and_any_other_is_named() {
    let case = |pod_cidr: &str, change: fn(&mut RangeFact)| {
        let mut given = range("default-v4", V4);
        change(&mut given);
        let scene =
            scene().range(given).node(NodeFact { pod_cidrs: spec(&[pod_cidr]), ..node("n1") }).all_report();
        let plan = scene.plan();
        let after = scene.after(&plan).plan();
        (created(&plan), faults(&after))
    };
    assert_eq!(
        case("10.244.77.0/24", |_| {}),
        (vec!["n1 10.244.77.0/24 default-v4 adopted".to_owned()], vec![])
    );
    let foreign = vec![format!("n1 {}", reason::FOREIGN_POD_CIDR)];
    for (pod_cidr, change, carved) in [
        ("192.168.0.0/24", (|_| {}) as fn(&mut RangeFact), "10.244.0.0/24"),
        ("10.244.0.0/25", |_| {}, "10.244.1.0/24"),
        ("10.244.0.0/23", |_| {}, "10.244.2.0/24"),
        ("10.244.0.0/24", |r| r.reserved = [block("10.244.0.0/30")].into(), "10.244.1.0/24"),
    ] {
        assert_eq!(
            case(pod_cidr, change),
            (vec![format!("n1 {carved} default-v4 carved")], foreign.clone()),
            "{pod_cidr}"
        );
    }
    let (made, named) = case("10.244.5.0/24", |r| r.selector = selector("edge", "1"));
    assert_eq!(
        (made.len(), named),
        (
            0,
            vec![format!("n1 {}", reason::NO_RANGE), foreign[0].clone()]
                .into_iter()
                .rev()
                .collect::<Vec<_>>()
        )
    );
    let (made, _) = case("10.244.5.0/24", |r| r.allocation = Allocation::Draining);
    assert_eq!(made, [] as [&str; 0]);
}

#[test]
fn both_families_are_adopted() {
    let plan = with_v4()
        .range(range("v6", V6))
        .node(NodeFact { pod_cidrs: spec(&["10.244.9.0/24", "fd00:10:244:9::/64"]), ..node("n1") })
        .all_report()
        .plan();
    assert_eq!(created(&plan), ["n1 10.244.9.0/24 default-v4 adopted", "n1 fd00:10:244:9::/64 v6 adopted"]);
}

#[test]
fn of_two_nodes_with_one_pod_cidr_the_older_gets_it_and_the_other_is_named() {
    let older = NodeFact { created: at(NOW - 5000), pod_cidrs: spec(&["10.244.4.0/24"]), ..node("z-old") };
    let younger = NodeFact { pod_cidrs: spec(&["10.244.4.0/24"]), ..node("a-new") };
    let scene = with_v4().node(older).node(younger).all_report();
    let plan = scene.plan();
    assert_eq!(
        created(&plan),
        ["a-new 10.244.0.0/24 default-v4 carved", "z-old 10.244.4.0/24 default-v4 adopted"]
    );
    let after = scene.after(&plan).plan();
    assert_eq!(faults(&after), [format!("a-new {}", reason::POD_CIDR_TAKEN)]);
    assert!(
        after.faults[0].message.contains("node z-old holds 10.244.4.0/24"),
        "{}",
        after.faults[0].message
    );
}

#[test]
fn a_lost_block_is_made_again_for_the_node_that_holds_it() {
    let lost =
        || with_v4().nodes(&["n0", "n1"]).report(report("n1", &[("10.244.3.0/24", 0), ("10.244.8.0/24", 7)]));
    assert_eq!(
        created(&lost().all_report().plan()),
        ["n0 10.244.0.0/24 default-v4 carved", "n1 10.244.8.0/24 default-v4 recreated"]
    );
    let seen = lost().all_report().with(|s| {
        let (node, range, until) = ("n1".into(), "default-v4".into(), Duration::from_secs(9999));
        s.memory.vanished.insert(block("10.244.3.0/24"), Vanished { node, range, until });
    });
    assert_eq!(created(&seen.plan())[1], "n1 10.244.3.0/24 default-v4 recreated", "the leader knows better");
    let draining =
        lost().range(RangeFact { allocation: Allocation::Draining, ..range("default-v4", V4) }).all_report();
    assert_eq!(
        created(&draining.plan()),
        ["n1 10.244.8.0/24 default-v4 recreated"],
        "it existed before the range drained"
    );
}

#[test]
fn a_block_that_another_node_has_is_not_given_back_but_named() {
    let scene = with_v4()
        .nodes(&["n1", "n2"])
        .block(held_block("10.244.3.0/24", "default-v4", "n2"))
        .report(report("n1", &[("10.244.3.0/24", 2)]))
        .all_report();
    let plan = scene.plan();
    assert_eq!(created(&plan), ["n1 10.244.0.0/24 default-v4 carved"]);
    assert_eq!(faults(&plan), [format!("n1 {}", reason::HELD_BLOCK_TAKEN)]);
}

#[test]
fn a_create_of_unknown_outcome_is_repeated_and_nothing_else_is_carved_for_that_node() {
    let pending = Pending { node: "n1".into(), range: "default-v4".into(), until: Duration::from_secs(9999) };
    let scene = with_v4().nodes(&["n1", "n2"]).all_report().with(|s| {
        s.memory.pending.insert(block("10.244.0.0/24"), pending);
    });
    assert_eq!(
        created(&scene.plan()),
        ["n1 10.244.0.0/24 default-v4 carved", "n2 10.244.1.0/24 default-v4 carved"]
    );
    let gone = scene
        .range(range("new", "10.9.0.0/16"))
        .range(RangeFact { deleting: true, ..range("default-v4", V4) });
    assert_eq!(
        created(&gone.plan()),
        ["n2 10.9.0.0/24 new carved"],
        "n1 waits until the create can have no effect"
    );
}

// ---- holding ----

fn change_of(scene: &Scene) -> Option<(Why, BlockChange)> {
    scene.plan().steps.into_iter().find_map(|step| match step {
        Step::ChangeBlock { why, change, .. } => Some((why, change)),
        _ => None,
    })
}

fn holding(change: impl FnOnce(&mut BlockFact)) -> Scene {
    let mut held = held_block("10.244.1.0/24", "default-v4", "n1");
    change(&mut held);
    with_v4().nodes(&["n0"]).block(held_block("10.244.0.0/24", "default-v4", "n0")).block(held).all_report()
}

#[test]
fn a_block_as_it_should_be_is_left_alone() {
    assert_eq!(change_of(&holding(|_| {}).node(node("n1"))), None);
}

#[test]
fn address_label_and_uid_changes_of_the_node_are_copied() {
    let moved =
        holding(|_| {}).node(NodeFact { addresses: ["172.30.0.77".parse().unwrap()].into(), ..node("n1") });
    let (why, change) = change_of(&moved).unwrap();
    assert_eq!((why, change.addresses), (Why::Refresh, Some(vec!["172.30.0.77".parse().unwrap()])));

    let reborn = holding(|_| {}).node(NodeFact { uid: "new".into(), ..node("n1") });
    let (why, change) = change_of(&reborn).unwrap();
    assert_eq!((why, change.node_uid.as_deref()), (Why::Readopt, Some("new")));

    let selected = holding(|b| {
        b.labels = labels(&[
            ("plat.network/clustercidr", "default-v4"),
            ("plat.network/node", "n1"),
            ("rack", "1"),
            ("mine", "x"),
            ("former", "1"),
        ]);
        b.others_labels = labels(&[("rack", "1"), ("mine", "x")]);
    })
    .range(RangeFact { selector: selector("rack", "1"), ..range("r", "10.9.0.0/16") })
    .range(RangeFact { selector: selector("zone", "a"), ..range("z", "10.8.0.0/16") })
    .node(NodeFact { labels: labels(&[("zone", "a")]), ..node("n1") });
    let (_, change) = change_of(&selected).unwrap();
    assert_eq!(
        change.labels,
        [("zone".to_owned(), Some("a".to_owned())), ("former".to_owned(), None), ("rack".to_owned(), None)],
        "a named one is the node's, another one the user's, and one of ours that nothing names goes"
    );
}

#[test]
fn labels_that_an_unreadable_object_may_name_stay() {
    let scene = scene()
        .range(range("r", "10.244.0.0/16"))
        .block({
            let mut b = held_block("10.244.0.0/24", "r", "n1");
            b.labels = labels(&b.labels.iter().chain([("zone", "a")]).collect::<Vec<_>>());
            b
        })
        .node(NodeFact { labels: labels(&[("zone", "a")]), ..node("n1") });
    let relabels = |scene: &Scene| scene.plan().steps.iter().any(|s| matches!(s, Step::ChangeBlock { .. }));
    assert!(relabels(&scene), "nothing names it");
    let unreadable = PolicyFact { problem: Some("of a newer version".into()), ..policy("p", "{}") };
    let with_policy = scene.clone().with(|s| {
        std::sync::Arc::make_mut(&mut s.world.policies).insert("p".into(), unreadable.clone().into());
    });
    assert!(!relabels(&with_policy));
    let unreadable = RangeFact { problem: Some("of a newer version".into()), ..range("s", "10.245.0.0/16") };
    assert!(!relabels(&scene.range(unreadable)));
}

#[test]
fn the_labels_of_thousands_of_blocks_change_a_few_at_a_time() {
    let named = RangeFact { selector: selector("zone", "a"), ..range("z", "10.8.0.0/16") };
    let mut scene = scene().range(range("default-v4", "10.244.0.0/16")).range(named);
    for n in 0..200 {
        let name = format!("n{n}");
        scene = scene.node(NodeFact { labels: labels(&[("zone", "a")]), ..node(&name) }).block(held_block(
            &format!("10.244.{n}.0/24"),
            "default-v4",
            &name,
        ));
    }
    let (mut passes, mut left) = (0, 200);
    while left > 0 {
        let plan = scene.plan();
        assert_eq!(plan.uncopied, [("zone".to_owned(), left)].into());
        let changed = steps(&plan).len();
        assert!(changed <= 25 && plan.wake_after.is_some() == (changed < left), "{changed} of {left}");
        (scene, passes, left) = (scene.after(&plan), passes + 1, left - changed);
    }
    assert_eq!(passes, 8);
    assert!(scene.plan().uncopied.is_empty());
}

#[test]
fn a_node_that_lost_its_addresses_keeps_the_last_known_ones_and_is_named() {
    let scene = holding(|_| {}).node(NodeFact { addresses: [].into(), ..node("n1") });
    assert_eq!(
        (change_of(&scene), faults(&scene.plan())),
        (None, vec![format!("n1 {}", reason::NO_ADDRESS)])
    );
}

#[test]
fn a_node_without_any_address_gets_its_block_all_the_same() {
    let plan = with_v4().node(NodeFact { addresses: [].into(), ..node("n1") }).all_report().plan();
    assert_eq!((created(&plan).len(), faults(&plan)), (1, vec![format!("n1 {}", reason::NO_ADDRESS)]));
}

#[test]
fn a_gone_node_puts_its_block_into_quarantine_and_a_returning_one_takes_it_out() {
    let (why, change) = change_of(&holding(|_| {})).unwrap();
    assert_eq!(why, Why::NodeGone);
    assert_eq!(
        (change.state, change.release_after),
        (Some(BlockState::Quarantined), Some(Some(at(NOW + 900))))
    );

    let resting =
        |b: &mut BlockFact| (b.state, b.release_after) = (BlockState::Quarantined, Some(at(NOW + 5)));
    let (why, change) =
        change_of(&holding(resting).node(NodeFact { uid: "new".into(), ..node("n1") })).unwrap();
    assert_eq!(
        (why, change.state, change.release_after, change.node_uid.as_deref()),
        (Why::Readopt, Some(BlockState::Active), Some(None), Some("new"))
    );
}

#[test]
fn a_thousand_nodes_that_get_no_block_keep_no_younger_node_from_its_own() {
    let older = |i: i64| NodeFact { created: at(NOW - 90_000 + i), ..node(&format!("n{i}")) };
    let blocks =
        |i: i64| held_block(&format!("10.244.{}.{}/28", i / 16, i % 16 * 16), "default-v4", &format!("n{i}"));
    let v4 = RangeFact { block_prefix: Some(28), ..range("default-v4", V4) };
    let v6 = RangeFact { block_prefix: Some(64), ..range("default-v6", "fd00:10:244::/64") };
    let mut scene = scene().range(v4).range(v6);
    for i in 0..1100 {
        scene = scene.node(older(i)).block(blocks(i));
    }
    let plan =
        scene.block(held_block("fd00:10:244::/64", "default-v6", "n0")).nodes(&["young"]).all_report().plan();
    assert_eq!(created(&plan), ["young 10.244.68.192/28 default-v4 carved"]);
}

#[test]
fn a_block_is_freed_when_its_time_is_over_and_this_leader_has_watched_for_a_minute() {
    let case = |release_after: i64, watched: u64| {
        let scene = holding(|b| {
            (b.state, b.release_after) = (BlockState::Quarantined, Some(at(NOW + release_after)))
        });
        let scene = scene.with(|s| {
            s.memory
                .quarantined
                .insert("uid-10.244.1.0/24".into(), s.clock.steady - Duration::from_secs(watched));
            s.settings.withdrawal_deadline = Duration::ZERO;
        });
        let plan = scene.plan();
        (steps(&plan).contains(&"delete_block"), plan.wake_after.map(|wait| wait.as_secs()))
    };
    assert_eq!(case(-1, 60), (true, None));
    assert_eq!(case(-1, 59), (false, Some(1)));
    assert_eq!(case(10, 60), (false, Some(10)));
    assert_eq!(case(-1, 0), (false, Some(60)));
    let unseen = holding(|b| (b.state, b.release_after) = (BlockState::Quarantined, Some(at(NOW - 999))));
    assert_eq!(unseen.plan().wake_after, Some(Duration::from_secs(60)));
}

#[test]
fn a_short_quarantine_is_watched_for_no_longer_than_itself() {
    let short = RangeFact { quarantine_seconds: 60, ..range("default-v4", V4) };
    let scene = holding(|b| (b.state, b.release_after) = (BlockState::Quarantined, Some(at(NOW))))
        .range(short)
        .with(|s| {
            s.settings.quarantine_watch = Duration::from_secs(600);
            s.settings.withdrawal_deadline = Duration::ZERO;
            s.memory.quarantined.insert("uid-10.244.1.0/24".into(), s.clock.steady - Duration::from_secs(60));
        });
    assert!(steps(&scene.plan()).contains(&"delete_block"));
}

#[test]
fn a_quarantine_without_an_end_gets_one() {
    let (why, change) = change_of(&holding(|b| b.state = BlockState::Quarantined)).unwrap();
    assert_eq!((why, change.release_after), (Why::Refresh, Some(Some(at(NOW + 900)))));
}

#[test]
fn unreadable_nodes_and_blocks_are_left_as_they_are() {
    let unreadable_node =
        holding(|_| {}).node(NodeFact { problem: Some("?".into()), addresses: [].into(), ..node("n1") });
    assert_eq!(steps(&unreadable_node.plan()), [] as [&str; 0]);
    let unreadable_block =
        holding(|b| (b.problem, b.state) = (Some("?".into()), BlockState::Unknown)).node(node("n1"));
    assert_eq!(
        steps(&unreadable_block.all_report().plan()),
        [] as [&str; 0],
        "n1 has its block, if nobody can read it"
    );
}

// ---- nodes ----

fn mirrored(scene: &Scene) -> Vec<String> {
    scene
        .plan()
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::MirrorToNode { node, pod_cidrs, .. } => Some(format!("{node} {pod_cidrs:?}")),
            _ => None,
        })
        .collect()
}

#[test]
fn blocks_are_mirrored_once_every_family_has_one_in_the_nodes_own_order() {
    let six_first = NodeFact {
        addresses: ["fd00::9".parse().unwrap(), "172.30.0.9".parse().unwrap()].into(),
        ..node("n1")
    };
    let one = with_v4().range(range("v6", V6)).node(six_first).block(held_block(
        "10.244.1.0/24",
        "default-v4",
        "n1",
    ));
    assert_eq!(mirrored(&one), [] as [&str; 0]);
    let both = one.block(held_block("fd00:10:244:1::/64", "v6", "n1"));
    assert_eq!(mirrored(&both), ["n1 [fd00:10:244:1::/64, 10.244.1.0/24]"]);
    let unknown_order = both.clone().node(NodeFact { addresses: [].into(), ..node("n1") });
    assert_eq!(mirrored(&unknown_order), [] as [&str; 0], "the field is write-once: wait for the address");
    let off = both.clone().with(|s| s.settings.node_spec_mirror = false);
    assert_eq!(mirrored(&off), [] as [&str; 0]);
    let set = both.node(NodeFact { pod_cidrs: spec(&["10.1.0.0/24"]), ..node("n1") });
    assert_eq!(mirrored(&set), [] as [&str; 0], "never fought over");
}

#[test]
fn of_thousands_that_come_at_once_all_get_blocks_before_any_is_mirrored_and_none_is_left() {
    let names: Vec<String> = (0..2600).map(|n| format!("n{n:04}")).collect();
    let mut scene = scene()
        .range(range("v4", "10.224.0.0/11"))
        .nodes(&names.iter().map(String::as_str).collect::<Vec<_>>())
        .all_report();
    let mut passes = Vec::new();
    loop {
        let plan = scene.plan();
        let count = |name: &str| plan.steps.iter().filter(|step| step.name() == name).count();
        passes.push((count("create_block"), count("mirror_to_node")));
        if passes.last() == Some(&(0, 0)) {
            break;
        }
        for step in plan.steps {
            scene = match step {
                Step::CreateBlock(new) => scene.block(held_block(&new.block.to_string(), "v4", &new.node)),
                Step::MirrorToNode { node: name, pod_cidrs, .. } => {
                    let pod_cidrs = pod_cidrs.into_iter().map(PodCidrText::Block).collect();
                    let node = (*scene.world.nodes[&name]).clone();
                    scene.node(NodeFact { pod_cidrs, ..node })
                }
                _ => scene,
            };
        }
    }
    let creates: Vec<_> = passes.iter().map(|pass| pass.0).filter(|creates| *creates > 0).collect();
    assert_eq!(creates, [1000, 1000, 600]);
    assert_eq!(passes.iter().map(|pass| pass.1).sum::<usize>(), 2600);
    assert_eq!((passes[0].1, passes[1].1), (0, 0));
    assert!(passes.iter().all(|pass| pass.1 <= 500), "{passes:?}");
}

#[test]
fn network_unavailable_is_cleared_once_the_blocks_are_ready() {
    let status = |ready| {
        let mut status = plat_crds::PodCIDRStatus::default();
        let verdict = plat_crds::condition::Verdict::new("Ready", Some(ready), "R", "");
        plat_crds::condition::set(
            &mut status.conditions,
            &verdict,
            None,
            &k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(NOW)),
        );
        Some(Box::new(status.into()))
    };
    let marked = || NodeFact { network_unavailable: true, ..node("n1") };
    assert_eq!(
        steps(&holding(|b| b.status = status(true)).node(marked()).plan()),
        ["clear_network_unavailable"]
    );
    assert_eq!(steps(&holding(|b| b.status = status(false)).node(marked()).plan()), [] as [&str; 0]);
    assert_eq!(steps(&holding(|b| b.status = status(true)).node(node("n1")).plan()), [] as [&str; 0]);
}

#[test]
fn a_family_that_has_run_out_does_not_hold_back_the_other() {
    for (mine, gone) in [("10.244.1.0/24", V6), ("fd00:10:244:1::/64", V4)] {
        let mut ready = held_block(mine, "good", "n1");
        let mut status = plat_crds::PodCIDRStatus::default();
        let verdict = plat_crds::condition::Verdict::new("Ready", Some(true), "R", "");
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(NOW));
        plat_crds::condition::set(&mut status.conditions, &verdict, None, &now);
        ready.status = Some(Box::new(status.into()));
        let marked = NodeFact { network_unavailable: true, ..node("n1") };
        let good = range("good", if gone == V6 { V4 } else { V6 });
        let scene = scene().node(marked).range(good).range(range("other", gone)).block(ready).all_report();
        let one_family = scene.plan();
        assert_eq!(steps(&one_family), ["create_block"], "the other family's block comes at once");
        let full = RangeFact { reserved: [block(gone)].into(), ..range("other", gone) };
        let plan = scene.range(full).plan();
        assert_eq!(steps(&plan), ["clear_network_unavailable"]);
        assert_eq!(faults(&plan), [format!("n1 {}", reason::RANGE_EXHAUSTED)]);
        assert!(!plan.steps.iter().any(|step| matches!(step, Step::MirrorToNode { .. })), "write-once");
    }
}

#[test]
fn reports_come_with_the_node_and_go_after_its_block() {
    let names = |scene: &Scene| {
        scene.plan().steps.iter().map(Step::name).filter(|n| n.ends_with("report")).collect::<Vec<_>>()
    };
    assert_eq!(names(&with_v4().nodes(&["n1"])), ["create_report"]);
    assert_eq!(names(&with_v4().nodes(&["n1"]).all_report()), [] as [&str; 0]);
    assert_eq!(names(&with_v4().report(report("gone", &[]))), ["delete_report"]);
    assert_eq!(
        names(&with_v4().report(report("n1", &[])).block(held_block("10.244.1.0/24", "default-v4", "n1"))),
        [] as [&str; 0]
    );
}

#[test]
fn an_unusable_pod_cidr_text_is_named() {
    let plan = with_v4()
        .node(NodeFact { pod_cidrs: [PodCidrText::Invalid("what".into())].into(), ..node("n1") })
        .all_report()
        .plan();
    assert_eq!((created(&plan).len(), faults(&plan)), (1, vec![format!("n1 {}", reason::FOREIGN_POD_CIDR)]));
}

// ---- what holds for every plan ----

prop_compose! {
    fn any_node()(index in 0u32..40, age in 0i64..4, labelled in any::<bool>(), spec_block in prop::option::weighted(0.3, 0u32..70), health in 0u8..3) -> NodeFact {
        NodeFact {
            created: at(NOW - 1000 - age),
            labels: if labelled { labels(&[("edge", "1")]) } else { labels(&[]) },
            pod_cidrs: spec_block.map(|b| spec(&[&format!("10.244.{b}.0/24")])).unwrap_or_default(),
            health: [Health::Ready, Health::NotReady, Health::Lost][usize::from(health)],
            addresses: [std::net::IpAddr::from([172, 30, 0, u8::try_from(index).unwrap()])].into(),
            ..node(&format!("n{index}"))
        }
    }
}

prop_compose! {
    fn any_scene()(
        nodes in prop::collection::vec(any_node(), 0..40),
        blocks in prop::collection::vec((0u32..70, 0u32..45, 0u8..4, -100i64..100), 0..30),
        held in prop::collection::vec((0u32..45, 0u32..70, 0i64..3), 0..10),
        pending in prop::collection::vec((0u32..64, 0u32..45), 0..3),
        cursor in 0i64..80,
        second_range in any::<bool>(),
        topology in any::<bool>(),
    ) -> Scene {
        let mut first = range("default-v4", "10.244.0.0/18");
        first.status.cursor = Some(cursor);
        first.topology_key = topology.then(|| "edge".into());
        let mut scene = scene().range(first);
        if second_range {
            scene = scene.range(RangeFact { selector: selector("edge", "1"), priority: 3, ..range("edge", "10.9.0.0/22") });
            scene = scene.range(RangeFact { created: at(NOW), ..range("overlapping", "10.244.0.0/17") });
        }
        for node in nodes {
            scene = scene.node(node);
        }
        for (index, node, state, release) in blocks {
            let mut block = held_block(&format!("10.244.{index}.0/24"), "default-v4", &format!("n{node}"));
            block.state = [BlockState::Active, BlockState::Active, BlockState::Draining, BlockState::Quarantined][usize::from(state)];
            block.release_after = block.is_quarantined().then(|| at(NOW + release));
            block.created = at(NOW - i64::from(index));
            scene = scene.block(block);
        }
        for (node, index, used) in held {
            scene = scene.report(report(&format!("n{node}"), &[(&format!("10.244.{index}.0/24"), used)]));
        }
        for (index, node) in pending {
            let block = block(&format!("10.244.{index}.0/24"));
            let (node, range, until) = (format!("n{node}").as_str().into(), "default-v4".into(), Duration::from_secs(99_999));
            // A block that has a PodCIDR is no longer pending: `Memory::observe` sees to that.
            if !scene.world.blocks.contains_key(block.object_name().as_str()) {
                scene.memory.pending.insert(block, Pending { node, range, until });
            }
        }
        scene
    }
}

fn all_blocks(scene: &Scene) -> Vec<(Block, String)> {
    scene.world.blocks.values().map(|b| (b.block, b.node.to_string())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn new_blocks_are_disjoint_from_everything_and_inside_their_range(scene in any_scene()) {
        let before = all_blocks(&scene);
        let plan = scene.plan();
        let mut seen: Vec<Block> = before.iter().map(|(block, _)| *block).collect();
        for step in &plan.steps {
            let Step::CreateBlock(new) = step else { continue };
            let range = &scene.world.ranges[&new.range];
            prop_assert!(range.range.unwrap().covers(&new.block));
            prop_assert_eq!(Some(new.block.prefix_length()), range.block_prefix);
            prop_assert!(&*new.range != "overlapping");
            prop_assert!(seen.iter().all(|other| !other.overlaps(&new.block)), "{} is there already", new.block);
            for pending in &scene.memory.pending {
                prop_assert!(!pending.0.overlaps(&new.block) || pending.1.node == new.node);
            }
            for report in scene.world.reports.values().filter(|r| r.name != new.node) {
                prop_assert!(report.held.iter().all(|held| !held.block.overlaps(&new.block)) || new.origin == crate::step::Origin::Recreated);
            }
            seen.push(new.block);
        }
    }

    #[test]
    fn no_node_gets_a_second_block_of_a_family_but_one_that_it_has_leases_in(scene in any_scene()) {
        let plan = scene.plan();
        let mut holders: BTreeSet<String> = all_blocks(&scene).into_iter().map(|(_, node)| node).collect();
        for step in &plan.steps {
            if let Step::CreateBlock(new) = step {
                let report = scene.world.reports.get(&new.node);
                let held = report.and_then(|report| report.held.iter().find(|held| held.block == new.block));
                let leased = held.is_some_and(|held| held.used != Some(0)) && new.origin == crate::step::Origin::Recreated;
                prop_assert!(holders.insert(new.node.to_string()) || leased, "{new:?}");
            }
        }
    }

    #[test]
    fn a_plan_does_not_depend_on_the_order_of_anything(scene in any_scene()) {
        let mut shuffled = crate::fixtures::scene();
        shuffled.memory = scene.memory.clone();
        for range in scene.world.ranges.values().rev() {
            shuffled = shuffled.range((**range).clone());
        }
        for node in scene.world.nodes.values().rev() {
            shuffled = shuffled.node((**node).clone());
        }
        for block in scene.world.blocks.values().rev() {
            shuffled = shuffled.block((**block).clone());
        }
        for report in scene.world.reports.values().rev() {
            shuffled = shuffled.report((**report).clone());
        }
        prop_assert_eq!(scene.plan(), shuffled.plan());
    }

    #[test]
    fn planning_again_after_applying_leaves_nothing_to_do(scene in any_scene()) {
        let mut scene = scene;
        for _ in 0..4 {
            let plan = scene.plan();
            scene = scene.after(&plan);
            let names: Vec<crate::facts::Name> = scene.world.blocks.values().filter(|b| b.is_quarantined()).map(|b| b.uid.clone()).collect();
            let now = scene.clock.steady;
            for uid in names {
                scene.memory.quarantined.entry(uid).or_insert(now);
            }
        }
        let rest = scene.plan();
        prop_assert_eq!(steps(&rest), [] as [&str; 0]);
        // A restart: nothing remembered, cursors lost. Only a node that waited for a disputed create to have
        // no effect any more may get a block now.
        let waiting: BTreeSet<_> = scene.memory.pending.values().map(|pending| pending.node.clone()).collect();
        let disputed: BTreeSet<_> = scene.memory.pending.keys().copied().collect();
        scene.memory = Memory::new(false);
        for step in scene.plan().steps {
            if let Step::CreateBlock(new) = step {
                prop_assert!(waiting.contains(&new.node) || disputed.contains(&new.block), "{new:?}");
            }
        }
    }

    #[test]
    fn an_unrelated_change_moves_no_block(scene in any_scene(), extra in any_node()) {
        let plan = scene.plan();
        let settled = scene.after(&plan);
        let before = all_blocks(&settled);
        let changed = settled.node(NodeFact { name: "zz-new".into(), uid: "zz".into(), pod_cidrs: [].into(), ..extra });
        let plan = changed.plan();
        let after = changed.after(&plan);
        for (block, node) in before {
            if let Some(now) = after.world.blocks.values().find(|b| b.block == block) {
                prop_assert_eq!(&*now.node, node.as_str());
            }
        }
    }

    #[test]
    fn carving_goes_on_after_the_last_block(cursor in 0u64..64, taken in prop::collection::btree_set(0u64..64, 0..60)) {
        let mut given = range("default-v4", "10.244.0.0/18");
        given.status.cursor = Some(i64::try_from(cursor).unwrap());
        let mut scene = scene().range(given).node(node("new"));
        for index in &taken {
            scene = scene.node(node(&format!("n{index}"))).block(held_block(&format!("10.244.{index}.0/24"), "default-v4", &format!("n{index}")));
        }
        let plan = scene.all_report().plan();
        let expected = (0..64).map(|i| (cursor + i) % 64).find(|i| !taken.contains(i)).unwrap();
        prop_assert_eq!(created(&plan), [format!("new 10.244.{expected}.0/24 default-v4 carved")]);
        prop_assert_eq!(plan.ranges["default-v4"].cursor, (expected + 1) % 64);
    }
}
