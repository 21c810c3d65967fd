//! Bad networks on order: what happens to datagrams on their way, by a seed, and a relay that does it to real ones.
//!
//! netem is not on every machine, and its luck cannot be repeated. [`Wire`] is pure: the same seed, times and datagrams
//! give the same mishaps. [`Relay`] stands between two UDP endpoints and applies it.

mod relay;

use std::time::{Duration, Instant};

pub use self::relay::Relay;

/// Datagrams that may be replayed: the last so many.
const REMEMBERED: usize = 256;

/// What goes wrong, in tenths of a per cent of the datagrams where it is a number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Each takes at least this long.
    pub delay: Duration,
    /// And up to this much longer, so that they overtake each other.
    pub jitter: Duration,
    /// Vanish.
    pub lost: u16,
    /// Arrive twice.
    pub duplicated: u16,
    /// Arrive after those that were sent up to 20 ms later.
    pub reordered: u16,
    /// Arrive with a bit flipped.
    pub corrupted: u16,
    /// Are followed by one that arrived before.
    pub replayed: u16,
}

/// How much later a reordered datagram is.
const REORDERED_BY: Duration = Duration::from_millis(20);

/// One direction of a bad network.
#[derive(Debug)]
pub struct Wire {
    random: u64,
    remembered: Vec<Vec<u8>>,
    next: usize,
}

/// A datagram, and when it arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// When.
    pub at: Instant,
    /// What.
    pub bytes: Vec<u8>,
}

impl Wire {
    /// A wire whose mishaps are those of the seed.
    pub fn new(seed: u64) -> Self {
        Self { random: seed, remembered: Vec::new(), next: 0 }
    }

    /// Takes a datagram; returns what arrives because of it.
    pub fn carry(&mut self, now: Instant, faults: &Faults, datagram: &[u8]) -> Vec<Arrival> {
        if self.happens(faults.lost) {
            return Vec::new();
        }
        let mut bytes = datagram.to_vec();
        if self.happens(faults.corrupted) && !bytes.is_empty() {
            let bit = self.below(bytes.len() as u64 * 8) as usize;
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        let mut at = self.arrival(now, faults);
        if self.happens(faults.reordered) {
            at += REORDERED_BY;
        }
        let mut arrivals = Vec::new();
        if self.happens(faults.duplicated) {
            arrivals.push(Arrival { at: self.arrival(now, faults), bytes: bytes.clone() });
        }
        if self.happens(faults.replayed) && !self.remembered.is_empty() {
            let place = self.below(self.remembered.len() as u64) as usize;
            let bytes = self.remembered[place].clone();
            arrivals.push(Arrival { at: self.arrival(now, faults), bytes });
        }
        self.remember(datagram);
        arrivals.push(Arrival { at, bytes });
        arrivals
    }

    fn arrival(&mut self, now: Instant, faults: &Faults) -> Instant {
        let micros = u64::try_from(faults.jitter.as_micros()).unwrap_or(u64::MAX);
        let late = if micros == 0 { 0 } else { self.below(micros) };
        now + faults.delay + Duration::from_micros(late)
    }

    fn remember(&mut self, datagram: &[u8]) {
        if self.remembered.len() < REMEMBERED {
            self.remembered.push(datagram.to_vec());
        } else {
            self.remembered[self.next] = datagram.to_vec();
            self.next = (self.next + 1) % REMEMBERED;
        }
    }

    fn happens(&mut self, per_mille: u16) -> bool {
        // Drawn also for what cannot happen: changed faults shall not change the luck of the rest.
        self.below(1000) < u64::from(per_mille)
    }

    /// splitmix64
    fn below(&mut self, limit: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: Faults = Faults {
        delay: Duration::from_millis(10),
        jitter: Duration::from_millis(5),
        lost: 100,
        duplicated: 50,
        reordered: 50,
        corrupted: 30,
        replayed: 20,
    };

    fn run(seed: u64, faults: &Faults, count: u32) -> Vec<Arrival> {
        let now = Instant::now();
        let mut wire = Wire::new(seed);
        let carried = |n: u32| {
            let at = now + Duration::from_millis(n.into());
            let arrivals = wire.carry(at, faults, &n.to_be_bytes());
            arrivals.into_iter().map(move |a| Arrival { at: now + (a.at - now), ..a })
        };
        (0..count).flat_map(carried).collect()
    }

    #[test]
    fn a_seed_is_a_story() {
        let offsets = |seed| {
            let arrivals = run(seed, &BAD, 500);
            let first = arrivals[0].at;
            let of = |a: Arrival| (a.at.saturating_duration_since(first), a.bytes);
            arrivals.into_iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(offsets(1), offsets(1));
        assert_ne!(offsets(1), offsets(2));
    }

    #[test]
    fn mishaps_happen_as_often_as_ordered() {
        let arrivals = run(7, &BAD, 10_000);
        let good = arrivals.iter().filter(|a| {
            let n = u32::from_be_bytes(a.bytes[..].try_into().expect("four bytes"));
            n < 10_000
        });
        // 10,000 less a tenth, with a twentieth and a fiftieth of the rest more, a few of them with a high bit flipped.
        let (all, good) = (arrivals.len(), good.count());
        assert!((9_400..9_900).contains(&all), "{all}");
        assert!(good < all && good > all - 300, "{good} of {all}");
        let late = arrivals.windows(2).filter(|pair| pair[1].at < pair[0].at).count();
        assert!(late > 1000, "{late} overtook the one before");
    }

    #[test]
    fn a_good_wire_changes_nothing() {
        let arrivals = run(3, &Faults::default(), 100);
        let sent: Vec<_> = (0u32..100).map(|n| n.to_be_bytes().to_vec()).collect();
        assert_eq!(arrivals.into_iter().map(|a| a.bytes).collect::<Vec<_>>(), sent);
    }
}
