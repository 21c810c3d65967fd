//! The agent's HTTPS server: only for the control service and administrators.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use mesh_model::wellknown::{CONTROL_USER, GROUP_ADMINS};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::credential::InUse;
use crate::join::Identity;

const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// After so much silence a client is asked whether it is still there.
const SILENCE: Duration = Duration::from_secs(30);
/// Clients are the control service and a few people.
const CONNECTIONS: usize = 256;

/// The server could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsServerError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    #[error("trust the cluster's CA")]
    Ca(#[source] rustls::Error),
    #[error("verify clients by the cluster's CA")]
    Clients(#[source] rustls::server::VerifierBuilderError),
    #[error("listen on port {port}")]
    Listen {
        port: u16,
        #[source]
        source: io::Error,
    },
}

/// Serves the router for ever to clients whose certificate says that they may.
pub(crate) async fn serve(
    identity: &Identity,
    listener: TcpListener,
    router: Router,
) -> Result<Infallible, TlsServerError> {
    let acceptor = TlsAcceptor::from(Arc::new(config(identity)?));
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = Arc::clone(&room).acquire_owned().await.expect("never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let (acceptor, router) = (acceptor.clone(), router.clone());
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, acceptor, router).await {
                        tracing::debug!(%error, "HTTPS connection ended");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting an HTTPS connection failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn config(identity: &Identity) -> Result<ServerConfig, TlsServerError> {
    let cas = CertificateDer::pem_file_iter(&identity.ca).and_then(Iterator::collect);
    let cas: Vec<CertificateDer<'static>> =
        cas.map_err(|source| TlsServerError::Read { path: identity.ca.clone(), source })?;
    let mut roots = RootCertStore::empty();
    for ca in cas {
        roots.add(ca).map_err(TlsServerError::Ca)?;
    }
    let clients =
        WebPkiClientVerifier::builder(Arc::new(roots)).build().map_err(TlsServerError::Clients)?;
    let mut config = ServerConfig::builder()
        .with_client_cert_verifier(clients)
        .with_cert_resolver(Arc::new(InUse(identity.credential.subscribe())));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

async fn converse(
    stream: TcpStream,
    acceptor: TlsAcceptor,
    router: Router,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let _ = stream.set_nodelay(true);
    // A session with a pod may be silent for hours; one whose client is gone must not last as long.
    let keep_alive = TcpKeepalive::new().with_time(SILENCE).with_interval(SILENCE / 3);
    let _ = SockRef::from(&stream).set_tcp_keepalive(&keep_alive);
    let stream = tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await??;
    let client = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let router = if client.is_some_and(|certificate| may_read(certificate)) {
        router
    } else {
        let message = "only the control service and administrators may ask a node\n";
        Router::new().fallback(async move || (StatusCode::FORBIDDEN, message))
    };
    let mut server = auto::Builder::new(TokioExecutor::new());
    server.http1().timer(TokioTimer::new()).header_read_timeout(HANDSHAKE_LIMIT);
    server.http2().timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30));
    let service = TowerToHyperService::new(router);
    server.serve_connection_with_upgrades(TokioIo::new(stream), service).await
}

/// By the name in a certificate that the cluster's CA signed. Where a session is resumed, nobody has looked at its dates.
fn may_read(certificate: &CertificateDer<'_>) -> bool {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(certificate) else {
        return false;
    };
    if !certificate.validity().is_valid() {
        return false;
    }
    let subject = certificate.subject();
    let named = |mut values: Vec<&str>, wanted: &str| {
        values.retain(|value| *value == wanted);
        !values.is_empty()
    };
    let names = subject.iter_common_name().filter_map(|name| name.as_str().ok()).collect();
    let groups = subject.iter_organization().filter_map(|name| name.as_str().ok()).collect();
    named(names, CONTROL_USER) || named(groups, GROUP_ADMINS)
}

#[cfg(test)]
mod tests;
