//! A worker is replaced, and killed at any moment of it, while pods talk.

use std::time::{Duration, Instant};

use mesh_overlay::{DropReason, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::MIB;
use crate::traffic::{Capture, LIMIT, Sequence, Stream};
use crate::world::{Side, World, privileged};

const SIDES: [Side; 2] = [Side::A, Side::B];

/// The status as soon as there is a worker.
fn status(world: &World, side: Side) -> Status {
    let begun = Instant::now();
    loop {
        match world.try_status(side) {
            Some(status) => return status,
            None => assert!(begun.elapsed() < LIMIT, "no worker: {}", world.log(side)),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn age(world: &World, side: Side) -> Option<Duration> {
    status(world, side).peers[0].handshake_age()
}

/// Waits for a session, and for the calls of both sides to be over.
fn settle(world: &World) {
    let begun = Instant::now();
    while SIDES.iter().any(|side| age(world, *side) < Some(Duration::from_millis(700))) {
        assert!(begun.elapsed() < LIMIT, "no session: {}", world.log(Side::A));
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn replayed(world: &World, side: Side) -> u64 {
    status(world, side).drops.get(&DropReason::Replayed).copied().unwrap_or(0)
}

fn kill_now(pid: Option<i32>) {
    let _ = kill(Pid::from_raw(pid.expect("a worker")), Signal::SIGKILL);
}

/// As when the kernel's device carried the packets so far: who has to take over is there before it goes.
#[test]
fn a_worker_that_comes_early_waits_for_another_kind_of_device_to_go() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.ip("node", Side::A, "link add mesh-wg type veth peer name other");
    world.keep(Side::A, 0);
    let begun = Instant::now();
    while world.pid(Side::A).is_none() {
        assert!(begun.elapsed() < LIMIT, "no process was started");
        std::thread::sleep(Duration::from_millis(2));
    }
    let early = world.pid(Side::A);
    std::thread::sleep(Duration::from_millis(500));
    assert!(world.try_status(Side::A).is_none(), "it has nothing to carry packets with");
    world.ip("node", Side::A, "link del mesh-wg");
    world.wait_for_another(Side::A, None);
    assert_eq!(world.pid(Side::A), early, "it has waited: no other one was started");
}

#[test]
fn a_replacement_costs_no_datagram_and_no_handshake() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.connect_kept();
    settle(&world);
    let capture = Capture::start(&world, Side::A);
    let ages = SIDES.map(|side| age(&world, side).unwrap());
    let begun = Instant::now();
    let stream = Stream::start(&world, Side::A, false, 7001);
    let numbered = SIDES.map(|from| Sequence::start(&world, from, 7002));
    for generation in 1..=3 {
        for side in SIDES {
            stream.wait_for(MIB);
            let old = world.pid(side);
            world.keep(side, generation);
            world.wait_for_another(side, old);
            assert_eq!(replayed(&world, side.other()), 0, "no number was used twice");
        }
    }
    stream.wait_for(MIB);
    for (side, before) in SIDES.into_iter().zip(ages) {
        let now = age(&world, side).expect("a session");
        assert!(now >= before + begun.elapsed() / 2, "{side:?}: the session is {now:?} old");
    }
    let arrived = numbered.map(Sequence::finish);
    let (bytes, pause) = stream.finish();
    println!("{bytes} bytes, longest pause {pause:?}; {arrived:?}");
    let drops = SIDES.map(|side| world.status(side).drops);
    for arrived in arrived {
        assert!(arrived.sent > 50, "{arrived:?}");
        assert_eq!((arrived.lost, arrived.repeated), (0, 0), "{arrived:?} {drops:?}");
    }
    let seen = capture.finish();
    assert_eq!(seen.initiations, 0, "{seen:?}");
    seen.assert_sealed();
}

#[test]
fn packets_wait_for_the_successor_of_a_killed_worker() {
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.connect_kept();
    settle(&world);
    let before = replayed(&world, Side::B);
    let stream = Stream::start(&world, Side::A, false, 7001);
    let numbered = Sequence::start(&world, Side::A, 7002);
    for round in 0..3 {
        stream.wait_for(MIB);
        let (old, killed) = (world.pid(Side::A), Instant::now());
        kill_now(old);
        world.wait_for_another(Side::A, old);
        let queues = world.ip("node", Side::A, "-details link show mesh-wg");
        assert!(queues.contains("LOWER_UP"), "it never lost its carrier: {queues}");
        stream.wait_for(MIB);
        println!("round {round}: back after {:?}", killed.elapsed());
    }
    let arrived = numbered.finish();
    let (bytes, pause) = stream.finish();
    println!("{bytes} bytes, longest pause {pause:?}; {arrived:?}");
    assert_eq!(replayed(&world, Side::B), before);
    // Lost is what a killed worker had read and the other side could no longer open: of each kill, less than a second's.
    assert!(arrived.lost <= 3 * 1000, "{arrived:?}");
    assert_eq!(arrived.repeated, 0);
}

/// The old worker, the new one, both or the agent are killed at moments spread over a whole replacement. Whoever is left
/// goes on, with the sessions or without; no number is ever used twice, and the stream does not end.
#[test]
fn a_replacement_may_be_cut_off_at_any_moment() {
    const ROUNDS: u32 = 24;
    /// A whole replacement takes about this long where the machine is busy.
    const SPAN: Duration = Duration::from_millis(120);
    if !privileged() {
        return;
    }
    let mut world = World::new();
    world.connect_kept();
    settle(&world);
    let stream = Stream::start(&world, Side::A, false, 7001);
    let mut kept = 0;
    for round in 1..=ROUNDS {
        stream.wait_for(MIB / 4);
        let (old, age_before) = (world.pid(Side::A), age(&world, Side::A));
        world.keep(Side::A, round);
        std::thread::sleep(SPAN * (round * 7919 % ROUNDS) / ROUNDS);
        let new = world.pid(Side::A).filter(|new| Some(*new) != old);
        match round % 4 {
            0 => kill_now(old),
            1 if new.is_some() => kill_now(new),
            2 => {
                kill_now(old);
                new.into_iter().for_each(|new| kill_now(Some(new)));
            }
            _ => world.kill_agent(Side::A),
        }
        // The next agent finds what there is, and ends it all well.
        world.keep(Side::A, round);
        stream.wait_for(MIB / 4);
        let age_after = age(&world, Side::A);
        kept += u32::from(age_before.is_some() && age_after >= age_before);
        assert_eq!(replayed(&world, Side::B), 0, "round {round}: a number was used twice");
    }
    let (bytes, pause) = stream.finish();
    println!("{bytes} bytes, longest pause {pause:?}; sessions went on in {kept} of {ROUNDS}");
    assert!((1..ROUNDS).contains(&kept), "{kept}: both ends were to be seen");
}
