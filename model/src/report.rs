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
}

/// What is known of the pre-shared key of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum KeyState {
    /// There is none: a later quantum computer could read what is recorded.
    None,
    /// There is a newer one that the other side may not have yet; until then the one before it serves.
    Pending,
    /// Both sides have used it.
    Agreed,
}

/// One entry of `GET /mesh/v1/peers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerReport {
    /// The other node; absent when the engine has a peer that no Node object stands for.
    pub node: Option<NodeName>,
    /// Its public key.
    pub public_key: WgKey,
    /// Where it was heard last, or where it is looked for.
    pub endpoint: Option<SocketAddr>,
    /// The addresses behind it.
    pub allowed_ips: Vec<IpNet>,
    /// Seconds since the last complete handshake; absent when there was none.
    pub handshake_age_secs: Option<u64>,
    /// Its pre-shared key.
    pub preshared_key: KeyState,
    /// Bytes received from it inside the tunnel.
    pub received_bytes: u64,
    /// Bytes sent to it inside the tunnel.
    pub sent_bytes: u64,
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
