//! How a Job counts the ends of its pods: each once, whoever is killed in between. Pure.
//!
//! A pod that ended is noted by its unique id in the status, in the same write as what follows from it; only then it loses the
//! finalizer, and only when that is seen the note becomes a number, in one write again. An index that succeeded is its own note.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::batch::v1::{JobSpec, JobStatus, UncountedTerminatedPods};
use k8s_openapi::api::core::v1::Pod;

use super::pod::{Attempt, index_of, is_over, is_tracked};
use super::rules::{self, Failure};
use crate::indexes::Indexes;
use crate::objects;

/// The ends of a Job's pods, as its status is to tell them.
pub(super) struct Ledger {
    /// Of an Indexed Job only.
    pub(super) completed: Option<Indexes>,
    /// Indexes that failed for good, where each has a limit of its own.
    pub(super) failed_indexes: Indexes,
    /// Pods that are counted, and by which the next one of their index learns how often it failed.
    pub(super) held: Vec<String>,
    /// Pods that may lose their finalizer once the status is stored.
    pub(super) release: Vec<String>,
    /// Why a rule ends the Job.
    pub(super) ends_job: Option<String>,
    succeeded: i32,
    failed: i32,
    noted_succeeded: BTreeSet<String>,
    noted_failed: BTreeSet<String>,
}

impl Ledger {
    /// What the status says, and what `pods`, all of them the Job's, add to it.
    pub(super) fn of(spec: &JobSpec, status: &JobStatus, pods: &[Arc<Pod>]) -> Self {
        let mut ledger = Self::read(spec, status);
        ledger.settle(pods);
        let mut counted = Vec::new();
        for pod in pods.iter().filter(|pod| is_tracked(&pod.metadata)) {
            if ledger.look(spec, pod) {
                counted.push(&**pod);
            }
        }
        ledger.let_go(spec, &counted, pods);
        ledger
    }

    fn read(spec: &JobSpec, status: &JobStatus) -> Self {
        let noted = status.uncounted_terminated_pods.as_ref();
        let set = |list: Option<&Vec<String>>| list.into_iter().flatten().cloned().collect();
        let completed = is_indexed(spec).then(|| {
            let text = status.completed_indexes.as_deref().unwrap_or_default();
            let mut completed = Indexes::parse(text).unwrap_or_default();
            completed.truncate(end(spec));
            completed
        });
        let failed = Indexes::parse(status.failed_indexes.as_deref().unwrap_or_default());
        let mut failed_indexes = failed.unwrap_or_default();
        failed_indexes.truncate(end(spec));
        Self {
            completed,
            failed_indexes,
            held: Vec::new(),
            release: Vec::new(),
            ends_job: None,
            succeeded: status.succeeded.unwrap_or(0),
            failed: status.failed.unwrap_or(0),
            noted_succeeded: set(noted.and_then(|noted| noted.succeeded.as_ref())),
            noted_failed: set(noted.and_then(|noted| noted.failed.as_ref())),
        }
    }

    /// Makes numbers of the notes about pods that have no finalizer any more.
    fn settle(&mut self, pods: &[Arc<Pod>]) {
        let by_uid: HashMap<&str, &Pod> =
            pods.iter().map(|pod| (objects::uid(&pod.metadata), &**pod)).collect();
        let is_open =
            |uid: &String| by_uid.get(uid.as_str()).is_some_and(|pod| is_tracked(&pod.metadata));
        for (notes, number) in [
            (&mut self.noted_succeeded, &mut self.succeeded),
            (&mut self.noted_failed, &mut self.failed),
        ] {
            let before = notes.len();
            notes.retain(is_open);
            *number = number.saturating_add(count(before - notes.len()));
        }
    }

    /// Whether the pod has ended, and that is counted.
    fn look(&mut self, spec: &JobSpec, pod: &Pod) -> bool {
        let uid = objects::uid(&pod.metadata);
        if self.noted_succeeded.contains(uid) || self.noted_failed.contains(uid) {
            return true;
        }
        let index = index_of(pod).filter(|index| *index < end(spec));
        let is_nobody = self.completed.is_some() && index.is_none();
        if objects::phase(pod) == "Succeeded" {
            match (&mut self.completed, index) {
                (Some(completed), Some(index)) => completed.insert(index),
                (Some(_), None) => {}
                (None, _) => self.noted_succeeded.extend([uid.to_owned()]),
            }
        } else if has_failed(spec, pod) {
            match rules::failure(spec, pod) {
                Failure::Ignored => {}
                Failure::Counts | Failure::EndsIndex if is_nobody => {}
                Failure::Counts => {
                    self.noted_failed.extend([uid.to_owned()]);
                    let failures = i64::from(Attempt::of(pod).failures) + 1;
                    let limit = spec.backoff_limit_per_index.map(i64::from);
                    if let Some(index) = index.filter(|_| limit.is_some_and(|most| failures > most))
                    {
                        self.failed_indexes.insert(index);
                    }
                }
                Failure::EndsIndex => {
                    self.noted_failed.extend([uid.to_owned()]);
                    index.into_iter().for_each(|index| self.failed_indexes.insert(index));
                }
                Failure::EndsJob(why) => {
                    self.noted_failed.extend([uid.to_owned()]);
                    self.ends_job.get_or_insert(why);
                }
            }
        } else {
            return false;
        }
        true
    }

    /// Of the pods that are counted, those of which nobody has to learn anything any more.
    fn let_go(&mut self, spec: &JobSpec, counted: &[&Pod], pods: &[Arc<Pod>]) {
        let mut newest: HashMap<u32, u32> = HashMap::new();
        if spec.backoff_limit_per_index.is_some() {
            for attempt in pods.iter().map(|pod| Attempt::of(pod)) {
                let Some(index) = attempt.index else { continue };
                let tries = newest.entry(index).or_default();
                *tries = attempt.tries().max(*tries);
            }
        }
        for pod in counted {
            let attempt = Attempt::of(pod);
            let is_last = |index| newest.get(&index).is_some_and(|most| *most <= attempt.tries());
            let needed = attempt.index.is_some_and(|index| self.is_open(index) && is_last(index));
            let list = if needed { &mut self.held } else { &mut self.release };
            list.push(objects::name(&pod.metadata).to_owned());
        }
    }

    /// Whether an index has neither succeeded nor failed for good.
    pub(super) fn is_open(&self, index: u32) -> bool {
        let completed = self.completed.as_ref().is_some_and(|all| all.contains(index));
        !completed && !self.failed_indexes.contains(index)
    }

    /// All that succeeded, those included that are only noted.
    pub(super) fn succeeded(&self) -> i32 {
        match &self.completed {
            Some(completed) => i32::try_from(completed.len()).unwrap_or(i32::MAX),
            None => self.succeeded.saturating_add(count(self.noted_succeeded.len())),
        }
    }

    /// All failures that count, those included that are only noted.
    pub(super) fn failed(&self) -> i32 {
        self.failed.saturating_add(count(self.noted_failed.len()))
    }

    /// Whether no note is left to become a number.
    pub(super) fn is_settled(&self) -> bool {
        self.noted_succeeded.is_empty() && self.noted_failed.is_empty()
    }

    /// Puts it into the status.
    pub(super) fn write(&self, status: &mut JobStatus) {
        let list = |set: &BTreeSet<String>| {
            (!set.is_empty()).then(|| set.iter().cloned().collect::<Vec<_>>())
        };
        let succeeded = match &self.completed {
            Some(_) => self.succeeded(),
            None => self.succeeded,
        };
        status.succeeded = nonzero(succeeded);
        status.failed = nonzero(self.failed);
        let text = self.completed.as_ref().map(ToString::to_string);
        status.completed_indexes = text.filter(|text| !text.is_empty());
        let text = self.failed_indexes.to_string();
        status.failed_indexes = Some(text).filter(|text| !text.is_empty());
        status.uncounted_terminated_pods = (!self.is_settled()).then(|| UncountedTerminatedPods {
            succeeded: list(&self.noted_succeeded),
            failed: list(&self.noted_failed),
        });
    }
}

/// Whether the pod will not succeed any more, as far as the Job cares: one that is being deleted may be replaced before it ended.
fn has_failed(spec: &JobSpec, pod: &Pod) -> bool {
    let goes = objects::is_terminating(&pod.metadata) && !replaces_failed_only(spec);
    is_over(pod) || goes
}

/// Whether a pod is replaced only when it has ended, not as soon as it is being deleted.
pub(super) fn replaces_failed_only(spec: &JobSpec) -> bool {
    spec.pod_replacement_policy.as_deref() == Some("Failed")
}

pub(super) fn is_indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some("Indexed")
}

/// The first number that is no index of the Job any more.
pub(super) fn end(spec: &JobSpec) -> u32 {
    spec.completions.and_then(|count| u32::try_from(count).ok()).unwrap_or(0)
}

pub(super) fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

pub(super) fn nonzero(number: i32) -> Option<i32> {
    (number != 0).then_some(number)
}
