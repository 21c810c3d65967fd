//! Whether a Job is over, and what its conditions say. Pure.

use k8s_openapi::api::batch::v1::{JobCondition, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::ledger::Ledger;
use super::pod::statuses;
use super::rules;
use crate::objects;

/// How a Job ends. It is decided first, and said for good when none of its pods is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) success: bool,
    pub(super) reason: String,
    pub(super) message: String,
}

impl Verdict {
    fn new(success: bool, reason: &str, message: impl Into<String>) -> Self {
        Self { success, reason: reason.to_owned(), message: message.into() }
    }

    /// The condition that says what is decided, and the one that says that it is done.
    fn types(&self) -> [&'static str; 2] {
        if self.success { ["SuccessCriteriaMet", "Complete"] } else { ["FailureTarget", "Failed"] }
    }

    /// What was decided before.
    pub(super) fn stored(status: &JobStatus) -> Option<Self> {
        [true, false].into_iter().find_map(|success| {
            let [type_, _] = Self::new(success, "", "").types();
            let found = condition(status, type_).filter(|found| found.status == "True")?;
            let text = |field: &Option<String>| field.clone().unwrap_or_default();
            Some(Self { success, reason: text(&found.reason), message: text(&found.message) })
        })
    }

    /// What follows from what happened; `active` are the pods that run on.
    pub(super) fn reach(
        spec: &JobSpec,
        status: &JobStatus,
        ledger: &Ledger,
        active: &[&Pod],
        now: Timestamp,
    ) -> Option<Self> {
        if let Some(why) = &ledger.ends_job {
            return Some(Self::new(false, "PodFailurePolicy", why));
        }
        if ledger.failed() > limit(spec) || restarts_exceed(spec, active) {
            let message = "Job has reached the specified backoff limit";
            return Some(Self::new(false, "BackoffLimitExceeded", message));
        }
        if deadline(spec, status).is_some_and(|deadline| deadline <= now) {
            let message = "Job was active longer than specified deadline";
            return Some(Self::new(false, "DeadlineExceeded", message));
        }
        let lost = i32::try_from(ledger.failed_indexes.len()).unwrap_or(i32::MAX);
        if spec.max_failed_indexes.is_some_and(|most| lost > most) {
            let message = "Job has exceeded the specified maximal number of failed indexes";
            return Some(Self::new(false, "MaxFailedIndexesExceeded", message));
        }
        let all = ledger.succeeded().saturating_add(lost);
        if lost > 0 && spec.completions.is_some_and(|wanted| all >= wanted) {
            return Some(Self::new(false, "FailedIndexes", "Job has failed indexes"));
        }
        let completed = ledger.completed.as_ref();
        let rule = completed.and_then(|all| rules::enough(spec.success_policy.as_ref(), all));
        if let Some(rule) = rule {
            let message = format!("Matched rules at index {rule}");
            return Some(Self::new(true, "SuccessPolicy", message));
        }
        let enough = match spec.completions {
            Some(wanted) => ledger.succeeded() >= wanted,
            None => ledger.succeeded() > 0,
        };
        let message = "Reached expected number of succeeded pods";
        (enough && active.is_empty()).then(|| Self::new(true, "CompletionsReached", message))
    }

    /// Says what is decided.
    pub(super) fn announce(&self, status: &mut JobStatus, now: Timestamp) {
        self.put(self.types()[0], status, now);
    }

    /// Says that it is done.
    pub(super) fn conclude(&self, status: &mut JobStatus, now: Timestamp) {
        self.put(self.types()[1], status, now);
        if self.success {
            status.completion_time = Some(Time(now));
        }
    }

    fn put(&self, type_: &str, status: &mut JobStatus, now: Timestamp) {
        set(status, type_, true, &self.reason, &self.message, now);
    }
}

/// The condition of that type.
pub(super) fn condition<'a>(status: &'a JobStatus, type_: &str) -> Option<&'a JobCondition> {
    status.conditions.iter().flatten().find(|condition| condition.type_ == type_)
}

/// Sets a condition, unless it says that already.
pub(super) fn set(
    status: &mut JobStatus,
    type_: &str,
    is: bool,
    reason: &str,
    message: &str,
    now: Timestamp,
) {
    let word = if is { "True" } else { "False" };
    if condition(status, type_).is_some_and(|found| found.status == word) {
        return;
    }
    let conditions = status.conditions.get_or_insert_default();
    conditions.retain(|found| found.type_ != type_);
    conditions.push(JobCondition {
        type_: type_.to_owned(),
        status: word.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    });
}

/// Since when the Job is over, and whether it succeeded.
pub(in crate::controllers) fn over_since(status: &JobStatus) -> Option<(Timestamp, bool)> {
    [("Complete", true), ("Failed", false)].into_iter().find_map(|(type_, success)| {
        let found = condition(status, type_).filter(|found| found.status == "True")?;
        let at = found.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
        Some((at, success))
    })
}

/// A reason of failure, as Events have it.
pub(super) fn reason(text: &str) -> &'static str {
    const ALL: [&str; 5] = [
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "FailedIndexes",
        "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
    ];
    ALL.into_iter().find(|reason| *reason == text).unwrap_or("Failed")
}

/// When the Job has run for too long.
pub(super) fn deadline(spec: &JobSpec, status: &JobStatus) -> Option<Timestamp> {
    let secs = spec.active_deadline_seconds.filter(|_| spec.suspend != Some(true))?;
    let begun = status.start_time.as_ref()?.0;
    Some(begun.saturating_add(SignedDuration::from_secs(secs)).unwrap_or(Timestamp::MAX))
}

fn limit(spec: &JobSpec) -> i32 {
    spec.backoff_limit.unwrap_or(6)
}

/// Containers that are restarted in their pods count as well, where that is how the Job tries again.
fn restarts_exceed(spec: &JobSpec, active: &[&Pod]) -> bool {
    let template = spec.template.spec.as_ref();
    if template.and_then(|pod| pod.restart_policy.as_deref()) != Some("OnFailure") {
        return false;
    }
    let running = active.iter().filter(|pod| matches!(objects::phase(pod), "Pending" | "Running"));
    let restarts = running.flat_map(|pod| statuses(pod)).map(|status| status.restart_count);
    let restarts = restarts.fold(0_i32, i32::saturating_add);
    restarts > 0 && restarts >= limit(spec)
}
