//! Two operators that both go on: paused for longer than their Lease, cut off, answered late or not at all, with
//! watches that stand still, killed and started again, while nodes come, go and come back, and somebody deletes PodCIDRs
//! under running nodes. Fake agents report. An observer at the API server judges every event.
//!
//! `PLAT_RIVAL_ALLOCATIONS=10000 PLAT_RIVAL_SECONDS=3600` looks longer, `PLAT_RIVAL_SEED` differently.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::core::v1::Node;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use plat_crds::digest::Digest;
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR};
use plat_e2e::wait::{holds, wait_until_async};
use plat_operator::dice::Dice;
use serde_json::json;

use crate::arena::{Block, Cluster, Operator, arena};
use crate::observer::Observer;
use crate::proxy::{Fault, Proxy, on};

const FLAGS: [&str; 8] = [
    "--block-prefix-length-v4=28",
    "--quarantine-seconds=60",
    "--quarantine-watch-seconds=1",
    "--report-wait-seconds=1",
    "--lease-duration-seconds=5",
    "--lease-renew-deadline-seconds=4",
    "--lease-retry-milliseconds=200",
    "--watch-seconds=5",
];
/// How long the map may take to be right once nothing disturbs any more.
const CALM: Duration = Duration::from_secs(90);

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// One of the two operators.
struct Rival {
    name: &'static str,
    flags: Vec<String>,
    proxy: Proxy,
    operator: Operator,
    /// Until when it is disturbed.
    disturbed: Option<Instant>,
    lives: usize,
}

impl Rival {
    async fn start(cluster: &Cluster, name: &'static str, flags: &[&str]) -> Rival {
        let proxy = Proxy::start(cluster.plane, cluster.client.clone()).await;
        let flags: Vec<String> = FLAGS.iter().chain(flags).map(ToString::to_string).collect();
        let operator = operator(cluster, &proxy, name, &flags);
        Rival { name, flags, proxy, operator, disturbed: None, lives: 1 }
    }

    /// What the kubelet does when it has ended.
    fn revive(&mut self, cluster: &Cluster) {
        if self.operator.has_ended() {
            self.operator = operator(cluster, &self.proxy, self.name, &self.flags);
            self.lives += 1;
        }
    }

    fn disturb(&mut self, dice: &mut Dice) {
        let often = usize::MAX;
        let proxy = &self.proxy;
        match dice.roll(8) {
            0 | 1 => self.operator.pause(),
            2 => drop(proxy.inject(often, on("*", "*"), Fault::Refuse)),
            3 => drop(proxy.inject(often, on("*", "*"), Fault::Silence)),
            4 => {
                for verb in ["create", "patch", "delete"] {
                    proxy.inject(often, on(verb, "podcidrs"), Fault::Delay(Duration::from_secs(3)));
                }
            }
            5 => drop(proxy.inject(often, on("*", "podcidrs"), Fault::LoseAnswer)),
            6 => {
                proxy.inject(often, on("watch", "*"), Fault::Freeze);
                proxy.break_watches();
            }
            _ => proxy.break_watches(),
        }
        let long = Duration::from_millis(500 + dice.roll(8000));
        self.disturbed = Some(Instant::now() + long);
    }

    fn calm(&mut self) {
        self.proxy.heal();
        self.operator.resume();
        self.disturbed = None;
    }
}

fn operator(cluster: &Cluster, proxy: &Proxy, name: &str, flags: &[String]) -> Operator {
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    proxy.operator(cluster.plane, name, &flags)
}

/// The nodes: they come, go and come back, and their agents report.
struct Crowd {
    cluster: Cluster,
    here: BTreeSet<String>,
    count: usize,
    /// How many there are.
    size: usize,
    /// PodCIDRs that were deleted by hand.
    robbed: usize,
}

impl Crowd {
    async fn join(&mut self, name: String) {
        let address = format!("172.31.{}.{}", self.count / 250 % 250, self.count % 250 + 1);
        self.count += 1;
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": name},
            "status": {"addresses": [{"type": "InternalIP", "address": address}],
                "conditions": [{"type": "Ready", "status": "True", "reason": "Test", "message": ""}]},
        }))
        .unwrap();
        self.cluster.api::<Node>().create(&PostParams::default(), &node).await.unwrap();
        self.here.insert(name);
    }

    /// Some nodes leave and others join, unless too many wait for their blocks already.
    async fn churn(&mut self, dice: &mut Dice) {
        let blocks = self.cluster.blocks().await;
        let served = |node: &&String| blocks.iter().any(|block| block.node == **node);
        let few = self.size / 4;
        if self.here.iter().filter(served).count() + few / 4 < self.here.len() {
            return;
        }
        while self.here.len() < self.size {
            self.join(format!("node-{}", self.count)).await;
        }
        for _ in 0..few {
            let name = self.here.iter().nth(dice.roll(self.here.len() as u64) as usize).unwrap().clone();
            self.cluster.delete_node(&name).await;
            self.here.remove(&name);
            if dice.one_in(6) {
                self.join(name).await;
            }
        }
    }

    /// Agents report the blocks that they lease from, and that they carry every object: those whose blocks have
    /// changed, or that are asked for a proof.
    async fn report(&self) {
        let list = ListParams::default();
        let blocks = self.cluster.api::<PodCIDR>().list(&list).await.unwrap().items;
        let ranges = self.cluster.api::<ClusterCIDR>().list(&list).await.unwrap().items;
        let ids = blocks.iter().map(|b| &b.metadata).chain(ranges.iter().map(|r| &r.metadata));
        let ids: Vec<_> = ids.map(|m| (m.uid.clone().unwrap(), m.generation.unwrap())).collect();
        let digest = Digest::of(ids.iter().map(|(uid, generation)| (uid.as_str(), *generation)));
        let reports = self.cluster.api::<NodeNetwork>();
        let known = reports.list(&list).await.unwrap().items;
        let patches = known.iter().filter_map(|known| {
            let name = known.metadata.name.as_deref().filter(|name| self.here.contains(*name))?;
            // What a gone node said that it holds is claimed for a quarantine, and time does not pass that fast:
            // few say so.
            let tells = name.ends_with(['0', '4', '8']);
            let mine = blocks.iter().filter(|block| block.spec.node_name == name);
            let (active, other): (Vec<_>, Vec<_>) =
                mine.partition(|block| block.spec.state == BlockState::Active);
            let said: Vec<&String> =
                known.status.iter().flat_map(|status| &status.held_blocks).map(|held| &held.cidr).collect();
            // An agent goes on with a block whose PodCIDR is gone without having been released.
            let robbed = said.iter().copied().filter(|said| blocks.iter().all(|b| b.spec.cidr != **said));
            let held: Vec<&String> =
                active.iter().map(|block| &block.spec.cidr).chain(robbed).filter(|_| tells).collect();
            if other.is_empty() && known.status.is_some() && said == held {
                return None;
            }
            let held: Vec<_> =
                held.into_iter().map(|cidr| json!({"cidr": cidr, "used": 1, "capacity": 13})).collect();
            let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            let status = json!({"reportedAt": now, "heldBlocks": held,
                "applied": {"count": ids.len(), "digest": digest.to_string()}});
            let (reports, name) = (reports.clone(), name.to_owned());
            Some(async move {
                let patch = Patch::Merge(json!({"status": status}));
                let _gone_meanwhile = reports.patch_status(&name, &PatchParams::default(), &patch).await;
            })
        });
        join_all(patches).await;
    }

    /// Somebody deletes the PodCIDR of a node that has said that it leases from it: only its report knows then.
    async fn rob(&mut self, dice: &mut Dice) {
        let reports = self.cluster.api::<NodeNetwork>().list(&ListParams::default()).await.unwrap().items;
        let held = reports.iter().filter(|report| self.here.contains(&report.metadata.name.clone().unwrap()));
        let held: Vec<_> =
            held.flat_map(|r| r.status.iter().flat_map(|status| &status.held_blocks)).collect();
        if held.is_empty() {
            return;
        }
        let block: plat_crds::Block = held[dice.roll(held.len() as u64) as usize].cidr.parse().unwrap();
        let deleted =
            self.cluster.api::<PodCIDR>().delete(&block.object_name(), &DeleteParams::default()).await;
        self.robbed += usize::from(deleted.is_ok());
    }

    /// The quarantines of today are over.
    async fn let_time_pass(&self) {
        let blocks = self.cluster.api::<PodCIDR>();
        let resting = blocks.list(&ListParams::default().fields("spec.state=Quarantined")).await.unwrap();
        let now = k8s_openapi::jiff::Timestamp::now();
        let is_past = |block: &PodCIDR| block.spec.release_after.as_ref().is_some_and(|after| after.0 <= now);
        let patches = resting.into_iter().filter(|block| !is_past(block)).map(|block| {
            let blocks = blocks.clone();
            async move {
                let version = block.metadata.resource_version;
                let past = json!({"metadata": {"resourceVersion": version}, "spec": {"releaseAfter": "2026-01-01T00:00:00Z"}});
                let _moved_on =
                    blocks.patch(&block.metadata.name.unwrap(), &PatchParams::default(), &Patch::Merge(past)).await;
            }
        });
        join_all(patches).await;
    }

    /// Every node has a block in use (two, where both leaders gave it one), and nothing is left over of others.
    async fn look(&self) -> Result<(), String> {
        let blocks = self.cluster.blocks().await;
        for node in &self.here {
            let is_own = |block: &&Block| block.node == *node && block.state == BlockState::Active;
            holds(blocks.iter().any(|block| is_own(&block)), format!("{node} has no block"))?;
        }
        let left = blocks.iter().find(|block| !self.here.contains(&block.node));
        holds(left.is_none(), format!("{left:?} of a gone node"))
    }
}

async fn fight(cluster: Cluster, second_lease: &str, allocations: usize) {
    // Few enough blocks for them to be used again and again.
    let size = (allocations / 8).clamp(12, 150);
    let bits = (3 * size).next_power_of_two().ilog2();
    let range = format!("--cluster-cidr=10.244.0.0/{}", 28 - bits);
    let mut dice = Dice(number("PLAT_RIVAL_SEED", 7).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let began = Instant::now();
    let observer = Observer::start(&cluster.client, Duration::from_secs(60)).await;
    let mut rivals = [
        Rival::start(&cluster, "one", &[&range]).await,
        Rival::start(&cluster, "two", &[&range, second_lease]).await,
    ];
    let mut crowd = Crowd { cluster: cluster.clone(), here: BTreeSet::new(), count: 0, size, robbed: 0 };
    // On a machine that is busy with other things, as many as there is time for.
    let longest = Duration::from_secs(number("PLAT_RIVAL_SECONDS", 45));
    // Blocks that come back to the node that they were deleted under are not new.
    let given = |crowd: &Crowd| observer.allocations().saturating_sub(crowd.robbed);
    let mut turn = 0usize;
    while given(&crowd) < allocations
        && (began.elapsed() < longest || given(&crowd) < size || crowd.robbed == 0)
    {
        observer.check();
        for rival in &mut rivals {
            rival.revive(&cluster);
            match rival.disturbed {
                Some(until) if until < Instant::now() => rival.calm(),
                None if dice.one_in(5) => rival.disturb(&mut dice),
                _ => {}
            }
        }
        crowd.churn(&mut dice).await;
        crowd.report().await;
        turn += 1;
        if turn.is_multiple_of(8) {
            crowd.rob(&mut dice).await;
        }
        crowd.let_time_pass().await;
    }
    rivals.iter_mut().for_each(Rival::calm);
    wait_until_async("the map is right", CALM, async || {
        observer.check();
        rivals.iter_mut().for_each(|rival| rival.revive(&cluster));
        crowd.report().await;
        crowd.let_time_pass().await;
        crowd.look().await
    })
    .await;
    eprintln!(
        "{} blocks given out in {:?}, {} of them another node's before; {} deleted by hand; {} and {} lives",
        given(&crowd),
        began.elapsed(),
        observer.changes_of_hands(),
        crowd.robbed,
        rivals[0].lives,
        rivals[1].lives,
    );
    let again = observer.changes_of_hands();
    assert!(given(&crowd) < allocations || again > allocations / 8, "blocks must be used again: {again}");
    observer.finish().await;
}

fn allocations() -> usize {
    usize::try_from(number("PLAT_RIVAL_ALLOCATIONS", 120)).unwrap()
}

#[test]
fn one_lease_that_goes_to_and_fro_gives_no_block_to_two_nodes() {
    arena(|cluster| fight(cluster, "--namespace=plat-system", allocations()));
}

#[test]
fn two_leaders_that_both_believe_in_themselves_give_no_block_to_two_nodes() {
    arena(|cluster| fight(cluster, "--namespace=elsewhere", allocations()));
}
