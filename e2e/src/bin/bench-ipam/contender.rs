//! Who is measured: a process, with what it uses.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use plat_e2e::bare::Process;
use plat_e2e::light::ControlPlane;
use plat_e2e::testbed::tools;
use plat_e2e::usage::Usage;

/// Pod addresses of either contender: 8,192 blocks of /24.
const RANGE: &str = "10.224.0.0/11";

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

impl Running {
    /// What it has used up to now.
    pub fn usage(&self) -> Result<Usage> {
        self.process.usage()
    }

    /// Ends it as Kubernetes would.
    pub async fn end(self) -> Result<()> {
        self.process.end().await
    }
}
