use std::collections::{BTreeMap, BTreeSet};

use mesh_model::ObjectKey;
use mesh_model::snapshot::{Backend, FULL_WEIGHT, Frontend, FrontendKind, Leaving};
use proptest::prelude::*;

use super::*;

fn frontend(vip: &str, port: u16, backends: &[(u8, u16)]) -> Frontend {
    let vip: IpAddr = vip.parse().unwrap();
    Frontend {
        vip,
        protocol: Protocol::Tcp,
        port,
        kind: FrontendKind::ClusterIp,
        service: ObjectKey::new("default", format!("s{port}")),
        port_name: String::new(),
        affinity_secs: None,
        backends: backends.iter().map(|&(host, port)| backend(vip, host, port)).collect(),
        leaving: vec![],
    }
}

fn backend(vip: IpAddr, host: u8, port: u16) -> Backend {
    let address = match vip {
        IpAddr::V4(_) => IpAddr::from([10, 244, 0, host]),
        IpAddr::V6(_) => IpAddr::from([0xfd10, 0, 0, 0, 0, 0, 0, u16::from(host)]),
    };
    Backend { address, port, node: None, weight: FULL_WEIGHT }
}

/// What a list of frontends means, without service numbers and places.
fn meaning(frontends: &[Frontend]) -> BTreeMap<FrontendKey, (u32, BTreeSet<SocketAddr>)> {
    let mut map = BTreeMap::new();
    for f in frontends {
        let key = FrontendKey { vip: f.vip, protocol: f.protocol, port: f.port };
        let backends = f.backends.iter().map(|b| SocketAddr::new(b.address, b.port)).collect();
        map.entry(key).or_insert((f.affinity_secs.unwrap_or(0), backends));
    }
    map
}

fn observed_meaning(o: &Observed) -> BTreeMap<FrontendKey, (u32, BTreeSet<SocketAddr>)> {
    let keys = o.entries.iter();
    keys.map(|(key, e)| (*key, (e.affinity_secs, o.backends(key).unwrap()))).collect()
}

/// Lists are dense, members are exactly the backends, nothing is left over.
fn assert_tidy(o: &Observed) {
    let mut slots = 0;
    let mut placed = BTreeSet::new();
    let ids: BTreeSet<u32> = o.entries.values().map(|e| e.id).collect();
    assert_eq!(ids.len(), o.entries.len(), "two frontends share a service number");
    for e in o.entries.values() {
        for slot in 0..e.count {
            placed.insert((e.id, *o.slots.get(&(e.id, slot)).expect("a hole")));
            slots += 1;
        }
    }
    assert_eq!(slots, o.slots.len());
    let serving = o.members.iter().filter(|(_, member)| !member.leaving);
    assert_eq!(serving.map(|(key, _)| *key).collect::<BTreeSet<_>>(), placed);
    assert!(o.members.keys().all(|(id, _)| ids.contains(id)));
}

fn any_frontends() -> impl Strategy<Value = Vec<Frontend>> {
    let one = (
        0..3_u8,
        any::<bool>(),
        1..4_u16,
        prop::collection::vec((0..8_u8, 80..82_u16), 0..7),
        prop::option::of(1..3_u32),
        prop::collection::vec((0..8_u8, any::<bool>()), 0..3),
        1..4_u16,
    );
    prop::collection::vec(one, 0..8).prop_map(|all| {
        let mut keys = BTreeSet::new();
        let made = all.into_iter().map(|(host, v6, port, backends, affinity, leaving, weight)| {
            let vip = if v6 { format!("fd10:96::{host}") } else { format!("10.96.0.{host}") };
            let mut made = frontend(&vip, port, &backends);
            made.affinity_secs = affinity;
            // A backend that is named twice has one weight: what counts may not hang on the order.
            for backend in &mut made.backends {
                backend.weight = 1 + (backend.port % 2) * weight;
            }
            let leave = |(host, terminating)| {
                let gone = backend(made.vip, host, 82);
                Leaving { address: SocketAddr::new(gone.address, gone.port), terminating }
            };
            let leaving: BTreeMap<_, _> = leaving.into_iter().collect();
            made.leaving = leaving.into_iter().map(leave).collect();
            made
        });
        made.filter(|f| keys.insert((f.vip, f.port))).collect()
    })
}

/// Any content at all, as after a crash or another program's writes.
fn any_observed() -> impl Strategy<Value = Observed> {
    let address = || (0..4_u8).prop_map(|h| SocketAddr::from(([10, 244, 0, h], 80)));
    let entries = prop::collection::vec((0..4_u8, 1..4_u16, 0..5_u32, 0..4_u32), 0..5);
    let slots = prop::collection::vec((0..6_u32, 0..5_u32, address()), 0..12);
    let members = prop::collection::vec((0..6_u32, address()), 0..12);
    (entries, slots, members).prop_map(|(entries, slots, members)| Observed {
        entries: entries
            .into_iter()
            .map(|(host, port, id, count)| {
                let vip = IpAddr::from([10, 96, 0, host]);
                let key = FrontendKey { vip, protocol: Protocol::Tcp, port };
                (key, Entry { id, count, affinity_secs: 0 })
            })
            .collect(),
        slots: slots.into_iter().map(|(id, slot, b)| ((id, slot), b)).collect(),
        members: members.into_iter().map(|key| (key, Member::default())).collect(),
    })
}

fn after(mut observed: Observed, plan: &Plan) -> Observed {
    plan.steps.iter().for_each(|step| observed.apply(step));
    observed
}

proptest! {
    #[test]
    fn a_plan_reaches_the_desired_state_from_anywhere(wanted in any_frontends(), start in any_observed()) {
        let reached = after(start.clone(), &plan(&wanted, &start));
        prop_assert_eq!(observed_meaning(&reached), meaning(&wanted));
        assert_tidy(&reached);
        prop_assert_eq!(plan(&wanted, &reached), Plan::default());
    }

    #[test]
    fn following_the_changes_reaches_what_a_full_round_reaches(old in any_frontends(), new in any_frontends()) {
        let mut follower = ServiceReconciler::new(FakeServiceTable::new());
        follower.reconcile(&old).unwrap();
        let key = |f: &Frontend| FrontendKey { vip: f.vip, protocol: f.protocol, port: f.port };
        let changed: Vec<&Frontend> = new.iter().filter(|f| !old.contains(f)).collect();
        let removed: Vec<FrontendKey> = old.iter().map(key).filter(|k| !new.iter().any(|f| key(f) == *k)).collect();
        let outcome = follower.reconcile_changes(&changed, &removed);
        prop_assert!(outcome.failed.is_empty());
        let reached = follower.mirror().unwrap();
        prop_assert_eq!(observed_meaning(reached), meaning(&new));
        assert_tidy(reached);
        prop_assert_eq!(plan(&new, reached), Plan::default());
        prop_assert!(!follower.refresh().unwrap());
    }

    #[test]
    fn the_order_of_the_input_is_irrelevant(mut wanted in any_frontends(), start in any_observed()) {
        let one = plan(&wanted, &start);
        wanted.reverse();
        wanted.iter_mut().for_each(|f| f.backends.reverse());
        prop_assert_eq!(plan(&wanted, &start), one);
    }

    #[test]
    fn readers_never_see_a_hole_or_a_stranger(old in any_frontends(), new in any_frontends()) {
        let mut state = after(Observed::default(), &plan(&old, &Observed::default()));
        let (before, wanted) = (meaning(&old), meaning(&new));
        for step in plan(&new, &state).steps {
            state.apply(&step);
            for (key, entry) in &state.entries {
                let seen = state.backends(key).unwrap();
                prop_assert!((0..entry.count).all(|s| state.slots.contains_key(&(entry.id, s))));
                let empty = BTreeSet::new();
                let known = |all: &BTreeMap<FrontendKey, (u32, BTreeSet<SocketAddr>)>| all.get(key).map_or(empty.clone(), |v| v.1.clone());
                let (was, will) = (known(&before), known(&wanted));
                prop_assert!(seen.iter().all(|b| was.contains(b) || will.contains(b)));
                prop_assert!(!seen.is_empty() || was.is_empty() || will.is_empty());
            }
        }
    }
}

#[test]
fn one_changed_backend_costs_the_same_in_a_list_of_any_length() {
    for length in [10_u8, 200] {
        let old: Vec<(u8, u16)> = (0..length).map(|host| (host, 80)).collect();
        let start = after(
            Observed::default(),
            &plan(&[frontend("10.96.0.1", 80, &old)], &Observed::default()),
        );
        let mut replaced = old.clone();
        replaced[3] = (250, 80);
        let steps = plan(&[frontend("10.96.0.1", 80, &replaced)], &start).steps;
        assert_eq!(steps.len(), 3, "new member, slot, old member: {steps:?}");
        let shorter: Vec<_> = old[1..].to_vec();
        let steps = plan(&[frontend("10.96.0.1", 80, &shorter)], &start).steps;
        assert_eq!(steps.len(), 4, "slot, entry, old slot, old member: {steps:?}");
    }
}

#[test]
fn a_full_map_holds_back_one_service_only() {
    let mut reconciler = ServiceReconciler::new(FakeServiceTable::new());
    reconciler.table().limit_slots(4);
    let large = frontend("10.96.0.1", 80, &[(1, 80), (2, 80), (3, 80), (4, 80)]);
    let small = frontend("10.96.0.2", 81, &[(1, 80), (2, 80)]);
    let late = frontend("10.96.0.3", 82, &[(1, 80), (2, 80)]);
    let all = [small.clone(), large.clone()];
    let outcome = reconciler.reconcile(&[&small]).unwrap();
    assert_eq!(outcome.unfit, []);
    let outcome = reconciler.reconcile(&all).unwrap();
    let lacks = |outcome: &Outcome, service: &str| {
        assert!(outcome.failed.is_empty(), "nothing is tried that cannot be: {outcome:?}");
        let [unfit] = &outcome.unfit[..] else { panic!("{outcome:?}") };
        assert_eq!((unfit.map, unfit.service.name.as_str()), ("SLOTS", service));
    };
    lacks(&outcome, "s80");
    let served = |reconciler: &ServiceReconciler<FakeServiceTable>, vip: &Frontend| {
        let key = FrontendKey { vip: vip.vip, protocol: vip.protocol, port: vip.port };
        reconciler.mirror().unwrap().backends(&key).map(|backends| backends.len())
    };
    assert_eq!(served(&reconciler, &large), Some(1), "it works, with fewer backends");
    let outcome = reconciler.reconcile(&all).unwrap();
    assert_eq!(outcome.operations, 0, "it is not tried again and again");
    lacks(&outcome, "s80");
    let outcome = reconciler.reconcile(&[&all[0], &all[1], &late]).unwrap();
    assert_eq!(outcome.unfit.len(), 2);
    assert_eq!(served(&reconciler, &late), Some(1));
    reconciler.table().limit_slots(10);
    let outcome = reconciler.reconcile(&all).unwrap();
    assert!(outcome.failed.is_empty() && outcome.unfit.is_empty());
    assert_tidy(reconciler.mirror().unwrap());
    assert!(!reconciler.refresh().unwrap());
}

#[test]
fn in_a_full_map_backends_that_went_make_room_for_those_that_came() {
    let mut reconciler = ServiceReconciler::new(FakeServiceTable::new());
    reconciler.table().limit_slots(2);
    let before = frontend("10.96.0.1", 80, &[(1, 80), (2, 80)]);
    reconciler.reconcile(&[&before]).unwrap();
    let after = [frontend("10.96.0.1", 80, &[(3, 80)]), frontend("10.96.0.2", 81, &[(4, 80)])];
    let outcome = reconciler.reconcile(&after).unwrap();
    assert_eq!((outcome.unfit.len(), outcome.gone.len()), (0, 2), "{outcome:?}");
    assert_eq!(observed_meaning(reconciler.mirror().unwrap()), meaning(&after));
}

proptest! {
    #[test]
    fn what_fits_is_as_wanted_and_the_rest_names_nobody_who_is_not(
        old in any_frontends(), new in any_frontends(), slots in 0..12_usize,
    ) {
        let mut reconciler = ServiceReconciler::new(FakeServiceTable::new());
        reconciler.table().limit_slots(slots);
        for wanted in [&old, &new] {
            let outcome = reconciler.reconcile(wanted).unwrap();
            prop_assert!(outcome.failed.is_empty(), "{:?}", outcome);
            let mirror = reconciler.mirror().unwrap();
            prop_assert!(mirror.slots.len() <= slots);
            let unfit: BTreeSet<FrontendKey> = outcome.unfit.iter().map(|u| u.frontend).collect();
            for (key, (affinity, backends)) in meaning(wanted) {
                let Some(seen) = mirror.backends(&key) else {
                    prop_assert!(unfit.contains(&key));
                    continue;
                };
                prop_assert_eq!(mirror.entries[&key].affinity_secs, affinity);
                let whole = seen == backends;
                prop_assert!(whole || unfit.contains(&key) && seen.is_subset(&backends));
            }
            let again = reconciler.reconcile(wanted).unwrap();
            prop_assert_eq!((again.operations, again.unfit), (0, outcome.unfit));
        }
    }
}

#[test]
fn drift_is_noticed_and_repaired() {
    let mut reconciler = ServiceReconciler::new(FakeServiceTable::new());
    let wanted = [frontend("10.96.0.1", 80, &[(1, 80)])];
    reconciler.reconcile(&wanted).unwrap();
    reconciler.table().tamper(|observed| observed.members.clear());
    assert!(reconciler.refresh().unwrap());
    assert_eq!(reconciler.reconcile(&wanted).unwrap().operations, 1);
}

#[test]
fn a_backend_that_leaves_loses_its_place_and_is_gone_only_when_nobody_lists_it() {
    let mut reconciler = ServiceReconciler::new(FakeServiceTable::new());
    let mut wanted = frontend("10.96.0.1", 80, &[(1, 80), (2, 80)]);
    reconciler.reconcile(std::slice::from_ref(&wanted)).unwrap();
    let left = wanted.backends.remove(0);
    let address = SocketAddr::new(left.address, left.port);
    wanted.leaving = vec![Leaving { address, terminating: true }];
    let outcome = reconciler.reconcile_changes(&[&wanted], &[]);
    assert_eq!(outcome.gone, []);
    let mirror = reconciler.mirror().unwrap();
    assert_eq!(mirror.members[&(1, address)], Member { leaving: true, terminating: true });
    assert_eq!(mirror.slots.len(), 1);
    wanted.leaving.clear();
    let outcome = reconciler.reconcile_changes(&[&wanted], &[]);
    let key = FrontendKey { vip: wanted.vip, protocol: Protocol::Tcp, port: 80 };
    assert_eq!(outcome.gone, [Gone { frontend: key, backend: address, terminating: true }]);
    let outcome = reconciler.reconcile_changes::<Frontend>(&[], &[key]);
    assert_eq!(outcome.gone.len(), 1, "and with the service all that is left");
    assert_eq!(reconciler.table().observe().unwrap(), Observed::default());
}

#[test]
fn places_follow_weights() {
    let mut wanted = frontend("10.96.0.1", 80, &[(1, 80), (2, 80)]);
    wanted.backends[1].weight = 300;
    let state = after(Observed::default(), &plan(&[&wanted], &Observed::default()));
    let light = SocketAddr::new(wanted.backends[0].address, 80);
    let share = state.slots.values().filter(|backend| **backend == light).count();
    assert_eq!((share, state.slots.len()), (1, 4));
    wanted.backends[1].weight = 200;
    let steps = plan(&[&wanted], &state).steps;
    assert_eq!(steps.len(), 2, "entry and last slot: {steps:?}");
}

#[test]
fn backends_of_the_other_family_are_left_out() {
    let mut mixed = frontend("10.96.0.1", 80, &[(1, 80)]);
    mixed.backends.push(backend("fd10::1".parse().unwrap(), 9, 80));
    let state = after(Observed::default(), &plan(&[mixed], &Observed::default()));
    assert_eq!(state.slots.len(), 1);
}
