//! Worlds for tests, in English: `world().node("n1").range("default-v4", "10.244.0.0/16").block(…)`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use plat_crds::cluster_cidr::{Allocation, BlockSizing, BlocksPerNode, ClusterCIDRStatus};
use plat_crds::condition::{self, READY, Verdict};
use plat_crds::digest::Digest;
use plat_crds::pod_cidr::BlockState;
use plat_crds::{Block, names};

use crate::facts::{
    BlockFact, Fact, Health, Held, Lost, NodeFact, PodCidrText, PolicyFact, RangeFact, ReportFact,
};
use crate::leader::World;
use crate::memory::Memory;
use crate::plan::source::follow;
use crate::plan::{Plan, plan};
use crate::snapshot::{
    Clock, DefaultRange, Facts, Foreign, IpamSource, Settings, Snapshot, Source, Start, Tenure,
};
use crate::step::{NewBlock, Origin, Step};
use plat_crds::selector::{Labels, Selector};

pub const NOW: i64 = 1_800_000_000;

pub fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

pub fn block(text: &str) -> Block {
    text.parse().unwrap()
}

/// The address of a node of that name: no two that tests have are equal.
pub fn address_of(node: &str) -> IpAddr {
    let [third, fourth] =
        node.bytes().fold(0u16, |hash, b| hash.wrapping_mul(31).wrapping_add(b.into())).to_be_bytes();
    Ipv4Addr::new(172, 30, third, fourth).into()
}

pub fn node(name: &str) -> NodeFact {
    NodeFact {
        name: name.into(),
        uid: format!("uid-{name}").as_str().into(),
        created: at(NOW - 1000),
        labels: Labels::default(),
        health: Health::Ready,
        addresses: [address_of(name)].into(),
        pod_cidrs: [].into(),
        pod_cidrs_by: None,
        network_unavailable: false,
        uninitialized: false,
        max_pods: Some(110),
        problem: None,
    }
}

pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    Labels::pack(Some(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()))
}

pub fn spec(texts: &[&str]) -> Box<[PodCidrText]> {
    texts.iter().map(|text| PodCidrText::Block(block(text))).collect()
}

/// A prepared range whose `Ready=True` has stood for long.
pub fn range(name: &str, cidr: &str) -> RangeFact {
    let range = block(cidr);
    let mut status = ClusterCIDRStatus::default();
    let verdict = Verdict::new(READY, Some(true), crate::reason::RANGE_READY, "blocks are carved from it");
    condition::set(&mut status.conditions, &verdict, Some(1), &Time(at(NOW - 900)));
    RangeFact {
        name: name.into(),
        uid: format!("uid-{name}").as_str().into(),
        resource_version: "1".into(),
        generation: 1,
        created: at(NOW - 1000),
        deleting: false,
        finalizers: [names::CLUSTER_CIDR_FINALIZER.to_owned()].into(),
        range: Some(range),
        block_prefix: Some(range.family().default_block_prefix()),
        block_sizing: BlockSizing::Default,
        selector: Selector::default(),
        topology_key: None,
        priority: 0,
        reserved: [].into(),
        blocks_per_node: BlocksPerNode::default(),
        quarantine_seconds: 900,
        allocation: Allocation::Enabled,
        routing: None,
        status,
        problem: None,
    }
}

pub fn selector(key: &str, value: &str) -> Selector {
    let selector = serde_json::from_value(serde_json::json!({"matchLabels": {key: value}})).unwrap();
    Selector::read(Some(&selector)).unwrap()
}

/// An active block as the operator would have made it.
pub fn held_block(cidr: &str, range: &str, node: &str) -> BlockFact {
    let block = block(cidr);
    BlockFact {
        name: block.object_name().as_str().into(),
        uid: format!("uid-{cidr}").as_str().into(),
        resource_version: "1".into(),
        generation: 1,
        created: at(NOW - 500),
        deleting: false,
        block,
        range: range.into(),
        node: node.into(),
        node_uid: Some(format!("uid-{node}").as_str().into()),
        addresses: [address_of(node)].into(),
        state: BlockState::Active,
        release_after: None,
        drain: false,
        routing: None,
        labels: labels(&[(names::LABEL_CLUSTER_CIDR, range), (names::LABEL_NODE, node)]),
        others_labels: Labels::default(),
        status: None,
        problem: None,
    }
}

pub fn report(node: &str, held: &[(&str, i64)]) -> ReportFact {
    ReportFact {
        name: node.into(),
        uid: format!("uid-nn-{node}").as_str().into(),
        reported: true,
        applied: Some(Digest::default()),
        seen: None,
        failed: [].into(),
        names_not_all: false,
        held: held.iter().map(|(cidr, used)| Held { block: block(cidr), used: Some(*used) }).collect(),
        lost: Lost::default(),
        policies: [].into(),
        unready: None,
        problem: None,
    }
}

/// A RoutingPolicy with that spec, as it was just created.
pub fn policy(name: &str, spec: &str) -> PolicyFact {
    let object = format!(
        r#"{{"apiVersion": "plat.network/v1alpha1", "kind": "RoutingPolicy", "spec": {spec},
            "metadata": {{"name": "{name}", "uid": "uid-{name}", "generation": 1, "resourceVersion": "1"}}}}"#
    );
    PolicyFact::read(&serde_json::from_str(&object).unwrap())
}

/// Everybody's agent has applied everything.
pub fn digest_of(world: &World) -> Digest {
    let blocks = world.blocks.values().map(|b| (&*b.uid, b.generation));
    Digest::of(blocks.chain(world.ranges.values().map(|r| (&*r.uid, r.generation))))
}

pub fn settings() -> Settings {
    Settings {
        default_ranges: vec![DefaultRange { range: block("10.244.0.0/16"), block_prefix: Some(24) }],
        topology_key: None,
        quarantine_seconds: 900,
        ipam_source: IpamSource::Wish,
        node_spec_mirror: true,
        lease_duration: Duration::from_secs(15),
        report_wait: Duration::from_secs(30),
        quarantine_watch: Duration::from_secs(60),
        surplus_after: Duration::from_secs(600),
        withdrawal_deadline: Duration::from_secs(600),
        cleanup: false,
    }
}

/// A world, and the leader that looks at it: long in office, with watches that are up to date.
#[derive(Clone, Debug)]
pub struct Scene {
    pub world: World,
    pub settings: Settings,
    pub memory: Memory,
    pub tenure: Tenure,
    pub source: Source,
    pub clock: Clock,
}

pub fn scene() -> Scene {
    Scene {
        world: World::default(),
        settings: settings(),
        memory: Memory::new(false),
        tenure: Tenure { held_for: Duration::from_secs(3600), start: Start::Expired },
        source: Source::Live,
        clock: Clock { wall: at(NOW), steady: Duration::from_secs(3600) },
    }
}

fn put<F: Fact>(facts: &mut Facts<F>, fact: F) {
    Arc::make_mut(facts).insert(fact.name().clone(), Arc::new(fact));
}

impl Scene {
    pub fn node(mut self, node: NodeFact) -> Scene {
        put(&mut self.world.nodes, node);
        self
    }

    pub fn nodes(self, names: &[&str]) -> Scene {
        names.iter().fold(self, |scene, name| scene.node(node(name)))
    }

    pub fn range(mut self, range: RangeFact) -> Scene {
        put(&mut self.world.ranges, range);
        self
    }

    pub fn block(mut self, block: BlockFact) -> Scene {
        put(&mut self.world.blocks, block);
        self
    }

    pub fn report(mut self, report: ReportFact) -> Scene {
        put(&mut self.world.reports, report);
        self
    }

    /// Every node has an empty report, so that nothing waits for one.
    pub fn all_report(mut self) -> Scene {
        for name in self.world.nodes.keys() {
            if !self.world.reports.contains_key(name) {
                put(&mut self.world.reports, report(name, &[]));
            }
        }
        self
    }

    pub fn foreign(mut self, services: &[&str], api_server: &[&str]) -> Scene {
        let services = services.iter().map(|text| block(text)).collect();
        let api_server = api_server.iter().map(|text| text.parse().unwrap()).collect();
        self.world.foreign = Arc::new(Foreign { services, api_server });
        self
    }

    pub fn put_policy(&mut self, policy: &PolicyFact) {
        put(&mut self.world.policies, policy.clone());
    }

    pub fn lose_node(&mut self, name: &str) {
        let node = Arc::make_mut(&mut self.world.nodes).get_mut(name).unwrap();
        Arc::make_mut(node).health = Health::Lost;
    }

    pub fn with(mut self, change: impl FnOnce(&mut Scene)) -> Scene {
        change(&mut self);
        self
    }

    pub fn snapshot(&self) -> Snapshot<'_> {
        Snapshot {
            clock: self.clock,
            source: self.source,
            settings: &self.settings,
            tenure: self.tenure,
            nodes: self.world.nodes.clone(),
            ranges: self.world.ranges.clone(),
            blocks: follow(self.world.blocks.clone(), &self.world.nodes, self.settings.ipam_source),
            policies: self.world.policies.clone(),
            reports: self.world.reports.clone(),
            foreign: self.world.foreign.clone(),
            memory: &self.memory,
        }
    }

    pub fn plan(&self) -> Plan {
        plan(&self.snapshot())
    }

    /// The world after every step of a plan that concerns blocks was carried out.
    pub fn after(mut self, plan: &Plan) -> Scene {
        for step in &plan.steps {
            match step {
                Step::CreateBlock(new) => put(&mut self.world.blocks, from_new(new)),
                Step::DeleteBlock { object, .. } => {
                    Arc::make_mut(&mut self.world.blocks).remove(&object.name);
                }
                Step::ChangeBlock { object, change, .. } => {
                    let blocks = Arc::make_mut(&mut self.world.blocks);
                    let block = Arc::make_mut(blocks.get_mut(&object.name).unwrap());
                    block.state = change.state.unwrap_or(block.state);
                    block.release_after = change.release_after.unwrap_or(block.release_after);
                    block.node_uid = change.node_uid.clone().or(block.node_uid.clone());
                    if let Some(addresses) = &change.addresses {
                        block.addresses = addresses.clone().into();
                    }
                    let mut labels: BTreeMap<String, String> =
                        block.labels.iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
                    for (key, value) in &change.labels {
                        match value {
                            Some(value) => labels.insert(key.clone(), value.clone()),
                            None => labels.remove(key),
                        };
                    }
                    block.labels = Labels::pack(Some(&labels));
                }
                Step::MirrorToNode { node, pod_cidrs, .. } => {
                    let nodes = Arc::make_mut(&mut self.world.nodes);
                    Arc::make_mut(nodes.get_mut(node).unwrap()).pod_cidrs =
                        pod_cidrs.iter().map(|block| PodCidrText::Block(*block)).collect();
                }
                Step::CreateReport { node } => {
                    put(&mut self.world.reports, ReportFact { reported: false, ..report(node, &[]) })
                }
                Step::DeleteReport { node, .. } => {
                    Arc::make_mut(&mut self.world.reports).remove(node);
                }
                _ => {}
            }
        }
        self.memory.cursors.extend(plan.cursors.clone());
        self.memory.group_cursors.extend(plan.group_cursors.clone());
        self
    }
}

fn from_new(new: &NewBlock) -> BlockFact {
    let labels: BTreeMap<String, String> = new.labels.iter().cloned().collect();
    BlockFact {
        node_uid: Some(new.node_uid.clone()),
        addresses: new.addresses.clone().into(),
        labels: Labels::pack(Some(&labels)),
        ..held_block(&new.block.to_string(), &new.range, &new.node)
    }
}

/// What a plan creates, as `node block range origin`.
pub fn created(plan: &Plan) -> Vec<String> {
    let mut created: Vec<_> = plan
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::CreateBlock(NewBlock { block, range, node, origin, .. }) => {
                let origin = match origin {
                    Origin::Carved => "carved",
                    Origin::Adopted => "adopted",
                    Origin::Recreated => "recreated",
                };
                Some(format!("{node} {block} {range} {origin}"))
            }
            _ => None,
        })
        .collect();
    created.sort();
    created
}

/// Names of a plan's steps, but for NodeNetworks and mirrors.
pub fn steps(plan: &Plan) -> Vec<&'static str> {
    let names = plan.steps.iter().map(Step::name);
    names.filter(|name| !["create_report", "delete_report", "mirror_to_node"].contains(name)).collect()
}

/// A plan's faults, as `object reason`.
pub fn faults(plan: &Plan) -> Vec<String> {
    plan.faults.iter().map(|fault| format!("{} {}", fault.object.name, fault.reason)).collect()
}
