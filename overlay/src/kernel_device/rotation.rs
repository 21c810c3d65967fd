//! Endpoints of peers that do not answer, in turn: the kernel's device knows one at a time and tries no other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use mesh_kernel::wireguard::{Observed, ObservedPeer};
use mesh_model::snapshot::WgKey;

use super::REJECT_AFTER;
use super::carriers::{Carriers, merged};
use crate::config::PeerConfig;

/// Silence under traffic after which another endpoint is tried. The kernel calls every 5 s.
const PATIENCE: Duration = Duration::from_secs(6);
/// The same while there is a session: one that only receives says something every 10 s (WG section 6.5).
const PATIENCE_IN_SESSION: Duration = Duration::from_secs(15);

/// Where the peers are looked for that do not answer.
#[derive(Debug, Default)]
pub(super) struct Rotation(BTreeMap<WgKey, Turn>);

#[derive(Debug, Default)]
struct Turn {
    sent: u64,
    received: u64,
    /// Since when there was traffic and no answer.
    silent: Option<SystemTime>,
    chosen: Option<SocketAddr>,
    /// Where it was once heard, and that is none of its candidates: it stays in the round.
    learned: Option<SocketAddr>,
}

impl Rotation {
    /// Looks at the counters; the peers that are to be looked for elsewhere now, and where.
    pub(super) fn tend(
        &mut self,
        now: SystemTime,
        peers: &[PeerConfig],
        carriers: &Carriers,
        observed: &Observed,
    ) -> BTreeMap<WgKey, SocketAddr> {
        self.0.retain(|key, _| peers.iter().any(|peer| peer.public_key == *key));
        let mut moves = BTreeMap::new();
        for peer in peers.iter().filter(|peer| peer.relay.is_none()) {
            let carrier = carriers.of(peer);
            if !observed.peers.contains_key(&carrier) {
                continue;
            }
            let seen = merged(peer, &carrier, observed);
            let turn = self.0.entry(peer.public_key).or_default();
            if let Some(next) = turn.look(now, peer, &seen) {
                moves.insert(peer.public_key, next);
            }
        }
        moves
    }

    /// Where a peer is looked for that has not been found yet.
    pub(super) fn chosen(&self, peer: &PeerConfig) -> Option<SocketAddr> {
        let chosen = self.0.get(&peer.public_key)?.chosen;
        chosen.filter(|chosen| peer.endpoints.contains(chosen))
    }
}

impl Turn {
    fn look(
        &mut self,
        now: SystemTime,
        peer: &PeerConfig,
        seen: &ObservedPeer,
    ) -> Option<SocketAddr> {
        let (sent, received) = (seen.statistics.sent_bytes, seen.statistics.received_bytes);
        let (asked, heard) = (sent > self.sent, received != self.received);
        (self.sent, self.received) = (sent, received);
        if heard || (!asked && self.silent.is_none()) {
            self.silent = None;
            return None;
        }
        let age = |at| now.duration_since(at).unwrap_or_default();
        let in_session = seen.statistics.last_handshake.is_some_and(|at| age(at) < REJECT_AFTER);
        let patience = if in_session { PATIENCE_IN_SESSION } else { PATIENCE };
        // A clock that was set back would have it wait until the clock has caught up.
        let since = self.silent.filter(|since| *since <= now).unwrap_or(now);
        self.silent = Some(since);
        if age(since) < patience {
            return None;
        }
        self.silent = Some(now);
        let present = seen.endpoint.filter(|endpoint| !peer.endpoints.contains(endpoint));
        let heard_there = seen.statistics.last_handshake.is_some();
        self.learned = present.filter(|_| heard_there).or(self.learned);
        let round: Vec<SocketAddr> = peer.endpoints.iter().copied().chain(self.learned).collect();
        let place = seen.endpoint.and_then(|at| round.iter().position(|one| *one == at));
        let next = *round.get(place.map_or(0, |place| (place + 1) % round.len()))?;
        (Some(next) != seen.endpoint).then(|| *self.chosen.insert(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_stops_no_search() {
        let endpoints: Vec<SocketAddr> =
            [1, 2].map(|host| ([192, 0, 2, host], 51900).into()).to_vec();
        let peer = PeerConfig {
            public_key: WgKey([1; 32]),
            endpoints: endpoints.clone(),
            relay: None,
            allowed_ips: vec![],
            persistent_keepalive_secs: None,
            preshared_key: None,
            former_preshared_key: None,
            keys: vec![],
        };
        let (mut turn, mut seen) = (Turn::default(), ObservedPeer::default());
        seen.endpoint = Some(endpoints[0]);
        let mut look = |at| {
            seen.statistics.sent_bytes += 148;
            turn.look(at, &peer, &seen)
        };
        let noon = SystemTime::now();
        let back = noon - Duration::from_secs(3600);
        assert_eq!(look(noon), None);
        assert_eq!(look(back), None);
        assert_eq!(look(back + PATIENCE / 2), None);
        assert_eq!(look(back + PATIENCE), Some(endpoints[1]));
    }
}
