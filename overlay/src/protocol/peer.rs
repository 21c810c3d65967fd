//! One peer: its sessions, where it is, what waits for it.

mod places;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;

use self::places::Places;
use super::noise::{Gate, INITIATION_BYTES, Opened, SEAL_OVERHEAD, Tunnel, is_initiation};
use super::outbox::Outbox;
use crate::config::{PeerConfig, PresharedKey};
use crate::status::DropReason;

/// Packets that wait for a handshake, at most.
const STAGED_PACKETS: usize = 128;

/// How long one waits: what is older has been sent again, or is of no use.
const STAGED_FOR: Duration = Duration::from_secs(5);

/// Pauses between initiations while there is no session; the last one repeats. Shorter at first than WG section 6.1
/// says, so that a lost message or a dead endpoint does not cost a join its two seconds.
const RETRIES: [Duration; 6] = [
    Duration::from_millis(250),
    Duration::from_millis(350),
    Duration::from_millis(600),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];

/// How long a session with the old pre-shared key serves what is under way.
const OVERLAP: Duration = Duration::from_secs(10);

/// How often the endpoints of a peer behind a relay are tried. Longer than it takes the tunnel to repeat a handshake
/// (WG section 6.1, Rekey-Timeout), through the relay then: so each attempt ends, and sessions are not used up by answers
/// that never arrived.
const DIRECT_TRIALS: Duration = Duration::from_secs(7);

/// Unanswered initiations after which another endpoint is tried while the session still lives.
const PATIENCE_IN_SESSION: u32 = 2;

/// Where a peer is, and with what it speaks. Not shared: callers hold the lock around it.
pub struct Peer {
    key: WgKey,
    /// Even; the tunnel in use has this number or the next.
    number: u32,
    preshared: Option<PresharedKey>,
    current: Slot,
    /// The tunnel before the pre-shared key changed, until the new one has served for a while.
    previous: Option<Slot>,
    places: Places,
    keepalive: Option<Duration>,
    staged: VecDeque<(Instant, Vec<u8>)>,
    /// Initiations since the peer proved that it hears us.
    unanswered: u32,
    /// No initiation before this time, while there is no session.
    next_initiation: Instant,
    /// When an endpoint is tried beside the relay.
    next_trial: Instant,
    direct_answers: u64,
    last_sent: Instant,
    received_bytes: u64,
    sent_bytes: u64,
}

struct Slot {
    tunnel: Box<dyn Tunnel>,
    /// Lowest bit of its number.
    odd: bool,
    established: Option<Instant>,
}

/// What a datagram from the peer was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// A packet of this length is in the buffer.
    Packet(usize),
    /// A message of the protocol itself.
    Control,
}

/// Session and address to send with, looked up once for a batch of packets.
pub struct Sender<'a> {
    tunnel: Option<&'a mut Box<dyn Tunnel>>,
    staged: &'a mut VecDeque<(Instant, Vec<u8>)>,
    sent_bytes: &'a mut u64,
    to: SocketAddr,
    now: Instant,
}

impl Peer {
    /// A peer without a session. `number` is even and below 2^24; it and the next are the peer's.
    pub fn new(now: Instant, gate: &Gate, config: &PeerConfig, number: u32) -> Self {
        let key = config.public_key;
        let preshared = config.preshared_key;
        let tunnel = gate.tunnel(key, preshared, number);
        let mut peer = Self {
            key,
            number,
            preshared,
            current: Slot { tunnel, odd: false, established: None },
            previous: None,
            places: Places::default(),
            keepalive: None,
            staged: VecDeque::new(),
            unanswered: 0,
            next_initiation: now,
            next_trial: now,
            direct_answers: 0,
            last_sent: now,
            received_bytes: 0,
            sent_bytes: 0,
        };
        peer.reconfigure(now, gate, config);
        peer
    }

    /// Takes over a changed configuration. Sessions survive, also a change of the pre-shared key.
    pub fn reconfigure(&mut self, now: Instant, gate: &Gate, config: &PeerConfig) {
        self.keepalive = config
            .persistent_keepalive_secs
            .filter(|&s| s > 0)
            .map(|s| Duration::from_secs(s.into()));
        let live = self.has_session();
        if self.places.reconfigure(&config.endpoints, live) {
            self.unanswered = 0;
            self.next_initiation = now;
        }
        if self.places.set_relay(config.relay) {
            (self.direct_answers, self.unanswered) = (0, 0);
            self.next_initiation = now;
            self.next_trial = now + DIRECT_TRIALS + self.stagger(DIRECT_TRIALS);
        }
        if self.preshared != config.preshared_key {
            self.preshared = config.preshared_key;
            let odd = !self.current.odd;
            let tunnel = gate.tunnel(self.key, self.preshared, self.number | u32::from(odd));
            let old = std::mem::replace(&mut self.current, Slot { tunnel, odd, established: None });
            self.previous = Some(old);
            self.unanswered = 0;
            self.next_initiation = now;
        }
    }

    /// Starts to send packets. Without a session they are staged and a handshake is under way.
    pub fn sender(&mut self, now: Instant, outbox: &mut Outbox) -> Result<Sender<'_>, DropReason> {
        let Some(to) = self.places.current() else { return Err(DropReason::NoEndpoint) };
        let on_current = self.current.tunnel.has_session();
        let on_previous =
            !on_current && self.previous.as_ref().is_some_and(|p| p.tunnel.has_session());
        if !on_current && !on_previous && now >= self.next_initiation {
            self.initiate(now, outbox);
        }
        self.last_sent = now;
        let tunnel = match &mut self.previous {
            _ if on_current => Some(&mut self.current.tunnel),
            Some(previous) if on_previous => Some(&mut previous.tunnel),
            _ => None,
        };
        let (staged, sent_bytes) = (&mut self.staged, &mut self.sent_bytes);
        Ok(Sender { tunnel, staged, sent_bytes, to, now })
    }

    /// Takes a datagram for the tunnel `number`; a packet in it ends in `plain`, which is as long as the datagram.
    pub fn receive(
        &mut self,
        now: Instant,
        number: u32,
        (source, datagram): (SocketAddr, &[u8]),
        plain: &mut [u8],
        outbox: &mut Outbox,
    ) -> Result<Received, DropReason> {
        let on_current = self.current.odd == (number & 1 == 1);
        let slot = match &mut self.previous {
            _ if on_current => &mut self.current,
            Some(previous) => previous,
            None => return Err(DropReason::UnknownSession),
        };
        let opened = slot.tunnel.open(source.ip(), datagram, plain);
        let (reply, received) = match opened {
            Opened::Packet(len) => {
                self.received_bytes += len as u64;
                self.heard(now, source, on_current);
                (0, Received::Packet(len))
            }
            Opened::Keepalive => {
                self.heard(now, source, on_current);
                (0, Received::Control)
            }
            Opened::Initiation(len) => {
                // It proves where the peer is, not that it hears us: a session comes with its next message.
                self.places.learn(now, source);
                self.next_initiation = self.next_initiation.max(now + RETRIES[0]);
                (len, Received::Control)
            }
            Opened::Response(len) => {
                slot.established = Some(now);
                self.direct_answers += u64::from(self.places.past_relay(source));
                self.heard(now, source, on_current);
                (len, Received::Control)
            }
            Opened::Cookie(len) => (len, Received::Control),
            Opened::Dropped(reason) => return Err(reason),
        };
        if reply > 0 {
            post(outbox, source, &plain[..reply]);
        }
        if !self.staged.is_empty() {
            self.send_staged(now, outbox);
        }
        Ok(received)
    }

    /// Lets time pass: handshakes that are due, keepalives, what has waited too long. Returns packets dropped.
    pub fn tick(&mut self, now: Instant, outbox: &mut Outbox) -> usize {
        let mut message = [0; INITIATION_BYTES];
        if let Some(len) = self.current.tunnel.tick(&mut message) {
            self.post_timed(now, &message[..len], outbox);
        }
        self.retire_previous(now);
        self.try_direct(now, outbox);
        if !self.current.tunnel.has_session() {
            self.tick_previous(now, outbox);
            if now >= self.next_initiation {
                self.initiate(now, outbox);
            }
        } else if self
            .keepalive
            .is_some_and(|every| now.saturating_duration_since(self.last_sent) >= every)
        {
            self.announce(now, outbox);
        }
        let before = self.staged.len();
        self.staged.retain(|(since, _)| now.saturating_duration_since(*since) < STAGED_FOR);
        before - self.staged.len()
    }

    /// Sends a handshake initiation, to the next endpoint when the one in use does not answer.
    pub fn initiate(&mut self, now: Instant, outbox: &mut Outbox) {
        let mut message = [0; INITIATION_BYTES];
        if self.places.current().is_some()
            && let Some(len) = self.current.tunnel.initiate(&mut message)
        {
            self.post_timed(now, &message[..len], outbox);
        }
    }

    /// Sends a keepalive, if there is a session: the peer learns from it where this node is.
    pub fn announce(&mut self, now: Instant, outbox: &mut Outbox) {
        if self.has_session()
            && let Ok(mut sender) = self.sender(now, outbox)
        {
            let _ = sender.send(&[], outbox);
        }
    }

    /// Whether packets can be sent to it now.
    pub fn has_session(&self) -> bool {
        self.current.tunnel.has_session()
            || self.previous.as_ref().is_some_and(|p| p.tunnel.has_session())
    }

    /// Age of the session in use.
    pub fn session_age(&self) -> Option<Duration> {
        let previous = || self.previous.as_ref().and_then(|p| p.tunnel.session_age());
        self.current.tunnel.session_age().or_else(previous)
    }

    /// Its public key.
    pub fn key(&self) -> WgKey {
        self.key
    }

    /// Number by which initiations reach the tunnel in use.
    pub fn current_number(&self) -> u32 {
        self.number | u32::from(self.current.odd)
    }

    /// Where it was heard last, or is looked for.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.places.current()
    }

    /// Initiations since the peer proved that it hears us.
    pub fn unanswered(&self) -> u32 {
        self.unanswered
    }

    /// Handshakes that it answered past the relay.
    pub fn direct_answers(&self) -> u64 {
        self.direct_answers
    }

    /// Bytes of packets, inside the tunnel: received, sent.
    pub fn traffic_bytes(&self) -> (u64, u64) {
        (self.received_bytes, self.sent_bytes)
    }

    fn heard(&mut self, now: Instant, source: SocketAddr, on_current: bool) {
        if on_current {
            // What the tunnel of the old pre-shared key hears says nothing about handshakes with the new one.
            self.unanswered = 0;
            self.next_initiation = now;
        }
        self.places.learn(now, source);
    }

    /// Posts a message that a timer of the tunnel wrote.
    fn post_timed(&mut self, now: Instant, message: &[u8], outbox: &mut Outbox) {
        if is_initiation(message) {
            let patience = if self.has_session() { PATIENCE_IN_SESSION } else { 1 };
            if self.unanswered >= patience {
                self.places.try_next();
            }
            self.unanswered = self.unanswered.saturating_add(1);
            let pause = RETRIES[(self.unanswered as usize).min(RETRIES.len()) - 1];
            self.next_initiation = now + pause + self.stagger(pause);
        }
        if let Some(to) = self.places.current() {
            self.last_sent = now;
            post(outbox, to, message);
        }
    }

    /// Beside a relay, calls the peer at its own endpoints in turn. The session in use does not notice; the answer
    /// proves that both directions work.
    fn try_direct(&mut self, now: Instant, outbox: &mut Outbox) {
        if now < self.next_trial {
            return;
        }
        let Some(to) = self.places.next_past_relay() else { return };
        self.next_trial = now + DIRECT_TRIALS + self.stagger(DIRECT_TRIALS);
        let mut message = [0; INITIATION_BYTES];
        if let Some(len) = self.current.tunnel.initiate(&mut message) {
            post(outbox, to, &message[..len]);
        }
    }

    fn send_staged(&mut self, now: Instant, outbox: &mut Outbox) {
        if !self.has_session() {
            return;
        }
        let mut staged = std::mem::take(&mut self.staged);
        if let Ok(mut sender) = self.sender(now, outbox) {
            for (_, packet) in staged.drain(..) {
                let _ = sender.send(&packet, outbox);
            }
        }
        self.staged = staged;
    }

    /// The other side may learn of the new pre-shared key late: until then the old tunnel has to renew its session.
    fn tick_previous(&mut self, now: Instant, outbox: &mut Outbox) {
        let mut message = [0; INITIATION_BYTES];
        if let (Some(previous), Some(to)) = (&mut self.previous, self.places.current())
            && let Some(len) = previous.tunnel.tick(&mut message)
        {
            self.last_sent = now;
            post(outbox, to, &message[..len]);
        }
    }

    fn retire_previous(&mut self, now: Instant) {
        if self.previous.is_none() || !self.current.tunnel.has_session() {
            return;
        }
        let since = *self.current.established.get_or_insert(now);
        if now.saturating_duration_since(since) >= OVERLAP {
            self.previous = None;
        }
    }

    /// Up to a fifth of the pause, different for each peer and attempt: the two sides and the peers of a node
    /// shall not keep calling in step.
    fn stagger(&self, pause: Duration) -> Duration {
        let mixed = self
            .key
            .0
            .iter()
            .fold(self.unanswered, |h, &b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
        pause / 5 * (mixed >> 24) / 256
    }
}

impl Sender<'_> {
    /// Seals a padded packet into the outbox, or stages it while there is no session.
    pub fn send(&mut self, packet: &[u8], outbox: &mut Outbox) -> Result<(), DropReason> {
        let Some(tunnel) = &mut self.tunnel else { return self.stage(packet) };
        let room = (packet.len() + SEAL_OVERHEAD).max(INITIATION_BYTES);
        let out = outbox.room(room).ok_or(DropReason::QueueFull)?;
        let len = tunnel.seal(packet, out).ok_or(DropReason::UnknownSession)?;
        outbox.commit(self.to, len);
        *self.sent_bytes += packet.len() as u64;
        Ok(())
    }

    fn stage(&mut self, packet: &[u8]) -> Result<(), DropReason> {
        if packet.is_empty() {
            return Ok(()); // the handshake does what a keepalive would
        }
        if self.staged.len() >= STAGED_PACKETS {
            return Err(DropReason::QueueFull);
        }
        self.staged.push_back((self.now, packet.to_vec()));
        Ok(())
    }
}

fn post(outbox: &mut Outbox, to: SocketAddr, message: &[u8]) {
    if let Some(room) = outbox.room(message.len()) {
        room[..message.len()].copy_from_slice(message);
        outbox.commit(to, message.len());
    }
}
