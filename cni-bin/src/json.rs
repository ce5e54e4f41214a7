//! JSON as Go reads it: keys match in any case, `null` is as good as absent, of a key that stands twice
//! the last one counts, unknown keys are ignored.
//!
//! Every other CNI plugin is written in Go, and runtimes rely on its leniency: containerd sends
//! `"HostPort"` where the specification says `hostPort`, and `null` for empty lists.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};

/// A JSON value that keeps the order of keys and the keys that stand twice.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// Any number.
    Number(serde_json::Number),
    /// A text.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// An object's keys and values, in order.
    Object(Vec<(String, Json)>),
}

/// A value of another type than the key needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("key {key} must be {wanted}, not {found}")]
pub struct WrongType {
    /// The key, with the keys it lies in.
    pub key: String,
    /// What it must be.
    pub wanted: &'static str,
    /// What it is.
    pub found: String,
}

static NULL: Json = Json::Null;

impl Json {
    /// Reads a text. Trailing text and nesting deeper than 128 levels are errors; bytes that are no UTF-8
    /// read as U+FFFD, as Go reads them.
    pub fn parse(text: &[u8]) -> Result<Json, serde_json::Error> {
        serde_json::from_str(&String::from_utf8_lossy(text))
    }

    /// The value of a key; `null` if it is absent or this is no object.
    pub fn get(&self, key: &str) -> &Json {
        let Json::Object(fields) = self else { return &NULL };
        let found = fields.iter().rev().find(|(k, v)| *v != Json::Null && same_key(k, key));
        found.map_or(&NULL, |(_, value)| value)
    }

    /// Whether the key stands there at all, even with `null`.
    pub fn has(&self, key: &str) -> bool {
        matches!(self, Json::Object(fields) if fields.iter().any(|(k, _)| same_key(k, key)))
    }

    /// Whether it is `null` or absent.
    pub fn is_null(&self) -> bool {
        *self == Json::Null
    }

    /// What kind of value it is, for messages; scalars are shown.
    pub fn describe(&self) -> String {
        match self {
            Json::Null => "null".to_owned(),
            Json::Bool(b) => b.to_string(),
            Json::Number(n) => n.to_string(),
            Json::Text(t) => format!("\"{}\"", t.chars().take(80).collect::<String>()),
            Json::List(_) => "a list".to_owned(),
            Json::Object(_) => "an object".to_owned(),
        }
    }

    fn wrong(&self, key: &str, wanted: &'static str) -> WrongType {
        WrongType { key: key.to_owned(), wanted, found: self.describe() }
    }

    /// A text; empty if `null`. `key` is for the error.
    pub fn text(&self, key: &str) -> Result<&str, WrongType> {
        match self {
            Json::Null => Ok(""),
            Json::Text(text) => Ok(text),
            other => Err(other.wrong(key, "a string")),
        }
    }

    /// A boolean; `false` if `null`.
    pub fn bool(&self, key: &str) -> Result<bool, WrongType> {
        match self {
            Json::Null => Ok(false),
            Json::Bool(value) => Ok(*value),
            other => Err(other.wrong(key, "true or false")),
        }
    }

    /// A whole number from 0 to 4,294,967,295; `None` if `null`. libcni turns numbers into floating point
    /// on their way, so `1500.0` and `1.5e3` are whole too.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, WrongType> {
        let number = match self {
            Json::Null => return Ok(None),
            Json::Number(number) => number.as_u64().or_else(|| {
                let float = number.as_f64()?;
                // The bound keeps the conversion exact.
                (float >= 0.0 && float <= f64::from(u32::MAX) && float.fract() == 0.0).then_some(float as u64)
            }),
            _ => None,
        };
        let number = number.and_then(|n| u32::try_from(n).ok());
        number.map(Some).ok_or_else(|| self.wrong(key, "a whole number from 0 to 4294967295"))
    }

    /// A whole number, also a negative one; `None` if `null`.
    pub fn i64(&self, key: &str) -> Result<Option<i64>, WrongType> {
        match self {
            Json::Null => Ok(None),
            Json::Number(number) if number.as_i64().is_some() => Ok(number.as_i64()),
            Json::Number(number) => {
                let float = number.as_f64().filter(|f| f.abs() < 1e15 && f.fract() == 0.0);
                float.map(|f| Some(f as i64)).ok_or_else(|| self.wrong(key, "a whole number"))
            }
            other => Err(other.wrong(key, "a whole number")),
        }
    }

    /// A list; empty if `null`.
    pub fn list(&self, key: &str) -> Result<&[Json], WrongType> {
        match self {
            Json::Null => Ok(&[]),
            Json::List(list) => Ok(list),
            other => Err(other.wrong(key, "a list")),
        }
    }

    /// A list of texts; empty if `null`.
    pub fn texts(&self, key: &str) -> Result<Vec<String>, WrongType> {
        self.list(key)?.iter().map(|text| text.text(key).map(str::to_owned)).collect()
    }

    /// An object, or `null` for none.
    pub fn object(&self, key: &str) -> Result<&Json, WrongType> {
        match self {
            Json::Null | Json::Object(_) => Ok(self),
            other => Err(other.wrong(key, "an object")),
        }
    }
}

/// Whether two keys are one to Go, which folds them by Unicode: beside the other case, two letters from
/// outside ASCII fold to letters of our keys, the long s and the Kelvin sign.
pub fn same_key(found: &str, key: &str) -> bool {
    let fold = |c: char| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    };
    found.eq_ignore_ascii_case(key)
        || (!found.is_ascii() && found.chars().map(fold).eq(key.chars().map(fold)))
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Json, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Json, E> {
        Ok(serde_json::Number::from_f64(value).map_or(Json::Null, Json::Number))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Json, E> {
        Ok(Json::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Json, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Json::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = map.next_entry()? {
            fields.push(field);
        }
        Ok(Json::Object(fields))
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Json::Null => serializer.serialize_unit(),
            Json::Bool(value) => serializer.serialize_bool(*value),
            Json::Number(value) => value.serialize(serializer),
            Json::Text(value) => serializer.serialize_str(value),
            Json::List(values) => values.serialize(serializer),
            Json::Object(fields) => {
                let mut map = serializer.serialize_map(Some(fields.len()))?;
                for (key, value) in fields {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Json {
        Json::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn keys_match_in_any_case_and_the_last_one_that_is_not_null_counts() {
        let json = parse(r#"{"mtu":1,"MTU":2,"Mtu":null,"x":null}"#);
        assert_eq!(json.get("mtu").u32("mtu"), Ok(Some(2)));
        assert_eq!(json.get("x"), &Json::Null);
        assert!(json.has("X") && !json.has("y"));
    }

    #[test]
    fn keys_fold_as_go_folds_them() {
        let json = parse("{\"ca\u{17f}e\":1,\"\u{212a}ey\":2,\"cäse\":3}");
        assert_eq!((json.get("case").u32("case"), json.get("key").u32("key")), (Ok(Some(1)), Ok(Some(2))));
        assert_eq!(json.get("cÄse"), &Json::Null, "only our keys matter, and they are ASCII");
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced_inside_strings_and_an_error_elsewhere() {
        let json = Json::parse(b"{\"a\":\"x\xffy\"}").unwrap();
        assert_eq!(json.get("a").text("a"), Ok("x\u{fffd}y"));
        assert!(Json::parse(b"{\"a\":\xff}").is_err());
    }

    #[test]
    fn null_is_the_zero_value_of_every_type() {
        let null = &Json::Null;
        assert_eq!(null.text("k"), Ok(""));
        assert_eq!(null.bool("k"), Ok(false));
        assert_eq!(null.u32("k"), Ok(None));
        assert_eq!(null.list("k"), Ok(&[][..]));
        assert!(null.object("k").is_ok());
    }

    #[test]
    fn a_wrong_type_is_named_with_its_key_and_value() {
        let json = parse(r#"{"mtu":"1500","bridge":7}"#);
        let error = json.get("mtu").u32("mtu").unwrap_err().to_string();
        assert_eq!(error, "key mtu must be a whole number from 0 to 4294967295, not \"1500\"");
        assert_eq!(json.get("bridge").text("bridge").unwrap_err().found, "7");
    }

    #[test]
    fn numbers_that_libcni_turned_into_floating_point_are_still_whole() {
        for text in ["1500", "1500.0", "1.5e3"] {
            assert_eq!(parse(text).u32("mtu"), Ok(Some(1500)), "{text}");
        }
        for text in ["-1", "1.5", "4294967296", "1e300"] {
            assert!(parse(text).u32("mtu").is_err(), "{text}");
        }
    }

    #[test]
    fn a_fraction_is_passed_on_to_its_last_digit() {
        // Read the quick way, this one is off by one in its last place.
        let json = parse("3.3333e62");
        assert_eq!(parse(&serde_json::to_string(&json).unwrap()), json);
        assert_eq!(serde_json::to_string(&json).unwrap(), "3.3333e+62");
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_the_end_of_the_stack() {
        assert!(Json::parse("[".repeat(100_000).as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Json::parse(&bytes);
        }

        #[test]
        fn values_come_back_as_they_went(key in "\\PC{0,8}", text in "\\PC{0,8}", number: i64, flag: bool) {
            let json = Json::Object(vec![
                (key, Json::List(vec![Json::Text(text), Json::Null, Json::Bool(flag)])),
                ("n".into(), Json::Number(number.into())),
            ]);
            let text = serde_json::to_vec(&json).unwrap();
            prop_assert_eq!(Json::parse(&text).unwrap(), json);
        }
    }
}
