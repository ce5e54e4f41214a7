//! Keys of the reference plugins that this one does not implement. Ignoring them would give a network that
//! looks right and lacks what was asked for, so they are refused by name (code 2), unless they are set to
//! what happens anyway.

use crate::error::{Code, Error};
use crate::json::Json;

/// Key, and why it is refused.
const KEYS: [(&str, &str); 3] = [
    ("vlan", "VLAN filtering is not implemented; use a bridge per network"),
    ("vlanTrunk", "VLAN filtering is not implemented; use a bridge per network"),
    ("preserveDefaultVlan", "VLAN filtering is not implemented"),
];

/// The same for the `routed` datapath. The other options of a bridge say what happens there anyway.
const ROUTED_KEYS: [(&str, &str); 4] = [
    ("bridge", "the datapath routed has no bridge"),
    ("forceAddress", "the datapath routed has no bridge whose address could be replaced"),
    (
        "portIsolation",
        "the datapath routed has no bridge ports to isolate; pods reach each other by the host's routes",
    ),
    ("promiscMode", "the datapath routed has no bridge that could take all frames"),
];

/// Refuses a configuration that sets one of them.
pub fn check(json: &Json) -> Result<(), Error> {
    refuse_set(json, &KEYS)?;
    match json.get("ipMasqBackend").text("ipMasqBackend")? {
        "" | "nftables" => Ok(()),
        other => {
            let msg = format!("unsupported key ipMasqBackend with value {other:?}");
            Err(Error::because(Code::UnsupportedKey, msg, "masquerading is done by nftables alone"))
        }
    }
}

/// Refuses a configuration of the `routed` datapath that asks for a bridge.
pub fn check_routed(json: &Json) -> Result<(), Error> {
    refuse_set(json, &ROUTED_KEYS)
}

fn refuse_set(json: &Json, keys: &[(&str, &str)]) -> Result<(), Error> {
    for (key, why) in keys {
        let value = json.get(key);
        let is_default = match value {
            Json::Null | Json::Bool(false) => true,
            Json::Number(number) => number.as_f64() == Some(0.0),
            Json::Text(text) => text.is_empty(),
            Json::List(list) => list.is_empty(),
            Json::Bool(true) | Json::Object(_) => false,
        };
        if !is_default {
            let msg = format!("unsupported key {key} with value {}", value.describe());
            return Err(Error::because(Code::UnsupportedKey, msg, *why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_is_not_implemented_is_refused_with_its_name_and_value() {
        for (text, value) in [
            (r#"{"vlan":100}"#, "100"),
            (r#"{"vlanTrunk":[{"id":3}]}"#, "a list"),
            (r#"{"PreserveDefaultVlan":true}"#, "true"),
            (r#"{"ipMasqBackend":"iptables"}"#, "\"iptables\""),
        ] {
            let error = check(&Json::parse(text.as_bytes()).unwrap()).unwrap_err();
            assert_eq!(error.code, 2);
            assert!(error.msg.contains(value), "{error}");
        }
    }

    #[test]
    fn what_happens_anyway_may_be_said() {
        let text = r#"{"vlan":0,"vlanTrunk":[],"preserveDefaultVlan":false,"ipMasqBackend":"nftables",
            "unknown":{"a":1}}"#;
        assert_eq!(check(&Json::parse(text.as_bytes()).unwrap()), Ok(()));
    }
}
