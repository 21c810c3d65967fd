//! Names as types, so that a pod is never looked up by a node's name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name broke the rule of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid name {name:?}: {rule}")]
pub struct InvalidName {
    /// The name as given.
    pub name: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

/// The rule of RFC 1123 labels: what most Kubernetes names and all DNS labels obey.
pub const LABEL_RULE: &str =
    "must be 1 to 63 lower-case letters, digits or '-', and start and end with a letter or digit";

/// The rule of RFC 1123 subdomains: labels joined by dots, at most 253 characters.
pub const SUBDOMAIN_RULE: &str =
    "must be labels of lower-case letters, digits or '-', joined by '.', at most 253 characters";

/// Whether `name` is an RFC 1123 label.
pub fn is_label(name: &str) -> bool {
    let bytes = name.as_bytes();
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    matches!(bytes, [first, .., last] if edge(*first) && edge(*last))
        && bytes.len() <= 63
        && bytes.iter().all(|b| edge(*b) || *b == b'-')
        || matches!(bytes, [only] if edge(*only))
}

/// Whether `name` is an RFC 1123 subdomain.
pub fn is_subdomain(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_label)
}

/// The name of a node: an RFC 1123 subdomain, unique in the cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

impl NodeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        if is_subdomain(name) {
            Ok(Self(name.to_owned()))
        } else {
            Err(InvalidName { name: name.to_owned(), rule: SUBDOMAIN_RULE })
        }
    }
}

impl TryFrom<String> for NodeName {
    type Error = InvalidName;

    fn try_from(name: String) -> Result<Self, InvalidName> {
        name.parse()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Namespace and name of a namespaced object. Written `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectKey {
    /// The namespace.
    pub namespace: String,
    /// The name inside the namespace.
    pub name: String,
}

impl ObjectKey {
    /// A key of its two parts; the API has validated them.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl TryFrom<String> for ObjectKey {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
                Ok(Self::new(namespace, name))
            }
            _ => Err(InvalidName { name: text, rule: "must be namespace/name" }),
        }
    }
}

impl From<ObjectKey> for String {
    fn from(key: ObjectKey) -> Self {
        key.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_and_subdomains_follow_rfc_1123() {
        for good in ["a", "a1", "a-b", &"x".repeat(63)] {
            assert!(is_label(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"x".repeat(64)] {
            assert!(!is_label(bad), "{bad}");
        }
        assert!(is_subdomain("node-1.example.org"));
        for bad in ["", ".", "a..b", "a.", &"a.".repeat(127)] {
            assert!(!is_subdomain(bad), "{bad}");
        }
    }

    #[test]
    fn keys_round_trip_through_json() {
        let key = ObjectKey::new("default", "web");
        let json = serde_json::to_string(&key).unwrap();
        assert_eq!(json, "\"default/web\"");
        assert_eq!(serde_json::from_str::<ObjectKey>(&json).unwrap(), key);
        assert!(serde_json::from_str::<ObjectKey>("\"web\"").is_err());
        assert!(serde_json::from_str::<NodeName>("\"Node 1\"").is_err());
    }
}
