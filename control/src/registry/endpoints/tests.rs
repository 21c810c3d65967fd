use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions;
use mesh_model::ClusterConfig;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use super::*;
use crate::store::RedbStore;

fn object<K: Object>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

fn service(name: &str, selector: Value) -> Service {
    object(json!({"metadata": {"namespace": "ns", "name": name},
        "spec": {"selector": selector, "ports": [{"port": 80}]}}))
}

fn slice(service: &str, name: &str, ips: &[String]) -> EndpointSlice {
    let endpoints: Vec<_> = ips.iter().map(|ip| json!({"addresses": [ip]})).collect();
    object(json!({"metadata": {"namespace": "ns", "name": name, "labels": {
            LABEL_SERVICE_NAME: service, LABEL_MANAGED_BY: objects::SLICE_MANAGER}},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 80}]}))
}

fn by_hand(name: &str, ips: &[String]) -> Endpoints {
    let addresses: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    object(json!({"metadata": {"namespace": "ns", "name": name},
        "subsets": [{"addresses": addresses, "ports": [{"port": 80}]}]}))
}

/// Two Services with pods, one name a beginning of the other, one that is open, and another name.
async fn registry(dir: &tempfile::TempDir) -> Registry {
    let store = Arc::new(RedbStore::open(&dir.path().join("store")).unwrap());
    let registry = Registry::new(store, ClusterConfig::default()).unwrap();
    let namespace: Namespace = object(json!({"metadata": {"name": "ns"}}));
    registry.create(&namespace).await.unwrap();
    for (name, selector) in
        [("a", json!({"app": "a"})), ("a-b", json!({"app": "b"})), ("open", Value::Null)]
    {
        registry.create(&service(name, selector)).await.unwrap();
    }
    registry
}

/// Somebody writes something; refusals are none of our business here.
async fn write(registry: &Registry, rng: &mut StdRng) {
    let ips: Vec<_> = (0..rng.random_range(1..4))
        .map(|_| format!("192.0.2.{}", rng.random_range(1..20)))
        .collect();
    let slices = registry.list::<EndpointSlice>(None).unwrap().items;
    let known = slices.get(rng.random_range(0..6_usize)).cloned();
    let options = DeleteOptions::default();
    match (rng.random_range(0..8), known) {
        (0 | 1, _) => {
            let service = ["a", "a-b"][rng.random_range(0..2_usize)];
            let name = format!("{service}-{:05x}", rng.random_range(0..0xfffff));
            let _ = registry.create(&slice(service, &name, &ips)).await;
        }
        (2, Some(known)) => {
            let name = objects::name(&known.metadata);
            registry.delete::<EndpointSlice>(Some("ns"), name, &options).await.unwrap();
        }
        (3, Some(mut known)) => {
            known.endpoints = slice("a", "a", &ips).endpoints;
            registry.update(&known).await.unwrap();
        }
        (4, _) => {
            let map: ConfigMap =
                object(json!({"metadata": {"namespace": "ns", "generateName": "m-"}}));
            registry.create(&map).await.unwrap();
        }
        (kind, _) => {
            let name = ["a", "a-b", "open", "other"][rng.random_range(0..4_usize)];
            let _ = match kind {
                5 => registry.delete::<Endpoints>(Some("ns"), name, &options).await.map(drop),
                6 => registry.update(&by_hand(name, &ips)).await.map(drop),
                _ => registry.create(&by_hand(name, &ips)).await.map(drop),
            };
        }
    }
}

type Shown = BTreeMap<Arc<str>, Arc<Record>>;

fn shown(registry: &Registry) -> Shown {
    let page = registry.shown_page(Endpoints::kind(), Some("ns"), Range::default()).unwrap();
    page.records.into_iter().map(|record| (record.key.clone(), record)).collect()
}

/// Follows what a watch tells.
fn follow(changes: &mut Changes, seen: &mut Shown) {
    let mut last = 0;
    for change in changes.ready().unwrap() {
        assert!(change.revision >= last, "in the order of revisions");
        last = change.revision;
        let before = match &change.record {
            Some(record) => seen.insert(change.key.clone(), record.clone()),
            None => seen.remove(&change.key),
        };
        assert_eq!(before, change.previous, "what was there before {change:?}");
    }
    assert!(changes.position() >= last);
}

#[tokio::test]
async fn what_a_watch_tells_adds_up_to_what_a_list_shows() {
    for seed in 0..6 {
        let mut rng = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(&dir).await;
        let start = registry.revision();
        let watch = || registry.shown_changes(Endpoints::kind(), Some("ns"), start);
        let (mut often, mut seen) = (watch(), shown(&registry));
        for _ in 0..80 {
            write(&registry, &mut rng).await;
            if rng.random_bool(0.5) {
                follow(&mut often, &mut seen);
                assert_eq!(seen, shown(&registry), "seed {seed}");
            }
        }
        // Who comes back after all that has the same in the end.
        let (mut late, mut seen) = (watch(), Shown::new());
        follow(&mut late, &mut seen);
        assert_eq!(seen, shown(&registry), "seed {seed}");
    }
}

#[tokio::test]
async fn a_page_ends_where_the_next_one_begins() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(&dir).await;
    let ips = ["192.0.2.1".to_owned()];
    for (service, name) in [("a", "a-x"), ("a-b", "a-b-x")] {
        registry.create(&slice(service, name, &ips)).await.unwrap();
    }
    registry.create(&by_hand("a-a", &ips)).await.unwrap();
    let mut found = Vec::new();
    let mut after: Option<String> = None;
    let revision = Some(registry.revision());
    registry.delete::<EndpointSlice>(Some("ns"), "a-x", &DeleteOptions::default()).await.unwrap();
    loop {
        let range = Range { limit: Some(1), after: after.as_deref(), revision, ..Range::default() };
        let page = registry.shown_page(Endpoints::kind(), None, range).unwrap();
        let Some(record) = page.records.first() else { break };
        found.push(place(&record.key).1.to_owned());
        after = Some(record.key.to_string());
    }
    assert_eq!(found, ["a", "a-a", "a-b"], "as it was at that revision");
    assert_eq!(shown(&registry).len(), 2);
}

#[tokio::test]
async fn only_what_a_controller_keeps_for_pods_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let registry = registry(&dir).await;
    let kind = Endpoints::kind();
    let ips = ["192.0.2.1".to_owned()];
    let mut foreign = slice("a", "a-foreign", &ips);
    foreign.metadata.labels.as_mut().unwrap().remove(LABEL_MANAGED_BY);
    registry.create(&foreign).await.unwrap();
    registry.create(&slice("open", "open-x", &ips)).await.unwrap();
    for name in ["a", "open"] {
        assert!(!registry.is_made(kind, Some("ns"), name), "{name}");
    }
    registry.create(&by_hand("a", &ips)).await.unwrap();
    registry.create(&slice("a", "a-x", &[])).await.unwrap();
    let made = registry.shown(kind, Some("ns"), "a").unwrap();
    assert_eq!(decode::<Endpoints>(&made).unwrap().subsets, None, "it hides what was written");
    assert_ne!(registry.record(kind, Some("ns"), "a").unwrap(), made);
    assert!(registry.is_made(kind, Some("ns"), "a"));
    assert!(!registry.is_made(EndpointSlice::kind(), Some("ns"), "a-x"));
}
