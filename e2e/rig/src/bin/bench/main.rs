//! `make bench`: what ADD and DEL cost, against the reference plugins and against the floor, in one run on
//! one machine, taking turns, so that whatever disturbs the machine disturbs all alike.
//!
//! Everything happens in a mount and network namespace of its own. Prints a table, and writes one line of
//! JSON per figure to `cni.json` in the folder that it is given.
//!
//! | module | holds |
//! |---|---|
//! | [`contender`] | who is measured, and how a call is timed |
//! | [`node`] | namespaces, folders and lease stores to measure with |
//! | [`scenarios`] | what is measured |

mod contender;
mod node;
mod scenarios;

use std::path::PathBuf;

use clap::Parser;
use plat_rig::figures::publish;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Measures CNI ADD and DEL.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// The CNI binary, built for release.
    #[arg(long)]
    plat: PathBuf,
    /// Another build of it, to compare with; then nothing else is compared.
    #[arg(long)]
    other: Option<PathBuf>,
    /// The floor, built for release, and static as the CNI binary is.
    #[arg(long)]
    floor: PathBuf,
    /// Folder of the reference plugins.
    #[arg(long)]
    reference: PathBuf,
    /// Folder for the figures.
    #[arg(long)]
    out: PathBuf,
    /// Pods per contender, one after the other.
    #[arg(long, default_value_t = 150)]
    pods: usize,
    /// Rounds of 100 pods at once, per contender.
    #[arg(long, default_value_t = 6)]
    rounds: usize,
    /// Set by the program itself once it is in its own namespaces.
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if !args.inside {
        return node::enter();
    }
    let figures = match &args.other {
        Some(other) => scenarios::two_builds(&args, other)?,
        None => scenarios::all(&args)?,
    };
    Ok(publish(&figures, &args.out.join("cni.json"))?)
}
