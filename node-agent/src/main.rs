//! The program: parse, log, connect, run.

use std::process::ExitCode;

use clap::Parser;
use plat_agent::args::{Cli, Command};
use plat_agent::{kernel, program, selftest};

fn main() -> ExitCode {
    let cli = Cli::parse();
    // One thread: an agent shall not weigh on its node.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name(kernel::events::THREAD_NAME)
        .max_blocking_threads(2)
        .build();
    let outcome = runtime.map_err(anyhow::Error::from).and_then(|runtime| match cli.command {
        None => runtime.block_on(program::run(cli.run)),
        Some(Command::Run(run)) => runtime.block_on(program::run(run)),
        Some(Command::Cleanup(cleanup)) => runtime.block_on(program::cleanup(cleanup)),
        Some(Command::Probe(probe)) => runtime.block_on(program::probe(probe)),
        Some(Command::Selftest(half)) => runtime.block_on(selftest::run(half)),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plat-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}
