//! Pods.

use k8s_openapi::api::core::v1::{Binding, Pod, PodCondition, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::rules::forbidden;
use super::{Causes, Object};
use crate::error::ApiError;
use crate::objects::nothing_runs;

pub(super) mod defaults;
pub(super) mod spec;

mod containers;
mod security;
mod unserved;
mod volumes;

const DEFAULT_GRACE_SECS: i64 = 30;
const SCHEDULED: &str = "PodScheduled";
const FROZEN: &str = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.schedulingGates` (only removals)";

impl Object for Pod {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        // They are added while it lives, by a subresource of their own.
        if let Some(spec) = &mut self.spec {
            spec.ephemeral_containers = None;
        }
        let gated = PodCondition {
            reason: Some("SchedulingGated".to_owned()),
            message: Some("Scheduling is blocked due to non-empty scheduling gates".to_owned()),
            ..scheduled(false)
        };
        self.status = Some(PodStatus {
            phase: Some("Pending".to_owned()),
            conditions: is_gated(self).then(|| vec![gated]),
            ..PodStatus::default()
        });
    }

    fn set_defaults(&mut self) {
        if let Some(spec) = &mut self.spec {
            defaults::pod_spec(spec);
        }
    }

    fn validate(&self, causes: &mut Causes) {
        match &self.spec {
            Some(spec) => spec::pod_spec("spec", spec, causes),
            None => causes.add("spec", "Required value"),
        }
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let (Some(new), Some(old)) = (&self.spec, &old.spec) else { return };
        if new.containers.len() != old.containers.len() {
            forbidden("spec.containers", "pod updates may not add or remove containers", causes);
            return;
        }
        if with_mutable_fields(old, new) != *new {
            forbidden("spec", FROZEN, causes);
        }
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }

    fn grace_period_secs(&self, requested: Option<i64>) -> Option<i64> {
        let spec = self.spec.as_ref();
        let bound = spec.and_then(|s| s.node_name.as_deref()).is_some_and(|n| !n.is_empty());
        if !bound || nothing_runs(self) {
            return Some(0);
        }
        let own = spec.and_then(|s| s.termination_grace_period_seconds);
        Some(requested.or(own).unwrap_or(DEFAULT_GRACE_SECS))
    }
}

/// `old` with those fields of `new` that may change while the pod lives.
fn with_mutable_fields(old: &PodSpec, new: &PodSpec) -> PodSpec {
    let mut allowed = old.clone();
    for (old, new) in allowed.containers.iter_mut().zip(&new.containers) {
        old.image.clone_from(&new.image);
    }
    let old_init = allowed.init_containers.iter_mut().flatten();
    for (old, new) in old_init.zip(new.init_containers.iter().flatten()) {
        old.image.clone_from(&new.image);
    }
    let (before, after) = (old.active_deadline_seconds, new.active_deadline_seconds);
    if after.is_some_and(|after| before.is_none_or(|before| after <= before)) {
        allowed.active_deadline_seconds = after;
    }
    let gates = old.scheduling_gates.as_deref().unwrap_or_default();
    if new.scheduling_gates.iter().flatten().all(|gate| gates.contains(gate)) {
        allowed.scheduling_gates.clone_from(&new.scheduling_gates);
    }
    let kept = old.tolerations.as_deref().unwrap_or_default();
    if kept.iter().all(|t| new.tolerations.iter().flatten().any(|n| n == t)) {
        allowed.tolerations.clone_from(&new.tolerations);
    }
    allowed
}

/// Whether somebody holds the pod back from being scheduled.
fn is_gated(pod: &Pod) -> bool {
    let gates = pod.spec.as_ref().and_then(|spec| spec.scheduling_gates.as_ref());
    gates.is_some_and(|gates| !gates.is_empty())
}

/// The condition that tells whether the pod has a node, from now on.
fn scheduled(is: bool) -> PodCondition {
    let now = Timestamp::from_second(Timestamp::now().as_second()).ok();
    PodCondition {
        type_: SCHEDULED.to_owned(),
        status: if is { "True" } else { "False" }.to_owned(),
        last_transition_time: now.map(Time),
        ..PodCondition::default()
    }
}

/// The pod with the node of a binding.
pub(crate) fn bound(pod: &Pod, binding: &Binding) -> Result<Pod, ApiError> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let conflict =
        |detail: String| ApiError::Conflict { kind: Pod::kind(), name: name.clone(), detail };
    let node = binding.target.name.as_deref().filter(|n| !n.is_empty());
    let Some(node) = node.filter(|_| binding.target.kind.as_deref().unwrap_or("Node") == "Node")
    else {
        return Err(ApiError::BadRequest(
            "a binding needs the name of a node in target".to_owned(),
        ));
    };
    let mut new = pod.clone();
    if let Some(uid) = binding.metadata.uid.as_ref().filter(|u| !u.is_empty()) {
        new.metadata.uid = Some(uid.clone());
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Err(conflict(format!("pod {name} is being deleted, cannot be assigned to a host")));
    }
    if is_gated(pod) {
        return Err(conflict(format!("pod {name} has non-empty .spec.schedulingGates")));
    }
    let spec = new.spec.get_or_insert_default();
    match spec.node_name.as_deref() {
        Some(other) if !other.is_empty() && other != node => {
            return Err(conflict(format!("pod {name} is already assigned to node \"{other}\"")));
        }
        _ => spec.node_name = Some(node.to_owned()),
    }
    let conditions = new.status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|c| c.type_ != SCHEDULED);
    conditions.push(scheduled(true));
    Ok(new)
}

#[cfg(test)]
mod tests;
