use std::net::SocketAddr;

use axum::routing::get;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use mesh_model::ClusterConfig;
use mesh_model::certificate::Validity;
use rcgen::DnType;
use rustls::ClientConfig;
use tokio::sync::watch;

use super::*;
use crate::credential::Credential;
use crate::credential::ca::{ALWAYS, Ca};

struct Server {
    address: SocketAddr,
    ca: Ca,
    _dir: tempfile::TempDir,
}

impl Server {
    async fn start() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (ca, dir) = (Ca::new(), tempfile::tempdir().unwrap());
        let path = dir.path().join("ca.crt");
        std::fs::write(&path, &ca.pem).unwrap();
        let own = ca.sign(DnType::CommonName, "system:node:n", ALWAYS);
        let identity = Identity {
            credential: watch::Sender::new(Arc::new(own)),
            ca: path,
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
    async fn ask(&self, client: Option<&Credential>) -> Result<u16, String> {
        let config = ClientConfig::builder().with_root_certificates(self.ca.roots());
        let config = match client {
            None => config.with_no_client_auth(),
            Some(client) => {
                let (chain, key) = client.parts();
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
    let mine = |kind, name| server.ca.sign(kind, name, ALWAYS);
    assert_eq!(server.ask(Some(&mine(DnType::CommonName, "mesh-control"))).await, Ok(200));
    assert_eq!(server.ask(Some(&mine(DnType::OrganizationName, "system:masters"))).await, Ok(200));
    assert_eq!(server.ask(Some(&mine(DnType::OrganizationName, "system:nodes"))).await, Ok(403));
    assert_eq!(server.ask(Some(&mine(DnType::CommonName, "system:masters"))).await, Ok(403));
    assert!(server.ask(None).await.is_err(), "without a certificate there is no connection");
    let stranger = Ca::new().sign(DnType::CommonName, "mesh-control", ALWAYS);
    assert!(server.ask(Some(&stranger)).await.is_err(), "nor with one of another CA");
}

#[test]
fn what_is_no_certificate_has_no_rights_nor_has_one_that_has_run_out() {
    assert!(!may_read(&CertificateDer::from(vec![1, 2, 3])));
    let ca = Ca::new();
    let ended = Validity { until: 1_000_000_000, ..ALWAYS };
    let allowed = [ALWAYS, ended].map(|validity| {
        let (chain, _) = ca.sign(DnType::CommonName, "mesh-control", validity).parts();
        may_read(&chain[0])
    });
    assert_eq!(allowed, [true, false]);
}
