//! A node on which another network ran: its bridge, pods, files and routes are there when the agent comes.

use std::process::Command;

use crate::harness::*;

const OLD: [&str; 2] = ["10.244.1.5", "fd00:10:244:1::5"];

/// What the reference's bridge and host-local leave for a pod, in the shape of flannel: `cni0` with the subnet's
/// first address, which never was given a hardware address of its own.
fn another_network() {
    run("mount -t tmpfs tmpfs /var/lib");
    run("ip link add cni0 type bridge");
    run("ip link set cni0 up");
    run("ip addr add 10.244.1.1/24 dev cni0");
    run("ip addr add fd00:10:244:1::1/64 dev cni0 nodad");
    run("ip netns add old");
    run("ip link add veth0a1b2c3d address f2:00:00:00:00:07 type veth peer name eth0 netns old");
    run("ip link set veth0a1b2c3d master cni0 up");
    run("ip -n old link set eth0 up");
    for (address, length, gateway) in [(OLD[0], 24, "10.244.1.1"), (OLD[1], 64, "fd00:10:244:1::1")] {
        run(&format!("ip -n old addr add {address}/{length} dev eth0 nodad"));
        run(&format!("ip -n old route add default via {gateway}"));
        std::fs::create_dir_all("/var/lib/cni/networks/cbr0").unwrap();
        std::fs::write(format!("/var/lib/cni/networks/cbr0/{address}"), "c0ffee\r\neth0").unwrap();
    }
    wait_for_pod();
}

/// Whether somebody at that address refuses a connection: then both ways are open.
fn answers(from: &str, address: &str) -> bool {
    let script = format!(": </dev/tcp/{address}/9");
    let mut command = Command::new("ip");
    let asked = match from {
        "" => Command::new("timeout").args(["2", "bash", "-c", &script]).output(),
        netns => command.args(["netns", "exec", netns, "timeout", "2", "bash", "-c", &script]).output(),
    };
    String::from_utf8_lossy(&asked.unwrap().stderr).contains("refused")
}

fn is_reached() -> bool {
    OLD.iter().all(|address| answers("", address))
        && ["10.244.1.1", "fd00:10:244:1::1"].iter().all(|gateway| answers("old", gateway))
}

fn wait_for_pod() {
    eventually("the old pod and its gateway reach each other", || {
        if is_reached() { Ok(()) } else { Err("no".into()) }
    });
}

fn bridge_mac() -> String {
    json("ip -j link show cni0")[0]["address"].as_str().unwrap().to_owned()
}

#[test]
fn a_bridge_with_pods_of_another_network_is_taken_over_under_them() {
    isolated("takeover::a_bridge_with_pods_of_another_network_is_taken_over_under_them", || {
        let mut node = TestNode::new();
        another_network();
        let mac = bridge_mac();
        std::fs::create_dir_all(node.file("net.d")).unwrap();
        std::fs::write(node.file("net.d/10-flannel.conflist"), "{}").unwrap();
        node.start();
        node.contact();
        node.list(vec![block(1), block_v6(1)], vec![range("default-v4"), range("default-v6")]);
        node.expect_condition("RoutesReady", "True", "AllInstalled");
        node.expect_condition("CNIReady", "True", "Installed");
        node.settled();
        assert!(is_reached(), "the pod is cut off");
        let status = node.report().status;
        let used: Vec<_> = status.held_blocks.iter().map(|held| (held.cidr.as_str(), held.used)).collect();
        assert_eq!(used, [("10.244.1.0/24", Some(1)), ("fd00:10:244:1::/64", Some(1))]);
        let cni = status.cni.unwrap();
        assert_eq!(
            (cni.active.as_deref(), cni.others),
            (Some("05-plat.conflist"), vec!["10-flannel.conflist".into()])
        );
        assert_eq!(cni.foreign_pods, Some(1));
        let repaired: Vec<_> = status.incidents.iter().filter(|i| i.reason.ends_with("Restored")).collect();
        assert!(repaired.is_empty(), "what was there is nothing to repair: {repaired:?}");
        let addresses = run("ip -o addr show dev cni0");
        for address in ["10.244.1.1/24", "10.244.1.1/32", "fd00:10:244:1::1/64"] {
            assert!(addresses.contains(&format!(" {address} ")), "{address}: {addresses}");
        }
        // A port with a lower address: an unfixed bridge would take it, and the pod's gateway be gone.
        run("ip link add plat00000000 address 02:00:00:00:00:01 type veth peer name new0");
        run("ip link set plat00000000 master cni0 up");
        assert_eq!(bridge_mac(), mac);
        assert!(is_reached());
    });
}

#[test]
fn pods_without_a_block_make_their_node_hold_it() {
    isolated("takeover::pods_without_a_block_make_their_node_hold_it", || {
        let mut node = TestNode::new();
        another_network();
        node.start();
        node.contact();
        node.list(vec![], vec![range("default-v4")]);
        eventually("the pod's block is reported as held", || {
            let held = node.report().status.held_blocks;
            let held: Vec<_> = held.iter().map(|held| (held.cidr.as_str(), held.used)).collect();
            if held == [("10.244.1.0/24", Some(1))] { Ok(()) } else { Err(format!("{held:?}")) }
        });
        assert!(is_reached());
    });
}

#[test]
fn dockers_containers_make_their_node_hold_nothing() {
    isolated("takeover::dockers_containers_make_their_node_hold_nothing", || {
        let mut node = TestNode::new();
        run("mount -t tmpfs tmpfs /var/lib");
        run("ip link add docker0 type bridge");
        run("ip link set docker0 up");
        run("ip addr add 10.244.77.1/24 dev docker0");
        run("ip netns add container");
        run("ip link add veth1 type veth peer name eth0 netns container");
        run("ip link set veth1 master docker0 up");
        run("ip -n container link set eth0 up");
        run("ip -n container addr add 10.244.77.2/24 dev eth0");
        node.start();
        node.contact();
        node.list(vec![block(1)], vec![range("default-v4")]);
        node.expect_condition("RoutesReady", "True", "HostRoute");
        node.expect_condition("CNIReady", "True", "Installed");
        node.settled();
        let held: Vec<String> = node.report().status.held_blocks.into_iter().map(|held| held.cidr).collect();
        assert_eq!(held, ["10.244.1.0/24"]);
        assert_eq!(run("ip route show table all 10.244.77.0/24 proto 112"), "");
        assert!(!run("ip -o addr show").contains("10.244.77.1/32"));
    });
}

#[test]
fn a_route_of_another_network_that_goes_before_ours_is_named_if_it_leads_elsewhere() {
    isolated(
        "takeover::a_route_of_another_network_that_goes_before_ours_is_named_if_it_leads_elsewhere",
        || {
            let mut node = TestNode::new();
            // As flanneld's host-gw backend leaves them: one right, one of a node that has moved.
            run("ip route add 10.244.2.0/24 via 172.30.0.12 proto boot");
            run("ip route add 10.244.3.0/24 via 172.30.0.99 proto boot");
            node.start();
            node.contact();
            node.list(vec![block(1), block(2), block(3)], vec![range("default-v4")]);
            let message = node.expect_condition("RoutesReady", "True", "Overridden");
            assert!(
                message.contains("10.244.3.0/24 via 172.30.0.99 metric 0 before 10.244.3.0/24"),
                "{message}"
            );
            assert!(run("ip route show 10.244.3.0/24").contains("172.30.0.99"), "never touched");
            run("ip route del 10.244.3.0/24 via 172.30.0.99");
            node.stop();
            node.start();
            node.contact();
            node.expect_condition("RoutesReady", "True", "AllInstalled");
        },
    );
}
