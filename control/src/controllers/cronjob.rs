//! CronJobs: Jobs that are made when they are due.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use k8s_openapi::jiff::Timestamp;
use mesh_model::ObjectKey;

use self::plan::{Note, Plan, Step, plan, started};
use super::owned::Owned;
use super::ownership::owner_of;
use super::queue::WorkQueue;
use super::recorder::Recorder;
use super::runtime::{Context, Reconcile, key, queue_of, until};
use crate::error::ApiError;
use crate::objects;

mod plan;

pub(super) struct Controller {
    context: Arc<Context>,
    recorder: Recorder,
    jobs: Arc<Owned<Job>>,
    /// What was told last, by CronJob: each is told once, and not with every change of its Jobs.
    told: Mutex<HashMap<ObjectKey, Vec<Note>>>,
}

impl Controller {
    pub(super) fn new(context: Arc<Context>) -> (Arc<Self>, Arc<WorkQueue<ObjectKey>>) {
        let queue = queue_of(&context.cron_jobs);
        let (jobs, sink) = (Owned::of(&context.jobs), queue.clone());
        context.jobs.listen(move |old, new| {
            let both = old.into_iter().chain(new);
            both.filter_map(|job| owner_of::<CronJob>(&job.metadata))
                .for_each(|cron| sink.add(cron));
        });
        let recorder = context.recorder.of("cronjob-controller");
        (Arc::new(Self { context, recorder, jobs, told: Mutex::default() }), queue)
    }

    fn tell(&self, cron: &CronJob, notes: Vec<Note>) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let known = told.insert(key(cron), notes.clone()).unwrap_or_default();
        for note in notes.into_iter().filter(|note| !known.contains(note)) {
            if note.warning {
                self.recorder.warning(cron, note.reason, note.message);
            } else {
                self.recorder.normal(cron, note.reason, note.message);
            }
        }
    }

    fn plan(&self, cron: &CronJob, now: Timestamp) -> Plan {
        let (key, uid) = (key(cron), objects::uid(&cron.metadata));
        let mut jobs = self.jobs.by::<CronJob>(&key);
        jobs.retain(|job| objects::is_controlled_by(&job.metadata, uid));
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
            self.told.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
            return Ok(None);
        };
        let now = Timestamp::now();
        let before = self.plan(&cron, now);
        self.tell(&cron, before.notes);
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
