//! How quarantined blocks become free: by proof of every live node; and nodes that return while a leader is
//! about to free their block. The latter drives a leader by hand, with a clock of the test's, so that a leader
//! can be stopped between any two of its requests to the real API server.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch as ApiPatch, PatchParams};
use kube::core::DeserializeGuard;
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR};
use plat_operator::apply::Outcome;
use plat_operator::facts::{BlockFact, Fact, NodeFact, RangeFact, ReportFact};
use plat_operator::kube_server::KubeServer;
use plat_operator::leader::{Leader, World};
use plat_operator::lease::{Elector, Leadership, Timing};
use plat_operator::node_view::NodeView;
use plat_operator::server::{CallError, Live, Patch, Preconditions, Server};
use plat_operator::snapshot::{Clock, Facts, IpamSource, Settings, Start, Tenure};
use plat_operator::step::Kind;
use serde_json::{Value, json};

use crate::arena::{Cluster, arena, condition_of};

const NAME: &str = "10-244-0-0-24";

#[test]
fn a_released_block_waits_for_every_live_node_also_under_a_new_leader_and_at_most_until_the_deadline() {
    arena(|cluster| async move {
        cluster.nodes(&["gone", "n1", "n2"]).await;
        let start = |name: &str, deadline: u64| {
            let deadline = format!("--withdrawal-deadline-seconds={deadline}");
            let cidr = "--cluster-cidr=10.244.0.0/16";
            let flags = [cidr, "--quarantine-seconds=60", "--quarantine-watch-seconds=1", &deadline];
            cluster.operator(name, &flags)
        };
        let first = start("a", 600);
        cluster.wait_blocks(&["gone", "n1", "n2"], 1).await;
        let holder = cluster.block_of("gone").await.unwrap().metadata.name.unwrap();
        for node in ["n1", "n2"] {
            cluster.report(node, &[]).await;
        }
        cluster.delete_node("gone").await;
        cluster.wait_block(&holder, "rests", |b| b.spec.state == BlockState::Quarantined).await;
        cluster.end_quarantine(&holder).await;
        // n1 has withdrawn its route, n2 has said nothing since.
        cluster.report("n1", &[]).await;
        let waits = |b: &PodCIDR| message_of(b).contains("1 of 2 live nodes (n2) have not reported yet");
        let waiting = cluster.wait_block(&holder, "waits for n2", waits).await;
        assert_eq!(condition_of(&waiting, "Converged"), ("False".to_owned(), "Spreading".to_owned()));
        first.wait_metric("plat_operator_blocks_awaiting_withdrawal", 1.0).await;

        // A new leader knows no sum but the present one: n1's report equals it, n2's does not.
        assert!(first.terminate().await.success());
        let second = start("b", 600);
        // It waits for n2.
        second.wait_metric("plat_operator_blocks_awaiting_withdrawal", 1.0).await;
        cluster.report("n2", &[]).await;
        cluster.wait_gone(&holder).await;
        cluster.wait_event("PodCIDR", &holder, "BlockReleased").await;

        // Once more; n1 stays silent until the deadline.
        assert!(second.terminate().await.success());
        let third = start("c", 3);
        let holder = cluster.block_of("n2").await.unwrap().metadata.name.unwrap();
        cluster.delete_node("n2").await;
        cluster.wait_block(&holder, "rests", |b| b.spec.state == BlockState::Quarantined).await;
        cluster.end_quarantine(&holder).await;
        cluster.wait_gone(&holder).await;
        let text = cluster.wait_event("PodCIDR", &holder, "BlockReleasedUnproven").await;
        assert!(text.contains("1 of 1 live nodes (n1)"), "{text}");
        third.wait_metric("plat_operator_blocks_released_unproven_total", 1.0).await;
    });
}

fn message_of(block: &PodCIDR) -> String {
    let conditions = block.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    plat_crds::condition::find(conditions, "Ready").map(|c| c.message.clone()).unwrap_or_default()
}

/// Where a leader is stopped, and what is made of its request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    /// Before it looks whether the node still exists.
    Get,
    /// Between that look and the DELETE.
    Delete,
    /// The DELETE is lost on its way.
    LostRequest,
    /// The DELETE is carried out, and its answer is lost.
    LostAnswer,
}

/// The real API server, behind a connection on which something happens once.
struct Stopped<'a> {
    server: KubeServer,
    at: Cell<Option<At>>,
    meanwhile: RefCell<Option<Meanwhile<'a>>>,
}

type Meanwhile<'a> = std::pin::Pin<Box<dyn Future<Output = ()> + 'a>>;

impl Stopped<'_> {
    async fn reach(&self, at: &[At]) -> Option<At> {
        let reached = self.at.get().filter(|here| at.contains(here))?;
        self.at.set(None);
        let meanwhile = self.meanwhile.borrow_mut().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile.await;
        }
        Some(reached)
    }
}

impl Server for Stopped<'_> {
    async fn get(&self, kind: Kind, name: &str) -> Result<Value, CallError> {
        if kind == Kind::Node {
            self.reach(&[At::Get]).await;
        }
        self.server.get(kind, name).await
    }

    async fn list(&self) -> Result<Live, CallError> {
        self.server.list().await
    }

    async fn create(&self, kind: Kind, object: Value) -> Result<Value, CallError> {
        self.server.create(kind, object).await
    }

    async fn patch(&self, kind: Kind, name: &str, patch: Patch) -> Result<Value, CallError> {
        self.server.patch(kind, name, patch).await
    }

    async fn delete(&self, kind: Kind, name: &str, only: Preconditions<'_>) -> Result<(), CallError> {
        let lost = || Err(CallError::Unknown("the test lost it".to_owned()));
        match self.reach(&[At::Delete, At::LostRequest, At::LostAnswer]).await {
            Some(At::LostRequest) => lost(),
            Some(At::LostAnswer) => self.server.delete(kind, name, only).await.and_then(|()| lost()),
            _ => self.server.delete(kind, name, only).await,
        }
    }
}

/// A leader that makes a pass when it is told to, at the time that it is told.
struct Driven {
    cluster: Cluster,
    leader: Leader,
    leadership: Arc<Leadership>,
    second: u64,
}

/// What a pass did about PodCIDRs.
type Deeds = Vec<(&'static str, &'static str)>;

impl Driven {
    async fn start(cluster: &Cluster) -> Driven {
        let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), "elsewhere");
        let hour = |hours: u64| Duration::from_secs(3600 * hours);
        let timing = Timing { duration: hour(2), renew_deadline: hour(1), retry: Duration::from_millis(100) };
        let leadership = Arc::new(Leadership::default());
        Elector::new(leases, "plat-operator", "driven".to_owned(), timing).acquire(&leadership, |_| {}).await;
        let settings = Settings {
            ipam_source: IpamSource::Wish,
            default_ranges: Vec::new(),
            topology_key: None,
            quarantine_seconds: 60,
            node_spec_mirror: false,
            lease_duration: Duration::from_secs(15),
            report_wait: Duration::ZERO,
            quarantine_watch: Duration::from_secs(60),
            surplus_after: Duration::from_secs(600),
            withdrawal_deadline: Duration::ZERO,
            cleanup: false,
        };
        let leader = Leader::new(settings, &world(cluster).await);
        Driven { cluster: cluster.clone(), leader, leadership, second: 0 }
    }

    async fn pass_at(&mut self, second: u64, at: Option<At>, meanwhile: Option<Meanwhile<'_>>) -> Deeds {
        self.second = second;
        let server = Stopped {
            server: KubeServer::new(self.cluster.client.clone(), self.leadership.clone()),
            at: Cell::new(at),
            meanwhile: RefCell::new(meanwhile),
        };
        let world = world(&self.cluster).await;
        let wall = Timestamp::from_second(1_800_000_000 + i64::try_from(second).unwrap()).unwrap();
        let clock = || Clock { wall, steady: Duration::from_secs(second) };
        let tenure = || Tenure { held_for: Duration::from_secs(3600 + second), start: Start::HandedOver };
        let pass = self.leader.pass(&world, tenure, clock, &server, |_| {}).await;
        assert!(at.is_none() || server.at.get().is_none(), "{at:?} was never reached: {:?}", pass.done);
        let block = |step: &str| ["create_block", "change_block", "delete_block"].contains(&step);
        let done = pass.done.iter().map(|done| (done.step.name(), done.outcome.name()));
        if let Some(refused) = pass.done.iter().find(|done| matches!(done.outcome, Outcome::Refused(_))) {
            panic!("{refused:?}");
        }
        done.filter(|(step, _)| block(step)).collect()
    }

    /// Passes until nothing about blocks is to be done.
    async fn rest(&mut self, second: u64) {
        for later in 0..20 {
            let nodes = self.pass_at(second + later, None, None).await;
            if nodes.is_empty() && later > 2 {
                return;
            }
        }
        panic!("it never comes to rest");
    }
}

async fn world(cluster: &Cluster) -> World {
    World {
        nodes: facts::<NodeView, _>(cluster, |object| Some(NodeFact::read(object))).await,
        ranges: facts::<ClusterCIDR, _>(cluster, |object| Some(RangeFact::read(object))).await,
        blocks: facts::<PodCIDR, _>(cluster, BlockFact::read).await,
        reports: facts::<NodeNetwork, _>(cluster, |object| Some(ReportFact::read(object))).await,
        policies: Arc::default(),
        foreign: Arc::default(),
    }
}

async fn facts<K, F: Fact>(cluster: &Cluster, read: impl Fn(&DeserializeGuard<K>) -> Option<F>) -> Facts<F>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let api: Api<DeserializeGuard<K>> = Api::all(cluster.client.clone());
    let list = api.list(&ListParams::default()).await.unwrap();
    Arc::new(Live::by_name(list.items.iter().filter_map(read)))
}

/// n1 has had the first block, and its quarantine is over at second 1000.
async fn at_the_end_of_a_quarantine(cluster: &Cluster, range: &str) -> Driven {
    cluster.range("r", json!({"cidr": range, "quarantineSeconds": 60})).await;
    cluster.nodes(&["n1"]).await;
    let mut driven = Driven::start(cluster).await;
    driven.rest(0).await;
    assert_eq!(cluster.wait_blocks(&["n1"], 1).await["n1"], ["10.244.0.0/24"]);
    cluster.report("n1", &[("10.244.0.0/24", 3)]).await;
    cluster.delete_node("n1").await;
    assert_eq!(driven.pass_at(30, None, None).await, [("change_block", "done")]);
    assert_eq!(driven.pass_at(80, None, None).await, [] as [(&str, &str); 0], "it rests");
    driven
}

async fn returns(cluster: &Cluster) {
    cluster.node("n1", json!({}), &["172.30.0.11"]).await;
}

async fn assert_n1_has_its_block(cluster: &Cluster) {
    let block = cluster.api::<PodCIDR>().get(NAME).await.unwrap();
    let node = cluster.get_node("n1").await;
    assert_eq!((block.spec.node_name.as_str(), block.spec.state), ("n1", BlockState::Active));
    assert_eq!(block.spec.node_uid, node.metadata.uid, "for the Node that is there now");
    cluster.assert_no_double().await;
}

#[test]
fn a_node_that_returns_before_its_block_is_deleted_keeps_it_wherever_the_leader_is_stopped() {
    arena(|cluster| async move {
        // Stopped after the decision, before it looks: the look shows the node.
        let mut driven = at_the_end_of_a_quarantine(&cluster, "10.244.0.0/16").await;
        let deeds = driven.pass_at(1000, Some(At::Get), Some(Box::pin(returns(&cluster)))).await;
        assert_eq!(deeds, [("delete_block", "stale")]);
        driven.rest(1010).await;
        assert_n1_has_its_block(&cluster).await;

        // Stopped after the look, for so long that another leader gives the block back meanwhile: the DELETE
        // names the version that was decided on.
        cluster.delete_node("n1").await;
        assert_eq!(driven.pass_at(1100, None, None).await, [("change_block", "done")]);
        driven.pass_at(1150, None, None).await;
        let given_back = async {
            returns(&cluster).await;
            let uid = cluster.get_node("n1").await.metadata.uid;
            let active = json!({"spec": {"state": "Active", "releaseAfter": null, "nodeUID": uid}});
            let blocks = cluster.api::<PodCIDR>();
            blocks.patch(NAME, &PatchParams::default(), &ApiPatch::Merge(active)).await.unwrap();
        };
        let deeds = driven.pass_at(2000, Some(At::Delete), Some(Box::pin(given_back))).await;
        assert_eq!(deeds, [("delete_block", "stale")]);
        driven.rest(2010).await;
        assert_n1_has_its_block(&cluster).await;

        // Stopped after the look, and its DELETE is of another object of that name.
        cluster.delete_node("n1").await;
        assert_eq!(driven.pass_at(2100, None, None).await, [("change_block", "done")]);
        driven.pass_at(2150, None, None).await;
        let made_anew = async {
            returns(&cluster).await;
            let uid = cluster.get_node("n1").await.metadata.uid;
            let blocks = cluster.api::<PodCIDR>();
            let mut block = blocks.get(NAME).await.unwrap();
            blocks.delete(NAME, &DeleteParams::default()).await.unwrap();
            block.metadata =
                serde_json::from_value(json!({"name": NAME, "labels": block.metadata.labels})).unwrap();
            (block.spec.state, block.spec.release_after, block.spec.node_uid) =
                (BlockState::Active, None, uid);
            blocks.create(&Default::default(), &block).await.unwrap();
        };
        let deeds = driven.pass_at(3000, Some(At::Delete), Some(Box::pin(made_anew))).await;
        assert_eq!(deeds, [("delete_block", "stale")]);
        driven.rest(3010).await;
        assert_n1_has_its_block(&cluster).await;
    });
}

#[test]
fn a_node_that_returns_too_late_gets_its_block_back_unless_another_has_it_by_then() {
    arena(|cluster| async move {
        // It returns between the look and the DELETE, with pods that still run: what it reports goes before
        // what others want.
        let mut driven = at_the_end_of_a_quarantine(&cluster, "10.244.0.0/24").await;
        cluster.node("other", json!({}), &["172.30.0.12"]).await;
        let deeds = driven.pass_at(1000, Some(At::Delete), Some(Box::pin(returns(&cluster)))).await;
        assert_eq!(deeds, [("delete_block", "done")]);
        driven.rest(1001).await;
        assert_n1_has_its_block(&cluster).await;
        assert!(cluster.block_of("other").await.is_none(), "the range has but one block");

        // The DELETE is lost, or its answer is. Nobody knows, and nobody else gets the block meanwhile.
        for (round, at) in [At::LostRequest, At::LostAnswer].into_iter().enumerate() {
            let second = 2000 * (u64::try_from(round).unwrap() + 1);
            cluster.delete_node("n1").await;
            assert_eq!(driven.pass_at(second, None, None).await, [("change_block", "done")]);
            driven.pass_at(second + 50, None, None).await;
            let deeds = driven.pass_at(second + 900, Some(at), None).await;
            assert_eq!(deeds, [("delete_block", "unknown")], "{at:?}");
            returns(&cluster).await;
            driven.rest(second + 905).await;
            assert_n1_has_its_block(&cluster).await;
            assert!(cluster.block_of("other").await.is_none(), "{at:?}");
        }

        // It is away for good: in the end the other gets the block. When it returns after that, it waits, and
        // both are told why.
        cluster.delete_node("n1").await;
        driven.pass_at(8000, None, None).await;
        driven.pass_at(8050, None, None).await;
        assert_eq!(driven.pass_at(9000, None, None).await, [("delete_block", "done")]);
        driven.rest(9001).await;
        assert_eq!(cluster.wait_blocks(&["other"], 1).await["other"], ["10.244.0.0/24"]);
        returns(&cluster).await;
        driven.rest(9100).await;
        cluster.report("n1", &[("10.244.0.0/24", 3)]).await;
        driven.rest(9200).await;
        assert!(cluster.block_of("n1").await.is_none());
        assert_eq!(cluster.block_of("other").await.unwrap().spec.cidr, "10.244.0.0/24");
        cluster.assert_no_double().await;
    });
}
