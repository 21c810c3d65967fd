//! Who has confirmed what: pure, the time comes from outside.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// An agent that has not answered for so long is not waited for: what it has programmed, it does not change.
pub(super) const SILENCE: Duration = Duration::from_secs(1);

/// What the other nodes have programmed, as far as they were asked.
#[derive(Debug, Default)]
pub(super) struct Tally {
    peers: BTreeMap<IpAddr, Peer>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Peer {
    revision: u64,
    /// The first question since its last answer.
    asked: Option<Instant>,
}

impl Tally {
    /// These are the nodes to wait for: those that can be reached.
    pub(super) fn set_peers(&mut self, peers: &BTreeSet<IpAddr>) {
        self.peers.retain(|address, _| peers.contains(address));
        for address in peers {
            self.peers.entry(*address).or_default();
        }
    }

    /// Whom to ask for `wanted` now: those that have not confirmed it, also those that are silent.
    pub(super) fn ask(&mut self, now: Instant, wanted: u64) -> Vec<IpAddr> {
        let behind = self.peers.iter_mut().filter(|(_, peer)| peer.revision < wanted);
        let asked = behind.map(|(address, peer)| {
            peer.asked.get_or_insert(now);
            *address
        });
        asked.collect()
    }

    /// An answer. One from somebody unknown counts for nothing.
    pub(super) fn heard(&mut self, from: IpAddr, revision: u64) {
        if let Some(peer) = self.peers.get_mut(&from) {
            // Also a lower one: its agent may have begun anew.
            *peer = Peer { revision, asked: None };
        }
    }

    /// Whether everybody who answers has `wanted`.
    pub(super) fn is_confirmed(&self, now: Instant, wanted: u64) -> bool {
        let silent = |peer: &Peer| {
            peer.asked.is_some_and(|since| now.saturating_duration_since(since) >= SILENCE)
        };
        self.peers.values().all(|peer| peer.revision >= wanted || silent(peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(n: u8) -> IpAddr {
        IpAddr::from([10, 244, n, 1])
    }

    #[test]
    fn all_that_answer_are_waited_for_and_the_silent_only_for_a_while() {
        let mut tally = Tally::default();
        let start = Instant::now();
        assert!(tally.is_confirmed(start, 7), "alone there is nobody to wait for");
        tally.set_peers(&[address(1), address(2)].into());
        assert_eq!(tally.ask(start, 7), [address(1), address(2)]);
        tally.heard(address(1), 7);
        assert!(!tally.is_confirmed(start, 7));
        assert_eq!(tally.ask(start, 7), [address(2)], "who has confirmed is not asked again");
        tally.heard(address(2), 6);
        let later = start + SILENCE * 3;
        assert_eq!(tally.ask(later, 7), [address(2)]);
        assert!(!tally.is_confirmed(later, 7), "it answers, so it is waited for");
        assert!(tally.is_confirmed(later + SILENCE, 7), "it answers no more");
        tally.heard(address(2), 8);
        tally.heard(address(9), 1);
        assert!(tally.is_confirmed(later, 7));
        assert!(!tally.is_confirmed(later, 8), "the first one was not asked for that");
    }

    #[test]
    fn a_node_that_is_away_is_not_waited_for() {
        let mut tally = Tally::default();
        let now = Instant::now();
        tally.set_peers(&[address(1), address(2)].into());
        tally.heard(address(1), 7);
        tally.set_peers(&[address(1)].into());
        assert!(tally.is_confirmed(now, 7), "what was heard before is kept");
        tally.set_peers(&[address(1), address(2)].into());
        assert!(!tally.is_confirmed(now, 7));
    }
}
