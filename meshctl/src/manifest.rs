//! Manifests: YAML or JSON, several documents, lists; and the change that one asks for.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use mesh_model::kinds::{self, KINDS, Kind};
use serde::Deserialize as _;
use serde_json::{Map, Value};

/// The annotation in which kubectl keeps what was applied last; sharing it lets people use both.
pub(crate) const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// One object of a manifest.
#[derive(Debug)]
pub(crate) struct Object {
    pub(crate) kind: &'static Kind,
    pub(crate) name: String,
    pub(crate) namespace: Option<String>,
    pub(crate) value: Value,
}

impl Object {
    /// `kind/name`, as kubectl prints it.
    pub(crate) fn title(&self) -> String {
        title(self.kind, &self.name)
    }
}

/// `deployment.apps/web`.
pub(crate) fn title(kind: &Kind, name: &str) -> String {
    match kind.group {
        "" => format!("{}/{name}", kind.singular),
        group => format!("{}.{group}/{name}", kind.singular),
    }
}

/// Reads a file or, for `-`, stdin.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<Object>> {
    let named = || format!("read -f {}", path.display());
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).with_context(named)?;
    } else {
        text = std::fs::read_to_string(path).with_context(named)?;
    }
    parse(&text).with_context(|| format!("-f {}", path.display()))
}

fn parse(text: &str) -> anyhow::Result<Vec<Object>> {
    let mut objects = Vec::new();
    for (index, document) in documents(text)?.into_iter().enumerate() {
        flatten(document, &mut objects).with_context(|| format!("document {}", index + 1))?;
    }
    if objects.is_empty() {
        bail!("no objects in it");
    }
    Ok(objects)
}

fn documents(text: &str) -> anyhow::Result<Vec<Value>> {
    if text.trim_start().starts_with('{') {
        let stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        return stream.collect::<Result<_, _>>().context("malformed JSON");
    }
    let options = serde_saphyr::options! { strict_booleans: true };
    let all: Vec<Value> =
        serde_saphyr::from_multiple_with_options(text, options).context("malformed YAML")?;
    Ok(all.into_iter().filter(|v| !v.is_null()).collect())
}

fn flatten(value: Value, objects: &mut Vec<Object>) -> anyhow::Result<()> {
    let text = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion").to_owned(), text("kind").to_owned());
    if kind == "List" {
        let items = Vec::deserialize(&value["items"]).context("items of the List")?;
        return items.into_iter().try_for_each(|item| flatten(item, objects));
    }
    if kind.is_empty() || api_version.is_empty() {
        bail!("an object needs apiVersion and kind");
    }
    let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
    let Some(served) = kinds::by_kind(group, version, &kind) else {
        bail!("{kind} ({api_version}) is not served here; served are: {}", served_kinds());
    };
    let metadata = |field: &str| value.get("metadata")?.get(field)?.as_str().map(str::to_owned);
    let Some(name) = metadata("name") else { bail!("{kind}: metadata.name is missing") };
    let namespace = metadata("namespace").filter(|_| served.namespaced);
    objects.push(Object { kind: served, name, namespace, value });
    Ok(())
}

/// All served kinds, for messages.
pub(crate) fn served_kinds() -> String {
    KINDS.iter().map(|k| k.kind).collect::<Vec<_>>().join(", ")
}

/// The JSON merge patch (RFC 7396) that leads from the live object to the desired one: fields that were applied
/// last time and are no longer wanted become null, all others of the live object stay.
pub(crate) fn patch(last: &Value, live: &Value, desired: &Value) -> Value {
    let mut changes = Map::new();
    let empty = Map::new();
    let of = |value: &'_ Value| value.as_object().cloned().unwrap_or_default();
    let (last, live) = (of(last), of(live));
    let desired = desired.as_object().unwrap_or(&empty);
    for name in last.keys().filter(|name| !desired.contains_key(*name) && live.contains_key(*name))
    {
        changes.insert(name.clone(), Value::Null);
    }
    for (name, wanted) in desired {
        let present = live.get(name).unwrap_or(&Value::Null);
        if present == wanted {
            continue;
        }
        if wanted.is_object() && present.is_object() {
            let inner = patch(last.get(name).unwrap_or(&Value::Null), present, wanted);
            if inner.as_object().is_some_and(|o| !o.is_empty()) {
                changes.insert(name.clone(), inner);
            }
        } else if !covers(present, wanted) {
            changes.insert(name.clone(), wanted.clone());
        }
    }
    Value::Object(changes)
}

/// Whether the live value is the wanted one plus what the server filled in by default.
fn covers(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => {
            wanted.iter().all(|(k, w)| live.get(k).is_some_and(|l| covers(l, w)))
        }
        (Value::Array(live), Value::Array(wanted)) => {
            live.len() == wanted.len() && live.iter().zip(wanted).all(|(l, w)| covers(l, w))
        }
        (live, wanted) => live == wanted,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn documents_lists_and_comments_are_read() {
        let text = "# hello\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {y: 'on'}\n---\n\
                    apiVersion: v1\nkind: List\nitems:\n- apiVersion: apps/v1\n  kind: Deployment\n  metadata: {name: b, namespace: c}\n";
        let objects = parse(text).unwrap();
        let titles: Vec<String> = objects.iter().map(Object::title).collect();
        assert_eq!(titles, ["configmap/a", "deployment.apps/b"]);
        assert_eq!(objects[1].namespace.as_deref(), Some("c"));
        assert_eq!(objects[0].value["data"]["y"], "on");
    }

    #[test]
    fn what_cannot_be_applied_is_named() {
        let error = |text: &str| format!("{:#}", parse(text).unwrap_err());
        let unknown = error("apiVersion: batch/v1\nkind: CronTab\nmetadata: {name: a}");
        assert!(
            unknown.contains("CronTab (batch/v1)") && unknown.contains("Deployment"),
            "{unknown}"
        );
        assert!(error("kind: Pod").contains("apiVersion"));
        assert!(error("apiVersion: v1\nkind: Pod").contains("metadata.name"));
        assert!(error("a: [").contains("malformed YAML"));
        assert!(error("{").contains("malformed JSON"));
        assert!(error("").contains("no objects"));
    }

    #[test]
    fn a_patch_changes_only_what_the_manifest_owns() {
        let last =
            json!({"spec": {"replicas": 3, "paused": true}, "metadata": {"labels": {"a": "1"}}});
        let live = json!({"spec": {"replicas": 3, "paused": true, "strategy": {"type": "RollingUpdate"}},
                          "metadata": {"labels": {"a": "1", "by": "other"}, "uid": "x"}});
        let desired = json!({"spec": {"replicas": 5}, "metadata": {"labels": {"b": "2"}}});
        assert_eq!(
            patch(&last, &live, &desired),
            json!({"spec": {"paused": null, "replicas": 5}, "metadata": {"labels": {"a": null, "b": "2"}}})
        );
        assert_eq!(patch(&desired, &desired, &desired), json!({}));
    }

    #[test]
    fn defaults_inside_lists_are_no_change() {
        let desired = json!({"spec": {"ports": [{"port": 80}]}});
        let live = json!({"spec": {"ports": [{"port": 80, "protocol": "TCP"}]}});
        assert_eq!(patch(&desired, &live, &desired), json!({}));
        let moved = json!({"spec": {"ports": [{"port": 81}]}});
        assert_eq!(patch(&desired, &live, &moved), moved);
    }
}
