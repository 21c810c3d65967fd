use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Namespace, Pod, PodSpec, ServicePort, ServiceSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Preconditions};

use super::*;
use crate::store::RedbStore;

struct Fixture {
    registry: Registry,
    _dir: tempfile::TempDir,
}

async fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(RedbStore::open(&dir.path().join("store")).unwrap());
    let registry = Registry::new(store, ClusterConfig::default()).unwrap();
    let metadata = meta(None, "ns");
    registry.create(&Namespace { metadata, ..Namespace::default() }).await.unwrap();
    Fixture { registry, _dir: dir }
}

fn meta(ns: Option<&str>, name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: ns.map(str::to_owned),
        ..ObjectMeta::default()
    }
}

fn config(name: &str, value: &str) -> ConfigMap {
    let data = BTreeMap::from([("k".to_owned(), value.to_owned())]);
    ConfigMap { metadata: meta(Some("ns"), name), data: Some(data), ..ConfigMap::default() }
}

fn pod(name: &str) -> Pod {
    let container =
        Container { name: "c".to_owned(), image: Some("image".to_owned()), ..Container::default() };
    let spec = PodSpec { containers: vec![container], ..PodSpec::default() };
    Pod { metadata: meta(Some("ns"), name), spec: Some(spec), status: None }
}

#[tokio::test]
async fn objects_are_created_read_and_listed() {
    let f = fixture().await;
    let created = f.registry.create(&config("a", "1")).await.unwrap();
    assert!(created.metadata.uid.is_some() && created.metadata.creation_timestamp.is_some());
    assert_eq!(f.registry.get::<ConfigMap>(Some("ns"), "a").unwrap(), created);
    let again = f.registry.create(&config("a", "1")).await.unwrap_err();
    assert_eq!(again.code(), (409, "AlreadyExists"));
    let mut generated = config("", "1");
    generated.metadata.name = None;
    generated.metadata.generate_name = Some("gen-".to_owned());
    let generated = f.registry.create(&generated).await.unwrap();
    assert!(generated.metadata.name.unwrap().starts_with("gen-"));
    let listed = f.registry.list::<ConfigMap>(Some("ns")).unwrap();
    assert_eq!((listed.items.len(), listed.revision), (2, f.registry.revision()));
    assert!(f.registry.list::<ConfigMap>(Some("n")).unwrap().items.is_empty());
    let mut elsewhere = config("a", "1");
    elsewhere.metadata.namespace = Some("nowhere".to_owned());
    assert_eq!(f.registry.create(&elsewhere).await.unwrap_err().code().0, 404);
}

#[tokio::test]
async fn stale_updates_conflict_and_equal_ones_write_nothing() {
    let f = fixture().await;
    let first = f.registry.create(&config("a", "1")).await.unwrap();
    let mut second = first.clone();
    second.data = config("a", "2").data;
    let second = f.registry.update(&second).await.unwrap();
    assert_ne!(second.metadata.resource_version, first.metadata.resource_version);
    assert_eq!(f.registry.update(&first).await.unwrap_err().code(), (409, "Conflict"));
    let revision = f.registry.revision();
    assert_eq!(f.registry.update(&second).await.unwrap(), second);
    assert_eq!(f.registry.revision(), revision);
    let blind = f.registry.update(&config("a", "3")).await.unwrap();
    assert_eq!(blind.metadata.uid, first.metadata.uid);
}

#[tokio::test]
async fn raw_json_carries_the_revision() {
    let f = fixture().await;
    let created = f.registry.create(&config("a", "\"metadata\":{ in a string")).await.unwrap();
    let record = f.registry.record(ConfigMap::kind(), Some("ns"), "a").unwrap();
    let json = object_json(&record, record.revision);
    assert_eq!(serde_json::from_slice::<ConfigMap>(&json).unwrap(), created);
}

#[tokio::test]
async fn watches_tell_what_happens_in_order() {
    let f = fixture().await;
    let start = f.registry.revision();
    let mut watch = f.registry.watch::<ConfigMap>(start);
    f.registry.create(&config("a", "1")).await.unwrap();
    f.registry.update(&config("a", "2")).await.unwrap();
    f.registry.delete::<ConfigMap>(Some("ns"), "a", &DeleteOptions::default()).await.unwrap();
    assert!(matches!(watch.next().await, Some(Event::Added(_))));
    assert!(matches!(watch.next().await, Some(Event::Modified(_))));
    let Some(Event::Deleted(last)) = watch.next().await else { panic!("deleted") };
    assert_eq!(last.metadata.resource_version, Some(f.registry.revision().to_string()));
    f.registry.compact(f.registry.revision());
    let mut old = f.registry.watch::<ConfigMap>(start);
    assert_eq!(old.next().await, Some(Event::Gone));
    assert_eq!(old.next().await, None);
}

#[tokio::test]
async fn finalizers_hold_an_object_until_they_are_removed() {
    let f = fixture().await;
    let mut held = config("a", "1");
    held.metadata.finalizers = Some(vec!["example.com/hold".to_owned()]);
    f.registry.create(&held).await.unwrap();
    let options = DeleteOptions::default();
    let deleted = f.registry.delete::<ConfigMap>(Some("ns"), "a", &options).await.unwrap();
    let Deleted::Terminating(mut marked) = deleted else { panic!("still held") };
    assert!(marked.metadata.deletion_timestamp.is_some());
    marked.metadata.finalizers = None;
    f.registry.update(&marked).await.unwrap();
    assert_eq!(f.registry.get::<ConfigMap>(Some("ns"), "a").unwrap_err().code().0, 404);
}

#[tokio::test]
async fn bound_pods_go_in_two_steps_and_unbound_ones_at_once() {
    let f = fixture().await;
    f.registry.create(&pod("a")).await.unwrap();
    let bound = f.registry.bind("ns", "a", "node-1").await.unwrap();
    assert_eq!(bound.spec.unwrap().node_name.as_deref(), Some("node-1"));
    assert_eq!(f.registry.bind("ns", "a", "node-2").await.unwrap_err().code().0, 409);
    let options = DeleteOptions::default();
    let deleted = f.registry.delete::<Pod>(Some("ns"), "a", &options).await.unwrap();
    let Deleted::Terminating(marked) = deleted else { panic!("the node must stop it first") };
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30));
    let other = Preconditions { uid: Some("x".to_owned()), ..Preconditions::default() };
    let options = DeleteOptions { preconditions: Some(other), ..DeleteOptions::default() };
    let refused = f.registry.delete::<Pod>(Some("ns"), "a", &options).await.unwrap_err();
    assert_eq!(refused.code().0, 409);
    let options = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
    let deleted = f.registry.delete::<Pod>(Some("ns"), "a", &options).await.unwrap();
    assert!(matches!(deleted, Deleted::Removed(_)));
    f.registry.create(&pod("b")).await.unwrap();
    let options = DeleteOptions::default();
    let deleted = f.registry.delete::<Pod>(Some("ns"), "b", &options).await.unwrap();
    assert!(matches!(deleted, Deleted::Removed(_)));
}

#[tokio::test]
async fn a_terminating_namespace_takes_nothing_new_and_goes_when_it_is_empty() {
    let f = fixture().await;
    let options = DeleteOptions::default();
    let deleted = f.registry.delete::<Namespace>(None, "ns", &options).await.unwrap();
    assert!(matches!(deleted, Deleted::Terminating(_)));
    let refused = f.registry.create(&config("a", "1")).await.unwrap_err();
    assert_eq!(refused.code(), (403, "Forbidden"));
    f.registry.finalize_namespace("ns").await.unwrap();
    assert_eq!(f.registry.get::<Namespace>(None, "ns").unwrap_err().code().0, 404);
}

#[tokio::test]
async fn services_have_addresses_from_the_same_write() {
    let f = fixture().await;
    let port = ServicePort { port: 80, ..ServicePort::default() };
    let spec = ServiceSpec { ports: Some(vec![port]), ..ServiceSpec::default() };
    let service = Service { metadata: meta(Some("ns"), "s"), spec: Some(spec), status: None };
    let created = f.registry.create(&service).await.unwrap();
    let address = created.spec.unwrap().cluster_ip.unwrap();
    let mut second = service.clone();
    second.metadata.name = Some("t".to_owned());
    second.spec.as_mut().unwrap().cluster_ip = Some(address.clone());
    let refused = f.registry.create(&second).await.unwrap_err();
    assert_eq!(refused.code(), (422, "Invalid"));
    f.registry.delete::<Service>(Some("ns"), "s", &DeleteOptions::default()).await.unwrap();
    f.registry.create(&second).await.unwrap();
}

/// A load balancer of the namespace, as stored.
async fn balancer(registry: &Registry) -> Service {
    let ports = serde_json::json!([{"port": 80}]);
    let spec = serde_json::json!({"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ports": ports});
    let spec = serde_json::from_value(spec).unwrap();
    let service = Service { metadata: meta(Some("ns"), "web"), spec: Some(spec), status: None };
    registry.create(&service).await.unwrap()
}

#[tokio::test]
async fn a_service_becomes_another_type_by_its_type_alone() {
    let f = fixture().await;
    let mut service = balancer(&f.registry).await;
    let spec = service.spec.clone().unwrap();
    assert!(spec.health_check_node_port.is_some());
    for type_ in ["NodePort", "ClusterIP", "ExternalName", "ClusterIP", "LoadBalancer"] {
        // All that the API has filled in comes along, as with a patch.
        let spec = service.spec.as_mut().unwrap();
        spec.type_ = Some(type_.to_owned());
        spec.external_name = (type_ == "ExternalName").then(|| "a.example".to_owned());
        service = f.registry.update(&service).await.unwrap();
        let spec = service.spec.as_ref().unwrap();
        assert_eq!(spec.health_check_node_port, None, "{type_}");
        let outside = matches!(type_, "NodePort" | "LoadBalancer");
        assert_eq!(spec.external_traffic_policy.is_some(), outside, "{type_}");
        assert_eq!(spec.ports.as_ref().unwrap()[0].node_port.is_some(), outside, "{type_}");
        assert_eq!(spec.cluster_ip.is_some(), type_ != "ExternalName");
    }
}

#[tokio::test]
async fn who_writes_a_services_status_may_write_annotations_and_nothing_else() {
    let f = fixture().await;
    let mut service = balancer(&f.registry).await;
    let annotations = BTreeMap::from([("seen".to_owned(), "yes".to_owned())]);
    service.metadata.annotations = Some(annotations.clone());
    service.spec.as_mut().unwrap().session_affinity = Some("ClientIP".to_owned());
    let written = f.registry.update_status(&service).await.unwrap();
    assert_eq!(written.metadata.annotations, Some(annotations));
    assert_eq!(written.spec.unwrap().session_affinity.as_deref(), Some("None"));
}
