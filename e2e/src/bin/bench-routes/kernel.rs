//! The routes of a node, seen from outside the contender.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use plat_e2e::testbed::output;

/// Nothing here takes longer unless it is broken.
pub const DEADLINE: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_micros(500);

/// When a block's route came and went last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// When it came.
    pub come: Option<Instant>,
    /// When it went.
    pub gone: Option<Instant>,
}

/// A namespace that is watched. What watches it ends with this.
pub struct Kernel {
    namespace: String,
    monitor: Child,
    /// One `ip` that deletes.
    hand: Child,
    commands: ChildStdin,
    seen: Arc<Mutex<BTreeMap<String, Seen>>>,
}

impl Kernel {
    /// Watches a namespace.
    pub fn of(namespace: &str) -> Result<Kernel> {
        let start = |args: &[&str], input: Stdio, out: Stdio| {
            let mut command = Command::new("setpriv");
            command.args(["--pdeathsig=KILL", "--", "ip", "-n", namespace]).args(args);
            command.stdin(input).stdout(out).stderr(Stdio::null()).spawn().context("cannot run ip")
        };
        let mut monitor = start(&["-o", "monitor", "route"], Stdio::null(), Stdio::piped())?;
        let mut hand = start(&["-force", "-batch", "-"], Stdio::piped(), Stdio::null())?;
        let commands = hand.stdin.take().context("ip has no input")?;
        let lines = BufReader::new(monitor.stdout.take().context("ip monitor has no output")?);
        let seen: Arc<Mutex<BTreeMap<String, Seen>>> = Arc::default();
        let noted = seen.clone();
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let now = Instant::now();
                let (gone, rest) = match line.strip_prefix("Deleted ") {
                    Some(rest) => (true, rest),
                    None => (false, line.as_str()),
                };
                // A route by a router: one of a block of another node.
                let Some((block, _)) = rest.split_once(" via ") else { continue };
                let mut seen = noted.lock().unwrap_or_else(PoisonError::into_inner);
                let seen = seen.entry(block.to_owned()).or_default();
                *(if gone { &mut seen.gone } else { &mut seen.come }) = Some(now);
            }
        });
        Ok(Kernel { namespace: namespace.to_owned(), monitor, hand, commands, seen })
    }

    /// What was seen of a block's route.
    pub fn seen(&self, block: &str) -> Seen {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(block).copied().unwrap_or_default()
    }

    /// Forgets what was seen.
    pub fn forget(&self) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// How many blocks' routes were seen to come and not to go since.
    fn there(&self) -> usize {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.values().filter(|seen| seen.come.is_some() && seen.come > seen.gone).count()
    }

    /// Waits until so many routes have been seen to come, and are there; when the last of them came.
    pub fn wait_for(&self, routes: usize) -> Result<Instant> {
        let begin = Instant::now();
        loop {
            if self.there() >= routes && self.count()? == routes {
                let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                return seen.values().filter_map(|seen| seen.come).max().context("no routes");
            }
            ensure!(begin.elapsed() < DEADLINE, "{} of {routes} routes after {DEADLINE:?}", self.count()?);
            std::thread::sleep(LOOK * 4);
        }
    }

    /// Waits until there are so many routes, by dumps.
    pub fn wait_for_count(&self, routes: usize) -> Result<()> {
        let begin = Instant::now();
        loop {
            let there = self.count()?;
            if there == routes {
                return Ok(());
            }
            ensure!(begin.elapsed() < DEADLINE, "{there} of {routes} routes after {DEADLINE:?}");
            std::thread::sleep(LOOK * 40);
        }
    }

    /// Waits until the block's route came after `since`.
    pub fn wait_come(&self, block: &str, since: Instant) -> Result<Instant> {
        let begin = Instant::now();
        loop {
            match self.seen(block).come {
                Some(come) if come >= since => return Ok(come),
                _ => ensure!(begin.elapsed() < DEADLINE, "no route to {block} after {DEADLINE:?}"),
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Routes to blocks of other nodes.
    pub fn count(&self) -> Result<usize> {
        let text =
            output(Command::new("ip").args(["-n", &self.namespace, "-4", "route", "show", "table", "main"]))?;
        Ok(text.lines().filter(|line| line.starts_with("10.") && line.contains(" via ")).count())
    }

    /// Deletes the route to a block.
    pub fn delete(&mut self, block: &str) -> Result<()> {
        Ok(self.commands.write_all(format!("route del {block}\n").as_bytes())?)
    }

    /// Deletes all routes to blocks, and what else contenders leave.
    pub fn clean(&self) -> Result<()> {
        for line in ["-4 route flush root 10.224.0.0/11", "-4 route flush type unreachable"] {
            let _nothing_there =
                output(Command::new("ip").args(["-n", &self.namespace]).args(line.split(' ')));
        }
        self.forget();
        Ok(())
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        for child in [&mut self.monitor, &mut self.hand] {
            let _ended = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// All system calls in a summary of `strace -c`.
pub fn calls(summary: &std::path::Path) -> Result<f64> {
    let text = fs::read_to_string(summary)?;
    let total = text
        .lines()
        .rfind(|line| line.trim_end().ends_with("total"))
        .context("no total in strace's summary")?;
    total
        .split_whitespace()
        .nth(3)
        .and_then(|calls| calls.parse().ok())
        .context("no number of calls in strace's summary")
}
