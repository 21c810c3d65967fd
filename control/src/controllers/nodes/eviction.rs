//! Which pods have to leave a tainted node, and when. Pure: takes the time.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use k8s_openapi::jiff::Timestamp;

use crate::objects;
use crate::scheduler::taints::{NOT_READY, OUT_OF_SERVICE, UNREACHABLE, tolerates, tolerations};

/// What to do with the pods of a node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Evictions {
    /// Names (namespace, name) of pods to delete now.
    pub(super) delete: Vec<(String, String)>,
    /// Pods to remove without waiting for their node: it will never come back.
    pub(super) force: Vec<(String, String)>,
    /// When the next pod is due.
    pub(super) next: Option<Timestamp>,
}

/// The pods of `pods` that have to leave `node` at `now`; `patience` is how long a pod that says nothing stays
/// on a node that is lost or not ready.
pub(super) fn evictions<'a>(
    node: &Node,
    pods: impl IntoIterator<Item = &'a Pod>,
    patience: Duration,
    now: Timestamp,
) -> Evictions {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let taints: Vec<&Taint> = taints.filter(|taint| taint.effect == "NoExecute").collect();
    let dead = objects::is_node_lost(node) && taints.iter().any(|t| t.key == OUT_OF_SERVICE);
    let mut result = Evictions::default();
    for pod in pods {
        let meta = &pod.metadata;
        let name = || (objects::namespace(meta).to_owned(), objects::name(meta).to_owned());
        if dead && !taints.iter().any(|t| t.key == OUT_OF_SERVICE && is_tolerated(pod, t)) {
            result.force.push(name());
            continue;
        }
        if objects::is_terminating(meta) || objects::have_ended(pod) {
            continue;
        }
        match taints.iter().filter_map(|taint| due(pod, taint, patience, now)).min() {
            Some(due) if due <= now => result.delete.push(name()),
            Some(due) => result.next = Some(result.next.map_or(due, |next| next.min(due))),
            None => {}
        }
    }
    result
}

fn is_tolerated(pod: &Pod, taint: &Taint) -> bool {
    tolerations(pod).iter().any(|toleration| tolerates(toleration, taint))
}

/// When the pod has to leave because of the taint; `None` when it may stay for ever.
fn due(pod: &Pod, taint: &Taint, patience: Duration, now: Timestamp) -> Option<Timestamp> {
    let matching: Vec<_> = tolerations(pod).iter().filter(|t| tolerates(t, taint)).collect();
    let stay = if matching.is_empty() {
        match taint.key.as_str() {
            NOT_READY | UNREACHABLE => patience,
            _ => Duration::ZERO,
        }
    } else if matching.iter().any(|t| t.toleration_seconds.is_none()) {
        return None;
    } else {
        let seconds = matching.iter().filter_map(|t| t.toleration_seconds).min().unwrap_or(0);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    };
    let since = taint.time_added.as_ref().map_or(now, |time| time.0);
    since.checked_add(stay).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn at(secs: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + secs).unwrap()
    }

    fn node(ready: &str, taints: Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"taints": taints},
            "status": {"conditions": [{"type": "Ready", "status": ready}]}}))
        .unwrap()
    }

    fn pod(name: &str, tolerations: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"namespace": "d", "name": name},
            "spec": {"containers": [], "tolerations": tolerations}}))
        .unwrap()
    }

    fn names(list: &[(String, String)]) -> Vec<&str> {
        list.iter().map(|(_, name)| name.as_str()).collect()
    }

    #[test]
    fn pods_leave_when_their_patience_ends() {
        let node = node(
            "Unknown",
            json!([
            {"key": UNREACHABLE, "effect": "NoSchedule", "timeAdded": at(0).to_string()},
            {"key": UNREACHABLE, "effect": "NoExecute", "timeAdded": at(0).to_string()}]),
        );
        let keeps = |secs: Value| json!([{"key": UNREACHABLE, "operator": "Exists", "tolerationSeconds": secs}]);
        let pods = [
            pod("silent", json!(null)),
            pod("patient", keeps(json!(60))),
            pod("loyal", keeps(json!(null))),
            pod("hasty", keeps(json!(0))),
        ];
        let plan = |secs| evictions(&node, &pods, Duration::from_secs(30), at(secs));
        assert_eq!((names(&plan(0).delete), plan(0).next), (vec!["hasty"], Some(at(30))));
        assert_eq!(
            (names(&plan(30).delete), plan(30).next),
            (vec!["silent", "hasty"], Some(at(60)))
        );
        assert_eq!(
            (names(&plan(60).delete), plan(60).next),
            (vec!["silent", "patient", "hasty"], None)
        );
        assert_eq!(
            evictions(&super::tests::node("True", json!(null)), &pods, Duration::ZERO, at(9)),
            Evictions::default()
        );
    }

    #[test]
    fn a_taint_by_hand_evicts_at_once() {
        let node = node("True", json!([{"key": "drain", "effect": "NoExecute"}]));
        let mut going = pod("going", json!(null));
        going.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(0)));
        let pods = [pod("a", json!(null)), pod("b", json!([{"operator": "Exists"}])), going];
        let plan = evictions(&node, &pods, Duration::from_secs(30), at(0));
        assert_eq!((names(&plan.delete), plan.next), (vec!["a"], None));
    }

    #[test]
    fn nobody_waits_for_a_node_that_is_out_of_service() {
        let taints = json!([{"key": OUT_OF_SERVICE, "effect": "NoExecute"}]);
        let pods = [pod("a", json!(null))];
        let plan =
            |ready| evictions(&node(ready, taints.clone()), &pods, Duration::from_secs(30), at(0));
        assert_eq!(names(&plan("Unknown").force), ["a"]);
        assert_eq!(names(&plan("True").delete), ["a"]);
    }
}
