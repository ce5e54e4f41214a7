//! The chart through its life: on a one-node cluster with `--wait`, its own test, an upgrade of values and of a
//! kind, and away again without a trace.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use plat_e2e::cluster::{Cluster, ProxyMode};
use plat_e2e::plat::{block_of, wait_converged};
use plat_e2e::testbed::{output, repository};
use plat_e2e::traffic::{Traffic, assert_none_lost};
use plat_e2e::wait_until;

const DEADLINE: Duration = Duration::from_secs(60);

/// What a network plugin may leave on a node, as text that can be compared.
fn traces(cluster: &Cluster, node: u8) -> BTreeMap<&'static str, String> {
    // Addresses and routes that the kernel makes for eth0 and lo stay out of the way of ours.
    let lines = [
        ("links", "ip -o link show | awk '{print $2, $9}'"),
        ("addresses", "ip -o addr show scope global | awk '{print $2, $4}'"),
        ("routes", "ip route show table all; ip -6 route show table all | grep -v fe80"),
        ("rules", "ip rule; ip -6 rule"),
        // kube-proxy's own tables change with every Service.
        (
            "nft",
            "for t in $(nft list tables | grep -v kube-proxy | awk '{print $2 \"/\" $3}'); do nft list table ${t%/*} ${t#*/}; done | \
            sed -E 's/ packets [0-9]+ bytes [0-9]+//' | sort",
        ),
        ("files", "find /etc/cni /opt/cni /run/plat 2>/dev/null | sort"),
        (
            "sysctls",
            "sysctl -a 2>/dev/null | grep -E '^net\\.ipv[46]\\.(ip_forward|conf\\.(all|default|eth0|lo)\\.)' | \
            grep -vE 'stable_secret|mc_forwarding' | sort",
        ),
    ];
    lines.into_iter().map(|(what, line)| (what, cluster.on_node(node, line).unwrap())).collect()
}

/// A copy of the chart whose PodCIDR has one more field, as a later version would.
fn later_chart(cluster: &Cluster) -> PathBuf {
    let copy = cluster.run_folder().join("later-chart");
    output(Command::new("cp").arg("-r").arg(repository().join("charts/plat")).arg(&copy)).unwrap();
    let path = copy.join("crd/crds.yaml");
    let crds = fs::read_to_string(&path).unwrap();
    let before = "                  mtu:\n";
    assert!(crds.contains(before), "the CRD is laid out differently now");
    let later = "                  zone:\n                    description: A field of a later version.\n                    \
                 maxLength: 63\n                    type: string\n";
    fs::write(&path, crds.replace(before, &format!("{later}{before}"))).unwrap();
    copy
}

/// The documented line, in the container of each agent. Exit code 1 means that something was found.
fn nothing_is_found_on_a_node_that_is_well(cluster: &Cluster) {
    let agents =
        ["get", "pods", "-n", "plat-system", "-l", "app.kubernetes.io/component=agent", "-o", "name"];
    let agents = cluster.kubectl(&agents).unwrap();
    assert_eq!(agents.lines().count(), 2, "{agents}");
    for pod in agents.lines() {
        wait_until("plat-agent check finds nothing", DEADLINE, || {
            let found = cluster.kubectl(&["exec", "-n", "plat-system", pod, "--", "/plat-agent", "check"])?;
            anyhow::ensure!(found.is_empty(), "{found}");
            Ok(())
        });
    }
}

#[test]
fn from_install_on_one_node_to_uninstall_without_a_trace() {
    let cluster = Cluster::up(1, ProxyMode::Nftables).unwrap();
    let before = traces(&cluster, 1);
    cluster.install_plat(&["--wait", "--timeout", "90s"]).unwrap();
    cluster.wait_nodes_ready(DEADLINE);
    wait_converged(&cluster, 1, DEADLINE);

    cluster.add_node(2).unwrap();
    cluster.wait_nodes_ready(DEADLINE);
    wait_converged(&cluster, 2, DEADLINE);
    let said = cluster.helm(&["test", "plat", "-n", "plat-system", "--timeout", "90s"]).unwrap();
    assert!(said.contains("Succeeded"), "{said}");
    nothing_is_found_on_a_node_that_is_well(&cluster);

    an_upgrade_of_values_and_of_a_kind_costs_no_datagram(&cluster);

    cluster.delete_pods(&["a", "b"]).unwrap();
    cluster.remove_plat().unwrap();
    wait_until("nothing of the release is left but the kinds and their objects", DEADLINE, || {
        let kinds = cluster.kubectl(&["api-resources", "--verbs=list", "-o", "name"])?;
        let kinds: Vec<_> = kinds
            .lines()
            .filter(|k| {
                !k.contains("plat.network") && !k.starts_with("events") && !k.ends_with("metrics.k8s.io")
            })
            .collect();
        let left = cluster.kubectl(&[
            "get",
            &kinds.join(","),
            "-A",
            "-o",
            "name",
            "-l",
            "app.kubernetes.io/instance=plat",
        ])?;
        let left: Vec<_> = left.lines().filter(|l| !l.ends_with(".plat.network")).collect();
        anyhow::ensure!(left.is_empty(), "{left:?}");
        Ok::<_, anyhow::Error>(())
    });
    wait_until("n1 is as it was", DEADLINE, || {
        let now = traces(&cluster, 1);
        let differs: Vec<_> = before
            .iter()
            .filter(|(what, was)| now[*what] != **was)
            .map(|(what, was)| format!("{what} were:\n{was}and are:\n{}", now[what]))
            .collect();
        plat_e2e::wait::holds(differs.is_empty(), differs.join("\n"))
    });
}

fn an_upgrade_of_values_and_of_a_kind_costs_no_datagram(cluster: &Cluster) {
    let pods = cluster.run_pair(DEADLINE).unwrap();
    let block = block_of(cluster, 1).unwrap().replace(['.', '/'], "-");
    let mine = r#"{"spec":{"routing":{"metric":77}}}"#;
    cluster.kubectl(&["patch", "podcidr", &block, "--type=merge", "-p", mine]).unwrap();

    let traffic = Traffic::both_ways(cluster, &pods[0], &pods[1]).unwrap();
    let later = later_chart(cluster);
    let values = ["--set", "logLevel=debug,holdSeconds=120,operator.replicas=1"];
    let mut args =
        vec!["upgrade", "plat", later.to_str().unwrap(), "-n", "plat-system", "--wait", "--timeout", "90s"];
    args.extend(values);
    cluster.helm(&args).unwrap();
    let args = cluster
        .kubectl(&["-n", "plat-system", "get", "daemonset", "plat-agent", "-o", "jsonpath={..args}"])
        .unwrap();
    assert!(args.contains("--hold-seconds=120"), "{args}");
    wait_until("the new field is there and users can set it", DEADLINE, || {
        let with_zone = r#"{"spec":{"routing":{"zone":"a"}}}"#;
        cluster.kubectl(&["patch", "podcidr", &block, "--type=merge", "-p", with_zone])?;
        let routing = cluster.kubectl(&["get", "podcidr", &block, "-o", "jsonpath={.spec.routing}"])?;
        anyhow::ensure!(routing == r#"{"metric":77,"zone":"a"}"#, "{routing}");
        Ok::<_, anyhow::Error>(())
    });
    wait_converged(cluster, 2, DEADLINE);
    assert_none_lost("helm upgrade", traffic);
}
