//! The cluster's own certificate authority, and the certificates that it signs.
//!
//! Owns: the CA's key (never leaves the data folder), the serving certificate, the certificates of the
//! administrator, of this service and of nodes, and the secret that lets a node in.

use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use mesh_model::NodeName;
use mesh_model::certificate::Validity;
use mesh_model::join::JoinToken;
use mesh_model::wellknown::{CONTROL_USER, GROUP_ADMINS, GROUP_NODES, NODE_USER_PREFIX};
use rand::Rng as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use sha2::{Digest as _, Sha256};
use x509_parser::certificate::X509Certificate;

mod kubeconfig;

const DAY: Duration = Duration::from_secs(86_400);
const CA_LIFETIME: Duration = Duration::from_secs(3650 * DAY.as_secs());
/// For how long certificates are made, but for the CA's own.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(365 * DAY.as_secs());
/// Clocks of nodes may be behind.
const BACKDATED: Duration = DAY;

/// The authority or one of its certificates could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file of the data folder cannot be read or written.
    #[error("{doing} {path}")]
    File {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file of the data folder does not hold what it should.
    #[error("{path} is damaged: {detail}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was expected.
        detail: String,
    },
    /// A certificate could not be made.
    #[error("make the certificate of {subject}")]
    Certificate {
        /// Whose.
        subject: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
}

/// What a node asks for cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The request is not one, or its signature is not by its key.
    #[error("csrPem is not a certificate signing request: {0}")]
    Request(#[source] rcgen::Error),
    /// The certificate could not be made.
    #[error("the certificate could not be made: {0}")]
    Certificate(#[source] rcgen::Error),
}

/// The certificate authority of the cluster.
pub struct Authority {
    dir: PathBuf,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// Of what it signs.
    lifetime: Duration,
}

/// A certificate with its key.
pub struct Credential {
    /// Leaf first, then the CA: clients that pin the CA look for it in the chain.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key.
    pub key: PrivateKeyDer<'static>,
    /// The leaf, PEM.
    pub certificate_pem: String,
    /// The private key, PEM.
    pub key_pem: String,
}

/// Who a certificate is for, and what for.
struct Subject<'a> {
    common_name: String,
    organisation: Option<&'a str>,
    names: Vec<SanType>,
    usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Authority {
    /// The authority of the data folder; made at the first start. What it signs is good for `lifetime`.
    pub fn open(dir: &Path, lifetime: Duration) -> Result<Self, PkiError> {
        let (key_path, certificate_path) = (dir.join("ca.key"), dir.join("ca.crt"));
        if !certificate_path.exists() || !key_path.exists() {
            create_ca(&key_path, &certificate_path)?;
        }
        let key_pem = read(&key_path)?;
        let certificate_pem = read(&certificate_path)?;
        let damaged =
            |path: &Path, detail: String| PkiError::Damaged { path: path.to_owned(), detail };
        let key = KeyPair::from_pem(&key_pem).map_err(|e| damaged(&key_path, e.to_string()))?;
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|e| damaged(&certificate_path, e.to_string()))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|e| damaged(&certificate_path, e.to_string()))?;
        Ok(Self { dir: dir.to_owned(), certificate, certificate_pem, issuer, lifetime })
    }

    /// The CA's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The CA's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// A certificate for this service's listener.
    pub fn serving(&self, addresses: &[IpAddr], names: &[String]) -> Result<Credential, PkiError> {
        let dns = names.iter().filter_map(|n| n.clone().try_into().ok()).map(SanType::DnsName);
        self.issue(Subject {
            common_name: "mesh-control".to_owned(),
            organisation: None,
            names: addresses.iter().copied().map(SanType::IpAddress).chain(dns).collect(),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth],
        })
    }

    /// This service's certificate towards agents.
    pub fn client(&self) -> Result<Credential, PkiError> {
        self.issue(client_subject(CONTROL_USER, None))
    }

    /// The join token; its secret is made at the first start.
    pub fn join_token(&self) -> Result<JoinToken, PkiError> {
        let path = self.dir.join("join-token");
        let ca_sha256 = hex::encode(Sha256::digest(&self.certificate));
        if path.exists()
            && let Ok(token) = read(&path)?.parse::<JoinToken>()
            && token.ca_sha256 == ca_sha256
        {
            return Ok(token);
        }
        let secret = hex::encode(rand::rng().random::<[u8; 16]>());
        let token = JoinToken { ca_sha256, secret };
        write(&path, format!("{token}\n"), 0o600)?;
        Ok(token)
    }

    /// Writes the administrator's kubeconfig, unless there is a good one for this server.
    pub fn admin_kubeconfig(&self, server: &str) -> Result<PathBuf, PkiError> {
        let path = self.dir.join("admin.kubeconfig");
        let current = path.exists().then(|| read(&path)).transpose()?;
        let (ca_pem, now) = (&self.certificate_pem, Timestamp::now().as_second());
        if current.is_none_or(|text| !kubeconfig::is_good(&text, server, ca_pem, now)) {
            let admin = self.issue(client_subject("admin", Some(GROUP_ADMINS)))?;
            write(&path, kubeconfig::text(server, ca_pem, &admin), 0o600)?;
        }
        Ok(path)
    }

    /// Signs the key of a node. The request's own subject and names are ignored.
    pub fn node(
        &self,
        csr_pem: &str,
        node: &NodeName,
        addresses: &[IpAddr],
    ) -> Result<String, SigningError> {
        let der = CertificateSigningRequestDer::from_pem_slice(csr_pem.as_bytes())
            .map_err(|_| SigningError::Request(rcgen::Error::CouldNotParseCertificationRequest))?;
        let mut request =
            CertificateSigningRequestParams::from_der(&der).map_err(SigningError::Request)?;
        let name = node.as_str().to_owned().try_into().map_err(SigningError::Certificate)?;
        let addresses = addresses.iter().copied().map(SanType::IpAddress);
        let subject = Subject {
            common_name: format!("{NODE_USER_PREFIX}{node}"),
            organisation: Some(GROUP_NODES),
            names: addresses.chain([SanType::DnsName(name)]).collect(),
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
        };
        request.params = params(subject, self.lifetime);
        let signed = request.signed_by(&self.issuer).map_err(SigningError::Certificate)?;
        Ok(signed.pem())
    }

    fn issue(&self, subject: Subject<'_>) -> Result<Credential, PkiError> {
        let name = subject.common_name.clone();
        let failed = |source| PkiError::Certificate { subject: name.clone(), source };
        let key = KeyPair::generate().map_err(failed)?;
        let leaf = params(subject, self.lifetime).signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Credential {
            chain: vec![leaf.der().clone(), self.certificate.clone()],
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            certificate_pem: leaf.pem(),
            key_pem: key.serialize_pem(),
        })
    }
}

fn client_subject<'a>(common_name: &str, organisation: Option<&'a str>) -> Subject<'a> {
    Subject {
        common_name: common_name.to_owned(),
        organisation,
        names: Vec::new(),
        usages: vec![ExtendedKeyUsagePurpose::ClientAuth],
    }
}

fn params(subject: Subject<'_>, lifetime: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    if let Some(organisation) = subject.organisation {
        params.distinguished_name.push(DnType::OrganizationName, organisation);
    }
    params.distinguished_name.push(DnType::CommonName, subject.common_name);
    params.subject_alt_names = subject.names;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = subject.usages;
    params.use_authority_key_identifier_extension = true;
    limit(&mut params, lifetime);
    params
}

fn create_ca(key_path: &Path, certificate_path: &Path) -> Result<(), PkiError> {
    let failed = |source| PkiError::Certificate { subject: "the CA".to_owned(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "mesh-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    limit(&mut params, CA_LIFETIME);
    let certificate = params.self_signed(&key).map_err(failed)?;
    write(key_path, key.serialize_pem(), 0o600)?;
    write(certificate_path, certificate.pem(), 0o644)
}

/// Makes the certificate good for `lifetime` from now on, and a while before.
fn limit(params: &mut CertificateParams, lifetime: Duration) {
    let since_1970 = u64::try_from(Timestamp::now().as_second()).unwrap_or(0);
    let now = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(since_1970);
    // Of one that is short-lived, most of the life is to come.
    params.not_before = now - BACKDATED.min(lifetime / 8);
    params.not_after = now + lifetime;
}

/// When a certificate is good.
pub(crate) fn validity(certificate: &X509Certificate<'_>) -> Validity {
    let validity = certificate.validity();
    Validity { from: validity.not_before.timestamp(), until: validity.not_after.timestamp() }
}

fn read(path: &Path) -> Result<String, PkiError> {
    let text = String::from_utf8(read_bytes(path)?);
    text.map_err(|e| PkiError::Damaged { path: path.to_owned(), detail: e.to_string() })
}

/// The content of a file of the data folder.
pub(crate) fn read_bytes(path: &Path) -> Result<Vec<u8>, PkiError> {
    fs::read(path).map_err(|source| PkiError::File { doing: "read", path: path.to_owned(), source })
}

/// Replaces a file at once: readers see the old content or the new one.
pub(crate) fn write(path: &Path, content: impl AsRef<[u8]>, mode: u32) -> Result<(), PkiError> {
    let new = path.with_extension("new");
    let put = || {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
        file.write_all(content.as_ref())?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    put().map_err(|source| PkiError::File { doing: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
