//! Waiting for a descriptor, and being told to stop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// How long a thread that is told to stop waits for a descriptor to take what it has in its hands.
const LAST_PATIENCE_MILLIS: u8 = 200;

/// Tells threads to stop, once and for good. Clones are the same signal.
#[derive(Debug, Clone)]
pub(crate) struct Stop(Arc<Signal>);

#[derive(Debug)]
struct Signal {
    given: AtomicBool,
    event: EventFd,
}

impl Stop {
    /// A signal that has not been given.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)?;
        Ok(Self(Arc::new(Signal { given: AtomicBool::new(false), event })))
    }

    /// Whether it was given. Costs nothing: to be asked before each piece of work.
    pub(crate) fn is_given(&self) -> bool {
        self.0.given.load(Relaxed)
    }

    /// Gives it.
    pub(crate) fn give(&self) {
        // Only fails when the counter is full, and then it was given long ago.
        self.0.given.store(true, Relaxed);
        let _ = self.0.event.write(1);
    }
}

/// Waits until the descriptor is ready; returns false when it is time to stop.
pub(crate) fn readable(fd: &impl AsFd, stop: &Stop) -> io::Result<bool> {
    wait(fd.as_fd(), PollFlags::POLLIN, stop)
}

/// Waits until the descriptor takes data, also when it is time to stop, but then not for long; returns false when it took
/// too long.
pub(crate) fn writable(fd: &impl AsFd, stop: &Stop) -> io::Result<bool> {
    if !stop.is_given() && wait(fd.as_fd(), PollFlags::POLLOUT, stop)? {
        return Ok(true);
    }
    let mut last = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut last, LAST_PATIENCE_MILLIS) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Several descriptors that are read by one thread.
pub(crate) struct Watch<'a> {
    fds: Vec<PollFd<'a>>,
}

impl<'a> Watch<'a> {
    /// At most 64.
    pub(crate) fn new(fds: impl Iterator<Item = BorrowedFd<'a>>, stop: &'a Stop) -> Self {
        let all = fds.chain([stop.0.event.as_fd()]);
        Self { fds: all.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect() }
    }

    /// Which of them are ready, by bits, now or once one is; none when it is time to stop.
    pub(crate) fn readable(&mut self, block: bool) -> io::Result<Option<u64>> {
        let limit = if block { PollTimeout::NONE } else { PollTimeout::ZERO };
        loop {
            match poll(&mut self.fds, limit) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        let Some((stop, fds)) = self.fds.split_last() else { return Ok(None) };
        let bits = fds.iter().enumerate().map(|(place, fd)| u64::from(ready(fd)) << place);
        Ok((!ready(stop)).then(|| bits.sum()))
    }
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags, stop: &Stop) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, flags), PollFd::new(stop.0.event.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(!fds[1].any().unwrap_or(false))
}
