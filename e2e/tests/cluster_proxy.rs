//! Pods of every block keep their source address on the way through a Service, by the way of telling pods that the
//! documentation recommends for kube-proxy; and `plat-agent check` names the ways that lose it. Real kube-proxy,
//! operator, agents and CNI binary, on nodes that are bare network namespaces.
//!
//! `PLAT_PROXY_MODES=nftables,iptables` tries both of kube-proxy's modes; by default the first.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::process::{Child, Stdio};
use std::time::Duration;

use plat_e2e::bare::{BareNode, Process, operator};
use plat_e2e::bare_pods::Pods;
use plat_e2e::light::ControlPlane;
use plat_e2e::testbed::{images, output};
use plat_e2e::wait::holds;
use plat_e2e::wait_until;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);
const SERVICE: &str = "10.96.7.7";

fn range(name: &str, cidr: &str, priority: u32) -> String {
    format!(
        "{{apiVersion: plat.network/v1alpha1, kind: ClusterCIDR, metadata: {{name: {name}}}, \
         spec: {{cidr: {cidr}, blockPrefixLength: 29, priority: {priority}}}}}"
    )
}

/// A Service that leads to one pod.
fn service(server: IpAddr) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: asked, namespace: default}}, \
         spec: {{clusterIP: {SERVICE}, ports: [{{port: 80, targetPort: 8080, protocol: TCP}}]}}}}\n---\n\
         {{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, \
         metadata: {{name: asked, namespace: default, labels: {{kubernetes.io/service-name: asked}}}}, \
         ports: [{{port: 8080, protocol: TCP}}], \
         endpoints: [{{addresses: ['{server}'], conditions: {{ready: true}}}}]}}"
    )
}

/// Ended when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

fn join<'a>(plane: &'a ControlPlane, number: u8) -> (BareNode<'a>, Process) {
    let node = BareNode::up(plane, number).unwrap();
    node.register().unwrap();
    let agent = node.agent().unwrap();
    wait_until("the node is ready for pods", DEADLINE, || {
        holds(node.folder().join("conf/05-plat.conflist").exists(), "no conflist")
    });
    (node, agent)
}

/// As whom the server sees a pod that asks it through the Service.
fn seen(pods: &Pods<'_>, pod: &str) -> Result<IpAddr, String> {
    let mut probe = pods.inside(pod, &images().join("bin/probe").display().to_string());
    let answer = output(probe.args(["reach", &format!("{SERVICE}:80")])).map_err(|e| format!("{e:#}"))?;
    let reached: Value = serde_json::from_str(&answer).map_err(|e| format!("{e}: {answer}"))?;
    let client =
        reached.pointer("/client").or_else(|| reached.pointer("/seen/client")).and_then(Value::as_str);
    client.and_then(|client| client.parse().ok()).ok_or(answer)
}

/// A way of telling pods, and of which pods it keeps the source: of the primary block, of the second block of the
/// same range, of another range, and of one that is routed without a bridge.
struct Way {
    conf: Value,
    kept: [bool; 4],
    /// What `check` says of a node whose new pods are routed.
    named: Option<&'static str>,
}

fn ways(first: &str) -> Vec<Way> {
    let way = |mode: &str, more: Value, kept: [bool; 4], named| {
        let mut conf = json!({"detectLocalMode": mode});
        conf.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        Way { conf, kept, named }
    };
    const ALL: [bool; 4] = [true; 4];
    const BRIDGED: [bool; 4] = [true, true, true, false];
    let lost = Some("lose their source address");
    vec![
        way("ClusterCIDR", json!({"clusterCIDR": first}), [true, true, false, false], lost),
        way("ClusterCIDR", json!({"clusterCIDR": "10.0.0.0/8"}), ALL, None),
        way("ClusterCIDR", json!({}), ALL, None),
        way("NodeCIDR", json!({}), [true, false, false, false], lost),
        way(
            "BridgeInterface",
            json!({"detectLocal": {"bridgeInterface": "cni0"}}),
            BRIDGED,
            Some("interfaceNamePrefix: plat"),
        ),
        way(
            "InterfaceNamePrefix",
            json!({"detectLocal": {"interfaceNamePrefix": "plat"}}),
            [false, false, false, true],
            None,
        ),
    ]
}

#[test]
fn pods_of_every_block_keep_their_source_through_a_service_and_check_names_the_ways_that_lose_it() {
    let plane = ControlPlane::up().unwrap();
    plane.install_crds().unwrap();
    plane.apply(&range("first", "10.244.0.0/16", 0)).unwrap();
    let _operator = operator(&plane, "operator", &[]).unwrap();
    let (node, agent) = join(&plane, 1);
    let (other, _other_agent) = join(&plane, 2);

    let far = Pods::on(&other).unwrap();
    let server = far.start(&["server".to_owned()]).unwrap()[0];
    let mut serve = far.inside("server", &images().join("bin/probe").display().to_string());
    let _server = Server(serve.args(["serve", "8080"]).stdout(Stdio::null()).spawn().unwrap());
    plane.apply(&service(server)).unwrap();

    // Pods until there is one in each of two blocks of one range, and in one of another.
    let pods = Pods::on(&node).unwrap();
    let mut of_block: Vec<(String, IpAddr)> = Vec::new();
    for n in 0..40 {
        let name = format!("p{n}");
        let address = pods.start(std::slice::from_ref(&name)).unwrap()[0];
        let block = |address: &IpAddr| plat_crds::Block::of(*address, 29);
        if of_block.iter().all(|(_, known)| block(known) != block(&address)) {
            of_block.push((name, address));
            match of_block.len() {
                2 => drop(plane.apply(&range("second", "10.9.0.0/16", 9)).unwrap()),
                3 => break,
                _ => {}
            }
        }
    }
    let prefixes: BTreeSet<String> = of_block
        .iter()
        .map(|(_, a)| a.to_string().split('.').take(2).collect::<Vec<_>>().join("."))
        .collect();
    assert!(of_block.len() == 3 && prefixes.len() == 2, "{of_block:?}");
    assert!(of_block[2].1.to_string().starts_with("10.9."), "{of_block:?}");

    // The node changes its datapath: running pods stay as they are, and new ones are routed.
    agent.kill();
    let routed_agent = node.agent_with(&["--datapath=routed"]).unwrap();
    wait_until("the conflist has the other datapath", DEADLINE, || {
        let text = std::fs::read_to_string(node.folder().join("conf/05-plat.conflist")).unwrap_or_default();
        holds(text.contains("\"routed\""), text)
    });
    let routed = pods.start(&["routed".to_owned()]).unwrap()[0];
    of_block.push(("routed".to_owned(), routed));

    let modes = std::env::var("PLAT_PROXY_MODES").unwrap_or_else(|_| "nftables".to_owned());
    let mut wrong = Vec::new();
    for mode in modes.split(',') {
        for way in ways("10.244.0.0/16") {
            let mut conf = way.conf.clone();
            conf["mode"] = mode.into();
            let proxy = node.kube_proxy(&conf).unwrap();
            for (nth, (pod, address)) in of_block.iter().enumerate() {
                let whose =
                    wait_until(&format!("{conf}: {pod} reaches the Service"), DEADLINE, || seen(&pods, pod));
                let kept = whose == *address;
                // By address the routed pod is as the one whose range it shares.
                let by_range =
                    conf["clusterCIDR"] == "10.244.0.0/16" && address.to_string().starts_with("10.244.");
                let expected = way.kept[nth] || (nth == 3 && by_range);
                if kept != expected {
                    wrong.push(format!("{conf}: {pod} ({address}) is seen as {whose}"));
                }
            }
            let found = node.check().unwrap();
            let of_proxy: Vec<&String> =
                found.iter().filter(|line| line.starts_with("kube-proxy: ")).collect();
            let fits = match way.named {
                None => of_proxy.is_empty(),
                Some(words) => of_proxy.iter().any(|line| line.contains(words)),
            };
            if !fits {
                let rules = output(node.run("nft").args(["list", "ruleset"])).unwrap();
                wrong.push(format!("{conf}: check says {found:?} of {rules}"));
            }
            // What it left would answer in the place of the next one.
            proxy.kill();
            forget(&node);
        }
    }
    drop(routed_agent);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Removes kube-proxy's rules.
fn forget(node: &BareNode<'_>) {
    let script = "for f in ip ip6; do nft delete table $f kube-proxy 2>/dev/null || true; done; \
        for t in nat filter mangle; do iptables -t $t -F; iptables -t $t -X; ip6tables -t $t -F; ip6tables -t $t -X; done";
    output(node.run("sh").args(["-c", script])).unwrap();
}
