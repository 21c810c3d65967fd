//! What the overlay's counters say about paths.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mesh_model::Snapshot;
use mesh_model::snapshot::{Peer, WgKey};
use mesh_overlay::paths::{SLOTS, Via};
use mesh_overlay::{Kind, PeerStatus, Status};

/// The kernel's device cannot try a direct path beside a relay: after this time it is tried instead of it.
const KERNEL_TRIAL: Duration = Duration::from_secs(20);

/// The counters as they were last.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    peers: BTreeMap<WgKey, PeerStatus>,
    next_trial: Option<Instant>,
}

/// What changed between two looks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// Peers that were sent something and answered nothing.
    pub(super) unanswered: Vec<WgKey>,
    /// Peers that answered past the relay, and how often.
    pub(super) direct: Vec<(WgKey, u32)>,
    /// Largest packets to peers whose way carries less than the device, in bytes.
    pub(super) mtus: BTreeMap<WgKey, u16>,
}

impl Traffic {
    /// Takes new counters.
    pub(super) fn update(&mut self, now: Instant, status: &Status) -> News {
        let mut news = News::default();
        for peer in &status.peers {
            if let Some(mtu) = peer.mtu.filter(|mtu| *mtu < status.mtu) {
                news.mtus.insert(peer.public_key, mtu);
            }
            // Counters that went back are those of a new engine.
            let Some(old) = self.peers.get(&peer.public_key) else { continue };
            let sent = peer.sent_bytes > old.sent_bytes;
            if sent && peer.received_bytes == old.received_bytes {
                news.unanswered.push(peer.public_key);
            }
            // It starts from zero with each relay.
            let again = peer.direct_answers < old.direct_answers;
            let times = peer.direct_answers - if again { 0 } else { old.direct_answers };
            if times > 0 {
                news.direct.push((peer.public_key, u32::try_from(times).unwrap_or(u32::MAX)));
            }
        }
        if status.kind == Kind::Kernel {
            self.try_again(now, status, &mut news);
        }
        self.peers = status.peers.iter().map(|peer| (peer.public_key, peer.clone())).collect();
        news
    }

    fn try_again(&mut self, now: Instant, status: &Status, news: &mut News) {
        let next = *self.next_trial.get_or_insert(now + KERNEL_TRIAL);
        if now >= next {
            self.next_trial = Some(now + KERNEL_TRIAL);
            news.direct = status.peers.iter().map(|peer| (peer.public_key, 1)).collect();
        }
    }

    /// The relay's port that packets of a node come from although none is configured here: the other side has chosen it,
    /// and the overlay follows.
    pub(super) fn behind(&self, key: &WgKey, snapshot: &Snapshot) -> Option<Via> {
        let endpoint = self.peers.get(key).filter(|status| status.relay.is_none())?.endpoint?;
        let slot = endpoint.port().checked_sub(snapshot.cluster.overlay_port.checked_add(1)?)?;
        let slot = u8::try_from(slot).ok().filter(|slot| *slot < SLOTS)?;
        let is_here = |peer: &&Peer| peer.endpoints.iter().any(|e| e.ip() == endpoint.ip());
        let relay = snapshot.peers.iter().find(is_here)?.public_key;
        (relay != *key).then_some(Via { relay, slot })
    }

    /// Where packets of a node come from, when that is not a relay.
    pub(super) fn heard_at(&self, key: &WgKey, snapshot: &Snapshot) -> Option<SocketAddr> {
        let heard =
            |status: &&PeerStatus| status.relay.is_none() && status.handshake_age_ms.is_some();
        let endpoint = self.peers.get(key).filter(heard)?.endpoint?;
        (!is_relay_port(endpoint, snapshot)).then_some(endpoint)
    }

    /// Where a node itself is on the underlay: never a relay, so that a relay that sends there ends the way.
    pub(super) fn own_endpoint(&self, key: &WgKey, snapshot: &Snapshot) -> Option<SocketAddr> {
        let peer = snapshot.peers.iter().find(|peer| peer.public_key == *key)?;
        let heard = self.peers.get(key).and_then(|status| status.endpoint);
        // Behind NAT it may appear at any port, also of a machine that is a node itself.
        let own = |endpoint: &SocketAddr| {
            peer.endpoints.contains(endpoint) || !is_relay_port(*endpoint, snapshot)
        };
        heard.filter(own).or_else(|| peer.endpoints.first().copied())
    }
}

/// Whether a node has a relay there.
fn is_relay_port(endpoint: SocketAddr, snapshot: &Snapshot) -> bool {
    let first = snapshot.cluster.overlay_port.saturating_add(1);
    let ports = first..first.saturating_add(SLOTS.into());
    let here = |e: &SocketAddr| e.ip() == endpoint.ip();
    ports.contains(&endpoint.port()) && snapshot.peers.iter().any(|p| p.endpoints.iter().any(here))
}

#[cfg(test)]
mod tests {
    use mesh_model::{Objects, compile};

    use super::*;

    fn status(kind: Kind, peers: &[(u8, u64, u64, u64)]) -> Status {
        let peer =
            |&(n, sent_bytes, received_bytes, direct_answers): &(u8, u64, u64, u64)| PeerStatus {
                knows_next_key: false,
                public_key: WgKey([n; 32]),
                endpoint: Some(([192, 0, 2, n], 51900).into()),
                allowed_ips: vec![],
                handshake_age_ms: None,
                received_bytes,
                sent_bytes,
                unanswered: 0,
                preshared: false,
                preshared_agreed: false,
                relay: None,
                direct_answers,
                keepalive_secs: None,
                mtu: None,
            };
        Status {
            own_keys: vec![],
            kind,
            device: "mesh-wg".to_owned(),
            public_key: WgKey([9; 32]),
            listen_port: 51900,
            mtu: 1420,
            peers: peers.iter().map(peer).collect(),
            traffic: mesh_overlay::status::Traffic::default(),
            drops: BTreeMap::new(),
        }
    }

    #[test]
    fn silence_under_traffic_and_direct_answers_are_noticed() {
        let (now, mut traffic) = (Instant::now(), Traffic::default());
        let start = [(1, 10, 10, 0), (2, 10, 10, 3), (3, 10, 10, 0)];
        assert_eq!(traffic.update(now, &status(Kind::User, &start)), News::default());
        let later = [(1, 20, 10, 0), (2, 20, 20, 5), (3, 10, 10, 0)];
        let news = traffic.update(now, &status(Kind::User, &later));
        assert_eq!(news.unanswered, [WgKey([1; 32])]);
        assert_eq!(news.direct, [(WgKey([2; 32]), 2)]);
        let other_relay = [(1, 20, 10, 0), (2, 20, 20, 1), (3, 10, 10, 0)];
        let news = traffic.update(now, &status(Kind::User, &other_relay));
        assert_eq!(news.direct, [(WgKey([2; 32]), 1)]);
        let anew = [(1, 1, 0, 0), (2, 1, 0, 0), (3, 0, 0, 0)];
        assert_eq!(
            traffic.update(now, &status(Kind::User, &anew)),
            News::default(),
            "a new engine"
        );
    }

    #[test]
    fn ways_that_carry_less_than_the_device_are_known() {
        let mut measured = status(Kind::User, &[(1, 0, 0, 0), (2, 0, 0, 0), (3, 0, 0, 0)]);
        for (peer, mtu) in measured.peers.iter_mut().zip([Some(1340), Some(1420), None]) {
            peer.mtu = mtu;
        }
        let news = Traffic::default().update(Instant::now(), &measured);
        assert_eq!(news.mtus, [(WgKey([1; 32]), 1340)].into());
    }

    #[test]
    fn a_kernel_device_tries_the_direct_path_now_and_then() {
        let (now, mut traffic) = (Instant::now(), Traffic::default());
        let one = status(Kind::Kernel, &[(1, 0, 0, 0)]);
        assert_eq!(traffic.update(now, &one), News::default());
        assert_eq!(traffic.update(now + KERNEL_TRIAL, &one).direct, [(WgKey([1; 32]), 1)]);
        assert_eq!(traffic.update(now + KERNEL_TRIAL, &one), News::default());
    }

    #[test]
    fn a_relay_is_never_taken_for_the_node_behind_it() {
        let mut snapshot = compile(&Objects::default(), &"a".parse().unwrap());
        for (node, n) in [("b", 1u8), ("c", 2)] {
            std::sync::Arc::make_mut(&mut snapshot.peers).push(Peer {
                node: node.parse().unwrap(),
                keys: vec![],
                public_key: WgKey([n; 32]),
                endpoints: vec![([192, 0, 2, n], 51900).into()],
                allowed_ips: vec![],
            });
        }
        let mut traffic = Traffic::default();
        let mut heard_at = |endpoint: &str| {
            let mut status = status(Kind::User, &[(1, 0, 0, 0)]);
            status.peers[0].endpoint = Some(endpoint.parse().unwrap());
            traffic.update(Instant::now(), &status);
            let own = traffic.own_endpoint(&WgKey([1; 32]), &snapshot).unwrap().to_string();
            (own, traffic.behind(&WgKey([1; 32]), &snapshot).map(|via| (via.relay.0[0], via.slot)))
        };
        let at = |own: &str, via| (own.to_owned(), via);
        let own = "192.0.2.1:51900";
        assert_eq!(heard_at(own), at(own, None));
        assert_eq!(heard_at("192.0.2.2:51901"), at(own, Some((2, 0))), "through the relay on c");
        assert_eq!(heard_at("192.0.2.1:51902"), at(own, None), "through a relay on itself");
        let elsewhere = "198.51.100.7:4711";
        assert_eq!(heard_at(elsewhere), at(elsewhere, None), "roamed, or behind NAT");
    }
}
