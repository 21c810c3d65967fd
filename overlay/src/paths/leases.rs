//! Pairs of nodes that this node relays for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use mesh_model::snapshot::WgKey;
use serde::{Deserialize, Serialize};

use super::LEASE_LASTS;

/// Relay ports of a node. A node may have so many relayed peers through one relay.
pub const SLOTS: u8 = 16;
/// Pairs that one node relays for.
const MAX_PAIRS: usize = 256;

/// Two nodes that cannot reach each other, the smaller key first, and the port that they share.
///
/// At one port a source address belongs to one pair: that tells where a datagram goes, without looking into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pair {
    /// One of them.
    pub a: WgKey,
    /// The other.
    pub b: WgKey,
    /// The port, counted from the first relay port.
    pub slot: u8,
}

/// What this node has promised to forward, each for a while.
#[derive(Debug, Default)]
pub struct Leases {
    pairs: BTreeMap<(WgKey, WgKey), (u8, Instant)>,
}

impl Leases {
    /// Promises to forward between two nodes from now on. Nothing when there is no room.
    pub fn extend(&mut self, now: Instant, a: WgKey, b: WgKey) -> Option<u8> {
        let key = ordered(a, b);
        let slot = match self.pairs.get(&key) {
            Some((slot, _)) => *slot,
            None if self.pairs.len() >= MAX_PAIRS || a == b => return None,
            None => self.free_slot(a, b)?,
        };
        self.pairs.insert(key, (slot, now + LEASE_LASTS));
        Some(slot)
    }

    /// Goes on with what an earlier agent of this node promised.
    pub fn adopt(&mut self, now: Instant, pairs: &[Pair]) {
        for pair in pairs.iter().filter(|pair| pair.slot < SLOTS && pair.a != pair.b) {
            self.pairs.entry(ordered(pair.a, pair.b)).or_insert((pair.slot, now + LEASE_LASTS));
        }
    }

    /// Drops what nobody has asked for lately; returns whether there was any.
    pub fn expire(&mut self, now: Instant) -> bool {
        let before = self.pairs.len();
        self.pairs.retain(|_, (_, until)| *until > now);
        self.pairs.len() != before
    }

    /// Drops a pair; returns whether it was there.
    pub fn remove(&mut self, a: WgKey, b: WgKey) -> bool {
        self.pairs.remove(&ordered(a, b)).is_some()
    }

    /// All of them.
    pub fn pairs(&self) -> impl Iterator<Item = Pair> + '_ {
        self.pairs.iter().map(|((a, b), (slot, _))| Pair { a: *a, b: *b, slot: *slot })
    }

    /// Whether the node is one of a pair.
    pub fn concern(&self, node: &WgKey) -> bool {
        self.pairs.keys().any(|(a, b)| a == node || b == node)
    }

    /// The lowest port that neither of them uses.
    fn free_slot(&self, a: WgKey, b: WgKey) -> Option<u8> {
        let shared = |(x, y): &(WgKey, WgKey)| [x, y].iter().any(|key| **key == a || **key == b);
        let taken: BTreeSet<u8> =
            self.pairs.iter().filter(|(key, _)| shared(key)).map(|(_, (slot, _))| *slot).collect();
        (0..SLOTS).find(|slot| !taken.contains(slot))
    }
}

fn ordered(a: WgKey, b: WgKey) -> (WgKey, WgKey) {
    (a.min(b), a.max(b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_source_address_belongs_to_one_pair_at_each_port(
            wishes in prop::collection::vec((0u8..20, 0u8..20), 0..200)
        ) {
            let (now, mut leases) = (Instant::now(), Leases::default());
            for (a, b) in wishes {
                leases.extend(now, WgKey([a; 32]), WgKey([b; 32]));
            }
            let mut seen = BTreeSet::new();
            for pair in leases.pairs() {
                prop_assert!(pair.a < pair.b && pair.slot < SLOTS);
                prop_assert!(seen.insert((pair.slot, pair.a)) && seen.insert((pair.slot, pair.b)));
            }
        }
    }

    #[test]
    fn asking_again_keeps_the_port_and_silence_ends_it() {
        let (now, mut leases) = (Instant::now(), Leases::default());
        let (a, b) = (WgKey([1; 32]), WgKey([2; 32]));
        assert_eq!(leases.extend(now, b, a), Some(0));
        assert_eq!(leases.extend(now + LEASE_LASTS / 2, a, b), Some(0));
        assert!(!leases.expire(now + LEASE_LASTS));
        assert!(leases.expire(now + LEASE_LASTS * 2) && leases.pairs().next().is_none());
        assert_eq!(leases.extend(now, a, a), None, "a node needs no relay to itself");
    }
}
