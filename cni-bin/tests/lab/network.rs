//! A network as a runtime finds it: plugins in `/run/bin`, configurations in `/run/net.d`; and the callers of
//! real runtimes: `cnitool` (libcni) and `gocni` (go-cni with containerd's options, `e2e/tools/containerd`).

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

/// Installs our binary, all reference plugins and one configuration.
pub fn install(file: &str, list: &Value) {
    // libcni caches results below /var/lib/cni.
    rustix::mount::mount("tmpfs", "/var/lib", "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    fs::create_dir_all("/run/bin").unwrap();
    fs::create_dir_all("/run/net.d").unwrap();
    symlink(env!("CARGO_BIN_EXE_plat"), "/run/bin/plat").unwrap();
    for plugin in fs::read_dir(super::tools().join("cni")).unwrap() {
        let plugin = plugin.unwrap();
        symlink(plugin.path(), Path::new("/run/bin").join(plugin.file_name())).unwrap();
    }
    configure(file, list);
}

/// Writes a configuration as the agent does: under another name first, so that nobody reads a half.
pub fn configure(file: &str, list: &Value) {
    fs::write("/run/net.d/.new", list.to_string()).unwrap();
    fs::rename("/run/net.d/.new", Path::new("/run/net.d").join(file)).unwrap();
}

/// Installs a plugin that is a shell script.
pub fn install_script(name: &str, script: &str) {
    let path = Path::new("/run/bin").join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A conflist of the network `plat`: our plugin with all capabilities that we understand and `chained` ones.
pub fn conflist(version: &str, chained: Vec<Value>) -> Value {
    let capabilities = json!({"ips": true, "mac": true, "dns": true, "ipRanges": true,
        "io.kubernetes.cri.pod-annotations": true});
    let mut plugins = vec![json!({"type": "plat", "ipam": {"type": "plat"}, "capabilities": capabilities})];
    plugins.extend(chained);
    json!({"cniVersion": version, "name": "plat", "loadOnlyInlinedPlugins": true, "plugins": plugins})
}

/// A call through libcni about `eth0` of the container with that namespace.
pub fn cnitool(verb: &str, network: &str, id: &str) -> Command {
    let mut command = Command::new(super::tools().join("cnitool"));
    command
        .args([verb, network, &format!("/run/netns/{id}")])
        .env("CNI_PATH", "/run/bin")
        .env("NETCONFPATH", "/run/net.d");
    command
}

/// A call as containerd makes it.
pub fn gocni(arguments: &[&str], pod: &Value) -> Output {
    as_containerd("gocni", arguments, pod)
}

/// A call as containerd 1.7 makes it.
pub fn gocni_1_7(arguments: &[&str], pod: &Value) -> Output {
    as_containerd("gocni-1.7", arguments, pod)
}

fn as_containerd(program: &str, arguments: &[&str], pod: &Value) -> Output {
    let program = super::tools().join(program);
    assert!(program.exists(), "{} is missing: run e2e/tools/build", program.display());
    let mut child = Command::new(program)
        .args(arguments)
        .env("CNI_PATH", "/run/bin")
        .env("NETCONFPATH", "/run/net.d")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A call that fails before it reads leaves a broken pipe.
    let _ = child.stdin.take().unwrap().write_all(pod.to_string().as_bytes());
    child.wait_with_output().unwrap()
}

/// What a call that must succeed printed.
#[track_caller]
pub fn ok(output: Output) -> String {
    let (stdout, stderr) = said(&output);
    assert!(output.status.success(), "{stdout}{stderr}");
    stdout
}

/// What a call that must fail said.
#[track_caller]
pub fn failed(output: Output) -> String {
    let (stdout, stderr) = said(&output);
    assert!(!output.status.success(), "{stdout}{stderr}");
    assert!(!stderr.contains("goroutine"), "the caller panicked: {stderr}");
    format!("{stdout}{stderr}")
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// The JSON that a call printed.
#[track_caller]
pub fn result(output: Output) -> Value {
    let text = ok(output);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}
