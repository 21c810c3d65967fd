//! Datagrams that wait to be sent, packed so that one system call sends many.

use std::net::{IpAddr, SocketAddr};

use super::ecn::Ecn;

/// Most datagrams in one segmentation-offload send (`UDP_MAX_SEGMENTS` before Linux 6.9).
const MAX_SEGMENTS: usize = 64;

/// Most bytes in one: the kernel builds one IP packet of it before it cuts.
const MAX_RUN_BYTES: usize = 65_000;

/// Where the buffer stops growing. Reached only with segments of a few bytes.
const MAX_BYTES: usize = 1 << 20;

/// Where a datagram goes, or would go that answers one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// The other side.
    pub to: SocketAddr,
    /// The address of this node that the other side has sent to: a firewall or a NAT before it lets nothing in from another one.
    /// The system chooses when there is none.
    pub from: Option<IpAddr>,
}

impl From<SocketAddr> for Way {
    fn from(to: SocketAddr) -> Self {
        Self { to, from: None }
    }
}

/// Datagrams one after the other in one buffer, in runs that go to one destination in pieces of one size.
///
/// The buffer is reused; it grows to what the largest batch needed.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    used: usize,
    runs: Vec<Run>,
    /// Runs before this one have been taken.
    sent: usize,
}

/// Datagrams that one system call can send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    way: Way,
    ecn: Ecn,
    start: usize,
    end: usize,
    segment: usize,
}

/// A run as the socket sees it: all pieces but the last are `segment` bytes long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Train<'a> {
    /// Where to.
    pub way: Way,
    /// What all of them say about congestion.
    pub ecn: Ecn,
    /// The datagrams, one after the other.
    pub bytes: &'a [u8],
    /// Length of each but the last, which may be shorter.
    pub segment: usize,
}

impl Train<'_> {
    /// How many datagrams it holds.
    pub fn datagrams(&self) -> usize {
        self.bytes.len().div_ceil(self.segment)
    }
}

impl Outbox {
    /// Room for a datagram of up to `bytes`; none when far too much waits already.
    pub fn room(&mut self, bytes: usize) -> Option<&mut [u8]> {
        let end = self.used + bytes;
        if end > MAX_BYTES {
            return None;
        }
        if end > self.bytes.len() {
            self.bytes.resize(end.next_multiple_of(64 << 10), 0);
        }
        Some(&mut self.bytes[self.used..])
    }

    /// The first `len` bytes of the [`room`](Self::room) are a datagram that goes this way, with these marks. Empty ones are
    /// ignored.
    pub fn commit(&mut self, way: Way, ecn: Ecn, len: usize) {
        if len == 0 {
            return;
        }
        let (start, end) = (self.used, self.used + len);
        debug_assert!(end <= self.bytes.len(), "only what room() gave");
        self.used = end;
        if self.runs.len() > self.sent
            && let Some(run) = self.runs.last_mut()
            && run.accepts(way, ecn, len)
        {
            run.end = end;
        } else {
            self.runs.push(Run { way, ecn, start, end, segment: len });
        }
    }

    /// Bytes of the buffer in use, sent ones included: when they grow, it is time to [`take`](Self::take) all.
    pub fn used_bytes(&self) -> usize {
        self.used
    }

    /// Bytes that wait.
    pub fn waiting_bytes(&self) -> usize {
        self.runs[self.sent..].first().map_or(0, |run| self.used - run.start)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.sent == self.runs.len()
    }

    /// The next train to which nothing can be added any more; the newest one stays, in case that it grows.
    pub fn take_closed(&mut self) -> Option<Train<'_>> {
        let closed = match self.runs.last() {
            Some(last) if last.is_full() => self.runs.len(),
            _ => self.runs.len().saturating_sub(1),
        };
        if self.sent < closed { self.take() } else { None }
    }

    /// The next train. When all have been taken, the buffer starts anew.
    pub fn take(&mut self) -> Option<Train<'_>> {
        if self.sent == self.runs.len() {
            self.clear();
            return None;
        }
        let run = self.runs[self.sent];
        self.sent += 1;
        let Run { way, ecn, start, end, segment } = run;
        Some(Train { way, ecn, bytes: &self.bytes[start..end], segment })
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.sent = 0;
        self.used = 0;
    }
}

impl Run {
    fn accepts(&self, way: Way, ecn: Ecn, len: usize) -> bool {
        let held = self.end - self.start;
        (self.way, self.ecn) == (way, ecn)
            && len <= self.segment
            && !self.is_full()
            && held + len <= MAX_RUN_BYTES
    }

    fn is_full(&self) -> bool {
        let held = self.end - self.start;
        !held.is_multiple_of(self.segment)
            || held / self.segment >= MAX_SEGMENTS
            || held + self.segment > MAX_RUN_BYTES
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put(outbox: &mut Outbox, to: u16, len: usize, fill: u8) {
        put_marked(outbox, to, Ecn::NotCapable, len, fill);
    }

    fn put_marked(outbox: &mut Outbox, to: u16, ecn: Ecn, len: usize, fill: u8) {
        outbox.room(len).unwrap()[..len].fill(fill);
        outbox.commit(SocketAddr::from(([192, 0, 2, 1], to)).into(), ecn, len);
    }

    #[test]
    fn equal_sizes_to_one_place_become_one_train() {
        let mut outbox = Outbox::default();
        for len in [1452, 1452, 1452, 100, 1452] {
            put(&mut outbox, 1, len, 7);
        }
        put(&mut outbox, 2, 1452, 7);
        let lengths: Vec<_> = std::iter::from_fn(|| {
            outbox.take().map(|train| (train.datagrams(), train.bytes.len()))
        })
        .collect();
        assert_eq!(lengths, [(4, 4456), (1, 1452), (1, 1452)]);
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_full_train_leaves_while_the_next_one_grows() {
        let mut outbox = Outbox::default();
        for _ in 0..46 {
            put(&mut outbox, 1, 1452, 7);
        }
        assert_eq!(outbox.take_closed().unwrap().datagrams(), 44);
        assert!(outbox.take_closed().is_none());
        put(&mut outbox, 1, 1452, 7);
        assert_eq!(outbox.waiting_bytes(), 3 * 1452);
        assert_eq!(outbox.take().unwrap().datagrams(), 3);
        assert!(outbox.take().is_none());
    }

    #[test]
    fn what_leaves_from_different_addresses_leaves_in_different_trains() {
        let mut outbox = Outbox::default();
        let to = SocketAddr::from(([192, 0, 2, 1], 1));
        let ways = [None, Some([10, 0, 0, 1]), Some([10, 0, 0, 1]), Some([10, 0, 0, 2])];
        for from in ways {
            outbox.room(100).unwrap()[..100].fill(7);
            outbox.commit(Way { to, from: from.map(IpAddr::from) }, Ecn::NotCapable, 100);
        }
        let trains: Vec<_> =
            std::iter::from_fn(|| outbox.take().map(|train| train.datagrams())).collect();
        assert_eq!(trains, [1, 2, 1]);
    }

    #[test]
    fn what_is_marked_differently_leaves_in_different_trains() {
        let mut outbox = Outbox::default();
        let marks = [Ecn::Capable0, Ecn::Capable0, Ecn::NotCapable, Ecn::Congested, Ecn::Congested];
        for ecn in marks {
            put_marked(&mut outbox, 1, ecn, 1452, 7);
        }
        let trains: Vec<_> =
            std::iter::from_fn(|| outbox.take().map(|train| (train.ecn, train.datagrams())))
                .collect();
        assert_eq!(trains, [(Ecn::Capable0, 2), (Ecn::NotCapable, 1), (Ecn::Congested, 2)]);
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(
            sizes in prop::collection::vec((0u16..3, 1usize..3000), 0..300),
            early in any::<bool>(),
        ) {
            let mut outbox = Outbox::default();
            let mut out = Vec::new();
            let mut collect = |train: Train<'_>| {
                assert!(train.bytes.len() <= MAX_RUN_BYTES && train.datagrams() <= MAX_SEGMENTS);
                for piece in train.bytes.chunks(train.segment) {
                    out.push((train.way.to.port(), piece.to_vec()));
                }
            };
            let mut expected = Vec::new();
            for (n, &(to, len)) in sizes.iter().enumerate() {
                put(&mut outbox, to, len, n as u8);
                expected.push((to, vec![n as u8; len]));
                if early && let Some(train) = outbox.take_closed() {
                    collect(train);
                }
            }
            while let Some(train) = outbox.take() {
                collect(train);
            }
            prop_assert_eq!(out, expected);
        }
    }
}
