//! From the device to the underlay: read, cut, seal, send.

use std::io;
use std::time::Instant;

use super::{EngineFailure, Shared};
use crate::offload::vnet::{VNET_HEADER_BYTES, VnetHeader};
use crate::os::poll::{self, Stop};
use crate::os::tun::Queue;
use crate::protocol::Outbox;
use crate::status::DropReason;

/// A train of the largest size, its header, and room to pad it.
const FRAME_BYTES: usize = VNET_HEADER_BYTES + 65_535 + PADDING_ROOM;
const PADDING_ROOM: usize = 16;

/// Sealed bytes after which all are sent, so that the buffer stays in the cache.
const BATCH_BYTES: usize = 192 << 10;

/// Carries packets from one queue until told to stop.
pub(super) fn run(shared: &Shared, queue: usize, stop: &Stop) -> Result<(), EngineFailure> {
    let queue = &shared.queues[queue];
    let mut frame = vec![0; FRAME_BYTES];
    let mut outbox = Outbox::default();
    let lost = |source| EngineFailure::DeviceLost { device: shared.device.clone(), source };
    loop {
        drain(shared, queue, &mut frame, &mut outbox, stop).map_err(lost)?;
        if !poll::readable(queue, stop).map_err(lost)? {
            return Ok(());
        }
    }
}

/// Reads until nothing is there. Full trains leave while more is read; the rest leaves at the end.
fn drain(
    shared: &Shared,
    queue: &Queue,
    frame: &mut [u8],
    outbox: &mut Outbox,
    stop: &Stop,
) -> io::Result<()> {
    let mut reads = 0;
    loop {
        match queue.read(&mut frame[..FRAME_BYTES - PADDING_ROOM]) {
            Ok(n) => {
                reads += 1;
                seal(shared, frame, n, outbox);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                send(shared, outbox, true, stop);
                shared.counters.read(reads);
                let empty = error.kind() == io::ErrorKind::WouldBlock;
                return if empty { Ok(()) } else { Err(error) };
            }
        }
        send(shared, outbox, outbox.used_bytes() >= BATCH_BYTES, stop);
    }
}

fn seal(shared: &Shared, frame: &mut [u8], n: usize, outbox: &mut Outbox) {
    let Some(vnet) = VnetHeader::read(&frame[..n]) else {
        return shared.counters.dropped(DropReason::MalformedPacket, 1);
    };
    let packet = (&mut frame[VNET_HEADER_BYTES..], n - VNET_HEADER_BYTES);
    shared.core.outbound(Instant::now(), packet, &vnet, **shared.mtu.load(), outbox);
}

/// Sends full trains, or all of them.
fn send(shared: &Shared, outbox: &mut Outbox, all: bool, stop: &Stop) {
    if outbox.is_empty() {
        return;
    }
    match &*shared.sockets.load() {
        Some(sockets) => loop {
            let train = if all { outbox.take() } else { outbox.take_closed() };
            let Some(train) = train else { break };
            sockets.send(&train, Some(stop));
        },
        None => outbox.clear(),
    }
}
