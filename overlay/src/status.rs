//! What the engine observes: for people, for the agent's decisions, for metrics.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use mesh_model::snapshot::WgKey;
use serde::{Deserialize, Serialize};

use crate::facade::Kind;

/// The overlay device of a node, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The engine.
    pub kind: Kind,
    /// Name of the device.
    pub device: String,
    /// The node's public key.
    pub public_key: WgKey,
    /// All its public keys, that one first: there is another while it is being replaced.
    #[serde(default)]
    pub own_keys: Vec<WgKey>,
    /// UDP port; 0 before the first configuration.
    pub listen_port: u16,
    /// MTU of the device; 0 before the first configuration.
    pub mtu: u16,
    /// All configured peers, ordered by key.
    pub peers: Vec<PeerStatus>,
    /// What crossed the device, inside the tunnel.
    pub traffic: Traffic,
    /// Packets that were dropped since the engine started, by reason. Reasons without drops are absent.
    pub drops: BTreeMap<DropReason, u64>,
}

/// Packets and bytes that went through the engine since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Traffic {
    /// Reads from the device; one read is up to 64 KiB of segments of one flow.
    pub device_reads: u64,
    /// Writes to the device; one write is up to 64 KiB of segments of one flow.
    pub device_writes: u64,
    /// Datagrams sent, handshakes included.
    pub datagrams_sent: u64,
    /// Datagrams received, whatever they were.
    pub datagrams_received: u64,
    /// System calls that sent them.
    pub send_calls: u64,
    /// System calls that received them.
    pub receive_calls: u64,
}

/// One peer, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// Its public key.
    pub public_key: WgKey,
    /// Where it was heard last, or where it is looked for now.
    pub endpoint: Option<SocketAddr>,
    /// The addresses behind it.
    pub allowed_ips: Vec<IpNet>,
    /// Milliseconds since the session in use was agreed; absent without a session.
    pub handshake_age_ms: Option<u64>,
    /// Bytes of packets received from it, inside the tunnel.
    pub received_bytes: u64,
    /// Bytes of packets sent to it, inside the tunnel.
    pub sent_bytes: u64,
    /// Handshake initiations since it was heard last: above 2, it is probably unreachable.
    pub unanswered: u32,
    /// Whether a pre-shared key is mixed into its handshakes.
    pub preshared: bool,
    /// Whether a handshake with the present pre-shared key has succeeded: the other side has it too.
    pub preshared_agreed: bool,
    /// The relay's port that is configured for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<SocketAddr>,
    /// Handshakes that it answered on a direct path since the present relay is in use: then the relay can go.
    #[serde(default)]
    pub direct_answers: u64,
    /// Seconds between keepalives to it; absent when none are sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keepalive_secs: Option<u16>,
    /// What the path to it carries inside the tunnel, in bytes; absent where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Whether it has proved to know the key that takes over from this node's present one.
    #[serde(default)]
    pub knows_next_key: bool,
}

impl PeerStatus {
    /// Age of the session in use.
    pub fn handshake_age(&self) -> Option<Duration> {
        self.handshake_age_ms.map(Duration::from_millis)
    }
}

/// Why a packet or datagram was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DropReason {
    /// From the device: no peer has the destination among its allowed addresses.
    NoPeer,
    /// From the device: the peer's endpoint is not known yet.
    NoEndpoint,
    /// From the device: the peer's queue, or the room for all peers, was full while a handshake was under way.
    QueueFull,
    /// From the device: waited too long for a handshake.
    QueueExpired,
    /// From the device: not a well-formed IP packet or offload header.
    MalformedPacket,
    /// To the underlay: larger than the link to the endpoint carries.
    TooBig,
    /// To the underlay: the system refused to send (no route, no buffer, ...).
    SendFailed,
    /// From the underlay: not a WireGuard message.
    NotWireGuard,
    /// From the underlay: not meant for this node's key (WG section 5.4.4, mac1).
    BadMac,
    /// From the underlay: a handshake by a key that is no peer.
    UnknownPeer,
    /// From the underlay: a session or handshake that does not exist (any more).
    UnknownSession,
    /// From the underlay: a handshake that does not follow from the one before.
    BadHandshake,
    /// From the underlay: too many handshakes; a cookie was asked for (WG section 5.3).
    UnderLoad,
    /// From the underlay: authentication failed.
    BadTag,
    /// From the underlay: seen before, or too old to know (WG section 5.4.6).
    Replayed,
    /// From the underlay: the source address does not belong to the peer (WG section 3).
    ForbiddenSource,
    /// From the underlay: authentic, but not an IP packet.
    MalformedInner,
    /// From the underlay: a router that was congested has marked it, and its sender would not be told (RFC 6040, section 4.2).
    Congested,
    /// To the device: the system refused to take it.
    DeviceRefused,
    /// From the device: more packets than the engine could seal in time; the system dropped them.
    DeviceQueueFull,
    /// From the underlay: more datagrams than the engine could open in time; the system dropped them.
    SocketQueueFull,
}

impl DropReason {
    /// All reasons, in order.
    pub const ALL: [Self; 21] = [
        Self::NoPeer,
        Self::NoEndpoint,
        Self::QueueFull,
        Self::QueueExpired,
        Self::MalformedPacket,
        Self::TooBig,
        Self::SendFailed,
        Self::NotWireGuard,
        Self::BadMac,
        Self::UnknownPeer,
        Self::UnknownSession,
        Self::BadHandshake,
        Self::UnderLoad,
        Self::BadTag,
        Self::Replayed,
        Self::ForbiddenSource,
        Self::MalformedInner,
        Self::Congested,
        Self::DeviceRefused,
        Self::DeviceQueueFull,
        Self::SocketQueueFull,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_numbered_by_their_place() {
        for (place, reason) in DropReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, place);
        }
    }
}
