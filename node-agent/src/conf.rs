//! What the node's files say: the conflist for the container runtime, the blocks file for the CNI binary,
//! and which configuration the runtime will take. Pure; `files` writes them.

use std::collections::BTreeSet;

use k8s_openapi::jiff::Timestamp;
use plat_crds::blocks_file::{BLOCKS_FILE_VERSION, BlocksFile};
use plat_crds::cni_conf::{Conflist, PlatPlugin};
use plat_crds::lease::Datapath;
use plat_crds::names::CONFLIST_FILE;

use crate::outlet::Grant;

/// A capability of the container runtime (CNI conventions), and the reference plugin that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Name of the capability.
    pub capability: &'static str,
    /// CNI type of the reference plugin.
    pub plugin: &'static str,
}

/// Ports of the node that lead to pods.
pub const HOST_PORTS: Feature = Feature { capability: "portMappings", plugin: "portmap" };
/// Limits of what pods receive and send.
pub const BANDWIDTH: Feature = Feature { capability: "bandwidth", plugin: "bandwidth" };

/// Who provides a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Provider {
    /// Plat's own CNI binary.
    Plat,
    /// The reference plugin behind it, where the node has it.
    Chained,
}

/// What the node has of a plugin of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Installed {
    /// Nothing: pods do not get what it provides.
    Absent,
    /// It is there, but does not surely speak CNI spec 1.1.0.
    Spec10,
    /// It is there and says that it speaks CNI spec 1.1.0.
    Spec11,
}

/// The text of the conflist. `chain` are the plugins behind ours, and what the node has of them.
pub fn conflist(plugin: &PlatPlugin, chain: &[(Feature, Installed)]) -> String {
    let present = || chain.iter().filter(|(_, installed)| *installed != Installed::Absent);
    let object = |feature: &Feature| serde_json::json!({"type": feature.plugin, "capabilities": {feature.capability: true}});
    let chained = present().map(|(feature, _)| object(feature)).collect();
    let spec_1_1 = present().all(|(_, installed)| *installed == Installed::Spec11);
    let list = Conflist::new(plugin, chained, spec_1_1);
    // A struct of strings and JSON values always has a text.
    let mut text = serde_json::to_string_pretty(&list).unwrap_or_default();
    text.push('\n');
    text
}

/// How new pods are joined to the host by that conflist of ours.
pub fn datapath(text: &[u8]) -> Option<Datapath> {
    let list: Conflist = serde_json::from_slice(text).ok()?;
    serde_json::from_value(list.plugins.first()?.get("datapath")?.clone()).ok()
}

/// Whether a plugin's answer to `VERSION` names spec 1.1.0 (CNI spec, "VERSION").
pub fn speaks_1_1(answer: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Versions {
        supported_versions: Vec<String>,
    }
    serde_json::from_slice(answer).is_ok_and(|v: Versions| v.supported_versions.iter().any(|v| v == "1.1.0"))
}

/// The file that a container runtime takes: the first by name with one of the suffixes that libcni and
/// its callers look for.
pub fn active<'a>(files: impl IntoIterator<Item = &'a String>) -> Option<&'a String> {
    files.into_iter().filter(|name| is_conf(name)).min()
}

fn is_conf(name: &str) -> bool {
    [".conf", ".conflist", ".json"].iter().any(|suffix| name.ends_with(suffix))
}

/// The foreign files that the runtime would take if ours were not there, in their order.
pub fn others<'a>(files: impl IntoIterator<Item = &'a String>) -> impl Iterator<Item = &'a String> {
    let others: BTreeSet<&String> =
        files.into_iter().filter(|name| is_conf(name) && name.as_str() > CONFLIST_FILE).collect();
    others.into_iter()
}

/// The foreign file that goes before ours.
pub fn shadowing<'a>(files: impl IntoIterator<Item = &'a String>) -> Option<&'a String> {
    active(files).filter(|name| name.as_str() < CONFLIST_FILE)
}

/// Until when new addresses may be leased.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    /// Milliseconds of `CLOCK_BOOTTIME`; 0 is never.
    pub until_boot_ms: u64,
    /// The last contact with the API server, RFC 3339.
    pub last_contact: String,
}

impl Lease {
    /// `seconds` after a contact at `boot_ms`, which was `unix` seconds after the epoch.
    pub fn after(boot_ms: u64, unix: i64, seconds: u32) -> Lease {
        Lease {
            until_boot_ms: boot_ms.saturating_add(u64::from(seconds) * 1000),
            last_contact: Timestamp::from_second(unix).unwrap_or_default().to_string(),
        }
    }

    /// What an earlier life of this agent granted, if it was in this boot.
    pub fn of_file(text: &[u8], boot_id: &str) -> Option<Lease> {
        let file =
            BlocksFile::parse(text).ok().filter(|file| file.boot_id == boot_id && !boot_id.is_empty())?;
        Some(Lease { until_boot_ms: file.lease_until, last_contact: file.last_contact })
    }
}

/// The text of the blocks file.
pub fn blocks_file(node: &str, boot_id: &str, grant: &Grant<'_>) -> String {
    let file = BlocksFile {
        version: BLOCKS_FILE_VERSION,
        node: node.to_owned(),
        boot_id: boot_id.to_owned(),
        lease_until: grant.lease.until_boot_ms,
        last_contact: grant.lease.last_contact.clone(),
        mtu: grant.mtu,
        blocks: grant.own.values().cloned().collect(),
        may_grow: grant.may_grow.to_vec(),
    };
    let mut text = serde_json::to_string_pretty(&file).unwrap_or_default();
    text.push('\n');
    text
}

/// Until when a blocks file grants that says the same as `like` but for that: one by another agent of this node, as
/// there may be while an upgrade goes on. `None` if it says anything else.
pub fn lease_of_another(file: &[u8], like: &str) -> Option<u64> {
    let (there, like) = (BlocksFile::parse(file).ok()?, BlocksFile::parse(like.as_bytes()).ok()?);
    let until = there.lease_until;
    let same = BlocksFile { lease_until: like.lease_until, last_contact: like.last_contact.clone(), ..there }
        == like;
    same.then_some(until)
}

#[cfg(test)]
mod tests {
    use super::*;
    use plat_crds::block::{Block, Family};
    use plat_crds::blocks_file::HeldBlock;

    fn plugin() -> PlatPlugin {
        PlatPlugin {
            datapath: Datapath::Bridge,
            bridge: "cni0".into(),
            run_dir: "/run/plat".into(),
            anti_spoofing: true,
            capabilities: vec![HOST_PORTS.capability.into(), BANDWIDTH.capability.into()],
        }
    }

    #[test]
    fn another_agents_file_is_known_by_differing_in_the_lease_alone() {
        let file = |until: u64, mtu: u32| {
            format!(
                r#"{{"version":{BLOCKS_FILE_VERSION},"node":"n1","bootID":"b","leaseUntil":{until},"lastContact":"at {until}","mtu":{mtu},"blocks":[]}}"#
            )
        };
        assert_eq!(lease_of_another(file(7, 1500).as_bytes(), &file(5, 1500)), Some(7));
        assert_eq!(lease_of_another(file(7, 1400).as_bytes(), &file(5, 1500)), None);
        assert_eq!(lease_of_another(b"{}", &file(5, 1500)), None);
        assert_eq!(lease_of_another(b"", &file(5, 1500)), None);
    }

    #[test]
    fn the_conflist_chains_what_there_is_and_offers_what_all_speak() {
        let read = |portmap, bandwidth| {
            let text = conflist(&plugin(), &[(HOST_PORTS, portmap), (BANDWIDTH, bandwidth)]);
            let list: Conflist = serde_json::from_str(&text).unwrap();
            let types: Vec<String> =
                list.plugins.iter().map(|p| p["type"].as_str().unwrap().to_owned()).collect();
            (types.join(" "), list.cni_versions.join(" "))
        };
        use Installed::*;
        for (portmap, bandwidth, types, versions) in [
            (Absent, Absent, "plat", "1.0.0 1.1.0"),
            (Spec10, Absent, "plat portmap", "1.0.0"),
            (Spec11, Absent, "plat portmap", "1.0.0 1.1.0"),
            (Spec11, Spec10, "plat portmap bandwidth", "1.0.0"),
            (Absent, Spec11, "plat bandwidth", "1.0.0 1.1.0"),
        ] {
            assert_eq!(read(portmap, bandwidth), (types.to_owned(), versions.to_owned()));
        }
    }

    #[test]
    fn the_conflist_is_the_golden_one() {
        // As values: the order of keys depends on the features that serde_json is built with.
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        let golden = value(include_str!("../tests/golden/05-plat.conflist"));
        assert_eq!(value(&conflist(&plugin(), &[])), golden);
        assert_eq!(datapath(conflist(&plugin(), &[]).as_bytes()), Some(Datapath::Bridge));
    }

    #[test]
    fn any_doubt_about_a_plugin_means_the_older_spec() {
        assert!(speaks_1_1(br#"{"cniVersion":"1.1.0","supportedVersions":["0.4.0","1.0.0","1.1.0"]}"#));
        for doubt in [
            "",
            "{}",
            "Segmentation fault",
            r#"{"supportedVersions":["1.0.0"]}"#,
            r#"{"supportedVersions":"1.1.0"}"#,
        ] {
            assert!(!speaks_1_1(doubt.as_bytes()), "{doubt:?}");
        }
    }

    #[test]
    fn the_first_file_by_name_is_the_active_one() {
        let names = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect::<Vec<String>>();
        for (files, active_file, shadow) in [
            (vec!["05-plat.conflist", "10-flannel.conflist", "README"], Some("05-plat.conflist"), None),
            (vec!["00-multus.conf", "05-plat.conflist"], Some("00-multus.conf"), Some("00-multus.conf")),
            (vec!["00-multus.conf.bak", "05-plat.conflist"], Some("05-plat.conflist"), None),
            (vec!["10-other.json"], Some("10-other.json"), None),
            (vec![], None, None),
        ] {
            let files = names(&files);
            assert_eq!(active(&files).map(String::as_str), active_file);
            assert_eq!(shadowing(&files).map(String::as_str), shadow);
            assert_eq!(others(&files).count(), files.iter().filter(|name| name.starts_with("10-")).count());
        }
    }

    #[test]
    fn the_blocks_file_reads_back_and_carries_the_lease() {
        let block: Block = "10.244.1.0/24".parse().unwrap();
        let own = [(block, HeldBlock { cidr: block, lease: true })].into();
        let lease = Lease::after(5_000, 1_764_000_000, 840);
        let grant = Grant { own: &own, lease: &lease, mtu: Some(1450), may_grow: &[Family::IPv4] };
        let text = blocks_file("n1", "boot", &grant);
        let file = BlocksFile::parse(text.as_bytes()).unwrap();
        assert_eq!((file.lease_until, file.mtu, file.blocks.len()), (845_000, Some(1450), 1));
        assert_eq!(file.may_grow, [Family::IPv4]);
        assert_eq!(file.last_contact, "2025-11-24T16:00:00Z");
        assert_eq!(Lease::of_file(text.as_bytes(), "boot"), Some(lease));
        assert_eq!(Lease::of_file(text.as_bytes(), "another boot"), None);
        assert_eq!(Lease::of_file(b"{", "boot"), None);
    }
}
