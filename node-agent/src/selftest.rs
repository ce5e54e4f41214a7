//! `plat-agent selftest`: proves the network from inside a pod, for `helm test`.
//!
//! `serve` runs in a few pods behind a Service and answers every connection with the address that it came from. `check`
//! runs in one pod with an ordinary pod network: it reads PodCIDRs and the Service from the API server, connects to
//! every node's gateway and address, to the Service and to each answering pod, and prints one line per finding. It
//! writes nothing.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ListParams;
use kube::{Api, Client};
use plat_crds::condition::{READY, is_true};
use plat_crds::pod_cidr::BlockState;
use plat_crds::{Family, PodCIDR};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// How long one connection may take.
const ATTEMPT: Duration = Duration::from_secs(3);
/// How long a target may take to answer, over all attempts: right after an install routes are still on their way.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the answering pods may take to start.
const START: Duration = Duration::from_secs(120);
/// Targets tried at the same time.
const AT_ONCE: usize = 32;

/// The two halves of the test.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Selftest {
    /// Answer every connection with the address that it came from.
    Serve {
        /// Port to listen on, all addresses.
        #[arg(long, env = "PLAT_PORT", default_value_t = 8080)]
        port: u16,
    },
    /// Check the network of this pod and end: 0 if all is well, 1 if not.
    Check(Check),
}

/// What `selftest check` needs to know.
#[derive(Clone, Debug, clap::Args)]
pub struct Check {
    /// Addresses of this pod, comma-separated.
    #[arg(long, env = "PLAT_POD_IPS", value_delimiter = ',', required = true)]
    pod_ips: Vec<IpAddr>,
    /// Node that this pod runs on.
    #[arg(long, env = "NODE_NAME")]
    node_name: String,
    /// Namespace of the Service.
    #[arg(long, env = "POD_NAMESPACE")]
    namespace: String,
    /// Service in front of the pods that run `selftest serve`.
    #[arg(long, env = "PLAT_SERVICE")]
    service: String,
    /// How many such pods there are.
    #[arg(long, env = "PLAT_PODS", default_value_t = 2)]
    pods: usize,
    /// Port that `selftest serve` and the Service listen on.
    #[arg(long, env = "PLAT_PORT", default_value_t = 8080)]
    port: u16,
    /// Port of the agents' `--listen`.
    #[arg(long, env = "PLAT_AGENT_PORT", default_value_t = 9539)]
    agent_port: u16,
}

/// Runs one half; an error if the network is not what it should be.
pub async fn run(half: Selftest) -> anyhow::Result<()> {
    match half {
        Selftest::Serve { port } => serve(port).await,
        Selftest::Check(check) => check.run().await,
    }
}

async fn serve(port: u16) -> anyhow::Result<()> {
    // One IPv6 socket takes both families, unless the node has no IPv6.
    let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Ok(listener) => listener,
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            .await
            .with_context(|| format!("listen on port {port}"))?,
    };
    loop {
        match listener.accept().await {
            Ok((mut stream, peer)) => {
                tokio::spawn(async move {
                    let _ = stream.write_all(format!("{}\n", peer.ip().to_canonical()).as_bytes()).await;
                });
            }
            Err(error) => {
                eprintln!("accept: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// One finding: what was tried, and what came of it.
type Finding = (String, Result<String, String>);

impl Check {
    async fn run(&self) -> anyhow::Result<()> {
        let mut findings = Vec::new();
        match self.read_objects().await {
            Ok((version, blocks, pods, services)) => {
                findings.push(("API server through its Service".to_owned(), Ok(version)));
                findings.extend(own_addresses(&self.pod_ips, &self.node_name, &blocks));
                let targets = targets(&self.pod_ips, &self.node_name, self.agent_port, &blocks);
                findings.extend(each(targets, |(name, address)| reach(name, address)).await);
                // A Service may have a family that the pod network has not.
                let services = services.into_iter().filter(|ip| self.has_family_of(ip));
                let services =
                    services.map(|ip| (format!("Service {ip}"), SocketAddr::new(ip, self.port))).collect();
                findings.extend(each(services, |(name, address)| reach(name, address)).await);
                let pods = pods.into_iter().filter(|pod| self.has_family_of(&pod.address)).collect();
                findings.extend(each(pods, |pod| self.source_is_kept(pod)).await);
            }
            Err(error) => {
                findings.push(("API server through its Service".to_owned(), Err(format!("{error:#}"))))
            }
        }
        let failed = findings.iter().filter(|(_, result)| result.is_err()).count();
        for (name, result) in &findings {
            match result {
                Ok(seen) => println!("ok   {name}: {seen}"),
                Err(why) => println!("FAIL {name}: {why}"),
            }
        }
        println!("{} passed, {failed} failed", findings.len() - failed);
        anyhow::ensure!(
            failed == 0,
            "the network is not what it should be: see the lines that begin with FAIL"
        );
        Ok(())
    }

    /// Server version, PodCIDRs, answering pods, and addresses of the Service in front of them.
    async fn read_objects(&self) -> anyhow::Result<(String, Vec<PodCIDR>, Vec<AnsweringPod>, Vec<IpAddr>)> {
        let client = Client::try_default().await.context("read the pod's service account")?;
        let version = eventually(PATIENCE, async || {
            client.apiserver_version().await.map_err(|error| error.to_string())
        })
        .await
        .map_err(anyhow::Error::msg)?;
        let blocks = Api::<PodCIDR>::all(client.clone())
            .list(&ListParams::default())
            .await
            .context("list PodCIDRs")?
            .items;
        let service = Api::<Service>::namespaced(client.clone(), &self.namespace).get(&self.service).await?;
        let services = service.spec.and_then(|spec| spec.cluster_ips).unwrap_or_default();
        let slices = Api::<EndpointSlice>::namespaced(client, &self.namespace);
        let wanted = ListParams::default().labels(&format!("kubernetes.io/service-name={}", self.service));
        let pods = eventually(START, async || {
            let pods = answering_pods(&slices.list(&wanted).await.map_err(|error| error.to_string())?.items);
            match pods.iter().map(|pod| &pod.name).collect::<BTreeSet<_>>().len() {
                ready if ready >= self.pods => Ok(pods),
                ready => Err(format!("{ready} of {} pods of Service {} are ready", self.pods, self.service)),
            }
        })
        .await
        .map_err(anyhow::Error::msg)?;
        Ok((version.git_version, blocks, pods, services.iter().filter_map(|ip| ip.parse().ok()).collect()))
    }

    fn has_family_of(&self, address: &IpAddr) -> bool {
        self.pod_ips.iter().any(|ip| Family::of(ip) == Family::of(address))
    }

    /// A pod must see this pod's own address: nothing between pods may be masqueraded.
    async fn source_is_kept(&self, pod: AnsweringPod) -> Finding {
        let place =
            if pod.node == self.node_name { "this node".to_owned() } else { format!("node {}", pod.node) };
        let result = eventually(PATIENCE, async || {
            let seen =
                ask(SocketAddr::new(pod.address, self.port)).await.map_err(|error| error.to_string())?;
            if self.pod_ips.contains(&seen) {
                Ok(format!("sees this pod as {seen}"))
            } else {
                Err(format!("sees this pod as {seen}, so something on the way masquerades"))
            }
        });
        (format!("pod {} on {place}", pod.address), result.await)
    }
}

/// A pod that runs `selftest serve`; one per address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct AnsweringPod {
    name: String,
    node: String,
    address: IpAddr,
}

/// The ready pods in the slices of a Service.
fn answering_pods(slices: &[EndpointSlice]) -> Vec<AnsweringPod> {
    let endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
    let ready = endpoints.filter(|e| e.conditions.as_ref().and_then(|c| c.ready).unwrap_or(true));
    ready
        .flat_map(|endpoint| {
            let name =
                endpoint.target_ref.as_ref().and_then(|target| target.name.clone()).unwrap_or_default();
            let node = endpoint.node_name.clone().unwrap_or_default();
            let addresses = endpoint.addresses.iter().filter_map(|address| address.parse().ok());
            addresses.map(move |address| AnsweringPod { name: name.clone(), node: node.clone(), address })
        })
        .collect()
}

/// Each of the pod's addresses must lie in a block of the node that it runs on.
fn own_addresses(pod_ips: &[IpAddr], node: &str, blocks: &[PodCIDR]) -> Vec<Finding> {
    let holder = |ip: &IpAddr| blocks.iter().find(|b| b.spec.block().is_ok_and(|block| block.contains(ip)));
    pod_ips
        .iter()
        .map(|ip| {
            let result = match holder(ip) {
                Some(block) if block.spec.node_name == node => {
                    Ok(format!("lies in {} of node {node}", block.spec.cidr))
                }
                Some(block) => Err(format!(
                    "lies in {} of node {}, but the pod runs on {node}: another network gave it",
                    block.spec.cidr, block.spec.node_name
                )),
                None => Err(format!(
                    "lies in no PodCIDR: another network gave it; see the CNI configurations of node {node}"
                )),
            };
            (format!("own address {ip}"), result)
        })
        .collect()
}

/// What every other node should let this pod reach: the gateway of each block whose node is ready, and the node itself.
fn targets(pod_ips: &[IpAddr], node: &str, port: u16, blocks: &[PodCIDR]) -> Vec<(String, SocketAddr)> {
    let families: Vec<_> = pod_ips.iter().map(Family::of).collect();
    let mut targets = BTreeSet::new();
    for pod_cidr in blocks {
        let ready = pod_cidr.status.as_ref().is_some_and(|status| is_true(&status.conditions, READY));
        let Ok(block) = pod_cidr.spec.block() else { continue };
        if !ready || pod_cidr.spec.state == BlockState::Quarantined || !families.contains(&block.family()) {
            continue;
        }
        let holder = &pod_cidr.spec.node_name;
        let place = if holder == node { "this node".to_owned() } else { format!("node {holder}") };
        targets.insert((
            format!("gateway {} of {place}", block.gateway()),
            SocketAddr::new(block.gateway(), port),
        ));
        let addresses =
            pod_cidr.spec.node_addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok());
        for address in addresses.filter(|address| Family::of(address) == block.family()) {
            targets.insert((format!("address {address} of {place}"), SocketAddr::new(address, port)));
        }
    }
    targets.into_iter().collect()
}

async fn each<T, F: Future<Output = Finding>>(items: Vec<T>, check: impl FnMut(T) -> F) -> Vec<Finding> {
    stream::iter(items).map(check).buffered(AT_ONCE).collect().await
}

/// Whether anybody answers there. A refusal is an answer: the packet arrived and one came back.
async fn reach(name: String, address: SocketAddr) -> Finding {
    let result = eventually(PATIENCE, async || match timeout(ATTEMPT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Ok("reached".to_owned()),
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Ok("reached".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer from {address} within {} s", ATTEMPT.as_secs())),
    });
    (name, result.await)
}

/// The address that `selftest serve` saw us come from.
async fn ask(address: SocketAddr) -> anyhow::Result<IpAddr> {
    let answer = timeout(ATTEMPT, async {
        let mut text = String::new();
        TcpStream::connect(address).await?.take(64).read_to_string(&mut text).await?;
        std::io::Result::Ok(text)
    });
    let text = answer.await.with_context(|| format!("no answer within {} s", ATTEMPT.as_secs()))??;
    text.trim().parse().with_context(|| format!("answered {text:?} in place of an address"))
}

/// Repeats an attempt until it succeeds or the time is over; then the last error counts.
async fn eventually<T>(time: Duration, attempt: impl AsyncFn() -> Result<T, String>) -> Result<T, String> {
    let end = Instant::now() + time;
    let mut last = format!("no answer within {} s", time.as_secs());
    while Instant::now() < end {
        match timeout_at(end, attempt()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => last = error,
            Err(_) => break,
        }
        sleep(Duration::from_millis(300)).await;
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    use k8s_openapi::jiff::Timestamp;
    use plat_crds::{PodCIDRSpec, PodCIDRStatus};

    fn block(cidr: &str, node: &str, address: &str, ready: bool) -> PodCIDR {
        let spec = PodCIDRSpec {
            cidr: cidr.into(),
            node_name: node.into(),
            node_addresses: vec![address.into(), "not an address".into()],
            ..PodCIDRSpec::default()
        };
        let mut pod_cidr = PodCIDR::new("x", spec);
        let status = if ready { "True" } else { "False" };
        pod_cidr.status = Some(PodCIDRStatus {
            conditions: vec![Condition {
                type_: READY.into(),
                status: status.into(),
                reason: "R".into(),
                message: String::new(),
                observed_generation: None,
                last_transition_time: Time(Timestamp::UNIX_EPOCH),
            }],
            ..PodCIDRStatus::default()
        });
        pod_cidr
    }

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn an_address_counts_only_in_a_block_of_its_own_node() {
        let blocks = [
            block("10.244.1.0/24", "n1", "172.30.0.11", true),
            block("10.244.2.0/24", "n2", "172.30.0.12", true),
        ];
        let results = own_addresses(&ips(&["10.244.1.5", "10.244.2.5", "192.168.0.5"]), "n1", &blocks);
        let good: Vec<_> = results.iter().map(|(_, result)| result.is_ok()).collect();
        assert_eq!(good, [true, false, false], "{results:?}");
    }

    #[test]
    fn targets_are_gateways_and_addresses_of_ready_nodes_in_the_pods_families() {
        let blocks = [
            block("10.244.1.0/24", "n1", "172.30.0.11", true),
            block("10.244.2.0/24", "n2", "172.30.0.12", true),
            block("10.244.3.0/24", "n3", "172.30.0.13", false),
            block("fd00:10:244:2::/64", "n2", "fd00:30::12", true),
            block("garbage", "n4", "172.30.0.14", true),
        ];
        let names = |ips_: &[&str]| -> Vec<String> {
            targets(&ips(ips_), "n1", 9, &blocks).into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(
            names(&["10.244.1.5"]),
            [
                "address 172.30.0.11 of this node",
                "address 172.30.0.12 of node n2",
                "gateway 10.244.1.1 of this node",
                "gateway 10.244.2.1 of node n2",
            ]
        );
        assert_eq!(
            names(&["fd00:10:244:1::5"]),
            ["address fd00:30::12 of node n2", "gateway fd00:10:244:2::1 of node n2"]
        );
    }

    #[tokio::test]
    async fn the_server_says_where_a_connection_came_from() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = tokio::spawn(serve(port));
        let seen = eventually(PATIENCE, async || {
            ask(([127, 0, 0, 1], port).into()).await.map_err(|e| e.to_string())
        });
        assert_eq!(seen.await, Ok(IpAddr::from([127, 0, 0, 1])));
        server.abort();
    }

    #[tokio::test]
    async fn a_refusal_is_an_answer() {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(reach("closed port".into(), ([127, 0, 0, 1], port).into()).await.1.is_ok());
    }
}
