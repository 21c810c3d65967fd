//! The rules for what a Job makes of the ends of its pods.

use k8s_openapi::api::batch::v1::{
    JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement,
    PodFailurePolicyOnPodConditionsPattern, SuccessPolicy,
};

use super::super::rules::{at_least, duplicate, invalid, one_of, required};
use super::super::{Causes, names};
use super::is_indexed;
use crate::indexes::Indexes;

const ACTIONS: [&str; 4] = ["Count", "FailIndex", "FailJob", "Ignore"];
const MOST_RULES: usize = 20;
const MOST_PATTERNS: usize = 20;
const MOST_CODES: usize = 255;

pub(super) fn failure(field: &str, policy: &PodFailurePolicy, spec: &JobSpec, causes: &mut Causes) {
    at_most(&format!("{field}.rules"), policy.rules.len(), MOST_RULES, causes);
    for (i, rule) in policy.rules.iter().enumerate() {
        let at = |part: &str| format!("{field}.rules[{i}].{part}");
        one_of(&at("action"), Some(&rule.action), &ACTIONS, causes);
        if rule.action == "FailIndex" && spec.backoff_limit_per_index.is_none() {
            let text = "requires the backoffLimitPerIndex to be set";
            invalid(at("action"), &rule.action, text, causes);
        }
        let patterns = rule.on_pod_conditions.as_deref().unwrap_or_default();
        match (&rule.on_exit_codes, patterns.is_empty()) {
            (Some(codes), true) => exit_codes(&at("onExitCodes"), codes, spec, causes),
            (None, false) => conditions(&at("onPodConditions"), patterns, causes),
            (given, _) => {
                let text = if given.is_some() {
                    "specifying both OnExitCodes and OnPodConditions is not supported"
                } else {
                    "specifying one of OnExitCodes and OnPodConditions is required"
                };
                let field = format!("{field}.rules[{i}]");
                causes.add(field, format!("Invalid value: {{}}: {text}"));
            }
        }
    }
}

fn exit_codes(
    field: &str,
    codes: &PodFailurePolicyOnExitCodesRequirement,
    spec: &JobSpec,
    causes: &mut Causes,
) {
    let at = |part: &str| format!("{field}.{part}");
    one_of(&at("operator"), Some(&codes.operator), &["In", "NotIn"], causes);
    if let Some(name) = &codes.container_name {
        let pod = spec.template.spec.iter();
        let mut all =
            pod.flat_map(|pod| pod.containers.iter().chain(pod.init_containers.iter().flatten()));
        if all.all(|container| container.name != *name) {
            let rule = "must be one of the container or initContainer names in the pod template";
            invalid(at("containerName"), name, rule, causes);
        }
    }
    if codes.values.is_empty() {
        let field = at("values");
        causes.add(field, "Invalid value: []: at least one value is required");
    }
    at_most(&at("values"), codes.values.len(), MOST_CODES, causes);
    for (i, value) in codes.values.iter().enumerate() {
        let field = format!("{field}.values[{i}]");
        if *value == 0 && codes.operator == "In" {
            invalid(&field, value, "must not be 0 for the In operator", causes);
        }
        if codes.values[..i].contains(value) {
            duplicate(&field, value, causes);
        }
    }
    if !codes.values.is_sorted() {
        invalid(at("values"), &codes.values, "must be ordered", causes);
    }
}

fn conditions(
    field: &str,
    patterns: &[PodFailurePolicyOnPodConditionsPattern],
    causes: &mut Causes,
) {
    at_most(field, patterns.len(), MOST_PATTERNS, causes);
    for (i, pattern) in patterns.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        if !names::is_qualified(&pattern.type_) {
            invalid(at("type"), &pattern.type_, "must be the type of a condition", causes);
        }
        let status = pattern.status.as_deref();
        one_of(&at("status"), status, &["False", "True", "Unknown"], causes);
    }
}

pub(super) fn success(field: &str, policy: &SuccessPolicy, spec: &JobSpec, causes: &mut Causes) {
    if !is_indexed(spec) {
        causes.add(field, "Invalid value: {}: requires indexed completion mode");
        return;
    }
    if policy.rules.is_empty() {
        required(format!("{field}.rules"), causes);
    }
    at_most(&format!("{field}.rules"), policy.rules.len(), MOST_RULES, causes);
    let completions = spec.completions.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    for (i, rule) in policy.rules.iter().enumerate() {
        let at = |part: &str| format!("{field}.rules[{i}].{part}");
        let mut most = completions;
        if let Some(text) = &rule.succeeded_indexes {
            match Indexes::parse(text)
                .filter(|indexes| !indexes.is_empty() && indexes.last() < Some(completions))
            {
                Some(indexes) => most = indexes.len(),
                None => {
                    let rule = format!(
                        "must be ascending indexes and ranges of them below {completions}, such as \"1,3-5\""
                    );
                    invalid(at("succeededIndexes"), text, &rule, causes);
                }
            }
        } else if rule.succeeded_count.is_none() {
            let text = "Required value: at least one of succeededCount or succeededIndexes must be specified";
            causes.add(format!("{field}.rules[{i}]"), text);
        }
        at_least(&at("succeededCount"), rule.succeeded_count.map(i64::from), 1, causes);
        if let Some(count) = rule.succeeded_count.filter(|count| i64::from(*count) > most.into()) {
            let rule = format!("must be less than or equal to {most}, the number of indexes");
            invalid(at("succeededCount"), count, &rule, causes);
        }
    }
}

fn at_most(field: &str, count: usize, most: usize, causes: &mut Causes) {
    if count > most {
        causes.add(field, format!("Too many: {count}: must have at most {most} items"));
    }
}
