use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::SystemTime;

use mesh_model::snapshot::WgKey;
use proptest::prelude::*;

use super::super::{FakeWireGuard, PeerStatistics, WireGuardDevice};
use super::*;

fn any_peer() -> impl Strategy<Value = PeerConfig> {
    (prop::option::of(1..4_u8), 0..4_u8, prop::option::of(1..3_u64), prop::option::of(1..3_u8))
        .prop_map(|(endpoint, net, keepalive, psk)| PeerConfig {
            endpoint: endpoint.map(|host| SocketAddr::from(([192, 0, 2, host], 51_900))),
            pinned: false,
            allowed_ips: (0..net).map(|n| format!("10.244.{n}.0/24").parse().unwrap()).collect(),
            keepalive: keepalive.map(Duration::from_secs),
            preshared_key: psk.map(|byte| SecretKey([byte; 32])),
        })
}

fn any_config() -> impl Strategy<Value = Config> {
    let peers =
        prop::collection::btree_map((0..5_u8).prop_map(|b| WgKey([b; 32])), any_peer(), 0..4);
    (1..3_u8, 1..3_u16, peers).prop_map(|(key, listen_port, mut peers)| {
        // An address is one peer's.
        let mut taken = BTreeSet::new();
        for peer in peers.values_mut() {
            peer.allowed_ips.retain(|net| taken.insert(*net));
        }
        Config {
            private_key: SecretKey([0x40 | key << 3 & 0x38; 32]),
            listen_port,
            fwmark: 0,
            peers,
        }
    })
}

fn owned(observed: &Observed) -> BTreeSet<IpNet> {
    observed.peers.values().flat_map(|peer| &peer.allowed_ips).copied().collect()
}

proptest! {
    #[test]
    fn one_round_reaches_the_configuration(old in any_config(), new in any_config()) {
        let device = FakeWireGuard::new();
        device.apply(&plan(&old, &device.observe().unwrap())).unwrap();
        device.apply(&plan(&new, &device.observe().unwrap())).unwrap();
        let now = device.observe().unwrap();
        prop_assert_eq!(plan(&new, &now), Plan::default());
        let keys: BTreeSet<_> = now.peers.keys().collect();
        prop_assert_eq!(keys, new.peers.keys().collect::<BTreeSet<_>>());
        for (key, wanted) in &new.peers {
            let peer = &now.peers[key];
            prop_assert_eq!(&peer.allowed_ips, &wanted.allowed_ips);
            prop_assert_eq!(peer.keepalive, wanted.keepalive);
            prop_assert_eq!(peer.preshared_key, wanted.preshared_key);
        }
    }
}

proptest! {
    #[test]
    fn an_address_that_moves_is_always_somebodys(old in any_config(), new in any_config()) {
        let device = FakeWireGuard::new();
        device.apply(&plan(&old, &device.observe().unwrap())).unwrap();
        let before = owned(&device.observe().unwrap());
        let plan = plan(&new, &device.observe().unwrap());
        let after: BTreeSet<IpNet> =
            new.peers.values().flat_map(|peer| &peer.allowed_ips).copied().collect();
        for step in plan.steps {
            device.apply(&Plan { steps: vec![step] }).unwrap();
            let now = owned(&device.observe().unwrap());
            prop_assert!(before.intersection(&after).all(|net| now.contains(net)));
        }
    }
}

#[test]
fn a_learned_endpoint_stays() {
    let key = WgKey([7; 32]);
    let wanted = PeerConfig { endpoint: "192.0.2.1:1".parse().ok(), ..PeerConfig::default() };
    let config = Config {
        private_key: SecretKey([0x40; 32]),
        listen_port: 1,
        fwmark: 0,
        peers: [(key, wanted)].into(),
    };
    let device = FakeWireGuard::new();
    device.apply(&plan(&config, &device.observe().unwrap())).unwrap();
    let roamed: SocketAddr = "198.51.100.9:9".parse().unwrap();
    device.tamper(|state| {
        let peer = state.peers.get_mut(&key).unwrap();
        peer.endpoint = Some(roamed);
        peer.statistics = PeerStatistics {
            last_handshake: Some(SystemTime::UNIX_EPOCH),
            ..PeerStatistics::default()
        };
    });
    assert_eq!(plan(&config, &device.observe().unwrap()), Plan::default());
}

#[test]
fn secrets_are_not_printed() {
    assert_eq!(format!("{:?}", SecretKey([0x41; 32])), "SecretKey(..)");
}
