//! Node objects, and the reports of agents that are not there.

use plat_crds::digest::Digest;
use serde_json::{Value, json};

/// A Node as its kubelet registers it before there is a network: not Ready. Of the size that one has without
/// images, which kubelets list by the dozen.
pub fn node(name: &str, number: usize) -> Value {
    let labels = json!({
        "kubernetes.io/hostname": name, "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux",
        "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux",
        "node.kubernetes.io/instance-type": "m5.xlarge", "beta.kubernetes.io/instance-type": "m5.xlarge",
        "topology.kubernetes.io/region": "eu-1", "topology.kubernetes.io/zone": format!("eu-1{}", ["a", "b", "c"][number % 3]),
        "failure-domain.beta.kubernetes.io/region": "eu-1", "example.org/pool": format!("pool-{}", number % 7),
    });
    let at = "2026-01-01T00:00:00Z";
    let condition = |type_: &str, status: &str, reason: &str| {
        json!({"type": type_, "status": status, "reason": reason, "message": format!("kubelet has {reason}"),
            "lastHeartbeatTime": at, "lastTransitionTime": at})
    };
    let resources = json!({"cpu": "4", "memory": "16123456Ki", "pods": "110", "ephemeral-storage": "102687672Ki", "hugepages-2Mi": "0"});
    let id = format!("{number:032x}");
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": labels, "annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true"}},
        "spec": {"providerID": format!("cloud:///eu-1a/i-{id}"), "taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]},
        "status": {
            "capacity": resources, "allocatable": resources,
            "addresses": [{"type": "InternalIP", "address": address(number)}, {"type": "Hostname", "address": name}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
            "nodeInfo": {"machineID": id, "systemUUID": id, "bootID": id, "kernelVersion": "6.12.0", "osImage": "Linux",
                "containerRuntimeVersion": "containerd://2.1.0", "kubeletVersion": "v1.37.0", "kubeProxyVersion": "",
                "operatingSystem": "linux", "architecture": "amd64"},
            "conditions": [
                condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
                condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
                condition("PIDPressure", "False", "KubeletHasSufficientPID"),
                condition("Ready", "False", "KubeletNotReady"),
            ],
        },
    })
}

fn address(number: usize) -> String {
    format!("172.{}.{}.{}", 16 + number / 62_500, number / 250 % 250, number % 250 + 1)
}

/// The patch by which a kubelet says that its node is Ready.
pub fn ready() -> Value {
    let condition = json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready status"});
    json!({"status": {"conditions": [condition]}})
}

/// The report of an agent whose kernel carries these sums of objects. With no block yet it is not programmed.
pub fn report(node: &str, held: Option<&str>, used: usize, applied: Digest, objects: usize) -> Value {
    let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let programmed = if held.is_some() { "True" } else { "False" };
    let condition = |type_: &str, status: &str| json!({"type": type_, "status": status, "reason": "Imitated", "message": "", "lastTransitionTime": now});
    let held: Vec<_> = held.iter().map(|cidr| json!({"cidr": cidr, "used": used, "capacity": 253})).collect();
    json!({
        "apiVersion": "plat.network/v1alpha1", "kind": "NodeNetwork", "metadata": {"name": node},
        "status": {
            "reportedAt": now, "heldBlocks": held, "agentVersion": "0.1.0",
            "applied": {"count": objects, "digest": applied.to_string()},
            "routes": {"desired": objects, "installed": objects, "repaired": 0},
            "conditions": [
                condition("RoutesReady", "True"), condition("MasqueradeReady", "True"), condition("CNIReady", programmed),
                condition("ForwardingBlocked", "False"), condition("Overlapping", "False"),
            ],
        },
    })
}
