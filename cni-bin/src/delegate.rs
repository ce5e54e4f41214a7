//! Delegated IPAM: another plugin hands out the addresses (CNI spec §4).
//!
//! It is found in the folders of `CNI_PATH` and runs with our environment and our standard input, unchanged
//! but for `CNI_COMMAND`. It gets pipes of its own: a child that inherited our standard output would keep
//! the runtime waiting for as long as it lives. And it dies with us: a runtime that runs out of patience
//! kills this process alone, and nobody would wait for a plugin that is left behind. Asking the kernel for
//! that takes a call between fork and exec, so the child is this program first ([`become_plugin`]), which
//! asks and then becomes the plugin.

use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Code, Error};
use crate::json::Json;
use crate::reply::Reply;
use crate::spec::SpecVersion;

/// First argument of the program in its short life as the plugin's parent-to-be.
pub const BECOME_PLUGIN: &str = "__become-plugin";
/// How often to look whether a plugin has ended that has said all.
const PAUSE: Duration = Duration::from_millis(2);

/// Finds a plugin in the folders of `CNI_PATH`: the first regular file that can be executed.
pub fn find(plugin: &str, path: &str) -> Option<PathBuf> {
    let folders = path.split(':').filter(|dir| !dir.is_empty());
    folders
        .map(|dir| Path::new(dir).join(plugin))
        .find(|file| file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
}

fn find_ipam(plugin: &str, path: &str) -> Result<PathBuf, Error> {
    find(plugin, path).ok_or_else(|| {
        let why =
            format!("it is in none of the folders of CNI_PATH ({path:?}); install it, or use ipam.type plat");
        Error::because(Code::Config, format!("IPAM plugin {plugin} is missing"), why)
    })
}

/// Runs a verb of the plugin and returns what it printed. Its own error is ours.
pub fn run(plugin: &str, path: &str, verb: &str, input: &[u8]) -> Result<Vec<u8>, Error> {
    let file = find_ipam(plugin, path)?;
    run_file(&file, &format!("IPAM plugin {plugin}"), verb, input, &[], None)
}

/// Runs DEL of another network's plugin, with `mark` set, by which another call of ours can tell that this one runs.
/// It is killed if it takes longer than `patience`.
pub fn run_marked(file: &Path, input: &[u8], mark: &str, patience: Duration) -> Result<(), Error> {
    let name = format!("plugin {}", file.file_name().unwrap_or_default().to_string_lossy());
    run_file(file, &name, "DEL", input, &[(mark, "1")], Some(patience)).map(|_| ())
}

/// Runs the plugin's DEL for a container that our own call is not about.
pub fn del_for(
    plugin: &str,
    path: &str,
    container_id: &str,
    ifname: &str,
    input: &[u8],
) -> Result<(), Error> {
    let whose = [("CNI_CONTAINERID", container_id), ("CNI_IFNAME", ifname), ("CNI_NETNS", "")];
    let file = find_ipam(plugin, path)?;
    run_file(&file, &format!("IPAM plugin {plugin}"), "DEL", input, &whose, None).map(|_| ())
}

fn run_file(
    file: &Path,
    name: &str,
    verb: &str,
    input: &[u8],
    variables: &[(&str, &str)],
    patience: Option<Duration>,
) -> Result<Vec<u8>, Error> {
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::TimedOut => {
            let why =
                format!("it took longer than {} s and was killed", patience.unwrap_or_default().as_secs());
            Error::because(Code::Delegate, format!("{name} {verb} failed"), why)
        }
        kind => Error::because(Code::Delegate, format!("cannot run {name}"), kind),
    };
    let child = Command::new("/proc/self/exe")
        .arg(BECOME_PLUGIN)
        .arg(std::process::id().to_string())
        .arg(file)
        .env("CNI_COMMAND", verb)
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let output = finish(child, input, patience.map(|patience| Instant::now() + patience)).map_err(failed)?;
    // What it has to say to people goes where ours goes.
    let _ = io::stderr().write_all(&output.stderr);
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(plugin_error(name, verb, &output.stdout, &output.stderr))
}

/// Feeds a child and takes what it says until it ends; kills it at the deadline.
fn finish(mut child: Child, input: &[u8], deadline: Option<Instant>) -> io::Result<Output> {
    // By threads of their own, or full pipes could wait for one another. They are not joined: somebody whom the
    // child leaves behind may keep the pipes open. A plugin that does not read its input is not an error.
    if let Some(mut stdin) = child.stdin.take() {
        let input = input.to_vec();
        thread::spawn(move || stdin.write_all(&input));
    }
    let (stdout, stderr) = (child.stdout.take().map(read), child.stderr.take().map(read));
    let end = |child: &mut Child| -> io::Result<Output> {
        let stdout = stdout.map_or(Ok(Vec::new()), |said| receive(&said, deadline))?;
        let stderr = stderr.map_or(Ok(Vec::new()), |said| receive(&said, deadline))?;
        Ok(Output { status: wait(child, deadline)?, stdout, stderr })
    };
    end(&mut child).inspect_err(|_| {
        let _ = child.kill().and_then(|()| child.wait());
    })
}

fn read(mut pipe: impl Read + Send + 'static) -> Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut said = Vec::new();
        sender.send(pipe.read_to_end(&mut said).map(|_| said))
    });
    receiver
}

fn receive(said: &Receiver<io::Result<Vec<u8>>>, deadline: Option<Instant>) -> io::Result<Vec<u8>> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    match deadline {
        None => said.recv().map_err(io::Error::other)?,
        Some(deadline) => {
            said.recv_timeout(deadline.saturating_duration_since(Instant::now())).map_err(late)?
        }
    }
}

fn wait(child: &mut Child, deadline: Option<Instant>) -> io::Result<ExitStatus> {
    let Some(deadline) = deadline else { return child.wait() };
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(status),
            None if Instant::now() >= deadline => return Err(io::ErrorKind::TimedOut.into()),
            None => thread::sleep(PAUSE),
        }
    }
}

/// Reads the error object of a plugin; what is none becomes one. Pure.
pub fn plugin_error(name: &str, verb: &str, stdout: &[u8], stderr: &[u8]) -> Error {
    let told = Json::parse(stdout).ok().and_then(|json| {
        let text = |key| json.get(key).text(key).unwrap_or_default().to_owned();
        let msg = text("msg");
        // 0 is no error's code.
        let code = json.get("code").u32("code").ok().flatten().filter(|code| *code != 0);
        let known = !msg.is_empty() || code.is_some();
        known.then(|| Error { code: code.unwrap_or(Code::Delegate as u32), msg, details: text("details") })
    });
    match told {
        Some(error) => Error { msg: format!("{name} {verb}: {}", error.msg), ..error },
        None => {
            let mut said =
                String::from_utf8_lossy(if stdout.is_empty() { stderr } else { stdout }).into_owned();
            said.truncate(said.floor_char_boundary(2000));
            Error::because(Code::Delegate, format!("{name} {verb} failed"), said.trim())
        }
    }
}

/// Runs ADD of the plugin and reads its result, of whatever version. A result without address is an error.
pub fn add(plugin: &str, path: &str, input: &[u8], version: SpecVersion) -> Result<Reply, Error> {
    let output = run(plugin, path, "ADD", input)?;
    let invalid = |why: String| {
        Error::because(Code::Delegate, format!("IPAM plugin {plugin} ADD: its result is no use"), why)
    };
    let json = Json::parse(&output).map_err(|e| invalid(e.to_string()))?;
    let mut reply = Reply::parse(&json, version).map_err(|e| invalid(e.to_string()))?;
    if reply.ips.is_empty() {
        return Err(invalid("it has no address".to_owned()));
    }
    reply.interfaces.clear();
    Ok(reply)
}

/// The child's side: asks the kernel to be killed with its parent, then becomes the plugin. Returns only if
/// that fails.
pub fn become_plugin(parent: &str, file: &Path) -> io::Error {
    let signal = Some(rustix::process::Signal::KILL);
    if let Err(errno) = rustix::process::set_parent_process_death_signal(signal) {
        return errno.into();
    }
    // A parent that died before the kernel knew sends no signal.
    let parent_now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if parent_now.as_deref() != Some(parent) {
        return io::Error::other("the plugin's caller is gone");
    }
    Command::new(file).exec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugins_own_error_is_ours_with_its_name() {
        let error = plugin_error(
            "IPAM plugin host-local",
            "ADD",
            br#"{"code":999,"msg":"no IP addresses","details":"x"}"#,
            b"",
        );
        assert_eq!((error.code, error.msg.as_str()), (999, "IPAM plugin host-local ADD: no IP addresses"));
        let error = plugin_error("x", "DEL", b"", b"panic: oh\n");
        assert_eq!((error.code, error.details.as_str()), (106, "panic: oh"));
        for junk in ["{}", "null", "[]", "{\"code\":\"x\"}", "{\"code\":0}", "{\"code\":0,\"msg\":\"m\"}"] {
            assert_eq!(plugin_error("x", "DEL", junk.as_bytes(), b"").code, 106, "{junk}");
        }
    }

    #[test]
    fn a_plugin_that_never_ends_is_killed_at_the_deadline() {
        let piped = |script: &str| {
            let mut command = Command::new("sh");
            let command = command.args(["-c", script]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        for script in ["exec sleep 1000", "exec sleep 1000 >&- 2>&-"] {
            let child = piped(script);
            let proc = format!("/proc/{}", child.id());
            let soon = Instant::now() + Duration::from_millis(50);
            // More than a pipe holds, to somebody who reads nothing.
            let error = finish(child, &[b' '; 1 << 20], Some(soon)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{script}");
            assert!(!Path::new(&proc).exists(), "{script}: it runs on");
        }
        for deadline in [None, Some(Instant::now() + Duration::from_secs(60))] {
            let output = finish(piped("cat; echo said >&2; exit 3"), b"input", deadline).unwrap();
            assert_eq!((output.stdout, output.stderr), (b"input".to_vec(), b"said\n".to_vec()));
            assert_eq!(output.status.code(), Some(3));
        }
    }

    #[test]
    fn a_plugin_that_is_nowhere_is_named_with_the_places() {
        let error = find_ipam("ghost", "/nowhere::/opt/none").unwrap_err();
        assert!(error.to_string().contains("ghost") && error.to_string().contains("/nowhere"), "{error}");
    }
}
