use std::time::{Duration, Instant};

use http::Method;
use serde_json::{Value, json};

use super::support::*;

const ENDPOINTS: &str = "/api/v1/namespaces/default/endpoints";
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
/// Nothing here takes so long unless it never comes.
const LIMIT: Duration = Duration::from_secs(20);

/// Waits for an answer of which `holds` is true.
async fn until(control: &Control, path: &str, holds: impl Fn(&Answer) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let answer = control.get(path).await;
        if holds(&answer) {
            return answer.body;
        }
        assert!(begun.elapsed() < LIMIT, "{path}: {}", answer.body);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

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
