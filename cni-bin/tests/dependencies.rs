//! What the binary is made of.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use std::process::Command;

#[test]
fn the_binary_links_no_kubernetes_client_no_async_runtime_and_no_tls() {
    // By itself: built together with the others, features of shared crates would be united.
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--package", "plat-cni", "--edges", "normal", "--prefix", "none"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && tree.contains("plat-crds"),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let crates: Vec<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    for unwanted in [
        "kube",
        "kube-client",
        "k8s-openapi",
        "tokio",
        "hyper",
        "rustls",
        "ring",
        "openssl",
        "rtnetlink",
        "clap",
    ] {
        assert!(!crates.contains(&unwanted), "{unwanted} is linked:\n{tree}");
    }
}
