//! TLS: certificates by name, protocols by ALPN.

use std::sync::{Arc, Mutex};

use mesh_model::ObjectKey;
use mesh_model::snapshot::Certificate;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::support::*;

fn made(secret: &str, names: &[&str]) -> Certificate {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    Certificate {
        secret: ObjectKey::new("web", secret),
        hosts: vec![],
        chain_pem: made.cert.pem(),
        key_pem: made.signing_key.serialize_pem(),
    }
}

/// Takes any certificate and remembers it: what is tested is which one comes.
#[derive(Debug)]
struct Witness {
    seen: Mutex<Option<CertificateDer<'static>>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Witness {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.seen.lock().unwrap() = Some(leaf.clone().into_owned());
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

async fn connect(
    site: &Site,
    name: &str,
    alpn: &[&str],
) -> (TlsStream<TcpStream>, CertificateDer<'static>) {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let witness = Arc::new(Witness { seen: Mutex::default(), provider: Arc::clone(&provider) });
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&witness) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.as_bytes().to_vec()).collect();
    let io = TcpStream::connect(site.https).await.unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let stream =
        soon("a handshake", TlsConnector::from(Arc::new(config)).connect(name, io)).await.unwrap();
    let seen = witness.seen.lock().unwrap().take().unwrap();
    (stream, seen)
}

fn leaf(certificate: &Certificate) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(certificate.chain_pem.as_bytes()).unwrap()
}

#[tokio::test]
async fn the_certificate_follows_the_name_and_the_configuration() {
    let backend = Backend::echo().await;
    let (exact, wild) = (made("a", &["www.a.test"]), made("b", &["*.a.test"]));
    let mut broken = made("c", &["broken.test"]);
    broken.key_pem = "nonsense".into();
    let mut config = all_to(&[backend.address]);
    config.certificates = vec![exact.clone(), wild.clone(), broken];
    let site = Site::new(&config, options());
    assert_eq!(site.status().certificates, 2);
    assert_eq!(site.status().problems[0].object, "secret web/c");
    assert_eq!(connect(&site, "www.a.test", &[]).await.1, leaf(&exact));
    assert_eq!(connect(&site, "WWW.a.test", &[]).await.1, leaf(&exact));
    assert_eq!(connect(&site, "api.a.test", &[]).await.1, leaf(&wild));
    let default = connect(&site, "other.test", &[]).await.1;
    assert_eq!(connect(&site, "broken.test", &[]).await.1, default);
    assert_eq!(connect(&site, "127.0.0.1", &[]).await.1, default, "an address is no server name");
    assert_ne!(default, leaf(&wild));

    let (mut open, _) = connect(&site, "www.a.test", &[]).await;
    let renewed = made("a", &["www.a.test"]);
    config.certificates = vec![renewed.clone()];
    site.proxy.apply(&config);
    assert_eq!(connect(&site, "www.a.test", &[]).await.1, leaf(&renewed));
    assert_eq!(connect(&site, "api.a.test", &[]).await.1, default);
    open.write_all(b"GET / HTTP/1.1\r\nHost: www.a.test\r\nConnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    soon("an answer", open.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(code(&answer), 200, "connections outlive their certificate's renewal");
    assert!(answer.contains("x-forwarded-proto: https\r\n"), "{answer}");
}

#[tokio::test]
async fn the_protocol_follows_alpn() {
    let backend = Backend::echo().await;
    let site = Site::new(&all_to(&[backend.address]), options());
    for (offer, chosen) in [
        (&["h2", "http/1.1"][..], Some(&b"h2"[..])),
        (&["http/1.1"], Some(b"http/1.1")),
        (&[], None),
    ] {
        let (stream, _) = connect(&site, "a.test", offer).await;
        assert_eq!(stream.get_ref().1.alpn_protocol(), chosen);
    }
    let (stream, _) = connect(&site, "a.test", &["h2"]).await;
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("https://a.test/x").body(()).unwrap();
    let (response, _) = sender.ready().await.unwrap().send_request(request, true).unwrap();
    let mut body = soon("a response", response).await.unwrap().into_body();
    let data = soon("data", body.data()).await.unwrap().unwrap();
    assert!(String::from_utf8_lossy(&data).contains("x-forwarded-proto: https"));
}

#[tokio::test]
async fn large_bodies_pass_through_tls_intact() {
    let backend = Backend::new(|io, _| async move {
        let mut io = Raw::new(io);
        while let Some(head) = io.head().await {
            let body = io.body(&head).await;
            io.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len())).await;
            io.send(body).await;
        }
    })
    .await;
    let site = Site::new(&all_to(&[backend.address]), options());
    let (stream, _) = connect(&site, "a.test", &[]).await;
    let (mut read, mut write) = tokio::io::split(stream);
    let body: Vec<u8> = (0..3_000_000u32).map(|i| (i ^ (i >> 8)) as u8).collect();
    let sent = body.clone();
    let sending = tokio::spawn(async move {
        let head = format!(
            "PUT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            sent.len()
        );
        write.write_all(head.as_bytes()).await.unwrap();
        write.write_all(&sent).await.unwrap();
        write
    });
    let mut answer = Vec::new();
    soon("the answer", read.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.ends_with(&body));
    sending.await.unwrap();
}

#[tokio::test]
async fn what_is_no_handshake_is_counted_and_forgotten() {
    let backend = Backend::echo().await;
    let mut options = options();
    options.timeouts.head = std::time::Duration::from_millis(200);
    let site = Site::new(&all_to(&[backend.address]), options);
    let mut garbage = Raw::connect(site.https).await;
    garbage.send(GET).await;
    garbage.rest().await;
    let mut silent = Raw::connect(site.https).await;
    assert_eq!(silent.rest().await, "");
    eventually("both are counted", || site.status().counts.tls_failures == 2).await;
    let (mut good, _) = connect(&site, "a.test", &[]).await;
    good.write_all(GET.as_bytes()).await.unwrap();
    let mut first = [0; 15];
    soon("an answer", good.read_exact(&mut first)).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");
}
