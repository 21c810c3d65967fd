//! All peers of a node, and how to find the right one.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_model::snapshot::WgKey;

use super::allowed_ips::AllowedIps;
use super::estate::PeerEstate;
use super::gate::Gate;
use super::outbox::Outbox;
use super::peer::Peer;
use super::peer::link::Link;
use crate::config::{OverlayConfig, PeerConfig};

/// A configuration in force. Immutable but for the peers' own state; replaced as a whole.
#[derive(Default)]
pub struct Table {
    entries: Vec<Entry>,
    by_number: HashMap<u32, u32>,
    by_key: HashMap<WgKey, u32>,
    routes: AllowedIps,
}

/// A peer, and what was configured for it.
pub struct Entry {
    config: PeerConfig,
    number: u32,
    link: Arc<Link>,
    peer: Arc<Mutex<Peer>>,
}

impl Entry {
    /// What was configured.
    pub fn config(&self) -> &PeerConfig {
        &self.config
    }

    /// What packets need of the peer.
    pub fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// The peer, for this thread alone.
    pub fn lock(&self) -> MutexGuard<'_, Peer> {
        // A panic while it was held leaves counters, at worst a session, that the next handshake replaces.
        self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Peers as another process left them, with nothing configured: the next table is the first to carry packets.
    pub fn resume(left: Instant, gate: &Gate, mut peers: Vec<PeerEstate>) -> Self {
        peers.sort_by_key(|estate| estate.name);
        let mut table = Self::default();
        for estate in peers {
            table.push(Entry::resume(left, gate, estate));
        }
        table
    }

    /// Leaves all peers to a successor.
    pub fn leave(&self, left: Instant) -> Vec<PeerEstate> {
        let leave = |entry: &Entry| entry.lock().leave(left, entry.config.public_key);
        self.entries.iter().map(leave).collect()
    }

    /// The table for a changed configuration: peers that stay keep their sessions, new ones are called at once.
    ///
    /// `fresh` gives numbers for peers; those in use are skipped.
    pub fn next(
        &self,
        now: Instant,
        gate: &Gate,
        config: &OverlayConfig,
        fresh: &mut dyn FnMut() -> u32,
        outbox: &mut Outbox,
    ) -> Self {
        let mut table = Self::default();
        let device_mtu = config.mtu;
        let peers: BTreeMap<_, _> = config.peers.iter().map(|p| (p.public_key, p)).collect();
        for (name, config) in peers {
            let old = self.entries.binary_search_by_key(&name, |entry| entry.config.public_key);
            let entry = match old.ok().map(|old| &self.entries[old]) {
                Some(old) => old.changed(now, config),
                None => {
                    let number = self.unused(&table, fresh);
                    Entry::new(now, gate, config, number)
                }
            };
            let mut peer = entry.lock();
            peer.set_device_mtu(now, device_mtu);
            peer.tick(now, gate, outbox);
            drop(peer);
            table.push(entry);
        }
        let routes = table.entries.iter().zip(0..);
        table.routes = AllowedIps::new(
            routes.flat_map(|(e, place)| e.config.allowed_ips.iter().map(move |&p| (p, place))),
        );
        table
    }

    /// Peers, ordered by key.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// By place.
    pub fn entry(&self, place: u32) -> &Entry {
        &self.entries[place as usize]
    }

    /// Place of the peer that was told the index of a session or an offer.
    pub fn place_of_index(&self, index: u32) -> Option<u32> {
        self.by_number.get(&(index >> 8)).copied()
    }

    /// Place of the peer with the key.
    pub fn place_of_key(&self, key: WgKey) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// Which peer addresses belong to.
    pub fn routes(&self) -> &AllowedIps {
        &self.routes
    }

    fn push(&mut self, entry: Entry) {
        let place = self.entries.len() as u32;
        self.by_number.insert(entry.number, place);
        self.by_key.extend(entry.config.keys().iter().map(|key| (*key, place)));
        self.entries.push(entry);
    }

    fn unused(&self, next: &Self, fresh: &mut dyn FnMut() -> u32) -> u32 {
        loop {
            let number = fresh() & 0x00ff_ffff;
            if !self.by_number.contains_key(&number) && !next.by_number.contains_key(&number) {
                return number;
            }
        }
    }
}

impl Entry {
    fn new(now: Instant, gate: &Gate, config: &PeerConfig, number: u32) -> Self {
        Self::with(config.clone(), number, Peer::new(now, gate, config, number))
    }

    fn resume(left: Instant, gate: &Gate, estate: PeerEstate) -> Self {
        let config = PeerConfig {
            public_key: estate.name,
            keys: vec![],
            endpoints: vec![],
            relay: None,
            allowed_ips: vec![],
            persistent_keepalive_secs: None,
            preshared_key: None,
            former_preshared_key: None,
        };
        let number = estate.number;
        let peer = Peer::resume(left, gate, &config, estate);
        Self::with(config, number, peer)
    }

    fn with(config: PeerConfig, number: u32, peer: Peer) -> Self {
        let link = Arc::clone(peer.link());
        Self { config, number, link, peer: Arc::new(Mutex::new(peer)) }
    }

    fn changed(&self, now: Instant, config: &PeerConfig) -> Self {
        if self.config != *config {
            self.lock().reconfigure(now, config);
        }
        let (link, peer) = (Arc::clone(&self.link), Arc::clone(&self.peer));
        Self { config: config.clone(), number: self.number, link, peer }
    }
}
