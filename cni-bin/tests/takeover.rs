//! A node that ran the reference plugins `bridge` and `host-local`, as flannel's and many hand-made networks do, until Plat
//! took over: its pods keep their addresses and links, and go without leaving anything. The caller is
//! containerd's go-cni, which deletes old pods by the new configuration.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;
#[path = "lab/told.rs"]
mod told;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use lab::network::{configure, conflist, gocni, install, ok, result};
use lab::traffic::{Server, ask_tcp};
use lab::{blocks, eventually, json_of, leased, netns, ping, sh};
use plat_cni::boot::BootId;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::store::{Missing, Store};
use plat_cni::sweep::Sweeper;
use serde_json::{Value, json};
use told::Told;

const NETWORKS: &str = "/var/lib/cni/networks";

/// The network that was there before, in these ranges.
fn reference(ranges: &[&str]) -> Value {
    reference_by("bridge", ranges)
}

fn reference_by(plugin: &str, ranges: &[&str]) -> Value {
    let ranges: Vec<_> = ranges.iter().map(|range| json!([{"subnet": range}])).collect();
    let routes = json!([{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]);
    json!({"cniVersion": "1.0.0", "name": "ref", "plugins": [
        {"type": plugin, "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
         "ipam": {"type": "host-local", "ranges": ranges, "routes": routes}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]})
}

fn path(id: &str) -> String {
    format!("/run/netns/{id}")
}

fn pod(port: Option<u16>) -> Value {
    let ports: Vec<_> = port
        .iter()
        .map(|port| json!({"HostPort": port, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}))
        .collect();
    json!({"Labels": {"K8S_POD_NAMESPACE": "default", "K8S_POD_NAME": "web-0", "K8S_POD_UID": "6a1b"}, "PortMappings": ports})
}

/// Starts a pod; its addresses.
fn start(id: &str, pod: &Value) -> Vec<String> {
    netns(id);
    let taken = result(gocni(&["setup", id, &path(id)], pod));
    let configs = taken["Interfaces"]["eth0"]["IPConfigs"].as_array().unwrap().clone();
    configs.iter().map(|config| config["IP"].as_str().unwrap().to_owned()).collect()
}

fn stop(id: &str, pod: &Value) {
    ok(gocni(&["remove", id, &path(id)], pod));
}

/// What the reference left of a pod.
fn traces() -> Vec<String> {
    let mut traces: Vec<String> = sh("iptables-save; ip6tables-save")
        .lines()
        .filter(|line| line.starts_with(":CNI-") || line.contains(" -j CNI-"))
        .filter(|line| {
            !["CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK", "CNI-HOSTPORT-DNAT"]
                .iter()
                .any(|common| line.contains(common))
        })
        .map(str::to_owned)
        .collect();
    traces.extend(host_local());
    let results = fs::read_dir("/var/lib/cni/results").into_iter().flatten();
    traces.extend(
        results
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("ref-")),
    );
    traces
}

/// The addresses that host-local has given.
fn host_local() -> BTreeSet<String> {
    let files = fs::read_dir(format!("{NETWORKS}/ref")).into_iter().flatten();
    let names = files.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.parse::<std::net::IpAddr>().is_ok()).collect()
}

fn links() -> usize {
    json_of("ip -j link show type veth").as_array().unwrap().len()
}

fn take_over(blocks_: &[&str]) {
    blocks(blocks_);
    configure("05-plat.conflist", &conflist("1.0.0", vec![]));
}

fn sweeper() -> Sweeper {
    let kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
    let store = Store::at("/run/plat/leases".as_ref());
    Sweeper::new(store, BootId::read().unwrap(), Missing::Create, Box::new(kernel))
}

fn sweep() -> plat_cni::sweep::Report {
    sweeper().sweep(Duration::from_secs(5)).unwrap()
}

#[test]
fn pods_of_the_reference_keep_what_they_have_reach_new_pods_and_leave_nothing_when_they_go() {
    lab::enter();
    sh(
        "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0",
    );
    install("10-ref.conflist", &reference(&["10.244.3.0/24", "fd00:3::/64"]));
    let mut old = BTreeSet::new();
    for number in 1..=3 {
        let addresses = start(&format!("old{number}"), &pod((number == 1).then_some(8080)));
        assert!(addresses.into_iter().all(|address| old.insert(address)));
    }
    assert_eq!(old.len(), 6);
    let _server = Server::tcp("old1", 80);
    let bridge = json_of("ip -j link show cni0")[0]["address"].clone();

    take_over(&["10.244.3.0/24", "fd00:3::/64"]);
    let mut new = BTreeSet::new();
    for number in 1..=4 {
        for address in start(&format!("new{number}"), &pod(None)) {
            assert!(!old.contains(&address), "{address} is an old pod's");
            assert!(new.insert(address));
        }
    }
    assert_eq!(leased().len(), 6 + 8);
    assert_eq!(json_of("ip -j link show cni0")[0]["address"], bridge, "pods know the gateway by it");
    for (from, to) in [("old1", &new), ("old2", &old), ("new1", &old), ("new2", &new)] {
        // A namespace's own addresses are behind its loopback, which a runtime raises, and nobody here.
        let own = sh(&format!("ip -n {from} -o addr show eth0"));
        for address in to.iter().filter(|address| !own.contains(&format!(" {address}/"))) {
            eventually(&format!("{from} reaches {address}"), || ping(from, address));
        }
    }
    let of_old1 = old.first().unwrap();
    assert_eq!(ask_tcp("new1", &format!("{of_old1}:80")).as_ref(), new.iter().next(), "as itself");

    for number in 1..=3 {
        stop(&format!("old{number}"), &pod((number == 1).then_some(8080)));
    }
    assert_eq!(traces(), [] as [&str; 0]);
    assert_eq!((leased().len(), links()), (8, 4));
    assert!(ping("new1", new.last().unwrap()));
    for number in 1..=4 {
        stop(&format!("new{number}"), &pod(None));
    }
    lab::assert_nothing_left();
}

#[test]
fn a_pod_whose_network_is_uninstalled_or_unknown_still_goes_whole() {
    lab::enter();
    install("10-ref.conflist", &reference(&["10.244.3.0/24"]));
    let addresses = [start("a", &pod(None)), start("b", &pod(None)), start("c", &pod(None))].concat();
    sh("mv /run/bin/bridge /run/bin/gone; rm /var/lib/cni/results/ref-b-eth0");
    take_over(&["10.244.3.0/24"]);
    // Nobody knows whose c is any more, but for the kernel, which has its link.
    sh(&format!("rm {NETWORKS}/ref/{}", addresses[2]));
    let new = start("new", &pod(None)).concat();
    assert!(!addresses.contains(&new));
    assert_eq!(leased().len(), 4);
    for id in ["a", "b"] {
        stop(id, &pod(None));
        stop(id, &pod(None));
    }
    assert_eq!(host_local(), BTreeSet::new());
    assert_eq!((leased().len(), links()), (2, 2));
    stop("c", &pod(None));
    assert_eq!(leased().len(), 2, "the runtime's namespace still stands, and its address with it");
    sh("ip netns del c");
    eventually("its link goes with the namespace", || links() == 1);
}

#[test]
fn pods_with_a_link_of_their_own_are_taken_over_too() {
    lab::enter();
    sh("sysctl -qw net.ipv4.ip_forward=1");
    // kindnet's shape: each pod's link ends at the host, which routes to its address.
    install("10-ref.conflist", &reference_by("ptp", &["10.244.3.0/24"]));
    let old = [start("old1", &pod(None)), start("old2", &pod(None))].concat();
    take_over(&["10.244.3.0/24"]);
    let new = [start("new1", &pod(None)), start("new2", &pod(None))].concat();
    assert!(new.iter().all(|address| !old.contains(address)), "{old:?} {new:?}");
    for (from, to) in [("old1", &old[1]), ("old1", &new[0]), ("new1", &old[0]), ("new1", &new[1])] {
        eventually(&format!("{from} reaches {to}"), || ping(from, to));
    }
    for id in ["old1", "old2", "new1", "new2"] {
        stop(id, &pod(None));
    }
    assert_eq!((traces(), links()), (vec![], 0));
    lab::assert_nothing_left();
}

#[test]
fn pods_with_a_link_of_their_own_are_found_by_their_routes_where_no_file_tells_of_them() {
    lab::enter();
    sh("sysctl -qw net.ipv4.ip_forward=1");
    // kindnet has its files elsewhere.
    install("10-ref.conflist", &reference_by("ptp", &["10.244.3.0/24"]));
    let old = [start("old1", &pod(None)), start("old2", &pod(None))].concat();
    sh("mv /var/lib/cni /var/lib/gone");
    // The node's own way out is no pod, though another machine is behind it.
    sh("ip netns add router; ip link add uplink type veth peer name eth0 netns router");
    sh("ip addr add 10.244.3.100/24 dev uplink; ip link set uplink up");
    sh("ip -n router addr add 10.244.3.4/24 dev eth0; ip -n router link set eth0 up");
    take_over(&["10.244.3.0/24"]);
    let new = [start("new1", &pod(None)), start("new2", &pod(None))].concat();
    assert_eq!(
        (old.join(" "), new.join(" ")),
        ("10.244.3.2 10.244.3.3".into(), "10.244.3.4 10.244.3.5".into())
    );
}

#[test]
fn kindnets_pods_are_known_by_its_own_files_and_go_whole() {
    lab::enter();
    sh("sysctl -qw net.ipv4.ip_forward=1");
    let mut kindnet = reference_by("ptp", &["10.244.3.0/24"]);
    kindnet["plugins"][0]["ipMasq"] = json!(false);
    kindnet["plugins"][0]["ipam"]["dataDir"] = json!("/run/cni-ipam-state");
    install("10-ref.conflist", &kindnet);
    let old = start("old", &pod(Some(8080))).concat();
    let young = "/run/cni-ipam-state/ref/10.244.3.3";
    fs::write(young, "coming\r\neth0").unwrap();
    take_over(&["10.244.3.0/24"]);
    assert_eq!((old, start("new", &pod(None)).concat()), ("10.244.3.2".into(), "10.244.3.4".into()));
    assert_eq!(leased().len(), 2);
    fs::remove_file(young).unwrap();
    stop("old", &pod(Some(8080)));
    stop("new", &pod(None));
    assert_eq!((traces(), links()), (vec![], 0));
    assert!(!fs::exists("/run/cni-ipam-state/ref/10.244.3.2").unwrap());
    lab::assert_nothing_left();
}

#[test]
fn containers_on_other_bridges_are_nobodys_pods() {
    lab::enter();
    sh("mount -t tmpfs tmpfs /var/lib");
    for (number, bridge) in ["docker0", "br0"].iter().enumerate() {
        sh(&format!("ip link add {bridge} type bridge; ip link set {bridge} up; ip netns add c{number}"));
        sh(&format!("ip link add veth{number} type veth peer name eth0 netns c{number}"));
        sh(&format!("ip link set veth{number} master {bridge} up; ip -n c{number} link set eth0 up"));
        sh(&format!("ip -n c{number} addr add 10.244.3.{}/24 dev eth0", number + 2));
    }
    blocks(&["10.244.3.0/24"]);
    assert_eq!(sweep().leases, []);
    sh("ip link set veth1 nomaster; ip link add cni0 type bridge; ip link set veth1 master cni0");
    assert_eq!(sweep().leases.len(), 1, "it counts once it is the pods' bridge");
}

#[test]
fn an_address_that_the_other_network_gives_a_second_time_is_told_with_both_pods() {
    lab::enter();
    // ptp; bridge refuses a bridge that has an address besides its own, as Plat's gateway is one.
    install("10-ref.conflist", &reference_by("ptp", &["10.244.3.0/24"]));
    blocks(&["10.244.3.0/24"]);
    let ours = lab::address(&lab::add("ours", &lab::cluster_conf()));
    // host-local knows nothing of it.
    assert_eq!(start("theirs", &pod(None)), [ours]);
    let report = sweep();
    let named: Vec<_> =
        report.contested.iter().map(|(a, b)| (a.container_id.as_str(), b.container_id.as_str())).collect();
    assert_eq!(named, [("theirs", "ours")]);
    assert_eq!(sweep().contested, [], "once");
}

#[test]
fn a_pod_that_came_after_the_last_look_goes_as_whole_as_the_others() {
    lab::enter();
    install("10-ref.conflist", &reference(&["10.244.3.0/24"]));
    blocks(&["10.244.3.0/24"]);
    assert_eq!(sweep().taken_over, []);
    start("late", &pod(Some(8080)));
    take_over(&["10.244.3.0/24"]);
    stop("late", &pod(Some(8080)));
    assert_eq!((traces(), links()), (vec![], 0));
    lab::assert_nothing_left();
}

#[test]
fn an_address_in_host_locals_files_is_held_by_what_runs_and_by_what_may_be_about_to() {
    lab::enter();
    install("10-ref.conflist", &reference(&["10.244.3.0/29"]));
    let running = start("running", &pod(None)).concat();
    assert_eq!(running, "10.244.3.2");
    let file = |address: &str, age: u64| {
        let file = format!("{NETWORKS}/ref/{address}");
        fs::write(&file, format!("gone-{address}\r\neth0")).unwrap();
        let written = SystemTime::now() - Duration::from_secs(age);
        File::options().write(true).open(&file).unwrap().set_modified(written).unwrap();
    };
    file("10.244.3.3", 1000);
    file("10.244.3.4", 3);
    file("10.244.3.6", 1000);
    // A store that was made before any of them, and never swept since.
    sh("mv /var/lib/cni /var/lib/hidden; ip link set cni0 down");
    blocks(&["10.244.3.0/29"]);
    drop(Store::at("/run/plat/leases".as_ref()).lock(
        &BootId::read().unwrap(),
        Duration::from_secs(5),
        Missing::Create,
        &mut Told::default(),
    ));
    sh("mv /var/lib/hidden /var/lib/cni; ip link set cni0 up");
    take_over(&["10.244.3.0/29"]);
    let new: Vec<String> = ["a", "b", "c"].map(|id| start(id, &pod(None)).concat()).into();
    assert_eq!(
        new,
        ["10.244.3.3", "10.244.3.5", "10.244.3.6"],
        "neither the running pod's nor the young one"
    );
    netns("d");
    let full = gocni(&["setup", "d", &path("d")], &pod(None));
    assert!(!full.status.success() && String::from_utf8_lossy(&full.stderr).contains("no free address"));
}

#[test]
fn pods_that_the_other_network_still_starts_are_taken_over_by_the_sweep_and_end_with_their_links() {
    lab::enter();
    install("10-ref.conflist", &reference(&["10.244.3.0/24", "fd00:3::/64"]));
    blocks(&["10.244.3.0/24", "fd00:3::/64"]);
    assert_eq!(sweep().taken_over, []);
    let addresses = start("old", &pod(None));
    let taken = sweep().taken_over;
    assert_eq!((taken.len(), taken[0].container_id.as_str(), taken[0].ifname.as_str()), (1, "old", "eth0"));
    assert_eq!(leased(), addresses);
    assert_eq!(sweep().taken_over, [], "once");
    // The store is lost: the kernel still proves it.
    fs::remove_file("/run/plat/leases").unwrap();
    assert_eq!(sweep().leases.len(), 1);
    // The runtime asks the old network to delete it (cri-o does): no DEL comes to us.
    stop("old", &pod(None));
    let mut sweeper = sweeper();
    assert_eq!(sweeper.sweep_at(1_000, Duration::from_secs(5)).unwrap().suspected, 1);
    assert_eq!(sweeper.sweep_at(92_000, Duration::from_secs(5)).unwrap().ended.len(), 1);
    assert_eq!(leased(), [] as [&str; 0]);
}
