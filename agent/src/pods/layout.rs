//! Where a pod's files are on the node.

use std::path::{Path, PathBuf};

use super::RunnerOptions;
use super::observed::PodRef;

/// Directories of the pods of this node.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    state: PathBuf,
    /// Below the run directory, which is memory on any usual system: Secrets do not reach a disk.
    secrets: PathBuf,
    logs: PathBuf,
}

impl Layout {
    pub(crate) fn new(options: &RunnerOptions) -> Self {
        Self::at(&options.state_dir, &options.run_dir, &options.log_dir)
    }

    /// Below these directories.
    pub(crate) fn at(state: &Path, run: &Path, logs: &Path) -> Self {
        Self { state: state.join("pods"), secrets: run.join("pods"), logs: logs.to_owned() }
    }

    /// The directories that hold one directory per pod.
    pub(crate) fn roots(&self) -> [&Path; 2] {
        [&self.state, &self.secrets]
    }

    /// All that the pod has on disk, logs apart.
    pub(crate) fn pod(&self, uid: &str) -> [PathBuf; 2] {
        [self.state.join(uid), self.secrets.join(uid)]
    }

    /// The directories of the pod's volumes and of their parts that containers mount.
    pub(crate) fn volumes(&self, uid: &str) -> [PathBuf; 3] {
        let [state, secrets] = self.pod(uid);
        [state.join("parts"), state.join("volumes"), secrets.join("volumes")]
    }

    pub(crate) fn logs(&self, pod: &PodRef) -> PathBuf {
        self.logs.join(pod.log_directory())
    }

    pub(crate) fn volume(&self, uid: &str, volume: &str, secret: bool) -> PathBuf {
        let root = if secret { &self.secrets } else { &self.state };
        root.join(uid).join("volumes").join(volume)
    }

    /// Where a part of a volume is mounted for one of a container's mounts.
    pub(crate) fn part(&self, uid: &str, container: &str, mount: usize) -> PathBuf {
        self.state.join(uid).join("parts").join(container).join(mount.to_string())
    }

    pub(crate) fn hosts(&self, uid: &str) -> PathBuf {
        self.state.join(uid).join("etc-hosts")
    }

    /// The pod's tokens, which outlive a reboot.
    pub(crate) fn tokens(&self, uid: &str) -> PathBuf {
        self.state.join(uid).join("tokens.json")
    }

    /// What a run of a container leaves as its last words.
    pub(crate) fn termination(&self, uid: &str, container: &str, attempt: u32) -> PathBuf {
        self.state.join(uid).join("termination").join(format!("{container}-{attempt}"))
    }
}
