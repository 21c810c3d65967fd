//! How a worker dates its calls, as the node reads it that is called.

use std::net::UdpSocket;
use std::time::{Duration, SystemTime};

use mesh_overlay::NodeKey;
use mesh_overlay::protocol::noise::message::INITIATION_BYTES;
use mesh_overlay::protocol::noise::{Call, Tai64n};

use crate::traffic::LIMIT;
use crate::world::{Side, World, privileged};

/// A node that hears, and says nothing.
struct Callee {
    key: NodeKey,
    socket: UdpSocket,
}

impl Callee {
    fn new(world: &World, side: Side) -> Self {
        let socket =
            world.inside("node", side, || UdpSocket::bind((side.underlay(false), 51900)).unwrap());
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self { key: world.key(side), socket }
    }

    /// The stamp of the next call, none if it takes too long.
    fn next(&self) -> Option<Tai64n> {
        let mut bytes = [0; 2000];
        loop {
            let length = self.socket.recv(&mut bytes).ok()?;
            if length == INITIATION_BYTES {
                let call = Call::read(&self.key, bytes.first_chunk().unwrap());
                return Some(call.expect("a call of a worker").stamp());
            }
        }
    }

    /// Those that have come.
    fn rest(&self) -> Vec<Tai64n> {
        self.socket.set_nonblocking(true).unwrap();
        let rest = std::iter::from_fn(|| self.next()).collect();
        self.socket.set_nonblocking(false).unwrap();
        rest
    }
}

#[test]
fn a_worker_that_is_killed_again_and_again_dates_its_calls_by_the_clock() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    let callee = Callee::new(&world, Side::B);
    world.start(Side::A);
    world.configure(Side::A, &world.config(Side::A, false));
    let mut newest = Tai64n::default();
    for life in 0..4 {
        let stamp = callee.next().expect("each process calls at once");
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert!(stamp > newest, "life {life}");
        // The kernel's device, were it to take over a second later, would date its calls by the clock.
        let soon = Tai64n::from_unix(clock + Duration::from_secs(1));
        assert!(stamp < soon, "life {life}: {stamp:?} at {clock:?}");
        // It has stored what it has to by then.
        std::thread::sleep(Duration::from_millis(500));
        world.kill(Side::A);
        newest = callee.rest().into_iter().fold(stamp, Ord::max);
        world.start(Side::A);
    }
}
