//! What `docs/cni.md` shows is what happens.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod lab;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

fn document() -> String {
    fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cni.md")).unwrap()
}

#[test]
fn the_example_by_hand_can_be_copied_and_run() {
    lab::enter();
    let document = document();
    let example = document.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    fs::create_dir("/run/bin").unwrap();
    fs::create_dir("/run/work").unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_plat"), "/run/bin/plat").unwrap();
    let path = format!("/run/bin:{}", std::env::var("PATH").unwrap());
    let output = Command::new("sh")
        .args(["-ec", example])
        .env("PATH", path)
        .current_dir("/run/work")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for words in ["supportedVersions", "\"address\":\"10.22.0.2/24\"", "ADDRESS", "10.22.0.2  demo1"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    lab::assert_nothing_left();
}

#[test]
fn every_key_that_is_read_or_refused_is_documented() {
    let document = document();
    let sources = ["config.rs", "config/refused.rs", "config/ranges.rs", "config/ports.rs"];
    for source in sources {
        let text = fs::read_to_string(format!("{}/src/{source}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for call in [".get(\"", "seconds(\"", "flag(\"", "bound(\"", "number(\""] {
            for key in code.split(call).skip(1).filter_map(|rest| rest.split('"').next()) {
                // Keys inside `dns`, `runtimeConfig.dns` and `cniVersion`'s relatives are the specification's.
                let of_specification = ["servers", "searches", "cni"].contains(&key);
                assert!(of_specification || document.contains(key), "{source}: {key} is not in docs/cni.md");
            }
        }
    }
}

/// The numbers of the checks whose tests are in a folder, by their names (`c44_…`).
fn checks_tested(folder: &Path, found: &mut BTreeSet<u32>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            checks_tested(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = fs::read_to_string(path).unwrap();
            // A function that is no test would be unused, which the lints deny.
            found.extend(text.split("fn c").filter_map(|name| name.split('_').next()?.parse::<u32>().ok()));
        }
    }
}

#[test]
fn every_check_of_the_list_has_a_test_and_a_line_in_the_documentation() {
    let mut tested = BTreeSet::new();
    for folder in ["cni-bin/tests", "node-agent/tests", "e2e/tests"] {
        checks_tested(&Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder), &mut tested);
    }
    let document = document();
    let section = document.split("## Conformance").nth(1).unwrap();
    // Rows of the table start with the number of the check.
    let row = |line: &str| line.strip_prefix("| ")?.split(" |").next()?.parse::<u32>().ok();
    let listed: Vec<u32> = section.lines().filter_map(row).collect();
    let all: Vec<u32> = (1..=94).collect();
    assert_eq!(listed, all, "the table has each number once, in order");
    let without_test: Vec<u32> = all.into_iter().filter(|n| !tested.contains(n)).collect();
    assert_eq!(without_test, Vec::<u32>::new());
}
