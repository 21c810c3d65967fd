use http::Method;
use serde_json::{Value, json};

use super::support::*;
use super::watches::Events;

const ENDPOINTS: &str = "/api/v1/namespaces/default/endpoints";
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";

fn names(list: &Value) -> Vec<String> {
    let items = list["items"].as_array().cloned().unwrap_or_default();
    items.iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

fn by_hand(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": name},
        "subsets": [{"addresses": [{"ip": "192.0.2.7"}, {"ip": "192.0.2.8"}], "ports": [{"port": 5432}]}]})
}

fn service(name: &str) -> Value {
    json!({"metadata": {"name": name, "labels": {"team": name}},
        "spec": {"selector": {"app": name}, "ports": [{"port": 80, "targetPort": 8080}]}})
}

async fn rows(control: &Control, path: &str) -> Value {
    let table =
        send_accepting(&control.client, Method::GET, path, JSON, TABLE, Vec::new()).await.body;
    assert_eq!(table["kind"], "Table", "{table}");
    table["rows"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_are_written_as_any_object() {
    let control = Control::start().await;
    let created = control.create(ENDPOINTS, by_hand("db")).await;
    assert_eq!(created["subsets"][0]["ports"], json!([{"port": 5432, "protocol": "TCP"}]));
    let path = format!("{ENDPOINTS}/db");
    let shown = rows(&control, &path).await;
    assert_eq!(shown[0]["cells"][1], "192.0.2.7:5432,192.0.2.8:5432");

    let mut changed = created.clone();
    changed["subsets"][0]["addresses"] = json!([{"ip": "192.0.2.9"}]);
    assert_eq!(control.put(&path, &changed).await.code, 200);
    let patch = json!({"subsets": [{"addresses": [{"ip": "2001:db8::9"}]}]});
    for form in [STRATEGIC, MERGE] {
        let patched = control.patch(&path, form, patch.clone()).await;
        assert_eq!((patched.code, &patched.body["subsets"]), (200, &patch["subsets"]));
    }
    let forced = format!("{path}?fieldManager=x&force=true");
    assert_eq!(control.patch(&forced, APPLY, by_hand("db")).await.code, 200);

    let core = control.get("/api/v1").await.body;
    let resources = core["resources"].as_array().unwrap();
    let found = resources.iter().find(|resource| resource["name"] == "endpoints").unwrap();
    assert_eq!((&found["shortNames"], &found["kind"]), (&json!(["ep"]), &json!("Endpoints")));

    // A Service without a selector leads there.
    let mut open = service("db");
    open["spec"]["selector"] = Value::Null;
    control.create(SERVICES, open).await;
    let mirrored = format!("{SLICES}?labelSelector=kubernetes.io/service-name%3Ddb");
    let slices = until(&control, &mirrored, |list| names(&list.body).len() == 1).await;
    let owner = &slices["items"][0]["metadata"]["ownerReferences"][0];
    assert_eq!((&owner["kind"], &owner["name"]), (&json!("Endpoints"), &json!("db")));
    assert_eq!(control.delete(&path).await.code, 200);
    until(&control, &mirrored, |list| names(&list.body).is_empty()).await;
}

/// A pod of the Service of that name, with an address.
async fn serving(control: &Control, name: &str, ready: bool) {
    let ready = if ready { "True" } else { "False" };
    let status = json!({"status": {"phase": "Running", "podIP": "10.244.0.9",
        "podIPs": [{"ip": "10.244.0.9"}], "conditions": [{"type": "Ready", "status": ready}]}});
    let answer = control.patch(&format!("{PODS}/{name}/status"), MERGE, status).await;
    assert_eq!(answer.code, 200, "{}", answer.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endpoints_of_a_service_with_pods_are_read_and_not_written() {
    let control = Control::start().await;
    control.create(SERVICES, service("web")).await;
    control.create(PODS, pod("web", Some("n1"))).await;
    serving(&control, "web", true).await;
    let path = format!("{ENDPOINTS}/web");
    let made = until(&control, &path, |answer| !answer.body["subsets"].is_null()).await;
    let address = &made["subsets"][0]["addresses"][0];
    assert_eq!(
        (&address["ip"], &address["targetRef"]["name"]),
        (&json!("10.244.0.9"), &json!("web"))
    );
    assert_eq!(made["subsets"][0]["ports"], json!([{"port": 8080, "protocol": "TCP"}]));
    assert_eq!(rows(&control, &path).await[0]["cells"][1], "10.244.0.9:8080");
    serving(&control, "web", false).await;
    let gone = |answer: &Answer| answer.body["subsets"][0]["addresses"].is_null();
    let waiting = until(&control, &path, gone).await;
    assert_eq!(waiting["subsets"][0]["notReadyAddresses"][0]["ip"], "10.244.0.9");
    assert_eq!(waiting["metadata"]["uid"], made["metadata"]["uid"], "the same object");

    assert_eq!(control.post(ENDPOINTS, by_hand("web")).await.code, 409);
    let refused = [
        control.put(&path, &by_hand("web")).await,
        control.patch(&path, MERGE, json!({"metadata": {"labels": {"a": "b"}}})).await,
        control.patch(&format!("{path}?fieldManager=x"), APPLY, by_hand("web")).await,
        control.delete(&path).await,
    ];
    for answer in refused {
        let message = answer.body["message"].as_str().unwrap_or_default();
        assert!(answer.code == 403 && message.contains("selects"), "{message}");
    }
    control.delete(&format!("{SERVICES}/web")).await;
    assert_eq!(control.get(&path).await.code, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_have_what_is_made_and_what_is_written_in_one_order() {
    let control = Control::start().await;
    control.create(SERVICES, service("a")).await;
    control.create(ENDPOINTS, by_hand("b")).await;
    control.create(SERVICES, service("c")).await;
    let all = |list: &Answer| names(&list.body) == ["a", "b", "c"];
    until(&control, ENDPOINTS, all).await;
    assert!(all(&control.get("/api/v1/endpoints").await));
    let first = control.get(&format!("{ENDPOINTS}?limit=2")).await.body;
    assert_eq!(names(&first), ["a", "b"]);
    let token = first["metadata"]["continue"].as_str().unwrap();
    let rest = control.get(&format!("{ENDPOINTS}?limit=2&continue={token}")).await.body;
    assert_eq!(names(&rest), ["c"]);
    assert_eq!(rest["metadata"]["continue"], Value::Null);
    for (selector, wanted) in [
        ("labelSelector=team%3Da", ["a"]),
        ("labelSelector=!team", ["b"]),
        ("fieldSelector=metadata.name%3Dc", ["c"]),
    ] {
        let found = control.get(&format!("{ENDPOINTS}?{selector}")).await.body;
        assert_eq!(names(&found), wanted, "{selector}");
    }
    let nowhere = control.get("/api/v1/namespaces/kube-system/endpoints").await.body;
    assert_eq!(names(&nowhere), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_tells_of_both() {
    let control = Control::start().await;
    control.create(PODS, pod("web", Some("n1"))).await;
    let version = control.registry.revision();
    let path = format!("{ENDPOINTS}?watch=1&resourceVersion={version}");
    let mut events = Events::of(&control, &path, JSON).await;
    let only = format!("{ENDPOINTS}?watch=1&resourceVersion={version}&labelSelector=team%3Dweb");
    let mut only = Events::of(&control, &only, JSON).await;
    control.create(SERVICES, service("web")).await;
    let first = events.expect("ADDED", "web").await;
    assert_eq!(first["subsets"], Value::Null);
    only.expect("ADDED", "web").await;
    serving(&control, "web", true).await;
    let second = events.expect("MODIFIED", "web").await;
    assert_eq!(second["subsets"][0]["addresses"][0]["ip"], "10.244.0.9");
    control.create(ENDPOINTS, by_hand("db")).await;
    events.expect("ADDED", "db").await;
    control.patch(&format!("{ENDPOINTS}/db"), MERGE, json!({"subsets": null})).await;
    events.expect("MODIFIED", "db").await;
    serving(&control, "web", false).await;
    let third = events.expect("MODIFIED", "web").await;
    assert_eq!(third["subsets"][0]["notReadyAddresses"][0]["ip"], "10.244.0.9");
    control.delete(&format!("{ENDPOINTS}/db")).await;
    events.expect("DELETED", "db").await;
    control.delete(&format!("{SERVICES}/web")).await;
    events.expect("DELETED", "web").await;
    // Several changes may be one to who is slow.
    while only.next().await.unwrap()["type"] != "DELETED" {}

    // Who comes back from there hears the rest.
    let version = second["metadata"]["resourceVersion"].as_str().unwrap();
    let mut late =
        Events::of(&control, &format!("{ENDPOINTS}?watch=1&resourceVersion={version}"), JSON).await;
    let mut last = Vec::new();
    while last != ["db DELETED", "web DELETED"] {
        let event = late.next().await.unwrap();
        let name = event["object"]["metadata"]["name"].as_str().unwrap();
        last.retain(|seen: &String| !seen.starts_with(name));
        last.push(format!("{name} {}", event["type"].as_str().unwrap()));
        last.sort();
    }
    let everything = format!("{ENDPOINTS}?watch=1&resourceVersion=0");
    control.create(SERVICES, service("new")).await;
    until(&control, ENDPOINTS, |list| names(&list.body) == ["new"]).await;
    Events::of(&control, &everything, JSON).await.expect("ADDED", "new").await;
}
