//! Clients reach pods, with their own address, with much and in pieces.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;

use mesh_abi::EdgeReason;
use mesh_model::snapshot::Protocol;

use super::{
    CLIENT, CLIENT6, MTU, NODE, World, any, ask, ask_in_pieces, at, frontends, returner, teller,
    udp_teller, unchanged, v4, v6,
};
use crate::lab::privileged;

#[test]
fn a_client_reaches_pods_here_and_elsewhere_with_its_own_address() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        teller(&world.nodes[node].pod, 80, name);
        for address in [v4(node as u8 + 1, 5), v6(node as u8 + 1, 5)] {
            udp_teller(&world.nodes[node].pod, at(address, 53), name);
        }
    }
    world.publish(
        &[
            (Protocol::Tcp, 30_001, &[(1, 80)]),
            (Protocol::Tcp, 30_002, &[(2, 80)]),
            (Protocol::Udp, 30_001, &[(1, 53)]),
            (Protocol::Udp, 30_002, &[(2, 53)]),
        ],
        unchanged,
    );
    for (port, name) in [(30_001, "one"), (30_002, "two")] {
        for frontend in frontends(port) {
            let client = if frontend.is_ipv4() { CLIENT } else { CLIENT6 };
            let told = world.tcp(frontend).unwrap_or_else(|error| {
                panic!(
                    "{frontend}: {error} {:?} {:?}",
                    world.nodes[0].losses(),
                    world.nodes[1].losses()
                )
            });
            let (who, peer) = told.split_once(' ').unwrap();
            let peer: SocketAddr = peer.parse().unwrap();
            assert_eq!((who, peer.ip().to_string().as_str()), (name, client));
            let socket = world.client.udp(any(frontend));
            let (told, from) = ask(&socket, frontend, 10);
            assert!(told.starts_with(&format!("{name} ")) && told.contains(client), "{told}");
            assert_eq!(from, frontend);
        }
    }
    // Nobody has a service on this port: as without us.
    let refused = world.tcp(at(NODE.parse().unwrap(), 30_003)).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(world.nodes[0].counted(EdgeReason::ClientToPod) > 0);
    assert!(world.nodes[0].counted(EdgeReason::ClientToNode) > 0);
    assert!(world.nodes[1].counted(EdgeReason::PodToNode) > 0);
}

#[test]
fn much_goes_both_ways_and_nothing_is_too_large_for_the_overlay() {
    if !privileged() {
        return;
    }
    let world = World::new();
    const BYTES: usize = 3_000_000;
    for node in &world.nodes {
        returner(&node.pod, 80, BYTES);
    }
    world.publish(
        &[(Protocol::Tcp, 30_001, &[(1, 80)]), (Protocol::Tcp, 30_002, &[(2, 80)])],
        unchanged,
    );
    world.assert_returned([30_001, 30_002].into_iter().flat_map(frontends), BYTES);
    assert!(world.largest.load(Ordering::Relaxed) <= MTU as usize);
    assert_eq!(world.nodes[0].counted(EdgeReason::TooBig), 0, "no segment had to be refused");
}

#[test]
fn packets_in_pieces_arrive_and_what_is_too_long_is_told() {
    if !privileged() {
        return;
    }
    let world = World::new();
    for (node, name) in [(0, "one"), (1, "two")] {
        for address in [v4(node as u8 + 1, 5), v6(node as u8 + 1, 5)] {
            udp_teller(&world.nodes[node].pod, at(address, 53), name);
        }
    }
    world.publish(
        &[(Protocol::Udp, 30_001, &[(1, 53)]), (Protocol::Udp, 30_002, &[(2, 53)])],
        unchanged,
    );
    for (port, name) in [(30_001, "one"), (30_002, "two")] {
        for frontend in frontends(port) {
            let (told, from) = ask_in_pieces(&world, frontend);
            assert!(told.starts_with(name), "{told}");
            assert_eq!(from, frontend);
        }
    }
    // The way to the other node takes less than the client's link: somebody had to say so, once for each family.
    assert!(world.nodes[0].counted(EdgeReason::TooBig) >= 2);
    assert!(world.largest.load(Ordering::Relaxed) <= MTU as usize);
}
