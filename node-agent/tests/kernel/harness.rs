//! A node for one test: a namespace with an uplink, an agent in it, and words to ask what there is.

use std::collections::BTreeSet;
use std::io::{Read, Seek};
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use plat_agent::conf::Provider;
use plat_agent::desired::Me;
use plat_agent::facts::{BlockFact, RangeFact};
use plat_agent::node::Settings;
use plat_agent::objects::{Ask, Change, Contact, Objects};
use plat_agent::probe::prober;
use plat_agent::probe::schedule::Pace;
use plat_agent::readiness::Readiness;
use plat_agent::reconcile::{self, Ended, Links, Pulse};
use plat_agent::reporter::Report;
use plat_agent::vxlan::Network;
use plat_cni::boot::{self, BootId};
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::store::{Locked, Missing, Store};
use plat_crds::block::Block;
use plat_crds::cluster_cidr::MasqueradeMode;
use plat_crds::lease::Datapath;
use plat_crds::pod_cidr::BlockState;
use plat_crds::selector::Labels;
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Waiting is polling with this deadline. Generous: the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(20);
/// The port of probes.
pub const PROBE_PORT: u16 = 8474;
/// No test takes longer.
const TEST_LIMIT: Duration = Duration::from_secs(300);
const MARK: &str = "PLAT_AGENT_TEST_NAMESPACE";

/// Runs `body` in fresh network and mount namespaces, by running this test again in them.
pub fn isolated(test: &str, body: impl FnOnce()) {
    if std::env::var(MARK).as_deref() == Ok(test) {
        // ip netns, xtables.lock and the like: nothing of it is to be seen outside.
        run("mount -t tmpfs tmpfs /run");
        run("ip link set lo up");
        return body();
    }
    let (mut out, mut err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut child = Command::new("unshare")
        .args(["--net", "--mount", "--propagation", "private", "--"])
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(MARK, test)
        .stdin(Stdio::null())
        .stdout(out.try_clone().unwrap())
        .stderr(err.try_clone().unwrap())
        // Its own process group, so that nothing it starts outlives it.
        .process_group(0)
        .spawn()
        .expect("unshare is part of util-linux");
    let group = Pid::from_child(&child);
    let deadline = Instant::now() + TEST_LIMIT;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() >= deadline => break None,
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let _ = kill_process_group(group, Signal::KILL);
    let _ = child.wait();
    let (out, err) = (contents(&mut out), contents(&mut err));
    let passed = status.is_some_and(|status| status.success()) && out.contains("1 passed");
    assert!(passed, "{test} in its namespace: {status:?}\n{out}\n{err}");
}

fn contents(file: &mut std::fs::File) -> String {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs a command line and expects success; returns what it printed.
pub fn run(line: &str) -> String {
    let output = try_run(line);
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command line, without a shell.
pub fn try_run(line: &str) -> Output {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap();
    Command::new(program).args(words).stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{line}: {e}"))
}

/// Runs a shell script and expects success.
pub fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command line that prints JSON.
pub fn json(line: &str) -> Value {
    let text = run(line);
    if text.trim().is_empty() { Value::Array(vec![]) } else { serde_json::from_str(&text).unwrap() }
}

/// Polls until `check` says `Ok`; fails with its last complaint.
pub fn eventually<T>(what: &str, mut check: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match check() {
            Ok(value) => return value,
            Err(complaint) if Instant::now() >= deadline => panic!("{what}: {complaint}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// What is done with the lease store under one lock of it.
pub fn with_store<T>(file: &Path, work: impl FnOnce(&mut Locked<'_>) -> T) -> T {
    let boot = BootId::read().unwrap();
    let mut kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
    let store = Store::at(file);
    work(&mut store.lock(&boot, Duration::from_secs(5), Missing::Create, &mut kernel).unwrap().unwrap())
}

/// Our routes as `ip` shows them, both families, in order of prefix and metric.
pub fn our_routes() -> Vec<String> {
    let mut routes = Vec::new();
    for family in ["-4", "-6"] {
        for route in json(&format!("ip -j {family} route show table all proto 112")).as_array().unwrap() {
            let field = |name: &str| match &route[name] {
                Value::String(text) => format!(" {name} {text}"),
                Value::Number(number) => format!(" {name} {number}"),
                _ => String::new(),
            };
            let kind = if route["type"] == "unreachable" { "unreachable " } else { "" };
            let mtu =
                route["metrics"][0]["mtu"].as_i64().map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
            let device = if kind.is_empty() { field("dev") } else { String::new() };
            let dst = route["dst"].as_str().unwrap();
            routes.push(format!("{kind}{dst}{}{device}{}{mtu}", field("gateway"), field("metric")));
        }
    }
    routes.sort();
    routes
}

/// Waits until our routes are these.
pub fn expect_routes(expected: &[&str]) {
    let mut expected: Vec<String> = expected.iter().map(|r| (*r).to_owned()).collect();
    expected.sort();
    eventually("routes", || {
        let got = our_routes();
        if got == expected { Ok(()) } else { Err(format!("got {got:#?}, expected {expected:#?}")) }
    });
}

/// `10.244.<n>.0/24` of node `n<n>` at `172.30.0.<10+n>`.
pub fn block(n: u8) -> BlockFact {
    named(&format!("10.244.{n}.0/24"), n, "default-v4")
}

/// `fd00:10:244:<n>::/64` of node `n<n>` at `fd00:30::<10+n>`.
pub fn block_v6(n: u8) -> BlockFact {
    named(&format!("fd00:10:244:{n}::/64"), n, "default-v6")
}

fn named(cidr: &str, n: u8, range: &str) -> BlockFact {
    let block: Block = cidr.parse().unwrap();
    BlockFact {
        name: block.object_name(),
        uid: format!("uid-{cidr}"),
        generation: 1,
        created: i64::from(n),
        block,
        range: range.to_owned(),
        node: format!("n{n}"),
        addresses: vec![
            [172, 30, 0, 10 + n].into(),
            format!("fd00:30::{:x}", 10 + u16::from(n)).parse().unwrap(),
        ],
        state: BlockState::Active,
        routing: None,
        converged: false,
        labels: Labels::default(),
    }
}

/// A block with a routing policy.
pub fn with_routing(block: BlockFact, routing: &str) -> BlockFact {
    BlockFact { routing: Some(serde_json::from_str(routing).unwrap()), ..block }
}

/// `default-v4` or `default-v6`.
pub fn range(name: &str) -> RangeFact {
    let cidr = if name == "default-v4" { "10.244.0.0/16" } else { "fd00:10:244::/48" };
    RangeFact {
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        generation: 1,
        range: cidr.parse().unwrap(),
        ready: true,
        quarantine_seconds: 900,
        routing: None,
        masquerade: MasqueradeMode::Enabled,
        exclude: vec![],
        max_blocks: 8,
        gives_blocks: true,
        block_prefix: if name == "default-v4" { 24 } else { 64 },
    }
}

/// A node `n1` with an uplink `eth0` (172.30.0.11/24, fd00:30::b/64), and its agent.
pub struct TestNode {
    runtime: Runtime,
    pub root: TempDir,
    pub settings: Settings,
    /// How fast it probes; `None`: not at all.
    pub pace: Option<Pace>,
    agent: Option<Agent>,
    pub objects: Objects,
}

fn runtime(namespace: Option<PathBuf>) -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name(plat_agent::kernel::events::THREAD_NAME)
        .on_thread_start(move || {
            if let Some(path) = &namespace {
                let namespace = std::fs::File::open(path).unwrap();
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            }
        })
        .enable_all()
        .build()
        .unwrap()
}

struct Agent {
    objects: watch::Sender<Objects>,
    reports: watch::Receiver<(Report, Duration)>,
    asks: mpsc::Receiver<Ask>,
    stop: CancellationToken,
    task: JoinHandle<Result<(), Ended>>,
}

impl TestNode {
    /// The node, before its agent started.
    pub fn new() -> TestNode {
        // Duplicate address detection takes a second, and there is nobody to detect.
        std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
        run("ip link add eth0 type veth peer name wire0");
        run("ip addr add 172.30.0.11/24 dev eth0");
        run("ip addr add fd00:30::b/64 dev eth0 nodad");
        run("ip link set eth0 up");
        run("ip link set wire0 up");
        // The kernel tells of a carrier up to a second later; until then the link is not as it will be.
        eventually("carrier", || {
            let links = run("ip -o link show up");
            if links.matches("state UP").count() == 2 { Ok(()) } else { Err(links) }
        });
        run("ip route add default via 172.30.0.1");
        run("ip route add default via fd00:30::1");
        TestNode::bare("n1", None)
    }

    /// A node of that name, in a namespace that was made for it (`ip netns add`); before its agent started.
    pub fn inside(namespace: &str, node: &str) -> TestNode {
        TestNode::bare(node, Some(PathBuf::from("/run/netns").join(namespace)))
    }

    fn bare(node: &str, namespace: Option<PathBuf>) -> TestNode {
        let root = tempfile::tempdir_in("/run").unwrap();
        let at = |name: &str| root.path().join(name);
        std::fs::write(at("image-plat"), "the CNI binary").unwrap();
        let settings = Settings {
            anti_spoofing: true,
            me: Me {
                node: node.into(),
                datapath: Datapath::Bridge,
                bridge: "cni0".into(),
                admit_forward: true,
                probe_port: None,
                vxlan: Network::default(),
            },
            conf_dir: at("net.d"),
            bin_dir: at("bin"),
            run_dir: at("plat"),
            plugin: at("image-plat"),
            sysctl_dir: PathBuf::from("/proc/sys/net"),
            proc_net: PathBuf::from("/proc/net"),
            host_ports: Provider::Plat,
            bandwidth: Provider::Plat,
            hold: Duration::from_secs(300),
            readiness: Readiness::Node,
            readiness_deadline: Duration::from_secs(60),
            needed: BTreeSet::new(),
        };
        TestNode {
            runtime: runtime(namespace),
            root,
            settings,
            agent: None,
            pace: None,
            objects: Objects::default(),
        }
    }

    /// The node with its agent, fed with complete lists of these objects and a contact.
    pub fn with(blocks: Vec<BlockFact>, ranges: Vec<RangeFact>) -> TestNode {
        let mut node = TestNode::new();
        node.start();
        node.contact();
        node.list(blocks, ranges);
        node
    }

    /// The same node once more, for a second agent beside the first, as one of an upgrade that overlaps.
    pub fn another(&self) -> TestNode {
        TestNode {
            runtime: runtime(None),
            root: tempfile::tempdir_in("/run").unwrap(),
            settings: self.settings.clone(),
            agent: None,
            pace: None,
            objects: Objects::default(),
        }
    }

    /// Starts the agent; it knows what its cache holds.
    pub fn start(&mut self) {
        let (objects_in, objects) = watch::channel(Objects::default());
        let (asks_in, asks) = mpsc::channel(8);
        let (reports_in, reports) = watch::channel((Report::default(), Duration::ZERO));
        let stop = CancellationToken::new();
        let probing = self.pace.map(|pace| {
            let (probing, prober) = prober::probing(PROBE_PORT, pace);
            self.runtime.spawn(prober.run());
            probing
        });
        let links = Links {
            objects,
            asks: asks_in,
            reports: reports_in,
            probing,
            pulse: Arc::new(Pulse::default()),
            stop: stop.clone(),
        };
        let mut settings = self.settings.clone();
        settings.me.probe_port = self.pace.and(NonZeroU16::new(PROBE_PORT));
        let task = self.runtime.spawn(reconcile::run(settings, links));
        self.objects = Objects::default();
        self.agent = Some(Agent { objects: objects_in, reports, asks, stop, task });
    }

    /// Stops the agent.
    pub fn stop(&mut self) {
        let agent = self.agent.take().expect("the agent runs");
        agent.stop.cancel();
        self.runtime.block_on(agent.task).unwrap().expect("the loop ends well");
    }

    /// Waits until the agent ends by itself; returns why.
    pub fn ended(&mut self) -> String {
        let agent = self.agent.take().expect("the agent runs");
        let waited = async { tokio::time::timeout(DEADLINE, agent.task).await };
        self.runtime.block_on(waited).expect("it ends in time").unwrap().unwrap_err().to_string()
    }

    fn agent(&self) -> &Agent {
        self.agent.as_ref().expect("the agent runs")
    }

    /// Sends what the test made of the objects.
    pub fn push(&self) {
        self.agent().objects.send_replace(self.objects.clone());
    }

    /// The watch sends complete lists of all kinds; of the policies the same as before.
    pub fn list(&mut self, blocks: Vec<BlockFact>, ranges: Vec<RangeFact>) {
        self.objects.blocks.apply(Change::Listed(blocks.into_iter().map(Ok).collect()));
        self.objects.ranges.apply(Change::Listed(ranges.into_iter().map(Ok).collect()));
        let policies = self.objects.policies.facts.values().cloned().map(Ok);
        self.objects.policies.apply(Change::Listed(policies.collect()));
        self.push();
    }

    /// The watch sends a new or changed block.
    pub fn apply(&mut self, block: BlockFact) {
        self.objects.blocks.apply(Change::Applied(Ok(block)));
        self.push();
    }

    /// The watch sends a new or changed range.
    pub fn apply_range(&mut self, range: RangeFact) {
        self.objects.ranges.apply(Change::Applied(Ok(range)));
        self.push();
    }

    /// The watch sends a deletion.
    pub fn delete(&mut self, block: &BlockFact) {
        self.objects.blocks.apply(Change::Deleted(block.name.clone()));
        self.push();
    }

    /// The API server is reached now.
    pub fn contact(&mut self) {
        self.objects.contact = Some(Contact { boot_ms: boot::boot_ms(), unix: 1_764_000_000 });
        self.push();
    }

    /// The newest report.
    pub fn report(&self) -> Report {
        self.agent().reports.borrow().0.clone()
    }

    /// What the agent asked of the watch since the last time.
    pub fn asked(&mut self) -> Vec<Ask> {
        let agent = self.agent.as_mut().expect("the agent runs");
        std::iter::from_fn(|| agent.asks.try_recv().ok()).collect()
    }

    /// Waits until the newest report has that condition with that status and reason; returns its message.
    pub fn expect_condition(&self, type_: &str, status: &str, reason: &str) -> String {
        eventually(type_, || {
            let report = self.report();
            match plat_crds::condition::find(&report.status.conditions, type_) {
                Some(c) if c.status == status && c.reason == reason => Ok(c.message.clone()),
                Some(c) => Err(format!("{} {}: {}", c.status, c.reason, c.message)),
                None => Err("it is not there".to_owned()),
            }
        })
    }

    /// Waits until an incident of that reason was counted `count` times; returns its message.
    pub fn expect_incident(&self, reason: &str, count: i64) -> String {
        eventually(reason, || {
            let incidents = self.report().status.incidents;
            let found = incidents.iter().find(|incident| incident.reason == reason);
            match found {
                Some(incident) if incident.count >= count => Ok(incident.message.clone()),
                _ => Err(format!("incidents: {incidents:?}")),
            }
        })
    }

    /// Waits until a pass began and ended without a change after this call: what was done is done.
    pub fn settled(&self) {
        let mut reports = self.agent().reports.clone();
        reports.mark_unchanged();
        // Any file of interest wakes the loop.
        std::fs::write(self.settings.conf_dir.join("zz-nudge"), boot::boot_ms().to_string()).unwrap();
        for _ in 0..2 {
            let changed = async { tokio::time::timeout(DEADLINE, reports.changed()).await };
            self.runtime.block_on(changed).expect("a pass in time").unwrap();
            std::fs::remove_file(self.settings.conf_dir.join("zz-nudge")).ok();
        }
    }

    /// A file of the node.
    pub fn file(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.stop.cancel();
        }
    }
}

/// Reads a sysctl.
pub fn sysctl(path: &str) -> String {
    std::fs::read_to_string(Path::new("/proc/sys/net").join(path)).unwrap().trim().to_owned()
}

/// Writes a sysctl.
pub fn set_sysctl(path: &str, value: &str) {
    std::fs::write(Path::new("/proc/sys/net").join(path), value).unwrap();
}

/// An address.
pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
