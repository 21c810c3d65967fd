//! ReplicaSets: keep a number of pods of one template alive.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::plan::{Failure, Step, plan};
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key, until};
use crate::error::ApiError;
use crate::objects;
use crate::registry::{Part, WriteOptions};

pub(super) mod plan;

/// Pods of one set that are created or deleted at the same time.
const PARALLEL: usize = 16;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    failures: Mutex<HashMap<ObjectKey, Failure>>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = WorkQueue::new();
        let sink = queue.clone();
        context.sets.listen(move |old, new| {
            if let Some(set) = new.or(old) {
                sink.add(key(&**set));
            }
        });
        let (sink, sets) = (queue.clone(), context.sets.clone());
        context.pods.listen(move |old, new| {
            for pod in old.into_iter().chain(new) {
                let ns = objects::namespace(&pod.metadata);
                match objects::controller_of(&pod.metadata) {
                    Some(owner) if owner.kind == "ReplicaSet" => {
                        sink.add(ObjectKey::new(ns, &owner.name));
                    }
                    Some(_) => {}
                    None => sets
                        .in_namespace(ns)
                        .iter()
                        .filter(|set| selects(set, pod))
                        .for_each(|set| sink.add(key(&**set))),
                }
            }
        });
        let (sink, pods) = (queue.clone(), context.pods.clone());
        context.nodes.listen(move |old, new| {
            let lost = |node: Option<&Arc<_>>| node.is_some_and(|n| objects::is_node_lost(n));
            let Some(node) = new.or(old).filter(|_| lost(old) != lost(new)) else {
                return;
            };
            let name = objects::name(&node.metadata);
            for pod in pods.all().iter().filter(|pod| objects::node_of(pod) == Some(name)) {
                if let Some(owner) = objects::controller_of(&pod.metadata) {
                    sink.add(ObjectKey::new(objects::namespace(&pod.metadata), &owner.name));
                }
            }
        });
        let recorder = context.recorder.of("replicaset-controller");
        (Arc::new(Self { context, recorder, failures: Mutex::default() }), queue)
    }

    async fn apply(&self, set: &ReplicaSet, steps: Vec<Step>) -> Result<(), ApiError> {
        let ns = objects::namespace(&set.metadata);
        let mut deletions = Vec::new();
        for step in steps {
            tracing::debug!(namespace = ns, replica_set = objects::name(&set.metadata), %step, "replica set");
            match step {
                Step::Adopt(pod) => self.adopt(set, &pod).await?,
                Step::Release(pod) => self.release(set, &pod).await?,
                Step::Create(count) => self.create(set, count).await?,
                Step::Delete(pod) => deletions.push(pod),
            }
        }
        for batch in deletions.chunks(PARALLEL) {
            let results = join_all(batch.iter().map(|pod| self.delete(set, pod))).await;
            results.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    async fn create(&self, set: &ReplicaSet, count: usize) -> Result<(), ApiError> {
        let pod = new_pod(set);
        let mut result = Ok(());
        let mut left = count;
        // A batch always runs to its end: a pod that is created but not noted would be created again.
        while left > 0 && result.is_ok() {
            let batch = left.min(PARALLEL);
            left -= batch;
            for created in join_all((0..batch).map(|_| self.context.registry.create(&pod))).await {
                match created {
                    Ok(pod) => {
                        let message = format!("Created pod: {}", objects::name(&pod.metadata));
                        self.recorder.normal(set, "SuccessfulCreate", message);
                        self.context.pods.wrote(pod);
                    }
                    Err(error) => result = Err(error),
                }
            }
        }
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Ok(()) => {
                failures.remove(&key(set));
            }
            Err(error) => {
                let message = error.to_string();
                self.recorder.warning(set, "FailedCreate", format!("Error creating: {message}"));
                failures.insert(key(set), Failure { message });
            }
        }
        drop(failures);
        result
    }

    async fn delete(&self, set: &ReplicaSet, name: &str) -> Result<(), ApiError> {
        if let Some(pod) = self.context.pods.get(objects::namespace(&set.metadata), name) {
            self.context.delete_pod(&pod, None).await?;
            self.recorder.normal(set, "SuccessfulDelete", format!("Deleted pod: {name}"));
        }
        Ok(())
    }

    async fn adopt(&self, set: &ReplicaSet, pod: &str) -> Result<(), ApiError> {
        // The mirror may not know yet that the set is being deleted, and lets its pods go.
        let ns = set.metadata.namespace.as_deref();
        let fresh: ReplicaSet = self.context.registry.get(ns, objects::name(&set.metadata))?;
        if fresh.metadata.uid != set.metadata.uid || objects::is_terminating(&fresh.metadata) {
            return Ok(());
        }
        self.edit(set, pod, |meta| {
            if objects::controller_of(meta).is_none() {
                meta.owner_references.get_or_insert_default().push(owner_reference(set));
            }
        })
        .await
    }

    async fn release(&self, set: &ReplicaSet, pod: &str) -> Result<(), ApiError> {
        self.edit(set, pod, |meta| {
            let owners = meta.owner_references.get_or_insert_default();
            owners.retain(|owner| owner.uid != objects::uid(&set.metadata));
        })
        .await
    }

    async fn edit(
        &self,
        set: &ReplicaSet,
        pod: &str,
        change: impl Fn(&mut ObjectMeta) + Send + Sync,
    ) -> Result<(), ApiError> {
        let ns = set.metadata.namespace.as_deref();
        let options = WriteOptions::default();
        let edited = |old: &Pod| {
            let mut pod = old.clone();
            change(&mut pod.metadata);
            Ok(pod)
        };
        let written = self.context.registry.modify(ns, pod, Part::Main, &options, edited).await?;
        self.context.pods.wrote(written);
        Ok(())
    }

    fn plan(&self, set: &ReplicaSet) -> plan::Plan {
        let pods = self.context.pods.in_namespace(objects::namespace(&set.metadata));
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let failure = failures.get(&key(set));
        plan(set, &pods, &self.context.lost_nodes(), failure, Timestamp::now())
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "replicaset";
    const WORKERS: usize = 4;

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let Some(set) = self.context.sets.get(&key.namespace, &key.name) else {
            self.failures.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
            return Ok(None);
        };
        let steps = self.plan(&set).steps;
        let applied = self.apply(&set, steps).await;
        // What the steps did is in the mirror already.
        let after = self.plan(&set);
        if set.status.as_ref() != Some(&after.status) {
            let mut new = (*set).clone();
            new.status = Some(after.status);
            self.context.sets.wrote(self.context.registry.update_status(&new).await?);
        }
        applied?;
        Ok(after.look_again.map(until))
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.sets.all().iter().map(|set| key(&**set)).collect()
    }
}

fn selects(set: &ReplicaSet, pod: &Pod) -> bool {
    set.spec
        .as_ref()
        .is_some_and(|spec| objects::selects(&spec.selector, pod.metadata.labels.as_ref()))
}

fn owner_reference(set: &ReplicaSet) -> OwnerReference {
    OwnerReference {
        api_version: "apps/v1".to_owned(),
        kind: "ReplicaSet".to_owned(),
        name: objects::name(&set.metadata).to_owned(),
        uid: objects::uid(&set.metadata).to_owned(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

fn new_pod(set: &ReplicaSet) -> Pod {
    let template = set.spec.as_ref().and_then(|spec| spec.template.clone()).unwrap_or_default();
    let from = template.metadata.unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", objects::name(&set.metadata))),
            namespace: set.metadata.namespace.clone(),
            labels: from.labels,
            annotations: from.annotations,
            finalizers: from.finalizers,
            owner_references: Some(vec![owner_reference(set)]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}
