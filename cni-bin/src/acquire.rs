//! The addresses of a pod: chosen and recorded under the lease store's lock, or asked from another IPAM
//! plugin; confirmed once the pod's link exists; released.

use std::collections::HashSet;
use std::net::IpAddr;

use plat_crds::blocks_file::BlocksFile;
use plat_crds::host_port::HostPort;
use plat_crds::lease::{Datapath, Guard, HostVeth, Lease, LeasedAddress, NetnsId, Pool, PoolId};
use plat_crds::{Block, Family};

use crate::add::Done;
use crate::await_block::Patience;
use crate::boot::{boot_ms, since_now};
use crate::call::Call;
use crate::config::{Attachment, Dns, IpamKind, read_resolv_conf};
use crate::error::{Code, Error};
use crate::mac::Mac;
use crate::netns::Netns;
use crate::pods::{self, Added, Orphans, Remover, hostports};
use crate::pool::{self, Chosen, Source, StoreView};
use crate::reply::Ip;
use crate::store::{Held, Kernel, Locked, Survey};
use crate::sysctl::Sysctls;
use crate::wire::{self, NoGateway, PodNet, Style};
use crate::{delegate, netlink, store};

/// What a pod was given.
#[derive(Debug)]
pub struct Given {
    /// Addresses and routes.
    pub net: PodNet,
    /// How the addresses sit on the link.
    pub style: Style,
    /// Resolvers that the IPAM part names.
    pub dns: Dns,
    /// The lease as it stands in the store.
    pub held: Held,
    /// The node's blocks, whose gateways belong onto the bridge.
    pub blocks: Vec<Block>,
    /// MTU in bytes where the configuration does not say.
    pub mtu: Option<u32>,
}

/// Gives the pod its addresses, by whatever way the configuration says, and records the lease.
pub fn acquire(call: &mut Call, conf: &Attachment, netns: &Netns, done: &mut Done) -> Result<Given, Error> {
    match call.network.ipam.clone() {
        IpamKind::Blocks => from_blocks(call, conf, netns.id(), done),
        IpamKind::Ranges => {
            let dns = read_resolv_conf(conf.resolv_conf.as_deref())?;
            let source = Source { pool: Pool::Ranges, sets: conf.ranges.clone() };
            let lease = blank_lease(call, conf, netns.id(), source.pool);
            let (held, chosen) = reserve(&mut call.lock()?, conf, lease, &source, done)?;
            let (net, style) = leased_net(conf, &chosen, Style::Subnet)?;
            Ok(Given { dns, ..given(net, style, held) })
        }
        IpamKind::Delegated(plugin) => from_delegate(call, conf, &plugin, netns.id(), done),
        IpamKind::None if conf.datapath == Datapath::Routed => {
            let why = "there is nothing to route without an address: set ipam";
            Err(Error::because(Code::Config, "the datapath routed needs addresses", why))
        }
        IpamKind::None => {
            // Without an address there still is a link, which DEL finds by the lease.
            let mut lease = blank_lease(call, conf, netns.id(), Pool::Delegated);
            complete(&mut lease, conf)?;
            let held = record(call, lease, done)?;
            Ok(given(PodNet::default(), Style::Subnet, held))
        }
    }
}

/// The network of a pod that leased these addresses, which on a bridge sit as `bridged` says.
fn leased_net(conf: &Attachment, chosen: &[Chosen], bridged: Style) -> Result<(PodNet, Style), Error> {
    match conf.datapath {
        Datapath::Bridge => Ok((PodNet::leased(chosen, bridged, &conf.bridge, &conf.routes), bridged)),
        Datapath::Routed => Ok((PodNet::routed(wire::ips(chosen, bridged), &conf.routes)?, Style::Routed)),
    }
}

impl From<NoGateway> for Error {
    fn from(error: NoGateway) -> Error {
        Error::because(Code::Config, "the datapath routed needs a gateway", error)
    }
}

fn given(net: PodNet, style: Style, held: Held) -> Given {
    Given { net, style, dns: Dns::default(), held, blocks: Vec::new(), mtu: None }
}

fn from_blocks(call: &mut Call, conf: &Attachment, netns: NetnsId, done: &mut Done) -> Result<Given, Error> {
    let dns = read_resolv_conf(conf.resolv_conf.as_deref())?;
    let (run_dir, boot) = (call.network.run_dir.clone(), call.boot.clone());
    let mut patience = Patience::default();
    loop {
        let lease = blank_lease(call, conf, netns, Pool::Blocks);
        let mut store = call.lock()?;
        // Read and judged only now: while we waited for the lock, a block may have been drained and given to
        // another node, or the time come after which none may be leased from.
        let file = pool::read_blocks(&run_dir)?;
        let source = pool::from_blocks(&file, &boot, boot_ms())?;
        let full = match reserve(&mut store, conf, lease, &source, done) {
            Ok((held, chosen)) => {
                drop(store);
                let (net, style) = leased_net(conf, &chosen, Style::Host)?;
                return Ok(Given {
                    dns,
                    blocks: pool::all_blocks(&file),
                    mtu: file.mtu,
                    ..given(net, style, held)
                });
            }
            Err(error) if may_grow(&mut store, conf, &source, &file, &error) => error,
            Err(error) => return Err(error),
        };
        // Others, whose DELs free addresses, need the lock.
        drop(store);
        patience.wait(&run_dir, &file.blocks, full)?;
    }
}

/// Whether what an ADD failed for is a full family of which another block may come.
fn may_grow(
    store: &mut Locked<'_>,
    conf: &Attachment,
    source: &Source,
    file: &BlocksFile,
    error: &Error,
) -> bool {
    // A requested address is in a block or not, whatever comes.
    if error.code != Code::Exhausted as u32 || file.may_grow.is_empty() || !conf.requested_ips.is_empty() {
        return false;
    }
    let Ok(survey) = store.survey("", "") else { return false };
    let mut view = StoreView {
        survey: &survey,
        pool: PoolId::new(&source.pool, ""),
        cursors: Vec::new(),
        foreign: HashSet::new(),
    };
    // Fails as the ADD did; then the view knows which addresses are others'.
    let _ = choose(store, source, &[], &mut view, None);
    pool::full(source, &view).is_some_and(|family| file.may_grow.contains(&family))
}

fn from_delegate(
    call: &mut Call,
    conf: &Attachment,
    plugin: &str,
    netns: NetnsId,
    done: &mut Done,
) -> Result<Given, Error> {
    // A lease without addresses comes first, so that of two ADDs with the same key only one reaches the plugin: the
    // DEL by which the other is undone would give up the address of the first.
    let lease = blank_lease(call, conf, netns, Pool::Delegated);
    let mut held = record(call, lease, done)?;
    // From now on its DEL is due, also if its ADD fails half way.
    done.delegated = Some(plugin.to_owned());
    let reply = delegate::add(plugin, &call.plugin_path, &call.input, call.network.version)?;
    let leased = |ip: &Ip| LeasedAddress {
        address: ip.address.addr(),
        subnet_length: ip.address.prefix_len(),
        masquerade: conf.bridge.ip_masq,
    };
    let addresses = reply.ips.iter().map(leased).collect();
    let (net, style) = match conf.datapath {
        Datapath::Bridge => (PodNet::delegated(reply.ips, reply.routes, &conf.bridge), Style::Subnet),
        Datapath::Routed => (PodNet::routed(reply.ips, &reply.routes)?, Style::Routed),
    };
    held.lease.addresses = addresses;
    complete(&mut held.lease, conf)?;
    done.leased = Some(held.clone());
    confirm(&mut call.lock()?, &held)?;
    Ok(Given { dns: reply.dns, ..given(net, style, held) })
}

/// Chooses addresses and records them, under one lock.
fn reserve(
    store: &mut Locked<'_>,
    conf: &Attachment,
    lease: Lease,
    source: &Source,
    done: &mut Done,
) -> Result<(Held, Vec<Chosen>), Error> {
    let complete = |lease: &mut Lease| {
        lease.addresses.iter_mut().for_each(|leased| leased.masquerade = conf.bridge.ip_masq);
        complete(lease, conf)
    };
    let (held, chosen) = lease_from(store, lease, source, &conf.requested_ips, complete)?;
    done.leased = Some(held.clone());
    Ok((held, chosen))
}

/// Adds to a lease what depends on its addresses.
fn complete(lease: &mut Lease, conf: &Attachment) -> Result<(), Error> {
    lease.guard = guard(conf, lease);
    lease.host_ports = host_ports(conf, &lease.addresses)?;
    Ok(())
}

/// Gives a lease addresses of that source, lets `complete` add what depends on them, and records it.
pub fn lease_from(
    store: &mut Locked<'_>,
    mut lease: Lease,
    source: &Source,
    requested: &[IpAddr],
    complete: impl FnOnce(&mut Lease) -> Result<(), Error>,
) -> Result<(Held, Vec<Chosen>), Error> {
    let pool = lease.pool_id();
    let survey = store.survey(&lease.container_id, &lease.ifname)?;
    refuse_second(&survey, &lease)?;
    let sets = 0..u32::try_from(source.sets.len()).unwrap_or(u32::MAX);
    let cursors: Vec<Option<IpAddr>> = sets.map(|set| store.cursor(pool, set)).collect::<Result<_, _>>()?;
    let mut view = StoreView { survey: &survey, pool, cursors, foreign: HashSet::new() };
    // Where addresses come from the configuration, another network's pods may well have the same on another bridge.
    let network = lease.network.clone().filter(|_| source.pool == Pool::Ranges);
    let chosen = choose(store, source, requested, &mut view, network.as_deref())?;
    let leased = |c: &Chosen| LeasedAddress {
        address: c.address,
        subnet_length: c.range.subnet.prefix_len(),
        masquerade: false,
    };
    lease.addresses = chosen.iter().map(leased).collect();
    complete(&mut lease)?;
    let slot = store.insert(&survey, &lease)?;
    for (set, picked) in (0..).zip(&chosen).filter(|(_, c)| !c.requested) {
        // A lost cursor costs only the order in which addresses come back; the lease stands.
        let _ = store.set_cursor(pool, set, picked.address);
    }
    Ok((Held { slot, lease }, chosen))
}

/// Chooses addresses that no pod of another network has. What turns out to be such a pod's is noted in the view.
fn choose(
    store: &mut Locked<'_>,
    source: &Source,
    requested: &[IpAddr],
    view: &mut StoreView<'_>,
    network: Option<&str>,
) -> Result<Vec<Chosen>, Error> {
    loop {
        let chosen = pool::choose(source, requested, view)?;
        match foreign_of(store.kernel(), &chosen, network)? {
            Some(address) => view.foreign.insert(address),
            None => return Ok(chosen),
        };
    }
}

/// The first chosen address that a pod of another network has, or may be about to have.
fn foreign_of(
    kernel: &mut dyn Kernel,
    chosen: &[Chosen],
    network: Option<&str>,
) -> Result<Option<IpAddr>, netlink::Error> {
    for Chosen { address, .. } in chosen {
        if kernel.is_foreign(address, network)? {
            return Ok(Some(*address));
        }
    }
    Ok(None)
}

/// Records a lease without addresses: others choose them, if there are to be any.
fn record(call: &mut Call, lease: Lease, done: &mut Done) -> Result<Held, Error> {
    let mut store = call.lock()?;
    let survey = store.survey(&lease.container_id, &lease.ifname)?;
    refuse_second(&survey, &lease)?;
    let slot = store.insert(&survey, &lease)?;
    let held = Held { slot, lease };
    done.leased = Some(held.clone());
    Ok(held)
}

/// The host ports asked for, if the pod has an address that each can lead to.
fn host_ports(conf: &Attachment, addresses: &[LeasedAddress]) -> Result<Vec<HostPort>, Error> {
    let served = |port: &&HostPort| addresses.iter().any(|a| port.host_ip.serves(Family::of(&a.address)));
    match conf.host_ports.iter().find(|port| !served(port)) {
        None => Ok(conf.host_ports.clone()),
        Some(port) => {
            let why = "the pod has no address of that family";
            Err(Error::because(Code::Config, format!("cannot open host port {port}"), why))
        }
    }
}

fn refuse_second(survey: &Survey, lease: &Lease) -> Result<(), Error> {
    if survey.has_lease() { Err(second(lease)) } else { Ok(()) }
}

fn second(lease: &Lease) -> Error {
    let msg = format!("container {} already has a lease for {}", lease.container_id, lease.ifname);
    Error::because(Code::Exists, msg, "a DEL must come before another ADD")
}

/// What the pod of that lease is held to.
fn guard(conf: &Attachment, lease: &Lease) -> Option<Guard> {
    let scope = conf.guard?;
    let first = lease.addresses.first().map(|leased| leased.address);
    let (_, Mac(mac)) = wire::macs(&lease.container_id, &lease.ifname, first, conf.requested_mac);
    Some(Guard { mac, scope })
}

fn blank_lease(call: &Call, conf: &Attachment, netns: NetnsId, pool: Pool) -> Lease {
    let container = &call.container;
    Lease {
        container_id: container.id.clone(),
        ifname: container.ifname.clone(),
        network: Some(call.network.name.clone()),
        pool,
        addresses: Vec::new(),
        veth: HostVeth { name: wire::host_name(&container.id, &container.ifname, 0), index: 0 },
        datapath: conf.datapath,
        netns: Some(netns),
        since: since_now(),
        ..Lease::default()
    }
}

/// Writes the pod's link into its lease, and makes sure that the lease still stands: someone may have
/// removed the store while we worked, and the next one rebuilt it when our link was not there yet to prove
/// our addresses. Whoever has them now keeps them, and so does another ADD with our key, which came after a DEL.
pub fn confirm(store: &mut Locked<'_>, held: &Held) -> Result<(), Error> {
    let lease = held.lease.clone();
    let found = store.find_at(held.slot, &lease.container_id, &lease.ifname)?;
    if found.as_ref().is_some_and(|found| !is_of_this_add(&lease, &found.lease)) {
        return Err(second(&lease));
    }
    let as_written = |found: &Held| {
        let found = &found.lease;
        (found.since, &found.pool, &found.addresses) == (lease.since, &lease.pool, &lease.addresses)
    };
    let stands = found.as_ref().is_some_and(as_written);
    if !stands && let Some(other) = store.leases()?.iter().find(|held| contradicts(&lease, &held.lease)) {
        let msg = "the lease store was removed meanwhile, and an address given to another pod";
        let why = format!("container {} has it now; try again", other.lease.container_id);
        return Err(Error::because(Code::TryAgain, msg, why));
    }
    match found {
        Some(held) => store.replace(&Held { slot: held.slot, lease })?,
        None => {
            let survey = store.survey(&lease.container_id, &lease.ifname)?;
            store.insert(&survey, &lease)?;
        }
    }
    Ok(())
}

/// Whether the lease that is found under our key is that of this ADD: it began when ours did, or was rebuilt from
/// our link, which only we have the number of. Pure.
fn is_of_this_add(ours: &Lease, found: &Lease) -> bool {
    ours.since == found.since || (ours.veth.index != 0 && ours.veth.index == found.veth.index)
}

/// Whether another container's lease holds one of our addresses. Pure.
fn contradicts(ours: &Lease, other: &Lease) -> bool {
    let same_container = (&ours.container_id, &ours.ifname) == (&other.container_id, &other.ifname);
    let same_pool = ours.pool_id() == other.pool_id() || other.pool_id() == PoolId::UNKNOWN;
    !same_container && same_pool && share_address(ours, other) && ours.pool != Pool::Delegated
}

/// Writes what the pod, which is behind that device of the host, has in nftables.
pub fn open_rules(call: &mut Call, held: &Held, device: &str) -> Result<(), Error> {
    if pods::add(&held.lease)? == Added::Unsettled {
        let mut store = call.lock()?;
        let leases: Vec<Lease> = store.all()?;
        pods::settle(&held.lease, &leases, &mut || store.kernel().held())?;
    }
    hostports::forget_strays([&held.lease]);
    // Only now, behind the rule that guards the loopback.
    if let Some(switch) = hostports::loopback_switch(&held.lease, device) {
        Sysctls::default().ensure(&switch, "1")?;
    }
    Ok(())
}

/// Ends a lease, which was last seen in that slot, and what the pod has in nftables. One that does not stand
/// any more, or a store that does not exist, is fine.
pub fn release(call: &mut Call, held: &Held, rules: &mut Remover) -> Result<(), Error> {
    let Some(mut store) = call.lock_existing_store()? else { return Ok(rules.remove(&held.lease)?) };
    let Held { slot, lease } = held;
    match store.find_at(*slot, &lease.container_id, &lease.ifname)? {
        Some(found) => Ok(end(&mut store, &Held { slot: found.slot, lease: lease.clone() }, rules)?),
        None => forget(&mut store, lease, rules),
    }
}

/// Whose the lease is that stands under our key once an ADD was taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Successor {
    /// There is none: nothing stands.
    None,
    /// Another ADD's, which came after a DEL.
    Stands,
}

/// The same for an ADD that failed: should a DEL and another ADD have come meanwhile, the lease is that one's and
/// stays.
pub fn take_back(call: &mut Call, held: &Held, rules: &mut Remover) -> Result<Successor, Error> {
    let Some(mut store) = call.lock_existing_store()? else {
        rules.remove(&held.lease)?;
        return Ok(Successor::None);
    };
    let Held { slot, lease } = held;
    match store.find_at(*slot, &lease.container_id, &lease.ifname)? {
        Some(found) if is_of_this_add(lease, &found.lease) => {
            end(&mut store, &Held { slot: found.slot, lease: lease.clone() }, rules)?;
            Ok(Successor::None)
        }
        found => {
            forget(&mut store, lease, rules)?;
            Ok(if found.is_some() { Successor::Stands } else { Successor::None })
        }
    }
}

/// Takes away what a pod has in nftables that has no lease. Someone else may have its address by now, and
/// keeps what speaks of it.
fn forget(store: &mut Locked<'_>, lease: &Lease, rules: &mut Remover) -> Result<(), Error> {
    rules.remove(lease)?;
    let leases: Vec<Lease> = store.all()?;
    if leases.iter().any(|other| share_address(lease, other)) {
        pods::restore(leases.iter(), Orphans::Leave)?;
    }
    Ok(())
}

/// The same for what the kernel proved where no lease was found.
pub fn forget_unrecorded(call: &mut Call, lease: &Lease, rules: &mut Remover) -> Result<(), Error> {
    match call.lock_existing_store()? {
        Some(mut store) => forget(&mut store, lease, rules),
        None => Ok(rules.remove(lease)?),
    }
}

/// Whether two leases hold one address.
pub fn share_address(a: &Lease, b: &Lease) -> bool {
    a.addresses.iter().any(|a| b.addresses.iter().any(|b| a.address == b.address))
}

/// Why leases could not be looked after: a DEL's, a GC's or a sweep's.
#[derive(Debug, thiserror::Error)]
pub enum EndError {
    /// The lease store cannot be used.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The kernel would not say which links there are, or keeps what the pod has in nftables.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
}

impl From<EndError> for Error {
    fn from(error: EndError) -> Error {
        match error {
            EndError::Store(error) => error.into(),
            EndError::Netlink(error) => error.into(),
        }
    }
}

impl EndError {
    /// Whether another process has the store's lock, which passes.
    pub fn is_busy(&self) -> bool {
        matches!(self, EndError::Store(store::Error::Busy { .. }))
    }
}

/// That lease as it stands now. One that began since is another.
pub fn still(store: &mut Locked<'_>, lease: &Lease) -> Result<Option<Held>, store::Error> {
    let found = store.find(&lease.container_id, &lease.ifname)?;
    Ok(found.filter(|held| held.lease.since == lease.since))
}

/// Takes away what the pod has in nftables, and then its lease, under one lock: so nobody restores from the
/// lease in between, and nothing is left behind that speaks of an address which another pod gets next.
pub fn end(store: &mut Locked<'_>, held: &Held, rules: &mut Remover) -> Result<(), EndError> {
    rules.remove(&held.lease)?;
    Ok(store.remove(held.slot)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::lease::Since;

    fn lease(id: &str, pool: Pool, address: &str) -> Lease {
        Lease {
            container_id: id.into(),
            ifname: "eth0".into(),
            network: Some("n".into()),
            pool,
            addresses: vec![LeasedAddress {
                address: address.parse().unwrap(),
                subnet_length: 24,
                masquerade: false,
            }],
            veth: HostVeth::default(),
            netns: None,
            since: Since::default(),
            ..Lease::default()
        }
    }

    #[test]
    fn only_another_containers_lease_of_the_same_address_and_pool_contradicts() {
        let ours = lease("a", Pool::Blocks, "10.1.0.2");
        for (other, expected) in [
            (lease("b", Pool::Blocks, "10.1.0.2"), true),
            (lease("b", Pool::Unknown, "10.1.0.2"), true),
            (lease("a", Pool::Unknown, "10.1.0.2"), false),
            (lease("b", Pool::Blocks, "10.1.0.3"), false),
            (lease("b", Pool::Ranges, "10.1.0.2"), false),
        ] {
            assert_eq!(contradicts(&ours, &other), expected, "{other:?}");
        }
    }

    #[test]
    fn a_lease_under_our_key_is_ours_by_its_beginning_or_by_the_number_of_our_link() {
        let at = |boot_ms: u64, index: u32| Lease {
            veth: HostVeth { name: "plat1".into(), index },
            since: Since { boot_ms, unix_seconds: 0 },
            ..lease("a", Pool::Blocks, "10.1.0.2")
        };
        for (ours, found, expected) in [
            (at(1, 0), at(1, 0), true),
            (at(1, 7), at(1, 0), true),
            (at(1, 7), at(2, 7), true),
            (at(1, 0), at(2, 0), false),
            (at(1, 7), at(2, 8), false),
        ] {
            assert_eq!(is_of_this_add(&ours, &found), expected, "{ours:?} {found:?}");
        }
    }
}
