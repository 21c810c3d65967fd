use std::fs;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use http::Method;
use kube::Client;
use mesh_model::join::{JoinResponse, JoinToken};
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::support::*;

pub(crate) struct Member {
    pub(crate) client: Client,
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
}

pub(crate) fn ca(control: &Control) -> Vec<u8> {
    let pem = fs::read(control.dir.path().join("ca.crt")).unwrap();
    CertificateDer::from_pem_slice(&pem).unwrap().to_vec()
}

fn token(control: &Control) -> JoinToken {
    fs::read_to_string(control.dir.path().join("join-token")).unwrap().parse().unwrap()
}

/// A client of the service that shows no certificate.
pub(crate) fn stranger(control: &Control) -> Client {
    let mut config = kube::Config::new(format!("https://{}", control.address).parse().unwrap());
    config.root_cert = Some(vec![ca(control)]);
    Client::try_from(config).unwrap()
}

fn request(control: &Control, node: &str, key: &KeyPair, addresses: &[IpAddr]) -> Value {
    let csr = CertificateParams::default().serialize_request(key).unwrap().pem().unwrap();
    json!({"secret": token(control).secret, "node": node, "csrPem": csr, "addresses": addresses})
}

async fn ask(client: &Client, body: &Value) -> Answer {
    send(client, Method::POST, "/mesh/v1/join", JSON, body.to_string().into_bytes()).await
}

/// Joins as a node.
pub(crate) async fn join(control: &Control, node: &str, addresses: &[IpAddr]) -> Member {
    let key = KeyPair::generate().unwrap();
    let answer = ask(&stranger(control), &request(control, node, &key, addresses)).await;
    assert_eq!(answer.code, 200, "{}", answer.body);
    let response: JoinResponse = serde_json::from_value(answer.body).unwrap();
    member(control, response.certificate_pem, &key)
}

/// A client that shows that certificate.
pub(crate) fn member(control: &Control, certificate_pem: String, key: &KeyPair) -> Member {
    let dir = tempfile::tempdir().unwrap();
    let (cert_path, key_path) = (dir.path().join("crt"), dir.path().join("key"));
    fs::write(&cert_path, &certificate_pem).unwrap();
    fs::write(&key_path, key.serialize_pem()).unwrap();
    let mut config = kube::Config::new(format!("https://{}", control.address).parse().unwrap());
    config.root_cert = Some(vec![ca(control)]);
    config.auth_info.client_certificate = Some(cert_path.display().to_string());
    config.auth_info.client_key = Some(key_path.display().to_string());
    let client = Client::try_from(config).unwrap();
    Member { client, certificate_pem, key_pem: key.serialize_pem() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_learn_the_version_and_nothing_else() {
    let control = Control::start().await;
    let stranger = stranger(&control);
    for (path, code) in [
        ("/version", 200),
        ("/healthz", 200),
        ("/readyz", 200),
        ("/livez", 200),
        ("/api", 401),
        ("/api/v1/secrets", 401),
        ("/openapi/v3", 401),
        ("/nowhere", 401),
    ] {
        let answer = send(&stranger, Method::GET, path, JSON, Vec::new()).await;
        assert_eq!(answer.code, code, "{path}");
        if code == 401 {
            assert_eq!(answer.body["reason"], "Unauthorized");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_token_pins_the_ca_and_a_wrong_one_lets_nobody_in() {
    let control = Control::start().await;
    assert_eq!(token(&control).ca_sha256, hex::encode(Sha256::digest(ca(&control))));
    let stranger = stranger(&control);
    let good = request(&control, "n1", &KeyPair::generate().unwrap(), &[]);
    for (field, value, code) in [
        ("secret", json!("0".repeat(32)), 401),
        ("secret", json!(""), 401),
        ("csrPem", json!("nonsense"), 400),
        ("node", json!("Not A Name"), 400),
        ("addresses", json!(["x"]), 400),
        ("frob", json!(1), 400),
    ] {
        let mut bad = good.clone();
        bad[field] = value;
        let answer = ask(&stranger, &bad).await;
        assert_eq!((answer.code, &answer.body["kind"]), (code, &json!("Status")), "{field}");
    }
    let get = send(&stranger, Method::GET, "/mesh/v1/join", JSON, Vec::new()).await;
    assert_eq!(get.code, 405);
    let answer = ask(&stranger, &good).await;
    assert_eq!(answer.body["cluster"]["overlayPort"], 51_900);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_writes_what_is_its_own() {
    let control = Control::start().await;
    let member = join(&control, "n1", &[]).await;
    let ask = async |method: Method, path: &str, form: &str, body: Value| {
        send(&member.client, method, path, form, body.to_string().into_bytes()).await.code
    };
    let node = |name: &str| json!({"metadata": {"name": name}, "status": {"phase": "x"}});
    assert_eq!(ask(Method::POST, "/api/v1/nodes", JSON, node("n1")).await, 201);
    assert_eq!(ask(Method::POST, "/api/v1/nodes", JSON, node("n2")).await, 403);
    assert_eq!(
        ask(Method::PATCH, "/api/v1/nodes/n1/status", MERGE, json!({"status": {}})).await,
        200
    );
    assert_eq!(ask(Method::DELETE, "/api/v1/nodes/n1", JSON, json!({})).await, 403);
    let lease = json!({"metadata": {"name": "n1"}, "spec": {"holderIdentity": "n1"}});
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    assert_eq!(ask(Method::POST, leases, JSON, lease).await, 201);
    assert_eq!(ask(Method::PATCH, &format!("{leases}/n2"), MERGE, json!({})).await, 403);
    assert_eq!(
        ask(Method::GET, "/api/v1/services?watch=1&timeoutSeconds=1", JSON, json!({})).await,
        200
    );
    assert_eq!(ask(Method::POST, MAPS, JSON, config_map("a", "1")).await, 403);
    assert_eq!(ask(Method::GET, "/api/v1/nodes/n1/proxy/healthz", JSON, json!({})).await, 403);
    control.create(PODS, pod("mine", Some("n1"))).await;
    control.create(PODS, pod("other", Some("n2"))).await;
    let status = json!({"status": {"phase": "Running"}});
    for (pod, code) in [("mine", 200), ("other", 403)] {
        let path = format!("{PODS}/{pod}/status");
        assert_eq!(ask(Method::PATCH, &path, MERGE, status.clone()).await, code, "{pod}");
    }
    assert_eq!(ask(Method::PATCH, &format!("{PODS}/mine"), MERGE, json!({})).await, 403);
    let now = json!({"gracePeriodSeconds": 0});
    assert_eq!(ask(Method::DELETE, &format!("{PODS}/mine"), JSON, json!({})).await, 403);
    assert_eq!(ask(Method::DELETE, &format!("{PODS}/other"), JSON, now.clone()).await, 403);
    assert_eq!(ask(Method::DELETE, &format!("{PODS}/mine"), JSON, now).await, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_assigned_its_blocks_and_takes_none() {
    let control = Control::start().await;
    let member = join(&control, "n1", &[]).await;
    let ask = async |method: Method, path: &str, form: &str, body: Value| {
        send(&member.client, method, path, form, body.to_string().into_bytes()).await
    };
    let (all, own) = ("/api/v1/nodes", "/api/v1/nodes/n1");
    let node = |spec: Value| json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": spec});
    let applied = format!("{own}?fieldManager=x&force=true");
    let other = "10.244.7.0/24";
    let claims = [
        json!({"podCIDRs": [other]}),
        json!({"podCIDR": other}),
        json!({"podCIDRs": [other], "podCIDR": other}),
    ];
    let refused = |answer: Answer, what: &str| {
        let message = answer.body["message"].as_str().unwrap_or_default();
        assert!(answer.code == 403 && message.contains("podCIDR"), "{what}: {message}");
    };
    for claim in &claims {
        refused(ask(Method::POST, all, JSON, node(claim.clone())).await, "create");
        refused(ask(Method::PATCH, &applied, APPLY, node(claim.clone())).await, "first apply");
    }
    assert_eq!(ask(Method::POST, all, JSON, node(json!({}))).await.code, 201);
    // The service also writes taints.
    let blocks = |node: Answer| json!({"podCIDR": node.body["spec"]["podCIDR"], "podCIDRs": node.body["spec"]["podCIDRs"]});
    let assigned = |count: usize| {
        let control = &control;
        async move {
            let end = Instant::now() + Duration::from_secs(20);
            loop {
                let spec = blocks(control.get(own).await);
                if spec["podCIDRs"].as_array().is_some_and(|blocks| blocks.len() == count) {
                    return spec;
                }
                assert!(Instant::now() < end, "{spec}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    let before = assigned(2).await;
    let mut more = before.clone();
    more["podCIDRs"].as_array_mut().unwrap().push(json!(other));
    let mut first = before.clone();
    first["podCIDR"] = json!(other);
    for claim in claims.iter().chain([&more, &first]) {
        let what = claim.to_string();
        refused(ask(Method::PUT, own, JSON, node(claim.clone())).await, &what);
        refused(ask(Method::PATCH, own, MERGE, json!({"spec": claim})).await, &what);
        refused(ask(Method::PATCH, &applied, APPLY, node(claim.clone())).await, &what);
    }
    let status = json!({"spec": more, "status": {}});
    assert_eq!(ask(Method::PATCH, &format!("{own}/status"), MERGE, status).await.code, 200);
    assert_eq!(blocks(control.get(own).await), before, "nothing of it is stored");
    // What it may: say again what it has, and ask for more.
    assert_eq!(ask(Method::PUT, own, JSON, node(before.clone())).await.code, 200);
    let wanted = json!({"metadata": {"annotations": {"mesh.dev/pod-blocks-wanted": "2"}}});
    assert_eq!(ask(Method::PATCH, own, MERGE, wanted).await.code, 200);
    assert!(!assigned(4).await["podCIDRs"].as_array().unwrap().contains(&json!(other)));
}
