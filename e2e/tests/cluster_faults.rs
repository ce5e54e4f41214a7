//! Things break under running pods: the kernel's state, processes, files, objects, etcd. Datagrams run both ways
//! between two nodes meanwhile, one per millisecond, and every one is counted.

use std::net::SocketAddr;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use kube::Api;
use kube::api::{Patch, PatchParams};
use plat_crds::PodCIDR;
use plat_e2e::cluster::{Cluster, Pod, PodSpec, ProxyMode, items, name, node_ip};
use plat_e2e::plat::{
    AGENT_PORT, block_of, converged, doubles, events, has_route, leased, metric, pod_addresses, pod_ips,
    routes, wait_converged,
};
use plat_e2e::testbed::repository;
use plat_e2e::traffic::{Traffic, assert_none_lost};
use plat_e2e::wait::holds;
use plat_e2e::wait_until;
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(60);

fn cluster() -> &'static Cluster {
    static CLUSTER: LazyLock<Cluster> = LazyLock::new(|| Cluster::with_plat(3, &["--set", "holdSeconds=20"]));
    &CLUSTER
}

/// A pod on n1 and one on n2; the same ones for every test.
fn pair() -> &'static [Pod] {
    static PAIR: LazyLock<Vec<Pod>> = LazyLock::new(|| cluster().run_pair(DEADLINE).unwrap());
    &PAIR
}

fn traffic() -> [Traffic; 2] {
    Traffic::both_ways(cluster(), &pair()[0], &pair()[1]).unwrap()
}

/// Runs a fresh pod on a node, to prove that new pods work, and returns its address.
fn run_new_pod(name: &str, node: u8) {
    let pod = cluster().run_pods(&[PodSpec { name, node, host_network: false }], DEADLINE).unwrap();
    assert!(!pod[0].ips.is_empty());
}

fn agent(node: u8) -> SocketAddr {
    (node_ip(node), AGENT_PORT).into()
}

/// What happens to a node, and how one sees that it is as it was.
struct Damage {
    what: &'static str,
    /// Shell line that does it.
    doing: String,
    /// Shell line that succeeds once it is repaired.
    repaired: String,
    /// Reason of the incident that the agent reports, and of the operator's Event.
    reason: &'static str,
    /// Label of the agent's metric.
    kind: &'static str,
}

#[test]
fn damage_to_a_node_is_repaired_at_once_and_reported() {
    let cluster = cluster();
    let other = block_of(cluster, 2).unwrap();
    let traffic = traffic();
    let mut lost_before = 0;
    for damage in [
        Damage {
            what: "a route of ours is deleted",
            doing: format!("ip route del {other} proto 112"),
            repaired: format!("ip route show proto 112 | grep -q '^{other} via '"),
            reason: "RouteRestored",
            kind: "kind=\"route\"",
        },
        Damage {
            what: "all nftables rules are flushed",
            doing: "nft flush ruleset".into(),
            repaired: "nft list table inet plat | grep -q masquerade".into(),
            reason: "NftRestored",
            kind: "kind=\"nft\"",
        },
        Damage {
            what: "forwarding is switched off",
            doing: "sysctl -q -w net.ipv4.ip_forward=0".into(),
            repaired: "test $(sysctl -n net.ipv4.ip_forward) = 1".into(),
            reason: "SysctlRestored",
            kind: "kind=\"sysctl\"",
        },
        Damage {
            what: "the conflist is deleted",
            doing: "rm /etc/cni/net.d/05-plat.conflist".into(),
            repaired: "test -s /etc/cni/net.d/05-plat.conflist".into(),
            reason: "ConflistRestored",
            kind: "kind=\"conflist\"",
        },
        Damage {
            what: "the CNI binary is deleted",
            doing: "rm /opt/cni/bin/plat".into(),
            repaired: "test -x /opt/cni/bin/plat".into(),
            reason: "PluginRestored",
            kind: "kind=\"plugin\"",
        },
    ] {
        let Damage { what, doing, repaired, reason, kind } = damage;
        // One line, so that the gap is the node's own and not that of starting programs.
        let line = format!(
            "{doing}; begin=$(date +%s%N); for i in $(seq 2000); do if {repaired}; then \
            echo $((($(date +%s%N) - begin) / 1000)); exit; fi; sleep 0.005; done; exit 1"
        );
        let took =
            cluster.on_node(1, &line).unwrap_or_else(|e| panic!("{what}: not repaired within 10 s: {e}"));
        println!("figure: {what}: back after {} us", took.trim());
        wait_until(&format!("{what}: the agent counts it"), DEADLINE, || {
            let count =
                metric(cluster, agent(1), "plat_agent_repairs_total", kind).map_err(|e| e.to_string())?;
            holds(count.is_some_and(|n| n >= 1.0), format!("{count:?}"))
        });
        wait_until(&format!("{what}: an Event says so"), DEADLINE, || {
            let events = events(cluster, reason).map_err(|e| e.to_string())?;
            holds(events.iter().any(|e| e.contains("n1")), format!("{events:?}"))
        });
        run_new_pod("after-damage", 1);
        cluster.delete_pods(&["after-damage"]).unwrap();
    }
    for one in traffic {
        let (way, report) = one.stop().unwrap();
        lost_before += report.lost;
        println!(
            "figure: {way}: {} of {} datagrams lost over five kinds of damage, {} in a row",
            report.lost, report.sent, report.longest_gap
        );
        // Two of the five cut traffic until they are repaired; nobody may notice for longer than that.
        assert!(report.longest_gap < 1000, "{way}: {report:?}");
    }
    println!("figure: {lost_before} datagrams lost in all");
    // kube-proxy does not notice that its own rules were flushed, too.
    cluster.set_proxy(1, ProxyMode::Nftables).unwrap();
    wait_converged(cluster, 3, DEADLINE);
}

/// How long datagrams are counted around each death, in seconds: `PLAT_KILL_SECONDS`, or 15.
fn counted_for() -> Duration {
    let seconds = std::env::var("PLAT_KILL_SECONDS").map_or(15, |text| text.parse().unwrap());
    Duration::from_secs(seconds)
}

#[test]
fn killing_operator_agent_and_api_server_costs_not_one_datagram() {
    let cluster = cluster();
    let kill_on = |node: u8, program: &str| cluster.on_node(node, &format!("kill -9 $(pgrep -x {program})"));
    let victims: [(&str, &dyn Fn()); 4] = [
        ("operators", &|| {
            let killed = (1..=3).filter(|node| kill_on(*node, "plat-operator").is_ok()).count();
            assert!(killed >= 1, "no operator was found");
        }),
        ("the agent of the sender", &|| drop(kill_on(1, "plat-agent").unwrap())),
        ("the agent of the receiver", &|| drop(kill_on(2, "plat-agent").unwrap())),
        ("the API server", &|| cluster.kill("apiserver").unwrap()),
    ];
    for (victim, kill) in victims {
        let begin = Instant::now();
        let traffic = traffic();
        kill();
        if victim == "the API server" {
            // Away for a while, in which an agent restarts from its cache.
            kill_on(1, "plat-agent").unwrap();
            std::thread::sleep(Duration::from_secs(5));
            cluster.start("apiserver").unwrap();
        }
        wait_until(&format!("all has converged after the death of {victim}"), DEADLINE, || {
            converged(cluster, 3)
        });
        std::thread::sleep(counted_for().saturating_sub(begin.elapsed()));
        let sent = assert_none_lost(&format!("death of {victim}"), traffic);
        println!("figure: death of {victim}: none of {sent} datagrams lost in {:?}", begin.elapsed());
        run_new_pod("after-death", 1);
        cluster.delete_pods(&["after-death"]).unwrap();
    }
}

#[test]
fn the_run_folder_is_removed_under_running_pods_and_nothing_is_given_twice() {
    let cluster = cluster();
    let traffic = traffic();
    let before = pod_addresses(cluster, 1).unwrap();
    // Again if the agent was faster and put a file back.
    cluster.on_node(1, "for i in 1 2 3 4 5; do rm -rf /run/plat && exit 0; done; exit 1").unwrap();
    for number in 0..3 {
        run_new_pod(&format!("after-rm{number}"), 1);
    }
    assert!(pod_addresses(cluster, 1).unwrap().len() >= before.len() + 3);
    assert_eq!(doubles(cluster, &[1, 2, 3]).unwrap(), Vec::<String>::new());
    wait_until("the files are back", DEADLINE, || {
        cluster.on_node(1, "test -s /run/plat/blocks.json && test -s /run/plat/leases")
    });
    assert_none_lost("rm -rf /run/plat", traffic);
    wait_converged(cluster, 3, DEADLINE);
    cluster.delete_pods(&["after-rm0", "after-rm1", "after-rm2"]).unwrap();
}

#[test]
fn the_kinds_are_deleted_and_come_back_with_the_same_blocks() {
    let cluster = cluster();
    let before: Vec<_> = (1..=3).map(|node| block_of(cluster, node).unwrap()).collect();
    let routes_before = routes(cluster, 1).unwrap();
    let traffic = traffic();
    let kinds = ["podcidrs.plat.network", "nodenetworks.plat.network"];
    cluster.kubectl(&[&["delete", "crd", "--timeout=20s"], &kinds[..]].concat()).unwrap();
    run_new_pod("without-kind", 1);
    assert_eq!(routes(cluster, 1).unwrap(), routes_before, "no route is withdrawn");
    let crds = std::fs::read_to_string(repository().join("charts/plat/crd/crds.yaml")).unwrap();
    cluster.apply(&crds).unwrap();
    wait_until("every node has its block again", Duration::from_secs(90), || {
        let now: Vec<_> = (1..=3)
            .map(|node| block_of(cluster, node).map_err(|e| format!("{e:#}")))
            .collect::<Result<_, _>>()?;
        holds(now == before, format!("{now:?} instead of {before:?}"))
    });
    wait_converged(cluster, 3, Duration::from_secs(90));
    assert_none_lost("the CRD was deleted", traffic);
    assert_eq!(doubles(cluster, &[1, 2, 3]).unwrap(), Vec::<String>::new());
    cluster.delete_pods(&["without-kind"]).unwrap();
}

/// Waits until exactly the addresses of a node's pods are leased, and nothing else has a link.
fn wait_leases_are_pods(node: u8, deadline: Duration) {
    wait_until(&format!("n{node} leases what its pods have"), deadline, || {
        let pods = pod_ips(cluster(), node).map_err(|e| e.to_string())?;
        let leases = leased(cluster(), node).map_err(|e| e.to_string())?;
        let links = cluster().on_node(node, "ip -o link show type veth | grep -c ': plat' || true");
        let links = links.map_err(|e| e.to_string())?;
        holds(
            pods == leases && links.trim() == pods.len().to_string(),
            format!("pods {pods:?}, leases {leases:?}, links {links}"),
        )
    });
}

#[test]
fn c89_through_kubelet_and_containerd_a_pods_address_is_its_lease_and_goes_with_it() {
    wait_leases_are_pods(2, DEADLINE);
    let before = leased(cluster(), 2).unwrap();
    let pod = cluster().run_pods(&[PodSpec { name: "c89", node: 2, host_network: false }], DEADLINE).unwrap();
    wait_leases_are_pods(2, DEADLINE);
    let address = pod[0].ip();
    assert!(leased(cluster(), 2).unwrap().contains(&address));
    let in_kernel = pod_addresses(cluster(), 2).unwrap();
    assert!(in_kernel.iter().any(|(_, found)| *found == address), "{address}: {in_kernel:?}");
    cluster().delete_pods(&["c89"]).unwrap();
    wait_leases_are_pods(2, DEADLINE);
    assert_eq!(leased(cluster(), 2).unwrap(), before);
    let rules = cluster().on_node(2, "nft list ruleset").unwrap();
    assert!(!rules.split(|c: char| !c.is_ascii_digit() && c != '.').any(|word| word == address.to_string()));
}

#[test]
fn c93_containerd_is_killed_while_pods_start_and_no_address_stays_leased() {
    let cluster = cluster();
    let names: Vec<String> = (0..24).map(|n| format!("c93-{n}")).collect();
    let specs: Vec<_> = names.iter().map(|name| PodSpec { name, node: 3, host_network: false }).collect();
    wait_leases_are_pods(3, DEADLINE);
    let before = leased(cluster, 3).unwrap().len();
    std::thread::scope(|scope| {
        let pods = scope.spawn(|| cluster.run_pods(&specs, Duration::from_secs(180)).unwrap());
        // In the middle: some have their address, others are getting it.
        for kill in 1..=3 {
            wait_until("more pods are on their way", DEADLINE, || {
                let count = leased(cluster, 3).map_err(|e| e.to_string())?.len();
                holds(count >= before + kill, format!("{count} leases"))
            });
            cluster.kill_containerd(3).unwrap();
            let now = leased(cluster, 3).unwrap().len() - before;
            println!("figure: containerd was killed with {now} of {} pods' addresses leased", specs.len());
            cluster.start_containerd(3).unwrap();
        }
        assert_eq!(pods.join().unwrap().len(), specs.len());
    });
    assert_eq!(doubles(cluster, &[1, 2, 3]).unwrap(), Vec::<String>::new());
    let surplus = leased(cluster, 3).unwrap().difference(&pod_ips(cluster, 3).unwrap()).count();
    let begin = Instant::now();
    // What containerd forgot, the agent finds: at two sightings ninety seconds apart.
    wait_leases_are_pods(3, Duration::from_secs(240));
    println!("figure: {surplus} addresses of forgotten pods, all free after {:?}", begin.elapsed());
    cluster.delete_pods(&names.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    wait_leases_are_pods(3, DEADLINE);
}

/// Last by name: it leaves the cluster with a fourth node.
#[test]
fn z_etcd_goes_back_to_before_the_last_node_and_no_block_is_given_twice() {
    let cluster = cluster();
    let traffic = traffic();
    wait_converged(cluster, 3, DEADLINE);
    cluster.snapshot("before-n4").unwrap();
    cluster.add_node(4).unwrap();
    let block = wait_until("n4 has a block", DEADLINE, || block_of(cluster, 4));
    run_new_pod("on-n4", 4);
    wait_until("n1 routes to it", DEADLINE, || has_route(cluster, 1, &block, 4));

    // The more has happened since the snapshot, the longer a watch that goes on from where it was is blind.
    let own = block_of(cluster, 3).unwrap().replace(['.', '/'], "-");
    cluster.block_on(async |client| {
        let api: Api<PodCIDR> = Api::all(client);
        for number in 0..500 {
            let patch = Patch::Merge(json!({"metadata": {"annotations": {"number": number.to_string()}}}));
            api.patch_metadata(&own, &PatchParams::default(), &patch).await.unwrap();
        }
    });

    cluster.restore("before-n4").unwrap();
    // The kubelet of n4 finds no Node object; started again it registers one.
    cluster.stop_kubelet(4).unwrap();
    cluster.start_kubelet(4).unwrap();
    let again = wait_until("n4 has a block", DEADLINE, || block_of(cluster, 4));
    println!("figure: n4 held {block}, after the restore it holds {again}");
    wait_converged(cluster, 4, Duration::from_secs(90));
    let blocks = cluster.get(&["podcidrs"]).unwrap();
    assert_eq!(items(&blocks).map(name).collect::<std::collections::BTreeSet<_>>().len(), 4);
    assert_eq!(doubles(cluster, &[1, 2, 3, 4]).unwrap(), Vec::<String>::new());
    assert_none_lost("etcd was restored", traffic);
}
