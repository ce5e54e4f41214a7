//! The protocol: environment, standard input, answers. Numbers are those of the conformance checklist in
//! `docs/cni.md`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::fs::File;
use std::io::Read;
use std::process::Stdio;

use lab::{Plat, add, cluster_conf, hand_conf, netns, sh, with};
use serde_json::{Value, json};

const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

#[test]
fn c01_version_needs_nothing_but_the_command() {
    let answer = Plat::bare("VERSION").result();
    assert_eq!(answer["cniVersion"], "1.1.0");
    assert_eq!(answer["supportedVersions"], json!(VERSIONS));
}

#[test]
fn c02_version_echoes_a_version_that_it_supports() {
    let answer = Plat::bare("VERSION").input(&json!({"cniVersion": "0.4.0"})).result();
    assert_eq!(answer["cniVersion"], "0.4.0");
}

#[test]
fn c03_version_answers_anything_else_with_the_newest() {
    for input in [&br#"{"cniVersion":"99.0.0"}"#[..], b"garbage", b"[]", b"\xff\xfe"] {
        assert_eq!(Plat::bare("VERSION").raw_input(input).result()["cniVersion"], "1.1.0");
    }
}

#[test]
fn c04_version_takes_the_dummies_that_libcni_sends() {
    lab::enter();
    let call =
        Plat::bare("VERSION").set("CNI_NETNS", "dummy").set("CNI_IFNAME", "dummy").set("CNI_PATH", "dummy");
    assert_eq!(call.input(&json!({"cniVersion": "1.0.0"})).result()["cniVersion"], "1.0.0");
    assert!(!lab::exists("/run/plat"), "touches nothing");
}

#[test]
fn c05_without_command_it_says_what_it_is_on_standard_error() {
    for call in [Plat::bare("ADD").unset("CNI_COMMAND"), Plat::bare("")] {
        let answer = call.run();
        answer.silent();
        assert!(answer.stderr.contains("0.1.0, 0.2.0") && answer.stderr.contains("plat"), "{answer:?}");
    }
}

#[test]
fn c06_an_unknown_command_is_named_and_the_verb_of_old_tutorials_gets_an_answer() {
    assert!(Plat::bare("NOPE").run().error(4).contains("NOPE"));
    assert!(Plat::bare("GET").run().error(4).contains("CHECK"));
}

#[test]
fn c07_all_missing_variables_are_listed() {
    let error = Plat::bare("ADD").input(&hand_conf()).run().error(4);
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn c08_an_empty_variable_is_a_missing_one() {
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        assert!(Plat::call("ADD", "c", &hand_conf()).set(name, "").run().error(4).contains(name));
    }
}

#[test]
fn c09_container_ids_are_checked() {
    lab::enter();
    for bad in ["-a", "a/b", "a b", "ä", "../x"] {
        let _ = Plat::call("ADD", "c", &hand_conf()).set("CNI_CONTAINERID", bad).run().error(4);
    }
    netns("c");
    for (good, ifname) in [("a", "eth0"), ("A_1.b-c", "eth1")] {
        Plat::call("ADD", "c", &hand_conf()).set("CNI_CONTAINERID", good).set("CNI_IFNAME", ifname).result();
    }
}

#[test]
fn c10_interface_names_are_checked() {
    lab::enter();
    for bad in [".", "..", "a/b", "a:b", "a\tb", "a\u{a0}b", "sixteen-bytes-xy"] {
        let _ = Plat::call("ADD", "c", &hand_conf()).set("CNI_IFNAME", bad).run().error(4);
    }
    netns("c");
    Plat::call("ADD", "c", &hand_conf()).set("CNI_IFNAME", "fifteen-bytes-x").result();
}

#[test]
fn c11_a_bad_network_name_creates_nothing() {
    lab::enter();
    netns("c");
    for name in [json!(null), json!(""), json!("_x"), json!("a/../b")] {
        let _ = Plat::call("ADD", "c", &with(hand_conf(), json!({"name": name}))).run().error(7);
    }
    assert!(!lab::exists("/run/plat"));
    assert_eq!(lab::host_links(), Vec::<String>::new());
}

#[test]
fn c12_bad_standard_input_is_an_error_and_no_panic() {
    lab::enter();
    netns("c");
    let whole = hand_conf().to_string();
    let mut inputs: Vec<Vec<u8>> = (0..whole.len()).map(|cut| whole.as_bytes()[..cut].to_vec()).collect();
    inputs.extend([b"[]".to_vec(), b"null".to_vec(), b"7".to_vec(), vec![0; 100], vec![b' '; 10 << 20]]);
    inputs.push([b"{\"name\":\"n\",\"x\":\"".to_vec(), vec![b'x'; 10 << 20], b"\"}".to_vec()].concat());
    inputs.push("[".repeat(500_000).into_bytes());
    for input in inputs {
        let error = Plat::call("ADD", "c", &json!({})).raw_input(&input).run().error(6);
        assert!(!error.contains("internal error"), "{error}");
    }
}

#[test]
fn c13_standard_input_that_cannot_be_read_is_code_5() {
    lab::enter();
    netns("c");
    let mut command = Plat::call("ADD", "c", &hand_conf()).command();
    let output = command.stdin(Stdio::from(File::open("/").unwrap())).output().unwrap();
    let _ = lab::Answer::of(output).error(5);
    assert!(!lab::exists("/run/plat"), "nothing was begun");
}

#[test]
fn c13_closed_standard_input_is_code_5_and_an_empty_one_code_6() {
    lab::enter();
    netns("c");
    let run = |verb: &str, redirection: &str| {
        let call = Plat::call(verb, "c", &hand_conf()).command();
        let variables = call.get_envs().filter_map(|(name, value)| Some((name, value?)));
        let mut shell = std::process::Command::new("/bin/sh");
        shell.args(["-c", &format!("exec \"$0\" {redirection}")]).arg(call.get_program());
        lab::Answer::of(shell.env_clear().envs(variables).output().unwrap())
    };
    let _ = run("ADD", "<&-").error(5);
    let _ = run("ADD", "</dev/null").error(6);
    assert_eq!(run("VERSION", "<&-").json()["cniVersion"], "1.1.0", "it needs no input");
}

#[test]
fn c14_an_unsupported_version_names_both_sides() {
    for version in ["1.0", "0.5.0", "2.0.0"] {
        let error = Plat::call("ADD", "c", &with(hand_conf(), json!({"cniVersion": version}))).run().error(1);
        assert!(error.contains(version) && error.contains("1.1.0"), "{error}");
    }
}

#[test]
fn c15_without_version_the_result_has_the_oldest_shape() {
    lab::enter();
    for (id, version) in [("a", json!(null)), ("b", json!(""))] {
        let result = add(id, &with(hand_conf(), json!({"cniVersion": version})));
        assert_eq!(result["cniVersion"], "0.1.0");
        assert!(result["ip4"]["ip"].as_str().unwrap().starts_with("10.22.0."), "{result}");
        assert!(result.get("interfaces").is_none());
    }
}

#[test]
fn c18_a_panic_is_still_a_json_error() {
    lab::enter();
    netns("c");
    let answer = Plat::call("ADD", "c", &hand_conf()).set("PLAT_FAIL", "link:panic").run();
    assert!(answer.error(100).contains("panicked at link"));
    Plat::call("DEL", "c", &hand_conf()).run().silent();
    lab::assert_nothing_left();
}

#[test]
fn c19_check_came_with_0_4_0() {
    let conf = with(hand_conf(), json!({"cniVersion": "0.3.1", "prevResult": {}}));
    let _ = Plat::call("CHECK", "c", &conf).run().error(1);
}

#[test]
fn c20_gc_and_status_came_with_1_1_0() {
    for verb in ["GC", "STATUS"] {
        let _ = Plat::call(verb, "c", &with(hand_conf(), json!({"cniVersion": "1.0.0"}))).run().error(1);
    }
}

#[test]
fn c21_gc_and_status_do_not_look_at_the_containers_variables() {
    lab::enter();
    for verb in ["GC", "STATUS"] {
        let call = Plat::bare(verb).input(&hand_conf());
        call.set("CNI_CONTAINERID", "").set("CNI_NETNS", "").set("CNI_IFNAME", "").run().silent();
    }
}

#[test]
fn c22_without_delegation_no_plugin_path_is_needed() {
    lab::enter();
    netns("c");
    Plat::call("ADD", "c", &hand_conf()).set("CNI_PATH", "").result();
    Plat::call("DEL", "c", &hand_conf()).unset("CNI_PATH").run().silent();
}

#[test]
fn c23_unknown_keys_are_ignored() {
    lab::enter();
    let extra = json!({"foo": {"a": [1]}, "args": {"labels": [], "cni": {"x": 1}}, "capabilities": {"portMappings": true},
        "cni.dev/foo": true, "runtimeConfig": {"cgroupPath": "/x", "io.kubernetes.cri.pod-annotations": {"a": "b"}}});
    add("c", &with(hand_conf(), extra));
}

#[test]
fn c24_keys_in_wrong_case_and_null_mean_the_same() {
    lab::enter();
    let shouted = json!({"CNIVERSION": "1.1.0", "NAME": "hand", "Type": "plat", "ISDEFAULTGATEWAY": true, "MTU": null,
        "bridge": null, "ipMasq": null, "dns": null, "args": null, "runtimeConfig": null, "prevResult": null,
        "IPAM": {"SUBNET": "10.22.0.0/24", "rangeStart": null, "ranges": null, "routes": null, "TYPE": null}});
    let plain = add("a", &hand_conf());
    let other = add("b", &shouted);
    let shape = |mut result: Value| {
        result["interfaces"] = json!(result["interfaces"].as_array().unwrap().len());
        result["ips"][0]["address"] = json!("");
        result
    };
    assert_eq!(shape(plain), shape(other));
}

#[test]
fn c25_the_capabilities_that_containerd_sends_are_understood() {
    lab::enter();
    let runtime = json!({"runtimeConfig": {
        "bandwidth": {"IngressRate": 1000000, "IngressBurst": 4294967295u32, "EgressRate": 0, "EgressBurst": 0},
        "dns": {"Servers": ["10.0.0.10"], "Searches": null, "Options": null},
        "portMappings": [{"HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": ""}]}});
    let result = add("c", &with(hand_conf(), runtime));
    assert_eq!(result["dns"], json!({"nameservers": ["10.0.0.10"]}));
}

#[test]
fn c26_arguments_come_in_any_order_and_shape() {
    lab::enter();
    netns("c");
    let args = "K8S_POD_NAME=p;a=b=c;IgnoreUnknown=1;IP=10.22.0.77;;junk;K8S_POD_UID=;";
    let result = Plat::call("ADD", "c", &hand_conf()).set("CNI_ARGS", args).result();
    assert_eq!(lab::address(&result), "10.22.0.77");
}

#[test]
fn c16_a_failure_is_one_object_with_version_code_and_message() {
    lab::enter();
    netns("c");
    for (version, change, code) in [
        ("0.4.0", json!({"vlan": 5}), 2),
        ("1.0.0", json!({"ipam": {"subnet": "x"}}), 7),
        ("1.1.0", json!({"mtu": "x"}), 6),
        ("0.1.0", json!({"runDir": "/proc/none"}), 5),
    ] {
        let conf = with(with(hand_conf(), json!({"cniVersion": version})), change);
        let answer = Plat::call("ADD", "c", &conf).run();
        assert!(!answer.success && answer.stdout.lines().count() == 1, "{answer:?}");
        let error: Value = serde_json::from_str(&answer.stdout).unwrap();
        assert_eq!((error["cniVersion"].as_str(), error["code"].as_u64()), (Some(version), Some(code)));
        assert!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{error}");
    }
}

#[test]
fn c17_success_of_every_verb_but_add_and_version_says_nothing() {
    lab::enter();
    netns("c");
    let conf = hand_conf();
    let result = Plat::call("ADD", "c", &conf).result();
    Plat::call("CHECK", "c", &with(conf.clone(), json!({"prevResult": result}))).run().silent();
    Plat::bare("STATUS").input(&conf).run().silent();
    Plat::bare("GC").input(&conf).run().silent();
    Plat::call("DEL", "c", &conf).run().silent();
}

/// Results of every version, with the path of the pod's namespace.
fn results() -> Vec<(&'static str, String, Value)> {
    lab::enter();
    let conf = json!({"name": "n", "isDefaultGateway": true, "mtu": 1400,
        "ipam": {"ranges": [[{"subnet": "10.22.0.0/24"}], [{"subnet": "fd22::/64"}]]}});
    let one = |(number, version): (usize, &&'static str)| {
        let id = format!("c{number}");
        let result = add(&id, &with(conf.clone(), json!({"cniVersion": version})));
        assert_eq!(result["cniVersion"], *version);
        (*version, format!("/run/netns/{id}"), result)
    };
    VERSIONS.iter().enumerate().map(one).collect()
}

/// The same of the versions that list interfaces.
fn results_with_interfaces() -> Vec<(&'static str, String, Value)> {
    results().into_iter().filter(|(version, ..)| *version >= "0.3.0").collect()
}

#[test]
fn c28_addresses_have_the_shape_of_their_version() {
    for (version, _, result) in results() {
        if version < "0.3.0" {
            let keys: Vec<&String> = result.as_object().unwrap().keys().collect();
            assert_eq!(keys, ["cniVersion", "dns", "ip4", "ip6"], "{version}");
            assert_eq!(result["ip4"]["routes"][0]["gw"], "10.22.0.1");
            assert!(result["ip6"]["ip"].as_str().unwrap().ends_with("/64"), "{result}");
            continue;
        }
        let ips = result["ips"].as_array().unwrap();
        let said: Vec<Option<&str>> = ips.iter().map(|ip| ip["version"].as_str()).collect();
        let expected = if version < "1.0.0" { [Some("4"), Some("6")] } else { [None, None] };
        assert_eq!(said, expected, "{version}");
    }
}

#[test]
fn c29_mtu_of_interfaces_came_with_1_1_0() {
    for (version, _, result) in results_with_interfaces() {
        for interface in result["interfaces"].as_array().unwrap() {
            let mtu = if version == "1.1.0" { json!(1400) } else { json!(null) };
            assert_eq!(interface["mtu"], mtu, "{version}: {interface}");
            assert!(interface.get("socketPath").is_none() && interface.get("pciID").is_none(), "{interface}");
        }
    }
}

#[test]
fn c30_every_index_is_that_of_the_pods_interface() {
    for (version, _, result) in results_with_interfaces() {
        let interfaces = result["interfaces"].as_array().unwrap();
        let index = interfaces.iter().position(|i| i["name"] == "eth0").unwrap();
        for ip in result["ips"].as_array().unwrap() {
            assert_eq!(ip["interface"], index, "{version}: {result}");
        }
    }
}

#[test]
fn c30_an_index_of_another_plugin_that_is_out_of_range_is_not_passed_on() {
    lab::enter();
    netns("c");
    for index in [-1, 1, 7] {
        // Of another version than ours, so that it is read and written anew, and of ours.
        for version in ["1.0.0", "1.1.0"] {
            let previous = json!({"cniVersion": version, "interfaces": [{"name": "eth0", "sandbox": "/run/netns/c"}],
                "ips": [{"address": "10.1.0.2/24", "interface": index}, {"address": "fd01::2/64", "interface": 0}]});
            let result = Plat::call("ADD", "c", &with(hand_conf(), json!({"prevResult": previous}))).result();
            assert_eq!(result["ips"][0].get("interface"), None, "{result}");
            assert_eq!(result["ips"][1]["interface"], 0);
        }
    }
}

#[test]
fn c31_sandbox_is_the_path_byte_for_byte_and_the_hosts_interfaces_have_none() {
    for (_, path, result) in results_with_interfaces() {
        let interfaces = result["interfaces"].as_array().unwrap();
        let sandboxes: Vec<Option<&str>> = interfaces.iter().map(|i| i["sandbox"].as_str()).collect();
        assert_eq!(sandboxes, [None, None, Some(path.as_str())], "{result}");
        assert_eq!((&interfaces[0]["name"], &interfaces[2]["name"]), (&json!("cni0"), &json!("eth0")));
    }
    // Not the shortest way to say it, but the way it was said.
    netns("odd");
    let odd = "/run/../run/netns//odd";
    let result = Plat::call("ADD", "odd", &hand_conf()).set("CNI_NETNS", odd).result();
    assert_eq!(result["interfaces"][2]["sandbox"], odd);
}

#[test]
fn c32_an_empty_dns_is_left_out_from_1_0_0_on() {
    for (version, _, result) in results() {
        let expected = if version < "1.0.0" { Some(&json!({})) } else { None };
        assert_eq!(result.get("dns"), expected, "{version}");
    }
}

#[test]
fn c33_nothing_but_the_result_is_on_standard_output_however_talkative_we_are_told_to_be() {
    lab::enter();
    netns("c");
    let talkative = "#!/bin/sh\necho to standard error >&2\ncat >/dev/null\n\
        echo '{\"cniVersion\":\"1.1.0\",\"ips\":[{\"address\":\"10.66.0.2/24\"}]}'\n";
    std::fs::create_dir("/run/bin").unwrap();
    std::fs::write("/run/bin/talkative", talkative).unwrap();
    sh("chmod +x /run/bin/talkative");
    let conf = with(hand_conf(), json!({"ipam": {"type": "talkative"}, "logLevel": "debug", "debug": true}));
    let call = |verb: &str| {
        Plat::call(verb, "c", &conf)
            .set("RUST_LOG", "trace")
            .set("RUST_BACKTRACE", "full")
            .set("CNI_LOG_LEVEL", "debug")
            .set("CNI_PATH", "/run/bin")
            .set("PATH", "/bin:/usr/bin")
    };
    let answer = call("ADD").run();
    assert_eq!(answer.json()["ips"][0]["address"], "10.66.0.2/24");
    assert_eq!(answer.stdout.lines().count(), 1);
    assert!(answer.stderr.contains("to standard error"), "{answer:?}");
    let answer = call("DEL").run();
    assert!(answer.success && answer.stdout.is_empty(), "{answer:?}");
}

#[test]
fn c34_nothing_holds_standard_output_once_the_call_is_over() {
    lab::enter();
    netns("c");
    let path = lab::tools().join("cni");
    let conf = with(
        hand_conf(),
        json!({"ipam": {"type": "host-local", "subnet": "10.22.0.0/24", "dataDir": "/run/hl"}}),
    );
    let mut child = Plat::call("ADD", "c", &conf).set("CNI_PATH", path.to_str().unwrap()).start();
    let mut stdout = child.stdout.take().unwrap();
    assert!(child.wait().unwrap().success());
    // With a child that kept the pipe open this would wait for ever.
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = sender.send(stdout.read_to_string(&mut text).map(|_| text));
    });
    let text =
        receiver.recv_timeout(std::time::Duration::from_secs(5)).expect("standard output ends").unwrap();
    assert!(text.contains("10.22.0."));
}

#[test]
fn options_that_are_not_implemented_are_refused_by_name_before_anything_is_done() {
    lab::enter();
    netns("c");
    for (key, value) in [
        ("vlan", json!(100)),
        ("vlanTrunk", json!([{"id": 1}])),
        ("preserveDefaultVlan", json!(true)),
        ("ipMasqBackend", json!("iptables")),
    ] {
        let error = Plat::call("ADD", "c", &with(cluster_conf(), json!({key: value}))).run().error(2);
        assert!(error.contains(key), "{error}");
    }
    assert!(!lab::exists("/run/plat"));
}
