//! Pre-shared keys: a secret for each pair of nodes, mixed into their handshakes (WG section 5.2).
//!
//! Who records packets today and has a quantum computer later finds out what the nodes' own keys agreed on, but not
//! these: they reach a node over a TLS channel that such a computer does not open.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::snapshot::WgKey;

/// Path at which a node asks for its keys (`GET`).
pub const PRESHARED_KEYS_PATH: &str = "/mesh/v1/preshared-keys";

/// A secret that two peers share. Written in base64; never printed.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PresharedKey(pub WgKey);

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

/// The keys that a node shares with others, as the control service hands them out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PresharedKeys {
    /// Grows with each rotation. Both nodes of a pair get the same key in the same epoch.
    pub epoch: u64,
    /// When the next epoch begins, in milliseconds from now.
    pub renew_after_ms: u64,
    /// By the other node's public key.
    pub keys: BTreeMap<WgKey, PresharedKey>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_travel_as_text_and_are_never_printed() {
        let keys = PresharedKeys {
            epoch: 7,
            renew_after_ms: 1000,
            keys: [(WgKey([1; 32]), PresharedKey(WgKey([7; 32])))].into(),
        };
        assert!(!format!("{keys:?}").contains("BwcH"), "{keys:?}");
        let text = serde_json::to_string(&keys).unwrap();
        assert!(text.contains("\"BwcHBw"), "{text}");
        assert_eq!(serde_json::from_str::<PresharedKeys>(&text).unwrap(), keys);
    }
}
