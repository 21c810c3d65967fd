//! get and list.

use std::sync::Arc;

use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::StatusCode;
use jiff::Timestamp;
use mesh_model::kinds::Kind;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::body;
use super::query::Query;
use super::respond::{self, Form};
use super::selector::Selector;
use super::target::Target;
use crate::error::ApiError;
use crate::registry::{Registry, object_json};
use crate::store::{Compacted, Range, Record};
use crate::table;

/// Where the next page of a list starts, and which snapshot it is of.
#[derive(Serialize, Deserialize)]
struct Continue {
    revision: u64,
    after: String,
}

/// Records of one page of a list.
struct Found {
    records: Vec<(Arc<Record>, Option<Value>)>,
    revision: u64,
    next: Option<String>,
    remaining: Option<usize>,
}

/// One object.
pub(crate) fn get(
    registry: &Registry,
    target: &Target,
    name: &str,
    form: Form,
) -> Result<Response, ApiError> {
    let record = registry.shown(target.kind, target.ns.as_deref(), name)?;
    let bytes = object_json(&record, record.revision);
    if form == Form::Plain {
        return Ok(respond::raw(StatusCode::OK, bytes));
    }
    let object = form.object(target.kind, body::json(&bytes)?);
    Ok(respond::json(StatusCode::OK, &object))
}

/// The objects that a query selects.
pub(crate) fn list(
    registry: &Registry,
    target: &Target,
    query: &Query,
    form: Form,
) -> Result<Response, ApiError> {
    let kind = target.kind;
    let found = find(registry, target, query, form != Form::Plain)?;
    let mut metadata = json!({"resourceVersion": found.revision.to_string()});
    if let Some(next) = &found.next {
        metadata["continue"] = json!(next);
        if let Some(remaining) = found.remaining {
            metadata["remainingItemCount"] = json!(remaining);
        }
    }
    let values = || found.records.iter().filter_map(|(_, value)| value.as_ref());
    match form {
        Form::Plain => Ok(respond::raw(StatusCode::OK, plain(kind, &metadata, &found))),
        Form::Metadata => {
            let items: Vec<_> = values().map(respond::partial).collect();
            let list = json!({
                "kind": "PartialObjectMetadataList",
                "apiVersion": "meta.k8s.io/v1",
                "metadata": metadata,
                "items": items,
            });
            Ok(respond::json(StatusCode::OK, &list))
        }
        Form::Table(include) => {
            let items: Vec<_> = values().collect();
            let table = table::table(kind, &items, metadata, include, Timestamp::now());
            Ok(respond::json(StatusCode::OK, &table))
        }
    }
}

/// The list as JSON, made of the stored bytes.
fn plain(kind: &Kind, metadata: &Value, found: &Found) -> Vec<u8> {
    let bytes: usize = found.records.iter().map(|(r, _)| r.value.len() + 48).sum();
    let mut json = Vec::with_capacity(bytes + 256);
    let head = format!(
        "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[",
        kind.kind,
        kind.api_version()
    );
    json.extend_from_slice(head.as_bytes());
    for (i, (record, _)) in found.records.iter().enumerate() {
        if i > 0 {
            json.push(b',');
        }
        json.extend_from_slice(&object_json(record, record.revision));
    }
    json.extend_from_slice(b"]}");
    json
}

fn find(
    registry: &Registry,
    target: &Target,
    query: &Query,
    parse: bool,
) -> Result<Found, ApiError> {
    let selector = Selector::of(target.kind, query)?;
    let limit = query.number("limit")?.filter(|l| *l > 0);
    let limit = limit.map(|l| usize::try_from(l).unwrap_or(usize::MAX));
    let (after, revision) = start(registry, query)?;
    let range = Range { prefix: "", after: after.as_deref(), limit: None, revision };
    let ns = target.ns.as_deref();
    if selector.is_empty() {
        let page = registry.shown_page(target.kind, ns, Range { limit, ..range })?;
        let next = page.records.last().filter(|_| page.remaining > 0);
        let next = next.map(|last| token(page.revision, &last.key));
        let records = page.records.into_iter().map(|record| {
            let value = parse.then(|| value(&record)).transpose()?;
            Ok((record, value))
        });
        let records = records.collect::<Result<_, ApiError>>()?;
        let remaining = Some(page.remaining);
        return Ok(Found { records, revision: page.revision, next, remaining });
    }
    let page = registry.shown_page(target.kind, ns, range)?;
    let mut records = Vec::new();
    let mut next = None;
    for record in page.records.into_iter().filter(|r| selector.may_match(&r.value)) {
        let value = value(&record)?;
        if !selector.matches(&value) {
            continue;
        }
        if limit.is_some_and(|limit| records.len() == limit) {
            next =
                records.last().map(|(last, _): &(Arc<Record>, _)| token(page.revision, &last.key));
            break;
        }
        records.push((record, Some(value)));
    }
    Ok(Found { records, revision: page.revision, next, remaining: None })
}

/// The object of a record as a value.
pub(crate) fn value(record: &Record) -> Result<Value, ApiError> {
    body::json(&object_json(record, record.revision))
}

/// The key after which a list starts, and the revision that it must be of.
fn start(registry: &Registry, query: &Query) -> Result<(Option<String>, Option<u64>), ApiError> {
    if let Some(token) = query.value("continue") {
        let bad = || ApiError::BadRequest("continue key is not valid".to_owned());
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| bad())?;
        let token: Continue = serde_json::from_slice(&bytes).map_err(|_| bad())?;
        return Ok((Some(token.after), Some(token.revision)));
    }
    let exact = query.value("resourceVersionMatch") == Some("Exact");
    let version = query.number("resourceVersion")?.filter(|v| *v > 0);
    let newest = registry.revision();
    if let Some(asked) = version.filter(|v| *v > newest) {
        // Only of a store that is not there any more: the client must start over.
        return Err(Compacted { asked, oldest: newest }.into());
    }
    Ok((None, version.filter(|_| exact)))
}

fn token(revision: u64, after: &str) -> String {
    let token = Continue { revision, after: after.to_owned() };
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).expect("a number and a text are JSON"))
}
