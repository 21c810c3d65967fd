//! Fields that a typed object did not take from what the user wrote.

use serde::Serialize;
use serde_json::Value;

use crate::error::ApiError;

/// The paths of fields in `given` that are absent in `taken`, as `unknown field "PATH"`.
pub(crate) fn unknown_fields(
    given: &Value,
    taken: &impl Serialize,
) -> Result<Vec<String>, ApiError> {
    let taken = serde_json::to_value(taken).map_err(|e| ApiError::BadRequest(e.to_string()))?;
    let mut found = Vec::new();
    compare(given, &taken, "", &mut found);
    Ok(found)
}

fn compare(given: &Value, taken: &Value, path: &str, found: &mut Vec<String>) {
    match (given, taken) {
        (Value::Object(given), Value::Object(taken)) => {
            for (key, value) in given.iter().filter(|(_, value)| !value.is_null()) {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match taken.get(key) {
                    Some(taken) => compare(value, taken, &path, found),
                    None if is_dropped_on_purpose(&path) => {}
                    None => found.push(format!("unknown field {path:?}")),
                }
            }
        }
        (Value::Array(given), Value::Array(taken)) => {
            for (i, (given, taken)) in given.iter().zip(taken).enumerate() {
                compare(given, taken, &format!("{path}[{i}]"), found);
            }
        }
        _ => {}
    }
}

/// `apiVersion` and `kind` are always written; everything else that a type knows comes back.
fn is_dropped_on_purpose(path: &str) -> bool {
    matches!(path, "apiVersion" | "kind")
}
