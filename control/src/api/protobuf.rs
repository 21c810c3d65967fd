//! Bodies in the protobuf form of the Kubernetes API, which `kubectl create` sends: decoded to the same JSON.
//!
//! Only requests: answers are always JSON, which every client takes. A field that is not in the table is refused
//! rather than dropped.

use std::collections::HashMap;
use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

/// Media type of the form.
pub(crate) const MEDIA_TYPE: &str = "application/vnd.kubernetes.protobuf";

const MAGIC: &[u8] = b"k8s\0";
const DEPTH: usize = 32;
/// Numbers and booleans whose zero means something else than their absence.
const OPTIONAL: &[&str] = &[
    "activeDeadlineSeconds",
    "allocateLoadBalancerNodePorts",
    "allowPrivilegeEscalation",
    "automountServiceAccountToken",
    "backoffLimit",
    "backoffLimitPerIndex",
    "blockOwnerDeletion",
    "completions",
    "controller",
    "defaultMode",
    "deletionGracePeriodSeconds",
    "enableServiceLinks",
    "failedJobsHistoryLimit",
    "fsGroup",
    "gracePeriodSeconds",
    "hostUsers",
    "immutable",
    "leaseDurationSeconds",
    "leaseTransitions",
    "manualSelector",
    "maxFailedIndexes",
    "maxSurge",
    "maxUnavailable",
    "minAvailable",
    "minDomains",
    "mode",
    "optional",
    "orphanDependents",
    "parallelism",
    "priority",
    "privileged",
    "progressDeadlineSeconds",
    "readOnlyRootFilesystem",
    "ready",
    "replicas",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "serving",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "startingDeadlineSeconds",
    "succeededCount",
    "successfulJobsHistoryLimit",
    "suspend",
    "terminating",
    "terminationGracePeriodSeconds",
    "tolerationSeconds",
    "ttlSecondsAfterFinished",
];

/// Why a body cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    #[error("the body does not start as a protobuf object of Kubernetes")]
    Magic,
    #[error("the protobuf body ends too early or is damaged in {0}")]
    Damaged(String),
    #[error("kind {0:?} is not understood as protobuf: send JSON or YAML")]
    Kind(String),
    #[error("field {field} of {message} is not understood as protobuf: send JSON or YAML")]
    Field { message: String, field: u64 },
}

#[derive(Debug, Clone, Copy)]
struct Field {
    name: &'static str,
    type_: &'static str,
    repeated: bool,
    map: bool,
}

type Messages = HashMap<&'static str, HashMap<u64, Field>>;

/// The object of a body, with `apiVersion` and `kind`.
pub(crate) fn decode(bytes: &[u8]) -> Result<Value, DecodeError> {
    let mut reader = Reader(bytes.strip_prefix(MAGIC).ok_or(DecodeError::Magic)?);
    let damaged = || DecodeError::Damaged("the envelope".to_owned());
    let (mut version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    while let Some((number, wire)) = reader.field().ok_or_else(damaged)? {
        match (number, wire) {
            (1, Wire::Bytes(meta)) => {
                let mut meta = Reader(meta);
                while let Some((number, wire)) = meta.field().ok_or_else(damaged)? {
                    match (number, wire.text()) {
                        (1, Some(text)) => version = text,
                        (2, Some(text)) => kind = text,
                        _ => return Err(damaged()),
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let (name, _) =
        messages().get_key_value(kind.as_str()).ok_or(DecodeError::Kind(kind.clone()))?;
    let mut object = Map::new();
    object.insert("apiVersion".to_owned(), json!(version));
    object.insert("kind".to_owned(), json!(kind));
    message(name, raw, &mut object, DEPTH)?;
    Ok(Value::Object(object))
}

fn messages() -> &'static Messages {
    static MESSAGES: OnceLock<Messages> = OnceLock::new();
    MESSAGES.get_or_init(|| {
        let lines = include_str!("protobuf/messages.txt").lines();
        lines.filter(|line| !line.starts_with('#')).map(parse_message).collect()
    })
}

fn parse_message(line: &'static str) -> (&'static str, HashMap<u64, Field>) {
    let mut words = line.split(' ');
    let name = words.next().unwrap_or_default();
    let field = |word: &'static str| {
        let (field, rest) = word.split_once('=')?;
        let (number, type_) = rest.split_once(':')?;
        let (repeated, map) = (type_.starts_with('*'), type_.starts_with('%'));
        let type_ = type_.trim_start_matches(['*', '%']);
        Some((number.parse().ok()?, Field { name: field, type_, repeated, map }))
    };
    let fields = words.map(|word| field(word).expect("every word of the table is a field"));
    (name, fields.collect())
}

/// Reads the fields of a message into an object.
fn message(
    name: &str,
    bytes: &[u8],
    object: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), DecodeError> {
    let damaged = || DecodeError::Damaged(name.to_owned());
    let fields = messages().get(name).filter(|_| depth > 0).ok_or_else(damaged)?;
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.field().ok_or_else(damaged)? {
        let Some(field) = fields.get(&number) else {
            return Err(DecodeError::Field { message: name.to_owned(), field: number });
        };
        match (field.type_, field.name, &wire) {
            ("skip", ..) => {}
            (inner, "+", Wire::Bytes(bytes)) => message(inner, bytes, object, depth - 1)?,
            _ if field.map => {
                let (key, entry) = map_entry(field, &wire, depth).ok_or_else(damaged)??;
                let map = object.entry(field.name).or_insert_with(|| json!({}));
                map.as_object_mut().ok_or_else(damaged)?.insert(key, entry);
            }
            _ => {
                let found = value(field.type_, &wire, depth).ok_or_else(damaged)??;
                if field.repeated {
                    let list = object.entry(field.name).or_insert_with(|| json!([]));
                    list.as_array_mut().ok_or_else(damaged)?.push(found);
                } else if !is_absent(name, field.name, &found) {
                    object.insert(field.name.to_owned(), found);
                }
            }
        }
    }
    Ok(())
}

/// Clients write what is not set as zero, except where zero has a meaning of its own.
fn is_absent(message: &str, field: &str, value: &Value) -> bool {
    let optional =
        OPTIONAL.contains(&field) || (message, field) == ("ClientIpConfig", "timeoutSeconds");
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Bool(false) => !optional,
        Value::Number(number) => number.as_i64() == Some(0) && !optional,
        _ => false,
    }
}

fn map_entry(
    field: &Field,
    wire: &Wire<'_>,
    depth: usize,
) -> Option<Result<(String, Value), DecodeError>> {
    let Wire::Bytes(bytes) = wire else { return None };
    let mut reader = Reader(bytes);
    let (mut key, mut found) = (String::new(), json!(""));
    while let Some((number, wire)) = reader.field()? {
        match number {
            1 => key = wire.text()?,
            2 => match value(field.type_, &wire, depth)? {
                Ok(value) => found = value,
                Err(error) => return Some(Err(error)),
            },
            _ => return None,
        }
    }
    Some(Ok((key, found)))
}

/// One value; `None` when it is not of its type.
fn value(type_: &str, wire: &Wire<'_>, depth: usize) -> Option<Result<Value, DecodeError>> {
    let value = match (type_, wire) {
        ("s", _) => json!(wire.text()?),
        ("b", Wire::Bytes(bytes)) => json!(STANDARD.encode(bytes)),
        ("i", Wire::Number(number)) => json!(signed(*number)),
        ("t", Wire::Number(number)) => json!(*number != 0),
        ("Time" | "MicroTime", Wire::Bytes(bytes)) => time(bytes)?,
        ("Quantity", Wire::Bytes(bytes)) => text_of(bytes, 1)?,
        ("IntOrString", Wire::Bytes(bytes)) => int_or_string(bytes)?,
        (name, Wire::Bytes(bytes)) => {
            let mut object = Map::new();
            let read = message(name, bytes, &mut object, depth - 1);
            return Some(read.map(|()| Value::Object(object)));
        }
        _ => return None,
    };
    Some(Ok(value))
}

/// Integers are two's complement, as protobuf's int32 and int64.
fn signed(number: u64) -> i64 {
    i64::from_ne_bytes(number.to_ne_bytes())
}

fn time(bytes: &[u8]) -> Option<Value> {
    let (mut secs, mut nanos) = (None, 0);
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.field()? {
        match (number, wire) {
            (1, Wire::Number(number)) => secs = Some(signed(number)),
            (2, Wire::Number(number)) => nanos = i32::try_from(signed(number)).ok()?,
            _ => return None,
        }
    }
    // The zero time of clients is far before this one.
    let Some(secs) = secs.filter(|secs| *secs > 0) else { return Some(Value::Null) };
    Some(json!(Timestamp::new(secs, nanos).ok()?.to_string()))
}

fn text_of(bytes: &[u8], field: u64) -> Option<Value> {
    let mut text = String::new();
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.field()? {
        if number == field {
            text = wire.text()?;
        }
    }
    Some(json!(text))
}

fn int_or_string(bytes: &[u8]) -> Option<Value> {
    let (mut is_text, mut number, mut text) = (false, 0, String::new());
    let mut reader = Reader(bytes);
    while let Some((field, wire)) = reader.field()? {
        match (field, &wire) {
            (1, Wire::Number(type_)) => is_text = *type_ == 1,
            (2, Wire::Number(value)) => number = signed(*value),
            (3, _) => text = wire.text()?,
            _ => return None,
        }
    }
    Some(if is_text { json!(text) } else { json!(number) })
}

enum Wire<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl Wire<'_> {
    fn text(&self) -> Option<String> {
        match self {
            Self::Bytes(bytes) => String::from_utf8(bytes.to_vec()).ok(),
            Self::Number(_) => None,
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// The next field; the outer `None` when the bytes are damaged, the inner one at the end.
    #[allow(clippy::option_option)]
    fn field(&mut self) -> Option<Option<(u64, Wire<'a>)>> {
        if self.0.is_empty() {
            return Some(None);
        }
        let tag = self.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Number(self.varint()?),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                let (bytes, rest) = self.0.split_at_checked(length)?;
                self.0 = rest;
                Wire::Bytes(bytes)
            }
            _ => return None,
        };
        Some(Some((tag >> 3, wire)))
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (first, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests;
