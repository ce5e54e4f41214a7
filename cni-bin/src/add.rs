//! ADD: lease, wire, reply. If anything fails on the way, everything is undone.
//!
//! The lease comes first ([`crate::acquire`]), so that a process that is killed leaves at worst a lease
//! without a link, which a DEL or the agent's sweep ends, and never a link with an address that another
//! pod could get too. Then the link, which bears a copy of the lease ([`crate::attach`]). Then, before the pod
//! gets its addresses, the lease is confirmed: should the store have been deleted or rebuilt meanwhile, so that
//! someone else has one of them, this ADD gives way.

use crate::acquire::{self, Given, Successor};
use crate::attach::{self, Attached};
use crate::call::Call;
use crate::config::{Attachment, IpamKind, Network};
use crate::error::{Code, Error};
use crate::fail;
use crate::link::{self, Link};
use crate::netns::Netns;
use crate::pods::Remover;
use crate::reply::{self, Interface, Ip, Reply};
use crate::store::Held;
use crate::{delegate, netlink, teardown};

/// What an ADD has done so far.
#[derive(Debug, Default)]
pub struct Done {
    /// The delegated IPAM plugin was asked.
    pub delegated: Option<String>,
    /// A lease stands in the store.
    pub leased: Option<Held>,
    /// The pod's link exists, or may.
    pub link: Option<HostEnd>,
}

/// The host's end of a pod's link, as far as an ADD knows it.
#[derive(Debug)]
pub enum HostEnd {
    /// The kernel was asked for one of that name, and has not answered that we could read.
    Asked(String),
    /// It exists, with that number and name.
    Made(u32, String),
}

/// Connects a container; returns the result's text. What `done` says stands in kernel and store, also
/// after an error: unless the result reaches the runtime, the caller must [`undo`] it.
pub fn add(call: &mut Call, done: &mut Done) -> Result<String, Error> {
    if let Some(passed_on) = pass_through(&call.network)? {
        return Ok(passed_on);
    }
    let conf = Attachment::parse(&call.network, &call.container.args)?;
    let netns = Netns::open(&call.container.netns)?;
    refuse_host_netns(&netns)?;
    fail::point("start")?;
    let mut given = acquire::acquire(call, &conf, &netns, done)?;
    fail::point("lease")?;
    let attached = attach::attach(call, &conf, &mut given, &netns, done)?;
    fail::point("attached")?;
    // Before the pod has its addresses: the link bears the lease by now, so whoever rebuilds the store sees it.
    acquire::confirm(&mut call.lock()?, &given.held)?;
    fail::point("confirm")?;
    // Before the pod can send: nothing that it sends goes unseen, and nothing that it may send is lost.
    acquire::open_rules(call, &given.held, attached.towards_pod())?;
    fail::point("rules")?;
    let mut pod = attach::raise(call, &conf, &given, &netns, &attached)?;
    fail::point("raised")?;
    attach::await_use(call, &conf, &given, &attached, &mut pod)?;
    describe(call, conf, given, &attached).render(call.network.version)
}

/// Behind another interface plugin there is nothing for us to do: its result is passed on. Pure.
pub fn pass_through(network: &Network) -> Result<Option<String>, Error> {
    let previous = network.json.get("prevResult").object("prevResult")?;
    if previous.is_null() {
        return Ok(None);
    }
    let version = network.version;
    if previous.get("cniVersion").text("cniVersion")? == version.text() {
        // As it came, with keys that we do not know.
        let text = serde_json::to_string(&reply::without_stray_indexes(previous.clone()));
        return text.map(Some).map_err(|e| Error::because(Code::Internal, "cannot pass prevResult on", e));
    }
    Reply::parse(previous, version)?.render(version).map(Some)
}

/// A path that leads to the host's own namespace is a mistake (a recycled `/proc/<pid>`), and acting on it
/// would change the host's network. `CNI_NETNS_OVERRIDE` says that it is meant.
fn refuse_host_netns(netns: &Netns) -> Result<(), Error> {
    let meant = std::env::var("CNI_NETNS_OVERRIDE").is_ok_and(|v| v == "1" || v.eq_ignore_ascii_case("true"));
    if meant || !netns.is_own() {
        return Ok(());
    }
    let why = "it is the network namespace of the host, which this plugin runs in";
    Err(Error::because(Code::Netns, "cannot use CNI_NETNS", why))
}

/// The result: bridge, host's end, pod's end, in this order, as chained plugins expect of a bridge plugin;
/// without bridge the other two, as of the ptp plugin.
fn describe(call: &Call, conf: Attachment, given: Given, attached: &Attached) -> Reply {
    let end = |name: &str, mac: String, sandbox: &str, mtu: u32| Interface {
        name: name.to_owned(),
        mac,
        sandbox: sandbox.to_owned(),
        mtu: Some(mtu).filter(|mtu| *mtu != 0),
    };
    let mtu = attached.host.mtu;
    let bridge = attached.bridge.as_ref().map(|bridge| {
        end(&bridge.name, bridge.mac.map(|mac| mac.to_string()).unwrap_or_default(), "", bridge.mtu)
    });
    let ends = [
        end(&attached.host.name, attached.host_mac.to_string(), "", mtu),
        end(&call.container.ifname, attached.pod_mac.to_string(), &call.container.netns, mtu),
    ];
    let interfaces: Vec<Interface> = bridge.into_iter().chain(ends).collect();
    let pod = interfaces.len() - 1;
    Reply {
        ips: given.net.ips.into_iter().map(|ip| Ip { interface: Some(pod), ..ip }).collect(),
        routes: given.net.routes,
        dns: if conf.dns.is_empty() { given.dns } else { conf.dns },
        interfaces,
    }
}

/// Takes back what an ADD did, in reverse. Goes on after an error; what could not be taken back is
/// returned in words.
pub fn undo(call: &mut Call, done: Done) -> Vec<String> {
    let mut left = Vec::new();
    let mut link_is_gone = true;
    if let Some(end) = done.link
        && let Err(error) = delete(call, end)
    {
        // The address lives on behind that link: its lease must too.
        link_is_gone = false;
        left.push(error.to_string());
    }
    let mut successor = Successor::None;
    if let Some(held) = done.leased.filter(|_| link_is_gone) {
        match acquire::take_back(call, &held, &mut Remover::default()) {
            Ok(found) => successor = found,
            Err(error) => left.push(error.to_string()),
        }
    }
    // The plugin knows the pod by container and interface alone: its DEL would hit the successor.
    if let Some(plugin) = done.delegated.filter(|_| link_is_gone && successor == Successor::None)
        && let Err(error) = delegate::run(&plugin, &call.plugin_path, "DEL", &call.input)
    {
        left.push(error.to_string());
    }
    left
}

fn delete(call: &mut Call, end: HostEnd) -> Result<(), netlink::Error> {
    let (index, name) = match end {
        HostEnd::Made(index, name) => (index, name),
        HostEnd::Asked(name) => {
            let container = call.container.clone();
            let is_ours = |link: &Link| teardown::is_end_of(link, &container.id, &container.ifname);
            let Some(link) = link::link_by_name(call.host(), &name)?.filter(is_ours) else { return Ok(()) };
            (link.index, name)
        }
    };
    netlink::deleted(call.host().request(link::delete_link(index, &name))).map(|_| ())
}

/// The name of the delegated IPAM plugin, if there is one.
pub fn delegate_of(call: &Call) -> Option<String> {
    match &call.network.ipam {
        IpamKind::Delegated(plugin) => Some(plugin.clone()),
        _ => None,
    }
}
