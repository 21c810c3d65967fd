//! What the programs tell about connections: one [`FlowEvent`] per opening, end, refusal or drop, in a ring buffer.
//!
//! Writers: the socket hooks, `sock_ops`, the TC programs and `kernel_drop`. Reader: one process, the agent, which looks when it
//! likes, and is woken when a good part of the ring is full ([`WAKE_BYTES`]). A ring that is full costs events, never packets;
//! [`FlowCounter`] tells how many.

use crate::{Address, plain};

/// Size of the ring.
pub const RING_BYTES: u32 = 1 << 20;
/// So many bytes that wait to be read wake the reader; below that it comes by its own clock.
pub const WAKE_BYTES: u32 = RING_BYTES / 4;

/// One event. Source and destination are those of the connection: the source is who opened it, or who sent the packet.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowEvent {
    /// When, nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// Cookie of the network namespace of the socket or of the packet's device; 0 when not known.
    pub netns: u64,
    /// Cookie of the socket; 0 for packets.
    pub socket: u64,
    /// Closed: bytes that this side sent and the other acknowledged.
    pub sent_bytes: u64,
    /// Closed: bytes that this side received.
    pub received_bytes: u64,
    /// Closed: time since it was opened, nanoseconds; 0 when not known.
    pub duration_ns: u64,
    /// Who opened the connection or sent the packet.
    pub source: Address,
    /// To whom, after the choice of a backend.
    pub destination: Address,
    /// The service address that the application asked for; unspecified when it asked for `destination`, or on the other side.
    pub service: Address,
    /// Source port, network order.
    pub source_port_be: u16,
    /// Destination port, network order.
    pub destination_port_be: u16,
    /// Port of `service`, network order.
    pub service_port_be: u16,
    /// IANA protocol number; 0 when the packet could not be read.
    pub protocol: u8,
    /// A [`FlowKind`].
    pub kind: u8,
    /// A [`FlowDirection`].
    pub direction: u8,
    /// Closed or failed: an [`FlowEnd`].
    pub end: u8,
    /// Zero.
    pub pad: u16,
    /// Dropped: a [`Reason`](crate::Reason). Dropped by the kernel: its own number of the reason.
    pub reason: u32,
    /// Closed: smoothed round trip time, microseconds.
    pub rtt_us: u32,
    /// Closed: segments that were sent again.
    pub retransmits: u32,
    /// Packets: index of the device that it came in by, in `netns`.
    pub ifindex: u32,
    /// Packets: further ones of the same kind that were not told since the last one (rate limit).
    pub unreported: u32,
}
plain!(FlowEvent, 128);

/// What happened.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowKind {
    /// A TCP connection is established.
    Opened = 1,
    /// An established TCP connection has ended.
    Closed = 2,
    /// A TCP connection was never established.
    Failed = 3,
    /// The first datagram of a socket to a destination.
    Datagram = 4,
    /// A service without a backend was asked for.
    Refused = 5,
    /// One of our programs dropped the packet.
    Dropped = 6,
    /// The kernel dropped the packet.
    KernelDropped = 7,
}

impl FlowKind {
    /// From the number in an event.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Opened,
            2 => Self::Closed,
            3 => Self::Failed,
            4 => Self::Datagram,
            5 => Self::Refused,
            6 => Self::Dropped,
            7 => Self::KernelDropped,
            _ => return None,
        })
    }
}

/// From whose side an event was seen.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowDirection {
    /// By neither: a packet on its way.
    Forward = 0,
    /// By the sending pod or socket.
    Egress = 1,
    /// By the receiving pod or socket.
    Ingress = 2,
}

impl FlowDirection {
    /// From the number in an event.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Forward,
            1 => Self::Egress,
            2 => Self::Ingress,
            _ => return None,
        })
    }
}

/// How a connection ended.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowEnd {
    /// Not known.
    Unknown = 0,
    /// Both sides have said goodbye.
    Finished = 1,
    /// The other side reset it.
    Reset = 2,
    /// The other side refused it.
    Refused = 3,
    /// The other side did not answer any more.
    TimedOut = 4,
    /// Somebody on the way said that there is no way.
    Unreachable = 5,
    /// This side gave it up.
    Aborted = 6,
}

impl FlowEnd {
    /// From the number in an event.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Unknown,
            1 => Self::Finished,
            2 => Self::Reset,
            3 => Self::Refused,
            4 => Self::TimedOut,
            5 => Self::Unreachable,
            6 => Self::Aborted,
            _ => return None,
        })
    }
}

/// What is told; written by user space, read by every writer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowConfig {
    /// Bits of [`FlowConfig`]'s constants; 0 tells nothing.
    pub flags: u32,
    /// Events per second of one kind, reason and device; further packets are only counted.
    pub rate_per_sec: u32,
    /// The kernel's number for "consumed, not dropped".
    pub consumed: u32,
    /// The kernel's number for "no reason given".
    pub not_specified: u32,
    /// The kernel's number for "dropped by a TC program at ingress", which tells on its own.
    pub tc_ingress: u32,
    /// Offset of `dev` in `struct sk_buff`.
    pub skb_dev: u32,
    /// Offset of `head` in `struct sk_buff`.
    pub skb_head: u32,
    /// Offset of `network_header` in `struct sk_buff`.
    pub skb_network_header: u32,
    /// Offset of the namespace's address in `struct net_device`.
    pub device_net: u32,
    /// Offset of `ifindex` in `struct net_device`.
    pub device_ifindex: u32,
    /// Offset of `net_cookie` in `struct net`.
    pub net_cookie: u32,
    /// Offset of `sk_err` in `struct sock`; 0 when not known.
    pub sock_err: u32,
    /// Offset of the namespace's address in `struct sock`.
    pub sock_net: u32,
    /// Offset of `sk` in `struct sk_buff`.
    pub skb_sk: u32,
    /// Offset of the flags in `struct sock`; 0 when not known.
    pub sock_flags: u32,
}
plain!(FlowConfig, 60);

impl FlowConfig {
    /// Connections and datagrams are told.
    pub const CONNECTIONS: u32 = 1;
    /// Dropped packets are told.
    pub const DROPS: u32 = 2;
}

/// Key of the rate limit.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowLimitKey {
    /// Kind of the event.
    pub kind: u32,
    /// Its reason.
    pub reason: u32,
    /// Network namespace, where devices are told apart by it.
    pub netns: u64,
    /// Device, or the low word of a socket's cookie.
    pub ifindex: u32,
    /// Zero.
    pub pad: u32,
}
plain!(FlowLimitKey, 24);

/// State of the rate limit.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowLimit {
    /// Start of the second that is counted, nanoseconds of the monotonic clock.
    pub since_ns: u64,
    /// Events in it.
    pub told: u32,
    /// Events that were not told since the last one that was.
    pub unreported: u32,
}
plain!(FlowLimit, 16);

/// A socket and a destination of its datagrams.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DatagramKey {
    /// Socket cookie.
    pub cookie: u64,
    /// Destination.
    pub address: Address,
    /// Its port, network order.
    pub port_be: u16,
    /// Zero.
    pub pad: [u16; 3],
}
plain!(DatagramKey, 32);

/// Where a TCP connection of a socket of this node is remembered while it lasts: at a place that follows from its two ends, so
/// that it costs no memory of its own. When the place is taken, [`FlowSocket`] remembers it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowSlot {
    /// Whose it is: a hash of the ends as the socket sees them, with [`FlowSlot::TAKEN`] and maybe [`FlowSlot::ACTIVE`]; 0: nobody's.
    pub owner: u64,
    /// When it was opened, nanoseconds of the monotonic clock. While it ends: where the kernel keeps the socket.
    pub since_ns: u64,
}
plain!(FlowSlot, 16);

impl FlowSlot {
    /// Number of places; a power of two. 1 MiB.
    pub const COUNT: u32 = 1 << 16;
    /// Set in each owner.
    pub const TAKEN: u64 = 1;
    /// The owner has opened the connection.
    pub const ACTIVE: u64 = 2;
}

/// Where a socket's last datagram went, and since when a TCP connection lasts that has no [`FlowSlot`]; storage of the socket.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowSocket {
    /// TCP: when it was opened, nanoseconds of the monotonic clock. UDP: when the last destination was told.
    pub since_ns: u64,
    /// UDP: the last destination.
    pub address: Address,
    /// UDP: its port, network order.
    pub port_be: u16,
    /// TCP: whether this side opened it.
    pub active: u8,
    /// Zero.
    pub pad: [u8; 5],
    /// TCP, while it ends: where the kernel keeps the socket. The verifier lets nobody calculate with such a pointer elsewhere.
    pub kernel_address: u64,
}
plain!(FlowSocket, 40);

/// Index into the per-CPU counters of events ([`maps::FLOW_COUNTERS`](crate::maps::FLOW_COUNTERS), one `u64` each).
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlowCounter {
    /// Events that were put into the ring.
    Told = 0,
    /// Events that found the ring full.
    Lost = 1,
    /// Events that the rate limit held back.
    Limited = 2,
}

impl FlowCounter {
    /// Number of counters.
    pub const COUNT: u32 = 3;
}
