//! Who gives pods their network, and how long a call takes from start to end of the program, as the
//! runtime sees it.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Result;

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
        }
    }
}

/// Something that gives pods their network.
#[derive(Clone, Debug)]
pub struct Contender {
    /// Name, as figures show it.
    pub name: &'static str,
    /// Start of the names of its pods and links: a few letters.
    pub prefix: &'static str,
    /// What it is.
    pub kind: Kind,
}

/// What gives the network.
#[derive(Clone, Debug)]
pub enum Kind {
    /// CNI plugins in a chain: program and configuration of each. The texts `PORT0` and `PORT1` in a configuration
    /// become numbers of the pod's own.
    Plugins(Vec<(PathBuf, Value)>),
    /// The floor: program, bridge, and the /16 that addresses are from, as its first two numbers.
    Floor(PathBuf, &'static str, &'static str),
}

impl Contender {
    /// Name of pod `number`, its namespace and its container.
    pub fn pod(&self, number: usize) -> String {
        format!("{}{number}", self.prefix)
    }

    /// Gives a pod its network or takes it, and says how long that took.
    pub fn call(&self, verb: Verb, number: usize) -> Result<Duration> {
        match &self.kind {
            Kind::Plugins(chain) => self.call_chain(chain, verb, number),
            Kind::Floor(program, bridge, net) => {
                let (begin, out) = finish(self.floor(program, bridge, net, verb, number), None)?;
                self.check(verb, &out)?;
                Ok(begin.elapsed())
            }
        }
    }

    /// As the runtime does: each plugin gets the result of the one before it, and DEL goes backwards.
    fn call_chain(&self, chain: &[(PathBuf, Value)], verb: Verb, number: usize) -> Result<Duration> {
        let mut took = Duration::ZERO;
        let mut previous = Value::Null;
        let in_order: Vec<&(PathBuf, Value)> = match verb {
            Verb::Add => chain.iter().collect(),
            Verb::Del => chain.iter().rev().collect(),
        };
        for (program, conf) in in_order {
            let mut conf = conf.clone();
            if let (Value::Object(conf), false) = (&mut conf, previous.is_null()) {
                conf.insert("prevResult".to_owned(), previous);
            }
            let (begin, out) = finish(self.plugin(program, verb, number), Some(text_for(&conf, number)))?;
            took += begin.elapsed();
            self.check(verb, &out)?;
            previous = serde_json::from_slice(&out.stdout).unwrap_or_default();
        }
        Ok(took)
    }

    fn check(&self, verb: Verb, out: &std::process::Output) -> Result<()> {
        if out.status.success() {
            return Ok(());
        }
        let said = [out.stdout.as_slice(), out.stderr.as_slice()].concat();
        Err(format!("{} {} failed: {}", self.name, verb.name(), String::from_utf8_lossy(&said)).into())
    }

    fn plugin(&self, program: &Path, verb: Verb, number: usize) -> Command {
        let pod = self.pod(number);
        let folder = program.parent().map(Path::to_owned).unwrap_or_default();
        let mut command = Command::new(program);
        command.env_clear().env("CNI_COMMAND", verb.name()).env("CNI_CONTAINERID", &pod);
        command.env("CNI_NETNS", format!("/run/netns/{pod}")).env("CNI_IFNAME", "eth0");
        command.env("CNI_PATH", folder).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    fn floor(&self, program: &Path, bridge: &str, net: &str, verb: Verb, number: usize) -> Command {
        let pod = self.pod(number);
        let mut command = Command::new(program);
        match verb {
            Verb::Add => {
                let address = format!("{net}.{}.{}", 1 + number / 200, 2 + number % 200);
                command.args(["add", &format!("/run/netns/{pod}"), &pod, bridge, &address])
            }
            Verb::Del => command.args(["del", &pod]),
        };
        command
    }

    /// The most memory that an ADD of pod `number` had at any time, in MiB, over all programs of the chain.
    ///
    /// The program finds its standard output full, so it stops in the middle of writing its result: there
    /// its own peak can be read.
    pub fn peak_memory(&self, number: usize) -> Result<f64> {
        let Kind::Plugins(chain) = &self.kind else { return Ok(0.0) };
        let [(program, conf)] = chain.as_slice() else { return Err("a chain has no one peak".into()) };
        let (mut reader, mut writer) = io::pipe()?;
        writer.write_all(&[0; PIPE])?;
        let mut command = self.plugin(program, Verb::Add, number);
        let mut child = command.stdin(Stdio::piped()).stdout(writer).stderr(Stdio::null()).spawn()?;
        // Our copy of the pipe's other end goes with the command.
        drop(command);
        feed(child.stdin.take(), text_for(conf, number))?;
        let peak = stopped_peak(&child);
        let mut out = Vec::new();
        reader.read_to_end(&mut out)?;
        if !child.wait()?.success() {
            let said = String::from_utf8_lossy(out.get(PIPE..).unwrap_or_default()).into_owned();
            return Err(format!("{} ADD failed: {said}", self.name).into());
        }
        peak
    }
}

/// A configuration's text for pod `number`.
fn text_for(conf: &Value, number: usize) -> String {
    let port = |n: usize| (10_000 + 2 * number + n).to_string();
    conf.to_string().replace("\"PORT0\"", &port(0)).replace("\"PORT1\"", &port(1))
}

/// What a pipe holds by default.
const PIPE: usize = 65_536;

/// The peak of a program once it waits for its output to be read.
fn stopped_peak(child: &Child) -> Result<f64> {
    let proc = PathBuf::from(format!("/proc/{}", child.id()));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !writes_output(&proc)? {
        if Instant::now() > deadline {
            return Err("the program does not come to write its result".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let status = std::fs::read_to_string(proc.join("status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: Option<f64> = peak.and_then(|p| p.trim().strip_suffix(" kB")?.parse().ok());
    kib.map(|kib| kib / 1024.0).ok_or_else(|| "the kernel does not say how much memory it used".into())
}

/// Whether a thread of the program is in a write to standard output: `write` is 1 on x86-64 and 64 on
/// aarch64.
fn writes_output(proc: &Path) -> Result<bool> {
    for thread in std::fs::read_dir(proc.join("task"))? {
        let call = std::fs::read_to_string(thread?.path().join("syscall")).unwrap_or_default();
        if call.starts_with("1 0x1 ") || call.starts_with("64 0x1 ") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Runs a program to its end; returns when it was started, too.
fn finish(mut command: Command, input: Option<String>) -> Result<(Instant, std::process::Output)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let begin = Instant::now();
    let mut child = command.spawn()?;
    feed(child.stdin.take(), input.unwrap_or_default())?;
    Ok((begin, child.wait_with_output()?))
}

fn feed(stdin: Option<ChildStdin>, input: String) -> Result<()> {
    match stdin {
        Some(mut stdin) => Ok(stdin.write_all(input.as_bytes())?),
        None => Ok(()),
    }
}
