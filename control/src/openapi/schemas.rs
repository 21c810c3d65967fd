//! The schemas of kinds and of what they are made of.

use k8s_openapi::api::{apps, batch, coordination, core, discovery, networking, policy};
use mesh_model::kinds::Kind;
use schemars::generate::{SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value, json};

/// The schemas of `kinds` and of all types that they lead to; references start with `reference_prefix`.
pub(super) fn all<'a>(
    reference_prefix: &str,
    kinds: impl Iterator<Item = &'a Kind>,
) -> Map<String, Value> {
    let settings = SchemaSettings::openapi3().with(|s| {
        s.definitions_path = "/definitions".into();
        s.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut roots = Map::new();
    for kind in kinds {
        if let Some(name) = add(kind, &mut generator) {
            roots.insert(name, group_version_kind(kind));
        }
    }
    let mut schemas = Map::new();
    for (name, schema) in generator.take_definitions(true) {
        let mut schema = adapt(schema, reference_prefix);
        if let Some(kind) = roots.get(&name) {
            schema["x-kubernetes-group-version-kind"] = json!([kind]);
        }
        schemas.insert(name, schema);
    }
    schemas
}

fn group_version_kind(kind: &Kind) -> Value {
    json!({"group": kind.group, "version": kind.version, "kind": kind.kind})
}

/// Adds a kind to the generator; returns the name under which its schema will be.
fn add(kind: &Kind, generator: &mut SchemaGenerator) -> Option<String> {
    macro_rules! of {
        ($type:ty) => {{
            generator.subschema_for::<$type>();
            Some(<$type as schemars::JsonSchema>::schema_name().into_owned())
        }};
    }
    match kind.kind {
        "Namespace" => of!(core::v1::Namespace),
        "Node" => of!(core::v1::Node),
        "Pod" => of!(core::v1::Pod),
        "Service" => of!(core::v1::Service),
        "Endpoints" => of!(core::v1::Endpoints),
        "ConfigMap" => of!(core::v1::ConfigMap),
        "Secret" => of!(core::v1::Secret),
        "Event" => of!(core::v1::Event),
        "ServiceAccount" => of!(core::v1::ServiceAccount),
        "ControllerRevision" => of!(apps::v1::ControllerRevision),
        "DaemonSet" => of!(apps::v1::DaemonSet),
        "Deployment" => of!(apps::v1::Deployment),
        "ReplicaSet" => of!(apps::v1::ReplicaSet),
        "StatefulSet" => of!(apps::v1::StatefulSet),
        "CronJob" => of!(batch::v1::CronJob),
        "Job" => of!(batch::v1::Job),
        "Lease" => of!(coordination::v1::Lease),
        "EndpointSlice" => of!(discovery::v1::EndpointSlice),
        "Ingress" => of!(networking::v1::Ingress),
        "IngressClass" => of!(networking::v1::IngressClass),
        "NetworkPolicy" => of!(networking::v1::NetworkPolicy),
        "PodDisruptionBudget" => of!(policy::v1::PodDisruptionBudget),
        _ => None,
    }
}

/// kubectl reads plain `$ref`s with its own prefix, and one type, not a list of them.
fn adapt(schema: Value, prefix: &str) -> Value {
    match schema {
        Value::Object(map) => {
            if let [only] =
                map.get("allOf").and_then(Value::as_array).map_or(&[][..], Vec::as_slice)
                && only.get("$ref").is_some()
            {
                return adapt(only.clone(), prefix);
            }
            let adapted =
                map.into_iter().filter(|(k, _)| k != "nullable").map(|(key, value)| {
                    match (key.as_str(), &value) {
                        ("$ref", Value::String(reference)) => {
                            let name = reference.rsplit('/').next().unwrap_or_default();
                            (key, json!(format!("{prefix}{name}")))
                        }
                        ("type", Value::Array(types)) => {
                            let named = types.iter().find(|t| *t != "null").cloned();
                            (key, named.unwrap_or(Value::Null))
                        }
                        _ => (key, adapt(value, prefix)),
                    }
                });
            Value::Object(adapted.collect())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(|v| adapt(v, prefix)).collect()),
        other => other,
    }
}
