//! From the underlay to the device: receive, open, join, write.

use std::io::{self, IoSlice};
use std::time::Instant;

use super::{EngineFailure, Shared};
use crate::counters::Counters;
use crate::offload::coalesce::{Coalescer, Device};
use crate::os::poll::Stop;
use crate::os::tun::Queue;
use crate::os::udp::{Inbox, Sockets};
use crate::protocol::Outbox;
use crate::status::DropReason;

/// Carries datagrams from one socket until told to stop.
pub(super) fn run(
    shared: &Shared,
    sockets: &Sockets,
    place: usize,
    queue: usize,
    stop: &Stop,
) -> Result<(), EngineFailure> {
    let Some(socket) = sockets.socket(place) else { return Ok(()) };
    let writer = Writer { queue: &shared.queues[queue], counters: &shared.counters };
    let mut joined = Coalescer::new(writer);
    let mut inbox = Inbox::new();
    let mut answers = Outbox::default();
    loop {
        match inbox.receive(socket) {
            Ok(datagrams) => {
                shared.counters.received(datagrams);
                shared.core.inbound(Instant::now(), inbox.datagrams(), &mut joined, &mut answers);
                joined.flush();
                while let Some(train) = answers.take() {
                    sockets.send(&train, None);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !socket.wait(stop).map_err(EngineFailure::SocketLost)? {
                    return Ok(());
                }
            }
            // Errors of earlier sends (ICMP) are reported here; they mean nothing to a receiver.
            Err(error) => tracing::debug!(%error, "receiving failed"),
        }
    }
}

/// A queue, counted.
struct Writer<'a> {
    queue: &'a Queue,
    counters: &'a Counters,
}

impl Device for Writer<'_> {
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        self.queue.write(pieces)?;
        self.counters.wrote(1);
        Ok(())
    }

    fn takes_udp_trains(&self) -> bool {
        self.queue.udp_trains()
    }

    fn refused(&self, packets: usize, error: &io::Error) {
        tracing::debug!(%error, packets, "the overlay device refused packets");
        self.counters.dropped(DropReason::DeviceRefused, packets);
    }
}
