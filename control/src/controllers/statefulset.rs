//! StatefulSets: pods with names that stay, one after the other.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::identity::new_pod;
use self::plan::{Plan, Seen, Step, plan};
use super::backoff::Backoffs;
use super::history::{self, POD_REVISION, Revised};
use super::ownership;
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key, until};
use crate::error::ApiError;
use crate::objects;

mod identity;
mod plan;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    backoffs: Backoffs,
}

/// The revisions that pods of a set are made of.
struct Revisions {
    /// The newest last.
    all: Vec<Arc<ControllerRevision>>,
    current: String,
    newest: String,
}

impl Revisions {
    fn of(set: &StatefulSet, all: Vec<Arc<ControllerRevision>>) -> Self {
        let name =
            |revision: &Arc<ControllerRevision>| objects::name(&revision.metadata).to_owned();
        let newest = all.last().map(name).unwrap_or_default();
        let noted = set.status.as_ref().and_then(|status| status.current_revision.as_deref());
        let current = all.iter().find(|r| Some(objects::name(&r.metadata)) == noted);
        Self { current: current.map_or_else(|| newest.clone(), name), newest, all }
    }

    /// The template that an update leads away from.
    fn template_before(&self) -> Option<PodTemplateSpec> {
        let current = self.all.iter().find(|r| objects::name(&r.metadata) == self.current)?;
        history::template_of(current)
    }
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = ownership::queue_of_owners(&context, &context.stateful, selects);
        history::follow::<StatefulSet>(&context, &queue);
        let recorder = context.recorder.of("statefulset-controller");
        (Arc::new(Self { context, recorder, backoffs: Backoffs::default() }), queue)
    }

    fn plan(&self, set: &StatefulSet, revisions: &Revisions) -> Plan {
        let seen = Seen {
            pods: &self.context.owned.around(set),
            current: &revisions.current,
            newest: &revisions.newest,
            lost: &self.context.lost_nodes(),
            backoff: &self.backoffs.of(&set.metadata),
            now: Timestamp::now(),
        };
        plan(set, &seen)
    }

    async fn apply(
        &self,
        set: &StatefulSet,
        revisions: &Revisions,
        steps: Vec<Step>,
    ) -> Result<(), ApiError> {
        let ns = objects::namespace(&set.metadata);
        let (mut deletions, mut pods) = (Vec::new(), Vec::new());
        for step in steps {
            tracing::debug!(namespace = ns, stateful_set = objects::name(&set.metadata), %step, "stateful set");
            match step {
                Step::Adopt(pod) => self.context.adopt(set, &self.context.pods, &pod).await?,
                Step::Release(pod) => self.context.release(set, &self.context.pods, &pod).await?,
                Step::Identify(pod, ordinal) => self.identify(set, &pod, ordinal).await?,
                Step::Delete(pod) => deletions.push(pod),
                Step::Renew(pod) => {
                    self.backoffs.note(&set.metadata, &pod, Timestamp::now());
                    let message =
                        format!("StatefulSet {} is recreating failed Pod {pod}", key(set));
                    self.recorder.warning(set, "RecreatingFailedPod", message);
                    deletions.push(pod);
                }
                Step::Create { ordinal, newest } => {
                    pods.push(made(set, revisions, ordinal, newest));
                }
            }
        }
        self.context.delete_pods(set, &deletions, &self.recorder).await?;
        self.context.create_pods(set, &pods, &self.recorder).await
    }

    async fn identify(&self, set: &StatefulSet, pod: &str, ordinal: i32) -> Result<(), ApiError> {
        let labelled = |meta: &mut k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta| {
            let labels = meta.labels.get_or_insert_default();
            let own = identity::labels(set, ordinal);
            labels.extend(own.map(|(key, value)| (key.to_owned(), value)));
        };
        self.context.edit(set, &self.context.pods, pod, labelled).await
    }

    async fn report(&self, set: &StatefulSet, plan: &Plan) -> Result<(), ApiError> {
        if set.status.as_ref() == Some(&plan.status) {
            return Ok(());
        }
        let new = StatefulSet { status: Some(plan.status.clone()), ..set.clone() };
        self.context.stateful.wrote(self.context.registry.update_status(&new).await?);
        Ok(())
    }

    /// Deletes revisions that no pod has and that are more than the set keeps.
    async fn forget(&self, set: &StatefulSet, revisions: &Revisions) -> Result<(), ApiError> {
        let pods = self.context.owned.around(set);
        let labels = pods.iter().filter_map(|pod| pod.metadata.labels.as_ref()?.get(POD_REVISION));
        let mut used: BTreeSet<&str> = labels.map(String::as_str).collect();
        used.insert(&revisions.current);
        let surplus = history::surplus(set, &revisions.all, &used);
        self.context.forget_revisions(set, &surplus).await
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "statefulset";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let Some(set) = self.context.stateful.get(&key.namespace, &key.name) else {
            self.backoffs.forget(key);
            return Ok(None);
        };
        if objects::is_terminating(&set.metadata) {
            let all = history::of(&*set, &self.context.revisions.in_namespace(&key.namespace));
            self.report(&set, &self.plan(&set, &Revisions::of(&set, all))).await?;
            return Ok(None);
        }
        let Some(all) = self.context.keep_history(&*set).await? else {
            return self.context.note_collision(&self.context.stateful, &*set).await;
        };
        let revisions = Revisions::of(&set, all);
        let steps = self.plan(&set, &revisions).steps;
        let applied = self.apply(&set, &revisions, steps).await;
        // What the steps did is in the mirror already.
        let after = self.plan(&set, &revisions);
        self.report(&set, &after).await?;
        applied?;
        self.forget(&set, &revisions).await?;
        Ok(after.look_again.map(until))
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.stateful.all().iter().map(|set| key(&**set)).collect()
    }
}

fn made(set: &StatefulSet, revisions: &Revisions, ordinal: i32, newest: bool) -> Pod {
    let present = || set.template().cloned().unwrap_or_default();
    if newest {
        return new_pod(set, ordinal, &present(), &revisions.newest);
    }
    let template = revisions.template_before().unwrap_or_else(present);
    new_pod(set, ordinal, &template, &revisions.current)
}

fn selects(set: &StatefulSet, pod: &Pod) -> bool {
    let selector = set.selector();
    identity::ordinal(set, pod).is_some()
        && selector.is_some_and(|s| objects::selects(s, pod.metadata.labels.as_ref()))
}
