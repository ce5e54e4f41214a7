//! A benchmark, run by `make bench`: how soon ten pods of one node run that are created at once, with Plat and
//! with reference plugins in the same cluster, in turns. Most of that time is kubelet's and the runtime's.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use plat_e2e::cluster::{Cluster, PodSpec};
use plat_e2e::testbed::{repository, tools};
use plat_e2e::wait::{holds, wait_until};
use plat_rig::figures::{Figure, Unit, median, table};

const DEADLINE: Duration = Duration::from_secs(60);
const PODS: usize = 10;
const ROUNDS: usize = 3;
/// It sorts before Plat's.
const FOREIGN: &str = "/etc/cni/net.d/00-reference.conflist";
const PLAT: &str = "plat";
/// A configuration by name: its interface plugin as JSON, and the start of its pods' addresses.
const REFERENCES: [(&str, &str, &str); 2] = [
    (
        "bridge+host-local+portmap",
        r#""type":"bridge","bridge":"ref0","isGateway":true,"ipMasq":true,"hairpinMode":true"#,
        "10.201.0.",
    ),
    ("ptp+host-local+portmap", r#""type":"ptp","ipMasq":true"#, "10.202.0."),
];

/// Makes that configuration the node's; returns once a pod has got an address of it.
fn choose(cluster: &Cluster, who: &str) {
    let line = match REFERENCES.iter().find(|(name, ..)| *name == who) {
        None => format!("rm -f {FOREIGN}"),
        Some((_, plugin, start)) => format!(
            r#"echo '{{"cniVersion":"1.0.0","name":"reference","plugins":[{{{plugin},"ipam":{{"type":"host-local","subnet":"{start}0/24","routes":[{{"dst":"0.0.0.0/0"}}]}}}},{{"type":"portmap","capabilities":{{"portMappings":true}}}}]}}' >{FOREIGN}.new && mv {FOREIGN}.new {FOREIGN}"#
        ),
    };
    cluster.on_node(1, &line).unwrap();
    wait_until(&format!("pods start with {who}"), DEADLINE, || {
        let pod = PodSpec { name: "first", node: 1, host_network: false };
        let pods = cluster.run_pods(&[pod], DEADLINE).map_err(|e| format!("{e:#}"))?;
        cluster.delete_pods(&["first"]).map_err(|e| format!("{e:#}"))?;
        let ip = pods.first().map(|pod| pod.ip()).ok_or("no pod")?;
        holds(is_of(who, ip), ip)
    });
}

fn is_of(who: &str, ip: IpAddr) -> bool {
    let start = REFERENCES.iter().find(|(name, ..)| *name == who).map_or("10.244.", |(_, _, start)| start);
    ip.to_string().starts_with(start)
}

/// Milliseconds from the creation of ten pods until the last is ready.
fn round(cluster: &Cluster, who: &str) -> f64 {
    let names: Vec<String> = (0..PODS).map(|number| format!("p{number}")).collect();
    let specs: Vec<_> = names.iter().map(|name| PodSpec { name, node: 1, host_network: false }).collect();
    let begin = Instant::now();
    let pods = cluster.run_pods(&specs, DEADLINE).unwrap();
    let took = begin.elapsed().as_secs_f64() * 1000.0;
    assert!(pods.iter().all(|pod| is_of(who, pod.ip())), "{who}: {pods:?}");
    cluster.delete_pods(&names.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    took
}

#[test]
#[ignore = "a measurement of some minutes: make bench runs it"]
fn ten_pods_start_at_once() {
    let cluster = Cluster::with_plat(1, &[]);
    let plugins = tools().join("cni");
    let copy =
        format!("cp -n {0}/bridge {0}/ptp {0}/host-local {0}/portmap /opt/cni/bin/", plugins.display());
    cluster.on_node(1, &copy).unwrap();
    let everyone = || std::iter::once(PLAT).chain(REFERENCES.iter().map(|(name, ..)| *name));
    let mut took: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for who in everyone() {
            choose(&cluster, who);
            took.entry(who).or_default().push(round(&cluster, who));
        }
    }
    let of = |who: &str| median(took.get(who).cloned().unwrap_or_default());
    let name = "ten pods at once through kubelet, until the last is ready";
    let figures: Vec<Figure> = REFERENCES
        .iter()
        .map(|(peer, ..)| Figure::new(name, of(PLAT), peer, of(peer), Unit::Milliseconds))
        .collect();
    let mut lines = String::new();
    for figure in &figures {
        writeln!(lines, "{}", serde_json::to_string(figure).unwrap()).unwrap();
    }
    let out = std::env::var_os("BENCH_OUT").map_or_else(|| repository().join("target/bench"), PathBuf::from);
    fs::create_dir_all(&out).unwrap();
    fs::write(out.join("pods.json"), lines).unwrap();
    fs::write(out.join("pods.md"), table(&figures)).unwrap();
}
