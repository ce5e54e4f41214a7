//! A cluster that runs on the reference plugins `bridge` and `host-local`, with pods whose connections are open,
//! while Plat is installed by its chart.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::IpAddr;
use std::process::{Child, Stdio};
use std::time::Duration;

use plat_e2e::cluster::{Cluster, Pod, PodSpec, ProxyMode, node_ip};
use plat_e2e::matrix::{Matrix, Way, faults};
use plat_e2e::plat::{block_of, double_addresses, events, leased, wait_converged};
use plat_e2e::testbed::tools;
use plat_e2e::traffic::{Traffic, assert_none_lost};
use plat_e2e::wait::{holds, wait_until};

const DEADLINE: Duration = Duration::from_secs(60);
/// The subnet of each node, which nobody would come upon by counting.
const SUBNETS: [(u8, &str); 2] = [(1, "10.244.71.0/24"), (2, "10.244.52.0/24")];
const HOST_LOCAL: &str = "ls /var/lib/cni/networks/reference | grep -E '^10\\.' || true";

/// The network that was there before: `bridge`, `host-local`, `portmap`, and routes by hand.
fn install_reference(cluster: &Cluster) {
    for (node, subnet) in SUBNETS {
        let plugins = tools().join("cni");
        cluster.on_node(node, &format!("cp {}/* /opt/cni/bin/", plugins.display())).unwrap();
        cluster.on_node(node, "sysctl -q -w net.ipv4.ip_forward=1").unwrap();
        for (other, its) in SUBNETS.into_iter().filter(|(other, _)| *other != node) {
            cluster.on_node(node, &format!("ip route add {its} via {}", node_ip(other))).unwrap();
        }
        let conflist = format!(
            r#"{{"cniVersion":"1.0.0","name":"reference","plugins":[{{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,
            "ipam":{{"type":"host-local","ranges":[[{{"subnet":"{subnet}"}}]],"routes":[{{"dst":"0.0.0.0/0"}}]}}}},
            {{"type":"portmap","capabilities":{{"portMappings":true}}}}]}}"#
        );
        cluster
            .on_node(
                node,
                &format!("echo '{conflist}' >/etc/cni/net.d/.t && mv /etc/cni/net.d/.t /etc/cni/net.d/10-reference.conflist"),
            )
            .unwrap();
    }
    // kube-controller-manager would have said it of n1; of n2 nobody but its pods knows.
    let spec = format!(r#"{{"spec":{{"podCIDR":"{0}","podCIDRs":["{0}"]}}}}"#, SUBNETS[0].1);
    cluster.kubectl(&["patch", "node", "n1", "-p", &spec]).unwrap();
    cluster.wait_nodes_ready(DEADLINE);
}

fn pod<'a>(name: &'a str, node: u8) -> PodSpec<'a> {
    PodSpec { name, node, host_network: false }
}

/// A TCP connection to a pod's server, on which a line goes each half second; at last it answers.
struct Connection {
    what: String,
    client: Child,
}

impl Connection {
    fn open(cluster: &Cluster, from: &Pod, to: &Pod) -> Connection {
        let script = format!(
            "exec 3<>/dev/tcp/{}/{} && printf 'GET / HTTP/1.0\\r\\n' >&3 && while ! read -t 0.5 end; do printf 'X-Still: here\\r\\n' >&3; done; printf '\\r\\n' >&3; cat <&3",
            to.ip(),
            to.port
        );
        let mut command = cluster.pod_network_command(from, "bash").unwrap();
        command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Connection { what: format!("{} to {}", from.name, to.name), client: command.spawn().unwrap() }
    }

    /// Ends it; the client that the server saw.
    fn end(mut self) -> String {
        writeln!(self.client.stdin.take().unwrap(), "end").unwrap();
        let output = self.client.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let body = said.lines().last().unwrap_or_default();
        let seen: Result<serde_json::Value, _> = serde_json::from_str(body);
        let seen = seen.unwrap_or_else(|e| {
            panic!(
                "the connection of {} broke: {e}: {said}{}",
                self.what,
                String::from_utf8_lossy(&output.stderr)
            )
        });
        seen["client"].as_str().unwrap().to_owned()
    }
}

#[test]
fn a_cluster_of_the_reference_plugins_is_taken_over_under_its_pods_and_can_go_back() {
    let cluster = Cluster::up(2, ProxyMode::Iptables).unwrap();
    cluster.tell_panics();
    install_reference(&cluster);
    let old = cluster.run_pods(&[pod("a", 1), pod("b", 1), pod("c", 2)], DEADLINE).unwrap();
    let (a, b, c) = (&old[0], &old[1], &old[2]);
    let connections =
        [(a, b), (a, c), (c, a), (b, c)].map(|(from, to)| (from, Connection::open(&cluster, from, to)));
    let mut traffic: Vec<Traffic> = Traffic::both_ways(&cluster, a, b).unwrap().into();
    traffic.extend(Traffic::both_ways(&cluster, b, c).unwrap());

    cluster.install_plat(&[]).unwrap();
    wait_converged(&cluster, 2, DEADLINE);
    for (node, subnet) in SUBNETS {
        assert_eq!(block_of(&cluster, node).unwrap(), subnet, "n{node} keeps what its pods have");
    }
    let new = cluster.run_pods(&[pod("d", 1), pod("e", 1), pod("f", 2)], DEADLINE).unwrap();
    let addresses: BTreeSet<IpAddr> = old.iter().chain(&new).map(Pod::ip).collect();
    assert_eq!(addresses.len(), 6, "{old:?} {new:?}");
    assert_eq!(double_addresses(&cluster, &[1, 2]).unwrap(), Vec::<String>::new());
    let all: Vec<Pod> = old.iter().chain(&new).cloned().collect();
    let ways =
        Matrix::new(&cluster, &all, &[]).unwrap().wait_all_right("between old pods and new ones", DEADLINE);
    let sent = assert_none_lost("the takeover", traffic);
    for (from, connection) in connections {
        assert_eq!(connection.end(), from.ip().to_string(), "as itself");
    }
    println!("figure: {sent} datagrams and 4 connections over the takeover, none lost; {ways} ways open");
    told_what_is_left(&cluster);

    cluster.delete_pods(&["a", "b", "c"]).unwrap();
    for node in [1, 2] {
        let news: BTreeSet<IpAddr> = new.iter().filter(|pod| pod.node == node).map(Pod::ip).collect();
        wait_until("only new pods have leases", DEADLINE, || {
            let leased = leased(&cluster, node).map_err(|e| e.to_string())?;
            holds(leased == news, format!("n{node}: {leased:?}"))
        });
        assert_eq!(cluster.on_node(node, HOST_LOCAL).unwrap(), "", "host-local's files");
        let links = cluster.on_node(node, "ip -br link show type veth | grep -c ^veth || true").unwrap();
        assert_eq!(links.trim(), "0", "links of the reference on n{node}");
        let records = cluster.on_node(node, "ls /var/lib/cni/results | grep ^reference- || true").unwrap();
        assert_eq!(records, "");
    }
    assert_eq!(events(&cluster, "FailedKillPod").unwrap().len(), 0);
    // Addresses that were the old pods' are given again.
    let again = cluster.run_pods(&[pod("a", 1), pod("c", 2)], DEADLINE).unwrap();
    let all: Vec<Pod> = again.iter().chain(&new).cloned().collect();
    Matrix::new(&cluster, &all, &[]).unwrap().wait_all_right("after the old pods are gone", DEADLINE);
    goes_back(&cluster);
}

/// As the documentation has it: Plat's pods end, then Plat goes, and the network from before goes on.
fn goes_back(cluster: &Cluster) {
    cluster.delete_pods(&["a", "c", "d", "e", "f"]).unwrap();
    cluster.remove_plat().unwrap();
    for (node, _) in SUBNETS {
        let confs = cluster.on_node(node, "ls /etc/cni/net.d").unwrap();
        assert_eq!(confs.trim(), "10-reference.conflist", "on n{node}");
    }
    cluster.wait_nodes_ready(DEADLINE);
    let back = cluster.run_pods(&[pod("g", 1), pod("h", 1), pod("i", 2)], DEADLINE).unwrap();
    for pod in &back {
        let files = cluster.on_node(pod.node, HOST_LOCAL).unwrap();
        assert!(files.lines().any(|address| address == pod.ip().to_string()), "{pod:?}: {files}");
    }
    let matrix = Matrix::new(cluster, &back, &[]).unwrap();
    wait_until("every way inside is open on the old network again", DEADLINE, || {
        let mut checks = matrix.check().map_err(|e| format!("{e:#}"))?;
        // That network masquerades nothing.
        checks.retain(|check| check.way != Way::PodToOutside);
        holds(!checks.is_empty() && faults(&checks).is_empty(), faults(&checks).join("\n"))
    });
}

fn told_what_is_left(cluster: &Cluster) {
    for (node, pods) in [(1, 2), (2, 1)] {
        let wanted = serde_json::json!({"active": "05-plat.conflist", "others": ["10-reference.conflist"], "foreignPods": pods});
        wait_until("the report names what is left of the other network", DEADLINE, || {
            let report = cluster.get(&["nodenetwork", &format!("n{node}")]).map_err(|e| e.to_string())?;
            let cni = &report["status"]["cni"];
            let same = ["active", "others", "foreignPods"].iter().all(|key| cni[*key] == wanted[*key]);
            holds(same, cni.to_string())
        });
    }
    let adopted = events(cluster, "BlockAdopted").unwrap();
    assert!(!adopted.is_empty(), "n1's by its spec");
    let recreated = events(cluster, "BlockRecreated").unwrap();
    assert!(!recreated.is_empty(), "n2's by its pods");
}
