//! Somebody who watches every PodCIDR at the API server itself, past all proxies, and judges each event: no two
//! blocks overlap, at no time, and a block goes to another node only after it has rested.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, Client};
use plat_crds::pod_cidr::BlockState;
use plat_crds::{Block, PodCIDR};
use plat_e2e::wait::{holds, wait_until_async};

use crate::arena::DEADLINE;

/// A watching task and what it has seen. The task ends with this or with the test's runtime.
pub struct Observer {
    seen: Arc<Mutex<Seen>>,
    client: Client,
    task: tokio::task::JoinHandle<()>,
}

/// What has been seen so far.
#[derive(Default)]
struct Seen {
    /// How long a block rests that nobody has released.
    quarantine: Duration,
    blocks: BTreeMap<String, Holding>,
    past: Vec<Past>,
    allocations: usize,
    /// Blocks that went to a node other than the one before.
    changes_of_hands: usize,
    version: u64,
    wrong: Vec<String>,
}

#[derive(Clone, Debug)]
struct Holding {
    block: Block,
    node: String,
    state: BlockState,
    release_after: Option<Timestamp>,
}

#[derive(Debug)]
struct Past {
    last: Holding,
    gone: Instant,
    /// It had rested until its time when it went.
    rested: bool,
}

impl Observer {
    /// Watches from now on. `quarantine` is that of the ranges.
    pub async fn start(client: &Client, quarantine: Duration) -> Observer {
        let seen = Arc::new(Mutex::new(Seen { quarantine, ..Seen::default() }));
        let api: Api<PodCIDR> = Api::all(client.clone());
        let list = api.list(&ListParams::default()).await.unwrap();
        let version = list.metadata.resource_version.clone().unwrap();
        list.items.iter().for_each(|block| seen.lock().unwrap().put(block));
        let task = tokio::spawn(watch(api, version, seen.clone()));
        Observer { seen, client: client.clone(), task }
    }

    /// Blocks given to nodes since the start.
    pub fn allocations(&self) -> usize {
        self.seen.lock().unwrap().allocations
    }

    /// Those of them that another node had before.
    pub fn changes_of_hands(&self) -> usize {
        self.seen.lock().unwrap().changes_of_hands
    }

    /// Panics if anything was wrong up to now.
    pub fn check(&self) {
        let seen = self.seen.lock().unwrap();
        assert!(seen.wrong.is_empty(), "{}", seen.wrong.join("\n"));
        drop(seen);
        assert!(!self.task.is_finished(), "the observer has ended");
    }

    /// Waits until everything that has happened by now was seen, and panics if anything was wrong.
    pub async fn finish(self) {
        let list = Api::<PodCIDR>::all(self.client.clone()).list(&ListParams::default()).await.unwrap();
        let newest = list.items.iter().map(version_of).max().unwrap_or(0);
        wait_until_async("the observer has seen everything", DEADLINE, async || {
            let version = self.seen.lock().unwrap().version;
            holds(version >= newest, format!("{version} < {newest}"))
        })
        .await;
        self.check();
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn version_of(block: &PodCIDR) -> u64 {
    block.metadata.resource_version.as_deref().unwrap_or_default().parse().unwrap()
}

async fn watch(api: Api<PodCIDR>, mut version: String, seen: Arc<Mutex<Seen>>) {
    loop {
        let Ok(events) = api.watch(&WatchParams::default(), &version).await else {
            // The API server is away: nothing is missed, as the watch goes on from where it was.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let mut events = std::pin::pin!(events);
        while let Ok(Some(event)) = events.try_next().await {
            let mut seen = seen.lock().unwrap();
            match event {
                WatchEvent::Added(block) | WatchEvent::Modified(block) => {
                    version = block.metadata.resource_version.clone().unwrap();
                    seen.put(&block);
                }
                WatchEvent::Deleted(block) => {
                    version = block.metadata.resource_version.clone().unwrap();
                    seen.remove(&block);
                }
                WatchEvent::Bookmark(mark) => version = mark.metadata.resource_version,
                WatchEvent::Error(status) => {
                    seen.wrong.push(format!("the observer lost its place: {status:?}"));
                    return;
                }
            }
        }
    }
}

impl Seen {
    fn put(&mut self, object: &PodCIDR) {
        let name = object.metadata.name.clone().unwrap();
        self.version = version_of(object);
        let holding = Holding {
            block: object.spec.cidr.parse().unwrap(),
            node: object.spec.node_name.clone(),
            state: object.spec.state,
            release_after: object.spec.release_after.as_ref().map(|Time(at)| *at),
        };
        for (other, held) in self.blocks.iter().filter(|(other, _)| **other != name) {
            if held.block.overlaps(&holding.block) {
                self.wrong.push(format!("{name} ({holding:?}) overlaps {other} ({held:?})"));
            }
        }
        match self.blocks.insert(name.clone(), holding.clone()) {
            Some(before) if before.node != holding.node => {
                self.wrong.push(format!("{name} went from {before:?} to {holding:?} in one step"));
            }
            Some(_) => {}
            None => self.allocated(&name, &holding),
        }
    }

    fn allocated(&mut self, name: &str, holding: &Holding) {
        self.allocations += 1;
        let touched = |past: &Past| past.last.block.overlaps(&holding.block);
        for past in self.past.iter().filter(|past| touched(past) && past.last.node != holding.node) {
            self.changes_of_hands += 1;
            if !past.rested && past.gone.elapsed() < self.quarantine {
                self.wrong.push(format!("{name} went to {} without a rest: {past:?}", holding.node));
            }
        }
        self.past.retain(|past| !touched(past));
    }

    fn remove(&mut self, object: &PodCIDR) {
        self.version = version_of(object);
        if let Some(last) = self.blocks.remove(object.metadata.name.as_deref().unwrap_or_default()) {
            let over = last.release_after.is_some_and(|at| at <= Timestamp::now());
            let rested = last.state == BlockState::Quarantined && over;
            self.past.push(Past { last, gone: Instant::now(), rested });
        }
    }
}

#[test]
fn the_observer_sees_overlap_and_blocks_that_change_hands_unrested() {
    let mut seen = Seen { quarantine: Duration::from_secs(60), ..Seen::default() };
    let object = |cidr: &str, node: &str, state: &str, release: Option<&str>| -> PodCIDR {
        let name = cidr.parse::<Block>().unwrap().object_name();
        serde_json::from_value(serde_json::json!({
            "apiVersion": "plat.network/v1alpha1", "kind": "PodCIDR",
            "metadata": {"name": name, "resourceVersion": "1"},
            "spec": {"cidr": cidr, "clusterCIDR": "r", "nodeName": node, "state": state, "releaseAfter": release},
        }))
        .unwrap()
    };
    let wrong = |seen: &mut Seen| std::mem::take(&mut seen.wrong).len();
    seen.put(&object("10.0.0.0/24", "a", "Active", None));
    seen.put(&object("10.0.1.0/24", "b", "Active", None));
    assert_eq!(wrong(&mut seen), 0);
    seen.put(&object("10.0.1.0/25", "a", "Active", None));
    assert_eq!(wrong(&mut seen), 1, "part of b's");
    seen.remove(&object("10.0.1.0/25", "a", "Active", None));
    seen.put(&object("10.0.0.0/24", "c", "Active", None));
    assert_eq!(wrong(&mut seen), 1, "another node in one step");
    seen.remove(&object("10.0.0.0/24", "c", "Active", None));
    seen.put(&object("10.0.0.0/24", "c", "Active", None));
    assert_eq!(wrong(&mut seen), 0, "its own again");
    seen.remove(&object("10.0.0.0/24", "c", "Active", None));
    seen.put(&object("10.0.0.0/24", "d", "Active", None));
    assert_eq!(wrong(&mut seen), 1, "deleted under c");
    seen.put(&object("10.0.0.0/24", "d", "Quarantined", Some("2026-01-01T00:00:00Z")));
    seen.remove(&object("10.0.0.0/24", "d", "Quarantined", None));
    seen.put(&object("10.0.0.0/24", "e", "Active", None));
    assert_eq!((wrong(&mut seen), seen.changes_of_hands), (0, 2), "after its rest");
}
