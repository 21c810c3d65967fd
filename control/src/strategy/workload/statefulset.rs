//! StatefulSets.

use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetUpdateStrategy};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{REVISIONS, selected, share, template, template_defaults};
use crate::strategy::rules::{forbidden, invalid, not_negative, one_of};
use crate::strategy::{Causes, Object, names};

const UNSERVED: &str = "PersistentVolumeClaims are not served by this control service";
const FIXED: &str = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";

impl Object for StatefulSet {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = None;
    }

    fn set_defaults(&mut self) {
        let Some(spec) = &mut self.spec else { return };
        spec.replicas.get_or_insert(1);
        spec.revision_history_limit.get_or_insert(REVISIONS);
        spec.pod_management_policy.get_or_insert_with(|| "OrderedReady".to_owned());
        let strategy = spec.update_strategy.get_or_insert_default();
        let type_ = strategy.type_.get_or_insert_with(|| "RollingUpdate".to_owned());
        if type_ == "RollingUpdate" {
            let rolling = strategy.rolling_update.get_or_insert_default();
            rolling.partition.get_or_insert(0);
            rolling.max_unavailable.get_or_insert(IntOrString::Int(1));
        }
        template_defaults(&mut spec.template);
        drop_empty(spec);
    }

    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else {
            causes.add("spec", "Required value");
            return;
        };
        for (field, number) in [
            ("spec.replicas", spec.replicas),
            ("spec.minReadySeconds", spec.min_ready_seconds),
            ("spec.revisionHistoryLimit", spec.revision_history_limit),
            ("spec.ordinals.start", spec.ordinals.as_ref().and_then(|ordinals| ordinals.start)),
        ] {
            not_negative(field, number.map(i64::from), causes);
        }
        if let Some(name) = spec.service_name.as_deref().filter(|name| !name.is_empty()) {
            names::label("spec.serviceName", name, causes);
        }
        policy(spec.pod_management_policy.as_deref(), causes);
        selected(&spec.selector, Some(&spec.template), "statefulset", causes);
        template(&spec.template, "StatefulSet", causes);
        if let Some(found) = &spec.update_strategy {
            strategy(found, causes);
        }
        claims(spec, causes);
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        let (Some(new), Some(old)) = (&self.spec, &old.spec) else { return };
        let mut allowed = old.clone();
        allowed.replicas = new.replicas;
        allowed.ordinals.clone_from(&new.ordinals);
        allowed.template.clone_from(&new.template);
        allowed.update_strategy.clone_from(&new.update_strategy);
        allowed.revision_history_limit = new.revision_history_limit;
        allowed.min_ready_seconds = new.min_ready_seconds;
        let retention = &new.persistent_volume_claim_retention_policy;
        allowed.persistent_volume_claim_retention_policy.clone_from(retention);
        drop_empty(&mut allowed);
        if allowed != *new {
            forbidden("spec", FIXED, causes);
        }
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }
}

/// What is empty is absent: clients that know no difference send back the one for the other.
fn drop_empty(spec: &mut StatefulSetSpec) {
    spec.service_name = spec.service_name.take().filter(|name| !name.is_empty());
    spec.volume_claim_templates = spec.volume_claim_templates.take().filter(|all| !all.is_empty());
}

fn policy(policy: Option<&str>, causes: &mut Causes) {
    if !matches!(policy, Some("OrderedReady" | "Parallel")) {
        let rule = "must be 'OrderedReady' or 'Parallel'";
        invalid("spec.podManagementPolicy", policy.unwrap_or_default(), rule, causes);
    }
}

/// What would need volumes of its own is refused as a whole: a set without its volumes would lose what it writes. What happens to volumes
/// that it does not have is written into every set that was exported from Kubernetes.
fn claims(spec: &StatefulSetSpec, causes: &mut Causes) {
    if spec.volume_claim_templates.as_ref().is_some_and(|claims| !claims.is_empty()) {
        forbidden("spec.volumeClaimTemplates", UNSERVED, causes);
    }
    let Some(retention) = &spec.persistent_volume_claim_retention_policy else { return };
    for (part, word) in
        [("whenDeleted", &retention.when_deleted), ("whenScaled", &retention.when_scaled)]
    {
        let field = format!("spec.persistentVolumeClaimRetentionPolicy.{part}");
        one_of(&field, word.as_deref(), &["Delete", "Retain"], causes);
    }
}

fn strategy(strategy: &StatefulSetUpdateStrategy, causes: &mut Causes) {
    let rolling = strategy.rolling_update.as_ref();
    match strategy.type_.as_deref() {
        Some("RollingUpdate") => {}
        Some("OnDelete") => {
            if let Some(rolling) = rolling {
                let value = serde_json::to_string(rolling).unwrap_or_default();
                let rule = "only allowed for updateStrategy 'RollingUpdate'";
                let text = format!("Invalid value: {value}: {rule}");
                causes.add("spec.updateStrategy.rollingUpdate", text);
            }
            return;
        }
        other => {
            let rule = "must be 'RollingUpdate' or 'OnDelete'";
            invalid("spec.updateStrategy", other.unwrap_or_default(), rule, causes);
            return;
        }
    }
    let Some(rolling) = rolling else { return };
    let partition = rolling.partition.map(i64::from);
    not_negative("spec.updateStrategy.rollingUpdate.partition", partition, causes);
    let field = "spec.updateStrategy.rollingUpdate.maxUnavailable";
    match (share(field, rolling.max_unavailable.as_ref(), causes), &rolling.max_unavailable) {
        (Some(0), _) => invalid(field, 0, "cannot be 0", causes),
        (Some(101..), Some(IntOrString::String(text))) => {
            invalid(field, text, "must not be greater than 100%", causes);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn set(spec: Value) -> StatefulSet {
        let mut base = json!({"metadata": {"name": "d", "namespace": "n"}, "spec": {
            "selector": {"matchLabels": {"app": "d"}}, "serviceName": "d",
            "template": {"metadata": {"labels": {"app": "d"}},
                "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        json_patch::merge(&mut base["spec"], &spec);
        let mut object: StatefulSet = serde_json::from_value(base).unwrap();
        object.set_defaults();
        object
    }

    fn texts(causes: Causes) -> Vec<String> {
        causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
    }

    fn causes(spec: Value) -> Vec<String> {
        let mut causes = Causes::default();
        set(spec).validate(&mut causes);
        texts(causes)
    }

    #[test]
    fn defaults() {
        let spec = set(json!({})).spec.unwrap();
        assert_eq!((spec.replicas, spec.revision_history_limit), (Some(1), Some(10)));
        assert_eq!(spec.pod_management_policy.as_deref(), Some("OrderedReady"));
        let rolling = spec.update_strategy.unwrap().rolling_update.unwrap();
        assert_eq!(rolling.partition, Some(0));
        let by_hand = set(json!({"updateStrategy": {"type": "OnDelete"}})).spec.unwrap();
        assert_eq!(by_hand.update_strategy.unwrap().rolling_update, None);
    }

    #[test]
    fn each_wrong_field_is_named() {
        let rolling = |amounts: Value| json!({"updateStrategy": {"rollingUpdate": amounts}});
        for (spec, cause) in [
            (json!({"replicas": -1}), "spec.replicas: Invalid value: -1"),
            (json!({"ordinals": {"start": -1}}), "spec.ordinals.start: Invalid value: -1"),
            (json!({"serviceName": "a.b"}), "spec.serviceName: Invalid value: \"a.b\""),
            (
                json!({"podManagementPolicy": "Any"}),
                "spec.podManagementPolicy: Invalid value: \"Any\": must be 'OrderedReady' or 'Parallel'",
            ),
            (
                json!({"selector": null}),
                "spec.selector: Invalid value: {}: empty selector is invalid for statefulset",
            ),
            (
                json!({"template": {"spec": {"restartPolicy": "Never"}}}),
                "spec.template.spec.restartPolicy: Unsupported value: \"Never\"",
            ),
            (
                json!({"updateStrategy": {"type": "Recreate"}}),
                "spec.updateStrategy: Invalid value: \"Recreate\": must be 'RollingUpdate' or 'OnDelete'",
            ),
            (
                json!({"updateStrategy": {"type": "OnDelete", "rollingUpdate": {"partition": 1}}}),
                "spec.updateStrategy.rollingUpdate: Invalid value: {\"partition\":1}: only allowed",
            ),
            (
                rolling(json!({"partition": -1})),
                "spec.updateStrategy.rollingUpdate.partition: Invalid value: -1",
            ),
            (
                rolling(json!({"maxUnavailable": 0})),
                "spec.updateStrategy.rollingUpdate.maxUnavailable: Invalid value: 0: cannot be 0",
            ),
            (
                rolling(json!({"maxUnavailable": "200%"})),
                "spec.updateStrategy.rollingUpdate.maxUnavailable: Invalid value: \"200%\": must not",
            ),
            (
                json!({"volumeClaimTemplates": [{"metadata": {"name": "data"}}]}),
                "spec.volumeClaimTemplates: Forbidden: PersistentVolumeClaims are not served",
            ),
            (
                json!({"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Keep"}}),
                "spec.persistentVolumeClaimRetentionPolicy.whenDeleted: Unsupported value: \"Keep\"",
            ),
        ] {
            let found = causes(spec);
            assert!(found.iter().any(|f| f.starts_with(cause)), "{cause}\n{found:?}");
        }
        let retention = json!({"whenDeleted": "Retain", "whenScaled": "Delete"});
        for good in [
            json!({}),
            json!({"volumeClaimTemplates": []}),
            json!({"serviceName": ""}),
            json!({"persistentVolumeClaimRetentionPolicy": retention}),
        ] {
            assert_eq!(causes(good), Vec::<String>::new());
        }
    }

    #[test]
    fn names_and_order_stay_what_they_are() {
        let update = |spec: Value| {
            let mut causes = Causes::default();
            set(spec).validate_update(&set(json!({})), &mut causes);
            texts(causes)
        };
        for fixed in [
            json!({"serviceName": "other"}),
            json!({"podManagementPolicy": "Parallel"}),
            json!({"selector": {"matchLabels": {"app": "d", "more": "x"}}}),
        ] {
            assert!(update(fixed)[0].starts_with("spec: Forbidden: updates to statefulset spec"));
        }
        let free = json!({"replicas": 3, "ordinals": {"start": 2}, "minReadySeconds": 5,
            "revisionHistoryLimit": 2, "volumeClaimTemplates": [],
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}, "updateStrategy": {"type": "OnDelete", "rollingUpdate": null},
            "template": {"spec": {"containers": [{"name": "c", "image": "j"}]}}});
        assert_eq!(update(free), [""; 0]);
        // Stored as it came, by an earlier version.
        let mut old = set(json!({"serviceName": null}));
        let new = old.clone();
        old.spec.as_mut().unwrap().service_name = Some(String::new());
        let mut causes = Causes::default();
        new.validate_update(&old, &mut causes);
        assert_eq!(texts(causes), [""; 0]);
    }
}
