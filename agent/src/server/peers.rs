//! Peers as people see them: what the snapshot names, with what the engine knows.

use std::collections::BTreeMap;

use mesh_model::Snapshot;
use mesh_model::report::{KeyState, PathReport, PathState, PeerReport};
use mesh_model::snapshot::WgKey;
use mesh_overlay::paths::Standing;
use mesh_overlay::{Overlay, PeerStatus};

use crate::errors::chain;
use crate::paths::Seen;

/// One entry for each peer of the snapshot or of the engine, by name.
pub(super) async fn report(overlay: &Overlay, snapshot: &Snapshot, seen: &Seen) -> Vec<PeerReport> {
    let status = overlay.status().await.map_err(|error| {
        tracing::warn!(error = chain(&error), "overlay status unknown");
    });
    merge(snapshot, status.map(|status| status.peers).unwrap_or_default(), seen)
}

fn merge(snapshot: &Snapshot, statuses: Vec<PeerStatus>, seen: &Seen) -> Vec<PeerReport> {
    let mut statuses: BTreeMap<WgKey, PeerStatus> =
        statuses.into_iter().map(|status| (status.public_key, status)).collect();
    let named = snapshot.peers.iter().map(|peer| {
        let status = statuses.remove(&peer.public_key);
        let known = status.as_ref().and_then(|status| status.endpoint);
        PeerReport {
            node: Some(peer.node.clone()),
            endpoint: known.or_else(|| peer.endpoints.first().copied()),
            allowed_ips: peer.allowed_ips.clone(),
            keys: peer.keys.clone(),
            path: path(snapshot, seen, &peer.public_key, status.as_ref()),
            ..measured(peer.public_key, status.as_ref())
        }
    });
    let mut reports: Vec<PeerReport> = named.collect();
    reports.extend(statuses.into_values().map(|status| measured(status.public_key, Some(&status))));
    reports
}

/// What the engine knows about a peer.
fn measured(public_key: WgKey, status: Option<&PeerStatus>) -> PeerReport {
    PeerReport {
        node: None,
        public_key,
        endpoint: status.and_then(|status| status.endpoint),
        allowed_ips: status.map(|status| status.allowed_ips.clone()).unwrap_or_default(),
        handshake_age_secs: age(status),
        preshared_key: key_state(status),
        keys: vec![],
        knows_next_key: status.is_some_and(|status| status.knows_next_key),
        received_bytes: status.map_or(0, |status| status.received_bytes),
        sent_bytes: status.map_or(0, |status| status.sent_bytes),
        path: PathReport::default(),
    }
}

/// What the echoes say about it.
fn path(snapshot: &Snapshot, seen: &Seen, key: &WgKey, status: Option<&PeerStatus>) -> PathReport {
    let mtu = status.and_then(|status| status.mtu);
    let keepalive_secs = status.and_then(|status| status.keepalive_secs);
    let Ok(place) = seen.paths.binary_search_by_key(key, |path| path.key) else {
        return PathReport { mtu, keepalive_secs, ..PathReport::default() };
    };
    let path = &seen.paths[place];
    let name = |relay: WgKey| {
        let peer = snapshot.peers.iter().find(|peer| peer.public_key == relay);
        peer.map(|peer| peer.node.clone())
    };
    PathReport {
        state: match (path.standing, path.via) {
            (Standing::Up, None) => PathState::Direct,
            (Standing::Suspect, None) => PathState::Suspect,
            (Standing::Up | Standing::Suspect, Some(_)) => PathState::Relayed,
            (Standing::Unreachable, _) => PathState::Unreachable,
            (Standing::Down, _) => PathState::Down,
        },
        via: path.via.and_then(|via| name(via.relay)),
        rtt_us: path.rtt.map(|rtt| rtt.as_micros() as u64),
        loss_permille: path.loss_permille,
        since_secs: (path.lasts + seen.at.elapsed()).as_secs(),
        mtu,
        outside: path.outside,
        translated: path.translated,
        keepalive_secs,
    }
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
    use mesh_overlay::paths::{PathView, Via};

    #[test]
    fn named_peers_and_strangers_are_both_listed() {
        let mut snapshot = compile(&Objects::default(), &"a".parse().unwrap());
        let endpoint = "192.0.2.2:51900".parse().unwrap();
        std::sync::Arc::make_mut(&mut snapshot.peers).push(Peer {
            node: "b".parse().unwrap(),
            keys: vec![],
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
            relay: None,
            direct_answers: 0,
            keepalive_secs: None,
            mtu: None,
            knows_next_key: false,
        };
        let relay = Via { relay: WgKey([1; 32]), slot: 0 };
        let view = PathView {
            key: WgKey([1; 32]),
            standing: Standing::Up,
            via: Some(relay),
            rtt: Some(std::time::Duration::from_micros(700)),
            loss_permille: 3,
            lasts: std::time::Duration::from_secs(9),
            outside: None,
            translated: false,
        };
        let seen = Seen { paths: vec![view], ..Seen::default() };
        let reports = merge(&snapshot, vec![stranger], &seen);
        let path = &reports[0].path;
        assert_eq!((path.state, path.rtt_us), (PathState::Relayed, Some(700)));
        assert_eq!(path.via, Some("b".parse().unwrap()));
        assert_eq!(reports[1].path.state, PathState::Unknown);
        assert_eq!(reports.len(), 2);
        assert_eq!((reports[0].endpoint, reports[0].handshake_age_secs), (Some(endpoint), None));
        assert_eq!((&reports[1].node, reports[1].handshake_age_secs), (&None, Some(2)));
    }
}
