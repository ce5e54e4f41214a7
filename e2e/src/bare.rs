//! Nodes that are a network namespace with an agent in it, and nothing else: no kubelet, no runtime, no pods.
//! Dozens of them run beside a [`ControlPlane`], with hand-made Node objects, and show what agents and operator
//! make of a cluster of that size.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::light::ControlPlane;
use crate::testbed::{images, output};

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

    fn namespace(&self) -> String {
        format!("{}-{}", self.plane.name(), self.name())
    }

    /// Starts its agent.
    pub fn agent(&self) -> Result<Process> {
        let own = self.plane.run_folder().join(self.name());
        let flag = |name: &str, folder: &str| format!("--{name}={}", own.join(folder).display());
        let args = [
            format!("--node-name={}", self.name()),
            format!("--plugin={}", images().join("bin/plat").display()),
            flag("run-dir", "run"),
            flag("cni-bin-dir", "bin"),
            flag("cni-conf-dir", "conf"),
            flag("socket", "agent.sock"),
        ];
        let (log, admin) = (format!("{}/agent.log", self.name()), self.plane.admin_kubeconfig());
        Process::start(self.plane, &self.name(), &log, "plat-agent", &args, &admin)
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
