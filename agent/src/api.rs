//! The client for the API, with the node's own certificate.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

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

/// A client that trusts the cluster's CA and nobody else.
pub(crate) fn client(identity: &Identity) -> Result<kube::Client, ClientError> {
    let url = identity.server.parse().map_err(|_| ClientError::Server(identity.server.clone()))?;
    let mut config = kube::Config::new(url);
    let pem = fs::read(&identity.ca)
        .map_err(|source| ClientError::Read { path: identity.ca.clone(), source })?;
    let roots: Result<Vec<Vec<u8>>, _> =
        CertificateDer::pem_slice_iter(&pem).map(|c| c.map(|c| c.to_vec())).collect();
    let roots = roots.ok().filter(|r| !r.is_empty());
    config.root_cert = Some(roots.ok_or_else(|| ClientError::Ca { path: identity.ca.clone() })?);
    config.auth_info.client_certificate = Some(identity.certificate.display().to_string());
    config.auth_info.client_key = Some(identity.key.display().to_string());
    config.connect_timeout = Some(Duration::from_secs(5));
    config.write_timeout = Some(Duration::from_secs(10));
    kube::Client::try_from(config).map_err(|e| ClientError::Tls(Box::new(e)))
}
