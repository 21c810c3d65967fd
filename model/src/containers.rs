//! Which containers of a pod run as long as it does: the ordinary ones, and beside them its sidecars; and when that is over.

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodSpec};

/// Whether an init container keeps running beside the ordinary ones (KEP-753).
pub fn is_sidecar(init: &Container) -> bool {
    init.restart_policy.as_deref() == Some("Always")
}

/// The containers whose ports are the pod's, the ordinary ones first.
pub fn lasting(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    let sidecars = spec.init_containers.iter().flatten().filter(|init| is_sidecar(init));
    spec.containers.iter().chain(sidecars)
}

/// Whether the pod has ended, and none of its containers is reported as running: a node says that it has evicted a pod before those
/// have ended.
pub fn nothing_runs(pod: &Pod) -> bool {
    let status = pod.status.iter();
    let lists = status.flat_map(|s| [&s.init_container_statuses, &s.container_statuses]);
    let mut containers = lists.flatten().flatten();
    let runs = |c: &ContainerStatus| c.state.as_ref().is_some_and(|s| s.running.is_some());
    have_ended(pod) && !containers.any(runs)
}

/// Whether all of them have ended for good: the pod's address may be somebody else's.
pub fn have_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}
