//! Nodes that are a network namespace with an agent in it, and nothing else: no kubelet, no runtime, no pods.
//! Dozens of them run beside a [`ControlPlane`], with hand-made Node objects, and show what agents and operator
//! make of a cluster of that size.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use plat_crds::names::CONFLIST_FILE;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::light::{ControlPlane, create_node};
use crate::testbed::{images, output, tools};
use crate::usage::Usage;
use crate::wait::wait_until;

/// The API server's address.
const CONTROL_PLANE: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);

/// A process of ours; killed when dropped, and when the thread that started it ends in whatever way.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Starts a program of `images/bin`, or any other by its whole path. What it prints goes to `name` in the run
    /// folder.
    pub fn start(
        plane: &ControlPlane,
        namespace: &str,
        name: &str,
        program: &str,
        args: &[String],
        kubeconfig: &Path,
    ) -> Result<Process> {
        let log = File::options().create(true).append(true).open(plane.run_folder().join(name))?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig=KILL", "--", "nsenter"]);
        command.arg(format!("--net=/run/netns/{}-{namespace}", plane.name())).arg("--");
        command.arg(images().join("bin").join(program)).args(args);
        command.env("KUBECONFIG", kubeconfig);
        let spawned = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        Ok(Process(spawned))
    }

    /// Its process ID: the programs before it replace themselves by it.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// What it has used up to now.
    pub fn usage(&self) -> Result<Usage> {
        Usage::of(self.id())
    }

    /// Ends it as Kubernetes would: SIGTERM, and waits until it is gone.
    pub async fn end(self) -> Result<()> {
        let id = i32::try_from(self.id())?;
        if let Some(pid) = Pid::from_raw(id) {
            kill_process(pid, Signal::TERM)?;
        }
        for _ in 0..600 {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(self) {}
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Starts an operator in the network of the control plane.
pub fn operator(plane: &ControlPlane, name: &str, flags: &[&str]) -> Result<Process> {
    let socket = plane.run_folder().join(format!("{name}.sock"));
    let socket = format!("--socket={}", socket.display());
    // A namespace that every cluster has.
    let mut args = vec![format!("--pod-name={name}"), socket, "--namespace=default".to_owned()];
    args.extend(flags.iter().map(|flag| (*flag).to_owned()));
    Process::start(plane, "cp", &format!("{name}.log"), "plat-operator", &args, &plane.admin_kubeconfig())
}

/// A namespace with an uplink, and folders for an agent.
#[derive(Debug)]
pub struct BareNode<'a> {
    plane: &'a ControlPlane,
    number: u8,
}

impl<'a> BareNode<'a> {
    /// Node `n<number>`, without a Node object and without an agent. It goes down with the control plane.
    pub fn up(plane: &'a ControlPlane, number: u8) -> Result<BareNode<'a>> {
        let node = BareNode { plane, number };
        output(Command::new("ip").args(["netns", "add", &node.namespace()]))?;
        output(Command::new("ip").args(["-n", &node.namespace(), "link", "set", "lo", "up"]))?;
        output(plane.script("network.sh").args(["node", &number.to_string()]))?;
        for folder in ["run", "bin", "conf"] {
            fs::create_dir_all(plane.run_folder().join(node.name()).join(folder))?;
        }
        Ok(node)
    }

    /// Name of its Node object.
    pub fn name(&self) -> String {
        format!("n{}", self.number)
    }

    /// Its InternalIP.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 30, 0, 10 + self.number)
    }

    /// Its other address, of IPv6.
    pub fn address6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x30, 0, 0, 0, 0, 0, 0x10 + u16::from(self.number))
    }

    /// Makes its Node object, with its address of IPv4.
    pub fn register(&self) -> Result<()> {
        self.register_at(&self.address().to_string())
    }

    /// Makes its Node object, with that address.
    pub fn register_at(&self, address: &str) -> Result<()> {
        self.plane.block_on(async |client| create_node(&client, &self.name(), &[address]).await).map(drop)
    }

    /// Name of its namespace.
    pub fn namespace(&self) -> String {
        format!("{}-{}", self.plane.name(), self.name())
    }

    /// The folder of its agent's folders `run`, `bin` and `conf`.
    pub fn folder(&self) -> PathBuf {
        self.plane.run_folder().join(self.name())
    }

    /// Where things are on it, as flags of its agent.
    fn place(&self) -> Vec<String> {
        let flag = |name: &str, folder: &str| format!("--{name}={}", self.folder().join(folder).display());
        vec![flag("run-dir", "run"), flag("cni-bin-dir", "bin"), flag("cni-conf-dir", "conf")]
    }

    /// The configuration of Plat's CNI binary, as a runtime makes it of the installed conflist.
    pub(crate) fn conf(&self) -> Result<Value> {
        let conflist = fs::read_to_string(self.folder().join("conf").join(CONFLIST_FILE))?;
        let list: Value = serde_json::from_str(&conflist)?;
        let mut conf = list["plugins"][0].clone();
        (conf["name"], conf["cniVersion"]) = (list["name"].clone(), list["cniVersion"].clone());
        Ok(conf)
    }

    /// Starts its agent.
    pub fn agent(&self) -> Result<Process> {
        self.agent_with(&[])
    }

    /// Starts its agent with further flags.
    pub fn agent_with(&self, flags: &[&str]) -> Result<Process> {
        let mut args = self.place();
        args.push(format!("--node-name={}", self.name()));
        args.push(format!("--plugin={}", images().join("bin/plat").display()));
        args.push(format!("--socket={}", self.folder().join("agent.sock").display()));
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let (log, admin) = (format!("{}/agent.log", self.name()), self.plane.admin_kubeconfig());
        Process::start(self.plane, &self.name(), &log, "plat-agent", &args, &admin)
    }

    /// The API server does not reach it any more, nor it the API server: packets vanish. All else goes on.
    pub fn cut_off(&self) -> Result<()> {
        let server = CONTROL_PLANE;
        let rules = format!(
            "add table ip cut-off; add chain ip cut-off out {{ type filter hook output priority 0; }};
            add rule ip cut-off out ip daddr {server} drop; add chain ip cut-off in {{ type filter hook input priority 0; }};
            add rule ip cut-off in ip saddr {server} drop"
        );
        output(self.run("nft").arg(rules)).map(drop)
    }

    /// Takes that back.
    pub fn reconnect(&self) -> Result<()> {
        output(self.run("nft").args(["delete", "table", "ip", "cut-off"])).map(drop)
    }

    /// A program in its namespace.
    pub fn run(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(), program]);
        command
    }

    /// A namespace for a pod.
    pub fn pod(&self, name: &str) -> Result<Pod<'_>> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig=KILL", "--", "unshare", "--net", "sh", "-c", "echo; exec sleep 3600"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut line = [0];
        if let Some(out) = &mut child.stdout {
            // Its first byte says that it is in its namespace.
            out.read_exact(&mut line)?;
        }
        Ok(Pod { node: self, name: name.to_owned(), process: Process(child) })
    }

    /// What `plat-agent check` finds on it: a line each.
    pub fn check(&self) -> Result<Vec<String>> {
        let program = images().join("bin/plat-agent");
        let mut command = self.run(&program.display().to_string());
        let found = command.arg("check").args(self.place()).output()?;
        let text = String::from_utf8(found.stdout)?;
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        ensure!(
            found.status.code() == Some(i32::from(!lines.is_empty())),
            "{}: {text}{}",
            found.status,
            String::from_utf8_lossy(&found.stderr)
        );
        Ok(lines)
    }

    /// Starts kube-proxy with that configuration, besides name and connection.
    pub fn kube_proxy(&self, conf: &Value) -> Result<Process> {
        let mut whole = serde_json::json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": self.plane.run_folder().join("proxy.kubeconfig")},
            "hostnameOverride": self.name(), "oomScoreAdj": 0, "conntrack": {"maxPerCore": 0, "min": 0},
        });
        if let (Some(whole), Some(conf)) = (whole.as_object_mut(), conf.as_object()) {
            whole.extend(conf.clone());
        }
        let file = self.folder().join("proxy.json");
        fs::write(&file, whole.to_string())?;
        let (log, args) = (format!("{}/proxy.log", self.name()), [format!("--config={}", file.display())]);
        let program = tools().join("kube-proxy").display().to_string();
        let admin = self.plane.admin_kubeconfig();
        Process::start(self.plane, &self.name(), &log, &program, &args, &admin)
    }

    /// `ip` in its namespace.
    pub fn ip(&self, args: &[&str]) -> Result<String> {
        output(Command::new("ip").args(["-n", &self.namespace()]).args(args))
    }

    /// Where Plat's routes of its kernel lead: block → gateway.
    pub fn gateways(&self) -> Result<BTreeMap<String, String>> {
        let text = self.ip(&["-j", "-4", "route", "show", "proto", "112"])?;
        let routes: Vec<Value> = serde_json::from_str(&text)?;
        let gateway =
            |route: &Value| Some((route["dst"].as_str()?.to_owned(), route["gateway"].as_str()?.to_owned()));
        let gateways: BTreeMap<_, _> = routes.iter().filter_map(gateway).collect();
        let with_gateway = routes.iter().filter(|route| route["gateway"].is_string()).count();
        ensure!(gateways.len() == with_gateway, "{} has two routes to one block: {text}", self.name());
        Ok(gateways)
    }
}

/// A pod of a [`BareNode`]: a namespace, in which nothing runs. It ends when dropped.
#[derive(Debug)]
pub struct Pod<'a> {
    node: &'a BareNode<'a>,
    name: String,
    process: Process,
}

impl Pod<'_> {
    /// Calls the installed CNI binary as a runtime does by the installed conflist; what it prints, or the error
    /// object (CNI spec, "Error").
    pub fn cni(&self, what: &str) -> Result<Result<Value, Value>> {
        let (own, conf) = (self.node.folder(), self.node.conf()?);
        let mut command = self.node.run(&own.join("bin/plat").to_string_lossy());
        command
            .env("CNI_COMMAND", what)
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", format!("/proc/{}/ns/net", self.process.0.id()))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", own.join("bin"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(conf.to_string().as_bytes())?;
        }
        let out = child.wait_with_output()?;
        let said = if out.stdout.is_empty() { Value::Null } else { serde_json::from_slice(&out.stdout)? };
        Ok(if out.status.success() { Ok(said) } else { Err(said) })
    }

    /// Tries ADD until it succeeds; its result.
    ///
    /// # Panics
    /// At the deadline, with `what` and the last error.
    #[track_caller]
    pub fn wait_add(&self, what: &str, deadline: Duration) -> Value {
        wait_until(what, deadline, || {
            self.cni("ADD").map_err(|error| format!("{error:#}"))?.map_err(|error| error.to_string())
        })
    }

    /// The process that holds its namespace.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// A program in the pod.
    pub fn run(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.process.0.id())).arg(program);
        command
    }
}
