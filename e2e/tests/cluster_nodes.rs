//! Nodes come and go, in a range of four blocks: enough to see a range run full and a block come back.

use std::time::{Duration, Instant};

use plat_e2e::cluster::{Cluster, PodSpec, condition, find_condition, name};
use plat_e2e::matrix::Matrix;
use plat_e2e::plat::{block_of, blocks_of, doubles, events, has_route, routes, wait_converged};
use plat_e2e::wait::holds;
use plat_e2e::wait_until;

const DEADLINE: Duration = Duration::from_secs(60);

fn pod<'a>(name: &'a str, node: u8) -> PodSpec<'a> {
    PodSpec { name, node, host_network: false }
}

/// The state of a block; `gone` if there is no such object.
fn state(cluster: &Cluster, block: &str) -> String {
    let object = block.replace(['.', '/'], "-");
    let get = cluster.get(&["podcidr", &object, "--ignore-not-found"]);
    match get {
        Ok(block) => block["spec"]["state"].as_str().unwrap_or("gone").to_owned(),
        // kubectl prints nothing for an object that is not there.
        Err(_) => "gone".to_owned(),
    }
}

#[test]
fn nodes_join_leave_fill_the_range_and_come_back() {
    let cluster =
        Cluster::with_plat(3, &["--set", "clusterCIDRs={10.244.0.0/22}", "--set", "quarantineSeconds=60"]);
    a_fourth_node_joins_and_its_pods_reach_all(&cluster);
    let freed = a_node_whose_kubelet_stopped_is_deleted_and_its_block_is_quarantined(&cluster);
    a_node_that_finds_no_block_is_told_so_and_disturbs_nobody(&cluster);
    a_node_deleted_while_it_runs_loses_its_routes_and_gets_its_block_back(&cluster);
    the_freed_block_is_handed_out_last(&cluster, &freed);
}

fn a_fourth_node_joins_and_its_pods_reach_all(cluster: &Cluster) {
    cluster.add_node(4).unwrap();
    let block = wait_until("n4 has a block", DEADLINE, || block_of(cluster, 4));
    let seen = Instant::now();
    for node in 1..=3 {
        wait_until("every agent routes to the new block", Duration::from_secs(10), || {
            has_route(cluster, node, &block, 4)
        });
    }
    println!(
        "figure: all agents routed to the block of a new node within {:?} of its object being seen",
        seen.elapsed()
    );
    cluster.wait_nodes_ready(DEADLINE);
    wait_converged(cluster, 4, DEADLINE);
    let pods = [pod("a1", 1), pod("a2", 2), pod("a3", 3), pod("a4", 4)];
    let pods = cluster.run_pods(&pods, DEADLINE).unwrap();
    Matrix::new(cluster, &pods, &[]).unwrap().wait_all_right("with a fourth node", DEADLINE);
}

fn a_node_whose_kubelet_stopped_is_deleted_and_its_block_is_quarantined(cluster: &Cluster) -> String {
    let block = block_of(cluster, 4).unwrap();
    cluster.remove_node(4).unwrap();
    cluster.kubectl(&["delete", "node", "n4"]).unwrap();
    wait_withdrawn(cluster, &block, &[1, 2, 3]);
    block
}

/// Waits until a block is Quarantined and no node routes to it.
fn wait_withdrawn(cluster: &Cluster, block: &str, nodes: &[u8]) {
    wait_until("the block is quarantined", DEADLINE, || {
        let state = state(cluster, block);
        holds(state == "Quarantined", state)
    });
    for node in nodes {
        wait_until("its routes are gone", DEADLINE, || {
            let routes = routes(cluster, *node).map_err(|e| e.to_string())?;
            holds(!routes.iter().any(|r| r.starts_with(block)), format!("n{node}: {routes:?}"))
        });
    }
}

fn a_node_that_finds_no_block_is_told_so_and_disturbs_nobody(cluster: &Cluster) {
    cluster.add_node(5).unwrap();
    // The range may have been full, and that told, before.
    wait_until("n5 is registered", DEADLINE, || {
        cluster.get(&["node", "n5"]).map(drop).map_err(|e| e.to_string())
    });
    wait_until("the range is exhausted", DEADLINE, || {
        let range = cluster.get(&["clustercidr", "default-v4"]).map_err(|e| e.to_string())?;
        holds(
            condition(&range, "Exhausted") == Some("True"),
            format!("{:?}", find_condition(&range, "Exhausted")),
        )
    });
    wait_until("an Event says so", DEADLINE, || {
        let events = events(cluster, "RangeExhausted").map_err(|e| e.to_string())?;
        holds(!events.is_empty(), "no Event")
    });
    assert_eq!(blocks_of(cluster, 5).unwrap().len(), 0);
    let node = cluster.get(&["node", "n5"]).unwrap();
    assert_eq!(condition(&node, "Ready"), Some("False"));
    cluster.run_pods(&[pod("more", 1)], DEADLINE).unwrap();
}

fn a_node_deleted_while_it_runs_loses_its_routes_and_gets_its_block_back(cluster: &Cluster) {
    let block = block_of(cluster, 3).unwrap();
    cluster.kubectl(&["delete", "node", "n3"]).unwrap();
    wait_withdrawn(cluster, &block, &[1, 2]);
    // A kubelet registers its node when it starts.
    cluster.stop_kubelet(3).unwrap();
    cluster.start_kubelet(3).unwrap();
    wait_until("n3 has its block again", DEADLINE, || {
        let blocks = blocks_of(cluster, 3).map_err(|e| e.to_string())?;
        let active: Vec<_> = blocks.iter().filter(|b| b["spec"]["state"] == "Active").map(name).collect();
        holds(active == [block.replace(['.', '/'], "-")], format!("{active:?}"))
    });
    for node in [1, 2] {
        wait_until("the routes are back", DEADLINE, || has_route(cluster, node, &block, 3));
    }
    cluster.run_pods(&[pod("back", 3)], DEADLINE).unwrap();
}

fn the_freed_block_is_handed_out_last(cluster: &Cluster, freed: &str) {
    wait_until("the node that waited has a block", Duration::from_secs(150), || block_of(cluster, 5));
    assert_eq!(block_of(cluster, 5).unwrap(), freed, "the only block that was not held");
    cluster.wait_nodes_ready(DEADLINE);
    wait_converged(cluster, 4, DEADLINE);
    let pods = cluster.run_pods(&[pod("a1", 1), pod("a5", 5)], DEADLINE).unwrap();
    Matrix::new(cluster, &pods, &[]).unwrap().wait_all_right("from the node that waited", DEADLINE);
    assert_eq!(doubles(cluster, &[1, 2, 3, 5]).unwrap(), Vec::<String>::new());
}
