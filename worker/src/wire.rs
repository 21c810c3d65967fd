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
    /// Send a [`Report`] now and after each change, until the client closes.
    Attach(()),
    /// Stop for good, and give what the successor needs to go on, as a descriptor beside the answer.
    Yield(()),
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Reply {
    /// It worked; the status for `get`, null for `set`, a report for `attach`.
    Ok(Box<RawValue>),
    /// It did not; nothing has changed.
    Error(String),
}

/// What a worker tells whoever is attached. The descriptors travel beside it, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Whether a configuration is in force.
    pub(crate) configured: bool,
    /// Names of its descriptors; absent when it ends and has let go of them.
    pub(crate) descriptors: Option<Vec<String>>,
    /// Whether it understands [`Request::Yield`].
    #[serde(default)]
    pub(crate) yields: bool,
}
