//! The part of a peer that packets need: read without a lock, by all threads at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};

use super::keyring::Keyring;
use super::path_mtu::LARGE;
use crate::protocol::estate::{ActivityEstate, Moment};
use crate::protocol::noise::Session;
use crate::protocol::outbox::Way;

/// Where to send, with which session, and what came through.
pub struct Link {
    route: ArcSwapOption<Route>,
    keyring: ArcSwap<Keyring>,
    /// Largest packets where the way carries less than the device; zero where it does not.
    narrow: AtomicU16,
    /// Whether large packets were sent lately.
    large: AtomicBool,
    /// What passed, for timers and people.
    pub activity: Activity,
}

/// With what, and where to.
pub struct Route {
    /// Seals.
    pub session: Arc<Session>,
    /// To the peer.
    pub way: Way,
}

/// Times and bytes. Threads write them for whole batches; each is right by itself.
///
/// Times are in milliseconds since the link was made, plus one: zero is never.
pub struct Activity {
    epoch: Instant,
    sent: AtomicU64,
    data_sent: AtomicU64,
    received: AtomicU64,
    data_received: AtomicU64,
    /// The first data sent after what was received last: it waits for a sign of life.
    waiting: AtomicU64,
    /// The first data received after what was sent last: the peer waits for one.
    owing: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

impl Link {
    pub(super) fn new(now: Instant) -> Self {
        Self::with(Activity::new(now, [0; 6], [0; 2]))
    }

    /// A link through which that has passed already; a new one when the times make no sense.
    pub(super) fn resume(left: Instant, passed: &ActivityEstate) -> Self {
        let bytes = [passed.sent_bytes, passed.received_bytes];
        let epoch = passed.epoch.after(left);
        Self::with(Activity::new(epoch.unwrap_or(left), passed.stamps, bytes))
    }

    fn with(activity: Activity) -> Self {
        Self {
            route: ArcSwapOption::empty(),
            keyring: ArcSwap::default(),
            narrow: AtomicU16::new(0),
            large: AtomicBool::new(false),
            activity,
        }
    }

    /// How to send; none while there is no session, or no endpoint.
    pub fn route(&self, now: Instant) -> Option<Arc<Route>> {
        self.route.load_full().filter(|route| route.session.is_alive(now))
    }

    /// Session with the index, and the way to the peer.
    pub fn session(&self, index: u32) -> Option<(Arc<Session>, Option<Way>)> {
        let session = self.keyring.load().find(index)?.clone();
        Some((session, self.route.load().as_ref().map(|route| route.way)))
    }

    /// Largest packets, where the way carries less than the device.
    pub fn narrow(&self) -> Option<u16> {
        match self.narrow.load(Relaxed) {
            0 => None,
            mtu => Some(mtu),
        }
    }

    /// A packet or train of so many bytes was sent.
    pub fn carried(&self, bytes: usize) {
        if bytes >= LARGE && !self.large.load(Relaxed) {
            self.large.store(true, Relaxed);
        }
    }

    pub(super) fn take_large(&self) -> bool {
        self.large.load(Relaxed) && self.large.swap(false, Relaxed)
    }

    pub(super) fn set_narrow(&self, narrow: Option<u16>) {
        self.narrow.store(narrow.unwrap_or(0), Relaxed);
    }

    pub(super) fn publish(&self, route: Option<Route>, keyring: &Keyring) {
        self.keyring.store(Arc::new(keyring.clone()));
        self.route.store(route.map(Arc::new));
    }
}

impl Activity {
    fn new(epoch: Instant, stamps: [u64; 6], bytes: [u64; 2]) -> Self {
        let [sent, data_sent, received, data_received, waiting, owing] = stamps.map(AtomicU64::new);
        let [sent_bytes, received_bytes] = bytes.map(AtomicU64::new);
        Self {
            epoch,
            sent,
            data_sent,
            received,
            data_received,
            waiting,
            owing,
            sent_bytes,
            received_bytes,
        }
    }

    /// What passed, for a successor.
    pub(super) fn leave(&self, left: Instant) -> ActivityEstate {
        let stamps = [
            &self.sent,
            &self.data_sent,
            &self.received,
            &self.data_received,
            &self.waiting,
            &self.owing,
        ];
        ActivityEstate {
            epoch: Moment::new(left, self.epoch),
            stamps: stamps.map(|stamp| stamp.load(Relaxed)),
            sent_bytes: self.sent_bytes.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
        }
    }

    /// Packets of so many bytes were sent; none for a keepalive.
    pub fn sent(&self, now: Instant, bytes: u64) {
        let stamp = self.stamp(now);
        self.sent.store(stamp, Relaxed);
        self.owing.store(0, Relaxed);
        if bytes > 0 {
            self.data_sent.store(stamp, Relaxed);
            self.sent_bytes.fetch_add(bytes, Relaxed);
            if self.waiting.load(Relaxed) == 0 {
                self.waiting.store(stamp, Relaxed);
            }
        }
    }

    /// Authentic messages were received, with packets of so many bytes.
    pub fn received(&self, now: Instant, bytes: u64) {
        let stamp = self.stamp(now);
        self.received.store(stamp, Relaxed);
        self.waiting.store(0, Relaxed);
        if bytes > 0 {
            self.data_received.store(stamp, Relaxed);
            self.received_bytes.fetch_add(bytes, Relaxed);
            if self.owing.load(Relaxed) == 0 {
                self.owing.store(stamp, Relaxed);
            }
        }
    }

    /// Whether packets were sent since then.
    pub fn data_sent_since(&self, time: Instant) -> bool {
        self.data_sent.load(Relaxed) > self.stamp(time)
    }

    pub(super) fn data_received_since(&self, time: Instant) -> bool {
        self.data_received.load(Relaxed) > self.stamp(time)
    }

    pub(super) fn heard_since(&self, time: Instant) -> bool {
        self.received.load(Relaxed) >= self.stamp(time)
    }

    /// How long nothing was sent.
    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        self.since(now, self.sent.load(Relaxed).max(1))
    }

    /// How long data has been without any answer.
    pub(super) fn waiting_for(&self, now: Instant) -> Duration {
        self.since(now, self.waiting.load(Relaxed))
    }

    /// How long data of the peer has been without any answer of ours.
    pub(super) fn owing_for(&self, now: Instant) -> Duration {
        self.since(now, self.owing.load(Relaxed))
    }

    /// Bytes of packets received and sent.
    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.received_bytes.load(Relaxed), self.sent_bytes.load(Relaxed))
    }

    fn stamp(&self, time: Instant) -> u64 {
        time.saturating_duration_since(self.epoch).as_millis() as u64 + 1
    }

    fn since(&self, now: Instant, stamp: u64) -> Duration {
        let passed = if stamp == 0 { 0 } else { self.stamp(now).saturating_sub(stamp) };
        Duration::from_millis(passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_waits_for_any_answer_and_keepalives_do_not() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let activity = Link::new(start).activity;
        activity.sent(at(100), 0);
        assert_eq!(activity.waiting_for(at(900)), Duration::ZERO);
        activity.sent(at(200), 50);
        activity.sent(at(300), 50);
        assert_eq!(activity.waiting_for(at(900)), Duration::from_millis(700), "since the first");
        activity.received(at(1000), 0);
        assert_eq!(activity.waiting_for(at(2000)), Duration::ZERO);
        assert_eq!(activity.owing_for(at(2000)), Duration::ZERO, "a keepalive wants no answer");
        activity.received(at(2000), 70);
        assert_eq!(activity.owing_for(at(2500)), Duration::from_millis(500));
        activity.sent(at(2600), 0);
        assert_eq!(activity.owing_for(at(9000)), Duration::ZERO);
        assert_eq!(activity.silent_for(at(3000)), Duration::from_millis(400));
        assert_eq!(activity.bytes(), (70, 100));
    }
}
