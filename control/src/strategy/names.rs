//! The rules for names, labels and annotations, in the words that people know from Kubernetes.

use std::collections::BTreeMap;

use mesh_model::kinds::Kind;
use mesh_model::names::{is_label, is_subdomain};

use super::Causes;

const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
/// All annotations of an object together.
const ANNOTATION_BYTES: usize = 256 << 10;

/// Whether `name` is an RFC 1035 label: as RFC 1123, starting with a letter.
pub fn is_label_1035(name: &str) -> bool {
    is_label(name) && name.starts_with(|c: char| c.is_ascii_lowercase())
}

/// Whether `name` is an optional DNS prefix with `/`, and a name of at most 63 characters.
pub fn is_qualified(name: &str) -> bool {
    match name.split_once('/') {
        Some((prefix, rest)) => is_subdomain(prefix) && is_plain(rest) && !rest.contains('/'),
        None => is_plain(name),
    }
}

/// Letters, digits, `-`, `_`, `.`; a letter or digit at both ends; 1 to 63 characters.
fn is_plain(name: &str) -> bool {
    let edge = |b: &u8| b.is_ascii_alphanumeric();
    name.len() <= 63
        && name.as_bytes().first().is_some_and(edge)
        && name.as_bytes().last().is_some_and(edge)
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Whether `value` can be the value of a label.
pub fn is_label_value(value: &str) -> bool {
    value.is_empty() || is_plain(value)
}

/// Checks the name of an object by the rule of its kind.
pub fn object_name(kind: &Kind, name: &str, causes: &mut Causes) {
    let (good, rule, most) = match kind.plural {
        "services" => (is_label_1035(name), LABEL_1035, 63),
        // Of it follow host names of pods.
        "statefulsets" => (is_label(name), LABEL, 63),
        "namespaces" => (is_label(name), LABEL, 63),
        _ => (is_subdomain(name), SUBDOMAIN, 253),
    };
    if name.len() > most {
        causes.add(
            "metadata.name",
            format!("Invalid value: {name:?}: must be no more than {most} bytes"),
        );
    } else if !good {
        causes.add("metadata.name", format!("Invalid value: {name:?}: {rule}"));
    }
}

/// Checks a field that must be an RFC 1123 label.
pub fn label(field: &str, name: &str, causes: &mut Causes) {
    if !is_label(name) {
        causes.add(field, format!("Invalid value: {name:?}: {LABEL}"));
    }
}

/// Checks a field that must be an RFC 1123 subdomain.
pub fn subdomain(field: &str, name: &str, causes: &mut Causes) {
    if !is_subdomain(name) {
        causes.add(field, format!("Invalid value: {name:?}: {SUBDOMAIN}"));
    }
}

/// Checks labels: keys and values.
pub fn labels(field: &str, labels: Option<&BTreeMap<String, String>>, causes: &mut Causes) {
    for (key, value) in labels.into_iter().flatten() {
        if !is_qualified(key) {
            causes.add(field, format!("Invalid value: {key:?}: {QUALIFIED}"));
        }
        if value.len() > 63 {
            let text = format!("Invalid value: {value:?}: must be no more than 63 bytes");
            causes.add(field, text);
        } else if !is_label_value(value) {
            causes.add(field, format!("Invalid value: {value:?}: {LABEL_VALUE}"));
        }
    }
}

/// Checks annotations: keys, and the size of all.
pub fn annotations(field: &str, all: Option<&BTreeMap<String, String>>, causes: &mut Causes) {
    let mut bytes = 0;
    for (key, value) in all.into_iter().flatten() {
        bytes += key.len() + value.len();
        if !is_qualified(&key.to_ascii_lowercase()) {
            causes.add(field, format!("Invalid value: {key:?}: {QUALIFIED}"));
        }
    }
    if bytes > ANNOTATION_BYTES {
        causes.add(field, format!("Too long: may not be more than {ANNOTATION_BYTES} bytes"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualified_names_have_an_optional_dns_prefix() {
        for good in ["a", "App", "app.kubernetes.io/name", "x_y.z-1", "mesh.dev/A_b"] {
            assert!(is_qualified(good), "{good}");
        }
        for bad in ["", "/", "a/", "/a", "A.b/c", "a/b/c", "-a", "a-", "a b", &"x".repeat(64)] {
            assert!(!is_qualified(bad), "{bad}");
        }
        assert!(is_label_value("") && !is_label_value("a "));
        assert!(is_label_1035("a1") && !is_label_1035("1a"));
    }
}
