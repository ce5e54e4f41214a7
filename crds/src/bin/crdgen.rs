//! Prints the CRDs as YAML documents: `cargo run --bin crdgen` (see `make generate`).

use kube::CustomResourceExt;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for crd in [ClusterCIDR::crd(), PodCIDR::crd(), NodeNetwork::crd()] {
        println!("---\n{}", serde_saphyr::to_string(&crd)?.trim_end());
    }
    Ok(())
}
