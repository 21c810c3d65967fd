//! Where a datagram at one of the relay's ports goes. Pure: datagrams and a time in, destinations out.
//!
//! A port has pairs of nodes, and a source address at it belongs to one side of one pair. Where a side is, its
//! configuration says; but a node behind NAT appears at this port elsewhere than at the overlay's, and nowhere before it
//! has sent something. So handshakes from unknown places are followed. The first mac of a handshake message (WG section
//! 5.4.4) shows for whom it is, and that its sender knows the public keys of the cluster's nodes: it is passed on. Where
//! it came from counts as the sender's place only when the receiver goes on with that very handshake, which it does for
//! who has the private key. That is the same proof by which WireGuard itself lets peers roam, seen from outside.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;

use super::RelayedPair;
use crate::protocol::noise::cookie::Macs;
use crate::protocol::noise::message::{Message, word};

/// Handshakes of one side that may be gone on with.
const CALLS: usize = 4;
/// How long.
const CALL_LASTS: Duration = Duration::from_secs(10);
/// A side that was heard more lately is moved by nobody but the other side.
const QUIET: Duration = Duration::from_secs(3);

/// All pairs.
#[derive(Default)]
pub(super) struct Switch {
    pairs: Vec<Linked>,
    /// Pair and side that a source at a port belongs to.
    places: HashMap<(u16, SocketAddr), (usize, usize)>,
}

/// A pair in use.
struct Linked {
    port: u16,
    ends: [End; 2],
}

/// One side of a pair.
struct End {
    /// Its keys, and the macs of handshake messages that are meant for them.
    keys: Vec<(WgKey, Macs)>,
    configured: SocketAddr,
    /// Where it is: as configured, or where it was followed to.
    place: SocketAddr,
    heard: Option<Instant>,
    calls: VecDeque<Call>,
}

/// A handshake message from a place that is not proven yet.
struct Call {
    index: u32,
    from: SocketAddr,
    at: Instant,
}

/// Where a datagram goes: one place, or two while it is not known at which of them the receiver is.
pub(super) type Targets = [Option<SocketAddr>; 2];

impl Switch {
    /// Has these pairs from now on, by port. Sides that stay stay where they were followed to, unless they are
    /// configured to be elsewhere.
    pub(super) fn configure(&mut self, pairs: impl Iterator<Item = (u16, RelayedPair)>) {
        let mut old = std::mem::take(&mut self.pairs);
        for (port, pair) in pairs {
            let known = old.iter().position(|linked| {
                linked.port == port
                    && linked.ends.iter().zip(keys(&pair)).all(|(end, keys)| end.has_one_of(&keys))
            });
            self.pairs.push(match known {
                Some(place) => old.swap_remove(place).moved(&pair),
                None => {
                    let [a, b] = keys(&pair);
                    Linked { port, ends: [End::new(&a, pair.a), End::new(&b, pair.b)] }
                }
            });
        }
        self.index();
    }

    /// Pairs.
    pub(super) fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether all datagrams from there go to one place, whatever they are.
    pub(super) fn knows(&self, port: u16, from: SocketAddr) -> bool {
        self.places.contains_key(&(port, from))
    }

    /// Where a datagram goes; nowhere when it is nobody's.
    pub(super) fn pass(
        &mut self,
        now: Instant,
        port: u16,
        from: SocketAddr,
        datagram: &[u8],
    ) -> Targets {
        if let Some(&(pair, side)) = self.places.get(&(port, from)) {
            let linked = &mut self.pairs[pair];
            linked.ends[side].heard = Some(now);
            if linked.ends[1 - side].calls.is_empty() {
                return [Some(linked.ends[1 - side].place), None];
            }
            return self.answer(now, pair, side, datagram, true);
        }
        let Some((pair, side)) = self.sender(port, from, datagram) else { return [None; 2] };
        if !matches!(Message::read(datagram), Some(Message::Cookie(_))) {
            self.pairs[pair].ends[side].called(now, word(datagram, 4), from);
        }
        self.answer(now, pair, side, datagram, false)
    }

    /// Who it is that sends from a place that is nobody's: pair and side.
    fn sender(&self, port: u16, from: SocketAddr, datagram: &[u8]) -> Option<(usize, usize)> {
        let message = Message::read(datagram)?;
        let is_from = |end: &End, other: &End| match message {
            Message::Initiation(_) | Message::Response(_) => other.is_addressed(datagram),
            Message::Cookie(_) => end.has_called_from(from),
            Message::Data(_) => false,
        };
        let pairs = self.pairs.iter().enumerate().filter(|(_, linked)| linked.port == port);
        let mut sides = pairs.flat_map(|(pair, linked)| [(pair, 0, linked), (pair, 1, linked)]);
        let found =
            sides.find(|(_, side, linked)| is_from(&linked.ends[*side], &linked.ends[1 - side]));
        found.map(|(pair, side, _)| (pair, side))
    }

    /// A message of one side of a pair, maybe the answer to a call of the other.
    fn answer(
        &mut self,
        now: Instant,
        pair: usize,
        side: usize,
        datagram: &[u8],
        proven: bool,
    ) -> Targets {
        let other = &mut self.pairs[pair].ends[1 - side];
        other.calls.retain(|call| now.saturating_duration_since(call.at) < CALL_LASTS);
        let (receiver, agrees) = match Message::read(datagram) {
            // For whoever is there: it has not said anything yet that this could be an answer to.
            Some(Message::Initiation(_)) => {
                let called = other.calls.back().map(|call| call.from);
                return [Some(other.place), called.filter(|from| *from != other.place)];
            }
            Some(Message::Response(response)) => (word(response, 8), true),
            Some(Message::Cookie(reply)) => (word(reply, 4), false),
            Some(Message::Data(data)) => (data.receiver, true),
            None => return [None; 2],
        };
        let Some(call) = other.calls.iter().find(|call| call.index == receiver) else {
            return [Some(other.place), None];
        };
        let from = call.from;
        let quiet = other.heard.is_none_or(|at| now.saturating_duration_since(at) >= QUIET);
        if agrees && (proven || quiet) {
            other.calls.retain(|call| call.index != receiver);
            if other.place != from {
                tracing::debug!(place = %from, "a relayed node was followed");
                other.place = from;
                other.heard = Some(now);
                self.index();
            }
        }
        [Some(from), None]
    }

    fn index(&mut self) {
        self.places.clear();
        for (pair, linked) in self.pairs.iter().enumerate() {
            for (side, end) in linked.ends.iter().enumerate() {
                self.places.insert((linked.port, end.place), (pair, side));
            }
        }
    }
}

/// By which both sides are called.
fn keys(pair: &RelayedPair) -> [Vec<WgKey>; 2] {
    let sides = [(pair.a_key, pair.a_next_key), (pair.b_key, pair.b_next_key)];
    sides.map(|(key, next)| [Some(key), next].into_iter().flatten().collect())
}

fn named(keys: &[WgKey]) -> Vec<(WgKey, Macs)> {
    keys.iter().map(|key| (*key, Macs::for_receiver(key))).collect()
}

impl Linked {
    fn moved(mut self, pair: &RelayedPair) -> Self {
        let configured = [pair.a, pair.b].into_iter().zip(keys(pair));
        for (end, (configured, keys)) in self.ends.iter_mut().zip(configured) {
            end.keys = named(&keys);
            if end.configured != configured {
                (end.configured, end.place) = (configured, configured);
            }
        }
        self
    }
}

impl End {
    fn new(keys: &[WgKey], configured: SocketAddr) -> Self {
        let (keys, calls) = (named(keys), VecDeque::new());
        Self { keys, configured, place: configured, heard: None, calls }
    }

    fn has_one_of(&self, keys: &[WgKey]) -> bool {
        self.keys.iter().any(|(key, _)| keys.contains(key))
    }

    fn is_addressed(&self, message: &[u8]) -> bool {
        self.keys.iter().any(|(_, macs)| macs.is_addressed(message))
    }

    /// The first place of a call counts: who repeats it from elsewhere has only overheard it.
    fn called(&mut self, now: Instant, index: u32, from: SocketAddr) {
        if self.calls.iter().any(|call| call.index == index) {
            return;
        }
        if self.calls.len() == CALLS {
            self.calls.pop_front();
        }
        self.calls.push_back(Call { index, from, at: now });
    }

    fn has_called_from(&self, from: SocketAddr) -> bool {
        self.calls.iter().any(|call| call.from == from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::noise::message::{
        COOKIE_BYTES, INITIATION_BYTES, RESPONSE_BYTES, SEAL_OVERHEAD, TYPE_COOKIE, TYPE_DATA,
        TYPE_INITIATION, TYPE_RESPONSE,
    };

    const PORT: u16 = 51901;
    const A: WgKey = WgKey([1; 32]);
    const B: WgKey = WgKey([2; 32]);

    fn pair(a_key: WgKey, a_next_key: Option<WgKey>) -> RelayedPair {
        RelayedPair {
            slot: 0,
            a: at(1, 51900),
            a_key,
            a_next_key,
            b: at(2, 51900),
            b_key: B,
            b_next_key: None,
        }
    }

    fn at(host: u8, port: u16) -> SocketAddr {
        ([192, 0, 2, host], port).into()
    }

    fn switch() -> Switch {
        let mut switch = Switch::default();
        let pair = pair(A, None);
        switch.configure([(PORT, pair)].into_iter());
        switch
    }

    fn message(kind: u8, len: usize, fields: &[u32], to: Option<&WgKey>) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[0] = kind;
        for (place, field) in fields.iter().enumerate() {
            bytes[4 + place * 4..8 + place * 4].copy_from_slice(&field.to_le_bytes());
        }
        if let Some(key) = to {
            Macs::for_receiver(key).sign(&mut bytes, None);
        }
        bytes
    }

    fn call(index: u32, to: &WgKey) -> Vec<u8> {
        message(TYPE_INITIATION, INITIATION_BYTES, &[index], Some(to))
    }

    fn response(index: u32, receiver: u32, to: &WgKey) -> Vec<u8> {
        message(TYPE_RESPONSE, RESPONSE_BYTES, &[index, receiver], Some(to))
    }

    fn data(receiver: u32) -> Vec<u8> {
        message(TYPE_DATA, SEAL_OVERHEAD, &[receiver, 7], None)
    }

    fn one(place: SocketAddr) -> Targets {
        [Some(place), None]
    }

    #[test]
    fn who_is_where_it_is_configured_needs_no_proof() {
        let (mut switch, now) = (switch(), Instant::now());
        let (a, b) = (at(1, 51900), at(2, 51900));
        for datagram in [call(9, &B), data(3), b"anything".to_vec()] {
            assert_eq!(switch.pass(now, PORT, a, &datagram), one(b));
            assert_eq!(switch.pass(now, PORT, b, &datagram), one(a));
        }
        assert_eq!(switch.pass(now, PORT + 1, a, &data(3)), [None; 2], "of another port");
    }

    #[test]
    fn two_behind_symmetric_nat_find_each_other() {
        let (mut switch, now) = (switch(), Instant::now());
        let (a, b) = (at(1, 4001), at(2, 4002));
        // Both call. The first call goes where nobody hears it, the second one to where the first came from.
        assert_eq!(switch.pass(now, PORT, a, &call(10, &B)), one(at(2, 51900)));
        assert_eq!(switch.pass(now, PORT, b, &call(20, &A)), [Some(at(1, 51900)), Some(a)]);
        assert_eq!(switch.pass(now, PORT, a, &response(11, 20, &B)), one(b));
        assert_eq!(switch.pass(now, PORT, b, &data(11)), one(a));
        for _ in 0..3 {
            assert_eq!(switch.pass(now, PORT, a, &data(20)), one(b));
            assert_eq!(switch.pass(now, PORT, b, &data(11)), one(a));
        }
        // What was configured for them stays good for both, and takes nothing away.
        let same = pair(A, None);
        switch.configure([(PORT, same)].into_iter());
        assert_eq!(switch.pass(now, PORT, a, &data(20)), one(b));
    }

    #[test]
    fn a_side_is_followed_by_each_of_the_others_keys_and_stays_while_a_key_takes_over() {
        let (mut switch, now) = (switch(), Instant::now());
        let (a, b, moved) = (at(1, 51900), at(2, 51900), at(2, 4009));
        let next = WgKey([3; 32]);
        assert_eq!(switch.pass(now, PORT, moved, &call(30, &next)), [None; 2], "not known yet");
        switch.configure([(PORT, pair(A, Some(next)))].into_iter());
        assert_eq!(switch.pass(now, PORT, moved, &call(30, &next)), one(a));
        assert_eq!(switch.pass(now, PORT, a, &response(40, 30, &B)), one(moved));
        switch.configure([(PORT, pair(next, None))].into_iter());
        assert_eq!(switch.pass(now, PORT, a, &data(31)), one(moved), "where it was followed to");
        assert_eq!(switch.pass(now, PORT, b, &call(50, &A)), [None; 2], "that key is gone");
    }

    #[test]
    fn a_rebinding_is_followed_when_the_other_side_goes_on_with_the_handshake() {
        let (mut switch, now) = (switch(), Instant::now());
        let (a, b, moved) = (at(1, 51900), at(2, 51900), at(1, 4009));
        assert_eq!(switch.pass(now, PORT, b, &data(1)), one(a));
        assert_eq!(switch.pass(now, PORT, a, &data(1)), one(b));
        assert_eq!(switch.pass(now, PORT, moved, &data(1)), [None; 2], "data proves nothing");
        assert_eq!(switch.pass(now, PORT, moved, &call(30, &B)), one(b));
        assert_eq!(switch.pass(now, PORT, b, &data(99)), one(a), "not before it was answered");
        assert_eq!(switch.pass(now, PORT, b, &response(40, 30, &A)), one(moved));
        assert_eq!(switch.pass(now, PORT, moved, &data(40)), one(b));
        assert_eq!(switch.pass(now, PORT, b, &data(31)), one(moved));
    }

    #[test]
    fn strangers_and_eavesdroppers_move_nobody() {
        let (mut switch, now) = (switch(), Instant::now());
        let (a, b, evil) = (at(1, 51900), at(2, 51900), at(66, 666));
        let genuine = call(30, &B);
        assert_eq!(switch.pass(now, PORT, a, &data(5)), one(b));
        assert_eq!(switch.pass(now, PORT, b, &data(5)), one(a));
        // Whoever does not know the keys is not heard at all.
        let unsigned = message(TYPE_INITIATION, INITIATION_BYTES, &[30], None);
        for noise in
            [unsigned, data(5), message(TYPE_COOKIE, COOKIE_BYTES, &[5], None), vec![1; 148]]
        {
            assert_eq!(switch.pass(now, PORT, evil, &noise), [None; 2]);
        }
        // A call that was overheard reaches the other node, which does not answer it twice; nobody moves by it.
        assert_eq!(switch.pass(now, PORT, at(1, 4009), &genuine), one(b));
        assert_eq!(switch.pass(now, PORT, evil, &genuine), one(b));
        assert_eq!(switch.pass(now, PORT, b, &response(40, 30, &A)), one(at(1, 4009)));
        // Who knows the keys of both and plays both moves nobody that speaks.
        assert_eq!(switch.pass(now, PORT, evil, &call(50, &B)), one(b));
        assert_eq!(switch.pass(now, PORT, evil, &response(51, 50, &A)), one(evil));
        assert_eq!(switch.pass(now, PORT, b, &data(31)), one(at(1, 4009)));
        assert_eq!(switch.pass(now, PORT, at(1, 4009), &data(40)), one(b));
    }

    #[test]
    fn a_cookie_reaches_who_called() {
        let (mut switch, now) = (switch(), Instant::now());
        let (a, b) = (at(1, 4001), at(2, 4002));
        switch.pass(now, PORT, a, &call(10, &B));
        switch.pass(now, PORT, b, &call(20, &A));
        let cookie = message(TYPE_COOKIE, COOKIE_BYTES, &[20], None);
        assert_eq!(switch.pass(now, PORT, a, &cookie), one(b));
        assert_eq!(switch.pass(now, PORT, b, &call(21, &A)), [Some(at(1, 51900)), Some(a)]);
        let late = now + CALL_LASTS;
        assert_eq!(switch.pass(late, PORT, b, &call(22, &A)), one(at(1, 51900)), "long ago");
    }
}
