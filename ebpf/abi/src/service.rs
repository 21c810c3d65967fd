//! Maps of the socket hooks: service frontends, their backends, and what was chosen for whom.
//!
//! A frontend is `SERVICES[(vip, port, protocol)] = { id, count }`; its backends are `SLOTS[(id, 0..count)]`, dense.
//! `MEMBERS[(id, backend)]` answers "does this backend still belong to the service" in one lookup. A reader that
//! races with a writer sees the list before or after a change, never an empty one: slots and members are
//! added before the count grows and deleted after it shrank.
//!
//! A backend with a weight stands in several slots. A node port that any node's address stands for is one entry under
//! [`ServiceKey::ANY_NODE_V4`] or [`ServiceKey::ANY_NODE_V6`]; `NODE_ADDRESSES` says which addresses those are.

use crate::{Address, plain};

/// What a client connects to. Also the key of a node port (with the node's address) and of an external address.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// The virtual address.
    pub address: Address,
    /// The port, network order.
    pub port_be: u16,
    /// IANA protocol number.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}
plain!(ServiceKey, 20);

impl ServiceKey {
    /// Stands for every IPv4 address of every node. A multicast address that nobody uses: no client can mean it.
    pub const ANY_NODE_V4: Address = Address { words: [u32::MAX, u32::MAX, u32::MAX, 4] };
    /// Stands for every IPv6 address of every node.
    pub const ANY_NODE_V6: Address = Address { words: [u32::MAX, u32::MAX, u32::MAX, 6] };
}

/// A frontend.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service {
    /// Number under which its backends are filed; never 0.
    pub id: u32,
    /// Number of backends; 0 refuses connections.
    pub count: u32,
    /// Session affinity by client, in seconds; 0 is none.
    pub affinity_secs: u32,
    /// None yet; unknown bits are ignored.
    pub flags: u32,
}
plain!(Service, 16);

/// Place of a backend in its service's list.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotKey {
    /// [`Service::id`].
    pub service: u32,
    /// 0 to [`Service::count`] - 1.
    pub slot: u32,
}
plain!(SlotKey, 8);

/// A backend.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// Its address, of the same family as the frontend's.
    pub address: Address,
    /// Its port, network order.
    pub port_be: u16,
    /// Zero.
    pub pad: u16,
}
plain!(Slot, 20);

/// A backend of a service, by what it is instead of where it stands.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberKey {
    /// [`Service::id`].
    pub service: u32,
    /// The backend.
    pub backend: Slot,
}
plain!(MemberKey, 24);

/// State of a backend in a service.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// [`LEAVING`](Self::LEAVING), [`TERMINATING`](Self::TERMINATING); unknown bits are ignored.
    pub flags: u32,
}
plain!(Member, 4);

impl Member {
    /// In no slot: it finishes what it has, and nothing new sticks to it.
    pub const LEAVING: u32 = 1;
    /// Its pod is being deleted: for user space, which ends what is connected to it once it is gone.
    pub const TERMINATING: u32 = 2;
}

/// Socket storage of a connected socket that went through a frontend.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Peer {
    /// What the application connected to.
    pub vip: Address,
    /// Where it really went.
    pub backend: Address,
    /// Port of `vip`, network order.
    pub vip_port_be: u16,
    /// Port of `backend`, network order.
    pub backend_port_be: u16,
}
plain!(Peer, 36);

/// A socket and one of the backends that it sent datagrams to, or was connected to as a datagram socket.
///
/// Known gap: of a socket that sends to a frontend and also to that frontend's backend by its own address, all answers of that
/// backend seem to come from the frontend; of two frontends with the same backend, from the one used last.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReverseKey {
    /// Socket cookie.
    pub cookie: u64,
    /// Backend address.
    pub address: Address,
    /// Backend port, network order.
    pub port_be: u16,
    /// Zero.
    pub pad: [u16; 3],
}
plain!(ReverseKey, 32);

/// The frontend that a backend stands for, to one socket.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reverse {
    /// Frontend address.
    pub address: Address,
    /// Frontend port, network order.
    pub port_be: u16,
    /// Zero.
    pub pad: u16,
}
plain!(Reverse, 20);

/// A socket and one of the frontends it sent datagrams to.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StickyKey {
    /// Socket cookie.
    pub cookie: u64,
    /// Frontend address.
    pub address: Address,
    /// Frontend port, network order.
    pub port_be: u16,
    /// Zero.
    pub pad: [u16; 3],
}
plain!(StickyKey, 32);

/// The backend that a socket's datagrams to one frontend go to, for as long as it is a member.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sticky {
    /// The backend.
    pub backend: Slot,
}
plain!(Sticky, 20);

/// A client and a service with session affinity.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AffinityKey {
    /// Network namespace cookie of the client: at the socket there is no source address yet, and a pod is a namespace.
    pub netns: u64,
    /// [`Service::id`].
    pub service: u32,
    /// Zero.
    pub pad: u32,
}
plain!(AffinityKey, 16);

/// The backend that a client keeps.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AffinityValue {
    /// Last use, nanoseconds of the monotonic clock.
    pub used_ns: u64,
    /// The backend.
    pub backend: Slot,
    /// Zero.
    pub pad: u32,
}
plain!(AffinityValue, 32);

impl MemberKey {
    /// The member entry that belongs to a backend of `service`.
    #[inline(always)]
    pub const fn new(service: u32, backend: Slot) -> Self {
        Self { service, backend }
    }
}
