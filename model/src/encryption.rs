//! `meshctl check encryption`: what it asks of agents, and what they answer.
//!
//! Canaries, random bytes that nothing else contains, are sent from node to node through the overlay, while every node
//! looks for them on its ways out. One more is sent beside the overlay on purpose: who does not find that one
//! cannot be believed when it finds nothing else.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::NodeName;
use crate::snapshot::Protocol;

/// Path at which an agent starts to look (`POST` a [`Watch`], answered by a [`Watching`]).
pub const WATCH_PATH: &str = "/mesh/v1/check/encryption/watch";
/// Path at which an agent sends (`POST` a [`Sending`], answered by a [`Sent`] when all of it was sent).
pub const SEND_PATH: &str = "/mesh/v1/check/encryption/send";
/// Path at which an agent stops to look (`POST` a [`Finish`], answered by [`Findings`]).
pub const FINISH_PATH: &str = "/mesh/v1/check/encryption/finish";

/// Longest time that a node looks or sends, in seconds.
pub const LONGEST_SECS: u16 = 120;
/// Most canaries that a node sends at the same time.
pub const MOST_CANARIES: usize = 4096;
/// Port that plain canaries are sent to: "discard" (RFC 863).
pub const PLAIN_PORT: u16 = 9;

/// What all canaries of one check have in common: 16 random bytes, in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mark(pub [u8; 16]);

/// The text is not 16 bytes in hexadecimal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a mark: expected 32 hexadecimal digits")]
pub struct InvalidMark;

impl TryFrom<String> for Mark {
    type Error = InvalidMark;

    fn try_from(text: String) -> Result<Self, InvalidMark> {
        let is_hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u128::from_str_radix(&text, 16).map_err(|_| InvalidMark)?;
        if is_hex { Ok(Self(number.to_be_bytes())) } else { Err(InvalidMark) }
    }
}

impl From<Mark> for String {
    fn from(mark: Mark) -> Self {
        mark.to_string()
    }
}

impl std::fmt::Display for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl std::fmt::Debug for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// Number of a canary within its check.
pub type Tag = u32;

/// Length of a canary: the mark, then its tag in network order, then nothing of meaning.
pub const CANARY_BYTES: usize = 32;

/// The bytes of a canary.
pub fn canary(mark: Mark, tag: Tag) -> [u8; CANARY_BYTES] {
    let mut bytes = *b"................-tag mesh canary";
    bytes[..16].copy_from_slice(&mark.0);
    bytes[16..20].copy_from_slice(&tag.to_be_bytes());
    bytes
}

/// The tag of the canary that `bytes` begin with.
pub fn tag(mark: Mark, bytes: &[u8]) -> Option<Tag> {
    let rest = bytes.strip_prefix(&mark.0)?;
    Some(Tag::from_be_bytes(*rest.first_chunk()?))
}

/// Start to look.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Watch {
    /// What to look for.
    pub mark: Mark,
    /// When to end at the latest, in seconds from now; at most [`LONGEST_SECS`].
    pub secs: u16,
}

/// A node looks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Watching {
    /// The node.
    pub node: NodeName,
    /// The links on which it looks.
    pub links: Vec<String>,
    /// The node's addresses on the underlay.
    pub addresses: Vec<IpAddr>,
    /// The node's pod blocks.
    pub blocks: Vec<IpNet>,
    /// The pod through which it sends and receives, `namespace/name`; none where no pod runs: then the node itself.
    pub pod: Option<String>,
    /// Where canaries may be sent to: sockets of the check in that pod.
    pub receivers: Vec<Receiver>,
}

/// A socket that takes canaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Receiver {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where.
    pub address: SocketAddr,
}

/// Where a canary starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Origin {
    /// In the network namespace of a pod.
    Pod,
    /// On the node, as its ingress proxy does.
    Node,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pod => "pod",
            Self::Node => "node",
        })
    }
}

/// A canary to send again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Canary {
    /// Its number.
    pub tag: Tag,
    /// Where it starts.
    pub origin: Origin,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// A receiver, or a service address that leads to one.
    pub to: SocketAddr,
}

/// A canary to send beside the overlay, to [`PLAIN_PORT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plain {
    /// Its number.
    pub tag: Tag,
    /// A node's address on the underlay.
    pub to: IpAddr,
}

/// What to send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sending {
    /// What they have in common.
    pub mark: Mark,
    /// For how long, in seconds.
    pub secs: u16,
    /// Through the overlay.
    pub canaries: Vec<Canary>,
    /// Beside it.
    pub plain: Vec<Plain>,
}

/// What was sent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sent {
    /// The last error of canaries that had one, by tag.
    pub failures: BTreeMap<Tag, String>,
}

/// Stop to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finish {
    /// What was looked for.
    pub mark: Mark,
}

/// What a node saw.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Findings {
    /// Tags of canaries that its receivers got.
    pub arrived: Vec<Tag>,
    /// Canaries seen on its ways out, the plain ones too.
    pub readable: Vec<Readable>,
    /// Packets from pod to pod that were seen there, whoever sent them.
    pub bare: Vec<Bare>,
    /// Packets between this node and others.
    pub traffic: Vec<Traffic>,
    /// Packets that passed unseen: too many came at once.
    pub lost_packets: u64,
    /// Links that went away while it looked, and other failures.
    pub failures: Vec<String>,
}

/// A canary that could be read.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Readable {
    /// Its number.
    pub tag: Tag,
    /// The link where.
    pub link: String,
    /// Whether this node sent the packet.
    pub outgoing: bool,
    /// From the packet's IP header; unspecified where it has none.
    pub from: IpAddr,
    /// From the packet's IP header.
    pub to: IpAddr,
}

/// Packets that carry addresses of pods where only tunnels should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bare {
    /// The link where.
    pub link: String,
    /// From the packet's IP header.
    pub from: IpAddr,
    /// From the packet's IP header.
    pub to: IpAddr,
    /// How many.
    pub packets: u64,
}

/// Packets between a node and another, by what they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// The other node.
    pub node: NodeName,
    /// WireGuard data messages.
    pub sealed: u64,
    /// Other WireGuard messages.
    pub handshakes: u64,
    /// Anything else, plain canaries included.
    pub others: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_text_and_canaries_carry_them() {
        let mark = Mark([0x0a; 16]);
        assert_eq!(Mark::try_from(mark.to_string()), Ok(mark));
        for wrong in
            ["", "0a", "+a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a", "zz0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a"]
        {
            assert_eq!(Mark::try_from(wrong.to_owned()), Err(InvalidMark), "{wrong}");
        }
        let bytes = canary(mark, 0x0102_0304);
        assert_eq!(tag(mark, &bytes), Some(0x0102_0304));
        assert_eq!(tag(mark, &bytes[..19]), None);
        assert_eq!(tag(Mark([1; 16]), &bytes), None);
    }
}
