//! The whole protocol of a node in one object: packets in, datagrams out, and the other way.

mod inbound;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use mesh_model::cluster::node_overlay_address;
use mesh_model::snapshot::WgKey;

use self::inbound::Batch;
use super::ecn::Ecn;
use super::estate::Estate;
use super::gate::Gate;
use super::narrow;
use super::noise::{Kept, Stamps};
use super::outbox::{self, Outbox};
use super::packet;
use super::peer::{Peer, seal};
use super::table::{Entry, Table};
use crate::config::{InvalidConfig, OverlayConfig};
use crate::counters::Counters;
use crate::keys::{NodeKey, NodeKeys};
use crate::offload::split::{Malformed, split};
use crate::offload::vnet::{NEEDS_CHECKSUM, VnetHeader};
use crate::status::{DropReason, PeerStatus};

/// Takes decrypted packets.
pub trait Sink {
    /// A buffer of at least `bytes` for the next packet.
    fn room(&mut self, bytes: usize) -> &mut [u8];

    /// The first `len` bytes of the buffer are a packet from the peer that may send it.
    fn accept(&mut self, len: usize);
}

/// A datagram from the underlay.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'d> {
    /// The way of an answer: where it came from, and which address of this node it came to.
    pub back: outbox::Way,
    /// What it says about congestion.
    pub ecn: Ecn,
    /// The datagram.
    pub bytes: &'d [u8],
}

/// Without a word about congestion.
impl<'d> From<(SocketAddr, &'d [u8])> for Arrival<'d> {
    fn from((source, bytes): (SocketAddr, &'d [u8])) -> Self {
        Self { back: source.into(), ecn: Ecn::NotCapable, bytes }
    }
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
    pub fn new(now: Instant, key: &NodeKey, stamps: Stamps, counters: Arc<Counters>) -> Self {
        let table = ArcSwap::from_pointee(Table::default());
        let gate = Gate::new(now, key, stamps);
        Self { gate, table, configuring: Mutex::new(()), counters }
    }

    /// The same with so many handshakes per second before callers have to prove their addresses.
    #[must_use]
    pub fn affording(mut self, handshakes: u32) -> Self {
        self.gate.afford(handshakes);
        self
    }

    /// A node that goes on where another process stopped, whose clock showed `left` then; peers are served when a
    /// configuration names them.
    pub fn resume(
        left: Instant,
        key: &NodeKey,
        stamps: Stamps,
        counters: Arc<Counters>,
        estate: Estate,
    ) -> Self {
        let gate = Gate::new(left, key, stamps);
        let table = ArcSwap::from_pointee(Table::resume(left, &gate, estate.peers));
        Self { gate, table, configuring: Mutex::new(()), counters }
    }

    /// Leaves everything to a successor. There is nothing here to seal with afterwards.
    pub fn leave(self, left: Instant) -> Estate {
        let last_stamp = self.gate.stamps().last();
        Estate { last_stamp, peers: self.table.load().leave(left) }
    }

    /// This node's public key.
    pub fn public_key(&self) -> WgKey {
        self.gate.public()
    }

    /// This node's public keys, the one that all peers know first.
    pub fn public_keys(&self) -> Vec<WgKey> {
        self.gate.identities().public()
    }

    /// From now on the node has these keys. To be called before their public halves are published.
    pub fn identify(&self, keys: NodeKeys) {
        self.gate.identify(keys);
    }

    /// Follows the time of day, by which this node dates its calls; it was asked just before `now`.
    pub fn follow_clock(&self, now: Instant, clock: SystemTime) {
        self.gate.stamps().follow(now, clock);
    }

    /// See [`Stamps::to_store`].
    pub fn stamps_to_store(&self) -> Option<Kept> {
        self.gate.stamps().to_store()
    }

    /// Puts a configuration in force; handshakes with new peers are in the outbox.
    ///
    /// `fresh` gives random numbers for new peers.
    pub fn configure(
        &self,
        now: Instant,
        config: &OverlayConfig,
        fresh: &mut dyn FnMut() -> u32,
        outbox: &mut Outbox,
    ) -> Result<(), InvalidConfig> {
        config.validate(&self.public_keys())?;
        let _turn = self.configuring.lock().unwrap_or_else(PoisonError::into_inner);
        let next = self.table.load().next(now, &self.gate, config, fresh, outbox);
        self.table.store(Arc::new(next));
        Ok(())
    }

    /// Seals what was read from the device: a packet, or a train of segments, of `len` bytes.
    ///
    /// `frame` has 15 bytes more than `len`, for padding; it is overwritten. Packets are padded, but not beyond `mtu`. What
    /// is returned is a packet for the device: it tells a sender that its packet is too large for the way.
    pub fn outbound(
        &self,
        now: Instant,
        frame: (&mut [u8], usize),
        vnet: &VnetHeader,
        mtu: u16,
        outbox: &mut Outbox,
    ) -> Option<Vec<u8>> {
        let mut answer = None;
        if let Err(reason) = self.try_outbound(now, frame, (vnet, mtu), outbox, &mut answer) {
            self.counters.dropped(reason, 1);
        }
        answer
    }

    fn try_outbound(
        &self,
        now: Instant,
        (frame, len): (&mut [u8], usize),
        (vnet, mtu): (&VnetHeader, u16),
        outbox: &mut Outbox,
        answer: &mut Option<Vec<u8>>,
    ) -> Result<(), DropReason> {
        let to = packet::destination(&frame[..len]).ok_or(DropReason::MalformedPacket)?;
        let table = self.table.load();
        let place = table.routes().lookup(to).ok_or(DropReason::NoPeer)?;
        let entry = table.entry(place);
        let route = match entry.link().route(now) {
            Some(route) => Some(route),
            None => entry.lock().prepare(now, &self.gate, outbox)?,
        };
        let narrow = entry.link().narrow().filter(|narrow| *narrow < mtu);
        if let Some(narrow) = narrow {
            let partial = vnet.flags & NEEDS_CHECKSUM != 0;
            narrow::clamp_segments(&mut frame[..len], partial, narrow);
        }
        let mut way = Way { to, entry, narrow, counters: &self.counters, answer };
        let mtu = narrow.unwrap_or(mtu);
        let Some(route) = route else {
            let mut peer = entry.lock();
            let mut stage = |segment: &[u8]| {
                if let Err(reason) = peer.stage(now, segment) {
                    self.counters.dropped(reason, 1);
                }
            };
            let each = |segment: &[u8]| way.pass(segment, &mut stage);
            return split((frame, len), vnet, mtu, each)
                .map_err(|Malformed| DropReason::MalformedPacket);
        };
        let mut bytes = 0;
        let mut send = |segment: &[u8]| match seal(&route, segment, outbox) {
            Ok(()) => bytes += segment.len() as u64,
            Err(reason) => self.counters.dropped(reason, 1),
        };
        let each = |segment: &[u8]| way.pass(segment, &mut send);
        split((frame, len), vnet, mtu, each).map_err(|Malformed| DropReason::MalformedPacket)?;
        entry.link().activity.sent(now, bytes);
        entry.link().carried(len);
        Ok(())
    }

    /// Opens datagrams. Packets go to the sink, answers to the outbox.
    pub fn inbound<'d>(
        &self,
        now: Instant,
        datagrams: impl Iterator<Item = impl Into<Arrival<'d>>>,
        sink: &mut impl Sink,
        outbox: &mut Outbox,
    ) {
        let table = self.table.load();
        let mut batch = Batch::new(now, &self.gate, &table);
        for arrival in datagrams {
            if let Err(reason) = batch.open(arrival.into(), sink, outbox) {
                self.counters.dropped(reason, 1);
            }
        }
    }

    /// The system refuses to send what is larger than these packets there.
    pub fn limit_mtu(&self, now: Instant, to: SocketAddr, fits: u16) {
        self.at(now, to, |peer| peer.limit_mtu(now, fits));
    }

    /// The system has heard that the way there carries packets of this size.
    pub fn hint_mtu(&self, now: Instant, to: SocketAddr, fits: u16) {
        self.at(now, to, |peer| peer.hint_mtu(now, fits));
    }

    /// Where peers are, as far as that is known.
    pub fn endpoints(&self) -> BTreeSet<SocketAddr> {
        self.table.load().entries().iter().filter_map(|entry| entry.lock().endpoint()).collect()
    }

    /// Where packets were sent to in this time.
    pub fn busy_ways(&self, now: Instant, within: Duration) -> Vec<SocketAddr> {
        let since = now.checked_sub(within).unwrap_or(now);
        let table = self.table.load();
        let links = table.entries().iter().map(Entry::link);
        let busy = links.filter(|link| link.activity.data_sent_since(since));
        busy.filter_map(|link| Some(link.route(now)?.way.to)).collect()
    }

    fn at(&self, now: Instant, to: SocketAddr, call: impl Fn(&mut Peer)) {
        for entry in self.table.load().entries() {
            if entry.link().route(now).is_some_and(|route| route.way.to == to) {
                call(&mut entry.lock());
            }
        }
    }

    /// Lets time pass for all peers; to be called every 100 ms or so.
    pub fn tick(&self, now: Instant, outbox: &mut Outbox) {
        for entry in self.table.load().entries() {
            let expired = entry.lock().tick(now, &self.gate, outbox);
            self.counters.dropped(DropReason::QueueExpired, expired);
        }
    }

    /// Tells all peers with a session where this node is now, with a keepalive to each.
    pub fn announce(&self, now: Instant, outbox: &mut Outbox) {
        for entry in self.table.load().entries() {
            entry.lock().announce(now, outbox);
        }
    }

    /// The peers as they are now, ordered by key.
    pub fn peers(&self, now: Instant) -> Vec<PeerStatus> {
        let table = self.table.load();
        let status = |entry: &Entry| {
            let peer = entry.lock();
            let (received_bytes, sent_bytes) = peer.traffic_bytes();
            PeerStatus {
                public_key: entry.config().public_key,
                endpoint: peer.endpoint(),
                allowed_ips: entry.config().allowed_ips.clone(),
                handshake_age_ms: peer.session_age(now).map(|age| age.as_millis() as u64),
                received_bytes,
                sent_bytes,
                unanswered: peer.unanswered(),
                preshared: entry.config().preshared_key.is_some(),
                preshared_agreed: peer.preshared_agreed(),
                relay: entry.config().relay,
                direct_answers: peer.direct_answers(),
                keepalive_secs: entry.config().persistent_keepalive_secs.filter(|&secs| secs > 0),
                mtu: Some(peer.mtu()),
                knows_next_key: peer.knows_next_key(&self.gate),
            }
        };
        table.entries().iter().map(status).collect()
    }
}

/// The way of one read's packets.
struct Way<'a> {
    to: IpAddr,
    entry: &'a Entry,
    /// Largest packets, where that is less than the device carries.
    narrow: Option<u16>,
    counters: &'a Counters,
    answer: &'a mut Option<Vec<u8>>,
}

impl Way<'_> {
    /// Passes a packet on, in pieces where it is too large and may be cut; or else its sender is to be told.
    fn pass(&mut self, packet: &[u8], mut each: impl FnMut(&[u8])) {
        match self.narrow {
            Some(mtu) if packet.len() > usize::from(mtu) => {
                if !narrow::cut(packet, mtu, each) {
                    self.counters.dropped(DropReason::TooBig, 1);
                    self.refuse(packet, mtu);
                }
            }
            _ => each(packet),
        }
    }

    fn refuse(&mut self, packet: &[u8], mtu: u16) {
        if self.answer.is_none() {
            let blocks = &self.entry.config().allowed_ips;
            // The node at the other end is the router that the sender would meet there.
            let router =
                blocks.iter().find(|block| block.contains(&self.to)).map(node_overlay_address);
            *self.answer = router.and_then(|router| narrow::too_big(packet, mtu, router));
        }
    }
}
