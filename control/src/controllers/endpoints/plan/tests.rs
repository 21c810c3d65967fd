use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn service(patch: Value) -> Service {
    let mut value = json!({
        "metadata": {"namespace": "default", "name": "web", "uid": "svc", "labels": {"team": "x"}},
        "spec": {"selector": {"app": "web"}, "clusterIP": "10.96.1.1", "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]},
    });
    json_patch::merge(&mut value, &patch);
    serde_json::from_value(value).unwrap()
}

fn pod(n: usize, patch: Value) -> Arc<Pod> {
    let v4 = format!("10.244.{}.{}", n / 200, n % 200 + 1);
    let mut value = json!({
        "metadata": {"namespace": "default", "name": format!("p{n}"), "uid": format!("u{n}"), "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9000}]}]},
        "status": {"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": format!("fd10::{n:x}")}],
            "conditions": [{"type": "Ready", "status": "True"}]},
    });
    json_patch::merge(&mut value, &patch);
    Arc::new(serde_json::from_value(value).unwrap())
}

/// Applies the steps, naming new slices.
fn apply(slices: &mut Vec<Arc<EndpointSlice>>, steps: &[Step]) {
    for step in steps {
        match step {
            Step::Create(slice) => {
                let mut slice = (**slice).clone();
                let n = (0..).find(|n| {
                    slices.iter().all(|s| s.metadata.name != Some(format!("web-{n:03}")))
                });
                slice.metadata.name = n.map(|n: usize| format!("web-{n:03}"));
                slices.push(Arc::new(slice));
            }
            Step::Update(slice) => {
                for s in slices.iter_mut().filter(|s| s.metadata.name == slice.metadata.name) {
                    *s = Arc::new((**slice).clone());
                }
            }
            Step::Delete(name) => slices.retain(|s| objects::name(&s.metadata) != name),
        }
    }
}

fn text(steps: &[Step]) -> Vec<String> {
    steps.iter().map(ToString::to_string).collect()
}

fn make(service: &Service, pods: &[Arc<Pod>], slices: &[Arc<EndpointSlice>]) -> Vec<Step> {
    plan(service, pods, &Surroundings::default(), slices)
}

fn only(steps: Vec<Step>) -> EndpointSlice {
    match steps.as_slice() {
        [Step::Create(slice) | Step::Update(slice)] => (**slice).clone(),
        other => panic!("{:?}", text(other)),
    }
}

#[test]
fn a_slice_says_all_about_its_pods() {
    let around = Surroundings {
        zones: [("n1".to_owned(), "z1".to_owned())].into(),
        ..Surroundings::default()
    };
    let slice = only(plan(&service(json!({})), &[pod(1, json!({}))], &around, &[]));
    assert_eq!(
        serde_json::to_value(slice).unwrap(),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"generateName": "web-", "namespace": "default",
                "labels": {"team": "x", "kubernetes.io/service-name": "web",
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": "web", "uid": "svc",
                    "controller": true, "blockOwnerDeletion": true}]},
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.244.0.2"], "nodeName": "n1", "zone": "z1",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "name": "p1", "namespace": "default", "uid": "u1"}}],
        })
    );
}

#[test]
fn both_families_and_headless_names() {
    let headless = service(json!({"spec": {"clusterIP": "None", "ipFamilies": ["IPv4", "IPv6"]}}));
    let named = pod(1, json!({"spec": {"hostname": "a", "subdomain": "web"}}));
    let other = pod(2, json!({"spec": {"hostname": "b", "subdomain": "other"}}));
    let steps = make(&headless, &[named, other], &[]);
    assert_eq!(
        text(&steps),
        ["create IPv4 slice with 2 endpoints", "create IPv6 slice with 2 endpoints"]
    );
    let Step::Create(slice) = &steps[1] else { panic!() };
    assert!(slice.metadata.labels.as_ref().unwrap().contains_key("service.kubernetes.io/headless"));
    let names: Vec<_> = slice.endpoints.iter().flatten().map(|e| e.hostname.clone()).collect();
    assert_eq!(names, [Some("a".to_owned()), None]);
}

#[test]
fn conditions_follow_readiness_termination_and_lost_nodes() {
    let flags = |service: &Service, pod: Arc<Pod>, lost: &[&str]| {
        let around = Surroundings {
            lost: lost.iter().map(|n| (*n).to_owned()).collect(),
            ..Surroundings::default()
        };
        let slice = only(plan(service, &[pod], &around, &[]));
        let c = slice.endpoints.unwrap().remove(0).conditions.unwrap();
        (c.ready.unwrap(), c.serving.unwrap(), c.terminating.unwrap())
    };
    let plain = service(json!({}));
    let unready = || pod(1, json!({"status": {"conditions": null}}));
    let going = || pod(1, json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
    assert_eq!(flags(&plain, pod(1, json!({})), &[]), (true, true, false));
    assert_eq!(flags(&plain, unready(), &[]), (false, false, false));
    assert_eq!(flags(&plain, going(), &[]), (false, true, true));
    assert_eq!(flags(&plain, pod(1, json!({})), &["n1"]), (false, false, false));
    let regardless = service(json!({"spec": {"publishNotReadyAddresses": true}}));
    assert_eq!(flags(&regardless, unready(), &[]), (true, false, false));
    let none = make(&plain, &[pod(1, json!({"status": {"phase": "Failed"}}))], &[]);
    assert_eq!(text(&none), ["create IPv4 slice with 0 endpoints"]);
}

#[test]
fn named_ports_follow_each_pod() {
    let s =
        service(json!({"spec": {"ports": [{"name": "http", "port": 80, "targetPort": "web"}]}}));
    let other = pod(
        2,
        json!({"spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9001}]}]}}),
    );
    let without = pod(3, json!({"spec": {"containers": [{"name": "c"}]}}));
    let steps = make(&s, &[pod(1, json!({})), other, without], &[]);
    let ports: BTreeSet<_> = steps
        .iter()
        .map(|s| match s {
            Step::Create(slice) => slice.ports.as_ref().unwrap().first().and_then(|p| p.port),
            _ => panic!(),
        })
        .collect();
    assert_eq!(ports, [None, Some(9000), Some(9001)].into());
}

#[test]
fn a_service_without_selector_is_the_users_own() {
    let mut own = service(json!({}));
    own.spec.as_mut().unwrap().selector = None;
    assert!(make(&own, &[pod(1, json!({}))], &[]).is_empty());
    assert!(!objects::selects_pods(&service(json!({"spec": {"type": "ExternalName"}}))));
}

#[test]
fn one_pod_changes_one_slice() {
    let s = service(json!({}));
    let mut pods: Vec<_> = (0..250).map(|n| pod(n, json!({}))).collect();
    let mut slices = Vec::new();
    let steps = make(&s, &pods, &slices);
    assert_eq!(
        text(&steps),
        [
            "create IPv4 slice with 100 endpoints",
            "create IPv4 slice with 100 endpoints",
            "create IPv4 slice with 50 endpoints"
        ]
    );
    apply(&mut slices, &steps);
    assert!(make(&s, &pods, &slices).is_empty());
    pods[7] = pod(7, json!({"status": {"conditions": null}}));
    assert_eq!(make(&s, &pods, &slices).len(), 1);
    pods.remove(3);
    pods.push(pod(300, json!({})));
    let steps = make(&s, &pods, &slices);
    apply(&mut slices, &steps);
    let total: usize = slices.iter().map(|s| s.endpoints.as_ref().unwrap().len()).sum();
    assert_eq!(total, 250);
    let steps = make(&s, &[], &slices);
    apply(&mut slices, &steps);
    assert_eq!(slices.len(), 1, "an empty one stays");
    assert!(make(&s, &[], &slices).is_empty());
    let moved = service(json!({"spec": {"ipFamilies": ["IPv6"]}}));
    let steps = make(&moved, &[pod(1, json!({}))], &slices);
    apply(&mut slices, &steps);
    assert_eq!(slices.iter().map(|s| s.address_type.as_str()).collect::<Vec<_>>(), ["IPv6"]);
}

#[test]
fn endpoints_are_listed_all_the_time_while_their_ports_change() {
    let pods: Vec<_> = (0..3).map(|n| pod(n, json!({}))).collect();
    let mut slices = Vec::new();
    apply(&mut slices, &make(&service(json!({})), &pods, &[]));
    let http = |patch: Value| {
        service(json!({"spec": {"ports": [{"name": "http", "port": 80, "targetPort": patch}]}}))
    };
    let mut named = http(json!(9090));
    named.spec.as_mut().unwrap().ports.as_mut().unwrap()[0].app_protocol =
        Some("kubernetes.io/h2c".to_owned());
    for changed in [http(json!(9090)), named, http(json!("web"))] {
        let steps = make(&changed, &pods, &slices);
        assert!(!steps.is_empty());
        for step in steps {
            apply(&mut slices, std::slice::from_ref(&step));
            let all = slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
            let listed: BTreeSet<_> = all.flat_map(|endpoint| &endpoint.addresses).collect();
            assert_eq!(listed.len(), pods.len(), "after {step}");
        }
        assert_eq!(slices.len(), 1, "what is not needed any more went in the end");
    }
}

#[test]
fn pods_that_share_a_nodes_address_are_endpoints_each() {
    let on_node = |n, conditions: Value| {
        let ip = "192.0.2.1";
        let status = json!({"podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions});
        pod(n, json!({"status": status}))
    };
    let web = service(json!({}));
    let serving = |n| on_node(n, json!([{"type": "Ready", "status": "True"}]));
    // The other one has the port yet.
    let waiting = |n| on_node(n, json!([]));
    for pods in [[serving(1), waiting(2)], [waiting(1), serving(2)]] {
        let mut slices = Vec::new();
        apply(&mut slices, &make(&web, &pods, &[]));
        let endpoints = slices[0].endpoints.as_deref().unwrap();
        let ready = |e: &&Endpoint| e.conditions.as_ref().unwrap().ready == Some(true);
        assert_eq!((endpoints.len(), endpoints.iter().filter(ready).count()), (2, 1));
        assert_eq!(make(&web, &pods, &slices), [], "nothing to do");
        let steps = make(&web, &pods[1..], &slices);
        apply(&mut slices, &steps);
        let left = slices[0].endpoints.as_deref().unwrap();
        let uid = |endpoint: &Endpoint| endpoint.target_ref.as_ref().unwrap().uid.clone();
        assert_eq!(left.iter().map(uid).collect::<Vec<_>>(), [Some("u2".to_owned())]);
    }
}

proptest! {
    #[test]
    fn slices_converge_and_hold_each_address_once(
        rounds in prop::collection::vec(prop::collection::btree_set((0usize..250, 0u8..2), 0..260), 1..5),
    ) {
        let s = service(json!({"spec": {"ports": [{"name": "http", "port": 80, "targetPort": "web"}]}}));
        let mut slices = Vec::new();
        for round in rounds {
            let mut by_number: BTreeMap<usize, u8> = BTreeMap::new();
            by_number.extend(round);
            let pods: Vec<_> = by_number.iter().map(|(n, kind)| match kind {
                0 => pod(*n, json!({})),
                _ => pod(*n, json!({"spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9001}]}]}})),
            }).collect();
            let steps = make(&s, &pods, &slices);
            apply(&mut slices, &steps);
            prop_assert!(make(&s, &pods, &slices).is_empty());
            let mut reversed = pods.clone();
            reversed.reverse();
            prop_assert!(make(&s, &reversed, &slices).is_empty());
            let mut seen = BTreeSet::new();
            for slice in &slices {
                let endpoints = slice.endpoints.as_ref().unwrap();
                prop_assert!(endpoints.len() <= MAX_ENDPOINTS);
                for endpoint in endpoints {
                    prop_assert!(seen.insert(endpoint.addresses[0].clone()));
                }
            }
            prop_assert_eq!(seen.len(), pods.len());
        }
    }
}

#[test]
fn near_endpoints_are_hinted_where_the_service_prefers_them() {
    let around = Surroundings {
        zones: [("n1".to_owned(), "z1".to_owned())].into(),
        ..Surroundings::default()
    };
    let hints = |preference: Value, pod: Arc<Pod>| {
        let service = service(json!({"spec": {"trafficDistribution": preference}}));
        let slice = only(plan(&service, &[pod], &around, &[]));
        serde_json::to_value(&slice.endpoints.unwrap()[0].hints).unwrap()
    };
    let zone = json!({"forZones": [{"name": "z1"}]});
    assert_eq!(hints(Value::Null, pod(1, json!({}))), Value::Null);
    assert_eq!(hints(json!("PreferClose"), pod(1, json!({}))), zone);
    assert_eq!(hints(json!("PreferSameZone"), pod(1, json!({}))), zone);
    let both = json!({"forNodes": [{"name": "n1"}], "forZones": [{"name": "z1"}]});
    assert_eq!(hints(json!("PreferSameNode"), pod(1, json!({}))), both);
    let elsewhere = pod(1, json!({"spec": {"nodeName": "n2"}}));
    assert_eq!(hints(json!("PreferSameZone"), elsewhere), Value::Null, "its zone is not known");
    let leaving = pod(1, json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
    assert_eq!(hints(json!("PreferSameNode"), leaving), Value::Null);
}

#[test]
fn weights_of_pods_are_written_on_their_slices_and_follow_them() {
    let weighted =
        |n, weight: &str| pod(n, json!({"metadata": {"annotations": {"mesh.dev/weight": weight}}}));
    let annotation = |slice: &EndpointSlice| {
        let annotations = slice.metadata.annotations.clone().unwrap_or_default();
        annotations.get("mesh.dev/weights").cloned()
    };
    let web = service(json!({}));
    let mut slices = vec![];
    let pods = [weighted(1, "25"), weighted(2, "1001"), weighted(3, "heavy"), pod(4, json!({}))];
    let steps = make(&web, &pods, &slices);
    apply(&mut slices, &steps);
    assert_eq!(annotation(&slices[0]).unwrap(), r#"{"10.244.0.2":25}"#);
    assert_eq!(make(&web, &pods, &slices), [], "nothing to do");
    let lighter = [weighted(1, "0"), pods[1].clone(), pods[2].clone(), pods[3].clone()];
    let changed = only(make(&web, &lighter, &slices));
    assert_eq!(annotation(&changed).unwrap(), r#"{"10.244.0.2":0}"#);
    let plain: Vec<Arc<Pod>> = (1..5).map(|n| pod(n, json!({}))).collect();
    assert_eq!(annotation(&only(make(&web, &plain, &slices))), None);
}
