//! How the controllers take objects over, let go of them, and make pods for them.

use std::sync::Arc;

use futures_util::future::join_all;
use k8s_openapi::api::core::v1::{Node, Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use mesh_model::ObjectKey;

use super::mirror::Mirror;
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, key};
use crate::error::ApiError;
use crate::objects;
use crate::registry::{Object, Part, WriteOptions};

/// Pods of one owner that are created or deleted at the same time.
const PARALLEL: usize = 16;

/// A queue that gets each owner of one kind: when it changes or goes, when a pod does that is its own or could be, and when a node
/// with its pods is lost or comes back.
pub(super) fn queue_of_owners<K: Object>(
    context: &Context,
    owners: &Arc<Mirror<K>>,
    selects: fn(&K, &Pod) -> bool,
) -> Arc<WorkQueue<ObjectKey>> {
    let queue = WorkQueue::new();
    let sink = queue.clone();
    owners
        .listen(move |old, new| new.or(old).into_iter().for_each(|owner| sink.add(key(&**owner))));
    let (sink, owners) = (queue.clone(), owners.clone());
    context.pods.listen(move |old, new| {
        for pod in old.into_iter().chain(new) {
            if objects::controller_of(&pod.metadata).is_some() {
                owner_of::<K>(&pod.metadata).into_iter().for_each(|owner| sink.add(owner));
                continue;
            }
            let near = owners.in_namespace(objects::namespace(&pod.metadata));
            let near = near.iter().filter(|owner| selects(owner, pod));
            near.for_each(|owner| sink.add(key(&**owner)));
        }
    });
    let (sink, pods) = (queue.clone(), context.pods.clone());
    context.nodes.listen(move |old, new| {
        let is_lost = |node: Option<&Arc<Node>>| node.is_some_and(|n| objects::is_node_lost(n));
        let Some(node) = new.or(old).filter(|_| is_lost(old) != is_lost(new)) else { return };
        let name = objects::name(&node.metadata);
        let all = pods.all();
        let there = all.iter().filter(|pod| objects::node_of(pod) == Some(name));
        there.filter_map(|pod| owner_of::<K>(&pod.metadata)).for_each(|owner| sink.add(owner));
    });
    queue
}

/// The object of kind `K` that controls the object.
pub(super) fn owner_of<K: Object>(meta: &ObjectMeta) -> Option<ObjectKey> {
    let owner = objects::controller_of(meta).filter(|owner| owner.kind == K::KIND)?;
    Some(ObjectKey::new(objects::namespace(meta), &owner.name))
}

/// The reference by which an object controls another.
pub(super) fn reference<K: Object>(owner: &K) -> OwnerReference {
    let meta = owner.metadata();
    OwnerReference {
        api_version: K::API_VERSION.to_owned(),
        kind: K::KIND.to_owned(),
        name: objects::name(meta).to_owned(),
        uid: objects::uid(meta).to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// A pod of the template, without a name yet.
pub(super) fn pod_of<K: Object>(owner: &K, template: &PodTemplateSpec) -> Pod {
    let from = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            namespace: owner.metadata().namespace.clone(),
            labels: from.labels,
            annotations: from.annotations,
            finalizers: from.finalizers,
            owner_references: Some(vec![reference(owner)]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

impl Context {
    /// Makes `owner` the controller of an object that nobody controls.
    pub(super) async fn adopt<K: Object, D: Object>(
        &self,
        owner: &K,
        mirror: &Mirror<D>,
        name: &str,
    ) -> Result<(), ApiError> {
        self.may_adopt(owner)?;
        self.edit(owner, mirror, name, |meta| {
            if objects::controller_of(meta).is_none() {
                meta.owner_references.get_or_insert_default().push(reference(owner));
            }
        })
        .await
    }

    /// The mirror may not know yet that the owner is being deleted, and lets its dependents go. A conflict is looked at again.
    pub(super) fn may_adopt<K: Object>(&self, owner: &K) -> Result<(), ApiError> {
        let meta = owner.metadata();
        let fresh: K = self.registry.get(meta.namespace.as_deref(), objects::name(meta))?;
        if fresh.metadata().uid == meta.uid && !objects::is_terminating(fresh.metadata()) {
            return Ok(());
        }
        let (kind, name) = (K::kind(), objects::name(meta).to_owned());
        Err(ApiError::Conflict { kind, name, detail: "it is being deleted".to_owned() })
    }

    /// Lets go of an object.
    pub(super) async fn release<K: Object, D: Object>(
        &self,
        owner: &K,
        mirror: &Mirror<D>,
        name: &str,
    ) -> Result<(), ApiError> {
        self.edit(owner, mirror, name, |meta| {
            let owners = meta.owner_references.get_or_insert_default();
            owners.retain(|reference| reference.uid != objects::uid(owner.metadata()));
        })
        .await
    }

    /// Changes the metadata of an object in the namespace of `owner`.
    pub(super) async fn edit<K: Object, D: Object>(
        &self,
        owner: &K,
        mirror: &Mirror<D>,
        name: &str,
        change: impl Fn(&mut ObjectMeta) + Send + Sync,
    ) -> Result<(), ApiError> {
        let ns = owner.metadata().namespace.as_deref();
        let edited = |old: &D| {
            let mut new = old.clone();
            change(new.metadata_mut());
            Ok(new)
        };
        let options = WriteOptions::default();
        mirror.wrote(self.registry.modify(ns, name, Part::Main, &options, edited).await?);
        Ok(())
    }

    /// Creates pods, some at a time. A batch always runs to its end: a pod that is created but not noted would be created again.
    pub(super) async fn create_pods<K: Object>(
        &self,
        owner: &K,
        pods: &[Pod],
        recorder: &Recorder,
    ) -> Result<(), ApiError> {
        for batch in pods.chunks(PARALLEL) {
            let mut result = Ok(());
            for created in join_all(batch.iter().map(|pod| self.registry.create(pod))).await {
                match created {
                    Ok(pod) => {
                        let message = format!("Created pod: {}", objects::name(&pod.metadata));
                        recorder.normal(owner, "SuccessfulCreate", message);
                        self.pods.wrote(pod);
                    }
                    Err(error) => result = Err(error),
                }
            }
            if let Err(error) = &result {
                recorder.warning(owner, "FailedCreate", format!("Error creating: {error}"));
            }
            result?;
        }
        Ok(())
    }

    /// Deletes pods of `owner`, some at a time.
    pub(super) async fn delete_pods<K: Object>(
        &self,
        owner: &K,
        names: &[String],
        recorder: &Recorder,
    ) -> Result<(), ApiError> {
        for batch in names.chunks(PARALLEL) {
            let deletions = batch.iter().map(|name| self.delete_own(owner, name, recorder));
            join_all(deletions).await.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    /// Deletes a pod of `owner`.
    pub(super) async fn delete_own<K: Object>(
        &self,
        owner: &K,
        name: &str,
        recorder: &Recorder,
    ) -> Result<(), ApiError> {
        if let Some(pod) = self.pods.get(objects::namespace(owner.metadata()), name) {
            self.delete_pod(&pod, None).await?;
            recorder.normal(owner, "SuccessfulDelete", format!("Deleted pod: {name}"));
        }
        Ok(())
    }
}
