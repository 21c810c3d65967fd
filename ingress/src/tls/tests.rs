use mesh_model::ObjectKey;

use super::*;

fn made(secret: &str, names: &[&str], hosts: &[&str]) -> Certificate {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    Certificate {
        secret: ObjectKey::new("web", secret),
        hosts: hosts.iter().map(|h| (*h).to_owned()).collect(),
        chain_pem: made.cert.pem(),
        key_pem: made.signing_key.serialize_pem(),
    }
}

fn leaf(certificate: &Certificate) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(certificate.chain_pem.as_bytes()).unwrap()
}

#[test]
fn an_exact_name_beats_a_wildcard_and_others_get_none() {
    let all = [
        made("a", &["*.example.com", "example.com"], &[]),
        made("b", &["www.example.com"], &[]),
        made("c", &["ignored.example.org"], &["Listed.example.org"]),
    ];
    let (table, problems) = CertificateTable::new(&all);
    assert!(problems.is_empty());
    assert_eq!(table.count, 3);
    let found = |name: &str| table.find(name).map(|key| key.cert[0].clone());
    assert_eq!(found("www.example.com"), Some(leaf(&all[1])));
    assert_eq!(found("api.example.com"), Some(leaf(&all[0])));
    assert_eq!(found("example.com"), Some(leaf(&all[0])));
    assert_eq!(found("listed.example.org"), Some(leaf(&all[2])));
    for none in ["a.b.example.com", "ignored.example.org", "com", ""] {
        assert_eq!(found(none), None, "{none}");
    }
}

#[test]
fn of_two_for_a_name_the_first_secret_counts_in_any_order() {
    let (a, b) = (made("a", &["x.y"], &[]), made("b", &["x.y"], &[]));
    for order in [[a.clone(), b.clone()], [b, a.clone()]] {
        let (table, _) = CertificateTable::new(&order);
        assert_eq!(table.find("x.y").unwrap().cert[0], leaf(&a));
    }
}

#[test]
fn a_broken_certificate_is_reported_and_the_others_work() {
    let good = made("good", &["good.test"], &[]);
    let mut mismatch = made("mismatch", &["m.test"], &[]);
    mismatch.key_pem = good.key_pem.clone();
    let mut no_chain = made("no-chain", &["n.test"], &[]);
    no_chain.chain_pem = "not pem".into();
    let mut no_key = made("no-key", &["k.test"], &[]);
    no_key.key_pem.clear();
    let mut torn = made("torn", &["t.test"], &["t.test"]);
    torn.chain_pem.truncate(120);
    let mut wrong = made("wrong", &["w.test"], &[]);
    wrong.chain_pem = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into();
    let all = [mismatch, no_chain, no_key, torn, wrong, good];
    let (table, problems) = CertificateTable::new(&all);
    assert_eq!(table.count, 1);
    assert!(table.find("good.test").is_some());
    let objects: Vec<_> = problems.iter().map(|p| p.object.as_str()).collect();
    let expected = ["mismatch", "no-chain", "no-key", "torn", "wrong"];
    assert_eq!(objects, expected.map(|name| format!("secret web/{name}")));
    for problem in &problems {
        assert!(!problem.reason.contains("PRIVATE"), "{}", problem.reason);
    }
}
