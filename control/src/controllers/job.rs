//! Jobs: pods that run until enough of them succeeded.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use k8s_openapi::api::batch::v1::{Job, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Preconditions};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::plan::{Step, plan};
use self::pod::{TRACKING, is_tracked, new_pod};
use super::ownership::{owner_of, reference};
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key, until};
use crate::error::ApiError;
use crate::objects;
use crate::registry::{Part, WriteOptions};

mod ledger;
pub(super) mod plan;
mod pod;
mod rules;
pub(super) mod verdict;

/// Pods of one Job that are written at the same time.
const PARALLEL: usize = 16;

/// A pod that a Job is about to adopt is looked at again after so long.
const ADOPTION: Duration = Duration::from_secs(5);

/// What is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// A Job, or what is left of one.
    Job(ObjectKey),
    /// A pod that waits to be counted, and has nobody who would.
    Stray(ObjectKey),
}

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    /// Jobs whose selector was made by people: they may adopt pods.
    selecting: Arc<Mutex<BTreeSet<ObjectKey>>>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<Key>>) {
        let queue: Arc<WorkQueue<Key>> = WorkQueue::new();
        let selecting = Arc::<Mutex<BTreeSet<ObjectKey>>>::default();
        let (sink, by_hand) = (queue.clone(), selecting.clone());
        context.jobs.listen(move |old, new| {
            let Some(job) = new.or(old) else { return };
            let mut by_hand = by_hand.lock().unwrap_or_else(PoisonError::into_inner);
            match new.filter(|job| selects_by_hand(job)) {
                Some(job) => {
                    by_hand.insert(key(&**job));
                }
                None => {
                    by_hand.remove(&key(&**job));
                }
            }
            sink.add(Key::Job(key(&**job)));
        });
        let (sink, by_hand) = (queue.clone(), selecting.clone());
        context.pods.listen(move |old, new| {
            let (old, new) = (old.map(|pod| &pod.metadata), new.map(|pod| &pod.metadata));
            let owners = old.into_iter().chain(new).filter_map(owner_of::<Job>);
            owners.for_each(|job| sink.add(Key::Job(job)));
            let Some(pod) = new.filter(|meta| objects::controller_of(meta).is_none()) else {
                return;
            };
            let ns = objects::namespace(pod);
            if is_tracked(pod) {
                sink.add(Key::Stray(ObjectKey::new(ns, objects::name(pod))));
            }
            let by_hand = by_hand.lock().unwrap_or_else(PoisonError::into_inner);
            let near = by_hand.iter().filter(|job| job.namespace == ns);
            near.for_each(|job| sink.add(Key::Job(job.clone())));
        });
        let recorder = context.recorder.of("job-controller");
        (Arc::new(Self { context, recorder, selecting }), queue)
    }

    /// The Job's pods, and those that it may adopt.
    fn pods_of(&self, job: &Job) -> Vec<Arc<Pod>> {
        let mut found = self.context.owned.by::<Job>(&key(job));
        if selects_by_hand(job) {
            found.extend(self.context.owned.by_nobody(objects::namespace(&job.metadata)));
        }
        found
    }

    /// Lets go of the pods of former Jobs of that name: nobody counts them any more.
    async fn release_former(&self, key: &ObjectKey, job: Option<&Job>) -> Result<(), ApiError> {
        let uid = job.map(|job| objects::uid(&job.metadata)).unwrap_or_default();
        let mut former = self.context.owned.by::<Job>(key);
        former.retain(|pod| !objects::is_controlled_by(&pod.metadata, uid));
        for pod in former {
            self.release(&key.namespace, objects::name(&pod.metadata)).await?;
        }
        Ok(())
    }

    /// A pod that no Job adopts waits for nobody.
    async fn release_stray(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let pod = self.context.pods.get(&key.namespace, &key.name);
        let Some(pod) = pod.filter(|pod| objects::controller_of(&pod.metadata).is_none()) else {
            return Ok(None);
        };
        let candidates = self.selecting.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let near = candidates.iter().filter(|job| job.namespace == key.namespace);
        let is_wanted = near
            .filter_map(|job| self.context.jobs.get(&job.namespace, &job.name))
            .any(|job| !objects::is_terminating(&job.metadata) && plan::selects(&job, &pod));
        if is_wanted && objects::is_active(&pod) {
            return Ok(Some(ADOPTION));
        }
        self.release(&key.namespace, &key.name).await.map(|()| None)
    }

    async fn apply(&self, job: &Job, steps: Vec<Step>) -> Result<(), ApiError> {
        let ns = objects::namespace(&job.metadata);
        let (mut writes, mut rest) = (Vec::new(), Vec::new());
        for step in steps {
            tracing::debug!(namespace = ns, job = objects::name(&job.metadata), %step, "job");
            match step {
                Step::Create(_) | Step::Remove | Step::Adopt(_) => rest.push(step),
                other => writes.push(other),
            }
        }
        for batch in writes.chunks(PARALLEL) {
            let results = join_all(batch.iter().map(|step| self.write(job, step))).await;
            results.into_iter().collect::<Result<(), _>>()?;
        }
        for step in rest {
            match step {
                Step::Create(attempts) => {
                    let pods: Vec<Pod> = attempts.iter().map(|at| new_pod(job, *at)).collect();
                    self.context.create_pods(job, &pods, &self.recorder).await?;
                }
                Step::Remove => self.remove(job).await?,
                Step::Adopt(pod) => self.adopt(job, &pod).await?,
                _ => {}
            }
        }
        Ok(())
    }

    /// A step that is about one pod.
    async fn write(&self, job: &Job, step: &Step) -> Result<(), ApiError> {
        let ns = objects::namespace(&job.metadata);
        match step {
            Step::Release(pod) => self.release(ns, pod).await,
            Step::Disown(pod) => {
                let uid = objects::uid(&job.metadata);
                self.edit(ns, pod, |pod| {
                    let meta = &mut pod.metadata;
                    let owners = meta.owner_references.get_or_insert_default();
                    owners.retain(|owner| owner.uid != uid);
                    drop_tracking(meta);
                })
                .await
                .map(drop)
            }
            Step::Discard(name) => {
                // One that has ended meanwhile counts after all.
                let edited = self
                    .edit(ns, name, |pod| {
                        if !objects::have_ended(pod) {
                            drop_tracking(&mut pod.metadata);
                        }
                    })
                    .await?;
                match edited.filter(|pod| !is_tracked(&pod.metadata)) {
                    Some(_) => self.context.delete_own(job, name, &self.recorder).await,
                    None => Ok(()),
                }
            }
            Step::Delete(name) => self.context.delete_own(job, name, &self.recorder).await,
            _ => Ok(()),
        }
    }

    async fn adopt(&self, job: &Job, pod: &str) -> Result<(), ApiError> {
        self.context.may_adopt(job)?;
        self.edit(objects::namespace(&job.metadata), pod, |pod| {
            let meta = &mut pod.metadata;
            if objects::controller_of(meta).is_none() && !objects::is_terminating(meta) {
                meta.owner_references.get_or_insert_default().push(reference(job));
                if !is_tracked(meta) {
                    meta.finalizers.get_or_insert_default().push(TRACKING.to_owned());
                }
            }
        })
        .await
        .map(drop)
    }

    async fn release(&self, ns: &str, pod: &str) -> Result<(), ApiError> {
        if !self.context.pods.get(ns, pod).is_some_and(|pod| is_tracked(&pod.metadata)) {
            return Ok(());
        }
        self.edit(ns, pod, |pod| drop_tracking(&mut pod.metadata)).await.map(drop)
    }

    /// Changes a pod, if it is still the one that the mirror has. `None` when it is gone.
    async fn edit(
        &self,
        ns: &str,
        name: &str,
        change: impl Fn(&mut Pod) + Send + Sync,
    ) -> Result<Option<Pod>, ApiError> {
        let Some(known) = self.context.pods.get(ns, name) else { return Ok(None) };
        let edited = |old: &Pod| {
            let mut pod = old.clone();
            if old.metadata.uid == known.metadata.uid {
                change(&mut pod);
            }
            Ok(pod)
        };
        let options = WriteOptions::default();
        match self.context.registry.modify(Some(ns), name, Part::Main, &options, edited).await {
            Ok(written) => {
                self.context.pods.wrote(written.clone());
                Ok(Some(written))
            }
            Err(ApiError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes a Job whose time after its end is up, with its pods.
    async fn remove(&self, job: &Job) -> Result<(), ApiError> {
        let (ns, name) = (objects::namespace(&job.metadata), objects::name(&job.metadata));
        let options = DeleteOptions {
            propagation_policy: Some("Foreground".to_owned()),
            preconditions: Some(Preconditions {
                uid: job.metadata.uid.clone(),
                // Not if somebody gave it more time meanwhile.
                resource_version: job.metadata.resource_version.clone(),
            }),
            ..DeleteOptions::default()
        };
        match self.context.registry.delete::<Job>(Some(ns), name, &options).await {
            Ok(deleted) => {
                self.context.jobs.deleted(deleted);
                Ok(())
            }
            Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Stores the status, and tells what is new in it. Returns the Job as it is stored.
    async fn store(&self, job: Arc<Job>, status: JobStatus) -> Result<Arc<Job>, ApiError> {
        if job.status.as_ref() == Some(&status) {
            return Ok(job);
        }
        let mut new = (*job).clone();
        new.status = Some(status);
        let written = self.context.registry.update_status(&new).await?;
        self.context.jobs.wrote(written.clone());
        self.tell(&job, &written);
        Ok(Arc::new(written))
    }

    fn tell(&self, old: &Job, new: &Job) {
        let is = |job: &Job, type_: &str, word: &str| {
            let found = job.status.as_ref().and_then(|s| verdict::condition(s, type_));
            found.is_some_and(|found| found.status == word)
        };
        for (type_, word, warns, reason, message) in [
            ("Suspended", "True", false, "Suspended", "Job suspended"),
            ("Suspended", "False", false, "Resumed", "Job resumed"),
            ("Complete", "True", false, "Completed", "Job completed"),
            ("Failed", "True", true, "Failed", ""),
        ] {
            if !is(new, type_, word) || is(old, type_, word) {
                continue;
            }
            if !warns {
                self.recorder.normal(new, reason, message.to_owned());
                continue;
            }
            let why = new.status.as_ref().and_then(|s| verdict::condition(s, type_));
            let message = why.and_then(|why| why.message.clone()).unwrap_or_default();
            let reason = why.and_then(|why| why.reason.as_deref()).unwrap_or_default();
            self.recorder.warning(new, verdict::reason(reason), message);
        }
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = Key;
    const NAME: &'static str = "job";
    const WORKERS: usize = 4;

    async fn reconcile(&self, key: &Key) -> Result<Option<Duration>, ApiError> {
        let key = match key {
            Key::Stray(pod) => return self.release_stray(pod).await,
            Key::Job(key) => key,
        };
        let job = self.context.jobs.get(&key.namespace, &key.name);
        self.release_former(key, job.as_deref()).await?;
        let Some(job) = job else { return Ok(None) };
        let plan = plan(&job, &self.pods_of(&job), Timestamp::now());
        let job = self.store(job, plan.status).await?;
        self.apply(&job, plan.steps).await?;
        Ok(plan.look_again.map(until))
    }

    fn all(&self) -> Vec<Key> {
        self.context.jobs.all().iter().map(|job| Key::Job(key(&**job))).collect()
    }
}

fn selects_by_hand(job: &Job) -> bool {
    job.spec.as_ref().is_some_and(|spec| spec.manual_selector == Some(true))
}

fn drop_tracking(meta: &mut ObjectMeta) {
    let mut rest = meta.finalizers.take().unwrap_or_default();
    rest.retain(|finalizer| finalizer != TRACKING);
    meta.finalizers = Some(rest).filter(|rest| !rest.is_empty());
}
