//! ConfigMaps, Secrets, ServiceAccounts, Events.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Secret, ServiceAccount};

use mesh_model::wellknown::ANNOTATION_ROLE;

use super::rules::{forbidden, invalid, one_of, required};
use super::{Causes, Object};

const KEY_RULE: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";
/// All values of one object together.
const LIMIT_BYTES: usize = 1 << 20;
const FROZEN: &str = "field is immutable when `immutable` is set";

fn key(field: &str, key: &str, causes: &mut Causes) {
    let good = !key.is_empty()
        && key.len() <= 253
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if !good {
        invalid(format!("{field}[{key}]"), key, KEY_RULE, causes);
    } else if key == "." || key == ".." {
        invalid(format!("{field}[{key}]"), key, &format!("must not be '{key}'"), causes);
    }
}

fn size(field: &str, bytes: usize, causes: &mut Causes) {
    if bytes > LIMIT_BYTES {
        causes.add(field, format!("Too long: may not be more than {LIMIT_BYTES} bytes"));
    }
}

fn bytes_of(data: Option<&BTreeMap<String, ByteString>>) -> usize {
    data.into_iter().flatten().map(|(k, v)| k.len() + v.0.len()).sum()
}

impl Object for ConfigMap {
    fn validate(&self, causes: &mut Causes) {
        for name in self.data.iter().flatten().map(|(k, _)| k) {
            key("data", name, causes);
            if self.binary_data.as_ref().is_some_and(|b| b.contains_key(name)) {
                invalid(
                    format!("data[{name}]"),
                    name,
                    "duplicate of key present in binaryData",
                    causes,
                );
            }
        }
        for name in self.binary_data.iter().flatten().map(|(k, _)| k) {
            key("binaryData", name, causes);
        }
        let text: usize = self.data.iter().flatten().map(|(k, v)| k.len() + v.len()).sum();
        size("data", text + bytes_of(self.binary_data.as_ref()), causes);
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        if old.immutable != Some(true) {
            return;
        }
        if self.immutable != Some(true) {
            forbidden("immutable", FROZEN, causes);
        }
        if self.data != old.data {
            forbidden("data", FROZEN, causes);
        }
        if self.binary_data != old.binary_data {
            forbidden("binaryData", FROZEN, causes);
        }
    }
}

impl Object for Secret {
    fn set_defaults(&mut self) {
        self.type_ = self.type_.take().filter(|t| !t.is_empty());
        self.type_.get_or_insert_with(|| "Opaque".to_owned());
        // Write-only: what is read back is in `data`.
        for (name, value) in self.string_data.take().into_iter().flatten() {
            self.data.get_or_insert_default().insert(name, ByteString(value.into_bytes()));
        }
    }

    fn validate(&self, causes: &mut Causes) {
        for name in self.data.iter().flatten().map(|(k, _)| k) {
            key("data", name, causes);
        }
        size("data", bytes_of(self.data.as_ref()), causes);
        let needed: &[&str] = match self.type_.as_deref() {
            Some("kubernetes.io/tls") => &["tls.crt", "tls.key"],
            Some("kubernetes.io/dockerconfigjson") => &[".dockerconfigjson"],
            Some("kubernetes.io/ssh-auth") => &["ssh-privatekey"],
            _ => &[],
        };
        for name in needed {
            if !self.data.as_ref().is_some_and(|d| d.contains_key(*name)) {
                required(format!("data[{name}]"), causes);
            }
        }
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        if self.type_ != old.type_ {
            let type_ = self.type_.as_deref().unwrap_or_default();
            invalid("type", type_, "field is immutable", causes);
        }
        if old.immutable != Some(true) {
            return;
        }
        if self.immutable != Some(true) {
            forbidden("immutable", FROZEN, causes);
        }
        if self.data != old.data {
            forbidden("data", FROZEN, causes);
        }
    }
}

impl Object for ServiceAccount {
    fn validate(&self, causes: &mut Causes) {
        let role = self.metadata.annotations.as_ref().and_then(|all| all.get(ANNOTATION_ROLE));
        let field = format!("metadata.annotations[{ANNOTATION_ROLE}]");
        one_of(&field, role.map(String::as_str), &crate::api::role::NAMES, causes);
    }
}

impl Object for Event {
    fn validate(&self, causes: &mut Causes) {
        let about = self.involved_object.namespace.as_deref().unwrap_or_default();
        let own = self.metadata.namespace.as_deref().unwrap_or_default();
        // Events about cluster-wide objects are kept in `default`.
        if about != own && !(about.is_empty() && matches!(own, "default" | "kube-system")) {
            invalid("involvedObject.namespace", about, "does not match event.namespace", causes);
        }
        let type_ = self.type_.as_deref().filter(|t| !t.is_empty());
        one_of("type", type_, &["Normal", "Warning"], causes);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn causes(object: &impl Object) -> Vec<String> {
        let mut causes = Causes::default();
        object.validate(&mut causes);
        causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn secrets_keep_text_as_bytes_and_need_the_keys_of_their_type() {
        let value =
            json!({"metadata": {}, "type": "kubernetes.io/tls", "stringData": {"tls.crt": "x"}});
        let mut secret: Secret = serde_json::from_value(value).unwrap();
        secret.set_defaults();
        assert_eq!(secret.string_data, None);
        assert_eq!(secret.data.as_ref().unwrap()["tls.crt"].0, b"x");
        assert_eq!(causes(&secret), ["data[tls.key]: Required value"]);
    }

    #[test]
    fn keys_and_sizes() {
        let map = |data| ConfigMap { data: Some(BTreeMap::from(data)), ..ConfigMap::default() };
        assert!(causes(&map([("a.b_c-1".to_owned(), String::new())])).is_empty());
        assert_eq!(causes(&map([("a b".to_owned(), String::new())])).len(), 1);
        assert_eq!(causes(&map([("..".to_owned(), String::new())])).len(), 1);
        assert_eq!(causes(&map([("a".to_owned(), "x".repeat(LIMIT_BYTES + 1))])).len(), 1);
    }
}
