//! A control plane with Node objects, a contender, and a watch that sees who has got a block and when.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::{AsyncBufReadExt, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::Resource as _;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Request, WatchParams};
use plat_crds::digest::Digest;
use plat_crds::{ClusterCIDR, NodeNetwork, PodCIDR};
use plat_e2e::light::{Bound, ControlPlane};
use plat_e2e::testbed::output;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::sleep;

use crate::contender::{Running, Who};
use crate::objects;

/// Requests in flight when many objects are made.
const AT_ONCE: usize = 48;
/// Nothing here takes longer unless it is broken.
const DEADLINE: Duration = Duration::from_secs(900);
/// How often what the watch has seen is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// The account that contenders act as, with every right: whom the audit log names.
pub const ACCOUNT: &str = "system:serviceaccount:default:contender";

/// A control plane and one contender's work in it.
pub struct Stage<'a> {
    plane: &'a ControlPlane,
    client: Client,
    operator: PathBuf,
    kubeconfig: PathBuf,
    who: Who,
    sight: Rc<RefCell<Sight>>,
    /// Nodes that exist: name → uid and number.
    nodes: BTreeMap<String, String>,
    created: usize,
}

/// What the watch has seen.
#[derive(Debug, Default)]
pub struct Sight {
    /// Node uid → its block, and when it was first seen.
    pub blocks: BTreeMap<String, (String, Instant)>,
    /// PodCIDRs (object name → uid, generation).
    objects: BTreeMap<String, (String, i64)>,
    /// Events of the watch, and their bytes.
    pub events: u64,
    /// Bytes of the events.
    pub bytes: u64,
    /// When the last one came.
    pub last: Option<Instant>,
    broken: Option<String>,
}

#[derive(Deserialize)]
struct Line {
    #[serde(rename = "type")]
    type_: String,
    object: Seen,
}

#[derive(Deserialize)]
struct Seen {
    metadata: Meta,
    #[serde(default)]
    spec: Spec,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    #[serde(default)]
    name: String,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    generation: i64,
    #[serde(default)]
    resource_version: String,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    #[serde(default, rename = "podCIDR")]
    pod_cidr: String,
    #[serde(default)]
    cidr: String,
    #[serde(default, rename = "nodeUID")]
    node_uid: String,
    #[serde(default)]
    state: String,
}

impl Sight {
    /// Takes one line of a watch in: a PodCIDR is for its node's uid, a Node with a podCIDR for its own. Answers the
    /// object's version.
    fn take(&mut self, text: &str) -> Option<String> {
        let now = Instant::now();
        self.events += 1;
        self.bytes += u64::try_from(text.len()).unwrap_or_default();
        self.last = Some(now);
        let line: Line = match serde_json::from_str(text) {
            Ok(line) => line,
            Err(error) => {
                self.broken = Some(format!("{error}: {text}"));
                return None;
            }
        };
        let (meta, spec) = (line.object.metadata, line.object.spec);
        if line.type_ == "DELETED" {
            self.objects.remove(&meta.name);
            return Some(meta.resource_version);
        }
        if !spec.cidr.is_empty() {
            self.objects.insert(meta.name.clone(), (meta.uid.clone(), meta.generation));
            if spec.state == "Active" {
                self.blocks.entry(spec.node_uid).or_insert((spec.cidr, now));
            }
        } else if !spec.pod_cidr.is_empty() {
            self.blocks.entry(meta.uid.clone()).or_insert((spec.pod_cidr, now));
        }
        Some(meta.resource_version)
    }
}

impl<'a> Stage<'a> {
    /// Prepares an empty cluster for a contender.
    pub async fn new(
        plane: &'a ControlPlane,
        client: Client,
        who: Who,
        operator: &Path,
    ) -> Result<Stage<'a>> {
        plane.install_crds()?;
        for object in [
            vec!["create", "serviceaccount", "contender", "-n", "default"],
            vec![
                "create",
                "clusterrolebinding",
                "contender",
                "--clusterrole=cluster-admin",
                "--serviceaccount=default:contender",
            ],
        ] {
            plane.kubectl(&object)?;
        }
        let kubeconfig = plane.kubeconfig("contender", &plane.token("default", "contender", Bound::Free)?)?;
        let sight = Rc::new(RefCell::new(Sight::default()));
        Ok(Stage {
            plane,
            client,
            operator: operator.to_owned(),
            kubeconfig,
            who,
            sight,
            nodes: BTreeMap::new(),
            created: 0,
        })
    }

    /// Watches the objects that carry blocks as an agent does: everything, from now on. The API server ends a watch
    /// whose reader is slow, as this one is while it makes thousands of objects; it goes on from where it was.
    pub async fn watch(&self) -> Result<()> {
        let path = match self.who {
            Who::Plat(_) => PodCIDR::url_path(&(), None),
            Who::NodeIpam(_) => Node::url_path(&(), None),
        };
        let request = Request::new(&path).list(&ListParams::default().limit(1))?;
        let list: Value = self.client.request(request).await?;
        let mut version = list["metadata"]["resourceVersion"].as_str().unwrap_or("0").to_owned();
        let params = WatchParams { bookmarks: false, timeout: Some(3600), ..WatchParams::default() };
        let (client, sight) = (self.client.clone(), self.sight.clone());
        tokio::task::spawn_local(async move {
            let broken = loop {
                if let Err(error) = follow(&client, &path, &params, &mut version, &sight).await {
                    break error;
                }
            };
            sight.borrow_mut().broken.get_or_insert(format!("{broken:#}"));
        });
        Ok(())
    }

    /// The Node objects that exist.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// Starts the contender. [`Stage::watch`] must have been called.
    pub fn start(&self) -> Result<Running> {
        self.who.start(self.plane, &self.operator, &self.kubeconfig)
    }

    /// Starts it with other flags than the stage's.
    pub fn start_with(&self, flags: &[&'static str]) -> Result<Running> {
        Who::Plat(flags.to_vec()).start(self.plane, &self.operator, &self.kubeconfig)
    }

    /// Creates so many new nodes, as fast as the API server takes them.
    pub async fn create(&mut self, count: usize) -> Result<Vec<String>> {
        let first = self.created;
        self.created += count;
        let made: Vec<(String, String)> = futures::stream::iter(first..first + count)
            .map(|number| {
                let client = self.client.clone();
                async move {
                    let name = format!("node-{number:05}");
                    let body = objects::node(&name, number).to_string().into_bytes();
                    let request =
                        Request::new(Node::url_path(&(), None)).create(&PostParams::default(), body)?;
                    let answer: Answer = client.request(request).await?;
                    anyhow::Ok((name, answer.metadata.uid))
                }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        let uids = made.iter().map(|(_, uid)| uid.clone()).collect();
        self.nodes.extend(made);
        Ok(uids)
    }

    /// Deletes the first so many nodes.
    pub async fn delete(&mut self, count: usize) -> Result<()> {
        let names: Vec<String> = self.nodes.keys().take(count).cloned().collect();
        for name in &names {
            self.nodes.remove(name);
        }
        self.for_each(names, |client, name| async move {
            let request = Request::new(Node::url_path(&(), None)).delete(&name, &DeleteParams::default())?;
            client.request_text(request).await?;
            Ok(())
        })
        .await
    }

    /// Every kubelet says that its node is Ready.
    pub async fn make_ready(&self) -> Result<()> {
        let names = self.nodes.keys().cloned().collect();
        self.for_each(names, |client, name| async move {
            let patch = Patch::Strategic(objects::ready());
            let request = Request::new(Node::url_path(&(), None)).patch_subresource(
                "status",
                &name,
                &PatchParams::default(),
                &patch,
            )?;
            client.request_text(request).await?;
            Ok(())
        })
        .await
    }

    async fn for_each<F: Future<Output = Result<()>>>(
        &self,
        names: Vec<String>,
        act: impl Fn(Client, String) -> F,
    ) -> Result<()> {
        let acts = names.into_iter().map(|name| act(self.client.clone(), name));
        futures::stream::iter(acts).buffer_unordered(AT_ONCE).try_collect().await
    }

    /// Waits until nodes of these uids have their blocks; when the first and the last of them was seen.
    pub async fn wait_blocks(&self, uids: &[String]) -> Result<(Instant, Instant)> {
        let begin = Instant::now();
        loop {
            {
                let sight = self.sight.borrow();
                if let Some(why) = &sight.broken {
                    bail!("{why}");
                }
                let seen: Option<Vec<Instant>> =
                    uids.iter().map(|uid| sight.blocks.get(uid).map(|(_, at)| *at)).collect();
                if let Some(seen) = seen {
                    let first = seen.iter().min().context("no nodes to wait for")?;
                    return Ok((*first, *seen.iter().max().unwrap_or(first)));
                }
            }
            ensure!(begin.elapsed() < DEADLINE, "not every node has got a block within {DEADLINE:?}");
            sleep(LOOK).await;
        }
    }

    /// Waits until nothing has changed about blocks for that long.
    pub async fn wait_quiet(&self, for_so_long: Duration) -> Result<()> {
        let begin = Instant::now();
        while self.sight.borrow().last.is_some_and(|last| last.elapsed() < for_so_long) {
            ensure!(begin.elapsed() < DEADLINE, "blocks still change after {DEADLINE:?}");
            sleep(LOOK * 10).await;
        }
        Ok(())
    }

    /// Events of the watch up to now, and their bytes.
    pub fn events(&self) -> (u64, u64) {
        let sight = self.sight.borrow();
        (sight.events, sight.bytes)
    }

    /// Waits until every node has a NodeNetwork, which the operator makes.
    pub async fn wait_reports_wanted(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            let request =
                Request::new(NodeNetwork::url_path(&(), None)).list(&ListParams::default().limit(1))?;
            let list: Value = self.client.request(request).await?;
            let more = list["metadata"]["remainingItemCount"].as_u64().unwrap_or(0);
            let there = list["items"].as_array().map_or(0, Vec::len) as u64;
            if there + more >= self.nodes.len() as u64 {
                return Ok(());
            }
            ensure!(begin.elapsed() < DEADLINE, "not every node has a NodeNetwork within {DEADLINE:?}");
            sleep(LOOK * 20).await;
        }
    }

    /// The agents of the first so many nodes report that they are programmed, and carry all blocks. `per_second`
    /// bounds them, as agents are by themselves; `None` is the moment when all have just started.
    pub async fn report(&self, count: usize, used: usize, per_second: Option<u32>) -> Result<()> {
        let nodes = self.nodes.iter().take(count).collect();
        self.report_of(nodes, used, per_second).await
    }

    /// The agents of the newest so many nodes report the same.
    pub async fn report_of_newest(&self, count: usize) -> Result<()> {
        self.report_of(self.nodes.iter().rev().take(count).collect(), 0, None).await
    }

    async fn report_of(
        &self,
        nodes: Vec<(&String, &String)>,
        used: usize,
        per_second: Option<u32>,
    ) -> Result<()> {
        let (sum, objects) = self.sum().await?;
        let reports: Vec<(String, Value)> = {
            let sight = self.sight.borrow();
            let held = |uid: &String| sight.blocks.get(uid).map(|(cidr, _)| cidr.as_str());
            let report = |(name, uid): (&String, &String)| {
                (name.clone(), objects::report(name, held(uid), used, sum, objects))
            };
            nodes.into_iter().map(report).collect()
        };
        let begin = Instant::now();
        let acts = reports.into_iter().enumerate().map(|(number, (name, report))| {
            let client = self.client.clone();
            async move {
                if let Some(rate) = per_second {
                    let due = begin + Duration::from_secs_f64(number as f64 / f64::from(rate));
                    tokio::time::sleep_until(due.into()).await;
                }
                let patch = Patch::Apply(report);
                let how = PatchParams::apply("plat-agent").force();
                let request = Request::new(NodeNetwork::url_path(&(), None))
                    .patch_subresource("status", &name, &how, &patch)?;
                client.request_text(request).await?;
                anyhow::Ok(())
            }
        });
        futures::stream::iter(acts).buffer_unordered(AT_ONCE).try_collect().await
    }

    /// The sum over all PodCIDRs and ClusterCIDRs, as agents make it, and how many they are.
    async fn sum(&self) -> Result<(Digest, usize)> {
        let ranges: Value = self
            .client
            .request(Request::new(ClusterCIDR::url_path(&(), None)).list(&ListParams::default())?)
            .await?;
        let ranges = ranges["items"].as_array().cloned().unwrap_or_default();
        let mut sum = Digest::default();
        for range in &ranges {
            let meta = &range["metadata"];
            sum.add(
                meta["uid"].as_str().unwrap_or_default(),
                meta["generation"].as_i64().unwrap_or_default(),
            );
        }
        let sight = self.sight.borrow();
        for (uid, generation) in sight.objects.values() {
            sum.add(uid, *generation);
        }
        Ok((sum, ranges.len() + sight.objects.len()))
    }

    /// Panics unless every node has a block and none has another's.
    pub fn check_blocks(&self) -> Result<()> {
        let sight = self.sight.borrow();
        let mut seen = BTreeMap::new();
        for (name, uid) in &self.nodes {
            let (cidr, _) = sight.blocks.get(uid).with_context(|| format!("node {name} has no block"))?;
            if let Some(other) = seen.insert(cidr, name) {
                bail!("nodes {other} and {name} both have block {cidr}");
            }
        }
        Ok(())
    }

    /// The last lines of the contender's log, for when something went wrong.
    pub fn log(&self) -> String {
        let name = match self.who {
            Who::Plat(_) => "plat-operator.log",
            Who::NodeIpam(_) => "kube-controller-manager.log",
        };
        let path = self.plane.run_folder().join(name);
        output(std::process::Command::new("tail").arg("-n20").arg(path)).unwrap_or_default()
    }
}

#[derive(Deserialize)]
struct Answer {
    metadata: Meta,
}

/// One watch, to its end; `version` is where the next one goes on.
async fn follow(
    client: &Client,
    path: &str,
    params: &WatchParams,
    version: &mut String,
    sight: &RefCell<Sight>,
) -> Result<()> {
    let mut lines = client.request_stream(Request::new(path).watch(params, version)?).await?.lines();
    while let Some(line) = lines.next().await {
        // A connection that ends in the middle of a line is as good as one that ends behind it.
        let Ok(line) = line else { break };
        if let Some(at) = sight.borrow_mut().take(&line) {
            *version = at;
        }
    }
    Ok(())
}
