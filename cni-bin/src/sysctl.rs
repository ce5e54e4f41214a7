//! Network sysctls, as files below `/proc/sys/net`. They belong to the network namespace of the thread
//! that opens them.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A folder that is (a view of) `/proc/sys/net`.
#[derive(Clone, Debug)]
pub struct Sysctls {
    dir: PathBuf,
}

/// Why a sysctl could not be set.
#[derive(Debug, thiserror::Error)]
#[error("set sysctl net/{key} to {value}: {}", source.kind())]
pub struct Error {
    /// The sysctl, such as `ipv6/conf/eth0/accept_ra`.
    pub key: String,
    /// The value it was to have.
    pub value: String,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

impl Default for Sysctls {
    fn default() -> Sysctls {
        Sysctls::at(Path::new("/proc/sys/net"))
    }
}

impl Sysctls {
    /// Sysctls below that folder. An agent whose own `/proc/sys` is read-only mounts the host's elsewhere.
    pub fn at(dir: &Path) -> Sysctls {
        Sysctls { dir: dir.to_owned() }
    }

    /// The value of a sysctl; `None` if it does not exist.
    pub fn get(&self, key: &str) -> Option<String> {
        fs::read_to_string(self.dir.join(key)).ok().map(|text| text.trim().to_owned())
    }

    /// Writes a sysctl. One of IPv6 that is not there is left alone: the kernel has no IPv6, or the link is too
    /// narrow for it (an MTU below 1,280 bytes).
    pub fn set(&self, key: &str, value: &str) -> Result<(), Error> {
        // One write of the whole value, into the file that is there: nothing is created or cut.
        let write =
            || fs::OpenOptions::new().write(true).open(self.dir.join(key))?.write_all(value.as_bytes());
        write().or_else(|source| {
            let no_ipv6 = key.starts_with("ipv6/") && source.kind() == io::ErrorKind::NotFound;
            if no_ipv6 { Ok(()) } else { Err(Error { key: key.to_owned(), value: value.to_owned(), source }) }
        })
    }

    /// Writes a sysctl if it has another value; says whether it wrote.
    pub fn ensure(&self, key: &str, value: &str) -> Result<bool, Error> {
        match self.get(key) {
            Some(current) if current == value => Ok(false),
            None if key.starts_with("ipv6/") => Ok(false),
            _ => self.set(key, value).map(|()| true),
        }
    }
}
