//! The arithmetic of disruption budgets. Pure.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::objects;

/// An eviction that has not led to a deletion after so long is taken for failed.
const FORGET: Duration = Duration::from_secs(120);
const CONDITION: &str = "DisruptionAllowed";

/// What a status follows from.
pub(super) struct Seen<'a> {
    /// The pods that the budget covers and that neither ended nor are being deleted.
    pub(super) pods: &'a [Arc<Pod>],
    /// How many there should be.
    pub(super) expected: i32,
    pub(super) now: Timestamp,
}

/// Whether a budget is about a pod. Without a selector it is about none, with an empty one about all.
pub(crate) fn covers(budget: &PodDisruptionBudget, pod: &Pod) -> bool {
    let selector = budget.spec.as_ref().and_then(|s| s.selector.as_ref());
    budget.metadata.namespace == pod.metadata.namespace
        && selector.is_some_and(|s| objects::selects(s, pod.metadata.labels.as_ref()))
}

/// Whether a pod serves.
pub(crate) fn is_healthy(pod: &Pod) -> bool {
    objects::ready_since(pod).is_some()
}

/// The budget with the status that is true now.
pub(super) fn status(budget: &PodDisruptionBudget, seen: &Seen<'_>) -> PodDisruptionBudget {
    let mut budget = budget.clone();
    let (expected, desired) = numbers(budget.spec.as_ref(), seen);
    let generation = budget.metadata.generation;
    let status = budget.status.get_or_insert_default();
    let disrupted = status.disrupted_pods.get_or_insert_default();
    disrupted.retain(|name, at| {
        let there = seen.pods.iter().any(|pod| objects::name(&pod.metadata) == name);
        there && forgotten_at(at) > seen.now
    });
    let healthy = seen
        .pods
        .iter()
        .filter(|pod| is_healthy(pod) && !disrupted.contains_key(objects::name(&pod.metadata)));
    let healthy = i32::try_from(healthy.count()).unwrap_or(i32::MAX);
    let allowed = if expected > 0 { (healthy - desired).max(0) } else { 0 };
    if disrupted.is_empty() {
        status.disrupted_pods = None;
    }
    status.current_healthy = Some(healthy);
    status.desired_healthy = Some(desired);
    status.expected_pods = Some(expected);
    status.disruptions_allowed = Some(allowed);
    status.observed_generation = generation;
    let conditions = status.conditions.get_or_insert_default();
    let (word, reason) =
        if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let before = conditions.iter().find(|c| c.type_ == CONDITION && c.status == word);
    let since = before.map(|c| c.last_transition_time.clone());
    let whole = Timestamp::from_second(seen.now.as_second()).unwrap_or(seen.now);
    let condition = Condition {
        type_: CONDITION.to_owned(),
        status: word.to_owned(),
        reason: reason.to_owned(),
        message: String::new(),
        last_transition_time: since.unwrap_or(Time(whole)),
        observed_generation: generation,
    };
    conditions.retain(|c| c.type_ != CONDITION);
    conditions.push(condition);
    budget
}

/// When the oldest eviction under way is forgotten.
pub(super) fn forgets_at(budget: &PodDisruptionBudget) -> Option<Timestamp> {
    let disrupted = budget.status.as_ref()?.disrupted_pods.as_ref()?;
    disrupted.values().map(forgotten_at).min()
}

fn forgotten_at(at: &Time) -> Timestamp {
    let wait = SignedDuration::try_from(FORGET).unwrap_or(SignedDuration::MAX);
    at.0.checked_add(wait).unwrap_or(Timestamp::MAX)
}

/// How many pods there should be, and how many of them must serve.
fn numbers(spec: Option<&PodDisruptionBudgetSpec>, seen: &Seen<'_>) -> (i32, i32) {
    let present = i32::try_from(seen.pods.len()).unwrap_or(i32::MAX);
    let most = spec.and_then(|s| s.max_unavailable.as_ref());
    match (spec.and_then(|s| s.min_available.as_ref()), most) {
        (Some(IntOrString::Int(number)), _) => (present, *number),
        (Some(share), _) => (seen.expected, rounded_up(share, seen.expected)),
        (None, Some(most)) => {
            (seen.expected, (seen.expected - rounded_up(most, seen.expected)).max(0))
        }
        // As in Kubernetes, one pod must stay where nothing is said.
        (None, None) => (present, 1),
    }
}

fn rounded_up(amount: &IntOrString, of: i32) -> i32 {
    match amount {
        IntOrString::Int(number) => *number,
        IntOrString::String(text) => {
            let percent = text.trim_end_matches('%').parse::<i64>().unwrap_or(0);
            i32::try_from((percent * i64::from(of) + 99) / 100).unwrap_or(i32::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NOW: &str = "2026-01-01T00:10:00Z";

    fn pod(name: &str, ready: bool) -> Arc<Pod> {
        let condition = json!({"type": "Ready", "status": if ready { "True" } else { "False" }});
        let value = json!({"metadata": {"name": name, "namespace": "d", "labels": {"app": "web"}},
            "status": {"phase": "Running", "conditions": [condition]}});
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn budget(spec: Value, disrupted: Value) -> PodDisruptionBudget {
        let mut spec = spec;
        spec["selector"] = json!({"matchLabels": {"app": "web"}});
        let value = json!({"metadata": {"namespace": "d", "generation": 3}, "spec": spec,
            "status": {"disruptedPods": disrupted}});
        serde_json::from_value(value).unwrap()
    }

    /// Allowed, healthy, desired, expected.
    fn told(spec: Value, disrupted: Value, ready: usize, broken: usize, expected: i32) -> [i32; 4] {
        let names = (0..ready + broken).map(|i| pod(&format!("p{i}"), i < ready));
        let pods: Vec<_> = names.collect();
        let seen = Seen { pods: &pods, expected, now: NOW.parse().unwrap() };
        let told = status(&budget(spec, disrupted), &seen).status.unwrap();
        assert_eq!(told.observed_generation, Some(3));
        let condition = &told.conditions.as_ref().unwrap()[0];
        assert_eq!(condition.status == "True", told.disruptions_allowed > Some(0));
        [
            told.disruptions_allowed.unwrap(),
            told.current_healthy.unwrap(),
            told.desired_healthy.unwrap(),
            told.expected_pods.unwrap(),
        ]
    }

    #[test]
    fn a_budget_is_what_is_healthy_beyond_what_must_be() {
        let none = json!({});
        for (spec, ready, broken, expected, numbers) in [
            (json!({"minAvailable": 2}), 3, 0, 3, [1, 3, 2, 3]),
            (json!({"minAvailable": 2}), 2, 1, 3, [0, 2, 2, 3]),
            (json!({"minAvailable": 5}), 3, 0, 3, [0, 3, 5, 3]),
            (json!({"minAvailable": "50%"}), 5, 0, 5, [2, 5, 3, 5]),
            (json!({"maxUnavailable": 1}), 3, 0, 3, [1, 3, 2, 3]),
            (json!({"maxUnavailable": 1}), 2, 1, 3, [0, 2, 2, 3]),
            // One of those that should be there has not even been made.
            (json!({"maxUnavailable": 1}), 3, 0, 4, [0, 3, 3, 4]),
            (json!({"maxUnavailable": "34%"}), 3, 0, 3, [2, 3, 1, 3]),
            (json!({"maxUnavailable": 9}), 3, 0, 3, [3, 3, 0, 3]),
            (json!({"maxUnavailable": 0}), 3, 0, 3, [0, 3, 3, 3]),
            (json!({}), 2, 0, 2, [1, 2, 1, 2]),
            (json!({"minAvailable": 0}), 0, 0, 0, [0, 0, 0, 0]),
        ] {
            assert_eq!(
                told(spec.clone(), none.clone(), ready, broken, expected),
                numbers,
                "{spec}"
            );
        }
    }

    #[test]
    fn evictions_under_way_count_until_they_are_forgotten() {
        let spec = json!({"minAvailable": 1});
        let fresh = json!({"p0": "2026-01-01T00:09:00Z"});
        assert_eq!(told(spec.clone(), fresh, 3, 0, 3)[..2], [1, 2]);
        let old = json!({"p0": "2026-01-01T00:08:00Z"});
        assert_eq!(told(spec.clone(), old, 3, 0, 3)[..2], [2, 3]);
        let gone = json!({"other": "2026-01-01T00:10:00Z"});
        assert_eq!(told(spec, gone, 3, 0, 3)[..2], [2, 3]);
        let budget = budget(json!({}), json!({"p0": "2026-01-01T00:09:00Z"}));
        assert_eq!(forgets_at(&budget), Some("2026-01-01T00:11:00Z".parse().unwrap()));
    }

    #[test]
    fn a_selector_decides_whom_a_budget_is_about() {
        let with = |selector: Value| {
            let mut budget = budget(json!({}), json!({}));
            budget.spec.as_mut().unwrap().selector = serde_json::from_value(selector).unwrap();
            covers(&budget, &pod("p", true))
        };
        assert!(with(json!({})) && with(json!({"matchLabels": {"app": "web"}})));
        assert!(!with(Value::Null) && !with(json!({"matchLabels": {"app": "db"}})));
    }
}
