//! Which of a peer's keys carries its addresses, while the peer replaces its own.
//!
//! The device takes a peer's two keys for two peers, and an address belongs to one of them: packets from the other one are
//! dropped. The peer decides by which key it calls, and nobody tells us when it begins; so the newest handshake counts.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use mesh_kernel::wireguard::{Observed, ObservedPeer};
use mesh_model::snapshot::WgKey;

use super::REJECT_AFTER;
use crate::config::PeerConfig;

/// Silence under traffic after which the other key is tried: the peer may have changed it while nobody heard it.
const PATIENCE: Duration = Duration::from_secs(3);
/// The same while there is a session: one that only receives says something every 10 s (WG section 6.5).
const PATIENCE_IN_SESSION: Duration = Duration::from_secs(15);

/// Peers with two keys.
#[derive(Debug, Default)]
pub(super) struct Carriers(BTreeMap<WgKey, Turn>);

#[derive(Debug)]
struct Turn {
    carrier: WgKey,
    /// The newest handshake that was taken into account.
    shaken: Option<SystemTime>,
    sent: u64,
    received: u64,
    /// Since when there was traffic and no answer.
    silent: Option<SystemTime>,
}

impl Carriers {
    /// Whether any peer has two keys.
    pub(super) fn is_needed(&self) -> bool {
        !self.0.is_empty()
    }

    /// The key that carries a peer's addresses. Without another reason it is the one by which the peer wants to be called.
    pub(super) fn of(&self, peer: &PeerConfig) -> WgKey {
        let keys = peer.keys();
        let chosen = self.0.get(&peer.public_key).map(|turn| turn.carrier);
        let chosen = chosen.filter(|key| keys.contains(key));
        chosen.or(keys.last().copied()).unwrap_or(peer.public_key)
    }

    /// Looks at the device; returns whether a peer's addresses have to move.
    pub(super) fn tend(
        &mut self,
        now: SystemTime,
        peers: &[PeerConfig],
        observed: &Observed,
    ) -> bool {
        let two = |peer: &&PeerConfig| peer.keys().len() > 1;
        self.0.retain(|name, _| peers.iter().filter(two).any(|peer| peer.public_key == *name));
        let mut moved = false;
        for peer in peers.iter().filter(two) {
            let before = self.of(peer);
            let turn = self.0.entry(peer.public_key).or_insert_with(|| Turn {
                carrier: holder(peer, observed).unwrap_or(before),
                shaken: None,
                sent: 0,
                received: 0,
                silent: None,
            });
            moved |= turn.look(now, peer, observed) || turn.carrier != before;
        }
        moved
    }
}

impl Turn {
    fn look(&mut self, now: SystemTime, peer: &PeerConfig, observed: &Observed) -> bool {
        // What the kernel noted before the clock was set back says nothing about the order.
        let past = |at: &SystemTime| *at <= now;
        let shaken = |key: &WgKey| observed.peers.get(key)?.statistics.last_handshake.filter(past);
        (self.shaken, self.silent) = (self.shaken.filter(past), self.silent.filter(past));
        let newest = peer.keys().iter().copied().max_by_key(shaken).unwrap_or(self.carrier);
        let all = merged(peer, &self.carrier, observed).statistics;
        let (asked, heard) = (all.sent_bytes > self.sent, all.received_bytes != self.received);
        (self.sent, self.received) = (all.sent_bytes, all.received_bytes);
        if shaken(&newest) > self.shaken {
            self.shaken = shaken(&newest);
            self.silent = None;
            return self.turn_to(newest);
        }
        if heard || (!asked && self.silent.is_none()) {
            self.silent = None;
            return false;
        }
        let age = |at| now.duration_since(at).unwrap_or_default();
        let in_session = all.last_handshake.is_some_and(|at| age(at) < REJECT_AFTER);
        let patience = if in_session { PATIENCE_IN_SESSION } else { PATIENCE };
        if age(*self.silent.get_or_insert(now)) < patience {
            return false;
        }
        self.silent = Some(now);
        let other = peer.keys().iter().copied().find(|key| *key != self.carrier);
        other.is_some_and(|other| self.turn_to(other))
    }

    fn turn_to(&mut self, key: WgKey) -> bool {
        std::mem::replace(&mut self.carrier, key) != key
    }
}

/// The key that has the addresses in the device: another process may have decided so.
fn holder(peer: &PeerConfig, observed: &Observed) -> Option<WgKey> {
    let holds = |key: &&WgKey| observed.peers.get(key).is_some_and(|p| !p.allowed_ips.is_empty());
    peer.keys().iter().find(holds).copied()
}

/// What the device knows of a peer under all its keys: counters of all, the last handshake, the rest of the carrier's.
pub(super) fn merged(peer: &PeerConfig, carrier: &WgKey, observed: &Observed) -> ObservedPeer {
    let mut all = observed.peers.get(carrier).cloned().unwrap_or_default();
    let others = peer.keys().iter().filter(|key| *key != carrier);
    for other in others.filter_map(|key| observed.peers.get(key)) {
        all.endpoint = all.endpoint.or(other.endpoint);
        all.statistics.sent_bytes += other.statistics.sent_bytes;
        all.statistics.received_bytes += other.statistics.received_bytes;
        all.statistics.last_handshake =
            all.statistics.last_handshake.max(other.statistics.last_handshake);
    }
    all
}

#[cfg(test)]
mod tests;
