//! Logs, metrics, and the server of `/livez`, `/readyz` and `/metrics`, on a port and on a unix socket.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::args::{Log, LogFormat, Question};
use crate::clock;
use crate::facts::Reason;
use crate::incidents::Repair;
use crate::probe;
use crate::probe::findings::Findings;
use crate::probe::metrics::ProbeMetrics;
use crate::reconcile::Pulse;
use crate::reporter::Report;

/// So many ports behind the wanted one are tried.
const PORT_TRIES: u16 = 10;
/// Longest answer that a probe takes.
const MAX_ANSWER: u64 = 1024 * 1024;
/// How long a probe waits.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Starts logging. A filter that cannot be read is an error that names the flag.
pub fn init_logging(log: &Log) -> anyhow::Result<()> {
    // A plain level leaves out what the client says of each failed connection: the agent says it better.
    let plain = !log.log_level.contains(['=', ',']);
    let quiet = if plain { ",kube_client::client::builder=off" } else { "" };
    let filter = EnvFilter::try_new(format!("{}{quiet}", log.log_level))
        .map_err(|error| anyhow::anyhow!("--log-level '{}': {error}", log.log_level))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match log.log_format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The agent's metrics. Each is described where it is registered.
pub struct Metrics {
    registry: Registry,
    routes: Family<StateLabel, Gauge>,
    repairs: Family<KindLabel, Gauge>,
    faults: Family<ReasonLabel, Gauge>,
    addresses: Family<StateLabel, Gauge>,
    pass_duration: Histogram,
    lease_until: Gauge,
    held: Gauge,
    leases_ended: Gauge,
    leases_rebuilt: Gauge,
    contested: Gauge,
    contests: Gauge,
    probes: watch::Sender<Findings>,
}

impl Default for Metrics {
    fn default() -> Metrics {
        let mut registry = Registry::default();
        let routes = Family::<StateLabel, Gauge>::default();
        let repairs = Family::<KindLabel, Gauge>::default();
        let faults = Family::<ReasonLabel, Gauge>::default();
        let addresses = Family::<StateLabel, Gauge>::default();
        // From 0.25 ms to about 4 s.
        let pass_duration = Histogram::new(exponential_buckets(0.00025, 2.0, 15));
        let (lease_until, held) = (Gauge::default(), Gauge::default());
        let (leases_ended, leases_rebuilt) = (Gauge::default(), Gauge::default());
        let (contested, contests) = (Gauge::default(), Gauge::default());
        registry.register(
            "plat_agent_routes",
            "Routes of ours: desired, and of those installed",
            routes.clone(),
        );
        registry.register_collector(Box::new(Repairs(repairs.clone())));
        registry.register("plat_agent_faults", "Objects that cannot be followed, by reason", faults.clone());
        registry.register(
            "plat_ipam_addresses",
            "Addresses of this node's blocks that pods can have: used and free",
            addresses.clone(),
        );
        registry.register_with_unit(
            "plat_agent_pass_duration",
            "Time from the start of a pass to its report",
            Unit::Seconds,
            pass_duration.clone(),
        );
        registry.register_with_unit("plat_agent_lease_until", "Until when new pods get addresses without contact to the API server, in seconds since the epoch; 0 is never", Unit::Seconds, lease_until.clone());
        registry.register(
            "plat_agent_withdrawals_held",
            "Objects that are missing without having been released, whose routes stay for now",
            held.clone(),
        );
        registry.register(
            "plat_agent_contested",
            "1 while another program keeps undoing what is put back, so that this is slowed to twice a second",
            contested.clone(),
        );
        registry.register_collector(Box::new(Total {
            name: "plat_agent_contests",
            help: "How often another program began to keep undoing what is put back",
            value: contests.clone(),
        }));
        registry.register_collector(Box::new(Total {
            name: "plat_agent_leases_ended",
            help: "Leases that were ended because their links were gone and no DEL came",
            value: leases_ended.clone(),
        }));
        registry.register_collector(Box::new(Total {
            name: "plat_agent_lease_store_rebuilds",
            help: "How often the agent had to rebuild the lease store from the kernel",
            value: leases_rebuilt.clone(),
        }));
        let (probes, found) = watch::channel(Findings::default());
        registry.register_collector(Box::new(ProbeMetrics(found)));
        let version = vec![("version", env!("CARGO_PKG_VERSION")), ("component", "agent")];
        registry.register("plat_build", "Version of this program", Info::new(version));
        registry.register_collector(Box::new(Process));
        Metrics {
            registry,
            routes,
            repairs,
            faults,
            addresses,
            pass_duration,
            lease_until,
            held,
            leases_ended,
            leases_rebuilt,
            contested,
            contests,
            probes,
        }
    }
}

impl Metrics {
    /// Takes in the report of a pass and the time that it took.
    pub fn update(&self, report: &Report, took: Duration) {
        self.pass_duration.observe(took.as_secs_f64());
        let status = &report.status;
        let routes = status.routes.unwrap_or_default();
        let set = |family: &Family<StateLabel, Gauge>, state, value: i64| {
            family.get_or_create(&StateLabel { state }).set(value);
        };
        set(&self.routes, "desired", routes.desired);
        set(&self.routes, "installed", routes.installed);
        let used: i64 = status.held_blocks.iter().filter_map(|block| block.used).sum();
        let capacity: i64 = status.held_blocks.iter().map(|block| block.capacity).sum();
        set(&self.addresses, "used", used);
        set(&self.addresses, "free", capacity - used);
        for repair in Repair::ALL {
            let count = report.repairs.get(&repair).copied().unwrap_or(0);
            self.repairs.get_or_create(&KindLabel { kind: repair.label() }).set(count);
        }
        for reason in Reason::ALL {
            let count = report.faults.get(&reason).copied().unwrap_or(0);
            self.faults
                .get_or_create(&ReasonLabel { reason: reason.as_str() })
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.lease_until.set(report.lease_until.unwrap_or(0));
        self.held.set(i64::try_from(report.held).unwrap_or(i64::MAX));
        self.contested.set(i64::from(report.contested));
        self.contests.set(report.contests);
        self.leases_ended.set(report.leases_ended);
        self.leases_rebuilt.set(report.leases_rebuilt);
        if let Some(found) = &report.probes {
            self.probes.send_replace(found.clone());
        }
    }

    /// All metrics as text (OpenMetrics).
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

/// Repairs are counted by the loop; here they are shown as the counter that they are.
#[derive(Debug)]
struct Repairs(Family<KindLabel, Gauge>);

impl Collector for Repairs {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let help = "What was put back after somebody removed or changed it";
        let counter = ConstCounter::new(0u64);
        let mut metric =
            encoder.encode_descriptor("plat_agent_repairs", help, None, counter.metric_type())?;
        for repair in Repair::ALL {
            let label = KindLabel { kind: repair.label() };
            let count = u64::try_from(self.0.get_or_create(&label).get()).unwrap_or(0);
            ConstCounter::new(count).encode(metric.encode_family(&label)?)?;
        }
        Ok(())
    }
}

/// What the loop counts, shown as the counter that it is.
#[derive(Debug)]
struct Total {
    name: &'static str,
    help: &'static str,
    value: Gauge,
}

impl Collector for Total {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let counter = ConstCounter::new(u64::try_from(self.value.get()).unwrap_or(0));
        let metric = encoder.encode_descriptor(self.name, self.help, None, counter.metric_type())?;
        counter.encode(metric)
    }
}

/// Memory and CPU time of this process, read when asked for.
#[derive(Debug)]
struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let memory = ConstGauge::new(resident_bytes());
        let help = "Resident memory of this process";
        let metric = encoder.encode_descriptor(
            "process_resident_memory",
            help,
            Some(&Unit::Bytes),
            memory.metric_type(),
        )?;
        memory.encode(metric)?;
        let cpu = ConstCounter::new(clock::cpu_seconds());
        let help = "CPU time of this process";
        let metric =
            encoder.encode_descriptor("process_cpu", help, Some(&Unit::Seconds), cpu.metric_type())?;
        cpu.encode(metric)
    }
}

fn resident_bytes() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<i64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// What the server answers from.
#[derive(Clone)]
pub struct Served {
    /// Signs of life.
    pub pulse: Arc<Pulse>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
}

/// What the probes found, as it changes.
pub type Peers = watch::Receiver<Findings>;

fn router(served: Served) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(served)
}

async fn livez(State(served): State<Served>) -> (StatusCode, &'static str) {
    if served.pulse.is_alive() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the loop has not turned for two minutes\n")
    }
}

async fn readyz(State(served): State<Served>) -> (StatusCode, &'static str) {
    if served.pulse.is_programmed() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no objects were received yet, and there is no cache of them\n")
    }
}

async fn metrics(State(served): State<Served>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, kind)], served.metrics.text())
}

async fn table(State(peers): State<Option<Peers>>) -> (StatusCode, String) {
    match peers {
        Some(peers) => (StatusCode::OK, probe::report::table(&peers.borrow())),
        None => (StatusCode::SERVICE_UNAVAILABLE, "probes are switched off (--probe-port=0)\n".to_owned()),
    }
}

/// Serves on the unix socket, for `probe`. A socket file that an earlier life left is removed.
pub async fn serve_socket(served: Served, peers: Option<Peers>, socket: &Path) -> io::Result<()> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Whom this node reaches is for those on the node alone.
    let peers = Router::new().route("/peers", get(table)).with_state(peers);
    axum::serve(UnixListener::bind(socket)?, router(served).merge(peers)).await
}

/// Serves on the port, or on one of the next if it is taken. Without any port the agent goes on.
pub async fn serve_port(served: Served, wanted: SocketAddr) {
    for offset in 0..=PORT_TRIES {
        let Some(port) = wanted.port().checked_add(offset) else { break };
        let address = SocketAddr::new(wanted.ip(), port);
        match bind(address).await {
            Ok(listener) => {
                tracing::info!(%address, "serving /livez, /readyz and /metrics");
                if let Err(error) = axum::serve(listener, router(served)).await {
                    tracing::error!(%error, "the server of metrics ended");
                }
                return;
            }
            Err(error) => tracing::warn!(%address, %error, "cannot serve metrics here; trying the next port"),
        }
    }
    tracing::error!(%wanted, "no port for metrics; probes go on by the socket");
}

/// `[::]` serves both families, and on a host without IPv6 it stands for `0.0.0.0`.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let every = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    match TcpListener::bind(address).await {
        Err(error) if address.ip() == every && error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

/// Asks the agent on that socket; an error says what is wrong.
pub async fn probe(what: Question, socket: &Path) -> anyhow::Result<()> {
    let path = match what {
        Question::Live => "/livez",
        Question::Ready => "/readyz",
        Question::Peers => "/peers",
    };
    let ask = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(PROBE_TIMEOUT, ask).await;
    let answer = answer
        .map_err(|_| anyhow::anyhow!("no answer on {} in {} s", socket.display(), PROBE_TIMEOUT.as_secs()))?;
    let answer = answer.map_err(|error| anyhow::anyhow!("ask the agent on {}: {error}", socket.display()))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    anyhow::ensure!(status == "200", "{path}: {}", body.trim());
    if what == Question::Peers {
        print!("{body}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::findings::Counters;

    #[test]
    fn metrics_have_the_names_that_dashboards_use() {
        let metrics = Metrics::default();
        let report = Report {
            repairs: [(Repair::Route, 7)].into(),
            faults: [(Reason::NotOnLink, 2)].into(),
            lease_until: Some(99),
            held: 3,
            leases_ended: 4,
            leases_rebuilt: 5,
            contested: true,
            contests: 6,
            ..Report::default()
        };
        let counters = Counters { sent: 9, answered: 8, ..Counters::default() };
        let report = Report { probes: Some(Findings { counters, ..Findings::default() }), ..report };
        metrics.update(&report, Duration::from_millis(3));
        let text = metrics.text();
        for line in [
            "plat_agent_routes{state=\"desired\"} 0",
            "plat_agent_repairs_total{kind=\"route\"} 7",
            "plat_agent_repairs_total{kind=\"conflist\"} 0",
            "plat_agent_faults{reason=\"NotOnLink\"} 2",
            "plat_ipam_addresses{state=\"free\"} 0",
            "plat_agent_pass_duration_seconds_count 1",
            "plat_agent_probe_packets_total{kind=\"answered\"} 8",
            "plat_agent_probe_peers{state=\"unreachable\"} 0",
            "plat_agent_probe_round_trip_seconds 0.0",
            "plat_agent_probe_path_mtus 0",
            "plat_agent_lease_until_seconds 99",
            "plat_agent_withdrawals_held 3",
            "plat_agent_leases_ended_total 4",
            "plat_agent_lease_store_rebuilds_total 5",
            "plat_agent_contested 1",
            "plat_agent_contests_total 6",
            "plat_build_info{version=\"0.1.0\",component=\"agent\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        for name in ["process_resident_memory_bytes ", "process_cpu_seconds_total "] {
            let value = text.lines().find_map(|l| l.strip_prefix(name)).unwrap();
            assert!(value.parse::<f64>().unwrap() > 0.0, "{name}{value}");
        }
    }

    #[tokio::test]
    async fn a_probe_tells_a_waiting_agent_from_a_programmed_one_and_from_none() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("run/agent.sock");
        let missing = probe(Question::Live, &socket).await.unwrap_err();
        assert!(missing.to_string().contains("agent.sock"), "{missing}");

        let served = Served { pulse: Arc::default(), metrics: Arc::default() };
        let server = tokio::spawn({
            let (served, socket) = (served.clone(), socket.clone());
            async move { serve_socket(served, None, &socket).await }
        });
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while probe(Question::Live, &socket).await.is_err() {
            assert!(tokio::time::Instant::now() < deadline, "the server did not start");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let waiting = probe(Question::Ready, &socket).await.unwrap_err();
        assert!(waiting.to_string().contains("no objects"), "{waiting}");
        served.pulse.set_programmed();
        probe(Question::Ready, &socket).await.unwrap();
        server.abort();
    }

    #[tokio::test]
    async fn every_address_means_those_of_both_families() {
        let listener = bind("[::]:0".parse().unwrap()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        if listener.local_addr().unwrap().is_ipv6() {
            tokio::net::TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_not_fatal() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let wanted = taken.local_addr().unwrap();
        let served = Served { pulse: Arc::default(), metrics: Arc::default() };
        let server = tokio::spawn(serve_port(served, wanted));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        'found: loop {
            for offset in 1..=PORT_TRIES {
                let Some(port) = wanted.port().checked_add(offset) else { continue };
                let Ok(mut stream) = tokio::net::TcpStream::connect((wanted.ip(), port)).await else {
                    continue;
                };
                stream.write_all(b"GET /livez HTTP/1.0\r\n\r\n").await.unwrap();
                let mut answer = String::new();
                if stream.read_to_string(&mut answer).await.is_ok() && answer.contains("200 OK") {
                    break 'found;
                }
            }
            assert!(tokio::time::Instant::now() < deadline, "no port of the next ten answers");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        server.abort();
    }
}
