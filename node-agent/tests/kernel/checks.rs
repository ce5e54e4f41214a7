//! `plat-agent check`, as an administrator runs it on a node.

use crate::harness::*;

/// What it finds: its lines. The exit code says whether there are any.
fn check(node: &TestNode) -> Vec<String> {
    check_with(node, "bridge")
}

/// The same with that setting. Everything is told by the environment, as in the container of the chart.
fn check_with(node: &TestNode, datapath: &str) -> Vec<String> {
    let folders = [("PLAT_CNI_CONF_DIR", "net.d"), ("PLAT_CNI_BIN_DIR", "bin"), ("PLAT_RUN_DIR", "plat")];
    let places = folders.map(|(name, folder)| format!("{name}={}", node.file(folder).display()));
    let agent = env!("CARGO_BIN_EXE_plat-agent");
    let output = try_run(&format!("env {} PLAT_DATAPATH={datapath} {agent} check", places.join(" ")));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let expected = i32::from(!lines.is_empty());
    assert_eq!(output.status.code(), Some(expected), "{text}{}", String::from_utf8_lossy(&output.stderr));
    lines
}

#[track_caller]
fn expect_one(node: &TestNode, words: &[&str]) {
    let found = check(node);
    assert!(found.len() == 1 && words.iter().all(|words| found[0].contains(words)), "{words:?}: {found:#?}");
}

/// Rules by which kube-proxy spares what that test says: in its mode nftables of today and of before, and in its mode
/// iptables.
fn proxies(nft: &str, iptables: &str) -> [String; 3] {
    let table = |chain: &str, rule: String| {
        format!(
            "nft add table ip kube-proxy
            nft 'add set ip kube-proxy cluster-ips {{ type ipv4_addr; }}'
            nft add chain ip kube-proxy mark-for-masquerade
            nft add chain ip kube-proxy {chain}
            nft 'add rule ip kube-proxy {chain} {rule}'"
        )
    };
    [
        table("services", format!("ip daddr @cluster-ips {nft} mark set mark or 0x4000")),
        table(
            "service-X-a/b/tcp/p",
            format!("ip daddr 10.96.0.1 tcp dport 1 {nft} jump mark-for-masquerade"),
        ),
        format!(
            "iptables -t nat -N KUBE-MARK-MASQ; iptables -t nat -N KUBE-SVC-X
            iptables -t nat -A KUBE-SVC-X {iptables} -d 10.96.0.1/32 -p tcp --dport 1 -j KUBE-MARK-MASQ"
        ),
    ]
}

#[test]
fn what_is_in_the_way_is_found_with_its_cure_and_nothing_on_a_node_that_is_well() {
    isolated("checks::what_is_in_the_way_is_found_with_its_cure_and_nothing_on_a_node_that_is_well", || {
        let node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "True", "Installed");
        assert_eq!(check(&node), [] as [String; 0]);
        let bridge = "bridgeInterface: cni0";
        for (nft, iptables, words) in [
            ("ip saddr != 10.244.0.0/16", "! -s 10.244.0.0/16", None),
            ("ip saddr != 10.0.0.0/9", "! -s 10.0.0.0/9", Some(["10.0.0.0/9", bridge])),
            ("ip saddr != 10.244.1.0/24", "! -s 10.244.1.0/24", Some(["this node's next block", bridge])),
            ("iifname != \"cni0\"", "! -i cni0", None),
            ("iifname != \"plat*\"", "! -i plat+", Some(["by link plat", bridge])),
        ] {
            for rules in proxies(nft, iptables) {
                shell(&rules);
                match &words {
                    Some(words) => expect_one(&node, &[words.as_slice(), &["kube-proxy: "]].concat()),
                    None => assert_eq!(check(&node), [] as [String; 0], "{rules}"),
                }
                shell("nft delete table ip kube-proxy || true; iptables -t nat -F; iptables -t nat -X");
            }
        }
        shell(
            "ip link add docker0 type bridge; ip addr add 10.244.2.1/24 dev docker0; ip link set docker0 up",
        );
        expect_one(&node, &["addresses: PodCIDR '10-244-2-0-24' of node n2", "docker0"]);
        run("ip link del docker0");
        shell(
            "nft add table inet site; nft 'add chain inet site forward { type filter hook forward priority 0; policy drop; }'",
        );
        expect_one(&node, &["forwarding: chain inet site forward drops packets", "by its policy"]);
        run("nft delete table inet site");
        std::fs::write(node.file("net.d/00-multus.conf"), "{}").unwrap();
        expect_one(&node, &["cni: the container runtime takes 00-multus.conf"]);
    });
}

#[test]
fn how_pods_are_joined_is_known_by_the_conflist_or_before_it_by_the_setting() {
    isolated("checks::how_pods_are_joined_is_known_by_the_conflist_or_before_it_by_the_setting", || {
        let mut node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "True", "Installed");
        shell(&proxies("iifname != \"eth0\"", "")[0]);
        assert!(check_with(&node, "routed").iter().all(|line| line.contains("bridgeInterface: cni0")));
        node.stop();
        run(&format!("rm {}", node.file("net.d/05-plat.conflist").display()));
        let found = check_with(&node, "routed");
        assert!(
            found.len() == 2
                && found[0].starts_with("cni: 05-plat.conflist is not there")
                && found[1].contains("interfaceNamePrefix: plat"),
            "{found:#?}"
        );
    });
}
