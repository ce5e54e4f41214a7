//! Pods of a [`BareNode`] that are a network namespace and nothing else, connected as a container runtime does:
//! by the installed CNI binary, with what the agent wrote. Hundreds of them run on one node.
//!
//! Their namespaces are held by a mount namespace of their own, so that they end with this value, and also when
//! its process is killed.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bare::BareNode;
use crate::testbed::{feed, images, output};

/// As many calls at once as a busy kubelet makes.
const AT_ONCE: usize = 32;

/// The pods of one node.
#[derive(Debug)]
pub struct Pods<'a> {
    node: &'a BareNode<'a>,
    holder: Child,
    folder: PathBuf,
}

impl<'a> Pods<'a> {
    /// No pods yet, on that node.
    pub fn on(node: &'a BareNode<'a>) -> Result<Pods<'a>> {
        let folder = node.folder().join("pods");
        fs::create_dir_all(&folder)?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig=KILL", "--", "unshare", "--mount", "--propagation=private", "--"]);
        // It says when it is there.
        command.args(["sh", "-c", "echo there; exec sleep infinity"]);
        let mut holder = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut said = [0; 6];
        let mut stdout = holder.stdout.take().context("it has a standard output")?;
        std::io::Read::read_exact(&mut stdout, &mut said)?;
        Ok(Pods { node, holder, folder })
    }

    fn namespace(&self, pod: &str) -> String {
        self.folder.join(pod).display().to_string()
    }

    /// A program in the node's network that sees the pods' namespaces.
    fn on_node(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.id()));
        command.arg(format!("--net=/run/netns/{}", self.node.namespace())).arg("--");
        command
    }

    /// A program in a pod.
    pub fn inside(&self, pod: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.holder.id()));
        // The path means what it means in there.
        command.args(["--", "nsenter", &format!("--net={}", self.namespace(pod)), "--", program]);
        command
    }

    /// Makes these pods' namespaces.
    pub fn make(&self, pods: &[String]) -> Result<()> {
        let script = "for pod; do : >\"$pod\"; unshare --net=\"$pod\" true; done";
        let paths = pods.iter().map(|pod| self.namespace(pod));
        output(self.on_node().args(["sh", "-ec", script, "sh"]).args(paths)).map(drop)
    }

    /// One call of the CNI binary; its answer.
    pub fn call(&self, verb: &str, pod: &str) -> Result<String> {
        let conf = self.node.conf()?;
        let mut command = self.on_node();
        command.args(["env", "-i", &format!("CNI_COMMAND={verb}"), &format!("CNI_CONTAINERID={pod}")]);
        command.args(["CNI_IFNAME=eth0", "CNI_PATH=/nowhere", &format!("CNI_NETNS={}", self.namespace(pod))]);
        command.arg(images().join("bin/plat"));
        feed(&mut command, &conf.to_string()).with_context(|| format!("{verb} of {pod}"))
    }

    /// The same for many pods, many at once; the answers in the pods' order. One failure fails it.
    pub fn call_all(&self, verb: &str, pods: &[String]) -> Result<Vec<String>> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some((at, pod)) =
                Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, pods.get(at)?)))
            {
                done.push((at, self.call(verb, pod)?));
            }
            Ok::<_, anyhow::Error>(done)
        };
        let mut answers = Vec::new();
        thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                answers.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            Ok::<_, anyhow::Error>(())
        })?;
        ensure!(answers.len() == pods.len(), "{} answers for {} pods", answers.len(), pods.len());
        answers.sort();
        Ok(answers.into_iter().map(|(_, answer)| answer).collect())
    }

    /// Makes pods and connects them; their addresses of that family, in the pods' order.
    pub fn start(&self, pods: &[String]) -> Result<Vec<std::net::IpAddr>> {
        self.make(pods)?;
        let answers = self.call_all("ADD", pods)?;
        answers.iter().map(|answer| first_address(answer)).collect()
    }
}

/// The first address of an ADD's answer.
pub fn first_address(answer: &str) -> Result<std::net::IpAddr> {
    let result: Value = serde_json::from_str(answer)?;
    let text = result["ips"][0]["address"].as_str().context("it has an address")?;
    Ok(text.split('/').next().unwrap_or_default().parse()?)
}

impl Drop for Pods<'_> {
    fn drop(&mut self) {
        let _ended = self.holder.kill();
        let _reaped = self.holder.wait();
    }
}
