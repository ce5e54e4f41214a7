//! The configuration on standard input, read once into types that cannot be wrong.
//!
//! In two layers. [`Network`] is what every verb needs: version, name, where the leases are, which IPAM. A
//! DEL reads no more, so a configuration that was changed or broken since the ADD cannot keep it from
//! cleaning up. [`Attachment`] is all that ADD and CHECK need besides.
//!
//! Keys are documented in `docs/cni.md`; keys that we do not implement are refused by name
//! ([`refused`]), all other unknown ones ignored, as the specification asks.

pub mod ports;
pub mod ranges;
pub mod refused;

use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use plat_crds::host_port::HostPort;
use plat_crds::lease::{Datapath, GuardScope, MAX_NETWORK_NAME};
use plat_crds::names;

use crate::bandwidth::Bandwidth;
use crate::error::{Code, Error};
use crate::host_local::STATE_DIR;
use crate::json::Json;
use crate::mac::Mac;
use crate::request::{self, Args, is_name};
use crate::spec::SpecVersion;
use ranges::RangeSet;

/// Standard input larger than this is refused: a configuration has a few kilobytes.
pub const MAX_INPUT: usize = 1 << 20;
/// A `resolv.conf` larger than this is none; the C library reads a few lines.
const MAX_RESOLV_CONF: u64 = 64 << 10;
/// How long to wait for the lease store's lock by default.
const LOCK_TIMEOUT: Duration = Duration::from_secs(30);
/// How young a lease GC leaves alone by default: the runtime's list may be older than it.
const GC_GRACE: Duration = Duration::from_secs(60);

/// What every verb needs.
#[derive(Clone, Debug)]
pub struct Network {
    /// The version to answer in.
    pub version: SpecVersion,
    /// The network's name.
    pub name: String,
    /// Folder of `blocks.json` and, unless `ipam.dataDir` says otherwise, of the lease store.
    pub run_dir: PathBuf,
    /// The lease store.
    pub leases: PathBuf,
    /// Where libcni and the reference plugins keep their state.
    pub state_of_others: PathBuf,
    /// The bridges on which pods of a network that was here before may hang: this one's, and the usual one.
    pub bridges: Vec<String>,
    /// Who hands out addresses.
    pub ipam: IpamKind,
    /// How long to wait for the lease store's lock.
    pub lock_timeout: Duration,
    /// GC leaves leases alone that are younger.
    pub gc_grace: Duration,
    /// STATUS fails when no address is free.
    pub full_is_failure: bool,
    /// The whole configuration.
    pub json: Json,
}

/// A bridge that cannot be read is told of by who makes one: not every verb does.
fn bridges_of_pods(json: &Json) -> Vec<String> {
    let own = json.get("bridge").text("bridge").unwrap_or_default();
    let own = Some(own).filter(|own| !own.is_empty() && *own != names::BRIDGE);
    [names::BRIDGE].into_iter().chain(own).map(str::to_owned).collect()
}

/// Who hands out addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IpamKind {
    /// Nobody: the pod gets a link and no address.
    None,
    /// We do, from the node's blocks.
    Blocks,
    /// We do, from ranges in the configuration.
    Ranges,
    /// Another plugin of that name.
    Delegated(String),
}

impl Network {
    /// Reads standard input.
    pub fn parse(input: &[u8]) -> Result<Network, Error> {
        let decode =
            |details: String| Error::because(Code::Decode, "cannot decode the configuration", details);
        if input.len() > MAX_INPUT {
            return Err(decode(format!("it is larger than {MAX_INPUT} bytes")));
        }
        let json = Json::parse(input).map_err(|e| decode(e.to_string()))?;
        if !matches!(json, Json::Object(_)) {
            return Err(decode(format!("it is {}, not an object", json.describe())));
        }
        let name = network_name(&json)?;
        let version = SpecVersion::parse(json.get("cniVersion").text("cniVersion")?)?;
        let run_dir = match json.get("runDir").text("runDir")? {
            "" => PathBuf::from(names::RUN_DIR),
            path => PathBuf::from(path),
        };
        let ipam = json.get("ipam").object("ipam")?;
        let kind = ipam_kind(ipam, json.get("runtimeConfig").get("ipRanges"))?;
        // Another IPAM plugin's key of that name is about its own files.
        let data_dir = match ipam.get("dataDir").text("ipam.dataDir")? {
            path if !path.is_empty() && kind == IpamKind::Ranges => PathBuf::from(path),
            _ => run_dir.clone(),
        };
        let seconds = |key: &str, default| -> Result<Duration, Error> {
            Ok(json.get(key).u32(key)?.map_or(default, |s| Duration::from_secs(u64::from(s))))
        };
        Ok(Network {
            version,
            name,
            leases: data_dir.join(names::LEASES_FILE),
            run_dir,
            state_of_others: match json.get("cniStateDir").text("cniStateDir")? {
                "" => PathBuf::from(STATE_DIR),
                path => PathBuf::from(path),
            },
            bridges: bridges_of_pods(&json),
            ipam: kind,
            lock_timeout: seconds("lockTimeoutSeconds", LOCK_TIMEOUT)?,
            gc_grace: seconds("gcGraceSeconds", GC_GRACE)?,
            full_is_failure: json.get("failStatusWhenFull").bool("failStatusWhenFull")?,
            json,
        })
    }

    /// Refuses a verb that came with a later version of the specification than the configuration's.
    pub fn require(&self, verb: &str, since: SpecVersion) -> Result<(), Error> {
        if self.version >= since {
            return Ok(());
        }
        let msg = format!("config version {} does not have {verb}", self.version);
        Err(Error::because(Code::Version, msg, format!("{verb} came with {since}")))
    }
}

fn network_name(json: &Json) -> Result<String, Error> {
    let name = json.get("name").text("name")?;
    let problem = if name.is_empty() {
        "it is missing"
    } else if !is_name(name) {
        "it must be letters, digits, '_', '.' and '-', and start with a letter or digit"
    } else if name.len() > MAX_NETWORK_NAME {
        "it is too long"
    } else {
        return Ok(name.to_owned());
    };
    Err(Error::because(Code::Config, format!("invalid network name {name:?}"), problem))
}

fn ipam_kind(ipam: &Json, from_runtime: &Json) -> Result<IpamKind, Error> {
    let has_ranges = !ipam.get("subnet").is_null()
        || !ipam.get("ranges").is_null()
        || matches!(from_runtime, Json::List(list) if !list.is_empty());
    match ipam.get("type").text("ipam.type")? {
        "" | names::CNI_TYPE if has_ranges => Ok(IpamKind::Ranges),
        "" => Ok(IpamKind::None),
        names::CNI_TYPE => Ok(IpamKind::Blocks),
        // It becomes a file name in the folders of CNI_PATH.
        other if other.contains('/') || other == "." || other == ".." => {
            Err(Error::new(Code::Config, format!("invalid ipam.type {other:?}: a plugin's name has no '/'")))
        }
        other => Ok(IpamKind::Delegated(other.to_owned())),
    }
}

/// What ADD and CHECK need besides.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// How the pod's link is joined to the host.
    pub datapath: Datapath,
    /// The bridge and how the pod hangs on it.
    pub bridge: BridgeConf,
    /// What the pod's packets must come from (`antiSpoofing`, `macspoofchk`); `None`: anything.
    pub guard: Option<GuardScope>,
    /// The ranges to lease from; empty unless [`IpamKind::Ranges`].
    pub ranges: Vec<RangeSet>,
    /// Routes for the pod.
    pub routes: Vec<RouteConf>,
    /// Resolvers for the pod: the configuration's own, which replace the IPAM's.
    pub dns: Dns,
    /// The file that names the pod's resolvers where the configuration itself names none
    /// ([`read_resolv_conf`]).
    pub resolv_conf: Option<PathBuf>,
    /// Addresses that someone asked for.
    pub requested_ips: Vec<IpAddr>,
    /// The hardware address that someone asked for.
    pub requested_mac: Option<Mac>,
    /// Ports of the node that shall lead to the pod.
    pub host_ports: Vec<HostPort>,
    /// How much the pod may receive and send.
    pub bandwidth: Bandwidth,
}

/// The reference bridge plugin's options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeConf {
    /// `bridge`
    pub name: String,
    /// `isGateway`, or implied by `isDefaultGateway`
    pub is_gateway: bool,
    /// `isDefaultGateway`
    pub is_default_gateway: bool,
    /// `forceAddress`
    pub force_address: bool,
    /// `ipMasq`
    pub ip_masq: bool,
    /// `mtu`; `None` leaves it to the kernel
    pub mtu: Option<u32>,
    /// `hairpinMode`
    pub hairpin: bool,
    /// `promiscMode`
    pub promiscuous: bool,
    /// `enabledad`: IPv6 addresses are tested for duplicates before they are used
    pub tests_duplicates: bool,
    /// `portIsolation`
    pub isolated: bool,
    /// `disableContainerInterface`: the pod's interface stays down
    pub pod_down: bool,
}

/// A route of `ipam.routes`, or of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteConf {
    /// Where to.
    pub dst: IpNet,
    /// Through which gateway; absent means the address's own gateway.
    pub gw: Option<IpAddr>,
    /// MTU of the path in bytes.
    pub mtu: Option<u32>,
    /// Largest announced TCP segment in bytes.
    pub advmss: Option<u32>,
    /// Metric.
    pub priority: Option<u32>,
    /// Routing table.
    pub table: Option<u32>,
    /// Scope: 0 global, 253 link, 254 host.
    pub scope: Option<u32>,
}

impl RouteConf {
    /// A route with nothing but a destination and perhaps a gateway.
    pub fn new(dst: IpNet, gw: Option<IpAddr>) -> RouteConf {
        RouteConf { dst, gw, mtu: None, advmss: None, priority: None, table: None, scope: None }
    }
}

/// Resolver settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses of resolvers.
    pub nameservers: Vec<String>,
    /// Local domain.
    pub domain: String,
    /// Domains to search in.
    pub search: Vec<String>,
    /// Resolver options.
    pub options: Vec<String>,
}

impl Dns {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Dns::default()
    }

    /// Reads a `dns` object.
    pub fn parse(json: &Json, key: &str) -> Result<Dns, Error> {
        let json = json.object(key)?;
        Ok(Dns {
            nameservers: json.get("nameservers").texts(&format!("{key}.nameservers"))?,
            domain: json.get("domain").text(&format!("{key}.domain"))?.to_owned(),
            search: json.get("search").texts(&format!("{key}.search"))?,
            options: json.get("options").texts(&format!("{key}.options"))?,
        })
    }

    /// Reads the `dns` capability, whose keys have other names.
    fn parse_capability(json: &Json) -> Result<Dns, Error> {
        let json = json.object("runtimeConfig.dns")?;
        Ok(Dns {
            nameservers: json.get("servers").texts("runtimeConfig.dns.servers")?,
            domain: String::new(),
            search: json.get("searches").texts("runtimeConfig.dns.searches")?,
            options: json.get("options").texts("runtimeConfig.dns.options")?,
        })
    }
}

impl Attachment {
    /// Reads what ADD and CHECK need, and refuses what is not implemented. Pure.
    pub fn parse(network: &Network, args: &Args) -> Result<Attachment, Error> {
        let json = &network.json;
        refused::check(json)?;
        let runtime = json.get("runtimeConfig").object("runtimeConfig")?;
        let ipam = json.get("ipam");
        let mut dns = Dns::parse_capability(runtime.get("dns"))?;
        if dns.is_empty() {
            dns = Dns::parse(json.get("dns"), "dns")?;
        }
        let ranges = match network.ipam {
            IpamKind::Ranges => ranges::parse(ipam, runtime.get("ipRanges"), network.version)?,
            _ => Vec::new(),
        };
        let routes = ipam.get("routes").list("ipam.routes")?;
        let resolv_conf = ipam.get("resolvConf").text("ipam.resolvConf")?;
        let bridge = BridgeConf::parse(json)?;
        if bridge.pod_down && network.ipam != IpamKind::None {
            let why = "an interface that stays down has no addresses";
            return Err(Error::because(Code::Config, "disableContainerInterface cannot go with ipam", why));
        }
        Ok(Attachment {
            datapath: parse_datapath(json)?,
            bridge,
            guard: guard(json, &network.ipam)?,
            ranges,
            routes: routes.iter().map(|r| parse_route(r, "ipam.routes")).collect::<Result<_, _>>()?,
            dns,
            resolv_conf: Some(resolv_conf).filter(|path| !path.is_empty()).map(PathBuf::from),
            requested_ips: requested_ips(json, runtime, args)?,
            requested_mac: requested_mac(json, runtime, args)?,
            host_ports: ports::parse(runtime)?,
            bandwidth: Bandwidth::parse(json, runtime)?,
        })
    }
}

/// Reads `datapath`, and refuses what only a bridge could do.
fn parse_datapath(json: &Json) -> Result<Datapath, Error> {
    let datapath = match json.get("datapath").text("datapath")? {
        "" | "bridge" => return Ok(Datapath::Bridge),
        "routed" => Datapath::Routed,
        other => {
            let msg = format!("unsupported key datapath with value {other:?}");
            return Err(Error::because(Code::UnsupportedKey, msg, "it is bridge or routed"));
        }
    };
    refused::check_routed(json)?;
    Ok(datapath)
}

impl BridgeConf {
    fn parse(json: &Json) -> Result<BridgeConf, Error> {
        let flag = |key: &str| json.get(key).bool(key);
        let name = match json.get("bridge").text("bridge")? {
            "" => names::BRIDGE,
            name => name,
        };
        request::check_ifname(name)
            .map_err(|e| Error::because(Code::Config, format!("invalid bridge name {name:?}"), e.details))?;
        let mtu = json.get("mtu").u32("mtu")?.filter(|mtu| *mtu != 0);
        if let Some(mtu) = mtu.filter(|mtu| !(68..=65_535).contains(mtu)) {
            return Err(Error::because(Code::Config, format!("invalid mtu {mtu}"), "it must be 68 to 65535"));
        }
        let conf = BridgeConf {
            name: name.to_owned(),
            is_gateway: flag("isGateway")? || flag("isDefaultGateway")?,
            is_default_gateway: flag("isDefaultGateway")?,
            force_address: flag("forceAddress")?,
            ip_masq: flag("ipMasq")?,
            mtu,
            hairpin: flag("hairpinMode")?,
            promiscuous: flag("promiscMode")?,
            tests_duplicates: flag("enabledad")?,
            isolated: flag("portIsolation")?,
            pod_down: flag("disableContainerInterface")?,
        };
        if conf.hairpin && conf.promiscuous {
            let msg = "hairpinMode and promiscMode cannot both be true";
            return Err(Error::because(Code::Config, msg, "each frame would come back twice"));
        }
        Ok(conf)
    }
}

/// What is checked of a pod's packets: with the node's blocks all, unless `antiSpoofing` says otherwise; by
/// hand what is asked for.
fn guard(json: &Json, ipam: &IpamKind) -> Result<Option<GuardScope>, Error> {
    let asked = json.get("antiSpoofing");
    let addresses = if asked.is_null() { *ipam == IpamKind::Blocks } else { asked.bool("antiSpoofing")? };
    if addresses && *ipam == IpamKind::None {
        let why = "without ipam a pod has no addresses; macspoofchk keeps it to its hardware address";
        return Err(Error::because(Code::Config, "antiSpoofing needs ipam", why));
    }
    let hardware = json.get("macspoofchk").bool("macspoofchk")?;
    let scopes = [(addresses, GuardScope::Addresses), (hardware, GuardScope::Hardware)];
    Ok(scopes.into_iter().find_map(|(wanted, scope)| wanted.then_some(scope)))
}

/// Reads a route of a configuration or a result.
pub fn parse_route(json: &Json, key: &str) -> Result<RouteConf, Error> {
    let text = json.get("dst").text(&format!("{key}.dst"))?;
    let invalid = |what: &str| Error::new(Code::Config, format!("invalid {key}: {what}"));
    let dst: IpNet = text.parse().map_err(|_| invalid(&format!("dst {text:?} is not a CIDR")))?;
    let gw = match json.get("gw").text(&format!("{key}.gw"))? {
        "" => None,
        text => Some(text.parse::<IpAddr>().map_err(|_| invalid(&format!("gw {text:?} is not an address")))?),
    };
    if gw.is_some_and(|gw| gw.is_ipv4() != dst.addr().is_ipv4()) {
        return Err(invalid("dst and gw are not of one family"));
    }
    let number = |name: &str| json.get(name).u32(&format!("{key}.{name}"));
    Ok(RouteConf {
        dst: dst.trunc(),
        gw,
        mtu: number("mtu")?,
        advmss: number("advmss")?,
        priority: number("priority")?,
        table: number("table")?,
        scope: number("scope")?,
    })
}

/// Addresses asked for: the runtime's replace those of `args.cni`, which replace `CNI_ARGS` (CONVENTIONS.md).
fn requested_ips(json: &Json, runtime: &Json, args: &Args) -> Result<Vec<IpAddr>, Error> {
    let from_args = json.get("args").get("cni").get("ips").texts("args.cni.ips")?;
    let from_runtime = runtime.get("ips").texts("runtimeConfig.ips")?;
    let (source, code, texts) = if !from_runtime.is_empty() {
        ("runtimeConfig.ips", Code::Config, from_runtime)
    } else if !from_args.is_empty() {
        ("args.cni.ips", Code::Config, from_args)
    } else {
        ("CNI_ARGS IP", Code::Environment, args.ips.clone())
    };
    let parse = |text: &String| {
        let address = text.split('/').next().unwrap_or_default().parse();
        let whole = text.parse::<IpNet>().map(|n| n.addr()).or(address);
        whole.map_err(|_| Error::new(code, format!("invalid {source}: {text:?} is not an address")))
    };
    texts.iter().map(parse).collect()
}

/// The hardware address asked for, in the reference bridge plugin's order.
fn requested_mac(json: &Json, runtime: &Json, args: &Args) -> Result<Option<Mac>, Error> {
    let from_runtime = runtime.get("mac").text("runtimeConfig.mac")?;
    let from_args = json.get("args").get("cni").get("mac").text("args.cni.mac")?;
    let (source, code, text) = if !from_runtime.is_empty() {
        ("runtimeConfig.mac", Code::Config, from_runtime)
    } else if !from_args.is_empty() {
        ("args.cni.mac", Code::Config, from_args)
    } else {
        ("CNI_ARGS MAC", Code::Environment, args.mac.as_deref().unwrap_or_default())
    };
    if text.is_empty() {
        return Ok(None);
    }
    let mac: Mac = text.parse().map_err(|e| Error::because(code, format!("invalid {source}"), e))?;
    if mac.0[0] & 1 != 0 || mac == Mac([0; 6]) {
        return Err(Error::because(
            code,
            format!("invalid {source}"),
            format!("{mac} is not a host's address"),
        ));
    }
    Ok(Some(mac))
}

/// Resolvers from the file that `ipam.resolvConf` names (host-local's option), if it names one. Something
/// without end, or that waits for a writer, is refused: it would keep the ADD for ever.
pub fn read_resolv_conf(path: Option<&Path>) -> Result<Dns, Error> {
    let Some(path) = path else { return Ok(Dns::default()) };
    let failed = |why: &dyn Display| {
        Error::because(Code::Io, format!("cannot read ipam.resolvConf {}", path.display()), why)
    };
    if !std::fs::metadata(path).map_err(|e| failed(&e.kind()))?.is_file() {
        return Err(failed(&"it is not a file"));
    }
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_RESOLV_CONF + 1).read_to_end(&mut text));
    if read.map_err(|e| failed(&e.kind()))? as u64 > MAX_RESOLV_CONF {
        return Err(failed(&format!("it is larger than {MAX_RESOLV_CONF} bytes")));
    }
    Ok(parse_resolv_conf(&String::from_utf8_lossy(&text)))
}

/// Reads a `resolv.conf` (resolv.conf(5)). Pure.
pub fn parse_resolv_conf(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let keyword = words.next().unwrap_or_default();
        let mut rest = words.map(str::to_owned);
        match keyword {
            "nameserver" => dns.nameservers.extend(rest.next()),
            "domain" => dns.domain = rest.next().unwrap_or_default(),
            "search" => dns.search.extend(rest),
            "options" => dns.options.extend(rest),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> Result<Network, Error> {
        Network::parse(text.as_bytes())
    }

    fn attachment(text: &str) -> Result<Attachment, Error> {
        Attachment::parse(&network(text)?, &Args::default())
    }

    #[test]
    fn every_key_in_the_wrong_case_means_the_same() {
        let plain = r#"{"cniVersion":"1.0.0","name":"n","type":"plat","bridge":"b0","isGateway":true,"mtu":1400,
            "ipam":{"subnet":"10.1.0.0/24","rangeStart":"10.1.0.9","routes":[{"dst":"0.0.0.0/0"}]},
            "dns":{"nameservers":["10.0.0.10"]},"args":{"cni":{"ips":["10.1.0.20"]}},"runDir":"/r"}"#;
        let shouted = r#"{"CNIVERSION":"1.0.0","Name":"n","TYPE":"plat","BRIDGE":"b0","ISGATEWAY":true,"Mtu":1400,
            "IPAM":{"Subnet":"10.1.0.0/24","RANGESTART":"10.1.0.9","Routes":[{"Dst":"0.0.0.0/0"}]},
            "Dns":{"NameServers":["10.0.0.10"]},"ARGS":{"CNI":{"IPS":["10.1.0.20"]}},"RUNDIR":"/r"}"#;
        assert_eq!(network(plain).unwrap().leases, network(shouted).unwrap().leases);
        assert_eq!(
            format!("{:?}", attachment(plain).unwrap()),
            format!("{:?}", attachment(shouted).unwrap())
        );
    }

    #[test]
    fn null_is_as_good_as_absent_for_every_key() {
        let nulls = r#"{"cniVersion":null,"name":"n","bridge":null,"isGateway":null,"isDefaultGateway":null,
            "forceAddress":null,"ipMasq":null,"mtu":null,"hairpinMode":null,"promiscMode":null,"vlan":null,
            "ipam":null,"dns":null,"args":null,"runtimeConfig":null,"runDir":null,"lockTimeoutSeconds":null,
            "gcGraceSeconds":null,"failStatusWhenFull":null,"prevResult":null}"#;
        let absent = r#"{"name":"n"}"#;
        assert_eq!(format!("{:?}", attachment(nulls).unwrap()), format!("{:?}", attachment(absent).unwrap()));
        assert_eq!(network(nulls).unwrap().version, SpecVersion::V0_1_0);
    }

    #[test]
    fn containerd_spells_its_capabilities_with_capitals() {
        let conf = attachment(
            r#"{"name":"n","runtimeConfig":{"bandwidth":{"IngressRate":1000000,"IngressBurst":4294967295},
            "dns":{"Servers":["10.0.0.10"],"Searches":null,"Options":["ndots:5"]},
            "portMappings":[{"HostPort":8080,"ContainerPort":80,"Protocol":"tcp","HostIP":""}]}}"#,
        )
        .unwrap();
        assert_eq!(conf.dns.nameservers, ["10.0.0.10"]);
        assert_eq!(conf.dns.options, ["ndots:5"]);
        assert_eq!(conf.bandwidth.ingress.map(|limit| limit.rate), Some(125_000));
    }

    #[test]
    fn who_hands_out_addresses_follows_from_type_and_ranges() {
        for (ipam, kind) in [
            (r#"{}"#, IpamKind::None),
            (r#"{"type":"plat"}"#, IpamKind::Blocks),
            (r#"{"type":"plat","subnet":"10.1.0.0/24"}"#, IpamKind::Ranges),
            (r#"{"subnet":"10.1.0.0/24"}"#, IpamKind::Ranges),
            (r#"{"ranges":[[{"subnet":"10.1.0.0/24"}]]}"#, IpamKind::Ranges),
            (r#"{"type":"host-local","subnet":"10.1.0.0/24"}"#, IpamKind::Delegated("host-local".into())),
        ] {
            let text = format!(r#"{{"name":"n","ipam":{ipam}}}"#);
            assert_eq!(network(&text).unwrap().ipam, kind, "{ipam}");
        }
        assert_eq!(network(r#"{"name":"n","ipam":{"type":"../x"}}"#).unwrap_err().code, 7);
    }

    #[test]
    fn bad_input_gets_the_code_of_its_kind() {
        for (text, code) in [
            ("", 6),
            ("{", 6),
            ("[]", 6),
            ("null", 6),
            ("{}", 7),
            (r#"{"name":""}"#, 7),
            (r#"{"name":"_x"}"#, 7),
            (r#"{"name":"a/../b"}"#, 7),
            (r#"{"name":7}"#, 6),
            (r#"{"name":"n","cniVersion":"1.0"}"#, 1),
            (r#"{"name":"n","cniVersion":"0.5.0"}"#, 1),
            (r#"{"name":"n","cniVersion":"2.0.0"}"#, 1),
            (r#"{"name":"n","mtu":"x"}"#, 6),
            (r#"{"name":"n","mtu":12}"#, 7),
            (r#"{"name":"n","bridge":"a/b"}"#, 7),
            (r#"{"name":"n","hairpinMode":true,"promiscMode":true}"#, 7),
            (r#"{"name":"n","vlan":100}"#, 2),
            (r#"{"name":"n","ipam":{"routes":[{"dst":"x"}]}}"#, 7),
            (r#"{"name":"n","ipam":{"routes":[{"dst":"10.0.0.0/8","gw":"fd00::1"}]}}"#, 7),
            (r#"{"name":"n","args":{"cni":{"mac":"01:00:00:00:00:01"}}}"#, 7),
            (r#"{"name":"n","args":{"cni":{"ips":["x"]}}}"#, 7),
        ] {
            assert_eq!(attachment(text).unwrap_err().code, code, "{text}");
        }
        let large = format!(r#"{{"name":"n","x":"{}"}}"#, "y".repeat(MAX_INPUT));
        assert_eq!(network(&large).unwrap_err().code, 6);
    }

    #[test]
    fn requests_of_the_runtime_come_before_those_of_the_arguments() {
        let text = |runtime: &str, args: &str| {
            format!(r#"{{"name":"n","runtimeConfig":{{{runtime}}},"args":{{"cni":{{{args}}}}}}}"#)
        };
        let env = Args::parse("IP=10.1.0.3;MAC=0a:00:00:00:00:03");
        let ask = |text: String| {
            let conf = Attachment::parse(&network(&text).unwrap(), &env).unwrap();
            (conf.requested_ips[0].to_string(), conf.requested_mac.unwrap().to_string())
        };
        let one = r#""ips":["10.1.0.1/24"],"mac":"0a:00:00:00:00:01""#;
        let two = r#""ips":["10.1.0.2"],"mac":"0a:00:00:00:00:02""#;
        assert_eq!(ask(text(one, two)), ("10.1.0.1".into(), "0a:00:00:00:00:01".into()));
        assert_eq!(ask(text("", two)), ("10.1.0.2".into(), "0a:00:00:00:00:02".into()));
        assert_eq!(ask(text("", "")), ("10.1.0.3".into(), "0a:00:00:00:00:03".into()));
    }

    #[test]
    fn the_parts_of_a_resolv_conf_are_read() {
        let dns = parse_resolv_conf(
            "# c\nnameserver 10.0.0.10\nnameserver fd00::10\ndomain d\nsearch a b\noptions ndots:5 x\n",
        );
        assert_eq!(dns.nameservers, ["10.0.0.10", "fd00::10"]);
        assert_eq!((dns.domain.as_str(), dns.search.len(), dns.options.len()), ("d", 2, 2));
    }

    proptest! {
        #[test]
        fn no_input_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(network) = Network::parse(&bytes) {
                let _ = Attachment::parse(&network, &Args::default());
            }
        }

        #[test]
        fn no_value_of_a_known_key_causes_a_panic(
            key in prop::sample::select(vec!["mtu", "bridge", "ipam", "dns", "args", "runtimeConfig", "vlan"]),
            inner in prop::sample::select(vec!["subnet", "ranges", "routes", "type", "ips", "cni", "ipRanges"]),
            value in prop::sample::select(vec!["1e99", "\"\"", "[[[]]]", "{}", "-1", "\"10.1.0.0/33\"", "[{}]",
                "[[{\"subnet\":\"::/0\"}]]", "\"0.0.0.0/0\"", "\"10.1.0.0/24\""]),
        ) {
            for text in [
                format!(r#"{{"name":"n","{key}":{value}}}"#),
                format!(r#"{{"name":"n","{key}":{{"{inner}":{value}}}}}"#),
                format!(r#"{{"name":"n","{key}":{{"cni":{{"{inner}":{value}}}}}}}"#),
            ] {
                let _ = attachment(&text);
            }
        }
    }
}
