//! Which containers the kernel ended because they reached their memory limit.
//!
//! The runtime's own word comes late or never: containerd listens only once the process runs, says so beside the exit
//! and not with it, and drops what it hears after the container's control group is gone. A container that takes too
//! much at once then looks like one that failed (containerd issues 8180 and 8893). So the kernel is asked here, in a
//! way that does not depend on who is faster:
//!
//! - cgroup v2: each run of a container gets a group around its own ([`Oom::parent`]). Kills are counted upwards, and
//!   the outer group is there until the container is deleted, so the count can be read at any time.
//! - cgroup v1: kills are counted nowhere but in the container's own group, which the runtime deletes at the exit. That
//!   group is made and listened to before the runtime gets to it ([`v1`]).
//!
//! Where neither works, the runtime's word is all there is.
//!
//! A container without the process that was killed is seldom of use, and nobody restarts what still runs. So with cgroup v2 the kernel
//! ends all of it ([`Oom::unified`]), as the kubelet has it, unless the node is told otherwise.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::observed::Instance;

mod v1;

use v1::Listener;

/// The reason that Kubernetes gives for such an end.
pub(crate) const OOM_KILLED: &str = "OOMKilled";

/// Asks the kernel about the containers of this node.
pub(crate) struct Oom {
    hierarchy: Option<Hierarchy>,
    /// The group of all pods, in the notation of the runtime.
    pods: String,
    /// The kernel ends one process, not the container.
    single: bool,
    /// By container, where one has to listen.
    listeners: Mutex<HashMap<String, Arc<Listener>>>,
}

/// Where memory is accounted: the mount point.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Hierarchy {
    V1(PathBuf),
    V2(PathBuf),
}

impl Oom {
    /// For containers below that group, in the notation of the runtime, that lose a `single` process or all.
    pub(crate) fn new(pods: &str, single: bool) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self {
            hierarchy: memory_hierarchy(&mounts),
            pods: pods.to_owned(),
            single,
            listeners: Mutex::default(),
        }
    }

    /// What the runtime sets of a container's own group as it is written here (OCI runtime specification, "Unified"). Nothing that the kernel
    /// does not have: the container could not be made.
    pub(crate) fn unified(&self) -> HashMap<String, String> {
        let Some(Hierarchy::V2(root)) = &self.hierarchy else { return HashMap::new() };
        let controllers = std::fs::read_to_string(root.join("cgroup.controllers"));
        let controllers = controllers.unwrap_or_default();
        if self.single || !controllers.split_whitespace().any(|name| name == "memory") {
            return HashMap::new();
        }
        [("memory.oom.group".to_owned(), "1".to_owned())].into()
    }

    /// The group in which a run of a container gets its own.
    pub(crate) fn parent(&self, uid: &str, name: &str, attempt: u32) -> String {
        match self.hierarchy {
            Some(Hierarchy::V2(_)) => {
                Path::new(&self.pods).join(outer(uid, name, attempt)).display().to_string()
            }
            _ => self.pods.clone(),
        }
    }

    /// To be called between creating and starting a container.
    pub(crate) fn prepare(&self, id: &str) {
        let Some(group) = self.own_group(id) else { return };
        if let Err(error) = std::fs::create_dir_all(&group) {
            tracing::debug!(group = %group.display(), %error, "control group not made ahead");
            return;
        }
        self.listen(id, &group);
    }

    /// Listens to a container that an earlier agent started.
    pub(crate) fn adopt(&self, id: &str) {
        if let Some(group) = self.own_group(id) {
            self.listen(id, &group);
        }
    }

    /// Whether a run that has ended was killed for its memory.
    pub(crate) async fn has_killed(&self, uid: &str, run: &Instance) -> bool {
        match &self.hierarchy {
            None => false,
            Some(Hierarchy::V2(root)) => {
                let group = below(root, &self.parent(uid, &run.name, run.attempt));
                kills(&std::fs::read_to_string(group.join("memory.events")).unwrap_or_default()) > 0
            }
            Some(Hierarchy::V1(_)) => {
                let Some(listener) = self.listeners().get(&run.id).cloned() else { return false };
                tokio::task::spawn_blocking(move || listener.heard()).await.unwrap_or(false)
            }
        }
    }

    /// The container is deleted. What was made for it goes, in case the runtime never saw it.
    pub(crate) fn forget(&self, uid: &str, run: &Instance) {
        self.listeners().remove(&run.id);
        let made = match &self.hierarchy {
            None => return,
            Some(Hierarchy::V1(root)) => below(root, &self.pods).join(&run.id),
            Some(Hierarchy::V2(root)) => below(root, &self.parent(uid, &run.name, run.attempt)),
        };
        // Usually gone already; and a group that is in use stays.
        let _ = std::fs::remove_dir(made);
    }

    /// Removes groups that were made for containers of pods other than these, by uid: nobody else does when an agent was killed before
    /// it could. Blocks.
    pub(crate) fn sweep(&self, known: &[&str]) {
        let Some(Hierarchy::V2(root)) = &self.hierarchy else { return };
        let groups = std::fs::read_dir(below(root, &self.pods)).into_iter().flatten().flatten();
        let left_over = |group: &std::fs::DirEntry| {
            let name = group.file_name();
            let name = name.to_string_lossy();
            name.split_once('_').is_some_and(|(uid, _)| !known.contains(&uid))
        };
        for group in groups.filter(left_over) {
            // One that is in use stays.
            let _ = std::fs::remove_dir(group.path());
        }
    }

    /// The container's own group, where it is what has to be listened to.
    fn own_group(&self, id: &str) -> Option<PathBuf> {
        match &self.hierarchy {
            Some(Hierarchy::V1(root)) => Some(below(root, &self.pods).join(id)),
            _ => None,
        }
    }

    fn listen(&self, id: &str, group: &Path) {
        if self.listeners().contains_key(id) {
            return;
        }
        match Listener::new(group) {
            Ok(listener) => drop(self.listeners().insert(id.to_owned(), Arc::new(listener))),
            Err(error) => {
                tracing::debug!(group = %group.display(), %error, "not listening for the end of memory");
            }
        }
    }

    fn listeners(&self) -> MutexGuard<'_, HashMap<String, Arc<Listener>>> {
        // Entries are put in and taken out whole.
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn outer(uid: &str, name: &str, attempt: u32) -> String {
    format!("{uid}_{name}_{attempt}")
}

/// The runtime's absolute names begin at the mount point.
fn below(root: &Path, group: &str) -> PathBuf {
    root.join(group.trim_start_matches('/'))
}

/// `oom_kill` of `memory.events` (cgroup v2, "Memory Interface Files").
fn kills(events: &str) -> u64 {
    let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

/// A v1 hierarchy with the memory controller has it for itself; otherwise it is in v2.
fn memory_hierarchy(mounts: &str) -> Option<Hierarchy> {
    let mut v2 = None;
    for line in mounts.lines() {
        let Some((mount, filesystem)) = line.split_once(" - ") else { continue };
        let Some(point) = mount.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut words = filesystem.split(' ');
        match (words.next(), words.nth(1).unwrap_or_default()) {
            (Some("cgroup"), options) if options.split(',').any(|o| o == "memory") => {
                return Some(Hierarchy::V1(point));
            }
            (Some("cgroup2"), _) => v2 = v2.or(Some(Hierarchy::V2(point))),
            _ => {}
        }
    }
    v2
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "31 25 0:28 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n";
    const V2: &str = "30 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 none rw,nsdelegate\n";

    #[test]
    fn memory_is_accounted_in_one_hierarchy() {
        let v1 = Some(Hierarchy::V1("/sys/fs/cgroup/memory".into()));
        let v2 = Some(Hierarchy::V2("/sys/fs/cgroup/unified".into()));
        assert_eq!(memory_hierarchy(&format!("{V2}{V1}")), v1);
        assert_eq!(memory_hierarchy(&format!("{V1}{V2}")), v1);
        assert_eq!(memory_hierarchy(&format!("{}{V2}", V1.replace("memory", "cpu"))), v2);
        assert_eq!(memory_hierarchy("1 0 0:1 / / rw - ext4 x rw\nbroken\n"), None);
    }

    #[test]
    fn only_kills_count() {
        let events = "low 0\nhigh 3\nmax 12\noom 2\noom_kill 1\noom_group_kill 0\n";
        assert_eq!(kills(events), 1);
        assert_eq!(kills(&events.replace("oom_kill 1", "oom_kill 0")), 0);
        assert_eq!(kills(""), 0);
    }

    fn run(name: &str, attempt: u32) -> Instance {
        Instance {
            id: "c1".to_owned(),
            sandbox: "s1".to_owned(),
            name: name.to_owned(),
            attempt,
            created_at: jiff::Timestamp::UNIX_EPOCH,
            state: crate::pods::observed::State::Unknown,
            image_id: String::new(),
            hash: String::new(),
            delay_secs: 0,
        }
    }

    fn oom(hierarchy: Option<Hierarchy>) -> Oom {
        let (pods, listeners) = ("/mesh/pods".to_owned(), Mutex::default());
        Oom { hierarchy, pods, single: false, listeners }
    }

    #[test]
    fn the_end_of_memory_ends_a_whole_container_where_the_kernel_can_do_that() {
        let root = tempfile::tempdir().unwrap();
        let v2 = || Some(Hierarchy::V2(root.path().to_owned()));
        let set = |oom: &Oom| oom.unified().into_iter().collect::<Vec<_>>();
        assert_eq!(set(&oom(v2())), [], "no controllers");
        let controllers = |names: &str| {
            std::fs::write(root.path().join("cgroup.controllers"), names).unwrap();
        };
        controllers("cpuset cpu pids\n");
        assert_eq!(set(&oom(v2())), [], "none for memory");
        controllers("cpuset cpu memory pids\n");
        let group = ("memory.oom.group".to_owned(), "1".to_owned());
        assert_eq!(set(&oom(v2())), [group]);
        assert_eq!(set(&Oom { single: true, ..oom(v2()) }), [], "the node is told otherwise");
        assert_eq!(set(&oom(Some(Hierarchy::V1(root.path().to_owned())))), []);
        assert_eq!(set(&oom(None)), []);
    }

    #[test]
    fn groups_of_pods_that_nobody_knows_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let oom = oom(Some(Hierarchy::V2(root.path().to_owned())));
        oom.sweep(&[]);
        let pods = root.path().join("mesh/pods");
        // A pod that is known, one that is not, one whose container still runs, and a sandbox.
        for group in ["u1_web_0", "u2_web_0", "u3_web_1/container", "sandbox"] {
            std::fs::create_dir_all(pods.join(group)).unwrap();
        }
        oom.sweep(&["u1"]);
        let mut left: Vec<_> =
            std::fs::read_dir(pods).unwrap().flatten().map(|e| e.file_name()).collect();
        left.sort();
        assert_eq!(left, ["sandbox", "u1_web_0", "u3_web_1"]);
    }

    #[tokio::test]
    async fn a_kill_is_read_from_the_group_around_the_container() {
        let root = tempfile::tempdir().unwrap();
        let oom = oom(Some(Hierarchy::V2(root.path().to_owned())));
        let run = run("web", 2);
        assert_eq!(oom.parent("u1", "web", 2), "/mesh/pods/u1_web_2");
        assert!(!oom.has_killed("u1", &run).await);
        let group = root.path().join("mesh/pods/u1_web_2");
        std::fs::create_dir_all(&group).unwrap();
        std::fs::write(group.join("memory.events"), "oom 1\noom_kill 1\n").unwrap();
        assert!(oom.has_killed("u1", &run).await);
        assert!(!oom.has_killed("u2", &run).await, "another pod");
        std::fs::remove_file(group.join("memory.events")).unwrap();
        oom.forget("u1", &run);
        assert!(!group.exists());
    }
}
