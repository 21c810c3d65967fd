//! Paths that are not about objects: discovery and the description of the API.

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use serde_json::Value;

use super::respond;
use super::target::not_served;
use crate::error::ApiError;
use crate::{discovery, openapi};

const OPENAPI_V2: &str = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
/// The same, as Go can parse it in an answer.
const OPENAPI_V2_ANSWER: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// The answer of a fixed path; `None` when the path is about objects.
pub(crate) fn fixed(
    path: &str,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Option<Response>, ApiError> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let value = match parts.as_slice() {
        ["api"] | ["apis"] if wants_aggregated(headers) => {
            let value = discovery::aggregated(parts == ["api"]);
            let mut response = respond::json(StatusCode::OK, &value);
            let form = HeaderValue::from_static(AGGREGATED);
            response.headers_mut().insert(header::CONTENT_TYPE, form);
            return Ok(Some(response));
        }
        // Only asked for kinds that are not served: an empty document says that nothing is known of them.
        ["openapi", "v2"] if wants(headers, OPENAPI_V2) => {
            let mut response = Response::new(Body::empty());
            let form = HeaderValue::from_static(OPENAPI_V2_ANSWER);
            response.headers_mut().insert(header::CONTENT_TYPE, form);
            return Ok(Some(response));
        }
        [""] => Some(index()),
        ["api"] => Some(discovery::versions()),
        ["apis"] => Some(discovery::groups()),
        ["apis", group] => discovery::group(group),
        ["api", "v1"] => discovery::resources("", "v1"),
        ["apis", group, version] => discovery::resources(group, version),
        ["openapi", "v2"] => Some(openapi::v2().clone()),
        ["openapi", "v3"] => Some(openapi::index()),
        ["openapi", "v3", "api", version] => openapi::document("", version),
        ["openapi", "v3", "apis", group, version] => openapi::document(group, version),
        ["api", "v1", ..] | ["apis", _, _, ..] => return Ok(None),
        _ => None,
    };
    let value = value.ok_or_else(|| not_served(&format!("nothing is at {path}")))?;
    if !matches!(*method, Method::GET | Method::HEAD) {
        return Err(ApiError::MethodNotAllowed);
    }
    Ok(Some(respond::json(StatusCode::OK, &value)))
}

/// Group, version and the rest of a path about objects.
pub(crate) fn resource(path: &str) -> Result<(&str, &str, &str), ApiError> {
    let found = if let Some(rest) = path.strip_prefix("/api/v1/") {
        Some(("", "v1", rest))
    } else {
        path.strip_prefix("/apis/").and_then(|rest| {
            let (group, rest) = rest.split_once('/')?;
            let (version, rest) = rest.split_once('/')?;
            Some((group, version, rest))
        })
    };
    found.ok_or_else(|| not_served(&format!("nothing is at {path}")))
}

/// Whether the first form of the `Accept` header is that one.
fn wants(headers: &HeaderMap, form: &str) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    accept.split(',').next().unwrap_or_default().trim() == form
}

fn wants_aggregated(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or_default();
    accept.split(',').any(|range| {
        let has = |part: &str| range.split(';').any(|p| p.trim() == part);
        has("application/json") && has("g=apidiscovery.k8s.io") && has("v=v2")
    })
}

fn index() -> Value {
    let paths = [
        "/api",
        "/api/v1",
        "/apis",
        "/healthz",
        "/livez",
        "/openapi/v2",
        "/openapi/v3",
        "/readyz",
        "/version",
    ];
    serde_json::json!({"paths": paths})
}
