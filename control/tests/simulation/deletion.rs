//! What goes with what is deleted.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions;
use serde_json::json;

use super::harness::{Cluster, Observer, deployment, object};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletion_cascades_in_the_background_in_the_foreground_or_not_at_all() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let counts = || (cluster.list::<ReplicaSet>().len(), cluster.list::<Pod>().len());

    cluster.registry.create(&deployment("web", 2, json!({}))).await.unwrap();
    cluster.rolled_out("web").await;
    cluster.delete::<Deployment>("web", "Background").await;
    assert!(cluster.get::<Deployment>("web").is_none(), "at once");
    cluster.eventually("all gone", || counts() == (0, 0)).await;

    cluster.registry.create(&deployment("web", 2, json!({}))).await.unwrap();
    cluster.rolled_out("web").await;
    cluster.delete::<Deployment>("web", "Foreground").await;
    assert!(cluster.get::<Deployment>("web").is_some(), "after its dependents");
    cluster.eventually("it is gone", || cluster.get::<Deployment>("web").is_none()).await;
    assert_eq!(counts(), (0, 0));

    cluster.registry.create(&deployment("web", 2, json!({}))).await.unwrap();
    cluster.rolled_out("web").await;
    let pods: BTreeSet<_> = cluster.list::<Pod>().into_iter().map(|p| p.metadata.uid).collect();
    cluster.delete::<Deployment>("web", "Orphan").await;
    cluster.eventually("it is gone", || cluster.get::<Deployment>("web").is_none()).await;
    cluster
        .eventually("the set has no owner", || {
            cluster.list::<ReplicaSet>().iter().all(|s| s.metadata.owner_references.is_none())
        })
        .await;
    assert_eq!(counts(), (1, 2));
    // A Deployment of the same selector takes over what is there.
    cluster.registry.create(&deployment("web", 2, json!({}))).await.unwrap();
    cluster.rolled_out("web").await;
    let after: BTreeSet<_> = cluster.list::<Pod>().into_iter().map(|p| p.metadata.uid).collect();
    assert_eq!(after, pods);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_of_the_same_name_but_another_identity_does_not_count() {
    let cluster = Cluster::start().await;
    let owner: ConfigMap = object(json!({"metadata": {"namespace": "default", "name": "owner"}}));
    let owner = cluster.registry.create(&owner).await.unwrap();
    let child = |name: &str, uid: &str| {
        object::<ConfigMap>(
            json!({"metadata": {"namespace": "default", "name": name, "ownerReferences": [
            {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid}]}}),
        )
    };
    let uid = owner.metadata.uid.unwrap();
    cluster.registry.create(&child("mine", &uid)).await.unwrap();
    cluster.registry.create(&child("stale", "11111111-2222-3333-4444-555555555555")).await.unwrap();
    cluster.eventually("the stale one goes", || cluster.get::<ConfigMap>("stale").is_none()).await;
    assert!(cluster.get::<ConfigMap>("mine").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_takes_everything_along() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(1).await;
    let registry = &cluster.registry;
    registry.create(&object::<Namespace>(json!({"metadata": {"name": "team"}}))).await.unwrap();
    registry
        .create(&object::<ConfigMap>(json!({"metadata": {"namespace": "team", "name": "a"}})))
        .await
        .unwrap();
    let mut web = deployment("web", 3, json!({}));
    web.metadata.namespace = Some("team".to_owned());
    // Its pods never start: the pretended node serves only the default namespace.
    web.spec.as_mut().unwrap().replicas = Some(0);
    registry.create(&web).await.unwrap();
    registry.delete::<Namespace>(None, "team", &DeleteOptions::default()).await.unwrap();
    cluster.eventually("namespace gone", || registry.get::<Namespace>(None, "team").is_err()).await;
    assert!(registry.list::<ConfigMap>(Some("team")).unwrap().items.is_empty());
    assert!(registry.list::<Deployment>(Some("team")).unwrap().items.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_deleted_before_everything_was_read() {
    let mut cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    cluster.registry.create(&deployment("web", 4, json!({}))).await.unwrap();
    cluster.rolled_out("web").await;
    cluster.stop_controllers().await;
    let before: BTreeSet<_> = cluster.list::<Pod>().into_iter().map(|p| p.metadata.uid).collect();
    let observer = Observer::start(&cluster.registry);
    cluster.start_controllers();
    cluster.scale("web", 5).await;
    cluster.rolled_out("web").await;
    let seen = observer.finish().await;
    assert_eq!((seen.created, seen.fewest_ready), (1, 4));
    let after: BTreeSet<_> = cluster.list::<Pod>().into_iter().map(|p| p.metadata.uid).collect();
    assert!(after.is_superset(&before));
}
