//! A node that comes back after its block was given to another.

use plat_agent::facts::BlockFact;
use plat_crds::lease::Datapath;

use crate::harness::*;
use crate::routed::{expect_reach, node, pod, reaches};

/// The host, as its pods know it.
const HOST: &str = "10.244.1.1";

/// Block 1 as the other node has it: another object of the same name.
fn of_n9() -> BlockFact {
    BlockFact {
        uid: "another".into(),
        created: 999,
        node: "n9".into(),
        addresses: vec![ip("172.30.0.19")],
        ..block(1)
    }
}

fn expect_link(link: &str, up: bool) {
    eventually(link, || {
        let flags = json(&format!("ip -j link show {link}"))[0]["flags"].to_string();
        if flags.contains("\"UP\"") == up { Ok(()) } else { Err(flags) }
    });
}

fn cut_off_while_anothers(datapath: Datapath) {
    let mut node = node(datapath);
    pod(3, datapath);
    run(&format!("rm -f {}", node.settings.run_dir.join("leases").display()));
    node.settled();
    expect_reach(3, &[HOST]);

    // The node cannot know while it is cut off; then it learns all at once.
    node.apply(of_n9());
    let message = node.expect_condition("Overlapping", "True", "PodsCutOff");
    assert!(message.contains("1 pods") && message.contains("10.244.1.3"), "{message}");
    assert!(message.contains("container c3") && message.contains("node n9 holds"), "{message}");
    let message = node.expect_incident("PodsCutOff", 1);
    assert!(message.contains("delete these pods"), "{message}");
    expect_link("plat3", false);
    assert!(!reaches(3, HOST), "nothing is sent from an address that is another pod's");
    // What is meant for that pod leaves to its node, also from here.
    eventually("the way to the new holder", || {
        let route = run("ip route get 10.244.1.3");
        if route.contains("via 172.30.0.19") { Ok(()) } else { Err(route) }
    });
    // Once is enough, and another life of the agent takes it for what it is.
    node.settled();
    assert_eq!(node.expect_incident("PodsCutOff", 1).matches("was taken down").count(), 1);
    assert_eq!(node.report().status.incidents.iter().find(|i| i.reason == "PodsCutOff").unwrap().count, 1);
    node.stop();
    node.start();
    node.contact();
    node.list(vec![of_n9(), block_v6(1)], vec![range("default-v4"), range("default-v6")]);
    node.expect_condition("Overlapping", "True", "PodsCutOff");

    // The block is this node's again, before the pod has ended.
    node.apply(BlockFact { uid: "third".into(), created: 9999, ..block(1) });
    node.expect_condition("Overlapping", "False", "Disjoint");
    expect_link("plat3", true);
    expect_reach(3, &[HOST]);

    // And if that happens between two lives of the agent of which the second knows nothing of the first.
    node.apply(BlockFact { created: 99999, ..of_n9() });
    expect_link("plat3", false);
    node.stop();
    run(&format!("rm {}", node.file("plat/map.json").display()));
    node.start();
    node.contact();
    node.list(vec![block_v6(1)], vec![range("default-v4"), range("default-v6")]);
    node.settled();
    expect_link("plat3", false);
    node.apply(BlockFact { uid: "fourth".into(), created: 999_999, ..block(1) });
    expect_link("plat3", true);
    expect_reach(3, &[HOST]);
}

#[test]
fn pods_on_the_bridge_whose_addresses_are_anothers_are_off_the_network() {
    isolated("doubled::pods_on_the_bridge_whose_addresses_are_anothers_are_off_the_network", || {
        cut_off_while_anothers(Datapath::Bridge);
    });
}

#[test]
fn routed_pods_whose_addresses_are_anothers_are_off_the_network() {
    isolated("doubled::routed_pods_whose_addresses_are_anothers_are_off_the_network", || {
        cut_off_while_anothers(Datapath::Routed);
    });
}

#[test]
fn pods_beside_another_nodes_small_block_stay_on_the_network() {
    isolated("doubled::pods_beside_another_nodes_small_block_stay_on_the_network", || {
        let of = |cidr: &str, whose: BlockFact| {
            let block: plat_crds::Block = cidr.parse().unwrap();
            BlockFact { name: block.object_name(), block, ..whose }
        };
        let mut node = node(Datapath::Bridge);
        pod(3, Datapath::Bridge);
        // Another network's, in the same block.
        run("ip netns add old");
        run("ip link add veth0 type veth peer name eth0 netns old");
        run("ip link set veth0 master cni0 up");
        run("ip -n old link set eth0 up");
        run("ip -n old addr add 10.244.1.5/24 dev eth0");
        run(&format!("rm -f {}", node.settings.run_dir.join("leases").display()));
        let older = BlockFact { created: 0, ..of_n9() };
        node.list(
            vec![of("10.244.1.0/26", block(1)), of("10.244.1.64/26", older), block_v6(1)],
            vec![range("default-v4"), range("default-v6")],
        );
        eventually("the way to the neighbour", || {
            let route = run("ip route show 10.244.1.64/26");
            if route.contains("via 172.30.0.19") { Ok(()) } else { Err(route) }
        });
        node.settled();
        node.expect_condition("Overlapping", "False", "Disjoint");
        expect_link("plat3", true);
        expect_reach(3, &[HOST]);
    });
}
