//! Filters: the reasons why a node cannot take a pod.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorTerm, Pod, Taint, Toleration};

use super::resources::Resources;
use super::state::{HostPort, NodeFacts, Usage, host_ports};
use super::taints::{self, NOT_READY, UNSCHEDULABLE, tolerated};
use super::topology::Demands;
use crate::objects::{self, Labels};

/// What a pod wants of a node, read once per placement.
pub(super) struct Request {
    pub(super) resources: Resources,
    pub(super) owner: Option<String>,
    pub(super) tolerations: Vec<Toleration>,
    pub(super) topology: Demands,
    pub(super) preferred: Vec<(i64, NodeSelectorTerm)>,
    ports: Vec<HostPort>,
    selection: Selection,
}

/// The hard constraints on a node's own labels.
pub(crate) struct Selection {
    labels: BTreeMap<String, String>,
    terms: Option<Vec<NodeSelectorTerm>>,
}

impl Request {
    pub(super) fn new(pod: &Pod, topology: Demands) -> Self {
        let affinity = pod.spec.as_ref().and_then(|s| s.affinity.as_ref());
        let preferred = affinity
            .and_then(|a| a.node_affinity.as_ref())
            .and_then(|a| a.preferred_during_scheduling_ignored_during_execution.as_ref());
        Self {
            resources: Resources::requested(pod),
            owner: objects::controller_of(&pod.metadata).map(|owner| owner.uid.clone()),
            tolerations: taints::tolerations(pod).to_vec(),
            topology,
            preferred: preferred
                .into_iter()
                .flatten()
                .map(|term| (i64::from(term.weight), term.preference.clone()))
                .collect(),
            ports: host_ports(pod),
            selection: Selection::new(pod),
        }
    }

    /// Why the node cannot take the pod; empty when it can. Only the first group of reasons that applies.
    pub(super) fn reasons_against(
        &self,
        name: &str,
        node: &NodeFacts,
        usage: &Usage,
    ) -> Vec<String> {
        if let Some(reason) = self.node_reason(name, node) {
            return vec![reason];
        }
        if self.ports.iter().any(|port| usage.ports.keys().any(|used| collide(port, used))) {
            return vec!["node(s) didn't have free ports for the requested pod ports".to_owned()];
        }
        let reasons = self.resource_reasons(node, usage);
        if !reasons.is_empty() {
            return reasons;
        }
        self.topology.reason_against(&node.labels).map(str::to_owned).into_iter().collect()
    }

    fn node_reason(&self, name: &str, node: &NodeFacts) -> Option<String> {
        let cordon = Taint {
            key: UNSCHEDULABLE.to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        if node.unschedulable && !tolerated(&self.tolerations, &cordon) {
            return Some("node(s) were unschedulable".to_owned());
        }
        let untolerated = node
            .taints()
            .filter(|taint| matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute"))
            .find(|taint| !tolerated(&self.tolerations, taint));
        if let Some(taint) = untolerated {
            let value = taint.value.unwrap_or_default();
            return Some(format!("node(s) had untolerated taint {{{}: {value}}}", taint.key));
        }
        let unready = Taint {
            key: NOT_READY.to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        if node.away || !node.ready && !tolerated(&self.tolerations, &unready) {
            return Some("node(s) were not ready".to_owned());
        }
        (!self.selection.admits(name, &node.labels))
            .then(|| "node(s) didn't match Pod's node affinity/selector".to_owned())
    }

    fn resource_reasons(&self, node: &NodeFacts, usage: &Usage) -> Vec<String> {
        let mut reasons = Vec::new();
        if usage.pods >= node.max_pods {
            reasons.push("Too many pods".to_owned());
        }
        for (resource, amount) in self.resources.iter() {
            let free = node.allocatable.of(resource) - usage.requested.of(resource);
            if amount > 0 && amount > free {
                reasons.push(format!("Insufficient {resource}"));
            }
        }
        reasons
    }
}

impl Selection {
    pub(crate) fn new(pod: &Pod) -> Self {
        let spec = pod.spec.as_ref();
        let required = spec
            .and_then(|s| s.affinity.as_ref())
            .and_then(|a| a.node_affinity.as_ref())
            .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
        Self {
            labels: spec.and_then(|s| s.node_selector.clone()).unwrap_or_default(),
            terms: required.map(|selector| selector.node_selector_terms.clone()),
        }
    }

    /// Whether the node's name and labels satisfy all of it.
    pub(crate) fn admits(&self, name: &str, labels: &Labels) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
            && self
                .terms
                .as_ref()
                .is_none_or(|terms| terms.iter().any(|term| term_matches(term, name, labels)))
    }
}

/// Whether a node satisfies one term. A term without requirements matches no node.
pub(super) fn term_matches(term: &NodeSelectorTerm, name: &str, labels: &Labels) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let name = name.to_owned();
    expressions
        .iter()
        .all(|e| objects::requirement(&e.operator, labels.get(&e.key), e.values.as_deref()))
        && fields.iter().all(|f| {
            f.key == "metadata.name"
                && objects::requirement(&f.operator, Some(&name), f.values.as_deref())
        })
}

fn collide(a: &HostPort, b: &HostPort) -> bool {
    a.protocol == b.protocol
        && a.port == b.port
        && (a.address == b.address || a.address.is_empty() || b.address.is_empty())
}
