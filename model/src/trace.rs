//! `meshctl trace`: what it asks of the agent where the way begins, and what that one tells.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::snapshot::Protocol;
use crate::{NodeName, ObjectKey};

/// Path at which an agent sends a probe from one of its pods: `POST` a [`TraceQuery`], answered by a [`TraceReport`].
pub const TRACE_PATH: &str = "/mesh/v1/trace";

/// Path at which an agent is told of a probe before it is sent: `POST` a [`TraceMark`].
pub const MARK_PATH: &str = "/mesh/v1/trace/mark";

/// Path at which an agent tells what its node has decided about a probe: `POST` a [`TraceCollect`], answered by a [`NodeTrace`]. The
/// mark is taken away.
pub const COLLECT_PATH: &str = "/mesh/v1/trace/collect";

/// Path at which an agent lets a probe come in to its node as if a client outside had sent it: `POST` an [`OutsideQuery`], answered
/// by an [`OutsideReport`].
pub const OUTSIDE_PATH: &str = "/mesh/v1/trace/outside";

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
    /// The probe's own port; any when 0.
    #[serde(default)]
    pub source_port: u16,
    /// Bytes to send: after the connection is there, or in the datagram.
    #[serde(default)]
    pub bytes: u16,
}

/// A probe of a client outside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutsideQuery {
    /// The client. Answers go there.
    pub source: SocketAddr,
    /// What it uses, of the same family.
    pub destination: SocketAddr,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// How a probe from outside went on from the node where it came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Entered {
    /// To a pod of that node.
    ToPod,
    /// To another node.
    ToNode,
    /// To the node's own stack.
    ToStack,
    /// Not at all.
    Ended,
}

/// What the node where a probe came in knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutsideReport {
    /// The node.
    pub node: NodeName,
    /// The service that clients outside reach there; nothing when there is none.
    pub service: Option<ObjectKey>,
    /// Its backends, as this node would use them.
    pub backends: Vec<SocketAddr>,
    /// What became of the probe.
    pub entered: Entered,
}

/// A probe, by what no translation on its way changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceMark {
    /// Its own address and port: of each family, when it is not known which it will use.
    pub ends: Vec<SocketAddr>,
    /// TCP or UDP.
    pub protocol: Protocol,
}

/// What is asked after the probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceCollect {
    /// As it was marked.
    pub mark: TraceMark,
    /// The address where it went in the end. The node that has its pod looks at the pod's interface.
    pub target: Option<IpAddr>,
}

/// Where a node meets a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StepHook {
    /// The hook of `connect` and `sendmsg`.
    Socket,
    /// What leaves a pod.
    FromPod,
    /// What the node's stack gives to a pod.
    ToPod,
    /// What comes out of the overlay.
    FromOverlay,
    /// What comes in from outside.
    FromUplink,
    /// What the node's own processes answer to outside.
    ToUplink,
    /// The kernel itself.
    Kernel,
}

impl StepHook {
    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::FromPod => "from_pod",
            Self::ToPod => "to_pod",
            Self::FromOverlay => "from_overlay",
            Self::FromUplink => "from_uplink",
            Self::ToUplink => "to_uplink",
            Self::Kernel => "kernel",
        }
    }
}

/// One decision about a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TraceStep {
    /// When, microseconds since 1970 by the node's clock.
    pub time_us: u64,
    /// The node.
    pub node: NodeName,
    /// Where.
    pub hook: StepHook,
    /// Whether it goes away from the pod that sends the probe.
    pub forth: bool,
    /// Who sent the packet, as it was found; nothing for a socket.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub source: Option<SocketAddr>,
    /// To whom, as it was found.
    pub destination: SocketAddr,
    /// The backend that was chosen.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub chosen: Option<SocketAddr>,
    /// Bytes of the packet; 0 for a socket.
    pub bytes: u32,
    /// A stable word: `seen`, `straight`, `chosen`, `refused`, `policy_allowed`, a counter's reason, or `kernel: REASON`.
    pub decision: String,
    /// Whether the packet or the call ends here.
    pub dropped: bool,
    /// Why, for people.
    pub detail: String,
    /// Policy identities of source and destination; 0 for none.
    pub identities: [u32; 2],
}

/// What a node knows and has seen of a probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeTrace {
    /// The node.
    pub node: NodeName,
    /// Its decisions, in order.
    pub steps: Vec<TraceStep>,
    /// What the interface of the pod lacks that has the target's address; nothing when no such pod is here.
    pub target: Option<Vec<String>>,
    /// What the agent could not bring about.
    pub failures: Vec<String>,
    /// Worker processes that do not answer.
    pub silent_workers: Vec<String>,
    /// Sysctls of the node that forbid forwarding.
    pub sysctls: Vec<String>,
}

/// What the cluster's DNS server said to the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum NameAnswer {
    /// These addresses.
    Addresses(Vec<IpAddr>),
    /// There is no such name, or it has no address.
    NoAddress,
    /// Nothing.
    Silent,
    /// Something else, in words.
    Failed(String),
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
    /// What the DNS server answered; nothing when an address was given.
    #[serde(default)]
    pub name: Option<NameAnswer>,
    /// The service behind the address; nothing when it is no service.
    pub service: Option<ServiceFacts>,
    /// The pod's end of the probe: by it the probe is known on every node. Nothing when there was no probe.
    pub source: Option<SocketAddr>,
    /// The backend that was chosen for it.
    #[serde(default)]
    pub reached: Option<SocketAddr>,
    /// What the probe asked for.
    pub asked: Option<SocketAddr>,
    /// What came of it; nothing when there was no probe.
    pub outcome: Option<Outcome>,
}
