//! Publishes Events, one after the other: they are for people, and must not hold up blocks.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use plat_crds::names;
use tokio::sync::mpsc::Receiver;
use tracing::warn;

use crate::note::Note;
use crate::step::Kind;

/// Events that may wait; more are dropped and counted.
pub const QUEUE: usize = 8192;
/// An Event that takes longer is given up.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The recorder remembers what it published, to count repetitions, for six minutes. After so many Events it
/// is replaced, so that thousands of new nodes do not stay in memory.
const RENEW_AFTER: usize = 512;
/// Bound of `note` in events.k8s.io/v1.
const MAX_NOTE: usize = 1024;

/// Publishes until the queue is closed.
pub async fn publish(client: Client, instance: String, mut queue: Receiver<Note>) {
    let reporter = Reporter { controller: names::OPERATOR_MANAGER.to_owned(), instance: Some(instance) };
    let mut recorder = Recorder::new(client.clone(), reporter.clone());
    let mut published = 0;
    while let Some(note) = queue.recv().await {
        published += 1;
        if published % RENEW_AFTER == 0 {
            recorder = Recorder::new(client.clone(), reporter.clone());
        }
        match tokio::time::timeout(TIMEOUT, recorder.publish(&event(&note), &reference(&note))).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                warn!(%error, object = &*note.object.name, reason = note.reason, "cannot publish an Event")
            }
            Err(_) => warn!(object = &*note.object.name, reason = note.reason, "no answer to an Event"),
        }
    }
}

fn event(note: &Note) -> Event {
    Event {
        type_: if note.warning { EventType::Warning } else { EventType::Normal },
        reason: note.reason.clone(),
        note: Some(note.text.chars().take(MAX_NOTE).collect()),
        action: note.action.to_owned(),
        secondary: None,
    }
}

fn reference(note: &Note) -> ObjectReference {
    let api_version = match note.object.kind {
        Kind::Node => "v1".to_owned(),
        Kind::ClusterCIDR | Kind::PodCIDR | Kind::RoutingPolicy | Kind::NodeNetwork => {
            format!("{}/{}", names::GROUP, names::VERSION)
        }
    };
    ObjectReference {
        api_version: Some(api_version),
        kind: Some(note.object.kind.as_str().to_owned()),
        name: Some(note.object.name.to_string()),
        uid: Some(note.object.uid.to_string()).filter(|uid| !uid.is_empty()),
        ..ObjectReference::default()
    }
}
