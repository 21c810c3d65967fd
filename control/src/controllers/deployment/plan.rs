//! A Deployment's next steps and status, from the Deployment and its ReplicaSets.

use std::cmp::Reverse;
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use k8s_openapi::jiff::Timestamp;

use super::numbers::{Bounds, Counts, Share, roll, share};
use super::revision::{self, DESIRED, MOST, has_template, new_set, number, set_annotations};
use super::status::{self, View, is_settled};
use crate::controllers::replicaset::plan::wanted;
use crate::objects::{self, Labels};

/// One change of a Deployment's sets.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) enum Step {
    /// Become the controller of a set that has none.
    Adopt(String),
    /// Create the set of the present template.
    Create(Box<ReplicaSet>),
    /// Replace a set's annotations, and its `minReadySeconds` by the Deployment's.
    Annotate(String, Labels),
    /// Tell a set to have that many replicas (name, from, to), noting the Deployment's bounds.
    Scale(String, i32, i32),
    /// Only note the Deployment's bounds on a set.
    Note(String),
    /// Delete a set that has no pods and is beyond the history limit.
    Delete(String),
    /// Write the revision on the Deployment.
    Revision(i64),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adopt(set) => write!(f, "adopt replica set {set}"),
            Self::Create(set) => write!(f, "create replica set {}", objects::name(&set.metadata)),
            Self::Annotate(set, _) => write!(f, "annotate replica set {set}"),
            Self::Scale(set, from, to) => write!(f, "scale replica set {set} from {from} to {to}"),
            Self::Note(set) => write!(f, "note the bounds on replica set {set}"),
            Self::Delete(set) => write!(f, "delete replica set {set}"),
            Self::Revision(revision) => write!(f, "set revision {revision}"),
        }
    }
}

/// What to do, what to report, and when to look again although nothing changed.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) struct Plan {
    pub(in crate::controllers) steps: Vec<Step>,
    pub(in crate::controllers) status: DeploymentStatus,
    pub(in crate::controllers) look_again: Option<Timestamp>,
}

/// Plans for `deployment`. `sets` may hold foreign sets of the namespace, in any order; `old_pods` counts
/// the pods of old sets that still run or are going away, which a Recreate waits for.
pub(in crate::controllers) fn plan(
    deployment: &Deployment,
    sets: &[Arc<ReplicaSet>],
    old_pods: impl Fn(&ReplicaSet) -> usize,
    now: Timestamp,
) -> Plan {
    let mut planner = Planner::new(deployment, sets);
    if !objects::is_terminating(&deployment.metadata) {
        planner.steps.extend(planner.orphans.iter().map(|s| Step::Adopt(name(s))));
        if planner.is_paused() || planner.was_resized() {
            planner.resize();
        } else if planner.recreates() {
            planner.recreate(&old_pods);
        } else {
            planner.roll();
        }
    }
    planner.finish(now)
}

struct Planner<'a> {
    deployment: &'a Deployment,
    bounds: Bounds,
    new: Option<&'a ReplicaSet>,
    /// Oldest first.
    old: Vec<&'a ReplicaSet>,
    orphans: Vec<&'a ReplicaSet>,
    steps: Vec<Step>,
}

impl<'a> Planner<'a> {
    fn new(deployment: &'a Deployment, sets: &'a [Arc<ReplicaSet>]) -> Self {
        let uid = objects::uid(&deployment.metadata);
        let selector = deployment.spec.as_ref().map(|s| &s.selector);
        let selected = |set: &ReplicaSet| {
            selector.is_some_and(|s| objects::selects(s, set.metadata.labels.as_ref()))
        };
        let (mut owned, mut orphans) = (Vec::<&ReplicaSet>::new(), Vec::new());
        for set in sets {
            match objects::controller_of(&set.metadata) {
                Some(owner) if owner.uid == uid => owned.push(set),
                None if selected(set) && !objects::is_terminating(&set.metadata) => {
                    orphans.push(&**set);
                }
                _ => {}
            }
        }
        let key = |set: &&ReplicaSet| (objects::created(&set.metadata), name(set));
        owned.extend(&orphans);
        owned.sort_by_key(key);
        orphans.sort_by_key(key);
        let new = owned
            .iter()
            .find(|s| has_template(s, deployment) && !objects::is_terminating(&s.metadata))
            .or_else(|| owned.iter().find(|s| is_of_hash(s, deployment)))
            .copied();
        let is_new = |set: &ReplicaSet| new.is_some_and(|n| std::ptr::eq(n, set));
        let old = owned.iter().copied().filter(|set| !is_new(set)).collect();
        let bounds = Bounds::of(deployment);
        Self { deployment, bounds, new, old, orphans, steps: Vec::new() }
    }

    fn is_paused(&self) -> bool {
        self.deployment.spec.as_ref().and_then(|s| s.paused) == Some(true)
    }

    fn recreates(&self) -> bool {
        let strategy = self.deployment.spec.as_ref().and_then(|s| s.strategy.as_ref());
        strategy.and_then(|s| s.type_.as_deref()) == Some("Recreate")
    }

    fn active(&self) -> Vec<&'a ReplicaSet> {
        self.old.iter().copied().chain(self.new).filter(|set| wanted(set) > 0).collect()
    }

    /// Whether `replicas` of the Deployment changed since its sets were scaled.
    fn was_resized(&self) -> bool {
        self.active().iter().any(|set| {
            let noted = set.metadata.annotations.as_ref().is_some_and(|a| a.contains_key(DESIRED));
            noted && number(&set.metadata, DESIRED) != i64::from(self.bounds.desired)
        })
    }

    /// Follows a change of `replicas` without moving the rollout.
    fn resize(&mut self) {
        self.renumber();
        let active = self.active();
        let single = match active.as_slice() {
            [] => self.new.or_else(|| self.old.last().copied()),
            [only] => Some(*only),
            _ => None,
        };
        let desired = self.bounds.desired;
        if let Some(set) = single {
            self.scale(set, desired);
            return;
        }
        if let Some(new) = self.new.filter(|new| self.is_saturated(new)) {
            for old in self.old.clone() {
                self.scale(old, 0);
            }
            self.scale(new, desired);
            return;
        }
        if self.recreates() {
            return;
        }
        let mut active = active;
        let total: i32 = active.iter().map(|set| wanted(set)).sum();
        // Growth favours the newest set, shrinking takes from the oldest first.
        let newest_first = total < self.bounds.most;
        active.sort_by_key(|set| {
            let age = objects::created(&set.metadata);
            (Reverse(wanted(set)), newest_first.then_some(Reverse(age)), Some(age))
        });
        let shares: Vec<_> = active
            .iter()
            .map(|set| Share {
                wanted: wanted(set),
                most_then: i32::try_from(number(&set.metadata, MOST)).unwrap_or(0),
            })
            .collect();
        for (set, to) in active.into_iter().zip(share(self.bounds, &shares)) {
            self.scale(set, to);
        }
    }

    fn is_saturated(&self, set: &ReplicaSet) -> bool {
        let desired = self.bounds.desired;
        wanted(set) == desired
            && number(&set.metadata, DESIRED) == i64::from(desired)
            && status::available(set) == desired
    }

    /// Makes the new set and its numbers right, if it exists or `create` says so.
    fn renumber(&mut self) -> i64 {
        let oldest = self.old.iter().map(|set| revision::revision(&set.metadata)).max();
        let revision = oldest.unwrap_or(0) + 1;
        if let Some(new) = self.new {
            let wanted = set_annotations(self.deployment, Some(new), revision);
            let min_ready = |s: Option<i32>| s.unwrap_or(0);
            let wait = min_ready(self.deployment.spec.as_ref().and_then(|s| s.min_ready_seconds));
            let differs = min_ready(new.spec.as_ref().and_then(|s| s.min_ready_seconds)) != wait;
            if new.metadata.annotations.clone().unwrap_or_default() != wanted || differs {
                self.steps.push(Step::Annotate(name(new), wanted));
            }
            let revision = revision.max(revision::revision(&new.metadata));
            if revision::revision(&self.deployment.metadata) != revision {
                self.steps.push(Step::Revision(revision));
            }
        }
        revision
    }

    fn roll(&mut self) {
        let revision = self.renumber();
        let old: Vec<_> = self.old.iter().map(|set| counts(set)).collect();
        let (to, old_to) = roll(self.bounds, self.new.map(counts).unwrap_or_default(), &old);
        match self.new {
            Some(new) => self.scale(new, to),
            None => self.create(revision, to),
        }
        if self.new.is_some() {
            for (set, to) in self.old.clone().into_iter().zip(old_to) {
                self.scale(set, to);
            }
        }
    }

    fn recreate(&mut self, old_pods: &impl Fn(&ReplicaSet) -> usize) {
        let revision = self.renumber();
        for old in self.old.clone() {
            self.scale(old, 0);
        }
        let running: usize = self.old.iter().map(|set| old_pods(set)).sum();
        if running > 0 || self.old.iter().any(|set| status::pods(set) > 0) {
            return;
        }
        let desired = self.bounds.desired;
        match self.new {
            Some(new) => self.scale(new, desired),
            None => self.create(revision, desired),
        }
    }

    fn create(&mut self, revision: i64, replicas: i32) {
        let mut set = new_set(self.deployment, revision);
        if let Some(spec) = &mut set.spec {
            spec.replicas = Some(replicas);
        }
        note(&mut set, self.bounds);
        self.steps.push(Step::Create(Box::new(set)));
        if revision::revision(&self.deployment.metadata) != revision {
            self.steps.push(Step::Revision(revision));
        }
    }

    fn scale(&mut self, set: &ReplicaSet, to: i32) {
        let from = wanted(set);
        let meta = &set.metadata;
        if from != to {
            self.steps.push(Step::Scale(name(set), from, to));
        } else if to > 0
            && (number(meta, DESIRED) != i64::from(self.bounds.desired)
                || number(meta, MOST) != i64::from(self.bounds.most))
        {
            self.steps.push(Step::Note(name(set)));
        }
    }

    fn finish(mut self, now: Timestamp) -> Plan {
        let created = self.steps.iter().find_map(|step| match step {
            Step::Create(set) => Some(name(set)),
            _ => None,
        });
        let view = View {
            deployment: self.deployment,
            new: self.new,
            all: self.old.iter().copied().chain(self.new).collect(),
            creates: created.as_deref(),
            now,
        };
        let (status, look_again) = view.status();
        if self.new.is_some() && is_settled(self.deployment, &status) {
            self.forget_old_sets();
        }
        Plan { steps: self.steps, status, look_again }
    }

    fn forget_old_sets(&mut self) {
        let spec = self.deployment.spec.as_ref();
        let limit = spec.and_then(|s| s.revision_history_limit).unwrap_or(10);
        let mut idle: Vec<&ReplicaSet> =
            self.old.iter().copied().filter(|set| is_idle(set)).collect();
        idle.sort_by_key(|set| {
            (revision::revision(&set.metadata), objects::created(&set.metadata))
        });
        let surplus = idle.len().saturating_sub(usize::try_from(limit).unwrap_or(usize::MAX));
        self.steps.extend(idle.into_iter().take(surplus).map(|set| Step::Delete(name(set))));
    }
}

/// Notes the Deployment's bounds on a set that is being scaled.
pub(in crate::controllers) fn note(set: &mut ReplicaSet, bounds: Bounds) {
    let annotations = set.metadata.annotations.get_or_insert_default();
    annotations.insert(DESIRED.to_owned(), bounds.desired.to_string());
    annotations.insert(MOST.to_owned(), bounds.most.to_string());
}

/// Whether the set's name is the one that the present template leads to: the API may have filled in
/// defaults in one of the two templates and not in the other.
fn is_of_hash(set: &ReplicaSet, deployment: &Deployment) -> bool {
    let collisions = deployment.status.as_ref().and_then(|s| s.collision_count).unwrap_or(0);
    let hash = deployment.spec.as_ref().map(|s| revision::template_hash(&s.template, collisions));
    let labels = set.metadata.labels.as_ref();
    !objects::is_terminating(&set.metadata)
        && hash
            .is_some_and(|hash| labels.and_then(|l| l.get(revision::TEMPLATE_HASH)) == Some(&hash))
}

fn counts(set: &ReplicaSet) -> Counts {
    Counts { wanted: wanted(set), pods: status::pods(set), available: status::available(set) }
}

/// Whether nobody would notice if the set went away.
fn is_idle(set: &ReplicaSet) -> bool {
    let observed = set.status.as_ref().and_then(|s| s.observed_generation).unwrap_or(0);
    wanted(set) == 0
        && status::pods(set) == 0
        && observed >= set.metadata.generation.unwrap_or(0)
        && !objects::is_terminating(&set.metadata)
}

fn name(set: &ReplicaSet) -> String {
    objects::name(&set.metadata).to_owned()
}

#[cfg(test)]
mod tests;
