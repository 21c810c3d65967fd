//! Endpoints and addresses follow pods and nodes.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Endpoints, Event, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::Ingress;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, DeleteOptions};
use mesh_control::registry::{Part, WriteOptions};
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

fn by_hand(name: &str, ips: &[String]) -> Endpoints {
    let addresses: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    object(json!({"metadata": {"namespace": "default", "name": name},
        "subsets": [{"addresses": addresses, "ports": [{"name": "sql", "port": 5432}]}]}))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_written_by_hand_lead_somewhere() {
    let mut cluster = Cluster::start().await;
    let ips = |ips: &[&str]| ips.iter().map(|ip| (*ip).to_owned()).collect::<Vec<_>>();
    let service: Service = object(json!({"metadata": {"namespace": "default", "name": "db"},
        "spec": {"ports": [{"name": "sql", "port": 5432}]}}));
    let own: EndpointSlice = object(json!({
        "metadata": {"namespace": "default", "name": "db-own",
            "labels": {"kubernetes.io/service-name": "db", "endpointslice.kubernetes.io/managed-by": "people"}},
        "addressType": "IPv4", "endpoints": [{"addresses": ["192.0.2.99"]}]}));
    let own = cluster.registry.create(&own).await.unwrap();
    let led_to = |cluster: &Cluster| {
        let slices = cluster.list::<EndpointSlice>().into_iter().filter(|slice| {
            let manager = "endpointslice.kubernetes.io/managed-by";
            let labels = slice.metadata.labels.clone().unwrap_or_default();
            labels.get(manager).is_some_and(|m| m.starts_with("endpointslicemirroring-"))
        });
        let endpoints = slices.flat_map(|slice| slice.endpoints.into_iter().flatten());
        endpoints.flat_map(|endpoint| endpoint.addresses).collect::<BTreeSet<_>>()
    };
    let is = |cluster: &Cluster, wanted: &[&str]| {
        led_to(cluster) == wanted.iter().map(|ip| (*ip).to_owned()).collect::<BTreeSet<_>>()
    };
    // A manifest may have them before the Service.
    cluster.registry.create(&by_hand("db", &ips(&["192.0.2.7"]))).await.unwrap();
    cluster.registry.create(&service).await.unwrap();
    cluster.eventually("the address", || is(&cluster, &["192.0.2.7"])).await;
    let both = by_hand("db", &ips(&["192.0.2.8", "2001:db8::8"])).subsets;
    cluster.edit::<Endpoints>("db", |e| e.subsets.clone_from(&both)).await;
    cluster.eventually("both", || is(&cluster, &["192.0.2.8", "2001:db8::8"])).await;

    let skip = |value: &'static str| {
        move |endpoints: &mut Endpoints| {
            let labels = endpoints.metadata.labels.get_or_insert_default();
            labels.insert("endpointslice.kubernetes.io/skip-mirror".to_owned(), value.to_owned());
        }
    };
    cluster.edit::<Endpoints>("db", skip("true")).await;
    cluster.eventually("not mirrored", || is(&cluster, &[])).await;
    cluster.edit::<Endpoints>("db", skip("false")).await;
    cluster.eventually("mirrored again", || !is(&cluster, &[])).await;

    // With a selector it is the pods that count, also when nobody saw it come.
    let select = |selector: Option<&'static str>| {
        move |service: &mut Service| {
            let labels = selector.map(|app| BTreeMap::from([("app".to_owned(), app.to_owned())]));
            service.spec.as_mut().unwrap().selector = labels;
        }
    };
    cluster.stop_controllers().await;
    cluster.edit::<Service>("db", select(Some("db"))).await;
    cluster.start_controllers();
    cluster.eventually("pods count", || is(&cluster, &[])).await;
    cluster.edit::<Service>("db", select(None)).await;
    cluster.eventually("people count", || !is(&cluster, &[])).await;

    cluster.delete::<Service>("db", "Background").await;
    cluster.eventually("nobody asks", || is(&cluster, &[])).await;
    assert!(cluster.get::<Endpoints>("db").is_some(), "they are people's");
    cluster.registry.create(&service).await.unwrap();
    cluster.eventually("somebody asks", || !is(&cluster, &[])).await;
    cluster.delete::<Endpoints>("db", "Foreground").await;
    cluster
        .eventually("gone", || is(&cluster, &[]) && cluster.get::<Endpoints>("db").is_none())
        .await;
    assert_eq!(cluster.get::<EndpointSlice>("db-own"), Some(own), "as it was written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_writes_too_many_endpoints_hears_of_it() {
    let cluster = Cluster::start().await;
    let service: Service = object(json!({"metadata": {"namespace": "default", "name": "db"},
        "spec": {"ports": [{"name": "sql", "port": 5432}]}}));
    cluster.registry.create(&service).await.unwrap();
    let many: Vec<_> = (0..1002).map(|n| format!("10.0.{}.{}", n / 250, n % 250 + 1)).collect();
    cluster.registry.create(&by_hand("db", &many)).await.unwrap();
    let told = || {
        cluster.list::<Event>().into_iter().find(|event| {
            event.reason.as_deref() == Some("TooManyAddressesToMirror")
                && event.involved_object.kind.as_deref() == Some("Endpoints")
        })
    };
    cluster.eventually("an Event", || told().is_some()).await;
    let message = told().unwrap().message.unwrap();
    assert!(message.contains("2 addresses were skipped"), "{message}");
    let slices = cluster.list::<EndpointSlice>();
    assert_eq!(slices.len(), 1);
    assert_eq!(slices[0].endpoints.as_ref().unwrap().len(), 1000);
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

/// A node reports that it lacks room for these Services.
async fn report(cluster: &Cluster, node: &str, services: &[&str]) {
    let services: Vec<_> = services.iter().map(|name| format!("default/{name}")).collect();
    let report = (!services.is_empty())
        .then(|| json!({"SLOTS": {"capacity": 1024, "services": services}}).to_string());
    let changed = |old: &Node| {
        let mut new = old.clone();
        let annotations = new.metadata.annotations.get_or_insert_default();
        annotations.remove("mesh.dev/maps-full");
        annotations.extend(report.clone().map(|text| ("mesh.dev/maps-full".to_owned(), text)));
        Ok(new)
    };
    let options = WriteOptions::default();
    cluster.registry.modify(None, node, Part::Main, &options, changed).await.unwrap();
}

fn conditions(cluster: &Cluster, service: &str) -> Vec<Condition> {
    let service: Service = cluster.get(service).unwrap();
    service.status.and_then(|status| status.conditions).unwrap_or_default()
}

/// What a Service says about nodes without room for it.
fn lack_of(cluster: &Cluster, service: &str) -> String {
    let conditions = conditions(cluster, service).into_iter();
    let mut ours = conditions.filter(|condition| condition.type_ == "mesh.dev/MapFull");
    ours.next().map(|condition| condition.message).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_shows_which_nodes_have_no_room_for_it() {
    let mut cluster = Cluster::start().await;
    let mut nodes = cluster.nodes(2).await;
    let service = |name: &str| -> Service {
        object(
            json!({"metadata": {"namespace": "default", "name": name}, "spec": {"ports": [{"port": 80}]}}),
        )
    };
    for name in ["a", "b"] {
        cluster.registry.create(&service(name)).await.unwrap();
    }
    let other: Condition = serde_json::from_value(json!({
        "type": "example.com/Audited", "status": "True", "reason": "Seen", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}))
    .unwrap();
    let mut audited: Service = cluster.get("a").unwrap();
    audited.status.get_or_insert_default().conditions = Some(vec![other.clone()]);
    cluster.registry.update_status(&audited).await.unwrap();
    let told = |name: &str| lack_of(&cluster, name);
    report(&cluster, "node-1", &["a", "later"]).await;
    report(&cluster, "node-2", &["a", "b"]).await;
    let both = || told("a").contains("node node-1 (1024 entries), node node-2 (1024 entries)");
    cluster.eventually("both nodes are named", both).await;
    cluster.eventually("one is named", || told("b").contains("on node node-2")).await;
    assert!(told("b").contains("--max-backends"), "{}", told("b"));
    assert_eq!(conditions(&cluster, "a")[0], other, "those of others stay");
    let events = || {
        let events = cluster.list::<Event>().into_iter();
        let ours = events.filter(|e| e.involved_object.name.as_deref() == Some("b"));
        ours.filter_map(|e| e.reason).collect::<BTreeSet<_>>()
    };
    cluster.eventually("told as an event", || events().contains("MapFull")).await;
    // What is not known yet is marked when it comes.
    cluster.registry.create(&service("later")).await.unwrap();
    cluster.eventually("a late one is named", || told("later").contains("on node node-1")).await;
    // Nothing is written while nothing changes: heartbeats of nodes change nothing here.
    let version = |name: &str| cluster.get::<Service>(name).unwrap().metadata.resource_version;
    let before = version("a");
    report(&cluster, "node-2", &["a"]).await;
    cluster.eventually("one fits again", || told("b").is_empty()).await;
    cluster.eventually("and says so", || events().contains("MapFits")).await;
    assert_eq!(version("a"), before);
    // A node that is removed while nobody looks takes its reports along.
    cluster.stop_controllers().await;
    let gone = nodes.remove(1);
    gone.kill();
    let options = DeleteOptions::default();
    cluster.registry.delete::<Node>(None, "node-2", &options).await.unwrap();
    cluster.start_controllers();
    let told = |name: &str| lack_of(&cluster, name);
    let one = || told("a").contains("node-1") && !told("a").contains("node-2");
    cluster.eventually("the removed one is not named", one).await;
    report(&cluster, "node-1", &[]).await;
    cluster.eventually("all fit", || told("a").is_empty() && told("later").is_empty()).await;
    assert_eq!(conditions(&cluster, "a"), [other]);
}
