//! Reads events of connections as an agent does.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use mesh_kernel::flows::FlowReader;

/// How late an agent reads an event while somebody follows.
const FOLLOWED: Duration = Duration::from_millis(100);

/// Does the work while events are read, and tells how many those were.
pub(crate) fn while_reading<T>(
    reader: Option<FlowReader>,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, usize)> {
    let Some(mut reader) = reader else { return Ok((work()?, 0)) };
    let ends = AtomicBool::new(false);
    let bell = reader.bell();
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut events = 0;
            while !ends.load(Ordering::Relaxed) {
                // Woken early or not: what is there is read.
                let _ = reader.wait(FOLLOWED);
                events += std::iter::from_fn(|| reader.next_event()).count();
            }
            events
        });
        let result = work();
        ends.store(true, Ordering::Relaxed);
        bell.ring();
        let events = reading.join().map_err(|_| anyhow!("the reader panicked"))?;
        Ok((result?, events))
    })
}
