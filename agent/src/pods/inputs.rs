//! Where pods come from: the API, and the node's own files. Both together are what the node runs.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use mesh_model::snapshot::PodWork;
use tokio::sync::watch;

use super::statics::{ANNOTATION_SHOWN_AS, Directory, Mirrors, Uids, is_mirror};
use super::supervise::{Goal, merge};

/// How often the directory of static pods is looked at.
const PERIOD: Duration = Duration::from_secs(2);

/// What is wanted by each side.
pub(super) struct Inputs {
    sources: Mutex<Sources>,
    goal: watch::Sender<Option<Goal>>,
    mirrors: watch::Sender<Mirrors>,
    uids: Arc<Uids>,
}

struct Sources {
    /// Those of the API that are to run; absent until it is known.
    api: Option<Vec<Arc<PodWork>>>,
    mirrors: Option<Vec<Pod>>,
    directory: Directory,
}

impl Inputs {
    /// Reads the directory: what it says has to be known before anything that runs is found to be unwanted. Blocks.
    pub(super) fn new(mut directory: Directory, goal: watch::Sender<Option<Goal>>) -> Arc<Self> {
        directory.read();
        let sources = Mutex::new(Sources { api: None, mirrors: None, directory });
        let inputs =
            Self { sources, goal, mirrors: watch::Sender::default(), uids: Arc::default() };
        inputs.change(|_| true);
        Arc::new(inputs)
    }

    /// The pods that the API has for this node.
    pub(super) fn set_api(&self, pods: impl IntoIterator<Item = Arc<PodWork>>) {
        let (mirrors, api): (Vec<_>, Vec<_>) =
            pods.into_iter().partition(|work: &Arc<PodWork>| is_mirror(&work.pod));
        self.change(|sources| {
            sources.api = Some(api);
            sources.mirrors = Some(mirrors.iter().map(|work| work.pod.clone()).collect());
            true
        });
    }

    /// Follows the directory until it is cancelled.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let inputs = Arc::clone(&self);
            let read = tokio::task::spawn_blocking(move || {
                inputs.change(|sources| sources.directory.read());
            });
            let _ = read.await;
        }
    }

    /// What is to be.
    pub(super) fn goal(&self) -> watch::Receiver<Option<Goal>> {
        self.goal.subscribe()
    }

    /// What the API is to show of static pods.
    pub(super) fn mirrors(&self) -> watch::Receiver<Mirrors> {
        self.mirrors.subscribe()
    }

    /// Under which names the API knows static pods.
    pub(super) fn uids(&self) -> &Arc<Uids> {
        &self.uids
    }

    fn change(&self, change: impl FnOnce(&mut Sources) -> bool) {
        // A change is one assignment: a panic elsewhere leaves the sources usable.
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if !change(&mut sources) {
            return;
        }
        let mirrors =
            Mirrors { statics: sources.directory.pods(), mirrors: sources.mirrors.clone() };
        self.uids.learn(&mirrors);
        let statics = mirrors.statics.iter().map(|pod| Arc::new(work(pod, mirrors.of(pod))));
        let all: Vec<Arc<PodWork>> = statics.chain(sources.api.iter().flatten().cloned()).collect();
        let complete = sources.api.is_some();
        let was_some = self.goal.borrow().is_some();
        if complete || was_some || !all.is_empty() {
            self.goal.send_modify(|goal| {
                let before = goal.take().map(|goal| goal.pods);
                *goal = Some(Goal { pods: merge(before, all), complete });
            });
        }
        self.mirrors.send_if_modified(|before| {
            let changed = *before != mirrors;
            *before = mirrors;
            changed
        });
    }
}

/// A static pod as it is to run, with what the API was told of it. It has no objects of the API.
fn work(pod: &Pod, mirror: Option<&Pod>) -> PodWork {
    let mut pod = pod.clone();
    if let Some(mirror) = mirror {
        pod.status.clone_from(&mirror.status);
        let uid = mirror.metadata.uid.clone().unwrap_or_default();
        let annotations = pod.metadata.annotations.get_or_insert_default();
        annotations.insert(ANNOTATION_SHOWN_AS.to_owned(), uid);
    }
    PodWork {
        pod,
        config_maps: Default::default(),
        binary_keys: Default::default(),
        secrets: Default::default(),
        service_env: Default::default(),
        departure: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c, image: i:1}]}\n";

    fn api_pod(name: &str, mirror: bool) -> Arc<PodWork> {
        let annotations = if mirror {
            serde_json::json!({"kubernetes.io/config.mirror": "old"})
        } else {
            serde_json::json!({})
        };
        let pod = serde_json::json!({"metadata": {"namespace": "d", "name": name, "uid": name,
            "annotations": annotations}, "spec": {"containers": []}});
        Arc::new(work(&serde_json::from_value(pod).unwrap(), None))
    }

    #[test]
    fn files_count_at_once_and_mirrors_never() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("web.yaml"), WEB).unwrap();
        let directory = Directory::new(dir.path().to_owned(), "node-1".parse().unwrap());
        let inputs = Inputs::new(directory, watch::Sender::new(None));
        let names = |inputs: &Inputs| {
            let goal = inputs.goal().borrow().clone().unwrap();
            let names: Vec<String> = goal.pods.keys().map(|pod| pod.name.clone()).collect();
            (names, goal.complete)
        };
        assert_eq!(names(&inputs), (vec!["web-node-1".to_owned()], false));
        inputs.set_api(vec![api_pod("p", false), api_pod("web-node-1", true)]);
        let both = vec!["p".to_owned(), "web-node-1".to_owned()];
        let (mut seen, complete) = names(&inputs);
        seen.sort();
        assert_eq!((seen, complete), (both, true));
        std::fs::remove_file(dir.path().join("web.yaml")).unwrap();
        inputs.change(|sources| sources.directory.read());
        assert_eq!(names(&inputs), (vec!["p".to_owned()], true));
        assert_eq!(inputs.mirrors().borrow().mirrors.as_ref().unwrap().len(), 1, "to be deleted");
    }

    #[test]
    fn the_last_file_that_goes_counts_without_an_api() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("web.yaml"), WEB).unwrap();
        let directory = Directory::new(dir.path().to_owned(), "node-1".parse().unwrap());
        let inputs = Inputs::new(directory, watch::Sender::new(None));
        std::fs::remove_file(dir.path().join("web.yaml")).unwrap();
        inputs.change(|sources| sources.directory.read());
        let goal = inputs.goal().borrow().clone().unwrap();
        assert!(goal.pods.is_empty() && !goal.complete);
    }

    #[test]
    fn without_files_nothing_is_wanted_before_the_api_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path().join("none"), "node-1".parse().unwrap());
        let inputs = Inputs::new(directory, watch::Sender::new(None));
        assert!(inputs.goal().borrow().is_none());
        inputs.set_api(vec![]);
        assert!(inputs.goal().borrow().as_ref().is_some_and(|goal| goal.complete));
    }
}
