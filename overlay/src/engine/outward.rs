//! From the device to the underlay: read, cut, seal, send.

use std::io::{self, IoSlice};
use std::time::Instant;

use super::lane::{Lane, Lead};
use super::{EngineFailure, Shared};
use crate::offload::vnet::{VNET_HEADER_BYTES, VnetHeader};
use crate::os::poll::{Ready, Stop};
use crate::os::tun::Queue;
use crate::protocol::Outbox;
use crate::status::DropReason;

/// A train of the largest size, its header, and room to pad it.
const FRAME_BYTES: usize = VNET_HEADER_BYTES + 65_535 + PADDING_ROOM;
const PADDING_ROOM: usize = 16;

/// Sealed bytes after which all are sent, so that the buffer stays in the cache.
const BATCH_BYTES: usize = 192 << 10;

/// Bytes in one read that are worth waking another thread, which reads meanwhile: sealing them takes some 20 us.
const HEAVY_BYTES: usize = 32 << 10;

/// Bytes that one queue may send before the others of the lane have their turn. Two trains, so that most leave full.
const QUANTUM: usize = 128 << 10;

/// Carries packets from some queues until told to stop, together with the other threads of the lane.
pub(super) fn run(
    shared: &Shared,
    queues: &[&Queue],
    lane: &Lane,
    stop: &Stop,
) -> Result<(), EngineFailure> {
    let (frame, outbox) = (vec![0; FRAME_BYTES], Outbox::default());
    let mut work = Work { shared, lane, stop, frame, outbox };
    let lost = |source| EngineFailure::DeviceLost { device: shared.device.clone(), source };
    let (mut lead, mut ready) = (lane.lead(), Ready::default());
    let mut more = false;
    while lane.watch().look(&mut ready, !more).map_err(lost)? {
        more = false;
        for queue in ready.places().filter_map(|place| queues.get(place)) {
            let turn = work.turn(queue, lead).map_err(lost)?;
            lead = turn.0;
            more |= turn.1;
        }
        if !more {
            work.send_in_turn(&mut lead, true);
        }
    }
    work.send_in_turn(&mut lead, true);
    Ok(())
}

/// What one thread works with.
struct Work<'a> {
    shared: &'a Shared,
    lane: &'a Lane,
    stop: &'a Stop,
    frame: Vec<u8>,
    outbox: Outbox,
}

impl<'a> Work<'a> {
    /// Reads until nothing is there, the others have waited long enough, or it is time to stop. Full trains leave meanwhile.
    /// Also tells whether there may be more.
    fn turn(&mut self, queue: &Queue, mut lead: Lead<'a>) -> io::Result<(Lead<'a>, bool)> {
        let (mut reads, mut bytes) = (0, 0);
        let more = loop {
            if self.stop.is_given() {
                break Ok(false);
            }
            if bytes >= QUANTUM {
                break Ok(true);
            }
            match queue.read(&mut self.frame[..FRAME_BYTES - PADDING_ROOM]) {
                Ok(n) if n >= HEAVY_BYTES && lead.is_shared() => {
                    (reads, bytes) = (reads + 1, bytes + n);
                    lead = self.seal_beside(queue, n, lead);
                }
                Ok(n) => {
                    (reads, bytes) = (reads + 1, bytes + n);
                    self.seal(queue, n);
                    let all = self.outbox.used_bytes() >= BATCH_BYTES;
                    self.send_in_turn(&mut lead, all);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(false),
                Err(error) => {
                    self.send_in_turn(&mut lead, true);
                    break Err(error);
                }
            }
        };
        self.shared.counters.read(reads);
        Ok((lead, more?))
    }

    /// Lets another thread read while this one seals what it has read.
    fn seal_beside(&mut self, queue: &Queue, n: usize, mut lead: Lead<'a>) -> Lead<'a> {
        let ticket = lead.ticket();
        drop(lead);
        self.seal(queue, n);
        self.lane.await_turn(ticket);
        self.send(true);
        self.lane.pass(ticket);
        self.lane.lead()
    }

    fn seal(&mut self, queue: &Queue, n: usize) {
        let Some(vnet) = VnetHeader::read(&self.frame[..n]) else {
            return self.shared.counters.dropped(DropReason::MalformedPacket, 1);
        };
        let packet = (&mut self.frame[VNET_HEADER_BYTES..], n - VNET_HEADER_BYTES);
        let mtu = **self.shared.mtu.load();
        let answer =
            self.shared.core.outbound(Instant::now(), packet, &vnet, mtu, &mut self.outbox);
        if let Some(answer) = answer {
            let header = VnetHeader::default().bytes();
            if let Err(error) = queue.write(&[IoSlice::new(&header), IoSlice::new(&answer)]) {
                tracing::debug!(%error, "the overlay device refused a message to a sender");
                self.shared.counters.dropped(DropReason::DeviceRefused, 1);
            }
        }
    }

    fn send_in_turn(&mut self, lead: &mut Lead<'a>, all: bool) {
        if self.outbox.is_empty() {
            return;
        }
        let ticket = lead.ticket();
        self.lane.await_turn(ticket);
        self.send(all);
        self.lane.pass(ticket);
    }

    /// Sends full trains, or all of them.
    fn send(&mut self, all: bool) {
        match &*self.shared.sockets.load() {
            Some(sockets) => loop {
                let train = if all { self.outbox.take() } else { self.outbox.take_closed() };
                let Some(train) = train else { break };
                sockets.send(&train, Some(self.stop));
            },
            None => self.outbox.clear(),
        }
    }
}
