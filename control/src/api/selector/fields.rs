//! Field selectors: each kind has a few fields that can be asked for.

use mesh_model::kinds::Kind;
use serde_json::Value;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Term {
    path: Vec<String>,
    value: String,
    equal: bool,
}

impl Term {
    /// Text that the JSON of every object has that the term selects.
    pub(super) fn needed(&self) -> Option<String> {
        // What may stand for an absent field, and what JSON writes in another way, is needed nowhere.
        let plain = self.value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
        let word = self.value.bytes().any(|b| b.is_ascii_alphabetic());
        let literal = matches!(self.value.as_str(), "true" | "false");
        (self.equal && plain && word && !literal).then(|| format!("\"{}\"", self.value))
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        let found = self.path.iter().try_fold(object, |value, part| value.get(part));
        let text = match found {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        // An absent boolean is false, an absent number is zero.
        let same = text == self.value
            || text.is_empty() && matches!(self.value.as_str(), "false" | "0") && found.is_none();
        same == self.equal
    }
}

pub(super) fn named(name: &str) -> Term {
    let path = vec!["metadata".to_owned(), "name".to_owned()];
    Term { path, value: name.to_owned(), equal: true }
}

pub(super) fn parse(kind: &Kind, text: &str) -> Result<Vec<Term>, String> {
    text.split(',').filter(|part| !part.trim().is_empty()).map(|part| term(kind, part)).collect()
}

fn term(kind: &Kind, part: &str) -> Result<Term, String> {
    let (field, value, equal) = if let Some((field, value)) = part.split_once("!=") {
        (field, value, false)
    } else if let Some((field, value)) = part.split_once("==") {
        (field, value, true)
    } else if let Some((field, value)) = part.split_once('=') {
        (field, value, true)
    } else {
        return Err(format!("invalid selector: '{part}'; can't understand '{part}'"));
    };
    let field = field.trim();
    let common = field == "metadata.name" || (field == "metadata.namespace" && kind.namespaced);
    if !common && !known(kind.kind).contains(&field) {
        return Err(format!("field label not supported: {field}"));
    }
    let path = match field {
        // Events keep the component under `source`.
        "source" => "source.component",
        "status.successful" => "status.succeeded",
        other => other,
    };
    let path = path.split('.').map(str::to_owned).collect();
    Ok(Term { path, value: unescape(value.trim()), equal })
}

fn known(kind: &str) -> &'static [&'static str] {
    match kind {
        "Pod" => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        "Node" => &["spec.unschedulable"],
        "Namespace" => &["status.phase"],
        "Secret" => &["type"],
        "Service" => &["spec.clusterIP", "spec.type"],
        "ReplicaSet" => &["status.replicas"],
        "Job" => &["status.successful"],
        "Event" => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        _ => &[],
    }
}

fn unescape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        out.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    out
}
