//! PodDisruptionBudgets.

use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::rules::{invalid, not_negative, one_of, selector};
use super::{Causes, Object};

const POLICIES: [&str; 2] = ["AlwaysAllow", "IfHealthyBudget"];

impl Object for PodDisruptionBudget {
    const GENERATION: bool = true;

    fn prepare_create(&mut self) {
        self.status = Some(PodDisruptionBudgetStatus::default());
    }

    fn copy_status(&mut self, from: &Self) {
        self.status.clone_from(&from.status);
    }

    fn spec_differs(&self, old: &Self) -> bool {
        self.spec != old.spec
    }

    fn validate(&self, causes: &mut Causes) {
        let Some(spec) = &self.spec else { return };
        if spec.min_available.is_some() && spec.max_unavailable.is_some() {
            let rule = "minAvailable and maxUnavailable cannot be both set";
            invalid("spec", "", rule, causes);
        }
        amount("spec.minAvailable", spec.min_available.as_ref(), causes);
        amount("spec.maxUnavailable", spec.max_unavailable.as_ref(), causes);
        if let Some(chosen) = &spec.selector {
            selector("spec.selector", chosen, causes);
        }
        let policy = spec.unhealthy_pod_eviction_policy.as_deref();
        one_of("spec.unhealthyPodEvictionPolicy", policy, &POLICIES, causes);
    }
}

/// A number of pods, or percent of them.
fn amount(field: &str, amount: Option<&IntOrString>, causes: &mut Causes) {
    match amount {
        Some(IntOrString::Int(number)) => not_negative(field, Some((*number).into()), causes),
        Some(IntOrString::String(text)) => {
            let percent = text.strip_suffix('%').and_then(|n| n.parse::<u8>().ok());
            if percent.is_none_or(|percent| percent > 100) {
                let rule = "must be a number of pods, or from 0% to 100%";
                invalid(field, text, rule, causes);
            }
        }
        None => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_budget_is_one_amount() {
        let causes = |spec: serde_json::Value| {
            let budget: PodDisruptionBudget =
                serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
            let mut causes = Causes::default();
            budget.validate(&mut causes);
            causes.into_vec().into_iter().map(|c| c.field).collect::<Vec<_>>()
        };
        assert_eq!(causes(json!({"minAvailable": 2})), [""; 0]);
        assert_eq!(causes(json!({"maxUnavailable": "30%"})), [""; 0]);
        assert_eq!(causes(json!({"minAvailable": 1, "maxUnavailable": 1})), ["spec"]);
        for bad in [json!(-1), json!("101%"), json!("x"), json!("5")] {
            assert_eq!(causes(json!({"minAvailable": bad})), ["spec.minAvailable"], "{bad}");
        }
        let policy = json!({"unhealthyPodEvictionPolicy": "Never"});
        assert_eq!(causes(policy), ["spec.unhealthyPodEvictionPolicy"]);
    }
}
