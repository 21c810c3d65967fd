use http::Method;
use serde_json::{Value, json};

use super::support::*;

struct Case {
    path: &'static str,
    body: Value,
    code: u16,
    says: &'static str,
}

fn case(path: &'static str, body: Value, code: u16, says: &'static str) -> Case {
    Case { path, body, code, says }
}

const SERVICES: &str = "/api/v1/namespaces/default/services";

fn cases() -> Vec<Case> {
    let pod_with = |spec: Value| json!({"metadata": {"name": "p"}, "spec": spec});
    vec![
        case(MAPS, json!([]), 400, "one object"),
        case(MAPS, json!({"kind": "Secret"}), 400, "does not match the expected kind"),
        case(MAPS, json!({"apiVersion": "v2"}), 400, "does not match the expected API version"),
        case(MAPS, json!({"metadata": 7}), 400, "metadata"),
        case(MAPS, json!({"metadata": {"name": "a", "namespace": "other"}}), 400, "namespace"),
        case(MAPS, json!({}), 422, "metadata.name: Required value"),
        case(MAPS, json!({"metadata": {"name": "A_B"}}), 422, "RFC 1123"),
        case(
            MAPS,
            json!({"metadata": {"name": "a", "labels": {"a b": "c"}}}),
            422,
            "metadata.labels",
        ),
        case(MAPS, json!({"metadata": {"name": "a"}, "data": {"a b": ""}}), 422, "data[a b]"),
        case(
            "/api/v1/namespaces/default/endpoints",
            json!({"metadata": {"name": "a"}, "subsets": [{"addresses": [{"ip": "127.0.0.1"}]}]}),
            422,
            "subsets[0].addresses[0].ip",
        ),
        case(
            "/api/v1/namespaces/nowhere/pods",
            pod("p", None),
            404,
            "namespaces \"nowhere\" not found",
        ),
        case(
            "/apis/batch/v1/namespaces/default/frobs",
            json!({}),
            404,
            "served kinds: v1 Namespace",
        ),
        case(PODS, pod_with(json!({"containers": []})), 422, "spec.containers: Required value"),
        case(
            PODS,
            pod_with(json!({"containers": [{"name": "c"}]})),
            422,
            "spec.containers[0].image: Required value",
        ),
        case(
            PODS,
            pod_with(json!({"containers": "x"})),
            400,
            "spec.containers: invalid type: string",
        ),
        case(
            SERVICES,
            json!({"metadata": {"name": "s"}, "spec": {}}),
            422,
            "spec.ports: Required value",
        ),
        case(
            SERVICES,
            json!({"metadata": {"name": "s"}, "spec": {"clusterIP": "1.2.3.4", "ports": [{"port": 80}]}}),
            422,
            "spec.clusterIPs[0]: Invalid value: \"1.2.3.4\"",
        ),
        case(
            SERVICES,
            json!({"metadata": {"name": "s"}, "spec": {"clusterIP": "10.96.0.10", "ports": [{"port": 80}]}}),
            422,
            "already allocated",
        ),
        case(
            "/apis/networking.k8s.io/v1/namespaces/default/ingresses",
            json!({"metadata": {"name": "i"}, "spec": {"rules": [{"host": "*x"}]}}),
            422,
            "spec.rules[0].host",
        ),
        case(
            "/api/v1/nodes",
            json!({"metadata": {"name": "n"}, "spec": {"podCIDRs": ["x"]}}),
            422,
            "spec.podCIDRs[0]",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_objects_are_refused_by_field_and_nothing_is_stored() {
    let control = Control::start().await;
    let before = control.registry.revision();
    for Case { path, body, code, says } in cases() {
        let answer = control.post(path, body.clone()).await;
        let message = answer.body["message"].as_str().unwrap_or_default();
        assert_eq!(answer.code, code, "{path} {body}: {message}");
        assert_eq!((&answer.body["kind"], &answer.body["code"]), (&json!("Status"), &json!(code)));
        assert!(message.contains(says), "{path} {body}: {message}");
        if code == 422 {
            let cause = &answer.body["details"]["causes"][0];
            assert!(cause["field"].is_string() && cause["reason"].is_string(), "{}", answer.body);
        }
    }
    assert_eq!(control.registry.revision(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_are_not_what_they_say() {
    let control = Control::start().await;
    let post = |form: &'static str, body: &str| {
        send(&control.client, Method::POST, MAPS, form, body.as_bytes().to_vec())
    };
    assert_eq!(post(JSON, "{").await.code, 400);
    assert_eq!(post(JSON, "").await.code, 400);
    assert_eq!(
        post(JSON, "{\"metadata\": {\"name\": \"a\"}, \"data\": {\"k\": \"\\ud800\"}}").await.code,
        400
    );
    assert_eq!(post("application/yaml", "a: [").await.code, 400);
    assert_eq!(post("text/plain", "hello").await.code, 415);
    assert_eq!(post("application/vnd.kubernetes.protobuf", "nonsense").await.code, 400);
    assert_eq!(post("application/yaml", "metadata: {name: y}\ndata: {k: y}").await.code, 201);
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(post(JSON, &deep).await.code, 400);
    let large =
        format!("{{\"metadata\": {{\"name\": \"a\"}}, \"x\": \"{}\"}}", "x".repeat(3 << 20));
    let answer = post(JSON, &large).await;
    assert_eq!((answer.code, &answer.body["reason"]), (413, &json!("RequestEntityTooLarge")));
    let apply = "application/apply-patch+cbor";
    let refused =
        send(&control.client, Method::PATCH, &format!("{MAPS}/y"), apply, b"{}".to_vec()).await;
    assert_eq!(refused.code, 415);
    assert!(refused.body["message"].as_str().unwrap().contains("apply-patch+yaml"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_fields_warn_or_are_refused() {
    let control = Control::start().await;
    let mut object = deployment("web");
    object["spec"]["replicaz"] = json!(3);
    let strict =
        control.post(&format!("{DEPLOYMENTS}?fieldValidation=Strict"), object.clone()).await;
    assert_eq!(strict.code, 400);
    let message = strict.body["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("strict decoding error: unknown field \"spec.replicaz\""),
        "{message}"
    );
    let warned = control.post(DEPLOYMENTS, object).await;
    assert_eq!(warned.code, 201);
    assert_eq!(warned.headers["warning"], "299 - \"unknown field \\\"spec.replicaz\\\"\"");
    assert!(warned.body["spec"].get("replicaz").is_none());
    let patch = json!({"spec": {"frob": 1}});
    let path = format!("{DEPLOYMENTS}/web?fieldValidation=Strict");
    assert_eq!(control.patch(&path, MERGE, patch).await.code, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_not_change_does_not() {
    let control = Control::start().await;
    control.create(DEPLOYMENTS, deployment("web")).await;
    let patch = json!({"spec": {"selector": {"matchLabels": {"app": "x"}},
        "template": {"metadata": {"labels": {"app": "x"}}}}});
    let answer = control.patch(&format!("{DEPLOYMENTS}/web"), MERGE, patch).await;
    assert!(answer.body["message"].as_str().unwrap().contains("field is immutable"));
    control.create(PODS, pod("p", Some("n1"))).await;
    let patch = json!({"spec": {"nodeName": "n2"}});
    let answer = control.patch(&format!("{PODS}/p"), MERGE, patch).await;
    assert_eq!(answer.code, 422);
    assert!(answer.body["message"].as_str().unwrap().contains("pod updates may not change fields"));
    let binding = json!({"target": {"kind": "Node", "name": "n2"}});
    assert_eq!(control.post(&format!("{PODS}/p/binding"), binding).await.code, 409);
    let answer = control.delete("/api/v1/namespaces/default").await;
    assert_eq!((answer.code, &answer.body["reason"]), (403, &json!("Forbidden")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paths_methods_and_parameters_that_make_no_sense() {
    let control = Control::start().await;
    for (path, code) in [
        ("/", 200),
        ("/nowhere", 404),
        ("/api/v2/pods", 404),
        ("/api/v1/frobs", 404),
        ("/api/v1/pods/p", 404),
        ("/api/v1/namespaces/default/pods/p/exec", 404),
        ("/api/v1/pods?limit=-1", 400),
        ("/api/v1/pods?labelSelector=a%20b", 400),
        ("/api/v1/pods?fieldSelector=frob%3D1", 400),
        ("/api/v1/pods?watch=perhaps", 400),
        ("/api/v1/pods?resourceVersion=x", 400),
        ("/api/v1/pods?resourceVersion=99999999", 410),
        ("/api/v1/namespaces/default/pods/p/log", 404),
    ] {
        assert_eq!(control.get(path).await.code, code, "{path}");
    }
    assert_eq!(control.delete("/version/x").await.code, 404);
    assert_eq!(control.post(&format!("{MAPS}/a"), json!({})).await.code, 405);
    assert_eq!(control.put(MAPS, &json!({})).await.code, 405);
    let protobuf = "application/vnd.kubernetes.protobuf";
    let answer =
        send_accepting(&control.client, Method::GET, MAPS, JSON, protobuf, Vec::new()).await;
    assert_eq!(answer.code, 406);
}
