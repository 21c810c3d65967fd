//! Packets that follow each other in a flow, joined into trains before they are written to the device.
//!
//! The rules are those of Linux's GRO, so that what forwarding cuts again is what arrived: same headers but for
//! lengths and sequence, no flags but ACK and a final PSH, payloads of one size but for the last, checksums intact.
//! Order within a flow is kept; payloads are not copied.

mod shape;

use std::io::{self, IoSlice};

use self::shape::{Kind, Shape};
use super::checksum;
use super::vnet::{Gso, NEEDS_CHECKSUM, VnetHeader};
use crate::protocol::Sink;

/// Where trains are written to.
pub trait Device {
    /// Writes one packet or train; the first piece is the [`VnetHeader`].
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()>;

    /// Whether it takes trains of UDP datagrams.
    fn takes_udp_trains(&self) -> bool;

    /// The last write failed, with the packets in it.
    fn refused(&self, packets: usize, error: &io::Error);
}

/// Packets in one train, at most: each is a piece of the write.
const MAX_PIECES: usize = 64;

/// Largest IP packet.
const MAX_TRAIN_BYTES: usize = 65_535;

/// Flows that are looked through for one that a packet continues.
const SEARCHED: usize = 8;

/// Collects packets and writes them as trains.
pub struct Coalescer<D> {
    device: D,
    /// Bytes that wait at most: then all is written.
    most: usize,
    /// Packets one after the other, as they were decrypted.
    plain: Vec<u8>,
    used: usize,
    trains: Vec<Train>,
    /// Further payloads of all trains, linked by place.
    pieces: Vec<Piece>,
}

/// A packet, and the payloads of those that continue it.
struct Train {
    shape: Shape,
    /// Where the first packet is.
    start: usize,
    /// First and last of its pieces, and how many.
    pieces: Option<(usize, usize)>,
    count: usize,
    /// Bytes of the whole.
    bytes: usize,
    /// Sequence number that continues it.
    next_sequence: u32,
    /// Nothing can be added.
    closed: bool,
}

struct Piece {
    start: usize,
    len: usize,
    next: Option<usize>,
}

impl<D: Device> Coalescer<D> {
    /// An empty one, that writes when more than so many bytes wait.
    pub fn new(device: D, most: usize) -> Self {
        Self { device, most, plain: Vec::new(), used: 0, trains: Vec::new(), pieces: Vec::new() }
    }

    /// Where it writes to.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Writes all that waits.
    pub fn flush(&mut self) {
        for place in 0..self.trains.len() {
            self.write(place);
        }
        self.trains.clear();
        self.pieces.clear();
        self.used = 0;
    }

    fn push(&mut self, len: usize) {
        let start = self.used;
        self.used += len;
        let shape = Shape::of(&self.plain[start..start + len], self.device.takes_udp_trains());
        if let Some(flow) = shape.flow {
            let recent = self.trains.len().saturating_sub(SEARCHED)..self.trains.len();
            let found = recent.rev().find(|&place| self.trains[place].shape.flow == Some(flow));
            if let Some(place) = found {
                if self.extend(place, &shape, start, len) {
                    return;
                }
                self.trains[place].closed = true;
            }
        }
        let closed = !shape.joins || shape.ends;
        let next_sequence = shape.sequence.wrapping_add(shape.payload_bytes() as u32);
        let train =
            Train { shape, start, pieces: None, count: 1, bytes: len, next_sequence, closed };
        self.trains.push(train);
    }

    /// Adds a packet to a train, or returns false.
    fn extend(&mut self, place: usize, shape: &Shape, start: usize, len: usize) -> bool {
        let train = &self.trains[place];
        let payload = shape.payload_bytes();
        let first = train.shape.payload_bytes();
        let fits = !train.closed
            && shape.joins
            && payload <= first
            && train.count < MAX_PIECES
            && train.bytes + payload <= MAX_TRAIN_BYTES
            && (shape.kind != Kind::Tcp || shape.sequence == train.next_sequence);
        if !fits {
            return false;
        }
        let head = &self.plain[train.start..train.start + train.shape.len];
        let packet = &self.plain[start..start + len];
        if !shape.continues(&train.shape, head, packet) || !shape.is_intact(packet) {
            return false;
        }
        // The first packet of a train is checked when it gets company; alone, the kernel checks it.
        if train.count == 1 && !train.shape.is_intact(head) {
            return false;
        }
        self.append(place, shape, start);
        true
    }

    fn append(&mut self, place: usize, shape: &Shape, start: usize) {
        let (payload, added) = (shape.payload_bytes(), self.pieces.len());
        self.pieces.push(Piece { start: start + shape.headers, len: payload, next: None });
        let train = &mut self.trains[place];
        train.pieces = match train.pieces {
            Some((first, last)) => {
                self.pieces[last].next = Some(added);
                Some((first, added))
            }
            None => Some((added, added)),
        };
        train.count += 1;
        train.bytes += payload;
        train.next_sequence = train.next_sequence.wrapping_add(payload as u32);
        train.closed = shape.ends || payload < train.shape.payload_bytes();
        if shape.ends && shape.kind == Kind::Tcp {
            let flags = train.start + shape.transport + shape::TCP_FLAGS;
            self.plain[flags] |= shape::PSH;
        }
    }

    fn write(&mut self, place: usize) {
        let train = &self.trains[place];
        let (start, len, count) = (train.start, train.shape.len, train.count);
        let mut vnet = VnetHeader::default();
        if count > 1 {
            vnet = train.header();
            let (shape, bytes) = (&train.shape, train.bytes);
            shape.finish_train(&mut self.plain[start..start + len], bytes);
        }
        let vnet = vnet.bytes();
        let mut slices = [IoSlice::new(&[]); MAX_PIECES + 1];
        slices[0] = IoSlice::new(&vnet);
        slices[1] = IoSlice::new(&self.plain[start..start + len]);
        let mut next = train.pieces.map(|(first, _)| first);
        for slice in &mut slices[2..] {
            let Some(piece) = next.map(|place| &self.pieces[place]) else { break };
            *slice = IoSlice::new(&self.plain[piece.start..piece.start + piece.len]);
            next = piece.next;
        }
        if let Err(error) = self.device.write(&slices[..count + 1]) {
            self.device.refused(count, &error);
        }
    }
}

impl Train {
    fn header(&self) -> VnetHeader {
        let shape = &self.shape;
        let tcp = shape.kind == Kind::Tcp;
        VnetHeader {
            flags: NEEDS_CHECKSUM,
            gso: match (shape.kind, shape.v4) {
                (Kind::Tcp, true) => Gso::TcpV4,
                (Kind::Tcp, false) => Gso::TcpV6,
                (Kind::Udp, _) => Gso::Udp,
            },
            header_bytes: shape.headers as u16,
            gso_bytes: shape.payload_bytes() as u16,
            checksum_start: shape.transport as u16,
            checksum_offset: if tcp { shape::TCP_CHECKSUM } else { shape::UDP_CHECKSUM } as u16,
        }
    }
}

impl<D: Device> Sink for Coalescer<D> {
    fn room(&mut self, bytes: usize) -> &mut [u8] {
        if self.used >= self.most {
            self.flush();
        }
        if self.used + bytes > self.plain.len() {
            self.plain.resize((self.used + bytes).next_multiple_of(64 << 10), 0);
        }
        &mut self.plain[self.used..]
    }

    fn accept(&mut self, len: usize) {
        self.push(len);
    }
}

/// The device's packets and checksums of a train differ: what the pseudo-header sums to goes in the field.
fn partial_checksum(ip: &[u8], protocol: u8, transport_bytes: usize) -> [u8; 2] {
    checksum::fold(checksum::add_be(checksum::pseudo_header(ip, protocol), transport_bytes as u16))
}

#[cfg(test)]
mod tests;
