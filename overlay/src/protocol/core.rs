//! The whole protocol of a node in one object: packets in, datagrams out, and the other way.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use mesh_model::snapshot::WgKey;

use super::noise::{Admission, Gate, INITIATION_BYTES, data_tunnel};
use super::outbox::Outbox;
use super::packet;
use super::peer::{Peer, Received};
use super::table::Table;
use crate::config::{InvalidConfig, OverlayConfig};
use crate::counters::Counters;
use crate::keys::NodeKey;
use crate::offload::split::{Malformed, split};
use crate::offload::vnet::VnetHeader;
use crate::status::{DropReason, PeerStatus};

/// Takes decrypted packets.
pub trait Sink {
    /// A buffer of at least `bytes` for the next packet.
    fn room(&mut self, bytes: usize) -> &mut [u8];

    /// The first `len` bytes of the buffer are a packet from the peer that may send it.
    fn accept(&mut self, len: usize);
}

/// Peers, sessions and routes by key. All methods may be called from several threads at once.
pub struct Core {
    gate: Gate,
    table: ArcSwap<Table>,
    /// Configurations take turns.
    configuring: Mutex<()>,
    counters: Arc<Counters>,
}

impl Core {
    /// A node without peers.
    pub fn new(key: &NodeKey, counters: Arc<Counters>) -> Self {
        let table = ArcSwap::from_pointee(Table::default());
        Self { gate: Gate::new(key), table, configuring: Mutex::new(()), counters }
    }

    /// This node's public key.
    pub fn public_key(&self) -> WgKey {
        self.gate.public()
    }

    /// Puts a configuration in force; handshakes with new peers are in the outbox.
    ///
    /// `fresh` gives random numbers for new tunnels.
    pub fn configure(
        &self,
        now: Instant,
        config: &OverlayConfig,
        fresh: &mut dyn FnMut() -> u32,
        outbox: &mut Outbox,
    ) -> Result<(), InvalidConfig> {
        config.validate(self.public_key())?;
        let _turn = self.configuring.lock().unwrap_or_else(PoisonError::into_inner);
        let next = self.table.load().next(now, &self.gate, config, fresh, outbox);
        self.table.store(Arc::new(next));
        Ok(())
    }

    /// Seals what was read from the device: a packet, or a train of segments, of `len` bytes.
    ///
    /// `frame` has 15 bytes more than `len`, for padding; it is overwritten. Packets are padded, but not beyond `mtu`.
    pub fn outbound(
        &self,
        now: Instant,
        (frame, len): (&mut [u8], usize),
        vnet: &VnetHeader,
        mtu: u16,
        outbox: &mut Outbox,
    ) {
        if let Err(reason) = self.try_outbound(now, (frame, len), vnet, mtu, outbox) {
            self.counters.dropped(reason, 1);
        }
    }

    fn try_outbound(
        &self,
        now: Instant,
        (frame, len): (&mut [u8], usize),
        vnet: &VnetHeader,
        mtu: u16,
        outbox: &mut Outbox,
    ) -> Result<(), DropReason> {
        let to = packet::destination(&frame[..len]).ok_or(DropReason::MalformedPacket)?;
        let table = self.table.load();
        let place = table.routes().lookup(to).ok_or(DropReason::NoPeer)?;
        let mut peer = table.entry(place).lock();
        let mut sender = peer.sender(now, outbox)?;
        let each = |segment: &[u8]| {
            if let Err(reason) = sender.send(segment, outbox) {
                self.counters.dropped(reason, 1);
            }
        };
        split((frame, len), vnet, mtu, each).map_err(|Malformed| DropReason::MalformedPacket)
    }

    /// Opens datagrams. Packets go to the sink, answers to the outbox.
    pub fn inbound<'d>(
        &self,
        now: Instant,
        datagrams: impl Iterator<Item = (SocketAddr, &'d [u8])>,
        sink: &mut impl Sink,
        outbox: &mut Outbox,
    ) {
        let table = self.table.load();
        let mut batch = Batch { core: self, table: &table, held: None, allowed: None };
        for (source, datagram) in datagrams {
            if let Err(reason) = batch.open(now, source, datagram, sink, outbox) {
                self.counters.dropped(reason, 1);
            }
        }
    }

    /// Lets time pass for all peers; to be called every 100 ms or so.
    pub fn tick(&self, now: Instant, outbox: &mut Outbox) {
        for entry in self.table.load().entries() {
            let expired = entry.lock().tick(now, outbox);
            self.counters.dropped(DropReason::QueueExpired, expired);
        }
    }

    /// Tells all peers with a session where this node is now, with a keepalive to each.
    pub fn announce(&self, now: Instant, outbox: &mut Outbox) {
        for entry in self.table.load().entries() {
            entry.lock().announce(now, outbox);
        }
    }

    /// To be called every second.
    pub fn second_passed(&self) {
        self.gate.second_passed();
    }

    /// The peers as they are now, ordered by key.
    pub fn peers(&self) -> Vec<PeerStatus> {
        let table = self.table.load();
        let status = |entry: &super::table::Entry| {
            let peer = entry.lock();
            let (received_bytes, sent_bytes) = peer.traffic_bytes();
            PeerStatus {
                public_key: peer.key(),
                endpoint: peer.endpoint(),
                allowed_ips: entry.config().allowed_ips.clone(),
                handshake_age_ms: peer.session_age().map(|age| age.as_millis() as u64),
                received_bytes,
                sent_bytes,
                unanswered: peer.unanswered(),
                preshared: entry.config().preshared_key.is_some(),
                relay: entry.config().relay,
                direct_answers: peer.direct_answers(),
            }
        };
        table.entries().iter().map(status).collect()
    }
}

/// Datagrams that arrived together: mostly from one peer, which is locked and looked up once.
struct Batch<'t> {
    core: &'t Core,
    table: &'t Table,
    held: Option<(u32, MutexGuard<'t, Peer>)>,
    /// The last source address found to belong to the peer at the place.
    allowed: Option<(IpAddr, u32)>,
}

impl Batch<'_> {
    fn open(
        &mut self,
        now: Instant,
        source: SocketAddr,
        datagram: &[u8],
        sink: &mut impl Sink,
        outbox: &mut Outbox,
    ) -> Result<(), DropReason> {
        let (place, number) = match data_tunnel(datagram) {
            Some(number) => (self.table.place_of_tunnel(number), number),
            None => match self.admit(source, datagram, outbox)? {
                Some(found) => found,
                None => return Ok(()),
            },
        };
        let place = place.ok_or(DropReason::UnknownSession)?;
        let room = sink.room(datagram.len().max(INITIATION_BYTES));
        let peer = self.hold(place);
        match peer.receive(now, number, (source, datagram), room, outbox)? {
            Received::Control => Ok(()),
            Received::Packet(len) => {
                let from = packet::source(&room[..len]).ok_or(DropReason::MalformedInner)?;
                if self.allowed != Some((from, place)) {
                    if self.table.routes().lookup(from) != Some(place) {
                        return Err(DropReason::ForbiddenSource);
                    }
                    self.allowed = Some((from, place));
                }
                sink.accept(len);
                Ok(())
            }
        }
    }

    /// Handles what is not data: returns the peer's place and the tunnel's number, or nothing when it is answered.
    fn admit(
        &mut self,
        source: SocketAddr,
        datagram: &[u8],
        outbox: &mut Outbox,
    ) -> Result<Option<(Option<u32>, u32)>, DropReason> {
        let mut answer = [0; INITIATION_BYTES];
        match self.core.gate.admit(source.ip(), datagram, &mut answer) {
            Admission::Tunnel(number) => Ok(Some((self.table.place_of_tunnel(number), number))),
            Admission::Initiator(key) => {
                let place = self.table.place_of_key(key).ok_or(DropReason::UnknownPeer)?;
                let number = self.hold(place).current_number();
                Ok(Some((Some(place), number)))
            }
            Admission::Answer(len) => {
                if let Some(room) = outbox.room(len) {
                    room[..len].copy_from_slice(&answer[..len]);
                    outbox.commit(source, len);
                }
                Err(DropReason::UnderLoad)
            }
            Admission::Dropped(reason) => Err(reason),
        }
    }

    fn hold(&mut self, place: u32) -> &mut Peer {
        if self.held.as_ref().is_none_or(|&(held, _)| held != place) {
            self.held = None; // never two at once
            self.held = Some((place, self.table.entry(place).lock()));
        }
        match &mut self.held {
            Some((_, peer)) => peer,
            None => unreachable!("it was just put there"),
        }
    }
}
