//! The administrator's kubeconfig.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{Credential, validity};

/// A kubeconfig for `server`, with everything inline.
pub(super) fn text(server: &str, ca_pem: &str, admin: &Credential) -> String {
    format!(
        "apiVersion: v1
kind: Config
clusters:
- name: mesh
  cluster:
    server: {server}
    certificate-authority-data: {ca}
users:
- name: admin
  user:
    client-certificate-data: {certificate}
    client-key-data: {key}
contexts:
- name: mesh
  context:
    cluster: mesh
    user: admin
current-context: mesh
",
        ca = STANDARD.encode(ca_pem),
        certificate = STANDARD.encode(&admin.certificate_pem),
        key = STANDARD.encode(&admin.key_pem),
    )
}

/// Whether a kubeconfig is for that server and CA, with a certificate that need not be renewed yet.
pub(super) fn is_good(text: &str, server: &str, ca_pem: &str, now: i64) -> bool {
    let value =
        |key: &str| text.lines().find_map(|line| line.trim().strip_prefix(key)?.strip_prefix(": "));
    let validity = value("client-certificate-data")
        .and_then(|data| STANDARD.decode(data).ok())
        .and_then(|pem| x509_parser::pem::parse_x509_pem(&pem).ok().map(|(_, pem)| pem))
        .and_then(|pem| pem.parse_x509().ok().map(|certificate| validity(&certificate)));
    // As late as possible: whoever has copied the file has to copy it again.
    validity.is_some_and(|validity| validity.holds(now) && now < validity.renew_at(u8::MAX))
        && value("server") == Some(server)
        && value("certificate-authority-data") == Some(STANDARD.encode(ca_pem).as_str())
        && value("client-key-data").is_some()
}
