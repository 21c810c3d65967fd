//! A peer behind a relay: traffic takes the relay, and the peer's own endpoint is tried beside it.

use std::net::SocketAddr;

use super::net::Net;
use super::{MILLIS, SECS};

/// Two nodes with a session, and a relay's port between them that none of them uses yet.
fn two() -> (Net, SocketAddr) {
    let mut net = Net::mesh(2);
    let port = ([192, 0, 2, 9], 51901).into();
    net.relay = Some((port, [net.nodes[0].address, net.nodes[1].address]));
    net.run(MILLIS(100));
    (net, port)
}

fn use_relay(net: &mut Net, node: usize, relay: Option<SocketAddr>) {
    let mut config = net.config(node);
    config.peers[0].relay = relay;
    net.configure(node, &config);
}

fn block(net: &mut Net, from: usize, to: usize) {
    let (from, to) = (net.nodes[from].address, net.nodes[to].address);
    net.blocked.push((from, to));
}

/// A packet each way every tenth of a second; returns how many arrived.
fn talk(net: &mut Net, tenths: usize) -> (usize, usize) {
    for _ in 0..tenths {
        net.send(0, 1, b"to one");
        net.send(1, 0, b"to zero");
        net.run(MILLIS(100));
    }
    (net.payloads(1).len(), net.payloads(0).len())
}

#[test]
fn traffic_takes_the_relay_while_the_direct_path_is_broken_either_way() {
    for ways in [&[(0, 1)][..], &[(1, 0)], &[(0, 1), (1, 0)]] {
        let (mut net, port) = two();
        ways.iter().for_each(|&(from, to)| block(&mut net, from, to));
        [0, 1].into_iter().for_each(|node| use_relay(&mut net, node, Some(port)));
        assert_eq!(talk(&mut net, 2000), (2000, 2000), "blocked {ways:?}");
        for (node, other) in [(0, 1), (1, 0)] {
            let peer = net.peer(node, other);
            assert_eq!((peer.endpoint, peer.direct_answers), (Some(port), 0), "blocked {ways:?}");
        }
    }
}

#[test]
fn the_direct_path_is_noticed_and_both_stay_on_it() {
    let (mut net, port) = two();
    [(0, 1), (1, 0)].into_iter().for_each(|(from, to)| block(&mut net, from, to));
    [0, 1].into_iter().for_each(|node| use_relay(&mut net, node, Some(port)));
    assert_eq!(talk(&mut net, 100), (100, 100));
    net.blocked.clear();
    assert_eq!(talk(&mut net, 100), (100, 100), "trying costs no packet");
    assert!((1..=3).contains(&net.peer(0, 1).direct_answers), "{:?}", net.peer(0, 1));
    // One leaves first; what the other still sends through the relay does not lead it back.
    use_relay(&mut net, 0, None);
    assert_eq!(talk(&mut net, 5), (5, 5));
    assert_eq!(net.peer(0, 1).endpoint, Some(net.nodes[1].address));
    use_relay(&mut net, 1, None);
    assert_eq!(talk(&mut net, 50), (50, 50));
    for (node, other) in [(0, 1), (1, 0)] {
        assert_eq!(net.peer(node, other).endpoint, Some(net.nodes[other].address));
    }
}

#[test]
fn a_peer_that_restarts_behind_the_relay_is_found_through_it() {
    let (mut net, port) = two();
    [(0, 1), (1, 0)].into_iter().for_each(|(from, to)| block(&mut net, from, to));
    [0, 1].into_iter().for_each(|node| use_relay(&mut net, node, Some(port)));
    talk(&mut net, 10);
    let mut config = net.config(1);
    config.peers[0].relay = Some(port);
    net.restart(1, &config);
    net.run(SECS(1));
    assert_eq!(talk(&mut net, 20), (20, 20));
}

#[test]
fn one_side_that_does_not_know_follows_the_other_to_the_relay() {
    let (mut net, port) = two();
    block(&mut net, 0, 1);
    use_relay(&mut net, 0, Some(port));
    let (there, back) = talk(&mut net, 50);
    assert!(there == 50 && back >= 49, "{there} and {back} of 50");
    assert_eq!(net.peer(1, 0).endpoint, Some(port));
}
