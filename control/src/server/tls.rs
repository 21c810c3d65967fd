//! TLS of the listener: a certificate that is replaced while it serves, clients verified when they show one.

use std::net::IpAddr;
use std::sync::{Arc, RwLock};

use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use super::{Names, StartError};
use crate::pki::Authority;

/// The listener's side of TLS. Cheap to clone.
#[derive(Clone)]
pub(super) struct Tls {
    pub(super) acceptor: TlsAcceptor,
    current: Arc<Current>,
}

#[derive(Debug)]
struct Current(RwLock<Arc<CertifiedKey>>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().expect("no code panics while it holds the certificate")))
    }
}

impl Tls {
    pub(super) fn new(
        authority: &Authority,
        addresses: &[IpAddr],
        names: &[String],
    ) -> Result<Self, StartError> {
        let tls = |e: rustls::Error| StartError::Tls(Box::new(e));
        let current = Arc::new(Current(RwLock::new(certificate(authority, addresses, names)?)));
        let mut roots = RootCertStore::empty();
        roots.add(authority.certificate().clone()).map_err(tls)?;
        let clients = WebPkiClientVerifier::builder(Arc::new(roots))
            .allow_unauthenticated()
            .build()
            .map_err(|e| StartError::Tls(Box::new(e)))?;
        let mut config = ServerConfig::builder()
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::clone(&current) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), current })
    }

    /// Shows a new certificate from now on; connections that there are stay.
    pub(super) fn renew(&self, authority: &Authority, names: &Names) -> Result<(), StartError> {
        let new = certificate(authority, &names.addresses, &names.dns)?;
        *self.current.0.write().expect("no code panics while it holds the certificate") = new;
        Ok(())
    }
}

fn certificate(
    authority: &Authority,
    addresses: &[IpAddr],
    names: &[String],
) -> Result<Arc<CertifiedKey>, StartError> {
    let made = authority.serving(addresses, names)?;
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&made.key)
        .map_err(|e| StartError::Tls(Box::new(e)))?;
    Ok(Arc::new(CertifiedKey::new(made.chain, key)))
}
