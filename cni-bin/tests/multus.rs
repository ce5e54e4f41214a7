//! A meta-plugin in front, as Multus is: the runtime knows it alone, and it calls ours as the pod's default network
//! and as further attachments of the same container. Check 92 of the conformance checklist in `docs/cni.md`.
//!
//! The one here is a script of ours that does what Multus does with `delegates`: the first one gets the runtime's
//! interface, the others `net1`, `net2`, …; container, namespace and arguments are the runtime's; what a
//! delegate answered is kept for its CHECK and DEL; DEL goes in reverse and to all; after a failed ADD what
//! was added is removed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use lab::network::{cnitool, configure, conflist, failed, gocni, install, install_script, ok, result};
use lab::{blocks, json_of, netns, sh};
use serde_json::{Value, json};

const META: &str = r#"
state=/run/meta; mkdir -p $state
conf=$(cat)
last=$(($(printf %s "$conf" | jq '.delegates | length') - 1))
delegate() { # VERB INDEX
  saved=$state/$CNI_CONTAINERID-$2
  own=$(printf %s "$conf" | jq -c --argjson i "$2" '{cniVersion} + .delegates[$i]')
  [ ! -s "$saved" ] || own=$(printf %s "$own" | jq -c --slurpfile r "$saved" '. + {prevResult: $r[0]}')
  [ "$2" = 0 ] || export CNI_IFNAME="net$2"
  printf %s "$own" | CNI_COMMAND=$1 "$CNI_PATH/$(printf %s "$own" | jq -r .type)"
}
case $CNI_COMMAND in
ADD)
  for i in $(seq 0 $last); do
    if (delegate ADD "$i") >$state/answer; then
      mv $state/answer "$state/$CNI_CONTAINERID-$i"
    else
      for j in $(seq "$i" -1 0); do (delegate DEL "$j") >/dev/null; done
      cat $state/answer; exit 1
    fi
  done
  cat "$state/$CNI_CONTAINERID-0" ;;
DEL)
  failed=0
  for i in $(seq $last -1 0); do (delegate DEL "$i") || failed=1; done
  rm -f "$state/$CNI_CONTAINERID-"*; exit $failed ;;
CHECK) for i in $(seq 0 $last); do (delegate CHECK "$i") || exit 1; done ;;
STATUS) (delegate STATUS 0) ;;
VERSION) printf %s "$conf" | "$CNI_PATH/plat" ;;
esac
"#;

/// The pod's default network: ours, from the node's blocks.
fn default_network() -> Value {
    json!({"name": "plat", "type": "plat", "hairpinMode": true, "ipam": {"type": "plat"}})
}

/// A second network, by hand, on a bridge of its own.
fn storage() -> Value {
    json!({"name": "storage", "type": "plat", "bridge": "br1", "ipam": {"subnet": "10.77.0.0/24"}})
}

fn node(delegates: Vec<Value>) {
    lab::enter();
    sh("sysctl -qw net.ipv4.ip_forward=1");
    blocks(&["10.244.3.0/24", "fd00:10:244:3::/64"]);
    // Ours is there as the agent installs it; the one that sorts first wins.
    install("05-plat.conflist", &conflist("1.0.0", vec![]));
    install_script("meta", META);
    let meta = json!({"cniVersion": "1.1.0", "name": "meta", "type": "meta", "delegates": delegates});
    configure("00-meta.conf", &meta);
}

/// Interface, address and network of each lease.
fn attachments() -> Vec<[String; 3]> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut all: Vec<_> = lab::leases()
        .iter()
        .map(|l| [text(&l["ifname"]), text(&l["addresses"][0]["address"]), text(&l["network"])])
        .collect();
    all.sort();
    all
}

fn owned(expected: &[[&str; 3]]) -> Vec<[String; 3]> {
    expected.iter().map(|row| row.map(str::to_owned)).collect()
}

#[test]
fn c92_ours_is_the_default_network_and_an_attachment_of_the_same_container() {
    node(vec![default_network(), storage()]);
    ok(gocni(&["status"], &json!({})));
    for id in ["a", "b"] {
        netns(id);
        let taken = result(gocni(&["setup", id, &format!("/run/netns/{id}")], &json!({})));
        assert_eq!(taken["Interfaces"]["eth0"]["IPConfigs"].as_array().unwrap().len(), 2, "{taken}");
        assert!(taken["Interfaces"].get("net1").is_none(), "the runtime sees the default network alone");
    }
    let of_a: Vec<_> = attachments().into_iter().filter(|[_, address, _]| address.ends_with(".2")).collect();
    assert_eq!(of_a, owned(&[["eth0", "10.244.3.2", "plat"], ["net1", "10.77.0.2", "storage"]]));
    assert!(lab::ping("a", "10.244.3.1") && lab::ping("a", "10.244.3.3") && lab::ping("a", "10.77.0.3"));
    assert!(sh("ip -n a route show default").contains("dev eth0"));
    for id in ["a", "b"] {
        ok(gocni(&["remove", id, &format!("/run/netns/{id}")], &json!({})));
    }
    lab::assert_nothing_left();
}

#[test]
fn c92_two_attachments_of_one_network_are_two_leases_and_each_goes_by_itself() {
    node(vec![default_network(), default_network()]);
    netns("c");
    result(gocni(&["setup", "c", "/run/netns/c"], &json!({})));
    assert_eq!(attachments(), owned(&[["eth0", "10.244.3.2", "plat"], ["net1", "10.244.3.3", "plat"]]));
    assert!(lab::ping("c", "10.244.3.1") && lab::ping("c", "fd00:10:244:3::1"));
    assert!(
        sh("ip -n c route show default; ip -n c -6 route show default")
            .lines()
            .all(|l| l.contains("dev eth0"))
    );
    // A DEL of the second alone, as when an attachment is detached from a running pod.
    let second = lab::Plat::call("DEL", "c", &lab::cluster_conf()).set("CNI_IFNAME", "net1");
    second.run().silent();
    assert_eq!(attachments(), owned(&[["eth0", "10.244.3.2", "plat"]]));
    assert_eq!(json_of("ip -n c -j link show").as_array().unwrap().len(), 2, "lo and eth0");
    assert!(lab::ping("c", "10.244.3.1"), "the default network goes on");
    // And of both, one of which is gone, with the namespace.
    sh("ip netns del c");
    ok(gocni(&["remove", "c", ""], &json!({})));
    lab::assert_nothing_left();
}

#[test]
fn c92_an_attachment_gets_the_address_that_its_pod_asks_for_and_check_sees_both() {
    let mut wish = storage();
    wish["runtimeConfig"] = json!({"ips": ["10.77.0.50/24"], "mac": "0a:00:00:00:00:50"});
    node(vec![default_network(), wish]);
    netns("c");
    ok(cnitool("add", "meta", "c").output().unwrap());
    assert_eq!(json_of("ip -n c -j link show net1")[0]["address"], "0a:00:00:00:00:50");
    assert_eq!(attachments()[1], ["net1", "10.77.0.50", "storage"]);
    ok(cnitool("check", "meta", "c").output().unwrap());
    sh("ip -n c addr flush dev net1");
    let said = failed(cnitool("check", "meta", "c").output().unwrap());
    assert!(said.contains("interface net1 lacks address 10.77.0.50/24"), "{said}");
    ok(cnitool("del", "meta", "c").output().unwrap());
    lab::assert_nothing_left();
}

#[test]
fn c92_an_attachment_that_fails_takes_the_default_network_along() {
    let mut wish = storage();
    wish["runtimeConfig"] = json!({"ips": ["10.99.0.1"]});
    node(vec![default_network(), wish]);
    netns("c");
    let said = failed(gocni(&["setup", "c", "/run/netns/c"], &json!({})));
    assert!(said.contains("10.99.0.1") && said.contains("10.77.0.0/24"), "{said}");
    lab::assert_nothing_left();
    ok(gocni(&["remove", "c", "/run/netns/c"], &json!({})));
}
