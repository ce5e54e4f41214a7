//! The program: parse, log, connect, run.

use std::process::ExitCode;

use clap::Parser;
use plat_agent::args::{Check, Cli, Command, Explain};
use plat_agent::explain::{self, Answer};
use plat_agent::{check, kernel, program, selftest};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        None => block_on(program::run(cli.run)),
        Some(Command::Run(run)) => block_on(program::run(run)),
        Some(Command::Cleanup(cleanup)) => block_on(program::cleanup(cleanup)),
        Some(Command::Probe(probe)) => block_on(program::probe(probe)),
        Some(Command::Check(check)) => return checked(&check),
        Some(Command::Explain(explain)) => return explained(&explain),
        Some(Command::Selftest(half)) => block_on(selftest::run(half)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error, ExitCode::FAILURE),
    }
}

/// One thread: an agent shall not weigh on its node.
fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name(kernel::events::THREAD_NAME)
        .max_blocking_threads(2)
        .build()?;
    runtime.block_on(work)
}

/// What was found is told apart from what could not be looked at.
fn checked(check: &Check) -> ExitCode {
    match check::run(check) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(error) => failed(&error, ExitCode::from(2)),
    }
}

fn explained(explain: &Explain) -> ExitCode {
    match explain::run(explain) {
        Ok(Answer::Fits) => ExitCode::SUCCESS,
        Ok(Answer::Differs) => ExitCode::from(1),
        Err(error) => failed(&error, ExitCode::from(2)),
    }
}

fn failed(error: &anyhow::Error, code: ExitCode) -> ExitCode {
    eprintln!("plat-agent: {error:#}");
    code
}
