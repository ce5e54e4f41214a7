//! What the runtime is told when something fails: one JSON object with a code (CNI spec §"Error").

use serde_json::json;

/// Error codes. 1 to 99 are the specification's, from 100 on our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The configuration's version is not supported, or too old for the verb.
    Version = 1,
    /// A configuration key that this plugin refuses; the message names key and value.
    UnsupportedKey = 2,
    /// A missing or invalid environment variable.
    Environment = 4,
    /// Reading or writing failed.
    Io = 5,
    /// Standard input cannot be decoded.
    Decode = 6,
    /// The configuration contradicts itself or the specification.
    Config = 7,
    /// The network namespace cannot be used. Not in the specification; the reference plugins' number.
    Netns = 8,
    /// It may work later: the store is locked, the agent has not delivered a block yet.
    TryAgain = 11,
    /// STATUS: no ADD can be served.
    NotAvailable = 50,
    /// A fault of this program.
    Internal = 100,
    /// No address is free.
    Exhausted = 101,
    /// The requested address cannot be had.
    AddressUnavailable = 102,
    /// The interface, or a lease of this container and interface, exists already.
    Exists = 103,
    /// The kernel refused a change.
    Kernel = 104,
    /// CHECK found something that is not as ADD left it.
    CheckFailed = 105,
    /// A delegated IPAM plugin failed in a way that is not its own error.
    Delegate = 106,
    /// Several items could not be removed (GC).
    Incomplete = 107,
    /// Another pod has what this one asks for: a host port.
    Taken = 108,
}

/// An error as the runtime sees it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{msg}{}", if details.is_empty() { String::new() } else { format!(": {details}") })]
pub struct Error {
    /// Its number; a delegate's own is passed on.
    pub code: u32,
    /// What happened, in short.
    pub msg: String,
    /// What to know and what to do.
    pub details: String,
}

impl Error {
    /// An error without details.
    pub fn new(code: Code, msg: impl Into<String>) -> Error {
        Error { code: code as u32, msg: msg.into(), details: String::new() }
    }

    /// An error with another error, or anything that can be shown, as details.
    pub fn because(code: Code, msg: impl Into<String>, details: impl std::fmt::Display) -> Error {
        Error { details: details.to_string(), ..Error::new(code, msg) }
    }

    /// The error object; `version` is the one that the runtime speaks.
    pub fn to_json(&self, version: &str) -> String {
        let mut object = json!({"cniVersion": version, "code": self.code, "msg": self.msg});
        if let (false, Some(fields)) = (self.details.is_empty(), object.as_object_mut()) {
            fields.insert("details".to_owned(), json!(self.details));
        }
        object.to_string()
    }
}

impl From<crate::json::WrongType> for Error {
    fn from(error: crate::json::WrongType) -> Error {
        Error::because(Code::Decode, "cannot decode the configuration", error)
    }
}

impl From<crate::netlink::Error> for Error {
    fn from(error: crate::netlink::Error) -> Error {
        Error::because(Code::Kernel, "the kernel refused a change", error)
    }
}

impl From<crate::pods::Error> for Error {
    fn from(error: crate::pods::Error) -> Error {
        match error {
            crate::pods::Error::Netlink(error) => error.into(),
            crate::pods::Error::Taken { what, container_id, ifname } => {
                let holder = format!("{ifname} of container {container_id} has it");
                Error::because(Code::Taken, format!("{what} is taken"), holder)
            }
        }
    }
}

impl From<crate::sysctl::Error> for Error {
    fn from(error: crate::sysctl::Error) -> Error {
        Error::because(Code::Kernel, "the kernel refused a setting", error)
    }
}

impl From<crate::bridge::Error> for Error {
    fn from(error: crate::bridge::Error) -> Error {
        use crate::bridge::Error::*;
        match error {
            Netlink(error) => error.into(),
            Sysctl(error) => error.into(),
            NotABridge { .. } | Conflict { .. } => {
                Error::because(Code::Config, "cannot use the bridge", error)
            }
            Vanished(_) => Error::because(Code::TryAgain, "cannot use the bridge", error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_has_details_only_if_there_are_any() {
        assert_eq!(
            Error::new(Code::Environment, "no CNI_IFNAME").to_json("1.0.0"),
            r#"{"cniVersion":"1.0.0","code":4,"msg":"no CNI_IFNAME"}"#
        );
        assert_eq!(
            Error::because(Code::Io, "a", "b").to_json("0.4.0"),
            r#"{"cniVersion":"0.4.0","code":5,"details":"b","msg":"a"}"#
        );
    }
}
