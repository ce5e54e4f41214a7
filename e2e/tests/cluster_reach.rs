//! Who reaches whom in a cluster that was installed without a single value, whatever bridge netfilter and
//! kube-proxy do; and in a dual-stack one.

use std::time::Duration;

use plat_e2e::cluster::{Cluster, PodSpec, ProxyMode};
use plat_e2e::matrix::Matrix;
use plat_e2e::plat::{block_of, blocks_of, doubles};

const DEADLINE: Duration = Duration::from_secs(60);

/// Two pods and a pod of the node's network on each of that many nodes.
fn matrix(cluster: &Cluster, nodes: u8) -> Matrix<'_> {
    let name = |letter: char, node: u8| format!("{letter}{node}");
    let names: Vec<_> = (1..=nodes).flat_map(|n| [(name('a', n), n), (name('b', n), n)]).collect();
    let hosts: Vec<_> = (1..=nodes).map(|n| (name('h', n), n)).collect();
    let specs = |names: &[(String, u8)], host_network| -> Vec<_> {
        let run = |(name, node): &(String, u8)| (name.clone(), *node, host_network);
        names.iter().map(run).collect::<Vec<(String, u8, bool)>>()
    };
    let run = |specs: Vec<(String, u8, bool)>| {
        let specs: Vec<_> = specs
            .iter()
            .map(|(name, node, host_network)| PodSpec { name, node: *node, host_network: *host_network })
            .collect();
        cluster.run_pods(&specs, DEADLINE).unwrap()
    };
    let (pods, hosts) = (run(specs(&names, false)), run(specs(&hosts, true)));
    Matrix::new(cluster, &pods, &hosts).unwrap()
}

fn set_bridge_netfilter(cluster: &Cluster, nodes: u8, on: u8) {
    for node in 1..=nodes {
        let line = format!(
            "sysctl -q -w net.bridge.bridge-nf-call-iptables={on} net.bridge.bridge-nf-call-ip6tables={on}"
        );
        cluster.on_node(node, &line).unwrap();
    }
}

#[test]
fn every_way_is_open_with_bridge_netfilter_on_and_off_and_in_both_modes_of_kube_proxy() {
    let cluster = Cluster::with_plat(3, &[]);
    let matrix = matrix(&cluster, 3);
    for mode in [ProxyMode::Nftables, ProxyMode::Iptables] {
        if mode == ProxyMode::Iptables {
            (1..=3).for_each(|node| cluster.set_proxy(node, mode).unwrap());
        }
        for netfilter in [1, 0] {
            set_bridge_netfilter(&cluster, 3, netfilter);
            let what =
                format!("with bridge-nf-call-iptables={netfilter} and kube-proxy in mode {}", mode.as_str());
            assert_eq!(matrix.wait_all_right(&what, DEADLINE), 6 * 16 + 3 * 6);
        }
    }
    // As Docker and many a firewall leave it; and what iptables shows of our rules, iptables can restore.
    for node in 1..=3 {
        cluster.on_node(node, "iptables -P FORWARD DROP && ip6tables -P FORWARD DROP").unwrap();
    }
    matrix.wait_all_right("with policy DROP in FORWARD", DEADLINE);
    cluster.on_node(1, "iptables-save >/tmp/saved && iptables-restore </tmp/saved").unwrap();
    matrix.wait_all_right("after iptables-save and -restore", DEADLINE);

    let mut blocks: Vec<_> = (1..=3).map(|node| block_of(&cluster, node).unwrap()).collect();
    blocks.sort();
    blocks.dedup();
    assert_eq!(blocks.len(), 3);
    assert!(blocks.iter().all(|b| b.starts_with("10.244.") && b.ends_with(".0/24")), "{blocks:?}");
    assert_eq!(doubles(&cluster, &[1, 2, 3]).unwrap(), Vec::<String>::new());
}

/// On two nodes in both families: two pods and a node each, with Services.
const BOTH_FAMILIES: usize = 2 * (4 * 11 + 2 * 4);

fn dual_stack(settings: &[&str]) -> Cluster {
    let cluster = Cluster::up(2, ProxyMode::Nftables).unwrap();
    let ranges = ["--set", "clusterCIDRs={10.244.0.0/16,fd00:10:244::/48}"];
    cluster.install_plat(&[&ranges, settings].concat()).unwrap();
    cluster.wait_nodes_ready(DEADLINE);
    cluster
}

#[test]
fn every_way_is_open_in_both_families() {
    let cluster = dual_stack(&[]);
    let matrix = matrix(&cluster, 2);
    assert_eq!(matrix.wait_all_right("in IPv4 and IPv6", DEADLINE), BOTH_FAMILIES);
    for node in [1, 2] {
        assert_eq!(blocks_of(&cluster, node).unwrap().len(), 2);
    }
}

#[test]
fn every_way_is_open_in_both_families_without_a_bridge() {
    let cluster = dual_stack(&["--set", "datapath=routed"]);
    let matrix = matrix(&cluster, 2);
    assert_eq!(matrix.wait_all_right("without a bridge", DEADLINE), BOTH_FAMILIES);
    for node in [1, 2] {
        let bridges = cluster.on_node(node, "ip -br link show type bridge").unwrap();
        assert_eq!(bridges, "", "n{node}");
        cluster.on_node(node, "iptables -P FORWARD DROP && ip6tables -P FORWARD DROP").unwrap();
    }
    matrix.wait_all_right("without a bridge, with policy DROP in FORWARD", DEADLINE);
}
