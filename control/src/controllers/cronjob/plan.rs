//! A CronJob's next steps and status, from the CronJob and its Jobs. Pure.

use std::fmt;
use std::sync::Arc;

use jiff::tz::TimeZone;
use k8s_openapi::api::batch::v1::{CronJob, CronJobStatus, Job};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::controllers::job::verdict::over_since;
use crate::cron::Schedule;
use crate::objects;

/// Annotation of its Jobs: for when they were due.
pub(super) const DUE_AT: &str = "batch.kubernetes.io/cronjob-scheduled-timestamp";
/// Clocks step, and timers do not follow: it is looked at again after so long at the latest.
const LONGEST_SLEEP: SignedDuration = SignedDuration::from_secs(60);
/// A clock that is put back by more than that has been wrong: nobody waits for the time that it had. What was started within that time
/// is not started again.
const PUT_BACK: SignedDuration = SignedDuration::from_secs(60);
/// Who missed more than that hears of it.
const MANY: usize = 100;

/// One change towards what the CronJob asks for.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) enum Step {
    /// Delete a Job that is over: there are newer ones.
    Forget(String),
    /// Delete a Job that runs: another one takes its place.
    Replace(String),
    /// Create the Job that was due then.
    Start(Timestamp, Box<Job>),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forget(job) => write!(f, "forget job {job}"),
            Self::Replace(job) => write!(f, "replace job {job}"),
            Self::Start(at, _) => write!(f, "start the job of {at}"),
        }
    }
}

/// What people are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::controllers) struct Note {
    pub(in crate::controllers) warning: bool,
    pub(in crate::controllers) reason: &'static str,
    pub(in crate::controllers) message: String,
    /// The time that it is about.
    pub(in crate::controllers) due: Option<Timestamp>,
}

/// What to do, what to report then, and when to look again although nothing changed.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) struct Plan {
    pub(in crate::controllers) steps: Vec<Step>,
    pub(in crate::controllers) notes: Vec<Note>,
    pub(in crate::controllers) status: CronJobStatus,
    pub(in crate::controllers) look_again: Option<Timestamp>,
}

/// Plans for `cron`; `jobs` are those that it controls.
pub(in crate::controllers) fn plan(cron: &CronJob, jobs: &[Arc<Job>], now: Timestamp) -> Plan {
    let (over, mut running): (Vec<_>, Vec<_>) = jobs.iter().partition(|job| end(job).is_some());
    // Those that people made of it run beside it.
    running.retain(|job| is_scheduled(job));
    let mut plan = Plan {
        steps: old(cron, &over),
        notes: Vec::new(),
        status: status(cron, &over, &running, now),
        look_again: None,
    };
    if objects::is_terminating(&cron.metadata) {
        plan.steps.clear();
    } else if cron.spec.suspend != Some(true) {
        plan.keep_time(cron, &running, now);
    }
    plan
}

impl Plan {
    fn keep_time(&mut self, cron: &CronJob, running: &[&Arc<Job>], now: Timestamp) {
        let spec = &cron.spec;
        let zone = match spec.time_zone.as_deref() {
            Some(name) => TimeZone::get(name),
            None => Ok(TimeZone::UTC),
        };
        let Ok(zone) = zone else {
            let name = spec.time_zone.clone().unwrap_or_default();
            return self.warn("UnknownTimeZone", format!("invalid timeZone: {name:?}"));
        };
        let schedule = match Schedule::parse(&spec.schedule) {
            Ok(schedule) => schedule,
            Err(error) => {
                let message = format!("unparseable schedule: {:?}: {error}", spec.schedule);
                return self.warn("UnparseableSchedule", message);
            }
        };
        let latest = now.saturating_add(LONGEST_SLEEP).unwrap_or(Timestamp::MAX);
        let next = schedule.next(now, &zone);
        self.look_again = next.map(|next| next.min(latest));
        let since = since(cron, now);
        let Some(due) = schedule.latest(since, now, &zone) else { return };
        if schedule.count(since, now, &zone, MANY + 1) > MANY {
            let message = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew";
            self.warn("TooManyMissedTimes", message.to_owned());
        }
        self.start(cron, running, due, &zone);
    }

    /// Starts the Job that was due, unless the one before forbids it.
    fn start(&mut self, cron: &CronJob, running: &[&Arc<Job>], due: Timestamp, zone: &TimeZone) {
        let job = job_of(cron, due, zone);
        let others = running.iter().filter(|other| other.metadata.name != job.metadata.name);
        let others: Vec<String> = others.map(|job| name(job)).collect();
        match cron.spec.concurrency_policy.as_deref() {
            Some("Forbid") if !others.is_empty() => {
                let message = "Not starting job because prior execution is running and concurrency policy is Forbid";
                self.notes.push(Note {
                    warning: false,
                    reason: "JobAlreadyActive",
                    message: message.to_owned(),
                    due: Some(due),
                });
                return;
            }
            Some("Replace") => self.steps.extend(others.into_iter().map(Step::Replace)),
            _ => {}
        }
        self.steps.push(Step::Start(due, Box::new(job)));
    }

    fn warn(&mut self, reason: &'static str, message: String) {
        self.notes.push(Note { warning: true, reason, message, due: None });
    }
}

/// Since when nothing was started.
fn since(cron: &CronJob, now: Timestamp) -> Timestamp {
    let last = cron.status.as_ref().and_then(|status| status.last_schedule_time.as_ref());
    let last = last.map_or_else(|| objects::created(&cron.metadata), |time| time.0);
    let deadline = cron.spec.starting_deadline_seconds.map(SignedDuration::from_secs);
    let too_late = deadline.map(|wait| now.saturating_sub(wait).unwrap_or(Timestamp::MIN));
    too_late.map_or(last, |too_late| last.max(too_late))
}

/// What is told of its Jobs.
fn status(
    cron: &CronJob,
    over: &[&Arc<Job>],
    running: &[&Arc<Job>],
    now: Timestamp,
) -> CronJobStatus {
    let mut status = cron.status.clone().unwrap_or_default();
    let ahead = status
        .last_schedule_time
        .as_ref()
        .is_some_and(|last| last.0 > now.saturating_add(PUT_BACK).unwrap_or(Timestamp::MAX));
    if ahead {
        let whole = Timestamp::from_second(now.as_second()).unwrap_or(now);
        status.last_schedule_time = Some(Time(whole));
    }
    let active: Vec<ObjectReference> = running.iter().map(|job| reference(job)).collect();
    status.active = Some(active).filter(|active| !active.is_empty());
    let done = over.iter().filter_map(|job| job.status.as_ref()?.completion_time.clone());
    let last = done.chain(status.last_successful_time.take()).max_by_key(|time| time.0);
    status.last_successful_time = last;
    status
}

fn reference(job: &Job) -> ObjectReference {
    ObjectReference {
        api_version: Some("batch/v1".to_owned()),
        kind: Some("Job".to_owned()),
        namespace: job.metadata.namespace.clone(),
        name: job.metadata.name.clone(),
        uid: job.metadata.uid.clone(),
        ..ObjectReference::default()
    }
}

/// The oldest of those that are over, beyond what is to be kept of them.
fn old(cron: &CronJob, over: &[&Arc<Job>]) -> Vec<Step> {
    let kept = |limit: Option<i32>| usize::try_from(limit.unwrap_or(0)).unwrap_or(0);
    let mut steps = Vec::new();
    for (success, limit) in [
        (true, cron.spec.successful_jobs_history_limit),
        (false, cron.spec.failed_jobs_history_limit),
    ] {
        let mut all: Vec<_> = over.iter().filter(|job| end(job) == Some(success)).collect();
        all.retain(|job| !objects::is_terminating(&job.metadata));
        all.sort_by_key(|job| (begun(job), name(job)));
        let surplus = all.len().saturating_sub(kept(limit));
        steps.extend(all[..surplus].iter().map(|job| Step::Forget(name(job))));
    }
    steps
}

fn begun(job: &Job) -> Timestamp {
    let started = job.status.as_ref().and_then(|status| status.start_time.as_ref());
    started.map_or_else(|| objects::created(&job.metadata), |time| time.0)
}

/// Whether the schedule made the Job, and not people (`kubectl create job --from`).
fn is_scheduled(job: &Job) -> bool {
    job.metadata.annotations.as_ref().is_some_and(|all| all.contains_key(DUE_AT))
}

/// Whether the Job succeeded; `None` while it is not over.
fn end(job: &Job) -> Option<bool> {
    job.status.as_ref().and_then(over_since).map(|(_, success)| success)
}

/// The Job that is due then. Its name follows from the time, so that it is made once.
fn job_of(cron: &CronJob, due: Timestamp, zone: &TimeZone) -> Job {
    let template = cron.spec.job_template.clone();
    let from = template.metadata.unwrap_or_default();
    let mut annotations = from.annotations.unwrap_or_default();
    let local = due.to_zoned(zone.clone()).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string();
    let stamp = if *zone == TimeZone::UTC { due.to_string() } else { local };
    annotations.insert(DUE_AT.to_owned(), stamp);
    let minutes = due.as_second().div_euclid(60);
    Job {
        metadata: ObjectMeta {
            name: Some(format!("{}-{minutes}", objects::name(&cron.metadata))),
            namespace: cron.metadata.namespace.clone(),
            labels: from.labels,
            annotations: Some(annotations),
            owner_references: Some(vec![OwnerReference {
                api_version: "batch/v1".to_owned(),
                kind: "CronJob".to_owned(),
                name: objects::name(&cron.metadata).to_owned(),
                uid: objects::uid(&cron.metadata).to_owned(),
                controller: Some(true),
                block_owner_deletion: Some(true),
            }]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    }
}

/// The status after a Job was started.
pub(in crate::controllers) fn started(cron: &CronJob, due: Timestamp) -> CronJob {
    let mut new = cron.clone();
    new.status.get_or_insert_default().last_schedule_time = Some(Time(due));
    new
}

fn name(job: &Job) -> String {
    objects::name(&job.metadata).to_owned()
}

#[cfg(test)]
mod tests;
