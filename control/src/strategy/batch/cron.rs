//! CronJobs.

use jiff::tz::TimeZone;
use k8s_openapi::api::batch::v1::{CronJob, JobTemplateSpec};

use super::super::rules::{invalid, not_negative, one_of};
use super::super::{Causes, Object, names};
use super::{defaults_of_parts, job_spec};
use crate::cron::Schedule;

const POLICIES: [&str; 3] = ["Allow", "Forbid", "Replace"];
const SUCCESSFUL_KEPT: i32 = 3;
const FAILED_KEPT: i32 = 1;
/// The names of its Jobs have eleven characters more, and are values of labels.
const MOST_NAME: usize = 52;

impl Object for CronJob {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn set_defaults(&mut self) {
        let spec = &mut self.spec;
        let policy = spec.concurrency_policy.take().filter(|policy| !policy.is_empty());
        spec.concurrency_policy = Some(policy.unwrap_or_else(|| "Allow".to_owned()));
        spec.suspend.get_or_insert(false);
        spec.successful_jobs_history_limit.get_or_insert(SUCCESSFUL_KEPT);
        spec.failed_jobs_history_limit.get_or_insert(FAILED_KEPT);
        if let Some(job) = &mut spec.job_template.spec {
            defaults_of_parts(job);
        }
        if let Some(meta) = &mut spec.job_template.metadata {
            // The service sets this one, and it means nothing here.
            meta.creation_timestamp = None;
        }
    }

    fn validate(&self, causes: &mut Causes) {
        let name = self.metadata.name.as_deref().unwrap_or_default();
        if name.len() > MOST_NAME {
            let rule = format!("must be no more than {MOST_NAME} characters");
            invalid("metadata.name", name, &rule, causes);
        }
        let spec = &self.spec;
        schedule(&spec.schedule, causes);
        time_zone(spec.time_zone.as_deref(), causes);
        not_negative("spec.startingDeadlineSeconds", spec.starting_deadline_seconds, causes);
        one_of("spec.concurrencyPolicy", spec.concurrency_policy.as_deref(), &POLICIES, causes);
        for (part, limit) in [
            ("successfulJobsHistoryLimit", spec.successful_jobs_history_limit),
            ("failedJobsHistoryLimit", spec.failed_jobs_history_limit),
        ] {
            not_negative(&format!("spec.{part}"), limit.map(i64::from), causes);
        }
        template(&spec.job_template, causes);
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }
}

fn template(template: &JobTemplateSpec, causes: &mut Causes) {
    if let Some(meta) = &template.metadata {
        names::labels("spec.jobTemplate.metadata.labels", meta.labels.as_ref(), causes);
        let field = "spec.jobTemplate.metadata.annotations";
        names::annotations(field, meta.annotations.as_ref(), causes);
    }
    let Some(job) = &template.spec else {
        causes.add("spec.jobTemplate.spec", "Required value");
        return;
    };
    // Each of its Jobs has its own.
    if let Some(selector) = &job.selector {
        let text = serde_json::to_string(selector).unwrap_or_default();
        let text = format!("Invalid value: {text}: `selector` will be auto-generated");
        causes.add("spec.jobTemplate.spec.selector", text);
    }
    if job.manual_selector == Some(true) {
        let text = "Unsupported value: true: supported values: \"nil\", \"false\"";
        causes.add("spec.jobTemplate.spec.manualSelector", text);
    }
    job_spec("spec.jobTemplate.spec", job, causes);
}

fn schedule(text: &str, causes: &mut Causes) {
    let field = "spec.schedule";
    if text.is_empty() {
        causes.add(field, "Required value");
    } else if text.contains("TZ") {
        let rule = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
        invalid(field, text, rule, causes);
    } else if let Err(error) = Schedule::parse(text) {
        invalid(field, text, &error, causes);
    }
}

fn time_zone(name: Option<&str>, causes: &mut Causes) {
    let Some(name) = name else { return };
    let field = "spec.timeZone";
    if name.is_empty() {
        invalid(field, name, "timeZone must be nil or non-empty string", causes);
    } else if TimeZone::get(name).is_err() {
        invalid(field, name, &format!("unknown time zone {name}"), causes);
    }
}
