//! A proxy between an operator and the API server that does what networks and API servers do on bad days.
//!
//! An operator gets a kubeconfig that points here, by plain HTTP on loopback; the proxy passes each request on
//! as administrator. What goes wrong is a list of rules: which requests (verb, resource, part of the name), what
//! happens to them, how often. A rule counts its strikes, so that a test can tell that it has tested something.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::http::{Request, Response, StatusCode, header};
use futures::{Stream, StreamExt, stream};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use kube::Client;
use plat_e2e::light::ControlPlane;
use plat_e2e::wait::{holds, wait_until_async};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::arena::{DEADLINE, Operator};

/// What is done with a request, or with the stream of a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The connection is closed; the API server is not asked.
    Refuse,
    /// Passed on after that long, whether or not somebody still waits for the answer.
    Delay(Duration),
    /// Passed on, and answered after that long.
    Slow(Duration),
    /// No answer, ever; the API server is not asked.
    Silence,
    /// Answered with that code; the API server is not asked.
    Answer(u16),
    /// Answered with that code and the wish to be asked again after so many seconds; the API server is not asked.
    AskToWait(u16, u8),
    /// Carried out, and the connection closed instead of the answer.
    LoseAnswer,
    /// Carried out, and the connection closed in the middle of the answer.
    Truncate,
    /// Carried out, and answered with something that is not JSON.
    Garbage,
    /// A watch begins, and after its first event the connection is closed in the middle of the next.
    Cut,
    /// A watch begins and stays connected, but shows nothing for as long as the rule is there. Then all at once.
    Freeze,
    /// A watch begins and then says that its version is too old.
    Gone,
}

/// Which requests a fault is for.
#[derive(Clone, Debug)]
pub struct Match {
    verb: &'static str,
    resource: &'static str,
    name: String,
}

/// Requests of a verb (`get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, or `*`) for a resource in
/// the plural, with `/status` for that subresource (or `*`).
pub fn on(verb: &'static str, resource: &'static str) -> Match {
    Match { verb, resource, name: String::new() }
}

impl Match {
    /// Only of objects whose name contains `part`. A create names its object in its body.
    pub fn named(self, part: &str) -> Match {
        Match { name: part.to_owned(), ..self }
    }

    fn fits(&self, asked: &Asked) -> bool {
        (self.verb == "*" || self.verb == asked.verb)
            && (self.resource == "*" || self.resource == asked.resource)
            && asked.name.contains(&self.name)
    }
}

/// A rule that was given to a proxy.
#[derive(Clone, Debug)]
pub struct Rule(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    which: Match,
    fault: Fault,
    most: usize,
    strikes: AtomicUsize,
    /// When it first struck.
    first: OnceLock<Instant>,
    /// Set to `true` when the rule is taken back.
    over: watch::Sender<bool>,
}

impl Rule {
    /// How often it has struck.
    pub fn strikes(&self) -> usize {
        self.0.strikes.load(Ordering::Relaxed)
    }

    /// Waits until it has struck.
    pub async fn wait_struck(&self) {
        wait_until_async(&format!("{self:?} strikes"), DEADLINE, async || holds(self.strikes() > 0, "no"))
            .await;
    }

    /// When it struck first.
    pub fn first_strike(&self) -> Instant {
        *self.0.first.get().unwrap()
    }

    fn strike(&self) -> bool {
        let count = |strikes| (strikes < self.0.most).then_some(strikes + 1);
        let strikes = self.0.strikes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count).is_ok();
        if strikes {
            self.0.first.get_or_init(Instant::now);
        }
        strikes
    }

    async fn over(&self) {
        let mut over = self.0.over.subscribe();
        // The sender lives in the rule.
        let _over = over.wait_for(|over| *over).await;
    }
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    verb: &'static str,
    resource: String,
    name: String,
}

/// A proxy. Its tasks end with the test's runtime.
pub struct Proxy {
    address: SocketAddr,
    kubeconfig: PathBuf,
    state: Arc<State>,
}

struct State {
    client: Client,
    rules: Mutex<Vec<Rule>>,
    log: Mutex<VecDeque<String>>,
    /// Counts up when all watches are broken off.
    breaks: watch::Sender<usize>,
}

impl State {
    fn note(&self, asked: &Asked, rule: Option<&Rule>) {
        let mut log = self.log.lock().unwrap();
        log.push_back(format!("{asked:?} {:?}", rule.map(|rule| rule.0.fault)));
        let excess = log.len().saturating_sub(LOG);
        log.drain(..excess);
    }
}

/// Requests that are remembered for the story of a failure.
const LOG: usize = 60;

impl Proxy {
    /// A proxy before that control plane.
    pub async fn start(plane: &ControlPlane, client: Client) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let kubeconfig = plane.run_folder().join(format!("proxy-{}.kubeconfig", address.port()));
        let named = |kind: &str, what| json!([{"name": "proxy", kind: what}]);
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "proxy",
            "clusters": named("cluster", json!({"server": format!("http://{address}")})),
            "contexts": named("context", json!({"cluster": "proxy", "user": "proxy"})),
            "users": named("user", json!({})),
        });
        std::fs::write(&kubeconfig, config.to_string()).unwrap();
        let state = Arc::new(State {
            client,
            rules: Mutex::default(),
            log: Mutex::default(),
            breaks: watch::Sender::default(),
        });
        tokio::spawn(accept(listener, state.clone()));
        Proxy { address, kubeconfig, state }
    }

    /// An operator that reaches the API server only through here.
    pub fn operator(&self, plane: &ControlPlane, name: &str, flags: &[&str]) -> Operator {
        Operator::start(plane, &self.kubeconfig, name, flags)
    }

    /// From now on this goes wrong, at most so many times. Of several rules that fit a request the first given
    /// counts.
    pub fn inject(&self, most: usize, which: Match, fault: Fault) -> Rule {
        let over = watch::Sender::new(false);
        let (strikes, first) = (AtomicUsize::new(0), OnceLock::new());
        let rule = Rule(Arc::new(Inner { which, fault, most, strikes, first, over }));
        self.state.rules.lock().unwrap().push(rule.clone());
        rule
    }

    /// Closes the connections of all watches that are undisturbed.
    pub fn break_watches(&self) {
        self.state.breaks.send_modify(|count| *count += 1);
    }

    /// Nothing goes wrong any more. What was held back arrives.
    pub fn heal(&self) {
        for rule in self.state.rules.lock().unwrap().drain(..) {
            rule.0.over.send_replace(true);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.kubeconfig);
        if std::thread::panicking() {
            let mut text = String::new();
            for line in self.state.log.lock().unwrap().iter() {
                let _written = writeln!(text, "  {line}");
            }
            eprintln!("---- proxy {}, last requests:\n{text}", self.address);
        }
    }
}

async fn accept(listener: TcpListener, state: Arc<State>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(serve(stream, state.clone()));
    }
}

async fn serve(stream: TcpStream, state: Arc<State>) {
    let _small = stream.set_nodelay(true);
    let service = hyper::service::service_fn(|request| answer(request, state.clone()));
    // An error is how a connection is broken off.
    let _ended =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// An error here closes the connection without an answer.
#[derive(Debug)]
struct BrokenOff;

impl std::fmt::Display for BrokenOff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the proxy broke the connection off")
    }
}

impl std::error::Error for BrokenOff {}

async fn answer(request: Request<Incoming>, state: Arc<State>) -> Result<Response<Body>, BrokenOff> {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(Body::new(body), usize::MAX).await.map_err(|_| BrokenOff)?;
    let asked = Asked::read(head.method.as_str(), &head.uri, &body);
    let rule = {
        let rules = state.rules.lock().unwrap();
        rules.iter().find(|rule| rule.0.which.fits(&asked) && rule.strike()).cloned()
    };
    state.note(&asked, rule.as_ref());
    let breaks = state.breaks.subscribe();
    let request = Request::from_parts(head, kube::client::Body::from(body.to_vec()));
    let pass_on = pass_on(request, state.client.clone());
    let Some(rule) = rule else {
        let (head, body) = pass_on.await?.into_parts();
        if asked.verb != "watch" {
            return Ok(Response::from_parts(head, body));
        }
        return Ok(Response::from_parts(head, Body::from_stream(breakable(body.into_data_stream(), breaks))));
    };
    match rule.0.fault {
        Fault::Refuse => Err(BrokenOff),
        Fault::Silence => std::future::pending().await,
        Fault::Delay(by) => {
            let late = tokio::spawn(async move {
                tokio::time::sleep(by).await;
                pass_on.await
            });
            late.await.map_err(|_| BrokenOff)?
        }
        Fault::Slow(by) => {
            let answer = pass_on.await;
            tokio::time::sleep(by).await;
            answer
        }
        Fault::Answer(code) => Ok(refusal(code, 1)),
        Fault::AskToWait(code, seconds) => Ok(refusal(code, seconds)),
        // The write is finished even if the caller hangs up meanwhile.
        Fault::LoseAnswer => {
            let _lost = tokio::spawn(pass_on).await;
            Err(BrokenOff)
        }
        Fault::Truncate => {
            let (head, body) = pass_on.await?.into_parts();
            let whole = axum::body::to_bytes(body, usize::MAX).await.map_err(|_| BrokenOff)?;
            let half = whole.slice(..whole.len() / 2);
            Ok(Response::from_parts(head, Body::from_stream(stream::iter([Ok(half), Err(BrokenOff)]))))
        }
        Fault::Garbage => {
            let (mut head, _) = pass_on.await?.into_parts();
            head.headers.remove(header::CONTENT_LENGTH);
            Ok(Response::from_parts(head, Body::from("<html>Welcome to the captive portal</html>\n")))
        }
        Fault::Cut | Fault::Freeze | Fault::Gone => {
            let (head, body) = pass_on.await?.into_parts();
            Ok(Response::from_parts(head, disturbed(body.into_data_stream(), rule)))
        }
    }
}

async fn pass_on(request: Request<kube::client::Body>, client: Client) -> Result<Response<Body>, BrokenOff> {
    let (mut head, body) = request.into_parts();
    head.headers.remove(header::HOST);
    // The client knows where the API server is.
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    head.uri = path.parse().map_err(|_| BrokenOff)?;
    let answer = client.send(Request::from_parts(head, body)).await.map_err(|_| BrokenOff)?;
    let (mut head, body) = answer.into_parts();
    head.headers.remove(header::TRANSFER_ENCODING);
    Ok(Response::from_parts(head, Body::new(body)))
}

/// The body of a watch, until all are broken off.
fn breakable(
    body: axum::body::BodyDataStream,
    breaks: watch::Receiver<usize>,
) -> impl Stream<Item = Result<Bytes, axum::Error>> {
    stream::unfold((body, breaks), |(mut body, mut breaks)| async {
        tokio::select! {
            chunk = body.next() => chunk.map(|chunk| (chunk, (body, breaks))),
            _ = breaks.changed() => Some((Err(axum::Error::new(BrokenOff)), (body, breaks))),
        }
    })
}

/// The body of a watch, with its fault.
fn disturbed(body: axum::body::BodyDataStream, rule: Rule) -> Body {
    match rule.0.fault {
        Fault::Freeze => {
            let held = stream::once(async move { rule.over().await }).filter_map(|()| async { None });
            Body::from_stream(held.chain(body))
        }
        Fault::Gone => {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "too old resource version: 1 (2)", "reason": "Expired", "code": 410});
            Body::from(format!("{}\n", json!({"type": "ERROR", "object": status})))
        }
        _ => {
            let rest = stream::iter([
                Ok(Bytes::from_static(b"{\"type\":\"MODIF")),
                Err(axum::Error::new(BrokenOff)),
            ]);
            Body::from_stream(body.take(1).chain(rest))
        }
    }
}

fn refusal(code: u16, wait_seconds: u8) -> Response<Body> {
    let reason = match code {
        403 => "Forbidden",
        409 => "Conflict",
        410 => "Expired",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        504 => "Timeout",
        _ => "InternalError",
    };
    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("the proxy says {reason}"), "reason": reason, "code": code,
        "details": {"retryAfterSeconds": if matches!(code, 429 | 503) { wait_seconds } else { 0 }}});
    let mut answer = Response::new(Body::from(body.to_string()));
    *answer.status_mut() = StatusCode::from_u16(code).unwrap();
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    if matches!(code, 429 | 503) {
        answer.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from(u16::from(wait_seconds)));
    }
    answer
}

impl Asked {
    /// `/api/v1/…` or `/apis/GROUP/VERSION/…`, then perhaps `namespaces/NAME`, then `RESOURCE[/NAME[/SUB]]`.
    fn read(method: &str, uri: &axum::http::Uri, body: &Bytes) -> Asked {
        let mut parts: Vec<&str> = uri.path().trim_matches('/').split('/').collect();
        parts.drain(..parts.len().min(if parts.first() == Some(&"api") { 2 } else { 3 }));
        if parts.len() > 2 && parts[0] == "namespaces" {
            parts.drain(..2);
        }
        let part = |index: usize| parts.get(index).copied().unwrap_or_default();
        let is_watch =
            uri.query().is_some_and(|query| query.split('&').any(|q| q == "watch=true" || q == "watch=1"));
        let verb = match (method, part(1)) {
            ("GET", _) if is_watch => "watch",
            ("GET", "") => "list",
            ("GET", _) => "get",
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            _ => "delete",
        };
        let in_body = || {
            let object: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
            object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
        };
        let name = if verb == "create" { in_body() } else { part(1).to_owned() };
        let sub = part(2);
        let resource = if sub.is_empty() { part(0).to_owned() } else { format!("{}/{sub}", part(0)) };
        Asked { verb, resource, name }
    }
}

#[test]
fn requests_are_told_apart() {
    for (method, path, body, expected) in [
        ("GET", "/api/v1/nodes?limit=500", "", ("list", "nodes", "")),
        ("GET", "/api/v1/nodes?&watch=true&resourceVersion=7", "", ("watch", "nodes", "")),
        ("GET", "/api/v1/nodes/n1?", "", ("get", "nodes", "n1")),
        ("PATCH", "/api/v1/nodes/n1/status?fieldManager=x", "{}", ("patch", "nodes/status", "n1")),
        (
            "POST",
            "/apis/plat.network/v1alpha1/podcidrs?",
            r#"{"metadata":{"name":"b"}}"#,
            ("create", "podcidrs", "b"),
        ),
        ("DELETE", "/apis/plat.network/v1alpha1/podcidrs/b", "", ("delete", "podcidrs", "b")),
        ("PUT", "/apis/coordination.k8s.io/v1/namespaces/ns/leases/l", "", ("update", "leases", "l")),
    ] {
        let (verb, resource, name) = expected;
        let expected = Asked { verb, resource: resource.to_owned(), name: name.to_owned() };
        assert_eq!(Asked::read(method, &path.parse().unwrap(), &Bytes::from(body)), expected, "{path}");
    }
}
