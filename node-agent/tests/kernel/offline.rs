//! The API server is away.

use std::sync::atomic::{AtomicBool, Ordering};

use plat_crds::blocks_file::BlocksFile;

use crate::harness::*;

fn lease_until(node: &TestNode) -> Option<u64> {
    let text = std::fs::read(node.file("plat/blocks.json")).ok()?;
    Some(BlocksFile::parse(&text).unwrap().lease_until)
}

#[test]
fn without_cache_and_without_objects_nothing_is_touched() {
    isolated("offline::without_cache_and_without_objects_nothing_is_touched", || {
        let mut node = TestNode::new();
        run("ip route add 10.244.9.0/24 via 172.30.0.19 proto 112 metric 1120");
        std::fs::create_dir_all(&node.settings.conf_dir).unwrap();
        node.start();
        node.expect_condition("RoutesReady", "Unknown", "WaitingForObjects");
        node.settled();
        assert_eq!(our_routes(), ["10.244.9.0/24 gateway 172.30.0.19 dev eth0 metric 1120"]);
        assert!(!node.report().programmed);
        // One kind alone is not enough.
        node.objects.blocks.apply(plat_agent::objects::Change::Listed(vec![Ok(block(1))]));
        node.push();
        node.settled();
        assert_eq!(our_routes().len(), 1);
        assert_eq!(run("nft list tables"), "");
    });
}

#[test]
fn an_agent_that_starts_without_the_api_server_programs_from_its_cache_and_grants_no_more_time() {
    isolated(
        "offline::an_agent_that_starts_without_the_api_server_programs_from_its_cache_and_grants_no_more_time",
        || {
            let mut node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
            node.expect_condition("CNIReady", "True", "Installed");
            node.settled();
            let (before, granted) = (our_routes(), lease_until(&node).unwrap());
            assert!(granted > 0);
            node.stop();
            // A reboot of the network, so to speak; /run stays, as it is the same boot.
            run("ip route flush proto 112");
            run("ip link del cni0");
            run("nft flush ruleset");
            std::fs::remove_file(node.file("net.d/05-plat.conflist")).unwrap();
            std::fs::remove_file(node.file("bin/plat")).unwrap();
            node.start();
            node.expect_condition("CNIReady", "True", "Installed");
            // The range's unreachable route is not made while nobody can tell whether it does harm.
            let expected: Vec<&str> =
                before.iter().map(String::as_str).filter(|r| !r.contains("/16")).collect();
            expect_routes(&expected);
            assert!(run("nft list tables").contains("inet plat"));
            assert!(node.file("net.d/05-plat.conflist").exists() && node.file("bin/plat").exists());
            assert_eq!(lease_until(&node), Some(granted));
        },
    );
}

#[test]
fn a_lease_is_moved_on_by_contact_alone_and_ends() {
    isolated("offline::a_lease_is_moved_on_by_contact_alone_and_ends", || {
        let mut node = TestNode::new();
        node.start();
        node.list(vec![block(1)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "False", "Unconfirmed");
        assert_eq!(lease_until(&node), Some(0), "no contact yet, no lease");
        assert!(!node.file("net.d/05-plat.conflist").exists());
        node.contact();
        node.expect_condition("CNIReady", "True", "Installed");
        let contact = node.objects.contact.unwrap().boot_ms;
        assert_eq!(lease_until(&node), Some(contact + 840_000));
        let mut long_ago = node.objects.contact.unwrap();
        long_ago.boot_ms = 1;
        node.objects.contact = Some(long_ago);
        let mut short = range("default-v4");
        short.quarantine_seconds = 60;
        node.apply_range(short);
        if plat_cni::boot::boot_ms() > 60_000 {
            let message = node.expect_condition("CNIReady", "False", "LeaseExpired");
            assert!(message.contains("2025-11-24T16:00:00Z"), "{message}");
        }
    });
}

#[test]
fn a_conflist_that_sorts_before_ours_is_named() {
    isolated("offline::a_conflist_that_sorts_before_ours_is_named", || {
        let node = TestNode::with(vec![block(1)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "True", "Installed");
        std::fs::write(node.file("net.d/00-multus.conf"), "{}").unwrap();
        let message = node.expect_condition("CNIReady", "False", "Shadowed");
        assert!(message.contains("00-multus.conf"), "{message}");
        assert_eq!(node.report().status.cni.unwrap().active.as_deref(), Some("00-multus.conf"));
        std::fs::remove_file(node.file("net.d/00-multus.conf")).unwrap();
        node.expect_condition("CNIReady", "True", "Installed");
    });
}

#[test]
fn c91_there_is_never_a_moment_with_a_conflist_that_cannot_be_read() {
    isolated("offline::c91_there_is_never_a_moment_with_a_conflist_that_cannot_be_read", || {
        let node = TestNode::with(vec![block(1)], vec![range("default-v4")]);
        let file = node.file("net.d/05-plat.conflist");
        let is_ours = || match std::fs::read_to_string(&file) {
            Ok(text) if text.contains("\"plat\"") => Ok(()),
            other => Err(format!("{other:?}")),
        };
        eventually("the conflist", is_ours);
        let done = AtomicBool::new(false);
        let reads = std::thread::scope(|scope| {
            // What a runtime does when it is told of a change: every file with one of these suffixes.
            let runtime = scope.spawn(|| {
                let mut reads = 0;
                while !done.load(Ordering::Relaxed) {
                    for entry in std::fs::read_dir(&node.settings.conf_dir).unwrap() {
                        let path = entry.unwrap().path();
                        let suffix = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
                        if !["conf", "conflist", "json"].contains(&suffix) {
                            continue;
                        }
                        // Gone meanwhile is no half file.
                        let Ok(text) = std::fs::read(&path) else { continue };
                        let read: Result<serde_json::Value, _> = serde_json::from_slice(&text);
                        assert!(read.is_ok(), "{}: {read:?}", path.display());
                        reads += 1;
                    }
                }
                reads
            });
            for round in 0..40 {
                match round % 2 {
                    0 => std::fs::remove_file(&file).unwrap(),
                    _ => {
                        std::fs::write(node.file("net.d/.foreign"), "{}").unwrap();
                        std::fs::rename(node.file("net.d/.foreign"), &file).unwrap();
                    }
                }
                eventually("the conflist is back", is_ours);
            }
            done.store(true, Ordering::Relaxed);
            runtime.join().unwrap()
        });
        assert!(reads > 40, "{reads}");
    });
}

#[test]
fn the_conflist_comes_last_and_never_without_a_block() {
    isolated("offline::the_conflist_comes_last_and_never_without_a_block", || {
        let mut node = TestNode::with(vec![block(2)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "False", "NoBlock");
        assert!(!node.file("net.d/05-plat.conflist").exists());
        // Something else has the bridge's name: routes to pods cannot be made.
        run("ip link add cni0 type veth peer name x");
        node.apply(block(1));
        let message = node.expect_condition("RoutesReady", "False", "BridgeNotReady");
        assert!(message.contains("not a bridge"), "{message}");
        node.expect_condition("CNIReady", "False", "NotProgrammed");
        assert!(!node.file("net.d/05-plat.conflist").exists());
        run("ip link del cni0");
        node.expect_condition("CNIReady", "True", "Installed");
        assert!(node.file("net.d/05-plat.conflist").exists());
    });
}

#[test]
fn a_blocks_file_of_an_earlier_life_grants_nothing_to_a_node_without_a_block() {
    isolated("offline::a_blocks_file_of_an_earlier_life_grants_nothing_to_a_node_without_a_block", || {
        let mut node = TestNode::with(vec![block(1)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "True", "Installed");
        node.stop();
        std::fs::remove_file(node.file("plat/map.json")).unwrap();
        node.start();
        node.list(vec![block(2)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "False", "NoBlock");
        let text = std::fs::read(node.file("plat/blocks.json")).unwrap();
        assert_eq!(BlocksFile::parse(&text).unwrap().blocks, []);
        assert!(node.file("net.d/05-plat.conflist").exists(), "STATUS tells the runtime; the conflist stays");
        // What the bridge carried of ours would answer for the block's next holder.
        eventually("gateway", || {
            let addresses = run("ip -o addr show dev cni0");
            if addresses.contains("10.244.1.1") { Err(addresses) } else { Ok(()) }
        });
    });
}

#[test]
fn a_node_whose_ipv6_is_switched_off_has_ipv4() {
    isolated("offline::a_node_whose_ipv6_is_switched_off_has_ipv4", || {
        let mut node = TestNode::new();
        set_sysctl("ipv6/conf/all/disable_ipv6", "1");
        set_sysctl("ipv6/conf/default/disable_ipv6", "1");
        node.start();
        node.contact();
        node.list(vec![block(1), block(2)], vec![range("default-v4")]);
        node.expect_condition("CNIReady", "True", "Installed");
        node.settled();
        assert_eq!(our_routes().len(), 4);
        assert!(node.report().status.incidents.is_empty());
    });
}

#[test]
fn a_full_or_read_only_run_folder_is_named_and_the_rest_goes_on() {
    isolated("offline::a_full_or_read_only_run_folder_is_named_and_the_rest_goes_on", || {
        let mut node = TestNode::new();
        let run_dir = node.settings.run_dir.clone();
        std::fs::create_dir(&run_dir).unwrap();
        run(&format!("mount -t tmpfs -o size=64k tmpfs {}", run_dir.display()));
        shell(&format!("head -c 100000 /dev/zero > {}/ballast 2>/dev/null || true", run_dir.display()));
        node.start();
        node.contact();
        node.list(vec![block(1), block(2)], vec![range("default-v4")]);
        let message = node.expect_condition("CNIReady", "False", "BlocksNotWritten");
        assert!(message.contains("free some space"), "{message}");
        node.expect_condition("RoutesReady", "True", "AllInstalled");
        assert_eq!((our_routes().len(), sysctl("ipv4/ip_forward")), (4, "1".to_owned()));

        std::fs::remove_file(run_dir.join("ballast")).unwrap();
        node.settled();
        node.expect_condition("CNIReady", "True", "Installed");
        assert!(run_dir.join("sysctls.json").exists());

        run(&format!("mount -o remount,ro {}", run_dir.display()));
        node.apply(block_v6(1));
        node.expect_condition("CNIReady", "False", "BlocksNotWritten");
        eventually("IPv6", || {
            let routes = our_routes();
            if routes.iter().any(|r| r.contains("fd00:10:244:1::/64")) {
                Ok(())
            } else {
                Err(format!("{routes:?}"))
            }
        });
    });
}
