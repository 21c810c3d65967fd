//! How long it takes to fill and to change large service maps. Prints figures; what it checks is that they are right.
//!
//! `cargo test -p mesh-kernel --test linux service_scale -- --ignored --nocapture`

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mesh_kernel::bpf::MapError;
use mesh_kernel::services::{
    Observed, Plan, ServiceReconciler, ServiceTable as _, Step, StepError, plan,
};
use mesh_model::ObjectKey;
use mesh_model::snapshot::{Backend, FULL_WEIGHT, Frontend, FrontendKind, Protocol};

use crate::lab::{Lab, privileged};

fn frontends(services: u32, endpoints: u32) -> Vec<Frontend> {
    let frontend = |service: u32| Frontend {
        vip: IpAddr::from((0x0a60_0000 + service + 1).to_be_bytes()),
        protocol: Protocol::Tcp,
        port: 80,
        kind: FrontendKind::ClusterIp,
        service: ObjectKey::new("default", format!("s{service:05}")),
        port_name: String::new(),
        affinity_secs: None,
        backends: (0..endpoints).map(|n| backend(service * endpoints + n)).collect(),
        leaving: vec![],
    };
    (0..services).map(frontend).collect()
}

fn backend(n: u32) -> Backend {
    let address = IpAddr::from((0x0af4_0000 + n).to_be_bytes());
    Backend { address, port: 8080, node: Some("node-1".parse().unwrap()), weight: FULL_WEIGHT }
}

fn measure(services: u32, endpoints: u32) {
    let lab = Lab::new();
    let mut options = lab.options();
    let places = services * endpoints + 1024;
    options.capacities =
        [("SERVICES", services + 1024), ("SLOTS", places), ("MEMBERS", places)].into();
    let programs = mesh_kernel::Programs::open_or_load(&options).unwrap();
    let mut table = ServiceReconciler::new(programs.services());
    let mut wanted = frontends(services, endpoints);
    let begun = Instant::now();
    let outcome = table.reconcile(&wanted).unwrap();
    let cold = begun.elapsed();
    assert!(outcome.failed.is_empty());
    assert_eq!(outcome.operations as u32, services * (2 * endpoints + 1));
    let begun = Instant::now();
    assert!(!table.refresh().unwrap(), "what was read differs from what was written");
    let read = begun.elapsed();
    let mut changes = vec![];
    for round in 0..100_u32 {
        let place = (round * 37 % services) as usize;
        wanted[place].backends[(round % endpoints) as usize] =
            backend(services * endpoints + round);
        let begun = Instant::now();
        let outcome = table.reconcile_changes(&[&wanted[place]], &[]);
        changes.push(begun.elapsed());
        assert_eq!((outcome.operations, outcome.failed.len()), (3, 0));
    }
    changes.sort();
    let begun = Instant::now();
    assert_eq!(table.reconcile(&wanted).unwrap().operations, 0);
    let compared = begun.elapsed();
    let sum: Duration = changes.iter().sum();
    println!(
        "{services} services x {endpoints} endpoints: full sync {cold:.2?} ({} map entries), read back {read:.2?}, \
         one endpoint replaced {:.2?} (slowest {:.2?}), all compared {compared:.2?}",
        services * (2 * endpoints + 1),
        sum / 100,
        changes[99],
    );
}

#[test]
#[ignore = "a measurement"]
fn large_tables_are_filled_and_changed() {
    if !privileged() {
        return;
    }
    measure(5_000, 50);
    measure(10_000, 10);
}

#[test]
fn many_steps_at_once_stop_where_a_map_is_full() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    let mut options = lab.options();
    options.capacities.insert("SLOTS", 500);
    let programs = mesh_kernel::Programs::open_or_load(&options).unwrap();
    let table = programs.services();
    let wanted = frontends(60, 10);
    // As if there were room for all.
    let planned = plan(&wanted, &Observed::default());
    let outcome = table.apply(&planned);
    assert!(
        outcome
            .failed
            .iter()
            .any(|(_, error)| matches!(error, StepError::Map(MapError::Full { map: "SLOTS" })))
    );
    let observed = table.observe().unwrap();
    let mut done = Observed::default();
    outcome.done.iter().for_each(|step| done.apply(step));
    assert_eq!(observed, done, "what was done and what was not is known");
    assert_eq!(observed.slots.len(), 500);
    assert_eq!(observed.entries.len(), 50, "no entry for a list with a hole");
    for entry in observed.entries.values() {
        assert!((0..entry.count).all(|slot| observed.slots.contains_key(&(entry.id, slot))));
    }
    let some: Vec<SocketAddr> = observed.slots.values().copied().collect();
    assert!(some.iter().all(|backend| backend.port() == 8080));
    // Who knows the room does not try what cannot be, and serves each with what there is.
    let mut table = ServiceReconciler::new(table);
    let outcome = table.reconcile(&wanted).unwrap();
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    assert!(!outcome.unfit.is_empty() && outcome.unfit.iter().all(|one| one.map == "SLOTS"));
    assert_eq!(Some(table.table().observe().unwrap()).as_ref(), table.mirror());
    // Less is wanted: then there is room for all of it.
    let less = table.reconcile(&wanted[..50]).unwrap();
    assert!(less.failed.is_empty() && less.unfit.is_empty());
    assert_eq!(table.table().observe().unwrap().entries.len(), 50);
}

#[test]
fn how_full_the_maps_are_is_known_without_listing_them() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    let programs = lab.load();
    let used = || {
        let pressure = programs.pressure().unwrap();
        ["SERVICES", "SLOTS", "MEMBERS"].map(|map| pressure[map].0)
    };
    assert_eq!(used(), [0, 0, 0]);
    let mut table = ServiceReconciler::new(programs.services());
    let wanted = frontends(20, 5);
    table.reconcile(&wanted).unwrap();
    assert_eq!(used(), [20, 100, 100]);
    table.reconcile(&wanted[..7]).unwrap();
    assert_eq!(used(), [7, 35, 35]);
    // Somebody else writes: nobody lists the maps for that, and the next look at them tells.
    let backend = "10.244.0.1:1".parse().unwrap();
    let steps = vec![Step::PutSlot { service: 9_999, slot: 0, backend }];
    assert_eq!(programs.services().apply(&Plan { steps, ..Plan::default() }).done.len(), 1);
    assert_eq!(used(), [7, 35, 35]);
    assert!(table.refresh().unwrap());
    assert_eq!(used(), [7, 36, 35]);
}
