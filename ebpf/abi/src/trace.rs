//! A marked probe: what every program decided about its packets, in a ring buffer of their own.
//!
//! The mark is no bit of a packet. User space of every node puts the probe's own end into [`TRACES`](crate::maps::TRACES), which no
//! translation on the way changes, and the programs compare. While nobody traces they read one word, [`TraceState::active`].

use crate::{Address, plain};

/// Whether anything is traced; written by user space.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TraceState {
    /// 0: nothing is.
    pub active: u32,
    /// Zero.
    pub pad: u32,
}
plain!(TraceState, 8);

/// The probe's own end, or its socket.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceKey {
    /// Its address; of a socket the two halves of its cookie.
    pub address: Address,
    /// Its port, network order; 0 of a socket.
    pub port_be: u16,
    /// IANA protocol number; 0 of a socket.
    pub protocol: u8,
    /// Zero.
    pub pad: u8,
}
plain!(TraceKey, 20);

impl TraceKey {
    /// One end of a packet.
    #[inline(always)]
    pub const fn end(address: Address, port_be: u16, protocol: u8) -> Self {
        Self { address, port_be, protocol, pad: 0 }
    }

    /// A socket, by its cookie. No packet has such an end, because protocol 0 has no ports.
    #[inline(always)]
    pub const fn socket(cookie: u64) -> Self {
        let words = [cookie as u32, (cookie >> 32) as u32, u32::MAX, u32::MAX];
        Self { address: Address { words }, port_be: 0, protocol: 0, pad: 0 }
    }
}

/// One decision.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TraceEvent {
    /// When, nanoseconds of the monotonic clock.
    pub time_ns: u64,
    /// Cookie of the socket; 0 for packets.
    pub socket: u64,
    /// Who sent the packet, as the program found it; unspecified for a socket that has no address yet.
    pub source: Address,
    /// To whom, as the program found it.
    pub destination: Address,
    /// The backend that was chosen in the place of `destination`; unspecified when none was.
    pub chosen: Address,
    /// Port of `source`, network order.
    pub source_port_be: u16,
    /// Port of `destination`, network order.
    pub destination_port_be: u16,
    /// Port of `chosen`, network order.
    pub chosen_port_be: u16,
    /// IANA protocol number.
    pub protocol: u8,
    /// A [`TraceHook`].
    pub hook: u8,
    /// A [`TraceKind`].
    pub kind: u32,
    /// What was decided: a number of the kind.
    pub decision: u32,
    /// Index of the device; 0 for a socket.
    pub ifindex: u32,
    /// Bytes of the packet, as the program found it.
    pub bytes: u32,
    /// Policy: that of the side that began, for what it sends. Choice: how many backends there were.
    pub egress: u32,
    /// Policy: that of the other side, for what it receives. Choice: for how many seconds the client keeps it, 0 when it does not.
    pub ingress: u32,
    /// Policy: the rule that let it out; 0 when it was not asked.
    pub egress_rule: u32,
    /// Policy: the rule that let it in; 0 when it was not asked.
    pub ingress_rule: u32,
    /// Identity of the source; 0 when it has none.
    pub sender: u32,
    /// Identity of the destination; 0 when it has none.
    pub receiver: u32,
}
plain!(TraceEvent, 112);

/// Which program.
#[repr(u8)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TraceHook {
    /// `connect` or `sendmsg`.
    Socket = 1,
    /// `from_pod`.
    FromPod = 2,
    /// `to_pod`.
    ToPod = 3,
    /// `from_overlay`.
    FromOverlay = 4,
    /// `from_uplink`.
    FromUplink = 5,
    /// `kernel_drop`.
    Kernel = 6,
    /// `to_uplink`.
    ToUplink = 7,
}

impl TraceHook {
    /// From the number in an event.
    pub const fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Socket,
            2 => Self::FromPod,
            3 => Self::ToPod,
            4 => Self::FromOverlay,
            5 => Self::FromUplink,
            6 => Self::Kernel,
            7 => Self::ToUplink,
            _ => return None,
        })
    }
}

/// What kind of decision.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TraceKind {
    /// The packet has come to the program.
    Seen = 1,
    /// Policies were asked: [`TraceKind::ALLOWED`] or a [`Reason`](crate::Reason).
    Policy = 2,
    /// What becomes of the packet: a [`Reason`](crate::Reason).
    Verdict = 3,
    /// As before, of what comes from outside: an [`EdgeReason`](crate::EdgeReason).
    Edge = 4,
    /// The address is a service's, and a backend was chosen; decision 0.
    Chosen = 5,
    /// The address is a service's, and it has no backend; decision 0.
    Refused = 6,
    /// The address is no service's; decision 0.
    Straight = 7,
    /// The kernel dropped the packet: its own number of the reason.
    KernelDrop = 8,
}

impl TraceKind {
    /// The policies let it pass. Decisions have 24 bits.
    pub const ALLOWED: u32 = 0x00ff_ffff;

    /// From the number in an event.
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Seen,
            2 => Self::Policy,
            3 => Self::Verdict,
            4 => Self::Edge,
            5 => Self::Chosen,
            6 => Self::Refused,
            7 => Self::Straight,
            8 => Self::KernelDrop,
            _ => return None,
        })
    }
}
