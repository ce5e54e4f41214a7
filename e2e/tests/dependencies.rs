//! What the programs link, held against `deny.toml`: licences, banned crates, sources, yanked versions. The
//! equal of `cargo deny check` without the network: facts come from `cargo metadata` and from the registry
//! index that cargo cached when it resolved `Cargo.lock`.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn policy() -> toml::Table {
    std::fs::read_to_string(root().join("deny.toml")).unwrap().parse().unwrap()
}

fn strings<'a>(value: &'a toml::Value, key: Option<&'a str>) -> Vec<&'a str> {
    let items = value.as_array().unwrap().iter();
    items.map(|v| key.map_or(v, |k| &v[k]).as_str().unwrap()).collect()
}

/// All packages of the graph that have a source, that is, all but our own.
fn foreign_packages() -> Vec<Value> {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).unwrap();
    let packages: Vec<_> = metadata["packages"].as_array().unwrap().clone();
    let foreign: Vec<_> = packages.into_iter().filter(|p| !p["source"].is_null()).collect();
    assert!(foreign.len() > 50, "cargo metadata lists only {} foreign packages", foreign.len());
    foreign
}

fn label(package: &Value) -> String {
    format!("{} {}", package["name"].as_str().unwrap(), package["version"].as_str().unwrap())
}

#[test]
fn every_licence_is_one_that_we_allow() {
    let policy = policy();
    let allowed = strings(&policy["licenses"]["allow"], None);
    let allowed: Vec<_> = allowed.iter().map(|a| spdx::Licensee::parse(a).unwrap()).collect();
    let refused: Vec<_> = foreign_packages()
        .iter()
        .filter(|p| {
            let text = p["license"].as_str().unwrap_or_default();
            let Ok(expression) = spdx::Expression::parse_mode(text, spdx::ParseMode::LAX) else {
                return true;
            };
            !expression.evaluate(|wanted| allowed.iter().any(|a| a.satisfies(wanted)))
        })
        .map(|p| format!("{}: {}", label(p), p["license"]))
        .collect();
    assert!(refused.is_empty(), "not in [licenses] allow of deny.toml: {refused:#?}");
}

#[test]
fn no_banned_crate_is_linked() {
    let policy = policy();
    let banned = strings(&policy["bans"]["deny"], Some("name"));
    let found: Vec<_> = foreign_packages()
        .iter()
        .filter(|p| banned.contains(&p["name"].as_str().unwrap()))
        .map(label)
        .collect();
    assert!(found.is_empty(), "banned by deny.toml: {found:?}");
}

#[test]
fn there_is_one_kubernetes_client_and_one_set_of_its_types() {
    let packages = foreign_packages();
    for name in ["kube", "k8s-openapi", "schemars", "rustls"] {
        let versions: Vec<_> = packages.iter().filter(|p| p["name"] == name).map(label).collect();
        assert_eq!(versions.len(), 1, "{versions:?}");
    }
}

#[test]
fn every_crate_comes_from_the_registry() {
    let elsewhere: Vec<_> = foreign_packages()
        .iter()
        .filter(|p| !p["source"].as_str().unwrap().starts_with("registry+"))
        .map(label)
        .collect();
    assert!(elsewhere.is_empty(), "not from the registry: {elsewhere:?}");
}

#[test]
fn no_locked_version_was_yanked() {
    let index = cached_index();
    let yanked: Vec<_> = foreign_packages().iter().filter(|p| is_yanked(&index, p)).map(label).collect();
    assert!(yanked.is_empty(), "yanked from the registry; run `cargo update`: {yanked:?}");
}

/// Cargo's cache of the sparse registry index.
fn cached_index() -> PathBuf {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).unwrap_or_else(|| {
        PathBuf::from(std::env::var_os("HOME").expect("neither CARGO_HOME nor HOME is set")).join(".cargo")
    });
    let indices = std::fs::read_dir(home.join("registry/index")).expect("cargo has no registry index yet");
    indices
        .map(|entry| entry.unwrap().path().join(".cache"))
        .find(|path| path.is_dir())
        .expect("cargo has not cached the registry index")
}

/// Looks the package up in its index file: a binary header, then `version NUL json NUL` per version.
fn is_yanked(index: &Path, package: &Value) -> bool {
    let name = package["name"].as_str().unwrap().to_lowercase();
    let folder = match name.len() {
        1 => "1".to_owned(),
        2 => "2".to_owned(),
        3 => format!("3/{}", &name[..1]),
        _ => format!("{}/{}", &name[..2], &name[2..4]),
    };
    let path = index.join(folder).join(&name);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let entry = bytes
        .split(|b| *b == 0)
        .filter(|field| field.first() == Some(&b'{'))
        .map(|field| serde_json::from_slice::<Value>(field).unwrap())
        .find(|entry| entry["vers"] == package["version"])
        .unwrap_or_else(|| panic!("{} is not in the cached index", label(package)));
    entry["yanked"].as_bool().unwrap()
}
