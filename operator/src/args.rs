//! Flags. Each has an environment variable; an empty value counts as not set.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use plat_crds::{Block, Family};

use crate::lease::Timing;
use crate::planner::args::PlanArgs;
use crate::snapshot::{DefaultRange, IpamSource, Settings};

/// Gives every node its block of pod addresses.
///
/// Runs until it is told to stop. Several may run: one leads, the others stand by.
#[derive(Clone, Debug, Parser)]
#[command(name = "plat-operator", version, args_conflicts_with_subcommands = true, args_override_self = true)]
pub struct Cli {
    /// What to do instead of running.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of a run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// What to do instead of running.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Ask the operator that runs here, through its socket; exit code 0 if all is well.
    Probe {
        /// What to ask.
        question: Question,
        /// Socket of the running operator.
        #[arg(long, env = "PLAT_SOCKET", default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
    },
    /// Say what fits into which ranges, what growth uses up first and when, and which ClusterCIDR to add. Asks no
    /// cluster and changes none.
    Plan(Box<PlanArgs>),
}

/// What a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Question {
    /// Does its loop turn? Never depends on the API server.
    Live,
    /// Does it do its work, as leader or standby?
    Ready,
}

impl Question {
    /// The path to ask.
    pub fn path(self) -> &'static str {
        match self {
            Question::Live => "/livez",
            Question::Ready => "/readyz",
        }
    }
}

/// How large the blocks of the default ranges are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BlockSizing {
    /// As the flags for the prefix length say.
    #[value(name = "Default")]
    Default,
    /// What nodes can hold.
    #[value(name = "MaxPods")]
    MaxPods,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object per line.
    Json,
}

const DEFAULT_SOCKET: &str = "/run/operator/operator.sock";

/// Flags of a run.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Range of pod addresses, such as 10.244.0.0/16: created as ClusterCIDR default-v4 or default-v6 while
    /// no ClusterCIDR of its family exists, and never changed afterwards. Repeat it, or separate by commas,
    /// for dual-stack: at most one per family.
    #[arg(long, env = "PLAT_CLUSTER_CIDR", value_delimiter = ',', value_name = "CIDR")]
    pub cluster_cidr: Vec<String>,

    /// How large the blocks of the default ranges are. Default: as the two flags below say. MaxPods: the
    /// smallest block that has room for all pods that the largest node can hold, chosen when the first node is
    /// there; the two flags below are not used.
    #[arg(long, env = "PLAT_BLOCK_SIZING", default_value = "Default", value_name = "SIZING")]
    pub block_sizing: BlockSizing,

    /// Prefix length of the blocks of the default IPv4 range, which nodes get. 16 to 30.
    #[arg(long, env = "PLAT_BLOCK_PREFIX_LENGTH_V4", default_value_t = Family::IPv4.default_block_prefix(), value_name = "BITS",
        value_parser = clap::value_parser!(u8).range(16..=30))]
    pub block_prefix_length_v4: u8,

    /// Prefix length of the blocks of the default IPv6 range, which nodes get. 48 to 124.
    #[arg(long, env = "PLAT_BLOCK_PREFIX_LENGTH_V6", default_value_t = Family::IPv6.default_block_prefix(), value_name = "BITS",
        value_parser = clap::value_parser!(u8).range(48..=124))]
    pub block_prefix_length_v6: u8,

    /// Label of Nodes whose value says which nodes' blocks lie together in the default ranges, such as
    /// topology.kubernetes.io/zone; none if not set.
    #[arg(long, env = "PLAT_TOPOLOGY_KEY", value_name = "LABEL", value_parser = label_key)]
    pub topology_key: Option<Box<str>>,

    /// How long a released block of the default ranges rests before another node may get it, in seconds. 60
    /// to 604800.
    #[arg(long, env = "PLAT_QUARANTINE_SECONDS", default_value_t = plat_crds::cluster_cidr::DEFAULT_QUARANTINE_SECONDS, value_name = "SECONDS",
        value_parser = clap::value_parser!(i32).range(60..=604_800))]
    pub quarantine_seconds: i32,

    /// What node.spec.podCIDRs counts for. wish: a node keeps the block that it names, if that fits an enabled
    /// ClusterCIDR; else one is carved. node: kube-controller-manager is the source (--allocate-node-cidrs=true):
    /// a node gets exactly the blocks that it names, none is carved and none written there. ignore: it is not
    /// looked at, though what it names is given to no other node.
    #[arg(long, env = "PLAT_IPAM_SOURCE", default_value = "wish", value_name = "SOURCE")]
    pub ipam_source: IpamSource,

    /// Write blocks into node.spec.podCIDRs where that field is empty. It can be written once only; a Node
    /// that has another value keeps it and is named.
    #[arg(long, env = "PLAT_NODE_SPEC_MIRROR", default_value_t = true, action = ArgAction::Set, value_name = "BOOL")]
    pub node_spec_mirror: bool,

    /// Address and port of /livez, /readyz and /metrics. If the port is taken, the next ten are tried; which
    /// one it is is logged.
    #[arg(long, env = "PLAT_LISTEN", default_value = "[::]:9540", value_name = "ADDRESS")]
    pub listen: SocketAddr,

    /// Unix socket that `plat-operator probe` asks. Its folder must exist and be writable.
    #[arg(long, env = "PLAT_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    pub socket: PathBuf,

    /// How log lines look.
    #[arg(long, env = "PLAT_LOG_FORMAT", default_value = "text", value_name = "FORMAT")]
    pub log_format: LogFormat,

    /// What is logged: error, warn, info, debug, trace, or directives such as info,plat_operator=debug.
    #[arg(long, env = "PLAT_LOG_LEVEL", default_value = "info", value_name = "LEVEL")]
    pub log_level: String,

    /// Namespace of the leader Lease: the operator's own.
    #[arg(long, env = "POD_NAMESPACE", default_value = "plat-system", value_name = "NAME")]
    pub namespace: String,

    /// Name of this pod, for the leader Lease and Events. Default: the host name.
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    pub pod_name: Option<String>,

    /// Let go, before Plat is removed: take the finalizer off every ClusterCIDR and do nothing else, for as
    /// long as it runs. Without that, deleting the CRDs would wait for an operator that is gone. Where it is
    /// gone already, do it by hand for each:
    /// kubectl patch clustercidr NAME --type=merge -p '{"metadata":{"finalizers":null}}'
    #[arg(long, env = "PLAT_CLEANUP", default_value_t = false, num_args = 0..=1, default_missing_value = "true", require_equals = true, action = ArgAction::Set, value_name = "BOOL")]
    pub cleanup: bool,

    /// How long the leader Lease holds without being renewed.
    #[arg(long, env = "PLAT_LEASE_DURATION_SECONDS", default_value_t = 15, hide = true,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_duration_seconds: u64,

    /// How long a leader goes on without a successful renewal; shorter than the Lease's duration.
    #[arg(long, env = "PLAT_LEASE_RENEW_DEADLINE_SECONDS", default_value_t = 10, hide = true,
        value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub lease_renew_deadline_seconds: u64,

    /// Time between tries to take or renew the Lease; shorter than the renew deadline.
    #[arg(long, env = "PLAT_LEASE_RETRY_MILLISECONDS", default_value_t = 2000, hide = true,
        value_parser = clap::value_parser!(u64).range(10..=600_000))]
    pub lease_retry_milliseconds: u64,

    /// How long a new leader waits for agents to report what they hold and miss before it carves blocks.
    #[arg(long, env = "PLAT_REPORT_WAIT_SECONDS", default_value_t = 30, hide = true)]
    pub report_wait_seconds: u64,

    /// How long a watch lasts before it is renewed. One that was silent for five seconds longer has died
    /// unnoticed, and begins anew.
    #[arg(long, env = "PLAT_WATCH_SECONDS", default_value_t = 60, hide = true,
        value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub watch_seconds: u32,

    /// How long a leader must itself have seen a block in quarantine before it frees it, if it did not write the
    /// time of release itself (then: all of the quarantine); never longer than the quarantine.
    #[arg(long, env = "PLAT_QUARANTINE_WATCH_SECONDS", default_value_t = 60, hide = true)]
    pub quarantine_watch_seconds: u64,

    /// How long a node must have been able to spare a block before it is given back.
    #[arg(long, env = "PLAT_SURPLUS_SECONDS", default_value_t = 600, hide = true)]
    pub surplus_seconds: u64,

    /// How long a block whose quarantine is over waits for every live node to report that it withdrew its
    /// route, in seconds. Then it is freed all the same, and an Event names the nodes. 0 to 86400.
    #[arg(long, env = "PLAT_WITHDRAWAL_DEADLINE_SECONDS", default_value_t = 600, value_name = "SECONDS",
        value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub withdrawal_deadline_seconds: u64,
}

/// A label key: an optional DNS subdomain and a slash, then at most 63 letters, digits, `-`, `_` and `.`.
fn label_key(text: &str) -> Result<Box<str>, String> {
    let (prefix, name) = text.rsplit_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    let ends = |text: &str, fits: fn(&char) -> bool| {
        text.chars().next().is_some_and(|c| fits(&c)) && text.chars().next_back().is_some_and(|c| fits(&c))
    };
    let of_name = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let of_prefix = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
    let name_fits = name.len() <= 63 && name.chars().all(of_name) && ends(name, char::is_ascii_alphanumeric);
    let prefix_fits = prefix.is_none_or(|prefix| {
        prefix.len() <= 253 && prefix.chars().all(of_prefix) && ends(prefix, char::is_ascii_alphanumeric)
    });
    if name_fits && prefix_fits {
        return Ok(text.into());
    }
    Err("must be a label key such as topology.kubernetes.io/zone".to_owned())
}

impl RunArgs {
    /// The settings that plans follow; an error names the flag.
    pub fn settings(&self) -> anyhow::Result<Settings> {
        let RunArgs {
            cluster_cidr,
            block_sizing,
            block_prefix_length_v4,
            block_prefix_length_v6,
            topology_key,
            quarantine_seconds,
            ipam_source,
            node_spec_mirror,
            cleanup,
            report_wait_seconds,
            quarantine_watch_seconds,
            surplus_seconds,
            withdrawal_deadline_seconds,
            ..
        } = self;
        let mut default_ranges: Vec<DefaultRange> = Vec::new();
        for text in cluster_cidr.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
            let range: Block = text.parse().context("--cluster-cidr")?;
            let block_prefix = match (block_sizing, range.family()) {
                (BlockSizing::MaxPods, _) => None,
                (BlockSizing::Default, Family::IPv4) => Some(*block_prefix_length_v4),
                (BlockSizing::Default, Family::IPv6) => Some(*block_prefix_length_v6),
            };
            if default_ranges.iter().any(|other| other.range.family() == range.family()) {
                bail!(
                    "--cluster-cidr: {range} is a second {} range; give one per family and add more as ClusterCIDR objects",
                    range.family()
                );
            }
            if let Some(prefix) = block_prefix.filter(|prefix| range.subblock_count(*prefix) == 0) {
                bail!(
                    "--cluster-cidr: {range} is smaller than a block of /{prefix}; set --block-prefix-length-v4 or -v6"
                );
            }
            default_ranges.push(DefaultRange { range, block_prefix });
        }
        Ok(Settings {
            default_ranges,
            topology_key: topology_key.clone(),
            quarantine_seconds: *quarantine_seconds,
            ipam_source: *ipam_source,
            node_spec_mirror: *node_spec_mirror,
            lease_duration: self.timing()?.duration,
            report_wait: Duration::from_secs(*report_wait_seconds),
            quarantine_watch: Duration::from_secs(*quarantine_watch_seconds),
            surplus_after: Duration::from_secs(*surplus_seconds),
            withdrawal_deadline: Duration::from_secs(*withdrawal_deadline_seconds),
            cleanup: *cleanup,
        })
    }

    /// The durations of the leader election.
    pub fn timing(&self) -> anyhow::Result<Timing> {
        let timing = Timing {
            duration: Duration::from_secs(self.lease_duration_seconds),
            renew_deadline: Duration::from_secs(self.lease_renew_deadline_seconds),
            retry: Duration::from_millis(self.lease_retry_milliseconds),
        };
        if timing.renew_deadline >= timing.duration || timing.retry >= timing.renew_deadline {
            bail!(
                "the Lease's retry time must be shorter than its renew deadline, and that shorter than its duration"
            );
        }
        Ok(timing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn run(args: &[&str]) -> RunArgs {
        Cli::try_parse_from([&["plat-operator"], args].concat()).unwrap().run
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn ranges_come_repeated_or_separated_and_take_their_familys_block_size() {
        let expected = [("10.244.0.0/16", 25), ("fd00:10:244::/48", 64)];
        for args in [
            vec!["--cluster-cidr=10.244.0.0/16,fd00:10:244::/48", "--block-prefix-length-v4=25"],
            vec![
                "--cluster-cidr",
                "10.244.0.0/16",
                "--cluster-cidr",
                "fd00:10:244::/48",
                "--block-prefix-length-v4",
                "25",
            ],
            vec!["--cluster-cidr=, 10.244.0.0/16 ,fd00:10:244::/48,", "--block-prefix-length-v4=25"],
        ] {
            let settings = run(&args).settings().unwrap();
            let ranges: Vec<_> =
                settings.default_ranges.iter().map(|d| (d.range.to_string(), d.block_prefix)).collect();
            assert_eq!(ranges, expected.map(|(range, prefix)| (range.to_owned(), Some(prefix))));
        }
        let sized_later =
            run(&["--cluster-cidr=10.244.0.0/26", "--block-sizing=MaxPods"]).settings().unwrap();
        assert_eq!(sized_later.default_ranges[0].block_prefix, None);
        assert_eq!(run(&[]).settings().unwrap().default_ranges, []);
    }

    #[test]
    fn the_topology_key_is_a_label_key() {
        for key in ["topology.kubernetes.io/zone", "rack", "example.com/Rack_1.x", "a", &"x".repeat(63)] {
            let settings = run(&["--topology-key", key]).settings().unwrap();
            assert_eq!(settings.topology_key.as_deref(), Some(key));
        }
        for key in
            ["zone/", "/zone", "a/b/c", "UPPER.example/zone", "zone-", "two words", "zone\n", &"x".repeat(64)]
        {
            let error = Cli::try_parse_from(["plat-operator", "--topology-key", key]).unwrap_err();
            assert!(error.to_string().contains("must be a label key"), "{key:?}: {error}");
        }
        assert_eq!(run(&[]).settings().unwrap().topology_key, None);
    }

    #[test]
    fn bad_flags_are_named() {
        for (args, words) in [
            (vec!["--cluster-cidr=10.244.0.1/16"], "host bits"),
            (vec!["--cluster-cidr=10.0.0.0/16,10.1.0.0/16"], "second IPv4 range"),
            (vec!["--cluster-cidr=10.0.0.0/26"], "smaller than a block of /24"),
            (vec!["--lease-renew-deadline-seconds=15"], "shorter"),
        ] {
            let error = run(&args).settings().unwrap_err();
            assert!(format!("{error:#}").contains(words), "{error:#}");
        }
        for args in [
            ["--block-prefix-length-v4=31"],
            ["--quarantine-seconds=59"],
            ["--listen=nowhere"],
            ["--log-format=xml"],
            ["--block-sizing=maxpods"],
        ] {
            assert!(Cli::try_parse_from(["plat-operator", args[0]]).is_err(), "{args:?}");
        }
    }

    #[test]
    fn booleans_can_be_given_as_the_chart_gives_them() {
        assert!(run(&[]).node_spec_mirror && !run(&["--node-spec-mirror=false"]).node_spec_mirror);
        assert_eq!(run(&[]).ipam_source, IpamSource::Wish);
        assert_eq!(run(&["--ipam-source=node"]).settings().unwrap().ipam_source, IpamSource::Node);
        assert!(!run(&[]).cleanup && run(&["--cleanup"]).cleanup && !run(&["--cleanup=false"]).cleanup);
    }

    #[test]
    fn of_a_flag_given_twice_the_last_wins_so_that_a_charts_extra_arguments_can() {
        assert_eq!(run(&["--log-level=info", "--log-level=debug"]).log_level, "debug");
    }

    #[test]
    fn a_probe_needs_no_flags() {
        let cli = Cli::try_parse_from(["plat-operator", "probe", "ready"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Probe { question: Question::Ready, .. })));
    }
}
