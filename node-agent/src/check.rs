//! `plat-agent check`: what on this node is in the way of pods and of their addresses, or will be.
//!
//! Reads the kernel and the node's files, and changes nothing; the API server is not asked, so it also works while
//! that is away. Decided by [`judge`] from [`Seen`]; each finding has its cure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use plat_cni::boot::{self, BootId};
use plat_cni::netlink::{Protocol, Socket};
use plat_crds::block::{Block, Family};
use plat_crds::blocks_file::{BlocksFile, HeldBlock};
use plat_crds::lease::Datapath;
use plat_crds::names::{BLOCKS_FILE, CONFLIST_FILE, VETH_PREFIX};
use serde::Serialize;

use crate::args::Check;
use crate::cache::{Cache, Loaded};
use crate::conf;
use crate::desired::{self, Map, Me};
use crate::facts::{BlockFact, PolicyFact, RangeFact};
use crate::files::Files;
use crate::foreign::{self, ForeignRoute};
use crate::kernel::forward::{self, Scene};
use crate::kernel::kube_proxy::{self, Local};
use crate::kernel::nft::Nft;
use crate::kernel::route;
use crate::policies;

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Subject {
    /// The agent and what it wrote.
    Agent,
    /// The CNI configuration.
    Cni,
    /// Addresses that others on this host use.
    Addresses,
    /// What drops forwarded packets.
    Forwarding,
    /// kube-proxy.
    KubeProxy,
}

/// Something that an administrator should know.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// What it is about.
    pub subject: Subject,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subject = match self.subject {
            Subject::Agent => "agent",
            Subject::Cni => "cni",
            Subject::Addresses => "addresses",
            Subject::Forwarding => "forwarding",
            Subject::KubeProxy => "kube-proxy",
        };
        write!(f, "{subject}: {}", self.message)
    }
}

/// What was read of the node.
#[derive(Debug, Default)]
pub struct Seen {
    /// PodCIDRs that the agent knows, by name.
    pub blocks: BTreeMap<String, BlockFact>,
    /// ClusterCIDRs that it knows, by name.
    pub ranges: BTreeMap<String, RangeFact>,
    /// RoutingPolicies that it knows, by name.
    pub policies: BTreeMap<String, PolicyFact>,
    /// Why the above cannot be read.
    pub unknown: Option<String>,
    /// What the CNI binary may lease from, or why that cannot be read.
    pub file: Option<Result<BlocksFile, String>>,
    /// This boot.
    pub boot_id: String,
    /// Now, in milliseconds of `CLOCK_BOOTTIME`.
    pub boot_ms: u64,
    /// How new pods are joined to the host.
    pub datapath: Datapath,
    /// CNI configurations.
    pub confs: Vec<String>,
    /// Routes of others.
    pub routes: Vec<ForeignRoute>,
    /// What drops pods' packets, may drop them or hides their source, in words.
    pub blockers: Vec<String>,
    /// What becomes of each kind of packet of theirs.
    pub verdicts: Vec<String>,
    /// Legacy tables, which cannot be read.
    pub legacy: BTreeSet<Family>,
    /// Whom kube-proxy takes for pods.
    pub locals: BTreeSet<(Family, Local)>,
}

/// The findings. Pure.
pub fn judge(bridge: &str, seen: &Seen) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |subject, message: String| findings.push(Finding { subject, message });
    for message in agent(seen) {
        add(Subject::Agent, message);
    }
    for message in cni(seen) {
        add(Subject::Cni, message);
    }
    let node = seen.file.iter().flatten().map(|file| file.node.clone()).next().unwrap_or_default();
    let me = Me::onlooker(node, bridge.to_owned());
    let absent = BTreeSet::new();
    let policies = policies::in_force(&seen.policies, &policies::labels_of(&me.node, &seen.blocks));
    let map = Map { blocks: &seen.blocks, ranges: &seen.ranges, policies: &policies, absent: &absent };
    for fault in foreign::overlaps(&me, map, &seen.routes) {
        add(Subject::Addresses, fault.message);
    }
    for blocker in &seen.blockers {
        add(Subject::Forwarding, blocker.clone());
    }
    for family in &seen.legacy {
        add(
            Subject::Forwarding,
            format!(
                "legacy (not nft) {family} iptables are loaded, which cannot be read from here, neither a FORWARD chain that drops pods' packets nor kube-proxy's rules; move to iptables-nft"
            ),
        );
    }
    for message in kube_proxy(bridge, seen) {
        add(Subject::KubeProxy, message);
    }
    findings
}

fn agent(seen: &Seen) -> Vec<String> {
    let mut messages: Vec<String> = seen.unknown.iter().cloned().collect();
    match &seen.file {
        None => messages.push("the blocks file is missing: this node has no block yet, or the agent has not run; see kubectl get podcidrs and the agent's log".to_owned()),
        Some(Err(why)) => messages.push(why.clone()),
        Some(Ok(file)) if file.boot_id != seen.boot_id => {
            messages.push("the blocks file is from before the last boot: no pod can start until the agent renews it; see its log".to_owned());
        }
        Some(Ok(file)) if file.blocks.is_empty() => messages.push("this node has no block; see kubectl get clustercidrs for a range that selects it and has free blocks".to_owned()),
        Some(Ok(file)) if file.lease_until <= seen.boot_ms => messages.push(format!("no pod can start: the API server was last reached at {}; restore the connection", file.last_contact)),
        Some(Ok(_)) => {}
    }
    messages
}

fn cni(seen: &Seen) -> Vec<String> {
    match conf::active(&seen.confs) {
        Some(active) if active == CONFLIST_FILE => Vec::new(),
        Some(active) if seen.confs.iter().any(|name| name == CONFLIST_FILE) => vec![format!(
            "the container runtime takes {active}, which sorts before {CONFLIST_FILE}; remove it if new pods are to get Plat's network"
        )],
        _ => vec![format!(
            "{CONFLIST_FILE} is not there: the agent writes it once the node is ready for pods; see its NodeNetwork's conditions"
        )],
    }
}

/// Whose source address kube-proxy's rules lose.
fn kube_proxy(bridge: &str, seen: &Seen) -> Vec<String> {
    let file = seen.file.iter().flatten().next();
    let own: Vec<Block> = file.iter().flat_map(|file| &file.blocks).map(|held| held.cidr).collect();
    let (link, cure) = match seen.datapath {
        Datapath::Bridge => (
            bridge.to_owned(),
            format!("detectLocalMode: BridgeInterface with detectLocal.bridgeInterface: {bridge}"),
        ),
        Datapath::Routed => (
            format!("{VETH_PREFIX}*"),
            format!(
                "detectLocalMode: InterfaceNamePrefix with detectLocal.interfaceNamePrefix: {VETH_PREFIX}"
            ),
        ),
    };
    let cure = format!("set {cure} in kube-proxy's configuration, which holds for every block");
    let say = |(family, local): &(Family, Local)| match local {
        Local::From(cidr) => {
            let (whose, when) = lost(*cidr, *family, &own, &seen.ranges)?;
            Some(format!(
                "only {cidr} counts as addresses of pods, so {whose} {when} their source address on the way to a Service: {cure}"
            ))
        }
        Local::Over(only) if seen.datapath == Datapath::Bridge && only == bridge => None,
        Local::OverAny(start) if link.starts_with(start.as_str()) => None,
        Local::Over(only) | Local::OverAny(only) => Some(format!(
            "only what comes in by link {only} ({family}) counts as packets of pods, and these come in by {link}, so they lose their source address on the way to a Service: {cure}"
        )),
    };
    seen.locals.iter().filter_map(say).collect()
}

/// Which pods are none for kube-proxy if `cidr` is all that it takes for pods.
fn lost(
    cidr: Block,
    family: Family,
    own: &[Block],
    ranges: &BTreeMap<String, RangeFact>,
) -> Option<(String, &'static str)> {
    let outside = |blocks: &mut dyn Iterator<Item = Block>| {
        let outside = blocks.filter(|block| block.family() == family && !cidr.covers(block));
        let outside: Vec<String> = outside.map(|block| block.to_string()).collect();
        (!outside.is_empty()).then(|| outside.join(" and "))
    };
    if let Some(own) = outside(&mut own.iter().copied()) {
        return Some((format!("pods of this node's {own}"), "lose"));
    }
    // In mode NodeCIDR it is this node's block, and other nodes' are no matter.
    if own.contains(&cidr) {
        return Some(("pods of this node's next block".to_owned(), "will lose"));
    }
    let ranges = outside(&mut ranges.values().map(|range| range.range))?;
    Some((format!("pods that get an address of {ranges}"), "will lose"))
}

/// What the node says.
fn look(check: &Check) -> anyhow::Result<Seen> {
    let files =
        Files::new(&check.place.cni_conf_dir, &check.place.cni_bin_dir, &check.place.run_dir, Path::new(""));
    let mut seen = Seen {
        boot_id: BootId::read()?.text,
        boot_ms: boot::boot_ms(),
        confs: files.confs(),
        datapath: check.datapath.into(),
        ..Seen::default()
    };
    match Cache::load(&files.run) {
        Loaded::Cache(cache) => {
            (seen.blocks, seen.ranges, seen.policies) = (cache.blocks, cache.ranges, cache.policies);
        }
        Loaded::Nothing => {}
        Loaded::Unusable(why) => seen.unknown = Some(why),
    }
    seen.file = files.run.get(BLOCKS_FILE)?.map(|text| BlocksFile::parse(&text).map_err(|e| e.to_string()));
    if let Some(datapath) = files.conf.get(CONFLIST_FILE)?.and_then(|text| conf::datapath(&text)) {
        seen.datapath = datapath;
    }
    let own: BTreeMap<Block, HeldBlock> = seen
        .file
        .iter()
        .flatten()
        .flat_map(|file| &file.blocks)
        .map(|held| (held.cidr, held.clone()))
        .collect();
    let mut socket = Socket::open(Protocol::Route)?;
    seen.routes = route::foreign(&mut socket)?;
    let mut nft = Nft::open()?;
    let wanted = desired::forwarded(&own, |datapath| datapath == seen.datapath);
    // Whoever adds accept rules has done so by now, or will not.
    let ranges = seen.ranges.values().map(|range| range.range).collect();
    let peers: Vec<Block> = seen.blocks.values().map(|block| block.block).collect();
    let peers = sample(&peers, &own);
    let scene = Scene::observe(&mut socket, &check.place.bridge, &wanted, &peers, ranges)?;
    let found = forward::observe(&mut nft, &scene, false)?;
    seen.verdicts = found.verdicts.iter().map(ToString::to_string).collect();
    let all = [found.blockers, found.doubts, found.hiders];
    seen.blockers = all.iter().flatten().map(ToString::to_string).collect();
    seen.legacy = forward::legacy_tables(Path::new("/proc/net")).into_iter().collect();
    seen.locals = kube_proxy::observe(&mut nft)?;
    Ok(seen)
}

/// Some of the blocks that are other nodes', evenly spread: each may be reached by another link.
fn sample(blocks: &[Block], own: &BTreeMap<Block, HeldBlock>) -> Vec<Block> {
    const MOST: usize = 16;
    let others: Vec<Block> = blocks.iter().filter(|block| !own.contains_key(block)).copied().collect();
    others.iter().step_by(others.len() / MOST + 1).copied().collect()
}

/// Looks, and prints a line for each finding. Returns how many there are.
pub fn run(check: &Check) -> anyhow::Result<usize> {
    let seen = look(check)?;
    let findings = judge(&check.place.bridge, &seen);
    if check.verdicts {
        seen.verdicts.iter().for_each(|verdict| println!("{verdict}"));
    }
    if check.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        findings.iter().for_each(|finding| println!("{finding}"));
    }
    Ok(findings.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{block, range};

    fn held(cidr: &str) -> HeldBlock {
        HeldBlock { cidr: cidr.parse().unwrap(), lease: true }
    }

    /// A node as it should be, with a block of each of two ranges.
    fn well() -> Seen {
        let ranges =
            [range("default-v4"), RangeFact { range: "10.9.0.0/16".parse().unwrap(), ..range("extra") }];
        Seen {
            blocks: [(block(1).name, block(1))].into(),
            ranges: ranges.map(|range| (range.name.clone(), range)).into(),
            file: Some(Ok(BlocksFile {
                version: 1,
                node: "n1".into(),
                boot_id: "b".into(),
                lease_until: 9000,
                last_contact: "2026-11-24T05:00:00Z".into(),
                mtu: None,
                blocks: vec![held("10.244.1.0/24"), held("10.9.3.0/24")],
                may_grow: vec![],
            })),
            boot_id: "b".into(),
            boot_ms: 1000,
            confs: vec![CONFLIST_FILE.into(), "10-flannel.conflist".into()],
            ..Seen::default()
        }
    }

    fn found(seen: &Seen) -> Vec<String> {
        judge("cni0", seen).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_node_that_is_well_has_no_findings_and_each_trouble_is_one_with_its_cure() {
        assert_eq!(found(&well()), [] as [String; 0]);
        let file = |change: fn(&mut BlocksFile)| {
            let mut seen = well();
            seen.file.as_mut().unwrap().as_mut().map(change).unwrap();
            seen
        };
        let docker = ForeignRoute {
            prefix: "10.9.4.0/24".parse().unwrap(),
            device: Some("docker0".into()),
            gateway: None,
        };
        for (seen, words) in [
            (Seen { file: None, ..well() }, "agent: the blocks file is missing"),
            (Seen { file: Some(Err("damaged".into())), ..well() }, "agent: damaged"),
            (Seen { unknown: Some("map.json".into()), ..well() }, "agent: map.json"),
            (Seen { boot_id: "c".into(), ..well() }, "agent: the blocks file is from before the last boot"),
            (Seen { boot_ms: 9000, ..well() }, "last reached at 2026-11-24T05:00:00Z"),
            (file(|file| file.blocks.clear()), "agent: this node has no block"),
            (Seen { confs: vec![], ..well() }, "cni: 05-plat.conflist is not there"),
            (
                Seen { confs: vec!["00-multus.conf".into(), CONFLIST_FILE.into()], ..well() },
                "cni: the container runtime takes 00-multus.conf",
            ),
            (Seen { routes: vec![docker], ..well() }, "addresses: ClusterCIDR 'extra'"),
            (Seen { blockers: vec!["chain x drops".into()], ..well() }, "forwarding: chain x drops"),
            (Seen { legacy: [Family::IPv4].into(), ..well() }, "forwarding: legacy (not nft) IPv4"),
        ] {
            let found = found(&seen);
            assert!(found.len() == 1 && found[0].contains(words), "{words}: {found:?}");
        }
    }

    #[test]
    fn a_kube_proxy_that_loses_the_source_of_pods_is_named_and_one_that_does_not_is_not() {
        let from = |cidr: &str| Local::From(cidr.parse().unwrap());
        let (over, any) = (|link: &str| Local::Over(link.into()), |start: &str| Local::OverAny(start.into()));
        use Datapath::{Bridge, Routed};
        for (datapath, local, words) in [
            (Bridge, from("10.0.0.0/8"), None),
            (Bridge, from("10.244.0.0/16"), Some("pods of this node's 10.9.3.0/24 lose")),
            (Bridge, from("10.244.1.0/24"), Some("pods of this node's 10.9.3.0/24 lose")),
            (Bridge, from("192.0.2.0/24"), Some("10.244.1.0/24 and 10.9.3.0/24 lose")),
            (Bridge, over("cni0"), None),
            (Bridge, over("docker0"), Some("bridgeInterface: cni0")),
            (Bridge, any("cni"), None),
            (Bridge, any("plat"), Some("these come in by cni0")),
            (Routed, any("plat"), None),
            (Routed, over("cni0"), Some("interfaceNamePrefix: plat")),
        ] {
            let text = format!("{datapath:?} {local:?}");
            let found = found(&Seen { datapath, locals: [(Family::IPv4, local)].into(), ..well() });
            match words {
                None => assert_eq!(found, [] as [String; 0], "{text}"),
                Some(words) => assert!(found.len() == 1 && found[0].contains(words), "{text}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_kube_proxy_that_will_lose_the_source_of_pods_to_come_is_named_before() {
        let mut seen = well();
        seen.file.as_mut().unwrap().as_mut().unwrap().blocks.pop();
        for (cidr, words) in [
            ("10.244.0.0/16", "pods that get an address of 10.9.0.0/16 will lose"),
            ("10.244.1.0/24", "pods of this node's next block will lose"),
        ] {
            seen.locals = [(Family::IPv4, Local::From(cidr.parse().unwrap()))].into();
            let found = found(&seen);
            assert!(found.len() == 1 && found[0].contains(words), "{found:?}");
        }
    }
}
