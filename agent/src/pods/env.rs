//! The environment of a container: Services, `envFrom`, `env`, in that order, a later one wins.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVarSource};
use mesh_model::snapshot::PodWork;

use super::expand::expand;
use super::facts::{self, FactError, Facts};

/// Why a container cannot be configured. Shown to people as `CreateContainerConfigError`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EnvError {
    #[error("{kind} \"{name}\" not found")]
    NoObject { kind: &'static str, name: String },
    #[error("couldn't find key {key} in {kind} \"{name}\"")]
    NoKey { kind: &'static str, name: String, key: String },
    #[error("key {key} in {kind} \"{name}\" is not UTF-8 text")]
    NotText { kind: &'static str, name: String, key: String },
    #[error("environment variable {variable}: {cause}")]
    Fact { variable: String, cause: FactError },
}

const CONFIG_MAP: &str = "configmap";
const SECRET: &str = "secret";

/// The variables of a container, in the order in which they were first defined.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    names: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Environment {
    fn set(&mut self, name: &str, value: String) {
        if self.values.insert(name.to_owned(), value).is_none() {
            self.names.push(name.to_owned());
        }
    }

    /// The value of a variable.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Name and value of each variable.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.names.iter().map(|name| (name.as_str(), self.values[name].as_str()))
    }
}

/// Resolves all references of a container.
pub(crate) fn environment(
    work: &PodWork,
    container: &Container,
    facts: &Facts,
) -> Result<Environment, EnvError> {
    let mut env = Environment::default();
    for (name, value) in &work.service_env {
        env.set(name, value.clone());
    }
    for source in container.env_from.iter().flatten() {
        from_object(work, source, &mut env)?;
    }
    for var in container.env.iter().flatten() {
        let value = match (&var.value, &var.value_from) {
            (_, Some(source)) => one(work, container, facts, &var.name, source)?,
            (value, None) => {
                let text = value.as_deref().unwrap_or_default();
                Some(expand(text, |name| env.value(name)))
            }
        };
        if let Some(value) = value {
            env.set(&var.name, value);
        }
    }
    Ok(env)
}

fn from_object(
    work: &PodWork,
    source: &EnvFromSource,
    env: &mut Environment,
) -> Result<(), EnvError> {
    let prefix = source.prefix.as_deref().unwrap_or_default();
    let object = if let Some(r) = &source.config_map_ref {
        Object::config_map(work, &r.name, r.optional)
    } else if let Some(r) = &source.secret_ref {
        Object::secret(work, &r.name, r.optional)
    } else {
        return Ok(());
    };
    // A key that cannot be a variable's name is left out; the others still serve.
    for (key, value) in object.values()?.filter(|(key, _)| !key.is_empty() && !key.contains('=')) {
        match object.text(key, value) {
            // It is `binaryData` of a pod that an earlier version saved.
            Err(_) if object.kind == CONFIG_MAP => {}
            value => env.set(&format!("{prefix}{key}"), value?),
        }
    }
    Ok(())
}

fn one(
    work: &PodWork,
    container: &Container,
    facts: &Facts,
    variable: &str,
    source: &EnvVarSource,
) -> Result<Option<String>, EnvError> {
    let fact = |cause| EnvError::Fact { variable: variable.to_owned(), cause };
    if let Some(r) = &source.config_map_key_ref {
        return Object::config_map(work, &r.name, r.optional).value(&r.key);
    }
    if let Some(r) = &source.secret_key_ref {
        return Object::secret(work, &r.name, r.optional).value(&r.key);
    }
    if let Some(r) = &source.field_ref {
        return facts::field(&work.pod, facts, r).map(Some).map_err(fact);
    }
    if let Some(r) = &source.resource_field_ref {
        let named = r.container_name.as_deref().filter(|name| !name.is_empty());
        let container = named.map_or(Ok(container), |name| facts::container(&work.pod, name));
        let value = container.and_then(|container| facts::resource(container, facts, r));
        return value.map(Some).map_err(fact);
    }
    Ok(None)
}

/// What variables are taken from.
struct Object<'w> {
    kind: &'static str,
    name: &'w str,
    /// It need not exist, nor have the key.
    optional: bool,
    values: Option<&'w BTreeMap<String, Vec<u8>>>,
    /// Keys that are for files only.
    binary: Option<&'w BTreeSet<String>>,
}

impl<'w> Object<'w> {
    fn config_map(work: &'w PodWork, name: &'w str, optional: Option<bool>) -> Self {
        let (values, binary) = (work.config_maps.get(name), work.binary_keys.get(name));
        Self { kind: CONFIG_MAP, name, optional: optional == Some(true), values, binary }
    }

    fn secret(work: &'w PodWork, name: &'w str, optional: Option<bool>) -> Self {
        let values = work.secrets.get(name);
        Self { kind: SECRET, name, optional: optional == Some(true), values, binary: None }
    }

    /// Keys and values that may become variables.
    fn values(&self) -> Result<impl Iterator<Item = (&'w String, &'w Vec<u8>)>, EnvError> {
        if self.values.is_none() && !self.optional {
            return Err(EnvError::NoObject { kind: self.kind, name: self.name.to_owned() });
        }
        let (values, binary) = (self.values, self.binary);
        let is_text = move |key: &String| binary.is_none_or(|keys| !keys.contains(key));
        Ok(values.into_iter().flatten().filter(move |(key, _)| is_text(key)))
    }

    fn value(&self, key: &str) -> Result<Option<String>, EnvError> {
        match self.values()?.find(|(name, _)| *name == key) {
            Some((_, value)) => self.text(key, value).map(Some),
            None if self.optional => Ok(None),
            None => {
                let (kind, name, key) = (self.kind, self.name.to_owned(), key.to_owned());
                Err(EnvError::NoKey { kind, name, key })
            }
        }
    }

    fn text(&self, key: &str, value: &[u8]) -> Result<String, EnvError> {
        String::from_utf8(value.to_vec()).map_err(|_| EnvError::NotText {
            kind: self.kind,
            name: self.name.to_owned(),
            key: key.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(container: serde_json::Value) -> PodWork {
        let pod = serde_json::json!({
            "metadata": {"name": "web", "namespace": "shop"}, "spec": {"containers": [container]}
        });
        let values = |pairs: &[(&str, &str)]| -> BTreeMap<String, Vec<u8>> {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect()
        };
        PodWork {
            pod: serde_json::from_value(pod).unwrap(),
            config_maps: [("settings".to_owned(), values(&[("color", "green"), ("a=b", "x")]))]
                .into(),
            binary_keys: Default::default(),
            secrets: [("keys".to_owned(), values(&[("token", "s3cret")]))].into(),
            service_env: [("WEB_SERVICE_HOST".to_owned(), "10.96.0.9".to_owned())].into(),
            departure: None,
        }
    }

    fn resolve(container: serde_json::Value) -> Result<Vec<(String, String)>, EnvError> {
        let work = work(container);
        let container = &work.pod.spec.as_ref().unwrap().containers[0];
        let env = environment(&work, container, &Facts::default())?;
        Ok(env.pairs().map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    fn expected(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn sources_are_layered_and_expanded() {
        let env = resolve(serde_json::json!({"name": "c",
        "envFrom": [{"prefix": "CFG_", "configMapRef": {"name": "settings"}}],
        "env": [
            {"name": "HOST", "value": "http://$(WEB_SERVICE_HOST)/$(CFG_color)$(LATER)"},
            {"name": "LATER", "value": "x"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}}},
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "NONE", "valueFrom": {"configMapKeyRef": {"name": "gone", "key": "x", "optional": true}}},
            {"name": "WEB_SERVICE_HOST", "value": "own"}
        ]}));
        let want = expected(&[
            ("WEB_SERVICE_HOST", "own"),
            ("CFG_color", "green"),
            ("HOST", "http://10.96.0.9/green$(LATER)"),
            ("LATER", "x"),
            ("TOKEN", "s3cret"),
            ("POD", "web"),
        ]);
        assert_eq!(env, Ok(want));
    }

    #[test]
    fn what_is_for_files_is_no_variable_and_what_is_no_text_is_missed_in_a_secret() {
        let of = |container: serde_json::Value| {
            let mut work = work(container);
            let values: BTreeMap<String, Vec<u8>> = [
                ("color".to_owned(), b"green".to_vec()),
                ("logo.png".to_owned(), b"\x89PNG\r\n".to_vec()),
                ("logo.svg".to_owned(), b"<svg/>".to_vec()),
            ]
            .into();
            work.secrets = [("settings".to_owned(), values.clone())].into();
            work.config_maps = [("settings".to_owned(), values)].into();
            let binary = ["logo.png", "logo.svg"].map(str::to_owned);
            work.binary_keys = [("settings".to_owned(), binary.into())].into();
            let container = &work.pod.spec.as_ref().unwrap().containers[0];
            let env = environment(&work, container, &Facts::default())?;
            Ok::<_, EnvError>(env.pairs().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>())
        };
        let from = |source: &str| {
            of(serde_json::json!({"name": "c", "envFrom": [{source: {"name": "settings"}}]}))
        };
        let all = from("configMapRef").unwrap();
        assert_eq!(all, ["WEB_SERVICE_HOST=10.96.0.9", "color=green"]);
        let why = from("secretRef").unwrap_err().to_string();
        assert_eq!(why, "key logo.png in secret \"settings\" is not UTF-8 text");
        let key = |source: &str, key: &str, optional: bool| {
            let reference =
                serde_json::json!({"name": "settings", "key": key, "optional": optional});
            let env = serde_json::json!([{"name": "X", "valueFrom": {source: reference}}]);
            of(serde_json::json!({"name": "c", "env": env})).map(|all| all[1..].join(" "))
        };
        assert_eq!(key("configMapKeyRef", "color", false).as_deref(), Ok("X=green"));
        let why = key("configMapKeyRef", "logo.svg", false).unwrap_err().to_string();
        assert_eq!(why, "couldn't find key logo.svg in configmap \"settings\"");
        assert_eq!(key("configMapKeyRef", "logo.svg", true).as_deref(), Ok(""));
        assert_eq!(key("secretKeyRef", "logo.svg", false).as_deref(), Ok("X=<svg/>"));
    }

    #[test]
    fn binary_data_that_an_earlier_version_saved_is_no_variable() {
        let mut work =
            work(serde_json::json!({"name": "c", "envFrom": [{"configMapRef": {"name": "m"}}]}));
        let values = [("logo.png".to_owned(), b"\x89PNG\r\n".to_vec())].into();
        work.config_maps = [("m".to_owned(), values)].into();
        let container = &work.pod.spec.as_ref().unwrap().containers[0];
        let env = environment(&work, container, &Facts::default()).unwrap();
        assert_eq!(env.value("logo.png"), None);
    }

    #[test]
    fn resources_may_be_those_of_another_container() {
        let mut work = work(serde_json::json!({"name": "c", "env": [
            {"name": "OWN", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
            {"name": "ITS", "valueFrom": {"resourceFieldRef": {"containerName": "d", "resource": "limits.cpu"}}}],
            "resources": {"limits": {"cpu": "1"}}}));
        let resolve = |work: &PodWork| {
            let container = &work.pod.spec.as_ref().unwrap().containers[0];
            environment(work, container, &Facts::default())
        };
        let error = resolve(&work).unwrap_err().to_string();
        assert!(error.contains("containerName \"d\" does not exist"), "{error}");
        let other = serde_json::json!({"name": "d", "resources": {"limits": {"cpu": "2"}}});
        let other = serde_json::from_value(other).unwrap();
        work.pod.spec.as_mut().unwrap().containers.push(other);
        let env = resolve(&work).unwrap();
        assert_eq!((env.value("OWN"), env.value("ITS")), (Some("1"), Some("2")));
    }

    #[test]
    fn references_to_nothing_are_named() {
        let from = |source: serde_json::Value| {
            resolve(serde_json::json!({"name": "c", "env": [{"name": "X", "valueFrom": source}]}))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            from(serde_json::json!({"configMapKeyRef": {"name": "nope", "key": "k"}})),
            "configmap \"nope\" not found"
        );
        assert_eq!(
            from(serde_json::json!({"secretKeyRef": {"name": "keys", "key": "k"}})),
            "couldn't find key k in secret \"keys\""
        );
        let all =
            resolve(serde_json::json!({"name": "c", "envFrom": [{"secretRef": {"name": "nope"}}]}));
        assert!(all.is_err());
        let optional = resolve(serde_json::json!({"name": "c",
            "envFrom": [{"secretRef": {"name": "nope", "optional": true}}]}));
        assert!(optional.is_ok());
    }
}
