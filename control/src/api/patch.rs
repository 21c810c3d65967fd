//! Patches: JSON patch (RFC 6902), JSON merge patch (RFC 7386), strategic merge patch.

use mesh_model::kinds::Kind;
use serde_json::Value;

use super::body::{self, Raw};
use crate::error::{ApiError, Cause};

mod strategic;

/// Operations that one JSON patch may have.
const OPERATIONS: usize = 10_000;

/// A patch of one of the three types.
pub(crate) enum Patch {
    /// RFC 6902.
    Json(json_patch::Patch),
    /// RFC 7386.
    Merge(Value),
    /// Lists are merged by key.
    Strategic(Value),
}

/// What a server-side apply is sent as, JSON or YAML.
const APPLY: &str = "application/apply-patch+yaml";

impl Patch {
    /// Whether it is no patch of these types but a server-side apply.
    pub(crate) fn is_apply(raw: &Raw) -> bool {
        raw.media_type == APPLY
    }

    /// From a body and its media type.
    pub(crate) fn parse(raw: &Raw) -> Result<Self, ApiError> {
        match raw.media_type.as_str() {
            "application/json-patch+json" => {
                let patch: json_patch::Patch = serde_json::from_slice(&raw.bytes)
                    .map_err(|e| ApiError::BadRequest(format!("not a JSON patch: {e}")))?;
                if patch.0.len() > OPERATIONS {
                    return Err(ApiError::TooLarge(OPERATIONS));
                }
                Ok(Self::Json(patch))
            }
            "application/merge-patch+json" => Ok(Self::Merge(object(raw)?)),
            "application/strategic-merge-patch+json" => Ok(Self::Strategic(object(raw)?)),
            other => Err(ApiError::UnsupportedMediaType(format!(
                "the body of the request was in an unknown format ({other}) - accepted media types \
                 include: application/json-patch+json, application/merge-patch+json, \
                 application/strategic-merge-patch+json, {APPLY}"
            ))),
        }
    }

    /// The patched object.
    pub(crate) fn apply(&self, kind: &'static Kind, mut target: Value) -> Result<Value, ApiError> {
        match self {
            Self::Json(patch) => {
                let name = target["metadata"]["name"].as_str().unwrap_or_default().to_owned();
                json_patch::patch(&mut target, patch).map_err(|error| {
                    let message = format!("Invalid value: {error}");
                    let cause = Cause { field: "patch".to_owned(), message };
                    ApiError::Invalid { kind, name, causes: vec![cause] }
                })?;
            }
            Self::Merge(patch) => json_patch::merge(&mut target, patch),
            Self::Strategic(patch) => {
                strategic::merge(&mut target, patch).map_err(ApiError::BadRequest)?;
            }
        }
        Ok(target)
    }
}

fn object(raw: &Raw) -> Result<Value, ApiError> {
    let value = body::json(&raw.bytes)?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(ApiError::BadRequest("a merge patch must be an object".to_owned()))
    }
}
