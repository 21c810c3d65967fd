//! From the underlay to the device: receive, open, join, write.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::time::Instant;

use super::lane::{Lane, Ticket};
use super::{EngineFailure, Shared, queues};
use crate::counters::Counters;
use crate::offload::coalesce::{Coalescer, Device};
use crate::os::poll::Stop;
use crate::os::tun::Queue;
use crate::os::udp::{Inbox, Sockets};
use crate::protocol::Outbox;
use crate::status::DropReason;

/// Received bytes that are worth waking another thread, which receives meanwhile: opening them takes some 20 us.
const HEAVY_BYTES: usize = 32 << 10;

/// Opened bytes that wait at most to be written: about one train, so that who reads the packets starts early.
const FLUSH_BYTES: usize = 64 << 10;

/// Messages per receive call, and bytes opened before the first is written, where threads work side by side: what one
/// of them opens while it waits for its turn.
const SHARED_MESSAGES: usize = 4;
const SHARED_FLUSH_BYTES: usize = 256 << 10;

/// Carries datagrams from one socket until told to stop, together with the other threads of the lane.
pub(super) fn run(
    shared: &Shared,
    (sockets, place): (&Sockets, usize),
    lane: &Lane,
    queues: &[&Queue],
    stop: &Stop,
) -> Result<(), EngineFailure> {
    let Some(socket) = sockets.socket(place) else { return Ok(()) };
    let counters = &shared.counters;
    let writer = Writer { queues, counters, lane, ticket: Cell::new(None) };
    let alone = lane.threads() == 1;
    let (mut joined, mut inbox) = if alone {
        (Coalescer::new(writer, FLUSH_BYTES), Inbox::default())
    } else {
        (Coalescer::new(writer, SHARED_FLUSH_BYTES), Inbox::of(SHARED_MESSAGES))
    };
    let mut answers = Outbox::default();
    let mut lead = lane.lead();
    loop {
        if stop.is_given() {
            return Ok(());
        }
        match inbox.receive(socket) {
            Ok(datagrams) => {
                counters.received(datagrams);
                let ticket = lead.ticket();
                let heavy = lead.is_shared() && inbox.bytes() >= HEAVY_BYTES;
                let kept = (!heavy).then_some(lead);
                joined.device().begin(ticket);
                shared.core.inbound(Instant::now(), inbox.datagrams(), &mut joined, &mut answers);
                joined.flush();
                joined.device().end(ticket);
                while let Some(train) = answers.take() {
                    sockets.send(&train, None);
                }
                lead = kept.unwrap_or_else(|| lane.lead());
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

/// The queues of a lane, counted, that are written in its order.
struct Writer<'a> {
    queues: &'a [&'a Queue],
    counters: &'a Counters,
    lane: &'a Lane,
    /// For whose turn the first write has to wait; none when the turn has come.
    ticket: Cell<Option<Ticket>>,
}

impl Writer<'_> {
    fn begin(&self, ticket: Ticket) {
        self.ticket.set(Some(ticket));
    }

    fn end(&self, ticket: Ticket) {
        self.come();
        self.lane.pass(ticket);
    }

    fn come(&self) {
        if let Some(ticket) = self.ticket.take() {
            self.lane.await_turn(ticket);
        }
    }
}

impl Device for Writer<'_> {
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        self.come();
        let packet = pieces.get(1).map_or(&[][..], |piece| piece);
        queues::choose(self.queues, packet).write(pieces)?;
        self.counters.wrote(1);
        Ok(())
    }

    fn takes_udp_trains(&self) -> bool {
        self.queues.iter().all(|queue| queue.udp_trains())
    }

    fn refused(&self, packets: usize, error: &io::Error) {
        tracing::debug!(%error, packets, "the overlay device refused packets");
        self.counters.dropped(DropReason::DeviceRefused, packets);
    }
}
