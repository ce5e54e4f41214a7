//! A node among many: how long it takes to program it from nothing, and to put one route back.
//!
//! Prints what it measures; what must hold is asserted without a clock. `PLAT_TEST_NODES` is the number of nodes.

use std::time::{Duration, Instant};

use plat_agent::fabric::Devices;
use plat_agent::facts::{BlockFact, RangeFact};
use plat_agent::kernel::route;
use plat_cni::netlink::{Protocol, Socket};
use plat_crds::block::Block;

use crate::harness::*;

const REPAIRS: usize = 40;

fn nodes() -> u16 {
    std::env::var("PLAT_TEST_NODES").ok().and_then(|n| n.parse().ok()).unwrap_or(300)
}

/// The block of node `number`, from 10.224.0.0/11; the nodes share 172.16.0.0/12.
fn far_block(number: u16) -> BlockFact {
    let [high, low] = number.to_be_bytes();
    let cidr: Block = format!("10.{}.{low}.0/24", 224 + high).parse().unwrap();
    BlockFact {
        name: cidr.object_name(),
        uid: format!("uid-{cidr}"),
        created: i64::from(number),
        block: cidr,
        range: "wide".to_owned(),
        node: format!("n{number}"),
        addresses: vec![[172, 16, 1 + high, low].into()],
        ..block(1)
    }
}

fn wide_range() -> RangeFact {
    RangeFact { name: "wide".to_owned(), range: "10.224.0.0/11".parse().unwrap(), ..range("default-v4") }
}

#[test]
fn among_many_nodes_each_lost_route_is_back() {
    isolated("scale::among_many_nodes_each_lost_route_is_back", || {
        let mut node = TestNode::new();
        run("ip addr add 172.16.1.1/12 dev eth0");
        node.start();
        node.contact();
        let blocks: Vec<BlockFact> = (1..=nodes()).map(far_block).collect();
        let keys: Vec<Block> = blocks.iter().skip(1).map(|block| block.block).collect();
        let mut socket = Socket::open(Protocol::Route).unwrap();
        let begin = Instant::now();
        node.list(blocks, vec![wide_range()]);
        let last = *keys.last().unwrap();
        let prefix = |socket: &mut Socket, block: Block| {
            route::matching(socket, block.gateway()).unwrap().map(|(prefix, _)| prefix)
        };
        eventually("the last route", || match prefix(&mut socket, last) {
            Some(found) if found == last.net() => Ok(()),
            other => Err(format!("{other:?}")),
        });
        eprintln!("cold start with {} routes: {:?}", keys.len(), begin.elapsed());
        node.expect_condition("CNIReady", "True", "Installed");
        node.settled();
        node.settled();
        let all = route::dump(&mut socket, Devices::default()).unwrap();
        let mut took = Vec::new();
        for at in 0..REPAIRS {
            let block = keys[at * 7919 % keys.len()];
            let key = all.keys().find(|key| key.prefix == block).unwrap();
            let begin = Instant::now();
            assert!(route::delete(&mut socket, key).unwrap());
            while prefix(&mut socket, block) != Some(block.net()) {
                assert!(begin.elapsed() < DEADLINE, "{block} did not come back");
                std::thread::sleep(Duration::from_micros(200));
            }
            took.push(begin.elapsed());
            std::thread::sleep(Duration::from_millis(70 + at as u64 * 13 % 60));
        }
        took.sort();
        eprintln!("repair: median {:?}, worst {:?}", took[took.len() / 2], took.last().unwrap());
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        eprintln!(
            "{}",
            status.lines().filter(|l| l.starts_with("VmRSS") || l.starts_with("VmHWM")).collect::<String>()
        );
        node.expect_incident("RouteRestored", i64::try_from(REPAIRS).unwrap());
        assert_eq!(route::dump(&mut socket, Devices::default()).unwrap().len(), all.len());
    });
}
