//! Packets that wait for a handshake: few for each peer, and few bytes for all of them together.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Packets that wait for one peer, at most.
const PACKETS: usize = 128;

/// Bytes that wait for all peers of a node, at most: many peers may be away at once.
const BYTES: usize = 4 << 20;

/// How long one waits: what is older has been sent again, or is of no use.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes that wait for all peers. Clones are the same account.
#[derive(Debug, Clone, Default)]
pub struct Account(Arc<AtomicUsize>);

/// What waits for one peer; given back to the account in the end.
#[derive(Debug)]
pub(super) struct Staging {
    packets: VecDeque<(Instant, Vec<u8>)>,
    account: Account,
}

impl Staging {
    pub(super) fn new(account: &Account) -> Self {
        Self { packets: VecDeque::new(), account: account.clone() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Takes a packet; false when there is no room for it.
    pub(super) fn push(&mut self, now: Instant, packet: &[u8]) -> bool {
        if self.packets.len() >= PACKETS || !self.account.takes(packet.len()) {
            return false;
        }
        self.packets.push_back((now, packet.to_vec()));
        true
    }

    /// The packet that has waited longest.
    pub(super) fn pop(&mut self) -> Option<Vec<u8>> {
        let (_, packet) = self.packets.pop_front()?;
        self.account.0.fetch_sub(packet.len(), Relaxed);
        Some(packet)
    }

    /// Drops what has waited too long; returns how many packets.
    pub(super) fn expire(&mut self, now: Instant) -> usize {
        let before = self.packets.len();
        let expired = |(since, _): &(Instant, _)| now.saturating_duration_since(*since) >= PATIENCE;
        while self.packets.front().is_some_and(expired) {
            self.pop();
        }
        before - self.packets.len()
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        while self.pop().is_some() {}
    }
}

impl Account {
    fn takes(&self, bytes: usize) -> bool {
        let added = |held: usize| (held + bytes <= BYTES).then_some(held + bytes);
        self.0.fetch_update(Relaxed, Relaxed, added).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_share_an_account_and_give_back_what_they_held() {
        let now = Instant::now();
        let account = Account::default();
        let packet = [0; 1420];
        let mut peers: Vec<Staging> = (0..40).map(|_| Staging::new(&account)).collect();
        let taken: Vec<usize> = peers
            .iter_mut()
            .map(|peer| (0..200).filter(|_| peer.push(now, &packet)).count())
            .collect();
        assert_eq!(taken[0], PACKETS);
        let all = taken.iter().sum::<usize>() * packet.len();
        assert!(all <= BYTES && all + packet.len() > BYTES, "{all} bytes wait");
        assert_eq!(peers[0].expire(now + PATIENCE - Duration::from_millis(1)), 0);
        assert_eq!(peers[0].expire(now + PATIENCE), PACKETS);
        assert!(peers[39].push(now, &packet), "there is room again");
        drop(peers);
        assert_eq!(account.0.load(Relaxed), 0);
    }
}
