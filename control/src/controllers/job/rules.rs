//! What a Job's policies make of the ends of its pods. Pure.

use k8s_openapi::api::batch::v1::{
    JobSpec, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern,
    SuccessPolicy,
};
use k8s_openapi::api::core::v1::Pod;

use super::pod::statuses;
use crate::indexes::Indexes;
use crate::objects;

/// What a failed pod means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// One more towards the limit.
    Counts,
    /// The end of its index.
    EndsIndex,
    /// Nothing: another one is made.
    Ignored,
    /// The end of the Job, for this reason.
    EndsJob(String),
}

/// What the first rule that is about the pod makes of its failure.
pub(super) fn failure(spec: &JobSpec, pod: &Pod) -> Failure {
    let rules = spec.pod_failure_policy.iter().flat_map(|policy| &policy.rules);
    for (i, rule) in rules.enumerate() {
        let cause = match &rule.on_exit_codes {
            Some(codes) => by_exit_code(codes, pod),
            None => by_condition(rule.on_pod_conditions.as_deref().unwrap_or_default(), pod),
        };
        let Some(cause) = cause else { continue };
        return match rule.action.as_str() {
            "Ignore" => Failure::Ignored,
            "FailIndex" => Failure::EndsIndex,
            "FailJob" => {
                Failure::EndsJob(format!("{cause} matching {} rule at index {i}", rule.action))
            }
            _ => Failure::Counts,
        };
    }
    Failure::Counts
}

/// A container that ended well is not asked about.
fn by_exit_code(codes: &PodFailurePolicyOnExitCodesRequirement, pod: &Pod) -> Option<String> {
    let named = |name: &str| codes.container_name.as_deref().is_none_or(|wanted| wanted == name);
    let (name, code) = statuses(pod)
        .filter(|status| named(&status.name))
        .filter_map(|status| {
            Some((&status.name, status.state.as_ref()?.terminated.as_ref()?.exit_code))
        })
        .find(|(_, code)| *code != 0 && codes.values.contains(code) == (codes.operator == "In"))?;
    Some(format!("Container {name} for pod {} failed with exit code {code}", full_name(pod)))
}

fn by_condition(patterns: &[PodFailurePolicyOnPodConditionsPattern], pod: &Pod) -> Option<String> {
    let is_so = |pattern: &&PodFailurePolicyOnPodConditionsPattern| {
        let wanted = pattern.status.as_deref().unwrap_or("True");
        objects::pod_condition(pod, &pattern.type_).is_some_and(|found| found.status == wanted)
    };
    let pattern = patterns.iter().find(is_so)?;
    Some(format!("Pod {} has condition {}", full_name(pod), pattern.type_))
}

fn full_name(pod: &Pod) -> String {
    format!("{}/{}", objects::namespace(&pod.metadata), objects::name(&pod.metadata))
}

/// The number of the first rule by which these indexes are enough.
pub(super) fn enough(policy: Option<&SuccessPolicy>, completed: &Indexes) -> Option<usize> {
    policy?.rules.iter().position(|rule| {
        // The API validated the text.
        let wanted = rule.succeeded_indexes.as_deref().and_then(Indexes::parse);
        let reached = wanted.as_ref().map_or(completed.len(), |wanted| wanted.common(completed));
        match (rule.succeeded_count, wanted) {
            (Some(count), _) => i64::from(reached) >= i64::from(count),
            (None, Some(wanted)) => reached == wanted.len(),
            (None, None) => false,
        }
    })
}
