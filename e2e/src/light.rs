//! A control plane without nodes: real etcd and kube-apiserver, hand-made Node objects. Ready in 3 s.

use std::fs;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::json;

use crate::testbed::{Extent, Testbed, output, repository};
use crate::wait::wait_until;

/// The kinds that the chart installs.
pub const KINDS: [&str; 4] = ["clustercidrs", "podcidrs", "routingpolicies", "nodenetworks"];

/// etcd and API server. See [`Testbed`] for what can be done with it.
#[derive(Debug)]
pub struct ControlPlane(Testbed);

/// What a service account's token is bound to. A token that is bound to a node, or to a pod of a node,
/// carries the node's name as a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound<'a> {
    /// Nothing.
    Free,
    /// A node of that name.
    Node(&'a str),
    /// A pod of that name, in the account's namespace.
    Pod(&'a str),
}

impl ControlPlane {
    /// A control plane of the caller's own.
    pub fn up() -> Result<ControlPlane> {
        Ok(ControlPlane(Testbed::up(Extent::Core, &[])?))
    }

    /// The same, with an audit log: see [`crate::audit`].
    pub fn audited() -> Result<ControlPlane> {
        Ok(ControlPlane(Testbed::up(Extent::Core, &[("AUDIT", "1")])?))
    }

    /// The one that all tests of this process share, with Plat's CRDs.
    ///
    /// # Panics
    /// If it cannot be brought up.
    pub fn shared() -> &'static ControlPlane {
        static SHARED: LazyLock<ControlPlane> = LazyLock::new(|| {
            let plane = ControlPlane::up().unwrap_or_else(|e| panic!("no control plane: {e:#}"));
            plane.install_crds().unwrap_or_else(|e| panic!("cannot install the CRDs: {e:#}"));
            plane
        });
        &SHARED
    }

    /// Installs the CRDs that the chart ships, and waits until objects of their kinds are accepted. A
    /// warning of the API server is an error.
    pub fn install_crds(&self) -> Result<()> {
        self.apply(&fs::read_to_string(repository().join("charts/plat/crd/crds.yaml"))?)?;
        let kinds = KINDS.map(|kind| format!("crd/{kind}.plat.network"));
        let mut command = self.kubectl_command();
        output(command.args(["wait", "--for=condition=Established", "--timeout=20s"]).args(kinds))?;
        // Names, categories and schemas are published a moment later.
        for kind in KINDS {
            wait_until("kubectl knows the kind", Duration::from_secs(20), || {
                self.kubectl(&["explain", kind])
            });
        }
        Ok(())
    }

    /// A token of a service account, for an hour.
    pub fn token(&self, namespace: &str, account: &str, bound: Bound<'_>) -> Result<String> {
        let mut command = self.kubectl_command();
        command.args(["-n", namespace, "create", "token", account]);
        match bound {
            Bound::Free => {}
            Bound::Node(name) => {
                command.args(["--bound-object-kind=Node", "--bound-object-name", name]);
            }
            Bound::Pod(name) => {
                command.args(["--bound-object-kind=Pod", "--bound-object-name", name]);
            }
        }
        Ok(output(&mut command)?.trim().to_owned())
    }

    /// A kubeconfig file that proves itself by `token`; `name` becomes part of the file name.
    pub fn kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        let admin = fs::read_to_string(self.admin_kubeconfig())?;
        let path = self.run_folder().join(format!("{name}.kubeconfig"));
        fs::write(&path, admin.replace(&format!("admin-{}", self.name()), token))?;
        Ok(path)
    }
}

impl Deref for ControlPlane {
    type Target = Testbed;

    fn deref(&self) -> &Testbed {
        &self.0
    }
}

/// Creates a Node as a kubelet would leave it: Ready, with these InternalIPs.
pub async fn create_node(client: &Client, name: &str, addresses: &[&str]) -> Result<Node> {
    create_node_with(client, name, addresses, None).await
}

/// The same with a podCIDR, as another allocator would leave it.
pub async fn create_node_with(
    client: &Client,
    name: &str,
    addresses: &[&str],
    pod_cidr: Option<&str>,
) -> Result<Node> {
    let api: Api<Node> = Api::all(client.clone());
    let spec = pod_cidr.map_or_else(|| json!({}), |cidr| json!({"podCIDR": cidr, "podCIDRs": [cidr]}));
    let metadata = json!({"name": name, "labels": {"kubernetes.io/hostname": name}});
    let node: Node = serde_json::from_value(json!({"metadata": metadata, "spec": spec}))?;
    api.create(&PostParams::default(), &node).await?;
    let addresses: Vec<_> = addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
    let ready =
        json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "made by hand"});
    let status = json!({"status": {"addresses": addresses, "conditions": [ready]}});
    Ok(api.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await?)
}

/// Deletes a Node.
pub async fn delete_node(client: &Client, name: &str) -> Result<()> {
    Api::<Node>::all(client.clone()).delete(name, &DeleteParams::default()).await?;
    Ok(())
}
