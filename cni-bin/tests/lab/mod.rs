//! A laboratory for one test: the test's thread gets a network and a mount namespace of its own, with an
//! empty `/run`. Whatever the test makes in there (links, rules, namespaces, files) ends with the thread,
//! also after a failure; nothing of the machine's own is seen or touched.

#![allow(dead_code, reason = "each test program uses a part")]

use std::path::Path;
use std::process::{Command, Output};

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

/// Enters a fresh laboratory with the current thread.
pub fn enter() {
    assert!(
        rustix::process::geteuid().is_root(),
        "this test makes network namespaces and must run as root: sudo -E cargo test -p plat-cni"
    );
    #[expect(deprecated, reason = "safe here: file tables are not unshared, see unshare_unsafe")]
    rustix::thread::unshare(UnshareFlags::NEWNS | UnshareFlags::NEWNET).unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
    std::fs::create_dir("/run/netns").unwrap();
    run("ip", &["link", "set", "lo", "up"]);
}

/// Runs a command and returns its standard output; a failure fails the test with all that it printed.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = attempt(program, args);
    assert!(
        output.status.success(),
        "{program} {}: {}\n{}{}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that may fail.
pub fn attempt(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"))
}

/// Runs a command line in the shell.
pub fn sh(line: &str) -> String {
    run("sh", &["-ec", line])
}

/// Makes a network namespace, as a runtime does for a pod, and returns its path.
pub fn netns(name: &str) -> String {
    run("ip", &["netns", "add", name]);
    let path = format!("/run/netns/{name}");
    assert!(Path::new(&path).exists());
    path
}
