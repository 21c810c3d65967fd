//! Between the nodes is a network that does what networks do, by a seed.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_overlay::DropReason;
use mesh_tests::faults::{Faults, Relay};

use crate::MIB;
use crate::traffic::{Capture, LIMIT, Stream, echo};
use crate::world::{Side, World, privileged};

/// A relay on node A that both nodes take for the other one, and what they are configured with.
fn between(world: &World, seed: u64) -> (Relay, [mesh_overlay::OverlayConfig; 2]) {
    let at = |side: Side| SocketAddr::new(side.underlay(false), 51900);
    let local: IpAddr = Side::A.underlay(false);
    let sides = [at(Side::A), at(Side::B)];
    let relay = world.inside("node", Side::A, || Relay::start(seed, local, sides).unwrap());
    let configs = [Side::A, Side::B].map(|side| {
        let mut config = world.config(side, false);
        config.peers[0].endpoints = vec![relay.entrance(side as usize)];
        config
    });
    (relay, configs)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < LIMIT, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_bad_network_costs_time_and_nothing_else() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    let (relay, configs) = between(&world, 11);
    let capture = Capture::start(&world, Side::A);
    world.connect_with(&configs);
    let stream = Stream::start(&world, Side::A, false, 7001);
    stream.wait_for(MIB);
    relay.set(Faults {
        delay: Duration::from_millis(1),
        jitter: Duration::from_micros(500),
        lost: 5,
        duplicated: 30,
        reordered: 5,
        corrupted: 5,
        replayed: 30,
    });
    stream.wait_for(4 * MIB);
    // The gateway in front of node A restarts: node B follows to the new port.
    relay.rebind(1);
    stream.wait_for(MIB);
    wait_until("node B follows", || {
        world.status(Side::B).peers[0].endpoint == Some(relay.entrance(1))
    });
    relay.set(Faults::default());
    stream.finish();
    let drops = world.status(Side::B).drops;
    for reason in [DropReason::BadTag, DropReason::Replayed] {
        assert!(drops.get(&reason).is_some_and(|&n| n > 0), "{reason:?} in {drops:?}");
    }
    let seen = capture.finish();
    assert!(seen.frames > 1000, "{seen:?}");
    assert_eq!((seen.canaries, seen.fragments), (0, 0), "{seen:?}");
}

#[test]
fn a_peer_that_hears_and_is_not_heard_is_unreachable() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    let (relay, configs) = between(&world, 12);
    relay.mute(1);
    world.connect_with(&configs);
    for side in [Side::A, Side::B] {
        wait_until("both see that nobody answers", || world.status(side).peers[0].unanswered > 2);
        assert_eq!(world.status(side).peers[0].handshake_age_ms, None, "{side:?} has no session");
    }
    relay.set(Faults::default());
    wait_until("a session", || world.status(Side::A).peers[0].handshake_age_ms.is_some());
    echo(&world, Side::A, false, 7001);
}
