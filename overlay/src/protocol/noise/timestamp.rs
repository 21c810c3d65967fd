//! Timestamps of initiations (WG section 5.1): each newer than the one before, whatever the clock of the machine does.
//!
//! A peer refuses an initiation that is not newer than the last one it saw, because it could be a replay. Whoever calls in
//! this node's name next, another process of ours or the kernel's device, therefore has to begin above all stamps that were given.
//!
//! - The kernel's device dates its calls by the clock and nothing else. So stamps are never ahead of a clock that is right.
//! - Where a clock was set back they stand still, but for the least that tells them apart, until it has caught up.
//! - What is kept on disk tells a process of ours above what it begins ([`Kept`]). While the machine runs that is a line that the
//!   monotonic clock draws, and nothing is skipped; after the machine has started anew, a bound that moves ahead of the stamps.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// TAI64 of the Unix epoch, as everybody counts it (leap seconds are ignored).
const EPOCH: u64 = (1 << 62) + 10;

/// The kernel's device rounds its stamps down to multiples of 2^24 ns (drivers/net/wireguard/noise.c, `tai64n_now`). Ours are
/// more than that behind the clock, so that its next one is above our last one.
const BEHIND: Duration = Duration::from_millis(20);

/// How far the limit is above the clock: reading two clocks takes a moment, and not always the same.
const SLACK: Duration = Duration::from_millis(1);

/// How far the limit may be above a clock that was set back, once that has caught up with the stamps.
const MOST_SLACK: Duration = Duration::from_millis(100);

/// Between two stamps, at least.
const STEP: Duration = Duration::from_micros(1);

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

/// A clock that runs as the monotonic one does, and cannot be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// When it was looked at.
    pub at: Instant,
    /// What it showed then, since the Unix epoch.
    pub shows: Duration,
}

impl Clock {
    /// What it shows now.
    pub fn shown(&self, now: Instant) -> Duration {
        match now.checked_duration_since(self.at) {
            Some(since) => self.shows.saturating_add(since),
            None => self.shows.saturating_sub(self.at.saturating_duration_since(now)),
        }
    }
}

/// What a node keeps of its stamps for its next processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    /// Above all stamps: for when the machine has started anew, and its clock is all that there is beside this.
    pub bound: Duration,
    /// A clock that no stamp was ahead of when it was given: for as long as the machine runs.
    pub limit: Option<Clock>,
}

/// Gives stamps to all initiations of a node.
#[derive(Debug)]
pub struct Stamps {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The clock of the machine as it was last seen.
    clock: Clock,
    /// What no stamp is ahead of, and the next process knows.
    limit: Clock,
    /// The limit that is being stored.
    storing: Option<Clock>,
    /// The last stamp given.
    last: Duration,
    /// What is on disk.
    bound: Duration,
}

impl Stamps {
    /// How far the bound on disk is moved beyond the last stamp. A restart of the machine skips this much at most, and the disk is
    /// written once in half of it at most, not at all without handshakes.
    pub const AHEAD: Duration = Duration::from_secs(30);

    /// Stamps that follow the clock, which shows `clock` at `now`, but are all above those of the processes before, which have
    /// left `kept`: nothing for the first one. Nothing is to be given before [`kept`](Self::kept) is on disk.
    pub fn new(now: Instant, clock: SystemTime, kept: Kept) -> Self {
        let clock = Clock { at: now, shows: since_epoch(clock) };
        let left = kept.limit.map_or(kept.bound, |limit| limit.shown(now));
        // Above the kernel's last one, too, if it was that device that made way.
        let last = left.max(clock.shows);
        let still_above = kept.limit.filter(|limit| limit.shown(now) >= last);
        let limit = still_above.unwrap_or(Clock { at: now, shows: last + SLACK });
        Self { state: Mutex::new(State { clock, limit, storing: None, last, bound: kept.bound }) }
    }

    /// The same, when the process before has told its [`last`](Self::last) one: nothing is skipped.
    #[must_use]
    pub fn after(self, now: Instant, last: Duration) -> Self {
        let mut state = self.hold();
        state.last = last;
        if state.limit.shown(now) < last {
            state.limit = Clock { at: now, shows: last + SLACK };
        }
        drop(state);
        self
    }

    /// The next stamp.
    pub fn next(&self, now: Instant) -> Tai64n {
        let mut state = self.hold();
        let clock = state.clock.shown(now).saturating_sub(BEHIND);
        state.last = clock.min(state.limit.shown(now)).max(state.last + STEP);
        Tai64n::from_unix(state.last)
    }

    /// Follows the clock, which shows `clock` at `now` or has shown it just before. Where it has gone ahead, as on a machine that was
    /// put back to an earlier state of itself and is told the time, stamps follow as soon as that is stored.
    pub fn follow(&self, now: Instant, clock: SystemTime) {
        self.hold().clock = Clock { at: now, shows: since_epoch(clock) };
    }

    /// The last stamp, since the epoch: those of a successor are above it.
    pub fn last(&self) -> Duration {
        self.hold().last
    }

    /// What is to be on disk.
    pub fn kept(&self) -> Kept {
        let state = self.hold();
        Kept { bound: state.bound, limit: Some(state.storing.unwrap_or(state.limit)) }
    }

    /// The same when it has changed; to be stored at once. Asked again when that is done, or has failed: stamps have to go on.
    pub fn to_store(&self) -> Option<Kept> {
        let mut state = self.hold();
        if let Some(stored) = state.storing.take() {
            state.limit = stored;
        }
        state.storing = state.other_limit();
        let due = state.last + Self::AHEAD / 2 > state.bound;
        if due {
            state.bound = state.last + Self::AHEAD;
        }
        if let Some(lower) = state.storing.filter(|other| other.shows < state.limit.shown(other.at))
        {
            state.limit = lower;
        }
        let changed = due || state.storing.is_some();
        drop(state);
        changed.then(|| self.kept())
    }

    fn hold(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A limit that goes with the clock, if the present one does not: it holds the stamps back, or is needlessly far above.
    fn other_limit(&self) -> Option<Clock> {
        let Clock { at, shows } = self.clock;
        let limit = self.limit.shown(at);
        let (held_back, caught_up) = (shows.saturating_sub(BEHIND) > limit, self.last <= shows);
        (held_back || caught_up && limit > shows + MOST_SLACK)
            .then_some(Clock { at, shows: shows + SLACK })
    }
}

fn since_epoch(clock: SystemTime) -> Duration {
    clock.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests;
