//! Labels in one allocation each, and the selectors that ClusterCIDRs choose nodes with and RoutingPolicies
//! choose blocks with.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use schemars::{Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An object's labels, sorted by key, as `key NUL value NUL …`.
///
/// A node has about fifteen; in a `BTreeMap<String, String>` they would be most of what the operator keeps
/// of it. Serialised, they are a map.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Labels(Box<str>);

impl Labels {
    /// Packs labels. NUL cannot occur in a label; an entry that has one all the same is left out.
    pub fn pack(labels: Option<&BTreeMap<String, String>>) -> Labels {
        let mut text = String::new();
        for (key, value) in labels.into_iter().flatten() {
            if !key.contains('\0') && !value.contains('\0') {
                text.extend([key.as_str(), "\0", value.as_str(), "\0"]);
            }
        }
        Labels(text.into_boxed_str())
    }

    /// Keys and values, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut parts = self.0.split_terminator('\0');
        std::iter::from_fn(move || Some((parts.next()?, parts.next()?)))
    }

    /// The value of a label.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.iter().find(|(k, _)| *k == key).map(|(_, value)| value)
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl Serialize for Labels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Labels, D::Error> {
        Ok(Labels::pack(Some(&BTreeMap::deserialize(deserializer)?)))
    }
}

/// Something that has labels.
pub trait LabelSet {
    /// The value of a label.
    fn label(&self, key: &str) -> Option<&str>;
}

impl LabelSet for Labels {
    fn label(&self, key: &str) -> Option<&str> {
        self.get(key)
    }
}

impl LabelSet for BTreeMap<String, String> {
    fn label(&self, key: &str) -> Option<&str> {
        self.get(key).map(String::as_str)
    }
}

/// A label selector, checked once when it is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

/// A selector that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the selector has the operator '{0}'; use In, NotIn, Exists or DoesNotExist")]
pub struct UnknownOperator(pub String);

impl Selector {
    /// Reads a selector; an absent or empty one selects everything.
    pub fn read(selector: Option<&LabelSelector>) -> Result<Selector, UnknownOperator> {
        let mut requirements = Vec::new();
        let Some(selector) = selector else { return Ok(Selector(requirements)) };
        for (key, value) in selector.match_labels.iter().flatten() {
            requirements.push(Requirement { key: key.clone(), test: Test::In(vec![value.clone()]) });
        }
        for expression in selector.match_expressions.iter().flatten() {
            requirements.push(Requirement { key: expression.key.clone(), test: Test::read(expression)? });
        }
        Ok(Selector(requirements))
    }

    /// Whether labels meet every requirement. As everywhere in Kubernetes, `NotIn` also holds where the
    /// label is absent.
    pub fn matches<L: LabelSet + ?Sized>(&self, labels: &L) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels.label(&requirement.key);
            match &requirement.test {
                Test::In(values) => value.is_some_and(|v| values.iter().any(|x| x == v)),
                Test::NotIn(values) => value.is_none_or(|v| values.iter().all(|x| x != v)),
                Test::Exists => value.is_some(),
                Test::DoesNotExist => value.is_none(),
            }
        })
    }

    /// The label keys it names.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|requirement| requirement.key.as_str())
    }
}

impl Test {
    fn read(expression: &LabelSelectorRequirement) -> Result<Test, UnknownOperator> {
        let values = expression.values.clone().unwrap_or_default();
        match expression.operator.as_str() {
            "In" => Ok(Test::In(values)),
            "NotIn" => Ok(Test::NotIn(values)),
            "Exists" => Ok(Test::Exists),
            "DoesNotExist" => Ok(Test::DoesNotExist),
            other => Err(UnknownOperator(other.to_owned())),
        }
    }
}

/// A LabelSelector with the bounds that Kubernetes' own type leaves open.
pub(crate) fn schema(_: &mut SchemaGenerator) -> Schema {
    schemars::json_schema!({
        "type": "object",
        "nullable": true,
        "properties": {
            "matchLabels": {
                "type": "object", "maxProperties": 32,
                "description": "Labels that a node must have, with exactly these values.",
                "additionalProperties": {"type": "string", "maxLength": 63},
            },
            "matchExpressions": {
                "type": "array", "maxItems": 32,
                "description": "Requirements that the labels must all meet.",
                "items": {
                    "type": "object",
                    "required": ["key", "operator"],
                    "properties": {
                        "key": {"type": "string", "maxLength": 317, "description": "Label key."},
                        "operator": {"type": "string", "enum": ["In", "NotIn", "Exists", "DoesNotExist"], "description": "How the label is compared."},
                        "values": {"type": "array", "maxItems": 64, "items": {"type": "string", "maxLength": 63}, "description": "Values for In and NotIn."},
                    },
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        Labels::pack(Some(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()))
    }

    fn selector(json: serde_json::Value) -> Selector {
        Selector::read(Some(&serde_json::from_value(json).unwrap())).unwrap()
    }

    #[test]
    fn labels_come_back_sorted_and_empty_values_survive() {
        let packed = labels(&[("z", "1"), ("a", ""), ("m", "x")]);
        assert_eq!(packed.iter().collect::<Vec<_>>(), [("a", ""), ("m", "x"), ("z", "1")]);
        assert_eq!((packed.get("a"), packed.get("m"), packed.get("x")), (Some(""), Some("x"), None));
        assert_eq!(Labels::pack(None).iter().count(), 0);
    }

    #[test]
    fn each_operator_selects_as_in_kubernetes() {
        let edge = labels(&[("zone", "a"), ("edge", "")]);
        for (json, selected) in [
            (serde_json::json!({}), true),
            (serde_json::json!({"matchLabels": {"zone": "a"}}), true),
            (serde_json::json!({"matchLabels": {"zone": "b"}}), false),
            (
                serde_json::json!({"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b", "a"]}]}),
                true,
            ),
            (
                serde_json::json!({"matchExpressions": [{"key": "gone", "operator": "In", "values": ["a"]}]}),
                false,
            ),
            (
                serde_json::json!({"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["a"]}]}),
                false,
            ),
            (
                serde_json::json!({"matchExpressions": [{"key": "gone", "operator": "NotIn", "values": ["a"]}]}),
                true,
            ),
            (serde_json::json!({"matchExpressions": [{"key": "edge", "operator": "Exists"}]}), true),
            (serde_json::json!({"matchExpressions": [{"key": "edge", "operator": "DoesNotExist"}]}), false),
        ] {
            assert_eq!(selector(json.clone()).matches(&edge), selected, "{json}");
        }
        assert!(Selector::read(None).unwrap().matches(&edge));
    }

    #[test]
    fn an_unknown_operator_is_named() {
        let bad: LabelSelector = serde_json::from_value(
            serde_json::json!({"matchExpressions": [{"key": "a", "operator": "Like"}]}),
        )
        .unwrap();
        assert_eq!(Selector::read(Some(&bad)), Err(UnknownOperator("Like".to_owned())));
    }
}
