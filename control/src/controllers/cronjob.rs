//! CronJobs: Jobs that are made when they are due.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::plan::{Plan, Step, plan, started};
use super::owned::Owned;
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key, queue_of, until};
use crate::error::ApiError;
use crate::objects;

mod plan;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    jobs: Arc<Owned>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = queue_of(&context.cron_jobs);
        let jobs = Owned::by("CronJob");
        let (sink, owned) = (queue.clone(), jobs.clone());
        context.jobs.listen(move |old, new| {
            let (old, new) = (old.map(|job| &job.metadata), new.map(|job| &job.metadata));
            owned.note(old, new).into_iter().for_each(|cron| sink.add(cron));
        });
        let recorder = context.recorder.of("cronjob-controller");
        (Arc::new(Self { context, recorder, jobs }), queue)
    }

    fn plan(&self, cron: &CronJob, now: Timestamp) -> Plan {
        let (key, uid) = (key(cron), objects::uid(&cron.metadata));
        let own = self.jobs.of(&key).into_iter().filter(|(_, owner)| owner == uid);
        let jobs: Vec<_> =
            own.filter_map(|(name, _)| self.context.jobs.get(&key.namespace, &name)).collect();
        plan(cron, &jobs, now)
    }

    /// Takes the step; returns the CronJob as it is to be told of afterwards.
    async fn apply(&self, cron: CronJob, step: Step) -> Result<CronJob, ApiError> {
        let ns = objects::namespace(&cron.metadata);
        tracing::debug!(namespace = ns, cron_job = objects::name(&cron.metadata), %step, "cron job");
        match step {
            Step::Forget(name) | Step::Replace(name) => {
                self.delete(&cron, &name).await?;
                Ok(cron)
            }
            Step::Start(due, job) => {
                self.start(&cron, &job).await?;
                Ok(started(&cron, due))
            }
        }
    }

    async fn start(&self, cron: &CronJob, job: &Job) -> Result<(), ApiError> {
        let name = objects::name(&job.metadata);
        match self.context.registry.create(job).await {
            Ok(created) => {
                self.context.jobs.wrote(created);
                self.recorder.normal(cron, "SuccessfulCreate", format!("Created job {name}"));
                Ok(())
            }
            // We, before we were killed; or somebody else, and then there is nothing to be done about it.
            Err(ApiError::AlreadyExists { .. }) => {
                let present: Job =
                    self.context.registry.get(job.metadata.namespace.as_deref(), name)?;
                if !objects::is_controlled_by(&present.metadata, objects::uid(&cron.metadata)) {
                    let message = format!("Job {name} was not created by this CronJob");
                    self.recorder.warning(cron, "FailedCreate", message);
                }
                Ok(())
            }
            Err(error) => {
                let message = format!("Error creating job: {error}");
                self.recorder.warning(cron, "FailedCreate", message);
                Err(error)
            }
        }
    }

    async fn delete(&self, cron: &CronJob, name: &str) -> Result<(), ApiError> {
        let ns = objects::namespace(&cron.metadata);
        let Some(job) = self.context.jobs.get(ns, name) else { return Ok(()) };
        let options = DeleteOptions {
            propagation_policy: Some("Background".to_owned()),
            preconditions: Some(Preconditions {
                uid: job.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteOptions::default()
        };
        match self.context.registry.delete::<Job>(Some(ns), name, &options).await {
            Ok(deleted) => {
                self.context.jobs.deleted(deleted);
                self.recorder.normal(cron, "SuccessfulDelete", format!("Deleted job {name}"));
                Ok(())
            }
            Err(ApiError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl Reconcile for Controller {
    type Key = ObjectKey;
    const NAME: &'static str = "cronjob";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Option<Duration>, ApiError> {
        let Some(cron) = self.context.cron_jobs.get(&key.namespace, &key.name) else {
            return Ok(None);
        };
        let now = Timestamp::now();
        let before = self.plan(&cron, now);
        for note in before.notes {
            if note.warning {
                self.recorder.warning(&*cron, note.reason, note.message);
            } else {
                self.recorder.normal(&*cron, note.reason, note.message);
            }
        }
        let mut current = (*cron).clone();
        for step in before.steps {
            current = self.apply(current, step).await?;
        }
        // What the steps did is in the mirror already.
        let after = self.plan(&current, now);
        if cron.status.as_ref() != Some(&after.status) {
            current.status = Some(after.status);
            self.context.cron_jobs.wrote(self.context.registry.update_status(&current).await?);
        }
        Ok(after.look_again.map(until))
    }

    fn all(&self) -> Vec<ObjectKey> {
        self.context.cron_jobs.all().iter().map(|cron| key(&**cron)).collect()
    }
}
