//! Certificates end: nodes get their next ones, and the service makes its own anew.

use std::time::{Duration, Instant};

use http::{Method, Request};
use kube::Client;
use kube::client::Body;
use mesh_model::certificate::{RENEW_PATH, RenewResponse};
use rcgen::{CertificateParams, DistinguishedName, DnType, Issuer, KeyPair};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::{Value, json};

use super::access::{ca, join, member, stranger};
use super::agents::{own_address, pretend};
use super::support::*;

const LIMIT: Duration = Duration::from_secs(60);

async fn renew(client: &Client, body: &Value) -> Answer {
    send(client, Method::POST, RENEW_PATH, JSON, body.to_string().into_bytes()).await
}

/// Subject, names and addresses.
fn names(certificate_pem: &str) -> (String, Vec<String>) {
    let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes()).unwrap();
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    let names = names.value.general_names.iter().map(ToString::to_string).collect();
    (certificate.subject().to_string(), names)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_gets_the_next_certificate_of_its_own_name_and_of_no_other() {
    let control = Control::start().await;
    let own = join(&control, "n1", &["192.0.2.7".parse().unwrap()]).await;
    let key = KeyPair::generate().unwrap();
    let mut wish = CertificateParams::new(["n2", "192.0.2.8"].map(str::to_owned)).unwrap();
    wish.distinguished_name.push(DnType::CommonName, "system:node:n2");
    wish.distinguished_name.push(DnType::OrganizationName, "system:masters");
    let asked = json!({"csrPem": wish.serialize_request(&key).unwrap().pem().unwrap()});

    let answer = renew(&own.client, &asked).await;
    assert_eq!(answer.code, 200, "{}", answer.body);
    let response: RenewResponse = serde_json::from_value(answer.body).unwrap();
    assert_eq!(names(&response.certificate_pem), names(&own.certificate_pem));
    let next = member(&control, response.certificate_pem, &key);
    let create = async |name: &str| {
        let node = json!({"metadata": {"name": name}}).to_string().into_bytes();
        send(&next.client, Method::POST, "/api/v1/nodes", JSON, node).await.code
    };
    assert_eq!((create("n1").await, create("n2").await), (201, 403));
    assert_eq!(renew(&next.client, &asked).await.code, 200, "and so on");

    assert_eq!(renew(&stranger(&control), &asked).await.code, 401);
    let administrator = renew(&control.client, &asked).await;
    assert_eq!(administrator.code, 403, "{}", administrator.body);
    let pretending = Request::post(RENEW_PATH)
        .header("impersonate-user", "system:node:n1")
        .header("impersonate-group", "system:nodes")
        .body(Body::from(asked.to_string().into_bytes()));
    assert_eq!(control.client.send(pretending.unwrap()).await.unwrap().status(), 403);
    let get = send(&own.client, Method::GET, RENEW_PATH, JSON, Vec::new()).await;
    assert_eq!(get.code, 405);
    let with = |field: &str, value: Value| {
        let mut changed = asked.clone();
        changed[field] = value;
        changed
    };
    for bad in [
        with("csrPem", json!("nonsense")),
        with("node", json!("n2")),
        with("addresses", json!(["192.0.2.8"])),
    ] {
        let answer = renew(&own.client, &bad).await;
        assert_eq!((answer.code, &answer.body["kind"]), (400, &json!("Status")), "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_has_run_out_counts_no_more_on_a_connection_that_there_is() {
    let control = Control::start().await;
    let ca_key = std::fs::read_to_string(control.dir.path().join("ca.key")).unwrap();
    let ca_key = KeyPair::from_pem(&ca_key).unwrap();
    let issuer = Issuer::from_ca_cert_der(&ca(&control).into(), ca_key).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(DnType::CommonName, "system:node:n1");
    let now = u64::try_from(jiff::Timestamp::now().as_second()).unwrap();
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(now + 6);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let short = member(&control, certificate.pem(), &key);

    let read = async || send(&short.client, Method::GET, "/api/v1/nodes", JSON, Vec::new()).await;
    assert_eq!(read().await.code, 200);
    let begun = Instant::now();
    let refused = loop {
        let answer = read().await;
        if answer.code != 200 {
            break answer;
        }
        assert!(begun.elapsed() < LIMIT, "it is good for ever");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(refused.code, 401);
    let message = refused.body["message"].as_str().unwrap();
    assert!(message.contains("the client certificate has run out"), "{message}");
}

/// The status of an answer, if there is one.
async fn code(client: &Client, method: Method, path: &str, body: &Value) -> Option<u16> {
    let request = Request::builder().method(method).uri(path).header("content-type", JSON);
    let request = request.body(Body::from(body.to_string().into_bytes())).unwrap();
    Some(client.send(request).await.ok()?.status().as_u16())
}

/// Whether a new node is let in, and an administrator is shown through to its agent.
async fn reaches_an_agent(control: &Control, number: u8) -> bool {
    let (name, address) = (format!("n{number}"), own_address(100 + number));
    let node = join(control, &name, &[address]).await;
    pretend(control, &node, address).await;
    let admin = admin(control.dir.path()).await;
    let status = json!({"addresses": [{"type": "InternalIP", "address": address}]});
    let node = json!({"metadata": {"name": name}, "status": status});
    let registered = code(&admin, Method::POST, "/api/v1/nodes", &node).await;
    let path = format!("/api/v1/nodes/{name}/proxy/x");
    registered == Some(201) && code(&admin, Method::GET, &path, &json!({})).await == Some(200)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_services_own_certificates_are_renewed_while_it_runs() {
    let lifetime = Duration::from_secs(6);
    let control = Control::start_with(tempfile::tempdir().unwrap(), lifetime).await;
    // By then, all that it started with have run out.
    tokio::time::sleep(lifetime + Duration::from_secs(2)).await;
    let begun = Instant::now();
    // The new ones may run out, too, on a slow machine.
    for number in 0.. {
        if reaches_an_agent(&control, number).await {
            break;
        }
        assert!(begun.elapsed() < LIMIT, "something has run out");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
