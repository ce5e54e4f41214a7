//! A node that fills up: real operator, agent and CNI binary beside a real API server, and more pods than a block
//! has addresses.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use plat_crds::Block;
use plat_e2e::bare::{BareNode, operator};
use plat_e2e::bare_pods::{Pods, first_address};
use plat_e2e::cluster::items;
use plat_e2e::light::ControlPlane;
use plat_e2e::wait::holds;
use plat_e2e::wait_until;

const DEADLINE: Duration = Duration::from_secs(120);

/// How many pods, and the length of blocks: 600 and 24 with `PLAT_GROWTH_PODS=600 PLAT_GROWTH_PREFIX=24`, or 150 on
/// blocks of 61 addresses.
fn size() -> (usize, u8) {
    let number =
        |name: &str, default: usize| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    (number("PLAT_GROWTH_PODS", 150), u8::try_from(number("PLAT_GROWTH_PREFIX", 26)).unwrap())
}

/// The node's blocks in that state.
fn blocks(plane: &ControlPlane, state: &str) -> Result<Vec<Block>, String> {
    let list = plane.get(&["podcidrs"]).map_err(|e| format!("{e:#}"))?;
    let of_state = items(&list).filter(|block| block["spec"]["state"] == state);
    Ok(of_state.map(|block| block["spec"]["cidr"].as_str().unwrap().parse().unwrap()).collect())
}

#[test]
fn more_pods_than_a_block_holds_start_at_once_on_one_node_and_surplus_blocks_go_back() {
    let (count, prefix) = size();
    let plane = ControlPlane::up().unwrap();
    plane.install_crds().unwrap();
    plane
        .apply(&format!(
            "{{apiVersion: plat.network/v1alpha1, kind: ClusterCIDR, metadata: {{name: pods}}, \
             spec: {{cidr: 10.244.0.0/16, blockPrefixLength: {prefix}}}}}"
        ))
        .unwrap();
    let _operator = operator(&plane, "operator", &["--surplus-seconds=3"]).unwrap();
    let node = BareNode::up(&plane, 1).unwrap();
    node.register().unwrap();
    let _agent = node.agent().unwrap();
    wait_until("the node is ready for pods", DEADLINE, || {
        let conflist = node.folder().join("conf/05-plat.conflist");
        holds(conflist.exists(), "no conflist")
    });
    let first = blocks(&plane, "Active").unwrap();
    assert_eq!(first.len(), 1);

    let pods = Pods::on(&node).unwrap();
    let names: Vec<String> = (0..count).map(|n| format!("p{n}")).collect();
    pods.make(&names).unwrap();
    let begin = Instant::now();
    let answers = pods.call_all("ADD", &names).unwrap();
    println!("figure: {count} pods, blocks of /{prefix}: all ADDs took {:?}, none failed", begin.elapsed());
    let given: BTreeSet<IpAddr> = answers.iter().map(|answer| first_address(answer).unwrap()).collect();
    assert_eq!(given.len(), count, "an address was given twice");
    let held = blocks(&plane, "Active").unwrap();
    let capacity = usize::try_from(first[0].capacity()).unwrap();
    let needed = count.div_ceil(capacity);
    assert!((needed..=needed + 1).contains(&held.len()), "{needed} are needed: {held:?}");
    assert!(given.iter().all(|address| held.iter().any(|block| block.contains(address))));

    // A pod of each block reaches one of each other.
    let sample: Vec<(&String, IpAddr)> = held
        .iter()
        .filter_map(|block| {
            let of_block = |answer: &String| block.contains(&first_address(answer).unwrap());
            let at = answers.iter().position(of_block)?;
            Some((&names[at], first_address(&answers[at]).unwrap()))
        })
        .collect();
    assert!(sample.len() >= needed);
    for (from, own) in &sample {
        // The loopback of these namespaces is down, so nobody reaches himself.
        for (_, to) in sample.iter().filter(|(_, to)| to != own) {
            wait_until("pods of all blocks reach each other", DEADLINE, || {
                let mut ping = pods.inside(from, "busybox");
                plat_e2e::testbed::output(ping.args(["ping", "-c1", "-W1", &to.to_string()]))
            });
        }
    }

    let begin = Instant::now();
    pods.call_all("DEL", &names).unwrap();
    println!("figure: all DELs took {:?}", begin.elapsed());
    wait_until("the surplus blocks are given back, and the first one stays", DEADLINE, || {
        let (active, draining) = (blocks(&plane, "Active")?, blocks(&plane, "Draining")?);
        holds(active == first && draining.is_empty(), format!("{active:?}, draining {draining:?}"))
    });
    println!("figure: surplus blocks were given back after {:?}", begin.elapsed());
    wait_until("nothing of them is left in the kernel", DEADLINE, || {
        let routes = node
            .ip(&["-4", "route", "show", "table", "all", "proto", "112"])
            .map_err(|e| format!("{e:#}"))?;
        let left = held.iter().filter(|block| **block != first[0] && routes.contains(&block.to_string()));
        holds(left.count() == 0, routes)
    });
    assert!(names.iter().take(1).all(|pod| pods.call("ADD", pod).is_ok()), "and the node goes on");
}
