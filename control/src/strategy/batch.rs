//! Jobs and CronJobs.

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{Affinity, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::rules::{forbidden, invalid, not_negative, one_of, selector, selects};
use super::workload::{IMMUTABLE, template_defaults};
use super::{Causes, Object, names, pod};
use crate::objects;

mod cron;
mod policies;

/// The labels by which the pods of a Job are known, and those of the same meaning from before Kubernetes 1.27.
const UID_LABELS: [&str; 2] = ["batch.kubernetes.io/controller-uid", "controller-uid"];
const NAME_LABELS: [&str; 2] = ["batch.kubernetes.io/job-name", "job-name"];
const OWN_CONTROLLER: &str = "kubernetes.io/job-controller";
const BACKOFF_LIMIT: i32 = 6;
/// As in Kubernetes: what the status of an Indexed Job can hold. Where each index has a limit, it holds the failed ones, too.
const MOST_INDEXES: i32 = 100_000;
const MOST_LIMITED: i32 = 10_000;
const INDEXED: &str = "Indexed";

impl Object for Job {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn settle_name(&mut self) {
        let Some(spec) = &mut self.spec else { return };
        if spec.manual_selector != Some(true) {
            select_own(&self.metadata, spec);
        }
        if self.metadata.labels.as_ref().is_none_or(|labels| labels.is_empty()) {
            let template = spec.template.metadata.as_ref();
            self.metadata.labels = template.and_then(|meta| meta.labels.clone());
        }
    }

    fn set_defaults(&mut self) {
        if let Some(spec) = &mut self.spec {
            defaults(spec);
        }
    }

    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else {
            causes.add("spec", "Required value");
            return;
        };
        match &spec.selector {
            Some(chosen) => {
                selector("spec.selector", chosen, causes);
                if spec.manual_selector != Some(true) {
                    selected_own(&self.metadata, spec, causes);
                }
            }
            None => causes.add("spec.selector", "Required value"),
        }
        let template = spec.template.metadata.as_ref();
        if spec.selector.as_ref().is_some_and(|chosen| !selects(chosen, template)) {
            let labels = template.and_then(|meta| meta.labels.clone()).unwrap_or_default();
            let rule = "`selector` does not match template `labels`";
            invalid("spec.template.metadata.labels", labels, rule, causes);
        }
        job_spec("spec", spec, causes);
        host_names(&self.metadata, spec, causes);
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let (Some(new), Some(before)) = (&self.spec, &old.spec) else { return };
        let is_begun = old.status.as_ref().is_some_and(|status| status.start_time.is_some());
        let waits = before.suspend == Some(true) && !is_begun;
        frozen(new, before, waits, causes);
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }
}

fn defaults(spec: &mut JobSpec) {
    if spec.completions.is_none() && spec.parallelism.is_none() {
        spec.completions = Some(1);
    }
    spec.parallelism.get_or_insert(1);
    let limit = if spec.backoff_limit_per_index.is_some() { i32::MAX } else { BACKOFF_LIMIT };
    spec.backoff_limit.get_or_insert(limit);
    spec.suspend.get_or_insert(false);
    spec.completion_mode.get_or_insert_with(|| "NonIndexed".to_owned());
    let replacement =
        if spec.pod_failure_policy.is_some() { "Failed" } else { "TerminatingOrFailed" };
    spec.pod_replacement_policy.get_or_insert_with(|| replacement.to_owned());
    defaults_of_parts(spec);
}

/// The defaults that a Job has before it is one, in a CronJob: its own would stay when people change what they follow from.
fn defaults_of_parts(spec: &mut JobSpec) {
    let rules = spec.pod_failure_policy.iter_mut().flat_map(|policy| &mut policy.rules);
    for pattern in rules.flat_map(|rule| rule.on_pod_conditions.iter_mut().flatten()) {
        pattern.status.get_or_insert_with(|| "True".to_owned());
    }
    template_defaults(&mut spec.template);
}

/// Labels the template, and selects by the Job's unique id: no two Jobs count the same pods.
fn select_own(meta: &ObjectMeta, spec: &mut JobSpec) {
    let labels = spec.template.metadata.get_or_insert_default().labels.get_or_insert_default();
    for (keys, value) in [(NAME_LABELS, objects::name(meta)), (UID_LABELS, objects::uid(meta))] {
        for key in keys {
            labels.entry(key.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    let chosen = spec.selector.get_or_insert_default().match_labels.get_or_insert_default();
    let uid = objects::uid(meta).to_owned();
    chosen.entry(UID_LABELS[0].to_owned()).or_insert(uid);
}

/// What the user gave must not contradict what [`select_own`] makes.
fn selected_own(meta: &ObjectMeta, spec: &JobSpec, causes: &mut Causes) {
    let labels = spec.template.metadata.as_ref().and_then(|meta| meta.labels.as_ref());
    for (keys, value) in [(NAME_LABELS, objects::name(meta)), (UID_LABELS, objects::uid(meta))] {
        for key in keys {
            let found = labels.and_then(|labels| labels.get(key));
            if found.is_none_or(|found| found != value) {
                let field = format!("spec.template.metadata.labels[{key}]");
                invalid(
                    field,
                    found.map_or("", String::as_str),
                    &format!("must be '{value}'"),
                    causes,
                );
            }
        }
    }
    let (name, uid) = (objects::name(meta), objects::uid(meta));
    let own =
        NAME_LABELS.map(|key| (key, name)).into_iter().chain(UID_LABELS.map(|key| (key, uid)));
    let own = own.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    if spec.selector.as_ref().is_some_and(|chosen| !objects::selects(chosen, Some(&own))) {
        let text = serde_json::to_string(&spec.selector).unwrap_or_default();
        causes
            .add("spec.selector", format!("Invalid value: {text}: `selector` not auto-generated"));
    }
}

/// The rules for a Job, wherever it stands.
fn job_spec(field: &str, spec: &JobSpec, causes: &mut Causes) {
    let at = |part: &str| format!("{field}.{part}");
    for (part, value) in [
        ("parallelism", spec.parallelism.map(i64::from)),
        ("completions", spec.completions.map(i64::from)),
        ("activeDeadlineSeconds", spec.active_deadline_seconds),
        ("backoffLimit", spec.backoff_limit.map(i64::from)),
        ("backoffLimitPerIndex", spec.backoff_limit_per_index.map(i64::from)),
        ("maxFailedIndexes", spec.max_failed_indexes.map(i64::from)),
        ("ttlSecondsAfterFinished", spec.ttl_seconds_after_finished.map(i64::from)),
    ] {
        not_negative(&at(part), value, causes);
    }
    one_of(
        &at("completionMode"),
        spec.completion_mode.as_deref(),
        &[INDEXED, "NonIndexed"],
        causes,
    );
    if is_indexed(spec) {
        indexed(field, spec, causes);
    }
    limits(field, spec, causes);
    unserved(field, spec, causes);
    let replacement = spec.pod_replacement_policy.as_deref();
    let replacements: &[&str] = match spec.pod_failure_policy {
        Some(_) => &["Failed"],
        None => &["Failed", "TerminatingOrFailed"],
    };
    one_of(&at("podReplacementPolicy"), replacement, replacements, causes);
    if let Some(policy) = &spec.pod_failure_policy {
        policies::failure(&at("podFailurePolicy"), policy, spec, causes);
    }
    if let Some(policy) = &spec.success_policy {
        policies::success(&at("successPolicy"), policy, spec, causes);
    }
    template(&at("template"), spec, causes);
}

fn is_indexed(spec: &JobSpec) -> bool {
    spec.completion_mode.as_deref() == Some(INDEXED)
}

fn indexed(field: &str, spec: &JobSpec, causes: &mut Causes) {
    if spec.completions.is_none() {
        let text = format!("Required value: when completion mode is {INDEXED}");
        causes.add(format!("{field}.completions"), text);
    }
    let mut at_most = |part: &str, value: Option<i32>, most: i32, when: &str| {
        if let Some(value) = value.filter(|value| *value > most) {
            let rule = format!("must be less than or equal to {most} when {when}");
            invalid(format!("{field}.{part}"), value, &rule, causes);
        }
    };
    let is_indexed = format!("completion mode is {INDEXED}");
    at_most("parallelism", spec.parallelism, MOST_INDEXES, &is_indexed);
    at_most("maxFailedIndexes", spec.max_failed_indexes, MOST_INDEXES, &is_indexed);
    let is_large = spec.completions.is_some_and(|count| count > MOST_INDEXES);
    if !is_large || spec.backoff_limit_per_index.is_none() {
        return;
    }
    let when =
        format!("completions are above {MOST_INDEXES} and used with backoff limit per index");
    at_most("parallelism", spec.parallelism, MOST_LIMITED, &when);
    at_most("maxFailedIndexes", spec.max_failed_indexes, MOST_LIMITED, &when);
    if spec.max_failed_indexes.is_none() {
        causes.add(format!("{field}.maxFailedIndexes"), format!("Required value: when {when}"));
    }
}

/// Limits of each index, and of how many may fail.
fn limits(field: &str, spec: &JobSpec, causes: &mut Causes) {
    let (each, most) = (spec.backoff_limit_per_index, spec.max_failed_indexes);
    if let Some(each) = each.filter(|_| !is_indexed(spec)) {
        let field = format!("{field}.backoffLimitPerIndex");
        invalid(field, each, "requires indexed completion mode", causes);
    }
    let Some(most) = most else { return };
    let field = format!("{field}.maxFailedIndexes");
    if each.is_none() {
        causes.add(&field, format!("Invalid value: {most}: requires backoffLimitPerIndex"));
    }
    if spec.completions.is_some_and(|completions| most > completions) {
        invalid(&field, most, "must be less than or equal to completions", causes);
    }
}

/// What Jobs may ask for in Kubernetes, and nobody here would do.
fn unserved(field: &str, spec: &JobSpec, causes: &mut Causes) {
    if spec.managed_by.as_deref().is_some_and(|by| by != OWN_CONTROLLER) {
        forbidden(format!("{field}.managedBy"), "not served here", causes);
    }
}

fn template(field: &str, job: &JobSpec, causes: &mut Causes) {
    let template = &job.template;
    let at = |part: &str| format!("{field}.{part}");
    if let Some(meta) = &template.metadata {
        names::labels(&at("metadata.labels"), meta.labels.as_ref(), causes);
        names::annotations(&at("metadata.annotations"), meta.annotations.as_ref(), causes);
    }
    let Some(spec) = &template.spec else {
        causes.add(at("spec.containers"), "Required value");
        return;
    };
    pod::spec::pod_spec(&at("spec"), spec, causes);
    match spec.restart_policy.as_deref() {
        Some("Always") => {
            let text = "Required value: valid values: \"OnFailure\", \"Never\"";
            causes.add(at("spec.restartPolicy"), text);
        }
        Some(other) if other != "Never" && job.pod_failure_policy.is_some() => {
            let rule = "only \"Never\" is supported when podFailurePolicy is specified";
            invalid(at("spec.restartPolicy"), other, rule, causes);
        }
        _ => {}
    }
}

/// The pods of an Indexed Job are called after it and their index.
fn host_names(meta: &ObjectMeta, spec: &JobSpec, causes: &mut Causes) {
    let last = spec.completions.filter(|count| *count > 0 && is_indexed(spec)).map(|n| n - 1);
    let Some(last) = last else { return };
    let host = format!("{}-{last}", objects::name(meta));
    if !mesh_model::names::is_label(&host) {
        let rule = format!("will not able to create pod with invalid DNS label: {host}");
        invalid("metadata.name", objects::name(meta), &rule, causes);
    }
}

/// What may not change. A Job that waits to begin may still be told where its pods are to run.
fn frozen(new: &JobSpec, old: &JobSpec, waits: bool, causes: &mut Causes) {
    let resized = is_indexed(new) && new.completions == new.parallelism;
    let mut allowed = old.template.clone();
    if waits {
        place(&mut allowed, &new.template);
    }
    for (part, same) in [
        ("completions", new.completions == old.completions || resized),
        ("selector", new.selector == old.selector),
        ("template", new.template == allowed),
        ("completionMode", new.completion_mode == old.completion_mode),
        ("podFailurePolicy", new.pod_failure_policy == old.pod_failure_policy),
        ("successPolicy", new.success_policy == old.success_policy),
        ("backoffLimitPerIndex", new.backoff_limit_per_index == old.backoff_limit_per_index),
        ("managedBy", new.managed_by == old.managed_by),
    ] {
        if !same {
            let text = serde_json::to_value(new).unwrap_or_default()[part].to_string();
            causes.add(format!("spec.{part}"), format!("Invalid value: {text}: {IMMUTABLE}"));
        }
    }
}

/// Takes over from `new` what says where pods run.
fn place(template: &mut PodTemplateSpec, new: &PodTemplateSpec) {
    if let Some(from) = &new.metadata {
        let meta = template.metadata.get_or_insert_default();
        meta.labels.clone_from(&from.labels);
        meta.annotations.clone_from(&from.annotations);
    }
    let (Some(spec), Some(from)) = (&mut template.spec, &new.spec) else { return };
    spec.node_selector.clone_from(&from.node_selector);
    spec.tolerations.clone_from(&from.tolerations);
    spec.scheduling_gates.clone_from(&from.scheduling_gates);
    let node = from.affinity.as_ref().and_then(|affinity| affinity.node_affinity.clone());
    match &mut spec.affinity {
        Some(affinity) => affinity.node_affinity = node,
        None => {
            spec.affinity =
                node.map(|node| Affinity { node_affinity: Some(node), ..Affinity::default() })
        }
    }
}

#[cfg(test)]
mod tests;
