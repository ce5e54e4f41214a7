//! Executes steps. One function per step, no policy: what to do when something is in the way is the next
//! plan's business. "Already so" is success.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::StreamExt;
use kube::core::DeserializeGuard;
use plat_crds::cluster_cidr::{BlockSizing, ClusterCIDR};
use plat_crds::names;
use plat_crds::pod_cidr::PodCIDR;
use serde_json::{Value, json};

use crate::facts::{BlockFact, Name, RangeFact};
use crate::server::{CallError, Patch, Preconditions, Server};
use crate::step::{Kind, NewBlock, Step, Version, Why, block_patch, merge_patch};

/// Calls in flight.
const CONCURRENCY: usize = 64;
/// After so many unknown outcomes, or requests to come back later, in a row the API server is away or overloaded: the
/// rest of the pass waits.
const GIVE_UP_AFTER: u32 = 8;

/// What became of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// The step.
    pub step: Step,
    /// How it went.
    pub outcome: Outcome,
    /// What the answer teaches, before the watches show it.
    pub learnt: Option<Learnt>,
    /// For how long the API server asked not to try again.
    pub retry_after: Option<Duration>,
}

/// How a step went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Written.
    Done,
    /// It was so already.
    AlreadySo,
    /// The block has a PodCIDR of that node already.
    Taken(Name),
    /// Decided on something that has changed: plan again.
    Stale(String),
    /// Decided on something that is not there.
    Missing,
    /// The API server said no.
    Refused(String),
    /// Nobody knows.
    Unknown(String),
    /// Not sent: this process does not lead any more.
    NotLeader,
    /// Not sent: the API server seems to be away.
    Skipped,
}

impl Outcome {
    /// The outcome's name in metrics and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Outcome::Done => "done",
            Outcome::AlreadySo => "already_so",
            Outcome::Taken(_) => "taken",
            Outcome::Stale(_) => "stale",
            Outcome::Missing => "missing",
            Outcome::Refused(_) => "refused",
            Outcome::Unknown(_) => "unknown",
            Outcome::NotLeader => "not_leader",
            Outcome::Skipped => "skipped",
        }
    }

    /// Whether things are now as the step wanted them.
    pub fn is_success(&self) -> bool {
        matches!(self, Outcome::Done | Outcome::AlreadySo)
    }
}

/// An object as the API server answered with it.
#[derive(Clone, Debug, PartialEq)]
pub enum Learnt {
    /// A PodCIDR.
    Block(Box<BlockFact>),
    /// A ClusterCIDR.
    Range(Box<RangeFact>),
    /// A PodCIDR that we have freed.
    Released {
        /// The object.
        object: Version,
        /// Its former node.
        node: Name,
    },
}

/// Executes steps, many at a time. `on_progress` is called after each.
pub async fn apply<S: Server>(steps: Vec<Step>, server: &S, on_progress: impl Fn(&Done)) -> Vec<Done> {
    let turned_away_in_a_row = AtomicU32::new(0);
    let run = |step: Step| {
        let (turned_away, on_progress) = (&turned_away_in_a_row, &on_progress);
        async move {
            let (answer, retry_after) = if turned_away.load(Ordering::Relaxed) >= GIVE_UP_AFTER {
                (Ok((Outcome::Skipped, None)), None)
            } else {
                match execute(&step, server).await {
                    Err(CallError::Later { wait, because }) => (Err(*because), Some(wait)),
                    answer => (answer, None),
                }
            };
            let (outcome, learnt) = answer.unwrap_or_else(|error| (failure(error), None));
            match outcome {
                Outcome::Unknown(_) => turned_away.fetch_add(1, Ordering::Relaxed),
                _ if retry_after.is_some() => turned_away.fetch_add(1, Ordering::Relaxed),
                Outcome::Skipped | Outcome::NotLeader => 0,
                _ => turned_away.swap(0, Ordering::Relaxed),
            };
            let done = Done { step, outcome, learnt, retry_after };
            on_progress(&done);
            done
        }
    };
    futures::stream::iter(steps.into_iter().map(run)).buffer_unordered(CONCURRENCY).collect().await
}

type Answer = Result<(Outcome, Option<Learnt>), CallError>;

fn failure(error: CallError) -> Outcome {
    match error {
        CallError::AlreadyExists | CallError::Conflict(_) => Outcome::Stale(error.to_string()),
        CallError::NotFound => Outcome::Missing,
        CallError::Refused(text) => Outcome::Refused(text),
        CallError::Unknown(text) => Outcome::Unknown(text),
        CallError::Later { because, .. } => failure(*because),
        CallError::NotLeader => Outcome::NotLeader,
    }
}

async fn execute<S: Server>(step: &Step, server: &S) -> Answer {
    match step {
        Step::CreateRange { name, range, block_prefix, topology_key, quarantine_seconds } => {
            let mut object = json!({
                "apiVersion": api_version(), "kind": Kind::ClusterCIDR.as_str(),
                "metadata": {"name": &**name, "finalizers": [names::CLUSTER_CIDR_FINALIZER]},
                "spec": {"cidr": range, "quarantineSeconds": quarantine_seconds},
            });
            match block_prefix {
                Some(length) => object["spec"]["blockPrefixLength"] = json!(length),
                None => object["spec"]["blockSizing"] = json!(BlockSizing::MaxPods),
            }
            if let Some(key) = topology_key {
                object["spec"]["topologyKey"] = json!(key);
            }
            Ok((Outcome::Done, range_of(server.create(Kind::ClusterCIDR, object).await?)))
        }
        Step::PrepareRange { object, finalizers, block_size } => {
            let mut patch = json!({"metadata": with_finalizers(object, finalizers)});
            if let Some(size) = block_size {
                patch["spec"] = json!({"blockPrefixLength": size.prefix});
            }
            let answer = server.patch(Kind::ClusterCIDR, &object.name, Patch::Merge(patch)).await?;
            Ok((Outcome::Done, range_of(answer)))
        }
        Step::ReleaseRange { object, finalizers } => {
            let patch = Patch::Merge(json!({"metadata": with_finalizers(object, finalizers)}));
            gone_is_success(server.patch(Kind::ClusterCIDR, &object.name, patch).await.map(|_| ()))
        }
        Step::CreateBlock(new) => create_block(new, server).await,
        Step::ChangeBlock { object, node, change, why, .. } => {
            if *why == Why::NodeGone && exists(server, node).await? {
                return Ok((Outcome::Stale(format!("node {node} exists")), None));
            }
            let patch = Patch::Merge(block_patch(object, change));
            Ok((Outcome::Done, block_of(server.patch(Kind::PodCIDR, &object.name, patch).await?)))
        }
        Step::DeleteBlock { object, node, living, .. } => {
            if living.is_none() && exists(server, node).await? {
                return Ok((Outcome::Stale(format!("node {node} exists")), None));
            }
            let only = Preconditions { uid: &object.uid, resource_version: Some(&object.resource_version) };
            let (outcome, _) = gone_is_success(server.delete(Kind::PodCIDR, &object.name, only).await)?;
            Ok((outcome, Some(Learnt::Released { object: object.clone(), node: node.clone() })))
        }
        Step::MirrorToNode { node, uid, pod_cidrs } => {
            let patch = json!({"metadata": {"uid": &**uid}, "spec": {"podCIDR": pod_cidrs.first(), "podCIDRs": pod_cidrs}});
            server.patch(Kind::Node, node, Patch::Merge(patch)).await?;
            Ok((Outcome::Done, None))
        }
        Step::ClearNetworkUnavailable { node, uid, blocks, at } => {
            let blocks = blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let condition = json!({
                "type": "NetworkUnavailable", "status": "False", "reason": "PlatBlocksReady",
                "message": format!("the node has programmed its pod network: {blocks}"),
                "lastHeartbeatTime": at, "lastTransitionTime": at,
            });
            let patch = json!({"metadata": {"uid": &**uid}, "status": {"conditions": [condition]}});
            server.patch(Kind::Node, node, Patch::StrategicStatus(patch)).await?;
            Ok((Outcome::Done, None))
        }
        Step::CreateReport { node } => {
            let object = json!({
                "apiVersion": api_version(), "kind": Kind::NodeNetwork.as_str(), "metadata": {"name": &**node},
            });
            match server.create(Kind::NodeNetwork, object).await {
                Err(CallError::AlreadyExists) => Ok((Outcome::AlreadySo, None)),
                answer => answer.map(|_| (Outcome::Done, None)),
            }
        }
        Step::DeleteReport { node, uid } => {
            let only = Preconditions { uid, resource_version: None };
            gone_is_success(server.delete(Kind::NodeNetwork, node, only).await)
        }
        Step::RangeStatus { object, old, new } => {
            let Some(patch) = status_patch(object.exact(), old, new) else {
                return Ok((Outcome::AlreadySo, None));
            };
            Ok((Outcome::Done, range_of(server.patch(Kind::ClusterCIDR, &object.name, patch).await?)))
        }
        Step::PolicyStatus { object, old, new } => {
            let Some(patch) = status_patch(object.exact(), old, new) else {
                return Ok((Outcome::AlreadySo, None));
            };
            server.patch(Kind::RoutingPolicy, &object.name, patch).await?;
            Ok((Outcome::Done, None))
        }
        Step::BlockStatus { object, old, new, .. } => {
            let Some(patch) = status_patch(object.uid_only(), old, new) else {
                return Ok((Outcome::AlreadySo, None));
            };
            Ok((Outcome::Done, block_of(server.patch(Kind::PodCIDR, &object.name, patch).await?)))
        }
    }
}

/// The lock: whoever creates the name first has the block. The answer to a repeated create is read back.
async fn create_block<S: Server>(new: &NewBlock, server: &S) -> Answer {
    let name = new.block.object_name();
    let labels: serde_json::Map<String, Value> =
        new.labels.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    let object = json!({
        "apiVersion": api_version(), "kind": Kind::PodCIDR.as_str(),
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "cidr": new.block, "clusterCIDR": &*new.range, "nodeName": &*new.node, "nodeUID": &*new.node_uid,
            "nodeAddresses": new.addresses, "state": "Active",
        },
    });
    match server.create(Kind::PodCIDR, object).await {
        Err(CallError::AlreadyExists) => {}
        answer => return Ok((Outcome::Done, block_of(answer?))),
    }
    let Some(fact) = read_block(server.get(Kind::PodCIDR, &name).await?) else {
        return Ok((Outcome::Refused(format!("PodCIDR {name} exists, but cannot be read")), None));
    };
    let outcome = if fact.node == new.node { Outcome::AlreadySo } else { Outcome::Taken(fact.node.clone()) };
    Ok((outcome, Some(Learnt::Block(Box::new(fact)))))
}

/// Whether a Node of that name exists, asked of the API server and not of a cache.
async fn exists<S: Server>(server: &S, node: &str) -> Result<bool, CallError> {
    match server.get(Kind::Node, node).await {
        Ok(_) => Ok(true),
        Err(CallError::NotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

fn gone_is_success(answer: Result<(), CallError>) -> Answer {
    match answer {
        Ok(()) => Ok((Outcome::Done, None)),
        Err(CallError::NotFound) => Ok((Outcome::AlreadySo, None)),
        Err(error) => Err(error),
    }
}

fn with_finalizers(object: &Version, finalizers: &[String]) -> Value {
    let mut metadata = object.exact();
    metadata["finalizers"] = json!(finalizers);
    metadata
}

fn status_patch<T: serde::Serialize>(metadata: Value, old: &T, new: &T) -> Option<Patch> {
    let status = merge_patch(&json!(old), &json!(new))?;
    Some(Patch::MergeStatus(json!({"metadata": metadata, "status": status})))
}

fn api_version() -> String {
    format!("{}/{}", names::GROUP, names::VERSION)
}

fn read_block(answer: Value) -> Option<BlockFact> {
    BlockFact::read(&serde_json::from_value::<DeserializeGuard<PodCIDR>>(answer).ok()?)
}

fn block_of(answer: Value) -> Option<Learnt> {
    read_block(answer).map(|fact| Learnt::Block(Box::new(fact)))
}

fn range_of(answer: Value) -> Option<Learnt> {
    let object = serde_json::from_value::<DeserializeGuard<ClusterCIDR>>(answer).ok()?;
    Some(Learnt::Range(Box::new(RangeFact::read(&object))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::block;
    use crate::server::Live;
    use crate::step::{BlockChange, Origin};
    use std::cell::RefCell;

    /// Answers with what it is told, and writes down what it is asked.
    #[derive(Default)]
    struct Script {
        nodes: Vec<&'static str>,
        block: Option<Value>,
        create: Option<CallError>,
        fail: Option<CallError>,
        asked: RefCell<Vec<String>>,
    }

    impl Script {
        fn ask<T>(&self, question: String, answer: T) -> Result<T, CallError> {
            self.asked.borrow_mut().push(question);
            self.fail.clone().map_or(Ok(answer), Err)
        }
    }

    impl Server for Script {
        async fn get(&self, kind: Kind, name: &str) -> Result<Value, CallError> {
            self.ask(format!("get {name}"), ())?;
            match kind {
                Kind::Node if self.nodes.contains(&name) => Ok(json!({})),
                Kind::PodCIDR => self.block.clone().ok_or(CallError::NotFound),
                _ => Err(CallError::NotFound),
            }
        }

        async fn list(&self) -> Result<Live, CallError> {
            Err(CallError::NotFound)
        }

        async fn create(&self, _: Kind, object: Value) -> Result<Value, CallError> {
            self.ask(format!("create {}", object["metadata"]["name"]), ())?;
            self.create.clone().map_or(Ok(object), Err)
        }

        async fn patch(&self, _: Kind, name: &str, _: Patch) -> Result<Value, CallError> {
            self.ask(format!("patch {name}"), Value::Null)
        }

        async fn delete(&self, _: Kind, name: &str, only: Preconditions<'_>) -> Result<(), CallError> {
            self.ask(format!("delete {name} {} {:?}", only.uid, only.resource_version), ())
        }
    }

    async fn outcome(step: Step, server: &Script) -> Outcome {
        apply(vec![step], server, |_| {}).await.remove(0).outcome
    }

    fn version() -> Version {
        Version { name: "b".into(), uid: "u".into(), resource_version: "7".into() }
    }

    fn create() -> Step {
        Step::CreateBlock(NewBlock {
            block: block("10.244.1.0/24"),
            range: "r".into(),
            node: "n1".into(),
            node_uid: "u1".into(),
            addresses: vec![],
            labels: vec![],
            origin: Origin::Carved,
        })
    }

    fn existing(node: &str) -> Value {
        json!({"metadata": {"name": "10-244-1-0-24", "uid": "u"}, "spec": {"cidr": "10.244.1.0/24", "clusterCIDR": "r", "nodeName": node}})
    }

    #[tokio::test]
    async fn a_name_that_exists_is_read_back_and_is_ours_or_anothers() {
        let exists = |block| Script { create: Some(CallError::AlreadyExists), block, ..Script::default() };
        assert_eq!(outcome(create(), &exists(Some(existing("n1")))).await, Outcome::AlreadySo);
        assert_eq!(outcome(create(), &exists(Some(existing("n2")))).await, Outcome::Taken("n2".into()));
        assert_eq!(outcome(create(), &exists(None)).await, Outcome::Missing, "it went meanwhile: plan again");
        let learnt = apply(vec![create()], &exists(Some(existing("n2"))), |_| {}).await.remove(0).learnt;
        assert!(
            matches!(learnt, Some(Learnt::Block(fact)) if &*fact.node == "n2"),
            "so that nobody tries it again"
        );
    }

    #[tokio::test]
    async fn nothing_is_let_go_of_while_the_node_exists() {
        let change = BlockChange { release_after: Some(None), ..BlockChange::default() };
        let gone = |why| {
            let (node, node_uid, change) = ("n1".into(), "u1".into(), change.clone());
            Step::ChangeBlock { object: version(), node, node_uid, change, why }
        };
        let delete =
            |living| Step::DeleteBlock { object: version(), node: "n1".into(), living, unproven: None };
        let alive = Script { nodes: vec!["n1"], ..Script::default() };
        for step in [gone(Why::NodeGone), delete(None)] {
            assert!(matches!(outcome(step, &alive).await, Outcome::Stale(_)));
        }
        assert_eq!(*alive.asked.borrow(), ["get n1", "get n1"], "nothing was written");
        for (step, write) in [(gone(Why::NodeGone), "patch b"), (delete(None), r#"delete b u Some("7")"#)] {
            let server = Script::default();
            assert_eq!(outcome(step, &server).await, Outcome::Done);
            assert_eq!(*server.asked.borrow(), ["get n1", write]);
        }
        for step in [gone(Why::Unused), delete(Some("u1".into()))] {
            assert_eq!(outcome(step, &alive).await, Outcome::Done, "a drained block needs no dead node");
        }
    }

    #[tokio::test]
    async fn an_answer_that_does_not_come_is_no_proof_that_the_node_is_gone() {
        let away = Script { fail: Some(CallError::Unknown("timeout".into())), ..Script::default() };
        let delete = Step::DeleteBlock { object: version(), node: "n1".into(), living: None, unproven: None };
        assert_eq!(outcome(delete, &away).await, Outcome::Unknown("timeout".into()));
        assert_eq!(*away.asked.borrow(), ["get n1"]);
    }

    #[tokio::test]
    async fn what_is_so_already_is_a_success() {
        let gone = Script { fail: Some(CallError::NotFound), ..Script::default() };
        let report = Step::DeleteReport { node: "n1".into(), uid: "u".into() };
        assert_eq!(outcome(report, &gone).await, Outcome::AlreadySo);
        let there = Script { create: Some(CallError::AlreadyExists), ..Script::default() };
        assert_eq!(outcome(Step::CreateReport { node: "n1".into() }, &there).await, Outcome::AlreadySo);
        let same = Step::BlockStatus {
            object: version(),
            node: "n1".into(),
            old: Box::default(),
            new: Box::default(),
        };
        let server = Script::default();
        assert_eq!(outcome(same, &server).await, Outcome::AlreadySo);
        assert!(server.asked.borrow().is_empty());
    }

    #[tokio::test]
    async fn an_api_server_that_is_away_is_not_asked_for_every_step() {
        let away = Script { fail: Some(CallError::Unknown("timeout".into())), ..Script::default() };
        let steps = (0..1000).map(|i| Step::CreateReport { node: format!("n{i}").as_str().into() }).collect();
        let done = apply(steps, &away, |_| {}).await;
        let skipped = done.iter().filter(|done| done.outcome == Outcome::Skipped).count();
        assert!(skipped > 900, "{skipped} of {}", done.len());
    }

    #[tokio::test]
    async fn an_api_server_that_asks_to_wait_is_not_asked_for_every_step_either_and_its_wait_is_handed_on() {
        let wait = Duration::from_secs(7);
        let because = Box::new(CallError::Refused("too many requests".into()));
        let busy = Script { fail: Some(CallError::Later { wait, because }), ..Script::default() };
        let steps = (0..1000).map(|i| Step::CreateReport { node: format!("n{i}").as_str().into() }).collect();
        let done = apply(steps, &busy, |_| {}).await;
        let (skipped, refused): (Vec<_>, Vec<_>) =
            done.iter().partition(|done| done.outcome == Outcome::Skipped);
        assert!(skipped.len() > 900, "{} of {}", skipped.len(), done.len());
        let expected = (Outcome::Refused("too many requests".into()), Some(wait));
        assert!(refused.iter().all(|done| (&done.outcome, done.retry_after) == (&expected.0, expected.1)));
    }
}
