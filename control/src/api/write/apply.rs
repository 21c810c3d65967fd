//! Server-side apply: the object is made, or the fields that the caller decides are put into it (Kubernetes API concepts,
//! "Server-Side Apply"). Who decides which field is known by `metadata.managedFields`.

use http::StatusCode;
use serde_json::{Map, Value};

use super::{Writing, Written, to_value};
use crate::api::body;
use crate::api::query::FieldValidation;
use crate::error::{ApiError, Cause};
use crate::fields::owners::{self, Applies, Owners, applicable};
use crate::fields::{Author, Set, merge};
use crate::registry::{Object, Part, WriteOptions};
use crate::strategy::with_kind;

/// How often it is looked again whether the object exists, while others make and delete it.
const ATTEMPTS: usize = 16;

impl Writing<'_> {
    /// PATCH with `application/apply-patch+yaml`.
    pub(super) async fn apply(&self, name: &str) -> Result<Written, ApiError> {
        if let Some(sub @ ("scale" | "ephemeralcontainers" | "finalize")) =
            self.target.sub.as_deref()
        {
            return Err(ApiError::UnsupportedMediaType(format!(
                "server-side apply is served for objects and their status, not for {sub}: use another type of patch"
            )));
        }
        with_kind!(self.target.kind, K => self.apply_object::<K>(name).await)
    }

    async fn apply_object<K: Object>(&self, name: &str) -> Result<Written, ApiError> {
        let (ns, part) = (self.target.ns.as_deref(), self.part());
        let (config, warnings) = self.config::<K>(name)?;
        let author = self.applier::<K>(name, &config, part)?;
        let dry_run = self.query.dry_run()?;
        let options = WriteOptions { dry_run, author, by_node: self.by_node };
        for _ in 0..ATTEMPTS {
            let change = |old: &K| applied(old, &config, &options.author, part);
            let (status, written) =
                match self.registry.modify::<K>(ns, name, part, &options, change).await {
                    Err(ApiError::NotFound { kind, .. })
                        if kind == K::kind() && part == Part::Main =>
                    {
                        let object = first::<K>(name, &config)?;
                        let created = self.registry.create_in(ns, object, &options).await;
                        (StatusCode::CREATED, created)
                    }
                    modified => (StatusCode::OK, modified),
                };
            match written {
                Err(ApiError::AlreadyExists { .. }) => {}
                written => return Ok(Written { status, object: to_value(&written?)?, warnings }),
            }
        }
        Err(ApiError::AlreadyExists { kind: K::kind(), name: name.to_owned() })
    }

    /// What is applied, without fields that the kind does not have, and warnings about those.
    fn config<K: Object>(&self, name: &str) -> Result<(Value, Vec<String>), ApiError> {
        let mut config = body::manifest(&self.raw.bytes)?;
        drop_nulls(&mut config);
        let text = |field: &str| config.get(field).and_then(Value::as_str).unwrap_or_default();
        if text("apiVersion").is_empty() || text("kind").is_empty() {
            let text = "what is applied needs apiVersion and kind";
            return Err(ApiError::BadRequest(text.to_owned()));
        }
        let owners = config["metadata"]["managedFields"].as_array();
        if owners.is_some_and(|owners| !owners.is_empty()) {
            return Err(ApiError::BadRequest("metadata.managedFields must be nil".to_owned()));
        }
        if let Some(Value::Object(meta)) = config.get_mut("metadata") {
            meta.entry("name").or_insert_with(|| name.into());
        } else {
            config["metadata"] = Value::Object(Map::from_iter([("name".to_owned(), name.into())]));
        }
        let (object, warnings) = body::typed::<K>(config.clone(), self.query.field_validation()?)?;
        Ok((known(config, &to_value(&object)?), warnings))
    }

    fn applier<K: Object>(
        &self,
        name: &str,
        config: &Value,
        part: Part,
    ) -> Result<Author, ApiError> {
        if self.query.value("fieldManager").is_none() {
            let message = "Required value: is required for apply patch".to_owned();
            let causes = vec![Cause { field: "fieldManager".to_owned(), message }];
            return Err(ApiError::Invalid { kind: K::kind(), name: name.to_owned(), causes });
        }
        let fields = applicable(config, part.subresource());
        let applies = Some(Applies { fields, force: self.query.flag("force")? });
        Ok(Author { manager: Some(self.manager()?), applies })
    }
}

/// The object that an apply makes.
fn first<K: Object>(name: &str, config: &Value) -> Result<K, ApiError> {
    for precondition in ["uid", "resourceVersion"] {
        if config["metadata"][precondition].as_str().is_some_and(|text| !text.is_empty()) {
            let detail =
                format!("it does not exist, and metadata.{precondition} says that it does");
            return Err(ApiError::Conflict { kind: K::kind(), name: name.to_owned(), detail });
        }
    }
    let (object, _) = body::typed::<K>(config.clone(), FieldValidation::Ignore)?;
    if object.metadata().name.as_deref() != Some(name) {
        let text = "the name of the object does not match the name on the URL";
        return Err(ApiError::BadRequest(format!("{text} ({name})")));
    }
    Ok(object)
}

/// The object with what is applied in it, and without what the same author applied before and no longer does.
fn applied<K: Object>(old: &K, config: &Value, author: &Author, part: Part) -> Result<K, ApiError> {
    let live = to_value(old)?;
    let owners = Owners::before_apply(&K::kind().api_version(), old.metadata(), &live);
    let (last, mut owned) = owners.split(author, part.subresource());
    owned.add(&Set::of(config));
    let mut merged = merge::applied(&live, config, &last, &owned).map_err(ApiError::BadRequest)?;
    if part == Part::Main {
        owners::note(author, &mut merged, config);
    }
    body::typed(merged, FieldValidation::Ignore).map(|(object, _)| object)
}

/// A field without a value is one that is not given.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// The fields that are given, as the type writes them.
fn known(given: Value, taken: &Value) -> Value {
    match (given, taken) {
        (Value::Object(given), Value::Object(taken)) => {
            let fields = given.into_iter().filter_map(|(key, value)| {
                let taken = taken.get(&key)?;
                Some((key, known(value, taken)))
            });
            Value::Object(fields.collect())
        }
        (Value::Array(given), Value::Array(taken)) if given.len() == taken.len() => {
            given.into_iter().zip(taken).map(|(value, taken)| known(value, taken)).collect()
        }
        (_, taken) => taken.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_applied_is_what_is_given_and_known() {
        let mut given =
            json!({"spec": {"replicas": null, "frob": 1, "cpu": 1, "list": [{"a": 1, "b": 2}]}});
        drop_nulls(&mut given);
        let taken = json!({"spec": {"selector": {}, "cpu": "1", "list": [{"a": 1, "name": ""}]}});
        assert_eq!(known(given, &taken), json!({"spec": {"cpu": "1", "list": [{"a": 1}]}}));
    }
}
