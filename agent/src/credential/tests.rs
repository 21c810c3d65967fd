use rcgen::DnType;

use super::ca::{ALWAYS, Ca};
use super::*;

fn two() -> [Credential; 2] {
    let ca = Ca::new();
    ["a", "b"].map(|name| ca.sign(DnType::CommonName, name, ALWAYS))
}

fn certificate(folder: &Path) -> Option<String> {
    Credential::load(folder).map(|credential| credential.certificate_pem)
}

#[test]
fn at_every_moment_there_is_a_certificate_that_fits_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let both = two();
    both[0].keep(dir.path()).unwrap();
    // What is there at a moment is what a kill at this moment leaves.
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            for turn in 0..200 {
                both[turn % 2].keep(dir.path()).unwrap();
            }
        });
        while !writing.is_finished() {
            let found = certificate(dir.path()).expect("one of them");
            assert!(both.iter().any(|one| one.certificate_pem == found));
        }
    });
    // A write that did not get far.
    fs::write(dir.path().join("node.new"), &both[0].key_pem).unwrap();
    assert_eq!(certificate(dir.path()), Some(both[1].certificate_pem.clone()));
}

#[test]
fn what_earlier_agents_kept_apart_counts_until_there_is_something_newer() {
    let dir = tempfile::tempdir().unwrap();
    let [old, new] = two();
    let apart = [("node.key", &old.key_pem), ("node.crt", &old.certificate_pem)];
    for (name, content) in apart {
        assert_eq!(certificate(dir.path()), None);
        fs::write(dir.path().join(name), content).unwrap();
    }
    assert_eq!(certificate(dir.path()), Some(old.certificate_pem.clone()));
    fs::write(dir.path().join("node.crt"), &new.certificate_pem).unwrap();
    assert_eq!(certificate(dir.path()), None, "a certificate of another key");
    new.keep(dir.path()).unwrap();
    assert_eq!(certificate(dir.path()), Some(new.certificate_pem.clone()));
    let files = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(files.collect::<Vec<_>>(), ["node.pem"]);
}

#[test]
fn a_credential_is_refused_in_parts_and_prints_no_key() {
    let [one, other] = two();
    let of = |key: &str, certificate: &str| Credential::new(key.to_owned(), certificate.to_owned());
    assert!(of(&one.key_pem, &one.certificate_pem).is_ok());
    assert!(of(&other.key_pem, &one.certificate_pem).is_err());
    assert!(of("", &one.certificate_pem).is_err() && of(&one.key_pem, "").is_err());
    assert_eq!(one.validity, ALWAYS);
    assert_eq!(format!("{one:?}"), format!("Credential {{ validity: {ALWAYS:?}, .. }}"));
}
