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

/// As agents report, which have not seen yet what others wrote a moment ago.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_of_an_agent_keeps_conditions_of_others() {
    let control = Control::start().await;
    let uid = control.create(PODS, pod("p", Some("n1"))).await["metadata"]["uid"].clone();
    let path = format!("{PODS}/p/status");
    let report = |reason: serde_json::Value, ip: &str| {
        json!({"metadata": {"uid": uid}, "status": {"reason": null,
            "podIPs": [{"$patch": "replace"}, {"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True", "reason": reason, "message": null}]}})
    };
    let first = report(json!("ContainersNotReady"), "10.244.0.2");
    assert_eq!(control.patch(&path, STRATEGIC, first).await.code, 200);
    let gate = json!({"status": {"conditions": [{"type": "example.org/gate", "status": "True"}]}});
    assert_eq!(control.patch(&path, STRATEGIC, gate).await.code, 200);
    let second = control.patch(&path, STRATEGIC, report(json!(null), "10.244.0.3")).await;
    assert_eq!(second.code, 200, "{}", second.body);
    let status = control.get(&format!("{PODS}/p")).await.body["status"].clone();
    assert_eq!(status["podIPs"], json!([{"ip": "10.244.0.3"}]));
    let expected = json!([{"type": "Ready", "status": "True"},
        {"type": "example.org/gate", "status": "True"}]);
    assert_eq!(status["conditions"], expected);
    let mut other = report(json!(null), "10.244.0.3");
    other["metadata"]["uid"] = json!("another");
    assert_eq!(control.patch(&path, STRATEGIC, other).await.code, 409);
}

fn debugger(name: &str) -> serde_json::Value {
    json!({"spec": {"ephemeralContainers": [{"name": name, "image": "i:2", "targetContainerName": "main"}]}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_can_be_looked_into() {
    let control = Control::start().await;
    let mut with = pod("p", None);
    with["spec"]["initContainers"] =
        json!([{"name": "proxy", "image": "i:1", "restartPolicy": "Always"}]);
    control.create(PODS, with).await;
    let mut look = debugger("debug-1");
    look["spec"]["ephemeralContainers"][0]["targetContainerName"] = json!("proxy");
    let added = control.patch(&format!("{PODS}/p/ephemeralcontainers"), STRATEGIC, look).await;
    assert_eq!(added.code, 200, "{}", added.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_are_added_to_a_pod_and_stay_as_they_are() {
    let control = Control::start().await;
    control.create(PODS, pod("p", None)).await;
    let path = format!("{PODS}/p/ephemeralcontainers");
    let added = control.patch(&path, STRATEGIC, debugger("debug-1")).await;
    assert_eq!(added.code, 200, "{}", added.body);
    let more = control.patch(&path, STRATEGIC, debugger("debug-2")).await;
    let all = more.body["spec"]["ephemeralContainers"].as_array().unwrap().clone();
    assert_eq!(all.len(), 2, "{}", more.body);
    let one = all.iter().find(|c| c["name"] == "debug-1").unwrap();
    assert_eq!(one["terminationMessagePath"], "/dev/termination-log", "defaults are filled in");
    assert_eq!(control.get(&path).await.body["spec"], more.body["spec"]);
    let mut changed = debugger("debug-1");
    changed["spec"]["ephemeralContainers"][0]["image"] = json!("i:3");
    assert_eq!(control.patch(&path, STRATEGIC, changed).await.code, 422);
    let mut without = more.body.clone();
    without["spec"]["ephemeralContainers"].as_array_mut().unwrap().remove(0);
    assert_eq!(control.put(&path, &without).await.code, 422);
    // Nothing else is written by this way, and they by no other.
    let mut elsewhere = more.body.clone();
    elsewhere["metadata"]["labels"]["app"] = json!("other");
    elsewhere["spec"]["containers"][0]["image"] = json!("i:9");
    let same = control.put(&path, &elsewhere).await;
    assert_eq!((same.code, &same.body["spec"]["containers"][0]["image"]), (200, &json!("i:1")));
    assert_eq!(same.body["metadata"]["labels"]["app"], "p");
    assert_eq!(control.patch(&format!("{PODS}/p"), STRATEGIC, debugger("debug-3")).await.code, 422);
    for (field, value) in [
        ("ports", json!([{"containerPort": 80}])),
        ("resources", json!({"limits": {"cpu": "1"}})),
        ("livenessProbe", json!({"exec": {"command": ["true"]}})),
        ("targetContainerName", json!("nobody")),
        ("name", json!("main")),
        ("image", json!("")),
    ] {
        let mut bad = debugger("debug-4");
        bad["spec"]["ephemeralContainers"][0][field] = value;
        let refused = control.patch(&path, STRATEGIC, bad).await;
        assert_eq!(refused.code, 422, "{field}: {}", refused.body);
    }
}

const BUDGETS: &str = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";

/// Creates a pod that runs and is ready or not.
async fn running(control: &Control, name: &str, ready: bool) {
    let mut made = pod(name, Some("n1"));
    made["metadata"]["labels"] = json!({"app": "web"});
    control.create(PODS, made).await;
    let ready = if ready { "True" } else { "False" };
    let status =
        json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]}});
    assert_eq!(control.patch(&format!("{PODS}/{name}/status"), MERGE, status).await.code, 200);
}

async fn until_budget(control: &Control, what: &str, holds: impl Fn(&serde_json::Value) -> bool) {
    let begun = std::time::Instant::now();
    loop {
        let status = control.get(&format!("{BUDGETS}/web")).await.body["status"].clone();
        if holds(&status) {
            return;
        }
        assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{what}: {status}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_holds_back_evictions_until_others_serve() {
    let control = Control::start().await;
    control.create("/api/v1/nodes", json!({"metadata": {"name": "n1"}})).await;
    for name in ["a", "b", "c"] {
        running(&control, name, true).await;
    }
    let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "web"},
        "spec": {"minAvailable": 2, "selector": {"matchLabels": {"app": "web"}}}});
    control.create(BUDGETS, budget).await;
    until_budget(&control, "one may go", |s| {
        s["disruptionsAllowed"] == 1 && s["currentHealthy"] == 3
    })
    .await;
    let evict =
        async |name: &str| control.post(&format!("{PODS}/{name}/eviction"), eviction(name)).await;
    let mut dry = eviction("a");
    dry["deleteOptions"] = json!({"dryRun": ["All"]});
    assert_eq!(control.post(&format!("{PODS}/a/eviction"), dry).await.code, 201);
    assert_eq!(evict("a").await.code, 201, "the dry run has used nothing up");
    let refused = evict("b").await;
    assert_eq!((refused.code, &refused.body["reason"]), (429, &json!("TooManyRequests")));
    let message = refused.body["message"].as_str().unwrap();
    assert_eq!(message, "Cannot evict pod as it would violate the pod's disruption budget.");
    let cause = refused.body["details"]["causes"][0]["message"].as_str().unwrap();
    assert!(cause.contains("web needs 2 healthy pods and has"), "{cause}");
    assert_eq!(
        control.get(&format!("{PODS}/b")).await.body["metadata"]["deletionTimestamp"],
        json!(null)
    );
    until_budget(&control, "two are left", |s| {
        s["currentHealthy"] == 2 && s["disruptionsAllowed"] == 0
    })
    .await;
    // A pod that does not serve is not missed while enough others do.
    running(&control, "broken", false).await;
    until_budget(&control, "it is expected", |s| s["expectedPods"] == 3).await;
    assert_eq!(evict("broken").await.code, 201);
    // A deletion asks nobody; it is what the controllers do.
    running(&control, "d", true).await;
    until_budget(&control, "one may go again", |s| s["disruptionsAllowed"] == 1).await;
    let looser = json!({"spec": {"minAvailable": 0}});
    control.patch(&format!("{BUDGETS}/web"), MERGE, looser).await;
    until_budget(&control, "all may go", |s| s["disruptionsAllowed"] == 3).await;
    let outcomes = futures_util::future::join_all(["b", "c", "d"].map(evict)).await;
    assert_eq!(outcomes.iter().map(|o| o.code).collect::<Vec<_>>(), [201, 201, 201]);
    let table =
        send_accepting(&control.client, http::Method::GET, BUDGETS, JSON, TABLE, vec![]).await;
    assert!(
        table.body["rows"][0]["cells"].to_string().starts_with("[\"web\",\"0\",\"N/A\""),
        "{}",
        table.body
    );
}
