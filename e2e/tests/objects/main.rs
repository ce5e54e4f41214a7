//! The objects on a real API server: every rule, bound, default and immutable field of the CRDs, tried with
//! what it accepts and what it refuses; what kubectl shows of them; and who may do what with them.

mod bounds;
mod rights;
mod rules;
mod shown;

use std::path::Path;

use kube::api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use kube::{Api, ResourceExt};
use plat_e2e::light::{ControlPlane, KINDS};
use serde_json::{Value, json};

/// The CRDs, as the API server has them.
fn crds() -> Vec<Value> {
    let list = ControlPlane::shared().get(&["crds"]).unwrap();
    let crds: Vec<_> = list["items"].as_array().unwrap().clone();
    assert_eq!(crds.len(), KINDS.len());
    crds
}

fn cluster_cidr(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "plat.network/v1alpha1", "kind": "ClusterCIDR", "metadata": {"name": name}, "spec": spec})
}

fn pod_cidr(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "plat.network/v1alpha1", "kind": "PodCIDR", "metadata": {"name": name}, "spec": spec})
}

fn routing_policy(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "plat.network/v1alpha1", "kind": "RoutingPolicy", "metadata": {"name": name}, "spec": spec})
}

fn node_network(name: &str) -> Value {
    json!({"apiVersion": "plat.network/v1alpha1", "kind": "NodeNetwork", "metadata": {"name": name}})
}

/// Whether a request only asks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Really {
    Do,
    DryRun,
}

/// Creates an object; the error is the API server's message.
fn create(plane: &ControlPlane, object: &Value, really: Really) -> Result<DynamicObject, String> {
    let (api, object) = (kind_of(object), object.clone());
    let parameters = PostParams { dry_run: really == Really::DryRun, ..PostParams::default() };
    plane.block_on(async move |client| {
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        Api::all_with(client, &api).create(&parameters, &object).await.map_err(message)
    })
}

/// Merge-patches an object or, for a patch that has a `status`, its status, as administrator.
fn patch(
    plane: &ControlPlane,
    object: &Value,
    patch: Value,
    really: Really,
) -> Result<DynamicObject, String> {
    patch_as(plane, &plane.admin_kubeconfig(), object, patch, really)
}

/// The same as whoever that kubeconfig is for.
fn patch_as(
    plane: &ControlPlane,
    kubeconfig: &Path,
    object: &Value,
    patch: Value,
    really: Really,
) -> Result<DynamicObject, String> {
    let (api, name) = (kind_of(object), object["metadata"]["name"].as_str().unwrap().to_owned());
    let parameters = PatchParams { dry_run: really == Really::DryRun, ..PatchParams::default() };
    plane.block_on_as(kubeconfig, async move |client| {
        let api: Api<DynamicObject> = Api::all_with(client, &api);
        let status = patch.get("status").is_some();
        let patch = Patch::Merge(patch);
        let patched = match status {
            true => api.patch_status(&name, &parameters, &patch).await,
            false => api.patch(&name, &parameters, &patch).await,
        };
        patched.map_err(message)
    })
}

/// Creates an object for good, or finds it there.
fn ensure(plane: &ControlPlane, object: &Value) -> DynamicObject {
    let (api, object) = (kind_of(object), object.clone());
    plane.block_on(async move |client| {
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        let api: Api<DynamicObject> = Api::all_with(client, &api);
        match api.create(&PostParams::default(), &object).await {
            Ok(created) => created,
            Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                api.get(&object.name_any()).await.unwrap()
            }
            Err(e) => panic!("cannot create {object:?}: {e}"),
        }
    })
}

fn kind_of(object: &Value) -> ApiResource {
    let kind = object["kind"].as_str().unwrap();
    let gvk = GroupVersionKind::gvk("plat.network", "v1alpha1", kind);
    ApiResource::from_gvk_with_plural(&gvk, &format!("{}s", kind.to_lowercase().replace("policy", "policie")))
}

fn message(error: kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message,
        other => other.to_string(),
    }
}
