//! The way to the nodes' agents: logs of pods, and what only a node knows.
//!
//! One TLS connection for each request, with this service's own client certificate; the agent has to have one of the
//! cluster's CA that is valid for the address it is called at. Answers are streamed, so that `logs -f` goes on for hours.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, Request, header};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::ApiError;
use crate::pki::Credential;

/// For the connection, and then again for the first byte of the answer.
const LIMIT: Duration = Duration::from_secs(10);
/// A check probes for seconds before it answers.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Calls agents. Cheap to clone.
#[derive(Clone)]
pub struct Agents(TlsConnector);

impl Agents {
    /// With this service's client certificate, and the CA that agents' certificates come from.
    pub fn new(own: Credential, ca: &CertificateDer<'static>) -> Result<Self, rustls::Error> {
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone())?;
        let mut config = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(own.chain, own.key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(TlsConnector::from(Arc::new(config))))
    }

    /// Sends a request, whose path is one of the agent's, and streams the answer back.
    pub async fn forward(
        &self,
        address: IpAddr,
        port: u16,
        mut request: Request<Body>,
    ) -> Result<Response, ApiError> {
        let address = SocketAddr::new(address, port);
        let connecting = tokio::time::timeout(LIMIT, self.connect(address));
        let stream = connecting.await.map_err(|_| late(address))?.map_err(|e| lost(address, &e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| lost(address, &e))?;
        tokio::spawn(connection);
        let host =
            HeaderValue::from_str(&address.to_string()).expect("an address is a valid header");
        request.headers_mut().insert(header::HOST, host);
        let answering = tokio::time::timeout(ANSWER_LIMIT, sender.send_request(request));
        let answer = answering.await.map_err(|_| late(address))?.map_err(|e| lost(address, &e))?;
        Ok(answer.into_response())
    }

    async fn connect(
        &self,
        address: SocketAddr,
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        self.0.connect(ServerName::IpAddress(address.ip().into()), stream).await
    }
}

fn lost(address: SocketAddr, error: &dyn std::error::Error) -> ApiError {
    ApiError::BadGateway(format!("the agent at {address} cannot be reached: {error}"))
}

fn late(address: SocketAddr) -> ApiError {
    ApiError::GatewayTimeout(format!("the agent at {address} did not answer in time"))
}
