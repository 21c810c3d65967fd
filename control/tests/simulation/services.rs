//! Endpoints and addresses follow pods and nodes.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Event, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::Ingress;
use serde_json::json;

use super::harness::{Cluster, deployment, object};

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
