//! Objects as bytes. The revision is not part of the stored bytes: it is known only once they are written.

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;

use super::Object;
use crate::error::ApiError;
use crate::store::Record;

/// `apiVersion`, `kind` and `metadata` come first in what the API types write.
const METADATA: &[u8] = b"\"metadata\":{";

pub(super) fn encode<K: Object>(object: &K) -> Result<Bytes, ApiError> {
    let mut bare = object.clone();
    bare.metadata_mut().resource_version = None;
    let bytes = serde_json::to_vec(&bare).map_err(|e| ApiError::BadRequest(e.to_string()))?;
    Ok(Bytes::from(bytes))
}

/// An object as JSON.
pub fn to_value(object: &impl Serialize) -> Result<Value, ApiError> {
    serde_json::to_value(object).map_err(|e| ApiError::BadRequest(e.to_string()))
}

/// The object of a record, with its resource version.
pub fn decode<K: Object>(record: &Record) -> Result<K, ApiError> {
    decode_at(record, record.revision)
}

/// The object of a record, with another resource version: that of its deletion.
pub(super) fn decode_at<K: Object>(record: &Record, revision: u64) -> Result<K, ApiError> {
    let damaged = |e: serde_json::Error| ApiError::Damaged {
        key: record.key.to_string(),
        detail: e.to_string(),
    };
    let mut object: K = serde_json::from_slice(&record.value).map_err(damaged)?;
    object.metadata_mut().resource_version = Some(revision.to_string());
    Ok(object)
}

/// The JSON of a record with its resource version, without parsing it.
pub fn object_json(record: &Record, revision: u64) -> Vec<u8> {
    let at = memchr::memmem::find(&record.value, METADATA)
        .map(|at| at + METADATA.len())
        .expect("encode wrote an object with metadata");
    let (head, tail) = record.value.split_at(at);
    let mut json = Vec::with_capacity(record.value.len() + 40);
    json.extend_from_slice(head);
    json.extend_from_slice(format!("\"resourceVersion\":\"{revision}\"").as_bytes());
    if tail.first() != Some(&b'}') {
        json.push(b',');
    }
    json.extend_from_slice(tail);
    json
}
