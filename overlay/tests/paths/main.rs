//! Failure detection and relays on many nodes, under a virtual clock: what is asserted is virtual time.
//!
//! The figures are printed: `cargo test -p mesh-overlay --test paths -- --nocapture`.

mod relays;
mod world;

use std::time::Duration;

use mesh_overlay::paths::Standing;
use world::World;

const SECOND: Duration = Duration::from_secs(1);

/// When each of the others knew that `dead` is down, after it died at `died`.
fn known_down(world: &World, dead: usize, died: Duration) -> Vec<Duration> {
    let mut first: Vec<Option<Duration>> = vec![None; world.nodes.len()];
    for (who, at, about, standing) in world.changes() {
        if about == dead && standing == Standing::Down && at >= died && first[who].is_none() {
            first[who] = Some(at - died);
        }
    }
    let mut times: Vec<Duration> = first.into_iter().flatten().collect();
    times.sort();
    times
}

#[test]
fn a_dead_node_is_known_everywhere_within_a_second_and_back_soon() {
    for (count, limit) in [(3, SECOND), (10, SECOND), (500, SECOND)] {
        let mut world = World::new(count, 7);
        world.run(3 * SECOND);
        world.nodes[1].alive = false;
        let died = world.now - world.start;
        world.run(2 * SECOND);
        let times = known_down(&world, 1, died);
        println!(
            "{count} nodes: a dead node was down everywhere after {:?} (first {:?}, median {:?})",
            times.last().unwrap(),
            times[0],
            times[times.len() / 2]
        );
        assert_eq!(times.len(), count - 1, "all of {count} nodes know");
        assert!(*times.last().unwrap() < limit, "{times:?}");
        world.nodes[1].alive = true;
        let others = || (0..count).filter(|n| *n != 1);
        let up = |w: &World| others().all(|n| w.standing(n, 1) == Standing::Up);
        let took = world.until(3 * SECOND, up).expect("it is back everywhere");
        println!("{count} nodes: and up again everywhere {took:?} after its return");
        let wrong = world.changes().filter(|(who, _, about, standing)| {
            *about != 1 && *who != 1 && *standing == Standing::Down
        });
        assert_eq!(wrong.count(), 0, "nobody else was ever down");
    }
}

#[test]
fn a_node_that_was_away_for_long_comes_back_too() {
    for count in [3, 10] {
        let mut world = World::new(count, 7);
        world.run(3 * SECOND);
        world.nodes[1].alive = false;
        world.run(300 * SECOND);
        world.nodes[1].alive = true;
        let others = || (0..count).filter(|n| *n != 1);
        let up = |w: &World| others().all(|n| w.standing(n, 1) == Standing::Up);
        let took = world.until(3 * SECOND, up).expect("it is back everywhere");
        println!("{count} nodes: up again everywhere {took:?} after five minutes away");
    }
}

#[test]
fn loss_alone_takes_nobody_down_and_costs_few_messages() {
    const NODES: usize = 500;
    const SECONDS: u32 = 20;
    for (percent, tolerated) in [(1, 0), (5, 0), (10, 0)] {
        let mut world = World::new(NODES, 11 + percent);
        world.loss_permille = percent * 10;
        world.run(SECOND * SECONDS);
        let rate = world.datagrams as f64 / f64::from(SECONDS) / NODES as f64;
        let false_downs = world.changes().filter(|(.., standing)| !standing.serves()).count();
        println!(
            "{NODES} nodes, {percent} % loss each way, {SECONDS} s: {false_downs} of {} views were \
             ever wrong; {rate:.0} datagrams per node and second, answers of kernels included",
            NODES * (NODES - 1)
        );
        assert!(false_downs <= tolerated, "{false_downs} false at {percent} %");
        assert!(rate < 200.0, "{rate} datagrams per node and second");
        world.nodes[9].alive = false;
        let died = world.now - world.start;
        world.run(2 * SECOND);
        let times = known_down(&world, 9, died);
        println!(
            "{NODES} nodes, {percent} % loss: a dead node down everywhere after {:?}",
            times.last()
        );
        assert_eq!(times.len(), NODES - 1);
    }
}

#[test]
fn messages_per_node_do_not_grow_with_the_cluster() {
    let rate = |count: usize| {
        let mut world = World::new(count, 5);
        world.run(5 * SECOND);
        world.datagrams as f64 / 5.0 / count as f64
    };
    let (fifty, many) = (rate(50), rate(400));
    println!("datagrams per node and second: {fifty:.0} with 50 nodes, {many:.0} with 400");
    assert!(many < fifty * 1.2);
}

#[test]
fn a_third_of_the_nodes_dying_at_once_is_seen_by_the_rest() {
    let mut world = World::new(150, 3);
    world.run(2 * SECOND);
    (0..50).for_each(|n| world.nodes[n * 3].alive = false);
    let settled = |w: &World| {
        let alive: Vec<usize> = (0..150).filter(|n| w.nodes[*n].alive).collect();
        alive.iter().all(|from| {
            w.nodes[*from]
                .core
                .view(w.now)
                .iter()
                .zip((0..150).filter(|to| to != from))
                .all(|(path, to)| (path.standing == Standing::Down) != w.nodes[to].alive)
        })
    };
    let took = world.until(5 * SECOND, settled).expect("they agree in the end");
    println!("50 of 150 nodes dead at once: all views right after {took:?}");
}

#[test]
fn a_killed_agent_is_not_a_dead_node() {
    for count in [3, 60] {
        let mut world = World::new(count, 21);
        world.run(2 * SECOND);
        world.nodes[1].agent = false;
        world.run(20 * SECOND);
        world.restart_agent(1);
        world.run(5 * SECOND);
        assert_eq!(world.changes().count(), 0, "{:?}", world.changes().collect::<Vec<_>>());
    }
}

#[test]
fn a_node_that_is_cut_off_knows_and_tells_no_tales() {
    let mut world = World::new(40, 13);
    world.run(2 * SECOND);
    for other in (0..40).filter(|n| *n != 4) {
        world.block(4, other, true);
    }
    world.run(3 * SECOND);
    assert!(world.nodes[4].core.isolated());
    assert!((0..40).filter(|n| *n != 4).all(|n| world.standing(n, 4) == Standing::Down));
    world.blocked.clear();
    world.run(5 * SECOND);
    assert!(!world.nodes[4].core.isolated());
    let others = |n: &usize| *n != 4;
    assert!((0..40).filter(others).all(|n| world.standing(n, 4) == Standing::Up));
    assert!((0..40).filter(others).all(|n| world.standing(4, n) == Standing::Up));
    let told = world.changes().filter(|(who, _, about, _)| *who != 4 && *about != 4);
    assert_eq!(told.count(), 0, "nobody believed it about the others");
}

#[test]
fn a_process_that_was_kept_from_running_blames_nobody() {
    let mut world = World::new(5, 17);
    world.run(2 * SECOND);
    world.nodes[0].agent = false;
    world.run(3 * SECOND);
    world.nodes[0].agent = true;
    world.run(2 * SECOND);
    assert_eq!(world.nodes[0].log, []);
}
