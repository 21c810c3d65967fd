//! Real worker processes between network namespaces: traffic, capture, kill -9. Needs root.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod addresses;
mod fairness;
mod faults;
mod handover;
mod interop;
mod marks;
mod mtu;
mod nat;
mod relay;
mod routed;
mod stamps;
mod traffic;
mod world;

use std::process::Command;
use std::time::{Duration, Instant};

use mesh_overlay::DropReason;
use mesh_overlay::protocol::noise::cookie::Macs;
use traffic::{Capture, LIMIT, Stream, echo};
use world::{Side, World, engine, privileged};

const MIB: u64 = 1 << 20;

#[test]
fn pods_talk_in_both_families_and_strangers_see_nothing() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    let capture = Capture::start(&world, Side::A);
    world.connect(false);
    for v6 in [false, true] {
        let streams =
            [Stream::start(&world, Side::A, v6, 7001), Stream::start(&world, Side::B, v6, 7002)];
        streams.iter().for_each(|stream| stream.wait_for(64 * MIB));
        for stream in streams {
            stream.finish();
        }
        echo(&world, Side::A, v6, 7003);
        echo(&world, Side::B, v6, 7004);
    }
    let seen = capture.finish();
    seen.assert_sealed();
    let status = world.status(Side::A);
    let peer = &status.peers[0];
    assert!(peer.sent_bytes > 128 * MIB && peer.received_bytes > 128 * MIB, "{status:?}");
    let expected = [DropReason::NoPeer]; // the device's own neighbour discovery goes nowhere
    assert!(status.drops.keys().all(|reason| expected.contains(reason)), "{:?}", status.drops);
    let traffic = status.traffic;
    assert!(traffic.send_calls * 4 < traffic.datagrams_sent, "sends are batched: {traffic:?}");
}

#[test]
fn the_underlay_may_be_ipv6() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    let capture = Capture::start(&world, Side::B);
    world.connect(true);
    let stream = Stream::start(&world, Side::A, false, 7001);
    stream.wait_for(32 * MIB);
    stream.finish();
    echo(&world, Side::B, true, 7002);
    capture.finish().assert_sealed();
    assert_eq!(world.status(Side::A).peers[0].endpoint.unwrap().ip(), Side::B.underlay(true));
}

#[test]
fn a_stream_survives_kill_9_and_nothing_leaks_meanwhile() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    let capture = Capture::start(&world, Side::A);
    world.connect(false);
    let forth = Stream::start(&world, Side::A, false, 7001);
    let back = Stream::start(&world, Side::B, true, 7002);
    for (round, side) in [Side::B, Side::A, Side::B].into_iter().enumerate() {
        forth.wait_for(16 * MIB);
        back.wait_for(16 * MIB);
        world.kill(side);
        let routes = world.ip("node", side, "route show dev mesh-wg");
        assert!(routes.contains("10.7"), "the device and its routes outlive the worker: {routes}");
        let killed = Instant::now();
        world.start(side);
        // No configuration is sent: the worker has kept it, and calls its peers.
        forth.wait_for(MIB);
        println!("round {round}: back after {:?}", killed.elapsed());
    }
    let (bytes, pause) = forth.finish();
    println!("{bytes} bytes, longest pause {pause:?}");
    back.finish();
    capture.finish().assert_sealed();
}

#[test]
fn a_second_worker_on_the_same_state_refuses_to_run() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.connect(false);
    let file = |kind: &str| world.files.path().join(format!("a.{kind}"));
    let output = Command::new("ip")
        .args(["netns", "exec", &world.name("node", Side::A)])
        .arg(engine())
        .args([file("sock"), file("json"), "mesh-wg".into(), file("key")])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("another overlay worker holds"), "{said}");
    echo(&world, Side::A, false, 7001);
}

#[test]
fn port_and_mtu_change_while_a_stream_runs() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.connect(false);
    let stream = Stream::start(&world, Side::A, false, 7001);
    stream.wait_for(8 * MIB);
    let mut config = world.config(Side::B, false);
    config.listen_port = 51901;
    config.mtu = 1380;
    world.configure(Side::B, &config);
    stream.wait_for(16 * MIB);
    stream.finish();
    let (a, b) = (world.status(Side::A), world.status(Side::B));
    assert_eq!((b.listen_port, b.mtu), (51901, 1380));
    assert_eq!(a.peers[0].endpoint.unwrap().port(), 51901, "followed");
    assert!(b.peers[0].handshake_age_ms.is_some());

    // A configuration that contradicts itself is refused, and the one before stays.
    let mut broken = config.clone();
    broken.peers.push(broken.peers[0].clone());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let overlay = mesh_overlay::Overlay::user(world.files.path().join("b.sock"));
    let refusal = runtime.block_on(overlay.configure(&broken)).unwrap_err();
    let cause = std::error::Error::source(&refusal).unwrap().to_string();
    assert!(cause.contains("listed twice"), "{cause}");
    assert_eq!(world.status(Side::B).listen_port, 51901);
}

#[test]
fn a_worker_without_its_device_ends_and_the_next_one_makes_it_anew() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.connect(false);
    echo(&world, Side::A, false, 7001);
    world.ip("node", Side::A, "link del mesh-wg");
    let said = world.wait_for_end(Side::A);
    assert!(said.contains("the overlay device mesh-wg is gone"), "{said}");
    world.start(Side::A);
    world.ip("node", Side::A, "route add 10.72.0.0/24 dev mesh-wg");
    echo(&world, Side::A, false, 7002);

    world.kill(Side::A);
    world.ip("node", Side::A, "link del mesh-wg");
    world.ip("node", Side::A, "link add mesh-wg type veth peer name other");
    let said = world.start_and_wait_for_end(Side::A);
    assert!(said.contains("ip link del mesh-wg"), "the cure is named: {said}");
}

#[test]
fn a_joining_peer_is_reached_while_packets_wait_for_it() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    let capture = Capture::start(&world, Side::A);
    world.start(Side::A);
    world.configure(Side::A, &world.config(Side::A, false));
    world.ip("node", Side::A, "route add 10.72.0.0/24 dev mesh-wg");
    // The pod calls before the other node exists.
    let stream = Stream::start(&world, Side::A, false, 7001);
    std::thread::sleep(Duration::from_millis(300));
    let joined = Instant::now();
    world.start(Side::B);
    world.configure(Side::B, &world.config(Side::B, false));
    world.ip("node", Side::B, "route add 10.71.0.0/24 dev mesh-wg");
    while world.status(Side::B).peers[0].handshake_age_ms.is_none() {
        assert!(joined.elapsed() < LIMIT, "{:?}", world.status(Side::B));
        std::thread::sleep(Duration::from_millis(2));
    }
    println!("session {:?} after the other side started", joined.elapsed());
    stream.wait_for(MIB);
    stream.finish();
    capture.finish().assert_sealed();
}

#[test]
fn a_disk_that_stalls_stops_no_timer() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.start(Side::A);
    // What cannot be opened for writing before somebody reads it: where the bound of the stamps is about to be stored.
    let stalled = world.files.path().join("a.stamp.new");
    assert!(Command::new("mkfifo").arg(stalled).status().unwrap().success());
    world.configure(Side::A, &world.config(Side::A, false));
    // Nobody hears the first calls, and the other side has no place to call: only a timer of this one leads to a session.
    world.start(Side::B);
    let mut waits = world.config(Side::B, false);
    waits.peers[0].endpoints.clear();
    world.configure(Side::B, &waits);
    let begun = Instant::now();
    while world.status(Side::B).peers[0].handshake_age_ms.is_none() {
        assert!(begun.elapsed() < LIMIT, "{:?}", world.status(Side::B));
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_flood_of_bogus_calls_leaves_a_stream_unharmed() {
    const CALLS: u32 = 20_000;
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.connect(false);
    let stream = Stream::start(&world, Side::A, false, 7001);
    stream.wait_for(MIB);
    let macs = Macs::for_receiver(&world.key(Side::B).public());
    let to = std::net::SocketAddr::new(Side::B.underlay(false), 51900);
    world.inside("node", Side::A, || {
        let socket = std::net::UdpSocket::bind((Side::A.underlay(false), 0)).unwrap();
        for n in 0..CALLS {
            let mut call = [0; 148];
            call[0] = 1;
            call[8..12].copy_from_slice(&n.to_le_bytes());
            macs.sign(&mut call, None);
            socket.send_to(&call, to).unwrap();
        }
    });
    stream.wait_for(4 * MIB);
    stream.finish();
    let drops = world.status(Side::B).drops;
    let count = |reason| drops.get(&reason).copied().unwrap_or(0);
    // How many arrive, and how many a busy machine looks at in a second, is its own business: the simulation counts.
    assert!(count(DropReason::UnderLoad) + count(DropReason::BadHandshake) > 0, "{drops:?}");
    assert!(world.status(Side::B).peers[0].handshake_age_ms.is_some());
}

#[test]
fn a_link_that_shrinks_is_followed_down_and_up() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.connect(false);
    let stream = Stream::start(&world, Side::A, false, 7001);
    stream.wait_for(MIB);
    let underlay = |mtu: u16| {
        for side in [Side::A, Side::B] {
            world.ip("node", side, &format!("link set ul0 mtu {mtu}"));
        }
    };
    let wait_for_way = |mtu: u16| {
        let begun = Instant::now();
        while world.status(Side::A).peers[0].mtu != Some(mtu) {
            assert!(
                begun.elapsed() < LIMIT,
                "the way never had {mtu}: {:?}",
                world.status(Side::A)
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    wait_for_way(1420);
    underlay(1400);
    wait_for_way(1340);
    stream.wait_for(4 * MIB);
    let status = world.status(Side::A);
    assert!(status.drops.contains_key(&DropReason::TooBig), "{:?}", status.drops);
    assert_eq!(status.mtu, 1420, "the device stays as it is for the others");
    underlay(1500);
    wait_for_way(1420);
    stream.wait_for(4 * MIB);
    stream.finish();
}
