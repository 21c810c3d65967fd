//! A Job's next steps and status, from the Job and its pods. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::batch::v1::{Job, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::ledger::{Ledger, count, end, nonzero, replaces_failed_only};
use super::pod::{Attempt, ended_at, index_of, is_dismissed, is_over, is_tracked};
use super::rules::{self, Failure};
use super::verdict::{self, Verdict};
use crate::objects;

/// After each failure twice as long until the next pod, until one succeeds.
const FIRST_WAIT: SignedDuration = SignedDuration::from_secs(10);
const LONGEST_WAIT: SignedDuration = SignedDuration::from_mins(6);
/// Pods that are made before the Job is looked at again.
const MOST_AT_ONCE: usize = 500;

/// One change towards what the Job asks for. All of them come after the status was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::controllers) enum Step {
    /// Become the controller of a pod that has none, and count its end.
    Adopt(String),
    /// Let go of a pod whose labels no longer match.
    Disown(String),
    /// Take the finalizer off a pod: its end is counted, or does not count.
    Release(String),
    /// Delete a pod that nobody needs; it counts for nothing.
    Discard(String),
    /// Delete a pod of a Job that is over.
    Delete(String),
    /// Create a pod for each of these.
    Create(Vec<Attempt>),
    /// Delete the Job.
    Remove,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adopt(pod) => write!(f, "adopt pod {pod}"),
            Self::Disown(pod) => write!(f, "let go of pod {pod}"),
            Self::Release(pod) => write!(f, "pod {pod} is counted"),
            Self::Discard(pod) => write!(f, "discard pod {pod}"),
            Self::Delete(pod) => write!(f, "delete pod {pod}"),
            Self::Create(pods) => write!(f, "create {} pods", pods.len()),
            Self::Remove => write!(f, "delete the job"),
        }
    }
}

/// What to store, what to do then, and when to look again although nothing changed.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::controllers) struct Plan {
    pub(in crate::controllers) status: JobStatus,
    pub(in crate::controllers) steps: Vec<Step>,
    pub(in crate::controllers) look_again: Option<Timestamp>,
}

/// Plans for `job`. `pods` are those that name it as their controller, and, where its selector is people's, others that it may adopt.
pub(in crate::controllers) fn plan(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let status = job.status.clone().unwrap_or_default();
    let uid = objects::uid(&job.metadata);
    let (own, others): (Vec<_>, Vec<_>) =
        pods.iter().cloned().partition(|pod| objects::is_controlled_by(&pod.metadata, uid));
    let Some(spec) = &job.spec else {
        return Plan { status, steps: Vec::new(), look_again: None };
    };
    let over = verdict::over_since(&status);
    if objects::is_terminating(&job.metadata) || over.is_some() {
        return afterwards(job, spec, status, &own, over.map(|(at, _)| at), now);
    }
    let (own, strays): (Vec<_>, Vec<_>) =
        own.into_iter().partition(|pod| is_ours(spec, pod) || is_over(pod));
    let mut plan = Living { spec, now, status, pods: &own }.plan();
    let adoptable = others.iter().filter(|pod| {
        objects::controller_of(&pod.metadata).is_none()
            && is_ours(spec, pod)
            && objects::is_active(pod)
    });
    plan.steps.extend(adoptable.map(|pod| Step::Adopt(name(pod))));
    plan.steps.extend(strays.iter().map(|pod| Step::Disown(name(pod))));
    plan
}

/// Whether the Job selects the pod.
pub(super) fn selects(job: &Job, pod: &Pod) -> bool {
    job.spec.as_ref().is_some_and(|spec| is_ours(spec, pod))
}

fn is_ours(spec: &JobSpec, pod: &Pod) -> bool {
    let labels = pod.metadata.labels.as_ref();
    spec.selector.as_ref().is_some_and(|selector| objects::selects(selector, labels))
}

/// The Job is over, or is being deleted: nothing is counted any more, and nothing holds its pods.
fn afterwards(
    job: &Job,
    spec: &JobSpec,
    status: JobStatus,
    own: &[Arc<Pod>],
    over: Option<Timestamp>,
    now: Timestamp,
) -> Plan {
    let tracked = own.iter().filter(|pod| is_tracked(&pod.metadata));
    let mut steps: Vec<Step> = tracked.map(|pod| Step::Release(name(pod))).collect();
    let ttl = spec.ttl_seconds_after_finished.map(|secs| SignedDuration::from_secs(secs.into()));
    let gone_at = over
        .zip(ttl)
        .filter(|_| !objects::is_terminating(&job.metadata))
        .map(|(over, ttl)| over.saturating_add(ttl).unwrap_or(Timestamp::MAX));
    if gone_at.is_some_and(|at| at <= now) {
        steps.push(Step::Remove);
    }
    Plan { status, steps, look_again: gone_at.filter(|at| *at > now) }
}

/// A Job that is not over.
struct Living<'a> {
    spec: &'a JobSpec,
    now: Timestamp,
    status: JobStatus,
    pods: &'a [Arc<Pod>],
}

impl<'a> Living<'a> {
    fn plan(mut self) -> Plan {
        let stamp = whole(self.now);
        self.begin_or_pause(stamp);
        let pods = self.pods;
        let ledger = Ledger::of(self.spec, &self.status, pods);
        let goes = |pod: &&Arc<Pod>| objects::is_terminating(&pod.metadata) && !is_over(pod);
        let active: Vec<&Pod> =
            pods.iter().map(|pod| &**pod).filter(|pod| objects::is_active(pod)).collect();
        let terminating = pods.iter().filter(goes).count();
        let decided = Verdict::stored(&self.status)
            .or_else(|| Verdict::reach(self.spec, &self.status, &ledger, &active, self.now));
        let release = ledger.release.iter().cloned().map(Step::Release);
        let mut steps: Vec<Step> = release.collect();
        let mut look_again = verdict::deadline(self.spec, &self.status);
        if let Some(verdict) = &decided {
            verdict.announce(&mut self.status, stamp);
            steps.extend(ledger.held.iter().cloned().map(Step::Release));
            steps.extend(active.iter().map(|pod| Step::Delete(name(pod))));
            let tracked = pods.iter().any(|pod| is_tracked(&pod.metadata));
            if active.is_empty() && terminating == 0 && ledger.is_settled() && !tracked {
                verdict.conclude(&mut self.status, stamp);
            }
            look_again = None;
        } else {
            let held = self.balance(&ledger, &active, terminating, &mut steps);
            look_again = look_again.into_iter().chain(held).min();
        }
        let ready = active.iter().filter(|pod| objects::ready_since(pod).is_some()).count();
        self.status.active = nonzero(count(active.len()));
        self.status.ready = Some(count(ready));
        self.status.terminating = Some(count(terminating));
        ledger.write(&mut self.status);
        Plan { status: self.status, steps, look_again }
    }

    /// Notes when the Job began, again each time that it is resumed.
    fn begin_or_pause(&mut self, stamp: Timestamp) {
        let paused = verdict::condition(&self.status, "Suspended");
        let was_paused = paused.is_some_and(|found| found.status == "True");
        if self.spec.suspend == Some(true) {
            if Verdict::stored(&self.status).is_none() {
                let (reason, message) = ("JobSuspended", "Job suspended");
                verdict::set(&mut self.status, "Suspended", true, reason, message, stamp);
            }
            return;
        }
        if was_paused {
            let (reason, message) = ("JobResumed", "Job resumed");
            verdict::set(&mut self.status, "Suspended", false, reason, message, stamp);
            self.status.start_time = Some(Time(stamp));
        }
        self.status.start_time.get_or_insert(Time(stamp));
    }

    /// As many pods as there should be. Returns until when the next ones are held back.
    fn balance(
        &self,
        ledger: &Ledger,
        active: &[&'a Pod],
        terminating: usize,
        steps: &mut Vec<Step>,
    ) -> Option<Timestamp> {
        if self.spec.suspend == Some(true) {
            steps.extend(active.iter().map(|pod| Step::Discard(name(pod))));
            return None;
        }
        let (useless, mut useful) = self.by_use(ledger, active);
        steps.extend(useless.iter().map(|pod| Step::Discard(name(pod))));
        let wanted = self.wanted(ledger, useful.len());
        if useful.len() > wanted {
            useful.sort_by_cached_key(|pod| rank(pod));
            let surplus = &useful[..useful.len() - wanted];
            steps.extend(surplus.iter().map(|pod| Step::Discard(name(pod))));
            return None;
        }
        let occupied = if replaces_failed_only(self.spec) { terminating } else { 0 };
        let missing = wanted.saturating_sub(useful.len() + occupied);
        if missing == 0 {
            return None;
        }
        let (attempts, held) = match &ledger.completed {
            Some(_) if self.spec.backoff_limit_per_index.is_some() => {
                self.next_of_each(ledger, &useful, missing)
            }
            _ => match self.held_until().filter(|until| self.holds(*until)) {
                Some(until) => (Vec::new(), Some(until)),
                None => (self.next(ledger, &useful, missing), None),
            },
        };
        if !attempts.is_empty() {
            steps.push(Step::Create(attempts));
        }
        held
    }

    /// How many pods should run.
    fn wanted(&self, ledger: &Ledger, active: usize) -> usize {
        let parallelism = usize::try_from(self.spec.parallelism.unwrap_or(1)).unwrap_or(0);
        match self.spec.completions {
            // Once a pod of a work queue succeeds, the others finish what they have.
            None if ledger.succeeded() > 0 => active.min(parallelism),
            None => parallelism,
            Some(completions) => {
                let failed = i32::try_from(ledger.failed_indexes.len()).unwrap_or(i32::MAX);
                let left = completions.saturating_sub(ledger.succeeded()).saturating_sub(failed);
                usize::try_from(left).unwrap_or(0).min(parallelism)
            }
        }
    }

    /// The pods that work on nothing that is wanted, or on what another one works on, and the rest.
    fn by_use(&self, ledger: &Ledger, active: &[&'a Pod]) -> (Vec<&'a Pod>, Vec<&'a Pod>) {
        if ledger.completed.is_none() {
            return (Vec::new(), active.to_vec());
        }
        let mut seen = BTreeSet::new();
        let mut oldest_first = active.to_vec();
        oldest_first.sort_by_key(|pod| (objects::created(&pod.metadata), name(pod)));
        oldest_first.into_iter().partition(|pod| {
            let index = index_of(pod).filter(|index| *index < end(self.spec));
            index.is_none_or(|index| !ledger.is_open(index) || !seen.insert(index))
        })
    }

    /// The next pods, of the first indexes that nobody works on.
    fn next(&self, ledger: &Ledger, useful: &[&Pod], missing: usize) -> Vec<Attempt> {
        let missing = missing.min(MOST_AT_ONCE);
        if ledger.completed.is_none() {
            return vec![Attempt::default(); missing];
        }
        let attempt = |index| Attempt { index: Some(index), ..Attempt::default() };
        self.free(ledger, useful).take(missing).map(attempt).collect()
    }

    /// Indexes that nobody works on, and that are not done.
    fn free<'b>(&self, ledger: &'b Ledger, useful: &[&Pod]) -> impl Iterator<Item = u32> + use<'b> {
        let mut taken: BTreeSet<u32> = useful.iter().filter_map(|pod| index_of(pod)).collect();
        if replaces_failed_only(self.spec) {
            let going = self.pods.iter().filter(|pod| !is_over(pod));
            taken.extend(going.filter_map(|pod| index_of(pod)));
        }
        let end = end(self.spec);
        let open = ledger.completed.iter().flat_map(move |all| all.missing(end));
        open.filter(move |index| ledger.is_open(*index) && !taken.contains(index))
    }

    /// The same where each index has a limit and waits of its own; and when the first of those that wait is due.
    fn next_of_each(
        &self,
        ledger: &Ledger,
        useful: &[&Pod],
        missing: usize,
    ) -> (Vec<Attempt>, Option<Timestamp>) {
        let failed = self.last_failures();
        let (mut attempts, mut held) = (Vec::new(), None::<Timestamp>);
        for index in self.free(ledger, useful) {
            if attempts.len() == missing.min(MOST_AT_ONCE) {
                break;
            }
            let (attempt, at) = match failed.get(&index) {
                Some((attempt, ended)) => (*attempt, wait(*ended, attempt.tries())),
                None => (Attempt { index: Some(index), ..Attempt::default() }, Timestamp::MIN),
            };
            if self.holds(at) {
                held = held.into_iter().chain([at]).min();
            } else {
                attempts.push(attempt);
            }
        }
        (attempts, held)
    }

    /// By index: what the next pod has to know of the failures, and when the last one was.
    fn last_failures(&self) -> BTreeMap<u32, (Attempt, Timestamp)> {
        let mut last: BTreeMap<u32, (Attempt, Timestamp)> = BTreeMap::new();
        let counts = |pod: &&Arc<Pod>| {
            let goes = objects::is_terminating(&pod.metadata) && objects::phase(pod) != "Succeeded";
            !is_dismissed(pod) && (objects::phase(pod) == "Failed" || goes)
        };
        for pod in self.pods.iter().filter(counts) {
            let Some(index) = index_of(pod) else { continue };
            let mut next = Attempt::of(pod);
            match rules::failure(self.spec, pod) {
                Failure::Ignored => next.ignored = next.ignored.saturating_add(1),
                _ => next.failures = next.failures.saturating_add(1),
            }
            // One that is being deleted is replaced at once, if at all.
            let ended = if is_over(pod) { ended_at(pod) } else { Timestamp::MIN };
            if last.get(&index).is_none_or(|(known, _)| known.tries() < next.tries()) {
                last.insert(index, (next, ended));
            }
        }
        last
    }

    /// Whether that is still to come. Ends that are told by a node whose clock is far ahead hold nobody up.
    fn holds(&self, until: Timestamp) -> bool {
        let most = self.now.saturating_add(LONGEST_WAIT).unwrap_or(Timestamp::MAX);
        until > self.now && until <= most
    }

    /// When the next pod may be made: later after each failure since the last success. It follows from the pods that are still
    /// there, so a restart of the service forgets nothing.
    fn held_until(&self) -> Option<Timestamp> {
        let has_ended = |pod: &Pod| objects::have_ended(pod) && !is_dismissed(pod);
        let is_success = |pod: &&Arc<Pod>| objects::phase(pod) == "Succeeded";
        let (good, bad): (Vec<_>, Vec<_>) =
            self.pods.iter().filter(|pod| has_ended(pod)).partition(is_success);
        let success = good.iter().map(|pod| ended_at(pod)).max();
        let failures: Vec<Timestamp> = bad
            .iter()
            .map(|pod| ended_at(pod))
            .filter(|at| success.is_none_or(|s| *at > s))
            .collect();
        let last = failures.iter().max()?;
        Some(wait(*last, u32::try_from(failures.len()).unwrap_or(u32::MAX)))
    }
}

/// When the next pod may be made after so many failures.
fn wait(last: Timestamp, failures: u32) -> Timestamp {
    let doublings = failures.saturating_sub(1).min(16);
    let wait = (FIRST_WAIT * (1 << doublings)).min(LONGEST_WAIT);
    last.saturating_add(wait).unwrap_or(Timestamp::MAX)
}

/// Those that people miss least come first.
fn rank(pod: &Pod) -> (bool, bool, bool, std::cmp::Reverse<Timestamp>, String) {
    (
        objects::node_of(pod).is_some(),
        objects::phase(pod) == "Running",
        objects::ready_since(pod).is_some(),
        std::cmp::Reverse(objects::created(&pod.metadata)),
        name(pod),
    )
}

fn name(pod: &Pod) -> String {
    objects::name(&pod.metadata).to_owned()
}

/// A status holds whole seconds.
fn whole(now: Timestamp) -> Timestamp {
    Timestamp::from_second(now.as_second()).unwrap_or(now)
}

#[cfg(test)]
mod tests;
