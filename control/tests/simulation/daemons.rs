//! DaemonSets: one pod on each node, from the first to the last.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{ControllerRevision, DaemonSet};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions;
use mesh_control::registry::{Part, WriteOptions};
use serde_json::{Value, json};

use super::harness::{Cluster, FakeNode, Observer, object, per_node};

fn daemons(name: &str, strategy: Value) -> DaemonSet {
    object(json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": {"updateStrategy": strategy, "revisionHistoryLimit": 1,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "one"}]}}},
    }))
}

/// As `kubectl rollout status` decides, for a set on that many nodes.
fn is_rolled_out(cluster: &Cluster, name: &str, nodes: i32) -> bool {
    let set: DaemonSet = cluster.get(name).unwrap();
    let status = set.status.unwrap_or_default();
    status.observed_generation >= set.metadata.generation
        && status.desired_number_scheduled == nodes
        && status.updated_number_scheduled == Some(nodes)
        && status.number_available == Some(nodes)
}

async fn rolled_out(cluster: &Cluster, name: &str, nodes: i32) {
    cluster.eventually("rolled out", || is_rolled_out(cluster, name, nodes)).await;
}

async fn set_image(cluster: &Cluster, name: &str, image: &str) {
    cluster
        .edit::<DaemonSet>(name, |set| {
            let template = &mut set.spec.as_mut().unwrap().template;
            template.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned());
        })
        .await;
}

fn images(cluster: &Cluster) -> BTreeMap<String, String> {
    let image = |pod: &Pod| {
        let spec = pod.spec.clone().unwrap();
        (spec.node_name.unwrap_or_default(), spec.containers[0].image.clone().unwrap())
    };
    cluster.active_pods().iter().map(image).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_node_has_one_pod_whenever_it_comes_and_whatever_becomes_of_it() {
    let cluster = Cluster::start().await;
    let mut nodes = cluster.nodes(3).await;
    cluster.registry.create(&daemons("logs", json!(null))).await.unwrap();
    rolled_out(&cluster, "logs", 3).await;
    let one_each = |pods: &[Pod], count: usize| {
        let spread = per_node(pods);
        spread.len() == count && spread.values().all(|pods| *pods == 1)
    };
    assert!(one_each(&cluster.list::<Pod>(), 3));
    nodes.push(FakeNode::start(&cluster.registry, "node-4").await);
    rolled_out(&cluster, "logs", 4).await;
    assert!(one_each(&cluster.list::<Pod>(), 4));

    // A pod that failed is made again on the same node.
    let failed = cluster.list::<Pod>()[0].clone();
    let mut status = failed.clone();
    status.metadata.resource_version = None;
    status.status.as_mut().unwrap().phase = Some("Failed".to_owned());
    cluster.registry.update_status(&status).await.unwrap();
    let is_new = |pod: &Pod| pod.metadata.uid != failed.metadata.uid;
    cluster
        .eventually("another one", || {
            let pods = cluster.ready_pods();
            pods.iter().all(is_new) && one_each(&pods, 4)
        })
        .await;

    // A label takes a node out, and a cordon does not.
    let edit = async |name: &str, change: fn(&mut Node)| {
        let options = WriteOptions::default();
        let edited = |node: &Node| {
            let mut node = node.clone();
            change(&mut node);
            Ok(node)
        };
        cluster.registry.modify(None, name, Part::Main, &options, edited).await.unwrap();
    };
    edit("node-2", |node| node.spec.get_or_insert_default().unschedulable = Some(true)).await;
    cluster
        .edit::<DaemonSet>("logs", |set| {
            let spec = set.spec.as_mut().unwrap().template.spec.as_mut().unwrap();
            let selector = [("off".to_owned(), "no".to_owned())];
            spec.node_selector = Some(selector.into());
        })
        .await;
    cluster.eventually("no node has the label", || cluster.list::<Pod>().is_empty()).await;
    for name in ["node-1", "node-2"] {
        edit(name, |node| {
            node.metadata.labels.get_or_insert_default().insert("off".into(), "no".into());
        })
        .await;
    }
    rolled_out(&cluster, "logs", 2).await;

    // A node that is gone takes its pod along.
    nodes[1].kill();
    cluster.registry.delete::<Node>(None, "node-2", &DeleteOptions::default()).await.unwrap();
    let left = || per_node(&cluster.list::<Pod>());
    cluster.eventually("it is gone", || left() == BTreeMap::from([("node-1".to_owned(), 1)])).await;
    rolled_out(&cluster, "logs", 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_keeps_its_bounds_and_can_be_undone() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(4).await;
    let one = json!({"rollingUpdate": {"maxUnavailable": 1}});
    cluster.registry.create(&daemons("logs", one)).await.unwrap();
    rolled_out(&cluster, "logs", 4).await;
    let observer = Observer::start(&cluster.registry);
    set_image(&cluster, "logs", "two").await;
    rolled_out(&cluster, "logs", 4).await;
    let seen = observer.finish().await;
    assert!(seen.fewest_ready >= 3 && seen.most <= 4 && seen.created == 4, "{seen:?}");
    assert!(images(&cluster).values().all(|image| image == "two"));
    let numbers = || {
        let mut all: Vec<i64> =
            cluster.list::<ControllerRevision>().iter().map(|r| r.revision).collect();
        all.sort_unstable();
        all
    };
    assert_eq!(numbers(), [1, 2]);

    // Back: the first revision becomes the third. A third template drops what is beyond the limit.
    set_image(&cluster, "logs", "one").await;
    rolled_out(&cluster, "logs", 4).await;
    assert_eq!(numbers(), [2, 3]);
    set_image(&cluster, "logs", "three").await;
    rolled_out(&cluster, "logs", 4).await;
    cluster.eventually("one old one is kept", || numbers() == [3, 4]).await;

    let surge =
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 2}});
    cluster
        .edit::<DaemonSet>("logs", |set| {
            let strategy = serde_json::from_value(surge.clone()).unwrap();
            set.spec.as_mut().unwrap().update_strategy = Some(strategy);
        })
        .await;
    let observer = Observer::start(&cluster.registry);
    set_image(&cluster, "logs", "four").await;
    rolled_out(&cluster, "logs", 4).await;
    let seen = observer.finish().await;
    assert!(seen.fewest_ready >= 4 && seen.most <= 6, "{seen:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_outlive_a_node_that_is_away_and_a_control_service_that_is() {
    let mut cluster = Cluster::start().await;
    let nodes = cluster.nodes(2).await;
    cluster.registry.create(&daemons("logs", json!(null))).await.unwrap();
    rolled_out(&cluster, "logs", 2).await;
    let other: Pod = object(json!({"metadata": {"namespace": "default", "name": "other"},
        "spec": {"nodeName": "node-1", "containers": [{"name": "main", "image": "x"}]}}));
    cluster.registry.create(&other).await.unwrap();
    nodes[0].kill();
    let is_leaving = || {
        let other: Option<Pod> = cluster.get("other");
        other.is_none_or(|pod| pod.metadata.deletion_timestamp.is_some())
    };
    cluster.eventually("another pod has to leave", is_leaving).await;
    assert_eq!(cluster.active_pods().len(), 2, "the daemons stay");
    cluster
        .eventually("nobody counts on it", || {
            let set: DaemonSet = cluster.get("logs").unwrap();
            set.status.unwrap().desired_number_scheduled == 1
        })
        .await;
    let observer = Observer::start(&cluster.registry);
    let _back = FakeNode::start(&cluster.registry, "node-1").await;
    rolled_out(&cluster, "logs", 2).await;
    cluster.stop_controllers().await;
    cluster.start_controllers();
    set_image(&cluster, "logs", "two").await;
    rolled_out(&cluster, "logs", 2).await;
    assert_eq!(observer.finish().await.created, 2, "those of the update");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_set_leaves_another_one_takes_over() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let counts = || (cluster.list::<ControllerRevision>().len(), cluster.list::<Pod>().len());
    cluster.registry.create(&daemons("logs", json!(null))).await.unwrap();
    rolled_out(&cluster, "logs", 2).await;
    cluster.delete::<DaemonSet>("logs", "Orphan").await;
    cluster.eventually("it is gone", || cluster.get::<DaemonSet>("logs").is_none()).await;
    let is_free = |pod: &Pod| pod.metadata.owner_references.is_none();
    cluster.eventually("free pods", || cluster.list::<Pod>().iter().all(is_free)).await;
    let observer = Observer::start(&cluster.registry);
    cluster.registry.create(&daemons("logs", json!(null))).await.unwrap();
    rolled_out(&cluster, "logs", 2).await;
    assert_eq!(observer.finish().await.created, 0);
    assert_eq!(counts(), (1, 2));
    cluster.delete::<DaemonSet>("logs", "Foreground").await;
    cluster.eventually("all gone", || counts() == (0, 0)).await;
    cluster.eventually("after them", || cluster.get::<DaemonSet>("logs").is_none()).await;
}
