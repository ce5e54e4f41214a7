//! The testbed itself: it works from anywhere, beside another, and leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use plat_e2e::cluster::{Cluster, PodSpec, ProxyMode, node_ip};
use plat_e2e::light::{Bound, ControlPlane, create_node};
use plat_e2e::matrix::{Matrix, Way, faults, summary};
use plat_e2e::plat::double_addresses;
use plat_e2e::testbed::{images, output, repository, tools};
use plat_e2e::traffic::{Traffic, assert_none_lost};
use plat_e2e::wait::holds;
use plat_e2e::wait_until;

/// What a cluster of that name has on this machine: namespaces, cgroups, mounts, its run folder.
fn left_behind(name: &str, run: &Path) -> Vec<String> {
    let mut left = Vec::new();
    let namespaces = output(Command::new("ip").args(["netns", "list"])).unwrap();
    left.extend(
        namespaces.lines().filter(|l| l.starts_with(&format!("{name}-"))).map(|l| format!("netns {l}")),
    );
    let cgroups = output(
        Command::new("find")
            .args(["/sys/fs/cgroup", "-maxdepth", "2", "-name"])
            .arg(format!("testbed-{name}")),
    );
    left.extend(cgroups.unwrap().lines().map(|l| format!("cgroup {l}")));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    left.extend(mounts.lines().filter(|l| l.contains(&*run.to_string_lossy())).map(|l| format!("mount {l}")));
    if run.exists() {
        left.push(format!("folder {}", run.display()));
    }
    left
}

fn wait_nothing_left(name: &str, run: &Path) {
    wait_until("nothing is left", Duration::from_secs(30), || {
        let left = left_behind(name, run);
        holds(left.is_empty(), left.join("; "))
    });
}

#[test]
fn a_cluster_with_reference_plugins_passes_the_matrix_and_a_missing_route_fails_it() {
    let cluster = Cluster::up(2, ProxyMode::Nftables).unwrap();
    let (name, run) = (cluster.name().to_owned(), cluster.run_folder().to_owned());
    for (node, other) in [(1, 2), (2, 1)] {
        let plugins = tools().join("cni");
        cluster.on_node(node, &format!("cp {}/* /opt/cni/bin/", plugins.display())).unwrap();
        cluster.on_node(node, &format!("ip route add 10.244.{other}.0/24 via {}", node_ip(other))).unwrap();
        cluster.on_node(node, "sysctl -q -w net.ipv4.ip_forward=1").unwrap();
        cluster.on_node(node, "nft 'add table ip reference; add chain ip reference post { type nat hook postrouting priority 99; }; \
            add rule ip reference post ip saddr 10.244.0.0/16 ip daddr != { 10.244.0.0/16, 172.30.0.11, 172.30.0.12 } oifname eth0 masquerade'").unwrap();
        let conflist = format!(
            r#"{{"cniVersion":"1.0.0","name":"reference","plugins":[{{"type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true,
            "ipam":{{"type":"host-local","ranges":[[{{"subnet":"10.244.{node}.0/24"}}]],"routes":[{{"dst":"0.0.0.0/0"}}]}}}}]}}"#
        );
        cluster.on_node(node, &format!("echo '{conflist}' >/etc/cni/net.d/.t && mv /etc/cni/net.d/.t /etc/cni/net.d/10-reference.conflist")).unwrap();
    }
    cluster.wait_nodes_ready(Duration::from_secs(60));
    let pod = |name, node, host_network| PodSpec { name, node, host_network };
    let pods = cluster
        .run_pods(&[pod("a", 1, false), pod("b", 1, false), pod("c", 2, false)], Duration::from_secs(60))
        .unwrap();
    let hosts = cluster.run_pods(&[pod("h1", 1, true), pod("h2", 2, true)], Duration::from_secs(60)).unwrap();
    let matrix = Matrix::new(&cluster, &pods, &hosts).unwrap();
    let checks = wait_until("the whole matrix is right", Duration::from_secs(30), || {
        let checks = matrix.check().map_err(|e| e.to_string())?;
        holds(faults(&checks).is_empty(), faults(&checks).join("\n")).map(|()| checks)
    });
    let counts: Vec<_> = summary(&checks).into_iter().map(|(way, (_, all))| (way, all)).collect();
    assert_eq!(
        counts,
        [
            (Way::PodToPodSameNode, 5),
            (Way::PodToPodOtherNode, 4),
            (Way::NodeToPod, 6),
            (Way::PodToNode, 6),
            (Way::ServiceSameNode, 2),
            (Way::ServiceOtherNode, 4),
            (Way::ServiceHairpin, 3),
            (Way::PodToOutside, 3),
        ]
    );

    let traffic = Traffic::both_ways(&cluster, &pods[0], &pods[2]).unwrap();
    cluster.set_proxy(1, ProxyMode::Iptables).unwrap();
    let sent = assert_none_lost("while kube-proxy restarts", traffic);
    assert!(sent > 200, "only {sent} datagrams were sent");
    assert_eq!(double_addresses(&cluster, &[1, 2]).unwrap(), Vec::<String>::new());
    cluster
        .on_node(2, &format!("ip netns add twin; ip -n twin addr add {}/32 dev lo", pods[0].ip()))
        .unwrap();
    assert_eq!(double_addresses(&cluster, &[1, 2]).unwrap().len(), 1);

    let traffic = Traffic::start(&cluster, &pods[0], &pods[2]).unwrap();
    cluster.on_node(1, "ip route del 10.244.2.0/24").unwrap();
    // It takes a while, in which datagrams are sent that must get lost.
    let broken: Vec<_> =
        matrix.check().unwrap().into_iter().filter(|c| c.fault.is_some()).map(|c| c.way).collect();
    let (_, report) = traffic.stop().unwrap();
    assert!(report.lost > 0 && report.received > 0, "{report:?}");
    assert!(
        broken.contains(&Way::PodToPodOtherNode) && broken.contains(&Way::ServiceOtherNode),
        "{broken:?}"
    );
    assert!(!broken.contains(&Way::PodToPodSameNode), "{broken:?}");
    drop(matrix);
    drop(cluster);
    assert_eq!(left_behind(&name, &run), Vec::<String>::new());
}

#[test]
fn a_control_plane_survives_kill_and_goes_back_to_a_snapshot() {
    let plane = ControlPlane::up().unwrap();
    plane.block_on(async |client| create_node(&client, "n1", &["172.30.0.11"]).await).unwrap();
    plane.snapshot("before").unwrap();
    plane.block_on(async |client| create_node(&client, "n2", &["172.30.0.12"]).await).unwrap();
    let nodes = || plane.kubectl(&["get", "nodes", "-o", "name"]).unwrap();
    plane.kill("apiserver").unwrap();
    assert!(plane.kubectl(&["get", "nodes"]).is_err());
    plane.start("apiserver").unwrap();
    assert_eq!(nodes(), "node/n1\nnode/n2\n");
    plane.restore("before").unwrap();
    assert_eq!(nodes(), "node/n1\n");
}

#[test]
fn a_token_bound_to_a_node_or_to_its_pod_carries_the_nodes_name() {
    let plane = ControlPlane::shared();
    plane.block_on(async |client| create_node(&client, "bound", &["172.30.0.11"]).await).unwrap();
    plane.apply(
        "{apiVersion: v1, kind: ServiceAccount, metadata: {name: agent, namespace: default}}\n---\n\
         {apiVersion: v1, kind: Pod, metadata: {name: agent, namespace: default}, spec: {serviceAccountName: agent, \
         automountServiceAccountToken: false, nodeName: bound, containers: [{name: c, image: x}]}}",
    )
    .unwrap();
    for (bound, wanted) in
        [(Bound::Free, None), (Bound::Node("bound"), Some("bound")), (Bound::Pod("agent"), Some("bound"))]
    {
        let token = plane.token("default", "agent", bound).unwrap();
        let kubeconfig = plane.kubeconfig("agent", &token).unwrap();
        let review = output(
            plane.tool("kubectl").arg("--kubeconfig").arg(kubeconfig).args(["auth", "whoami", "-o", "json"]),
        )
        .unwrap();
        let review: serde_json::Value = serde_json::from_str(&review).unwrap();
        let claim =
            review["status"]["userInfo"]["extra"]["authentication.kubernetes.io/node-name"][0].as_str();
        assert_eq!(claim, wanted, "{bound:?}");
    }
}

#[test]
fn two_clusters_of_the_same_addresses_do_not_see_each_other() {
    let (one, two) = (ControlPlane::up().unwrap(), ControlPlane::up().unwrap());
    one.block_on(async |client| create_node(&client, "n1", &["172.30.0.11"]).await).unwrap();
    assert_eq!(one.kubectl(&["get", "nodes", "-o", "name"]).unwrap(), "node/n1\n");
    assert_eq!(two.kubectl(&["get", "nodes", "-o", "name"]).unwrap(), "");
}

/// A copy of the testbed in a folder of its own; the tools are links, as when they were found in PATH.
struct Copy(PathBuf);

impl Copy {
    fn below(folder: &str) -> Copy {
        let copy = PathBuf::from(folder).join(format!("plat-testbed-{}", std::process::id()));
        fs::create_dir_all(copy.join("e2e")).unwrap();
        output(Command::new("cp").arg("-r").arg(repository().join("e2e/testbed")).arg(copy.join("e2e")))
            .unwrap();
        output(Command::new("cp").arg("-rs").arg(tools()).arg(copy.join("tools"))).unwrap();
        output(Command::new("cp").arg("-r").arg(images()).arg(copy.join("images"))).unwrap();
        Copy(copy)
    }

    fn script(&self, name: &str) -> Command {
        let mut command = Command::new(self.0.join("e2e/testbed").join(name));
        command.env("TB", "copy").env("NODES", "1").env("PLAT_TOOLS", self.0.join("tools"));
        command.env("PLAT_IMAGES", self.0.join("images")).env_remove("TB_RUN");
        command
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = self.script("down.sh").stderr(Stdio::null()).status();
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_clone_works_in_folders_that_a_box_covers_with_its_own() {
    for folder in ["/tmp", "/var/tmp", "/run"] {
        let copy = Copy::below(folder);
        output(&mut copy.script("up.sh")).unwrap_or_else(|e| panic!("below {folder}: {e}"));
        let images =
            output(copy.script("node.sh").args(["run", "1", "ctr", "-n", "k8s.io", "images", "list", "-q"]))
                .unwrap();
        assert!(images.contains("localhost/pause:1"), "below {folder}: {images}");
        output(&mut copy.script("down.sh")).unwrap();
        wait_nothing_left("copy", &copy.0.join("e2e/run/copy"));
    }
}

/// Each point is a file of the run folder: a fast machine is interrupted where a slow one is, and never
/// after the scripts have ended.
#[test]
fn nothing_is_left_when_the_scripts_are_interrupted_at_any_point() {
    let up = repository().join("e2e/testbed");
    for (point, signal) in [
        ("", "KILL"),
        ("pki", "INT"),
        ("cp/pid", "KILL"),
        ("cp/ready", "TERM"),
        ("n1/pid", "KILL"),
        ("n2/ready", "INT"),
    ] {
        let name = format!("half{}", point.replace('/', ""));
        let run = repository().join("e2e/run").join(&name);
        let settings = [("TB", name.as_str()), ("NODES", "2")];
        let mut guard = Command::new(up.join("guard.sh"))
            .envs(settings)
            .env_remove("TB_RUN")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        // Whoever was started in the background ignores SIGINT, and so would all that it starts.
        let mut victim = Command::new("env")
            .arg("--default-signal=INT,TERM")
            .arg(up.join("up.sh"))
            .envs(settings)
            .env_remove("TB_RUN")
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_until(&format!("the scripts reach '{point}'"), Duration::from_secs(60), || {
            assert!(victim.try_wait().unwrap().is_none(), "the scripts ended before '{point}'");
            holds(run.join(point).exists(), "not yet".to_owned())
        });
        output(Command::new("kill").arg(format!("-{signal}")).arg(victim.id().to_string())).unwrap();
        let ended = victim.wait().unwrap();
        assert!(!ended.success(), "SIG{signal} at '{point}' did not interrupt the scripts");
        if signal == "KILL" {
            // Nobody is left to clean up but the guard.
            drop(guard.stdin.take());
            guard.wait().unwrap();
        } else {
            let left = left_behind(&name, &PathBuf::from("/nonexistent"));
            assert_eq!(left, Vec::<String>::new(), "SIG{signal} at '{point}'");
            drop(guard.stdin.take());
            guard.wait().unwrap();
        }
        assert_eq!(left_behind(&name, &run), Vec::<String>::new(), "SIG{signal} at '{point}'");
        // A second teardown finds nothing to do and says so without failing.
        output(Command::new(up.join("down.sh")).envs(settings).env_remove("TB_RUN")).unwrap();
    }
}

/// The cgroup2 tree of a hybrid machine has no controllers, so no kubelet can run on it; boxes can.
#[test]
fn boxes_run_on_a_real_cgroup2_tree_and_leave_nothing_on_it() {
    let root = Path::new("/sys/fs/cgroup/unified");
    if !root.is_dir() {
        println!("this machine is not hybrid: every other test runs on its only kind of tree");
        return;
    }
    let run = repository().join("e2e/run/tree");
    let script = |name: &str| {
        let mut command = Command::new(repository().join("e2e/testbed").join(name));
        command.env("TB", "tree").env("CGROUP_ROOT", root).env_remove("TB_RUN");
        command
    };
    output(script("up.sh").arg("core")).unwrap();
    let pid = fs::read_to_string(run.join("cp/pid")).unwrap();
    let group = fs::read_to_string(format!("/proc/{}/cgroup", pid.trim())).unwrap();
    assert!(group.lines().any(|line| line == "0::/testbed-tree/cp/init"), "{group}");
    assert_eq!(fs::read_to_string(root.join("testbed-tree/cp/cgroup.procs")).unwrap(), "");
    output(&mut script("down.sh")).unwrap();
    assert!(!root.join("testbed-tree").exists());
    assert_eq!(left_behind("tree", &run), Vec::<String>::new());
}

/// A pure cgroup2 machine cannot be had here: plain folders and files stand in for its tree, and what the
/// functions would write is looked at. It says what they do, not that the kernel likes it.
#[test]
fn on_a_fake_cgroup2_tree_processes_go_to_leaves_and_controllers_to_their_parents() {
    let root = std::env::temp_dir().join(format!("plat-cgroup2-{}", std::process::id()));
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(root.join("testbed-fake/n1")).unwrap();
    for dir in ["", "testbed-fake", "testbed-fake/n1"] {
        fs::write(root.join(dir).join("cgroup.controllers"), "cpu memory pids\n").unwrap();
    }
    let bash = |line: &str| {
        let lib = repository().join("e2e/testbed/lib/box.sh");
        let script = format!(". {}; {line}", lib.display());
        output(Command::new("bash").arg("-c").arg(script).env("TB", "fake").env("CGROUP_ROOT", &root))
            .unwrap()
    };
    let read = |file: &str| fs::read_to_string(root.join(file)).unwrap();

    assert_eq!(bash("cgroup_hierarchies"), ".\n");
    bash("cgroup_make n1");
    for parent in ["", "testbed-fake/"] {
        assert_eq!(read(&format!("{parent}cgroup.subtree_control")), "+cpu\n+memory\n+pids\n", "{parent}");
    }
    // PID 1 starts in the box's own cgroup, which so becomes the root of its cgroup namespace ...
    let pid = bash("cgroup_join n1; echo $BASHPID");
    assert_eq!(read("testbed-fake/n1/cgroup.procs"), pid);
    // ... and is moved into a leaf before the box hands its controllers on.
    bash("cgroup_delegate n1");
    assert_eq!(read("testbed-fake/n1/init/cgroup.procs"), pid);
    assert_eq!(read("testbed-fake/n1/cgroup.subtree_control"), "+cpu\n+memory\n+pids\n");
    // Later comers go to the leaf.
    let pid = bash("cgroup_join n1; echo $BASHPID");
    assert_eq!(read("testbed-fake/n1/init/cgroup.procs"), pid);
    assert_eq!(bash("cgroup_boxes"), "n1\n");
    fs::remove_dir_all(&root).unwrap();
}
