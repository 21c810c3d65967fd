//! What a new node and the control service say to each other: the only private path of the API.
//!
//! `POST /mesh/v1/join`. The node has pinned the CA by the token's hash before it sends anything.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ClusterConfig, NodeName};

/// Path of the join call.
pub const JOIN_PATH: &str = "/mesh/v1/join";

/// A join token, written `mesh1.<ca hash>.<secret>`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the CA certificate (DER), as 64 lower-case hex digits.
    pub ca_sha256: String,
    /// The shared secret, 32 hex digits or more.
    pub secret: String,
}

/// The text is not a join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a join token: expected mesh1.<64 hex digits>.<secret>; print one with `meshctl token`"
)]
pub struct InvalidToken;

impl FromStr for JoinToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let hex = |s: &str| s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let mut parts = text.trim().split('.');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("mesh1"), Some(hash), Some(secret), None)
                if hash.len() == 64 && secret.len() >= 32 && hex(hash) && hex(secret) =>
            {
                Ok(Self { ca_sha256: hash.to_owned(), secret: secret.to_owned() })
            }
            _ => Err(InvalidToken),
        }
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mesh1.{}.{}", self.ca_sha256, self.secret)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mesh1.{}.***", self.ca_sha256)
    }
}

/// What a node sends.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JoinRequest {
    /// The token's secret part.
    pub secret: String,
    /// The name that the node wants.
    pub node: NodeName,
    /// A certificate signing request, PEM; its subject is ignored, its key is what counts.
    pub csr_pem: String,
    /// Addresses that the node's certificate shall be valid for.
    pub addresses: Vec<std::net::IpAddr>,
}

/// What the control service answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JoinResponse {
    /// Certificate of the node (client and server use), PEM.
    pub certificate_pem: String,
    /// The cluster's CA certificate, PEM.
    pub ca_pem: String,
    /// The cluster's address plan.
    pub cluster: ClusterConfig,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_round_trip_and_reject_what_is_not_one() {
        let text = format!("mesh1.{}.{}", "ab".repeat(32), "0f".repeat(16));
        let token: JoinToken = text.parse().unwrap();
        assert_eq!(token.to_string(), text);
        assert!(!format!("{token:?}").contains(&token.secret), "the secret stays out of logs");
        for bad in ["", "mesh1", "mesh1..", "mesh2.a.b", &format!("{text}.x"), &text[..90]] {
            assert_eq!(bad.parse::<JoinToken>(), Err(InvalidToken), "{bad}");
        }
    }
}
