//! Who watches whom: each node its successor in a few rings of all members, each ring in another order.
//!
//! The orders follow from the keys, so that all nodes agree without a word, and every node watches and is watched by
//! the same number of others. A member that is down is watched on, and so is the next one behind it.

use std::collections::BTreeSet;

use mesh_model::snapshot::WgKey;

use super::WATCHERS;

/// The rings of a set of members.
#[derive(Debug, Default)]
pub struct Rings {
    orders: Vec<Vec<WgKey>>,
}

impl Rings {
    /// Rings of these members, in any order, without duplicates.
    pub fn new(members: &[WgKey]) -> Self {
        let order = |ring: u64| {
            let mut order = members.to_vec();
            order.sort_by_cached_key(|key| (mix(ring, key), *key));
            order
        };
        Self { orders: (0..WATCHERS as u64).map(order).collect() }
    }

    /// The nodes that `me` watches. With few members that is everybody.
    pub fn subjects(&self, me: WgKey, is_down: impl Fn(&WgKey) -> bool) -> BTreeSet<WgKey> {
        let mut subjects = BTreeSet::new();
        for order in &self.orders {
            if order.len() <= WATCHERS + 1 {
                return order.iter().copied().filter(|key| *key != me).collect();
            }
            let Some(place) = order.iter().position(|key| *key == me) else { continue };
            let successors = order[place + 1..].iter().chain(&order[..place]);
            for subject in successors {
                subjects.insert(*subject);
                if !is_down(subject) {
                    break;
                }
            }
        }
        subjects
    }
}

/// A number that looks random, from a ring and a key (splitmix64 over its words).
fn mix(ring: u64, key: &WgKey) -> u64 {
    let (words, _) = key.0.as_chunks::<8>();
    words.iter().fold(splitmix(ring), |state, word| splitmix(state ^ u64::from_le_bytes(*word)))
}

/// One step of splitmix64 (Steele, Lea, Flood 2014).
pub(super) fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn members(n: u16) -> Vec<WgKey> {
        let key = |n: u16| {
            let mut key = [0; 32];
            key[..2].copy_from_slice(&n.to_be_bytes());
            WgKey(key)
        };
        (0..n).map(key).collect()
    }

    #[test]
    fn few_watch_each_other_and_many_watch_a_few() {
        let three = Rings::new(&members(3));
        assert_eq!(three.subjects(members(3)[0], |_| false).len(), 2);

        let all = members(300);
        let rings = Rings::new(&all);
        let mut watchers: BTreeMap<WgKey, usize> = BTreeMap::new();
        for me in &all {
            let subjects = rings.subjects(*me, |_| false);
            assert!(subjects.len() <= WATCHERS && !subjects.contains(me));
            subjects.into_iter().for_each(|subject| *watchers.entry(subject).or_default() += 1);
        }
        assert!(all.iter().all(|key| (3..=WATCHERS).contains(&watchers[key])), "{watchers:?}");
    }

    #[test]
    fn behind_one_that_is_down_the_next_is_watched_too() {
        let all = members(50);
        let rings = Rings::new(&all);
        let before = rings.subjects(all[0], |_| false);
        let dead = *before.iter().next().unwrap();
        let after = rings.subjects(all[0], |key| *key == dead);
        assert!(after.is_superset(&before) && after.len() > before.len());
        assert!(rings.subjects(all[0], |_| true).len() == 49, "all down: all are watched");
    }
}
