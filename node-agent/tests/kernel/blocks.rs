//! A node with several blocks of a family, of one range and of several: as they come, drain, are released and go.

use std::collections::BTreeSet;

use plat_agent::facts::{BlockFact, RangeFact};
use plat_crds::block::{Block, Family};
use plat_crds::blocks_file::BlocksFile;
use plat_crds::lease::{Datapath, HostVeth, Lease, LeasedAddress, Pool};
use plat_crds::pod_cidr::BlockState;

use crate::harness::*;

/// The lease store.
const LEASES: &str = "plat/leases";

/// Another block of this node, from that range.
fn another(cidr: &str, range: &str) -> BlockFact {
    let block: Block = cidr.parse().unwrap();
    BlockFact {
        name: block.object_name(),
        uid: format!("uid-{cidr}"),
        created: 9,
        block,
        range: range.into(),
        ..block_v6(1)
    }
}

fn in_state(block: &BlockFact, state: BlockState) -> BlockFact {
    BlockFact { state, generation: block.generation + 1, ..block.clone() }
}

fn extra_ranges() -> Vec<RangeFact> {
    let extra = |name: &str, cidr: &str| RangeFact {
        range: cidr.parse().unwrap(),
        exclude: vec!["192.168.0.0/16".parse().unwrap()],
        ..RangeFact { name: name.into(), uid: name.into(), ..range("default-v4") }
    };
    vec![
        range("default-v4"),
        range("default-v6"),
        extra("extra-v4", "10.9.0.0/16"),
        extra("extra-v6", "fd00:9::/48"),
    ]
}

/// A node whose FORWARD chains drop, with a block of each family.
fn node(datapath: Datapath) -> TestNode {
    let mut node = TestNode::new();
    for tables in ["iptables", "ip6tables"] {
        run(&format!("{tables} -P FORWARD DROP"));
    }
    node.settings.me.datapath = datapath;
    node.start();
    node.contact();
    node.list(vec![block(1), block_v6(1), block(2)], extra_ranges());
    node.expect_condition("CNIReady", "True", "Installed");
    node.settled();
    node
}

/// All of the node that speaks of a block: routes, gateways, masquerade, accept rules; with how often.
fn traces(block: &Block) -> Vec<(&'static str, usize)> {
    let text = block.to_string();
    let gateway = format!("{}/{}", block.gateway(), block.family().bits());
    let (v4, tables) = match block.family() {
        Family::IPv4 => ("-4", "iptables"),
        Family::IPv6 => ("-6", "ip6tables"),
    };
    let lines = |output: String, what: &str| {
        output.lines().filter(|line| line.split(' ').any(|word| word == what)).count()
    };
    vec![
        ("routes", lines(run(&format!("ip -o {v4} route show table all proto 112")), &text)),
        ("gateways", lines(run(&format!("ip -o {v4} addr show")), &gateway)),
        ("masquerade", masqueraded(&text)),
        ("accept rules", lines(run(&format!("{tables} -S FORWARD")), &text)),
    ]
}

fn masqueraded(block: &str) -> usize {
    let table = run("nft list table inet plat");
    let source = format!("saddr {block} ");
    table.lines().filter(|rule| rule.contains(&source) && rule.contains("masquerade")).count()
}

fn expect_traces(block: &Block, datapath: Datapath, there: bool) {
    let routes = if datapath == Datapath::Bridge { 2 } else { 1 };
    let expected = match there {
        true => vec![("routes", routes), ("gateways", 1), ("masquerade", 1), ("accept rules", 2)],
        false => vec![("routes", 0), ("gateways", 0), ("masquerade", 0), ("accept rules", 0)],
    };
    eventually(&format!("what there is of {block}"), || {
        let traces = traces(block);
        if traces == expected { Ok(()) } else { Err(format!("{traces:?}, not {expected:?}")) }
    });
}

fn blocks_file(node: &TestNode) -> BlocksFile {
    BlocksFile::parse(&std::fs::read(node.file("plat/blocks.json")).unwrap()).unwrap()
}

/// Waits until the CNI binary leases from exactly these blocks and knows exactly these.
fn expect_granted(node: &TestNode, leased: &[&Block], known: &[&Block]) {
    let expected = |blocks: &[&Block]| blocks.iter().map(|b| **b).collect::<BTreeSet<Block>>();
    eventually("the blocks file", || {
        let file = blocks_file(node);
        let of = |all: bool| file.blocks.iter().filter(|b| b.lease || all).map(|b| b.cidr).collect();
        let now: (BTreeSet<Block>, BTreeSet<Block>) = (of(false), of(true));
        if now == (expected(leased), expected(known)) { Ok(()) } else { Err(format!("{now:?}")) }
    });
}

/// Waits until the node reports so many leases of that block; `None`: that it cannot tell.
fn expect_used(node: &TestNode, block: &Block, used: Option<i64>) {
    eventually("the count", || {
        let held = node.report().status.held_blocks;
        let found = held.iter().find(|held| held.cidr == block.to_string()).map(|held| held.used);
        if found == Some(used) { Ok(()) } else { Err(format!("{held:?}")) }
    });
}

/// Leases of so many addresses of a block, as ADDs make them that have no link yet.
fn leases(block: &Block, datapath: Datapath, hosts: std::ops::Range<u32>) -> Vec<Lease> {
    let lease = |host: u32| Lease {
        container_id: format!("{}-{host}", block.object_name()),
        ifname: "eth0".into(),
        network: Some("plat".into()),
        pool: Pool::Blocks,
        addresses: vec![LeasedAddress {
            address: block.host(host).unwrap(),
            subnet_length: block.prefix_length(),
            masquerade: false,
        }],
        veth: HostVeth { name: format!("plat{host}"), index: 900 + host },
        datapath,
        since: plat_cni::boot::since_now(),
        ..Lease::default()
    };
    hosts.map(lease).collect()
}

fn insert(node: &TestNode, leases: &[Lease]) {
    with_store(&node.file(LEASES), |store| {
        for lease in leases {
            let survey = store.survey(&lease.container_id, &lease.ifname).unwrap();
            store.insert(&survey, lease).unwrap();
        }
    });
}

fn end(node: &TestNode, leases: &[Lease]) {
    with_store(&node.file(LEASES), |store| {
        for lease in leases {
            let held = store.find(&lease.container_id, &lease.ifname).unwrap().unwrap();
            store.remove(held.slot).unwrap();
        }
    });
}

fn a_block_comes_drains_and_goes_with_all_that_belongs_to_it(datapath: Datapath) {
    let mut node = node(datapath);
    let (first, first_v6) = (block(1).block, block_v6(1).block);
    for own in [&first, &first_v6] {
        expect_traces(own, datapath, true);
    }
    let same_range = another("10.244.77.0/24", "default-v4");
    for second in [another("10.9.1.0/26", "extra-v4"), another("fd00:9:0:1::/112", "extra-v6"), same_range] {
        node.apply(second.clone());
        expect_traces(&second.block, datapath, true);
        expect_granted(&node, &[&first, &first_v6, &second.block], &[&first, &first_v6, &second.block]);
        node.expect_condition("CNIReady", "True", "Installed");

        let draining = in_state(&second, BlockState::Draining);
        node.apply(draining.clone());
        expect_granted(&node, &[&first, &first_v6], &[&first, &first_v6, &second.block]);
        expect_used(&node, &second.block, Some(0));
        expect_traces(&second.block, datapath, true);

        // One that has no pods goes with its release, not with its object.
        let released = in_state(&draining, BlockState::Quarantined);
        node.apply(released.clone());
        expect_granted(&node, &[&first, &first_v6], &[&first, &first_v6]);
        expect_traces(&second.block, datapath, false);
        node.delete(&released);
        node.settled();
        for own in [&first, &first_v6] {
            expect_traces(own, datapath, true);
        }
        let repaired = node.report().status.incidents;
        assert_eq!(repaired, [], "nothing of it was taken for somebody's damage");
    }
}

#[test]
fn a_block_comes_drains_and_goes_with_all_that_belongs_to_it_bridge() {
    isolated("blocks::a_block_comes_drains_and_goes_with_all_that_belongs_to_it_bridge", || {
        a_block_comes_drains_and_goes_with_all_that_belongs_to_it(Datapath::Bridge);
    });
}

#[test]
fn a_block_comes_drains_and_goes_with_all_that_belongs_to_it_routed() {
    isolated("blocks::a_block_comes_drains_and_goes_with_all_that_belongs_to_it_routed", || {
        a_block_comes_drains_and_goes_with_all_that_belongs_to_it(Datapath::Routed);
    });
}

fn a_released_block_stays_under_its_last_lease(datapath: Datapath) {
    let mut node = node(datapath);
    let second = another("10.244.77.0/24", "default-v4");
    node.apply(second.clone());
    expect_traces(&second.block, datapath, true);
    let pod = leases(&second.block, datapath, 7..8);
    insert(&node, &pod);
    // Whatever is done to the object: released at once, and deleted by hand.
    let released = in_state(&second, BlockState::Quarantined);
    node.apply(released.clone());
    expect_granted(
        &node,
        &[&block(1).block, &block_v6(1).block],
        &[&block(1).block, &block_v6(1).block, &second.block],
    );
    expect_used(&node, &second.block, Some(1));
    node.settled();
    expect_traces(&second.block, datapath, true);
    node.delete(&released);
    node.settled();
    expect_traces(&second.block, datapath, true);
    expect_used(&node, &second.block, Some(1));
    end(&node, &pod);
    expect_traces(&second.block, datapath, false);
    expect_granted(&node, &[&block(1).block, &block_v6(1).block], &[&block(1).block, &block_v6(1).block]);
}

#[test]
fn a_released_block_stays_under_its_last_lease_bridge() {
    isolated("blocks::a_released_block_stays_under_its_last_lease_bridge", || {
        a_released_block_stays_under_its_last_lease(Datapath::Bridge);
    });
}

#[test]
fn a_released_block_stays_under_its_last_lease_routed() {
    isolated("blocks::a_released_block_stays_under_its_last_lease_routed", || {
        a_released_block_stays_under_its_last_lease(Datapath::Routed);
    });
}

#[test]
fn a_block_that_drains_is_empty_only_once_no_add_can_lease_from_it_any_more() {
    isolated("blocks::a_block_that_drains_is_empty_only_once_no_add_can_lease_from_it_any_more", || {
        let mut node = node(Datapath::Bridge);
        let second = another("10.244.77.0/24", "default-v4");
        node.apply(second.clone());
        expect_used(&node, &second.block, Some(0));
        // An ADD holds the lock, and has read the blocks file already.
        let pod = leases(&second.block, Datapath::Bridge, 7..8);
        with_store(&node.file(LEASES), |store| {
            node.apply(in_state(&second, BlockState::Draining));
            expect_granted(
                &node,
                &[&block(1).block, &block_v6(1).block],
                &[&block(1).block, &block_v6(1).block, &second.block],
            );
            expect_used(&node, &second.block, None);
            let survey = store.survey(&pod[0].container_id, &pod[0].ifname).unwrap();
            store.insert(&survey, &pod[0]).unwrap();
        });
        expect_used(&node, &second.block, Some(1));
        end(&node, &pod);
        expect_used(&node, &second.block, Some(0));
    });
}

#[test]
fn a_node_that_fills_up_asks_for_a_block_before_it_is_full() {
    isolated("blocks::a_node_that_fills_up_asks_for_a_block_before_it_is_full", || {
        let mut node = node(Datapath::Bridge);
        let own = block(1).block;
        assert_eq!(blocks_file(&node).may_grow, Family::ALL);
        // Nothing but the lease store tells of these: no link, no nftables.
        insert(&node, &leases(&own, Datapath::Bridge, 2..205));
        expect_used(&node, &own, Some(203));
        assert_eq!(node.report().wants, None);
        insert(&node, &leases(&own, Datapath::Bridge, 205..206));
        let wants = eventually("the want", || node.report().wants.ok_or("none".to_owned()));
        assert_eq!(wants, "IPv4 beside 10.244.1.0/24");
        expect_used(&node, &own, Some(204));
        let second = another("10.244.77.0/24", "default-v4");
        node.apply(second.clone());
        eventually("no want", || node.report().wants.map_or(Ok(()), Err));
        // A range that gives out no more is nothing to wait for.
        for (name, max_blocks) in [("default-v4", 2), ("extra-v4", 0)] {
            let range = extra_ranges().into_iter().find(|range| range.name == name).unwrap();
            node.apply_range(RangeFact { max_blocks, generation: 2, ..range });
        }
        eventually("the blocks file", || match blocks_file(&node).may_grow.as_slice() {
            [Family::IPv6] => Ok(()),
            other => Err(format!("{other:?}")),
        });
    });
}

#[test]
fn the_mtu_of_pods_follows_while_blocks_come_and_go() {
    isolated("blocks::the_mtu_of_pods_follows_while_blocks_come_and_go", || {
        let mut node = node(Datapath::Bridge);
        let expect_mtu = |node: &TestNode, mtu: u32| {
            eventually("the MTU", || {
                let bridge = run("ip -o link show cni0");
                let told = blocks_file(node).mtu;
                let fits = told == Some(mtu) && bridge.contains(&format!(" mtu {mtu} "));
                if fits { Ok(()) } else { Err(format!("{told:?} {bridge}")) }
            });
        };
        expect_mtu(&node, 1500);
        let second = another("10.9.1.0/26", "extra-v4");
        node.apply(second.clone());
        run("ip link set eth0 mtu 1400");
        expect_mtu(&node, 1400);
        node.apply(in_state(&second, BlockState::Quarantined));
        expect_traces(&second.block, Datapath::Bridge, false);
        expect_mtu(&node, 1400);
        run("ip link set eth0 mtu 1500");
        expect_mtu(&node, 1500);
    });
}
