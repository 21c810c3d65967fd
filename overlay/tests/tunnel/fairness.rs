//! Flows that send little beside flows that send all they can.

use std::thread;

use crate::traffic::{Sequence, Stream};
use crate::world::{Side, World, privileged};

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
        drops.get(&mesh_overlay::DropReason::DeviceQueueFull).is_some_and(|full| *full > 100),
        "the queues of the large ones were full: {drops:?}"
    );
    // Some share a queue with a large one, and lose as much as that; those that have one for themselves do not.
    let mut rates: Vec<_> =
        arrived.iter().map(|flow| flow.lost as f64 / flow.sent as f64).collect();
    rates.sort_by(f64::total_cmp);
    assert!(rates[1] * 4.0 < rates[rates.len() - 1], "{rates:?}");
}
