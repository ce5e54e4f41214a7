//! `make bench`: what ADD and DEL cost, against the reference plugins and against the floor, in one run on
//! one machine, taking turns, so that whatever disturbs the machine disturbs all alike.
//!
//! Everything happens in a mount and network namespace of its own. Prints a table, and writes one line of
//! JSON per figure to `cni.json` in the folder that it is given.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use clap::Parser;
use plat_crds::blocks_file::{BLOCKS_FILE_VERSION, BlocksFile, HeldBlock};
use plat_crds::names;
use plat_rig::figures::{Figure, Unit, median, table};
use rustix::time::{ClockId, clock_gettime};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Measures CNI ADD and DEL.
#[derive(Clone, Parser)]
struct Args {
    /// The CNI binary, built for release.
    #[arg(long)]
    plat: PathBuf,
    /// The floor, built for release.
    #[arg(long)]
    floor: PathBuf,
    /// Folder of the reference plugins.
    #[arg(long)]
    reference: PathBuf,
    /// Folder for the figures.
    #[arg(long)]
    out: PathBuf,
    /// Pods per contender, one after the other.
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// Rounds of 100 pods at once, per contender.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Set by the program itself once it is in its own namespaces.
    #[arg(long, hide = true)]
    inside: bool,
}

/// Pods that are added at once.
const AT_ONCE: usize = 100;

fn main() -> Result<()> {
    let args = Args::parse();
    if !args.inside {
        return enter();
    }
    prepare()?;
    let contenders = contenders(&args)?;
    let mut figures = one_by_one(&contenders, args.pods)?;
    figures.extend(at_once(&contenders, args.rounds)?);
    print!("{}", table(&figures));
    let mut lines = String::new();
    for figure in &figures {
        writeln!(lines, "{}", serde_json::to_string(figure)?)?;
    }
    fs::create_dir_all(&args.out)?;
    fs::write(args.out.join("cni.json"), lines)?;
    Ok(())
}

/// Runs this program again in namespaces of its own, which end with it.
fn enter() -> Result<()> {
    let status = Command::new("unshare")
        .args(["--mount", "--net", "--propagation", "private", "--"])
        .arg(env::current_exe()?)
        .args(env::args_os().skip(1))
        .arg("--inside")
        .status()?;
    if status.success() { Ok(()) } else { Err(format!("the measurement failed: {status}").into()) }
}

/// Makes the namespace a node: its own /run and /var/lib/cni, forwarding on.
fn prepare() -> Result<()> {
    for folder in ["/run", "/var/lib/cni"] {
        fs::create_dir_all(folder)?;
        run(Command::new("mount").args(["-t", "tmpfs", "tmpfs", folder]))?;
    }
    run(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    fs::create_dir_all(names::RUN_DIR)?;
    let blocks = BlocksFile {
        version: BLOCKS_FILE_VERSION,
        node: "bench".to_owned(),
        boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned(),
        lease_until: boot_time_ms() + 3_600_000,
        last_contact: "2026-01-01T00:00:00Z".to_owned(),
        mtu: None,
        blocks: vec![HeldBlock { cidr: "10.10.0.0/16".parse()?, lease: true }],
    };
    fs::write(Path::new(names::RUN_DIR).join(names::BLOCKS_FILE), serde_json::to_vec(&blocks)?)?;
    run(Command::new("ip").args(["link", "add", "cni2", "type", "bridge"]))?;
    run(Command::new("ip").args(["addr", "add", "10.30.0.1/16", "dev", "cni2"]))?;
    run(Command::new("ip").args(["link", "set", "cni2", "up"]))
}

fn boot_time_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

/// Something that gives pods their network.
struct Contender {
    name: &'static str,
    kind: Kind,
}

enum Kind {
    /// A CNI plugin: program, folder for CNI_PATH, configuration.
    Plugin { program: PathBuf, folder: PathBuf, conf: String },
    /// The floor.
    Floor(PathBuf),
}

/// Plat, the reference, the floor, in this order.
fn contenders(args: &Args) -> Result<[Contender; 3]> {
    let folder = |program: &Path| program.parent().map(Path::to_owned).unwrap_or_default();
    let plat = serde_json::json!({
        "cniVersion": "1.0.0", "name": names::CNI_NETWORK, "type": names::CNI_TYPE, "bridge": "cni0",
        "runDir": names::RUN_DIR, "ipam": {"type": names::CNI_TYPE},
    });
    let reference = serde_json::json!({
        "cniVersion": "1.0.0", "name": "reference", "type": "bridge", "bridge": "cni1", "isGateway": true,
        "ipam": {"type": "host-local", "dataDir": "/run/host-local",
            "ranges": [[{"subnet": "10.20.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]},
    });
    Ok([
        Contender {
            name: "plat",
            kind: Kind::Plugin {
                folder: folder(&args.plat),
                program: args.plat.clone(),
                conf: plat.to_string(),
            },
        },
        Contender {
            name: "bridge+host-local",
            kind: Kind::Plugin {
                program: args.reference.join("bridge"),
                folder: args.reference.clone(),
                conf: reference.to_string(),
            },
        },
        Contender { name: "netlink floor", kind: Kind::Floor(args.floor.clone()) },
    ])
}

impl Contender {
    /// Gives pod `number` its network, or takes it, and says how long that took from start to end of the
    /// program, as the runtime sees it.
    fn call(&self, verb: &str, number: usize) -> Result<Duration> {
        let pod = self.pod(number);
        let mut command = match &self.kind {
            Kind::Plugin { program, folder, .. } => {
                let mut command = Command::new(program);
                command.env_clear().env("CNI_COMMAND", verb).env("CNI_CONTAINERID", &pod);
                command.env("CNI_NETNS", format!("/run/netns/{pod}")).env("CNI_IFNAME", "eth0");
                command.env("CNI_PATH", folder).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
                command
            }
            Kind::Floor(program) => {
                let mut command = Command::new(program);
                if verb == "ADD" {
                    let address = format!("10.30.{}.{}", 1 + number / 200, 2 + number % 200);
                    command.args(["add", &format!("/run/netns/{pod}"), &pod, "cni2", &address]);
                } else {
                    command.args(["del", &pod]);
                }
                command
            }
        };
        let begin = Instant::now();
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take();
        if let (Kind::Plugin { conf, .. }, Some(mut stdin)) = (&self.kind, stdin) {
            std::io::Write::write_all(&mut stdin, conf.as_bytes())?;
        }
        let out = child.wait_with_output()?;
        let took = begin.elapsed();
        if !out.status.success() {
            let said = [out.stdout, out.stderr].concat();
            return Err(format!("{} {verb} failed: {}", self.name, String::from_utf8_lossy(&said)).into());
        }
        Ok(took)
    }

    fn pod(&self, number: usize) -> String {
        format!("{}{number}", self.name.get(..2).unwrap_or_default())
    }
}

/// Adds and deletes pods one by one, the contenders taking turns. All pods stay until the last is added.
fn one_by_one(contenders: &[Contender; 3], pods: usize) -> Result<Vec<Figure>> {
    let mut took = [const { (Vec::new(), Vec::new()) }; 3];
    for contender in contenders {
        make_namespaces(contender, pods)?;
    }
    for number in 0..pods {
        for turn in 0..3 {
            let at = (number + turn) % 3;
            if let (Some(contender), Some((adds, _))) = (contenders.get(at), took.get_mut(at)) {
                adds.push(milliseconds(contender.call("ADD", number)?));
            }
        }
    }
    for number in 0..pods {
        for turn in 0..3 {
            let at = (number + turn) % 3;
            if let (Some(contender), Some((_, dels))) = (contenders.get(at), took.get_mut(at)) {
                dels.push(milliseconds(contender.call("DEL", number)?));
            }
        }
    }
    for contender in contenders {
        remove_namespaces(contender, pods)?;
    }
    let [plat, reference, floor] = took.map(|(adds, dels)| (median(adds), median(dels)));
    let figure =
        |name, ours, peer: &Contender, theirs| Figure::new(name, ours, peer.name, theirs, Unit::Milliseconds);
    let [_, the_reference, the_floor] = contenders;
    Ok(vec![
        figure("CNI ADD", plat.0, the_reference, reference.0),
        figure("CNI ADD", plat.0, the_floor, floor.0),
        figure("CNI DEL", plat.1, the_reference, reference.1),
        figure("CNI DEL", plat.1, the_floor, floor.1),
    ])
}

/// Adds 100 pods at once, the contenders taking turns.
fn at_once(contenders: &[Contender; 3], rounds: usize) -> Result<Vec<Figure>> {
    let mut rates = [const { Vec::new() }; 3];
    for round in 0..rounds {
        for turn in 0..3 {
            let at = (round + turn) % 3;
            let (Some(contender), Some(rates)) = (contenders.get(at), rates.get_mut(at)) else { continue };
            make_namespaces(contender, AT_ONCE)?;
            let begin = Instant::now();
            all_pods(|number| contender.call("ADD", number).map(drop))?;
            rates.push(AT_ONCE as f64 / begin.elapsed().as_secs_f64());
            all_pods(|number| contender.call("DEL", number).map(drop))?;
            remove_namespaces(contender, AT_ONCE)?;
        }
    }
    let [plat, reference, floor] = rates.map(median);
    let [_, the_reference, the_floor] = contenders;
    let name = "100 CNI ADDs at once";
    Ok(vec![
        Figure::new(name, plat, the_reference.name, reference, Unit::PerSecond),
        Figure::new(name, plat, the_floor.name, floor, Unit::PerSecond),
    ])
}

fn all_pods(call: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let call = &call;
    thread::scope(|scope| {
        let calls: Vec<_> = (0..AT_ONCE).map(|number| scope.spawn(move || call(number))).collect();
        calls.into_iter().try_for_each(|call| call.join().map_err(|_| "a thread panicked")?)
    })
}

fn make_namespaces(contender: &Contender, pods: usize) -> Result<()> {
    (0..pods).try_for_each(|number| run(Command::new("ip").args(["netns", "add", &contender.pod(number)])))
}

fn remove_namespaces(contender: &Contender, pods: usize) -> Result<()> {
    (0..pods).try_for_each(|number| run(Command::new("ip").args(["netns", "del", &contender.pod(number)])))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn run(command: &mut Command) -> Result<()> {
    let out = command.output()?;
    if out.status.success() {
        return Ok(());
    }
    Err(format!("{command:?} failed: {}", String::from_utf8_lossy(&out.stderr)).into())
}
