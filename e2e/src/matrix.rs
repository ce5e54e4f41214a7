//! The reachability matrix: who must reach whom, and as whom the other side must see them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use plat_rig::reach::{Reached, Seen};

use crate::cluster::{Cluster, Pod, node_ips};
use crate::testbed::images;
use crate::wait::{holds, wait_until};

/// Addresses that are neither node, pod nor Service, behind the nodes' default gateway (RFC 5737, RFC 3849).
const OUTSIDE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
/// Where the server outside the cluster listens.
const OUTSIDE_PORT: u16 = 8080;

/// One connection that was tried.
#[derive(Clone, Debug)]
pub struct Check {
    /// Who asked: a pod's name or a node's.
    pub from: String,
    /// Who was asked.
    pub to: String,
    /// Kind of way, for the table.
    pub way: Way,
    /// Why it is wrong; `None` if it is right.
    pub fault: Option<String>,
}

/// Kind of way between two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Pod to a pod of the same node (itself too).
    PodToPodSameNode,
    /// Pod to a pod of another node.
    PodToPodOtherNode,
    /// Node to pod, any two.
    NodeToPod,
    /// Pod to node, any two.
    PodToNode,
    /// Pod to a Service whose backend is on the same node.
    ServiceSameNode,
    /// Pod to a Service whose backend is on another node.
    ServiceOtherNode,
    /// Pod to a Service whose backend is the pod itself.
    ServiceHairpin,
    /// Pod to an address outside the cluster.
    PodToOutside,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::PodToPodSameNode => "pod -> pod, same node",
            Way::PodToPodOtherNode => "pod -> pod, other node",
            Way::NodeToPod => "node -> pod",
            Way::PodToNode => "pod -> node",
            Way::ServiceSameNode => "pod -> Service, backend on same node",
            Way::ServiceOtherNode => "pod -> Service, backend on other node",
            Way::ServiceHairpin => "pod -> Service, backend is the pod itself",
            Way::PodToOutside => "pod -> outside",
        })
    }
}

/// Which source addresses the server may see.
#[derive(Clone, Debug)]
enum Source {
    /// This one: nobody translated it.
    Exactly(IpAddr),
    /// One of the client node's own addresses.
    OneOf(Vec<IpAddr>),
    /// Any: a hairpin cannot keep its source.
    Any,
}

struct Target {
    server: SocketAddr,
    to: String,
    way: Way,
    host: Option<String>,
    source: Source,
}

/// Pods, their Services (one each) and the server outside.
#[derive(Debug)]
pub struct Matrix<'a> {
    cluster: &'a Cluster,
    pods: Vec<Pod>,
    /// A pod with the node's network on each node.
    hosts: Vec<Pod>,
    services: BTreeMap<String, Vec<IpAddr>>,
    outside: Child,
}

impl<'a> Matrix<'a> {
    /// Makes a Service for each of `pods`, and starts the server outside. `hosts` are pods with the nodes'
    /// networks, one per node.
    pub fn new(cluster: &'a Cluster, pods: &[Pod], hosts: &[Pod]) -> Result<Matrix<'a>> {
        let services: String = pods.iter().map(service).collect();
        cluster.apply(&services)?;
        let mut addresses = BTreeMap::new();
        for pod in pods {
            let service = cluster.get(&["service", &pod.name])?;
            let ips = service["spec"]["clusterIPs"].as_array().map(Vec::as_slice).unwrap_or_default();
            let ips: Vec<IpAddr> = ips.iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect();
            ensure!(!ips.is_empty(), "{service} has no address");
            addresses.insert(pod.name.clone(), ips);
        }
        let probe = images().join("bin/probe");
        let mut outside = cluster.command(&probe.to_string_lossy());
        let outside = outside.args(["serve", &OUTSIDE_PORT.to_string()]).stdout(Stdio::null()).spawn()?;
        Ok(Matrix { cluster, pods: pods.to_vec(), hosts: hosts.to_vec(), services: addresses, outside })
    }

    /// Tries every way until all are right, at most that long; how many were tried.
    ///
    /// # Panics
    /// At the deadline, with the ways that are wrong.
    #[track_caller]
    pub fn wait_all_right(&self, what: &str, deadline: Duration) -> usize {
        wait_until(&format!("every way is open {what}"), deadline, || {
            let checks = self.check().map_err(|e| format!("{e:#}"))?;
            holds(faults(&checks).is_empty(), faults(&checks).join("\n")).map(|()| checks.len())
        })
    }

    /// Tries every way once.
    pub fn check(&self) -> Result<Vec<Check>> {
        std::thread::scope(|scope| {
            let from_pods = self.pods.iter().map(|pod| scope.spawn(move || self.ask_from_pod(pod)));
            let from_nodes = self.hosts.iter().map(|host| scope.spawn(move || self.ask_from_node(host)));
            let asking: Vec<_> = from_pods.chain(from_nodes).collect();
            let mut checks = Vec::new();
            for answers in asking {
                checks.extend(answers.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            checks.sort_by(|a, b| (a.way, &a.from, &a.to).cmp(&(b.way, &b.from, &b.to)));
            Ok(checks)
        })
    }

    fn ask_from_pod(&self, pod: &Pod) -> Result<Vec<Check>> {
        let mut targets = Vec::new();
        // Whoever has two addresses is asked on both, and must be seen by the one of that family.
        for own in &pod.ips {
            targets.extend(self.pods.iter().flat_map(|other| self.pod_and_service(pod, *own, other)));
            for host in &self.hosts {
                targets.extend(of_family(&node_ips(host.node), own).map(|ip| Target {
                    server: (ip, host.port).into(),
                    to: format!("n{}", host.node),
                    way: Way::PodToNode,
                    host: Some(format!("n{}", host.node)),
                    source: Source::Exactly(*own),
                }));
            }
            targets.extend(of_family(&OUTSIDE, own).map(|ip| Target {
                server: (ip, OUTSIDE_PORT).into(),
                to: "outside".to_owned(),
                way: Way::PodToOutside,
                host: None,
                source: Source::OneOf(of_family(&node_ips(pod.node), own).collect()),
            }));
        }
        let mut command = self.cluster.kubectl_command();
        command.args(["exec", &pod.name, "--", "probe", "reach"]);
        ask(&mut command, &pod.name, targets)
    }

    fn pod_and_service(&self, pod: &Pod, own: IpAddr, other: &Pod) -> Vec<Target> {
        let same = other.node == pod.node;
        let hairpin = other.name == pod.name;
        let to_pod = of_family(&other.ips, &own).map(|ip| Target {
            server: (ip, other.port).into(),
            to: other.name.clone(),
            way: if same { Way::PodToPodSameNode } else { Way::PodToPodOtherNode },
            host: Some(other.name.clone()),
            source: Source::Exactly(own),
        });
        let services = self.services.get(&other.name).map(Vec::as_slice).unwrap_or_default();
        let to_service = of_family(services, &own).map(|ip| Target {
            server: (ip, 80).into(),
            to: format!("Service of {}", other.name),
            way: match (hairpin, same) {
                (true, _) => Way::ServiceHairpin,
                (false, true) => Way::ServiceSameNode,
                (false, false) => Way::ServiceOtherNode,
            },
            host: Some(other.name.clone()),
            source: if hairpin { Source::Any } else { Source::Exactly(own) },
        });
        to_pod.chain(to_service).collect()
    }

    fn ask_from_node(&self, host: &Pod) -> Result<Vec<Check>> {
        let own = self.cluster.on_node(host.node, "ip -o addr | awk '{print $4}'")?;
        let own: Vec<IpAddr> = own.lines().filter_map(|a| a.split('/').next()?.parse().ok()).collect();
        let targets = self.pods.iter().flat_map(|pod| {
            pod.ips.iter().map(|ip| Target {
                server: (*ip, pod.port).into(),
                to: pod.name.clone(),
                way: Way::NodeToPod,
                host: Some(pod.name.clone()),
                source: match pod.node == host.node {
                    true => Source::OneOf(own.clone()),
                    false => Source::OneOf(of_family(&node_ips(host.node), ip).collect()),
                },
            })
        });
        let probe = images().join("bin/probe");
        let mut command = self.cluster.node_command(host.node, &probe.to_string_lossy());
        ask(command.arg("reach"), &format!("n{}", host.node), targets.collect())
    }
}

/// Those of `addresses` that are of the family of `like`.
fn of_family<'a>(addresses: &'a [IpAddr], like: &IpAddr) -> impl Iterator<Item = IpAddr> + 'a {
    let v4 = like.is_ipv4();
    addresses.iter().copied().filter(move |ip| ip.is_ipv4() == v4)
}

impl Drop for Matrix<'_> {
    fn drop(&mut self) {
        let _ = self.outside.kill();
        let _ = self.outside.wait();
    }
}

fn service(pod: &Pod) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {{ipFamilyPolicy: PreferDualStack, selector: {{app: {name}}}, ports: [{{port: 80, targetPort: {port}}}]}}\n",
        name = pod.name,
        port = pod.port
    )
}

fn ask(command: &mut std::process::Command, from: &str, targets: Vec<Target>) -> Result<Vec<Check>> {
    command.args(targets.iter().map(|t| t.server.to_string()));
    // It fails if one target fails; what each said is on its standard output all the same.
    let said = command.output()?;
    let lines = String::from_utf8_lossy(&said.stdout);
    let answers: Vec<Reached> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    ensure!(
        answers.len() == targets.len(),
        "{command:?} answered {lines} {}",
        String::from_utf8_lossy(&said.stderr)
    );
    Ok(targets.into_iter().zip(answers).map(|(target, answer)| judge(from, target, answer)).collect())
}

fn judge(from: &str, target: Target, answer: Reached) -> Check {
    let fault = match answer.seen {
        None => Some(answer.error.unwrap_or_else(|| "no answer".to_owned())),
        Some(Seen { host, client }) => {
            let wrong_source = match &target.source {
                Source::Exactly(ip) => (client != *ip).then(|| format!("saw {client} instead of {ip}")),
                Source::OneOf(own) => {
                    (!own.contains(&client)).then(|| format!("saw {client}, not one of {own:?}"))
                }
                Source::Any => None,
            };
            match &target.host {
                Some(wanted) if *wanted != host => Some(format!("{host} answered")),
                _ => wrong_source,
            }
        }
    };
    Check { from: from.to_owned(), to: target.to, way: target.way, fault }
}

/// The faults among `checks`, one a line.
pub fn faults(checks: &[Check]) -> Vec<String> {
    checks
        .iter()
        .filter_map(|c| Some(format!("{}: {} -> {}: {}", c.way, c.from, c.to, c.fault.as_ref()?)))
        .collect()
}

/// Every kind of way with the number of checks and how many of them are right.
pub fn summary(checks: &[Check]) -> BTreeMap<Way, (usize, usize)> {
    let mut ways = BTreeMap::new();
    for check in checks {
        let (right, all) = ways.entry(check.way).or_insert((0, 0));
        *all += 1;
        *right += usize::from(check.fault.is_none());
    }
    ways
}
