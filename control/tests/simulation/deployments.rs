//! Deployments scale, roll out, and go on where a restart or a conflict stopped them.

use std::collections::BTreeSet;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Event, Pod};
use serde_json::json;

use super::harness::{Cluster, Observer, deployment, per_node};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_scales_from_one_to_five_to_two() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(3).await;
    cluster.registry.create(&deployment("web", 1, json!({}))).await.unwrap();
    cluster.rolled_out("web").await;
    cluster.scale("web", 5).await;
    cluster.rolled_out("web").await;
    let spread = per_node(&cluster.active_pods());
    assert!(spread.len() == 3 && spread.values().all(|n| *n <= 2), "{spread:?}");
    cluster.scale("web", 2).await;
    cluster.rolled_out("web").await;
    cluster.eventually("two pods left", || cluster.list::<Pod>().len() == 2).await;

    let sets = cluster.list::<ReplicaSet>();
    assert_eq!(sets.len(), 1);
    let web: Deployment = cluster.get("web").unwrap();
    let conditions = web.status.unwrap().conditions.unwrap();
    let reason = |type_: &str| {
        conditions.iter().find(|c| c.type_ == type_).and_then(|c| c.reason.clone()).unwrap()
    };
    assert_eq!(reason("Progressing"), "NewReplicaSetAvailable");
    assert_eq!(reason("Available"), "MinimumReplicasAvailable");
    let reasons =
        || cluster.list::<Event>().into_iter().filter_map(|e| e.reason).collect::<BTreeSet<_>>();
    for expected in ["ScalingReplicaSet", "SuccessfulCreate", "SuccessfulDelete", "Scheduled"] {
        cluster.eventually(expected, || reasons().contains(expected)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_update_keeps_its_bounds() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let strategy = json!({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 1}});
    cluster.registry.create(&deployment("web", 5, strategy)).await.unwrap();
    cluster.rolled_out("web").await;
    let observer = Observer::start(&cluster.registry);
    for image in ["two", "three"] {
        cluster.set_image("web", image).await;
        cluster.rolled_out("web").await;
    }
    let seen = observer.finish().await;
    assert!(seen.most <= 6 && seen.fewest_ready >= 4, "{seen:?}");
    assert_eq!(seen.created, 10, "one new pod for each old one, twice: {seen:?}");
    let web: Deployment = cluster.get("web").unwrap();
    assert_eq!(web.metadata.annotations.unwrap()["deployment.kubernetes.io/revision"], "3");
    assert_eq!(cluster.list::<ReplicaSet>().len(), 3, "history");

    // Roll back: the first set is used again.
    cluster.set_image("web", "one").await;
    cluster.rolled_out("web").await;
    assert_eq!(cluster.list::<ReplicaSet>().len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn recreate_never_mixes_old_and_new() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    cluster.registry.create(&deployment("web", 3, json!({"type": "Recreate"}))).await.unwrap();
    cluster.rolled_out("web").await;
    let observer = Observer::start(&cluster.registry);
    cluster.set_image("web", "two").await;
    cluster.rolled_out("web").await;
    let seen = observer.finish().await;
    assert_eq!((seen.most, seen.fewest_ready, seen.created), (3, 0, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restarts_in_the_middle_make_no_duplicates() {
    let mut cluster = Cluster::start().await;
    let _nodes = cluster.nodes(3).await;
    let strategy = json!({"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 0}});
    cluster.registry.create(&deployment("web", 8, strategy)).await.unwrap();
    cluster.rolled_out("web").await;
    let observer = Observer::start(&cluster.registry);
    cluster.set_image("web", "two").await;
    for _ in 0..6 {
        tokio::time::sleep(std::time::Duration::from_millis(60)).await;
        cluster.stop_controllers().await;
        cluster.start_controllers();
    }
    cluster.rolled_out("web").await;
    let seen = observer.finish().await;
    assert!(seen.fewest_ready >= 8, "{seen:?}");
    assert!(seen.most <= 10, "{seen:?}");
    cluster.eventually("no more than wanted", || cluster.list::<Pod>().len() == 8).await;
    assert_eq!(cluster.list::<ReplicaSet>().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conflict_storms_delay_but_do_not_derail() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    cluster.registry.create(&deployment("web", 3, json!({}))).await.unwrap();
    let registry = cluster.registry.clone();
    let storm = tokio::spawn(async move {
        for n in 0_u32.. {
            for set in registry.list::<ReplicaSet>(None).unwrap().items {
                let mut set = set;
                let annotations = set.metadata.annotations.get_or_insert_default();
                annotations.insert("storm".to_owned(), n.to_string());
                let _ = registry.update(&set).await;
            }
            for pod in registry.list::<Pod>(None).unwrap().items {
                let mut pod = pod;
                let annotations = pod.metadata.annotations.get_or_insert_default();
                annotations.insert("storm".to_owned(), n.to_string());
                let _ = registry.update(&pod).await;
            }
            let Ok(mut web) = registry.get::<Deployment>(Some("default"), "web") else { return };
            web.metadata.labels.get_or_insert_default().insert("storm".to_owned(), n.to_string());
            let _ = registry.update(&web).await;
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    });
    cluster.rolled_out("web").await;
    let observer = Observer::start(&cluster.registry);
    cluster.set_image("web", "two").await;
    cluster.rolled_out("web").await;
    cluster.scale("web", 6).await;
    cluster.rolled_out("web").await;
    storm.abort();
    let seen = observer.finish().await;
    assert_eq!(seen.created, 6, "{seen:?}");
}
