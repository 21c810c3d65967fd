use std::time::{Duration, Instant};

use base64::Engine as _;
use http::Method;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use kube::Client;
use serde_json::{Value, json};

use super::access::{ca, join};
use super::support::*;

const ACCOUNTS: &str = "/api/v1/namespaces/default/serviceaccounts";
const REVIEWS: &str = "/apis/authentication.k8s.io/v1";
const LIMIT: Duration = Duration::from_secs(20);

/// A client that shows a token, as one in a pod does.
fn bearer(control: &Control, token: &str) -> Client {
    let mut config = kube::Config::new(format!("https://{}", control.address).parse().unwrap());
    config.root_cert = Some(vec![ca(control)]);
    config.auth_info.token = Some(token.to_owned().into());
    Client::try_from(config).unwrap()
}

async fn code(client: &Client, method: Method, path: &str, body: Value) -> u16 {
    send(client, method, path, JSON, body.to_string().into_bytes()).await.code
}

async fn read(client: &Client, path: &str) -> u16 {
    code(client, Method::GET, path, json!({})).await
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < LIMIT, "not seen: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn request(pod: Option<(&str, &Value)>) -> Value {
    let bound =
        pod.map(|(name, uid)| json!({"kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid}));
    json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": 600, "boundObjectRef": bound}})
}

fn token(answer: &Answer) -> String {
    assert_eq!(answer.code, 201, "{}", answer.body);
    answer.body["status"]["token"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_namespace_has_an_account_and_the_certificate_and_gets_them_back() {
    let control = Control::start().await;
    control.create("/api/v1/namespaces", json!({"metadata": {"name": "shop"}})).await;
    let account = || control.registry.get::<ServiceAccount>(Some("shop"), "default");
    let map = || control.registry.get::<ConfigMap>(Some("shop"), "kube-root-ca.crt");
    let pem = std::fs::read_to_string(control.dir.path().join("ca.crt")).unwrap();
    let right = || map().is_ok_and(|m| m.data.is_some_and(|d| d.get("ca.crt") == Some(&pem)));
    until("both", || account().is_ok() && right()).await;
    let uid = account().unwrap().metadata.uid;
    let maps = "/api/v1/namespaces/shop/configmaps/kube-root-ca.crt";
    control.delete("/api/v1/namespaces/shop/serviceaccounts/default").await;
    control.patch(maps, MERGE, json!({"data": {"ca.crt": "x"}})).await;
    until("both again", || account().is_ok_and(|a| a.metadata.uid != uid) && right()).await;
    control.delete(maps).await;
    until("the certificate again", right).await;
    control.delete("/api/v1/namespaces/shop").await;
    until("nothing of the namespace", || account().is_err() && map().is_err()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_runs_as_an_account_and_finds_its_token() {
    let control = Control::start().await;
    let made = control.create(PODS, pod("p", None)).await;
    assert_eq!(made["spec"]["serviceAccountName"], "default");
    let mount = &made["spec"]["containers"][0]["volumeMounts"][0];
    assert_eq!(mount["mountPath"], "/var/run/secrets/kubernetes.io/serviceaccount");
    assert_eq!(made["spec"]["volumes"][0]["name"], mount["name"]);
    let mut stranger = pod("q", None);
    stranger["spec"]["serviceAccountName"] = json!("nobody");
    let refused = control.post(PODS, stranger).await;
    assert_eq!(refused.code, 403, "{}", refused.body);
    assert!(
        refused.body["message"].as_str().unwrap().contains("serviceaccount \"nobody\" not found")
    );
    let bad = json!({"metadata": {"name": "x", "annotations": {"mesh.dev/role": "root"}}});
    assert_eq!(control.post(ACCOUNTS, bad).await.code, 422);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_makes_tokens_for_its_own_pods_and_they_end_with_the_pod() {
    let control = Control::start().await;
    let (own, other) = (join(&control, "n1", &[]).await, join(&control, "n2", &[]).await);
    let uid = control.create(PODS, pod("p", Some("n1"))).await["metadata"]["uid"].clone();
    let ask = async |client: &Client, account: &str, body: Value| {
        let path = format!("{ACCOUNTS}/{account}/token");
        send(client, Method::POST, &path, JSON, body.to_string().into_bytes()).await
    };
    let good = request(Some(("p", &uid)));
    assert_eq!(ask(&other.client, "default", good.clone()).await.code, 403, "another node");
    assert_eq!(ask(&own.client, "default", request(None)).await.code, 403, "no pod");
    assert_eq!(ask(&own.client, "default", request(Some(("p", &json!("x"))))).await.code, 409);
    control.create(ACCOUNTS, json!({"metadata": {"name": "strong"}})).await;
    assert_eq!(ask(&own.client, "strong", good.clone()).await.code, 422, "another account");
    let mut short = good.clone();
    short["spec"]["expirationSeconds"] = json!(60);
    assert_eq!(ask(&own.client, "default", short).await.code, 422);

    let answer = ask(&own.client, "default", good).await;
    let token = token(&answer);
    let claims = token.split('.').nth(1).unwrap();
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).unwrap();
    let claims: Value = serde_json::from_slice(&claims).unwrap();
    assert_eq!(claims["sub"], "system:serviceaccount:default:default");
    assert_eq!(claims["aud"], json!(["https://kubernetes.default.svc.cluster.local"]));
    assert_eq!(claims["kubernetes.io"]["pod"], json!({"name": "p", "uid": uid}));
    assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 600);

    let client = bearer(&control, &token);
    let path = format!("{REVIEWS}/selfsubjectreviews");
    let who = send(&client, Method::POST, &path, JSON, b"{}".to_vec()).await;
    assert_eq!(who.code, 201, "{}", who.body);
    let user = &who.body["status"]["userInfo"];
    assert_eq!(user["username"], "system:serviceaccount:default:default");
    assert!(user["groups"].to_string().contains("system:serviceaccounts:default"));
    assert_eq!(user["extra"]["authentication.kubernetes.io/pod-name"], json!(["p"]));

    let review =
        async |body: Value| control.post(&format!("{REVIEWS}/tokenreviews"), body).await.body;
    let found = review(json!({"spec": {"token": token}})).await;
    assert_eq!(found["status"]["authenticated"], true, "{found}");
    assert_eq!(found["spec"]["token"], "", "it is not given back");
    let elsewhere = review(json!({"spec": {"token": token, "audiences": ["vault"]}})).await;
    assert_eq!(elsewhere["status"]["authenticated"], false);
    assert_eq!(
        code(
            &client,
            Method::POST,
            &format!("{REVIEWS}/tokenreviews"),
            json!({"spec": {"token": ""}})
        )
        .await,
        403
    );

    control.delete(&format!("{PODS}/p?gracePeriodSeconds=0")).await;
    assert_eq!(read(&client, "/api").await, 401, "its pod is gone");
    control.create(PODS, pod("p", Some("n1"))).await;
    assert_eq!(read(&client, "/api").await, 401, "another pod of that name");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_account_may_do_what_its_role_says() {
    let control = Control::start().await;
    let issued = control.post(&format!("{ACCOUNTS}/default/token"), request(None)).await;
    let client = bearer(&control, &token(&issued));
    let (secrets, elsewhere) =
        ("/api/v1/namespaces/default/secrets", "/api/v1/namespaces/kube-system/pods");
    let found = async |path: &str| read(&client, path).await;
    let role = async |role: Value| {
        let body = json!({"metadata": {"annotations": {"mesh.dev/role": role}}});
        assert_eq!(control.patch(&format!("{ACCOUNTS}/default"), MERGE, body).await.code, 200);
    };
    assert_eq!((found("/api").await, found(PODS).await), (200, 403));
    role(json!("view")).await;
    assert_eq!((found(PODS).await, found(secrets).await, found(elsewhere).await), (200, 403, 403));
    assert_eq!(found("/apis/metrics.k8s.io/v1beta1/nodes").await, 403);
    assert_eq!(code(&client, Method::POST, MAPS, config_map("a", "1")).await, 403);
    role(json!("edit")).await;
    assert_eq!((found(secrets).await, found(elsewhere).await), (200, 403));
    assert_eq!(code(&client, Method::POST, MAPS, config_map("a", "1")).await, 201);
    let up = json!({"metadata": {"annotations": {"mesh.dev/role": "cluster-admin"}}});
    let path = format!("{ACCOUNTS}/default");
    let raised = send(&client, Method::PATCH, &path, MERGE, up.to_string().into_bytes()).await;
    assert_eq!(raised.code, 403, "nobody raises itself");
    let own = code(&client, Method::POST, &format!("{path}/token"), request(None)).await;
    assert_eq!(own, 403);
    role(json!("cluster-admin")).await;
    assert_eq!(found("/api/v1/secrets").await, 200);
    role(Value::Null).await;
    assert_eq!(found(PODS).await, 403, "at once");
    control.delete(&path).await;
    assert_eq!(found("/api").await, 401, "the account is gone");
    for junk in ["x", "a.b.c"] {
        assert_eq!(read(&bearer(&control, junk), "/api").await, 401);
    }
}

/// The service account `default`, which may read its namespace.
async fn viewer(control: &Control) -> Client {
    let issued = control.post(&format!("{ACCOUNTS}/default/token"), request(None)).await;
    let role = json!({"metadata": {"annotations": {"mesh.dev/role": "view"}}});
    assert_eq!(control.patch(&format!("{ACCOUNTS}/default"), MERGE, role).await.code, 200);
    bearer(control, &token(&issued))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_first_hears_what_a_request_would_meet() {
    let control = Control::start().await;
    let account = viewer(&control).await;
    let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let asked = async |client: &Client, spec: Value| {
        let body = json!({"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1", "spec": spec});
        send(client, Method::POST, path, JSON, body.to_string().into_bytes()).await
    };
    let may = async |client: &Client, verb: &str, group: &str, resource: &str, ns: &str| {
        let attributes =
            json!({"verb": verb, "group": group, "resource": resource, "namespace": ns});
        let answer = asked(client, json!({"resourceAttributes": attributes})).await;
        assert_eq!(answer.code, 201, "{}", answer.body);
        assert_eq!(answer.body["kind"], "SelfSubjectAccessReview");
        answer.body["status"]["allowed"].as_bool().unwrap()
    };
    for (verb, group, resource, ns) in [
        ("list", "", "pods", "default"),
        ("list", "", "pods", "kube-system"),
        ("list", "", "pods", ""),
        ("list", "", "secrets", "default"),
        ("list", "apps", "deployments", "default"),
        ("list", "", "nodes", ""),
        ("list", "metrics.k8s.io", "nodes", ""),
    ] {
        let group_path = match group {
            "" => "/api/v1".to_owned(),
            "metrics.k8s.io" => "/apis/metrics.k8s.io/v1beta1".to_owned(),
            group => format!("/apis/{group}/v1"),
        };
        let of = if ns.is_empty() { String::new() } else { format!("/namespaces/{ns}") };
        let met = read(&account, &format!("{group_path}{of}/{resource}")).await;
        let told = may(&account, verb, group, resource, ns).await;
        assert_eq!(told, met == 200, "{verb} {group}/{resource} in {ns:?}: {met}");
        assert!(may(&control.client, verb, group, resource, ns).await, "an administrator");
    }
    assert!(may(&control.client, "*", "*", "*", "").await);
    let refused = asked(&account, json!({})).await;
    assert_eq!(refused.code, 400, "{}", refused.body);
    let groups = control.get("/apis").await.body.to_string();
    assert!(groups.contains("authorization.k8s.io/v1"), "{groups}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_for_all_that_it_may_gets_a_list() {
    let control = Control::start().await;
    let account = viewer(&control).await;
    let asked = async |client: &Client, spec: Value| {
        let path = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews";
        let body = json!({"kind": "SelfSubjectRulesReview", "apiVersion": "authorization.k8s.io/v1", "spec": spec});
        send(client, Method::POST, path, JSON, body.to_string().into_bytes()).await
    };
    let answer = asked(&account, json!({"namespace": "default"})).await;
    assert_eq!((answer.code, &answer.body["status"]["incomplete"]), (201, &json!(false)));
    let rules = answer.body["status"]["resourceRules"].as_array().unwrap();
    let about = |resource: &str| {
        let has = |rule: &&Value| rule["resources"].as_array().unwrap().contains(&json!(resource));
        rules.iter().find(has).map(|rule| rule["verbs"].clone())
    };
    assert_eq!(about("pods"), Some(json!(["get", "list", "watch"])));
    assert_eq!(about("secrets"), None);
    let elsewhere = asked(&account, json!({"namespace": "kube-system"})).await.body;
    assert!(!elsewhere["status"]["resourceRules"].to_string().contains("pods"), "{elsewhere}");
    let everything = asked(&control.client, json!({"namespace": "default"})).await.body;
    assert_eq!(everything["status"]["resourceRules"][0]["verbs"], json!(["*"]));
    assert_eq!(asked(&account, json!({})).await.code, 400);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_administrator_who_acts_as_somebody_else_may_no_more_than_that_one() {
    let control = Control::start().await;
    let account = viewer(&control).await;
    control.create(MAPS, config_map("kept", "1")).await;
    let acting = async |client: &Client, user: &str, group: &str, method: Method, path: &str| {
        let mut request = http::Request::builder().method(method).uri(path);
        for (name, value) in [("impersonate-user", user), ("impersonate-group", group)] {
            if !value.is_empty() {
                request = request.header(name, value);
            }
        }
        let body = kube::client::Body::from(b"{}".to_vec());
        let request = request.header("content-type", JSON).body(body).unwrap();
        client.send(request).await.unwrap().status().as_u16()
    };
    let (me, map) = ("system:serviceaccount:default:default", format!("{MAPS}/kept"));
    for (user, group, method, path, code) in [
        (me, "", Method::GET, PODS, 200),
        (me, "", Method::GET, "/api/v1/nodes", 403),
        (me, "", Method::DELETE, map.as_str(), 403),
        ("system:serviceaccount:default:gone", "", Method::GET, PODS, 403),
        ("jo", "", Method::GET, PODS, 403),
        ("jo", "", Method::GET, "/apis", 200),
        ("", "system:masters", Method::GET, PODS, 400),
        ("jo", "system:masters", Method::GET, "/api/v1/nodes", 200),
    ] {
        let met = acting(&control.client, user, group, method, path).await;
        assert_eq!(met, code, "{user} of {group:?}: {path}");
    }
    let raised = acting(&account, "jo", "system:masters", Method::GET, "/api/v1/nodes").await;
    assert_eq!(raised, 403, "others act as themselves");
    assert_eq!(acting(&control.client, "", "", Method::DELETE, &map).await, 200);
}
