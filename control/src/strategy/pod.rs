//! Pods.

use k8s_openapi::api::core::v1::{Binding, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::Object;
use crate::error::ApiError;

const DEFAULT_GRACE_SECS: i64 = 30;

impl Object for Pod {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = Some(PodStatus { phase: Some("Pending".to_owned()), ..PodStatus::default() });
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
        let phase = self.status.as_ref().and_then(|s| s.phase.as_deref());
        if !bound || matches!(phase, Some("Succeeded" | "Failed")) {
            return Some(0);
        }
        let own = spec.and_then(|s| s.termination_grace_period_seconds);
        Some(requested.or(own).unwrap_or(DEFAULT_GRACE_SECS))
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
    let spec = new.spec.get_or_insert_default();
    match spec.node_name.as_deref() {
        Some(other) if !other.is_empty() && other != node => {
            return Err(conflict(format!("pod {name} is already assigned to node \"{other}\"")));
        }
        _ => spec.node_name = Some(node.to_owned()),
    }
    let conditions = new.status.get_or_insert_default().conditions.get_or_insert_default();
    conditions.retain(|c| c.type_ != "PodScheduled");
    let now = Timestamp::from_second(Timestamp::now().as_second()).ok();
    conditions.push(PodCondition {
        type_: "PodScheduled".to_owned(),
        status: "True".to_owned(),
        last_transition_time: now.map(Time),
        ..PodCondition::default()
    });
    Ok(new)
}
