//! How large packets to a peer may be where the kernel seals them.
//!
//! The kernel lets routers cut up the datagrams that it seals packets into, and says nothing. So the way is tested beside the
//! tunnel: with echoes that are as large as such datagrams and may not be cut, to where the peer is. What follows from
//! answers is decided as for our own engine ([`PathMtu`]). Where no echo is ever answered, what the system has heard from
//! routers is believed. Pure: no clock, no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_model::snapshot::WgKey;

use crate::mtu::{overhead, tunnel_mtu};
use crate::protocol::peer::path_mtu::{LARGE, PathMtu, Probe};

/// An answer that is later says nothing any more: longer than any probe is waited for.
const FORGET_AFTER: Duration = Duration::from_secs(2);
const IPV4_HEADER: u16 = 20;
const IPV6_HEADER: u16 = 40;

/// The ways to all peers.
#[derive(Debug, Default)]
pub(super) struct Ways {
    ways: BTreeMap<WgKey, Way>,
    asked: BTreeMap<u32, Asked>,
    last_token: u32,
}

#[derive(Debug)]
struct Way {
    to: SocketAddr,
    path: PathMtu,
    /// What the system knows about the way, as a packet inside the tunnel.
    known: u16,
    sent_bytes: u64,
    /// Large packets may have been sent since the last test.
    large: bool,
}

#[derive(Debug)]
struct Asked {
    peer: WgKey,
    probe: Probe,
    at: Instant,
    length: usize,
}

/// An echo to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) to: IpAddr,
    pub(super) token: u32,
    /// Length of the ICMP message.
    pub(super) length: usize,
}

/// A peer as the device has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) key: WgKey,
    pub(super) at: SocketAddr,
    pub(super) sent_bytes: u64,
}

impl Ways {
    /// Takes over where the peers are; those that are not named are forgotten. `path_mtu` is what the system knows about
    /// a way, `device` the MTU of the device.
    pub(super) fn observe(
        &mut self,
        now: Instant,
        device: u16,
        peers: &[Seen],
        path_mtu: impl Fn(SocketAddr) -> Option<u16>,
    ) {
        let present: BTreeSet<WgKey> = peers.iter().map(|peer| peer.key).collect();
        self.ways.retain(|key, _| present.contains(key));
        for seen in peers {
            let known = path_mtu(seen.at).map_or(device, |mtu| tunnel_mtu(mtu, seen.at.ip()));
            let way = self.ways.entry(seen.key).or_insert_with(|| Way {
                to: seen.at,
                path: PathMtu::new(now, device),
                known,
                sent_bytes: seen.sent_bytes,
                large: false,
            });
            let more = seen.sent_bytes.saturating_sub(way.sent_bytes);
            way.large |= more >= LARGE as u64;
            (way.to, way.known, way.sent_bytes) = (seen.at, known, seen.sent_bytes);
            way.path.set_ceiling(now, device);
            way.path.set_way(now, Some(seen.at));
            way.path.hint(now, known);
        }
    }

    /// Lets time pass; what is to be sent now.
    pub(super) fn poll(&mut self, now: Instant) -> Vec<Question> {
        self.asked.retain(|_, asked| now.saturating_duration_since(asked.at) < FORGET_AFTER);
        let mut questions = vec![];
        for (key, way) in &mut self.ways {
            let probes = way.path.poll(now, std::mem::take(&mut way.large));
            for probe in probes.into_iter().flatten() {
                self.last_token = self.last_token.wrapping_add(1);
                let (token, length) = (self.last_token, echo_length(probe.size, way.to.ip()));
                self.asked.insert(token, Asked { peer: *key, probe, at: now, length });
                questions.push(Question { to: way.to.ip(), token, length });
            }
        }
        questions
    }

    /// An echo came back, with a message of `length` bytes.
    pub(super) fn answered(&mut self, now: Instant, from: IpAddr, token: u32, length: usize) {
        let Some(asked) = self.asked.remove(&token).filter(|asked| asked.length == length) else {
            return;
        };
        if let Some(way) = self.ways.get_mut(&asked.peer).filter(|way| way.to.ip() == from) {
            way.path.acknowledged(now, asked.probe);
        }
    }

    /// The system refused to send an echo: its first link carries less.
    pub(super) fn refused(&mut self, now: Instant, token: u32) {
        let Some(asked) = self.asked.remove(&token) else { return };
        if let Some(way) = self.ways.get_mut(&asked.peer) {
            way.path.limit(now, way.known.min(asked.probe.size.saturating_sub(4)));
        }
    }

    /// Largest packets to a peer, in bytes.
    pub(super) fn mtu(&self, key: &WgKey) -> Option<u16> {
        let way = self.ways.get(key)?;
        let tested = way.path.mtu();
        Some(if way.path.is_silent() { tested.min(way.known) } else { tested })
    }

    /// Whether answers are waited for.
    pub(super) fn waiting(&self) -> bool {
        !self.asked.is_empty()
    }
}

/// Length of the ICMP message in a packet as large as the datagram that a packet of `size` is sealed into.
fn echo_length(size: u16, to: IpAddr) -> usize {
    let header = if to.is_ipv4() { IPV4_HEADER } else { IPV6_HEADER };
    usize::from(size + overhead(to) - header)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What lies between this node and its peers.
    struct Net {
        /// What the first link carries, and what lies behind it, in bytes of a whole datagram.
        link: u16,
        behind: u16,
        answers: bool,
        ways: Ways,
        now: Instant,
        sent_bytes: u64,
        echoes: usize,
    }

    const KEY: WgKey = WgKey([1; 32]);
    const DEVICE: u16 = 1420;

    impl Net {
        fn new(link: u16, behind: u16) -> Self {
            let ways = Ways::default();
            let now = Instant::now();
            Self { link, behind, answers: true, ways, now, sent_bytes: 0, echoes: 0 }
        }

        /// Some seconds, in which large packets are sent.
        fn run(&mut self, to: &str, secs: u32) -> u16 {
            let at: SocketAddr = to.parse().unwrap();
            for _ in 0..secs * 10 {
                self.now += Duration::from_millis(100);
                self.sent_bytes += 100_000;
                let seen = Seen { key: KEY, at, sent_bytes: self.sent_bytes };
                self.ways.observe(self.now, DEVICE, &[seen], |_| Some(self.link));
                for question in self.ways.poll(self.now) {
                    self.echoes += 1;
                    let header = if at.is_ipv4() { 20 } else { 40 };
                    let size = question.length + header;
                    if size > usize::from(self.link) {
                        self.ways.refused(self.now, question.token);
                    } else if self.answers && size <= usize::from(self.behind) {
                        let (to, token) = (question.to, question.token);
                        self.ways.answered(self.now, to, token, question.length);
                    }
                }
            }
            self.ways.mtu(&KEY).unwrap()
        }
    }

    #[test]
    fn a_way_that_carries_less_than_its_first_link_is_found() {
        for to in ["192.0.2.1:51900", "[2001:db8::1]:51900"] {
            let most = |path| tunnel_mtu(path, to.parse::<SocketAddr>().unwrap().ip());
            let mut net = Net::new(1500, 1500);
            assert_eq!(net.run(to, 5), DEVICE, "{to}");
            assert!(net.echoes > 0);
            net.behind = 1400;
            let found = net.run(to, 15);
            assert!(found <= most(1400) && found + 16 > most(1400), "{to}: {found}");
            net.behind = 1500;
            assert_eq!(net.run(to, 70), DEVICE, "{to}: it became wider again");
        }
    }

    #[test]
    fn a_narrow_first_link_is_known_at_once() {
        let mut net = Net::new(1400, 1400);
        assert_eq!(net.run("192.0.2.1:51900", 1), 1340);
        assert_eq!(net.run("192.0.2.1:51900", 10), 1340);
    }

    #[test]
    fn without_answers_the_system_is_believed_and_not_asked_for_ever() {
        let mut net = Net::new(1500, 1500);
        net.answers = false;
        assert_eq!(net.run("192.0.2.1:51900", 20), DEVICE);
        net.link = 1400;
        assert_eq!(net.run("192.0.2.1:51900", 10), 1340);
        let before = net.echoes;
        net.run("192.0.2.1:51900", 120);
        assert!(net.echoes - before < 60, "{}", net.echoes - before);
    }

    #[test]
    fn answers_of_others_or_of_another_length_say_nothing() {
        let now = Instant::now();
        let at: SocketAddr = "192.0.2.1:51900".parse().unwrap();
        let mut ways = Ways::default();
        ways.observe(now, DEVICE, &[Seen { key: KEY, at, sent_bytes: 0 }], |_| Some(1500));
        let [question] = ways.poll(now)[..] else { panic!("{ways:?}") };
        assert_eq!(question.length, usize::from(DEVICE) + 60 - 20);
        assert!(ways.waiting());
        let before = format!("{:?}", ways.ways);
        ways.answered(now, at.ip(), question.token + 1, question.length);
        assert_eq!(format!("{:?}", ways.ways), before);
        ways.answered(now, "192.0.2.9".parse().unwrap(), question.token, question.length);
        assert_eq!(format!("{:?}", ways.ways), before);
        ways.observe(now, DEVICE, &[], |_| Some(1500));
        assert_eq!(ways.mtu(&KEY), None);
        ways.poll(now + FORGET_AFTER);
        assert!(!ways.waiting());
    }
}
