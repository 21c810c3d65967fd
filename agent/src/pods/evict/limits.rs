//! Pods that take more of the node's disk than they may: `sizeLimit` of an emptyDir, limits of `ephemeral-storage`.

use k8s_openapi::api::core::v1::{PodSpec, Volume};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::measure::on_disk;
use super::*;

const STORAGE: &str = "ephemeral-storage";

fn size_limit(volume: &Volume) -> Option<&Quantity> {
    volume.empty_dir.as_ref()?.size_limit.as_ref().filter(|_| on_disk(volume))
}

fn storage_limit(container: &Container) -> Option<&Quantity> {
    container.resources.as_ref()?.limits.as_ref()?.get(STORAGE)
}

fn bytes(limit: &Quantity) -> Option<u64> {
    u64::try_from(quantity::bytes(limit).ok()?).ok().filter(|bytes| *bytes > 0)
}

/// Whether any pod has such a limit.
pub(super) fn limited(pods: &Desired) -> bool {
    let is_limited = |spec: &PodSpec| {
        spec.volumes.iter().flatten().any(|v| size_limit(v).is_some())
            || lasting(spec).any(|c| storage_limit(c).is_some())
    };
    pods.values().any(|work| work.pod.spec.as_ref().is_some_and(is_limited))
}

/// The pods that are above a limit, and above which. What keeps the node itself at work stays all the same.
pub(super) fn exceeded(pods: &Desired, measured: &[(PodRef, Measured)]) -> Vec<(PodRef, String)> {
    let found = measured.iter().filter_map(|(pod, measured)| {
        let object = &pods.get(pod)?.pod;
        let why = above(object.spec.as_ref()?, measured)?;
        (priority(object) < CRITICAL).then(|| (pod.clone(), why))
    });
    found.collect()
}

fn above(spec: &PodSpec, measured: &Measured) -> Option<String> {
    let is_above = |used: u64, limit: &Quantity| bytes(limit).is_some_and(|most| used > most);
    for volume in spec.volumes.iter().flatten() {
        let Some(limit) = size_limit(volume) else { continue };
        let used = measured.volumes.get(&volume.name).copied().unwrap_or(0);
        if is_above(used, limit) {
            let (name, limit) = (&volume.name, &limit.0);
            return Some(format!("Usage of EmptyDir volume {name:?} exceeds the limit {limit:?}."));
        }
    }
    for container in lasting(spec) {
        let used = measured.containers.get(&container.name).copied().unwrap_or(0);
        if let Some(limit) = storage_limit(container).filter(|limit| is_above(used, limit)) {
            let (name, limit) = (&container.name, &limit.0);
            return Some(format!(
                "Container {name} exceeded its local ephemeral storage limit {limit:?}."
            ));
        }
    }
    let limit = |container| storage_limit(container).and_then(bytes);
    let mut main = spec.containers.iter().map(limit);
    let main = main.try_fold(0_u64, |sum, limit| Some(sum.saturating_add(limit?)))?;
    // A sidecar without a limit of its own shares those of the others.
    let sidecars = lasting(spec).skip(spec.containers.len()).filter_map(limit);
    let sum = sidecars.fold(main, u64::saturating_add);
    (measured.disk() > sum).then(|| {
        format!("Pod ephemeral local storage usage exceeds the total limit of containers {sum}.")
    })
}
