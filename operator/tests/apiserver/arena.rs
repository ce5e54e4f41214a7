//! A clean control plane, operators as processes, and words for what tests look at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::api::events::v1::Event;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use plat_crds::digest::Digest;
use plat_crds::pod_cidr::BlockState;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR, RoutingPolicy, condition};
use plat_e2e::light::ControlPlane;
use plat_e2e::wait::{holds, wait_until_async};
use rustix::process::Signal;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Nothing here takes longer unless it is broken.
pub const DEADLINE: Duration = Duration::from_secs(40);

const NAMESPACES: [&str; 2] = ["plat-system", "elsewhere"];

/// Runs a test on the shared control plane, emptied first. One test at a time.
pub fn arena<F: Future<Output = ()>>(test: impl FnOnce(Cluster) -> F + Send) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let plane = ControlPlane::shared();
    plane.block_on(|client| async {
        let cluster = Cluster { plane, client };
        cluster.empty().await;
        test(cluster).await;
    });
}

/// A control plane and an administrator's client.
#[derive(Clone)]
pub struct Cluster {
    pub plane: &'static ControlPlane,
    pub client: Client,
}

/// A PodCIDR, in short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub cidr: String,
    pub node: String,
    pub state: BlockState,
}

impl Cluster {
    pub fn api<K: kube::Resource<DynamicType = ()>>(&self) -> Api<K> {
        Api::all(self.client.clone())
    }

    async fn empty(&self) {
        self.delete_all::<Node>().await;
        self.delete_all::<PodCIDR>().await;
        self.delete_all::<NodeNetwork>().await;
        self.delete_all::<ClusterCIDR>().await;
        self.delete_all::<RoutingPolicy>().await;
        let events: Api<Event> = Api::namespaced(self.client.clone(), "default");
        events.delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
        self.namespaces().await;
        for namespace in NAMESPACES {
            let leases: Api<Lease> = Api::namespaced(self.client.clone(), namespace);
            let _gone = leases.delete("plat-operator", &DeleteParams::default()).await;
        }
    }

    /// The namespaces of the operators' Leases.
    pub async fn namespaces(&self) {
        for namespace in NAMESPACES {
            let object = serde_json::from_value(json!({"metadata": {"name": namespace}})).unwrap();
            let _exists = self.api::<Namespace>().create(&PostParams::default(), &object).await;
        }
    }

    async fn delete_all<K>(&self)
    where
        K: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let api = self.api::<K>();
        api.delete_collection(&DeleteParams::default(), &ListParams::default()).await.unwrap();
        wait_until_async("everything is deleted", DEADLINE, async || {
            let left = api.list(&ListParams::default()).await.unwrap().items;
            for object in &left {
                let name = object.meta().name.clone().unwrap_or_default();
                let patch = json!({"metadata": {"finalizers": null}});
                let _gone = api.patch(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
            }
            holds(left.is_empty(), format!("{} objects", left.len()))
        })
        .await;
    }

    /// Starts an operator named `name` with these flags besides `--cluster-cidr 10.244.0.0/16`-like ones.
    pub fn operator(&self, name: &str, flags: &[&str]) -> Operator {
        Operator::start(self.plane, &self.plane.admin_kubeconfig(), name, flags)
    }

    pub async fn node(&self, name: &str, spec: Value, addresses: &[&str]) -> Node {
        let node: Node = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap();
        self.api::<Node>().create(&PostParams::default(), &node).await.unwrap();
        let addresses: Vec<_> =
            addresses.iter().map(|a| json!({"type": "InternalIP", "address": a})).collect();
        let condition = |type_: &str, status: &str| json!({"type": type_, "status": status, "reason": "Test", "message": ""});
        let conditions = [condition("Ready", "True")];
        self.patch_node_status(name, json!({"addresses": addresses, "conditions": conditions})).await
    }

    pub async fn nodes(&self, names: &[&str]) {
        for (index, name) in names.iter().enumerate() {
            self.node(name, json!({}), &[&format!("172.30.0.{}", 11 + index)]).await;
        }
    }

    pub async fn patch_node_status(&self, name: &str, status: Value) -> Node {
        let patch = Patch::Strategic(json!({"status": status}));
        self.api::<Node>().patch_status(name, &PatchParams::default(), &patch).await.unwrap()
    }

    pub async fn delete_node(&self, name: &str) {
        self.api::<Node>().delete(name, &DeleteParams::default()).await.unwrap();
    }

    pub async fn get_node(&self, name: &str) -> Node {
        self.api::<Node>().get(name).await.unwrap()
    }

    pub async fn range(&self, name: &str, spec: Value) -> ClusterCIDR {
        let object = serde_json::from_value(json!({
            "apiVersion": "plat.network/v1alpha1", "kind": "ClusterCIDR", "metadata": {"name": name}, "spec": spec
        }));
        self.api::<ClusterCIDR>().create(&PostParams::default(), &object.unwrap()).await.unwrap()
    }

    pub async fn blocks(&self) -> Vec<Block> {
        let list = self.api::<PodCIDR>().list(&ListParams::default()).await.unwrap();
        let short = |b: PodCIDR| Block { cidr: b.spec.cidr, node: b.spec.node_name, state: b.spec.state };
        list.items.into_iter().map(short).collect()
    }

    pub async fn block_of(&self, node: &str) -> Option<PodCIDR> {
        let list =
            self.api::<PodCIDR>().list(&ListParams::default().fields(&format!("spec.nodeName={node}"))).await;
        list.unwrap().items.into_iter().next()
    }

    /// Waits until each of these nodes has exactly one active block per family; answers node → blocks.
    pub async fn wait_blocks(&self, nodes: &[&str], families: usize) -> BTreeMap<String, Vec<String>> {
        wait_until_async("every node has its block", DEADLINE, async || {
            let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
            for block in self.blocks().await {
                if block.state == BlockState::Active {
                    map.entry(block.node).or_default().push(block.cidr);
                }
            }
            let complete =
                nodes.iter().all(|node| map.get(*node).is_some_and(|blocks| blocks.len() == families));
            holds(complete, format!("{map:?}")).map(|()| map)
        })
        .await
    }

    /// Waits until a PodCIDR looks as asked.
    pub async fn wait_block(&self, name: &str, what: &str, check: impl Fn(&PodCIDR) -> bool) -> PodCIDR {
        wait_until_async(&format!("block {name}: {what}"), DEADLINE, async || {
            let block = self.api::<PodCIDR>().get(name).await.map_err(|e| e.to_string())?;
            holds(check(&block), format!("{:?} {:?}", block.spec, block.status)).map(|()| block)
        })
        .await
    }

    /// The quarantine of a PodCIDR is over.
    pub async fn end_quarantine(&self, name: &str) {
        let past = Patch::Merge(json!({"spec": {"releaseAfter": "2026-01-01T00:00:00Z"}}));
        self.api::<PodCIDR>().patch(name, &PatchParams::default(), &past).await.unwrap();
    }

    /// Waits until there is no PodCIDR of that name.
    pub async fn wait_gone(&self, name: &str) {
        wait_until_async(&format!("{name} is free"), DEADLINE, async || {
            let block = self.api::<PodCIDR>().get_opt(name).await.unwrap();
            holds(block.is_none(), format!("{block:?}"))
        })
        .await;
    }

    /// Waits until a ClusterCIDR's condition has that status and reason; answers the condition's message.
    pub async fn wait_range(&self, name: &str, type_: &str, status: &str, reason: &str) -> String {
        wait_until_async(&format!("{name} is {type_}={status} ({reason})"), DEADLINE, async || {
            let range = self.api::<ClusterCIDR>().get(name).await.map_err(|e| e.to_string())?;
            let conditions = range.status.unwrap_or_default().conditions;
            let found = condition::find(&conditions, type_).cloned();
            let fits = found.as_ref().is_some_and(|c| c.status == status && c.reason == reason);
            holds(fits, format!("{conditions:?}")).map(|()| found.unwrap().message)
        })
        .await
    }

    /// Waits for an Event about that object; answers its text.
    pub async fn wait_event(&self, kind: &str, name: &str, reason: &str) -> String {
        let events: Api<Event> = Api::namespaced(self.client.clone(), "default");
        wait_until_async(&format!("Event {reason} on {kind} {name}"), DEADLINE, async || {
            let list = events.list(&ListParams::default()).await.map_err(|e| e.to_string())?.items;
            let found = list.iter().find(|event| {
                let about = event.regarding.clone().unwrap_or_default();
                about.kind.as_deref() == Some(kind)
                    && about.name.as_deref() == Some(name)
                    && event.reason.as_deref() == Some(reason)
            });
            let seen = || {
                list.iter().map(|e| {
                    format!("{:?} {:?}", e.regarding.as_ref().and_then(|r| r.name.clone()), e.reason)
                })
            };
            found.and_then(|event| event.note.clone()).ok_or_else(|| seen().collect::<Vec<_>>().join(", "))
        })
        .await
    }

    /// The agent of a node reports that it is programmed, holds these blocks and carries every object.
    pub async fn report(&self, node: &str, held: &[(&str, i64)]) {
        self.report_with(node, held, json!({})).await;
    }

    /// The same, with more fields.
    pub async fn report_with(&self, node: &str, held: &[(&str, i64)], more: Value) {
        wait_until_async("the NodeNetwork exists", DEADLINE, async || {
            self.api::<NodeNetwork>().get(node).await.map(drop).map_err(|e| e.to_string())
        })
        .await;
        let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let condition = |type_: &str| json!({"type": type_, "status": "True", "reason": "Test", "message": "", "lastTransitionTime": now});
        let held: Vec<_> =
            held.iter().map(|(cidr, used)| json!({"cidr": cidr, "used": used, "capacity": 253})).collect();
        let mut status = json!({
            "reportedAt": now, "heldBlocks": held,
            "applied": {"count": 1, "digest": self.digest().await.to_string()},
            "conditions": [condition("RoutesReady"), condition("MasqueradeReady"), condition("CNIReady")],
        });
        status.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let patch = Patch::Merge(json!({"status": status}));
        self.api::<NodeNetwork>().patch_status(node, &PatchParams::default(), &patch).await.unwrap();
    }

    async fn digest(&self) -> Digest {
        let mut digest = Digest::default();
        for block in self.api::<PodCIDR>().list(&ListParams::default()).await.unwrap() {
            digest.add(&block.metadata.uid.unwrap(), block.metadata.generation.unwrap());
        }
        for range in self.api::<ClusterCIDR>().list(&ListParams::default()).await.unwrap() {
            digest.add(&range.metadata.uid.unwrap(), range.metadata.generation.unwrap());
        }
        digest
    }

    /// Panics unless all blocks are disjoint.
    pub async fn assert_disjoint(&self) {
        let blocks = self.blocks().await;
        let parsed: Vec<plat_crds::Block> = blocks.iter().map(|b| b.cidr.parse().unwrap()).collect();
        for (i, one) in parsed.iter().enumerate() {
            assert!(
                parsed[i + 1..].iter().all(|other| !one.overlaps(other)),
                "{one} is there twice: {blocks:?}"
            );
        }
    }

    /// Panics unless all blocks are disjoint and no node has two.
    pub async fn assert_no_double(&self) {
        self.assert_disjoint().await;
        let blocks = self.blocks().await;
        let nodes: BTreeSet<_> = blocks.iter().map(|b| &b.node).collect();
        assert_eq!(nodes.len(), blocks.len(), "a node has two blocks: {blocks:?}");
    }
}

pub fn pod_cidrs(node: &Node) -> Vec<String> {
    node.spec.as_ref().and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default()
}

pub fn condition_of(block: &PodCIDR, type_: &str) -> (String, String) {
    let conditions = block.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    condition::find(conditions, type_).map(|c| (c.status.clone(), c.reason.clone())).unwrap_or_default()
}

pub fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A running operator; killed when dropped.
pub struct Operator {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Operator {
    pub fn start(plane: &ControlPlane, kubeconfig: &Path, name: &str, flags: &[&str]) -> Operator {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let stem = format!("operator-{name}-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let (socket, log) = (
            std::env::temp_dir().join(format!("{stem}-{}.sock", std::process::id())),
            plane.run_folder().join(format!("{stem}.log")),
        );
        // For measurements, another build of the same program.
        let built =
            std::env::var("PLAT_OPERATOR").unwrap_or_else(|_| env!("CARGO_BIN_EXE_plat-operator").to_owned());
        // Nodes here are Ready and have no agents: nobody would end the wait for their reports.
        let defaults = ["--report-wait-seconds=1", "--withdrawal-deadline-seconds=0"];
        let given = |default: &&&str| {
            let name = default.split('=').next().unwrap_or_default();
            flags.iter().any(|flag| flag.starts_with(name))
        };
        let mut command: Command = plane.command(&built);
        command
            .env("KUBECONFIG", kubeconfig)
            .args(["--log-level=info,plat_operator=debug,kube_client=off", "--pod-name", name, "--socket"])
            .arg(&socket)
            .args(flags)
            .args(defaults.iter().filter(|default| !given(default)))
            .stdout(File::create(&log).unwrap())
            .stderr(Stdio::inherit());
        Operator { child: command.spawn().unwrap(), socket, log }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// What a probe answers.
    pub fn ask(&self, path: &str) -> Result<String, String> {
        plat_operator::http::probe(&self.socket, path).map_err(|error| format!("{error:#}"))
    }

    /// The value of a metric, by the whole text before it.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let text = self.ask("/metrics").ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Waits until a metric has that value.
    pub async fn wait_metric(&self, name: &str, expected: f64) {
        wait_until_async(&format!("{name} is {expected}"), DEADLINE, async || {
            let value = self.metric(name);
            holds(value == Some(expected), format!("{value:?}"))
        })
        .await;
    }

    pub async fn wait_ready(&self) {
        wait_until_async("the operator is ready", DEADLINE, async || self.ask("/readyz")).await;
    }

    pub async fn wait_log(&self, words: &str) {
        wait_until_async(&format!("'{words}' in the log"), DEADLINE, async || {
            let log = self.log();
            holds(log.contains(words), log)
        })
        .await;
    }

    /// SIGTERM, and how it ends.
    pub async fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait_end().await
    }

    /// SIGSTOP: it does nothing, and does not know it.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT: it goes on as if nothing had been.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub async fn wait_end(&mut self) -> ExitStatus {
        wait_until_async("the operator has ended", DEADLINE, async || match self.child.try_wait() {
            Ok(Some(status)) => Ok(status),
            _ => Err("it runs"),
        })
        .await
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
        let _gone = std::fs::remove_file(&self.socket);
        if std::thread::panicking() {
            eprintln!("---- {}\n{}", self.log.display(), self.log());
        }
    }
}
