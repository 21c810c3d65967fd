//! Waiting for a descriptor, and being told to stop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Tells threads to stop, once and for good. Clones are the same signal.
#[derive(Debug, Clone)]
pub(crate) struct Stop(Arc<EventFd>);

impl Stop {
    /// A signal that has not been given.
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(EventFd::from_value_and_flags(0, flags)?)))
    }

    /// Gives it.
    pub(crate) fn give(&self) {
        // Only fails when the counter is full, and then it was given long ago.
        let _ = self.0.write(1);
    }
}

/// Waits until the descriptor is ready; returns false when it is time to stop.
pub(crate) fn readable(fd: &impl AsFd, stop: &Stop) -> io::Result<bool> {
    wait(fd.as_fd(), PollFlags::POLLIN, stop)
}

/// Waits until the descriptor takes data; returns false when it is time to stop.
pub(crate) fn writable(fd: &impl AsFd, stop: &Stop) -> io::Result<bool> {
    wait(fd.as_fd(), PollFlags::POLLOUT, stop)
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags, stop: &Stop) -> io::Result<bool> {
    let mut fds = [PollFd::new(fd, flags), PollFd::new(stop.0.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(!fds[1].any().unwrap_or(false))
}
