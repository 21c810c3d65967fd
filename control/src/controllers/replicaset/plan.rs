//! A ReplicaSet's next steps and status, from the set and the pods of its namespace.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::controllers::availability::{self, Availability, LostNodes};
use crate::controllers::claims::Claims;
use crate::objects;

/// Annotation by which people rank pods for deletion: lower goes first.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Why a node refuses a pod before it runs anything of it. The next one is likely to be refused, too.
const REFUSED: &str = "AppArmor";
/// Refusals are remembered for an hour, and there is a new attempt every five minutes at least.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(1);
const LONGEST_WAIT: SignedDuration = SignedDuration::from_mins(5);

/// One change towards what the set asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::controllers) enum Step {
    /// Become the controller of a pod that has none.
    Adopt(String),
    /// Let go of a pod whose labels no longer match.
    Release(String),
    /// Create that many pods.
    Create(usize),
    /// Delete that pod.
    Delete(String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adopt(pod) => write!(f, "adopt pod {pod}"),
            Self::Release(pod) => write!(f, "release pod {pod}"),
            Self::Create(count) => write!(f, "create {count} pods"),
            Self::Delete(pod) => write!(f, "delete pod {pod}"),
        }
    }
}

/// What to do, what to report, and when to look again although nothing changed.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) struct Plan {
    pub(in crate::controllers) steps: Vec<Step>,
    pub(in crate::controllers) status: ReplicaSetStatus,
    pub(in crate::controllers) look_again: Option<Timestamp>,
}

/// Why the last creation of pods failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::controllers) struct Failure {
    pub(in crate::controllers) message: String,
}

/// So many pods are made before the set is looked at again.
const BURST: usize = 500;

/// Plans for `set`; `pods` may hold foreign pods of the namespace, in any order.
pub(in crate::controllers) fn plan(
    set: &ReplicaSet,
    pods: &[Arc<Pod>],
    lost: &LostNodes,
    failure: Option<&Failure>,
    now: Timestamp,
) -> Plan {
    let selector = set.spec.as_ref().map(|spec| &spec.selector);
    let claims = Claims::sort(&set.metadata, selector, pods, objects::is_active);
    let mut steps = Vec::new();
    let mut held_until = None;
    if !objects::is_terminating(&set.metadata) {
        steps.extend(claims.adoptable.iter().map(|pod| Step::Adopt(name(pod))));
        steps.extend(claims.strays.iter().map(|pod| Step::Release(name(pod))));
        let mut active: Vec<&Pod> = claims.owned.iter().chain(&claims.adoptable).copied().collect();
        active.retain(|pod| objects::is_active(pod));
        let wanted = usize::try_from(wanted(set)).unwrap_or(0);
        if active.len() < wanted {
            held_until = hold(&claims.owned, wanted, now);
            if held_until.is_none() {
                steps.push(Step::Create((wanted - active.len()).min(BURST)));
            }
        } else {
            let surplus = active.len() - wanted;
            let victims = rank_for_deletion(&active, lost);
            steps.extend(victims.into_iter().take(surplus).map(|pod| Step::Delete(name(pod))));
        }
    }
    let (status, look_again) = status(set, &claims, lost, failure, now);
    let look_again = look_again.into_iter().chain(held_until).min();
    Plan { steps, status, look_again }
}

/// When pods may be created again that nodes refused: after each round of refusals in twice the time, beginning with a second.
fn hold(owned: &[&Pod], wanted: usize, now: Timestamp) -> Option<Timestamp> {
    let begun = now.checked_sub(REMEMBERED).unwrap_or(Timestamp::MIN);
    let is_refused = |pod: &&&Pod| {
        let reason = pod.status.as_ref().and_then(|status| status.reason.as_deref());
        objects::phase(pod) == "Failed" && reason == Some(REFUSED)
    };
    let refused = owned.iter().filter(is_refused).map(|pod| objects::created(&pod.metadata));
    let recent: Vec<Timestamp> = refused.filter(|created| *created > begun).collect();
    let rounds = u32::try_from(recent.len().div_ceil(wanted.max(1))).unwrap_or(u32::MAX);
    let wait = SignedDuration::from_secs(1 << rounds.saturating_sub(1).min(16)).min(LONGEST_WAIT);
    let until = recent.into_iter().max()?.saturating_add(wait).unwrap_or(Timestamp::MAX);
    (until > now).then_some(until)
}

/// How many pods the set asks for.
pub(in crate::controllers) fn wanted(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1).max(0)
}

fn name(pod: &Pod) -> String {
    objects::name(&pod.metadata).to_owned()
}

/// The pods in the order in which they should go: those that people miss least come first.
fn rank_for_deletion<'a>(pods: &[&'a Pod], lost: &LostNodes) -> Vec<&'a Pod> {
    let mut per_node: BTreeMap<&str, usize> = BTreeMap::new();
    for node in pods.iter().filter_map(|pod| objects::node_of(pod)) {
        *per_node.entry(node).or_default() += 1;
    }
    let mut ranked = pods.to_vec();
    ranked.sort_by_cached_key(|pod| {
        let node = objects::node_of(pod);
        let phase = match objects::phase(pod) {
            "Pending" => 0,
            "Unknown" => 1,
            _ => 2,
        };
        let ready = availability::serving_since(pod, lost);
        let meta = &pod.metadata;
        let cost = meta.annotations.as_ref().and_then(|a| a.get(DELETION_COST));
        let neighbours = node.and_then(|node| per_node.get(node)).copied().unwrap_or(0);
        (
            (node.is_some(), phase, ready.is_some()),
            cost.and_then(|text| text.parse::<i64>().ok()).unwrap_or(0),
            Reverse(neighbours),
            Reverse(ready),
            Reverse(restarts(pod)),
            Reverse(objects::created(meta)),
            meta.name.clone(),
        )
    });
    ranked
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    statuses.map(|status| status.restart_count).max().unwrap_or(0)
}

fn status(
    set: &ReplicaSet,
    claims: &Claims<'_>,
    lost: &LostNodes,
    failure: Option<&Failure>,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Timestamp>) {
    let spec = set.spec.as_ref();
    let min_ready = spec.and_then(|s| s.min_ready_seconds).unwrap_or(0);
    let template = spec.and_then(|s| s.template.as_ref()).and_then(|t| t.metadata.as_ref());
    let labels = template.and_then(|m| m.labels.clone()).unwrap_or_default();
    let (mut replicas, mut labelled, mut ready, mut available) = (0, 0, 0, 0);
    let mut look_again: Option<Timestamp> = None;
    for pod in claims.owned.iter().filter(|pod| objects::is_active(pod)) {
        replicas += 1;
        let own = pod.metadata.labels.as_ref();
        labelled += i32::from(labels.iter().all(|(k, v)| own.and_then(|l| l.get(k)) == Some(v)));
        let state = availability::of(pod, lost, min_ready, now);
        ready += i32::from(state.is_ready());
        available += i32::from(state == Availability::Available);
        if let Availability::ReadyUntil(until) = state {
            look_again = Some(look_again.map_or(until, |t| t.min(until)));
        }
    }
    let dying = |pod: &&&Pod| objects::is_terminating(&pod.metadata) && !objects::have_ended(pod);
    let terminating = claims.owned.iter().filter(dying).count();
    let status = ReplicaSetStatus {
        replicas,
        fully_labeled_replicas: Some(labelled),
        ready_replicas: Some(ready),
        available_replicas: Some(available),
        terminating_replicas: Some(i32::try_from(terminating).unwrap_or(i32::MAX)),
        observed_generation: set.metadata.generation,
        conditions: conditions(set, failure, now),
    };
    (status, look_again)
}

fn conditions(
    set: &ReplicaSet,
    failure: Option<&Failure>,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    let old = set.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
    let (mut failed, mut rest): (Vec<_>, Vec<_>) =
        old.into_iter().partition(|c| c.type_ == "ReplicaFailure");
    if let Some(failure) = failure {
        let same = failed.pop().filter(|c| c.message.as_ref() == Some(&failure.message));
        rest.push(same.unwrap_or_else(|| ReplicaSetCondition {
            type_: "ReplicaFailure".to_owned(),
            status: "True".to_owned(),
            reason: Some("FailedCreate".to_owned()),
            message: Some(failure.message.clone()),
            last_transition_time: Some(Time(now)),
        }));
    }
    (!rest.is_empty()).then_some(rest)
}

#[cfg(test)]
mod tests;
