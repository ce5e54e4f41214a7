//! Golden texts, and that what is said to fit does fit by the operator's own allocator, and one more does not.

use clap::Parser;
use k8s_openapi::jiff::Timestamp;
use plat_crds::Block;
use plat_crds::cluster_cidr::BlocksPerNode;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::advice::Advice;
use super::fit::{is_served, nodes_that_fit};
use super::growth::{Case, Limit};
use super::{Answer, Question, Range, answer, cluster, text};
use crate::args::{Cli, Command};
use crate::planner::args::PlanArgs;
use crate::pool::Pool;

fn args(flags: &[&str]) -> PlanArgs {
    let cli = Cli::try_parse_from([&["plat-operator", "plan"], flags].concat()).unwrap();
    let Some(Command::Plan(args)) = cli.command else { panic!("{flags:?}") };
    *args
}

fn answer_to(flags: &[&str]) -> Answer {
    answer(&args(flags).question().unwrap())
}

/// Compares with a file of `golden`; with `UPDATE_GOLDEN=1` writes it instead.
fn assert_golden(name: &str, text: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/planner/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == golden, "{} differs; UPDATE_GOLDEN=1 accepts this:\n{text}", path.display());
}

#[test]
fn the_text_reads_well() {
    for (name, flags) in [
        ("default.txt", &[][..]),
        (
            "growing.txt",
            &[
                "--cluster-cidr=10.244.0.0/16",
                "--nodes=180",
                "--pods-per-node=110",
                "--node-growth-per-month=8",
                "--pod-growth-per-month=5",
                "--churn=50",
                "--service-cidr=10.96.0.0/12",
            ],
        ),
        (
            "dual-stack.txt",
            &[
                "--cluster-cidr=10.244.0.0/16:24,10.100.0.0/18,fd00:10:244::/48",
                "--nodes=800",
                "--node-growth-per-month=3%",
            ],
        ),
        ("too-many-pods.txt", &["--cluster-cidr=10.244.0.0/16:28", "--pods-per-node=500", "--nodes=10"]),
    ] {
        assert_golden(name, &text::render(&answer_to(flags)));
    }
}

#[test]
fn bad_questions_are_named() {
    for (flags, words) in [
        (&["--cluster-cidr=10.244.0.1/16"][..], "host bits"),
        (
            &["--cluster-cidr=10.244.0.0/16:15"],
            "'15' is no block size for 10.244.0.0/16: give a prefix length from 16 to 30",
        ),
        (
            &["--cluster-cidr=fd00:10:244::/48:x"],
            "'x' is no block size for fd00:10:244::/48: give a prefix length from 48 to 72",
        ),
        (&["--cluster-cidr=10.244.0.0/31"], "10.244.0.0/31 is too small for blocks"),
        (&["--cluster-cidr=10.244.0.0/16,10.244.8.0/24"], "10.244.0.0/16 and 10.244.8.0/24 share addresses"),
        (
            &["--service-cidr=10.244.0.0/20"],
            "10.244.0.0/16 shares addresses with --service-cidr 10.244.0.0/20",
        ),
        (&["--node-cidr=nodes"], "--node-cidr"),
        (&["--reserved=10.244.0.1/24"], "--reserved"),
        (&["--min-blocks-per-node=9"], "--min-blocks-per-node 9 is more than --max-blocks-per-node 8"),
    ] {
        let error = format!("{:#}", args(flags).question().unwrap_err());
        assert!(error.contains(words), "{error}");
    }
    for flag in [
        "--nodes=0",
        "--node-growth-per-month=-3",
        "--pod-growth-per-month=x%",
        "--quarantine=5",
        "--months=0",
    ] {
        assert!(Cli::try_parse_from(["plat-operator", "plan", flag]).is_err(), "{flag}");
    }
}

#[test]
fn blocks_are_given_or_chosen_for_a_full_node() {
    for (flags, expected) in [
        (&["--cluster-cidr=10.244.0.0/16:25"][..], 25),
        (&["--cluster-cidr=10.244.0.0/16"], 24),
        (&["--cluster-cidr=10.244.0.0/16", "--pods-per-node=250"], 23),
        (&["--cluster-cidr=fd00:10:244::/48"], 64),
        (&["--cluster-cidr=fd00:10:244::/48:60"], 60),
    ] {
        assert_eq!(answer_to(flags).families[0].ranges[0].block_prefix_length, expected, "{flags:?}");
    }
}

#[test]
fn what_growth_uses_up_first_is_named() {
    let ends = |flags: &[&str]| {
        let answer = answer_to(flags);
        answer.families[0]
            .runs_out
            .iter()
            .map(|end| (end.case, end.after_days, end.limit))
            .collect::<Vec<_>>()
    };
    assert_eq!(ends(&["--nodes=256"]), [(Case::AsItIs, None, None)]);
    assert_eq!(ends(&["--nodes=257"]), [(Case::AsItIs, Some(0), Some(Limit::Blocks))]);
    assert_eq!(ends(&["--nodes=256", "--churn=1"]), [(Case::AsItIs, Some(0), Some(Limit::Blocks))]);
    let both = ends(&["--nodes=200", "--node-growth-per-month=10", "--pod-growth-per-month=10"]);
    // The 257th node comes after 5.7 months; a node needs a second block from its 204th pod, after 9.4 months.
    assert_eq!(
        both,
        [
            (Case::Nodes, Some(174), Some(Limit::Blocks)),
            (Case::Pods, Some(287), Some(Limit::Blocks)),
            (Case::Both, Some(174), Some(Limit::Blocks)),
        ]
    );
    let full = ends(&[
        "--cluster-cidr=10.244.0.0/16:26",
        "--nodes=10",
        "--pods-per-node=480",
        "--pod-growth-per-month=10",
    ]);
    assert_eq!(full, [(Case::Pods, Some(28), Some(Limit::PodsPerNode))]);
}

fn advice_to(flags: &[&str]) -> Option<Advice> {
    answer_to(flags).families[0].add.clone()
}

#[test]
fn the_next_range_is_large_enough_and_in_nobodys_way() {
    assert_eq!(advice_to(&["--nodes=256"]), None);
    for (flags, cidr) in [
        (&["--nodes=300"][..], "10.245.0.0/18"),
        (&["--nodes=300", "--service-cidr=10.245.0.0/16"], "10.246.0.0/18"),
        (&["--nodes=300", "--cluster-cidr=10.255.0.0/16"], "10.0.0.0/18"),
        (&["--nodes=300", "--cluster-cidr=172.16.0.0/16"], "172.18.0.0/18"),
        (&["--nodes=70000", "--cluster-cidr=10.0.0.0/8"], "100.64.0.0/11"),
        (&["--nodes=300", "--cluster-cidr=fd00:10:244::/56:64"], "fd00:10:245::/48"),
    ] {
        let advice = advice_to(flags).unwrap_or_else(|| panic!("{flags:?}"));
        assert_eq!(advice.cidr.map(|cidr| cidr.to_string()).as_deref(), Some(cidr), "{flags:?}");
    }
}

#[test]
fn with_the_range_that_is_advised_everything_fits_to_the_end() {
    for nodes in [257, 300, 1000, 5000, 20_000] {
        let flags = [
            format!("--nodes={nodes}"),
            "--node-growth-per-month=2%".into(),
            "--pod-growth-per-month=3".into(),
        ];
        let mut question = args(&flags.each_ref().map(String::as_str)).question().unwrap();
        let advice = answer(&question).families[0].add.clone().unwrap();
        let yaml = advice.yaml().unwrap();
        assert!(yaml.contains(&format!("blockPrefixLength: {}", advice.block_prefix_length)), "{yaml}");
        question.ranges.push(Range::new(
            advice.name,
            advice.cidr.unwrap(),
            advice.block_prefix_length,
            vec![],
        ));
        let after = answer(&question);
        assert!(
            after.families[0].runs_out.iter().all(|end| end.limit.is_none()),
            "{nodes}: {:?}",
            after.families[0]
        );
        assert_eq!(after.families[0].add, None);
    }
}

fn object(kind: &str, version: &str, name: &str, rest: Value) -> Value {
    let mut object = json!({"apiVersion": version, "kind": kind,
        "metadata": {"name": name, "uid": format!("uid-{name}"), "creationTimestamp": "2026-01-01T00:00:00Z"}});
    for (key, value) in rest.as_object().unwrap() {
        object[key] = value.clone();
    }
    object
}

fn a_cluster() -> Value {
    let node = |number: u32| {
        let status = json!({"allocatable": {"pods": "110"}, "conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": format!("10.245.0.{number}")}]});
        object("Node", "v1", &format!("n{number}"), json!({"spec": {}, "status": status}))
    };
    let block = |number: u32| {
        let cidr = format!("10.244.{number}.0/24");
        let spec =
            json!({"cidr": cidr, "clusterCIDR": "pods", "nodeName": format!("n{number}"), "state": "Active"});
        object("PodCIDR", "plat.network/v1alpha1", &cidr.replace(['.', '/'], "-"), json!({ "spec": spec }))
    };
    let mut range = object(
        "ClusterCIDR",
        "plat.network/v1alpha1",
        "pods",
        json!({"spec": {"cidr": "10.244.0.0/20", "blockPrefixLength": 24, "reserved": ["10.244.15.0/24"]},
            "status": {"forecast": {"growth": 2, "peaks": [7, 8]}, "conditions": [{"type": "Ready", "status": "True",
            "reason": "RangeReady", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}}),
    );
    range["metadata"]["finalizers"] = json!([plat_crds::names::CLUSTER_CIDR_FINALIZER]);
    let items: Vec<Value> = (1..=8).map(node).chain((1..=7).map(block)).chain([range]).collect();
    json!({"apiVersion": "v1", "kind": "List", "items": items})
}

fn question_of(cluster: &Value, flags: &[&str]) -> anyhow::Result<Question> {
    let now: Timestamp = "2026-03-01T00:00:00Z".parse().unwrap();
    cluster::question(&cluster.to_string(), &args(flags), now)
}

#[test]
fn a_cluster_as_it_is_tells_its_nodes_blocks_and_pace() {
    let question = question_of(&a_cluster(), &[]).unwrap();
    assert_eq!((question.nodes, question.pods), (8, 110));
    let [range] = &question.ranges[..] else { panic!("{:?}", question.ranges) };
    assert_eq!((range.usable, range.held), (15, Some(7)));
    let planned = answer(&question);
    // Two nodes in 30 days: of 15 blocks, the one for a 16th node is missing after 8 months less a few days.
    assert_eq!(planned.families[0].runs_out[0].after_days, Some(120));
    // The nodes' own addresses lie behind the range.
    assert_eq!(planned.families[0].add.as_ref().unwrap().cidr.unwrap().to_string(), "10.244.64.0/18");
    assert_golden("cluster.txt", &text::render(&planned));
}

#[test]
fn a_range_on_trial_is_added_to_a_cluster_and_what_is_no_cluster_is_named() {
    let tried = question_of(&a_cluster(), &["--cluster-cidr=10.9.0.0/16", "--nodes=200"]).unwrap();
    assert_eq!(answer(&tried).families[0].nodes_that_fit, 271);
    for (cluster, flags, words) in [
        (a_cluster(), &["--cluster-cidr=10.244.8.0/24"][..], "shares addresses with ClusterCIDR pods"),
        (json!({"items": []}), &[], "there is no Node in it"),
        (json!([1]), &[], "this is no list of Kubernetes objects"),
    ] {
        let error = format!("{:#}", question_of(&cluster, flags).unwrap_err());
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn blocks_per_node_of_each_range_count_as_the_operator_carves() {
    let limited = |min: i32, max: i32| {
        let mut cluster = a_cluster();
        let items = cluster["items"].as_array_mut().unwrap();
        let range = items.iter_mut().find(|item| item["kind"] == "ClusterCIDR").unwrap();
        range["spec"]["blocksPerNode"] = json!({"min": min, "max": max});
        cluster
    };
    let fits = |cluster: &Value, flags: &[&str]| {
        let answer = answer(&question_of(cluster, flags).unwrap());
        (answer.families[0].nodes_that_fit, answer.families[0].ranges[0].blocks_per_node)
    };
    assert_eq!(fits(&limited(1, 8), &[]), (15, Some(1)));
    assert_eq!(fits(&limited(2, 2), &[]), (7, Some(2)), "15 blocks, two for each");
    assert_eq!(fits(&limited(1, 1), &["--pods-per-node=250"]), (15, Some(1)), "it may have no second one");
    assert_eq!(fits(&limited(1, 1), &["--pods-per-node=300"]), (0, None));
    assert_eq!(fits(&limited(1, 3), &["--pods-per-node=250"]), (7, Some(2)), "it asks for a second one");
    // 16 blocks of a range on trial, whose flags are its own: the last of the first goes with one of these.
    let trial = ["--cluster-cidr=10.9.0.0/20:24", "--min-blocks-per-node=4"];
    assert_eq!(fits(&limited(2, 2), &trial).0, 15);
    let flags = ["--min-blocks-per-node=2", "--nodes=200"];
    assert_eq!(answer_to(&flags).families[0].nodes_that_fit, 128);
    let advice = advice_to(&flags).unwrap().yaml().unwrap();
    assert!(advice.ends_with("  blocksPerNode: {min: 2, max: 8}\n"), "{advice}");
}

#[test]
fn a_range_that_gives_no_more_blocks_does_not_say_how_many_a_node_gets() {
    let range = |min, carves| {
        let range = Range::new("r".into(), "10.0.0.0/20".parse().unwrap(), 24, vec![]);
        Range { per_node: BlocksPerNode { min, max: 8 }, carves, ..range }
    };
    assert_eq!(nodes_that_fit(&[range(4, false).supply(), range(1, true).supply()], 110), 32);
    assert_eq!(nodes_that_fit(&[range(4, true).supply(), range(1, true).supply()], 110), 8);
}

/// Takes blocks one by one, as the operator does, until there is none for a node; answers the nodes that are served.
fn served_by_pools(pools: &mut [(Pool, Range)], pods: u32) -> u64 {
    let min = pools[0].1.supply().min.unwrap();
    let most = pools.iter().map(|(_, range)| range.per_node.max as usize).max().unwrap();
    let mut nodes = 0;
    loop {
        let mut blocks = Vec::new();
        while blocks.is_empty() || !is_served(&blocks, min, blocks.len() >= most, pods) {
            let may = |(pool, range): &&mut (Pool, Range)| {
                pool.free() > 0 && blocks.len() < range.per_node.max as usize
            };
            let Some((pool, range)) = pools.iter_mut().find(may) else { break };
            let block = pool.block(pool.next_free(0).unwrap()).unwrap();
            pool.take(&block);
            blocks.push(range.supply().capacity);
        }
        if blocks.is_empty() {
            return nodes;
        }
        nodes += u64::from(is_served(&blocks, min, blocks.len() >= most, pods));
    }
}

proptest! {
    #[test]
    fn what_fits_is_what_the_allocator_gives_and_one_more_does_not(
        sizes in prop::collection::vec((22u8..=24, 0u8..=5, 0u8..4, 1i32..5, 0i32..6), 1..4), pods in 1u32..900,
    ) {
        let (mut supplies, mut pools) = (Vec::new(), Vec::new());
        for (index, (length, extra, reserved, min, more)) in sizes.iter().enumerate() {
            let cidr = Block::of(format!("10.{index}.0.0").parse().unwrap(), *length).unwrap();
            let prefix = length + extra;
            let reserved: Vec<Block> = (0..*reserved).filter_map(|n| cidr.subblock(26, u64::from(n) * 3)).collect();
            let mut pool = Pool::new(cidr, prefix);
            reserved.iter().for_each(|reserved| pool.take(reserved));
            let per_node = BlocksPerNode { min: *min, max: min + more };
            let range = Range { per_node, ..Range::new(format!("r{index}"), cidr, prefix, reserved) };
            supplies.push(range.supply());
            pools.push((pool, range));
        }
        prop_assert_eq!(nodes_that_fit(&supplies, pods), served_by_pools(&mut pools, pods));
    }

    #[test]
    fn no_question_makes_it_fail(
        v4 in 0u8..=32, v6 in 0u8..=128, bits in 0u8..=128, nodes in 1u32..=1_000_000, pods in 1u32..=65_000, growth in 0u32..=1_000_000,
    ) {
        let range = |address: &str, length: u8| Block::of(address.parse().unwrap(), length).unwrap();
        for cidr in [range("10.244.0.0", v4), range("fd00:10:244::", v6)] {
            for text in [cidr.to_string(), format!("{cidr}:{bits}")] {
                let flags = [format!("--cluster-cidr={text}"), format!("--nodes={nodes}"), format!("--pods-per-node={pods}"),
                    format!("--node-growth-per-month={growth}"), format!("--pod-growth-per-month={growth}%"), "--months=120".to_owned()];
                if let Ok(question) = args(&flags.each_ref().map(String::as_str)).question() {
                    let answer = answer(&question);
                    prop_assert!(!text::render(&answer).is_empty());
                    prop_assert!(serde_json::to_string(&answer).is_ok());
                }
            }
        }
    }
}
