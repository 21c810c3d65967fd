//! The OpenAPI documents that kubectl reads: to learn which parameters a path takes, to explain fields, and to check
//! manifests before it sends them.
//!
//! Schemas are made from the same types that the API decodes into, so that they cannot disagree.

use std::sync::OnceLock;

use mesh_model::kinds::{KINDS, Kind};
use serde_json::{Map, Value, json};

mod schemas;

/// `/openapi/v3`: where the document of each group is.
pub fn index() -> Value {
    let mut paths = Map::new();
    for kind in KINDS {
        let path = prefix(kind);
        let url = format!("/openapi/v3/{path}?hash={}", env!("CARGO_PKG_VERSION"));
        paths.insert(path, json!({"serverRelativeURL": url}));
    }
    json!({"paths": paths})
}

/// `/openapi/v3/api/v1` and `/openapi/v3/apis/GROUP/VERSION`; none when the group is not served.
pub fn document(group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<&Kind> =
        KINDS.iter().filter(|k| k.group == group && k.version == version).collect();
    if kinds.is_empty() {
        return None;
    }
    let mut paths = Map::new();
    for kind in &kinds {
        paths.extend(kind_paths(kind, Version::V3));
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": info(),
        "paths": paths,
        "components": {"schemas": schemas::all("#/components/schemas/", kinds.into_iter())},
    }))
}

/// `/openapi/v2`: all groups in one document.
pub fn v2() -> &'static Value {
    static DOCUMENT: OnceLock<Value> = OnceLock::new();
    DOCUMENT.get_or_init(|| {
        let mut paths = Map::new();
        for kind in KINDS {
            paths.extend(kind_paths(kind, Version::V2));
        }
        json!({
            "swagger": "2.0",
            "info": info(),
            "paths": paths,
            "definitions": schemas::all("#/definitions/", KINDS.iter()),
        })
    })
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": "v1.36.0"})
}

fn prefix(kind: &Kind) -> String {
    match kind.group {
        "" => format!("api/{}", kind.version),
        group => format!("apis/{group}/{}", kind.version),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    V2,
    V3,
}

fn kind_paths(kind: &Kind, version: Version) -> Vec<(String, Value)> {
    let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
    let collection = format!("/{}{scope}/{}", prefix(kind), kind.plural);
    let single = format!("{collection}/{{name}}");
    let operation = |action: &str, write: bool| {
        let mut parameters = vec![query("pretty", version)];
        if write {
            parameters
                .extend(["dryRun", "fieldManager", "fieldValidation"].map(|n| query(n, version)));
        }
        json!({
            "operationId": format!("{action}{}", kind.kind),
            "parameters": parameters,
            "responses": {"200": {"description": "OK"}},
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind":
                {"group": kind.group, "version": kind.version, "kind": kind.kind},
        })
    };
    vec![
        (collection, json!({"get": operation("list", false), "post": operation("post", true)})),
        (
            single,
            json!({
                "get": operation("get", false),
                "put": operation("put", true),
                "patch": operation("patch", true),
                "delete": operation("delete", false),
            }),
        ),
    ]
}

fn query(name: &str, version: Version) -> Value {
    match version {
        Version::V2 => json!({"name": name, "in": "query", "type": "string", "uniqueItems": true}),
        Version::V3 => {
            json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}})
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_of_the_index_has_a_document_with_its_kinds() {
        let index = index();
        for path in index["paths"].as_object().unwrap().keys() {
            let parts: Vec<&str> = path.split('/').collect();
            let (group, version) = match parts[..] {
                ["api", version] => ("", version),
                ["apis", group, version] => (group, version),
                _ => panic!("{path}"),
            };
            assert!(document(group, version).is_some(), "{path}");
        }
        assert!(document("autoscaling", "v1").is_none());
    }

    #[test]
    fn patching_takes_field_validation_and_schemas_know_their_kind() {
        let apps = document("apps", "v1").unwrap();
        let path = "/apis/apps/v1/namespaces/{namespace}/deployments/{name}";
        let parameters = apps["paths"][path]["patch"]["parameters"].to_string();
        assert!(parameters.contains("fieldValidation"));
        let schemas = apps["components"]["schemas"].as_object().unwrap();
        let deployment = &schemas["io.k8s.api.apps.v1.Deployment"];
        assert_eq!(deployment["x-kubernetes-group-version-kind"][0]["kind"], "Deployment");
        assert!(deployment["properties"]["spec"].to_string().contains("DeploymentSpec"));
        for reference in references(&apps) {
            let name = reference.strip_prefix("#/components/schemas/").unwrap();
            assert!(schemas.contains_key(name), "{reference} leads nowhere");
        }
    }

    fn references(value: &Value) -> Vec<String> {
        match value {
            Value::Object(map) => map
                .iter()
                .flat_map(|(k, v)| match v {
                    Value::String(s) if k == "$ref" => vec![s.clone()],
                    other => references(other),
                })
                .collect(),
            Value::Array(list) => list.iter().flat_map(references).collect(),
            _ => vec![],
        }
    }
}
