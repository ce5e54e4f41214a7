//! Delegated IPAM: another plugin hands out the addresses (CNI spec §4).
//!
//! It is found in the folders of `CNI_PATH` and runs with our environment and our standard input, unchanged
//! but for `CNI_COMMAND`. It gets pipes of its own: a child that inherited our standard output would keep
//! the runtime waiting for as long as it lives. And it dies with us: a runtime that runs out of patience
//! kills this process alone, and nobody would wait for a plugin that is left behind. Asking the kernel for
//! that takes a call between fork and exec, so the child is this program first ([`become_plugin`]), which
//! asks and then becomes the plugin.

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Code, Error};
use crate::json::Json;
use crate::reply::Reply;
use crate::spec::SpecVersion;

/// First argument of the program in its short life as the plugin's parent-to-be.
pub const BECOME_PLUGIN: &str = "__become-plugin";

/// Finds a plugin in the folders of `CNI_PATH`: the first regular file that can be executed.
pub fn find(plugin: &str, path: &str) -> Result<PathBuf, Error> {
    let folders = path.split(':').filter(|dir| !dir.is_empty());
    let file = folders
        .map(|dir| Path::new(dir).join(plugin))
        .find(|file| file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0));
    file.ok_or_else(|| {
        let why =
            format!("it is in none of the folders of CNI_PATH ({path:?}); install it, or use ipam.type plat");
        Error::because(Code::Config, format!("IPAM plugin {plugin} is missing"), why)
    })
}

/// Runs a verb of the plugin and returns what it printed. Its own error is ours.
pub fn run(plugin: &str, path: &str, verb: &str, input: &[u8]) -> Result<Vec<u8>, Error> {
    run_with(plugin, path, verb, input, &[])
}

/// The same with `mark` set, by which another call of ours can tell that this one runs.
pub fn run_marked(plugin: &str, path: &str, verb: &str, input: &[u8], mark: &str) -> Result<Vec<u8>, Error> {
    run_with(plugin, path, verb, input, &[(mark, "1")])
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
    run_with(plugin, path, "DEL", input, &whose).map(|_| ())
}

fn run_with(
    plugin: &str,
    path: &str,
    verb: &str,
    input: &[u8],
    variables: &[(&str, &str)],
) -> Result<Vec<u8>, Error> {
    let file = find(plugin, path)?;
    let failed =
        |e: io::Error| Error::because(Code::Delegate, format!("cannot run IPAM plugin {plugin}"), e.kind());
    let mut child = Command::new("/proc/self/exe")
        .arg(BECOME_PLUGIN)
        .arg(std::process::id().to_string())
        .arg(&file)
        .env("CNI_COMMAND", verb)
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        // Written by a thread of its own, or two full pipes could wait for one another. A plugin that does
        // not read its input is not an error.
        scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
        child.wait_with_output()
    })
    .map_err(failed)?;
    // What it has to say to people goes where ours goes.
    let _ = io::stderr().write_all(&output.stderr);
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(plugin_error(plugin, verb, &output.stdout, &output.stderr))
}

/// Reads the error object of a plugin; what is none becomes one. Pure.
pub fn plugin_error(plugin: &str, verb: &str, stdout: &[u8], stderr: &[u8]) -> Error {
    let told = Json::parse(stdout).ok().and_then(|json| {
        let text = |key| json.get(key).text(key).unwrap_or_default().to_owned();
        let msg = text("msg");
        // 0 is no error's code.
        let code = json.get("code").u32("code").ok().flatten().filter(|code| *code != 0);
        let known = !msg.is_empty() || code.is_some();
        known.then(|| Error { code: code.unwrap_or(Code::Delegate as u32), msg, details: text("details") })
    });
    match told {
        Some(error) => Error { msg: format!("IPAM plugin {plugin} {verb}: {}", error.msg), ..error },
        None => {
            let mut said =
                String::from_utf8_lossy(if stdout.is_empty() { stderr } else { stdout }).into_owned();
            said.truncate(said.floor_char_boundary(2000));
            Error::because(Code::Delegate, format!("IPAM plugin {plugin} {verb} failed"), said.trim())
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
        let error =
            plugin_error("host-local", "ADD", br#"{"code":999,"msg":"no IP addresses","details":"x"}"#, b"");
        assert_eq!((error.code, error.msg.as_str()), (999, "IPAM plugin host-local ADD: no IP addresses"));
        let error = plugin_error("x", "DEL", b"", b"panic: oh\n");
        assert_eq!((error.code, error.details.as_str()), (106, "panic: oh"));
        for junk in ["{}", "null", "[]", "{\"code\":\"x\"}", "{\"code\":0}", "{\"code\":0,\"msg\":\"m\"}"] {
            assert_eq!(plugin_error("x", "DEL", junk.as_bytes(), b"").code, 106, "{junk}");
        }
    }

    #[test]
    fn a_plugin_that_is_nowhere_is_named_with_the_places() {
        let error = find("ghost", "/nowhere::/opt/none").unwrap_err();
        assert!(error.to_string().contains("ghost") && error.to_string().contains("/nowhere"), "{error}");
    }
}
