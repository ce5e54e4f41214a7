//! The versions of the CNI specification.

use std::fmt;

use crate::error::{Code, Error};

/// A version of the specification that this plugin speaks; later is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpecVersion {
    /// 0.1.0 (2016)
    V0_1_0,
    /// 0.2.0 (2017)
    V0_2_0,
    /// 0.3.0 (2017): interfaces, many addresses
    V0_3_0,
    /// 0.3.1 (2017)
    V0_3_1,
    /// 0.4.0 (2019): CHECK
    V0_4_0,
    /// 1.0.0 (2021)
    V1_0_0,
    /// 1.1.0 (2024): GC, STATUS
    V1_1_0,
}

impl SpecVersion {
    /// All, oldest first.
    pub const ALL: [SpecVersion; 7] = [
        SpecVersion::V0_1_0,
        SpecVersion::V0_2_0,
        SpecVersion::V0_3_0,
        SpecVersion::V0_3_1,
        SpecVersion::V0_4_0,
        SpecVersion::V1_0_0,
        SpecVersion::V1_1_0,
    ];
    /// The newest.
    pub const NEWEST: SpecVersion = SpecVersion::V1_1_0;

    /// Its text. Versions match exactly: "1.0" is none.
    pub fn text(self) -> &'static str {
        match self {
            SpecVersion::V0_1_0 => "0.1.0",
            SpecVersion::V0_2_0 => "0.2.0",
            SpecVersion::V0_3_0 => "0.3.0",
            SpecVersion::V0_3_1 => "0.3.1",
            SpecVersion::V0_4_0 => "0.4.0",
            SpecVersion::V1_0_0 => "1.0.0",
            SpecVersion::V1_1_0 => "1.1.0",
        }
    }

    /// Reads a version; an empty text is 0.1.0, which did not have the key yet.
    pub fn parse(text: &str) -> Result<SpecVersion, Error> {
        if text.is_empty() {
            return Ok(SpecVersion::V0_1_0);
        }
        let found = SpecVersion::ALL.into_iter().find(|v| v.text() == text);
        found.ok_or_else(|| {
            let details =
                format!("the configuration says {text:?}, the plugin supports {}", SpecVersion::list());
            Error::because(Code::Version, "incompatible CNI versions", details)
        })
    }

    /// All versions as one text.
    pub fn list() -> String {
        SpecVersion::ALL.map(SpecVersion::text).join(", ")
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}
