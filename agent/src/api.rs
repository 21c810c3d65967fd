//! The client for the API, with the node's own certificate.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::credential::Credential;
use crate::errors::chain;
use crate::join::Identity;

/// No client could be made of the node's identity.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the cluster's CA in {path} is not a certificate")]
    Ca { path: PathBuf },
    #[error("--server {0}: not a URL")]
    Server(String),
    #[error("set up TLS with the node's certificate")]
    Tls(#[source] Box<kube::Error>),
}

/// A client that trusts the cluster's CA and nobody else. Its requests show the certificate that is in use when they begin; answers
/// to earlier ones, such as watches, go on.
pub(crate) fn client(identity: &Identity) -> Result<kube::Client, ClientError> {
    let url = identity.server.parse().map_err(|_| ClientError::Server(identity.server.clone()))?;
    let mut config = kube::Config::new(url);
    config.root_cert = Some(roots(&identity.ca)?);
    config.connect_timeout = Some(Duration::from_secs(5));
    config.write_timeout = Some(Duration::from_secs(10));
    let mut credentials = identity.credential.subscribe();
    let mut present = showing(&config, &credentials.borrow_and_update())?;
    let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
        // Whoever holds the sender ends with the agent.
        if credentials.has_changed().unwrap_or(false) {
            match showing(&config, &credentials.borrow_and_update()) {
                Ok(next) => present = next,
                Err(error) => tracing::error!(error = chain(&error), "no new client"),
            }
        }
        let client = present.clone();
        async move { client.send(request).await }
    });
    Ok(kube::Client::new(service, "default"))
}

/// A client that shows that certificate, with connections of its own.
fn showing(config: &kube::Config, credential: &Credential) -> Result<kube::Client, ClientError> {
    let mut config = config.clone();
    let certificate = STANDARD.encode(&credential.certificate_pem);
    config.auth_info.client_certificate_data = Some(certificate);
    config.auth_info.client_key_data = Some(STANDARD.encode(&credential.key_pem).into());
    kube::Client::try_from(config).map_err(|e| ClientError::Tls(Box::new(e)))
}

fn roots(path: &Path) -> Result<Vec<Vec<u8>>, ClientError> {
    let pem =
        fs::read(path).map_err(|source| ClientError::Read { path: path.to_owned(), source })?;
    let roots: Result<Vec<Vec<u8>>, _> =
        CertificateDer::pem_slice_iter(&pem).map(|c| c.map(|c| c.to_vec())).collect();
    let roots = roots.ok().filter(|roots| !roots.is_empty());
    roots.ok_or_else(|| ClientError::Ca { path: path.to_owned() })
}
