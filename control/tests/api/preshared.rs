//! Keys that pairs of nodes share.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use mesh_model::preshared::{PRESHARED_KEYS_PATH, PresharedKeys};
use mesh_model::snapshot::WgKey;
use mesh_model::wellknown::ANNOTATION_WIREGUARD_KEY;
use rustls::{ClientConfig, NamedGroup, RootCertStore};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::access::{Member, ca, join};
use super::support::*;

async fn publish(control: &Control, name: &str, member: &Member, key: WgKey) {
    let node = json!({"metadata": {"name": name, "annotations": {ANNOTATION_WIREGUARD_KEY: key}}});
    let body = node.to_string().into_bytes();
    let answer = send(&member.client, Method::POST, "/api/v1/nodes", JSON, body).await;
    assert_eq!(answer.code, 201, "{} on {}", answer.body, control.address);
}

async fn keys(member: &Member) -> PresharedKeys {
    let answer = send(&member.client, Method::GET, PRESHARED_KEYS_PATH, JSON, Vec::new()).await;
    assert_eq!(answer.code, 200, "{}", answer.body);
    serde_json::from_value(answer.body).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_nodes_of_a_pair_get_one_key_and_new_ones_in_time() {
    let control = Control::start().await;
    let (a, b) = (join(&control, "a", &[]).await, join(&control, "b", &[]).await);
    let (key_a, key_b) = (WgKey([1; 32]), WgKey([2; 32]));
    publish(&control, "a", &a, key_a).await;
    assert!(keys(&a).await.keys.is_empty());
    publish(&control, "b", &b, key_b).await;
    // The epoch may end between the two answers, but not every time.
    let mut rounds = 0..20;
    let first = loop {
        rounds.next().expect("two answers in one epoch");
        let (of_a, of_b) = (keys(&a).await, keys(&b).await);
        if of_a.epoch == of_b.epoch {
            assert_eq!(of_a.keys[&key_b], of_b.keys[&key_a]);
            break of_a;
        }
    };
    assert!(first.renew_after_ms <= 1000);
    tokio::time::sleep(Duration::from_millis(first.renew_after_ms + 1)).await;
    let second = keys(&a).await;
    assert!(second.epoch > first.epoch && second.keys[&key_b] != first.keys[&key_b]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_else_gets_them() {
    let control = Control::start().await;
    let get = async |client: &kube::Client| {
        send(client, Method::GET, PRESHARED_KEYS_PATH, JSON, Vec::new()).await
    };
    let admin = get(&control.client).await;
    assert_eq!(admin.code, 403, "{}", admin.body);
    let (a, thief) = (join(&control, "a", &[]).await, join(&control, "thief", &[]).await);
    let unknown = get(&a.client).await;
    assert_eq!(unknown.code, 400, "{}", unknown.body);
    publish(&control, "a", &a, WgKey([1; 32])).await;
    publish(&control, "thief", &thief, WgKey([1; 32])).await;
    let stolen = get(&thief.client).await;
    assert_eq!(stolen.code, 403, "{}", stolen.body);
    let posted = send(&a.client, Method::POST, PRESHARED_KEYS_PATH, JSON, Vec::new()).await;
    assert_eq!(posted.code, 405);
}

/// The status line of the answer to a client that offers this key exchange only.
async fn asked_with(control: &Control, member: &Member, group: NamedGroup) -> String {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.kx_groups = rustls::crypto::aws_lc_rs::ALL_KX_GROUPS.to_vec();
    provider.kx_groups.retain(|offered| offered.name() == group);
    let mut roots = RootCertStore::empty();
    roots.add(ca(control).into()).unwrap();
    let chain = CertificateDer::pem_slice_iter(member.certificate_pem.as_bytes());
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(
            chain.map(|c| c.unwrap()).collect(),
            PrivateKeyDer::from_pem_slice(member.key_pem.as_bytes()).unwrap(),
        )
        .unwrap();
    let stream = TcpStream::connect(control.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
    let head = format!(
        "GET {PRESHARED_KEYS_PATH} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // How the other side closes is of no interest.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_a_quantum_computer_opens_is_refused() {
    let control = Control::start().await;
    let member = join(&control, "a", &[]).await;
    publish(&control, "a", &member, WgKey([1; 32])).await;
    let classic = asked_with(&control, &member, NamedGroup::X25519).await;
    assert!(classic.contains("403"), "{classic}");
    let hybrid = asked_with(&control, &member, NamedGroup::X25519MLKEM768).await;
    assert!(hybrid.contains("200"), "{hybrid}");
}
