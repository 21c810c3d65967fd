//! Where pods go, and what becomes of them when their node is gone.

use std::collections::BTreeMap;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Event, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions;
use mesh_control::registry::{Part, WriteOptions};
use mesh_model::wellknown::ANNOTATION_BLOCKS_WANTED;
use serde_json::json;

use super::harness::{Cluster, FakeNode, Observer, deployment, is_ready, object, per_node};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_loses_its_pods_and_comes_back() {
    let cluster = Cluster::start().await;
    let nodes = cluster.nodes(3).await;
    cluster.registry.create(&deployment("web", 6, json!({}))).await.unwrap();
    let service: Service = object(json!({"metadata": {"namespace": "default", "name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}));
    cluster.registry.create(&service).await.unwrap();
    cluster.rolled_out("web").await;
    let dead = &nodes[0];
    dead.kill();
    let here = |pods: Vec<Pod>| per_node(&pods).get(&dead.name).copied().unwrap_or(0);
    let node = || cluster.registry.get::<Node>(None, &dead.name).unwrap();
    let ready = |node: &Node| {
        let conditions = node.status.clone().unwrap().conditions.unwrap();
        conditions.into_iter().find(|c| c.type_ == "Ready").unwrap().status
    };
    cluster.eventually("node lost", || ready(&node()) == "Unknown").await;
    let taints = |node: Node| {
        let taints = node.spec.unwrap_or_default().taints.unwrap_or_default();
        taints.into_iter().map(|t| format!("{}:{}", t.key, t.effect)).collect::<Vec<_>>()
    };
    cluster
        .eventually("tainted", || {
            taints(node())
                == [
                    "node.kubernetes.io/unreachable:NoSchedule",
                    "node.kubernetes.io/unreachable:NoExecute",
                ]
        })
        .await;
    cluster
        .eventually("pods elsewhere", || {
            here(cluster.active_pods()) == 0 && cluster.ready_pods().len() == 6
        })
        .await;
    assert!(here(cluster.list()) > 0, "nobody confirmed that they stopped");
    let serving = || {
        let slices = cluster.list::<EndpointSlice>();
        slices
            .into_iter()
            .flat_map(|s| s.endpoints.unwrap_or_default())
            .filter(|e| e.conditions.as_ref().and_then(|c| c.ready) == Some(true))
            .map(|e| e.node_name.unwrap())
            .collect::<Vec<_>>()
    };
    cluster
        .eventually("endpoints elsewhere", || {
            serving().len() == 6 && !serving().contains(&dead.name)
        })
        .await;

    let told = |pod: &Pod| {
        let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        conditions.into_iter().any(|c| c.type_ == "DisruptionTarget" && c.status == "True")
    };
    let going: Vec<Pod> = cluster
        .list::<Pod>()
        .into_iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_some())
        .collect();
    assert!(!going.is_empty() && going.iter().all(told), "they say why they go: {going:#?}");

    // It returns: its old pods are told to go, and it may be used again.
    let _back = FakeNode::start(&cluster.registry, &dead.name).await;
    cluster.eventually("node back", || ready(&node()) == "True" && taints(node()).is_empty()).await;
    cluster.eventually("old pods gone", || cluster.list::<Pod>().len() == 6).await;
    cluster.scale("web", 9).await;
    cluster.rolled_out("web").await;
    assert!(here(cluster.active_pods()) > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_a_removed_node_are_removed_and_its_block_rests() {
    let cluster = Cluster::start().await;
    let nodes = cluster.nodes(2).await;
    let blocks = |name: &str| {
        let node: Node = cluster.registry.get(None, name).unwrap();
        node.spec.and_then(|s| s.pod_cidrs).unwrap_or_default()
    };
    cluster
        .eventually("blocks", || !blocks("node-1").is_empty() && !blocks("node-2").is_empty())
        .await;
    let first = blocks("node-1");
    assert_ne!(first, blocks("node-2"));
    assert_eq!(first.len(), 2);
    // Its block fills up, and it asks for another.
    cluster
        .registry
        .modify::<Node>(None, "node-1", Part::Main, &WriteOptions::default(), |node| {
            let mut node = node.clone();
            let annotations = node.metadata.annotations.get_or_insert_default();
            annotations.insert(ANNOTATION_BLOCKS_WANTED.to_owned(), "2".to_owned());
            Ok(node)
        })
        .await
        .unwrap();
    cluster.eventually("two blocks of each family", || blocks("node-1").len() == 4).await;
    assert!(blocks("node-1").starts_with(&first), "what it had comes first");
    assert_eq!(blocks("node-2").len(), 2);
    cluster.registry.create(&deployment("web", 4, json!({}))).await.unwrap();
    cluster.rolled_out("web").await;
    nodes[0].kill();
    cluster.registry.delete::<Node>(None, "node-1", &DeleteOptions::default()).await.unwrap();
    cluster
        .eventually("all pods on the other node", || {
            per_node(&cluster.list::<Pod>()) == BTreeMap::from([("node-2".to_owned(), 4)])
        })
        .await;
    cluster.rolled_out("web").await;
    let leases = || cluster.list::<Lease>().len();
    cluster.eventually("its lease is gone", || leases() == 1).await;
    let _again = FakeNode::start(&cluster.registry, "node-1").await;
    cluster.eventually("a block", || !blocks("node-1").is_empty()).await;
    assert_ne!(blocks("node-1"), first, "the freed block rests");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_fits_nowhere_says_why_and_runs_when_it_can() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let pod: Pod = object(json!({"metadata": {"namespace": "default", "name": "big"}, "spec": {
        "containers": [{"name": "main", "image": "x", "resources": {"requests": {"cpu": "5"}}}]}}));
    cluster.registry.create(&pod).await.unwrap();
    let condition = || {
        let pod: Pod = cluster.get("big")?;
        let conditions = pod.status?.conditions?;
        conditions.into_iter().find(|c| c.type_ == "PodScheduled")?.message
    };
    cluster
        .eventually("a condition", || {
            condition().as_deref() == Some("0/2 nodes are available: 2 Insufficient cpu.")
        })
        .await;
    cluster
        .eventually("an event", || {
            cluster.list::<Event>().iter().any(|e| e.reason.as_deref() == Some("FailedScheduling"))
        })
        .await;
    let mut node: Node = cluster.registry.get(None, "node-2").unwrap();
    let allocatable = node.status.as_mut().unwrap().allocatable.as_mut().unwrap();
    allocatable.insert("cpu".to_owned(), serde_json::from_value(json!("8")).unwrap());
    node.metadata.resource_version = None;
    cluster.registry.update_status(&node).await.unwrap();
    cluster
        .eventually("it runs", || cluster.get::<Pod>("big").as_ref().is_some_and(is_ready))
        .await;
    assert_eq!(per_node(&cluster.list()), BTreeMap::from([("node-2".to_owned(), 1)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_pods_are_spread_evenly() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(20).await;
    let observer = Observer::start(&cluster.registry);
    let start = std::time::Instant::now();
    cluster.registry.create(&deployment("web", 1000, json!({}))).await.unwrap();
    cluster
        .eventually("all bound", || per_node(&cluster.list()).values().sum::<usize>() == 1000)
        .await;
    println!("created and bound after {:?}", start.elapsed());
    cluster.rolled_out("web").await;
    println!("served after {:?}", start.elapsed());
    let spread = per_node(&cluster.active_pods());
    assert!(spread.len() == 20 && spread.values().all(|n| *n == 50), "{spread:?}");
    assert_eq!(observer.finish().await.created, 1000);
}
