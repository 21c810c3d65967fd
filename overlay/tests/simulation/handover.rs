//! A process leaves its sessions to the next one, or dies at some step of it.

use std::collections::HashSet;

use mesh_overlay::PresharedKey;
use mesh_overlay::config::OverlayConfig;
use proptest::prelude::*;

use crate::net::{Datagram, Net, initiations};
use crate::{MILLIS, SECS};

/// Receiver and number of each data message, with its sender. What a session seals must be different each time.
fn numbers(tapped: &[Datagram]) -> impl Iterator<Item = (std::net::SocketAddr, [u8; 12])> {
    let data = tapped.iter().filter(|datagram| datagram.bytes[0] == 4);
    data.map(|datagram| (datagram.from, *datagram.bytes[4..].first_chunk().unwrap()))
}

fn assert_unique(tapped: &[Datagram]) {
    let mut seen = HashSet::new();
    for number in numbers(tapped) {
        assert!(seen.insert(number), "used twice: {number:?}");
    }
}

#[test]
fn a_successor_goes_on_without_a_handshake_and_without_loss() {
    let mut net = Net::mesh(3);
    net.run(SECS(1));
    net.tapped.clear();
    let config = net.config(0);
    for n in 0u32..200 {
        for (from, to) in [(0, 1), (1, 0), (2, 0)] {
            net.send(from, to, &n.to_be_bytes());
        }
        net.run(MILLIS(10));
        if n % 10 == 5 {
            net.hand_over(0, &config);
        }
    }
    net.run(MILLIS(100));
    assert_eq!((net.payloads(0).len(), net.payloads(1).len()), (400, 200));
    assert_eq!(initiations(&net.tapped), 0);
    assert_unique(&net.tapped);
    let peer = net.peer(0, 1);
    assert!(peer.handshake_age_ms.unwrap() > 2900, "{peer:?}");
    assert!(peer.sent_bytes > 200 * 24 && peer.received_bytes > 200 * 24, "{peer:?}");
}

#[test]
fn sessions_are_renewed_and_end_in_time_whoever_has_them() {
    let mut net = Net::mesh(2);
    net.run(MILLIS(100));
    let config = net.config(0);
    net.tapped.clear();
    let mut oldest = 0;
    for n in 0u32..800 {
        net.send(0, 1, &n.to_be_bytes());
        net.send(1, 0, &n.to_be_bytes());
        net.run(MILLIS(500));
        net.hand_over(0, &config);
        oldest = oldest.max(net.peer(0, 1).handshake_age_ms.unwrap());
    }
    net.run(MILLIS(100));
    assert_eq!((net.payloads(0).len(), net.payloads(1).len()), (800, 800));
    let calls = initiations(&net.tapped);
    assert!((3..=8).contains(&calls), "{calls} initiations in 400 s");
    assert!((119_000..126_000).contains(&oldest), "a session was used for {oldest} ms");
    assert_unique(&net.tapped);
}

#[test]
fn replays_endpoints_and_keys_are_remembered() {
    let secret = |n| Some(PresharedKey(mesh_model::snapshot::WgKey([n; 32])));
    let keyed = |mut config: OverlayConfig, n, former: Option<u8>| {
        config.peers[0].preshared_key = secret(n);
        config.peers[0].former_preshared_key = former.and_then(secret);
        config
    };
    let mut net = Net::new(2);
    for node in [0, 1] {
        let config = keyed(net.config(node), 1, None);
        net.configure(node, &config);
    }
    net.run(MILLIS(100));
    net.nodes[1].address = "198.51.100.9:4000".parse().unwrap();
    net.tapped.clear();
    net.send(1, 0, b"from elsewhere");
    net.run(MILLIS(50));
    let config = keyed(net.config(0), 1, None);
    let mut config = OverlayConfig { listen_port: 51900, ..config };
    config.peers[0].endpoints = vec!["192.0.2.2:51900".parse().unwrap()];
    net.hand_over(0, &config);
    assert_eq!(net.peer(0, 1).endpoint, Some(net.nodes[1].address), "it has not moved back");
    assert!(net.peer(0, 1).preshared_agreed);
    assert_eq!(net.payloads(0), [b"from elsewhere"]);
    for datagram in net.tapped.clone() {
        net.inject(&datagram);
    }
    assert!(net.payloads(0).is_empty(), "seen by the one before");
    assert!(net.drops(0, mesh_overlay::DropReason::Replayed) > 0);

    // The key changes on this side; the other one hears of it later, and its calls are answered all the same.
    net.configure(0, &keyed(config.clone(), 2, Some(1)));
    net.run(MILLIS(10));
    net.hand_over(0, &keyed(config.clone(), 2, Some(1)));
    net.run(SECS(200));
    net.send(1, 0, b"with the old key");
    net.run(SECS(2));
    assert_eq!(net.payloads(0), [b"with the old key"]);
    let late = keyed(net.config(1), 2, Some(1));
    net.configure(1, &late);
    net.run(SECS(2));
    assert!(net.peer(0, 1).preshared_agreed && net.peer(1, 0).preshared_agreed);
}

#[test]
fn peers_that_are_not_configured_any_more_are_not_gone_on_with() {
    let mut net = Net::mesh(3);
    net.run(MILLIS(100));
    let mut fewer = net.config(0);
    let gone = fewer.peers.remove(0).public_key;
    net.hand_over(0, &fewer);
    let dropped = net.nodes.iter().position(|node| node.key.public() == gone).unwrap();
    net.send(dropped, 0, b"from a stranger");
    net.run(MILLIS(50));
    assert!(net.payloads(0).is_empty());
    assert!(net.drops(0, mesh_overlay::DropReason::UnknownSession) > 0);
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Talk,
    Pass(u16),
    HandOver,
    /// `kill -9` of the one that works.
    Die,
    /// Of both, between leaving and going on.
    LoseEstate,
}

fn step() -> impl Strategy<Value = (usize, Step)> {
    let step = prop_oneof![
        4 => Just(Step::Talk),
        2 => (0u16..3000).prop_map(Step::Pass),
        3 => Just(Step::HandOver),
        1 => Just(Step::Die),
        1 => Just(Step::LoseEstate),
    ];
    (0usize..2, step)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whoever_dies_when_no_number_is_used_twice_and_peers_find_each_other(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let mut net = Net::mesh(2);
        let configs = [net.config(0), net.config(1)];
        for (node, step) in steps {
            match step {
                Step::Talk => {
                    net.send(node, 1 - node, b"word");
                    net.run(MILLIS(20));
                }
                Step::Pass(millis) => net.run(MILLIS(millis.into())),
                Step::HandOver => net.hand_over(node, &configs[node]),
                Step::Die => net.restart(node, &configs[node]),
                Step::LoseEstate => {
                    drop(net.leave(node));
                    net.restart(node, &configs[node]);
                }
            }
        }
        // What was sent into a session that has died calls for a new one after 15 s at most.
        net.send(0, 1, b"probe");
        net.send(1, 0, b"probe");
        net.run(SECS(20));
        net.payloads(0);
        net.payloads(1);
        net.send(0, 1, b"after all");
        net.send(1, 0, b"after all");
        net.run(SECS(1));
        prop_assert_eq!(net.payloads(0), [b"after all"]);
        prop_assert_eq!(net.payloads(1), [b"after all"]);
        assert_unique(&net.tapped);
    }
}
