use serde_json::json;

use super::support::*;

fn eviction(name: &str) -> serde_json::Value {
    json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evicted_pod_says_why_and_is_given_its_time() {
    let control = Control::start().await;
    control.create("/api/v1/nodes", json!({"metadata": {"name": "n1"}})).await;
    let path = format!("{PODS}/p/eviction");
    assert_eq!(control.post(&path, eviction("p")).await.code, 404);
    let uid = control.create(PODS, pod("p", Some("n1"))).await["metadata"]["uid"].clone();

    let other = control.post(&path, eviction("q")).await;
    assert_eq!((other.code, &other.body["reason"]), (400, &json!("BadRequest")));
    let mut wrong = eviction("p");
    wrong["deleteOptions"] = json!({"preconditions": {"uid": "another"}});
    assert_eq!(control.post(&path, wrong).await.code, 409);
    let mut dry = eviction("p");
    dry["deleteOptions"] = json!({"dryRun": ["All"]});
    assert_eq!(control.post(&path, dry).await.code, 201);
    let untouched = control.get(&format!("{PODS}/p")).await.body;
    assert_eq!(untouched["metadata"]["deletionTimestamp"], json!(null));
    assert_eq!(untouched["status"]["conditions"], json!(null));

    let mut short = eviction("p");
    short["deleteOptions"] =
        json!({"gracePeriodSeconds": 7, "preconditions": {"uid": uid}, "kind": "DeleteOptions"});
    let evicted = control.post(&path, short).await;
    assert_eq!((evicted.code, &evicted.body["status"]), (201, &json!("Success")));
    let going = control.get(&format!("{PODS}/p")).await.body;
    assert_eq!(going["metadata"]["deletionGracePeriodSeconds"], 7);
    let condition = &going["status"]["conditions"][0];
    assert_eq!(
        (&condition["type"], &condition["reason"]),
        (&json!("DisruptionTarget"), &json!("EvictionByEvictionAPI"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_find_out_that_pods_can_be_evicted() {
    let control = Control::start().await;
    let core = control.get("/api/v1").await.body;
    let all = core["resources"].as_array().unwrap();
    let found = all.iter().find(|r| r["name"] == "pods/eviction").unwrap();
    assert_eq!(
        (&found["kind"], &found["group"], &found["version"]),
        (&json!("Eviction"), &json!("policy"), &json!("v1"))
    );
}
