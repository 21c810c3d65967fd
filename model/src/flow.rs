//! `meshctl flows`: what it asks of agents, and the lines that they answer.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::{NodeName, ObjectKey};

/// Path at which an agent tells flows: `POST` a [`FlowQuery`], answered by one [`FlowLine`] a line for as long as is asked.
pub const FLOWS_PATH: &str = "/mesh/v1/flows";

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FlowQuery {
    /// Go on as new ones come.
    pub follow: bool,
    /// So many of those that are remembered, counted before the filter; all when absent.
    pub tail: Option<usize>,
    /// Which of them.
    pub filter: FlowFilter,
}

/// Which flows are wanted; what is not given is not looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FlowFilter {
    /// Pods of this namespace, on either side, or its services.
    pub namespace: Option<String>,
    /// A pod of this name, on either side.
    pub pod: Option<String>,
    /// Through a service of this name.
    pub service: Option<String>,
    /// One of these; any when empty.
    pub verdicts: Vec<FlowVerdict>,
    /// To this port, of the service or of the backend.
    pub port: Option<u16>,
    /// Of this protocol, in any case: `tcp`, `udp`, `icmp`.
    pub protocol: Option<String>,
}

/// What became of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FlowVerdict {
    /// A TCP connection is established.
    Opened,
    /// An established TCP connection has ended.
    Closed,
    /// A TCP connection was never established.
    Failed,
    /// The first datagram of a socket to a destination.
    Datagram,
    /// The service has no backend.
    Refused,
    /// A policy forbids the packet.
    Denied,
    /// The packet was dropped: by our programs or by the kernel.
    Dropped,
}

impl FlowVerdict {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Opened,
        Self::Closed,
        Self::Failed,
        Self::Datagram,
        Self::Refused,
        Self::Denied,
        Self::Dropped,
    ];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Closed => "closed",
            Self::Failed => "failed",
            Self::Datagram => "datagram",
            Self::Refused => "refused",
            Self::Denied => "denied",
            Self::Dropped => "dropped",
        }
    }
}

impl std::fmt::Display for FlowVerdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The text names no verdict.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no verdict {0:?}: opened, closed, failed, datagram, refused, denied or dropped")]
pub struct UnknownVerdict(String);

impl std::str::FromStr for FlowVerdict {
    type Err = UnknownVerdict;

    fn from_str(text: &str) -> Result<Self, UnknownVerdict> {
        let found = Self::ALL.into_iter().find(|verdict| verdict.name() == text);
        found.ok_or_else(|| UnknownVerdict(text.to_owned()))
    }
}

/// From whose side a flow was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FlowSide {
    /// By neither: a packet on its way.
    Forward,
    /// By the one that opened or sent it.
    Egress,
    /// By the one that received it.
    Ingress,
}

/// One end of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowParty {
    /// Its address.
    pub address: IpAddr,
    /// Its port, where there is one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub port: Option<u16>,
    /// The pod, where one is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pod: Option<ObjectKey>,
    /// The node that has the address, or the pod.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub node: Option<NodeName>,
    /// The identity that policies know it by, on the node that tells; nothing where no policy asks.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub identity: Option<u32>,
}

/// The service that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowService {
    /// What the application connected to.
    pub address: SocketAddr,
    /// Its name, where it is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub name: Option<ObjectKey>,
}

/// What an ended connection was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowStats {
    /// Bytes that the side which tells has sent, and the other acknowledged.
    pub sent_bytes: u64,
    /// Bytes that it has received.
    pub received_bytes: u64,
    /// From opening to end, microseconds.
    pub duration_us: u64,
    /// Smoothed round trip time, microseconds; 0 when it was never measured.
    pub rtt_us: u64,
    /// Segments that were sent again.
    pub retransmits: u32,
}

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Flow {
    /// When, microseconds since 1970.
    pub time_us: u64,
    /// The node that tells it.
    pub node: NodeName,
    /// What happened.
    pub verdict: FlowVerdict,
    /// From whose side.
    pub side: FlowSide,
    /// `tcp`, `udp`, `icmp`, a number, or `-` when the packet could not be read.
    pub protocol: String,
    /// Who opened the connection or sent the packet.
    pub source: FlowParty,
    /// To whom, after the choice of a backend.
    pub destination: FlowParty,
    /// What was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub service: Option<FlowService>,
    /// How it ended, or why it was refused, denied or dropped.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// Figures of an ended connection.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stats: Option<FlowStats>,
    /// Like packets that were counted and not told since the last one.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub unreported: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What a node could not tell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowLosses {
    /// The node.
    pub node: NodeName,
    /// Events that are lost since the programs were loaded: nobody read them fast enough.
    pub lost: u64,
    /// Packets that were only counted: more of a kind than are told in a second.
    pub limited: u64,
    /// What this kernel does not let the node tell at all.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub lacking: Vec<String>,
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FlowLine {
    /// An event.
    Flow(Box<Flow>),
    /// At the beginning, and every few seconds.
    Losses(FlowLosses),
}

impl FlowFilter {
    /// Whether all that is given applies.
    pub fn matches(&self, flow: &Flow) -> bool {
        let service = flow.service.as_ref();
        let named = |of: fn(&ObjectKey) -> &str, wanted: &str| {
            let pods = [&flow.source.pod, &flow.destination.pod];
            pods.into_iter().flatten().any(|key| of(key) == wanted)
        };
        let service_name = || service.and_then(|service| service.name.as_ref());
        let namespace = |wanted: &String| {
            named(|key| &key.namespace, wanted)
                || service_name().is_some_and(|key| key.namespace == *wanted)
        };
        let port = |wanted: &u16| {
            flow.destination.port == Some(*wanted)
                || service.is_some_and(|service| service.address.port() == *wanted)
        };
        self.namespace.as_ref().is_none_or(namespace)
            && self.pod.as_ref().is_none_or(|pod| named(|key| &key.name, pod))
            && self
                .service
                .as_ref()
                .is_none_or(|name| service_name().is_some_and(|key| key.name == *name))
            && (self.verdicts.is_empty() || self.verdicts.contains(&flow.verdict))
            && self.port.as_ref().is_none_or(port)
            && self.protocol.as_ref().is_none_or(|p| p.eq_ignore_ascii_case(&flow.protocol))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn party(address: &str, port: u16, pod: Option<(&str, &str)>) -> FlowParty {
        FlowParty {
            address: address.parse().unwrap(),
            port: Some(port),
            pod: pod.map(|(namespace, name)| ObjectKey::new(namespace, name)),
            node: None,
            identity: None,
        }
    }

    fn flow() -> Flow {
        Flow {
            time_us: 1,
            node: "a".parse().unwrap(),
            verdict: FlowVerdict::Opened,
            side: FlowSide::Egress,
            protocol: "tcp".to_owned(),
            source: party("10.244.1.5", 40000, Some(("shop", "client"))),
            destination: party("10.244.2.7", 8080, Some(("store", "web-1"))),
            service: Some(FlowService {
                address: "10.96.0.1:80".parse().unwrap(),
                name: Some(ObjectKey::new("store", "web")),
            }),
            reason: None,
            stats: None,
            unreported: 0,
        }
    }

    #[test]
    fn filters_apply_to_either_side_and_to_the_service() {
        let filter = |json: &str| serde_json::from_str::<FlowFilter>(json).unwrap();
        let yes = [
            "{}",
            r#"{"namespace": "shop"}"#,
            r#"{"namespace": "store", "pod": "web-1"}"#,
            r#"{"service": "web"}"#,
            r#"{"port": 80}"#,
            r#"{"port": 8080, "protocol": "TCP"}"#,
            r#"{"verdicts": ["closed", "opened"]}"#,
        ];
        for json in yes {
            assert!(filter(json).matches(&flow()), "{json}");
        }
        let no = [
            r#"{"namespace": "web"}"#,
            r#"{"pod": "web"}"#,
            r#"{"service": "web-1"}"#,
            r#"{"port": 40000}"#,
            r#"{"protocol": "udp"}"#,
            r#"{"verdicts": ["dropped"]}"#,
            r#"{"pod": "client", "port": 81}"#,
        ];
        for json in no {
            assert!(!filter(json).matches(&flow()), "{json}");
        }
        let strangers = Flow { service: None, ..flow() };
        assert!(!filter(r#"{"service": "web"}"#).matches(&strangers));
    }

    #[test]
    fn lines_survive_the_way_there_and_back() {
        let losses = FlowLosses {
            node: "a".parse().unwrap(),
            lost: 7,
            limited: 8,
            lacking: vec!["x".to_owned()],
        };
        for line in [FlowLine::Flow(Box::new(flow())), FlowLine::Losses(losses)] {
            let text = serde_json::to_string(&line).unwrap();
            assert!(!text.contains('\n'));
            assert_eq!(serde_json::from_str::<FlowLine>(&text).unwrap(), line);
        }
    }

    #[test]
    fn verdicts_are_known_by_their_names() {
        for verdict in FlowVerdict::ALL {
            assert_eq!(verdict.name().parse::<FlowVerdict>(), Ok(verdict));
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.name());
        }
        assert!("OPENED".parse::<FlowVerdict>().is_err());
    }
}
