//! The conflist that the agent installs and the CNI binary reads back, plugin by plugin.

use serde::{Deserialize, Serialize};

use crate::lease::Datapath;
use crate::names::{CNI_NETWORK, CNI_TYPE};

/// The conflist of `/etc/cni/net.d/05-plat.conflist` (CNI spec §1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Conflist {
    /// The version that old runtimes read (libcni before 1.2 ignores `cniVersions`).
    pub cni_version: String,
    /// All versions that every plugin of the list supports; newer runtimes take the highest they know.
    pub cni_versions: Vec<String>,
    /// Network name, always [`CNI_NETWORK`].
    pub name: String,
    /// No other files are added to the chain (libcni 1.3 and later).
    pub load_only_inlined_plugins: bool,
    /// Our plugin first, then the chained ones.
    pub plugins: Vec<serde_json::Value>,
}

/// What the agent writes for our own plugin. The CNI binary reads many more keys (docs/cni.md); these are
/// the ones that the chart's values reach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlatPlugin {
    /// How pods are joined to the host.
    pub datapath: Datapath,
    /// Bridge that pods hang on, where there is one.
    pub bridge: String,
    /// Folder of `blocks.json` and `leases`, as the node (not the agent's container) sees it.
    pub run_dir: String,
    /// Pods send only from their own addresses.
    pub anti_spoofing: bool,
    /// Capabilities of the runtime that our plugin has itself (CNI conventions), such as `bandwidth`.
    pub capabilities: Vec<String>,
}

impl Conflist {
    /// The conflist of a node; `chained` are whole plugin objects to put behind ours. `spec_1_1` says
    /// whether every chained plugin supports spec 1.1.0.
    pub fn new(plugin: &PlatPlugin, chained: Vec<serde_json::Value>, spec_1_1: bool) -> Conflist {
        let capabilities: serde_json::Map<String, serde_json::Value> =
            plugin.capabilities.iter().map(|name| (name.clone(), true.into())).collect();
        let mut ours = serde_json::json!({
            "type": CNI_TYPE,
            "datapath": plugin.datapath,
            "runDir": plugin.run_dir,
            "antiSpoofing": plugin.anti_spoofing,
            "capabilities": capabilities,
            "ipam": {"type": CNI_TYPE},
        });
        if let (Datapath::Bridge, Some(keys)) = (plugin.datapath, ours.as_object_mut()) {
            keys.insert("bridge".to_owned(), plugin.bridge.clone().into());
            // With bridge-nf-call-iptables=1 a Service's translation happens inside the bridge, which then must
            // send a pod's packet back to the port it came from when the pod is its own backend.
            keys.insert("hairpinMode".to_owned(), true.into());
        }
        let mut cni_versions = vec!["1.0.0".to_owned()];
        if spec_1_1 {
            cni_versions.push("1.1.0".to_owned());
        }
        Conflist {
            cni_version: "1.0.0".to_owned(),
            cni_versions,
            name: CNI_NETWORK.to_owned(),
            load_only_inlined_plugins: true,
            plugins: std::iter::once(ours).chain(chained).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_1_is_offered_only_when_the_whole_chain_has_it() {
        let plugin = PlatPlugin {
            datapath: Datapath::Bridge,
            bridge: "cni0".into(),
            run_dir: "/run/plat".into(),
            anti_spoofing: true,
            capabilities: vec!["bandwidth".into()],
        };
        let portmap = serde_json::json!({"type": "portmap", "capabilities": {"portMappings": true}});
        let list = Conflist::new(&plugin, vec![portmap.clone()], false);
        assert_eq!(list.cni_versions, ["1.0.0"]);
        assert_eq!(list.plugins[0]["ipam"]["type"], "plat");
        assert_eq!(list.plugins[0]["hairpinMode"], true);
        assert_eq!(list.plugins[0]["antiSpoofing"], true);
        assert_eq!(list.plugins[0]["capabilities"], serde_json::json!({"bandwidth": true}));
        assert_eq!(list.plugins[1], portmap);
        assert_eq!(Conflist::new(&plugin, vec![], true).cni_versions, ["1.0.0", "1.1.0"]);
    }

    #[test]
    fn without_bridge_nothing_is_said_of_one() {
        let plugin = PlatPlugin { datapath: Datapath::Routed, ..PlatPlugin::default() };
        let list = Conflist::new(&plugin, vec![], true);
        assert_eq!(list.plugins[0]["datapath"], "routed");
        assert!(list.plugins[0].get("bridge").is_none() && list.plugins[0].get("hairpinMode").is_none());
    }
}
