use std::os::unix::fs::PermissionsExt as _;

use x509_parser::prelude::*;

use super::*;

#[test]
fn the_authority_and_its_files_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let first = Authority::open(dir.path(), DEFAULT_LIFETIME).unwrap();
    let token = first.join_token().unwrap();
    let path = first.admin_kubeconfig("https://192.0.2.1:6443").unwrap();
    let text = fs::read_to_string(&path).unwrap();
    for secret in ["ca.key", "join-token", "admin.kubeconfig"] {
        let mode = fs::metadata(dir.path().join(secret)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{secret}");
    }
    let second = Authority::open(dir.path(), DEFAULT_LIFETIME).unwrap();
    assert_eq!(second.certificate_pem(), first.certificate_pem());
    assert_eq!(second.join_token().unwrap(), token);
    second.admin_kubeconfig("https://192.0.2.1:6443").unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), text, "a good kubeconfig stays");
    second.admin_kubeconfig("https://192.0.2.2:6443").unwrap();
    assert_ne!(fs::read_to_string(&path).unwrap(), text, "another server needs another one");
}

#[test]
fn a_node_gets_the_name_that_it_may_have_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path(), DEFAULT_LIFETIME).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut wish = CertificateParams::new(vec!["mesh-control".to_owned()]).unwrap();
    wish.distinguished_name.push(DnType::OrganizationName, GROUP_ADMINS);
    let csr = wish.serialize_request(&key).unwrap().pem().unwrap();
    let node = "node-1".parse().unwrap();
    let pem = authority.node(&csr, &node, &["192.0.2.7".parse().unwrap()]).unwrap();
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let (_, certificate) = X509Certificate::from_der(&der).unwrap();
    assert_eq!(certificate.subject().to_string(), "O=system:nodes, CN=system:node:node-1");
    assert_eq!(certificate.public_key().subject_public_key.data.as_ref(), key.public_key_raw());
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 2);
    let usage = certificate.extended_key_usage().unwrap().unwrap();
    assert!(usage.value.client_auth && usage.value.server_auth);
    assert!(!certificate.is_ca());
    for bad in ["", "nonsense", &csr[..csr.len() / 2]] {
        assert!(authority.node(bad, &node, &[]).is_err());
    }
}

#[test]
fn the_administrators_certificate_is_replaced_when_a_third_of_its_life_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::open(dir.path(), Duration::from_secs(80_000)).unwrap();
    let der = authority.client().unwrap().chain[0].clone();
    let made = validity(&X509Certificate::from_der(&der).unwrap().1);
    assert_eq!(made.life(), 90_000, "an eighth of it is for clocks that are behind");

    let (server, ca) = ("https://192.0.2.1:6443", authority.certificate_pem());
    let text = fs::read_to_string(authority.admin_kubeconfig(server).unwrap()).unwrap();
    let is_good = |after: i64| kubeconfig::is_good(&text, server, ca, made.from + after);
    assert_eq!([100, 59_900, 60_100, 89_900].map(is_good), [true, true, false, false]);
    assert!(!is_good(-100), "nor does one count that is not good yet");
}
