//! Strategic merge patch: maps are merged, and so are those lists whose elements have a key.
//!
//! Directives: `$patch` (delete, replace, merge), `$retainKeys`, `$deleteFromPrimitiveList/FIELD`,
//! `$setElementOrder/FIELD`. Which lists have which key follows the Kubernetes API types; a field name means
//! the same in all kinds that are served, except where [`merge_key`] looks at the parent.

use serde_json::{Map, Value};

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const DELETE_FROM: &str = "$deleteFromPrimitiveList/";
const ORDER: &str = "$setElementOrder/";

/// How a list is patched.
enum ListMerge {
    Replace,
    /// A set of strings or numbers.
    Set,
    /// Elements with a key.
    By(&'static str),
}

fn merge_key(field: &str, parent: &str) -> ListMerge {
    match field {
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "volumes"
        | "imagePullSecrets"
        | "env"
        | "resourceClaims" => ListMerge::By("name"),
        "secrets" => ListMerge::By("name"),
        "volumeMounts" => ListMerge::By("mountPath"),
        "volumeDevices" => ListMerge::By("devicePath"),
        "hostAliases" | "podIPs" | "hostIPs" => ListMerge::By("ip"),
        "topologySpreadConstraints" => ListMerge::By("topologyKey"),
        "ownerReferences" => ListMerge::By("uid"),
        "conditions" | "addresses" => ListMerge::By("type"),
        "ports" if parent == "containers" || parent == "initContainers" => {
            ListMerge::By("containerPort")
        }
        "ports" if parent == "spec" => ListMerge::By("port"),
        "finalizers" | "podCIDRs" => ListMerge::Set,
        _ => ListMerge::Replace,
    }
}

/// Applies `patch` to `target`.
pub(super) fn merge(target: &mut Value, patch: &Value) -> Result<(), String> {
    merge_value(target, patch, "")
}

fn merge_value(target: &mut Value, patch: &Value, field: &str) -> Result<(), String> {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return Ok(());
    };
    match directive(patch)? {
        Some("replace") => {
            *target = Value::Object(plain(patch));
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        _ => {}
    }
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let target = target.as_object_mut().expect("made an object above");
    retain(target, patch)?;
    for (key, value) in patch {
        if let Some(list) = key.strip_prefix(DELETE_FROM) {
            delete_from(target, list, value)?;
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        if value.is_null() {
            target.remove(key);
        } else if value.is_array() {
            merge_list(target.entry(key.clone()).or_insert(Value::Null), value, key, field)?;
        } else if is_deleted(value)? {
            target.remove(key);
        } else {
            merge_value(target.entry(key.clone()).or_insert(Value::Null), value, key)?;
        }
    }
    for (key, order) in patch {
        if let Some(list) = key.strip_prefix(ORDER) {
            reorder(target, list, order, field)?;
        }
    }
    Ok(())
}

fn directive(patch: &Map<String, Value>) -> Result<Option<&str>, String> {
    match patch.get(PATCH).map(|v| v.as_str().unwrap_or_default()) {
        None => Ok(None),
        Some(word @ ("replace" | "delete" | "merge")) => Ok(Some(word)),
        Some(other) => Err(format!("unknown $patch directive {other:?}")),
    }
}

fn is_deleted(value: &Value) -> Result<bool, String> {
    let Some(map) = value.as_object() else { return Ok(false) };
    Ok(directive(map)? == Some("delete"))
}

/// Without the directives, at any depth.
fn plain(patch: &Map<String, Value>) -> Map<String, Value> {
    let fields = patch.iter().filter(|(key, _)| !key.starts_with('$'));
    fields.map(|(key, value)| (key.clone(), plain_value(value))).collect()
}

fn plain_value(value: &Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(plain(map)),
        Value::Array(list) => Value::Array(list.iter().map(plain_value).collect()),
        other => other.clone(),
    }
}

fn retain(target: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), String> {
    let Some(keys) = patch.get(RETAIN) else { return Ok(()) };
    let keys = keys.as_array().ok_or("$retainKeys must be a list")?;
    target.retain(|key, _| keys.iter().any(|k| k.as_str() == Some(key)));
    Ok(())
}

fn delete_from(target: &mut Map<String, Value>, list: &str, gone: &Value) -> Result<(), String> {
    let gone = gone.as_array().ok_or_else(|| format!("{DELETE_FROM}{list} must be a list"))?;
    if let Some(Value::Array(current)) = target.get_mut(list) {
        current.retain(|value| !gone.contains(value));
    }
    Ok(())
}

fn merge_list(target: &mut Value, patch: &Value, field: &str, parent: &str) -> Result<(), String> {
    let patch = patch.as_array().expect("the caller looked");
    let replaces = |v: &Value| v.get(PATCH).and_then(Value::as_str) == Some("replace");
    let by = merge_key(field, parent);
    if patch.iter().any(|v| replaces(v) && v.as_object().is_some_and(|m| m.len() == 1)) {
        let rest = patch.iter().filter(|v| !replaces(v)).map(plain_value);
        *target = Value::Array(rest.collect());
        return Ok(());
    }
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let current = target.as_array_mut().expect("made a list above");
    match by {
        ListMerge::Replace => *current = patch.iter().map(plain_value).collect(),
        ListMerge::Set => {
            let new: Vec<_> = patch.iter().filter(|v| !current.contains(v)).cloned().collect();
            current.extend(new);
        }
        ListMerge::By(key) => merge_elements(current, patch, key, field)?,
    }
    Ok(())
}

fn merge_elements(
    current: &mut Vec<Value>,
    patch: &[Value],
    key: &str,
    field: &str,
) -> Result<(), String> {
    for element in patch {
        let map =
            element.as_object().ok_or_else(|| format!("{field}: elements must be objects"))?;
        let id = map.get(key).ok_or_else(|| {
            format!("map: {field} element does not contain declared merge key: {key}")
        })?;
        let found = current.iter().position(|c| c.get(key) == Some(id));
        match (directive(map)?, found) {
            (Some("delete"), _) => current.retain(|c| c.get(key) != Some(id)),
            (Some("replace"), Some(at)) => current[at] = Value::Object(plain(map)),
            (_, Some(at)) => merge_value(&mut current[at], element, field)?,
            (_, None) => {
                let mut new = Value::Object(Map::new());
                merge_value(&mut new, element, field)?;
                current.push(new);
            }
        }
    }
    Ok(())
}

/// Brings a list into the given order; what the order does not name keeps its place relative to its successor.
fn reorder(
    target: &mut Map<String, Value>,
    list: &str,
    order: &Value,
    parent: &str,
) -> Result<(), String> {
    let order = order.as_array().ok_or_else(|| format!("{ORDER}{list} must be a list"))?;
    let Some(Value::Array(current)) = target.get_mut(list) else { return Ok(()) };
    let key = match merge_key(list, parent) {
        ListMerge::By(key) => Some(key),
        _ => None,
    };
    let rank = |value: &Value| {
        order.iter().position(|o| match key {
            Some(key) => value.get(key).is_some() && o.get(key) == value.get(key),
            None => o == value,
        })
    };
    let mut ranked: Vec<(usize, Value)> = Vec::with_capacity(current.len());
    // From the end, so that an element without a rank stands before the element that it stood before.
    let mut next = order.len();
    for value in current.drain(..).rev() {
        next = rank(&value).unwrap_or(next);
        ranked.push((next, value));
    }
    ranked.reverse();
    ranked.sort_by_key(|(rank, value)| (*rank, self::rank_second(order, key, value)));
    current.extend(ranked.into_iter().map(|(_, value)| value));
    Ok(())
}

/// Among equals, those that the order does not name come first.
fn rank_second(order: &[Value], key: Option<&str>, value: &Value) -> bool {
    order.iter().any(|o| match key {
        Some(key) => value.get(key).is_some() && o.get(key) == value.get(key),
        None => o == value,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn patched(target: Value, patch: Value) -> Value {
        let mut target = target;
        merge(&mut target, &patch).unwrap();
        target
    }

    fn pod() -> Value {
        json!({"metadata": {"labels": {"a": "1", "b": "2"}, "finalizers": ["x", "y"]}, "spec": {
            "containers": [
                {"name": "one", "image": "i:1", "env": [{"name": "A", "value": "1"}],
                 "ports": [{"containerPort": 80}], "args": ["a", "b"]},
                {"name": "two", "image": "i:2"}],
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}})
    }

    #[test]
    fn lists_with_a_key_are_merged_and_others_replaced() {
        let patch = json!({"metadata": {"labels": {"a": null, "c": "3"}}, "spec": {"containers": [
            {"name": "one", "image": "i:9", "env": [{"name": "B", "value": "2"}], "args": ["c"],
             "ports": [{"containerPort": 80, "name": "http"}]},
            {"name": "three", "image": "i:3"}]}});
        let got = patched(pod(), patch);
        assert_eq!(got["metadata"]["labels"], json!({"b": "2", "c": "3"}));
        let containers = got["spec"]["containers"].as_array().unwrap();
        assert_eq!(containers.len(), 3);
        assert_eq!(containers[0]["image"], "i:9");
        assert_eq!(containers[0]["env"].as_array().unwrap().len(), 2);
        assert_eq!(containers[0]["args"], json!(["c"]));
        assert_eq!(containers[0]["ports"], json!([{"containerPort": 80, "name": "http"}]));
    }

    #[test]
    fn elements_can_be_deleted_replaced_and_ordered() {
        let patch = json!({"spec": {
            "$setElementOrder/containers": [{"name": "three"}, {"name": "one"}],
            "containers": [{"name": "two", "$patch": "delete"}, {"name": "three", "image": "i:3"}]}});
        let got = patched(pod(), patch);
        let names: Vec<_> =
            got["spec"]["containers"].as_array().unwrap().iter().map(|c| &c["name"]).collect();
        assert_eq!(names, ["three", "one"]);
        let patch = json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "x"}]}});
        assert_eq!(patched(pod(), patch)["spec"]["containers"], json!([{"name": "x"}]));
        let patch =
            json!({"spec": {"containers": [{"name": "one", "$patch": "replace", "image": "z"}]}});
        let got = patched(pod(), patch);
        assert_eq!(got["spec"]["containers"][0], json!({"name": "one", "image": "z"}));
    }

    #[test]
    fn the_other_directives() {
        let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["x"], "finalizers": ["z"],
            "$setElementOrder/finalizers": ["z", "y"]}});
        assert_eq!(patched(pod(), patch)["metadata"]["finalizers"], json!(["z", "y"]));
        let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
        assert_eq!(patched(pod(), patch)["spec"]["strategy"], json!({"type": "Recreate"}));
        let patch = json!({"spec": {"strategy": {"$patch": "replace", "type": "Recreate"}}});
        assert_eq!(patched(pod(), patch)["spec"]["strategy"], json!({"type": "Recreate"}));
        let patch = json!({"metadata": {"labels": {"$patch": "delete"}}});
        assert_eq!(patched(pod(), patch)["metadata"].get("labels"), None);
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            json!({"spec": {"containers": [{"image": "no name"}]}}),
            json!({"spec": {"containers": ["text"]}}),
            json!({"spec": {"strategy": {"$patch": "frob"}}}),
            json!({"spec": {"$retainKeys": 1}}),
            json!({"spec": {"$setElementOrder/containers": 1}}),
        ] {
            assert!(merge(&mut pod(), &bad).is_err(), "{bad}");
        }
        assert_eq!(patched(pod(), json!({})), pod());
    }

    #[test]
    fn service_ports_have_another_key_than_container_ports() {
        let service =
            json!({"spec": {"ports": [{"port": 80, "targetPort": 8080, "nodePort": 30000}]}});
        let got = patched(service, json!({"spec": {"ports": [{"port": 80, "targetPort": 9090}]}}));
        assert_eq!(
            got["spec"]["ports"],
            json!([{"port": 80, "targetPort": 9090, "nodePort": 30000}])
        );
    }
}
