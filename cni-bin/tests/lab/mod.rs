//! A laboratory for one test: the test's thread gets a network and a mount namespace of its own, with an
//! empty `/run`. Whatever the test makes in there (links, rules, namespaces, files) ends with the thread,
//! also after a failure; nothing of the machine's own is seen or touched.
//!
//! [`Plat`] calls the built binary as a runtime does: environment and standard input in; exit status and
//! standard output out.

#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here fails the test")]

pub mod frames;
pub mod network;
pub mod traffic;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use plat_cni::boot::BootId;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::pods::{self, Orphans, Restored};
use plat_cni::store::{Missing, Store};
use plat_crds::blocks_file::{BLOCKS_FILE_VERSION, BlocksFile, HeldBlock};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;
use serde_json::{Value, json};

/// Enters a fresh laboratory with the current thread.
pub fn enter() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test makes network namespaces and must run as root: sudo -E cargo test -p plat-cni"
    );
    #[expect(deprecated, reason = "safe here: file tables are not unshared, see unshare_unsafe")]
    rustix::thread::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET).unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
    fs::create_dir("/run/netns").unwrap();
    run("ip", &["link", "set", "lo", "up"]);
}

/// Runs a command and returns its standard output; a failure fails the test with all that it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = attempt(program, args);
    assert!(
        output.status.success(),
        "{program} {}: {}\n{}{}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that may fail.
pub fn attempt(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// Runs a command line in the shell.
pub fn sh(line: &str) -> String {
    run("sh", &["-ec", line])
}

/// Runs a command that prints JSON (`ip -j`, `nft -j`).
pub fn json_of(line: &str) -> Value {
    let text = sh(line);
    if text.trim().is_empty() {
        return json!([]);
    }
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{line}: {e}\n{text}"))
}

/// Makes a network namespace, as a runtime does for a pod, and returns its path.
pub fn netns(name: &str) -> String {
    run("ip", &["netns", "add", name]);
    format!("/run/netns/{name}")
}

/// Waits until something holds; fails the test if it does not within ten seconds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not within ten seconds");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// While it is there, a call [`Plat::waiting_at`] a step waits.
const WAIT: &str = "/run/wait";

/// Ends the wait of [`Plat::waiting_at`].
pub fn go_on() {
    fs::remove_file(WAIT).unwrap();
}

/// The folder of the reference plugins and cnitool.
pub fn tools() -> PathBuf {
    let cache = || {
        let home = PathBuf::from(std::env::var("HOME").expect("HOME is set"));
        std::env::var("XDG_CACHE_HOME").map_or_else(|_| home.join(".cache"), PathBuf::from)
    };
    let dir = std::env::var("PLAT_TOOLS").map_or_else(|_| cache().join("plat/tools"), PathBuf::from);
    assert!(dir.join("cni/host-local").exists(), "no CNI tools in {}: run e2e/tools/build", dir.display());
    dir
}

/// Writes `/run/plat/blocks.json` as the agent does.
pub fn blocks(cidrs: &[&str]) {
    write_blocks(cidrs, |_| {});
}

/// The same with a change.
pub fn write_blocks(cidrs: &[&str], change: impl FnOnce(&mut BlocksFile)) {
    let mut file = BlocksFile {
        version: BLOCKS_FILE_VERSION,
        node: "n1".to_owned(),
        boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().to_owned(),
        lease_until: u64::MAX,
        last_contact: "2026-11-24T05:00:00Z".to_owned(),
        may_grow: Vec::new(),
        mtu: None,
        blocks: cidrs.iter().map(|c| HeldBlock { cidr: c.parse().unwrap(), lease: true }).collect(),
    };
    change(&mut file);
    fs::create_dir_all("/run/plat").unwrap();
    fs::write("/run/plat/blocks.json", serde_json::to_vec(&file).unwrap()).unwrap();
}

/// A configuration that leases from the node's blocks.
pub fn cluster_conf() -> Value {
    json!({"cniVersion": "1.1.0", "name": "plat", "type": "plat", "ipam": {"type": "plat"}})
}

/// A configuration as an administrator writes it by hand.
pub fn hand_conf() -> Value {
    json!({"cniVersion": "1.1.0", "name": "hand", "type": "plat", "isDefaultGateway": true,
        "ipam": {"subnet": "10.22.0.0/24"}})
}

/// How a test's pods are joined to the host.
#[derive(Clone, Copy, Debug)]
pub enum Datapath {
    Bridge,
    Routed,
}

impl Datapath {
    /// The configuration in this datapath.
    pub fn of(self, conf: Value) -> Value {
        let name = match self {
            Datapath::Bridge => "bridge",
            Datapath::Routed => "routed",
        };
        with(conf, json!({"datapath": name}))
    }
}

/// Makes a test for each datapath of claims that hold in both: functions of a [`Datapath`].
#[allow(unused_macros, reason = "each test program uses a part")]
macro_rules! in_each_datapath {
    ($($claim:ident),* $(,)?) => {
        mod bridge {
            $(#[test] fn $claim() { super::$claim(crate::lab::Datapath::Bridge) })*
        }
        mod routed {
            $(#[test] fn $claim() { super::$claim(crate::lab::Datapath::Routed) })*
        }
    };
}
#[allow(unused_imports, reason = "each test program uses a part")]
pub(crate) use in_each_datapath;

/// The configuration with some keys replaced.
pub fn with(mut conf: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        conf[key] = value.clone();
    }
    conf
}

/// A call of the binary.
#[derive(Clone)]
pub struct Plat {
    program: PathBuf,
    variables: Vec<(String, String)>,
    input: Vec<u8>,
}

/// What a call came to.
#[derive(Debug)]
pub struct Answer {
    /// Whether the exit status was 0.
    pub success: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Plat {
    /// A call with nothing but its verb.
    pub fn bare(verb: &str) -> Plat {
        Plat {
            program: env!("CARGO_BIN_EXE_plat").into(),
            variables: vec![("CNI_COMMAND".to_owned(), verb.to_owned())],
            input: Vec::new(),
        }
    }

    /// A call about the container `id`, whose namespace `/run/netns/<id>` and interface is `eth0`.
    pub fn call(verb: &str, id: &str, conf: &Value) -> Plat {
        Plat::bare(verb)
            .set("CNI_CONTAINERID", id)
            .set("CNI_NETNS", &format!("/run/netns/{id}"))
            .set("CNI_IFNAME", "eth0")
            .set("CNI_PATH", "/nowhere")
            .input(conf)
    }

    /// The same call of a reference plugin, with `host-local` for the addresses that `conf` names itself.
    pub fn reference(plugin: &str, verb: &str, id: &str, conf: &Value) -> Plat {
        let mut conf = with(conf.clone(), json!({"type": plugin}));
        if conf["ipam"]["subnet"].is_string() || conf["ipam"]["ranges"].is_array() {
            conf["ipam"]["type"] = json!("host-local");
            conf["ipam"]["dataDir"] = json!("/run/host-local");
        }
        let mut call = Plat::call(verb, id, &conf).with_plugins();
        call.program = tools().join("cni").join(plugin);
        call
    }

    /// Lets it find the other plugins, and the programs that they call.
    pub fn with_plugins(self) -> Plat {
        let plugins = tools().join("cni");
        self.set("CNI_PATH", plugins.to_str().unwrap()).set("PATH", &std::env::var("PATH").unwrap())
    }

    /// Sets a variable.
    pub fn set(mut self, name: &str, value: &str) -> Plat {
        self.variables.retain(|(n, _)| n != name);
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Lets it wait at that step until [`go_on`].
    pub fn waiting_at(self, step: &str) -> Plat {
        fs::write(WAIT, "").unwrap();
        self.set("PLAT_FAIL", &format!("{step}:wait")).set("PLAT_FAIL_WAIT", WAIT)
    }

    /// Removes a variable.
    pub fn unset(mut self, name: &str) -> Plat {
        self.variables.retain(|(n, _)| n != name);
        self
    }

    /// Sets standard input.
    pub fn input(self, conf: &Value) -> Plat {
        self.raw_input(conf.to_string().as_bytes())
    }

    /// Sets standard input to any bytes.
    pub fn raw_input(mut self, bytes: &[u8]) -> Plat {
        self.input = bytes.to_vec();
        self
    }

    /// The command, ready to be started.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear().envs(self.variables.iter().cloned());
        command
    }

    /// Starts the call and feeds it, without waiting.
    pub fn start(&self) -> Child {
        let mut child = self
            .command()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A call that fails before it reads leaves a broken pipe.
        let _ = child.stdin.take().unwrap().write_all(&self.input);
        child
    }

    /// Runs the call.
    pub fn run(&self) -> Answer {
        Answer::of(self.start().wait_with_output().unwrap())
    }

    /// Runs an ADD that must succeed; its result.
    pub fn result(&self) -> Value {
        self.run().json()
    }
}

impl Answer {
    /// Reads a finished call.
    pub fn of(output: Output) -> Answer {
        Answer {
            success: output.status.success(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Success with one JSON object.
    #[track_caller]
    pub fn json(&self) -> Value {
        assert!(self.success, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// Success with nothing on standard output.
    #[track_caller]
    pub fn silent(&self) {
        assert!(self.success, "{self:?}");
        assert_eq!(self.stdout, "", "{self:?}");
    }

    /// Failure with one JSON error object of that code; returns message and details as one text.
    #[track_caller]
    pub fn error(&self, code: u64) -> String {
        assert!(!self.success, "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        assert_eq!(error["code"], code, "{error}");
        assert!(error["cniVersion"].is_string() && error["msg"].is_string(), "{error}");
        format!("{}: {}", error["msg"].as_str().unwrap(), error["details"].as_str().unwrap_or_default())
    }
}

/// Connects a container whose namespace is made for it; the result.
#[track_caller]
pub fn add(id: &str, conf: &Value) -> Value {
    netns(id);
    Plat::call("ADD", id, conf).result()
}

/// The first address of a result, without its prefix length.
pub fn address(result: &Value) -> String {
    result["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned()
}

/// The host's end of the link in a result; behind it there is only the pod's.
pub fn host_end(result: &Value) -> &Value {
    result["interfaces"].as_array().unwrap().iter().rev().nth(1).unwrap()
}

/// The pod's end of the link in a result.
pub fn pod_end(result: &Value) -> &Value {
    result["interfaces"].as_array().unwrap().last().unwrap()
}

/// What is recorded (`plat leases --json`).
pub fn leases() -> Vec<Value> {
    let output = run(env!("CARGO_BIN_EXE_plat"), &["leases", "--json"]);
    let all: Value = serde_json::from_str(&output).unwrap();
    all["leases"].as_array().unwrap().clone()
}

/// The addresses that are recorded, sorted.
pub fn leased() -> Vec<String> {
    let mut all: Vec<String> = leases()
        .iter()
        .flat_map(|lease| lease["addresses"].as_array().unwrap().clone())
        .map(|a| a["address"].as_str().unwrap().to_owned())
        .collect();
    all.sort();
    all
}

/// Names of our links on the host.
pub fn host_links() -> Vec<String> {
    json_of("ip -j link show type veth")
        .as_array()
        .unwrap()
        .iter()
        .map(|l| l["ifname"].as_str().unwrap().to_owned())
        .filter(|name| name.starts_with("plat"))
        .collect()
}

/// Elements of the masquerade maps.
pub fn masqueraded() -> Vec<String> {
    let text = sh("nft list ruleset");
    text.lines()
        .flat_map(|l| l.split([',', '{', '}']))
        .filter(|e| e.contains(": jump"))
        .map(|e| e.trim().to_owned())
        .collect()
}

/// Brings the pods' tables to what the leases say, as the agent does.
pub fn restore() -> Restored {
    let boot = BootId::read().unwrap();
    let mut kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
    let store = Store::at("/run/plat/leases".as_ref());
    let locked = store.lock(&boot, Duration::from_secs(5), Missing::Leave, &mut kernel).unwrap();
    let mut locked = locked.unwrap();
    let leases = locked.leases().unwrap();
    let mut proof = || locked.kernel().held();
    let restored = pods::restore(leases.iter().map(|held| &held.lease), Orphans::Sweep(&mut proof)).unwrap();
    drop(locked);
    pods::hostports::forget_strays(leases.iter().map(|held| &held.lease));
    restored
}

/// Elements of all sets and maps of the pods' tables, as `set: [elements]`.
pub fn pod_elements() -> Vec<String> {
    let ruleset = json_of("nft -j list ruleset");
    let objects = ruleset["nftables"].as_array().cloned().unwrap_or_default();
    let sets = objects.iter().filter_map(|o| o.get("set").or_else(|| o.get("map")));
    let of_pods = sets.filter(|set| set["table"] == "plat-pods" && set["elem"].is_array());
    of_pods.map(|set| format!("{} {}: {}", set["family"], set["name"], set["elem"])).collect()
}

/// Fails the test if anything of a pod is left: link, lease, element.
#[track_caller]
pub fn assert_nothing_left() {
    assert_eq!(host_links(), Vec::<String>::new(), "links");
    assert_eq!(leases(), Vec::<Value>::new(), "leases");
    assert_eq!(pod_elements(), Vec::<String>::new(), "elements");
}

/// Pings from a container; whether one of ten was answered. (A busy machine may lose the first to the other
/// side's own preparations.)
pub fn ping(id: &str, to: &str) -> bool {
    let once = || {
        attempt("ip", &["netns", "exec", id, "busybox", "ping", "-c", "1", "-W", "1", to]).status.success()
    };
    (0..10).any(|_| once())
}

/// Whether a file exists.
pub fn exists(path: &str) -> bool {
    Path::new(path).exists()
}
