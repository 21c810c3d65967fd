//! The node's certificate with its key: one file, so that the two are of one kind at every moment.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mesh_model::certificate::Validity;
use rustls::crypto::aws_lc_rs;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::join::write_private;

/// The key, and then the certificate.
const FILE: &str = "node.pem";
/// What earlier agents had in its place: the same in two files.
const APART: [&str; 2] = ["node.key", "node.crt"];
const CERTIFICATE_BEGINS: &str = "-----BEGIN CERTIFICATE-----";

/// What is not the certificate of a node with its key.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CredentialError {
    #[error("read PEM")]
    Pem(#[from] pem::Error),
    #[error("the certificate is malformed")]
    Malformed,
    #[error("use the key with the certificate")]
    Unusable(#[source] rustls::Error),
}

/// A file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("keep {path}")]
pub(crate) struct NotKept {
    pub(crate) path: PathBuf,
    #[source]
    pub(crate) source: io::Error,
}

/// A certificate and its key.
pub(crate) struct Credential {
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
    pub(crate) validity: Validity,
    /// Where in its time the next one is asked for: a number as good as a random one, and always the same.
    pub(crate) spread: u8,
    certified: Arc<CertifiedKey>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").field("validity", &self.validity).finish_non_exhaustive()
    }
}

impl Credential {
    /// Refuses what does not belong together.
    pub(crate) fn new(key_pem: String, certificate_pem: String) -> Result<Self, CredentialError> {
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())?;
        let chain = CertificateDer::pem_slice_iter(certificate_pem.as_bytes());
        let chain = chain.collect::<Result<Vec<_>, _>>()?;
        let leaf = chain.first().ok_or(CredentialError::Malformed)?;
        let validity = validity(leaf).ok_or(CredentialError::Malformed)?;
        let [spread, ..] = <[u8; 32]>::from(Sha256::digest(leaf));
        let certified = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
            .map_err(CredentialError::Unusable)?;
        Ok(Self { certificate_pem, key_pem, validity, spread, certified: Arc::new(certified) })
    }

    /// What is kept in a folder; nothing where that cannot be used.
    pub(crate) fn load(folder: &Path) -> Option<Self> {
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let together = read(FILE).and_then(|text| {
            let (key, certificate) = text.split_at(text.find(CERTIFICATE_BEGINS)?);
            Some((key.to_owned(), certificate.to_owned()))
        });
        let [key, certificate] = APART;
        let (key, certificate) = together.or_else(|| read(key).zip(read(certificate)))?;
        Self::new(key, certificate)
            .inspect_err(|error| {
                let error = crate::errors::chain(error);
                tracing::warn!(folder = %folder.display(), error, "certificate cannot be used");
            })
            .ok()
    }

    /// Puts it in the place of the one in a folder, in one step: whoever is killed meanwhile finds that one, or this one.
    pub(crate) fn keep(&self, folder: &Path) -> Result<(), NotKept> {
        let path = folder.join(FILE);
        let text = [self.key_pem.as_str(), &self.certificate_pem].concat();
        write_private(&path, text.as_bytes()).map_err(|source| NotKept { path, source })?;
        for former in APART {
            // They count no more. What stays behind is a key that is not used.
            let _ = fs::remove_file(folder.join(former));
        }
        Ok(())
    }
}

fn validity(certificate: &CertificateDer<'_>) -> Option<Validity> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let validity = certificate.validity();
    Some(Validity { from: validity.not_before.timestamp(), until: validity.not_after.timestamp() })
}

/// What a server shows: the certificate that is in use when a connection begins.
#[derive(Debug)]
pub(crate) struct InUse(pub(crate) watch::Receiver<Arc<Credential>>);

impl ResolvesServerCert for InUse {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.borrow().certified))
    }
}

#[cfg(test)]
pub(crate) mod ca;
#[cfg(test)]
mod tests;
