//! `/livez`, `/readyz` and `/metrics`, on a TCP port for Prometheus and on a unix socket for probes.
//!
//! On the host's network two replicas may share a node, so the port may be taken: then the next one is used,
//! and probes do not depend on it. They run this program (`plat-operator probe ready`), which asks the socket.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::{TcpListener, UnixListener};
use tracing::{info, warn};

use crate::lease::Leadership;
use crate::telemetry::{Health, Metrics};

/// Ports tried after the one that was asked for.
const PORTS: u16 = 10;
/// A probe that takes longer fails.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// What the handlers answer from.
#[derive(Clone, Debug, Default)]
pub struct Admin {
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Health.
    pub health: Arc<Health>,
    /// Leadership.
    pub leadership: Arc<Leadership>,
}

/// Serves on both until dropped.
pub async fn serve(admin: Admin, listen: SocketAddr, socket: &Path) -> anyhow::Result<()> {
    let app =
        Router::new()
            .route("/livez", get(|State(admin): State<Admin>| async move { answer(admin.health.live()) }))
            .route(
                "/readyz",
                get(|State(admin): State<Admin>| async move {
                    answer(admin.health.ready(admin.leadership.holds()))
                }),
            )
            .route("/metrics", get(metrics))
            .with_state(admin);
    let unix = bind_socket(socket)?;
    let tcp = bind_port(listen).await?;
    tokio::try_join!(axum::serve(unix, app.clone()).into_future(), axum::serve(tcp, app).into_future())?;
    Ok(())
}

fn bind_socket(socket: &Path) -> anyhow::Result<UnixListener> {
    // A former life of this container may have left its socket behind.
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error)
                .with_context(|| format!("cannot remove the old probe socket {}", socket.display()));
        }
        _ => {}
    }
    UnixListener::bind(socket).with_context(|| {
        format!(
            "cannot listen on the probe socket {}: its folder must exist and be writable (--socket)",
            socket.display()
        )
    })
}

async fn bind_port(listen: SocketAddr) -> anyhow::Result<TcpListener> {
    for offset in 0..=PORTS {
        let Some(port) = listen.port().checked_add(offset) else { break };
        match bind(SocketAddr::new(listen.ip(), port)).await {
            Ok(listener) => {
                info!(address = %listener.local_addr()?, "serving /livez, /readyz and /metrics");
                return Ok(listener);
            }
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                warn!(port, "the port is taken, trying the next")
            }
            Err(error) => return Err(error).with_context(|| format!("cannot listen on {listen}")),
        }
    }
    bail!("cannot listen on {listen}: it and the next {PORTS} ports are taken; give another --listen")
}

/// `[::]` serves both families, and on a host without IPv6 it stands for `0.0.0.0`.
async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let every = IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    match TcpListener::bind(address).await {
        Err(error) if address.ip() == every && error.kind() != std::io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    }
}

fn answer(verdict: Result<&'static str, String>) -> Response {
    match verdict {
        Ok(text) => (StatusCode::OK, format!("ok: {text}\n")).into_response(),
        Err(text) => (StatusCode::SERVICE_UNAVAILABLE, format!("{text}\n")).into_response(),
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match admin.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, kind)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Asks a running operator through its socket; the answer is its sentence, as an error if it says no.
pub fn probe(socket: &Path, path: &str) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("cannot reach the operator at {}: does it run?", socket.display()))?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    stream.set_write_timeout(Some(PROBE_TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("the operator did not answer in time")?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split_whitespace().nth(1).unwrap_or("no status");
    if status == "200" { Ok(body.trim().to_owned()) } else { bail!("{} ({status})", body.trim()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_probe_asks_through_the_socket_and_a_taken_port_is_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("operator.sock");
        std::fs::write(&socket, "left over").unwrap();
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = Admin::default();
        let (address, path) = (taken.local_addr().unwrap(), socket.clone());
        let server = tokio::spawn({
            let admin = admin.clone();
            async move { serve(admin, address, &path).await }
        });
        let ask = |path: &'static str| {
            let socket = socket.clone();
            tokio::task::spawn_blocking(move || probe(&socket, path))
        };
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while ask("/livez").await.unwrap().is_err() {
            assert!(
                !server.is_finished() && std::time::Instant::now() < deadline,
                "no answer from the socket"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(
            ask("/readyz").await.unwrap().unwrap_err().to_string().contains("has not answered yet (503)")
        );
        admin.health.contact();
        assert_eq!(ask("/readyz").await.unwrap().unwrap(), "ok: standing by");
        assert!(ask("/metrics").await.unwrap().unwrap().contains("plat_operator_is_leader 0"));
        server.abort();
    }

    #[test]
    fn a_probe_of_an_operator_that_is_not_there_says_so() {
        let error = probe(Path::new("/nowhere/operator.sock"), "/livez").unwrap_err();
        assert!(format!("{error:#}").contains("does it run?"));
    }
}
