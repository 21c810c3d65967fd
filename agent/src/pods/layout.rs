//! Where a pod's files are on the node.

use std::collections::BTreeSet;
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

    /// What is left of pods other than these, by uid, in the order in which it is to be deleted: a pod's logs can be told from what
    /// others write there as long as the rest is there. Blocks.
    pub(crate) fn left_overs(&self, known: &[&str]) -> Vec<PathBuf> {
        let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
        let mut uids = BTreeSet::new();
        let mut found = Vec::new();
        for entry in self.roots().into_iter().flat_map(entries) {
            let uid = entry.file_name().to_string_lossy().into_owned();
            if !known.contains(&uid.as_str()) {
                uids.insert(uid);
                found.push(entry.path());
            }
        }
        let of_pod = |entry: &std::fs::DirEntry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.rsplit_once('_').is_some_and(|(_, uid)| uids.contains(uid))
        };
        let logs = entries(&self.logs).filter(of_pod).map(|entry| entry.path());
        logs.chain(found).collect()
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

    /// The directory that holds the pods' log directories.
    pub(crate) fn log_root(&self) -> &Path {
        &self.logs
    }

    /// The directory of links to logs, beside that of the logs.
    pub(crate) fn log_links(&self) -> PathBuf {
        self.logs.with_file_name("containers")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_pod_is_found_with_its_logs_first() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let layout = Layout::at(&at("state"), &at("run"), &at("log"));
        assert!(layout.left_overs(&[]).is_empty(), "nothing was ever made");
        for path in [
            "state/pods/u1/volumes",
            "state/pods/u2",
            "run/pods/u2",
            "run/pods/u3",
            "log/ns_a_u1/c",
            "log/ns_b_u2",
            "log/ns_others_u4",
            "log/u2",
        ] {
            std::fs::create_dir_all(at(path)).unwrap();
        }
        let mut found = layout.left_overs(&["u1"]);
        assert_eq!(found.remove(0), at("log/ns_b_u2"));
        found.sort();
        assert_eq!(found, ["run/pods/u2", "run/pods/u3", "state/pods/u2"].map(at));
    }
}
