//! Random sequences against a model, with the real kernel: pods come and go, calls are killed at any step or
//! run in pairs, the store is lost or damaged, namespaces go without a DEL, the agent sweeps.
//!
//! `PLAT_SEED` replays a run, `PLAT_CHURN_SECONDS` says how long to go on (default: a few seconds).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant, SystemTime};

use lab::{Answer, Plat, address, blocks, cluster_conf, netns, sh, with};
use plat_cni::boot::BootId;
use plat_cni::kernel::HostKernel;
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::store::{Missing, Store};
use plat_cni::sweep::Sweeper;
use serde_json::{Value, json};

const PODS: usize = 24;

/// A generator of numbers that follow from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).unwrap()
    }
}

/// What the runtime knows of a container.
#[derive(Clone, Debug, PartialEq)]
enum Pod {
    /// No namespace, or an empty one.
    Out,
    /// Connected, with that address.
    In(String),
    /// Its last call failed or was killed: a DEL is due.
    Unclear,
}

struct Node {
    random: Random,
    conf: Value,
    pods: Vec<Pod>,
    sweeper: Sweeper,
    clock: u64,
}

impl Node {
    fn new(seed: u64) -> Node {
        blocks(&["10.244.3.0/26"]);
        (0..PODS).for_each(|n| drop(netns(&id(n))));
        let kernel = HostKernel::new(Socket::open(Protocol::Route).unwrap());
        let store = Store::at("/run/plat/leases".as_ref());
        Node {
            random: Random(seed),
            conf: with(cluster_conf(), json!({"ipMasq": true, "gcGraceSeconds": 0})),
            pods: vec![Pod::Out; PODS],
            sweeper: Sweeper::new(store, BootId::read().unwrap(), Missing::Create, Box::new(kernel)),
            clock: 1_000_000,
        }
    }

    fn call(&self, verb: &str, pod: usize) -> Plat {
        Plat::call(verb, &id(pod), &self.conf)
    }

    fn next_verb(&self, pod: usize) -> &'static str {
        if self.pods[pod] == Pod::Out { "ADD" } else { "DEL" }
    }

    fn settle(&mut self, pod: usize, verb: &str, answer: &Answer) {
        self.pods[pod] = match (verb, answer.success) {
            ("ADD", true) => Pod::In(address(&answer.json())),
            ("DEL", true) => Pod::Out,
            _ => Pod::Unclear,
        };
    }

    /// Several calls at the same time, each about another pod.
    fn several(&mut self) {
        let count = 2 + self.random.below(8);
        let chosen: BTreeSet<usize> = (0..count).map(|_| self.random.below(PODS)).collect();
        let calls: Vec<_> = chosen
            .into_iter()
            .map(|pod| (pod, self.next_verb(pod), self.call(self.next_verb(pod), pod).start()))
            .collect();
        for (pod, verb, call) in calls {
            let answer = Answer::of(call.wait_with_output().unwrap());
            assert!(answer.success || self.pods[pod] == Pod::Unclear, "{verb} {pod}: {answer:?}");
            self.settle(pod, verb, &answer);
        }
    }

    /// A call that is killed, or fails, at some step.
    fn fault(&mut self) {
        let pod = self.random.below(PODS);
        let verb = self.next_verb(pod);
        let how = ["kill", "error"][self.random.below(2)];
        let step = 1 + self.random.below(30);
        let answer = self.call(verb, pod).set("PLAT_FAIL", &format!("#{step}:{how}")).run();
        self.settle(pod, verb, &answer);
    }

    /// A namespace goes, and no DEL comes.
    fn vanish(&mut self) {
        let pod = self.random.below(PODS);
        let before = lab::host_links().len();
        let had_link = matches!(self.pods[pod], Pod::In(_));
        sh(&format!("ip netns del {}", id(pod)));
        if had_link {
            lab::eventually("its link goes", || lab::host_links().len() < before);
        }
        self.sweep_twice();
        netns(&id(pod));
        self.pods[pod] = match &self.pods[pod] {
            Pod::In(_) => Pod::Out,
            // The link may go later than the sweep.
            other => other.clone(),
        };
    }

    fn sweep_twice(&mut self) {
        for _ in 0..2 {
            self.clock += 90_000;
            self.sweeper.sweep_at(self.clock, Duration::from_secs(5)).unwrap();
        }
    }

    /// The runtime lists what it knows; the rest goes.
    fn collect(&mut self) {
        let known = (0..PODS).filter(|n| matches!(self.pods[*n], Pod::In(_)));
        let list: Vec<Value> = known.map(|n| json!({"containerID": id(n), "ifname": "eth0"})).collect();
        let input = with(self.conf.clone(), json!({"cni.dev/valid-attachments": list}));
        Plat::bare("GC").set("CNI_PATH", "/nowhere").input(&input).run().silent();
    }

    fn spoil(&mut self) {
        let path = "/run/plat/leases";
        match self.random.below(4) {
            0 => drop(fs::remove_file(path)),
            1 => fs::write(path, "garbage").unwrap(),
            2 => {
                let file = fs::read("/run/plat/blocks.json").unwrap();
                fs::remove_dir_all("/run/plat").unwrap();
                fs::create_dir("/run/plat").unwrap();
                fs::write("/run/plat/blocks.json", file).unwrap();
            }
            _ => {
                use std::os::unix::fs::FileExt;
                let Ok(file) = fs::File::options().write(true).open(path) else { return };
                let slot = u32::try_from(self.random.below(PODS)).unwrap();
                file.write_all_at(&[0x5a], plat_crds::lease::record_offset(slot) + 7).unwrap();
            }
        }
    }

    /// Every pod that is in has its own address, in the store and on its interface; what is out has none.
    fn check(&mut self) {
        // Makes a store that is missing, as the agent does.
        self.sweeper.sweep_at(self.clock, Duration::from_secs(5)).unwrap();
        let mut held: BTreeMap<String, String> = BTreeMap::new();
        for lease in lab::leases() {
            let address = lease["addresses"][0]["address"].as_str().unwrap_or("-").to_owned();
            held.insert(lease["containerID"].as_str().unwrap().to_owned(), address);
        }
        let mut seen = BTreeSet::new();
        for (n, pod) in self.pods.iter().enumerate() {
            match pod {
                Pod::In(address) => {
                    assert_eq!(held.get(&id(n)), Some(address), "{} in the store", id(n));
                    assert!(seen.insert(address.clone()), "{address} twice");
                }
                Pod::Out => assert_eq!(held.get(&id(n)), None, "{} is out", id(n)),
                Pod::Unclear => {}
            }
        }
    }

    /// Ends what is unclear; then store, links and rules are those of the pods that are in, and no more.
    fn come_to_rest(&mut self) {
        for pod in 0..PODS {
            if self.pods[pod] == Pod::Unclear {
                self.call("DEL", pod).run().silent();
                self.pods[pod] = Pod::Out;
            }
        }
        self.check();
        let live = self.pods.iter().filter(|pod| **pod != Pod::Out).count();
        assert_eq!(
            (lab::leases().len(), lab::host_links().len(), lab::masqueraded().len()),
            (live, live, live)
        );
    }

    fn step(&mut self) {
        let kind = self.random.below(20);
        println!("{kind}: {:?}", self.pods);
        match kind {
            0..=9 => self.several(),
            10..=14 => self.fault(),
            15 => self.vanish(),
            16 => self.sweep_twice(),
            17 => self.collect(),
            18 => self.spoil(),
            _ => self.come_to_rest(),
        }
    }
}

fn id(number: usize) -> String {
    format!("c{number}")
}

#[test]
fn after_any_churn_the_store_is_what_lives() {
    lab::enter();
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    let seed = number("PLAT_SEED").unwrap_or(u64::try_from(now & 0xffff_ffff).unwrap());
    let length = Duration::from_secs(number("PLAT_CHURN_SECONDS").unwrap_or(5));
    println!("replay with PLAT_SEED={seed}");
    let (mut node, start, mut steps) = (Node::new(seed), Instant::now(), 0);
    while start.elapsed() < length || steps < 20 {
        node.step();
        node.check();
        steps += 1;
    }
    node.come_to_rest();
    println!("{steps} steps in {} s", start.elapsed().as_secs());
}
