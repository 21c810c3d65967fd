//! create, update, patch, delete.

use axum::response::Response;
use http::StatusCode;
use k8s_openapi::api::core::v1::Binding;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Status, StatusDetails};
use serde_json::Value;

use super::body::{self, Raw};
use super::patch::Patch;
use super::query::{FieldValidation, Query};
use super::respond::{self, Form};
use super::selector::Selector;
use super::target::Target;
use crate::error::ApiError;
use crate::fields::Author;
use crate::registry::{Deleted, Object, Part, Registry, WriteOptions, decode, to_value};
use crate::store::Range;
use crate::strategy::with_kind;

mod apply;
mod ephemeral;
mod eviction;
pub(super) mod scale;

/// What a write answers with.
struct Written {
    status: StatusCode,
    object: Value,
    warnings: Vec<String>,
}

/// A request that writes, taken apart.
pub(crate) struct Writing<'a> {
    /// Where objects are.
    pub(crate) registry: &'a Registry,
    /// What it is about.
    pub(crate) target: &'a Target,
    /// Its parameters.
    pub(crate) query: &'a Query,
    /// Its body.
    pub(crate) raw: &'a Raw,
    /// How it wants its answer.
    pub(crate) form: Form,
    /// The program that asks, as it calls itself; else who asks.
    pub(crate) program: &'a str,
    /// Whether a node asks.
    pub(crate) by_node: bool,
}

/// Who writes, when neither the request nor its program has a name.
const UNNAMED: &str = "unknown";
/// Characters that the name of an owner of fields may have.
const MANAGER_CHARS: usize = 128;

impl Writing<'_> {
    /// POST.
    pub(crate) async fn create(&self) -> Result<Response, ApiError> {
        let written = match (&self.target.name, self.target.sub.as_deref()) {
            (None, None) => with_kind!(self.target.kind, K => self.create_object::<K>().await)?,
            (Some(name), Some("binding")) => self.bind(name).await?,
            (Some(name), Some("eviction")) => eviction::create(self, name).await?,
            _ => return Err(ApiError::MethodNotAllowed),
        };
        Ok(self.respond(written))
    }

    /// PUT.
    pub(crate) async fn update(&self) -> Result<Response, ApiError> {
        let name = self.target.name.as_deref().ok_or(ApiError::MethodNotAllowed)?;
        let written = match self.target.sub.as_deref() {
            Some("scale") => scale::update(self, name).await?,
            Some("finalize") => self.finalize(name).await?,
            Some("ephemeralcontainers") => ephemeral::update(self, name).await?,
            _ => with_kind!(self.target.kind, K => self.update_object::<K>(name).await)?,
        };
        Ok(self.respond(written))
    }

    /// PATCH.
    pub(crate) async fn patch(&self) -> Result<Response, ApiError> {
        let name = self.target.name.as_deref().ok_or(ApiError::MethodNotAllowed)?;
        if Patch::is_apply(self.raw) {
            return Ok(self.respond(self.apply(name).await?));
        }
        let patch = Patch::parse(self.raw)?;
        let written = match self.target.sub.as_deref() {
            Some("scale") => scale::patch(self, name, &patch).await?,
            Some("ephemeralcontainers") => ephemeral::patch(self, name, &patch).await?,
            _ => with_kind!(self.target.kind, K => self.patch_object::<K>(name, &patch).await)?,
        };
        Ok(self.respond(written))
    }

    /// DELETE of one object.
    pub(crate) async fn delete(&self) -> Result<Response, ApiError> {
        let name = self.target.name.as_deref().ok_or(ApiError::MethodNotAllowed)?;
        let options = delete_options(self.query, self.raw)?;
        let ns = self.target.ns.as_deref();
        let object = with_kind!(self.target.kind, K => {
            match self.registry.delete::<K>(ns, name, &options).await? {
                Deleted::Removed(object) => removed(&object),
                Deleted::Terminating(object) => to_value(&object),
            }
        })?;
        let form = if object["kind"] == "Status" { Form::Plain } else { self.form };
        Ok(respond::json(StatusCode::OK, &form.object(self.target.kind, object)))
    }

    /// DELETE of a collection.
    pub(crate) async fn delete_collection(&self) -> Result<Response, ApiError> {
        let options = delete_options(self.query, self.raw)?;
        let selector = Selector::of(self.target.kind, self.query)?;
        let ns = self.target.ns.as_deref();
        let page = self.registry.page(self.target.kind, ns, Range::default())?;
        let mut items = Vec::new();
        for record in page.records {
            let value = super::read::value(&record)?;
            if !selector.matches(&value) {
                continue;
            }
            let name = value["metadata"]["name"].as_str().unwrap_or_default();
            let ns = value["metadata"]["namespace"].as_str();
            let deleted = with_kind!(self.target.kind, K => {
                self.registry.delete::<K>(ns, name, &options).await.map(|_| ())
            });
            match deleted {
                Ok(()) | Err(ApiError::NotFound { .. }) => items.push(value),
                Err(error) => return Err(error),
            }
        }
        let list = serde_json::json!({
            "kind": format!("{}List", self.target.kind.kind),
            "apiVersion": self.target.kind.api_version(),
            "metadata": {"resourceVersion": page.revision.to_string()},
            "items": items,
        });
        Ok(respond::json(StatusCode::OK, &list))
    }

    fn options(&self) -> Result<WriteOptions, ApiError> {
        let author = Author { manager: Some(self.manager()?), applies: None };
        Ok(WriteOptions { dry_run: self.query.dry_run()?, author, by_node: self.by_node })
    }

    /// The owner of what is written: `fieldManager`, or the program up to its version.
    fn manager(&self) -> Result<String, ApiError> {
        if let Some(name) = self.query.value("fieldManager") {
            if name.chars().count() > MANAGER_CHARS || name.chars().any(char::is_control) {
                return Err(ApiError::BadRequest(format!(
                    "fieldManager: Invalid value: must be at most {MANAGER_CHARS} printable characters"
                )));
            }
            return Ok(name.to_owned());
        }
        let program = self.program.split('/').next().unwrap_or_default().trim();
        let printable = program.chars().filter(|c| !c.is_control()).take(MANAGER_CHARS);
        let name: String = printable.collect();
        Ok(if name.is_empty() { UNNAMED.to_owned() } else { name })
    }

    fn part(&self) -> Part {
        if self.target.sub.as_deref() == Some("status") { Part::Status } else { Part::Main }
    }

    fn respond(&self, written: Written) -> Response {
        let object = if written.object["kind"] == self.target.kind.kind {
            self.form.object(self.target.kind, written.object)
        } else {
            written.object
        };
        respond::warn(respond::json(written.status, &object), &written.warnings)
    }

    async fn create_object<K: Object>(&self) -> Result<Written, ApiError> {
        let (object, warnings) =
            body::typed::<K>(self.raw.value()?, self.query.field_validation()?)?;
        let ns = self.target.ns.as_deref();
        let created = self.registry.create_in(ns, object, &self.options()?).await?;
        Ok(Written { status: StatusCode::CREATED, object: to_value(&created)?, warnings })
    }

    async fn update_object<K: Object>(&self, name: &str) -> Result<Written, ApiError> {
        let (object, warnings) =
            body::typed::<K>(self.raw.value()?, self.query.field_validation()?)?;
        if object.metadata().name.is_none() {
            return Err(ApiError::BadRequest("metadata.name: Required value".to_owned()));
        }
        let ns = self.target.ns.as_deref();
        let stored = self
            .registry
            .modify::<K>(ns, name, self.part(), &self.options()?, |_| Ok(object.clone()))
            .await?;
        Ok(Written { status: StatusCode::OK, object: to_value(&stored)?, warnings })
    }

    async fn patch_object<K: Object>(
        &self,
        name: &str,
        patch: &Patch,
    ) -> Result<Written, ApiError> {
        let validation = self.query.field_validation()?;
        let kind = self.target.kind;
        let change = |old: &K| patched::<K>(kind, old, patch, validation).map(|(new, _)| new);
        let ns = self.target.ns.as_deref();
        let warnings = {
            let old: K = decode(&*self.registry.record(kind, ns, name)?)?;
            patched::<K>(kind, &old, patch, validation)?.1
        };
        let stored =
            self.registry.modify::<K>(ns, name, self.part(), &self.options()?, change).await?;
        Ok(Written { status: StatusCode::OK, object: to_value(&stored)?, warnings })
    }

    async fn bind(&self, name: &str) -> Result<Written, ApiError> {
        let binding: Binding = serde_path_to_error::deserialize(&self.raw.value()?)
            .map_err(|e| ApiError::BadRequest(format!("Binding: {e}")))?;
        let ns = self.target.ns.as_deref().unwrap_or_default();
        self.registry.bind_as(ns, name, &binding, &self.options()?).await?;
        let status =
            Status { status: Some("Success".to_owned()), code: Some(201), ..Status::default() };
        let object = to_value(&status)?;
        Ok(Written { status: StatusCode::CREATED, object, warnings: Vec::new() })
    }

    async fn finalize(&self, name: &str) -> Result<Written, ApiError> {
        use k8s_openapi::api::core::v1::Namespace;
        let (object, warnings) =
            body::typed::<Namespace>(self.raw.value()?, self.query.field_validation()?)?;
        let change = |old: &Namespace| {
            let mut new = old.clone();
            new.metadata.resource_version.clone_from(&object.metadata.resource_version);
            new.spec.clone_from(&object.spec);
            Ok(new)
        };
        let stored =
            self.registry.modify(None, name, Part::Finalize, &self.options()?, change).await?;
        Ok(Written { status: StatusCode::OK, object: to_value(&stored)?, warnings })
    }
}

fn patched<K: Object>(
    kind: &'static mesh_model::kinds::Kind,
    old: &K,
    patch: &Patch,
    validation: FieldValidation,
) -> Result<(K, Vec<String>), ApiError> {
    body::typed(patch.apply(kind, to_value(old)?)?, validation)
}

fn delete_options(query: &Query, raw: &Raw) -> Result<DeleteOptions, ApiError> {
    let mut options = DeleteOptions::default();
    if !raw.bytes.is_empty() {
        let mut value = raw.value()?;
        if value["kind"].as_str().is_some_and(|kind| kind != "DeleteOptions") {
            return Err(ApiError::BadRequest(
                "the body of a deletion must be DeleteOptions".to_owned(),
            ));
        }
        // Group versions differ with the client; the fields are the same.
        if let Some(map) = value.as_object_mut() {
            map.remove("apiVersion");
        }
        options = serde_path_to_error::deserialize(&value)
            .map_err(|e| ApiError::BadRequest(format!("DeleteOptions: {e}")))?;
    }
    if query.has("gracePeriodSeconds") {
        let secs = query.number("gracePeriodSeconds")?;
        options.grace_period_seconds = secs.and_then(|s| i64::try_from(s).ok());
    }
    if let Some(policy) = query.value("propagationPolicy") {
        options.propagation_policy = Some(policy.to_owned());
    }
    if query.dry_run()? {
        options.dry_run = Some(vec!["All".to_owned()]);
    }
    if options.grace_period_seconds.is_some_and(|s| s < 0) {
        return Err(ApiError::BadRequest(
            "gracePeriodSeconds: Invalid value: must be greater than or equal to 0".to_owned(),
        ));
    }
    Ok(options)
}

/// Whether a deletion asks for the object to go at once.
pub(crate) fn asks_no_grace(query: &Query, raw: &Raw) -> bool {
    delete_options(query, raw).is_ok_and(|options| options.grace_period_seconds == Some(0))
}

fn removed<K: Object>(object: &K) -> Result<Value, ApiError> {
    let kind = K::kind();
    to_value(&Status {
        status: Some("Success".to_owned()),
        details: Some(StatusDetails {
            name: object.metadata().name.clone(),
            group: (!kind.group.is_empty()).then(|| kind.group.to_owned()),
            kind: Some(kind.plural.to_owned()),
            uid: object.metadata().uid.clone(),
            ..StatusDetails::default()
        }),
        ..Status::default()
    })
}
