//! Sleeping until it is worth to read.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Ends a reader's sleep. Cheap to clone; may outlive the reader.
#[derive(Debug, Clone)]
pub struct Bell(Arc<EventFd>);

impl Bell {
    /// One that nobody sleeps by yet.
    ///
    /// # Errors
    /// When the process may open no more.
    pub fn new() -> io::Result<Self> {
        let silent = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self(Arc::new(silent)))
    }

    /// Ends this sleep, or the next one.
    pub fn ring(&self) {
        // Fails only when it has rung almost for ever.
        let _ = self.0.write(1);
    }
}

const RING: u64 = 0;
const BELL: u64 = 1;

/// What a reader sleeps on.
#[derive(Debug)]
pub(super) struct Waiting {
    epoll: Epoll,
    bell: Bell,
}

impl Waiting {
    pub(super) fn new(ring: &impl AsFd) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let bell = Bell::new()?;
        // By the edge: what counts is that the programs wake us, not that there is something.
        let woken = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(ring, EpollEvent::new(woken, RING))?;
        epoll.add(&*bell.0, EpollEvent::new(EpollFlags::EPOLLIN, BELL))?;
        Ok(Self { epoll, bell })
    }

    pub(super) fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// Whether something ended it early.
    pub(super) fn sleep(&self, time: Duration) -> io::Result<bool> {
        let mut events = [EpollEvent::empty(); 2];
        let time = EpollTimeout::try_from(time).unwrap_or(EpollTimeout::MAX);
        let count = match self.epoll.wait(&mut events, time) {
            Err(Errno::EINTR) => return Ok(true),
            result => result?,
        };
        if events[..count].iter().any(|event| event.data() == BELL) {
            // It rings until it is read, however often it was rung.
            let _ = self.bell.0.read();
        }
        Ok(count > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// Only a sleep that nothing ends takes so long.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_there_ends_one_sleep_and_so_do_rings() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let waiting = Waiting::new(&reader).unwrap();
        let sleep = |time| waiting.sleep(time).unwrap();
        assert!(!sleep(Duration::ZERO));
        writer.write_all(b"x").unwrap();
        assert!(sleep(LONG));
        assert!(!sleep(Duration::ZERO), "nobody has read it, and it is not told again");
        waiting.bell().ring();
        waiting.bell().ring();
        assert!(sleep(LONG));
        assert!(!sleep(Duration::ZERO), "two rings are one");
    }
}
