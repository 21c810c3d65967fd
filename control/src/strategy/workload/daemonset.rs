//! DaemonSets.

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetUpdateStrategy, RollingUpdateDaemonSet};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{REVISIONS, same_selector, selected, share, template, template_defaults};
use crate::strategy::rules::{invalid, not_negative, one_of};
use crate::strategy::{Causes, Object};

const ROLLING: &str = "spec.updateStrategy.rollingUpdate";

impl Object for DaemonSet {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn set_defaults(&mut self) {
        let Some(spec) = &mut self.spec else { return };
        spec.revision_history_limit.get_or_insert(REVISIONS);
        let strategy = spec.update_strategy.get_or_insert_default();
        let type_ = strategy.type_.get_or_insert_with(|| "RollingUpdate".to_owned());
        if type_ == "RollingUpdate" {
            let rolling = strategy.rolling_update.get_or_insert_default();
            rolling.max_unavailable.get_or_insert(IntOrString::Int(1));
            rolling.max_surge.get_or_insert(IntOrString::Int(0));
        }
        template_defaults(&mut spec.template);
    }

    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else {
            causes.add("spec", "Required value");
            return;
        };
        not_negative("spec.minReadySeconds", spec.min_ready_seconds.map(i64::from), causes);
        let kept = spec.revision_history_limit.map(i64::from);
        not_negative("spec.revisionHistoryLimit", kept, causes);
        selected(&spec.selector, Some(&spec.template), "daemonset", causes);
        template(&spec.template, "DaemonSet", causes);
        if let Some(found) = &spec.update_strategy {
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

fn strategy(strategy: &DaemonSetUpdateStrategy, causes: &mut Causes) {
    let type_ = strategy.type_.as_deref();
    one_of("spec.updateStrategy.type", type_, &["RollingUpdate", "OnDelete"], causes);
    if let Some(rolling) = strategy.rolling_update.as_ref().filter(|_| type_ != Some("OnDelete")) {
        amounts(rolling, causes);
    }
}

fn amounts(rolling: &RollingUpdateDaemonSet, causes: &mut Causes) {
    let (unavailable, surge) = (format!("{ROLLING}.maxUnavailable"), format!("{ROLLING}.maxSurge"));
    let mut amount = |field: &str, value: Option<&IntOrString>| {
        let amount = share(field, value, causes);
        if let (Some(IntOrString::String(text)), Some(101..)) = (value, amount) {
            invalid(field, text, "must not be greater than 100%", causes);
        }
        amount
    };
    let away = amount(&unavailable, rolling.max_unavailable.as_ref());
    let more = amount(&surge, rolling.max_surge.as_ref());
    match (away, more) {
        (Some(0) | None, Some(0) | None) => {
            causes.add(unavailable, "Required value: cannot be 0 when maxSurge is 0");
        }
        (Some(1..), Some(1..)) => {
            let value = serde_json::to_value(&rolling.max_surge).unwrap_or_default();
            let rule = "may not be set when maxUnavailable is non-zero";
            causes.add(surge, format!("Invalid value: {value}: {rule}"));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn set(spec: Value) -> DaemonSet {
        let mut base = json!({"metadata": {"name": "d", "namespace": "n"}, "spec": {
            "selector": {"matchLabels": {"app": "d"}},
            "template": {"metadata": {"labels": {"app": "d"}},
                "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        json_patch::merge(&mut base["spec"], &spec);
        let mut object: DaemonSet = serde_json::from_value(base).unwrap();
        object.set_defaults();
        object
    }

    fn causes(spec: Value) -> Vec<String> {
        let mut causes = Causes::default();
        set(spec).validate(&mut causes);
        causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    #[test]
    fn one_pod_at_a_time_is_replaced_by_default() {
        let spec = set(json!({})).spec.unwrap();
        assert_eq!(spec.revision_history_limit, Some(10));
        let rolling = spec.update_strategy.unwrap().rolling_update.unwrap();
        assert_eq!(rolling.max_unavailable, Some(IntOrString::Int(1)));
        assert_eq!(rolling.max_surge, Some(IntOrString::Int(0)));
        let by_hand = set(json!({"updateStrategy": {"type": "OnDelete"}})).spec.unwrap();
        assert_eq!(by_hand.update_strategy.unwrap().rolling_update, None);
    }

    #[test]
    fn each_wrong_field_is_named() {
        let rolling = |amounts: Value| json!({"updateStrategy": {"rollingUpdate": amounts}});
        for (spec, cause) in [
            (
                json!({"selector": null}),
                "spec.selector: Invalid value: {}: empty selector is invalid for daemonset",
            ),
            (
                json!({"selector": {"matchLabels": {"app": "x"}}}),
                "spec.template.metadata.labels: Invalid value: {\"app\": \"d\"}: `selector` does not match",
            ),
            (
                json!({"template": {"spec": {"restartPolicy": "OnFailure"}}}),
                "spec.template.spec.restartPolicy: Unsupported value: \"OnFailure\"",
            ),
            (
                json!({"template": {"spec": {"activeDeadlineSeconds": 9}}}),
                "spec.template.spec.activeDeadlineSeconds: Forbidden: activeDeadlineSeconds in DaemonSet",
            ),
            (json!({"minReadySeconds": -1}), "spec.minReadySeconds: Invalid value: -1"),
            (json!({"revisionHistoryLimit": -1}), "spec.revisionHistoryLimit: Invalid value: -1"),
            (
                json!({"updateStrategy": {"type": "Recreate"}}),
                "spec.updateStrategy.type: Unsupported value: \"Recreate\"",
            ),
            (
                rolling(json!({"maxUnavailable": 0})),
                "spec.updateStrategy.rollingUpdate.maxUnavailable: Required value: cannot be 0 when maxSurge is 0",
            ),
            (
                rolling(json!({"maxSurge": "10%"})),
                "spec.updateStrategy.rollingUpdate.maxSurge: Invalid value: \"10%\": may not be set when maxUnavailable",
            ),
            (
                rolling(json!({"maxUnavailable": "101%"})),
                "spec.updateStrategy.rollingUpdate.maxUnavailable: Invalid value: \"101%\": must not be greater",
            ),
            (
                rolling(json!({"maxUnavailable": -1})),
                "spec.updateStrategy.rollingUpdate.maxUnavailable: Invalid value: -1",
            ),
        ] {
            let found = causes(spec);
            assert!(found.iter().any(|f| f.starts_with(cause)), "{cause}\n{found:?}");
        }
        for good in [json!({}), rolling(json!({"maxUnavailable": 0, "maxSurge": "10%"}))] {
            assert_eq!(causes(good), Vec::<String>::new());
        }
    }

    #[test]
    fn the_selector_stays() {
        let mut causes = Causes::default();
        let other = json!({"selector": {"matchLabels": {"app": "d", "more": "x"}}});
        set(other).validate_update(&set(json!({})), &mut causes);
        assert_eq!(causes.into_vec()[0].field, "spec.selector");
    }
}
