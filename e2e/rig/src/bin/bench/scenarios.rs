//! What is measured: each scenario lets its contenders take turns, and makes figures of what they took.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use plat_crds::cni_conf::{Conflist, PlatPlugin};
use plat_rig::figures::{Figure, Goal, Unit, median, p99};
use serde_json::{Value, json};

use crate::contender::{Contender, Kind, Verb};
use crate::{Args, Result, node};

/// Pods that are added at once.
const AT_ONCE: usize = 100;
/// The floor's bridge and its /16.
const FLOOR: (&str, &str) = ("floor0", "10.30");

/// Everything that `make bench` measures.
pub fn all(args: &Args) -> Result<Vec<Figure>> {
    node::prepare(&[FLOOR])?;
    let plat = plat(args, "plat", "pl", &["10.10.0.0/16"], 0, json!({}))?;
    let bridge = reference_bridge(args, "bridge+host-local", "br", &["10.20.0.0/16"]);
    let ptp = ptp(args);
    let floor = floor(args);
    let contenders = [plat.clone(), bridge.clone(), ptp, floor];

    progress("one by one");
    let mut figures = one_by_one(&contenders, args.pods)?;
    progress("100 at once");
    figures.extend(at_once(&contenders, args.rounds)?);
    progress("two families");
    figures.extend(dual_stack(args)?);
    progress("host ports and limits");
    figures.extend(host_ports(args)?);
    figures.extend(bandwidth(args)?);
    progress("routed");
    figures.extend(routed(args)?);
    progress("with many leases");
    figures.extend(leases_held(args)?);
    progress("memory and size");
    figures.extend(memory(&plat, &bridge)?);
    figures.extend(size(args)?);
    Ok(figures)
}

/// Two builds of the CNI binary, for whoever changes it.
pub fn two_builds(args: &Args, other: &Path) -> Result<Vec<Figure>> {
    node::prepare(&[FLOOR])?;
    let ours = plat(args, "plat", "pl", &["10.10.0.0/16"], 0, json!({}))?;
    let args = Args { plat: other.to_owned(), ..args.clone() };
    let other = plat(&args, "other build", "ot", &["10.11.0.0/16"], 0, json!({}))?;
    let contenders = [ours, other, floor(&args)];
    let took = take_turns(&contenders, args.pods, Pods::Pile)?;
    let figures = |name: &str, value: &dyn Fn(Took) -> f64| {
        against_each(name, &contenders, &took, Unit::Milliseconds, value)
    };
    // The best of each tells builds apart also on a machine that is busy with other things.
    let mut all = figures("ADD, best", &|t| t.adds.into_iter().fold(f64::MAX, f64::min));
    all.extend(figures("ADD", &|t| median(t.adds)));
    all.extend(figures("DEL, best", &|t| t.dels.into_iter().fold(f64::MAX, f64::min)));
    all.extend(figures("DEL", &|t| median(t.dels)));
    all.extend(at_once(&contenders, args.rounds)?);
    Ok(all)
}

fn progress(what: &str) {
    eprintln!("bench: {what} ...");
}

/// Plat, leasing from blocks as the agent gives them, with a bridge and a lease store of its own.
fn plat(
    args: &Args,
    name: &'static str,
    prefix: &'static str,
    blocks: &[&str],
    held: u32,
    more: Value,
) -> Result<Contender> {
    let plugin = PlatPlugin {
        datapath: plat_crds::lease::Datapath::Bridge,
        bridge: format!("{prefix}-bridge"),
        run_dir: node::run_dir(prefix, blocks, held)?.to_string_lossy().into_owned(),
        anti_spoofing: true,
        capabilities: Vec::new(),
    };
    // As the agent writes it, and as a runtime hands it on.
    let list = Conflist::new(&plugin, Vec::new(), true);
    let mut conf = list.plugins.into_iter().next().unwrap_or_default();
    let mut more = more;
    if let Value::Object(more) = &mut more {
        more.insert("name".to_owned(), list.name.into());
        more.insert("cniVersion".to_owned(), list.cni_version.into());
    }
    if let (Value::Object(conf), Value::Object(more)) = (&mut conf, more) {
        conf.extend(more);
    }
    Ok(Contender { name, prefix, kind: Kind::Plugins(vec![(args.plat.clone(), conf)]) })
}

/// The reference, as most clusters have it: a bridge that is the gateway, and an address of each subnet.
fn reference_bridge(args: &Args, name: &'static str, prefix: &'static str, subnets: &[&str]) -> Contender {
    let conf = json!({
        "cniVersion": "1.0.0", "name": prefix, "type": "bridge", "bridge": format!("{prefix}-bridge"),
        "isGateway": true, "hairpinMode": true, "ipam": host_local(subnets),
    });
    Contender { name, prefix, kind: Kind::Plugins(vec![(args.reference.join("bridge"), conf)]) }
}

fn ptp(args: &Args) -> Contender {
    let conf = json!({
        "cniVersion": "1.0.0", "name": "pt", "type": "ptp", "ipam": host_local(&["10.21.0.0/16"]),
    });
    Contender {
        name: "ptp+host-local",
        prefix: "pt",
        kind: Kind::Plugins(vec![(args.reference.join("ptp"), conf)]),
    }
}

fn host_local(subnets: &[&str]) -> Value {
    let ranges: Vec<Value> = subnets.iter().map(|subnet| json!([{"subnet": subnet}])).collect();
    let routes: Vec<Value> = subnets
        .iter()
        .map(|subnet| json!({"dst": if subnet.contains(':') { "::/0" } else { "0.0.0.0/0" }}))
        .collect();
    json!({"type": "host-local", "dataDir": "/run/host-local", "ranges": ranges, "routes": routes})
}

fn floor(args: &Args) -> Contender {
    let kind = Kind::Floor(args.floor.clone(), FLOOR.0, FLOOR.1);
    Contender { name: "netlink floor", prefix: "fl", kind }
}

/// Milliseconds of each ADD and each DEL of one contender.
#[derive(Clone, Debug, Default)]
struct Took {
    adds: Vec<f64>,
    dels: Vec<f64>,
}

/// What becomes of the pods of a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pods {
    /// All stay until the last one is added.
    Pile,
    /// Each goes before the next one comes.
    ComeAndGo,
}

/// Adds and deletes pods one by one, the contenders taking turns.
fn take_turns(contenders: &[Contender], pods: usize, how: Pods) -> Result<Vec<Took>> {
    let mut took = vec![Took::default(); contenders.len()];
    let namespaces = if how == Pods::Pile { pods } else { 1 };
    for contender in contenders {
        node::make_namespaces(contender, namespaces)?;
    }
    // The first one makes bridges and files, and is not counted.
    for contender in contenders {
        contender.call(Verb::Add, 0)?;
        contender.call(Verb::Del, 0)?;
    }
    let mut turn = |verb: Verb, number: usize, pod: usize| -> Result<()> {
        for at in (0..contenders.len()).map(|turn| (number + turn) % contenders.len()) {
            let (Some(contender), Some(took)) = (contenders.get(at), took.get_mut(at)) else { continue };
            let milliseconds = milliseconds(contender.call(verb, pod)?);
            match verb {
                Verb::Add => took.adds.push(milliseconds),
                Verb::Del => took.dels.push(milliseconds),
            }
        }
        Ok(())
    };
    match how {
        Pods::Pile => {
            (0..pods).try_for_each(|number| turn(Verb::Add, number, number))?;
            (0..pods).try_for_each(|number| turn(Verb::Del, number, number))?;
        }
        Pods::ComeAndGo => (0..pods).try_for_each(|number| {
            turn(Verb::Add, number, 0)?;
            turn(Verb::Del, number, 0)
        })?,
    }
    for contender in contenders {
        node::remove_namespaces(contender, namespaces)?;
    }
    Ok(took)
}

/// Ours, the first, against each of the others.
fn against_each<T: Clone>(
    name: &str,
    contenders: &[Contender],
    took: &[T],
    unit: Unit,
    value: impl Fn(T) -> f64,
) -> Vec<Figure> {
    let Some((ours, theirs)) = took.split_first() else { return Vec::new() };
    let peers = contenders.iter().skip(1).zip(theirs);
    peers
        .map(|(peer, theirs)| Figure::new(name, value(ours.clone()), peer.name, value(theirs.clone()), unit))
        .collect()
}

fn one_by_one(contenders: &[Contender], pods: usize) -> Result<Vec<Figure>> {
    let took = take_turns(contenders, pods, Pods::Pile)?;
    let figures = |name: &str, value: &dyn Fn(Took) -> f64| {
        against_each(name, contenders, &took, Unit::Milliseconds, value)
    };
    let mut all = figures("ADD", &|t| median(t.adds));
    all.extend(figures("ADD, 99th percentile", &|t| p99(t.adds)));
    all.extend(figures("DEL", &|t| median(t.dels)));
    all.extend(figures("DEL, 99th percentile", &|t| p99(t.dels)));
    Ok(all
        .into_iter()
        .map(|figure| match (figure.name.as_str(), figure.peer.as_str()) {
            ("ADD", "bridge+host-local") => figure.reaching(Goal::RatioAtMost(0.2)),
            ("ADD", "netlink floor") => figure.reaching(Goal::RatioAtMost(2.0)),
            ("DEL", "netlink floor") => figure.reaching(Goal::BeyondPeerAtMost(2.0)),
            _ => figure,
        })
        .collect())
}

/// Adds and deletes 100 pods at once, the contenders taking turns.
fn at_once(contenders: &[Contender], rounds: usize) -> Result<Vec<Figure>> {
    let mut rates = vec![(Vec::new(), Vec::new()); contenders.len()];
    for contender in contenders {
        node::make_namespaces(contender, AT_ONCE)?;
    }
    for round in 0..rounds {
        for at in (0..contenders.len()).map(|turn| (round + turn) % contenders.len()) {
            let (Some(contender), Some(rates)) = (contenders.get(at), rates.get_mut(at)) else { continue };
            rates.0.push(rate(contender, Verb::Add)?);
            rates.1.push(rate(contender, Verb::Del)?);
        }
    }
    for contender in contenders {
        node::remove_namespaces(contender, AT_ONCE)?;
    }
    let mut figures =
        against_each("100 ADDs at once", contenders, &rates, Unit::PerSecond, |(adds, _)| median(adds));
    figures.extend(against_each("100 DELs at once", contenders, &rates, Unit::PerSecond, |(_, dels)| {
        median(dels)
    }));
    Ok(figures
        .into_iter()
        .map(|figure| match (figure.name.as_str(), figure.peer.as_str()) {
            ("100 ADDs at once", "bridge+host-local") => figure.reaching(Goal::RatioAtLeast(5.0)),
            _ => figure,
        })
        .collect())
}

/// How many pods a second, when all of them come or go at once.
fn rate(contender: &Contender, verb: Verb) -> Result<f64> {
    let begin = Instant::now();
    thread::scope(|scope| {
        let calls: Vec<_> =
            (0..AT_ONCE).map(|number| scope.spawn(move || contender.call(verb, number).map(drop))).collect();
        calls.into_iter().try_for_each(|call| call.join().map_err(|_| "a thread panicked")?)
    })?;
    Ok(AT_ONCE as f64 / begin.elapsed().as_secs_f64())
}

fn dual_stack(args: &Args) -> Result<Vec<Figure>> {
    let contenders = [
        plat(args, "plat", "p2", &["10.12.0.0/16", "fd00:12::/64"], 0, json!({}))?,
        reference_bridge(args, "bridge+host-local", "b2", &["10.22.0.0/16", "fd00:22::/64"]),
    ];
    let took = take_turns(&contenders, args.pods / 3, Pods::Pile)?;
    Ok(against_each("dual-stack ADD", &contenders, &took, Unit::Milliseconds, |t| median(t.adds)))
}

/// Two host ports for each pod.
fn host_ports(args: &Args) -> Result<Vec<Figure>> {
    let port =
        |host: &str, container: u16| json!({"hostPort": host, "containerPort": container, "protocol": "tcp"});
    let ports = json!({"runtimeConfig": {"portMappings": [port("PORT0", 80), port("PORT1", 443)]}});
    let plat = plat(args, "plat", "p3", &["10.16.0.0/16"], 0, ports.clone())?;
    let figures = against_chain(args, plat, "bridge+portmap", "b3", "10.23.0.0/16", "portmap", ports)?;
    let name = "ADD with two host ports";
    Ok(figures
        .into_iter()
        .map(|f| Figure { name: name.to_owned(), ..f }.reaching(Goal::RatioAtMost(0.1)))
        .collect())
}

/// A limit in each direction.
fn bandwidth(args: &Args) -> Result<Vec<Figure>> {
    let limits = json!({"runtimeConfig": {"bandwidth": {"ingressRate": 10_000_000, "ingressBurst": 800_000,
        "egressRate": 10_000_000, "egressBurst": 800_000}}});
    let plat = plat(args, "plat", "p4", &["10.17.0.0/16"], 0, limits.clone())?;
    let figures = against_chain(args, plat, "bridge+bandwidth", "b4", "10.24.0.0/16", "bandwidth", limits)?;
    Ok(figures.into_iter().map(|f| Figure { name: "ADD with limits both ways".to_owned(), ..f }).collect())
}

/// Ours against the reference bridge with another reference plugin behind it.
fn against_chain(
    args: &Args,
    plat: Contender,
    name: &'static str,
    prefix: &'static str,
    subnet: &str,
    second: &str,
    runtime: Value,
) -> Result<Vec<Figure>> {
    if !args.reference.join(second).exists() {
        eprintln!("bench: there is no reference plugin {second}: left out");
        return Ok(Vec::new());
    }
    let mut chain = reference_bridge(args, name, prefix, &[subnet]);
    let mut conf = json!({"cniVersion": "1.0.0", "name": prefix, "type": second});
    if let (Value::Object(conf), Value::Object(runtime)) = (&mut conf, runtime) {
        conf.extend(runtime);
    }
    if let Kind::Plugins(plugins) = &mut chain.kind {
        plugins.push((args.reference.join(second), conf));
    }
    let contenders = [plat, chain];
    let took = take_turns(&contenders, args.pods / 3, Pods::Pile)?;
    Ok(against_each("", &contenders, &took, Unit::Milliseconds, |t| median(t.adds)))
}

/// The datapath without bridge, against the plugin that does the same.
fn routed(args: &Args) -> Result<Vec<Figure>> {
    // What is about a bridge is not for it.
    let conf = json!({"datapath": "routed", "hairpinMode": null, "bridge": null});
    let routed = plat(args, "plat, routed", "rt", &["10.18.0.0/16"], 0, conf)?;
    let mut ptp = ptp(args);
    ptp.prefix = "pr";
    node::make_namespaces(&routed, 1)?;
    let tried = routed.call(Verb::Add, 0).and_then(|_| routed.call(Verb::Del, 0));
    node::remove_namespaces(&routed, 1)?;
    if tried.is_err_and(|error| error.to_string().contains("unsupported key datapath")) {
        eprintln!("bench: this build has no routed datapath: left out");
        return Ok(Vec::new());
    }
    let contenders = [routed, ptp];
    let took = take_turns(&contenders, args.pods / 3, Pods::Pile)?;
    Ok(against_each("ADD, routed", &contenders, &took, Unit::Milliseconds, |t| median(t.adds)))
}

/// The same ADD on nodes that hold few and many leases.
fn leases_held(args: &Args) -> Result<Vec<Figure>> {
    let contenders = [
        plat(args, "1 lease held", "h1", &["10.13.0.0/16"], 1, json!({}))?,
        plat(args, "250 leases held", "h2", &["10.14.0.0/16"], 250, json!({}))?,
        plat(args, "10,000 leases held", "h3", &["10.15.0.0/16"], 10_000, json!({}))?,
    ];
    let took = take_turns(&contenders, args.pods, Pods::ComeAndGo)?;
    let figure = |at: usize| {
        let (few, many) = (took.first()?, took.get(at)?);
        let name = format!("ADD with {}", contenders.get(at)?.name);
        let peer = contenders.first()?.name;
        let milliseconds = |took: &Took| median(took.adds.clone());
        Some(Figure::new(&name, milliseconds(many), peer, milliseconds(few), Unit::Milliseconds))
    };
    Ok([1, 2].into_iter().filter_map(figure).map(|f| f.reaching(Goal::RatioAtMost(1.2))).collect())
}

fn memory(plat: &Contender, bridge: &Contender) -> Result<Vec<Figure>> {
    let mut peaks = Vec::new();
    for contender in [plat, bridge] {
        node::make_namespaces(contender, 1)?;
        peaks.push(contender.peak_memory(0)?);
        contender.call(Verb::Del, 0)?;
        node::remove_namespaces(contender, 1)?;
    }
    let name = "peak memory of an ADD";
    let figures = match peaks.as_slice() {
        [ours, theirs] => vec![Figure::new(name, *ours, "bridge", *theirs, Unit::Mebibytes)],
        _ => Vec::new(),
    };
    Ok(figures.into_iter().map(|f| f.reaching(Goal::AtMost(4.0))).collect())
}

fn size(args: &Args) -> Result<Vec<Figure>> {
    let size = |path: &Path| -> Result<f64> { Ok(path.metadata()?.len() as f64 / f64::from(1 << 20)) };
    let theirs = size(&args.reference.join("bridge"))? + size(&args.reference.join("host-local"))?;
    let figure =
        Figure::new("size of the program", size(&args.plat)?, "bridge+host-local", theirs, Unit::Mebibytes);
    Ok(vec![figure.reaching(Goal::AtMost(2.0))])
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
