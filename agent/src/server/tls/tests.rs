use axum::routing::get;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use mesh_model::ClusterConfig;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
};
use rustls::ClientConfig;

use super::*;

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Certificate and key, PEM.
    fn sign(&self, kind: DnType, name: &str) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(kind, name);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

struct Server {
    address: SocketAddr,
    ca: Ca,
    _dir: tempfile::TempDir,
}

impl Server {
    async fn start() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (ca, dir) = (Ca::new(), tempfile::tempdir().unwrap());
        let (certificate, key) = ca.sign(DnType::CommonName, "system:node:n");
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let identity = Identity {
            certificate: file("node.crt", &certificate),
            key: file("node.key", &key),
            ca: file("ca.crt", &ca.pem),
            server: String::new(),
            cluster: ClusterConfig::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/healthz", get(|| async { "ok" }));
        tokio::spawn(async move { serve(&identity, listener, router).await });
        Self { address, ca, _dir: dir }
    }

    /// Status of `/healthz` for a client with this certificate; the error text when there is no connection.
    async fn ask(&self, client: Option<(String, String)>) -> Result<u16, String> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca.pem.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots);
        let config = match client {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                config.with_client_auth_cert(chain, key).unwrap()
            }
        };
        let text = |error: &dyn std::error::Error| crate::errors::chain(error);
        let tcp = TcpStream::connect(self.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = "localhost".try_into().unwrap();
        let tls = connector.connect(name, tcp).await.map_err(|e| text(&e))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(tls)).await.map_err(|e| text(&e))?;
        tokio::spawn(connection);
        let request = http::Request::get("/healthz").header("host", "localhost");
        let request = request.body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.map_err(|e| text(&e))?;
        let status = response.status().as_u16();
        response.into_body().collect().await.map_err(|e| text(&e))?;
        Ok(status)
    }
}

#[tokio::test]
async fn only_control_and_administrators_may_ask() {
    let server = Server::start().await;
    let mine = |kind, name| Some(server.ca.sign(kind, name));
    assert_eq!(server.ask(mine(DnType::CommonName, "mesh-control")).await, Ok(200));
    assert_eq!(server.ask(mine(DnType::OrganizationName, "system:masters")).await, Ok(200));
    assert_eq!(server.ask(mine(DnType::OrganizationName, "system:nodes")).await, Ok(403));
    assert_eq!(server.ask(mine(DnType::CommonName, "system:masters")).await, Ok(403));
    assert!(server.ask(None).await.is_err(), "without a certificate there is no connection");
    let stranger = Ca::new().sign(DnType::CommonName, "mesh-control");
    assert!(server.ask(Some(stranger)).await.is_err(), "nor with one of another CA");
}

#[test]
fn what_is_no_certificate_has_no_rights() {
    assert!(!may_read(&CertificateDer::from(vec![1, 2, 3])));
}
