//! Quality of service class of a pod.

use k8s_openapi::api::core::v1::{Container, PodSpec};

use crate::pods::quantity;

/// How a pod's resources are promised (Kubernetes, "Pod Quality of Service Classes").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Qos {
    /// Every container has CPU and memory limits, and requests equal to them.
    Guaranteed,
    /// Something is requested or limited.
    Burstable,
    /// Nothing is.
    BestEffort,
}

impl Qos {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

/// The class of a pod.
pub(crate) fn qos(spec: &PodSpec) -> Qos {
    let all = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
    if all().all(is_guaranteed) {
        Qos::Guaranteed
    } else if all().any(has_any) {
        Qos::Burstable
    } else {
        Qos::BestEffort
    }
}

const COUNTED: [&str; 2] = ["cpu", "memory"];

fn has_any(container: &Container) -> bool {
    amount(container, true)
        .iter()
        .chain(&amount(container, false))
        .any(|a| a.is_some_and(|a| a > 0))
}

fn is_guaranteed(container: &Container) -> bool {
    let (limits, requests) = (amount(container, true), amount(container, false));
    limits.iter().zip(&requests).all(|(limit, request)| {
        limit.is_some_and(|l| l > 0) && request.is_none_or(|r| Some(r) == *limit)
    })
}

/// CPU and memory of the limits or requests.
fn amount(container: &Container, limits: bool) -> [Option<i64>; 2] {
    let resources = container.resources.as_ref();
    let map = resources.and_then(|r| if limits { r.limits.as_ref() } else { r.requests.as_ref() });
    COUNTED.map(|name| {
        let quantity = map?.get(name)?;
        if name == "cpu" { quantity::millis(quantity) } else { quantity::bytes(quantity) }.ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_follow_requests_and_limits() {
        let class = |resources: serde_json::Value| {
            let spec = serde_json::json!({"containers": [{"name": "c", "resources": resources}]});
            qos(&serde_json::from_value(spec).unwrap()).as_str()
        };
        assert_eq!(class(serde_json::json!({})), "BestEffort");
        assert_eq!(class(serde_json::json!({"requests": {"cpu": "0"}})), "BestEffort");
        assert_eq!(class(serde_json::json!({"requests": {"cpu": "1"}})), "Burstable");
        assert_eq!(class(serde_json::json!({"limits": {"memory": "1Gi"}})), "Burstable");
        assert_eq!(
            class(serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}})),
            "Guaranteed"
        );
        let same = serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"},
            "requests": {"cpu": "1000m", "memory": "1024Mi"}});
        assert_eq!(class(same), "Guaranteed");
        let less =
            serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1m"}});
        assert_eq!(class(less), "Burstable");
    }
}
