//! What is remembered against what is made from nothing.

use std::sync::Arc;

use k8s_openapi::Metadata;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Compiler;
use crate::compile::{Objects, compile};
use crate::{NodeName, Snapshot};

const NAMESPACES: [&str; 2] = ["default", "kube-system"];
/// Some of them mean something in one of the namespaces.
const SERVICES: [&str; 4] = ["kubernetes", "kube-dns", "web", "db"];

/// One object gets another form, or goes. Numbers choose among a few names and forms, so that objects meet.
#[derive(Debug, Clone, Copy)]
struct Change {
    kind: u8,
    which: u8,
    form: u8,
    there: bool,
    /// How far the lists are turned: order must not matter.
    turn: usize,
}

fn change() -> impl Strategy<Value = Change> {
    // Slices change most, as in a cluster.
    let kind = prop_oneof![3 => Just(4u8), 7 => 0u8..10];
    (kind, 0u8..16, any::<u8>(), proptest::bool::weighted(0.8), 0usize..5)
        .prop_map(|(kind, which, form, there, turn)| Change { kind, which, form, there, turn })
}

/// Puts the object in the place of the one of its name. All others stay where they are in memory.
fn put<T>(list: &mut Vec<Arc<T>>, mut object: Value, change: Change)
where
    T: Metadata<Ty = ObjectMeta> + DeserializeOwned,
{
    object["metadata"]["resourceVersion"] = json!(change.form.to_string());
    let object: T = serde_json::from_value(object).unwrap();
    let name = |object: &T| (object.metadata().namespace.clone(), object.metadata().name.clone());
    list.retain(|one| name(one) != name(&object));
    if change.there {
        list.push(Arc::new(object));
    }
    let turn = change.turn % list.len().max(1);
    list.rotate_left(turn);
}

fn carry_out(change: Change, objects: &mut Objects) {
    let Change { kind, which, form, .. } = change;
    let (namespace, name) =
        (NAMESPACES[usize::from(which % 2)], SERVICES[usize::from(which / 2 % 4)]);
    let named = |name: String| json!({"namespace": namespace, "name": name});
    let bit = |n: u8| form >> n & 1 == 1;
    match kind {
        0 => put(&mut objects.nodes, node(which % 3, form), change),
        1 => {
            let isolation = if bit(0) { "namespace" } else { "none" };
            let namespace = json!({"metadata": {"name": namespace, "labels": {"mesh.dev/isolation": isolation}}});
            put(&mut objects.namespaces, namespace, change);
        }
        2 => put(&mut objects.pods, pod(named(format!("p{}", which % 4)), which, form), change),
        3 => put(&mut objects.services, service(named(name.to_owned()), form), change),
        4 => {
            let metadata = named(format!("{name}-{}", which / 8));
            put(&mut objects.endpoint_slices, slice(metadata, name, form), change);
        }
        5 => {
            let map = json!({"metadata": named("c".to_owned()), "data": {"a": form.to_string()}});
            put(&mut objects.config_maps, map, change);
        }
        6 => {
            let secret = json!({"metadata": named("s".to_owned()),
                "data": {"tls.crt": "Y2VydA==", "tls.key": if bit(0) { "a2V5" } else { "eA==" }}});
            put(&mut objects.secrets, secret, change);
        }
        7 => {
            let ingress = ingress(named(format!("i{}", which / 8)), name, form);
            put(&mut objects.ingresses, ingress, change);
        }
        8 => {
            let block = json!([{"ipBlock": {"cidr": format!("10.244.{}.0/24", form % 3)}}]);
            let policy = json!({"metadata": named("p".to_owned()), "spec": {
                "podSelector": {"matchLabels": {"app": if bit(2) { "a" } else { "b" }}},
                "ingress": [{"from": if bit(3) { block } else { json!([{"podSelector": {"matchLabels": {"app": "a"}}}]) }}]}});
            put(&mut objects.network_policies, policy, change);
        }
        _ => {
            objects.cluster.domain = if bit(0) { "a.test" } else { "b.test" }.to_owned();
            let allowed = if bit(1) { "198.51.100.0/24" } else { "203.0.113.0/24" };
            objects.cluster.external_ip_cidrs = vec![allowed.parse().unwrap()];
        }
    }
}

fn node(which: u8, form: u8) -> Value {
    let key = crate::snapshot::WgKey([1 + (form & 3); 32]).to_string();
    json!({
        "metadata": {"name": format!("n{which}"), "creationTimestamp": format!("2026-01-0{}T00:00:00Z", 1 + form % 4),
                     "annotations": {"mesh.dev/wireguard-public-key": key},
                     "labels": {"topology.kubernetes.io/zone": format!("z{}", form >> 2 & 1)}},
        "spec": {"podCIDRs": [format!("10.244.{}.0/24", which ^ (form >> 3 & 1))]},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.0.2.{}", form >> 4 & 3)}]}
    })
}

fn pod(mut metadata: Value, which: u8, form: u8) -> Value {
    metadata["uid"] = json!(format!("u{which}"));
    metadata["labels"] = json!({"app": if form & 1 == 0 { "a" } else { "b" }});
    if form & 2 != 0 {
        metadata["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    }
    json!({
        "metadata": metadata,
        "spec": {"nodeName": format!("n{}", form >> 2 & 1), "enableServiceLinks": form & 8 == 0, "containers": [{
            "name": "c", "envFrom": [{"configMapRef": {"name": "c"}}, {"secretRef": {"name": "s"}}]}]},
        "status": {"podIP": format!("10.244.0.{}", which % 4), "podIPs": [{"ip": format!("10.244.0.{}", which % 4)}]}
    })
}

/// Few addresses, so that services claim each other's.
fn service(metadata: Value, form: u8) -> Value {
    let address = format!("10.96.0.{}", 1 + (form >> 4 & 3));
    let port = json!({"name": "http", "port": 80, "nodePort": 30080});
    let selector = json!({"app": "a"});
    let spec = match form % 6 {
        0 => json!({"clusterIP": "None", "selector": selector, "ports": [port]}),
        1 => json!({"type": "ExternalName", "externalName": "elsewhere.test"}),
        2 => {
            json!({"type": "LoadBalancer", "clusterIP": address, "externalTrafficPolicy": "Local", "ports": [port],
                    "healthCheckNodePort": 30000 + i32::from(form >> 6), "externalIPs": ["198.51.100.7"]})
        }
        3 => {
            json!({"type": "LoadBalancer", "clusterIP": address, "ports": [port], "externalIPs": ["203.0.113.7"]})
        }
        4 => {
            json!({"clusterIP": address, "clusterIPs": [address, "fd10:96::1"], "internalTrafficPolicy": "Local", "ports": [port]})
        }
        _ => {
            json!({"clusterIP": address, "selector": selector, "ports": [port, {"name": "dns", "port": 53, "protocol": "UDP"}]})
        }
    };
    let status =
        json!({"loadBalancer": {"ingress": [{"ip": format!("192.0.2.{}", 100 + (form >> 6))}]}});
    json!({"metadata": metadata, "spec": spec, "status": status})
}

fn slice(mut metadata: Value, service: &str, form: u8) -> Value {
    metadata["labels"] = json!({"kubernetes.io/service-name": service});
    // The same addresses in several slices, on other nodes.
    let endpoint = |n: u8| {
        json!({"addresses": [format!("10.244.{}.{n}", form & 1)], "nodeName": format!("n{}", (form >> 1 & 1) ^ (n & 1)),
               "hints": {"forZones": [{"name": format!("z{}", n & 1)}]}, "targetRef": {"kind": "Pod", "uid": format!("u{n}")},
               "conditions": {"ready": form >> (2 + n % 6) & 1 == 0, "serving": true, "terminating": form >> (2 + n % 6) & 1 == 1}})
    };
    let endpoints: Vec<Value> = (0..form >> 5).map(endpoint).collect();
    json!({"metadata": metadata, "addressType": "IPv4", "ports": [{"name": "http", "port": 8080}], "endpoints": endpoints})
}

fn ingress(mut metadata: Value, service: &str, form: u8) -> Value {
    metadata["creationTimestamp"] = json!(format!("2026-01-0{}T00:00:00Z", 1 + form % 3));
    json!({"metadata": metadata, "spec": {
        "ingressClassName": if form & 4 == 0 { "mesh" } else { "other" },
        "tls": [{"hosts": ["a.test"], "secretName": "s"}],
        "rules": [{"host": "a.test", "http": {"paths": [{"path": format!("/{}", form >> 6), "pathType": "Prefix",
            "backend": {"service": {"name": service, "port": {"name": "http"}}}}]}}]}})
}

fn local() -> NodeName {
    "n0".parse().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever changes in whatever order: what was remembered is no different from what is made from nothing.
    #[test]
    fn what_is_remembered_is_what_would_be_made(changes in proptest::collection::vec(change(), 1..60)) {
        let mut objects = Objects::default();
        let mut compiler = Compiler::new(local());
        for change in changes {
            carry_out(change, &mut objects);
            objects.cluster_pods = objects.pods.clone();
            let remembered = compiler.compile(&objects);
            let made = compile(&objects, &local());
            prop_assert!(remembered == made, "after {change:?}: {}", difference(&remembered, &made));
        }
    }
}

/// The part that differs: all of a snapshot is too much to read.
fn difference(remembered: &Snapshot, made: &Snapshot) -> String {
    let [Value::Object(a), Value::Object(b)] =
        [remembered, made].map(|one| serde_json::to_value(one).unwrap())
    else {
        unreachable!("a snapshot is an object");
    };
    let parts = a.iter().filter(|(key, value)| b.get(*key) != Some(value));
    parts.map(|(key, value)| format!("{key}: {value} instead of {}\n", b[key])).collect()
}

/// A node, a hundred services with an endpoint each, and a pod.
fn many() -> Objects {
    let mut objects = Objects::default();
    let one = |which, kind, form| Change { kind, which, form, there: true, turn: 0 };
    carry_out(one(0, 0, 0), &mut objects);
    carry_out(one(0, 2, 0), &mut objects);
    carry_out(one(0, 7, 0), &mut objects);
    for n in 0..100u8 {
        let name = format!("s{n:02}");
        let metadata = json!({"namespace": "apps", "name": name});
        let ip = format!("10.96.1.{n}");
        let service = json!({"metadata": metadata, "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80}]}});
        put(&mut objects.services, service, one(0, 3, 1));
        put(&mut objects.endpoint_slices, slice(metadata, &name, 1 << 5), one(0, 4, 1));
    }
    objects
}

#[test]
fn what_does_not_change_stays_where_it_is() {
    let mut objects = many();
    let mut compiler = Compiler::new(local());
    let before = compiler.compile(&objects);
    let metadata = json!({"namespace": "apps", "name": "s42"});
    let change = Change { kind: 4, which: 0, form: 2, there: true, turn: 3 };
    put(&mut objects.endpoint_slices, slice(metadata, "s42", 2 << 5), change);
    let after = compiler.compile(&objects);
    let moved: Vec<String> = before
        .frontends
        .iter()
        .zip(after.frontends.iter())
        .filter(|(a, b)| !Arc::ptr_eq(a, b))
        .map(|(_, b)| b.service.name.clone())
        .collect();
    assert_eq!((moved, after.revision), (vec!["s42".to_owned()], 2));
    assert!(Arc::ptr_eq(&before.dns, &after.dns), "its name means what it meant");
    assert!(Arc::ptr_eq(&before.l7, &after.l7), "no route leads there");
    assert!(Arc::ptr_eq(&before.edge, &after.edge));
    assert!(Arc::ptr_eq(&before.pods, &after.pods));
    assert!(Arc::ptr_eq(&before.peers, &after.peers));
    assert!(Arc::ptr_eq(&before.policy, &after.policy));
    let again = compiler.compile(&objects);
    assert!(Arc::ptr_eq(&after.frontends, &again.frontends));
}
