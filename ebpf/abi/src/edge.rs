//! Maps of the edge: traffic from outside the cluster to its services, and back.
//!
//! A frontend is `EDGE_SERVICES[(address, port, protocol)] = { id, count, flags }`. Its backends are
//! `EDGE_BACKENDS[(id, index)]`, and `EDGE_TABLES[id]` says which one a connection goes to by the hash of its client: the
//! same on every node, so that a connection that arrives by another node finds its backend without that node's memory.
//! `EDGE_FLOWS` remembers connections in both directions. What is evicted there is chosen again.

use crate::{Address, plain};

/// Number of places in a service's table; a prime (Eisenbud et al., "Maglev", section 3.4).
pub const TABLE_SIZE: usize = 1021;

/// A frontend as seen from outside.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeService {
    /// Number under which its backends are filed; never 0.
    pub id: u32,
    /// Number of backends; 0 refuses connections.
    pub count: u32,
    /// Bits of the constants here; unknown ones are ignored.
    pub flags: u32,
}
plain!(EdgeService, 12);

impl EdgeService {
    /// All connections of one client address go to one backend.
    pub const AFFINITY: u32 = 1;
    /// Only clients in `EDGE_SOURCES` are let in.
    pub const RESTRICTED: u32 = 2;
    /// Without a backend here, packets are dropped instead of refused: another node may have one.
    pub const LOCAL_ONLY: u32 = 4;
}

/// Which backend each place of a service's table stands for.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EdgeTable {
    /// [`EdgeBackendKey::index`] by place.
    pub slots: [u16; TABLE_SIZE],
    /// Zero.
    pub pad: u16,
}
plain!(EdgeTable, 2044);

/// Place of a backend in its service.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeBackendKey {
    /// [`EdgeService::id`].
    pub service: u32,
    /// Stays the same for as long as the backend is there.
    pub index: u32,
}
plain!(EdgeBackendKey, 8);

/// A backend.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EdgeBackend {
    /// Its address.
    pub address: Address,
    /// Address on the overlay of the node that it runs on; unspecified for this one.
    pub via: Address,
    /// Its port, network order.
    pub port_be: u16,
    /// Zero.
    pub pad: u16,
}
plain!(EdgeBackend, 36);

/// Key of the longest-prefix table of clients that a service lets in.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeSourceKey {
    /// Significant bits of what follows: 32 more than those of `address`.
    pub prefix_len: u32,
    /// [`EdgeService::id`].
    pub service: u32,
    /// The range; IPv4 prefixes are 96 bits longer here.
    pub address: Address,
}
plain!(EdgeSourceKey, 24);

/// What follows the length in [`EdgeSourceKey`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EdgeSource {
    /// [`EdgeService::id`].
    pub service: u32,
    /// The client.
    pub address: Address,
}
plain!(EdgeSource, 20);

/// A connection in one direction.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// The client outside.
    pub client: Address,
    /// The other side: the frontend in packets from the client, the backend in packets to it.
    pub other: Address,
    /// The client's port, network order.
    pub client_port_be: u16,
    /// The other side's port, network order.
    pub other_port_be: u16,
    /// IANA protocol number.
    pub protocol: u8,
    /// [`INBOUND`](Self::INBOUND) or [`OUTBOUND`](Self::OUTBOUND).
    pub direction: u8,
    /// Zero.
    pub pad: u16,
}
plain!(FlowKey, 40);

impl FlowKey {
    /// From the client to the frontend.
    pub const INBOUND: u8 = 0;
    /// From the backend to the client.
    pub const OUTBOUND: u8 = 1;
}

/// What becomes of the packets of a connection.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flow {
    /// When a packet was seen last, in nanoseconds since the start of the system.
    pub seen_ns: u64,
    /// Inbound: the backend. Outbound: the frontend, if `via` is unspecified.
    pub address: Address,
    /// Overlay address of the node that the packets go to; unspecified when that is done here.
    pub via: Address,
    /// Port that belongs to `address`, network order.
    pub port_be: u16,
    /// One of the states here.
    pub state: u8,
    /// Zero.
    pub pad: u8,
    /// Index of the device by which the client is reached.
    pub ifindex: u32,
    /// [`EdgeService::id`]; 0 on the backend's node.
    pub service: u32,
    /// [`EdgeBackendKey::index`]; places in a table are no wider.
    pub index: u16,
    /// Where the client has another port on the backend's side than on its own, network order. Inbound: that one; outbound: its
    /// own. 0 where they are the same.
    pub client_port_be: u16,
}
plain!(Flow, 56);

impl Flow {
    /// The first packets of a connection.
    pub const NEW: u8 = 0;
    /// Packets in the middle of one.
    pub const OPEN: u8 = 1;
    /// One side has ended it.
    pub const CLOSING: u8 = 2;
}

/// A packet that came in pieces.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FragmentKey {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// The packet's number, as it lies in the header.
    pub id: u32,
    /// IANA protocol number.
    pub protocol: u32,
}
plain!(FragmentKey, 40);

/// The ports in its first piece.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fragment {
    /// Source port, network order.
    pub source_port_be: u16,
    /// Destination port, network order.
    pub destination_port_be: u16,
}
plain!(Fragment, 4);

/// Another node, by its address on the overlay.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EdgeNode {
    /// Largest packets on the way there, in bytes.
    pub mtu: u32,
}
plain!(EdgeNode, 4);

/// The node's own part.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EdgeConfig {
    /// Its IPv4 address on the overlay, mapped; unspecified when it has none.
    pub v4: Address,
    /// Its IPv6 address on the overlay; unspecified when it has none.
    pub v6: Address,
}
plain!(EdgeConfig, 32);

/// A device by which clients come in, by its index.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EdgeUplink {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Zero.
    pub pad: u16,
}
plain!(EdgeUplink, 8);

/// What the edge did with a packet: the index into its counters.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EdgeReason {
    /// From a client, delivered to a pod on this node.
    ClientToPod = 0,
    /// From a client, sent to the node of its backend.
    ClientToNode = 1,
    /// By another node from a client, delivered to a pod on this node.
    NodeToPod = 2,
    /// From a pod, sent to the client.
    PodToClient = 3,
    /// From a pod, sent to the node that the client uses.
    PodToNode = 4,
    /// By another node from a pod, sent to the client.
    NodeToClient = 5,
    /// A connection that was not known yet.
    Chosen = 6,
    /// Question for an address of ours on the local network, answered.
    Answered = 7,
    /// From a client, delivered to a process in this node's own network.
    ClientToHost = 8,
    /// By another node from a client, delivered to a process in this node's own network.
    NodeToHost = 9,
    /// From a process in this node's own network, sent to the client.
    HostToClient = 10,
    /// From a process in this node's own network, sent to the node that the client uses.
    HostToNode = 11,
    /// Refused: the service has no backend, or the connection's is gone. What comes before is on its way, what follows has ended.
    NoBackend = 12,
    /// Refused: larger than what the way to the backend carries.
    TooBig = 13,
    /// Dropped: the client is in none of the service's ranges.
    NotAllowed = 14,
    /// Dropped: the service has no backend on this node, and is not to use others.
    NotHere = 15,
    /// Dropped: another node sent what only a client or a backend may have sent.
    Forged = 16,
    /// Dropped: the packet could not be prepared.
    NoRoom = 17,
    /// Dropped: a piece of a packet whose first piece has not been seen.
    LostFragment = 18,
    /// Dropped: from or to a loopback address, which no other machine has any business with.
    Loopback = 19,
}

impl EdgeReason {
    /// Number of reasons, and of entries in the counters map.
    pub const COUNT: u32 = 20;

    /// All of them, in order.
    pub const ALL: [Self; Self::COUNT as usize] = [
        Self::ClientToPod,
        Self::ClientToNode,
        Self::NodeToPod,
        Self::PodToClient,
        Self::PodToNode,
        Self::NodeToClient,
        Self::Chosen,
        Self::Answered,
        Self::ClientToHost,
        Self::NodeToHost,
        Self::HostToClient,
        Self::HostToNode,
        Self::NoBackend,
        Self::TooBig,
        Self::NotAllowed,
        Self::NotHere,
        Self::Forged,
        Self::NoRoom,
        Self::LostFragment,
        Self::Loopback,
    ];

    /// A stable name for metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ClientToPod => "client_to_pod",
            Self::ClientToNode => "client_to_node",
            Self::NodeToPod => "node_to_pod",
            Self::PodToClient => "pod_to_client",
            Self::PodToNode => "pod_to_node",
            Self::NodeToClient => "node_to_client",
            Self::Chosen => "chosen",
            Self::Answered => "answered",
            Self::ClientToHost => "client_to_host",
            Self::NodeToHost => "node_to_host",
            Self::HostToClient => "host_to_client",
            Self::HostToNode => "host_to_node",
            Self::NoBackend => "no_backend",
            Self::TooBig => "too_big",
            Self::NotAllowed => "not_allowed",
            Self::NotHere => "not_here",
            Self::Forged => "forged",
            Self::NoRoom => "no_room",
            Self::LostFragment => "lost_fragment",
            Self::Loopback => "loopback",
        }
    }
}
