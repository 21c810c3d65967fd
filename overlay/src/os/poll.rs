//! Waiting for a descriptor, and being told to stop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
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

/// Descriptors told of at a time; where more are ready, the others come next.
const MOST_READY: usize = 64;

/// What stands for the signal to stop, among the places of the descriptors.
const STOP: u64 = u64::MAX;

/// Several descriptors, of which those that are ready are read. How many it are that are not costs nothing.
#[derive(Debug)]
pub(crate) struct Watch(Epoll);

/// Which of the descriptors were ready, by their places.
pub(crate) struct Ready {
    events: [EpollEvent; MOST_READY],
    count: usize,
}

impl Default for Ready {
    fn default() -> Self {
        Self { events: [EpollEvent::empty(); MOST_READY], count: 0 }
    }
}

impl Watch {
    /// The descriptors stay open as long as it is used.
    pub(crate) fn new<'a>(
        fds: impl Iterator<Item = BorrowedFd<'a>>,
        stop: &Stop,
    ) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let add =
            |fd: BorrowedFd<'_>, place| epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, place));
        add(stop.0.event.as_fd(), STOP)?;
        for (place, fd) in (0..).zip(fds) {
            add(fd, place)?;
        }
        Ok(Self(epoll))
    }

    /// Finds out which are ready, now or once one is; returns false when it is time to stop.
    pub(crate) fn look(&self, ready: &mut Ready, block: bool) -> io::Result<bool> {
        let limit = if block { EpollTimeout::NONE } else { EpollTimeout::ZERO };
        ready.count = loop {
            match self.0.wait(&mut ready.events, limit) {
                Ok(count) => break count,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        Ok(ready.events().iter().all(|event| event.data() != STOP))
    }
}

impl Ready {
    fn events(&self) -> &[EpollEvent] {
        &self.events[..self.count]
    }

    /// How many.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Each has its turn before one is there again.
    pub(crate) fn places(&self) -> impl Iterator<Item = usize> {
        self.events().iter().map(|event| event.data() as usize)
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

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn those_that_are_ready_are_told_of_by_turns_until_it_is_time_to_stop() {
        let sockets: Vec<_> =
            (0..MOST_READY * 2).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let stop = Stop::new().unwrap();
        let watch = Watch::new(sockets.iter().map(AsFd::as_fd), &stop).unwrap();
        let mut ready = Ready::default();
        assert!(watch.look(&mut ready, false).unwrap() && ready.count() == 0);
        for socket in &sockets {
            sockets[0].send_to(b"read me", socket.local_addr().unwrap()).unwrap();
        }
        let mut told: Vec<usize> = Vec::new();
        for _ in 0..2 {
            assert!(watch.look(&mut ready, true).unwrap());
            told.extend(ready.places());
        }
        told.sort_unstable();
        assert!(told.into_iter().eq(0..sockets.len()), "nobody twice, though nothing is read");
        stop.give();
        let stopped = (0..3).any(|_| !watch.look(&mut ready, true).unwrap());
        assert!(stopped, "however many are ready");
    }
}
