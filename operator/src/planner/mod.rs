//! `plat-operator plan`: what fits into which ranges, what growth uses up first and when, and which ClusterCIDR
//! to add. Pure but for reading its input: it asks no cluster and changes none.
//!
//! | file | step |
//! |---|---|
//! | `args` | flags → question; bad ones are named |
//! | `cluster` | a cluster as `kubectl get … -o json` shows it → question |
//! | `fit` | how many nodes fit, and how many blocks each of them takes |
//! | `growth` | when they no longer do |
//! | `advice` | where the next range goes |
//! | `zones` | how the blocks of zones scatter over months |
//! | `text` | answer → text; **a new section of the answer is added there**, to [`text::SECTIONS`] |
//!
//! It counts as the operator carves: a node takes blocks of the first range that has one, and, as it fills up,
//! another whenever `plat_crds::growth` says so, between the limits of `spec.blocksPerNode`.

pub mod advice;
pub mod args;
pub mod cluster;
pub mod fit;
pub mod growth;
pub mod text;
pub mod zones;

#[cfg(test)]
mod tests;

use std::io::Read;

use anyhow::Context;
use k8s_openapi::jiff::Timestamp;
use plat_crds::cluster_cidr::{BlocksPerNode, DEFAULT_BLOCKS_PER_NODE};
use plat_crds::{Block, Family};
use serde::Serialize;

use crate::fragmentation::Comparison;
use crate::pool::Pool;
use crate::sizing::{block_prefixes, capacity, prefix_for};
use advice::{Advice, advise};
use args::{Output, PlanArgs};
use fit::{Supply, blocks_per_node, nodes_that_fit};
use growth::{Growth, RunsOut, runs_out};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// Nodes that there are.
    pub nodes: u64,
    /// Pods of a node.
    pub pods: u32,
    /// Nodes whose blocks rest in quarantine at any moment.
    pub resting: u64,
    /// How it grows.
    pub growth: Growth,
    /// How far ahead to look.
    pub months: u32,
    /// The ranges, in the order in which they are used.
    pub ranges: Vec<Range>,
    /// Prefixes that no new range may touch, besides the ranges.
    pub avoid: Vec<Block>,
    /// What is wrong already.
    pub problems: Vec<String>,
}

/// A range as far as the planner knows it.
#[derive(Clone, Debug)]
pub struct Range {
    /// Name of its ClusterCIDR.
    pub name: String,
    /// The range.
    pub range: Block,
    /// Prefix length of its blocks.
    pub prefix: u8,
    /// Parts that are never handed out.
    pub reserved: Vec<Block>,
    /// Blocks that can be used by nodes, held ones included.
    pub usable: u64,
    /// Blocks that nodes hold, resting ones included; `None` without a cluster.
    pub held: Option<u64>,
    /// How many blocks a node gets.
    pub per_node: BlocksPerNode,
    /// Whether more blocks are carved from it.
    pub carves: bool,
}

/// The answer.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Nodes that were asked for.
    pub nodes: u64,
    /// Pods on each.
    pub pods_per_node: u32,
    /// Nodes whose blocks rest in quarantine at any moment.
    pub resting: u64,
    /// How far ahead it looks.
    pub months: u32,
    /// One for each family that has a range.
    pub families: Vec<FamilyAnswer>,
    /// What is wrong already.
    pub problems: Vec<String>,
    /// How the blocks of zones scatter over months, if zones were asked for: one for each family.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<Comparison>,
}

/// The answer for one family.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FamilyAnswer {
    /// `IPv4` or `IPv6`.
    pub family: Family,
    /// Its ranges.
    pub ranges: Vec<RangeAnswer>,
    /// Nodes that fit, each full and with all blocks that it then asks for.
    pub nodes_that_fit: u64,
    /// Other block sizes for the first range.
    pub sizes: Vec<SizeAnswer>,
    /// What each growth uses up, and when.
    pub runs_out: Vec<RunsOut>,
    /// The range to add, if what is there does not last.
    pub add: Option<Advice>,
}

/// One range.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RangeAnswer {
    /// Name of its ClusterCIDR.
    pub name: String,
    /// The range.
    pub cidr: Block,
    /// Prefix length of its blocks.
    pub block_prefix_length: u8,
    /// Blocks that can be used by nodes.
    pub blocks: u64,
    /// Of these, blocks that nodes hold.
    pub held: Option<u64>,
    /// Pods that one block holds.
    pub pods_per_block: u32,
    /// Blocks of one family with which a node gets no more from it.
    pub max_blocks_per_node: u32,
    /// Blocks that a full node takes; `None` if its pods do not fit into all that it may take.
    pub blocks_per_node: Option<u32>,
}

/// One block size.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SizeAnswer {
    /// Prefix length.
    pub block_prefix_length: u8,
    /// Whether the range has it, or gets it.
    pub chosen: bool,
    /// Blocks that the range then has.
    pub blocks: u64,
    /// Pods that one block holds.
    pub pods_per_block: u32,
    /// Blocks that a full node takes.
    pub blocks_per_node: u32,
    /// Nodes that fit.
    pub nodes: u64,
    /// Share of the range's addresses that no pod has when that many nodes are full, in percent.
    pub unused_percent: u32,
}

/// Answers the flags: reads the file that they name, if any.
pub fn run(args: &PlanArgs) -> anyhow::Result<String> {
    let question = match &args.from {
        None => args.question()?,
        Some(path) => {
            let text = if path.as_os_str() == "-" {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text).context("cannot read the standard input")?;
                text
            } else {
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?
            };
            cluster::question(&text, args, Timestamp::now())
                .with_context(|| format!("--from {}", path.display()))?
        }
    };
    let mut answer = answer(&question);
    if let Some(zones) = args.zones {
        answer.zones = zones::zones(&question, zones);
    }
    match args.output {
        Output::Text => Ok(text::render(&answer)),
        Output::Json => Ok(serde_json::to_string_pretty(&answer)?),
    }
}

/// Answers.
pub fn answer(question: &Question) -> Answer {
    let families = Family::ALL.into_iter().filter_map(|family| family_answer(question, family)).collect();
    Answer {
        nodes: question.nodes,
        pods_per_node: question.pods,
        resting: question.resting,
        months: question.months,
        families,
        problems: question.problems.clone(),
        zones: Vec::new(),
    }
}

fn family_answer(question: &Question, family: Family) -> Option<FamilyAnswer> {
    let ranges: Vec<&Range> = question.ranges.iter().filter(|range| range.range.family() == family).collect();
    let first = ranges.first()?;
    let supplies: Vec<Supply> = ranges.iter().map(|range| range.supply()).collect();
    let runs_out = runs_out(question, &supplies);
    Some(FamilyAnswer {
        family,
        nodes_that_fit: nodes_that_fit(&supplies, question.pods),
        sizes: sizes(first, question.pods),
        add: advise(question, &ranges, &supplies, &runs_out),
        runs_out,
        ranges: ranges.iter().map(|range| range.answer(question.pods)).collect(),
    })
}

impl Range {
    /// A range of which only `reserved` is not to be used.
    pub fn new(name: String, range: Block, prefix: u8, reserved: Vec<Block>) -> Range {
        let usable = usable(&range, prefix, &reserved);
        let per_node = DEFAULT_BLOCKS_PER_NODE;
        Range { name, range, prefix, reserved, usable, held: None, per_node, carves: true }
    }

    fn supply(&self) -> Supply {
        self.supply_of(self.prefix, self.usable)
    }

    /// What it would hold in blocks of that size.
    fn supply_of(&self, prefix: u8, blocks: u64) -> Supply {
        let min = u32::try_from(self.per_node.min).unwrap_or(1);
        Supply {
            capacity: capacity(&self.range, prefix),
            blocks,
            min: self.carves.then_some(min),
            max: u32::try_from(self.per_node.max).unwrap_or(0).max(min).max(1),
        }
    }

    fn answer(&self, pods: u32) -> RangeAnswer {
        let supply = self.supply();
        RangeAnswer {
            name: self.name.clone(),
            cidr: self.range,
            block_prefix_length: self.prefix,
            blocks: self.usable,
            held: self.held,
            pods_per_block: supply.capacity,
            max_blocks_per_node: supply.max,
            blocks_per_node: blocks_per_node(supply, pods),
        }
    }
}

/// Blocks of that size that can be used, as the operator's own pool has them.
pub fn usable(range: &Block, prefix: u8, reserved: &[Block]) -> u64 {
    let mut pool = Pool::new(*range, prefix);
    reserved.iter().for_each(|reserved| pool.take(reserved));
    pool.free()
}

/// The block size for a range that does not say: what `blockSizing: MaxPods` would choose.
pub fn choose_prefix(range: &Block, pods: u32) -> Option<u8> {
    prefix_for(range, pods).or_else(|| {
        // A node takes several blocks then: the largest that there are.
        block_prefixes(range).next()
    })
}

/// The sizes around the one that the range has.
fn sizes(range: &Range, pods_per_node: u32) -> Vec<SizeAnswer> {
    let near = range.prefix.saturating_sub(2)..=range.prefix.saturating_add(3);
    let addresses = 2f64.powi(i32::from(range.range.family().bits() - range.range.prefix_length()));
    let size = |prefix| {
        let supply = range.supply_of(prefix, usable(&range.range, prefix, &range.reserved));
        let nodes = nodes_that_fit(&[supply], pods_per_node);
        let pods = nodes as f64 * f64::from(pods_per_node);
        Some(SizeAnswer {
            block_prefix_length: prefix,
            chosen: prefix == range.prefix,
            blocks: supply.blocks,
            pods_per_block: supply.capacity,
            blocks_per_node: blocks_per_node(supply, pods_per_node)?,
            nodes,
            unused_percent: (100.0 - 100.0 * pods / addresses).round() as u32,
        })
    };
    block_prefixes(&range.range).filter(|prefix| near.contains(prefix)).filter_map(size).collect()
}
