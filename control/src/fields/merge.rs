//! What somebody applies, put into what is there: their fields are set, and those that they applied before and no longer do are
//! dropped, unless somebody else has them, too.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::Set;
use super::shape::{self, Key, Shape};

/// The object as it is after `config` is applied to `live`. `last` is what the same owner applied before, `owned` what anybody has,
/// `config` included.
///
/// # Errors
/// When an element of a list cannot be told from the others; the text names the list.
pub fn applied(live: &Value, config: &Value, last: &Set, owned: &Set) -> Result<Value, String> {
    let mut merged = live.clone();
    if let (Value::Object(merged), Value::Object(config)) = (&mut merged, config) {
        merge_fields(merged, config, "", "")?;
        prune_fields(merged, "", &[], last, owned);
    }
    Ok(merged)
}

fn merge_fields(
    live: &mut Map<String, Value>,
    config: &Map<String, Value>,
    name: &str,
    path: &str,
) -> Result<(), String> {
    for (key, value) in config {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        merge_value(live.entry(key.clone()).or_insert(Value::Null), value, (name, key), &path)?;
    }
    Ok(())
}

fn merge_value(
    live: &mut Value,
    config: &Value,
    (parent, field): (&str, &str),
    path: &str,
) -> Result<(), String> {
    match (shape::of(parent, field, config), config) {
        (Shape::Fields, Value::Object(config)) => {
            if !live.is_object() {
                *live = Value::Object(Map::new());
            }
            let live = live.as_object_mut().expect("made an object above");
            merge_fields(live, config, field, path)?;
        }
        (Shape::Keyed(keys), Value::Array(config)) => {
            let old = live.as_array_mut().map(std::mem::take).unwrap_or_default();
            *live = Value::Array(merge_elements(old, config, keys, field, path)?);
        }
        (Shape::Values, Value::Array(config)) => {
            let mut values = live.as_array_mut().map(std::mem::take).unwrap_or_default();
            for value in config {
                if !values.contains(value) {
                    values.push(value.clone());
                }
            }
            *live = Value::Array(values);
        }
        _ => *live = config.clone(),
    }
    Ok(())
}

/// Elements that are applied stand in the order in which they are; others keep their place behind the one before them.
fn merge_elements(
    old: Vec<Value>,
    config: &[Value],
    keys: &[Key],
    field: &str,
    path: &str,
) -> Result<Vec<Value>, String> {
    let mut places = BTreeMap::new();
    for (place, item) in config.iter().enumerate() {
        let step = shape::element(keys, item)
            .ok_or_else(|| format!("{path}: an element does not have the keys of the list"))?;
        if places.insert(step.clone(), place).is_some() {
            return Err(format!("{path}: duplicate entries for key {}", &step[2..]));
        }
    }
    let mut elements: Vec<Value> = vec![Value::Null; config.len()];
    // What others have, and behind how many of ours.
    let mut others: Vec<(usize, Value)> = Vec::new();
    let mut passed = 0;
    for item in old {
        match shape::element(keys, &item).and_then(|step| places.get(&step)) {
            Some(&place) => {
                passed = passed.max(place + 1);
                // Another one with the same keys goes: they are ours now.
                if elements[place].is_null() {
                    elements[place] = item;
                }
            }
            None => others.push((passed, item)),
        }
    }
    let mut merged = Vec::with_capacity(elements.len() + others.len());
    let mut others = others.into_iter().peekable();
    for (place, (mut element, item)) in elements.into_iter().zip(config).enumerate() {
        while let Some((_, other)) = others.next_if(|(behind, _)| *behind <= place) {
            merged.push(other);
        }
        merge_value(&mut element, item, ("", field), path)?;
        merged.push(element);
    }
    merged.extend(others.map(|(_, other)| other));
    Ok(merged)
}

/// An element that stays keeps what it is known by.
fn prune_fields(map: &mut Map<String, Value>, name: &str, keys: &[Key], last: &Set, owned: &Set) {
    for (step, last) in last.steps() {
        let Some(key) = step.strip_prefix("f:") else { continue };
        if shape::is_key(keys, key) {
            continue;
        }
        match owned.at(step) {
            // With all that is in it: what nobody decided came with what is gone.
            None => drop(map.remove(key)),
            Some(owned) => {
                if let Some(value) = map.get_mut(key) {
                    prune_value(value, name, key, last, owned);
                }
            }
        }
    }
}

fn prune_value(value: &mut Value, parent: &str, field: &str, last: &Set, owned: &Set) {
    let nothing = Set::default();
    match (shape::of(parent, field, value), value) {
        (Shape::Fields, Value::Object(map)) => prune_fields(map, field, &[], last, owned),
        (Shape::Keyed(keys), Value::Array(list)) => list.retain_mut(|item| {
            let Some(step) = shape::element(keys, item) else { return true };
            let Some(last) = last.at(&step) else { return true };
            let owned = owned.at(&step).unwrap_or(&nothing);
            if let Value::Object(map) = item {
                prune_fields(map, field, keys, last, owned);
            }
            // Who has only written a field of it does not keep it.
            owned.is_member() || !last.is_member()
        }),
        (Shape::Values, Value::Array(list)) => list.retain(|item| {
            let step = shape::value(item);
            last.at(&step).is_none() || owned.at(&step).is_some()
        }),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fields::set::Changes;

    fn apply(live: &Value, config: &Value, last: &Value, others: &Value) -> Value {
        let mut owned = Set::of(config);
        owned.add(&Set::of(others));
        applied(live, config, &Set::of(last), &owned).unwrap()
    }

    #[test]
    fn lists_keep_what_others_put_in_and_follow_the_order_that_is_applied() {
        let live = json!({"spec": {"containers": [
            {"name": "a", "image": "i:1", "imagePullPolicy": "Always"}, {"name": "theirs"}, {"name": "b"}],
            "tolerations": [{"key": "x"}]}, "metadata": {"finalizers": ["x/y"]}});
        let config = json!({"spec": {"containers": [
            {"name": "b"}, {"name": "a", "image": "i:2"}, {"name": "c"}],
            "tolerations": [{"key": "y"}]}, "metadata": {"finalizers": ["z/y"]}});
        let got = apply(&live, &config, &json!({}), &json!({}));
        assert_eq!(
            got["spec"]["containers"],
            json!([{"name": "b"},
                {"name": "a", "image": "i:2", "imagePullPolicy": "Always"},
                {"name": "theirs"}, {"name": "c"}])
        );
        assert_eq!(got["spec"]["tolerations"], json!([{"key": "y"}]));
        assert_eq!(got["metadata"]["finalizers"], json!(["x/y", "z/y"]));
    }

    #[test]
    fn what_is_no_longer_applied_goes_unless_somebody_else_has_it() {
        let last = json!({"spec": {"replicas": 3, "strategy": {"rollingUpdate": {"maxSurge": 1}},
            "containers": [{"name": "a", "image": "i"}, {"name": "b", "image": "i"}]}});
        let mut live = last.clone();
        live["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] = json!("25%");
        live["spec"]["containers"][1]["env"] = json!([{"name": "E", "value": "1"}]);
        let config = json!({"spec": {"containers": [{"name": "a"}]}});
        let got = apply(&live, &config, &last, &json!({}));
        assert_eq!(got, json!({"spec": {"containers": [{"name": "a"}]}}));
        let others = json!({"spec": {"replicas": 3,
            "containers": [{"name": "b", "env": [{"name": "E", "value": "1"}]}]}});
        let got = apply(&live, &config, &last, &others);
        assert_eq!(
            got,
            json!({"spec": {"replicas": 3, "containers": [{"name": "a"},
                {"name": "b", "env": [{"name": "E", "value": "1"}]}]}})
        );
    }

    #[test]
    fn an_element_goes_although_somebody_else_wrote_a_field_of_it() {
        let last = json!({"spec": {"containers": [{"name": "a"}, {"name": "b", "image": "i:1"}]}});
        let mut live = last.clone();
        live["spec"]["containers"][1]["image"] = json!("i:2");
        let config = json!({"spec": {"containers": [{"name": "a"}]}});
        let mut owned = Set::of(&config);
        owned.add(&Changes::between(&last, &live).written);
        assert_eq!(applied(&live, &config, &Set::of(&last), &owned).unwrap(), config);
    }

    #[test]
    fn ports_of_two_protocols_are_two_ports() {
        let live = json!({"spec": {"ports": [
            {"port": 53, "protocol": "TCP", "nodePort": 30000}, {"port": 53, "protocol": "UDP"}]}});
        let config = json!({"spec": {"ports": [{"port": 53, "name": "dns-tcp"}]}});
        let got = apply(&live, &config, &json!({}), &json!({}));
        assert_eq!(
            got["spec"]["ports"],
            json!([{"port": 53, "protocol": "TCP", "nodePort": 30000, "name": "dns-tcp"},
                {"port": 53, "protocol": "UDP"}])
        );
    }

    #[test]
    fn elements_that_cannot_be_told_apart_are_refused() {
        let refused = |config: Value| {
            applied(&json!({}), &config, &Set::default(), &Set::default()).unwrap_err()
        };
        let twice = refused(json!({"spec": {"containers": [{"name": "a"}, {"name": "a"}]}}));
        assert_eq!(twice, "spec.containers: duplicate entries for key {\"name\":\"a\"}");
        let nameless = refused(json!({"spec": {"containers": [{"image": "i"}]}}));
        assert!(nameless.starts_with("spec.containers: "), "{nameless}");
    }
}
