//! Bad input on a living cluster: each gets its named error, condition or Event, and every other node and pod
//! goes on.

use std::sync::LazyLock;
use std::time::Duration;

use plat_e2e::cluster::{Cluster, Pod, PodSpec, find_condition};
use plat_e2e::light::create_node_with;
use plat_e2e::plat::{block_of, blocks_of, doubles, events, wait_converged};
use plat_e2e::testbed::feed;
use plat_e2e::traffic::{Traffic, assert_none_lost};
use plat_e2e::wait::holds;
use plat_e2e::wait_until;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(60);

fn cluster() -> &'static Cluster {
    static CLUSTER: LazyLock<Cluster> = LazyLock::new(|| Cluster::with_plat(2, &[]));
    &CLUSTER
}

fn pair() -> &'static [Pod] {
    static PAIR: LazyLock<Vec<Pod>> = LazyLock::new(|| cluster().run_pair(DEADLINE).unwrap());
    &PAIR
}

/// Runs `bad` while datagrams go both ways, and proves that nobody else noticed.
fn while_others_go_on(what: &str, bad: impl FnOnce()) {
    let traffic = Traffic::both_ways(cluster(), &pair()[0], &pair()[1]).unwrap();
    bad();
    assert_none_lost(what, traffic);
    assert_eq!(doubles(cluster(), &[1, 2]).unwrap(), Vec::<String>::new());
}

/// Waits until a ClusterCIDR is not Ready because of something that it overlaps.
fn wait_overlapping(name: &str, reason: &str, words: &str) {
    wait_until(&format!("{name} is Overlapping"), DEADLINE, || {
        let range = cluster().get(&["clustercidr", name]).map_err(|e| e.to_string())?;
        let overlap = find_condition(&range, "Overlapping").cloned().unwrap_or_default();
        let ready = find_condition(&range, "Ready").cloned().unwrap_or_default();
        let said = overlap["message"].as_str().unwrap_or_default().contains(words);
        let named = overlap["reason"] == reason && ready["reason"] == reason && said;
        holds(
            overlap["status"] == "True" && ready["status"] == "False" && named,
            format!("{overlap} {ready}"),
        )
    });
}

#[test]
fn ranges_that_overlap_are_refused_by_name_and_carve_nothing() {
    while_others_go_on("overlapping ranges", || {
        let older = "shares addresses with the older ClusterCIDR default-v4 (10.244.0.0/16)";
        for (name, cidr, reason, words) in [
            ("overlaps-older", "10.244.128.0/17", "OverlapsClusterCIDR", older),
            ("holds-everything", "10.0.0.0/8", "OverlapsClusterCIDR", older),
            ("holds-the-api-server", "172.16.0.0/12", "OverlapsAPIServer", "172.16.0.0/12 holds 172.30.0."),
        ] {
            let range = json!({"apiVersion": "plat.network/v1alpha1", "kind": "ClusterCIDR", "metadata": {"name": name},
                "spec": {"cidr": cidr, "priority": 100}});
            cluster().apply(&range.to_string()).unwrap();
            wait_overlapping(name, reason, words);
        }
        cluster()
            .kubectl(&[
                "delete",
                "clustercidr",
                "overlaps-older",
                "holds-everything",
                "holds-the-api-server",
                "--timeout=30s",
            ])
            .unwrap();
    });
    wait_converged(cluster(), 2, DEADLINE);
}

#[test]
fn nodes_that_cannot_be_served_are_named_and_the_others_go_on() {
    let cluster = cluster();
    let taken = block_of(cluster, 1).unwrap();
    while_others_go_on("strange nodes", || {
        for (name, addresses, pod_cidr, reason) in [
            ("no-address", &[][..], None, "NodeHasNoAddress"),
            ("foreign", &["172.30.0.51"], Some("192.168.5.0/24"), "ForeignPodCIDR"),
            ("taken", &["172.30.0.52"], Some(taken.as_str()), "PodCIDRTaken"),
        ] {
            cluster
                .block_on(async |client| create_node_with(&client, name, addresses, pod_cidr).await)
                .unwrap();
            wait_until(&format!("an Event names {name}"), DEADLINE, || {
                let events = events(cluster, reason).map_err(|e| e.to_string())?;
                holds(events.iter().any(|e| e.contains(name)), format!("{events:?}"))
            });
        }
        cluster.kubectl(&["delete", "node", "no-address", "foreign", "taken"]).unwrap();
    });
}

/// Calls the installed CNI binary on a node as a runtime would; its answer.
fn cni(node: u8, environment: &str, stdin: &str) -> Result<String, Value> {
    let mut command = cluster().node_command(node, "sh");
    command.args(["-c", &format!("cat >/tmp/stdin; env {environment} /opt/cni/bin/plat </tmp/stdin 2>/tmp/err && exit; cat /tmp/err >&2; exit 1")]);
    feed(&mut command, stdin).map_err(|e| {
        let text = e.to_string();
        let json = &text[text.find('{').unwrap_or(0)..];
        serde_json::from_str(json)
            .unwrap_or_else(|_| panic!("no error result but: {}", &text[..text.len().min(500)]))
    })
}

#[test]
fn the_cni_binary_answers_nonsense_with_a_named_error() {
    let add =
        "CNI_COMMAND=ADD CNI_CONTAINERID=bad CNI_NETNS=/run/netns/none CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin";
    let conf =
        json!({"cniVersion": "1.0.0", "name": "plat", "type": "plat", "ipam": {"type": "plat"}}).to_string();
    let huge = format!("{}{}", conf, " ".repeat(10 << 20));
    while_others_go_on("CNI nonsense", || {
        // Codes of the CNI specification: 1 incompatible version, 4 environment, 6 decoding, 7 configuration.
        for (what, environment, stdin, codes) in [
            ("nothing", add, "", &[6][..]),
            ("half", add, &conf[..conf.len() / 2], &[6]),
            ("a list", add, "[1, 2]", &[6, 7]),
            ("a wrong type", add, r#"{"cniVersion": "1.0.0", "name": 5, "type": "plat"}"#, &[6, 7]),
            ("ten megabytes", add, &huge, &[6, 7]),
            ("an unknown version", add, r#"{"cniVersion": "9.9.9", "name": "plat", "type": "plat"}"#, &[1]),
            ("no container ID", "CNI_COMMAND=ADD CNI_NETNS=/x CNI_IFNAME=eth0", &conf, &[4]),
            ("an unknown verb", "CNI_COMMAND=DANCE", &conf, &[4]),
        ] {
            let error = cni(1, environment, stdin).expect_err(what);
            let code = error["code"].as_u64().unwrap();
            assert!(codes.contains(&code), "{what}: {error}");
            assert!(error["msg"].as_str().is_some_and(|m| m.len() > 10), "{what}: {error}");
        }
    });
}

#[test]
fn a_corrupt_lease_file_costs_no_address_and_no_pod() {
    let cluster = cluster();
    while_others_go_on("a corrupt lease file", || {
        for garbage in ["printf garbage", "head -c 100000 /dev/urandom", "true"] {
            cluster.on_node(1, &format!("{garbage} >/run/plat/leases")).unwrap();
            let pods = cluster
                .run_pods(&[PodSpec { name: "corrupt", node: 1, host_network: false }], DEADLINE)
                .unwrap();
            assert_ne!(pods[0].ip(), pair()[0].ip(), "after {garbage}");
            cluster.delete_pods(&["corrupt"]).unwrap();
        }
    });
    wait_converged(cluster, 2, DEADLINE);
}

#[test]
fn a_run_folder_that_cannot_be_written_is_named_and_heals() {
    let cluster = cluster();
    let add = "CNI_COMMAND=ADD CNI_CONTAINERID=unwritten CNI_NETNS=/run/netns/unwritten CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin";
    let status = "CNI_COMMAND=STATUS CNI_PATH=/opt/cni/bin";
    let conf =
        json!({"cniVersion": "1.1.0", "name": "plat", "type": "plat", "ipam": {"type": "plat"}}).to_string();
    cluster.on_node(2, "ip netns add unwritten").unwrap();
    let links = cluster.on_node(2, "ip -br link | awk '{print $1}'").unwrap();
    while_others_go_on("a run folder that cannot be written", || {
        for (what, cover) in [
            ("read-only", "mount --bind /run/plat /run/plat && mount -o remount,bind,ro /run/plat"),
            (
                "full",
                "cp -r /run/plat /tmp/kept && mount -t tmpfs -o size=16k tmpfs /run/plat && \
                 cp /tmp/kept/blocks.json /run/plat/ && { dd if=/dev/zero of=/run/plat/fill bs=1k count=64 2>/dev/null; true; }",
            ),
        ] {
            cluster.on_node(2, cover).unwrap();
            let error = cni(2, add, &conf).expect_err(what);
            assert!(error.to_string().contains("/run/plat"), "{what}: {error}");
            if what == "read-only" {
                let error = cni(2, status, &conf).expect_err(what);
                assert_eq!(error["code"], 50, "{what}: {error}");
            }
            cluster.on_node(2, "umount /run/plat; rm -rf /tmp/kept").unwrap();
            cni(2, status, &conf).unwrap();
            assert_eq!(
                cluster.on_node(2, "ip -br link | awk '{print $1}'").unwrap(),
                links,
                "{what}: no half pod is left"
            );
        }
        cluster.run_pods(&[PodSpec { name: "healed", node: 2, host_network: false }], DEADLINE).unwrap();
        cluster.delete_pods(&["healed"]).unwrap();
    });
    assert_eq!(blocks_of(cluster, 2).unwrap().len(), 1);
    cluster.on_node(2, "ip netns del unwritten").unwrap();
    wait_converged(cluster, 2, DEADLINE);
}
