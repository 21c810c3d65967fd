//! Timestamps of initiations (WG section 5.1): each newer than the one before, whatever the clock of the machine does.
//!
//! A peer refuses an initiation that is not newer than the last one it saw, because it could be a replay. A node whose
//! clock is set back would therefore be cut off until the clock has caught up. So that it is not, the clock is followed
//! forward only, and a bound is kept on disk that no stamp exceeds: a new process starts above it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// TAI64 of the Unix epoch, as everybody counts it (leap seconds are ignored).
const EPOCH: u64 = (1 << 62) + 10;

/// A point in time, in the order of its bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tai64n(pub [u8; 12]);

impl Tai64n {
    /// The stamp for a time since the Unix epoch.
    pub fn from_unix(time: Duration) -> Self {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&(EPOCH + time.as_secs()).to_be_bytes());
        bytes[8..].copy_from_slice(&time.subsec_nanos().to_be_bytes());
        Self(bytes)
    }
}

/// Gives stamps to all initiations of a node.
#[derive(Debug)]
pub struct Stamps {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The clock as it was once; from there on the monotonic one counts.
    clock: (Instant, Duration),
    /// The last stamp given.
    last: Duration,
    /// What is on disk.
    bound: Duration,
}

impl Stamps {
    /// How far the bound on disk is moved beyond the last stamp. A restart skips this much at most, and the disk is written
    /// once in half of it at most, not at all without handshakes.
    pub const AHEAD: Duration = Duration::from_secs(30);

    /// Stamps that follow the clock, which shows `clock` at `now`, but are all above `bound`: what the process before has
    /// stored of [`to_store`](Self::to_store), zero for the first one.
    pub fn new(now: Instant, clock: SystemTime, bound: Duration) -> Self {
        let clock = clock.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { state: Mutex::new(State { clock: (now, clock), last: bound, bound }) }
    }

    /// The same, when the process before has told its [`last`](Self::last) one: nothing is skipped.
    #[must_use]
    pub fn after(self, last: Duration) -> Self {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).last = last;
        self
    }

    /// The next stamp.
    pub fn next(&self, now: Instant) -> Tai64n {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.last = state.shown(now).max(state.last + Duration::from_micros(1));
        Tai64n::from_unix(state.last)
    }

    /// Follows a clock that has gone ahead. A machine that was put back to an earlier state of itself, disk and memory, has forgotten
    /// what it has given since; all of that was below the clock of those that know better.
    pub fn follow(&self, now: Instant, clock: SystemTime) {
        let Ok(clock) = clock.duration_since(SystemTime::UNIX_EPOCH) else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if clock > state.shown(now) {
            state.clock = (now, clock);
        }
    }

    /// The last stamp, since the epoch: those of a successor are above it.
    pub fn last(&self) -> Duration {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).last
    }

    /// A new bound, since the epoch, when the stamps come near the one before; to be stored at once.
    pub fn to_store(&self) -> Option<Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let due = state.last + Self::AHEAD / 2 > state.bound;
        due.then(|| {
            state.bound = state.last + Self::AHEAD;
            state.bound
        })
    }
}

impl State {
    fn shown(&self, now: Instant) -> Duration {
        let (then, clock) = self.clock;
        clock + now.saturating_duration_since(then)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_grow_also_when_the_clock_does_not() {
        let now = Instant::now();
        let stamps =
            Stamps::new(now, SystemTime::UNIX_EPOCH + Duration::from_secs(1000), Duration::ZERO);
        let (a, b) = (stamps.next(now), stamps.next(now));
        let c = stamps.next(now + Duration::from_secs(1));
        assert!(a < b && b < c, "{a:?} {b:?} {c:?}");
        assert_eq!(c, Tai64n::from_unix(Duration::from_secs(1001)));
        assert_eq!(c.0[..8], (0x4000_0000_0000_000a_u64 + 1001).to_be_bytes());
    }

    #[test]
    fn a_clock_is_followed_forward_and_never_back() {
        let now = Instant::now();
        let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(43_200);
        let hour = Duration::from_secs(3600);
        let stamps = Stamps::new(now, noon, Duration::ZERO);
        let shown = |hours: u32| Tai64n::from_unix(Duration::from_secs(43_200) + hour * hours);
        stamps.follow(now, noon + hour);
        assert_eq!(stamps.next(now), shown(1));
        for wrong in [noon - hour, SystemTime::UNIX_EPOCH - hour] {
            stamps.follow(now, wrong);
            assert!(stamps.next(now) > shown(1));
        }
        assert_eq!(stamps.next(now + hour), shown(2));
    }

    #[test]
    fn a_restart_with_the_clock_set_back_goes_on_above() {
        let now = Instant::now();
        let noon = SystemTime::UNIX_EPOCH + Duration::from_secs(43_200);
        let before = Stamps::new(now, noon, Duration::ZERO);
        before.next(now);
        let stored = before.to_store().expect("nothing is stored yet");
        assert_eq!(before.to_store(), None, "not each time");
        let last = before.next(now + Duration::from_secs(14));
        assert_eq!(before.to_store(), None);
        assert!(last < Tai64n::from_unix(stored));

        let after = Stamps::new(now, noon - Duration::from_secs(3600), stored);
        assert!(after.next(now) > last);
        let stored_again = after.to_store().expect("the bound moves ahead of the stamps");
        assert!(stored_again > stored);
        assert!(after.next(now + Duration::from_secs(9)) < Tai64n::from_unix(stored_again));
    }
}
