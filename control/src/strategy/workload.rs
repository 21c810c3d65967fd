//! Deployments and ReplicaSets, and what they share with the other kinds that make pods of a template.

use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentSpec, DeploymentStrategy, ReplicaSet, RollingUpdateDeployment,
};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::rules::{forbidden, invalid, is_empty, not_negative, one_of, selector, selects};
use super::{Causes, Object, names, pod};

mod daemonset;
mod revision;
mod statefulset;

const QUARTER: &str = "25%";
const REVISIONS: i32 = 10;
const PROGRESS_SECS: i32 = 600;
pub(super) const IMMUTABLE: &str = "field is immutable";

impl Object for Deployment {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn set_defaults(&mut self) {
        let Some(spec) = &mut self.spec else { return };
        spec.replicas.get_or_insert(1);
        spec.revision_history_limit.get_or_insert(REVISIONS);
        spec.progress_deadline_seconds.get_or_insert(PROGRESS_SECS);
        let strategy = spec.strategy.get_or_insert_with(DeploymentStrategy::default);
        let type_ = strategy.type_.get_or_insert_with(|| "RollingUpdate".to_owned());
        if type_ == "RollingUpdate" {
            let rolling =
                strategy.rolling_update.get_or_insert_with(RollingUpdateDeployment::default);
            for field in [&mut rolling.max_surge, &mut rolling.max_unavailable] {
                field.get_or_insert_with(|| IntOrString::String(QUARTER.to_owned()));
            }
        }
        template_defaults(&mut spec.template);
    }

    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else {
            causes.add("spec", "Required value");
            return;
        };
        not_negative("spec.replicas", spec.replicas.map(i64::from), causes);
        not_negative("spec.minReadySeconds", spec.min_ready_seconds.map(i64::from), causes);
        not_negative(
            "spec.revisionHistoryLimit",
            spec.revision_history_limit.map(i64::from),
            causes,
        );
        deadlines(spec, causes);
        selected(&spec.selector, Some(&spec.template), "deployment", causes);
        template(&spec.template, "ReplicaSet", causes);
        if let Some(found) = &spec.strategy {
            strategy(found, causes);
        }
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let (Some(new), Some(old)) = (&self.spec, &old.spec) else { return };
        same_selector(&new.selector, &old.selector, causes);
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }
}

impl Object for ReplicaSet {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn set_defaults(&mut self) {
        let Some(spec) = &mut self.spec else { return };
        spec.replicas.get_or_insert(1);
        if let Some(template) = &mut spec.template {
            template_defaults(template);
        }
    }

    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else {
            causes.add("spec", "Required value");
            return;
        };
        not_negative("spec.replicas", spec.replicas.map(i64::from), causes);
        not_negative("spec.minReadySeconds", spec.min_ready_seconds.map(i64::from), causes);
        selected(&spec.selector, spec.template.as_ref(), "replicaset", causes);
        match &spec.template {
            Some(found) => template(found, "ReplicaSet", causes),
            None => causes.add("spec.template", "Required value"),
        }
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let (Some(new), Some(old)) = (&self.spec, &old.spec) else { return };
        same_selector(&new.selector, &old.selector, causes);
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }
}

pub(super) fn template_defaults(template: &mut PodTemplateSpec) {
    if let Some(spec) = &mut template.spec {
        pod::defaults::pod_spec(spec);
    }
    if let Some(meta) = &mut template.metadata {
        // The service sets this one, and it means nothing here.
        meta.creation_timestamp = None;
    }
}

fn template(template: &PodTemplateSpec, kind: &str, causes: &mut Causes) {
    if let Some(meta) = &template.metadata {
        names::labels("spec.template.metadata.labels", meta.labels.as_ref(), causes);
        let annotations = meta.annotations.as_ref();
        names::annotations("spec.template.metadata.annotations", annotations, causes);
    }
    match &template.spec {
        Some(spec) => {
            pod::spec::pod_spec("spec.template.spec", spec, causes);
            let restart = spec.restart_policy.as_deref();
            if matches!(restart, Some("Never" | "OnFailure")) {
                one_of("spec.template.spec.restartPolicy", restart, &["Always"], causes);
            }
            if spec.active_deadline_seconds.is_some() {
                let field = "spec.template.spec.activeDeadlineSeconds";
                let rule = format!("activeDeadlineSeconds in {kind} is not Supported");
                forbidden(field, &rule, causes);
            }
        }
        None => causes.add("spec.template.spec.containers", "Required value"),
    }
}

fn selected(
    chosen: &LabelSelector,
    template: Option<&PodTemplateSpec>,
    what: &str,
    causes: &mut Causes,
) {
    selector("spec.selector", chosen, causes);
    if is_empty(chosen) {
        let rule = format!("empty selector is invalid for {what}");
        causes.add("spec.selector", format!("Invalid value: {{}}: {rule}"));
        return;
    }
    let meta = template.and_then(|t| t.metadata.as_ref());
    if !selects(chosen, meta) {
        let labels = meta.and_then(|m| m.labels.clone()).unwrap_or_default();
        let rule = "`selector` does not match template `labels`";
        invalid("spec.template.metadata.labels", labels, rule, causes);
    }
}

fn same_selector(new: &LabelSelector, old: &LabelSelector, causes: &mut Causes) {
    if new != old {
        let text = serde_json::to_string(new).unwrap_or_default();
        causes.add("spec.selector", format!("Invalid value: {text}: {IMMUTABLE}"));
    }
}

fn deadlines(spec: &DeploymentSpec, causes: &mut Causes) {
    let Some(progress) = spec.progress_deadline_seconds else { return };
    not_negative("spec.progressDeadlineSeconds", Some(progress.into()), causes);
    if progress <= spec.min_ready_seconds.unwrap_or(0) {
        let rule = "must be greater than minReadySeconds";
        invalid("spec.progressDeadlineSeconds", progress, rule, causes);
    }
}

fn strategy(strategy: &DeploymentStrategy, causes: &mut Causes) {
    let type_ = strategy.type_.as_deref();
    one_of("spec.strategy.type", type_, &["Recreate", "RollingUpdate"], causes);
    let Some(rolling) = &strategy.rolling_update else { return };
    if type_ == Some("Recreate") {
        let rule = "may not be specified when strategy `type` is 'Recreate'";
        forbidden("spec.strategy.rollingUpdate", rule, causes);
        return;
    }
    let surge = share("spec.strategy.rollingUpdate.maxSurge", rolling.max_surge.as_ref(), causes);
    let field = "spec.strategy.rollingUpdate.maxUnavailable";
    let unavailable = share(field, rolling.max_unavailable.as_ref(), causes);
    if (surge, unavailable) == (Some(0), Some(0)) {
        invalid(field, 0, "may not be 0 when `maxSurge` is 0", causes);
    }
    if let (Some(IntOrString::String(text)), Some(share)) = (&rolling.max_unavailable, unavailable)
        && share > 100
    {
        invalid(field, text, "must not be greater than 100%", causes);
    }
}

/// A number of pods, or a percentage of them; `None` when it is neither.
fn share(field: &str, value: Option<&IntOrString>, causes: &mut Causes) -> Option<i32> {
    match value? {
        IntOrString::Int(number) => {
            not_negative(field, Some((*number).into()), causes);
            Some(*number)
        }
        IntOrString::String(text) => {
            let digits = text.strip_suffix('%').filter(|d| d.bytes().all(|b| b.is_ascii_digit()));
            let number = digits.and_then(|d| d.parse().ok());
            if number.is_none() {
                let rule = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%', or '93%', regex used for validation is '[0-9]+%')";
                invalid(field, text, rule, causes);
            }
            number
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn deployment(spec: Value) -> Deployment {
        let mut base = json!({"metadata": {"name": "d", "namespace": "n"}, "spec": {
            "selector": {"matchLabels": {"app": "d"}},
            "template": {"metadata": {"labels": {"app": "d"}},
                "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        json_patch::merge(&mut base["spec"], &spec);
        let mut object: Deployment = serde_json::from_value(base).unwrap();
        object.set_defaults();
        object
    }

    fn causes(spec: Value) -> Vec<String> {
        let mut causes = Causes::default();
        deployment(spec).validate(&mut causes);
        causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn defaults() {
        let spec = deployment(json!({})).spec.unwrap();
        assert_eq!((spec.replicas, spec.revision_history_limit), (Some(1), Some(10)));
        let rolling = spec.strategy.unwrap().rolling_update.unwrap();
        assert_eq!(rolling.max_surge, Some(IntOrString::String("25%".to_owned())));
        let recreate = deployment(json!({"strategy": {"type": "Recreate"}})).spec.unwrap();
        assert_eq!(recreate.strategy.unwrap().rolling_update, None);
    }

    #[test]
    fn each_wrong_field_is_named() {
        for (spec, cause) in [
            (
                json!({"replicas": -1}),
                "spec.replicas: Invalid value: -1: must be greater than or equal to 0",
            ),
            (json!({"selector": null}), "spec.selector: Invalid value: {}: empty selector"),
            (
                json!({"selector": {"matchLabels": {"app": "x"}}}),
                "spec.template.metadata.labels: Invalid value: {\"app\": \"d\"}: `selector` does not match",
            ),
            (
                json!({"template": {"spec": {"restartPolicy": "Never"}}}),
                "spec.template.spec.restartPolicy: Unsupported value: \"Never\"",
            ),
            (
                json!({"template": {"spec": {"containers": [{"name": "c"}]}}}),
                "spec.template.spec.containers[0].image: Required value",
            ),
            (
                json!({"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}}),
                "spec.strategy.rollingUpdate.maxUnavailable: Invalid value: 0: may not be 0",
            ),
            (
                json!({"strategy": {"rollingUpdate": {"maxSurge": "many"}}}),
                "spec.strategy.rollingUpdate.maxSurge: Invalid value: \"many\"",
            ),
            (json!({"strategy": {"type": "X"}}), "spec.strategy.type: Unsupported value: \"X\""),
        ] {
            let found = causes(spec);
            assert!(found.iter().any(|f| f.starts_with(cause)), "{cause}\n{found:?}");
        }
        assert_eq!(causes(json!({})), Vec::<String>::new());
    }
}
