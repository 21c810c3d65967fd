//! A Deployment's status: counts, and the conditions that `kubectl rollout status` and people read.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::numbers::{Bounds, desired};
use crate::controllers::replicaset::plan::wanted;
use crate::objects;

const PROGRESSING: &str = "Progressing";
const COMPLETE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";
const PAUSED: &str = "DeploymentPaused";
/// "No deadline", as the API writes it.
const NO_DEADLINE: i32 = i32::MAX;

/// What the status is computed from.
pub(super) struct View<'a> {
    pub(super) deployment: &'a Deployment,
    /// The set of the present template, if there is one.
    pub(super) new: Option<&'a ReplicaSet>,
    /// All sets, the new one among them.
    pub(super) all: Vec<&'a ReplicaSet>,
    /// Name of the set that this plan creates.
    pub(super) creates: Option<&'a str>,
    pub(super) now: Timestamp,
}

impl View<'_> {
    /// The status, and when the progress deadline will have passed.
    pub(super) fn status(&self) -> (DeploymentStatus, Option<Timestamp>) {
        let old = self.deployment.status.clone().unwrap_or_default();
        let mut status = self.counts(&old);
        let mut conditions = Conditions { list: old.conditions.clone(), now: self.now };
        self.available(&mut conditions, &status);
        let look_again = self.progressing(&mut conditions, &old, &status);
        self.failures(&mut conditions);
        status.conditions = conditions.list;
        (status, look_again)
    }

    fn counts(&self, old: &DeploymentStatus) -> DeploymentStatus {
        let sum = |field: fn(&ReplicaSet) -> i32| self.all.iter().map(|set| field(set)).sum();
        let available: i32 = sum(available);
        let total: i32 = sum(wanted);
        DeploymentStatus {
            observed_generation: self.deployment.metadata.generation,
            replicas: Some(sum(pods)),
            updated_replicas: Some(self.new.map_or(0, pods)),
            ready_replicas: Some(sum(ready)),
            available_replicas: Some(available),
            unavailable_replicas: Some((total - available).max(0)),
            terminating_replicas: Some(sum(terminating)),
            collision_count: old.collision_count,
            conditions: None,
        }
    }

    fn available(&self, conditions: &mut Conditions, status: &DeploymentStatus) {
        let enough = status.available_replicas.unwrap_or(0) >= Bounds::of(self.deployment).least;
        let (status, reason, message) = if enough {
            ("True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
        } else {
            (
                "False",
                "MinimumReplicasUnavailable",
                "Deployment does not have minimum availability.",
            )
        };
        conditions.set("Available", status, reason, message);
    }

    fn progressing(
        &self,
        conditions: &mut Conditions,
        old: &DeploymentStatus,
        status: &DeploymentStatus,
    ) -> Option<Timestamp> {
        let spec = self.deployment.spec.as_ref();
        let deadline = spec.and_then(|s| s.progress_deadline_seconds).unwrap_or(600);
        if deadline == NO_DEADLINE {
            conditions.remove(PROGRESSING);
            return None;
        }
        if spec.and_then(|s| s.paused) == Some(true) {
            if conditions.reason(PROGRESSING) != Some(TIMED_OUT) {
                conditions.set(PROGRESSING, "Unknown", PAUSED, "Deployment is paused");
            }
            return None;
        }
        if conditions.reason(PROGRESSING) == Some(PAUSED) {
            let message = "Deployment is resumed";
            conditions.set(PROGRESSING, "Unknown", "DeploymentResumed", message);
        }
        if let Some(name) = self.creates {
            let message = format!("Created new replica set {name:?}");
            conditions.touch(PROGRESSING, "True", "NewReplicaSetCreated", &message);
        } else if let (Some(set), None) = (self.new, conditions.reason(PROGRESSING)) {
            let message = format!("Found new replica set {:?}", objects::name(&set.metadata));
            conditions.set(PROGRESSING, "True", "FoundNewReplicaSet", &message);
        }
        let settled = status.replicas == status.updated_replicas
            && conditions.reason(PROGRESSING) == Some(COMPLETE);
        if settled || self.creates.is_some() {
            return self.deadline(conditions, deadline);
        }
        let subject = match self.new {
            Some(set) => format!("ReplicaSet {:?}", objects::name(&set.metadata)),
            None => format!("Deployment {:?}", objects::name(&self.deployment.metadata)),
        };
        if self.is_complete(status) {
            let message = format!("{subject} has successfully progressed.");
            conditions.set(PROGRESSING, "True", COMPLETE, &message);
        } else if has_progressed(old, status) {
            let message = format!("{subject} is progressing.");
            conditions.touch(PROGRESSING, "True", "ReplicaSetUpdated", &message);
        } else if self.deadline(conditions, deadline).is_some_and(|at| at <= self.now) {
            let message = format!("{subject} has timed out progressing.");
            conditions.set(PROGRESSING, "False", TIMED_OUT, &message);
        }
        self.deadline(conditions, deadline)
    }

    /// When the deadline passes without further progress; `None` when nothing is awaited.
    fn deadline(&self, conditions: &Conditions, seconds: i32) -> Option<Timestamp> {
        let condition = conditions.find(PROGRESSING)?;
        if matches!(condition.reason.as_deref(), Some(COMPLETE | TIMED_OUT)) {
            return None;
        }
        let from = condition.last_update_time.as_ref().map_or(self.now, |t| t.0);
        from.checked_add(Duration::from_secs(u64::try_from(seconds).unwrap_or(0))).ok()
    }

    fn is_complete(&self, status: &DeploymentStatus) -> bool {
        let desired = Some(desired(self.deployment));
        self.new.is_some()
            && status.updated_replicas == desired
            && status.replicas == desired
            && status.available_replicas == desired
    }

    fn failures(&self, conditions: &mut Conditions) {
        let failure = self.all.iter().filter_map(|set| set.status.as_ref()).find_map(|status| {
            status.conditions.iter().flatten().find(|c| c.type_ == "ReplicaFailure")
        });
        match failure {
            Some(failure) => conditions.set(
                "ReplicaFailure",
                &failure.status,
                failure.reason.as_deref().unwrap_or_default(),
                failure.message.as_deref().unwrap_or_default(),
            ),
            None => conditions.remove("ReplicaFailure"),
        }
    }
}

/// Whether the rollout of this status is finished and seen: what the clean-up of old sets waits for.
pub(super) fn is_settled(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let desired = Some(desired(deployment));
    status.updated_replicas == desired
        && status.replicas == desired
        && status.available_replicas == desired
}

fn has_progressed(old: &DeploymentStatus, new: &DeploymentStatus) -> bool {
    let n = |value: Option<i32>| value.unwrap_or(0);
    let rest = |s: &DeploymentStatus| n(s.replicas) - n(s.updated_replicas);
    n(new.updated_replicas) > n(old.updated_replicas)
        || rest(new) < rest(old)
        || n(new.ready_replicas) > n(old.ready_replicas)
        || n(new.available_replicas) > n(old.available_replicas)
}

pub(super) fn pods(set: &ReplicaSet) -> i32 {
    set.status.as_ref().map_or(0, |s| s.replicas)
}

pub(super) fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0)
}

fn ready(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|s| s.ready_replicas).unwrap_or(0)
}

fn terminating(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|s| s.terminating_replicas).unwrap_or(0)
}

struct Conditions {
    list: Option<Vec<DeploymentCondition>>,
    now: Timestamp,
}

impl Conditions {
    fn find(&self, type_: &str) -> Option<&DeploymentCondition> {
        self.list.iter().flatten().find(|c| c.type_ == type_)
    }

    fn reason(&self, type_: &str) -> Option<&str> {
        self.find(type_)?.reason.as_deref()
    }

    fn remove(&mut self, type_: &str) {
        if let Some(list) = &mut self.list {
            list.retain(|c| c.type_ != type_);
        }
    }

    /// Sets the condition; nothing changes, not even times, when status and reason are the same.
    fn set(&mut self, type_: &str, status: &str, reason: &str, message: &str) {
        let same =
            |c: &DeploymentCondition| c.status == status && c.reason.as_deref() == Some(reason);
        if !self.find(type_).is_some_and(same) {
            self.touch(type_, status, reason, message);
        }
    }

    /// Sets the condition and its time of update, even if it was the same before.
    fn touch(&mut self, type_: &str, status: &str, reason: &str, message: &str) {
        let since = self.find(type_).filter(|c| c.status == status);
        let since = since.and_then(|c| c.last_transition_time.clone());
        let condition = DeploymentCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_update_time: Some(Time(self.now)),
            last_transition_time: Some(since.unwrap_or(Time(self.now))),
        };
        let list = self.list.get_or_insert_default();
        match list.iter_mut().find(|c| c.type_ == type_) {
            Some(place) => *place = condition,
            None => list.push(condition),
        }
    }
}
