//! Sets of fields, as a tree of steps: `f:NAME` a field, `k:{KEYS}` an element of a list by its keys, `v:VALUE` one by its value.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::shape::{self, Shape};

/// In `fieldsV1`: what holds other members is a member itself.
const ITSELF: &str = ".";

/// Fields of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Set {
    member: bool,
    below: BTreeMap<String, Self>,
}

impl Set {
    /// The fields of an object.
    pub fn of(object: &Value) -> Self {
        let mut set = Self::default();
        if let Value::Object(map) = object {
            set.add_fields("", map);
        }
        set
    }

    fn add_fields(&mut self, name: &str, map: &Map<String, Value>) {
        for (key, value) in map {
            let mut child = Self::default();
            child.add_value(name, key, value);
            self.put(shape::field(key), child);
        }
    }

    fn add_value(&mut self, parent: &str, field: &str, value: &Value) {
        // What is empty is a field by itself.
        match (shape::of(parent, field, value), value) {
            (Shape::Fields, Value::Object(map)) if !map.is_empty() => self.add_fields(field, map),
            (Shape::Keyed(keys), Value::Array(list)) if !list.is_empty() => {
                for item in list {
                    let mut child = Self { member: true, ..Self::default() };
                    if let Value::Object(map) = item {
                        child.add_fields(field, map);
                    }
                    if let Some(step) = shape::element(keys, item) {
                        self.put(step, child);
                    }
                }
            }
            (Shape::Values, Value::Array(list)) if !list.is_empty() => {
                let member = Self { member: true, ..Self::default() };
                self.below.extend(list.iter().map(|item| (shape::value(item), member.clone())));
            }
            _ => self.member = true,
        }
    }

    fn put(&mut self, step: String, child: Self) {
        if !child.is_empty() {
            self.below.entry(step).or_default().add(&child);
        }
    }

    /// Makes a path a member.
    pub(super) fn insert(&mut self, path: &[&str]) {
        match path {
            [] => self.member = true,
            [first, rest @ ..] => self.below.entry((*first).to_owned()).or_default().insert(rest),
        }
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        !self.member && self.below.is_empty()
    }

    /// Whether it is itself in the set, not only something in it.
    pub(super) fn is_member(&self) -> bool {
        self.member
    }

    /// What is below a step.
    pub(super) fn at(&self, step: &str) -> Option<&Self> {
        self.below.get(step)
    }

    /// The steps from here, and what is below them.
    pub(super) fn steps(&self) -> impl Iterator<Item = (&String, &Self)> {
        self.below.iter()
    }

    /// Takes a step and all below it out.
    pub(super) fn split_off(&mut self, step: &str) -> Self {
        let mut split = Self::default();
        if let Some(child) = self.below.remove(step) {
            split.below.insert(step.to_owned(), child);
        }
        split
    }

    /// Adds the members of another set.
    pub fn add(&mut self, other: &Self) {
        self.member |= other.member;
        for (step, child) in &other.below {
            self.below.entry(step.clone()).or_default().add(child);
        }
    }

    /// Without the members of another set.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        self.pick(Some(other), |ours, theirs| ours && !theirs)
    }

    /// The members that another set has, too.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        self.pick(Some(other), |ours, theirs| ours && theirs)
    }

    fn pick(&self, other: Option<&Self>, keep: fn(bool, bool) -> bool) -> Self {
        let mut picked = Self {
            member: keep(self.member, other.is_some_and(|other| other.member)),
            ..Self::default()
        };
        for (step, child) in &self.below {
            picked.put(step.clone(), child.pick(other.and_then(|other| other.at(step)), keep));
        }
        picked
    }

    /// All members, as people write paths: `.spec.template.spec.containers[name="main"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect_paths("", &mut paths);
        paths
    }

    fn collect_paths(&self, path: &str, paths: &mut Vec<String>) {
        if self.member {
            paths.push(path.to_owned());
        }
        for (step, child) in &self.below {
            child.collect_paths(&format!("{path}{}", shown(step)), paths);
        }
    }

    /// As `fieldsV1`.
    pub fn to_wire(&self) -> Value {
        let mut map = Map::new();
        if self.member && !self.below.is_empty() {
            map.insert(ITSELF.to_owned(), Value::Object(Map::new()));
        }
        map.extend(self.below.iter().map(|(step, child)| (step.clone(), child.to_wire())));
        Value::Object(map)
    }

    /// From `fieldsV1`; none when it is none.
    pub fn from_wire(wire: &Value) -> Option<Self> {
        let mut set = Self::default();
        for (step, child) in wire.as_object()? {
            match (step.as_str(), child.as_object()?) {
                (ITSELF, _) => set.member = true,
                (_, child) if child.is_empty() => set.insert(&[step.as_str()]),
                _ => set.put(step.clone(), Self::from_wire(child)?),
            }
        }
        Some(set)
    }
}

fn shown(step: &str) -> String {
    match step.split_once(':') {
        Some(("f", name)) => format!(".{name}"),
        Some(("k", keys)) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let keys: Vec<_> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("[{}]", keys.join(","))
        }
        Some(("v", value)) => format!("[={value}]"),
        _ => format!("[{step}]"),
    }
}

/// What differs between two states of an object.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Fields that are there now and were not, or have another value.
    pub written: Set,
    /// Fields that are gone.
    pub removed: Set,
}

impl Changes {
    /// From one state to another.
    pub fn between(from: &Value, to: &Value) -> Self {
        let (before, after) = (Set::of(from), Set::of(to));
        let mut written = after.without(&before);
        written.add(&modified(from, to));
        Self { written, removed: before.without(&after) }
    }
}

/// Fields that both have, with different values.
pub(super) fn modified(from: &Value, to: &Value) -> Set {
    match (from, to) {
        (Value::Object(from), Value::Object(to)) => modified_fields("", from, to),
        _ => Set::default(),
    }
}

fn modified_fields(name: &str, from: &Map<String, Value>, to: &Map<String, Value>) -> Set {
    let mut set = Set::default();
    for (key, value) in from {
        if let Some(other) = to.get(key) {
            set.put(shape::field(key), modified_value(name, key, value, other));
        }
    }
    set
}

fn modified_value(parent: &str, field: &str, from: &Value, to: &Value) -> Set {
    match (shape::of(parent, field, to), from, to) {
        (Shape::Fields, Value::Object(from), Value::Object(to)) => modified_fields(field, from, to),
        (Shape::Keyed(keys), Value::Array(from), Value::Array(to)) => {
            let mut set = Set::default();
            let old: BTreeMap<_, _> =
                from.iter().filter_map(|item| Some((shape::element(keys, item)?, item))).collect();
            for item in to {
                let Some(step) = shape::element(keys, item) else { continue };
                if let (Some(Value::Object(old)), Value::Object(item)) =
                    (old.get(&step).copied(), item)
                {
                    set.put(step, modified_fields(field, old, item));
                }
            }
            set
        }
        (Shape::Values, Value::Array(_), Value::Array(_)) => Set::default(),
        _ if from == to => Set::default(),
        _ => Set { member: true, ..Set::default() },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod() -> Value {
        json!({"metadata": {"labels": {"a": "1"}, "finalizers": ["x.y/z"]}, "spec": {
            "nodeSelector": {"disk": "ssd"},
            "containers": [{"name": "main", "args": ["a", "b"],
                "ports": [{"containerPort": 80}], "securityContext": {}}]}})
    }

    #[test]
    fn fields_have_the_form_that_other_clients_know() {
        let wire = json!({
            "f:metadata": {"f:finalizers": {"v:\"x.y/z\"": {}}, "f:labels": {"f:a": {}}},
            "f:spec": {
                "f:nodeSelector": {},
                "f:containers": {"k:{\"name\":\"main\"}": {
                    ".": {}, "f:name": {}, "f:args": {}, "f:securityContext": {},
                    "f:ports": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}":
                        {".": {}, "f:containerPort": {}}}}}}});
        let set = Set::of(&pod());
        assert_eq!(set.to_wire(), wire);
        assert_eq!(Set::from_wire(&wire).unwrap(), set);
        assert!(Set::from_wire(&json!({"f:spec": 1})).is_none());
        assert!(set.paths().contains(&".spec.containers[name=\"main\"].args".to_owned()));
        assert!(set.paths().contains(&".metadata.finalizers[=\"x.y/z\"]".to_owned()));
    }

    #[test]
    fn sets_are_added_taken_apart_and_compared() {
        let (one, other) = (json!({"data": {"a": "1", "b": "2"}}), json!({"data": {"b": "3"}}));
        let (one, other) = (Set::of(&one), Set::of(&other));
        assert_eq!(one.without(&other).paths(), [".data.a"]);
        assert_eq!(one.common(&other).paths(), [".data.b"]);
        let mut both = one.without(&other);
        both.add(&other);
        assert_eq!(both, one);
        assert!(one.without(&one).is_empty());
    }

    #[test]
    fn changes_are_found_where_they_are() {
        let mut to = pod();
        to["spec"]["containers"][0]["args"] = json!(["b", "a"]);
        to["spec"]["containers"][0]["ports"][0]["protocol"] = json!("TCP");
        to["spec"]["nodeSelector"]["disk"] = json!("hdd");
        to["metadata"]["labels"] = json!({"b": "1"});
        let changes = Changes::between(&pod(), &to);
        assert_eq!(
            changes.written.paths(),
            [
                ".metadata.labels.b",
                ".spec.containers[name=\"main\"].args",
                ".spec.containers[name=\"main\"].ports[containerPort=80,protocol=\"TCP\"].protocol",
                ".spec.nodeSelector"
            ]
        );
        assert_eq!(changes.removed.paths(), [".metadata.labels.a"]);
        assert_eq!(Changes::between(&to, &to), Changes::default());
    }
}
