//! CPU and memory of a container as the runtime takes them.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use mesh_cri::v1;
use mesh_model::containers::is_sidecar;

use super::quantity::{self, InvalidQuantity};
use super::status::{Qos, qos};

/// Microseconds in which a CPU limit is counted.
const CPU_PERIOD: i64 = 100_000;

/// Limits, weight and OOM score of a container.
pub(crate) fn resources(
    spec: &PodSpec,
    container: &Container,
    node_memory: i64,
) -> Result<v1::LinuxContainerResources, InvalidQuantity> {
    let amount = |limits: bool, name: &str| -> Option<&Quantity> {
        let resources = container.resources.as_ref()?;
        let map = if limits { resources.limits.as_ref() } else { resources.requests.as_ref() };
        map?.get(name)
    };
    let cpu_limit = amount(true, "cpu").map(quantity::millis).transpose()?;
    let cpu_request = amount(false, "cpu").map(quantity::millis).transpose()?.or(cpu_limit);
    let memory_limit = amount(true, "memory").map(quantity::bytes).transpose()?;
    let memory_request = amount(false, "memory").map(quantity::bytes).transpose()?.or(memory_limit);
    let quota = cpu_limit.filter(|m| *m > 0).map(|m| (m * CPU_PERIOD / 1000).max(1000));
    Ok(v1::LinuxContainerResources {
        cpu_period: quota.map_or(0, |_| CPU_PERIOD),
        cpu_quota: quota.unwrap_or(0),
        cpu_shares: cpu_request.map_or(2, |m| (m * 1024 / 1000).clamp(2, 262_144)),
        memory_limit_in_bytes: memory_limit.unwrap_or(0),
        oom_score_adj: oom_score(qos(spec), memory_request.unwrap_or(0), node_memory),
        ..Default::default()
    })
}

/// The memory that the pod can have, if each of its containers has a limit: what its control group would be limited to. Init
/// containers run one after the other, beside the sidecars that were started before them.
pub(crate) fn memory_limit(spec: &PodSpec) -> Result<Option<i64>, InvalidQuantity> {
    let limit = |limits: Option<&BTreeMap<String, Quantity>>| {
        limits.and_then(|l| l.get("memory")).map_or(Ok(0), quantity::bytes)
    };
    let of = |c: &Container| limit(c.resources.as_ref().and_then(|r| r.limits.as_ref()));
    let (mut sidecars, mut peak) = (0_i64, 0);
    for init in spec.init_containers.iter().flatten() {
        let moment = match of(init)? {
            0 => return Ok(None),
            own => sidecars.saturating_add(own),
        };
        peak = moment.max(peak);
        if is_sidecar(init) {
            sidecars = moment;
        }
    }
    let mut sum = sidecars;
    for container in &spec.containers {
        match of(container)? {
            0 => return Ok(None),
            own => sum = sum.saturating_add(own),
        }
    }
    Ok(Some(sum.max(peak).saturating_add(limit(spec.overhead.as_ref())?)))
}

/// Who is killed first when memory runs out: the class that was promised least, then who requested least.
/// Never below zero: lowering a score needs CAP_SYS_RESOURCE, which an agent in a container may lack.
fn oom_score(qos: Qos, requested: i64, node_memory: i64) -> i64 {
    match qos {
        Qos::Guaranteed => 0,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let share = i128::from(requested) * 1000 / i128::from(node_memory.max(1));
            i64::try_from(1000 - share).unwrap_or(3).clamp(3, 999)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(resources_of: serde_json::Value) -> v1::LinuxContainerResources {
        let spec: PodSpec = serde_json::from_value(
            serde_json::json!({"containers": [{"name": "c", "resources": resources_of}]}),
        )
        .unwrap();
        resources(&spec, &spec.containers[0], 1 << 30).unwrap()
    }

    #[test]
    fn a_pod_is_limited_when_all_of_it_is() {
        let one = |name: &str, memory: &str, restart: Option<&str>| {
            serde_json::json!({"name": name, "restartPolicy": restart,
                "resources": {"limits": {"memory": memory}}})
        };
        let limit = |init: &[serde_json::Value], main: &[serde_json::Value], overhead: &str| {
            let spec = serde_json::json!({"initContainers": init, "containers": main,
                "overhead": {"memory": overhead}});
            memory_limit(&serde_json::from_value(spec).unwrap()).unwrap()
        };
        let (main, sidecar) = (one("c", "10", None), one("s", "5", Some("Always")));
        assert_eq!(limit(&[], &[main.clone(), main.clone()], "1"), Some(21));
        let peak = [one("i", "11", None), sidecar, one("j", "12", None)];
        assert_eq!(limit(&peak, std::slice::from_ref(&main), "0"), Some(17), "the last one");
        assert_eq!(limit(&peak[..2], std::slice::from_ref(&main), "0"), Some(15));
        assert_eq!(limit(&[], &[main.clone(), one("d", "0", None)], "0"), None);
        assert_eq!(limit(&[serde_json::json!({"name": "i"})], &[main], "0"), None);
    }

    #[test]
    fn requests_become_weights_and_limits_quotas() {
        let nothing = of(serde_json::json!({}));
        assert_eq!((nothing.cpu_shares, nothing.cpu_quota, nothing.oom_score_adj), (2, 0, 1000));
        let both = of(serde_json::json!({"requests": {"cpu": "250m", "memory": "512Mi"},
            "limits": {"cpu": "500m", "memory": "1Gi"}}));
        assert_eq!((both.cpu_shares, both.cpu_quota, both.cpu_period), (256, 50_000, 100_000));
        assert_eq!((both.memory_limit_in_bytes, both.oom_score_adj), (1 << 30, 500));
        let full = of(serde_json::json!({"limits": {"cpu": "2", "memory": "1Gi"}}));
        assert_eq!((full.cpu_shares, full.oom_score_adj), (2048, 0));
        assert_eq!(of(serde_json::json!({"limits": {"cpu": "1m"}})).cpu_quota, 1000);
    }
}
