use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::routing::get;
use http::Method;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use mesh_model::wellknown::AGENT_PORT;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::access::{Member, join};
use super::support::*;

/// A loopback address of this process and test, so that the agents' one port is free.
fn own_address(number: u8) -> IpAddr {
    let [_, a, b, c] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, (a % 120) * 2 + 10, b ^ number, c.clamp(1, 254)).into()
}

/// Something that answers like an agent, to the control service only.
async fn pretend(control: &Control, member: &Member, address: IpAddr) {
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
            get(async || (http::StatusCode::NOT_FOUND, "no such container")),
        )
        .fallback(echo);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            let service = TowerToHyperService::new(router.clone());
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
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
