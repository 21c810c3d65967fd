//! From what a device has to what it should have.

use std::time::Duration;

use super::{Config, Observed, ObservedPeer, PeerChange, PeerConfig, Plan, SecretKey, Step};

/// What has to be done: device, new and changed peers, removals. Total over the union of peers.
///
/// The endpoint of a peer is set when it is new or has none; once it has shaken hands, the device knows better.
/// A peer that is known but never answered gets a changed endpoint.
pub fn plan(config: &Config, observed: &Observed) -> Plan {
    let mut steps = Vec::new();
    steps.extend(device_step(config, observed));
    for (key, wanted) in &config.peers {
        let change = match observed.peers.get(key) {
            None => Some(new_peer(wanted)),
            Some(now) => changed_peer(wanted, now),
        };
        steps.extend(change.map(|change| Step::PutPeer { key: *key, change }));
    }
    // An address moves from one peer to another with the steps above; nothing is removed before.
    let gone = observed.peers.keys().filter(|key| !config.peers.contains_key(key));
    steps.extend(gone.copied().map(Step::RemovePeer));
    Plan { steps }
}

fn device_step(config: &Config, observed: &Observed) -> Option<Step> {
    let private_key =
        (observed.private_key != Some(config.private_key)).then_some(config.private_key);
    let listen_port = (observed.listen_port != config.listen_port).then_some(config.listen_port);
    let fwmark = (observed.fwmark != config.fwmark).then_some(config.fwmark);
    let changes = private_key.is_some() || listen_port.is_some() || fwmark.is_some();
    changes.then_some(Step::SetDevice { private_key, listen_port, fwmark })
}

fn new_peer(wanted: &PeerConfig) -> PeerChange {
    PeerChange {
        add: true,
        endpoint: wanted.endpoint,
        allowed_ips: Some(wanted.allowed_ips.clone()),
        keepalive: wanted.keepalive,
        preshared_key: wanted.preshared_key,
    }
}

fn changed_peer(wanted: &PeerConfig, now: &ObservedPeer) -> Option<PeerChange> {
    let learned = now.endpoint.is_some() && now.statistics.last_handshake.is_some();
    let change = PeerChange {
        add: false,
        endpoint: wanted
            .endpoint
            .filter(|_| (wanted.pinned || !learned) && now.endpoint != wanted.endpoint),
        allowed_ips: (now.allowed_ips != wanted.allowed_ips).then(|| wanted.allowed_ips.clone()),
        keepalive: (now.keepalive != wanted.keepalive)
            .then(|| wanted.keepalive.unwrap_or(Duration::ZERO)),
        preshared_key: (now.preshared_key != wanted.preshared_key)
            .then(|| wanted.preshared_key.unwrap_or(SecretKey([0; 32]))),
    };
    (change != PeerChange::default()).then_some(change)
}

#[cfg(test)]
mod tests;
