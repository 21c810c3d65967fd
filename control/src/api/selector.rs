//! Label and field selectors.

use std::collections::BTreeSet;

use mesh_model::kinds::Kind;
use serde_json::Value;

use super::query::Query;
use crate::error::ApiError;
use crate::strategy::names::{is_label_value, is_qualified};

mod fields;

/// Which objects a request means.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Selector {
    labels: Vec<Requirement>,
    fields: Vec<fields::Term>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    Exists(String),
    Absent(String),
    In(String, BTreeSet<String>),
    NotIn(String, BTreeSet<String>),
    More(String, i64),
    Less(String, i64),
}

impl Selector {
    /// From `labelSelector` and `fieldSelector`.
    pub(crate) fn of(kind: &Kind, query: &Query) -> Result<Self, ApiError> {
        let bad = |what: &str, text: &str, why: String| {
            ApiError::BadRequest(format!("unable to parse {what} {text:?}: {why}"))
        };
        let labels = query.value("labelSelector").unwrap_or_default();
        let fields = query.value("fieldSelector").unwrap_or_default();
        Ok(Self {
            labels: parse_labels(labels).map_err(|why| bad("labelSelector", labels, why))?,
            fields: fields::parse(kind, fields).map_err(|why| bad("fieldSelector", fields, why))?,
        })
    }

    /// Only the object of that name.
    pub(crate) fn named(name: &str) -> Self {
        Self { labels: Vec::new(), fields: vec![fields::named(name)] }
    }

    /// Whether it selects everything.
    pub(crate) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    /// Whether it may select an object of that JSON: a quick look that spares parsing most of what it does not.
    pub(crate) fn may_match(&self, json: &[u8]) -> bool {
        let mut needed = self.fields.iter().filter_map(fields::Term::needed);
        needed.all(|text| memchr::memmem::find(json, text.as_bytes()).is_some())
    }

    /// Whether it selects the object.
    pub(crate) fn matches(&self, object: &Value) -> bool {
        let labels = &object["metadata"]["labels"];
        self.labels.iter().all(|r| r.matches(labels))
            && self.fields.iter().all(|t| t.matches(object))
    }
}

impl Requirement {
    fn matches(&self, labels: &Value) -> bool {
        let value = |key: &str| labels.get(key).and_then(Value::as_str);
        let number = |key: &str| value(key).and_then(|v| v.parse::<i64>().ok());
        match self {
            Self::Exists(key) => value(key).is_some(),
            Self::Absent(key) => value(key).is_none(),
            Self::In(key, values) => value(key).is_some_and(|v| values.contains(v)),
            Self::NotIn(key, values) => value(key).is_none_or(|v| !values.contains(v)),
            Self::More(key, than) => number(key).is_some_and(|n| n > *than),
            Self::Less(key, than) => number(key).is_some_and(|n| n < *than),
        }
    }
}

fn parse_labels(text: &str) -> Result<Vec<Requirement>, String> {
    split(text)?.into_iter().map(|part| parse_requirement(part.trim())).collect()
}

/// At commas that are not between parentheses.
fn split(text: &str) -> Result<Vec<&str>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
        if !(0..=1).contains(&depth) {
            return Err("parentheses do not match".to_owned());
        }
    }
    if depth != 0 {
        return Err("parentheses do not match".to_owned());
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn parse_requirement(part: &str) -> Result<Requirement, String> {
    if let Some(key) = part.strip_prefix('!') {
        return Ok(Requirement::Absent(checked_key(key)?));
    }
    if let Some(open) = part.find('(') {
        let list = part[open + 1..].strip_suffix(')').ok_or("expected ')' at the end of a set")?;
        let values = list.split(',').map(checked_value).collect::<Result<_, _>>()?;
        let mut words = part[..open].split_whitespace();
        let (key, word) = (words.next().unwrap_or_default(), words.next());
        let key = checked_key(key)?;
        return match (word, words.next()) {
            (Some("in"), None) => Ok(Requirement::In(key, values)),
            (Some("notin"), None) => Ok(Requirement::NotIn(key, values)),
            _ => Err(format!("{part:?}: expected KEY in (...) or KEY notin (...)")),
        };
    }
    let one = |value: &str| checked_value(value).map(|v| BTreeSet::from([v]));
    for (operator, not) in [("!=", true), ("==", false), ("=", false)] {
        if let Some((key, value)) = part.split_once(operator) {
            let (key, values) = (checked_key(key)?, one(value)?);
            return Ok(if not {
                Requirement::NotIn(key, values)
            } else {
                Requirement::In(key, values)
            });
        }
    }
    for (operator, more) in [('>', true), ('<', false)] {
        if let Some((key, value)) = part.split_once(operator) {
            let number =
                value.trim().parse().map_err(|_| format!("{value:?} is not an integer"))?;
            let key = checked_key(key)?;
            return Ok(if more {
                Requirement::More(key, number)
            } else {
                Requirement::Less(key, number)
            });
        }
    }
    checked_key(part).map(Requirement::Exists)
}

fn checked_key(key: &str) -> Result<String, String> {
    let key = key.trim();
    if is_qualified(key) { Ok(key.to_owned()) } else { Err(format!("{key:?} is not a label key")) }
}

fn checked_value(value: &str) -> Result<String, String> {
    let value = value.trim();
    if is_label_value(value) {
        Ok(value.to_owned())
    } else {
        Err(format!("{value:?} is not a label value"))
    }
}

#[cfg(test)]
mod tests {
    use mesh_model::kinds::by_any_name;
    use serde_json::json;

    use super::*;

    fn selects(labels: &str, object: &Value) -> bool {
        let selector = Selector { labels: parse_labels(labels).unwrap(), fields: Vec::new() };
        selector.matches(object)
    }

    #[test]
    fn label_selectors() {
        let object = json!({"metadata": {"labels": {"app": "web", "tier": "front", "n": "5"}}});
        for yes in [
            "",
            "app",
            "!x",
            "app=web",
            "app==web",
            "app!=api",
            "x!=1",
            "app in (web, api)",
            "tier notin (back)",
            "x notin (y)",
            "n>4",
            "n<6",
            "app=web,tier in (front,back),!x",
        ] {
            assert!(selects(yes, &object), "{yes}");
        }
        for no in ["x", "!app", "app=api", "app!=web", "app in (api)", "x in (y)", "n>5", "app,x"] {
            assert!(!selects(no, &object), "{no}");
        }
        for bad in ["a b", "=x", "app in web", "app in (web", "a)(", ",", "a=b c", "n>x"] {
            assert!(parse_labels(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn field_selectors_know_the_fields_of_their_kind() {
        let pod = by_any_name("pods").unwrap();
        let of = |text: &str| {
            let query = Query::parse(Some(&format!("fieldSelector={text}"))).unwrap();
            Selector::of(pod, &query)
        };
        let object = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1"}, "status": {}});
        assert!(of("spec.nodeName%3Dn1,metadata.name!%3Dq").unwrap().matches(&object));
        assert!(!of("spec.nodeName%3D").unwrap().matches(&object));
        assert!(of("status.phase%3D").unwrap().matches(&object));
        assert!(
            of("spec.image%3Dx").unwrap_err().to_string().contains("field label not supported")
        );
        assert!(of("spec.nodeName").is_err());
        assert!(Selector::named("p").matches(&object));
        let json = object.to_string().into_bytes();
        assert!(of("spec.nodeName%3Dn1,status.phase%3D").unwrap().may_match(&json));
        assert!(!of("spec.nodeName%3Dn2").unwrap().may_match(&json));
    }
}
