//! Which lists and maps have owners by element, and which as a whole. It follows the Kubernetes API types (`listType`, `mapType`); a
//! field means the same in all kinds that are served, but where its parent is looked at.

use serde_json::Value;

/// How a value is divided among owners.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shape {
    /// Not at all: a scalar, or what only makes sense as a whole.
    Atomic,
    /// A map, by its fields.
    Fields,
    /// A list without order, by its values.
    Values,
    /// A list of maps, by these of their fields.
    Keyed(&'static [Key]),
}

/// A field by which the elements of a list are known.
#[derive(Debug)]
pub(super) struct Key {
    name: &'static str,
    /// What stands for a field that is not given.
    default: Option<&'static str>,
}

const fn required(name: &'static str) -> Key {
    Key { name, default: None }
}

const PROTOCOL: Key = Key { name: "protocol", default: Some("TCP") };

// Keys in alphabetical order, as they stand in `fieldsV1`.
const NAME: &[Key] = &[required("name")];
const TYPE: &[Key] = &[required("type")];
const ADDRESS: &[Key] = &[required("ip")];
const OWNER: &[Key] = &[required("uid")];
const MOUNT: &[Key] = &[required("mountPath")];
const DEVICE: &[Key] = &[required("devicePath")];
const SPREAD: &[Key] = &[required("topologyKey"), required("whenUnsatisfiable")];
const CONTAINER_PORT: &[Key] = &[required("containerPort"), PROTOCOL];
const SERVICE_PORT: &[Key] = &[required("port"), PROTOCOL];

/// The shape of the value of `field` in the map, or in the elements of the list, that is called `parent`; of fields of the object
/// itself it is empty.
pub(super) fn of(parent: &str, field: &str, value: &Value) -> Shape {
    match value {
        Value::Object(_) if is_atomic_map(field) => Shape::Atomic,
        Value::Object(_) => Shape::Fields,
        Value::Array(_) => list(parent, field),
        _ => Shape::Atomic,
    }
}

/// References and selectors.
fn is_atomic_map(field: &str) -> bool {
    matches!(
        field,
        "selector"
            | "nodeSelector"
            | "labelSelector"
            | "podSelector"
            | "namespaceSelector"
            // Of node affinity: a NodeSelector.
            | "requiredDuringSchedulingIgnoredDuringExecution"
            | "configMapKeyRef"
            | "secretKeyRef"
            | "fieldRef"
            | "resourceFieldRef"
            | "secretRef"
            | "involvedObject"
            | "related"
            | "targetRef"
            | "resource"
    )
}

fn list(parent: &str, field: &str) -> Shape {
    match (parent, field) {
        (
            _,
            "containers" | "initContainers" | "ephemeralContainers" | "volumes" | "env"
            | "schedulingGates" | "resourceClaims",
        )
        | ("resources", "claims")
        // Of a pod; that of a ServiceAccount is one.
        | ("spec", "imagePullSecrets")
        | ("", "secrets") => Shape::Keyed(NAME),
        (_, "volumeMounts") => Shape::Keyed(MOUNT),
        (_, "volumeDevices") => Shape::Keyed(DEVICE),
        (_, "hostAliases") | ("status", "podIPs") => Shape::Keyed(ADDRESS),
        (_, "topologySpreadConstraints") => Shape::Keyed(SPREAD),
        (_, "conditions") | ("status", "addresses") => Shape::Keyed(TYPE),
        ("metadata", "ownerReferences") => Shape::Keyed(OWNER),
        ("containers" | "initContainers" | "ephemeralContainers", "ports") => {
            Shape::Keyed(CONTAINER_PORT)
        }
        ("spec", "ports") => Shape::Keyed(SERVICE_PORT),
        ("metadata", "finalizers") | ("spec", "podCIDRs") => Shape::Values,
        _ => Shape::Atomic,
    }
}

/// By what an element of a list is known in `fieldsV1`, such as `k:{"name":"main"}`; none without its keys.
pub(super) fn element(keys: &[Key], element: &Value) -> Option<String> {
    let part = |key: &Key| {
        let value = element.get(key.name).filter(|value| !value.is_null());
        let value = value.cloned().or_else(|| key.default.map(Value::from))?;
        Some(format!("{}:{value}", Value::from(key.name)))
    };
    let parts: Option<Vec<String>> = keys.iter().map(part).collect();
    Some(format!("k:{{{}}}", parts?.join(",")))
}

/// Whether an element is known by that field.
pub(super) fn is_key(keys: &[Key], field: &str) -> bool {
    keys.iter().any(|key| key.name == field)
}

/// By what a value of a list without order is known.
pub(super) fn value(value: &Value) -> String {
    format!("v:{value}")
}

/// By what a field is known.
pub(super) fn field(name: &str) -> String {
    format!("f:{name}")
}
