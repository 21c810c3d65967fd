//! What one node has to do: the output of [`compile`](crate::compile()), the input of every reconciler and worker.
//!
//! A snapshot is plain data, ordered, and equal when nothing has to change. Its large parts, and what they list, are shared with
//! the snapshot before it: what is at the same address is equal, so that a difference costs what differs. The agent keeps the
//! last one on disk (mode 0600: it carries the Secrets that the node's pods and listeners need).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use crate::policy::PolicySet;
use crate::{ClusterConfig, NodeName, ObjectKey, shared};

/// The desired state of one node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// The cluster's address plan.
    pub cluster: ClusterConfig,
    /// The node itself.
    pub node: LocalNode,
    /// All other nodes with a key, an endpoint and a block, by name.
    #[serde(with = "shared::one")]
    pub peers: Arc<Vec<Peer>>,
    /// Service frontends and their backends, by address, protocol and port.
    #[serde(with = "shared::list")]
    pub frontends: Arc<Vec<Arc<Frontend>>>,
    /// Services as clients outside see them.
    #[serde(default, with = "shared::one")]
    pub edge: Arc<Edge>,
    /// Names that the node's DNS server answers.
    #[serde(with = "shared::one")]
    pub dns: Arc<DnsZone>,
    /// What the node's proxy serves.
    #[serde(with = "shared::one")]
    pub l7: Arc<L7Config>,
    /// Pods that this node runs, by key.
    #[serde(with = "shared::list")]
    pub pods: Arc<Vec<Arc<PodWork>>>,
    /// Addresses of all nodes on the underlay, ordered: a node port is reached by each of them.
    #[serde(default)]
    pub node_addresses: Vec<IpAddr>,
    /// The newest endpoint slice that it follows from (`resourceVersion`); 0 when there is none.
    #[serde(default)]
    pub revision: u64,
    /// Who may speak to them, and to whom they may.
    #[serde(default, with = "shared::one")]
    pub policy: Arc<PolicySet>,
}

/// The node that the snapshot is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LocalNode {
    /// Its name.
    pub name: NodeName,
    /// Its pod blocks; empty until the control service has assigned them.
    pub blocks: Vec<IpNet>,
    /// Its addresses on the underlay.
    pub addresses: Vec<IpAddr>,
    /// Its zone, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
}

/// A WireGuard public key. Written in base64, as wg(8) does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WgKey(pub [u8; 32]);

/// The text is not 32 bytes in base64.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a WireGuard key: expected 32 bytes in base64")]
pub struct InvalidKey;

impl TryFrom<String> for WgKey {
    type Error = InvalidKey;

    fn try_from(text: String) -> Result<Self, InvalidKey> {
        text.parse()
    }
}

impl std::str::FromStr for WgKey {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        use base64::Engine as _;
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(text).map_err(|_| InvalidKey)?;
        bytes.try_into().map(Self).map_err(|_| InvalidKey)
    }
}

impl From<WgKey> for String {
    fn from(key: WgKey) -> Self {
        key.to_string()
    }
}

impl std::fmt::Display for WgKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use base64::Engine as _;
        f.write_str(&base64::engine::general_purpose::STANDARD.encode(self.0))
    }
}

impl std::fmt::Debug for WgKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// Another node on the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// The node.
    pub node: NodeName,
    /// The public key that it had first: its name on the overlay.
    pub public_key: WgKey,
    /// The keys that it may call by, if not that one: the one in use, and the one that takes over. It is
    /// called by the last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<WgKey>,
    /// Where it may be reached, the preferred endpoint first. Only the start: the peer may roam.
    pub endpoints: Vec<SocketAddr>,
    /// The addresses that may come from it, and that are sent to it.
    pub allowed_ips: Vec<IpNet>,
}

/// Transport protocol of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP, IP protocol 6.
    Tcp,
    /// UDP, IP protocol 17.
    Udp,
    /// SCTP, IP protocol 132.
    Sctp,
}

impl Protocol {
    /// The number in the IP header (IANA protocol numbers).
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// As Kubernetes writes it. Absent means TCP.
    pub fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// How a frontend came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FrontendKind {
    /// A ClusterIP.
    ClusterIp,
    /// A node port: on an address of this node, or on those of all nodes where the address is unspecified.
    NodePort,
    /// A load balancer or external address.
    External,
}

/// An address and port that stands for a set of backends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// The address that clients use.
    pub vip: IpAddr,
    /// Its transport protocol.
    pub protocol: Protocol,
    /// The port that clients use.
    pub port: u16,
    /// Where the address comes from.
    pub kind: FrontendKind,
    /// The Service.
    pub service: ObjectKey,
    /// Name of the service port; empty when it has none.
    pub port_name: String,
    /// Session affinity by client address, in seconds; none when absent.
    pub affinity_secs: Option<u32>,
    /// Where new connections go, ordered; may be empty, and then connecting is refused.
    pub backends: Vec<Backend>,
    /// Where only established ones go on, ordered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leaving: Vec<Leaving>,
}

/// A place that serves what it has and gets nothing new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leaving {
    /// Where it is.
    pub address: SocketAddr,
    /// Whether its pod is being deleted: once it is gone, nobody answers there any more.
    pub terminating: bool,
}

/// One place that serves a frontend.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// The node it runs on, where known.
    pub node: Option<NodeName>,
    /// Its share of new connections, in percent of what one without a weight gets; at least 1.
    #[serde(default = "full_weight", skip_serializing_if = "is_full_weight")]
    pub weight: u16,
}

/// [`Backend::weight`] of one that was given none.
pub const FULL_WEIGHT: u16 = 100;

fn full_weight() -> u16 {
    FULL_WEIGHT
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the form that serde calls")]
fn is_full_weight(weight: &u16) -> bool {
    *weight == FULL_WEIGHT
}

/// Services as clients outside the cluster see them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Edge {
    /// Service ports by address, protocol and port.
    #[serde(with = "shared::list")]
    pub services: Arc<Vec<Arc<EdgeService>>>,
    /// Addresses that one node answers for on the local network, ordered.
    pub announced: Vec<Announced>,
    /// Ports on which the node tells load balancers whether it has backends, ordered.
    pub health_checks: Vec<HealthCheck>,
}

/// An address and port that clients outside use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EdgeService {
    /// The address.
    pub vip: IpAddr,
    /// Transport protocol: TCP or UDP.
    pub protocol: Protocol,
    /// The port.
    pub port: u16,
    /// Where the address comes from.
    pub kind: FrontendKind,
    /// The Service.
    pub service: ObjectKey,
    /// Whether a client address always gets the same backend.
    pub affinity: bool,
    /// Whether other nodes may have backends that this one is not to use.
    pub local_only: bool,
    /// Clients that are let in; all when absent.
    pub sources: Option<BTreeSet<IpNet>>,
    /// Where connections go, ordered.
    pub backends: Vec<Backend>,
}

/// An address that one node answers for on the local network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Announced {
    /// The address.
    pub address: IpAddr,
    /// The nodes that may; all when absent.
    pub nodes: Option<BTreeSet<NodeName>>,
}

/// A port on which the node tells whether it has backends (`healthCheckNodePort`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheck {
    /// The TCP port.
    pub port: u16,
    /// The Service.
    pub service: ObjectKey,
    /// Number of its backends on this node.
    pub local_endpoints: usize,
}

/// The names of the cluster domain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DnsZone {
    /// The cluster domain, without a final dot.
    pub domain: String,
    /// Services, by key.
    #[serde(with = "shared::each")]
    pub services: Vec<Arc<DnsService>>,
    /// Namespaces that exist: a name in one that does not is NXDOMAIN.
    pub namespaces: Vec<String>,
    /// Ranges whose addresses have a name `a-b-c-d.NAMESPACE.pod.DOMAIN`.
    pub pod_cidrs: Vec<IpNet>,
}

/// A Service as DNS sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DnsService {
    /// The Service.
    pub key: ObjectKey,
    /// What its name stands for.
    pub target: DnsTarget,
}

/// What a service name stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DnsTarget {
    /// Its ClusterIPs, and the ports of its SRV records.
    ClusterIp {
        /// One or two addresses.
        addresses: Vec<IpAddr>,
        /// The service ports.
        ports: Vec<DnsPort>,
    },
    /// Its endpoints, each with a name of its own.
    Headless {
        /// Endpoints that are ready, or all of them with `publishNotReadyAddresses`.
        endpoints: Vec<DnsEndpoint>,
    },
    /// An alias.
    ExternalName(String),
}

/// A port for SRV records.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DnsPort {
    /// Port name; empty for an unnamed port, which has no SRV record of its own.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port number.
    pub port: u16,
}

/// An endpoint of a headless service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DnsEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its host name below the service's name; one is made from the address when absent.
    pub hostname: Option<String>,
    /// The ports it serves.
    pub ports: Vec<DnsPort>,
}

/// What the node's L7 proxy serves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct L7Config {
    /// Routes, in no order of precedence: the proxy's match rules decide.
    pub routes: Vec<HttpRoute>,
    /// Certificates for TLS, chosen by server name.
    pub certificates: Vec<Certificate>,
}

/// One rule of an Ingress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpRoute {
    /// The Ingress.
    pub ingress: ObjectKey,
    /// Host to match: a name, `*.suffix` for exactly one more label, or any when absent.
    pub host: Option<String>,
    /// Path to match.
    pub path: PathMatch,
    /// The Service that it leads to.
    pub service: ObjectKey,
    /// The service port that it leads to.
    pub port: u16,
    /// Where requests go; empty means 503.
    pub backends: Vec<SocketAddr>,
}

/// How a request path is matched (Ingress v1, "Path types").
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PathMatch {
    /// The path and nothing else.
    Exact(String),
    /// The path element by element, then anything.
    Prefix(String),
}

/// A certificate with its key.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    /// The Secret.
    pub secret: ObjectKey,
    /// The names that the Ingress lists for it; empty means those in the certificate.
    pub hosts: Vec<String>,
    /// Certificate chain, PEM.
    pub chain_pem: String,
    /// Private key, PEM.
    pub key_pem: String,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate")
            .field("secret", &self.secret)
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}

/// A pod to run, with what its containers refer to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodWork {
    /// The pod; being deleted when it has a deletion timestamp.
    pub pod: Pod,
    /// Values of the ConfigMaps that it refers to, by name. A name that is absent here does not exist.
    pub config_maps: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Of those ConfigMaps, by name: the keys of `binaryData`, whose values are for files and no variables.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub binary_keys: BTreeMap<String, BTreeSet<String>>,
    /// Values of the Secrets that it refers to, by name. A name that is absent here does not exist.
    pub secrets: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Environment variables for the Services of the pod's namespace (`enableServiceLinks`).
    pub service_env: BTreeMap<String, String>,
    /// Of a pod that is being deleted: what others are told about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub departure: Option<Departure>,
}

// Nothing in a pod is a floating point number: it equals itself.
impl Eq for PodWork {}

/// What endpoint slices say about a pod that is being deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Departure {
    /// No Service means it.
    Unlisted,
    /// Some slice still sends to it, or will before it says otherwise.
    Listed,
    /// All slices that list it say that it leaves; this is the newest of them (`resourceVersion`).
    Told(u64),
}
