//! What agents report to people: the JSON of the agent's `/mesh/v1/...` paths, printed by `meshctl`.

use std::net::SocketAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::NodeName;
use crate::snapshot::{Frontend, HttpRoute, WgKey};

/// `GET /mesh/v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeReport {
    /// The node.
    pub node: NodeName,
    /// Version of the agent.
    pub version: String,
    /// Whether the API has been reached since the agent started.
    pub synced: bool,
    /// The overlay engine: `kernel` or `user`.
    pub overlay: String,
    /// Failures of the last reconciliation, one line each; empty when all is as desired.
    pub failures: Vec<String>,
    /// Pods that run here.
    pub pods: usize,
    /// The node's keys on the overlay.
    #[serde(default)]
    pub keys: KeysReport,
}

/// `GET /mesh/v1/usage`: what the node and its pods use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UsageReport {
    /// When it was measured, RFC 3339.
    pub timestamp: String,
    /// The time that CPU use is the mean of.
    pub window_ms: u64,
    /// The whole node.
    pub node: Usage,
    /// Its pods.
    pub pods: Vec<PodUsage>,
}

/// CPU and memory in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// Billionths of a core.
    pub cpu_nano_cores: u64,
    /// Memory that cannot be taken back without harm.
    pub memory_bytes: u64,
}

/// What a pod's containers use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodUsage {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its running containers by name.
    pub containers: std::collections::BTreeMap<String, Usage>,
}

/// The WireGuard keys of a node; the answer to `POST /mesh/v1/rotate-key`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KeysReport {
    /// The one in use and, while it is being replaced, the one that takes over.
    pub public: Vec<WgKey>,
    /// Whether a replacement was asked for that has not ended.
    pub replacing: bool,
    /// The nodes that have not proved yet that they know the one that takes over.
    pub waiting_for: Vec<NodeName>,
}

/// What is known of the pre-shared key of a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KeyState {
    /// There is none: a later quantum computer could read what is recorded.
    #[default]
    None,
    /// There is a newer one that the other side may not have yet; until then the one before it serves.
    Pending,
    /// Both sides have used it.
    Agreed,
}

/// How packets get to another node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PathState {
    /// Straight, as far as is known.
    Direct,
    /// Straight, but echoes are missing and others are being asked.
    Suspect,
    /// Through another node, because the straight way does not work.
    Relayed,
    /// Not at all, although others reach it. A relay is being looked for.
    Unreachable,
    /// Not at all, and nobody else reaches it either.
    Down,
    /// Nothing is known yet.
    #[default]
    Unknown,
}

impl std::fmt::Display for PathState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Suspect => "suspect",
            Self::Relayed => "relayed",
            Self::Unreachable => "unreachable",
            Self::Down => "down",
            Self::Unknown => "unknown",
        })
    }
}

/// The path to another node, as echoes through the tunnel show it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PathReport {
    /// How packets get there.
    pub state: PathState,
    /// The node that relays.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub via: Option<NodeName>,
    /// Smoothed round trip of the echoes, in microseconds; absent before the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rtt_us: Option<u64>,
    /// Echoes of the last seconds that did not come, of a thousand.
    pub loss_permille: u16,
    /// Seconds since state or relay last changed.
    pub since_secs: u64,
    /// What the path carries inside the tunnel, in bytes; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Where this node appears to the other one, when that is no endpoint of its own: this node is behind NAT.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside: Option<SocketAddr>,
    /// Whether the other node appears here at an endpoint that is none of its own: it is behind NAT.
    #[serde(default)]
    pub translated: bool,
    /// Seconds between keepalives to the other node; absent when none are sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive_secs: Option<u16>,
}

/// One entry of `GET /mesh/v1/peers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerReport {
    /// The other node; absent when the engine has a peer that no Node object stands for.
    pub node: Option<NodeName>,
    /// The public key that it had first: its name on the overlay.
    pub public_key: WgKey,
    /// Its keys, where they are others: the one in use and, while it is being replaced, the one that takes over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<WgKey>,
    /// Whether it has proved to know the key that takes over from this node's own.
    #[serde(default)]
    pub knows_next_key: bool,
    /// Where it was heard last, or where it is looked for.
    pub endpoint: Option<SocketAddr>,
    /// The addresses behind it.
    pub allowed_ips: Vec<IpNet>,
    /// Seconds since the last complete handshake; absent when there was none.
    pub handshake_age_secs: Option<u64>,
    /// Its pre-shared key.
    #[serde(default)]
    pub preshared_key: KeyState,
    /// Bytes received from it inside the tunnel.
    pub received_bytes: u64,
    /// Bytes sent to it inside the tunnel.
    pub sent_bytes: u64,
    /// The path to it.
    #[serde(default)]
    pub path: PathReport,
}

/// `GET /mesh/v1/routes`: all that decides where a packet or request goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoutesReport {
    /// Ingress routes.
    pub ingress: Vec<HttpRoute>,
    /// Service addresses.
    pub services: Vec<Frontend>,
    /// Overlay routes.
    pub overlay: Vec<PeerReport>,
}

/// One step of `POST /mesh/v1/check`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckStep {
    /// The hop: `overlay`, `vip`, `dns`, `ingress`, `pod`, `programs`, ...
    pub hop: String,
    /// What was probed.
    pub target: String,
    /// Whether it worked.
    pub ok: bool,
    /// What was seen: a time when it worked, the error when it did not.
    pub detail: String,
    /// What to do about it; empty when it worked.
    pub cure: String,
}
