//! Nodes behind NAT: nft(8) masquerades in the routers.

use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_overlay::OverlayConfig;
use mesh_overlay::relay::{Relay, RelayConfig, RelayedPair};

use crate::MIB;
use crate::routed::{Nat, Routed, node, wait_until};
use crate::traffic::LIMIT;
use crate::world::{enter, inside, privileged};

/// A datagram from one pod to another; whether it came.
fn reaches(world: &Routed, from: u8, to: u8, port: u16) -> bool {
    let at = SocketAddr::new(Routed::pod(to, false), port);
    let server = inside(&world.name(&format!("pod{to}")), || UdpSocket::bind(at).unwrap());
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    inside(&world.name(&format!("pod{from}")), || {
        let client = UdpSocket::bind((Routed::pod(from, false), 0)).unwrap();
        client.send_to(b"anybody there?", at).unwrap();
    });
    server.recv(&mut [0; 64]).is_ok()
}

fn configs(world: &Routed) -> [OverlayConfig; 3] {
    [1, 2, 3].map(|n| world.config(n, 1420, false))
}

#[test]
fn a_node_behind_nat_keeps_the_way_open_and_nobody_else_says_a_word() {
    if !privileged() {
        return;
    }
    let world = Routed::new(1420);
    world.put_behind(1, Nat::Plain);
    world.forgets_after(1, 2);
    let mut configs = configs(&world);
    configs.iter().zip([1, 2, 3]).for_each(|(config, n)| world.configure(n, config));
    for (from, to) in [(1, 2), (1, 3), (2, 3)] {
        wait_until("a first packet", || reaches(&world, from, to, 7001));
    }
    assert!(reaches(&world, 2, 1, 7002), "the way back is open");

    // Idle for longer than the router remembers: the way in is closed, and nobody has sent anything.
    let sent = || [1, 2, 3].map(|n| world.status(n).traffic.datagrams_sent);
    let quiet = |time: Duration| {
        let before = sent();
        std::thread::sleep(time);
        sent() == before
    };
    wait_until("the ways have been tested", || quiet(Duration::from_secs(1)));
    assert!(quiet(Duration::from_secs(5)), "idle peers are silent");
    assert!(!reaches(&world, 2, 1, 7003), "the router has forgotten");

    // With keepalives it stays open for the peer that gets them, which answers none of them.
    configs[0].peers[0].persistent_keepalive_secs = Some(1);
    world.configure(1, &configs[0]);
    wait_until("the way is open again", || reaches(&world, 2, 1, 7004));
    let before = sent();
    std::thread::sleep(Duration::from_secs(5));
    let after = sent();
    assert!((3..=7).contains(&(after[0] - before[0])), "{before:?} {after:?}");
    // What was said before may still be answered, once and after ten seconds (WG section 6.5).
    assert!(after[1] - before[1] <= 1, "one side only: {before:?} {after:?}");
    assert!(reaches(&world, 2, 1, 7005));
    assert!(!reaches(&world, 3, 1, 7006), "only where they are sent to");
}

#[test]
fn a_router_that_is_renumbered_costs_no_stream_in_either_direction() {
    if !privileged() {
        return;
    }
    let world = Routed::new(1420);
    world.put_behind(1, Nat::Symmetric);
    let mut configs = configs(&world);
    configs[0].peers[0].persistent_keepalive_secs = Some(1);
    configs.iter().zip([1, 2, 3]).for_each(|(config, n)| world.configure(n, config));
    wait_until("a first packet", || reaches(&world, 1, 2, 7001));
    let forth = world.stream(1, 2, false, 7002);
    let back = world.stream(2, 1, false, 7003);
    let appears = |last: u8| {
        wait_until("node 2 follows", || {
            world.peer(2, 1).endpoint.unwrap().ip().to_string() == format!("198.51.100.{last}")
        });
        world.peer(2, 1).endpoint.unwrap()
    };
    let mut seen = vec![appears(1)];
    for (from, to) in [(1, 11), (11, 12)] {
        forth.wait_for(MIB);
        back.wait_for(MIB);
        world.renumber(1, from, to);
        seen.push(appears(to));
        // What the configuration knows is older than what was heard, whether it has changed or not.
        configs[1].peers[0].endpoints.push(SocketAddr::from(([203, 0, 113, to], 51900)));
        world.configure(2, &configs[1]);
        let endpoint = world.peer(2, 1).endpoint.unwrap();
        assert!(!configs[1].peers[0].endpoints.contains(&endpoint), "{endpoint}");
    }
    forth.wait_for(MIB);
    back.wait_for(MIB);
    forth.finish();
    back.finish();
    assert!(seen.iter().all(|endpoint| endpoint.port() != 51900), "other ports: {seen:?}");
}

/// A relay in the namespace of a node, for one pair; ends when dropped.
struct Relaying(Option<mpsc::Sender<()>>, Option<JoinHandle<u64>>);

impl Relaying {
    fn start(world: &Routed, n: u8, pair: RelayedPair) -> Self {
        let (stop, stopped) = mpsc::channel();
        let (ready, begun) = mpsc::channel();
        let namespace = world.name(&node(n));
        let thread = std::thread::spawn(move || {
            enter(&namespace);
            let builder = &mut tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_all().build().unwrap();
            runtime.block_on(async {
                let relay = Relay::default();
                let config = RelayConfig { first_port: 51901, pairs: vec![pair] };
                relay.configure(&config).unwrap();
                ready.send(()).unwrap();
                while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                mesh_worker::Handler::status(&relay).await.forwarded
            })
        });
        begun.recv_timeout(LIMIT).unwrap();
        Self(Some(stop), Some(thread))
    }

    /// Datagrams that were forwarded.
    fn finish(mut self) -> u64 {
        self.0.take();
        self.1.take().unwrap().join().unwrap()
    }
}

#[test]
fn two_nodes_behind_symmetric_nat_speak_through_a_third() {
    if !privileged() {
        return;
    }
    let world = Routed::new(1420);
    world.put_behind(1, Nat::Symmetric);
    world.put_behind(2, Nat::Symmetric);
    let mut configs = configs(&world);
    configs.iter().zip([1, 2, 3]).for_each(|(config, n)| world.configure(n, config));
    for n in [1, 2] {
        wait_until("a first packet", || reaches(&world, n, 3, 7001));
    }
    assert!(!reaches(&world, 1, 2, 7002), "there is no way between the two");

    // What their agents would agree on: node 3 forwards between where it hears them.
    let at = |n: u8| world.peer(3, n).endpoint.unwrap();
    let (a, b) = (at(1), at(2));
    assert!(a.port() != 51900 && b.port() != 51900, "{a} {b}");
    let (a_key, b_key) = (world.key(1).public(), world.key(2).public());
    let relay = Relaying::start(
        &world,
        3,
        RelayedPair { slot: 0, a, a_key, a_next_key: None, b, b_key, b_next_key: None },
    );
    for config in &mut configs[..2] {
        config.peers[0].relay = Some(SocketAddr::new(Routed::endpoint(3, false).ip(), 51901));
    }
    world.configure(1, &configs[0]);
    world.configure(2, &configs[1]);
    wait_until("a packet through the relay", || reaches(&world, 1, 2, 7003));
    let forth = world.stream(1, 2, false, 7004);
    let back = world.stream(2, 1, true, 7005);
    forth.wait_for(4 * MIB);
    back.wait_for(4 * MIB);
    forth.finish();
    back.finish();
    assert!(relay.finish() > 5000, "through the relay");
}
