//! `plat-operator`: see the library's head for what it does.

use std::process::ExitCode;

use clap::Parser;
use plat_operator::args::{Cli, Command, LogFormat, RunArgs};
use plat_operator::{http, planner, run};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::error;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let Cli { command, run } = Cli::parse();
    match command {
        Some(Command::Probe { question, socket }) => {
            ended(http::probe(&socket, question.path()).map(|text| println!("{text}")))
        }
        Some(Command::Plan(args)) => ended(planner::run(&args).map(|text| println!("{}", text.trim_end()))),
        None => match start_log(&run) {
            Err(error) => ended(Err(error)),
            // From here on the log says it.
            Ok(()) => match start(run) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    error!(error = format!("{error:#}"), "ending");
                    ExitCode::FAILURE
                }
            },
        },
    }
}

fn ended(done: anyhow::Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plat-operator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(args: &RunArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(directives(&args.log_level))
        .map_err(|error| anyhow::anyhow!("--log-level '{}': {error}", args.log_level))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_target(false);
    match args.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    Ok(())
}

fn start(args: RunArgs) -> anyhow::Result<()> {
    // One thread: the work is waiting for the API server, and every thread would keep memory of its own.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let told = stop.clone();
        tokio::spawn(async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            told.cancel();
        });
        run::run(args, stop).await
    })
}

/// A plain level leaves the client library out: it calls every refused connection an error, and what failed
/// is said by us, with what it means.
fn directives(level: &str) -> String {
    match level {
        "error" | "warn" | "info" => format!("{level},kube_client=off,kube_runtime=off"),
        other => other.to_owned(),
    }
}
