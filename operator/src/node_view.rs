//! The part of a Node that the operator reads. Images, capacity and the rest are never kept: a node's
//! status is large, and every kubelet sends it every few minutes.

use std::borrow::Cow;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use serde::Deserialize;

/// A Node with the fields that matter here.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct NodeView {
    /// Name, uid, labels, creation.
    pub metadata: ObjectMeta,
    /// Pod CIDRs.
    #[serde(default)]
    pub spec: SpecView,
    /// Addresses, conditions and the number of pods.
    #[serde(default)]
    pub status: StatusView,
}

/// Part of `Node.spec`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SpecView {
    /// The first pod CIDR; the only one in objects of old versions.
    #[serde(default, rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    /// All pod CIDRs, primary family first. Write-once.
    #[serde(default, rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<String>>,
    /// Taints, of which one key is looked for.
    #[serde(default)]
    pub taints: Option<Vec<TaintView>>,
}

/// One of `Node.spec.taints`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct TaintView {
    /// Its key.
    pub key: String,
}

/// Part of `Node.status`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct StatusView {
    /// Addresses of all types.
    #[serde(default)]
    pub addresses: Option<Vec<AddressView>>,
    /// Conditions, of which `Ready` and `NetworkUnavailable` are read.
    #[serde(default)]
    pub conditions: Option<Vec<ConditionView>>,
    /// What pods may use of the node.
    #[serde(default)]
    pub allocatable: Option<AllocatableView>,
}

/// Part of `Node.status.allocatable`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct AllocatableView {
    /// How many pods may run, as a quantity (`110`, `1k`).
    #[serde(default)]
    pub pods: Option<String>,
}

/// One of `Node.status.addresses`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct AddressView {
    /// `InternalIP`, `ExternalIP`, `Hostname`, …
    #[serde(rename = "type")]
    pub type_: String,
    /// The address as text.
    pub address: String,
}

/// One of `Node.status.conditions`.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ConditionView {
    /// Condition type.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

/// It is read from where Nodes are.
impl Resource for NodeView {
    type DynamicType = ();
    type Scope = <Node as Resource>::Scope;

    fn kind(_: &()) -> Cow<'_, str> {
        <Node as Resource>::kind(&())
    }

    fn group(_: &()) -> Cow<'_, str> {
        <Node as Resource>::group(&())
    }

    fn version(_: &()) -> Cow<'_, str> {
        <Node as Resource>::version(&())
    }

    fn plural(_: &()) -> Cow<'_, str> {
        <Node as Resource>::plural(&())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
