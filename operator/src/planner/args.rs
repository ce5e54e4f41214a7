//! Flags of `plat-operator plan`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use plat_crds::cluster_cidr::{BlocksPerNode, DEFAULT_BLOCKS_PER_NODE, DEFAULT_QUARANTINE_SECONDS};
use plat_crds::{Block, Family};

use super::growth::{Growth, Rate};
use super::{Question, Range, choose_prefix};
use crate::plan::ranges::default_name;
use crate::sizing::{KUBELET_MAX_PODS, block_prefixes};

/// How the answer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// What to plan.
#[derive(Clone, Debug, Args)]
pub struct PlanArgs {
    /// Range of pod addresses, such as 10.244.0.0/16, or with the prefix length of its blocks,
    /// 10.244.0.0/16:25. Without that the smallest block with room for a full node is taken, as by
    /// blockSizing: MaxPods. Repeat it, or separate by commas, in the order of use. Default: 10.244.0.0/16; with
    /// --from: ranges that would be added.
    #[arg(long, value_delimiter = ',', value_name = "CIDR[:BITS]")]
    pub cluster_cidr: Vec<String>,

    /// Part of a range that is never handed out. Repeat it, or separate by commas.
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    pub reserved: Vec<String>,

    /// Nodes. Default: 100; with --from: those of the cluster. At most 1000000.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub nodes: Option<u32>,

    /// Pods on each node. Default: 110, which is what kubelets allow; with --from: what the largest node allows.
    /// At most 65000.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=65_000))]
    pub pods_per_node: Option<u32>,

    /// Nodes that come in a month, as a number or in percent (20 or 5%). With --from: at the pace that the
    /// operator has seen.
    #[arg(long, value_name = "RATE")]
    pub node_growth_per_month: Option<Rate>,

    /// Pods that each node gains in a month, as a number or in percent.
    #[arg(long, value_name = "RATE")]
    pub pod_growth_per_month: Option<Rate>,

    /// Nodes that are replaced in a day by others of new names: their blocks rest for the quarantine.
    #[arg(long, value_name = "NUMBER", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub churn: u32,

    /// Quarantine of the ranges, in seconds. 60 to 604800.
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_QUARANTINE_SECONDS, value_parser = clap::value_parser!(i32).range(60..=604_800))]
    pub quarantine: i32,

    /// Blocks of one family that a node gets from the start. 1 to 16; with --from: for ranges that would be added.
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULT_BLOCKS_PER_NODE.min, value_parser = clap::value_parser!(i32).range(1..=16))]
    pub min_blocks_per_node: i32,

    /// Blocks of one family that a node gets at most. 1 to 16, and no less than --min-blocks-per-node; with --from:
    /// for ranges that would be added.
    #[arg(long, value_name = "NUMBER", default_value_t = DEFAULT_BLOCKS_PER_NODE.max, value_parser = clap::value_parser!(i32).range(1..=16))]
    pub max_blocks_per_node: i32,

    /// Zones (racks, rooms) that the nodes are in: shows how their blocks scatter over half a year of nodes that
    /// join and leave, with and without a topologyKey. 1 to 1000.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub zones: Option<u32>,

    /// Range of Services: no range may touch it. Repeat it, or separate by commas.
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    pub service_cidr: Vec<String>,

    /// Network of the nodes: no range may touch it. Repeat it, or separate by commas.
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    pub node_cidr: Vec<String>,

    /// How far ahead to look, in months. 1 to 120.
    #[arg(long, value_name = "NUMBER", default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=120))]
    pub months: u32,

    /// Start from a cluster as it is: the file that
    /// `kubectl get nodes,clustercidrs,podcidrs,nodenetworks -o json` wrote, or - for the standard input.
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,

    /// How the answer looks.
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Output,
}

/// Range that is planned with if none is given.
const DEFAULT_RANGE: &str = "10.244.0.0/16";
const DEFAULT_NODES: u32 = 100;

impl PlanArgs {
    /// The question that the flags alone ask; an error names the flag.
    pub fn question(&self) -> anyhow::Result<Question> {
        let pods = self.pods(KUBELET_MAX_PODS);
        let avoid = self.avoid()?;
        let mut ranges = self.ranges(pods)?;
        if ranges.is_empty() {
            ranges = self.parse_ranges(&[DEFAULT_RANGE.to_owned()], pods)?;
        }
        self.check(&ranges, &avoid)?;
        Ok(Question {
            nodes: u64::from(self.nodes.unwrap_or(DEFAULT_NODES)),
            pods,
            resting: self.resting(self.quarantine),
            growth: self.growth(Rate::None),
            months: self.months,
            ranges,
            avoid: avoid.into_iter().map(|(_, block)| block).collect(),
            problems: Vec::new(),
        })
    }

    /// Pods of a node; `pods` is what is known without the flags.
    pub fn pods(&self, pods: u32) -> u32 {
        self.pods_per_node.unwrap_or(pods)
    }

    fn per_node(&self) -> anyhow::Result<BlocksPerNode> {
        let (min, max) = (self.min_blocks_per_node, self.max_blocks_per_node);
        if min > max {
            bail!("--min-blocks-per-node {min} is more than --max-blocks-per-node {max}: raise the latter");
        }
        Ok(BlocksPerNode { min, max })
    }

    /// How the cluster grows; `nodes` is what is known without the flags.
    pub fn growth(&self, nodes: Rate) -> Growth {
        Growth {
            nodes: self.node_growth_per_month.unwrap_or(nodes),
            pods: self.pod_growth_per_month.unwrap_or_default(),
        }
    }

    /// Nodes whose blocks rest at any moment, rounded up.
    pub fn resting(&self, quarantine_seconds: i32) -> u64 {
        let seconds = u64::try_from(quarantine_seconds).unwrap_or(0);
        (u64::from(self.churn) * seconds).div_ceil(24 * 60 * 60)
    }

    /// The ranges of `--cluster-cidr`.
    pub fn ranges(&self, pods: u32) -> anyhow::Result<Vec<Range>> {
        self.parse_ranges(&self.cluster_cidr, pods)
    }

    /// What no range may touch, with the flag that says so.
    pub fn avoid(&self) -> anyhow::Result<Vec<(&'static str, Block)>> {
        let flags = [("--service-cidr", &self.service_cidr), ("--node-cidr", &self.node_cidr)];
        let texts = flags.into_iter().flat_map(|(flag, texts)| texts.iter().map(move |text| (flag, text)));
        texts.map(|(flag, text)| Ok((flag, text.trim().parse().context(flag)?))).collect()
    }

    fn parse_ranges(&self, texts: &[String], pods: u32) -> anyhow::Result<Vec<Range>> {
        let reserved: Vec<Block> = self
            .reserved
            .iter()
            .map(|text| text.trim().parse().context("--reserved"))
            .collect::<anyhow::Result<_>>()?;
        let per_node = self.per_node()?;
        let mut ranges: Vec<Range> = Vec::new();
        for text in texts.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
            let (range, prefix) = parse_range(text, pods).context("--cluster-cidr")?;
            let stem = match range.family() {
                Family::IPv4 => "v4",
                Family::IPv6 => "v6",
            };
            let number = ranges.iter().filter(|other| other.range.family() == range.family()).count();
            let name = match number {
                0 => default_name(range.family()).to_owned(),
                _ => format!("pods-{stem}-{}", number + 1),
            };
            let inside = reserved.iter().copied().filter(|reserved| range.overlaps(reserved)).collect();
            ranges.push(Range { per_node, ..Range::new(name, range, prefix, inside) });
        }
        Ok(ranges)
    }

    fn check(&self, ranges: &[Range], avoid: &[(&'static str, Block)]) -> anyhow::Result<()> {
        for (index, range) in ranges.iter().enumerate() {
            if let Some(other) = ranges.iter().take(index).find(|other| other.range.overlaps(&range.range)) {
                bail!(
                    "--cluster-cidr: {} and {} share addresses; give each address to one range",
                    other.range,
                    range.range
                );
            }
            if let Some((flag, other)) = avoid.iter().find(|(_, other)| other.overlaps(&range.range)) {
                bail!(
                    "--cluster-cidr: {} shares addresses with {flag} {other}; use a range that nothing else uses",
                    range.range
                );
            }
        }
        Ok(())
    }
}

/// `CIDR` or `CIDR:BITS`.
fn parse_range(text: &str, pods: u32) -> anyhow::Result<(Block, u8)> {
    // An IPv6 address has colons too: only one behind the slash counts.
    let length = text.rfind('/').map_or(0, |slash| slash + 1);
    let (cidr, bits) = match text.get(length..).and_then(|length| length.split_once(':')) {
        Some((_, bits)) => (text.trim_end_matches(bits).trim_end_matches(':'), Some(bits)),
        None => (text, None),
    };
    let range: Block = cidr.parse()?;
    let allowed = block_prefixes(&range);
    let (first, last) = (*allowed.start(), *allowed.end());
    if first > last {
        bail!("{range} is too small for blocks: use a larger range");
    }
    let prefix = match bits {
        Some(bits) => bits.parse().ok().filter(|bits| allowed.contains(bits)).with_context(|| {
            format!("'{bits}' is no block size for {range}: give a prefix length from {first} to {last}")
        })?,
        None => choose_prefix(&range, pods).unwrap_or(first),
    };
    Ok((range, prefix))
}
