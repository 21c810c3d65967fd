//! All peers of a node, and how to find the right one.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_model::snapshot::WgKey;

use super::allowed_ips::AllowedIps;
use super::noise::Gate;
use super::outbox::Outbox;
use super::peer::Peer;
use crate::config::{OverlayConfig, PeerConfig};

/// A configuration in force. Immutable but for the peers' own state; replaced as a whole.
#[derive(Default)]
pub struct Table {
    entries: Vec<Entry>,
    /// By half of the tunnel number: a peer has an even one and the next.
    by_number: HashMap<u32, u32>,
    by_key: HashMap<WgKey, u32>,
    routes: AllowedIps,
}

/// A peer and its place in the configuration.
pub struct Entry {
    config: PeerConfig,
    number: u32,
    peer: Arc<Mutex<Peer>>,
}

impl Entry {
    /// What was configured.
    pub fn config(&self) -> &PeerConfig {
        &self.config
    }

    /// The peer, for this thread alone.
    pub fn lock(&self) -> MutexGuard<'_, Peer> {
        // A panic while it was held leaves counters, at worst a session, that the next handshake replaces.
        self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// The table for a changed configuration: peers that stay keep their sessions, new ones are called at once.
    ///
    /// `fresh` gives numbers for tunnels; those in use are skipped.
    pub fn next(
        &self,
        now: Instant,
        gate: &Gate,
        config: &OverlayConfig,
        fresh: &mut dyn FnMut() -> u32,
        outbox: &mut Outbox,
    ) -> Self {
        let mut table = Self::default();
        let peers: BTreeMap<_, _> = config.peers.iter().map(|p| (p.public_key, p)).collect();
        for (key, config) in peers {
            let place = table.entries.len() as u32;
            let entry = match self.by_key.get(&key).map(|&old| &self.entries[old as usize]) {
                Some(old) => old.changed(now, gate, config),
                None => {
                    let number = self.unused(&table, fresh);
                    let peer = Arc::new(Mutex::new(Peer::new(now, gate, config, number)));
                    Entry { config: config.clone(), number, peer }
                }
            };
            entry.lock().tick(now, outbox);
            table.by_number.insert(entry.number >> 1, place);
            table.by_key.insert(key, place);
            table.entries.push(entry);
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

    /// Place of the peer that has the tunnel.
    pub fn place_of_tunnel(&self, number: u32) -> Option<u32> {
        self.by_number.get(&(number >> 1)).copied()
    }

    /// Place of the peer with the key.
    pub fn place_of_key(&self, key: WgKey) -> Option<u32> {
        self.by_key.get(&key).copied()
    }

    /// Which peer addresses belong to.
    pub fn routes(&self) -> &AllowedIps {
        &self.routes
    }

    fn unused(&self, next: &Self, fresh: &mut dyn FnMut() -> u32) -> u32 {
        loop {
            let number = fresh() & 0x00ff_fffe;
            let half = number >> 1;
            if !self.by_number.contains_key(&half) && !next.by_number.contains_key(&half) {
                return number;
            }
        }
    }
}

impl Entry {
    fn changed(&self, now: Instant, gate: &Gate, config: &PeerConfig) -> Self {
        if self.config != *config {
            self.lock().reconfigure(now, gate, config);
        }
        Self { config: config.clone(), number: self.number, peer: Arc::clone(&self.peer) }
    }
}
