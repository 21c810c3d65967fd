//! boringtun's noise layer behind [`Tunnel`]. Nothing else in the workspace names boringtun.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use mesh_model::snapshot::WgKey;
use x25519_dalek::{PublicKey, StaticSecret};

use super::{Admission, INITIATION_BYTES, Opened, SEAL_OVERHEAD, Tunnel, data_tunnel};
use crate::config::PresharedKey;
use crate::keys::NodeKey;
use crate::status::DropReason;

/// Handshakes per second beyond which initiators have to prove their address. Each is counted twice: at the gate and in
/// the tunnel.
const HANDSHAKES_PER_SECOND: u64 = 2 * 1000;

/// Length of a cookie reply (WG section 5.4.7).
const COOKIE_BYTES: usize = 64;

/// The node's side of all handshakes: sorts datagrams and makes tunnels.
pub struct Gate {
    secret: StaticSecret,
    public: PublicKey,
    limiter: Arc<RateLimiter>,
}

impl Gate {
    /// A gate for the node with this key.
    pub fn new(key: &NodeKey) -> Self {
        let public = PublicKey::from(key.public().0);
        let limiter = Arc::new(RateLimiter::new(&public, HANDSHAKES_PER_SECOND));
        Self { secret: key.secret().clone(), public, limiter }
    }

    /// The node's public key.
    pub fn public(&self) -> WgKey {
        WgKey(self.public.to_bytes())
    }

    /// A tunnel to a peer, with a number below 2^24 by which its datagrams are told.
    pub fn tunnel(&self, peer: WgKey, psk: Option<PresharedKey>, number: u32) -> Box<dyn Tunnel> {
        debug_assert!(number < 1 << 24, "the wire has 24 bits for it");
        let tunn = Tunn::new(
            self.secret.clone(),
            PublicKey::from(peer.0),
            psk.map(|psk| psk.0.0),
            None, // keepalives are the peer's business, so that they can change
            number,
            Some(Arc::clone(&self.limiter)),
        );
        Box::new(Boring { tunn, last_index: number << 8, current: None })
    }

    /// Finds out where a datagram belongs. `out` needs [`INITIATION_BYTES`].
    pub fn admit(&self, source: IpAddr, datagram: &[u8], out: &mut [u8]) -> Admission {
        if let Some(number) = data_tunnel(datagram) {
            return Admission::Tunnel(number);
        }
        match Tunn::parse_incoming_packet(datagram) {
            Ok(Packet::HandshakeInit(_)) => self.admit_initiation(source, datagram, out),
            Ok(Packet::HandshakeResponse(p)) => Admission::Tunnel(p.receiver_idx >> 8),
            Ok(Packet::PacketCookieReply(p)) => Admission::Tunnel(p.receiver_idx >> 8),
            Ok(Packet::PacketData(p)) => Admission::Tunnel(p.receiver_idx >> 8),
            Err(_) => Admission::Dropped(DropReason::NotWireGuard),
        }
    }

    /// Cheap proofs first (mac1, then the cookie under load), then one key agreement to learn who calls.
    fn admit_initiation(&self, source: IpAddr, datagram: &[u8], out: &mut [u8]) -> Admission {
        let init = match self.limiter.verify_packet(Some(source), datagram, out) {
            Ok(Packet::HandshakeInit(init)) => init,
            Ok(_) => return Admission::Dropped(DropReason::NotWireGuard),
            Err(TunnResult::WriteToNetwork(cookie)) => return Admission::Answer(cookie.len()),
            Err(TunnResult::Err(error)) => return Admission::Dropped(reason(&error)),
            Err(_) => return Admission::Dropped(DropReason::BadHandshake),
        };
        match parse_handshake_anon(&self.secret, &self.public, &init) {
            Ok(half) => Admission::Initiator(WgKey(half.peer_static_public)),
            Err(_) => Admission::Dropped(DropReason::BadHandshake),
        }
    }

    /// To be called every second: the limit on handshakes is per second.
    pub fn second_passed(&self) {
        self.limiter.reset_count();
    }
}

/// boringtun keeps a ring of this many sessions, by the low bits of the index that it gives them.
const RING: u32 = 8;

struct Boring {
    tunn: Tunn,
    /// The last index that was given to a handshake.
    last_index: u32,
    /// Index of the session in use.
    current: Option<u32>,
}

impl Boring {
    /// Each initiation that we answer makes a session, though the peer may never use it, in the next place of the
    /// ring: a peer that calls again and again in vain would push out the session in use. So that place is left out.
    fn spare_current(&mut self) {
        let next = self.last_index.wrapping_add(1);
        if self.current.is_some_and(|current| current % RING == next % RING) {
            let mut unsent = [0; INITIATION_BYTES];
            self.initiate(&mut unsent);
        }
    }

    /// Takes note of the index in a handshake message of ours.
    fn wrote(&mut self, message: &[u8]) {
        if matches!(message.first(), Some(1 | 2)) {
            self.last_index = word(message, 4);
        }
    }
}

/// A number in a message; the caller knows that it is long enough.
fn word(message: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]])
}

impl Tunnel for Boring {
    fn initiate(&mut self, out: &mut [u8]) -> Option<usize> {
        if out.len() < INITIATION_BYTES {
            return None;
        }
        let len = match self.tunn.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(message) => message.len(),
            _ => return None,
        };
        self.wrote(&out[..len]);
        Some(len)
    }

    fn has_session(&self) -> bool {
        self.session_age().is_some()
    }

    fn session_age(&self) -> Option<Duration> {
        self.tunn.time_since_last_handshake()
    }

    fn seal(&mut self, packet: &[u8], out: &mut [u8]) -> Option<usize> {
        // Without the length boringtun panics; without a session it would queue the packet by itself.
        if out.len() < (packet.len() + SEAL_OVERHEAD).max(INITIATION_BYTES) {
            return None;
        }
        match self.tunn.encapsulate(packet, out) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            _ => None,
        }
    }

    fn open(&mut self, source: IpAddr, datagram: &[u8], out: &mut [u8]) -> Opened {
        if out.len() < datagram.len().max(INITIATION_BYTES) || datagram.is_empty() {
            return Opened::Dropped(DropReason::NotWireGuard);
        }
        let kind = datagram[0];
        if kind == 1 {
            self.spare_current();
        }
        let opened = match (kind, self.tunn.decapsulate(Some(source), datagram, out)) {
            (_, TunnResult::WriteToTunnelV4(packet, _)) => Opened::Packet(packet.len()),
            (_, TunnResult::WriteToTunnelV6(packet, _)) => Opened::Packet(packet.len()),
            (4, TunnResult::Done) => Opened::Keepalive,
            (_, TunnResult::Done) => Opened::Cookie(0),
            (_, TunnResult::WriteToNetwork(m)) if m.len() == COOKIE_BYTES => {
                Opened::Cookie(m.len())
            }
            (1, TunnResult::WriteToNetwork(response)) => Opened::Initiation(response.len()),
            (_, TunnResult::WriteToNetwork(confirmation)) => Opened::Response(confirmation.len()),
            (_, TunnResult::Err(error)) => Opened::Dropped(reason(&error)),
        };
        match opened {
            Opened::Packet(_) | Opened::Keepalive => self.current = Some(word(datagram, 4)),
            Opened::Response(_) => self.current = Some(word(datagram, 8)),
            Opened::Initiation(len) => self.wrote(&out[..len]),
            Opened::Cookie(_) | Opened::Dropped(_) => {}
        }
        opened
    }

    fn tick(&mut self, out: &mut [u8]) -> Option<usize> {
        if out.len() < INITIATION_BYTES {
            return None;
        }
        let len = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) => message.len(),
            _ => return None,
        };
        self.wrote(&out[..len]);
        Some(len)
    }
}

fn reason(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidMac => DropReason::BadMac,
        WireGuardError::UnderLoad => DropReason::UnderLoad,
        WireGuardError::InvalidAeadTag => DropReason::BadTag,
        WireGuardError::InvalidCounter
        | WireGuardError::DuplicateCounter
        | WireGuardError::WrongTai64nTimestamp => DropReason::Replayed,
        WireGuardError::WrongIndex
        | WireGuardError::NoCurrentSession
        | WireGuardError::UnexpectedPacket => DropReason::UnknownSession,
        WireGuardError::InvalidPacket => DropReason::MalformedInner,
        WireGuardError::WrongPacketType | WireGuardError::IncorrectPacketLength => {
            DropReason::NotWireGuard
        }
        _ => DropReason::BadHandshake,
    }
}
