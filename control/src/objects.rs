//! Questions that the scheduler and the controllers ask about stored objects. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, PodCondition, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{
    LabelSelector, ObjectMeta, OwnerReference, Time,
};
use k8s_openapi::jiff::Timestamp;
pub(crate) use mesh_model::containers::{have_ended, nothing_runs};

/// Value of the managed-by label on the EndpointSlices of Services that select pods.
pub(crate) const SLICE_MANAGER: &str = "endpointslice-controller.k8s.io";

/// Labels, as objects carry them.
pub(crate) type Labels = BTreeMap<String, String>;

/// The name; empty only in objects that were never stored.
pub(crate) fn name(meta: &ObjectMeta) -> &str {
    meta.name.as_deref().unwrap_or_default()
}

/// The namespace; empty for cluster-wide objects.
pub(crate) fn namespace(meta: &ObjectMeta) -> &str {
    meta.namespace.as_deref().unwrap_or_default()
}

/// The unique id; empty only in objects that were never stored.
pub(crate) fn uid(meta: &ObjectMeta) -> &str {
    meta.uid.as_deref().unwrap_or_default()
}

/// The labels of an object, as an owned map.
pub(crate) fn labels(meta: &ObjectMeta) -> Labels {
    meta.labels.clone().unwrap_or_default()
}

/// Whether deletion was asked for.
pub(crate) fn is_terminating(meta: &ObjectMeta) -> bool {
    meta.deletion_timestamp.is_some()
}

/// When the object was created; the epoch for objects that were never stored.
pub(crate) fn created(meta: &ObjectMeta) -> Timestamp {
    meta.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |t| t.0)
}

/// The owner that controls the object.
pub(crate) fn controller_of(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

/// Whether the object with that unique id controls this one.
pub(crate) fn is_controlled_by(meta: &ObjectMeta, owner_uid: &str) -> bool {
    controller_of(meta).is_some_and(|owner| owner.uid == owner_uid)
}

/// The node that the pod is bound to.
pub(crate) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref().filter(|node| !node.is_empty())
}

/// The phase; `Pending` when nobody reported one.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("Pending")
}

/// Whether the pod neither ended nor is being deleted.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !have_ended(pod) && !is_terminating(&pod.metadata)
}

/// The condition of that type.
pub(crate) fn pod_condition<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.iter().flatten().find(|c| c.type_ == type_)
}

/// The pod with the condition that tells who has it go before its time, and why (KEP-3329).
pub(crate) fn disrupted(pod: &Pod, reason: &str, message: &str, now: Timestamp) -> Pod {
    const CONDITION: &str = "DisruptionTarget";
    let mut pod = pod.clone();
    let conditions = pod.status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|condition| condition.type_ != CONDITION);
    conditions.push(PodCondition {
        type_: CONDITION.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_transition_time: Timestamp::from_second(now.as_second()).ok().map(Time),
        ..PodCondition::default()
    });
    pod
}

/// Since when the pod's Ready condition is true; `None` when it is not.
pub(crate) fn ready_since(pod: &Pod) -> Option<Timestamp> {
    let condition = pod_condition(pod, "Ready").filter(|c| c.status == "True")?;
    Some(condition.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |t| t.0))
}

/// The condition of that type.
pub(crate) fn node_condition<'a>(node: &'a Node, type_: &str) -> Option<&'a NodeCondition> {
    node.status.as_ref()?.conditions.iter().flatten().find(|c| c.type_ == type_)
}

/// Whether the node's Ready condition is true.
pub(crate) fn is_node_ready(node: &Node) -> bool {
    node_condition(node, "Ready").is_some_and(|c| c.status == "True")
}

/// Whether the control service lost contact with the node.
pub(crate) fn is_node_lost(node: &Node) -> bool {
    node_condition(node, "Ready").is_some_and(|c| c.status == "Unknown")
}

/// Whether the endpoints of the Service are pods that it selects: theirs are slices of [`SLICE_MANAGER`].
pub(crate) fn selects_pods(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|spec| {
        spec.type_.as_deref() != Some("ExternalName")
            && spec.selector.as_ref().is_some_and(|selector| !selector.is_empty())
    })
}

/// Whether `selector` selects these labels. An empty selector selects everything; so the callers check
/// first that the API validated it.
pub(crate) fn selects(selector: &LabelSelector, labels: Option<&Labels>) -> bool {
    let value = |key: &str| labels.and_then(|labels| labels.get(key));
    let by_labels = selector.match_labels.iter().flatten().all(|(k, v)| value(k) == Some(v));
    by_labels
        && selector
            .match_expressions
            .iter()
            .flatten()
            .all(|e| requirement(&e.operator, value(&e.key), e.values.as_deref()))
}

/// Whether a plain map of labels, as in a Service, selects these labels. An empty one selects nothing.
pub(crate) fn selects_all(wanted: &Labels, labels: Option<&Labels>) -> bool {
    !wanted.is_empty()
        && labels.is_some_and(|labels| wanted.iter().all(|(k, v)| labels.get(k) == Some(v)))
}

/// One requirement of a selector on the value of its key. An unknown operator selects nothing.
pub(crate) fn requirement(
    operator: &str,
    value: Option<&String>,
    wanted: Option<&[String]>,
) -> bool {
    let wanted = wanted.unwrap_or_default();
    let number = |text: &String| text.parse::<i64>().ok();
    let bound = wanted.first().and_then(number);
    match operator {
        "In" => value.is_some_and(|v| wanted.contains(v)),
        "NotIn" => value.is_none_or(|v| !wanted.contains(v)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => matches!((value.and_then(number), bound), (Some(v), Some(b)) if v > b),
        "Lt" => matches!((value.and_then(number), bound), (Some(v), Some(b)) if v < b),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn selectors_combine_labels_and_expressions() {
        let selector: LabelSelector = serde_json::from_value(json!({
            "matchLabels": {"app": "web"},
            "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["a", "b"]},
                {"key": "old", "operator": "DoesNotExist"},
                {"key": "env", "operator": "NotIn", "values": ["dev"]},
            ],
        }))
        .unwrap();
        assert!(selects(&selector, Some(&labels(&[("app", "web"), ("tier", "a")]))));
        assert!(!selects(&selector, Some(&labels(&[("app", "web"), ("tier", "c")]))));
        assert!(!selects(&selector, Some(&labels(&[("app", "web"), ("tier", "a"), ("old", "")]))));
        assert!(!selects(
            &selector,
            Some(&labels(&[("app", "web"), ("tier", "a"), ("env", "dev")]))
        ));
        assert!(!selects(&selector, None));
        assert!(selects(&LabelSelector::default(), None));
    }

    #[test]
    fn an_empty_service_selector_selects_nothing() {
        assert!(!selects_all(&Labels::new(), Some(&labels(&[("a", "b")]))));
        assert!(selects_all(&labels(&[("a", "b")]), Some(&labels(&[("a", "b"), ("c", "d")]))));
        assert!(!selects_all(&labels(&[("a", "b")]), None));
    }

    #[test]
    fn numbers_compare_as_numbers() {
        let ten = "10".to_owned();
        assert!(requirement("Gt", Some(&ten), Some(&["9".to_owned()])));
        assert!(!requirement("Lt", Some(&ten), Some(&["9".to_owned()])));
        assert!(!requirement("Gt", Some(&"x".to_owned()), Some(&["9".to_owned()])));
    }
}
