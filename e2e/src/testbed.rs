//! One cluster of namespaces: made by `e2e/testbed/up.sh`, taken down when dropped, and also when this
//! process is killed (`guard.sh` waits for the end of a pipe that only this process holds).

use std::future::Future;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, io, thread};

use anyhow::{Context, Result, bail, ensure};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

/// A cluster that exists as long as this value.
#[derive(Debug)]
pub struct Testbed {
    name: String,
    run: PathBuf,
    settings: Vec<(String, String)>,
    guard: Child,
    /// Taken on drop: its end is what the guard waits for.
    lifeline: Option<ChildStdin>,
}

/// Which parts a cluster has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// etcd and the API server.
    Core,
    /// Also controller manager, scheduler and nodes.
    Full,
}

/// The checkout.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Where `e2e/images/build.sh` puts images, and the programs in `bin/` below it.
pub fn images() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
    std::env::var_os("PLAT_IMAGES").map_or_else(|| target.join("images"), PathBuf::from)
}

/// Runs a program to its end; its standard output, or an error with everything that it said.
pub fn output(command: &mut Command) -> Result<String> {
    let out = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    if !out.status.success() {
        let stderr = String::from_utf8_lossy(&out.stderr);
        bail!("{} of {command:?}: {}{}", out.status, stderr.trim_end(), stdout);
    }
    Ok(stdout)
}

fn script(name: &str) -> Command {
    Command::new(repository().join("e2e/testbed").join(name))
}

impl Testbed {
    /// Brings a cluster up. `settings` are those of `e2e/testbed/lib/settings.sh`.
    pub(crate) fn up(extent: Extent, settings: &[(&str, &str)]) -> Result<Testbed> {
        ensure!(rustix::process::geteuid().is_root(), "clusters need root: run the tests as root");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}x{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let run = repository().join("e2e/run").join(&name);
        let settings: Vec<_> = settings
            .iter()
            .chain(&[("TB", name.as_str()), ("TB_RUN", &run.to_string_lossy())])
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect();
        // The guard comes first: what comes up half must also go down. A process group of its own keeps
        // Ctrl-C from it.
        let mut guard = script("guard.sh")
            .envs(settings.clone())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start e2e/testbed/guard.sh")?;
        let lifeline = guard.stdin.take();
        let testbed = Testbed { name, run, settings, guard, lifeline };
        output(testbed.script("up.sh").arg(match extent {
            Extent::Core => "core",
            Extent::Full => "full",
        }))
        .context("if a program is missing, run 'make setup'")?;
        Ok(testbed)
    }

    /// The prefix of its namespaces: `<name>-cp`, `<name>-n1`, ...
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Logs, keys and kubeconfigs.
    pub fn run_folder(&self) -> &Path {
        &self.run
    }

    /// Kubeconfig of the administrator; it works inside [`Testbed::enter`].
    pub fn admin_kubeconfig(&self) -> PathBuf {
        self.run.join("admin.kubeconfig")
    }

    /// A script of `e2e/testbed`, for this cluster.
    pub fn script(&self, name: &str) -> Command {
        let mut command = script(name);
        command.envs(self.settings.clone()).stdin(Stdio::null());
        command
    }

    /// A program of this machine in the network of the control plane, from which everything is reached.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}-cp", self.name)).arg("--").arg(program).stdin(Stdio::null());
        command
    }

    /// Runs `work` on a thread in the network of the control plane. Threads and processes that it starts
    /// are there too.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let join = || -> io::Result<()> {
            let namespace = fs::File::open(format!("/run/netns/{}-cp", self.name))?;
            Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
        };
        thread::scope(|scope| {
            let worker = scope.spawn(|| {
                join().expect("cannot enter the network of the control plane");
                work()
            });
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs asynchronous work with an administrator's client.
    pub fn block_on<T, F>(&self, work: impl FnOnce(Client) -> F + Send) -> T
    where
        T: Send,
        F: Future<Output = T>,
    {
        self.block_on_as(&self.admin_kubeconfig(), work)
    }

    /// Runs asynchronous work with the client of a kubeconfig file.
    pub fn block_on_as<T, F>(&self, kubeconfig: &Path, work: impl FnOnce(Client) -> F + Send) -> T
    where
        T: Send,
        F: Future<Output = T>,
    {
        self.enter(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime
                .expect("cannot start a runtime")
                .block_on(async { work(client(kubeconfig).await.expect("cannot make a client")).await })
        })
    }

    /// Runs kubectl as administrator; its output, or an error with what it said.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        output(self.kubectl_command().args(args))
    }

    /// kubectl as administrator.
    pub fn kubectl_command(&self) -> Command {
        let mut command = self.tool("kubectl");
        command.arg("--kubeconfig").arg(self.admin_kubeconfig());
        command
    }

    /// A program from the tools folder, in the network of the control plane.
    pub fn tool(&self, name: &str) -> Command {
        self.command(&tools().join(name).to_string_lossy())
    }

    /// `kubectl get ARGS -o json`.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let text = output(self.kubectl_command().arg("get").args(args).args(["-o", "json"]))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// `kubectl apply` of a manifest, server-side; its output.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let args = ["apply", "--server-side", "--force-conflicts", "--warnings-as-errors", "-f", "-"];
        feed(self.kubectl_command().args(args), manifest)
    }

    /// Ends a part of the control plane with SIGKILL: etcd, apiserver, kcm or scheduler.
    pub fn kill(&self, part: &str) -> Result<()> {
        output(self.script("control-plane.sh").args(["kill", part])).map(drop)
    }

    /// Starts it again, and waits for the API server to be ready.
    pub fn start(&self, part: &str) -> Result<()> {
        output(self.script("control-plane.sh").args(["start", part])).map(drop)
    }

    /// Saves etcd under that name in the run folder.
    pub fn snapshot(&self, name: &str) -> Result<()> {
        output(self.script("control-plane.sh").arg("snapshot").arg(self.run.join(name))).map(drop)
    }

    /// Puts etcd back to what it was, revision numbers included.
    pub fn restore(&self, name: &str) -> Result<()> {
        output(self.script("control-plane.sh").arg("restore").arg(self.run.join(name))).map(drop)
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        drop(self.lifeline.take());
        let _ = self.guard.wait();
    }
}

/// The folder of the programs that `e2e/tools/build` makes.
pub fn tools() -> PathBuf {
    let cache = || {
        let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
        std::env::var_os("XDG_CACHE_HOME")
            .map_or_else(|| home.join(".cache"), PathBuf::from)
            .join("plat/tools")
    };
    std::env::var_os("PLAT_TOOLS").map_or_else(cache, PathBuf::from)
}

/// Runs a program with `input` on its standard input.
pub fn feed(command: &mut Command, input: &str) -> Result<String> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends early says why on its standard error.
        let _ = io::Write::write_all(&mut stdin, input.as_bytes());
    }
    let out = child.wait_with_output()?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(out.status.success(), "{}{stdout}", String::from_utf8_lossy(&out.stderr));
    Ok(stdout)
}

async fn client(kubeconfig: &Path) -> Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}
