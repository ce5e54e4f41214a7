//! The real API server.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use axum::http::header::RETRY_AFTER;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::{DeleteParams, GetParams, ListParams, PatchParams, PostParams};
use kube::client::Body;
use kube::core::{DeserializeGuard, ObjectList, Request, Status};
use kube::{Api, Client, Resource};
use plat_crds::{Block, ClusterCIDR, NodeNetwork, PodCIDR, RoutingPolicy, names};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tracing::{debug, warn};

use crate::facts::{BlockFact, Fact, RangeFact};
use crate::lease::Leadership;
use crate::memory::Listed;
use crate::server::{CallError, Live, Patch, Preconditions, Server};
use crate::snapshot::Foreign;
use crate::step::Kind;

/// No call takes longer. Shorter than the time between a lost Lease and its next holder (lease duration less
/// renew deadline: 5 s by default).
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// However long the API server, or something before it, asks to wait: nodes wait for their blocks meanwhile.
pub const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Objects per page of a LIST.
const PAGE: u32 = 250;

/// A client that writes only while this process leads.
#[derive(Clone)]
pub struct KubeServer {
    client: Client,
    leadership: Arc<Leadership>,
}

impl KubeServer {
    /// A server behind a client.
    pub fn new(client: Client, leadership: Arc<Leadership>) -> KubeServer {
        KubeServer { client, leadership }
    }

    async fn send(
        &self,
        request: Result<axum::http::Request<Vec<u8>>, kube::core::request::Error>,
    ) -> Result<String, CallError> {
        let request = request.map_err(|error| CallError::Refused(error.to_string()))?;
        tokio::time::timeout(CALL_TIMEOUT, self.exchange(request.map(Body::from)))
            .await
            .unwrap_or_else(|_| Err(CallError::Unknown(format!("no answer within {CALL_TIMEOUT:?}"))))
    }

    /// The client's own way of reading an answer drops its headers.
    async fn exchange(&self, request: axum::http::Request<Body>) -> Result<String, CallError> {
        let (head, body) = self.client.send(request).await.map_err(classify)?.into_parts();
        let body = body.collect_bytes().await.map_err(classify)?;
        let text = String::from_utf8_lossy(&body).into_owned();
        if head.status.is_success() {
            return Ok(text);
        }
        let status = serde_json::from_str(&text)
            .unwrap_or_else(|_| Status::failure(text.trim(), "").with_code(head.status.as_u16()));
        let wait = retry_after(&head.headers);
        let error = classify(kube::Error::Api(Box::new(status)));
        Err(match wait {
            Some(wait) => CallError::Later { wait, because: Box::new(error) },
            None => error,
        })
    }

    fn may_write(&self) -> Result<(), CallError> {
        if self.leadership.holds() { Ok(()) } else { Err(CallError::NotLeader) }
    }

    async fn list_all<K, F>(
        &self,
        read: impl Fn(&DeserializeGuard<K>) -> Option<F>,
    ) -> Result<Listed<F>, CallError>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
        F: Fact,
    {
        let mut facts = Vec::new();
        let mut params = ListParams::default().limit(PAGE);
        loop {
            let text = self.send(Request::new(K::url_path(&(), None)).list(&params)).await?;
            let page: ObjectList<DeserializeGuard<K>> = parse(&text)?;
            facts.extend(page.items.iter().filter_map(&read));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => {
                    let resource_version = page.metadata.resource_version.unwrap_or_default();
                    return Ok(Listed { facts: Live::by_name(facts), resource_version });
                }
            }
        }
    }
}

impl Server for KubeServer {
    async fn get(&self, kind: Kind, name: &str) -> Result<Value, CallError> {
        let text = self.send(request(kind).get(name, &GetParams::default())).await?;
        parse(&text)
    }

    async fn list(&self) -> Result<Live, CallError> {
        let ranges = self.list_all::<ClusterCIDR, _>(|object| Some(RangeFact::read(object))).await?;
        let blocks = self.list_all::<PodCIDR, _>(BlockFact::read).await?;
        Ok(Live { ranges, blocks })
    }

    async fn create(&self, kind: Kind, object: Value) -> Result<Value, CallError> {
        self.may_write()?;
        let how =
            PostParams { field_manager: Some(names::OPERATOR_MANAGER.to_owned()), ..PostParams::default() };
        let body = object.to_string().into_bytes();
        parse(&self.send(request(kind).create(&how, body)).await?)
    }

    async fn patch(&self, kind: Kind, name: &str, patch: Patch) -> Result<Value, CallError> {
        self.may_write()?;
        let how =
            PatchParams { field_manager: Some(names::OPERATOR_MANAGER.to_owned()), ..PatchParams::default() };
        let to = request(kind);
        let request = match &patch {
            Patch::Merge(body) => to.patch(name, &how, &kube::api::Patch::Merge(body)),
            Patch::MergeStatus(body) => {
                to.patch_subresource("status", name, &how, &kube::api::Patch::Merge(body))
            }
            Patch::StrategicStatus(body) => {
                to.patch_subresource("status", name, &how, &kube::api::Patch::Strategic(body))
            }
        };
        let text = self.send(request).await?;
        // A Node is large, and nobody needs the answer.
        if kind == Kind::Node { Ok(Value::Null) } else { parse(&text) }
    }

    async fn delete(&self, kind: Kind, name: &str, only: Preconditions<'_>) -> Result<(), CallError> {
        self.may_write()?;
        let preconditions = kube::api::Preconditions {
            uid: Some(only.uid.to_owned()),
            resource_version: only.resource_version.map(str::to_owned),
        };
        let how = DeleteParams::default().preconditions(preconditions);
        self.send(request(kind).delete(name, &how)).await.map(|_| ())
    }
}

fn request(kind: Kind) -> Request {
    Request::new(match kind {
        Kind::Node => Node::url_path(&(), None),
        Kind::ClusterCIDR => ClusterCIDR::url_path(&(), None),
        Kind::PodCIDR => PodCIDR::url_path(&(), None),
        Kind::RoutingPolicy => RoutingPolicy::url_path(&(), None),
        Kind::NodeNetwork => NodeNetwork::url_path(&(), None),
    })
}

/// How long an answer asks to wait, in seconds (RFC 9110, 10.2.3; API servers do not name dates), but no longer than we
/// are willing to.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_WAIT))
}

/// An answer that came but cannot be read says nothing about what was done.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T, CallError> {
    serde_json::from_str(text).map_err(|error| CallError::Unknown(format!("the answer is not JSON: {error}")))
}

/// Sorts errors by what they say of the write: not done, or unknown.
fn classify(error: kube::Error) -> CallError {
    match error {
        kube::Error::Api(status) if status.is_already_exists() => CallError::AlreadyExists,
        kube::Error::Api(status) if status.is_not_found() => CallError::NotFound,
        kube::Error::Api(status) if status.is_conflict() => CallError::Conflict(status.message),
        kube::Error::Api(status) if (400..500).contains(&status.code) && status.code != 408 => {
            CallError::Refused(format!("{} (code {})", status.message, status.code))
        }
        kube::Error::BuildRequest(error) => CallError::Refused(error.to_string()),
        other => CallError::Unknown(chain(&other)),
    }
}

/// An error with its causes: transport errors say the interesting part last.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

/// Looks up addresses in use that are neither pods' nor nodes': the cluster's Service ranges and the API
/// server's own. Each is optional: without the right to read it, overlap with it goes unnoticed, which is said
/// once.
pub struct ForeignLookup {
    client: Client,
    api_host: Option<IpAddr>,
    said: bool,
}

impl ForeignLookup {
    /// A lookup; `api_host` is the address by which this process reaches the API server.
    pub fn new(client: Client, api_host: Option<IpAddr>) -> ForeignLookup {
        ForeignLookup { client, api_host, said: false }
    }

    /// What is so now; where that cannot be read, what was known before.
    pub async fn run(&mut self, known: &Foreign) -> Foreign {
        let services = match self.services().await {
            Ok(services) => services,
            Err(error) => {
                if !std::mem::replace(&mut self.said, true) {
                    warn!(
                        error,
                        "cannot list ServiceCIDRs: a ClusterCIDR that overlaps the Service range is not noticed"
                    );
                }
                known.services.clone()
            }
        };
        let mut api_server: Vec<IpAddr> = self.endpoints().await.unwrap_or_else(|error| {
            debug!(error, "cannot read the API server's endpoints");
            known.api_server.clone()
        });
        api_server.extend(self.api_host);
        api_server.sort();
        api_server.dedup();
        Foreign { services, api_server }
    }

    async fn services(&self) -> Result<Vec<Block>, String> {
        let api: Api<ServiceCIDR> = Api::all(self.client.clone());
        let list = in_time(api.list(&ListParams::default())).await?;
        let cidrs = list.items.into_iter().filter_map(|object| object.spec?.cidrs).flatten();
        let mut services: Vec<_> =
            cidrs.filter_map(|cidr| Some(Block::containing(cidr.parse().ok()?))).collect();
        services.sort();
        Ok(services)
    }

    async fn endpoints(&self) -> Result<Vec<IpAddr>, String> {
        let api: Api<EndpointSlice> = Api::namespaced(self.client.clone(), "default");
        let slice = in_time(api.get_opt("kubernetes")).await?;
        let addresses =
            slice.into_iter().flat_map(|slice| slice.endpoints).flat_map(|endpoint| endpoint.addresses);
        Ok(addresses.filter_map(|address| address.parse().ok()).collect())
    }
}

async fn in_time<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map_err(|error| chain(&error)),
        Err(_) => Err(format!("no answer within {CALL_TIMEOUT:?}")),
    }
}
