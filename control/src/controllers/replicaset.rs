//! ReplicaSets: keep a number of pods of one template alive.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::plan::{Failure, Step, plan};
use super::ownership;
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key, until};
use crate::error::ApiError;
use crate::objects;

pub(super) mod plan;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    failures: Mutex<HashMap<ObjectKey, Failure>>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = ownership::queue_of_owners(&context, &context.sets, selects);
        let recorder = context.recorder.of("replicaset-controller");
        (Arc::new(Self { context, recorder, failures: Mutex::default() }), queue)
    }

    async fn apply(&self, set: &ReplicaSet, steps: Vec<Step>) -> Result<(), ApiError> {
        let ns = objects::namespace(&set.metadata);
        let mut deletions = Vec::new();
        for step in steps {
            tracing::debug!(namespace = ns, replica_set = objects::name(&set.metadata), %step, "replica set");
            match step {
                Step::Adopt(pod) => self.context.adopt(set, &self.context.pods, &pod).await?,
                Step::Release(pod) => self.context.release(set, &self.context.pods, &pod).await?,
                Step::Create(count) => self.create(set, count).await?,
                Step::Delete(pod) => deletions.push(pod),
            }
        }
        self.context.delete_pods(set, &deletions, &self.recorder).await
    }

    async fn create(&self, set: &ReplicaSet, count: usize) -> Result<(), ApiError> {
        let pods = vec![new_pod(set); count];
        let result = self.context.create_pods(set, &pods, &self.recorder).await;
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match &result {
            Ok(()) => {
                failures.remove(&key(set));
            }
            Err(error) => {
                failures.insert(key(set), Failure { message: error.to_string() });
            }
        }
        drop(failures);
        result
    }

    fn plan(&self, set: &ReplicaSet) -> plan::Plan {
        let pods = self.context.owned.around(set);
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

fn new_pod(set: &ReplicaSet) -> Pod {
    let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
    let mut pod = ownership::pod_of(set, template.unwrap_or(&PodTemplateSpec::default()));
    pod.metadata.generate_name = Some(format!("{}-", objects::name(&set.metadata)));
    pod
}
