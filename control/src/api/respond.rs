//! Answers: objects, lists, tables, `Status`, warnings.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use jiff::Timestamp;
use mesh_model::kinds::Kind;
use serde::Serialize;
use serde_json::{Value, json};

use super::query::Query;
use crate::error::ApiError;
use crate::table::{self, Include};

/// How the client wants its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// Objects as they are.
    Plain,
    /// Rows and columns for people.
    Table(Include),
    /// Only the metadata, as `PartialObjectMetadata`.
    Metadata,
}

impl Form {
    /// From the `Accept` header: the first form that is served.
    pub(crate) fn of(headers: &HeaderMap, query: &Query) -> Result<Self, ApiError> {
        let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("*/*");
        let mut forms = accept.split(',').filter_map(|range| Self::of_range(range, query));
        forms.next().ok_or(ApiError::NotAcceptable("application/json"))
    }

    fn of_range(range: &str, query: &Query) -> Option<Self> {
        let mut parts = range.split(';').map(str::trim);
        if !matches!(parts.next()?, "application/json" | "application/*" | "*/*" | "") {
            return None;
        }
        let mut form = None;
        for part in parts {
            match part.split_once('=')? {
                ("as", value) => form = Some(value),
                ("stream", _) | ("q", _) | ("v", _) | ("g", _) | ("charset", _) => {}
                _ => return None,
            }
        }
        match form {
            None => Some(Self::Plain),
            Some("Table") => Some(Self::Table(Include::parse(query.value("includeObject")))),
            Some("PartialObjectMetadata" | "PartialObjectMetadataList") => Some(Self::Metadata),
            Some(_) => None,
        }
    }

    /// One object in this form.
    pub(crate) fn object(self, kind: &Kind, object: Value) -> Value {
        match self {
            Self::Plain => object,
            Self::Metadata => partial(&object),
            Self::Table(include) => {
                let version = &object["metadata"]["resourceVersion"];
                let metadata = json!({"resourceVersion": version});
                table::table(kind, &[&object], metadata, include, Timestamp::now())
            }
        }
    }
}

/// The metadata of an object, as an object of its own.
pub(crate) fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object["metadata"],
    })
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => raw(status, bytes),
        Err(error) => raw(StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
    }
}

/// An answer that is JSON already.
pub(crate) fn raw(status: StatusCode, bytes: impl Into<Body>) -> Response {
    let mut response = Response::new(bytes.into());
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}

/// The `Status` of a failure.
pub(crate) fn failure(error: &ApiError) -> Response {
    let (code, _) = error.code();
    if code >= 500 {
        tracing::warn!(%error, "request failed");
    }
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = json(status, &error.status());
    if let ApiError::TooManyRequests { retry_after_secs: Some(secs), .. } = error {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(*secs));
    }
    response
}

/// Adds `Warning` headers, which kubectl prints.
pub(crate) fn warn(mut response: Response, warnings: &[String]) -> Response {
    for warning in warnings {
        let quoted = warning.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{quoted}\"")) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(accept: &'static str) -> Option<Form> {
        let headers = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(accept))]);
        Form::of(&headers, &Query::default()).ok()
    }

    #[test]
    fn the_first_form_that_is_served_wins() {
        let table = Form::Table(Include::Metadata);
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
        assert_eq!(form(kubectl), Some(table));
        assert_eq!(
            form("application/vnd.kubernetes.protobuf, application/json"),
            Some(Form::Plain)
        );
        assert_eq!(form("application/json;as=Frob,*/*"), Some(Form::Plain));
        assert_eq!(form("application/vnd.kubernetes.protobuf"), None);
        let partial = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
        assert_eq!(form(partial), Some(Form::Metadata));
    }
}
