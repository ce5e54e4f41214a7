//! What `probe serve` answers and what `probe reach` prints.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The answer of `probe serve`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Host name of the server: of its pod or node.
    pub host: String,
    /// Address that the client had when it arrived.
    pub client: IpAddr,
}

/// One line of `probe reach`: an answer or an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// Who was asked.
    pub server: SocketAddr,
    /// The answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<Seen>,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
