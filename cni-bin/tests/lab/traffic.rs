//! Traffic in the laboratory: servers and clients in namespaces.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// How long a client waits for an answer: more than a second, after which TCP sends a lost SYN again (RFC 6298).
const PATIENCE: Duration = Duration::from_secs(3);

/// Makes a world outside the host, which knows nothing of pods: container `world`, 192.0.2.2 behind the host's
/// link `w0` with 192.0.2.1.
pub fn world() {
    super::sh(
        "ip netns add world; ip link add w0 type veth peer name w0 netns world; \
        ip addr add 192.0.2.1/24 dev w0; ip link set w0 up; \
        ip -n world addr add 192.0.2.2/24 dev w0; ip -n world link set w0 up",
    );
}

/// Runs `work` in a container's network.
pub fn inside<T: Send>(id: &str, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/run/netns/{id}")).unwrap();
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        });
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A server in a container, on all addresses of both families; it ends with this value.
pub struct Server {
    stop: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers each connection with the client's address.
    pub fn tcp(id: &str, port: u16) -> Server {
        let listener = inside(id, || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap());
        listener.set_nonblocking(true).unwrap();
        Server::run(move || {
            if let Ok((mut stream, client)) = listener.accept() {
                let _ = stream.write_all(client.ip().to_canonical().to_string().as_bytes());
            }
        })
    }

    /// Answers each datagram with the client's address.
    pub fn udp(id: &str, port: u16) -> Server {
        let socket = inside(id, || UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap());
        socket.set_nonblocking(true).unwrap();
        Server::run(move || {
            if let Ok((_, client)) = socket.recv_from(&mut [0; 64]) {
                let _ = socket.send_to(client.ip().to_canonical().to_string().as_bytes(), client);
            }
        })
    }

    fn run(mut serve: impl FnMut() + Send + 'static) -> Server {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let work = move || {
            while !stopped.load(Ordering::Relaxed) {
                serve();
                thread::sleep(Duration::from_millis(2));
            }
        };
        Server { stop, worker: Some(thread::spawn(work)) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.worker.take().map(JoinHandle::join);
    }
}

/// Connects from a container; the server's answer, which is the address that it sees the client at.
pub fn ask_tcp(from: &str, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    inside(from, || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok().map(|_| answer)
    })
}

/// The same by datagrams, of which the first may be lost.
pub fn ask_udp(from: &str, to: &str) -> Option<String> {
    let to: SocketAddr = to.parse().unwrap();
    inside(from, || {
        let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        socket.set_read_timeout(Some(PATIENCE / 4)).unwrap();
        let mut buffer = [0; 64];
        (0..4).find_map(|_| {
            socket.send_to(b"?", to).ok()?;
            let length = socket.recv(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(buffer.get(..length)?).into_owned())
        })
    })
}
