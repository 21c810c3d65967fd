//! From the underlay to the device: receive, open, join, write.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::time::Instant;

use super::lane::{Lane, Lead, Ticket};
use super::{EngineFailure, Shared, queues};
use crate::counters::Counters;
use crate::offload::coalesce::{Coalescer, Device};
use crate::os::poll::{Ready, Stop};
use crate::os::tun::Queue;
use crate::os::udp::{Inbox, Sockets, Udp};
use crate::protocol::Outbox;
use crate::status::DropReason;

/// Received bytes that are worth waking another thread, which receives meanwhile: opening them takes some 20 us.
const HEAVY_BYTES: usize = 32 << 10;

/// Opened bytes that wait at most to be written: about one train, so that who reads the packets starts early.
const FLUSH_BYTES: usize = 64 << 10;

/// Messages per receive call, and bytes opened before the first is written, where threads work side by side: what one
/// of them opens while it waits for its turn. Where several sockets have something, so many messages for each.
const SHARED_MESSAGES: usize = 4;
const SHARED_FLUSH_BYTES: usize = 256 << 10;

/// Bytes that one socket may bring before the others of the lane have their turn: what a receive call brings at most, among several.
const QUANTUM: usize = 256 << 10;

/// Carries datagrams from the sockets of lane `number` until told to stop, together with the other threads of the lane.
pub(super) fn run(
    shared: &Shared,
    (sockets, number): (&Sockets, usize),
    lane: &Lane,
    stop: &Stop,
) -> Result<(), EngineFailure> {
    let receivers: Vec<_> = sockets.of_lane(number, shared.lanes()).collect();
    let queues = shared.queues_of(number);
    let writer =
        Writer { queues: &queues, counters: &shared.counters, lane, ticket: Cell::new(None) };
    let (joined, inbox) = if lane.threads() == 1 {
        (Coalescer::new(writer, FLUSH_BYTES), Inbox::default())
    } else {
        (Coalescer::new(writer, SHARED_FLUSH_BYTES), Inbox::of(SHARED_MESSAGES))
    };
    let mut work = Work { shared, sockets, lane, stop, joined, inbox, answers: Outbox::default() };
    let (mut lead, mut ready) = (lane.lead(), Ready::default());
    let mut more = false;
    while lane.watch().look(&mut ready, !more).map_err(EngineFailure::SocketLost)? {
        more = false;
        let most = if ready.count() > 1 { SHARED_MESSAGES } else { usize::MAX };
        for socket in ready.places().filter_map(|place| receivers.get(place)) {
            let turn = work.turn(socket, most, lead);
            lead = turn.0;
            more |= turn.1;
        }
    }
    Ok(())
}

/// What one thread works with.
struct Work<'a> {
    shared: &'a Shared,
    sockets: &'a Sockets,
    lane: &'a Lane,
    stop: &'a Stop,
    joined: Coalescer<Writer<'a>>,
    inbox: Inbox,
    answers: Outbox,
}

impl<'a> Work<'a> {
    /// Receives until nothing is there, the others have waited long enough, or it is time to stop. Also tells whether there may be
    /// more.
    fn turn(&mut self, socket: &Udp, most: usize, mut lead: Lead<'a>) -> (Lead<'a>, bool) {
        let mut bytes = 0;
        while bytes < QUANTUM {
            if self.stop.is_given() {
                return (lead, false);
            }
            match self.inbox.receive(socket, most) {
                Ok(datagrams) => {
                    self.shared.counters.received(datagrams);
                    bytes += self.inbox.bytes();
                    lead = self.carry(lead);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return (lead, false),
                // Errors of earlier sends (ICMP) are reported here; they mean nothing to a receiver.
                Err(error) => tracing::debug!(%error, "receiving failed"),
            }
        }
        (lead, true)
    }

    /// Opens what was received; where that takes long, another thread may receive meanwhile.
    fn carry(&mut self, mut lead: Lead<'a>) -> Lead<'a> {
        let ticket = lead.ticket();
        let heavy = lead.is_shared() && self.inbox.bytes() >= HEAVY_BYTES;
        let kept = (!heavy).then_some(lead);
        self.joined.device().begin(ticket);
        let datagrams = self.inbox.datagrams();
        self.shared.core.inbound(Instant::now(), datagrams, &mut self.joined, &mut self.answers);
        self.joined.flush();
        self.joined.device().end(ticket);
        while let Some(train) = self.answers.take() {
            self.sockets.send(&train, None);
        }
        kept.unwrap_or_else(|| self.lane.lead())
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
