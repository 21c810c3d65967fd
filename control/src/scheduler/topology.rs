//! Constraints that depend on where other pods are: spreading, affinity and anti-affinity between pods.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Pod, PodAffinityTerm, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

use super::fit::Selection;
use super::state::{ClusterState, Placed};
use crate::objects::{self, Labels};

/// A pod's demands of this kind, with the pods that matter counted per topology value.
#[derive(Default)]
pub(super) struct Demands {
    spread: Vec<Spread>,
    near: Vec<Near>,
    /// Topology values where another pod must not be, as (key, value).
    apart: BTreeSet<(String, String)>,
    /// The same, because pods there refuse this one.
    repelled: BTreeSet<(String, String)>,
    /// Weighted wishes: (key, matching pods per value, weight).
    wishes: Vec<(String, BTreeMap<String, i64>, i64)>,
}

struct Spread {
    key: String,
    counts: BTreeMap<String, i64>,
    least: i64,
    max_skew: i64,
    counts_itself: bool,
    hard: bool,
}

struct Near {
    key: String,
    values: BTreeSet<String>,
    /// No pod matches yet, but this one does: it may be the first.
    first_of_its_kind: bool,
}

impl Demands {
    /// Reads the pod's constraints against the cluster. Also returns how many objects were looked at.
    pub(super) fn new(pod: &Pod, cluster: &ClusterState) -> (Self, u64) {
        let mut view = View { pod, cluster, looked_at: 0 };
        let mut demands = Self { repelled: view.repelled(), ..Self::default() };
        let spec = pod.spec.as_ref();
        for constraint in spec.iter().flat_map(|s| s.topology_spread_constraints.iter().flatten()) {
            demands.spread.push(view.spread(constraint));
        }
        let affinity = spec.and_then(|s| s.affinity.as_ref());
        let near = affinity.and_then(|a| a.pod_affinity.as_ref());
        let apart = affinity.and_then(|a| a.pod_anti_affinity.as_ref());
        for term in near
            .iter()
            .flat_map(|a| a.required_during_scheduling_ignored_during_execution.iter().flatten())
        {
            let counts = view.counts(term);
            demands.near.push(Near {
                key: term.topology_key.clone(),
                first_of_its_kind: counts.is_empty() && view.matches_itself(term),
                values: counts.into_keys().collect(),
            });
        }
        for term in required_anti_terms(pod) {
            let key = &term.topology_key;
            demands.apart.extend(view.counts(term).into_keys().map(|v| (key.clone(), v)));
        }
        let wishes = near
            .iter()
            .flat_map(|a| a.preferred_during_scheduling_ignored_during_execution.iter().flatten())
            .map(|wish| (wish, 1))
            .chain(
                apart
                    .iter()
                    .flat_map(|a| {
                        a.preferred_during_scheduling_ignored_during_execution.iter().flatten()
                    })
                    .map(|wish| (wish, -1)),
            );
        for (wish, sign) in wishes {
            let term = &wish.pod_affinity_term;
            let weight = i64::from(wish.weight) * sign;
            demands.wishes.push((term.topology_key.clone(), view.counts(term), weight));
        }
        (demands, view.looked_at)
    }

    /// Why a node with these labels cannot take the pod.
    pub(super) fn reason_against(&self, labels: &Labels) -> Option<&'static str> {
        for spread in self.spread.iter().filter(|s| s.hard) {
            let Some(value) = labels.get(&spread.key) else {
                return Some(
                    "node(s) didn't match pod topology spread constraints (missing required label)",
                );
            };
            let there = spread.counts.get(value).copied().unwrap_or(0);
            if there + i64::from(spread.counts_itself) - spread.least > spread.max_skew {
                return Some("node(s) didn't match pod topology spread constraints");
            }
        }
        let near = |near: &Near| {
            labels
                .get(&near.key)
                .is_some_and(|value| near.first_of_its_kind || near.values.contains(value))
        };
        if !self.near.iter().all(near) {
            return Some("node(s) didn't match pod affinity rules");
        }
        let hit = |set: &BTreeSet<(String, String)>| {
            set.iter().any(|(key, value)| labels.get(key) == Some(value))
        };
        if hit(&self.apart) {
            return Some("node(s) didn't match pod anti-affinity rules");
        }
        hit(&self.repelled).then_some("node(s) didn't satisfy existing pods anti-affinity rules")
    }

    /// How much a node with these labels is wished for; only comparable within one placement.
    pub(super) fn wish(&self, labels: &Labels) -> i64 {
        let there = |key: &String, counts: &BTreeMap<String, i64>| {
            labels.get(key).and_then(|value| counts.get(value)).copied().unwrap_or(0)
        };
        self.wishes.iter().map(|(key, counts, weight)| there(key, counts) * weight).sum()
    }

    /// How crowded the node's topology values are, by the soft spread constraints.
    pub(super) fn crowding(&self, labels: &Labels) -> i64 {
        self.spread
            .iter()
            .filter(|s| !s.hard)
            .map(|s| match labels.get(&s.key) {
                Some(value) => s.counts.get(value).copied().unwrap_or(0),
                None => s.counts.values().max().copied().unwrap_or(0) + 1,
            })
            .sum()
    }
}

/// The terms by which the pod refuses others near it.
pub(super) fn required_anti_terms(pod: &Pod) -> &[PodAffinityTerm] {
    pod.spec
        .as_ref()
        .and_then(|s| s.affinity.as_ref())
        .and_then(|a| a.pod_anti_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_deref())
        .unwrap_or_default()
}

struct View<'a> {
    pod: &'a Pod,
    cluster: &'a ClusterState,
    looked_at: u64,
}

impl View<'_> {
    /// Matching pods per topology value.
    fn counts(&mut self, term: &PodAffinityTerm) -> BTreeMap<String, i64> {
        let own = objects::namespace(&self.pod.metadata);
        let selector = with_own_values(
            term.label_selector.as_ref(),
            term.match_label_keys.as_deref(),
            self.pod.metadata.labels.as_ref(),
        );
        let mut counts = BTreeMap::new();
        for placed in self.cluster.pods.values() {
            self.looked_at += 1;
            if selector.as_ref().is_some_and(|s| objects::selects(s, Some(&placed.labels)))
                && covers(self.cluster, term, own, &placed.namespace)
                && let Some(value) = self.value(placed, &term.topology_key)
            {
                *counts.entry(value.clone()).or_insert(0) += 1;
            }
        }
        counts
    }

    fn matches_itself(&self, term: &PodAffinityTerm) -> bool {
        let own = objects::namespace(&self.pod.metadata);
        let labels = self.pod.metadata.labels.as_ref();
        covers(self.cluster, term, own, own)
            && term.label_selector.as_ref().is_some_and(|s| objects::selects(s, labels))
    }

    fn value(&self, placed: &Placed, key: &str) -> Option<&String> {
        self.cluster.nodes.get(&placed.node)?.labels.get(key)
    }

    /// Topology values where a pod already refuses this one.
    fn repelled(&mut self) -> BTreeSet<(String, String)> {
        let own = objects::namespace(&self.pod.metadata);
        let labels = self.pod.metadata.labels.as_ref();
        let mut result = BTreeSet::new();
        for placed in self.cluster.repelling.iter().filter_map(|uid| self.cluster.pods.get(uid)) {
            self.looked_at += 1;
            for term in &placed.repels {
                if term.label_selector.as_ref().is_some_and(|s| objects::selects(s, labels))
                    && covers(self.cluster, term, &placed.namespace, own)
                    && let Some(value) = self.value(placed, &term.topology_key)
                {
                    result.insert((term.topology_key.clone(), value.clone()));
                }
            }
        }
        result
    }

    fn spread(&mut self, constraint: &TopologySpreadConstraint) -> Spread {
        let labels = self.pod.metadata.labels.as_ref();
        let namespace = objects::namespace(&self.pod.metadata);
        let key = &constraint.topology_key;
        let selector = with_own_values(
            constraint.label_selector.as_ref(),
            constraint.match_label_keys.as_deref(),
            labels,
        );
        let selection = Selection::new(self.pod);
        let by_affinity = constraint.node_affinity_policy.as_deref() != Some("Ignore");
        let eligible = |name: &str, labels: &Labels| {
            labels.contains_key(key) && (!by_affinity || selection.admits(name, labels))
        };
        let mut counts: BTreeMap<String, i64> = BTreeMap::new();
        for (name, node) in &self.cluster.nodes {
            self.looked_at += 1;
            if eligible(name, &node.labels) {
                counts.insert(node.labels[key].clone(), 0);
            }
        }
        let selects = |labels| selector.as_ref().is_some_and(|s| objects::selects(s, labels));
        for placed in self.cluster.pods.values() {
            self.looked_at += 1;
            if placed.namespace == namespace
                && !placed.terminating
                && selects(Some(&placed.labels))
                && let Some(node) = self.cluster.nodes.get(&placed.node)
                && eligible(&placed.node, &node.labels)
            {
                *counts.entry(node.labels[key].clone()).or_insert(0) += 1;
            }
        }
        let few = constraint.min_domains.is_some_and(|min| (counts.len() as i64) < min.into());
        let least = if few { 0 } else { counts.values().min().copied().unwrap_or(0) };
        Spread {
            key: key.clone(),
            least,
            counts,
            max_skew: constraint.max_skew.into(),
            counts_itself: selects(labels),
            hard: constraint.when_unsatisfiable != "ScheduleAnyway",
        }
    }
}

/// Whether the term of a pod in namespace `own` looks at namespace `other`.
fn covers(cluster: &ClusterState, term: &PodAffinityTerm, own: &str, other: &str) -> bool {
    let named = term.namespaces.as_deref().unwrap_or_default();
    match &term.namespace_selector {
        None if named.is_empty() => own == other,
        None => named.iter().any(|name| name == other),
        Some(selector) => {
            named.iter().any(|name| name == other)
                || objects::selects(selector, cluster.namespaces.get(other))
        }
    }
}

/// The selector, narrowed to the pod's own values of `keys`.
fn with_own_values(
    selector: Option<&LabelSelector>,
    keys: Option<&[String]>,
    labels: Option<&Labels>,
) -> Option<LabelSelector> {
    let mut selector = selector?.clone();
    for key in keys.unwrap_or_default() {
        if let Some(value) = labels.and_then(|labels| labels.get(key)) {
            selector.match_expressions.get_or_insert_default().push(LabelSelectorRequirement {
                key: key.clone(),
                operator: "In".to_owned(),
                values: Some(vec![value.clone()]),
            });
        }
    }
    Some(selector)
}
