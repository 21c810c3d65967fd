//! Writing objects whose kind is only known at run time.

use std::collections::BTreeSet;
use std::marker::PhantomData;

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::{
    ControllerRevision, DaemonSet, Deployment, ReplicaSet, StatefulSet,
};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Endpoints, Event, Namespace, Node, Pod, Secret, Service, ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{Ingress, IngressClass, NetworkPolicy};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use mesh_model::kinds::Kind;

use crate::error::ApiError;
use crate::objects;
use crate::registry::{Object, Part, Registry, WriteOptions};

/// What can be done to objects of any kind. Objects that are gone, or were replaced, are left alone.
#[async_trait]
pub(super) trait AnyKind: Send + Sync {
    /// The kind.
    fn kind(&self) -> &'static Kind;

    /// Deletes an object; `propagation` as in `DeleteOptions`.
    async fn delete(
        &self,
        registry: &Registry,
        target: &Target,
        propagation: Option<&str>,
    ) -> Result<(), ApiError>;

    /// Takes owners off an object.
    async fn disown(
        &self,
        registry: &Registry,
        target: &Target,
        owners: &BTreeSet<String>,
    ) -> Result<(), ApiError>;

    /// Takes a finalizer off an object.
    async fn unhold(
        &self,
        registry: &Registry,
        target: &Target,
        finalizer: &str,
    ) -> Result<(), ApiError>;
}

/// One object of a known kind.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// Empty for cluster-wide kinds.
    pub(super) namespace: String,
    pub(super) name: String,
    /// Empty for whichever object has the name.
    pub(super) uid: String,
}

impl Target {
    fn ns(&self) -> Option<&str> {
        Some(self.namespace.as_str()).filter(|ns| !ns.is_empty())
    }

    fn uid(&self) -> Option<String> {
        Some(self.uid.clone()).filter(|uid| !uid.is_empty())
    }
}

struct Typed<K>(PhantomData<K>);

impl<K: Object> Typed<K> {
    async fn edit(
        registry: &Registry,
        target: &Target,
        change: impl Fn(&mut K) + Send + Sync,
    ) -> Result<(), ApiError> {
        let wanted = target.uid();
        let edited = |old: &K| {
            let mut new = old.clone();
            if wanted.is_none() || wanted.as_deref() == Some(objects::uid(old.metadata())) {
                change(&mut new);
            }
            Ok(new)
        };
        let options = WriteOptions::default();
        match registry.modify(target.ns(), &target.name, Part::Main, &options, edited).await {
            Ok(_) | Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl<K: Object> AnyKind for Typed<K> {
    fn kind(&self) -> &'static Kind {
        K::kind()
    }

    async fn delete(
        &self,
        registry: &Registry,
        target: &Target,
        propagation: Option<&str>,
    ) -> Result<(), ApiError> {
        let options = DeleteOptions {
            propagation_policy: propagation.map(str::to_owned),
            preconditions: target
                .uid()
                .map(|uid| Preconditions { uid: Some(uid), resource_version: None }),
            ..DeleteOptions::default()
        };
        match registry.delete::<K>(target.ns(), &target.name, &options).await {
            Ok(_) | Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn disown(
        &self,
        registry: &Registry,
        target: &Target,
        owners: &BTreeSet<String>,
    ) -> Result<(), ApiError> {
        Self::edit(registry, target, |object| {
            let meta = object.metadata_mut();
            let mut rest = meta.owner_references.take().unwrap_or_default();
            rest.retain(|owner| !owners.contains(&owner.uid));
            meta.owner_references = Some(rest).filter(|rest| !rest.is_empty());
        })
        .await
    }

    async fn unhold(
        &self,
        registry: &Registry,
        target: &Target,
        finalizer: &str,
    ) -> Result<(), ApiError> {
        Self::edit(registry, target, |object| {
            let meta = object.metadata_mut();
            let mut rest = meta.finalizers.take().unwrap_or_default();
            rest.retain(|f| f != finalizer);
            meta.finalizers = Some(rest).filter(|rest| !rest.is_empty());
        })
        .await
    }
}

/// Every kind that is served.
pub(super) fn all() -> Vec<Box<dyn AnyKind>> {
    fn typed<K: Object>() -> Box<dyn AnyKind> {
        Box::new(Typed::<K>(PhantomData))
    }
    vec![
        typed::<Namespace>(),
        typed::<Node>(),
        typed::<Pod>(),
        typed::<Service>(),
        typed::<Endpoints>(),
        typed::<ConfigMap>(),
        typed::<Secret>(),
        typed::<Event>(),
        typed::<ServiceAccount>(),
        typed::<ControllerRevision>(),
        typed::<DaemonSet>(),
        typed::<Deployment>(),
        typed::<ReplicaSet>(),
        typed::<StatefulSet>(),
        typed::<CronJob>(),
        typed::<Job>(),
        typed::<Lease>(),
        typed::<EndpointSlice>(),
        typed::<Ingress>(),
        typed::<IngressClass>(),
        typed::<NetworkPolicy>(),
        typed::<PodDisruptionBudget>(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_served_kind_is_forgotten() {
        let mut ours: Vec<_> = all().iter().map(|k| k.kind().kind).collect();
        let mut served: Vec<_> = mesh_model::kinds::KINDS.iter().map(|k| k.kind).collect();
        ours.sort_unstable();
        served.sort_unstable();
        assert_eq!(ours, served);
    }
}
