//! Results of others: `prevResult`, and what delegated IPAM plugins print.

use plat_cni::delegate::plugin_error;
use plat_cni::json::Json;
use plat_cni::reply::Reply;
use plat_cni::spec::SpecVersion;

use super::{must_be_an_object, must_be_reportable};

/// A result is read or refused; what was read can be said in every version that has words for it, and reads
/// back as that version can say it.
pub fn check(input: &[u8]) {
    must_be_reportable(&plugin_error("x", "ADD", input, b""));
    let Ok(json) = Json::parse(input) else { return };
    for assumed in SpecVersion::ALL {
        match Reply::parse(&json, assumed) {
            Ok(reply) => must_come_back(&reply),
            Err(error) => must_be_reportable(&error),
        }
    }
}

/// Every version must be able to say it, but for the two oldest, which need an address.
pub fn must_come_back(reply: &Reply) {
    for ip in &reply.ips {
        assert!(ip.interface.is_none_or(|index| index < reply.interfaces.len()), "{reply:?}");
    }
    for version in SpecVersion::ALL {
        let text = match reply.render(version) {
            Ok(text) => text,
            Err(error) => {
                assert!(version < SpecVersion::V0_3_0 && reply.ips.is_empty(), "{version}: {error}");
                must_be_reportable(&error);
                continue;
            }
        };
        let json = must_be_an_object(&text);
        let read = Reply::parse(&json, SpecVersion::NEWEST).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_eq!(read.render(version), Ok(text), "{version}");
        if version == SpecVersion::NEWEST {
            assert_eq!(read, *reply);
        }
    }
}
