//! Peers as people see them: what the snapshot names, with what the engine knows.

use std::collections::BTreeMap;

use mesh_model::Snapshot;
use mesh_model::report::{KeyState, PeerReport};
use mesh_model::snapshot::WgKey;
use mesh_overlay::{Overlay, PeerStatus};

use crate::errors::chain;

/// One entry for each peer of the snapshot or of the engine, by name.
pub(super) async fn report(overlay: &Overlay, snapshot: &Snapshot) -> Vec<PeerReport> {
    let status = overlay.status().await.map_err(|error| {
        tracing::warn!(error = chain(&error), "overlay status unknown");
    });
    merge(snapshot, status.map(|status| status.peers).unwrap_or_default())
}

fn merge(snapshot: &Snapshot, statuses: Vec<PeerStatus>) -> Vec<PeerReport> {
    let mut statuses: BTreeMap<WgKey, PeerStatus> =
        statuses.into_iter().map(|status| (status.public_key, status)).collect();
    let mut reports: Vec<PeerReport> = snapshot
        .peers
        .iter()
        .map(|peer| {
            let status = statuses.remove(&peer.public_key);
            PeerReport {
                node: Some(peer.node.clone()),
                public_key: peer.public_key,
                endpoint: status
                    .as_ref()
                    .and_then(|status| status.endpoint)
                    .or_else(|| peer.endpoints.first().copied()),
                allowed_ips: peer.allowed_ips.clone(),
                handshake_age_secs: age(status.as_ref()),
                preshared_key: key_state(status.as_ref()),
                received_bytes: status.as_ref().map_or(0, |status| status.received_bytes),
                sent_bytes: status.as_ref().map_or(0, |status| status.sent_bytes),
            }
        })
        .collect();
    reports.extend(statuses.into_values().map(|status| PeerReport {
        node: None,
        public_key: status.public_key,
        endpoint: status.endpoint,
        allowed_ips: status.allowed_ips.clone(),
        handshake_age_secs: age(Some(&status)),
        preshared_key: key_state(Some(&status)),
        received_bytes: status.received_bytes,
        sent_bytes: status.sent_bytes,
    }));
    reports
}

fn key_state(status: Option<&PeerStatus>) -> KeyState {
    match status {
        Some(status) if status.preshared_agreed => KeyState::Agreed,
        Some(status) if status.preshared => KeyState::Pending,
        _ => KeyState::None,
    }
}

fn age(status: Option<&PeerStatus>) -> Option<u64> {
    status.and_then(PeerStatus::handshake_age).map(|age| age.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_model::snapshot::Peer;
    use mesh_model::{Objects, compile};

    #[test]
    fn named_peers_and_strangers_are_both_listed() {
        let mut snapshot = compile(&Objects::default(), &"a".parse().unwrap());
        let endpoint = "192.0.2.2:51900".parse().unwrap();
        snapshot.peers.push(Peer {
            node: "b".parse().unwrap(),
            public_key: WgKey([1; 32]),
            endpoints: vec![endpoint],
            allowed_ips: vec!["10.244.1.0/24".parse().unwrap()],
        });
        let stranger = PeerStatus {
            public_key: WgKey([2; 32]),
            endpoint: None,
            allowed_ips: vec![],
            handshake_age_ms: Some(2500),
            received_bytes: 1,
            sent_bytes: 2,
            unanswered: 0,
            preshared: false,
            preshared_agreed: false,
        };
        let reports = merge(&snapshot, vec![stranger]);
        assert_eq!(reports.len(), 2);
        assert_eq!((reports[0].endpoint, reports[0].handshake_age_secs), (Some(endpoint), None));
        assert_eq!((&reports[1].node, reports[1].handshake_age_secs), (&None, Some(2)));
    }
}
