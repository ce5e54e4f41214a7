//! What must hold for any input, one module per fuzz target. Each has `check`, which panics where it does
//! not hold. Libfuzzer calls it with inputs that it makes up (`fuzz_targets`), and an ordinary test of
//! plat-cni with all that are kept in `corpus`.

use plat_cni::error::Error;
use plat_cni::json::Json;
use plat_cni::spec::SpecVersion;

pub mod blocks;
pub mod config;
pub mod lease;
pub mod netlink;
pub mod nft;
pub mod reply;
pub mod request;
pub mod store;

/// A target's `check`.
pub type Check = fn(&[u8]);

/// All targets, by the names of their folders in `corpus`.
pub const TARGETS: [(&str, Check); 8] = [
    ("blocks", blocks::check),
    ("config", config::check),
    ("lease", lease::check),
    ("netlink", netlink::check),
    ("nft", nft::check),
    ("reply", reply::check),
    ("request", request::check),
    ("store", store::check),
];

/// What goes to standard output must be one JSON object, in one line.
fn must_be_an_object(text: &str) -> Json {
    assert!(!text.contains('\n'), "more than one line: {text:?}");
    let json = Json::parse(text.as_bytes()).unwrap_or_else(|e| panic!("{e}: {text:?}"));
    assert!(matches!(json, Json::Object(_)), "not an object: {text:?}");
    json
}

/// What a runtime reads of an error must be what we meant.
fn must_be_reportable(error: &Error) {
    for version in SpecVersion::ALL {
        let json = must_be_an_object(&error.to_json(version.text()));
        assert_eq!(json.get("cniVersion").text(""), Ok(version.text()));
        assert_eq!(json.get("code").u32(""), Ok(Some(error.code)));
        assert_eq!(json.get("msg").text(""), Ok(error.msg.as_str()));
        assert_eq!(json.get("details").text(""), Ok(error.details.as_str()));
    }
    assert!(error.code != 0 && !error.msg.is_empty(), "{error:?}");
}
