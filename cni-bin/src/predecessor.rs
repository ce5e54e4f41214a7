//! DEL of a pod that another network attached before Plat took the node over.
//!
//! Runtimes that run DEL by the configuration of the day (containerd) send it to us. Only the plugins that attached the pod know
//! all that they left: chains of `ipMasq` and `portmap`, which would later befall another pod with the same address,
//! and the address in `host-local`'s files. libcni keeps, for each attachment, the configuration and result of its ADD
//! (`/var/lib/cni/results/<network>-<container>-<interface>`); by these their own DEL is run, last plugin first.
//!
//! That is help, no duty: a plugin that is no longer there, fails or does not end is named on standard error. Link, lease and `host-local`'s file
//! are taken away in any case.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use plat_crds::lease::Lease;
use plat_crds::names::CNI_TYPE;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::call::Call;
use crate::delegate;
use crate::host_local::HostLocal;

/// Set for the plugins that are run: should one of them come back to us for the same pod (a meta plugin does), that
/// call runs no others.
const MARK: &str = "PLAT_DEL_OF_PREDECESSOR";
/// How long each of them may take. Link and lease go after them: without an end the pod would never be deleted.
const PATIENCE: Duration = Duration::from_secs(10);
/// Larger records than this are not read.
const MAX_RECORD: u64 = 4 << 20;

/// What libcni keeps of an attachment (`libcni/api.go`, `cachedInfo`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    container_id: String,
    if_name: String,
    network_name: String,
    /// The network's configuration, in base64.
    config: String,
    #[serde(default)]
    capability_args: Option<Map<String, Value>>,
    #[serde(default)]
    result: Option<Value>,
}

/// One plugin's DEL.
#[derive(Debug, PartialEq)]
struct PluginDel {
    plugin: String,
    input: Value,
}

/// Lets the plugins that attached the pod of that lease take away what they left.
pub fn end(call: &Call, lease: &Lease) {
    if std::env::var_os(MARK).is_some() {
        return;
    }
    let results = call.network.state_of_others.join("results");
    for file in records(&results, &lease.container_id, &lease.ifname) {
        let Some(record) = read(&file, &lease.container_id, &lease.ifname) else { continue };
        let Some(dels) = dels(&record) else { continue };
        let mut whole = true;
        for PluginDel { plugin, input } in dels {
            let done = delegate::find(&plugin, &call.plugin_path)
                .ok_or_else(|| "it is in none of the folders of CNI_PATH".to_owned())
                .and_then(|file| {
                    let input = input.to_string();
                    delegate::run_marked(&file, input.as_bytes(), MARK, PATIENCE)
                        .map_err(|error| error.to_string())
                });
            if let Err(why) = done {
                whole = false;
                eprintln!(
                    "plat: {} of {} was attached by network {}, whose plugin {plugin} did not take away what it left: {why}",
                    lease.ifname, lease.container_id, record.network_name
                );
            }
        }
        if whole {
            // As libcni does after that network's DEL.
            let _ = fs::remove_file(&file);
        }
    }
    let files = HostLocal::at(&call.network.state_of_others);
    for leased in &lease.addresses {
        files.release(&leased.address, &lease.container_id);
    }
}

/// The records that can be of that attachment: a network's name may hold `-` itself.
fn records(results: &Path, container_id: &str, ifname: &str) -> Vec<PathBuf> {
    let end = format!("-{container_id}-{ifname}");
    let entries = fs::read_dir(results).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.ends_with(&end)));
    named.map(|entry| entry.path()).collect()
}

fn read(file: &Path, container_id: &str, ifname: &str) -> Option<Record> {
    fs::symlink_metadata(file).ok().filter(|meta| meta.is_file() && meta.len() <= MAX_RECORD)?;
    let record: Record = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    (record.container_id == container_id && record.if_name == ifname).then_some(record)
}

/// The DELs by which an attachment is undone, last plugin first; `None` if its configuration cannot be read, or has
/// a plugin of ours in it. Pure.
fn dels(record: &Record) -> Option<Vec<PluginDel>> {
    let config: Value = serde_json::from_slice(&from_base64(&record.config)?).ok()?;
    let plugins = match config.get("plugins") {
        Some(plugins) => plugins.as_array()?.clone(),
        None => vec![config.clone()],
    };
    let mut dels = Vec::new();
    for plugin in plugins.iter().rev() {
        let type_ = plugin.get("type")?.as_str()?;
        // A name with a slash would leave the folders of CNI_PATH.
        if type_ == CNI_TYPE || type_.contains('/') {
            return None;
        }
        let mut input = plugin.as_object()?.clone();
        input.insert("name".to_owned(), record.network_name.clone().into());
        if let Some(version) = config.get("cniVersion") {
            input.insert("cniVersion".to_owned(), version.clone());
        }
        let offered = plugin.get("capabilities").and_then(Value::as_object);
        let wanted =
            |name: &String| offered.is_some_and(|o| o.get(name).is_some_and(|v| v == &Value::Bool(true)));
        let runtime: Map<String, Value> = record
            .capability_args
            .iter()
            .flatten()
            .filter(|(n, _)| wanted(n))
            .map(|(n, v)| (n.clone(), v.clone()))
            .collect();
        if !runtime.is_empty() {
            input.insert("runtimeConfig".to_owned(), runtime.into());
        }
        if let Some(result) = &record.result {
            input.insert("prevResult".to_owned(), result.clone());
        }
        dels.push(PluginDel { plugin: type_.to_owned(), input: input.into() });
    }
    Some(dels)
}

/// RFC 4648, section 4, as Go writes bytes into JSON. Pure.
fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| {
        Some(u32::from(match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        }))
    };
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0u32);
    for byte in text.trim_end_matches('=').bytes() {
        bits = (bits << 6) | digit(byte)?;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count).to_le_bytes()[0]);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(config: &str) -> Record {
        Record {
            container_id: "c1".into(),
            if_name: "eth0".into(),
            network_name: "cbr0".into(),
            config: config.into(),
            capability_args: json!({"portMappings": [{"hostPort": 80}], "bandwidth": {}})
                .as_object()
                .cloned(),
            result: Some(json!({"ips": []})),
        }
    }

    #[test]
    fn the_plugins_of_an_attachment_are_undone_last_first_with_what_they_were_given() {
        // {"cniVersion":"1.0.0","name":"cbr0","plugins":[{"type":"bridge"},{"type":"portmap","capabilities":{"portMappings":true}}]}
        let config = "eyJjbmlWZXJzaW9uIjoiMS4wLjAiLCJuYW1lIjoiY2JyMCIsInBsdWdpbnMiOlt7InR5cGUiOiJicmlkZ2UifSx7InR5cGUiOiJwb3J0bWFwIiwiY2FwYWJpbGl0aWVzIjp7InBvcnRNYXBwaW5ncyI6dHJ1ZX19XX0=";
        let common = json!({"name": "cbr0", "cniVersion": "1.0.0", "prevResult": {"ips": []}});
        let with = |more: Value| {
            let mut input = common.as_object().unwrap().clone();
            input.extend(more.as_object().unwrap().clone());
            Value::from(input)
        };
        let portmap = with(json!({"type": "portmap", "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": [{"hostPort": 80}]}}));
        assert_eq!(
            dels(&record(config)).unwrap(),
            [
                PluginDel { plugin: "portmap".into(), input: portmap },
                PluginDel { plugin: "bridge".into(), input: with(json!({"type": "bridge"})) },
            ]
        );
    }

    #[test]
    fn what_is_ours_or_cannot_be_read_runs_nothing() {
        // {"type":"plat"}, {"type":"../x"}, {"plugins":7}, text that is no JSON, text that is no base64
        for config in
            ["eyJ0eXBlIjoicGxhdCJ9", "eyJ0eXBlIjoiLi4veCJ9", "eyJwbHVnaW5zIjo3fQ==", "aGFsbG8=", "~~~", ""]
        {
            assert_eq!(dels(&record(config)), None, "{config}");
        }
    }

    #[test]
    fn base64_is_read_whatever_its_length() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYg==", "foob")]
        {
            assert_eq!(from_base64(text).unwrap(), bytes.as_bytes());
        }
    }
}
