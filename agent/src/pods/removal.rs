//! Taking down all pods of a node that leaves the cluster, without an agent that runs them.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt as _;
use mesh_cri::{CallError, Client};

use super::layout::Layout;
use super::logs::links::{Links, reconcile};
use super::observe::survey;
use super::observed::{PodRef, owned};
use super::volumes;

/// Pods that are taken down at the same time.
const AT_ONCE: usize = 8;
/// How long their containers are asked to stop: who wants them to take their time drains the node first.
const GRACE: Duration = Duration::from_secs(10);

/// Where the pods are.
#[derive(Debug, Clone)]
pub struct Removal {
    /// Unix socket of the runtime.
    pub containerd_socket: PathBuf,
    /// Control group of all pods, in the notation of the runtime.
    pub cgroup_parent: String,
    /// Directory of the containers' logs.
    pub log_dir: PathBuf,
    /// The agent's directory that outlives a reboot.
    pub state_dir: PathBuf,
    /// The one that does not.
    pub run_dir: PathBuf,
}

impl Removal {
    /// Ends all pods that carry our mark and deletes what they have on disk; how many there were, and what failed. No
    /// agent may run.
    pub async fn run(&self) -> (usize, Vec<String>) {
        let mut failures = Vec::new();
        let mut pods = BTreeSet::new();
        // Where there is no runtime there are no containers; what is on disk goes anyway.
        if self.containerd_socket.exists() {
            let client = Client::new(&self.containerd_socket);
            match survey(&client).await {
                Ok(found) => pods.extend(found.into_keys()),
                Err(error) => failures.push(format!("list pods: {error}")),
            }
            let ends = futures_util::stream::iter(&pods).map(|pod| end(&client, pod));
            let ends: Vec<_> = ends.buffer_unordered(AT_ONCE).collect().await;
            failures.extend(ends.into_iter().filter_map(Result::err));
            failures.extend(left(&client).await);
        }
        if !failures.is_empty() {
            // Files under containers that may still run stay.
            return (pods.len(), failures);
        }
        let layout = Layout::at(&self.state_dir, &self.run_dir, &self.log_dir);
        let mut directories: Vec<PathBuf> = layout.roots().map(Path::to_owned).into();
        directories.extend(pods.iter().map(|pod| layout.logs(pod)));
        for directory in directories {
            if let Err(error) = volumes::clean(&directory) {
                failures.push(format!("delete {}: {error}", directory.display()));
            }
        }
        let links = layout.log_links();
        if let Err(error) = reconcile(&links, layout.log_root(), &Links::new()) {
            failures.push(format!("delete links in {}: {error}", links.display()));
        }
        // It may hold what is not ours, and then stays.
        let _ = std::fs::remove_dir(links);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for group in groups(&mounts, &self.cgroup_parent) {
            if let Err(error) = remove_groups(&group) {
                failures.push(format!("remove {}: {error}", group.display()));
            }
        }
        (pods.len(), failures)
    }
}

/// What tells that the runtime still has something of ours.
async fn left(client: &Client) -> Option<String> {
    match survey(client).await {
        Ok(found) if found.is_empty() => None,
        Ok(found) => Some(format!("{} pods are still there", found.len())),
        Err(error) => Some(format!("list pods: {error}")),
    }
}

async fn end(client: &Client, pod: &PodRef) -> Result<(), String> {
    let named = |error: CallError| format!("{pod}: {error}");
    let labels = || owned().into_iter().chain(pod.labels()).collect();
    for container in client.list_containers(labels()).await.map_err(named)? {
        client.stop_container(&container.id, GRACE).await.map_err(named)?;
        client.remove_container(&container.id).await.map_err(named)?;
    }
    for sandbox in client.list_sandboxes(labels()).await.map_err(named)? {
        client.stop_sandbox(&sandbox.id).await.map_err(named)?;
        client.remove_sandbox(&sandbox.id).await.map_err(named)?;
    }
    Ok(())
}

/// Where the group of all pods is in each hierarchy, from /proc/self/mounts. None when it is not a group of its own.
fn groups(mounts: &str, parent: &str) -> Vec<PathBuf> {
    let below = Path::new(parent.trim_start_matches('/'));
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || below.as_os_str().is_empty() {
        return Vec::new();
    }
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let hierarchies = fields.filter(|f| matches!(f.get(2), Some(&"cgroup" | &"cgroup2")));
    hierarchies.filter_map(|f| Some(Path::new(f.get(1)?).join(below))).collect()
}

/// Removes a group with all below it. One that has processes stays, and is an error.
fn remove_groups(group: &Path) -> std::io::Result<()> {
    let Ok(entries) = std::fs::read_dir(group) else { return Ok(()) };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_groups(&entry.path())?;
    }
    std::fs::remove_dir(group)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_of_all_pods_is_found_in_each_hierarchy_and_never_the_root() {
        let mounts = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
            cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
            tmpfs /tmp tmpfs rw 0 0\n";
        let expected = ["/sys/fs/cgroup/unified/mesh/pods", "/sys/fs/cgroup/memory/mesh/pods"];
        assert_eq!(groups(mounts, "/mesh/pods"), expected.map(PathBuf::from));
        for root in ["", "/", "/..", "a/../.."] {
            assert!(groups(mounts, root).is_empty(), "{root:?}");
        }
    }

    #[tokio::test]
    async fn without_a_runtime_only_files_go() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for path in ["state/pods/u1/volumes/a", "run/pods/u1", "state/pki"] {
            std::fs::create_dir_all(at(path)).unwrap();
        }
        let removal = Removal {
            containerd_socket: at("containerd.sock"),
            cgroup_parent: "/mesh-test-that-does-not-exist".to_owned(),
            log_dir: at("log"),
            state_dir: at("state"),
            run_dir: at("run"),
        };
        assert_eq!(removal.run().await, (0, vec![]));
        assert!(!at("state/pods").exists() && !at("run/pods").exists());
        assert!(at("state/pki").exists(), "what is not the pods' stays");
    }
}
