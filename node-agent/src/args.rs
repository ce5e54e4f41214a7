//! The command line. Each flag has an environment variable `PLAT_<FLAG>`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use plat_crds::lease::Datapath;
use plat_crds::names::{BRIDGE, CNI_BIN_DIR, CNI_CONF_DIR, RUN_DIR, VXLAN_PORT, VXLAN_VNI};

use crate::conf::Provider;
use crate::explain::Subject;
use crate::readiness::Readiness;
use crate::selftest::Selftest;

/// Plat's node agent: keeps this node's routes, masquerade, forwarding and CNI configuration as the
/// PodCIDRs say.
#[derive(Clone, Debug, Parser)]
#[command(name = "plat-agent", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of `run`, the default.
    #[command(flatten)]
    pub run: Run,
}

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Keep the node as the cluster's objects say (the default). Stopping it removes nothing.
    Run(Run),
    /// Take everything of Plat's off this node, without the API server. May be repeated.
    Cleanup(Cleanup),
    /// Ask the running agent on this node how it is; exit code 0 means well.
    Probe(Probe),
    /// Look for what is in the way of pods and of their addresses on this node: a line for each finding, with its
    /// cure. Reads only. Exit code 0: nothing found; 1: something; 2: it could not be looked.
    Check(Check),
    /// Say how this node reaches a block and which object decided what of it, and what the kernel really has. Reads only,
    /// from the running agent's cache, without the API server. Exit code 0: the kernel has what is wanted; 1: it has
    /// not; 2: it could not be looked.
    Explain(Explain),
    /// Prove the network from inside a pod: what `helm test` runs.
    #[command(subcommand)]
    Selftest(Selftest),
}

/// Flags of `run`.
#[derive(Clone, Debug, Args)]
pub struct Run {
    /// Name of this node's Node object.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Where things are on the node.
    #[command(flatten)]
    pub place: Place,
    /// How new pods are joined to the host: by a bridge, or by a link of their own that the host routes to. Running
    /// pods stay as they are.
    #[arg(long, env = "PLAT_DATAPATH", default_value = "bridge")]
    pub datapath: DatapathArg,
    /// The CNI binary in this image, which is installed on the node.
    #[arg(long, env = "PLAT_PLUGIN", default_value = "/plat")]
    pub plugin: PathBuf,
    /// Append accept rules for this node's pods to the FORWARD chains of iptables-nft whose policy is drop.
    /// Without them such a policy cuts pods off.
    #[arg(long, env = "PLAT_ADMIT_FORWARD", default_value_t = true, action = ArgAction::Set)]
    pub admit_forward: bool,
    /// Pods send only from their own IP and hardware addresses; what they forge is dropped. Holds for pods that
    /// start from now on.
    #[arg(long, env = "PLAT_ANTI_SPOOFING", default_value_t = true, action = ArgAction::Set)]
    pub anti_spoofing: bool,
    /// Who opens the host ports of pods.
    #[arg(long, env = "PLAT_HOST_PORTS", value_enum, default_value = "plat")]
    pub host_ports: Provider,
    /// Who limits the bandwidth of pods (annotations kubernetes.io/ingress-bandwidth and egress-bandwidth).
    #[arg(long, env = "PLAT_BANDWIDTH", value_enum, default_value = "plat")]
    pub bandwidth: Provider,
    /// How long routes stay whose objects are missing without having been released, in seconds.
    #[arg(long, env = "PLAT_HOLD_SECONDS", default_value_t = 300)]
    pub hold_seconds: u64,
    /// When a node that joins becomes Ready, which it does by its first CNI configuration: once it routes to the
    /// others (node), or once they route to it as well (converged: condition Converged of its PodCIDRs).
    #[arg(long, env = "PLAT_READINESS", value_enum, default_value = "node")]
    pub readiness: Readiness,
    /// How long a node that joins waits for the others with --readiness=converged, in seconds. Then it becomes
    /// Ready all the same, and an Event says for whom it was too early. 1 to 3600.
    #[arg(long, env = "PLAT_READINESS_DEADLINE_SECONDS", default_value_t = 60,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub readiness_deadline_seconds: u64,
    /// UDP port of VXLAN tunnels between nodes that are not on one link, the same on all nodes. Other hosts must not
    /// reach it: whoever does can send packets to pods as if from anywhere.
    #[arg(long, env = "PLAT_VXLAN_PORT", default_value_t = VXLAN_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    pub vxlan_port: u16,
    /// VXLAN network identifier of these tunnels, the same on all nodes, 1 to 16777215.
    #[arg(long, env = "PLAT_VXLAN_VNI", default_value_t = VXLAN_VNI, value_parser = clap::value_parser!(u32).range(1..1 << 24))]
    pub vxlan_vni: u32,
    /// UDP port on which agents ask each other from gateway to gateway of their blocks whether pods reach each other, how
    /// fast, and with packets of which size. The same on all nodes. 0 switches it off.
    #[arg(long, env = "PLAT_PROBE_PORT", default_value_t = 8474)]
    pub probe_port: u16,
    /// Address and port of /livez, /readyz and /metrics. If the port is taken, one of the next ten is used.
    #[arg(long, env = "PLAT_LISTEN", default_value = "[::]:9539")]
    pub listen: SocketAddr,
    /// Unix socket on which 'probe' finds this agent.
    #[arg(long, env = "PLAT_SOCKET", default_value = SOCKET)]
    pub socket: PathBuf,
    /// Further addresses that this node must always reach, so that no range that holds them is made
    /// unreachable where it has no pods. The API server's and the resolvers' are known.
    #[arg(long, env = "PLAT_NEEDED_ADDRESS", value_delimiter = ',')]
    pub needed_address: Vec<IpAddr>,
    /// How to log.
    #[command(flatten)]
    pub log: Log,
}

/// How pods are joined to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DatapathArg {
    /// By a bridge.
    Bridge,
    /// By a link of their own that the host routes to.
    Routed,
}

impl From<DatapathArg> for Datapath {
    fn from(arg: DatapathArg) -> Datapath {
        match arg {
            DatapathArg::Bridge => Datapath::Bridge,
            DatapathArg::Routed => Datapath::Routed,
        }
    }
}

/// Default of `--socket`.
pub const SOCKET: &str = "/run/plat/agent.sock";

/// Where things are on the node.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// Folder of CNI binaries, as this process sees it.
    #[arg(long, env = "PLAT_CNI_BIN_DIR", default_value = CNI_BIN_DIR)]
    pub cni_bin_dir: PathBuf,
    /// Folder of CNI configurations, as this process sees it.
    #[arg(long, env = "PLAT_CNI_CONF_DIR", default_value = CNI_CONF_DIR)]
    pub cni_conf_dir: PathBuf,
    /// Folder of the node's state; mount it at the path that it has on the node.
    #[arg(long, env = "PLAT_RUN_DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
    /// The node's /proc/sys/net. A container's own is read-only: mount the node's elsewhere.
    #[arg(long, env = "PLAT_SYSCTL_DIR", default_value = "/proc/sys/net")]
    pub sysctl_dir: PathBuf,
    /// Bridge that pods hang on.
    #[arg(long, env = "PLAT_BRIDGE", default_value = BRIDGE, value_parser = interface_name)]
    pub bridge: String,
}

/// What the kernel takes as the name of a link (`dev_valid_name`).
fn interface_name(text: &str) -> Result<String, String> {
    let fits = (1..=15).contains(&text.len()) && text != "." && text != "..";
    if fits && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
        Ok(text.to_owned())
    } else {
        Err("an interface name has 1 to 15 bytes, without '/', ':' and blanks".to_owned())
    }
}

/// Flags of `cleanup`.
#[derive(Clone, Debug, Args)]
pub struct Cleanup {
    /// Where things are on the node.
    #[command(flatten)]
    pub place: Place,
    /// Wait for ever when done, as the container of a DaemonSet must not end.
    #[arg(long, env = "PLAT_STAY")]
    pub stay: bool,
    /// Unix socket on which 'probe' finds this process while it stays.
    #[arg(long, env = "PLAT_SOCKET", default_value = SOCKET)]
    pub socket: PathBuf,
    /// How to log.
    #[command(flatten)]
    pub log: Log,
}

/// Flags of `check`.
#[derive(Clone, Debug, Args)]
pub struct Check {
    /// Where things are on the node.
    #[command(flatten)]
    pub place: Place,
    /// How new pods are joined to the host, where no CNI configuration of Plat's says it yet.
    #[arg(long, env = "PLAT_DATAPATH", default_value = "bridge")]
    pub datapath: DatapathArg,
    /// Print a list of objects with 'subject' and 'message' instead of lines.
    #[arg(long, env = "PLAT_CHECK_JSON")]
    pub json: bool,
    /// Print before the findings what becomes of each kind of packet of pods in this node's firewall rules.
    #[arg(long, env = "PLAT_CHECK_VERDICTS", conflicts_with = "json")]
    pub verdicts: bool,
}

/// Flags of `explain`.
#[derive(Clone, Debug, Args)]
pub struct Explain {
    /// A block (10.244.2.0/24), or an address in one, such as a pod's.
    pub subject: Subject,
    /// Where things are on the node.
    #[command(flatten)]
    pub place: Place,
}

/// Flags of `probe`.
#[derive(Clone, Debug, Args)]
pub struct Probe {
    /// What to ask.
    pub what: Question,
    /// Unix socket of the running agent.
    #[arg(long, env = "PLAT_SOCKET", default_value = SOCKET)]
    pub socket: PathBuf,
}

/// What a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Question {
    /// Whether the loop turns.
    Live,
    /// Whether the node was programmed.
    Ready,
    /// What the probes of other nodes found: a table.
    Peers,
}

/// How to log.
#[derive(Clone, Debug, Args)]
pub struct Log {
    /// Form of log lines.
    #[arg(long, env = "PLAT_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// Least level that is logged, such as 'info', or a filter such as 'plat_agent=debug,warn'.
    #[arg(long, env = "PLAT_LOG_LEVEL", default_value = "info")]
    pub log_level: String,
}

/// Form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_is_the_default_and_takes_the_same_flags() {
        for line in [
            vec![
                "plat-agent",
                "--node-name=n1",
                "--hold-seconds=5",
                "--admit-forward=false",
                "--anti-spoofing=false",
            ],
            vec![
                "plat-agent",
                "run",
                "--node-name=n1",
                "--hold-seconds=5",
                "--admit-forward=false",
                "--anti-spoofing=false",
            ],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            let run = match cli.command {
                Some(Command::Run(run)) => run,
                None => cli.run,
                other => panic!("{other:?}"),
            };
            assert_eq!((run.node_name.as_str(), run.hold_seconds), ("n1", 5));
            assert!(!run.admit_forward && !run.anti_spoofing);
        }
    }

    #[test]
    fn a_bridge_has_a_name_that_the_kernel_takes() {
        for bad in ["", "sixteen-bytes-xx", "a/b", "..", "a b", "a:b"] {
            assert!(interface_name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(interface_name("cni0").as_deref(), Ok("cni0"));
    }

    #[test]
    fn cleanup_and_probe_take_what_the_chart_gives_them() {
        let line = "plat-agent cleanup --stay --log-format=json --log-level=info";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        assert!(
            matches!(cli.command, Some(Command::Cleanup(c)) if c.stay && c.log.log_format == LogFormat::Json)
        );
        let cli = Cli::try_parse_from(["plat-agent", "probe", "ready"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Probe(p)) if p.what == Question::Ready));
    }
}
