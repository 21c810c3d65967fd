use serde_json::{Value, json};

use super::*;

fn endpoints(patch: Value) -> Endpoints {
    let mut value = json!({
        "metadata": {"namespace": "default", "name": "db", "uid": "ep", "labels": {"team": "x"}},
        "subsets": [{"addresses": [{"ip": "192.0.2.7"}],
            "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}]}],
    });
    json_patch::merge(&mut value, &patch);
    serde_json::from_value(value).unwrap()
}

fn subset(ips: &[&str], port: u16) -> Value {
    let addresses: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    json!({"addresses": addresses, "ports": [{"port": port, "protocol": "TCP"}]})
}

/// What is there when the steps are done, with names, and what was done.
fn done(
    endpoints: Option<&Endpoints>,
    mut slices: Vec<Arc<EndpointSlice>>,
) -> (Vec<Arc<EndpointSlice>>, Vec<String>) {
    let steps = plan(endpoints, &slices).steps;
    let text = steps.iter().map(ToString::to_string).collect();
    for (n, step) in steps.into_iter().enumerate() {
        match step {
            Step::Create(mut slice) => {
                slice.metadata.name = Some(format!("db-{}-{n}", slices.len()));
                slices.push(Arc::new(*slice));
            }
            Step::Update(slice) => {
                slices.retain(|s| s.metadata.name != slice.metadata.name);
                slices.push(Arc::new(*slice));
            }
            Step::Delete(name) => slices.retain(|s| objects::name(&s.metadata) != name),
        }
    }
    assert!(plan(endpoints, &slices).steps.is_empty(), "done is done");
    (slices, text)
}

#[test]
fn a_slice_says_what_the_object_says() {
    let about = json!({"ip": "192.0.2.8", "hostname": "b", "nodeName": "n1",
        "targetRef": {"kind": "Pod", "name": "p"}});
    let written = endpoints(json!({
        "metadata": {"annotations": {"a": "b",
            "kubectl.kubernetes.io/last-applied-configuration": "{}",
            "endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"}},
        "subsets": [{"addresses": [{"ip": "192.0.2.7"}], "notReadyAddresses": [about],
            "ports": [{"name": "sql", "port": 5432, "protocol": "TCP", "appProtocol": "x.dev/sql"}]}],
    }));
    let steps = plan(Some(&written), &[]).steps;
    let [Step::Create(slice)] = steps.as_slice() else { panic!("{steps:?}") };
    assert_eq!(
        serde_json::to_value(slice).unwrap(),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"generateName": "db-", "namespace": "default", "annotations": {"a": "b"},
                "labels": {"team": "x", "kubernetes.io/service-name": "db",
                    "endpointslice.kubernetes.io/managed-by": "endpointslicemirroring-controller.k8s.io"},
                "ownerReferences": [{"apiVersion": "v1", "kind": "Endpoints", "name": "db", "uid": "ep",
                    "controller": true, "blockOwnerDeletion": true}]},
            "ports": [{"name": "sql", "port": 5432, "protocol": "TCP", "appProtocol": "x.dev/sql"}],
            "endpoints": [
                {"addresses": ["192.0.2.7"],
                    "conditions": {"ready": true, "serving": true, "terminating": false}},
                {"addresses": ["192.0.2.8"], "hostname": "b", "nodeName": "n1",
                    "targetRef": {"kind": "Pod", "name": "p"},
                    "conditions": {"ready": false, "serving": false, "terminating": false}}],
        })
    );
}

#[test]
fn there_is_one_slice_for_each_family_and_set_of_ports() {
    let written = endpoints(json!({"subsets": [
        subset(&["192.0.2.7", "2001:db8::7"], 80),
        subset(&["192.0.2.8"], 81),
        subset(&["192.0.2.9", "::ffff:192.0.2.10"], 80),
    ]}));
    let (slices, steps) = done(Some(&written), vec![]);
    assert_eq!(
        steps,
        [
            "create IPv4 slice with 3 endpoints",
            "create IPv4 slice with 1 endpoints",
            "create IPv6 slice with 1 endpoints",
        ]
    );
    // What does not change is not written.
    let written = endpoints(json!({"subsets": [
        subset(&["192.0.2.7", "192.0.2.9", "192.0.2.10"], 80),
        subset(&["192.0.2.8", "192.0.2.11"], 81),
    ]}));
    let (slices, steps) = done(Some(&written), slices);
    assert_eq!(steps, ["update slice db-1-1 to 2 endpoints", "delete slice db-2-2"]);
    // Addresses are never in no slice at all while their ports change.
    let written = endpoints(json!({"subsets": [subset(&["192.0.2.7"], 82)]}));
    let (slices, steps) = done(Some(&written), slices);
    assert!(steps[0].starts_with("create") && steps.len() == 3, "{steps:?}");
    let (slices, _) = done(None, slices);
    assert!(slices.is_empty());
}

#[test]
fn slices_of_one_group_become_one() {
    let written = endpoints(json!({}));
    let (mut slices, _) = done(Some(&written), vec![]);
    let mut second = (*slices[0]).clone();
    second.metadata.name = Some("db-second".to_owned());
    slices.push(Arc::new(second));
    let (_, steps) = done(Some(&written), slices);
    assert_eq!(steps, ["delete slice db-second"]);
}

#[test]
fn an_address_in_both_lists_is_not_ready() {
    let both =
        json!({"addresses": [{"ip": "192.0.2.7"}], "notReadyAddresses": [{"ip": "192.0.2.7"}]});
    let other = subset(&["192.0.2.7"], 81);
    let (slices, _) = done(Some(&endpoints(json!({"subsets": [both, other]}))), vec![]);
    let ready = |slice: &EndpointSlice| {
        let conditions = slice.endpoints.iter().flatten().filter_map(|e| e.conditions.clone());
        conditions.filter_map(|c| c.ready).collect::<Vec<_>>()
    };
    let found: Vec<_> = slices.iter().map(|s| ready(s)).collect();
    assert_eq!(found, [[false], [true]], "by set of ports");
}

#[test]
fn a_slice_takes_a_thousand_and_the_ready_ones_first() {
    let ips = |from: usize, to: usize| -> Vec<_> {
        (from..to).map(|n| json!({"ip": format!("10.0.{}.{}", n / 250, n % 250 + 1)})).collect()
    };
    let many = json!({"notReadyAddresses": ips(0, 10), "addresses": ips(10, 1005)});
    let written = endpoints(json!({"subsets": [many, subset(&["192.0.2.1"], 9)]}));
    let made = plan(Some(&written), &[]);
    assert_eq!(made.skipped, 5);
    let [Step::Create(large), Step::Create(_)] = made.steps.as_slice() else { panic!() };
    let all = large.endpoints.as_ref().unwrap();
    let ready = all.iter().filter(|e| e.conditions.as_ref().unwrap().ready == Some(true)).count();
    assert_eq!((all.len(), ready), (1000, 995));
}

#[test]
fn elections_and_what_is_marked_lead_nowhere() {
    assert!(is_meant(&endpoints(json!({}))));
    let skip = |value: &str| json!({"metadata": {"labels": {LABEL_SKIP_MIRROR: value}}});
    assert!(!is_meant(&endpoints(skip("true"))) && is_meant(&endpoints(skip("false"))));
    let leader = json!({"metadata": {"annotations": {ANNOTATION_LEADER: "{}"}}});
    assert!(!is_meant(&endpoints(leader)));
    let going = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    assert!(!is_meant(&endpoints(going)));
    let service = |spec: Value| -> Service {
        serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap()
    };
    assert!(is_open(&service(json!({}))) && is_open(&service(json!({"selector": {}}))));
    assert!(!is_open(&service(json!({"selector": {"app": "db"}}))));
}
