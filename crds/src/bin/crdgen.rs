//! Prints the CRDs as YAML documents: `cargo run --bin crdgen` (see `make generate`).

use kube::CustomResourceExt;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR, RoutingPolicy};
use serde_json::Value;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for crd in [ClusterCIDR::crd(), PodCIDR::crd(), RoutingPolicy::crd(), NodeNetwork::crd()] {
        let mut crd = serde_json::to_value(&crd)?;
        unwrap_descriptions(&mut crd);
        println!("---\n{}", serde_saphyr::to_string(&crd)?.trim_end());
    }
    Ok(())
}

/// Joins the lines of doc comments, as `kubectl explain` wraps them to its own width.
fn unwrap_descriptions(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                match field {
                    Value::String(text) if name == "description" => {
                        let paragraphs =
                            text.split("\n\n").map(|p| p.split('\n').collect::<Vec<_>>().join(" "));
                        *text = paragraphs.collect::<Vec<_>>().join("\n\n");
                    }
                    other => unwrap_descriptions(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(unwrap_descriptions),
        _ => {}
    }
}
