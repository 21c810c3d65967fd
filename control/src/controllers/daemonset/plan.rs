//! A DaemonSet's next steps and status, from the set, the nodes and the pods around it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;

use super::eligibility::{Fit, Rule, target};
use super::rollout::{self, Bounds};
use crate::controllers::availability::{self, Availability, LostNodes};
use crate::controllers::backoff::Backoff;
use crate::controllers::claims::Claims;
use crate::controllers::history::POD_REVISION;
use crate::objects;

/// One change towards what the set asks for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::controllers) enum Step {
    /// Become the controller of a pod that has none.
    Adopt(String),
    /// Let go of a pod whose labels no longer match.
    Release(String),
    /// Delete that pod.
    Delete(String),
    /// Delete a pod that ended, so that its node gets another one.
    Renew {
        /// The pod.
        pod: String,
        /// Its node.
        node: String,
    },
    /// Create the pod of that node.
    Create(String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adopt(pod) => write!(f, "adopt pod {pod}"),
            Self::Release(pod) => write!(f, "release pod {pod}"),
            Self::Delete(pod) => write!(f, "delete pod {pod}"),
            Self::Renew { pod, node } => write!(f, "delete pod {pod}, which ended on {node}"),
            Self::Create(node) => write!(f, "create a pod for {node}"),
        }
    }
}

/// What a plan follows from.
pub(in crate::controllers) struct Seen<'a> {
    /// All of them.
    pub(in crate::controllers) nodes: &'a [Arc<Node>],
    /// May hold foreign pods of the namespace, in any order.
    pub(in crate::controllers) pods: &'a [Arc<Pod>],
    /// What pods of the present template have as their label.
    pub(in crate::controllers) revision: &'a str,
    pub(in crate::controllers) lost: &'a LostNodes,
    pub(in crate::controllers) backoff: &'a Backoff,
    pub(in crate::controllers) now: Timestamp,
}

/// What to do, what to report, and when to look again although nothing changed.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) struct Plan {
    pub(in crate::controllers) steps: Vec<Step>,
    pub(in crate::controllers) status: DaemonSetStatus,
    pub(in crate::controllers) look_again: Option<Timestamp>,
}

/// A node, and the set's pods that are for it.
pub(super) struct Place<'a> {
    pub(super) node: &'a str,
    pub(super) fit: Fit,
    /// Those that do their work: bound ones first, then the oldest.
    pub(super) live: Vec<&'a Pod>,
    /// Those that ended and still have to be deleted.
    pub(super) ended: Vec<&'a Pod>,
    /// Whether another one is on its way out, and may still run.
    pub(super) going: bool,
}

/// Plans for `set`.
pub(in crate::controllers) fn plan(set: &DaemonSet, seen: &Seen<'_>) -> Plan {
    let selector = set.spec.as_ref().map(|spec| &spec.selector);
    let claims = Claims::sort(&set.metadata, selector, seen.pods, objects::is_active);
    let (places, homeless) = places(set, seen, &claims);
    let mut look_again = None;
    let mut steps = Vec::new();
    if !objects::is_terminating(&set.metadata) {
        steps.extend(claims.adoptable.iter().map(|pod| Step::Adopt(name(pod))));
        steps.extend(claims.strays.iter().map(|pod| Step::Release(name(pod))));
        // Their node is gone, and nobody else may take them.
        steps.extend(homeless.iter().map(|pod| Step::Delete(name(pod))));
        let bounds = Bounds::of(set, wanted(&places));
        let mut pods = Vec::new();
        for place in &places {
            let waits = manage(place, bounds, seen, &mut pods);
            look_again = look_again.into_iter().chain(waits).min();
        }
        pods.extend(rollout::roll(&places, bounds, min_ready(set), seen));
        pods.sort();
        pods.dedup();
        steps.extend(pods);
    }
    let (status, due) = status(set, &places, seen);
    Plan { steps, status, look_again: look_again.into_iter().chain(due).min() }
}

/// Each node with its pods, and pods of nodes that are gone and that nobody has begun to run.
fn places<'a>(
    set: &DaemonSet,
    seen: &Seen<'a>,
    claims: &Claims<'a>,
) -> (Vec<Place<'a>>, Vec<&'a Pod>) {
    let rule = Rule::of(set);
    let mut by_node: BTreeMap<&str, Place<'a>> = BTreeMap::new();
    for node in seen.nodes.iter().filter(|node| !objects::is_terminating(&node.metadata)) {
        let (name, fit) = (objects::name(&node.metadata), rule.fit(node));
        let place = Place { node: name, fit, live: Vec::new(), ended: Vec::new(), going: false };
        by_node.insert(name, place);
    }
    let mut homeless = Vec::new();
    for pod in claims.owned.iter().chain(&claims.adoptable).copied() {
        let (ended, going) = (objects::have_ended(pod), objects::is_terminating(&pod.metadata));
        match target(pod).map(|node| by_node.get_mut(node)) {
            Some(Some(place)) => match (ended, going) {
                (false, false) => place.live.push(pod),
                (true, false) => place.ended.push(pod),
                (false, true) => place.going = true,
                (true, true) => {}
            },
            Some(None) if objects::node_of(pod).is_none() && !going => homeless.push(pod),
            _ => {}
        }
    }
    let mut places: Vec<Place<'_>> = by_node.into_values().collect();
    for place in &mut places {
        place.live.sort_by_key(|pod| {
            let meta = &pod.metadata;
            (objects::node_of(pod).is_none(), objects::created(meta), meta.name.clone())
        });
    }
    (places, homeless)
}

/// Gives a node its one pod, and takes away what it should not have. Returns until when it has to wait for one.
fn manage(
    place: &Place<'_>,
    bounds: Bounds,
    seen: &Seen<'_>,
    steps: &mut Vec<Step>,
) -> Option<Timestamp> {
    if place.fit == Fit::Lacks {
        let all = place.live.iter().chain(&place.ended);
        steps.extend(all.map(|pod| Step::Delete(name(pod))));
        return None;
    }
    let mut waits = None;
    for pod in &place.ended {
        match seen.backoff.until(place.node, seen.now) {
            Some(until) => waits = Some(until),
            None => steps.push(Step::Renew { pod: name(pod), node: place.node.to_owned() }),
        }
    }
    if place.fit == Fit::Runs && place.live.is_empty() && place.ended.is_empty() && !place.going {
        steps.push(Step::Create(place.node.to_owned()));
    }
    if bounds.surge == 0 {
        steps.extend(place.live.iter().skip(1).map(|pod| Step::Delete(name(pod))));
    }
    waits
}

/// On how many nodes there should be a pod.
fn wanted(places: &[Place<'_>]) -> i32 {
    let runs = places.iter().filter(|place| place.fit == Fit::Runs).count();
    i32::try_from(runs).unwrap_or(i32::MAX)
}

pub(super) fn name(pod: &Pod) -> String {
    objects::name(&pod.metadata).to_owned()
}

/// Whether a pod is of the present template.
pub(super) fn is_new(pod: &Pod, seen: &Seen<'_>) -> bool {
    let labels = pod.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(POD_REVISION)).is_some_and(|label| label == seen.revision)
}

pub(super) fn is_available(pod: &Pod, min_ready: i32, seen: &Seen<'_>) -> bool {
    availability::of(pod, seen.lost, min_ready, seen.now) == Availability::Available
}

fn min_ready(set: &DaemonSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
}

fn status(
    set: &DaemonSet,
    places: &[Place<'_>],
    seen: &Seen<'_>,
) -> (DaemonSetStatus, Option<Timestamp>) {
    let old = set.status.as_ref();
    let desired = wanted(places);
    let (mut current, mut misscheduled, mut ready, mut available, mut updated) = (0, 0, 0, 0, 0);
    let mut look_again: Option<Timestamp> = None;
    for place in places {
        let has_one = place.going || !place.live.is_empty() || !place.ended.is_empty();
        if place.fit != Fit::Runs {
            misscheduled += i32::from(has_one);
            continue;
        }
        current += i32::from(has_one);
        let state = |pod: &&Pod| availability::of(pod, seen.lost, min_ready(set), seen.now);
        let states: Vec<Availability> = place.live.iter().map(state).collect();
        ready += i32::from(states.iter().any(|state| state.is_ready()));
        available += i32::from(states.contains(&Availability::Available));
        let all_new = place.live.iter().all(|pod| is_new(pod, seen));
        updated += i32::from(all_new && !place.live.is_empty());
        let due = states.into_iter().filter_map(|state| match state {
            Availability::ReadyUntil(until) => Some(until),
            _ => None,
        });
        look_again = look_again.into_iter().chain(due).min();
    }
    let status = DaemonSetStatus {
        collision_count: old.and_then(|status| status.collision_count),
        conditions: old.and_then(|status| status.conditions.clone()),
        current_number_scheduled: current,
        desired_number_scheduled: desired,
        number_available: Some(available),
        number_misscheduled: misscheduled,
        number_ready: ready,
        number_unavailable: Some(desired - available),
        observed_generation: set.metadata.generation,
        updated_number_scheduled: Some(updated),
    };
    (status, look_again)
}

#[cfg(test)]
mod tests;
