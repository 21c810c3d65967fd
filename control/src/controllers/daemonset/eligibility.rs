//! Which nodes have a pod of a DaemonSet, and the pod that is for one node. Pure.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{
    Node, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodSpec, Taint, Toleration,
};

use crate::controllers::history::POD_REVISION;
use crate::controllers::ownership;
use crate::objects::{self, Labels};
use crate::scheduler::Selection;
use crate::scheduler::taints::{
    NETWORK_UNAVAILABLE, NOT_READY, PRESSURES, UNREACHABLE, UNSCHEDULABLE, tolerated,
};

const NAME: &str = "metadata.name";

/// What a node is to a DaemonSet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::controllers) enum Fit {
    /// It should have a pod.
    Runs,
    /// It gets none, and the one that is there may stay.
    Keeps,
    /// It has none.
    Lacks,
}

/// What a DaemonSet asks of nodes, read once.
pub(in crate::controllers) struct Rule {
    node: Option<String>,
    selection: Selection,
    tolerations: Vec<Toleration>,
}

impl Rule {
    pub(in crate::controllers) fn of(set: &DaemonSet) -> Self {
        let mut spec = set.spec.as_ref().and_then(|s| s.template.spec.clone()).unwrap_or_default();
        tolerate(&mut spec);
        Self {
            node: spec.node_name.clone().filter(|node| !node.is_empty()),
            tolerations: spec.tolerations.clone().unwrap_or_default(),
            selection: Selection::new(&Pod { spec: Some(spec), ..Pod::default() }),
        }
    }

    pub(in crate::controllers) fn fit(&self, node: &Node) -> Fit {
        let name = objects::name(&node.metadata);
        let none = Labels::new();
        let labels = node.metadata.labels.as_ref().unwrap_or(&none);
        if self.node.as_ref().is_some_and(|only| only != name)
            || !self.selection.admits(name, labels)
        {
            return Fit::Lacks;
        }
        let taints = || node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let repelled = |effect: &str| {
            let is_repelled = |t: &Taint| t.effect == effect && !tolerated(&self.tolerations, t);
            taints().any(is_repelled)
        };
        if repelled("NoExecute") {
            Fit::Lacks
        } else if repelled("NoSchedule") {
            Fit::Keeps
        } else {
            Fit::Runs
        }
    }
}

/// The pod of the set for a node.
pub(in crate::controllers) fn new_pod(set: &DaemonSet, node: &str, revision: &str) -> Pod {
    let template = set.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
    let mut pod = ownership::pod_of(set, &template);
    pod.metadata.generate_name = Some(format!("{}-", objects::name(&set.metadata)));
    let labels = pod.metadata.labels.get_or_insert_default();
    labels.insert(POD_REVISION.to_owned(), revision.to_owned());
    let spec = pod.spec.get_or_insert_default();
    tolerate(spec);
    pin(spec, node);
    pod
}

/// The node that a pod of a DaemonSet is for.
pub(in crate::controllers) fn target(pod: &Pod) -> Option<&str> {
    objects::node_of(pod).or_else(|| pinned(pod.spec.as_ref()?))
}

fn pinned(spec: &PodSpec) -> Option<&str> {
    let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    let terms = required.node_selector_terms.iter();
    let mut fields = terms.flat_map(|term| term.match_fields.iter().flatten());
    let named = fields.find(|field| field.key == NAME && field.operator == "In")?;
    named.values.as_ref()?.first().map(String::as_str)
}

/// Only that node takes the pod.
fn pin(spec: &mut PodSpec, node: &str) {
    let field = NodeSelectorRequirement {
        key: NAME.to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let term = NodeSelectorTerm { match_fields: Some(vec![field]), ..NodeSelectorTerm::default() };
    let affinity = spec.affinity.get_or_insert_default().node_affinity.get_or_insert_default();
    // The set has looked at what the template requires: which node takes the pod is settled.
    affinity.required_during_scheduling_ignored_during_execution =
        Some(NodeSelector { node_selector_terms: vec![term] });
}

/// What is wrong with a node does not drive a daemon from it: it may be there to mend that.
fn tolerate(spec: &mut PodSpec) {
    let network = spec.host_network == Some(true);
    let tolerations = spec.tolerations.get_or_insert_default();
    let mut add = |key: &str, effect: &str| {
        let wanted = Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Toleration::default()
        };
        let alike = |t: &Toleration| {
            t.key == wanted.key && t.effect == wanted.effect && t.operator == wanted.operator
        };
        tolerations.retain(|toleration| !alike(toleration));
        tolerations.push(wanted);
    };
    add(NOT_READY, "NoExecute");
    add(UNREACHABLE, "NoExecute");
    for (_, key) in PRESSURES {
        add(key, "NoSchedule");
    }
    add(UNSCHEDULABLE, "NoSchedule");
    if network {
        add(NETWORK_UNAVAILABLE, "NoSchedule");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn set(pod: Value) -> DaemonSet {
        serde_json::from_value(json!({"metadata": {"namespace": "ns", "name": "logs", "uid": "ds"},
            "spec": {"selector": {}, "template": {"metadata": {"labels": {"app": "logs"}}, "spec": pod}}}))
        .unwrap()
    }

    fn node(taints: Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1", "labels": {"disk": "ssd"}},
            "spec": {"taints": taints}}))
        .unwrap()
    }

    fn taint(key: &str, effect: &str) -> Value {
        json!([{"key": key, "effect": effect}])
    }

    #[test]
    fn nodes_are_chosen_by_name_labels_affinity_and_taints() {
        let affinity = |values: Value| {
            json!({"containers": [], "affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "disk", "operator": "In", "values": values}]}]}}}})
        };
        let plain = json!({"containers": []});
        for (pod, taints, fit) in [
            (plain.clone(), json!(null), Fit::Runs),
            (json!({"containers": [], "nodeName": "n1"}), json!(null), Fit::Runs),
            (json!({"containers": [], "nodeName": "n2"}), json!(null), Fit::Lacks),
            (json!({"containers": [], "nodeSelector": {"disk": "ssd"}}), json!(null), Fit::Runs),
            (json!({"containers": [], "nodeSelector": {"disk": "hdd"}}), json!(null), Fit::Lacks),
            (affinity(json!(["ssd"])), json!(null), Fit::Runs),
            (affinity(json!(["hdd"])), json!(null), Fit::Lacks),
            (plain.clone(), taint("own", "PreferNoSchedule"), Fit::Runs),
            (plain.clone(), taint("own", "NoSchedule"), Fit::Keeps),
            (plain.clone(), taint("own", "NoExecute"), Fit::Lacks),
            (
                json!({"containers": [], "tolerations": [{"operator": "Exists"}]}),
                taint("own", "NoExecute"),
                Fit::Runs,
            ),
            (plain.clone(), taint(UNSCHEDULABLE, "NoSchedule"), Fit::Runs),
            (plain.clone(), taint("node.kubernetes.io/disk-pressure", "NoSchedule"), Fit::Runs),
            (plain.clone(), taint("node.kubernetes.io/memory-pressure", "NoSchedule"), Fit::Runs),
            (plain.clone(), taint("node.kubernetes.io/pid-pressure", "NoSchedule"), Fit::Runs),
            (plain.clone(), taint(UNREACHABLE, "NoExecute"), Fit::Runs),
            (plain.clone(), taint(UNREACHABLE, "NoSchedule"), Fit::Keeps),
            (plain.clone(), taint(NOT_READY, "NoExecute"), Fit::Runs),
            (plain, taint(NETWORK_UNAVAILABLE, "NoSchedule"), Fit::Keeps),
            (
                json!({"containers": [], "hostNetwork": true}),
                taint(NETWORK_UNAVAILABLE, "NoSchedule"),
                Fit::Runs,
            ),
        ] {
            let found = Rule::of(&set(pod.clone())).fit(&node(taints.clone()));
            assert_eq!(found, fit, "{pod} {taints}");
        }
    }

    #[test]
    fn a_pod_is_for_one_node() {
        let pod = new_pod(
            &set(json!({"containers": [], "tolerations": [
                {"key": UNSCHEDULABLE, "operator": "Exists", "effect": "NoSchedule"}]})),
            "n1",
            "h",
        );
        assert_eq!(pod.metadata.labels.as_ref().unwrap()[POD_REVISION], "h");
        assert_eq!(pod.metadata.generate_name.as_deref(), Some("logs-"));
        assert_eq!(objects::controller_of(&pod.metadata).unwrap().uid, "ds");
        assert_eq!((target(&pod), objects::node_of(&pod)), (Some("n1"), None));
        let tolerations = pod.spec.as_ref().unwrap().tolerations.as_ref().unwrap();
        assert_eq!(tolerations.len(), 6, "none twice");
        let selection = Selection::new(&pod);
        assert!(selection.admits("n1", &Default::default()));
        assert!(!selection.admits("n2", &Default::default()));
        let mut bound = pod;
        bound.spec.as_mut().unwrap().node_name = Some("n3".to_owned());
        assert_eq!(target(&bound), Some("n3"));
        assert_eq!(target(&Pod::default()), None);
    }
}
