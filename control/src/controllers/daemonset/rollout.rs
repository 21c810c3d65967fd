//! How a DaemonSet gets from one template to the next: which pods make room, and which nodes have two for a while. Pure.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;

use super::eligibility::Fit;
use super::plan::{Place, Seen, Step, is_available, is_new, name};
use crate::controllers::deployment::numbers::resolve;

/// How far an update may go at a time. One of them is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Whether pods are replaced without anybody's doing.
    rolls: bool,
    /// Nodes whose pod may be away.
    unavailable: i32,
    /// Nodes that may have an old and a new one.
    pub(super) surge: i32,
}

impl Bounds {
    pub(super) fn of(set: &DaemonSet, desired: i32) -> Self {
        let strategy = set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref());
        if strategy.and_then(|s| s.type_.as_deref()) == Some("OnDelete") {
            return Self { rolls: false, unavailable: 0, surge: 0 };
        }
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let of = |amount| resolve(amount, desired, true);
        let surge = rolling.and_then(|r| r.max_surge.as_ref()).map_or(0, of);
        let unavailable = rolling.and_then(|r| r.max_unavailable.as_ref()).map_or(1, of);
        let unavailable = if surge == 0 { unavailable.max(1) } else { unavailable };
        Self { rolls: true, unavailable, surge }
    }
}

/// The steps of an update, beside what each node gets anyway.
pub(super) fn roll(
    places: &[Place<'_>],
    bounds: Bounds,
    min_ready: i32,
    seen: &Seen<'_>,
) -> Vec<Step> {
    // An old one that has just become ready is missed all the same.
    let wait = |pod: &Pod| if is_new(pod, seen) { min_ready } else { 0 };
    let serves = |pod: &Pod| is_available(pod, wait(pod), seen);
    if !bounds.rolls {
        Vec::new()
    } else if bounds.surge > 0 {
        surge(places, bounds.surge, serves, seen)
    } else {
        replace(places, bounds.unavailable, serves, seen)
    }
}

/// Deletes old pods, so many at a time that no more than `most` nodes are without one. Those that do not serve anyway go at once.
fn replace(
    places: &[Place<'_>],
    most: i32,
    serves: impl Fn(&Pod) -> bool,
    seen: &Seen<'_>,
) -> Vec<Step> {
    // Of several pods of a node only the first stays.
    let places: Vec<&Place<'_>> = places.iter().filter(|place| place.fit == Fit::Runs).collect();
    let served = |place: &&&Place<'_>| place.live.first().is_some_and(|pod| serves(pod));
    let away = places.len() - places.iter().filter(served).count();
    let mut room = most.saturating_sub(i32::try_from(away).unwrap_or(i32::MAX));
    let mut steps = Vec::new();
    let kept = places.iter().filter_map(|place| place.live.first());
    for old in kept.filter(|pod| !is_new(pod, seen)) {
        if serves(old) {
            if room <= 0 {
                continue;
            }
            room -= 1;
        }
        steps.push(Step::Delete(name(old)));
    }
    steps
}

/// Creates new pods beside old ones, on so many nodes at a time, and deletes the old one when the new one serves.
fn surge(
    places: &[Place<'_>],
    most: i32,
    serves: impl Fn(&Pod) -> bool,
    seen: &Seen<'_>,
) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut alone = Vec::new();
    let mut room = most;
    for place in places.iter().filter(|place| place.fit != Fit::Lacks) {
        let (new, old): (Vec<&Pod>, Vec<&Pod>) =
            place.live.iter().copied().partition(|pod| is_new(pod, seen));
        let surplus = new.iter().skip(1).chain(old.iter().skip(1));
        steps.extend(surplus.map(|pod| Step::Delete(name(pod))));
        match (new.first(), old.first()) {
            (Some(new), Some(old)) if serves(new) || !serves(old) => {
                steps.push(Step::Delete(name(old)));
            }
            (Some(_), Some(_)) => room -= 1,
            // A new one ended, and is made again when its time has come.
            (None, Some(_)) if !place.ended.is_empty() => room -= 1,
            (None, Some(old)) if place.fit == Fit::Runs => alone.push((place.node, serves(old))),
            _ => {}
        }
    }
    for (node, is_served) in alone {
        if is_served {
            if room <= 0 {
                continue;
            }
            room -= 1;
        }
        steps.push(Step::Create(node.to_owned()));
    }
    steps
}
