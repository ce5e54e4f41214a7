//! Who is measured: which objects tell it of a node, and how it is started.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Request};
use kube::{Client, Resource};
use plat_crds::{ClusterCIDR, PodCIDR};
use plat_e2e::bare::{BareNode, Process};
use plat_e2e::light::ControlPlane;
use serde_json::{Value, json};

use crate::Args;

/// Requests in flight when many objects are made.
const AT_ONCE: usize = 48;
/// Pods' addresses: 8,192 blocks of /24.
pub const RANGE: &str = "10.224.0.0/11";

/// Who keeps the routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The agent, which learns of nodes by PodCIDRs.
    Plat,
    /// flannel's host-gw backend, which learns of them by annotated Nodes.
    Flannel,
}

/// Block of node `number`, from 1 on. Node 1 is the one that is measured.
pub fn block(number: usize) -> String {
    format!("10.{}.{}.0/24", 224 + number / 256, number % 256)
}

/// All nodes are on one link.
fn address(number: usize) -> String {
    match number {
        1 => "172.30.0.11".to_owned(),
        _ => format!("172.{}.{}.{}", 16 + number / 62_500, number / 250 % 250, number % 250 + 1),
    }
}

fn node_name(number: usize) -> String {
    format!("n{number}")
}

impl Who {
    /// Its name in figures.
    pub fn name(self) -> &'static str {
        match self {
            Who::Plat => "plat",
            Who::Flannel => "flannel host-gw",
        }
    }

    fn object(self, number: usize) -> Value {
        let (name, block, address) = (node_name(number), block(number), address(number));
        match self {
            Who::Plat => json!({
                "apiVersion": "plat.network/v1alpha1", "kind": "PodCIDR",
                "metadata": {"name": block.replace(['.', '/'], "-")},
                "spec": {"cidr": block, "clusterCIDR": "bench", "nodeName": name, "nodeAddresses": [address], "state": "Active"},
            }),
            Who::Flannel => {
                let mine = |key: &str| format!("flannel.alpha.coreos.com/{key}");
                json!({
                    "apiVersion": "v1", "kind": "Node",
                    "metadata": {"name": name, "annotations": {
                        mine("backend-type"): "host-gw", mine("backend-data"): "null", mine("public-ip"): address,
                        mine("kube-subnet-manager"): "true",
                    }},
                    "spec": {"podCIDR": block, "podCIDRs": [block]},
                })
            }
        }
    }

    fn url(self) -> String {
        match self {
            Who::Plat => PodCIDR::url_path(&(), None),
            Who::Flannel => Node::url_path(&(), None),
        }
    }

    fn object_name(self, number: usize) -> String {
        match self {
            Who::Plat => block(number).replace(['.', '/'], "-"),
            Who::Flannel => node_name(number),
        }
    }

    /// Makes the object of one node.
    pub async fn join(self, client: &Client, number: usize) -> Result<()> {
        let body = self.object(number).to_string().into_bytes();
        client.request_text(Request::new(self.url()).create(&PostParams::default(), body)?).await?;
        Ok(())
    }

    /// Takes it away, as whoever owns such objects does.
    async fn leave(self, client: &Client, number: usize) -> Result<()> {
        let name = self.object_name(number);
        if self == Who::Plat {
            // Blocks are released before they go.
            let patch = Patch::Merge(json!({"spec": {"state": "Quarantined"}}));
            let request = Request::new(self.url()).patch(&name, &PatchParams::default(), &patch)?;
            client.request_text(request).await?;
        }
        client.request_text(Request::new(self.url()).delete(&name, &DeleteParams::default())?).await?;
        Ok(())
    }

    /// Makes the objects of many nodes.
    pub async fn join_all(self, client: &Client, numbers: impl Iterator<Item = usize>) -> Result<()> {
        futures::stream::iter(numbers.map(|number| self.join(client, number)))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    }

    /// Takes those of many nodes away.
    pub async fn leave_all(self, client: &Client, numbers: impl Iterator<Item = usize>) -> Result<()> {
        futures::stream::iter(numbers.map(|number| self.leave(client, number)))
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    }

    /// Starts it on a node, with an empty folder, under another program if there is one (`strace …`).
    pub fn start(
        self,
        args: &Args,
        plane: &ControlPlane,
        node: &BareNode<'_>,
        under: &[String],
    ) -> Result<Process> {
        let whole = |path: &Path| fs::canonicalize(path).with_context(|| format!("no {}", path.display()));
        let folder = node.folder();
        let mut command: Vec<String> = under.to_vec();
        match self {
            Who::Plat => {
                let _first_time = fs::remove_dir_all(folder.join("run"));
                fs::create_dir_all(folder.join("run"))?;
                command.push(whole(&args.agent)?.display().to_string());
                let at = |flag: &str, file: &str| format!("--{flag}={}", folder.join(file).display());
                command.extend([at("run-dir", "run"), at("cni-bin-dir", "bin"), at("cni-conf-dir", "conf")]);
                command.extend([at("socket", "agent.sock"), format!("--node-name={}", node.name())]);
                command.push(format!("--plugin={}", whole(&args.plugin)?.display()));
            }
            Who::Flannel => {
                let conf = folder.join("net-conf.json");
                fs::write(&conf, json!({"Network": RANGE, "Backend": {"Type": "host-gw"}}).to_string())?;
                command.extend(["/usr/bin/env".to_owned(), format!("NODE_NAME={}", node.name())]);
                command.push(whole(&args.flannel)?.display().to_string());
                command.extend([
                    format!("--kubeconfig={}", plane.admin_kubeconfig().display()),
                    format!("--net-config-path={}", conf.display()),
                ]);
            }
        }
        let (program, rest) = command.split_first().context("no program")?;
        let log = format!("{}/{self:?}.log", node.name());
        Process::start(plane, &node.name(), &log, program, rest, &plane.admin_kubeconfig())
    }
}

/// The range of all blocks, as the operator leaves it.
pub async fn make_range(client: &Client) -> Result<()> {
    let body = json!({
        "apiVersion": "plat.network/v1alpha1", "kind": "ClusterCIDR", "metadata": {"name": "bench"},
        "spec": {"cidr": RANGE},
    });
    let url = ClusterCIDR::url_path(&(), None);
    let create = Request::new(url.clone()).create(&PostParams::default(), body.to_string().into_bytes())?;
    client.request_text(create).await?;
    let at = "2026-01-01T00:00:00Z";
    let ready = json!({"type": "Ready", "status": "True", "reason": "Bench", "message": "", "lastTransitionTime": at});
    let patch = Patch::Merge(json!({"status": {"conditions": [ready]}}));
    let request = Request::new(url).patch_subresource("status", "bench", &PatchParams::default(), &patch)?;
    client.request_text(request).await?;
    Ok(())
}
