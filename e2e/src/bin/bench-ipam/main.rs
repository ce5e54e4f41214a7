//! `make bench`, the part about blocks: how soon nodes get theirs, from the operator and from
//! kube-controller-manager's node IPAM controller, on a real etcd and API server in one run; and what that
//! costs. Nodes are Node objects; agents are imitated by their reports.
//!
//! Each contender meets a control plane of its own, with an empty etcd on a tmpfs. Prints a table, and writes
//! one line of JSON per figure to `ipam.json` in the folder that it is given. Says on standard error what it does.
//!
//! | module | holds |
//! |---|---|
//! | [`goals`] | what is to be reached |
//! | [`contender`] | who is measured, as a process |
//! | [`stage`] | a control plane with nodes, imitated agents, and a watch of who has got a block |
//! | [`objects`] | Node objects and reports |
//! | [`scenarios`] | what is measured |

mod contender;
mod goals;
mod objects;
mod scenarios;
mod stage;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use plat_rig::figures::publish;

/// Measures what blocks cost.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// The operator, built for release.
    #[arg(long)]
    operator: PathBuf,
    /// Folder for the figures.
    #[arg(long)]
    out: PathBuf,
    /// Numbers of nodes, from few to many. All that is measured in a large cluster is in one of the last size.
    #[arg(long, env = "BENCH_IPAM_NODES", value_delimiter = ',', default_value = "500,2000,5000")]
    nodes: Vec<usize>,
    /// Up to so many nodes the node IPAM controller is also measured with its default limits: it does 20 a second.
    #[arg(long, env = "BENCH_IPAM_THROTTLED", default_value_t = 500)]
    throttled: usize,
    /// Nodes that join one after the other in the large cluster.
    #[arg(long, env = "BENCH_IPAM_TRICKLE", default_value_t = 20)]
    trickle: usize,
    /// Nodes that leave, while as many others come, in the large cluster.
    #[arg(long, env = "BENCH_IPAM_CHURN", default_value_t = 1000)]
    churn: usize,
    /// For how many seconds what an agent receives is counted, and as long the processor time at rest.
    #[arg(long, env = "BENCH_IPAM_SECONDS", default_value_t = 15)]
    seconds: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let figures = scenarios::all(&args)?;
    Ok(publish(&figures, &args.out.join("ipam.json"))?)
}

/// A line of progress.
fn say(text: &str) {
    eprintln!("bench: {text}");
}
