//! The bridge against the kernel.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use plat_cni::bridge::{self, Error, Spec};
use plat_cni::netlink::{Protocol, Socket};
use plat_cni::sysctl::Sysctls;
use plat_crds::Block;

fn socket() -> Socket {
    Socket::open(Protocol::Route).unwrap()
}

fn blocks(texts: &[&str]) -> Vec<Block> {
    texts.iter().map(|t| t.parse().unwrap()).collect()
}

fn ensure(mtu: Option<u32>, texts: &[&str]) -> Result<bridge::Bridge, Error> {
    let blocks = blocks(texts);
    bridge::ensure(&mut socket(), &Sysctls::default(), &Spec { name: "cni0", mtu, blocks: &blocks })
}

/// Addresses and routes of the bridge, as `ip` shows them.
fn shown() -> (Vec<String>, Vec<String>) {
    let addresses = lab::sh("ip -o addr show dev cni0 | awk '$4 !~ /^fe80/ {print $4}' | sort");
    let routes =
        lab::sh("{ ip route show dev cni0; ip -6 route show dev cni0 proto 112; } | sed 's/ *$//' | sort");
    let lines = |text: String| text.lines().map(str::to_owned).collect();
    (lines(addresses), lines(routes))
}

#[test]
fn a_bridge_is_made_once_with_the_gateways_and_routes_of_its_blocks() {
    lab::enter();
    let first = ensure(Some(1400), &["10.244.3.0/24", "fd00:10:244:3::/64"]).unwrap();
    assert_eq!(first.mac.unwrap().to_string(), "0a:72:0a:f4:03:01", "derived from the first gateway");
    assert_eq!(first.mtu, 1400);
    assert!(!first.repaired.is_empty());
    let (addresses, routes) = shown();
    assert_eq!(addresses, ["10.244.3.1/32", "fd00:10:244:3::1/128"]);
    assert_eq!(routes.len(), 2, "{routes:?}");
    assert!(
        routes[0].starts_with("10.244.3.0/24 proto 112 scope link src 10.244.3.1 metric 1120"),
        "{routes:?}"
    );
    assert!(
        routes[1].starts_with("fd00:10:244:3::/64 proto 112 src fd00:10:244:3::1 metric 1120")
            || routes[1].starts_with("fd00:10:244:3::/64 src fd00:10:244:3::1 metric 1120"),
        "{routes:?}"
    );
    assert_eq!(lab::sh("cat /proc/sys/net/ipv6/conf/cni0/accept_ra"), "0\n");
    assert_eq!(lab::sh("cat /proc/sys/net/ipv6/conf/cni0/keep_addr_on_down"), "1\n");

    let again = ensure(Some(1400), &["10.244.3.0/24", "fd00:10:244:3::/64"]).unwrap();
    assert_eq!(again.repaired, Vec::<String>::new());
    assert_eq!((again.index, again.mac), (first.index, first.mac));
}

#[test]
fn what_was_changed_by_hand_is_repaired_and_said() {
    lab::enter();
    let texts = ["10.244.3.0/24", "fd00:10:244:3::/64"];
    ensure(None, &texts).unwrap();
    let before = shown();
    for damage in [
        "ip addr del 10.244.3.1/32 dev cni0",
        "ip route del 10.244.3.0/24",
        "ip -6 route del fd00:10:244:3::/64 metric 1120",
        "ip link set cni0 down",
        "echo 1 >/proc/sys/net/ipv6/conf/cni0/accept_ra",
        "ip link del cni0",
    ] {
        lab::sh(damage);
        let repaired = ensure(None, &texts).unwrap().repaired;
        assert!(!repaired.is_empty(), "{damage}");
        assert_eq!(shown(), before, "{damage}: {repaired:?}");
    }
    lab::sh("ip link set cni0 mtu 1300");
    assert_eq!(ensure(Some(1450), &texts).unwrap().mtu, 1450);
}

#[test]
fn a_block_that_is_gone_takes_its_gateway_and_route_along_and_nothing_of_others() {
    lab::enter();
    ensure(None, &["10.244.3.0/24", "10.244.9.0/24"]).unwrap();
    lab::sh("ip addr add 10.99.0.1/24 dev cni0; ip route add 10.98.0.0/24 dev cni0");
    ensure(None, &["10.244.9.0/24"]).unwrap();
    let (addresses, routes) = shown();
    assert_eq!(addresses, ["10.244.9.1/32", "10.99.0.1/24"]);
    let destinations: Vec<&str> = routes.iter().filter_map(|r| r.split(' ').next()).collect();
    assert_eq!(destinations, ["10.244.9.0/24", "10.98.0.0/24", "10.99.0.0/24"]);
}

#[test]
fn a_link_of_that_name_that_is_no_bridge_is_named_and_left_alone() {
    lab::enter();
    lab::sh("ip link add cni0 type veth peer name x0");
    let error = ensure(None, &["10.244.3.0/24"]).unwrap_err().to_string();
    assert!(error.contains("link cni0 exists and is veth, not a bridge"), "{error}");
    lab::sh("ip link show x0");
}

#[test]
fn the_bridge_keeps_its_address_whatever_becomes_its_port() {
    lab::enter();
    let mac = ensure(None, &["10.244.3.0/24"]).unwrap().mac;
    lab::sh("ip link add a0 address 02:00:00:00:00:01 type veth peer name a1; ip link set a0 master cni0 up");
    assert_eq!(ensure(None, &["10.244.3.0/24"]).unwrap().mac, mac);
    lab::sh("ip link del a0");
    assert_eq!(ensure(None, &["10.244.3.0/24"]).unwrap().mac, mac);
}
