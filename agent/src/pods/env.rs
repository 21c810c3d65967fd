//! The environment of a container: Services, `envFrom`, `env`, in that order, a later one wins.

use std::collections::BTreeMap;

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
    let (kind, name, optional, values) = if let Some(r) = &source.config_map_ref {
        (CONFIG_MAP, &r.name, r.optional, work.config_maps.get(&r.name))
    } else if let Some(r) = &source.secret_ref {
        (SECRET, &r.name, r.optional, work.secrets.get(&r.name))
    } else {
        return Ok(());
    };
    let Some(values) = values else {
        return missing(kind, name, optional).map(drop);
    };
    // A key that cannot be a variable's name is left out; the others still serve.
    for (key, value) in values.iter().filter(|(key, _)| !key.is_empty() && !key.contains('=')) {
        match text(kind, name, key, value) {
            // It is `binaryData`, which is for files.
            Err(_) if kind == CONFIG_MAP => {}
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
        return key(CONFIG_MAP, &r.name, &r.key, r.optional, work.config_maps.get(&r.name));
    }
    if let Some(r) = &source.secret_key_ref {
        return key(SECRET, &r.name, &r.key, r.optional, work.secrets.get(&r.name));
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

fn key(
    kind: &'static str,
    name: &str,
    key: &str,
    optional: Option<bool>,
    values: Option<&BTreeMap<String, Vec<u8>>>,
) -> Result<Option<String>, EnvError> {
    let Some(values) = values else { return missing(kind, name, optional) };
    match values.get(key) {
        Some(value) => text(kind, name, key, value).map(Some),
        None if optional == Some(true) => Ok(None),
        None => Err(EnvError::NoKey { kind, name: name.to_owned(), key: key.to_owned() }),
    }
}

fn missing(
    kind: &'static str,
    name: &str,
    optional: Option<bool>,
) -> Result<Option<String>, EnvError> {
    if optional == Some(true) {
        return Ok(None);
    }
    Err(EnvError::NoObject { kind, name: name.to_owned() })
}

fn text(kind: &'static str, name: &str, key: &str, value: &[u8]) -> Result<String, EnvError> {
    String::from_utf8(value.to_vec()).map_err(|_| EnvError::NotText {
        kind,
        name: name.to_owned(),
        key: key.to_owned(),
    })
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
    fn what_is_no_text_is_left_out_of_a_config_map_and_missed_in_a_secret() {
        let from = |source: &str| {
            let mut work =
                work(serde_json::json!({"name": "c", "envFrom": [{source: {"name": "settings"}}]}));
            let values: BTreeMap<String, Vec<u8>> = [
                ("color".to_owned(), b"green".to_vec()),
                ("logo.png".to_owned(), b"\x89PNG\r\n".to_vec()),
            ]
            .into();
            work.secrets = [("settings".to_owned(), values.clone())].into();
            work.config_maps = [("settings".to_owned(), values)].into();
            let container = &work.pod.spec.as_ref().unwrap().containers[0];
            let env = environment(&work, container, &Facts::default())?;
            Ok(env.pairs().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>())
        };
        let of_map: Result<_, EnvError> = from("configMapRef");
        assert_eq!(of_map.unwrap(), ["WEB_SERVICE_HOST=10.96.0.9", "color=green"]);
        let why = from("secretRef").unwrap_err().to_string();
        assert_eq!(why, "key logo.png in secret \"settings\" is not UTF-8 text");
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
