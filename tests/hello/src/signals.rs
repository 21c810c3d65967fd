//! SIGTERM and SIGINT as something that can be waited for.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that ask a process to end, held back from their default action.
pub(crate) struct EndSignals(SignalFd);

impl EndSignals {
    /// Call it before the first thread is made: threads inherit the mask.
    pub(crate) fn hold() -> Result<Self, String> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
            set.add(signal);
        }
        set.thread_block().map_err(|e| format!("hold signals back: {e}"))?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC);
        fd.map(Self).map_err(|e| format!("make a signal descriptor: {e}"))
    }

    /// Waits for the next signal, at most `limit`; `None` when the time is over.
    pub(crate) fn next(&self, limit: Option<Duration>) -> Option<Signal> {
        let end = limit.map(|l| Instant::now() + l);
        loop {
            if let Ok(Some(info)) = self.0.read_signal() {
                return i32::try_from(info.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok());
            }
            let wait = match end.map(|e| e.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return None,
                Some(left) => PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
                None => PollTimeout::NONE,
            };
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            // An interrupted wait is tried again by the loop.
            let _ = poll(&mut fds, wait);
        }
    }

    /// Waits for SIGTERM or SIGINT, at most `limit`; says whether one came.
    pub(crate) fn ended_within(&self, limit: Option<Duration>) -> bool {
        loop {
            match self.next(limit) {
                Some(Signal::SIGCHLD) => {}
                other => return other.is_some(),
            }
        }
    }
}
