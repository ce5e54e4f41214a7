//! The network tool of the test image: a server that says who asks, and clients that say what they saw.
//! Static, so that it runs in any image and, from the node, in any namespace.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use plat_rig::ping::Ledger;
use plat_rig::reach::{Reached, Seen};

/// Asks and answers over the network.
#[derive(Parser)]
enum Probe {
    /// Answers HTTP with `{"host": ..., "client": ...}` and echoes UDP, both on this port, both families.
    Serve {
        /// Port.
        #[arg(default_value_t = 8080)]
        port: u16,
    },
    /// Asks servers, all at once, and prints a line of JSON for each in their order. Fails if one fails.
    Reach {
        /// Servers, such as 10.244.1.2:8080 or `[fd00::2]:8080`.
        servers: Vec<SocketAddr>,
        /// How long to wait for each, in ms.
        #[arg(long, default_value_t = 3000)]
        timeout_ms: u64,
    },
    /// Connects by TCP and prints both ends.
    Tcp {
        /// Where to.
        server: SocketAddr,
        /// How long to wait, in ms.
        #[arg(long, default_value_t = 2000)]
        timeout_ms: u64,
    },
    /// Sends a datagram every millisecond to a server's echo until standard input ends, then prints what
    /// was lost as a line of JSON.
    Ping {
        /// Where to.
        server: SocketAddr,
        /// Pause between two, in microseconds.
        #[arg(long, default_value_t = 1000)]
        every_us: u64,
    },
}

fn main() -> io::Result<()> {
    match Probe::parse() {
        Probe::Serve { port } => serve(port),
        Probe::Reach { servers, timeout_ms } => reach(&servers, Duration::from_millis(timeout_ms)),
        Probe::Tcp { server, timeout_ms } => {
            let stream = TcpStream::connect_timeout(&server, Duration::from_millis(timeout_ms))?;
            println!("{} -> {}", stream.local_addr()?, stream.peer_addr()?);
            Ok(())
        }
        Probe::Ping { server, every_us } => ping(server, Duration::from_micros(every_us)),
    }
}

fn serve(port: u16) -> io::Result<()> {
    let everywhere: IpAddr = [0u16; 8].into();
    let udp = UdpSocket::bind((everywhere, port))?;
    widen(&udp);
    thread::spawn(move || echo(&udp));
    let listener = TcpListener::bind((everywhere, port))?;
    println!("serving on port {port}");
    for stream in listener.incoming().flatten() {
        thread::spawn(move || answer(stream));
    }
    Ok(())
}

/// A larger buffer, so that a busy machine does not look like a lossy network.
fn widen(socket: &UdpSocket) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
    const BYTES: usize = 4 << 20;
    if set_socket_recv_buffer_size_force(socket, BYTES).is_err() {
        let _ = set_socket_recv_buffer_size(socket, BYTES);
    }
}

fn echo(socket: &UdpSocket) {
    let mut buffer = [0; 2048];
    loop {
        // An error here is an ICMP message about an answer to somebody who left.
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n if request.len() > 16_384 => {
                return Err(io::Error::other(format!("request of over {n} bytes")));
            }
            n => request.extend_from_slice(&buffer[..n]),
        }
    }
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let seen = Seen { host, client: stream.peer_addr()?.ip().to_canonical() };
    let body = serde_json::to_string(&seen).map_err(io::Error::other)?;
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

fn reach(servers: &[SocketAddr], timeout: Duration) -> io::Result<()> {
    let asked: Vec<_> = servers
        .iter()
        .map(|s| {
            (
                *s,
                thread::spawn({
                    let s = *s;
                    move || ask(s, timeout)
                }),
            )
        })
        .collect();
    let mut failed = 0;
    for (server, asking) in asked {
        let outcome = asking.join().map_err(|_| io::Error::other("a thread panicked"))?;
        let reached = match outcome {
            Ok(seen) => Reached { server, seen: Some(seen), error: None },
            Err(error) => Reached { server, seen: None, error: Some(error.to_string()) },
        };
        failed += usize::from(reached.seen.is_none());
        println!("{}", serde_json::to_string(&reached).map_err(io::Error::other)?);
    }
    if failed > 0 {
        return Err(io::Error::other(format!("{failed} of {} servers did not answer", servers.len())));
    }
    Ok(())
}

fn ask(server: SocketAddr, timeout: Duration) -> io::Result<Seen> {
    let mut stream = TcpStream::connect_timeout(&server, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) =
        answer.split_once("\r\n\r\n").ok_or_else(|| io::Error::other(format!("strange answer: {answer}")))?;
    serde_json::from_str(body).map_err(|e| io::Error::other(format!("strange answer: {e}: {body}")))
}

/// Late answers are waited for this long after the last datagram.
const STRAGGLERS: Duration = Duration::from_secs(2);

fn ping(server: SocketAddr, every: Duration) -> io::Result<()> {
    let any: IpAddr = if server.is_ipv4() { [0u8; 4].into() } else { [0u16; 8].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    widen(&socket);
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let ledger = Mutex::new(Ledger::default());
    let stop = AtomicBool::new(false);
    let over = AtomicBool::new(false);
    let start = Instant::now();
    let now_us = || start.elapsed().as_micros() as u64;
    let lock = || ledger.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            stop.store(true, Ordering::Relaxed);
        });
        scope.spawn(|| {
            let mut buffer = [0; 64];
            while !over.load(Ordering::Relaxed) {
                // Errors are time-outs and ICMP messages; what they mean is counted by who never returns.
                if let Ok(length) = socket.recv(&mut buffer)
                    && let Ok(number) = buffer[..length].try_into()
                {
                    lock().came_back(u64::from_be_bytes(number), now_us());
                }
            }
        });
        println!("pinging {server}");
        let mut next = start;
        while !stop.load(Ordering::Relaxed) {
            let number = lock().sent(now_us());
            let _ = socket.send(&number.to_be_bytes());
            next += every;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
        let deadline = Instant::now() + STRAGGLERS;
        while !lock().is_settled() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        over.store(true, Ordering::Relaxed);
    });
    println!("{}", serde_json::to_string(&lock().report()).map_err(io::Error::other)?);
    Ok(())
}
