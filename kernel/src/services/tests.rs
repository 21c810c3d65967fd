use std::collections::{BTreeMap, BTreeSet};

use mesh_model::ObjectKey;
use mesh_model::snapshot::{Backend, Frontend, FrontendKind};
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
    }
}

fn backend(vip: IpAddr, host: u8, port: u16) -> Backend {
    let address = match vip {
        IpAddr::V4(_) => IpAddr::from([10, 244, 0, host]),
        IpAddr::V6(_) => IpAddr::from([0xfd10, 0, 0, 0, 0, 0, 0, u16::from(host)]),
    };
    Backend { address, port, node: None }
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
    let mut members = BTreeSet::new();
    let ids: BTreeSet<u32> = o.entries.values().map(|e| e.id).collect();
    assert_eq!(ids.len(), o.entries.len(), "two frontends share a service number");
    for e in o.entries.values() {
        for slot in 0..e.count {
            members.insert((e.id, *o.slots.get(&(e.id, slot)).expect("a hole")));
            slots += 1;
        }
    }
    assert_eq!((slots, &members), (o.slots.len(), &o.members));
}

fn any_frontends() -> impl Strategy<Value = Vec<Frontend>> {
    let one = (
        0..3_u8,
        any::<bool>(),
        1..4_u16,
        prop::collection::vec((0..8_u8, 80..82_u16), 0..7),
        prop::option::of(1..3_u32),
    );
    prop::collection::vec(one, 0..8).prop_map(|all| {
        let mut keys = BTreeSet::new();
        let made = all.into_iter().map(|(host, v6, port, backends, affinity)| {
            let vip = if v6 { format!("fd10:96::{host}") } else { format!("10.96.0.{host}") };
            Frontend { affinity_secs: affinity, ..frontend(&vip, port, &backends) }
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
        members: members.into_iter().collect(),
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
    reconciler.table().limit_slots(3);
    let small = frontend("10.96.0.1", 80, &[(1, 80), (2, 80)]);
    let large = frontend("10.96.0.2", 81, &[(1, 80), (2, 80), (3, 80)]);
    let outcome = reconciler.reconcile(&[small.clone(), large.clone()]).unwrap();
    assert!(matches!(outcome.failed[0].1, StepError::Full { .. }));
    let mirror = reconciler.mirror().unwrap();
    assert_eq!(mirror.entries.len(), 1, "no entry for a list with a hole");
    reconciler.table().limit_slots(10);
    assert!(reconciler.reconcile(&[small, large]).unwrap().failed.is_empty());
    assert_tidy(reconciler.mirror().unwrap());
    assert!(!reconciler.refresh().unwrap());
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
fn backends_of_the_other_family_are_left_out() {
    let mut mixed = frontend("10.96.0.1", 80, &[(1, 80)]);
    mixed.backends.push(backend("fd10::1".parse().unwrap(), 9, 80));
    let state = after(Observed::default(), &plan(&[mixed], &Observed::default()));
    assert_eq!(state.slots.len(), 1);
}
