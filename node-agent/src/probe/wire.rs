//! The sockets of probes: one for each question, and one for each block of this node to answer on.
//!
//! Only UDP, which needs no right. A question is connected to its peer, so that the kernel takes answers from nobody
//! else and passes on what routers say. Its packets are never fragmented, and neither what the kernel has learnt of the
//! path nor the route's own MTU counts (`IP_PMTUDISC_PROBE`): else a path that was corrected could not be seen to be
//! well again.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use plat_crds::block::{Block, Family};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::packet::{HEADER, Request};
use super::plan::Plan;
use super::schedule::Shot;
use super::search;
use super::track::Outcome;

/// More than any UDP packet.
const BUFFER: usize = 64 * 1024;
/// Packets that are read in a second, whoever sends them: nobody makes this program busy.
const READS_PER_SECOND: u32 = 500;
/// Packets that may be read at once.
const READS_AT_ONCE: u32 = 100;
/// Answers to one peer in a second. It asks a few times at most.
const ANSWERS_TO_ONE: u8 = 8;
/// How soon a socket is tried again that could not be opened: its address may not be there yet.
const OPEN_AGAIN: Duration = Duration::from_secs(1);

/// Sends one packet and waits for its answer. Returns the size that was sent as well: what this node's own link does not
/// take is tried smaller at once, and nothing of it was on the wire.
pub async fn ask(shot: Shot, port: u16, nonce: u64, within: Duration) -> (u32, Outcome) {
    let mut size = shot.size;
    let outcome = ask_fitting(&mut size, shot, port, nonce, within).await;
    (size, outcome)
}

async fn ask_fitting(size: &mut u32, shot: Shot, port: u16, nonce: u64, within: Duration) -> Outcome {
    let family = shot.block.family();
    let Ok(socket) = asking(shot.from) else { return Outcome::Unsent };
    let sent = Instant::now();
    if let Err(error) = socket.connect((shot.block.gateway(), port)).await {
        return not_sent(&error);
    }
    let request = loop {
        let request = Request::of_size(family, *size, nonce);
        match socket.send(&request.encode()).await {
            Ok(_) => break request,
            Err(error) if is_too_large(&error) => match search::below(family, *size) {
                Some(smaller) => *size = smaller,
                None => return Outcome::Unsent,
            },
            Err(error) => return not_sent(&error),
        }
    };
    let mut answer = [0; HEADER + 1];
    loop {
        match timeout_at(sent + within, socket.recv(&mut answer)).await {
            Ok(Ok(length)) if request.is_answered_by(answer.get(..length).unwrap_or_default()) => {
                return Outcome::Answered(sent.elapsed());
            }
            // From the peer's address, but no answer to this.
            Ok(Ok(_)) => {}
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return Outcome::Refused,
            // A router says that it cannot pass on.
            Ok(Err(_)) | Err(_) => return Outcome::Lost,
        }
    }
}

fn asking(from: Block) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind((from.gateway(), 0))?;
    match from.family() {
        Family::IPv4 => sockopt::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?,
        Family::IPv6 => sockopt::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::PROBE)?,
    }
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

fn is_too_large(error: &io::Error) -> bool {
    errno(error) == Some(Errno::MSGSIZE)
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}

fn not_sent(error: &io::Error) -> Outcome {
    match errno(error) {
        Some(Errno::HOSTUNREACH | Errno::NETUNREACH) => Outcome::NoRoute,
        // A firewall of this node, or a route that drops: pods' packets would meet it too.
        Some(Errno::PERM | Errno::ACCESS | Errno::INVAL) => Outcome::Lost,
        _ => Outcome::Unsent,
    }
}

/// What was answered and what was not, since the agent started.
#[derive(Debug, Default)]
pub struct Served {
    answers: AtomicU64,
    ignored: AtomicU64,
}

impl Served {
    /// Answers that were sent.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Packets that were read and not answered: no requests, not from a peer's gateway, or too many.
    pub fn ignored(&self) -> u64 {
        self.ignored.load(Ordering::Relaxed)
    }
}

/// Answers peers that ask the gateway of `own`, for ever.
pub async fn respond(own: Block, port: u16, plan: watch::Receiver<Arc<Plan>>, served: Arc<Served>) {
    let address = SocketAddr::new(own.gateway(), port);
    let mut told = false;
    loop {
        match UdpSocket::bind(address).await {
            Ok(socket) => answer_all(&socket, &plan, &served).await,
            // The gateway stands once the node is programmed.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            Err(error) if !told => {
                told = true;
                tracing::warn!(%address, %error, "probes of other nodes are not answered; give another port with --probe-port on all nodes");
            }
            Err(_) => {}
        }
        sleep(OPEN_AGAIN).await;
    }
}

async fn answer_all(socket: &UdpSocket, plan: &watch::Receiver<Arc<Plan>>, served: &Served) {
    let mut buffer = vec![0; BUFFER];
    let mut limits = Limits::new(Instant::now());
    loop {
        sleep_until(limits.next_read()).await;
        // An error is about one packet (ICMP of an earlier answer), not about the socket.
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let now = Instant::now();
        limits.read(now);
        let request = buffer.get(..length).and_then(Request::decode);
        let known = || plan.borrow().is_peer(peer.ip());
        let counter = match request {
            Some(request) if known() && limits.may_answer(peer.ip(), now) => {
                // Whether it can be sent is the peer's loss.
                let _ = socket.try_send_to(&request.answer(), peer);
                &served.answers
            }
            _ => &served.ignored,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// How much is read, and answered to each.
struct Limits {
    /// When all that was read is paid for.
    paid_at: Instant,
    second: Instant,
    answers: HashMap<IpAddr, u8>,
}

impl Limits {
    fn new(now: Instant) -> Limits {
        Limits { paid_at: now, second: now, answers: HashMap::new() }
    }

    fn cost() -> Duration {
        Duration::from_secs(1) / READS_PER_SECOND
    }

    fn next_read(&self) -> Instant {
        self.paid_at.checked_sub(Limits::cost() * READS_AT_ONCE).unwrap_or(self.paid_at)
    }

    fn read(&mut self, now: Instant) {
        self.paid_at = self.paid_at.max(now) + Limits::cost();
    }

    fn may_answer(&mut self, peer: IpAddr, now: Instant) -> bool {
        if now >= self.second + Duration::from_secs(1) {
            self.second = now;
            self.answers.clear();
        }
        let answers = self.answers.entry(peer).or_default();
        *answers = answers.saturating_add(1);
        *answers <= ANSWERS_TO_ONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_and_answered_is_bounded() {
        let start = Instant::now();
        let mut limits = Limits::new(start);
        let mut now = start;
        let mut read = 0;
        while now < start + Duration::from_secs(10) {
            now = now.max(limits.next_read());
            limits.read(now);
            read += 1;
        }
        assert!((5000..=5102).contains(&read), "{read} packets of a flood of ten seconds");

        let (peer, other) = ([10, 244, 2, 1].into(), [10, 244, 3, 1].into());
        let answered = (0..100).filter(|_| limits.may_answer(peer, now)).count();
        assert_eq!(answered, usize::from(ANSWERS_TO_ONE));
        assert!(limits.may_answer(other, now), "one that floods takes nothing from the others");
        assert!(limits.may_answer(peer, now + Duration::from_secs(1)));
    }
}
