//! Objects as bytes. The revision is not part of the stored bytes: it is known only once they are written.

use bytes::Bytes;
use serde::Serialize;
use serde_json::Value;

use super::Object;
use crate::error::ApiError;
use crate::store::Record;

/// As the API types write it.
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
    let at = own_metadata(&record.value).expect("encode wrote an object with metadata");
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

/// Where the content of the object's own metadata begins. Fields before it may have some of theirs, such as the template in a
/// ControllerRevision.
fn own_metadata(json: &[u8]) -> Option<usize> {
    let (mut depth, mut at) = (0_usize, 0);
    loop {
        at += memchr::memchr3(b'"', b'{', b'}', json.get(at..)?)?;
        match json[at] {
            b'{' => depth += 1,
            b'}' => depth = depth.checked_sub(1)?,
            _ if depth == 1 && json[at..].starts_with(METADATA) => {
                return Some(at + METADATA.len());
            }
            _ => at = end_of_text(json, at)?,
        }
        at += 1;
    }
}

/// Where the text ends that begins at `start`.
fn end_of_text(json: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        at += memchr::memchr2(b'"', b'\\', json.get(at..)?)?;
        if json[at] == b'"' {
            return Some(at);
        }
        at += 2;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_revision_goes_into_the_metadata_of_the_object() {
        for (stored, before) in [
            (json!({"data": {"metadata": {"a": "\\\"}"}}, "metadata": {"name": "x"}}), "\"name\""),
            (json!({"a": "\"metadata\":{", "b": ["metadata", {}], "metadata": {}}), ""),
            (json!({"metadata": {"name": "x"}, "spec": {"metadata": {}}}), "\"name\""),
        ] {
            let value = Bytes::from(stored.to_string());
            let at = own_metadata(&value).unwrap();
            let rest = std::str::from_utf8(&value[at..]).unwrap();
            assert!(rest.starts_with(before) && !rest.starts_with("\"a\""), "{rest}");
            let mut expected = stored.clone();
            expected["metadata"]["resourceVersion"] = json!("7");
            let record = Record { key: "k".into(), value, revision: 7 };
            let json: Value = serde_json::from_slice(&object_json(&record, 7)).unwrap();
            assert_eq!(json, expected);
        }
        assert_eq!(own_metadata(b"{\"spec\":{\"metadata\":{}}}"), None);
    }
}
