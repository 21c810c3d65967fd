use mesh_model::snapshot::Protocol;
use proptest::prelude::*;

use super::super::Uplink;
use super::*;

fn key(port: u16) -> FrontendKey {
    FrontendKey { vip: "192.0.2.1".parse().unwrap(), protocol: Protocol::Tcp, port }
}

fn service(backends: &[u8]) -> Service {
    let backend = |n: &u8| (SocketAddr::from(([10, 244, 1, *n], 80)), None);
    Service { backends: backends.iter().map(backend).collect(), ..Service::default() }
}

/// Carries out a plan and checks after every step that what a packet may meet is whole.
fn carried_out(desired: &Desired, observed: &Observed) -> Observed {
    let mut now = observed.clone();
    let mut slots: BTreeMap<u32, BTreeSet<u16>> = BTreeMap::new();
    for id in &now.tables {
        let indices = now.backends.range((*id, 0)..=(*id, u32::MAX)).map(|((_, i), _)| *i as u16);
        slots.insert(*id, indices.collect());
    }
    for step in plan(desired, observed).steps {
        now.apply(&step);
        match &step {
            Step::PutTable { service, slots: new } => {
                slots.insert(*service, new.iter().copied().collect());
            }
            Step::DeleteTable(service) => drop(slots.remove(service)),
            _ => {}
        }
        for (service, indices) in &slots {
            for index in indices {
                let there = now.backends.contains_key(&(*service, u32::from(*index)));
                assert!(there, "{step:?}: place {index} of {service} is empty");
            }
        }
    }
    now
}

fn desired(services: Vec<(u16, Vec<u8>)>) -> Desired {
    let services = services.into_iter().map(|(port, all)| (key(port), service(&all))).collect();
    Desired { services, ..Desired::default() }
}

proptest! {
    #[test]
    fn one_round_is_enough_and_nothing_is_missing_on_the_way(
        first in prop::collection::vec((1_u16..6, prop::collection::vec(0_u8..8, 0..5)), 0..5),
        second in prop::collection::vec((1_u16..6, prop::collection::vec(0_u8..8, 0..5)), 0..5),
    ) {
        let mut observed = Observed::default();
        for wanted in [desired(first), desired(second)] {
            observed = carried_out(&wanted, &observed);
            prop_assert_eq!(plan(&wanted, &observed), Plan::default());
            prop_assert_eq!(observed.entries.len(), wanted.services.len());
            for (key, service) in &wanted.services {
                let entry = observed.entries[key];
                let all = observed.backends.range((entry.id, 0)..=(entry.id, u32::MAX));
                let backends: BTreeSet<SocketAddr> = all.map(|(_, (backend, _))| *backend).collect();
                let asked: BTreeSet<SocketAddr> = service.backends.keys().copied().collect();
                prop_assert_eq!(backends, asked);
                prop_assert_eq!(observed.tables.contains(&entry.id), entry.count > 0);
            }
        }
        let gone = carried_out(&Desired::default(), &observed);
        prop_assert_eq!(gone, Observed::default());
    }

    /// Whoever looks at what changed alone comes to the same as who looks at everything.
    #[test]
    fn what_changed_is_enough_to_look_at(
        first in prop::collection::vec((1_u16..6, prop::collection::vec(0_u8..8, 0..5)), 0..5),
        second in prop::collection::vec((1_u16..6, prop::collection::vec(0_u8..8, 0..5)), 0..5),
    ) {
        let (before, wanted) = (desired(first), desired(second));
        let mut observed = carried_out(&before, &Observed::default());
        let keys: BTreeSet<_> = before.services.keys().chain(wanted.services.keys()).collect();
        let differs = |key: &&&FrontendKey| before.services.get(key) != wanted.services.get(key);
        let changed: Vec<FrontendKey> = keys.iter().filter(differs).map(|key| **key).collect();
        let steps = plan_changes(&wanted, &changed, &observed, Room::UNLIMITED).steps;
        prop_assert_eq!(steps.is_empty(), changed.is_empty());
        steps.iter().for_each(|step| observed.apply(step));
        prop_assert_eq!(plan(&wanted, &observed), Plan::default());
    }

    /// An agent that is killed anywhere in a round leaves it to the next one, which knows only what it can read: not what tables say.
    #[test]
    fn whoever_comes_after_one_that_was_killed_finishes_its_tables(
        first in prop::collection::vec((1_u16..3, prop::collection::vec(0_u8..4, 0..4)), 1..3),
        second in prop::collection::vec((1_u16..3, prop::collection::vec(0_u8..4, 0..4)), 1..3),
    ) {
        let mut before = (Observed::default(), Places::new());
        go_on(&mut before, plan(&desired(first), &Observed::default()).steps);
        let wanted = desired(second);
        let steps = plan(&wanted, &before.0).steps;
        for done in 0..=steps.len() {
            let mut now = before.clone();
            go_on(&mut now, steps[..done].to_vec());
            let rest = plan(&wanted, &now.0).steps;
            go_on(&mut now, rest);
            let (observed, tables) = now;
            for entry in observed.entries.values() {
                let all = observed.backends.range((entry.id, 0)..=(entry.id, u32::MAX));
                let indices: BTreeSet<u16> = all.map(|((_, index), _)| *index as u16).collect();
                let told = tables.get(&entry.id).cloned().unwrap_or_default();
                prop_assert_eq!(told, indices, "killed after {} of {:?}", done, steps);
            }
        }
    }
}

/// The indices that each table names: what nobody can read back.
type Places = BTreeMap<u32, BTreeSet<u16>>;

fn go_on((observed, tables): &mut (Observed, Places), steps: Vec<Step>) {
    for step in steps {
        observed.apply(&step);
        match step {
            Step::PutTable { service, slots } => {
                tables.insert(service, slots.into_iter().collect());
            }
            Step::DeleteTable(service) => drop(tables.remove(&service)),
            _ => {}
        }
    }
}

#[test]
fn a_backend_keeps_its_index_and_what_is_new_takes_a_free_one() {
    let first = carried_out(&desired(vec![(80, vec![1, 2, 3])]), &Observed::default());
    let index = |observed: &Observed, n: u8| {
        let address = SocketAddr::from(([10, 244, 1, n], 80));
        observed.backends.iter().find(|(_, (b, _))| *b == address).map(|((_, index), _)| *index)
    };
    let second = carried_out(&desired(vec![(80, vec![1, 3, 4])]), &first);
    assert_eq!(index(&second, 1), index(&first, 1));
    assert_eq!(index(&second, 3), index(&first, 3));
    assert_ne!(index(&second, 4), index(&first, 2), "a connection to 2 must not find 4");
    assert_eq!(index(&second, 2), None);
}

#[test]
fn devices_nodes_and_addresses_follow() {
    let mut wanted = desired(vec![]);
    wanted.nodes = [("10.244.2.1".parse().unwrap(), 1420)].into();
    wanted.own = ["10.244.1.1".parse().unwrap()].into();
    wanted.owned = ["192.0.2.9".parse().unwrap()].into();
    let mac = [2, 0, 0, 0, 0, 1];
    let uplink = Uplink { ifindex: 3, mac, program: false, answers: false };
    let observed = Observed {
        uplinks: [("up0".to_owned(), uplink)].into(),
        known_uplinks: [(9, mac)].into(),
        stray: ["old0".to_owned()].into(),
        nodes: [("10.244.9.1".parse().unwrap(), 1420)].into(),
        ..Observed::default()
    };
    let now = carried_out(&wanted, &observed);
    assert_eq!((&now.nodes, &now.own, &now.owned), (&wanted.nodes, &wanted.own, &wanted.owned));
    assert_eq!(now.known_uplinks, [(3, mac)].into());
    assert!(now.stray.is_empty() && now.uplinks["up0"].program);
    assert_eq!(plan(&wanted, &now), Plan::default());
}

#[test]
fn answers_of_processes_are_looked_at_from_the_first_such_backend_until_there_is_no_service() {
    let uplink = Uplink { ifindex: 3, mac: [2; 6], program: true, answers: false };
    let mut wanted = desired(vec![(80, vec![1])]);
    wanted.addresses = ["192.0.2.1".parse().unwrap()].into();
    let observed = Observed {
        uplinks: [("up0".to_owned(), uplink)].into(),
        known_uplinks: [(3, [2; 6])].into(),
        ..Observed::default()
    };
    let mut now = carried_out(&wanted, &observed);
    assert_eq!(now.addresses, wanted.addresses);
    assert!(!now.uplinks["up0"].answers, "all that leaves the node would pass by, for nothing");
    let own = SocketAddr::from(([192, 0, 2, 1], 8080));
    // The same address, behind another node, is no process of this one.
    for (via, answers) in [(Some("10.244.2.1".parse().unwrap()), false), (None, true)] {
        wanted.services.get_mut(&key(80)).unwrap().backends = [(own, via)].into();
        let changes = plan_changes(&wanted, &[key(80)], &now, Room::UNLIMITED);
        assert_eq!(changes, plan(&wanted, &now));
        now = carried_out(&wanted, &now);
        assert_eq!(now.uplinks["up0"].answers, answers);
    }
    wanted.services.get_mut(&key(80)).unwrap().backends.clear();
    now = carried_out(&wanted, &now);
    assert!(now.uplinks["up0"].answers, "connections go on");
    wanted.services.clear();
    now = carried_out(&wanted, &now);
    assert!(!now.uplinks["up0"].answers);
    assert_eq!(plan(&wanted, &now), Plan::default());
}

/// Rounds within limits, until one changes nothing.
fn settled(desired: &Desired, mut observed: Observed, room: Room) -> (Observed, Vec<Unfit>) {
    for _ in 0..4 {
        let plan = plan_within(desired, &observed, room);
        if plan.steps.is_empty() {
            return (observed, plan.unfit);
        }
        plan.steps.iter().for_each(|step| observed.apply(step));
        assert!(observed.backends.len() <= room.backends);
    }
    panic!("it never settles: {observed:?}");
}

#[test]
fn one_that_is_too_large_takes_nothing_from_others_and_nobody_keeps_who_is_gone() {
    let room = Room { backends: 4, sources: 1, ..Room::UNLIMITED };
    let small = desired(vec![(81, vec![1, 2])]);
    let (observed, unfit) = settled(&small, Observed::default(), room);
    assert_eq!(unfit, []);
    let both = desired(vec![(80, vec![1, 2, 3]), (81, vec![1, 2])]);
    let (observed, unfit) = settled(&both, observed, room);
    assert_eq!(unfit, [Unfit { frontend: key(80), map: maps::EDGE_BACKENDS }]);
    assert_eq!(observed.entries.keys().copied().collect::<Vec<_>>(), [key(81)]);
    // Each of the two is another one now, and one comes: what went makes room.
    let replaced = desired(vec![(81, vec![3, 4]), (82, vec![1, 2])]);
    let (observed, unfit) = settled(&replaced, observed, room);
    assert_eq!((observed.backends.len(), unfit), (4, vec![]));
    let mut grown = desired(vec![(81, vec![4, 5, 6]), (82, vec![1, 2])]);
    let (observed, unfit) = settled(&grown, observed, room);
    assert_eq!(unfit, [Unfit { frontend: key(81), map: maps::EDGE_BACKENDS }]);
    let id = observed.entries[&key(81)].id;
    let left: Vec<_> = observed.backends.range((id, 0)..=(id, u32::MAX)).collect();
    assert_eq!(left.len(), 1, "the one that stays: {left:?}");
    // Clients whose range has no room are refused, as are all others that are not listed.
    let ranges = ["192.0.2.0/24", "2001:db8::/32"].map(|range| range.parse().unwrap());
    grown = desired(vec![(82, vec![1, 2])]);
    grown.services.get_mut(&key(82)).unwrap().sources = Some(ranges.into());
    let (observed, unfit) = settled(&grown, observed, room);
    assert_eq!(unfit, [Unfit { frontend: key(82), map: maps::EDGE_SOURCES }]);
    assert_eq!(observed.entries[&key(82)].flags, EdgeService::RESTRICTED);
    assert_eq!(observed.sources.len(), 0);
}
