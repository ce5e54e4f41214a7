//! `/run/plat/blocks.json`: what the agent lets the CNI binary lease from, and until when.
//!
//! The agent writes it whole (temporary file, then rename), so a reader sees the old one or the new one.
//! Unknown fields are ignored and new ones get defaults, so that agent and binary of neighbouring
//! versions work together; a higher [`BlocksFile::version`] means that a reader must not guess.

use serde::{Deserialize, Serialize};

use crate::block::{Block, Family};

/// The version that this program writes and the highest it reads.
pub const BLOCKS_FILE_VERSION: u32 = 1;

/// The blocks of one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BlocksFile {
    /// Format version, see [`BLOCKS_FILE_VERSION`].
    pub version: u32,
    /// The node, for messages.
    pub node: String,
    /// `/proc/sys/kernel/random/boot_id` at the time of writing; another boot's file grants nothing.
    #[serde(rename = "bootID")]
    pub boot_id: String,
    /// Until when new addresses may be leased, in milliseconds of `CLOCK_BOOTTIME` (so it is immune to
    /// clock changes and counts suspend): the agent's last contact with the API server plus the
    /// quarantine, less 60 s. Past it another node may hold these blocks.
    pub lease_until: u64,
    /// Last contact with the API server, RFC 3339, for messages only.
    pub last_contact: String,
    /// MTU of new pods, in bytes; absent means the kernel's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The blocks, in the order in which to lease from them.
    pub blocks: Vec<HeldBlock>,
    /// Families of which the node may soon get another block: an ADD that finds all blocks of such a family full
    /// waits a while for it. Absent: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub may_grow: Vec<Family>,
}

/// One block of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HeldBlock {
    /// The block. Its gateway is [`Block::gateway`].
    pub cidr: Block,
    /// `false` for a block that is being drained: its leases stay, new ones come from elsewhere.
    pub lease: bool,
}

impl BlocksFile {
    /// Reads the text of a blocks file.
    pub fn parse(text: &[u8]) -> Result<BlocksFile, ParseBlocksFileError> {
        let version: VersionOnly = serde_json::from_slice(text)?;
        if version.version > BLOCKS_FILE_VERSION {
            return Err(ParseBlocksFileError::Newer { found: version.version });
        }
        Ok(serde_json::from_slice(text)?)
    }
}

#[derive(Deserialize)]
struct VersionOnly {
    version: u32,
}

/// Why a blocks file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ParseBlocksFileError {
    /// Not JSON of the expected shape.
    #[error("blocks file is damaged: {0}")]
    Damaged(#[from] serde_json::Error),
    /// Written by a newer agent.
    #[error(
        "blocks file has version {found}, this program reads up to {BLOCKS_FILE_VERSION}; install the CNI binary of the running agent"
    )]
    Newer {
        /// The file's version.
        found: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{"version":1,"node":"n1","bootID":"b","leaseUntil":5000,
        "lastContact":"2026-11-24T05:00:00Z","blocks":[{"cidr":"10.244.1.0/24","lease":true}],"later":1}"#;

    #[test]
    fn a_file_of_this_version_is_read_and_fields_from_later_are_ignored() {
        let file = BlocksFile::parse(TEXT.as_bytes()).unwrap();
        assert_eq!(file.blocks, [HeldBlock { cidr: "10.244.1.0/24".parse().unwrap(), lease: true }]);
        assert_eq!((file.mtu, file.may_grow.as_slice()), (None, [].as_slice()));
        assert_eq!(BlocksFile::parse(&serde_json::to_vec(&file).unwrap()).unwrap(), file);
    }

    #[test]
    fn a_newer_version_is_refused_and_says_what_to_do() {
        let newer = TEXT.replace(r#""version":1"#, r#""version":2"#);
        assert!(
            BlocksFile::parse(newer.as_bytes()).unwrap_err().to_string().contains("install the CNI binary")
        );
    }

    #[test]
    fn damage_is_an_error_never_a_panic() {
        for cut in 0..TEXT.len() {
            assert!(BlocksFile::parse(&TEXT.as_bytes()[..cut]).is_err(), "cut at {cut}");
        }
        assert!(BlocksFile::parse(TEXT.replace("10.244.1.0/24", "10.244.1.7/24").as_bytes()).is_err());
    }
}
