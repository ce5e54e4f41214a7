//! The program itself, with the rights that the chart gives it: uid 0, `NET_ADMIN` alone, a read-only root.

use std::fs;
use std::os::unix::fs::chown;
use std::process::{Child, Command, Stdio};

use plat_agent::cache::Cache;
use plat_agent::conf::{self, Lease};
use plat_agent::folder::Folder;
use plat_agent::outlet::Grant;

use crate::harness::*;

/// A node whose cache knows three blocks, and which cannot reach any API server.
fn node() -> TestNode {
    let node = TestNode::new();
    let map =
        |facts: Vec<plat_agent::facts::BlockFact>| facts.into_iter().map(|f| (f.name.clone(), f)).collect();
    let ranges = [range("default-v4"), range("default-v6")].map(|r| (r.name.clone(), r));
    let blocks = map(vec![block(1), block(2), block_v6(1), block_v6(2)]);
    Cache::new(blocks, ranges.into(), Default::default()).save(&Folder::new(&node.settings.run_dir)).unwrap();
    for dir in [&node.settings.bin_dir, &node.settings.conf_dir] {
        fs::create_dir_all(dir).unwrap();
    }
    // What an earlier life of this boot granted, so that the conflist may be written.
    let boot = plat_cni::boot::BootId::read().unwrap();
    let lease = Lease::after(plat_cni::boot::boot_ms(), 1_764_000_000, 840);
    let granted = conf::blocks_file(
        "n1",
        &boot.text,
        &Grant { own: &Default::default(), lease: &lease, mtu: None, may_grow: &[] },
    );
    fs::write(node.settings.run_dir.join("blocks.json"), granted).unwrap();
    fs::write(node.file("kubeconfig"), KUBECONFIG).unwrap();
    run("mount -o remount,bind,ro /");
    node
}

const KUBECONFIG: &str = "
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
";

struct Running {
    child: Child,
    socket: String,
}

impl Running {
    fn start(node: &TestNode, words: &[&str]) -> Running {
        let socket = node.file("agent.sock").to_str().unwrap().to_owned();
        let child = Command::new("setpriv")
            .args(["--bounding-set", "-all,+net_admin", "--inh-caps", "-all", "--no-new-privs"])
            .arg(env!("CARGO_BIN_EXE_plat-agent"))
            .args(words)
            .arg("--cni-bin-dir")
            .arg(&node.settings.bin_dir)
            .arg("--cni-conf-dir")
            .arg(&node.settings.conf_dir)
            .arg("--run-dir")
            .arg(&node.settings.run_dir)
            .env("PLAT_SOCKET", &socket)
            .env("KUBECONFIG", node.file("kubeconfig"))
            .stdout(Stdio::null())
            .stderr(fs::File::create(node.file("log")).unwrap())
            .spawn()
            .unwrap();
        Running { child, socket }
    }

    fn agent(node: &TestNode) -> Running {
        let plugin = node.settings.plugin.to_str().unwrap();
        Running::start(node, &["run", "--node-name=n1", "--listen=127.0.0.1:9541", "--plugin", plugin])
    }

    fn probe(&self, what: &str) -> bool {
        let probe = Command::new(env!("CARGO_BIN_EXE_plat-agent"))
            .args(["probe", what, "--socket", &self.socket])
            .stderr(Stdio::null())
            .status();
        probe.unwrap().success()
    }

    fn expect_ready(&self) {
        eventually("ready", || if self.probe("ready") { Ok(()) } else { Err("it is not".into()) });
        assert!(self.probe("live"));
    }

    fn end(mut self) {
        run(&format!("kill -TERM {}", self.child.id()));
        assert!(self.child.wait().unwrap().success());
    }
}

#[test]
fn net_admin_alone_and_a_read_only_root_suffice() {
    isolated("rights::net_admin_alone_and_a_read_only_root_suffice", || {
        let node = node();
        run("iptables-nft -P FORWARD DROP");
        let agent = Running::agent(&node);
        agent.expect_ready();
        let status = fs::read_to_string(format!("/proc/{}/status", agent.child.id())).unwrap();
        assert!(status.contains("CapEff:\t0000000000001000"), "{status}");
        expect_routes(&[
            "10.244.1.0/24 dev cni0 metric 1120",
            "unreachable 10.244.1.0/24 metric 65535",
            "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120",
            "fd00:10:244:1::/64 dev cni0 metric 1120",
            "unreachable fd00:10:244:1::/64 metric 65535",
            "fd00:10:244:2::/64 gateway fd00:30::c dev eth0 metric 1120",
        ]);
        assert!(run("nft list table inet plat").contains("masquerade"));
        assert_eq!(run("iptables-nft -S FORWARD").matches("--comment plat").count(), 2);
        assert_eq!((sysctl("ipv4/ip_forward"), sysctl("ipv6/conf/all/forwarding")), ("1".into(), "1".into()));
        for file in ["bin/plat", "net.d/05-plat.conflist", "plat/blocks.json", "plat/sysctls.json"] {
            eventually(file, || if node.file(file).exists() { Ok(()) } else { Err("missing".into()) });
        }
        // Ending it removes nothing.
        let before = our_routes();
        agent.end();
        assert_eq!(our_routes(), before);
        assert!(run("nft list table inet plat").contains("masquerade"));

        let cleanup = Running::start(&node, &["cleanup", "--stay"]);
        cleanup.expect_ready();
        assert_eq!(our_routes(), Vec::<String>::new());
        assert!(!run("nft list tables").contains("plat"));
        assert!(!run("ip -o link").contains("cni0"));
        assert_eq!(sysctl("ipv4/ip_forward"), "0");
        cleanup.end();
    });
}

#[test]
fn a_bin_folder_of_another_owner_is_a_named_error_with_its_cure() {
    isolated("rights::a_bin_folder_of_another_owner_is_a_named_error_with_its_cure", || {
        let node = node();
        chown(&node.settings.bin_dir, Some(1000), None).unwrap();
        run(&format!("chmod 755 {}", node.settings.bin_dir.display()));
        let agent = Running::agent(&node);
        agent.expect_ready();
        assert!(!node.file("bin/plat").exists() && !node.file("net.d/05-plat.conflist").exists());
        eventually("the log", || {
            let log = fs::read_to_string(node.file("log")).unwrap();
            if log.contains("belongs to uid 1000") && log.contains("chown 0") { Ok(()) } else { Err(log) }
        });
        // The cure.
        chown(&node.settings.bin_dir, Some(0), None).unwrap();
        eventually("installed", || {
            if node.file("net.d/05-plat.conflist").exists() { Ok(()) } else { Err("missing".into()) }
        });
        agent.end();
    });
}
