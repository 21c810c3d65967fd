use std::time::{Duration, Instant};

use http::Method;
use serde_json::{Value, json};

use super::support::*;

const DAEMONS: &str = "/apis/apps/v1/namespaces/default/daemonsets";
const NAMED: &str = "/apis/apps/v1/namespaces/default/statefulsets";
const REVISIONS: &str = "/apis/apps/v1/namespaces/default/controllerrevisions";
const BUDGETS: &str = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
/// Nothing here takes so long unless it never comes.
const LIMIT: Duration = Duration::from_secs(20);

/// Waits for an answer of which `holds` is true.
async fn until(control: &Control, path: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let begun = Instant::now();
    loop {
        let answer = control.get(path).await;
        if holds(&answer.body) {
            return answer.body;
        }
        assert!(begun.elapsed() < LIMIT, "{path}: {}", answer.body);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn set(kind: &str, name: &str, spec: Value) -> Value {
    let mut set = json!({"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "i:1"}]}}}});
    json_patch::merge(&mut set["spec"], &spec);
    set
}

fn image(image: &str) -> Value {
    json!({"spec": {"template": {"spec": {"containers": [{"name": "main", "image": image}]}}}})
}

fn numbers(revisions: &Value) -> Vec<i64> {
    let items = revisions["items"].as_array().into_iter().flatten();
    let mut numbers: Vec<i64> = items.map(|r| r["revision"].as_i64().unwrap()).collect();
    numbers.sort_unstable();
    numbers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sets_are_served_like_those_that_were_there() {
    let control = Control::start().await;
    let served = control.get("/apis/apps/v1").await.body;
    let resource = |name: &str| {
        let all = served["resources"].as_array().unwrap();
        all.iter().find(|resource| resource["name"] == name).cloned().unwrap_or_default()
    };
    for (name, short) in [("daemonsets", "ds"), ("statefulsets", "sts")] {
        assert_eq!(resource(name)["shortNames"], json!([short]));
        assert_eq!(resource(name)["categories"], json!(["all"]));
        assert_eq!(resource(&format!("{name}/status"))["namespaced"], json!(true));
    }
    assert_eq!(resource("statefulsets/scale")["kind"], "Scale");
    assert_eq!(resource("daemonsets/scale"), Value::Null);
    assert_eq!(resource("controllerrevisions")["kind"], "ControllerRevision");

    let made = control.create(DAEMONS, set("DaemonSet", "logs", json!({}))).await;
    let strategy =
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}});
    assert_eq!(made["spec"]["updateStrategy"], strategy);
    assert_eq!(made["metadata"]["generation"], 1);
    let named = set("StatefulSet", "db", json!({"replicas": 0, "serviceName": "db"}));
    let made = control.create(NAMED, named).await;
    assert_eq!(made["spec"]["podManagementPolicy"], "OrderedReady");
    let scale = format!("{NAMED}/db/scale");
    let answer = control.patch(&scale, MERGE, json!({"spec": {"replicas": 3}})).await;
    assert_eq!((answer.code, &answer.body["spec"]["replicas"]), (200, &json!(3)));
    assert_eq!(answer.body["status"]["selector"], "app=db");
    until(&control, &format!("{NAMED}/db"), |set| {
        set["status"]["observedGeneration"] == 2 && set["status"]["replicas"] == 1
    })
    .await;
    let pod = until(&control, &format!("{PODS}/db-0"), |pod| pod["kind"] == "Pod").await;
    assert_eq!(pod["metadata"]["labels"]["statefulset.kubernetes.io/pod-name"], "db-0");
    assert_eq!(pod["spec"]["subdomain"], "db");

    for (path, columns, first) in [
        (
            DAEMONS,
            "Name,Desired,Current,Ready,Up-to-date,Available,Node Selector,Age,Containers,Images,Selector",
            "[\"logs\",0,0,0,0,0,\"<none>\"",
        ),
        (NAMED, "Name,Ready,Age,Containers,Images", "[\"db\",\"0/3\""),
        (REVISIONS, "Name,Controller,Revision,Age", "[\"db-"),
    ] {
        let table =
            send_accepting(&control.client, Method::GET, path, JSON, TABLE, vec![]).await.body;
        let names = table["columnDefinitions"].as_array().unwrap().iter();
        let names: Vec<&str> = names.map(|column| column["name"].as_str().unwrap()).collect();
        assert_eq!(names.join(","), columns);
        let cells = table["rows"][0]["cells"].to_string();
        assert!(cells.starts_with(first), "{cells}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollout_is_undone_by_the_patch_that_its_revision_is() {
    let control = Control::start().await;
    for (kind, path) in [("DaemonSet", DAEMONS), ("StatefulSet", NAMED)] {
        let name = kind.to_lowercase();
        control.create(path, set(kind, &name, json!({}))).await;
        let mine = format!("{REVISIONS}?labelSelector=app%3D{name}");
        let first = until(&control, &mine, |list| numbers(list) == [1]).await;
        let one = format!("{path}/{name}");
        assert_eq!(control.patch(&one, STRATEGIC, image("i:2")).await.code, 200);
        until(&control, &mine, |list| numbers(list) == [1, 2]).await;
        let restart = json!({"spec": {"template": {"metadata": {"annotations": {
            "kubectl.kubernetes.io/restartedAt": "2026-01-01T00:00:00Z"}}}}});
        assert_eq!(control.patch(&one, STRATEGIC, restart).await.code, 200);
        until(&control, &mine, |list| numbers(list) == [1, 2, 3]).await;
        let back = first["items"][0]["data"].clone();
        let undone = control.patch(&one, STRATEGIC, back).await;
        let template = &undone.body["spec"]["template"];
        assert_eq!(
            (undone.code, &template["spec"]["containers"][0]["image"]),
            (200, &json!("i:1"))
        );
        assert_eq!(template["metadata"]["annotations"], Value::Null, "all of it");
        until(&control, &mine, |list| numbers(list) == [2, 3, 4]).await;
        control.delete(&one).await;
        until(&control, &mine, |list| numbers(list).is_empty()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_served_of_sets_is_refused_by_name() {
    let control = Control::start().await;
    let claims = json!([{"metadata": {"name": "data"}, "spec": {
        "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}]);
    let volumes = json!({"template": {"spec": {"volumes": [
        {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]}}});
    for (path, kind, spec, says) in [
        (
            NAMED,
            "StatefulSet",
            json!({"volumeClaimTemplates": claims}),
            "spec.volumeClaimTemplates: Forbidden",
        ),
        (
            NAMED,
            "StatefulSet",
            json!({"persistentVolumeClaimRetentionPolicy": {"whenScaled": "Keep"}}),
            "spec.persistentVolumeClaimRetentionPolicy.whenScaled: Unsupported",
        ),
        (NAMED, "StatefulSet", volumes.clone(), "spec.template.spec.volumes[0]"),
        (DAEMONS, "DaemonSet", volumes, "spec.template.spec.volumes[0]"),
        (
            DAEMONS,
            "DaemonSet",
            json!({"template": {"spec": {"restartPolicy": "Never"}}}),
            "spec.template.spec.restartPolicy: Unsupported value",
        ),
    ] {
        let refused = control.post(path, set(kind, "x", spec)).await;
        let message = refused.body["message"].as_str().unwrap_or_default();
        assert!(refused.code == 422 && message.contains(says), "{} {message}", refused.code);
    }
    let dotted = control.post(NAMED, set("StatefulSet", "a.b", json!({}))).await;
    assert_eq!(dotted.code, 422, "{}", dotted.body);
    control.create(DAEMONS, set("DaemonSet", "logs", json!({}))).await;
    let scale = control.patch(&format!("{DAEMONS}/logs/scale"), MERGE, json!({})).await;
    assert_eq!(scale.code, 404, "{}", scale.body);
    let other = json!({"spec": {"selector": {"matchLabels": {"more": "x"}}}});
    let moved = control.patch(&format!("{DAEMONS}/logs"), MERGE, other).await;
    assert_eq!(moved.code, 422, "{}", moved.body);
    let list = until(&control, REVISIONS, |list| numbers(list) == [1]).await;
    let name = list["items"][0]["metadata"]["name"].as_str().unwrap();
    let edited =
        control.patch(&format!("{REVISIONS}/{name}"), MERGE, json!({"data": {"x": 1}})).await;
    assert_eq!(edited.code, 422, "{}", edited.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn budgets_know_how_many_pods_a_set_wants() {
    let control = Control::start().await;
    control.create("/api/v1/nodes", json!({"metadata": {"name": "n1"}})).await;
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    assert_eq!(control.patch("/api/v1/nodes/n1/status", MERGE, ready).await.code, 200);
    for (path, kind, name, spec, expected) in [
        (DAEMONS, "DaemonSet", "logs", json!({}), 1),
        (NAMED, "StatefulSet", "db", json!({"replicas": 3}), 3),
    ] {
        control.create(path, set(kind, name, spec)).await;
        let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": name},
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"app": name}}}});
        control.create(BUDGETS, budget).await;
        until(&control, &format!("{BUDGETS}/{name}"), |budget| {
            budget["status"]["expectedPods"] == expected
        })
        .await;
    }
    let scale = json!({"spec": {"replicas": 5}});
    control.patch(&format!("{NAMED}/db/scale"), MERGE, scale).await;
    until(&control, &format!("{BUDGETS}/db"), |budget| budget["status"]["expectedPods"] == 5).await;
}
