//! Request bodies: how large they may be, JSON or YAML, and from a value to a typed object.

use std::time::Duration;

use axum::body::Body;
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use mesh_model::kinds::Kind;
use serde_json::Value;

use super::protobuf::{self, DecodeError};
use super::query::FieldValidation;
use super::strict;
use crate::error::ApiError;
use crate::strategy::Object;

/// The largest body: as Kubernetes.
pub const LIMIT_BYTES: usize = 3 << 20;
const DRAINED_BYTES: usize = 64 << 20;
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// A body as it came.
pub struct Raw {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The media type without parameters, in lower case; empty when none was given.
    pub media_type: String,
}

impl Raw {
    /// Reads a whole body.
    pub async fn read(headers: &HeaderMap, body: Body) -> Result<Self, ApiError> {
        let mut bytes = Vec::new();
        let mut body = body;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| {
                ApiError::BadRequest(format!("the body could not be read: {error}"))
            })?;
            let Ok(data) = frame.into_data() else { continue };
            if bytes.len() + data.len() > LIMIT_BYTES {
                drain(body).await;
                return Err(ApiError::TooLarge(LIMIT_BYTES));
            }
            bytes.extend_from_slice(&data);
        }
        Ok(Self { bytes, media_type: media_type(headers) })
    }

    /// The body as JSON or YAML.
    pub fn value(&self) -> Result<Value, ApiError> {
        match self.media_type.as_str() {
            "" | "application/json" | "text/json" => json(&self.bytes),
            "application/yaml" | "application/x-yaml" | "text/yaml" => yaml(&self.bytes),
            protobuf::MEDIA_TYPE => protobuf::decode(&self.bytes).map_err(|error| match error {
                DecodeError::Kind(_) | DecodeError::Field { .. } => {
                    ApiError::UnsupportedMediaType(error.to_string())
                }
                _ => ApiError::BadRequest(error.to_string()),
            }),
            other => Err(ApiError::UnsupportedMediaType(format!(
                "the body of the request was in an unknown format - accepted media types include: \
                 application/json, application/yaml (got {other})"
            ))),
        }
    }
}

/// Reads on for a while: most clients look at the answer only when they have sent everything.
async fn drain(mut body: Body) {
    let rest = async {
        let mut bytes = 0;
        while let Some(Ok(frame)) = body.frame().await
            && bytes < DRAINED_BYTES
        {
            bytes += frame.data_ref().map_or(0, |data| data.len());
        }
    };
    if tokio::time::timeout(DRAIN_LIMIT, rest).await.is_err() {
        tracing::debug!("a client is slow to send a body that is too large");
    }
}

fn media_type(headers: &HeaderMap) -> String {
    let text = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Parses JSON.
pub fn json(bytes: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|e| ApiError::BadRequest(format!("the body is not valid JSON: {e}")))
}

/// Parses one YAML document.
pub fn yaml(bytes: &[u8]) -> Result<Value, ApiError> {
    let bad = |why: String| ApiError::BadRequest(format!("the body is not valid YAML: {why}"));
    let text = std::str::from_utf8(bytes).map_err(|e| bad(e.to_string()))?;
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options(text, options).map_err(|e| bad(e.to_string()))
}

/// Parses a manifest: JSON where it looks like it, else YAML.
pub fn manifest(bytes: &[u8]) -> Result<Value, ApiError> {
    let value =
        if bytes.trim_ascii_start().first() == Some(&b'{') { json(bytes) } else { yaml(bytes) };
    match value? {
        value @ Value::Object(_) => Ok(value),
        _ => Err(ApiError::BadRequest("the body must be one object".to_owned())),
    }
}

/// Makes a typed object of a value. Fields that the type does not have are refused, or returned as warnings.
pub fn typed<K: Object>(
    value: Value,
    validation: FieldValidation,
) -> Result<(K, Vec<String>), ApiError> {
    let kind = K::kind();
    if !value.is_object() {
        return Err(ApiError::BadRequest("the body must be one object".to_owned()));
    }
    same_kind(kind, &value)?;
    let object: K = serde_path_to_error::deserialize(&value).map_err(|error| {
        let path = error.path().to_string();
        let why = error.into_inner();
        ApiError::BadRequest(format!(
            "{} in version \"{}\" cannot be handled as a {}: {path}: {why}",
            kind.kind, kind.version, kind.kind
        ))
    })?;
    if validation == FieldValidation::Ignore {
        return Ok((object, Vec::new()));
    }
    let unknown = strict::unknown_fields(&value, &object)?;
    if validation == FieldValidation::Strict && !unknown.is_empty() {
        return Err(ApiError::BadRequest(format!(
            "{} in version \"{}\" cannot be handled as a {}: strict decoding error: {}",
            kind.kind,
            kind.version,
            kind.kind,
            unknown.join(", ")
        )));
    }
    Ok((object, unknown))
}

fn same_kind(kind: &Kind, value: &Value) -> Result<(), ApiError> {
    let text = |field: &str| match value.get(field) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(ApiError::BadRequest(format!("{field} must be a string"))),
    };
    let (version, name) = (text("apiVersion")?, text("kind")?);
    let expected = kind.api_version();
    if !name.is_empty() && name != kind.kind {
        return Err(ApiError::BadRequest(format!(
            "the kind in the data ({name}) does not match the expected kind ({})",
            kind.kind
        )));
    }
    if !version.is_empty() && version != expected {
        return Err(ApiError::BadRequest(format!(
            "the API version in the data ({version}) does not match the expected API version ({expected})"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::Deployment;
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;

    #[test]
    fn wrong_types_are_named_with_their_path() {
        let value = json!({"kind": "Deployment", "spec": {"replicas": "three"}});
        let error = typed::<Deployment>(value, FieldValidation::Warn).unwrap_err().to_string();
        assert!(error.contains("spec.replicas: invalid type: string \"three\""), "{error}");
        let error = typed::<Pod>(json!({"kind": "Deployment"}), FieldValidation::Warn).unwrap_err();
        assert_eq!(error.code().0, 400);
        assert!(typed::<Pod>(json!([]), FieldValidation::Warn).is_err());
    }

    #[test]
    fn unknown_fields_warn_or_refuse() {
        let value = json!({"metadata": {"name": "p", "creationTimestamp": null}, "spec": {"foo": 1,
            "containers": [{"name": "c", "imagee": "x", "resources": {"limits": {"cpu": 1}}}]}});
        let (_, warnings) = typed::<Pod>(value.clone(), FieldValidation::Warn).unwrap();
        assert_eq!(
            warnings,
            ["unknown field \"spec.containers[0].imagee\"", "unknown field \"spec.foo\""]
        );
        let error = typed::<Pod>(value, FieldValidation::Strict).unwrap_err().to_string();
        assert!(
            error.contains("strict decoding error: unknown field \"spec.containers[0].imagee\"")
        );
    }

    #[test]
    fn yaml_keeps_words_that_are_not_booleans() {
        let value = yaml(b"a: y\nb: \"true\"\nc: 1\nd: no\n").unwrap();
        assert_eq!(value, json!({"a": "y", "b": "true", "c": 1, "d": "no"}));
        assert!(yaml(b"a: [").is_err());
    }
}
