//! What wakes the loop besides the API server: netlink multicast, inotify.
//!
//! | source | tells of |
//! |---|---|
//! | rtnetlink LINK, IFADDR, ROUTE, RULE, NEXTHOP | routes and links, and what takes routes down silently: a link that goes down or an address that goes away removes IPv4 routes without a word about them |
//! | rtnetlink NETCONF | forwarding switched on or off |
//! | rtnetlink NEIGH | entries of our tunnel devices' tables; those of all other links are passed over |
//! | nf_tables | any transaction, with the process that made it |
//! | inotify | the folders of CNI configurations and binaries, and our own; of the lease store each change |
//!
//! Messages are hints, never data: each only wakes the loop, which then looks for itself. With one exception: that a
//! route of ours went or was changed by somebody is taken at its word ([`Told`]), put right at once, and looked at a
//! moment later; so one lost route among thousands costs no look at all of them. What this agent did to routes itself
//! wakes nobody. What pods come and go with (their veths on the bridge, link-local addresses) is passed over: it is many messages and
//! no news. A change of the lease store leads to a look at the number of leases in its header, and to a pass only
//! if they are to be counted. What never tells at all (other sysctls, legacy iptables) is met by the loop's tick.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use plat_cni::netlink::Attributes;
use plat_crds::names::{CNI_TYPE, LEASES_FILE, NFT_PODS_TABLE, POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::inotify;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, recv, socket_with, sockopt,
};
use tokio::sync::Notify;

use super::{route, vxlan};
use crate::fabric::{Devices, RouteKey, Told};
use crate::node::Rules;

/// Name of this program's threads: transactions made by them are not taken for somebody else's.
pub const THREAD_NAME: &str = "plat-agent";

/// rtnetlink groups (`RTNLGRP_*`), as bits.
const ROUTE_GROUPS: [u32; 11] = [1, 3, 5, 7, 8, 9, 11, 19, 24, 25, 32];
/// `NFNLGRP_NFTABLES`.
const NFTABLES_GROUP: u32 = 7;
/// A burst of a few thousand messages fits; beyond it the kernel says so, and the loop looks anyway.
const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;
/// As many culprits as a message will name.
const MAX_CULPRITS: usize = 4;
/// As many routes are put back on a word; where more changed, all are looked at.
const MAX_TOLD: usize = 64;

/// More than any message.
const BUFFER: usize = 64 * 1024;
const HEADER: usize = 16;
const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const NEW_NEIGHBOUR: u16 = 28;
const DELETE_NEIGHBOUR: u16 = 29;
const NEW_NETCONF: u16 = 80;
/// `NFT_MSG_NEWGEN`, at the end of each transaction.
const NEW_GENERATION: u16 = (10 << 8) | 15;

/// Where a hint came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A link or address.
    Link,
    /// A route of ours: [`Wake::told`] says what of it.
    OurRoute,
    /// Another route, a rule or next hop, or more of ours than are told of.
    Route,
    /// An entry of a tunnel device's tables.
    Tunnel,
    /// A sysctl.
    Sysctl,
    /// nftables.
    Nftables,
    /// The pods' nftables tables, by someone else than the CNI binary, which changes them with many an ADD
    /// and DEL.
    PodRules,
    /// A file.
    File,
    /// The lease store: pods came or went.
    Leases,
    /// Messages were lost.
    Overrun,
}

/// Why the loop is woken, and who may have done it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wake {
    /// Where hints came from.
    pub sources: BTreeSet<Source>,
    /// Processes that made nftables transactions, such as `nft (pid 4711)`; not the CNI binary.
    pub nft_culprits: BTreeSet<String>,
    /// The transaction whose messages are being read is about the pods' tables; its end tells who made it.
    touches_pods: bool,
    /// Processes that deleted or changed routes of ours, in words; likely, as a netlink port usually is a process ID.
    pub route_culprits: BTreeSet<String>,
    /// What became of routes of ours by somebody else, at most [`MAX_TOLD`].
    pub told: BTreeMap<RouteKey, Told>,
}

impl Wake {
    /// Whether there is anything to wake for.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// Whether there is nothing to look at but the number of leases.
    pub fn is_about_leases(&self) -> bool {
        self.sources.iter().eq([&Source::Leases])
    }

    /// Whether there is nothing to look at but routes of which all is told.
    pub fn is_told(&self) -> bool {
        self.sources.iter().eq([&Source::OurRoute])
    }

    /// Whether nothing but this node's own state led to it, which somebody may keep changing.
    pub fn may_be_fought_over(&self) -> bool {
        let fought = [
            Source::OurRoute,
            Source::Route,
            Source::Tunnel,
            Source::Sysctl,
            Source::Nftables,
            Source::PodRules,
            Source::File,
        ];
        self.sources.iter().all(|source| fought.contains(source))
    }

    /// Whether routes of others may have changed.
    pub fn is_about_routes(&self) -> bool {
        [Source::Route, Source::Overrun].iter().any(|source| self.sources.contains(source))
    }

    /// Whether a link or an address may have come or gone.
    pub fn is_about_links(&self) -> bool {
        [Source::Link, Source::Overrun].iter().any(|source| self.sources.contains(source))
    }

    /// Whether somebody else than the CNI binary may have changed the pods' tables.
    pub fn rules(&self) -> Rules {
        let doubts = [Source::PodRules, Source::Overrun];
        match doubts.iter().any(|source| self.sources.contains(source)) {
            true => Rules::Doubtful,
            false => Rules::Trusted,
        }
    }

    /// Takes in another one.
    pub fn merge(&mut self, other: Wake) {
        self.sources.extend(other.sources);
        self.nft_culprits.extend(other.nft_culprits);
        self.route_culprits.extend(other.route_culprits);
        for (key, told) in other.told {
            self.tell(key, told);
        }
    }

    fn tell(&mut self, key: RouteKey, told: Told) {
        if self.told.len() < MAX_TOLD || self.told.contains_key(&key) {
            self.told.insert(key, told);
            self.sources.insert(Source::OurRoute);
        } else {
            self.sources.insert(Source::Route);
        }
    }
}

/// A folder to watch, and the files in it that matter.
#[derive(Clone, Debug)]
pub struct WatchedFolder {
    /// Its path.
    pub path: PathBuf,
    /// Names of files of interest; `None` is any that does not start with a dot.
    pub files: Option<BTreeSet<String>>,
}

/// The open sources, read by a thread of their own; it ends when this is dropped.
pub struct Events {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the reading thread and the loop share.
struct Shared {
    route: OwnedFd,
    nftables: OwnedFd,
    files: OwnedFd,
    stop: OwnedFd,
    folders: Vec<WatchedFolder>,
    /// The port of this agent's own changes to routes and neighbours.
    own_port: u32,
    state: Mutex<State>,
    news: Notify,
}

#[derive(Default)]
struct State {
    pending: Wake,
    /// Watch descriptors of the folders, in the same order.
    watches: Vec<Option<i32>>,
    /// Our tunnel devices.
    tunnels: vxlan::Indices,
    /// Why the thread ended, if it did.
    failure: Option<io::Error>,
    buffer: Vec<u8>,
}

impl Events {
    /// Opens all sources in the current network namespace and starts to read. Changes of routes and neighbours by
    /// `own_port` are passed over. (The kernel does not say who changed a forwarding entry: such a change of our own
    /// leads to one more look.)
    pub fn open(folders: Vec<WatchedFolder>, own_port: u32) -> io::Result<Events> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        let route = multicast(None, &ROUTE_GROUPS)?;
        // After the socket is open, so that none is missed.
        let state = State { tunnels: vxlan::Indices::look_up(&route), ..State::default() };
        let shared = Arc::new(Shared {
            route,
            nftables: multicast(Some(netlink::NETFILTER), &[NFTABLES_GROUP])?,
            files: inotify::init(flags)?,
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            folders,
            own_port,
            state: Mutex::new(state),
            news: Notify::new(),
        });
        let reader = Arc::clone(&shared);
        let run = move || reader.run();
        let thread = std::thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(run)?;
        let events = Events { shared, thread: Some(thread) };
        events.rewatch();
        Ok(events)
    }

    /// Watches the folders anew: one that was removed and made again is another one. One that does not
    /// exist is watched once the loop has made it.
    pub fn rewatch(&self) {
        use inotify::WatchFlags as F;
        let flags =
            F::CREATE | F::DELETE | F::MOVE | F::CLOSE_WRITE | F::ATTRIB | F::DELETE_SELF | F::MOVE_SELF;
        let watch = |folder: &WatchedFolder| {
            inotify::add_watch(&self.shared.files, &folder.path, flags | F::ONLYDIR).ok()
        };
        self.shared.state().watches = self.shared.folders.iter().map(watch).collect();
    }

    /// Waits for the next hint; takes in all that are there by then. Loses nothing when dropped midway.
    pub async fn next(&self) -> io::Result<Wake> {
        loop {
            let news = self.shared.news.notified();
            let wake = self.now()?;
            if !wake.is_empty() {
                return Ok(wake);
            }
            news.await;
        }
    }

    /// What is there now, left for the next one who asks: who did what is told after it was seen.
    pub fn peek(&self) -> Wake {
        let mut state = self.shared.state();
        // A failure shows when the loop waits.
        let _ = self.shared.drain(&mut state);
        state.pending.clone()
    }

    /// Takes in what is there now, without waiting.
    pub fn now(&self) -> io::Result<Wake> {
        let mut state = self.shared.state();
        match state.failure.take() {
            Some(failure) => Err(failure),
            None => {
                // A transaction may be half read.
                let next = Wake { touches_pods: state.pending.touches_pods, ..Wake::default() };
                Ok(std::mem::replace(&mut state.pending, next))
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let stopped = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        if let (Ok(_), Some(thread)) = (stopped, self.thread.take()) {
            // It cannot have panicked, and there is nobody to tell if it had.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A poisoned lock means that a holder panicked, between two whole states.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let mut ready = [&self.route, &self.nftables, &self.files, &self.stop]
                .map(|fd| PollFd::new(fd, PollFlags::IN));
            let outcome = match poll(&mut ready, None) {
                Ok(_) if ready.last().is_some_and(|stop| !stop.revents().is_empty()) => return,
                Ok(_) | Err(Errno::INTR) => self.drain(&mut self.state()),
                Err(error) => Err(error.into()),
            };
            let failed = outcome.is_err();
            let mut state = self.state();
            state.failure = outcome.err();
            if failed || !state.pending.is_empty() {
                self.news.notify_one();
            }
            if failed {
                return;
            }
        }
    }

    fn drain(&self, state: &mut State) -> io::Result<()> {
        state.buffer.resize(BUFFER, 0);
        let State { pending, buffer, tunnels, .. } = state;
        let own = [NEW_ROUTE, DELETE_ROUTE, NEW_NEIGHBOUR, DELETE_NEIGHBOUR];
        let read_routes = |head: Head, payload: &[u8], wake: &mut Wake| {
            if !(head.port == self.own_port && own.contains(&head.kind)) {
                read_route_message(head, payload, tunnels, wake);
            }
        };
        drain_netlink(&self.route, buffer, pending, read_routes)?;
        if pending.sources.contains(&Source::Overrun) {
            *tunnels = vxlan::Indices::look_up(&self.route);
        }
        drain_netlink(&self.nftables, buffer, pending, read_nft_message)?;
        self.drain_files(state)
    }

    fn drain_files(&self, state: &mut State) -> io::Result<()> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.files, &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    let at = state.watches.iter().position(|watch| *watch == Some(event.wd()));
                    let folder = at.and_then(|at| self.folders.get(at));
                    let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
                    if event.events().contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
                        state.pending.sources.insert(Source::Overrun);
                    } else if matters(folder, name.as_deref()) {
                        let is_store = name.as_deref() == Some(LEASES_FILE);
                        let source = if is_store { Source::Leases } else { Source::File };
                        state.pending.sources.insert(source);
                    }
                }
                Err(Errno::WOULDBLOCK) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether a change of that file (`None`: of the folder itself) matters.
fn matters(folder: Option<&WatchedFolder>, name: Option<&str>) -> bool {
    match (folder.and_then(|folder| folder.files.as_ref()), name) {
        (_, None) => true,
        (Some(files), Some(name)) => files.contains(name),
        (None, Some(name)) => !name.starts_with('.'),
    }
}

fn multicast(protocol: Option<rustix::net::Protocol>, groups: &[u32]) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
    // Needs CAP_NET_ADMIN; without it the default size has to do.
    let _ = sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER);
    let mask = groups.iter().fold(0, |mask, group| mask | (1 << (group - 1)));
    bind(&socket, &netlink::SocketAddrNetlink::new(0, mask))?;
    Ok(socket)
}

/// The head of a netlink message.
#[derive(Clone, Copy, Debug)]
struct Head {
    kind: u16,
    /// Who caused it; 0 is the kernel.
    port: u32,
}

fn drain_netlink(
    socket: &OwnedFd,
    buffer: &mut [u8],
    wake: &mut Wake,
    mut read: impl FnMut(Head, &[u8], &mut Wake),
) -> io::Result<()> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((length, _)) => {
                for (head, payload) in messages(buffer.get(..length).unwrap_or_default()) {
                    read(head, payload, wake);
                }
            }
            Err(Errno::WOULDBLOCK) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::NOBUFS) => {
                wake.sources.insert(Source::Overrun);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Splits a datagram into messages; ends at the first one that is cut off.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (Head, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(word(bytes, 0)?).ok()?;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let head = Head { kind, port: word(bytes, 12)? };
        let payload = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((head, payload))
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn read_route_message(head: Head, payload: &[u8], tunnels: &mut vxlan::Indices, wake: &mut Wake) {
    match head.kind {
        NEW_LINK => tunnels.learn(payload),
        DELETE_LINK => tunnels.forget(payload),
        _ => {}
    }
    let source = match head.kind {
        NEW_LINK | DELETE_LINK if !is_pod_link(payload) => Some(Source::Link),
        NEW_ADDRESS | DELETE_ADDRESS if !is_link_local(payload) => Some(Source::Link),
        NEW_ROUTE | DELETE_ROUTE => read_route(head, payload, wake),
        NEW_NEIGHBOUR | DELETE_NEIGHBOUR if tunnels.concerns(payload) => Some(Source::Tunnel),
        // One message per link; only "all links" is forwarding as a whole.
        NEW_NETCONF if netconf_of_all(payload) => Some(Source::Sysctl),
        32 | 33 | 104 | 105 => Some(Source::Route),
        _ => None,
    };
    wake.sources.extend(source);
}

/// A veth on a bridge, or what the bridge itself says of its ports (`AF_BRIDGE`).
fn is_pod_link(payload: &[u8]) -> bool {
    const AF_BRIDGE: u8 = 7;
    let attributes = Attributes::behind(payload, 16);
    let kind = attributes.find(18).and_then(|info| info.nested().find(1));
    let on_bridge = attributes.find(10).is_some();
    payload.first() == Some(&AF_BRIDGE) || (on_bridge && kind.is_some_and(|kind| kind.text() == "veth"))
}

/// IPv6 link-local: every link gets one by itself.
fn is_link_local(payload: &[u8]) -> bool {
    const AF_INET6: u8 = 10;
    const SCOPE_LINK: u8 = 253;
    payload.first() == Some(&AF_INET6) && payload.get(3) == Some(&SCOPE_LINK)
}

fn netconf_of_all(payload: &[u8]) -> bool {
    const ALL: u32 = u32::MAX;
    Attributes::behind(payload, 4).find(1).and_then(|index| index.u32()) == Some(ALL)
}

fn read_route(head: Head, payload: &[u8], wake: &mut Wake) -> Option<Source> {
    const TABLE_LOCAL: u8 = 255;
    let message = route::parse(payload)?;
    let header = &message.header;
    let destination = route::Facts::of(&message).destination;
    let link_local = matches!(destination, Some(IpAddr::V6(network)) if network.is_unicast_link_local());
    // A pod's own route comes with the pod.
    let protocol = u8::from(header.protocol);
    let comes = protocol == POD_ROUTE_PROTOCOL && head.kind == NEW_ROUTE;
    if header.table == TABLE_LOCAL || link_local || comes {
        return None;
    }
    if protocol != ROUTE_PROTOCOL {
        return Some(Source::Route);
    }
    if head.port != 0 && wake.route_culprits.len() < MAX_CULPRITS {
        wake.route_culprits.insert(culprit(head.port));
    }
    let Some(route) = route::read(&message, Devices::default()) else { return Some(Source::Route) };
    let told = if head.kind == DELETE_ROUTE { Told::Gone } else { Told::Set(route.clone()) };
    wake.tell(route.key, told);
    None
}

/// Who has that netlink port, in words. The kernel gives a process its own ID as its first port, but the number is of
/// that process's namespace: its name can be known only to who sees all processes by the same numbers. Asked at once:
/// an `ip route del` lives for a millisecond.
fn culprit(port: u32) -> String {
    /// Inode of the first PID namespace (`PROC_PID_INIT_INO`).
    const FIRST: u64 = 0xefff_fffc;
    let sees_all = std::fs::metadata("/proc/self/ns/pid").is_ok_and(|first| first.ino() == FIRST);
    let name = sees_all.then(|| std::fs::read_to_string(format!("/proc/{port}/comm")).ok()).flatten();
    match name {
        Some(name) => format!("{} (netlink port {port})", name.trim()),
        None => format!("netlink port {port} (usually the process ID)"),
    }
}

fn read_nft_message(head: Head, payload: &[u8], wake: &mut Wake) {
    let attributes = Attributes::behind(payload, 4);
    if head.kind != NEW_GENERATION {
        // In every other message the first attribute is the table's name.
        wake.touches_pods |= attributes.find(1).is_some_and(|name| name.text() == NFT_PODS_TABLE);
        return;
    }
    wake.sources.insert(Source::Nftables);
    let touched = std::mem::take(&mut wake.touches_pods);
    let process = attributes.find(2).and_then(|pid| pid.be32());
    let name = attributes.find(3).map(|name| name.text().into_owned());
    if let (Some(process), Some(name)) = (process, name)
        && ![THREAD_NAME, CNI_TYPE].contains(&name.as_str())
    {
        if touched {
            wake.sources.insert(Source::PodRules);
        }
        if wake.nft_culprits.len() < MAX_CULPRITS {
            wake.nft_culprits.insert(format!("{name} (pid {process})"));
        }
    }
}

/// The folders that the loop lives by.
pub fn folders(
    conf: &Path,
    bin: &Path,
    run: &Path,
    ours_in_bin: &[&str],
    ours_in_run: &[&str],
) -> Vec<WatchedFolder> {
    let names = |list: &[&str]| Some(list.iter().map(|name| (*name).to_owned()).collect());
    vec![
        WatchedFolder { path: conf.to_owned(), files: None },
        WatchedFolder { path: bin.to_owned(), files: names(ours_in_bin) },
        WatchedFolder { path: run.to_owned(), files: names(ours_in_run) },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (value.len() as u16 + 4).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn link(family: u8, kind: &str, master: bool) -> Vec<u8> {
        let mut bytes = vec![0; 16];
        bytes[0] = family;
        bytes.extend(attribute(18, &attribute(1, format!("{kind}\0").as_bytes())));
        if master {
            bytes.extend(attribute(10, &7u32.to_ne_bytes()));
        }
        bytes
    }

    fn route(family: u8, table: u8, protocol: u8, destination: &[u8]) -> Vec<u8> {
        let mut bytes = vec![family, 24, 0, 0, table, protocol, 0, 1, 0, 0, 0, 0];
        bytes.extend(attribute(1, destination));
        bytes
    }

    fn wake(kind: u16, port: u32, payload: &[u8]) -> Wake {
        let mut wake = Wake::default();
        read_route_message(Head { kind, port }, payload, &mut vxlan::Indices::default(), &mut wake);
        wake
    }

    #[test]
    fn pods_that_come_and_go_wake_nobody() {
        let address = |family: u8, scope: u8| vec![family, 64, 0, scope, 3, 0, 0, 0];
        let netconf = |index: u32| [vec![2, 0, 0, 0], attribute(1, &index.to_ne_bytes())].concat();
        let fe80: [u8; 16] = "fe80::".parse::<std::net::Ipv6Addr>().unwrap().octets();
        for (kind, payload, wakes) in [
            (NEW_LINK, link(0, "veth", true), false),
            (NEW_LINK, link(7, "bridge", false), false),
            (NEW_LINK, link(0, "veth", false), true),
            (DELETE_LINK, link(0, "bridge", false), true),
            (NEW_ADDRESS, address(10, 253), false),
            (NEW_ADDRESS, address(10, 0), true),
            (DELETE_ADDRESS, address(2, 0), true),
            (NEW_ROUTE, route(2, 255, 2, &[10, 0, 0, 1]), false),
            (NEW_ROUTE, route(10, 254, 2, &fe80), false),
            (NEW_ROUTE, route(2, 254, 3, &[10, 0, 0, 0]), true),
            (NEW_NETCONF, netconf(5), false),
            (NEW_NETCONF, netconf(u32::MAX), true),
            (32, vec![0; 12], true),
        ] {
            assert_eq!(!wake(kind, 0, &payload).is_empty(), wakes, "type {kind} {payload:?}");
        }
    }

    #[test]
    fn of_neighbours_and_forwarding_entries_only_those_of_our_tunnels_wake() {
        const OURS: u32 = 7;
        let link = |family: u8, index: u32, name: &str| {
            let mut bytes = vec![family, 0, 0, 0];
            bytes.extend(index.to_ne_bytes());
            bytes.extend([0; 8]);
            bytes.extend(attribute(3, format!("{name}\0").as_bytes()));
            bytes
        };
        let entry = |family: u8, index: u32| {
            let mut bytes = vec![family, 0, 0, 0];
            bytes.extend(index.to_ne_bytes());
            bytes.extend([0x80, 0, 2, 0]);
            bytes
        };
        let mut tunnels = vxlan::Indices::default();
        let mut wakes = |kind: u16, payload: Vec<u8>| {
            let mut wake = Wake::default();
            read_route_message(Head { kind, port: 0 }, &payload, &mut tunnels, &mut wake);
            wake.sources.contains(&Source::Tunnel)
        };
        assert!(!wakes(DELETE_NEIGHBOUR, entry(7, OURS)), "no tunnel yet");
        wakes(NEW_LINK, link(0, OURS, "plat-vxlan"));
        wakes(NEW_LINK, link(0, 9, "cni0"));
        for family in [2, 7, 10] {
            for kind in [NEW_NEIGHBOUR, DELETE_NEIGHBOUR] {
                assert!(wakes(kind, entry(family, OURS)), "type {kind}, family {family}");
                assert!(!wakes(kind, entry(family, 9)), "a pod's: type {kind}, family {family}");
            }
        }
        wakes(DELETE_LINK, link(7, OURS, "plat-vxlan"));
        assert!(wakes(DELETE_NEIGHBOUR, entry(7, OURS)), "it only left a bridge");
        wakes(DELETE_LINK, link(0, OURS, "plat-vxlan"));
        assert!(!wakes(DELETE_NEIGHBOUR, entry(7, OURS)));
        wakes(NEW_LINK, link(0, 11, "plat-vxlan"));
        wakes(NEW_LINK, link(0, 11, "renamed"));
        assert!(!wakes(DELETE_NEIGHBOUR, entry(7, 11)));
    }

    #[test]
    fn who_took_or_changed_a_route_of_ours_is_noted_and_what_became_of_it() {
        let nobody = 0x7fff_fff0;
        let ours = route(2, 254, ROUTE_PROTOCOL, &[10, 244, 2, 0]);
        let key = RouteKey::main("10.244.2.0/24".parse().unwrap(), 0);
        let gone = wake(DELETE_ROUTE, nobody, &ours);
        let said: Vec<&str> = gone.route_culprits.iter().map(String::as_str).collect();
        assert_eq!(said, [format!("netlink port {nobody} (usually the process ID)")]);
        assert_eq!(gone.told, [(key, Told::Gone)].into());
        assert!(gone.is_told() && gone.may_be_fought_over());
        assert_eq!(wake(DELETE_ROUTE, 0, &ours).route_culprits, [].into(), "the kernel itself");
        let set = wake(NEW_ROUTE, nobody, &ours);
        assert!(set.route_culprits.len() == 1 && matches!(set.told[&key], Told::Set(_)));
        let other = wake(DELETE_ROUTE, nobody, &route(2, 254, 3, &[10, 0, 0, 0]));
        assert_eq!((other.route_culprits.len(), other.told.len(), other.is_told()), (0, 0, false));
    }

    #[test]
    fn of_more_routes_than_can_be_told_of_all_are_looked_at() {
        let mut wake = Wake::default();
        for n in 0..=u8::try_from(MAX_TOLD).unwrap() {
            assert!(n == 0 || wake.is_told());
            let head = Head { kind: DELETE_ROUTE, port: 0 };
            let ours = route(2, 254, ROUTE_PROTOCOL, &[10, 244, n, 0]);
            read_route_message(head, &ours, &mut vxlan::Indices::default(), &mut wake);
        }
        assert_eq!((wake.told.len(), wake.is_told()), (MAX_TOLD, false));
    }

    #[test]
    fn who_made_an_nftables_transaction_is_noted_unless_it_was_us() {
        let generation = |name: &str| {
            let mut payload = vec![0; 4];
            payload.extend(attribute(1, &7u32.to_be_bytes()));
            payload.extend(attribute(2, &4711u32.to_be_bytes()));
            payload.extend(attribute(3, format!("{name}\0").as_bytes()));
            let mut wake = Wake::default();
            read_nft_message(Head { kind: NEW_GENERATION, port: 0 }, &payload, &mut wake);
            wake
        };
        assert_eq!(generation("nft").nft_culprits, ["nft (pid 4711)".to_owned()].into());
        assert_eq!(generation(THREAD_NAME).nft_culprits, [].into());
        assert_eq!(generation(CNI_TYPE).nft_culprits, [].into());
        assert!(!generation(THREAD_NAME).is_empty());
    }

    #[test]
    fn temporary_and_unrelated_files_do_not_matter() {
        let conf = WatchedFolder { path: "/c".into(), files: None };
        let bin = WatchedFolder { path: "/b".into(), files: Some(["plat".to_owned()].into()) };
        assert!(matters(Some(&conf), Some("10-foreign.conflist")));
        assert!(!matters(Some(&conf), Some(".05-plat.conflist.tmp")));
        assert!(matters(Some(&bin), Some("plat")));
        assert!(!matters(Some(&bin), Some("loopback")));
        assert!(matters(Some(&bin), None), "the folder itself");
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(kind in any::<u16>(), bytes in prop::collection::vec(any::<u8>(), 0..120)) {
            let (mut wake, mut tunnels) = (Wake::default(), vxlan::Indices::default());
            for (head, payload) in messages(&bytes) {
                read_route_message(head, payload, &mut tunnels, &mut wake);
                read_nft_message(head, payload, &mut wake);
            }
            read_route_message(Head { kind, port: 1 }, &bytes, &mut tunnels, &mut wake);
            read_nft_message(Head { kind: NEW_GENERATION, port: 1 }, &bytes, &mut wake);
        }
    }
}
