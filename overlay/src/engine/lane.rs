//! Threads that share descriptors: they read in turns, work side by side, and hand over in the order of reading.
//!
//! So one flow, which is in one queue and comes from one peer, is sealed and opened by several cores and is not reordered.
//! Light work stays with the thread that reads: nobody is woken for a packet or two.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::os::poll::Watch;

/// What the threads share.
#[derive(Debug)]
pub(super) struct Lane {
    /// Whoever holds the lead looks at the descriptors.
    watch: Watch,
    /// Number of the next piece of work; who holds it reads.
    lead: Mutex<u64>,
    turn: Turn,
    threads: usize,
}

/// The right to read.
pub(super) struct Lead<'l> {
    lane: &'l Lane,
    next: MutexGuard<'l, u64>,
}

/// Number of a piece of work, to be handed over when all before it have been.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticket(u64);

/// Whose turn it is to hand over.
#[derive(Debug, Default)]
struct Turn {
    now: AtomicU64,
    waiting: Mutex<()>,
    passed: Condvar,
}

impl Lane {
    /// A lane for so many threads.
    pub(super) fn new(threads: usize, watch: Watch) -> Self {
        Self { watch, lead: Mutex::new(0), turn: Turn::default(), threads }
    }

    /// The descriptors.
    pub(super) fn watch(&self) -> &Watch {
        &self.watch
    }

    /// How many threads serve it.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Waits for the right to read.
    pub(super) fn lead(&self) -> Lead<'_> {
        Lead { lane: self, next: self.lead.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Waits until all work with lower tickets has been handed over.
    pub(super) fn await_turn(&self, ticket: Ticket) {
        if self.turn.is(ticket) {
            return;
        }
        let mut waiting = self.turn.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while !self.turn.is(ticket) {
            waiting = self.turn.passed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The work of the ticket has been handed over; its turn must have come.
    pub(super) fn pass(&self, ticket: Ticket) {
        if self.threads == 1 {
            return self.turn.now.store(ticket.0 + 1, Ordering::Release);
        }
        let waiting = self.turn.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.turn.now.store(ticket.0 + 1, Ordering::Release);
        drop(waiting);
        self.turn.passed.notify_all();
    }
}

impl Lead<'_> {
    /// A ticket for what was just read.
    pub(super) fn ticket(&mut self) -> Ticket {
        let ticket = Ticket(*self.next);
        *self.next += 1;
        ticket
    }

    /// Whether others could read while this thread works.
    pub(super) fn is_shared(&self) -> bool {
        self.lane.threads > 1
    }
}

impl Turn {
    fn is(&self, ticket: Ticket) -> bool {
        self.now.load(Ordering::Acquire) == ticket.0
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::os::poll::Stop;

    /// The test has descriptors of its own kind.
    fn lane(threads: usize) -> Lane {
        let watch = Watch::new(std::iter::empty(), &Stop::new().unwrap()).unwrap();
        Lane::new(threads, watch)
    }

    #[test]
    fn what_is_read_in_order_is_handed_over_in_order_however_long_it_takes() {
        const COUNT: u64 = 3000;
        let lane = lane(4);
        let (source, out) = (Mutex::new(0u64), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..lane.threads() {
                scope.spawn(|| {
                    loop {
                        let mut lead = lane.lead();
                        let mut read = source.lock().unwrap();
                        if *read == COUNT {
                            break;
                        }
                        let number = *read;
                        *read += 1;
                        drop(read);
                        let ticket = lead.ticket();
                        // Every third piece of work is light: the reader keeps the lead.
                        let kept = (number % 3 == 0).then_some(lead);
                        (0..number * 7919 % 1000).for_each(|n| _ = std::hint::black_box(n));
                        lane.await_turn(ticket);
                        out.lock().unwrap().push(number);
                        lane.pass(ticket);
                        drop(kept);
                    }
                });
            }
        });
        assert!(out.into_inner().unwrap().into_iter().eq(0..COUNT));
    }

    #[test]
    fn heavy_work_is_done_side_by_side() {
        let lane = lane(2);
        let first = lane.lead().ticket();
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                let ticket = lane.lead().ticket(); // though the first is not handed over
                lane.await_turn(ticket);
                lane.pass(ticket);
            });
            let end = Instant::now() + Duration::from_secs(10);
            while *lane.lead().next < 2 {
                assert!(Instant::now() < end, "the second thread never read");
                thread::sleep(Duration::from_millis(1));
            }
            assert!(!second.is_finished(), "it waits for the first");
            lane.await_turn(first);
            lane.pass(first);
        });
    }
}
