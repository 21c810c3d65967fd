//! `meshctl trace`: what it asks of the agent where the way begins, and what that one tells.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::snapshot::Protocol;
use crate::{NodeName, ObjectKey};

/// Path at which an agent sends a probe from one of its pods: `POST` a [`TraceQuery`], answered by a [`TraceReport`].
pub const TRACE_PATH: &str = "/mesh/v1/trace";

/// Longest time that a probe waits, milliseconds.
pub const LONGEST_WAIT_MS: u16 = 5000;

/// From where to what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceQuery {
    /// The pod that the probe leaves.
    pub pod: ObjectKey,
    /// A name or an address, as the pod's application would have it.
    pub host: String,
    /// The port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// How long to wait for an answer.
    pub wait_ms: u16,
}

/// What came of the probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// TCP: connected. UDP: answered.
    Answered,
    /// Refused: by the other side, or by the service hook because nobody is behind the service.
    Refused,
    /// UDP: sent, and nothing came back; most servers do not answer to bytes that they do not know.
    Silent,
    /// TCP: nothing came back.
    TimedOut,
    /// The kernel or somebody on the way said that there is no way.
    Unreachable,
    /// The packet is larger than what the way carries.
    TooLarge,
    /// Something else, in the kernel's words.
    Other(String),
}

/// What the service table of the node says about the address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceFacts {
    /// The service.
    pub name: ObjectKey,
    /// Its ports of this protocol at this address.
    pub ports: Vec<u16>,
    /// Backends of the port; nothing when it has no such port.
    pub backends: Option<Vec<SocketAddr>>,
    /// Seconds for which a client keeps its backend.
    pub affinity_secs: Option<u32>,
}

/// What the node of the source knows, and what it saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceReport {
    /// The node.
    pub node: NodeName,
    /// When the probe left, microseconds since 1970.
    pub begun_us: u64,
    /// How long it took.
    pub took_us: u64,
    /// What the pod's interface lacks; empty when nothing.
    pub missing: Vec<String>,
    /// What the agent could not bring about.
    pub failures: Vec<String>,
    /// The addresses of the name, in the order of trying; nothing when it does not resolve.
    pub resolved: Option<Vec<IpAddr>>,
    /// The service behind the address; nothing when it is no service.
    pub service: Option<ServiceFacts>,
    /// The pod's end of the probe: by it the probe is known on every node. Nothing when there was no probe.
    pub source: Option<SocketAddr>,
    /// What the probe asked for.
    pub asked: Option<SocketAddr>,
    /// What came of it; nothing when there was no probe.
    pub outcome: Option<Outcome>,
}
