//! ControllerRevisions: templates that a DaemonSet or StatefulSet has had.

use k8s_openapi::api::apps::v1::ControllerRevision;

use crate::strategy::rules::not_negative;
use crate::strategy::{Causes, Object};

impl Object for ControllerRevision {
    fn validate(&self, causes: &mut Causes) {
        if self.data.is_none() {
            causes.add("data", "Required value: data is mandatory");
        }
        not_negative("revision", Some(self.revision), causes);
    }

    fn validate_update(&self, old: &Self, causes: &mut Causes) {
        if self.data != old.data {
            let text = serde_json::to_string(&self.data).unwrap_or_default();
            causes.add("data", format!("Invalid value: {text}: {}", super::IMMUTABLE));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn revision(body: Value) -> ControllerRevision {
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn a_revision_has_content_that_stays() {
        let fields = |causes: Causes| {
            causes.into_vec().into_iter().map(|cause| cause.field).collect::<Vec<_>>()
        };
        let mut causes = Causes::default();
        revision(json!({"metadata": {}, "revision": -1})).validate(&mut causes);
        assert_eq!(fields(causes), ["data", "revision"]);
        let first = revision(json!({"metadata": {}, "data": {"a": 1}, "revision": 1}));
        let mut causes = Causes::default();
        first.validate(&mut causes);
        let renumbered = revision(json!({"metadata": {}, "data": {"a": 1}, "revision": 7}));
        renumbered.validate_update(&first, &mut causes);
        assert_eq!(fields(causes), [""; 0]);
        let mut causes = Causes::default();
        let other = revision(json!({"metadata": {}, "data": {"a": 2}, "revision": 1}));
        other.validate_update(&first, &mut causes);
        assert_eq!(fields(causes), ["data"]);
    }
}
