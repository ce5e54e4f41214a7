//! VERSION: which versions of the specification this plugin speaks. Pure.

use serde_json::json;

use crate::json::Json;
use crate::spec::SpecVersion;

/// The answer. It echoes the version on standard input if that is a supported one; with anything else
/// there, or nothing, it says the newest. It never fails.
pub fn version(input: &[u8]) -> String {
    let asked = Json::parse(input).ok().and_then(|json| {
        let text = json.get("cniVersion").text("cniVersion").ok()?;
        SpecVersion::ALL.into_iter().find(|version| version.text() == text)
    });
    json!({
        "cniVersion": asked.unwrap_or(SpecVersion::NEWEST).text(),
        "supportedVersions": SpecVersion::ALL.map(SpecVersion::text),
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_supported_version_is_echoed_and_anything_else_gets_the_newest() {
        for (input, said) in [
            (&br#"{"cniVersion":"0.4.0"}"#[..], "0.4.0"),
            (b"", "1.1.0"),
            (br#"{"cniVersion":"99.0.0"}"#, "1.1.0"),
            (br#"{"cniVersion":7}"#, "1.1.0"),
            (b"garbage", "1.1.0"),
        ] {
            let answer = version(input);
            assert!(answer.starts_with(&format!(r#"{{"cniVersion":"{said}","#)), "{answer}");
        }
        assert!(version(b"").contains(r#"["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]"#));
    }
}
