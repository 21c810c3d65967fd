use http::Method;
use serde_json::{Value, json};

use super::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_is_created_changed_in_every_way_and_deleted() {
    let control = Control::start().await;
    let created = control.create(MAPS, config_map("a", "1")).await;
    assert_eq!(created["metadata"]["namespace"], "default");
    let path = format!("{MAPS}/a");
    assert_eq!(control.get(&path).await.body, created);

    let mut changed = created.clone();
    changed["data"]["k"] = json!("2");
    let updated = control.put(&path, &changed).await;
    assert_eq!((updated.code, &updated.body["data"]["k"]), (200, &json!("2")));
    let stale = control.put(&path, &changed).await;
    assert_eq!((stale.code, &stale.body["reason"]), (409, &json!("Conflict")));

    let patch = json!({"data": {"k": null, "l": "3"}});
    let merged = control.patch(&path, MERGE, patch).await;
    assert_eq!(merged.body["data"], json!({"l": "3"}));
    let patch = json!([{"op": "add", "path": "/data/m", "value": "4"}]);
    let patched = control.patch(&path, JSON_PATCH, patch).await;
    assert_eq!(patched.body["data"], json!({"l": "3", "m": "4"}));
    let stale = json!({"metadata": {"resourceVersion": created["metadata"]["resourceVersion"]}});
    assert_eq!(control.patch(&path, MERGE, stale).await.code, 409);

    let deleted = control.delete(&path).await;
    assert_eq!((deleted.code, &deleted.body["status"]), (200, &json!("Success")));
    assert_eq!(control.get(&path).await.code, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strategic_patches_merge_containers_and_only_spec_changes_count() {
    let control = Control::start().await;
    let created = control.create(DEPLOYMENTS, deployment("web")).await;
    assert_eq!(created["metadata"]["generation"], 1);
    assert_eq!(created["spec"]["strategy"]["rollingUpdate"]["maxSurge"], "25%");
    let path = format!("{DEPLOYMENTS}/web");
    let patch = json!({"spec": {"template": {"spec": {"containers": [
        {"name": "side", "image": "s:1"}, {"name": "main", "image": "i:2"}],
        "$setElementOrder/containers": [{"name": "side"}, {"name": "main"}]}}}});
    let patched = control.patch(&path, STRATEGIC, patch).await.body;
    let containers = patched["spec"]["template"]["spec"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 2);
    assert_eq!((&containers[0]["name"], &containers[1]["image"]), (&json!("side"), &json!("i:2")));
    assert_eq!(patched["metadata"]["generation"], 2);
    let patch = json!({"metadata": {"labels": {"x": "y"}}});
    assert_eq!(control.patch(&path, STRATEGIC, patch).await.body["metadata"]["generation"], 2);
    let patch = json!({"status": {"replicas": 7}, "spec": {"replicas": 9}});
    let status = control.patch(&format!("{path}/status"), MERGE, patch).await.body;
    assert_eq!(
        (&status["status"]["replicas"], &status["spec"]["replicas"]),
        (&json!(7), &json!(0))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_number_of_replicas_is_an_object_of_its_own() {
    let control = Control::start().await;
    control.create(DEPLOYMENTS, deployment("web")).await;
    let path = format!("{DEPLOYMENTS}/web/scale");
    let mut scale = control.get(&path).await.body;
    assert_eq!(
        (&scale["kind"], &scale["status"]["selector"]),
        (&json!("Scale"), &json!("app=web"))
    );
    // The controller writes to the Deployment at the same time.
    scale["metadata"].as_object_mut().unwrap().remove("resourceVersion");
    scale["spec"]["replicas"] = json!(2);
    assert_eq!(control.put(&path, &scale).await.body["spec"]["replicas"], 2);
    let patched = control.patch(&path, MERGE, json!({"spec": {"replicas": 3}})).await;
    assert_eq!(patched.body["spec"]["replicas"], 3);
    let refused = control.patch(&path, MERGE, json!({"spec": {"replicas": -1}})).await;
    assert_eq!(refused.code, 422);
    assert_eq!(control.get(&format!("{DEPLOYMENTS}/web")).await.body["spec"]["replicas"], 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_come_in_pages_of_one_snapshot() {
    let control = Control::start().await;
    for i in 0..7 {
        control.create(MAPS, config_map(&format!("m{i}"), "1")).await;
    }
    let first = control.get(&format!("{MAPS}?limit=4")).await.body;
    // `kube-root-ca.crt` is the first of all.
    let token = first["metadata"]["continue"].as_str().unwrap().to_owned();
    assert_eq!(first["metadata"]["remainingItemCount"], 4);
    control.delete(&format!("{MAPS}/m5")).await;
    control.create(MAPS, config_map("m55", "late")).await;
    let rest = control.get(&format!("{MAPS}?limit=100&continue={token}")).await.body;
    let names: Vec<&Value> =
        rest["items"].as_array().unwrap().iter().map(|i| &i["metadata"]["name"]).collect();
    assert_eq!(names, ["m3", "m4", "m5", "m6"]);
    assert_eq!(rest["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
    control.registry.compact(control.registry.revision());
    let expired = control.get(&format!("{MAPS}?limit=100&continue={token}")).await;
    assert_eq!((expired.code, &expired.body["reason"]), (410, &json!("Expired")));
    assert_eq!(control.get(&format!("{MAPS}?continue=nonsense")).await.code, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn selectors_choose_what_is_listed_and_deleted() {
    let control = Control::start().await;
    for name in ["a", "b", "c"] {
        let mut map = config_map(name, "1");
        map["metadata"]["labels"] = json!({"app": name});
        control.create(MAPS, map).await;
    }
    let names = async |query: &str| {
        let list = control.get(&format!("{MAPS}?{query}")).await.body;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        items.iter().map(|i| i["metadata"]["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names("labelSelector=app%20in%20(a,b)").await, ["a", "b"]);
    assert_eq!(names("fieldSelector=metadata.name%3Dc").await, ["c"]);
    assert_eq!(names("labelSelector=app&limit=1").await, ["a"]);
    let deleted = control.delete(&format!("{MAPS}?labelSelector=app,app!%3Da")).await;
    assert_eq!((deleted.code, deleted.body["items"].as_array().unwrap().len()), (200, 2));
    assert_eq!(names("labelSelector=app").await, ["a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_get_tables_and_discovery_knows_every_kind() {
    let control = Control::start().await;
    let accept = |path: &'static str, accept: &'static str| {
        send_accepting(&control.client, Method::GET, path, JSON, accept, Vec::new())
    };
    let table = accept("/api/v1/namespaces", TABLE).await.body;
    assert_eq!(table["kind"], "Table");
    assert_eq!(table["rows"].as_array().unwrap().len(), 4);
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    let aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
    let found = accept("/apis", aggregated).await;
    assert_eq!(found.body["kind"], "APIGroupDiscoveryList");
    assert_eq!(found.headers["content-type"], aggregated);
    let index = control.get("/openapi/v3").await.body;
    for path in index["paths"].as_object().unwrap().keys() {
        let document = control.get(&format!("/openapi/v3/{path}")).await;
        assert_eq!((document.code, document.body["openapi"].is_string()), (200, true), "{path}");
    }
    for path in
        ["/api", "/apis", "/api/v1", "/apis/apps/v1", "/apis/apps", "/openapi/v2", "/version"]
    {
        assert_eq!(control.get(path).await.code, 200, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_tried_dry_is_checked_but_not_kept() {
    let control = Control::start().await;
    let before = control.registry.revision();
    let answer = control.post(&format!("{MAPS}?dryRun=All"), config_map("a", "1")).await;
    assert_eq!((answer.code, answer.body["metadata"]["uid"].is_string()), (201, true));
    assert_eq!(control.get(&format!("{MAPS}/a")).await.code, 404);
    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}});
    let services = "/api/v1/namespaces/default/services";
    let dry = control.post(&format!("{services}?dryRun=All"), service.clone()).await.body;
    assert_eq!(control.registry.revision(), before);
    let real = control.create(services, service).await;
    assert!(dry["spec"]["clusterIP"].is_string() && real["spec"]["clusterIP"].is_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_is_there_after_a_restart_and_revisions_go_on() {
    let control = Control::start().await;
    let created = control.create(MAPS, config_map("a", "1")).await;
    let service = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}});
    let services = "/api/v1/namespaces/default/services";
    let first = control.create(services, service.clone()).await;
    let before = control.registry.revision();
    let dir = control.stop().await;
    let control = Control::start_in(dir).await;
    assert_eq!(control.get(&format!("{MAPS}/a")).await.body, created);
    assert!(control.registry.revision() >= before);
    let mut second = service;
    second["metadata"]["name"] = json!("t");
    let second = control.create(services, second).await;
    assert_ne!(first["spec"]["clusterIP"], second["spec"]["clusterIP"]);
    let old = control
        .get(&format!("{MAPS}?watch=true&resourceVersion={}&timeoutSeconds=1", before - 1))
        .await;
    assert_eq!((&old.body["type"], &old.body["object"]["code"]), (&json!("ERROR"), &json!(410)));
}
