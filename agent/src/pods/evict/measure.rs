//! What each pod takes of the node.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::*;
use crate::pods::layout::Layout;

/// What a running pod takes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Measured {
    pub(super) memory: u64,
    /// Writable layers and logs, by container.
    pub(super) containers: BTreeMap<String, u64>,
    /// Volumes on disk.
    pub(super) volumes: BTreeMap<String, u64>,
}

impl Measured {
    pub(super) fn of(&self, resource: Resource) -> u64 {
        match resource {
            Resource::Memory => self.memory,
            Resource::Disk => self.disk(),
            Resource::Pids => 0,
        }
    }

    pub(super) fn disk(&self) -> u64 {
        self.containers.values().chain(self.volumes.values()).sum()
    }
}

/// Measures the pods that have containers; directories only when asked to. Blocks.
pub(super) fn measure(
    pods: &Desired,
    stats: &[v1::ContainerStats],
    layout: &Layout,
    disk: bool,
) -> Vec<(PodRef, Measured)> {
    let mut all: BTreeMap<PodRef, Measured> = BTreeMap::new();
    for one in stats {
        let Some(attributes) = &one.attributes else { continue };
        let Some(pod) = PodRef::from_labels(&attributes.labels) else { continue };
        // What has ended uses no memory.
        let Some(memory) = one.memory.as_ref().and_then(|m| m.working_set_bytes.as_ref()) else {
            continue;
        };
        let entry = all.entry(pod).or_default();
        entry.memory += memory.value;
        let layer = one.writable_layer.as_ref().and_then(|layer| layer.used_bytes.as_ref());
        if let Some(name) = attributes.labels.get(LABEL_CONTAINER) {
            *entry.containers.entry(name.clone()).or_default() += layer.map_or(0, |b| b.value);
        }
    }
    for (pod, measured) in all.iter_mut().filter(|_| disk) {
        let logs = layout.logs(pod);
        for (name, bytes) in &mut measured.containers {
            *bytes += size(&logs.join(name));
        }
        let volumes = pods.get(pod).and_then(|work| work.pod.spec.as_ref()?.volumes.as_ref());
        for volume in volumes.into_iter().flatten().filter(|v| on_disk(v)) {
            let path = layout.volume(&pod.uid, &volume.name, false);
            measured.volumes.insert(volume.name.clone(), size(&path));
        }
    }
    all.into_iter().collect()
}

/// An emptyDir that is not in memory.
pub(super) fn on_disk(volume: &k8s_openapi::api::core::v1::Volume) -> bool {
    volume.empty_dir.as_ref().is_some_and(|e| e.medium.as_deref() != Some("Memory"))
}

/// What a directory takes of its disk; links are not followed.
fn size(path: &Path) -> u64 {
    let mut total = 0;
    let mut pending = vec![path.to_owned()];
    while let Some(path) = pending.pop() {
        for entry in std::fs::read_dir(&path).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            total += metadata.blocks() * 512;
            if metadata.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    total
}
