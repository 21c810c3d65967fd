//! Which containers of a pod run as long as it does: the ordinary ones, and beside them its sidecars.

use k8s_openapi::api::core::v1::{Container, PodSpec};

/// Whether an init container keeps running beside the ordinary ones (KEP-753).
pub fn is_sidecar(init: &Container) -> bool {
    init.restart_policy.as_deref() == Some("Always")
}

/// The containers whose ports are the pod's, the ordinary ones first.
pub fn lasting(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    let sidecars = spec.init_containers.iter().flatten().filter(|init| is_sidecar(init));
    spec.containers.iter().chain(sidecars)
}
