//! `/run/plat/map.json`: the objects that the node is programmed for, so that an agent that starts while
//! the API server is away programs the same.
//!
//! Written whole by rename. A file of a newer version, a damaged one or one that is missing is no cache:
//! the agent then waits for the API server and touches nothing.

use std::collections::BTreeMap;

use plat_crds::names::MAP_FILE;
use serde::{Deserialize, Serialize};

use crate::facts::{BlockFact, PolicyFact, RangeFact};
use crate::folder::{self, Folder};

const VERSION: u32 = 1;

/// The objects by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cache {
    version: u32,
    /// PodCIDRs.
    pub blocks: BTreeMap<String, BlockFact>,
    /// ClusterCIDRs.
    pub ranges: BTreeMap<String, RangeFact>,
    /// RoutingPolicies.
    #[serde(default)]
    pub policies: BTreeMap<String, PolicyFact>,
}

/// What a cache file turned out to be.
#[derive(Debug, PartialEq)]
pub enum Loaded {
    /// A cache.
    Cache(Cache),
    /// No file.
    Nothing,
    /// A file that cannot be used, and why.
    Unusable(String),
}

impl Cache {
    /// A cache of these objects.
    pub fn new(
        blocks: BTreeMap<String, BlockFact>,
        ranges: BTreeMap<String, RangeFact>,
        policies: BTreeMap<String, PolicyFact>,
    ) -> Cache {
        Cache { version: VERSION, blocks, ranges, policies }
    }

    /// Reads the cache of that folder.
    pub fn load(run: &Folder) -> Loaded {
        match run.get(MAP_FILE) {
            Ok(None) => Loaded::Nothing,
            Err(error) => Loaded::Unusable(error.to_string()),
            Ok(Some(text)) => Cache::parse(&text),
        }
    }

    fn parse(text: &[u8]) -> Loaded {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        match serde_json::from_slice::<Version>(text) {
            Ok(Version { version }) if version > VERSION => {
                return Loaded::Unusable(format!(
                    "{MAP_FILE} has version {version}, this agent reads {VERSION}"
                ));
            }
            _ => {}
        }
        match serde_json::from_slice(text) {
            Ok(cache) => Loaded::Cache(cache),
            Err(error) => Loaded::Unusable(format!("{MAP_FILE} is damaged: {error}")),
        }
    }

    /// Writes the cache into that folder; returns whether it was another one.
    pub fn save(&self, run: &Folder) -> Result<bool, folder::Error> {
        let text = serde_json::to_vec(self).unwrap_or_default();
        run.put(MAP_FILE, &text, 0o600)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::block;

    fn cache() -> Cache {
        let routing = serde_json::from_str(r#"{"mtu":1400}"#).unwrap();
        let block = BlockFact { generation: 3, created: 7, routing, ..block(1) };
        Cache::new([(block.name.clone(), block)].into(), BTreeMap::new(), BTreeMap::new())
    }

    #[test]
    fn a_cache_comes_back_as_it_was_saved() {
        let root = tempfile::tempdir().unwrap();
        let run = Folder::new(&root.path().join("run"));
        assert_eq!(Cache::load(&run), Loaded::Nothing);
        assert!(cache().save(&run).unwrap());
        assert!(!cache().save(&run).unwrap());
        assert_eq!(Cache::load(&run), Loaded::Cache(cache()));
    }

    #[test]
    fn damage_and_newer_versions_are_no_cache_and_never_a_panic() {
        let text = serde_json::to_vec(&cache()).unwrap();
        for cut in 0..text.len() {
            assert!(matches!(Cache::parse(&text[..cut]), Loaded::Unusable(_)), "cut at {cut}");
        }
        assert!(
            matches!(Cache::parse(br#"{"version":2}"#), Loaded::Unusable(why) if why.contains("version 2"))
        );
        let newer_fields = br#"{"version":1,"blocks":{},"ranges":{},"later":[]}"#;
        assert!(matches!(Cache::parse(newer_fields), Loaded::Cache(_)));
    }
}
