//! One JSON line per request, one JSON line per answer.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// Longest line that either side accepts: a cluster of some thousand services fits many times.
pub(crate) const MAX_LINE_BYTES: u64 = 256 << 20;

/// A request on the control socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Request {
    /// Replace the configuration.
    Set(Box<RawValue>),
    /// Report the status.
    Get(()),
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Reply {
    /// It worked; the status for `get`, null for `set`.
    Ok(Box<RawValue>),
    /// It did not; nothing has changed.
    Error(String),
}
