//! A cluster as it is, from what kubectl shows of it. It is judged by the operator's own plan.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use kube::core::DeserializeGuard;
use plat_crds::cluster_cidr::Allocation;
use plat_crds::{Block, Family};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::args::PlanArgs;
use super::fit::blocks_per_node;
use super::growth::{DAYS_PER_MONTH, Rate};
use super::{Question, Range};
use crate::args::Cli;
use crate::facts::{BlockFact, Fact, NodeFact, RangeFact, ReportFact};
use crate::forecast::DAYS_OF_GROWTH;
use crate::leader::World;
use crate::memory::Memory;
use crate::plan::{Plan, plan};
use crate::sizing::KUBELET_MAX_PODS;
use crate::snapshot::{Clock, Facts, Foreign, Snapshot, Source, Start, Tenure};

/// What is wrong is named in so many lines.
const MAX_PROBLEMS: usize = 20;

#[derive(Deserialize)]
struct List {
    items: Vec<Value>,
}

/// The question that a cluster and the flags ask.
pub fn question(text: &str, args: &PlanArgs, now: Timestamp) -> anyhow::Result<Question> {
    let mut world = read(text)?;
    let avoid = args.avoid()?;
    let services = avoid.iter().map(|(_, block)| *block).collect();
    world.foreign = Arc::new(Foreign { services, api_server: Vec::new() });
    let plan = judge(&world, now)?;
    let largest = world.nodes.values().filter_map(|node| node.max_pods).max();
    let pods = args.pods(largest.filter(|pods| *pods > 0).unwrap_or(KUBELET_MAX_PODS));
    let mut ranges = ranges_in_use(&world, &plan);
    for range in args.ranges(pods)? {
        if let Some(other) =
            world.ranges.values().find(|other| other.range.is_some_and(|r| r.overlaps(&range.range)))
        {
            bail!("--cluster-cidr: {} shares addresses with ClusterCIDR {}", range.range, other.name);
        }
        ranges.push(Range { name: format!("new-{}", range.range.object_name()), ..range });
    }
    if ranges.is_empty() {
        bail!("there is no ClusterCIDR in it, and --cluster-cidr gives none");
    }
    let addresses = world.nodes.values().flat_map(|node| node.addresses.iter());
    let addresses = addresses.filter_map(|address| Block::of(*address, Family::of(address).bits()));
    let grows = pace(&world, &ranges, pods);
    let quarantine =
        world.ranges.values().map(|range| range.quarantine_seconds).max().unwrap_or(args.quarantine);
    Ok(Question {
        nodes: args.nodes.map_or(u64::try_from(world.nodes.len()).unwrap_or(u64::MAX), u64::from),
        pods,
        resting: args.resting(quarantine.max(args.quarantine)),
        growth: args.growth(grows),
        months: args.months,
        avoid: avoid.iter().map(|(_, block)| *block).chain(addresses).collect(),
        ranges,
        problems: problems(&plan),
    })
}

fn read(text: &str) -> anyhow::Result<World> {
    let list: List = serde_json::from_str(text)
        .context("this is no list of Kubernetes objects; make it by kubectl get nodes,clustercidrs,podcidrs,nodenetworks -o json")?;
    let mut by_kind: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for item in list.items {
        let kind = item.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
        by_kind.entry(kind).or_default().push(item);
    }
    let mut take = |kind: &str| by_kind.remove(kind).unwrap_or_default();
    let world = World {
        nodes: facts(take("Node"), |object| Some(NodeFact::read(object)))?,
        ranges: facts(take("ClusterCIDR"), |object| Some(RangeFact::read(object)))?,
        blocks: facts(take("PodCIDR"), BlockFact::read)?,
        reports: facts(take("NodeNetwork"), |object| Some(ReportFact::read(object)))?,
        policies: Arc::default(),
        foreign: Arc::default(),
    };
    if world.nodes.is_empty() {
        bail!(
            "there is no Node in it; make it by kubectl get nodes,clustercidrs,podcidrs,nodenetworks -o json"
        );
    }
    Ok(world)
}

fn facts<K, F>(
    items: Vec<Value>,
    read: impl Fn(&DeserializeGuard<K>) -> Option<F>,
) -> anyhow::Result<Facts<F>>
where
    K: Resource + DeserializeOwned,
    F: Fact,
{
    let mut facts = BTreeMap::new();
    for item in items {
        if let Some(fact) = read(&serde_json::from_value(item).context("an object has no metadata")?) {
            facts.insert(fact.name().clone(), Arc::new(fact));
        }
    }
    Ok(Arc::new(facts))
}

/// What a leader that has watched this for long would plan.
fn judge(world: &World, now: Timestamp) -> anyhow::Result<Plan> {
    let mut settings = Cli::try_parse_from(["plat-operator"])?.run.settings()?;
    settings.default_ranges.clear();
    let watched = Duration::from_secs(24 * 60 * 60);
    let snapshot = Snapshot {
        clock: Clock { wall: now, steady: watched },
        source: Source::Live,
        settings: &settings,
        tenure: Tenure { held_for: watched, start: Start::HandedOver },
        nodes: world.nodes.clone(),
        ranges: world.ranges.clone(),
        blocks: world.blocks.clone(),
        reports: world.reports.clone(),
        policies: Arc::default(),
        foreign: world.foreign.clone(),
        memory: &Memory::new(false),
    };
    Ok(plan(&snapshot))
}

/// The ranges that blocks can come from, in the order in which the operator uses them.
fn ranges_in_use(world: &World, plan: &Plan) -> Vec<Range> {
    let mut facts: Vec<&RangeFact> = world.ranges.values().map(|range| &**range).collect();
    facts.sort_by_key(|range| (std::cmp::Reverse(range.priority), range.name.clone()));
    let known = facts.into_iter().filter_map(|fact| {
        let (range, prefix) = (fact.range?, fact.block_prefix?);
        let outlook = plan.ranges.get(&fact.name)?;
        let held = world.blocks.values().filter(|block| block.range == fact.name).count();
        let held = u64::try_from(held).unwrap_or(u64::MAX);
        let carves = outlook.judgement.is_good() && fact.allocation == Allocation::Enabled;
        // The plan has given blocks to nodes that lack one: those are free as yet.
        let free = if carves { outlook.free.saturating_add(given(plan, &fact.name)) } else { 0 };
        Some(Range {
            name: fact.name.to_string(),
            range,
            prefix,
            reserved: fact.reserved.to_vec(),
            usable: held.saturating_add(free),
            held: Some(held),
            per_node: fact.blocks_per_node,
            carves,
        })
    });
    known.collect()
}

fn given(plan: &Plan, range: &str) -> u64 {
    let created = plan.steps.iter().filter(|step| match step {
        crate::step::Step::CreateBlock(new) => &*new.range == range,
        _ => false,
    });
    u64::try_from(created.count()).unwrap_or(0)
}

/// Nodes a month, at the pace that the operator noted: of the family that grows fastest.
fn pace(world: &World, ranges: &[Range], pods: u32) -> Rate {
    let nodes_of = |family| {
        let of_family = ranges.iter().filter(|range| range.range.family() == family);
        let grown = of_family.filter_map(|range| {
            let growth = world.ranges.get(range.name.as_str())?.status.forecast.as_ref()?.growth;
            let supply = range.supply();
            let each = blocks_per_node(supply, pods).unwrap_or(supply.max);
            Some(f64::from(growth) / f64::from(each.max(1)))
        });
        grown.sum::<f64>()
    };
    let fastest = Family::ALL.into_iter().map(nodes_of).fold(0.0, f64::max);
    if fastest > 0.0 { Rate::Number(fastest * DAYS_PER_MONTH / DAYS_OF_GROWTH) } else { Rate::None }
}

fn problems(plan: &Plan) -> Vec<String> {
    let refused = plan.ranges.iter().filter(|(_, range)| !range.judgement.is_good());
    let refused =
        refused.map(|(name, range)| format!("ClusterCIDR {name}: {}", range.judgement.ready.message));
    let faults = plan.faults.iter().map(|fault| fault.message.clone());
    let mut problems: Vec<String> = refused.chain(faults).collect();
    problems.sort();
    problems.dedup();
    let more = problems.len().saturating_sub(MAX_PROBLEMS);
    problems.truncate(MAX_PROBLEMS);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    problems
}
