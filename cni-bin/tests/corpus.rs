//! The fuzz targets' properties over every input that is kept in `fuzz/corpus`: what once was a crash, and
//! what is known to reach far. Without nightly and fuzzer; `e2e/fuzz.sh` makes up new inputs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

#[path = "../fuzz/src/lib.rs"]
mod targets;

use targets::{Check, TARGETS};

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// The inputs of a target that break its property.
fn broken(target: &str, check: Check) -> Vec<PathBuf> {
    let inputs = files(&fuzz().join("corpus").join(target));
    assert!(!inputs.is_empty(), "{target} has no corpus");
    let breaks = |file: &PathBuf| {
        let input = fs::read(file).unwrap();
        catch_unwind(|| check(&input)).is_err()
    };
    inputs.into_iter().filter(breaks).collect()
}

#[test]
fn every_input_of_the_corpus_keeps_its_targets_property() {
    let broken: Vec<PathBuf> =
        TARGETS.into_iter().flat_map(|(target, check)| broken(target, check)).collect();
    assert!(broken.is_empty(), "see the panics above: {broken:#?}");
}

#[test]
fn each_target_can_be_fuzzed_and_no_other_has_a_corpus() {
    let names: Vec<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    for folder in ["corpus", "fuzz_targets"] {
        let stem = |file: &PathBuf| file.file_stem().unwrap().to_str().unwrap().to_owned();
        assert_eq!(files(&fuzz().join(folder)).iter().map(stem).collect::<Vec<_>>(), names, "{folder}");
    }
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for name in names {
        assert!(
            manifest.contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"")),
            "{name}"
        );
    }
}
