//! What each kind does when it is written: defaults, rules, which fields belong to its status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{Metadata, Resource};
use mesh_model::kinds::{self, Kind};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Cause;

mod batch;
mod cluster;
mod data;
pub mod names;
mod network;
pub mod pod;
mod policy;
mod rules;
mod workload;

/// Collects what is wrong with an object, with the path of each field.
#[derive(Debug, Default)]
pub struct Causes(Vec<Cause>);

impl Causes {
    /// Adds a cause; `message` starts with the Kubernetes error type.
    pub fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Cause { field: field.into(), message: message.into() });
    }

    /// Leaves out what is wrong with `stored`, too. Rules get stricter and time zones go, and what an object has it may keep: else its
    /// status could not be written any more, nor its finalizers be taken off.
    pub(crate) fn without_those_of<K: Object>(&mut self, stored: &K) {
        if self.0.is_empty() {
            return;
        }
        let mut before = Self::default();
        stored.validate(&mut before);
        self.0.retain(|cause| !before.0.contains(cause));
    }

    /// All causes, in the order in which they were found.
    pub fn into_vec(self) -> Vec<Cause> {
        self.0
    }
}

/// A kind that the API serves.
pub trait Object:
    Resource
    + Metadata<Ty = ObjectMeta>
    + Serialize
    + DeserializeOwned
    + Clone
    + PartialEq
    + std::fmt::Debug
    + Send
    + Sync
    + 'static
{
    /// Whether `metadata.generation` counts the changes of the spec.
    const GENERATION: bool = false;
    /// Whether an update of the status may change labels and annotations too.
    const STATUS_CARRIES_LABELS: bool = false;

    /// Writes into a new object what follows from its name, which is only now known if the service chooses it.
    fn settle_name(&mut self) {}

    /// Fills in what the user left out. Idempotent.
    fn set_defaults(&mut self) {}

    /// What a new object starts with instead of what the user sent: mostly the status.
    fn prepare_create(&mut self) {}

    /// Takes over the status of `from`.
    fn copy_status(&mut self, from: &Self) {
        let _ = from;
    }

    /// Whether the parts that the user owns differ, so that the generation goes up.
    fn spec_differs(&self, old: &Self) -> bool {
        let _ = old;
        false
    }

    /// Finds what is wrong with the object itself. `metadata` is checked elsewhere.
    fn validate(&self, causes: &mut Causes) {
        let _ = causes;
    }

    /// Finds what may not change.
    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let _ = (old, causes);
    }

    /// Why a node may not make it so, where it may write the object: what the service decides about the node.
    fn refused_to_nodes(&self, old: Option<&Self>) -> Option<String> {
        let _ = old;
        None
    }

    /// Drops what an update only carries along: what `old` had, and the new form has no use for.
    fn drop_superfluous(&mut self, old: &Self) {
        let _ = old;
    }

    /// Keeps what only a subresource may change.
    fn keep_reserved(&mut self, old: &Self) {
        let _ = old;
    }

    /// Why nobody may delete the object.
    fn undeletable(&self) -> Option<String> {
        None
    }

    /// How long the object may take to go, for kinds that take time.
    fn grace_period_secs(&self, requested: Option<i64>) -> Option<i64> {
        let _ = requested;
        None
    }

    /// Says in the status that the object is being deleted.
    fn mark_terminating(&mut self) {}

    /// Whether the deletion that was asked for has nothing to wait for.
    fn is_finished(&self) -> bool {
        let meta = self.metadata();
        meta.deletion_timestamp.is_some()
            && meta.finalizers.as_ref().is_none_or(|f| f.is_empty())
            && meta.deletion_grace_period_seconds.unwrap_or(0) == 0
    }

    /// The entry in the table of kinds.
    fn kind() -> &'static Kind {
        kinds::by_kind(Self::GROUP, Self::VERSION, Self::KIND)
            .expect("every type with an Object impl has a row in the table of kinds")
    }
}

/// Runs an expression with a type alias for the Rust type of a kind.
macro_rules! with_kind {
    ($kind:expr, $alias:ident => $body:expr) => {{
        use k8s_openapi::api::{apps, batch, coordination, core, discovery, networking, policy};
        match $kind.kind {
            "Namespace" => with_kind!(@ $alias, core::v1::Namespace, $body),
            "Node" => with_kind!(@ $alias, core::v1::Node, $body),
            "Pod" => with_kind!(@ $alias, core::v1::Pod, $body),
            "Service" => with_kind!(@ $alias, core::v1::Service, $body),
            "Endpoints" => with_kind!(@ $alias, core::v1::Endpoints, $body),
            "ConfigMap" => with_kind!(@ $alias, core::v1::ConfigMap, $body),
            "Secret" => with_kind!(@ $alias, core::v1::Secret, $body),
            "Event" => with_kind!(@ $alias, core::v1::Event, $body),
            "ServiceAccount" => with_kind!(@ $alias, core::v1::ServiceAccount, $body),
            "ControllerRevision" => with_kind!(@ $alias, apps::v1::ControllerRevision, $body),
            "DaemonSet" => with_kind!(@ $alias, apps::v1::DaemonSet, $body),
            "Deployment" => with_kind!(@ $alias, apps::v1::Deployment, $body),
            "ReplicaSet" => with_kind!(@ $alias, apps::v1::ReplicaSet, $body),
            "StatefulSet" => with_kind!(@ $alias, apps::v1::StatefulSet, $body),
            "CronJob" => with_kind!(@ $alias, batch::v1::CronJob, $body),
            "Job" => with_kind!(@ $alias, batch::v1::Job, $body),
            "Lease" => with_kind!(@ $alias, coordination::v1::Lease, $body),
            "EndpointSlice" => with_kind!(@ $alias, discovery::v1::EndpointSlice, $body),
            "Ingress" => with_kind!(@ $alias, networking::v1::Ingress, $body),
            "IngressClass" => with_kind!(@ $alias, networking::v1::IngressClass, $body),
            "NetworkPolicy" => with_kind!(@ $alias, networking::v1::NetworkPolicy, $body),
            "PodDisruptionBudget" => with_kind!(@ $alias, policy::v1::PodDisruptionBudget, $body),
            other => unreachable!("kind {other} is in the table of kinds but has no type"),
        }
    }};
    (@ $alias:ident, $type:ty, $body:expr) => {{
        type $alias = $type;
        $body
    }};
}
pub(crate) use with_kind;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_type() {
        for kind in kinds::KINDS {
            assert_eq!(with_kind!(kind, K => K::kind()), kind);
        }
    }
}
