//! What somebody takes away is back at once, counted, and told.

use std::fs;

use crate::harness::*;

fn node() -> TestNode {
    let blocks = vec![block(1), block(2), block_v6(1), block_v6(2)];
    let node = TestNode::with(blocks, vec![range("default-v4"), range("default-v6")]);
    node.expect_condition("CNIReady", "True", "Installed");
    node.settled();
    node
}

const ROUTE: &str = "10.244.2.0/24 gateway 172.30.0.12 dev eth0 metric 1120";

fn expect_all_as(before: &[String]) {
    expect_routes(&before.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn a_deleted_route_is_back_and_who_deleted_it_is_told() {
    isolated("repair::a_deleted_route_is_back_and_who_deleted_it_is_told", || {
        let node = node();
        let before = our_routes();
        assert!(before.contains(&ROUTE.to_owned()));
        run("ip route del 10.244.2.0/24 proto 112");
        expect_all_as(&before);
        let message = node.expect_incident("RouteRestored", 1);
        assert!(message.contains("10.244.2.0/24") && message.contains("netlink port"), "{message}");
        assert_eq!(node.report().status.routes.unwrap().repaired, 1);
        run("ip -6 route del fd00:10:244:2::/64 proto 112");
        node.expect_incident("RouteRestored", 2);
        expect_all_as(&before);
    });
}

#[test]
fn a_route_that_was_bent_is_straight_again() {
    isolated("repair::a_route_that_was_bent_is_straight_again", || {
        let node = node();
        let before = our_routes();
        run("ip route replace 10.244.2.0/24 via 172.30.0.66 proto 112 metric 1120");
        run("ip -6 route append fd00:10:244:2::/64 via fd00:30::66 proto 112 metric 1120");
        expect_all_as(&before);
        node.expect_incident("RouteRestored", 1);
    });
}

#[test]
fn flushed_routes_are_all_back_as_one_incident() {
    isolated("repair::flushed_routes_are_all_back_as_one_incident", || {
        let node = node();
        let before = our_routes();
        run("ip route flush proto 112");
        run("ip -6 route flush proto 112");
        expect_all_as(&before);
        node.expect_incident("RouteRestored", i64::try_from(before.len()).unwrap());
        assert_eq!(node.report().status.incidents.len(), 1);
    });
}

#[test]
fn routes_that_a_network_manager_removed_as_foreign_are_back() {
    isolated("repair::routes_that_a_network_manager_removed_as_foreign_are_back", || {
        let node = node();
        let before = our_routes();
        // As systemd-networkd does at its start (ManageForeignRoutes=yes): one by one what is not its own or the kernel's.
        shell(
            "for family in -4 -6; do \
               ip $family route show proto 112 | sed 's/^/route del /; s/ linkdown//' | ip $family -force -batch - || true; \
             done",
        );
        expect_all_as(&before);
        node.expect_incident("RouteRestored", i64::try_from(before.len()).unwrap());
        assert_eq!(node.report().status.incidents.len(), 1);
    });
}

#[test]
fn a_foreign_route_that_goes_before_ours_is_told_and_left_alone() {
    isolated("repair::a_foreign_route_that_goes_before_ours_is_told_and_left_alone", || {
        let node = node();
        let before = our_routes();
        run("ip route add 10.244.2.0/24 via 172.30.0.66 metric 7");
        let message = node.expect_condition("RoutesReady", "True", "Overridden");
        assert!(message.contains("10.244.2.0/24 via 172.30.0.66"), "{message}");
        expect_all_as(&before);
        run("ip route del 10.244.2.0/24 via 172.30.0.66 metric 7");
        node.expect_condition("RoutesReady", "True", "AllInstalled");
        // One that takes the very place of ours.
        run("ip route replace 10.244.2.0/24 via 172.30.0.66 metric 1120");
        let message = node.expect_condition("RoutesReady", "False", "ForeignRoute");
        assert!(message.contains("10.244.2.0/24"), "{message}");
        run("ip route del 10.244.2.0/24 via 172.30.0.66 metric 1120");
        expect_all_as(&before);
    });
}

#[test]
fn a_link_that_went_down_and_up_has_its_routes_again() {
    isolated("repair::a_link_that_went_down_and_up_has_its_routes_again", || {
        let _node = node();
        let before = our_routes();
        // IPv4 routes vanish without a message of their own.
        run("ip link set eth0 down");
        eventually("gone", || {
            if our_routes().contains(&ROUTE.to_owned()) { Err("still there".into()) } else { Ok(()) }
        });
        run("ip link set eth0 up");
        // The kernel does not put global IPv6 addresses back; whoever manages the link does.
        run("ip addr replace fd00:30::b/64 dev eth0 nodad");
        expect_all_as(&before);
    });
}

#[test]
fn an_address_that_went_and_came_has_its_routes_again() {
    isolated("repair::an_address_that_went_and_came_has_its_routes_again", || {
        let _node = node();
        let before = our_routes();
        run("ip addr del 172.30.0.11/24 dev eth0");
        eventually("gone", || {
            if our_routes().contains(&ROUTE.to_owned()) { Err("still there".into()) } else { Ok(()) }
        });
        run("ip addr add 172.30.0.11/24 dev eth0");
        expect_all_as(&before);
    });
}

#[test]
fn a_flushed_ruleset_is_back_and_who_flushed_it_is_told() {
    isolated("repair::a_flushed_ruleset_is_back_and_who_flushed_it_is_told", || {
        let node = node();
        let before = run("nft list table inet plat");
        for (damage, count) in [
            ("nft flush ruleset", 1),
            ("nft delete table inet plat", 2),
            ("nft flush chain inet plat postrouting", 3),
            ("nft add rule inet plat postrouting accept", 4),
            ("nft flush set inet plat keep4", 5),
            ("nft add chain inet plat mine", 6),
            ("nft add element inet plat keep4 { 1.1.1.1 }", 7),
        ] {
            run(damage);
            let message = node.expect_incident("NftRestored", count);
            assert!(message.contains("nft (pid "), "{damage}: {message}");
            eventually(damage, || {
                let now = try_run("nft list table inet plat");
                if String::from_utf8_lossy(&now.stdout) == before { Ok(()) } else { Err("differs".into()) }
            });
        }
    });
}

#[test]
fn a_firewall_that_loads_all_its_rules_anew_leaves_no_gap_for_long() {
    isolated("repair::a_firewall_that_loads_all_its_rules_anew_leaves_no_gap_for_long", || {
        let node = node();
        let before = run("nft list table inet plat");
        for count in 1..=3 {
            // As the nftables service does, and firewalld after it: all goes, and theirs is there, in one transaction.
            shell(
                "nft -f - <<'END'\nflush ruleset\ntable inet firewalld {\n chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept; ct state established,related accept; }\n}\nEND",
            );
            node.expect_incident("NftRestored", count);
            eventually("both tables", || {
                let ours = try_run("nft list table inet plat");
                let is_back = String::from_utf8_lossy(&ours.stdout) == before;
                let theirs = try_run("nft list table inet firewalld").status.success();
                if is_back && theirs { Ok(()) } else { Err(format!("ours {is_back}, theirs {theirs}")) }
            });
        }
    });
}

#[test]
fn other_tables_are_let_alone() {
    isolated("repair::other_tables_are_let_alone", || {
        let node = node();
        run("nft add table inet mine");
        run("nft add chain inet mine c { type filter hook input priority 0 ; policy accept ; }");
        run("nft flush table inet plat");
        node.expect_incident("NftRestored", 1);
        assert!(run("nft list tables").contains("table inet mine"));
    });
}

#[test]
fn forwarding_that_was_switched_off_is_on_again() {
    isolated("repair::forwarding_that_was_switched_off_is_on_again", || {
        let node = node();
        for (path, count) in [("ipv4/ip_forward", 1), ("ipv6/conf/all/forwarding", 2)] {
            set_sysctl(path, "0");
            node.expect_incident("SysctlRestored", count);
            assert_eq!(sysctl(path), "1");
        }
    });
}

#[test]
fn a_deleted_bridge_is_back_with_gateways_and_routes() {
    isolated("repair::a_deleted_bridge_is_back_with_gateways_and_routes", || {
        let node = node();
        let before = our_routes();
        let mac = json("ip -j link show cni0")[0]["address"].clone();
        run("ip link del cni0");
        expect_all_as(&before);
        node.expect_incident("BridgeRestored", 1);
        assert_eq!(json("ip -j link show cni0")[0]["address"], mac, "pods know it by that");
        let addresses = run("ip -o addr show dev cni0");
        assert!(
            addresses.contains("10.244.1.1/32") && addresses.contains("fd00:10:244:1::1/128"),
            "{addresses}"
        );
        assert_eq!(sysctl("ipv6/conf/cni0/keep_addr_on_down"), "1");
    });
}

#[test]
fn a_bridge_that_was_downed_or_lost_its_gateway_is_in_order_again() {
    isolated("repair::a_bridge_that_was_downed_or_lost_its_gateway_is_in_order_again", || {
        let node = node();
        let before = our_routes();
        for (damage, count) in [
            ("ip link set cni0 down", 1),
            ("ip addr del 10.244.1.1/32 dev cni0", 2),
            ("ip link set cni0 mtu 1300", 3),
        ] {
            run(damage);
            node.expect_incident("BridgeRestored", count);
            expect_all_as(&before);
            let link = &json("ip -j addr show dev cni0")[0];
            assert_eq!(link["mtu"], 1500, "{damage}");
            assert!(link["flags"].as_array().unwrap().contains(&"UP".into()), "{damage}");
            assert!(link.to_string().contains("10.244.1.1"), "{damage}: {link}");
        }
    });
}

#[test]
fn deleted_and_damaged_files_are_back() {
    isolated("repair::deleted_and_damaged_files_are_back", || {
        let node = node();
        for (path, reason) in [
            ("net.d/05-plat.conflist", "ConflistRestored"),
            ("bin/plat", "PluginRestored"),
            ("plat/blocks.json", "BlocksRestored"),
        ] {
            let file = node.file(path);
            let before = fs::read(&file).unwrap();
            fs::remove_file(&file).unwrap();
            node.expect_incident(reason, 1);
            assert_eq!(fs::read(&file).unwrap(), before);
            fs::write(&file, "{}").unwrap();
            node.expect_incident(reason, 2);
            assert_eq!(fs::read(&file).unwrap(), before);
        }
    });
}

#[test]
fn removed_folders_are_made_anew() {
    isolated("repair::removed_folders_are_made_anew", || {
        let node = node();
        for (folder, file) in
            [("plat", "plat/blocks.json"), ("net.d", "net.d/05-plat.conflist"), ("bin", "bin/plat")]
        {
            for round in 0..2 {
                fs::remove_dir_all(node.file(folder)).unwrap();
                eventually(&format!("{file}, round {round}"), || {
                    if node.file(file).exists() { Ok(()) } else { Err("missing".into()) }
                });
                node.settled();
            }
        }
        assert!(node.file("plat/map.json").exists() && node.file("plat/sysctls.json").exists());
    });
}

#[test]
fn a_folder_that_was_removed_under_its_mount_ends_the_agent_with_a_reason() {
    isolated("repair::a_folder_that_was_removed_under_its_mount_ends_the_agent_with_a_reason", || {
        let mut node = TestNode::new();
        // As a hostPath: the agent sees the folder through a bind mount.
        let on_host = node.file("host-bin");
        let mounted = node.file("mounted-bin");
        fs::create_dir(&on_host).unwrap();
        fs::create_dir(&mounted).unwrap();
        run(&format!("mount --bind {} {}", on_host.display(), mounted.display()));
        node.settings.bin_dir = mounted;
        node.start();
        node.list(vec![block(1)], vec![range("default-v4")]);
        eventually(
            "installed",
            || if on_host.join("plat").exists() { Ok(()) } else { Err("missing".into()) },
        );
        fs::remove_dir_all(&on_host).unwrap();
        fs::create_dir(&on_host).unwrap();
        let why = node.ended();
        assert!(why.contains("was removed under this agent"), "{why}");
    });
}
