//! `make bench`, the part about routes: how soon an agent has them, keeps them, and what that costs, beside flannel's
//! host-gw backend in the same namespace, on a real etcd and API server. Blocks and Node objects are made here; the node
//! is a network namespace. Prints a table, and writes one line of JSON per figure to `routes.json` in the folder that
//! it is given. Says on standard error what it does.
//!
//! | module | holds |
//! |---|---|
//! | [`goals`] | what is to be reached |
//! | [`contender`] | who is measured: its objects, and how it is started |
//! | [`kernel`] | the node's routes, by `ip monitor` and /proc |
//! | [`scenarios`] | what is measured of a contender |
//! | [`traffic`] | throughput between pods, and between bare namespaces |

mod contender;
mod goals;
mod kernel;
mod scenarios;
mod traffic;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use plat_rig::figures::publish;

/// Measures what routes cost.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// The agent, built for release.
    #[arg(long)]
    agent: PathBuf,
    /// The CNI binary, built for release.
    #[arg(long)]
    plugin: PathBuf,
    /// flannel with its host-gw backend, of e2e/tools/flannel.
    #[arg(long)]
    flannel: PathBuf,
    /// Folder for the figures.
    #[arg(long)]
    out: PathBuf,
    /// Numbers of nodes, from few to many; without any only traffic is measured.
    #[arg(long, env = "BENCH_ROUTES_NODES", value_delimiter = ',', num_args = 0.., default_value = "500,2000,5000")]
    nodes: Vec<usize>,
    /// Cold starts at each of them.
    #[arg(long, env = "BENCH_ROUTES_STARTS", default_value_t = 3)]
    starts: usize,
    /// Nodes that join one after the other at each of them.
    #[arg(long, env = "BENCH_ROUTES_JOINS", default_value_t = 50)]
    joins: usize,
    /// Routes that are deleted one after the other at the largest. More than 80 within 20 s are taken for a fight.
    #[arg(long, env = "BENCH_ROUTES_REPAIRS", default_value_t = 100)]
    repairs: usize,
    /// Nodes that leave, while as many others come, at the largest.
    #[arg(long, env = "BENCH_ROUTES_CHURN", default_value_t = 1000)]
    churn: usize,
    /// For how many seconds the processor time at rest is counted.
    #[arg(long, env = "BENCH_ROUTES_SECONDS", default_value_t = 15)]
    seconds: u64,
    /// Agents, each on a node of its own, that all learn of a node that joins.
    #[arg(long, env = "BENCH_ROUTES_AGENTS", default_value_t = 16)]
    agents: u8,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut figures = if args.nodes.is_empty() { Vec::new() } else { scenarios::all(&args)? };
    figures.extend(traffic::all(&args)?);
    Ok(publish(&figures, &args.out.join("routes.json"))?)
}

/// A line of progress.
fn say(text: &str) {
    eprintln!("bench: {text}");
}
