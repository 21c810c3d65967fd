//! How many handshakes there were in this second, in all and from each address.

use std::hash::{BuildHasher as _, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Handshakes per second beyond which callers have to prove their address, unless told: each costs about 0.1 ms, and all
/// peers of a large cluster may call at once when the node has restarted.
const HANDSHAKES: u32 = 1000;

/// Handshakes per second that one proven address gets while there are too many.
const PER_ADDRESS: u8 = 20;

/// Addresses share this many counters.
const COUNTERS: usize = 4096;

const SECOND: Duration = Duration::from_secs(1);

/// Counts handshakes. The size does not depend on who calls.
pub(super) struct Load {
    begun: Instant,
    count: u32,
    limit: u32,
    /// Since when it is over the limit.
    over: Option<Instant>,
    by_address: Box<[u8; COUNTERS]>,
    /// Which addresses share a counter is not to be foreseen.
    hasher: RandomState,
}

impl Load {
    pub(super) fn new(now: Instant) -> Self {
        let by_address = Box::new([0; COUNTERS]);
        Self {
            begun: now,
            count: 0,
            limit: HANDSHAKES,
            over: None,
            by_address,
            hasher: RandomState::new(),
        }
    }

    /// Another number of handshakes per second.
    pub(super) fn afford(&mut self, handshakes: u32) {
        self.limit = handshakes;
    }

    /// Counts one; returns whether there are too many, now or within the last second.
    pub(super) fn is_over(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.begun) >= SECOND {
            self.begun = now;
            self.count = 0;
            self.by_address.fill(0);
        }
        self.count = self.count.saturating_add(1);
        if self.count > self.limit {
            self.over = Some(now);
        }
        self.over.is_some_and(|over| now.saturating_duration_since(over) < SECOND)
    }

    /// Counts one of an address that proved itself; returns whether it has some left.
    pub(super) fn allows(&mut self, address: IpAddr) -> bool {
        let place = self.hasher.hash_one(address) as usize % COUNTERS;
        let count = &mut self.by_address[place];
        *count = count.saturating_add(1);
        *count <= PER_ADDRESS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_begins_at_the_limit_and_ends_a_second_after_it() {
        let start = Instant::now();
        let mut load = Load::new(start);
        assert!((0..HANDSHAKES).all(|_| !load.is_over(start)));
        assert!(load.is_over(start));
        assert!(load.is_over(start + SECOND / 2));
        assert!(!load.is_over(start + SECOND * 2));
    }

    #[test]
    fn each_address_has_a_share_in_each_second() {
        let start = Instant::now();
        let mut load = Load::new(start);
        let (one, other) = ("192.0.2.1".parse().unwrap(), "2001:db8::7".parse().unwrap());
        assert_eq!((0..100).filter(|_| load.allows(one)).count(), usize::from(PER_ADDRESS));
        // They share a counter once in 4096 runs.
        assert!(
            load.allows(other)
                || load.hasher.hash_one(one) as usize % COUNTERS
                    == load.hasher.hash_one(other) as usize % COUNTERS
        );
        load.is_over(start + SECOND);
        assert!(load.allows(one));
    }
}
