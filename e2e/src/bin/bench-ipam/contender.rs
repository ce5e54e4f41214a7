//! Who is measured: a process, with what it uses.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use plat_e2e::bare::Process;
use plat_e2e::light::ControlPlane;
use plat_e2e::testbed::tools;
use rustix::process::{Pid, Signal, kill_process};

/// Pod addresses of either contender: 8,192 blocks of /24.
const RANGE: &str = "10.224.0.0/11";

/// What /proc counts processor time in: `USER_HZ`, which is 100 on all that Rust's standard library runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Who gives the blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// The operator, with these flags besides the range.
    Plat(Vec<&'static str>),
    /// kube-controller-manager with nothing but its node IPAM controller.
    NodeIpam(Limits),
}

/// How many requests a second the node IPAM controller allows itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limits {
    /// As it comes: 20, and 30 in a burst.
    Default,
    /// As many as it can.
    Lifted,
}

impl Who {
    /// Its name in figures.
    pub fn name(&self) -> &'static str {
        match self {
            Who::Plat(_) => "plat",
            Who::NodeIpam(Limits::Default) => "nodeipam, 20 requests/s",
            Who::NodeIpam(Limits::Lifted) => "nodeipam, limits lifted",
        }
    }

    /// Starts it. It must not wait for anything that the other one does not wait for: no Lease of a former
    /// leader, which the node IPAM controller would not give back at its end.
    pub fn start(&self, plane: &ControlPlane, operator: &Path, kubeconfig: &Path) -> Result<Running> {
        let (program, args) = match self {
            Who::Plat(flags) => {
                let socket = plane.run_folder().join("operator.sock");
                let mut args = vec![
                    format!("--cluster-cidr={RANGE}"),
                    format!("--socket={}", socket.display()),
                    "--namespace=default".to_owned(),
                ];
                args.extend(flags.iter().map(|flag| (*flag).to_owned()));
                (
                    fs::canonicalize(operator)
                        .with_context(|| format!("no operator {}", operator.display()))?,
                    args,
                )
            }
            Who::NodeIpam(limits) => {
                let mut args = vec![
                    format!("--kubeconfig={}", kubeconfig.display()),
                    "--controllers=node-ipam-controller".to_owned(),
                    "--allocate-node-cidrs=true".to_owned(),
                    format!("--cluster-cidr={RANGE}"),
                    "--node-cidr-mask-size=24".to_owned(),
                    "--leader-elect=false".to_owned(),
                    "--secure-port=0".to_owned(),
                    "--flex-volume-plugin-dir=/tmp/none".to_owned(),
                ];
                if *limits == Limits::Lifted {
                    args.extend(["--kube-api-qps=100000", "--kube-api-burst=100000"].map(str::to_owned));
                }
                (tools().join("kube-controller-manager"), args)
            }
        };
        let log = format!("{}.log", program.file_name().unwrap_or_default().to_string_lossy());
        let process = Process::start(plane, "cp", &log, &program.to_string_lossy(), &args, kubeconfig)?;
        Ok(Running { process })
    }
}

/// A contender that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    process: Process,
}

/// What a process has used.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Resident memory, in MiB.
    pub resident: f64,
    /// The most that it was, in MiB.
    pub peak: f64,
    /// Processor time since its start, in seconds.
    pub cpu: f64,
}

impl Running {
    /// What it has used up to now.
    pub fn usage(&self) -> Result<Usage> {
        let folder = format!("/proc/{}", self.process.id());
        let status =
            fs::read_to_string(format!("{folder}/status")).context("the contender has ended: see its log")?;
        let mib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let kib = line
                .and_then(|rest| rest.trim_matches([':', ' ', '\t']).split(' ').next()?.parse::<f64>().ok());
            kib.map(|kib| kib / 1024.0).with_context(|| format!("no {key} in {folder}/status"))
        };
        let stat = fs::read_to_string(format!("{folder}/stat"))?;
        // utime and stime; the program's name, which may hold spaces, ends with the last bracket.
        let rest = stat.rsplit_once(") ").context("stat has no name")?.1;
        let ticks: f64 = rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        Ok(Usage { resident: mib("VmRSS")?, peak: mib("VmHWM")?, cpu: ticks / TICKS_PER_SECOND })
    }

    /// Ends it as Kubernetes would: SIGTERM, and waits until it is gone.
    pub async fn end(self) -> Result<()> {
        let id = i32::try_from(self.process.id())?;
        if let Some(pid) = Pid::from_raw(id) {
            kill_process(pid, Signal::TERM)?;
        }
        for _ in 0..600 {
            let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        Ok(())
    }
}
