//! A whole cluster: control plane, and nodes with kubelet, containerd and kube-proxy.

use std::fmt::Write;
use std::net::IpAddr;
use std::ops::Deref;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::plat::wait_converged;
use crate::testbed::{Extent, Testbed, output, repository, tools};
use crate::wait::{holds, wait_until};

/// How kube-proxy programs Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyMode {
    /// By nftables.
    Nftables,
    /// By iptables.
    Iptables,
}

impl ProxyMode {
    /// kube-proxy's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            ProxyMode::Nftables => "nftables",
            ProxyMode::Iptables => "iptables",
        }
    }
}

/// Control plane and nodes `n1`, `n2`, ... See [`Testbed`] for what can be done besides.
#[derive(Debug)]
pub struct Cluster(Testbed);

impl Cluster {
    /// Brings up a cluster of that many nodes. They stay NotReady until a network is installed.
    pub fn up(nodes: u8, proxy: ProxyMode) -> Result<Cluster> {
        let settings = [("NODES", nodes.to_string()), ("PROXY", proxy.as_str().to_owned())];
        let settings: Vec<_> = settings.iter().map(|(k, v)| (*k, v.as_str())).collect();
        Ok(Cluster(Testbed::up(Extent::Full, &settings)?))
    }

    /// A cluster with Plat, installed by its chart with `extra` arguments, in which all has converged. From
    /// then on a test that panics shows what the cluster looks like.
    ///
    /// # Panics
    /// If it cannot be had.
    pub fn with_plat(nodes: u8, extra: &[&str]) -> Cluster {
        let cluster = Cluster::up(nodes, ProxyMode::Nftables).unwrap_or_else(|e| panic!("no cluster: {e:#}"));
        cluster.tell_panics();
        cluster.install_plat(extra).unwrap_or_else(|e| panic!("cannot install Plat: {e:#}"));
        cluster.wait_nodes_ready(Duration::from_secs(60));
        wait_converged(&cluster, nodes.into(), Duration::from_secs(60));
        cluster
    }

    /// From now on a test that panics shows what the cluster looks like.
    pub fn tell_panics(&self) {
        diagnose_panics(self.name(), self.run_folder());
    }

    fn node_script(&self, action: &str, node: u8) -> Command {
        let mut command = self.script("node.sh");
        command.arg(action).arg(node.to_string());
        command
    }

    /// Adds a machine that joins as node `n<node>`.
    pub fn add_node(&self, node: u8) -> Result<()> {
        output(&mut self.node_script("add", node)).map(drop)
    }

    /// Takes the machine away without a word, as a power cut does. Its Node object stays.
    pub fn remove_node(&self, node: u8) -> Result<()> {
        output(&mut self.node_script("remove", node)).map(drop)
    }

    /// Ends the kubelet with SIGKILL.
    pub fn stop_kubelet(&self, node: u8) -> Result<()> {
        output(&mut self.node_script("kubelet-stop", node)).map(drop)
    }

    /// Starts it again.
    pub fn start_kubelet(&self, node: u8) -> Result<()> {
        output(&mut self.node_script("kubelet-start", node)).map(drop)
    }

    /// Ends containerd with SIGKILL.
    pub fn kill_containerd(&self, node: u8) -> Result<()> {
        output(&mut self.node_script("containerd-kill", node)).map(drop)
    }

    /// Starts it again.
    pub fn start_containerd(&self, node: u8) -> Result<()> {
        output(&mut self.node_script("containerd-start", node)).map(drop)
    }

    /// Restarts kube-proxy in another mode.
    pub fn set_proxy(&self, node: u8, mode: ProxyMode) -> Result<()> {
        output(self.node_script("proxy", node).arg(mode.as_str())).map(drop)
    }

    /// A program on a node.
    pub fn node_command(&self, node: u8, program: &str) -> Command {
        let mut command = self.node_script("run", node);
        command.arg(program);
        command
    }

    /// Runs a line of shell on a node; its output.
    pub fn on_node(&self, node: u8, line: &str) -> Result<String> {
        output(self.node_command(node, "sh").args(["-c", line]))
    }

    /// A program on a node, but in the network of one of its pods.
    pub fn pod_network_command(&self, pod: &Pod, program: &str) -> Result<Command> {
        let find = format!(
            "for n in /run/netns/*; do if nsenter --net=$n ip -o addr | grep -qwF {}; then echo $n; exit; fi; done; exit 1",
            pod.ip()
        );
        let path = self
            .on_node(pod.node, &find)
            .with_context(|| format!("no namespace has the address of {pod:?}"))?;
        let mut command = self.node_command(pod.node, "nsenter");
        command.arg(format!("--net={}", path.trim())).arg("--").arg(program);
        Ok(command)
    }

    /// Waits until all nodes are Ready, at most that long.
    pub fn wait_nodes_ready(&self, deadline: Duration) {
        wait_until("all nodes are Ready", deadline, || {
            let nodes = self.get(&["nodes"]).map_err(|e| e.to_string())?;
            let waiting: Vec<_> =
                items(&nodes).filter(|n| condition(n, "Ready") != Some("True")).map(name).collect();
            holds(waiting.is_empty(), format!("not Ready: {waiting:?}"))
        });
    }

    /// Runs helm; its output.
    pub fn helm(&self, args: &[&str]) -> Result<String> {
        output(self.tool("helm").arg("--kubeconfig").arg(self.admin_kubeconfig()).args(args))
    }

    /// Installs Plat by its chart, as users do; `extra` goes to `helm install`.
    pub fn install_plat(&self, extra: &[&str]) -> Result<()> {
        let chart = repository().join("charts/plat");
        let mut args = vec!["install", "plat", path(&chart)?, "-n", "plat-system", "--create-namespace"];
        args.extend(extra);
        self.helm(&args).map(drop)
    }

    /// Takes Plat off the nodes and removes it, as users do. The kinds and their objects stay.
    pub fn remove_plat(&self) -> Result<()> {
        let chart = repository().join("charts/plat");
        let mut args =
            vec!["upgrade", "plat", path(&chart)?, "-n", "plat-system", "--reset-then-reuse-values"];
        args.extend(["--set", "cleanup=true", "--wait", "--timeout", "90s"]);
        self.helm(&args)?;
        self.helm(&["uninstall", "plat", "-n", "plat-system", "--wait", "--timeout", "60s"]).map(drop)
    }

    /// Applies a manifest of pods that are pinned to nodes and run `probe serve`, waits until all run, and
    /// returns them in the order of `wanted`.
    pub fn run_pods(&self, wanted: &[PodSpec<'_>], deadline: Duration) -> Result<Vec<Pod>> {
        let mut manifest = String::new();
        for pod in wanted {
            write!(manifest, "{}", pod.manifest())?;
        }
        self.apply(&manifest)?;
        wanted.iter().map(|pod| self.running_pod(pod, deadline)).collect()
    }

    /// Runs pod `a` on n1 and pod `b` on n2.
    pub fn run_pair(&self, deadline: Duration) -> Result<Vec<Pod>> {
        let pod = |name, node| PodSpec { name, node, host_network: false };
        self.run_pods(&[pod("a", 1), pod("b", 2)], deadline)
    }

    fn running_pod(&self, spec: &PodSpec<'_>, deadline: Duration) -> Result<Pod> {
        let pod = wait_until(&format!("pod {} is ready", spec.name), deadline, || {
            let pod = self.get(&["pod", spec.name]).map_err(|e| e.to_string())?;
            holds(condition(&pod, "Ready") == Some("True"), format!("{:#}", pod["status"])).map(|()| pod)
        });
        let ips = pod["status"]["podIPs"].as_array().map(Vec::as_slice).unwrap_or_default();
        let ips = ips.iter().filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect();
        Ok(Pod { name: spec.name.to_owned(), node: spec.node, ips, port: spec.port() })
    }

    /// Deletes pods without grace and waits until they are gone.
    pub fn delete_pods(&self, names: &[&str]) -> Result<()> {
        let mut args = vec!["delete", "pod", "--now", "--wait", "--ignore-not-found"];
        args.extend(names);
        self.kubectl(&args).map(drop)
    }
}

/// What one sees who comes to help: nodes, Plat's objects, pods, Events, and the ends of Plat's logs.
fn diagnosis(name: &str, run: &Path) -> String {
    let plat = ["-n", "plat-system", "logs", "--tail=30", "--prefix", "-l", "app.kubernetes.io/name=plat"];
    let mut text = String::new();
    for args in [
        &["get", "nodes", "-o", "wide"][..],
        &["get", "clustercidrs,podcidrs,routingpolicies,nodenetworks", "-o", "wide"],
        &["get", "pods", "-A", "-o", "wide"],
        &["get", "events", "-A", "--sort-by=.metadata.creationTimestamp"],
        &plat,
    ] {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{name}-cp")).arg("--").arg(tools().join("kubectl"));
        command.arg("--kubeconfig").arg(run.join("admin.kubeconfig")).arg("--request-timeout=5s").args(args);
        let said = output(&mut command).unwrap_or_else(|e| format!("{e:#}"));
        let lines: Vec<_> = said.lines().collect();
        let last = &lines[lines.len().saturating_sub(150)..];
        let _ = writeln!(text, "--- kubectl {}\n{}", args.join(" "), last.join("\n"));
    }
    text
}

/// Prints the cluster's state when a test panics, as the cluster is gone by the time that anyone looks.
fn diagnose_panics(name: &str, run: &Path) {
    let (name, run) = (name.to_owned(), run.to_owned());
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        eprintln!("{}", diagnosis(&name, &run));
    }));
}

impl Deref for Cluster {
    type Target = Testbed;

    fn deref(&self) -> &Testbed {
        &self.0
    }
}

/// A pod to be run.
#[derive(Clone, Copy, Debug)]
pub struct PodSpec<'a> {
    /// Its name, which is also its label `app`.
    pub name: &'a str,
    /// The node to which it is pinned.
    pub node: u8,
    /// Whether it uses the node's network; it then serves on port 8081 instead of 8080.
    pub host_network: bool,
}

impl PodSpec<'_> {
    fn port(&self) -> u16 {
        if self.host_network { 8081 } else { 8080 }
    }

    fn manifest(&self) -> String {
        let PodSpec { name, node, host_network } = self;
        let port = self.port();
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, labels: {{app: {name}}}}}\n\
             spec:\n  nodeName: n{node}\n  hostNetwork: {host_network}\n  terminationGracePeriodSeconds: 0\n  \
             tolerations: [{{operator: Exists}}]\n  containers:\n  - name: probe\n    image: localhost/plat-test:1\n    \
             imagePullPolicy: Never\n    command: [probe, serve, \"{port}\"]\n"
        )
    }
}

/// A pod that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: u8,
    /// Its addresses; the node's if it uses the node's network.
    pub ips: Vec<IpAddr>,
    /// The port on which it answers.
    pub port: u16,
}

impl Pod {
    /// Its first address.
    pub fn ip(&self) -> IpAddr {
        self.ips.first().copied().unwrap_or(IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED))
    }
}

/// The InternalIP (IPv4) of node `n<node>`.
pub fn node_ip(node: u8) -> IpAddr {
    IpAddr::from([172, 30, 0, 10 + node])
}

/// The InternalIPs of node `n<node>`, IPv4 first.
pub fn node_ips(node: u8) -> [IpAddr; 2] {
    [node_ip(node), IpAddr::from([0xfd00, 0x30, 0, 0, 0, 0, 0, 16 + u16::from(node)])]
}

/// The items of a list.
pub fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().map(Vec::as_slice).unwrap_or_default().iter()
}

/// The name of an object.
pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// The status of a condition: `True`, `False` or `Unknown`.
pub fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a str> {
    find_condition(object, type_)?["status"].as_str()
}

/// A condition.
pub fn find_condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == type_)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("the checkout lies in a folder whose name is not UTF-8")
}
