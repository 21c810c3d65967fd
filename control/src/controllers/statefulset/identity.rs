//! What makes a pod of a StatefulSet that one: its name, and what follows from it. Pure.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};

use crate::controllers::history::POD_REVISION;
use crate::controllers::ownership;
use crate::objects::{self, Labels};

const POD_NAME: &str = "statefulset.kubernetes.io/pod-name";
const POD_INDEX: &str = "apps.kubernetes.io/pod-index";

/// The name of the pod with that ordinal.
pub(in crate::controllers) fn pod_name(set: &StatefulSet, ordinal: i32) -> String {
    format!("{}-{ordinal}", objects::name(&set.metadata))
}

/// The ordinal of a pod; `None` when its name is not one that the set gives.
pub(in crate::controllers) fn ordinal(set: &StatefulSet, pod: &Pod) -> Option<i32> {
    let rest = objects::name(&pod.metadata).strip_prefix(objects::name(&set.metadata))?;
    let digits = rest.strip_prefix('-')?;
    let number = digits.parse().ok().filter(|number: &i32| *number >= 0)?;
    (number.to_string() == digits).then_some(number)
}

/// The ordinals that the set should have.
pub(in crate::controllers) fn wanted(set: &StatefulSet) -> std::ops::Range<i32> {
    let spec = set.spec.as_ref();
    let start = spec.and_then(|s| s.ordinals.as_ref()?.start).unwrap_or(0).max(0);
    start..start.saturating_add(replicas(set))
}

/// How many pods the set should have.
pub(in crate::controllers) fn replicas(set: &StatefulSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1).max(0)
}

/// The labels that tell who a pod is.
pub(in crate::controllers) fn labels(
    set: &StatefulSet,
    ordinal: i32,
) -> [(&'static str, String); 2] {
    [(POD_NAME, pod_name(set, ordinal)), (POD_INDEX, ordinal.to_string())]
}

/// Whether a pod says who it is.
pub(super) fn is_labelled(set: &StatefulSet, ordinal: i32, pod: &Pod) -> bool {
    let none = Labels::new();
    let present = pod.metadata.labels.as_ref().unwrap_or(&none);
    labels(set, ordinal).iter().all(|(key, value)| present.get(*key) == Some(value))
}

/// The pod with that ordinal, of a revision and its template.
pub(in crate::controllers) fn new_pod(
    set: &StatefulSet,
    ordinal: i32,
    template: &PodTemplateSpec,
    revision: &str,
) -> Pod {
    let mut pod = ownership::pod_of(set, template);
    let name = pod_name(set, ordinal);
    pod.metadata.name = Some(name.clone());
    let own = pod.metadata.labels.get_or_insert_default();
    own.extend(labels(set, ordinal).map(|(key, value)| (key.to_owned(), value)));
    own.insert(POD_REVISION.to_owned(), revision.to_owned());
    let service = set.spec.as_ref().and_then(|spec| spec.service_name.clone());
    let spec = pod.spec.get_or_insert_default();
    spec.hostname = Some(name);
    spec.subdomain = service.filter(|service| !service.is_empty());
    pod
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn set() -> StatefulSet {
        serde_json::from_value(json!({"metadata": {"namespace": "ns", "name": "db", "uid": "u"},
            "spec": {"replicas": 2, "ordinals": {"start": 3}, "serviceName": "data", "selector": {},
                "template": {"metadata": {"labels": {"app": "db"}}, "spec": {"containers": []}}}}))
        .unwrap()
    }

    #[test]
    fn a_name_is_an_ordinal_and_the_other_way_round() {
        let set = set();
        assert_eq!(wanted(&set), 3..5);
        for (name, expected) in [
            ("db-0", Some(0)),
            ("db-12", Some(12)),
            ("db-012", None),
            ("db--1", None),
            ("db-", None),
            ("db", None),
            ("dbx-1", None),
            ("other-1", None),
            ("db-1-x", None),
        ] {
            let pod: Pod = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
            assert_eq!(ordinal(&set, &pod), expected, "{name}");
        }
    }

    #[test]
    fn a_pod_knows_its_name_its_index_and_its_service() {
        let set = set();
        let template = set.spec.as_ref().unwrap().template.clone();
        let mut pod = new_pod(&set, 4, &template, "db-x");
        assert_eq!(
            serde_json::to_value(pod.metadata.labels.as_ref()).unwrap(),
            json!({"app": "db", "controller-revision-hash": "db-x", "apps.kubernetes.io/pod-index": "4",
                "statefulset.kubernetes.io/pod-name": "db-4"})
        );
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.hostname.as_deref(), Some("db-4"));
        assert_eq!(spec.subdomain.as_deref(), Some("data"));
        assert!(is_labelled(&set, 4, &pod));
        pod.metadata.labels.as_mut().unwrap().remove(POD_INDEX);
        assert!(!is_labelled(&set, 4, &pod));
    }
}
