//! Who keeps undoing what the agent puts back is met at a bounded rate and named; and agents do not do it to each other.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use plat_agent::fights::REFILL;
use plat_agent::incidents::Repair;

use crate::harness::*;

/// A program that does the same to routes again and again, until it is dropped.
struct Fighter {
    ip: Child,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Fighter {
    /// One `ip` that is given this command every 10 ms.
    fn start(command: &str) -> Fighter {
        let mut ip = Command::new("ip")
            .args(["-force", "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (stop, mut commands) = (Arc::new(AtomicBool::new(false)), ip.stdin.take().unwrap());
        let (ended, line) = (stop.clone(), format!("{command}\n"));
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) && commands.write_all(line.as_bytes()).is_ok() {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Fighter { ip, stop, thread: Some(thread) }
    }
}

impl Drop for Fighter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
        drop(self.ip.wait());
    }
}

fn node() -> TestNode {
    let node = TestNode::with(vec![block(1), block(2)], vec![range("default-v4")]);
    node.expect_condition("CNIReady", "True", "Installed");
    node.settled();
    node
}

#[test]
fn a_fight_is_slowed_down_and_named_and_over_once_the_other_stops() {
    isolated("fights::a_fight_is_slowed_down_and_named_and_over_once_the_other_stops", || {
        let mut node = node();
        let fighter = Fighter::start("route del 10.244.2.0/24 proto 112");
        let message = node.expect_incident("RepairsContested", 1);
        let who = format!("ip (netlink port {})", fighter.ip.id());
        assert!(message.contains(&who) && message.contains("10.244.2.0/24"), "{message}");
        let message = node.expect_condition("RoutesReady", "True", "Contested");
        assert!(message.contains(&who), "{message}");
        assert!(node.report().contested);

        let (begin, before) = (Instant::now(), node.report().repairs[&Repair::Route]);
        let repairs = eventually("it goes on", || match node.report().repairs[&Repair::Route] - before {
            few if few < 4 => Err(format!("{few} repairs")),
            repairs => Ok(repairs),
        });
        let allowed = i64::try_from(begin.elapsed().as_millis() / REFILL.as_millis()).unwrap() + 2;
        assert!(repairs <= allowed, "{repairs} repairs in {:?}", begin.elapsed());

        // What objects say does not wait for it.
        node.apply(block(3));
        eventually("the new route", || match our_routes().iter().any(|r| r.starts_with("10.244.3.0/24")) {
            true => Ok(()),
            false => Err("missing".into()),
        });

        drop(fighter);
        node.expect_condition("RoutesReady", "True", "AllInstalled");
        assert!(!node.report().contested);
        assert!(our_routes().iter().any(|r| r.starts_with("10.244.2.0/24")));
        assert_eq!(node.report().contests, 1);
        let repairs = node.report().repairs[&Repair::Route];
        run("ip route del 10.244.2.0/24 proto 112");
        node.expect_incident("RouteRestored", repairs + 1);
    });
}

#[test]
fn a_fight_about_the_ruleset_is_slowed_down_too() {
    isolated("fights::a_fight_about_the_ruleset_is_slowed_down_too", || {
        let node = node();
        let stop = Arc::new(AtomicBool::new(false));
        let ended = stop.clone();
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                drop(try_run("nft delete table inet plat"));
            }
        });
        let message = node.expect_incident("RepairsContested", 1);
        assert!(message.contains("inet plat") && message.contains("nft (pid "), "{message}");
        stop.store(true, Ordering::Relaxed);
        thread.join().unwrap();
        eventually("the table", || match try_run("nft list table inet plat").status.success() {
            true => Ok(()),
            false => Err("missing".into()),
        });
    });
}

#[test]
fn two_agents_on_one_node_have_nothing_to_repair() {
    isolated("fights::two_agents_on_one_node_have_nothing_to_repair", || {
        let first = node();
        let mut second = first.another();
        second.start();
        second.contact();
        second.list(vec![block(1), block(2)], vec![range("default-v4")]);
        second.expect_condition("CNIReady", "True", "Installed");
        for _ in 0..5 {
            first.settled();
            second.settled();
        }
        for (name, node) in [("first", &first), ("second", &second)] {
            let incidents = node.report().status.incidents;
            assert_eq!(incidents, [], "{name}");
        }
    });
}
