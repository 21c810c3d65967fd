//! Flows and peers that send little beside those that send all they can.

use std::net::{SocketAddr, UdpSocket};
use std::thread;

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

#[test]
fn a_flow_that_sends_little_does_not_suffer_from_those_that_fill_their_queues() {
    if !privileged() {
        return;
    }
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
    // Some share a queue with a large one, and lose as much as that; those that have one for themselves do not.
    let mut rates: Vec<_> =
        arrived.iter().map(|flow| flow.lost as f64 / flow.sent as f64).collect();
    rates.sort_by(f64::total_cmp);
    assert!(rates[1] * 4.0 < rates[rates.len() - 1], "{rates:?}");
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

/// One pod floods another, while numbered datagrams go from a pod to a third one. What came of those, the worst first.
fn flooded(world: &Routed, flood: (u8, u8), steady: (u8, u8)) -> Vec<Arrived> {
    let pod = |n: u8| world.name(&format!("pod{n}"));
    let at = |n: u8, port: u16| SocketAddr::new(Routed::pod(n, false), port);
    let start = |n| Sequence::between(pod(steady.0), &pod(steady.1), at(steady.1, 7200 + n));
    let flows: Vec<_> = (0..STEADY).map(start).collect();
    let sink = inside(&pod(flood.1), || UdpSocket::bind(at(flood.1, 7100)).unwrap());
    inside(&pod(flood.0), || {
        let client = UdpSocket::bind("0.0.0.0:0").unwrap();
        // One flow, from so many threads that its queue is hardly ever empty.
        thread::scope(|scope| {
            for _ in 0..FLOODERS {
                scope.spawn(|| {
                    for _ in 0..FLOOD / FLOODERS {
                        client.send_to(&[0x5a; LARGE_BYTES], at(flood.1, 7100)).unwrap();
                    }
                });
            }
        });
    });
    let ends: Vec<_> = flows.into_iter().map(|flow| thread::spawn(move || flow.finish())).collect();
    let mut arrived: Vec<_> = ends.into_iter().map(|end| end.join().unwrap()).collect();
    drop(sink);
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

#[test]
fn a_peer_that_floods_costs_another_peer_only_what_their_socket_drops() {
    if !privileged() {
        return;
    }
    let world = three();
    let arrived = flooded(&world, (2, 1), (3, 1));
    let flood = world.peer(1, 2).received_bytes;
    let drops = world.status(1).drops;
    println!("{arrived:?}, {flood} bytes, {drops:?}");
    assert!(flood > 64 * MIB, "a flood");
    // Peers whose datagrams the system puts into one socket lose alike when it is full: that much, and no more.
    let overflowed = drops.get(&DropReason::SocketQueueFull).copied().unwrap_or(0);
    let sum = |of: fn(&Arrived) -> u64| arrived.iter().map(of).sum::<u64>();
    let (lost, sent) = (sum(|flow| flow.lost), sum(|flow| flow.sent));
    assert!(lost <= sent / 10 + overflowed, "{lost} of {sent} lost, {drops:?}");
}
