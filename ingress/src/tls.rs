//! Certificates, chosen by the server name that a client asks for (RFC 6066 section 3).

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use mesh_model::snapshot::Certificate;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use crate::authority;
use crate::status::Problem;

/// TLS cannot be served at all.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate for names without one could not be made.
    #[error("make a self-signed certificate")]
    SelfSigned(#[source] rcgen::Error),
    /// The library refuses its own settings.
    #[error("set up TLS")]
    Setup(#[source] rustls::Error),
}

/// One certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertificateError {
    #[error("the chain is not PEM: {0}")]
    Chain(rustls::pki_types::pem::Error),
    #[error("the chain is empty")]
    Empty,
    #[error("the key is not PEM: {0}")]
    Key(rustls::pki_types::pem::Error),
    #[error("the key cannot be used: {0}")]
    Unusable(rustls::Error),
    #[error("the first certificate of the chain is malformed")]
    Malformed,
    #[error("the certificate has no name, and the Ingress lists none")]
    Nameless,
}

/// The certificates of one configuration.
#[derive(Debug, Default)]
pub(crate) struct CertificateTable {
    exact: HashMap<String, Arc<CertifiedKey>>,
    wildcard: HashMap<String, Arc<CertifiedKey>>,
    pub(crate) count: usize,
}

impl CertificateTable {
    /// Takes what can be used of `certificates`, and says what cannot. Of two for a name the first by Secret counts.
    pub(crate) fn new(certificates: &[Certificate]) -> (Self, Vec<Problem>) {
        let mut table = Self::default();
        let mut problems = Vec::new();
        let mut ordered: Vec<&Certificate> = certificates.iter().collect();
        ordered.sort_by(|a, b| a.secret.cmp(&b.secret));
        for certificate in ordered {
            match read(certificate) {
                Ok((key, names)) => table.add(&key, &names),
                Err(error) => problems.push(Problem {
                    object: format!("secret {}", certificate.secret),
                    reason: error.to_string(),
                }),
            }
        }
        (table, problems)
    }

    fn add(&mut self, key: &Arc<CertifiedKey>, names: &[String]) {
        self.count += 1;
        for name in names {
            let (map, name) = match name.strip_prefix("*.") {
                Some(suffix) => (&mut self.wildcard, suffix),
                None => (&mut self.exact, name.as_str()),
            };
            if let Ok(name) = authority::host(name.as_bytes()) {
                map.entry(name.into_owned()).or_insert_with(|| Arc::clone(key));
            }
        }
    }

    /// The certificate for a server name in lower case.
    pub(crate) fn find(&self, name: &str) -> Option<&Arc<CertifiedKey>> {
        let wildcard = || self.wildcard.get(name.split_once('.')?.1);
        self.exact.get(name).or_else(wildcard)
    }
}

fn read(certificate: &Certificate) -> Result<(Arc<CertifiedKey>, Vec<String>), CertificateError> {
    let chain = CertificateDer::pem_slice_iter(certificate.chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(CertificateError::Chain)?;
    let leaf = chain.first().ok_or(CertificateError::Empty)?;
    let names =
        if certificate.hosts.is_empty() { names_of(leaf)? } else { certificate.hosts.clone() };
    let key = PrivateKeyDer::from_pem_slice(certificate.key_pem.as_bytes())
        .map_err(CertificateError::Key)?;
    let key = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
        .map_err(CertificateError::Unusable)?;
    if names.is_empty() {
        return Err(CertificateError::Nameless);
    }
    Ok((Arc::new(key), names))
}

fn names_of(leaf: &CertificateDer<'_>) -> Result<Vec<String>, CertificateError> {
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| CertificateError::Malformed)?;
    let alternative = parsed.subject_alternative_name().map_err(|_| CertificateError::Malformed)?;
    let names = alternative.map(|extension| &extension.value.general_names);
    let dns = names.into_iter().flatten().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    });
    Ok(dns.collect())
}

/// Chooses certificates while connections come and configurations go.
#[derive(Debug)]
pub(crate) struct CertificateStore {
    table: ArcSwap<CertificateTable>,
    default: Arc<CertifiedKey>,
}

impl CertificateStore {
    /// A store with nothing but a certificate that nobody trusts, for names that have none.
    pub(crate) fn new() -> Result<Self, TlsError> {
        let made = rcgen::generate_simple_self_signed(["mesh-ingress.invalid".to_owned()])
            .map_err(TlsError::SelfSigned)?;
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        let chain = vec![made.cert.der().clone()];
        let default = CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
            .map_err(TlsError::Setup)?;
        Ok(Self { table: ArcSwap::default(), default: Arc::new(default) })
    }

    /// Puts another table in force for handshakes to come.
    pub(crate) fn replace(&self, table: CertificateTable) {
        self.table.store(Arc::new(table));
    }
}

impl ResolvesServerCert for CertificateStore {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let table = self.table.load();
        // rustls gives names in lower case, checked for their form.
        let found = hello.server_name().and_then(|name| table.find(name.trim_end_matches('.')));
        Some(Arc::clone(found.unwrap_or(&self.default)))
    }
}

/// The settings of all TLS connections: TLS 1.2 and 1.3, HTTP/2 before HTTP/1.1, tickets for resumption.
pub(crate) fn server_config(
    store: Arc<CertificateStore>,
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_no_client_auth()
        .with_cert_resolver(store);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(TlsError::Setup)?;
    config.send_tls13_tickets = 1;
    Ok(Arc::new(config))
}
