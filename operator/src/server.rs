//! The seam to the API server: five verbs. [`crate::kube_server`] is the real one; the tests have a
//! simulated one with lost answers, stale reads and crashes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::facts::{BlockFact, Name, RangeFact};
use crate::memory::Listed;
use crate::step::Kind;

/// Why a call did not answer with what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// An object of that name exists (POST only).
    #[error("an object of that name exists already")]
    AlreadyExists,
    /// There is no such object.
    #[error("there is no such object")]
    NotFound,
    /// A precondition (uid, resourceVersion) does not hold.
    #[error("the object has changed: {0}")]
    Conflict(String),
    /// The API server said no; nothing was written.
    #[error("the API server refused: {0}")]
    Refused(String),
    /// Nobody knows whether it was done: no answer, or one that does not say.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
    /// One of those, and the API server says when to ask again (`Retry-After`).
    #[error("{because}; it asks to wait {wait:?}")]
    Later {
        /// How long to wait.
        wait: Duration,
        /// What happened to the request.
        because: Box<CallError>,
    },
    /// Nothing was sent, as this process does not lead any more.
    #[error("not sent: this process does not lead any more")]
    NotLeader,
}

impl CallError {
    /// How long the API server asks to wait.
    pub fn wait(&self) -> Option<Duration> {
        match self {
            CallError::Later { wait, .. } => Some(*wait),
            _ => None,
        }
    }
}

/// What a patch changes.
#[derive(Clone, Debug, PartialEq)]
pub enum Patch {
    /// JSON merge patch (RFC 7386) of the object.
    Merge(Value),
    /// JSON merge patch of its status subresource.
    MergeStatus(Value),
    /// Strategic merge patch of its status subresource: for a Node's conditions, a list that others write
    /// to as well.
    StrategicStatus(Value),
}

/// Conditions of a delete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preconditions<'a> {
    /// Uid that the object must have.
    pub uid: &'a str,
    /// resourceVersion that it must have.
    pub resource_version: Option<&'a str>,
}

/// Live LISTs (quorum reads) of ranges and blocks.
#[derive(Clone, Debug)]
pub struct Live {
    /// ClusterCIDRs.
    pub ranges: Listed<RangeFact>,
    /// PodCIDRs.
    pub blocks: Listed<BlockFact>,
}

impl Live {
    /// Facts by name.
    pub fn by_name<F: crate::facts::Fact>(facts: impl IntoIterator<Item = F>) -> BTreeMap<Name, Arc<F>> {
        facts.into_iter().map(|fact| (fact.name().clone(), Arc::new(fact))).collect()
    }
}

/// An API server.
#[expect(async_fn_in_trait, reason = "every caller is in this crate and runs on one thread")]
pub trait Server {
    /// GET.
    async fn get(&self, kind: Kind, name: &str) -> Result<Value, CallError>;
    /// LIST of ranges, then of blocks.
    async fn list(&self) -> Result<Live, CallError>;
    /// POST; answers with the object, or `null` where nobody needs it.
    async fn create(&self, kind: Kind, object: Value) -> Result<Value, CallError>;
    /// PATCH; answers with the object, or `null` where nobody needs it.
    async fn patch(&self, kind: Kind, name: &str, patch: Patch) -> Result<Value, CallError>;
    /// DELETE.
    async fn delete(&self, kind: Kind, name: &str, only: Preconditions<'_>) -> Result<(), CallError>;
}
