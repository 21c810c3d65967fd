//! A cluster's CA for tests.

use std::time::Duration;

use mesh_model::certificate::Validity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, IsCa, Issuer, KeyPair,
};
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::Credential;

/// For all times that matter.
pub(crate) const ALWAYS: Validity = Validity { from: 0, until: 32_000_000_000 };

pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Certificate and key of that name.
    pub(crate) fn sign(&self, kind: DnType, name: &str, validity: Validity) -> Credential {
        let key = KeyPair::generate().unwrap();
        let certificate = params(kind, name, validity).signed_by(&key, &self.issuer).unwrap();
        Credential::new(key.serialize_pem(), certificate.pem()).unwrap()
    }

    /// The certificate of a node that sent a signing request.
    pub(crate) fn answer(&self, csr_pem: &str, name: &str, validity: Validity) -> String {
        let mut request = CertificateSigningRequestParams::from_pem(csr_pem).unwrap();
        request.params = params(DnType::CommonName, name, validity);
        request.signed_by(&self.issuer).unwrap().pem()
    }

    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate()).unwrap();
        roots
    }
}

fn params(kind: DnType, name: &str, validity: Validity) -> CertificateParams {
    let names = ["localhost", "127.0.0.1"].map(str::to_owned);
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(kind, name);
    let second = |second: i64| {
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(u64::try_from(second).unwrap())
    };
    params.not_before = second(validity.from);
    params.not_after = second(validity.until);
    params
}

impl Credential {
    /// As clients of tests take it.
    pub(crate) fn parts(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes()).unwrap();
        (self.certified.cert.clone(), key)
    }
}
