use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, get};
use http::{Method, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use mesh_model::wellknown::AGENT_PORT;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::access::{Member, join};
use super::support::*;

/// A loopback address of this process and test, so that the agents' one port is free.
pub(crate) fn own_address(number: u8) -> IpAddr {
    let [_, a, b, c] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, (a % 120) * 2 + 10, b ^ number, c.clamp(1, 254)).into()
}

/// Something that answers like an agent, to the control service only.
pub(crate) async fn pretend(control: &Control, member: &Member, address: IpAddr) {
    let mut roots = RootCertStore::empty();
    let ca = std::fs::read(control.dir.path().join("ca.crt")).unwrap();
    roots.add(CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
    let clients = WebPkiClientVerifier::builder(Arc::new(roots)).build().unwrap();
    let chain = vec![CertificateDer::from_pem_slice(member.certificate_pem.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(member.key_pem.as_bytes()).unwrap();
    let config = ServerConfig::builder()
        .with_client_cert_verifier(clients)
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((address, AGENT_PORT)).await.unwrap();
    let echo = async |request: Request| format!("{} {}", request.method(), request.uri());
    let router = Router::new()
        .route(
            "/containerLogs/default/gone/main",
            get(async || (StatusCode::NOT_FOUND, "no such container")),
        )
        .route(
            "/mesh/v1/usage",
            get(async || {
                axum::Json(json!({"timestamp": "2027-01-15T08:00:00Z", "windowMs": 1500,
                    "node": {"cpuNanoCores": 1_500_000_000, "memoryBytes": 4096},
                    "pods": [
                        {"namespace": "default", "name": "p", "containers":
                            {"main": {"cpuNanoCores": 5, "memoryBytes": 2048}}},
                        {"namespace": "default", "name": "unknown", "containers": {}}]}))
            }),
        )
        .route("/exec/default/p/main", any(parrot))
        .route("/portForward/default/p", any(parrot))
        .fallback(echo);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            let service = TowerToHyperService::new(router.clone());
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
            });
        }
    });
}

/// Agrees to the upgrade, says what it was asked, and then whatever it hears, until that ends.
async fn parrot(mut request: Request) -> Response {
    let header = |name: &str| {
        request.headers().get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default()
    };
    let (upgrade, dialect) = (header("upgrade"), header("x-stream-protocol-version"));
    if upgrade.is_empty() {
        return (StatusCode::BAD_REQUEST, "no upgrade").into_response();
    }
    let seen = format!("{} {} {}", request.method(), request.uri(), header("authorization"));
    let client = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let (mut from, mut to) = tokio::io::split(TokioIo::new(client.await.unwrap()));
        to.write_all(seen.as_bytes()).await.unwrap();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
        to.write_all(b"bye").await.unwrap();
        to.shutdown().await.unwrap();
    });
    let headers = [
        ("connection", "Upgrade".to_owned()),
        ("upgrade", upgrade),
        ("x-stream-protocol-version", dialect),
        ("x-other", "not passed on".to_owned()),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

async fn register(control: &Control, name: &str, address: IpAddr) {
    let status = json!({"addresses": [{"type": "InternalIP", "address": address}]});
    control.create("/api/v1/nodes", json!({"metadata": {"name": name}, "status": status})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_and_node_reports_come_from_the_agent() {
    let control = Control::start().await;
    let address = own_address(1);
    let member = join(&control, "n1", &[address]).await;
    pretend(&control, &member, address).await;
    register(&control, "n1", address).await;
    control.create(PODS, pod("p", Some("n1"))).await;
    control.create(PODS, pod("gone", Some("n1"))).await;
    let logs = control.get(&format!("{PODS}/p/log?tailLines=3&follow=true")).await;
    assert_eq!(
        (logs.code, logs.body),
        (200, json!("GET /containerLogs/default/p/main?tailLines=3&follow=true"))
    );
    let wrong = control.get(&format!("{PODS}/p/log?container=x")).await;
    assert_eq!((wrong.code, &wrong.body["reason"]), (400, &json!("BadRequest")));
    let gone = control.get(&format!("{PODS}/gone/log")).await;
    assert_eq!((gone.code, &gone.body["message"]), (404, &json!("no such container")));
    let path = "/api/v1/nodes/n1/proxy/mesh/v1/check?x=1";
    let proxied = send(&control.client, Method::POST, path, JSON, b"{}".to_vec()).await;
    assert_eq!((proxied.code, proxied.body), (200, json!("POST /mesh/v1/check?x=1")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_go_through_to_the_agent_and_back() {
    let control = Control::start().await;
    let address = own_address(3);
    let member = join(&control, "n1", &[address]).await;
    pretend(&control, &member, address).await;
    register(&control, "n1", address).await;
    control.create(PODS, pod("p", Some("n1"))).await;
    let ask = async |method: Method, path: &str, upgrade: Option<&str>| {
        let mut request = http::Request::builder().method(method).uri(format!("{PODS}/{path}"));
        if let Some(upgrade) = upgrade {
            request = request.header("connection", "Upgrade").header("upgrade", upgrade);
            request = request.header("x-stream-protocol-version", "v4.channel.k8s.io");
        }
        request = request.header("authorization", "not for agents");
        control.client.send(request.body(kube::client::Body::empty()).unwrap()).await.unwrap()
    };
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    for (method, path, inside) in [
        (
            Method::POST,
            "p/exec?command=a&command=b+c",
            "/exec/default/p/main?command=a&command=b+c",
        ),
        (Method::GET, "p/portforward?ports=1", "/portForward/default/p?ports=1"),
    ] {
        let answer = ask(method.clone(), path, Some("SPDY/3.1")).await;
        assert_eq!(answer.status(), StatusCode::SWITCHING_PROTOCOLS, "{path}");
        assert_eq!(answer.headers()["x-stream-protocol-version"], "v4.channel.k8s.io");
        assert!(!answer.headers().contains_key("x-other"));
        let stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
        let (mut from, mut to) = tokio::io::split(stream);
        let whole = sent.clone();
        let writing = tokio::spawn(async move {
            to.write_all(&whole).await.unwrap();
            to.shutdown().await.unwrap();
        });
        let mut got = Vec::new();
        from.read_to_end(&mut got).await.unwrap();
        writing.await.unwrap();
        let greeting = format!("{method} {inside} ");
        assert_eq!(got.len(), greeting.len() + sent.len() + 3);
        assert!(got.starts_with(greeting.as_bytes()) && got.ends_with(b"bye"));
        assert!(got[greeting.len()..][..sent.len()] == sent, "altered on its way");
    }
    for (method, path, upgrade, code) in [
        (Method::POST, "p/exec?command=a", None, 400),
        (Method::PUT, "p/exec?command=a", Some("SPDY/3.1"), 405),
        (Method::POST, "p/exec?command=a&container=x", Some("SPDY/3.1"), 400),
        (Method::POST, "none/attach", Some("SPDY/3.1"), 404),
    ] {
        let answer = ask(method, path, upgrade).await;
        assert_eq!(answer.status(), code, "{path}");
        let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
        let status: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(status["kind"], "Status", "{path}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_not_there_or_not_itself_is_a_bad_gateway() {
    let control = Control::start().await;
    let address = own_address(2);
    register(&control, "n1", address).await;
    control.create(PODS, pod("p", Some("n1"))).await;
    control.create(PODS, pod("unbound", None)).await;
    let path = format!("{PODS}/p/log");
    let answer = control.get(&path).await;
    assert_eq!((answer.code, &answer.body["kind"]), (502, &json!("Status")), "{}", answer.body);
    assert!(answer.body["message"].as_str().unwrap().contains("agent of node n1 at"));
    let unbound = control.get(&format!("{PODS}/unbound/log")).await;
    assert_eq!(unbound.code, 400);
    let other = join(&control, "n2", &[]).await;
    pretend(&control, &other, address).await;
    let answer = control.get(&path).await;
    assert_eq!(answer.code, 502, "another node's certificate: {}", answer.body);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nodes_and_pods_use_comes_from_the_agents() {
    let control = Control::start().await;
    let address = own_address(5);
    let member = join(&control, "n1", &[address]).await;
    pretend(&control, &member, address).await;
    register(&control, "n1", address).await;
    // Nobody answers there: its node is left out.
    register(&control, "n2", own_address(6)).await;
    for (name, node) in [("p", "n1"), ("q", "n2")] {
        control.create(PODS, pod(name, Some(node))).await;
    }
    let at = |rest: &str| format!("/apis/metrics.k8s.io/v1beta1/{rest}");
    let nodes = control.get(&at("nodes")).await.body;
    assert_eq!(nodes["kind"], "NodeMetricsList");
    assert_eq!(nodes["items"].as_array().unwrap().len(), 1);
    let node = &nodes["items"][0];
    assert_eq!((&node["metadata"]["name"], &node["window"]), (&json!("n1"), &json!("1500ms")));
    assert_eq!(node["usage"], json!({"cpu": "1500000000n", "memory": "4Ki"}));
    assert_eq!(control.get(&at("nodes/n2")).await.code, 404);
    for path in ["pods", "namespaces/default/pods", "pods?labelSelector=app%3Dp"] {
        let pods = control.get(&at(path)).await.body;
        assert_eq!(pods["items"].as_array().unwrap().len(), 1, "{path}: {pods}");
        let used = json!([{"name": "main", "usage": {"cpu": "5n", "memory": "2Ki"}}]);
        assert_eq!(pods["items"][0]["containers"], used);
    }
    let none = control.get(&at("pods?labelSelector=app%3Dq")).await.body;
    assert_eq!(none["items"], json!([]));
    let one = control.get(&at("namespaces/default/pods/p")).await;
    assert_eq!((one.code, &one.body["kind"]), (200, &json!("PodMetrics")));
    assert_eq!(control.get(&at("namespaces/other/pods/p")).await.code, 404);
    assert_eq!(control.get(&at("gadgets")).await.code, 404);
    let groups = control.get("/apis").await.body.to_string();
    assert!(groups.contains("metrics.k8s.io/v1beta1"), "{groups}");
    let asked = send(&member.client, Method::GET, &at("nodes"), JSON, Vec::new()).await;
    assert_eq!(asked.code, 403);
}
