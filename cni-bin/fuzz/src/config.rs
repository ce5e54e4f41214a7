//! Standard input, as every verb reads it.

use std::collections::BTreeSet;

use plat_cni::add;
use plat_cni::config::ranges::{self, RangeSet};
use plat_cni::config::{Attachment, Network, parse_resolv_conf};
use plat_cni::error::Error;
use plat_cni::gc::valid_attachments;
use plat_cni::json::Json;
use plat_cni::pick::pick;
use plat_cni::request::Args;
use plat_cni::version::version;
use plat_crds::host_port::HostPort;
use plat_crds::lease::Lease;

use super::{lease, must_be_an_object, must_be_reportable};

/// Each verb reads it or says why not; a range leases what it says; spelling does not matter.
pub fn check(input: &[u8]) {
    must_be_an_object(&version(input));
    if let Ok(text) = std::str::from_utf8(input) {
        parse_resolv_conf(text);
    }
    let network = match Network::parse(input) {
        Ok(network) => network,
        Err(error) => return must_be_reportable(&error),
    };
    if let Some(passed_on) = reported(add::pass_through(&network)).flatten() {
        must_be_an_object(&passed_on);
    }
    let attachment = reported(Attachment::parse(&network, &Args::default()));
    attachment.iter().flat_map(|a| &a.ranges).for_each(must_lease_what_it_says);
    attachment.iter().for_each(|a| must_be_recorded(&a.host_ports));
    let ipam = network.json.get("ipam");
    reported(ranges::parse(ipam, &Json::Null, network.version));

    let meaning = meaning(input);
    let again = |json: &Json| serde_json::to_vec(json).unwrap();
    assert_eq!(meaning, self::meaning(&again(&network.json)), "written again");
    assert_eq!(meaning, self::meaning(&again(&shouted(&network.json))), "keys in capitals");
    assert_eq!(
        meaning.without_gc(),
        self::meaning(&again(&stripped(&network.json))).without_gc(),
        "no nulls"
    );
}

fn reported<T>(result: Result<T, Error>) -> Option<T> {
    result.inspect_err(must_be_reportable).ok()
}

/// All that is read of a configuration.
#[derive(Debug, PartialEq)]
struct Meaning {
    network: String,
    attachment: String,
    gc: String,
}

impl Meaning {
    /// For GC a list that is `null` is not the same as none.
    fn without_gc(&self) -> (&str, &str) {
        (&self.network, &self.attachment)
    }
}

fn meaning(input: &[u8]) -> Meaning {
    let network = Network::parse(input).unwrap();
    let valid = valid_attachments(&network.json).map(|valid| valid.map(BTreeSet::from_iter));
    let attachment = Attachment::parse(&network, &Args::default());
    let network = Network { json: Json::Null, ..network };
    Meaning {
        network: format!("{network:?}"),
        attachment: format!("{attachment:?}"),
        gc: format!("{valid:?}"),
    }
}

/// The same with keys in capitals, which mean the same in Go.
fn shouted(json: &Json) -> Json {
    mapped(json, &|key, value| Some((key.to_ascii_uppercase(), value)))
}

/// The same without keys whose value is `null`, which mean nothing in Go.
fn stripped(json: &Json) -> Json {
    mapped(json, &|key, value| (!value.is_null()).then(|| (key.to_owned(), value)))
}

/// What becomes of a key and its value.
type Field<'a> = &'a dyn Fn(&str, Json) -> Option<(String, Json)>;

fn mapped(json: &Json, field: Field<'_>) -> Json {
    match json {
        Json::List(list) => Json::List(list.iter().map(|value| mapped(value, field)).collect()),
        Json::Object(fields) => {
            Json::Object(fields.iter().filter_map(|(k, v)| field(k, mapped(v, field))).collect())
        }
        other => other.clone(),
    }
}

/// A lease that is written with these ports is read with them, if they fit.
fn must_be_recorded(host_ports: &[HostPort]) {
    let lease = Lease { host_ports: host_ports.to_vec(), ..lease::of("c", "eth0", &[]) };
    let Ok((_, record)) = lease.encode() else { return };
    assert_eq!(Lease::decode(&lease::entry_of(&record), &record), Some(lease));
}

fn must_lease_what_it_says(set: &RangeSet) {
    for range in &set.0 {
        assert!(range.first <= range.last, "{range:?}");
        for end in [range.first, range.last, range.gateway] {
            assert!(range.subnet.contains(&end), "{range:?}");
        }
        assert!(!range.leases(&range.gateway), "{range:?}");
    }
    let capacity: u64 = set.0.iter().fold(0, |sum, range| sum.saturating_add(range.capacity()));
    let picked = pick(set, None, |_| false);
    assert_eq!(picked.is_some(), capacity > 0, "{set:?}");
    if let Some((address, range)) = picked {
        assert!(range.leases(&address) && set.range_of(&address) == Some(range), "{set:?}");
    }
}
