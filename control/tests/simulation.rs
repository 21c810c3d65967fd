//! The controllers against a real registry and pretended nodes: what people see when they scale, roll out, lose a
//! node, delete, and restart the control service in the middle.

#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::Ingress;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions;
use mesh_control::registry::{Part, WriteOptions};
use mesh_model::wellknown::ANNOTATION_BLOCKS_WANTED;
use serde_json::json;

use harness::{Cluster, FakeNode, Observer, deployment, is_ready, object};

#[path = "simulation/harness.rs"]
mod harness;

type Multi = BTreeMap<String, usize>;

fn per_node(pods: &[Pod]) -> Multi {
    let mut counts = Multi::new();
    for node in pods.iter().filter_map(|pod| pod.spec.as_ref()?.node_name.clone()) {
        *counts.entry(node).or_default() += 1;
    }
    counts
}

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
            per_node(&cluster.list::<Pod>()) == Multi::from([("node-2".to_owned(), 4)])
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn services_follow_their_pods() {
    let cluster = Cluster::start().await;
    let _nodes = cluster.nodes(2).await;
    let service: Service = object(
        json!({"metadata": {"namespace": "default", "name": "web"}, "spec": {
        "ipFamilyPolicy": "PreferDualStack", "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}}),
    );
    cluster.registry.create(&service).await.unwrap();
    let addresses = || {
        let mut result: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for slice in cluster.list::<EndpointSlice>() {
            let ready = slice
                .endpoints
                .into_iter()
                .flatten()
                .filter(|e| e.conditions.as_ref().and_then(|c| c.ready) == Some(true));
            result.entry(slice.address_type).or_default().extend(ready.flat_map(|e| e.addresses));
        }
        result
    };
    cluster.eventually("an empty slice for each family", || addresses().len() == 2).await;
    cluster.registry.create(&deployment("web", 3, json!({}))).await.unwrap();
    let pods = || {
        let mut result: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for pod in cluster.ready_pods() {
            for ip in pod.status.unwrap().pod_ips.unwrap() {
                let family = if ip.ip.contains(':') { "IPv6" } else { "IPv4" };
                result.entry(family.to_owned()).or_default().insert(ip.ip);
            }
        }
        result
    };
    for replicas in [3, 5, 1] {
        cluster.scale("web", replicas).await;
        cluster.rolled_out("web").await;
        cluster.eventually("endpoints are the ready pods", || addresses() == pods()).await;
        assert_eq!(addresses()["IPv6"].len(), usize::try_from(replicas).unwrap());
    }
    cluster.delete::<Service>("web", "Background").await;
    cluster.eventually("slices gone", || cluster.list::<EndpointSlice>().is_empty()).await;
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
    assert_eq!(per_node(&cluster.list()), Multi::from([("node-2".to_owned(), 1)]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ingresses_show_the_addresses_of_ready_nodes() {
    let cluster = Cluster::start().await;
    let nodes = cluster.nodes(2).await;
    let ingress: Ingress =
        object(json!({"metadata": {"namespace": "default", "name": "web"}, "spec": {
        "defaultBackend": {"service": {"name": "web", "port": {"number": 80}}}}}));
    cluster.registry.create(&ingress).await.unwrap();
    let shown = || {
        let ingress: Ingress = cluster.get("web").unwrap();
        let points = ingress.status.and_then(|s| s.load_balancer).and_then(|l| l.ingress);
        points.unwrap_or_default().into_iter().filter_map(|p| p.ip).collect::<Vec<_>>()
    };
    cluster.eventually("both nodes", || shown() == ["192.168.0.1", "192.168.0.2"]).await;
    nodes[0].kill();
    cluster.eventually("the one that lives", || shown() == ["192.168.0.2"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_balancers_get_addresses_and_give_them_back() {
    let cluster = Cluster::start().await;
    let balancer = |name: &str| -> Service {
        object(json!({"metadata": {"namespace": "default", "name": name},
            "spec": {"type": "LoadBalancer", "ports": [{"port": 80}]}}))
    };
    let shown = |name: &str| {
        let service: Service = cluster.get(name).unwrap();
        let points = service.status.and_then(|s| s.load_balancer).and_then(|l| l.ingress);
        points.unwrap_or_default().into_iter().filter_map(|p| p.ip).collect::<Vec<_>>()
    };
    for name in ["a", "b", "c"] {
        cluster.registry.create(&balancer(name)).await.unwrap();
    }
    let all = || ["a", "b", "c"].into_iter().flat_map(shown).collect::<BTreeSet<_>>();
    cluster.eventually("both addresses are given", || all().len() == 2).await;
    let waits = ["a", "b", "c"].into_iter().find(|name| shown(name).is_empty()).unwrap();
    let failed = || {
        cluster.list::<Event>().into_iter().any(|e| {
            e.reason.as_deref() == Some("AllocationFailed")
                && e.involved_object.name.as_deref() == Some(waits)
        })
    };
    cluster.eventually("the third is told why it waits", failed).await;
    let had = ["a", "b", "c"].into_iter().find(|name| *name != waits).unwrap();
    let address = shown(had);
    let mut plain: Service = cluster.get(had).unwrap();
    // As a patch of the type alone makes it: what belonged to the former type comes along.
    plain.spec.as_mut().unwrap().type_ = Some("ClusterIP".to_owned());
    cluster.registry.update(&plain).await.unwrap();
    cluster.eventually("what one gave back the other gets", || shown(waits) == address).await;
    cluster.eventually("and nobody else shows it", || shown(had).is_empty()).await;
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
