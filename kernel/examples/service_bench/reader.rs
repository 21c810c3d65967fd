//! Reads events of connections as an agent does.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use mesh_kernel::flows::FlowReader;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Does the work while events are read, and tells how many those were: asleep until there is one, then a while for more to come.
pub(crate) fn while_reading<T>(
    reader: Option<FlowReader>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, usize)> {
    let Some(mut reader) = reader else { return Ok((work()?, 0)) };
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut events = 0;
            while !ends.load(Ordering::Relaxed) {
                let mut waiting = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
                // Woken early or not: what is there is read.
                let _ = poll(&mut waiting, PollTimeout::from(20_u16));
                thread::sleep(Duration::from_millis(10));
                events += std::iter::from_fn(|| reader.next_event()).count();
            }
            events
        });
        let result = work();
        ends.store(true, Ordering::Relaxed);
        let events = reading.join().map_err(|_| anyhow!("the reader panicked"))?;
        Ok((result?, events))
    })
}
