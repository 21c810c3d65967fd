//! Flows and peers that send little beside those that send all they can.

use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use mesh_overlay::DropReason;

use crate::routed::Routed;
use crate::traffic::{Arrived, Sequence, Stream};
use crate::world::{Side, World, inside, privileged};

const MIB: u64 = 1 << 20;

/// Large flows for half of the queues of a lane at most, and so many small ones that some surely find one of the others.
const LARGE: u16 = 4;
const SMALL: u16 = 24;

/// Places in each queue of the device: so few that a large flow fills its own all the time.
const PLACES: &str = "4";

/// On a busy machine one is not enough.
const ROUNDS: usize = 5;

/// Shares of the small flows that were lost beside large ones, in order.
fn lost_beside_large_ones() -> Vec<f64> {
    let mut world = World::new();
    world.connect(false);
    world.ip("node", Side::A, &format!("link set mesh-wg txqueuelen {PLACES}"));
    let large: Vec<_> =
        (0..LARGE).map(|n| Stream::start(&world, Side::A, false, 7100 + n)).collect();
    large.iter().for_each(|stream| stream.wait_for(MIB));
    let small: Vec<_> = (0..SMALL).map(|n| Sequence::start(&world, Side::A, 7200 + n)).collect();
    large.iter().for_each(|stream| stream.wait_for(64 * MIB));
    let ends: Vec<_> = small.into_iter().map(|flow| thread::spawn(move || flow.finish())).collect();
    let arrived: Vec<_> = ends.into_iter().map(|end| end.join().unwrap()).collect();
    large.into_iter().for_each(|stream| {
        stream.finish();
    });
    let drops = world.status(Side::A).drops;
    println!("{arrived:?}, {drops:?}");
    assert!(
        drops.get(&DropReason::DeviceQueueFull).is_some_and(|full| *full > 100),
        "the queues of the large ones were full: {drops:?}"
    );
    let mut lost: Vec<_> = arrived.iter().map(|flow| flow.lost as f64 / flow.sent as f64).collect();
    lost.sort_by(f64::total_cmp);
    lost
}

#[test]
fn a_flow_that_sends_little_does_not_suffer_from_those_that_fill_their_queues() {
    if !privileged() {
        return;
    }
    // Some share a queue with a large one, and lose as much as that; those that have one for themselves do not. Where an engine is not run
    // for long, short queues overflow by the small flows alone: then all lose alike, as they always did with one queue.
    let fair = (0..ROUNDS).any(|_| {
        let lost = lost_beside_large_ones();
        lost[1] * 4.0 < lost[lost.len() - 1]
    });
    assert!(fair, "in none of {ROUNDS} rounds");
}

/// Large datagrams, as many as it sends without a pause.
const FLOOD: u32 = 300_000;
const LARGE_BYTES: usize = 1392;
const FLOODERS: u32 = 4;

/// Numbered flows beside the flood, of which one in eight shares a queue with it, or fewer where there are more lanes.
const STEADY: u16 = 24;

/// Three nodes that have spoken to each other.
fn three() -> Routed {
    let world = Routed::new(1420);
    for n in [1, 2, 3] {
        world.configure(n, &world.config(n, 1420, false));
    }
    for (from, to) in [(1, 2), (1, 3)] {
        let stream = world.stream(from, to, false, 7000);
        stream.wait_for(1);
        stream.finish();
    }
    world
}

/// A flow from a pod of one node to one of another.
fn steady(world: &Routed, (from, to): (u8, u8), port: u16) -> Sequence {
    let at = SocketAddr::new(Routed::pod(to, false), port);
    Sequence::between(world.name(&format!("pod{from}")), &world.name(&format!("pod{to}")), at)
}

/// One pod sends another so many datagrams, as fast as it can.
fn flood(world: &Routed, (from, to): (u8, u8), datagrams: u32) {
    let at = SocketAddr::new(Routed::pod(to, false), 7100);
    let _sink = inside(&world.name(&format!("pod{to}")), || UdpSocket::bind(at).unwrap());
    inside(&world.name(&format!("pod{from}")), || {
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        // One flow, from so many threads that its queue is hardly ever empty.
        thread::scope(|scope| {
            for _ in 0..FLOODERS {
                scope.spawn(|| {
                    for _ in 0..datagrams / FLOODERS {
                        client.send_to(&[0x5a; LARGE_BYTES], at).unwrap();
                    }
                });
            }
        });
    });
}

/// Numbered datagrams go from a pod to another one during a flood. What came of those, the worst first.
fn flooded(world: &Routed, by: (u8, u8), between: (u8, u8)) -> Vec<Arrived> {
    let flows: Vec<_> = (0..STEADY).map(|n| steady(world, between, 7200 + n)).collect();
    flood(world, by, FLOOD);
    let ends: Vec<_> = flows.into_iter().map(|flow| thread::spawn(move || flow.finish())).collect();
    let mut arrived: Vec<_> = ends.into_iter().map(|end| end.join().unwrap()).collect();
    arrived.sort_by_key(|flow| std::cmp::Reverse(flow.lost * 1000 / flow.sent));
    arrived
}

/// Nine in ten.
fn most_of_it(flow: &Arrived) -> bool {
    flow.sent > 100 && flow.lost * 10 <= flow.sent
}

#[test]
fn a_peer_that_is_flooded_costs_another_peer_nothing() {
    if !privileged() {
        return;
    }
    let world = three();
    world.ip("node1", &format!("link set mesh-wg txqueuelen {PLACES}"));
    let arrived = flooded(&world, (1, 2), (1, 3));
    let drops = world.status(1).drops;
    println!("{arrived:?}, {drops:?}");
    let full = drops.get(&DropReason::DeviceQueueFull).copied().unwrap_or(0);
    assert!(full > 1000, "it was more than could be sent: {drops:?}");
    // Queues are for flows: one that the flood has to itself, and few of the others by chance.
    let (unlucky, others) = arrived.split_at(arrived.len() / 3);
    assert!(others.iter().all(most_of_it), "{unlucky:?}, and these: {others:?}");
}

fn socket_drops(world: &Routed, n: u8) -> u64 {
    world.status(n).drops.get(&DropReason::SocketQueueFull).copied().unwrap_or(0)
}

#[test]
fn a_peer_that_floods_costs_another_peer_nothing() {
    if !privileged() {
        return;
    }
    let world = three();
    let arrived = flooded(&world, (2, 1), (3, 1));
    let flood = world.peer(1, 2).received_bytes;
    println!("{arrived:?}, {flood} bytes, {:?}", world.status(1).drops);
    assert!(flood > 64 * MIB, "a flood");
    assert!(arrived.iter().all(most_of_it), "{arrived:?}");
}

#[test]
fn what_does_not_fit_while_a_node_stands_still_is_of_the_peer_that_sent_too_much() {
    if !privileged() {
        return;
    }
    let world = three();
    let steady = steady(&world, (3, 1), 7200);
    world.while_stopped(1, || {
        flood(&world, (2, 1), FLOOD / 4);
        thread::sleep(Duration::from_millis(500));
    });
    let arrived = steady.finish();
    let dropped = socket_drops(&world, 1);
    println!("{arrived:?}, {dropped}");
    assert!(dropped > 1000, "more than fits: {dropped}");
    assert!(most_of_it(&arrived), "{arrived:?}");
}
