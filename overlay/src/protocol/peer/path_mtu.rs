//! How large packets to a peer may be: probes that the peer acknowledges, in the manner of RFC 8899.
//!
//! A probe is a message inside the tunnel that is no packet ([`probe`](super::super::probe)), as large as the packets whose
//! way it tests; underneath it is a datagram that may not be cut up. At first the way is taken to carry what the device
//! does, and is tested at once. While large packets are sent it is tested every few seconds. When large probes get lost
//! and small ones do not, the way has become narrower, whether anybody says so or not. What the system has heard from
//! routers (ICMP) is where to look first, and nothing more: it takes probes to be believed. Pure: no clock, no I/O.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::mtu::FLOOR;
use crate::protocol::estate::PathMtuEstate;

/// Packets of this size and above need a way that is wide enough.
pub const LARGE: usize = 1200;

/// Pause between tests of a way that large packets take.
const CONFIRM_EVERY: Duration = Duration::from_secs(3);
/// Pause before it is seen whether a narrow way has become wider.
const RAISE_EVERY: Duration = Duration::from_secs(60);
/// Pauses after tests that the peer says nothing to at all; doubled each time.
const UNANSWERED_PAUSE: Duration = Duration::from_secs(10);
const UNANSWERED_DOUBLED: u32 = 6;
/// Probes of one size: before a way counts as narrower, before a router is believed, before a size counts as too large.
const CONFIRM_TRIES: u32 = 4;
const HINTED_TRIES: u32 = 2;
const SEARCH_TRIES: u32 = 3;
/// Time that an acknowledgement has: twice the round trip and a bit, within these. Busy machines are slow.
const SHORTEST_WAIT: Duration = Duration::from_millis(300);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Lowest bits of a probe's number: which of the tries it was.
const TRY_BITS: u32 = 3;
/// The search ends within so many bytes.
const STEP: u16 = 16;

/// What is known about the way to a peer.
#[derive(Debug)]
pub struct PathMtu {
    /// What the device carries.
    ceiling: u16,
    /// Largest packets to the peer.
    mtu: u16,
    way: Option<SocketAddr>,
    /// The largest size known to fit, and the smallest one known not to.
    fits: u16,
    too_large: u16,
    /// What the system said last.
    hint: u16,
    round: Option<Round>,
    number: u32,
    /// The way is new, and to be tested also without large packets.
    fresh: bool,
    /// Large packets were sent since the last test.
    large: bool,
    next_test: Instant,
    next_raise: Instant,
    unanswered: u32,
    round_trip: Option<Duration>,
}

/// Probes of one size that wait for an acknowledgement.
#[derive(Debug)]
struct Round {
    purpose: Purpose,
    size: u16,
    /// A smaller size that tells a narrow way from a broken one; whether that was acknowledged.
    smaller: u16,
    smaller_fits: bool,
    tries: u32,
    /// When each of the tries left.
    sent: [Instant; CONFIRM_TRIES as usize],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Whether what is in force still fits.
    Confirm,
    /// The same, because a router says that it does not.
    Hinted,
    /// Whether more fits.
    Search,
}

/// A probe to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Comes back in the acknowledgement.
    pub number: u32,
    /// Length of the packet that it stands for.
    pub size: u16,
}

impl PathMtu {
    /// A way of which nothing is known, for a device that carries so much.
    pub fn new(now: Instant, ceiling: u16) -> Self {
        Self {
            ceiling,
            mtu: ceiling,
            way: None,
            fits: FLOOR,
            too_large: ceiling + 4,
            hint: ceiling,
            round: None,
            number: 0,
            fresh: true,
            large: false,
            next_test: now,
            next_raise: now,
            unanswered: 0,
            round_trip: None,
        }
    }

    /// What another process found for the same way; it is tested anew.
    pub fn resume(now: Instant, found: &PathMtuEstate, way: Option<SocketAddr>) -> Self {
        let new = Self::new(now, found.device);
        let sensible = (FLOOR..=found.device).contains(&found.path);
        if sensible { Self { mtu: found.path, way, ..new } } else { new }
    }

    /// What a successor needs to know of it.
    pub fn leave(&self) -> PathMtuEstate {
        PathMtuEstate { device: self.ceiling, path: self.mtu }
    }

    /// Largest packets to the peer, in bytes.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The same where it is less than what the device carries.
    pub fn narrow(&self) -> Option<u16> {
        (self.mtu < self.ceiling).then_some(self.mtu)
    }

    /// Whether the last test was answered with nothing at all.
    pub fn is_silent(&self) -> bool {
        self.unanswered > 0
    }

    /// The device carries another size.
    pub fn set_ceiling(&mut self, now: Instant, ceiling: u16) {
        if self.ceiling != ceiling {
            let way = self.way;
            *self = Self { way, ..Self::new(now, ceiling) };
        }
    }

    /// Packets take this way from now on. What was found for another one is kept until it is tested.
    pub fn set_way(&mut self, now: Instant, way: Option<SocketAddr>) {
        if self.way == way || way.is_none() {
            return;
        }
        let first = self.way.is_none();
        self.way = way;
        (self.fits, self.too_large, self.hint) = (FLOOR, self.ceiling + 4, self.ceiling);
        (self.round, self.fresh, self.next_test) = (None, true, now);
        self.next_raise = now;
        if first {
            self.mtu = self.ceiling;
        }
    }

    /// Nothing can be sent now: what is under way is not waited for.
    pub fn interrupt(&mut self, now: Instant) {
        if self.round.take().is_some() {
            self.next_test = now;
        }
    }

    /// The system refused to send what is larger: that is certain.
    pub fn limit(&mut self, now: Instant, fits: u16) {
        let fits = fits.clamp(FLOOR, self.ceiling);
        self.hint = fits;
        if fits < self.mtu {
            (self.mtu, self.round) = (fits, None);
            self.next_test = now;
        }
        self.fits = self.fits.min(fits);
        self.too_large = self.too_large.min(fits + 4);
        self.next_raise = now + RAISE_EVERY;
    }

    /// What the system has heard about the way: less is tested, more is looked for.
    pub fn hint(&mut self, now: Instant, fits: u16) {
        let fits = fits.clamp(FLOOR, self.ceiling);
        let before = std::mem::replace(&mut self.hint, fits);
        if fits < self.mtu && fits != before {
            self.round = None;
            self.begin(now, Purpose::Hinted, self.mtu, fits);
        } else if fits > before && self.mtu < self.ceiling {
            self.next_raise = now;
            self.fresh = true;
        }
    }

    /// The peer acknowledged a probe.
    pub fn acknowledged(&mut self, now: Instant, probe: Probe) {
        let this = probe.number >> TRY_BITS == self.number;
        let Some(round) = self.round.as_mut().filter(|_| this) else { return };
        let number = probe.number & ((1 << TRY_BITS) - 1);
        let Some(sent) = round.sent.get(number as usize).filter(|_| number < round.tries) else {
            return;
        };
        self.unanswered = 0;
        let took = now.saturating_duration_since(*sent);
        self.round_trip = Some(self.round_trip.map_or(took, |before| (before * 3 + took) / 4));
        if probe.size < round.size {
            round.smaller_fits |= probe.size == round.smaller;
            return;
        }
        let (purpose, size) = (round.purpose, round.size);
        self.round = None;
        self.fits = self.fits.max(size);
        self.too_large = self.too_large.max(size + 4);
        self.mtu = match purpose {
            Purpose::Search => size,
            Purpose::Confirm | Purpose::Hinted => self.mtu,
        };
        self.go_on(now, purpose);
    }

    /// Lets time pass; `large` when large packets were sent since the last time. What is to be sent now.
    pub fn poll(&mut self, now: Instant, large: bool) -> [Option<Probe>; 2] {
        if self.round.as_ref().is_some_and(|round| self.is_over(now, round))
            && let Some(round) = self.round.take()
        {
            self.lost(now, &round);
        }
        self.large |= large;
        if self.round.is_none() && (self.large || self.fresh) {
            if now >= self.next_test {
                (self.fresh, self.large) = (false, false);
                self.begin(now, Purpose::Confirm, self.mtu, FLOOR);
            } else if self.mtu < self.ceiling && now >= self.next_raise {
                (self.fresh, self.large) = (false, false);
                self.too_large = self.ceiling + 4;
                self.next_raise = now + RAISE_EVERY;
                self.begin(now, Purpose::Search, self.ceiling, FLOOR);
            }
        }
        self.send(now)
    }

    fn begin(&mut self, now: Instant, purpose: Purpose, size: u16, smaller: u16) {
        self.number = (self.number + 1) & (u32::MAX >> TRY_BITS);
        let sent = [now; CONFIRM_TRIES as usize];
        self.round = Some(Round { purpose, size, smaller, smaller_fits: false, tries: 0, sent });
    }

    fn send(&mut self, now: Instant) -> [Option<Probe>; 2] {
        let (wait, number) = (self.wait(), self.number);
        let Some(round) = &mut self.round else { return [None; 2] };
        let due = round.tries == 0 || now.saturating_duration_since(round.last()) >= wait;
        if !due || round.tries >= round.most() {
            return [None; 2];
        }
        let number = number << TRY_BITS | round.tries;
        round.sent[round.tries as usize] = now;
        round.tries += 1;
        let early = round.purpose == Purpose::Hinted || round.tries > 1;
        let beside = early && round.purpose != Purpose::Search && round.smaller < round.size;
        let probe = |size| Probe { number, size };
        // The smaller one first: after the larger it would leave in one train with it, and be lost with it.
        [beside.then(|| probe(round.smaller)), Some(probe(round.size))]
    }

    fn is_over(&self, now: Instant, round: &Round) -> bool {
        round.tries >= round.most() && now.saturating_duration_since(round.last()) >= self.wait()
    }

    fn wait(&self) -> Duration {
        let twice = self.round_trip.unwrap_or_default() * 2;
        (twice + SHORTEST_WAIT / 2).clamp(SHORTEST_WAIT, LONGEST_WAIT)
    }

    /// Nothing of the round's size was acknowledged.
    fn lost(&mut self, now: Instant, round: &Round) {
        if round.purpose == Purpose::Search {
            self.too_large = round.size.max(self.fits + 4);
            return self.go_on(now, Purpose::Search);
        }
        if !round.smaller_fits {
            // Nobody answers: the peer is away, or does not know these probes.
            let pause = UNANSWERED_PAUSE * (1 << self.unanswered.min(UNANSWERED_DOUBLED));
            self.unanswered += 1;
            self.next_test = now + pause;
            return;
        }
        (self.fits, self.mtu) = (round.smaller, round.smaller);
        self.too_large = match round.purpose {
            // A router knows its link exactly.
            Purpose::Hinted => round.smaller + 4,
            _ => round.size,
        };
        self.next_raise = now + RAISE_EVERY;
        self.go_on(now, Purpose::Search);
    }

    /// After a round: the next size, or a pause.
    fn go_on(&mut self, now: Instant, after: Purpose) {
        let open = self.too_large.saturating_sub(self.fits) > STEP;
        if after == Purpose::Search && open {
            let hinted = self.fits < self.hint && self.hint < self.too_large.min(self.ceiling);
            let half = self.fits + (((self.too_large - self.fits) / 2) & !3);
            return self.begin(now, Purpose::Search, if hinted { self.hint } else { half }, FLOOR);
        }
        self.next_test = now + CONFIRM_EVERY;
        if self.mtu < self.ceiling && after != Purpose::Search && self.next_raise <= now {
            self.fresh = true;
        }
    }
}

impl Round {
    fn last(&self) -> Instant {
        self.sent[self.tries.saturating_sub(1) as usize]
    }

    fn most(&self) -> u32 {
        match self.purpose {
            Purpose::Confirm => CONFIRM_TRIES,
            Purpose::Hinted => HINTED_TRIES,
            Purpose::Search => SEARCH_TRIES,
        }
    }
}

#[cfg(test)]
mod tests;
