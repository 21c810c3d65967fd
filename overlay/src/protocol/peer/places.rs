//! Where a peer may be reached.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use crate::protocol::estate::{Moment, PlacesEstate};
use crate::protocol::outbox::Way;

/// Endpoints of a peer: which one is in use, and which comes next.
#[derive(Debug, Default)]
pub(super) struct Places {
    candidates: Vec<SocketAddr>,
    /// Stands before everything else while it is set.
    relay: Option<SocketAddr>,
    /// The relay before it.
    left: Option<SocketAddr>,
    current: Option<SocketAddr>,
    /// Which address of this node an authentic message from the relay came to, and one from `current`.
    from: [Option<IpAddr>; 2],
    /// When an authentic message came from `current`.
    proven: Option<Instant>,
    next: usize,
}

impl Places {
    /// What a successor cannot learn from a configuration.
    pub(super) fn leave(&self, left: Instant) -> PlacesEstate {
        PlacesEstate {
            current: self.current,
            proven: self.proven.map(|at| Moment::new(left, at)),
            relay: self.relay,
            left: self.left,
        }
    }

    /// Places without a configuration, and with what another one left.
    pub(super) fn resume(left: Instant, estate: &PlacesEstate) -> Self {
        Self {
            relay: estate.relay,
            left: estate.left,
            current: estate.current,
            proven: estate.proven.and_then(|at| at.after(left)),
            ..Self::default()
        }
    }

    /// Where to send.
    pub(super) fn current(&self) -> Option<Way> {
        let way = |to, from| Way { to, from };
        let [behind, direct] = self.from;
        self.relay.map(|to| way(to, behind)).or(self.current.map(|to| way(to, direct)))
    }

    /// Sends through a relay from now on, or no longer; returns whether that is a change.
    pub(super) fn set_relay(&mut self, relay: Option<SocketAddr>) -> bool {
        let old = std::mem::replace(&mut self.relay, relay);
        if old != relay {
            self.left = old;
            self.from[0] = None;
        }
        old != relay
    }

    /// Whether that is an endpoint of the peer's own, while a relay is in use.
    pub(super) fn past_relay(&self, source: SocketAddr) -> bool {
        self.relay.is_some_and(|relay| relay != source) && self.candidates.contains(&source)
    }

    /// The next endpoint to try beside the relay; nothing while there is none in use.
    pub(super) fn next_past_relay(&mut self) -> Option<SocketAddr> {
        self.relay?;
        let next = self.candidates.get(self.next % self.candidates.len().max(1)).copied();
        self.next = (self.next + 1) % self.candidates.len().max(1);
        next.filter(|next| Some(*next) != self.relay)
    }

    /// Returns whether the peer is now looked for elsewhere. An endpoint that a live session proves is kept.
    pub(super) fn reconfigure(&mut self, candidates: &[SocketAddr], live: bool) -> bool {
        if self.candidates == candidates && self.current.is_some() {
            return false;
        }
        self.candidates = candidates.to_vec();
        self.next = 0;
        let keep = match self.current {
            Some(current) => live || candidates.contains(&current) || candidates.is_empty(),
            None => false,
        };
        if !keep {
            self.proven = None;
            (self.current, self.from[1]) = (None, None);
            self.try_next();
        }
        !keep
    }

    /// An authentic message came from there.
    ///
    /// A relay that was left is not learned: the other side may use it for a moment longer, and each would keep the other
    /// there. While a relay is in use, what is neither an endpoint of the peer's own nor the last place it was at is some
    /// relay's port: that is no place to go on at when this node's relay is left.
    pub(super) fn learn(&mut self, now: Instant, back: Way) {
        let Way { to: source, from } = back;
        if self.left == Some(source) {
            return;
        }
        if self.relay == Some(source) {
            self.from[0] = from;
            return;
        }
        if self.relay.is_some() && !self.past_relay(source) && self.current != Some(source) {
            return;
        }
        (self.current, self.from[1]) = (Some(source), from);
        self.proven = Some(now);
    }

    /// The next candidate; a learned endpoint that is not among them takes its turn after the last.
    pub(super) fn try_next(&mut self) {
        let learned =
            self.current.filter(|c| self.proven.is_some() && !self.candidates.contains(c));
        if let Some(&next) = self.candidates.get(self.next) {
            if let Some(learned) = learned {
                // It stays in the round: a peer behind NAT has no other endpoint that works.
                self.candidates.push(learned);
            }
            self.next = (self.next + 1) % self.candidates.len();
            if self.current == Some(next) && self.candidates.len() > 1 {
                return self.try_next();
            }
            (self.current, self.from[1]) = (Some(next), None);
            self.proven = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(n: u8) -> SocketAddr {
        ([192, 0, 2, n], 51900).into()
    }

    #[test]
    fn candidates_take_turns() {
        let mut places = Places::default();
        assert!(places.reconfigure(&[at(1), at(2), at(3)], false));
        let mut seen = vec![places.current.unwrap()];
        for _ in 0..4 {
            places.try_next();
            seen.push(places.current.unwrap());
        }
        assert_eq!(seen, [at(1), at(2), at(3), at(1), at(2)]);
        assert!(
            !places.reconfigure(&[at(1), at(2), at(3)], false),
            "the same list changes nothing"
        );
    }

    #[test]
    fn a_learned_endpoint_survives_configuration_while_the_session_lives() {
        let now = Instant::now();
        let mut places = Places::default();
        places.reconfigure(&[at(1)], false);
        places.learn(now, at(9).into());
        assert!(!places.reconfigure(&[at(1), at(2)], true));
        assert_eq!(places.current, Some(at(9)));
        places.try_next();
        assert_eq!(places.current, Some(at(1)));
        places.try_next();
        places.try_next();
        assert_eq!(places.current, Some(at(9)), "it stays in the round");
        assert!(places.reconfigure(&[at(4)], false), "without a session the new list counts");
        assert_eq!(places.current, Some(at(4)));
    }

    #[test]
    fn a_relay_stands_before_what_is_learned_and_is_never_learned_itself() {
        let (now, relay, another) = (Instant::now(), at(50), at(51));
        let mut places = Places::default();
        places.reconfigure(&[at(1), at(2)], false);
        assert_eq!(places.next_past_relay(), None, "no relay, no trials");
        assert!(places.set_relay(Some(relay)) && !places.set_relay(Some(relay)));
        places.learn(now, relay.into());
        places.learn(now, another.into());
        let tried: Vec<_> = (0..3).filter_map(|_| places.next_past_relay()).collect();
        assert_eq!(tried, [at(2), at(1), at(2)]);
        assert!(
            places.past_relay(at(2)) && !places.past_relay(relay) && !places.past_relay(another)
        );
        places.learn(now, at(2).into());
        assert_eq!(places.current(), Some(relay.into()));
        assert!(places.set_relay(None));
        assert_eq!(places.current(), Some(at(2).into()), "where it answered");
        assert!(!places.past_relay(at(2)));
        places.learn(now, relay.into());
        assert_eq!(
            places.current(),
            Some(at(2).into()),
            "what is still on its way does not lead back"
        );
        places.learn(now, at(9).into());
        assert_eq!(places.current(), Some(at(9).into()), "roaming goes on");
    }

    #[test]
    fn what_was_sent_to_an_address_is_answered_from_it() {
        let now = Instant::now();
        let [first, second] = [[10, 0, 0, 1], [10, 0, 0, 2]].map(|ip| Some(IpAddr::from(ip)));
        let way = |to, from| Way { to, from };
        let mut places = Places::default();
        places.reconfigure(&[at(1), at(2)], false);
        assert_eq!(places.current(), Some(way(at(1), None)), "nothing is known yet");
        places.learn(now, way(at(1), first));
        assert_eq!(places.current(), Some(way(at(1), first)));
        places.learn(now, way(at(1), second));
        assert_eq!(places.current(), Some(way(at(1), second)));
        places.set_relay(Some(at(50)));
        assert_eq!(places.current(), Some(way(at(50), None)));
        places.learn(now, way(at(50), first));
        assert_eq!(places.current(), Some(way(at(50), first)));
        places.set_relay(None);
        assert_eq!(places.current(), Some(way(at(1), second)));
        places.try_next();
        assert_eq!(places.current(), Some(way(at(2), None)), "another place, another way");
    }

    #[test]
    fn without_candidates_the_peer_has_to_call() {
        let mut places = Places::default();
        places.reconfigure(&[], false);
        places.try_next();
        assert_eq!(places.current, None);
        places.learn(Instant::now(), at(7).into());
        assert!(!places.reconfigure(&[], false));
        assert_eq!(places.current, Some(at(7)));
    }
}
