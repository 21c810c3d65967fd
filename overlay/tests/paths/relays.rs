//! Nodes that cannot reach each other, and the ways around.

use mesh_overlay::paths::Standing;
use proptest::prelude::*;

use super::SECOND;
use super::world::{World, key};

/// Both can use each other, through a relay.
fn relayed(world: &World, a: usize, b: usize) -> bool {
    [(a, b), (b, a)].into_iter().all(|(from, to)| {
        let path = world.path(from, to);
        path.standing.serves() && path.via.is_some()
    })
}

fn direct(world: &World, a: usize, b: usize) -> bool {
    [(a, b), (b, a)].into_iter().all(|(from, to)| {
        let path = world.path(from, to);
        path.standing == Standing::Up && path.via.is_none()
    })
}

#[test]
fn a_relay_is_found_in_two_seconds_and_left_in_thirty() {
    for (count, both) in [(3, true), (3, false), (8, true), (8, false)] {
        let mut world = World::new(count, 31);
        world.run(2 * SECOND);
        world.block(0, 1, both);
        let found = world.until(2 * SECOND, |w| relayed(w, 0, 1)).expect("a relay in 2 s");
        world.run(20 * SECOND);
        assert!(relayed(&world, 0, 1), "it lasts");
        let downs = world.changes().filter(|(.., standing)| *standing == Standing::Down).count();
        assert_eq!(downs, 0, "nobody was down");
        world.blocked.clear();
        let left = world.until(30 * SECOND, |w| direct(w, 0, 1)).expect("direct in 30 s");
        println!(
            "{count} nodes, blocked both ways {both}: relay after {found:?}, left after {left:?}"
        );
        assert_eq!(world.most_relays, 1);
    }
}

#[test]
fn in_a_large_cluster_unanswered_traffic_leads_to_a_relay() {
    let mut world = World::new(100, 37);
    world.run(2 * SECOND);
    world.block(3, 90, true);
    let now = world.now;
    world.nodes[3].core.unanswered(now, key(90));
    world.nodes[90].core.unanswered(now, key(3));
    let found = world.until(2 * SECOND, |w| relayed(w, 3, 90)).expect("a relay in 2 s");
    println!("100 nodes: relay {found:?} after traffic was seen to be unanswered");
}

#[test]
fn a_relay_that_dies_is_replaced() {
    let mut world = World::new(5, 41);
    world.run(2 * SECOND);
    world.block(0, 1, true);
    world.until(2 * SECOND, |w| relayed(w, 0, 1)).unwrap();
    let via = |w: &World| w.path(0, 1).via.map(|via| via.relay);
    let first = via(&world).unwrap();
    let dead = (0..5).find(|n| key(*n) == first).unwrap();
    world.nodes[dead].alive = false;
    let took = world.until(3 * SECOND, |w| relayed(w, 0, 1) && via(w) != Some(first)).unwrap();
    println!("5 nodes: another relay {took:?} after the first one died");
    assert!(took < 3 * SECOND);
}

#[test]
fn a_relay_goes_on_while_its_agent_is_away() {
    let mut world = World::new(3, 43);
    world.run(2 * SECOND);
    world.block(0, 1, true);
    world.until(2 * SECOND, |w| relayed(w, 0, 1)).unwrap();
    let before = world.changes().count();
    world.nodes[2].agent = false;
    world.run(15 * SECOND);
    world.restart_agent(2);
    world.run(15 * SECOND);
    assert!(relayed(&world, 0, 1));
    assert_eq!(world.changes().count(), before, "nothing was noticed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever directions are blocked: who has a common neighbour can talk, over one relay at most, and a relay
    /// never stands for a node that it does not hear itself.
    #[test]
    fn paths_are_found_and_never_loop(
        blocked in prop::collection::btree_set((0usize..7, 0usize..7), 0..14),
        loss in 0u64..30,
        seed in any::<u64>(),
    ) {
        let mut world = World::new(7, seed);
        world.loss_permille = loss;
        world.run(SECOND);
        world.blocked = blocked.into_iter().filter(|(a, b)| a != b).collect();
        let blocked = world.blocked.clone();
        let ok = |a: usize, b: usize| !blocked.contains(&(a, b)) && !blocked.contains(&(b, a));
        world.run(8 * SECOND);
        for a in 0..7 {
            for b in (0..7).filter(|b| *b != a) {
                let common = (0..7).any(|r| r != a && r != b && ok(a, r) && ok(r, b));
                let path = world.path(a, b);
                if let Some(via) = path.via {
                    let relay = (0..7).find(|n| key(*n) == via.relay).unwrap();
                    prop_assert!(relay != a && relay != b);
                    prop_assert!(ok(a, relay) && ok(relay, b), "{a} to {b} via {relay}");
                    prop_assert!(world.path(relay, b).via.is_none(), "a relay behind a relay");
                } else if ok(a, b) && loss == 0 {
                    prop_assert_eq!(path.standing, Standing::Up);
                }
                if common && !ok(a, b) && loss == 0 {
                    prop_assert!(path.standing.serves() && path.via.is_some(), "{} to {}: {:?}", a, b, path);
                }
            }
        }
        prop_assert!(world.most_relays <= 1);
    }
}
