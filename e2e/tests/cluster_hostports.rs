//! Host ports through kubelet and containerd: opened by Plat, and by the reference plugin where the chart
//! says so. Every claim about sources, families and repairs is a kernel test of the CNI binary.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use plat_e2e::cluster::{Cluster, Pod, PodSpec, node_ip};
use plat_e2e::plat::http_get;
use plat_e2e::testbed::{images, output, repository, tools};
use plat_e2e::wait::{holds, wait_until};
use plat_rig::reach::Reached;

const DEADLINE: Duration = Duration::from_secs(60);
const HOST_PORT: u16 = 8888;

/// A pod on node 1 that answers HTTP and echoes UDP on that port of the node.
fn run_with_host_port(cluster: &Cluster, name: &str) -> Pod {
    let ports = ["TCP", "UDP"]
        .map(|protocol| format!("{{containerPort: 8080, hostPort: {HOST_PORT}, protocol: {protocol}}}"))
        .join(", ");
    cluster
        .apply(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default}}\n\
             spec:\n  nodeName: n1\n  terminationGracePeriodSeconds: 0\n  tolerations: [{{operator: Exists}}]\n  \
             containers:\n  - name: probe\n    image: localhost/plat-test:1\n    imagePullPolicy: Never\n    \
             command: [probe, serve, \"8080\"]\n    ports: [{ports}]\n"
        ))
        .unwrap();
    let pod = wait_until(&format!("pod {name} runs"), DEADLINE, || {
        let pod = cluster.get(&["pod", name]).map_err(|e| e.to_string())?;
        let ip = pod["status"]["podIP"].as_str().and_then(|ip| ip.parse().ok());
        ip.filter(|_| pod["status"]["phase"] == "Running").ok_or(format!("{:#}", pod["status"]))
    });
    Pod { name: name.to_owned(), node: 1, ips: vec![pod], port: 8080 }
}

/// Who answers there, asked by `probe reach` as that command starts it.
fn ask(mut command: std::process::Command, server: SocketAddr) -> Result<String, String> {
    let said = output(command.args(["reach", &server.to_string()])).map_err(|e| format!("{e:#}"))?;
    let reached: Reached = serde_json::from_str(&said).map_err(|e| format!("{e}: {said}"))?;
    reached.seen.map(|seen| seen.host).ok_or(said)
}

/// The port leads to that pod: from outside, from both nodes, from 127.0.0.1, from pods of both nodes and from
/// the pod itself; by UDP too.
fn expect_open(cluster: &Cluster, web: &Pod, others: &[Pod]) {
    let server = SocketAddr::from((node_ip(1), HOST_PORT));
    let probe = images().join("bin/probe");
    let probe = probe.to_str().unwrap();
    let expect = |from: &str, ask: &dyn Fn() -> Result<String, String>| {
        wait_until(&format!("{} answers {from}", web.name), DEADLINE, || {
            let host = ask()?;
            holds(host == web.name, format!("{host} answered"))
        });
    };
    expect("from outside", &|| ask(cluster.command(probe), server));
    for node in [1, 2] {
        expect(&format!("node {node}"), &|| ask(cluster.node_command(node, probe), server));
    }
    let loopback = SocketAddr::from(([127, 0, 0, 1], HOST_PORT));
    expect("node 1 on loopback", &|| ask(cluster.node_command(1, probe), loopback));
    for pod in others.iter().chain([web]) {
        expect(&pod.name, &|| {
            let mut command = cluster.kubectl_command();
            command.args(["exec", &pod.name, "--", "probe"]);
            ask(command, server)
        });
    }
    wait_until("UDP is echoed", DEADLINE, || {
        let heard = cluster.enter(|| -> std::io::Result<bool> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(Duration::from_millis(500)))?;
            socket.send_to(b"hello", server)?;
            let mut buffer = [0; 16];
            let (length, from) = socket.recv_from(&mut buffer)?;
            Ok(&buffer[..length] == b"hello" && from == server)
        });
        holds(heard.as_ref().is_ok_and(|heard| *heard), format!("{heard:?}"))
    });
}

fn expect_closed(cluster: &Cluster) {
    let server = SocketAddr::from((node_ip(1), HOST_PORT));
    wait_until("the port is closed", DEADLINE, || http_get(cluster, server, "/").map_or(Ok(()), Err));
}

/// Elements of Plat's maps, and rules of the reference plugin, on node 1.
fn counts(cluster: &Cluster) -> (usize, usize) {
    let maps = cluster.on_node(1, "nft list map inet plat-pods hostports4 2>/dev/null || true").unwrap();
    let rules = cluster.on_node(1, "nft list ruleset; iptables-save 2>/dev/null || true").unwrap();
    let of_portmap =
        |line: &&str| line.contains(&format!("dport {HOST_PORT}")) && line.to_lowercase().contains("cni");
    (maps.matches(&format!(". {HOST_PORT} :")).count(), rules.lines().filter(of_portmap).count())
}

#[test]
fn a_host_port_leads_to_its_pod_whoever_opens_it() {
    let cluster = Cluster::with_plat(2, &[]);
    let pod = |name, node| PodSpec { name, node, host_network: false };
    let others = cluster.run_pods(&[pod("near", 1), pod("away", 2)], DEADLINE).unwrap();

    let web = run_with_host_port(&cluster, "web");
    expect_open(&cluster, &web, &others);
    assert_eq!(counts(&cluster), (2, 0), "opened by Plat");
    cluster.on_node(1, "nft flush ruleset").unwrap();
    expect_open(&cluster, &web, &others);
    cluster.delete_pods(&["web"]).unwrap();
    expect_closed(&cluster);
    assert_eq!(counts(&cluster), (0, 0));

    for node in [1, 2] {
        let portmap = tools().join("cni/portmap");
        cluster.on_node(node, &format!("cp {} /opt/cni/bin/", portmap.display())).unwrap();
    }
    let chart = repository().join("charts/plat");
    let upgrade =
        ["upgrade", "plat", chart.to_str().unwrap(), "-n", "plat-system", "--set", "hostPorts=chained"];
    cluster.helm(&[&upgrade[..], &["--wait", "--timeout", "90s"]].concat()).unwrap();
    wait_until("the conflist chains portmap", DEADLINE, || {
        let conflist =
            cluster.on_node(1, "cat /etc/cni/net.d/05-plat.conflist").map_err(|e| e.to_string())?;
        holds(conflist.contains(r#""type": "portmap""#), conflist)
    });
    let chained = run_with_host_port(&cluster, "chained");
    expect_open(&cluster, &chained, &others);
    let (elements, rules) = counts(&cluster);
    assert!(elements == 0 && rules > 0, "opened by portmap: {elements} elements, {rules} rules");
    cluster.delete_pods(&["chained"]).unwrap();
    expect_closed(&cluster);
    assert_eq!(counts(&cluster), (0, 0));
}
