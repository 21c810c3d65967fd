//! Rules that many fields share, in the words that people know from Kubernetes.

use std::collections::BTreeMap;
use std::fmt::Debug;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Causes, names};
use crate::scheduler::quantity;

pub(super) const PORT_RANGE: &str = "must be between 1 and 65535, inclusive";
const PORT_NAME: &str = "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-), at least one letter, no two hyphens in a row, at most 15 characters";
const QUANTITY: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";
const OPERATORS: [&str; 4] = ["In", "NotIn", "Exists", "DoesNotExist"];

pub(super) fn required(field: impl Into<String>, causes: &mut Causes) {
    causes.add(field, "Required value");
}

pub(super) fn invalid(
    field: impl Into<String>,
    value: impl Debug,
    rule: &str,
    causes: &mut Causes,
) {
    causes.add(field, format!("Invalid value: {value:?}: {rule}"));
}

pub(super) fn forbidden(field: impl Into<String>, rule: &str, causes: &mut Causes) {
    causes.add(field, format!("Forbidden: {rule}"));
}

pub(super) fn duplicate(field: impl Into<String>, value: impl Debug, causes: &mut Causes) {
    causes.add(field, format!("Duplicate value: {value:?}"));
}

/// An optional word out of a list.
pub(super) fn one_of(field: &str, value: Option<&str>, words: &[&str], causes: &mut Causes) {
    let Some(value) = value else { return };
    if !words.contains(&value) {
        let words: Vec<_> = words.iter().map(|w| format!("{w:?}")).collect();
        let text = format!("Unsupported value: {value:?}: supported values: {}", words.join(", "));
        causes.add(field, text);
    }
}

pub(super) fn not_negative(field: &str, value: Option<i64>, causes: &mut Causes) {
    at_least(field, value, 0, causes);
}

pub(super) fn at_least(field: &str, value: Option<i64>, least: i64, causes: &mut Causes) {
    if let Some(value) = value.filter(|v| *v < least) {
        let rule = format!("must be greater than or equal to {least}");
        invalid(field, value, &rule, causes);
    }
}

pub(super) fn port(field: &str, number: i32, causes: &mut Causes) {
    if !(1..=65535).contains(&number) {
        invalid(field, number, PORT_RANGE, causes);
    }
}

/// A port number, or the name of a container port.
pub(super) fn port_or_name(field: &str, value: &IntOrString, causes: &mut Causes) {
    match value {
        IntOrString::Int(number) => port(field, *number, causes),
        IntOrString::String(name) => port_name(field, name, causes),
    }
}

pub(super) fn port_name(field: &str, name: &str, causes: &mut Causes) {
    let good = name.len() <= 15
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_lowercase())
        && !name.contains("--")
        && !name.starts_with('-')
        && !name.ends_with('-');
    if !good {
        invalid(field, name, PORT_NAME, causes);
    }
}

pub(super) fn protocol(field: &str, value: Option<&str>, causes: &mut Causes) {
    one_of(field, value, &["SCTP", "TCP", "UDP"], causes);
}

/// Resources: known amounts, none negative.
pub(super) fn quantities(
    field: &str,
    amounts: Option<&BTreeMap<String, Quantity>>,
    causes: &mut Causes,
) {
    for (name, amount) in amounts.into_iter().flatten() {
        let field = format!("{field}[{name}]");
        match quantity::thousandths(&amount.0) {
            None => invalid(&field, &amount.0, QUANTITY, causes),
            Some(n) if n < 0 => {
                invalid(&field, &amount.0, "must be greater than or equal to 0", causes);
            }
            Some(_) => {}
        }
    }
}

/// A selector of labels: operators and values.
pub(super) fn selector(field: &str, selector: &LabelSelector, causes: &mut Causes) {
    names::labels(&format!("{field}.matchLabels"), selector.match_labels.as_ref(), causes);
    for (i, e) in selector.match_expressions.iter().flatten().enumerate() {
        let field = format!("{field}.matchExpressions[{i}]");
        if !names::is_qualified(&e.key) {
            invalid(format!("{field}.key"), &e.key, "must be a label key", causes);
        }
        let values = e.values.as_deref().unwrap_or_default();
        match e.operator.as_str() {
            "In" | "NotIn" if values.is_empty() => {
                let rule = "must be specified when `operator` is 'In' or 'NotIn'";
                causes.add(format!("{field}.values"), format!("Required value: {rule}"));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                let rule = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'";
                forbidden(format!("{field}.values"), rule, causes);
            }
            operator => one_of(&format!("{field}.operator"), Some(operator), &OPERATORS, causes),
        }
    }
}

/// Whether a selector selects an object with that metadata.
pub(super) fn selects(selector: &LabelSelector, meta: Option<&ObjectMeta>) -> bool {
    let labels = meta.and_then(|m| m.labels.as_ref());
    let value = |key: &str| labels.and_then(|l| l.get(key));
    let equal = selector.match_labels.iter().flatten().all(|(k, v)| value(k) == Some(v));
    equal
        && selector.match_expressions.iter().flatten().all(|e| {
            let listed = |v: &String| e.values.iter().flatten().any(|x| x == v);
            match e.operator.as_str() {
                "In" => value(&e.key).is_some_and(listed),
                "NotIn" => !value(&e.key).is_some_and(listed),
                "Exists" => value(&e.key).is_some(),
                _ => value(&e.key).is_none(),
            }
        })
}

pub(super) fn is_empty(selector: &LabelSelector) -> bool {
    selector.match_labels.as_ref().is_none_or(|l| l.is_empty())
        && selector.match_expressions.as_ref().is_none_or(|e| e.is_empty())
}
