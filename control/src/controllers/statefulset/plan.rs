//! A StatefulSet's next steps and status, from the set and the pods around it.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

use super::identity::{is_labelled, ordinal, replicas, wanted};
use crate::controllers::availability::{self, Availability, LostNodes};
use crate::controllers::backoff::Backoff;
use crate::controllers::claims::Claims;
use crate::controllers::deployment::numbers::resolve;
use crate::controllers::history::POD_REVISION;
use crate::objects;

/// So many pods are made in one go where none waits for another.
const BURST: usize = 500;

/// One change towards what the set asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::controllers) enum Step {
    /// Become the controller of a pod that has none.
    Adopt(String),
    /// Let go of a pod whose labels no longer match.
    Release(String),
    /// Have a pod say who it is.
    Identify(String, i32),
    /// Create the pod with that ordinal, of the newest template or of the one before.
    Create {
        /// The ordinal.
        ordinal: i32,
        /// Whether it is of the newest template.
        newest: bool,
    },
    /// Delete that pod.
    Delete(String),
    /// Delete a pod that ended, so that another one gets its name.
    Renew(String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adopt(pod) => write!(f, "adopt pod {pod}"),
            Self::Release(pod) => write!(f, "release pod {pod}"),
            Self::Identify(pod, ordinal) => write!(f, "label pod {pod} as number {ordinal}"),
            Self::Create { ordinal, newest: true } => write!(f, "create pod {ordinal}"),
            Self::Create { ordinal, newest: false } => {
                write!(f, "create pod {ordinal} of the template before")
            }
            Self::Delete(pod) => write!(f, "delete pod {pod}"),
            Self::Renew(pod) => write!(f, "delete pod {pod}, which ended"),
        }
    }
}

/// What a plan follows from.
pub(in crate::controllers) struct Seen<'a> {
    /// May hold foreign pods of the namespace, in any order.
    pub(in crate::controllers) pods: &'a [Arc<Pod>],
    /// Name of the revision that an update leads away from; the newest one when none is under way.
    pub(in crate::controllers) current: &'a str,
    /// Name of the revision of the present template.
    pub(in crate::controllers) newest: &'a str,
    pub(in crate::controllers) lost: &'a LostNodes,
    pub(in crate::controllers) backoff: &'a Backoff,
    pub(in crate::controllers) now: Timestamp,
}

/// What to do, what to report, and when to look again although nothing changed.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) struct Plan {
    pub(in crate::controllers) steps: Vec<Step>,
    pub(in crate::controllers) status: StatefulSetStatus,
    pub(in crate::controllers) look_again: Option<Timestamp>,
}

/// Plans for `set`.
pub(in crate::controllers) fn plan(set: &StatefulSet, seen: &Seen<'_>) -> Plan {
    let selector = set.spec.as_ref().map(|spec| &spec.selector);
    let members: Vec<Arc<Pod>> =
        seen.pods.iter().filter(|pod| ordinal(set, pod).is_some()).cloned().collect();
    let may_adopt = |pod: &Pod| !objects::is_terminating(&pod.metadata);
    let claims = Claims::sort(&set.metadata, selector, &members, may_adopt);
    let mut planner = Planner::new(set, seen, &claims);
    if !objects::is_terminating(&set.metadata) {
        planner.steps.extend(claims.adoptable.iter().map(|pod| Step::Adopt(name(pod))));
        planner.steps.extend(claims.strays.iter().map(|pod| Step::Release(name(pod))));
        // By its name it is nobody's here.
        let misnamed = seen.pods.iter().filter(|pod| {
            ordinal(set, pod).is_none()
                && objects::is_controlled_by(&pod.metadata, objects::uid(&set.metadata))
                && !objects::is_terminating(&pod.metadata)
        });
        planner.steps.extend(misnamed.map(|pod| Step::Release(name(pod))));
        if planner.fill() && planner.shrink() {
            planner.update();
        }
    }
    let (status, due) = planner.status();
    Plan {
        steps: planner.steps,
        status,
        look_again: planner.look_again.into_iter().chain(due).min(),
    }
}

struct Planner<'a> {
    set: &'a StatefulSet,
    seen: &'a Seen<'a>,
    /// The pods that there should be, by their ordinals.
    present: BTreeMap<i32, &'a Pod>,
    /// The pods that there should not be, the highest ordinal first.
    surplus: Vec<&'a Pod>,
    steps: Vec<Step>,
    look_again: Option<Timestamp>,
}

impl<'a> Planner<'a> {
    fn new(set: &'a StatefulSet, seen: &'a Seen<'a>, claims: &Claims<'a>) -> Self {
        let range = wanted(set);
        let (mut present, mut surplus) = (BTreeMap::new(), Vec::new());
        for pod in claims.owned.iter().chain(&claims.adoptable).copied() {
            match ordinal(set, pod) {
                Some(number) if range.contains(&number) => {
                    present.insert(number, pod);
                }
                _ => surplus.push(pod),
            }
        }
        surplus.sort_by_key(|pod| Reverse(ordinal(set, pod)));
        Self { set, seen, present, surplus, steps: Vec::new(), look_again: None }
    }

    /// Whether one pod follows the other.
    fn is_ordered(&self) -> bool {
        let spec = self.set.spec.as_ref();
        spec.and_then(|s| s.pod_management_policy.as_deref()) != Some("Parallel")
    }

    fn availability(&self, pod: &Pod) -> Availability {
        if !objects::is_active(pod) {
            return Availability::NotReady;
        }
        let wait = self.set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0);
        availability::of(pod, self.seen.lost, wait, self.seen.now)
    }

    fn serves(&self, pod: &Pod) -> bool {
        self.availability(pod) == Availability::Available
    }

    /// Makes what is missing. Whether what comes afterwards may begin.
    fn fill(&mut self) -> bool {
        let mut made = 0;
        for number in wanted(self.set) {
            let serves = match self.present.get(&number).copied() {
                Some(pod) => self.look_after(number, pod),
                None => {
                    let newest = self.is_for_newest(number);
                    self.steps.push(Step::Create { ordinal: number, newest });
                    made += 1;
                    false
                }
            };
            if !serves && self.is_ordered() {
                return false;
            }
            if made == BURST {
                break;
            }
        }
        true
    }

    /// Whether the pod serves.
    fn look_after(&mut self, number: i32, pod: &Pod) -> bool {
        if objects::nothing_runs(pod) && !objects::is_terminating(&pod.metadata) {
            match self.seen.backoff.until(&name(pod), self.seen.now) {
                Some(until) => self.look_again = self.look_again.into_iter().chain([until]).min(),
                None => self.steps.push(Step::Renew(name(pod))),
            }
        }
        if objects::is_active(pod) && !is_labelled(self.set, number, pod) {
            self.steps.push(Step::Identify(name(pod), number));
        }
        self.serves(pod)
    }

    /// Takes away what is too much, in order the highest first. Whether an update may begin.
    fn shrink(&mut self) -> bool {
        let stays = |pod: &&&Pod| !objects::is_terminating(&pod.metadata);
        if !self.is_ordered() {
            let leave = self.surplus.iter().filter(stays);
            self.steps.extend(leave.map(|pod| Step::Delete(name(pod))));
            return true;
        }
        let (over, leaving): (Vec<&Pod>, Vec<&Pod>) =
            self.surplus.iter().copied().partition(|pod| objects::nothing_runs(pod));
        let over = over.iter().filter(stays).map(|pod| Step::Delete(name(pod)));
        self.steps.extend(over);
        let Some(last) = leaving.first() else { return self.surplus.is_empty() };
        let first_broken = leaving.iter().rev().find(|pod| !self.serves(pod));
        let waits = first_broken.is_some_and(|broken| !std::ptr::eq(*broken, *last));
        if stays(&last) && (self.serves(last) || !waits) {
            self.steps.push(Step::Delete(name(last)));
        }
        false
    }

    /// Deletes pods of another template, the highest first, so that no more than it may are away.
    fn update(&mut self) {
        let Some((first, most)) = self.rolling() else { return };
        let serving = self.present.values().filter(|pod| self.serves(pod)).count();
        let all = usize::try_from(replicas(self.set)).unwrap_or(0);
        let mut away = all.saturating_sub(serving);
        let is_old = |pod: &Pod| objects::is_active(pod) && revision(pod) != Some(self.seen.newest);
        // All but these are on their way: missing, ending, or new and not serving yet.
        let settled = self.present.values().filter(|pod| is_old(pod) || self.serves(pod)).count();
        let mut moving = all.saturating_sub(settled);
        let mut deletions = Vec::new();
        for pod in self.present.range(first..).rev().map(|(_, pod)| *pod).filter(|pod| is_old(pod))
        {
            if moving >= most {
                break;
            }
            // One that has just become ready is missed all the same.
            if self.availability(pod).is_ready() {
                if away >= most {
                    continue;
                }
                away += 1;
            }
            moving += 1;
            deletions.push(Step::Delete(name(pod)));
        }
        self.steps.extend(deletions);
    }

    /// The first ordinal that an update is for, and how many pods may be away; `None` when nothing is updated by itself.
    fn rolling(&self) -> Option<(i32, usize)> {
        let strategy = self.set.spec.as_ref().and_then(|spec| spec.update_strategy.as_ref());
        if strategy.and_then(|s| s.type_.as_deref()) == Some("OnDelete") {
            return None;
        }
        let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
        let partition = rolling.and_then(|r| r.partition).unwrap_or(0).max(0);
        let most = rolling.and_then(|r| r.max_unavailable.as_ref());
        let most = most.map_or(1, |most| resolve(most, replicas(self.set), false)).max(1);
        let first = wanted(self.set).start.saturating_add(partition);
        Some((first, usize::try_from(most).unwrap_or(usize::MAX)))
    }

    /// Whether a new pod with that ordinal is of the newest template.
    fn is_for_newest(&self, number: i32) -> bool {
        self.rolling().is_none_or(|(first, _)| number >= first)
    }

    fn status(&self) -> (StatefulSetStatus, Option<Timestamp>) {
        let old = self.set.status.as_ref();
        let (mut all, mut ready, mut available, mut current, mut updated) = (0, 0, 0, 0, 0);
        let mut look_again: Option<Timestamp> = None;
        let pods = self.present.values().chain(&self.surplus).copied();
        for pod in pods.filter(|pod| !objects::have_ended(pod)) {
            all += 1;
            if objects::is_terminating(&pod.metadata) {
                continue;
            }
            current += i32::from(revision(pod) == Some(self.seen.current));
            updated += i32::from(revision(pod) == Some(self.seen.newest));
            let state = self.availability(pod);
            ready += i32::from(state.is_ready());
            available += i32::from(state == Availability::Available);
            if let Availability::ReadyUntil(until) = state {
                look_again = look_again.into_iter().chain([until]).min();
            }
        }
        let wanted = replicas(self.set);
        let is_done = self.rolling().is_some() && [all, updated, available] == [wanted; 3];
        let (name, current) =
            if is_done { (self.seen.newest, updated) } else { (self.seen.current, current) };
        let status = StatefulSetStatus {
            available_replicas: Some(available),
            collision_count: old.and_then(|status| status.collision_count),
            conditions: old.and_then(|status| status.conditions.clone()),
            current_replicas: Some(current),
            current_revision: Some(name.to_owned()),
            observed_generation: self.set.metadata.generation,
            ready_replicas: Some(ready),
            replicas: all,
            update_revision: Some(self.seen.newest.to_owned()),
            updated_replicas: Some(updated),
        };
        (status, look_again)
    }
}

fn name(pod: &Pod) -> String {
    objects::name(&pod.metadata).to_owned()
}

/// The name of the revision that a pod was made of.
fn revision(pod: &Pod) -> Option<&str> {
    pod.metadata.labels.as_ref()?.get(POD_REVISION).map(String::as_str)
}

#[cfg(test)]
mod tests;
