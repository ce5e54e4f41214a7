//! Nodes that fill up and empty, ranges that drain, blocks that are asked to move: nobody's pod loses its address,
//! and it comes to rest.
//!
//! Agents here are real in what matters: each knows the objects as of its last look, leases from what is `Active` by
//! that, and reports what it knew and what is leased in one report, which may arrive late.

use super::*;

/// /26 blocks: 61 pods each.
const RANGES: [(&str, &str, i64, i32); 4] = [
    ("four", "10.244.0.0/23", 26, 5),
    ("more", "10.9.0.0/20", 26, 0),
    ("six", "fd00:1::/119", 124, 5),
    ("six-more", "fd00:2::/112", 120, 0),
];
const NODES: u64 = 5;
/// Between what a test does last and the end of all changes.
const SETTLES_IN: usize = 120;

#[derive(Default)]
struct Agent {
    /// The node's own blocks, as of its last look.
    view: BTreeMap<Block, BlockState>,
    digest: Digest,
    /// Pods that should run.
    wanted: i64,
    /// Pods that found no free address.
    refused: usize,
}

struct Town {
    cluster: Cluster,
    agents: BTreeMap<String, Agent>,
}

impl Town {
    fn new(seed: u64) -> Town {
        let mut cluster = Cluster::new(seed, "10.244.0.0/16", Mishap::Growth);
        cluster.settings.default_ranges.clear();
        cluster.settings.surplus_after = Duration::from_secs(60);
        for (name, cidr, length, priority) in RANGES {
            let spec = json!({"cidr": cidr, "blockPrefixLength": length, "quarantineSeconds": QUARANTINE, "priority": priority,
                "blocksPerNode": {"min": 1, "max": 6}});
            let range = json!({"metadata": {"name": name}, "spec": spec});
            cluster.etcd.borrow_mut().create(Kind::ClusterCIDR, range).unwrap();
        }
        Town { cluster, agents: BTreeMap::new() }
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.cluster.dice.roll(sides)
    }

    fn join(&mut self, name: &str) {
        if self.cluster.live_nodes.contains(name) {
            return;
        }
        self.cluster.add_node(name);
        let agent = self.agents.entry(name.to_owned()).or_default();
        agent.wanted = 30;
    }

    /// A node goes, and its pods with it.
    fn leave(&mut self, name: &str) {
        self.cluster.delete_node(name);
        self.agents.remove(name);
        let mut etcd = self.cluster.etcd.borrow_mut();
        etcd.leases.retain(|_, (node, _)| node != name);
    }

    /// Its Node object goes and comes back, and its pods go on: every block must come back to it.
    fn register_again(&mut self, name: &str) {
        if self.cluster.live_nodes.contains(name) {
            self.cluster.delete_node(name);
            self.cluster.add_node(name);
        }
    }

    /// The agent looks at the objects and does what they say.
    fn look(&mut self, name: &str) {
        let etcd = self.cluster.etcd.borrow();
        let Some(agent) = self.agents.get_mut(name) else { return };
        let own = etcd.blocks().into_iter().filter(|b| *b.node == *name && !b.is_quarantined());
        agent.view = own.map(|b| (b.block, b.state)).collect();
        agent.digest = etcd.digest();
    }

    /// Pods start and end until there are as many as there should be.
    fn run_pods(&mut self, name: &str) {
        let mut etcd = self.cluster.etcd.borrow_mut();
        let Some(agent) = self.agents.get_mut(name) else { return };
        let leasable = etcd.leasable(name);
        for family in plat_crds::Family::ALL {
            let used = |etcd: &Etcd| -> i64 {
                let mine = etcd.leases.iter().filter(|(b, (n, _))| n == name && b.family() == family);
                mine.map(|(_, (_, used))| used).sum()
            };
            while used(&etcd) > agent.wanted {
                let newest =
                    etcd.leases.iter_mut().filter(|(b, (n, u))| n == name && b.family() == family && *u > 0);
                newest.last().unwrap().1.1 -= 1;
            }
            while used(&etcd) < agent.wanted {
                let free = agent.view.iter().find(|(block, state)| {
                    let used = etcd.leases.get(*block).map_or(0, |(_, used)| *used);
                    block.family() == family
                        && **state == BlockState::Active
                        && used < i64::from(block.capacity())
                });
                let Some((block, _)) = free else {
                    agent.refused += usize::from(family == plat_crds::Family::IPv4);
                    break;
                };
                assert!(leasable.contains(block), "{name} leases from {block}, which it has given back");
                etcd.leases.entry(*block).or_insert((name.to_owned(), 0)).1 += 1;
            }
        }
    }

    /// A pod ends and another one begins: so a draining block empties.
    fn replace_a_pod(&mut self, name: &str) {
        let draining = |agent: &Agent, block: &Block| agent.view.get(block) != Some(&BlockState::Active);
        let Some(agent) = self.agents.get(name) else { return };
        let mut etcd = self.cluster.etcd.borrow_mut();
        let mut mine: Vec<_> = etcd.leases.iter_mut().filter(|(_, (n, u))| n == name && *u > 0).collect();
        mine.sort_by_key(|(block, _)| !draining(agent, block));
        for (_, (_, used)) in mine.into_iter().take(2) {
            *used -= (*used).min(10);
        }
    }

    fn report(&mut self, name: &str) {
        let Some(agent) = self.agents.get(name) else { return };
        let mut etcd = self.cluster.etcd.borrow_mut();
        let leased =
            etcd.leases.iter().filter(|(_, (n, used))| n == name && *used > 0).map(|(block, _)| *block);
        let held: BTreeSet<Block> = agent.view.keys().copied().chain(leased).collect();
        let used = |block: &Block| etcd.leases.get(block).map_or(0, |(_, used)| *used);
        let held: Vec<_> = held
            .iter()
            .map(|block| json!({"cidr": block, "used": used(block), "capacity": block.capacity()}))
            .collect();
        let applied = json!({"count": 1, "digest": agent.digest.to_string()});
        let status = json!({"reportedAt": etcd.wall(), "heldBlocks": held, "applied": applied});
        let patch = Patch::MergeStatus(json!({"metadata": {}, "status": status}));
        let _not_there_yet = etcd.patch(Kind::NodeNetwork, name, patch);
    }

    /// Somebody asks for a block to move, or not any more.
    fn annotate(&mut self, drain: bool) {
        let blocks = self.cluster.etcd.borrow().blocks();
        if blocks.is_empty() {
            return;
        }
        let pick = usize::try_from(self.roll(blocks.len() as u64)).unwrap();
        self.ask(&blocks[pick], drain);
    }

    fn ask(&mut self, block: &BlockFact, drain: bool) {
        let value = if drain { json!("") } else { json!(null) };
        let patch = json!({"metadata": {"annotations": {"plat.network/drain": value}}});
        let mut etcd = self.cluster.etcd.borrow_mut();
        etcd.patch(Kind::PodCIDR, &block.name, Patch::Merge(patch)).unwrap();
        self.cluster.trace.push(format!("t={} {} drain: {drain}", etcd.second, block.name));
    }

    fn allocate_from(&mut self, range: &str, allocation: &str) {
        let patch = Patch::Merge(json!({"metadata": {}, "spec": {"allocation": allocation}}));
        self.cluster.etcd.borrow_mut().patch(Kind::ClusterCIDR, range, patch).unwrap();
        self.cluster.trace.push(format!("range {range} is {allocation}"));
    }

    fn random_step(&mut self) {
        let name = format!("n{}", self.roll(NODES));
        match self.roll(60) {
            0..=1 => self.join(&name),
            2 if self.roll(6) == 0 => self.leave(&name),
            3 if self.roll(4) == 0 => self.register_again(&name),
            4..=6 => {
                let wanted = i64::try_from(self.roll(200)).unwrap();
                if let Some(agent) = self.agents.get_mut(&name) {
                    agent.wanted = wanted;
                }
            }
            7..=10 => self.run_pods(&name),
            11..=13 => self.replace_a_pod(&name),
            14..=19 => self.look(&name),
            20..=25 => self.report(&name),
            26 if self.roll(3) == 0 => self.annotate(true),
            27 if self.roll(3) == 0 => self.annotate(false),
            28 if self.roll(6) == 0 => {
                let (range, ..) = RANGES[usize::try_from(self.roll(4)).unwrap()];
                let allocation = if self.roll(2) == 0 { "Enabled" } else { "Draining" };
                self.allocate_from(range, allocation);
            }
            29..=34 => {
                let seconds = 1 + self.roll(4);
                self.cluster.pass_time(seconds);
            }
            35 if self.roll(6) == 0 => self.cluster.crash(),
            36 if self.roll(6) == 0 => self.cluster.pause(),
            37..=38 => self.cluster.elect(),
            39..=47 => self.cluster.deliver_events(),
            _ => self.cluster.work_somewhere(),
        }
    }

    /// The states of all blocks.
    fn map(&self) -> BTreeMap<Block, (String, BlockState)> {
        let blocks = self.cluster.etcd.borrow().blocks();
        blocks.into_iter().map(|b| (b.block, (b.node.to_string(), b.state))).collect()
    }

    /// Nobody does anything any more, and pods come and go as before. It must come to rest: every pod has an
    /// address, and no block changes its state again and again.
    fn settle(&mut self) {
        self.cluster.etcd.borrow_mut().faults = 0;
        for (range, ..) in RANGES {
            let allocation = if range.ends_with("more") { "Enabled" } else { "Draining" };
            self.allocate_from(range, allocation);
        }
        let old = |block: &BlockFact| !block.range.ends_with("more");
        let moving: Vec<_> = self.cluster.etcd.borrow().blocks().into_iter().filter(old).collect();
        for block in &moving {
            self.ask(block, true);
        }
        let mut changes: BTreeMap<Block, usize> = BTreeMap::new();
        let mut last = self.map();
        let mut quiet = 0;
        for _ in 0..SETTLES_IN {
            self.cluster.pass_time(4);
            self.cluster.elect();
            for name in self.cluster.live_nodes.clone() {
                self.look(&name);
                self.replace_a_pod(&name);
                self.run_pods(&name);
                self.report(&name);
            }
            for number in self.cluster.processes.keys().copied().collect::<Vec<_>>() {
                self.cluster.work_undisturbed(number);
            }
            let now = self.map();
            quiet = if now == last { quiet + 1 } else { 0 };
            for (block, state) in &now {
                *changes.entry(*block).or_default() += usize::from(last.get(block) != Some(state));
            }
            last = now;
        }
        assert!(quiet >= 20, "still changing: {last:?}");
        for (block, changes) in changes {
            assert!(changes <= 5, "{block} changed {changes} times");
        }
        self.check_settled(&last);
    }

    fn check_settled(&mut self, map: &BTreeMap<Block, (String, BlockState)>) {
        for name in self.cluster.live_nodes.clone() {
            let agent = &self.agents[&name];
            let etcd = self.cluster.etcd.borrow();
            for family in plat_crds::Family::ALL {
                let mine = map.iter().filter(|(block, (node, _))| *node == name && block.family() == family);
                let states: Vec<_> = mine.collect();
                assert!(states.iter().all(|(_, (_, state))| *state == BlockState::Active), "{states:?}");
                let used = |block: &Block| etcd.leases.get(block).map_or(0, |(_, used)| *used);
                let leased: i64 = states.iter().map(|(block, _)| used(block)).sum();
                assert_eq!(leased, agent.wanted, "{name} {family}: every pod has an address in {states:?}");
                let empty = states.iter().filter(|(block, _)| used(block) == 0).count();
                assert!(empty <= 1, "{name} keeps what it does not need: {states:?}");
            }
        }
        let gone = |node: &String| !self.cluster.live_nodes.contains(node);
        assert!(!map.values().any(|(node, _)| gone(node)), "blocks of nodes that are gone: {map:?}");
    }
}

impl Etcd {
    /// The blocks that a node's pods may get addresses of: its own, unless they rest. (One of a Node that has come
    /// back as another object comes back to it.)
    fn leasable(&self, node: &str) -> BTreeSet<Block> {
        let uid = self.uid_of(node);
        let own = self.blocks().into_iter().filter(|fact| *fact.node == *node);
        own.filter(|fact| !fact.is_quarantined() || fact.node_uid != uid).map(|fact| fact.block).collect()
    }

    fn digest(&self) -> Digest {
        let objects = self.of_kind(Kind::PodCIDR).chain(self.of_kind(Kind::ClusterCIDR));
        Digest::of(objects.map(|v| {
            let meta = &v["metadata"];
            (meta["uid"].as_str().unwrap_or_default(), meta["generation"].as_i64().unwrap_or_default())
        }))
    }
}

/// Prints what happened before a failure.
struct TownStory<'a>(&'a RefCell<Town>, u64);

impl Drop for TownStory<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {}", self.1);
            if let Ok(town) = self.0.try_borrow() {
                town.cluster.trace.iter().rev().take(80).rev().for_each(|line| eprintln!("  {line}"));
            }
        }
    }
}

fn run(seed: u64) -> usize {
    let town = RefCell::new(Town::new(seed));
    let _story = TownStory(&town, seed);
    for _ in 0..2500 {
        town.borrow_mut().random_step();
    }
    town.borrow_mut().settle();
    let town = town.borrow();
    let etcd = town.cluster.etcd.borrow();
    etcd.drained
}

#[test]
fn nodes_grow_and_shrink_and_move_and_no_pod_loses_its_address() {
    let seeds = seeds(300_001, 6);
    let count = seeds.end - seeds.start;
    let drained: usize = seeds.map(run).sum();
    assert!(drained as u64 > 5 * count, "the simulation must do something: {drained} blocks were given back");
}
