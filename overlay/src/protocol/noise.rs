//! Handshake and encryption as the rest of the engine sees them. What implements them is named only below here.

mod boring;

use std::net::IpAddr;
use std::time::Duration;

use mesh_model::snapshot::WgKey;

pub use self::boring::Gate;
use crate::status::DropReason;

/// What sealing adds to a packet: header and tag (WG section 5.4.6).
pub const SEAL_OVERHEAD: usize = 32;

/// Length of a handshake initiation, the longest message that is not data (WG section 5.4.2).
pub const INITIATION_BYTES: usize = 148;

/// Message type of a handshake initiation, the first byte (WG section 5.4.2).
const TYPE_INITIATION: u8 = 1;

/// Message type of data (WG section 5.4.6).
const TYPE_DATA: u8 = 4;

/// The sessions with one peer: the seam at which the implementation can be exchanged.
///
/// Output goes to buffers of the caller; lengths are returned.
pub trait Tunnel: Send {
    /// Writes a new handshake initiation, also when one is under way. Needs [`INITIATION_BYTES`].
    fn initiate(&mut self, out: &mut [u8]) -> Option<usize>;

    /// Whether packets can be sealed now.
    fn has_session(&self) -> bool;

    /// Age of the newest session; none without one.
    fn session_age(&self) -> Option<Duration>;

    /// Encrypts a padded packet, or a keepalive when it is empty. Needs a session, and [`SEAL_OVERHEAD`] bytes more.
    fn seal(&mut self, packet: &[u8], out: &mut [u8]) -> Option<usize>;

    /// Takes a datagram that [`Gate::admit`] has let through. `out` must be as long as the datagram.
    fn open(&mut self, source: IpAddr, datagram: &[u8], out: &mut [u8]) -> Opened;

    /// Lets time pass; to be called every 250 ms or more often. May write a message that is due.
    fn tick(&mut self, out: &mut [u8]) -> Option<usize>;
}

/// What a datagram turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// An authentic IP packet of this length is in the buffer, without padding.
    Packet(usize),
    /// An authentic keepalive.
    Keepalive,
    /// A valid initiation; the response, of this length, is in the buffer.
    Initiation(usize),
    /// A valid response; the message that confirms it, of this length, is in the buffer.
    Response(usize),
    /// A cookie, taken note of, or asked for with the message of this length. Proves nothing about the sender.
    Cookie(usize),
    /// Nothing of value.
    Dropped(DropReason),
}

/// Where a datagram belongs, before anything is decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// To the tunnel with this number.
    Tunnel(u32),
    /// To the peer with this key: a handshake initiation.
    Initiator(WgKey),
    /// To nobody yet: the answer, of this length, is in the buffer.
    Answer(usize),
    /// To nobody.
    Dropped(DropReason),
}

/// Number of the tunnel that a data message is for; none for all other datagrams.
///
/// The fast path: no allocation, no cryptography, no clock.
pub fn data_tunnel(datagram: &[u8]) -> Option<u32> {
    if datagram.len() < SEAL_OVERHEAD || datagram[..4] != [TYPE_DATA, 0, 0, 0] {
        return None;
    }
    let index = u32::from_le_bytes([datagram[4], datagram[5], datagram[6], datagram[7]]);
    Some(index >> 8)
}

/// Whether a message that a tunnel wrote is a handshake initiation.
pub fn is_initiation(message: &[u8]) -> bool {
    message.first() == Some(&TYPE_INITIATION)
}
