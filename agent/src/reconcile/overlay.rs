//! The overlay's peers, and the relays in use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use mesh_model::snapshot::WgKey;
use mesh_overlay::paths::NAT_KEEPALIVE;
use mesh_overlay::{Overlay, OverlayConfig, PeerConfig, Status};
use tokio::sync::{Notify, watch};

use super::{Concern, Failures};
use crate::errors::chain;
use crate::observe::Desired;
use crate::rotation::Proofs;
use crate::switch::Whereabouts;

/// Keeps the overlay device's peers as the snapshot says.
pub(crate) struct Peers {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) mtu: u16,
    /// Told when another process has become the worker: what it restored may be older than what it was sent last.
    pub(crate) restarted: Arc<Notify>,
    /// Where peers were when the overlay changed its kind; told once.
    pub(crate) whereabouts: Whereabouts,
    /// The node's own public keys, where they are being replaced.
    pub(crate) own_keys: watch::Receiver<Vec<WgKey>>,
    /// Told when the device is there after it was not: its addresses, routes and programs are to follow at once.
    pub(crate) made: Arc<Notify>,
    /// Whether it was there when it was configured last.
    pub(crate) there: bool,
    /// Told which keys of others are in force.
    pub(crate) proofs: Proofs,
}

impl Concern for Peers {
    const NAME: &'static str = "overlay";
    type Slice = OverlayConfig;

    fn slice(&self, desired: &Desired) -> Option<OverlayConfig> {
        let snapshot = &desired.snapshot;
        let peer = |peer| {
            let peer = desired.preshared.peer(peer)?;
            let relay = desired.outlook.relays.get(&peer.public_key).copied();
            let kept = desired.outlook.keepalives.contains(&peer.public_key);
            let keepalive = kept.then_some(NAT_KEEPALIVE.as_secs() as u16);
            Some(PeerConfig { relay, persistent_keepalive_secs: keepalive, ..peer })
        };
        Some(OverlayConfig {
            listen_port: snapshot.cluster.overlay_port,
            mtu: self.mtu,
            peers: snapshot.peers.iter().filter_map(peer).collect(),
            own_keys: self.own_keys.borrow().clone(),
        })
    }

    async fn apply(&mut self, slice: &OverlayConfig, heal: bool) -> Result<(), Failures> {
        if heal {
            let status = self.overlay.status().await.map_err(|error| {
                self.there = false;
                vec![chain(&error)]
            })?;
            if is_in_force(slice, &status) {
                return Ok(());
            }
            tracing::warn!("somebody else changed the overlay's peers, repairing");
        }
        let config = found_again(slice, &self.whereabouts);
        let configured = self.overlay.configure(&config).await;
        let was_there = std::mem::replace(&mut self.there, configured.is_ok());
        configured.map_err(|error| vec![chain(&error)])?;
        if !was_there {
            tracing::info!(peers = config.peers.len(), "overlay configured");
            self.made.notify_one();
        }
        let keys = slice.peers.iter().map(|peer| (peer.public_key, peer.keys().to_vec()));
        self.proofs.in_force(keys);
        self.whereabouts.clear();
        Ok(())
    }

    async fn undone(&self) {
        self.restarted.notified().await;
    }
}

/// The configuration in which peers are first looked for where they were.
fn found_again(config: &OverlayConfig, whereabouts: &Whereabouts) -> OverlayConfig {
    let mut config = config.clone();
    for peer in &mut config.peers {
        // The kernel's device knew it by the key in use, our engine by its name.
        let mut known = [&peer.public_key].into_iter().chain(&peer.keys);
        if let Some(at) = known.find_map(|key| whereabouts.get(key)) {
            peer.endpoints.retain(|endpoint| endpoint != at);
            peer.endpoints.insert(0, *at);
        }
    }
    config
}

/// Whether the device has what the configuration asks for; endpoints are left out, because peers may roam.
fn is_in_force(config: &OverlayConfig, status: &Status) -> bool {
    let wanted = config.peers.iter().map(|p| (p.public_key, prefixes(&p.allowed_ips)));
    let present = status.peers.iter().map(|p| (p.public_key, prefixes(&p.allowed_ips)));
    status.listen_port == config.listen_port
        && status.mtu == config.mtu
        && (config.own_keys.is_empty() || status.own_keys == config.own_keys)
        && wanted.collect::<BTreeMap<_, _>>() == present.collect::<BTreeMap<_, _>>()
}

fn prefixes(list: &[IpNet]) -> BTreeSet<IpNet> {
    list.iter().map(IpNet::trunc).collect()
}

#[cfg(test)]
mod tests {
    use mesh_model::snapshot::{Peer, WgKey};
    use mesh_model::{Objects, compile};

    use super::*;
    use crate::paths::outlook::Outlook;

    #[test]
    fn only_those_that_see_this_node_through_nat_get_keepalives() {
        let mut snapshot = compile(&Objects::default(), &"a".parse().unwrap());
        for n in [1u8, 2] {
            std::sync::Arc::make_mut(&mut snapshot.peers).push(Peer {
                node: format!("n{n}").parse().unwrap(),
                keys: vec![],
                public_key: WgKey([n; 32]),
                endpoints: vec![([192, 0, 2, n], 51900).into()],
                allowed_ips: vec![],
            });
        }
        let keys = [1u8, 2].map(|n| (WgKey([n; 32]).to_string(), WgKey([n + 8; 32]).to_string()));
        let keys = std::collections::BTreeMap::from(keys);
        let preshared = serde_json::json!({"epoch": 1, "newest": keys, "agreed": {}});
        let desired = Desired {
            snapshot: Arc::new(snapshot),
            outlook: Arc::new(Outlook {
                keepalives: [WgKey([2; 32])].into(),
                ..Outlook::default()
            }),
            synced: true,
            preshared: Arc::new(serde_json::from_value(preshared).unwrap()),
        };
        let overlay = Arc::new(Overlay::user("/nonexistent"));
        let config = Peers {
            overlay,
            mtu: 1420,
            own_keys: watch::channel(vec![]).1,
            proofs: Proofs::default(),
            made: Arc::default(),
            there: false,
            restarted: Arc::default(),
            whereabouts: Whereabouts::default(),
        }
        .slice(&desired)
        .unwrap();
        let kept: Vec<_> = config.peers.iter().map(|p| p.persistent_keepalive_secs).collect();
        assert_eq!(kept, [None, Some(25)]);
    }

    #[test]
    fn a_peer_is_looked_for_where_it_was() {
        let mut config: OverlayConfig = serde_json::from_value(serde_json::json!({
            "listenPort": 51900, "mtu": 1420, "peers": [
                {"publicKey": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
                 "endpoints": ["192.0.2.1:51900", "192.0.2.2:51900"], "allowedIps": []},
                {"publicKey": "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=",
                 "endpoints": [], "allowedIps": []},
                {"publicKey": "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=",
                 "endpoints": ["192.0.2.3:51900"], "allowedIps": []},
            ],
        }))
        .unwrap();
        let at = |text: &str| text.parse().unwrap();
        let keys: Vec<_> = config.peers.iter().map(|peer| peer.public_key).collect();
        let in_use = WgKey([9; 32]);
        config.peers[1].keys = vec![in_use];
        let found = [(keys[0], at("192.0.2.2:51900")), (in_use, at("198.51.100.1:7"))].into();
        let again = found_again(&config, &found);
        let endpoints: Vec<_> = again.peers.iter().map(|peer| peer.endpoints.clone()).collect();
        assert_eq!(endpoints[0], [at("192.0.2.2:51900"), at("192.0.2.1:51900")]);
        assert_eq!(endpoints[1], [at("198.51.100.1:7")], "behind NAT: it has no other");
        assert_eq!(endpoints[2], config.peers[2].endpoints);
    }

    #[test]
    fn roaming_is_no_drift_but_a_lost_peer_is() {
        let config: OverlayConfig = serde_json::from_value(serde_json::json!({
            "listenPort": 51900, "mtu": 1420, "peers": [{
                "publicKey": "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=",
                "endpoints": ["192.0.2.2:51900"], "allowedIps": ["10.244.2.0/24"],
            }],
        }))
        .unwrap();
        let peer = mesh_overlay::PeerStatus {
            public_key: config.peers[0].public_key,
            endpoint: Some("198.51.100.7:4".parse().unwrap()),
            allowed_ips: config.peers[0].allowed_ips.clone(),
            handshake_age_ms: None,
            received_bytes: 0,
            sent_bytes: 0,
            unanswered: 0,
            preshared: false,
            preshared_agreed: false,
            relay: None,
            direct_answers: 0,
            keepalive_secs: None,
            mtu: None,
            knows_next_key: false,
        };
        let mut status = Status {
            kind: mesh_overlay::Kind::User,
            device: "mesh-wg".to_owned(),
            public_key: config.peers[0].public_key,
            own_keys: vec![],
            listen_port: 51900,
            mtu: 1420,
            peers: vec![peer],
            traffic: mesh_overlay::status::Traffic::default(),
            drops: BTreeMap::new(),
        };
        assert!(is_in_force(&config, &status));
        status.peers[0].allowed_ips.clear();
        assert!(!is_in_force(&config, &status));
        status.peers.clear();
        assert!(!is_in_force(&config, &status));
    }
}
