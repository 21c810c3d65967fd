//! What happens between devices in memory: handshakes, sessions, packets that wait, as `drivers/net/wireguard` does it.
//!
//! Secrets are compared instead of used. A session is a number that both sides know.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use mesh_model::snapshot::WgKey;

use super::{Observed, SecretKey};

/// Packets that wait for a handshake with one peer; of more, the oldest is dropped (`MAX_STAGED_PACKETS`).
const STAGED: usize = 128;
/// Between two calls of one peer (`REKEY_TIMEOUT`).
const CALL_PAUSE: Duration = Duration::from_secs(5);
/// A session carries nothing after this (`REJECT_AFTER_TIME`).
const SESSION: Duration = Duration::from_secs(180);
const CALL_BYTES: u64 = 148;
const ANSWER_BYTES: u64 = 92;
const DATA_BYTES: u64 = 32;

static SESSIONS: AtomicU64 = AtomicU64::new(1);

/// A packet inside the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FakePacket {
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// Which one it is.
    pub number: u64,
}

/// A datagram on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FakeMessage {
    /// Handshake initiation.
    Call {
        /// The caller's public key.
        from: WgKey,
        /// The key of the one who is called: nobody else can read it.
        to: WgKey,
        /// The session that it is about.
        session: u64,
    },
    /// Handshake response.
    Answer {
        /// The session.
        session: u64,
        /// What is mixed into it.
        preshared_key: Option<SecretKey>,
    },
    /// A packet of a session; none is a keepalive.
    Data {
        /// The session.
        session: u64,
        /// The packet.
        packet: Option<FakePacket>,
    },
}

/// Sessions with all peers.
#[derive(Debug)]
pub(super) struct Traffic {
    pub(super) now: SystemTime,
    pub(super) sent: Vec<FakeMessage>,
    public: fn(&SecretKey) -> WgKey,
    links: BTreeMap<WgKey, Link>,
}

#[derive(Debug, Default)]
struct Link {
    last_call: Option<SystemTime>,
    offer: Option<u64>,
    current: Option<Session>,
    previous: Option<Session>,
    /// Answered, and not used by the peer yet.
    next: Option<Session>,
    staged: VecDeque<FakePacket>,
}

#[derive(Debug, Clone, Copy)]
struct Session {
    number: u64,
    since: SystemTime,
    /// Ends when the device gets another key; receiving goes on.
    sending: bool,
}

impl Traffic {
    pub(super) fn new(public: fn(&SecretKey) -> WgKey) -> Self {
        Self { now: SystemTime::UNIX_EPOCH, sent: vec![], public, links: BTreeMap::new() }
    }

    pub(super) fn forget(&mut self) {
        self.links.clear();
    }

    pub(super) fn forget_peer(&mut self, key: &WgKey) {
        self.links.remove(key);
    }

    /// The device has another private key (`wg_noise_expire_current_peer_keypairs`).
    pub(super) fn rekeyed(&mut self) {
        for link in self.links.values_mut() {
            (link.offer, link.last_call) = (None, None);
            for session in [&mut link.current, &mut link.next].into_iter().flatten() {
                session.sending = false;
            }
        }
    }

    pub(super) fn send(&mut self, state: &mut Observed, packet: FakePacket) {
        let Some(peer) = owner(state, packet.destination) else { return };
        let staged = &mut self.links.entry(peer).or_default().staged;
        staged.push_back(packet);
        if staged.len() > STAGED {
            staged.pop_front();
        }
        self.send_staged(state, &peer);
    }

    pub(super) fn keep_alive(&mut self, state: &mut Observed, peer: &WgKey) {
        let now = self.now;
        let link = self.links.entry(*peer).or_default();
        match link.sends_with(now) {
            Some(session) => self.sent.push(FakeMessage::Data { session, packet: None }),
            None => self.call(state, peer),
        }
    }

    pub(super) fn send_staged(&mut self, state: &mut Observed, peer: &WgKey) {
        let Some(link) = self.links.get_mut(peer).filter(|link| !link.staged.is_empty()) else {
            return;
        };
        let Some(session) = link.sends_with(self.now) else { return self.call(state, peer) };
        for packet in link.staged.drain(..) {
            count(state, peer, DATA_BYTES, 0);
            self.sent.push(FakeMessage::Data { session, packet: Some(packet) });
        }
    }

    fn call(&mut self, state: &mut Observed, peer: &WgKey) {
        let Some(from) = state.private_key.as_ref().map(self.public) else { return };
        let link = self.links.entry(*peer).or_default();
        let now = self.now;
        let early = |at| now.duration_since(at).is_ok_and(|pause| pause < CALL_PAUSE);
        let lost = state.peers.get(peer).is_none_or(|peer| peer.endpoint.is_none());
        if lost || link.last_call.is_some_and(early) {
            return;
        }
        let session = SESSIONS.fetch_add(1, Relaxed);
        (link.last_call, link.offer) = (Some(now), Some(session));
        count(state, peer, CALL_BYTES, 0);
        self.sent.push(FakeMessage::Call { from, to: *peer, session });
    }

    pub(super) fn receive(
        &mut self,
        state: &mut Observed,
        message: FakeMessage,
    ) -> Option<FakePacket> {
        let now = self.now;
        match message {
            FakeMessage::Call { from, to, session } => {
                let ours = state.private_key.as_ref().map(self.public) == Some(to);
                let preshared_key = state.peers.get(&from).filter(|_| ours)?.preshared_key;
                let next = Session { number: session, since: now, sending: true };
                self.links.entry(from).or_default().next = Some(next);
                count(state, &from, ANSWER_BYTES, CALL_BYTES);
                self.sent.push(FakeMessage::Answer { session, preshared_key });
                None
            }
            FakeMessage::Answer { session, preshared_key } => {
                let mut links = self.links.iter_mut();
                let (&peer, link) = links.find(|(_, link)| link.offer == Some(session))?;
                if state.peers.get(&peer)?.preshared_key != preshared_key {
                    return None;
                }
                let fresh = Session { number: session, since: now, sending: true };
                link.previous = link.next.take().or(link.current);
                (link.current, link.offer) = (Some(fresh), None);
                count(state, &peer, 0, ANSWER_BYTES);
                shaken(state, &peer, now);
                if link.staged.is_empty() {
                    self.keep_alive(state, &peer);
                } else {
                    self.send_staged(state, &peer);
                }
                None
            }
            FakeMessage::Data { session, packet } => {
                let mut links = self.links.iter_mut();
                let (&peer, link) = links.find(|(_, link)| link.receives_with(session, now))?;
                if link.next.is_some_and(|next| next.number == session) {
                    link.previous = link.current;
                    link.current = link.next.take();
                    shaken(state, &peer, now);
                    self.send_staged(state, &peer);
                }
                count(state, &peer, 0, DATA_BYTES);
                packet.filter(|packet| owner(state, packet.source) == Some(peer))
            }
        }
    }
}

impl Link {
    fn sends_with(&self, now: SystemTime) -> Option<u64> {
        let session = self.current.filter(|session| session.sending && session.lives(now))?;
        Some(session.number)
    }

    fn receives_with(&self, number: u64, now: SystemTime) -> bool {
        let all = [self.current, self.previous, self.next];
        all.into_iter().flatten().any(|session| session.number == number && session.lives(now))
    }
}

impl Session {
    fn lives(&self, now: SystemTime) -> bool {
        now.duration_since(self.since).is_ok_and(|age| age < SESSION)
    }
}

/// Whose an address is: the longest prefix decides.
fn owner(state: &Observed, address: IpAddr) -> Option<WgKey> {
    let all = state.peers.iter().flat_map(|(key, peer)| peer.allowed_ips.iter().map(|n| (*key, n)));
    let holding = all.filter(|(_, net)| net.contains(&address));
    holding.max_by_key(|(_, net)| net.prefix_len()).map(|(key, _)| key)
}

fn shaken(state: &mut Observed, peer: &WgKey, now: SystemTime) {
    if let Some(peer) = state.peers.get_mut(peer) {
        peer.statistics.last_handshake = Some(now);
    }
}

fn count(state: &mut Observed, peer: &WgKey, sent: u64, received: u64) {
    if let Some(peer) = state.peers.get_mut(peer) {
        peer.statistics.sent_bytes += sent;
        peer.statistics.received_bytes += received;
    }
}
