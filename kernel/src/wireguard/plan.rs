//! From what a device has to what it should have.

use std::collections::BTreeSet;
use std::time::Duration;

use ipnet::IpNet;

use super::{
    AllowedIpsChange, Config, Observed, ObservedPeer, PeerChange, PeerConfig, Plan, SecretKey, Step,
};

/// What has to be done: device, new and changed peers, removals. Total over the union of peers.
///
/// An address that moves from one peer to another belongs to either at any time, because the kernel moves it when it is
/// added to the other.
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
    steps.extend(surplus(config, observed));
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

fn added(wanted: &BTreeSet<IpNet>, now: &BTreeSet<IpNet>) -> Option<AllowedIpsChange> {
    let missing: BTreeSet<IpNet> = wanted.difference(now).copied().collect();
    (!missing.is_empty()).then_some(AllowedIpsChange::Add(missing))
}

/// Takes from peers that stay what they are not to have any more, and no other peer has got.
fn surplus(config: &Config, observed: &Observed) -> impl Iterator<Item = Step> {
    let taken: BTreeSet<IpNet> =
        config.peers.values().flat_map(|peer| &peer.allowed_ips).copied().collect();
    config.peers.iter().filter_map(move |(key, wanted)| {
        let now = &observed.peers.get(key)?.allowed_ips;
        let mut left = now.difference(&wanted.allowed_ips);
        let change = PeerChange {
            allowed_ips: Some(AllowedIpsChange::Replace(wanted.allowed_ips.clone())),
            ..PeerChange::default()
        };
        left.any(|net| !taken.contains(net)).then_some(Step::PutPeer { key: *key, change })
    })
}

fn new_peer(wanted: &PeerConfig) -> PeerChange {
    PeerChange {
        add: true,
        endpoint: wanted.endpoint,
        allowed_ips: added(&wanted.allowed_ips, &BTreeSet::new()),
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
        allowed_ips: added(&wanted.allowed_ips, &now.allowed_ips),
        keepalive: (now.keepalive != wanted.keepalive)
            .then(|| wanted.keepalive.unwrap_or(Duration::ZERO)),
        preshared_key: (now.preshared_key != wanted.preshared_key)
            .then(|| wanted.preshared_key.unwrap_or(SecretKey([0; 32]))),
    };
    (change != PeerChange::default()).then_some(change)
}

#[cfg(test)]
mod tests;
