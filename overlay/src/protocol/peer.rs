//! One peer: its sessions, where it is, what waits for it.
//!
//! Packets meet only the [`Link`]; what is here happens when sessions, endpoints or timers change, under a lock.

pub mod keyring;
pub mod link;
pub mod path_mtu;
mod places;
mod secrets;
pub mod staging;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;

use self::keyring::Keyring;
use self::link::{Link, Route};
use self::path_mtu::PathMtu;
use self::places::Places;
use self::secrets::Secrets;
use self::staging::Staging;
use super::ecn::Ecn;
use super::estate::{Moment, PeerEstate, Secret};
use super::gate::{Gate, Identities, Identity};
use super::noise::cookie::{Jar, Macs};
use super::noise::message::{COOKIE_BYTES, RESPONSE_BYTES, SEAL_OVERHEAD, word};
use super::noise::session::{REJECT_AFTER, REKEY_AFTER, REKEY_AFTER_MESSAGES};
use super::noise::{Call, Offer, Psk, Session, Tai64n};
use super::outbox::{Outbox, Way};
use super::probe::Message as ProbeMessage;
use crate::config::PeerConfig;
use crate::mtu::FLOOR;
use crate::status::DropReason;

/// Pauses between initiations; the last one repeats. Shorter at first than WG section 6.1 says, so that a lost message
/// or a dead endpoint does not cost a join its two seconds.
const RETRIES: [Duration; 6] = [
    Duration::from_millis(250),
    Duration::from_millis(350),
    Duration::from_millis(600),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];

/// Offers that may still be answered: where a round trip takes longer than the pauses, it is an older one.
const OFFERS: usize = 3;

/// How often the endpoints of a peer behind a relay are tried: a handshake each, which costs the session in use nothing.
const DIRECT_TRIALS: Duration = Duration::from_secs(7);

/// Pauses between calls by a key that a peer may not know yet; the last one repeats.
const INTRODUCTIONS: [Duration; 5] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(10),
    Duration::from_secs(30),
];

/// Unanswered initiations after which another endpoint is tried while the session still lives.
const PATIENCE_IN_SESSION: u32 = 2;

/// Silence after which a keepalive answers data, and after how much more data calls for a new session (WG section 6.5).
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(15);

/// Age at which the caller renews a session that only the other side uses (WG section 6.2).
const REKEY_ON_RECEIVING: Duration = REJECT_AFTER.saturating_sub(SILENCE);

/// Initiations of one peer are not answered in a shorter time than this.
const CALL_PAUSE: Duration = Duration::from_millis(20);

/// Where a peer is, and with what it speaks. Not shared: callers hold the lock around it.
pub struct Peer {
    key: WgKey,
    /// The key that takes over, by which it is called.
    next_key: Option<WgKey>,
    /// Keys of ours that it has proved to know, other than the one that all know.
    introduced: Option<WgKey>,
    /// When it is called by our next key to find out whether it knows it, and how often it was.
    next_introduction: Instant,
    introductions: u32,
    /// Below 2^24; the upper bits of all indices that the peer is told.
    number: u32,
    last_index: u8,
    /// For messages to the key that was addressed last.
    macs: (WgKey, Macs),
    jar: Jar,
    secrets: Secrets,
    link: Arc<Link>,
    keyring: Keyring,
    /// Which pre-shared key is in the session that waits for the peer to use it.
    answered_with: Psk,
    offers: VecDeque<Offered>,
    /// When both sides call at once, one call is enough: that of the side with the smaller key.
    yields: bool,
    /// It has called since our last call.
    yielded: bool,
    /// Of the newest call.
    last_stamp: Tai64n,
    last_call: Option<Instant>,
    places: Places,
    path_mtu: PathMtu,
    keepalive: Option<Duration>,
    /// It has answered since it was told where to look for the peer: from then on it is called for a reason only.
    met: bool,
    staged: Staging,
    /// Initiations since a session was wanted.
    attempts: u32,
    /// Initiations since the peer was heard, as of the last one.
    unanswered: u32,
    last_initiation: Instant,
    /// No initiation before this time.
    next_initiation: Instant,
    /// When an endpoint is tried beside the relay.
    next_trial: Instant,
    direct_answers: u64,
}

/// A call of ours that waits for its answer.
struct Offered {
    offer: Offer,
    psk: Psk,
    /// Our next key, when it was made with that one.
    introduces: Option<WgKey>,
}

impl Peer {
    /// A peer without a session. All indices that it is told begin with `number`, which is below 2^24.
    pub fn new(now: Instant, gate: &Gate, config: &PeerConfig, number: u32) -> Self {
        let key = config.keys()[0];
        let mut peer = Self {
            key,
            next_key: None,
            introduced: None,
            next_introduction: now,
            introductions: 0,
            number,
            last_index: 0,
            macs: (key, Macs::for_receiver(&key)),
            jar: Jar::default(),
            secrets: Secrets::new(config.preshared_key),
            link: Arc::new(Link::new(now)),
            keyring: Keyring::default(),
            answered_with: Psk::default(),
            offers: VecDeque::new(),
            yields: key < gate.public(),
            yielded: false,
            last_stamp: Tai64n::default(),
            last_call: None,
            places: Places::default(),
            path_mtu: PathMtu::new(now, FLOOR),
            keepalive: None,
            met: false,
            staged: Staging::new(gate.account()),
            attempts: 0,
            unanswered: 0,
            last_initiation: now,
            next_initiation: now,
            next_trial: now,
            direct_answers: 0,
        };
        peer.reconfigure(now, config);
        peer
    }

    /// Leaves all to a successor: from now on nothing is sealed for this peer here.
    pub fn leave(&self, left: Instant, name: WgKey) -> PeerEstate {
        let moment = |at| Moment::new(left, at);
        PeerEstate {
            name,
            introduced: self.introduced,
            number: self.number,
            last_index: self.last_index,
            path_mtu: self.path_mtu.leave(),
            sessions: self.keyring.leave(left),
            answered_with: Secret::new(self.answered_with),
            last_call_stamp: Secret::new(self.last_stamp.0),
            last_call: self.last_call.map(moment),
            cookie: self.jar.leave().map(|(cookie, since)| (Secret::new(cookie), moment(since))),
            secrets: self.secrets.leave(left),
            places: self.places.leave(left),
            activity: self.link.activity.leave(left),
            yielded: self.yielded,
            met: self.met,
            unanswered: self.unanswered,
            last_initiation: moment(self.last_initiation),
            // An answer that is under way would not be understood: it is asked again at once.
            next_initiation: if self.offers.is_empty() {
                moment(self.next_initiation)
            } else {
                moment(left)
            },
            next_trial: moment(self.next_trial),
            direct_answers: self.direct_answers,
        }
    }

    /// A peer as another process [left](Self::leave) it, when the clock showed `left`.
    pub fn resume(left: Instant, gate: &Gate, config: &PeerConfig, estate: PeerEstate) -> Self {
        let at = |moment: Moment| moment.after(left);
        let cookie = estate.cookie.as_ref().and_then(|(c, since)| Some((*c.bytes(), at(*since)?)));
        let mut peer = Self {
            last_index: estate.last_index,
            introduced: estate.introduced,
            jar: Jar::resume(cookie),
            secrets: Secrets::resume(left, &estate.secrets),
            link: Arc::new(Link::resume(left, &estate.activity)),
            keyring: Keyring::resume(left, estate.sessions),
            answered_with: *estate.answered_with.bytes(),
            yielded: estate.yielded,
            met: estate.met,
            last_stamp: Tai64n(*estate.last_call_stamp.bytes()),
            last_call: estate.last_call.and_then(at),
            places: Places::resume(left, &estate.places),
            unanswered: estate.unanswered,
            last_initiation: at(estate.last_initiation).unwrap_or(left),
            next_initiation: at(estate.next_initiation).unwrap_or(left),
            next_trial: at(estate.next_trial).unwrap_or(left),
            direct_answers: estate.direct_answers,
            ..Self::new(left, gate, config, estate.number)
        };
        peer.path_mtu = PathMtu::resume(left, &estate.path_mtu, peer.endpoint());
        peer.link.set_narrow(peer.path_mtu.narrow());
        peer.publish(left);
        peer
    }

    /// What packets need of it.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Takes over a changed configuration. Sessions survive, also a change of the pre-shared key.
    pub fn reconfigure(&mut self, now: Instant, config: &PeerConfig) {
        let keys = config.keys();
        (self.key, self.next_key) = (keys[0], keys.get(1).copied());
        let seconds = config.persistent_keepalive_secs.filter(|&s| s > 0);
        self.keepalive = seconds.map(|s| Duration::from_secs(s.into()));
        let live = self.keyring.current(now).is_some();
        let moved = self.places.reconfigure(&config.endpoints, live);
        let relayed = self.places.set_relay(config.relay);
        if relayed {
            self.direct_answers = 0;
            self.next_trial = now + DIRECT_TRIALS + self.stagger(DIRECT_TRIALS);
        }
        let rekeyed = self.secrets.replace(config.preshared_key, config.former_preshared_key);
        self.met &= !moved && !relayed;
        if moved || relayed || rekeyed {
            self.unanswered = 0;
            self.attempts = 0;
            self.next_initiation = now;
            self.last_initiation = now;
        }
        self.publish(now);
    }

    /// The device carries packets of this size.
    pub fn set_device_mtu(&mut self, now: Instant, mtu: u16) {
        self.path_mtu.set_ceiling(now, mtu);
        self.link.set_narrow(self.path_mtu.narrow());
    }

    /// The system refuses to send what is larger than these packets on the way to the peer.
    pub fn limit_mtu(&mut self, now: Instant, fits: u16) {
        self.path_mtu.limit(now, fits);
        self.link.set_narrow(self.path_mtu.narrow());
    }

    /// The system has heard that the way to the peer carries packets of this size.
    pub fn hint_mtu(&mut self, now: Instant, fits: u16) {
        self.path_mtu.hint(now, fits);
    }

    /// Largest packets to the peer, in bytes.
    pub fn mtu(&self) -> u16 {
        self.path_mtu.mtu()
    }

    /// What came in the place of a packet, authentic.
    pub fn probed(&mut self, now: Instant, message: ProbeMessage, outbox: &mut Outbox) {
        match message {
            ProbeMessage::Probe(probe) => {
                self.say(now, &ProbeMessage::Acknowledgement(probe).write(), outbox);
            }
            ProbeMessage::Acknowledgement(probe) => {
                self.path_mtu.acknowledged(now, probe);
                self.link.set_narrow(self.path_mtu.narrow());
            }
        }
    }

    /// How to send packets. None without a session: they are to be staged, and a handshake is under way.
    pub fn prepare(
        &mut self,
        now: Instant,
        gate: &Gate,
        outbox: &mut Outbox,
    ) -> Result<Option<Arc<Route>>, DropReason> {
        if self.places.current().is_none() {
            return Err(DropReason::NoEndpoint);
        }
        let route = self.link.route(now);
        if route.is_none() && now >= self.next_initiation {
            self.initiate(now, gate, outbox);
        }
        Ok(route)
    }

    /// Keeps a packet until there is a session.
    pub fn stage(&mut self, now: Instant, packet: &[u8]) -> Result<(), DropReason> {
        if self.staged.push(now, packet) { Ok(()) } else { Err(DropReason::QueueFull) }
    }

    /// An authentic message came from there: the session is in use, and the peer is where it came from.
    pub fn heard(&mut self, now: Instant, session: &Arc<Session>, back: Way, outbox: &mut Outbox) {
        if self.keyring.confirm(session) {
            let psk = self.answered_with;
            self.agreed(now, &psk);
        }
        self.link.activity.received(now, 0);
        self.places.learn(now, back);
        self.publish(now);
        self.send_staged(now, outbox);
    }

    /// Answers a call of the peer; the session counts only when the peer uses it.
    pub fn answer(
        &mut self,
        now: Instant,
        back: Way,
        call: Call,
        gate: &Gate,
        outbox: &mut Outbox,
    ) -> Result<(), DropReason> {
        if call.stamp() <= self.last_stamp {
            return Err(DropReason::Replayed);
        }
        if self.last_call.is_some_and(|at| now.saturating_duration_since(at) < CALL_PAUSE) {
            return Err(DropReason::UnderLoad);
        }
        (self.last_stamp, self.last_call) = (call.stamp(), Some(now));
        self.yielded = self.yields;
        // It proves who calls, and by which key.
        if gate.identities().next().is_some_and(|next| next.public() == call.callee()) {
            self.introduced = Some(call.callee());
        }
        let caller = call.caller();
        let (psk, index) = (self.secrets.for_answer(), self.unused_index());
        let (agreement, mut response) = call.answer(&psk, index).ok_or(DropReason::BadHandshake)?;
        self.answered_with = psk;
        self.keyring.answered(Session::as_callee(now, &agreement));
        // It proves who calls, not from where: whoever has recorded a call can send it again. The session's first message
        // will tell; only a peer that has no endpoint at all is believed.
        if self.places.current().is_none() {
            self.places.learn(now, back);
        }
        self.publish(now);
        self.sign(now, caller, &mut response);
        self.next_initiation = self.next_initiation.max(now + RETRIES[0]);
        post(outbox, back, &response);
        Ok(())
    }

    /// Takes the response to a call of ours, and confirms the session with what waits for it, or a keepalive.
    pub fn accept(
        &mut self,
        now: Instant,
        back: Way,
        response: &[u8; RESPONSE_BYTES],
        outbox: &mut Outbox,
    ) -> Result<(), DropReason> {
        let index = word(response, 8);
        let place = self.offers.iter().position(|offered| offered.offer.index() == index);
        let offered = &mut self.offers[place.ok_or(DropReason::UnknownSession)?];
        if self.yielded {
            return Ok(());
        }
        let agreement = offered.offer.accept(response).ok_or(DropReason::BadHandshake)?;
        let psk = offered.psk;
        self.introduced = offered.introduces.or(self.introduced);
        self.offers.clear();
        self.direct_answers += u64::from(self.places.past_relay(back.to));
        self.keyring.called(Session::as_caller(now, &agreement));
        self.agreed(now, &psk);
        self.link.activity.received(now, 0);
        self.places.learn(now, back);
        self.publish(now);
        if self.staged.is_empty() {
            self.announce(now, outbox);
        } else {
            self.send_staged(now, outbox);
        }
        Ok(())
    }

    /// Takes a cookie: the next call shows it.
    pub fn keep_cookie(
        &mut self,
        now: Instant,
        reply: &[u8; COOKIE_BYTES],
    ) -> Result<(), DropReason> {
        let index = word(reply, 4);
        let known = self.offers.iter().any(|offered| offered.offer.index() == index)
            || self.keyring.find(index).is_some();
        if !known || !self.jar.keep(now, &self.macs.1, reply) {
            return Err(DropReason::UnknownSession);
        }
        Ok(())
    }

    /// Lets time pass: handshakes that are due, keepalives, what has waited too long. Returns packets dropped.
    pub fn tick(&mut self, now: Instant, gate: &Gate, outbox: &mut Outbox) -> usize {
        if self.keyring.expire(now) {
            self.publish(now);
        }
        self.secrets.retire(now);
        self.try_direct(now, gate, outbox);
        self.introduce(now, gate, outbox);
        if self.wants_session(now) {
            if now >= self.next_initiation {
                self.initiate(now, gate, outbox);
            }
        } else {
            self.attempts = 0;
        }
        let activity = &self.link.activity;
        let owes = activity.owing_for(now) >= KEEPALIVE_AFTER;
        if owes || self.keepalive.is_some_and(|every| activity.silent_for(now) >= every) {
            self.announce(now, outbox);
        }
        self.send_staged(now, outbox);
        self.probe_way(now, outbox);
        self.staged.expire(now)
    }

    /// Sends a keepalive, if there is a session: the peer learns from it where this node is.
    pub fn announce(&mut self, now: Instant, outbox: &mut Outbox) {
        self.say(now, &[], outbox);
    }

    /// Sends what is no packet, if there is a session.
    fn say(&self, now: Instant, message: &[u8], outbox: &mut Outbox) {
        if let Some(route) = self.link.route(now)
            && seal(&route, message, outbox).is_ok()
        {
            self.link.activity.sent(now, 0);
        }
    }

    /// Age of the session in use.
    pub fn session_age(&self, now: Instant) -> Option<Duration> {
        let session = self.keyring.current(now)?;
        Some(now.saturating_duration_since(session.created()))
    }

    /// Whether it has proved to know the key that takes over, if there is one.
    pub fn knows_next_key(&self, gate: &Gate) -> bool {
        gate.identities().next().is_some_and(|next| self.introduced == Some(next.public()))
    }

    /// Whether a handshake with the present pre-shared key has succeeded.
    pub fn preshared_agreed(&self) -> bool {
        self.secrets.is_agreed()
    }

    /// Where it was heard last, or is looked for.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.places.current().map(|way| way.to)
    }

    /// Initiations since the peer proved that it hears us.
    pub fn unanswered(&self) -> u32 {
        if self.link.activity.heard_since(self.last_initiation) { 0 } else { self.unanswered }
    }

    /// Handshakes that it answered past the relay.
    pub fn direct_answers(&self) -> u64 {
        self.direct_answers
    }

    /// Bytes of packets, inside the tunnel: received, sent.
    pub fn traffic_bytes(&self) -> (u64, u64) {
        self.link.activity.bytes()
    }

    /// Whether there is a reason for a handshake (WG sections 6.2 to 6.5).
    fn wants_session(&self, now: Instant) -> bool {
        let kept = self.keepalive.is_some();
        let Some(session) = self.keyring.current(now) else {
            return !self.met || kept || !self.staged.is_empty();
        };
        let age = now.saturating_duration_since(session.created());
        let activity = &self.link.activity;
        let sent = kept || activity.data_sent_since(session.created());
        let received = activity.data_received_since(session.created());
        session.is_caller() && (age >= REKEY_AFTER && sent || age >= REKEY_ON_RECEIVING && received)
            || kept && age >= REKEY_ON_RECEIVING
            || session.messages() >= REKEY_AFTER_MESSAGES
            || activity.waiting_for(now) >= SILENCE
            || self.secrets.is_pending()
    }

    /// Sends a handshake initiation, to the next endpoint when the one in use does not answer.
    fn initiate(&mut self, now: Instant, gate: &Gate, outbox: &mut Outbox) {
        let session = self.keyring.current(now);
        let patience = if session.is_some() { PATIENCE_IN_SESSION } else { 1 };
        let fresh = |session: &Arc<Session>| now < session.created() + REKEY_AFTER;
        let badly = !session.is_some_and(fresh);
        self.unanswered = self.unanswered();
        if self.unanswered >= patience {
            self.places.try_next();
            self.publish(now);
        }
        let pause = RETRIES[(self.attempts as usize).min(RETRIES.len() - 1)];
        self.next_initiation = now + pause + self.stagger(pause);
        let psk = self.secrets.for_call(self.attempts, badly);
        let Some(to) = self.places.current() else { return };
        // Its next key was published after it had it, so that the other one is a last resort.
        let key = self.next_key.filter(|_| !badly || self.attempts & 2 == 0).unwrap_or(self.key);
        let identities = gate.identities();
        let own = self.familiar(&identities);
        if self.call(now, gate, (own, key, &psk), to, outbox) {
            self.attempts = self.attempts.saturating_add(1);
            self.unanswered = self.unanswered.saturating_add(1);
            self.last_initiation = now;
        }
    }

    /// Beside a relay, calls the peer at its own endpoints in turn. The session in use does not notice; the answer
    /// proves that both directions work.
    fn try_direct(&mut self, now: Instant, gate: &Gate, outbox: &mut Outbox) {
        if now < self.next_trial {
            return;
        }
        let Some(to) = self.places.next_past_relay() else { return };
        self.next_trial = now + DIRECT_TRIALS + self.stagger(DIRECT_TRIALS);
        let psk = self.secrets.for_call(0, false);
        let (identities, key) = (gate.identities(), self.next_key.unwrap_or(self.key));
        let own = self.familiar(&identities);
        self.call(now, gate, (own, key, &psk), to.into(), outbox);
    }

    /// Our key that it is known to know.
    fn familiar<'i>(&self, identities: &'i Identities) -> &'i Identity {
        let next = identities.next().filter(|next| self.introduced == Some(next.public()));
        next.unwrap_or(identities.present())
    }

    /// Calls it by our next key, beside the session in use: its answer proves that it has learned of it. Silence
    /// costs nothing.
    fn introduce(&mut self, now: Instant, gate: &Gate, outbox: &mut Outbox) {
        let identities = gate.identities();
        self.yields = self.key < identities.present().public();
        let Some(next) = identities.next().filter(|next| self.introduced != Some(next.public()))
        else {
            self.introductions = 0;
            return;
        };
        let (Some(to), true) = (self.places.current(), self.keyring.current(now).is_some()) else {
            return;
        };
        // A handshake that is due goes first: both at once would be in each other's way.
        if now < self.next_introduction || self.wants_session(now) {
            return;
        }
        let pause = INTRODUCTIONS[(self.introductions as usize).min(INTRODUCTIONS.len() - 1)];
        self.next_introduction = now + pause + self.stagger(pause);
        self.introductions = self.introductions.saturating_add(1);
        let psk = self.secrets.for_call(0, false);
        let key = self.next_key.unwrap_or(self.key);
        self.call(now, gate, (next, key, &psk), to, outbox);
    }

    /// Completes a message to one of its keys.
    fn sign(&mut self, now: Instant, to: WgKey, message: &mut [u8]) {
        if self.macs.0 != to {
            self.macs = (to, Macs::for_receiver(&to));
        }
        self.jar.sign(now, &self.macs.1, message);
    }

    /// Sends an initiation there, from one of our keys to one of its own.
    fn call(
        &mut self,
        now: Instant,
        gate: &Gate,
        (own, key, psk): (&Identity, WgKey, &Psk),
        to: Way,
        outbox: &mut Outbox,
    ) -> bool {
        let (index, stamp) = (self.unused_index(), gate.stamps().next(now));
        let offered = Offer::make(own.key(), &key, psk, index, stamp);
        let Some((offer, mut initiation)) = offered else { return false };
        self.sign(now, key, &mut initiation);
        self.offers.truncate(OFFERS - 1);
        let introduces = Some(own.public()).filter(|key| *key != gate.public());
        self.offers.push_front(Offered { offer, psk: *psk, introduces });
        self.yielded = false;
        post(outbox, to, &initiation);
        true
    }

    /// Tests how much the way carries.
    fn probe_way(&mut self, now: Instant, outbox: &mut Outbox) {
        if self.link.route(now).is_none() {
            return self.path_mtu.interrupt(now);
        }
        let large = self.link.take_large();
        for probe in self.path_mtu.poll(now, large).into_iter().flatten() {
            self.say(now, &ProbeMessage::Probe(probe).write(), outbox);
        }
        self.link.set_narrow(self.path_mtu.narrow());
    }

    fn agreed(&mut self, now: Instant, psk: &Psk) {
        self.secrets.agreed(now, psk);
        self.attempts = 0;
        self.met = true;
    }

    fn publish(&mut self, now: Instant) {
        let session = self.keyring.current(now).cloned();
        if session.is_some() {
            self.path_mtu.set_way(now, self.endpoint());
        }
        let route = session.zip(self.places.current()).map(|(session, way)| Route { session, way });
        self.link.publish(route, &self.keyring);
    }

    fn send_staged(&mut self, now: Instant, outbox: &mut Outbox) {
        if self.staged.is_empty() {
            return;
        }
        let Some(route) = self.link.route(now) else { return };
        let mut bytes = 0;
        while let Some(packet) = self.staged.pop() {
            if seal(&route, &packet, outbox).is_ok() {
                bytes += packet.len() as u64;
            }
        }
        self.link.activity.sent(now, bytes);
    }

    /// An index that names nothing yet: sessions and offers together are far fewer than 256.
    fn unused_index(&mut self) -> u32 {
        loop {
            self.last_index = self.last_index.wrapping_add(1);
            let index = self.number << 8 | u32::from(self.last_index);
            let offered = self.offers.iter().any(|offered| offered.offer.index() == index);
            if !offered && self.keyring.find(index).is_none() {
                return index;
            }
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

/// Seals a padded packet into the outbox, or a keepalive when it is empty. The only way from a packet to a datagram.
pub fn seal(route: &Route, packet: &[u8], outbox: &mut Outbox) -> Result<(), DropReason> {
    let room = outbox.room(packet.len() + SEAL_OVERHEAD).ok_or(DropReason::QueueFull)?;
    let len = route.session.seal(packet, room).ok_or(DropReason::UnknownSession)?;
    outbox.commit(route.way, Ecn::of(packet), len);
    Ok(())
}

fn post(outbox: &mut Outbox, way: Way, message: &[u8]) {
    if let Some(room) = outbox.room(message.len()) {
        room[..message.len()].copy_from_slice(message);
        outbox.commit(way, Ecn::NotCapable, message.len());
    }
}
