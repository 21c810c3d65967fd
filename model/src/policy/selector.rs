//! Label selectors (`metav1.LabelSelector`).

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

/// Whether the labels satisfy the selector: all of `matchLabels` and all of `matchExpressions`. An empty one is satisfied
/// by everything; an operator that does not exist by nothing.
pub fn matches(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let equal = |(key, value): (&String, &String)| labels.get(key) == Some(value);
    selector.match_labels.iter().flatten().all(equal)
        && selector.match_expressions.iter().flatten().all(|one| satisfied(one, labels))
}

fn satisfied(requirement: &LabelSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&requirement.key);
    let listed =
        value.is_some_and(|value| requirement.values.iter().flatten().any(|one| one == value));
    match requirement.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        _ => false,
    }
}

/// The label keys that a selector looks at.
pub(crate) fn keys(selector: &LabelSelector) -> impl Iterator<Item = &str> {
    let equal = selector.match_labels.iter().flatten().map(|(key, _)| key.as_str());
    equal.chain(selector.match_expressions.iter().flatten().map(|one| one.key.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(text: &str) -> BTreeMap<String, String> {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn operators() {
        let cases = [
            (r#"{}"#, "", true),
            (r#"{"matchLabels": {"a": "1"}}"#, "a=1,b=2", true),
            (r#"{"matchLabels": {"a": "1", "b": "1"}}"#, "a=1,b=2", false),
            (
                r#"{"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}"#,
                "a=2",
                true,
            ),
            (
                r#"{"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}"#,
                "",
                false,
            ),
            (
                r#"{"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}"#,
                "",
                true,
            ),
            (
                r#"{"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}"#,
                "a=1",
                false,
            ),
            (r#"{"matchExpressions": [{"key": "a", "operator": "Exists"}]}"#, "a=", true),
            (r#"{"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}"#, "a=1", false),
            (r#"{"matchExpressions": [{"key": "a", "operator": "Like"}]}"#, "a=1", false),
        ];
        for (selector, set, expected) in cases {
            let selector = serde_json::from_str(selector).unwrap();
            assert_eq!(matches(&selector, &labels(set)), expected, "{selector:?} on {set}");
        }
    }
}
